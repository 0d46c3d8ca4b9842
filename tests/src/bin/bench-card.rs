//! What the emulated card itself costs, without a guest: keys, commands, memory; beside libcacard and NSS.
//!
//! What is compared is measured in turns, so that the ratios hold whatever else the machine does.

#![forbid(unsafe_code)]

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use emulated_card::card::{CardOptions, EmulatedCard, Profile, Step};
use emulated_card::keys::KeyStore;
use emulated_card::keys::nss::NssDatabase;
use emulated_card::pin::ReferenceData;
use emulated_card::slot;
use emulated_card::state::CardId;
use stack_tests::database::{Database, NAMES, PIN};
use stack_tests::process::program;
use vscard_protocol::{Command as Apdu, Response};

const USAGE: &str = "\
usage: bench-card [--rounds N]

Measures, in turns, RSA-2048 signatures and SELECTs of a card on an NSS database with a password, beside libcacard
on the same database and NSS itself. Exits with 0 whatever the figures are.

  --rounds N    how often each has its turn (8)
  --help        this
";

/// Signatures of a turn: about a quarter of a second each.
const SIGNATURES: u32 = 200;
/// libcacard needs 30 ms for each.
const SLOW_SIGNATURES: u32 = 10;
const SELECTS: u32 = 100_000;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let rounds = match words[..] {
        [] => Some(8),
        ["--help" | "-h"] => {
            print!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        ["--rounds", rounds] => rounds.parse().ok().filter(|rounds| *rounds > 0),
        _ => None,
    };
    let Some(rounds) = rounds else {
        eprint!("bench-card: {}?\n{USAGE}", args.join(" "));
        return ExitCode::from(2);
    };
    match measure(rounds) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-card: it cannot be measured: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// One of those that take turns: operations of each turn, and how long they took.
struct Runner<'a> {
    what: &'static str,
    operations: u32,
    run: Box<dyn FnMut(u32) -> Result<Duration> + 'a>,
    /// Operations per second, by round.
    rates: Vec<f64>,
}

impl<'a> Runner<'a> {
    fn new(what: &'static str, operations: u32, run: impl FnMut(u32) -> Result<Duration> + 'a) -> Self {
        Self { what, operations, run: Box::new(run), rates: Vec::new() }
    }

    fn rate(&self) -> f64 {
        median(self.rates.clone())
    }
}

/// Each runner's turn, round by round, every other time backwards.
fn interleave(runners: &mut [Runner<'_>], rounds: u32) -> Result<()> {
    for round in 0..=rounds {
        let count = runners.len();
        for turn in 0..count {
            let runner = &mut runners[if round % 2 == 0 { turn } else { count - 1 - turn }];
            let took = (runner.run)(runner.operations).context(runner.what)?;
            // The first round makes session keys and warms caches.
            if round > 0 {
                runner.rates.push(f64::from(runner.operations) / took.as_secs_f64());
            }
        }
    }
    Ok(())
}

fn table(unit: &str, runners: &[Runner<'_>]) {
    println!("{unit:<44}{:>12}{:>12}{:>12}", "median", "least", "most");
    for runner in runners {
        let (least, most) = runner
            .rates
            .iter()
            .fold((f64::INFINITY, 0.0_f64), |(least, most), rate| (least.min(*rate), most.max(*rate)));
        println!("{:<44}{:>12.0}{least:>12.0}{most:>12.0}", runner.what, runner.rate());
    }
    println!();
}

/// `one` beside `other`, at least `bound` times as fast.
fn judge(what: &str, ratio: f64, bound: f64) {
    let kept = if ratio >= bound { "kept" } else { "NOT KEPT" };
    println!("{what:<60}{ratio:>8.2}   at least {bound}: {kept}");
}

fn measure(rounds: u32) -> Result<()> {
    println!("Load of the machine before: {}", load()?);
    let database = Database::with_password()?;
    let mut libcacard = Peer::start("libcacard", &database, &NAMES)?;
    let mut nss = Peer::start("nss", &database, &NAMES[..1])?;
    let (mut card, mut other) = (card(&database, "one")?, card(&database, "two")?);
    for card in [&mut card, &mut other] {
        verify(card)?;
    }

    let (libcacard, nss) = (std::cell::RefCell::new(&mut libcacard), std::cell::RefCell::new(&mut nss));
    let cards = std::cell::RefCell::new((&mut card, &mut other));
    let mut signing = [
        Runner::new("libcacard", SLOW_SIGNATURES, |count| libcacard.borrow_mut().run("sign", count)),
        Runner::new("NSS, key copied to the session", SIGNATURES, |count| {
            nss.borrow_mut().run("sign", count)
        }),
        Runner::new("our card", SIGNATURES, |count| timed(|| sign(cards.borrow_mut().0, count))),
        Runner::new("NSS, two threads (for each)", SIGNATURES, |count| nss.borrow_mut().run("sign2", count)),
        Runner::new("our cards, two on two threads (for each)", SIGNATURES, |count| {
            let mut cards = cards.borrow_mut();
            let (one, two) = &mut *cards;
            timed(|| {
                std::thread::scope(|scope| {
                    let beside = scope.spawn(|| sign(one, count));
                    sign(two, count)?;
                    beside.join().unwrap_or_else(|_| bail!("a thread of the benchmark panicked"))
                })
            })
        }),
    ];
    interleave(&mut signing, rounds)?;
    table("RSA-2048 signatures a second, from NSS", &signing);
    let [theirs, raw, ours, raw2, ours2] = &signing;
    judge("our card / libcacard", ours.rate() / theirs.rate(), 15.0);
    judge("our card / NSS", ours.rate() / raw.rate(), 0.9);
    let (scaling, of_nss) = (ours2.rate() / ours.rate(), raw2.rate() / raw.rate());
    judge("scaling to two threads / that of NSS", scaling / of_nss, 0.9);
    println!();
    drop(signing);

    let command = Apdu::parse(&SELECT)?;
    let mut selecting = [
        Runner::new("libcacard", SELECTS, |count| libcacard.borrow_mut().run("select", count)),
        Runner::new("our card", SELECTS, |count| {
            let mut cards = cards.borrow_mut();
            timed(|| {
                for _ in 0..count {
                    let status = transmit(cards.0, &command).status();
                    ensure!(status.0 >> 8 == 0x61, "SELECT is answered {status:?}");
                }
                Ok(())
            })
        }),
    ];
    interleave(&mut selecting, rounds)?;
    table("SELECTs a second, at the card's core", &selecting);
    let [theirs, ours] = &selecting;
    judge("our card / libcacard", ours.rate() / theirs.rate(), 1.0);
    println!("\nLoad of the machine after: {}", load()?);
    Ok(())
}

/// SELECT of the first PKI container.
const SELECT: [u8; 12] = [0x00, 0xA4, 0x04, 0x00, 0x07, 0xA0, 0x00, 0x00, 0x00, 0x79, 0x01, 0x00];

fn card(database: &Database, name: &str) -> Result<EmulatedCard> {
    let store = NssDatabase::open(&database.spec(), &NAMES.map(str::to_owned))?;
    let id = CardId::derive(store.certificates(), name);
    let reference = Arc::new(ReferenceData::in_memory(3));
    let slots = slot::assign(store.certificates(), &[])?;
    let options = CardOptions { profile: Profile::Cac, slots };
    let random = Box::new(|challenge: &mut [u8]| challenge.fill(0));
    Ok(EmulatedCard::new(Arc::new(store), reference, id, options, random)?)
}

fn transmit(card: &mut EmulatedCard, command: &Apdu) -> Response {
    match card.command(command) {
        Step::Answer(response) => response,
        Step::Work(job) => card.finish(job.run()),
    }
}

fn verify(card: &mut EmulatedCard) -> Result<()> {
    let pin = PIN.bytes().chain(std::iter::repeat(0xFF)).take(8).collect::<Vec<_>>();
    for (command, status) in
        [(Apdu::parse(&SELECT)?, 0x61), (Apdu::build([0x00, 0x20, 0x00, 0x00], &pin, None)?, 0x90)]
    {
        let said = transmit(card, &command).status();
        ensure!(said.0 >> 8 == status, "it is answered {said:?}");
    }
    Ok(())
}

/// As many signatures, each in the three commands it takes.
fn sign(card: &mut EmulatedCard, count: u32) -> Result<()> {
    let mut block = [0xFF; 256];
    (block[0], block[1], block[220]) = (0, 1, 0);
    block[221..].fill(0x5A);
    let first = Apdu::build([0x00, 0x42, 0x80, 0x00], &block[..240], None)?;
    let last = Apdu::build([0x00, 0x42, 0x00, 0x00], &block[240..], Some(256))?;
    for _ in 0..count {
        for command in [&first, &last] {
            let status = transmit(card, command).status();
            ensure!(status.0 == 0x9000, "SIGN/DECRYPT is answered {status:?}");
        }
    }
    Ok(())
}

fn timed(work: impl FnOnce() -> Result<()>) -> Result<Duration> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed())
}

/// The C program beside this one.
struct Peer {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Peer {
    fn start(kind: &str, database: &Database, names: &[&str]) -> Result<Self> {
        let mut child = Command::new(peer()?)
            .arg(kind)
            .arg(database.spec())
            .args(names)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("the peer program")?;
        let input = child.stdin.take().context("the peer's input")?;
        let output = BufReader::new(child.stdout.take().context("the peer's output")?);
        let mut peer = Self { child, input, output };
        writeln!(peer.input, "{PIN}")?;
        ensure!(peer.line()? == "ready", "the peer is not ready");
        Ok(peer)
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        ensure!(self.output.read_line(&mut line)? > 0, "the peer ended");
        Ok(line.trim_end().to_owned())
    }

    fn run(&mut self, operation: &str, count: u32) -> Result<Duration> {
        writeln!(self.input, "{operation} {count}")?;
        Ok(Duration::from_nanos(self.line()?.parse()?))
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Compiles the peer beside this program.
fn peer() -> Result<std::path::PathBuf> {
    let peer = program("bench-card")?.with_file_name("bench-peer");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/peer.c");
    let flags = Command::new("pkg-config").args(["--cflags", "--libs", "libcacard", "nss"]).output()?;
    ensure!(flags.status.success(), "pkg-config: {}", String::from_utf8_lossy(&flags.stderr));
    let compiled = Command::new("gcc")
        .args(["-O2", "-Wall", "-o"])
        .args([&peer, &source])
        .args(String::from_utf8_lossy(&flags.stdout).split_whitespace())
        .arg("-lpthread")
        .status()
        .context("gcc")?;
    ensure!(compiled.success(), "gcc does not compile the peer");
    Ok(peer)
}

/// Of at least one number.
fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    let middle = numbers.len() / 2;
    if numbers.len() % 2 == 1 { numbers[middle] } else { (numbers[middle - 1] + numbers[middle]) / 2.0 }
}

fn load() -> Result<String> {
    let load = std::fs::read_to_string("/proc/loadavg")?;
    let averages: Vec<_> = load.split_whitespace().take(3).collect();
    Ok(format!("{} on {} processors", averages.join(" "), std::thread::available_parallelism()?))
}
