//! APDUs longer than a message (USB CCID 1.1 §6.1.4, §6.2.1).

use std::sync::Arc;

use ccid_device::{Action, Device, InOutcome, Layout, Outcome};
use proptest::prelude::*;
use vscard_protocol::{Command, Response, StatusWord, Validity};

use crate::guest::{Guest, IN, OUT, atr, message};

/// Sends `command` and gives what came back, as a host does that chains.
fn exchange(guest: &mut Guest, command: &[u8], max_message: usize, response: &[u8]) -> Vec<u8> {
    let most = max_message - 10;
    let parts: Vec<&[u8]> = command.chunks(most).collect();
    let mut answer = Vec::new();
    for (index, part) in parts.iter().enumerate() {
        let level = match (index == 0, index + 1 == parts.len()) {
            (true, true) => 0,
            (true, false) => 1,
            (false, true) => 2,
            (false, false) => 3,
        };
        guest.send_bytes(&message(0x6F, 0, index as u8, [0, level, 0], part));
        if level == 1 || level == 3 {
            let ask = guest.read_bytes().unwrap();
            assert_eq!(ask.expose(), message(0x80, 0, index as u8, [0, 0, 0x10], &[]));
        }
    }
    let (token, received) = guest.transmit();
    assert_eq!(received.as_bytes(), command);
    guest.complete(token, Outcome::Response(Response::parse(response).unwrap()));
    let mut seq = parts.len() as u8 - 1;
    let mut first = true;
    loop {
        let block = guest.read_bytes().unwrap();
        let block = block.expose();
        assert!(block.len() <= max_message);
        assert_eq!((block[0], block[5], block[6], block[7], block[8]), (0x80, 0, seq, 0, 0));
        answer.extend(&block[10..]);
        match (block[9], first) {
            (0, true) | (2, false) => break,
            (1, true) | (3, false) => {}
            (chain, _) => panic!("bChainParameter {chain}"),
        }
        assert_eq!(block.len(), max_message, "a part that is not the last is full");
        first = false;
        seq = seq.wrapping_add(1);
        guest.send_bytes(&message(0x6F, 0, seq, [0, 0x10, 0], &[]));
    }
    assert!(guest.read_bytes().is_none());
    answer
}

fn response(length: usize) -> Vec<u8> {
    let data: Vec<u8> = (0..length - 2).map(|index| (index * 7) as u8).collect();
    Response::new(&data, StatusWord::SUCCESS).as_bytes().to_vec()
}

#[test]
fn the_longest_there_are() {
    let command = Command::build([0, 0xD6, 0, 0], &[0x5A; 65_535], Some(65_536)).unwrap();
    assert_eq!(command.as_bytes().len(), 65_544);
    let response = response(65_538);
    for max_message in [271, 300, 1024, 65_553, 65_554] {
        let mut guest = Guest::powered(max_message);
        for _ in 0..2 {
            let answer = exchange(&mut guest, command.as_bytes(), max_message as usize, &response);
            assert_eq!(answer, response);
        }
    }
}

#[test]
fn every_answer_length_around_packets() {
    for max_message in [271, 65_554] {
        let mut guest = Guest::powered(max_message);
        for length in (2..=600).chain((1..40).flat_map(|n| n * 512 - 12..=n * 512 + 2)) {
            let wanted = response(length);
            assert_eq!(exchange(&mut guest, &[0, 0xB0, 0, 0], max_message as usize, &wanted), wanted);
        }
    }
}

#[test]
fn a_guest_that_reads_packet_by_packet_sees_the_end() {
    // An answer of 128 bytes in reads of 64 needs an empty third; one of 127 does not.
    for (length, reads) in [(118, &[64, 64, 0][..]), (117, &[64, 63]), (119, &[64, 64, 1])] {
        let mut guest = Guest::powered(65_554);
        guest.send("6F 04000000 00 01 00 0000 00000000");
        let (token, _) = guest.transmit();
        guest.respond(token, &vec![0; length - 2]);
        for &read in reads {
            assert!(guest.device.in_ready(IN));
            match guest.device.bulk_in(IN, 64) {
                InOutcome::Data(data) => assert_eq!(data.len(), read),
                other => panic!("{other:?}"),
            }
        }
        assert!(!guest.device.in_ready(IN));
    }
}

#[test]
fn parts_out_of_order() {
    let mut guest = Guest::powered(271);
    let level = |guest: &mut Guest, level: u8, data: &[u8]| {
        guest.send_bytes(&message(0x6F, 0, 9, [0, level, 0], data));
        guest.read_bytes().map(|answer| answer.expose()[7..].to_vec())
    };
    let wrong = Some(vec![0x40, 8, 0]);
    assert_eq!(level(&mut guest, 2, &[0; 4]), wrong, "last without first");
    assert_eq!(level(&mut guest, 3, &[0; 4]), wrong, "middle without first");
    assert_eq!(level(&mut guest, 0x10, &[]), wrong, "next of no response");
    // A new command makes an unfinished one void.
    assert_eq!(level(&mut guest, 1, &[0; 4]), Some(vec![0, 0, 0x10]));
    assert_eq!(level(&mut guest, 0, &[0, 1, 2, 3]), None);
    let (token, command) = guest.transmit();
    assert_eq!(command.header(), [0, 1, 2, 3]);
    guest.respond(token, &[0; 300]);
    assert_eq!(guest.read_bytes().unwrap().expose()[9], 1);
    // And what was not read of a response.
    assert_eq!(level(&mut guest, 1, &[0; 4]), Some(vec![0, 0, 0x10]));
    assert_eq!(level(&mut guest, 0x10, &[]), wrong);
    assert_eq!(level(&mut guest, 2, &[0; 4]), wrong, "the error ended the command");
    // A power-on ends it, too.
    assert_eq!(level(&mut guest, 1, &[0; 4]), Some(vec![0, 0, 0x10]));
    guest.power_on();
    assert_eq!(level(&mut guest, 2, &[0; 4]), wrong);
}

#[test]
fn a_command_that_never_ends_is_refused() {
    let mut guest = Guest::powered(271);
    let mut sent = 0;
    let mut level = 1;
    loop {
        guest.send_bytes(&message(0x6F, 0, 1, [0, level, 0], &[0; 261]));
        let answer = guest.read_bytes().unwrap();
        match answer.expose()[7..] {
            [0, 0, 0x10] => sent += 261,
            [0x40, 1, 0] => break,
            ref other => panic!("{other:?}"),
        }
        level = 3;
    }
    assert_eq!(sent, 65_544 / 261 * 261);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_lengths_survive(
        max_message in prop_oneof![Just(271u32), Just(300), Just(65_554), 271u32..=65_554],
        data in prop_oneof![0usize..=600, 0usize..=65_535],
        le in proptest::option::of(1u32..=65_536),
        length in prop_oneof![2usize..=600, 2usize..=65_538],
    ) {
        let command = Command::build([0, 0xD6, 0, 0], &vec![0xA5; data], le).unwrap();
        let wanted = response(length);
        let mut guest = Guest::powered(max_message);
        prop_assert_eq!(exchange(&mut guest, command.as_bytes(), max_message as usize, &wanted), wanted);
    }

    #[test]
    fn any_packets_in_and_out(data in 0usize..3000, max in 1usize..40) {
        // A message in whole packets, as UHCI sends it, and an answer read in any reads.
        let mut guest = Guest::new(Layout::Slots(1), 65_554);
        guest.insert(0);
        guest.send("62 00000000 00 00 00 0000");
        guest.work();
        let answer = guest.read_bytes().unwrap();
        let atr = atr();
        prop_assert_eq!(&answer.expose()[10..], atr.as_bytes());
        let command = Command::build([0, 0xD6, 0, 0], &vec![0xA5; data], None).unwrap();
        let bytes = message(0x6F, 0, 1, [0; 3], command.as_bytes());
        for packet in bytes.chunks(64) {
            guest.device.bulk_out(OUT, packet, guest.now);
        }
        let Some(Action::Transmit { token, command: received, .. }) = guest.device.poll_action() else {
            return Err(TestCaseError::fail("no command"));
        };
        prop_assert_eq!(received.as_bytes(), command.as_bytes());
        guest.respond(token, received.as_bytes());
        let mut answer = Vec::new();
        let mut short = false;
        while let InOutcome::Data(data) = guest.device.bulk_in(IN, 64 * max) {
            prop_assert!(!short, "data after the end");
            short = data.len() < 64 * max;
            answer.extend_from_slice(data.expose());
        }
        prop_assert!(short, "no end");
        prop_assert_eq!(answer.len(), 10 + command.as_bytes().len() + 2);
    }
}

/// The card's answer to a command, good as long as the PIN is verified: 600 bytes that are secret, and 9000.
fn decrypted(guest: &mut Guest, pin: &Arc<()>) -> Response {
    guest.send("6F 05000000 00 01 00 0000 00 87 07 9D 00");
    let (token, _) = guest.transmit();
    let response = Response::new(&[0xA5; 600], StatusWord::SUCCESS).valid(Validity::of(pin));
    guest.complete(token, Outcome::Response(response.clone()));
    response
}

#[test]
fn what_waits_when_the_pin_is_forgotten_is_not_read() {
    let refused = |chain: u8, seq: u8| Some(message(0x80, 0, seq, [0, 0, chain], &[0x69, 0x82]));
    let read = |guest: &mut Guest| guest.read_bytes().map(|answer| answer.expose().to_vec());
    let next = |guest: &mut Guest| {
        guest.send("6F 00000000 00 02 00 1000");
        guest.read_bytes().map(|answer| answer.expose().to_vec())
    };
    for max_message in [271, 65_554] {
        // Before the guest has read any of it.
        let (mut guest, pin) = (Guest::powered(max_message), Arc::new(()));
        decrypted(&mut guest, &pin);
        drop(pin);
        assert_eq!(read(&mut guest), refused(0, 1));
        assert_eq!(read(&mut guest), None);
        // The slot goes on.
        assert_eq!(
            guest.ask("6F 04000000 00 03 00 0000 00A40400"),
            "800600000000030000 00 00A404009000".replace(' ', "")
        );
    }
    // Between two parts of it.
    let (mut guest, pin) = (Guest::powered(271), Arc::new(()));
    decrypted(&mut guest, &pin);
    assert_eq!(read(&mut guest), Some(message(0x80, 0, 1, [0, 0, 1], &[0xA5; 261])));
    drop(pin);
    assert_eq!(next(&mut guest), refused(2, 2));
    assert_eq!(next(&mut guest), Some(message(0x80, 0, 2, [0x40, 8, 0], &[])), "the chain is over");
    // With the second part asked for and not read.
    let (mut guest, pin) = (Guest::powered(271), Arc::new(()));
    decrypted(&mut guest, &pin);
    read(&mut guest);
    guest.send("6F 00000000 00 02 00 1000");
    drop(pin);
    assert_eq!(read(&mut guest), refused(2, 2));
}

/// A guest that has begun to read knows how much comes.
#[test]
fn what_was_begun_to_be_read_ends_as_long_as_it_was() {
    for (given, given_back) in [(1, 0), (2, 0), (1, 1), (3, 2), (9, 0), (9, 9), (10, 1), (10, 10)] {
        let (mut guest, pin) = (Guest::powered(65_554), Arc::new(()));
        let response = decrypted(&mut guest, &pin);
        let whole = message(0x80, 0, 1, [0, 0, 0], response.as_bytes());
        let packet = |guest: &mut Guest| match guest.device.bulk_in(IN, 64) {
            InOutcome::Data(data) => Some(data),
            _ => None,
        };
        let mut packets: Vec<_> = std::iter::from_fn(|| packet(&mut guest)).take(given).collect();
        drop((pin, response));
        for _ in 0..given_back {
            let data = packets.pop().unwrap();
            guest.device.bulk_in_return(IN, data);
        }
        let kept: Vec<u8> = packets.iter().flat_map(|packet| packet.expose()).copied().collect();
        assert_eq!(kept, whole[..kept.len()]);
        let rest: Vec<u8> =
            std::iter::from_fn(|| packet(&mut guest)).flat_map(|packet| packet.expose().to_vec()).collect();
        assert!(!rest.contains(&0xA5), "{given} given, {given_back} given back");
        match kept.len() {
            0 => assert!(rest.ends_with(&[0x69, 0x82])),
            612 => assert!(rest.is_empty()),
            // One byte of a status word is no answer of a key.
            kept => assert_eq!((kept + rest.len(), rest.ends_with(&[0x69, 0x82])), (612, true)),
        }
    }
}

#[test]
fn what_a_key_gave_is_not_saved() {
    for max_message in [271, 65_554] {
        let (mut guest, pin) = (Guest::powered(max_message), Arc::new(()));
        decrypted(&mut guest, &pin);
        if max_message == 271 {
            guest.read_bytes().unwrap();
        }
        let saved = guest.device.save();
        assert!(!saved.expose().contains(&0xA5));
        guest.device = Device::restore(guest.config.clone(), saved.expose(), guest.now).unwrap();
        if max_message == 271 {
            guest.send("6F 00000000 00 02 00 1000");
        }
        let answer = guest.read().unwrap();
        assert!(answer.ends_with("6982"), "{answer}");
    }
}
