//! The passthru card in our reader: a remote client brings the card.

use std::ffi::OsStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use emulated_card::card::{CardOptions, EmulatedCard, Profile, Step};
use emulated_card::keys::KeyStore;
use emulated_card::keys::nss::NssDatabase;
use emulated_card::pin::{DEFAULT_TRIES, ReferenceData};
use emulated_card::slot::assign;
use emulated_card::state::{CardId, StateDirectory};
use rustix::process::Signal;
use stack_tests::database::{Database, NAMES, PIN};
use stack_tests::guest::within;
use stack_tests::host::{INIT, message, verify};
use stack_tests::process::Process;
use stack_tests::reader::{Bus, Place, Stack};
use stack_tests::{SELECT, hex};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use vscard_protocol::Command;

use crate::card::use_the_card;

fn passthru(_database: &Database, place: &Place) -> Vec<String> {
    vec!["--card".into(), format!("passthru,deadline=5,unix-listen:{}", place.path("card"))]
}

fn client(stack: &Stack, endpoint: &str, more: &[&str]) -> Result<Process> {
    let spec = stack.database.spec();
    let mut args = vec!["--profile", "cac", "--db", &spec];
    args.extend(NAMES.iter().flat_map(|name| ["--cert", name]));
    args.extend(more);
    args.push(endpoint);
    Process::start("vscclient", args, &[("XDG_STATE_HOME", OsStr::new(stack.state.path()))])
}

#[tokio::test(flavor = "multi_thread")]
async fn our_vscclient_over_a_unix_socket() -> Result<()> {
    let stack = Stack::start(Bus::Xhci, "", passthru).await?;
    let endpoint = format!("unix:{}", stack.place.path("card"));
    let mut vscclient = client(&stack, &endpoint, &[])?;
    vscclient.line("which powers the card itself").await?;
    stack.guest.ok("guest-pcsc wait-card present 30").await?;
    use_the_card(&stack.guest, &stack.database, PIN).await?;

    // Power-off and reset reach the remote card.
    let status = "00200000";
    let verified = format!("guest-pcsc transmit {} {status}", hex(&verify(PIN)));
    ensure!(stack.guest.ok(&verified).await?.matches("9000").count() == 2);
    stack.guest.ok("guest-pcsc reset").await?;
    let said = stack.guest.ok(&format!("guest-pcsc transmit {status}")).await?.to_uppercase();
    ensure!(said.contains("63C3"), "after a reset: {said}");

    // A second client is refused with a reason, and the first one goes on.
    let second = client(&stack, &endpoint, &["--card-name", "second"])?;
    second.line("cannot add more readers").await?;
    stack.daemon.line("second client refused").await?;
    drop(second);
    stack.guest.ok(&format!("guest-pcsc transmit {SELECT}")).await?;

    // A silent client: an error within the deadline, no hang; and it may come back.
    vscclient.signal(Signal::STOP)?;
    let start = Instant::now();
    let ran = stack.guest.run(&format!("guest-pcsc transmit {SELECT}")).await?;
    let took = start.elapsed();
    // Five seconds for the command, and as much again for the reset when the program lets go of the card. A busy machine
    // adds to that; the deadline that the daemon has by itself would make it forty.
    ensure!(ran.status != 0 && took < Duration::from_secs(35), "{took:?}: {}", ran.text());
    println!("a silent client: {} after {} ms", ran.text().trim(), took.as_millis());
    vscclient.signal(Signal::CONT)?;

    // Killed and started again: removed, then inserted.
    let gone = stack.guest.ok("guest-pcsc wait-card absent 20");
    let kill = async {
        vscclient.signal(Signal::KILL)?;
        vscclient.ended().await
    };
    let (gone, ended) = tokio::join!(gone, kill);
    gone?;
    ended?;
    let mut vscclient = client(&stack, &endpoint, &[])?;
    stack.guest.ok("guest-pcsc wait-card present 30").await?;
    stack.guest.ok(&format!("guest-pcsc transmit {SELECT}")).await?;

    let gone = stack.guest.ok("guest-pcsc wait-card absent 20");
    let (gone, ended) = tokio::join!(gone, vscclient.terminate());
    gone?;
    ensure!(ended?.code() == Some(0), "{}", vscclient.log());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn our_vscclient_over_tcp() -> Result<()> {
    let port = stack_tests::port::free()?;
    let stack = Stack::start(Bus::Xhci, "", |_, _| {
        vec!["--card".into(), format!("passthru,tcp-listen:127.0.0.1:{port}")]
    })
    .await?;
    let _client = client(&stack, &format!("tcp:127.0.0.1:{port}"), &[])?;
    stack.guest.ok("guest-pcsc wait-card present 30").await?;
    use_the_card(&stack.guest, &stack.database, PIN).await
}

/// What libcacard's vscclient puts on the wire: Init, on the host's Init ReaderRemove and ReaderAdd with reader id
/// 0 and no name, and the ATR without waiting for anything. Its card is a real one.
async fn libcacards_vscclient(mut stream: UnixStream, mut card: EmulatedCard) -> Result<()> {
    stream.write_all(&message(1, 0, INIT)).await?;
    let atr = [0x3B, 0x7A, 0x18, 0x00, 0x00, 0x73, 0x66, 0x74, 0x65, 0x20, 0x63, 0x64, 0x31, 0x34, 0x34];
    loop {
        let mut header = [0; 12];
        if stream.read_exact(&mut header).await.is_err() {
            return Ok(());
        }
        let length = u32::from_be_bytes([header[8], header[9], header[10], header[11]]) as usize;
        let mut payload = vec![0; length];
        stream.read_exact(&mut payload).await?;
        match header[3] {
            1 => {
                for bytes in [message(4, 0, &[]), message(3, 0, &[]), message(5, 0, &atr)] {
                    stream.write_all(&bytes).await?;
                }
            }
            7 => {
                // Its buffer is of 270 bytes and not checked.
                ensure!(length <= 261, "a command of {length} bytes");
                let response = match card.command(&Command::parse(&payload)?) {
                    Step::Answer(response) => response,
                    Step::Work(job) => card.finish(job.run()),
                };
                stream.write_all(&message(7, 0, response.as_bytes())).await?;
            }
            _ => {}
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_like_libcacards_vscclient() -> Result<()> {
    let stack = Stack::start(Bus::Xhci, "", passthru).await?;
    let names = NAMES.map(str::to_owned);
    let store = NssDatabase::open(&stack.database.spec(), &names)?;
    let id = CardId::derive(store.certificates(), "libcacard");
    let state = StateDirectory::at(stack.state.path());
    let reference = ReferenceData::of_database(&state, store.path(), DEFAULT_TRIES);
    let random = Box::new(|bytes: &mut [u8]| bytes.fill(4));
    let options = CardOptions { profile: Profile::Cac, slots: assign(store.certificates(), &[])? };
    let card = EmulatedCard::new(Arc::new(store), Arc::new(reference), id, options, random)?;
    let stream = UnixStream::connect(stack.place.path("card")).await?;
    let peer = tokio::spawn(libcacards_vscclient(stream, card));
    stack.guest.ok("guest-pcsc wait-card present 30").await?;
    stack.daemon.line("a verified PIN survives a reboot of the guest").await?;
    let used = use_the_card(&stack.guest, &stack.database, PIN).await;
    peer.abort();
    used
}

/// A client without Init, as SPICE's, whose card is swapped for one with the same ATR while a command is out.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_of_the_old_card_never_reaches_the_new_session() -> Result<()> {
    let stack = Stack::start(Bus::Xhci, "", passthru).await?;
    let guest = &stack.guest;
    let mut stream = UnixStream::connect(stack.place.path("card")).await?;
    let atr = message(5, 0, &[0x3B, 0x84, 0x40, 0x01, 0x74, 0x65, 0x73, 0x74]);
    stream.write_all(&message(3, u32::MAX, b"Spice Software Smartcard")).await?;
    stream.write_all(&atr).await?;
    guest.ok("guest-pcsc wait-card present 30").await?;
    let select = format!("guest-pcsc transmit {SELECT}");
    for round in 0..stack_tests::scale(5, 50) {
        let transmit = guest.run(&select);
        let swap = async {
            command(&mut stream).await?;
            // The old card's answer comes after the new card is in.
            stream.write_all(&atr).await?;
            stream.write_all(&message(7, 0, &[0xDE, 0xAD, 0x90, 0x00])).await?;
            anyhow::Ok(())
        };
        let (ran, swapped) =
            tokio::join!(transmit, within(Some(guest), Duration::from_secs(90), "a command", swap));
        swapped??;
        let text = ran?.text().to_uppercase();
        ensure!(!text.contains("DEAD"), "round {round}, the call that was out: {text}");
        guest.ok("guest-pcsc wait-card present 30").await?;
        let transmit = guest.run(&select);
        let answer = async {
            command(&mut stream).await?;
            stream.write_all(&message(7, 0, &[0xBE, 0xEF, 0x90, 0x00])).await?;
            anyhow::Ok(())
        };
        let (ran, answered) =
            tokio::join!(transmit, within(Some(guest), Duration::from_secs(90), "a command", answer));
        answered??;
        let text = ran?.text().to_uppercase();
        ensure!(text.contains("BEEF9000"), "round {round}, the new session: {text}");
    }
    Ok(())
}

/// The next APDU from the host.
async fn command(stream: &mut UnixStream) -> Result<Vec<u8>> {
    loop {
        let mut header = [0; 12];
        stream.read_exact(&mut header).await.context("the daemon has closed")?;
        let length = u32::from_be_bytes([header[8], header[9], header[10], header[11]]) as usize;
        let mut payload = vec![0; length];
        stream.read_exact(&mut payload).await?;
        if header[3] == 7 {
            return Ok(payload);
        }
    }
}
