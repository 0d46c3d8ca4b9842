//! Commands, responses and status words (ISO/IEC 7816-4 §5), and the numbers they are made of.

use std::fmt;

use thiserror::Error;

use crate::{Secret, Validity};

/// Longest command APDU: extended length, 65 535 bytes of data and a three-byte length on both sides.
pub const MAX_COMMAND: usize = 4 + 3 + 65_535 + 2;
/// Longest response APDU: 65 536 bytes of data and the status word.
pub const MAX_RESPONSE: usize = 65_536 + 2;

/// Instruction bytes, named once for every part of the stack (ISO/IEC 7816-4 §5.4.2, GSC-IS 2.1 §5).
pub mod ins {
    /// VERIFY.
    pub const VERIFY: u8 = 0x20;
    /// VERIFY, odd instruction (BER-TLV in the body).
    pub const VERIFY_ODD: u8 = 0x21;
    /// MANAGE SECURITY ENVIRONMENT.
    pub const MANAGE_SECURITY_ENVIRONMENT: u8 = 0x22;
    /// CHANGE REFERENCE DATA.
    pub const CHANGE_REFERENCE_DATA: u8 = 0x24;
    /// DISABLE VERIFICATION REQUIREMENT.
    pub const DISABLE_VERIFICATION: u8 = 0x26;
    /// ENABLE VERIFICATION REQUIREMENT.
    pub const ENABLE_VERIFICATION: u8 = 0x28;
    /// PERFORM SECURITY OPERATION.
    pub const PERFORM_SECURITY_OPERATION: u8 = 0x2A;
    /// RESET RETRY COUNTER.
    pub const RESET_RETRY_COUNTER: u8 = 0x2C;
    /// GET CERTIFICATE (CAC version 1).
    pub const GET_CERTIFICATE: u8 = 0x36;
    /// SIGN/DECRYPT (GSC-IS PRIVATE SIGN/DECRYPT).
    pub const SIGN_DECRYPT: u8 = 0x42;
    /// GENERATE ASYMMETRIC KEY PAIR.
    pub const GENERATE_KEY_PAIR: u8 = 0x47;
    /// GET ACR (GSC-IS).
    pub const GET_ACR: u8 = 0x4C;
    /// READ BUFFER (GSC-IS).
    pub const READ_BUFFER: u8 = 0x52;
    /// GET PROPERTIES (GSC-IS).
    pub const GET_PROPERTIES: u8 = 0x56;
    /// UPDATE BUFFER (GSC-IS).
    pub const UPDATE_BUFFER: u8 = 0x58;
    /// MANAGE CHANNEL.
    pub const MANAGE_CHANNEL: u8 = 0x70;
    /// EXTERNAL AUTHENTICATE.
    pub const EXTERNAL_AUTHENTICATE: u8 = 0x82;
    /// GET CHALLENGE.
    pub const GET_CHALLENGE: u8 = 0x84;
    /// GENERAL AUTHENTICATE.
    pub const GENERAL_AUTHENTICATE: u8 = 0x87;
    /// SELECT.
    pub const SELECT: u8 = 0xA4;
    /// READ BINARY.
    pub const READ_BINARY: u8 = 0xB0;
    /// READ BINARY, odd instruction (offset as BER-TLV in the body).
    pub const READ_BINARY_ODD: u8 = 0xB1;
    /// READ RECORD.
    pub const READ_RECORD: u8 = 0xB2;
    /// READ RECORD, odd instruction (offset as BER-TLV in the body).
    pub const READ_RECORD_ODD: u8 = 0xB3;
    /// GET RESPONSE.
    pub const GET_RESPONSE: u8 = 0xC0;
    /// ENVELOPE.
    pub const ENVELOPE: u8 = 0xC2;
    /// GET DATA, even instruction.
    pub const GET_DATA: u8 = 0xCA;
    /// GET DATA, odd instruction (BER-TLV tag list in the body).
    pub const GET_DATA_ODD: u8 = 0xCB;
    /// PUT DATA, odd instruction.
    pub const PUT_DATA: u8 = 0xDB;

    /// The name of an instruction as the standards write it, if it is one of the above.
    pub fn name(ins: u8) -> Option<&'static str> {
        Some(match ins {
            VERIFY | VERIFY_ODD => "VERIFY",
            MANAGE_SECURITY_ENVIRONMENT => "MANAGE SECURITY ENVIRONMENT",
            CHANGE_REFERENCE_DATA => "CHANGE REFERENCE DATA",
            DISABLE_VERIFICATION => "DISABLE VERIFICATION REQUIREMENT",
            ENABLE_VERIFICATION => "ENABLE VERIFICATION REQUIREMENT",
            PERFORM_SECURITY_OPERATION => "PERFORM SECURITY OPERATION",
            RESET_RETRY_COUNTER => "RESET RETRY COUNTER",
            GET_CERTIFICATE => "GET CERTIFICATE",
            SIGN_DECRYPT => "SIGN/DECRYPT",
            GENERATE_KEY_PAIR => "GENERATE ASYMMETRIC KEY PAIR",
            GET_ACR => "GET ACR",
            READ_BUFFER => "READ BUFFER",
            GET_PROPERTIES => "GET PROPERTIES",
            UPDATE_BUFFER => "UPDATE BUFFER",
            MANAGE_CHANNEL => "MANAGE CHANNEL",
            EXTERNAL_AUTHENTICATE => "EXTERNAL AUTHENTICATE",
            GET_CHALLENGE => "GET CHALLENGE",
            GENERAL_AUTHENTICATE => "GENERAL AUTHENTICATE",
            SELECT => "SELECT",
            READ_BINARY | READ_BINARY_ODD => "READ BINARY",
            READ_RECORD | READ_RECORD_ODD => "READ RECORD",
            GET_RESPONSE => "GET RESPONSE",
            ENVELOPE => "ENVELOPE",
            GET_DATA | GET_DATA_ODD => "GET DATA",
            PUT_DATA => "PUT DATA",
            _ => return None,
        })
    }

    /// Whether the body of an instruction has reference data in it, such as a PIN: VERIFY, CHANGE REFERENCE DATA,
    /// ENABLE and DISABLE VERIFICATION REQUIREMENT, RESET RETRY COUNTER, even and odd (ISO/IEC 7816-4 §11.6).
    pub fn has_reference_data(ins: u8) -> bool {
        matches!(
            ins & 0xFE,
            VERIFY | CHANGE_REFERENCE_DATA | DISABLE_VERIFICATION | ENABLE_VERIFICATION | RESET_RETRY_COUNTER
        )
    }
}

/// Application identifiers, named once for every part of the stack.
pub mod aid {
    /// GSC-IS RID: card capability container and other GSC-IS containers (`A0 00 00 01 16`).
    pub const RID_GSC_IS: [u8; 5] = [0xA0, 0x00, 0x00, 0x01, 0x16];
    /// CAC RID (`A0 00 00 00 79`).
    pub const RID_CAC: [u8; 5] = [0xA0, 0x00, 0x00, 0x00, 0x79];
    /// CAC card capability container.
    pub const CAC_CCC: [u8; 7] = [0xA0, 0x00, 0x00, 0x01, 0x16, 0xDB, 0x00];
    /// CAC access control applet.
    pub const CAC_ACA: [u8; 7] = [0xA0, 0x00, 0x00, 0x00, 0x79, 0x03, 0x00];
    /// GlobalPlatform card manager, as CAC middleware selects it.
    pub const GLOBAL_PLATFORM: [u8; 7] = [0xA0, 0x00, 0x00, 0x00, 0x03, 0x00, 0x00];
    /// Microsoft plug-and-play application (Windows smartcard minidriver discovery).
    pub const MICROSOFT_PNP: [u8; 11] = [0xA0, 0x00, 0x00, 0x03, 0x97, 0x43, 0x49, 0x44, 0x5F, 0x01, 0x00];
    /// PIV card application, without the version suffix (SP 800-73-4 Part 1 §2.2).
    pub const PIV: [u8; 9] = [0xA0, 0x00, 0x00, 0x03, 0x08, 0x00, 0x00, 0x10, 0x00];

    /// A readable name of an application, if it is one of the above or a CAC PKI container.
    pub fn name(aid: &[u8]) -> Option<&'static str> {
        Some(match aid {
            a if a == CAC_CCC => "CAC CCC",
            a if a == CAC_ACA => "CAC ACA",
            a if a == GLOBAL_PLATFORM => "GlobalPlatform",
            a if a == MICROSOFT_PNP => "Microsoft plug-and-play",
            a if a.starts_with(&PIV) => "PIV",
            a if a.len() == 7 && a.starts_with(&RID_CAC) && a[5] == 0x01 => "CAC PKI container",
            a if a.starts_with(&RID_CAC) => "CAC container",
            a if a.starts_with(&RID_GSC_IS) => "GSC-IS container",
            _ => return None,
        })
    }
}

/// The seven forms a command APDU can have (ISO/IEC 7816-3 §12.1.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Case {
    /// Header only.
    C1,
    /// Le, one byte.
    C2Short,
    /// Lc and data, one byte of length.
    C3Short,
    /// Lc, data and Le, one byte of length each.
    C4Short,
    /// Le, extended (three bytes).
    C2Extended,
    /// Lc and data, extended (three bytes of length).
    C3Extended,
    /// Lc, data and Le, extended (three and two bytes of length).
    C4Extended,
}

/// Why bytes are not a command APDU. Offsets count from the class byte; no byte of the body is quoted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum CommandError {
    /// Fewer than the four header bytes.
    #[error("command APDU of {length} bytes ends within the header (CLA INS P1 P2)")]
    Header {
        /// Bytes there were.
        length: usize,
    },
    /// Lc does not agree with the number of bytes that follow it.
    #[error("Lc at offset {offset} does not agree with the {follow} bytes that follow it")]
    Lc {
        /// Where the length field starts.
        offset: usize,
        /// Bytes after the length field.
        follow: usize,
    },
    /// An extended length field that is cut short.
    #[error("extended length field at offset {offset} is cut short")]
    ExtendedLength {
        /// Where the length field starts.
        offset: usize,
    },
    /// More data than an APDU can carry, or an Le outside 1 to 65 536.
    #[error("{field} of {value} does not fit an APDU")]
    TooLong {
        /// The field: `data`, `Le` or `command`.
        field: &'static str,
        /// Its value in bytes.
        value: usize,
    },
}

/// A command APDU: the bytes as they came, and where their parts are.
///
/// ```
/// use vscard_protocol::{Case, Command};
/// let select = Command::parse(&[0x00, 0xA4, 0x04, 0x00, 0x02, 0x3F, 0x00, 0x00])?;
/// assert_eq!((select.case(), select.data(), select.le()), (Case::C4Short, &[0x3F, 0x00][..], Some(256)));
/// # Ok::<(), vscard_protocol::CommandError>(())
/// ```
#[derive(Clone)]
pub struct Command {
    raw: Secret,
    case: Case,
    data: (usize, usize),
    /// Expected response length; 0 when absent (an Le of zero bytes cannot be written).
    le: u32,
}

impl Command {
    /// Parses any of the seven forms.
    ///
    /// # Errors
    /// [`CommandError`] when the bytes are none of them.
    pub fn parse(bytes: &[u8]) -> Result<Self, CommandError> {
        if bytes.len() > MAX_COMMAND {
            return Err(CommandError::TooLong { field: "command", value: bytes.len() });
        }
        let Some(body) = bytes.get(4..) else { return Err(CommandError::Header { length: bytes.len() }) };
        let (case, data, le) = match *body {
            [] => (Case::C1, (4, 4), 0),
            [le] => (Case::C2Short, (4, 4), short_le(le)),
            [0, _] => return Err(CommandError::ExtendedLength { offset: 4 }),
            [0, high, low] => (Case::C2Extended, (4, 4), extended_le(high, low)),
            [0, high, low, ..] => {
                let lc = usize::from(u16::from_be_bytes([high, low]));
                let follow = body.len() - 3;
                match follow.checked_sub(lc) {
                    Some(0) if lc > 0 => (Case::C3Extended, (7, 7 + lc), 0),
                    Some(2) if lc > 0 => {
                        (Case::C4Extended, (7, 7 + lc), extended_le(body[3 + lc], body[4 + lc]))
                    }
                    _ => return Err(CommandError::Lc { offset: 4, follow }),
                }
            }
            [lc, ..] => {
                let (lc, follow) = (usize::from(lc), body.len() - 1);
                match follow.checked_sub(lc) {
                    Some(0) => (Case::C3Short, (5, 5 + lc), 0),
                    Some(1) => (Case::C4Short, (5, 5 + lc), short_le(body[1 + lc])),
                    _ => return Err(CommandError::Lc { offset: 4, follow }),
                }
            }
        };
        Ok(Self { raw: Secret::from(bytes), case, data, le })
    }

    /// Builds a command; the short form when data and Le allow it, else the extended one.
    ///
    /// `le` is the longest response wanted in bytes, 1 to 65 536.
    ///
    /// # Errors
    /// [`CommandError::TooLong`] when data or `le` do not fit.
    pub fn build(header: [u8; 4], data: &[u8], le: Option<u32>) -> Result<Self, CommandError> {
        if data.len() > 65_535 {
            return Err(CommandError::TooLong { field: "data", value: data.len() });
        }
        if let Some(le) = le.filter(|le| !(1..=65_536).contains(le)) {
            return Err(CommandError::TooLong { field: "Le", value: le as usize });
        }
        let extended = data.len() > 255 || le.is_some_and(|le| le > 256);
        let mut raw = Vec::with_capacity(data.len() + 9);
        raw.extend_from_slice(&header);
        // 256 and 65 536 are written as zero, which is what the casts do.
        match (extended, data.is_empty(), le) {
            (_, true, None) => {}
            (false, true, Some(le)) => raw.push(le as u8),
            (false, false, le) => {
                raw.push(data.len() as u8);
                raw.extend_from_slice(data);
                raw.extend(le.map(|le| le as u8));
            }
            (true, true, Some(le)) => {
                raw.push(0);
                raw.extend_from_slice(&(le as u16).to_be_bytes());
            }
            (true, false, le) => {
                raw.push(0);
                raw.extend_from_slice(&(data.len() as u16).to_be_bytes());
                raw.extend_from_slice(data);
                if let Some(le) = le {
                    raw.extend_from_slice(&(le as u16).to_be_bytes());
                }
            }
        }
        let command = Self::parse(&raw);
        zeroize::Zeroize::zeroize(&mut raw);
        command
    }

    /// Which of the seven forms it is.
    pub fn case(&self) -> Case {
        self.case
    }

    /// Class byte.
    pub fn cla(&self) -> u8 {
        self.raw.expose()[0]
    }

    /// Instruction byte.
    pub fn ins(&self) -> u8 {
        self.raw.expose()[1]
    }

    /// First parameter.
    pub fn p1(&self) -> u8 {
        self.raw.expose()[2]
    }

    /// Second parameter.
    pub fn p2(&self) -> u8 {
        self.raw.expose()[3]
    }

    /// Both parameters, P1 as the high byte.
    pub fn p1p2(&self) -> u16 {
        u16::from_be_bytes([self.p1(), self.p2()])
    }

    /// CLA INS P1 P2.
    pub fn header(&self) -> [u8; 4] {
        [self.cla(), self.ins(), self.p1(), self.p2()]
    }

    /// The body, without length fields; empty in cases 1 and 2.
    pub fn data(&self) -> &[u8] {
        &self.raw.expose()[self.data.0..self.data.1]
    }

    /// Longest response wanted in bytes, 1 to 65 536; `None` when the command has no Le.
    pub fn le(&self) -> Option<usize> {
        (self.le > 0).then_some(self.le as usize)
    }

    /// Whether it is in extended form.
    pub fn is_extended(&self) -> bool {
        matches!(self.case, Case::C2Extended | Case::C3Extended | Case::C4Extended)
    }

    /// The bytes as they came.
    pub fn as_bytes(&self) -> &[u8] {
        self.raw.expose()
    }
}

fn short_le(le: u8) -> u32 {
    if le == 0 { 256 } else { le.into() }
}

fn extended_le(high: u8, low: u8) -> u32 {
    match u16::from_be_bytes([high, low]) {
        0 => 65_536,
        le => le.into(),
    }
}

impl fmt::Debug for Command {
    /// Header, form and lengths; never the body.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [cla, ins, p1, p2] = self.header();
        write!(
            f,
            "Command({cla:02X} {ins:02X} {p1:02X} {p2:02X}, {:?}, Lc {}",
            self.case,
            self.data().len()
        )?;
        match self.le() {
            Some(le) => write!(f, ", Le {le})"),
            None => f.write_str(")"),
        }
    }
}

/// SW1-SW2, the last two bytes of a response (ISO/IEC 7816-4 §5.6).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct StatusWord(pub u16);

impl StatusWord {
    /// 9000: done.
    pub const SUCCESS: Self = Self(0x9000);
    /// 6581: memory failure; the state of the card could not be written.
    pub const MEMORY_FAILURE: Self = Self(0x6581);
    /// 6700: wrong length.
    pub const WRONG_LENGTH: Self = Self(0x6700);
    /// 6881: logical channel not supported.
    pub const CHANNEL_NOT_SUPPORTED: Self = Self(0x6881);
    /// 6882: secure messaging not supported.
    pub const SECURE_MESSAGING_NOT_SUPPORTED: Self = Self(0x6882);
    /// 6884: command chaining not supported.
    pub const CHAINING_NOT_SUPPORTED: Self = Self(0x6884);
    /// 6982: security status not satisfied.
    pub const SECURITY_STATUS_NOT_SATISFIED: Self = Self(0x6982);
    /// 6983: authentication method blocked.
    pub const AUTHENTICATION_BLOCKED: Self = Self(0x6983);
    /// 6985: conditions of use not satisfied.
    pub const CONDITIONS_NOT_SATISFIED: Self = Self(0x6985);
    /// 6A80: incorrect parameters in the data field.
    pub const INCORRECT_DATA: Self = Self(0x6A80);
    /// 6A81: function not supported.
    pub const FUNCTION_NOT_SUPPORTED: Self = Self(0x6A81);
    /// 6A82: file or application not found.
    pub const NOT_FOUND: Self = Self(0x6A82);
    /// 6A86: incorrect P1-P2.
    pub const INCORRECT_P1P2: Self = Self(0x6A86);
    /// 6A88: referenced data not found.
    pub const REFERENCE_NOT_FOUND: Self = Self(0x6A88);
    /// 6D00: instruction not supported.
    pub const INS_NOT_SUPPORTED: Self = Self(0x6D00);
    /// 6E00: class not supported.
    pub const CLA_NOT_SUPPORTED: Self = Self(0x6E00);
    /// 6F00: no precise diagnosis.
    pub const NO_DIAGNOSIS: Self = Self(0x6F00);

    /// 61XX: `left` more bytes wait for GET RESPONSE; 00 stands for 256 or more.
    pub fn more(left: usize) -> Self {
        Self(0x6100 | if left > 255 { 0 } else { left as u16 })
    }

    /// 6CXX: wrong Le, `exact` is the right one (00 for 256).
    pub fn wrong_le(exact: usize) -> Self {
        Self(0x6C00 | if exact > 255 { 0 } else { exact as u16 })
    }

    /// 63CX: verification failed, `left` tries remain (15 at most can be written).
    pub fn tries_left(left: u8) -> Self {
        Self(0x63C0 | u16::from(left.min(15)))
    }

    /// SW1.
    pub fn sw1(self) -> u8 {
        (self.0 >> 8) as u8
    }

    /// SW2.
    pub fn sw2(self) -> u8 {
        self.0 as u8
    }
}

impl fmt::Display for StatusWord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04X}", self.0)
    }
}

impl fmt::Debug for StatusWord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StatusWord({:04X})", self.0)
    }
}

/// Why bytes are not a response APDU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ResponseError {
    /// No room for a status word.
    #[error("response APDU of {0} bytes has no status word")]
    Short(usize),
    /// More than 65 536 bytes of data.
    #[error("response APDU of {0} bytes is longer than 65 538")]
    Long(usize),
}

/// A response APDU: data and status word.
#[derive(Clone)]
pub struct Response {
    /// Data and status word together, as they go over a wire.
    raw: Secret,
    validity: Validity,
}

impl Response {
    /// A response of `data` and `status`.
    ///
    /// # Panics
    /// Never; data beyond 65 536 bytes is the caller's bug and is cut.
    pub fn new(data: &[u8], status: StatusWord) -> Self {
        let data = &data[..data.len().min(MAX_RESPONSE - 2)];
        let mut raw = Vec::with_capacity(data.len() + 2);
        raw.extend_from_slice(data);
        raw.extend_from_slice(&status.0.to_be_bytes());
        Self { raw: Secret::new(raw), validity: Validity::default() }
    }

    /// Splits bytes into data and status word.
    ///
    /// # Errors
    /// [`ResponseError`] when they are fewer than 2 or more than 65 538.
    pub fn parse(bytes: &[u8]) -> Result<Self, ResponseError> {
        match bytes.len() {
            length @ 0..=1 => Err(ResponseError::Short(length)),
            length if length > MAX_RESPONSE => Err(ResponseError::Long(length)),
            _ => Ok(Self { raw: Secret::from(bytes), validity: Validity::default() }),
        }
    }

    /// The same response, to be handed out only as long as that.
    #[must_use]
    pub fn valid(self, validity: Validity) -> Self {
        Self { validity, ..self }
    }

    /// For how long it may be handed out.
    pub fn validity(&self) -> &Validity {
        &self.validity
    }

    /// The data, without the status word.
    pub fn data(&self) -> &[u8] {
        let raw = self.raw.expose();
        &raw[..raw.len() - 2]
    }

    /// The status word.
    pub fn status(&self) -> StatusWord {
        let raw = self.raw.expose();
        StatusWord(u16::from_be_bytes([raw[raw.len() - 2], raw[raw.len() - 1]]))
    }

    /// Data and status word together.
    pub fn as_bytes(&self) -> &[u8] {
        self.raw.expose()
    }
}

impl From<StatusWord> for Response {
    fn from(status: StatusWord) -> Self {
        Self::new(&[], status)
    }
}

impl fmt::Debug for Response {
    /// Length and status; never the data.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Response({} bytes, {})", self.data().len(), self.status())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_seven_cases() {
        let header = [0x00, 0xCB, 0x3F, 0xFF];
        let long = vec![0x55; 300];
        for (data, le, case) in [
            (&[][..], None, Case::C1),
            (&[], Some(1), Case::C2Short),
            (&[], Some(256), Case::C2Short),
            (&[1, 2], None, Case::C3Short),
            (&[1, 2], Some(256), Case::C4Short),
            (&[], Some(257), Case::C2Extended),
            (&[], Some(65_536), Case::C2Extended),
            (&long, None, Case::C3Extended),
            (&long, Some(10), Case::C4Extended),
            (&[7], Some(65_536), Case::C4Extended),
        ] {
            let built = Command::build(header, data, le).unwrap();
            assert_eq!(built.case(), case);
            assert_eq!(built.header(), header);
            assert_eq!(built.data(), data);
            assert_eq!(built.le(), le.map(|le| le as usize));
        }
    }

    #[test]
    fn malformed_commands_name_field_and_offset() {
        let error = |bytes: &[u8]| Command::parse(bytes).unwrap_err().to_string();
        assert_eq!(error(&[0, 1, 2]), "command APDU of 3 bytes ends within the header (CLA INS P1 P2)");
        assert_eq!(
            error(&[0, 0x20, 0, 0, 8, 0x31]),
            "Lc at offset 4 does not agree with the 1 bytes that follow it"
        );
        assert_eq!(error(&[0, 0x20, 0, 0, 0, 9]), "extended length field at offset 4 is cut short");
        // An extended Lc of zero is not a form (ISO/IEC 7816-3 §12.1.3).
        assert!(Command::parse(&[0, 0x20, 0, 0, 0, 0, 0, 1]).is_err());
    }

    #[test]
    fn debug_shows_no_body() {
        let verify = Command::build([0, ins::VERIFY, 0, 0], b"12345678", None).unwrap();
        assert_eq!(format!("{verify:?}"), "Command(00 20 00 00, C3Short, Lc 8)");
        let response = Response::new(b"secret", StatusWord::SUCCESS);
        assert_eq!(format!("{response:?}"), "Response(6 bytes, 9000)");
    }

    #[test]
    fn counted_status_words() {
        assert_eq!(StatusWord::more(300).0, 0x6100);
        assert_eq!(StatusWord::more(13).0, 0x610D);
        assert_eq!(StatusWord::tries_left(2).0, 0x63C2);
        assert_eq!(StatusWord::wrong_le(256).0, 0x6C00);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_command_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            if let Ok(command) = Command::parse(&bytes) {
                prop_assert_eq!(command.as_bytes(), &bytes[..]);
                prop_assert!(command.le().is_none_or(|le| (1..=65_536).contains(&le)));
            }
        }

        #[test]
        fn built_commands_parse_back(
            header in any::<[u8; 4]>(),
            data in proptest::collection::vec(any::<u8>(), 0..600),
            le in proptest::option::of(1u32..=65_536),
        ) {
            let command = Command::build(header, &data, le).unwrap();
            prop_assert_eq!(command.header(), header);
            prop_assert_eq!(command.data(), &data[..]);
            prop_assert_eq!(command.le(), le.map(|le| le as usize));
        }
    }
}
