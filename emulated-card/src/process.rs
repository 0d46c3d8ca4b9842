//! What a program with cards in it does at its begin and at its end.

use std::ffi::OsString;
use std::future::poll_fn;
use std::io;
#[cfg(target_os = "linux")]
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::process::exit;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::task::Poll;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit};
use tokio::runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// For the cards at the end, and for the process. A PKCS#11 module may keep a thread for ever.
const CLOSING: Duration = Duration::from_secs(2);
/// The same signal often comes twice: to the process and to its group.
const SAME_SIGNAL: Duration = Duration::from_secs(1);

/// To be called before there are PINs, passwords and keys in the process: no core file and, on Linux, no debugger of
/// another process of the user.
pub fn keep_memory_private() {
    #[cfg(target_os = "linux")]
    let _ = rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable);
    let _ = rustix::process::setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) });
}

/// Watches for signals on a thread of its own, whatever the others wait for.
///
/// Of those in `ends`, the first calls `asked`, and so do others within a second. Another one after that calls
/// `forced`, and ends the process with the exit status that it returns. Those in `nothing` do nothing.
///
/// # Errors
/// The system has no thread to give, or does not let a signal be watched.
pub fn watch_signals(
    ends: &[SignalKind],
    nothing: &[SignalKind],
    asked: impl Fn() + Send + 'static,
    forced: impl Fn() -> i32 + Send + 'static,
) -> io::Result<()> {
    let runtime = runtime::Builder::new_current_thread().enable_io().build()?;
    let watch = |kinds: &[SignalKind]| {
        let _runtime = runtime.enter();
        kinds.iter().map(|&kind| signal(kind)).collect::<io::Result<Vec<Signal>>>()
    };
    // What was watched once has lost its effect for good.
    watch(nothing)?;
    let mut signals = watch(ends)?;
    let watching = async move {
        let mut first = None;
        loop {
            poll_fn(|context| match signals.iter_mut().any(|signal| signal.poll_recv(context).is_ready()) {
                true => Poll::Ready(()),
                false => Poll::Pending,
            })
            .await;
            if first.get_or_insert_with(Instant::now).elapsed() > SAME_SIGNAL {
                end(forced());
            }
            asked();
        }
    };
    thread::Builder::new().name("signals".into()).spawn(move || runtime.block_on(watching))?;
    Ok(())
}

/// Gives up cards, which waits for what their modules are doing, but not for ever.
pub fn close<T: Send + 'static>(cards: T) {
    let (closing, closed) = mpsc::channel::<()>();
    let close = move || {
        drop(cards);
        drop(closing);
    };
    let thread = thread::Builder::new().name("close".into()).spawn(close);
    if thread.is_ok() && closed.recv_timeout(CLOSING) == Err(RecvTimeoutError::Timeout) {
        tracing::warn!("ended without a card whose module does not come back");
    }
}

/// Ends the process with this exit status. If the exit handlers of a module wait for what hangs in it, SIGKILL ends it.
pub fn end(status: i32) -> ! {
    let _ = thread::Builder::new().name("end".into()).spawn(|| {
        thread::sleep(CLOSING);
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    });
    exit(status)
}

/// The service manager that started the process (sd_notify(3)).
#[derive(Debug)]
pub struct ServiceManager {
    name: OsString,
    socket: UnixDatagram,
    address: SocketAddr,
    warned: bool,
}

impl ServiceManager {
    /// That of NOTIFY_SOCKET. `None` if there is none, or none at such an address, which is warned of.
    pub fn of_environment() -> Option<Self> {
        let name = std::env::var_os("NOTIFY_SOCKET")?;
        match Self::connection(&name) {
            Ok((socket, address)) => Some(Self { name, socket, address, warned: false }),
            Err(error) => {
                tracing::warn!("NOTIFY_SOCKET={name:?}: {error}");
                None
            }
        }
    }

    fn connection(name: &OsString) -> io::Result<(UnixDatagram, SocketAddr)> {
        let address = match name.as_bytes() {
            [b'/', ..] => SocketAddr::from_pathname(name)?,
            #[cfg(target_os = "linux")]
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
            _ => return Err(io::Error::new(io::ErrorKind::InvalidInput, "no address of a UNIX socket")),
        };
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        Ok((socket, address))
    }

    /// Tells it of `message`, lines such as `READY=1`. A manager that does not read holds nothing up: returns whether
    /// there was room for it. One that cannot be told is warned of, once, and needs no further attempt.
    pub fn tell(&mut self, message: &str) -> bool {
        match self.socket.send_to_addr(message.as_bytes(), &self.address) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
            Err(error) if !std::mem::replace(&mut self.warned, true) => {
                tracing::warn!("NOTIFY_SOCKET={:?}: the service manager cannot be told: {error}", self.name);
            }
            _ => {}
        }
        true
    }
}
