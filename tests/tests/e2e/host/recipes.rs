//! What documents tell people to type, as they have it.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use stack_tests::pcscd::Pcscd;
use stack_tests::process::program;

/// Nobody else ends what a recipe leaves in the background.
struct Ends<'a>(&'a Path);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        let pid = std::fs::read_to_string(self.0).ok().and_then(|text| text.trim().parse().ok());
        if let Some(pid) = pid.and_then(Pid::from_raw) {
            let _ = kill_process(pid, Signal::TERM);
        }
    }
}

/// Runs lines in a shell that ends at the first failure. It is over when nobody has its output any more.
async fn run(pcscd: &Pcscd, directory: &str, lines: &str) -> Result<String> {
    let programs = program("vscclient")?;
    let path = std::env::var("PATH").unwrap_or_default();
    let path = format!("{}:{path}:/usr/sbin", programs.parent().context("no directory")?.display());
    let mut shell = pcscd.command("sh");
    shell.args(["-e", "-c", &format!("cd {directory}\n{lines}")]).env("PATH", path);
    let ran = pcscd.run(shell).await?;
    ensure!(ran.status.success(), "{lines}\n{}", ran.text);
    Ok(ran.text)
}

/// The steps of the job, but for those that install packages and start pcscd.
#[tokio::test(flavor = "multi_thread")]
async fn the_ci_job_of_the_readme() -> Result<()> {
    let pcscd = Pcscd::start().await?;
    let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md"))?;
    let (_, job) = readme.split_once("### 11. In CI").context("no recipe 11")?;
    let (job, _) = job.split_once("### 12.").context("no recipe 12")?;
    let card = pcscd.path("card");
    let pid_file = card.join("vscclient.pid");
    let _ends = Ends(&pid_file);
    let mut steps = 0;
    for step in job.split("- run: |\n").skip(1) {
        let lines = step.lines().take_while(|line| line.starts_with("          "));
        // That directory is the machine's.
        let lines =
            lines.collect::<Vec<_>>().join("\n").replace("/var/lib/card", &card.display().to_string());
        run(&pcscd, ".", &lines).await?;
        steps += 1;
    }
    ensure!(steps == 2, "{steps} steps");
    Ok(())
}

/// Those that ask for no PIN.
#[tokio::test(flavor = "multi_thread")]
async fn the_lines_of_a_new_cards_readme() -> Result<()> {
    let pcscd = Pcscd::start().await?;
    run(&pcscd, ".", "umask 077; echo 123456 >pin; vscclient new-card card --name 'Jane Doe' --pin-file pin")
        .await?;
    let readme = std::fs::read_to_string(pcscd.path("card/README.txt"))?;
    let (_, rest) = readme.split_once("Without a VM").context("no such section")?;
    let lines: Vec<_> = rest.lines().skip(2).take_while(|line| !line.is_empty()).collect();
    let pid_file = pcscd.path("card/vscclient.pid");
    let _ends = Ends(&pid_file);
    let (ask, lines): (Vec<_>, Vec<_>) = lines.into_iter().partition(|line| line.contains("--login"));
    ensure!(lines.len() == 4 && ask.len() == 1, "{lines:?} {ask:?}");
    let said = run(&pcscd, "card", &lines.join("\n")).await?;
    ensure!(said.contains("Personal Identity Verification Card"), "{said}");
    ensure!(said.matches("Certificate Object").count() == 4, "{said}");
    pcscd.ok("guest-pcsc wait-card absent 30 0").await?;
    Ok(())
}
