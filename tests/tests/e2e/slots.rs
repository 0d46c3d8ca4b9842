//! Many slots and interfaces, each with a card of its own.

use std::collections::BTreeSet;
use std::ffi::OsStr;

use anyhow::{Context, Result, ensure};
use stack_tests::database::PIN;
use stack_tests::guest::Guest;
use stack_tests::hex;
use stack_tests::host::verify;
use stack_tests::process::Process;
use stack_tests::reader::{Bus, Stack, certificates};

/// What identifies a CAC: its card capability container.
async fn identity(guest: &Guest, reader: usize) -> Result<String> {
    let read = "00A4040007A000000116DB00 0052000002021700";
    guest.ok(&format!("guest-pcsc transmit -r {reader} {read}")).await
}

async fn readers_of(options: &str, count: usize) -> Result<Stack> {
    let stack = Stack::start(Bus::Xhci, options, |database, _| {
        let card = |n: usize| ["--card".to_owned(), certificates(database, &format!(",card-name=card-{n}"))];
        (0..count).flat_map(card).collect()
    })
    .await?;
    let guest = &stack.guest;
    let readers = guest.ok(&format!("guest-pcsc wait-reader 40 {count}")).await?;
    ensure!(readers.matches("Virtual Smartcard Reader").count() == count, "{readers}");
    let mut identities = BTreeSet::new();
    for reader in 0..count {
        guest.ok(&format!("guest-pcsc wait-card present 30 {reader}")).await?;
        let identity = identity(guest, reader).await?;
        ensure!(identity.to_lowercase().contains("9000"), "{identity}");
        identities.insert(identity);
    }
    ensure!(identities.len() == count, "{count} readers, {} cards", identities.len());
    Ok(stack)
}

/// Four guest processes at once, each on a reader of its own; a PIN verified on one holds for that one.
async fn four_at_once(stack: &Stack) -> Result<()> {
    let guest = &stack.guest;
    let repeat = stack_tests::scale(200, 2000);
    let command = |reader: usize| format!("guest-pcsc repeat -r {reader} {repeat} 00A4040007A0000000790100");
    let (commands, status) = ((0..4).map(command).collect::<Vec<_>>(), hex(&[0x00, 0x20, 0x00, 0x00]));
    let run = |n: usize| guest.ok(&commands[n]);
    let (one, two, three, four) = tokio::join!(run(0), run(1), run(2), run(3));
    for said in [one?, two?, three?, four?] {
        ensure!(said.contains(&format!("n={repeat}")), "{said}");
    }
    // While one card is verified (its program goes on), the others are not.
    let selects = " 00A4040007A0000000790100".repeat(2000);
    guest
        .ok(&format!("setsid guest-pcsc transmit -r 1 {}{selects} >/tmp/verified 2>&1 &", hex(&verify(PIN))))
        .await?;
    guest
        .ok("while ! head -n 1 /tmp/verified | grep -q 9000; do pidof guest-pcsc >/dev/null || exit 1; done")
        .await?;
    for reader in [0, 2, 3] {
        let said = guest.ok(&format!("guest-pcsc transmit -r {reader} {status}")).await?.to_uppercase();
        ensure!(said.contains("63C3"), "reader {reader}: {said}");
    }
    guest.ok("pidof guest-pcsc").await.context("the verified session had ended too early")?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn four_slots() -> Result<()> {
    four_at_once(&readers_of("slots=4,", 4).await?).await
}

#[tokio::test(flavor = "multi_thread")]
async fn sixteen_slots() -> Result<()> {
    four_at_once(&readers_of("slots=16,", 16).await?).await
}

#[tokio::test(flavor = "multi_thread")]
async fn seven_interfaces() -> Result<()> {
    four_at_once(&readers_of("interfaces=7,", 7).await?).await
}

async fn refused(arguments: &[&str], said: &str, reason: &str) -> Result<()> {
    let mut daemon = Process::start("ccid-device", arguments, &[("HOME", OsStr::new("/"))])?;
    let line = daemon.line(said).await?;
    ensure!(line.contains(reason), "{line}");
    ensure!(daemon.ended().await?.code() == Some(2), "{line}");
    Ok(())
}

/// pcsc-lite refuses the whole device if it has more, so nobody gets that far.
#[tokio::test(flavor = "multi_thread")]
async fn too_many_are_refused_at_the_start() -> Result<()> {
    for (reader, reason) in [
        ("usbredir,slots=17,unix-listen:/nowhere", "16"),
        ("usbredir,interfaces=8,unix-listen:/nowhere", "7"),
        ("usbredir,slots=0,unix-listen:/nowhere", "1"),
    ] {
        refused(&["--reader", reader], "ccid-device: --reader: reader 0: ", reason).await?;
    }
    let same = "usbip,serial=mine,tcp-listen:127.0.0.1:0";
    refused(&["--reader", same, "--reader", same], "ccid-device: --reader: reader 1: ", "serial=mine").await
}
