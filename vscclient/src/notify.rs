//! What the service manager that started us, if one did, is told (sd_notify(3)).
//!
//! One that does not read holds nothing up: that we are ready is told when there is room for it, and what
//! `systemctl status` shows is left out.

use std::ffi::OsStr;
use std::io;
#[cfg(target_os = "linux")]
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Between attempts to tell that we are ready.
const FULL: Duration = Duration::from_millis(250);

static MANAGER: LazyLock<Option<Mutex<Manager>>> = LazyLock::new(|| {
    let name = std::env::var_os("NOTIFY_SOCKET")?;
    let manager = Manager::at(&name);
    manager.inspect_err(|error| tracing::warn!("NOTIFY_SOCKET={name:?}: {error}")).ok().map(Mutex::new)
});

/// The card is there for its users, as far as that is up to us.
pub(crate) fn ready(status: &str) {
    let Some(mut manager) = manager() else { return };
    manager.status = status.to_owned();
    let waiting = std::mem::replace(&mut manager.ready, true);
    manager.tell();
    if manager.ready && !waiting {
        tokio::spawn(tell_again());
    }
}

async fn tell_again() {
    loop {
        tokio::time::sleep(FULL).await;
        let Some(mut manager) = manager() else { return };
        if manager.ready {
            manager.tell();
        }
        if !manager.ready {
            return;
        }
    }
}

/// What `systemctl status` shows.
pub(crate) fn status(status: &str) {
    let Some(mut manager) = manager() else { return };
    if manager.status != status {
        manager.status = status.to_owned();
        manager.tell();
    }
}

fn manager() -> Option<MutexGuard<'static, Manager>> {
    MANAGER.as_ref().map(|manager| manager.lock().unwrap_or_else(PoisonError::into_inner))
}

struct Manager {
    socket: UnixDatagram,
    address: SocketAddr,
    status: String,
    /// That we are ready has yet to be told.
    ready: bool,
    warned: bool,
}

impl Manager {
    fn at(name: &OsStr) -> io::Result<Self> {
        let address = match name.as_bytes() {
            [b'/', ..] => SocketAddr::from_pathname(name)?,
            #[cfg(target_os = "linux")]
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
            _ => return Err(io::Error::new(io::ErrorKind::InvalidInput, "no address of a UNIX socket")),
        };
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket, address, status: String::new(), ready: false, warned: false })
    }

    fn tell(&mut self) {
        let ready = if self.ready { "READY=1\n" } else { "" };
        // A line is an assignment; a path may have several.
        let message = format!("{ready}STATUS={}\n", self.status.replace('\n', " "));
        match self.socket.send_to_addr(message.as_bytes(), &self.address) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if !self.ready {
                    self.status.clear();
                }
                return;
            }
            Err(error) if !std::mem::replace(&mut self.warned, true) => {
                tracing::warn!("the service manager cannot be told: {error}");
            }
            _ => {}
        }
        self.ready = false;
    }
}
