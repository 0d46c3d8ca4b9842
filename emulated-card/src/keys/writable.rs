//! What a card's administrator may change on it (SP 800-73-4 Part 2 §3.3).

use thiserror::Error;
use vscard_protocol::Secret;

use super::{KeyError, KeyKind};
use crate::slot::PivSlot;

/// What the card management key encrypts with (SP 800-78-4 table 6-2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ManagementAlgorithm {
    /// Triple DES with three keys, 24 bytes.
    TripleDes,
    /// AES with a key of 16 bytes.
    Aes128,
    /// AES with a key of 24 bytes.
    Aes192,
    /// AES with a key of 32 bytes.
    Aes256,
}

impl ManagementAlgorithm {
    /// The one with that identifier in P1. Triple DES has two.
    pub(crate) fn of_identifier(identifier: u8) -> Option<Self> {
        Some(match identifier {
            0x00 | 0x03 => Self::TripleDes,
            0x08 => Self::Aes128,
            0x0A => Self::Aes192,
            0x0C => Self::Aes256,
            _ => return None,
        })
    }

    /// Length of a block in bytes.
    pub(crate) fn block_len(self) -> usize {
        match self {
            Self::TripleDes => 8,
            Self::Aes128 | Self::Aes192 | Self::Aes256 => 16,
        }
    }

    /// Length of a key in bytes.
    pub fn key_len(self) -> usize {
        match self {
            Self::Aes128 => 16,
            Self::TripleDes | Self::Aes192 => 24,
            Self::Aes256 => 32,
        }
    }
}

/// The public half of a key that was generated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NewKey {
    /// Numbers without leading zeros.
    Rsa {
        /// The modulus.
        modulus: Vec<u8>,
        /// The public exponent.
        exponent: Vec<u8>,
    },
    /// A point, uncompressed: 04, x, y.
    Ec {
        /// The point.
        point: Vec<u8>,
    },
}

/// Why something was not written.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum WriteError {
    /// No key was generated.
    #[error("no key could be generated: {0}")]
    Key(String),
    /// It could not be kept.
    #[error("{0}")]
    Storage(String),
}

/// A store of data objects and keys that change while the card is in use. Whoever asks has made sure that the
/// card's administrator wants it.
///
/// A change is kept when the call returns, and is all or nothing whenever the process ends. After an error the store
/// goes on with what there was. When it is opened again it may find the new all the same, if the disk failed only in the
/// last step ([`WriteError::Storage`]).
pub trait Writable: Send + Sync {
    /// The algorithm of the card management key; `None` if there is none, and nothing can be written.
    fn management(&self) -> Option<ManagementAlgorithm>;

    /// A block encrypted by the card management key. Does not block.
    ///
    /// # Errors
    /// [`KeyError`].
    fn encrypt(&self, block: &[u8]) -> Result<Secret, KeyError>;

    /// What was written to the data object with the tag 5FC1 and this byte: nothing at all if it was deleted; `None`
    /// if it is as the card had it from the start. Does not block.
    fn object(&self, tag: u8) -> Option<Vec<u8>>;

    /// The key in a slot: its index as for [`Unlocked`](super::Unlocked), and its kind. Does not block.
    fn key(&self, slot: PivSlot) -> Option<(usize, KeyKind)>;

    /// Replaces what is in the data object with the tag 5FC1 and this byte; empty `content` deletes it.
    ///
    /// # Errors
    /// [`WriteError`].
    fn put(&self, tag: u8, content: &[u8]) -> Result<(), WriteError>;

    /// Makes a new key and puts it into a slot, instead of the one that is there. A certificate stays.
    ///
    /// # Errors
    /// [`WriteError`].
    fn generate(&self, slot: PivSlot, kind: KeyKind) -> Result<NewKey, WriteError>;
}
