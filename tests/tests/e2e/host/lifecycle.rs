//! Resets, restarts and several cards.

use anyhow::{Context, Result, ensure};
use stack_tests::database::{NAMES, PIN};
use stack_tests::pcscd::Pcscd;
use stack_tests::{acknowledged_at_once, selects};

use super::{Algorithm, Applet, Bench, MESSAGE, OWN_PIN, Suite, card, module};

const CAC: Suite = Suite { applet: Applet::Cac, algorithm: Algorithm::Rsa };
const PIV: Suite = Suite { applet: Applet::Piv, algorithm: Algorithm::Rsa };

/// The statuses of answers that guest-pcsc printed.
fn statuses(said: &str) -> Vec<&str> {
    said.lines().filter_map(|line| line.split(' ').next()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_forgets_the_pin() -> Result<()> {
    let pin: String = PIN.bytes().map(|digit| format!("{digit:02X}")).collect();
    for (suite, reference) in [(CAC, "00"), (PIV, "80")] {
        let bench = Bench::start(suite).await?;
        let status = format!("002000{reference}");
        let verify = format!("{status}08{pin}FFFF");
        let said =
            bench.pcscd.ok(&format!("guest-pcsc transmit {status} {verify} {status} reset {status}")).await?;
        ensure!(statuses(&said) == ["63C3", "9000", "9000", "reset", "63C3"], "{suite:?}: {said}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_card_comes_back_to_a_restarted_pcscd() -> Result<()> {
    let bench = Bench::start(CAC).await?;
    for _ in 0..2 {
        let mark = bench.card.mark();
        bench.pcscd.stop_daemon().await?;
        bench.card.line_after(mark, "vpcd closed the connection").await?;
        bench.pcscd.start_daemon().await?;
        bench.pcscd.card_in(0).await?;
        bench
            .pkcs11(&format!("--sign -m SHA256-RSA-PKCS --id {} -i message -o signature", CAC.ids()[0]))
            .await?;
        let signature = std::fs::read(bench.pcscd.path("signature"))?;
        ensure!(bench.database.verifies(NAMES[0], MESSAGE, &signature)?);
    }
    Ok(())
}

/// vpcd takes a command of one byte for one of its own and waits for ever, and pcscd with it.
#[tokio::test(flavor = "multi_thread")]
async fn a_command_of_one_byte_does_not_stop_the_reader() -> Result<()> {
    let bench = Bench::start(CAC).await?;
    let mark = bench.card.mark();
    bench.pcscd.words("guest-pcsc transmit 00").await?;
    bench.card.line_after(mark, "a command of one byte").await?;
    bench.card.line_after(mark, "card put in").await?;
    bench.pcscd.card_in(0).await?;
    let said = bench.pcscd.ok("guest-pcsc transmit 00200000").await?;
    ensure!(statuses(&said) == ["63C3"], "{said}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn two_cards_in_two_readers() -> Result<()> {
    two_cards(CAC).await?;
    two_cards(PIV).await
}

async fn two_cards(suite: Suite) -> Result<()> {
    let mut bench = Bench::start(suite).await?;
    let second =
        card(&bench.pcscd, suite, &bench.database, &["--card-name", "second", "vpcd:localhost,slot=1"])?;
    bench.pcscd.card_in(1).await?;
    let said = bench.pcscd.ok(&format!("p11tool --provider {} --list-token-urls", module()?)).await?;
    let mut uris: Vec<&str> = said.lines().filter(|line| line.contains("serial=")).collect();
    uris.sort_unstable();
    uris.dedup();
    ensure!(uris.len() == 2, "{said}");
    let said = bench.pkcs11("-L").await?;
    ensure!(said.matches("serial num").count() == 2, "{said}");
    for reader in [0, 1] {
        let id = suite.ids()[0];
        let sign =
            format!("--slot-index {reader} --sign -m SHA256-RSA-PKCS --id {id} -i message -o signature");
        bench.pkcs11(&sign).await?;
        let signature = std::fs::read(bench.pcscd.path("signature"))?;
        ensure!(bench.database.verifies(NAMES[0], MESSAGE, &signature)?);
    }
    // One leaves, the other stays.
    ensure!(bench.card.terminate().await?.success(), "{}", bench.card.log());
    bench.pcscd.ok("guest-pcsc wait-card absent 30 0").await?;
    bench.pcscd.card_in(1).await?;
    let log = second.log();
    // That NSS's third certificate has no key usage is said once, and where it matters.
    let advice = log.matches("\"encryption-cert\" (9d)").count() + log.matches("--cert SLOT=NAME").count();
    let warnings = if suite.applet == Applet::Piv { 1 } else { 0 };
    ensure!(advice == 2 * warnings && log.matches("WARN").count() == warnings, "{log}");
    Ok(())
}

/// vpcd takes one card for a slot, and lets a second one connect; a third one gets no answer.
#[tokio::test(flavor = "multi_thread")]
async fn a_card_for_a_taken_slot_says_so_and_is_the_next() -> Result<()> {
    let mut bench = Bench::start(PIV).await?;
    let another = |name| card(&bench.pcscd, PIV, &bench.database, &["--card-name", name, "vpcd:"]);
    let second = another("second")?;
    second.line("the slot is taken by another card").await?;
    let third = another("third")?;
    third.line("no answer yet").await?;
    let mark = second.mark();
    ensure!(bench.card.terminate().await?.success(), "{}", bench.card.log());
    second.line_after(mark, "card put in").await?;
    bench.pcscd.card_in(0).await?;
    third.line("the slot is taken by another card").await?;
    Ok(())
}

/// A container may have no `/etc/hosts`, and nobody to ask.
#[tokio::test(flavor = "multi_thread")]
async fn localhost_needs_no_resolver() -> Result<()> {
    let (pcscd, database) = (Pcscd::start().await?, PIV.database()?);
    for file in ["/etc/hosts", "/etc/nsswitch.conf"] {
        pcscd.ok(&format!("mount --bind /dev/null {file}")).await?;
    }
    let said = pcscd.words("getent hosts localhost").await?;
    ensure!(!said.status.success(), "something else resolves it: {}", said.text);
    let card = card(&pcscd, PIV, &database, &["vpcd:"])?;
    pcscd.card_in(0).await.with_context(|| card.log())
}

/// vpcd writes the length and the command apart.
#[tokio::test(flavor = "multi_thread")]
async fn vpcd_is_acknowledged_at_once() -> Result<()> {
    stack_tests::alone();
    let bench = Bench::start(CAC).await?;
    acknowledged_at_once(&bench.pcscd.ok(&selects()).await?)
}

/// PKCS#11's serial number, and the one of 16 bytes that pkcs15-tool shows: the GUID.
async fn serial_numbers(pcscd: &Pcscd) -> Result<(String, String)> {
    let after_colon = |said: &str, name: &str| {
        let line = said.lines().find(|line| line.trim_start().starts_with(name))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let slots = pcscd.ok(&format!("pkcs11-tool --module {} -L", module()?)).await?;
    let dump = pcscd.ok("pkcs15-tool --dump").await?;
    let token = after_colon(&slots, "serial num").with_context(|| slots.clone())?;
    Ok((token, after_colon(&dump, "Serial number").with_context(|| dump.clone())?))
}

/// Windows and macOS keep what they read of a card by its GUID, and users configure programs by PKCS#11's serial number.
#[tokio::test(flavor = "multi_thread")]
async fn a_renewed_certificate_changes_the_guid_and_leaves_the_token_s_serial_number() -> Result<()> {
    let pcscd = Pcscd::start().await?;
    std::fs::write(pcscd.path("pin"), OWN_PIN)?;
    let issue = "openssl req -x509 -key id.key -days 30 -subj /CN=Jane -out id.pem -set_serial";
    for line in ["openssl genrsa -out id.key 2048", &format!("{issue} 1"), "chmod 600 id.key pin"] {
        pcscd.ok(line).await?;
    }
    let start = async || {
        let args = ["--pem", "id.pem,id.key", "--pin-file", "pin", "vpcd:"];
        let mut card = pcscd.start_program("vscclient", args)?;
        pcscd.card_in(0).await.with_context(|| card.log())?;
        let numbers = serial_numbers(&pcscd).await?;
        ensure!(card.terminate().await?.success(), "{}", card.log());
        pcscd.ok("guest-pcsc wait-card absent 30 0").await?;
        anyhow::Ok(numbers)
    };
    let before = start().await?;
    ensure!(start().await? == before);
    pcscd.ok(&format!("{issue} 2")).await?;
    let after = start().await?;
    ensure!(after.0 == before.0, "PKCS#11: {before:?} {after:?}");
    ensure!(after.1[..16] != before.1[..16] && after.1[16..] == before.1[16..], "{before:?} {after:?}");
    Ok(())
}
