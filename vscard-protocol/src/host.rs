//! The host's end of a VSCard connection: the side that uses the card, as QEMU's passthru device does.
//!
//! [`Host`] is one connection as a state machine without I/O and clock. It serves one reader with one card and is
//! safe for old clients: libcacard's vscclient starts another thread for each Init it gets, so an Init is only
//! ever a reply; it has a buffer of 270 bytes that it does not check, so no command longer than
//! [`MAX_COMMAND`] goes out to it; it removes readers it never added, which is acknowledged.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use bytes::Bytes;
use thiserror::Error;

use crate::atr::{AtrError, MAX_ATR};
use crate::codec::{self, DecodeError, Decoder};
use crate::message::{
    Body, ErrorCode, Extension, Init, MAGIC, MAX_EXTENDED_PAYLOAD, MAX_PAYLOAD, Message, MessageType,
    ReaderId,
};
use crate::{Atr, Command, Response, Secret};

/// Longest command APDU sent to a client, in bytes: 5 + 255 + 1.
pub const MAX_COMMAND: usize = 261;

/// Late answers that are still waited for, so that the next one is not taken for them.
const MOST_LATE: usize = 4;
/// Messages that make no sense before the connection is given up.
const MOST_NONSENSE: u32 = 64;
/// Cards follow one another no faster than this. Who shows them faster keeps others busy, not a guest.
const BETWEEN_CARDS: Duration = Duration::from_secs(1);

/// Names a command between [`Input::Transmit`] and its outcome; chosen by the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token(pub u64);

/// What happens to a [`Host`].
pub enum Input<'a> {
    /// Bytes from the client.
    Received(&'a [u8]),
    /// Give this command to the card.
    Transmit(Token, Command),
    /// Power the card up afresh. Without the extension nothing reaches the client, and the card keeps what it
    /// had.
    PowerOn(Token),
    /// End the card's session: nothing asked before gets an outcome. The client is told if it can be.
    PowerOff,
}

/// What a [`Host`] wants done, or has to tell.
#[derive(Debug)]
pub enum Output {
    /// Write these bytes, in one piece.
    Send(Secret),
    /// The client's reader has this name (its bytes, UTF-8 or not, at most 255).
    ReaderAdded(Bytes),
    /// A card is in; if one was in before, it is another one now. With the extension its client powers it when
    /// told to, and takes APDUs up to these sizes; without it takes [`MAX_COMMAND`] bytes of command and nobody
    /// can tell it of power-off and reset.
    Inserted(Atr, Option<Extension>),
    /// No card is in any more.
    Removed,
    /// The card's response.
    Answer(Token, Response),
    /// The card is powered.
    Powered(Token, Atr),
    /// There is no response and will be none.
    Failed(Token, Failure),
    /// Tell the user.
    Notice(Notice),
    /// Close the stream. Nothing comes after this.
    Close(CloseReason),
}

/// Why a command got no response.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Failure {
    /// No card is in, or it went while the command was out.
    #[error("the card was removed")]
    Removed,
    /// Nothing came in time.
    #[error("the client did not answer in time")]
    Mute,
    /// The client answered with an Error.
    #[error("the client could not reach its card: {0}")]
    Refused(ErrorCode),
    /// The client's answer is no response APDU.
    #[error("the client's answer is no response APDU")]
    NoResponse,
    /// Longer than what the client takes; [`MAX_COMMAND`] without the extension.
    #[error("the command is longer than what the client takes")]
    TooLong,
    /// Another command is out.
    #[error("another command is under way")]
    Busy,
}

/// News about a connection.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Notice {
    /// The client's ATR is none; the card is not taken.
    #[error("ATR refused: {0}")]
    BadAtr(AtrError),
    /// A message that a client does not send; it was refused.
    #[error("unexpected {0} message refused")]
    Unexpected(MessageType),
    /// An answer nobody asked for.
    #[error("answer without a command ignored")]
    Unasked,
    /// A message that cannot be read.
    #[error("message ignored: {0}")]
    BadMessage(DecodeError),
}

/// Why a connection ends.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum CloseReason {
    /// The stream cannot be followed.
    #[error("cannot follow the client: {0}")]
    Decode(DecodeError),
    /// The peer is no VSCard client.
    #[error("magic at offset 12 of the client's Init is not VSCD: not a VSCard client")]
    WrongMagic,
    /// Too many commands without an answer.
    #[error("the client leaves commands without an answer")]
    Silent,
    /// Another client is served; this one was told so.
    #[error("refused: another client is connected")]
    Occupied,
    /// The client keeps sending what no client sends.
    #[error("the client has sent more than {MOST_NONSENSE} messages that make no sense")]
    TooMuchNonsense,
}

/// A request that waits for the acknowledgement of a power-off.
#[derive(Debug)]
struct Held {
    token: Token,
    deadline: Instant,
    kind: Kind,
    body: Body,
}

/// A command whose answer is to come.
#[derive(Debug)]
struct Pending {
    /// `None` once nobody waits for it; its answer still has to be taken off the stream.
    token: Option<Token>,
    deadline: Instant,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Apdu,
    PowerOn,
    PowerOff,
}

/// One connection to a client, from the host's side.
pub struct Host {
    decoder: Decoder,
    deadline: Duration,
    output: VecDeque<Output>,
    /// Oldest first: answers are told apart by their order alone.
    pending: VecDeque<Pending>,
    /// What comes after a power-off goes out when the client has seen that. A guest can reset its bus many times
    /// within one round trip, and the client would be left because of all that it has not answered.
    held: Option<Held>,
    /// The card that is in.
    card: Option<Atr>,
    /// When the last card was shown.
    shown: Option<Instant>,
    /// What the client announced.
    extension: Option<Extension>,
    nonsense: u32,
    refusing: bool,
    closed: bool,
}

impl Host {
    /// A host that takes no reader: for a client that comes while another is served.
    pub fn refusing() -> Self {
        Self { refusing: true, ..Self::new(Duration::ZERO) }
    }

    /// A host on a stream that was just opened; a command fails after `deadline` without an answer.
    pub fn new(deadline: Duration) -> Self {
        Self {
            decoder: Decoder::new(MAX_EXTENDED_PAYLOAD),
            deadline,
            output: VecDeque::new(),
            pending: VecDeque::new(),
            held: None,
            card: None,
            shown: None,
            extension: None,
            nonsense: 0,
            refusing: false,
            closed: false,
        }
    }

    /// Takes what happened at `now`.
    pub fn handle(&mut self, input: Input<'_>, now: Instant) {
        match input {
            Input::Received(mut bytes) => {
                while !self.closed {
                    match self.decoder.decode(&mut bytes) {
                        None => break,
                        Some(Ok(message)) => self.message(message, now),
                        Some(Err(error)) if error.is_fatal() => self.close(CloseReason::Decode(error)),
                        Some(Err(error)) => {
                            self.output.push_back(Output::Notice(Notice::BadMessage(error)));
                            self.send(ReaderId::FIRST, Body::Error(ErrorCode::GENERAL));
                            self.nonsense();
                        }
                    }
                }
            }
            Input::Transmit(token, command) => {
                let longest = self.extension.map_or(MAX_COMMAND, |client| client.command as usize);
                if command.as_bytes().len() > longest.min(MAX_EXTENDED_PAYLOAD) {
                    self.output.push_back(Output::Failed(token, Failure::TooLong));
                } else {
                    let apdu = Body::Apdu(Secret::from(command.as_bytes()));
                    self.ask(Some(token), Kind::Apdu, apdu, now);
                }
            }
            Input::PowerOn(token) => match (&self.card, self.extension) {
                (Some(atr), None) => self.output.push_back(Output::Powered(token, atr.clone())),
                _ => self.ask(Some(token), Kind::PowerOn, Body::PowerOn(Bytes::new()), now),
            },
            Input::PowerOff => {
                // Whoever waited has given up; what still comes is taken off the stream.
                for pending in &mut self.pending {
                    pending.token = None;
                }
                self.held = None;
                if self.card.is_some() && self.extension.is_some() && !self.is_powering_off() {
                    self.ask(None, Kind::PowerOff, Body::PowerOff, now);
                }
            }
        }
    }

    /// The next thing to do, if any.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.output.pop_front()
    }

    /// When [`handle_deadline`](Self::handle_deadline) is to be called next.
    pub fn next_deadline(&self) -> Option<Instant> {
        let pending = self.pending.iter().find(|pending| pending.token.is_some());
        pending.map(|pending| pending.deadline).or(self.held.as_ref().map(|held| held.deadline))
    }

    /// Fails what is due at `now`.
    pub fn handle_deadline(&mut self, now: Instant) {
        for pending in self.pending.iter_mut().filter(|pending| pending.deadline <= now) {
            if let Some(token) = pending.token.take() {
                self.output.push_back(Output::Failed(token, Failure::Mute));
            }
        }
        if let Some(held) = self.held.take_if(|held| held.deadline <= now) {
            self.output.push_back(Output::Failed(held.token, Failure::Mute));
        }
    }

    fn ask(&mut self, token: Option<Token>, kind: Kind, body: Body, now: Instant) {
        let failure = if self.card.is_none() || self.closed {
            Some(Failure::Removed)
        } else if self.held.is_some() || self.pending.iter().any(|pending| pending.token.is_some()) {
            Some(Failure::Busy)
        } else if self.pending.len() >= MOST_LATE || self.lost_answer(now) {
            Some(Failure::Mute)
        } else {
            None
        };
        let Some(failure) = failure else {
            let deadline = now + self.deadline;
            match token {
                Some(token) if self.is_powering_off() => {
                    self.held = Some(Held { token, deadline, kind, body });
                }
                _ => self.put(Pending { token, deadline, kind }, body),
            }
            return;
        };
        if let Some(token) = token {
            self.output.push_back(Output::Failed(token, failure));
        }
        if failure == Failure::Mute {
            self.close(CloseReason::Silent);
        }
    }

    fn put(&mut self, pending: Pending, body: Body) {
        self.pending.push_back(pending);
        self.send(ReaderId::FIRST, body);
    }

    /// The client has not acknowledged a power-off, and nothing was asked since.
    fn is_powering_off(&self) -> bool {
        self.pending.back().is_some_and(|last| last.kind == Kind::PowerOff)
    }

    /// An answer is so late that it will not come any more: later ones would all be taken for it.
    fn lost_answer(&self, now: Instant) -> bool {
        self.pending
            .front()
            .is_some_and(|oldest| oldest.token.is_none() && oldest.deadline + self.deadline <= now)
    }

    fn message(&mut self, Message { reader, body }: Message, now: Instant) {
        match body {
            Body::Init(init) if init.magic != MAGIC => self.close(CloseReason::WrongMagic),
            Body::Init(init) => {
                // What a card that is in was shown with holds for it.
                if self.card.is_none() {
                    self.extension = init.extension();
                }
                self.send(ReaderId::UNDEFINED, Body::Init(Init::ours(Some(Extension::FULL))));
            }
            Body::ReaderAdd(_) | Body::Atr(_) if self.refusing => {
                self.send(ReaderId::UNDEFINED, Body::Error(ErrorCode::CANNOT_ADD_READER));
                self.close(CloseReason::Occupied);
            }
            // Whatever id it asks for, the reader is the first and only one.
            Body::ReaderAdd(name) => {
                let name = name.slice(..name.len().min(255));
                self.output.push_back(Output::ReaderAdded(name));
                self.send(ReaderId::FIRST, Body::Error(ErrorCode::SUCCESS));
            }
            Body::ReaderRemove | Body::CardRemove => {
                self.remove_card();
                self.send(reader, Body::Error(ErrorCode::SUCCESS));
            }
            Body::Atr(bytes) => match card_atr(&bytes) {
                Ok(atr) => {
                    self.remove_card();
                    self.card = Some(atr.clone());
                    self.output.push_back(Output::Inserted(atr, self.extension));
                    self.send(reader, Body::Error(ErrorCode::SUCCESS));
                    // Taken all the same: the client believes that the card before is out.
                    if self.shown.replace(now).is_some_and(|before| now < before + BETWEEN_CARDS) {
                        self.nonsense();
                    }
                }
                Err(error) => {
                    self.output.push_back(Output::Notice(Notice::BadAtr(error)));
                    self.send(reader, Body::Error(ErrorCode::GENERAL));
                    self.nonsense();
                }
            },
            // Clients send one to end what an earlier client left undone.
            Body::Apdu(_) if self.pending.is_empty() && self.card.is_none() => {}
            Body::Apdu(bytes) => {
                let response = Response::parse(bytes.expose());
                self.answered(Kind::Apdu, |token| match response {
                    Ok(response) => Output::Answer(token, response),
                    Err(_) => Output::Failed(token, Failure::NoResponse),
                });
            }
            Body::PowerOn(bytes) if self.extension.is_some() => {
                let atr = card_atr(&bytes);
                self.answered(Kind::PowerOn, |token| match atr {
                    Ok(atr) => Output::Powered(token, atr),
                    Err(_) => Output::Failed(token, Failure::NoResponse),
                });
            }
            Body::PowerOff if self.extension.is_some() => {
                self.answered(Kind::PowerOff, |token| Output::Failed(token, Failure::NoResponse));
            }
            Body::Error(_) if self.pending.is_empty() => {}
            Body::Error(code) => {
                let kind = self.pending.front().map_or(Kind::Apdu, |pending| pending.kind);
                self.answered(kind, |token| Output::Failed(token, Failure::Refused(code)));
            }
            Body::FlushComplete => {}
            // How our own client looks for the start of a message.
            Body::Unknown(MessageType(0), payload) if payload.is_empty() => {
                self.send(reader, Body::Error(ErrorCode::GENERAL));
            }
            Body::Flush | Body::PowerOn(_) | Body::PowerOff | Body::Unknown(..) => {
                self.output.push_back(Output::Notice(Notice::Unexpected(body.message_type())));
                self.send(reader, Body::Error(ErrorCode::GENERAL));
                self.nonsense();
            }
        }
    }

    /// The oldest request is answered, if an answer of this kind is due.
    fn answered(&mut self, kind: Kind, outcome: impl FnOnce(Token) -> Output) {
        if self.pending.front().is_none_or(|pending| pending.kind != kind) {
            self.output.push_back(Output::Notice(Notice::Unasked));
            return self.nonsense();
        }
        if let Some(token) = self.pending.pop_front().and_then(|pending| pending.token) {
            self.output.push_back(outcome(token));
        }
        if !self.is_powering_off() {
            if let Some(Held { token, deadline, kind, body }) = self.held.take() {
                self.put(Pending { token: Some(token), deadline, kind }, body);
            }
        }
    }

    /// What was asked of the card fails; the client's answers to it are taken off the stream when they come.
    fn remove_card(&mut self) {
        let pending = self.pending.iter_mut().filter_map(|pending| pending.token.take());
        let held = self.held.take().map(|held| held.token);
        for token in pending.chain(held) {
            self.output.push_back(Output::Failed(token, Failure::Removed));
        }
        if self.card.take().is_some() {
            self.output.push_back(Output::Removed);
        }
    }

    fn send(&mut self, reader: ReaderId, body: Body) {
        // Nothing sent here is above the limit: commands are held to it.
        let limit = if self.extension.is_some() { MAX_EXTENDED_PAYLOAD } else { MAX_PAYLOAD };
        if let Ok(bytes) = codec::encode_up_to(limit, &Message::new(reader, body)) {
            self.output.push_back(Output::Send(bytes));
        }
    }

    fn nonsense(&mut self) {
        self.nonsense += 1;
        if self.nonsense > MOST_NONSENSE {
            self.close(CloseReason::TooMuchNonsense);
        }
    }

    fn close(&mut self, reason: CloseReason) {
        if !std::mem::replace(&mut self.closed, true) {
            self.remove_card();
            self.output.push_back(Output::Close(reason));
        }
    }
}

/// What a client's card answered to reset, right in every detail or not. Its length alone can make it none.
fn card_atr(bytes: &[u8]) -> Result<Atr, AtrError> {
    match bytes.len() {
        2..=MAX_ATR => Ok(Atr::from_card(bytes)),
        _ => Atr::parse(bytes),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::StatusWord;
    use crate::client::{self, Client, ClientConfig};

    fn atr() -> Bytes {
        Bytes::copy_from_slice(Atr::t0(b"card").unwrap().as_bytes())
    }

    struct Wire {
        host: Host,
        now: Instant,
    }

    impl Wire {
        fn new() -> Self {
            Self { host: Host::new(Duration::from_secs(20)), now: Instant::now() }
        }

        /// What the host does about a message of the client.
        fn say(&mut self, reader: u32, body: Body) -> Vec<String> {
            let bytes = codec::encode(&Message::new(ReaderId(reader), body)).unwrap();
            self.host.handle(Input::Received(bytes.expose()), self.now);
            self.outputs()
        }

        fn transmit(&mut self, token: u64, bytes: &[u8]) -> Vec<String> {
            let command = Command::parse(bytes).unwrap();
            self.host.handle(Input::Transmit(Token(token), command), self.now);
            self.outputs()
        }

        fn outputs(&mut self) -> Vec<String> {
            std::iter::from_fn(|| self.host.poll_output()).map(|output| describe(&output)).collect()
        }
    }

    fn describe(output: &Output) -> String {
        match output {
            Output::Send(bytes) => {
                let mut bytes = bytes.expose();
                let message = Decoder::new(MAX_PAYLOAD).decode(&mut bytes).unwrap().unwrap();
                match message.body {
                    Body::Error(code) => format!("{} for {}", code, message.reader),
                    body => format!("send {}", body.message_type()),
                }
            }
            Output::Inserted(atr, _) => format!("inserted {atr}"),
            Output::Powered(token, atr) => format!("powered {} {atr}", token.0),
            Output::Removed => "removed".into(),
            Output::ReaderAdded(name) => format!("reader {}", String::from_utf8_lossy(name)),
            Output::Answer(token, response) => format!("answer {} {}", token.0, response.status()),
            Output::Failed(token, failure) => format!("failed {} {failure}", token.0),
            Output::Notice(notice) => notice.to_string(),
            Output::Close(reason) => format!("close: {reason}"),
        }
    }

    fn ok() -> Body {
        Body::Apdu(Secret::from(&[0x90, 0][..]))
    }

    #[test]
    fn what_libcacards_vscclient_sends_is_served() {
        let mut wire = Wire::new();
        assert_eq!(wire.say(0, Body::Init(Init::ours(None))), ["send Init"]);
        assert_eq!(wire.say(0, Body::ReaderRemove), ["success for 0"]);
        assert_eq!(wire.say(0, Body::ReaderAdd(Bytes::new())), ["reader ", "success for 0"]);
        assert_eq!(wire.say(0, Body::Atr(atr())), ["inserted 3B84400163617264", "success for 0"]);
        assert_eq!(wire.transmit(1, &[0, 0xA4, 4, 0]), ["send APDU"]);
        assert_eq!(wire.say(0, ok()), ["answer 1 9000"]);
        assert_eq!(wire.say(0, Body::CardRemove), ["removed", "success for 0"]);
        assert_eq!(wire.transmit(2, &[0, 0xA4, 4, 0]), ["failed 2 the card was removed"]);
    }

    #[test]
    fn a_card_with_an_imperfect_atr_is_taken() {
        // A wrong TCK; bytes that follow the end; none of the historical bytes there.
        for atr in [&[0x3B, 0x82, 0x01, b'o', b'k', 0][..], &[0x3B, 0x00, 0x00], &[0x3F, 0x02]] {
            let (mut wire, hex) = (extended(), Atr::from_card(atr).to_string());
            let atr = Bytes::copy_from_slice(atr);
            assert!(wire.say(0, Body::Atr(atr.clone())).contains(&format!("inserted {hex}")));
            wire.host.handle(Input::PowerOn(Token(1)), wire.now);
            wire.outputs();
            assert_eq!(wire.say(0, Body::PowerOn(atr)), [format!("powered 1 {hex}")]);
        }
        for none in [&[][..], &[0x3B], &[0x3B; MAX_ATR + 1]] {
            let said = extended().say(0, Body::Atr(Bytes::copy_from_slice(none)));
            assert!(said[0].starts_with("ATR refused: ") && said[1] == "general error for 0", "{said:?}");
        }
    }

    #[test]
    fn a_late_answer_is_not_taken_for_the_next_one() {
        let mut wire = Wire::new();
        wire.say(0, Body::Atr(atr()));
        wire.transmit(1, &[0, 0xA4, 4, 0]);
        wire.now = wire.host.next_deadline().unwrap();
        wire.host.handle_deadline(wire.now);
        assert_eq!(wire.outputs(), ["failed 1 the client did not answer in time"]);
        wire.transmit(2, &[0, 0xB0, 0, 0]);
        assert!(wire.say(0, ok()).is_empty());
        assert_eq!(wire.say(0, ok()), ["answer 2 9000"]);
    }

    #[test]
    fn an_answer_of_a_removed_card_never_reaches_the_next() {
        let mut wire = Wire::new();
        wire.say(0, Body::Atr(atr()));
        wire.transmit(1, &[0, 0xA4, 4, 0]);
        let swapped = wire.say(0, Body::Atr(atr()));
        assert_eq!(swapped[..2], ["failed 1 the card was removed", "removed"]);
        wire.transmit(2, &[0, 0xB0, 0, 0]);
        assert!(wire.say(0, ok()).is_empty());
        assert_eq!(wire.say(0, ok()), ["answer 2 9000"]);
    }

    #[test]
    fn clients_that_lie_are_refused() {
        let mut wire = Wire::new();
        assert_eq!(
            wire.say(5, Body::Unknown(MessageType(77), Bytes::new())),
            ["unexpected type 0x4d message refused", "general error for 5"]
        );
        assert_eq!(
            wire.say(0, Body::Atr(Bytes::from_static(&[0x3B]))),
            ["ATR refused: ATR of 1 bytes ends before T0 at offset 1", "general error for 0"]
        );
        assert!(wire.say(0, ok()).is_empty());
        wire.say(0, Body::Atr(atr()));
        assert_eq!(wire.say(0, ok()), ["answer without a command ignored"]);
        let long = Command::build([0, 0xDB, 0, 0], &[0; 300], None).unwrap();
        assert!(wire.transmit(1, long.as_bytes())[0].contains("longer than what the client takes"));
        wire.transmit(2, &[0, 0xA4, 4, 0]);
        assert_eq!(wire.transmit(3, &[0, 0xA4, 4, 0]), ["failed 3 another command is under way"]);
        let magic = Init { magic: *b"XXXX", ..Init::ours(None) };
        assert!(wire.say(0, Body::Init(magic)).last().unwrap().starts_with("close: magic at offset 12"));
    }

    #[test]
    fn a_silent_client_is_left() {
        let mut wire = Wire::new();
        wire.say(0, Body::Atr(atr()));
        for token in 0..2 {
            wire.transmit(token, &[0, 0xA4, 4, 0]);
            wire.now += Duration::from_secs(20);
            wire.host.handle_deadline(wire.now);
        }
        wire.outputs();
        let last = wire.transmit(9, &[0, 0xA4, 4, 0]);
        assert!(last.last().unwrap().starts_with("close: the client leaves commands"), "{last:?}");
    }

    /// A host whose client speaks the extension and has shown a card.
    fn extended() -> Wire {
        let mut wire = Wire::new();
        wire.say(0, Body::Init(Init::ours(Some(Extension::FULL))));
        wire.say(0, Body::Atr(atr()));
        wire
    }

    #[test]
    fn resets_within_one_round_trip_are_one_for_the_client() {
        let mut wire = extended();
        assert_eq!(wire.transmit(0, &[0, 0xA4, 4, 0]), ["send APDU"]);
        wire.host.handle(Input::PowerOff, wire.now);
        assert_eq!(wire.outputs(), ["send PowerOff"]);
        for token in 1..100 {
            wire.host.handle(Input::PowerOn(Token(token)), wire.now);
            wire.host.handle(Input::PowerOff, wire.now);
        }
        wire.host.handle(Input::PowerOn(Token(100)), wire.now);
        assert!(wire.outputs().is_empty());
        assert!(wire.say(0, ok()).is_empty());
        assert_eq!(wire.say(0, Body::PowerOff), ["send PowerOn"]);
        assert_eq!(wire.say(0, Body::PowerOn(atr())), ["powered 100 3B84400163617264"]);
    }

    #[test]
    fn what_waits_for_a_power_off_fails_in_time_or_with_the_card() {
        let mut wire = extended();
        wire.host.handle(Input::PowerOff, wire.now);
        wire.host.handle(Input::PowerOn(Token(1)), wire.now);
        wire.outputs();
        assert_eq!(wire.transmit(2, &[0, 0xA4, 4, 0]), ["failed 2 another command is under way"]);
        wire.now = wire.host.next_deadline().unwrap();
        wire.host.handle_deadline(wire.now);
        assert_eq!(wire.outputs(), ["failed 1 the client did not answer in time"]);
        wire.host.handle(Input::PowerOn(Token(3)), wire.now);
        assert_eq!(wire.say(0, Body::CardRemove)[0], "failed 3 the card was removed");
        assert!(wire.say(0, Body::PowerOff).is_empty());
    }

    #[test]
    fn a_client_that_shows_card_after_card_is_left() {
        let mut wire = Wire::new();
        for _ in 0..=MOST_NONSENSE {
            wire.say(0, Body::Atr(atr()));
            wire.now += BETWEEN_CARDS;
        }
        let mut said = Vec::new();
        for _ in 0..=MOST_NONSENSE + 1 {
            said = wire.say(0, Body::Atr(atr()));
        }
        assert!(said.last().unwrap().starts_with("close: the client has sent more than 64"), "{said:?}");
    }

    /// The two ends of this crate with each other, the client plain or with the extension.
    fn both_ends(extension: Option<Extension>) -> Vec<String> {
        let mut now = Instant::now();
        let mut host = Host::new(Duration::from_secs(20));
        let card = || Atr::t1(b"card").unwrap();
        let config = ClientConfig { extension, ..ClientConfig::new("reader") };
        let mut client = Client::new(config, now);
        let mut seen = Vec::new();
        loop {
            let mut moved = false;
            while let Some(output) = client.poll_output() {
                moved = true;
                match output {
                    client::Output::Send(bytes) => host.handle(Input::Received(bytes.expose()), now),
                    client::Output::Transmit(token, _) => {
                        let response = Some(StatusWord::SUCCESS.into());
                        client.handle(client::Input::Answer(token, response), now);
                    }
                    client::Output::PowerOn(token) => {
                        seen.push("power on".to_owned());
                        client.handle(client::Input::Powered(token, Some(card())), now);
                    }
                    client::Output::PowerOff => seen.push("power off".to_owned()),
                    client::Output::Ready(_) => client.handle(client::Input::Inserted(card()), now),
                    client::Output::Notice(_) => {}
                    client::Output::Close(reason) => panic!("{reason}"),
                }
            }
            while let Some(output) = host.poll_output() {
                moved = true;
                seen.push(describe(&output));
                match output {
                    Output::Send(bytes) => {
                        seen.pop();
                        client.handle(client::Input::Received(bytes.expose()), now);
                    }
                    Output::Inserted(..) => host.handle(Input::PowerOn(Token(6)), now),
                    Output::Powered(..) => {
                        let command = Command::parse(&[0, 0xA4, 4, 0]).unwrap();
                        host.handle(Input::Transmit(Token(7), command), now);
                    }
                    Output::Answer(..) => host.handle(Input::PowerOff, now),
                    _ => {}
                }
            }
            if !moved {
                let Some(at) = client.next_deadline() else { return seen };
                if seen.iter().any(|line| line.starts_with("answer")) {
                    return seen;
                }
                now = at;
                client.handle_deadline(now);
            }
        }
    }

    #[test]
    fn both_ends_understand_each_other() {
        let atr = Atr::t1(b"card").unwrap();
        let shown = |rest: &[&str]| {
            [&[format!("inserted {atr}")], &*rest.iter().map(|line| line.to_string()).collect::<Vec<_>>()]
                .concat()
        };
        let seen = both_ends(None);
        let from = seen.iter().position(|line| line.starts_with("inserted")).unwrap();
        assert_eq!(seen[from..], shown(&[&format!("powered 6 {atr}"), "answer 7 9000"]));
        let seen = both_ends(Some(Extension::FULL));
        let from = seen.iter().position(|line| line.starts_with("inserted")).unwrap();
        let expected = ["power on", &format!("powered 6 {atr}"), "answer 7 9000", "power off"];
        assert_eq!(seen[from..], shown(&expected));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn any_bytes_from_a_client_end_in_order(
            chunks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..60), 0..20),
            messages in proptest::collection::vec((0u32..11, 0u32..3), 0..80),
        ) {
            let mut wire = Wire::new();
            wire.say(0, Body::Atr(atr()));
            for (step, (kind, reader)) in messages.into_iter().enumerate() {
                wire.transmit(step as u64, &[0, 0xA4, 4, 0]);
                let body = Body::Unknown(MessageType(kind), Bytes::from_static(&[0, 0, 0, 0]));
                wire.say(reader, body);
                prop_assert!(wire.host.pending.len() <= MOST_LATE);
            }
            for chunk in chunks {
                wire.host.handle(Input::Received(&chunk), wire.now);
                while wire.host.poll_output().is_some() {}
            }
        }
    }
}
