//! A virtual machine that is put back to what it was, with the reader unplugged meanwhile.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use stack_tests::SELECT;
use stack_tests::database::Database;
use stack_tests::guest::{Guest, within};
use stack_tests::reader::{Bus, Place, Stack, certificates};

use crate::lifecycle::{Control, stay_idle, stay_verified};

/// Writing or reading the guest's memory takes seconds.
const LIMIT: Duration = Duration::from_secs(120);

/// Runs a job of QEMU's to its end.
async fn job(guest: &Guest, command: &str, id: &str, mut arguments: Value) -> Result<()> {
    arguments["job-id"] = id.into();
    guest.qmp(command, arguments).await?;
    let concluded = guest.qmp_event(|event| {
        event["event"] == "JOB_STATUS_CHANGE"
            && event["data"]["id"] == id
            && event["data"]["status"] == "concluded"
    });
    within(Some(guest), LIMIT, command, concluded).await??;
    let jobs = guest.qmp("query-jobs", Value::Null).await?;
    let failed = jobs.as_array().and_then(|jobs| jobs.iter().find(|job| job["id"] == id)?.get("error"));
    ensure!(failed.is_none(), "{command}: {jobs}");
    guest.qmp("job-dismiss", json!({"id": id})).await?;
    Ok(())
}

/// A disk that holds nothing but snapshots.
async fn disk(guest: &Guest, place: &Place) -> Result<()> {
    let path = place.path("disk");
    std::fs::File::create(&path)?;
    guest.qmp("blockdev-add", json!({"driver": "file", "node-name": "disk-file", "filename": path})).await?;
    let options = json!({"driver": "qcow2", "file": "disk-file", "size": 1 << 20});
    job(guest, "blockdev-create", "create", json!({"options": options})).await?;
    guest.qmp("blockdev-add", json!({"driver": "qcow2", "node-name": "disk", "file": "disk-file"})).await?;
    Ok(())
}

fn snapshot(tag: &str) -> Value {
    json!({"tag": tag, "vmstate": "disk", "devices": ["disk"]})
}

async fn plugged(control: &mut Control, plugged: bool) -> Result<()> {
    let execute = if plugged { "plug" } else { "unplug" };
    let done = control.execute(json!({"execute": execute, "arguments": {"reader": 0}})).await?;
    ensure!(done["return"] == json!({"plugged": plugged}), "{done}");
    let readers = control.execute(json!({"execute": "query-readers"})).await?;
    ensure!(readers["return"][0]["plugged"] == plugged, "{readers}");
    ensure!(plugged || readers["return"][0]["attached"] == false, "{readers}");
    Ok(())
}

/// The guest's kernel has no reader any more. pcscd is not asked: see [`works`].
async fn is_gone(guest: &Guest) -> Result<()> {
    let gone = "while grep -qs 08e6 /sys/bus/usb/devices/*/idVendor; do usleep 100000; done";
    guest.ok(gone).await.map(drop)
}

/// Both cards answer, and no PIN is verified. A reader that the guest knows from before may be seen to leave first.
///
/// For a reader of two slots libccid 1.5.2 has a thread that at times goes on for ever to read from one that has left
/// (`Multi_ReadProc`), and pcscd keeps that reader then. Only another pcscd sees the new one.
async fn works(guest: &Guest) -> Result<()> {
    for _ in 0..4 {
        guest.ok("killall -9 pcscd; while pidof pcscd >/dev/null; do usleep 20000; done").await?;
        guest.start_pcscd().await?;
        let mut answers = Vec::new();
        for reader in 0..2 {
            let said = guest
                .run(&format!(
                    "i=0; until guest-pcsc transmit -r {reader} {SELECT} 00200000; do \
                     i=$((i+1)); [ $i -lt 100 ] || exit 1; usleep 100000; done"
                ))
                .await?;
            answers.push((said.status == 0, said.text().to_uppercase()));
        }
        if answers.iter().all(|(answered, _)| *answered) {
            let verified = answers.iter().find(|(_, said)| !said.contains("63C3"));
            ensure!(verified.is_none(), "a PIN is verified: {answers:?}");
            return Ok(());
        }
    }
    bail!("no card answers")
}

/// As docs/snapshots.md says: unplug, revert, plug. With two slots QEMU ends itself if the reader stays in.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_is_reverted_while_the_reader_is_unplugged() -> Result<()> {
    let cards = |database: &Database, place: &Place| {
        let mut args = vec!["--control".into(), format!("unix-listen:{}", place.path("control"))];
        for name in ["first", "second"] {
            args.extend(["--card".into(), certificates(database, &format!(",card-name={name}"))]);
        }
        args
    };
    let stack = Stack::start(Bus::Xhci, "slots=2,", cards).await?;
    let guest = &stack.guest;
    let mut control = Control::connect(&stack.place.path("control")).await?;
    disk(guest, &stack.place).await?;
    works(guest).await?;

    // One without the reader, and one with it, its pipes in use and a PIN verified.
    plugged(&mut control, false).await?;
    is_gone(guest).await?;
    job(guest, "snapshot-save", "save-before", snapshot("before")).await?;
    plugged(&mut control, true).await?;
    works(guest).await?;
    stay_verified(guest).await?;
    stay_idle(guest).await?;
    job(guest, "snapshot-save", "save-with", snapshot("with")).await?;

    for (round, tag) in ["with", "with", "before"].into_iter().enumerate() {
        plugged(&mut control, false).await?;
        job(guest, "snapshot-load", &format!("load-{round}"), snapshot(tag)).await.context(tag)?;
        plugged(&mut control, true).await?;
        if tag == "before" {
            // QEMU would let the reader in when the machine's clock is as far again as it was at the unplugging.
            guest.qmp("device_del", json!({"id": "redir"})).await?;
            let deleted = guest.qmp_event(|event| event["event"] == "DEVICE_DELETED");
            within(Some(guest), LIMIT, "DEVICE_DELETED", deleted).await??;
            let address = json!({"type": "unix", "data": {"path": stack.place.path("reader")}});
            let backend =
                json!({"type": "socket", "data": {"addr": address, "server": false, "reconnect": 1}});
            guest.qmp("chardev-add", json!({"id": "reader", "backend": backend})).await?;
            let device = json!({"driver": "usb-redir", "chardev": "reader", "id": "redir"});
            guest.qmp("device_add", device).await?;
        }
        works(guest).await.with_context(|| format!("{tag}, the daemon says\n{}", stack.daemon.log()))?;
    }
    ensure!(guest.ended().is_none(), "QEMU ended");
    Ok(())
}
