//! Several cards on one database.

use std::ffi::OsStr;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use emulated_card::card::{CardOptions, EmulatedCard, Profile, Step};
use emulated_card::keys::KeyStore;
use emulated_card::keys::nss::NssDatabase;
use emulated_card::pin::{DEFAULT_TRIES, ReferenceData};
use emulated_card::slot::assign;
use emulated_card::state::{CardId, StateDirectory, StateError};
use stack_tests::database::{Database, NAMES, PIN};
use stack_tests::guest::{Boot, Guest};
use stack_tests::host::verify;
use stack_tests::passthru::{Link, Road, Stack, client};
use vscard_protocol::Command;

/// The serial number that OpenSC shows.
async fn serial(guest: &Guest) -> Result<String> {
    let dump = guest.ok("pkcs15-tool -D").await?;
    let line = dump.lines().find(|line| line.contains("Serial number")).context("no serial number")?;
    Ok(line.rsplit(':').next().unwrap_or_default().trim().to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn two_clients_on_one_database_in_two_guests() -> Result<()> {
    let one = Stack::start(Road::Unix, &[]).await?;

    // Without a name of its own the second is the same card, and refused.
    let link = Link::new(Road::Tcp)?;
    let mut same = client(&one.database, one.state.path(), &link, &[])?;
    same.line("--card-name").await?;
    ensure!(same.ended().await?.code() == Some(3), "{}", same.log());

    let guest = Guest::boot(Boot::with(link.qemu())).await?;
    let second = client(&one.database, one.state.path(), &link, &["--card-name", "second"])?;
    guest.start_pcscd().await?;
    guest.ok("guest-pcsc wait-reader 30").await?;
    guest.ok("guest-pcsc wait-card present 30").await?;

    let transmit = |command: &[u8]| {
        let hex: String = command.iter().map(|byte| format!("{byte:02X}")).collect();
        format!("guest-pcsc transmit {hex}")
    };
    let status = transmit(&[0x00, 0x20, 0x00, 0x00]);
    let says = |said: String, expected: &str| {
        ensure!(said.to_uppercase().contains(expected), "{said}");
        Ok(())
    };
    // Logged in on one, and on one only.
    says(one.guest.ok(&transmit(&verify(PIN))).await?, "9000")?;
    says(one.guest.ok(&status).await?, "9000")?;
    says(guest.ok(&status).await?, "63C3")?;
    let sign = [&[0x00, 0x42, 0x80, 0x00, 0xF0][..], &[0x01; 0xF0]].concat();
    let select = "00A4040007A0000000790100";
    says(one.guest.ok(&format!("{} {}", "guest-pcsc transmit", select)).await?, "61")?;
    let hex: String = sign.iter().map(|byte| format!("{byte:02X}")).collect();
    let last: String = [&[0x00, 0x42, 0x00, 0x00, 0x10][..], &[0x01; 0x10]]
        .concat()
        .iter()
        .map(|b| format!("{b:02X}"))
        .collect();
    says(one.guest.ok(&format!("guest-pcsc transmit {select} {hex} {last}")).await?, "6100")?;
    says(guest.ok(&format!("guest-pcsc transmit {select} {hex} {last}")).await?, "6982")?;
    // One counter for both.
    says(guest.ok(&transmit(&verify("000000"))).await?, "63C2")?;
    says(guest.ok(&status).await?, "63C2")?;
    says(one.guest.ok(&transmit(&verify("000000"))).await?, "63C1")?;
    says(guest.ok(&status).await?, "63C1")?;
    says(guest.ok(&transmit(&verify(PIN))).await?, "9000")?;
    says(one.guest.ok(&status).await?, "63C3")?;

    let serials = (serial(&one.guest).await?, serial(&guest).await?);
    ensure!(serials.0 != serials.1 && !serials.0.is_empty(), "{serials:?}");
    println!("serials {} and {}", serials.0, serials.1);
    drop(second);
    Ok(())
}

fn run(card: &mut EmulatedCard, command: &[u8]) -> Result<u16> {
    let response = match card.command(&Command::parse(command)?) {
        Step::Answer(response) => response,
        Step::Work(job) => card.finish(job.run()),
    };
    Ok(response.status().0)
}

#[test]
fn two_cards_in_one_process() -> Result<()> {
    let (database, state) = (Database::with_password()?, tempfile::tempdir()?);
    let directory = StateDirectory::at(state.path());
    let names = NAMES.map(str::to_owned);
    let make = |name: &str| -> Result<_> {
        let store = NssDatabase::open(&database.spec(), &names)?;
        let id = CardId::derive(store.certificates(), name);
        let claim = directory.claim(store.path(), &id)?;
        let reference = ReferenceData::of_database(&directory, store.path(), DEFAULT_TRIES);
        let random = Box::new(|bytes: &mut [u8]| bytes.fill(7));
        let options = CardOptions { profile: Profile::Cac, slots: assign(store.certificates(), &[])? };
        let card = EmulatedCard::new(Arc::new(store), Arc::new(reference), id.clone(), options, random)?;
        Ok((card, id, claim))
    };
    let (mut one, first, _claim) = make("one")?;
    let (mut two, second, _other) = make("two")?;
    ensure!(first != second);
    let again = make("one").err().context("the same card twice")?;
    ensure!(matches!(again.downcast_ref(), Some(StateError::InUse { .. })), "{again}");

    let status = [0x00, 0x20, 0x00, 0x00];
    ensure!(run(&mut one, &verify(PIN))? == 0x9000);
    ensure!((run(&mut one, &status)?, run(&mut two, &status)?) == (0x9000, 0x63C3));
    let select = [0x00, 0xA4, 0x04, 0x0C, 0x07, 0xA0, 0x00, 0x00, 0x00, 0x79, 0x01, 0x00];
    let block = [&[0x00, 0x42, 0x00, 0x00, 0x00, 0x01, 0x00][..], &[0x01; 256], &[0x00, 0x00]].concat();
    for (card, expected) in [(&mut one, 0x9000), (&mut two, 0x6982)] {
        ensure!(run(card, &select)? == 0x9000);
        ensure!(run(card, &block)? == expected);
    }
    ensure!(run(&mut two, &verify("000000"))? == 0x63C2);
    ensure!(run(&mut two, &verify(PIN))? == 0x9000);
    // The other's login is untouched by all of that.
    ensure!(run(&mut one, &block)? == 0x9000);
    ensure!(run(&mut one, &verify("000000"))? == 0x63C2);
    ensure!((run(&mut one, &block)?, run(&mut two, &select)?) == (0x6982, 0x9000));
    ensure!(run(&mut two, &block)? == 0x9000);
    Ok(())
}

/// A PIN of the card's own, over a database that needs none and over one whose password is too long to type.
#[tokio::test(flavor = "multi_thread")]
async fn a_pin_of_its_own() -> Result<()> {
    use std::os::unix::fs::PermissionsExt;

    use stack_tests::host::Host;
    use stack_tests::process::Process;

    let files = tempfile::tempdir()?;
    let file = |name: &str, content: &str| -> Result<String> {
        let path = files.path().join(name);
        std::fs::write(&path, content)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
        Ok(path.display().to_string())
    };
    let (pin, other, password) = (file("pin", "4711\n")?, file("other", "0815\n")?, file("password", PIN)?);
    for (database, password) in
        [(Database::without_password()?, None), (Database::with_password()?, Some(password.as_str()))]
    {
        let (host, state) = (Host::new()?, tempfile::tempdir()?);
        let (spec, endpoint) = (database.spec(), host.endpoint());
        let start = |more: &[&str]| {
            let mut args = vec!["--profile", "cac", "--db", &spec, "-c", "id-cert"];
            args.extend(password.iter().flat_map(|file| ["--password-file", file]));
            args.extend(more);
            args.push(&endpoint);
            Process::start("vscclient", args, &[("XDG_STATE_HOME", OsStr::new(state.path()))])
        };
        // Made once, kept as a hash, later ignored with a warning, and not needed any more.
        for (more, warned) in [(["--pin-file", &pin], false), (["--pin-file", &other], true)] {
            let mut client = start(&more)?;
            let mut peer = host.card().await?;
            ensure!(client.log().contains("--pin-file is ignored") == warned, "{}", client.log());
            ensure!(peer.transmit(&verify("0815")).await? == [0x63, 0xC2]);
            ensure!(peer.transmit(&verify(PIN)).await? == [0x63, 0xC1], "the database's password is no PIN");
            ensure!(peer.transmit(&verify("4711")).await? == [0x90, 0x00]);
            drop(peer);
            client.terminate().await?;
        }
        let client = start(&[])?;
        let mut peer = host.card().await?;
        ensure!(peer.transmit(&verify("4711")).await? == [0x90, 0x00], "{}", client.log());
    }

    let (database, host, state) = (Database::without_password()?, Host::new()?, tempfile::tempdir()?);
    let (spec, endpoint) = (database.spec(), host.endpoint());
    let client = Process::start(
        "vscclient",
        ["--profile", "cac", "--db", &spec, "-c", "id-cert", "--no-pin", &endpoint],
        &[("XDG_STATE_HOME", OsStr::new(state.path()))],
    )?;
    client.line("ANY PIN IS TAKEN FOR RIGHT").await?;
    let mut peer = host.card().await?;
    ensure!(peer.transmit(&verify("any")).await? == [0x90, 0x00]);
    Ok(())
}
