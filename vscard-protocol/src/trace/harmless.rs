//! What a trace may show: a list of what is known to be harmless on any card.

use crate::apdu::{aid, ins};
use crate::{Command, StatusWord};

/// Knows of each command whether its body and its answer may be seen.
///
/// Only what the standard defines under a number is what its name says. A number in a proprietary class, a body of
/// another form and secure messaging may be anything: 00 A4 00 01 with a longer body is CALCULATE ALL to the OATH
/// application of a YubiKey, and 80 52 imports a key share into a SmartCard-HSM. So are the pieces of a chain and what
/// ends it.
#[derive(Debug, Default)]
pub(super) struct Harmless {
    /// A bit for each logical channel where the rest of a harmless answer waits for GET RESPONSE.
    ///
    /// Only as long as no other command was sent, on whatever channel: a card may know less of channels than whoever
    /// sends it commands.
    waiting: u32,
    /// A GSC-IS application is selected on the basic channel.
    gsc_is: bool,
    /// The last command was not the last of its chain.
    in_chain: bool,
}

impl Harmless {
    /// The logical channel of a harmless command that is about to be sent; `None` for all else.
    ///
    /// Nobody may wait for the answer, so what it would show is not taken for granted before
    /// [`answered`](Self::answered).
    pub(super) fn begin(&mut self, command: &Command) -> Option<u8> {
        let ends_chain = std::mem::replace(&mut self.in_chain, command.cla() & 0x10 != 0);
        let harmless = self.channel(command).filter(|_| !ends_chain);
        self.waiting = match harmless {
            Some(channel) => self.waiting & !(1 << channel),
            None => 0,
        };
        // Within an application, CAC software selects objects by P1 = 02.
        let selects = command.ins() == ins::SELECT && (harmless.is_none() || command.p1() != 0x02);
        // In other classes a command may do anything, and so it may select.
        if selects || !matches!(command.cla(), 0x00..=0x1F | 0x40..=0x80) {
            self.gsc_is = false;
        }
        harmless
    }

    /// The answer to a harmless command on that channel.
    pub(super) fn answered(&mut self, command: &Command, channel: u8, status: StatusWord) {
        let continues = status.sw1() == 0x61;
        // A GET RESPONSE with a wrong Le is sent again (ISO/IEC 7816-4 §5.6).
        if continues || (command.ins() == ins::GET_RESPONSE && status.sw1() == 0x6C) {
            self.waiting |= 1 << channel;
        }
        if command.ins() == ins::SELECT && command.p1() == 0x04 {
            let aid = command.data();
            let is_gsc_is = aid.starts_with(&aid::RID_GSC_IS) || aid.starts_with(&aid::RID_CAC);
            self.gsc_is = channel == 0 && is_gsc_is && (continues || status == StatusWord::SUCCESS);
        }
    }

    /// The logical channel, if the command by itself is on the list.
    fn channel(&self, command: &Command) -> Option<u8> {
        let body = command.data();
        let channel = match command.cla() {
            // Without chaining and secure messaging (ISO/IEC 7816-4 §5.4.1, tables 2 and 3).
            cla @ 0x00..=0x03 => cla,
            cla @ 0x40..=0x4F => 4 + (cla & 0x0F),
            // GSC-IS 2.1 §5; its software sends both classes.
            0x80 if self.gsc_is && (is_gsc_is(command.ins()) || command.ins() == ins::GET_RESPONSE) => 0,
            _ => return None,
        };
        let listed = match command.ins() {
            ins::SELECT => is_selection(command),
            ins::GET_DATA_ODD => is_object(body, &[0x5C, 0x4D]),
            ins::READ_BINARY_ODD | ins::READ_RECORD_ODD => is_object(body, &[0x54]),
            ins::GET_DATA | ins::READ_BINARY | ins::READ_RECORD | ins::GET_CHALLENGE => body.is_empty(),
            ins::GET_RESPONSE => body.is_empty() && command.p1p2() == 0 && self.waiting & (1 << channel) != 0,
            ins => is_gsc_is(ins) && self.gsc_is && channel == 0,
        };
        listed.then_some(channel)
    }
}

fn is_gsc_is(ins: u8) -> bool {
    matches!(ins, ins::GET_ACR | ins::READ_BUFFER | ins::GET_PROPERTIES)
}

/// Whether it is the SELECT of ISO/IEC 7816-4 §11.1.1: by file identifier, name or path.
fn is_selection(command: &Command) -> bool {
    let length = command.data().len();
    command.p2() & 0xF0 == 0
        && match command.p1() {
            // P2 = 01 would be the next occurrence, which no card has by file identifier; CALCULATE ALL of OATH has it.
            0x00..=0x03 => length == 0 || length == 2 && command.p2() & 0x03 == 0,
            0x04 => length <= 16,
            0x08 | 0x09 => length % 2 == 0,
            _ => false,
        }
}

/// Whether `body` is one data object, with one of these tags: a list of tags or headers, or an offset
/// (ISO/IEC 7816-4 §8.4 and §11.3).
fn is_object(body: &[u8], tags: &[u8]) -> bool {
    matches!(body, [tag, length @ 0..=0x7F, value @ ..] if tags.contains(tag) && value.len() == usize::from(*length))
}
