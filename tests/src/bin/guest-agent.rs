//! Runs inside the test guest and does what the host asks for over a serial port (see `guest::wire`).
//!
//! Commands may overlap: a test that waits for a card in one can pull it with another, and the host can fetch
//! logs while a command hangs.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use rustix::fs::inotify;
use rustix::process::{Pid, Signal, kill_process_group};
use stack_tests::guest::wire::{self, Verb};

const USAGE: &str = "\
usage: guest-agent serve TTY     answer the host on TTY
       guest-agent await PATH    return when PATH exists (its directory must exist already)
";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let done = match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["serve", tty] => serve(tty),
        ["await", path] => await_path(Path::new(path)),
        _ => {
            eprint!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("guest-agent: {error}");
            ExitCode::FAILURE
        }
    }
}

struct Agent {
    line: Mutex<File>,
    /// The process groups of commands that run, by request.
    running: Mutex<HashMap<u64, Pid>>,
}

fn serve(tty: &str) -> io::Result<()> {
    let mut input = BufReader::with_capacity(1 << 16, File::open(tty)?);
    let line = OpenOptions::new().write(true).open(tty)?;
    let agent = Arc::new(Agent { line: Mutex::new(line), running: Mutex::default() });
    agent.send(Verb::Ready, 0, 0, b"")?;
    while let Some((header, payload)) = wire::read(&mut input)? {
        let id = header.id;
        match header.verb {
            Verb::Run => {
                let agent = Arc::clone(&agent);
                thread::spawn(move || {
                    let done = agent.run(id, &payload);
                    agent.answer(id, done)
                });
            }
            Verb::Kill => {
                if let Some(group) = lock(&agent.running).get(&id) {
                    // Gone already is as good as killed.
                    let _ = kill_process_group(*group, Signal::KILL);
                }
            }
            Verb::Put => agent.answer(id, put(&payload, header.status == 1).map(|()| (0, Vec::new())))?,
            Verb::Get => agent.answer(id, get(&payload).map(|bytes| (0, bytes)))?,
            Verb::Ready | Verb::Done => {}
        }
    }
    Ok(())
}

impl Agent {
    fn send(&self, verb: Verb, id: u64, status: i32, payload: &[u8]) -> io::Result<()> {
        lock(&self.line).write_all(&wire::message(verb, id, status, payload))
    }

    fn answer(&self, id: u64, done: io::Result<(i32, Vec<u8>)>) -> io::Result<()> {
        match done {
            Ok((status, bytes)) => self.send(Verb::Done, id, status, &bytes),
            Err(error) => self.send(Verb::Done, id, 126, format!("guest-agent: {error}\n").as_bytes()),
        }
    }

    fn run(&self, id: u64, command: &[u8]) -> io::Result<(i32, Vec<u8>)> {
        let command = std::str::from_utf8(command).map_err(io::Error::other)?;
        // A file, not a pipe: what the command leaves in the background keeps it open and must not be waited for.
        let path = format!("/tmp/.agent-{id}");
        let output = File::create(&path)?;
        let mut child = Command::new("sh")
            .args(["-c", command])
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .process_group(0)
            .spawn()?;
        let group = Pid::from_child(&child);
        lock(&self.running).insert(id, group);
        let status = child.wait();
        lock(&self.running).remove(&id);
        let bytes = fs::read(&path);
        fs::remove_file(&path)?;
        let status = status?;
        let code = status.code().or(status.signal().map(|signal| 128 + signal)).unwrap_or(-1);
        Ok((code, bytes?))
    }
}

fn put(payload: &[u8], append: bool) -> io::Result<()> {
    let nul = payload.iter().position(|byte| *byte == 0).ok_or(io::ErrorKind::InvalidInput)?;
    let path = std::str::from_utf8(&payload[..nul]).map_err(io::Error::other)?;
    if let Some(directory) = Path::new(path).parent() {
        fs::create_dir_all(directory)?;
    }
    let mut file = OpenOptions::new().create(true).write(true).append(append).truncate(!append).open(path)?;
    file.write_all(&payload[nul + 1..])
}

fn get(payload: &[u8]) -> io::Result<Vec<u8>> {
    fs::read(std::str::from_utf8(payload).map_err(io::Error::other)?)
}

fn await_path(path: &Path) -> io::Result<()> {
    let directory = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC)?;
    inotify::add_watch(&watch, directory, inotify::WatchFlags::CREATE | inotify::WatchFlags::MOVED_TO)?;
    let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
    // The watch stands before the first look, so nothing falls between.
    while !path.exists() {
        inotify::Reader::new(&watch, &mut buffer).next()?;
    }
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
