//! CCID messages and their bytes (USB CCID 1.1 §6).

use vscard_protocol::{Atr, Secret, StatusWord};

use crate::descriptor::{CLOCK_KHZ, DATA_RATES};

/// Bytes before abData in every message (USB CCID 1.1 §6).
pub(crate) const HEADER: usize = 10;

/// bMessageType of a message from the host (USB CCID 1.1 §6.1). IccClock (6E), T0APDU (6A) and Mechanical
/// (71) are answered as unknown types are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MessageType(pub(crate) u8);

impl MessageType {
    pub(crate) const SET_PARAMETERS: Self = Self(0x61);
    pub(crate) const ICC_POWER_ON: Self = Self(0x62);
    pub(crate) const ICC_POWER_OFF: Self = Self(0x63);
    pub(crate) const GET_SLOT_STATUS: Self = Self(0x65);
    pub(crate) const SECURE: Self = Self(0x69);
    pub(crate) const ESCAPE: Self = Self(0x6B);
    pub(crate) const GET_PARAMETERS: Self = Self(0x6C);
    pub(crate) const RESET_PARAMETERS: Self = Self(0x6D);
    pub(crate) const XFR_BLOCK: Self = Self(0x6F);
    pub(crate) const ABORT: Self = Self(0x72);
    pub(crate) const SET_RATE_AND_CLOCK: Self = Self(0x73);

    /// What it is answered with, an unknown type included (USB CCID 1.1 §6.2).
    pub(crate) fn answer(self) -> AnswerType {
        match self {
            Self::ICC_POWER_ON | Self::XFR_BLOCK | Self::SECURE => AnswerType::DataBlock,
            Self::GET_PARAMETERS | Self::RESET_PARAMETERS | Self::SET_PARAMETERS => AnswerType::Parameters,
            Self::ESCAPE => AnswerType::Escape,
            Self::SET_RATE_AND_CLOCK => AnswerType::RateAndClock,
            _ => AnswerType::SlotStatus,
        }
    }
}

/// bMessageType of a message to the host (USB CCID 1.1 §6.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum AnswerType {
    DataBlock = 0x80,
    SlotStatus = 0x81,
    Parameters = 0x82,
    Escape = 0x83,
    RateAndClock = 0x84,
}

/// The header of a message from the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) kind: MessageType,
    /// dwLength.
    pub(crate) length: u32,
    /// bSlot.
    pub(crate) slot: u8,
    /// bSeq.
    pub(crate) seq: u8,
    /// The three bytes that mean something else in each message.
    pub(crate) specific: [u8; 3],
}

impl Header {
    /// The header of `bytes`; `None` when they are fewer than a header has.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        let &[kind, l0, l1, l2, l3, slot, seq, b7, b8, b9, ..] = bytes else { return None };
        Some(Self {
            kind: MessageType(kind),
            length: u32::from_le_bytes([l0, l1, l2, l3]),
            slot,
            seq,
            specific: [b7, b8, b9],
        })
    }
}

/// bmICCStatus (USB CCID 1.1 §6.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum IccStatus {
    Active = 0,
    Inactive = 1,
    Absent = 2,
}

/// bmCommandStatus, and bError with it (USB CCID 1.1 §6.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    Done,
    Failed(ErrorCode),
    /// Give it one more waiting time: bError is the multiplier.
    TimeExtension,
}

/// bError of a command that failed (USB CCID 1.1 §6.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ErrorCode(pub(crate) u8);

impl ErrorCode {
    pub(crate) const NOT_SUPPORTED: Self = Self(0);
    /// dwLength is wrong.
    pub(crate) const LENGTH: Self = Self(1);
    /// bSlot does not exist.
    pub(crate) const SLOT: Self = Self(5);
    /// bPowerSelect or bProtocolNum is wrong.
    pub(crate) const SEVENTH: Self = Self(7);
    /// wLevelParameter is wrong.
    pub(crate) const LEVEL: Self = Self(8);
    pub(crate) const SLOT_BUSY: Self = Self(0xE0);
    pub(crate) const BUSY_WITH_AUTO_SEQUENCE: Self = Self(0xF2);
    pub(crate) const HARDWARE: Self = Self(0xFB);
    pub(crate) const ICC_MUTE: Self = Self(0xFE);
    pub(crate) const ABORTED: Self = Self(0xFF);

    /// The byte of abData at `offset` is wrong.
    pub(crate) fn data(offset: u8) -> Self {
        Self(HEADER as u8 + offset)
    }
}

/// A message to the host. `last` is bChainParameter, bClockStatus, bProtocolNum or RFU (USB CCID 1.1 §6.2).
pub(crate) fn answer(
    kind: AnswerType,
    [slot, seq]: [u8; 2],
    icc: IccStatus,
    status: Status,
    last: u8,
    data: &[u8],
) -> Secret {
    let (command, error) = match status {
        Status::Done => (0x00, 0),
        Status::Failed(ErrorCode(error)) => (0x40, error),
        Status::TimeExtension => (0x80, 1),
    };
    // The longest is 65 538 bytes of response.
    let [l0, l1, l2, l3] = (data.len() as u32).to_le_bytes();
    // One allocation of the right size: none is left behind unwiped.
    let mut bytes = Vec::with_capacity(HEADER + data.len());
    bytes.extend([kind as u8, l0, l1, l2, l3, slot, seq, command | icc as u8, error, last]);
    bytes.extend_from_slice(data);
    Secret::new(bytes)
}

/// The answer to a message of type `kind` that failed (USB CCID 1.1 §6.2.6).
pub(crate) fn failure(
    kind: MessageType,
    ids: [u8; 2],
    icc: IccStatus,
    error: ErrorCode,
    parameters: &Parameters,
) -> Secret {
    let status = Status::Failed(error);
    match kind.answer() {
        // These two have their structure whatever the outcome (USB CCID 1.1 §6.2.3, §6.2.5).
        kind @ AnswerType::Parameters => {
            answer(kind, ids, icc, status, parameters.protocol, parameters.structure())
        }
        kind @ AnswerType::RateAndClock => {
            let [rate, ..] = DATA_RATES;
            let data = [CLOCK_KHZ.to_le_bytes(), rate.to_le_bytes()].concat();
            answer(kind, ids, icc, status, 0, &data)
        }
        kind => answer(kind, ids, icc, status, 0, &[]),
    }
}

/// SW1-SW2 in place of a response that may not be read any more: the PIN behind it is not verified any more.
pub(crate) const REFUSED: [u8; 2] = StatusWord::SECURITY_STATUS_NOT_SATISFIED.0.to_be_bytes();

/// The answer in place of the one that had this header, with a response in it, or a part of one.
pub(crate) fn refused(header: [u8; HEADER]) -> Secret {
    let [kind, _, _, _, _, slot, seq, status, error, chain] = header;
    // Nothing follows it, so the first part is all, and any other the last (USB CCID 1.1 §6.2.1).
    let [l0, l1, l2, l3] = (REFUSED.len() as u32).to_le_bytes();
    let header = [kind, l0, l1, l2, l3, slot, seq, status, error, chain & 2];
    Secret::new([&header[..], &REFUSED].concat())
}

/// Whether a message to the host says that its command was aborted.
pub(crate) fn is_aborted(answer: &[u8]) -> bool {
    matches!(answer, [_, _, _, _, _, _, _, status, 0xFF, ..] if status & 0xC0 == 0x40)
}

/// Whether a message to the host asks for more time.
pub(crate) fn is_time_extension(answer: &[u8]) -> bool {
    matches!(answer, [_, _, _, _, _, _, _, status, ..] if status & 0xC0 == 0x80)
}

/// Transmission parameters of a slot (USB CCID 1.1 §6.1.7). Nothing is transmitted by them here: the card
/// speaks APDUs. They are kept and told as the host expects it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Parameters {
    /// bProtocolNum, 0 or 1.
    pub(crate) protocol: u8,
    /// abProtocolDataStructure for T=1; T=0 has the first five bytes' worth.
    pub(crate) data: [u8; 7],
}

impl Parameters {
    /// What a slot has before there was a card in it.
    pub(crate) const DEFAULT: Self = Self { protocol: 0, data: [0x11, 0x00, 0x00, 0x0A, 0x00, 0, 0] };

    /// Length of abProtocolDataStructure; `None` for a protocol there is none for.
    pub(crate) fn length(protocol: u8) -> Option<usize> {
        match protocol {
            0 => Some(5),
            1 => Some(7),
            _ => None,
        }
    }

    /// abProtocolDataStructure.
    pub(crate) fn structure(&self) -> &[u8] {
        let length = Self::length(self.protocol).unwrap_or(5);
        &self.data[..length]
    }

    /// What an answer to reset asks for (ISO/IEC 7816-3 §8.3).
    pub(crate) fn of_atr(atr: &Atr) -> Self {
        let bytes = atr.as_bytes();
        let inverse = if bytes.first() == Some(&0x3F) { 2 } else { 0 };
        let mut set = InterfaceBytes::default();
        set.read(bytes);
        let rate = set.ta1.unwrap_or(0x11);
        let guard = set.tc1.unwrap_or(0);
        match atr.protocols().next() {
            Some(1) => {
                let check = set.tc3.unwrap_or(0) & 1;
                let waiting = set.tb3.unwrap_or(0x4D);
                let size = set.ta3.filter(|size| (1..=254).contains(size)).unwrap_or(32);
                Self { protocol: 1, data: [rate, 0x10 | inverse | check, guard, waiting, 0, size, 0] }
            }
            _ => {
                let waiting = atr.tc2().unwrap_or(0x0A);
                Self { protocol: 0, data: [rate, inverse, guard, waiting, 0, 0, 0] }
            }
        }
    }

    /// Parameters the host sets.
    ///
    /// # Errors
    /// The offset of the field that is wrong (USB CCID 1.1 §6.1.7).
    pub(crate) fn parse(protocol: u8, structure: &[u8]) -> Result<Self, ErrorCode> {
        let length = Self::length(protocol).ok_or(ErrorCode::SEVENTH)?;
        if structure.len() != length {
            return Err(ErrorCode::LENGTH);
        }
        let mut data = [0; 7];
        data[..length].copy_from_slice(structure);
        let [_, check, _, _, clock_stop, size, node] = data;
        let wrong = match protocol {
            0 if check & !0x02 != 0 => Some(1),
            1 if check & !0x03 != 0x10 => Some(1),
            _ if clock_stop > 3 => Some(4),
            1 if size == 0 || size == 0xFF => Some(5),
            // Other node addresses need a feature that is not announced (dwFeatures 0x200).
            1 if node != 0 => Some(6),
            _ => None,
        };
        match wrong {
            Some(offset) => Err(ErrorCode::data(offset)),
            None => Ok(Self { protocol, data }),
        }
    }
}

/// The interface bytes of an ATR that parameters are made of (ISO/IEC 7816-3 §8.2.3).
#[derive(Default)]
struct InterfaceBytes {
    ta1: Option<u8>,
    tc1: Option<u8>,
    ta3: Option<u8>,
    tb3: Option<u8>,
    tc3: Option<u8>,
}

impl InterfaceBytes {
    fn read(&mut self, atr: &[u8]) {
        let mut rest = atr.iter().copied().skip(1);
        let mut present = rest.next().unwrap_or(0) >> 4;
        // The first bytes for T=1 after TD2 hold for it; what follows for other protocols does not.
        for level in 1..=3 {
            let mut take = |bit: u8| if present & bit != 0 { rest.next() } else { None };
            let (a, b, c, d) = (take(1), take(2), take(4), take(8));
            match level {
                1 => (self.ta1, self.tc1) = (a, c),
                3 => (self.ta3, self.tb3, self.tc3) = (a, b, c),
                _ => {}
            }
            let Some(d) = d else { return };
            if level == 2 && d & 0x0F != 1 {
                return;
            }
            present = d >> 4;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_follow_the_atr() {
        let t0 = Parameters::of_atr(&Atr::t0(b"card").unwrap());
        assert_eq!((t0.protocol, t0.structure()), (0, &[0x11, 0x00, 0x00, 0x01, 0x00][..]));
        let t1 = Parameters::of_atr(&Atr::t1(b"card").unwrap());
        assert_eq!((t1.protocol, t1.structure()), (1, &[0x11, 0x10, 0x00, 0x45, 0x00, 0xFE, 0x00][..]));
        // A YubiKey 4: TA1 = 13, TC1 = 00, T=1 with IFSC 254 and waiting times 15.
        let yubikey = Atr::parse(&[
            0x3B, 0xF8, 0x13, 0x00, 0x00, 0x81, 0x31, 0xFE, 0x15, 0x59, 0x75, 0x62, 0x69, 0x6B, 0x65, 0x79,
            0x34, 0xD4,
        ]);
        let yubikey = Parameters::of_atr(&yubikey.unwrap());
        assert_eq!(yubikey.structure(), [0x13, 0x10, 0x00, 0x15, 0x00, 0xFE, 0x00]);
        // Inverse convention.
        let inverse = Parameters::of_atr(&Atr::parse(&[0x3F, 0x00]).unwrap());
        assert_eq!(inverse.structure(), [0x11, 0x02, 0x00, 0x0A, 0x00]);
    }

    #[test]
    fn wrong_parameters_are_named_by_offset() {
        let error = |protocol, structure: &[u8]| Parameters::parse(protocol, structure).unwrap_err().0;
        assert_eq!(error(2, &[0; 5]), 7);
        assert_eq!(error(0, &[0; 7]), 1);
        assert_eq!(error(0, &[0x11, 0x10, 0, 10, 0]), 11);
        assert_eq!(error(0, &[0x11, 0x00, 0, 10, 4]), 14);
        assert_eq!(error(1, &[0x11, 0x00, 0, 0x45, 0, 254, 0]), 11);
        assert_eq!(error(1, &[0x11, 0x10, 0, 0x45, 0, 255, 0]), 15);
        assert_eq!(error(1, &[0x11, 0x10, 0, 0x45, 0, 254, 1]), 16);
        assert!(Parameters::parse(1, &[0x95, 0x13, 0, 0x45, 3, 32, 0]).is_ok());
    }

    #[test]
    fn every_message_has_its_answer() {
        let answers: Vec<_> =
            [0x62, 0x63, 0x65, 0x6F, 0x6C, 0x6D, 0x61, 0x6B, 0x6E, 0x6A, 0x69, 0x71, 0x72, 0x73, 0x00, 0xFF]
                .map(|kind| MessageType(kind).answer() as u8)
                .into();
        assert_eq!(
            answers,
            [0x80, 0x81, 0x81, 0x80, 0x82, 0x82, 0x82, 0x83, 0x81, 0x81, 0x80, 0x81, 0x81, 0x84, 0x81, 0x81]
        );
    }
}
