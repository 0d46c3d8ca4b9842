//! The client's end of a VSCard connection: the side that owns the card.
//!
//! [`Client`] is one connection as a state machine: bytes and events in, bytes and actions out; it does no I/O,
//! reads no clock and draws no random numbers. What it does beyond the message formats is what QEMU's passthru
//! device needs to stay healthy, as measured with QEMU 7.2:
//!
//! * **Alignment.** QEMU keeps a half message of a client that died and takes the next client's first bytes for
//!   its rest. Any byte but zero could end up in a length field and make it wait for gigabytes, after which no
//!   client can use the device again. So the first bytes are zeros: whatever they complete is short, and twelve of
//!   them are a message of their own (type 0), which QEMU refuses. A reply alone proves nothing, since it may
//!   belong to the half message. What proves a message boundary is that eleven more zeros are *not* answered and
//!   the twelfth is. Without a reply zeros are sent singly until one comes. A client that waits in QEMU's backlog
//!   behind another does the same; its zeros are refused when its turn comes, and the boundary is found as always.
//! * **Re-presenting the card.** The guest may hold an earlier client's card and wait for an answer. An answer of
//!   6F00 (ends that wait; dropped if there is none), half a second, CardRemove, one second, ATR is the order in
//!   which a Linux guest sees the failed transmission, a removal and an insertion.
//! * **One acknowledgement at a time.** QEMU's acknowledgements are told apart by their order alone.
//! * **Every APDU is answered**, at the latest by [`ClientConfig::answer_deadline`], in the order they came.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use bytes::Bytes;
use thiserror::Error;

use crate::codec::{self, DecodeError, Decoder};
use crate::message::{
    Body, ErrorCode, Extension, Init, MAGIC, MAX_EXTENDED_PAYLOAD, MAX_PAYLOAD, Message, MessageType,
    ReaderId,
};
use crate::{Atr, Command, Response, Secret, StatusWord, apdu};

/// How long the reply to a message of zeros may take before the stream is taken for misaligned.
const PROBE_WAIT: Duration = Duration::from_secs(2);
/// For this long eleven zeros must stay unanswered.
const ELEVEN_WAIT: Duration = Duration::from_millis(300);
/// Between single zero bytes while looking for the end of a half message.
const ZERO_PACE: Duration = Duration::from_millis(25);
/// Nothing is sent for this long after the first reply, so that a slow host has caught up.
const QUIET: Duration = Duration::from_millis(500);
/// Between single zero bytes when the very byte that a reply belongs to must be known.
const ZERO_PACE_EXACT: Duration = Duration::from_millis(250);
/// Zero bytes sent before the stream is left alone: more than the longest message a client sends (12 + 258)
/// and a header; a multiple of 12, so that a healthy host behind a backlog reads whole messages.
const MOST_ZEROS: u32 = 288;
/// Between an answer, such as the Error that fails a pending APDU, and CardRemove. QEMU does not give the guest one
/// that is followed at once.
const FAIL_TO_REMOVE: Duration = Duration::from_millis(500);
/// So long at most a guest that does not stop asking holds CardRemove up.
const MOST_FAILING: Duration = Duration::from_secs(2);
/// Between CardRemove and ATR; guests poll for a missing card about twice a second.
const REMOVE_TO_INSERT: Duration = Duration::from_secs(1);
/// For an acknowledgement.
const ACK_WAIT: Duration = Duration::from_secs(30);
/// For all of a graceful leave.
const LEAVE_WAIT: Duration = Duration::from_secs(3);
/// APDUs that may be unanswered; QEMU itself can hold no more.
const MOST_PENDING: usize = 128;
/// Messages that make no sense before the connection is given up.
const MOST_NONSENSE: u32 = 64;
/// Longest response QEMU's reader takes to a short APDU.
const MOST_RESPONSE: usize = 258;

/// What a [`Client`] needs to know.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// Name of the reader, sent with ReaderAdd; at most 255 bytes are sent.
    pub reader_name: String,
    /// By when every APDU is answered; the guest gives up after about 23 seconds.
    pub answer_deadline: Duration,
    /// The extension to offer; `None` for a plain client.
    pub extension: Option<Extension>,
}

impl ClientConfig {
    /// 15 seconds for an answer, the extension offered in full.
    pub fn new(reader_name: impl Into<String>) -> Self {
        Self {
            reader_name: reader_name.into(),
            answer_deadline: Duration::from_secs(15),
            extension: Some(Extension::FULL),
        }
    }
}

/// Names an APDU between [`Output::Transmit`] and [`Input::Answer`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token(u64);

/// What happens to a [`Client`].
pub enum Input<'a> {
    /// Bytes from the host.
    Received(&'a [u8]),
    /// A card is in and powered, or another one than before. With a host that speaks the extension it is
    /// powered only on [`Output::PowerOn`].
    Inserted(Atr),
    /// The card is gone.
    Removed,
    /// The card's response to [`Output::Transmit`]; `None` if it has none to give. Unknown tokens are ignored.
    Answer(Token, Option<Response>),
    /// The card's answer to [`Output::PowerOn`]; `None` if it cannot be powered. Unknown tokens are ignored.
    Powered(Token, Option<Atr>),
    /// The user wants to go: the card is taken out of the guest first.
    Leave,
}

/// What a [`Client`] wants done.
#[derive(Debug)]
pub enum Output {
    /// Write these bytes, in one piece.
    Send(Secret),
    /// Give this command to the card. The next one comes after its answer, or after its deadline.
    Transmit(Token, Command),
    /// The host took the reader: now a card can be shown with [`Input::Inserted`]. With the extension, as an
    /// APDU card with the host's limits and its own ATR; without it, as a T=0 card with short APDUs.
    Ready(Option<Extension>),
    /// Power the card up afresh, ending what it had before, and answer with [`Input::Powered`].
    PowerOn(Token),
    /// End the card's session. Its commands have been answered for.
    PowerOff,
    /// Tell the user.
    Notice(Notice),
    /// Write what is to be written, then close the stream. Nothing comes after this.
    Close(CloseReason),
}

/// News about a connection.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Notice {
    /// No reply yet.
    #[error("no reply from the host yet: another client may be connected to it, or it is starting")]
    Waiting,
    /// A half message of an earlier client is in the way.
    #[error("the host holds half a message of an earlier client; finding its end")]
    Resynchronising,
    /// The guest has the card.
    #[error("card inserted")]
    Inserted,
    /// The guest has no card any more.
    #[error("card removed")]
    Removed,
    /// The host does not take this ATR.
    #[error("the host refused the card's ATR: {0}")]
    AtrRefused(ErrorCode),
    /// The card did not answer in time; the guest was told so.
    #[error("the card gave no answer; the guest's command failed")]
    NotAnswered,
    /// An APDU that is none; the card did not see it.
    #[error("malformed command from the host: {0}")]
    BadCommand(apdu::CommandError),
    /// An APDU for a reader that does not exist.
    #[error("command for reader {0}, which does not exist, refused")]
    UnknownReader(ReaderId),
    /// A message that is not for a client, or makes no sense now.
    #[error("unexpected {0} message from the host ignored")]
    Unexpected(MessageType),
    /// A message that cannot be read.
    #[error("message ignored: {0}")]
    BadMessage(DecodeError),
}

/// Why a connection ends.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum CloseReason {
    /// By [`Input::Leave`], the guest having seen the card go.
    #[error("left")]
    Left,
    /// By [`Input::Leave`], but the host did not acknowledge in time.
    #[error("left, though the host did not acknowledge the card's removal")]
    LeftUnacknowledged,
    /// The stream cannot be followed.
    #[error("cannot follow the host: {0}")]
    Decode(DecodeError),
    /// The peer is no VSCard host.
    #[error("magic at offset 12 of the host's Init is not VSCD: not a VSCard host")]
    WrongMagic,
    /// The host takes no reader.
    #[error("the host refused the reader: {0}")]
    ReaderRefused(ErrorCode),
    /// The host has stopped answering.
    #[error("the host answered once and then no more: the start of a message cannot be found")]
    NoBoundary,
    /// No acknowledgement.
    #[error("the host did not acknowledge {0} within {n} s", n = ACK_WAIT.as_secs())]
    NoAck(MessageType),
    /// The host asks without waiting for answers.
    #[error("the host has sent more than {MOST_PENDING} commands without waiting for an answer")]
    TooManyPending,
    /// The host keeps sending what no host sends.
    #[error("the host has sent more than {MOST_NONSENSE} messages that make no sense")]
    TooMuchNonsense,
}

/// Finding out where in the stream a message starts. All that is sent meanwhile is zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Probe {
    /// A message of zeros is out.
    First,
    /// Zeros are going out one by one in search of a reply.
    Searching,
    /// A reply came; nothing is sent until a slow host has caught up.
    Quiet,
    /// Eleven zeros are out; an answer means that they completed something.
    Eleven,
    /// The twelfth is out; its answer is the proof.
    Twelfth,
    /// They completed something. Zeros are going out slowly; the next reply is for the last of them.
    Exact,
    /// Waiting for the host; Init is out as well, for hosts that pass over what they do not know.
    Parked,
}

#[derive(Debug)]
enum Link {
    Probing(Probe),
    Init,
    ReaderAdd,
    Up,
    Closed,
}

/// What the guest believes about the card.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slot {
    /// Whatever an earlier client left.
    Unknown,
    /// APDUs are failed; CardRemove goes a while after the last answer, and at the time kept in any case.
    Failing(Instant),
    /// CardRemove is out.
    Removing,
    /// No card; ATR may go at the time kept.
    Empty,
    /// ATR is out.
    Inserting,
    Present,
}

#[derive(Debug)]
struct Pending {
    token: Token,
    deadline: Instant,
    work: Work,
}

#[derive(Debug)]
enum Work {
    /// To be given to the card when its turn comes.
    Waiting(Command),
    /// The card has it.
    Given,
    /// Not for the card: the answer is known, but answers are told apart by their order.
    Known(StatusWord),
    /// For a reader that does not exist.
    Refused(ReaderId),
    /// The card is to be powered up when the turn comes.
    PowerOn,
    /// FlushComplete is due when all before it is answered.
    Flush,
}

/// One connection to a host, from the client's side.
pub struct Client {
    config: ClientConfig,
    decoder: Decoder,
    output: VecDeque<Output>,
    link: Link,
    /// Zeros sent so far.
    zeros: u32,
    /// Refusals of zeros that may still come, though Init was answered.
    refusals_due: u32,
    /// When the link's phase takes its next step.
    link_at: Option<Instant>,
    /// APDUs that came before the card could be presented, each owed an answer.
    owed: usize,
    slot: Slot,
    /// When the slot may take its next step.
    slot_at: Option<Instant>,
    /// When the host was last told an answer, or that there is none.
    answered_at: Option<Instant>,
    /// What the acknowledgement awaited belongs to, and until when it is awaited.
    ack: Option<(MessageType, Instant)>,
    reader: ReaderId,
    /// What the host announced, if both ends speak the extension.
    extension: Option<Extension>,
    /// The card that is to be shown; changes are worked off one after the other.
    wanted: Option<Atr>,
    /// A card of this connection has been shown and not yet taken away.
    shown: bool,
    /// Whether `wanted` is another insertion than the one being shown.
    swapped: bool,
    pending: VecDeque<Pending>,
    next_token: u64,
    nonsense: u32,
    leaving: Option<Instant>,
    told_waiting: bool,
}

impl Client {
    /// A client on a stream that was just opened. A card is shown after [`Output::Ready`].
    pub fn new(config: ClientConfig, now: Instant) -> Self {
        let mut client = Self {
            config,
            decoder: Decoder::new(apdu::MAX_COMMAND),
            output: VecDeque::new(),
            link: Link::Probing(Probe::First),
            zeros: 0,
            refusals_due: 0,
            link_at: Some(now + PROBE_WAIT),
            owed: 0,
            slot: Slot::Unknown,
            slot_at: None,
            answered_at: None,
            ack: None,
            reader: ReaderId::FIRST,
            wanted: None,
            extension: None,
            shown: false,
            swapped: false,
            pending: VecDeque::new(),
            next_token: 0,
            nonsense: 0,
            leaving: None,
            told_waiting: false,
        };
        client.send_zeros(12);
        client
    }

    /// Takes what happened at `now`.
    pub fn handle(&mut self, input: Input<'_>, now: Instant) {
        match input {
            Input::Received(bytes) => self.received(bytes, now),
            Input::Inserted(atr) => {
                self.swapped |= matches!(self.slot, Slot::Inserting | Slot::Present);
                self.wanted = Some(atr);
            }
            Input::Removed => self.wanted = None,
            Input::Answer(token, response) => self.answered(token, response, now),
            Input::Powered(token, atr) => self.powered(token, atr, now),
            Input::Leave => self.leave(now),
        }
        self.advance(now);
    }

    /// The next thing to do, if any.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.output.pop_front()
    }

    /// When [`handle_deadline`](Self::handle_deadline) is to be called next.
    pub fn next_deadline(&self) -> Option<Instant> {
        if matches!(self.link, Link::Closed) {
            return None;
        }
        let ack = self.ack.map(|(_, at)| at);
        let pending = self.pending.front().map(|pending| pending.deadline);
        [self.link_at, self.slot_at, ack, pending, self.leaving].into_iter().flatten().min()
    }

    /// Does what is due at `now`.
    pub fn handle_deadline(&mut self, now: Instant) {
        let due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        if due(self.leaving) {
            return self.close(CloseReason::LeftUnacknowledged);
        }
        if let Some((kind, _)) = self.ack.filter(|(_, at)| *at <= now) {
            return self.close(CloseReason::NoAck(kind));
        }
        if due(self.link_at) {
            self.link_due(now);
        }
        while self.pending.front().is_some_and(|pending| pending.deadline <= now) {
            self.pending.pop_front();
            self.notice(Notice::NotAnswered);
            self.send_error(now);
        }
        self.advance(now);
    }

    // ---- the stream -------------------------------------------------------------------------------------

    fn received(&mut self, mut bytes: &[u8], now: Instant) {
        while !matches!(self.link, Link::Closed) {
            match self.decoder.decode(&mut bytes) {
                None => return,
                Some(Ok(message)) => self.message(message, now),
                Some(Err(error)) if error.is_fatal() => self.close(CloseReason::Decode(error)),
                Some(Err(error)) => {
                    self.notice(Notice::BadMessage(error));
                    self.nonsense();
                }
            }
            self.advance(now);
        }
    }

    fn message(&mut self, message: Message, now: Instant) {
        let Message { reader, body } = message;
        match body {
            Body::Init(init) if init.magic != MAGIC => self.close(CloseReason::WrongMagic),
            Body::Apdu(bytes) => self.apdu(reader, &bytes, now),
            // QEMU sends an Init of its own when it starts or connects, beside the reply to ours.
            Body::Init(init) if matches!(self.link, Link::Init | Link::Probing(Probe::Parked)) => {
                self.extension = self.config.extension.and(init.extension());
                if matches!(self.link, Link::Probing(_)) {
                    self.refusals_due = self.zeros / 12;
                }
                self.link = Link::ReaderAdd;
                self.link_at = None;
                let name = self.config.reader_name.as_bytes();
                let name = Bytes::copy_from_slice(&name[..name.len().min(255)]);
                self.send_acked(ReaderId::UNDEFINED, Body::ReaderAdd(name), now);
            }
            Body::Error(code) => self.error(reader, code, now),
            Body::Init(_) => {
                if matches!(self.link, Link::Probing(Probe::Searching | Probe::Exact)) {
                    self.probe_answered(now);
                }
            }
            Body::Flush => self.wait_for(Work::Flush, now),
            Body::PowerOn(_) if self.extension.is_some() => self.power_on(now),
            Body::PowerOff if self.extension.is_some() => {
                self.fail_pending(now);
                self.output.push_back(Output::PowerOff);
                self.send(self.reader, Body::PowerOff);
            }
            other => {
                self.notice(Notice::Unexpected(other.message_type()));
                self.nonsense();
            }
        }
    }

    fn error(&mut self, reader: ReaderId, code: ErrorCode, now: Instant) {
        match self.link {
            Link::Probing(_) => self.probe_answered(now),
            Link::Init | Link::Closed => {}
            Link::ReaderAdd if self.refusals_due > 0 && !code.is_success() => self.refusals_due -= 1,
            Link::ReaderAdd | Link::Up => match self.ack.take() {
                Some((kind, _)) => self.acknowledged(kind, reader, code, now),
                None => self.nonsense(),
            },
        }
    }

    fn acknowledged(&mut self, kind: MessageType, reader: ReaderId, code: ErrorCode, now: Instant) {
        match kind {
            MessageType::READER_ADD if !code.is_success() => self.close(CloseReason::ReaderRefused(code)),
            MessageType::READER_ADD => {
                self.link = Link::Up;
                self.reader = reader;
                self.output.push_back(Output::Ready(self.extension));
                // One more than is known of: an earlier client may have owed an answer. QEMU drops an answer that
                // nothing waits for, while an Error would spoil the reader's next status report.
                for _ in 0..=std::mem::take(&mut self.owed) {
                    self.send_response(&StatusWord::NO_DIAGNOSIS.into(), now);
                }
                self.slot = Slot::Failing(now + MOST_FAILING);
            }
            MessageType::CARD_REMOVE => {
                self.slot = Slot::Empty;
                self.slot_at = Some(now + REMOVE_TO_INSERT);
                if std::mem::take(&mut self.shown) {
                    self.notice(Notice::Removed);
                }
            }
            MessageType::ATR if code.is_success() => {
                self.slot = Slot::Present;
                self.shown = true;
                self.notice(Notice::Inserted);
            }
            MessageType::ATR => {
                self.slot = Slot::Empty;
                // Another card that came meanwhile may fare better.
                if !std::mem::take(&mut self.swapped) {
                    self.wanted = None;
                }
                self.notice(Notice::AtrRefused(code));
            }
            MessageType::READER_REMOVE => self.close(CloseReason::Left),
            _ => {}
        }
    }

    // ---- alignment --------------------------------------------------------------------------------------

    fn send_zeros(&mut self, count: u32) {
        if count > 0 {
            self.zeros += count;
            self.output.push_back(Output::Send(Secret::new(vec![0; count as usize])));
        }
    }

    fn probe(&mut self, probe: Probe, next: Instant) {
        self.link = Link::Probing(probe);
        self.link_at = Some(next);
    }

    fn probe_answered(&mut self, now: Instant) {
        let Link::Probing(probe) = self.link else { return };
        match probe {
            Probe::First => {
                self.send_zeros(11);
                self.probe(Probe::Eleven, now + ELEVEN_WAIT);
            }
            Probe::Searching | Probe::Parked => {
                // A host that was only busy with another client has an aligned stream: whole messages keep it so.
                self.send_zeros((12 - self.zeros % 12) % 12);
                self.probe(Probe::Quiet, now + QUIET);
            }
            Probe::Quiet => {}
            Probe::Eleven => {
                self.notice(Notice::Resynchronising);
                self.probe(Probe::Exact, now + QUIET);
            }
            Probe::Twelfth | Probe::Exact => {
                self.link = Link::Init;
                self.link_at = None;
                self.ack = Some((MessageType::INIT, now + ACK_WAIT));
                self.send(ReaderId::FIRST, Body::Init(Init::ours(self.config.extension)));
            }
        }
    }

    fn link_due(&mut self, now: Instant) {
        self.link_at = None;
        let Link::Probing(probe) = self.link else { return };
        match probe {
            Probe::First | Probe::Twelfth => {
                if !std::mem::replace(&mut self.told_waiting, true) {
                    self.notice(Notice::Waiting);
                }
                self.probe(Probe::Searching, now);
            }
            Probe::Searching if self.zeros >= MOST_ZEROS && self.zeros % 12 == 0 => {
                self.link = Link::Probing(Probe::Parked);
                self.send(ReaderId::FIRST, Body::Init(Init::ours(self.config.extension)));
            }
            Probe::Searching => {
                self.send_zeros(1);
                self.probe(probe, now + ZERO_PACE);
            }
            Probe::Quiet => {
                self.send_zeros(11);
                self.probe(Probe::Eleven, now + ELEVEN_WAIT);
            }
            Probe::Eleven => {
                self.send_zeros(1);
                self.probe(Probe::Twelfth, now + PROBE_WAIT);
            }
            Probe::Exact if self.zeros >= 2 * MOST_ZEROS => self.close(CloseReason::NoBoundary),
            Probe::Exact => {
                self.send_zeros(1);
                self.probe(probe, now + ZERO_PACE_EXACT);
            }
            Probe::Parked => {}
        }
    }

    // ---- the card ---------------------------------------------------------------------------------------

    /// Moves the guest's idea of the card toward what is wanted, one acknowledged step at a time.
    fn advance(&mut self, now: Instant) {
        if !matches!(self.link, Link::Up) {
            return;
        }
        let due = self.slot_at.is_none_or(|at| at <= now);
        if due {
            self.slot_at = None;
        }
        if self.ack.is_none() {
            match self.slot {
                Slot::Present if self.wanted.is_none() || self.swapped || self.leaving.is_some() => {
                    self.fail_pending(now);
                    self.slot = Slot::Failing(now + MOST_FAILING);
                    return self.advance(now);
                }
                Slot::Failing(latest) => {
                    let removable = self.answered_at.map(|at| latest.min(at + FAIL_TO_REMOVE));
                    self.slot_at = removable.filter(|at| *at > now);
                    if self.slot_at.is_none() {
                        self.swapped = false;
                        self.slot = Slot::Removing;
                        self.send_acked(self.reader, Body::CardRemove, now);
                    }
                }
                Slot::Empty if self.leaving.is_some() => {
                    self.send_acked(self.reader, Body::ReaderRemove, now);
                }
                Slot::Empty if due => {
                    if let Some(atr) = &self.wanted {
                        let atr = Bytes::copy_from_slice(atr.as_bytes());
                        self.slot = Slot::Inserting;
                        self.send_acked(self.reader, Body::Atr(atr), now);
                    }
                }
                _ => {}
            }
        }
        self.next_command(now);
    }

    fn leave(&mut self, now: Instant) {
        match self.link {
            Link::Closed => {}
            Link::Up => self.leaving = Some(now + LEAVE_WAIT),
            _ => {
                if matches!(self.link, Link::Probing(_)) {
                    // Whole messages only, for whoever comes next.
                    self.send_zeros((12 - self.zeros % 12) % 12);
                }
                self.close(CloseReason::Left);
            }
        }
    }

    // ---- APDUs ------------------------------------------------------------------------------------------

    fn apdu(&mut self, reader: ReaderId, bytes: &Secret, now: Instant) {
        if !matches!(self.link, Link::Up) {
            self.owed += 1;
            if self.owed > MOST_PENDING {
                self.close(CloseReason::TooManyPending);
            }
            return;
        }
        if reader != self.reader {
            self.notice(Notice::UnknownReader(reader));
            self.wait_for(Work::Refused(reader), now);
            return self.nonsense();
        }
        if self.slot != Slot::Present {
            return self.send_error(now);
        }
        let work = match Command::parse(bytes.expose()) {
            Ok(command) => Work::Waiting(command),
            Err(error) => {
                self.notice(Notice::BadCommand(error));
                Work::Known(StatusWord::WRONG_LENGTH)
            }
        };
        self.wait_for(work, now);
    }

    fn wait_for(&mut self, work: Work, now: Instant) {
        if self.pending.len() >= MOST_PENDING {
            return self.close(CloseReason::TooManyPending);
        }
        let token = Token(self.next_token);
        self.next_token += 1;
        let deadline = now + self.config.answer_deadline;
        self.pending.push_back(Pending { token, deadline, work });
    }

    /// Nothing of what was asked of the card before counts any more.
    fn power_on(&mut self, now: Instant) {
        self.fail_pending(now);
        if self.slot == Slot::Present {
            self.wait_for(Work::PowerOn, now);
        } else {
            self.send_error(now);
        }
    }

    fn powered(&mut self, token: Token, atr: Option<Atr>, now: Instant) {
        if !self.take_front(token) {
            return;
        }
        match atr {
            Some(atr) => self.send(self.reader, Body::PowerOn(Bytes::copy_from_slice(atr.as_bytes()))),
            None => self.send_error(now),
        }
    }

    /// Tells the host of every command that it will get no answer.
    fn fail_pending(&mut self, now: Instant) {
        for pending in std::mem::take(&mut self.pending) {
            match pending.work {
                Work::Flush => self.send(self.reader, Body::FlushComplete),
                Work::Refused(reader) => self.send(reader, Body::Error(ErrorCode::GENERAL)),
                _ => self.send_error(now),
            }
        }
        // The card need not be powered any more, however often that was asked.
        self.output.retain(|output| !matches!(output, Output::PowerOn(_)));
    }

    fn next_command(&mut self, now: Instant) {
        while let Some(front) = self.pending.front_mut() {
            match std::mem::replace(&mut front.work, Work::Given) {
                Work::Given => return,
                Work::Waiting(command) => {
                    return self.output.push_back(Output::Transmit(front.token, command));
                }
                Work::Known(status) => {
                    self.pending.pop_front();
                    self.send_response(&status.into(), now);
                }
                Work::Refused(reader) => {
                    self.pending.pop_front();
                    self.send(reader, Body::Error(ErrorCode::GENERAL));
                }
                Work::Flush => {
                    self.pending.pop_front();
                    self.send(self.reader, Body::FlushComplete);
                }
                Work::PowerOn => return self.output.push_back(Output::PowerOn(front.token)),
            }
        }
    }

    /// Whether the oldest command is the one that `token` names; it is no longer waited for then.
    fn take_front(&mut self, token: Token) -> bool {
        let is_front = self.pending.front().is_some_and(|pending| pending.token == token);
        if is_front {
            self.pending.pop_front();
        }
        is_front
    }

    fn answered(&mut self, token: Token, response: Option<Response>, now: Instant) {
        if !self.take_front(token) {
            return;
        }
        let most = self
            .extension
            .map_or(MOST_RESPONSE, |host| host.response.min(MAX_EXTENDED_PAYLOAD as u32) as usize);
        match response {
            Some(response) if response.as_bytes().len() <= most => self.send_response(&response, now),
            _ => {
                self.notice(Notice::NotAnswered);
                self.send_error(now);
            }
        }
    }

    fn send_response(&mut self, response: &Response, now: Instant) {
        self.answered_at = Some(now);
        self.send(self.reader, Body::Apdu(Secret::from(response.as_bytes())));
    }

    /// Fails the oldest APDU that the host waits for.
    fn send_error(&mut self, now: Instant) {
        self.answered_at = Some(now);
        self.send(self.reader, Body::Error(ErrorCode::GENERAL));
    }

    // ---- small ------------------------------------------------------------------------------------------

    fn send(&mut self, reader: ReaderId, body: Body) {
        // Nothing sent here is above the limit: responses are held to it, all else is far below.
        let limit = if self.extension.is_some() { MAX_EXTENDED_PAYLOAD } else { MAX_PAYLOAD };
        if let Ok(bytes) = codec::encode_up_to(limit, &Message::new(reader, body)) {
            self.output.push_back(Output::Send(bytes));
        }
    }

    fn send_acked(&mut self, reader: ReaderId, body: Body, now: Instant) {
        self.ack = Some((body.message_type(), now + ACK_WAIT));
        self.send(reader, body);
    }

    fn notice(&mut self, notice: Notice) {
        self.output.push_back(Output::Notice(notice));
    }

    fn nonsense(&mut self) {
        self.nonsense += 1;
        if self.nonsense > MOST_NONSENSE {
            self.close(CloseReason::TooMuchNonsense);
        }
    }

    fn close(&mut self, reason: CloseReason) {
        if !matches!(self.link, Link::Closed) {
            self.link = Link::Closed;
            self.pending.clear();
            self.output.push_back(Output::Close(reason));
        }
    }
}

#[cfg(test)]
#[path = "client_tests.rs"]
mod tests;
