//! PIN and PUK. What cannot be one is refused before it costs a try, and leaves a verified PIN alone.

use vscard_protocol::{Command, Secret, StatusWord};

use crate::applet::{Outcome, PIN_FIELD, puk, two_fields, unpadded};
use crate::card::Work;

/// Key references (SP 800-73-4 Part 1 table 4a). There is no global PIN (00).
const PIN: u8 = 0x80;
const PUK: u8 = 0x81;

/// VERIFY (SP 800-73-4 Part 2 §3.2.1). P1 = FF forgets that the PIN was verified.
pub(super) fn verify(command: &Command, verified: bool) -> Outcome {
    let body = command.data();
    match (command.p1(), command.p2()) {
        (0x00 | 0xFF, PIN) => {}
        (0x00 | 0xFF, _) => return StatusWord::REFERENCE_NOT_FOUND.into(),
        _ => return StatusWord::INCORRECT_P1P2.into(),
    }
    match (command.p1(), body) {
        (0xFF, []) => Outcome::LogOut,
        (0xFF, _) => StatusWord::INCORRECT_DATA.into(),
        // An empty body asks whether it is needed.
        (_, []) if verified => StatusWord::SUCCESS.into(),
        (_, []) => Work::TriesLeft.into(),
        (_, body) => match unpadded(body).filter(|_| body.len() == PIN_FIELD) {
            Some(pin) => Work::Verify(pin).into(),
            None => StatusWord::INCORRECT_DATA.into(),
        },
    }
}

/// CHANGE REFERENCE DATA (SP 800-73-4 Part 2 §3.2.2), of PIN or PUK.
pub(super) fn change(command: &Command) -> Outcome {
    let fields = two_fields(command.data());
    let work = match (command.p1(), command.p2()) {
        (0x00, PIN) => fields
            .and_then(|(old, new)| unpadded(old).zip(new_pin(new)))
            .map(|(old, new)| Work::Change { old, new }),
        (0x00, PUK) => fields
            .and_then(|(old, new)| puk(old).zip(puk(new)))
            .map(|(old, new)| Work::ChangePuk { old, new }),
        (0x00, _) => return StatusWord::REFERENCE_NOT_FOUND.into(),
        _ => return StatusWord::INCORRECT_P1P2.into(),
    };
    work.map_or(StatusWord::INCORRECT_DATA.into(), Outcome::from)
}

/// RESET RETRY COUNTER (SP 800-73-4 Part 2 §3.2.3).
pub(super) fn unblock(command: &Command) -> Outcome {
    match (command.p1(), command.p2()) {
        (0x00, PIN) => two_fields(command.data())
            .and_then(|(old, new)| puk(old).zip(new_pin(new)))
            .map(|(puk, new)| Work::Unblock { puk, new })
            .map_or(StatusWord::INCORRECT_DATA.into(), Outcome::from),
        (0x00, _) => StatusWord::REFERENCE_NOT_FOUND.into(),
        _ => StatusWord::INCORRECT_P1P2.into(),
    }
}

/// A PIN that is to be set: six to eight digits (SP 800-73-4 Part 2 §2.4.3). The one it replaces may be of another
/// kind, as the host has it.
fn new_pin(field: &[u8]) -> Option<Secret> {
    unpadded(field).filter(|pin| pin.len() >= 6 && pin.expose().iter().all(u8::is_ascii_digit))
}
