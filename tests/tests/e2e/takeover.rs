//! Others that want the reader of a guest that is there.

use std::ffi::OsStr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use stack_tests::database::Database;
use stack_tests::guest::{Boot, Guest, within};
use stack_tests::process::Process;
use stack_tests::reader::{Bus, Place};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

use crate::lifecycle::{Control, is_verified, stay_idle, stay_verified, with_control, works};

const LIMIT: Duration = Duration::from_secs(30);

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A guest whose reader is at a socket, and the way to that socket.
struct Victim {
    place: Place,
    port: Option<u16>,
    daemon: Process,
    guest: Guest,
    control: Control,
    _database: Database,
    _state: tempfile::TempDir,
}

impl Victim {
    async fn start(options: &str, tcp: bool) -> Result<Self> {
        let (place, database, state) =
            (Place::new(Bus::Xhci)?, Database::with_password()?, tempfile::tempdir()?);
        let port = tcp.then(free_port).transpose()?;
        let endpoint = match port {
            Some(port) => format!("tcp-listen:127.0.0.1:{port}"),
            None => format!("unix-listen:{}", place.path("reader")),
        };
        let mut args = vec!["--reader".to_owned(), format!("usbredir,{options}{endpoint}")];
        args.extend(with_control(&database, &place));
        let daemon = Process::start("ccid-device", args, &[("XDG_STATE_HOME", OsStr::new(state.path()))])?;
        daemon.line("ready").await?;
        let guest = Guest::boot(Boot::with(qemu(&place, port))).await?;
        guest.start_pcscd().await?;
        works(&guest).await?;
        stay_verified(&guest).await?;
        stay_idle(&guest).await?;
        let control = Control::connect(&place.path("control")).await?;
        Ok(Self { place, port, daemon, guest, control, _database: database, _state: state })
    }

    async fn connect(&self) -> Result<Box<dyn Stream>> {
        Ok(match self.port {
            Some(port) => Box::new(TcpStream::connect(("127.0.0.1", port)).await?),
            None => Box::new(UnixStream::connect(self.place.path("reader")).await?),
        })
    }

    /// It has its reader, and the PIN is verified.
    async fn is_undisturbed(&mut self) -> Result<()> {
        self.control.events("READER_DETACHED", 0).await?;
        is_verified(&self.guest).await.with_context(|| self.daemon.log())
    }
}

fn free_port() -> std::io::Result<u16> {
    Ok(std::net::TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

fn qemu(place: &Place, port: Option<u16>) -> Vec<String> {
    let mut args = place.qemu();
    if let (Some(port), Some(chardev)) =
        (port, args.iter_mut().find(|arg| arg.starts_with("socket,id=reader")))
    {
        *chardev = format!("socket,id=reader,host=127.0.0.1,port={port},reconnect=1");
    }
    args
}

/// A packet with an id of 64 bits, as every QEMU has them.
fn packet(kind: u32, id: u64, body: &[u8]) -> Vec<u8> {
    let header = [kind.to_le_bytes(), (body.len() as u32).to_le_bytes()].concat();
    [&header[..], &id.to_le_bytes(), body].concat()
}

/// What goes on with a session: is the PIN verified, and what does the card say?
fn theft() -> Vec<u8> {
    let status = [0x6F, 4, 0, 0, 0, 0, 99, 0, 0, 0, 0x00, 0x20, 0x00, 0x80];
    let out = [&[0x01, 0, status.len() as u8, 0, 0, 0, 0, 0, 0, 0], &status[..]].concat();
    let ask = [0x81, 0, 0x40, 0, 0, 0, 0, 0, 0, 0];
    [packet(101, 1, &out), packet(101, 2, &ask)].concat()
}

fn hello() -> Vec<u8> {
    let mut hello = [0_u32, 68, 0].map(u32::to_le_bytes).concat();
    hello.extend(b"another");
    hello.resize(76, 0);
    hello.extend(0xFF_u32.to_le_bytes());
    hello
}

/// All that comes until the connection is closed.
async fn answers(stream: &mut dyn Stream) -> Result<Vec<u8>> {
    let mut got = Vec::new();
    // Whoever is closed with something unread is reset.
    let _ = within(None, LIMIT, "the end of the connection", stream.read_to_end(&mut got)).await?;
    Ok(got)
}

async fn is_not_taken_over(options: &str, tcp: bool) -> Result<Victim> {
    let victim = Victim::start(options, tcp).await?;
    for round in 0..stack_tests::scale(10, 50) {
        let mut thief = victim.connect().await?;
        // In one piece, and in two that the guest may speak between.
        let theft = theft();
        let cut = if round % 2 == 0 { theft.len() } else { round as usize % theft.len() };
        thief.write_all(&theft[..cut]).await?;
        let _ = thief.write_all(&theft[cut..]).await;
        let got = answers(&mut *thief).await?;
        ensure!(got.is_empty(), "round {round}: {got:02X?}");
    }
    // The beginning of a hello, kept open; and a whole one.
    let mut hesitant = victim.connect().await?;
    hesitant.write_all(&hello()[..5]).await?;
    let mut other = victim.connect().await?;
    other.write_all(&hello()).await?;
    let got = answers(&mut *other).await?;
    ensure!(got.is_empty(), "{got:02X?}");
    victim.daemon.line("connection closed: another VMM has the reader").await?;
    drop(hesitant);
    Ok(victim)
}

#[tokio::test(flavor = "multi_thread")]
async fn over_tcp() -> Result<()> {
    let mut victim = is_not_taken_over("", true).await?;
    victim.daemon.line("connection closed: the first packet is no usbredir hello").await?;
    victim.is_undisturbed().await
}

/// And a second QEMU, which asks again each second, gets the reader when the first has ended.
#[tokio::test(flavor = "multi_thread")]
async fn over_a_unix_socket() -> Result<()> {
    let mut victim = is_not_taken_over("", false).await?;
    victim.daemon.line("connection closed: the first packet is no usbredir hello").await?;
    let mark = victim.daemon.mark();
    let second = Guest::start(Boot::with(qemu(&victim.place, None))).await?;
    victim.daemon.line_after(mark, "another VMM has the reader").await?;
    let mark = victim.daemon.mark();
    victim.daemon.line_after(mark, "another VMM has the reader").await?;
    victim.is_undisturbed().await?;
    let Victim { guest, daemon, mut control, .. } = victim;
    guest.kill().await;
    control.events("READER_DETACHED", 1).await?;
    control.events("READER_ATTACHED", 1).await?;
    second.ready(1).await?;
    second.start_pcscd().await?;
    works(&second).await?;
    ensure!(!daemon.log().contains("the guest has migrated"), "{}", daemon.log());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn over_a_unix_socket_with_migration_on() -> Result<()> {
    let mut victim = is_not_taken_over("migrate=on,", false).await?;
    victim.daemon.line("connection closed: the VMM that has the reader still runs its guest").await?;
    victim.is_undisturbed().await
}
