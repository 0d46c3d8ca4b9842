//! The client against a model of QEMU's passthru device, as measured with QEMU 7.2.

use proptest::prelude::*;

use super::*;
use crate::message::{HEADER, MAX_PAYLOAD};

/// QEMU's end: what it answers to which message, and what makes it deaf for ever.
#[derive(Default)]
struct Qemu {
    buffer: Vec<u8>,
    deaf: bool,
    to_client: Vec<u8>,
    card: Option<Vec<u8>>,
    /// What the guest saw happen.
    seen: Vec<String>,
    /// Not QEMU, but a host that speaks the extension.
    extension: Option<Extension>,
}

impl Qemu {
    fn reply(&mut self, reader: u32, body: Body) {
        let message = Message::new(ReaderId(reader), body);
        self.to_client.extend_from_slice(codec::encode(&message).unwrap().expose());
    }

    fn feed(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
        while !self.deaf && self.buffer.len() >= HEADER {
            let word = |at: usize| u32::from_be_bytes(self.buffer[at..at + 4].try_into().unwrap());
            let (kind, reader, length) = (word(0), word(4), word(8) as usize);
            if length > MAX_PAYLOAD {
                self.deaf = true;
            }
            if self.buffer.len() < HEADER + length {
                return;
            }
            let payload: Vec<u8> = self.buffer.drain(..HEADER + length).skip(HEADER).collect();
            match kind {
                1 => self.reply(u32::MAX, Body::Init(Init::ours(self.extension))),
                2 => self.seen.push("failed".into()),
                3 => self.reply(0, Body::Error(ErrorCode::SUCCESS)),
                4 => {
                    self.card = None;
                    self.seen.push("reader removed".into());
                    self.reply(reader, Body::Error(ErrorCode::SUCCESS));
                }
                5 if Atr::parse(&payload).is_ok() => {
                    self.card = Some(payload);
                    self.seen.push("inserted".into());
                    self.reply(reader, Body::Error(ErrorCode::SUCCESS));
                }
                6 => {
                    self.card = None;
                    self.seen.push("removed".into());
                    self.reply(reader, Body::Error(ErrorCode::SUCCESS));
                }
                7 => self.seen.push(format!("answer {}", hex(&payload))),
                0x8000_0001 => self.seen.push(format!("powered {}", hex(&payload))),
                0x8000_0002 => self.seen.push("unpowered".into()),
                _ => self.reply(reader, Body::Error(ErrorCode::GENERAL)),
            }
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02X}")).collect()
}

/// Client and model with a clock of their own.
struct Bench {
    client: Client,
    qemu: Qemu,
    now: Instant,
    /// Bytes to a host that does not read yet.
    backlog: Option<Vec<u8>>,
    commands: Vec<(Token, Command)>,
    notices: Vec<Notice>,
    closed: Option<CloseReason>,
    extension: Option<Option<Extension>>,
    power_ons: Vec<Token>,
    power_offs: u32,
}

impl Bench {
    fn new(qemu: Qemu) -> Self {
        let now = Instant::now();
        let client = Client::new(ClientConfig::new("test"), now);
        Self {
            client,
            qemu,
            now,
            backlog: None,
            commands: vec![],
            notices: vec![],
            closed: None,
            extension: None,
            power_ons: vec![],
            power_offs: 0,
        }
    }

    fn pump(&mut self) {
        loop {
            while let Some(output) = self.client.poll_output() {
                match output {
                    Output::Send(bytes) => match &mut self.backlog {
                        Some(backlog) => backlog.extend_from_slice(bytes.expose()),
                        None => self.qemu.feed(bytes.expose()),
                    },
                    Output::Transmit(token, command) => self.commands.push((token, command)),
                    Output::Ready(extension) => {
                        self.extension = Some(extension);
                        self.client.handle(Input::Inserted(atr()), self.now);
                    }
                    Output::PowerOn(token) => self.power_ons.push(token),
                    Output::PowerOff => self.power_offs += 1,
                    Output::Notice(notice) => self.notices.push(notice),
                    Output::Close(reason) => self.closed = Some(reason),
                }
            }
            let bytes = std::mem::take(&mut self.qemu.to_client);
            if bytes.is_empty() {
                return;
            }
            self.client.handle(Input::Received(&bytes), self.now);
        }
    }

    fn run_until(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        self.pump();
        for _ in 0..2000 {
            if done(self) {
                return;
            }
            let Some(at) = self.client.next_deadline() else { break };
            self.now = self.now.max(at);
            self.client.handle_deadline(self.now);
            self.pump();
        }
        panic!(
            "{what} never happened: {:?}, {:?}, deaf {}",
            self.client.link, self.qemu.seen, self.qemu.deaf
        );
    }

    fn present(qemu: Qemu) -> Self {
        let mut bench = Self::new(qemu);
        bench.run_until("insertion", |bench| bench.client.slot == Slot::Present);
        bench.qemu.seen.clear();
        bench
    }

    fn apdu(&mut self, bytes: &[u8]) {
        self.qemu.reply(0, Body::Apdu(Secret::from(bytes)));
        self.pump();
    }
}

fn atr() -> Atr {
    Atr::t0(b"test").unwrap()
}

#[test]
fn a_healthy_host_sees_the_order_that_a_guest_needs() {
    let mut bench = Bench::new(Qemu::default());
    let start = bench.now;
    bench.run_until("insertion", |bench| bench.client.slot == Slot::Present);
    assert_eq!(bench.qemu.seen, ["answer 6F00", "removed", "inserted"]);
    assert_eq!(bench.now - start, ELEVEN_WAIT + FAIL_TO_REMOVE + REMOVE_TO_INSERT);
    assert_eq!(bench.notices, [Notice::Inserted]);
    assert_eq!(bench.extension, Some(None));
}

#[test]
fn an_unasked_init_does_no_harm() {
    let mut qemu = Qemu::default();
    qemu.reply(u32::MAX, Body::Init(Init::ours(None)));
    let mut bench = Bench::present(qemu);
    bench.qemu.reply(u32::MAX, Body::Init(Init::ours(None)));
    bench.pump();
    assert_eq!((bench.client.slot, &bench.closed), (Slot::Present, &None));
}

/// Every message a client sends, cut at every byte, must leave a stream that the next client gets in order.
#[test]
fn any_cut_message_is_overcome() {
    let bodies = [
        Body::Init(Init::ours(None)),
        Body::Error(ErrorCode::GENERAL),
        Body::ReaderAdd(Bytes::from_static(b"Virtual Reader")),
        Body::ReaderRemove,
        Body::Atr(Bytes::copy_from_slice(atr().as_bytes())),
        Body::CardRemove,
        Body::Apdu(Secret::new(vec![0x90; 258])),
        Body::Unknown(MessageType(0), Bytes::new()),
        Body::FlushComplete,
    ];
    for body in bodies {
        let wire = codec::encode(&Message::new(ReaderId(0), body)).unwrap();
        for cut in 1..wire.len() {
            let mut qemu = Qemu::default();
            qemu.feed(&wire.expose()[..cut]);
            let mut bench = Bench::new(qemu);
            bench.run_until(&format!("{cut} {wire:?}"), |bench| bench.client.slot == Slot::Present);
            assert!(!bench.qemu.deaf && bench.qemu.buffer.is_empty(), "cut after {cut}");
            assert!(bench.notices.contains(&Notice::Inserted));
        }
    }
}

#[test]
fn a_client_waits_its_turn_in_the_backlog_and_does_not_harm_the_stream() {
    for wait in [1, 3, 5, 9, 60, 4000] {
        let mut bench = Bench::new(Qemu::default());
        bench.backlog = Some(Vec::new());
        let until = bench.now + Duration::from_secs(wait);
        bench.pump();
        while let Some(at) = bench.client.next_deadline().filter(|at| *at < until) {
            bench.now = at;
            bench.client.handle_deadline(at);
            bench.pump();
        }
        bench.now = until;
        let sent = bench.backlog.take().unwrap();
        assert!(sent.len() < 512);
        bench.qemu.feed(&sent);
        bench.run_until("insertion", |bench| bench.client.slot == Slot::Present);
        assert!(bench.qemu.buffer.is_empty() && !bench.qemu.deaf, "after {wait} s");
        // Leaving while it waits must not harm it either.
        let mut early = Bench::new(Qemu::default());
        early.backlog = Some(Vec::new());
        let until = early.now + Duration::from_secs(wait);
        early.pump();
        while let Some(at) = early.client.next_deadline().filter(|at| *at < until) {
            early.now = at;
            early.client.handle_deadline(at);
            early.pump();
        }
        early.client.handle(Input::Leave, until);
        early.pump();
        assert_eq!(early.closed, Some(CloseReason::Left));
        let sent = early.backlog.take().unwrap();
        early.qemu.feed(&sent);
        assert!(early.qemu.buffer.is_empty());
    }
}

#[test]
fn a_host_that_passes_over_unknown_messages_is_served_too() {
    let mut bench = Bench::new(Qemu::default());
    bench.backlog = Some(Vec::new());
    bench.run_until("Init", |bench| matches!(bench.client.link, Link::Probing(Probe::Parked)));
    bench.backlog = None;
    bench.qemu.reply(u32::MAX, Body::Init(Init::ours(None)));
    bench.run_until("insertion", |bench| bench.client.slot == Slot::Present);
}

#[test]
fn apdus_are_answered_one_after_the_other() {
    let mut bench = Bench::present(Qemu::default());
    bench.apdu(&[0, 0xA4, 4, 0]);
    bench.apdu(&[0, 0xA4]);
    bench.apdu(&[0, 0xB0, 0, 0]);
    assert_eq!(bench.commands.len(), 1);
    let (token, _) = bench.commands[0];
    bench.client.handle(Input::Answer(token, Some(StatusWord::SUCCESS.into())), bench.now);
    bench.pump();
    assert_eq!(bench.qemu.seen, ["answer 9000", "answer 6700"]);
    let (token, command) = &bench.commands[1];
    assert_eq!(command.ins(), 0xB0);
    bench.client.handle(Input::Answer(*token, None), bench.now);
    bench.pump();
    assert_eq!(bench.qemu.seen[2], "failed");
}

#[test]
fn a_silent_card_is_answered_for_in_time_and_its_late_answer_dropped() {
    let mut bench = Bench::present(Qemu::default());
    let start = bench.now;
    bench.apdu(&[0, 0xA4, 4, 0]);
    bench.run_until("deadline", |bench| !bench.qemu.seen.is_empty());
    assert_eq!(bench.qemu.seen, ["failed"]);
    assert_eq!(bench.now - start, Duration::from_secs(15));
    let (token, _) = bench.commands[0];
    bench.client.handle(Input::Answer(token, Some(StatusWord::SUCCESS.into())), bench.now);
    bench.pump();
    assert_eq!(bench.qemu.seen.len(), 1);
}

#[test]
fn removal_fails_what_is_pending_first() {
    let mut bench = Bench::present(Qemu::default());
    bench.apdu(&[0, 0xA4, 4, 0]);
    bench.client.handle(Input::Removed, bench.now);
    bench.pump();
    assert_eq!(bench.qemu.seen, ["failed"]);
    bench.run_until("removal", |bench| bench.qemu.card.is_none());
    bench.client.handle(Input::Inserted(atr()), bench.now);
    bench.run_until("insertion", |bench| bench.client.slot == Slot::Present);
    assert_eq!(bench.qemu.seen, ["failed", "removed", "inserted"]);
}

/// A card that is gone says so first, and then that it is gone.
#[test]
fn removal_leaves_time_for_the_last_answer() {
    for answer in [None, Some(StatusWord::SUCCESS.into())] {
        let mut bench = Bench::present(Qemu::default());
        bench.apdu(&[0, 0xA4, 4, 0]);
        let (token, _) = bench.commands[0];
        bench.client.handle(Input::Answer(token, answer), bench.now);
        bench.client.handle(Input::Removed, bench.now);
        let start = bench.now;
        bench.pump();
        assert_eq!(bench.qemu.seen.len(), 1);
        bench.run_until("removal", |bench| bench.qemu.card.is_none());
        assert_eq!(bench.now - start, FAIL_TO_REMOVE);
    }
}

#[test]
fn removal_leaves_time_for_the_answer_to_a_malformed_command() {
    let mut bench = Bench::present(Qemu::default());
    bench.apdu(&[0, 0xA4]);
    bench.client.handle(Input::Removed, bench.now);
    let start = bench.now;
    bench.pump();
    assert_eq!(bench.qemu.seen, ["answer 6700"]);
    bench.run_until("removal", |bench| bench.qemu.card.is_none());
    assert_eq!(bench.now - start, FAIL_TO_REMOVE);
}

#[test]
fn removal_leaves_time_for_a_guest_that_tries_again_but_not_for_ever() {
    let pace = Duration::from_millis(400);
    for (tries, expected) in [(2, 2 * pace + FAIL_TO_REMOVE), (100, MOST_FAILING)] {
        let mut bench = Bench::present(Qemu::default());
        bench.apdu(&[0, 0xA4, 4, 0]);
        let start = bench.now;
        bench.client.handle(Input::Removed, start);
        for _ in 0..tries {
            bench.now += pace;
            bench.client.handle_deadline(bench.now);
            bench.pump();
            if bench.qemu.card.is_none() {
                break;
            }
            bench.apdu(&[0, 0xA4, 4, 0]);
        }
        bench.run_until("removal", |bench| bench.qemu.card.is_none());
        assert_eq!(bench.now - start, expected);
    }
}

#[test]
fn another_card_is_a_removal_and_an_insertion() {
    let mut bench = Bench::present(Qemu::default());
    bench.client.handle(Input::Inserted(atr()), bench.now);
    bench.run_until("insertion", |bench| bench.qemu.seen.len() == 2);
    assert_eq!(bench.qemu.seen, ["removed", "inserted"]);
}

#[test]
fn leaving_takes_the_card_out_first() {
    let mut bench = Bench::present(Qemu::default());
    let start = bench.now;
    bench.client.handle(Input::Leave, bench.now);
    bench.pump();
    assert_eq!(bench.closed, Some(CloseReason::Left));
    assert_eq!(bench.qemu.seen, ["removed", "reader removed"]);
    assert_eq!(bench.now, start);
    assert_eq!(bench.client.next_deadline(), None);
}

#[test]
fn leaving_a_deaf_host_takes_three_seconds() {
    let mut bench = Bench::present(Qemu { ..Qemu::default() });
    bench.qemu.deaf = true;
    bench.client.handle(Input::Leave, bench.now);
    bench.run_until("end", |bench| bench.closed.is_some());
    assert_eq!(bench.closed, Some(CloseReason::LeftUnacknowledged));
}

#[test]
fn flush_is_complete_when_nothing_is_pending() {
    let mut bench = Bench::present(Qemu::default());
    bench.apdu(&[0, 0xA4, 4, 0]);
    bench.qemu.reply(0, Body::Flush);
    let (token, _) = bench.commands[0];
    bench.pump();
    assert!(bench.qemu.seen.is_empty());
    bench.client.handle(Input::Answer(token, Some(StatusWord::SUCCESS.into())), bench.now);
    let sent: Vec<_> = std::iter::from_fn(|| bench.client.poll_output()).collect();
    assert!(matches!(&sent[1], Output::Send(bytes) if bytes.expose()[3] == 9));
}

#[test]
fn the_extension_brings_power_and_long_apdus() {
    let extension = Some(Extension::FULL);
    let mut bench = Bench::present(Qemu { extension, ..Qemu::default() });
    assert_eq!(bench.extension, Some(extension));
    bench.qemu.reply(0, Body::PowerOn(Bytes::new()));
    bench.pump();
    let token = bench.power_ons[0];
    bench.client.handle(Input::Powered(token, Some(atr())), bench.now);
    bench.pump();
    bench.apdu(&[0, 0xA4, 4, 0]);
    let long = Response::new(&[0x55; 5000], StatusWord::SUCCESS);
    let (token, _) = bench.commands[0];
    bench.client.handle(Input::Answer(token, Some(long.clone())), bench.now);
    bench.pump();
    assert_eq!(bench.qemu.seen, [format!("powered {}", atr()), format!("answer {}", hex(long.as_bytes()))]);
    // A power-off while a command is out: the command is answered for, and its answer comes too late.
    bench.apdu(&[0, 0xA4, 4, 0]);
    bench.qemu.seen.clear();
    bench.qemu.reply(0, Body::PowerOff);
    bench.pump();
    let (token, _) = bench.commands[1];
    bench.client.handle(Input::Answer(token, Some(StatusWord::SUCCESS.into())), bench.now);
    bench.pump();
    assert_eq!(bench.qemu.seen, ["failed", "unpowered"]);
    assert_eq!(bench.power_offs, 1);
}

#[test]
fn a_plain_host_has_no_power_over_the_card() {
    let mut bench = Bench::present(Qemu::default());
    bench.qemu.reply(0, Body::PowerOn(Bytes::new()));
    bench.qemu.reply(0, Body::PowerOff);
    bench.pump();
    assert!(bench.power_ons.is_empty() && bench.power_offs == 0 && bench.qemu.seen.is_empty());
}

#[test]
fn hostile_hosts_are_left_with_a_reason() {
    let closed = |messages: &[(u32, Body)]| {
        let mut bench = Bench::present(Qemu::default());
        for (reader, body) in messages {
            bench.qemu.reply(*reader, body.clone());
        }
        bench.pump();
        bench.closed.map(|reason| reason.to_string())
    };
    let apdu = || (0, Body::Apdu(Secret::new(vec![0, 0xA4, 4, 0])));
    assert_eq!(
        closed(&vec![apdu(); 129]).unwrap(),
        "the host has sent more than 128 commands without waiting for an answer"
    );
    assert_eq!(closed(&vec![apdu(); 128]), None);
    let magic = Init { magic: *b"VSCX", ..Init::ours(None) };
    assert_eq!(
        closed(&[(0, Body::Init(magic))]).unwrap(),
        "magic at offset 12 of the host's Init is not VSCD: not a VSCard host"
    );
    let (_, stray) = apdu();
    assert_eq!(closed(&[(7, stray.clone())]), None);
    // Refused in its turn: an answer too early would be taken for another command's.
    let mut bench = Bench::present(Qemu::default());
    bench.apdu(&[0, 0xA4, 4, 0]);
    bench.qemu.reply(7, stray.clone());
    bench.pump();
    assert!(bench.qemu.seen.is_empty());
    let (token, _) = bench.commands[0];
    bench.client.handle(Input::Answer(token, Some(StatusWord::SUCCESS.into())), bench.now);
    bench.pump();
    assert_eq!(bench.qemu.seen, ["answer 9000", "failed"]);
    assert!(closed(&vec![(7, stray); 65]).unwrap().contains("make no sense"));
    let mut bench = Bench::present(Qemu::default());
    let huge = [0, 0, 0, 7, 0, 0, 0, 0, 0x7F, 0xFF, 0xFF, 0xFF];
    bench.client.handle(Input::Received(&huge), bench.now);
    bench.pump();
    assert!(bench.closed.unwrap().to_string().contains("length at offset 8"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_bytes_from_the_host_end_in_order(
        chunks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..80), 0..40),
        kinds in proptest::collection::vec(0u32..11, 0..60),
        present in any::<bool>(),
    ) {
        let mut bench = if present { Bench::present(Qemu::default()) } else { Bench::new(Qemu::default()) };
        for kind in kinds {
            let body = Body::Unknown(MessageType(kind), Bytes::from_static(&[0, 0, 0, 1]));
            bench.qemu.reply(kind % 3, body);
            bench.pump();
        }
        for chunk in chunks {
            bench.client.handle(Input::Received(&chunk), bench.now);
            prop_assert!(bench.client.pending.len() <= MOST_PENDING);
            while bench.client.poll_output().is_some() {}
            if let Some(at) = bench.client.next_deadline() {
                bench.now = bench.now.max(at);
                bench.client.handle_deadline(bench.now);
            }
        }
    }
}
