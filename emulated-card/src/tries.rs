//! A guest does not spend the last PIN try of a card that matters.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use vscard_protocol::apdu::ins;
use vscard_protocol::{
    Atr, Card, CardError, CardSource, Case, Command, LogBudget, PresenceWatch, Response, StatusWord,
};

/// Tries that a card is taken to have which tells nobody.
const UNTOLD: u8 = 3;

/// A source whose cards keep the last tries of each PIN.
///
/// Watched are the commands that compare reference data: VERIFY, CHANGE REFERENCE DATA, ENABLE and DISABLE
/// VERIFICATION REQUIREMENT, RESET RETRY COUNTER (ISO/IEC 7816-4 §11.6). Before one of the first four goes to the
/// card, the card is asked with an empty VERIFY how many tries are left (63CX). If these are no more than are to be
/// kept, the command is answered 6983 here.
///
/// The tries of a PIN that is verified, of a PUK and of whatever else the card does not tell are counted, all
/// together: they are taken to be three when the card is first seen, never more later, and no more than what the
/// card told last of any reference, which may be another name of the same PIN. Left out is what it told of the PIN
/// that a RESET RETRY COUNTER gives its tries back, and a PIN that is blocked already. If a PIN that is verified
/// might have too few by that, it is made unverified (VERIFY with P1 = FF) and asked about again.
///
/// What would hide the comparison is refused: secure messaging (6882), chaining (6884, and 6883 while a chain of
/// another command is open), classes of which ISO/IEC 7816-4 does not say to which channel they go (6E00), forms of
/// VERIFY that are neither a comparison nor a question (6700), and ENVELOPE (6D00). Commands of a card's own that
/// compare a PIN under another instruction are not known here.
///
/// Counts are kept with the ATR: a card that is swapped for another one of the same kind hands them on. They begin
/// anew with this object.
pub struct KeepTries<S> {
    source: S,
    keep: u8,
    /// What is added to what the log says of a refusal.
    advice: Arc<str>,
    counted: Arc<Mutex<Counted>>,
}

/// What is known of tries. It outlives sessions, as the card's counters do, and ends with another kind of card.
struct Counted {
    atr: Option<Atr>,
    bounds: Bounds,
    lines: LogBudget<()>,
}

/// No reference that the card tells nothing of has fewer tries than the least of these that concern it.
#[derive(Clone, Copy)]
struct Bounds {
    /// What the card told last, by P2.
    told: [Option<u8>; 256],
    /// Of all that is not told together.
    untold: u8,
    /// The fewest that a comparison of this session has left. Whatever is verified had all its tries at some time
    /// since the card was powered up, and what P2 means may have changed since it was asked about.
    session: u8,
}

impl Bounds {
    /// Of a card that is seen for the first time.
    const UNKNOWN: Self = Self { told: [None; 256], untold: UNTOLD, session: u8::MAX };
}

impl<S: CardSource> KeepTries<S> {
    /// Wraps `source`, whose cards keep `keep` tries of each PIN; with 0, nothing is watched.
    pub fn new(source: S, keep: u8) -> Self {
        let counted = Counted { atr: None, bounds: Bounds::UNKNOWN, lines: LogBudget::new() };
        Self { source, keep, advice: "".into(), counted: Arc::new(Mutex::new(counted)) }
    }

    /// Adds this to what the log says of a refusal, as it stands.
    pub fn advising(self, advice: &str) -> Self {
        Self { advice: advice.into(), ..self }
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
            counted.atr = Some(card.atr().clone());
            counted.bounds = Bounds::UNKNOWN;
        }
        counted.bounds.session = u8::MAX;
        drop(counted);
        let (advice, counted) = (Arc::clone(&self.advice), Arc::clone(&self.counted));
        Ok(Box::new(KeepingCard { card, keep: self.keep, advice, counted, chaining: 0 }))
    }
}

struct KeepingCard {
    card: Box<dyn Card>,
    keep: u8,
    advice: Arc<str>,
    counted: Arc<Mutex<Counted>>,
    /// One bit for each logical channel whose last command announced more of it. Not every card minds that the
    /// next one is another command, nor knows of channels: it might take an empty VERIFY for the end of what it has.
    chaining: u32,
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
    Reference { class: u8 },
    /// Compares the resetting code of what P2 refers to, which cannot be asked about.
    ResettingCode,
}

impl Kind {
    fn of(command: &Command) -> Self {
        let (class, instruction) = (command.cla(), command.ins() & 0xFE);
        if instruction == ins::ENVELOPE {
            return Self::Refused(StatusWord::INS_NOT_SUPPORTED);
        }
        if !ins::has_reference_data(instruction) {
            return Self::Other;
        }
        // ISO/IEC 7816-4 §5.4.1: first interindustry, further interindustry, proprietary values of CLA. Some of
        // the last kind keep the bits of the first; GlobalPlatform's from C0 on mean the channels of the second.
        let (channel, secure, chained) = match class {
            0x00..=0x1F | 0x80..=0x9F => (class & 0x03, class & 0x0C != 0, class & 0x10 != 0),
            0x40..=0x7F => (0x40 | class & 0x0F, class & 0x20 != 0, class & 0x10 != 0),
            _ => return Self::Refused(StatusWord::CLA_NOT_SUPPORTED),
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
            Self::ResettingCode
        } else {
            Self::Reference { class: channel }
        }
    }
}

/// One bit, for the logical channel of a class.
fn channel(class: u8) -> u32 {
    1 << if class & 0x40 == 0 { class & 0x03 } else { 4 + (class & 0x0F) }
}

/// What a comparison is of.
#[derive(Clone, Copy)]
enum Compared {
    /// A reference whose tries the card has just told.
    Told(u8),
    /// Another one.
    Untold,
    /// The resetting code of that reference: it has tries of its own, or it would be of no use.
    ResettingCode(u8),
}

impl Bounds {
    /// The fewest tries that may be left.
    fn left(&self, of: Compared) -> u8 {
        let told = |but: Option<u8>| {
            let others = (0..=u8::MAX).zip(self.told).filter(move |&(reference, _)| Some(reference) != but);
            // A counter that is spent has nothing to be kept.
            others.filter_map(|(_, told)| told.filter(|&left| left != 0)).min().unwrap_or(u8::MAX)
        };
        match of {
            Compared::Told(reference) => self.told[usize::from(reference)].unwrap_or(0),
            Compared::Untold => self.untold.min(self.session).min(told(None)),
            Compared::ResettingCode(reference) => self.untold.min(told(Some(reference))),
        }
    }

    /// A comparison has left no more than that.
    fn spend(&mut self, of: Compared, left: u8) {
        self.session = self.session.min(left);
        if let Compared::Told(reference) = of {
            self.told[usize::from(reference)] = Some(left);
            return;
        }
        self.untold = self.untold.min(left);
        for (reference, told) in (0..=u8::MAX).zip(&mut self.told) {
            if !matches!(of, Compared::ResettingCode(own) if own == reference) {
                *told = told.map(|told| told.min(left));
            }
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

/// Whether the card found the command at fault before it compared anything. Cards whose PIN cannot be changed say 6985
/// to whoever wants to, and others may to a VERIFY for reasons of their own. 6A80 to a VERIFY is a PIN that cannot be
/// one (SP 800-73-4 Part 2 §3.2.1); to the others it may be about the new PIN, with the old one compared.
fn is_untried(instruction: u8, status: StatusWord) -> bool {
    let changes = matches!(instruction & 0xFE, ins::CHANGE_REFERENCE_DATA | ins::RESET_RETRY_COUNTER);
    matches!(status.sw1(), 0x67 | 0x68 | 0x6B..=0x6E)
        || matches!(status.0, 0x6A81 | 0x6A86 | 0x6A88)
        || (changes && status == StatusWord::CONDITIONS_NOT_SATISFIED)
        || (instruction & 0xFE == ins::VERIFY && status == StatusWord::INCORRECT_DATA)
}

impl KeepingCard {
    /// What the card says to a VERIFY without data.
    async fn ask(&mut self, class: u8, p1: u8, reference: u8) -> Result<StatusWord, CardError> {
        let question = Command::build([class, ins::VERIFY, p1, reference], &[], None)
            .map_err(|error| CardError::Failed(error.to_string()))?;
        Ok(self.card.transmit(&question).await?.status())
    }

    /// The reference, with what the card tells of it now.
    async fn reference(&mut self, class: u8, reference: u8) -> Result<Compared, CardError> {
        let mut answer = self.ask(class, 0, reference).await?;
        let is_low = lock(&self.counted).bounds.left(Compared::Untold) <= self.keep;
        // SP 800-73-4 Part 2 §3.2.1: P1 = FF resets the security status. Whoever verified the PIN, another program
        // that shares the card for instance, gave it its tries back.
        if answer == StatusWord::SUCCESS && is_low {
            self.ask(class, 0xFF, reference).await?;
            answer = self.ask(class, 0, reference).await?;
        }
        let Some(left) = tries(answer) else { return Ok(Compared::Untold) };
        lock(&self.counted).bounds.told[usize::from(reference)] = Some(left);
        Ok(Compared::Told(reference))
    }

    async fn compare(&mut self, command: &Command, of: Compared) -> Result<Response, CardError> {
        // Spent before it is sent: the answer may never come.
        let (before, left) = {
            let mut counted = lock(&self.counted);
            let before = counted.bounds;
            let left = before.left(of);
            if left <= self.keep {
                counted.log_refusal(command, left, self.keep, &self.advice);
                return Ok(StatusWord::AUTHENTICATION_BLOCKED.into());
            }
            counted.bounds.spend(of, left - 1);
            (before, left)
        };
        let response = self.card.transmit(command).await?;
        let status = response.status();
        let mut counted = lock(&self.counted);
        counted.bounds = before;
        match tries(status) {
            Some(told) => counted.bounds.spend(of, told),
            None if status == StatusWord::SUCCESS || is_untried(command.ins(), status) => {}
            None => counted.bounds.spend(of, left - 1),
        }
        Ok(response)
    }
}

impl Counted {
    fn log_refusal(&self, command: &Command, left: u8, keep: u8, advice: &str) {
        self.lines.tell((), |end| {
            let name = ins::name(command.ins());
            let name = name.map_or_else(|| format!("instruction {:02X}", command.ins()), String::from);
            let of = command.p2();
            tracing::warn!(
                "refused {name} of {of:02X}: tries left: {left}, kept from the guest: {keep}{advice}{end}"
            );
        });
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
                let channel = channel(command.cla());
                let is_chained = command.cla() & 0x10 != 0;
                self.chaining = if is_chained { self.chaining | channel } else { self.chaining & !channel };
                self.card.transmit(command).await
            }
            _ if self.chaining != 0 => Ok(LAST_OF_CHAIN_EXPECTED.into()),
            Kind::Empty => self.card.transmit(command).await,
            Kind::Reference { class } => {
                let of = self.reference(class, command.p2()).await?;
                self.compare(command, of).await
            }
            Kind::ResettingCode => self.compare(command, Compared::ResettingCode(command.p2())).await,
        }
    }
}

fn lock(counted: &Mutex<Counted>) -> MutexGuard<'_, Counted> {
    // Nothing that holds the lock can panic half-way through a change.
    counted.lock().unwrap_or_else(PoisonError::into_inner)
}
