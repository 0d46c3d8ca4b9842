//! The commands on a terminal.

use std::fs::File;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use stack_tests::database::Database;
use stack_tests::guest::within;
use stack_tests::host::Host;
use stack_tests::process::program;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

/// A terminal, from the side of whoever sits at it.
struct Terminal {
    keyboard: tokio::fs::File,
    screen: tokio::fs::File,
    seen: String,
}

impl Terminal {
    fn open() -> Result<(Self, File)> {
        let user = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY)?;
        grantpt(&user)?;
        unlockpt(&user)?;
        let name = ptsname(&user, Vec::new())?;
        let program = File::options().read(true).write(true).open(name.to_str()?)?;
        let user = File::from(user);
        let terminal = Self {
            keyboard: tokio::fs::File::from_std(user.try_clone()?),
            screen: tokio::fs::File::from_std(user),
            seen: String::new(),
        };
        Ok((terminal, program))
    }

    async fn types(&mut self, line: &str) -> Result<()> {
        self.seen.clear();
        self.keyboard.write_all(format!("{line}\n").as_bytes()).await?;
        Ok(self.keyboard.flush().await?)
    }

    /// Reads on until `part` is on the screen.
    async fn shows(&mut self, part: &str) -> Result<()> {
        let reading = async {
            let mut bytes = [0; 1024];
            while !self.seen.contains(part) {
                let count = self.screen.read(&mut bytes).await.context("the terminal is closed")?;
                if count == 0 {
                    bail!("the terminal is closed");
                }
                self.seen.push_str(&String::from_utf8_lossy(&bytes[..count]));
            }
            Ok(())
        };
        within(None, Duration::from_secs(60), part, reading).await?
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_on_a_terminal() -> Result<()> {
    let (host, database, state) = (Host::new()?, Database::with_password()?, tempfile::tempdir()?);
    let (mut terminal, slave) = Terminal::open()?;
    let mut client = Command::new("setsid")
        .args(["--ctty", "--wait"])
        .arg(program("vscclient")?)
        .args(["--db", &database.spec(), "-c", "id-cert", &host.endpoint()])
        .env("XDG_STATE_HOME", state.path())
        .stdin(Stdio::from(slave.try_clone()?))
        .stdout(Stdio::from(slave.try_clone()?))
        .stderr(Stdio::from(slave))
        .kill_on_drop(true)
        .spawn()?;
    let mut peer = host.card().await?;
    terminal.shows("card inserted").await?;
    terminal.types("list").await?;
    terminal.shows("0 \"Virtual Reader\" card in").await?;
    terminal.types("insert").await?;
    terminal.shows("the card is in").await?;
    terminal.types("select 3").await?;
    terminal.shows("there is one reader, 0").await?;
    terminal.types("remove").await?;
    ensure!(peer.receive().await?.0 == 6, "CardRemove");
    peer.send(&stack_tests::host::message(2, 0, &[0; 4])).await?;
    terminal.shows("card removed").await?;
    terminal.types("list").await?;
    terminal.shows("no card").await?;
    terminal.types("ins").await?;
    peer.until_card().await?;
    terminal.shows("card inserted").await?;
    terminal.types("what?").await?;
    terminal.shows("take the card out of the guest and end").await?;
    terminal.types("exit").await?;
    for kind in [6, 4] {
        let message = peer.receive().await?;
        ensure!(message.0 == kind, "message of type {}", message.0);
        peer.send(&stack_tests::host::message(2, 0, &[0; 4])).await?;
    }
    let ended = within(None, Duration::from_secs(60), "the end", client.wait()).await??;
    ensure!(ended.code() == Some(0), "{ended}: {}", terminal.seen);
    Ok(())
}
