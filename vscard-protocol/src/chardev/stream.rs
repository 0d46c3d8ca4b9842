//! One connected socket.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

/// A connected TCP or UNIX socket.
///
/// TCP is set up for short messages. QEMU writes a message's header and payload apart and, by default, waits for
/// the acknowledgement of the first before it sends the second; the kernel delays that acknowledgement by 40 ms
/// unless `TCP_QUICKACK` is set, which it forgets again. So it is set after every read.
#[derive(Debug)]
pub struct Stream(Socket);

#[derive(Debug)]
enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    pub(super) fn tcp(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        keep_alive(&stream)?;
        quick_ack(&stream);
        Ok(Self(Socket::Tcp(stream)))
    }

    pub(super) fn unix(stream: UnixStream) -> Self {
        Self(Socket::Unix(stream))
    }

    /// Makes the send buffer as small as can be; returns its size before.
    pub(super) fn shrink_send_buffer(&self) -> io::Result<usize> {
        let socket = self.socket();
        let usual = sockopt::socket_send_buffer_size(socket)?;
        // The kernel takes its least instead.
        sockopt::set_socket_send_buffer_size(socket, 1)?;
        // What is told is twice of what was set, socket(7).
        Ok(usual / 2)
    }

    /// Sets the size of the send buffer, in bytes.
    pub(super) fn set_send_buffer(&self, size: usize) {
        // Only speed is lost where it cannot be set.
        let _ = sockopt::set_socket_send_buffer_size(self.socket(), size);
    }

    fn socket(&self) -> BorrowedFd<'_> {
        match &self.0 {
            Socket::Tcp(stream) => stream.as_fd(),
            Socket::Unix(stream) => stream.as_fd(),
        }
    }

    /// The TCP socket, set up for short messages, with `TCP_QUICKACK` left to the caller; `None` if it is none.
    pub fn into_tcp(self) -> Option<TcpStream> {
        match self.0 {
            Socket::Tcp(stream) => Some(stream),
            Socket::Unix(_) => None,
        }
    }
}

/// A peer whose machine is gone is noticed within half a minute: it must not hold a card or a reader for ever.
/// Probes are for an idle connection; while data is on its way there are none, and the kernel would send it again
/// for a quarter of an hour.
fn keep_alive(stream: &TcpStream) -> io::Result<()> {
    sockopt::set_socket_keepalive(stream, true)?;
    #[cfg(target_os = "linux")]
    {
        sockopt::set_tcp_keepidle(stream, Duration::from_secs(10))?;
        sockopt::set_tcp_keepintvl(stream, Duration::from_secs(5))?;
        sockopt::set_tcp_keepcnt(stream, 4)?;
        sockopt::set_tcp_user_timeout(stream, 30_000)?;
    }
    Ok(())
}

#[cfg(target_os = "linux")]
fn quick_ack(stream: &TcpStream) {
    // Only speed is lost where it cannot be set.
    let _ = sockopt::set_tcp_quickack(stream, true);
}

#[cfg(not(target_os = "linux"))]
fn quick_ack(_stream: &TcpStream) {}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &mut self.get_mut().0 {
            Socket::Tcp(stream) => {
                let result = Pin::new(&mut *stream).poll_read(context, buffer);
                if result.is_ready() {
                    quick_ack(stream);
                }
                result
            }
            Socket::Unix(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().0 {
            Socket::Tcp(stream) => Pin::new(stream).poll_write(context, bytes),
            Socket::Unix(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().0 {
            Socket::Tcp(stream) => Pin::new(stream).poll_flush(context),
            Socket::Unix(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().0 {
            Socket::Tcp(stream) => Pin::new(stream).poll_shutdown(context),
            Socket::Unix(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}
