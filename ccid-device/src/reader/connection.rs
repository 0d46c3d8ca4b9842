//! Streams of a carrier, read and written within the reader's own task: an answer goes out where it is made, and no
//! other task has to be woken on its way.

use std::future::poll_fn;
use std::task::Poll;

use tokio::io::ReadBuf;
use tokio::sync::{mpsc, oneshot};
use vscard_protocol::chardev::{Channel, ChannelError, Stream, Wire};
use vscard_protocol::{LogBudget, Secret};
use zeroize::Zeroizing;

use super::Event as ReaderEvent;

/// Bytes that may wait for a peer that does not read. It is not read from either, long before, so that what is
/// above can only be what the device says by itself.
const MOST_UNSENT: usize = 8 << 20;
/// Bytes received, for one event.
const READ: usize = 32 * 1024;

/// What happens to streams.
pub(super) enum Event {
    /// So many bytes have come: [`Connections::received`].
    Received(u64, usize),
    /// It is gone, and known no more.
    Lost(u64),
    /// Its peer has read since it was [filled](Connections::fill).
    Reads(u64),
}

/// Opens one stream after the other, or all that come.
pub(super) async fn open_all(
    mut channel: Channel,
    events: mpsc::Sender<ReaderEvent>,
) -> Result<(), ChannelError> {
    let listening = channel.endpoint().is_listening();
    let lines = LogBudget::new();
    loop {
        let stream = channel.stream().await?;
        lines.tell("connected", |end| tracing::info!("{}: connected{end}", channel.endpoint()));
        let (done, gone) = oneshot::channel();
        if events.send(ReaderEvent::Connected(stream, done)).await.is_err() {
            return Ok(());
        }
        if !listening {
            let _ = gone.await;
            lines.tell("gone", |end| tracing::info!("{}: connection gone{end}", channel.endpoint()));
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
    wire: Wire,
    filled: bool,
    /// Whoever opened it waits for its end.
    done: oneshot::Sender<()>,
}

impl Connections {
    pub(super) fn new() -> Self {
        Self { last: 0, open: Vec::new(), buffer: Zeroizing::new(vec![0; READ]) }
    }

    pub(super) fn add(&mut self, stream: Stream, done: oneshot::Sender<()>) -> u64 {
        self.last += 1;
        self.open.push(Connection { id: self.last, wire: Wire::new(stream), filled: false, done });
        self.last
    }

    /// The next event, and meanwhile what is unsent is written. Safe to cancel.
    pub(super) async fn event(&mut self) -> Event {
        poll_fn(|context| {
            for (index, connection) in self.open.iter_mut().enumerate() {
                let mut buffer = ReadBuf::new(&mut self.buffer);
                let read = connection.wire.poll_read(context, &mut buffer);
                if connection.filled && !connection.wire.is_full() && read.is_pending() {
                    connection.filled = false;
                    return Poll::Ready(Event::Reads(connection.id));
                }
                let Poll::Ready(read) = read else { continue };
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

    /// Before anything else is done, if the peer takes it now. If not, waiting for it goes on in `event`.
    pub(super) fn send(&mut self, id: u64, bytes: Secret) {
        if let Some(connection) = self.open.iter_mut().find(|connection| connection.id == id) {
            connection.wire.send(bytes);
        }
    }

    /// Sends `bytes` until the peer's socket takes no more; whether that came to pass. If so, there will be an
    /// [`Event::Reads`] when it takes more.
    pub(super) fn fill(&mut self, id: u64, bytes: &Secret) -> bool {
        let Some(connection) = self.open.iter_mut().find(|connection| connection.id == id) else {
            return true;
        };
        connection.filled = connection.wire.fill(bytes);
        connection.filled
    }

    /// A connection that takes more, of those that were filled. It is no event any more.
    pub(super) fn read_again(&mut self) -> Option<u64> {
        for connection in self.open.iter_mut().filter(|connection| connection.filled) {
            connection.wire.write_on();
            if !connection.wire.is_full() {
                connection.filled = false;
                return Some(connection.id);
            }
        }
        None
    }

    /// A connection whose peer leaves too much unread.
    pub(super) fn overrun(&self) -> Option<u64> {
        let overrun = self.open.iter().find(|connection| connection.wire.unsent() > MOST_UNSENT);
        overrun.map(|connection| connection.id)
    }

    /// Closes after what is to be written.
    pub(super) fn close(&mut self, id: u64) {
        let index = self.open.iter().position(|connection| connection.id == id);
        let closed = index.map(|index| self.open.remove(index));
        if let Some(connection) = closed.filter(|connection| connection.wire.unsent() > 0) {
            tokio::spawn(async move {
                connection.wire.finish().await;
                // Only now it may be made again.
                drop(connection.done);
            });
        }
    }

    /// Closes all, and waits until what was to be written is, or cannot be.
    pub(super) async fn flush(&mut self) {
        for connection in self.open.drain(..) {
            connection.wire.finish().await;
        }
    }
}
