//! What the log tells of a card that programs refuse, and what to do about it.
#![allow(clippy::unwrap_used, reason = "a test says where it failed")]

mod vpcd;

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use vpcd::{ATR, answer, ask, power, vpcd};

const VERIFY: [u8; 4] = [0x00, 0x20, 0x00, 0x80];
const PIN: &[u8; 6] = b"271828";
const WRONG: &[u8; 6] = b"314159";

struct Place(TempDir);

impl Place {
    fn new(more: &[&str]) -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        let pin = OpenOptions::new().write(true).create_new(true).mode(0o600).open(place.path("pin"));
        pin.unwrap().write_all(PIN).unwrap();
        let mut new = place.command(Path::new(env!("CARGO_BIN_EXE_vscclient")));
        new.args(["new-card", "a card", "--name", "Jane", "--algorithm", "p256", "--pin-file", "pin"]);
        assert!(new.args(more).output().unwrap().status.success());
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.current_dir(self.0.path()).env("XDG_STATE_HOME", self.path("state"));
        command.env("PCSCLITE_CSOCK_NAME", self.path("no-pcscd")).stdin(Stdio::null());
        command
    }

    /// The card in a reader until `meanwhile` is over; what was logged.
    fn log(&self, args: &[&str], meanwhile: impl FnOnce(&mut TcpStream)) -> String {
        let (listener, port): (TcpListener, u16) = vpcd();
        let mut command = self.command(Path::new(env!("CARGO_BIN_EXE_vscclient")));
        command.args(args).arg(format!("vpcd:127.0.0.1:{port}"));
        let mut client = command.stderr(Stdio::piped()).spawn().unwrap();
        // Without it, the pipe would be full sooner or later.
        let mut stderr = client.stderr.take().unwrap();
        let log = std::thread::spawn(move || {
            let mut log = String::new();
            stderr.read_to_string(&mut log).map(|_| log)
        });
        let (mut card, _) = listener.accept().unwrap();
        power(&mut card);
        meanwhile(&mut card);
        kill_process(Pid::from_child(&client), Signal::TERM).unwrap();
        assert!(client.wait().unwrap().success());
        log.join().unwrap().unwrap()
    }

    /// The command as the log has it, from another directory.
    fn run_unlock(&self, log: &str) {
        let line = log.lines().find(|line| line.contains("blocked; ")).unwrap();
        let (_, told) = line.split_once("to give it its tries back: ").unwrap();
        let programs = Path::new(env!("CARGO_BIN_EXE_vscclient")).parent().unwrap();
        let mut shell = self.command(Path::new("sh"));
        shell.args(["-c", told]).current_dir("/");
        let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap());
        let output = shell.env("PATH", path).output().unwrap();
        assert!(output.status.success(), "{told}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

fn transmit(card: &mut TcpStream, command: &[u8]) -> Vec<u8> {
    card.write_all(&[&(command.len() as u16).to_be_bytes()[..], command].concat()).unwrap();
    answer(card)
}

fn verify(card: &mut TcpStream, pin: &[u8; 6]) -> Vec<u8> {
    transmit(card, &[&VERIFY[..], &[8], pin, &[0xFF; 2]].concat())
}

fn use_up(card: &mut TcpStream) {
    for left in [0xC2, 0xC1, 0xC0] {
        assert_eq!(verify(card, WRONG), [0x63, left]);
    }
}

#[test]
fn what_unlocks_a_card_is_told_when_it_is_blocked() {
    let place = Place::new(&[]);
    let files: Vec<_> = ["authentication", "signature"]
        .iter()
        .flat_map(|name| ["--pem".to_owned(), format!("a card/{name}.pem,a card/{name}.key")])
        .collect();
    let files: Vec<_> = files.iter().map(String::as_str).collect();
    let named = [&files[..], &["--card-name", "it's second", "--pin-file", "pin"]].concat();
    for args in [&["card", "a card"][..], &named] {
        let log = place.log(args, use_up);
        for (line, count) in
            [("WARN wrong PIN, 2 tries left", 1), ("WARN wrong PIN, 1 try left", 1), ("WARN ", 3)]
        {
            assert_eq!(log.matches(line).count(), count, "{log}");
        }
        assert!(log.contains("WARN wrong PIN, and now it is blocked; to give it its tries back: "), "{log}");
        assert!(!log.contains("314159"), "{log}");
        // It is said at the next start, too.
        let log = place.log(args, |card| assert_eq!(verify(card, PIN), [0x69, 0x83]));
        assert!(log.matches("to give it its tries back: vscclient unlock ").count() == 2, "{log}");
        place.run_unlock(&log);
        let log = place.log(args, |card| {
            // Nor is a question about the tries a PIN.
            assert_eq!(transmit(card, &VERIFY), [0x63, 0xC3]);
            assert_eq!(verify(card, PIN), [0x90, 0x00]);
        });
        assert!(!log.contains("blocked") && !log.contains("wrong"), "{log}");
    }
}

#[test]
fn who_repeats_wrong_pins_fills_no_log() {
    let place = Place::new(&[]);
    let log = place.log(&["card", "a card"], |card| {
        use_up(card);
        for _ in 0..500 {
            assert_eq!(verify(card, WRONG), [0x69, 0x83]);
        }
    });
    assert!((60..70).contains(&log.lines().count()), "{log}");
}

#[test]
fn certificates_out_of_their_time_are_told_once() {
    let place = Place::new(&["--expired"]);
    let stay = |card: &mut TcpStream| {
        ask(card, ATR);
        answer(card);
    };
    let log = place.log(&["card", "a card"], stay);
    for name in ["authentication", "signature", "encryption", "card-authentication"] {
        let told: Vec<_> = log
            .lines()
            .filter(|line| line.contains(&format!("certificate \"{name}\" has expired, on ")))
            .collect();
        assert!(told.len() == 1 && told[0].contains(" WARN ") && told[0].ends_with('Z'), "{log}");
    }
    let log = Place::new(&[]).log(&["card", "a card"], stay);
    assert!(!log.contains("WARN"), "{log}");
}
