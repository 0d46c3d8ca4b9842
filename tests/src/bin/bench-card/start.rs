//! From the start of a process to the first answer of its card.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use stack_tests::database::{Database, NAMES};
use stack_tests::process::program;

use crate::core::SELECT_PKI;
use crate::directory::CardDirectory;
use crate::peer::{Peer, Programs};
use crate::turns::{Runner, Unit, interleave, table};

pub(crate) fn measure(
    programs: &Programs,
    database: &Database,
    directory: &CardDirectory,
    rounds: u32,
) -> Result<()> {
    let state = directory.scratch("state");
    let (spec, path) = (database.spec(), directory.path());
    let mut runners = [
        Runner::new("libcacard in a process of its own, NSS: SELECT", 1, |_| {
            Ok(Peer::start(programs, "libcacard", database, &NAMES)?.first)
        }),
        Runner::new("vscclient, NSS: SELECT, by vpcd", 1, |_| {
            vscclient(|command| {
                command.env("XDG_STATE_HOME", &state).args(["--db", &spec]);
                command.args(NAMES.iter().flat_map(|name| ["--cert", name]));
            })
        }),
        Runner::new("vscclient, PEM: SELECT, by vpcd", 1, |_| {
            vscclient(|command| {
                command.arg("card").arg(&path);
            })
        }),
    ];
    // They are quick.
    interleave(&mut runners, 2 * rounds)?;
    table("from the start of the process to the card's first answer, ms", Unit::Millis, &runners);
    println!(
        "(libcacard knows nothing of vpcd; it is asked within its process, three certificates as with our NSS)\n"
    );
    Ok(())
}

/// Plays vpcd when it powers a card and a program selects the first PKI container, as libcacard is asked to.
fn vscclient(arguments: impl FnOnce(&mut Command)) -> Result<Duration> {
    const ON_AND_ATR: [u8; 6] = [0, 1, 1, 0, 1, 4];
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let mut command = Command::new(program("vscclient")?);
    arguments(&mut command);
    command.arg(format!("vpcd:127.0.0.1:{}", listener.local_addr()?.port())).stdin(Stdio::null());
    let start = Instant::now();
    let mut child = command.stderr(Stdio::null()).spawn()?;
    let answered = (|| {
        let (mut stream, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        stream.write_all(&ON_AND_ATR)?;
        let atr = answer(&mut stream)?;
        ensure!(atr.first() == Some(&0x3B), "the ATR is {atr:02X?}");
        stream.write_all(&[&[0, SELECT_PKI.len() as u8], &SELECT_PKI[..]].concat())?;
        let selected = answer(&mut stream)?;
        let took = start.elapsed();
        ensure!(selected == [0x90, 0x00], "SELECT is answered {selected:02X?}");
        Ok(took)
    })();
    child.kill()?;
    child.wait()?;
    answered
}

fn answer(stream: &mut TcpStream) -> Result<Vec<u8>> {
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut answer = vec![0; u16::from_be_bytes(length).into()];
    stream.read_exact(&mut answer)?;
    Ok(answer)
}
