//! Running one thing after another, telling what and for how long.

use std::ffi::OsStr;
use std::fmt;
use std::process::{Command, ExitCode, ExitStatus};
use std::time::Instant;

/// Why a step failed.
pub(crate) enum Failure {
    /// A program said no; its exit code becomes ours.
    Program { name: String, status: ExitStatus },
    /// We did.
    Other(String),
}

impl Failure {
    pub(crate) fn exit_code(&self) -> ExitCode {
        let code = match self {
            Self::Program { status, .. } => status.code().and_then(|code| u8::try_from(code).ok()),
            Self::Other(_) => None,
        };
        // A program killed by a signal has no code, and none of ours may look like success.
        ExitCode::from(code.filter(|code| *code != 0).unwrap_or(1))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Program { name, status } => write!(f, "{name}: {status}"),
            Self::Other(problem) => f.write_str(problem),
        }
    }
}

/// The steps of a command.
pub(crate) struct Steps {
    start: Instant,
}

impl Steps {
    pub(crate) fn new() -> Self {
        Self { start: Instant::now() }
    }

    /// A step of our own.
    pub(crate) fn inside(
        &mut self,
        name: &str,
        step: impl FnOnce() -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let start = Instant::now();
        let done = step();
        finished(name, start, done.is_ok());
        done
    }

    /// A run of the cargo that runs us.
    pub(crate) fn cargo<A: AsRef<OsStr>>(
        &mut self,
        name: &str,
        args: impl IntoIterator<Item = A>,
        environment: &[(&str, &str)],
    ) -> Result<(), Failure> {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut command = Command::new(cargo);
        command.args(args).envs(environment.iter().copied());
        self.inside(name, || run(&mut command))
    }

    pub(crate) fn total(&self) {
        eprintln!("xtask: {:.1} s in all", self.start.elapsed().as_secs_f64());
    }
}

fn finished(name: &str, start: Instant, well: bool) {
    let outcome = if well { "done" } else { "FAILED" };
    eprintln!("xtask: {name} {outcome} after {:.1} s", start.elapsed().as_secs_f64());
}

/// Shows the command and runs it to its end.
pub(crate) fn run(command: &mut Command) -> Result<(), Failure> {
    let name = shown(command);
    eprintln!("xtask: {name}");
    let status = command.status().map_err(|error| Failure::Other(format!("{name}: {error}")))?;
    if status.success() { Ok(()) } else { Err(Failure::Program { name, status }) }
}

/// As one would type it; of the program's path only the name.
fn shown(command: &Command) -> String {
    let program = std::path::Path::new(command.get_program());
    let mut words: Vec<_> = command
        .get_envs()
        .filter_map(|(name, value)| Some(format!("{}={}", name.to_string_lossy(), value?.to_string_lossy())))
        .collect();
    words.push(program.file_name().unwrap_or(command.get_program()).to_string_lossy().into_owned());
    words.extend(command.get_args().map(|arg| arg.to_string_lossy().into_owned()));
    words.join(" ")
}
