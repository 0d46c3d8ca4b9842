//! A VSCard client as one writes it on a first afternoon, for measurements to be compared with.
//!
//! It sets TCP_NODELAY, as one does, and still waits 40 ms for each APDU: QEMU writes a message's header and its
//! payload apart, and without `nodelay=on` its kernel holds the payload back until ours acknowledges the header,
//! which ours delays. TCP_QUICKACK, re-armed before each payload, is what this client lacks.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpStream};
use std::thread::JoinHandle;

use anyhow::{Context, Result};

const INIT: u32 = 1;
const READER_ADD: u32 = 3;
const ATR: u32 = 5;
const APDU: u32 = 7;

/// T=0, with the TC2 that bounds the guest's wait.
const CARD: [u8; 8] = [0x3B, 0x84, 0x40, 0x01, b'V', b'S', b'C', b'C'];

/// A client with a card in it that answers 9000 to everything. Gone when dropped.
pub struct Naive {
    stream: TcpStream,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Naive {
    /// Connects to a QEMU that listens on this port of the loopback.
    pub fn connect(port: u16) -> Result<Self> {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).context("QEMU's card socket")?;
        stream.set_nodelay(true)?;
        let mut own = stream.try_clone()?;
        send(&mut own, INIT, b"VSCD\0\0\0\x02\0\0\0\0")?;
        send(&mut own, READER_ADD, b"naive")?;
        send(&mut own, ATR, &CARD)?;
        let thread = std::thread::Builder::new().name("naive client".to_owned()).spawn(move || serve(own))?;
        Ok(Self { stream, thread: Some(thread) })
    }
}

impl Drop for Naive {
    fn drop(&mut self) {
        // Ends the thread's read; QEMU may have done so already.
        let _ = self.stream.shutdown(Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Until the connection ends, which is the only way for it to end.
fn serve(mut stream: TcpStream) -> io::Result<()> {
    let mut payload = Vec::new();
    loop {
        let mut header = [0; 12];
        stream.read_exact(&mut header)?;
        let [a, b, c, d, _, _, _, _, e, f, g, h] = header;
        payload.resize(u32::from_be_bytes([e, f, g, h]) as usize, 0);
        stream.read_exact(&mut payload)?;
        // All else are acknowledgements.
        if u32::from_be_bytes([a, b, c, d]) == APDU {
            send(&mut stream, APDU, &[0x90, 0x00])?;
        }
    }
}

/// QEMU has one reader, number 0.
fn send(stream: &mut TcpStream, kind: u32, payload: &[u8]) -> io::Result<()> {
    let length = u32::try_from(payload.len()).map_err(io::Error::other)?;
    let message = [&kind.to_be_bytes(), &[0; 4][..], &length.to_be_bytes(), payload].concat();
    stream.write_all(&message)
}
