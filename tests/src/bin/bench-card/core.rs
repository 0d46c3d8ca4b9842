//! The card's core, in this process: keys and commands.

use std::cell::RefCell;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use emulated_card::card::{CardOptions, EmulatedCard, Profile, Step};
use emulated_card::keys::nss::NssDatabase;
use emulated_card::keys::pem::PemStore;
use emulated_card::keys::{KeyStore, Unlocked};
use emulated_card::pin::ReferenceData;
use emulated_card::slot;
use emulated_card::state::CardId;
use stack_tests::database::{Database, NAMES, PIN};
use vscard_protocol::{Command as Apdu, Response, Secret};

use crate::directory::{CardDirectory, sources};
use crate::peer::{Peer, Programs};
use crate::turns::{MEDIAN, Runner, Unit, at_least, computed, interleave, table, timed, timed_each};

/// Signatures of a turn: about a tenth of a second each.
const SIGNATURES: u32 = 100;
/// libcacard needs 30 ms for each.
const SLOW_SIGNATURES: u32 = 4;
/// As many as take half a second; OpenSSL's own turn is one second, the least it can be told.
const PEM_SIGNATURES: u32 = 2_000;
const SELECTS: u32 = 100_000;

/// SELECT of the first PKI container.
pub(crate) const SELECT_PKI: [u8; 12] =
    [0x00, 0xA4, 0x04, 0x00, 0x07, 0xA0, 0x00, 0x00, 0x00, 0x79, 0x01, 0x00];
/// SELECT of PIV (SP 800-73-4 Part 2 §3.1.1).
pub(crate) const SELECT_PIV: [u8; 17] =
    [0x00, 0xA4, 0x04, 0x00, 0x0B, 0xA0, 0x00, 0x00, 0x03, 0x08, 0x00, 0x00, 0x10, 0x00, 0x01, 0x00, 0x00];

/// Signatures and SELECTs, beside libcacard and NSS on the same database, and beside OpenSSL.
pub(crate) fn measure(
    programs: &Programs,
    database: &Database,
    directory: &CardDirectory,
    rounds: u32,
) -> Result<()> {
    let libcacard = RefCell::new(Peer::start(programs, "libcacard", database, &NAMES)?);
    let nss = RefCell::new(Peer::start(programs, "nss", database, &NAMES[..1])?);
    let one = RefCell::new(cac(database, "one")?);
    let two = RefCell::new(cac(database, "two")?);
    let mut signing = [
        Runner::new("libcacard", SLOW_SIGNATURES, |count| libcacard.borrow_mut().run("sign", count)),
        Runner::new("NSS, key copied to the session", SIGNATURES, |count| {
            nss.borrow_mut().run("sign", count)
        }),
        Runner::new("our card", SIGNATURES, |count| computed(|| sign_cac(&mut one.borrow_mut(), count))),
        Runner::new("NSS, two threads (for each; of the clock)", SIGNATURES, |count| {
            nss.borrow_mut().run("sign2", count)
        }),
        Runner::new("our cards, two on two threads (for each; of the clock)", SIGNATURES, |count| {
            let (mut one, mut two) = (one.borrow_mut(), two.borrow_mut());
            let (one, two) = (&mut *one, &mut *two);
            timed(|| {
                std::thread::scope(|scope| {
                    let beside = scope.spawn(|| sign_cac(one, count));
                    sign_cac(two, count)?;
                    beside.join().unwrap_or_else(|_| bail!("a thread of the benchmark panicked"))
                })
            })
        }),
    ];
    interleave(&mut signing, 2 * rounds)?;
    table("RSA-2048 signatures a second of a processor, NSS database", Unit::Rate, &signing);
    let [theirs, raw, ours, raw2, ours2] = &signing;
    at_least("our card / libcacard", ours.speedup(theirs), 15.0);
    at_least("our card / NSS", ours.speedup(raw), 0.9);
    at_least("scaling to two threads / that of NSS", ours2.speedup(ours) / raw2.speedup(raw), 0.9);
    println!();
    drop(signing);

    let mut piv = piv(directory)?;
    let mut signing = [
        Runner::new("openssl speed rsa2048", 1, |_| openssl_speed()),
        Runner::new("our card", PEM_SIGNATURES, |count| computed(|| sign_piv(&mut piv, count))),
    ];
    interleave(&mut signing, rounds)?;
    table("RSA-2048 signatures a second of a processor, PEM files", Unit::Rate, &signing);
    let [theirs, ours] = &signing;
    at_least("our card / openssl speed", ours.speedup(theirs), 0.85);
    println!();
    drop(signing);

    // With Le, or there is no control information to make.
    let command = Apdu::parse(&[&SELECT_PKI[..], &[0x00]].concat())?;
    let mut selecting = [
        Runner::new("libcacard", SELECTS, |count| libcacard.borrow_mut().run("select", count)),
        Runner::new("our card", SELECTS, |count| {
            let mut card = one.borrow_mut();
            computed(|| {
                for _ in 0..count {
                    let status = transmit(&mut card, &command).status();
                    ensure!(status.0 == 0x9000, "SELECT is answered {status:?}");
                }
                Ok(())
            })
        }),
    ];
    interleave(&mut selecting, rounds)?;
    table("SELECTs a second of a processor, at the card's core", Unit::Rate, &selecting);
    let [theirs, ours] = &selecting;
    at_least("our card / libcacard", ours.speedup(theirs), 1.0);
    println!();
    Ok(())
}

/// A CAC whose PIN is verified.
fn cac(database: &Database, name: &str) -> Result<EmulatedCard> {
    let store = NssDatabase::open(&database.spec(), &NAMES.map(str::to_owned))?;
    card(Arc::new(store), name, Profile::Cac, ReferenceData::in_memory(3), 0x00, &SELECT_PKI)
}

/// A PIV card whose PIN is verified.
fn piv(directory: &CardDirectory) -> Result<EmulatedCard> {
    let store = PemStore::open(&sources(&directory.path()), None)?;
    let reference = ReferenceData::in_memory_own(&Secret::from(PIN.as_bytes()), None, 3)?;
    card(Arc::new(store), "", Profile::Dual, reference, 0x80, &SELECT_PIV)
}

fn card(
    store: Arc<dyn KeyStore>,
    name: &str,
    profile: Profile,
    reference: ReferenceData,
    pin_reference: u8,
    select: &[u8],
) -> Result<EmulatedCard> {
    let id = CardId::derive(store.certificates(), name);
    let options = CardOptions { profile, slots: slot::assign(store.certificates(), &[])? };
    let random = Box::new(|challenge: &mut [u8]| challenge.fill(0));
    let mut card = EmulatedCard::new(store, Arc::new(reference), id, options, random)?;
    let pin: Vec<u8> = PIN.bytes().chain(std::iter::repeat(0xFF)).take(8).collect();
    transmit(&mut card, &Apdu::parse(select)?);
    let said = transmit(&mut card, &Apdu::build([0x00, 0x20, 0x00, pin_reference], &pin, None)?).status();
    ensure!(said.0 == 0x9000, "VERIFY is answered {said:?}");
    Ok(card)
}

fn transmit(card: &mut EmulatedCard, command: &Apdu) -> Response {
    match card.command(command) {
        Step::Answer(response) => response,
        Step::Work(job) => card.finish(job.run()),
    }
}

/// PKCS#1 type 1 padding around nothing much.
fn block() -> [u8; 256] {
    let mut block = [0xFF; 256];
    (block[0], block[1], block[220]) = (0, 1, 0);
    block[221..].fill(0x5A);
    block
}

/// As many signatures, each in the commands it takes.
fn sign(card: &mut EmulatedCard, commands: &[Apdu], count: u32) -> Result<()> {
    for _ in 0..count {
        for command in commands {
            let status = transmit(card, command).status();
            ensure!(status.0 == 0x9000, "{command:?} is answered {status:?}");
        }
    }
    Ok(())
}

fn sign_cac(card: &mut EmulatedCard, count: u32) -> Result<()> {
    let block = block();
    let first = Apdu::build([0x00, 0x42, 0x80, 0x00], &block[..240], None)?;
    let last = Apdu::build([0x00, 0x42, 0x00, 0x00], &block[240..], Some(256))?;
    sign(card, &[first, last], count)
}

/// With the authentication key, in the chain that a client without extended length sends (SP 800-73-4 Part 2
/// §3.2.4).
fn sign_piv(card: &mut EmulatedCard, count: u32) -> Result<()> {
    let template = [&[0x7C, 0x82, 0x01, 0x06, 0x82, 0x00, 0x81, 0x82, 0x01, 0x00], &block()[..]].concat();
    let first = Apdu::build([0x10, 0x87, 0x07, 0x9A], &template[..255], None)?;
    let last = Apdu::build([0x00, 0x87, 0x07, 0x9A], &template[255..], Some(512))?;
    sign(card, &[first, last], count)
}

/// For how long one signature is OpenSSL's business, in processor time, which is what it tells.
fn openssl_speed() -> Result<Duration> {
    let said = Command::new("openssl")
        .args(["speed", "-mr", "-seconds", "1", "rsa2048"])
        .output()
        .context("openssl")?;
    let text = [said.stdout, said.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    // Signatures, bits, seconds.
    let line =
        text.lines().find_map(|line| line.strip_prefix("+R1:")).context("openssl speed said nothing")?;
    let fields: Vec<&str> = line.split(':').collect();
    let [count, _, seconds] = fields[..] else { bail!("openssl speed said {line:?}") };
    Ok(Duration::from_secs_f64(seconds.parse::<f64>()? / count.parse::<f64>()?))
}

/// The authentication key of a card's directory alone: one private-key operation after the other.
pub(crate) struct RawKey {
    login: Box<dyn Unlocked>,
}

impl RawKey {
    pub(crate) fn open(directory: &CardDirectory) -> Result<Self> {
        let store = PemStore::open(&sources(&directory.path()), None)?;
        Ok(Self { login: store.unlock(&Secret::default())? })
    }

    pub(crate) fn run(&self, count: u32) -> Result<Duration> {
        let block = block();
        timed_each(count, MEDIAN, || Ok(self.login.rsa_raw(0, &block).map(drop)?))
    }
}
