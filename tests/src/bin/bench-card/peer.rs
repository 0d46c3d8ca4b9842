//! Programs beside this one that do as they are told, a line at a time.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use stack_tests::database::{Database, PIN};
use stack_tests::process::program;

/// The C programs.
pub(crate) struct Programs {
    /// `peers/peer.c`.
    pub(crate) peer: PathBuf,
    /// `peers/pkcs11.c`.
    pub(crate) pkcs11: PathBuf,
}

impl Programs {
    pub(crate) fn compile() -> Result<Self> {
        Ok(Self {
            peer: compile("peer", &["libcacard", "nss"], "-lpthread")?,
            pkcs11: compile("pkcs11", &["nss"], "-ldl")?,
        })
    }
}

/// Compiles a program, to lie beside this one.
fn compile(name: &str, libraries: &[&str], more: &str) -> Result<PathBuf> {
    let binary = program("bench-card")?.with_file_name(format!("bench-{name}"));
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("peers/{name}.c"));
    let flags = Command::new("pkg-config").args(["--cflags", "--libs"]).args(libraries).output()?;
    ensure!(flags.status.success(), "pkg-config: {}", String::from_utf8_lossy(&flags.stderr));
    let compiled = Command::new("gcc")
        .args(["-O2", "-Wall", "-o"])
        .args([&binary, &source])
        .args(String::from_utf8_lossy(&flags.stdout).split_whitespace())
        .arg(more)
        .status()
        .context("gcc")?;
    ensure!(compiled.success(), "gcc does not compile {name}.c");
    Ok(binary)
}

/// One of them, running.
pub(crate) struct Peer {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    /// From its start to the first thing it said: of libcacard, to the answer to the first SELECT.
    pub(crate) first: Duration,
}

impl Peer {
    /// `peer.c` with a database.
    pub(crate) fn start(
        programs: &Programs,
        kind: &str,
        database: &Database,
        names: &[&str],
    ) -> Result<Self> {
        Self::spawn(Command::new(&programs.peer).arg(kind).arg(database.spec()).args(names))
    }

    /// Any; it gets the PIN.
    pub(crate) fn spawn(command: &mut Command) -> Result<Self> {
        let start = Instant::now();
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .context("the peer program")?;
        let input = child.stdin.take().context("the peer's input")?;
        let output = BufReader::new(child.stdout.take().context("the peer's output")?);
        let mut peer = Self { child, input, output, first: Duration::ZERO };
        writeln!(peer.input, "{PIN}")?;
        let mut said = peer.line()?;
        peer.first = start.elapsed();
        while said != "ready" {
            said = peer.line()?;
        }
        Ok(peer)
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        ensure!(self.output.read_line(&mut line)? > 0, "the peer ended");
        Ok(line.trim_end().to_owned())
    }

    /// Has an operation done so often.
    pub(crate) fn run(&mut self, operation: &str, count: u32) -> Result<Duration> {
        writeln!(self.input, "{operation} {count}")?;
        Ok(Duration::from_nanos(self.line()?.parse()?))
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
