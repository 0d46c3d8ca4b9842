//! What a PIN costs: VERIFY of cards in this process, beside what the disk takes; and the whole of a `pkcs11-tool --sign`
//! through pcscd and vpcd.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use emulated_card::card::{CardOptions, EmulatedCard, Profile};
use emulated_card::keys::KeyStore;
use emulated_card::keys::nss::NssDatabase;
use emulated_card::pin::{DEFAULT_TRIES, ReferenceData};
use emulated_card::setup::{CardSetup, Keys, Wanted};
use emulated_card::shell::CardSlot;
use emulated_card::slot;
use emulated_card::state::{CardId, StateDirectory};
use stack_tests::database::{self, Database, PIN};
use stack_tests::pcscd::Pcscd;
use stack_tests::process::Process;
use tokio::runtime::Handle;
use vscard_protocol::{CardSource, Command as Apdu};

use crate::core::SELECT_PIV;
use crate::directory::{CardDirectory, NAMES, sources};
use crate::pcsc::opensc;
use crate::turns::{MEDIAN, Runner, Unit, at_most, interleave, of_share, table, timed};

/// Medians of fewer tell little of a disk.
const ROUNDS: u32 = 25;
/// Of each turn.
const VERIFIES: u32 = 5;
/// The same, where a hash is taken each time.
const FIRST_VERIFIES: u32 = 1;

/// Seconds that a VERIFY may take beside two fdatasync.
const MOST_PEM: f64 = 0.001;
const MOST_NSS: f64 = 0.003;
/// As many times as long as with PEM files a signature with `new-card --nss` takes at most.
const MOST_SIGN: f64 = 1.3;

/// The second slot's.
const SECOND: &str = "vpcd:127.0.0.1:35964";

pub(crate) fn measure(
    database: &Database,
    pem: &CardDirectory,
    nss: &CardDirectory,
    runtime: &Handle,
    rounds: u32,
) -> Result<()> {
    let rounds = rounds.max(ROUNDS);
    verify(database, pem, nss, runtime, rounds)?;
    sign(database, pem, nss, runtime, rounds)
}

fn verify(
    database: &Database,
    pem: &CardDirectory,
    nss: &CardDirectory,
    runtime: &Handle,
    rounds: u32,
) -> Result<()> {
    let floor = Floor::open(&pem.path().join("state"))?;
    let own = |directory| (StateDirectory::at(pem.scratch(directory)), directory.into());
    let cards = [
        ("VERIFY again, PEM files", opened(&setup_pem(&pem.path()))?),
        ("VERIFY again, new-card --nss (four keys)", opened(&setup_nss(&nss.path()))?),
        (
            "VERIFY again, a user's NSS database, PIN of its own",
            opened(&setup_own(database, &pem.scratch("pin"), own("own-state")))?,
        ),
        (
            "VERIFY again, a user's NSS database, whose password it is",
            password_card(database, &StateDirectory::at(pem.scratch("password-state")))?,
        ),
    ];
    let mut runners =
        vec![Runner::new("fdatasync of 4 KiB beside the state of the card", VERIFIES, |count| {
            of_share(count, MEDIAN, || timed(|| floor.run()))
        })];
    for (what, card) in &cards {
        let verify = move |count| of_share(count, MEDIAN, || runtime.block_on(verify_after_power_on(card)));
        runners.push(Runner::new(what, VERIFIES, verify));
    }
    // It knows no PIN: each time the process is told to forget it.
    let (_, card) = &cards[0];
    runners.push(Runner::new("VERIFY for the first time, PEM files", FIRST_VERIFIES, move |count| {
        of_share(count, MEDIAN, || {
            card.remove();
            runtime.block_on(verify_after_power_on(card))
        })
    }));
    interleave(&mut runners, rounds)?;
    table("the right PIN, after a power-on, ms", Unit::Millis, &runners);
    let [floor, pem, nss, ..] = &runners[..] else { return Ok(()) };
    let bound = |more| 2.0 * floor.time() + more;
    at_most("VERIFY again, PEM files / (2 fdatasync + 1 ms)", pem.time() / bound(MOST_PEM), 1.0);
    at_most("VERIFY again, new-card --nss / (2 fdatasync + 3 ms)", nss.time() / bound(MOST_NSS), 1.0);
    println!();
    Ok(())
}

/// Of a card just powered, how long the VERIFY takes.
async fn verify_after_power_on(card: &CardSlot) -> Result<Duration> {
    let mut card = card.power_on(card.insert()).await?;
    let status = card.transmit(&Apdu::parse(&SELECT_PIV)?).await?.status();
    ensure!(status.0 == 0x9000, "SELECT is answered {status:?}");
    let pin: Vec<u8> = PIN.bytes().chain(std::iter::repeat(0xFF)).take(8).collect();
    let verify = Apdu::build([0x00, 0x20, 0x00, 0x80], &pin, None)?;
    let start = Instant::now();
    let status = card.transmit(&verify).await?.status();
    let took = start.elapsed();
    ensure!(status.0 == 0x9000, "VERIFY is answered {status:?}");
    Ok(took)
}

/// As `vscclient card` opens it.
fn setup_pem(path: &Path) -> CardSetup {
    CardSetup { keys: Keys::Files(sources(path)), state: Some(state(path)), ..CardSetup::default() }
}

/// The same, of one that `new-card --nss` made.
fn setup_nss(path: &Path) -> CardSetup {
    CardSetup {
        keys: Keys::Database(path.join("nssdb").display().to_string()),
        certificates: wanted(&NAMES),
        password_file: Some(path.join("nssdb.password")),
        state: Some(state(path)),
        ..CardSetup::default()
    }
}

fn state(path: &Path) -> (StateDirectory, PathBuf) {
    (StateDirectory::at(path.join("state")), "card.toml".into())
}

/// A database as users have it, with 10 000 rounds of PBKDF2, under a PIN of the card's own.
fn setup_own(database: &Database, pin: &Path, state: (StateDirectory, PathBuf)) -> CardSetup {
    CardSetup {
        keys: Keys::Database(database.spec()),
        certificates: wanted(&database::NAMES),
        password_file: Some(pin.to_owned()),
        pin_file: Some(pin.to_owned()),
        state: Some(state),
        ..CardSetup::default()
    }
}

/// The same under its password.
fn password_card(database: &Database, state: &StateDirectory) -> Result<Arc<CardSlot>> {
    let store = NssDatabase::open(&database.spec(), &database::NAMES.map(str::to_owned))?;
    let reference = ReferenceData::of_database(state, store.path(), DEFAULT_TRIES);
    let id = CardId::derive(store.certificates(), "");
    let options = CardOptions { profile: Profile::Dual, slots: slot::assign(store.certificates(), &[])? };
    let random = Box::new(|challenge: &mut [u8]| challenge.fill(0));
    let card = EmulatedCard::new(Arc::new(store), Arc::new(reference), id, options, random)?;
    Ok(Arc::new(CardSlot::new(card)?))
}

fn opened(setup: &CardSetup) -> Result<Arc<CardSlot>> {
    setup.open()?.slot.context("it has no slot")
}

fn wanted(names: &[&str]) -> Vec<Wanted> {
    names.iter().map(|name| Wanted { slot: None, name: (*name).to_owned() }).collect()
}

/// What the disk needs for a VERIFY, at the least.
struct Floor(std::fs::File);

impl Floor {
    fn open(directory: &Path) -> Result<Self> {
        let path = directory.join("floor");
        std::fs::write(&path, [b'x'; 4096])?;
        let file = std::fs::File::options().write(true).open(&path)?;
        std::fs::remove_file(&path)?;
        file.sync_all()?;
        Ok(Self(file))
    }

    fn run(&self) -> Result<()> {
        self.0.write_all_at(&[b'y'; 4096], 0)?;
        Ok(self.0.sync_data()?)
    }
}

fn sign(
    database: &Database,
    pem: &CardDirectory,
    nss: &CardDirectory,
    runtime: &Handle,
    rounds: u32,
) -> Result<()> {
    let pcscd = runtime.block_on(Pcscd::start())?;
    let _inside = runtime.enter();
    let card = |directory: &CardDirectory| vec!["card".to_owned(), directory.path().display().to_string()];
    let own = || {
        let names = database::NAMES.iter().flat_map(|name| ["--cert".to_owned(), (*name).to_owned()]);
        ["--db".to_owned(), database.spec()].into_iter().chain(names).collect()
    };
    let start = |mut args: Vec<String>, place: &str, slot| -> Result<Process> {
        args.push(place.to_owned());
        let vscclient = pcscd.start_program("vscclient", args)?;
        runtime.block_on(pcscd.card_in(slot)).with_context(|| vscclient.log())?;
        Ok(vscclient)
    };
    let _pem = start(card(pem), "vpcd:", 0)?;
    let other = start(card(nss), SECOND, 1)?;
    let tool = Tool::new(&pcscd)?;
    let runner = |what, slot| {
        let tool = &tool;
        Runner::new(what, 1, move |_| timed(|| tool.sign(slot)))
    };
    let mut runners = [runner("PEM files", 0), runner("new-card --nss", 1)];
    interleave(&mut runners, rounds)?;
    table("pkcs11-tool --sign as a whole, through pcscd and vpcd, ms", Unit::Millis, &runners);
    let [pem, nss] = &runners;
    at_most("new-card --nss / PEM files", nss.time() / pem.time(), MOST_SIGN);
    println!();
    drop(other);
    runtime.block_on(pcscd.ok("guest-pcsc wait-card absent 30 1"))?;
    let _own = start(own(), SECOND, 1)?;
    let mut runners = [runner("PEM files", 0), runner("a user's NSS database, whose password is the PIN", 1)];
    interleave(&mut runners, rounds)?;
    table("the same", Unit::Millis, &runners);
    Ok(())
}

/// `pkcs11-tool` that sees one reader.
struct Tool<'a> {
    pcscd: &'a Pcscd,
    module: PathBuf,
    input: PathBuf,
    configurations: [PathBuf; 2],
}

impl<'a> Tool<'a> {
    fn new(pcscd: &'a Pcscd) -> Result<Self> {
        let input = pcscd.path("to-sign");
        std::fs::write(&input, "signed by a card")?;
        let configurations = [0, 1].map(|slot| pcscd.path(&format!("only-{slot}.conf")));
        for (slot, path) in configurations.iter().enumerate() {
            let other = 1 - slot;
            std::fs::write(
                path,
                format!("app default {{ ignored_readers = \"Virtual PCD 00 0{other}\"; }}\n"),
            )?;
        }
        Ok(Self { pcscd, module: opensc()?, input, configurations })
    }

    fn sign(&self, slot: usize) -> Result<()> {
        let mut command = self.pcscd.command("pkcs11-tool");
        command.arg("--module").arg(&self.module).args(["--login", "--pin", "env:BENCH_PIN", "--id", "01"]);
        command.args(["--sign", "--mechanism", "SHA256-RSA-PKCS", "--input-file"]).arg(&self.input);
        command.arg("--output-file").arg(self.pcscd.path("signature"));
        command.env("BENCH_PIN", PIN).env("OPENSC_CONF", &self.configurations[slot]);
        let output = command.as_std_mut().output().context("pkcs11-tool of the package opensc")?;
        ensure!(output.status.success(), "pkcs11-tool: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }
}
