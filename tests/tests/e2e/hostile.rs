//! Hosts that want the client to come to harm, and clients that want the reader to.

use std::collections::BTreeMap;
use std::ffi::OsStr;

use anyhow::{Result, ensure};
use stack_tests::database::{Database, NAMES, PIN};
use stack_tests::host::{Host, INIT, message, verify};
use stack_tests::process::Process;
use stack_tests::reader::{Bus, Place};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// A client of a scripted host.
struct Victim {
    host: Host,
    client: Process,
    _database: Database,
    _state: TempDir,
}

impl Victim {
    fn start() -> Result<Self> {
        let (host, database, state) = (Host::new()?, Database::with_password()?, tempfile::tempdir()?);
        let (spec, endpoint) = (database.spec(), host.endpoint());
        let mut args = vec!["--trace", "-d", "11", "--profile", "cac", "--db", &spec];
        args.extend(NAMES.iter().flat_map(|name| ["--cert", name]));
        args.push(&endpoint);
        let client = Process::start("vscclient", args, &[("XDG_STATE_HOME", OsStr::new(state.path()))])?;
        Ok(Self { host, client, _database: database, _state: state })
    }

    /// Asks for the PIN in ways that a trace might overlook.
    async fn is_discreet(&mut self, peer: &mut stack_tests::host::Peer) -> Result<()> {
        let verify = verify(PIN);
        let odd = [&[0x00, 0x21], &verify[2..]].concat();
        let envelope = [&[0x00, 0xC2, 0x00, 0x00, verify.len() as u8][..], &verify].concat();
        for command in [&odd, &envelope, &verify[..11].to_vec()] {
            peer.transmit(command).await?;
        }
        Ok(())
    }

    /// It lives, is small and idle, comes back and serves; its log does not tell the PIN.
    async fn is_well(&mut self) -> Result<()> {
        let mut peer = self.host.card().await?;
        self.is_discreet(&mut peer).await?;
        let ticks = self.client.cpu_ticks()?;
        ensure!(peer.transmit(&verify(PIN)).await? == [0x90, 0x00], "VERIFY");
        for _ in 0..100 {
            ensure!(peer.transmit(&[0x00, 0x20, 0x00, 0x00]).await? == [0x90, 0x00], "status of the PIN");
        }
        let ticks = self.client.cpu_ticks()? - ticks;
        ensure!(ticks < 100, "{ticks} ticks of processor time for 100 commands");
        let memory = self.client.memory_kib("VmHWM")?;
        ensure!(memory < 64 * 1024, "{memory} KiB of memory");
        let log = self.client.log();
        let hex = stack_tests::hex(PIN.as_bytes());
        ensure!(!log.contains(PIN) && !log.to_uppercase().contains(&hex), "the log tells the PIN:\n{log}");
        ensure!(!log.contains("panicked"), "{log}");
        println!("well after the attack: {memory} KiB at most");
        Ok(())
    }
}

/// Bytes that nobody would call messages; the same in each run.
fn noise(count: usize, mut seed: u64) -> Vec<u8> {
    let mut next = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as u8
    };
    (0..count).map(|_| next()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn random_bytes() -> Result<()> {
    let mut victim = Victim::start()?;
    for seed in 0..u64::from(stack_tests::scale(4, 40)) {
        let mut peer = if seed % 2 == 0 { victim.host.accept().await? } else { victim.host.card().await? };
        let mark = victim.client.mark();
        // The client may be gone before all is sent.
        let _ = peer.send(&noise(4096, seed)).await;
        peer.ended().await?;
        victim.client.line_after(mark, "connection closed: ").await?;
    }
    victim.is_well().await
}

/// Messages of every type and any reader, well formed or not, before a card is in and after.
#[tokio::test(flavor = "multi_thread")]
async fn random_messages() -> Result<()> {
    let mut victim = Victim::start()?;
    for seed in 0..u64::from(stack_tests::scale(6, 60)) {
        let mut peer = if seed % 2 == 0 { victim.host.accept().await? } else { victim.host.card().await? };
        let bytes = noise(8192, seed + 100);
        for piece in bytes.chunks(64) {
            let kind = match piece[0] % 13 {
                11 => 0x8000_0001,
                12 => 0x8000_0002,
                kind => kind.into(),
            };
            let payload = &piece[3..3 + usize::from(piece[2] % 61)];
            if peer.send(&message(kind, u32::from(piece[1] % 3), payload)).await.is_err() {
                break;
            }
        }
        drop(peer);
    }
    victim.is_well().await
}

#[tokio::test(flavor = "multi_thread")]
async fn huge_lengths() -> Result<()> {
    let mut victim = Victim::start()?;
    for length in [u32::MAX, 0x7FFF_FFFF, 1 << 20, 65_545] {
        let mut peer = victim.host.card().await?;
        let mark = victim.client.mark();
        peer.send(&[7, 0, length].map(u32::to_be_bytes).concat()).await?;
        peer.ended().await?;
        let line = victim.client.line_after(mark, "length at offset 8").await?;
        ensure!(line.contains(&length.to_string()), "{line}");
    }
    victim.is_well().await
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_apdus_and_nothing_read() -> Result<()> {
    let mut victim = Victim::start()?;
    let mut peer = victim.host.card().await?;
    let select = [0x00, 0xA4, 0x04, 0x00, 0x07, 0xA0, 0x00, 0x00, 0x00, 0x79, 0x01, 0x00];
    let _ = peer.send(&message(7, 0, &select).repeat(10_000)).await;
    victim.client.line("more than 128 commands without waiting").await?;
    drop(peer);

    // Commands that take no time are answered as fast as they come, but not into a pipe nobody empties.
    let mut peer = victim.host.card().await?;
    let attack = async { while peer.send(&message(7, 0, &[0x00, 0x84]).repeat(100)).await.is_ok() {} };
    let mark = victim.client.mark();
    stack_tests::guest::within(None, std::time::Duration::from_secs(90), "the client's end", attack).await?;
    victim.client.line_after(mark, "connection closed: ").await?;
    drop(peer);
    victim.is_well().await
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_that_do_not_exist() -> Result<()> {
    let mut victim = Victim::start()?;
    let mut peer = victim.host.card().await?;
    for reader in [1, 7, u32::MAX] {
        peer.send(&message(7, reader, &[0x00, 0xA4, 0x04, 0x00])).await?;
        let (kind, answered, _) = peer.receive().await?;
        ensure!((kind, answered) == (2, reader), "type {kind} for reader {answered}");
    }
    victim.client.line("command for reader 7, which does not exist, refused").await?;
    ensure!(peer.transmit(&[0x00, 0x20, 0x00, 0x00]).await? == [0x63, 0xC3], "the connection lives");
    drop(peer);
    victim.is_well().await
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_magic() -> Result<()> {
    let mut victim = Victim::start()?;
    let mut peer = victim.host.accept().await?;
    peer.send(&message(1, u32::MAX, b"HTTP\0\0\0\x02\0\0\0\0")).await?;
    peer.ended().await?;
    victim.client.line("not a VSCard host").await?;
    let mut peer = victim.host.card().await?;
    peer.send(&message(1, u32::MAX, INIT)).await?;
    ensure!(peer.transmit(&[0x00, 0x20, 0x00, 0x00]).await? == [0x63, 0xC3], "a second Init is harmless");
    drop(peer);
    victim.is_well().await
}

/// Malformed APDUs, with the PIN in them, are answered and not told.
#[tokio::test(flavor = "multi_thread")]
async fn malformed_apdus() -> Result<()> {
    let mut victim = Victim::start()?;
    let mut peer = victim.host.card().await?;
    let mut cut = verify(PIN);
    cut.truncate(12);
    for command in [&cut[..], &[], &[0x00], &[0x00, 0x20, 0x00]] {
        ensure!(peer.transmit(command).await? == [0x67, 0x00], "wrong length");
    }
    ensure!(peer.transmit(&noise(300, 9)).await?.len() >= 2, "an answer");
    drop(peer);
    victim.is_well().await
}

/// A host that is there but says nothing is waited for without noise.
#[tokio::test(flavor = "multi_thread")]
async fn a_silent_host() -> Result<()> {
    let victim = Victim::start()?;
    let peer = victim.host.accept().await?;
    victim.client.line("no reply from the host yet").await?;
    let lines = victim.client.mark();
    let before = victim.client.cpu_ticks()?;
    // The client gives up its search for a reply after ten seconds and then only listens.
    let mut peer = peer;
    let mut seen = 0;
    while let Ok((kind, ..)) = peer.receive().await {
        seen += 1;
        ensure!(kind <= 1 && seen < 30, "message {seen} of type {kind}");
        if kind == 1 {
            break;
        }
    }
    ensure!(victim.client.mark() == lines, "{}", victim.client.log());
    ensure!(victim.client.cpu_ticks()? - before < 30);
    Ok(())
}

/// A client of our reader that comes, swaps cards and goes as fast as it can: the log does not follow it.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_is_never_content() -> Result<()> {
    let place = Place::new(Bus::Xhci)?;
    let card = format!("passthru,unix-listen:{}", place.path("card"));
    let daemon = Process::start("ccid-device", ["--reader", &place.reader(""), "--card", &card], &[])?;
    daemon.line("ready").await?;
    let atr = message(5, 0, &[0x3B, 0x84, 0x40, 0x01, 0x74, 0x65, 0x73, 0x74]);
    for round in 0..stack_tests::scale(200, 2000) {
        let mut stream = UnixStream::connect(place.path("card")).await?;
        // It may be refused, since the one before is not gone yet.
        let _ = stream.write_all(&atr.repeat(if round == 0 { 100 } else { 3 })).await;
        let mut answer = [0; 12];
        let _ = stream.read_exact(&mut answer).await;
    }
    daemon.line("not all of this is told from now on").await?;
    // For each kind of line; a minute may have passed.
    let log = daemon.log();
    let mut kinds: BTreeMap<String, u32> = BTreeMap::new();
    for line in log.lines() {
        // Without the time, and where the last one of a kind says so.
        let text = line.split_once(' ').map_or(line, |(_, text)| text);
        let text = text.split("; not all of this").next().unwrap_or(text);
        *kinds.entry(text.replace(|character: char| character.is_ascii_digit(), "")).or_default() += 1;
    }
    let most = kinds.values().max();
    ensure!(kinds.len() < 20 && most.is_some_and(|most| *most <= 64 + 10), "{kinds:?}\n{log}");
    Ok(())
}
