//! Who a card is, and who has it open.

use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use rustix::io::Errno;
use sha2::{Digest, Sha256};

use super::directory::{FileLock, try_lock};
use super::format::Contents;
use super::record::{Record, card_stem};
use super::{StateDirectory, StateError, hash_with_length, hex};
use crate::keys::Certificate;

/// Who a card is: derived from its certificates' public keys and its name, with nothing random, so that the same
/// certificates make the same card (and the same serial numbers) in each run. A renewed certificate for the same key
/// leaves the card what it is; another key makes another card.
///
/// What [`StateDirectory::claim`] gave is kept in the card's state: the card stays the same for its users even if a
/// later version derives the identity of new cards in another way.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct CardId {
    /// Finds the card's state.
    key: [u8; 32],
    /// What the serial numbers are cut from. The same as the key, unless the state says otherwise.
    identity: [u8; 32],
}

impl CardId {
    /// The identity of the card with these certificates, in this order, and this name.
    pub fn derive(certificates: &[Certificate], card_name: &str) -> Self {
        let mut hash = Sha256::new_with_prefix("vscard card identity 1\0");
        hash.update((certificates.len() as u64).to_be_bytes());
        for certificate in certificates {
            hash_with_length(&mut hash, &certificate.public_key);
        }
        hash_with_length(&mut hash, card_name.as_bytes());
        let key = hash.finalize().into();
        Self { key, identity: key }
    }

    /// The GUID of the card holder unique identifier (SP 800-73-4 Part 1 §3.1.2), of a form made for values that
    /// are neither random nor of a name space (RFC 9562 §5.8). Two cards differ in its first 13 bytes: Windows
    /// puts the others to a use of its own.
    pub fn guid(&self) -> [u8; 16] {
        let mut guid = self.cut();
        guid[6] = 0x80 | guid[6] & 0x0F;
        guid[8] = 0x80 | guid[8] & 0x3F;
        guid
    }

    /// The card's own part of the card identifier in a card capability container (GSC-IS 2.1 §7.1), which
    /// middleware takes for the token's serial number.
    pub(crate) fn card_identifier(&self) -> [u8; 14] {
        self.cut()
    }

    /// The chip's serial number and batch in card production life cycle data.
    pub(crate) fn chip_serial(&self) -> [u8; 6] {
        self.cut()
    }

    /// All are the same beginning, so that whoever sees two of them sees that it is one card.
    fn cut<const N: usize>(&self) -> [u8; N] {
        std::array::from_fn(|at| self.identity[at])
    }

    pub(super) fn key(&self) -> &[u8; 32] {
        &self.key
    }
}

impl std::fmt::Debug for CardId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CardId({})", hex(&self.identity[..4]))
    }
}

impl StateDirectory {
    /// Claims the card `id` of `database` for as long as the result lives.
    ///
    /// `database` is the canonical path, so that one database has one name. The claim is a lock that the kernel
    /// drops with the process, however that ends. The claim's [`CardClaim::id`] is the identity to give the card:
    /// the one it had the first time.
    ///
    /// # Errors
    /// [`StateError::InUse`] while another opener, in this process or another, holds the same card; state that is
    /// damaged or not this user's.
    pub fn claim(&self, database: &Path, id: &CardId) -> Result<CardClaim, StateError> {
        let Some(lock) = self.lock_claim(&card_stem(database, id))? else {
            return Err(StateError::InUse { database: database.to_owned(), card: hex(&id.key[..4]) });
        };
        let record = Record::of_card(self, database, id);
        let kept = record.read()?.and_then(|contents| contents.identity);
        if kept.is_none() {
            match keep(&record, id.identity) {
                // On a full or read-only disk the card is there, though no PIN is taken.
                Err(error @ StateError::Io { .. }) => {
                    tracing::warn!("the card's identity is not kept: {error}")
                }
                other => other?,
            }
        }
        let identity = kept.unwrap_or(id.identity);
        let id = CardId { identity, ..*id };
        Ok(CardClaim { _lock: lock, database: database.to_owned(), id })
    }

    /// Claims the token that `token` describes, for as long as the result lives.
    ///
    /// # Errors
    /// [`StateError::TokenInUse`] while another card, in this process or another, is on it.
    #[cfg(all(unix, feature = "nss"))]
    pub(crate) fn claim_token(&self, token: &str) -> Result<TokenClaim, StateError> {
        match self.lock_claim(&super::record::token_stem(token))? {
            Some(lock) => Ok(TokenClaim { _lock: lock }),
            None => Err(StateError::TokenInUse { token: token.to_owned() }),
        }
    }

    /// `None` while another has that lock.
    fn lock_claim(&self, stem: &str) -> Result<Option<FileLock>, StateError> {
        let directory = self.open_or_create()?;
        let name = format!("{stem}.claim");
        // The card can be claimed (not verified) where nothing can be written, if it was claimed there before.
        let file = match directory.open_lock_file(&name, OFlags::RDWR) {
            Err(error) if is_read_only(&error) => directory.open_lock_file(&name, OFlags::RDONLY)?,
            other => other?,
        };
        let locked = try_lock(&file).map_err(|source| directory.io_error(&name, "lock", source))?;
        Ok(locked.then(|| FileLock(file)))
    }
}

fn keep(record: &Record, identity: [u8; 32]) -> Result<(), StateError> {
    let mut locked = record.lock()?;
    let contents = locked.read()?.unwrap_or_default();
    locked.write(&Contents { identity: Some(identity), ..contents })
}

fn is_read_only(error: &StateError) -> bool {
    let StateError::Io { source, .. } = error else { return false };
    source.raw_os_error().map(Errno::from_raw_os_error) == Some(Errno::ROFS)
}

/// A card's hold on its identity, from [`StateDirectory::claim`]. Dropping it lets another opener have the card.
#[derive(Debug)]
pub struct CardClaim {
    _lock: FileLock,
    database: PathBuf,
    id: CardId,
}

impl CardClaim {
    /// The identity that is held.
    pub fn id(&self) -> &CardId {
        &self.id
    }

    /// The database of the card.
    pub fn database(&self) -> &Path {
        &self.database
    }
}

/// A card's hold on a token, from [`StateDirectory::claim_token`]. Dropping it lets another card have the token.
#[cfg(all(unix, feature = "nss"))]
#[derive(Debug)]
pub(crate) struct TokenClaim {
    _lock: FileLock,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::KeyKind;

    fn certificate(public_key: &[u8]) -> Certificate {
        Certificate {
            name: "any".into(),
            der: b"any".to_vec(),
            public_key: public_key.to_vec(),
            kind: KeyKind::Rsa { bits: 2048 },
        }
    }

    #[test]
    fn identity_depends_on_keys_their_order_and_the_name() {
        let id = |keys: &[&[u8]], name| {
            CardId::derive(&keys.iter().map(|key| certificate(key)).collect::<Vec<_>>(), name)
        };
        let ids = [
            id(&[b"a", b"b"], ""),
            id(&[b"b", b"a"], ""),
            id(&[b"ab"], ""),
            id(&[b"a"], "b"),
            id(&[b"a", b"b"], "second"),
            id(&[], ""),
        ];
        for (at, one) in ids.iter().enumerate() {
            assert!(!ids[..at].contains(one), "{at}");
        }
        assert_eq!(ids[0], id(&[b"a", b"b"], ""));
    }

    /// Serial numbers are derived from it: another value would be another card for every user.
    #[test]
    fn identity_never_changes() {
        let id = CardId::derive(&[certificate(b"key")], "name");
        assert_eq!(hex(&id.key), "a41fa787c530a6f73c97d143f07a16da1063f1d0a1eb7882388370076834f961");
        assert_eq!(hex(&id.guid()), "a41fa787c53086f7bc97d143f07a16da");
        assert_eq!(hex(&id.card_identifier()), "a41fa787c530a6f73c97d143f07a");
        assert_eq!(hex(&id.chip_serial()), "a41fa787c530");
        assert_eq!(format!("{id:?}"), "CardId(a41fa787)");
    }
}
