//! A stream, and what is still to be written to it.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};

use super::Stream;
use crate::Secret;

/// For what is still to be written when a connection ends.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Nothing more is read while more bytes than this are unsent: who does not take answers gets no further ones.
const MOST_UNSENT: usize = 256 * 1024;

/// A [`Stream`] that is read and written by one task: [`send`](Self::send) never waits, and what the peer does
/// not take at once is written while [`read`](Self::read) waits.
#[derive(Debug)]
pub struct Wire {
    stream: Stream,
    /// In order; of the first, `written` bytes are written.
    unsent: VecDeque<Secret>,
    written: usize,
    unsent_bytes: usize,
    /// Nothing can be written any more. What the peer sent before is still read, and then that it is gone.
    broken: bool,
}

impl Wire {
    /// A stream that nothing has been written to.
    pub fn new(stream: Stream) -> Self {
        Self { stream, unsent: VecDeque::new(), written: 0, unsent_bytes: 0, broken: false }
    }

    /// Writes these bytes in one piece, as far as the peer takes them now; the rest while it is read from.
    pub fn send(&mut self, bytes: Secret) {
        if bytes.is_empty() || self.broken {
            return;
        }
        self.unsent_bytes += bytes.len();
        self.unsent.push_back(bytes);
        if self.unsent.len() == 1 {
            let _ = self.poll_unsent(&mut Context::from_waker(Waker::noop()));
        }
    }

    /// How many bytes the peer has not taken yet.
    pub fn unsent(&self) -> usize {
        self.unsent_bytes
    }

    /// Writes until there is nothing to write, or no use in writing.
    fn poll_unsent(&mut self, context: &mut Context<'_>) -> Poll<()> {
        while let Some(bytes) = self.unsent.front() {
            let rest = bytes.expose().get(self.written..).unwrap_or_default();
            match ready!(Pin::new(&mut self.stream).poll_write(context, rest)) {
                Ok(count @ 1..) => {
                    self.written += count;
                    self.unsent_bytes -= count;
                    if count == rest.len() {
                        self.unsent.pop_front();
                        self.written = 0;
                    }
                }
                _ => {
                    self.broken = true;
                    self.unsent.clear();
                    self.unsent_bytes = 0;
                }
            }
        }
        Poll::Ready(())
    }

    /// Reads once, and writes meanwhile; see [`read`](Self::read).
    ///
    /// # Errors
    /// The stream's.
    pub fn poll_read(&mut self, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let _ = self.poll_unsent(context);
        if self.unsent_bytes > MOST_UNSENT {
            return Poll::Pending;
        }
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }

    /// Reads once, and writes meanwhile; 0 bytes are the end. While the peer leaves more than 256 KiB unread, it
    /// is not read from. Safe to cancel.
    ///
    /// # Errors
    /// The stream's. That nothing can be written is not one: reading tells soon enough.
    pub async fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut buffer = ReadBuf::new(buffer);
        poll_fn(|context| self.poll_read(context, &mut buffer)).await?;
        Ok(buffer.filled().len())
    }

    /// Writes what is to be written, unless the peer does not take it within a second, and closes.
    pub async fn finish(mut self) {
        let last_words = async {
            poll_fn(|context| self.poll_unsent(context)).await;
            let _ = self.stream.shutdown().await;
        };
        let _ = tokio::time::timeout(LAST_WORDS, last_words).await;
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;
    use tokio::net::UnixStream;

    use super::*;

    fn pair() -> (Wire, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Wire::new(Stream::unix(ours)), theirs)
    }

    #[tokio::test]
    async fn who_does_not_read_is_not_read_from() {
        let (mut wire, mut peer) = pair();
        let answers: Vec<u8> = (0..1u32 << 20).map(|number| number as u8).collect();
        for part in answers.chunks(1000) {
            wire.send(Secret::from(part));
        }
        assert!(wire.unsent() > MOST_UNSENT);
        peer.write_all(b"request").await.unwrap();
        let mut request = [0; 16];
        let mut context = Context::from_waker(Waker::noop());
        assert!(wire.poll_read(&mut context, &mut ReadBuf::new(&mut request)).is_pending());
        // Once it reads, all of it comes in order, and the request is heard.
        let mut got = vec![0; answers.len()];
        let (count, taken) = tokio::join!(wire.read(&mut request), async {
            peer.read_exact(&mut got[..answers.len() - MOST_UNSENT]).await.map(|_| ())
        });
        taken.unwrap();
        assert_eq!(&request[..count.unwrap()], b"request");
        let rest = got.len() - MOST_UNSENT;
        let ((), taken) = tokio::join!(wire.finish(), peer.read_exact(&mut got[rest..]));
        taken.unwrap();
        assert!(got == answers);
        assert_eq!(peer.read(&mut [0]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn last_words_of_a_peer_that_is_gone_are_heard() {
        let (mut wire, mut peer) = pair();
        peer.write_all(b"bye").await.unwrap();
        drop(peer);
        wire.send(Secret::from(&b"answer"[..]));
        assert_eq!(wire.unsent(), 0);
        let mut buffer = [0; 16];
        assert_eq!(wire.read(&mut buffer).await.unwrap(), 3);
        assert!(matches!(wire.read(&mut buffer).await, Ok(0) | Err(_)));
    }
}
