//! Streams of a carrier: each is read and written by tasks of its own.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use vscard_protocol::Secret;
use vscard_protocol::chardev::{Channel, ChannelError, Stream};
use zeroize::Zeroizing;

use super::Event as ReaderEvent;

/// For what is still to be written when a connection ends.
pub(super) const LAST_WORDS: Duration = Duration::from_secs(1);
/// Bytes that may wait for a peer that does not read.
const MOST_UNSENT: usize = 8 << 20;
/// Bytes received, for one event.
const READ: usize = 32 * 1024;
/// First and longest wait before connecting again.
const DELAYS: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));

/// What happens to streams.
pub(super) enum Event {
    /// There is one; the sender is told, by being dropped, when it is gone.
    Connected(Stream, oneshot::Sender<()>),
    Received(u64, Secret),
    Lost(u64),
}

/// Opens one stream after the other, or all that come.
pub(super) async fn open_all(
    mut channel: Channel,
    events: mpsc::Sender<ReaderEvent>,
) -> Result<(), ChannelError> {
    let listening = channel.endpoint().is_listening();
    let mut delay = DELAYS.0;
    let mut last_failure = String::new();
    loop {
        match channel.stream().await {
            Ok(stream) => {
                delay = DELAYS.0;
                last_failure.clear();
                tracing::info!("{}: connected", channel.endpoint());
                let (done, gone) = oneshot::channel();
                if events.send(ReaderEvent::Stream(Event::Connected(stream, done))).await.is_err() {
                    return Ok(());
                }
                if !listening {
                    let _ = gone.await;
                    tracing::info!("{}: connection gone", channel.endpoint());
                }
            }
            Err(error) if !error.is_transient() => return Err(error),
            Err(error) => {
                let failure = error.to_string();
                if failure != last_failure {
                    tracing::warn!("{failure}; trying again");
                    last_failure = failure;
                }
            }
        }
        if !listening {
            tokio::time::sleep(delay).await;
            delay = (delay * 2).min(DELAYS.1);
        }
    }
}

/// The streams of a reader.
#[derive(Default)]
pub(super) struct Connections {
    last: u64,
    open: HashMap<u64, Connection>,
}

struct Connection {
    unsent: mpsc::UnboundedSender<Secret>,
    unsent_bytes: Arc<AtomicUsize>,
    reading: JoinHandle<()>,
    writing: Option<JoinHandle<()>>,
    _done: oneshot::Sender<()>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.reading.abort();
        // What is to be written is written, unless the peer does not take it.
        if let Some(writing) = self.writing.take() {
            tokio::spawn(async move {
                let abort = writing.abort_handle();
                if tokio::time::timeout(LAST_WORDS, writing).await.is_err() {
                    abort.abort();
                }
            });
        }
    }
}

impl Connections {
    pub(super) fn add(
        &mut self,
        stream: Stream,
        done: oneshot::Sender<()>,
        events: &mpsc::Sender<ReaderEvent>,
    ) -> u64 {
        self.last += 1;
        let id = self.last;
        let (reader, writer) = tokio::io::split(stream);
        let (unsent, queue) = mpsc::unbounded_channel();
        let unsent_bytes = Arc::new(AtomicUsize::new(0));
        let reading = tokio::spawn(read(id, reader, events.clone()));
        let writing = tokio::spawn(write(writer, queue, unsent_bytes.clone()));
        let connection = Connection { unsent, unsent_bytes, reading, writing: Some(writing), _done: done };
        self.open.insert(id, connection);
        id
    }

    pub(super) fn has(&self, id: u64) -> bool {
        self.open.contains_key(&id)
    }

    pub(super) fn any(&self) -> bool {
        !self.open.is_empty()
    }

    pub(super) fn send(&mut self, id: u64, bytes: Secret) {
        if let Some(connection) = self.open.get(&id) {
            connection.unsent_bytes.fetch_add(bytes.len(), Ordering::Relaxed);
            let _ = connection.unsent.send(bytes);
        }
    }

    /// The connections whose peers leave too much unread.
    pub(super) fn overrun(&self) -> impl Iterator<Item = u64> + use<> {
        let too_much =
            |connection: &Connection| connection.unsent_bytes.load(Ordering::Relaxed) > MOST_UNSENT;
        let overrun: Vec<u64> =
            self.open.iter().filter(|(_, connection)| too_much(connection)).map(|(id, _)| *id).collect();
        overrun.into_iter()
    }

    /// Closes after what is to be written.
    pub(super) fn close(&mut self, id: u64) {
        self.open.remove(&id);
    }

    /// Whether it was known.
    pub(super) fn remove(&mut self, id: u64) -> bool {
        self.open.remove(&id).is_some()
    }

    /// Closes all, and waits until what was to be written is, or cannot be.
    pub(super) async fn flush(&mut self) {
        for (_, mut connection) in self.open.drain() {
            let writing = connection.writing.take();
            drop(connection);
            if let Some(writing) = writing {
                let abort = writing.abort_handle();
                if tokio::time::timeout(LAST_WORDS, writing).await.is_err() {
                    abort.abort();
                }
            }
        }
    }
}

async fn read(id: u64, mut stream: ReadHalf<Stream>, events: mpsc::Sender<ReaderEvent>) {
    let mut buffer = Zeroizing::new(vec![0; READ]);
    loop {
        let event = match stream.read(&mut buffer).await {
            Ok(0) | Err(_) => Event::Lost(id),
            Ok(count) => Event::Received(id, Secret::from(&buffer[..count])),
        };
        let lost = matches!(event, Event::Lost(_));
        if events.send(ReaderEvent::Stream(event)).await.is_err() || lost {
            return;
        }
    }
}

async fn write(
    mut stream: WriteHalf<Stream>,
    mut queue: mpsc::UnboundedReceiver<Secret>,
    unsent: Arc<AtomicUsize>,
) {
    while let Some(bytes) = queue.recv().await {
        if stream.write_all(bytes.expose()).await.is_err() {
            return;
        }
        unsent.fetch_sub(bytes.len(), Ordering::Relaxed);
    }
    let _ = stream.shutdown().await;
}
