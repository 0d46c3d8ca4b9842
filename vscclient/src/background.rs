//! `--background`: the program starts itself once more, waits until that one is ready, and leaves it running.
//!
//! There is no fork: the other one reads the same command line, and inherited descriptors (`fd:N`) are its too. Its
//! standard output is a socket on which it tells lines: `S` and what it waits for, `R` and what its starter is to print.
//! Until it is ready its standard input and error are its starter's, then nothing and the log file, so that whoever
//! waits for the end of what the starter prints does not wait for ever.

use std::fs::{File, Metadata};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use emulated_card::setup::shell_word;
use emulated_card::state::{StateDirectory, StateError};
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};
use tokio::sync::mpsc::Sender;
use vscard_protocol::chardev::Endpoint;

use crate::session::Wish;
use crate::{DISCONNECTED, KILLED, LEFT, UNUSABLE, fail};

/// Set for the one in the background.
const IN_BACKGROUND: &str = "VSCCLIENT_BACKGROUND";
/// Until it is ready, or given up.
const READY: Duration = Duration::from_secs(30);
/// For its end, once it is given up.
const LEAVING: Duration = Duration::from_secs(5);
/// Longest line from it.
const MOST_LINE: u64 = 8192;

/// Whether this is the one in the background.
pub(crate) fn is_here() -> bool {
    std::env::var_os(IN_BACKGROUND).is_some()
}

/// Starts the one in the background, with this one's command line; the exit status.
pub(crate) fn start() -> u8 {
    let spawned = UnixStream::pair().and_then(|(ours, theirs)| {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg0(std::env::args_os().next().unwrap_or_default()).args(std::env::args_os().skip(1));
        command.env(IN_BACKGROUND, "1").stdout(OwnedFd::from(theirs));
        Ok((ours, command.spawn()?))
    });
    match spawned {
        Ok((told, child)) => await_ready(told, child),
        Err(error) => fail(UNUSABLE, &format!("--background: {error}")),
    }
}

fn await_ready(told: UnixStream, mut child: Child) -> u8 {
    let until = Instant::now() + READY;
    let mut waits_for = String::new();
    let mut told = BufReader::new(told);
    loop {
        let left = until.saturating_duration_since(Instant::now());
        // None left would be no limit.
        let limited = told.get_ref().set_read_timeout(Some(left.max(Duration::from_millis(1))));
        let mut line = String::new();
        let read = limited.and_then(|()| told.by_ref().take(MOST_LINE).read_line(&mut line));
        match (read, line.split_at_checked(1)) {
            (Ok(1..), Some(("R", text))) => {
                // It is there, whoever hears of it.
                let _ = write!(io::stdout(), "{text}");
                return LEFT;
            }
            (Ok(1..), Some((_, text))) => waits_for = format!(": {}", text.trim_end()),
            // It has said why.
            (Ok(_), _) => return ended(&mut child),
            (Err(error), _) if error.kind() == io::ErrorKind::Interrupted => {}
            (Err(_), _) => break,
        }
    }
    fail(DISCONNECTED, &format!("--background: not ready after {} s{waits_for}", READY.as_secs()));
    // It leaves when nobody listens.
    drop(told);
    let since = Instant::now();
    while since.elapsed() < LEAVING {
        if !matches!(child.try_wait(), Ok(None)) {
            return DISCONNECTED;
        }
        thread::sleep(Duration::from_millis(20));
    }
    let _ = child.kill();
    DISCONNECTED
}

/// Of one that ended before it was ready.
fn ended(child: &mut Child) -> u8 {
    let status = child.wait().ok().and_then(|status| status.code()).and_then(|code| u8::try_from(code).ok());
    // Left in order, because it was told to.
    status.filter(|status| *status != LEFT).unwrap_or(KILLED)
}

/// The one in the background, until it is ready.
static HERE: Mutex<Option<Here>> = Mutex::new(None);

struct Here {
    starter: UnixStream,
    pid_file: PathBuf,
    pid: File,
    log_file: PathBuf,
    log: File,
}

/// The file with the process id, while the process is there: that is what its lock says, whatever is left of others.
/// Removed when this is dropped.
pub(crate) struct PidFile {
    path: PathBuf,
    _lock: File,
}

impl Drop for PidFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Makes ready for the background, with a file for the process id and one for the log: in `directory`, the card's own,
/// or where the state of the user's cards is.
///
/// # Errors
/// What to tell the user.
pub(crate) fn prepare(directory: Option<&Path>, endpoint: &Endpoint) -> Result<PidFile, String> {
    let (directory, name) = match directory {
        Some(directory) => (directory.to_owned(), "vscclient".to_owned()),
        None => (state_directory().map_err(|error| error.to_string())?, file_name(endpoint)),
    };
    let path = |extension: &str| directory.join(format!("{name}.{extension}"));
    let failed = |path: &Path, error: io::Error| format!("--background: {}: {error}", path.display());
    let (pid_file, log_file) = (path("pid"), path("log"));
    let pid = lock(&pid_file).map_err(|error| failed(&pid_file, error))?;
    let log = open(&log_file, OFlags::APPEND).and_then(|log| log.set_len(0).map(|()| log));
    let log = log.map_err(|error| failed(&log_file, error))?;
    let starter = io::stdout().as_fd().try_clone_to_owned().map(UnixStream::from);
    let starter = starter.map_err(|error| format!("--background: {error}"))?;
    // The lock is that of both.
    let file = pid.try_clone().map_err(|error| failed(&pid_file, error))?;
    let kept = PidFile { path: pid_file.clone(), _lock: file };
    *here() = Some(Here { starter, pid_file, pid, log_file, log });
    Ok(kept)
}

fn state_directory() -> Result<PathBuf, StateError> {
    let directory = StateDirectory::of_user()?;
    directory.create()?;
    Ok(directory.path().to_owned())
}

/// Of what is served where: one endpoint takes one card.
fn file_name(endpoint: &Endpoint) -> String {
    let text = endpoint.to_string().replace(|character: char| !character.is_ascii_alphanumeric(), "-");
    format!("vscclient-{text}")
}

/// A file of this user's, under this name only. What else may have been put there is neither waited for nor written to.
fn open(path: &Path, flags: OFlags) -> io::Result<File> {
    // Opened without waiting for a reader, should it be a FIFO.
    let flags =
        flags | OFlags::WRONLY | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let private = Mode::RUSR | Mode::WUSR;
    let file = File::from(rustix::fs::open(path, flags, private)?);
    let found = file.metadata()?;
    if !found.is_file() || found.nlink() != 1 || found.uid() != rustix::process::geteuid().as_raw() {
        return Err(io::Error::other("is there already, and no file of this user's alone"));
    }
    rustix::fs::fchmod(&file, private)?;
    Ok(file)
}

fn lock(path: &Path) -> io::Result<File> {
    loop {
        let file = open(path, OFlags::empty())?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                return Err(io::Error::other("that vscclient is in the background already; stop it first"));
            }
            Err(errno) => return Err(errno.into()),
        }
        // Another one's may have been removed meanwhile.
        let identity = |found: Metadata| (found.dev(), found.ino());
        if std::fs::symlink_metadata(path).map(identity).ok() == Some(identity(file.metadata()?)) {
            return Ok(file);
        }
    }
}

fn here() -> MutexGuard<'static, Option<Here>> {
    HERE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Leaves with its starter, as long as it is not ready.
pub(crate) fn leave_with_starter(wishes: Sender<Wish>) -> io::Result<()> {
    let Some(mut starter) = here().as_ref().map(|here| here.starter.try_clone()).transpose()? else {
        return Ok(());
    };
    let watch = move || {
        // It says nothing.
        let _ = starter.read(&mut [0]);
        if here().is_some() {
            let _ = wishes.blocking_send(Wish::Leave);
        }
    };
    thread::Builder::new().name("starter".into()).spawn(watch).map(drop)
}

/// What it waits for.
pub(crate) fn status(status: &str) {
    if let Some(here) = &mut *here() {
        let _ = writeln!(here.starter, "S{}", status.replace('\n', " "));
    }
}

/// Goes to the background, if that is where it belongs and is not yet.
pub(crate) fn ready(status: &str) {
    let Some(mut here) = here().take() else { return };
    if let Err(error) = here.detach() {
        tracing::error!("--background: {error}");
    }
    let (pid, log) = (shell_word(&here.pid_file), shell_word(&here.log_file));
    let line = format!("{}; log: {log}; to end it: kill $(cat {pid})", status.replace('\n', " "));
    // Whoever is not there any more to hear it has found a card that is served, as was wanted.
    let _ = writeln!(here.starter, "R{line}");
}

impl Here {
    fn detach(&mut self) -> io::Result<()> {
        self.pid.set_len(0)?;
        writeln!(self.pid, "{}", std::process::id())?;
        // Out of reach of the terminal, its signals and its end. Who leads a group is out of its reach already.
        let _ = rustix::process::setsid();
        let nothing = File::options().read(true).write(true).open("/dev/null")?;
        dup2_stdin(&nothing)?;
        dup2_stdout(&nothing)?;
        dup2_stderr(&self.log)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_file_for_each_endpoint() {
        let name = |text: &str| file_name(&text.parse().unwrap());
        assert_eq!(name("tcp:localhost:35963"), "vscclient-tcp-localhost-35963");
        assert_eq!(name("unix:/run/user/1000/vm1.sock"), "vscclient-unix--run-user-1000-vm1-sock");
    }

    #[test]
    fn what_else_is_there_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let [file, link, fifo, log] = ["file", "link", "fifo", "log"].map(|name| directory.path().join(name));
        std::fs::write(&file, "kept").unwrap();
        std::fs::hard_link(&file, &link).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)
            .unwrap();
        for path in [&link, &fifo] {
            assert!(open(path, OFlags::APPEND).is_err(), "{}", path.display());
        }
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "kept");
        std::fs::write(&log, "").unwrap();
        rustix::fs::chmod(&log, Mode::from_raw_mode(0o666)).unwrap();
        assert_eq!(open(&log, OFlags::APPEND).unwrap().metadata().unwrap().mode() & 0o777, 0o600);
    }

    #[test]
    fn one_process_has_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vscclient.pid");
        // What a killed one left is no hindrance.
        std::fs::write(&path, "1\n").unwrap();
        let first = lock(&path).unwrap();
        assert!(lock(&path).unwrap_err().to_string().contains("already"));
        drop(first);
        lock(&path).unwrap();
    }
}
