//! APDUs of every length through our reader in the guest, with and without CCID chaining.

use anyhow::{Result, ensure};
use ccid_device::{DeviceConfig, Speed};
use stack_tests::echo::EchoStack;

/// CCID's header.
const HEADER: usize = 10;

/// Reader of this dwMaxCCIDMessageLength; its serial number tells it.
fn reader(max_message: u32, speed: Speed) -> DeviceConfig {
    DeviceConfig { max_message, speed, ..DeviceConfig::new(format!("{speed:?}{max_message}")) }
}

/// Every answer length from 2 to 600, then those that make messages, or their data, of whole packets, and
/// one byte less and more.
fn lengths(limit: usize) -> String {
    let mut lengths: Vec<usize> = Vec::new();
    for multiple in (576..=2048).step_by(64).chain((2560..=limit).step_by(512)) {
        for around in multiple - 1..=multiple + 1 {
            lengths.extend([around - HEADER, around]);
        }
    }
    lengths.retain(|length| (601..=65_537).contains(length));
    let mut words = vec!["2-600".to_owned()];
    words.extend(lengths.iter().map(ToString::to_string));
    words.join(" ")
}

async fn all_lengths(stack: &EchoStack, limit: usize) -> Result<()> {
    for reader in 0..stack.cards.len() {
        let number = stack.number(reader).await?;
        let told = stack.guest.ok(&format!("guest-pcsc lengths -r {number} {}", lengths(limit))).await?;
        println!("reader {reader}: {}", told.trim());
        let told = stack.guest.ok(&format!("guest-pcsc extended -r {number}")).await?;
        println!("reader {reader}: {}", told.trim().replace('\n', ", "));
        for expected in [
            "command sent=65542 received=6 ",
            "answer sent=7 received=65538 ",
            "both sent=65544 received=65538 ",
        ] {
            ensure!(told.contains(expected), "{told}");
        }
    }
    Ok(())
}

/// Without chaining, with parts of whole packets, and with the smallest parts there are.
#[tokio::test(flavor = "multi_thread")]
async fn every_length_over_xhci() -> Result<()> {
    let readers = [65_554, 8192, 271].map(|max_message| reader(max_message, Speed::High));
    let stack = EchoStack::start(&["-device", "qemu-xhci"], readers.into()).await?;
    all_lengths(&stack, 66_048).await
}

/// The kernel splits what is longer than a packet, and QEMU hands each on by itself.
#[tokio::test(flavor = "multi_thread")]
async fn every_length_over_uhci() -> Result<()> {
    let readers = [(65_554, Speed::Full), (271, Speed::High)];
    let readers = readers.map(|(max_message, speed)| reader(max_message, speed));
    let stack = EchoStack::start(&["-usb"], readers.into()).await?;
    all_lengths(&stack, 4096).await
}
