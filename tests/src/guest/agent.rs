//! The driver's end of the line to the agent.

use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail, ensure};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;
use tokio::sync::{mpsc, oneshot, watch};

use super::pending::Pending;
use super::wire::{self, Header, Verb};

/// What a command in the guest did.
#[derive(Clone, Debug)]
pub struct Ran {
    /// Standard output and error, in the order they were written.
    pub output: Vec<u8>,
    /// Exit status; 128 and the signal's number for a command that was killed.
    pub status: i32,
}

impl Ran {
    /// The output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.output).into_owned()
    }
}

/// The kernel's tty takes some 600 KiB that nobody has read yet; what is more is lost, as the emulated port has
/// no flow control. Each piece is answered before the next.
const PIECE: usize = 32 << 10;

pub(super) struct Agent {
    outgoing: mpsc::UnboundedSender<Vec<u8>>,
    pending: Arc<Pending<Ran>>,
    boots: watch::Receiver<u64>,
}

impl Agent {
    pub(super) fn new(stream: UnixStream) -> Self {
        let (reader, mut writer) = stream.into_split();
        let (outgoing, mut messages) = mpsc::unbounded_channel::<Vec<u8>>();
        tokio::spawn(async move {
            while let Some(message) = messages.recv().await {
                if writer.write_all(&message).await.is_err() {
                    break;
                }
            }
        });
        let pending = Arc::<Pending<Ran>>::default();
        let (boots_sender, boots) = watch::channel(0);
        tokio::spawn({
            let pending = Arc::clone(&pending);
            async move {
                // Whatever ends the stream ends every wait, that for a boot too: its sender goes with this task.
                let _ = answers(BufReader::new(reader), &pending, &boots_sender).await;
                pending.close();
            }
        });
        Self { outgoing, pending, boots }
    }

    pub(super) fn boots(&self) -> u64 {
        *self.boots.borrow()
    }

    pub(super) async fn ready(&self, boots: u64) -> Result<()> {
        let mut watch = self.boots.clone();
        let seen = watch.wait_for(|seen| *seen >= boots).await;
        seen.map(drop).map_err(|_| anyhow!("QEMU ended before the agent answered"))
    }

    pub(super) async fn run(&self, command: &str) -> Result<Ran> {
        let mut request = self.request(Verb::Run, 0, command.as_bytes());
        let ran = request.answer().await.with_context(|| format!("`{command}` in the guest"))?;
        Ok(ran)
    }

    pub(super) async fn put(&self, path: &str, bytes: &[u8]) -> Result<()> {
        let mut pieces = bytes.chunks(PIECE);
        // An empty file is one empty piece.
        let first = pieces.next().unwrap_or_default();
        for (append, piece) in std::iter::once((0, first)).chain(pieces.map(|piece| (1, piece))) {
            let payload = [path.as_bytes(), b"\0", piece].concat();
            let ran = self.request(Verb::Put, append, &payload).answer().await?;
            ensure!(ran.status == 0, "writing {path} in the guest: {}", ran.text().trim());
        }
        Ok(())
    }

    pub(super) async fn get(&self, path: &str) -> Result<Vec<u8>> {
        let ran = self.request(Verb::Get, 0, path.as_bytes()).answer().await?;
        ensure!(ran.status == 0, "reading {path} in the guest: {}", ran.text().trim());
        Ok(ran.output)
    }

    fn request(&self, verb: Verb, status: i32, payload: &[u8]) -> Request<'_> {
        let (id, answer) = self.pending.ask();
        // Where this fails QEMU is gone, which ends the wait as well.
        let _ = self.outgoing.send(wire::message(verb, id, status, payload));
        Request { agent: self, id, answer, kill: verb == Verb::Run }
    }
}

/// A question on its way. Dropped before it is answered it kills the command it started.
struct Request<'a> {
    agent: &'a Agent,
    id: u64,
    answer: oneshot::Receiver<Ran>,
    kill: bool,
}

impl Request<'_> {
    async fn answer(&mut self) -> Result<Ran> {
        let Ok(ran) = (&mut self.answer).await else {
            bail!("the guest was reset or QEMU ended before the agent answered");
        };
        Ok(ran)
    }
}

impl Drop for Request<'_> {
    fn drop(&mut self) {
        if self.agent.pending.give_up(self.id) && self.kill {
            let _ = self.agent.outgoing.send(wire::message(Verb::Kill, self.id, 0, b""));
        }
    }
}

async fn answers(
    mut input: BufReader<OwnedReadHalf>,
    pending: &Pending<Ran>,
    boots: &watch::Sender<u64>,
) -> std::io::Result<()> {
    loop {
        let mut line = Vec::new();
        if input.read_until(b'\n', &mut line).await? == 0 {
            return Ok(());
        }
        let Some(header) = Header::parse(&line) else { continue };
        let mut output = vec![0; header.length];
        input.read_exact(&mut output).await?;
        match header.verb {
            Verb::Ready => {
                // What an earlier agent was asked for is lost with it.
                pending.forget();
                boots.send_modify(|boots| *boots += 1);
            }
            Verb::Done => pending.answer(header.id, Ran { output, status: header.status }),
            Verb::Run | Verb::Kill | Verb::Put | Verb::Get => {}
        }
    }
}
