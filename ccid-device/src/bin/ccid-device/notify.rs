//! What the service manager that started us, if one did, is told (sd_notify(3)).

use std::ffi::OsStr;
use std::io;
#[cfg(target_os = "linux")]
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// Between attempts. A manager that does not read holds nothing up.
const FULL: Duration = Duration::from_millis(250);

/// The readers are there.
pub(crate) async fn ready() {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return };
    if let Err(error) = tell(&name, b"READY=1\n").await {
        tracing::warn!("NOTIFY_SOCKET={name:?}: the service manager cannot be told: {error}");
    }
}

async fn tell(name: &OsStr, message: &[u8]) -> io::Result<()> {
    let address = match name.as_bytes() {
        [b'/', ..] => SocketAddr::from_pathname(name)?,
        #[cfg(target_os = "linux")]
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => return Err(io::Error::new(io::ErrorKind::InvalidInput, "no address of a UNIX socket")),
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    loop {
        match socket.send_to_addr(message, &address) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => tokio::time::sleep(FULL).await,
            sent => return sent.map(drop),
        }
    }
}
