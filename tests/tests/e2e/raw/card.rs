//! A card to put into vpcd that tells what it has seen.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Result;

/// vpcd's first slot.
const PORT: u16 = 35_963;

/// What a card in the reader has seen, and what state it is in.
#[derive(Debug, Default)]
pub(super) struct Seen {
    pub(super) resets: u32,
    pub(super) commands: Vec<Vec<u8>>,
    pub(super) tries: u8,
    pub(super) verified: bool,
    selected: u8,
    /// Parts of the selected file that were read, one after the other.
    parts: u8,
}

impl Seen {
    fn reset(&mut self) {
        (self.selected, self.parts, self.verified) = (0, 0, false);
    }

    /// SELECT of a file, READ BINARY of its parts in order and no other, VERIFY of the PIN 1234, and an echo.
    fn answer(&mut self, command: &[u8]) -> Vec<u8> {
        self.commands.push(command.to_vec());
        match command {
            [0, 0xA4, 4, 0, 1, file] => {
                (self.selected, self.parts) = (*file, 0);
                vec![0x90, 0]
            }
            [0, 0xB0, part, 0, 2] if *part == self.parts => {
                self.parts += 1;
                vec![self.selected, *part, 0x90, 0]
            }
            [0, 0xB0, ..] => vec![0x69, 0x85],
            [0, 0x20, 0, 0x80] | [0, 0x20, 0, 0x80, 0] if self.verified => vec![0x90, 0],
            [0, 0x20, 0, 0x80] | [0, 0x20, 0, 0x80, 0] => vec![0x63, 0xC0 | self.tries],
            [0, 0x20, 0, 0x80, _, _, ..] if self.tries == 0 => vec![0x69, 0x83],
            [0, 0x20, 0, 0x80, _, pin @ ..] => {
                self.verified = pin == b"1234";
                self.tries = if self.verified { 3 } else { self.tries - 1 };
                if self.verified { vec![0x90, 0] } else { vec![0x63, 0xC0 | self.tries] }
            }
            [0, 0xEE, ..] => [command, &[0x90, 0]].concat(),
            _ => vec![0x6D, 0],
        }
    }
}

/// A card in the first reader, or waiting for its turn there. Dropping it takes it out.
pub(super) struct VirtualCard {
    pub(super) seen: Arc<Mutex<Seen>>,
    connection: TcpStream,
    thread: Option<JoinHandle<()>>,
}

impl VirtualCard {
    /// Puts a card in, as soon as there is a reader.
    pub(super) async fn insert(atr: &[u8]) -> Result<Self> {
        let connection = loop {
            match TcpStream::connect(("127.0.0.1", PORT)) {
                // vpcd listens while pcscd looks whether a card is in.
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                connection => break connection?,
            }
        };
        let seen = Arc::new(Mutex::new(Seen { tries: 3, ..Seen::default() }));
        let (stream, kept, atr) = (connection.try_clone()?, seen.clone(), atr.to_vec());
        let thread = std::thread::spawn(move || {
            // It ends with the connection, whoever closes it.
            let _ = serve(stream, &kept, &atr);
        });
        Ok(Self { seen, connection, thread: Some(thread) })
    }
}

impl Drop for VirtualCard {
    fn drop(&mut self) {
        let _ = self.connection.shutdown(Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(mut stream: TcpStream, seen: &Mutex<Seen>, atr: &[u8]) -> std::io::Result<()> {
    loop {
        let mut length = [0; 2];
        stream.read_exact(&mut length)?;
        // vpcd sends the length apart, and waits for its acknowledgement.
        rustix::net::sockopt::set_tcp_quickack(&stream, true)?;
        let mut message = vec![0; u16::from_be_bytes(length).into()];
        stream.read_exact(&mut message)?;
        let mut seen = seen.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let answer = match message[..] {
            [4] => atr.to_vec(),
            [0 | 1] => {
                seen.reset();
                continue;
            }
            [2] => {
                seen.reset();
                seen.resets += 1;
                continue;
            }
            _ => seen.answer(&message),
        };
        drop(seen);
        let framed = [&(answer.len() as u16).to_be_bytes()[..], &answer].concat();
        stream.write_all(&framed)?;
    }
}
