//! The PIN's counter on disk, whatever happens to the client or to the disk.

use std::ffi::OsStr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use stack_tests::database::{Database, NAMES, PIN};
use stack_tests::host::{Host, Peer, message, verify};
use stack_tests::process::{Process, program};
use tempfile::TempDir;
use tokio::process::Command;

const WRONG: &str = "314159";

struct Bench {
    host: Host,
    database: Database,
    state: TempDir,
}

impl Bench {
    fn new() -> Result<Self> {
        Ok(Self { host: Host::new()?, database: Database::with_password()?, state: tempfile::tempdir()? })
    }

    fn args(&self) -> Vec<String> {
        let mut args: Vec<String> =
            ["--profile", "cac", "--db", &self.database.spec()].map(str::to_owned).into();
        args.extend(NAMES.iter().flat_map(|name| ["--cert".to_owned(), (*name).to_owned()]));
        args.push(self.host.endpoint());
        args
    }

    fn client(&self) -> Result<Process> {
        Process::start("vscclient", self.args(), &[("XDG_STATE_HOME", OsStr::new(self.state.path()))])
    }
}

/// Tries left, as the card tells without a PIN.
async fn tries_left(peer: &mut Peer) -> Result<u8> {
    match peer.transmit(&[0x00, 0x20, 0x00, 0x00]).await?[..] {
        [0x63, count] => Ok(count & 0x0F),
        [0x69, 0x83] => Ok(0),
        ref other => anyhow::bail!("status {other:02X?}"),
    }
}

/// Killed at random moments during 200 VERIFYs, the client never has a try more afterwards than before.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_client_gives_no_try_back() -> Result<()> {
    let bench = Bench::new()?;
    let wanted = stack_tests::scale(200, 2000);
    let (mut verifies, mut kills, mut known) = (0, 0, 3);
    // Any sequence will do, as long as each run tries the same moments.
    let mut seed = 20_u32;
    let mut random = |below: u32| {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (seed >> 16) % below
    };
    while verifies < wanted {
        let mut client = bench.client()?;
        let mut peer = bench.host.card().await?;
        let left = tries_left(&mut peer).await?;
        ensure!(left <= known, "{left} tries after a kill, {known} before; kill {kills}");
        ensure!(left + 1 >= known, "{left} tries after a kill, {known} before: one VERIFY took two");
        // A right PIN to start with: all tries again.
        let start = Instant::now();
        ensure!(peer.transmit(&verify(PIN)).await? == [0x90, 0x00], "{}", client.log());
        let mut took = start.elapsed();
        known = 3;
        verifies += 1;
        for _ in 0..random(20) {
            verifies += 1;
            let wrong = known == 3;
            let start = Instant::now();
            let answer = peer.transmit(&verify(if wrong { WRONG } else { PIN })).await?;
            ensure!(answer == if wrong { [0x63, 0xC2] } else { [0x90, 0x00] }, "{answer:02X?}");
            known = if wrong { 2 } else { 3 };
            took = start.elapsed();
        }
        // A wrong one is under way when the client dies, at a random part of the time that the last one took.
        verifies += 1;
        peer.send(&message(7, 0, &verify(WRONG))).await?;
        let moment = took.mul_f64(f64::from(random(1250)) / 1000.0);
        if let Ok(answer) = tokio::time::timeout(moment, peer.response()).await {
            ensure!(answer?[0] == 0x63);
            known -= 1;
        }
        client.signal(rustix::process::Signal::KILL)?;
        client.ended().await?;
        kills += 1;
    }
    println!("{verifies} VERIFYs, {kills} kills, no try given back");
    Ok(())
}

/// A PIN that was verified is not for whoever finds the guest's screen unlocked an hour later.
#[tokio::test(flavor = "multi_thread")]
async fn an_idle_card_forgets_the_pin() -> Result<()> {
    let bench = Bench::new()?;
    let args = [&["--forget-pin".to_owned(), "1".to_owned()], &bench.args()[..]].concat();
    let client = Process::start("vscclient", args, &[("XDG_STATE_HOME", OsStr::new(bench.state.path()))])?;
    let mut peer = bench.host.card().await?;
    ensure!(peer.transmit(&verify(PIN)).await? == [0x90, 0x00], "{}", client.log());
    // To ask is to use the card, so each pause is longer than the last.
    let mut pause = Duration::from_millis(100);
    while peer.transmit(&[0x00, 0x20, 0x00, 0x00]).await? != [0x63, 0xC3] {
        ensure!(pause < Duration::from_secs(10), "the PIN is still verified: {}", client.log());
        pause *= 2;
        tokio::time::sleep(pause).await;
    }
    Ok(())
}

/// A disk that takes no more, or nothing at all, refuses VERIFY: with the right PIN, too, or guesses were free.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_or_read_only_disk_refuses_verify() -> Result<()> {
    for (trouble, break_it) in [
        ("full", "head -c 1048576 /dev/zero >\"$DISK/filler\" 2>/dev/null"),
        // The client holds a file open, so what becomes read-only is another view of the same disk.
        ("read-only", "mount --bind \"$DISK\" \"$DISK\" && mount -o remount,bind,ro \"$DISK\""),
    ] {
        let bench = Bench::new()?;
        // A small disk that only this client sees; as an ordinary user, in a user namespace.
        let script = format!(
            "mount -t tmpfs -o size=64k none \"$DISK\" || exit 9
             \"$@\" & client=$!; trap 'kill $client' TERM
             while ! ls \"$DISK\"/vscclient/* >/dev/null 2>&1; do kill -0 $client || exit 9; sleep 0.05; done
             {break_it}; echo disk broken >&2; wait $client"
        );
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--mount", "sh", "-c", &script, "sh"]);
        command.arg(program("vscclient")?).args(bench.args());
        command.env("DISK", bench.state.path()).env("XDG_STATE_HOME", bench.state.path());
        let mut client = Process::spawn(command).context("unshare of util-linux")?;
        let mut peer = bench.host.card().await.with_context(|| {
            format!("no card; user namespaces may be switched off here. It said: {}", client.log())
        })?;
        client.line("disk broken").await?;
        for pin in [WRONG, PIN] {
            let answer = peer.transmit(&verify(pin)).await?;
            ensure!(answer == [0x65, 0x81], "{trouble}: {answer:02X?}: {}", client.log());
        }
        ensure!(peer.transmit(&[0x00, 0x20, 0x00, 0x00]).await?[0] == 0x63, "{trouble}: not verified");
        drop(peer);
        client.signal(rustix::process::Signal::TERM)?;
        client.ended().await?;
    }
    Ok(())
}

/// What a user gets wrong at the start is named, and there is no card.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_at_the_start_is_named() -> Result<()> {
    let (locked, open) = (Database::with_password()?, Database::without_password()?);
    let (state, files) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let file = |name: &str, content: &str, mode: u32| -> Result<String> {
        use std::os::unix::fs::PermissionsExt;
        let path = files.path().join(name);
        std::fs::write(&path, content)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode))?;
        Ok(path.display().to_string())
    };
    let (pin, readable) = (file("pin", "4711\n", 0o600)?, file("readable", "4711\n", 0o644)?);
    let (long, wrong) = (file("long", "123456789\n", 0o600)?, file("wrong", "nonsense\n", 0o600)?);
    let (locked, open) = (locked.spec(), open.spec());
    let missing = files.path().join("missing").display().to_string();
    let cases: &[(&[&str], i32, &str)] = &[
        (&["--db", &missing, "-c", "id-cert"], 3, &missing),
        (&["--db", &locked, "-c", "no-such-cert"], 3, "no-such-cert"),
        (&["--db", &locked, "-c", "test-ca", "-c", "nobody"], 3, "nobody"),
        (&["--db", &open, "-c", "id-cert"], 3, "--no-pin"),
        (&["--db", &open, "-c", "id-cert", "--pin-file", &readable], 3, "readable"),
        (&["--db", &open, "-c", "id-cert", "--pin-file", &long], 3, "4 to 8"),
        (&["--db", &locked, "-c", "id-cert", "--pin-file", &pin], 3, "--password-file"),
        (&["--db", &locked, "-c", "id-cert", "--no-pin"], 3, "--password-file"),
        (&["--db", &locked, "-c", "id-cert", "--no-pin", "--password-file", &wrong], 3, "wrong password"),
        (&["--db", &locked, "-c", "id-cert", "--password-file", &wrong], 3, "goes with --pin-file"),
        (&["--db", &locked], 2, "--cert"),
        (&["-e", "db=\"x\" use_hw=off"], 2, "use_hw=off"),
    ];
    for (args, code, part) in cases {
        let args = args.iter().chain(&["unix:/nowhere"]);
        let mut client = Process::start("vscclient", args, &[("XDG_STATE_HOME", OsStr::new(state.path()))])?;
        let line = client.line(part).await?;
        let ended = client.ended().await?;
        ensure!(ended.code() == Some(*code), "{ended}: {line}");
    }
    let mut outside = Process::start(
        "vscclient",
        ["--db", &locked, "-c", "id-cert", "tcp:192.0.2.1:9"],
        &[("XDG_STATE_HOME", OsStr::new(state.path()))],
    )?;
    outside.line("--allow-plaintext").await?;
    ensure!(outside.ended().await?.code() == Some(5));
    Ok(())
}
