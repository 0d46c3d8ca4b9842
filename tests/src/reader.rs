//! The reader road: our `ccid-device` with cards in it, and QEMU's `usb-redir` or the guest's `vhci-hcd`.

use std::ffi::OsStr;

use anyhow::Result;
use tempfile::TempDir;

use crate::database::{Database, NAMES};
use crate::guest::{Boot, Guest, short_directory};
use crate::port;
use crate::process::Process;

/// How the guest comes to the reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bus {
    /// QEMU's xHCI and `usb-redir`.
    Xhci,
    /// QEMU's UHCI and `usb-redir`.
    Uhci,
    /// The guest's own `vhci-hcd`, over USB/IP.
    Usbip,
}

/// The sockets of one guest and one daemon.
pub struct Place {
    bus: Bus,
    directory: TempDir,
    port: u16,
}

impl Place {
    /// A new place.
    pub fn new(bus: Bus) -> Result<Self> {
        Ok(Self { bus, directory: short_directory()?, port: port::free()? })
    }

    /// A path for a socket.
    pub fn path(&self, name: &str) -> String {
        self.directory.path().join(name).display().to_string()
    }

    /// QEMU's arguments. The daemon listens and QEMU connects, again each second.
    pub fn qemu(&self) -> Vec<String> {
        let chardev = format!("socket,id=reader,path={},reconnect=1", self.path("reader"));
        let redirected = ["-chardev", &chardev, "-device", "usb-redir,chardev=reader,id=redir"];
        let args: Vec<&str> = match self.bus {
            Bus::Xhci => [&["-device", "qemu-xhci"][..], &redirected].concat(),
            Bus::Uhci => [&["-usb"][..], &redirected].concat(),
            Bus::Usbip => vec!["-netdev", "user,id=n0", "-device", "virtio-net-pci,netdev=n0"],
        };
        args.into_iter().map(str::to_owned).collect()
    }

    /// The value of `--reader`, with options such as `slots=4,`.
    pub fn reader(&self, options: &str) -> String {
        match self.bus {
            Bus::Usbip => format!("usbip,{options}tcp-listen:127.0.0.1:{}", self.port),
            _ => format!("usbredir,{options}unix-listen:{}", self.path("reader")),
        }
    }
}

/// The value of `--card` for a CAC with all three certificates of a database.
pub fn certificates(database: &Database, more: &str) -> String {
    certificates_as("cac", database, more)
}

/// The same for any profile.
pub fn certificates_as(profile: &str, database: &Database, more: &str) -> String {
    let names: String = NAMES.iter().map(|name| format!(",cert={name}")).collect();
    format!("cert,profile={profile},db={}{names}{more}", database.spec())
}

/// A guest, the daemon, its database and state.
pub struct Stack {
    /// The machine.
    pub guest: Guest,
    /// `ccid-device`.
    pub daemon: Process,
    /// The card's database.
    pub database: Database,
    /// Where the daemon keeps its state.
    pub state: TempDir,
    /// Their sockets.
    pub place: Place,
}

impl Stack {
    /// Starts a daemon with the reader's options and more arguments, and a guest; returns when pcscd in the guest
    /// has the reader.
    pub async fn start(
        bus: Bus,
        options: &str,
        cards: impl FnOnce(&Database, &Place) -> Vec<String>,
    ) -> Result<Self> {
        Self::with(bus, options, Database::with_password()?, cards).await
    }

    /// The same with a database of one's own.
    pub async fn with(
        bus: Bus,
        options: &str,
        database: Database,
        cards: impl FnOnce(&Database, &Place) -> Vec<String>,
    ) -> Result<Self> {
        let (place, state) = (Place::new(bus)?, tempfile::tempdir()?);
        let mut args = vec!["--reader".to_owned(), place.reader(options)];
        args.extend(cards(&database, &place));
        let daemon = Process::start("ccid-device", args, &[("XDG_STATE_HOME", OsStr::new(state.path()))])?;
        daemon.line("ready").await?;
        let boot = Boot { may_reset: true, ..Boot::with(place.qemu()) };
        let stack = Self { guest: Guest::boot(boot).await?, daemon, database, state, place };
        if bus == Bus::Usbip {
            stack.attach().await?;
        }
        stack.guest.start_pcscd().await?;
        stack.guest.ok("guest-pcsc wait-reader 30").await?;
        Ok(stack)
    }

    /// The guest, once after each boot, gets ready for USB/IP and imports the reader.
    pub async fn attach(&self) -> Result<()> {
        self.guest.start_network().await?;
        // The tool keeps what it attached there.
        self.guest.ok("modprobe vhci-hcd && mkdir -p /var/run/vhci_hcd").await?;
        self.import().await
    }

    /// The guest imports the reader over USB/IP, again.
    pub async fn import(&self) -> Result<()> {
        let port = self.place.port;
        self.guest.ok(&format!("usbip --tcp-port {port} attach -r 10.0.2.2 -b 1-1")).await?;
        Ok(())
    }
}

/// One card of three certificates.
pub fn one_card(database: &Database, _place: &Place) -> Vec<String> {
    vec!["--card".into(), certificates(database, "")]
}
