//! Which reader it is, and what it can carry.

use std::ffi::{CStr, CString};

use pcsc::{Context, Disposition, Protocols, Scope, ShareMode, ctl_code};
use vscard_protocol::{Atr, Limits};

/// The reader that `pattern` means, of those there are.
pub(super) fn choose(pattern: &str, readers: Vec<CString>) -> Option<CString> {
    let name = |reader: &CString| reader.to_string_lossy().into_owned();
    let exact = readers.iter().position(|reader| name(reader) == pattern);
    let index = exact.or_else(|| readers.iter().position(|reader| fits(pattern, &name(reader))))?;
    readers.into_iter().nth(index)
}

/// Whether the parts between the `*` of `pattern` are in `name`, in that order.
fn fits(pattern: &str, name: &str) -> bool {
    let mut rest = name;
    pattern.split('*').all(|part| match rest.split_once(part) {
        Some((_, after)) => {
            rest = after;
            true
        }
        None => false,
    })
}

/// Longest APDUs that the reader and a card with that ATR carry.
pub(super) fn limits(reader: &CStr, atr: &Atr) -> Limits {
    // Extended APDUs are no T=0 commands (ISO/IEC 7816-3 §12.2).
    let t0_only = atr.protocols().all(|protocol| protocol == 0);
    if t0_only || longest_data(reader) == Some(0) { Limits::SHORT } else { Limits::EXTENDED }
}

/// What the reader says of the longest command data it takes; 0 means short APDUs only (PC/SC part 10 §2.6.14).
fn longest_data(reader: &CStr) -> Option<u32> {
    // Without a card there is no protocol: this disturbs nobody.
    let card = Context::establish(Scope::System)
        .ok()?
        .connect(reader, ShareMode::Direct, Protocols::UNDEFINED)
        .ok()?;
    let mut features = [0; 264];
    let mut properties = [0; 264];
    let answer = card
        .control(ctl_code(GET_FEATURE_REQUEST), &[], &mut features)
        .ok()
        .and_then(|features| tag(features, FEATURE_GET_TLV_PROPERTIES))
        .and_then(|code| Some(u32::from_be_bytes(code.try_into().ok()?)))
        .and_then(|code| card.control(code.into(), &[], &mut properties).ok())
        .and_then(|properties| tag(properties, MAX_APDU_DATA_SIZE))
        .and_then(|size| Some(u32::from_le_bytes(size.try_into().ok()?)));
    // Nothing to do about a reader that went away meanwhile.
    let _ = card.disconnect(Disposition::LeaveCard);
    answer
}

/// `CM_IOCTL_GET_FEATURE_REQUEST` (PC/SC part 10 §2.2).
const GET_FEATURE_REQUEST: pcsc::ffi::DWORD = 3400;
const FEATURE_GET_TLV_PROPERTIES: u8 = 0x12;
const MAX_APDU_DATA_SIZE: u8 = 0x0A;

/// The value of `wanted` in a list of tag, length and value, one byte each for the first two.
fn tag(mut list: &[u8], wanted: u8) -> Option<&[u8]> {
    while let [tag, length, rest @ ..] = list {
        let (value, after) = rest.split_at_checked(usize::from(*length))?;
        if *tag == wanted {
            return Some(value);
        }
        list = after;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(pattern: &str) -> Option<String> {
        let readers =
            ["Virtual PCD 00 00", "Virtual PCD 00 01", "Yubico YubiKey OTP+FIDO+CCID 01 00", "PCD 00"];
        choose(pattern, readers.map(|name| CString::new(name).unwrap()).to_vec())
            .map(|name| name.into_string().unwrap())
    }

    #[test]
    fn a_reader_is_meant_by_its_name_or_a_part_of_it() {
        assert_eq!(chosen("").unwrap(), "Virtual PCD 00 00");
        assert_eq!(chosen("Virtual PCD 00 01").unwrap(), "Virtual PCD 00 01");
        assert_eq!(chosen("PCD 00").unwrap(), "PCD 00");
        assert_eq!(chosen("PCD*01").unwrap(), "Virtual PCD 00 01");
        assert_eq!(chosen("Yubi*CCID*").unwrap(), "Yubico YubiKey OTP+FIDO+CCID 01 00");
        assert_eq!(chosen("CCID*Yubi"), None);
        assert_eq!(chosen("Gemalto"), None);
    }

    #[test]
    fn properties_are_read_within_their_bounds() {
        let list = [0x01, 2, 7, 7, 0x0A, 4, 0, 0, 1, 0];
        assert_eq!(tag(&list, 0x0A), Some(&[0, 0, 1, 0][..]));
        assert_eq!(tag(&list, 0x0B), None);
        assert_eq!(tag(&list[..8], 0x0A), None);
        assert_eq!(tag(&[0x0A], 0x0A), None);
    }
}
