//! Answer to reset (ISO/IEC 7816-3 §8).

use std::fmt;

use thiserror::Error;

/// Longest ATR: TS and 32 characters (ISO/IEC 7816-3 §8.1).
pub const MAX_ATR: usize = 33;

/// Why bytes are not an ATR. Offsets count from TS.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum AtrError {
    /// Shorter than its own TS, T0, interface and historical bytes say.
    #[error("ATR of {length} bytes ends before {field} at offset {offset}")]
    Short {
        /// The missing field.
        field: &'static str,
        /// Where it would be.
        offset: usize,
        /// Bytes there were.
        length: usize,
    },
    /// TS is neither direct (3B) nor inverse (3F) convention.
    #[error("TS at offset 0 is {0:02X}, not 3B or 3F")]
    Convention(u8),
    /// TCK is missing though a protocol other than T=0 is offered, or does not make the sum zero.
    #[error("TCK at offset {offset} is missing or wrong")]
    Check {
        /// Where TCK is, or would be.
        offset: usize,
    },
    /// Bytes after the last field.
    #[error("{extra} bytes follow the end of the ATR at offset {offset}")]
    Trailing {
        /// Where the ATR ends.
        offset: usize,
        /// Bytes after that.
        extra: usize,
    },
    /// More than 33 bytes, or more than 15 historical bytes.
    #[error("{field} of {value} is too much for an ATR")]
    TooLong {
        /// What is too long: `length` or `historical bytes`.
        field: &'static str,
        /// How long it is, in bytes.
        value: usize,
    },
}

/// An answer to reset, checked.
///
/// ```
/// use vscard_protocol::Atr;
/// let atr = Atr::parse(&[0x3B, 0x84, 0x40, 0x01, 0x56, 0x53, 0x43, 0x43])?;
/// assert_eq!(atr.historical(), b"VSCC");
/// assert_eq!(atr.protocols().collect::<Vec<_>>(), [0]);
/// assert_eq!(atr.tc2(), Some(1));
/// # Ok::<(), vscard_protocol::atr::AtrError>(())
/// ```
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Atr {
    raw: Vec<u8>,
    /// T values in the order offered; at least one (T=0 when no TD1 says otherwise).
    protocols: Vec<u8>,
    tc2: Option<u8>,
    historical: (usize, usize),
}

impl Atr {
    /// Parses and checks an ATR.
    ///
    /// # Errors
    /// [`AtrError`] names the field that is wrong.
    pub fn parse(bytes: &[u8]) -> Result<Self, AtrError> {
        if bytes.len() > MAX_ATR {
            return Err(AtrError::TooLong { field: "length", value: bytes.len() });
        }
        let at = |offset: usize, field| {
            bytes.get(offset).copied().ok_or(AtrError::Short { field, offset, length: bytes.len() })
        };
        match at(0, "TS")? {
            0x3B | 0x3F => {}
            other => return Err(AtrError::Convention(other)),
        }
        let t0 = at(1, "T0")?;
        let Interface { protocols, tc2, end: offset } = Interface::parse(bytes)?;
        let has_tck = bytes.len() > 2 && Self::needs_check(bytes);
        let count = usize::from(t0 & 0x0F);
        if count > 0 {
            at(offset + count - 1, "the last historical byte")?;
        }
        let historical = (offset, offset + count);
        let mut end = historical.1;
        if has_tck {
            let sum = bytes.get(1..=end).map(|checked| checked.iter().fold(0, |sum, byte| sum ^ byte));
            if sum != Some(0) {
                return Err(AtrError::Check { offset: end });
            }
            end += 1;
        }
        if bytes.len() > end {
            return Err(AtrError::Trailing { offset: end, extra: bytes.len() - end });
        }
        Ok(Self { raw: bytes.to_vec(), protocols, tc2, historical })
    }

    /// What a real card answered, taken as it is: cards in use have ATRs with a wrong TCK, too few or too many
    /// bytes, and no card is refused for that. The bytes are kept (33 at most); what cannot be read in them is
    /// missing.
    pub fn from_card(bytes: &[u8]) -> Self {
        let bytes = &bytes[..bytes.len().min(MAX_ATR)];
        Self::parse(bytes).unwrap_or_else(|_| {
            let Interface { protocols, tc2, end } = Interface::parse(bytes).unwrap_or(Interface {
                protocols: vec![0],
                tc2: None,
                end: bytes.len(),
            });
            let count = bytes.get(1).map_or(0, |t0| usize::from(t0 & 0x0F));
            let historical = (end, bytes.len().min(end + count));
            Self { raw: bytes.to_vec(), protocols, tc2, historical }
        })
    }

    /// Whether any TD names something other than T=0, which makes TCK mandatory (§8.2.5).
    fn needs_check(bytes: &[u8]) -> bool {
        let (mut offset, mut present) = (2, bytes[1] >> 4);
        while present & 8 != 0 {
            offset += (present & 7).count_ones() as usize;
            let Some(td) = bytes.get(offset) else { return false };
            if td & 0x0F != 0 {
                return true;
            }
            present = td >> 4;
            offset += 1;
        }
        false
    }

    /// A T=0 ATR with the waiting-time integer TC2 = 1.
    ///
    /// Behind QEMU's `usb-ccid` this bounds a Linux guest's wait for an answer to about 23 seconds; without TC2
    /// the guest waits for ever on a silent card.
    ///
    /// # Errors
    /// [`AtrError::TooLong`] for more than 15 historical bytes.
    pub fn t0(historical: &[u8]) -> Result<Self, AtrError> {
        Self::build(&[0x40, 0x01], 0x80, historical, false)
    }

    /// A T=1 ATR: IFSC 254, block waiting time BWI 4, character waiting time CWI 5, LRC.
    ///
    /// # Errors
    /// [`AtrError::TooLong`] for more than 15 historical bytes.
    pub fn t1(historical: &[u8]) -> Result<Self, AtrError> {
        Self::build(&[0x81, 0x31, 0xFE, 0x45], 0x80, historical, true)
    }

    fn build(interface: &[u8], y1: u8, historical: &[u8], check: bool) -> Result<Self, AtrError> {
        if historical.len() > 15 {
            return Err(AtrError::TooLong { field: "historical bytes", value: historical.len() });
        }
        let mut raw = vec![0x3B, y1 | historical.len() as u8];
        raw.extend_from_slice(interface);
        raw.extend_from_slice(historical);
        if check {
            raw.push(raw[1..].iter().fold(0, |sum, byte| sum ^ byte));
        }
        Self::parse(&raw)
    }

    /// The bytes, TS to TCK.
    pub fn as_bytes(&self) -> &[u8] {
        &self.raw
    }

    /// The transmission protocols offered (T values, 0 to 14), in order.
    pub fn protocols(&self) -> impl Iterator<Item = u8> + '_ {
        self.protocols.iter().copied()
    }

    /// Waiting-time integer WI for T=0 (TC2), if given.
    pub fn tc2(&self) -> Option<u8> {
        self.tc2
    }

    /// Historical bytes, at most 15.
    pub fn historical(&self) -> &[u8] {
        &self.raw[self.historical.0..self.historical.1]
    }
}

/// T0 and what follows it, to the historical bytes (§8.2).
struct Interface {
    protocols: Vec<u8>,
    tc2: Option<u8>,
    /// Where the historical bytes begin.
    end: usize,
}

impl Interface {
    fn parse(bytes: &[u8]) -> Result<Self, AtrError> {
        let at = |offset: usize, field| {
            bytes.get(offset).copied().ok_or(AtrError::Short { field, offset, length: bytes.len() })
        };
        let mut present = at(1, "T0")? >> 4;
        let mut offset = 2;
        let mut protocols = Vec::new();
        let mut tc2 = None;
        let mut level = 1;
        loop {
            for (bit, field) in [(1, "TA"), (2, "TB"), (4, "TC")] {
                if present & bit != 0 {
                    let value = at(offset, field)?;
                    if field == "TC" && level == 2 {
                        tc2 = Some(value);
                    }
                    offset += 1;
                }
            }
            if present & 8 == 0 {
                break;
            }
            let td = at(offset, "TD")?;
            offset += 1;
            // T=15 only qualifies the interface bytes that follow; it is no protocol (§8.2.3).
            if td & 0x0F != 15 && !protocols.contains(&(td & 0x0F)) {
                protocols.push(td & 0x0F);
            }
            present = td >> 4;
            level += 1;
        }
        if protocols.is_empty() {
            protocols.push(0);
        }
        Ok(Self { protocols, tc2, end: offset })
    }
}

impl fmt::Display for Atr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.raw.iter().try_for_each(|byte| write!(f, "{byte:02X}"))
    }
}

impl fmt::Debug for Atr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Atr({self})")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn real_cards() {
        // libcacard's CAC, a YubiKey 4, a PIV test card with two protocols.
        let cac = Atr::parse(&[
            0x3B, 0x7A, 0x18, 0x00, 0x00, 0x73, 0x66, 0x74, 0x65, 0x20, 0x63, 0x64, 0x31, 0x34, 0x34,
        ])
        .unwrap();
        assert_eq!(cac.historical(), b"sfte cd144");
        assert_eq!(cac.protocols().collect::<Vec<_>>(), [0]);
        let yubikey = Atr::parse(&[
            0x3B, 0xF8, 0x13, 0x00, 0x00, 0x81, 0x31, 0xFE, 0x15, 0x59, 0x75, 0x62, 0x69, 0x6B, 0x65, 0x79,
            0x34, 0xD4,
        ])
        .unwrap();
        assert_eq!(yubikey.historical(), b"Yubikey4");
        assert_eq!(yubikey.protocols().collect::<Vec<_>>(), [1]);
    }

    #[test]
    fn wrong_atrs_name_the_field() {
        let error = |bytes: &[u8]| Atr::parse(bytes).unwrap_err().to_string();
        assert_eq!(error(&[]), "ATR of 0 bytes ends before TS at offset 0");
        assert_eq!(error(&[0x3D, 0]), "TS at offset 0 is 3D, not 3B or 3F");
        assert_eq!(
            error(&[0x3B, 0x0F, 1]),
            "ATR of 3 bytes ends before the last historical byte at offset 16"
        );
        assert_eq!(error(&[0x3B, 0x80, 0x01]), "TCK at offset 3 is missing or wrong");
        assert_eq!(error(&[0x3B, 0x80, 0x01, 0x82]), "TCK at offset 3 is missing or wrong");
        assert_eq!(error(&[0x3B, 0x00, 0x00]), "1 bytes follow the end of the ATR at offset 2");
    }

    #[test]
    fn a_card_in_use_is_not_refused_for_its_atr() {
        // A wrong TCK, a byte too many, a historical byte missing, nothing sensible, nothing.
        let wrong_check = Atr::from_card(&[0x3B, 0x82, 0x01, b'o', b'k', 0x00]);
        assert_eq!((wrong_check.historical(), wrong_check.to_string()), (&b"ok"[..], "3B82016F6B00".into()));
        assert_eq!(wrong_check.protocols().collect::<Vec<_>>(), [1]);
        assert_eq!(Atr::from_card(&[0x3B, 0x02, b'o', b'k', 0x00]).historical(), b"ok");
        assert_eq!(Atr::from_card(&[0x3B, 0x03, b'o', b'k']).historical(), b"ok");
        assert_eq!(Atr::from_card(&[0x00, 0xFF]).as_bytes(), [0x00, 0xFF]);
        assert_eq!(Atr::from_card(&[]).as_bytes(), []);
    }

    #[test]
    fn built_atrs() {
        assert_eq!(Atr::t0(b"VSCC").unwrap().to_string(), "3B84400156534343");
        let t1 = Atr::t1(b"PIV").unwrap();
        assert_eq!(t1.protocols().collect::<Vec<_>>(), [1]);
        assert!(Atr::t0(&[0; 16]).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_atr_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            let mut bytes = bytes;
            if let Some(ts) = bytes.first_mut() { *ts = 0x3B; }
            if let Ok(atr) = Atr::parse(&bytes) {
                prop_assert_eq!(atr.as_bytes(), &bytes[..]);
                prop_assert!(atr.historical().len() <= 15);
                prop_assert!(atr.protocols().count() >= 1);
            }
            let taken = Atr::from_card(&bytes);
            prop_assert_eq!(taken.as_bytes(), &bytes[..bytes.len().min(MAX_ATR)]);
            prop_assert!(taken.historical().len() <= 15);
            prop_assert!(taken.protocols().count() >= 1);
        }

        #[test]
        fn built_atrs_keep_their_historical_bytes(historical in proptest::collection::vec(any::<u8>(), 0..=15)) {
            for atr in [Atr::t0(&historical).unwrap(), Atr::t1(&historical).unwrap()] {
                prop_assert_eq!(atr.historical(), &historical[..]);
            }
        }
    }
}
