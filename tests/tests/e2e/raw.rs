//! A card in a reader of the host, passed through raw: the host's pcscd and vpcd, and a card there.

mod card;
mod guest;

use std::time::Duration;

use anyhow::{Result, ensure};
use emulated_card::pcsc::{PcscConfig, PcscSource};
use emulated_card::tries::KeepTries;
use pcsc::{Context, Disposition, Protocols, Scope, ShareMode};
use stack_tests::host::Host;
use stack_tests::pcscd::Pcscd;
use vscard_protocol::{Atr, Card, CardError, CardSource, Command, Limits, Presence, PresenceWatch};

use self::card::VirtualCard;

const READER: &std::ffi::CStr = c"Virtual PCD 00 00";
/// For what takes pcscd a look (0.4 s) or us an attempt to reach it (5 s).
const SOON: Duration = Duration::from_secs(60);

fn t1(name: &[u8]) -> Atr {
    Atr::t1(name).expect("a short name")
}

fn open(exclusive: bool) -> Result<PcscSource> {
    Ok(PcscSource::open(PcscConfig { reader: "Virtual*00 00".into(), exclusive })?)
}

async fn until(watch: &mut PresenceWatch, wanted: impl Fn(&Presence) -> bool) -> Result<Presence> {
    let found = async {
        loop {
            let presence = watch.get();
            if wanted(&presence) {
                return presence;
            }
            watch.changed().await;
        }
    };
    Ok(tokio::time::timeout(SOON, found).await?)
}

async fn present(watch: &mut PresenceWatch, wanted: &Atr) -> Result<u64> {
    let presence =
        until(watch, |presence| matches!(presence, Presence::Present { atr, .. } if atr == wanted)).await?;
    presence.insertion().ok_or_else(|| anyhow::anyhow!("absent"))
}

async fn absent(watch: &mut PresenceWatch) -> Result<()> {
    until(watch, |presence| *presence == Presence::Absent).await.map(drop)
}

async fn ask(card: &mut Box<dyn Card>, command: &[u8]) -> Result<Vec<u8>, CardError> {
    let command = Command::parse(command).expect("a command");
    card.transmit(&command).await.map(|response| response.as_bytes().to_vec())
}

/// Another program of the host.
fn program(mode: ShareMode) -> Result<pcsc::Card, pcsc::Error> {
    Context::establish(Scope::User)?.connect(READER, mode, Protocols::ANY)
}

fn ask_as_program(card: &pcsc::Card, command: &[u8]) -> Result<Vec<u8>, pcsc::Error> {
    let mut buffer = [0; 300];
    Ok(card.transmit(command, &mut buffer)?.to_vec())
}

fn leave(card: pcsc::Card, disposition: Disposition) -> Result<()> {
    card.disconnect(disposition).map_err(|(_, error)| error.into())
}

const VERIFY: &[u8] = b"\x00\x20\x00\x80\x041234";
const WRONG: &[u8] = b"\x00\x20\x00\x80\x040000";
const QUESTION: &[u8] = b"\x00\x20\x00\x80";
const DONE: &[u8] = &[0x90, 0];

#[tokio::test(flavor = "multi_thread")]
async fn a_card_comes_goes_and_is_swapped() -> Result<()> {
    let Some(pcscd) = Pcscd::inside("raw::a_card_comes_goes_and_is_swapped").await? else { return Ok(()) };
    let source = open(false)?;
    let mut watch = source.presence();
    ensure!(watch.get() == Presence::Absent);
    pcscd.start_daemon().await?;

    let card = VirtualCard::insert(t1(b"first").as_bytes()).await?;
    let first = present(&mut watch, &t1(b"first")).await?;
    let mut powered = source.power_on(first).await?;
    ensure!(powered.atr() == &t1(b"first"));
    // What the card gets is what the guest sent, and the other way round: extended APDUs too.
    let long = Command::build([0, 0xEE, 1, 2], &[0x5A; 3000], Some(65_536))?;
    let echoed = powered.transmit(&long).await?;
    ensure!(echoed.data() == long.as_bytes());
    ensure!(matches!(source.power_on(first).await, Err(CardError::Busy)));

    drop(card);
    absent(&mut watch).await?;
    ensure!(ask(&mut powered, QUESTION).await == Err(CardError::Removed));

    let card = VirtualCard::insert(t1(b"second").as_bytes()).await?;
    let second = present(&mut watch, &t1(b"second")).await?;
    ensure!(second > first);
    // The old session stays over, and its insertion cannot be powered.
    ensure!(ask(&mut powered, QUESTION).await == Err(CardError::Removed));
    ensure!(matches!(source.power_on(first).await, Err(CardError::Removed)));
    let mut powered = source.power_on(second).await?;
    ensure!(ask(&mut powered, QUESTION).await? == [0x63, 0xC3]);

    // The next one takes the reader the moment this one leaves it.
    let next = VirtualCard::insert(t1(b"third").as_bytes()).await?;
    drop(card);
    let third = present(&mut watch, &t1(b"third")).await?;
    ensure!(third > second);
    ensure!(ask(&mut powered, QUESTION).await == Err(CardError::Removed));
    let mut powered = source.power_on(third).await?;
    ensure!(ask(&mut powered, QUESTION).await? == [0x63, 0xC3]);

    pcscd.stop_daemon().await?;
    absent(&mut watch).await?;
    ensure!(ask(&mut powered, QUESTION).await == Err(CardError::Removed));
    drop(next);
    pcscd.start_daemon().await?;
    let _card = VirtualCard::insert(t1(b"third").as_bytes()).await?;
    let fourth = present(&mut watch, &t1(b"third")).await?;
    ensure!(fourth > third);
    let mut powered = source.power_on(fourth).await?;
    ensure!(ask(&mut powered, QUESTION).await? == [0x63, 0xC3]);

    drop(source);
    ensure!(ask(&mut powered, QUESTION).await == Err(CardError::Removed));
    ensure!(watch.get() == Presence::Absent);
    Ok(())
}

/// SELECT and four reads; `mine` is what must be read all along.
fn sequence(mine: u8) -> Vec<(Vec<u8>, Vec<u8>)> {
    let select = (vec![0, 0xA4, 4, 0, 1, mine], DONE.to_vec());
    let read = |part| (vec![0, 0xB0, part, 0, 2], vec![mine, part, 0x90, 0]);
    std::iter::once(select).chain((0..4).map(read)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_host_and_the_guest_share_a_card() -> Result<()> {
    let Some(pcscd) = Pcscd::inside("raw::the_host_and_the_guest_share_a_card").await? else { return Ok(()) };
    pcscd.start_daemon().await?;
    let virtual_card = VirtualCard::insert(t1(b"shared").as_bytes()).await?;
    let source = open(false)?;
    let insertion = present(&mut source.presence(), &t1(b"shared")).await?;
    let mut powered = source.power_on(insertion).await?;
    // The card is reset for the guest's first command; from then on nobody loses anything.
    ensure!(ask(&mut powered, QUESTION).await? == [0x63, 0xC3]);

    let other = std::thread::spawn(|| -> Result<u32> {
        let mut card = program(ShareMode::Shared)?;
        for _ in 0..3 {
            let transaction = card.transaction()?;
            for (command, expected) in sequence(0xB0) {
                ensure!(ask_as_program(&transaction, &command)? == expected);
            }
            transaction.end(Disposition::LeaveCard).map_err(|(_, error)| error)?;
        }
        leave(card, Disposition::LeaveCard)?;
        Ok(3)
    });
    // A guest that thinks between two commands, longer than pcscd takes to hand on a card that is free.
    let mut sequences = 0_u32;
    while !other.is_finished() {
        for (command, expected) in sequence(0xA0) {
            let answer = ask(&mut powered, &command).await?;
            ensure!(answer == expected, "{command:02X?}: {answer:02X?}");
            if command[1] == 0xA4 {
                tokio::time::sleep(Duration::from_millis(250)).await;
            }
        }
        sequences += 1;
        if sequences % 2 == 0 {
            tokio::time::sleep(Duration::from_millis(800)).await;
        }
    }
    ensure!(other.join().expect("no panic")? == 3);
    let selected = |file| {
        let seen = virtual_card.seen.lock().expect("no panic");
        seen.commands.iter().filter(|command| command[..] == [0, 0xA4, 4, 0, 1, file]).count()
    };
    ensure!(selected(0xA0) == sequences as usize && selected(0xB0) == 3);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_busy_guest_lets_others_have_their_turn() -> Result<()> {
    let Some(pcscd) = Pcscd::inside("raw::a_busy_guest_lets_others_have_their_turn").await? else {
        return Ok(());
    };
    pcscd.start_daemon().await?;
    let _card = VirtualCard::insert(t1(b"busy").as_bytes()).await?;
    let source = open(false)?;
    let insertion = present(&mut source.presence(), &t1(b"busy")).await?;
    let mut powered = source.power_on(insertion).await?;
    ensure!(ask(&mut powered, QUESTION).await? == [0x63, 0xC3]);
    let other = std::thread::spawn(|| -> Result<()> {
        let mut card = program(ShareMode::Shared)?;
        card.transaction()?.end(Disposition::LeaveCard).map_err(|(_, error)| error)?;
        leave(card, Disposition::LeaveCard)
    });
    while !other.is_finished() {
        ensure!(ask(&mut powered, QUESTION).await? == [0x63, 0xC3]);
    }
    other.join().expect("no panic")
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_verified_ends_with_a_reset_and_no_card_is_reset_for_nothing() -> Result<()> {
    let name = "raw::what_is_verified_ends_with_a_reset_and_no_card_is_reset_for_nothing";
    let Some(pcscd) = Pcscd::inside(name).await? else { return Ok(()) };
    pcscd.start_daemon().await?;
    let virtual_card = VirtualCard::insert(t1(b"pin").as_bytes()).await?;
    let resets = || virtual_card.seen.lock().expect("no panic").resets;
    let source = open(false)?;
    let mut watch = source.presence();
    let insertion = present(&mut watch, &t1(b"pin")).await?;

    // A guest that only powers the card up and down costs the host's programs nothing.
    let other = program(ShareMode::Shared)?;
    ensure!(ask_as_program(&other, VERIFY)? == DONE);
    drop(source.power_on(insertion).await?);
    drop(source.power_on(insertion).await?);
    ensure!(resets() == 0 && ask_as_program(&other, QUESTION)? == DONE);

    // What the host verified is not verified for a guest.
    let mut powered = source.power_on(insertion).await?;
    ensure!(ask(&mut powered, QUESTION).await? == [0x63, 0xC3]);
    ensure!(resets() == 1);
    leave(other, Disposition::LeaveCard)?;

    // What a guest verified is not verified for the next session, nor for the host.
    ensure!(ask(&mut powered, VERIFY).await? == DONE);
    ensure!(ask(&mut powered, QUESTION).await? == DONE);
    drop(powered);
    let mut powered = source.power_on(insertion).await?;
    ensure!(ask(&mut powered, QUESTION).await? == [0x63, 0xC3]);
    ensure!(ask(&mut powered, VERIFY).await? == DONE);
    drop(powered);
    let mut other = program(ShareMode::Shared)?;
    // This waits for the guest's transaction; the reset that ended it may have met this connection already.
    let was_reset = other.transaction().is_err();
    if was_reset {
        other.reconnect(ShareMode::Shared, Protocols::ANY, Disposition::LeaveCard)?;
    }
    ensure!(ask_as_program(&other, QUESTION)? == [0x63, 0xC3]);

    // Another program resets the card: the guest's session is over, and it sees the card come back.
    let mut powered = source.power_on(insertion).await?;
    ensure!(ask(&mut powered, VERIFY).await? == DONE);
    // The transaction ends half a second after the last command; until then nobody else resets anything.
    leave(program(ShareMode::Shared)?, Disposition::ResetCard)?;
    ensure!(ask(&mut powered, QUESTION).await == Err(CardError::Removed));
    let again = until(&mut watch, |presence| presence.insertion().is_some_and(|now| now > insertion)).await?;
    ensure!(matches!(source.power_on(insertion).await, Err(CardError::Removed)));
    let again = again.insertion().expect("present");
    let mut powered = source.power_on(again).await?;
    ensure!(ask(&mut powered, QUESTION).await? == [0x63, 0xC3]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_guest_that_is_gone_has_sent_does_not_reach_the_card() -> Result<()> {
    let name = "raw::what_a_guest_that_is_gone_has_sent_does_not_reach_the_card";
    let Some(pcscd) = Pcscd::inside(name).await? else { return Ok(()) };
    pcscd.start_daemon().await?;
    let virtual_card = VirtualCard::insert(t1(b"gone").as_bytes()).await?;
    let source = open(false)?;
    let insertion = present(&mut source.presence(), &t1(b"gone")).await?;
    for used in [false, true] {
        let mut powered = source.power_on(insertion).await?;
        if used {
            ensure!(ask(&mut powered, QUESTION).await? == [0x63, 0xC3]);
        }
        let mut other = program(ShareMode::Shared)?;
        let transaction = other.transaction()?;
        // Long enough for it to wait for the other program.
        let sent = tokio::time::timeout(Duration::from_millis(300), ask(&mut powered, VERIFY)).await;
        ensure!(sent.is_err());
        drop(powered);
        transaction.end(Disposition::LeaveCard).map_err(|(_, error)| error)?;
        let mut powered = source.power_on(insertion).await?;
        ensure!(ask(&mut powered, QUESTION).await? == [0x63, 0xC3]);
    }
    let seen = virtual_card.seen.lock().expect("no panic");
    ensure!(seen.commands.iter().all(|command| command == QUESTION), "{:02X?}", seen.commands);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_card_that_a_program_is_at_work_with_is_there_after_that() -> Result<()> {
    let name = "raw::a_card_that_a_program_is_at_work_with_is_there_after_that";
    let Some(pcscd) = Pcscd::inside(name).await? else { return Ok(()) };
    pcscd.start_daemon().await?;
    let _card = VirtualCard::insert(t1(b"work").as_bytes()).await?;
    pcscd.card_in(0).await?;
    let mut other = program(ShareMode::Shared)?;
    let transaction = other.transaction()?;
    let host = Host::new()?;
    let passed = pcscd.start_program("vscclient", ["--pcsc", "Virtual", &host.endpoint()])?;
    let released = async {
        passed.line("another program is at work with the card").await?;
        transaction.end(Disposition::LeaveCard).map_err(|(_, error)| error)?;
        anyhow::Ok(())
    };
    let (peer, released) = tokio::join!(host.card(), released);
    released?;
    ensure!(peer?.transmit(QUESTION).await? == [0x63, 0xC3]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_card_can_be_taken_alone() -> Result<()> {
    let Some(pcscd) = Pcscd::inside("raw::a_card_can_be_taken_alone").await? else { return Ok(()) };
    pcscd.start_daemon().await?;
    let _card = VirtualCard::insert(t1(b"alone").as_bytes()).await?;
    let source = open(true)?;
    let insertion = present(&mut source.presence(), &t1(b"alone")).await?;
    let other = program(ShareMode::Shared)?;
    ensure!(matches!(source.power_on(insertion).await, Err(CardError::Busy)));
    leave(other, Disposition::LeaveCard)?;
    let mut powered = source.power_on(insertion).await?;
    ensure!(ask(&mut powered, VERIFY).await? == DONE);
    ensure!(matches!(program(ShareMode::Shared), Err(pcsc::Error::SharingViolation)));
    // The next session waits for this one to have let go of the card.
    drop(powered);
    let mut powered = source.power_on(insertion).await?;
    ensure!(ask(&mut powered, QUESTION).await? == [0x63, 0xC3]);
    Ok(())
}

/// A host such as QEMU, which does not power the card itself, gets it when the program is done with it.
#[tokio::test(flavor = "multi_thread")]
async fn a_card_that_a_program_has_alone_is_waited_for() -> Result<()> {
    let test = "raw::a_card_that_a_program_has_alone_is_waited_for";
    let Some(pcscd) = Pcscd::inside(test).await? else { return Ok(()) };
    pcscd.start_daemon().await?;
    let _card = VirtualCard::insert(t1(b"taken").as_bytes()).await?;
    pcscd.card_in(0).await?;
    let other = program(ShareMode::Exclusive)?;
    let host = Host::new()?;
    let passed = pcscd.start_program("vscclient", ["--pcsc", "Virtual", &host.endpoint()])?;
    let released = async {
        passed.line("the card is in use by another program").await?;
        leave(other, Disposition::LeaveCard)
    };
    let (peer, released) = tokio::join!(host.card(), released);
    released?;
    let mut peer = peer?;
    ensure!(peer.transmit(QUESTION).await? == [0x63, 0xC3]);
    ensure!(!passed.log().contains("ERROR"), "{}", passed.log());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_loop_of_wrong_pins_leaves_a_t0_card_one_try() -> Result<()> {
    let Some(pcscd) = Pcscd::inside("raw::a_loop_of_wrong_pins_leaves_a_t0_card_one_try").await? else {
        return Ok(());
    };
    pcscd.start_daemon().await?;
    let atr = Atr::t0(b"old")?;
    let card = VirtualCard::insert(atr.as_bytes()).await?;
    let source = KeepTries::new(open(false)?, 1);
    let insertion = present(&mut source.presence(), &atr).await?;
    let Presence::Present { limits, .. } = source.presence().get() else { anyhow::bail!("absent") };
    ensure!(limits == Limits::SHORT);
    for expected in [[0x63, 0xC2], [0x63, 0xC1], [0x69, 0x83], [0x69, 0x83]] {
        let mut powered = source.power_on(insertion).await?;
        ensure!(ask(&mut powered, WRONG).await? == expected);
    }
    let seen = card.seen.lock().expect("no panic");
    ensure!(seen.tries == 1);
    // A T=0 card is asked in five bytes.
    ensure!(seen.commands[0] == [0, 0x20, 0, 0x80, 0] && seen.commands[1] == WRONG);
    Ok(())
}
