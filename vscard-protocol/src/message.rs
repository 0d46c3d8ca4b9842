//! VSCard messages as values.
//!
//! The *host* is the side that uses the card (a VMM), the *client* the side that owns it. A message is a header
//! of three big-endian 32-bit words (type, reader id, payload length) and the payload.

use std::fmt;

use bytes::Bytes;

use crate::Secret;

/// Header length in bytes.
pub const HEADER: usize = 12;
/// Longest payload QEMU's passthru device can take: its buffer is 65 536 bytes, header included. One byte more
/// and it never reads again, not even from the next client.
pub const MAX_PAYLOAD: usize = 65_536 - HEADER;
/// Longest payload between two ends that speak the extension: an extended command in full.
pub const MAX_EXTENDED_PAYLOAD: usize = crate::apdu::MAX_COMMAND;
/// `VSCD`, the same bytes on every architecture.
pub const MAGIC: [u8; 4] = *b"VSCD";

/// Message type. Unknown values are kept.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct MessageType(pub u32);

impl MessageType {
    /// Init, both directions.
    pub const INIT: Self = Self(1);
    /// Error, both directions; from the host also the acknowledgement.
    pub const ERROR: Self = Self(2);
    /// ReaderAdd, client to host.
    pub const READER_ADD: Self = Self(3);
    /// ReaderRemove, client to host.
    pub const READER_REMOVE: Self = Self(4);
    /// ATR (card inserted), client to host.
    pub const ATR: Self = Self(5);
    /// CardRemove, client to host.
    pub const CARD_REMOVE: Self = Self(6);
    /// APDU, both directions.
    pub const APDU: Self = Self(7);
    /// Flush, host to client.
    pub const FLUSH: Self = Self(8);
    /// FlushComplete, client to host.
    pub const FLUSH_COMPLETE: Self = Self(9);
    /// PowerOn, of the [extension](Init::EXTENDED): from the host a request, from the client the answer.
    pub const POWER_ON: Self = Self(0x8000_0001);
    /// PowerOff, of the [extension](Init::EXTENDED): from the host a request, from the client the answer.
    pub const POWER_OFF: Self = Self(0x8000_0002);
}

impl fmt::Display for MessageType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            1 => "Init",
            2 => "Error",
            3 => "ReaderAdd",
            4 => "ReaderRemove",
            5 => "ATR",
            6 => "CardRemove",
            7 => "APDU",
            8 => "Flush",
            9 => "FlushComplete",
            0x8000_0001 => "PowerOn",
            0x8000_0002 => "PowerOff",
            other => return write!(f, "type {other:#x}"),
        })
    }
}

impl fmt::Debug for MessageType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MessageType({self})")
    }
}

/// Which reader of the connection a message speaks of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ReaderId(pub u32);

impl ReaderId {
    /// No reader, or not known yet.
    pub const UNDEFINED: Self = Self(u32::MAX);
    /// The first reader; QEMU has no other.
    pub const FIRST: Self = Self(0);
}

impl fmt::Display for ReaderId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::UNDEFINED { f.write_str("undefined") } else { write!(f, "{}", self.0) }
    }
}

/// Code of an Error message, as read big-endian. Unknown values are kept.
///
/// Peers disagree on the byte order (QEMU writes big-endian and reads host order, SPICE writes little-endian);
/// [`code`](Self::code) understands both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ErrorCode(pub u32);

impl ErrorCode {
    /// Success: the acknowledgement.
    pub const SUCCESS: Self = Self(0);
    /// General error.
    pub const GENERAL: Self = Self(1);
    /// The host cannot add another reader.
    pub const CANNOT_ADD_READER: Self = Self(2);

    /// The code whichever byte order it was written in.
    pub fn code(self) -> u32 {
        self.0.min(self.0.swap_bytes())
    }

    /// Whether it is the acknowledgement.
    pub fn is_success(self) -> bool {
        self.0 == 0
    }
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.code() {
            0 => f.write_str("success"),
            1 => f.write_str("general error"),
            2 => f.write_str("cannot add more readers"),
            3 => f.write_str("a card is inserted already"),
            other => write!(f, "error code {other:#x}"),
        }
    }
}

/// Payload of an Init message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Init {
    /// [`MAGIC`], unless the peer speaks something else.
    pub magic: [u8; 4],
    /// 11 bits major, 11 bits middle, 10 bits minor.
    pub version: u32,
    /// Capability words, at most [`Init::MAX_CAPABILITIES`]. None are defined by the old peers, who send one zero.
    pub capabilities: Vec<u32>,
}

/// What a peer announces that speaks the extension: the longest APDUs it takes, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extension {
    /// Longest command APDU.
    pub command: u32,
    /// Longest response APDU, status word included.
    pub response: u32,
}

impl Extension {
    /// Extended APDUs in full, 65 544 bytes of command and 65 538 of response.
    pub const FULL: Self =
        Self { command: crate::apdu::MAX_COMMAND as u32, response: crate::apdu::MAX_RESPONSE as u32 };
}

impl Init {
    /// Version 0.0.2, the one in use.
    pub const VERSION: u32 = 2;
    /// Capability words that are kept; a longer Init is an error.
    pub const MAX_CAPABILITIES: usize = 64;

    /// Bit 0 of the first capability word: this crate's extension. The second word is then the longest command
    /// APDU, the third the longest response APDU that the sender takes, in bytes. Once both ends have announced
    /// it, the host tells the client to power the card on and off ([`MessageType::POWER_ON`],
    /// [`MessageType::POWER_OFF`]), the card is shown with its own ATR, and APDUs are whole instead of T=0 TPDUs.
    pub const EXTENDED: u32 = 1;

    /// What this crate sends: version 0.0.2 and, if wanted, the extension.
    pub fn ours(extension: Option<Extension>) -> Self {
        let capabilities = match extension {
            Some(Extension { command, response }) => vec![Self::EXTENDED, command, response],
            None => vec![0],
        };
        Self { magic: MAGIC, version: Self::VERSION, capabilities }
    }

    /// The extension as the peer announces it.
    pub fn extension(&self) -> Option<Extension> {
        match *self.capabilities {
            [first, command, response, ..] if first & Self::EXTENDED != 0 => {
                Some(Extension { command, response })
            }
            _ => None,
        }
    }
}

/// What a message says.
#[derive(Clone, Debug)]
pub enum Body {
    /// Who the peer is.
    Init(Init),
    /// Acknowledgement or refusal.
    Error(ErrorCode),
    /// A reader with this name (UTF-8 by convention, not checked) appears.
    ReaderAdd(Bytes),
    /// The reader goes.
    ReaderRemove,
    /// A card with this ATR is inserted (not checked).
    Atr(Bytes),
    /// The card is pulled out.
    CardRemove,
    /// A command toward the client, a response toward the host.
    Apdu(Secret),
    /// The client is asked to finish what it has.
    Flush,
    /// The client has.
    FlushComplete,
    /// The host wants the card powered; the client answers with the card's ATR.
    PowerOn(Bytes),
    /// The host wants the card unpowered; the client answers that it is.
    PowerOff,
    /// A type this crate does not know, with its payload.
    Unknown(MessageType, Bytes),
}

impl Body {
    /// The type word that goes with it.
    pub fn message_type(&self) -> MessageType {
        match self {
            Self::Init(_) => MessageType::INIT,
            Self::Error(_) => MessageType::ERROR,
            Self::ReaderAdd(_) => MessageType::READER_ADD,
            Self::ReaderRemove => MessageType::READER_REMOVE,
            Self::Atr(_) => MessageType::ATR,
            Self::CardRemove => MessageType::CARD_REMOVE,
            Self::Apdu(_) => MessageType::APDU,
            Self::Flush => MessageType::FLUSH,
            Self::FlushComplete => MessageType::FLUSH_COMPLETE,
            Self::PowerOn(_) => MessageType::POWER_ON,
            Self::PowerOff => MessageType::POWER_OFF,
            Self::Unknown(kind, _) => *kind,
        }
    }
}

/// One VSCard message.
#[derive(Clone, Debug)]
pub struct Message {
    /// The reader it speaks of.
    pub reader: ReaderId,
    /// What it says.
    pub body: Body,
}

impl Message {
    /// A message about `reader`.
    pub fn new(reader: ReaderId, body: Body) -> Self {
        Self { reader, body }
    }
}
