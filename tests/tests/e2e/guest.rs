//! The test guest itself: that scenarios can rely on it.

use std::time::Duration;

use serde_json::Value;
use stack_tests::guest::{Boot, Guest, within};

#[tokio::test(flavor = "multi_thread")]
async fn guest_boots_runs_commands_and_sees_a_reader() -> anyhow::Result<()> {
    let guest = Guest::boot(Boot::with(["-usb", "-device", "usb-ccid"])).await?;

    let ran = guest.run("printf 'out\\n'; printf '\\0\\377@@ done 1 0 0\\n' >&2; exit 7").await?;
    assert_eq!((ran.output.as_slice(), ran.status), (b"out\n\0\xFF@@ done 1 0 0\n".as_slice(), 7));
    let ran = guest.run("kill -9 $$").await?;
    assert_eq!(ran.status, 128 + 9);

    let ran = guest.run("head -c 1048576 /dev/zero").await?;
    assert_eq!((ran.output.len(), ran.status), (1 << 20, 0));
    assert!(ran.output.iter().all(|byte| *byte == 0));

    // Every byte value, and several pieces.
    let bytes: Vec<u8> = (0..200_000_u32).map(|n| ((n % 251) ^ (n >> 8)) as u8).collect();
    guest.put("/tmp/new/file", &bytes).await?;
    assert!(guest.get("/tmp/new/file").await? == bytes, "what is read is not what was written");
    guest.put("/tmp/new/file", b"").await?;
    assert_eq!(guest.get("/tmp/new/file").await?, b"");
    assert!(guest.get("/tmp/nothing").await.is_err());

    // Neither what is left in the background nor what hangs holds up the rest.
    guest.ok("setsid sleep 1000 &").await?;
    let hung = guest.run_within("sleep 1001", Duration::from_millis(300));
    let (hung, other) = tokio::join!(hung, guest.ok("echo other"));
    assert!(hung.is_err());
    assert_eq!(other?, "other\n");
    assert_eq!(guest.ok("pidof sleep | wc -w").await?.trim(), "1", "a command that was given up is killed");

    assert_eq!(guest.qmp("query-status", Value::Null).await?["status"], "running");
    assert!(guest.qmp("no-such-command", Value::Null).await.is_err());

    guest.start_pcscd().await?;
    let readers = guest.ok("guest-pcsc wait-reader 20").await?;
    assert!(readers.contains("Gemplus USB SmartCard Reader 433"), "{readers}");
    let ran = guest.run("guest-pcsc transmit 00A4040000").await?;
    assert_eq!(ran.status, 1);
    assert!(ran.text().starts_with("error NoSmartcard after "), "{}", ran.text());

    guest.shutdown().await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn wait_that_fails_shows_what_the_guest_said() -> anyhow::Result<()> {
    let guest = Guest::boot(Boot { may_reset: true, ..Boot::with(["-usb", "-device", "usb-ccid"]) }).await?;

    guest.ok("echo said-on-the-console >/dev/console").await?;
    guest.ok("echo said-by-pcscd >/tmp/pcscd.log").await?;
    let limit = Duration::from_millis(50);
    let Err(error) = within(Some(&guest), limit, "what never comes", std::future::pending::<()>()).await
    else {
        panic!("the wait ended");
    };
    let report = error.to_string();
    for expected in ["50ms", "what never comes", "said-on-the-console", "said-by-pcscd", "init: agent starts"]
    {
        assert!(report.contains(expected), "{expected} is not in:\n{report}");
    }

    guest.reset().await?;
    assert_eq!(guest.ok("echo again").await?, "again\n");
    assert!(guest.qmp_events().iter().any(|event| event["event"] == "RESET"));

    // A guest whose QEMU has died fails at once, without waiting for a deadline.
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(guest.pid() as i32).expect("a process id"),
        rustix::process::Signal::KILL,
    )?;
    let failed = within(Some(&guest), Duration::from_secs(10), "the failure", guest.run("echo late")).await?;
    assert!(failed.is_err());

    let failure = format!("{:#}", failed.expect_err("QEMU is gone"));
    assert!(failure.contains("init: agent starts"), "{failure}");

    let Err(error) = Guest::boot(Boot::with(["-device", "no-such-device"])).await else {
        panic!("QEMU took a device that does not exist");
    };
    assert!(format!("{error:#}").contains("no-such-device"), "{error:#}");
    Ok(())
}
