#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod args;
mod console;
mod legacy;
mod log;
mod new_card;
mod notify;
mod session;
mod vpcd;

use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use emulated_card::setup::OpenCard;
use rustix::process::{DumpableBehavior, Resource, Rlimit, Signal};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use vscard_protocol::CardSource;
use vscard_protocol::chardev::{Channel, Endpoint};
use vscard_protocol::client::ClientConfig;
use vscard_protocol::trace::Traced;

use crate::args::{CardSpec, Cli, Command, Connection};
use crate::console::Console;
use crate::log::Level;
use crate::session::{End, Wish};

const LEFT: u8 = 0;
const KILLED: u8 = 1;
const USAGE: u8 = 2;
const NO_CARD: u8 = 3;
const DISCONNECTED: u8 = 4;
const UNUSABLE: u8 = 5;

/// For the card at the end. A PKCS#11 module may keep a thread for ever.
const CLOSING: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    keep_memory_private();
    let cli = Cli::parse();
    let done = |result: Result<String, String>| match result {
        Ok(done) => {
            // It is done, whoever hears of it.
            if let Err(error) = writeln!(io::stdout(), "{done}") {
                fail(LEFT, &format!("standard output: {error}"));
            }
            LEFT
        }
        Err(error) => fail(NO_CARD, &error),
    };
    let status = match cli.command {
        Some(Command::Unlock(unlock)) => done(unlock.run()),
        Some(Command::NewCard(new)) => done(new.run().map_err(|error| error.to_string())),
        Some(Command::Card(directory)) => match directory.card() {
            Ok(spec) => serve(&spec, &directory.connection),
            Err(error) => fail(NO_CARD, &error),
        },
        None => {
            let mut serve_args = cli.serve;
            match serve_args.card() {
                Ok(spec) => serve(&spec, &serve_args.connection),
                Err(error) => fail(USAGE, &error),
            }
        }
    };
    ExitCode::from(status)
}

/// PINs, passwords and keys are in this process: no core file, no debugger of another process of the user.
fn keep_memory_private() {
    let _ = rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable);
    let _ = rustix::process::setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) });
}

fn fail(status: u8, message: &str) -> u8 {
    let _ = writeln!(io::stderr(), "vscclient: {message}");
    status
}

/// Ends the process when all is over; an exit status if it cannot begin.
fn serve(spec: &CardSpec, connection: &Connection) -> u8 {
    let endpoint = match connection.endpoint() {
        Ok(endpoint) => endpoint,
        Err(error) => return fail(USAGE, &error),
    };
    let level = Level::start(connection.debug_level());
    let card = match spec.card.open() {
        Ok(card) => card,
        Err(error) => return fail(NO_CARD, &error.to_string()),
    };
    let status = show(&card, endpoint, spec, connection, level);
    close(card);
    end(status)
}

fn show(card: &OpenCard, endpoint: Endpoint, spec: &CardSpec, connection: &Connection, level: Level) -> u8 {
    let (wishes, mut wanted) = mpsc::channel(4);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = match watch_signals(wishes.clone()).and(runtime) {
        Ok(runtime) => runtime,
        Err(error) => return fail(UNUSABLE, &format!("no event loop: {error}")),
    };
    let console = Console { card: card.clone(), reader: spec.reader.clone(), level, wishes };
    let end = runtime.block_on(async {
        let channel = tokio::select! {
            channel = Channel::open(endpoint, connection.plaintext()) => channel,
            Some(Wish::Leave) = wanted.recv() => return End::Left,
        };
        match channel {
            // With the connection, the guest or pcscd loses a card that is no more.
            Ok(channel) => tokio::select! {
                end = run(channel, card, spec, connection, console, &mut wanted) => end,
                () = card.failed() => End::CardFailed,
            },
            Err(error) => End::Unusable(error),
        }
    });
    // A thread that waits for a line on the terminal does not hold up the end.
    runtime.shutdown_background();
    match end {
        End::Left => LEFT,
        End::Disconnected => DISCONNECTED,
        End::Unusable(error) => fail(UNUSABLE, &error.to_string()),
        End::CardFailed => fail(NO_CARD, "the card is gone by a fault in vscclient or its libraries"),
    }
}

/// Gives up the card, which waits for what its module is doing, but not for ever.
fn close(card: OpenCard) {
    let (closing, closed) = std::sync::mpsc::channel::<()>();
    let close = move || {
        drop(card);
        drop(closing);
    };
    let thread = thread::Builder::new().name("close".into()).spawn(close);
    if thread.is_ok() && closed.recv_timeout(CLOSING) == Err(RecvTimeoutError::Timeout) {
        tracing::warn!("ended without a card whose module does not come back");
    }
}

/// Ends the process, even if the exit handlers of a module wait for what hangs in it.
fn end(status: u8) -> ! {
    let _ = thread::Builder::new().name("end".into()).spawn(|| {
        thread::sleep(CLOSING);
        let _ = rustix::process::kill_process(rustix::process::getpid(), Signal::KILL);
    });
    std::process::exit(status.into())
}

async fn run(
    channel: Channel,
    card: &OpenCard,
    spec: &CardSpec,
    connection: &Connection,
    console: Console,
    wanted: &mut mpsc::Receiver<Wish>,
) -> End {
    if let Some(slot) = &card.slot {
        slot.insert();
    }
    console.start();
    let source: Arc<dyn CardSource> = if connection.trace {
        Arc::new(Traced::new(card.source.clone(), log::trace_sink()))
    } else {
        card.source.clone()
    };
    if connection.is_vpcd() {
        let endpoint = channel.endpoint().clone();
        let reconnect = !connection.no_reconnect;
        return vpcd::run(source, endpoint, connection.plaintext(), reconnect, wanted).await;
    }
    // A virtual machine may be started at any time, and is not what a start of this service is to wait for.
    notify::ready(&format!("the card is for {}", session::place(&channel)));
    let config = ClientConfig::new(spec.reader.clone());
    session::run(source, channel, config, !connection.no_reconnect, wanted).await
}

/// Whether whoever started us had the signal ignored.
fn is_ignored(kind: SignalKind) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    mask >> (kind.as_raw_value() - 1) & 1 == 1
}

/// The first signal leaves in order, another one more than a second later at once: on a thread of its own, whatever
/// the others wait for.
fn watch_signals(wishes: mpsc::Sender<Wish>) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let leaving = Arc::new(OnceLock::new());
    let mut kinds = vec![SignalKind::interrupt(), SignalKind::terminate()];
    // Under nohup it stays ignored.
    if !is_ignored(SignalKind::hangup()) {
        kinds.push(SignalKind::hangup());
    }
    for kind in kinds {
        let mut signal = {
            let _entered = runtime.enter();
            signal(kind)?
        };
        let (wishes, leaving) = (wishes.clone(), leaving.clone());
        runtime.spawn(async move {
            while signal.recv().await.is_some() {
                let since: Instant = *leaving.get_or_init(Instant::now);
                // The same signal often comes twice: to the process and to its group.
                if since.elapsed() > Duration::from_secs(1) {
                    end(KILLED);
                }
                let _ = wishes.try_send(Wish::Leave);
            }
        });
    }
    let wait = move || runtime.block_on(std::future::pending::<()>());
    thread::Builder::new().name("signals".into()).spawn(wait)?;
    Ok(())
}
