//! The `ccid-device` daemon: readers with cards in them, for virtual machines.

#![forbid(unsafe_code)]

mod control;
mod spec;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::time::Duration;

use ccid_device::reader::{Carrier, Exports, Reader};
use ccid_device::{ConfigError, Device, DeviceConfig, Layout};
use clap::Parser;
use emulated_card::process::{ServiceManager, close, end, keep_memory_private, watch_signals};
use emulated_card::setup::{OpenCard, SetupError};
use tokio::signal::unix::SignalKind;
use tokio::sync::{Notify, broadcast, mpsc};
use tokio::task::{JoinHandle, JoinSet};
use tracing::Instrument;
use tracing_subscriber::filter::LevelFilter;
use vscard_protocol::chardev::{Channel, Endpoint, Plaintext};
use vscard_protocol::passthru::PassthruCard;
use vscard_protocol::trace::Traced;
use vscard_protocol::{CardSource, LogBudget};

use crate::control::{Control, Running};
use crate::spec::{CardKind, CardSpec, ReaderSpec};

const KILLED: i32 = 1;
const USAGE: i32 = 2;
const NO_CARD: i32 = 3;
const UNUSABLE: i32 = 5;

/// Between attempts to tell a service manager that does not read.
const MANAGER_FULL: Duration = Duration::from_millis(250);

const AFTER_HELP: &str = "\
Readers: --reader KIND,[OPTIONS,]ENDPOINT
  usbredir    for QEMU's usb-redir
  usbip       for Linux; readers with the same endpoint share a server
  with        slots=1..16 or interfaces=1..7, speed=full|high, id=VENDOR:PRODUCT, serial=,
              product=, manufacturer=, max-message=271..65554
  migrate=on  (usbredir, unix-listen:PATH) lets a guest that migrates take its card sessions along

Cards: --card KIND[,OPTIONS]
  cert,db=sql:DIR,cert=[SLOT=]NAME[,cert=...]       certificates of an NSS database
  cert,pem=CERT,,KEY[,pem=...][,p12=FILE...]        certificates and keys in files
  with        profile=piv|cac|dual, card-name=, pin-file=, puk-file=, password-file=, no-pin,
              forget-pin=SECONDS, keep-tries=N, and for files cert=SLOT=NAME
  host[,module=FILE...][,db=DIR][,token=LABEL]      the keys of a PKCS#11 token
  with        profile=, card-name=, forget-pin=, keep-tries=, cert=SLOT=NAME
  pcsc[,name=READER][,exclusive][,keep-tries=N]     the card in a reader of this host, as it is
  passthru,[deadline=SECONDS,]ENDPOINT              a card that a vscclient brings
  All take reader=N and slot=M; by default it is the next free slot of reader 0. cert is also
  host-certificates, passthru also passthrough.
  Profiles: piv for Windows and macOS, cac for software that knows nothing else, dual (the
  default) for both. Files with secrets: FILE, fd:N, or a credential of systemd.

Endpoints: unix:PATH, unix-listen:PATH, tcp:HOST:PORT, tcp-listen:HOST:PORT. They come last.
  A comma in a value is written twice.

Examples:
  # QEMU: -device qemu-xhci -chardev socket,id=c,path=/run/vm1-ccid.sock,server=on,wait=off
  #       -device usb-redir,chardev=c
  ccid-device --reader usbredir,unix:/run/vm1-ccid.sock \\
      --card cert,db=sql:$HOME/certs,cert=id,cert=sign,cert=encrypt

  # A second slot for the card of a remote user's vscclient
  ccid-device --reader usbredir,unix:/run/vm1-ccid.sock \\
      --card cert,db=sql:$HOME/certs,cert=id --card passthru,unix-listen:/run/vm1-card.sock

  # Key files: the card gets a PIN of its own
  ccid-device --reader usbredir,unix:/run/vm1-ccid.sock \\
      --card cert,pem=jane.crt,,jane.key,pin-file=pin.txt

  # The keys of a token, with its PIN; and the card in a reader of this host, as it is
  ccid-device --reader usbredir,unix:/run/vm1-ccid.sock \\
      --card host,module=/usr/lib/softhsm/libsofthsm2.so --card 'pcsc,name=Yubico*'

  # For a Linux machine: modprobe vhci-hcd; usbip attach -r 127.0.0.1 -b 1-1
  ccid-device --reader usbip,tcp-listen:127.0.0.1:3240 --card cert,db=sql:$HOME/certs,cert=id

  # libvirt: <redirdev bus='usb' type='unix'>
  #            <source mode='bind' path='/run/vm1-ccid.sock'/></redirdev>

Control socket: one JSON object a line, as in QMP: query-readers, insert, remove, detach, unplug, plug,
  quit. Unplug a reader before its guest is put back to a snapshot, and plug it in after.
  {\"execute\": \"remove\", \"arguments\": {\"reader\": 0, \"slot\": 1}}

Exit status:
  0  ended by SIGTERM, SIGINT or quit, the readers unplugged
  1  ended by a second signal, without waiting
  2  the command line is wrong
  3  a card cannot be made: keys, certificate, PIN or state
  5  an endpoint cannot be used
A PKCS#11 module that hangs as the program ends is ended by SIGKILL, and that is the status then.";

/// USB smartcard readers for virtual machines, with cards in them
#[derive(Debug, Parser)]
#[command(version, after_long_help = AFTER_HELP)]
struct Cli {
    /// A reader and where it appears; once for each
    #[arg(long = "reader", value_name = "SPEC", required = true)]
    readers: Vec<ReaderSpec>,
    /// A card and where it comes from; once for each
    #[arg(long = "card", value_name = "SPEC")]
    cards: Vec<CardSpec>,
    /// Socket for commands while it runs, such as unix-listen:/run/ccid-device.sock
    #[arg(long, value_name = "ENDPOINT")]
    control: Option<Endpoint>,
    /// Print each APDU on a line of its own, with the bodies and answers of SELECT and what only reads
    #[arg(long)]
    trace: bool,
    /// Let TCP leave this machine: everything, the PIN too, can be read on the way
    #[arg(long)]
    allow_plaintext: bool,
    /// Tell details; twice for everything
    #[arg(short, long, action = clap::ArgAction::Count)]
    verbose: u8,
}

/// Why it does not run.
struct Failure {
    status: i32,
    message: String,
}

impl Failure {
    fn new(status: i32, message: impl std::fmt::Display) -> Self {
        Self { status, message: message.to_string() }
    }
}

fn main() {
    keep_memory_private();
    let cli = Cli::parse();
    let level = match cli.verbose {
        0 => LevelFilter::INFO,
        1 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .log_internal_errors(false)
        .init();
    let mut cards = Vec::new();
    let result = watch_ends().and_then(|ended| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| Failure::new(UNUSABLE, format!("no event loop: {error}")))?;
        let result = runtime.block_on(run(cli, &ended, &mut cards));
        runtime.shutdown_background();
        result
    });
    let status = match result {
        Ok(()) => 0,
        Err(failure) => {
            let _ = writeln!(std::io::stderr(), "ccid-device: {}", failure.message);
            failure.status
        }
    };
    close(cards);
    end(status);
}

/// Which card goes where: for each reader, by slot.
fn place(cli: &mut Cli) -> Result<Vec<Vec<Option<CardKind>>>, Failure> {
    let usage = |message: String| Failure::new(USAGE, message);
    let mut placed: Vec<BTreeMap<u8, CardKind>> = cli.readers.iter().map(|_| BTreeMap::new()).collect();
    let mut open = Vec::new();
    for CardSpec { kind, reader, slot } in cli.cards.drain(..) {
        let Some(slots) = placed.get_mut(reader) else {
            return Err(usage(format!("--card: there is no reader {reader}; the first one is 0")));
        };
        match slot {
            Some(slot) if slots.contains_key(&slot) => {
                return Err(usage(format!("--card: two cards for slot {slot} of reader {reader}")));
            }
            Some(slot) => drop(slots.insert(slot, kind)),
            None => open.push((reader, kind)),
        }
    }
    for (reader, kind) in open {
        let free = (0..=u8::MAX).find(|slot| !placed[reader].contains_key(slot)).unwrap_or(u8::MAX);
        placed[reader].insert(free, kind);
    }
    name_apart(&mut cli.readers).map_err(usage)?;
    let mut all = Vec::new();
    for (number, (reader, mut cards)) in cli.readers.iter_mut().zip(placed).enumerate() {
        let last = cards.keys().last().copied().unwrap_or(0);
        let needed = last.saturating_add(1);
        if !reader.layout_given {
            let layout = Layout::Slots(needed);
            let checked = DeviceConfig { layout, ..reader.config.clone() }.check();
            if let Err(error @ ConfigError::Slots(_)) = checked {
                return Err(usage(format!("--card: slot {last} of reader {number}: {error}")));
            }
            reader.config.layout = Layout::Slots(needed);
        }
        reader.config.check().map_err(|error| usage(format!("--reader: reader {number}: {error}")))?;
        let slots = reader.config.layout.slots();
        if needed > slots {
            return Err(usage(format!(
                "--card: reader {number} has {slots} slots, so there is no slot {last}"
            )));
        }
        all.push((0..slots).map(|slot| cards.remove(&slot)).collect());
    }
    Ok(all)
}

/// Gives each reader a serial number of its own. One that the user chose stays as it is.
fn name_apart(readers: &mut [ReaderSpec]) -> Result<(), String> {
    let mut taken = BTreeSet::new();
    for (number, reader) in readers.iter().enumerate().filter(|(_, reader)| reader.serial_given) {
        let serial = &reader.config.serial;
        // Readers for different machines may well have the same. Those of a USB/IP server are for one, which tells
        // them apart by it.
        let mut server = readers[..number].iter().filter(|other| {
            reader.usbip && other.usbip && other.serial_given && other.endpoint == reader.endpoint
        });
        if server.any(|other| other.config.serial == *serial) {
            let endpoint = &reader.endpoint;
            return Err(format!("--reader: reader {number}: {endpoint} has a reader with serial={serial}"));
        }
        taken.insert(serial.clone());
    }
    for (number, reader) in readers.iter_mut().enumerate().filter(|(_, reader)| !reader.serial_given) {
        // USB/IP readers of one server have the same endpoint.
        let derived = reader.config.serial.clone();
        while !taken.insert(reader.config.serial.clone()) {
            reader.config.serial = format!("{derived}-{number}");
        }
    }
    Ok(())
}

/// Everything that runs.
struct Started {
    tasks: JoinSet<Result<(), Failure>>,
    tellers: Vec<JoinHandle<()>>,
    control: Arc<Control>,
}

/// Until it is to end. Whoever drops the `kept` cards may wait for a module.
async fn run(cli: Cli, ended: &Notify, kept: &mut Vec<OpenCard>) -> Result<(), Failure> {
    let started = tokio::select! {
        started = start(cli, kept) => started?,
        () = ended.notified() => return Ok(()),
    };
    started.serve(ended).await
}

async fn start(mut cli: Cli, kept: &mut Vec<OpenCard>) -> Result<Started, Failure> {
    let placed = place(&mut cli)?;
    if let Some(endpoint) =
        cli.control.as_ref().filter(|endpoint| !matches!(endpoint, Endpoint::UnixListen { .. }))
    {
        // Whoever reaches it can end us, and only a UNIX socket tells who that is.
        return Err(Failure::new(USAGE, format!("--control: {endpoint} is no unix-listen:PATH")));
    }
    let plaintext = if cli.allow_plaintext { Plaintext::Anywhere } else { Plaintext::LoopbackOnly };
    let unusable = |error| Failure::new(UNUSABLE, error);
    let mut tasks: JoinSet<Result<(), Failure>> = JoinSet::new();
    let (events, _) = broadcast::channel(256);

    // All cards first: what is wrong with one of them is said before any guest sees a reader.
    let mut sources = Vec::new();
    let mut kinds = Vec::new();
    for (number, cards) in placed.into_iter().enumerate() {
        kinds.push(cards.iter().map(|card| card.as_ref().map(CardKind::name)).collect::<Vec<_>>());
        let mut slots: Vec<Option<Arc<dyn CardSource>>> = Vec::new();
        for (slot, card) in cards.into_iter().enumerate() {
            let source: Option<Arc<dyn CardSource>> = match card {
                None => None,
                Some(CardKind::Certificates(setup) | CardKind::Token(setup)) => {
                    Some(keep(kept, move || setup.open()).await?)
                }
                Some(CardKind::Raw(setup)) => Some(keep(kept, move || setup.open()).await?),
                Some(CardKind::Passthru { deadline, endpoint }) => {
                    let channel = Channel::open(endpoint, plaintext).await.map_err(unusable)?;
                    let (card, serve) = PassthruCard::new(channel, deadline);
                    let span = tracing::info_span!("card", reader = number, slot);
                    tasks.spawn(async move { serve.await.map_err(unusable) }.instrument(span));
                    Some(Arc::new(card))
                }
            };
            slots.push(source.map(|source| match cli.trace {
                true => Arc::new(Traced::new(source, trace_sink(number, slot))),
                false => source,
            }));
        }
        sources.push(slots);
    }

    // Before a guest sees a reader that could not be told to go.
    let control_channel = match cli.control {
        Some(endpoint) => Some(Channel::open(endpoint, plaintext).await.map_err(unusable)?),
        None => None,
    };
    let mut carriers = carriers(&cli.readers, plaintext, &mut tasks).await?.into_iter();
    let mut readers = Vec::new();
    let mut tellers = Vec::new();
    for (number, ((reader, sources), cards)) in cli.readers.into_iter().zip(sources).zip(kinds).enumerate() {
        let (news, mut told) = mpsc::unbounded_channel();
        let events = events.clone();
        tellers.push(tokio::spawn(async move {
            let lines = LogBudget::new();
            while let Some(event) = told.recv().await {
                lines.tell(std::mem::discriminant(&event), |end| {
                    tracing::info!("reader {number}: {event}{end}");
                });
                let _ = events.send((number, event));
            }
        }));
        let running =
            Reader::new(reader.config, sources, news).map_err(|error| Failure::new(USAGE, error))?;
        let Some(carrier) = carriers.next() else { break };
        readers.push(Running {
            carrier: if reader.usbip { "usbip" } else { "usbredir" },
            endpoint: reader.endpoint.to_string(),
            handle: running.handle(),
            cards,
        });
        let span = tracing::info_span!("reader", number);
        tasks.spawn(async move { running.run(carrier).await.map_err(unusable) }.instrument(span));
    }

    let control = Arc::new(Control { readers, events, quit: Notify::new() });
    if let Some(channel) = control_channel {
        tokio::spawn(control::serve(channel, control.clone()));
    }
    tokio::spawn(tell_ready());
    tracing::info!("ready");
    Ok(Started { tasks, tellers, control })
}

impl Started {
    async fn serve(mut self, ended: &Notify) -> Result<(), Failure> {
        let result = self.until_end(ended).await;
        // Whatever ended it: no guest is to be left with a reader that says nothing.
        let readers = &self.control.readers;
        let unplugs: Vec<_> = readers
            .iter()
            .map(|reader| {
                let handle = reader.handle.clone();
                tokio::spawn(async move { handle.end().await })
            })
            .collect();
        for unplug in unplugs {
            let _ = unplug.await;
        }
        // They have told the last of it when no reader is left.
        self.tasks.shutdown().await;
        for teller in self.tellers {
            let _ = teller.await;
        }
        result
    }

    /// Until a signal or a command ends it, or something cannot go on.
    async fn until_end(&mut self, ended: &Notify) -> Result<(), Failure> {
        loop {
            tokio::select! {
                () = ended.notified() => return Ok(()),
                () = self.control.quit.notified() => return Ok(()),
                Some(ended) = self.tasks.join_next() => match ended {
                    Ok(result) => result?,
                    Err(error) => return Err(Failure::new(UNUSABLE, error)),
                },
            }
        }
    }
}

/// Opens a card, which may wait for a secret to be written or for a module, inserts it if it is ours, and keeps its
/// claim.
async fn keep(
    kept: &mut Vec<OpenCard>,
    open: impl FnOnce() -> Result<OpenCard, SetupError> + Send + 'static,
) -> Result<Arc<dyn CardSource>, Failure> {
    let no_card = |error: &dyn std::fmt::Display| Failure::new(NO_CARD, error);
    let opened = tokio::task::spawn_blocking(open).await.map_err(|panic| no_card(&panic))?;
    let card = opened.map_err(|error| no_card(&error))?;
    if let Some(slot) = &card.slot {
        slot.insert();
    }
    let source = card.source.clone();
    kept.push(card);
    Ok(source)
}

/// A carrier for each reader, in order. USB/IP readers with the same endpoint share a server.
async fn carriers(
    readers: &[ReaderSpec],
    plaintext: Plaintext,
    tasks: &mut JoinSet<Result<(), Failure>>,
) -> Result<Vec<Carrier>, Failure> {
    let unusable = |error| Failure::new(UNUSABLE, error);
    let mut carriers: Vec<Option<Carrier>> = Vec::new();
    for (number, reader) in readers.iter().enumerate() {
        carriers.push(None);
        if !reader.usbip {
            let channel = Channel::open(reader.endpoint.clone(), plaintext).await.map_err(unusable)?;
            carriers[number] = Some(Carrier::Usbredir { channel, migrate: reader.migrate });
        }
    }
    for (number, reader) in readers.iter().enumerate() {
        if carriers[number].is_some() {
            continue;
        }
        let channel = Channel::open(reader.endpoint.clone(), plaintext).await.map_err(unusable)?;
        let sharing: Vec<usize> = (number..readers.len())
            .filter(|other| readers[*other].usbip && readers[*other].endpoint == reader.endpoint)
            .collect();
        let mut topologies = Vec::new();
        for other in &sharing {
            let device = Device::new(readers[*other].config.clone());
            topologies.push(device.map_err(|error| Failure::new(USAGE, error))?.topology());
        }
        let (places, serve) = Exports::serve(channel, topologies);
        tasks.spawn(async move { serve.await.map_err(unusable) });
        for (other, place) in sharing.into_iter().zip(places) {
            tracing::info!("reader {other}: {} of {}", place.busid(), reader.endpoint);
            carriers[other] = Some(Carrier::Usbip(place));
        }
    }
    Ok(carriers.into_iter().flatten().collect())
}

/// The signals that mean something, from the very start.
fn watch_ends() -> Result<Arc<Notify>, Failure> {
    let ended = Arc::new(Notify::new());
    let told = ended.clone();
    watch_signals(
        &[SignalKind::terminate(), SignalKind::interrupt()],
        // Nothing is to be read again, and no guest is to lose its card.
        &[SignalKind::hangup()],
        move || told.notify_one(),
        || KILLED,
    )
    .map_err(|error| Failure::new(UNUSABLE, format!("signals: {error}")))?;
    Ok(ended)
}

/// The readers are there.
async fn tell_ready() {
    let Some(mut manager) = ServiceManager::of_environment() else { return };
    while !manager.tell("READY=1\n") {
        tokio::time::sleep(MANAGER_FULL).await;
    }
}

fn trace_sink(reader: usize, slot: usize) -> vscard_protocol::trace::Sink {
    Arc::new(move |line: &str| {
        let _ = writeln!(std::io::stderr().lock(), "apdu {reader}.{slot}: {line}");
    })
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixStream;
    use tokio::sync::oneshot;

    use super::*;

    fn serials(readers: &[&str]) -> Result<Vec<String>, String> {
        let mut readers: Vec<ReaderSpec> = readers.iter().map(|text| text.parse().unwrap()).collect();
        name_apart(&mut readers)?;
        Ok(readers.into_iter().map(|reader| reader.config.serial).collect())
    }

    #[test]
    fn only_derived_serial_numbers_are_changed() {
        let derived = serials(&["usbip,tcp-listen:127.0.0.1:1"]).unwrap().remove(0);
        let given = format!("usbip,serial={derived},tcp-listen:127.0.0.1:1");
        let all = serials(&["usbip,tcp-listen:127.0.0.1:1", "usbip,tcp-listen:127.0.0.1:1", &given]).unwrap();
        assert_eq!(all, [format!("{derived}-0"), format!("{derived}-1"), derived]);
        let same = [
            "usbredir,serial=a,unix:/x",
            "usbredir,serial=a,unix:/x",
            "usbip,serial=a,tcp-listen:127.0.0.1:1",
        ];
        assert_eq!(serials(&same).unwrap(), ["a", "a", "a"]);
        let error = serials(&[same[2], "usbip,tcp-listen:127.0.0.1:1", same[2]]).unwrap_err();
        assert_eq!(error, "--reader: reader 2: tcp-listen:127.0.0.1:1 has a reader with serial=a");
    }

    #[test]
    fn a_slot_that_is_not_there_is_named() {
        for (options, slot, error) in [
            ("", 255, "--card: slot 255 of reader 0: "),
            ("slots=2,", 255, "no slot 255"),
            ("slots=2,", 2, "no slot 2"),
        ] {
            let reader = format!("usbredir,{options}unix:/x");
            let card = format!("pcsc,slot={slot}");
            let mut cli = Cli::try_parse_from(["ccid-device", "--reader", &reader, "--card", &card]).unwrap();
            let said = place(&mut cli).err().unwrap().message;
            assert!(said.contains(error), "{said}");
        }
    }

    /// The type of the next usbredir packet; `None` at the end.
    async fn packet(vmm: &mut UnixStream) -> Option<u32> {
        let kind = vmm.read_u32_le().await.ok()?;
        let length = vmm.read_u32_le().await.unwrap();
        vmm.read_exact(&mut vec![0; 4 + length as usize]).await.unwrap();
        Some(kind)
    }

    #[tokio::test]
    async fn an_endpoint_that_fails_for_good_unplugs_the_other_readers() {
        const DEVICE_CONNECT: u32 = 1;
        const DEVICE_DISCONNECT: u32 = 2;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("reader");
        let reader = format!("usbredir,unix-listen:{}", path.display());
        let cli = Cli::try_parse_from(["ccid-device", "--reader", &reader]).unwrap();
        let mut started = start(cli, &mut Vec::new()).await.ok().unwrap();
        let (fail, failed) = oneshot::channel::<()>();
        started.tasks.spawn(async move {
            let _ = failed.await;
            Err(Failure::new(UNUSABLE, "of no use"))
        });
        let guest = async {
            let mut vmm = UnixStream::connect(&path).await.unwrap();
            // Hello, without any capability.
            let hello: Vec<u8> =
                [0_u32, 68, 0].into_iter().flat_map(u32::to_le_bytes).chain([0; 68]).collect();
            vmm.write_all(&hello).await.unwrap();
            while packet(&mut vmm).await.unwrap() != DEVICE_CONNECT {}
            drop(fail);
            assert_eq!(packet(&mut vmm).await, Some(DEVICE_DISCONNECT));
            assert_eq!(packet(&mut vmm).await, None);
        };
        let ended = Notify::new();
        let (result, ()) = tokio::join!(started.serve(&ended), guest);
        assert_eq!(
            result.err().map(|failure| (failure.status, failure.message)),
            Some((UNUSABLE, "of no use".into()))
        );
    }
}
