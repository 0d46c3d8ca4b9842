//! PIN and PUK. What cannot be one is refused before it costs a try, and leaves a verified PIN alone.

use vscard_protocol::{Command, Secret, StatusWord};

use crate::applet::{Outcome, PIN_FIELD, unpadded, unpadded_pair};
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
    match (command.p1(), command.p2(), pair(command)) {
        (0x00, PIN, Some((old, new))) => Work::Change { old, new }.into(),
        (0x00, PUK, Some((old, new))) => Work::ChangePuk { old, new }.into(),
        (0x00, PIN | PUK, None) => StatusWord::INCORRECT_DATA.into(),
        (0x00, ..) => StatusWord::REFERENCE_NOT_FOUND.into(),
        _ => StatusWord::INCORRECT_P1P2.into(),
    }
}

/// RESET RETRY COUNTER (SP 800-73-4 Part 2 §3.2.3).
pub(super) fn unblock(command: &Command) -> Outcome {
    match (command.p1(), command.p2(), pair(command)) {
        (0x00, PIN, Some((puk, new))) => Work::Unblock { puk, new }.into(),
        (0x00, PIN, None) => StatusWord::INCORRECT_DATA.into(),
        (0x00, ..) => StatusWord::REFERENCE_NOT_FOUND.into(),
        _ => StatusWord::INCORRECT_P1P2.into(),
    }
}

fn pair(command: &Command) -> Option<(Secret, Secret)> {
    unpadded_pair(command.data()).filter(|_| command.data().len() == 2 * PIN_FIELD)
}
