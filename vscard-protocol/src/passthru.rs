//! A remote card: the [host's end](crate::host) of a VSCard connection as a [`CardSource`].
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use std::time::Duration;
//! use vscard_protocol::chardev::{Channel, Plaintext};
//! use vscard_protocol::passthru::PassthruCard;
//!
//! let channel = Channel::open("unix-listen:/run/vm1-card.sock".parse()?, Plaintext::LoopbackOnly).await?;
//! let (card, serve) = PassthruCard::new(channel, Duration::from_secs(20));
//! tokio::spawn(serve);
//! // `card` is a CardSource: present while a client is connected and shows a card.
//! # Ok(())
//! # }
//! ```

use std::collections::VecDeque;
use std::mem::{Discriminant, discriminant};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{JoinHandle, JoinSet};
use zeroize::Zeroizing;

use crate::card::PresenceWatch;
use crate::chardev::{Channel, ChannelError, Place, Places, Stream, Wire};
use crate::host::{Failure, Host, Input, Notice, Output, Token};
use crate::message::Extension;
use crate::{Atr, Card, CardError, CardSource, Command, Limits, LogBudget, Presence, Response, StatusWord};

/// For a second client to hear that it is one.
const REFUSAL_WAIT: Duration = Duration::from_secs(5);
/// Connections at a time that have not brought a reader yet.
const MOST_STRANGERS: usize = 4;
/// Bytes that may wait for a client that does not read.
const MOST_UNSENT: usize = 256 * 1024;

/// Why a client is gone.
const CLOSED: &str = "it closed the connection";
const UNREAD: &str = "it does not read";
const GIVES_WAY: &str = "it brought no reader, and others came";

/// A card that a remote client owns. Present while a client is connected and shows one.
pub struct PassthruCard {
    presence: watch::Receiver<Presence>,
    asks: mpsc::UnboundedSender<Ask>,
    in_use: Arc<AtomicBool>,
}

enum Ask {
    PowerOn { insertion: u64, reply: oneshot::Sender<Result<Atr, CardError>> },
    Transmit { insertion: u64, command: Command, reply: oneshot::Sender<Result<Response, CardError>> },
    PowerOff,
}

impl PassthruCard {
    /// A card at the other end of `channel`, and the future that serves the connection; it ends only when the
    /// channel turns out to be of no use.
    ///
    /// A command fails as [`CardError::Mute`] after `deadline` without an answer.
    pub fn new(
        channel: Channel,
        deadline: Duration,
    ) -> (Self, impl Future<Output = Result<(), ChannelError>> + Send) {
        let (asks, asked) = mpsc::unbounded_channel();
        let (shown, presence) = watch::channel(Presence::Absent);
        let server = Server { shown, insertions: 0, deadline, asked, lines: Arc::default() };
        let card = Self { presence, asks, in_use: Arc::default() };
        (card, server.run(channel))
    }
}

#[async_trait]
impl CardSource for PassthruCard {
    fn presence(&self) -> PresenceWatch {
        self.presence.clone().into()
    }

    async fn power_on(&self, insertion: u64) -> Result<Box<dyn Card>, CardError> {
        if self.in_use.swap(true, Ordering::AcqRel) {
            return Err(CardError::Busy);
        }
        let session = Session { asks: self.asks.clone(), in_use: self.in_use.clone() };
        let (reply, answer) = oneshot::channel();
        let _ = self.asks.send(Ask::PowerOn { insertion, reply });
        let atr = answer.await.unwrap_or(Err(CardError::Removed))?;
        Ok(Box::new(RemoteCard { insertion, atr, session, earlier: None }))
    }
}

struct RemoteCard {
    insertion: u64,
    atr: Atr,
    session: Session,
    /// The outcome of the last command; nobody waited for it if it is still here.
    earlier: Option<oneshot::Receiver<Result<Response, CardError>>>,
}

/// The one session that may be; dropping it is power-off.
struct Session {
    asks: mpsc::UnboundedSender<Ask>,
    in_use: Arc<AtomicBool>,
}

impl Drop for Session {
    fn drop(&mut self) {
        // In this order: whoever finds the card free asks after this.
        let _ = self.asks.send(Ask::PowerOff);
        self.in_use.store(false, Ordering::Release);
    }
}

#[async_trait]
impl Card for RemoteCard {
    fn atr(&self) -> &Atr {
        &self.atr
    }

    async fn transmit(&mut self, command: &Command) -> Result<Response, CardError> {
        // One command at a time, given up or not: no queue of them can grow.
        if let Some(earlier) = &mut self.earlier {
            let _ = earlier.await;
        }
        let (reply, answer) = oneshot::channel();
        let _ = self.session.asks.send(Ask::Transmit {
            insertion: self.insertion,
            command: command.clone(),
            reply,
        });
        let outcome = self.earlier.insert(answer).await;
        self.earlier = None;
        outcome.unwrap_or(Err(CardError::Removed))
    }
}

/// Serves one client after the other.
struct Server {
    shown: watch::Sender<Presence>,
    insertions: u64,
    deadline: Duration,
    asked: mpsc::UnboundedReceiver<Ask>,
    lines: Arc<LogBudget<Line>>,
}

/// What is told in the log. Clients come, go and make news as fast as they like.
#[derive(Debug, PartialEq, Eq)]
enum Line {
    Connected,
    Gone,
    Refused,
    Inserted,
    Removed,
    Notice(Discriminant<Notice>),
}

/// A client that has brought a reader.
struct Client {
    wire: Wire,
    host: Host,
    /// What it did last, which is still to be worked off.
    first: Output,
}

enum Waiting {
    Power(oneshot::Sender<Result<Atr, CardError>>),
    Apdu(oneshot::Sender<Result<Response, CardError>>),
}

impl Waiting {
    fn fail(self, error: CardError) {
        match self {
            Self::Power(reply) => drop(reply.send(Err(error))),
            Self::Apdu(reply) => drop(reply.send(Err(error))),
        }
    }
}

impl Server {
    async fn run(mut self, mut channel: Channel) -> Result<(), ChannelError> {
        let listening = channel.endpoint().is_listening();
        // A client that says nothing keeps no other out, so several may be there until one has brought a reader.
        let mut places = Places::new(MOST_STRANGERS);
        let mut strangers = JoinSet::new();
        loop {
            let is_room = listening || strangers.is_empty();
            let client = tokio::select! {
                stream = channel.stream(), if is_room => {
                    let stream = stream?;
                    self.lines.tell(Line::Connected, |end| {
                        tracing::info!("{}: client connected{end}", channel.endpoint());
                    });
                    let place = places.take().await;
                    strangers.spawn(meet(stream, self.deadline, place, self.lines.clone()));
                    continue;
                }
                Some(met) = strangers.join_next() => match met {
                    Ok(Ok(client)) => client,
                    Ok(Err(why)) => {
                        self.gone(&channel, &why);
                        continue;
                    }
                    Err(_) => continue,
                },
                ask = self.asked.recv() => match ask {
                    Some(ask) => {
                        refuse(ask);
                        continue;
                    }
                    None => return Ok(()),
                },
            };
            strangers.shutdown().await;
            let Client { mut wire, host, first } = client;
            let why = self.serve(&mut wire, host, first, listening.then_some(&mut channel)).await;
            self.gone(&channel, &why);
            self.shown.send_replace(Presence::Absent);
            wire.finish().await;
        }
    }

    fn gone(&self, channel: &Channel, why: &str) {
        self.lines.tell(Line::Gone, |end| tracing::info!("{}: client gone: {why}{end}", channel.endpoint()));
    }

    /// Until the client is gone; says why.
    async fn serve(
        &mut self,
        wire: &mut Wire,
        mut host: Host,
        first: Output,
        mut others: Option<&mut Channel>,
    ) -> String {
        let mut input = Zeroizing::new(vec![0; 64 * 1024]);
        let mut waiting: Option<(Token, Waiting)> = None;
        let mut queue: VecDeque<Ask> = VecDeque::new();
        let mut tokens = 0;
        let mut refusal: Option<JoinHandle<_>> = None;
        let done = self.output(first, wire, &mut waiting);
        if let Some(why) = done.or_else(|| self.work_off(&mut host, wire, &mut waiting)) {
            return why;
        }
        loop {
            // One request at a time; the next when that one has its outcome.
            while waiting.is_none() {
                let Some(ask) = queue.pop_front() else { break };
                tokens += 1;
                let token = Token(tokens);
                let current = self.shown.borrow().insertion();
                match ask {
                    Ask::PowerOn { insertion, reply } if Some(insertion) == current => {
                        waiting = Some((token, Waiting::Power(reply)));
                        host.handle(Input::PowerOn(token), Instant::now());
                    }
                    Ask::Transmit { insertion, command, reply } if Some(insertion) == current => {
                        waiting = Some((token, Waiting::Apdu(reply)));
                        host.handle(Input::Transmit(token, command), Instant::now());
                    }
                    ask => refuse(ask),
                }
                if let Some(why) = self.work_off(&mut host, wire, &mut waiting) {
                    return why;
                }
            }
            if wire.unsent() > MOST_UNSENT {
                return UNREAD.into();
            }
            let deadline = host.next_deadline();
            let due = async {
                match deadline {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            let another = async {
                match &mut others {
                    Some(channel) => channel.stream().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                read = wire.read(&mut input[..]) => match read {
                    Ok(0) => return CLOSED.into(),
                    Ok(count) => host.handle(Input::Received(&input[..count]), Instant::now()),
                    Err(error) => return error.to_string(),
                },
                ask = self.asked.recv() => match ask {
                    // A barrier: what was asked before is over, and what follows is another session's.
                    Some(Ask::PowerOff) => {
                        queue.drain(..).for_each(refuse);
                        if let Some((_, waiting)) = waiting.take() {
                            waiting.fail(CardError::Removed);
                        }
                        host.handle(Input::PowerOff, Instant::now());
                    }
                    Some(ask) => queue.push_back(ask),
                    None => return "the card is no longer wanted".into(),
                },
                another = another => match another {
                    Ok(stream) => {
                        self.lines.tell(Line::Refused, |end| {
                            tracing::warn!("second client refused: another one is connected{end}");
                        });
                        // One at a time; whoever comes meanwhile finds a closed door.
                        if refusal.as_ref().is_none_or(JoinHandle::is_finished) {
                            let turned_away = tokio::time::timeout(REFUSAL_WAIT, turn_away(stream));
                            refusal = Some(tokio::spawn(turned_away));
                        }
                    }
                    Err(error) => return error.to_string(),
                },
                () = due => host.handle_deadline(Instant::now()),
            }
            if let Some(why) = self.work_off(&mut host, wire, &mut waiting) {
                return why;
            }
        }
    }

    /// Does what the host's end wants; says why if it wants the connection closed.
    fn work_off(
        &mut self,
        host: &mut Host,
        wire: &mut Wire,
        waiting: &mut Option<(Token, Waiting)>,
    ) -> Option<String> {
        std::iter::from_fn(|| host.poll_output()).find_map(|output| self.output(output, wire, waiting))
    }

    fn output(
        &mut self,
        output: Output,
        wire: &mut Wire,
        waiting: &mut Option<(Token, Waiting)>,
    ) -> Option<String> {
        match output {
            Output::Send(bytes) => wire.send(bytes),
            Output::ReaderAdded(name) => {
                tracing::debug!("reader {:?}", String::from_utf8_lossy(&name));
            }
            Output::Inserted(atr, extension) => {
                self.insertions += 1;
                self.lines.tell(Line::Inserted, |end| match extension {
                    Some(_) => tracing::info!("card inserted{end}"),
                    None => tracing::warn!(
                        "card inserted by a client that cannot be told of power-off and reset: a verified \
                         PIN survives a reboot of the guest{end}"
                    ),
                });
                let limits = extension.map_or(Limits::SHORT, limits);
                self.shown.send_replace(Presence::Present { insertion: self.insertions, atr, limits });
            }
            Output::Removed => {
                self.lines.tell(Line::Removed, |end| tracing::info!("card removed{end}"));
                self.shown.send_replace(Presence::Absent);
            }
            Output::Answer(token, response) => {
                if let Some((_, Waiting::Apdu(reply))) = waiting.take_if(|(of, _)| *of == token) {
                    let _ = reply.send(Ok(response));
                }
            }
            Output::Powered(token, atr) => {
                if let Some((_, Waiting::Power(reply))) = waiting.take_if(|(of, _)| *of == token) {
                    let _ = reply.send(Ok(atr));
                }
            }
            Output::Failed(token, failure) => match waiting.take_if(|(of, _)| *of == token) {
                Some((_, Waiting::Apdu(reply))) if failure == Failure::TooLong => {
                    let _ = reply.send(Ok(StatusWord::WRONG_LENGTH.into()));
                }
                Some((_, waiting)) => waiting.fail(match failure {
                    Failure::Removed => CardError::Removed,
                    Failure::Mute => CardError::Mute,
                    Failure::Busy => CardError::Busy,
                    other => CardError::Failed(other.to_string()),
                }),
                None => {}
            },
            Output::Notice(notice) => {
                self.lines.tell(Line::Notice(discriminant(&notice)), |end| tracing::warn!("{notice}{end}"));
            }
            Output::Close(reason) => return Some(reason.to_string()),
        }
        None
    }
}

/// Until the client has brought a reader or a card, or is gone; says why then.
async fn meet(
    stream: Stream,
    deadline: Duration,
    place: Place,
    lines: Arc<LogBudget<Line>>,
) -> Result<Client, String> {
    let mut host = Host::new(deadline);
    let mut wire = Wire::new(stream);
    let mut input = Zeroizing::new(vec![0; 1024]);
    let why = loop {
        match host.poll_output() {
            Some(Output::Send(bytes)) => wire.send(bytes),
            Some(Output::Notice(notice)) => {
                lines.tell(Line::Notice(discriminant(&notice)), |end| tracing::warn!("{notice}{end}"));
            }
            Some(Output::Close(reason)) => break reason.to_string(),
            Some(first) => return Ok(Client { wire, host, first }),
            None if wire.unsent() > MOST_UNSENT => break UNREAD.into(),
            None => tokio::select! {
                read = wire.read(&mut input[..]) => match read {
                    Ok(0) => break CLOSED.into(),
                    Ok(count) => {
                        place.heard();
                        host.handle(Input::Received(&input[..count]), Instant::now());
                    }
                    Err(error) => break error.to_string(),
                },
                // Others come, and this one has said nothing: nothing is owed to it.
                () = place.lost() => return Err(GIVES_WAY.into()),
            },
        }
    };
    wire.finish().await;
    Err(why)
}

fn limits(client: Extension) -> Limits {
    let (command, response) = (Extension::FULL.command, Extension::FULL.response);
    Limits { command: client.command.min(command) as usize, response: client.response.min(response) as usize }
}

/// Nobody is there to ask.
fn refuse(ask: Ask) {
    match ask {
        Ask::PowerOn { reply, .. } => drop(reply.send(Err(CardError::Removed))),
        Ask::Transmit { reply, .. } => drop(reply.send(Err(CardError::Removed))),
        Ask::PowerOff => {}
    }
}

/// Plays the host until the client wants a reader, says no, and closes.
async fn turn_away(mut stream: Stream) {
    let mut host = Host::refusing();
    let mut input = [0; 1024];
    while let Ok(count @ 1..) = stream.read(&mut input).await {
        host.handle(Input::Received(&input[..count]), Instant::now());
        while let Some(output) = host.poll_output() {
            match output {
                Output::Send(bytes) if stream.write_all(bytes.expose()).await.is_ok() => {}
                Output::Send(_) | Output::Close(_) => {
                    let _ = stream.shutdown().await;
                    return;
                }
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::{Context, Waker};

    use tokio::net::UnixStream;

    use super::*;
    use crate::chardev::Plaintext;
    use crate::codec::{Decoder, encode};
    use crate::message::{Body, MAX_PAYLOAD, Message, ReaderId};

    /// Everything a client gets, until the host asks its card something.
    async fn command(stream: &mut UnixStream, decoder: &mut Decoder) -> Vec<u8> {
        let mut input = [0; 1024];
        loop {
            let count = stream.read(&mut input).await.unwrap();
            let mut bytes = &input[..count];
            while let Some(message) = decoder.decode(&mut bytes) {
                if let Body::Apdu(apdu) = message.unwrap().body {
                    assert!(bytes.is_empty(), "one at a time");
                    return apdu.expose().to_vec();
                }
            }
        }
    }

    async fn say(stream: &mut UnixStream, body: Body) {
        let bytes = encode(&Message::new(ReaderId::FIRST, body)).unwrap();
        stream.write_all(bytes.expose()).await.unwrap();
    }

    #[tokio::test]
    async fn commands_that_are_given_up_do_not_queue() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("card");
        let endpoint = format!("unix-listen:{}", path.display()).parse().unwrap();
        let channel = Channel::open(endpoint, Plaintext::LoopbackOnly).await.unwrap();
        let (card, serve) = PassthruCard::new(channel, Duration::from_secs(20));
        tokio::spawn(serve);
        let mut client = UnixStream::connect(&path).await.unwrap();
        let atr = Atr::t0(b"card").unwrap();
        say(&mut client, Body::Atr(atr.as_bytes().to_vec().into())).await;
        let mut presence = card.presence();
        presence.changed().await;
        let mut card = card.power_on(presence.get().insertion().unwrap()).await.unwrap();

        for number in 0..100 {
            let command = Command::parse(&[0, 0xA4, 0, number]).unwrap();
            let mut given_up = pin!(card.transmit(&command));
            assert!(given_up.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        }
        let last = Command::parse(&[0, 0xB0, 0, 0]).unwrap();
        let mut decoder = Decoder::new(MAX_PAYLOAD);
        let (response, ()) = tokio::join!(card.transmit(&last), async {
            assert_eq!(command(&mut client, &mut decoder).await, [0, 0xA4, 0, 0]);
            say(&mut client, Body::Apdu([0xDE, 0xAD, 0x90, 0][..].into())).await;
            assert_eq!(command(&mut client, &mut decoder).await, [0, 0xB0, 0, 0]);
            say(&mut client, Body::Apdu([0xBE, 0xEF, 0x90, 0][..].into())).await;
        });
        assert_eq!(response.unwrap().as_bytes(), [0xBE, 0xEF, 0x90, 0]);
    }
}
