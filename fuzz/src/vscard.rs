//! Everything a host can say to a client and a client to a host, while cards and users do what they like; and both
//! ends with each other, with somebody in between.

use std::collections::HashSet;
use std::hash::Hash;
use std::time::{Duration, Instant};

use vscard_protocol::client::{self, Client, ClientConfig};
use vscard_protocol::codec::Decoder;
use vscard_protocol::host::{self, Host};
use vscard_protocol::message::{Body, Extension, MAX_EXTENDED_PAYLOAD, MAX_PAYLOAD, MessageType};
use vscard_protocol::{Atr, Command, Response, StatusWord, apdu};

use crate::input::Input;

/// Message types, and the two of the extension.
const KINDS: [u32; 13] = [7, 2, 1, 5, 3, 4, 6, 8, 9, 0x8000_0001, 0x8000_0002, 0, 77];

/// Does what `bytes` say.
pub(crate) fn run(bytes: &[u8]) {
    let input = &mut Input::new(bytes);
    let mode = input.byte();
    let mut now = Instant::now();
    // No end that has nothing to do: both wipe large buffers when they go.
    match mode % 3 {
        0 => {
            let mut client = ClientEnd::new(mode, now);
            steps(input, |input| client.step(input, &mut now));
            client.check_end(now);
        }
        1 => {
            let mut host = HostEnd::new(mode);
            steps(input, |input| host.step(input, &mut now));
            host.check_end(now);
        }
        _ => {
            let mut ends = Ends { client: ClientEnd::new(mode, now), host: HostEnd::new(mode) };
            steps(input, |input| ends.step(input, &mut now));
            ends.client.check_end(now);
            ends.host.check_end(now);
        }
    }
}

fn steps(input: &mut Input<'_>, mut step: impl FnMut(&mut Input<'_>)) {
    for _ in 0..1000 {
        if input.is_empty() {
            return;
        }
        step(input);
    }
}

/// One message, whatever its payload.
fn message(kind: u32, reader: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = [kind, reader, payload.len() as u32].map(u32::to_be_bytes).concat();
    bytes.extend(payload);
    bytes
}

fn any_message(input: &mut Input<'_>) -> Vec<u8> {
    let (kind, reader) = (input.choose(&KINDS), input.choose(&[0, 0, 1, u32::MAX]));
    message(kind, reader, &input.block())
}

/// An Init that makes sense, with the extension or without.
fn init(input: &mut Input<'_>) -> Vec<u8> {
    let choice = input.byte();
    let mut payload = b"VSCD\0\0\0\x02".to_vec();
    payload.extend(u32::from(choice & 1).to_be_bytes());
    if choice & 1 != 0 {
        let sizes = [MAX_PAYLOAD as u32, 0, 1, 261, 258, 65_544, u32::MAX];
        payload.extend([input.choose(&sizes), input.choose(&sizes)].map(u32::to_be_bytes).concat());
    }
    message(1, 0, &payload)
}

fn response(input: &mut Input<'_>) -> Response {
    match input.byte() % 4 {
        0 => StatusWord::SUCCESS.into(),
        1 => Response::new(&input.block(), StatusWord::SUCCESS),
        2 => Response::new(&vec![0xA5; input.word().into()], StatusWord::SUCCESS),
        _ => Response::new(&vec![0xA5; apdu::MAX_RESPONSE - 2], StatusWord::SUCCESS),
    }
}

fn atr(input: &mut Input<'_>) -> Option<Atr> {
    match input.byte() % 4 {
        0 => Atr::t1(b"card").ok(),
        1 => Atr::t0(b"another").ok(),
        2 => Atr::parse(&input.block()).ok(),
        _ => None,
    }
}

/// `bytes` are one whole message that the other end can read.
fn check_message(bytes: &[u8]) -> MessageType {
    let (mut decoder, mut rest) = (Decoder::new(bytes.len().min(MAX_EXTENDED_PAYLOAD)), bytes);
    let message = decoder.decode(&mut rest).expect("a whole message").expect("a message");
    assert!(rest.is_empty() && !decoder.in_message(), "more than a message");
    if let Body::Apdu(bytes) = &message.body {
        assert!(bytes.len() <= apdu::MAX_COMMAND);
    }
    message.body.message_type()
}

/// What was asked under a token and is not answered.
struct Asked<T> {
    open: HashSet<T>,
    /// All there ever were, the newest last.
    all: Vec<T>,
}

impl<T: Copy + Eq + Hash> Asked<T> {
    fn new() -> Self {
        Self { open: HashSet::new(), all: Vec::new() }
    }

    fn ask(&mut self, token: T) {
        assert!(!self.all.contains(&token), "a token twice");
        self.open.insert(token);
        self.all.push(token);
    }

    /// The newest, as long as the byte is 0.
    fn pick(&self, back: u8) -> Option<T> {
        self.all.iter().rev().nth(usize::from(back)).or(self.all.last()).copied()
    }
}

// ---- the client's end -----------------------------------------------------------------------------------

struct ClientEnd {
    client: Client,
    asked: Asked<client::Token>,
    is_closed: bool,
    /// For the other end.
    sent: Vec<u8>,
}

impl ClientEnd {
    fn new(mode: u8, now: Instant) -> Self {
        let extension = match mode >> 6 {
            0 | 1 => Some(Extension::FULL),
            2 => Some(Extension { command: 261, response: 258 }),
            _ => None,
        };
        let config = ClientConfig { extension, ..ClientConfig::new("x".repeat(usize::from(mode) * 2)) };
        let client = Client::new(config, now);
        let mut end = Self { client, asked: Asked::new(), is_closed: false, sent: Vec::new() };
        end.poll(0);
        end
    }

    fn step(&mut self, input: &mut Input<'_>, now: &mut Instant) {
        let received = match input.byte() % 12 {
            0 => input.block(),
            1 | 2 => any_message(input),
            // What brings a connection up, and what is asked then.
            3 => init(input),
            4 => message(2, 0, &[0, 0, 0, input.byte() % 3]),
            5 | 6 => message(7, 0, &input.block()),
            _ => return self.own_step(input, now),
        };
        self.receive(&received, *now);
    }

    /// What the host has no part in.
    fn own_step(&mut self, input: &mut Input<'_>, now: &mut Instant) {
        let event = match input.byte() % 8 {
            0 => match atr(input) {
                Some(atr) => client::Input::Inserted(atr),
                None => client::Input::Removed,
            },
            1 | 2 => {
                let (back, answered) = (input.byte(), input.byte() % 4 != 3);
                let Some(token) = self.asked.pick(back) else { return };
                client::Input::Answer(token, answered.then(|| response(input)))
            }
            3 => {
                let Some(token) = self.asked.pick(input.byte()) else { return };
                client::Input::Powered(token, atr(input))
            }
            4 if input.byte() % 4 == 3 => client::Input::Leave,
            // Straight to the next thing that is due.
            5 | 6 => {
                if let Some(at) = self.client.next_deadline() {
                    *now = at.max(*now);
                }
                return self.pass(*now);
            }
            _ => {
                *now += Duration::from_millis(input.word().into());
                return self.pass(*now);
            }
        };
        self.client.handle(event, *now);
        self.poll(0);
    }

    fn receive(&mut self, bytes: &[u8], now: Instant) {
        self.client.handle(client::Input::Received(bytes), now);
        self.poll(bytes.len());
    }

    fn pass(&mut self, now: Instant) {
        for _ in 0..1000 {
            if self.client.next_deadline().is_none_or(|at| at > now) {
                return;
            }
            self.client.handle_deadline(now);
            self.poll(0);
        }
        panic!("a deadline that stays due");
    }

    fn poll(&mut self, received: usize) {
        let (mut count, mut given) = (0, 0);
        while let Some(output) = self.client.poll_output() {
            assert!(!self.is_closed, "something after the end: {output:?}");
            count += 1;
            match output {
                client::Output::Send(bytes) => {
                    // Zeros look for the start of a message.
                    if bytes.expose().iter().any(|byte| *byte != 0) {
                        let kind = check_message(bytes.expose());
                        assert!(kind != MessageType(0));
                    } else {
                        assert!(bytes.len() <= 12);
                    }
                    self.sent.extend_from_slice(bytes.expose());
                }
                client::Output::Transmit(token, command) => {
                    assert!(command.as_bytes().len() <= apdu::MAX_COMMAND);
                    given += 1;
                    self.asked.ask(token);
                }
                client::Output::PowerOn(token) => {
                    given += 1;
                    self.asked.ask(token);
                }
                client::Output::Close(_) => self.is_closed = true,
                client::Output::Ready(_) | client::Output::PowerOff | client::Output::Notice(_) => {}
            }
        }
        // Each message of 12 bytes or more has its one answer and perhaps a notice; what was waiting may fail with it.
        let most = 2 * (received / 12 + 1) + 2 * 128 + 8;
        assert!(count <= most, "{count} outputs for {received} bytes");
        assert!(given <= received / 12 + 2, "{given} commands at once");
    }

    /// Left alone, it ends or has nothing due.
    fn check_end(&mut self, mut now: Instant) {
        self.client.handle(client::Input::Leave, now);
        self.poll(0);
        for _ in 0..2000 {
            let Some(at) = self.client.next_deadline() else { break };
            now = at.max(now);
            self.pass(now);
        }
        assert!(self.is_closed, "a client that leaves has not left");
        assert!(self.client.next_deadline().is_none());
    }
}

// ---- the host's end -------------------------------------------------------------------------------------

struct HostEnd {
    host: Host,
    asked: Asked<u64>,
    has_card: bool,
    is_closed: bool,
    sent: Vec<u8>,
}

impl HostEnd {
    fn new(mode: u8) -> Self {
        let host = if mode >> 4 == 9 { Host::refusing() } else { Host::new(Duration::from_secs(20)) };
        Self { host, asked: Asked::new(), has_card: false, is_closed: false, sent: Vec::new() }
    }

    fn step(&mut self, input: &mut Input<'_>, now: &mut Instant) {
        let received = match input.byte() % 12 {
            0 => input.block(),
            1 | 2 => any_message(input),
            3 => init(input),
            4 => {
                let kind = input.choose(&[5, 0x8000_0001]);
                let atr = atr(input).map_or_else(Vec::new, |atr| atr.as_bytes().to_vec());
                message(kind, 0, &atr)
            }
            5 | 6 => message(7, 0, response(input).as_bytes()),
            _ => return self.own_step(input, now),
        };
        self.receive(&received, *now);
    }

    /// What the client has no part in.
    fn own_step(&mut self, input: &mut Input<'_>, now: &mut Instant) {
        let token = host::Token(self.asked.all.len() as u64);
        let event = match input.byte() % 8 {
            0..=2 => {
                let command = match input.byte() % 4 {
                    0 => Command::build([0, 0xA4, 4, 0], &input.block(), Some(256)),
                    1 => {
                        Command::build([0, 0xDB, 0x3F, 0xFF], &vec![0xA5; input.word().into()], Some(65_536))
                    }
                    _ => Command::parse(&input.block()),
                };
                let Ok(command) = command else { return };
                self.asked.ask(token.0);
                host::Input::Transmit(token, command)
            }
            3 => {
                self.asked.ask(token.0);
                host::Input::PowerOn(token)
            }
            4 => {
                // Nothing asked before gets an outcome.
                self.asked.open.clear();
                host::Input::PowerOff
            }
            5 => {
                if let Some(at) = self.host.next_deadline() {
                    *now = at.max(*now);
                }
                return self.pass(*now);
            }
            _ => {
                *now += Duration::from_millis(input.word().into());
                return self.pass(*now);
            }
        };
        self.host.handle(event, *now);
        self.poll(0);
    }

    fn receive(&mut self, bytes: &[u8], now: Instant) {
        self.host.handle(host::Input::Received(bytes), now);
        self.poll(bytes.len());
    }

    fn pass(&mut self, now: Instant) {
        if self.host.next_deadline().is_some_and(|at| at <= now) {
            self.host.handle_deadline(now);
        }
        assert!(self.host.next_deadline().is_none_or(|at| at > now), "a deadline that stays due");
        self.poll(0);
    }

    fn outcome(&mut self, host::Token(token): host::Token) {
        assert!(self.asked.open.remove(&token), "an outcome of {token}, which nobody waits for");
    }

    fn poll(&mut self, received: usize) {
        let mut count = 0;
        while let Some(output) = self.host.poll_output() {
            count += 1;
            match output {
                // What is asked of a connection that is closed fails at once.
                host::Output::Failed(token, _) => self.outcome(token),
                other if self.is_closed => panic!("something after the end: {other:?}"),
                host::Output::Send(bytes) => {
                    check_message(bytes.expose());
                    self.sent.extend_from_slice(bytes.expose());
                }
                host::Output::Answer(token, _) => self.outcome(token),
                host::Output::Powered(token, _) => self.outcome(token),
                host::Output::Inserted(..) => {
                    assert!(!self.has_card, "a card in a slot that has one");
                    self.has_card = true;
                }
                host::Output::Removed => {
                    assert!(self.has_card, "no card to remove");
                    self.has_card = false;
                }
                host::Output::ReaderAdded(name) => assert!(name.len() <= 255),
                host::Output::Notice(_) => {}
                host::Output::Close(_) => self.is_closed = true,
            }
        }
        assert!(!self.is_closed || !self.has_card, "a closed connection with a card");
        assert!(count <= 4 * (received / 12 + 1) + 8, "{count} outputs for {received} bytes");
        // One at a time; the others are refused.
        assert!(self.asked.open.len() <= 1, "{} commands at once", self.asked.open.len());
    }

    /// Nobody waits for ever.
    fn check_end(&mut self, now: Instant) {
        self.pass(now + Duration::from_secs(3600));
        assert!(self.asked.open.is_empty() && self.host.next_deadline().is_none(), "a command without end");
    }
}

// ---- both -----------------------------------------------------------------------------------------------

struct Ends {
    client: ClientEnd,
    host: HostEnd,
}

impl Ends {
    fn step(&mut self, input: &mut Input<'_>, now: &mut Instant) {
        match input.byte() % 8 {
            0 => self.client.step(input, now),
            1 => self.host.step(input, now),
            2 | 3 => self.client.own_step(input, now),
            4 | 5 => self.host.own_step(input, now),
            // All that is under way, with a byte of it changed once in a while.
            6 => {
                let (change, at, whose) = (input.byte(), usize::from(input.word()), input.byte() % 2);
                let stream = if whose == 0 { &mut self.client.sent } else { &mut self.host.sent };
                if let Some(byte) = stream.get_mut(at) {
                    *byte ^= change;
                }
                self.deliver(*now);
            }
            _ => self.deliver(*now),
        }
        // One does not know of the other's time.
        self.client.pass(*now);
        self.host.pass(*now);
    }

    fn deliver(&mut self, now: Instant) {
        let to_host = std::mem::take(&mut self.client.sent);
        self.host.receive(&to_host, now);
        let to_client = std::mem::take(&mut self.host.sent);
        self.client.receive(&to_client, now);
    }
}
