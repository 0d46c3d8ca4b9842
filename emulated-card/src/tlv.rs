//! Tag-length-value coding, the writing side.
//!
//! GSC-IS containers are coded in SIMPLE-TLV (ISO/IEC 7816-4:2005 §5.2.1), what ISO defines in BER-TLV (§5.2.2).

use thiserror::Error;

/// A value longer than the two-byte length of SIMPLE-TLV can say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("a value of {0} bytes does not fit SIMPLE-TLV")]
pub(crate) struct TooLong(pub(crate) usize);

/// Appends tag and length in SIMPLE-TLV as GSC-IS writes them: one byte, or FF and two bytes, the low one first
/// (ISO has the high one first).
pub(crate) fn put_simple_header(out: &mut Vec<u8>, tag: u8, length: usize) -> Result<(), TooLong> {
    let length = u16::try_from(length).map_err(|_| TooLong(length))?;
    out.push(tag);
    match u8::try_from(length) {
        Ok(short) if short < 0xFF => out.push(short),
        _ => {
            out.push(0xFF);
            out.extend_from_slice(&length.to_le_bytes());
        }
    }
    Ok(())
}

/// One SIMPLE-TLV object whose value is known to be short: the length is a type, so that nothing can fail.
pub(crate) fn simple<const N: usize>(tag: u8, value: [u8; N]) -> Vec<u8> {
    const { assert!(N < 0xFF) };
    let mut out = Vec::with_capacity(2 + N);
    out.extend_from_slice(&[tag, N as u8]);
    out.extend_from_slice(&value);
    out
}

/// One BER-TLV object (ISO/IEC 7816-4:2005 §5.2.2.1). `tag` holds the tag's bytes, as they are written.
pub(crate) fn ber(tag: &[u8], value: &[u8]) -> Vec<u8> {
    let mut out = tag.to_vec();
    let length = value.len().to_be_bytes();
    let significant = &length[length.iter().take_while(|byte| **byte == 0).count()..];
    match *significant {
        [] => out.push(0),
        [short @ 0..=0x7F] => out.push(short),
        _ => {
            out.push(0x80 | significant.len() as u8);
            out.extend_from_slice(significant);
        }
    }
    out.extend_from_slice(value);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn simple_lengths() {
        let header = |length| {
            let mut out = Vec::new();
            put_simple_header(&mut out, 0x70, length).map(|()| out)
        };
        assert_eq!(header(0), Ok(vec![0x70, 0]));
        assert_eq!(header(254), Ok(vec![0x70, 254]));
        assert_eq!(header(255), Ok(vec![0x70, 0xFF, 0xFF, 0x00]));
        assert_eq!(header(0x0502), Ok(vec![0x70, 0xFF, 0x02, 0x05]));
        assert_eq!(header(65_535), Ok(vec![0x70, 0xFF, 0xFF, 0xFF]));
        assert_eq!(header(65_536), Err(TooLong(65_536)));
        assert_eq!(simple(0x41, [0xDB, 0x00]), [0x41, 2, 0xDB, 0]);
    }

    #[test]
    fn ber_lengths() {
        assert_eq!(ber(&[0xA5], &[]), [0xA5, 0]);
        assert_eq!(ber(&[0x9F, 0x65], &[1, 0xFF]), [0x9F, 0x65, 2, 1, 0xFF]);
        assert_eq!(ber(&[0x53], &[0; 127])[..2], [0x53, 127]);
        assert_eq!(ber(&[0x53], &[0; 128])[..3], [0x53, 0x81, 128]);
        assert_eq!(ber(&[0x53], &[0; 300])[..4], [0x53, 0x82, 1, 44]);
    }
}
