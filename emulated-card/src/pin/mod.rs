//! Reference data: what a PIN is compared with, and how many tries are left.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;
use vscard_protocol::Secret;

use crate::keys::{KeyStore, UnlockError, Unlocked};
use crate::state::{CardClaim, CardId, Contents, LockedRecord, Record, StateDirectory, StateError};

mod hash;
mod known;
mod secret_file;
mod turns;

use hash::Cost;
pub(crate) use hash::PinHash;
use known::Known;
#[cfg(feature = "pem")]
pub(crate) use secret_file::{Access, read_file};
pub use secret_file::{SecretFileError, read_secret_file};

/// How many wrong PINs (or PUKs) in a row block a card, unless said otherwise. What can be said is 1 to 15, as the status
/// word `63CX` counts (ISO/IEC 7816-4 §5.1.3); a number outside is taken as the nearest.
pub const DEFAULT_TRIES: u8 = 3;

/// Why VERIFY, CHANGE REFERENCE DATA or RESET RETRY COUNTER did not succeed.
#[derive(Debug, Error)]
pub enum PinError {
    /// Compared and wrong; `left` tries remain.
    #[error("wrong PIN, {left} tries left")]
    Wrong {
        /// Tries that remain.
        left: u8,
    },
    /// No tries are left.
    #[error("the PIN is blocked")]
    Blocked,
    /// The counter could not be read or written, so the PIN was not compared.
    #[error("the PIN's state is not usable: {0}")]
    State(#[from] StateError),
    /// No PIN is like this one; it was not compared, and no try was used.
    #[error("the PIN cannot be right: {0}")]
    Impossible(String),
    /// The PIN could not be compared (the key store failed). No try was used, unless the store was a token that failed
    /// when it had the PIN already.
    #[error("{0}")]
    NotChecked(String),
    /// There is no such reference data, or it is not the card's to change: no PUK, a PIN that is the store's own
    /// password, any PIN.
    #[error("this PIN cannot be changed from the card")]
    NotSupported,
    /// A new PIN or PUK that a card cannot have; no try was used.
    #[error(transparent)]
    Unfit(#[from] CardPinError),
}

/// Why a PIN or PUK cannot be a card's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum CardPinError {
    /// Not 4 to 8 bytes.
    #[error("a card's own PIN has 4 to 8 bytes")]
    Length,
    /// A byte that pads a PIN, or ends a string: no guest can type it.
    #[error("a card's own PIN contains no byte 00 or FF")]
    Byte,
    /// Not 6 to 8 digits.
    #[error("the PIN of a PIV card has 6 to 8 digits (SP 800-73-4 Part 2 §2.4.3)")]
    Piv,
    /// Not 8 bytes, or nothing but padding.
    #[error("a PUK has exactly 8 bytes, not all of them FF")]
    Puk,
}

/// What became of the PIN or PUK given to [`ReferenceData::of_card`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Initial {
    /// The card had none, and this is it now.
    Created,
    /// The card has one already, so the given one was ignored: the caller says so.
    Ignored,
    /// None was given.
    NotGiven,
}

/// What a card compares a PIN with, and the counter of tries that goes with it; for a card with a PIN of its own,
/// perhaps also a PUK with a counter of its own.
///
/// The try is used, and that is on disk, before the PIN is compared; it is given back after the PIN proved right, all
/// under a lock: a process killed at any moment, or two that guess at once, gain no try. The giving back is written and
/// not waited for, so that a power cut may cost a try. A new PIN is written together with the try given back, and waited
/// for: it is the old one or the new one that counts, whenever the process dies.
///
/// ```no_run
/// # fn example(store: &dyn emulated_card::keys::KeyStore) -> Result<(), Box<dyn std::error::Error>> {
/// use emulated_card::pin::{DEFAULT_TRIES, ReferenceData};
/// use emulated_card::state::StateDirectory;
///
/// let directory = StateDirectory::of_user()?;
/// let data = ReferenceData::of_database(&directory, "/home/alice/.pki/nssdb".as_ref(), DEFAULT_TRIES);
/// let login = data.verify(&vscard_protocol::Secret::from(&b"123456"[..]), store)?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct ReferenceData {
    kind: Kind,
    tries: u8,
    /// The token that counts, too, and sometimes tells.
    token: Option<Arc<dyn KeyStore>>,
    /// The token has said itself that a wrong PIN was given, since the last right one that is known here. Not on disk:
    /// what a token says may begin anew with its module or its next insertion, though nobody gave the right PIN.
    told: AtomicBool,
}

#[derive(Debug)]
enum Kind {
    /// The PIN is the store's own password.
    Store(Place),
    /// The PIN is the card's own; the host has the store's password.
    Card { place: Place, store_password: Secret, known: Mutex<Option<Box<Known>>> },
    /// Any PIN is right.
    Any { store_password: Secret },
}

/// Where counters and hashes are.
#[derive(Debug)]
enum Place {
    Disk(Record),
    Memory(Box<Mutex<Contents>>),
}

impl ReferenceData {
    /// The PIN is the store's own password. One counter per database, shared by every card and process on it.
    ///
    /// `database` is the canonical path. A damaged state is no error here; it refuses each VERIFY.
    pub fn of_database(directory: &StateDirectory, database: &Path, tries: u8) -> Self {
        Self::new(Kind::Store(Place::Disk(Record::of_database(directory, database))), tries)
    }

    /// The PIN is the card's own, a hash in the card's state, made from `pin` if there is none yet; and so is the
    /// PUK, of a card that has one. The store is unlocked with `store_password`, which the host gave (empty for a
    /// store without one).
    ///
    /// The counters are the card's own, too. Tells what became of `pin` and of `puk`.
    ///
    /// # Errors
    /// [`StateError::NoPin`] if there is neither state nor `pin`, [`StateError::CardPin`] if `pin` or `puk` is
    /// needed and unfit, or state that is damaged or cannot be made.
    pub fn of_card(
        directory: &StateDirectory,
        claim: &CardClaim,
        pin: Option<&Secret>,
        puk: Option<&Secret>,
        store_password: Secret,
        tries: u8,
    ) -> Result<(Self, Initial, Initial), StateError> {
        let record = Record::of_card(directory, claim.database(), claim.id());
        // Nobody else gives this card a PIN or PUK while the claim is held.
        let kept = record.read()?.unwrap_or_default();
        if kept.pin.is_none() && pin.is_none() {
            return Err(StateError::NoPin { database: claim.database().to_owned() });
        }
        let new_pin = first(kept.pin.as_ref(), pin, check_card_pin)?;
        let new_puk = first(kept.puk.as_ref(), puk, check_puk)?;
        let outcomes = (outcome(pin, new_pin.as_ref()), outcome(puk, new_puk.as_ref()));
        if new_pin.is_some() || new_puk.is_some() {
            let mut locked = record.lock()?;
            let now = locked.read()?.unwrap_or_default();
            locked.write(&Contents { pin: new_pin.or(now.pin), puk: new_puk.or(now.puk), ..now })?;
        }
        let kind = Kind::card(Place::Disk(record), store_password);
        Ok((Self::new(kind, tries), outcomes.0, outcomes.1))
    }

    /// Whether the card has a PIN of its own already.
    ///
    /// # Errors
    /// State that is damaged or cannot be read.
    pub fn card_has_pin(directory: &StateDirectory, claim: &CardClaim) -> Result<bool, StateError> {
        Ok(Record::of_card(directory, claim.database(), claim.id())
            .read()?
            .is_some_and(|contents| contents.pin.is_some()))
    }

    /// Gives a card with a PIN of its own all its tries back, for PIN and PUK, without a claim: some process may
    /// have it open. Tells whether there was a PIN.
    ///
    /// # Errors
    /// State that is damaged or cannot be written.
    pub fn reset_card_tries(
        directory: &StateDirectory,
        database: &Path,
        id: &CardId,
    ) -> Result<bool, StateError> {
        Self::reset_card_tries_at(directory, &[database.to_owned()], id)
    }

    /// The same of a card that is in one place or, certificate by certificate, in several.
    pub(crate) fn reset_card_tries_at(
        directory: &StateDirectory,
        places: &[PathBuf],
        id: &CardId,
    ) -> Result<bool, StateError> {
        let mut was_there = false;
        for record in directory.records(places, id)? {
            was_there |= reset(&record)?;
        }
        Ok(was_there)
    }

    /// Any PIN is right, and nothing is counted. The store is unlocked with `store_password`.
    pub fn any(store_password: Secret) -> Self {
        Self::new(Kind::Any { store_password }, DEFAULT_TRIES)
    }

    /// The PIN is the store's own password, the counter in memory only. For tests and benches.
    pub fn in_memory(tries: u8) -> Self {
        Self::new(Kind::Store(Place::Memory(Box::default())), tries)
    }

    /// The PIN is that of the token that `store` is, which may count the tries itself. As it does not tell how many are
    /// left, they are counted here, too, on disk under its name `token`, and what it does tell
    /// ([`KeyStore::tries_hint`]) may lower that.
    ///
    /// A right PIN gives all tries back; so does one that another program of the host gives, if the token tells: it
    /// must have told this object of wrong PINs ([`KeyStore::was_wrong`]), and do so no longer. That it says nothing
    /// proves nothing otherwise: many tokens never do, others forget it when they are put in anew.
    pub fn of_token(directory: &StateDirectory, token: &str, store: Arc<dyn KeyStore>, tries: u8) -> Self {
        let place = Place::Disk(Record::of_token(directory, token));
        Self { token: Some(store), ..Self::new(Kind::Store(place), tries) }
    }

    /// Gives a token all the tries back that are counted here, while it may be in use. Tells whether any were counted.
    ///
    /// # Errors
    /// State that is damaged or cannot be written.
    #[cfg(all(unix, feature = "nss", feature = "pem", feature = "pcsc"))]
    pub(crate) fn reset_token_tries(directory: &StateDirectory, token: &str) -> Result<bool, StateError> {
        reset(&Record::of_token(directory, token))
    }

    /// A card's own PIN and PUK as [`of_card`](Self::of_card) has them, in memory only; the store's password is
    /// what the PIN is at first. For tests and benches.
    ///
    /// # Errors
    /// [`StateError::CardPin`].
    pub fn in_memory_own(pin: &Secret, puk: Option<&Secret>, tries: u8) -> Result<Self, StateError> {
        check_card_pin(pin)?;
        puk.map_or(Ok(()), check_puk)?;
        let hash = |secret| PinHash::of(secret, Cost::Memory).map_err(StateError::Hash);
        let contents =
            Contents { pin: Some(hash(pin)?), puk: puk.map(hash).transpose()?, ..Contents::default() };
        let place = Place::Memory(Box::new(Mutex::new(contents)));
        Ok(Self::new(Kind::card(place, pin.clone()), tries))
    }

    fn new(kind: Kind, tries: u8) -> Self {
        Self { kind, tries: tries.clamp(1, 15), token: None, told: AtomicBool::new(false) }
    }

    /// Compares `pin`, and logs in to `store` if it is right. Blocks: on the disk, on the store, and on another
    /// VERIFY of the same reference data, for up to 5 seconds.
    ///
    /// # Errors
    /// [`PinError`]. A [`PinError::State`] after the comparison (the try could not be given back) leaves the try
    /// used and nobody logged in. A store that says its password is locked is [`PinError::Blocked`] with the try
    /// used, since it may have compared.
    pub fn verify(&self, pin: &Secret, store: &dyn KeyStore) -> Result<Box<dyn Unlocked>, PinError> {
        match &self.kind {
            Kind::Any { store_password } => {
                by_host(store.unlock(store_password)).map_err(PinError::NotChecked)
            }
            Kind::Store(_) if !store.needs_secret() => {
                // Such a store takes any PIN; a card over it must not, unless told to.
                Err(PinError::NotChecked("the database has no password to compare the PIN with".into()))
            }
            Kind::Store(place) => {
                let outcome = self.count(&mut *place.lock()?, PIN, |_| {
                    let outcome = store.unlock(pin);
                    if !matches!(outcome, Err(UnlockError::Unfit(_) | UnlockError::NotChecked(_))) {
                        let told = outcome.is_err() && self.was_wrong() == Some(true);
                        self.told.store(told, Ordering::SeqCst);
                    }
                    outcome.map_err(Failure::from)
                });
                outcome.map_err(|error| match error {
                    PinError::Wrong { left } => PinError::Wrong { left: self.lowered(left) },
                    error => error,
                })
            }
            Kind::Card { place, store_password, known } => self.count(&mut *place.lock()?, PIN, |contents| {
                compare_or_know(known, contents.pin.as_ref(), pin)?;
                by_host(store.unlock_held(store_password)).map_err(Failure::NotChecked)
            }),
        }
    }

    /// CHANGE REFERENCE DATA for the PIN: compares `old` as [`verify`](Self::verify) does, with the same counter, and
    /// if it is right makes `new` the card's own PIN. The login is that of a VERIFY.
    ///
    /// `new` is without padding. A card application that takes fewer PINs than [`check_card_pin`] does (PIV: six to
    /// eight digits, SP 800-73-4 Part 2 §2.4.3) refuses the others before it calls this.
    ///
    /// # Errors
    /// [`PinError`]; with [`PinError::NotSupported`] and [`PinError::Unfit`] nothing was compared.
    pub fn change(
        &self,
        old: &Secret,
        new: &Secret,
        store: &dyn KeyStore,
    ) -> Result<Box<dyn Unlocked>, PinError> {
        self.check_change(new)?;
        let Kind::Card { place, store_password, known } = &self.kind else {
            return Err(PinError::NotSupported);
        };
        self.count(&mut *place.lock()?, PIN, |contents| {
            compare_or_know(known, contents.pin.as_ref(), old)?;
            contents.pin = Some(PinHash::of(new, place.cost()).map_err(Failure::NotChecked)?);
            lock(known).take();
            by_host(store.unlock_held(store_password)).map_err(Failure::NotChecked)
        })
    }

    /// Whether [`change`](Self::change) to `new` would compare anything.
    pub(crate) fn check_change(&self, new: &Secret) -> Result<(), PinError> {
        match &self.kind {
            Kind::Card { .. } => Ok(check_card_pin(new)?),
            _ => Err(PinError::NotSupported),
        }
    }

    /// CHANGE REFERENCE DATA for the PUK: compares `old` with a counter of its own, and makes `new` the PUK.
    ///
    /// # Errors
    /// As [`change`](Self::change), about the PUK.
    pub fn change_puk(&self, old: &Secret, new: &Secret) -> Result<(), PinError> {
        let place = self.place_of_puk()?;
        check_puk(new)?;
        self.count(&mut *place.lock()?, PUK, |contents| {
            compare(contents.puk.as_ref(), old)?;
            contents.puk = Some(PinHash::of(new, place.cost()).map_err(Failure::NotChecked)?);
            Ok(())
        })
    }

    /// RESET RETRY COUNTER: compares `puk`, and if it is right makes `new` the PIN with all its tries. Nobody is
    /// logged in by that. What `new` may be is as for [`change`](Self::change).
    ///
    /// # Errors
    /// As [`change`](Self::change), about the PUK.
    pub fn unblock(&self, puk: &Secret, new: &Secret) -> Result<(), PinError> {
        let place = self.place_of_puk()?;
        check_card_pin(new)?;
        self.count(&mut *place.lock()?, PUK, |contents| {
            compare(contents.puk.as_ref(), puk)?;
            contents.pin = Some(PinHash::of(new, place.cost()).map_err(Failure::NotChecked)?);
            contents.left = None;
            self.forget();
            Ok(())
        })
    }

    /// Forgets what a right PIN left in memory, by which it is known again without the time that its hash on disk takes.
    pub(crate) fn forget(&self) {
        if let Kind::Card { known, .. } = &self.kind {
            lock(known).take();
        }
    }

    /// Whether there is something to [`forget`](Self::forget).
    pub(crate) fn remembers(&self) -> bool {
        matches!(&self.kind, Kind::Card { known, .. } if lock(known).is_some())
    }

    /// Logs in to `store` without a PIN, for keys that ask for none (SP 800-73-4 Part 1 §3.1.4, card authentication):
    /// possible where the store has no secret, or the host gave it.
    ///
    /// # Errors
    /// [`PinError::NotSupported`] where the store is behind the PIN itself; [`PinError::NotChecked`].
    pub fn without_pin(&self, store: &dyn KeyStore) -> Result<Box<dyn Unlocked>, PinError> {
        match &self.kind {
            Kind::Any { store_password } => by_host(store.unlock(store_password)),
            Kind::Card { store_password, .. } => by_host(store.unlock_held(store_password)),
            Kind::Store(_) if store.needs_secret() => return Err(PinError::NotSupported),
            Kind::Store(_) => by_host(store.unlock(&Secret::default())),
        }
        .map_err(PinError::NotChecked)
    }

    /// Tries that are left; blocked is 0. With [`any`](Self::any), always the default.
    ///
    /// # Errors
    /// [`PinError::State`] if the state is damaged or cannot be read.
    pub fn tries_left(&self) -> Result<u8, PinError> {
        match &self.kind {
            Kind::Any { .. } => Ok(self.tries),
            Kind::Store(place) | Kind::Card { place, .. } => {
                Ok(self.lowered(self.left(self.caught_up(place.read()?).left)))
            }
        }
    }

    /// No more than the token says there are.
    fn lowered(&self, left: u8) -> u8 {
        self.token.as_ref().and_then(|token| token.tries_hint()).map_or(left, |hint| hint.min(left))
    }

    fn was_wrong(&self) -> Option<bool> {
        self.token.as_ref().and_then(|token| token.was_wrong())
    }

    /// With what another program of the host made of the token's tries.
    fn caught_up(&self, contents: Contents) -> Contents {
        match self.was_wrong() {
            Some(false) if self.told.load(Ordering::SeqCst) => Contents { left: None, ..contents },
            was_wrong => {
                if was_wrong == Some(true) {
                    self.told.store(true, Ordering::SeqCst);
                }
                contents
            }
        }
    }

    /// Tries of the PUK that are left; blocked is 0.
    ///
    /// # Errors
    /// [`PinError::NotSupported`] without a PUK; [`PinError::State`] as for [`tries_left`](Self::tries_left).
    pub fn puk_tries_left(&self) -> Result<u8, PinError> {
        Ok(self.left(self.place_of_puk()?.read()?.puk_left))
    }

    /// Gives all tries of PIN and PUK back, for every process on this reference data. Tells whether there was any
    /// state: a PIN that was never tried has none.
    ///
    /// # Errors
    /// State that is damaged (nothing is repaired), missing for a card with a PIN of its own, or not writable.
    pub fn reset_tries(&self) -> Result<bool, StateError> {
        match &self.kind {
            Kind::Any { .. } => Ok(false),
            Kind::Store(Place::Memory(contents)) | Kind::Card { place: Place::Memory(contents), .. } => {
                let mut contents = lock(contents);
                let (pin, puk) = (contents.left.take(), contents.puk_left.take());
                Ok(pin.or(puk).is_some())
            }
            Kind::Store(Place::Disk(record)) | Kind::Card { place: Place::Disk(record), .. } => {
                record.read_existing()?;
                reset(record)
            }
        }
    }

    /// Where a PUK is; it never goes away again, so a look without the lock is enough.
    fn place_of_puk(&self) -> Result<&Place, PinError> {
        match &self.kind {
            Kind::Card { place, .. } if place.read()?.puk.is_some() => Ok(place),
            _ => Err(PinError::NotSupported),
        }
    }

    /// Another opener may grant more; what it left counts here only up to what is granted here.
    fn left(&self, counter: Option<u8>) -> u8 {
        counter.unwrap_or(self.tries).min(self.tries)
    }

    /// Does `compare` with a try of `counter` used, and gives it back after success, with all that `compare`
    /// changed.
    fn count<T>(
        &self,
        slot: &mut dyn Slot,
        counter: Counter,
        compare: impl FnOnce(&mut Contents) -> Result<T, Failure>,
    ) -> Result<T, PinError> {
        let before = slot.read()?;
        let mut now = self.caught_up(before.clone());
        let left = self.left(*counter(&mut now)).checked_sub(1).ok_or(PinError::Blocked)?;
        *counter(&mut now) = Some(left);
        if let Err(error) = slot.write_counters(&now, true) {
            // It may be there all the same, and nothing was compared for it: a disk that fails each time is not to
            // block a PIN that nobody guessed at.
            let _ = slot.write_counters(&before, false);
            return Err(error.into());
        }
        match compare(&mut now) {
            Ok(done) => {
                *counter(&mut now) = None;
                // If this fails, `done` is dropped (a login, logged out), and the try stays used. A try that is given
                // back may get lost in a power cut; a new PIN or PUK may not.
                if (&now.pin, &now.puk) == (&before.pin, &before.puk) {
                    slot.write_counters(&now, false)?;
                } else {
                    slot.write(&now)?;
                }
                Ok(done)
            }
            Err(Failure::Wrong) => Err(PinError::Wrong { left }),
            Err(Failure::Locked) => Err(PinError::Blocked),
            Err(Failure::Unclear(cause)) => Err(PinError::NotChecked(cause)),
            Err(Failure::NotChecked(cause)) => {
                slot.write_counters(&before, false)?;
                Err(PinError::NotChecked(cause))
            }
            Err(Failure::Unfit(cause)) => {
                slot.write_counters(&before, false)?;
                Err(PinError::Impossible(cause))
            }
        }
    }
}

/// Which counter of a state is meant.
type Counter = fn(&mut Contents) -> &mut Option<u8>;

const PIN: Counter = |contents| &mut contents.left;
const PUK: Counter = |contents| &mut contents.puk_left;

fn compare(hash: Option<&PinHash>, secret: &Secret) -> Result<(), Failure> {
    match hash.map(|hash| hash.matches(secret)) {
        Some(Ok(true)) => Ok(()),
        Some(Ok(false)) => Err(Failure::Wrong),
        Some(Err(cause)) => Err(Failure::NotChecked(cause)),
        None => Err(Failure::NotChecked("the card has no PIN".into())),
    }
}

/// As [`compare`], unless the PIN has been right before and is known again: a wrong one is then told as quickly as a right
/// one.
fn compare_or_know(
    known: &Mutex<Option<Box<Known>>>,
    hash: Option<&PinHash>,
    pin: &Secret,
) -> Result<(), Failure> {
    let mut known = lock(known);
    match hash.and_then(|hash| known.as_ref()?.is(hash, pin)) {
        Some(true) => return Ok(()),
        Some(false) => return Err(Failure::Wrong),
        None => *known = None,
    }
    compare(hash, pin)?;
    *known = hash.and_then(|hash| Known::new(hash, pin)).map(Box::new);
    Ok(())
}

impl Kind {
    fn card(place: Place, store_password: Secret) -> Self {
        Self::Card { place, store_password, known: Mutex::default() }
    }
}

impl Place {
    fn read(&self) -> Result<Contents, StateError> {
        match self {
            Self::Disk(record) => record.read_existing(),
            Self::Memory(contents) => Ok(lock(contents).clone()),
        }
    }

    fn lock(&self) -> Result<Box<dyn Slot + '_>, StateError> {
        Ok(match self {
            Self::Disk(record) => Box::new(record.lock()?),
            Self::Memory(contents) => Box::new(lock(contents)),
        })
    }

    fn cost(&self) -> Cost {
        match self {
            Self::Disk(_) => Cost::Disk,
            Self::Memory(_) => Cost::Memory,
        }
    }
}

/// The hash of a `given` PIN or PUK that is the card's first.
fn first(
    kept: Option<&PinHash>,
    given: Option<&Secret>,
    check: fn(&Secret) -> Result<(), CardPinError>,
) -> Result<Option<PinHash>, StateError> {
    let Some(secret) = given.filter(|_| kept.is_none()) else { return Ok(None) };
    check(secret)?;
    PinHash::of(secret, Cost::Disk).map(Some).map_err(StateError::Hash)
}

fn outcome(given: Option<&Secret>, made: Option<&PinHash>) -> Initial {
    match (given, made) {
        (None, _) => Initial::NotGiven,
        (Some(_), None) => Initial::Ignored,
        (Some(_), Some(_)) => Initial::Created,
    }
}

/// Checks that `pin` can be a card's own: 4 to 8 bytes, none of them 00 or FF.
///
/// # Errors
/// [`CardPinError`].
pub fn check_card_pin(pin: &Secret) -> Result<(), CardPinError> {
    if !(4..=8).contains(&pin.len()) {
        Err(CardPinError::Length)
    } else if pin.expose().iter().any(|byte| matches!(byte, 0x00 | 0xff)) {
        Err(CardPinError::Byte)
    } else {
        Ok(())
    }
}

/// Checks that `pin` can be that of a PIV card: 6 to 8 digits (SP 800-73-4 Part 2 §2.4.3).
///
/// # Errors
/// [`CardPinError::Piv`].
pub fn check_piv_pin(pin: &Secret) -> Result<(), CardPinError> {
    let is_one = (6..=8).contains(&pin.len()) && pin.expose().iter().all(u8::is_ascii_digit);
    if is_one { Ok(()) } else { Err(CardPinError::Piv) }
}

/// Checks that `puk` can be a card's: exactly 8 bytes (SP 800-73-4 Part 2 §2.4.3), any but eight times the padding.
///
/// # Errors
/// [`CardPinError::Puk`].
pub fn check_puk(puk: &Secret) -> Result<(), CardPinError> {
    if puk.len() == 8 && puk.expose() != [0xff; 8] { Ok(()) } else { Err(CardPinError::Puk) }
}

/// Where contents are read and written while nobody else can.
trait Slot {
    fn read(&mut self) -> Result<Contents, StateError>;
    /// As a whole, to survive a power cut.
    fn write(&mut self, contents: &Contents) -> Result<(), StateError>;
    /// With other counters than were read. If not `flushed`, a power cut may leave those that were written before.
    fn write_counters(&mut self, contents: &Contents, flushed: bool) -> Result<(), StateError>;
}

impl Slot for LockedRecord<'_> {
    fn read(&mut self) -> Result<Contents, StateError> {
        self.read_existing()
    }

    fn write(&mut self, contents: &Contents) -> Result<(), StateError> {
        LockedRecord::write(self, contents)
    }

    fn write_counters(&mut self, contents: &Contents, flushed: bool) -> Result<(), StateError> {
        LockedRecord::write_counters(self, contents, flushed)
    }
}

impl Slot for MutexGuard<'_, Contents> {
    fn read(&mut self) -> Result<Contents, StateError> {
        Ok((**self).clone())
    }

    fn write(&mut self, contents: &Contents) -> Result<(), StateError> {
        contents.clone_into(self);
        Ok(())
    }

    fn write_counters(&mut self, contents: &Contents, _: bool) -> Result<(), StateError> {
        self.write(contents)
    }
}

enum Failure {
    Wrong,
    Locked,
    Unfit(String),
    NotChecked(String),
    Unclear(String),
}

impl From<UnlockError> for Failure {
    fn from(error: UnlockError) -> Self {
        match error {
            UnlockError::Wrong => Self::Wrong,
            UnlockError::Locked => Self::Locked,
            UnlockError::Unfit(cause) => Self::Unfit(cause),
            UnlockError::NotChecked(cause) => Self::NotChecked(cause),
            UnlockError::Unclear(cause) => Self::Unclear(cause),
        }
    }
}

/// A password of the host's that is refused says nothing about the guest's PIN.
fn by_host(unlocked: Result<Box<dyn Unlocked>, UnlockError>) -> Result<Box<dyn Unlocked>, String> {
    unlocked.map_err(|error| match error {
        UnlockError::NotChecked(cause) | UnlockError::Unclear(cause) => cause,
        refused => format!("the key store refused the host's password: {refused}"),
    })
}

fn reset(record: &Record) -> Result<bool, StateError> {
    let mut locked = record.lock()?;
    match locked.read()? {
        Some(contents) if record.has_counter(&contents) => {
            locked.write(&Contents { left: None, puk_left: None, ..contents }).map(|()| true)
        }
        _ => Ok(false),
    }
}

/// A panic in the store leaves the try used, which is what the counter says already.
fn lock<T>(contents: &Mutex<T>) -> MutexGuard<'_, T> {
    contents.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reference_data_can_be_shared_and_shows_no_secret() {
        fn shared<T: Send + Sync>() {}
        shared::<ReferenceData>();
        let shown = format!("{:?}", ReferenceData::any(Secret::from(&b"hunter2"[..])));
        assert!(!shown.contains("hunter2"), "{shown}");
    }

    /// A state that is written, and said not to be.
    struct Failing(Contents);

    impl Slot for Failing {
        fn read(&mut self) -> Result<Contents, StateError> {
            Ok(self.0.clone())
        }

        fn write(&mut self, contents: &Contents) -> Result<(), StateError> {
            self.0 = contents.clone();
            Err(StateError::NoPlace)
        }

        fn write_counters(&mut self, contents: &Contents, _: bool) -> Result<(), StateError> {
            self.write(contents)
        }
    }

    #[test]
    fn a_disk_that_fails_does_not_block_a_pin_that_was_not_compared() {
        let data = ReferenceData::in_memory(3);
        let mut slot = Failing(Contents { left: Some(2), ..Contents::default() });
        for _ in 0..4 {
            let refused = data.count(&mut slot, PIN, |_| -> Result<(), _> { panic!("compared") });
            assert!(matches!(refused, Err(PinError::State(_))), "{refused:?}");
            assert_eq!(slot.0.left, Some(2));
        }
    }
}
