//! The program as who starts it meets it.
#![allow(clippy::unwrap_used, reason = "tests")]
#![forbid(unsafe_code)]

mod log;
mod peers;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::thread;
use std::time::Duration;

use rustix::net::{SendFlags, send};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// What takes longer never comes.
const NEVER: Duration = Duration::from_secs(60);

/// The program, its lines, and its end. Killed with the test.
struct Daemon {
    pid: Pid,
    lines: Receiver<String>,
    ended: Receiver<ExitStatus>,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if self.ended.try_recv() == Err(TryRecvError::Empty) {
            let _ = kill_process(self.pid, Signal::KILL);
        }
    }
}

impl Daemon {
    fn start(mut command: Command) -> (Self, Option<ChildStdin>) {
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let (stderr, stdin) = (child.stderr.take().unwrap(), child.stdin.take());
        (Self::of(child, stderr), stdin)
    }

    fn of(mut child: Child, stderr: impl Read + Send + 'static) -> Self {
        let pid = Pid::from_child(&child);
        let (told, lines) = channel();
        let stderr = BufReader::new(stderr);
        thread::spawn(move || stderr.lines().map_while(Result::ok).try_for_each(|line| told.send(line)));
        let (told, ended) = channel();
        thread::spawn(move || told.send(child.wait().unwrap()));
        Self { pid, lines, ended }
    }

    /// Waits for a line with this in it.
    fn line(&self, part: &str) {
        while !self.lines.recv_timeout(NEVER).unwrap().contains(part) {}
    }

    fn terminate(&self) {
        kill_process(self.pid, Signal::TERM).unwrap();
    }

    fn status(&self) -> ExitStatus {
        self.ended.recv_timeout(NEVER).unwrap()
    }

    /// All its lines, when it has ended.
    fn ended(self) -> Vec<String> {
        self.terminate();
        assert!(self.status().success());
        self.lines.iter().collect()
    }
}

struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The program, with a reader that nobody uses and these cards.
    fn daemon(&self, cards: &[String]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ccid-device"));
        command.env("XDG_STATE_HOME", self.path("state")).stdin(Stdio::null());
        command.arg("--reader").arg(format!("usbredir,unix-listen:{}", self.path("reader").display()));
        command.args(cards.iter().flat_map(|card| ["--card", card]));
        command
    }
}

/// A card on a token of a module that hangs, and a signal.
fn stuck(place: &Place, with: impl FnOnce(&mut Command)) -> Daemon {
    let module = place.path("stuck.so");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/daemon/stuck.c");
    let compiled = Command::new("cc").args(["-Wall", "-shared", "-fPIC", source, "-o"]).arg(&module).status();
    assert!(compiled.unwrap().success());
    let mut command = place.daemon(&[format!("host,module={}", module.display())]);
    command.env("STUCK", place.path("now"));
    with(&mut command);
    let (daemon, _) = Daemon::start(command);
    daemon.line("ready");
    std::fs::write(place.path("now"), "").unwrap();
    daemon.line("stuck");
    daemon.terminate();
    daemon.line("ended without a card whose module does not come back");
    daemon
}

#[test]
fn a_signal_ends_it_while_a_module_is_stuck() {
    let place = Place::new();
    assert_eq!(stuck(&place, |_| {}).status().code(), Some(0));
    assert!(!place.path("reader").exists());
}

#[test]
fn a_signal_ends_it_while_a_module_is_stuck_for_the_end_of_the_process() {
    let daemon = stuck(&Place::new(), |command| {
        command.env("STUCK_AT_EXIT", "1");
    });
    assert_eq!(daemon.status().signal(), Some(Signal::KILL.as_raw()));
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let place = Place::new();
    let (log, stderr) = UnixStream::pair().unwrap();
    let mut command = place.daemon(&[]);
    let child = command.stderr(OwnedFd::from(stderr.try_clone().unwrap())).spawn().unwrap();
    let mut lines = BufReader::new(log).lines().map(Result::unwrap);
    let daemon = Daemon::of(child, std::io::empty());
    assert!(lines.any(|line| line.contains("ready")));
    let mut vmm = UnixStream::connect(place.path("reader")).unwrap();
    // usbredir's hello, without any capability.
    let hello = [0_u32, 68, 0].into_iter().flat_map(u32::to_le_bytes).chain([0; 68]);
    vmm.write_all(&hello.collect::<Vec<_>>()).unwrap();
    assert!(lines.any(|line| line.contains("a guest has it")));
    // What stops it is its next line, for which there is no room.
    while send(&stderr, b".", SendFlags::DONTWAIT).is_ok() {}
    // Which does nothing, and stops nothing.
    kill_process(daemon.pid, Signal::HUP).unwrap();
    let status = (0..600).find_map(|_| {
        daemon.terminate();
        daemon.ended.recv_timeout(NEVER / 600).ok()
    });
    assert_eq!(status.unwrap().code(), Some(1));
}

#[test]
fn a_signal_ends_it_while_a_card_waits_for_its_password() {
    let place = Place::new();
    let peer = UnixListener::bind(place.path("peer")).unwrap();
    let passthru = format!("passthru,unix:{}", place.path("peer").display());
    let mut command = place.daemon(&[passthru, "cert,pem=/jane.crt,,/jane.key,password-file=fd:0".into()]);
    let (daemon, password) = Daemon::start({
        command.stdin(Stdio::piped());
        command
    });
    // The card before is there: now this one is waited for.
    let (told, accepted) = channel();
    thread::spawn(move || told.send(peer.accept()));
    let _peer = accepted.recv_timeout(NEVER).unwrap().unwrap();
    daemon.terminate();
    assert_eq!(daemon.status().code(), Some(0));
    drop(password);
}

#[test]
fn clients_are_served_again_after_too_many_of_them() {
    let place = Place::new();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    // As many descriptors as it takes to be ready, and a few.
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -n 24; exec \"$@\"", "sh", env!("CARGO_BIN_EXE_ccid-device")]);
    command.arg("--reader").arg(format!("usbip,tcp-listen:127.0.0.1:{port}"));
    command.arg("--control").arg(format!("unix-listen:{}", place.path("control").display()));
    let (daemon, _) = Daemon::start(command);
    daemon.line("ready");
    let connect = || TcpStream::connect(("127.0.0.1", port)).unwrap();
    let clients: Vec<_> = (0..24).map(|_| connect()).collect();
    daemon.line("cannot accept a connection");
    let control = UnixStream::connect(place.path("control")).unwrap();
    daemon.line("cannot accept a connection");
    drop(clients);
    control.set_read_timeout(Some(NEVER)).unwrap();
    let mut greeting = String::new();
    BufReader::new(control).read_line(&mut greeting).unwrap();
    assert!(greeting.contains("ccid-device"), "{greeting:?}");
    let mut client = connect();
    client.set_read_timeout(Some(NEVER)).unwrap();
    // OP_REQ_DEVLIST.
    client.write_all(&[1, 0x11, 0x80, 5, 0, 0, 0, 0]).unwrap();
    let mut list = [0; 12];
    client.read_exact(&mut list).unwrap();
    assert_eq!(list, [1, 0x11, 0, 5, 0, 0, 0, 0, 0, 0, 0, 1]);
}

/// Nobody keeps a VMM out by connecting and saying nothing, or half a hello.
#[test]
fn silent_connections_keep_no_vmm_out() {
    let place = Place::new();
    let (daemon, _) = Daemon::start(place.daemon(&[]));
    daemon.line("ready");
    let connect = || UnixStream::connect(place.path("reader")).unwrap();
    let silent: Vec<_> = (0..40).map(|_| connect()).collect();
    let mut hesitant = connect();
    hesitant.write_all(&[0, 0, 0, 0, 68]).unwrap();
    daemon.line("connection closed: it has said nothing, and another one came");
    let mut vmm = connect();
    vmm.set_read_timeout(Some(NEVER)).unwrap();
    // Hello, without any capability.
    vmm.write_all(&[0_u32, 68, 0].into_iter().flat_map(u32::to_le_bytes).chain([0; 68]).collect::<Vec<_>>())
        .unwrap();
    let mut hello = [0; 80];
    vmm.read_exact(&mut hello).unwrap();
    assert_eq!(hello[..5], [0, 0, 0, 0, 68]);
    daemon.line("a guest has it");
    drop((silent, hesitant));
}

#[test]
fn a_service_manager_that_cannot_be_told_is_warned_of() {
    let place = Place::new();
    let mut command = place.daemon(&[]);
    command.env("NOTIFY_SOCKET", place.path("nobody"));
    let (daemon, _) = Daemon::start(command);
    daemon.line("the service manager cannot be told: ");
}

#[test]
fn a_service_manager_is_told_when_it_has_room() {
    let place = Place::new();
    let name = format!("ccid-device-test-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(&name).unwrap();
    let manager = UnixDatagram::bind_addr(&address).unwrap();
    manager.set_read_timeout(Some(NEVER)).unwrap();
    let other = UnixDatagram::unbound().unwrap();
    other.set_nonblocking(true).unwrap();
    while other.send_to_addr(b"X_OTHER=1", &address).is_ok() {}
    let mut command = place.daemon(&[]);
    command.env("NOTIFY_SOCKET", format!("@{name}"));
    let (daemon, _) = Daemon::start(command);
    daemon.line("INFO ready");
    let mut told = [0; 16];
    while &told[..8] != b"READY=1\n" {
        manager.recv(&mut told).unwrap();
    }
}
