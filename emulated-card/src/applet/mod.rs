//! Card applications.
//!
//! An applet says what a command does; it keeps no state. What has to be remembered between two commands
//! (selection, verified PIN, gathered command data, unread response data) is the card's, so that one reset
//! clears all of it and no applet can forget to.

pub(crate) mod cac;
mod discovery;
pub(crate) mod piv;

use vscard_protocol::{Command, Secret, StatusWord};

use crate::card::{Complaints, KeyWork, Random, Work};
use crate::keys::writable::Writable;
use crate::tlv;

/// One card application.
pub(crate) trait Applet: Send {
    /// Whether SELECT with this application identifier means this applet.
    fn answers_to(&self, aid: &[u8]) -> bool;

    /// What SELECT returns: file control information (ISO/IEC 7816-4:2005 §5.3.3), or what the application has instead.
    /// `memory` is as in [`Session::memory`].
    fn fci(&self, memory: Option<&dyn Writable>) -> Vec<u8>;

    /// Longest command data that may come in a chain (ISO/IEC 7816-4:2005 §5.1.1.1) for an instruction; 0 where
    /// there is no chaining.
    fn chain_limit(&self, ins: u8) -> usize {
        let _ = ins;
        0
    }

    /// Whether a whole command is to use a private key, though it may be refused before it comes here.
    fn uses_key(&self, command: &Command) -> bool {
        let _ = command;
        false
    }

    /// A command that is not the card's own (SELECT by identifier, GET CHALLENGE, GET RESPONSE; on a card that is a
    /// CAC, also what concerns its PIN). Chains arrive as one command.
    fn command(&self, command: &Command, session: Session<'_>) -> Outcome;
}

/// What the card remembers for the applet that is selected.
pub(crate) struct Session<'a> {
    /// Whether private keys may be used.
    pub(crate) verified: bool,
    /// Whether the PIN was verified and no private key used since.
    pub(crate) fresh: bool,
    /// What the command before this one left with [`Outcome::Gather`].
    pub(crate) gathered: Secret,
    /// Where challenges come from.
    pub(crate) random: &'a mut Random,
    /// Where to tell of what fails.
    pub(crate) complaints: &'a Complaints,
    /// What was written to the card, of one that can be written to.
    pub(crate) memory: Option<&'a dyn Writable>,
    /// Who may do that.
    pub(crate) administrator: &'a mut piv::Administrator,
    /// The authentication of an administrator that the command before this one began.
    pub(crate) attempt: Option<piv::Attempt>,
}

/// What a command leads to.
pub(crate) enum Outcome {
    /// A bare status word.
    Status(StatusWord),
    /// Data, then 9000.
    Data(Secret),
    /// 9000; the next command gets this in [`Session::gathered`]. Any other outcome drops what was gathered.
    Gather(Secret),
    /// 9000; the verified PIN is forgotten.
    LogOut,
    /// What blocks.
    Work(Work),
}

impl From<StatusWord> for Outcome {
    fn from(status: StatusWord) -> Self {
        Self::Status(status)
    }
}

impl From<Vec<u8>> for Outcome {
    fn from(data: Vec<u8>) -> Self {
        Self::Data(Secret::new(data))
    }
}

impl From<Work> for Outcome {
    fn from(work: Work) -> Self {
        Self::Work(work)
    }
}

impl From<KeyWork> for Outcome {
    fn from(work: KeyWork) -> Self {
        Self::Work(Work::Key(work))
    }
}

/// Length of a PIN or PUK in a command.
const PIN_FIELD: usize = 8;

/// A PIN without what fills it up (FF); `None` for what cannot be a PIN.
fn unpadded(field: &[u8]) -> Option<Secret> {
    let padding = field.iter().rev().take_while(|byte| **byte == 0xFF).count();
    let pin = &field[..field.len() - padding];
    (!pin.is_empty() && !pin.contains(&0)).then(|| Secret::from(pin))
}

/// A PUK, which may be any eight bytes but those that fill up a PIN.
fn puk(field: &[u8]) -> Option<Secret> {
    (field != [0xFF; PIN_FIELD]).then(|| Secret::from(field))
}

/// The two fields of a command that compares one PIN or PUK and sets another; `None` for another length.
fn two_fields(body: &[u8]) -> Option<(&[u8], &[u8])> {
    body.split_at_checked(PIN_FIELD).filter(|(_, new)| new.len() == PIN_FIELD)
}

/// An FCI template with the application identifier and proprietary data (ISO/IEC 7816-4:2005 §5.3.3, tags 6F, 84, A5).
fn fci(aid: &[u8], proprietary: &[u8]) -> Vec<u8> {
    tlv::ber(&[0x6F], &[tlv::ber(&[0x84], aid), tlv::ber(&[0xA5], proprietary)].concat())
}
