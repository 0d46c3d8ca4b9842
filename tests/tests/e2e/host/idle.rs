//! A pcscd that ends while no program uses it, and is started by the next one that asks, as Debian's systemd units do.

use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, Signal, kill_process};
use stack_tests::database::Database;
use stack_tests::guest::within;
use stack_tests::pcscd::Pcscd;
use stack_tests::process::{Process, program};
use tokio::process::Child;

use super::{Algorithm, Applet, NAMES, Suite, card, module};

const PIV: Suite = Suite { applet: Applet::Piv, algorithm: Algorithm::Rsa };
const SOCKET: &str = "/run/pcscd/pcscd.comm";
const SOON: Duration = Duration::from_secs(30);
/// pcscd ends a minute after its last program (TIME_BEFORE_SUICIDE).
const AUTO_EXIT: Duration = Duration::from_secs(75);

/// What `pcscd.socket` and `pcscd.service` are to systemd.
struct Units<'a> {
    pcscd: &'a Pcscd,
    listener: UnixListener,
    service: Option<Child>,
}

impl<'a> Units<'a> {
    fn start(pcscd: &'a Pcscd) -> Result<Self> {
        let listener = UnixListener::bind(SOCKET)?;
        std::fs::set_permissions(SOCKET, std::fs::Permissions::from_mode(0o666))?;
        Ok(Self { pcscd, listener, service: None })
    }

    /// Starts pcscd when a program asks for it.
    async fn activated(&mut self) -> Result<()> {
        let listener = self.listener.try_clone()?;
        let asked = tokio::task::spawn_blocking(move || {
            let mut listener = [PollFd::new(&listener, PollFlags::IN)];
            poll(&mut listener, Some(&SOON.try_into()?)).map_err(anyhow::Error::from)
        });
        ensure!(asked.await?? == 1, "no program asks for pcscd");
        // sd_listen_fds(3): the first descriptor after standard error, for that process.
        let script = "exec 3<&0 </dev/null; export LISTEN_FDS=1 LISTEN_PID=$$
            exec /usr/sbin/pcscd --foreground --auto-exit --config \"$0\"";
        let mut command = self.pcscd.command("sh");
        command
            .args(["-c", script])
            .arg(self.pcscd.path("reader.conf"))
            .env("PCSCLITE_HP_DROPDIR", self.pcscd.path("no-drivers"));
        command.stdin(OwnedFd::from(self.listener.try_clone()?));
        self.service = Some(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?);
        Ok(())
    }

    async fn stop(&mut self) -> Result<()> {
        let service = self.service.as_mut().context("it does not run")?;
        let id = service.id().context("it has ended")?;
        kill_process(Pid::from_raw(id.try_into()?).context("process id 0")?, Signal::TERM)?;
        self.ended(SOON).await
    }

    async fn ended(&mut self, limit: Duration) -> Result<()> {
        let mut service = self.service.take().context("it does not run")?;
        within(None, limit, "pcscd to end", service.wait()).await??;
        Ok(())
    }
}

/// What a program that does not wait for a card sees.
async fn first_program_sees_the_card(pcscd: &Pcscd) -> Result<()> {
    let said = pcscd.ok(&format!("pkcs11-tool --module {} -O", module()?)).await?;
    ensure!(said.matches("Certificate Object").count() == NAMES.len(), "{said}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_card_keeps_pcscd_running() -> Result<()> {
    let name = "host::idle::the_card_keeps_pcscd_running";
    let Some(pcscd) = Pcscd::inside(name).await? else { return Ok(()) };
    let (mut units, database) = (Units::start(&pcscd)?, Database::with_password()?);
    let mut client = card(&pcscd, PIV, &database, &["vpcd:"])?;
    // Nobody else is there to ask for pcscd, at first or after it was stopped.
    for start in 0..3 {
        if start > 0 {
            units.stop().await?;
        }
        let mark = client.mark();
        units.activated().await.with_context(|| client.log())?;
        client.line_after(mark, "card put in").await?;
        pcscd.card_in(0).await?;
        first_program_sees_the_card(&pcscd).await?;
    }
    if stack_tests::scale(0, 1) > 0 {
        ensure!(units.ended(AUTO_EXIT).await.is_err(), "it has ended in spite of the card");
    }
    ensure!(client.terminate().await?.success(), "{}", client.log());
    ensure!(!client.log().contains("refuses"), "{}", client.log());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_card_is_soon_in_a_pcscd_that_cannot_be_kept() -> Result<()> {
    let name = "host::idle::the_card_is_soon_in_a_pcscd_that_cannot_be_kept";
    let Some(pcscd) = Pcscd::inside(name).await? else { return Ok(()) };
    let (mut units, database) = (Units::start(&pcscd)?, Database::with_password()?);
    // As pcscd does with whom polkit does not let in: closed, with the first message unread.
    let refusing = UnixListener::bind(pcscd.path("refusing"))?;
    std::thread::spawn(move || refusing.incoming().for_each(drop));
    let client = refused_card(&pcscd, &database)?;
    client.line("pcscd refuses to be kept running").await?;
    for _ in 0..stack_tests::scale(3, 2) {
        let mark = client.mark();
        let wait = pcscd.card_in(0);
        let began = Instant::now();
        let (activated, waited) = tokio::join!(units.activated(), wait);
        activated?;
        waited?;
        println!("the card is in {:.1} s after the start of pcscd", began.elapsed().as_secs_f64());
        client.line_after(mark, "card put in").await?;
        first_program_sees_the_card(&pcscd).await?;
        match stack_tests::scale(0, 1) {
            0 => units.stop().await?,
            _ => units.ended(AUTO_EXIT).await?,
        }
        client.line_after(mark, "vpcd closed the connection").await?;
    }
    ensure!(client.log().matches("refuses").count() == 1, "{}", client.log());
    Ok(())
}

fn refused_card(pcscd: &Pcscd, database: &Database) -> Result<Process> {
    let mut command = pcscd.command(program("vscclient")?);
    command.args(["--db", &database.spec()]).args(NAMES.iter().flat_map(|name| ["--cert", name]));
    command.arg("vpcd:").env("PCSCLITE_CSOCK_NAME", "refusing");
    Process::spawn(command)
}
