//! A VSCard host for scenarios that QEMU would not play: it answers as QEMU does until told otherwise.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use crate::guest::{short_directory, within};

const LIMIT: Duration = Duration::from_secs(90);

/// Where a client connects to.
pub struct Host {
    listener: UnixListener,
    directory: TempDir,
}

/// One connected client.
pub struct Peer {
    stream: UnixStream,
}

/// A message: type, reader id, payload.
pub type Message = (u32, u32, Vec<u8>);

/// The bytes of a message.
pub fn message(kind: u32, reader: u32, payload: &[u8]) -> Vec<u8> {
    let length = payload.len() as u32;
    let header = [kind, reader, length].map(u32::to_be_bytes).concat();
    [&header, payload].concat()
}

/// The payload of an Init.
pub const INIT: &[u8] = b"VSCD\0\0\0\x02\0\0\0\0";

impl Host {
    /// Listens on a new UNIX socket.
    pub fn new() -> Result<Self> {
        let directory = short_directory()?;
        Ok(Self { listener: UnixListener::bind(directory.path().join("host"))?, directory })
    }

    /// The socket.
    pub fn path(&self) -> PathBuf {
        Path::join(self.directory.path(), "host")
    }

    /// vscclient's endpoint for it.
    pub fn endpoint(&self) -> String {
        format!("unix:{}", self.path().display())
    }

    /// The next client.
    pub async fn accept(&self) -> Result<Peer> {
        let (stream, _) = within(None, LIMIT, "a client", self.listener.accept()).await??;
        Ok(Peer { stream })
    }

    /// The next client, once it has shown its card.
    pub async fn card(&self) -> Result<Peer> {
        let mut peer = self.accept().await?;
        peer.until_card().await?;
        Ok(peer)
    }
}

impl Peer {
    /// Sends any bytes.
    pub async fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes).await.context("the client does not take it")
    }

    /// The next message.
    pub async fn receive(&mut self) -> Result<Message> {
        let read = async {
            let mut header = [0; 12];
            self.stream.read_exact(&mut header).await?;
            let word =
                |at: usize| u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
            let mut payload = vec![0; word(8) as usize];
            ensure!(payload.len() <= 65_524, "a message that would deafen QEMU: {} bytes", payload.len());
            self.stream.read_exact(&mut payload).await?;
            Ok((word(0), word(4), payload))
        };
        within(None, LIMIT, "a message of the client", read).await?
    }

    /// Answers a message that is not an APDU as QEMU does.
    async fn answer(&mut self, (kind, reader, _): &Message) -> Result<()> {
        let reply = match kind {
            1 => message(1, u32::MAX, INIT),
            2 | 7 => return Ok(()),
            3 => message(2, 0, &[0; 4]),
            4..=6 => message(2, *reader, &[0; 4]),
            _ => message(2, *reader, &[0, 0, 0, 1]),
        };
        self.send(&reply).await
    }

    /// Plays along until the client has shown its card; returns the ATR.
    pub async fn until_card(&mut self) -> Result<Vec<u8>> {
        loop {
            let message = self.receive().await?;
            self.answer(&message).await?;
            if message.0 == 5 {
                return Ok(message.2);
            }
        }
    }

    /// A command and the client's answer.
    pub async fn transmit(&mut self, command: &[u8]) -> Result<Vec<u8>> {
        self.send(&message(7, 0, command)).await?;
        self.response().await
    }

    /// The client's next answer.
    pub async fn response(&mut self) -> Result<Vec<u8>> {
        match self.receive().await? {
            (7, 0, response) => Ok(response),
            (kind, ..) => bail!("a message of type {kind} instead of a response"),
        }
    }

    /// Whether the client ends the connection, whatever it still sends.
    pub async fn ended(&mut self) -> Result<()> {
        let mut rest = vec![0; 65_536];
        let end = async { while self.stream.read(&mut rest).await.is_ok_and(|count| count > 0) {} };
        within(None, LIMIT, "the client to end the connection", end).await
    }
}

/// VERIFY with a PIN, filled up with FF.
pub fn verify(pin: &str) -> Vec<u8> {
    let mut command = vec![0x00, 0x20, 0x00, 0x00, 0x08];
    command.extend_from_slice(pin.as_bytes());
    command.resize(13, 0xFF);
    command
}
