//! A pcscd of a test's own, with vpcd's two virtual readers and no other: nothing on this machine sees it.
//!
//! It runs in a mount and a network namespace with `/run` empty and nothing but a loopback interface; all that is
//! to use it, the card too, runs in there. An ordinary user gets them inside a user namespace.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::Mutex;

use crate::guest::{short_directory, within};
use crate::process::{Process, program};
use crate::turn;

/// For one command; none of them takes seconds.
const LIMIT: Duration = Duration::from_secs(180);

/// Set in a process that runs inside the namespaces.
const INSIDE: &str = "STACK_INSIDE_PCSCD";

/// vpcd, as Debian installs it.
const DRIVER: &str = "/usr/lib/pcsc/drivers/serial/libifdvpcd.so";

/// The namespaces, and pcscd in them. All of it ends when this is dropped.
pub struct Pcscd {
    /// None in a process that runs inside.
    namespace: Option<Child>,
    daemon: Mutex<Option<Process>>,
    directory: TempDir,
}

/// A command that has ended.
#[derive(Debug)]
pub struct Ran {
    /// How.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Standard output and standard error as text.
    pub text: String,
}

impl Pcscd {
    /// Starts it; both readers are there, and empty.
    pub async fn start() -> Result<Self> {
        let pcscd = Self::not_started().await?;
        pcscd.start_daemon().await?;
        Ok(pcscd)
    }

    /// For a test that uses PC/SC itself: runs the test of that name again, inside. There this returns a `Pcscd`
    /// whose daemon is not started; out here None, if the test passed.
    pub async fn inside(test: &str) -> Result<Option<Self>> {
        if std::env::var_os(INSIDE).is_some() {
            return Ok(Some(Self { namespace: None, daemon: Mutex::new(None), directory: configure()? }));
        }
        let outside = Self::not_started().await?;
        let mut command = outside.command(std::env::current_exe()?);
        command.args([test, "--exact", "--nocapture"]).env(INSIDE, "1");
        let limit = Duration::from_secs(crate::scale(360, 900).into());
        let output = within(None, limit, test, command.output()).await??;
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        ensure!(output.status.success() && said.contains("1 passed"), "{said}");
        Ok(None)
    }

    /// The namespaces, without the daemon.
    pub async fn not_started() -> Result<Self> {
        turn::side_by_side();
        ensure!(Path::new(DRIVER).is_file(), "{DRIVER} is missing: install the package vsmartcard-vpcd");
        let directory = configure()?;
        let mut command = Command::new("unshare");
        if !is_root() {
            command.args(["--user", "--map-current-user", "--keep-caps"]);
        }
        let script = "PATH=$PATH:/usr/sbin:/sbin
            mount -t tmpfs none /run && mkdir /run/pcscd /run/sshd && ip link set lo up && echo ready && exec cat";
        // It ends with its input at the latest: when the test does.
        let mut namespace = command
            .args(["--mount", "--net", "--propagation", "private", "sh", "-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("unshare of util-linux")?;
        let output = namespace.stdout.take().context("no output")?;
        let line = BufReader::new(output).lines().next_line().await?;
        ensure!(line.as_deref() == Some("ready"), "no namespace of our own: {line:?}");
        Ok(Self { namespace: Some(namespace), daemon: Mutex::new(None), directory })
    }

    /// Starts the daemon; returns when its readers are there.
    pub async fn start_daemon(&self) -> Result<()> {
        let mut command = self.command("/usr/sbin/pcscd");
        command.args(["--foreground", "--info", "--config"]).arg(self.path("reader.conf"));
        // No other drivers: real readers of this machine are none of our business.
        command.env("PCSCLITE_HP_DROPDIR", self.path("no-drivers"));
        let daemon = Process::spawn(command).context("pcscd of the package pcscd")?;
        daemon.line("daemon ready").await?;
        // It says so shortly before it listens, and tells nobody when it does.
        let answers = async {
            while !self.words("guest-pcsc readers").await?.text.contains("00 01") {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            anyhow::Ok(())
        };
        within(None, LIMIT, "pcscd to answer", answers).await??;
        *self.daemon.lock().await = Some(daemon);
        Ok(())
    }

    /// Ends the daemon.
    pub async fn stop_daemon(&self) -> Result<()> {
        let daemon = self.daemon.lock().await.take();
        daemon.context("it does not run")?.terminate().await?;
        Ok(())
    }

    /// A file of the directory that commands run in.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A command beside pcscd, to be run in this directory with a home of its own: OpenSC and others keep what they
    /// saw of a card there.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = match &self.namespace {
            Some(namespace) => {
                let mut command = Command::new("nsenter");
                if !is_root() {
                    command.args(["--user", "--preserve-credentials"]);
                }
                let process = namespace.id().map(|id| id.to_string()).unwrap_or_default();
                command.args(["--target", &process, "--mount", "--net"]);
                command.arg(format!("--wd={}", self.directory.path().display())).arg("--").arg(program);
                command
            }
            None => Command::new(program),
        };
        command.current_dir(self.directory.path());
        let home = self.path("home");
        command.env("HOME", &home).env("XDG_CACHE_HOME", &home).env("XDG_STATE_HOME", self.path("state"));
        command.env("LC_ALL", "C").env_remove("DISPLAY").env_remove("SSH_AUTH_SOCK");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        command
    }

    /// A program of the workspace, beside pcscd.
    pub fn start_program<A: AsRef<OsStr>>(
        &self,
        name: &str,
        args: impl IntoIterator<Item = A>,
    ) -> Result<Process> {
        let mut command = self.command(program(name)?);
        command.args(args);
        Process::spawn(command)
    }

    /// Runs a command to its end, which has to come soon.
    pub async fn run(&self, command: Command) -> Result<Ran> {
        self.run_with_input(command, b"").await
    }

    /// The same with something to read.
    pub async fn run_with_input(&self, mut command: Command, input: &[u8]) -> Result<Ran> {
        let what = format!("{:?}", command.as_std());
        let mut child = command.stdin(Stdio::piped()).spawn().context("nsenter of util-linux")?;
        if let Some(mut stdin) = child.stdin.take() {
            // Who does not want it all is free not to.
            let _ = stdin.write_all(input).await;
        }
        let output = within(None, LIMIT, &what, child.wait_with_output()).await??;
        let text = [&output.stdout[..], &output.stderr].map(String::from_utf8_lossy).concat();
        Ok(Ran { status: output.status, stdout: output.stdout, text })
    }

    /// Runs a command line of words without spaces; it has to end well. Returns what it said.
    pub async fn ok(&self, line: &str) -> Result<String> {
        let ran = self.words(line).await?;
        ensure!(ran.status.success(), "{line}: {}: {}", ran.status, ran.text);
        Ok(ran.text)
    }

    /// The same, however it ends.
    pub async fn words(&self, line: &str) -> Result<Ran> {
        let mut words = line.split_whitespace();
        let name = words.next().context("no command")?;
        let mut command = match name {
            "guest-pcsc" => self.command(program(name)?),
            _ => self.command(name),
        };
        command.args(words);
        let ran = self.run(command).await?;
        let installed = ran.status.code() != Some(127);
        ensure!(installed, "{name} is not installed, `cargo xtask setup` installs it: {}", ran.text);
        Ok(ran)
    }

    /// Waits for the card of a slot to come in.
    pub async fn card_in(&self, slot: usize) -> Result<()> {
        self.ok(&format!("guest-pcsc wait-card present 30 {slot}")).await.map(drop)
    }
}

/// A directory for what pcscd reads and commands write.
fn configure() -> Result<TempDir> {
    let directory = short_directory()?;
    for name in ["home", "no-drivers"] {
        std::fs::create_dir(directory.path().join(name))?;
    }
    // Base port 0x8C7B, the next one for the second slot.
    let readers = format!(
        "FRIENDLYNAME \"Virtual PCD\"\nDEVICENAME /dev/null:0x8C7B\nLIBPATH {DRIVER}\nCHANNELID 0x8C7B\n"
    );
    std::fs::write(directory.path().join("reader.conf"), readers)?;
    Ok(directory)
}

/// A process' own directory in /proc belongs to its effective user.
fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}
