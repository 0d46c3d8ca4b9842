//! Our programs, run as a user runs them, with all they say at hand.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::watch;

use crate::turn;

/// For a line that ought to come soon.
const LINE_LIMIT: Duration = Duration::from_secs(90);

/// A program of the workspace, running. Killed when dropped.
pub struct Process {
    child: Child,
    lines: Arc<Mutex<Vec<String>>>,
    count: watch::Receiver<usize>,
}

/// Where cargo put a program of the workspace, beside the program that asks.
pub fn program(name: &str) -> Result<PathBuf> {
    let here = std::env::current_exe()?;
    let found = here.ancestors().skip(1).take(2).map(|directory| directory.join(name));
    found
        .into_iter()
        .find(|path| path.is_file())
        .with_context(|| format!("{name} is not built; `cargo xtask test` builds it"))
}

async fn keep(stream: impl AsyncRead + Unpin, lines: Arc<Mutex<Vec<String>>>, counted: watch::Sender<usize>) {
    let mut reader = BufReader::new(stream).lines();
    while let Ok(Some(line)) = reader.next_line().await {
        let mut lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.push(line);
        counted.send_replace(lines.len());
    }
}

impl Process {
    /// Starts a program of the workspace. Its standard input is empty.
    pub fn start<A: AsRef<OsStr>>(
        name: &str,
        args: impl IntoIterator<Item = A>,
        environment: &[(&str, &OsStr)],
    ) -> Result<Self> {
        let mut command = Command::new(program(name)?);
        command.args(args).envs(environment.iter().copied());
        Self::spawn(command)
    }

    /// Starts a prepared command.
    pub fn spawn(mut command: Command) -> Result<Self> {
        turn::side_by_side();
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let lines = Arc::new(Mutex::new(Vec::new()));
        let (counted, count) = watch::channel(0);
        let stderr = child.stderr.take().context("no standard error")?;
        let stdout = child.stdout.take().context("no standard output")?;
        tokio::spawn(keep(stderr, lines.clone(), counted.clone()));
        tokio::spawn(keep(stdout, lines.clone(), counted));
        Ok(Self { child, lines, count })
    }

    /// All that it has said so far.
    pub fn log(&self) -> String {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).join("\n")
    }

    /// Lines said so far; for [`line_after`](Self::line_after).
    pub fn mark(&self) -> usize {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// The first line with `part` in it, said already or to come.
    pub async fn line(&self, part: &str) -> Result<String> {
        self.line_after(0, part).await
    }

    /// The same, of the lines after a [`mark`](Self::mark).
    pub async fn line_after(&self, mark: usize, part: &str) -> Result<String> {
        let mut count = self.count.clone();
        let found = async {
            loop {
                {
                    let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
                    if let Some(line) = lines.iter().skip(mark).find(|line| line.contains(part)) {
                        return Ok(line.clone());
                    }
                }
                if count.changed().await.is_err() {
                    bail!("it ended without saying {part:?}; it said:\n{}", self.log());
                }
            }
        };
        tokio::time::timeout(LINE_LIMIT, found)
            .await
            .map_err(|_| anyhow!("{part:?} not said within {LINE_LIMIT:?}; it said:\n{}", self.log()))?
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(self.pid()?, signal)?;
        Ok(())
    }

    fn pid(&self) -> Result<Pid> {
        let id = self.child.id().context("it has ended")?;
        Pid::from_raw(i32::try_from(id)?).context("process id 0")
    }

    /// Waits for its end.
    pub async fn ended(&mut self) -> Result<ExitStatus> {
        tokio::time::timeout(LINE_LIMIT, self.child.wait())
            .await
            .map_err(|_| anyhow!("it did not end within {LINE_LIMIT:?}; it said:\n{}", self.log()))?
            .map_err(Into::into)
    }

    /// SIGTERM and its end.
    pub async fn terminate(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::TERM)?;
        self.ended().await
    }

    /// A field of its `/proc/PID/status` in KiB, such as `VmHWM`, the largest memory it had.
    pub fn memory_kib(&self, field: &str) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()?))?;
        let line = status.lines().find(|line| line.starts_with(field)).context("no such field")?;
        line.split_whitespace().nth(1).context("no value")?.parse().context("no number")
    }

    /// Processor time it has used, in clock ticks (100 a second).
    pub fn cpu_ticks(&self) -> Result<u64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid()?.as_raw_nonzero()))?;
        let fields: Vec<&str> = stat.rsplit_once(')').context("no name")?.1.split_whitespace().collect();
        // utime and stime, fields 14 and 15 of proc(5).
        Ok(fields.get(11).context("utime")?.parse::<u64>()?
            + fields.get(12).context("stime")?.parse::<u64>()?)
    }
}
