//! Keeps a card in the guest: connects, drives the protocol, connects again.

use std::collections::VecDeque;
use std::pin::pin;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use vscard_protocol::chardev::{Channel, ChannelError, Stream};
use vscard_protocol::client::{Client, ClientConfig, CloseReason, Input, Notice, Output, Token};
use vscard_protocol::{Card, CardError, CardSource, Command, Presence, PresenceWatch, Response, Secret};

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
pub(crate) async fn run<S: CardSource + Clone + 'static>(
    source: S,
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
    insertion: u64,
    commands: mpsc::UnboundedSender<(Token, Command)>,
    task: JoinHandle<()>,
}

struct Connection<S> {
    stream: Stream,
    source: S,
    client: Client,
    card: Option<Powered>,
    answers: (mpsc::Sender<CardAnswer>, mpsc::Receiver<CardAnswer>),
    unsent: VecDeque<Secret>,
    /// Bytes of the first of `unsent` that are written.
    written: usize,
    ready: bool,
}

/// Insertion, token, response.
type CardAnswer = (u64, Token, Option<Response>);

impl<S: CardSource> Connection<S> {
    fn new(stream: Stream, source: S, config: ClientConfig) -> Self {
        Self {
            stream,
            source,
            client: Client::new(config, None, Instant::now()),
            card: None,
            answers: mpsc::channel(16),
            unsent: VecDeque::new(),
            written: 0,
            ready: false,
        }
    }

    async fn drive(mut self, wishes: &mut mpsc::Receiver<Wish>) -> Lost {
        let mut presence = self.source.presence();
        let lost = self.run(&mut presence, wishes).await;
        self.power_off().await;
        lost
    }

    async fn run(&mut self, presence: &mut PresenceWatch, wishes: &mut mpsc::Receiver<Wish>) -> Lost {
        self.look_at_card(presence).await;
        let mut input = zeroize::Zeroizing::new([0; 16 * 1024]);
        let mut leaving = false;
        loop {
            if let Some(reason) = self.work_off() {
                return self.close(reason, leaving).await;
            }
            let unsent: usize = self.unsent.iter().map(Secret::len).sum();
            if unsent > MOST_UNSENT {
                tracing::warn!("connection closed: the host does not read our answers");
                return Lost::Gone { was_ready: self.ready };
            }
            let deadline = self.client.next_deadline();
            let due = pin!(async {
                match deadline {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            });
            let (mut reader, mut writer) = tokio::io::split(&mut self.stream);
            let first = self.unsent.front().map(|bytes| &bytes.expose()[self.written..]);
            tokio::select! {
                read = reader.read(&mut input[..]) => match read {
                    Ok(0) => {
                        tracing::warn!("the host closed the connection");
                        return Lost::Gone { was_ready: self.ready };
                    }
                    Ok(count) => self.client.handle(Input::Received(&input[..count]), Instant::now()),
                    Err(error) => {
                        tracing::warn!("the connection broke: {error}");
                        return Lost::Gone { was_ready: self.ready };
                    }
                },
                sent = writer.write(first.unwrap_or_default()), if first.is_some() => match sent {
                    Ok(count) => self.note_written(count),
                    Err(error) => {
                        tracing::warn!("the connection broke: {error}");
                        return Lost::Gone { was_ready: self.ready };
                    }
                },
                Some((insertion, token, response)) = self.answers.1.recv() => {
                    if self.card.as_ref().is_some_and(|card| card.insertion == insertion) {
                        self.client.handle(Input::Answer(token, response), Instant::now());
                    }
                }
                () = presence.changed() => self.look_at_card(presence).await,
                Some(Wish::Leave) = wishes.recv(), if !leaving => {
                    leaving = true;
                    self.client.handle(Input::Leave, Instant::now());
                }
                () = due => self.client.handle_deadline(Instant::now()),
            }
        }
    }

    /// Does what the client wants; a reason if it wants the connection closed.
    fn work_off(&mut self) -> Option<CloseReason> {
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
                Output::Notice(notice) => {
                    self.ready |= notice == Notice::Ready;
                    log(&notice);
                }
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
        if leaving { Lost::Left } else { Lost::Gone { was_ready: self.ready } }
    }

    /// Powers what is in the slot now, so that the client shows that card and no other.
    async fn look_at_card(&mut self, presence: &mut PresenceWatch) {
        let now = presence.get();
        let known = self.card.as_ref().map(|card| card.insertion);
        if now.insertion() == known && known.is_some() {
            return;
        }
        self.power_off().await;
        let Presence::Present { insertion, atr, .. } = now else {
            return self.client.handle(Input::Removed, Instant::now());
        };
        match self.source.power_on(insertion).await {
            Ok(card) => {
                let (commands, queue) = mpsc::unbounded_channel();
                let task = tokio::spawn(serve(card, insertion, queue, self.answers.0.clone()));
                self.card = Some(Powered { insertion, commands, task });
                self.client.handle(Input::Inserted(atr), Instant::now());
            }
            // The next look at the presence shows what became of it.
            Err(CardError::Removed) => self.client.handle(Input::Removed, Instant::now()),
            Err(error) => {
                tracing::error!("the card cannot be powered: {error}");
                self.client.handle(Input::Removed, Instant::now());
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
    insertion: u64,
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
        if answers.send((insertion, token, response)).await.is_err() {
            return;
        }
    }
}

fn log(notice: &Notice) {
    match notice {
        Notice::Ready | Notice::Inserted | Notice::Removed | Notice::Waiting | Notice::Resynchronising => {
            tracing::info!("{notice}");
        }
        _ => tracing::warn!("{notice}"),
    }
}
