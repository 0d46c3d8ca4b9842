//! Keys and data objects that are written to a card, in a directory of its own.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use openssl::ec::{EcGroup, EcKey};
use openssl::error::ErrorStack;
use openssl::nid::Nid;
use openssl::pkey::{PKey, Private};
use openssl::rsa::Rsa;
use openssl::symm::{Cipher, Crypter, Mode};
use thiserror::Error;
use vscard_protocol::Secret;
use zeroize::Zeroizing;

use super::certificate::{self, PublicKey};
use super::pem::{BadKey, Key, OpenError, PemSource, failed, open_all, read_key};
use super::writable::{ManagementAlgorithm, NewKey, Writable, WriteError};
use super::{Certificate, Curve, KeyError, KeyKind, KeyStore, UnlockError, Unlocked};
use crate::pin::{Access, SecretFileError, read_file, read_secret_file};
use crate::slot::{PivSlot, SlotError, assign};
use crate::state::{StateDirectory, StateError};

/// All tags that data objects can have: 5FC1 and a byte up to this (SP 800-73-4 Part 1 table 3).
const LAST_OBJECT: u8 = 0x23;
/// What one command can bring.
const MAX_OBJECT: usize = 65_535;

/// The card management key, by which a card knows its administrator.
pub struct ManagementKey {
    algorithm: ManagementAlgorithm,
    key: Secret,
}

/// Why a card management key is none.
#[derive(Debug, Error)]
pub enum ManagementKeyError {
    /// The file is not usable.
    #[error(transparent)]
    File(#[from] SecretFileError),
    /// Not a key of the algorithm.
    #[error("{} does not hold {digits} hexadecimal digits", path.display())]
    Digits {
        /// The file.
        path: PathBuf,
        /// How many there have to be.
        digits: usize,
    },
}

impl ManagementKey {
    /// Reads a file that is its owner's alone, with the key in hexadecimal digits.
    ///
    /// # Errors
    /// [`ManagementKeyError`].
    pub fn read(path: &Path, algorithm: ManagementAlgorithm) -> Result<Self, ManagementKeyError> {
        let text = read_secret_file(path)?;
        let key = from_hex(text.expose()).filter(|key| key.len() == algorithm.key_len());
        let digits = algorithm.key_len() * 2;
        let key = key.ok_or_else(|| ManagementKeyError::Digits { path: path.to_owned(), digits })?;
        Ok(Self { algorithm, key })
    }

    /// The key in hexadecimal digits, as [`read`](Self::read) takes it.
    pub fn to_hex(&self) -> Secret {
        let digit = |value: u8| char::from_digit(u32::from(value), 16).unwrap_or_default() as u8;
        // All the room at once: a Vec that grows leaves copies behind.
        let mut text = Vec::with_capacity(2 * self.key.len());
        text.extend(self.key.expose().iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 0x0F)]));
        Secret::new(text)
    }

    fn encrypt(&self, block: &[u8]) -> Result<Secret, ErrorStack> {
        let cipher = match self.algorithm {
            ManagementAlgorithm::TripleDes => Cipher::des_ede3_ecb(),
            ManagementAlgorithm::Aes128 => Cipher::aes_128_ecb(),
            ManagementAlgorithm::Aes192 => Cipher::aes_192_ecb(),
            ManagementAlgorithm::Aes256 => Cipher::aes_256_ecb(),
        };
        let mut crypter = Crypter::new(cipher, Mode::Encrypt, self.key.expose(), None)?;
        crypter.pad(false);
        let mut result = Zeroizing::new(vec![0; block.len() + cipher.block_size()]);
        let written = crypter.update(block, &mut result)?;
        let written = written + crypter.finalize(&mut result[written..])?;
        result.truncate(written);
        Ok(Secret::new(std::mem::take(&mut *result)))
    }
}

impl fmt::Debug for ManagementKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ManagementKey").field("algorithm", &self.algorithm).finish_non_exhaustive()
    }
}

fn from_hex(text: &[u8]) -> Option<Secret> {
    let digit = |character: u8| Some(char::from(character).to_digit(16)? as u8);
    let mut key = Zeroizing::new(Vec::with_capacity(text.len() / 2));
    for pair in text.chunks(2) {
        let &[high, low] = pair else { return None };
        key.push(digit(high)? << 4 | digit(low)?);
    }
    Some(Secret::new(std::mem::take(&mut *key)))
}

/// Why a card that was written to cannot be opened.
#[derive(Debug, Error)]
pub enum WrittenError {
    /// A file with a key or certificate.
    #[error(transparent)]
    Files(#[from] OpenError),
    /// The certificates do not go into slots.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// The directory is not this user's alone.
    #[error(transparent)]
    Directory(#[from] StateError),
}

/// Certificates and keys from files, and what was written to the card since: the files themselves stay as they are,
/// and with them the card's identity. A directory has one file for each key and data object that was written, which
/// is its owner's alone and replaced as a whole.
///
/// Such a card shows itself as a PIV card only: a CAC has no commands for what changes here.
pub struct WrittenStore {
    certificates: Vec<Certificate>,
    directory: StateDirectory,
    management: Option<ManagementKey>,
    /// The slot of each index: those that certificates of the files are in come first, in their order.
    slots: Vec<PivSlot>,
    keys: Arc<Keys>,
    /// By the last byte of the tag; empty ones are deleted.
    objects: RwLock<BTreeMap<u8, Vec<u8>>>,
}

/// The keys, by index.
type Keys = RwLock<Vec<Option<Arc<Key>>>>;

impl WrittenStore {
    /// Opens files as [`PemStore::open`](super::pem::PemStore::open) does, then what was written, in `directory`,
    /// which need not be there. `management` is the key by which more can be written. Nobody else may write to
    /// `directory` meanwhile, or as long as the store lives.
    ///
    /// # Errors
    /// [`WrittenError`].
    pub fn open(
        sources: &[PemSource],
        password: Option<&Secret>,
        explicit: &[(PivSlot, String)],
        directory: StateDirectory,
        management: Option<ManagementKey>,
    ) -> Result<Self, WrittenError> {
        let store = Self::as_made(sources, password, explicit, directory, management)?;
        store.read_written()?;
        Ok(store)
    }

    /// The card as its files make it: enough to know which card it is, which must be known to be this one's before
    /// [`read_written`](Self::read_written).
    pub(crate) fn as_made(
        sources: &[PemSource],
        password: Option<&Secret>,
        explicit: &[(PivSlot, String)],
        directory: StateDirectory,
        management: Option<ManagementKey>,
    ) -> Result<Self, WrittenError> {
        let (certificates, keys) = open_all(sources, password)?;
        let assigned = assign(&certificates, explicit)?;
        let mut slots: Vec<PivSlot> = Vec::new();
        for index in 0..certificates.len() {
            slots.extend(assigned.iter().find(|(_, assigned)| *assigned == index).map(|(slot, _)| *slot));
        }
        slots.extend(PivSlot::all().filter(|slot| !slots.contains(slot)).collect::<Vec<_>>());
        let keys: Vec<_> = keys.into_iter().map(Arc::new).collect();
        let made = |slot: &PivSlot| assigned.iter().find(|(assigned, _)| assigned == slot);
        let current =
            slots.iter().map(|slot| made(slot).and_then(|(_, index)| keys.get(*index)).cloned()).collect();
        Ok(Self {
            certificates,
            directory,
            management,
            slots,
            keys: Arc::new(RwLock::new(current)),
            objects: RwLock::default(),
        })
    }

    /// Reads what was written to the card so far.
    pub(crate) fn read_written(&self) -> Result<(), WrittenError> {
        if !self.directory.exists()? {
            return Ok(());
        }
        let mut keys = self.keys.write().unwrap_or_else(PoisonError::into_inner);
        for (slot, place) in self.slots.iter().zip(&mut *keys) {
            if let Some(key) = read_written_key(&self.directory.path().join(key_file(*slot)))? {
                *place = Some(Arc::new(key));
            }
        }
        let mut objects = self.objects.write().unwrap_or_else(PoisonError::into_inner);
        for tag in 0..=LAST_OBJECT {
            let path = self.directory.path().join(object_file(tag));
            if let Some(content) = read_if_there(&path)? {
                objects.insert(tag, content.to_vec());
            }
        }
        Ok(())
    }

    fn index(&self, slot: PivSlot) -> Option<usize> {
        self.slots.iter().position(|one| *one == slot)
    }

    fn write(&self, name: &str, content: &[u8]) -> Result<(), WriteError> {
        self.directory.replace(name, content).map_err(|error| WriteError::Storage(error.to_string()))
    }
}

fn key_file(slot: PivSlot) -> String {
    format!("{slot}.key")
}

fn object_file(tag: u8) -> String {
    format!("5fc1{tag:02x}.object")
}

fn read_if_there(path: &Path) -> Result<Option<Zeroizing<Vec<u8>>>, OpenError> {
    match read_file(path, MAX_OBJECT, Access::OwnersAlone) {
        Ok(content) if content.len() > MAX_OBJECT => {
            Err(OpenError::Contents { path: path.to_owned(), what: "is too long" })
        }
        Ok(content) => Ok(Some(content)),
        Err(SecretFileError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn read_written_key(path: &Path) -> Result<Option<Key>, OpenError> {
    let Some(text) = read_if_there(path)? else { return Ok(None) };
    let damaged =
        |BadKey| OpenError::Contents { path: path.to_owned(), what: "holds a key that no card has" };
    let (_, key) = usable(&read_key(path, &text)?).map_err(damaged)?;
    Ok(Some(key))
}

/// A key as the operations want it, and its public half.
fn usable(key: &PKey<Private>) -> Result<(PublicKey, Key), BadKey> {
    let info = key.public_key_to_der()?;
    let public = certificate::parse_public_key(&info).ok_or(BadKey)?;
    let key = Key::of(&public, key)?.ok_or(BadKey)?;
    Ok((public, key))
}

fn new_key(kind: KeyKind) -> Result<PKey<Private>, ErrorStack> {
    let curve = match kind {
        KeyKind::Rsa { bits } => return PKey::from_rsa(Rsa::generate(bits as u32)?),
        KeyKind::Ec(Curve::P256) => Nid::X9_62_PRIME256V1,
        KeyKind::Ec(Curve::P384) => Nid::SECP384R1,
    };
    PKey::from_ec_key(EcKey::generate(&*EcGroup::from_curve_name(curve)?)?)
}

impl KeyStore for WrittenStore {
    /// Those of the files. What was written is in data objects only.
    fn certificates(&self) -> &[Certificate] {
        &self.certificates
    }

    fn needs_secret(&self) -> bool {
        false
    }

    fn unlock(&self, _: &Secret) -> Result<Box<dyn Unlocked>, UnlockError> {
        Ok(Box::new(WrittenLogin { keys: Arc::clone(&self.keys) }))
    }

    fn writable(&self) -> Option<&dyn Writable> {
        Some(self)
    }
}

impl Writable for WrittenStore {
    fn management(&self) -> Option<ManagementAlgorithm> {
        self.management.as_ref().map(|key| key.algorithm)
    }

    fn encrypt(&self, block: &[u8]) -> Result<Secret, KeyError> {
        match &self.management {
            Some(key) => key.encrypt(block).map_err(failed),
            None => Err(KeyError::Failed("there is no card management key".into())),
        }
    }

    fn object(&self, tag: u8) -> Option<Vec<u8>> {
        self.objects.read().unwrap_or_else(PoisonError::into_inner).get(&tag).cloned()
    }

    fn key(&self, slot: PivSlot) -> Option<(usize, KeyKind)> {
        let index = self.index(slot)?;
        Some((index, key_at(&self.keys, index)?.kind()))
    }

    fn put(&self, tag: u8, content: &[u8]) -> Result<(), WriteError> {
        if tag > LAST_OBJECT || content.len() > MAX_OBJECT {
            return Err(WriteError::Storage("there is no such data object".into()));
        }
        self.write(&object_file(tag), content)?;
        self.objects.write().unwrap_or_else(PoisonError::into_inner).insert(tag, content.to_vec());
        Ok(())
    }

    fn generate(&self, slot: PivSlot, kind: KeyKind) -> Result<NewKey, WriteError> {
        let failed = |error: ErrorStack| WriteError::Key(error.to_string());
        let index = self.index(slot).ok_or_else(|| WriteError::Key("there is no such slot".into()))?;
        let key = new_key(kind).map_err(failed)?;
        let text = Zeroizing::new(key.private_key_to_pem_pkcs8().map_err(failed)?);
        let (public, usable) =
            usable(&key).map_err(|BadKey| WriteError::Key("OpenSSL made another kind of key".into()))?;
        let public = match public {
            PublicKey::Rsa { modulus, exponent } => NewKey::Rsa { modulus, exponent },
            PublicKey::Ec { point, .. } => NewKey::Ec { point },
        };
        self.write(&key_file(slot), &text)?;
        if let Some(place) = self.keys.write().unwrap_or_else(PoisonError::into_inner).get_mut(index) {
            *place = Some(Arc::new(usable));
        }
        Ok(public)
    }
}

impl fmt::Debug for WrittenStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.certificates.iter().map(|certificate| &certificate.name).collect();
        let mut shown = f.debug_struct("WrittenStore");
        shown.field("certificates", &names).field("directory", &self.directory.path());
        shown.field("management", &self.management).finish_non_exhaustive()
    }
}

fn key_at(keys: &Keys, index: usize) -> Option<Arc<Key>> {
    keys.read().unwrap_or_else(PoisonError::into_inner).get(index)?.clone()
}

struct WrittenLogin {
    keys: Arc<Keys>,
}

impl WrittenLogin {
    /// The key that is there now, whichever was there at login.
    fn key(&self, index: usize) -> Result<Arc<Key>, KeyError> {
        key_at(&self.keys, index).ok_or_else(|| KeyError::Failed(format!("there is no key number {index}")))
    }
}

impl Unlocked for WrittenLogin {
    fn rsa_raw(&self, index: usize, block: &[u8]) -> Result<Secret, KeyError> {
        self.key(index)?.rsa_raw(block)
    }

    fn ecdsa(&self, index: usize, digest: &[u8]) -> Result<Vec<u8>, KeyError> {
        self.key(index)?.ecdsa(digest)
    }

    fn ecdh(&self, index: usize, point: &[u8]) -> Result<Secret, KeyError> {
        self.key(index)?.ecdh(point)
    }
}
