//! The byte streams the protocol runs on: TCP and UNIX sockets, either end.
//!
//! ```
//! use vscard_protocol::chardev::Endpoint;
//! let endpoint: Endpoint = "unix:/run/vm1,,card.sock".parse()?;
//! assert_eq!(endpoint, Endpoint::Unix { path: "/run/vm1,card.sock".into() });
//! assert!("tcp:localhost".parse::<Endpoint>().is_err());
//! # Ok::<(), vscard_protocol::chardev::EndpointError>(())
//! ```

mod endpoint;
mod places;
mod retry;
mod stream;
mod wire;

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::time::{Duration, Instant};

use thiserror::Error;
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream, lookup_host};

pub use endpoint::{Endpoint, EndpointError};
pub use places::{Place, Places};
pub use stream::Stream;
pub use wire::Wire;

use crate::LogBudget;
use retry::Retry;

/// Peers that may wait to be let in; the kernel's limit may be lower.
#[cfg(target_os = "linux")]
const BACKLOG: i32 = 1024;

/// Until a peer that is connected to has let us in, or else is taken for one that lets nobody in.
const SILENT: Duration = Duration::from_secs(2);

/// Whether a network that others can listen to may carry plain text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plaintext {
    /// Only on loopback addresses, judged by the resolved or bound address.
    LoopbackOnly,
    /// Anywhere; the user said so.
    Anywhere,
}

/// Why a stream could not be had.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ChannelError {
    /// The host name has no address.
    #[error("{endpoint}: cannot resolve the host name: {source}")]
    Resolve {
        /// The endpoint.
        endpoint: Endpoint,
        /// What the resolver said.
        source: io::Error,
    },
    /// A plain-text TCP connection would leave this machine.
    #[error(
        "{endpoint}: {address} is not a loopback address and TCP carries everything, the PIN too, as plain text; \
         use a UNIX socket or an SSH tunnel, or say --allow-plaintext"
    )]
    Plaintext {
        /// The endpoint.
        endpoint: Endpoint,
        /// What it resolved to.
        address: SocketAddr,
    },
    /// Nobody answers there, or not to us.
    #[error("{endpoint}: cannot connect: {source}")]
    Connect {
        /// The endpoint.
        endpoint: Endpoint,
        /// What the system said.
        source: io::Error,
    },
    /// A peer cannot be let in, for want of file descriptors perhaps.
    #[error("{endpoint}: cannot accept a connection: {source}")]
    Accept {
        /// The endpoint.
        endpoint: Endpoint,
        /// What the system said.
        source: io::Error,
    },
    /// The address cannot be listened on.
    #[error("{endpoint}: cannot listen: {source}")]
    Listen {
        /// The endpoint.
        endpoint: Endpoint,
        /// What the system said.
        source: io::Error,
    },
}

impl ChannelError {
    /// Whether trying again later can help.
    pub fn is_transient(&self) -> bool {
        !matches!(self, Self::Plaintext { .. } | Self::Listen { .. })
    }
}

/// An endpoint in use: makes one stream after the other.
#[derive(Debug)]
pub struct Channel {
    endpoint: Endpoint,
    plaintext: Plaintext,
    listener: Option<Listener>,
    retry: Retry,
    lines: LogBudget<Line>,
}

/// What is told in the log. Peers can have it repeated.
#[derive(Debug, PartialEq, Eq)]
enum Line {
    Failed,
    Refused,
    Silent,
}

#[derive(Debug)]
enum Listener {
    Tcp(TcpListener),
    // In this order: once nobody listens, the path is for whoever comes next.
    Unix { _file: SocketFile, listener: UnixListener },
}

/// Removes the socket's file when the listener goes, if it is there still and not another's.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    /// Device and inode; the latter is not given away while the socket is open.
    identity: Option<(u64, u64)>,
}

impl SocketFile {
    fn of_listener(path: &Path) -> Self {
        Self { path: path.to_owned(), identity: Self::identity(path) }
    }

    fn identity(path: &Path) -> Option<(u64, u64)> {
        std::fs::symlink_metadata(path).ok().map(|found| (found.dev(), found.ino()))
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.identity.is_some() && Self::identity(&self.path) == self.identity {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Channel {
    /// Binds a listening endpoint; a connecting one is only checked when it connects.
    ///
    /// A UNIX socket has mode 0600 from the moment it exists; a file left there by a process that is gone is replaced.
    ///
    /// # Errors
    /// [`ChannelError::Listen`], [`ChannelError::Plaintext`], [`ChannelError::Resolve`].
    pub async fn open(endpoint: Endpoint, plaintext: Plaintext) -> Result<Self, ChannelError> {
        let (retry, lines) = (Retry::new(), LogBudget::new());
        let mut channel = Self { endpoint, plaintext, listener: None, retry, lines };
        let listen = |source| ChannelError::Listen { endpoint: channel.endpoint.clone(), source };
        channel.listener = match &channel.endpoint {
            Endpoint::TcpListen { .. } => {
                let addresses = channel.addresses().await?;
                let listener = TcpListener::bind(&addresses[..]).await.map_err(listen)?;
                Some(Listener::Tcp(listener))
            }
            Endpoint::UnixListen { path } => {
                let listener = bind_unix(path).await.map_err(listen)?;
                Some(Listener::Unix { _file: SocketFile::of_listener(path), listener })
            }
            _ => None,
        };
        Ok(channel)
    }

    /// Where it listens or connects to.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// The address listened on, if it is TCP; for endpoints with port 0.
    pub fn local_address(&self) -> Option<SocketAddr> {
        match &self.listener {
            Some(Listener::Tcp(listener)) => listener.local_addr().ok(),
            _ => None,
        }
    }

    /// The next stream: connects, or waits for a peer, and tries again if that fails. Safe to cancel.
    ///
    /// Whoever asks again has lost the stream before. Between tries there are waits of a quarter of a second, at
    /// first, up to five seconds; a connection that has lasted a second makes them short again, and they stay short
    /// while nobody listens on this machine, which costs nothing to find out. A listening endpoint waits only after a
    /// failure. What fails is told in the log, once.
    ///
    /// # Errors
    /// [`ChannelError`], those that are not [transient](ChannelError::is_transient).
    pub async fn stream(&mut self) -> Result<Stream, ChannelError> {
        loop {
            if let Some(at) = self.retry.due(Instant::now()) {
                tokio::time::sleep_until(at.into()).await;
            }
            match self.stream_once_or_tell().await {
                Ok(stream) if self.listener.is_some() => {
                    self.retry.accepted();
                    return Ok(stream);
                }
                Ok(stream) => {
                    self.retry.connected(Instant::now());
                    return Ok(stream);
                }
                Err(error) if !error.is_transient() => return Err(error),
                Err(error) => {
                    let is_free = is_refusal(&error) && self.is_local().await;
                    if self.retry.failed(&error.to_string(), is_free, Instant::now()) {
                        self.lines.tell(Line::Failed, |end| tracing::warn!("{error}; trying again{end}"));
                    }
                }
            }
        }
    }

    /// The same as [`stream_once`](Self::stream_once), and a peer that neither lets in nor refuses is told in the log.
    async fn stream_once_or_tell(&self) -> Result<Stream, ChannelError> {
        let mut stream = pin!(self.stream_once());
        if self.listener.is_none() {
            if let Ok(stream) = tokio::time::timeout(SILENT, &mut stream).await {
                return stream;
            }
            self.lines.tell(Line::Silent, |end| {
                tracing::warn!("{}: no answer yet, nobody is let in there at present{end}", self.endpoint);
            });
        }
        stream.await
    }

    /// Connects once, or waits for the next peer. Safe to cancel.
    ///
    /// Over a UNIX socket only peers of our own user and root are let in; others are told in the log.
    ///
    /// # Errors
    /// [`ChannelError`].
    pub async fn stream_once(&self) -> Result<Stream, ChannelError> {
        let connect = |source| ChannelError::Connect { endpoint: self.endpoint.clone(), source };
        let accept = |source| ChannelError::Accept { endpoint: self.endpoint.clone(), source };
        match (&self.listener, &self.endpoint) {
            (Some(Listener::Tcp(listener)), _) => {
                let accepted = listener.accept().await;
                accepted.and_then(|(stream, _)| Stream::tcp(stream)).map_err(accept)
            }
            (Some(Listener::Unix { listener, .. }), _) => self.accept_own(listener).await.map_err(accept),
            (None, Endpoint::Unix { path } | Endpoint::UnixListen { path }) => {
                UnixStream::connect(path).await.map(Stream::unix).map_err(connect)
            }
            (None, Endpoint::Tcp { .. } | Endpoint::TcpListen { .. }) => {
                let addresses = self.addresses().await?;
                TcpStream::connect(&addresses[..]).await.and_then(Stream::tcp).map_err(connect)
            }
        }
    }

    async fn accept_own(&self, listener: &UnixListener) -> io::Result<Stream> {
        loop {
            let (stream, _) = listener.accept().await?;
            if self.lets_in(stream.peer_cred()?.uid()) {
                return Ok(Stream::unix(stream));
            }
        }
    }

    fn lets_in(&self, peer: u32) -> bool {
        let lets_in = peer == 0 || peer == rustix::process::geteuid().as_raw();
        if !lets_in {
            self.lines.tell(Line::Refused, |end| {
                tracing::warn!("{}: peer with user id {peer} refused{end}", self.endpoint);
            });
        }
        lets_in
    }

    /// Whether its peers are on this machine only: a UNIX socket, or a name or address that means loopback.
    pub async fn is_local(&self) -> bool {
        match &self.endpoint {
            Endpoint::Unix { .. } | Endpoint::UnixListen { .. } => true,
            Endpoint::Tcp { host, port } | Endpoint::TcpListen { host, port } => {
                resolve(host, *port).await.is_ok_and(|addresses| addresses.iter().all(is_loopback))
            }
        }
    }

    /// The TCP addresses of the endpoint, all of them allowed.
    async fn addresses(&self) -> Result<Vec<SocketAddr>, ChannelError> {
        let (Endpoint::Tcp { host, port } | Endpoint::TcpListen { host, port }) = &self.endpoint else {
            return Ok(Vec::new());
        };
        let addresses = resolve(host, *port)
            .await
            .map_err(|source| ChannelError::Resolve { endpoint: self.endpoint.clone(), source })?;
        let outside = addresses.iter().find(|address| !is_loopback(address));
        match outside {
            Some(address) if self.plaintext == Plaintext::LoopbackOnly => {
                Err(ChannelError::Plaintext { endpoint: self.endpoint.clone(), address: *address })
            }
            _ => Ok(addresses),
        }
    }
}

/// Nobody listens there, and no packet was lost for that.
fn is_refusal(error: &ChannelError) -> bool {
    let ChannelError::Connect { source, .. } = error else { return false };
    matches!(source.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound)
}

fn is_loopback(address: &SocketAddr) -> bool {
    address.ip().to_canonical().is_loopback()
}

async fn resolve(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    if is_localhost(host) {
        // First where vpcd listens, and where QEMU's user network ends.
        return Ok(vec![(Ipv4Addr::LOCALHOST, port).into(), (Ipv6Addr::LOCALHOST, port).into()]);
    }
    Ok(lookup_host((host, port)).await?.collect())
}

/// RFC 6761 §6.3: that name and those below it are loopback, and no resolver is to be asked. A container has none.
fn is_localhost(host: &str) -> bool {
    let host = host.strip_suffix('.').unwrap_or(host);
    let last = host.rsplit('.').next().unwrap_or_default();
    last.eq_ignore_ascii_case("localhost")
}

async fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    if std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
        match UnixStream::connect(path).await {
            Ok(_) => return Err(io::Error::new(io::ErrorKind::AddrInUse, "another process listens there")),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path)?,
            Err(error) => return Err(error),
        }
    }
    bind_private(path)
}

/// On Linux a socket's file gets the mode that the socket has, less the umask: there is no moment in which others could
/// connect, and no path that might name another file by the time its mode is changed.
#[cfg(target_os = "linux")]
fn bind_private(path: &Path) -> io::Result<UnixListener> {
    use rustix::fs::{Mode, fchmod};
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};

    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    listen(&socket, BACKLOG)?;
    UnixListener::from_std(socket.into())
}

#[cfg(not(target_os = "linux"))]
fn bind_private(path: &Path) -> io::Result<UnixListener> {
    use std::os::unix::fs::PermissionsExt;

    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    fn endpoint(text: &str) -> Endpoint {
        text.parse().unwrap()
    }

    async fn exchange(listen: Channel, connect: Endpoint) {
        let mut listen = listen;
        let mut connect = Channel::open(connect, Plaintext::LoopbackOnly).await.unwrap();
        let (accepted, connected) = tokio::join!(listen.stream(), connect.stream());
        let (mut accepted, mut connected) = (accepted.unwrap(), connected.unwrap());
        for round in 0..3u8 {
            connected.write_all(&[round; 40]).await.unwrap();
            let mut got = [0; 40];
            accepted.read_exact(&mut got).await.unwrap();
            assert_eq!(got, [round; 40]);
            accepted.write_all(&[round; 7]).await.unwrap();
            let mut got = [0; 7];
            connected.read_exact(&mut got).await.unwrap();
        }
    }

    #[tokio::test]
    async fn tcp_both_ends() {
        let listen =
            Channel::open(endpoint("tcp-listen:127.0.0.1:0"), Plaintext::LoopbackOnly).await.unwrap();
        let port = listen.local_address().unwrap().port();
        exchange(listen, endpoint(&format!("tcp:localhost:{port}"))).await;
    }

    #[tokio::test]
    async fn unix_both_ends_and_a_stale_socket_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("card.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let listening = endpoint(&format!("unix-listen:{}", path.display()));
        let listen = Channel::open(listening.clone(), Plaintext::LoopbackOnly).await.unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let second = Channel::open(listening.clone(), Plaintext::LoopbackOnly).await.unwrap_err();
        assert!(second.to_string().contains("another process listens there"), "{second}");
        drop(listen);
        let listen = Channel::open(listening, Plaintext::LoopbackOnly).await.unwrap();
        exchange(listen, endpoint(&format!("unix:{}", path.display()))).await;
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn the_socket_of_another_process_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("card.sock");
        let listening = endpoint(&format!("unix-listen:{}", path.display()));
        let listen = Channel::open(listening, Plaintext::LoopbackOnly).await.unwrap();
        std::fs::remove_file(&path).unwrap();
        let _successor = std::os::unix::net::UnixListener::bind(&path).unwrap();
        drop(listen);
        assert!(path.exists());
    }

    /// Counts the lines of the log.
    struct Log(Arc<AtomicUsize>);

    impl tracing::Subscriber for Log {
        fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
            true
        }

        fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
            tracing::span::Id::from_u64(1)
        }

        fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}

        fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

        fn event(&self, _: &tracing::Event<'_>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }

        fn enter(&self, _: &tracing::span::Id) {}

        fn exit(&self, _: &tracing::span::Id) {}
    }

    #[tokio::test]
    async fn a_user_who_is_refused_does_not_fill_the_log() {
        let dir = tempfile::tempdir().unwrap();
        let listening = endpoint(&format!("unix-listen:{}", dir.path().join("card.sock").display()));
        let listen = Channel::open(listening, Plaintext::LoopbackOnly).await.unwrap();
        let own = rustix::process::geteuid().as_raw();
        let lines = Arc::new(AtomicUsize::new(0));
        tracing::subscriber::with_default(Log(Arc::clone(&lines)), || {
            assert!(listen.lets_in(0) && listen.lets_in(own));
            assert!((1..=10_000).filter(|user| *user != own).all(|user| !listen.lets_in(user)));
        });
        assert_eq!(lines.load(Ordering::Relaxed), 64);
    }

    #[tokio::test]
    async fn a_peer_that_is_not_there_yet_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("card.sock").display().to_string();
        let mut connect =
            Channel::open(endpoint(&format!("unix:{path}")), Plaintext::LoopbackOnly).await.unwrap();
        assert!(matches!(connect.stream_once().await, Err(ChannelError::Connect { .. })));
        let mut waiting = Box::pin(connect.stream());
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        assert!(waiting.as_mut().poll(&mut context).is_pending());
        let listening = endpoint(&format!("unix-listen:{path}"));
        let mut listen = Channel::open(listening, Plaintext::LoopbackOnly).await.unwrap();
        let (connected, accepted) = tokio::join!(waiting, listen.stream());
        assert!(connected.is_ok() && accepted.is_ok());
    }

    #[tokio::test]
    async fn localhost_is_loopback_whatever_a_resolver_says() {
        for name in ["localhost", "LocalHost", "localhost.", "card.localhost", "card.localhost."] {
            // Nothing is asked: with the addresses there is no order to wait for.
            let addresses = resolve(name, 7).await.unwrap();
            let texts: Vec<_> = addresses.iter().map(ToString::to_string).collect();
            assert_eq!(texts, ["127.0.0.1:7", "[::1]:7"], "{name}");
        }
        for name in ["localhost.example.com", "notlocalhost", "localhost..", "", "127.0.0.1"] {
            assert!(!is_localhost(name), "{name}");
        }
    }

    #[tokio::test]
    async fn what_is_local() {
        for (text, local) in [
            ("tcp:localhost:1", true),
            ("tcp:127.8.8.8:1", true),
            ("tcp-listen:[::1]:1", true),
            ("tcp:[::ffff:127.0.0.1]:1", true),
            ("unix:/x", true),
            ("tcp:192.0.2.1:1", false),
            ("tcp:[2001:db8::1]:1", false),
        ] {
            let channel = Channel::open(endpoint(text), Plaintext::Anywhere).await.unwrap();
            assert_eq!(channel.is_local().await, local, "{text}");
        }
    }

    #[tokio::test]
    async fn plain_text_stays_on_this_machine() {
        for text in ["tcp:192.0.2.1:4242", "tcp:[2001:db8::1]:4242"] {
            let mut channel = Channel::open(endpoint(text), Plaintext::LoopbackOnly).await.unwrap();
            let error = channel.stream().await.unwrap_err();
            assert!(matches!(error, ChannelError::Plaintext { .. }) && !error.is_transient());
        }
        let listen = Channel::open(endpoint("tcp-listen:0.0.0.0:0"), Plaintext::LoopbackOnly).await;
        assert!(listen.unwrap_err().to_string().contains("--allow-plaintext"));
        assert!(Channel::open(endpoint("tcp-listen:0.0.0.0:0"), Plaintext::Anywhere).await.is_ok());
    }
}
