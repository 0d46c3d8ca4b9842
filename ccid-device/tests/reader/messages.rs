//! Each message of the host and its answer (USB CCID 1.1 §6).

use ccid_device::{Action, CardFailure, Layout, Outcome, SlotId, TransferOutcome};
use vscard_protocol::Atr;

use crate::guest::{ATR, Guest, OUT, atr, bytes, message};

const MAX: u32 = 65_554;

/// Messages and their answers, one after the other.
fn conversation(guest: &mut Guest, steps: &[(&str, &str, &str)]) {
    for (name, message, answer) in steps {
        assert_eq!(guest.ask(message), answer.replace(' ', ""), "{name}");
    }
}

#[test]
fn without_a_card() {
    conversation(
        &mut Guest::new(Layout::Slots(1), MAX),
        &[
            ("IccPowerOn", "62 00000000 00 01 00 0000", "80 00000000 00 01 42 FE 00"),
            ("IccPowerOff", "63 00000000 00 02 00 0000", "81 00000000 00 02 02 00 00"),
            ("GetSlotStatus", "65 00000000 00 03 00 0000", "81 00000000 00 03 02 00 00"),
            ("XfrBlock", "6F 04000000 00 04 00 0000 00000000", "80 00000000 00 04 42 FE 00"),
            ("GetParameters", "6C 00000000 00 05 00 0000", "82 05000000 00 05 42 FE 00 1100000A00"),
            ("ResetParameters", "6D 00000000 00 06 00 0000", "82 05000000 00 06 42 FE 00 1100000A00"),
            (
                "SetParameters",
                "61 05000000 00 07 00 0000 1100000A00",
                "82 05000000 00 07 42 FE 00 1100000A00",
            ),
        ],
    );
}

#[test]
fn with_a_card_unpowered() {
    let mut guest = Guest::new(Layout::Slots(1), MAX);
    guest.insert(0);
    conversation(
        &mut guest,
        &[
            ("GetSlotStatus", "65 00000000 00 01 00 0000", "81 00000000 00 01 01 00 00"),
            ("IccPowerOff", "63 00000000 00 02 00 0000", "81 00000000 00 02 01 00 00"),
            ("XfrBlock", "6F 04000000 00 03 00 0000 00000000", "80 00000000 00 03 41 FE 00"),
            ("GetParameters", "6C 00000000 00 04 00 0000", "82 05000000 00 04 41 FE 00 1100000A00"),
        ],
    );
}

#[test]
fn with_a_card_powered() {
    conversation(
        &mut Guest::powered(MAX),
        &[
            ("GetSlotStatus", "65 00000000 00 01 00 0000", "81 00000000 00 01 00 00 00"),
            (
                "XfrBlock",
                "6F 05000000 00 02 00 0000 00A4040000",
                "80 07000000 00 02 00 00 00 00A4040000 9000",
            ),
            ("no APDU", "6F 06000000 00 03 00 0000 00A404000501", "80 02000000 00 03 00 00 00 6700"),
            ("GetParameters", "6C 00000000 00 04 00 0000", "82 07000000 00 04 00 00 01 11100045 00FE00"),
            (
                "SetParameters",
                "61 07000000 00 05 01 0000 95100045002000",
                "82 07000000 00 05 00 00 01 95100045002000",
            ),
            ("GetParameters", "6C 00000000 00 06 00 0000", "82 07000000 00 06 00 00 01 95100045002000"),
            ("ResetParameters", "6D 00000000 00 07 00 0000", "82 07000000 00 07 00 00 01 1110004500FE00"),
            ("IccPowerOff", "63 00000000 00 08 00 0000", "81 00000000 00 08 01 00 00"),
            ("GetSlotStatus", "65 00000000 00 09 00 0000", "81 00000000 00 09 01 00 00"),
        ],
    );
}

#[test]
fn what_is_not_offered_fails_with_its_own_answer() {
    conversation(
        &mut Guest::powered(MAX),
        &[
            ("Escape", "6B 01000000 00 01 00 0000 6A", "83 00000000 00 01 40 00 00"),
            ("IccClock", "6E 00000000 00 02 01 0000", "81 00000000 00 02 40 00 00"),
            ("T0APDU", "6A 00000000 00 03 03 FFFF", "81 00000000 00 03 40 00 00"),
            ("Secure", "69 02000000 00 04 00 0000 0000", "80 00000000 00 04 40 00 00"),
            ("Mechanical", "71 00000000 00 05 01 0000", "81 00000000 00 05 40 00 00"),
            (
                "SetDataRateAndClockFrequency",
                "73 08000000 00 06 00 0000 A00F000000 2A0000",
                "84 08000000 00 06 40 00 00 A00F0000 002A0000",
            ),
            ("a type that is not known", "00 00000000 00 07 00 0000", "81 00000000 00 07 40 00 00"),
            ("an answer", "80 00000000 00 08 00 0000", "81 00000000 00 08 40 00 00"),
        ],
    );
}

#[test]
fn a_wrong_field_is_named_by_its_offset() {
    let parameters = "1110004500FE00";
    conversation(
        &mut Guest::powered(MAX),
        &[
            ("dwLength", "62 01000000 00 01 00 0000 00", "80 00000000 00 01 40 01 00"),
            ("dwLength", "63 01000000 00 01 00 0000 00", "81 00000000 00 01 40 01 00"),
            ("dwLength", "65 01000000 00 01 00 0000 00", "81 00000000 00 01 40 01 00"),
            ("dwLength", "72 01000000 00 01 00 0000 00", "81 00000000 00 01 40 01 00"),
            ("dwLength", "6F 00000000 00 01 00 0000", "80 00000000 00 01 40 01 00"),
            ("dwLength", "6C 01000000 00 01 00 0000 00", &format!("82 07000000 00 01 40 01 01 {parameters}")),
            (
                "dwLength",
                "61 06000000 00 01 01 0000 111000450020",
                &format!("82 07000000 00 01 40 01 01 {parameters}"),
            ),
            (
                "bProtocolNum",
                "61 07000000 00 01 02 0000 11100045002000",
                &format!("82 07000000 00 01 40 07 01 {parameters}"),
            ),
            (
                "bProtocolNum the card has not",
                "61 05000000 00 01 00 0000 1100000A00",
                &format!("82 07000000 00 01 40 07 01 {parameters}"),
            ),
            (
                "bIFSC",
                "61 07000000 00 01 01 0000 11100045000000",
                &format!("82 07000000 00 01 40 0F 01 {parameters}"),
            ),
            ("bPowerSelect", "62 00000000 00 01 04 0000", "80 00000000 00 01 40 07 00"),
            ("wLevelParameter", "6F 04000000 00 01 00 0400 00000000", "80 00000000 00 01 40 08 00"),
            ("wLevelParameter", "6F 04000000 00 01 00 0001 00000000", "80 00000000 00 01 40 08 00"),
            ("bSlot: never one that is not", "65 00000000 01 09 00 0000", "81 00000000 00 09 42 05 00"),
            ("bSlot", "6C 00000000 FF 09 00 0000", "82 05000000 00 09 42 05 00 1100000A00"),
            ("more than dwLength", "65 00000000 00 0A 00 0000 00", "81 00000000 00 0A 40 01 00"),
            ("less than dwLength", "6F 09000000 00 0B 00 0000 00", "80 00000000 00 0B 40 01 00"),
            (
                "more than dwMaxCCIDMessageLength",
                "6F 09000100 00 0C 00 0000 00",
                "80 00000000 00 0C 40 01 00",
            ),
            ("all of dwLength", "6F FFFFFFFF 00 0D 00 0000 00", "80 00000000 00 0D 40 01 00"),
        ],
    );
}

#[test]
fn a_runt_halts_the_endpoint() {
    let mut guest = Guest::powered(MAX);
    for length in 1..10 {
        assert_eq!(guest.device.bulk_out(OUT, &vec![0x65; length], guest.now), TransferOutcome::Stall);
        assert_eq!(guest.device.bulk_out(OUT, &[0x65; 10], guest.now), TransferOutcome::Stall);
        assert_eq!(guest.control("82 00 0000 0100 0200").as_deref(), Some("0100"));
        assert_eq!(guest.control("02 01 0000 0100 0000").as_deref(), Some(""));
        assert_eq!(guest.ask("65 00000000 00 01 00 0000"), "81000000000001000000");
    }
}

#[test]
fn power_on_again_is_a_reset() {
    let mut guest = Guest::powered(MAX);
    guest.send("62 00000000 00 01 00 0000");
    assert_eq!(guest.actions(), ["off 0", "on 0"]);
    // Polled, but with no answer yet.
    assert_eq!(guest.read(), None);
}

#[test]
fn power_off_ends_the_session_once() {
    let mut guest = Guest::powered(MAX);
    guest.send("63 00000000 00 01 00 0000");
    assert_eq!(guest.actions(), ["off 0"]);
    guest.send("63 00000000 00 02 00 0000");
    assert!(guest.actions().is_empty());
}

#[test]
fn one_command_at_a_time() {
    let mut guest = Guest::powered(MAX);
    guest.send("6F 04000000 00 01 00 0000 00000000");
    conversation_busy(&mut guest);
    let (token, _) = guest.transmit();
    conversation_busy(&mut guest);
    guest.respond(token, &[]);
    assert_eq!(guest.read().unwrap(), "800200000000010000009000");
    // The token names nothing any more.
    guest.respond(token, &[]);
    assert_eq!(guest.read(), None);
}

fn conversation_busy(guest: &mut Guest) {
    for (message, answer) in [
        ("6F 04000000 00 03 00 0000 00000000", "80 00000000 00 03 40 E0 00"),
        ("63 00000000 00 05 00 0000", "81 00000000 00 05 40 E0 00"),
        ("6B 00000000 00 06 00 0000", "83 00000000 00 06 40 E0 00"),
    ] {
        guest.send(message);
        assert_eq!(guest.read().unwrap(), answer.replace(' ', ""));
    }
}

/// libccid, killed while it waited for an answer and started again, begins so, and gives the reader up otherwise.
#[test]
fn a_busy_slot_tells_its_status_and_begins_anew() {
    let mut guest = Guest::powered(MAX);
    guest.send("6F 04000000 00 07 00 0000 00000000");
    let (old, _) = guest.transmit();
    guest.wait(1000);
    guest.send("65 00000000 00 00 00 0000");
    assert_eq!(guest.read().unwrap(), "80000000000007800100", "the time extension that was not read");
    assert_eq!(guest.read().unwrap(), "81000000000000000000");
    guest.wait(1000);
    guest.send("62 00000000 00 01 00 0000");
    assert_eq!(guest.read(), None, "another extension, for nobody");
    let actions: Vec<_> = std::iter::from_fn(|| guest.device.poll_action()).collect();
    let [Action::PowerOff { .. }, Action::PowerOn { token, .. }] = actions[..] else { panic!("{actions:?}") };
    // The command that nobody waits for ended with its session.
    guest.respond(old, b"late");
    assert_eq!(guest.read(), None);
    guest.complete(token, Outcome::Powered(atr()));
    assert_eq!(guest.read().unwrap(), format!("800B0000000001000000{ATR}"));
    assert_eq!(guest.ask("65 00000000 00 02 00 0000"), "81000000000002000000");
}

#[test]
fn slots_work_in_parallel() {
    let mut guest = Guest::new(Layout::Slots(16), MAX);
    for slot in 0..16 {
        guest.insert(slot);
        guest.send_bytes(&message(0x62, slot, slot, [0; 3], &[]));
    }
    guest.work();
    for slot in 0..16 {
        assert_eq!(guest.read().unwrap(), format!("800B000000{slot:02X}{slot:02X}000000{ATR}"));
        guest.send_bytes(&message(0x6F, slot, 0x80 | slot, [0; 3], &[0, slot, 0, 0]));
    }
    let mut waiting: Vec<_> = (0..16).map(|_| guest.transmit()).collect();
    // The last is the first.
    while let Some((token, command)) = waiting.pop() {
        let slot = command.ins();
        guest.respond(token, &[slot]);
        let answer = format!("8003000000{slot:02X}{:02X}000000{slot:02X}9000", 0x80 | slot);
        assert_eq!(guest.read().unwrap(), answer);
    }
}

#[test]
fn interfaces_are_readers_of_their_own() {
    let mut guest = Guest::new(Layout::Interfaces(7), MAX);
    for interface in 0..7 {
        guest.device.insert(SlotId(interface), guest.now);
        let out = 2 * interface + 1;
        let power_on = bytes("62 00000000 00 01 00 0000");
        assert_eq!(guest.device.bulk_out(out, &power_on, guest.now), TransferOutcome::Accepted);
        assert_eq!(guest.actions(), [format!("on {interface}")]);
    }
    assert_eq!(guest.device.bulk_out(15, &[0; 10], guest.now), TransferOutcome::Stall);
}

#[test]
fn a_card_that_fails() {
    for (failure, power_on, transmit) in [
        (CardFailure::Removed, "41FE", "41FE"),
        (CardFailure::Mute, "41FE", "40FE"),
        (CardFailure::Busy, "41F2", "40F2"),
        (CardFailure::Hardware, "41FB", "40FB"),
    ] {
        let mut guest = Guest::powered(MAX);
        guest.send("6F 04000000 00 01 00 0000 00000000");
        let (token, _) = guest.transmit();
        guest.fail(token, failure);
        assert_eq!(guest.read().unwrap(), format!("80000000000001{transmit}00"));

        guest.send("62 00000000 00 02 00 0000");
        while let Some(action) = guest.device.poll_action() {
            if let Action::PowerOn { token, .. } = action {
                guest.fail(token, failure);
            }
        }
        assert_eq!(guest.read().unwrap(), format!("80000000000002{power_on}00"));
    }
}

#[test]
fn an_outcome_that_does_not_fit_is_a_hardware_error() {
    let mut guest = Guest::powered(MAX);
    guest.send("6F 04000000 00 01 00 0000 00000000");
    let (token, _) = guest.transmit();
    guest.complete(token, Outcome::Powered(Atr::t0(b"").unwrap()));
    assert_eq!(guest.read().unwrap(), "8000000000000140FB00");
}

#[test]
fn removal_in_mid_apdu() {
    let mut guest = Guest::powered(MAX);
    guest.send("6F 04000000 00 01 00 0000 00000000");
    let (token, _) = guest.transmit();
    guest.remove(0);
    assert_eq!(guest.read().unwrap(), "8000000000000142FE00");
    assert_eq!(guest.notification().unwrap(), "5002");
    // The next card is in when the old one's answer comes.
    guest.insert(0);
    guest.respond(token, b"old");
    assert_eq!(guest.read(), None);
    assert_eq!(guest.notification().unwrap(), "5003");
    assert_eq!(guest.ask("65 00000000 00 02 00 0000"), "81000000000002010000");
    assert_eq!(guest.ask("6F 04000000 00 03 00 0000 00000000"), "8000000000000341FE00");
}

#[test]
fn a_swap_voids_what_the_old_card_was_to_do() {
    let mut guest = Guest::powered(MAX);
    guest.send("6F 04000000 00 01 00 0000 00000000");
    guest.insert(0);
    assert!(guest.actions().is_empty(), "the command was for the old card");
    assert_eq!(guest.read().unwrap(), "8000000000000142FE00");
    assert_eq!(guest.notification().unwrap(), "5003");
}

#[test]
fn a_reset_powers_off_and_forgets() {
    let mut guest = Guest::powered(MAX);
    guest.send("6F 04000000 00 01 00 0000 00000000");
    let (token, _) = guest.transmit();
    guest.send("65 00000000 00 02 00 0000");
    guest.device.reset(guest.now);
    assert_eq!(guest.actions(), ["off 0"]);
    assert_eq!(guest.device.configuration(), 0);
    assert!(!guest.device.in_ready(0x81) && guest.device.next_deadline().is_none());
    guest.configure();
    guest.respond(token, b"late");
    assert_eq!(guest.read(), None);
    assert_eq!(guest.notification().unwrap(), "5003");
    guest.power_on();
}

#[test]
fn a_guest_that_never_reads_is_refused_in_the_end() {
    let mut guest = Guest::powered(MAX);
    let status = bytes("65 00000000 00 01 00 0000");
    let taken = (0..1000)
        .take_while(|_| guest.device.bulk_out(OUT, &status, guest.now) == TransferOutcome::Accepted)
        .count();
    assert_eq!(taken, 64);
    // What it gave up on is gone with CLEAR_FEATURE of both pipes.
    guest.control("02 01 0000 8100 0000").unwrap();
    guest.control("02 01 0000 0100 0000").unwrap();
    assert_eq!(guest.ask("65 00000000 00 01 00 0000"), "81000000000001000000");
}
