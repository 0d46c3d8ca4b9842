//! Logins to a slot, and what can be done while one lasts.

use std::ffi::CStr;
use std::fs;
use std::ops::RangeInclusive;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vscard_protocol::{LogBudget, Secret};
use zeroize::Zeroizing;

use super::super::certificate::PublicKey;
use super::super::{KeyError, UnlockError, Unlocked};
use super::ffi::{Attribute, Login, Mechanism, NssError, PrivateKey, Slot, Window};
use super::{point, rsa};

/// softoken refuses longer passwords without a look.
const MAX_PASSWORD: usize = 500;

/// What a password is compared with by NSS, which takes it as a C string.
pub(super) fn check_password(slot: &Slot, place: &Place, secret: &Secret) -> Result<(), UnlockError> {
    let unfit = |reason: &str| Err(UnlockError::Unfit(reason.to_owned()));
    if secret.len() > MAX_PASSWORD {
        return unfit("longer than 500 bytes");
    }
    let mut password = Zeroizing::new(Vec::with_capacity(secret.len() + 1));
    password.extend_from_slice(secret.expose());
    password.push(0);
    // With a zero inside, only what stands before it would be compared.
    let Ok(password) = CStr::from_bytes_with_nul(&password) else {
        return unfit("it holds a zero byte");
    };
    match slot.log_in(password) {
        Login::Accepted => Ok(()),
        Login::Wrong => Err(UnlockError::Wrong),
        Login::NotChecked(NssError::LOCKED_PASSWORD) => Err(UnlockError::Locked),
        // A token may have counted before it failed: pulled out in the middle, for instance. NSS compares the password
        // of a database itself.
        Login::NotChecked(error) => match place {
            Place::Database { .. } => Err(UnlockError::NotChecked(error.to_string())),
            Place::Token { .. } => Err(UnlockError::Unclear(error.to_string())),
        },
    }
}

/// How the private key of a certificate is found after login, and known to be the right one.
pub(super) struct WantedKey {
    /// What errors call it.
    pub(super) name: String,
    /// Its CKA_ID.
    pub(super) id: Vec<u8>,
    pub(super) public: PublicKey,
}

/// What a store and its logins share.
pub(super) struct Keys {
    pub(super) wanted: Vec<WantedKey>,
    pub(super) slot: Arc<Slot>,
    pub(super) place: Place,
    /// Held through every login, logout and operation: a login logs out first, which would make an operation
    /// that runs beside it fail.
    current: Mutex<Current>,
}

/// Where the keys are.
pub(super) enum Place {
    /// In a database: they may be copied to memory, all that are wanted must be there.
    Database {
        /// The file that they are in.
        file: PathBuf,
    },
    /// On the token of that insertion, which they do not leave.
    Token {
        /// [`Slot::series`] of the insertion.
        series: i32,
        /// What the token said of itself then.
        needs_login: bool,
        /// How long its PIN can be.
        pin_lengths: RangeInclusive<usize>,
        /// For keys that want the PIN each time.
        window: Window,
    },
}

/// A guest verifies the PIN, and a token comes and goes, as fast as it likes.
static LINES: LogBudget<&str> = LogBudget::new();

/// The login that counts now.
#[derive(Default)]
struct Current {
    /// How many logins have been started. An [`NssLogin`] with another number is over.
    generation: u64,
    /// In the order of [`Keys::wanted`]; empty when logged out. A key that a token does not have is `None`.
    keys: Vec<Option<LoginKey>>,
    /// The password, if it is one that outlives the login, as do copies of keys: NSS then remains logged in by it.
    held: Option<Secret>,
    /// Those copies, in the same order, while nobody is logged in.
    copies: Vec<Option<PrivateKey>>,
    /// Of which file of keys they are, and the next ones.
    file: Option<FileState>,
    /// Whether each key was compared with its certificate, which takes as long as an operation.
    compared: Vec<bool>,
    /// For keys that want the PIN each time, until it is used.
    pin: Option<Secret>,
    /// It was said that operations are slow.
    warned: bool,
}

/// By which a file is known not to have changed.
#[derive(PartialEq, Eq)]
struct FileState {
    device: u64,
    inode: u64,
    size: u64,
    /// Seconds and nanoseconds of the last change, of contents or attributes.
    changed: (i64, i64),
    modified: (i64, i64),
}

impl Place {
    /// `None` if it cannot be said.
    fn file_state(&self) -> Option<FileState> {
        let Self::Database { file } = self else { return None };
        let metadata = fs::metadata(file).ok()?;
        Some(FileState {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        })
    }
}

/// A private key of the current login.
struct LoginKey {
    key: PrivateKey,
    /// Whether a copy in memory was made, or at least that has been tried.
    tried: bool,
    /// Whether `key` is that copy.
    copied: bool,
    /// CKA_ALWAYS_AUTHENTICATE.
    wants_pin: bool,
}

impl LoginKey {
    /// The key as it is fastest.
    ///
    /// From a database, each operation derives keys from the password several times, 30 ms in all. A
    /// session copy costs that once. It is made at the first use, because a login of ten keys of which one is
    /// used would wait 300 ms.
    fn fast(&mut self, place: &Place, name: &str, warned: &mut bool) -> &PrivateKey {
        if !self.tried && matches!(place, Place::Database { .. }) {
            self.tried = true;
            match self.key.session_copy() {
                Ok(copy) => {
                    self.key = copy;
                    self.copied = true;
                }
                Err(error) => {
                    if !std::mem::replace(warned, true) {
                        LINES.tell("no copy", |end| {
                            tracing::warn!(name, %error, "no session copy of the private key: operations are slow{end}");
                        });
                    }
                }
            }
        }
        &self.key
    }
}

impl Keys {
    pub(super) fn new(wanted: Vec<WantedKey>, slot: Arc<Slot>, place: Place) -> Self {
        Self { wanted, slot, place, current: Mutex::default() }
    }

    /// Logs in with `secret`, if the slot wants one, and finds the keys. If copies of them are to be `lasting`, those of
    /// earlier logins are used again, and those of this one remain, until the database's file of keys changes.
    pub(super) fn unlock(self: &Arc<Self>, secret: &Secret, lasting: bool) -> Result<NssLogin, UnlockError> {
        let mut current = self.lock();
        // Also before a check that fails without asking NSS: after any error nobody is logged in.
        self.end(&mut current);
        let file = self.place.file_state();
        let is_same_file = file.is_some() && file == current.file;
        if !is_same_file {
            current.file = file;
            current.compared.clear();
        }
        let lasting = lasting && self.needs_login();
        let is_held =
            lasting && is_same_file && current.held.as_ref().is_some_and(|held| held.equals(secret.expose()));
        if !is_held && current.held.is_some() {
            self.drop_held(&mut current);
        }
        let removed = || "the token was removed".to_owned();
        // Another token must not be given the PIN.
        if !self.is_in() {
            return Err(UnlockError::NotChecked(removed()));
        }
        self.check_askable(secret)?;
        if self.needs_login() && !is_held {
            check_password(&self.slot, &self.place, secret)?;
            // Nor may its word count for this one, should it have come just now.
            if !self.is_in() {
                self.end(&mut current);
                return Err(UnlockError::Unclear(removed()));
            }
        }
        let mut copies = std::mem::take(&mut current.copies);
        copies.resize_with(self.wanted.len(), || None);
        current.compared.resize(self.wanted.len(), false);
        let keys =
            self.wanted.iter().zip(copies).zip(&mut current.compared).map(|((wanted, copy), compared)| {
                match copy {
                    Some(key) => Ok(Some(LoginKey { key, tried: true, copied: true, wants_pin: false })),
                    None => self.find(wanted, compared),
                }
            });
        let keys: Result<Vec<_>, _> = keys.collect();
        match keys {
            Ok(keys) => current.keys = keys,
            Err(reason) => {
                self.drop_held(&mut current);
                return Err(UnlockError::NotChecked(reason));
            }
        }
        current.held = lasting.then(|| secret.clone());
        if current.keys.iter().flatten().any(|key| key.wants_pin) {
            current.pin = Some(secret.clone());
        }
        Ok(NssLogin { generation: current.generation, keys: Arc::clone(self) })
    }

    /// Drops the copies of keys that outlive their login; those of a login that still lasts go with it.
    pub(super) fn forget(&self) {
        let mut current = self.lock();
        if current.keys.is_empty() {
            self.drop_held(&mut current);
        }
        current.held = None;
    }

    /// Whether there are such copies, or may be.
    pub(super) fn remembers(&self) -> bool {
        self.lock().held.is_some()
    }

    /// When nobody is logged in.
    fn drop_held(&self, current: &mut Current) {
        // Before the logout: after it, NSS does not take them from its memory.
        current.copies.clear();
        current.held = None;
        self.log_out();
    }

    /// What a token would refuse without a comparison, with an error that does not tell so: the guest is not to lose a
    /// try by it.
    fn check_askable(&self, secret: &Secret) -> Result<(), UnlockError> {
        let Place::Token { needs_login: true, pin_lengths, .. } = &self.place else { return Ok(()) };
        if !pin_lengths.contains(&secret.len()) {
            Err(UnlockError::Unfit("the token has no PIN of that length".into()))
        } else if !self.slot.needs_login() {
            Err(UnlockError::NotChecked("the token does not ask for its PIN now".into()))
        } else {
            Ok(())
        }
    }

    /// Whether private keys are behind a password. A token that said so when it was put in is held to that.
    fn needs_login(&self) -> bool {
        matches!(self.place, Place::Token { needs_login: true, .. }) || self.slot.needs_login()
    }

    /// Whether the token is in.
    fn is_in(&self) -> bool {
        match self.place {
            Place::Database { .. } => true,
            Place::Token { series, .. } => self.slot.holds(series),
        }
    }

    /// Whether no other token was inserted since.
    fn is_its_insertion(&self) -> bool {
        match self.place {
            Place::Database { .. } => true,
            Place::Token { series, .. } => self.slot.series() == series,
        }
    }

    /// Whether the token still is as the login left it; that of a database cannot be lost.
    fn is_logged_in(&self) -> bool {
        match self.place {
            Place::Database { .. } => true,
            Place::Token { .. } => self.is_in() && (!self.needs_login() || self.slot.is_logged_in()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Current> {
        // Nothing can panic between two changes that belong together.
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, current: &mut Current) {
        current.generation += 1;
        current.pin = None;
        let keys = std::mem::take(&mut current.keys);
        if current.held.is_none() {
            // The keys first: a session copy works on after a logout.
            drop(keys);
            self.log_out();
        } else if !keys.is_empty() {
            let copy = |key: Option<LoginKey>| key.filter(|key| key.copied).map(|key| key.key);
            current.copies = keys.into_iter().map(copy).collect();
        }
    }

    fn log_out(&self) {
        // A token that came into the slot since has a login of its own.
        if self.is_its_insertion() {
            self.slot.log_out();
        }
    }

    /// A key that a token should have and has not is missed when it is used: nobody asked for it by name.
    fn find(&self, wanted: &WantedKey, compared: &mut bool) -> Result<Option<LoginKey>, String> {
        let window = match &self.place {
            Place::Database { .. } => None,
            Place::Token { window, .. } => Some(window),
        };
        match self.find_own(wanted, window, compared) {
            Err(reason) if window.is_some() => {
                LINES.tell("no key", |end| tracing::warn!("{reason}{end}"));
                Ok(None)
            }
            found => found.map(Some),
        }
    }

    fn find_own(
        &self,
        wanted: &WantedKey,
        window: Option<&Window>,
        compared: &mut bool,
    ) -> Result<LoginKey, String> {
        let WantedKey { name, id, public } = wanted;
        let failed = |error: NssError| format!("the private key of certificate {name:?}: {error}");
        let key = PrivateKey::find(&self.slot, id, window)
            .map_err(failed)?
            .ok_or_else(|| format!("there is no private key for certificate {name:?}"))?;
        // The private key of an EC pair tells nothing of the public one, and on some tokens an RSA key does not
        // either; what there is of the public one was looked at. A database that has not changed is as it was.
        if let (PublicKey::Rsa { modulus, .. }, false) = (public, *compared) {
            match key.attribute(Attribute::Modulus) {
                Ok(found) if without_leading_zeros(&found) == modulus => {
                    *compared = matches!(self.place, Place::Database { .. });
                }
                Err(_) if window.is_some() => {}
                Ok(_) => {
                    return Err(format!("the private key under the ID of certificate {name:?} is another's"));
                }
                Err(error) => return Err(failed(error)),
            }
        }
        let wants_pin = window.is_some()
            && key
                .attribute(Attribute::AlwaysAuthenticate)
                .is_ok_and(|value| value.iter().any(|&byte| byte != 0));
        Ok(LoginKey { key, tried: false, copied: false, wants_pin })
    }
}

pub(super) fn without_leading_zeros(number: &[u8]) -> &[u8] {
    let zeros = number.iter().take_while(|&&byte| byte == 0).count();
    number.get(zeros..).unwrap_or_default()
}

/// One login of a store.
pub(super) struct NssLogin {
    generation: u64,
    keys: Arc<Keys>,
}

impl NssLogin {
    /// Makes of a public key what is to be worked on, `None` if it does not fit, and works on it with the private
    /// key, which gets the PIN if it wants it.
    fn with_key<P, T>(
        &self,
        index: usize,
        prepare: impl FnOnce(&PublicKey) -> Option<P>,
        operate: impl FnOnce(&PrivateKey, P) -> Result<T, KeyError>,
    ) -> Result<T, KeyError> {
        let current = &mut *self.keys.lock();
        if current.generation != self.generation {
            return Err(KeyError::LoggedOut);
        }
        let outcome = self.with_current(current, index, prepare, operate);
        // A card that another program has reset, or a token that is out: without a new login nothing works any more.
        if matches!(outcome, Err(KeyError::Failed(_))) && !self.keys.is_logged_in() {
            self.keys.end(current);
            return Err(KeyError::LoggedOut);
        }
        outcome
    }

    fn with_current<P, T>(
        &self,
        current: &mut Current,
        index: usize,
        prepare: impl FnOnce(&PublicKey) -> Option<P>,
        operate: impl FnOnce(&PrivateKey, P) -> Result<T, KeyError>,
    ) -> Result<T, KeyError> {
        let Keys { wanted, place, .. } = &*self.keys;
        let missing = || KeyError::Failed(format!("there is no private key number {index}"));
        let wanted = wanted.get(index).ok_or_else(missing)?;
        let key = current.keys.get_mut(index).and_then(Option::as_mut).ok_or_else(missing)?;
        let prepared = prepare(&wanted.public).ok_or(KeyError::Block)?;
        let _armed = match place {
            Place::Token { window, series, .. } if key.wants_pin => {
                // The PIN of the VERIFY just before counts for one operation, whatever becomes of it.
                let pin = current.pin.take().ok_or(KeyError::LoggedOut)?;
                if !self.keys.is_in() {
                    return Err(KeyError::Failed("the token was removed".into()));
                }
                Some(window.arm(pin, &self.keys.slot, *series))
            }
            _ => None,
        };
        operate(key.fast(place, &wanted.name, &mut current.warned), prepared)
    }
}

impl Unlocked for NssLogin {
    fn rsa_raw(&self, index: usize, block: &[u8]) -> Result<Secret, KeyError> {
        let prepare = |public: &PublicKey| match public {
            // Of two numbers of equal length, the greater one is the greater string of bytes.
            PublicKey::Rsa { modulus, .. } => {
                (block.len() == modulus.len() && block < &modulus[..]).then_some(())
            }
            PublicKey::Ec { .. } => None,
        };
        self.with_key(index, prepare, |key, ()| rsa::raw(key, block))
    }

    fn ecdsa(&self, index: usize, digest: &[u8]) -> Result<Vec<u8>, KeyError> {
        let prepare = |public: &PublicKey| match public {
            PublicKey::Rsa { .. } => None,
            PublicKey::Ec { curve, .. } => {
                let len = curve.field_len();
                (1..=len).contains(&digest.len()).then(|| vec![0; 2 * len])
            }
        };
        self.with_key(index, prepare, |key, mut signature| {
            offers(key, Mechanism::Ecdsa, "ECDSA")?;
            let written = key.sign(Mechanism::Ecdsa, digest, &mut signature).map_err(failed)?;
            of_length(written, signature.len())?;
            Ok(signature)
        })
    }

    fn ecdh(&self, index: usize, point: &[u8]) -> Result<Secret, KeyError> {
        let prepare = |public: &PublicKey| match public {
            PublicKey::Rsa { .. } => None,
            PublicKey::Ec { curve, .. } => point::is_on(*curve, point).then_some(curve.field_len()),
        };
        self.with_key(index, prepare, |key, len| {
            offers(key, Mechanism::Ecdh, "ECDH")?;
            let shared = key.ecdh(point, len).map_err(failed)?;
            of_length(shared.len(), len)?;
            Ok(shared)
        })
    }
}

fn offers(key: &PrivateKey, mechanism: Mechanism, name: &str) -> Result<(), KeyError> {
    if key.slot().has_mechanism(mechanism) {
        Ok(())
    } else {
        Err(KeyError::Failed(format!("the token offers no {name}")))
    }
}

pub(super) fn failed(error: NssError) -> KeyError {
    KeyError::Failed(error.to_string())
}

pub(super) fn of_length(written: usize, wanted: usize) -> Result<(), KeyError> {
    if written == wanted {
        Ok(())
    } else {
        Err(KeyError::Failed(format!("NSS gave {written} bytes for {wanted}")))
    }
}

impl Drop for NssLogin {
    fn drop(&mut self) {
        let mut current = self.keys.lock();
        // A newer login is not ours to end.
        if current.generation == self.generation {
            self.keys.end(&mut current);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::process::Command;

    use super::super::super::KeyStore;
    use super::super::NssDatabase;
    use super::super::ffi::Class;
    use super::*;

    fn certutil(directory: &Path, arguments: &[&str]) {
        let file = |name| directory.join(name);
        let mut command = Command::new("certutil");
        command.arg("-d").arg(directory).arg("-f").arg(file("password")).args(arguments);
        let output = command.output().unwrap_or_else(|error| panic!("{error}; install libnss3-tools"));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// A database with a key, and its password.
    fn database() -> (tempfile::TempDir, Secret) {
        let root = tempfile::tempdir().unwrap();
        let file = |name: &str| root.path().join(name).to_str().unwrap().to_owned();
        fs::write(file("password"), "secret\n").unwrap();
        fs::write(file("noise"), [7; 256]).unwrap();
        certutil(root.path(), &["-N"]);
        let key = ["-g", "1024", "-z", &file("noise"), "-x", "-t", ",,", "-n", "key", "-s", "CN=key"];
        certutil(root.path(), &[&["-S"], &key[..]].concat());
        (root, b"secret"[..].into())
    }

    /// How many private keys NSS has, those in memory among them.
    fn keys(store: &NssDatabase) -> usize {
        let slot = &store.keys.slot;
        slot.log_in(c"secret");
        slot.objects(Class::PrivateKey).unwrap().iter().count()
    }

    #[test]
    fn no_key_stays_in_memory_after_a_logout() {
        let (root, password) = database();
        let store = NssDatabase::open(root.path().to_str().unwrap(), &["key".into()]).unwrap();
        let unlocked = store.unlock(&password).unwrap();
        assert_eq!(keys(&store), 1);
        unlocked.rsa_raw(0, &[5; 128]).unwrap();
        assert_eq!(keys(&store), 2);
        drop(unlocked);
        assert_eq!(keys(&store), 1);
    }

    /// For a card with a PIN of its own, whose database's password this process has.
    #[test]
    fn copies_of_the_host_s_logins_last_until_they_are_forgotten_or_the_database_changes() {
        let (root, password) = database();
        let store = NssDatabase::open(root.path().to_str().unwrap(), &["key".into()]).unwrap();
        let sign = || store.unlock_held(&password).unwrap().rsa_raw(0, &[5; 128]).unwrap();
        let signature = sign();
        assert_eq!(keys(&store), 2);
        // It is used again, and no further one is made.
        assert!(sign().equals(signature.expose()));
        assert_eq!(keys(&store), 2);
        // Without a login it is nobody's.
        let outdated = store.unlock_held(&password).unwrap();
        drop(store.unlock_held(&password).unwrap());
        assert_eq!(outdated.rsa_raw(0, &[5; 128]).unwrap_err(), KeyError::LoggedOut);
        drop(outdated);
        assert_eq!(keys(&store), 2);
        store.forget();
        assert_eq!(keys(&store), 1);

        sign();
        assert_eq!(keys(&store), 2);
        // Forgotten while it is in use, it goes with its login.
        let unlocked = store.unlock_held(&password).unwrap();
        store.forget();
        unlocked.rsa_raw(0, &[5; 128]).unwrap();
        drop(unlocked);
        assert_eq!(keys(&store), 1);

        sign();
        // A PIN that is the password leaves nothing of what others left, either.
        drop(store.unlock(&password).unwrap());
        assert_eq!(keys(&store), 1);

        sign();
        assert!(store.unlock_held(&b"wrong"[..].into()).is_err());
        sign();
        let file = fs::File::options().append(true).open(root.path().join("key4.db")).unwrap();
        file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        drop(store.unlock_held(&password).unwrap());
        assert_eq!(keys(&store), 1);
        sign();
        assert_eq!(keys(&store), 2);
    }
}
