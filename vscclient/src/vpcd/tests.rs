//! Against a vpcd that follows a script, and one that means ill.

use std::sync::Mutex;

use async_trait::async_trait;
use proptest::prelude::*;
use tokio::io::duplex;
use tokio::net::TcpListener;
use tokio::sync::{Notify, watch};
use tokio::time::timeout;
use vscard_protocol::apdu::MAX_RESPONSE;

use super::*;

/// A source whose card answers INS 01 with its data, and others as named here.
struct Source {
    presence: watch::Sender<Presence>,
    sessions: Arc<Mutex<Sessions>>,
    power_off: Arc<Notify>,
}

#[derive(Default)]
struct Sessions {
    begun: u32,
    open: u32,
    refused: bool,
}

struct TestCard {
    atr: Atr,
    sessions: Arc<Mutex<Sessions>>,
    power_off: Arc<Notify>,
}

const ECHO: u8 = 0x01;
const LONGEST: u8 = 0x02;
const MUTE: u8 = 0x03;
const NEVER: u8 = 0x44;

fn atr() -> Atr {
    Atr::t1(b"test").unwrap()
}

fn present(insertion: u64) -> Presence {
    Presence::Present { insertion, atr: atr(), limits: Limits { command: 300, ..Limits::EXTENDED } }
}

impl Source {
    fn new(presence: Presence) -> Arc<Self> {
        Arc::new(Self {
            presence: watch::Sender::new(presence),
            sessions: Arc::default(),
            power_off: Arc::default(),
        })
    }

    /// Sessions begun so far, and open now.
    fn sessions(&self) -> (u32, u32) {
        let sessions = self.sessions.lock().unwrap();
        (sessions.begun, sessions.open)
    }
}

#[async_trait]
impl CardSource for Source {
    fn presence(&self) -> PresenceWatch {
        self.presence.subscribe().into()
    }

    async fn power_on(&self, insertion: u64) -> Result<Box<dyn Card>, CardError> {
        let mut sessions = self.sessions.lock().unwrap();
        assert_eq!(sessions.open, 0, "one session at a time");
        if sessions.refused || self.presence.borrow().insertion() != Some(insertion) {
            return Err(CardError::Removed);
        }
        sessions.begun += 1;
        sessions.open += 1;
        Ok(Box::new(TestCard {
            atr: atr(),
            sessions: self.sessions.clone(),
            power_off: self.power_off.clone(),
        }))
    }
}

#[async_trait]
impl Card for TestCard {
    fn atr(&self) -> &Atr {
        &self.atr
    }

    async fn transmit(&mut self, command: &Command) -> Result<Response, CardError> {
        match command.ins() {
            ECHO => Ok(Response::new(command.data(), StatusWord::SUCCESS)),
            LONGEST => Ok(Response::new(&[7; MAX_RESPONSE - 2], StatusWord::SUCCESS)),
            MUTE => Err(CardError::Mute),
            NEVER => std::future::pending().await,
            _ => Ok(StatusWord::INS_NOT_SUPPORTED.into()),
        }
    }
}

impl Drop for TestCard {
    fn drop(&mut self) {
        self.sessions.lock().unwrap().open -= 1;
        self.power_off.notify_one();
    }
}

fn frame(payload: &[u8]) -> Vec<u8> {
    [&(payload.len() as u16).to_be_bytes()[..], payload].concat()
}

fn frames<'a>(payloads: impl IntoIterator<Item = &'a [u8]>) -> Vec<u8> {
    payloads.into_iter().flat_map(frame).collect()
}

/// All that is answered to these bytes, and how it ended.
async fn answers(source: &Source, bytes: &[u8], piece: usize) -> (Vec<u8>, Lost) {
    let (ours, mut theirs) = duplex(piece);
    let endpoint = endpoint("vpcd:").unwrap();
    let Presence::Present { insertion, atr, limits } = present(1) else { unreachable!() };
    let shown = Shown { source, insertion, atr, limits, held: None };
    let serve = async move {
        let mut connection = Connection { stream: ours, quick_ack: |_| () };
        let Err(lost) = connection.serve(&shown, &endpoint).await;
        lost
    };
    let converse = async {
        let (mut reader, mut writer) = tokio::io::split(&mut theirs);
        let mut answers = Vec::new();
        let write = async {
            // Not taken any more: that is an end, too.
            let _ = writer.write_all(bytes).await;
            let _ = writer.shutdown().await;
        };
        let (_, read) = tokio::join!(write, reader.read_to_end(&mut answers));
        read.unwrap();
        answers
    };
    let (lost, answers) = tokio::join!(serve, converse);
    (answers, lost)
}

/// What pcscd makes vpcd ask, and the answers.
fn conversation() -> (Vec<u8>, Vec<u8>) {
    let atr = atr();
    let atr = atr.as_bytes();
    let echo = &[0x00, ECHO, 0, 0, 2, 0xCA, 0xFE][..];
    let long = [&[0x00, ECHO, 0, 0, 0, 1, 0][..], &[5; 256]].concat();
    let (off, on, reset, get_atr) = (&[0][..], &[1][..], &[2][..], &[4][..]);
    let asked: [&[u8]; 14] =
        [get_atr, get_atr, on, get_atr, echo, reset, get_atr, echo, &long, off, get_atr, on, get_atr, echo];
    let echoed = &[0xCA, 0xFE, 0x90, 0x00][..];
    let long = [&long[7..], &[0x90, 0x00]].concat();
    let answered: [&[u8]; 10] = [atr, atr, atr, echoed, atr, echoed, &long, atr, atr, echoed];
    (frames(asked), frames(answered))
}

#[tokio::test]
async fn a_session_for_each_power_up_and_reset() {
    let source = Source::new(present(1));
    let (asked, answered) = conversation();
    let (got, lost) = answers(&source, &asked, 1 << 16).await;
    assert_eq!(got, answered);
    assert!(matches!(lost, Lost::Closed), "{lost}");
    assert_eq!(source.sessions(), (3, 0));
}

#[tokio::test]
async fn questions_in_pieces_are_the_same_questions() {
    let (asked, answered) = conversation();
    for piece in [1, 2, 3, 5, 260] {
        assert_eq!(answers(&Source::new(present(1)), &asked, piece).await.0, answered);
    }
    // Cut off anywhere: the answers to what was whole.
    for end in 0..asked.len() {
        let (got, lost) = answers(&Source::new(present(1)), &asked[..end], 64).await;
        assert!(answered.starts_with(&got) && matches!(lost, Lost::Closed), "{end}: {lost}");
    }
}

#[tokio::test]
async fn what_no_card_can_take_or_give_is_answered_all_the_same() {
    let (on, longest) = (&[control::ON][..], &[0x00, LONGEST, 0, 0, 0, 0, 0][..]);
    let too_long = [&[0x00, ECHO, 0, 0, 0, 2, 0][..], &[5; 512]].concat();
    for (command, status) in [
        (&[0x00, 0x20][..], [0x67, 0x00]),
        (&[0x00, 0x20, 0, 0, 9, 1], [0x67, 0x00]),
        // Longer than the card takes.
        (&too_long, [0x67, 0x00]),
        // Longer than a frame.
        (longest, [0x6F, 0x00]),
    ] {
        let (got, _) = answers(&Source::new(present(1)), &frames([on, command]), 1 << 16).await;
        assert_eq!(got, frame(&status));
    }
    // Not powered; nothing and what is no question gets no answer.
    let echo = &[0x00, ECHO, 0, 0][..];
    let asked = frames([&[][..], &[3], &[0xFF], &[], echo, on, &[0], echo]);
    let (got, _) = answers(&Source::new(present(1)), &asked, 1 << 16).await;
    assert_eq!(got, frames([&[0x6F, 0x00][..], &[0x6F, 0x00]]));
}

#[tokio::test(start_paused = true)]
async fn a_byte_that_was_meant_for_the_card_does_not_hold_the_reader_for_ever() {
    for byte in [0, 1, 2, 3] {
        let source = Source::new(present(1));
        let (ours, mut theirs) = duplex(64);
        theirs.write_all(&frames([&[4][..], &[1], &[4], &[byte]])).await.unwrap();
        let endpoint = endpoint("vpcd:").unwrap();
        let shown =
            Shown { source: &*source, insertion: 1, atr: atr(), limits: Limits::EXTENDED, held: None };
        let mut connection = Connection { stream: ours, quick_ack: |_| () };
        let Err(lost) = connection.serve(&shown, &endpoint).await;
        assert!(matches!(lost, Lost::Silent), "{lost}");
    }
}

#[tokio::test]
async fn a_card_that_does_not_answer_is_taken_out() {
    let on = &[control::ON][..];
    let asked = frames([on, &[0x00, MUTE, 0, 0]]);
    let (got, lost) = answers(&Source::new(present(1)), &asked, 64).await;
    assert!(got.is_empty() && matches!(lost, Lost::Card(CardError::Mute)), "{lost}");
    let source = Source::new(present(1));
    source.sessions.lock().unwrap().refused = true;
    let (got, lost) = answers(&source, &frames([on]), 64).await;
    assert!(got.is_empty() && matches!(lost, Lost::Card(CardError::Removed)), "{lost}");
}

/// A running adapter, and the vpcd it connects to.
struct Bench {
    source: Arc<Source>,
    vpcd: TcpListener,
    wishes: mpsc::Sender<Wish>,
    end: tokio::task::JoinHandle<End>,
}

impl Bench {
    async fn new(presence: Presence, reconnect: bool) -> Self {
        let vpcd = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let endpoint = endpoint(&format!("vpcd:{}", vpcd.local_addr().unwrap())).unwrap();
        let source = Source::new(presence);
        let (wishes, mut wanted) = mpsc::channel(1);
        let end = tokio::spawn({
            let source = source.clone();
            async move {
                // Without a context: this machine's pcscd is none of a test's business.
                tokio::select! {
                    Some(Wish::Leave) = wanted.recv() => End::Left,
                    end = show(source, endpoint, Plaintext::LoopbackOnly, reconnect, None) => end,
                }
            }
        });
        Self { source, vpcd, wishes, end }
    }

    /// The next connection, with a powered card.
    async fn card(&self) -> TcpStream {
        let (mut stream, _) = self.vpcd.accept().await.unwrap();
        stream.write_all(&frames([&[1][..], &[4]])).await.unwrap();
        let atr = frame(atr().as_bytes());
        let mut got = vec![0; atr.len()];
        stream.read_exact(&mut got).await.unwrap();
        assert_eq!(got, atr);
        stream
    }
}

async fn is_closed(mut stream: TcpStream) {
    assert!(matches!(stream.read(&mut [0]).await, Ok(0) | Err(_)));
}

#[tokio::test]
async fn insertion_and_removal_are_connections() {
    let bench = Bench::new(Presence::Absent, true).await;
    bench.source.presence.send_replace(present(1));
    let mut first = bench.card().await;
    // Also while a command is being worked on.
    first.write_all(&frame(&[0x00, NEVER, 0, 0])).await.unwrap();
    bench.source.presence.send_replace(Presence::Absent);
    is_closed(first).await;
    bench.source.presence.send_replace(present(2));
    let second = bench.card().await;
    // Another card without an absence in between.
    bench.source.presence.send_replace(present(3));
    is_closed(second).await;
    let third = bench.card().await;
    assert_eq!(bench.source.sessions(), (3, 1));
    bench.wishes.send(Wish::Leave).await.unwrap();
    is_closed(third).await;
    assert!(matches!(bench.end.await.unwrap(), End::Left));
    assert_eq!(bench.source.sessions(), (3, 0));
}

#[tokio::test]
async fn a_card_without_an_atr_is_not_put_in() {
    let atr = Atr::from_card(&[]);
    let bench = Bench::new(Presence::Present { insertion: 1, atr, limits: Limits::EXTENDED }, true).await;
    assert!(timeout(QUIET, bench.vpcd.accept()).await.is_err());
    bench.source.presence.send_replace(present(2));
    bench.card().await;
    assert_eq!(bench.source.sessions(), (1, 1));
}

#[tokio::test]
async fn a_restarted_vpcd_gets_the_card_again() {
    let bench = Bench::new(present(1), true).await;
    for session in 1..4 {
        let mut stream = bench.card().await;
        assert_eq!(bench.source.sessions(), (session, 1));
        if session == 2 {
            stream.write_all(&frame(&[0x00, MUTE, 0, 0])).await.unwrap();
            is_closed(stream).await;
        }
    }
    let bench = Bench::new(present(1), false).await;
    drop(bench.card().await);
    assert!(matches!(bench.end.await.unwrap(), End::Disconnected));
}

const QUIET: Duration = Duration::from_millis(200);

#[tokio::test]
async fn a_vpcd_that_takes_no_answers_does_not_keep_the_card() {
    let bench = Bench::new(present(1), true).await;
    let mut stream = bench.card().await;
    let flood = frame(&[control::ATR]).repeat(16 << 20);
    let mut sent = 0;
    // Both directions are full when nothing moves for a while.
    while let Ok(count) = timeout(QUIET, stream.write(&flood[sent..])).await {
        sent += count.unwrap();
        assert!(sent < flood.len(), "who takes no answers gets no further questions across");
    }
    bench.source.presence.send_replace(Presence::Absent);
    timeout(Duration::from_secs(60), bench.source.power_off.notified()).await.expect("it keeps the card");
    assert_eq!(bench.source.sessions(), (1, 0));
}

#[test]
fn endpoints() {
    let is = |text: &str, expected: &str| assert_eq!(endpoint(text).unwrap().to_string(), expected);
    is("vpcd:", "tcp:localhost:35963");
    is("vpcd:,slot=1", "tcp:localhost:35964");
    is("vpcd:localhost", "tcp:localhost:35963");
    is("vpcd:localhost:4000,slot=7", "tcp:localhost:4007");
    is("vpcd:[::1]", "tcp:[::1]:35963");
    is("vpcd:[::1]:1", "tcp:[::1]:1");
    let error = |text: &str, part: &str| {
        let error = endpoint(text).unwrap_err();
        assert!(error.starts_with(text) && error.contains(part), "{error}");
    };
    error("vpcd::35963", "host is missing");
    error("vpcd:::1", "in brackets");
    error("vpcd:localhost:0", "port \"0\"");
    error("vpcd:,slot", "slot=N");
    error("vpcd:,slot=-1", "slot=N");
    error("vpcd:,slot=+2", "slot=N");
    error("vpcd:,slot=0,slot=1", "twice");
    error("vpcd:,slots=1", "slot=N");
    error("vpcd:localhost:65535,slot=1", "more than 65535");
}

#[tokio::test]
async fn plain_text_stays_on_this_machine() {
    let (_wishes, mut wanted) = mpsc::channel(1);
    let endpoint = endpoint("vpcd:192.0.2.1").unwrap();
    let end = run(Source::new(present(1)), endpoint, Plaintext::LoopbackOnly, true, &mut wanted).await;
    let End::Unusable(error) = end else { panic!("{end:?}") };
    assert!(error.to_string().contains("--allow-plaintext"), "{error}");
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap()
}

proptest! {
    #[test]
    fn any_text_is_an_endpoint_or_an_error(text in "vpcd:[a:\\[\\]0-9]{0,12}(,slot=)?.{0,8}") {
        let _ = endpoint(&text);
    }

    /// Each question but the reader's own has one answer, of two bytes at least.
    #[test]
    fn any_questions_are_answered(
        questions in proptest::collection::vec(proptest::collection::vec(0..6u8, 0..9), 0..20),
        rest in proptest::collection::vec(any::<u8>(), 0..6),
    ) {
        let mut asked = frames(questions.iter().map(Vec::as_slice));
        asked.extend(&rest);
        let source = Source::new(present(1));
        let (got, _) = runtime().block_on(answers(&source, &asked, 64));
        prop_assert_eq!(source.sessions().1, 0);
        let mut left = &got[..];
        while let [high, low, rest @ ..] = left {
            let length = usize::from(u16::from_be_bytes([*high, *low]));
            prop_assert!(length >= 2 && length <= rest.len());
            left = &rest[length..];
        }
        prop_assert!(left.is_empty());
    }

    #[test]
    fn any_bytes_do_no_harm(bytes in proptest::collection::vec(any::<u8>(), 0..2000), piece in 1..70usize) {
        let source = Source::new(present(1));
        runtime().block_on(answers(&source, &bytes, piece));
        prop_assert_eq!(source.sessions().1, 0);
    }
}
