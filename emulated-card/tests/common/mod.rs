//! A key store in memory, and a card on it.
#![allow(dead_code, clippy::unwrap_used, reason = "each test binary uses a part of it")]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};

use emulated_card::card::{CardBuildError, CardOptions, EmulatedCard, Profile, Step};
use emulated_card::keys::{Certificate, Curve, KeyError, KeyKind, KeyStore, UnlockError, Unlocked};
use emulated_card::pin::ReferenceData;
use emulated_card::slot::{PivSlot, assign};
use emulated_card::state::CardId;
use vscard_protocol::{Command, Response, Secret};

pub(crate) const PIN: &[u8] = b"123456";
pub(crate) const VERIFY: &[u8] = b"\x00\x20\x00\x00\x08123456\xFF\xFF";

/// What happened to a store.
#[derive(Default)]
pub(crate) struct Seen {
    pub(crate) operations: AtomicUsize,
    pub(crate) logins: AtomicUsize,
    pub(crate) logouts: AtomicUsize,
}

impl Seen {
    pub(crate) fn operations(&self) -> usize {
        self.operations.load(Ordering::SeqCst)
    }

    pub(crate) fn live_logins(&self) -> usize {
        self.logins.load(Ordering::SeqCst) - self.logouts.load(Ordering::SeqCst)
    }
}

/// Holds up whoever passes, until let through.
pub(crate) struct Gate {
    arrived: SyncSender<()>,
    proceed: Mutex<Receiver<()>>,
}

/// The test's side of a [`Gate`].
pub(crate) struct Keeper {
    pub(crate) arrived: Receiver<()>,
    pub(crate) proceed: SyncSender<()>,
}

impl Gate {
    pub(crate) fn new() -> (Self, Keeper) {
        let ((arrived, has_arrived), (proceed, may_proceed)) = (sync_channel(8), sync_channel(8));
        (Self { arrived, proceed: Mutex::new(may_proceed) }, Keeper { arrived: has_arrived, proceed })
    }

    fn pass(&self) {
        self.arrived.send(()).unwrap();
        // A keeper that is gone lets everybody through.
        let _ = self.proceed.lock().unwrap().recv();
    }
}

/// A store whose raw operation reverses the block; a signature is the digest reversed, twice, and a shared secret the
/// beginning of the point reversed. The first byte of what was reversed is changed by the key's index.
pub(crate) struct Store {
    certificates: Vec<Certificate>,
    pub(crate) seen: Arc<Seen>,
    pub(crate) unlock_error: Option<UnlockError>,
    pub(crate) key_error: Option<KeyError>,
    pub(crate) operation_gate: Option<Arc<Gate>>,
    pub(crate) unlock_gate: Option<Arc<Gate>>,
    /// Told of each logout.
    pub(crate) on_logout: Option<SyncSender<()>>,
}

struct Login {
    kinds: Vec<KeyKind>,
    seen: Arc<Seen>,
    key_error: Option<KeyError>,
    gate: Option<Arc<Gate>>,
    on_logout: Option<SyncSender<()>>,
}

/// Bytes that do not compress.
pub(crate) fn noise(length: usize, seed: u32) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    };
    (0..length).map(|_| next()).collect()
}

pub(crate) fn certificate(index: usize, kind: KeyKind) -> Certificate {
    Certificate {
        name: format!("certificate {index}"),
        der: noise(600, index as u32 + 1),
        public_key: vec![index as u8; 4],
        kind,
    }
}

pub(crate) fn certificates(count: usize, bits: usize) -> Vec<Certificate> {
    (0..count).map(|index| certificate(index, KeyKind::Rsa { bits })).collect()
}

/// `9a:2048,9c:p256` and the like: slots, and certificates that go there.
pub(crate) fn keys(text: &str) -> (Vec<(PivSlot, usize)>, Vec<Certificate>) {
    let (mut slots, mut certificates) = (Vec::new(), Vec::new());
    for (index, key) in text.split(',').enumerate() {
        let (slot, kind) = key.split_once(':').unwrap();
        let kind = match kind {
            "p256" => KeyKind::Ec(Curve::P256),
            "p384" => KeyKind::Ec(Curve::P384),
            bits => KeyKind::Rsa { bits: bits.parse().unwrap() },
        };
        slots.push((slot.parse().unwrap(), index));
        certificates.push(certificate(index, kind));
    }
    (slots, certificates)
}

impl Store {
    pub(crate) fn new(count: usize, bits: usize) -> Self {
        Self::of(certificates(count, bits))
    }

    pub(crate) fn of(certificates: Vec<Certificate>) -> Self {
        Self {
            certificates,
            seen: Arc::default(),
            unlock_error: None,
            key_error: None,
            operation_gate: None,
            unlock_gate: None,
            on_logout: None,
        }
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
        if let Some(gate) = &self.unlock_gate {
            gate.pass();
        }
        match &self.unlock_error {
            Some(error) => Err(error.clone()),
            None if secret.expose() == PIN => {
                self.seen.logins.fetch_add(1, Ordering::SeqCst);
                Ok(Box::new(Login {
                    kinds: self.certificates.iter().map(|certificate| certificate.kind).collect(),
                    seen: Arc::clone(&self.seen),
                    key_error: self.key_error.clone(),
                    gate: self.operation_gate.clone(),
                    on_logout: self.on_logout.clone(),
                }))
            }
            None => Err(UnlockError::Wrong),
        }
    }
}

impl Login {
    fn operate(&self, index: usize, block: &[u8]) -> Result<Secret, KeyError> {
        self.seen.operations.fetch_add(1, Ordering::SeqCst);
        if let Some(gate) = &self.gate {
            gate.pass();
        }
        match &self.key_error {
            Some(error) => Err(error.clone()),
            None => {
                let mut result: Vec<u8> = block.iter().rev().copied().collect();
                result[0] ^= index as u8;
                Ok(Secret::new(result))
            }
        }
    }
}

impl Unlocked for Login {
    fn rsa_raw(&self, index: usize, block: &[u8]) -> Result<Secret, KeyError> {
        self.operate(index, block)
    }

    fn ecdsa(&self, index: usize, digest: &[u8]) -> Result<Vec<u8>, KeyError> {
        let number = self.operate(index, digest)?;
        let padding = vec![0; self.kinds[index].block_len() - number.len()];
        Ok([&padding, number.expose(), &padding, number.expose()].concat())
    }

    fn ecdh(&self, index: usize, point: &[u8]) -> Result<Secret, KeyError> {
        let result = self.operate(index, point)?;
        Ok(Secret::from(&result.expose()[..self.kinds[index].block_len()]))
    }
}

impl Drop for Login {
    fn drop(&mut self) {
        self.seen.logouts.fetch_add(1, Ordering::SeqCst);
        if let Some(told) = &self.on_logout {
            let _ = told.send(());
        }
    }
}

pub(crate) fn try_card(
    store: Store,
    reference: ReferenceData,
    profile: Profile,
    slots: Vec<(PivSlot, usize)>,
) -> Result<EmulatedCard, CardBuildError> {
    try_card_of(Arc::new(store), reference, profile, slots)
}

/// A card whose random numbers are 1, 2, 3 and so on.
pub(crate) fn try_card_of(
    store: Arc<dyn KeyStore>,
    reference: ReferenceData,
    profile: Profile,
    slots: Vec<(PivSlot, usize)>,
) -> Result<EmulatedCard, CardBuildError> {
    let id = CardId::derive(store.certificates(), "test");
    let mut counter = 0_u8;
    let random = move |bytes: &mut [u8]| {
        bytes.fill_with(|| {
            counter = counter.wrapping_add(1);
            counter
        });
    };
    let options = CardOptions { profile, slots };
    EmulatedCard::new(store, Arc::new(reference), id, options, Box::new(random))
}

/// A CAC with all of the store's certificates.
pub(crate) fn card_with(store: Store, reference: ReferenceData) -> EmulatedCard {
    let slots = assign(store.certificates(), &[]).unwrap();
    try_card(store, reference, Profile::Cac, slots).unwrap()
}

/// A card with keys as in [`keys`].
pub(crate) fn piv_card(profile: Profile, text: &str, reference: ReferenceData) -> EmulatedCard {
    let (slots, certificates) = keys(text);
    try_card(Store::of(certificates), reference, profile, slots).unwrap()
}

pub(crate) fn card(count: usize, bits: usize) -> EmulatedCard {
    card_with(Store::new(count, bits), ReferenceData::in_memory(3))
}

pub(crate) fn transmit(card: &mut EmulatedCard, command: &Command) -> Response {
    match card.command(command) {
        Step::Answer(response) => response,
        Step::Work(job) => card.finish(job.run()),
    }
}

/// Sends bytes that are a command.
pub(crate) fn send(card: &mut EmulatedCard, bytes: &[u8]) -> Response {
    transmit(card, &Command::parse(bytes).unwrap())
}

/// SELECT of an applet, without an answer.
pub(crate) fn select(aid: &[u8]) -> Vec<u8> {
    [&[0x00, 0xA4, 0x04, 0x0C, aid.len() as u8], aid].concat()
}

pub(crate) fn pki_aid(index: u8) -> [u8; 7] {
    [0xA0, 0x00, 0x00, 0x00, 0x79, 0x01, index]
}

/// SELECT of the PIV application, without an answer.
pub(crate) const SELECT_PIV: &[u8] = b"\x00\xA4\x04\x0C\x09\xA0\x00\x00\x03\x08\x00\x00\x10\x00";
pub(crate) const VERIFY_PIV: &[u8] = b"\x00\x20\x00\x80\x08123456\xFF\xFF";
