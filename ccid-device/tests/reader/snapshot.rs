//! A device saved and restored.

use ccid_device::{Action, CardFailure, Device, DeviceConfig, Layout, Outcome, RestoreError, Speed};
use proptest::prelude::*;
use vscard_protocol::Atr;

use crate::guest::{Guest, atr, bytes, config, message};

fn restored(guest: &Guest) -> Guest {
    let saved = guest.device.save();
    let device = Device::restore(guest.config.clone(), saved.expose(), guest.now).unwrap();
    // Nothing is lost or added by being saved, actions aside.
    assert_eq!(device.configuration(), guest.device.configuration());
    Guest { device, config: guest.config.clone(), now: guest.now }
}

#[test]
fn the_guest_goes_on() {
    let mut guest = Guest::powered(271);
    guest.send("65 00000000 00 05 00 0000");
    let mut guest = restored(&guest);
    assert_eq!(guest.read().unwrap(), "81000000000005000000");
    assert_eq!(guest.notification(), None);
    assert_eq!(guest.ask("6F 04000000 00 06 00 0000 00B00000"), "8006000000000600000000B000009000");
    assert_eq!(guest.ask("6C 00000000 00 07 00 0000"), "820700000000070000011110004500FE00");
    assert_eq!(guest.notification(), None);
}

#[test]
fn a_card_with_an_imperfect_atr_goes_on_as_others_do() {
    let mut guest = Guest::new(Layout::Slots(1), 271);
    guest.insert(0);
    assert_eq!(guest.notification().unwrap(), "5003");
    guest.send("62 00000000 00 01 00 0000");
    let Some(Action::PowerOn { token, .. }) = guest.device.poll_action() else { panic!() };
    // Its TCK is wrong.
    let atr = bytes("3B82016F6B00");
    guest.complete(token, Outcome::Powered(Atr::from_card(&atr)));
    assert_eq!(guest.read().unwrap(), "800600000000010000003B82016F6B00");
    let mut guest = restored(&guest);
    let Some(Action::PowerOn { token, .. }) = guest.device.poll_action() else { panic!() };
    guest.complete(token, Outcome::Powered(Atr::from_card(&atr)));
    // T=1.
    assert_eq!(guest.ask("6C 00000000 00 02 00 0000"), "820700000000020000011110004D002000");
    assert_eq!(guest.ask("6F 04000000 00 03 00 0000 00B00000"), "8006000000000300000000B000009000");
}

#[test]
fn another_card_is_seen_as_another() {
    for outcome in [Outcome::Powered(Atr::t0(b"other").unwrap()), Outcome::Failed(CardFailure::Mute)] {
        let mut guest = restored(&Guest::powered(271));
        let Some(Action::PowerOn { token, .. }) = guest.device.poll_action() else { panic!() };
        guest.send("6F 04000000 00 06 00 0000 00B00000");
        let powered = matches!(outcome, Outcome::Powered(_));
        guest.complete(token, outcome);
        assert_eq!(guest.read().unwrap(), "8000000000000642FE00");
        assert_eq!(guest.notification().unwrap(), "5003");
        assert_eq!(guest.actions(), if powered { vec!["off 0"] } else { vec![] });
    }
    // As the embedder wants it.
    let mut guest = restored(&Guest::powered(271));
    guest.insert(0);
    assert!(guest.actions().is_empty());
    assert_eq!(guest.notification().unwrap(), "5003");
}

#[test]
fn a_card_that_is_no_longer_there() {
    let mut guest = restored(&Guest::powered(271));
    guest.remove(0);
    assert!(guest.actions().is_empty());
    assert_eq!(guest.notification().unwrap(), "5002");
}

#[test]
fn a_command_at_work_fails_and_a_power_on_begins_again() {
    let mut guest = Guest::powered(271);
    guest.send("6F 04000000 00 01 00 0000 00000000");
    let (token, _) = guest.transmit();
    let mut after = restored(&guest);
    assert_eq!(after.read().unwrap(), "8000000000000140FB00");
    after.respond(token, b"old");
    assert_eq!(after.read(), None);
    // The one that was saved goes on.
    guest.respond(token, b"");
    assert_eq!(guest.read().unwrap(), "800200000000010000009000");

    guest.send("62 00000000 00 02 00 0000");
    let mut guest = restored(&guest);
    let Some(Action::PowerOn { token, .. }) = guest.device.poll_action() else { panic!() };
    guest.complete(token, Outcome::Powered(atr()));
    assert_eq!(guest.read().unwrap(), "800B0000000002000000".to_owned() + crate::guest::ATR);
}

#[test]
fn in_the_middle_of_everything() {
    // Of a message, a chained command, a chained response, an abort.
    let mut guest = Guest::powered(271);
    let whole = message(0x6F, 0, 1, [0; 3], &bytes(&format!("00D6000080{}", "5A".repeat(128))));
    guest.device.bulk_out(0x01, &whole[..64], guest.now);
    let mut guest = restored(&guest);
    guest.work();
    guest.device.bulk_out(0x01, &whole[64..128], guest.now);
    guest.device.bulk_out(0x01, &whole[128..], guest.now);
    let (token, command) = guest.transmit();
    assert_eq!(command.as_bytes(), &whole[10..]);
    guest.respond(token, &[0x11; 400]);
    assert_eq!(guest.read_bytes().unwrap().len(), 271);
    let mut guest = restored(&guest);
    guest.work();
    guest.send("6F 00000000 00 02 00 1000");
    assert_eq!(guest.read_bytes().unwrap().len(), 10 + 141);
    guest.send("6F 02000000 00 03 00 0100 00B0");
    guest.read().unwrap();
    let mut guest = restored(&guest);
    guest.work();
    guest.send("6F 02000000 00 04 00 0200 0102");
    assert_eq!(guest.transmit().1.header(), [0x00, 0xB0, 1, 2]);
    guest.send("72 00000000 00 05 00 0000");
    let mut guest = restored(&guest);
    assert_eq!(guest.read().unwrap(), "8000000000000440FB00");
    guest.control("21 01 0005 0000 0000").unwrap();
    assert_eq!(guest.read().unwrap(), "81000000000005000000");
}

#[test]
fn what_cannot_be_restored() {
    let guest = Guest::powered(271);
    let saved = guest.device.save();
    let saved = saved.expose();
    let error = |config: DeviceConfig, saved: &[u8]| {
        Device::restore(config, saved, guest.now).map(|_| ()).unwrap_err()
    };
    let same = || config(Layout::Slots(1), 271);
    assert_eq!(error(same(), &[]), RestoreError::Foreign);
    assert_eq!(error(same(), b"QEMU and more"), RestoreError::Foreign);
    assert_eq!(error(same(), &[b"CCID", &[2][..]].concat()), RestoreError::Version(2));
    assert!(matches!(error(config(Layout::Slots(17), 271), saved), RestoreError::Config(_)));
    for (field, config) in [
        ("layout", config(Layout::Slots(2), 271)),
        ("layout", config(Layout::Interfaces(1), 271)),
        ("longest message", config(Layout::Slots(1), 272)),
        ("speed", DeviceConfig { speed: Speed::High, ..same() }),
        ("vendor", DeviceConfig { vendor_id: 1, ..same() }),
        ("product", DeviceConfig { product_id: 1, ..same() }),
    ] {
        assert_eq!(error(config, saved), RestoreError::OtherDevice(field));
    }
    for length in 5..saved.len() {
        assert!(matches!(error(same(), &saved[..length]), RestoreError::Damaged { .. }), "{length}");
    }
    let long = [saved, &[0]].concat();
    assert_eq!(
        error(same(), &long).to_string(),
        format!("the saved CCID device is damaged: bytes after the end at offset {}", saved.len())
    );
}

proptest! {
    #[test]
    fn damaged_bytes_are_an_error_or_a_device(at in 0usize..200, value in any::<u8>(), rest in any::<[u8; 16]>()) {
        let mut guest = Guest::powered(271);
        guest.send("6F 02000000 00 03 00 0100 00B0");
        let mut saved = guest.device.save().expose().to_vec();
        let at = at % saved.len();
        saved[at] = value;
        if let Ok(device) = Device::restore(config(Layout::Slots(1), 271), &saved, guest.now) {
            let mut guest = Guest { device, ..guest };
            guest.device.bulk_out(1, &rest, guest.now);
            guest.work();
            guest.device.bulk_in(0x81, 64);
            guest.device.save();
        }
    }
}
