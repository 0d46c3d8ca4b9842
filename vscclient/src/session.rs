//! Keeps a card in the guest: connects, drives the protocol, connects again.

use std::io;
use std::mem::{Discriminant, discriminant};
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};
use vscard_protocol::chardev::{Channel, ChannelError, Place, Places, Stream, Wire};
use vscard_protocol::client::{Client, ClientConfig, CloseReason, Input, Notice, Output, Token};
use vscard_protocol::{
    Atr, Card, CardError, CardSource, Command, LogBudget, Presence, PresenceWatch, Response, T0,
};

/// Bytes that may wait for a host that does not read.
const MOST_UNSENT: usize = 64 * 1024;
/// Connections at a time whose host has not taken the reader yet.
const MOST_STRANGERS: usize = 4;
/// Between attempts to power a card that is in use, or fails.
const BUSY: Duration = Duration::from_secs(1);

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
    /// The card is gone by a fault of ours, and cannot come again.
    CardFailed,
}

/// Runs until the user leaves, or the first loss if `reconnect` is not wanted.
pub(crate) async fn run(
    source: Arc<dyn CardSource>,
    mut channel: Channel,
    config: ClientConfig,
    reconnect: bool,
    wishes: &mut mpsc::Receiver<Wish>,
) -> End {
    let listening = channel.endpoint().is_listening();
    if listening {
        tracing::info!("listening on {}", place(&channel));
    }
    let lines = Arc::new(LogBudget::new());
    // A host that says nothing, as one whose machine is paused does, keeps no other out.
    let mut places = Places::new(MOST_STRANGERS);
    let mut strangers = JoinSet::new();
    loop {
        let is_room = listening || strangers.is_empty();
        let stream = async { if reconnect { channel.stream().await } else { channel.stream_once().await } };
        tokio::select! {
            stream = stream, if is_room => match stream {
                Ok(stream) => {
                    tracing::debug!("{}: stream open", channel.endpoint());
                    let connection =
                        Connection::new(stream, source.clone(), config.clone(), Arc::clone(&lines));
                    strangers.spawn(connection.meet(places.take().await));
                    continue;
                }
                Err(error) if !error.is_transient() => return End::Unusable(error),
                Err(error) => tracing::warn!("{error}"),
            },
            Some(met) = strangers.join_next() => match met {
                Ok(Some(connection)) => {
                    // The others' places are gone.
                    places = Places::new(MOST_STRANGERS);
                    if connection.drive(wishes).await {
                        return End::Left;
                    }
                }
                _ if listening && !strangers.is_empty() => continue,
                _ => {}
            },
            Some(Wish::Leave) = wishes.recv() => {
                drop(places);
                while strangers.join_next().await.is_some() {}
                return End::Left;
            }
        }
        if !reconnect {
            return End::Disconnected;
        }
    }
}

/// Runs a session as long as its card has not failed. A card that has leaves as if the user wished so: a host that is not
/// told keeps a card that answers nothing, even without a connection.
pub(crate) async fn until_failed(
    session: impl Future<Output = End>,
    failed: impl Future<Output = ()>,
    wishes: &mpsc::Sender<Wish>,
) -> End {
    let mut session = pin!(session);
    tokio::select! {
        end = &mut session => return end,
        () = failed => {}
    }
    // Where there is no room for the wish, it has been wished before.
    let _ = wishes.try_send(Wish::Leave);
    match session.await {
        End::Left => End::CardFailed,
        end => end,
    }
}

/// Where a host finds us or we find it: with the port that was taken for 0.
pub(crate) fn place(channel: &Channel) -> String {
    match channel.local_address() {
        Some(address) => format!("tcp-listen:{address}"),
        None => channel.endpoint().to_string(),
    }
}

/// A powered card, driven by a task of its own so that a slow one stops nothing else.
struct Powered {
    session: u64,
    commands: mpsc::Sender<(Token, Command)>,
    /// It works on a command, maybe on one that nobody waits for any more.
    at_work: bool,
    task: JoinHandle<()>,
}

struct Connection {
    wire: Wire,
    /// The card as it is.
    whole: Arc<dyn CardSource>,
    /// The card as the host wants it, once that is known.
    shown: Option<Shown>,
    client: Client,
    card: Option<Powered>,
    sessions: u64,
    events: (mpsc::Sender<Event>, mpsc::Receiver<Event>),
    /// What the client wanted last while it was met, which is still to be worked off.
    first: Option<Output>,
    lines: Arc<LogBudget<Line>>,
}

/// What is told in the log. A host, or a guest behind it, can have it repeated as fast as it likes.
#[derive(Debug, PartialEq, Eq)]
enum Line {
    Connected,
    Ended,
    NotPowered,
    Notice(Discriminant<Notice>),
}

struct Shown {
    source: Arc<dyn CardSource>,
    presence: PresenceWatch,
    /// The host powers the card on and off.
    host_powers: bool,
    /// The insertion that the client was told of.
    insertion: Option<u64>,
}

/// Session, and what its task has to tell.
type Event = (u64, Said);

/// What a card's task has to tell.
enum Said {
    /// Powered for a host that asked for it, or to be shown.
    Powered(Option<Token>, Option<Atr>),
    Answer(Token, Option<Response>),
}

impl Powered {
    /// Gives it a command, unless it has one. None waits: when its turn came, nobody might wait for its answer.
    fn take(&mut self, token: Token, command: Command) -> bool {
        let taken = !self.at_work && self.commands.try_send((token, command)).is_ok();
        self.at_work |= taken;
        taken
    }
}

impl Connection {
    fn new(
        stream: Stream,
        whole: Arc<dyn CardSource>,
        config: ClientConfig,
        lines: Arc<LogBudget<Line>>,
    ) -> Self {
        Self {
            wire: Wire::new(stream),
            whole,
            shown: None,
            client: Client::new(config, Instant::now()),
            card: None,
            sessions: 0,
            events: mpsc::channel(16),
            first: None,
            lines,
        }
    }

    /// Until the host has taken the reader; `None` if the connection has ended before, or the place is another's.
    async fn meet(mut self, place: Place) -> Option<Self> {
        let mut input = zeroize::Zeroizing::new([0; 1024]);
        loop {
            match self.client.poll_output() {
                Some(Output::Send(bytes)) => self.wire.send(bytes),
                Some(Output::Notice(notice)) => self.log(&notice),
                Some(Output::Close(reason)) => {
                    self.lines.tell(Line::Ended, |end| match reason {
                        CloseReason::Left => tracing::info!("left a host that had not taken the card{end}"),
                        reason => tracing::warn!("connection closed: {reason}{end}"),
                    });
                    self.wire.finish().await;
                    return None;
                }
                Some(first) => {
                    self.first = Some(first);
                    return Some(self);
                }
                None => {
                    let due = due(self.client.next_deadline());
                    tokio::select! {
                        read = self.wire.read(&mut input[..]) => match read {
                            Ok(count @ 1..) => {
                                place.heard();
                                self.client.handle(Input::Received(&input[..count]), Instant::now());
                            }
                            ended => {
                                self.ended(ended.err());
                                return None;
                            }
                        },
                        () = due => self.client.handle_deadline(Instant::now()),
                        // Not without the rest of a message: its host may be QEMU, which keeps half ones.
                        () = place.lost() => self.client.handle(Input::Leave, Instant::now()),
                    }
                }
            }
        }
    }

    /// Until the connection ends; whether the user has left with it.
    async fn drive(mut self, wishes: &mut mpsc::Receiver<Wish>) -> bool {
        let left = self.run(wishes).await;
        self.power_off().await;
        self.wire.finish().await;
        left
    }

    /// However the connection ends, a user who wanted to leave has left.
    async fn run(&mut self, wishes: &mut mpsc::Receiver<Wish>) -> bool {
        let mut input = zeroize::Zeroizing::new([0; 16 * 1024]);
        let mut leaving = false;
        loop {
            if let Some(reason) = self.work_off().await {
                self.lines.tell(Line::Ended, |end| match &reason {
                    CloseReason::Left => tracing::info!("left the host{end}"),
                    CloseReason::LeftUnacknowledged => tracing::warn!("{reason}{end}"),
                    _ => tracing::warn!("connection closed: {reason}{end}"),
                });
                return leaving;
            }
            if self.wire.unsent() > MOST_UNSENT {
                self.lines.tell(Line::Ended, |end| {
                    tracing::warn!("connection closed: the host does not read our answers{end}");
                });
                return leaving;
            }
            let due = due(self.client.next_deadline());
            let changed = async {
                match &mut self.shown {
                    Some(shown) => shown.presence.changed().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                read = self.wire.read(&mut input[..]) => match read {
                    Ok(count @ 1..) => {
                        self.client.handle(Input::Received(&input[..count]), Instant::now());
                    }
                    ended => {
                        self.ended(ended.err());
                        return leaving;
                    }
                },
                Some((session, said)) = self.events.1.recv() => self.card_said(session, said),
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
        while let Some(output) = self.first.take().or_else(|| self.client.poll_output()) {
            match output {
                Output::Send(bytes) => self.wire.send(bytes),
                Output::Transmit(token, command) => {
                    if !self.card.as_mut().is_some_and(|card| card.take(token, command)) {
                        self.client.handle(Input::Answer(token, None), Instant::now());
                    }
                }
                Output::Ready(extension) => {
                    let how = if extension.is_some() { ", which powers the card itself" } else { "" };
                    self.lines.tell(Line::Connected, |end| tracing::info!("connected to the host{how}{end}"));
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
                    self.power_on(Some(token)).await;
                }
                Output::PowerOff => self.power_off().await,
                Output::Notice(notice) => self.log(&notice),
                Output::Close(reason) => return Some(reason),
            }
        }
        None
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
        match now {
            Presence::Present { atr, .. } if host_powers => {
                self.client.handle(Input::Inserted(atr), Instant::now());
            }
            Presence::Present { .. } => self.power_on(None).await,
            Presence::Absent => self.client.handle(Input::Removed, Instant::now()),
        }
    }

    /// Begins a new session with the card that is shown. A card may be slow in that, so it is not waited for.
    async fn power_on(&mut self, asked: Option<Token>) {
        self.power_off().await;
        self.sessions += 1;
        let session = self.sessions;
        let Some((source, insertion)) =
            self.shown.as_ref().and_then(|shown| Some((shown.source.clone(), shown.insertion?)))
        else {
            return self.powered(asked, None);
        };
        let (commands, queue) = mpsc::channel(1);
        let events = self.events.0.clone();
        let lines = Arc::clone(&self.lines);
        let task = tokio::spawn(serve(source, insertion, asked, queue, (session, events), lines));
        self.card = Some(Powered { session, commands, at_work: false, task });
    }

    fn card_said(&mut self, session: u64, said: Said) {
        let Some(card) = self.card.as_mut().filter(|card| card.session == session) else { return };
        match said {
            Said::Powered(asked, atr) => self.powered(asked, atr),
            Said::Answer(token, response) => {
                card.at_work = false;
                self.client.handle(Input::Answer(token, response), Instant::now());
            }
        }
    }

    fn powered(&mut self, asked: Option<Token>, atr: Option<Atr>) {
        let input = match (asked, atr) {
            (Some(token), atr) => Input::Powered(token, atr),
            (None, Some(atr)) => Input::Inserted(atr),
            (None, None) => Input::Removed,
        };
        self.client.handle(input, Instant::now());
    }

    fn log(&self, notice: &Notice) {
        self.lines.tell(Line::Notice(discriminant(notice)), |end| match notice {
            Notice::Inserted | Notice::Removed | Notice::Waiting | Notice::Resynchronising => {
                tracing::info!("{notice}{end}");
            }
            _ => tracing::warn!("{notice}{end}"),
        });
    }

    fn ended(&self, error: Option<io::Error>) {
        self.lines.tell(Line::Ended, |end| match error {
            Some(error) => tracing::warn!("the connection broke: {error}{end}"),
            None => tracing::warn!("the host closed the connection{end}"),
        });
    }

    async fn power_off(&mut self) {
        if let Some(card) = self.card.take() {
            card.task.abort();
            // The card's session ends with the task; only then can the next one begin.
            let _ = card.task.await;
        }
    }
}

async fn due(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

/// The host does not ask again, so a card that another program has to itself, or that fails, is tried as long as it
/// is in. Nothing tells when it will be of use.
async fn power_on_to_show(
    source: &dyn CardSource,
    insertion: u64,
    lines: &LogBudget<Line>,
) -> Result<Box<dyn Card>, CardError> {
    let mut told = false;
    let mut presence = source.presence();
    loop {
        let error = match source.power_on(insertion).await {
            Ok(card) => return Ok(card),
            Err(error) if presence.get().insertion() != Some(insertion) => return Err(error),
            Err(error) => error,
        };
        if !std::mem::replace(&mut told, true) {
            lines.tell(Line::NotPowered, |end| match error {
                CardError::Busy => {
                    tracing::warn!("the card is in use by another program or session; waiting for it{end}");
                }
                error => tracing::warn!("the card cannot be powered: {error}; trying again{end}"),
            });
        }
        tokio::time::sleep(BUSY).await;
    }
}

/// Powers a card and gives it commands, one after the other.
async fn serve(
    source: Arc<dyn CardSource>,
    insertion: u64,
    asked: Option<Token>,
    mut commands: mpsc::Receiver<(Token, Command)>,
    (session, events): (u64, mpsc::Sender<Event>),
    lines: Arc<LogBudget<Line>>,
) {
    let card = match asked {
        Some(_) => source.power_on(insertion).await,
        None => power_on_to_show(&*source, insertion, &lines).await,
    };
    let atr = card.as_ref().ok().map(|card| card.atr().clone());
    if let Err(error) = &card {
        // After a removal the next look at the presence shows what became of it.
        if *error != CardError::Removed {
            lines.tell(Line::NotPowered, |end| {
                tracing::error!("the card cannot be powered: {error}{end}");
            });
        }
    }
    let told = events.send((session, Said::Powered(asked, atr))).await;
    let (Ok(mut card), Ok(())) = (card, told) else { return };
    while let Some((token, command)) = commands.recv().await {
        let response = match card.transmit(&command).await {
            Ok(response) => Some(response),
            Err(error) => {
                tracing::debug!("{error}");
                None
            }
        };
        if events.send((session, Said::Answer(token, response))).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests;
