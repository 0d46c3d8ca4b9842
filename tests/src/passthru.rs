//! The passthru road: QEMU's `ccid-card-passthru` on UHCI, and our vscclient at the other end.

use std::ffi::OsStr;
use std::path::Path;

use anyhow::Result;
use tempfile::TempDir;

use crate::database::{Database, NAMES};
use crate::guest::{Boot, Guest, short_directory};
use crate::port;
use crate::process::Process;

/// How QEMU's character device and vscclient find each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Road {
    /// QEMU listens on a UNIX socket and does not wait.
    Unix,
    /// QEMU listens on TCP and does not wait.
    Tcp,
    /// QEMU listens on TCP and does not start before a client is there.
    TcpWait,
    /// QEMU connects to a UNIX socket, once.
    QemuConnects,
    /// QEMU connects to TCP, and again each second.
    QemuReconnects,
}

/// A place for the sockets of one guest, and the road over them.
pub struct Link {
    road: Road,
    directory: TempDir,
    port: u16,
}

impl Link {
    /// A new place.
    pub fn new(road: Road) -> Result<Self> {
        Ok(Self { road, directory: short_directory()?, port: port::free()? })
    }

    fn socket(&self) -> String {
        self.directory.path().join("card").display().to_string()
    }

    /// QEMU's arguments: a reader on UHCI with a passthru card.
    pub fn qemu(&self) -> Vec<String> {
        let (socket, port) = (self.socket(), self.port);
        let chardev = match self.road {
            Road::Unix => format!("path={socket},server=on,wait=off"),
            Road::Tcp => format!("host=127.0.0.1,port={port},server=on,wait=off"),
            Road::TcpWait => format!("host=127.0.0.1,port={port},server=on,wait=on"),
            Road::QemuConnects => format!("path={socket}"),
            Road::QemuReconnects => format!("host=127.0.0.1,port={port},reconnect=1"),
        };
        let chardev = format!("socket,id=card,{chardev}");
        ["-usb", "-chardev", &chardev, "-device", "usb-ccid", "-device", "ccid-card-passthru,chardev=card"]
            .map(str::to_owned)
            .into()
    }

    /// vscclient's endpoint.
    pub fn endpoint(&self) -> String {
        match self.road {
            Road::Unix => format!("unix:{}", self.socket()),
            Road::Tcp | Road::TcpWait => format!("tcp:127.0.0.1:{}", self.port),
            Road::QemuConnects => format!("unix-listen:{}", self.socket()),
            Road::QemuReconnects => format!("tcp-listen:127.0.0.1:{}", self.port),
        }
    }

    /// The address as (host, port) or path, for raw connections of a test.
    pub async fn connect(&self) -> Result<tokio::net::UnixStream> {
        Ok(tokio::net::UnixStream::connect(self.socket()).await?)
    }

    /// Whether QEMU's start needs vscclient to be there.
    fn client_first(&self) -> bool {
        matches!(self.road, Road::TcpWait | Road::QemuConnects)
    }
}

/// A guest with a passthru card, the client that owns the card, and its database and state.
pub struct Stack {
    /// The machine.
    pub guest: Guest,
    /// The client.
    pub client: Process,
    /// The client's database.
    pub database: Database,
    /// Where the client keeps its state.
    pub state: TempDir,
    /// Their connection.
    pub link: Link,
}

/// vscclient with all three certificates, on a CAC if the arguments name no profile.
pub fn client(database: &Database, state: &Path, link: &Link, args: &[&str]) -> Result<Process> {
    let spec = database.spec();
    let mut all = vec!["--db", &spec];
    if !args.contains(&"--profile") {
        all.extend(["--profile", "cac"]);
    }
    all.extend(NAMES.iter().flat_map(|name| ["--cert", name]));
    all.extend(args);
    let endpoint = link.endpoint();
    all.push(&endpoint);
    Process::start("vscclient", all, &[("XDG_STATE_HOME", OsStr::new(state))])
}

impl Stack {
    /// Boots a guest and puts the card in; returns when the guest's pcscd sees it.
    pub async fn start(road: Road, args: &[&str]) -> Result<Self> {
        Self::with(road, Database::with_password()?, args).await
    }

    /// The same with a database of one's own.
    pub async fn with(road: Road, database: Database, args: &[&str]) -> Result<Self> {
        let (link, state) = (Link::new(road)?, tempfile::tempdir()?);
        let start = || client(&database, state.path(), &link, args);
        let boot = Boot { may_reset: true, ..Boot::with(link.qemu()) };
        let (guest, client) = if link.client_first() {
            let client = start()?;
            if road == Road::QemuConnects {
                // Without reconnect= QEMU gives up at once if nobody listens.
                client.line("listening").await?;
            }
            (Guest::boot(boot).await?, client)
        } else {
            (Guest::boot(boot).await?, start()?)
        };
        let stack = Self { guest, client, database, state, link };
        stack.guest.start_pcscd().await?;
        stack.guest.ok("guest-pcsc wait-reader 30").await?;
        stack.guest.ok("guest-pcsc wait-card present 30").await?;
        Ok(stack)
    }

    /// Starts another client in place of the one that ended.
    pub fn start_client(&mut self, args: &[&str]) -> Result<()> {
        self.client = client(&self.database, self.state.path(), &self.link, args)?;
        Ok(())
    }
}
