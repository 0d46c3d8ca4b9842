//! Against a host that behaves as QEMU, and cards that do not behave.

use std::collections::VecDeque;
use std::sync::Mutex;

use async_trait::async_trait;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, oneshot, watch};
use tokio::time::timeout;
use vscard_protocol::chardev::Plaintext;
use vscard_protocol::codec::{self, Decoder};
use vscard_protocol::message::{Body, ErrorCode, Init, Message, ReaderId};
use vscard_protocol::{Limits, Secret, StatusWord};

use super::*;

/// An instruction that takes until the card is woken; others are done at once.
const HANG: u8 = 0x02;

struct Source {
    presence: watch::Sender<Presence>,
    /// What the next power-ups fail with.
    failures: Mutex<VecDeque<CardError>>,
    done: Arc<Done>,
}

struct Done {
    instructions: Mutex<Vec<u8>>,
    wake: Semaphore,
}

struct TestCard {
    atr: Atr,
    done: Arc<Done>,
}

impl Source {
    fn new(failures: impl Into<VecDeque<CardError>>) -> Arc<Self> {
        let atr = Atr::t1(b"test").unwrap();
        let present = Presence::Present { insertion: 1, atr, limits: Limits::SHORT };
        let done = Done { instructions: Mutex::default(), wake: Semaphore::new(0) };
        Arc::new(Self {
            presence: watch::Sender::new(present),
            failures: Mutex::new(failures.into()),
            done: Arc::new(done),
        })
    }
}

#[async_trait]
impl CardSource for Source {
    fn presence(&self) -> PresenceWatch {
        self.presence.subscribe().into()
    }

    async fn power_on(&self, _insertion: u64) -> Result<Box<dyn Card>, CardError> {
        match self.failures.lock().unwrap().pop_front() {
            Some(error) => Err(error),
            None => Ok(Box::new(TestCard { atr: Atr::t1(b"test").unwrap(), done: self.done.clone() })),
        }
    }
}

#[async_trait]
impl Card for TestCard {
    fn atr(&self) -> &Atr {
        &self.atr
    }

    async fn transmit(&mut self, command: &Command) -> Result<Response, CardError> {
        self.done.instructions.lock().unwrap().push(command.ins());
        if command.ins() == HANG {
            self.done.wake.acquire().await.unwrap().forget();
        }
        Ok(StatusWord::SUCCESS.into())
    }
}

/// A host without the extension, and a session that shows it a card.
struct Host {
    stream: UnixStream,
    decoder: Decoder,
    unread: Vec<u8>,
    /// Dropped, the card fails.
    card: Option<oneshot::Sender<()>>,
    end: JoinHandle<End>,
    _directory: TempDir,
}

impl Host {
    async fn new(source: Arc<Source>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let endpoint = format!("unix:{}", path.display()).parse().unwrap();
        let channel = Channel::open(endpoint, Plaintext::LoopbackOnly).await.unwrap();
        let config =
            ClientConfig { answer_deadline: Duration::from_millis(100), ..ClientConfig::new("test") };
        let (card, failed) = oneshot::channel::<()>();
        let end = tokio::spawn(async move {
            let (wishes, mut wanted) = mpsc::channel(1);
            let failed = async { drop(failed.await) };
            until_failed(run(source, channel, config, false, &mut wanted), failed, &wishes).await
        });
        let (stream, _) = listener.accept().await.unwrap();
        let (decoder, unread, card) = (Decoder::new(258), Vec::new(), Some(card));
        Self { stream, decoder, unread, card, end, _directory: directory }
    }

    async fn send(&mut self, reader: ReaderId, body: Body) {
        let message = codec::encode(&Message::new(reader, body)).unwrap();
        self.stream.write_all(message.expose()).await.unwrap();
    }

    /// The next message that says something of the card; it comes soon.
    async fn told(&mut self) -> Body {
        loop {
            let mut unread = &self.unread[..];
            let message = self.decoder.decode(&mut unread);
            self.unread = unread.to_vec();
            let Some(message) = message else {
                let mut bytes = [0; 512];
                let read = timeout(Duration::from_secs(60), self.stream.read(&mut bytes));
                let count = read.await.expect("nothing more is told").unwrap();
                assert!(count > 0, "the connection is closed");
                self.unread.extend_from_slice(&bytes[..count]);
                continue;
            };
            let success = Body::Error(ErrorCode::SUCCESS);
            match message.unwrap().body {
                Body::Init(_) => self.send(ReaderId::UNDEFINED, Body::Init(Init::ours(None))).await,
                Body::ReaderAdd(_) | Body::ReaderRemove => self.send(ReaderId::FIRST, success).await,
                told @ (Body::Atr(_) | Body::CardRemove) => {
                    self.send(ReaderId::FIRST, success).await;
                    return told;
                }
                told @ (Body::Apdu(_) | Body::Error(_)) => return told,
                _ => self.send(ReaderId::UNDEFINED, Body::Error(ErrorCode::GENERAL)).await,
            }
        }
    }

    async fn inserted(&mut self) {
        while !matches!(self.told().await, Body::Atr(_)) {}
    }

    /// Whether the card answers this instruction.
    async fn answered(&mut self, instruction: u8) -> bool {
        let command = Secret::new(vec![0, instruction, 0, 0, 0]);
        self.send(ReaderId::FIRST, Body::Apdu(command)).await;
        matches!(self.told().await, Body::Apdu(_))
    }
}

#[tokio::test]
async fn a_card_that_fails_to_power_up_is_tried_again_as_long_as_it_is_in() {
    let mut host = Host::new(Source::new([CardError::Failed("once".into()), CardError::Removed])).await;
    host.inserted().await;
    assert!(host.answered(1).await);
}

#[tokio::test]
async fn what_the_host_gave_up_is_not_done_when_a_card_wakes() {
    let source = Source::new([]);
    let mut host = Host::new(source.clone()).await;
    host.inserted().await;
    assert!(!host.answered(HANG).await);
    assert!(!host.answered(3).await);
    source.done.wake.add_permits(1);
    while !host.answered(4).await {}
    assert_eq!(*source.done.instructions.lock().unwrap(), [HANG, 4]);
}

#[tokio::test]
async fn a_card_that_failed_leaves_the_host_which_gets_its_answer_too() {
    let mut host = Host::new(Source::new([])).await;
    host.inserted().await;
    host.send(ReaderId::FIRST, Body::Apdu(Secret::new(vec![0, HANG, 0, 0, 0]))).await;
    drop(host.card.take());
    let (mut answered, mut removed) = (false, false);
    while !(answered && removed) {
        match host.told().await {
            Body::CardRemove => removed = true,
            _ => answered = true,
        }
    }
    drop(host.stream);
    assert!(matches!(host.end.await.unwrap(), End::CardFailed));
}
