//! ABORT: a control request and a message, in either order (USB CCID 1.1 §5.3.1, §6.1.13).

use ccid_device::Layout;

use crate::guest::{Guest, message};

const COMMAND: &str = "6F 04000000 00 01 00 0000 00000000";

fn control(guest: &mut Guest, seq: u8) {
    assert_eq!(guest.control(&format!("21 01 00{seq:02X} 0000 0000")).as_deref(), Some(""));
}

fn bulk(guest: &mut Guest, seq: u8) {
    guest.send_bytes(&message(0x72, 0, seq, [0; 3], &[]));
}

fn usable(guest: &mut Guest) {
    assert_eq!(guest.ask("6F 04000000 00 20 00 0000 00B00000"), "8006000000002000000000B000009000");
}

#[test]
fn in_both_orders() {
    for order in [[control, bulk], [bulk, control]] {
        let mut guest = Guest::powered(271);
        guest.send(COMMAND);
        let (token, _) = guest.transmit();
        order[0](&mut guest, 9);
        assert_eq!(guest.read(), None);
        // Everything fails until the other half is there.
        guest.send("65 00000000 00 05 00 0000");
        assert_eq!(guest.read().unwrap(), "8100000000000540FF00");
        guest.send("6F 04000000 00 06 00 0000 00000000");
        assert_eq!(guest.read().unwrap(), "8000000000000640FF00");
        order[1](&mut guest, 9);
        assert_eq!(guest.read().unwrap(), "81000000000009000000");
        assert_eq!(guest.read(), None);
        assert_eq!(guest.device.next_deadline(), None);
        // The card answers all the same; nobody hears it.
        guest.respond(token, b"late");
        assert_eq!(guest.read(), None);
        usable(&mut guest);
    }
}

#[test]
fn with_nothing_at_work() {
    for order in [[control, bulk], [bulk, control]] {
        let mut guest = Guest::new(Layout::Slots(1), 271);
        order[0](&mut guest, 0xFF);
        order[1](&mut guest, 0xFF);
        assert_eq!(guest.read().unwrap(), "810000000000FF020000");
    }
}

#[test]
fn halves_that_do_not_match() {
    let mut guest = Guest::powered(271);
    control(&mut guest, 1);
    bulk(&mut guest, 2);
    assert_eq!(guest.read().unwrap(), "8100000000000240FF00");
    // The newest request counts.
    control(&mut guest, 3);
    bulk(&mut guest, 1);
    assert_eq!(guest.read().unwrap(), "8100000000000140FF00");
    bulk(&mut guest, 3);
    assert_eq!(guest.read().unwrap(), "81000000000003000000");
    // The message first: each is answered.
    bulk(&mut guest, 4);
    bulk(&mut guest, 5);
    assert_eq!(guest.read().unwrap(), "8100000000000440FF00");
    control(&mut guest, 6);
    assert_eq!(guest.read().unwrap(), "8100000000000540FF00");
    bulk(&mut guest, 6);
    assert_eq!(guest.read().unwrap(), "81000000000006000000");
    usable(&mut guest);
}

#[test]
fn a_stale_answer_is_not_left() {
    let mut guest = Guest::powered(271);
    guest.send(COMMAND);
    let (token, _) = guest.transmit();
    control(&mut guest, 9);
    guest.wait(1000);
    guest.respond(token, b"crossed the abort");
    bulk(&mut guest, 9);
    assert_eq!(guest.read().unwrap(), "81000000000009000000");
    usable(&mut guest);
}

#[test]
fn of_a_power_on_leaves_the_card_off() {
    let mut guest = Guest::powered(271);
    guest.send("62 00000000 00 01 00 0000");
    assert_eq!(guest.actions(), ["off 0", "on 0"]);
    control(&mut guest, 2);
    bulk(&mut guest, 2);
    assert_eq!(guest.actions(), ["off 0"]);
    assert_eq!(guest.read().unwrap(), "81000000000002010000");
    guest.power_on();
}

#[test]
fn of_a_command_that_was_not_polled() {
    let mut guest = Guest::powered(271);
    guest.send(COMMAND);
    control(&mut guest, 2);
    bulk(&mut guest, 2);
    assert!(guest.actions().is_empty());
}

#[test]
fn of_a_command_in_parts() {
    let mut guest = Guest::powered(271);
    guest.send("6F 04000000 00 01 00 0100 00000000");
    assert_eq!(guest.read().unwrap(), "80000000000001000010");
    control(&mut guest, 2);
    bulk(&mut guest, 2);
    assert_eq!(guest.read().unwrap(), "81000000000002000000");
    assert_eq!(guest.ask("6F 00000000 00 03 00 0200"), "80000000000003400800");
    usable(&mut guest);
}

#[test]
fn leaves_other_slots_alone() {
    let mut guest = Guest::new(Layout::Slots(2), 271);
    guest.insert(0);
    guest.insert(1);
    guest.send("62 00000000 01 00 00 0000");
    guest.work();
    guest.read().unwrap();
    control(&mut guest, 1);
    assert_eq!(guest.ask("6F 04000000 01 20 00 0000 00B00000"), "8006000000012000000000B000009000");
    // No such slot, no such interface.
    assert_eq!(guest.control("21 01 0201 0000 0000"), None);
    assert_eq!(guest.control("21 01 0001 0100 0000"), None);
}
