//! A card that takes its time, and guests that do not wait for it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ccid_device::DeviceConfig;
use stack_tests::echo::{EchoStack, Sessions};

/// The reader's serial number.
const SERIAL: &str = "slow";
/// `00 04 SECONDS`: answers after that long.
const TEN_SECONDS: &str = "00040A00";
/// An answer of no data, at once.
const QUICK: &str = "00010000";

const POWER_ON: &str = "out 62000000000001000000 answer 10";
/// XfrBlock with bSeq 2 of a command that takes three seconds.
const SLOW: &str = "out 6F04000000000200000000040300";

/// The card's seconds are counted.
async fn start() -> Result<EchoStack> {
    stack_tests::alone();
    EchoStack::start(&["-device", "qemu-xhci"], vec![DeviceConfig::new(SERIAL)]).await
}

/// Runs steps of `guest-usb`; returns what it printed, a line each.
async fn raw(stack: &EchoStack, steps: &[&str]) -> Result<Vec<String>> {
    let told = stack.guest.ok(&format!("guest-usb {SERIAL} {}", steps.join(" "))).await?;
    Ok(told.lines().map(str::to_owned).collect())
}

/// The messages, and the time extensions before them together.
fn answers(lines: &[String]) -> Result<(Vec<&str>, u32)> {
    let (mut messages, mut extensions) = (Vec::new(), 0);
    for line in lines {
        let line = line.strip_prefix("answer ").context("no answer")?;
        let (message, count) = line.split_once(" extensions=").context("no count")?;
        messages.push(message);
        extensions += count.parse::<u32>()?;
    }
    Ok((messages, extensions))
}

/// pcscd starts again, and the card answers.
async fn is_usable(stack: &EchoStack) -> Result<()> {
    stack.guest.start_pcscd().await?;
    stack.pcscd_is_back().await?;
    let told = stack.guest.ok(&format!("guest-pcsc transmit {QUICK}")).await?;
    ensure!(told.starts_with("9000 "), "{told}");
    stack.guest.stop_pcscd().await
}

/// libccid gives up after three seconds without a sign of life.
#[tokio::test(flavor = "multi_thread")]
async fn ten_seconds() -> Result<()> {
    let stack = start().await?;
    let told = stack.guest.ok(&format!("guest-pcsc transmit {TEN_SECONDS} {QUICK}")).await?;
    println!("{}", told.trim().replace('\n', ", "));
    let times: Option<Vec<f64>> =
        told.lines().map(|line| line.strip_prefix("9000 ")?.strip_suffix(" ms")?.parse().ok()).collect();
    let times = times.with_context(|| told.clone())?;
    ensure!(
        matches!(times[..], [slow, quick] if (9_900.0..20_000.0).contains(&slow) && quick < 3_000.0),
        "{told}"
    );
    pcscd_dies(&stack).await
}

/// pcscd is killed with a command at work, and the next one begins while the card still is.
async fn pcscd_dies(stack: &EchoStack) -> Result<()> {
    let before = stack.cards[0].sessions();
    let slow = stack.guest.run("guest-pcsc transmit 00041E00");
    let killed = async {
        stack.cards[0].sleeping(before.sleeps + 1).await?;
        stack.guest.ok("killall -9 pcscd; while pidof pcscd; do usleep 20000; done").await?;
        is_usable(stack).await
    };
    let (slow, killed) = tokio::join!(slow, killed);
    killed?;
    ensure!(slow?.status != 0, "an answer without pcscd");
    ensure!(stack.cards[0].sessions().wakes == before.wakes, "the command was waited for");
    Ok(())
}

/// IccPowerOff while the slot is busy is refused (USB CCID 1.1 §6.2.6, CMD_SLOT_BUSY) and disturbs nothing.
async fn power_off(stack: &EchoStack) -> Result<()> {
    let steps = [
        POWER_ON,
        SLOW,
        "out 63000000000003000000 answer 10",
        // The command goes on.
        "answer 10",
        "out 63000000000004000000 answer 10",
    ];
    let lines = raw(stack, &steps).await?;
    let (messages, extensions) = answers(&lines)?;
    ensure!(messages[0].starts_with("80") && messages[0][10..18] == *"00010000", "{lines:?}");
    ensure!(
        messages[1..] == ["8100000000000340E000", "800200000000020000009000", "81000000000004010000"],
        "{lines:?}"
    );
    ensure!(extensions >= 2, "{lines:?}");
    stack.cards[0].unpowered().await?;
    is_usable(stack).await
}

/// ABORT as a control request and a message, in this order (USB CCID 1.1 §5.3.1).
async fn abort(stack: &EchoStack, halves: [&str; 2]) -> Result<()> {
    let before = stack.cards[0].sessions();
    let [first, second] = halves;
    let steps = [
        POWER_ON,
        SLOW,
        first,
        // GetSlotStatus and XfrBlock in between.
        "out 65000000000004000000 answer 10 out 6F04000000000500000000010000 answer 10",
        second,
        "answer 10",
        "out 65000000000006000000 answer 10",
        // The card is not done with the command that nobody waits for.
        "out 6F04000000000700000000010000 answer 10",
    ];
    let start = Instant::now();
    let lines = raw(stack, &steps).await?;
    println!("{:?}", start.elapsed());
    let (messages, extensions) = answers(&lines)?;
    let expected = [
        "8100000000000440FF00",
        "8000000000000540FF00",
        "81000000000009000000",
        "81000000000006000000",
        "800200000000070000009000",
    ];
    ensure!(messages[1..] == expected, "{lines:?}");
    ensure!(extensions >= 1, "{lines:?}");
    ensure!(start.elapsed() >= Duration::from_secs(3), "the card was not waited for");

    // The same again, and the power goes off at once.
    let steps = [POWER_ON, SLOW, first, second, "answer 10 out 63000000000004000000 answer 10"];
    let lines = raw(stack, &steps).await?;
    let (messages, _) = answers(&lines)?;
    ensure!(messages[1..] == ["81000000000009000000", "81000000000004010000"], "{lines:?}");
    let Sessions { on, .. } = stack.cards[0].unpowered().await?;
    ensure!(on == before.on + 2, "{on} sessions after {before:?}");
    is_usable(stack).await
}

/// The reader is usable after each.
#[tokio::test(flavor = "multi_thread")]
async fn power_off_and_abort() -> Result<()> {
    let stack = start().await?;
    stack.guest.stop_pcscd().await?;
    power_off(&stack).await?;
    let (control, message) = ("abort 0 9", "out 72000000000009000000");
    abort(&stack, [control, message]).await?;
    abort(&stack, [message, control]).await
}
