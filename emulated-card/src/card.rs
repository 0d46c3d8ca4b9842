//! One card: selection, gathered command data, unread response data, the security state.
//!
//! [`EmulatedCard`] is a synchronous core. What blocks (a key operation, a PIN check with its fsync) leaves it as
//! a [`Job`], which runs on any thread and comes back as a [`Done`]:
//!
//! ```
//! # use emulated_card::card::{EmulatedCard, Step};
//! # use vscard_protocol::{Command, Response};
//! fn transmit(card: &mut EmulatedCard, command: &Command) -> Response {
//!     match card.command(command) {
//!         Step::Answer(response) => response,
//!         Step::Work(job) => card.finish(job.run()),
//!     }
//! }
//! ```
//!
//! # Rules of the card, whichever applet is selected
//! * Classes 00 and 80 mean the same. Other logical channels are refused with 6881, secure messaging with 6882,
//!   command chaining with 6884, all other classes with 6E00 (ISO/IEC 7816-4:2005 §5.1.1).
//! * The card speaks APDUs: a response longer than Le is cut to Le and ends with 61XX; GET RESPONSE reads on.
//!   Without Le there is no data, only 61XX. Any other command throws away what was not read. GET RESPONSE with
//!   nothing to read is 6985; OpenSC sends it after 61XX only, so it never meets that.
//! * A SELECT that fails leaves the applet selected that was, as on GlobalPlatform cards (libcacard deselects
//!   it).
//! * The PIN is one for the whole card. It may be verified before any applet is selected, survives SELECT, and is
//!   forgotten at reset, at a wrong PIN and at [`EmulatedCard::logout`]. Private keys ask for it even where the
//!   store would not: what makes a PIN right is the [`ReferenceData`]'s to say.

use std::sync::Arc;

use thiserror::Error;
use vscard_protocol::apdu::ins;
use vscard_protocol::atr::AtrError;
use vscard_protocol::{Atr, Command, Response, Secret, StatusWord};

use crate::applet::{Applet, Outcome, Session, cac};
use crate::keys::{KeyError, KeyStore, Unlocked};
use crate::pin::{PinError, ReferenceData};
use crate::state::CardId;

/// Historical bytes in COMPACT-TLV (ISO/IEC 7816-4:2005 §8.1.1): card capabilities (selection by full DF name, data
/// units of one byte, extended length fields), then the issuer's data.
const HISTORICAL: [u8; 14] = *b"\x80\x73\x80\x01\x40\x58EMULATED";

/// Longest PIN (the body of VERIFY is eight bytes, filled up with FF).
const MAX_PIN: usize = 8;

/// Where challenges come from: fills what it is given with random bytes.
pub type Random = Box<dyn FnMut(&mut [u8]) + Send>;

/// Why there is no card to be made.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CardBuildError {
    /// The store has no certificate.
    #[error("the card needs at least one certificate")]
    NoCertificates,
    /// More certificates than a CAC has containers.
    #[error("{count} certificates are too many: a CAC holds {}", cac::MAX_CERTIFICATES)]
    TooManyCertificates {
        /// How many there were.
        count: usize,
    },
    /// A certificate that is too long for a container.
    #[error("certificate {name:?} is too long for a card")]
    Certificate {
        /// The name it was asked for by.
        name: String,
    },
    /// The answer to reset is wrong.
    #[error(transparent)]
    Atr(#[from] AtrError),
}

/// A card made in software. See the [module](self).
pub struct EmulatedCard {
    store: Arc<dyn KeyStore>,
    reference: Arc<ReferenceData>,
    random: Random,
    atr: Atr,
    applets: Vec<Box<dyn Applet>>,
    /// Counts resets.
    epoch: u64,
    volatile: Volatile,
}

/// All that a reset clears.
#[derive(Default)]
struct Volatile {
    /// The verified PIN. A running job has it instead.
    login: Option<Box<dyn Unlocked>>,
    /// Index of the selected applet.
    selected: Option<usize>,
    /// Command data sent ahead of the command it belongs to.
    gathered: Secret,
    /// Response data not read yet, and how much of it was.
    unread: Option<(Secret, usize)>,
    running: Option<Running>,
}

/// What the card keeps of a command that is being worked on.
struct Running {
    le: usize,
    /// Whether the verified PIN was to be forgotten meanwhile.
    forget: bool,
}

/// What a command needs.
#[must_use = "a job that is not run leaves the command unanswered"]
pub enum Step {
    /// Nothing more: this is the response.
    Answer(Response),
    /// This to be run, and given back to [`EmulatedCard::finish`].
    Work(Job),
}

/// What blocks: a PIN check or a key operation.
#[must_use = "a job that is not run leaves the command unanswered"]
pub struct Job {
    epoch: u64,
    login: Option<Box<dyn Unlocked>>,
    store: Arc<dyn KeyStore>,
    reference: Arc<ReferenceData>,
    work: Work,
}

enum Work {
    Verify(Secret),
    TriesLeft,
    RsaRaw { key: usize, block: Secret },
}

/// A [`Job`] that was run. Dropping it logs out what it had logged in.
#[must_use = "the command stays unanswered until the card has this"]
pub struct Done {
    epoch: u64,
    login: Option<Box<dyn Unlocked>>,
    result: Result<Secret, StatusWord>,
}

impl EmulatedCard {
    /// A card with the certificates and keys of `store`, guarded by `reference`. `random` is where challenges
    /// come from.
    ///
    /// # Errors
    /// [`CardBuildError`] when a card cannot hold what the store has.
    pub fn new(
        store: Arc<dyn KeyStore>,
        reference: Arc<ReferenceData>,
        id: CardId,
        random: Random,
    ) -> Result<Self, CardBuildError> {
        Ok(Self {
            atr: Atr::t1(&HISTORICAL)?,
            applets: cac::applets(store.certificates(), &id)?,
            store,
            reference,
            random,
            epoch: 0,
            volatile: Volatile::default(),
        })
    }

    /// What the card answers to reset: T=1 (a `T0` wrapper makes another of it where T=0 is needed).
    pub fn atr(&self) -> &Atr {
        &self.atr
    }

    /// Power-on, power-off or reset: forgets the verified PIN, the selection, gathered command data and unread
    /// response data. A job that is still running will change nothing.
    pub fn reset(&mut self) {
        self.epoch += 1;
        self.volatile = Volatile::default();
    }

    /// Forgets the verified PIN, at once or, while a job runs that needs it, when that is finished.
    pub fn logout(&mut self) {
        self.volatile.login = None;
        if let Some(running) = &mut self.volatile.running {
            running.forget = true;
        }
    }

    /// Whether a PIN is verified that [`logout`](Self::logout) would forget.
    pub(crate) fn is_logged_in(&self) -> bool {
        self.volatile.login.is_some()
    }

    /// Begins a command.
    ///
    /// One at a time: while a [`Job`] is out, any command is answered with 6F00 and changes nothing. A job that
    /// got lost is mended by [`reset`](Self::reset) only.
    pub fn command(&mut self, command: &Command) -> Step {
        if self.volatile.running.is_some() {
            return StatusWord::NO_DIAGNOSIS.into();
        }
        let unread = self.volatile.unread.take();
        let gathered = std::mem::take(&mut self.volatile.gathered);
        if let Some(refusal) = refuse_class(command.cla()) {
            return refusal.into();
        }
        let outcome = match command.ins() {
            ins::GET_RESPONSE => return Step::Answer(self.get_response(command, unread)),
            ins::VERIFY => return self.verify(command),
            ins::GET_CHALLENGE => self.get_challenge(command),
            ins::SELECT if command.p1() != 0x02 => self.select(command),
            _ => match self.volatile.selected.and_then(|index| self.applets.get(index)) {
                Some(applet) => {
                    applet.command(command, Session { verified: self.volatile.login.is_some(), gathered })
                }
                None if command.ins() == ins::SELECT => StatusWord::NOT_FOUND.into(),
                None => StatusWord::INS_NOT_SUPPORTED.into(),
            },
        };
        match outcome {
            Outcome::Status(status) => status.into(),
            Outcome::Data(data) => Step::Answer(self.respond(command.le(), data, 0)),
            Outcome::Gather(gathered) => {
                self.volatile.gathered = gathered;
                StatusWord::SUCCESS.into()
            }
            Outcome::RsaRaw { key, block } => self.work(command, Work::RsaRaw { key, block }),
        }
    }

    /// Ends the command whose job was run.
    ///
    /// A `done` from before a [`reset`](Self::reset) is dropped, and its login with it; the response is then
    /// nobody's (6985).
    pub fn finish(&mut self, done: Done) -> Response {
        let Done { epoch, login, result } = done;
        if epoch != self.epoch {
            return StatusWord::CONDITIONS_NOT_SATISFIED.into();
        }
        let Some(Running { le, forget }) = self.volatile.running.take() else {
            return StatusWord::CONDITIONS_NOT_SATISFIED.into();
        };
        self.volatile.login = login.filter(|_| !forget);
        match result {
            Ok(data) => self.respond((le > 0).then_some(le), data, 0),
            Err(status) => status.into(),
        }
    }

    /// The rest of `data` from `sent` on, as much as Le allows; what is left is kept for GET RESPONSE
    /// (ISO/IEC 7816-4:2005 §5.1.3).
    fn respond(&mut self, le: Option<usize>, data: Secret, sent: usize) -> Response {
        let rest = data.expose().get(sent..).unwrap_or_default();
        let now = &rest[..rest.len().min(le.unwrap_or(0))];
        let left = rest.len() - now.len();
        if left == 0 {
            return Response::new(now, StatusWord::SUCCESS);
        }
        let response = Response::new(now, StatusWord::more(left));
        let sent = sent + now.len();
        self.volatile.unread = Some((data, sent));
        response
    }

    fn work(&mut self, command: &Command, work: Work) -> Step {
        self.volatile.running = Some(Running { le: command.le().unwrap_or(0), forget: false });
        Step::Work(Job {
            epoch: self.epoch,
            login: self.volatile.login.take(),
            store: Arc::clone(&self.store),
            reference: Arc::clone(&self.reference),
            work,
        })
    }

    /// GET RESPONSE (ISO/IEC 7816-4:2005 §7.6.1).
    fn get_response(&mut self, command: &Command, unread: Option<(Secret, usize)>) -> Response {
        match unread {
            _ if command.p1p2() != 0 => StatusWord::INCORRECT_P1P2.into(),
            _ if !command.data().is_empty() => StatusWord::WRONG_LENGTH.into(),
            Some((data, sent)) => self.respond(command.le(), data, sent),
            None => StatusWord::CONDITIONS_NOT_SATISFIED.into(),
        }
    }

    /// SELECT by application identifier (ISO/IEC 7816-4:2005 §7.1.1). With P2 = 0C there is no answer, with any other
    /// kind of control information asked for there is the FCI.
    fn select(&mut self, command: &Command) -> Outcome {
        match (command.p1(), command.p2()) {
            (0x04, p2) if p2 & 0xF0 != 0 => StatusWord::INCORRECT_P1P2.into(),
            // Next and previous occurrence: identifiers are given in full, so there is none.
            (0x04, p2) if p2 & 0x02 != 0 => StatusWord::NOT_FOUND.into(),
            (0x04, p2) => {
                let found =
                    self.applets.iter().enumerate().find(|(_, applet)| applet.answers_to(command.data()));
                let Some((index, applet)) = found else { return StatusWord::NOT_FOUND.into() };
                self.volatile.selected = Some(index);
                if p2 & 0x0C == 0x0C { StatusWord::SUCCESS.into() } else { applet.fci().into() }
            }
            _ => StatusWord::FUNCTION_NOT_SUPPORTED.into(),
        }
    }

    /// GET CHALLENGE: as many random bytes as asked for, at most 256; eight without Le (ISO/IEC 7816-4:2005 §7.5.3).
    fn get_challenge(&mut self, command: &Command) -> Outcome {
        if command.p1p2() != 0 {
            return StatusWord::INCORRECT_P1P2.into();
        }
        if !command.data().is_empty() {
            return StatusWord::WRONG_LENGTH.into();
        }
        let mut challenge = vec![0; command.le().unwrap_or(8).min(256)];
        (self.random)(&mut challenge);
        challenge.into()
    }

    /// VERIFY (ISO/IEC 7816-4:2005 §7.5.6). An empty body asks whether it is needed. A body that
    /// cannot be a PIN is refused before it costs a try, and leaves a verified PIN alone.
    fn verify(&mut self, command: &Command) -> Step {
        let body = command.data();
        if command.p1p2() != 0 {
            return StatusWord::INCORRECT_P1P2.into();
        }
        if body.is_empty() {
            return if self.volatile.login.is_some() {
                StatusWord::SUCCESS.into()
            } else {
                self.work(command, Work::TriesLeft)
            };
        }
        if body.len() > MAX_PIN {
            return StatusWord::WRONG_LENGTH.into();
        }
        let padding = body.iter().rev().take_while(|byte| **byte == 0xFF).count();
        let pin = &body[..body.len() - padding];
        if pin.is_empty() || pin.contains(&0) {
            return StatusWord::INCORRECT_DATA.into();
        }
        self.work(command, Work::Verify(Secret::from(pin)))
    }
}

impl From<StatusWord> for Step {
    fn from(status: StatusWord) -> Self {
        Self::Answer(status.into())
    }
}

impl Job {
    /// Does the work, on the calling thread.
    pub fn run(self) -> Done {
        let Self { epoch, login, store, reference, work } = self;
        let (login, result) = match work {
            Work::Verify(pin) => {
                // An earlier login ends here, whatever comes of this one.
                drop(login);
                match reference.verify(&pin, &*store) {
                    Ok(login) => (Some(login), Ok(Secret::default())),
                    Err(error) => (None, Err(pin_status(&error))),
                }
            }
            Work::TriesLeft => {
                let status = match reference.tries_left() {
                    Ok(0) => StatusWord::AUTHENTICATION_BLOCKED,
                    Ok(left) => StatusWord::tries_left(left),
                    Err(error) => pin_status(&error),
                };
                (login, Err(status))
            }
            Work::RsaRaw { key, block } => rsa_raw(login, key, &block),
        };
        Done { epoch, login, result }
    }
}

fn rsa_raw(
    login: Option<Box<dyn Unlocked>>,
    key: usize,
    block: &Secret,
) -> (Option<Box<dyn Unlocked>>, Result<Secret, StatusWord>) {
    let Some(login) = login else { return (None, Err(StatusWord::SECURITY_STATUS_NOT_SATISFIED)) };
    match login.rsa_raw(key, block.expose()) {
        Ok(result) => (Some(login), Ok(result)),
        Err(KeyError::Block) => (Some(login), Err(StatusWord::INCORRECT_DATA)),
        Err(KeyError::LoggedOut) => (None, Err(StatusWord::SECURITY_STATUS_NOT_SATISFIED)),
        Err(error @ KeyError::Failed(_)) => {
            tracing::warn!(%error, "SIGN/DECRYPT");
            (Some(login), Err(StatusWord::NO_DIAGNOSIS))
        }
    }
}

fn pin_status(error: &PinError) -> StatusWord {
    match error {
        PinError::Wrong { left } => StatusWord::tries_left(*left),
        PinError::Blocked => StatusWord::AUTHENTICATION_BLOCKED,
        PinError::State(_) => {
            tracing::warn!(%error, "PIN check");
            StatusWord::MEMORY_FAILURE
        }
        PinError::NotChecked(_) => {
            tracing::warn!(%error, "PIN check");
            StatusWord::NO_DIAGNOSIS
        }
        PinError::NotSupported => StatusWord::CONDITIONS_NOT_SATISFIED,
        PinError::Unfit(_) => StatusWord::INCORRECT_DATA,
    }
}

/// Why a class byte is refused, if it is (ISO/IEC 7816-4:2005 §5.1.1, tables 2 and 3).
fn refuse_class(class: u8) -> Option<StatusWord> {
    match class {
        0x00 | 0x80 => None,
        // First interindustry values: channel, then secure messaging, then chaining.
        0x00..=0x1F if class & 0x03 != 0 => Some(StatusWord::CHANNEL_NOT_SUPPORTED),
        0x00..=0x1F if class & 0x0C != 0 => Some(StatusWord::SECURE_MESSAGING_NOT_SUPPORTED),
        0x00..=0x1F => Some(StatusWord::CHAINING_NOT_SUPPORTED),
        // Further interindustry values: channels 4 to 19.
        0x40..=0x7F => Some(StatusWord::CHANNEL_NOT_SUPPORTED),
        _ => Some(StatusWord::CLA_NOT_SUPPORTED),
    }
}
