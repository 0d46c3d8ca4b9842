//! Streams of a carrier, read and written within the reader's own task: an answer goes out where it is made, and no
//! other task has to be woken on its way.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::sync::{mpsc, oneshot};
use vscard_protocol::Secret;
use vscard_protocol::chardev::{Channel, ChannelError, Stream};
use zeroize::Zeroizing;

use super::Event as ReaderEvent;

/// For what is still to be written when a connection ends.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Bytes that may wait for a peer that does not read.
const MOST_UNSENT: usize = 8 << 20;
/// Bytes received, for one event.
const READ: usize = 32 * 1024;
/// First and longest wait before connecting again.
const DELAYS: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));

/// What happens to streams.
pub(super) enum Event {
    /// So many bytes have come: [`Connections::received`].
    Received(u64, usize),
    /// It is gone, and known no more.
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
                if events.send(ReaderEvent::Connected(stream, done)).await.is_err() {
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
pub(super) struct Connections {
    last: u64,
    open: Vec<Connection>,
    buffer: Zeroizing<Vec<u8>>,
}

struct Connection {
    id: u64,
    stream: Stream,
    /// What the peer has not taken yet, in order; of the first, `written` bytes are written.
    unsent: VecDeque<Secret>,
    written: usize,
    unsent_bytes: usize,
    /// Nothing can be written any more. Reading tells the rest.
    broken: bool,
    /// Whoever opened it waits for its end.
    _done: oneshot::Sender<()>,
}

impl Connection {
    /// Writes until there is nothing to write, or no use in writing.
    fn poll_unsent(&mut self, context: &mut Context<'_>) -> Poll<()> {
        while let Some(bytes) = self.unsent.front() {
            let rest = bytes.expose().get(self.written..).unwrap_or_default();
            match Pin::new(&mut self.stream).poll_write(context, rest) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(count @ 1..)) => {
                    self.written += count;
                    self.unsent_bytes -= count;
                    if count == rest.len() {
                        self.unsent.pop_front();
                        self.written = 0;
                    }
                }
                Poll::Ready(_) => {
                    self.unsent.clear();
                    (self.unsent_bytes, self.broken) = (0, true);
                }
            }
        }
        Poll::Ready(())
    }

    /// Writes what is to be written, unless the peer does not take it, and closes.
    async fn finish(mut self) {
        let last_words = async {
            poll_fn(|context| self.poll_unsent(context)).await;
            let _ = self.stream.shutdown().await;
        };
        let _ = tokio::time::timeout(LAST_WORDS, last_words).await;
    }
}

impl Connections {
    pub(super) fn new() -> Self {
        Self { last: 0, open: Vec::new(), buffer: Zeroizing::new(vec![0; READ]) }
    }

    pub(super) fn add(&mut self, stream: Stream, done: oneshot::Sender<()>) -> u64 {
        self.last += 1;
        self.open.push(Connection {
            id: self.last,
            stream,
            unsent: VecDeque::new(),
            written: 0,
            unsent_bytes: 0,
            broken: false,
            _done: done,
        });
        self.last
    }

    /// The next event, and meanwhile what is unsent is written. Safe to cancel.
    pub(super) async fn event(&mut self) -> Event {
        poll_fn(|context| {
            for (index, connection) in self.open.iter_mut().enumerate() {
                let _ = connection.poll_unsent(context);
                let mut buffer = ReadBuf::new(&mut self.buffer);
                let Poll::Ready(read) = Pin::new(&mut connection.stream).poll_read(context, &mut buffer)
                else {
                    continue;
                };
                let (id, count) = (connection.id, buffer.filled().len());
                if read.is_err() || count == 0 {
                    self.close(id);
                    return Poll::Ready(Event::Lost(id));
                }
                // The others first the next time.
                self.open.rotate_left(index + 1);
                return Poll::Ready(Event::Received(id, count));
            }
            Poll::Pending
        })
        .await
    }

    /// The bytes of the last [`Event::Received`].
    pub(super) fn received(&self, count: usize) -> &[u8] {
        self.buffer.get(..count).unwrap_or_default()
    }

    pub(super) fn send(&mut self, id: u64, bytes: Secret) {
        let found = self.open.iter_mut().find(|connection| connection.id == id);
        let Some(connection) = found.filter(|connection| !connection.broken) else { return };
        if bytes.is_empty() {
            return;
        }
        connection.unsent_bytes += bytes.len();
        connection.unsent.push_back(bytes);
        // Before anything else is done, if the peer takes it now. If not, waiting for it goes on in `event`.
        if connection.unsent.len() == 1 {
            let _ = connection.poll_unsent(&mut Context::from_waker(Waker::noop()));
        }
    }

    /// A connection whose peer leaves too much unread.
    pub(super) fn overrun(&self) -> Option<u64> {
        let overrun = self.open.iter().find(|connection| connection.unsent_bytes > MOST_UNSENT);
        overrun.map(|connection| connection.id)
    }

    /// Closes after what is to be written.
    pub(super) fn close(&mut self, id: u64) {
        let index = self.open.iter().position(|connection| connection.id == id);
        let closed = index.map(|index| self.open.remove(index));
        if let Some(connection) = closed.filter(|connection| !connection.unsent.is_empty()) {
            tokio::spawn(connection.finish());
        }
    }

    /// Closes all, and waits until what was to be written is, or cannot be.
    pub(super) async fn flush(&mut self) {
        for connection in self.open.drain(..) {
            connection.finish().await;
        }
    }
}
