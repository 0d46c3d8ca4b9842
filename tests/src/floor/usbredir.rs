//! For QEMU's `usb-redir`.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use super::{BULK, INTERRUPT, PRODUCT, Reader, VENDOR, VERSION, bytes_at, for_each_peer, serve};

/// Packet types; what is not here is passed over.
mod packet {
    pub(super) const HELLO: u32 = 0;
    pub(super) const DEVICE_CONNECT: u32 = 1;
    pub(super) const RESET: u32 = 3;
    pub(super) const INTERFACE_INFO: u32 = 4;
    pub(super) const EP_INFO: u32 = 5;
    pub(super) const SET_CONFIGURATION: u32 = 6;
    pub(super) const GET_CONFIGURATION: u32 = 7;
    pub(super) const CONFIGURATION_STATUS: u32 = 8;
    pub(super) const SET_ALT_SETTING: u32 = 9;
    pub(super) const GET_ALT_SETTING: u32 = 10;
    pub(super) const ALT_SETTING_STATUS: u32 = 11;
    pub(super) const START_INTERRUPT_RECEIVING: u32 = 15;
    pub(super) const STOP_INTERRUPT_RECEIVING: u32 = 16;
    pub(super) const INTERRUPT_RECEIVING_STATUS: u32 = 17;
    pub(super) const CANCEL_DATA_PACKET: u32 = 21;
    pub(super) const CONTROL: u32 = 100;
    pub(super) const BULK: u32 = 101;
    pub(super) const INTERRUPT: u32 = 103;
}

/// bcdDevice, filter, acknowledged disconnects, packet sizes, 64-bit ids, 32-bit lengths. QEMU's xHCI insists on the
/// last three.
const CAPS: u32 = 0x7E;
/// Type, length and 64 bits of id; a hello's id has 32.
const HEADER: usize = 16;
const HELLO_HEADER: usize = 12;

const CANCELLED: u8 = 1;
const STALL: u8 = 4;

/// Listens there for a QEMU.
///
/// # Errors
/// The socket or the thread cannot be made.
pub fn usbredir(path: &Path, serial: &str) -> io::Result<()> {
    let listener = UnixListener::bind(path)?;
    let serial = serial.to_owned();
    let accept = move || listener.accept().map(|(stream, _)| stream);
    for_each_peer("usbredir floor", accept, move |mut stream: UnixStream| {
        let mut session =
            Session { reader: Reader::new(&serial), met: false, waiting: VecDeque::new(), out: Vec::new() };
        serve(&mut stream, |bytes, stream| session.take(bytes, stream))
    })
}

struct Session {
    reader: Reader,
    /// The hello has come.
    met: bool,
    /// Ids and lengths of bulk-IN packets that are not answered.
    waiting: VecDeque<(u64, usize)>,
    out: Vec<u8>,
}

impl Session {
    fn take(&mut self, bytes: &[u8], stream: &mut UnixStream) -> io::Result<usize> {
        let header = if self.met { HEADER } else { HELLO_HEADER };
        if bytes.len() < header {
            return Ok(0);
        }
        let kind = u32::from_le_bytes(bytes_at(bytes, 0));
        let size = header + u32::from_le_bytes(bytes_at(bytes, 4)) as usize;
        let Some(body) = bytes.get(header..size) else { return Ok(0) };
        if self.met {
            let id = u64::from_le_bytes(bytes_at(bytes, 8));
            self.request(kind, id, body, stream)?;
        } else if kind == packet::HELLO {
            self.hello(stream)?;
        } else {
            return Err(io::Error::other("no hello"));
        }
        Ok(size)
    }

    fn hello(&mut self, stream: &mut UnixStream) -> io::Result<()> {
        let mut hello = [packet::HELLO, 68, 0].map(u32::to_le_bytes).concat();
        hello.extend(b"floor");
        hello.resize(HELLO_HEADER + 64, 0);
        hello.extend(CAPS.to_le_bytes());
        stream.write_all(&hello)?;
        self.met = true;
        self.describe(stream)?;
        let [vendor, product, version] = [VENDOR, PRODUCT, VERSION].map(u16::to_le_bytes);
        // High speed; the class is the interface's.
        let connect = [&[2, 0, 0, 0], &vendor[..], &product, &version].concat();
        self.send(stream, packet::DEVICE_CONNECT, 0, &connect, &[])
    }

    fn describe(&mut self, stream: &mut UnixStream) -> io::Result<()> {
        // 0 to 15 are OUT, 16 to 31 IN: type, interval, interface, wMaxPacketSize.
        let mut places = [(255, 0, 0, 0u16); 32];
        let (bulk, interrupt) = (usize::from(BULK), usize::from(INTERRUPT));
        for (place, what) in [
            (0, (0, 0, 0, 64)),
            (16, (0, 0, 0, 64)),
            (bulk, (2, 0, 0, 512)),
            (16 + bulk, (2, 0, 0, 512)),
            (16 + interrupt, (3, 8, 0, 8)),
        ] {
            places[place] = what;
        }
        let mut endpoints: Vec<u8> = Vec::new();
        endpoints.extend(places.map(|place| place.0));
        endpoints.extend(places.map(|place| place.1));
        endpoints.extend(places.map(|place| place.2));
        endpoints.extend(places.iter().flat_map(|place| place.3.to_le_bytes()));
        self.send(stream, packet::EP_INFO, 0, &endpoints, &[])?;
        // One: number, class, subclass and protocol.
        let mut interfaces = vec![0; 4 + 4 * 32];
        (interfaces[0], interfaces[4 + 32]) = (1, 0x0B);
        self.send(stream, packet::INTERFACE_INFO, 0, &interfaces, &[])
    }

    fn request(&mut self, kind: u32, id: u64, body: &[u8], stream: &mut UnixStream) -> io::Result<()> {
        let [first, second] = bytes_at(body, 0);
        match kind {
            packet::BULK => {
                let [l0, l1] = bytes_at(body, 2);
                let [l2, l3] = bytes_at(body, 8);
                if first & 0x80 == 0 {
                    self.reader.bulk_out(body.get(10..).unwrap_or_default())?;
                    self.send(stream, kind, id, &[first, 0, l0, l1, 0, 0, 0, 0, l2, l3], &[])?;
                } else {
                    let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
                    self.waiting.push_back((id, length));
                }
                self.bulk_in(stream)
            }
            packet::CONTROL => {
                let [endpoint, request, request_type, _, v0, v1, i0, i1, l0, l1] = bytes_at(body, 0);
                let answer = self.reader.control([request_type, request, v0, v1, i0, i1, l0, l1]);
                let status = if answer.is_some() { 0 } else { STALL };
                let data = answer.unwrap_or_default();
                let [l0, l1] = (data.len() as u16).to_le_bytes();
                let header = [endpoint, request, request_type, status, v0, v1, i0, i1, l0, l1];
                self.send(stream, kind, id, &header, &data)
            }
            packet::RESET => {
                self.reader.reset();
                self.waiting.clear();
                Ok(())
            }
            packet::SET_CONFIGURATION => {
                self.reader.reset();
                self.waiting.clear();
                self.describe(stream)?;
                self.send(stream, packet::CONFIGURATION_STATUS, id, &[0, first], &[])
            }
            packet::GET_CONFIGURATION => self.send(stream, packet::CONFIGURATION_STATUS, id, &[0, 1], &[]),
            packet::SET_ALT_SETTING => {
                self.send(stream, packet::ALT_SETTING_STATUS, id, &[0, first, second], &[])
            }
            packet::GET_ALT_SETTING => self.send(stream, packet::ALT_SETTING_STATUS, id, &[0, first, 0], &[]),
            packet::START_INTERRUPT_RECEIVING => {
                self.send(stream, packet::INTERRUPT_RECEIVING_STATUS, id, &[0, first], &[])?;
                match self.reader.notification() {
                    Some(change) => self.send(stream, packet::INTERRUPT, 0, &[first, 0, 2, 0], &change),
                    None => Ok(()),
                }
            }
            packet::STOP_INTERRUPT_RECEIVING => {
                self.send(stream, packet::INTERRUPT_RECEIVING_STATUS, id, &[0, first], &[])
            }
            packet::CANCEL_DATA_PACKET => {
                let found = self.waiting.iter().position(|(waiting, _)| *waiting == id);
                match found.and_then(|index| self.waiting.remove(index)) {
                    Some(_) => {
                        let header = [0x80 | BULK, CANCELLED, 0, 0, 0, 0, 0, 0, 0, 0];
                        self.send(stream, packet::BULK, id, &header, &[])
                    }
                    None => Ok(()),
                }
            }
            _ => Ok(()),
        }
    }

    /// Brings what is to be told to who waits for it.
    fn bulk_in(&mut self, stream: &mut UnixStream) -> io::Result<()> {
        while let Some((id, length)) = self.waiting.front().copied() {
            let Some(mut answer) = self.reader.answers.pop_front() else { break };
            self.waiting.pop_front();
            answer.truncate(length);
            let [l0, l1] = (answer.len() as u16).to_le_bytes();
            let header = [0x80 | BULK, 0, l0, l1, 0, 0, 0, 0, 0, 0];
            self.send(stream, packet::BULK, id, &header, &answer)?;
        }
        Ok(())
    }

    fn send(
        &mut self,
        stream: &mut UnixStream,
        kind: u32,
        id: u64,
        header: &[u8],
        data: &[u8],
    ) -> io::Result<()> {
        self.out.clear();
        self.out.extend(kind.to_le_bytes());
        self.out.extend(((header.len() + data.len()) as u32).to_le_bytes());
        self.out.extend(id.to_le_bytes());
        self.out.extend(header);
        self.out.extend(data);
        stream.write_all(&self.out)
    }
}
