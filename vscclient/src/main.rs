#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod args;
mod background;
mod console;
mod legacy;
mod log;
mod new_card;
mod notify;
mod session;
mod vpcd;

use std::io::{self, Write};
use std::sync::Arc;

use clap::Parser;
use emulated_card::process::{close, end, keep_memory_private, watch_signals};
use emulated_card::setup::OpenCard;
use tokio::signal::unix::SignalKind;
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
const CARD_LOST: u8 = 6;

fn main() {
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
    // Whatever it was, a module may have been loaded for it.
    end(status.into())
}

fn fail(status: u8, message: &str) -> u8 {
    let _ = writeln!(io::stderr(), "vscclient: {message}");
    status
}

/// Until all is over; the exit status.
fn serve(spec: &CardSpec, connection: &Connection) -> u8 {
    let endpoint = match connection.endpoint() {
        Ok(endpoint) => endpoint,
        Err(error) => return fail(USAGE, &error),
    };
    if connection.background && !background::is_here() {
        return background::start();
    }
    let level = Level::start(connection.debug_level(), !connection.background);
    let card = match spec.card.open() {
        Ok(card) => card,
        Err(error) => return fail(NO_CARD, &error.to_string()),
    };
    let _pid_file = match connection.background {
        true => match background::prepare(spec.directory.as_deref(), &endpoint) {
            Ok(file) => Some(file),
            Err(error) => return fail(NO_CARD, &error),
        },
        false => None,
    };
    let status = show(&card, endpoint, spec, connection, level);
    close(card);
    status
}

fn show(card: &OpenCard, endpoint: Endpoint, spec: &CardSpec, connection: &Connection, level: Level) -> u8 {
    let (wishes, mut wanted) = mpsc::channel(4);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let watched = watch_ends(wishes.clone()).and_then(|()| background::leave_with_starter(wishes.clone()));
    let runtime = match watched.and(runtime) {
        Ok(runtime) => runtime,
        Err(error) => return fail(UNUSABLE, &format!("no event loop: {error}")),
    };
    let console = Console::new(card, spec.reader.clone(), level, wishes.clone());
    let end = runtime.block_on(async {
        let channel = tokio::select! {
            channel = Channel::open(endpoint, connection.plaintext()) => channel,
            Some(Wish::Leave) = wanted.recv() => return End::Left,
        };
        match channel {
            Ok(channel) => {
                let run = run(channel, card, spec, connection, console, &mut wanted);
                session::until_failed(run, card.failed(), &wishes).await
            }
            Err(error) => End::Unusable(error),
        }
    });
    // A thread that waits for a line on the terminal does not hold up the end.
    runtime.shutdown_background();
    match end {
        End::Left => LEFT,
        End::Disconnected => DISCONNECTED,
        End::Unusable(error) => fail(UNUSABLE, &error.to_string()),
        End::CardFailed => fail(CARD_LOST, "the card is gone by a fault in vscclient or its libraries"),
    }
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
    if !connection.background {
        console.start();
    }
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

/// The first signal leaves in order, another one more than a second later at once.
fn watch_ends(wishes: mpsc::Sender<Wish>) -> io::Result<()> {
    let mut kinds = vec![SignalKind::interrupt(), SignalKind::terminate()];
    // Under nohup it stays ignored.
    if !is_ignored(SignalKind::hangup()) {
        kinds.push(SignalKind::hangup());
    }
    let leave = move || drop(wishes.try_send(Wish::Leave));
    watch_signals(&kinds, &[], leave, || KILLED.into())
}
