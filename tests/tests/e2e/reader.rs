//! Our own reader in the guest.

use anyhow::{Result, ensure};
use stack_tests::database::PIN;
use stack_tests::reader::{Bus, Stack, one_card};

use crate::card::{lock_and_unlock, use_the_card};

async fn everything_over(bus: Bus) -> Result<()> {
    let stack = Stack::start(bus, "", one_card).await?;
    let readers = stack.guest.ok("guest-pcsc readers").await?;
    ensure!(readers.contains("Virtual Smartcard Reader"), "{readers}");
    stack.guest.ok("guest-pcsc wait-card present 30").await?;
    use_the_card(&stack.guest, &stack.database, PIN).await?;
    lock_and_unlock(&stack.guest, 0x00, &stack.database, stack.state.path()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn over_xhci() -> Result<()> {
    everything_over(Bus::Xhci).await
}

#[tokio::test(flavor = "multi_thread")]
async fn over_uhci() -> Result<()> {
    everything_over(Bus::Uhci).await
}

#[tokio::test(flavor = "multi_thread")]
async fn over_usbip() -> Result<()> {
    everything_over(Bus::Usbip).await
}
