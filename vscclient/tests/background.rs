//! `--background`: when it returns, with what, and what goes on.
#![allow(clippy::unwrap_used, reason = "a test says where it failed")]

mod vpcd;

use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

use rustix::fs::FlockOperation;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use vpcd::{ATR, answer, ask, power, vpcd};

struct Place(TempDir);

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        let pin = OpenOptions::new().write(true).create_new(true).mode(0o600).open(place.path("pin"));
        pin.unwrap().write_all(b"271828\n").unwrap();
        let mut new = place.command();
        new.args(["new-card", "card", "--name", "Jane", "--algorithm", "p256", "--pin-file", "pin"]);
        assert!(new.output().unwrap().status.success());
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vscclient"));
        command.current_dir(self.0.path()).env("XDG_STATE_HOME", self.path("state"));
        command.env("PCSCLITE_CSOCK_NAME", self.path("no-pcscd")).stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn start(&self, endpoint: &str) -> Child {
        self.command().args(["card", "card", "--background", endpoint]).spawn().unwrap()
    }

    fn pid(&self, file: &str) -> Pid {
        let text = fs::read_to_string(self.path(file)).unwrap();
        Pid::from_raw(text.trim_end().parse().unwrap()).unwrap()
    }
}

impl Place {
    /// Its file is locked as long as it is there, and then gone.
    fn stop(&self, file: &str) {
        let lock = fs::File::open(self.path(file)).unwrap();
        kill_process(self.pid(file), Signal::TERM).unwrap();
        rustix::fs::flock(&lock, FlockOperation::LockExclusive).unwrap();
        assert!(!self.path(file).exists());
    }
}

/// Its end, once nobody has its standard output and error any more: only then is a step of a CI job over.
fn end(child: Child) -> (Option<i32>, String) {
    let Output { status, stdout, stderr } = child.wait_with_output().unwrap();
    (status.code(), String::from_utf8_lossy(&[stdout, stderr].concat()).into_owned())
}

#[test]
fn it_returns_when_programs_see_the_card_and_the_card_stays() {
    let place = Place::new();
    let (listener, port) = vpcd();
    let mut starter = place.start(&format!("vpcd:127.0.0.1:{port}"));
    let (mut card, _) = listener.accept().unwrap();
    power(&mut card);
    assert!(starter.try_wait().unwrap().is_none(), "no program has seen it yet");
    ask(&mut card, ATR);
    answer(&mut card);
    let (status, said) = end(starter);
    let directory = fs::canonicalize(place.path("card")).unwrap();
    let stop = format!("kill $(cat {}/vscclient.pid)", directory.display());
    assert!(status == Some(0) && said.contains(&stop), "{status:?}: {said}");
    for _ in 0..3 {
        ask(&mut card, ATR);
        answer(&mut card);
    }
    // In a session of its own: no terminal's end is its end.
    let pid = place.pid("card/vscclient.pid");
    assert_eq!(rustix::process::getsid(Some(pid)).unwrap(), pid);
    // The card is in use, and what is there is left as it is.
    let (status, said) = end(place.start(&format!("vpcd:127.0.0.1:{port}")));
    assert!(status == Some(3) && said.contains("in use already"), "{status:?}: {said}");
    assert_eq!(place.pid("card/vscclient.pid"), pid);

    place.stop("card/vscclient.pid");
    assert_eq!(card.read(&mut [0]).unwrap(), 0);
}

#[test]
fn it_says_why_when_nobody_takes_the_card() {
    let place = Place::new();
    let (listener, port) = vpcd();
    let starter = place.start(&format!("vpcd:127.0.0.1:{port}"));
    // A slot with another card in it: the connection is made, and nothing asked.
    let (mut card, _) = listener.accept().unwrap();
    let (status, said) = end(starter);
    assert_eq!(status, Some(4), "{said}");
    assert!(said.contains("the slot is taken by another card"), "{said}");
    assert!(said.contains("--background: not ready after 30 s: waiting for another card"), "{said}");
    // Nothing is left behind.
    assert_eq!(card.read(&mut [0]).unwrap(), 0);
    assert!(!place.path("card/vscclient.pid").exists());
}

#[test]
fn it_says_why_there_is_no_card() {
    let place = Place::new();
    fs::remove_file(place.path("card/signature.key")).unwrap();
    let (status, said) = end(place.start("unix-listen:vm.sock"));
    assert!(status == Some(3) && said.contains("signature.key"), "{status:?}: {said}");
}

/// A service may start before its card is put in; who is told that programs see the card may not.
#[test]
fn it_says_that_no_card_is_in() {
    let place = Place::new();
    let (_listener, port) = vpcd();
    let mut command = place.command();
    command.args(["--pcsc", "no such reader", "--background", &format!("vpcd:127.0.0.1:{port}")]);
    let (status, said) = end(command.spawn().unwrap());
    assert_eq!(status, Some(4), "{said}");
    assert!(said.contains("--background: not ready after 30 s: no card is in"), "{said}");
}

/// Somebody typed Ctrl-C, or a job ran out of time.
#[test]
fn without_its_starter_it_leaves() {
    let place = Place::new();
    let (listener, port) = vpcd();
    let mut starter = place.start(&format!("vpcd:127.0.0.1:{port}"));
    let (mut card, _) = listener.accept().unwrap();
    starter.kill().unwrap();
    starter.wait().unwrap();
    assert_eq!(card.read(&mut [0]).unwrap(), 0);
}

/// For a card in no directory: secrets from descriptors, and its files where the state is.
#[test]
fn inherited_secrets_reach_it() {
    let place = Place::new();
    let mut shell = Command::new("sh");
    let script = "exec \"$VSCCLIENT\" --pem card/authentication.pem,card/authentication.key --pin-file fd:5 \
                  --background unix-listen:vm.sock 5<pin";
    shell.args(["-c", script]).env("VSCCLIENT", env!("CARGO_BIN_EXE_vscclient")).current_dir(place.0.path());
    shell.env("XDG_STATE_HOME", place.path("state")).stdin(Stdio::null());
    let (status, said) = end(shell.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap());
    assert!(status == Some(0) && said.contains("the card is for unix-listen:vm.sock"), "{status:?}: {said}");
    UnixStream::connect(place.path("vm.sock")).unwrap();
    let name = "state/vscclient/vscclient-unix-listen-vm-sock";
    place.stop(&format!("{name}.pid"));
    let log = fs::read_to_string(place.path(&format!("{name}.log"))).unwrap();
    assert!(log.contains("INFO") && !log.contains('\u{1b}'), "{log}");
}
