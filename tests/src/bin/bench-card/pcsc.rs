//! The way through pcscd and Debian's vpcd, beside pcscd's own round trip, a hop over the loopback, and a card as one
//! writes it on a first afternoon.
//!
//! [`client`] is another process of this program, beside pcscd.

use std::cell::RefCell;
use std::ffi::CString;
use std::io::{self, BufRead, Read, Write};
use std::iter;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use pcsc::{Card, Context, Protocols, ReaderState, Scope, ShareMode, State};
use rustix::net::sockopt::set_tcp_quickack;
use rustix::thread::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};
use stack_tests::database::{Database, NAMES};
use stack_tests::pcscd::Pcscd;
use stack_tests::process::Process;
use tokio::runtime::Handle;

use crate::core::{RawKey, SELECT_PIV};
use crate::directory::CardDirectory;
use crate::peer::{Peer, Programs};
use crate::turns::{MEDIAN, MOST_OF_HUNDRED, Runner, Unit, at_most, interleave, table, timed_each};

/// About 50 ms a turn.
const ROUND_TRIPS: u32 = 500;
/// At 44 ms each.
const NAIVE: u32 = 8;
/// So often a new connection's data is acknowledged at once, whoever reads.
const NAIVE_WARMUP: u32 = 20;
/// At half a millisecond or more.
const SIGNATURES: u32 = 200;

/// The second slot's.
const NAIVE_PORT: u16 = 35_964;
const NAIVE_ATR: [u8; 4] = [0x3B, 0x80, 0x80, 0x01];

const VERIFIED: u32 = 5;

/// Most that 99 of 100 operations take, in delayed acknowledgements: none waits for one.
const MOST_STALLED: f64 = 0.5;

/// Most MiB of a process with one card.
const MOST: f64 = 12.0;

pub(crate) fn measure(
    programs: &Programs,
    database: &Database,
    directory: &CardDirectory,
    runtime: &Handle,
    rounds: u32,
) -> Result<()> {
    // All on one processor: whether waking another one takes 5 µs or 50 is the machine's affair, and the scheduler's.
    let anywhere = sched_getaffinity(None)?;
    let mut here = CpuSet::new();
    here.set(sched_getcpu());
    sched_setaffinity(None, &here)?;
    let measured = on_one_processor(programs, database, directory, runtime, rounds);
    sched_setaffinity(None, &anywhere)?;
    measured
}

fn on_one_processor(
    programs: &Programs,
    database: &Database,
    directory: &CardDirectory,
    runtime: &Handle,
    rounds: u32,
) -> Result<()> {
    let pcscd = runtime.block_on(Pcscd::start())?;
    let (args, _inside) = ([&"card".into(), &directory.path(), &PathBuf::from("vpcd:")], runtime.enter());
    let vscclient = pcscd.start_program("vscclient", args)?;
    runtime.block_on(pcscd.card_in(0)).with_context(|| vscclient.log())?;
    let before = vscclient.memory_kib("VmRSS:")?;
    let client = std::env::current_exe()?;
    let client = RefCell::new(Peer::spawn(pcscd.command(client).arg("pcsc-client").as_std_mut())?);
    // The naive card takes OpenSC half a minute to be known by, and is none.
    let config = pcscd.path("opensc.conf");
    std::fs::write(&config, "app default { ignored_readers = \"Virtual PCD 00 01\"; }\n")?;
    let start_pkcs11 = || {
        let mut pkcs11 = pcscd.command(&programs.pkcs11);
        pkcs11.arg(opensc()?).env("OPENSC_CONF", &config);
        Peer::spawn(pkcs11.as_std_mut())
    };
    let pkcs11 = RefCell::new(start_pkcs11()?);
    let key = RawKey::open(directory)?;

    let told = |operation: &'static str| {
        let client = &client;
        move |count| client.borrow_mut().run(operation, count)
    };
    let mut runners = [
        Runner::new("SCardStatus, which stays in pcscd", ROUND_TRIPS, told("status")),
        Runner::new("loopback TCP, 2 + 12 bytes and an answer", ROUND_TRIPS, told("hop")),
        Runner::new("SELECT, naive card", NAIVE, told("naive")),
        Runner::new("SELECT, our card", ROUND_TRIPS, told("select")),
        Runner::new("SELECT, our card, 99 of 100 at most", ROUND_TRIPS, told("slow-select")),
        Runner::new("RSA-2048, the key alone (PEM)", ROUND_TRIPS, |count| key.run(count)),
        Runner::new("C_SignInit and C_Sign, OpenSC with our card", SIGNATURES, |count| {
            pkcs11.borrow_mut().run("sign", count)
        }),
        Runner::new("the same, 99 of 100 at most", SIGNATURES, |count| {
            pkcs11.borrow_mut().run("slow-sign", count)
        }),
    ];
    interleave(&mut runners, rounds)?;
    table("through pcscd and vpcd, all on one processor, µs each", Unit::Micros, &runners);
    let [status, hop, naive, select, slow_select, key, sign, slow_sign] = &runners;
    let floor = status.time() + hop.time();
    at_most("our SELECT / (SCardStatus + loopback hop)", select.time() / floor, 3.0);
    println!("{:<70}{:>10.0}", "the naive card's SELECT / the same", naive.time() / floor);
    println!("{:<70}{:>10.0}", "the naive card's SELECT / our SELECT", naive.time() / select.time());
    at_most(
        "signature / (the key alone + 10 of our SELECTs)",
        sign.time() / (key.time() + 10.0 * select.time()),
        1.0,
    );
    // The naive card's is one delayed acknowledgement.
    at_most("our SELECT, 99 of 100 / the naive card's", slow_select.time() / naive.time(), MOST_STALLED);
    at_most("signature, 99 of 100 / the naive card's SELECT", slow_sign.time() / naive.time(), MOST_STALLED);
    println!();

    println!("resident MiB of vscclient with one card\n");
    client.borrow_mut().run("verify", VERIFIED)?;
    resident("PEM", before, &vscclient)?;
    drop(runners);
    drop((client, pkcs11, vscclient));
    runtime.block_on(pcscd.ok("guest-pcsc wait-card absent 30 0"))?;
    let mut args = vec!["--db".to_owned(), database.spec()];
    args.extend(NAMES.iter().flat_map(|name| ["--cert".to_owned(), (*name).to_owned()]));
    args.push("vpcd:".to_owned());
    let vscclient = pcscd.start_program("vscclient", args)?;
    runtime.block_on(pcscd.card_in(0)).with_context(|| vscclient.log())?;
    let before = vscclient.memory_kib("VmRSS:")?;
    let mut pkcs11 = start_pkcs11()?;
    pkcs11.run("sign", SIGNATURES)?;
    drop(pkcs11);
    let client = std::env::current_exe()?;
    let mut client = Peer::spawn(pcscd.command(client).arg("pcsc-client").as_std_mut())?;
    client.run("select", ROUND_TRIPS)?;
    client.run("verify", VERIFIED)?;
    resident("NSS", before, &vscclient)
}

/// Of a `vscclient` whose card was used: as it was before, and is.
fn resident(kind: &str, before: u64, vscclient: &Process) -> Result<()> {
    let mib = |kib: u64| kib as f64 / 1024.0;
    println!("{:<70}{:>10.2}", format!("{kind}, put in"), mib(before));
    let after = mib(vscclient.memory_kib("VmRSS:")?);
    at_most(&format!("{kind}, used: selected, signed, PIN verified six times"), after, MOST);
    let most = mib(vscclient.memory_kib("VmHWM:")?);
    // To hash a PIN of the card's own takes 19 MiB, each time.
    println!("{:<70}{most:>10.2}\n", format!("{kind}, at most, while the PIN was verified"));
    Ok(())
}

/// OpenSC as a PKCS#11 module.
pub(crate) fn opensc() -> Result<PathBuf> {
    std::fs::read_dir("/usr/lib")?
        .filter_map(|entry| Some(entry.ok()?.path().join("opensc-pkcs11.so")))
        .find(|path| path.is_file())
        .context("opensc-pkcs11.so is missing: install the package opensc-pkcs11")
}

/// A PC/SC client for as long as there is input: `select N`, `verify N` and `status N` with the first reader's card,
/// `naive N` with the second's, which is its own, and `hop N`. Each line is answered with the nanoseconds that all of
/// them would have taken if each took the median time; of `slow-select N`, as long as 99 of 100 take at most.
pub(crate) fn client() -> Result<()> {
    let naive = TcpStream::connect((Ipv4Addr::LOCALHOST, NAIVE_PORT)).context("vpcd's second slot")?;
    naive.set_nodelay(true)?;
    std::thread::spawn(move || serve_naive(naive));
    let context = Context::establish(Scope::User)?;
    let names = context.list_readers_owned()?;
    ensure!(names.len() == 2, "readers: {names:?}");
    let [ours, naive] = [connect(&context, &names[0])?, connect(&context, &names[1])?];
    for _ in 0..NAIVE_WARMUP {
        transmit(&naive, &SELECT_PIV)?;
    }
    let mut hop = Hop::open()?;
    println!("ready");
    let mut lines = io::stdin().lock().lines();
    let pin = lines.next().context("no PIN")??;
    let pin: Vec<u8> = pin.bytes().chain(iter::repeat(0xFF)).take(8).collect();
    let verify = [&[0x00, 0x20, 0x00, 0x80, 0x08], &pin[..]].concat();
    for line in lines {
        let line = line?;
        let (operation, count) = line.split_once(' ').context("no count")?;
        let count = count.parse().ok().filter(|count| *count > 0).context("no count")?;
        let share = if operation == "slow-select" { MOST_OF_HUNDRED } else { MEDIAN };
        let took = timed_each(count, share, || match operation {
            "select" | "slow-select" => transmit(&ours, &SELECT_PIV),
            "verify" => transmit(&ours, &verify),
            "naive" => transmit(&naive, &SELECT_PIV),
            "status" => status(&ours),
            "hop" => hop.run(),
            _ => bail!("no operation {operation}"),
        })?;
        println!("{}", took.as_nanos());
    }
    Ok(())
}

/// To a card that may be on its way in.
fn connect(context: &Context, name: &CString) -> Result<Card> {
    let limit = Instant::now() + Duration::from_secs(10);
    let mut states = [ReaderState::new(name.clone(), State::UNAWARE)];
    while !states[0].event_state().contains(State::PRESENT) {
        states[0].sync_current_state();
        context.get_status_change(limit.checked_duration_since(Instant::now()), &mut states)?;
    }
    Ok(context.connect(name, ShareMode::Shared, Protocols::ANY)?)
}

fn transmit(card: &Card, command: &[u8]) -> Result<()> {
    let mut buffer = [0; 258];
    let answer = card.transmit(command, &mut buffer)?;
    ensure!(answer.ends_with(&[0x90, 0x00]), "INS {:02X} is answered {answer:02X?}", command[1]);
    Ok(())
}

fn status(card: &Card) -> Result<()> {
    let (mut names, mut atr) = ([0; 256], [0; 33]);
    card.status2(&mut names, &mut atr)?;
    Ok(())
}

/// A connection over the loopback whose far end answers as a card does and acknowledges as ours does.
struct Hop(TcpStream);

impl Hop {
    fn open() -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let near = TcpStream::connect(listener.local_addr()?)?;
        let (mut far, _) = listener.accept()?;
        std::thread::spawn(move || -> io::Result<()> {
            loop {
                far.read_exact(&mut [0; 2])?;
                set_tcp_quickack(&far, true)?;
                far.read_exact(&mut [0; 12])?;
                far.write_all(&[0; 14])?;
            }
        });
        Ok(Self(near))
    }

    /// In two parts, as vpcd writes, and so without TCP_NODELAY.
    fn run(&mut self) -> Result<()> {
        self.0.write_all(&[0; 2])?;
        self.0.write_all(&[0; 12])?;
        self.0.read_exact(&mut [0; 14])?;
        Ok(())
    }
}

/// A card that answers 9000 to everything. It sets TCP_NODELAY, as one does, and still waits 40 ms for each APDU:
/// TCP_QUICKACK is what it lacks.
fn serve_naive(mut stream: TcpStream) -> io::Result<()> {
    loop {
        let mut length = [0; 2];
        stream.read_exact(&mut length)?;
        let mut question = vec![0; u16::from_be_bytes(length).into()];
        stream.read_exact(&mut question)?;
        match question[..] {
            [0x04] => stream.write_all(&[&[0, NAIVE_ATR.len() as u8], &NAIVE_ATR[..]].concat())?,
            // Power and reset.
            [_] => {}
            _ => stream.write_all(&[0, 2, 0x90, 0x00])?,
        }
    }
}
