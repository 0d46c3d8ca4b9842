//! The floor of a road to a reader: responders that do nothing, for ours to be measured beside.
//!
//! Each enumerates as our reader does, with one card in it, and answers every command at once with the same bytes.
//! One thread, blocking calls, one buffer to read into, one write for an answer: what a road costs when the reader
//! at its end costs nothing. Nothing here is taken from the programs that are measured, and nothing is checked that
//! a guest in good order does not need.

mod usbip;
mod usbredir;

use std::collections::VecDeque;
use std::io::{self, Read, Write};

pub use usbip::usbip;
pub use usbredir::usbredir;

/// What the card answers to every command, as long as a card's of certificates to a SELECT: done, and there is more.
pub const ANSWER: [u8; 2] = [0x61, 0x0D];

/// T=1 and nothing else.
const ATR: [u8; 4] = [0x3B, 0x80, 0x01, 0x81];
/// abProtocolDataStructure for T=1 (USB CCID 1.1 §6.1.7).
const PARAMETERS: [u8; 7] = [0x11, 0x10, 0x00, 0x45, 0x00, 0xFE, 0x00];

const VENDOR: u16 = 0x08E6;
const PRODUCT: u16 = 0x4433;
const VERSION: u16 = 0x0100;
/// Both directions have the same number.
const BULK: u8 = 1;
const INTERRUPT: u8 = 2;

/// Longest CCID message and the headers around it fit twice.
const BUFFER: usize = 256 * 1024;

/// A reader with a card in it.
struct Reader {
    serial: String,
    powered: bool,
    /// The card that is in is still to be told.
    news: bool,
    /// To bulk-IN, in order.
    answers: VecDeque<Vec<u8>>,
}

impl Reader {
    fn new(serial: &str) -> Self {
        Self { serial: serial.to_owned(), powered: false, news: true, answers: VecDeque::new() }
    }

    /// A control transfer; `None` is a STALL.
    fn control(&mut self, setup: [u8; 8]) -> Option<Vec<u8>> {
        let [request_type, request, value_low, value_high, _, _, length_low, length_high] = setup;
        let mut answer = match (request_type, request) {
            // GET_DESCRIPTOR
            (0x80, 6) => self.descriptor(value_high, value_low)?,
            // GET_STATUS of anything, GET_INTERFACE, and GET_CONFIGURATION
            (0x80..=0x82, 0) => vec![0, 0],
            (0x81, 10) => vec![0],
            (0x80, 8) => vec![1],
            // SET_CONFIGURATION
            (0x00, 9) => {
                self.reset();
                Vec::new()
            }
            // SET_INTERFACE, CLEAR_FEATURE, and CCID's ABORT
            (0x01, 11) | (0x02, 1) | (0x21, 1) => Vec::new(),
            _ => return None,
        };
        answer.truncate(u16::from_le_bytes([length_low, length_high]).into());
        Some(answer)
    }

    fn descriptor(&self, kind: u8, index: u8) -> Option<Vec<u8>> {
        let [vendor, product, version] = [VENDOR, PRODUCT, VERSION].map(u16::to_le_bytes);
        match (kind, index) {
            (1, 0) => {
                let ids = [vendor, product, version].concat();
                Some([&[18, 1, 0x00, 0x02, 0, 0, 0, 64][..], &ids, &[1, 2, 3, 1]].concat())
            }
            (2, 0) => Some(CONFIGURATION.concat()),
            (3, 0) => Some(vec![4, 3, 0x09, 0x04]),
            (3, 1) => Some(string("Virtual Smartcard")),
            (3, 2) => Some(string("Virtual Smartcard Reader")),
            (3, 3) => Some(string(&self.serial)),
            (6, 0) => Some(vec![10, 6, 0x00, 0x02, 0, 0, 0, 64, 1, 0]),
            _ => None,
        }
    }

    fn reset(&mut self) {
        (self.powered, self.news) = (false, true);
        self.answers.clear();
    }

    /// A message to the reader, whose answer is for bulk-IN (USB CCID 1.1 §6).
    fn bulk_out(&mut self, message: &[u8]) -> io::Result<()> {
        let &[kind, _, _, _, _, slot, seq, ..] = message else {
            return Err(io::Error::other("not a CCID message"));
        };
        let (answer, failed, last, data): (u8, bool, u8, &[u8]) = match kind {
            0x62 => (0x80, false, 0, &ATR),
            0x6F => (0x80, false, 0, &ANSWER),
            0x61 | 0x6C | 0x6D => (0x82, false, 1, &PARAMETERS),
            0x63 | 0x65 => (0x81, false, 0, &[]),
            0x6B => (0x83, true, 0, &[]),
            _ => (0x81, true, 0, &[]),
        };
        match kind {
            0x62 => self.powered = true,
            0x63 => self.powered = false,
            _ => {}
        }
        let status = if failed { 0x40 } else { 0 } | u8::from(!self.powered);
        let header = [answer, data.len() as u8, 0, 0, 0, slot, seq, status, 0, last];
        self.answers.push_back([&header[..], data].concat());
        Ok(())
    }

    /// RDR_to_PC_NotifySlotChange (USB CCID 1.1 §6.3.1): a card is in, and has come.
    fn notification(&mut self) -> Option<[u8; 2]> {
        std::mem::take(&mut self.news).then_some([0x50, 0x03])
    }
}

/// Of a configuration (USB 2.0 §9.6.3), what belongs together in a line, as our reader has it.
const CONFIGURATION: [&[u8]; 10] = [
    &[9, 2, 93, 0, 1, 1, 0, 0x80, 50],
    &[9, 4, 0, 0, 3, 0x0B, 0, 0, 2],
    // bcdCCID, bMaxSlotIndex, bVoltageSupport, dwProtocols (USB CCID 1.1 §5.1)
    &[0x36, 0x21, 0x10, 0x01, 0, 7, 3, 0, 0, 0],
    // Clocks: 4 MHz and nothing else. Rates: 10 752 to 688 172 bit/s.
    &[0xA0, 0x0F, 0, 0, 0xA0, 0x0F, 0, 0, 1, 0x00, 0x2A, 0, 0, 0x2C, 0x80, 0x0A, 0, 0],
    // dwMaxIFSD, dwSynchProtocols, dwMechanical
    &[254, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    // dwFeatures: short and extended APDU level. dwMaxCCIDMessageLength: 65 554.
    &[0xBA, 0x00, 0x04, 0x00, 0x12, 0x00, 0x01, 0x00],
    // bClassGetResponse to bMaxCCIDBusySlots
    &[0xFF, 0xFF, 0, 0, 0, 1],
    &[7, 5, BULK, 2, 0x00, 0x02, 0],
    &[7, 5, 0x80 | BULK, 2, 0x00, 0x02, 0],
    &[7, 5, 0x80 | INTERRUPT, 3, 8, 0, 8],
];

fn string(text: &str) -> Vec<u8> {
    let units: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
    [&[2 + units.len() as u8, 3][..], &units].concat()
}

/// Serves one peer until it leaves; `take` takes one packet from the front of the bytes, answers it, and says how
/// long it was, 0 if it is not all there.
fn serve<S: Read + Write>(
    stream: &mut S,
    mut take: impl FnMut(&[u8], &mut S) -> io::Result<usize>,
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    let mut filled = 0;
    loop {
        let count = stream.read(&mut buffer[filled..])?;
        if count == 0 {
            return Ok(());
        }
        filled += count;
        let mut taken = 0;
        loop {
            match take(&buffer[taken..filled], stream)? {
                0 => break,
                length => taken += length,
            }
        }
        buffer.copy_within(taken..filled, 0);
        filled -= taken;
    }
}

/// Runs a responder for each peer that comes, one after the other, in a thread that ends with the process.
fn for_each_peer<S>(
    name: &'static str,
    accept: impl Fn() -> io::Result<S> + Send + 'static,
    respond: impl Fn(S) -> io::Result<()> + Send + 'static,
) -> io::Result<()> {
    let each = move || {
        loop {
            if let Err(error) = accept().and_then(&respond) {
                // Whoever waits for the reader does not learn it otherwise.
                eprintln!("{name}: {error}");
            }
        }
    };
    std::thread::Builder::new().name(name.to_owned()).spawn(each).map(drop)
}

/// `N` bytes at an offset; zeros beyond the end.
fn bytes_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut found = [0; N];
    found.iter_mut().zip(bytes.iter().skip(at)).for_each(|(to, from)| *to = *from);
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_in_descriptors_are_right() {
        let mut reader = Reader::new("floor");
        let configuration = reader.control([0x80, 6, 0, 2, 0, 0, 255, 0]).unwrap();
        assert_eq!((configuration.len(), configuration[2]), (93, 93));
        let mut rest = &configuration[..];
        let mut kinds = Vec::new();
        while let &[length, kind, ..] = rest {
            kinds.push(kind);
            rest = &rest[usize::from(length)..];
        }
        assert_eq!(kinds, [2, 4, 0x21, 5, 5, 5]);
        assert_eq!(reader.control([0x80, 6, 0, 1, 0, 0, 255, 0]).unwrap().len(), 18);
        assert_eq!(reader.control([0x80, 6, 3, 3, 0, 0, 4, 0]).unwrap(), [12, 3, b'f', 0]);
    }
}
