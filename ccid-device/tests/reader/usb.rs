//! Descriptors, standard requests, notifications (USB 2.0 §9, USB CCID 1.1 §5).

use ccid_device::{
    Device, DeviceConfig, Endpoint, EndpointKind, InOutcome, Layout, SlotId, Speed, TransferOutcome,
};

use crate::guest::{Guest, IN, INTERRUPT, OUT, bytes};

fn unconfigured(config: DeviceConfig) -> Guest {
    Guest { device: Device::new(config.clone()).unwrap(), config, now: std::time::Instant::now() }
}

#[test]
fn device_and_strings() {
    let mut guest = unconfigured(DeviceConfig::new("vm-1"));
    assert_eq!(
        guest.control("80 06 0001 0000 1200").unwrap(),
        "1201 0002 000000 40 E608 3344 0001 01 02 03 01".replace(' ', "")
    );
    // As a host asks first.
    assert_eq!(guest.control("80 06 0001 0000 0800").unwrap(), "1201000200000040");
    assert_eq!(guest.control("80 06 0003 0000 FF00").unwrap(), "04030904");
    assert_eq!(guest.control("80 06 0303 0904 FF00").unwrap(), "0A0376006D002D003100");
    assert_eq!(guest.control("80 06 0403 0904 FF00"), None);
    assert_eq!(guest.control("80 06 0006 0000 0A00").unwrap(), "0A060002000000400100");
    let other = guest.control("80 06 0007 0000 FFFF").unwrap();
    assert!(other.starts_with("09075D000101008032"), "{other}");

    let full = DeviceConfig { speed: Speed::Full, ..DeviceConfig::new("") };
    let mut guest = unconfigured(full);
    assert_eq!(
        guest.control("80 06 0001 0000 FF00").unwrap(),
        "1201 1001 000000 40 E608 3344 0001 01 02 00 01".replace(' ', "")
    );
    assert_eq!(guest.control("80 06 0303 0904 FF00"), None);
    assert_eq!(guest.control("80 06 0006 0000 0A00"), None);
    assert_eq!(guest.control("80 06 0007 0000 0A00"), None);
}

#[test]
fn configuration_of_one_interface() {
    let mut guest = unconfigured(DeviceConfig { layout: Layout::Slots(4), ..DeviceConfig::new("1") });
    let expected = "
        09 02 5D00 01 01 00 80 32
        09 04 00 00 03 0B 00 00 02
        36 21 1001 03 07 03000000 A00F0000 A00F0000 01 002A0000 2C800A00 00
            FE000000 00000000 00000000 BA000400 12000100 FF FF 0000 00 04
        07 05 01 02 0002 00
        07 05 81 02 0002 00
        07 05 82 03 0800 08";
    assert_eq!(bytes(&guest.control("80 06 0002 0000 FFFF").unwrap()), bytes(expected));
    assert_eq!(guest.control("80 06 0002 0000 0900").unwrap(), "09025D000101008032");
}

#[test]
fn configuration_of_seven_interfaces() {
    let config = DeviceConfig { layout: Layout::Interfaces(7), speed: Speed::Full, ..DeviceConfig::new("1") };
    let mut guest = unconfigured(config);
    let configuration = bytes(&guest.control("80 06 0002 0000 FFFF").unwrap());
    assert_eq!(configuration.len(), 9 + 7 * (9 + 54 + 3 * 7));
    assert_eq!(usize::from(u16::from_le_bytes([configuration[2], configuration[3]])), configuration.len());
    // As a host walks through it.
    let mut rest = &configuration[..];
    let mut endpoints = Vec::new();
    let mut previous = 0;
    while let [length, kind, ..] = *rest {
        if kind == 0x21 {
            assert_eq!((previous, length, rest[4]), (4, 54, 0), "bMaxSlotIndex after the interface");
        }
        if kind == 5 {
            endpoints.push(rest[2]);
        }
        previous = kind;
        rest = &rest[usize::from(length)..];
    }
    endpoints.sort_unstable();
    endpoints.dedup();
    assert_eq!(endpoints.len(), 21);
    let topology = guest.device.topology();
    let described: Vec<_> = topology.interfaces.iter().flat_map(|interface| interface.endpoints).collect();
    assert!(described.iter().all(|endpoint| endpoints.contains(&endpoint.address)));
    let last = Endpoint { address: 0x8E, kind: EndpointKind::Interrupt, interval: 16, max_packet: 8 };
    assert_eq!((described.len(), described[20]), (21, last));
}

#[test]
fn before_configuration_there_is_only_endpoint_zero() {
    let mut guest = unconfigured(DeviceConfig::new("1"));
    guest.insert(0);
    assert_eq!(guest.control("80 08 0000 0000 0100").unwrap(), "00");
    assert_eq!(guest.device.bulk_out(OUT, &[0x65; 10], guest.now), TransferOutcome::Stall);
    assert!(matches!(guest.device.bulk_in(IN, 64), InOutcome::Stall));
    assert!(matches!(guest.device.interrupt_in(INTERRUPT), InOutcome::Stall));
    assert!(!guest.device.in_ready(IN) && !guest.device.in_ready(INTERRUPT));
    assert_eq!(guest.control("81 00 0000 0000 0200"), None);
    assert_eq!(guest.control("A1 03 0000 0000 1800"), None);
    guest.configure();
    assert_eq!(guest.control("80 08 0000 0000 0100").unwrap(), "01");
    assert_eq!(guest.notification().unwrap(), "5003");
}

#[test]
fn requests() {
    let mut guest = Guest::new(Layout::Slots(1), 271);
    for (name, setup, answer) in [
        ("status of the device", "80 00 0000 0000 0200", Some("0000")),
        ("status of the interface", "81 00 0000 0000 0200", Some("0000")),
        ("status of an interface that is not", "81 00 0000 0100 0200", None),
        ("status of endpoint 0", "82 00 0000 8000 0200", Some("0000")),
        ("status of bulk-IN", "82 00 0000 8100 0200", Some("0000")),
        ("status of an endpoint that is not", "82 00 0000 8300 0200", None),
        ("remote wakeup", "00 03 0100 0000 0000", None),
        ("address", "00 05 0700 0000 0000", Some("")),
        ("configuration 2", "00 09 0200 0000 0000", None),
        ("configuration 257", "00 09 0101 0000 0000", None),
        ("interface", "81 0A 0000 0000 0100", Some("00")),
        ("setting 0", "01 0B 0000 0000 0000", Some("")),
        ("setting 1", "01 0B 0100 0000 0000", None),
        ("clock frequencies", "A1 02 0000 0000 0400", Some("A00F0000")),
        ("data rates", "A1 03 0000 0000 0800", Some("002A000001540000")),
        ("a class request that is not", "A1 04 0000 0000 0800", None),
        ("a vendor's request", "C0 01 0000 0000 0800", None),
        ("synch frame", "82 0C 0000 8100 0200", None),
    ] {
        assert_eq!(guest.control(setup).as_deref(), answer, "{name}");
    }
    assert_eq!(guest.control("A1 03 0000 0000 FFFF").unwrap().len(), 2 * 4 * 7);
}

#[test]
fn halted_endpoints() {
    let mut guest = Guest::powered(271);
    for (endpoint, index) in [(IN, "8100"), (INTERRUPT, "8200")] {
        guest.control(&format!("02 03 0000 {index} 0000")).unwrap();
        assert_eq!(guest.control(&format!("82 00 0000 {index} 0200")).unwrap(), "0100");
        assert!(guest.device.in_ready(endpoint), "a halted endpoint ends transfers");
        let outcome = match endpoint {
            IN => guest.device.bulk_in(endpoint, 64),
            _ => guest.device.interrupt_in(endpoint),
        };
        assert!(matches!(outcome, InOutcome::Stall));
        guest.control(&format!("02 01 0000 {index} 0000")).unwrap();
    }
    // Answers that the host gave up on are dropped when it clears the halt.
    guest.send("65 00000000 00 01 00 0000");
    guest.control("02 01 0000 8100 0000").unwrap();
    assert_eq!(guest.read(), None);
    // A wrong direction is no endpoint.
    assert!(matches!(guest.device.bulk_in(OUT, 64), InOutcome::Stall));
    assert_eq!(guest.device.bulk_out(IN, &[0; 10], guest.now), TransferOutcome::Stall);
}

#[test]
fn configuring_again_powers_off() {
    for again in ["00 09 0100 0000 0000", "00 09 0000 0000 0000", "01 0B 0000 0000 0000"] {
        let mut guest = Guest::powered(271);
        guest.send("65 00000000 00 01 00 0000");
        guest.control(again).unwrap();
        assert_eq!(guest.actions(), ["off 0"], "{again}");
        guest.configure();
        assert_eq!(guest.read(), None);
        assert_eq!(guest.ask("65 00000000 00 01 00 0000"), "81000000000001010000");
    }
}

#[test]
fn notifications() {
    // As measured with a real host: four slots, slot 1 empty, then slot 0 removed.
    let mut guest = Guest::new(Layout::Slots(4), 271);
    for slot in [0, 2, 3] {
        guest.insert(slot);
    }
    assert!(guest.device.in_ready(INTERRUPT));
    assert_eq!(guest.notification().unwrap(), "50F3");
    assert!(!guest.device.in_ready(INTERRUPT));
    assert_eq!(guest.notification(), None);
    guest.remove(0);
    assert_eq!(guest.notification().unwrap(), "5052");
    // Not delivered: told again, with what happened since.
    guest.device.interrupt_in_return(INTERRUPT);
    guest.insert(1);
    assert_eq!(guest.notification().unwrap(), "505E");
    guest.device.interrupt_in_return(OUT);
    assert_eq!(guest.notification(), None);
    // Removal of nothing, slots that are not.
    guest.remove(0);
    guest.insert(4);
    guest.remove(255);
    assert_eq!(guest.notification(), None);

    let mut guest = Guest::new(Layout::Slots(16), 271);
    guest.insert(15);
    assert_eq!(guest.notification().unwrap(), "50000000C0");
}

#[test]
fn slots_are_counted_over_all_interfaces() {
    for layout in [Layout::Slots(7), Layout::Interfaces(7)] {
        let guest = Guest::new(layout, 271);
        assert_eq!(guest.device.slots().collect::<Vec<_>>(), (0..7).map(SlotId).collect::<Vec<_>>());
    }
}

#[test]
fn what_crossed_a_cancel_comes_again() {
    let mut guest = Guest::powered(271);
    guest.send("65 00000000 00 01 00 0000");
    guest.send("65 00000000 00 02 00 0000");
    let first = guest.read_bytes().unwrap();
    guest.device.bulk_in_return(IN, first);
    assert_eq!(guest.read().unwrap(), "81000000000001000000");
    let second = guest.read_bytes().unwrap();
    guest.device.reset(guest.now);
    guest.configure();
    guest.device.bulk_in_return(IN, second);
    assert_eq!(guest.read(), None, "an answer from before the reset");
}

#[test]
fn debug_shows_no_apdu() {
    let mut guest = Guest::powered(271);
    guest.send("6F 0D000000 00 01 00 0000 00200000 08 3132333435363738");
    let shown = format!("{:?}", guest.device);
    assert!(shown.contains("Lc 8"), "{shown}");
    assert!(!shown.contains("49, 50") && !shown.contains("31, 32") && !shown.contains("1234"), "{shown}");
}
