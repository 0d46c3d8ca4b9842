//! What an APDU costs on its way from a guest's program to our programs and back, road by road.
//!
//! Roads that are compared are in one guest and are measured in turns, so that the ratios hold whatever else the
//! machine does.

#![forbid(unsafe_code)]

use std::ffi::OsStr;
use std::io::Write;
use std::net::{Ipv4Addr, TcpListener};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use stack_tests::SELECT;
use stack_tests::database::{Database, NAMES, PIN};
use stack_tests::floor;
use stack_tests::guest::{Boot, Guest, short_directory, within};
use stack_tests::naive::Naive;
use stack_tests::process::Process;
use stack_tests::reader::certificates;

const USAGE: &str = "\
usage: bench [--rounds N]

Boots a guest with readers of ours and measures, in turns, a SELECT over each of five roads:
  usbredir   ccid-device, xHCI and QEMU's usb-redir
  floor      the same with a responder that does nothing
  in-process QEMU's own usb-ccid and ccid-card-emulated, xHCI
  usbip      ccid-device, the guest's vhci-hcd and QEMU's user network
  ip-floor   the same with a responder that does nothing
and another with three of QEMU's readers:
  unix       vscclient, UNIX socket
  tcp        vscclient, TCP, QEMU's default options (no nodelay)
  naive      the same TCP, and a client that sets TCP_NODELAY and nothing else
and then signing with OpenSC over unix and tcp. Exits with 0 whatever the figures are.

  --rounds N    how often each road has its turn (6); those of ccid-device have twice as many
  --help        this
";

/// What the project promises for tcp/unix, and for our reader beside one that does nothing.
const TCP_BOUND: f64 = 1.3;
const FLOOR_BOUND: f64 = 1.15;

/// Of our reader's roads, for each of the others': they are compared more closely, and are quick.
const READER_ROUNDS: u32 = 2;

/// For certutil, which takes a second or two.
const KEYS_LIMIT: Duration = Duration::from_secs(60);

/// Round trips of a turn, and those before that do not count.
struct Turn {
    count: u32,
    warmup: u32,
}

const FAST: Turn = Turn { count: 200, warmup: 20 };
/// At half a millisecond each.
const SHORT: Turn = Turn { count: 300, warmup: 30 };
/// At 44 ms each. A new connection is acknowledged at once for a while; that has to be over.
const SLOW: Turn = Turn { count: 25, warmup: 10 };

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let rounds = match words[..] {
        [] => Some(6),
        ["--help" | "-h"] => {
            print!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        ["--rounds", rounds] => rounds.parse().ok().filter(|rounds| *rounds > 0),
        _ => None,
    };
    let Some(rounds) = rounds else {
        eprint!("bench: {}?\n{USAGE}", args.join(" "));
        return ExitCode::from(2);
    };
    let done = scratch().and_then(|scratch| {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let measured = runtime.block_on(async {
            tokio::select! {
                measured = measure(rounds) => measured,
                interrupted = tokio::signal::ctrl_c() => {
                    interrupted?;
                    bail!("interrupted")
                }
            }
        });
        // An image that is just being built would be waited for.
        runtime.shutdown_background();
        scratch.close().context("removing the temporary directory")?;
        measured
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: it cannot be measured: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// One directory for all that is temporary: databases that are kept for copying live as long as the process.
fn scratch() -> Result<tempfile::TempDir> {
    let scratch = tempfile::Builder::new().prefix("card-bench-").tempdir()?;
    if tempfile::env::override_temp_dir(scratch.path()).is_err() {
        bail!("a temporary directory is in use already");
    }
    Ok(scratch)
}

/// A way from a reader in the guest to a card.
struct Road {
    /// Also the reader's serial number, by which the guest knows it.
    name: &'static str,
    what: &'static str,
    turn: Turn,
    /// Index of its reader in the guest.
    reader: usize,
    turns: Vec<Figures>,
}

impl Road {
    fn new(name: &'static str, what: &'static str, turn: Turn) -> Self {
        Self { name, what, turn, reader: 0, turns: Vec::new() }
    }

    fn median_of(&self, figure: fn(&Figures) -> u64) -> f64 {
        median(self.turns.iter().map(|turn| figure(turn) as f64).collect())
    }

    fn median(&self) -> f64 {
        self.median_of(|turn| turn.median)
    }
}

/// What one turn measured, in µs.
struct Figures {
    count: u64,
    min: u64,
    median: u64,
    p90: u64,
    p99: u64,
}

async fn measure(rounds: u32) -> Result<()> {
    let start = Instant::now();
    println!("Load of the machine before: {}", load()?);
    progress("making keys")?;
    let making = tokio::task::spawn_blocking(|| {
        anyhow::Ok([Database::with_password()?, Database::with_password()?, Database::with_password()?])
    });
    let databases = within(None, KEYS_LIMIT, "the databases", making).await???;
    measure_reader(rounds * READER_ROUNDS, &databases).await?;
    println!();
    measure_passthru(rounds, &databases).await?;
    println!("\nLoad of the machine after: {}; {:.1} s in all.", load()?, start.elapsed().as_secs_f64());
    Ok(())
}

/// Our reader's roads: what it adds to what the road costs anyway.
async fn measure_reader(rounds: u32, [usbredir, usbip, inside]: &[Database; 3]) -> Result<()> {
    let mut roads = [
        Road::new("usbredir", "ccid-device, usbredir", SHORT),
        Road::new("floor", "do-nothing responder, usbredir", SHORT),
        Road::new("in-process", "QEMU's usb-ccid and card", SHORT),
        Road::new("usbip", "ccid-device, USB/IP", SHORT),
        Road::new("ip-floor", "do-nothing responder, USB/IP", SHORT),
    ];
    let directory = short_directory()?;
    let path = |name: &str| directory.path().join(name).display().to_string();
    let port = free_ports()?.0;
    floor::usbredir(&directory.path().join("floor"), "floor")?;
    let floor_port = floor::usbip("ip-floor")?;
    let daemon = [
        ("--reader", format!("usbredir,serial=usbredir,unix-listen:{}", path("usbredir"))),
        ("--reader", format!("usbip,serial=usbip,tcp-listen:127.0.0.1:{port}")),
        ("--card", certificates(usbredir, ",reader=0")),
        ("--card", certificates(usbip, ",reader=1")),
    ];
    let daemon = Process::start(
        "ccid-device",
        daemon.iter().flat_map(|(option, value)| [*option, value]),
        &[("XDG_STATE_HOME", OsStr::new(usbredir.path()))],
    )?;
    daemon.line("ready").await?;

    progress("booting a guest, whose image is built if need be")?;
    let mut args = ["-device", "qemu-xhci"].map(str::to_owned).to_vec();
    for name in ["usbredir", "floor"] {
        args.extend(["-chardev".into(), format!("socket,id={name},path={}", path(name))]);
        args.extend(["-device".into(), format!("usb-redir,chardev={name}")]);
    }
    let [one, two, three] = NAMES;
    let card = format!("backend=certificates,db={},cert1={one},cert2={two},cert3={three}", inside.spec());
    args.extend(["-device".into(), "usb-ccid,id=inside,serial=in-process".into()]);
    args.extend(["-device".into(), format!("ccid-card-emulated,bus=inside.0,{card}")]);
    args.extend(["-netdev", "user,id=n0", "-device", "virtio-net-pci,netdev=n0"].map(str::to_owned));
    let guest = Guest::boot(Boot::with(args)).await?;
    guest.start_network().await?;
    guest.ok("modprobe vhci-hcd && mkdir -p /var/run/vhci_hcd").await?;
    for port in [port, floor_port] {
        guest.ok(&format!("usbip --tcp-port {port} attach -r 10.0.2.2 -b 1-1")).await?;
    }
    find(&guest, &mut roads).await?;
    println!("A guest with {} readers is up: three on xHCI, two on its vhci-hcd.", roads.len());
    let answers = interleave(&guest, &mut roads, rounds).await?;
    // Or the floor would not be that of the same road.
    let [ours, floors, _, ours_ip, floors_ip] = &answers[..] else { bail!("an answer is missing") };
    ensure!([floors, ours_ip, floors_ip].into_iter().all(|answer| answer.len() == ours.len()), "{answers:?}");
    guest.shutdown().await;

    println!("\nSELECT, round trip in the guest, µs (percentiles: the median of {rounds} rounds)\n");
    table(&roads)?;
    let [usbredir, floor, inside, usbip, ip_floor] = &roads;
    println!("{}{}", ratio(usbredir, floor), judged(usbredir, floor, FLOOR_BOUND));
    println!("{}", ratio(usbredir, inside));
    println!("{}", ratio(floor, inside));
    println!("{}{}", ratio(usbip, ip_floor), judged(usbip, ip_floor, FLOOR_BOUND));
    Ok(())
}

/// The roads of QEMU's `ccid-card-passthru`.
async fn measure_passthru(rounds: u32, databases: &[Database; 3]) -> Result<()> {
    let directory = short_directory()?;
    let socket = directory.path().join("card").display().to_string();
    let (tcp, naive) = free_ports()?;
    let mut roads = [
        Road::new("unix", "vscclient, UNIX socket", FAST),
        Road::new("tcp", "vscclient, TCP, no nodelay", FAST),
        Road::new("naive", "naive client, TCP, no nodelay", SLOW),
    ];
    let listen = |port: u16| format!("host=127.0.0.1,port={port},server=on,wait=off");
    let chardevs = [format!("path={socket},server=on,wait=off"), listen(tcp), listen(naive)];
    progress("booting a guest")?;
    let guest = Guest::boot(Boot::with(readers(&roads, &chardevs))).await?;
    let client = |database: &Database, endpoint: &str| {
        let spec = database.spec();
        let mut args = vec!["--profile", "cac", "--db", &spec];
        args.extend(NAMES.iter().flat_map(|name| ["--cert", name]));
        args.push(endpoint);
        Process::start("vscclient", args, &[("XDG_STATE_HOME", OsStr::new(database.path()))])
    };
    let _clients = (
        client(&databases[0], &format!("unix:{socket}"))?,
        client(&databases[1], &format!("tcp:127.0.0.1:{tcp}"))?,
        Naive::connect(naive)?,
    );
    find(&guest, &mut roads).await?;
    println!("A guest with {} readers is up, QEMU's.", roads.len());
    println!(
        "All readers are full-speed, behind one hub (UHCI has two ports), and idle but for the one measured."
    );
    interleave(&guest, &mut roads, rounds).await?;
    let signed = signing(&guest, &roads, databases, rounds).await?;
    guest.shutdown().await;

    println!("\nSELECT, round trip in the guest on UHCI, µs (percentiles: the median of {rounds} rounds)\n");
    table(&roads)?;
    let [unix, tcp, naive] = &roads;
    println!("{}{}", ratio(tcp, unix), judged(tcp, unix, TCP_BOUND));
    // What it costs whatever the rest of the road does.
    let more = (naive.median() - unix.median()) / 1e3;
    println!("{}   {more:+.1} ms for each APDU", ratio(naive, unix));
    let [unix, tcp] = signed;
    println!(
        "\npkcs11-tool --sign as a whole: unix {unix:.0} ms, tcp {tcp:.0} ms, tcp/unix {:.2} \
         (medians of {rounds})",
        tcp / unix
    );
    Ok(())
}

/// Starts pcscd and finds each road's reader, with a card in it.
async fn find(guest: &Guest, roads: &mut [Road]) -> Result<()> {
    guest.start_pcscd().await?;
    guest.ok(&format!("guest-pcsc wait-reader 30 {}", roads.len())).await?;
    let found = guest.ok("guest-pcsc readers").await?;
    for road in roads {
        let serial = format!("({})", road.name);
        let line = found.lines().find(|line| line.contains(&serial));
        let index = line.and_then(|line| line.split_once(':')).context("a reader is missing")?.0;
        road.reader = index.parse()?;
        guest.ok(&format!("guest-pcsc wait-card present 30 {index}")).await?;
    }
    Ok(())
}

/// Each road's turn, round by round. Returns what each road's card answers.
async fn interleave(guest: &Guest, roads: &mut [Road], rounds: u32) -> Result<Vec<String>> {
    let mut answers = vec![String::new(); roads.len()];
    for round in 0..rounds {
        // Every other time backwards, so that none is always the one after the slow one.
        for turn in 0..roads.len() {
            let index = if round % 2 == 0 { turn } else { roads.len() - 1 - turn };
            let road = &mut roads[index];
            let (figures, answer) = select(guest, road).await.with_context(|| road.what)?;
            road.turns.push(figures);
            answers[index] = answer;
        }
        progress(&format!("round {} of {rounds}", round + 1))?;
    }
    Ok(answers)
}

/// Two ports that were free a moment ago; QEMU cannot be asked which one it took.
fn free_ports() -> Result<(u16, u16)> {
    // Both at once, so that they differ.
    let listen = || TcpListener::bind((Ipv4Addr::LOCALHOST, 0));
    let (first, second) = (listen()?, listen()?);
    Ok((first.local_addr()?.port(), second.local_addr()?.port()))
}

/// QEMU's arguments: a UHCI controller with a hub, and each road's reader on it.
fn readers(roads: &[Road], chardevs: &[String]) -> Vec<String> {
    let mut args = ["-usb", "-device", "usb-hub,port=1"].map(str::to_owned).to_vec();
    for ((Road { name, .. }, chardev), port) in roads.iter().zip(chardevs).zip(1..) {
        for (option, value) in [
            ("-chardev", format!("socket,id={name},{chardev}")),
            ("-device", format!("usb-ccid,id={name}-reader,port=1.{port},serial={name}")),
            ("-device", format!("ccid-card-passthru,chardev={name},bus={name}-reader.0")),
        ] {
            args.extend([option.to_owned(), value]);
        }
    }
    args
}

/// One turn of a road.
async fn select(guest: &Guest, road: &Road) -> Result<(Figures, String)> {
    let Turn { count, warmup } = road.turn;
    let line =
        guest.ok(&format!("guest-pcsc bench -r {} -n {count} -w {warmup} {SELECT}", road.reader)).await?;
    let field = |name: &str| {
        let found = line.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
        found.with_context(|| format!("no {name} in {line}"))
    };
    // 61xx: done, and there is an answer to fetch, which is not measured.
    let answer = field("answer")?;
    ensure!(answer.starts_with("61") || answer.ends_with("9000"), "SELECT is answered {answer}");
    let number = |name| anyhow::Ok(field(name)?.parse()?);
    let figures = Figures {
        count: number("n")?,
        min: number("min")?,
        median: number("median")?,
        p90: number("p90")?,
        p99: number("p99")?,
    };
    Ok((figures, answer.to_owned()))
}

/// Median time in ms of a whole `pkcs11-tool --sign`, over the roads that have one of the databases.
async fn signing(guest: &Guest, roads: &[Road], databases: &[Database], rounds: u32) -> Result<[f64; 2]> {
    const MESSAGE: &[u8] = b"signed in a benchmark";
    guest.put("/tmp/message", MESSAGE).await?;
    let sign = |name: &str| {
        format!(
            "OPENSC_CONF=/tmp/{name}.conf pkcs11-tool --sign --mechanism SHA256-RSA-PKCS --login --pin {PIN} \
             --id 0001 -i /tmp/message -o /tmp/signature"
        )
    };
    for (road, database) in roads.iter().zip(databases).take(2) {
        // OpenSC would look into every reader, the slow one too.
        let others: Vec<_> = roads
            .iter()
            .filter(|other| other.name != road.name)
            .map(|other| format!("\"({})\"", other.name))
            .collect();
        let conf = format!("app default {{\n  ignored_readers = {};\n}}\n", others.join(", "));
        guest.put(&format!("/tmp/{}.conf", road.name), conf.as_bytes()).await?;
        // The first run reads the program's pages; it does not count, so let it prove that the road is right.
        guest.ok(&sign(road.name)).await?;
        let signature = guest.get("/tmp/signature").await?;
        ensure!(database.verifies(NAMES[0], MESSAGE, &signature)?, "a wrong signature over {}", road.what);
    }
    let mut times = [Vec::new(), Vec::new()];
    for round in 0..rounds {
        for (road, times) in roads.iter().zip(&mut times) {
            let start = Instant::now();
            guest.ok(&sign(road.name)).await?;
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
        progress(&format!("signing, round {} of {rounds}", round + 1))?;
    }
    Ok(times.map(median))
}

fn table(roads: &[Road]) -> Result<()> {
    println!("{:<32}{:>6}{:>9}{:>9}{:>9}{:>9}", "road", "n", "min", "median", "p90", "p99");
    for road in roads {
        let count: u64 = road.turns.iter().map(|turn| turn.count).sum();
        let min = road.turns.iter().map(|turn| turn.min).min().context("no rounds")?;
        let (p50, p90, p99) =
            (road.median(), road.median_of(|turn| turn.p90), road.median_of(|turn| turn.p99));
        println!("{:<32}{count:>6}{min:>9}{p50:>9.0}{p90:>9.0}{p99:>9.0}", road.what);
    }
    println!();
    Ok(())
}

fn ratio(one: &Road, other: &Road) -> String {
    let each =
        || one.turns.iter().zip(&other.turns).map(|(one, other)| one.median as f64 / other.median as f64);
    let (least, most) = (each().fold(f64::INFINITY, f64::min), each().fold(0.0, f64::max));
    let name = format!("{}/{}", one.name, other.name);
    let ratio = one.median() / other.median();
    format!("{name:<20}{ratio:>6.2}   (round by round {least:.2} to {most:.2})")
}

fn judged(one: &Road, other: &Road, bound: f64) -> String {
    let kept = if one.median() / other.median() <= bound { "kept" } else { "NOT KEPT" };
    format!("   at most {bound}: {kept}")
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
    let processors = std::thread::available_parallelism()?;
    Ok(format!("{} on {processors} processors", averages.join(" ")))
}

/// Not among the results, which may go to a file.
fn progress(what: &str) -> Result<()> {
    writeln!(std::io::stderr(), "bench: {what}").context("standard error")
}
