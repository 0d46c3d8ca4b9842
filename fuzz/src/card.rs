//! Everything a guest can say to an emulated card: APDUs, chains, PINs, resets at bad moments; the BER-TLV templates of
//! GENERAL AUTHENTICATE, PUT DATA and GENERATE ASYMMETRIC KEY PAIR, right, nearly right and wrong, before and after the
//! administrator is known. What the card answers is compared with a model of its security state.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use emulated_card::card::{CardOptions, Done, EmulatedCard, Job, Profile, Step};
use emulated_card::keys::writable::{ManagementAlgorithm, NewKey, Writable, WriteError};
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
    let (profile, writable) = input.choose(&[
        (Profile::Dual, false),
        (Profile::Piv, false),
        (Profile::Cac, false),
        (Profile::Piv, true),
    ]);
    let reference = input.choose(&[Reference::Store, Reference::Any, Reference::Own]);
    let store = Store::new(writable);
    let mut end = End {
        seen: Arc::clone(&store.seen),
        card: card(store, profile, reference),
        observer: if writable { Observer::of_writable(true) } else { Observer::new(profile) },
        model: Model::new(reference, writable),
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
    let options = CardOptions { profile, slots: slots().into_iter().zip(0..).collect() };
    let id = CardId::derive(&store.certificates, "fuzz");
    let (pin, puk) = (Secret::from(PIN), Secret::from(PUK));
    let reference = match reference {
        Reference::Store => ReferenceData::in_memory(15),
        Reference::Any => ReferenceData::any(pin),
        Reference::Own => ReferenceData::in_memory_own(&pin, Some(&puk), 3).expect("a PIN and a PUK"),
    };
    let (seen, mut number) = (Arc::clone(&store.seen), 0_u8);
    let random = move |bytes: &mut [u8]| {
        bytes.fill_with(|| {
            number = number.wrapping_add(1);
            number
        });
        *lock(&seen.drawn) = Some(bytes.to_vec());
    };
    EmulatedCard::new(Arc::new(store), Arc::new(reference), id, options, Box::new(random))
        .expect("a card of five keys")
}

fn slots() -> [PivSlot; 5] {
    let retired = "82".parse().expect("a slot");
    let [authentication, signature] = [PivSlot::AUTHENTICATION, PivSlot::SIGNATURE];
    [authentication, signature, PivSlot::KEY_MANAGEMENT, PivSlot::CARD_AUTHENTICATION, retired]
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the card management key does, and undoes.
fn encrypted(block: &[u8]) -> Vec<u8> {
    block.iter().map(|byte| byte ^ 0xA5).collect()
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
    administrator: Administrator,
}

/// Who may write to the card: whoever answered, with the command after it, what the card asked.
struct Administrator {
    /// Whether the card has one.
    exists: bool,
    authenticated: bool,
    /// What answers a witness and what answers a challenge, if the card gave either.
    answers: Option<[Vec<u8>; 2]>,
    /// INS, P1, P2 and data of a chain so far.
    chain: Option<([u8; 3], Vec<u8>)>,
}

impl Administrator {
    fn new(exists: bool) -> Self {
        Self { exists, authenticated: false, answers: None, chain: None }
    }

    fn forget(&mut self) {
        (self.authenticated, self.answers) = (false, None);
    }

    /// A command was done, for which the card may have `drawn` a random number.
    fn see(&mut self, command: &Command, status: StatusWord, drawn: Option<Vec<u8>>) {
        let [class, header @ ..] = command.header();
        let answers = self.answers.take();
        let chain = self.chain.take().filter(|(earlier, _)| *earlier == header);
        let data = [&chain.map_or(vec![], |(_, data)| data), command.data()].concat();
        let succeeded = matches!(status.sw1(), 0x90 | 0x61);
        let management = matches!(header, [apdu::ins::GENERAL_AUTHENTICATE, 0x00 | 0x03, CARD_MANAGEMENT]);
        match class {
            0x00 | 0x80 => {}
            0x10 if succeeded => {
                self.answers = answers.filter(|_| management);
                self.chain = Some((header, data));
                return;
            }
            _ => return,
        }
        match command.ins() {
            // The rest of what the card asks.
            apdu::ins::GET_RESPONSE if succeeded => self.answers = answers,
            apdu::ins::GENERAL_AUTHENTICATE if management && self.exists => match (succeeded, drawn) {
                (true, Some(random)) => {
                    self.authenticated = false;
                    self.answers = Some([random.clone(), encrypted(&random)]);
                }
                (true, None) => {
                    let answers = answers.expect("an administrator whom the card asked nothing");
                    let said = |answer: &Vec<u8>| data.windows(answer.len()).any(|some| some == answer);
                    assert!(answers.iter().any(said), "a wrong answer makes an administrator: {command:?}");
                    self.authenticated = true;
                }
                (false, _) => self.authenticated &= !matches!(status.0, 0x6982 | 0x6985),
            },
            apdu::ins::PUT_DATA | apdu::ins::GENERATE_KEY_PAIR if self.exists => match status.0 {
                0x6982 => assert!(!self.authenticated, "the administrator is refused: {command:?}"),
                0x6700 | 0x6A86 => {}
                _ => assert!(self.authenticated, "{command:?} is looked at, whoever sent it"),
            },
            _ => {}
        }
    }
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
    fn new(reference: Reference, writable: bool) -> Self {
        let tries = || {
            Tries::new(match reference {
                Reference::Store => 15,
                _ => 3,
            })
        };
        let (pin, puk) = (PIN.to_vec(), PUK.to_vec());
        let (tries, puk_tries) = (tries(), tries());
        let administrator = Administrator::new(writable);
        Self { reference, verified: false, fresh: false, pin, puk, tries, puk_tries, administrator }
    }

    fn logout(&mut self) {
        (self.verified, self.fresh) = (false, false);
    }

    fn is_right(&self, pin: &[u8]) -> bool {
        self.reference == Reference::Any || unpadded(pin) == self.pin
    }

    /// A command was done, and a private key with it if it `worked`.
    fn see(&mut self, command: &Command, status: StatusWord, worked: bool, was_piv: bool, is_piv: bool) {
        let fresh = self.fresh;
        let key = command.ins() == apdu::ins::GENERAL_AUTHENTICATE && command.p2() != CARD_MANAGEMENT;
        // Whatever comes of it, unless it is a piece of a chain.
        self.fresh &= !(was_piv && key && command.cla() != 0x10);
        // Pieces of a chain, and what is refused for its class, are nothing else.
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
        self.see_key(command, status, worked, was_piv, fresh);
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
            (false, _) => return self.see_key(command, StatusWord::NO_DIAGNOSIS, worked, piv, self.fresh),
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

    /// `fresh` is from before the command.
    fn see_key(&mut self, command: &Command, status: StatusWord, worked: bool, piv: bool, fresh: bool) {
        let succeeded = matches!(status.sw1(), 0x90 | 0x61);
        match (command.ins(), command.p2()) {
            (apdu::ins::GENERAL_AUTHENTICATE, reference) if piv => {
                let permitted = match reference {
                    CARD_AUTHENTICATION => self.verified || self.reference != Reference::Store,
                    SIGNATURE => self.verified && fresh,
                    _ => self.verified,
                };
                assert!(!worked || permitted, "a key worked without the PIN: {command:?}");
                let expected = succeeded && reference != CARD_MANAGEMENT;
                assert!(worked || !expected, "success without a key: {command:?}");
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
        ][usize::from(kind / 16) % 6];
        match kind % 16 {
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
                self.model.administrator.forget();
            }
            6 => self.reset(),
            7 => self.change(input, meanwhile),
            8 | 9 => self.administer(input),
            10..=12 => self.put(input, meanwhile),
            _ => self.generate(input, meanwhile),
        }
    }

    fn reset(&mut self) {
        self.card.reset();
        self.observer.reset();
        self.model.logout();
        self.model.administrator = Administrator::new(self.model.administrator.exists);
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
        let template = changed(field(0x7C, &[field(0x82, &[]), field(tag, &value)].concat()), input);
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

    /// Asks to be the administrator and answers what the card asks, rightly or not.
    fn administer(&mut self, input: &mut Input<'_>) {
        let (asked, answered, challenge) =
            input.choose(&[(0x81, 0x82, &[][..]), (0x80, 0x80, b"\x81\x08challeng")]);
        self.transmit(&[0x00, 0x87, 0x03, CARD_MANAGEMENT, 4, 0x7C, 2, asked, 0, 0], Meanwhile::Nothing);
        let answers = self.model.administrator.answers.clone();
        let mut answer = answers.map_or(vec![0; 8], |[witness, challenge]| match asked {
            0x80 => witness,
            _ => challenge,
        });
        let (wrong, cut) = (input.byte(), input.byte());
        answer[0] ^= wrong;
        let objects = [&[answered, 8], &answer[..], challenge].concat();
        let right = [&[0x7C, objects.len() as u8], &objects[..]].concat();
        let template = changed(right.clone(), input);
        let is_right = wrong == 0 && template == right;
        let (piece, last) = template.split_at(usize::from(cut).min(template.len()));
        if let (1.., Ok(piece)) = (cut, Command::build([0x10, 0x87, 0x03, CARD_MANAGEMENT], piece, None)) {
            self.transmit(piece.as_bytes(), Meanwhile::Nothing);
        }
        if let Ok(last) = Command::build([0x00, 0x87, 0x03, CARD_MANAGEMENT], last, Some(256)) {
            self.transmit(last.as_bytes(), Meanwhile::Nothing);
        }
        let Administrator { exists, authenticated, .. } = self.model.administrator;
        assert!(authenticated || !exists || !is_right, "the administrator's right answer is refused");
    }

    /// PUT DATA that is nearly right, or a piece of it.
    fn put(&mut self, input: &mut Input<'_>, meanwhile: Meanwhile) {
        let class = input.choose(&[0x00, 0x00, 0x00, 0x10]);
        let tag = input.choose(&[
            &[0x5F, 0xC1, 0x05][..],
            &[0x5F, 0xC1, 0x08],
            &[0x5F, 0xC1, 0x0C],
            &[0x5F, 0xC1, 0x0D],
            &[0x5F, 0xC1, 0x20],
            &[0x7E],
        ]);
        let content = input.block();
        let [high, low] = (content.len() as u16).to_be_bytes();
        let data = [&[0x5C, tag.len() as u8], tag, &[0x53, 0x82, high, low], &content].concat();
        if let Ok(command) = Command::build([class, 0xDB, 0x3F, 0xFF], &changed(data, input), None) {
            self.transmit(command.as_bytes(), meanwhile);
        }
    }

    /// GENERATE ASYMMETRIC KEY PAIR that is nearly right.
    fn generate(&mut self, input: &mut Input<'_>, meanwhile: Meanwhile) {
        let reference = input.choose(&[0x9A, 0x9C, 0x9D, 0x9E, 0x82, 0x95, 0x9B]);
        let algorithm = input.choose(&[0x11, 0x14, 0x06, 0x07, 0x05, 0x16, 0x03]);
        let le = input.choose(&[None, Some(1), Some(256), Some(65_536)]);
        let data = changed(vec![0xAC, 3, 0x80, 1, algorithm], input);
        if let Ok(command) = Command::build([0x00, 0x47, 0x00, reference], &data, le) {
            self.transmit(command.as_bytes(), meanwhile);
        }
    }

    fn transmit(&mut self, bytes: &[u8], meanwhile: Meanwhile) {
        let Ok(command) = Command::parse(bytes) else { return };
        let before = self.seen.operations.load(Ordering::Relaxed);
        let written = self.seen.writes.load(Ordering::Relaxed);
        *lock(&self.seen.drawn) = None;
        let was_piv = self.observer.is_piv();
        let (response, forgotten) = match self.card.command(&command) {
            Step::Answer(response) => (response, false),
            Step::Work(job) => match self.work(&command, job, meanwhile) {
                Some(response) => (response, meanwhile == Meanwhile::Logout),
                None => return,
            },
        };
        self.check(&command, &response);
        self.check_write(&command, written);
        let worked = self.seen.operations.load(Ordering::Relaxed) > before;
        let seen = self.observer.see(&command, response.status());
        assert!(statuses::is_known(&seen), "{command:?} is answered with {}", response.status());
        self.model.see(&command, response.status(), worked, was_piv, self.observer.is_piv());
        let drawn = lock(&self.seen.drawn).take();
        self.model.administrator.see(&command, response.status(), drawn);
        if forgotten {
            self.model.logout();
            self.model.administrator.forget();
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
                let written = self.seen.writes.load(Ordering::Relaxed);
                self.card.reset();
                let done = job.run();
                self.check_write(command, written);
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

    /// Nothing is written but for the administrator.
    fn check_write(&self, command: &Command, before: usize) {
        let wrote = self.seen.writes.load(Ordering::Relaxed) > before;
        assert!(!wrote || self.model.administrator.authenticated, "{command:?} writes, whoever sent it");
    }

    fn check(&self, command: &Command, response: &Response) {
        let without_le = if command.ins() == apdu::ins::GENERAL_AUTHENTICATE { 256 } else { 0 };
        let longest = command.le().unwrap_or(without_le);
        assert!(response.data().len() <= longest, "{command:?} is answered too long");
        let unasked = (command.ins(), command.le()) == (apdu::ins::SELECT, None);
        assert!(!unasked || response.status().sw1() != 0x61, "{command:?} has an answer");
        assert!(response.as_bytes().len() <= apdu::MAX_RESPONSE);
    }
}

fn padded(pin: &[u8]) -> Vec<u8> {
    let mut pin = pin.to_vec();
    pin.resize(8, 0xFF);
    pin
}

/// A template, of which the next two bytes of the input may change one.
fn changed(mut template: Vec<u8>, input: &mut Input<'_>) -> Vec<u8> {
    let (at, change) = (input.byte(), input.byte());
    let length = template.len();
    template[usize::from(at) % length] ^= change;
    template
}

#[derive(Default)]
struct Seen {
    operations: AtomicUsize,
    writes: AtomicUsize,
    /// The last random number.
    drawn: Mutex<Option<Vec<u8>>>,
    logins: AtomicUsize,
    /// How many of the logins nobody has: they are in work that was done after a reset.
    late: AtomicUsize,
}

/// The keys of a card, by their index.
type Keys = Arc<Mutex<Vec<(PivSlot, KeyKind)>>>;

/// Five keys, or more if they are generated, whose results are bytes of the right number.
struct Store {
    certificates: Vec<Certificate>,
    keys: Keys,
    seen: Arc<Seen>,
    /// What was written to data objects, if anything can be.
    objects: Option<Mutex<BTreeMap<u8, Vec<u8>>>>,
}

struct Login {
    keys: Keys,
    seen: Arc<Seen>,
    over: AtomicBool,
}

impl Store {
    fn new(writable: bool) -> Self {
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
        let keys = Arc::new(Mutex::new(slots().into_iter().zip(kinds).collect()));
        Self { certificates, keys, seen: Arc::default(), objects: writable.then(Mutex::default) }
    }
}

impl Writable for Store {
    fn management(&self) -> Option<ManagementAlgorithm> {
        Some(ManagementAlgorithm::TripleDes)
    }

    fn encrypt(&self, block: &[u8]) -> Result<Secret, KeyError> {
        Ok(Secret::new(encrypted(block)))
    }

    fn object(&self, tag: u8) -> Option<Vec<u8>> {
        lock(self.objects.as_ref()?).get(&tag).cloned()
    }

    fn key(&self, slot: PivSlot) -> Option<(usize, KeyKind)> {
        let keys = lock(&self.keys);
        let index = keys.iter().position(|(taken, _)| *taken == slot)?;
        Some((index, keys[index].1))
    }

    fn put(&self, tag: u8, content: &[u8]) -> Result<(), WriteError> {
        assert!(content.len() <= usize::from(u16::MAX), "{} bytes in an object", content.len());
        self.seen.writes.fetch_add(1, Ordering::Relaxed);
        if let Some(objects) = &self.objects {
            lock(objects).insert(tag, content.to_vec());
        }
        Ok(())
    }

    fn generate(&self, slot: PivSlot, kind: KeyKind) -> Result<NewKey, WriteError> {
        self.seen.writes.fetch_add(1, Ordering::Relaxed);
        let mut keys = lock(&self.keys);
        match keys.iter_mut().find(|(taken, _)| *taken == slot) {
            Some((_, place)) => *place = kind,
            None => keys.push((slot, kind)),
        }
        let length = kind.block_len();
        Ok(match kind {
            KeyKind::Rsa { .. } => NewKey::Rsa { modulus: vec![0xC1; length], exponent: vec![1, 0, 1] },
            KeyKind::Ec(_) => NewKey::Ec { point: [vec![0x04], vec![9; 2 * length]].concat() },
        })
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
        let (keys, seen) = (Arc::clone(&self.keys), Arc::clone(&self.seen));
        Ok(Box::new(Login { keys, seen, over: AtomicBool::new(false) }))
    }

    fn writable(&self) -> Option<&dyn Writable> {
        self.objects.as_ref().map(|_| self as &dyn Writable)
    }
}

impl Login {
    fn key(&self, index: usize) -> (PivSlot, usize) {
        let (slot, kind) = lock(&self.keys)[index];
        (slot, kind.block_len())
    }

    fn operate(
        &self,
        index: usize,
        input: &[u8],
        lengths: &[usize],
        blocks: usize,
    ) -> Result<Vec<u8>, KeyError> {
        let (_, length) = self.key(index);
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
        self.operate(index, block, &[self.key(index).1], 1).map(Secret::new)
    }

    fn ecdsa(&self, index: usize, digest: &[u8]) -> Result<Vec<u8>, KeyError> {
        let lengths: Vec<_> = (1..=self.key(index).1).collect();
        self.operate(index, digest, &lengths, 2)
    }

    fn ecdh(&self, index: usize, point: &[u8]) -> Result<Secret, KeyError> {
        assert_eq!(point[0], 0x04, "a point that is not written in full");
        let (slot, length) = self.key(index);
        let sign = [PivSlot::AUTHENTICATION, PivSlot::SIGNATURE, PivSlot::CARD_AUTHENTICATION];
        assert!(!sign.contains(&slot), "ECDH with a key that signs");
        self.operate(index, point, &[1 + 2 * length], 1).map(Secret::new)
    }
}

impl Drop for Login {
    fn drop(&mut self) {
        self.seen.logins.fetch_sub(1, Ordering::Relaxed);
    }
}
