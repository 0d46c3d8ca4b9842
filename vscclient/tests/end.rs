//! It ends when it is told to, whatever hangs in it.
#![allow(clippy::unwrap_used, reason = "a test says where it failed")]

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::net::{SendFlags, send};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use tempfile::TempDir;

/// What takes longer never comes.
const NEVER: Duration = Duration::from_secs(60);

/// The program, with a module that hangs once the file `now` is there, and its log.
struct Service {
    directory: TempDir,
    process: Child,
    log: BufReader<UnixStream>,
    stderr: UnixStream,
}

impl Service {
    fn start(environment: &[(&str, &str)]) -> Self {
        let mut service = Self::with(environment, &[]);
        service.line("listening on unix-listen:");
        service
    }

    fn with(environment: &[(&str, &str)], arguments: &[&str]) -> Self {
        let program = Command::new(env!("CARGO_BIN_EXE_vscclient"));
        Self::run(program, Stdio::null(), environment, arguments)
    }

    /// With the console that a terminal has.
    fn on(terminal: OwnedFd) -> Self {
        let mut program = Command::new("setsid");
        program.args(["--ctty", env!("CARGO_BIN_EXE_vscclient")]).stdout(Stdio::null());
        let mut service = Self::run(program, terminal.into(), &[], &[]);
        service.line("listening on unix-listen:");
        service
    }

    fn run(mut command: Command, input: Stdio, environment: &[(&str, &str)], arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let module = path("stuck.so");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/../ccid-device/tests/daemon/stuck.c");
        let mut compiler = Command::new("cc");
        // Not unloaded before the end of the process.
        compiler.args(["-Wall", "-shared", "-fPIC", "-Wl,-z,nodelete", source, "-o"]).arg(&module);
        assert!(compiler.status().unwrap().success());
        let (log, stderr) = UnixStream::pair().unwrap();
        log.set_read_timeout(Some(NEVER)).unwrap();
        command.arg("--module").arg(&module).args(arguments);
        command.arg(format!("unix-listen:{}", path("vm.sock").display()));
        command.env("STUCK", path("now")).env("XDG_STATE_HOME", path("state")).envs(environment.to_vec());
        command.stdin(input).stderr(OwnedFd::from(stderr.try_clone().unwrap()));
        let process = command.spawn().unwrap();
        Self { directory, process, log: BufReader::new(log), stderr }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Waits for a line with this in it.
    fn line(&mut self, part: &str) {
        while !self.log.by_ref().lines().next().unwrap().unwrap().contains(part) {}
    }

    fn hang(&mut self) {
        std::fs::write(self.path("now"), "").unwrap();
        self.line("stuck");
    }

    fn terminate(&self) {
        kill_process(Pid::from_child(&self.process), Signal::TERM).unwrap();
    }

    /// How it ended; it ends soon. Until then this is done again and again.
    fn end(&mut self, meanwhile: impl Fn(&Self)) -> ExitStatus {
        let start = Instant::now();
        while start.elapsed() < NEVER {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status;
            }
            meanwhile(self);
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("it goes on");
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn with_a_module_that_hangs_it_leaves_in_order() {
    let mut service = Service::start(&[]);
    service.hang();
    service.terminate();
    assert_eq!(service.end(|_| {}).code(), Some(0));
    assert!(!service.path("vm.sock").exists());
}

/// Whatever was not given up is lost at once.
#[test]
fn on_a_terminal_its_card_is_given_up_too() {
    let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&terminal).unwrap();
    unlockpt(&terminal).unwrap();
    let name = ptsname(&terminal, Vec::new()).unwrap();
    let other =
        std::fs::File::options().read(true).write(true).open(OsStr::from_bytes(name.to_bytes())).unwrap();
    let mut service = Service::on(other.into());
    service.hang();
    service.terminate();
    service.line("ended without a card whose module does not come back");
    assert_eq!(service.end(|_| {}).code(), Some(0));
}

#[test]
fn with_a_module_that_hangs_for_the_end_of_the_process_it_ends() {
    let mut service = Service::start(&[("STUCK_AT_EXIT", "1")]);
    service.hang();
    service.terminate();
    assert_eq!(service.end(|_| {}).signal(), Some(Signal::KILL.as_raw()));
}

#[test]
fn with_a_module_that_hangs_at_the_end_and_no_card_it_ends() {
    let mut service = Service::with(&[("STUCK_AT_EXIT", "1")], &["--module", "/no/module.so"]);
    service.line("/no/module.so");
    assert_eq!(service.end(|_| {}).signal(), Some(Signal::KILL.as_raw()));
}

#[test]
fn a_second_signal_ends_it_when_it_cannot_leave_in_order() {
    let mut service = Service::start(&[]);
    let mut host = UnixStream::connect(service.path("vm.sock")).unwrap();
    host.read_exact(&mut [0; 12]).unwrap();
    // What stops it is a line about its leaving, for which there is no room.
    while send(&service.stderr, b".", SendFlags::DONTWAIT).is_ok() {}
    assert_eq!(service.end(Service::terminate).code(), Some(1));
}
