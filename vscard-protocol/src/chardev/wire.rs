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
/// How often [`Wire::fill`] writes. The smallest send buffer that Linux makes takes six small pieces.
const MOST_FILLERS: usize = 64;

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
    /// Since it was [filled](Self::fill), and until the peer reads: the usual size of the socket's send buffer.
    full: Option<usize>,
}

impl Wire {
    /// A stream that nothing has been written to.
    pub fn new(stream: Stream) -> Self {
        Self { stream, unsent: VecDeque::new(), written: 0, unsent_bytes: 0, broken: false, full: None }
    }

    /// Writes these bytes in one piece, as far as the peer takes them now; the rest while it is read from.
    pub fn send(&mut self, bytes: Secret) {
        if bytes.is_empty() || self.broken {
            return;
        }
        self.unsent_bytes += bytes.len();
        self.unsent.push_back(bytes);
        if self.unsent.len() == 1 {
            self.write_on();
        }
    }

    /// How many bytes the peer has not taken yet.
    pub fn unsent(&self) -> usize {
        self.unsent_bytes
    }

    /// Makes the socket's send buffer as small as it can be, and sends `bytes` until it takes no more; whether that came
    /// to pass. Then it [is full](Self::is_full) until the peer has read something: a stream takes more only for what
    /// was taken out at its other end. A peer that reads as fast as this writes is never filled.
    ///
    /// This is for UNIX sockets, whose buffer is empty when the peer has read everything. TCP would tell that the peer's
    /// kernel has taken it.
    pub fn fill(&mut self, bytes: &Secret) -> bool {
        self.write_on();
        if self.full.is_none() {
            let Ok(usual) = self.stream.shrink_send_buffer() else { return false };
            let mut fillers = MOST_FILLERS;
            while self.unsent_bytes == 0 && !self.broken && fillers > 0 {
                self.send(bytes.clone());
                fillers -= 1;
            }
            if self.unsent_bytes > 0 {
                self.full = Some(usual);
            } else {
                self.stream.set_send_buffer(usual);
            }
        }
        // Nobody reads what cannot be written.
        self.full.is_some() || self.broken
    }

    /// Whether the peer has read nothing since the stream was [filled](Self::fill), as far as [`write_on`](Self::write_on)
    /// has seen.
    pub fn is_full(&self) -> bool {
        self.full.is_some()
    }

    /// Writes what the peer takes now; the rest while it is read from.
    pub fn write_on(&mut self) {
        let _ = self.poll_unsent(&mut Context::from_waker(Waker::noop()));
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
                    if let Some(usual) = self.full.take() {
                        self.stream.set_send_buffer(usual);
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
        // A first byte, so that more is known to be there.
        peer.write_all(b"1request").await.unwrap();
        assert_eq!(wire.read(&mut [0]).await.unwrap(), 1);
        let answers: Vec<u8> = (0..1u32 << 20).map(|number| number as u8).collect();
        for part in answers.chunks(1000) {
            wire.send(Secret::from(part));
        }
        assert!(wire.unsent() > MOST_UNSENT);
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
    async fn a_filled_stream_takes_more_when_its_peer_has_read() {
        let (mut wire, mut peer) = pair();
        let filler = Secret::from(&b"nothing"[..]);
        wire.send(Secret::from(&b"before"[..]));
        assert!(wire.fill(&filler) && wire.fill(&filler));
        let mut context = Context::from_waker(Waker::noop());
        for _ in 0..3 {
            tokio::task::yield_now().await;
            assert!(wire.poll_read(&mut context, &mut ReadBuf::new(&mut [0])).is_pending());
            assert!(wire.is_full());
        }
        let mut got = [0; 1 << 16];
        let count = peer.read(&mut got).await.unwrap();
        assert!(got.starts_with(b"beforenothingnothing") && count < 1000, "{count} bytes");
        // Who reads from it sees that.
        let (read, written) = tokio::join!(wire.read(&mut got), peer.write_all(b"hello"));
        assert!(read.unwrap() == 5 && written.is_ok());
        assert!(!wire.is_full());
        // The buffer is as it was.
        wire.send(Secret::from(&[0; 64 * 1024][..]));
        assert_eq!(wire.unsent(), 0);
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
