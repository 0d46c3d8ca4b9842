//! Time extensions and deadlines (USB CCID 1.1 §6.2.6).

use std::time::Duration;

use ccid_device::Layout;

use crate::guest::Guest;

#[test]
fn a_card_that_takes_ten_seconds() {
    let mut guest = Guest::powered(65_554);
    guest.send("6F 04000000 00 07 00 0000 00000000");
    let (token, _) = guest.transmit();
    guest.wait(999);
    assert_eq!(guest.read(), None);
    guest.wait(1);
    assert_eq!(guest.read().unwrap(), "80000000000007800100");
    for _ in 0..9 {
        guest.wait(1000);
        assert_eq!(guest.read().unwrap(), "80000000000007800100");
        assert_eq!(guest.read(), None);
    }
    guest.respond(token, b"done");
    assert_eq!(guest.read().unwrap(), "80060000000007000000646F6E659000");
    assert_eq!(guest.device.next_deadline(), None);
}

#[test]
fn a_guest_that_does_not_read_is_asked_once() {
    let mut guest = Guest::powered(65_554);
    guest.send("6F 04000000 00 07 00 0000 00000000");
    let (token, _) = guest.transmit();
    guest.wait(3_600_000);
    assert_eq!(guest.read().unwrap(), "80000000000007800100");
    assert_eq!(guest.read(), None);
    guest.wait(1000);
    // The answer makes an extension that was not read unneeded.
    guest.respond(token, b"");
    assert_eq!(guest.read().unwrap(), "800200000000070000009000");
    assert_eq!(guest.read(), None);
}

#[test]
fn each_slot_has_its_own_time() {
    let mut guest = Guest::new(Layout::Slots(2), 65_554);
    for slot in 0..2 {
        guest.insert(slot);
        guest.send(&format!("62 00000000 {slot:02X} 00 00 0000"));
        guest.work();
        guest.read().unwrap();
    }
    for slot in 0..2 {
        guest.send(&format!("6F 04000000 {slot:02X} 07 00 0000 00000000"));
        guest.wait(300);
    }
    assert_eq!(guest.device.next_deadline(), Some(guest.now + Duration::from_millis(400)));
    guest.wait(400);
    assert_eq!(guest.read().unwrap(), "80000000000007800100");
    assert_eq!(guest.read(), None);
    guest.wait(300);
    assert_eq!(guest.read().unwrap(), "80000000000107800100");
}

#[test]
fn a_power_on_gets_no_extension_and_fails_in_the_end() {
    let mut guest = Guest::new(Layout::Slots(1), 65_554);
    guest.insert(0);
    guest.send("62 00000000 00 07 00 0000");
    assert_eq!(guest.actions(), ["on 0"]);
    guest.wait(29_999);
    assert_eq!(guest.read(), None);
    guest.wait(1);
    assert_eq!(guest.read().unwrap(), "8000000000000741FE00");
    assert_eq!(guest.actions(), ["off 0"]);
    guest.power_on();
}
