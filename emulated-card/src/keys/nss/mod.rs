//! Keys and certificates in an NSS database: a directory with cert9.db and key4.db, as `certutil` makes it.
//!
//! Each [`NssDatabase`] has a login state of its own, also when two of them are opened on one directory. A
//! store does one thing at a time; two stores work in parallel.

mod directory;
mod error;
#[allow(unsafe_code)]
mod ffi;

use std::collections::HashSet;
use std::ffi::CStr;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vscard_protocol::Secret;
use zeroize::Zeroizing;

pub use self::error::OpenError;
use self::ffi::{Attribute, Class, Login, NssError, PrivateKey, Slot, SlotError};
use super::certificate::{self, Parts, PublicKey, Unfit};
use super::{Certificate, KeyError, KeyStore, UnlockError, Unlocked};

/// As many certificates as a CAC applet has key slots for.
const MAX_CERTIFICATES: usize = 10;
/// How many nicknames an error lists.
const MAX_LISTED: usize = 10;
/// softoken refuses longer passwords without a look.
const MAX_PASSWORD: usize = 500;

/// An NSS database and the certificates asked for.
///
/// The database is opened read-only. A changed password or a deleted key counts from the next unlock on, a
/// first password from the next open on (until then every unlock fails). A process can hold 96 databases. It
/// must not start NSS with the same directory itself: the login would be shared then.
///
/// ```no_run
/// use emulated_card::keys::{KeyStore, nss::NssDatabase};
///
/// let store = NssDatabase::open("sql:/etc/pki/card", &["identity".into(), "signing".into()])?;
/// assert_eq!(store.certificates().len(), 2);
/// # Ok::<(), emulated_card::keys::nss::OpenError>(())
/// ```
pub struct NssDatabase {
    certificates: Vec<Certificate>,
    store: Arc<Store>,
}

impl NssDatabase {
    /// Opens the database in `directory` (with or without `sql:` in front) and takes from it the certificates
    /// that `nicknames` names, in that order.
    ///
    /// Of several certificates with one nickname (a renewal) the one with a private key is taken, and of
    /// several such the one that expires last. All of them must be there, or none is served.
    ///
    /// Private keys are invisible before login, but the public halves that NSS stores with them are not: a
    /// certificate without one is refused here. If only the private half is gone,
    /// [`unlock`](KeyStore::unlock) says so.
    ///
    /// # Errors
    /// [`OpenError`], whose messages name the directory, file or nickname.
    pub fn open(directory: &str, nicknames: &[String]) -> Result<Self, OpenError> {
        check_nicknames(directory, nicknames)?;
        let path = directory::check(directory)?;
        let spec =
            directory::spec(&path).ok_or_else(|| OpenError::Nul { directory: directory.to_owned() })?;
        let slot = Slot::open(&spec).map_err(|error| match error {
            SlotError::Start(reason) => OpenError::Start { reason: reason.to_string() },
            SlotError::Open(NssError::NO_SLOT_SELECTED) => {
                OpenError::TooManyDatabases { directory: path.clone() }
            }
            SlotError::Open(reason) => refused(&path, reason),
        })?;

        let content = Content::read(&slot).map_err(|reason| refused(&path, reason))?;
        let chosen: Vec<_> =
            nicknames.iter().map(|name| content.choose(name, &path)).collect::<Result<_, _>>()?;
        let (certificates, keys) = chosen.into_iter().unzip();
        let store = Store { keys, login: Mutex::default(), slot, path };
        if !store.slot.needs_login() {
            store.check_visible_keys()?;
        }
        Ok(Self { certificates, store: Arc::new(store) })
    }

    /// The canonical path of the database's directory.
    pub fn path(&self) -> &Path {
        &self.store.path
    }
}

impl fmt::Debug for NssDatabase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.certificates.iter().map(|certificate| &certificate.name).collect();
        f.debug_struct("NssDatabase")
            .field("path", &self.store.path)
            .field("certificates", &names)
            .finish_non_exhaustive()
    }
}

impl KeyStore for NssDatabase {
    fn certificates(&self) -> &[Certificate] {
        &self.certificates
    }

    fn needs_secret(&self) -> bool {
        self.store.slot.needs_login()
    }

    fn unlock(&self, secret: &Secret) -> Result<Box<dyn Unlocked>, UnlockError> {
        let mut login = self.store.lock();
        // Also before a check that fails without asking NSS: after any error nobody is logged in.
        login.end(&self.store.slot);
        if self.store.slot.needs_login() {
            check_password(&self.store.slot, secret)?;
        }
        match self.store.find_keys() {
            Ok(keys) => login.keys = keys,
            Err(reason) => {
                login.end(&self.store.slot);
                return Err(UnlockError::NotChecked(reason));
            }
        }
        Ok(Box::new(NssLogin { generation: login.generation, store: Arc::clone(&self.store) }))
    }
}

fn check_nicknames(directory: &str, nicknames: &[String]) -> Result<(), OpenError> {
    let directory = directory.to_owned();
    match nicknames.len() {
        0 => return Err(OpenError::NoNicknames { directory }),
        1..=MAX_CERTIFICATES => {}
        count => return Err(OpenError::TooManyNicknames { directory, count }),
    }
    let mut seen = HashSet::new();
    match nicknames.iter().find(|name| !seen.insert(*name)) {
        Some(name) => Err(OpenError::NicknameTwice { nickname: name.clone() }),
        None => Ok(()),
    }
}

fn refused(path: &Path, reason: NssError) -> OpenError {
    OpenError::Refused { directory: path.to_owned(), reason: reason.to_string() }
}

fn check_password(slot: &Slot, secret: &Secret) -> Result<(), UnlockError> {
    let not_checked = |reason: &str| Err(UnlockError::NotChecked(reason.to_owned()));
    if secret.len() > MAX_PASSWORD {
        return not_checked("longer than 500 bytes");
    }
    let mut password = Zeroizing::new(Vec::with_capacity(secret.len() + 1));
    password.extend_from_slice(secret.expose());
    password.push(0);
    // NSS takes a C string: with a zero inside, only what stands before it would be compared.
    let Ok(password) = CStr::from_bytes_with_nul(&password) else {
        return not_checked("it holds a zero byte");
    };
    match slot.log_in(password) {
        Login::Accepted => Ok(()),
        Login::Wrong => Err(UnlockError::Wrong),
        Login::NotChecked(NssError::LOCKED_PASSWORD) => Err(UnlockError::Locked),
        Login::NotChecked(error) => not_checked(&error.to_string()),
    }
}

/// What is visible in a database before login.
struct Content {
    certificates: Vec<Found>,
    /// The CKA_ID of each public key. NSS stores one beside each private key (`certutil -S`, `pk12util -i`,
    /// an upgraded dbm database), and none for a certificate that was only added (`certutil -A`).
    key_pairs: HashSet<Vec<u8>>,
}

struct Found {
    nickname: Vec<u8>,
    id: Vec<u8>,
    der: Vec<u8>,
}

impl Content {
    fn read(slot: &Slot) -> Result<Self, NssError> {
        // An object without a label or an ID is none of ours, so a missing attribute reads as empty.
        let certificates = slot
            .objects(Class::Certificate)?
            .iter()
            .map(|object| {
                Ok(Found {
                    nickname: object.attribute(Attribute::Label).unwrap_or_default(),
                    id: object.attribute(Attribute::Id).unwrap_or_default(),
                    der: object.attribute(Attribute::Value)?,
                })
            })
            .collect::<Result<_, NssError>>()?;
        let mut key_pairs: HashSet<_> = slot
            .objects(Class::PublicKey)?
            .iter()
            .map(|object| object.attribute(Attribute::Id).unwrap_or_default())
            .collect();
        // An empty ID links nothing.
        key_pairs.remove(&[][..]);
        Ok(Self { certificates, key_pairs })
    }

    fn choose(&self, nickname: &str, path: &Path) -> Result<(Certificate, WantedKey), OpenError> {
        let directory = path.to_owned();
        let name = nickname.to_owned();
        let mut named =
            self.certificates.iter().filter(|found| found.nickname == nickname.as_bytes()).peekable();
        if named.peek().is_none() {
            return Err(OpenError::UnknownNickname { nickname: name, directory, present: self.list() });
        }
        let mut best: Option<(&Found, Parts)> = None;
        for found in named.filter(|found| self.key_pairs.contains(&found.id)) {
            let parts = certificate::parse(&found.der).map_err(|reason| OpenError::BadCertificate {
                nickname: name.clone(),
                directory: directory.clone(),
                reason: reason.to_string(),
            })?;
            if best.as_ref().is_none_or(|(_, other)| other.validity < parts.validity) {
                best = Some((found, parts));
            }
        }
        let Some((found, parts)) = best else {
            return Err(OpenError::NoPrivateKey { nickname: name, directory });
        };
        let (spki, public) = parts.key().map_err(|unfit| match unfit {
            Unfit::Kind(kind) => {
                OpenError::KeyKind { nickname: name.clone(), directory: directory.clone(), kind }
            }
            Unfit::Size(bits) => {
                OpenError::KeySize { nickname: name.clone(), directory: directory.clone(), bits }
            }
        })?;
        let certificate =
            Certificate { name: name.clone(), der: found.der.clone(), public_key: spki, kind: public.kind() };
        let PublicKey::Rsa { modulus } = public else {
            let kind = public.kind().to_string();
            return Err(OpenError::KeyKind { nickname: name, directory: path.to_owned(), kind });
        };
        Ok((certificate, WantedKey { nickname: name, id: found.id.clone(), modulus }))
    }

    /// The nicknames that are there, as the end of a sentence.
    fn list(&self) -> String {
        let mut names: Vec<_> =
            self.certificates.iter().map(|found| String::from_utf8_lossy(&found.nickname)).collect();
        names.sort_unstable();
        names.dedup();
        if names.is_empty() {
            return "is none at all".to_owned();
        }
        let listed: Vec<_> = names.iter().take(MAX_LISTED).map(|name| format!("{name:?}")).collect();
        let more = match names.len() - listed.len() {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        format!("are {}{more}", listed.join(", "))
    }
}

/// How the private key of a certificate is found after login, and known to be the right one.
struct WantedKey {
    nickname: String,
    id: Vec<u8>,
    modulus: Vec<u8>,
}

/// What the database and its logins share.
struct Store {
    keys: Vec<WantedKey>,
    /// Held through every login, logout and operation: a login logs out first, which would make an operation
    /// that runs beside it fail.
    login: Mutex<Current>,
    slot: Arc<Slot>,
    path: PathBuf,
}

/// The login that counts now.
#[derive(Default)]
struct Current {
    /// How many logins have been started. An [`NssLogin`] with another number is over.
    generation: u64,
    /// In the order of [`Store::keys`]; empty when logged out.
    keys: Vec<LoginKey>,
}

/// A private key of the current login.
struct LoginKey {
    key: PrivateKey,
    /// Whether `key` is in memory, or at least that has been tried.
    copied: bool,
}

impl LoginKey {
    /// The key as it is fastest.
    ///
    /// From the database, each operation derives keys from the password several times, 30 ms in all. A
    /// session copy costs that once. It is made at the first use, because a login of ten keys of which one is
    /// used would wait 300 ms.
    fn fast(&mut self, nickname: &str) -> &PrivateKey {
        if !self.copied {
            self.copied = true;
            match self.key.session_copy() {
                Ok(copy) => self.key = copy,
                Err(error) => {
                    tracing::debug!(nickname, %error, "no session copy of the private key: operations are slow");
                }
            }
        }
        &self.key
    }
}

impl Current {
    fn end(&mut self, slot: &Slot) {
        // The keys first: a session copy works on after a logout.
        self.keys.clear();
        slot.log_out();
        self.generation += 1;
    }
}

impl Store {
    fn lock(&self) -> MutexGuard<'_, Current> {
        // Nothing can panic between two changes that belong together.
        self.login.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find_keys(&self) -> Result<Vec<LoginKey>, String> {
        self.keys.iter().map(|wanted| self.find_key(wanted)).collect()
    }

    fn find_key(&self, wanted: &WantedKey) -> Result<LoginKey, String> {
        let WantedKey { nickname, id, modulus } = wanted;
        let key = PrivateKey::find(&self.slot, id)
            .map_err(|error| format!("the private key of certificate {nickname:?}: {error}"))?
            .ok_or_else(|| format!("the database has no private key for certificate {nickname:?}"))?;
        let found =
            key.modulus().map_err(|error| format!("the private key of certificate {nickname:?}: {error}"))?;
        if without_leading_zeros(&found) != modulus {
            return Err(format!("the private key under the ID of certificate {nickname:?} is another's"));
        }
        Ok(LoginKey { key, copied: false })
    }

    /// For a database without password, whose private keys can be seen at once.
    fn check_visible_keys(&self) -> Result<(), OpenError> {
        for WantedKey { nickname, id, .. } in &self.keys {
            match PrivateKey::find(&self.slot, id) {
                Ok(Some(_)) => {}
                Ok(None) => {
                    let (nickname, directory) = (nickname.clone(), self.path.clone());
                    return Err(OpenError::NoPrivateKey { nickname, directory });
                }
                Err(reason) => return Err(refused(&self.path, reason)),
            }
        }
        Ok(())
    }
}

fn without_leading_zeros(number: &[u8]) -> &[u8] {
    let zeros = number.iter().take_while(|&&byte| byte == 0).count();
    number.get(zeros..).unwrap_or_default()
}

/// One login of a store.
struct NssLogin {
    generation: u64,
    store: Arc<Store>,
}

impl Unlocked for NssLogin {
    fn rsa_raw(&self, index: usize, block: &[u8]) -> Result<Secret, KeyError> {
        let mut login = self.store.lock();
        if login.generation != self.generation {
            return Err(KeyError::LoggedOut);
        }
        let (Some(wanted), Some(key)) = (self.store.keys.get(index), login.keys.get_mut(index)) else {
            return Err(KeyError::Failed(format!("there is no certificate number {index}")));
        };
        // Of two numbers of equal length, the greater one is the greater string of bytes.
        if block.len() != wanted.modulus.len() || block >= &wanted.modulus[..] {
            return Err(KeyError::Block);
        }
        let key = key.fast(&wanted.nickname);
        let mut result = Zeroizing::new(vec![0; block.len()]);
        let written = key
            .rsa_decrypt_raw(block, &mut result)
            // A key may be allowed to sign and not to decrypt. To sign a ready block is the same operation.
            .or_else(|first| key.rsa_sign_raw(block, &mut result).map_err(|_| first))
            .map_err(|error| KeyError::Failed(error.to_string()))?;
        if written != block.len() {
            return Err(KeyError::Failed(format!("NSS gave {written} bytes for {}", block.len())));
        }
        Ok(Secret::new(std::mem::take(&mut *result)))
    }

    fn ecdsa(&self, _: usize, _: &[u8]) -> Result<Vec<u8>, KeyError> {
        // Only RSA keys are taken from a database yet.
        Err(KeyError::Block)
    }

    fn ecdh(&self, _: usize, _: &[u8]) -> Result<Secret, KeyError> {
        Err(KeyError::Block)
    }
}

impl Drop for NssLogin {
    fn drop(&mut self) {
        let mut login = self.store.lock();
        // A newer login is not ours to end.
        if login.generation == self.generation {
            login.end(&self.store.slot);
        }
    }
}
