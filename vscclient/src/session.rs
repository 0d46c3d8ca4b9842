//! Keeps a card in the guest: connects, drives the protocol, connects again.

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use vscard_protocol::chardev::{Channel, ChannelError, Stream};
use vscard_protocol::client::{Client, ClientConfig, CloseReason, Input, Notice, Output, Token};
use vscard_protocol::{
    Atr, Card, CardError, CardSource, Command, Presence, PresenceWatch, Response, Secret, T0,
};

/// First wait before connecting again; doubled each time.
const FIRST_DELAY: Duration = Duration::from_millis(250);
/// Longest wait before connecting again.
const LAST_DELAY: Duration = Duration::from_secs(5);
/// Bytes that may wait for a host that does not read.
const MOST_UNSENT: usize = 64 * 1024;
/// For the last bytes to leave before the stream is closed.
const FLUSH_WAIT: Duration = Duration::from_secs(1);

/// What the user wants of a running session.
#[derive(Debug)]
pub(crate) enum Wish {
    /// Take the card out of the guest and end.
    Leave,
}

/// How the session ended.
#[derive(Debug)]
pub(crate) enum End {
    /// The user wanted it.
    Left,
    /// The connection is gone and is not to be made again.
    Disconnected,
    /// The endpoint is of no use.
    Unusable(ChannelError),
}

/// How one connection ended.
enum Lost {
    Left,
    /// Tell whether the host had been reached at all.
    Gone {
        was_ready: bool,
    },
}

/// Runs until the user leaves, or the first loss if `reconnect` is not wanted.
pub(crate) async fn run(
    source: Arc<dyn CardSource>,
    mut channel: Channel,
    config: ClientConfig,
    reconnect: bool,
    wishes: &mut mpsc::Receiver<Wish>,
) -> End {
    let mut delay = FIRST_DELAY;
    let mut last_failure = String::new();
    if channel.endpoint().is_listening() {
        tracing::info!("listening on {}", channel.endpoint());
    }
    loop {
        let stream = tokio::select! {
            stream = channel.stream() => stream,
            Some(Wish::Leave) = wishes.recv() => return End::Left,
        };
        match stream {
            Ok(stream) => {
                tracing::debug!("{}: stream open", channel.endpoint());
                let connection = Connection::new(stream, source.clone(), config.clone());
                match connection.drive(wishes).await {
                    Lost::Left => return End::Left,
                    Lost::Gone { was_ready: true } => {
                        delay = FIRST_DELAY;
                        last_failure.clear();
                    }
                    Lost::Gone { was_ready: false } => {}
                }
            }
            Err(error) if !error.is_transient() => return End::Unusable(error),
            Err(error) => {
                let failure = error.to_string();
                // Once is enough to know; a host may be away for days.
                if failure == last_failure {
                    tracing::debug!("{failure}");
                } else {
                    tracing::warn!("{failure}{}", if reconnect { "; trying again" } else { "" });
                    last_failure = failure;
                }
            }
        }
        if !reconnect {
            return End::Disconnected;
        }
        tokio::select! {
            () = tokio::time::sleep(delay) => {}
            Some(Wish::Leave) = wishes.recv() => return End::Left,
        }
        delay = (delay * 2).min(LAST_DELAY);
    }
}

/// A powered card, driven by a task of its own so that a slow one stops nothing else.
struct Powered {
    session: u64,
    commands: mpsc::UnboundedSender<(Token, Command)>,
    task: JoinHandle<()>,
}

struct Connection {
    stream: Stream,
    /// The card as it is.
    whole: Arc<dyn CardSource>,
    /// The card as the host wants it, once that is known.
    shown: Option<Shown>,
    client: Client,
    card: Option<Powered>,
    sessions: u64,
    answers: (mpsc::Sender<CardAnswer>, mpsc::Receiver<CardAnswer>),
    unsent: VecDeque<Secret>,
    /// Bytes of the first of `unsent` that are written.
    written: usize,
}

struct Shown {
    source: Arc<dyn CardSource>,
    presence: PresenceWatch,
    /// The host powers the card on and off.
    host_powers: bool,
    /// The insertion that the client was told of.
    insertion: Option<u64>,
}

/// Session, token, response.
type CardAnswer = (u64, Token, Option<Response>);

impl Connection {
    fn new(stream: Stream, whole: Arc<dyn CardSource>, config: ClientConfig) -> Self {
        Self {
            stream,
            whole,
            shown: None,
            client: Client::new(config, Instant::now()),
            card: None,
            sessions: 0,
            answers: mpsc::channel(16),
            unsent: VecDeque::new(),
            written: 0,
        }
    }

    async fn drive(mut self, wishes: &mut mpsc::Receiver<Wish>) -> Lost {
        let lost = self.run(wishes).await;
        self.power_off().await;
        lost
    }

    async fn run(&mut self, wishes: &mut mpsc::Receiver<Wish>) -> Lost {
        let mut input = zeroize::Zeroizing::new([0; 16 * 1024]);
        let mut leaving = false;
        loop {
            if let Some(reason) = self.work_off().await {
                return self.close(reason, leaving).await;
            }
            let unsent: usize = self.unsent.iter().map(Secret::len).sum();
            if unsent > MOST_UNSENT {
                tracing::warn!("connection closed: the host does not read our answers");
                return Lost::Gone { was_ready: self.shown.is_some() };
            }
            let deadline = self.client.next_deadline();
            let due = pin!(async {
                match deadline {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            });
            let changed = async {
                match &mut self.shown {
                    Some(shown) => shown.presence.changed().await,
                    None => std::future::pending().await,
                }
            };
            let (mut reader, mut writer) = tokio::io::split(&mut self.stream);
            let first = self.unsent.front().map(|bytes| &bytes.expose()[self.written..]);
            tokio::select! {
                read = reader.read(&mut input[..]) => match read {
                    Ok(0) => {
                        tracing::warn!("the host closed the connection");
                        return Lost::Gone { was_ready: self.shown.is_some() };
                    }
                    Ok(count) => self.client.handle(Input::Received(&input[..count]), Instant::now()),
                    Err(error) => {
                        tracing::warn!("the connection broke: {error}");
                        return Lost::Gone { was_ready: self.shown.is_some() };
                    }
                },
                sent = writer.write(first.unwrap_or_default()), if first.is_some() => match sent {
                    Ok(count) => self.note_written(count),
                    Err(error) => {
                        tracing::warn!("the connection broke: {error}");
                        return Lost::Gone { was_ready: self.shown.is_some() };
                    }
                },
                Some((session, token, response)) = self.answers.1.recv() => {
                    if self.card.as_ref().is_some_and(|card| card.session == session) {
                        self.client.handle(Input::Answer(token, response), Instant::now());
                    }
                }
                () = changed => self.look_at_card().await,
                Some(Wish::Leave) = wishes.recv(), if !leaving => {
                    leaving = true;
                    self.client.handle(Input::Leave, Instant::now());
                }
                () = due => self.client.handle_deadline(Instant::now()),
            }
        }
    }

    /// Does what the client wants; a reason if it wants the connection closed.
    async fn work_off(&mut self) -> Option<CloseReason> {
        while let Some(output) = self.client.poll_output() {
            match output {
                Output::Send(bytes) => self.unsent.push_back(bytes),
                Output::Transmit(token, command) => {
                    let taken =
                        self.card.as_ref().is_some_and(|card| card.commands.send((token, command)).is_ok());
                    if !taken {
                        self.client.handle(Input::Answer(token, None), Instant::now());
                    }
                }
                Output::Ready(extension) => {
                    let how = if extension.is_some() { ", which powers the card itself" } else { "" };
                    tracing::info!("connected to the host{how}");
                    let source: Arc<dyn CardSource> = match extension {
                        Some(_) => self.whole.clone(),
                        None => Arc::new(T0::new(self.whole.clone())),
                    };
                    let presence = source.presence();
                    let host_powers = extension.is_some();
                    self.shown = Some(Shown { source, presence, host_powers, insertion: None });
                    self.look_at_card().await;
                }
                Output::PowerOn(token) => {
                    let atr = self.power_on().await;
                    self.client.handle(Input::Powered(token, atr), Instant::now());
                }
                Output::PowerOff => self.power_off().await,
                Output::Notice(notice) => log(&notice),
                Output::Close(reason) => return Some(reason),
            }
        }
        None
    }

    fn note_written(&mut self, count: usize) {
        self.written += count;
        if self.unsent.front().is_some_and(|bytes| self.written >= bytes.len()) {
            self.unsent.pop_front();
            self.written = 0;
        }
    }

    async fn close(&mut self, reason: CloseReason, leaving: bool) -> Lost {
        match &reason {
            CloseReason::Left => tracing::info!("left the host"),
            CloseReason::LeftUnacknowledged => tracing::warn!("{reason}"),
            _ => tracing::warn!("connection closed: {reason}"),
        }
        let flush = async {
            while let Some(bytes) = self.unsent.pop_front() {
                self.stream.write_all(&bytes.expose()[std::mem::take(&mut self.written)..]).await?;
            }
            self.stream.shutdown().await
        };
        match tokio::time::timeout(FLUSH_WAIT, flush).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!("closing: {error}"),
            Err(_) => tracing::debug!("closing: the host does not read"),
        }
        if leaving { Lost::Left } else { Lost::Gone { was_ready: self.shown.is_some() } }
    }

    /// Shows what is in the slot now; without a host that powers the card itself, powered.
    async fn look_at_card(&mut self) {
        let Some(shown) = &mut self.shown else { return };
        let now = shown.presence.get();
        if now.insertion() == shown.insertion && shown.insertion.is_some() {
            return;
        }
        shown.insertion = now.insertion();
        let host_powers = shown.host_powers;
        self.power_off().await;
        let input = match now {
            Presence::Present { atr, .. } if host_powers => Input::Inserted(atr),
            Presence::Present { .. } => self.power_on().await.map_or(Input::Removed, Input::Inserted),
            Presence::Absent => Input::Removed,
        };
        self.client.handle(input, Instant::now());
    }

    /// A new session with the card that is shown.
    async fn power_on(&mut self) -> Option<Atr> {
        self.power_off().await;
        let shown = self.shown.as_ref()?;
        match shown.source.power_on(shown.insertion?).await {
            Ok(card) => {
                let atr = card.atr().clone();
                let (commands, queue) = mpsc::unbounded_channel();
                self.sessions += 1;
                let session = self.sessions;
                let task = tokio::spawn(serve(card, session, queue, self.answers.0.clone()));
                self.card = Some(Powered { session, commands, task });
                Some(atr)
            }
            // The next look at the presence shows what became of it.
            Err(CardError::Removed) => None,
            Err(error) => {
                tracing::error!("the card cannot be powered: {error}");
                None
            }
        }
    }

    async fn power_off(&mut self) {
        if let Some(card) = self.card.take() {
            card.task.abort();
            // The card's session ends with the task; only then can the next one begin.
            let _ = card.task.await;
        }
    }
}

/// Gives commands to a card, one after the other. At most the client's bound of them can wait.
async fn serve(
    mut card: Box<dyn Card>,
    session: u64,
    mut commands: mpsc::UnboundedReceiver<(Token, Command)>,
    answers: mpsc::Sender<CardAnswer>,
) {
    while let Some((token, command)) = commands.recv().await {
        let response = match card.transmit(&command).await {
            Ok(response) => Some(response),
            Err(error) => {
                tracing::debug!("{error}");
                None
            }
        };
        if answers.send((session, token, response)).await.is_err() {
            return;
        }
    }
}

fn log(notice: &Notice) {
    match notice {
        Notice::Inserted | Notice::Removed | Notice::Waiting | Notice::Resynchronising => {
            tracing::info!("{notice}");
        }
        _ => tracing::warn!("{notice}"),
    }
}
