//! A guest does not spend the last PIN try of a card that matters.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use vscard_protocol::apdu::ins;
use vscard_protocol::{Atr, Card, CardError, CardSource, Case, Command, PresenceWatch, Response, StatusWord};

/// Tries that a card is taken to have which tells nobody.
const UNTOLD: u8 = 3;

/// A source whose cards keep the last tries of each PIN.
///
/// Watched are the commands that compare reference data, under any class: VERIFY, CHANGE REFERENCE DATA, ENABLE
/// and DISABLE VERIFICATION REQUIREMENT, RESET RETRY COUNTER (ISO/IEC 7816-4 §11.6). Before one of the first four
/// goes to the card, the card is asked with an empty VERIFY how many tries are left (63CX); if these are no more
/// than are to be kept, the command is answered 6983 here. What a card does not tell that way (the tries of a
/// PUK, of a PIN that is verified) is counted: it is taken to be three, then what the card said of the last
/// failure, and is not taken to be more after a success. The exception is a PIN that was not verified when last asked
/// about and now is: whoever verified it, a program that shares the card for instance, gave it all its tries back, three at least.
///
/// What would hide the comparison is refused: secure messaging (6882), chaining (6884, and 6883 while a chain of
/// another command is open), forms of VERIFY that are neither a comparison nor a question (6700), and ENVELOPE
/// (6D00). Commands of a card's own that compare a PIN
/// under another instruction are not known here.
pub struct KeepTries<S> {
    source: S,
    keep: u8,
    counted: Arc<Mutex<Counted>>,
}

/// What is known of the tries that the card does not tell. It outlives sessions, as the card's counters do, and
/// ends with another kind of card.
struct Counted {
    atr: Option<Atr>,
    /// By P2, of those references that have told them.
    told: [Option<Told>; 256],
    /// Of all the others together.
    untold: u8,
}

/// The tries of a reference.
#[derive(Clone, Copy)]
struct Told {
    left: u8,
    /// It was not verified when last asked about.
    unverified: bool,
}

impl Default for Counted {
    fn default() -> Self {
        Self { atr: None, told: [None; 256], untold: UNTOLD }
    }
}

impl<S: CardSource> KeepTries<S> {
    /// Wraps `source`, whose cards keep `keep` tries of each PIN; with 0, nothing is watched.
    pub fn new(source: S, keep: u8) -> Self {
        Self { source, keep, counted: Arc::default() }
    }
}

#[async_trait]
impl<S: CardSource> CardSource for KeepTries<S> {
    fn presence(&self) -> PresenceWatch {
        self.source.presence()
    }

    async fn power_on(&self, insertion: u64) -> Result<Box<dyn Card>, CardError> {
        let card = self.source.power_on(insertion).await?;
        if self.keep == 0 {
            return Ok(card);
        }
        let mut counted = lock(&self.counted);
        if counted.atr.as_ref() != Some(card.atr()) {
            *counted = Counted { atr: Some(card.atr().clone()), ..Counted::default() };
        }
        drop(counted);
        Ok(Box::new(KeepingCard {
            card,
            keep: self.keep,
            counted: Arc::clone(&self.counted),
            chaining: false,
        }))
    }
}

struct KeepingCard {
    card: Box<dyn Card>,
    keep: u8,
    counted: Arc<Mutex<Counted>>,
    /// The last command that went to the card announced more of it. Not every card minds that the next one is
    /// another command: it might take an empty VERIFY for the end of what it has.
    chaining: bool,
}

/// 6883: the last command of a chain is expected (ISO/IEC 7816-4 §5.6).
const LAST_OF_CHAIN_EXPECTED: StatusWord = StatusWord(0x6883);

/// What a command is to the counters.
enum Kind {
    /// Not their business.
    Other,
    /// Refused, whatever it says.
    Refused(StatusWord),
    /// Nothing to compare: an empty VERIFY is a question.
    Empty,
    /// Compares the reference data of P2, which can be asked about on that channel.
    Compares { class: u8 },
    /// Compares something that cannot be asked about.
    ComparesOther,
}

/// ENABLE and DISABLE VERIFICATION REQUIREMENT, and the odd instructions of all (ISO/IEC 7816-4 §11.6).
const DISABLE_VERIFICATION: u8 = 0x26;
const ENABLE_VERIFICATION: u8 = 0x28;

impl Kind {
    fn of(command: &Command) -> Self {
        let (class, instruction) = (command.cla(), command.ins() & 0xFE);
        match instruction {
            ins::ENVELOPE => return Self::Refused(StatusWord::INS_NOT_SUPPORTED),
            ins::VERIFY
            | ins::CHANGE_REFERENCE_DATA
            | ins::RESET_RETRY_COUNTER
            | DISABLE_VERIFICATION
            | ENABLE_VERIFICATION => {}
            _ => return Self::Other,
        }
        // ISO/IEC 7816-4 §5.4.1: first interindustry, further interindustry, proprietary values of CLA. Those of
        // the last kind that are in use keep the bits of the first.
        let (channel, secure, chained) = match class {
            0x40..=0x7F => (0x40 | class & 0x0F, class & 0x20 != 0, class & 0x10 != 0),
            _ => (class & 0x03, class & 0x0C != 0, class & 0x10 != 0),
        };
        if chained {
            Self::Refused(StatusWord::CHAINING_NOT_SUPPORTED)
        } else if secure {
            Self::Refused(StatusWord::SECURE_MESSAGING_NOT_SUPPORTED)
        } else if command.data().is_empty() {
            match (instruction, command.case()) {
                (_, Case::C1) => Self::Empty,
                // Case 1 in the five bytes of T=0. Another fifth byte would be an Lc to a card that speaks it.
                (ins::VERIFY, Case::C2Short) if command.as_bytes().ends_with(&[0]) => Self::Empty,
                _ => Self::Refused(StatusWord::WRONG_LENGTH),
            }
        } else if instruction == ins::RESET_RETRY_COUNTER {
            Self::ComparesOther
        } else {
            Self::Compares { class: channel }
        }
    }
}

/// Which counter a comparison spends of.
#[derive(Clone, Copy)]
enum Counter {
    Told(u8),
    Untold,
}

impl Counted {
    fn left(&mut self, counter: Counter) -> &mut u8 {
        match counter {
            Counter::Told(reference) => {
                let told = Told { left: UNTOLD, unverified: false };
                &mut self.told[usize::from(reference)].get_or_insert(told).left
            }
            Counter::Untold => &mut self.untold,
        }
    }

    /// Takes in what the card says of a reference, and tells which counter is its.
    fn ask(&mut self, reference: u8, answer: StatusWord) -> Counter {
        let told = &mut self.told[usize::from(reference)];
        match (tries(answer), told.as_mut()) {
            (Some(left), _) => {
                *told = Some(Told { left, unverified: true });
                Counter::Told(reference)
            }
            // A verified PIN tells no number.
            (None, Some(told)) if answer == StatusWord::SUCCESS => {
                if std::mem::replace(&mut told.unverified, false) {
                    told.left = told.left.max(UNTOLD);
                }
                Counter::Told(reference)
            }
            (None, _) => Counter::Untold,
        }
    }
}

/// The tries that a status word tells: 63CX, 6983 for a blocked PIN, 6984 for one that is out of use.
fn tries(status: StatusWord) -> Option<u8> {
    match status.0 {
        0x63C0..=0x63CF => Some(status.sw2() & 0x0F),
        0x6983 | 0x6984 => Some(0),
        _ => None,
    }
}

/// Whether the card found the command at fault before it compared anything.
fn is_untried(status: StatusWord) -> bool {
    matches!(status.sw1(), 0x67 | 0x68 | 0x6B..=0x6E) || matches!(status.0, 0x6A81 | 0x6A86 | 0x6A88)
}

impl KeepingCard {
    async fn compare(&mut self, command: &Command, class: Option<u8>) -> Result<Response, CardError> {
        let counter = match class {
            Some(class) => {
                let question = Command::build([class, ins::VERIFY, 0, command.p2()], &[], None)
                    .map_err(|error| CardError::Failed(error.to_string()))?;
                let answer = self.card.transmit(&question).await?.status();
                lock(&self.counted).ask(command.p2(), answer)
            }
            None => Counter::Untold,
        };
        // Spent before it is sent: the answer may never come.
        let before = {
            let mut counted = lock(&self.counted);
            let left = counted.left(counter);
            let before = *left;
            if before <= self.keep {
                tracing::warn!(
                    "refused a PIN: {before} tries are left, of which the guest may not spend {}",
                    self.keep
                );
                return Ok(StatusWord::AUTHENTICATION_BLOCKED.into());
            }
            *left = before - 1;
            before
        };
        let response = self.card.transmit(command).await?;
        let status = response.status();
        *lock(&self.counted).left(counter) = match tries(status) {
            Some(left) => left,
            None if status == StatusWord::SUCCESS || is_untried(status) => before,
            None => before - 1,
        };
        Ok(response)
    }
}

#[async_trait]
impl Card for KeepingCard {
    fn atr(&self) -> &Atr {
        self.card.atr()
    }

    async fn transmit(&mut self, command: &Command) -> Result<Response, CardError> {
        match Kind::of(command) {
            Kind::Refused(status) => Ok(status.into()),
            Kind::Other => {
                self.chaining = command.cla() & 0x10 != 0;
                self.card.transmit(command).await
            }
            _ if self.chaining => Ok(LAST_OF_CHAIN_EXPECTED.into()),
            Kind::Empty => self.card.transmit(command).await,
            Kind::Compares { class } => self.compare(command, Some(class)).await,
            Kind::ComparesOther => self.compare(command, None).await,
        }
    }
}

fn lock(counted: &Mutex<Counted>) -> MutexGuard<'_, Counted> {
    // Nothing that holds the lock can panic half-way through a change.
    counted.lock().unwrap_or_else(PoisonError::into_inner)
}
