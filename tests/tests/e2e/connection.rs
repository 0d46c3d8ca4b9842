//! Connections that come, go and break.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rustix::process::Signal;
use stack_tests::SELECT;
use stack_tests::database::{Database, PIN};
use stack_tests::guest::{Boot, Guest, within};
use stack_tests::host::{Host, INIT, message};
use stack_tests::passthru::{Road, Stack, client};
use stack_tests::process::Process;
use tokio::io::AsyncWriteExt;

async fn works(stack: &Stack) -> Result<()> {
    stack.guest.ok("guest-pcsc wait-card present 30").await?;
    let objects = stack.guest.ok(&format!("pkcs11-tool -O --login --pin {PIN}")).await?;
    ensure!(objects.matches("Private Key Object").count() == 3, "{objects}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_takes_the_card_out_of_the_guest() -> Result<()> {
    for road in [Road::Unix, Road::QemuReconnects] {
        let mut stack = Stack::start(road, &[]).await?;
        let events = stack.guest.ok("guest-pcsc status").await?;
        ensure!(events.contains("PRESENT"), "{events}");
        let start = Instant::now();
        let gone = async {
            let said = stack.guest.ok("guest-pcsc wait-card absent 20").await;
            (said, start.elapsed())
        };
        let ((said, after), ended) = tokio::join!(gone, stack.client.terminate());
        said?;
        let ended = ended?;
        ensure!(ended.code() == Some(0), "{ended}: {}", stack.client.log());
        println!("{road:?}: the guest saw the card go {} ms after SIGTERM", after.as_millis());
    }
    Ok(())
}

/// The worst moment: the guest waits for an answer when the client dies.
#[tokio::test(flavor = "multi_thread")]
async fn sigkill_with_an_apdu_in_flight() -> Result<()> {
    for road in [Road::Unix, Road::Tcp] {
        let mut stack = Stack::start(road, &[]).await?;
        // A stopped client has the command and gives no answer.
        stack.client.signal(Signal::STOP)?;
        let start = Instant::now();
        let command = format!("guest-pcsc transmit {SELECT}");
        let (guest, process) = (&stack.guest, &mut stack.client);
        let waiting = guest.run_within(&command, Duration::from_secs(120));
        let kill = async {
            // Seen by pcscd, so on its way to the client.
            guest
                .ok("while ! tail -1 /tmp/pcscd.log | grep -q IFDHTransmitToICC; do usleep 20000; done")
                .await?;
            process.signal(Signal::KILL)?;
            process.ended().await?;
            client(&stack.database, stack.state.path(), &stack.link, &[])
        };
        let (ran, again) = tokio::join!(waiting, kill);
        let (ran, took) = (ran?, start.elapsed());
        stack.client = again?;
        let text = ran.text().to_lowercase();
        ensure!(ran.status != 0 || text.contains("6f00"), "it went well: {text}");
        ensure!(took < Duration::from_secs(60), "it took {took:?}: {text}");
        println!("{road:?}: the guest's call ended after {} ms with: {}", took.as_millis(), text.trim());
        stack.client.line("card inserted").await?;
        works(&stack).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_waits_while_another_is_connected() -> Result<()> {
    let mut stack = Stack::start(Road::Unix, &[]).await?;
    let second = client(&stack.database, stack.state.path(), &stack.link, &["--card-name", "second"])?;
    second.line("no reply from the host yet").await?;
    works(&stack).await?;
    let gone = stack.guest.ok("guest-pcsc wait-card absent 20");
    let (gone, ended) = tokio::join!(gone, stack.client.terminate());
    gone?;
    ensure!(ended?.success());
    second.line("card inserted").await?;
    works(&stack).await?;
    // The zeros of the one that waited did the stream no harm: a third finds it in order.
    stack.client = second;
    let gone = stack.guest.ok("guest-pcsc wait-card absent 20");
    let (gone, ended) = tokio::join!(gone, stack.client.terminate());
    gone?;
    ensure!(ended?.success());
    stack.start_client(&[])?;
    works(&stack).await
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_is_restarted() -> Result<()> {
    for road in [Road::Unix, Road::QemuReconnects] {
        let stack = Stack::start(road, &[]).await?;
        let Stack { guest, client, database, state, link } = stack;
        guest.kill().await;
        client.line("the host closed the connection").await?;
        let mark = client.mark();
        let guest = Guest::boot(Boot::with(link.qemu())).await?;
        client.line_after(mark, "card inserted").await?;
        guest.start_pcscd().await?;
        guest.ok("guest-pcsc wait-reader 30").await?;
        works(&Stack { guest, client, database, state, link }).await?;
    }
    Ok(())
}

/// A client that dies in the middle of any message leaves a stream that the next one gets in order.
#[tokio::test(flavor = "multi_thread")]
async fn cut_messages_are_overcome() -> Result<()> {
    let mut stack = Stack::start(Road::Unix, &[]).await?;
    let init = message(1, 0, INIT);
    let reader_add = message(3, u32::MAX, b"Virtual Reader");
    let atr = message(5, 0, &[0x3B, 0x84, 0x40, 0x01, 0x56, 0x53, 0x43, 0x43]);
    let answer = message(7, 0, &[0x5A; 258]);
    // Header and payload, at the places where a next client's first bytes would become a length.
    let cuts = [
        (&init, 5),
        (&init, 11),
        (&init, 14),
        (&init, 18),
        (&reader_add, 1),
        (&reader_add, 14),
        (&atr, 12),
        (&atr, 19),
        (&answer, 13),
    ];
    for (whole, cut) in cuts {
        let gone = stack.guest.ok("guest-pcsc wait-card absent 20");
        let (gone, ended) = tokio::join!(gone, stack.client.terminate());
        gone?;
        ensure!(ended?.success());
        let mut raw =
            within(Some(&stack.guest), Duration::from_secs(5), "QEMU", stack.link.connect()).await??;
        raw.write_all(&whole[..cut]).await?;
        raw.shutdown().await?;
        drop(raw);
        let start = Instant::now();
        stack.start_client(&[])?;
        stack.client.line("card inserted").await?;
        println!("type {} cut after {cut} bytes: in order after {:?}", whole[3], start.elapsed());
        stack.guest.ok("guest-pcsc wait-card present 30").await?;
        let selected = stack.guest.ok(&format!("guest-pcsc transmit {SELECT}")).await?;
        ensure!(selected.to_lowercase().contains("610d"), "{selected}");
    }
    works(&stack).await
}

/// A host that goes while the client takes its leave does not bring the client back.
#[tokio::test(flavor = "multi_thread")]
async fn sigterm_holds_when_the_host_goes_too() -> Result<()> {
    for signal in [Signal::TERM, Signal::INT] {
        let (host, state) = (Host::new()?, tempfile::tempdir()?);
        let database = Database::with_password()?;
        let (spec, endpoint) = (database.spec(), host.endpoint());
        let mut client = Process::start(
            "vscclient",
            ["--db", &spec, "-c", "id-cert", &endpoint],
            &[("XDG_STATE_HOME", state.path().as_os_str())],
        )?;
        let mut peer = host.card().await?;
        client.signal(signal)?;
        let (kind, ..) = peer.receive().await?;
        ensure!(kind == 6, "CardRemove");
        drop(peer);
        ensure!(client.ended().await?.code() == Some(0), "{}", client.log());
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn no_reconnect_ends_with_the_connection() -> Result<()> {
    let mut stack = Stack::start(Road::Unix, &["--no-reconnect"]).await?;
    stack.guest.kill().await;
    let ended = stack.client.ended().await?;
    ensure!(ended.code() == Some(4), "{ended}");
    Ok(())
}
