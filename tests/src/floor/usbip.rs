//! For a Linux guest's `vhci-hcd`.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};

use super::{BULK, INTERRUPT, PRODUCT, Reader, VENDOR, VERSION, bytes_at, for_each_peer, serve};

const REQ_IMPORT: [u8; 4] = [0x01, 0x11, 0x80, 0x03];
const REP_IMPORT: [u8; 8] = [0x01, 0x11, 0x00, 0x03, 0, 0, 0, 0];
/// Version, code, status and bus id.
const REQUEST: usize = 40;
const BUSID: &str = "1-1";

const CMD_SUBMIT: u32 = 1;
const CMD_UNLINK: u32 = 2;
const RET_SUBMIT: u32 = 3;
const RET_UNLINK: u32 = 4;
const HEADER: usize = 48;

/// EPIPE and ECONNRESET.
const STALL: i32 = -32;
const UNLINKED: i32 = -104;

/// Serves one device, `1-1`, on a port of the loopback, which is returned.
///
/// # Errors
/// The socket or the thread cannot be made.
pub fn usbip(serial: &str) -> io::Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let port = listener.local_addr()?.port();
    let serial = serial.to_owned();
    let accept = move || listener.accept().map(|(stream, _)| stream);
    for_each_peer("USB/IP floor", accept, move |mut stream: TcpStream| {
        stream.set_nodelay(true)?;
        let mut session = Session {
            reader: Reader::new(&serial),
            imported: false,
            waiting: [const { VecDeque::new() }; 2],
        };
        serve(&mut stream, |bytes, stream| session.take(bytes, stream))
    })?;
    Ok(port)
}

struct Session {
    reader: Reader,
    imported: bool,
    /// Sequence numbers and lengths of IN transfers that are not answered: bulk and interrupt.
    waiting: [VecDeque<(u32, usize)>; 2],
}

impl Session {
    fn take(&mut self, bytes: &[u8], stream: &mut TcpStream) -> io::Result<usize> {
        if !self.imported {
            return self.import(bytes, stream);
        }
        if bytes.len() < HEADER {
            return Ok(0);
        }
        let word = |at| u32::from_be_bytes(bytes_at(bytes, at));
        let (command, seqnum, is_in, endpoint) = (word(0x00), word(0x04), word(0x0C) == 1, word(0x10));
        match command {
            CMD_SUBMIT => {
                let length = word(0x18) as usize;
                let size = if is_in { HEADER } else { HEADER + length };
                let Some(data) = bytes.get(HEADER..size) else { return Ok(0) };
                match (u8::try_from(endpoint), is_in) {
                    (Ok(0), _) => {
                        let answer = self.reader.control(bytes_at(bytes, 0x28));
                        let status = if answer.is_some() { 0 } else { STALL };
                        self.send(stream, seqnum, status, &answer.unwrap_or_default())?;
                    }
                    (Ok(BULK), false) => {
                        self.reader.bulk_out(data)?;
                        stream.write_all(&header(RET_SUBMIT, seqnum, 0, length))?;
                    }
                    (Ok(BULK), true) => self.waiting[0].push_back((seqnum, length)),
                    (Ok(INTERRUPT), true) => self.waiting[1].push_back((seqnum, length)),
                    _ => return Err(io::Error::other("no such endpoint")),
                }
                self.data_in(stream)?;
                Ok(size)
            }
            CMD_UNLINK => {
                let target = word(0x14);
                let mut status = 0;
                for waiting in &mut self.waiting {
                    if let Some(index) = waiting.iter().position(|(seqnum, _)| *seqnum == target) {
                        waiting.remove(index);
                        status = UNLINKED;
                    }
                }
                stream.write_all(&header(RET_UNLINK, seqnum, status, 0))?;
                Ok(HEADER)
            }
            _ => Err(io::Error::other("neither SUBMIT nor UNLINK")),
        }
    }

    fn import(&mut self, bytes: &[u8], stream: &mut TcpStream) -> io::Result<usize> {
        if bytes.len() < REQUEST {
            return Ok(0);
        }
        if !bytes.starts_with(&REQ_IMPORT) {
            return Err(io::Error::other("not an IMPORT"));
        }
        let mut reply = REP_IMPORT.to_vec();
        for (text, length) in [("/sys/devices/floor", 256), (BUSID, 32)] {
            let end = reply.len() + length;
            reply.extend(text.as_bytes());
            reply.resize(end, 0);
        }
        // Bus, device, and high speed.
        reply.extend([1, 1, 3].map(u32::to_be_bytes).concat());
        reply.extend([VENDOR, PRODUCT, VERSION].map(u16::to_be_bytes).concat());
        // Class of the device, configuration, how many of them, how many interfaces.
        reply.extend([0, 0, 0, 1, 1, 1]);
        self.imported = true;
        stream.write_all(&reply)?;
        Ok(REQUEST)
    }

    /// Brings what is to be told to who waits for it.
    fn data_in(&mut self, stream: &mut TcpStream) -> io::Result<()> {
        while let Some((seqnum, length)) = self.waiting[0].front().copied() {
            let Some(mut answer) = self.reader.answers.pop_front() else { break };
            self.waiting[0].pop_front();
            answer.truncate(length);
            self.send(stream, seqnum, 0, &answer)?;
        }
        if let Some((seqnum, _)) = self.waiting[1].front().copied() {
            if let Some(change) = self.reader.notification() {
                self.waiting[1].pop_front();
                self.send(stream, seqnum, 0, &change)?;
            }
        }
        Ok(())
    }

    fn send(&self, stream: &mut TcpStream, seqnum: u32, status: i32, data: &[u8]) -> io::Result<()> {
        let mut reply = header(RET_SUBMIT, seqnum, status, data.len());
        reply.extend(data);
        stream.write_all(&reply)
    }
}

fn header(kind: u32, seqnum: u32, status: i32, length: usize) -> Vec<u8> {
    let mut header = [kind, seqnum, 0, 0, 0, status as u32, length as u32].map(u32::to_be_bytes).concat();
    header.resize(HEADER, 0);
    header
}
