//! Whoever has lines repeated does not fill the disk.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use super::peers::{card, import, passthru, usbip};
use super::{Daemon, Place};

const ROUNDS: u32 = 10_000;

/// Does this many times what a peer can do, and counts the lines.
fn flood(daemon: Daemon, path: &Path, round: impl Fn(UnixStream)) {
    let start = Instant::now();
    (0..ROUNDS).for_each(|_| round(UnixStream::connect(path).unwrap()));
    let lines = daemon.ended();
    // One more each minute, and one for each time a budget was full again.
    let most = 64 + start.elapsed().as_secs() / 60 + 1;
    let mut kinds = BTreeMap::<String, u64>::new();
    for line in &lines {
        let line = line.replace("; not all of this is told from now on", "");
        *kinds.entry(line.chars().filter(|char| !char.is_ascii_digit()).collect()).or_default() += 1;
    }
    assert!(kinds.values().all(|count| *count <= most), "{kinds:#?}");
    assert!(lines.len() < 600, "{} lines: {kinds:#?}", lines.len());
    assert!(lines.iter().any(|line| line.contains("; not all of this is told")), "{kinds:#?}");
}

/// Says these bytes, and waits until it is left.
fn say(mut peer: UnixStream, bytes: &[u8]) {
    // It may be left before all is said.
    let _ = peer.write_all(bytes);
    let _ = peer.shutdown(Shutdown::Write);
    let _ = peer.read_to_end(&mut Vec::new());
}

#[test]
fn of_usbip_clients() {
    let place = Place::new();
    let daemon = usbip(&place);
    // SUBMIT to endpoint 9, which there is not.
    let submits = (1..=70_u32).flat_map(|number| [1, number, 0x0001_0001, 0, 9, 0, 0, 0, 0, 0, 0, 0]);
    let submits = submits.flat_map(u32::to_be_bytes);
    let bytes: Vec<u8> = import().into_iter().chain(submits).collect();
    flood(daemon, &place.path("usbip"), |peer| say(peer, &bytes));
}

#[test]
fn of_usbip_clients_that_come_and_go() {
    let place = Place::new();
    flood(usbip(&place), &place.path("usbip"), |peer| say(peer, &import()));
}

#[test]
fn of_cards_that_come_and_go() {
    let place = Place::new();
    let bytes = [card(&[0x3B, 0x00]), card(&[])].concat();
    flood(passthru(&place), &place.path("card"), |peer| say(peer, &bytes));
}

#[test]
fn of_peers_that_bring_no_card() {
    let place = Place::new();
    // Messages of type 11, which there is not; the stream cannot be followed after the last.
    let odd = [11_u32, 0, 0].into_iter().flat_map(u32::to_be_bytes).collect::<Vec<_>>().repeat(70);
    flood(passthru(&place), &place.path("card"), |peer| say(peer, &odd));
}

#[test]
fn a_flood_of_one_kind_hides_no_other() {
    let place = Place::new();
    let daemon = passthru(&place);
    let connect = || UnixStream::connect(place.path("card")).unwrap();
    (0..200).for_each(|_| say(connect(), &[]));
    let mut client = connect();
    client.write_all(&card(&[0x3B, 0x00])).unwrap();
    daemon.line("card inserted");
    let refused = connect();
    daemon.line("second client refused");
    drop(refused);
    client.write_all(&card(&[])).unwrap();
    daemon.line("card removed");
}

#[test]
fn of_vmms() {
    let place = Place::new();
    let (daemon, _) = Daemon::start(place.daemon(&[]));
    daemon.line("ready");
    // usbredir's hello, without any capability, and device_disconnect_ack, of which there is nothing to acknowledge.
    let packets = [0_u32, 68, 0].into_iter().chain([0; 17]).chain([24_u32, 0, 1].repeat(40));
    let bytes: Vec<u8> = packets.flat_map(u32::to_le_bytes).collect();
    flood(daemon, &place.path("reader"), |peer| say(peer, &bytes));
}
