//! What the administrator may do: PUT DATA and GENERATE ASYMMETRIC KEY PAIR (SP 800-73-4 Part 2 §3.3).

use vscard_protocol::{Command, Secret, StatusWord};

use super::{CURRENT_APPLICATION, kind_of, object};
use crate::applet::Outcome;
use crate::card::Work;
use crate::keys::writable::NewKey;
use crate::slot::PivSlot;
use crate::tlv::{ber, read_ber};

/// PUT DATA (Part 2 §3.3.1): the body names the object, 5C L tag, and has what is to be in it, 53 L data. Without any
/// data the object is deleted.
pub(super) fn put_data(command: &Command, authenticated: bool) -> Outcome {
    if command.p1p2() != CURRENT_APPLICATION {
        return StatusWord::INCORRECT_P1P2.into();
    }
    if !authenticated {
        return StatusWord::SECURITY_STATUS_NOT_SATISFIED.into();
    }
    let Some(([0x5C], tag @ [_, ..], rest)) = read_ber(command.data()) else {
        // The discovery object and the biometric group come without 5C, and stay as they are.
        return match command.data() {
            [0x7E, ..] | [0x7F, 0x61, ..] => StatusWord::FUNCTION_NOT_SUPPORTED.into(),
            _ => StatusWord::INCORRECT_DATA.into(),
        };
    };
    let Some(([0x53], content, [])) = read_ber(rest) else { return StatusWord::INCORRECT_DATA.into() };
    match object::writable(tag) {
        Some(object) => Work::Put { object, content: Secret::from(content) }.into(),
        None => StatusWord::FUNCTION_NOT_SUPPORTED.into(),
    }
}

/// GENERATE ASYMMETRIC KEY PAIR (Part 2 §3.3.2): P2 is the key, the body has the algorithm, AC {80 01 algorithm}.
pub(super) fn generate(command: &Command, authenticated: bool) -> Outcome {
    let slot = match (command.p1(), PivSlot::of_reference(command.p2())) {
        (0x00, Some(slot)) => slot,
        _ => return StatusWord::INCORRECT_P1P2.into(),
    };
    if !authenticated {
        return StatusWord::SECURITY_STATUS_NOT_SATISFIED.into();
    }
    let kind = match read_ber(command.data()) {
        Some(([0xAC], control, [])) => match read_ber(control) {
            // No algorithm has a parameter (81).
            Some(([0x80], &[algorithm], [])) => kind_of(algorithm),
            _ => None,
        },
        _ => None,
    };
    match kind {
        Some(kind) => Work::Generate { slot, kind }.into(),
        None => StatusWord::INCORRECT_DATA.into(),
    }
}

/// The answer to GENERATE ASYMMETRIC KEY PAIR (Part 2 table 11).
pub(crate) fn public_key(key: &NewKey) -> Secret {
    let objects = match key {
        NewKey::Rsa { modulus, exponent } => [ber(&[0x81], modulus), ber(&[0x82], exponent)].concat(),
        NewKey::Ec { point } => ber(&[0x86], point),
    };
    Secret::new(ber(&[0x7F, 0x49], &objects))
}
