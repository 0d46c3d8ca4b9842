//! Everything a guest can say to an emulated card: APDUs, templates, chains, PINs, resets at bad moments.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use emulated_card::card::{CardOptions, EmulatedCard, Profile, Step};
use emulated_card::keys::{Certificate, Curve, KeyError, KeyKind, KeyStore, UnlockError, Unlocked};
use emulated_card::pin::ReferenceData;
use emulated_card::slot::PivSlot;
use emulated_card::state::CardId;
use vscard_protocol::{Command, Response, Secret, apdu};

use crate::input::Input;

const PIN: &[u8] = b"123456";
const SIGNATURE: u8 = 0x9C;
const CARD_AUTHENTICATION: u8 = 0x9E;

/// Does what `bytes` say.
pub(crate) fn run(bytes: &[u8]) {
    let input = &mut Input::new(bytes);
    let profile = input.choose(&[Profile::Dual, Profile::Piv, Profile::Cac]);
    let store = Store::new(input.byte() % 2 == 1);
    let seen = Arc::clone(&store.seen);
    let mut end = End { card: card(store, profile), seen, verified: false, fresh: false };
    for _ in 0..1000 {
        if input.is_empty() {
            break;
        }
        end.step(input);
    }
    end.card.reset();
    assert_eq!(end.seen.logins.load(Ordering::Relaxed), 0, "a login outlives the reset");
}

fn card(store: Store, profile: Profile) -> EmulatedCard {
    let slots =
        [PivSlot::AUTHENTICATION, PivSlot::SIGNATURE, PivSlot::KEY_MANAGEMENT, PivSlot::CARD_AUTHENTICATION];
    let options = CardOptions { profile, slots: slots.into_iter().zip(0..).collect() };
    let id = CardId::derive(&store.certificates, "fuzz");
    let reference =
        if store.open { ReferenceData::any(Secret::from(PIN)) } else { ReferenceData::in_memory(15) };
    EmulatedCard::new(Arc::new(store), Arc::new(reference), id, options, Box::new(|bytes| bytes.fill(7)))
        .expect("a card of four keys")
}

struct End {
    card: EmulatedCard,
    seen: Arc<Seen>,
    /// Whether the card may take the PIN for verified.
    verified: bool,
    /// Whether it was verified since the signature key was used.
    fresh: bool,
}

impl End {
    fn step(&mut self, input: &mut Input<'_>) {
        match input.byte() % 7 {
            0 => self.transmit(&input.block()),
            1 => self.built(input),
            2 => self.authenticate(input),
            3 => {
                // Right, for one applet or the other.
                let reference = input.choose(&[0x80, 0x00]);
                self.transmit(&[&[0x00, 0x20, 0x00, reference, 8], PIN, &[0xFF, 0xFF]].concat());
            }
            4 => self.transmit(&[0x00, 0xC0, 0x00, 0x00, input.byte()]),
            5 => {
                self.card.logout();
                self.verified = false;
            }
            _ => {
                self.card.reset();
                self.verified = false;
                assert_eq!(self.seen.logins.load(Ordering::Relaxed), 0, "a login outlives the reset");
            }
        }
    }

    fn built(&mut self, input: &mut Input<'_>) {
        let class = input.choose(&[0x00, 0x80, 0x10, 0x04]);
        let header = [class, input.byte(), input.byte(), input.byte()];
        let le = input.choose(&[None, Some(1), Some(256), Some(65_536)]);
        if let Ok(command) = Command::build(header, &input.block(), le) {
            self.transmit(command.as_bytes());
        }
    }

    /// GENERAL AUTHENTICATE with a template that is nearly right.
    fn authenticate(&mut self, input: &mut Input<'_>) {
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
            self.transmit(command.as_bytes());
        }
    }

    fn transmit(&mut self, bytes: &[u8]) {
        let Ok(command) = Command::parse(bytes) else { return };
        let operations = self.seen.operations.load(Ordering::Relaxed);
        let response = match self.card.command(&command) {
            Step::Answer(response) => response,
            Step::Work(job) => self.card.finish(job.run()),
        };
        self.check(&command, &response);
        let worked = self.seen.operations.load(Ordering::Relaxed) > operations;
        let authenticate = command.ins() == apdu::ins::GENERAL_AUTHENTICATE;
        let needs_none = authenticate && command.p2() == CARD_AUTHENTICATION;
        assert!(!worked || self.verified || needs_none, "a key worked without a PIN: {command:?}");
        if authenticate && command.p2() == SIGNATURE && command.cla() != 0x10 {
            assert!(!worked || self.fresh, "the signature key worked twice: {command:?}");
            self.fresh = false;
        }
        if command.ins() == apdu::ins::VERIFY && !command.data().is_empty() {
            self.verified |= response.status().0 == 0x9000;
            self.fresh |= response.status().0 == 0x9000;
        }
    }

    fn check(&self, command: &Command, response: &Response) {
        assert!(response.data().len() <= command.le().unwrap_or(0), "{command:?} is answered too long");
        assert!(response.as_bytes().len() <= apdu::MAX_RESPONSE);
        assert!(matches!(response.status().sw1(), 0x60..=0x6F | 0x90), "{:?}", response.status());
    }
}

#[derive(Default)]
struct Seen {
    operations: AtomicUsize,
    logins: AtomicUsize,
}

/// Four keys, whose results are bytes of the right number.
struct Store {
    certificates: Vec<Certificate>,
    seen: Arc<Seen>,
    /// Whether the card authentication key works without the PIN.
    open: bool,
}

struct Login {
    kinds: Vec<KeyKind>,
    seen: Arc<Seen>,
    over: AtomicBool,
}

impl Store {
    fn new(open: bool) -> Self {
        let kinds = [
            KeyKind::Rsa { bits: 1024 },
            KeyKind::Rsa { bits: 1024 },
            KeyKind::Ec(Curve::P256),
            KeyKind::Ec(Curve::P384),
        ];
        let certificate = |(index, kind): (usize, KeyKind)| Certificate {
            name: index.to_string(),
            der: vec![index as u8; 400],
            public_key: vec![index as u8],
            kind,
        };
        let certificates = kinds.into_iter().enumerate().map(certificate).collect();
        Self { certificates, seen: Arc::default(), open }
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
        assert_eq!(earlier, 0, "unlocked while a login exists");
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
        self.operate(index, point, &[1 + 2 * self.kinds[index].block_len()], 1).map(Secret::new)
    }
}

impl Drop for Login {
    fn drop(&mut self) {
        self.seen.logins.fetch_sub(1, Ordering::Relaxed);
    }
}
