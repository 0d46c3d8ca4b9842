//! One exchange as one line of text.

use std::fmt::Write;

use super::harmless::Harmless;
use crate::apdu::{aid, ins};
use crate::{Command, Response, StatusWord};

/// Most bytes of a body that are shown.
const SHOWN: usize = 32;

/// Turns exchanges into lines and keeps out of them what is not known to be harmless: of that there is the header, the
/// lengths and the status.
#[derive(Debug, Default)]
pub(super) struct Redactor(Harmless);

/// A command that is about to be sent.
pub(super) struct Line {
    text: String,
    /// The logical channel of a command that may be shown.
    harmless: Option<u8>,
}

impl Redactor {
    pub(super) fn begin(&mut self, command: &Command) -> Line {
        let harmless = self.0.begin(command);
        Line { text: describe(command, harmless.is_some()), harmless }
    }

    /// A command and its response.
    pub(super) fn end(
        &mut self,
        Line { text: mut line, harmless }: Line,
        command: &Command,
        response: &Response,
    ) -> String {
        let (data, status) = (response.data(), response.status());
        let _ = write!(line, " | {status}{}", meaning(status, command));
        if !data.is_empty() {
            let _ = write!(line, ", {} bytes{}", data.len(), body(data, harmless.is_some()));
        }
        if let Some(channel) = harmless {
            self.0.answered(command, channel, status);
        }
        line
    }
}

impl Line {
    /// For a command that got no response.
    pub(super) fn into_text(self) -> String {
        self.text
    }
}

fn describe(command: &Command, shown: bool) -> String {
    let [cla, ins, p1, p2] = command.header();
    let name = ins::name(ins).map_or_else(|| format!("INS {ins:02X}"), str::to_owned);
    let mut line = format!("{name} | {cla:02X} {ins:02X} {p1:02X} {p2:02X}");
    let data = command.data();
    if !data.is_empty() {
        let _ = write!(line, " Lc {}{}", data.len(), body(data, shown));
        if let Some(name) = aid::name(data).filter(|_| shown && ins == ins::SELECT) {
            let _ = write!(line, " ({name})");
        }
    }
    // What compares a PIN has no response data: its Le may be the last byte of a PIN behind a wrong Lc.
    if let Some(le) = command.le().filter(|_| !ins::has_reference_data(ins)) {
        let _ = write!(line, " Le {le}");
    }
    line
}

fn body(bytes: &[u8], shown: bool) -> String {
    if shown { format!(": {}", hex(bytes)) } else { " (not shown)".into() }
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

fn meaning(status: StatusWord, command: &Command) -> String {
    // Without a body VERIFY only asks, unless P1 = FF (ISO/IEC 7816-4 §11.6.6, SP 800-73-4 Part 2 §3.2.1).
    let empty = command.data().is_empty();
    let asks = empty && command.ins() & 0xFE == ins::VERIFY && command.p1() != 0xFF;
    let text = match status {
        StatusWord::SUCCESS if asks => "verification not required",
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
            (0x63, left) if left & 0xF0 == 0xC0 => {
                let wrong = if empty { "" } else { "wrong, " };
                return format!(" ({wrong}{} tries left)", left & 0x0F);
            }
            _ => return String::new(),
        },
    };
    format!(" ({text})")
}
