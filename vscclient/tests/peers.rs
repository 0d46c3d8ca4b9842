//! Who connects to a vscclient that listens, and wants nothing good, or nothing at all.
#![allow(clippy::unwrap_used, reason = "a test says where it failed")]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::time::timeout;
use vscard_protocol::CardSource;
use vscard_protocol::chardev::{Channel, Plaintext};
use vscard_protocol::codec::encode;
use vscard_protocol::message::{Body, Init, Message, ReaderId};
use vscard_protocol::passthru::PassthruCard;

/// What takes longer never comes.
const NEVER: Duration = Duration::from_secs(60);
const ROUNDS: u32 = 10_000;

/// The program with a card, and its lines. Ended with the test.
struct Service {
    directory: TempDir,
    process: Child,
    lines: Receiver<String>,
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Service {
    /// That listens there; `PLACE` stands for a directory of its own.
    fn start(endpoint: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let pin = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path("pin"));
        pin.unwrap().write_all(b"271828\n").unwrap();
        let vscclient = || Command::new(env!("CARGO_BIN_EXE_vscclient"));
        let mut new = vscclient();
        new.arg("new-card").arg(path("card")).args(["--name", "Jane", "--algorithm", "p256", "--pin-file"]);
        assert!(new.arg(path("pin")).stdout(Stdio::null()).status().unwrap().success());
        let mut serve = vscclient();
        serve.arg("card").arg(path("card"));
        serve.arg(endpoint.replace("PLACE", directory.path().to_str().unwrap()));
        let mut process = serve.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let stderr = BufReader::new(process.stderr.take().unwrap());
        let (told, lines) = channel();
        thread::spawn(move || stderr.lines().map_while(Result::ok).try_for_each(|line| told.send(line)));
        Self { directory, process, lines }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The next line with this in it.
    fn line(&self, part: &str) -> String {
        loop {
            let line = self.lines.recv_timeout(NEVER).unwrap();
            if line.contains(part) {
                return line;
            }
        }
    }

    /// Its lines since, when it has ended in order, which it does soon.
    fn ended(mut self) -> Vec<String> {
        let start = Instant::now();
        kill_process(Pid::from_child(&self.process), Signal::TERM).unwrap();
        assert_eq!(self.process.wait().unwrap().code(), Some(0));
        assert!(start.elapsed() < NEVER);
        self.lines.iter().collect()
    }
}

#[test]
fn wrong_peers_do_not_fill_the_log() {
    let service = Service::start("unix-listen:PLACE/vm.sock");
    service.line("listening on");
    let wrong = Body::Init(Init { magic: *b"what", ..Init::ours(None) });
    let wrong = encode(&Message::new(ReaderId::UNDEFINED, wrong)).unwrap();
    let start = Instant::now();
    for round in 0..ROUNDS {
        let mut peer = UnixStream::connect(service.path("vm.sock")).unwrap();
        if round % 2 == 0 {
            let _ = peer.write_all(wrong.expose());
            let _ = peer.read_to_end(&mut Vec::new());
        }
    }
    let most = 64 + start.elapsed().as_secs() / 60 + 1;
    let lines = service.ended();
    let mut kinds = BTreeMap::<String, u64>::new();
    for line in &lines {
        *kinds.entry(line.chars().filter(|char| !char.is_ascii_digit()).collect()).or_default() += 1;
    }
    assert!(kinds.values().all(|count| *count <= most), "{kinds:#?}");
    assert!(
        lines.len() < 300 && lines.iter().any(|line| line.contains("not all of this is told")),
        "{kinds:#?}"
    );
}

#[tokio::test]
async fn a_host_gets_the_card_past_silent_peers() {
    let service = Service::start("tcp-listen:127.0.0.1:0");
    let line = service.line("listening on tcp-listen:");
    let port = line.rsplit(':').next().unwrap().parse().unwrap();
    let silent = || (0..50).map(|_| TcpStream::connect(("127.0.0.1", port)).unwrap()).collect::<Vec<_>>();
    let _before = silent();
    let endpoint = format!("tcp:127.0.0.1:{port}").parse().unwrap();
    let channel = Channel::open(endpoint, Plaintext::LoopbackOnly).await.unwrap();
    let (card, serve) = PassthruCard::new(channel, NEVER);
    tokio::spawn(serve);
    let mut presence = card.presence();
    timeout(NEVER, presence.changed()).await.expect("a card");
    let insertion = presence.get().insertion().unwrap();
    // Whoever comes now waits until the host is gone.
    let _after = silent();
    assert!(timeout(NEVER, card.power_on(insertion)).await.unwrap().is_ok());
}

#[test]
fn with_silent_peers_it_leaves_in_order() {
    let service = Service::start("unix-listen:PLACE/vm.sock");
    service.line("listening on");
    let mut peers: Vec<_> = (0..3).map(|_| UnixStream::connect(service.path("vm.sock")).unwrap()).collect();
    for peer in &mut peers {
        // What it finds out with where a message begins.
        peer.read_exact(&mut [0; 12]).unwrap();
    }
    let lines = service.ended();
    assert_eq!(lines.iter().filter(|line| line.contains("left a host")).count(), 3, "{lines:?}");
}
