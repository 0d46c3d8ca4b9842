//! The PIN commands of a CAC. The PIN belongs to the card: it needs no applet selected.

use vscard_protocol::apdu::ins;
use vscard_protocol::{Command, Secret, StatusWord};

use crate::applet::{Outcome, PIN_FIELD, puk, two_fields, unpadded};
use crate::card::Work;
use crate::pin::check_card_pin;

/// Whether an instruction is one of them.
pub(crate) fn concerns(ins: u8) -> bool {
    matches!(ins, ins::VERIFY | ins::CHANGE_REFERENCE_DATA | ins::RESET_RETRY_COUNTER)
}

/// VERIFY, CHANGE REFERENCE DATA and RESET RETRY COUNTER (ISO/IEC 7816-4:2005 §7.5.6, §7.5.7, §7.5.10). What cannot
/// be a PIN is refused before it costs a try, and leaves a verified PIN alone.
pub(crate) fn command(command: &Command, verified: bool) -> Outcome {
    let body = command.data();
    if command.p1p2() != 0 {
        return StatusWord::INCORRECT_P1P2.into();
    }
    if command.ins() == ins::VERIFY {
        // An empty body asks whether it is needed.
        return match (body, verified) {
            ([], true) => StatusWord::SUCCESS.into(),
            ([], false) => Work::TriesLeft.into(),
            _ if body.len() > PIN_FIELD => StatusWord::WRONG_LENGTH.into(),
            _ => match unpadded(body) {
                Some(pin) => Work::Verify(pin).into(),
                None => StatusWord::INCORRECT_DATA.into(),
            },
        };
    }
    let Some((old, new)) = two_fields(body) else { return StatusWord::WRONG_LENGTH.into() };
    let work = if command.ins() == ins::CHANGE_REFERENCE_DATA {
        unpadded(old).zip(new_pin(new)).map(|(old, new)| Work::Change { old, new })
    } else {
        puk(old).zip(new_pin(new)).map(|(puk, new)| Work::Unblock { puk, new })
    };
    work.map_or(StatusWord::INCORRECT_DATA.into(), Outcome::from)
}

/// A PIN that is to be set. The one it replaces may be one that only the host can set.
fn new_pin(field: &[u8]) -> Option<Secret> {
    unpadded(field).filter(|pin| check_card_pin(pin).is_ok())
}
