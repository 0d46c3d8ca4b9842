//! Tag-length-value coding.
//!
//! GSC-IS containers are coded in SIMPLE-TLV (ISO/IEC 7816-4:2005 §5.2.1), what ISO defines in BER-TLV (§5.2.2).
//! Only BER-TLV is ever read: it comes from the guest, so the reader takes nothing for granted.

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
    let mut out = Vec::with_capacity(tag.len() + MAX_LENGTH_FIELD + value.len());
    put_ber_header(&mut out, tag, value.len());
    out.extend_from_slice(value);
    out
}

/// Longest length field that is written.
const MAX_LENGTH_FIELD: usize = 1 + size_of::<usize>();

/// Appends tag and length in BER-TLV.
pub(crate) fn put_ber_header(out: &mut Vec<u8>, tag: &[u8], length: usize) {
    out.extend_from_slice(tag);
    let length = length.to_be_bytes();
    let significant = &length[length.iter().take_while(|byte| **byte == 0).count()..];
    match *significant {
        [] => out.push(0),
        [short @ 0..=0x7F] => out.push(short),
        _ => {
            out.push(0x80 | significant.len() as u8);
            out.extend_from_slice(significant);
        }
    }
}

/// Takes the BER-TLV object apart that `bytes` begin with: tag, value, and what follows.
///
/// Tags have one to three bytes, lengths one to three (§5.2.2.2); a length need not be in its shortest form.
/// `None` for anything else, and for a value that is cut short.
pub(crate) fn read_ber(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let tag_length = match bytes {
        [first, ..] if first & 0x1F != 0x1F => 1,
        [_, second, ..] if second & 0x80 == 0 => 2,
        [_, _, third, ..] if third & 0x80 == 0 => 3,
        _ => return None,
    };
    let (tag, rest) = bytes.split_at_checked(tag_length)?;
    let (length, rest) = match rest {
        [length @ 0..=0x7F, rest @ ..] => (usize::from(*length), rest),
        [0x81, length, rest @ ..] => (usize::from(*length), rest),
        [0x82, high, low, rest @ ..] => (usize::from(u16::from_be_bytes([*high, *low])), rest),
        _ => return None,
    };
    let (value, rest) = rest.split_at_checked(length)?;
    Some((tag, value, rest))
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

    #[test]
    fn ber_is_read_as_it_is_written() {
        for length in [0, 1, 127, 128, 255, 256, 65_535] {
            for tag in [&[0x53][..], &[0x7F, 0x49], &[0x5F, 0xC1, 0x05]] {
                let object = ber(tag, &vec![7; length]);
                let followed = [&object[..], b"rest"].concat();
                assert_eq!(read_ber(&followed), Some((tag, &vec![7; length][..], &b"rest"[..])));
            }
        }
        assert_eq!(read_ber(&[0x81, 0x82, 0, 1, 9]), Some((&[0x81][..], &[9][..], &[][..])));
    }

    #[test]
    fn what_is_no_ber() {
        for bytes in [
            &[][..],
            &[0x53],
            &[0x5F],
            &[0x5F, 0xC1],
            &[0x5F, 0xC1, 0x85, 0x01, 0x00],
            &[0x53, 0x80, 0, 0],
            &[0x53, 0x81],
            &[0x53, 0x82, 0],
            &[0x53, 0x83, 0, 0, 0],
            &[0x53, 0xFF],
            &[0x53, 2, 1],
            &[0x53, 0x82, 0xFF, 0xFF, 1],
        ] {
            assert_eq!(read_ber(bytes), None, "{bytes:02X?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn reading_loses_nothing(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..300)) {
            if let Some((tag, value, rest)) = read_ber(&bytes) {
                proptest::prop_assert!(bytes.starts_with(tag) && bytes.ends_with(rest));
                proptest::prop_assert!(tag.len() + value.len() + rest.len() < bytes.len());
            }
        }
    }
}
