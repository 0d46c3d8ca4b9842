//! Runs inside the test guest and uses its readers and cards through PC/SC, one command at a time.
//!
//! Output is plain lines for tests to read. A failure prints the PC/SC error's name (`RemovedCard`, `NoService`,
//! `NotTransacted`, …) and exits 1.

#![forbid(unsafe_code)]

use std::ffi::{CStr, CString};
use std::fmt;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use pcsc::{
    Card, Context, Disposition, Error, PNP_NOTIFICATION, Protocols, ReaderState, Scope, ShareMode, State,
};
use stack_tests::echo::{ins, pattern};

const USAGE: &str = "\
usage: guest-pcsc readers
       guest-pcsc wait-reader SECONDS [N]
           until there are at least N readers (1); N = 0: until there is none
       guest-pcsc wait-card present|absent|changed SECONDS [READER [COUNT]]
           changed: from what it is now, or from when its event counter (see status) was COUNT
       guest-pcsc status [READER]
       guest-pcsc transmit [-r READER] [-t0|-t1|any] HEX|reset...
       guest-pcsc repeat [-r READER] N HEX
           the same APDU N times; all answers have to equal the first
       guest-pcsc bench [-r READER] [-n N] [-w WARMUP] HEX...
       guest-pcsc lengths [-r READER] FROM-TO...
           answers of all these lengths, status word included, from an echo card
       guest-pcsc extended [-r READER]
           the longest command, the longest answer and both at once, with an echo card
       guest-pcsc reset [-r READER]
           SCardReconnect with a warm reset
       guest-pcsc events SECONDS
           what happens to readers and cards, as it happens
READER is an index into what `readers` prints. What is waited for comes within SECONDS on an idle machine; on a busy one
it may take three times as long.
";

/// How much longer than usual a wait may be.
const BUSY: u64 = 3;

enum Failure {
    Usage(String),
    Pcsc(Error, Instant),
    Other(String),
}

type Result<T> = std::result::Result<T, Failure>;

/// Keeps the time, for the message.
trait Timed<T> {
    fn since(self, start: Instant) -> Result<T>;
}

impl<T> Timed<T> for std::result::Result<T, Error> {
    fn since(self, start: Instant) -> Result<T> {
        self.map_err(|error| Failure::Pcsc(error, start))
    }
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Usage(problem)) => {
            eprint!("guest-pcsc: {problem}\n{USAGE}");
            ExitCode::from(2)
        }
        Err(Failure::Pcsc(error, start)) => {
            println!("error {error:?} after {} ms", start.elapsed().as_millis());
            ExitCode::FAILURE
        }
        Err(Failure::Other(problem)) => {
            println!("error {problem}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &[String]) -> Result<()> {
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let (name, rest) = words.split_first().ok_or_else(|| Failure::Usage("no command".into()))?;
    match *name {
        "readers" => readers(),
        "wait-reader" => wait_reader(rest),
        "wait-card" => wait_card(rest),
        "status" => status(rest),
        "transmit" => transmit(rest),
        "repeat" => repeat(rest),
        "bench" => bench(rest),
        "lengths" => lengths(rest),
        "extended" => extended(rest),
        "reset" => reset(rest),
        "events" => events(rest),
        _ => Err(Failure::Usage(format!("no command {name}"))),
    }
}

// Commands

fn readers() -> Result<()> {
    print_readers(&Pcsc::establish()?.readers()?);
    Ok(())
}

fn wait_reader(args: &[&str]) -> Result<()> {
    let (seconds, wanted) = match args {
        [seconds] => (number::<u64>(seconds)?, 1),
        [seconds, count] => (number(seconds)?, number(count)?),
        _ => return Err(Failure::Usage("wait-reader SECONDS [N]".into())),
    };
    let limit = Limit::new(BUSY * seconds);
    let pcsc = Pcsc::establish()?;
    loop {
        let readers = pcsc.readers()?;
        if if wanted == 0 { readers.is_empty() } else { readers.len() >= wanted } {
            print_readers(&readers);
            println!("after {} ms", limit.start.elapsed().as_millis());
            return Ok(());
        }
        let mut states = [ReaderState::new(PNP_NOTIFICATION(), State::UNAWARE)];
        pcsc.change(&mut states, &limit)?;
    }
}

fn wait_card(args: &[&str]) -> Result<()> {
    let (wanted, seconds, reader, count) = match args {
        [wanted, seconds] => (wanted, seconds, 0, None),
        [wanted, seconds, reader] => (wanted, seconds, number(reader)?, None),
        [wanted, seconds, reader, count] => (wanted, seconds, number(reader)?, Some(number(count)?)),
        _ => return Err(Failure::Usage("wait-card present|absent|changed SECONDS [READER [COUNT]]".into())),
    };
    let limit = Limit::new(BUSY * number::<u64>(seconds)?);
    let pcsc = Pcsc::establish()?;
    let mut states = [ReaderState::new(pcsc.reader(reader)?, State::UNAWARE)];
    let mut first = None;
    loop {
        // From UNAWARE the first look returns at once with what is.
        pcsc.change(&mut states, &limit)?;
        let state = states[0].event_state();
        if state.intersects(State::UNKNOWN | State::UNAVAILABLE) && *wanted != "absent" {
            return Err(Failure::Other("ReaderUnavailable".into()));
        }
        let now = states[0].event_count() as usize;
        let before = *first.get_or_insert(count.unwrap_or(now));
        let done = match *wanted {
            // A card that does not answer to reset is in the reader all the same, but of no use.
            "present" => state.contains(State::PRESENT) && !state.contains(State::MUTE),
            "absent" => !state.contains(State::PRESENT),
            "changed" => now != before,
            _ => return Err(Failure::Usage(format!("no card state {wanted}"))),
        };
        if done {
            let ms = limit.start.elapsed().as_millis();
            println!("{state:?} atr={} events={now} after {ms} ms", Hex(states[0].atr()));
            return Ok(());
        }
        states[0].sync_current_state();
    }
}

fn status(args: &[&str]) -> Result<()> {
    let reader = match args {
        [] => 0,
        [reader] => number(reader)?,
        _ => return Err(Failure::Usage("status [READER]".into())),
    };
    let pcsc = Pcsc::establish()?;
    let name = pcsc.reader(reader)?;
    let mut states = [ReaderState::new(name.clone(), State::UNAWARE)];
    pcsc.change(&mut states, &Limit::new(5))?;
    println!("reader={}", name.to_string_lossy());
    println!("state={:?} events={}", states[0].event_state(), states[0].event_count());
    println!("atr={}", Hex(states[0].atr()));
    if states[0].event_state().contains(State::PRESENT) {
        let start = Instant::now();
        let card = pcsc.context.connect(&name, ShareMode::Shared, Protocols::ANY).since(start)?;
        let status = card.status2_owned().since(start)?;
        println!("protocol={:?} status={:?}", status.protocol2(), status.status());
    }
    Ok(())
}

fn transmit(args: &[&str]) -> Result<()> {
    let options = Options::parse(args)?;
    let mut card = options.connect()?;
    for word in &options.rest {
        let start = Instant::now();
        if word == "reset" {
            card.reconnect(ShareMode::Shared, options.protocols, Disposition::ResetCard).since(start)?;
            println!("reset");
            continue;
        }
        let apdu = unhex(word)?;
        let mut buffer = answer_buffer();
        let answer = card.transmit(&apdu, &mut buffer).since(start)?;
        println!("{} {:.3} ms", Hex(answer), start.elapsed().as_secs_f64() * 1e3);
    }
    Ok(())
}

fn repeat(args: &[&str]) -> Result<()> {
    let mut options = Options::parse(args)?;
    if options.rest.len() != 2 {
        return Err(Failure::Usage("repeat [-r READER] N HEX".into()));
    }
    let count: usize = number(&options.rest.remove(0))?;
    let apdu = options.apdus()?.remove(0);
    let card = options.connect()?;
    let begin = Instant::now();
    let mut first: Option<Vec<u8>> = None;
    let mut buffer = answer_buffer();
    for round in 0..count {
        let start = Instant::now();
        let answer = card.transmit(&apdu, &mut buffer).since(start)?;
        let expected = first.get_or_insert_with(|| answer.to_vec());
        if answer != expected {
            let expected = Hex(expected);
            return Err(Failure::Other(format!("answer {round} is {} and not {expected}", Hex(answer))));
        }
    }
    let answer = first.unwrap_or_default();
    println!("repeat n={count} total_ms={} answer={}", begin.elapsed().as_millis(), Hex(&answer));
    Ok(())
}

fn bench(args: &[&str]) -> Result<()> {
    let options = Options::parse(args)?;
    let card = options.connect()?;
    let mut buffer = answer_buffer();
    for apdu in options.apdus()? {
        let mut times = Vec::with_capacity(options.count);
        let mut length = 0;
        for round in 0..options.warmup + options.count {
            let start = Instant::now();
            length = card.transmit(&apdu, &mut buffer).since(start)?.len();
            if round >= options.warmup {
                times.push(start.elapsed().as_micros());
            }
        }
        times.sort_unstable();
        // The smallest time that the given share of all rounds does not exceed.
        let at = |percent: usize| times[(times.len() * percent).div_ceil(100).saturating_sub(1)];
        println!(
            "bench apdu={} n={} min={} median={} p90={} p99={} max={} mean={} unit=us answer={}",
            Hex(&apdu),
            times.len(),
            times[0],
            at(50),
            at(90),
            at(99),
            times[times.len() - 1],
            times.iter().sum::<u128>() / times.len() as u128,
            Hex(&buffer[..length]),
        );
    }
    Ok(())
}

fn lengths(args: &[&str]) -> Result<()> {
    let options = Options::parse(args)?;
    let mut lengths = Vec::new();
    for word in &options.rest {
        let (from, to) = word.split_once('-').unwrap_or((word, word));
        lengths.extend(number::<usize>(from)?..=number(to)?);
    }
    let card = options.connect()?;
    let begin = Instant::now();
    let mut longest = Duration::ZERO;
    for &length in &lengths {
        let data = length.checked_sub(2).and_then(|data| u16::try_from(data).ok());
        let data = data.ok_or_else(|| Failure::Usage(format!("no answer has {length} bytes")))?;
        let [p1, p2] = data.to_be_bytes();
        let start = Instant::now();
        let command = [0x00, ins::LENGTH, p1, p2, 0x00, 0x00, 0x00];
        expect(&card, &command, &pattern(data.into()), &format!("answer of {length} bytes"))?;
        longest = longest.max(start.elapsed());
    }
    let (total, longest) = (begin.elapsed().as_millis(), longest.as_micros());
    println!("lengths n={} total_ms={total} longest_us={longest}", lengths.len());
    Ok(())
}

fn extended(args: &[&str]) -> Result<()> {
    const MOST: u16 = u16::MAX;
    let card = Options::parse(args)?.connect()?;
    let data = pattern(MOST.into());
    let [high, low] = MOST.to_be_bytes();
    let with_data = |ins: u8, le: &[u8]| [&[0x00, ins, 0, 0, 0x00, high, low], &data[..], le].concat();
    let answer = pattern(usize::from(MOST) + 1);
    for (what, command, expected) in [
        ("command", with_data(ins::CHECK, &[]), u32::from(MOST).to_be_bytes().to_vec()),
        ("answer", vec![0x00, ins::LE, 0, 0, 0x00, 0x00, 0x00], answer.clone()),
        ("both", with_data(ins::LE, &[0x00, 0x00]), answer),
    ] {
        let start = Instant::now();
        expect(&card, &command, &expected, what)?;
        let (sent, received, ms) = (command.len(), expected.len() + 2, start.elapsed().as_millis());
        println!("{what} sent={sent} received={received} ms={ms}");
    }
    Ok(())
}

/// Sends a command whose answer has to be this data and 9000.
fn expect(card: &Card, command: &[u8], data: &[u8], what: &str) -> Result<()> {
    let mut buffer = answer_buffer();
    let start = Instant::now();
    let answer = match card.transmit(command, &mut buffer) {
        Ok(answer) => answer,
        Err(error) => {
            println!("{what}:");
            return Err(error).since(start);
        }
    };
    if *answer == [data, &[0x90, 0x00]].concat() {
        return Ok(());
    }
    let tail = Hex(&answer[answer.len().saturating_sub(8)..]);
    Err(Failure::Other(format!("{what}: {} bytes that end in {tail}", answer.len())))
}

fn reset(args: &[&str]) -> Result<()> {
    let options = Options::parse(args)?;
    let mut card = options.connect()?;
    let start = Instant::now();
    card.reconnect(ShareMode::Shared, options.protocols, Disposition::ResetCard).since(start)?;
    let ms = start.elapsed().as_millis();
    let status = card.status2_owned().since(start)?;
    println!("reset atr={} protocol={:?} after {ms} ms", Hex(status.atr()), status.protocol2());
    Ok(())
}

fn events(args: &[&str]) -> Result<()> {
    let [seconds] = args else { return Err(Failure::Usage("events SECONDS".into())) };
    let limit = Limit::new(number(seconds)?);
    let pcsc = Pcsc::establish()?;
    let mut states = vec![ReaderState::new(PNP_NOTIFICATION(), State::UNAWARE)];
    loop {
        let readers = pcsc.readers()?;
        for state in &states[1..] {
            if !readers.iter().any(|name| name.as_c_str() == state.name()) {
                println!("{} reader-removed {}", now(), state.name().to_string_lossy());
            }
        }
        states.retain(|state| {
            state.name() == PNP_NOTIFICATION() || readers.iter().any(|name| **name == *state.name())
        });
        for name in readers {
            if !states.iter().any(|state| state.name() == name.as_c_str()) {
                println!("{} reader-added {}", now(), name.to_string_lossy());
                states.push(ReaderState::new(name, State::UNAWARE));
            }
        }
        match pcsc.change(&mut states, &limit) {
            Ok(()) => {}
            Err(Failure::Pcsc(Error::Timeout, _)) => return Ok(()),
            Err(error) => return Err(error),
        }
        for (index, state) in states.iter().enumerate().skip(1) {
            if state.event_state().contains(State::CHANGED) {
                let (count, atr) = (state.event_count(), Hex(state.atr()));
                println!("{} card {} {:?} events={count} atr={atr}", now(), index - 1, state.event_state());
            }
        }
        for state in &mut states {
            state.sync_current_state();
        }
    }
}

// What they share

struct Pcsc {
    context: Context,
}

impl Pcsc {
    fn establish() -> Result<Self> {
        Ok(Self { context: Context::establish(Scope::System).since(Instant::now())? })
    }

    fn readers(&self) -> Result<Vec<CString>> {
        let start = Instant::now();
        loop {
            // Length and names are two calls; another reader may come between them.
            match self.context.list_readers_owned() {
                Err(Error::InsufficientBuffer) => {}
                readers => return readers.since(start),
            }
        }
    }

    fn reader(&self, index: usize) -> Result<CString> {
        let mut readers = self.readers()?;
        if index >= readers.len() {
            return Err(Failure::Other(format!("NoReader {index}: there are {}", readers.len())));
        }
        Ok(readers.swap_remove(index))
    }

    /// Waits for a change. When only the time of one look is over it returns as after a change: pcscd counts
    /// readers from when it gets the question, so one that came just before it would never be told of.
    fn change(&self, states: &mut [ReaderState], limit: &Limit) -> Result<()> {
        const ONE_LOOK: Duration = Duration::from_secs(1);
        let left = limit.left().ok_or(Failure::Pcsc(Error::Timeout, limit.start))?;
        match self.context.get_status_change(left.min(ONE_LOOK), states) {
            Ok(()) | Err(Error::Timeout) => Ok(()),
            Err(error) => Err(Failure::Pcsc(error, limit.start)),
        }
    }
}

struct Limit {
    start: Instant,
    length: Duration,
}

impl Limit {
    fn new(seconds: u64) -> Self {
        Self { start: Instant::now(), length: Duration::from_secs(seconds) }
    }

    fn left(&self) -> Option<Duration> {
        self.length.checked_sub(self.start.elapsed())
    }
}

struct Options {
    reader: usize,
    count: usize,
    warmup: usize,
    protocols: Protocols,
    rest: Vec<String>,
}

impl Options {
    fn parse(args: &[&str]) -> Result<Self> {
        let mut options =
            Self { reader: 0, count: 100, warmup: 5, protocols: Protocols::ANY, rest: Vec::new() };
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            let mut value = || args.next().ok_or_else(|| Failure::Usage(format!("{arg} needs a value")));
            match *arg {
                "-r" => options.reader = number(value()?)?,
                "-n" => options.count = number::<usize>(value()?)?.max(1),
                "-w" => options.warmup = number(value()?)?,
                "-t0" => options.protocols = Protocols::T0,
                "-t1" => options.protocols = Protocols::T1,
                "any" => options.protocols = Protocols::ANY,
                word => options.rest.push(word.to_owned()),
            }
        }
        Ok(options)
    }

    fn connect(&self) -> Result<Card> {
        let pcsc = Pcsc::establish()?;
        let name = pcsc.reader(self.reader)?;
        let start = Instant::now();
        pcsc.context.connect(&name, ShareMode::Shared, self.protocols).since(start)
    }

    fn apdus(&self) -> Result<Vec<Vec<u8>>> {
        self.rest.iter().map(|word| unhex(word)).collect()
    }
}

/// Room for an extended answer with its status word.
fn answer_buffer() -> Vec<u8> {
    vec![0; 65_536 + 2]
}

fn print_readers(readers: &[CString]) {
    for (index, name) in readers.iter().map(CString::as_c_str).map(CStr::to_string_lossy).enumerate() {
        println!("{index}: {name}");
    }
}

fn now() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("{}.{:03}", now.as_secs(), now.subsec_millis())
}

fn number<T: std::str::FromStr>(text: &str) -> Result<T> {
    text.parse().map_err(|_| Failure::Usage(format!("{text} is not a number")))
}

fn unhex(text: &str) -> Result<Vec<u8>> {
    let digits: Option<Vec<u32>> =
        text.chars().filter(|digit| *digit != ':').map(|digit| digit.to_digit(16)).collect();
    match digits {
        Some(digits) if digits.len() % 2 == 0 => {
            Ok(digits.chunks(2).map(|pair| (pair[0] << 4 | pair[1]) as u8).collect())
        }
        _ => Err(Failure::Usage(format!("{text} is not hexadecimal"))),
    }
}

struct Hex<'a>(&'a [u8]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02X}"))
    }
}
