//! What is in the lines of a raw card, of which nothing is known.

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::Mutex;
use std::task::{Context, Poll, Waker};

use proptest::prelude::*;
use tokio::sync::watch;

use super::*;
use crate::{Limits, Presence, StatusWord};

/// What is secret in bodies and answers, in hexadecimal as it would be shown.
const MARKER: &str = "DEADBEEF";

/// Answers from a list; with nothing on it, never.
struct Raw(Atr, Arc<Mutex<VecDeque<Response>>>);

#[async_trait]
impl CardSource for Raw {
    fn presence(&self) -> PresenceWatch {
        let present = Presence::Present { insertion: 1, atr: self.0.clone(), limits: Limits::EXTENDED };
        watch::channel(present).1.into()
    }

    async fn power_on(&self, _insertion: u64) -> Result<Box<dyn Card>, CardError> {
        Ok(Box::new(Self(self.0.clone(), self.1.clone())))
    }
}

#[async_trait]
impl Card for Raw {
    fn atr(&self) -> &Atr {
        &self.0
    }

    async fn transmit(&mut self, _command: &Command) -> Result<Response, CardError> {
        let answer = self.1.lock().unwrap().pop_front();
        match answer {
            Some(answer) => Ok(answer),
            None => std::future::pending().await,
        }
    }
}

/// A traced card, and the lines of its trace.
struct Bench {
    source: Traced<Raw>,
    card: Box<dyn Card>,
    answers: Arc<Mutex<VecDeque<Response>>>,
    lines: Arc<Mutex<Vec<String>>>,
}

/// What is ready at once.
fn now<T>(future: impl Future<Output = T>) -> Option<T> {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => Some(value),
        Poll::Pending => None,
    }
}

impl Bench {
    fn new() -> Self {
        let (answers, lines) = (Arc::<Mutex<VecDeque<_>>>::default(), Arc::<Mutex<Vec<_>>>::default());
        let written = lines.clone();
        let sink: Sink = Arc::new(move |line: &str| written.lock().unwrap().push(line.to_owned()));
        let source = Traced::new(Raw(Atr::t1(b"card").unwrap(), answers.clone()), sink);
        let card = now(source.power_on(1)).unwrap().unwrap();
        Self { source, card, answers, lines }
    }

    fn power_on(&mut self) {
        self.card = now(self.source.power_on(1)).unwrap().unwrap();
    }

    /// The line of an exchange, without its time.
    fn exchange(&mut self, command: &[u8], data: &[u8], status: u16) -> String {
        self.answers.lock().unwrap().push_back(Response::new(data, StatusWord(status)));
        now(self.card.transmit(&Command::parse(command).unwrap())).unwrap().unwrap();
        let line = self.lines.lock().unwrap().pop().unwrap();
        line.rsplit_once(" | ").unwrap().0.to_owned()
    }

    /// A command whose answer nobody waits for.
    fn given_up(&mut self, command: &[u8]) {
        assert!(now(self.card.transmit(&Command::parse(command).unwrap())).is_none());
    }
}

fn secret(length: usize) -> Vec<u8> {
    [0xDE, 0xAD, 0xBE, 0xEF].into_iter().cycle().take(length).collect()
}

fn command(header: [u8; 4], body: &[u8], le: Option<u32>) -> Vec<u8> {
    Command::build(header, body, le).unwrap().as_bytes().to_vec()
}

#[test]
fn an_exchange_is_one_readable_line() {
    let mut bench = Bench::new();
    assert_eq!(
        bench.exchange(&[0, 0xA4, 4, 0, 7, 0xA0, 0, 0, 0, 0x79, 1, 0, 0], &[0x6F, 0x00], 0x9000),
        "SELECT | 00 A4 04 00 Lc 7: A0000000790100 (CAC PKI container) Le 256 | 9000 (success), 2 bytes: 6F00"
    );
    assert_eq!(
        bench.exchange(&command([0, 0x87, 7, 0x9A], &secret(200), Some(256)), &secret(256), 0x6108),
        "GENERAL AUTHENTICATE | 00 87 07 9A Lc 200 (not shown) Le 256 | 6108 (8 bytes wait), 256 bytes (not shown)"
    );
    assert_eq!(
        bench.exchange(&command([0, 0x20, 0, 0x80], b"1234", None), &[], 0x63C2),
        "VERIFY | 00 20 00 80 Lc 4 (not shown) | 63C2 (wrong, 2 tries left)"
    );
    // Lc one short, and an Lc that was left out.
    assert_eq!(
        bench.exchange(&[0, 0x20, 0, 0x80, 3, 0x31, 0x32, 0x33, 0x34], &[], 0x6700),
        "VERIFY | 00 20 00 80 Lc 3 (not shown) | 6700 (wrong length)"
    );
    assert_eq!(
        bench.exchange(&[0, 0x20, 0, 0x80, 0x31], &[], 0x6700),
        "VERIFY | 00 20 00 80 | 6700 (wrong length)"
    );
}

#[test]
fn an_empty_verify_is_a_question() {
    let mut bench = Bench::new();
    for ask in [&[0, 0x20, 0, 0x80][..], &[0, 0x20, 0, 0x80, 0], &[0, 0x21, 0, 0x80]] {
        for (status, meaning) in [
            (0x63C3, "63C3 (3 tries left)"),
            (0x63C0, "63C0 (0 tries left)"),
            (0x6983, "6983 (PIN blocked)"),
            (0x9000, "9000 (verification not required)"),
        ] {
            let line = bench.exchange(ask, &[], status);
            assert!(line.ends_with(&format!(" | {meaning}")), "{line}");
        }
    }
    let log_out = bench.exchange(&[0, 0x20, 0xFF, 0x80], &[], 0x9000);
    assert_eq!(log_out, "VERIFY | 00 20 FF 80 | 9000 (success)");
}

#[test]
fn what_is_harmless_is_shown() {
    let mut bench = Bench::new();
    let piv = [0xA0, 0, 0, 3, 8, 0, 0, 0x10, 0, 1, 0];
    for (header, body) in [
        ([0, 0xA4, 4, 0], &piv[..]),
        ([2, 0xA4, 4, 0], &piv),
        ([0x4F, 0xA4, 4, 0], &piv),
        ([0, 0xA4, 0, 0x0C], &[0x3F, 0]),
        ([0, 0xA4, 8, 0], &[0x2F, 1, 0, 2]),
        ([0, 0xCB, 0x3F, 0xFF], &[0x5C, 3, 0x5F, 0xC1, 2]),
        ([1, 0xCB, 0x3F, 0xFF], &[0x5C, 1, 0x7E]),
        ([0, 0xCA, 0, 0x6E], &[]),
        ([0, 0xB0, 0, 0], &[]),
        ([0, 0xB1, 0, 1], &[0x54, 2, 1, 0]),
        ([0, 0xB2, 1, 4], &[]),
        ([0, 0x84, 0, 0], &[]),
    ] {
        let sent = command(header, body, Some(256));
        let line = bench.exchange(&sent, &secret(4), 0x9000);
        assert!(line.ends_with("4 bytes: DEADBEEF") && !line.contains("not shown"), "{line}");
        // And what GET RESPONSE reads on, also by a second try.
        bench.exchange(&sent, &[], 0x6104);
        let get_response = [header[0], 0xC0, 0, 0];
        assert!(!bench.exchange(&command(get_response, &[], Some(256)), &[], 0x6C04).contains("not shown"));
        for status in [0x6104, 0x9000] {
            let line = bench.exchange(&command(get_response, &[], Some(4)), &secret(4), status);
            assert!(line.ends_with("4 bytes: DEADBEEF"), "{line}");
        }
        let line = bench.exchange(&command(get_response, &[], Some(4)), &secret(4), 0x9000);
        assert!(line.ends_with("4 bytes (not shown)"), "{line}");
    }
}

/// READ BUFFER and its like are that to an application of GSC-IS only.
#[test]
fn a_number_of_gsc_is_means_what_gsc_is_says_only_there() {
    let mut bench = Bench::new();
    let ccc = [0xA0, 0, 0, 1, 0x16, 0xDB, 0];
    let select = |bench: &mut Bench, class: u8, aid: &[u8], status: u16| {
        bench.exchange(&command([class, 0xA4, 4, 0], aid, None), &[], status);
    };
    let shown = |bench: &mut Bench, class: u8| {
        let shown = [0x4C, 0x52, 0x56].map(|ins| {
            let line =
                bench.exchange(&command([class, ins, 0, 0], &secret(4), Some(256)), &secret(4), 0x9000);
            line.matches(MARKER).count()
        });
        assert!(shown == [0; 3] || shown == [2; 3], "{shown:?}");
        shown == [2; 3]
    };
    assert!(!shown(&mut bench, 0x80));
    select(&mut bench, 0, &ccc, 0x9000);
    assert!(shown(&mut bench, 0x80) && shown(&mut bench, 0x00));
    assert!(!shown(&mut bench, 0x81) && !shown(&mut bench, 0x80), "what may have selected another");
    select(&mut bench, 0, &ccc, 0x6113);
    bench.exchange(&[0, 0xC0, 0, 0, 0x13], &[0x6F, 0], 0x9000);
    bench.exchange(&command([0, 0xA4, 2, 0x0C], &[1, 0], None), &[], 0x9000);
    assert!(shown(&mut bench, 0x80));
    bench.exchange(&command([0x80, 0x52, 0, 0], &[1, 2], Some(256)), &[], 0x6104);
    assert!(bench.exchange(&[0x80, 0xC0, 0, 0, 4], &secret(4), 0x9000).contains(MARKER));
    assert!(!shown(&mut bench, 0x01) && shown(&mut bench, 0x80));
    select(&mut bench, 0, &ccc, 0x6A82);
    assert!(!shown(&mut bench, 0x80));
    for other in [0, 1, 0x0C, 0x80, 0x90] {
        select(&mut bench, 0, &ccc, 0x9000);
        assert!(shown(&mut bench, 0x80));
        select(&mut bench, other, &[0xE8, 0x2B, 6, 1, 4, 1], 0x9000);
        assert!(!shown(&mut bench, 0x80), "another selected with class {other:02X}");
    }
    select(&mut bench, 0, &ccc, 0x9000);
    bench.power_on();
    assert!(!shown(&mut bench, 0x80), "nothing is selected after a reset");
}

#[test]
fn keys_codes_and_what_keys_give_are_not_shown() {
    let mut bench = Bench::new();
    let tag_list_and_more = [&[0x5C, 0][..], &secret(8)].concat();
    for (header, body) in [
        // A management key, imported keys, a resetting code, an exported one.
        ([0, 0xFF, 0xFF, 0xFF], secret(27)),
        ([0, 0xFE, 7, 0x9A], secret(200)),
        ([0, 0xDA, 0, 0xD3], secret(8)),
        ([0, 0xDB, 0x3F, 0xFF], secret(200)),
        ([0x80, 0xD8, 0, 0x81], secret(60)),
        ([0x80, 0x52, 0, 0], secret(32)),
        ([0x90, 0xC4, 0, 0], secret(24)),
        ([0xFF, 0x82, 0, 0], secret(6)),
        // An ECDH secret, signatures, what was decrypted, one-time codes.
        ([0, 0x86, 0, 0], secret(65)),
        ([0, 0x88, 0, 0], secret(20)),
        ([0, 0x87, 7, 0x9A], secret(20)),
        ([0, 0x2A, 0x9E, 0x9A], secret(20)),
        ([0x80, 0x42, 0, 0], secret(20)),
        ([0, 0xC2, 0, 0], secret(20)),
        ([0, 0xA4, 0, 1], secret(10)),
        ([0, 0xA4, 0, 1], secret(2)),
        // What is not of the form that the list is about.
        ([0, 0xCB, 0x3F, 0xFF], secret(20)),
        ([0, 0xCB, 0x3F, 0xFF], tag_list_and_more),
        ([0, 0xCA, 0, 0x6E], secret(8)),
        ([0, 0xB0, 0, 0], secret(8)),
        ([0, 0x84, 0, 0], secret(8)),
        ([0, 0xC0, 0, 0], secret(8)),
        ([0, 0xA4, 4, 0], secret(17)),
        // Secure messaging, proprietary classes, pieces of chains.
        ([0x04, 0xA4, 4, 0], secret(8)),
        ([0x0C, 0xB0, 0, 0], secret(8)),
        ([0x60, 0xA4, 4, 0], secret(8)),
        ([0x80, 0xA4, 4, 0], secret(8)),
        ([0xA0, 0xA4, 4, 0], secret(8)),
        ([0x10, 0xA4, 4, 0], secret(8)),
        ([0x50, 0xA4, 4, 0], secret(8)),
    ] {
        let line = bench.exchange(&command(header, &body, Some(256)), &secret(32), 0x6120);
        assert!(!line.contains(MARKER), "{line}");
        assert!(line.contains(&format!("Lc {} (not shown)", body.len())), "{line}");
        assert!(line.ends_with("32 bytes (not shown)"), "{line}");
        let line = bench.exchange(&[header[0], 0xC0, 0, 0, 0x20], &secret(32), 0x9000);
        assert!(!line.contains(MARKER), "{line}");
    }
    // What ends a chain may be anything, whatever its instruction.
    bench.exchange(&command([0x10, 0x87, 7, 0x9A], &secret(8), None), &[], 0x9000);
    assert!(!bench.exchange(&[0, 0xB0, 0, 0, 0], &secret(32), 0x9000).contains(MARKER));
    assert!(bench.exchange(&[0, 0xB0, 0, 0, 0], &secret(32), 0x9000).contains(MARKER));
}

#[test]
fn get_response_shows_what_is_harmless_on_its_channel() {
    let sign = command([0, 0x87, 7, 0x9A], &[1; 8], None);
    let select = |class: u8| command([class, 0xA4, 4, 0], &[0xA0, 0, 0, 3, 8], None);
    let get_response = |class: u8| command([class, 0xC0, 0, 0], &[], Some(256));
    for status in [0x9000, 0x6104, 0x6A82] {
        let mut bench = Bench::new();
        bench.exchange(&sign, &[], 0x6100);
        bench.exchange(&select(1), &[], status);
        let line = bench.exchange(&get_response(0), &secret(32), 0x9000);
        assert!(!line.contains(MARKER), "{line}");
    }
    let mut bench = Bench::new();
    bench.exchange(&select(0), &[], 0x6104);
    bench.exchange(&select(1), &[], 0x6104);
    assert!(!bench.exchange(&get_response(2), &secret(4), 0x6A88).contains(MARKER));
    // That one was not harmless, for a card that knows nothing of channels.
    assert!(!bench.exchange(&get_response(1), &secret(4), 0x9000).contains(MARKER));
    bench.exchange(&select(0), &[], 0x6104);
    bench.exchange(&select(0x45), &[], 0x6104);
    assert!(bench.exchange(&get_response(0), &secret(4), 0x9000).contains(MARKER));
    assert!(bench.exchange(&get_response(0x45), &secret(4), 0x9000).contains(MARKER));
    // Another session knows nothing of this one.
    bench.exchange(&select(0), &[], 0x6104);
    bench.power_on();
    assert!(!bench.exchange(&get_response(0), &secret(4), 0x9000).contains(MARKER));
}

#[test]
fn what_a_given_up_command_left_is_not_shown() {
    for ins in [0x42, 0x2A, 0x87, 0xC2, 0xA4] {
        let mut bench = Bench::new();
        bench.given_up(&command([0, ins, 4, 0], &[1; 8], None));
        let line = bench.exchange(&[0, 0xC0, 0, 0, 2], &secret(4), 0x9000);
        assert!(!line.contains(MARKER), "{line}");
    }
}

/// All classes and instructions, with and without a body, asked for anything by P1 = 04.
#[test]
fn nothing_else_is_shown_of_any_instruction() {
    let mut bench = Bench::new();
    for (class, ins) in (0..=0xFF).flat_map(|class| (0..=0xFF).map(move |ins| (class, ins))) {
        let plain = matches!(class, 0..=3 | 0x40..=0x4F);
        let line = bench.exchange(&command([class, ins, 4, 0], &secret(8), Some(256)), &secret(8), 0x6108);
        assert_eq!(line.matches(MARKER).count(), if plain && ins == 0xA4 { 4 } else { 0 }, "{line}");
        bench.exchange(&command([class, 0x0E, 0, 0], &[], None), &[], 0x9000);
        bench.exchange(&command([0, 0x0E, 0, 0], &[], None), &[], 0x9000);
        let line = bench.exchange(&command([class, ins, 4, 0], &[], Some(256)), &secret(8), 0x6108);
        let read = plain && matches!(ins, 0xA4 | 0xCA | 0xB0 | 0xB2 | 0x84);
        assert_eq!(line.matches(MARKER).count(), if read { 2 } else { 0 }, "{line}");
        let line = bench.exchange(&command([class, 0xC0, 0, 0], &[], Some(256)), &secret(8), 0x9000);
        assert_eq!(line.matches(MARKER).count(), if read { 2 } else { 0 }, "{line}");
    }
}

/// One exchange of a random session.
#[derive(Clone, Debug)]
struct Exchange {
    header: [u8; 4],
    body: usize,
    prefix: Vec<u8>,
    status: u16,
}

const LISTED: [u8; 12] = [0xA4, 0xCA, 0xCB, 0xB0, 0xB1, 0xB2, 0xB3, 0x84, 0x4C, 0x52, 0x56, 0xC0];

fn exchanges() -> impl Strategy<Value = Exchange> {
    let class =
        prop_oneof![4 => Just(0), 2 => 0..4_u8, 1 => 0x40..0x50_u8, 1 => Just(0x80), 1 => any::<u8>()];
    let ins = prop_oneof![
        3 => Just(0xC0),
        3 => proptest::sample::select(&LISTED[..]),
        1 => Just(0x87),
        1 => any::<u8>(),
    ];
    let p1 = prop_oneof![2 => Just(0), 2 => Just(4), 1 => any::<u8>()];
    let p2 = prop_oneof![3 => Just(0), 1 => any::<u8>()];
    let body = prop_oneof![2 => Just(0), 1 => 4..40_usize];
    let aid = vec![0xA0, 0, 0, 1, 0x16, 0xDB];
    let prefix = prop_oneof![
        2 => Just(Vec::new()),
        1 => Just(aid),
        1 => proptest::collection::vec(prop_oneof![Just(0x5C), any::<u8>()], 0..4),
    ];
    let status = proptest::sample::select(&[0x9000, 0x9000, 0x6100, 0x6104, 0x6C04, 0x6A82, 0x63C2][..]);
    (class, ins, p1, p2, body, prefix, status).prop_map(|(class, ins, p1, p2, body, prefix, status)| {
        Exchange { header: [class, ins, p1, p2], body, prefix, status }
    })
}

proptest! {
    /// Whatever is sent and answered in whatever order: the secret is in the line of a listed instruction only.
    #[test]
    fn no_secret_is_shown_but_of_listed_instructions(session in proptest::collection::vec(exchanges(), 1..30)) {
        let mut bench = Bench::new();
        // For each channel, whether its last command but GET RESPONSE was listed and has more to say.
        let mut owed = [false; 20];
        for Exchange { header, body, prefix, status } in session {
            let [class, ins, ..] = header;
            let channel = match class {
                0..=3 => Some(usize::from(class)),
                0x40..=0x4F => Some(4 + usize::from(class & 0x0F)),
                0x80 if matches!(ins, 0x4C | 0x52 | 0x56 | 0xC0) => Some(0),
                _ => None,
            };
            let listed = match channel {
                Some(channel) if ins == 0xC0 => owed[channel],
                channel => channel.is_some() && LISTED.contains(&ins),
            };
            let body = if body == 0 { Vec::new() } else { [prefix, secret(body)].concat() };
            let line = bench.exchange(&command(header, &body, Some(256)), &secret(40), status);
            prop_assert!(line.is_ascii() && !line.contains('\n') && line.len() < 400);
            prop_assert!(listed || !line.contains(MARKER), "{}", line);
            match channel {
                Some(channel) if listed => owed[channel] = matches!(status >> 8, 0x61 | 0x6C),
                _ => owed = [false; 20],
            }
        }
    }

    /// Whatever the class, the length byte or what is missing: the PIN is not in the line.
    #[test]
    fn no_pin_is_ever_shown(
        class in any::<u8>(),
        ins in proptest::sample::select(&[0x20_u8, 0x21, 0x24, 0x25, 0x26, 0x27, 0x28, 0x29, 0x2C, 0x2D][..]),
        parameters in any::<[u8; 2]>(),
        length in 6..=8_u8,
    ) {
        let sent = [&[class, ins, parameters[0], parameters[1], length][..], &secret(8)].concat();
        let Ok(_) = Command::parse(&sent) else { return Ok(()) };
        let line = Bench::new().exchange(&sent, &[], 0x9000);
        prop_assert!(!line.contains("DEAD") && !line.contains("BEEF"), "{}", line);
        prop_assert!(!line.contains("Le"), "{}", line);
    }
}
