//! Everything a guest can say to an emulated card: APDUs, templates, chains, PINs, resets at bad moments. What the card
//! answers is compared with a model of its security state.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use emulated_card::card::{CardOptions, Done, EmulatedCard, Job, Profile, Step};
use emulated_card::keys::{Certificate, Curve, KeyError, KeyKind, KeyStore, UnlockError, Unlocked};
use emulated_card::pin::ReferenceData;
use emulated_card::slot::PivSlot;
use emulated_card::state::CardId;
use vscard_protocol::{Command, Response, Secret, StatusWord, apdu};

use crate::input::Input;
use statuses::Observer;

#[path = "../../emulated-card/tests/common/statuses.rs"]
#[allow(dead_code, reason = "scenarios use the rest")]
mod statuses;

const PIN: &[u8] = b"123456";
const PUK: &[u8] = b"12345678";
const SIGNATURE: u8 = 0x9C;
const CARD_AUTHENTICATION: u8 = 0x9E;
const CARD_MANAGEMENT: u8 = 0x9B;

/// What the card compares a PIN with.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reference {
    /// The store's own password: fifteen tries.
    Store,
    /// Any PIN.
    Any,
    /// A PIN and PUK of the card's own: three tries each.
    Own,
}

/// Does what `bytes` say.
pub(crate) fn run(bytes: &[u8]) {
    let input = &mut Input::new(bytes);
    let profile = input.choose(&[Profile::Dual, Profile::Piv, Profile::Cac]);
    let reference = input.choose(&[Reference::Store, Reference::Any, Reference::Own]);
    let store = Store::new();
    let mut end = End {
        seen: Arc::clone(&store.seen),
        card: card(store, profile, reference),
        observer: Observer::new(profile),
        model: Model::new(reference),
        late: None,
    };
    for _ in 0..1000 {
        if input.is_empty() {
            break;
        }
        end.step(input);
        end.check_logins();
    }
    end.reset();
}

fn card(store: Store, profile: Profile, reference: Reference) -> EmulatedCard {
    let retired = "82".parse().expect("a slot");
    let slots = [
        PivSlot::AUTHENTICATION,
        PivSlot::SIGNATURE,
        PivSlot::KEY_MANAGEMENT,
        PivSlot::CARD_AUTHENTICATION,
        retired,
    ];
    let options = CardOptions { profile, slots: slots.into_iter().zip(0..).collect() };
    let id = CardId::derive(&store.certificates, "fuzz");
    let (pin, puk) = (Secret::from(PIN), Secret::from(PUK));
    let reference = match reference {
        Reference::Store => ReferenceData::in_memory(15),
        Reference::Any => ReferenceData::any(pin),
        Reference::Own => ReferenceData::in_memory_own(&pin, Some(&puk), 3).expect("a PIN and a PUK"),
    };
    EmulatedCard::new(Arc::new(store), Arc::new(reference), id, options, Box::new(|bytes| bytes.fill(7)))
        .expect("a card of five keys")
}

/// What has to be true of the card.
struct Model {
    reference: Reference,
    /// Whether the PIN is verified: then there is one login, else there is none.
    verified: bool,
    /// Whether the signature key may be used.
    fresh: bool,
    pin: Vec<u8>,
    puk: Vec<u8>,
    tries: Tries,
    puk_tries: Tries,
}

struct Tries {
    left: u8,
    most: u8,
}

impl Tries {
    fn new(most: u8) -> Self {
        Self { left: most, most }
    }

    /// A PIN or PUK was compared, as the status word says; tells whether it was right.
    fn compared(&mut self, status: StatusWord, right: bool) -> bool {
        let blocked = self.left == 0;
        match status.0 {
            0x9000 => {
                assert!(right && !blocked, "a wrong PIN or PUK is taken for right");
                self.left = self.most;
                return true;
            }
            0x6983 => assert!(blocked, "blocked with {} tries left", self.left),
            _ => {
                assert!(!right && !blocked, "a right PIN or PUK is taken for wrong: {status}");
                self.left -= 1;
                assert_eq!(status, StatusWord::tries_left(self.left));
            }
        }
        false
    }
}

/// Whether a status word says that a PIN or PUK was compared.
fn compares(status: StatusWord) -> bool {
    matches!(status.0, 0x9000 | 0x63C0..=0x63CF | 0x6983)
}

/// A PIN without its padding.
fn unpadded(field: &[u8]) -> &[u8] {
    let padding = field.iter().rev().take_while(|byte| **byte == 0xFF).count();
    &field[..field.len() - padding]
}

impl Model {
    fn new(reference: Reference) -> Self {
        let tries = || {
            Tries::new(match reference {
                Reference::Store => 15,
                _ => 3,
            })
        };
        let (pin, puk) = (PIN.to_vec(), PUK.to_vec());
        Self { reference, verified: false, fresh: false, pin, puk, tries: tries(), puk_tries: tries() }
    }

    fn logout(&mut self) {
        (self.verified, self.fresh) = (false, false);
    }

    fn is_right(&self, pin: &[u8]) -> bool {
        self.reference == Reference::Any || unpadded(pin) == self.pin
    }

    /// A command was done, and a private key with it if it `worked`.
    fn see(&mut self, command: &Command, status: StatusWord, worked: bool, was_piv: bool, is_piv: bool) {
        // Pieces of a chain, and what is refused for its class, are nothing.
        if !matches!(command.cla(), 0x00 | 0x80) {
            assert!(!worked, "{command:?} used a key");
            return;
        }
        if was_piv != is_piv {
            self.logout();
        }
        let (p1, p2, data) = (command.p1(), command.p2(), command.data());
        let succeeded = matches!(status.sw1(), 0x90 | 0x61);
        match command.ins() {
            apdu::ins::VERIFY if p1 == 0xFF && succeeded => self.logout(),
            apdu::ins::VERIFY if data.is_empty() && compares(status) => {
                let expected = match self.tries.left {
                    _ if self.verified => StatusWord::SUCCESS,
                    0 => StatusWord::AUTHENTICATION_BLOCKED,
                    left => StatusWord::tries_left(left),
                };
                assert_eq!(status, expected, "what VERIFY says without a PIN");
            }
            apdu::ins::VERIFY if compares(status) => {
                let right = self.is_right(data);
                self.verified = self.tries.compared(status, right);
                self.fresh = self.verified;
            }
            apdu::ins::CHANGE_REFERENCE_DATA if was_piv && p2 == 0x81 => {
                let right = compares(status) && self.puk_tries.compared(status, data[..8] == self.puk);
                if right {
                    self.puk = data[8..].to_vec();
                }
            }
            apdu::ins::CHANGE_REFERENCE_DATA if compares(status) => {
                let right = self.is_right(&data[..8]);
                self.verified = self.tries.compared(status, right);
                self.fresh &= self.verified;
                if self.verified {
                    self.pin = unpadded(&data[8..]).to_vec();
                }
            }
            apdu::ins::RESET_RETRY_COUNTER if compares(status) => {
                let right = self.puk_tries.compared(status, data[..8] == self.puk);
                if right {
                    self.pin = unpadded(&data[8..]).to_vec();
                    self.tries.left = self.tries.most;
                }
                if status != StatusWord::AUTHENTICATION_BLOCKED {
                    self.logout();
                }
            }
            apdu::ins::GET_DATA_ODD if was_piv && succeeded => {
                let protected = [0x03, 0x08, 0x09, 0x21, 0x23].map(|last| [0x5F, 0xC1, last]);
                let reads = protected.iter().any(|tag| data.ends_with(tag));
                assert!(self.verified || !reads, "{command:?} reads what is behind the PIN");
            }
            _ => {}
        }
        let changed =
            matches!(command.ins(), apdu::ins::CHANGE_REFERENCE_DATA | apdu::ins::RESET_RETRY_COUNTER);
        assert!(!changed || !succeeded || self.reference == Reference::Own, "not the card's to change");
        self.see_key(command, status, worked, was_piv);
    }

    /// A command was done that a reset made nobody's: what it did to PIN and PUK holds.
    fn see_unanswered(&mut self, command: &Command, worked: bool, piv: bool) {
        let (ins, data) = (command.ins(), command.data());
        let puk = ins == apdu::ins::RESET_RETRY_COUNTER
            || (piv && ins == apdu::ins::CHANGE_REFERENCE_DATA && command.p2() == 0x81);
        let compared = match ins {
            apdu::ins::VERIFY => !data.is_empty(),
            apdu::ins::CHANGE_REFERENCE_DATA | apdu::ins::RESET_RETRY_COUNTER => {
                self.reference == Reference::Own
            }
            _ => false,
        };
        let (tries, right) = match (compared, puk) {
            (false, _) => return self.see_key(command, StatusWord::NO_DIAGNOSIS, worked, piv),
            (true, true) => (&self.puk_tries, data[..8] == self.puk),
            (true, false) => (&self.tries, self.is_right(&data[..data.len().min(8)])),
        };
        let status = match tries.left {
            0 => StatusWord::AUTHENTICATION_BLOCKED,
            _ if right => StatusWord::SUCCESS,
            left => StatusWord::tries_left(left - 1),
        };
        self.see(command, status, worked, piv, piv);
    }

    fn see_key(&mut self, command: &Command, status: StatusWord, worked: bool, piv: bool) {
        let succeeded = matches!(status.sw1(), 0x90 | 0x61);
        match (command.ins(), command.p2()) {
            (apdu::ins::GENERAL_AUTHENTICATE, reference) if piv => {
                let permitted = match reference {
                    CARD_AUTHENTICATION => self.verified || self.reference != Reference::Store,
                    SIGNATURE => self.verified && self.fresh,
                    _ => self.verified,
                };
                assert!(!worked || permitted, "a key worked without the PIN: {command:?}");
                let expected = succeeded && reference != CARD_MANAGEMENT;
                assert!(worked || !expected, "success without a key: {command:?}");
                // Whatever comes of it, unless the chain was too long to be a command at all.
                if reference == SIGNATURE && status != StatusWord::WRONG_LENGTH {
                    self.fresh = false;
                }
            }
            (apdu::ins::SIGN_DECRYPT, _) if !piv => {
                assert!(!worked || self.verified, "a key worked without the PIN: {command:?}");
                assert!(worked || !succeeded || command.p1() != 0, "success without a key: {command:?}");
            }
            _ => assert!(!worked, "{command:?} used a key"),
        }
        // The store's login is over.
        if worked && status == StatusWord::SECURITY_STATUS_NOT_SATISFIED {
            self.logout();
        }
    }
}

struct End {
    card: EmulatedCard,
    seen: Arc<Seen>,
    observer: Observer,
    model: Model,
    /// What was done after a reset, and not given to the card yet.
    late: Option<Done>,
}

/// What happens while a command is worked on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Meanwhile {
    Nothing,
    /// Another command comes.
    Command,
    /// The PIN is to be forgotten.
    Logout,
    /// The card is reset, then the work done.
    Reset,
    /// The card is reset; what was done is given to it when it works on another command.
    Late,
    /// The work is never done.
    Lost,
}

impl End {
    fn step(&mut self, input: &mut Input<'_>) {
        let kind = input.byte();
        let meanwhile = [
            Meanwhile::Nothing,
            Meanwhile::Command,
            Meanwhile::Logout,
            Meanwhile::Reset,
            Meanwhile::Late,
            Meanwhile::Lost,
        ][usize::from(kind / 8) % 6];
        match kind % 8 {
            0 => self.transmit(&input.block(), meanwhile),
            1 => self.built(input, meanwhile),
            2 => self.authenticate(input, meanwhile),
            3 => {
                // Right, for one applet or the other.
                let reference = input.choose(&[0x80, 0x00]);
                let pin = padded(&self.model.pin);
                self.transmit(&[&[0x00, 0x20, 0x00, reference, 8], &pin[..]].concat(), meanwhile);
            }
            4 => self.transmit(&[0x00, 0xC0, 0x00, 0x00, input.byte()], meanwhile),
            5 => {
                self.card.logout();
                self.model.logout();
            }
            6 => self.reset(),
            _ => self.change(input, meanwhile),
        }
    }

    fn reset(&mut self) {
        self.card.reset();
        self.observer.reset();
        self.model.logout();
        self.check_logins();
    }

    /// There is a login if the PIN is verified, and else none.
    fn check_logins(&self) {
        let wanted = usize::from(self.model.verified) + self.seen.late.load(Ordering::Relaxed);
        assert_eq!(self.seen.logins.load(Ordering::Relaxed), wanted, "logins");
    }

    fn built(&mut self, input: &mut Input<'_>, meanwhile: Meanwhile) {
        let class = input.choose(&[0x00, 0x80, 0x10, 0x04]);
        let header = [class, input.byte(), input.byte(), input.byte()];
        let le = input.choose(&[None, Some(1), Some(256), Some(65_536)]);
        if let Ok(command) = Command::build(header, &input.block(), le) {
            self.transmit(command.as_bytes(), meanwhile);
        }
    }

    /// GENERAL AUTHENTICATE with a template that is nearly right.
    fn authenticate(&mut self, input: &mut Input<'_>, meanwhile: Meanwhile) {
        let class = input.choose(&[0x00, 0x10]);
        let algorithm = input.choose(&[0x06, 0x11, 0x14, 0x00, 0x07]);
        let reference = input.choose(&[0x9A, 0x9C, 0x9D, 0x9E, 0x9B, 0x82]);
        let (tag, value) = (input.choose(&[0x81, 0x85, 0x80, 0x82]), input.block());
        let field = |tag: u8, value: &[u8]| {
            let length = (value.len() as u16).to_be_bytes();
            [&[tag, 0x82], &length[..], value].concat()
        };
        let template = field(0x7C, &[field(0x82, &[]), field(tag, &value)].concat());
        let header = [class, 0x87, algorithm, reference];
        if let Ok(command) = Command::build(header, &template, (class == 0).then_some(256)) {
            self.transmit(command.as_bytes(), meanwhile);
        }
    }

    /// CHANGE REFERENCE DATA or RESET RETRY COUNTER, with what is right at first, or not.
    fn change(&mut self, input: &mut Input<'_>, meanwhile: Meanwhile) {
        let (ins, p2) = input.choose(&[(0x24, 0x80), (0x24, 0x81), (0x2C, 0x80), (0x24, 0x00), (0x2C, 0x00)]);
        let puk = ins == 0x2C || p2 == 0x81;
        let mut old = if puk { self.model.puk.clone() } else { padded(&self.model.pin) };
        old[0] ^= input.byte();
        let new = input.choose(&[&b"123456\xFF\xFF"[..], b"654321\xFF\xFF", PUK, b"123\xFF\xFF\xFF\xFF\xFF"]);
        self.transmit(&[&[0x00, ins, 0x00, p2, 16], &old[..], new].concat(), meanwhile);
    }

    fn transmit(&mut self, bytes: &[u8], meanwhile: Meanwhile) {
        let Ok(command) = Command::parse(bytes) else { return };
        let before = self.seen.operations.load(Ordering::Relaxed);
        let was_piv = self.observer.is_piv();
        let (response, forgotten) = match self.card.command(&command) {
            Step::Answer(response) => (response, false),
            Step::Work(job) => match self.work(&command, job, meanwhile) {
                Some(response) => (response, meanwhile == Meanwhile::Logout),
                None => return,
            },
        };
        self.check(&command, &response);
        let worked = self.seen.operations.load(Ordering::Relaxed) > before;
        let seen = self.observer.see(&command, response.status());
        assert!(statuses::is_known(&seen), "{command:?} is answered with {}", response.status());
        self.model.see(&command, response.status(), worked, was_piv, self.observer.is_piv());
        if forgotten {
            self.model.logout();
        }
    }

    /// The response, unless a reset made it nobody's.
    fn work(&mut self, command: &Command, job: Job, meanwhile: Meanwhile) -> Option<Response> {
        if let Some(late) = self.late.take() {
            self.finish_unanswered(late);
        }
        match meanwhile {
            Meanwhile::Nothing => {}
            Meanwhile::Command => match self.card.command(command) {
                Step::Answer(response) => assert_eq!(response.status(), StatusWord::NO_DIAGNOSIS),
                Step::Work(_) => panic!("two jobs at once"),
            },
            Meanwhile::Logout => self.card.logout(),
            Meanwhile::Reset | Meanwhile::Late => {
                let before = self.seen.operations.load(Ordering::Relaxed);
                self.card.reset();
                let done = job.run();
                let worked = self.seen.operations.load(Ordering::Relaxed) > before;
                self.model.see_unanswered(command, worked, self.observer.is_piv());
                // It holds what it logged in.
                self.seen.late.store(self.seen.logins.load(Ordering::Relaxed), Ordering::Relaxed);
                if meanwhile == Meanwhile::Late {
                    self.late = Some(done);
                } else {
                    self.finish_unanswered(done);
                }
                self.reset();
                return None;
            }
            Meanwhile::Lost => {
                drop(job);
                self.reset();
                return None;
            }
        }
        Some(self.card.finish(job.run()))
    }

    fn finish_unanswered(&mut self, done: Done) {
        let response = self.card.finish(done);
        assert_eq!((response.data(), response.status()), (&[][..], StatusWord::CONDITIONS_NOT_SATISFIED));
        self.seen.late.store(0, Ordering::Relaxed);
    }

    fn check(&self, command: &Command, response: &Response) {
        assert!(response.data().len() <= command.le().unwrap_or(0), "{command:?} is answered too long");
        assert!(response.as_bytes().len() <= apdu::MAX_RESPONSE);
    }
}

fn padded(pin: &[u8]) -> Vec<u8> {
    let mut pin = pin.to_vec();
    pin.resize(8, 0xFF);
    pin
}

#[derive(Default)]
struct Seen {
    operations: AtomicUsize,
    logins: AtomicUsize,
    /// How many of the logins nobody has: they are in work that was done after a reset.
    late: AtomicUsize,
}

/// Five keys, whose results are bytes of the right number.
struct Store {
    certificates: Vec<Certificate>,
    seen: Arc<Seen>,
}

struct Login {
    kinds: Vec<KeyKind>,
    seen: Arc<Seen>,
    over: AtomicBool,
}

impl Store {
    fn new() -> Self {
        let kinds = [
            KeyKind::Rsa { bits: 1024 },
            KeyKind::Rsa { bits: 1024 },
            KeyKind::Ec(Curve::P256),
            KeyKind::Ec(Curve::P384),
            KeyKind::Ec(Curve::P384),
        ];
        let certificate = |(index, kind): (usize, KeyKind)| Certificate {
            name: index.to_string(),
            der: vec![index as u8; 400],
            public_key: vec![index as u8],
            kind,
        };
        let certificates = kinds.into_iter().enumerate().map(certificate).collect();
        Self { certificates, seen: Arc::default() }
    }
}

impl KeyStore for Store {
    fn certificates(&self) -> &[Certificate] {
        &self.certificates
    }

    fn needs_secret(&self) -> bool {
        true
    }

    fn unlock(&self, secret: &Secret) -> Result<Box<dyn Unlocked>, UnlockError> {
        if secret.expose() != PIN {
            return Err(UnlockError::Wrong);
        }
        let earlier = self.seen.logins.fetch_add(1, Ordering::Relaxed);
        assert_eq!(earlier, self.seen.late.load(Ordering::Relaxed), "unlocked while a login exists");
        let kinds = self.certificates.iter().map(|certificate| certificate.kind).collect();
        Ok(Box::new(Login { kinds, seen: Arc::clone(&self.seen), over: AtomicBool::new(false) }))
    }
}

impl Login {
    fn operate(
        &self,
        index: usize,
        input: &[u8],
        lengths: &[usize],
        blocks: usize,
    ) -> Result<Vec<u8>, KeyError> {
        let length = self.kinds[index].block_len();
        assert!(lengths.contains(&input.len()) && !input.is_empty(), "{} bytes for {length}", input.len());
        self.seen.operations.fetch_add(1, Ordering::Relaxed);
        // As a token that is pulled out, and one that fails.
        match input[input.len() - 1] {
            0xEE => self.over.store(true, Ordering::Relaxed),
            0xED => return Err(KeyError::Failed("so it was wanted".into())),
            _ => {}
        }
        if self.over.load(Ordering::Relaxed) {
            return Err(KeyError::LoggedOut);
        }
        Ok(vec![input[0]; length * blocks])
    }
}

impl Unlocked for Login {
    fn rsa_raw(&self, index: usize, block: &[u8]) -> Result<Secret, KeyError> {
        self.operate(index, block, &[self.kinds[index].block_len()], 1).map(Secret::new)
    }

    fn ecdsa(&self, index: usize, digest: &[u8]) -> Result<Vec<u8>, KeyError> {
        let lengths: Vec<_> = (1..=self.kinds[index].block_len()).collect();
        self.operate(index, digest, &lengths, 2)
    }

    fn ecdh(&self, index: usize, point: &[u8]) -> Result<Secret, KeyError> {
        assert_eq!(point[0], 0x04, "a point that is not written in full");
        assert!(matches!(index, 2 | 4), "ECDH with a key that signs");
        self.operate(index, point, &[1 + 2 * self.kinds[index].block_len()], 1).map(Secret::new)
    }
}

impl Drop for Login {
    fn drop(&mut self) {
        self.seen.logins.fetch_sub(1, Ordering::Relaxed);
    }
}
