//! What further cards in one process take. [`grow`] is another process of this program, which has nothing but cards.

use std::process::Command;
use std::str::FromStr;

use anyhow::{Context, Result, bail, ensure};
use emulated_card::setup::{CardSetup, Keys, OpenCard, Wanted};
use stack_tests::database::{Database, NAMES, PIN};
use vscard_protocol::{Card, Command as Apdu};

use crate::core::SELECT_PIV;
use crate::directory::{CardDirectory, sources};
use crate::turns::at_most;

/// NSS has no more slots.
const DATABASES: usize = 96;
const PEM_CARDS: usize = 1_001;
/// To make and to verify a thousand PINs would take minutes.
const PIN_CARDS: usize = 65;

/// KiB for each.
const MOST_NSS: f64 = 400.0;
const MOST_PEM: f64 = 64.0;

/// What the cards' keys are in.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Nss,
    /// Any PIN is right.
    Pem,
    /// With a PIN of its own.
    PemWithPin,
}

impl Kind {
    /// Names and numbers of cards.
    const ALL: [(&str, Self, usize); 3] = [
        ("nss", Self::Nss, DATABASES),
        ("pem", Self::Pem, PEM_CARDS),
        ("pem-pin", Self::PemWithPin, PIN_CARDS),
    ];
}

impl FromStr for Kind {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|(name, ..)| *name == text);
        Ok(found.with_context(|| format!("no kind of card: {text}"))?.1)
    }
}

/// Resident KiB of a process.
struct Grown {
    one: f64,
    all: f64,
    used: f64,
}

pub(crate) fn measure(database: &Database, directory: &CardDirectory) -> Result<()> {
    println!("{:<60}{:>10}{:>10}{:>10}", "resident KiB of a process with cards", "one", "all", "all used");
    let pem = directory.path().display().to_string();
    let (nss, refused) = grown("nss", &database.spec(), directory)?;
    let (any, _) = grown("pem", &pem, directory)?;
    let (own, _) = grown("pem-pin", &pem, directory)?;
    let kinds = [
        ("NSS card", DATABASES, MOST_NSS, &nss),
        ("PEM card, any PIN right", PEM_CARDS, MOST_PEM, &any),
        ("PEM card, PIN of its own", PIN_CARDS, MOST_PEM, &own),
    ];
    for (what, count, _, Grown { one, all, used }) in kinds {
        println!("{:<60}{one:>10}{all:>10}{used:>10}", format!("{count} times {what}"));
    }
    println!("(used: powered, PIN verified, applet selected; one: used, too)\n");
    for (what, count, most, grown) in kinds {
        let each = |end: f64| (end - grown.one) / (count - 1) as f64;
        at_most(&format!("KiB for each further {what}"), each(grown.all), most);
        at_most(&format!("KiB for each further {what}, used"), each(grown.used), most);
    }
    println!("the 97th NSS card: {}\n", refused.context("NSS took a 97th database")?);
    Ok(())
}

/// The figures of a process of its own, and what it says of one card too many.
fn grown(kind: &str, keys: &str, directory: &CardDirectory) -> Result<(Grown, Option<String>)> {
    let output = Command::new(std::env::current_exe()?)
        .args(["memory", kind, keys])
        .arg(directory.scratch("pin"))
        .env("XDG_STATE_HOME", directory.scratch(&format!("memory-{kind}")))
        .output()?;
    let (said, wrong) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{kind}: {wrong}");
    let mut lines = said.lines();
    let figures = lines.next().context("it said nothing")?.split(' ').map(str::parse);
    let figures: Vec<f64> = figures.collect::<Result<_, _>>()?;
    let [one, all, used] = figures[..] else { bail!("it said {said}") };
    Ok((Grown { one, all, used }, lines.next().map(str::to_owned)))
}

/// Opens one card, then all that go into a process, and prints the resident KiB of both, and of all when they have
/// been used.
pub(crate) fn grow(kind: Kind, keys: &str, pin: &str) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    let open = |number: usize| -> Result<OpenCard> {
        let mut setup = CardSetup { card_name: number.to_string(), ..CardSetup::default() };
        if kind == Kind::Nss {
            setup.keys = Keys::Database(keys.to_owned());
            setup.certificates = NAMES.map(|name| Wanted { slot: None, name: name.to_owned() }).into();
        } else {
            setup.no_pin = kind == Kind::Pem;
            setup.pin_file = (kind == Kind::PemWithPin).then(|| pin.into());
            setup.keys = Keys::Files(sources(keys.as_ref()));
        }
        Ok(setup.open()?)
    };
    let count = Kind::ALL.into_iter().find(|(_, one, _)| *one == kind).context("no such kind")?.2;
    let mut cards = vec![open(0)?];
    let mut powered = vec![runtime.block_on(used(&cards[0]))?];
    let one = resident()?;
    for number in 1..count {
        cards.push(open(number)?);
    }
    let all = resident()?;
    for card in &cards[1..] {
        powered.push(runtime.block_on(used(card))?);
    }
    println!("{one} {all} {}", resident()?);
    if kind == Kind::Nss {
        if let Err(refused) = open(count) {
            println!("{refused}");
        }
    }
    Ok(())
}

/// Powers it and verifies its PIN.
async fn used(card: &OpenCard) -> Result<Box<dyn Card>> {
    let insertion = card.slot.as_ref().context("it has no slot")?.insert();
    let mut card = card.source.power_on(insertion).await?;
    let pin: Vec<u8> = PIN.bytes().chain(std::iter::repeat(0xFF)).take(8).collect();
    for command in [Apdu::parse(&SELECT_PIV)?, Apdu::build([0x00, 0x20, 0x00, 0x80], &pin, None)?] {
        let status = card.transmit(&command).await?.status();
        ensure!(status.0 == 0x9000, "{command:?} is answered {status:?}");
    }
    Ok(card)
}

fn resident() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}
