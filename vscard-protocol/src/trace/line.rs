//! One exchange as one line of text.

use std::fmt::Write;

use crate::apdu::{aid, ins};
use crate::{Command, StatusWord};

/// Most bytes of a body that are shown.
const SHOWN: usize = 32;

/// Turns exchanges into lines and keeps secrets out of them.
///
/// It works on raw bytes, whatever the class byte and however malformed the rest, and fails closed:
/// the bodies with reference data, of PERFORM SECURITY OPERATION and of ENVELOPE are masked from the length byte on, as
/// are the answers to private-key operations, the parts that GET RESPONSE fetches included.
#[derive(Debug, Default)]
pub(super) struct Redactor {
    /// The last command that was not GET RESPONSE had a secret answer.
    answer_is_secret: bool,
}

impl Redactor {
    /// A command on its own, for one that got no response.
    pub(super) fn command(&mut self, command: &[u8]) -> String {
        self.note(command);
        describe(command)
    }

    /// A command and its response.
    pub(super) fn exchange(&mut self, command: &[u8], response: &[u8]) -> String {
        let mut line = self.command(command);
        let (data, status) = response.split_at(response.len().saturating_sub(2));
        line.push_str(" | ");
        match status {
            [sw1, sw2] => {
                let status = StatusWord(u16::from_be_bytes([*sw1, *sw2]));
                let _ = write!(line, "{status}{}", meaning(status));
            }
            _ => line.push_str("no status word"),
        }
        if !data.is_empty() {
            let _ = write!(line, ", {} bytes: ", data.len());
            line.push_str(&if self.answer_is_secret { "(secret)".into() } else { hex(data) });
        }
        line
    }

    fn note(&mut self, command: &[u8]) {
        match command.get(1) {
            // A cut command tells nothing about what comes next.
            None | Some(&ins::GET_RESPONSE) => {}
            Some(
                &ins::SIGN_DECRYPT
                | &ins::GENERAL_AUTHENTICATE
                | &ins::PERFORM_SECURITY_OPERATION
                | &ins::ENVELOPE,
            ) => self.answer_is_secret = true,
            _ => self.answer_is_secret = false,
        }
    }
}

fn body_is_secret(ins: u8) -> bool {
    // What ENVELOPE wraps may be any of the others.
    ins::has_reference_data(ins) || matches!(ins, ins::PERFORM_SECURITY_OPERATION | ins::ENVELOPE)
}

fn describe(bytes: &[u8]) -> String {
    let Some([cla, ins, p1, p2]) = bytes.first_chunk() else {
        // Even a cut header may be that of VERIFY.
        return format!("malformed command of {} bytes", bytes.len());
    };
    let name = ins::name(*ins).map_or_else(|| format!("INS {ins:02X}"), str::to_owned);
    let mut line = format!("{name} | {cla:02X} {ins:02X} {p1:02X} {p2:02X}");
    if bytes.len() == 4 {
        return line;
    }
    if body_is_secret(*ins) {
        line.push_str(" (secret)");
        return line;
    }
    match Command::parse(bytes) {
        Ok(command) => {
            let data = command.data();
            if !data.is_empty() {
                let _ = write!(line, " Lc {}: {}", data.len(), hex(data));
                if let Some(name) = aid::name(data).filter(|_| *ins == ins::SELECT) {
                    let _ = write!(line, " ({name})");
                }
            }
            if let Some(le) = command.le() {
                let _ = write!(line, " Le {le}");
            }
        }
        Err(_) => {
            let _ = write!(line, " malformed, {} bytes", bytes.len());
        }
    }
    line
}

fn hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(2 * SHOWN + 3);
    for byte in bytes.iter().take(SHOWN) {
        let _ = write!(text, "{byte:02X}");
    }
    if bytes.len() > SHOWN {
        text.push_str("...");
    }
    text
}

fn meaning(status: StatusWord) -> String {
    let text = match status {
        StatusWord::SUCCESS => "success",
        StatusWord::MEMORY_FAILURE => "memory failure",
        StatusWord::WRONG_LENGTH => "wrong length",
        StatusWord::SECURITY_STATUS_NOT_SATISFIED => "security status not satisfied",
        StatusWord::AUTHENTICATION_BLOCKED => "PIN blocked",
        StatusWord::CONDITIONS_NOT_SATISFIED => "conditions of use not satisfied",
        StatusWord::INCORRECT_DATA => "incorrect data",
        StatusWord::NOT_FOUND => "not found",
        StatusWord::INCORRECT_P1P2 => "incorrect P1-P2",
        StatusWord::REFERENCE_NOT_FOUND => "referenced data not found",
        StatusWord::INS_NOT_SUPPORTED => "instruction not supported",
        StatusWord::CLA_NOT_SUPPORTED => "class not supported",
        StatusWord(sw) => match (sw >> 8, sw & 0xFF) {
            (0x61, 0) => return " (256 or more bytes wait)".into(),
            (0x61, left) => return format!(" ({left} bytes wait)"),
            (0x6C, exact) => return format!(" (wrong Le, {exact} is right)"),
            (0x63, left) if left & 0xF0 == 0xC0 => return format!(" (wrong, {} tries left)", left & 0x0F),
            _ => return String::new(),
        },
    };
    format!(" ({text})")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_exchange_is_one_readable_line() {
        let mut redactor = Redactor::default();
        let select = [0, 0xA4, 4, 0, 7, 0xA0, 0, 0, 0, 0x79, 1, 0, 0];
        assert_eq!(
            redactor.exchange(&select, &[0x6F, 0x00, 0x90, 0x00]),
            "SELECT | 00 A4 04 00 Lc 7: A0000000790100 (CAC PKI container) Le 256 | 9000 (success), 2 bytes: 6F00"
        );
        assert_eq!(
            redactor.exchange(&[0, 0x20, 0, 0, 4, 0x31, 0x32, 0x33, 0x34], &[0x63, 0xC2]),
            "VERIFY | 00 20 00 00 (secret) | 63C2 (wrong, 2 tries left)"
        );
    }

    #[test]
    fn a_decrypted_block_stays_secret_through_get_response() {
        let mut redactor = Redactor::default();
        redactor.exchange(&[0x80, 0x42, 0, 0, 1, 9], &[0x61, 0x02]);
        let line = redactor.exchange(&[0, 0xC0, 0, 0, 2], &[0xAB, 0xCD, 0x90, 0]);
        assert!(line.contains("(secret)") && !line.contains("ABCD"), "{line}");
        let line = redactor.exchange(&[0, 0xB0, 0, 0, 2], &[0xAB, 0xCD, 0x90, 0]);
        assert!(line.contains("ABCD"), "{line}");
    }

    proptest! {
        /// Whatever the class, the length byte or what is missing: the PIN is not in the line.
        #[test]
        fn no_pin_is_ever_shown(
            cla in any::<u8>(),
            ins in proptest::sample::select(&[0x20u8, 0x21, 0x24, 0x25, 0x26, 0x27, 0x28, 0x29, 0x2A, 0x2C, 0x2D, 0xC2][..]),
            parameters in any::<[u8; 2]>(),
            length in prop_oneof![Just(8), any::<u8>()],
        ) {
            let mut command = vec![cla, ins, parameters[0], parameters[1], length];
            command.extend_from_slice(b"\xDE\xAD\xBE\xEF\xDE\xAD\xBE\xEF");
            let line = Redactor::default().exchange(&command, &[0x90, 0]);
            prop_assert!(!line.contains("DEAD") && !line.contains("BEEF"));
        }

        #[test]
        fn any_bytes_give_a_line(
            command in proptest::collection::vec(any::<u8>(), 0..300),
            response in proptest::collection::vec(any::<u8>(), 0..300),
        ) {
            let line = Redactor::default().exchange(&command, &response);
            prop_assert!(line.is_ascii() && !line.contains('\n') && line.len() < 400);
        }
    }
}
