//! Keys and certificates in PEM and PKCS#12 files, as `openssl` makes them.
//!
//! Everything is read and decrypted when the store is opened; the private keys are in memory as long as the store or
//! a login lives. OpenSSL blinds the RSA operations, checks their results, and wipes the keys when they are freed.

mod error;
mod file;

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use openssl::bn::BigNumContext;
use openssl::derive::Deriver;
use openssl::ec::{EcKey, EcPoint, PointConversionForm};
use openssl::ecdsa::EcdsaSig;
use openssl::error::ErrorStack;
use openssl::nid::Nid;
use openssl::pkey::{Id, PKey, Private};
use openssl::rsa::{Padding, Rsa};
use vscard_protocol::Secret;
use zeroize::Zeroizing;

pub use self::error::OpenError;
use self::file::Found;
use super::certificate::{self, PublicKey};
use super::{Certificate, Curve, KeyError, KeyKind, KeyStore, UnlockError, Unlocked};

/// As many as a PIV card has: four slots and twenty retired keys (SP 800-73-4 Part 1 table 4b).
const MAX_CERTIFICATES: usize = 24;

/// Where one certificate and its private key are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PemSource {
    /// In PEM files, or both in one.
    Pem {
        /// The file with the certificate; others may stand beside it, such as those of its issuers.
        certificate: PathBuf,
        /// The file with the private key, of which there must be one.
        key: PathBuf,
    },
    /// In a PKCS#12 file.
    Pkcs12(PathBuf),
}

impl PemSource {
    /// What an option says: `CERTIFICATE,KEY`, or one PEM file that holds both. A comma in a name is doubled, as in
    /// other options.
    ///
    /// # Errors
    /// [`OpenError::Option`].
    pub fn pem_option(text: &str) -> Result<Self, OpenError> {
        let mut names = vec![String::new()];
        let mut chars = text.chars().peekable();
        while let Some(char) = chars.next() {
            match names.last_mut() {
                Some(name) if char != ',' || chars.next_if_eq(&',').is_some() => name.push(char),
                _ => names.push(String::new()),
            }
        }
        match names.as_slice() {
            [both] if !both.is_empty() => Ok(Self::Pem { certificate: both.into(), key: both.into() }),
            [certificate, key] if !certificate.is_empty() && !key.is_empty() => {
                Ok(Self::Pem { certificate: certificate.into(), key: key.into() })
            }
            _ => Err(OpenError::Option(text.to_owned())),
        }
    }

    /// The file that the certificate is in.
    fn path(&self) -> &Path {
        match self {
            Self::Pem { certificate: path, .. } | Self::Pkcs12(path) => path,
        }
    }

    fn key_path(&self) -> &Path {
        match self {
            Self::Pem { key: path, .. } | Self::Pkcs12(path) => path,
        }
    }

    fn read(&self, password: Option<&Secret>) -> Result<Found, OpenError> {
        match self {
            Self::Pem { certificate, key } => file::read_pem(certificate, key, password),
            Self::Pkcs12(path) => file::read_pkcs12(path, password),
        }
    }
}

/// Certificates and keys from files: RSA of 1024 to 4096 bits, P-256 and P-384.
///
/// The host can read the keys, so they are behind no secret of the store's own: what PIN is asked for is the card's
/// affair. Operations take no lock, and any number of them can run at once.
///
/// ```no_run
/// use emulated_card::keys::{KeyStore, pem::{PemSource, PemStore}};
///
/// let store = PemStore::open(&[PemSource::pem_option("card.crt,card.key")?], None)?;
/// assert_eq!(store.certificates()[0].name, "card");
/// # Ok::<(), emulated_card::keys::pem::OpenError>(())
/// ```
pub struct PemStore {
    certificates: Vec<Certificate>,
    keys: Arc<[Key]>,
}

impl PemStore {
    /// Reads 1 to 24 sources, each a file of at most 64 KiB, and decrypts those that are encrypted with `password`.
    ///
    /// A certificate's name is its PEM file's name without extension; in a PKCS#12 file the friendlyName, else the
    /// subject's common name. Where that would make two names equal, both are the files' paths instead.
    ///
    /// Files with private keys must be their owner's alone, as for ssh, also when they are encrypted.
    ///
    /// # Errors
    /// [`OpenError`], which names the file.
    pub fn open(sources: &[PemSource], password: Option<&Secret>) -> Result<Self, OpenError> {
        let (certificates, keys) = open_all(sources, password)?;
        Ok(Self { certificates, keys: keys.into() })
    }
}

/// As [`PemStore::open`]: certificates, and the key of each.
pub(super) fn open_all(
    sources: &[PemSource],
    password: Option<&Secret>,
) -> Result<(Vec<Certificate>, Vec<Key>), OpenError> {
    match sources.len() {
        0 => return Err(OpenError::NoSources),
        1..=MAX_CERTIFICATES => {}
        count => return Err(OpenError::TooManySources { count }),
    }
    // An empty password is none.
    let password = password.filter(|password| !password.is_empty());
    let mut certificates: Vec<Certificate> = Vec::with_capacity(sources.len());
    let mut keys = Vec::with_capacity(sources.len());
    for source in sources {
        let (certificate, key) = open_one(source, password)?;
        if let Some(at) = certificates.iter().position(|one| one.public_key == certificate.public_key) {
            let [first, second] = [&sources[at], source].map(|source| source.path().to_owned());
            return Err(OpenError::KeyTwice { first, second });
        }
        certificates.push(certificate);
        keys.push(key);
    }
    tell_apart(&mut certificates, sources);
    Ok((certificates, keys))
}

/// The private key, not encrypted, in the text of a PEM file.
pub(super) fn read_key(path: &Path, text: &[u8]) -> Result<PKey<Private>, OpenError> {
    file::key_in(path, text, None)
}

fn open_one(source: &PemSource, password: Option<&Secret>) -> Result<(Certificate, Key), OpenError> {
    let Found { certificates, key, name } = source.read(password)?;
    let path = source.path();
    let damaged = |_| OpenError::Contents { path: path.to_owned(), what: "holds a damaged certificate" };
    let mut unfit = None;
    for der in certificates {
        let (public_key, public) = match certificate::parse(&der).map_err(damaged)?.key() {
            Ok(parts) => parts,
            Err(reason) => {
                // That of an issuer may be of any kind.
                unfit.get_or_insert(reason);
                continue;
            }
        };
        let bad_key = |BadKey| OpenError::Contents {
            path: source.key_path().to_owned(),
            what: "holds a damaged private key",
        };
        if let Some(key) = Key::of(&public, &key).map_err(bad_key)? {
            let stem = || path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            let name = name.unwrap_or_else(stem);
            return Ok((Certificate { name, der, public_key, kind: public.kind() }, key));
        }
    }
    Err(match unfit {
        Some(reason) => OpenError::Unfit { path: path.to_owned(), reason: reason.to_string() },
        None => OpenError::Mismatch { certificate: path.to_owned(), key: source.key_path().to_owned() },
    })
}

/// Gives certificates of equal names the paths of their files for names.
fn tell_apart(certificates: &mut [Certificate], sources: &[PemSource]) {
    let mut count = HashMap::<String, usize>::new();
    for certificate in certificates.iter() {
        *count.entry(certificate.name.clone()).or_default() += 1;
    }
    for (certificate, source) in certificates.iter_mut().zip(sources) {
        if count.get(&certificate.name).is_some_and(|&count| count > 1) {
            certificate.name = source.path().to_string_lossy().into_owned();
        }
    }
}

impl fmt::Debug for PemStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.certificates.iter().map(|certificate| &certificate.name).collect();
        f.debug_struct("PemStore").field("certificates", &names).finish_non_exhaustive()
    }
}

impl KeyStore for PemStore {
    fn certificates(&self) -> &[Certificate] {
        &self.certificates
    }

    fn needs_secret(&self) -> bool {
        false
    }

    fn unlock(&self, _: &Secret) -> Result<Box<dyn Unlocked>, UnlockError> {
        Ok(Box::new(PemLogin { keys: Arc::clone(&self.keys) }))
    }
}

/// A private key as the operations want it: nothing is decoded or looked up in one.
pub(super) enum Key {
    Rsa { key: Rsa<Private>, modulus: Vec<u8> },
    Ec { curve: Curve, signer: EcKey<Private>, deriver: PKey<Private> },
}

impl Key {
    /// The key as that of a certificate with this public key; `None` if it is another's.
    pub(super) fn of(public: &PublicKey, key: &PKey<Private>) -> Result<Option<Self>, BadKey> {
        match public {
            PublicKey::Rsa { modulus, exponent } if key.id() == Id::RSA => {
                let key = key.rsa()?;
                if key.n().to_vec() != *modulus || key.e().to_vec() != *exponent {
                    return Ok(None);
                }
                // Numbers without bound would make one operation last for minutes.
                let bits = key.n().num_bits();
                let exponents_and_primes =
                    [Some(key.e()), Some(key.d()), key.p(), key.q(), key.dmp1(), key.dmq1()];
                if exponents_and_primes.into_iter().flatten().any(|number| number.num_bits() > bits) {
                    return Err(BadKey);
                }
                Ok(Some(Self::Rsa { key, modulus: modulus.clone() }))
            }
            PublicKey::Ec { curve, point } if key.id() == Id::EC => {
                let signer = key.ec_key()?;
                let group = signer.group();
                let name = match curve {
                    Curve::P256 => Nid::X9_62_PRIME256V1,
                    Curve::P384 => Nid::SECP384R1,
                };
                if group.curve_name() != Some(name) {
                    return Ok(None);
                }
                let form = PointConversionForm::UNCOMPRESSED;
                if signer.public_key().to_bytes(group, form, &mut *BigNumContext::new()?)? != *point {
                    return Ok(None);
                }
                let deriver = PKey::from_ec_key(signer.clone())?;
                Ok(Some(Self::Ec { curve: *curve, signer, deriver }))
            }
            _ => Ok(None),
        }
    }

    pub(super) fn kind(&self) -> KeyKind {
        match self {
            Self::Rsa { modulus, .. } => KeyKind::Rsa { bits: modulus.len() * 8 },
            Self::Ec { curve, .. } => KeyKind::Ec(*curve),
        }
    }

    /// As [`Unlocked::rsa_raw`].
    pub(super) fn rsa_raw(&self, block: &[u8]) -> Result<Secret, KeyError> {
        let Key::Rsa { key, modulus } = self else { return Err(KeyError::Block) };
        // Of two numbers of equal length, the greater one is the greater string of bytes.
        if block.len() != modulus.len() || block >= &modulus[..] {
            return Err(KeyError::Block);
        }
        // The crate panics when the room is too small.
        if key.size() as usize != block.len() {
            return Err(KeyError::Failed(format!("OpenSSL gives {} bytes for {}", key.size(), block.len())));
        }
        let mut result = Zeroizing::new(vec![0; block.len()]);
        let written = key.private_encrypt(block, &mut result, Padding::NONE).map_err(failed)?;
        if written != block.len() {
            return Err(KeyError::Failed(format!("OpenSSL gave {written} bytes for {}", block.len())));
        }
        Ok(Secret::new(std::mem::take(&mut *result)))
    }

    /// As [`Unlocked::ecdsa`].
    pub(super) fn ecdsa(&self, digest: &[u8]) -> Result<Vec<u8>, KeyError> {
        let Key::Ec { curve, signer, .. } = self else { return Err(KeyError::Block) };
        let length = curve.field_len();
        if digest.len() > length {
            return Err(KeyError::Block);
        }
        let signature = EcdsaSig::sign(digest, signer).map_err(failed)?;
        let padded = length as i32;
        let [r, s] = [signature.r(), signature.s()].map(|number| number.to_vec_padded(padded));
        Ok([r.map_err(failed)?, s.map_err(failed)?].concat())
    }

    /// As [`Unlocked::ecdh`].
    pub(super) fn ecdh(&self, point: &[u8]) -> Result<Secret, KeyError> {
        let Key::Ec { curve, signer, deriver } = self else { return Err(KeyError::Block) };
        let length = curve.field_len();
        if point.len() != 1 + 2 * length || point.first() != Some(&0x04) {
            return Err(KeyError::Block);
        }
        let mut context = BigNumContext::new().map_err(failed)?;
        // Fails if the point is not on the curve.
        let point = EcPoint::from_bytes(signer.group(), point, &mut context).map_err(|_| KeyError::Block)?;
        let peer =
            EcKey::from_public_key(signer.group(), &point).and_then(PKey::from_ec_key).map_err(failed)?;
        let mut derivation = Deriver::new(deriver).map_err(failed)?;
        derivation.set_peer(&peer).map_err(failed)?;
        let mut shared = Zeroizing::new(vec![0; length]);
        let written = derivation.derive(&mut shared).map_err(failed)?;
        if written != length {
            return Err(KeyError::Failed(format!("OpenSSL gave {written} bytes for {length}")));
        }
        Ok(Secret::new(std::mem::take(&mut *shared)))
    }
}

/// OpenSSL read something as a key that it cannot be.
pub(super) struct BadKey;

impl From<ErrorStack> for BadKey {
    fn from(_: ErrorStack) -> Self {
        Self
    }
}

struct PemLogin {
    keys: Arc<[Key]>,
}

impl PemLogin {
    fn key(&self, index: usize) -> Result<&Key, KeyError> {
        self.keys
            .get(index)
            .ok_or_else(|| KeyError::Failed(format!("there is no certificate number {index}")))
    }
}

impl Unlocked for PemLogin {
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

pub(super) fn failed(errors: ErrorStack) -> KeyError {
    KeyError::Failed(errors.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_option_names_one_file_or_two() {
        let pem = |certificate: &str, key: &str| PemSource::Pem {
            certificate: certificate.into(),
            key: key.into(),
        };
        let parsed = |text| PemSource::pem_option(text).ok();
        assert_eq!(parsed("a.pem,b.key"), Some(pem("a.pem", "b.key")));
        assert_eq!(parsed("a.pem"), Some(pem("a.pem", "a.pem")));
        assert_eq!(parsed("a,,b,c,,"), Some(pem("a,b", "c,")));
        for wrong in ["", ",", "a,", ",b", "a,b,c"] {
            assert_eq!(parsed(wrong), None, "{wrong}");
        }
    }
}
