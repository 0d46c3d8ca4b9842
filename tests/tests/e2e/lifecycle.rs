//! Readers and cards that come and go; guests that pause, reboot, die and migrate.

use std::ffi::OsStr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use stack_tests::SELECT;
use stack_tests::database::{Database, NAMES, PIN};
use stack_tests::guest::{Boot, Guest, within};
use stack_tests::host::verify;
use stack_tests::process::Process;
use stack_tests::reader::{Bus, Place, Stack, certificates, one_card};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

const LIMIT: Duration = Duration::from_secs(90);

fn transmit(command: &[u8]) -> String {
    format!("guest-pcsc transmit {}", stack_tests::hex(command))
}

pub(crate) async fn works(guest: &Guest) -> Result<()> {
    guest.ok("guest-pcsc wait-reader 30").await?;
    guest.ok("guest-pcsc wait-card present 30").await?;
    let said = guest.ok(&format!("guest-pcsc transmit {SELECT}")).await?.to_uppercase();
    ensure!(said.contains("9000"), "{said}");
    Ok(())
}

/// A program in the guest has the PIN verified and goes on using the card.
pub(crate) async fn stay_verified(guest: &Guest) -> Result<()> {
    let selects = format!(" {SELECT}").repeat(20_000);
    guest.put("/tmp/verify", format!("{}{selects}", transmit(&verify(PIN))).as_bytes()).await?;
    guest.ok("setsid sh /tmp/verify >/tmp/verified 2>&1 &").await?;
    guest.ok("while ! head -n 1 /tmp/verified | grep -q 9000; do usleep 20000; done").await?;
    guest.ok("pidof guest-pcsc").await?;
    Ok(())
}

/// That program holds the card and does nothing more. An answer on its way would find out by itself that the guest was
/// reset.
pub(crate) async fn stay_idle(guest: &Guest) -> Result<()> {
    guest.ok("kill -STOP $(pidof guest-pcsc)").await?;
    Ok(())
}

/// Its PIN is verified still. Whoever looks resets the card as it goes.
pub(crate) async fn is_verified(guest: &Guest) -> Result<()> {
    let said = guest.ok("guest-pcsc transmit 00200000").await?;
    ensure!(said.contains("9000"), "the PIN is not verified: {said}");
    Ok(())
}

async fn a_reboot_forgets_the_pin(guest: &Guest) -> Result<()> {
    stay_verified(guest).await?;
    guest.reset().await?;
    not_verified(guest).await
}

/// pcscd starts, the card works, and its PIN is not verified.
async fn not_verified(guest: &Guest) -> Result<()> {
    guest.start_pcscd().await?;
    works(guest).await?;
    let said = guest.ok("guest-pcsc transmit 00200000").await?.to_uppercase();
    ensure!(said.contains("63C3"), "a PIN is verified: {said}");
    Ok(())
}

/// The daemon's control socket.
pub(crate) struct Control {
    answers: Lines<BufReader<OwnedReadHalf>>,
    commands: OwnedWriteHalf,
    events: Vec<Value>,
}

impl Control {
    pub(crate) async fn connect(path: &str) -> Result<Self> {
        let (reader, commands) = UnixStream::connect(path).await?.into_split();
        let mut control = Self { answers: BufReader::new(reader).lines(), commands, events: Vec::new() };
        let greeting = control.next().await?;
        ensure!(greeting["ccid-device"]["version"].is_string(), "{greeting}");
        Ok(control)
    }

    async fn next(&mut self) -> Result<Value> {
        let line = within(None, LIMIT, "a line of the control socket", self.answers.next_line()).await??;
        Ok(serde_json::from_str(&line.context("the control socket is closed")?)?)
    }

    pub(crate) async fn execute(&mut self, command: Value) -> Result<Value> {
        self.commands.write_all(format!("{command}\n").as_bytes()).await?;
        loop {
            let answer = self.next().await?;
            if answer["event"].is_string() {
                self.events.push(answer);
            } else {
                return Ok(answer);
            }
        }
    }

    /// Waits until an event has come `count` times, and sees that it does not come once more.
    pub(crate) async fn events(&mut self, name: &str, count: usize) -> Result<()> {
        while self.count(name) < count {
            let event = self.next().await?;
            self.events.push(event);
        }
        // What was on its way comes before this answer.
        self.execute(json!({"execute": "query-readers"})).await?;
        ensure!(self.count(name) == count, "{count} {name} expected: {:?}", self.events);
        Ok(())
    }

    fn count(&self, name: &str) -> usize {
        self.events.iter().filter(|event| event["event"] == name).count()
    }
}

fn on_reader(execute: &str) -> Value {
    json!({"execute": execute, "arguments": {"reader": 0}})
}

pub(crate) fn with_control(database: &Database, place: &Place) -> Vec<String> {
    let control = format!("unix-listen:{}", place.path("control"));
    vec!["--card".into(), certificates(database, ""), "--control".into(), control]
}

#[tokio::test(flavor = "multi_thread")]
async fn cards_are_plugged_and_pulled() -> Result<()> {
    let stack = Stack::start(Bus::Xhci, "", with_control).await?;
    let guest = &stack.guest;
    guest.ok("guest-pcsc wait-card present 30").await?;
    let mut control = Control::connect(&stack.place.path("control")).await?;
    let readers = control.execute(json!({"execute": "query-readers", "id": 7})).await?;
    ensure!(readers["id"] == 7, "{readers}");
    let reader = &readers["return"][0];
    ensure!(reader["attached"] == true && reader["slots"][0]["present"] == true, "{readers}");
    ensure!(reader["slots"][0]["card"] == "cert", "{readers}");

    let rounds = stack_tests::scale(10, 100) as usize;
    let slot = json!({"reader": 0, "slot": 0});
    for round in 1..=rounds {
        let pull = control.execute(json!({"execute": "remove", "arguments": slot}));
        let (seen, pulled) = tokio::join!(guest.ok("guest-pcsc wait-card absent 20"), pull);
        seen.with_context(|| format!("pulled, round {round}"))?;
        ensure!(pulled?["return"] == json!({"present": false}));
        let plug = control.execute(json!({"execute": "insert", "arguments": slot}));
        let (seen, plugged) = tokio::join!(guest.ok("guest-pcsc wait-card present 20"), plug);
        seen.with_context(|| format!("plugged, round {round}"))?;
        ensure!(plugged?["return"] == json!({"present": true}));
    }
    // Each one told once, and counted once by the guest: two events a round after the insertion at the start.
    control.events("CARD_INSERTED", rounds).await?;
    control.events("CARD_REMOVED", rounds).await?;
    let status = guest.ok("guest-pcsc status").await?;
    let counted: usize = status
        .split("events=")
        .nth(1)
        .and_then(|rest| rest.split_whitespace().next())
        .and_then(|count| count.parse().ok())
        .with_context(|| status.clone())?;
    ensure!(counted == 2 * rounds, "the guest counted {counted} events: {status}");
    works(guest).await?;

    for (command, part) in [
        (json!({"execute": "remove", "arguments": {"reader": 0, "slot": 5}}), "no card in that reader"),
        (json!({"execute": "remove", "arguments": {"reader": 0}}), "reader and slot must be given"),
        (json!({"execute": "insert", "arguments": {"slot": 0}}), "reader and slot must be given"),
        (json!({"execute": "detach"}), "reader must be given"),
        (json!({"execute": "detach", "arguments": {"reader": 1}}), "no such reader"),
        (json!({"execute": "unplug"}), "reader must be given"),
        (json!({"execute": "plug", "arguments": {"reader": 1}}), "no such reader"),
        (json!({"execute": "eject"}), "query-readers, insert, remove, detach, unplug, plug and quit"),
        (json!("nonsense"), "\"execute\" is missing"),
    ] {
        let answer = control.execute(command).await?;
        ensure!(answer["error"]["desc"].as_str().is_some_and(|text| text.contains(part)), "{answer}");
    }
    // Over usbredir it is back at once.
    let gone = guest.ok("guest-pcsc wait-reader 20 0");
    let detach = json!({"execute": "detach", "arguments": {"reader": 0}});
    let (gone, detached) = tokio::join!(gone, control.execute(detach));
    gone?;
    ensure!(detached?["return"] == json!({"detached": true}));
    control.events("READER_DETACHED", 1).await?;
    control.events("READER_ATTACHED", 1).await?;
    works(guest).await?;

    // Unplugged, it is away until it is plugged in.
    for _ in 0..2 {
        let unplugged = control.execute(on_reader("unplug")).await?;
        ensure!(unplugged["return"] == json!({"plugged": false}), "{unplugged}");
    }
    guest.ok("guest-pcsc wait-reader 20 0").await?;
    ensure!(control.execute(on_reader("detach")).await?["return"] == json!({"detached": false}));
    let reader = control.execute(json!({"execute": "query-readers"})).await?["return"][0].take();
    ensure!(reader["plugged"] == false && reader["attached"] == false, "{reader}");
    control.events("READER_ATTACHED", 1).await?;
    let plugged = control.execute(on_reader("plug")).await?;
    ensure!(plugged["return"] == json!({"plugged": true}), "{plugged}");
    control.events("READER_ATTACHED", 2).await?;
    works(guest).await?;

    let gone = guest.ok("guest-pcsc wait-reader 20 0");
    let (gone, quit) = tokio::join!(gone, control.execute(json!({"execute": "quit"})));
    gone?;
    quit?;
    let mut daemon = stack.daemon;
    ensure!(daemon.ended().await?.code() == Some(0), "{}", daemon.log());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_unplugs_and_sighup_loses_nothing() -> Result<()> {
    let mut stack = Stack::start(Bus::Xhci, "", one_card).await?;
    works(&stack.guest).await?;
    stack.daemon.signal(rustix::process::Signal::HUP)?;
    works(&stack.guest).await?;
    let gone = stack.guest.ok("guest-pcsc wait-reader 20 0");
    let (gone, ended) = tokio::join!(gone, stack.daemon.terminate());
    gone?;
    ensure!(ended?.code() == Some(0), "{}", stack.daemon.log());
    Ok(())
}

/// QEMU's user network keeps the connection of a guest that is reset: what ends the session is that the guest comes
/// again. That another asks costs a guest that is there nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_was_reset_over_usbip() -> Result<()> {
    let mut stack = Stack::start(Bus::Usbip, "", with_control).await?;
    let mut control = Control::connect(&stack.place.path("control")).await?;
    let guest = &stack.guest;
    works(guest).await?;
    stay_verified(guest).await?;
    let refused = stack.import().await.err().context("the reader of a guest that is there was taken")?;
    ensure!(refused.to_string().contains("usbip: error"), "{refused:#}");
    guest.ok("pidof guest-pcsc").await.context("the verified session has ended")?;
    stay_idle(guest).await?;
    is_verified(guest).await?;
    control.events("READER_DETACHED", 0).await?;

    guest.reset().await?;
    // It would take the port that it had before, and QEMU would have to end the connection of that.
    guest.ok("echo 20000 20999 >/proc/sys/net/ipv4/ip_local_port_range").await?;
    stack.attach().await?;
    not_verified(guest).await?;
    control.events("READER_DETACHED", 1).await?;
    control.events("READER_ATTACHED", 1).await?;

    stay_verified(guest).await?;
    let detach = json!({"execute": "detach", "arguments": {"reader": 0}});
    let gone = guest.ok("guest-pcsc wait-reader 20 0");
    let (gone, detached) = tokio::join!(gone, control.execute(detach.clone()));
    gone?;
    ensure!(detached?["return"] == json!({"detached": true}));
    control.events("READER_DETACHED", 2).await?;
    ensure!(control.execute(detach).await?["return"] == json!({"detached": false}));
    guest.stop_pcscd().await?;
    control.execute(on_reader("unplug")).await?;
    let refused = stack.import().await.err().context("a reader that is unplugged was imported")?;
    ensure!(refused.to_string().contains("usbip: error"), "{refused:#}");
    control.execute(on_reader("plug")).await?;
    stack.import().await?;
    not_verified(guest).await?;

    let mark = stack.daemon.mark();
    let gone = stack.guest.ok("guest-pcsc wait-reader 20 0");
    let (gone, ended) = tokio::join!(gone, stack.daemon.terminate());
    gone?;
    ensure!(ended?.success(), "{}", stack.daemon.log());
    stack.daemon.line_after(mark, "no guest has it any more").await?;
    Ok(())
}

/// As most recipes have it: QEMU listens, the daemon connects, before or after.
#[tokio::test(flavor = "multi_thread")]
async fn qemu_listens() -> Result<()> {
    let (place, database, state) = (Place::new(Bus::Xhci)?, Database::with_password()?, tempfile::tempdir()?);
    let socket = place.path("qemu");
    let reader = format!("usbredir,unix:{socket}");
    let daemon = || {
        let args = ["--reader", &reader, "--card", &certificates(&database, "")];
        Process::start("ccid-device", args, &[("XDG_STATE_HOME", OsStr::new(state.path()))])
    };
    let mut first = daemon()?;
    first.line("trying again").await?;
    let chardev = format!("socket,id=reader,path={socket},server=on,wait=off");
    let qemu = ["-device", "qemu-xhci", "-chardev", &chardev, "-device", "usb-redir,chardev=reader"];
    let guest = Guest::boot(Boot::with(qemu)).await?;
    guest.start_pcscd().await?;
    works(&guest).await?;
    let (gone, ended) = tokio::join!(guest.ok("guest-pcsc wait-reader 20 0"), first.terminate());
    gone?;
    ensure!(ended?.success());
    let _second = daemon()?;
    works(&guest).await
}

#[tokio::test(flavor = "multi_thread")]
async fn device_del_and_add_and_reset() -> Result<()> {
    let stack = Stack::start(Bus::Xhci, "", one_card).await?;
    let guest = &stack.guest;
    works(guest).await?;

    let removed = guest.qmp("device_del", json!({"id": "redir"}));
    let (gone, removed) = tokio::join!(guest.ok("guest-pcsc wait-reader 20 0"), removed);
    gone?;
    removed?;
    let deleted = guest.qmp_event(|event| event["event"] == "DEVICE_DELETED");
    within(Some(guest), LIMIT, "DEVICE_DELETED", deleted).await??;
    // QEMU has deleted the character device with it.
    let address = json!({"type": "unix", "data": {"path": stack.place.path("reader")}});
    let backend = json!({"type": "socket", "data": {"addr": address, "server": false, "reconnect": 1}});
    guest.qmp("chardev-add", json!({"id": "reader", "backend": backend})).await?;
    guest.qmp("device_add", json!({"driver": "usb-redir", "chardev": "reader", "id": "redir"})).await?;
    works(guest).await?;

    a_reboot_forgets_the_pin(guest).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reboot_reaches_a_remote_card() -> Result<()> {
    let stack = Stack::start(Bus::Xhci, "", |_, place| {
        vec!["--card".into(), format!("passthru,unix-listen:{}", place.path("card"))]
    })
    .await?;
    let guest = &stack.guest;
    let (spec, endpoint) = (stack.database.spec(), format!("unix:{}", stack.place.path("card")));
    let _client = Process::start(
        "vscclient",
        ["--profile", "cac", "--db", &spec, "-c", NAMES[0], &endpoint],
        &[("XDG_STATE_HOME", OsStr::new(stack.state.path()))],
    )?;
    works(guest).await?;
    a_reboot_forgets_the_pin(guest).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_starts_paused() -> Result<()> {
    let (place, database, state) = (Place::new(Bus::Xhci)?, Database::with_password()?, tempfile::tempdir()?);
    let args = ["--reader".to_owned(), place.reader(""), "--card".to_owned(), certificates(&database, "")];
    let daemon = Process::start("ccid-device", args, &[("XDG_STATE_HOME", OsStr::new(state.path()))])?;
    daemon.line("ready").await?;
    let mut qemu = place.qemu();
    qemu.push("-S".into());
    let guest = Guest::start(Boot::with(qemu)).await?;
    daemon.line("connected").await?;
    // QEMU says nothing before the machine runs; what ends this wait is that nothing happens for ten seconds.
    let mark = daemon.mark();
    let silence = tokio::time::timeout(Duration::from_secs(10), daemon.line_after(mark, "")).await;
    ensure!(silence.is_err(), "while paused: {silence:?}");
    guest.qmp("cont", Value::Null).await?;
    guest.ready(1).await?;
    guest.start_pcscd().await?;
    works(&guest).await
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_is_killed_and_started_again() -> Result<()> {
    let stack = Stack::start(Bus::Xhci, "", one_card).await?;
    works(&stack.guest).await?;
    stay_verified(&stack.guest).await?;
    let Stack { guest, daemon, place, .. } = &stack;
    let pid = guest.pid();
    let killed = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw).context("process id")?;
    rustix::process::kill_process(killed, rustix::process::Signal::KILL)?;
    daemon.line("connection lost").await?;
    let guest = Guest::boot(Boot::with(place.qemu())).await?;
    not_verified(&guest).await
}

/// A VM that is paused keeps nothing that is to be taken from it.
#[tokio::test(flavor = "multi_thread")]
async fn a_paused_guest_loses_the_reader() -> Result<()> {
    let mut stack = Stack::start(Bus::Xhci, "", with_control).await?;
    let mut control = Control::connect(&stack.place.path("control")).await?;
    works(&stack.guest).await?;
    for (execute, answer) in [("detach", json!({"detached": true})), ("unplug", json!({"plugged": false}))] {
        stay_verified(&stack.guest).await?;
        stay_idle(&stack.guest).await?;
        stack.guest.qmp("stop", Value::Null).await?;
        let mark = stack.daemon.mark();
        ensure!(control.execute(on_reader(execute)).await?["return"] == answer);
        stack.daemon.line_after(mark, "does not acknowledge the unplugging").await?;
        stack.guest.qmp("cont", Value::Null).await?;
        stack.guest.ok("guest-pcsc wait-reader 20 0; killall -KILL guest-pcsc").await?;
        stack.guest.stop_pcscd().await?;
        control.execute(on_reader("plug")).await?;
        not_verified(&stack.guest).await?;
    }
    ensure!(stack.daemon.terminate().await?.success());
    Ok(())
}

/// Starts a QEMU that the guest of the stack can move to.
async fn destination(stack: &Stack) -> Result<Guest> {
    let mut arguments = stack.place.qemu();
    arguments.extend(["-incoming".to_owned(), format!("unix:{}", stack.place.path("migration"))]);
    let mark = stack.daemon.mark();
    let destination = Guest::start(Boot { may_reset: true, ..Boot::with(arguments) }).await?;
    stack.daemon.line_after(mark, "connected").await?;
    Ok(destination)
}

async fn migrate(stack: &Stack, destination: &Guest) -> Result<()> {
    let path = stack.place.path("migration");
    stack.guest.qmp("migrate", json!({"uri": format!("unix:{path}")})).await?;
    let resumed = destination.qmp_event(|event| event["event"] == "RESUME");
    within(Some(&stack.guest), Duration::from_secs(120), "the migration", resumed).await??;
    Ok(())
}

/// The guest moves to another QEMU while a program in it has the card open and uses it.
#[tokio::test(flavor = "multi_thread")]
async fn migration_keeps_an_open_connection() -> Result<()> {
    let stack = Stack::start(Bus::Xhci, "migrate=on,", one_card).await?;
    let source = &stack.guest;
    works(source).await?;
    let count = 3000;
    let destination = destination(&stack).await?;
    // Its output is the guest's, and so survives the move.
    source
        .ok(&format!(
            "setsid sh -c 'guest-pcsc repeat {count} {SELECT} >/tmp/repeat 2>&1; echo ended >>/tmp/repeat' &"
        ))
        .await?;
    source.ok("while ! grep -q . /proc/$(pidof guest-pcsc)/comm; do usleep 20000; done").await?;
    migrate(&stack, &destination).await?;
    stack.daemon.line("the guest has migrated here and goes on").await?;
    let waited = "n=0; while ! grep -q ended /tmp/repeat; do usleep 100000; n=$((n+1)); [ $n -lt 500 ]; done";
    destination.run(waited).await?;
    let said = destination.ok("cat /tmp/repeat").await?;
    ensure!(said.contains(&format!("n={count}")) && !said.contains("error"), "{said}");
    println!("{}", said.trim());
    works(&destination).await
}

/// A guest that has a PIN verified and uses it for nothing says nothing where it moved to, however long that takes. The
/// source's end ends nothing, as the destination waits already.
#[tokio::test(flavor = "multi_thread")]
async fn migration_of_an_idle_guest_keeps_its_pin() -> Result<()> {
    let stack = Stack::start(Bus::Xhci, "migrate=on,", with_control).await?;
    works(&stack.guest).await?;
    let destination = destination(&stack).await?;
    stay_verified(&stack.guest).await?;
    stay_idle(&stack.guest).await?;
    let mark = stack.daemon.mark();
    migrate(&stack, &destination).await?;
    let Stack { guest, daemon, .. } = stack;
    guest.shutdown().await;
    daemon.line_after(mark, "the session is kept").await?;
    // What ends this wait is that nothing is said.
    let mark = daemon.mark();
    let silence = Duration::from_secs(stack_tests::scale(5, 60).into());
    let said = tokio::time::timeout(silence, daemon.line_after(mark, "")).await;
    ensure!(said.is_err(), "{said:?}");
    is_verified(&destination).await.with_context(|| daemon.log())?;
    daemon.line_after(mark, "the guest has migrated here and goes on").await?;
    destination.kill().await;
    daemon.line_after(mark, "no guest has it any more").await?;
    Ok(())
}

/// Without `migrate=on` the guest's new QEMU gets a new reader, once that of the source has ended.
#[tokio::test(flavor = "multi_thread")]
async fn migration_by_default_brings_a_new_reader() -> Result<()> {
    let stack = Stack::start(Bus::Xhci, "", with_control).await?;
    works(&stack.guest).await?;
    stay_verified(&stack.guest).await?;
    let destination = destination(&stack).await?;
    let mark = stack.daemon.mark();
    migrate(&stack, &destination).await?;
    stack.daemon.line_after(mark, "connection closed: the first packet is no usbredir hello").await?;
    destination.ok("guest-pcsc wait-reader 20 0").await?;
    let Stack { guest, daemon, .. } = stack;
    guest.shutdown().await;
    daemon.line_after(mark, "a guest has it").await?;
    destination.stop_pcscd().await?;
    not_verified(&destination).await
}
