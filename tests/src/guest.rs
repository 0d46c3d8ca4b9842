//! A Debian machine in QEMU: kernel, udev, `pcscd`, `libccid`, OpenSC, and an agent that runs commands.
//!
//! ```no_run
//! # use stack_tests::guest::{Boot, Guest};
//! # async fn scenario() -> anyhow::Result<()> {
//! let guest = Guest::boot(Boot::with(["-usb", "-device", "usb-ccid"])).await?;
//! guest.start_pcscd().await?;
//! println!("{}", guest.ok("guest-pcsc wait-reader 10").await?);
//! guest.shutdown().await;
//! # Ok(())
//! # }
//! ```

mod agent;
mod command;
mod cpio;
mod image;
mod kernel;
mod packages;
mod pending;
mod qmp;
mod wait;
pub mod wire;

use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;

use self::agent::Agent;
use self::qmp::Qmp;
use crate::turn;

pub use self::agent::Ran;
pub use self::image::Image;
pub use self::wait::within;

/// Deadline of [`Guest::run`] and [`Guest::ok`]. Like all of them it is for what hangs, not for what is slow.
pub const COMMAND_LIMIT: Duration = Duration::from_secs(180);

/// Booting takes two seconds on an idle machine.
const BOOT_LIMIT: Duration = Duration::from_secs(180);

/// The kernel's whole log on the console, and off with all that costs time at boot and that a smart card does not
/// miss.
const KERNEL_ARGS: &str = "console=ttyS0 panic=-1 loglevel=7 apparmor=0 selinux=0 audit=0 mitigations=off \
     tsc=nowatchdog no_timer_check cryptomgr.notests";

/// How QEMU is started beside the fixed arguments.
#[derive(Clone, Debug)]
pub struct Boot {
    /// More arguments for QEMU: USB controllers, devices, character devices.
    pub args: Vec<String>,
    /// The guest's memory.
    pub memory_mib: u32,
    /// More arguments for the kernel.
    pub kernel_args: String,
    /// A guest that resets starts again; otherwise QEMU ends, so that a kernel panic shows at once.
    pub may_reset: bool,
}

impl Boot {
    /// The usual machine with these arguments for QEMU.
    pub fn with<A: Into<String>>(args: impl IntoIterator<Item = A>) -> Self {
        Self {
            args: args.into_iter().map(Into::into).collect(),
            memory_mib: 256,
            kernel_args: String::new(),
            may_reset: false,
        }
    }
}

/// A running machine. Dropping it kills QEMU and removes its directory.
pub struct Guest {
    child: Mutex<Child>,
    pid: u32,
    agent: Agent,
    qmp: Qmp,
    console: Log,
    qemu_log: Log,
    _directory: TempDir,
}

impl Guest {
    /// Starts a machine and returns when its agent answers.
    pub async fn boot(boot: Boot) -> Result<Self> {
        let guest = Self::start(boot).await?;
        guest.ready(1).await?;
        Ok(guest)
    }

    /// Starts QEMU and returns when QMP answers: for a machine that is paused (`-S`) or waits for a migration.
    pub async fn start(boot: Boot) -> Result<Self> {
        turn::side_by_side();
        let image = image().await?;
        let directory = short_directory()?;
        let listen = |name: &str| {
            let path = directory.path().join(name);
            UnixListener::bind(&path).with_context(|| path.display().to_string())
        };
        // We listen and QEMU connects, so that nothing has to be tried again and no byte of the console is lost.
        let (console, agent, qmp) = (listen("console")?, listen("agent")?, listen("qmp")?);

        // A test program that is killed must not leave its machines behind.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--", "qemu-system-x86_64"]);
        // Never KVM because /dev/kvm exists: nested ones that cannot run a stock kernel exist too.
        command.args([
            "-accel",
            "tcg",
            "-cpu",
            "qemu64",
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
        ]);
        command.arg("-m").arg(boot.memory_mib.to_string());
        if !boot.may_reset {
            command.arg("-no-reboot");
        }
        for name in ["console", "agent", "qmp"] {
            let path = path_for_qemu(&directory.path().join(name))?;
            command.arg("-chardev").arg(format!("socket,id=guest-{name},path={path},server=off"));
        }
        command.args(["-serial", "chardev:guest-console", "-serial", "chardev:guest-agent"]);
        command.args(["-mon", "chardev=guest-qmp,mode=control"]);
        command.arg("-kernel").arg(&image.kernel).arg("-initrd").arg(&image.initramfs);
        command.arg("-append").arg(format!("{KERNEL_ARGS} {}", boot.kernel_args).trim());
        command.args(&boot.args);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("setpriv, to start QEMU with; it comes with util-linux")?;
        let pid = child.id().context("QEMU has no process id")?;
        let qemu_log = Log::default();
        let last_words = [
            qemu_log.collect(child.stdout.take().context("QEMU's stdout")?),
            qemu_log.collect(child.stderr.take().context("QEMU's stderr")?),
        ];

        let connected = async {
            let (console, agent, qmp) = tokio::try_join!(console.accept(), agent.accept(), qmp.accept())?;
            let streams: [UnixStream; 3] = [console.0, agent.0, qmp.0];
            anyhow::Ok(streams)
        };
        let started = async {
            let [console, agent, qmp] = tokio::select! {
                connected = connected => connected?,
                status = child.wait() => bail!("QEMU ended at its start ({})", status?),
            };
            anyhow::Ok((console, agent, Qmp::greet(qmp).await?))
        };
        let started = match tokio::time::timeout(BOOT_LIMIT, started).await {
            Ok(started) => started,
            Err(_) => Err(anyhow!("QEMU did not connect to its sockets within {BOOT_LIMIT:?}")),
        };
        let (console_stream, agent, qmp) = match started {
            Ok(started) => started,
            Err(error) => {
                // Its last words come through pipes that end with it.
                let _ = child.kill().await;
                for pipe in last_words {
                    let _ = pipe.await;
                }
                return Err(error.context(format!("QEMU said:\n{}", qemu_log.text())));
            }
        };
        let console = Log::default();
        console.collect(console_stream);
        Ok(Self {
            child: Mutex::new(child),
            pid,
            agent: Agent::new(agent),
            qmp,
            console,
            qemu_log,
            _directory: directory,
        })
    }

    /// Returns when the agent has started for the `boots`-th time (1: the first boot, 2: after a reset, …).
    pub async fn ready(&self, boots: u64) -> Result<()> {
        let ready =
            within(Some(self), BOOT_LIMIT, "the guest's agent starts", self.agent.ready(boots)).await?;
        self.told(ready).await
    }

    /// Resets the machine and returns when its agent answers again. Needs [`Boot::may_reset`].
    pub async fn reset(&self) -> Result<()> {
        let boots = self.agent.boots();
        self.qmp("system_reset", Value::Null).await?;
        self.ready(boots + 1).await
    }

    /// Runs a shell command as root, for at most [`COMMAND_LIMIT`].
    ///
    /// Commands may overlap. One that is given up (its future dropped) is killed with what it started, so a
    /// process that shall stay has to be put into the background with `setsid`. Output comes at some 300 KB a
    /// second.
    pub async fn run(&self, command: &str) -> Result<Ran> {
        self.run_within(command, COMMAND_LIMIT).await
    }

    /// [`Guest::run`] with a deadline of its own.
    pub async fn run_within(&self, command: &str, limit: Duration) -> Result<Ran> {
        let what = format!("`{command}` in the guest");
        let ran = within(Some(self), limit, &what, self.agent.run(command)).await?;
        self.told(ran).await
    }

    /// [`Guest::run`] for a command that has to succeed; returns what it printed.
    pub async fn ok(&self, command: &str) -> Result<String> {
        let ran = self.run(command).await?;
        ensure!(ran.status == 0, "`{command}` in the guest: status {}\n{}", ran.status, ran.text());
        Ok(ran.text())
    }

    /// Writes a file, making its directory as needed. The line takes some 70 KB a second.
    pub async fn put(&self, path: &str, bytes: &[u8]) -> Result<()> {
        within(Some(self), COMMAND_LIMIT, &format!("writing {path}"), self.agent.put(path, bytes)).await?
    }

    /// Reads a file.
    pub async fn get(&self, path: &str) -> Result<Vec<u8>> {
        within(Some(self), COMMAND_LIMIT, &format!("reading {path}"), self.agent.get(path)).await?
    }

    /// A QMP command; returns its `return`. `Value::Null` for no arguments.
    pub async fn qmp(&self, execute: &str, arguments: Value) -> Result<Value> {
        let what = format!("QMP {execute}");
        within(Some(self), COMMAND_LIMIT, &what, self.qmp.execute(execute, arguments)).await?
    }

    /// Every QMP event so far.
    pub fn qmp_events(&self) -> Vec<Value> {
        self.qmp.events()
    }

    /// The first event for which `wanted` holds, be it past or to come. Put [`within`] around it.
    pub async fn qmp_event(&self, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        self.qmp.event(wanted).await
    }

    /// Starts pcscd and returns when its socket is there. It logs to [`PCSCD_LOG`], without APDUs.
    ///
    /// A reader that is there already shows up within a second or so: `guest-pcsc wait-reader 10`.
    pub async fn start_pcscd(&self) -> Result<()> {
        // A stale socket of one that was killed must not be taken for the new one's.
        let start = format!(
            "rm -f {PCSCD_SOCKET}; setsid pcscd --foreground --info >>{PCSCD_LOG} 2>&1 & \
             exec guest-agent await {PCSCD_SOCKET}"
        );
        self.ok(&start).await.map(drop)
    }

    /// Kills pcscd, so that [`Guest::start_pcscd`] can start another.
    pub async fn stop_pcscd(&self) -> Result<()> {
        self.ok("killall pcscd; while pidof pcscd >/dev/null; do usleep 20000; done").await.map(drop)
    }

    /// Brings up the guest's network card (`-netdev user,id=n0 -device virtio-net-pci,netdev=n0`): the guest is
    /// 10.0.2.15 and the host's loopback 10.0.2.2.
    pub async fn start_network(&self) -> Result<()> {
        self.ok(". /lib/functions.sh; network_up").await.map(drop)
    }

    /// What the kernel and init wrote to the console.
    pub fn console(&self) -> String {
        self.console.text()
    }

    /// What QEMU wrote to its standard output and error.
    pub fn qemu_log(&self) -> String {
        self.qemu_log.text()
    }

    /// QEMU's process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether QEMU has ended, and how.
    pub fn ended(&self) -> Option<ExitStatus> {
        self.child().try_wait().ok().flatten()
    }

    /// Ends QEMU in order, so that its devices and character devices are closed.
    pub async fn shutdown(mut self) {
        // An answer is not certain: QEMU may be gone before it is sent.
        let quit = self.qmp.execute("quit", Value::Null);
        let _ = tokio::time::timeout(Duration::from_secs(5), quit).await;
        let child = self.child.get_mut().unwrap_or_else(PoisonError::into_inner);
        let _ = tokio::time::timeout(Duration::from_secs(5), child.wait()).await;
    }

    /// SIGKILL, as a crash would end it; returns when QEMU is gone.
    pub async fn kill(mut self) {
        let child = self.child.get_mut().unwrap_or_else(PoisonError::into_inner);
        let _ = child.kill().await;
    }

    /// Adds the logs to a failure that has nothing to do with time: QEMU ended, the guest was reset.
    async fn told<T>(&self, done: Result<T>) -> Result<T> {
        match done {
            Ok(value) => Ok(value),
            Err(error) => Err(anyhow!("{error:#}{}", self.report().await)),
        }
    }

    fn child(&self) -> MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Before the directory goes; the runtime, where there still is one, reaps it.
        let _ = self.child().start_kill();
    }
}

/// Where pcscd logs in the guest.
pub const PCSCD_LOG: &str = "/tmp/pcscd.log";

const PCSCD_SOCKET: &str = "/run/pcscd/pcscd.comm";

/// A new directory whose name leaves room for a socket's: a unix socket's path is limited to 107 bytes.
pub fn short_directory() -> Result<TempDir> {
    let directory = tempfile::Builder::new().prefix("guest-").tempdir()?;
    if directory.path().as_os_str().len() <= 80 {
        return Ok(directory);
    }
    tempfile::Builder::new().prefix("guest-").tempdir_in("/tmp").context("a short directory for sockets")
}

/// A comma ends a value in QEMU's options unless it is doubled.
fn path_for_qemu(path: &Path) -> Result<String> {
    Ok(path.to_str().context("the temporary directory's name is not UTF-8")?.replace(',', ",,"))
}

/// Built or looked at once per process.
async fn image() -> Result<Image> {
    static IMAGE: OnceLock<std::result::Result<Image, String>> = OnceLock::new();
    let image = tokio::task::spawn_blocking(|| {
        IMAGE.get_or_init(|| Image::ensure().map_err(|error| format!("{error:#}"))).clone()
    });
    image.await?.map_err(|error| anyhow!("{error}"))
}

/// Text that grows while somebody may look at it.
#[derive(Clone, Default)]
struct Log {
    bytes: Arc<Mutex<Vec<u8>>>,
}

impl Log {
    /// More than a failure report shows; a guest that floods its console must not flood us.
    const LIMIT: usize = 4 << 20;

    fn collect(&self, mut stream: impl AsyncRead + Unpin + Send + 'static) -> JoinHandle<()> {
        let bytes = Arc::clone(&self.bytes);
        tokio::spawn(async move {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = stream.read(&mut buffer).await {
                let mut bytes = bytes.lock().unwrap_or_else(PoisonError::into_inner);
                bytes.extend_from_slice(&buffer[..count]);
                if bytes.len() > Self::LIMIT {
                    bytes.drain(..Self::LIMIT / 2);
                }
            }
        })
    }

    fn text(&self) -> String {
        let bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&bytes).replace('\r', "")
    }
}
