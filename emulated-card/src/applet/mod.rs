//! Card applications.
//!
//! An applet says what a command does; it keeps no state. What has to be remembered between two commands
//! (selection, verified PIN, gathered command data, unread response data) is the card's, so that one reset
//! clears all of it and no applet can forget to.

pub(crate) mod cac;
mod discovery;

use vscard_protocol::{Command, Secret, StatusWord};

use crate::tlv;

/// One card application.
pub(crate) trait Applet: Send {
    /// Whether SELECT with this application identifier means this applet.
    fn answers_to(&self, aid: &[u8]) -> bool;

    /// File control information that SELECT returns (ISO/IEC 7816-4:2005 §5.3.3).
    fn fci(&self) -> Vec<u8>;

    /// A command that is not the card's own (SELECT by identifier, VERIFY, GET CHALLENGE, GET RESPONSE).
    fn command(&self, command: &Command, session: Session) -> Outcome;
}

/// What the card remembers for the applet that is selected.
pub(crate) struct Session {
    /// Whether private keys may be used.
    pub(crate) verified: bool,
    /// What the command before this one left with [`Outcome::Gather`].
    pub(crate) gathered: Secret,
}

/// What a command leads to.
pub(crate) enum Outcome {
    /// A bare status word.
    Status(StatusWord),
    /// Data, then 9000.
    Data(Secret),
    /// 9000; the next command gets this in [`Session::gathered`]. Any other outcome drops what was gathered.
    Gather(Secret),
    /// The raw RSA operation with that key; its result is the response data.
    RsaRaw {
        /// Index in [`KeyStore::certificates`](crate::keys::KeyStore::certificates).
        key: usize,
        /// One block, as long as the modulus.
        block: Secret,
    },
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

/// An FCI template with the application identifier and proprietary data (ISO/IEC 7816-4:2005 §5.3.3, tags 6F, 84, A5).
fn fci(aid: &[u8], proprietary: &[u8]) -> Vec<u8> {
    tlv::ber(&[0x6F], &[tlv::ber(&[0x84], aid), tlv::ber(&[0xA5], proprietary)].concat())
}
