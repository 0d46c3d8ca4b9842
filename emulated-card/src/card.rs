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
//! # What it is
//! [`CardOptions`] says as what the certificates show: a PIV card (SP 800-73-4), a CAC (GSC-IS 2.1), or both. On a
//! dual card OpenSC 0.23 and Windows find PIV, which they look for first; coolkey and other CAC software find the
//! CAC.
//!
//! # Rules of the card, whichever applet is selected
//! * Classes 00 and 80 mean the same. Other logical channels are refused with 6881, secure messaging with 6882,
//!   command chaining with 6884 where the selected applet has none for the instruction, all other classes with 6E00
//!   (ISO/IEC 7816-4:2005 §5.1.1).
//! * The pieces of a chain are answered with 9000; instruction, P1 and P2 are the same in all of them. Any other
//!   command drops the chain and is done as if there had been none.
//! * The card speaks APDUs: a response longer than Le is cut to Le and ends with 61XX; GET RESPONSE reads on.
//!   Without Le there is no data, only 61XX, with two exceptions: SELECT then asks for none (ISO/IEC 7816-4:2005 §7.1.1),
//!   and GENERAL AUTHENTICATE is answered as with an Le of 256, for which yubico-piv-tool 2.2 has no GET RESPONSE.
//!   Any other command throws away what was not read. GET RESPONSE with nothing to read is 6985; OpenSC sends it after
//!   61XX only, so it never meets that.
//! * A SELECT that fails leaves the applet selected that was, as on GlobalPlatform cards (libcacard deselects
//!   it).
//! * There is one PIN and one login. It is forgotten at reset, at a wrong PIN and at [`EmulatedCard::logout`].
//!   Private keys ask for it even where the store would not: what makes a PIN right is the [`ReferenceData`]'s to
//!   say. Only PIV's card authentication key works without, where the store allows it.
//! * The PIV application is selected from the start, and each SELECT that enters or leaves it forgets the PIN. Among
//!   the applets of a CAC the PIN is the card's: it may be verified before any of them is selected, and survives SELECT.
//! * PIV's signature key wants the PIN immediately before each use (SP 800-73-4 Part 1 table 4b, "PIN Always"). Whatever
//!   comes of a command that would use a private key, this one or another, the PIN before it was for that command.
//!   Objects may be read, and random numbers fetched, in between.
//! * That rule is PIV's alone: on a dual card the same key is in a CAC container, which has no such rule, as coolkey 1.1
//!   verifies the PIN once and cannot be asked for it again.
//! * A card whose store is [writable](crate::keys::writable) is a PIV card only. Its administrator, who knows the card
//!   management key (9B), may write data objects and generate keys: after an authentication whose challenge is good
//!   for the very next command, until the card is reset or [`EmulatedCard::logout`].

mod job;

use std::str::FromStr;
use std::sync::Arc;

use thiserror::Error;
use vscard_protocol::apdu::ins;
use vscard_protocol::atr::AtrError;
use vscard_protocol::{Atr, Command, Response, Secret, StatusWord};

use crate::applet::{Applet, Outcome, Session, cac, piv};
use crate::keys::{KeyKind, KeyStore};
use crate::pin::ReferenceData;
use crate::slot::{PivSlot, SlotError};
use crate::state::CardId;

use job::Login;
pub(crate) use job::{Complaints, KeyOperation, KeyWork, Work};
pub use job::{Done, Job};

/// As what a card shows itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Profile {
    /// A PIV card alone.
    Piv,
    /// A CAC alone: RSA keys only.
    Cac,
    /// A PIV card whose RSA keys are in CAC containers, too.
    #[default]
    Dual,
}

impl Profile {
    /// Historical bytes in COMPACT-TLV (ISO/IEC 7816-4:2005 §8.1.1).
    ///
    /// PIV's application identifier (F) is the surest sign of a PIV card to OpenSC 0.23, and leaves no room for
    /// more than one byte of capabilities (selection by full DF name), which tells a dual card: Windows remembers
    /// the class of a card by its ATR. The CAC has capabilities (selection by full DF name, data units of one byte,
    /// extended length fields) and issuer's data.
    fn historical(self) -> &'static [u8] {
        match self {
            Self::Piv => b"\x80\xFB\xA0\x00\x00\x03\x08\x00\x00\x10\x00\x01\x00",
            Self::Cac => b"\x80\x73\x80\x01\x40\x58EMULATED",
            Self::Dual => b"\x80\x71\x80\xFB\xA0\x00\x00\x03\x08\x00\x00\x10\x00\x01\x00",
        }
    }

    fn is_cac(self) -> bool {
        self != Self::Piv
    }
}

/// Not the name of a [`Profile`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("a card's profile is piv, cac or dual")]
pub struct UnknownProfile;

impl FromStr for Profile {
    type Err = UnknownProfile;

    fn from_str(name: &str) -> Result<Self, UnknownProfile> {
        match name {
            "piv" => Ok(Self::Piv),
            "cac" => Ok(Self::Cac),
            "dual" => Ok(Self::Dual),
            _ => Err(UnknownProfile),
        }
    }
}

/// What a card is to be.
#[derive(Clone, Debug, Default)]
pub struct CardOptions {
    /// As what it shows itself.
    pub profile: Profile,
    /// Which certificate of the store is in which slot, by index: see [`slot::assign`](crate::slot::assign). A
    /// certificate in none is not on the card.
    pub slots: Vec<(PivSlot, usize)>,
}

/// Where challenges come from: fills what it is given with random bytes.
pub type Random = Box<dyn FnMut(&mut [u8]) + Send>;

/// Why there is no card to be made.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CardBuildError {
    /// The store has no certificate.
    #[error("the card needs at least one certificate")]
    NoCertificates,
    /// More certificates than a CAC has containers.
    #[error("{count} certificates are too many: a CAC holds {limit}")]
    TooManyCertificates {
        /// How many there were.
        count: usize,
        /// How many there may be.
        limit: usize,
    },
    /// No certificate that a CAC can have.
    #[error("a CAC has RSA keys only, and none of the certificates has one: make it a PIV card")]
    NoRsa,
    /// A key that PIV has no algorithm identifier for.
    #[error("certificate {name:?}: PIV has no algorithm for its key ({kind}), so it can only be on a CAC")]
    NoPivAlgorithm {
        /// The certificate's name.
        name: String,
        /// Its key.
        kind: KeyKind,
    },
    /// The certificates do not go into slots.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// A slot names a certificate that the store does not have.
    #[error("slot {slot} is to have certificate {index} of the key store, which has only {count}")]
    Index {
        /// The slot.
        slot: PivSlot,
        /// The index, from 0.
        index: usize,
        /// Certificates in the store.
        count: usize,
    },
    /// A certificate that is too long for a container.
    #[error("certificate {name:?} is too long for a card")]
    Certificate {
        /// The name it was asked for by.
        name: String,
    },
    /// A card that can be written to is to show itself as a CAC.
    #[error("a card that can be written to is a PIV card only")]
    WritableCac,
    /// The answer to reset is wrong.
    #[error(transparent)]
    Atr(#[from] AtrError),
}

/// A card made in software. See the [module](self).
pub struct EmulatedCard {
    store: Arc<dyn KeyStore>,
    reference: Arc<ReferenceData>,
    random: Random,
    complaints: Complaints,
    atr: Atr,
    /// The PIV application first, if there is one.
    applets: Vec<Box<dyn Applet>>,
    profile: Profile,
    /// Counts resets.
    epoch: u64,
    /// What makes the next VERIFY quicker is to be forgotten once more when the job that is out has ended.
    forget_all: bool,
    volatile: Volatile,
}

/// All that a reset clears.
#[derive(Default)]
struct Volatile {
    /// The verified PIN. A running job has it instead.
    login: Option<Login>,
    /// Whether the PIN was verified and no private key used since.
    fresh: bool,
    /// Index of the selected applet.
    selected: Option<usize>,
    /// The pieces of a chain so far.
    chain: Option<Chain>,
    /// Command data sent ahead of the command it belongs to, in an applet's own way.
    gathered: Secret,
    /// Response data not read yet, and how much of it was.
    unread: Option<(Secret, usize)>,
    /// Who may write to the card.
    administrator: piv::Administrator,
    running: Option<Running>,
}

/// The pieces of a chain: what they have in common, and their data.
struct Chain {
    /// INS, P1, P2.
    header: [u8; 3],
    data: Secret,
}

impl Chain {
    fn header(command: &Command) -> [u8; 3] {
        let [_, header @ ..] = command.header();
        header
    }
}

/// What the card keeps of a command that is being worked on.
struct Running {
    le: Option<usize>,
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

impl EmulatedCard {
    /// A card with the certificates and keys of `store`, guarded by `reference`. `random` is where challenges
    /// come from.
    ///
    /// A dual card has the first ten certificates with RSA keys in CAC containers, in the order of their slots.
    ///
    /// # Errors
    /// [`CardBuildError`] when a card cannot hold what the store has.
    pub fn new(
        store: Arc<dyn KeyStore>,
        reference: Arc<ReferenceData>,
        id: CardId,
        options: CardOptions,
        random: Random,
    ) -> Result<Self, CardBuildError> {
        let CardOptions { profile, slots } = options;
        let certificates = store.certificates();
        if slots.is_empty() {
            return Err(CardBuildError::NoCertificates);
        }
        let memory = store.writable();
        if memory.is_some() && profile.is_cac() {
            return Err(CardBuildError::WritableCac);
        }
        let mut applets: Vec<Box<dyn Applet>> = Vec::new();
        for (position, (slot, index)) in slots.iter().enumerate() {
            if slots[..position].iter().any(|(taken, _)| taken == slot) {
                return Err(SlotError::Taken(*slot).into());
            }
            if *index >= certificates.len() {
                return Err(CardBuildError::Index { slot: *slot, index: *index, count: certificates.len() });
            }
        }
        if profile != Profile::Cac {
            let writable = memory.is_some_and(|memory| memory.management().is_some());
            applets.push(Box::new(piv::Piv::new(certificates, &slots, &id, writable)?));
        }
        let mut containers = cac::containers(certificates, &slots);
        match profile {
            Profile::Piv => {}
            Profile::Cac => {
                if containers.is_empty() {
                    return Err(CardBuildError::NoRsa);
                }
                applets.extend(cac::applets(certificates, &containers, &id)?);
                applets.push(cac::plug_and_play());
            }
            Profile::Dual => {
                containers.truncate(cac::MAX_CERTIFICATES);
                // Without a container there is nothing for CAC software to find.
                if !containers.is_empty() {
                    applets.extend(cac::applets(certificates, &containers, &id)?);
                }
            }
        }
        let mut card = Self {
            atr: Atr::t1(profile.historical())?,
            applets,
            profile,
            store,
            reference,
            random,
            complaints: Complaints::default(),
            epoch: 0,
            forget_all: false,
            volatile: Volatile::default(),
        };
        card.reset();
        Ok(card)
    }

    /// The card, with what an earlier one on the same token has left of the log.
    #[cfg(all(unix, feature = "nss"))]
    pub(crate) fn complaining(mut self, earlier: &Complaints) -> Self {
        self.complaints.go_on_from(earlier);
        self
    }

    /// What is added in the log to a PIN that is blocked.
    #[cfg(all(unix, feature = "nss", feature = "pem", feature = "pcsc"))]
    pub(crate) fn set_way_out(&mut self, way_out: String) {
        self.complaints.set_way_out(way_out);
    }

    /// What the card answers to reset: T=1 (a `T0` wrapper makes another of it where T=0 is needed).
    pub fn atr(&self) -> &Atr {
        &self.atr
    }

    /// Power-on, power-off or reset: forgets the verified PIN, the selection, gathered command data and unread
    /// response data. A job that is still running will change nothing.
    pub fn reset(&mut self) {
        self.epoch += 1;
        // PIV is selected implicitly (SP 800-73-4 Part 1 §2.2).
        self.volatile = Volatile { selected: self.piv(), ..Volatile::default() };
    }

    /// Index of the PIV application.
    fn piv(&self) -> Option<usize> {
        (self.profile != Profile::Cac).then_some(0)
    }

    fn is_piv_selected(&self) -> bool {
        self.piv().is_some_and(|index| self.volatile.selected == Some(index))
    }

    /// Forgets the verified PIN, at once or, while a job runs that needs it, when that is finished; with it what a key
    /// gave or was to get that is still here, and the [validity](Response::validity) of what is kept elsewhere; what
    /// would make the next VERIFY quicker; and the administrator.
    pub fn logout(&mut self) {
        self.end_login();
        self.reference.forget();
        self.store.forget();
        self.forget_all |= self.volatile.running.is_some();
    }

    fn end_login(&mut self) {
        self.volatile.administrator = piv::Administrator::default();
        self.forget_pin();
    }

    fn forget_pin(&mut self) {
        self.volatile.login = None;
        self.volatile.fresh = false;
        self.volatile.unread = None;
        self.volatile.gathered = Secret::default();
        if let Some(running) = &mut self.volatile.running {
            running.forget = true;
        }
    }

    /// Whether there is something of a PIN or an administrator that [`logout`](Self::logout) would forget.
    pub(crate) fn remembers(&self) -> bool {
        self.volatile.login.is_some()
            || self.volatile.administrator.is_authenticated()
            || self.reference.remembers()
            || self.store.remembers()
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
        let chain = self.volatile.chain.take().filter(|chain| chain.header == Chain::header(command));
        let attempt = self.volatile.administrator.take_attempt();
        let class = class(command.cla());
        let fresh = self.volatile.fresh;
        if !matches!(class, Ok(Class::Piece))
            && self.selected().is_some_and(|applet| applet.uses_key(command))
        {
            // Whatever comes of the command, the PIN was for it.
            self.volatile.fresh = false;
        }
        match class {
            Err(refusal) => return refusal.into(),
            Ok(Class::Piece) => {
                let status = self.piece(command, chain);
                if status == StatusWord::SUCCESS {
                    let answered = attempt.filter(|attempt| attempt.is_answered_by(command));
                    self.volatile.administrator.resume(answered);
                }
                return status.into();
            }
            Ok(Class::Whole) => {}
        }
        let joined;
        let command = match chain {
            Some(chain) => {
                joined = match self.join(command, chain) {
                    Ok(joined) => joined,
                    Err(refusal) => return refusal.into(),
                };
                &joined
            }
            None => command,
        };
        let verified = self.volatile.login.is_some();
        let outcome = match command.ins() {
            ins::GET_RESPONSE => {
                // The challenge is answered when it was fetched.
                self.volatile.administrator.resume(attempt.filter(|_| unread.is_some()));
                return Step::Answer(self.get_response(command, unread));
            }
            ins::GET_CHALLENGE => self.get_challenge(command),
            ins::SELECT if command.p1() == 0x04 => self.select(command),
            ins::SELECT if command.p1() != 0x02 && !self.is_piv_selected() => {
                StatusWord::FUNCTION_NOT_SUPPORTED.into()
            }
            ins if self.profile.is_cac() && !self.is_piv_selected() && cac::reference::concerns(ins) => {
                cac::reference::command(command, verified)
            }
            _ => match self.volatile.selected.and_then(|index| self.applets.get(index)) {
                Some(applet) => {
                    let session = Session {
                        verified,
                        fresh,
                        gathered,
                        random: &mut self.random,
                        complaints: &self.complaints,
                        memory: self.store.writable(),
                        administrator: &mut self.volatile.administrator,
                        attempt,
                    };
                    applet.command(command, session)
                }
                None if command.ins() == ins::SELECT => StatusWord::NOT_FOUND.into(),
                None => StatusWord::INS_NOT_SUPPORTED.into(),
            },
        };
        match outcome {
            Outcome::Status(status) => status.into(),
            Outcome::Data(data) => Step::Answer(self.respond(expected(command), data, 0)),
            Outcome::Gather(gathered) => {
                self.volatile.gathered = gathered;
                StatusWord::SUCCESS.into()
            }
            Outcome::LogOut => {
                self.forget_pin();
                StatusWord::SUCCESS.into()
            }
            Outcome::Work(work) => self.work(command, work),
        }
    }

    /// A command that is not the last of its chain.
    fn piece(&mut self, command: &Command, chain: Option<Chain>) -> StatusWord {
        let limit = self.chain_limit(command.ins());
        if limit == 0 {
            return StatusWord::CHAINING_NOT_SUPPORTED;
        }
        let mut chain =
            chain.unwrap_or_else(|| Chain { header: Chain::header(command), data: Secret::default() });
        if chain.data.len() + command.data().len() > limit {
            return StatusWord::WRONG_LENGTH;
        }
        chain.data.extend(command.data());
        self.volatile.chain = Some(chain);
        StatusWord::SUCCESS
    }

    /// The last command of a chain, with the data of all.
    fn join(&self, last: &Command, Chain { mut data, .. }: Chain) -> Result<Command, StatusWord> {
        if data.len() + last.data().len() > self.chain_limit(last.ins()) {
            return Err(StatusWord::WRONG_LENGTH);
        }
        data.extend(last.data());
        let le = last.le().and_then(|le| u32::try_from(le).ok());
        Command::build(last.header(), data.expose(), le).map_err(|_| StatusWord::WRONG_LENGTH)
    }

    fn chain_limit(&self, ins: u8) -> usize {
        self.selected().map_or(0, |applet| applet.chain_limit(ins))
    }

    fn selected(&self) -> Option<&dyn Applet> {
        self.volatile.selected.and_then(|index| self.applets.get(index)).map(Box::as_ref)
    }

    /// Ends the command whose job was run.
    ///
    /// A `done` from before a [`reset`](Self::reset) is dropped, and its login with it; the response is then
    /// nobody's (6985).
    pub fn finish(&mut self, done: Done) -> Response {
        let Done { epoch, login, fresh, behind_pin, result } = done;
        if std::mem::take(&mut self.forget_all) {
            self.reference.forget();
            self.store.forget();
        }
        if epoch != self.epoch {
            return StatusWord::CONDITIONS_NOT_SATISFIED.into();
        }
        let Some(Running { le, forget }) = self.volatile.running.take() else {
            return StatusWord::CONDITIONS_NOT_SATISFIED.into();
        };
        self.volatile.login = login.filter(|_| !forget);
        self.volatile.fresh = self.volatile.login.is_some() && (fresh || self.volatile.fresh);
        match result {
            Ok(_) if forget && behind_pin => StatusWord::SECURITY_STATUS_NOT_SATISFIED.into(),
            Ok(data) => self.respond(le, data, 0),
            Err(status) => status.into(),
        }
    }

    /// The rest of `data` from `sent` on, as much as Le allows; what is left is kept for GET RESPONSE
    /// (ISO/IEC 7816-4:2005 §5.1.3). Behind a verified PIN it is good only as long as that: whoever keeps it for the host
    /// would not hear that the PIN was forgotten.
    fn respond(&mut self, le: Option<usize>, data: Secret, sent: usize) -> Response {
        let rest = data.expose().get(sent..).unwrap_or_default();
        let now = &rest[..rest.len().min(le.unwrap_or(0))];
        let left = rest.len() - now.len();
        let status = if left == 0 { StatusWord::SUCCESS } else { StatusWord::more(left) };
        let validity = self.volatile.login.as_ref().filter(|_| !now.is_empty()).map(Login::validity);
        let response = Response::new(now, status).valid(validity.unwrap_or_default());
        let sent = sent + now.len();
        self.volatile.unread = (left > 0).then_some((data, sent));
        response
    }

    fn work(&mut self, command: &Command, work: Work) -> Step {
        self.volatile.running = Some(Running { le: expected(command), forget: false });
        Step::Work(Job {
            epoch: self.epoch,
            login: self.volatile.login.take(),
            store: Arc::clone(&self.store),
            reference: Arc::clone(&self.reference),
            complaints: self.complaints.clone(),
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

    /// SELECT by application identifier (ISO/IEC 7816-4:2005 §7.1.1). With P2 = 0C, or without Le, there is no answer, with
    /// any other kind of control information asked for there is the FCI.
    fn select(&mut self, command: &Command) -> Outcome {
        let p2 = command.p2();
        if p2 & 0xF0 != 0 {
            return StatusWord::INCORRECT_P1P2.into();
        }
        // Next and previous occurrence: each application is there once.
        if p2 & 0x02 != 0 {
            return StatusWord::NOT_FOUND.into();
        }
        let found = self.applets.iter().enumerate().find(|(_, applet)| applet.answers_to(command.data()));
        let Some((index, applet)) = found else { return StatusWord::NOT_FOUND.into() };
        let answer = match command.le() {
            Some(_) if p2 & 0x0C != 0x0C => applet.fci(self.store.writable()).into(),
            _ => StatusWord::SUCCESS.into(),
        };
        // SP 800-73-4 Part 2 §3.1.1: selected anew, the PIV application's security status is unchanged.
        if self.is_piv_selected() != (self.piv() == Some(index)) {
            self.end_login();
        }
        self.volatile.selected = Some(index);
        answer
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
}

impl From<StatusWord> for Step {
    fn from(status: StatusWord) -> Self {
        Self::Answer(status.into())
    }
}

/// How much response data a command may get at once; `None` for one that fetches all of it with GET RESPONSE. What
/// GENERAL AUTHENTICATE gives is there at once even if no Le says so: YubiKeys do that, and yubico-piv-tool 2.2 takes
/// nothing else. It follows a 61XX to any other command.
fn expected(command: &Command) -> Option<usize> {
    command.le().or((command.ins() == ins::GENERAL_AUTHENTICATE).then_some(256))
}

/// What a class byte says.
enum Class {
    /// A command of its own, or the last of a chain.
    Whole,
    /// Not the last of a chain.
    Piece,
}

/// Takes a class byte apart, or says why it is refused (ISO/IEC 7816-4:2005 §5.1.1, tables 2 and 3).
fn class(class: u8) -> Result<Class, StatusWord> {
    match class {
        0x00 | 0x80 => Ok(Class::Whole),
        0x10 => Ok(Class::Piece),
        // First interindustry values: channel, then secure messaging.
        0x00..=0x1F if class & 0x03 != 0 => Err(StatusWord::CHANNEL_NOT_SUPPORTED),
        0x00..=0x1F => Err(StatusWord::SECURE_MESSAGING_NOT_SUPPORTED),
        // Further interindustry values: channels 4 to 19.
        0x40..=0x7F => Err(StatusWord::CHANNEL_NOT_SUPPORTED),
        _ => Err(StatusWord::CLA_NOT_SUPPORTED),
    }
}
