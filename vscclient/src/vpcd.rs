//! Shows a card to the host's own pcscd, through the reader driver vpcd of the vsmartcard project.
//!
//! vpcd listens and asks, the card connects and answers: both ways two bytes of length, high byte first, then a
//! command or its response. A command of one byte is for the reader. An open connection is a card in the reader,
//! a closed one a card taken out. vpcd asks one thing after the other and waits for each answer without a limit;
//! in between it asks for the ATR, every 0.4 s, to see whether the card is still in. pcscd powers a card that it finds,
//! reads its ATR, and only then tells its programs of it: so they see it when vpcd asks for the next thing.

mod endpoint;
mod held;

use std::convert::Infallible;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use rustix::net::sockopt;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use vscard_protocol::chardev::{Channel, ChannelError, Endpoint, Plaintext};
use vscard_protocol::{
    Atr, Card, CardError, CardSource, Command, Limits, LogBudget, Presence, PresenceWatch, Response,
    StatusWord,
};
use zeroize::Zeroizing;

use crate::notify;
use crate::session::{End, Wish};
pub(crate) use endpoint::{PREFIX, endpoint};
use held::HeldContext;

/// For the next question after one that has no answer.
///
/// A program can send the card a single byte, which looks like a command to the reader: then vpcd waits for an
/// answer that no card gives, and pcscd with it, until the card is taken out.
const MOST_SILENCE: Duration = Duration::from_secs(5);
/// Until vpcd asks for a card that was put in: it takes one, and further ones wait until that is taken out.
const SLOT_IS_FREE: Duration = Duration::from_secs(2);

/// Cards and connections come and go as fast as a card or a peer likes.
static LINES: LogBudget<&str> = LogBudget::new();

/// What is asked of the reader, in one byte.
mod control {
    pub(super) const OFF: u8 = 0x00;
    pub(super) const ON: u8 = 0x01;
    pub(super) const RESET: u8 = 0x02;
    pub(super) const ATR: u8 = 0x04;
}

/// Runs until the user leaves, or the first loss if `reconnect` is not wanted.
pub(crate) async fn run(
    source: Arc<dyn CardSource>,
    endpoint: Endpoint,
    plaintext: Plaintext,
    reconnect: bool,
    wishes: &mut mpsc::Receiver<Wish>,
) -> End {
    tracing::info!("for the reader of pcscd at {endpoint} (driver: vpcd)");
    let serve = async {
        let held = match held_context(&endpoint, plaintext).await {
            Ok(held) => held,
            Err(error) => return End::Unusable(error),
        };
        show(source, endpoint, plaintext, reconnect, held).await
    };
    // The rest can be dropped at any moment: with it go the connection and the card's session.
    tokio::select! {
        Some(Wish::Leave) = wishes.recv() => End::Left,
        end = serve => end,
    }
}

/// For a vpcd on this machine; another machine's pcscd can be kept running by that machine only.
async fn held_context(
    endpoint: &Endpoint,
    plaintext: Plaintext,
) -> Result<Option<HeldContext>, ChannelError> {
    if !Channel::open(endpoint.clone(), plaintext).await?.is_local().await {
        return Ok(None);
    }
    let held = HeldContext::start();
    Ok(held.inspect_err(|error| tracing::warn!("nothing keeps pcscd running: {error}")).ok())
}

async fn show(
    source: Arc<dyn CardSource>,
    endpoint: Endpoint,
    plaintext: Plaintext,
    reconnect: bool,
    held: Option<HeldContext>,
) -> End {
    let mut presence = source.presence();
    loop {
        let Presence::Present { insertion, atr, limits } = presence.get() else {
            notify::ready_without_card("no card is in");
            presence.changed().await;
            continue;
        };
        if atr.as_bytes().is_empty() {
            LINES.tell("no ATR", |end| {
                tracing::warn!("the card has no answer to reset, and vpcd takes none that is empty{end}");
            });
            notify::ready_without_card("the card that is in has no answer to reset");
            removed(&mut presence, insertion).await;
            continue;
        }
        // A channel of its own for each insertion: a card that is put in waits for nothing that was before.
        let mut channel = match Channel::open(endpoint.clone(), plaintext).await {
            Ok(channel) => channel,
            Err(error) => return End::Unusable(error),
        };
        let shown = Shown { source: &*source, insertion, atr, limits, held: held.as_ref() };
        tokio::select! {
            end = shown.stay_in(&mut channel, reconnect) => return end,
            () = removed(&mut presence, insertion) => {
                LINES.tell("taken out", |end| tracing::info!("{endpoint}: card taken out{end}"));
            }
        }
    }
}

async fn removed(presence: &mut PresenceWatch, insertion: u64) {
    while presence.get().insertion() == Some(insertion) {
        presence.changed().await;
    }
}

/// One insertion, of a card that has an answer to reset.
struct Shown<'a> {
    source: &'a dyn CardSource,
    insertion: u64,
    atr: Atr,
    limits: Limits,
    held: Option<&'a HeldContext>,
}

/// Why a connection ended.
#[derive(Debug, Error)]
enum Lost {
    #[error("vpcd closed the connection")]
    Closed,
    #[error("the connection broke: {0}")]
    Broken(io::Error),
    #[error("vpcd waits for the answer to a command of one byte, which no card can give")]
    Silent,
    #[error("{0}")]
    Card(CardError),
}

impl From<io::Error> for Lost {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::UnexpectedEof { Self::Closed } else { Self::Broken(error) }
    }
}

impl Shown<'_> {
    async fn stay_in(&self, channel: &mut Channel, reconnect: bool) -> End {
        loop {
            notify::status(&format!("waiting for pcscd at {}", channel.endpoint()));
            let stream = if reconnect { channel.stream().await } else { channel.stream_once().await };
            let again = if reconnect { "; connecting again" } else { "" };
            match stream.map(|stream| stream.into_tcp()) {
                Ok(Some(stream)) => {
                    let Err(lost) = Connection { stream, quick_ack }.serve(self, channel.endpoint()).await;
                    LINES.tell("lost", |end| tracing::warn!("{}: {lost}{again}{end}", channel.endpoint()));
                }
                Ok(None) => return End::Disconnected,
                Err(error) if !error.is_transient() => return End::Unusable(error),
                Err(error) => tracing::warn!("{error}"),
            }
            if !reconnect {
                return End::Disconnected;
            }
        }
    }

    async fn transmit(&self, card: Option<&mut Box<dyn Card>>, bytes: &[u8]) -> Result<Response, Lost> {
        match (Command::parse(bytes), card) {
            (Ok(command), Some(card)) if bytes.len() <= self.limits.command => {
                card.transmit(&command).await.map_err(Lost::Card)
            }
            // Not asked for by any pcscd, and vpcd waits for an answer.
            (_, None) => Ok(StatusWord::NO_DIAGNOSIS.into()),
            _ => Ok(StatusWord::WRONG_LENGTH.into()),
        }
    }
}

struct Connection<S> {
    stream: S,
    quick_ack: fn(&S),
}

/// Whether pcscd's programs see the card.
#[derive(PartialEq, Eq)]
enum Ready {
    NotPowered,
    /// When the next question comes.
    Next,
    Told,
}

/// vpcd of Debian 12 sends the length and the rest apart, and the rest only when the length is acknowledged; the
/// kernel delays that by 40 ms unless told otherwise before each.
fn quick_ack(stream: &TcpStream) {
    // Only speed is lost where it cannot be set.
    #[cfg(target_os = "linux")]
    let _ = sockopt::set_tcp_quickack(stream, true);
    #[cfg(not(target_os = "linux"))]
    let _ = stream;
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    async fn serve(&mut self, shown: &Shown<'_>, endpoint: &Endpoint) -> Result<Infallible, Lost> {
        let mut card = None;
        let mut ready = Ready::NotPowered;
        let mut question = self.first_question(endpoint).await?;
        LINES.tell("put in", |end| tracing::info!("{endpoint}: card put in{end}"));
        if let Some(held) = shown.held {
            held.pcscd_is_there();
        }
        loop {
            if ready == Ready::Next {
                ready = Ready::Told;
                notify::ready(&format!("the card is in pcscd's reader at {endpoint}"));
            }
            let answered = match question[..] {
                [control::ATR] => {
                    self.answer(shown.atr.as_bytes()).await?;
                    if ready == Ready::NotPowered && card.is_some() {
                        ready = Ready::Next;
                    }
                    true
                }
                [control::ON | control::RESET] => {
                    // One session at a time.
                    drop(card.take());
                    card = Some(shown.source.power_on(shown.insertion).await.map_err(Lost::Card)?);
                    false
                }
                [control::OFF] => {
                    card = None;
                    false
                }
                [] | [_] => false,
                ref command => {
                    let response = shown.transmit(card.as_mut(), command).await?;
                    self.answer(response.as_bytes()).await?;
                    true
                }
            };
            question = if answered {
                self.question().await?
            } else {
                tokio::time::timeout(MOST_SILENCE, self.question()).await.map_err(|_| Lost::Silent)??
            };
        }
    }

    async fn first_question(&mut self, endpoint: &Endpoint) -> io::Result<Zeroizing<Vec<u8>>> {
        let mut question = pin!(self.question());
        if let Ok(question) = tokio::time::timeout(SLOT_IS_FREE, &mut question).await {
            return question;
        }
        LINES.tell("taken", |end| {
            tracing::warn!(
                "{endpoint}: the slot is taken by another card; this one is put in when that one goes{end}"
            );
        });
        notify::status(&format!("waiting for another card to leave pcscd's reader at {endpoint}"));
        question.await
    }

    async fn question(&mut self) -> io::Result<Zeroizing<Vec<u8>>> {
        let length = self.stream.read_u16().await?;
        (self.quick_ack)(&self.stream);
        let mut question = Zeroizing::new(vec![0; length.into()]);
        self.stream.read_exact(&mut question).await?;
        Ok(question)
    }

    async fn answer(&mut self, answer: &[u8]) -> io::Result<()> {
        let cannot = StatusWord::NO_DIAGNOSIS.0.to_be_bytes();
        // An answer of no bytes would stop vpcd for ever; no response is that short.
        let (length, answer) = match u16::try_from(answer.len()) {
            Ok(length @ 1..) => (length, answer),
            _ => (2, &cannot[..]),
        };
        let mut frame = Zeroizing::new(Vec::with_capacity(2 + answer.len()));
        frame.extend_from_slice(&length.to_be_bytes());
        frame.extend_from_slice(answer);
        self.stream.write_all(&frame).await
    }
}

#[cfg(test)]
mod tests;
