//! A PIN that was right, as this process knows it again.

use sha2::{Digest, Sha256};
use vscard_protocol::Secret;
use zeroize::Zeroizing;

use super::hash::PinHash;

/// What a right PIN leaves for the next VERIFY, so that it need not take the time of a [`PinHash`] again: a hash under a
/// random key that is this process's alone. Whoever reads its memory finds the PIN by trial.
#[derive(Debug)]
pub(super) struct Known {
    /// What the PIN was compared with. With another one on disk, this one means nothing.
    hash: PinHash,
    key: Secret,
    digest: Secret,
}

impl Known {
    /// `pin` was compared with `hash`, and is right.
    pub(super) fn new(hash: &PinHash, pin: &Secret) -> Option<Self> {
        let mut key = Zeroizing::new(vec![0; 32]);
        // Without randomness it goes on as slowly.
        getrandom::fill(&mut key).ok()?;
        let key = Secret::new(std::mem::take(&mut *key));
        let digest = digest(&key, pin);
        Some(Self { hash: hash.clone(), key, digest })
    }

    /// Whether `pin` is the one; `None` if the card has another hash now.
    pub(super) fn is(&self, hash: &PinHash, pin: &Secret) -> Option<bool> {
        (self.hash == *hash).then(|| self.digest.equals(digest(&self.key, pin).expose()))
    }
}

/// Keyed by what stands before: the key has one length, and nobody sees the digest.
fn digest(key: &Secret, pin: &Secret) -> Secret {
    let mut hash = Sha256::new_with_prefix(key.expose());
    hash.update(pin.expose());
    Secret::new(hash.finalize().to_vec())
}

#[cfg(test)]
mod tests {
    use super::super::hash::Cost;
    use super::*;

    #[test]
    fn a_pin_is_known_again_as_long_as_its_hash_is_the_same() {
        let secret = |bytes: &[u8]| Secret::from(bytes);
        let pin = secret(b"123456");
        let [hash, anew] = [(), ()].map(|()| PinHash::of(&pin, Cost::Memory).unwrap());
        let known = Known::new(&hash, &pin).unwrap();
        assert_eq!(known.is(&hash, &pin), Some(true));
        for wrong in [&b""[..], b"12345", b"123457", b"1234567"] {
            assert_eq!(known.is(&hash, &secret(wrong)), Some(false));
        }
        assert_eq!(known.is(&anew, &pin), None);
        // Each has a key of its own.
        assert_ne!(Known::new(&hash, &pin).unwrap().digest.expose(), known.digest.expose());
    }
}
