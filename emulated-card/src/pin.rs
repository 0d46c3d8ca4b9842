//! Reference data: what a PIN is compared with, and how many tries are left.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use argon2::password_hash::{Output, ParamsString, PasswordHash, SaltString};
use argon2::{ARGON2ID_IDENT, Algorithm, Argon2, Block, Params, Version};
use rustix::fs::{Mode, OFlags};
use thiserror::Error;
use vscard_protocol::Secret;
use zeroize::Zeroizing;

use crate::keys::{KeyStore, UnlockError, Unlocked};
use crate::state::{CardClaim, CardId, Contents, LockedRecord, Record, StateDirectory, StateError};

/// How many wrong PINs in a row block a card, unless said otherwise. What can be said is 1 to 15, as the status
/// word `63CX` counts (ISO/IEC 7816-4 §5.1.3); a number outside is taken as the nearest.
pub const DEFAULT_TRIES: u8 = 3;

/// Longest `--pin-file` or `--password-file`.
const MAX_SECRET_FILE: usize = 1024;

/// Why VERIFY did not succeed.
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
    /// The PIN could not be compared (the key store failed); no try was used.
    #[error("{0}")]
    NotChecked(String),
    /// This reference data cannot be changed or has no PUK: the PIN is the store's own password, or any.
    #[error("this PIN cannot be changed from the card")]
    NotSupported,
    /// A new PIN or PUK that a card cannot have; no try was used.
    #[error(transparent)]
    Unfit(#[from] CardPinError),
}

/// Why a PIN cannot be a card's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum CardPinError {
    /// Not 4 to 8 bytes.
    #[error("a card's own PIN has 4 to 8 bytes")]
    Length,
    /// A byte that pads a PIN, or ends a string: no guest can type it.
    #[error("a card's own PIN contains no byte 00 or FF")]
    Byte,
}

/// What became of the first PIN given to [`ReferenceData::of_card`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InitialPin {
    /// The card was new, and this is its PIN now.
    Created,
    /// The card has a PIN already, so the given one was ignored: the caller says so.
    Ignored,
    /// The card has a PIN already, and none was given.
    NotGiven,
}

/// What a card compares a PIN with, and the counter of tries that goes with it.
///
/// The try is used before the PIN is compared and given back after it proved right, all under a lock and each step
/// on disk before the next: a process killed at any moment, or two that guess at once, gain no try.
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
}

#[derive(Debug)]
enum Kind {
    Database(Record),
    Card { record: Record, store_password: Secret },
    Any { store_password: Secret },
    Memory(Mutex<Contents>),
    Token { contents: Mutex<Contents>, store: Arc<dyn KeyStore> },
}

impl ReferenceData {
    /// The PIN is the store's own password. One counter per database, shared by every card and process on it.
    ///
    /// `database` is the canonical path. A damaged state is no error here; it refuses each VERIFY.
    pub fn of_database(directory: &StateDirectory, database: &Path, tries: u8) -> Self {
        Self::new(Kind::Database(Record::of_database(directory, database)), tries)
    }

    /// The PIN is the card's own, a hash in the card's state, made from `initial` if there is none yet. The store
    /// is unlocked with `store_password`, which the host gave (empty for a store without one).
    ///
    /// The counter is the card's own, too.
    ///
    /// # Errors
    /// [`StateError::NoPin`] if there is neither state nor `initial`, [`StateError::CardPin`] if `initial` is
    /// needed and unfit, or state that is damaged or cannot be made.
    pub fn of_card(
        directory: &StateDirectory,
        claim: &CardClaim,
        initial: Option<&Secret>,
        store_password: Secret,
        tries: u8,
    ) -> Result<(Self, InitialPin), StateError> {
        let record = Record::of_card(directory, claim.database(), claim.id());
        // Nobody else makes this card's state while the claim is held.
        let outcome = match (record.read()?, initial) {
            (Some(_), Some(_)) => InitialPin::Ignored,
            (Some(_), None) => InitialPin::NotGiven,
            (None, None) => return Err(StateError::NoPin { database: claim.database().to_owned() }),
            (None, Some(pin)) => {
                check_card_pin(pin)?;
                record.lock()?.write(&Contents { left: None, pin: Some(PinHash::of(pin)?) })?;
                InitialPin::Created
            }
        };
        Ok((Self::new(Kind::Card { record, store_password }, tries), outcome))
    }

    /// Whether the card has a PIN of its own already.
    ///
    /// # Errors
    /// State that is damaged or cannot be read.
    pub fn card_has_pin(directory: &StateDirectory, claim: &CardClaim) -> Result<bool, StateError> {
        Ok(Record::of_card(directory, claim.database(), claim.id()).read()?.is_some())
    }

    /// Gives a card with a PIN of its own all its tries back, without a claim: some process may have it open.
    /// Tells whether there was a PIN.
    ///
    /// # Errors
    /// State that is damaged or cannot be written.
    pub fn reset_card_tries(
        directory: &StateDirectory,
        database: &Path,
        id: &CardId,
    ) -> Result<bool, StateError> {
        reset(&Record::of_card(directory, database, id))
    }

    /// Any PIN is right, and nothing is counted. The store is unlocked with `store_password`.
    pub fn any(store_password: Secret) -> Self {
        Self::new(Kind::Any { store_password }, DEFAULT_TRIES)
    }

    /// The PIN is the store's own password, the counter in memory only. For tests and benches.
    pub fn in_memory(tries: u8) -> Self {
        Self::new(Kind::Memory(Mutex::default()), tries)
    }

    /// The PIN is that of the token that `store` is, which counts the tries itself. As it does not tell how many are
    /// left, they are counted in memory, too, and what it does tell ([`KeyStore::tries_hint`]) may lower that.
    pub fn of_token(store: Arc<dyn KeyStore>, tries: u8) -> Self {
        Self::new(Kind::Token { contents: Mutex::default(), store }, tries)
    }

    fn new(kind: Kind, tries: u8) -> Self {
        Self { kind, tries: tries.clamp(1, 15) }
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
                unlock_by_host(store, store_password).map_err(PinError::NotChecked)
            }
            Kind::Memory(contents) => {
                self.count(&mut lock(contents), |_| store.unlock(pin).map_err(Failure::from))
            }
            Kind::Database(_) | Kind::Token { .. } if !store.needs_secret() => {
                // Such a store takes any PIN; a card over it must not, unless told to.
                Err(PinError::NotChecked("the key store has no password to compare the PIN with".into()))
            }
            Kind::Token { contents, store } => {
                let outcome = self.count(&mut lock(contents), |_| store.unlock(pin).map_err(Failure::from));
                outcome.map_err(|error| match error {
                    PinError::Wrong { left } => {
                        PinError::Wrong { left: store.tries_hint().map_or(left, |hint| hint.min(left)) }
                    }
                    error => error,
                })
            }
            Kind::Database(record) => {
                self.count(&mut record.lock()?, |_| store.unlock(pin).map_err(Failure::from))
            }
            Kind::Card { record, store_password } => {
                self.count(&mut record.lock()?, |contents| {
                    match contents.pin.as_ref().map(|hash| hash.matches(pin)) {
                        Some(Ok(true)) => unlock_by_host(store, store_password).map_err(Failure::NotChecked),
                        Some(Ok(false)) => Err(Failure::Wrong),
                        Some(Err(cause)) => Err(Failure::NotChecked(cause)),
                        None => Err(Failure::NotChecked("the card has no PIN".into())),
                    }
                })
            }
        }
    }

    /// CHANGE REFERENCE DATA for the PIN: compares `old` as [`verify`](Self::verify) does, with the same counter, and
    /// if it is right makes `new` the card's own PIN. The login is that of a VERIFY.
    ///
    /// # Errors
    /// [`PinError`]; with [`PinError::NotSupported`] and [`PinError::Unfit`] nothing was compared.
    pub fn change(
        &self,
        old: &Secret,
        new: &Secret,
        store: &dyn KeyStore,
    ) -> Result<Box<dyn Unlocked>, PinError> {
        let _ = (old, new, store);
        Err(PinError::NotSupported)
    }

    /// CHANGE REFERENCE DATA for the PUK: compares `old` with a counter of its own, and makes `new` the PUK.
    ///
    /// # Errors
    /// As [`change`](Self::change), about the PUK.
    pub fn change_puk(&self, old: &Secret, new: &Secret) -> Result<(), PinError> {
        let _ = (old, new);
        Err(PinError::NotSupported)
    }

    /// RESET RETRY COUNTER: compares `puk`, and if it is right makes `new` the PIN with all its tries. Nobody is
    /// logged in by that.
    ///
    /// # Errors
    /// As [`change`](Self::change), about the PUK.
    pub fn unblock(&self, puk: &Secret, new: &Secret) -> Result<(), PinError> {
        let _ = (puk, new);
        Err(PinError::NotSupported)
    }

    /// Logs in to `store` without a PIN, for keys that ask for none (SP 800-73-4 Part 1 §3.1.4, card authentication):
    /// possible where the store has no secret, or the host gave it.
    ///
    /// # Errors
    /// [`PinError::NotSupported`] where the store is behind the PIN itself; [`PinError::NotChecked`].
    pub fn without_pin(&self, store: &dyn KeyStore) -> Result<Box<dyn Unlocked>, PinError> {
        match &self.kind {
            Kind::Any { store_password } | Kind::Card { store_password, .. } => {
                unlock_by_host(store, store_password).map_err(PinError::NotChecked)
            }
            _ if store.needs_secret() => Err(PinError::NotSupported),
            _ => unlock_by_host(store, &Secret::default()).map_err(PinError::NotChecked),
        }
    }

    /// Tries that are left; blocked is 0. With [`any`](Self::any), always the default.
    ///
    /// # Errors
    /// [`PinError::State`] if the state is damaged or cannot be read.
    pub fn tries_left(&self) -> Result<u8, PinError> {
        let contents = match &self.kind {
            Kind::Any { .. } => Contents::default(),
            Kind::Memory(contents) => lock(contents).clone(),
            Kind::Token { contents, store } => {
                let left = self.left(&lock(contents));
                return Ok(store.tries_hint().map_or(left, |hint| hint.min(left)));
            }
            Kind::Database(record) | Kind::Card { record, .. } => record.read_existing()?,
        };
        Ok(self.left(&contents))
    }

    /// Gives all tries back, for every process on this reference data. Tells whether there was any state: a PIN
    /// that was never tried has none.
    ///
    /// # Errors
    /// State that is damaged (nothing is repaired), missing for a card with a PIN of its own, or not writable.
    pub fn reset_tries(&self) -> Result<bool, StateError> {
        match &self.kind {
            Kind::Any { .. } => Ok(false),
            Kind::Memory(contents) | Kind::Token { contents, .. } => Ok(lock(contents).left.take().is_some()),
            Kind::Database(record) | Kind::Card { record, .. } => {
                record.read_existing()?;
                reset(record)
            }
        }
    }

    /// Another opener may grant more; what it left counts here only up to what is granted here.
    fn left(&self, contents: &Contents) -> u8 {
        contents.left.unwrap_or(self.tries).min(self.tries)
    }

    fn count(
        &self,
        slot: &mut dyn Slot,
        compare: impl FnOnce(&Contents) -> Result<Box<dyn Unlocked>, Failure>,
    ) -> Result<Box<dyn Unlocked>, PinError> {
        let before = slot.read()?;
        let left = self.left(&before).checked_sub(1).ok_or(PinError::Blocked)?;
        slot.write(&Contents { left: Some(left), ..before.clone() })?;
        match compare(&before) {
            Ok(login) => {
                // If this fails, `login` is dropped, and the try stays used.
                slot.write(&Contents { left: None, ..before })?;
                Ok(login)
            }
            Err(Failure::Wrong) => Err(PinError::Wrong { left }),
            Err(Failure::Locked) => Err(PinError::Blocked),
            Err(Failure::NotChecked(cause)) => {
                slot.write(&before)?;
                Err(PinError::NotChecked(cause))
            }
        }
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

/// Why a file with a PIN or password was not taken.
#[derive(Debug, Error)]
pub enum SecretFileError {
    /// The system refused.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A directory, a FIFO, a device.
    #[error("{} is not a regular file", path.display())]
    NotRegular {
        /// The file.
        path: PathBuf,
    },
    /// Group or world may read or write it.
    #[error("{0} is open to others (mode {mode:03o}); make it yours alone with: chmod 600 {0}", path.display())]
    OpenToOthers {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Another user, who could change it, owns it.
    #[error("{} belongs to user id {owner}, not to you or root", path.display())]
    OfAnother {
        /// The file.
        path: PathBuf,
        /// Its owner.
        owner: u32,
    },
    /// What is in it is not one secret.
    #[error("{} {what}", path.display())]
    Contents {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
}

/// Reads a PIN or password from a file that is its owner's alone: one line of up to 1 KiB, its end stripped.
///
/// # Errors
/// [`SecretFileError`].
pub fn read_secret_file(path: &Path) -> Result<Secret, SecretFileError> {
    let io_error = |source| SecretFileError::Io { path: path.to_owned(), source };
    // Without NONBLOCK, a FIFO would hang the open. What is checked is what was opened.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = rustix::fs::open(path, flags, Mode::empty()).map(File::from);
    let mut file = file.map_err(|errno| io_error(errno.into()))?;
    let metadata = file.metadata().map_err(io_error)?;
    if !metadata.is_file() {
        return Err(SecretFileError::NotRegular { path: path.to_owned() });
    }
    let owner = metadata.uid();
    if owner != 0 && owner != rustix::process::geteuid().as_raw() {
        return Err(SecretFileError::OfAnother { path: path.to_owned(), owner });
    }
    if metadata.mode() & 0o077 != 0 {
        return Err(SecretFileError::OpenToOthers { path: path.to_owned(), mode: metadata.mode() & 0o777 });
    }
    // All the room at once: a Vec that grows leaves copies behind.
    let mut bytes = Zeroizing::new(vec![0; MAX_SECRET_FILE + 1]);
    let mut filled = 0;
    while filled < bytes.len() {
        match file.read(&mut bytes[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(io_error(error)),
        }
    }
    let refused = |what| Err(SecretFileError::Contents { path: path.to_owned(), what });
    if filled > MAX_SECRET_FILE {
        return refused("is longer than 1 KiB");
    }
    let line = &bytes[..filled];
    let line = line.strip_suffix(b"\n").map_or(line, |line| line.strip_suffix(b"\r").unwrap_or(line));
    if line.is_empty() {
        refused("is empty")
    } else if line.contains(&0) {
        refused("contains a NUL byte")
    } else if line.iter().any(|byte| matches!(byte, b'\n' | b'\r')) {
        refused("has more than one line")
    } else {
        Ok(Secret::from(line))
    }
}

/// Where contents are read and written while nobody else can.
trait Slot {
    fn read(&self) -> Result<Contents, StateError>;
    fn write(&mut self, contents: &Contents) -> Result<(), StateError>;
}

impl Slot for LockedRecord<'_> {
    fn read(&self) -> Result<Contents, StateError> {
        self.read_existing()
    }

    fn write(&mut self, contents: &Contents) -> Result<(), StateError> {
        LockedRecord::write(self, contents)
    }
}

impl Slot for MutexGuard<'_, Contents> {
    fn read(&self) -> Result<Contents, StateError> {
        Ok((**self).clone())
    }

    fn write(&mut self, contents: &Contents) -> Result<(), StateError> {
        contents.clone_into(self);
        Ok(())
    }
}

enum Failure {
    Wrong,
    Locked,
    NotChecked(String),
}

impl From<UnlockError> for Failure {
    fn from(error: UnlockError) -> Self {
        match error {
            UnlockError::Wrong => Self::Wrong,
            UnlockError::Locked => Self::Locked,
            UnlockError::NotChecked(cause) => Self::NotChecked(cause),
        }
    }
}

/// A password of the host's that is refused says nothing about the guest's PIN.
fn unlock_by_host(store: &dyn KeyStore, password: &Secret) -> Result<Box<dyn Unlocked>, String> {
    store.unlock(password).map_err(|error| match error {
        UnlockError::NotChecked(cause) => cause,
        refused => format!("the key store refused the host's password: {refused}"),
    })
}

fn reset(record: &Record) -> Result<bool, StateError> {
    let locked = record.lock()?;
    match locked.read()? {
        Some(contents) => locked.write(&Contents { left: None, ..contents }).map(|()| true),
        None => Ok(false),
    }
}

/// A panic in the store leaves the try used, which is what the counter says already.
fn lock(contents: &Mutex<Contents>) -> MutexGuard<'_, Contents> {
    contents.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A PIN as it is kept: argon2id, in the PHC string format.
#[derive(Clone)]
pub(crate) struct PinHash {
    params: Params,
    salt: SaltString,
    hash: Output,
}

impl PinHash {
    fn of(pin: &Secret) -> Result<Self, StateError> {
        let fail = |cause: &dyn fmt::Display| StateError::Hash(cause.to_string());
        let mut random = [0; 16];
        getrandom::fill(&mut random).map_err(|error| fail(&error))?;
        let salt = SaltString::encode_b64(&random).map_err(|error| fail(&error))?;
        let params = Params::default();
        let hash = derive(&params, &salt, pin, Params::DEFAULT_OUTPUT_LEN).map_err(|error| fail(&error))?;
        let hash = Output::new(hash.expose()).map_err(|error| fail(&error))?;
        Ok(Self { params, salt, hash })
    }

    pub(crate) fn parse(text: &str) -> Option<Self> {
        let parsed = PasswordHash::new(text).ok()?;
        let params = Params::try_from(&parsed).ok()?;
        // A later version may choose more; a file is not to make this process take any amount of memory or time.
        let bearable = params.m_cost() <= 256 * 1024 && params.t_cost() <= 64 && params.p_cost() <= 16;
        if parsed.algorithm != ARGON2ID_IDENT || parsed.version != Some(Version::V0x13.into()) || !bearable {
            return None;
        }
        let salt = SaltString::from_b64(parsed.salt?.as_str()).ok()?;
        Some(Self { params, salt, hash: parsed.hash? })
    }

    fn matches(&self, pin: &Secret) -> Result<bool, String> {
        Ok(derive(&self.params, &self.salt, pin, self.hash.len())?.equals(self.hash.as_bytes()))
    }
}

impl fmt::Display for PinHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        PasswordHash {
            algorithm: ARGON2ID_IDENT,
            version: Some(Version::V0x13.into()),
            params: ParamsString::try_from(&self.params).map_err(|_| fmt::Error)?,
            salt: Some(self.salt.as_salt()),
            hash: Some(self.hash),
        }
        .fmt(f)
    }
}

impl fmt::Debug for PinHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Eight digits behind it are soon found, so the hash is a secret, too.
        f.write_str("PinHash")
    }
}

fn derive(params: &Params, salt: &SaltString, pin: &Secret, length: usize) -> Result<Secret, String> {
    let mut buffer = [0; 64];
    let salt = salt.decode_b64(&mut buffer).map_err(|error| error.to_string())?;
    // The crate's own buffer would not be wiped.
    let mut memory = Zeroizing::new(vec![Block::default(); params.block_count()]);
    let mut output = Zeroizing::new(vec![0; length]);
    Argon2::new(Algorithm::Argon2id, Version::V0x13, params.clone())
        .hash_password_into_with_memory(pin.expose(), salt, &mut output, memory.as_mut_slice())
        .map_err(|error| error.to_string())?;
    Ok(Secret::new(std::mem::take(&mut *output)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_is_salted_and_survives_text() {
        let pin = Secret::from(&b"1234"[..]);
        let hash = PinHash::of(&pin).unwrap();
        let text = hash.to_string();
        assert!(text.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"), "{text}");
        assert_ne!(text, PinHash::of(&pin).unwrap().to_string());
        let parsed = PinHash::parse(&text).unwrap();
        assert_eq!(parsed.to_string(), text);
        assert!(parsed.matches(&pin).unwrap());
        assert!(!parsed.matches(&Secret::from(&b"1235"[..])).unwrap());
        assert!(!parsed.matches(&Secret::default()).unwrap());
        assert_eq!(format!("{hash:?}"), "PinHash");
    }

    /// From the tests of the reference implementation.
    #[test]
    fn hashes_of_others_are_understood() {
        let text = "$argon2id$v=19$m=256,t=2,p=1$c29tZXNhbHQ$nf65EOgLrQMR/uIPnA4rEsF5h7TKyQwu9U1bMCHGi/4";
        let hash = PinHash::parse(text).unwrap();
        assert!(hash.matches(&Secret::from(&b"password"[..])).unwrap());
    }

    #[test]
    fn hashes_that_would_take_too_much_are_not() {
        let good = "$argon2id$v=19$m=19456,t=2,p=1$c2FsdHNhbHQ$aGFzaGhhc2hoYXNoaGFzaA";
        assert!(PinHash::parse(good).is_some());
        for (part, worse) in [
            ("m=19456", "m=4194304"),
            ("t=2", "t=1000000"),
            ("p=1", "p=1000"),
            ("argon2id", "argon2d"),
            ("v=19", "v=16"),
            ("$aGFzaGhhc2hoYXNoaGFzaA", ""),
        ] {
            assert!(PinHash::parse(&good.replace(part, worse)).is_none(), "{worse}");
        }
    }

    #[test]
    fn reference_data_can_be_shared_and_shows_no_secret() {
        fn shared<T: Send + Sync>() {}
        shared::<ReferenceData>();
        let shown = format!("{:?}", ReferenceData::any(Secret::from(&b"hunter2"[..])));
        assert!(!shown.contains("hunter2"), "{shown}");
    }
}
