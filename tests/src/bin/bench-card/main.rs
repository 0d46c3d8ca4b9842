//! What the emulated card costs without a guest: keys, commands, the way through pcscd, start, memory; beside
//! libcacard, NSS, OpenSSL and floors.
//!
//! What is compared is measured in turns, so that the ratios hold whatever else the machine does.

#![forbid(unsafe_code)]

mod core;
mod directory;
mod memory;
mod pcsc;
mod peer;
mod start;
mod turns;
mod verify;

use std::process::ExitCode;

use anyhow::Result;
use stack_tests::database::Database;

use crate::directory::CardDirectory;
use crate::peer::Programs;

const USAGE: &str = "\
usage: bench-card [--rounds N]

Measures, in turns: RSA-2048 signatures and SELECTs of a card on an NSS database with a password, beside libcacard on
the same database and NSS itself; signatures of one on PEM files, beside openssl speed; SELECTs and PKCS#11 signatures
through pcscd and Debian's vpcd, beside pcscd's own round trip, a loopback hop, and a naive card; VERIFY, beside
fdatasync, and pkcs11-tool; start and memory.
Exits with 0 whatever the figures are.

  --rounds N    how often each has its turn (8)
  --help        this
";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match words[..] {
        ["--help" | "-h"] => {
            print!("{USAGE}");
            Ok(())
        }
        // This program's other processes.
        ["pcsc-client"] => pcsc::client(),
        ["memory", kind, keys, pin] => kind.parse().and_then(|kind| memory::grow(kind, keys, pin)),
        [] => measure(8),
        ["--rounds", rounds] if rounds.parse::<u32>().is_ok_and(|rounds| rounds > 0) => {
            measure(rounds.parse().unwrap_or(8))
        }
        _ => {
            eprint!("bench-card: {}?\n{USAGE}", args.join(" "));
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-card: it cannot be measured: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure(rounds: u32) -> Result<()> {
    println!("Load of the machine before: {}\n", load()?);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let programs = Programs::compile()?;
    let (database, directory) = (Database::with_password()?, CardDirectory::make()?);
    core::measure(&programs, &database, &directory, rounds)?;
    pcsc::measure(&programs, &database, &directory, runtime.handle(), rounds)?;
    verify::measure(&database, &directory, &CardDirectory::make_nss()?, runtime.handle(), rounds)?;
    start::measure(&programs, &database, &directory, rounds)?;
    memory::measure(&database, &directory)?;
    println!("Load of the machine after: {}", load()?);
    Ok(())
}

fn load() -> Result<String> {
    let load = std::fs::read_to_string("/proc/loadavg")?;
    let averages: Vec<_> = load.split_whitespace().take(3).collect();
    Ok(format!("{} on {} processors", averages.join(" "), std::thread::available_parallelism()?))
}
