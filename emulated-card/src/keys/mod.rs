//! Where a card's certificates and private keys live.
//!
//! Applets see only these traits; a store never sees an APDU.

#[cfg(any(feature = "nss", feature = "pem"))]
mod certificate;
#[cfg(all(unix, feature = "nss"))]
pub mod nss;
#[cfg(feature = "pem")]
pub mod pem;
pub mod writable;
#[cfg(feature = "pem")]
pub mod written;

use thiserror::Error;
use vscard_protocol::Secret;

/// A curve of SP 800-78-4 table 3-1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Curve {
    /// NIST P-256.
    P256,
    /// NIST P-384.
    P384,
}

impl Curve {
    /// Length of a field element in bytes: of one coordinate, of each half of a signature.
    pub fn field_len(self) -> usize {
        match self {
            Self::P256 => 32,
            Self::P384 => 48,
        }
    }
}

/// What kind of key a certificate certifies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyKind {
    /// RSA with a modulus of that many bits, 1024 to 4096 in whole bytes.
    Rsa {
        /// Modulus length in bits.
        bits: usize,
    },
    /// A key on that curve.
    Ec(Curve),
}

impl KeyKind {
    /// Length in bytes of what a private-key operation works on: the modulus, or a field element.
    pub fn block_len(self) -> usize {
        match self {
            Self::Rsa { bits } => bits.div_ceil(8),
            Self::Ec(curve) => curve.field_len(),
        }
    }
}

impl std::fmt::Display for KeyKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Rsa { bits } => write!(f, "RSA, {bits} bits"),
            Self::Ec(Curve::P256) => f.write_str("P-256"),
            Self::Ec(Curve::P384) => f.write_str("P-384"),
        }
    }
}

/// A certificate whose private key the store holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// The name it was asked for by (in NSS, the nickname).
    pub name: String,
    /// The certificate, DER.
    pub der: Vec<u8>,
    /// Its SubjectPublicKeyInfo, DER.
    pub public_key: Vec<u8>,
    /// Kind and size of the key.
    pub kind: KeyKind,
}

impl Certificate {
    /// notBefore and notAfter, since 1970.
    #[cfg(all(unix, feature = "nss", feature = "pem", feature = "pcsc"))]
    pub(crate) fn validity(&self) -> Option<(std::time::Duration, std::time::Duration)> {
        let (not_after, not_before) = certificate::parse(&self.der).ok()?.validity;
        Some((not_before, not_after))
    }
}

/// A place that holds certificates and private keys. All calls may block.
pub trait KeyStore: Send + Sync {
    /// The certificates, in the order they were asked for; each has a private key.
    fn certificates(&self) -> &[Certificate];

    /// Whether the private keys are behind a secret. If not, [`unlock`](Self::unlock) ignores what it is given.
    fn needs_secret(&self) -> bool;

    /// How many tries the store itself leaves for the secret, at most; `None` if it does not say.
    fn tries_hint(&self) -> Option<u8> {
        None
    }

    /// Whether the store itself says that a wrong secret was given since the last right one, by whomever; `None` if it
    /// does not say.
    fn was_wrong(&self) -> Option<bool> {
        None
    }

    /// Logs in. Dropping the result is logout.
    ///
    /// # Errors
    /// [`UnlockError`]; after any error nothing is logged in, an earlier login of this store included.
    fn unlock(&self, secret: &Secret) -> Result<Box<dyn Unlocked>, UnlockError>;

    /// As [`unlock`](Self::unlock), with a secret that is not the card's PIN and that this process has as long as it
    /// runs: what makes later logins quicker may outlive this one, until [`forget`](Self::forget).
    ///
    /// # Errors
    /// As [`unlock`](Self::unlock).
    fn unlock_held(&self, secret: &Secret) -> Result<Box<dyn Unlocked>, UnlockError> {
        self.unlock(secret)
    }

    /// Forgets what logins by [`unlock_held`](Self::unlock_held) left for the next one.
    fn forget(&self) {}

    /// Whether there is something to [`forget`](Self::forget).
    fn remembers(&self) -> bool {
        false
    }

    /// The store as one whose data objects and keys change, or have been changed; `None` if all it has is
    /// [`certificates`](Self::certificates) and their keys.
    fn writable(&self) -> Option<&dyn writable::Writable> {
        None
    }
}

impl std::fmt::Debug for dyn KeyStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names = self.certificates().iter().map(|certificate| &certificate.name);
        f.debug_list().entries(names).finish()
    }
}

/// A store that is logged in. Private keys are reachable through it alone.
pub trait Unlocked: Send + Sync {
    /// The raw RSA operation, `block` to the private exponent, for the certificate at `index` of
    /// [`KeyStore::certificates`].
    ///
    /// `block` and result have the length of the modulus, leading zeros kept.
    ///
    /// # Errors
    /// [`KeyError`].
    fn rsa_raw(&self, index: usize, block: &[u8]) -> Result<Secret, KeyError>;

    /// An ECDSA signature over `digest`, which is at most as long as a field element: the numbers r and s, each as
    /// long as a field element.
    ///
    /// # Errors
    /// [`KeyError`].
    fn ecdsa(&self, index: usize, digest: &[u8]) -> Result<Vec<u8>, KeyError>;

    /// The shared secret of ECDH with a peer's public key `point`, uncompressed (04, x, y): the x coordinate, as
    /// long as a field element.
    ///
    /// # Errors
    /// [`KeyError`]; a point that is not on the key's curve is [`KeyError::Block`].
    fn ecdh(&self, index: usize, point: &[u8]) -> Result<Secret, KeyError>;
}

/// Why a store did not unlock.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum UnlockError {
    /// The secret was compared and is wrong.
    #[error("wrong password")]
    Wrong,
    /// The store itself has blocked the secret.
    #[error("the password is locked")]
    Locked,
    /// No password of the store is like this one, by its length or a byte of it, so it was not compared.
    #[error("the password cannot be right: {0}")]
    Unfit(String),
    /// The secret was not compared, so nothing is known about it.
    #[error("the password could not be checked: {0}")]
    NotChecked(String),
    /// The store had the secret, failed, and may have counted it as wrong.
    #[error("the password may not have been checked: {0}")]
    Unclear(String),
}

/// Why a private-key operation failed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum KeyError {
    /// What is to be worked on does not fit the key: a block of another length or not below the modulus, a digest
    /// longer than the field, a point not on the curve, an operation that keys of this kind do not have.
    #[error("the block does not fit the key")]
    Block,
    /// This login is over.
    #[error("not logged in")]
    LoggedOut,
    /// The store failed.
    #[error("private-key operation failed: {0}")]
    Failed(String),
}
