//! Bytes that must not be seen: PINs, passwords, key material.

use std::fmt;

use zeroize::Zeroizing;

/// Bytes that are wiped when dropped and never shown by `Debug`.
///
/// PINs, passwords, private-key results and the bodies of APDUs are kept in this one type, so that a log line,
/// a panic message or a derived `Debug` cannot carry them.
///
/// ```
/// let pin = vscard_protocol::Secret::from(&b"123456"[..]);
/// assert_eq!(format!("{pin:?}"), "Secret(6 bytes)");
/// ```
#[derive(Clone, Default)]
pub struct Secret(Zeroizing<Vec<u8>>);

impl Secret {
    /// Takes ownership of `bytes`; the allocation is wiped when the secret is dropped.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// The bytes themselves. Whoever copies them out is responsible for the copy.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are no bytes at all.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Appends `bytes`. Growing copies into a new allocation and wipes the old one.
    pub fn extend(&mut self, bytes: &[u8]) {
        if self.0.capacity() - self.0.len() < bytes.len() {
            // A plain Vec would leave the old allocation behind unwiped.
            let mut grown = Vec::with_capacity((self.0.len() + bytes.len()).next_power_of_two());
            grown.extend_from_slice(&self.0);
            self.0 = Zeroizing::new(grown);
        }
        self.0.extend_from_slice(bytes);
    }

    /// Compares in time that depends on the lengths only.
    pub fn equals(&self, other: &[u8]) -> bool {
        let unequal = self.0.iter().zip(other).fold(0, |seen, (a, b)| seen | (a ^ b));
        self.0.len() == other.len() && std::hint::black_box(unequal) == 0
    }
}

impl From<&[u8]> for Secret {
    fn from(bytes: &[u8]) -> Self {
        Self::new(bytes.to_vec())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secret({} bytes)", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_shows_the_length_only() {
        assert_eq!(format!("{:?}", Secret::from(&b"hunter2"[..])), "Secret(7 bytes)");
    }

    #[test]
    fn equality_needs_equal_length() {
        let secret = Secret::from(&b"1234"[..]);
        assert!(secret.equals(b"1234"));
        assert!(!secret.equals(b"123"));
        assert!(!secret.equals(b"12345"));
        assert!(!secret.equals(b"1235"));
    }

    #[test]
    fn extend_keeps_what_was_there() {
        let mut secret = Secret::default();
        for byte in 0..=255 {
            secret.extend(&[byte]);
        }
        assert_eq!(secret.expose(), (0..=255).collect::<Vec<u8>>());
    }
}
