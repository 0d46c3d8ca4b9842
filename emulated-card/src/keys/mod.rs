//! Where a card's certificates and private keys live.
//!
//! Applets see only these traits; a store never sees an APDU.

#[cfg(all(unix, feature = "nss"))]
pub mod nss;

use thiserror::Error;
use vscard_protocol::Secret;

/// What kind of key a certificate certifies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyKind {
    /// RSA with a modulus of that many bits.
    Rsa {
        /// Modulus length in bits.
        bits: usize,
    },
}

impl KeyKind {
    /// Length of one raw block in bytes (the modulus).
    pub fn block_len(self) -> usize {
        match self {
            Self::Rsa { bits } => bits.div_ceil(8),
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

/// A place that holds certificates and private keys. All calls may block.
pub trait KeyStore: Send + Sync {
    /// The certificates, in the order they were asked for; each has a private key.
    fn certificates(&self) -> &[Certificate];

    /// Whether the private keys are behind a secret. If not, [`unlock`](Self::unlock) ignores what it is given.
    fn needs_secret(&self) -> bool;

    /// Logs in. Dropping the result is logout.
    ///
    /// # Errors
    /// [`UnlockError`]; after any error nothing is logged in, an earlier login of this store included.
    fn unlock(&self, secret: &Secret) -> Result<Box<dyn Unlocked>, UnlockError>;
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
    /// The secret was not compared, so nothing is known about it.
    #[error("the password could not be checked: {0}")]
    NotChecked(String),
}

/// Why a private-key operation failed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum KeyError {
    /// The block has the wrong length, or is not below the modulus.
    #[error("the block does not fit the key")]
    Block,
    /// This login is over.
    #[error("not logged in")]
    LoggedOut,
    /// The store failed.
    #[error("private-key operation failed: {0}")]
    Failed(String),
}
