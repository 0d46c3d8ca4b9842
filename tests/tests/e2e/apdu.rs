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

/// Every answer length from 2 to 600, then up to a limit those that make messages, or their data, of whole
/// packets or parts, and one byte less and more.
fn lengths(max_message: u32, limit: usize) -> String {
    let part = (max_message as usize - HEADER).min(limit);
    let multiples = (576..=2048).step_by(64).chain((2560..=limit).step_by(512));
    let parts = (part..=limit).step_by(part);
    let mut lengths: Vec<usize> = Vec::new();
    for around in multiples.chain(parts).flat_map(|multiple| multiple - 1..=multiple + 1) {
        lengths.extend([around - HEADER, around]);
    }
    lengths.retain(|length| (601..=limit.min(65_536) + 1).contains(length));
    let mut words = vec!["2-600".to_owned()];
    words.extend(lengths.iter().map(ToString::to_string));
    words.join(" ")
}

/// Readers that differ in dwMaxCCIDMessageLength, each with its longest of [`lengths`].
async fn all_lengths(controller: &[&str], readers: &[(u32, Speed, usize)]) -> Result<()> {
    let configs = readers.iter().map(|&(max_message, speed, _)| reader(max_message, speed)).collect();
    let stack = EchoStack::start(controller, configs).await?;
    for (index, &(max_message, speed, limit)) in readers.iter().enumerate() {
        let number = stack.number(index).await?;
        let lengths = lengths(max_message, limit);
        let told = stack.guest.ok(&format!("guest-pcsc lengths -r {number} {lengths}")).await?;
        println!("{max_message}, {speed:?}: {}", told.trim());
        let told = stack.guest.ok(&format!("guest-pcsc extended -r {number}")).await?;
        println!("{max_message}, {speed:?}: {}", told.trim().replace('\n', ", "));
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
    let readers = [(65_554, Speed::High, 66_048), (8192, Speed::High, 16_896), (271, Speed::High, 2048)];
    all_lengths(&["-device", "qemu-xhci"], &readers).await
}

/// The kernel splits what is longer than a packet, and QEMU hands each on by itself.
#[tokio::test(flavor = "multi_thread")]
async fn every_length_over_uhci() -> Result<()> {
    let readers = [(65_554, Speed::Full, 4096), (271, Speed::High, 1024)];
    all_lengths(&["-usb"], &readers).await
}
