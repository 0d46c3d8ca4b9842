//! When a service manager is told that the card is there.
#![allow(clippy::unwrap_used, reason = "a test says where it failed")]

mod vpcd;

use std::io::{ErrorKind, Write};
use std::net::TcpStream;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;

use vpcd::{ATR, answer, ask, power, vpcd};

/// A card directory, and the socket that a service manager has.
struct Manager {
    directory: TempDir,
    socket: UnixDatagram,
}

/// Ended with the test.
struct Service(Child);

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Manager {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = UnixDatagram::bind(directory.path().join("notify")).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let pin = directory.path().join("pin");
        let mut file =
            std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&pin).unwrap();
        file.write_all(b"271828\n").unwrap();
        let manager = Self { directory, socket };
        let mut new = manager.vscclient();
        new.arg("new-card").arg(manager.path("card")).args(["--name", "Jane Doe", "--algorithm", "p256"]);
        assert!(new.arg("--pin-file").arg(pin).status().unwrap().success());
        manager
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn vscclient(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vscclient"));
        command.env("NOTIFY_SOCKET", self.path("notify")).stdin(Stdio::null());
        // No pcscd of this machine.
        command.env("PCSCLITE_CSOCK_NAME", self.path("no-pcscd"));
        command
    }

    fn serve(&self, endpoint: &str) -> Service {
        Service(self.vscclient().arg("card").arg(self.path("card")).arg(endpoint).spawn().unwrap())
    }

    /// The next message; it comes soon.
    fn told(&self) -> String {
        let mut message = [0; 1024];
        let length = self.socket.recv(&mut message).unwrap();
        String::from_utf8(message[..length].to_vec()).unwrap()
    }

    /// Until there is no room for another message.
    fn fill(&self) {
        let socket = UnixDatagram::unbound().unwrap();
        socket.set_nonblocking(true).unwrap();
        while socket.send_to(b"X_FULL=1", self.path("notify")).is_ok() {}
    }

    fn told_nothing(&self) -> bool {
        self.socket.set_nonblocking(true).unwrap();
        let nothing = self.socket.recv(&mut [0; 1]).is_err_and(|error| error.kind() == ErrorKind::WouldBlock);
        self.socket.set_nonblocking(false).unwrap();
        nothing
    }
}

#[test]
fn in_pcscd_when_its_programs_see_the_card() {
    let manager = Manager::new();
    let (vpcd, port) = vpcd();
    let _service = manager.serve(&format!("vpcd:127.0.0.1:{port}"));
    let waiting = format!("STATUS=waiting for pcscd at tcp:127.0.0.1:{port}\n");
    let ready = format!("READY=1\nSTATUS=the card is in pcscd's reader at tcp:127.0.0.1:{port}\n");
    assert_eq!(manager.told(), waiting);
    // pcscd goes before it has told anybody of the card.
    let (mut card, _) = vpcd.accept().unwrap();
    power(&mut card);
    drop(card);
    // After a loss it is so again.
    for _ in 0..2 {
        let (mut card, _) = vpcd.accept().unwrap();
        // What the last connection made it tell, it told before this one.
        assert!(manager.told_nothing());
        power(&mut card);
        for _ in 0..2 {
            ask(&mut card, ATR);
            answer(&mut card);
        }
        assert_eq!(manager.told(), ready);
        drop(card);
        // And nothing in between.
        assert_eq!(manager.told(), waiting);
    }
}

#[test]
fn a_manager_that_does_not_read_holds_nothing_up() {
    let manager = Manager::new();
    manager.fill();
    let (vpcd, port) = vpcd();
    let _service = manager.serve(&format!("vpcd:127.0.0.1:{port}"));
    let (mut card, _) = vpcd.accept().unwrap();
    card.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    power(&mut card);
    for _ in 0..20 {
        ask(&mut card, ATR);
        answer(&mut card);
    }
    // It reads at last.
    while !manager.told().starts_with("READY=1\n") {}
}

#[test]
fn a_manager_with_an_abstract_address() {
    let manager = Manager::new();
    let name = format!("vscclient-test-{}", std::process::id());
    let socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut command = manager.vscclient();
    command.arg("card").arg(manager.path("card"));
    command.arg(format!("unix:{}", manager.path("vm.sock").display()));
    let _service = Service(command.env("NOTIFY_SOCKET", format!("@{name}")).spawn().unwrap());
    let mut told = [0; 256];
    let length = socket.recv(&mut told).unwrap();
    assert!(told[..length].starts_with(b"READY=1\n"));
}

#[test]
fn for_a_virtual_machine_when_it_can_connect() {
    let manager = Manager::new();
    let path = manager.path("vm.sock");
    let _service = manager.serve(&format!("unix-listen:{}", path.display()));
    assert!(manager.told().starts_with("READY=1\nSTATUS=the card is for unix-listen:"));
    UnixStream::connect(&path).unwrap();
}

#[test]
fn with_the_port_that_was_taken_for_none() {
    let manager = Manager::new();
    let _service = manager.serve("tcp-listen:127.0.0.1:0");
    let told = manager.told();
    let address = told.trim_end().strip_prefix("READY=1\nSTATUS=the card is for tcp-listen:").unwrap();
    TcpStream::connect(address).unwrap();
}

#[test]
fn for_a_virtual_machine_that_is_not_there_yet() {
    let manager = Manager::new();
    let _service = manager.serve(&format!("unix:{}", manager.path("vm.sock").display()));
    assert!(manager.told().starts_with("READY=1\n"));
    assert!(!Path::new(&manager.path("vm.sock")).exists());
}
