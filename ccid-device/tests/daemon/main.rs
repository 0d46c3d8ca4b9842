//! The program as who starts it meets it.
#![allow(clippy::unwrap_used, reason = "tests")]
#![forbid(unsafe_code)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

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
        if self.ended.try_recv().is_err() {
            let _ = kill_process(self.pid, Signal::KILL);
        }
    }
}

impl Daemon {
    fn start(mut command: Command) -> (Self, Option<std::process::ChildStdin>) {
        let mut child: Child = command.stderr(Stdio::piped()).spawn().unwrap();
        let pid = Pid::from_child(&child);
        let (told, lines) = channel();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        thread::spawn(move || stderr.lines().map_while(Result::ok).try_for_each(|line| told.send(line)));
        let stdin = child.stdin.take();
        let (told, ended) = channel();
        thread::spawn(move || told.send(child.wait().unwrap()));
        (Self { pid, lines, ended }, stdin)
    }

    /// Waits for a line with this in it.
    fn line(&self, part: &str) {
        while !self.lines.recv_timeout(NEVER).unwrap().contains(part) {}
    }

    fn terminate(&self) {
        kill_process(self.pid, Signal::TERM).unwrap();
    }

    fn status(&self) -> Option<i32> {
        self.ended.recv_timeout(NEVER).unwrap().code()
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

#[test]
fn a_signal_ends_it_while_a_module_is_stuck() {
    let place = Place::new();
    let module = place.path("stuck.so");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/daemon/stuck.c");
    let compiled = Command::new("cc").args(["-shared", "-fPIC", source, "-o"]).arg(&module).status();
    assert!(compiled.unwrap().success());
    let mut command = place.daemon(&[format!("host,module={}", module.display())]);
    command.env("STUCK", place.path("now"));
    let (daemon, _) = Daemon::start(command);
    daemon.line("ready");
    std::fs::write(place.path("now"), "").unwrap();
    daemon.line("stuck");
    daemon.terminate();
    daemon.line("ended without a card whose module does not come back");
    assert_eq!(daemon.status(), Some(0));
    assert!(!place.path("reader").exists());
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
    assert_eq!(daemon.status(), Some(0));
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
