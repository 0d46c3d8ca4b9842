//! What further cards in one process take. [`grow`] is another process of this program, which has nothing but cards.

use std::fmt;
use std::process::Command;
use std::str::FromStr;

use anyhow::{Context, Result, bail, ensure};
use emulated_card::setup::{CardSetup, Keys, OpenCard, Wanted};
use emulated_card::state::StateDirectory;
use stack_tests::database::{Database, NAMES, PIN};
use vscard_protocol::{Card, Command as Apdu};

use crate::core::SELECT_PIV;
use crate::directory::{CardDirectory, sources};
use crate::turns::at_most;

/// NSS has no more slots.
const DATABASES: usize = 96;
const PEM_CARDS: usize = 1_001;

/// KiB for each.
const MOST_NSS: f64 = 400.0;
const MOST_PEM: f64 = 64.0;

/// What the cards' keys are in.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Nss,
    Pem,
}

impl FromStr for Kind {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        Ok(match text {
            "nss" => Self::Nss,
            "pem" => Self::Pem,
            _ => bail!("no kind of card: {text}"),
        })
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if *self == Self::Nss { "nss" } else { "pem" })
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
    let (nss, refused) = grown(Kind::Nss, &database.spec(), directory)?;
    let (pem, _) = grown(Kind::Pem, &directory.path().display().to_string(), directory)?;
    for (what, Grown { one, all, used }) in [("96 cards, NSS", &nss), ("1 001 cards, PEM", &pem)] {
        println!("{what:<60}{one:>10}{all:>10}{used:>10}");
    }
    println!("(used: powered, PIN verified, applet selected)\n");
    let each = |grown: &Grown, end: f64, count: usize| (end - grown.one) / (count - 1) as f64;
    at_most("KiB for each further NSS card", each(&nss, nss.all, DATABASES), MOST_NSS);
    at_most("KiB for each further NSS card, used", each(&nss, nss.used, DATABASES), MOST_NSS);
    at_most("KiB for each further PEM card", each(&pem, pem.all, PEM_CARDS), MOST_PEM);
    at_most("KiB for each further PEM card, used", each(&pem, pem.used, PEM_CARDS), MOST_PEM);
    println!("the 97th NSS card: {}\n", refused.context("NSS took a 97th database")?);
    Ok(())
}

/// The figures of a process of its own, and what it says of one card too many.
fn grown(kind: Kind, keys: &str, directory: &CardDirectory) -> Result<(Grown, Option<String>)> {
    let output = Command::new(std::env::current_exe()?)
        .args(["memory", &kind.to_string(), keys])
        .arg(directory.scratch(&format!("memory-{kind}")))
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
pub(crate) fn grow(kind: Kind, keys: &str, state: &str) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    let open = |number: usize| -> Result<OpenCard> {
        let mut setup = CardSetup { card_name: number.to_string(), ..CardSetup::default() };
        setup.state = Some((StateDirectory::at(state), "cards".into()));
        if kind == Kind::Nss {
            setup.keys = Keys::Database(keys.to_owned());
            setup.certificates = NAMES.map(|name| Wanted { slot: None, name: name.to_owned() }).into();
        } else {
            // A thousand PINs of their own would take minutes to make.
            setup.no_pin = true;
            setup.keys = Keys::Files(sources(keys.as_ref()));
        }
        Ok(setup.open()?)
    };
    let count = if kind == Kind::Nss { DATABASES } else { PEM_CARDS };
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
