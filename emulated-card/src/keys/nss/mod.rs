//! Keys and certificates in an NSS database: a directory with cert9.db and key4.db, as `certutil` makes it; and, in
//! [`token`], on what a PKCS#11 module reaches.
//!
//! Each [`NssDatabase`] has a login state of its own, also when two of them are opened on one directory. A
//! store does one thing at a time; two stores work in parallel.

mod directory;
mod error;
#[allow(unsafe_code)]
mod ffi;
mod login;
mod module;
mod point;
mod rsa;
pub mod token;
mod watch;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vscard_protocol::Secret;

pub use self::error::OpenError;
use self::ffi::{Attribute, Class, NssError, PrivateKey, Slot, SlotError};
use self::login::{Keys, Place, WantedKey, without_leading_zeros};
use super::certificate::{self, Parts, PublicKey, Unfit};
use super::{Certificate, KeyStore, UnlockError, Unlocked};

/// As many certificates as a PIV card has keys: four, and twenty retired ones (SP 800-73-4 Part 1 table 4b).
const MAX_CERTIFICATES: usize = 24;
/// How many objects of a class are looked at.
const MAX_OBJECTS: usize = 4096;
/// How many nicknames an error lists.
const MAX_LISTED: usize = 10;

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
    path: PathBuf,
    keys: Arc<Keys>,
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
        let (certificates, wanted): (_, Vec<_>) = chosen.into_iter().unzip();
        if !slot.needs_login() {
            check_visible_keys(&slot, &wanted, &path)?;
        }
        let place = Place::Database { file: path.join("key4.db") };
        Ok(Self { certificates, path, keys: Arc::new(Keys::new(wanted, slot, place)) })
    }

    /// The canonical path of the database's directory.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl fmt::Debug for NssDatabase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.certificates.iter().map(|certificate| &certificate.name).collect();
        f.debug_struct("NssDatabase")
            .field("path", &self.path)
            .field("certificates", &names)
            .finish_non_exhaustive()
    }
}

impl KeyStore for NssDatabase {
    fn certificates(&self) -> &[Certificate] {
        &self.certificates
    }

    fn needs_secret(&self) -> bool {
        self.keys.slot.needs_login()
    }

    fn unlock(&self, secret: &Secret) -> Result<Box<dyn Unlocked>, UnlockError> {
        Ok(Box::new(self.keys.unlock(secret, false)?))
    }

    fn unlock_held(&self, secret: &Secret) -> Result<Box<dyn Unlocked>, UnlockError> {
        Ok(Box::new(self.keys.unlock(secret, true)?))
    }

    fn forget(&self) {
        self.keys.forget();
    }

    fn remembers(&self) -> bool {
        self.keys.remembers()
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

/// For a database without password, whose private keys can be seen at once.
fn check_visible_keys(slot: &Arc<Slot>, wanted: &[WantedKey], path: &Path) -> Result<(), OpenError> {
    for WantedKey { name, id, .. } in wanted {
        match PrivateKey::find(slot, id, None) {
            Ok(Some(_)) => {}
            Ok(None) => {
                let (nickname, directory) = (name.clone(), path.to_owned());
                return Err(OpenError::NoPrivateKey { nickname, directory });
            }
            Err(reason) => return Err(refused(path, reason)),
        }
    }
    Ok(())
}

/// What is visible in a slot before login.
struct Content {
    certificates: Vec<Found>,
    /// The CKA_ID of each public key. NSS stores one beside each private key (`certutil -S`, `pk12util -i`,
    /// an upgraded dbm database), and none for a certificate that was only added (`certutil -A`).
    key_pairs: HashMap<Vec<u8>, PublicHalf>,
}

struct Found {
    nickname: Vec<u8>,
    id: Vec<u8>,
    der: Vec<u8>,
}

/// A public key object, which stands for the private key that cannot be seen.
struct PublicHalf {
    modulus: Vec<u8>,
    point: Vec<u8>,
}

impl PublicHalf {
    /// Whether it is that key, as far as the object says anything. CKA_EC_POINT is an OCTET STRING in DER
    /// (PKCS #11 v2.40 §2.3.3), or the bare point, as older tokens have it.
    fn may_be(&self, key: &PublicKey) -> bool {
        match key {
            PublicKey::Rsa { modulus, .. } => {
                self.modulus.is_empty() || without_leading_zeros(&self.modulus) == modulus
            }
            PublicKey::Ec { point, .. } => {
                let header = [0x04, point.len() as u8];
                let bare = self.point.strip_prefix(&header).filter(|bare| bare.len() == point.len());
                self.point.is_empty() || bare.unwrap_or(&self.point) == point
            }
        }
    }
}

impl Content {
    fn read(slot: &Slot) -> Result<Self, NssError> {
        // An object without a label or an ID is none of ours, and one without a value no certificate, so a missing
        // attribute reads as empty.
        let certificates = slot
            .objects(Class::Certificate)?
            .iter()
            .take(MAX_OBJECTS)
            .map(|object| {
                let attribute = |attribute| object.attribute(attribute).unwrap_or_default();
                Found {
                    nickname: attribute(Attribute::Label),
                    id: attribute(Attribute::Id),
                    der: attribute(Attribute::Value),
                }
            })
            .collect();
        let mut key_pairs: HashMap<_, _> = slot
            .objects(Class::PublicKey)?
            .iter()
            .take(MAX_OBJECTS)
            .map(|object| {
                let attribute = |attribute| object.attribute(attribute).unwrap_or_default();
                let half = PublicHalf {
                    modulus: attribute(Attribute::Modulus),
                    point: attribute(Attribute::EcPoint),
                };
                (attribute(Attribute::Id), half)
            })
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
        for found in named.filter(|found| self.key_pairs.contains_key(&found.id)) {
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
        if self.key_pairs.get(&found.id).is_some_and(|half| !half.may_be(&public)) {
            return Err(OpenError::AnothersKey { nickname: name, directory });
        }
        Ok((certificate, WantedKey { name, id: found.id.clone(), public }))
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
