//! The PIV application: what does not fit a scenario.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use emulated_card::card::{CardBuildError, EmulatedCard, Profile, Step};
use emulated_card::keys::{Curve, KeyError, KeyKind, UnlockError};
use emulated_card::pin::ReferenceData;
use emulated_card::shell::CardSlot;
use emulated_card::slot::{PivSlot, SlotError, assign};
use vscard_protocol::{CardSource, Command, Secret, StatusWord, T0};

use common::{
    PIN, SELECT_PIV, Store, VERIFY_PIV, certificate, certificates, keys, noise, piv_card, pki_aid, select,
    send, try_card,
};

fn new_card(profile: Profile, text: &str) -> EmulatedCard {
    piv_card(profile, text, ReferenceData::in_memory(3))
}

/// Reads an object as OpenSC 0.23 does: eight bytes for its length, then all of it.
fn read(card: &mut EmulatedCard, tag: &[u8]) -> Vec<u8> {
    let body = [&[0x5C, tag.len() as u8], tag].concat();
    let get = |le: u8| [&[0x00, 0xCB, 0x3F, 0xFF, body.len() as u8], &body[..], &[le]].concat();
    let start = send(card, &get(8));
    assert_eq!((start.data().len(), start.status().sw1()), (8, 0x61));
    let mut response = send(card, &get(0));
    let mut object = response.data().to_vec();
    while response.status().sw1() == 0x61 {
        response = send(card, &[0x00, 0xC0, 0x00, 0x00, response.status().sw2()]);
        object.extend_from_slice(response.data());
    }
    assert_eq!(response.status(), StatusWord::SUCCESS);
    assert!(object.starts_with(start.data()));
    object
}

#[test]
fn certificates_are_read_as_opensc_does() {
    let names = ["9a", "9c", "9d", "9e", "82", "95"];
    let tags = [0x05, 0x0A, 0x0B, 0x01, 0x0D, 0x20];
    let text: Vec<_> = names.iter().map(|name| format!("{name}:p256")).collect();
    let mut card = new_card(Profile::Piv, &text.join(","));
    for (index, tag) in tags.into_iter().enumerate() {
        let der = certificate(index, KeyKind::Ec(Curve::P256)).der;
        let expected = [&[0x53, 0x82, 0x02, 0x61, 0x70, 0x82, 0x02, 0x58], &der[..], &[0x71, 1, 0, 0xFE, 0]];
        assert_eq!(read(&mut card, &[0x5F, 0xC1, tag]), expected.concat());
    }
    // The last retired key is the twentieth.
    assert_eq!(read(&mut card, &[0x5F, 0xC1, 0x0C])[..5], [0x53, 10, 0xC1, 1, 20]);
}

/// The sequence of facts about OpenSC 0.23 that `pkcs11-tool --login --sign` sends: recognition, reading, login,
/// signature with short APDUs.
#[test]
fn a_signature_as_opensc_makes_it() {
    let mut card = new_card(Profile::Dual, "9a:2048,9c:2048");
    let mut expect = |command: &[u8], data: &[u8], status: u16| {
        let response = send(&mut card, command);
        assert_eq!((response.data(), response.status().0), (data, status), "{command:02X?}");
    };
    // Drivers that are asked before PIV.
    expect(b"\x00\xA4\x04\x00\x07\x62\x76\x01\xFF\x00\x00\x00\x00", b"", 0x6A82);
    expect(b"\x00\xA4\x04\x00\x06\xA0\x00\x00\x00\x01\x01\x00", b"", 0x6A82);
    expect(b"\x00\xA4\x04\x00\x0B\xE8\x2B\x06\x01\x04\x01\x81\xC3\x1F\x02\x01\x00", b"", 0x6A82);
    expect(b"\x00\xA4\x04\x0C\x0F\xD2\x33\x00\x00\x00\x45\x73\x74\x45\x49\x44\x20\x76\x33\x35", b"", 0x6A82);
    expect(b"\x00\xCA\xDF\x30\x05", b"", 0x6D00);
    let discovery = b"\x7E\x12\x4F\x0B\xA0\x00\x00\x03\x08\x00\x00\x10\x00\x01\x00\x5F\x2F\x02\x40\x00";
    expect(b"\x00\xCB\x3F\xFF\x03\x5C\x01\x7E\x08", &discovery[..8], 0x610C);
    expect(b"\x00\xCB\x3F\xFF\x03\x5C\x01\x7E\x14", discovery, 0x9000);
    expect(b"\x00\xCB\x3F\xFF\x05\x5C\x03\x5F\xC1\x0C\x08", b"\x53\x0A\xC1\x01\x00\xC2\x01\x00", 0x6104);
    expect(b"\x00\x20\x00\x80", b"", 0x63C3);
    expect(b"\x00\xCB\x3F\xFF\x05\x5C\x03\x5F\xC1\x09\x08", b"", 0x6982);
    expect(b"\x00\xCB\x3F\xFF\x03\x5C\x01\x7E\x00", discovery, 0x9000);
    expect(b"\x00\x20\x00\x80\x08123456\xFF\xFF", b"", 0x9000);
    expect(b"\x00\xCB\x3F\xFF\x03\x5C\x01\x7E\x00", discovery, 0x9000);
    // PKCS#1 padding is the host's; the store reverses the block.
    let block = [&[0x00, 0x01][..], &[0xFF; 202], &[0x00], &noise(51, 5)].concat();
    let result: Vec<u8> = block.iter().rev().copied().collect();
    let request = [b"\x7C\x82\x01\x06\x82\x00\x81\x82\x01\x00", &block[..]].concat();
    let answer = [b"\x7C\x82\x01\x04\x82\x82\x01\x00", &result[..]].concat();
    expect(&[b"\x10\x87\x07\x9A\xFF", &request[..255]].concat(), b"", 0x9000);
    expect(&[b"\x00\x87\x07\x9A\x0B", &request[255..], b"\x00"].concat(), &answer[..256], 0x6108);
    expect(b"\x00\xC0\x00\x00\x08", &answer[256..], 0x9000);
    // Random numbers, in a loop.
    expect(
        b"\x00\x87\x00\x9B\x04\x7C\x02\x81\x00\x00",
        b"\x7C\x0A\x81\x08\x01\x02\x03\x04\x05\x06\x07\x08",
        0x9000,
    );
    expect(
        b"\x00\x87\x00\x9B\x04\x7C\x02\x81\x00\x00",
        b"\x7C\x0A\x81\x08\x09\x0A\x0B\x0C\r\x0E\x0F\x10",
        0x9000,
    );
    expect(b"\x00\x20\xFF\x80", b"", 0x9000);
    expect(b"\x00\x20\x00\x80", b"", 0x63C3);
}

/// A reader that speaks T=0 sends no Le with data, and fetches all answers.
#[tokio::test]
async fn over_t0_every_answer_waits_for_get_response() {
    let slot = CardSlot::new(new_card(Profile::Dual, "9a:1024,9d:2048")).unwrap();
    let insertion = slot.insert();
    let source = T0::new(slot);
    let mut card = source.power_on(insertion).await.unwrap();
    let template = b"\x61\x1C\x4F\x06\x00\x00\x10\x00\x01\x00\x79\x07\x4F\x05\xA0\x00\x00\x03\x08\
                     \xAC\x09\x80\x01\x06\x80\x01\x07\x06\x01\x00";
    let sign = [b"\x00\x87\x06\x9A\x88\x7C\x81\x85\x82\x00\x81\x81\x80", &[0x55; 128][..]].concat();
    let signature = [b"\x7C\x81\x83\x82\x81\x80", &[0x55; 128][..]].concat();
    for (command, data, status) in [
        (&b"\x00\xA4\x04\x00\x05\xA0\x00\x00\x03\x08"[..], &b""[..], 0x611E),
        (b"\x00\xC0\x00\x00\x1E", template, 0x9000),
        (VERIFY_PIV, b"", 0x9000),
        (&sign, b"", 0x6186),
        (b"\x00\xC0\x00\x00\x86", &signature, 0x9000),
        (b"\x00\x87\x00\x9B\x04\x7C\x02\x81\x00", b"", 0x610C),
        (b"\x00\xA4\x04\x00\x07\xA0\x00\x00\x00\x79\x01\x00", b"", 0x610D),
    ] {
        let response = card.transmit(&Command::parse(command).unwrap()).await.unwrap();
        assert_eq!((response.data(), response.status().0), (data, status), "{command:02X?}");
    }
}

#[test]
fn each_profile_has_an_atr_of_its_own() {
    let atr = |profile| new_card(profile, "9a:2048").atr().clone();
    let (piv, cac, dual) = (atr(Profile::Piv), atr(Profile::Cac), atr(Profile::Dual));
    assert_eq!(piv.historical(), b"\x80\xFB\xA0\x00\x00\x03\x08\x00\x00\x10\x00\x01\x00");
    assert_eq!(dual.historical(), b"\x80\x71\x80\xFB\xA0\x00\x00\x03\x08\x00\x00\x10\x00\x01\x00");
    assert_eq!(cac.historical(), b"\x80\x73\x80\x01\x40\x58EMULATED");
    for atr in [piv, cac, dual] {
        assert_eq!(atr.protocols().collect::<Vec<_>>(), [1]);
    }
}

#[test]
fn no_two_cards_have_the_same_identifiers() {
    let identifiers = |text| {
        let mut card = new_card(Profile::Piv, text);
        let chuid = read(&mut card, &[0x5F, 0xC1, 0x02]);
        let capabilities = read(&mut card, &[0x5F, 0xC1, 0x07]);
        // Windows replaces the last three bytes of the GUID.
        (chuid[31..31 + 13].to_vec(), capabilities[11..25].to_vec())
    };
    assert_eq!(identifiers("9a:1024"), identifiers("9a:1024"));
    assert_ne!(identifiers("9a:1024").0, identifiers("9a:1024,9c:1024").0);
    assert_ne!(identifiers("9a:1024").1, identifiers("9a:1024,9c:1024").1);
}

#[test]
fn cards_that_cannot_be() {
    let build = |profile, slots, certificates| {
        try_card(Store::of(certificates), ReferenceData::in_memory(3), profile, slots).map(|_| ())
    };
    let (authentication, signature) = (PivSlot::AUTHENTICATION, PivSlot::SIGNATURE);
    for profile in [Profile::Piv, Profile::Dual] {
        assert_eq!(build(profile, vec![], certificates(1, 2048)), Err(CardBuildError::NoCertificates));
        let (slots, odd) = keys("9a:1536");
        let (name, kind) = ("certificate 0".to_owned(), KeyKind::Rsa { bits: 1536 });
        assert_eq!(build(profile, slots, odd), Err(CardBuildError::NoPivAlgorithm { name, kind }));
        let mut long = certificates(1, 2048);
        long[0].der = noise(65_536, 9);
        let error = CardBuildError::Certificate { name: "certificate 0".into() };
        assert_eq!(build(profile, vec![(authentication, 0)], long), Err(error));
        let twice = vec![(authentication, 0), (authentication, 1)];
        let error = CardBuildError::Slot(SlotError::Taken(authentication));
        assert_eq!(build(profile, twice, certificates(2, 2048)), Err(error));
        let error = CardBuildError::Index { slot: signature, index: 2, count: 2 };
        assert_eq!(build(profile, vec![(signature, 2)], certificates(2, 2048)), Err(error));
    }
    // A CAC has ten containers; a dual card has all its keys on the PIV side.
    let many = certificates(24, 2048);
    let slots = assign(&many, &[]).unwrap_err();
    assert_eq!(slots, SlotError::Full(24));
    let many = certificates(23, 2048);
    assert_eq!(build(Profile::Dual, assign(&many, &[]).unwrap(), many), Ok(()));
}

#[test]
fn certificates_that_do_not_say_go_where_there_is_room() {
    let slots = |count, explicit: &[(&str, &str)]| {
        let explicit = explicit.iter().map(|(slot, name)| (slot.parse().unwrap(), (*name).to_owned()));
        let assigned = assign(&certificates(count, 2048), &explicit.collect::<Vec<_>>());
        assigned.map(|slots| {
            let slots: Vec<_> = slots.into_iter().map(|(slot, index)| format!("{slot}={index}")).collect();
            slots.join(" ")
        })
    };
    assert_eq!(slots(0, &[]), Ok(String::new()));
    assert_eq!(slots(2, &[]), Ok("9a=0 9c=1".into()));
    assert_eq!(slots(6, &[]), Ok("9a=0 9c=1 9d=2 82=3 83=4 84=5".into()));
    assert_eq!(
        slots(4, &[("9a", "certificate 2"), ("82", "certificate 0")]),
        Ok("9a=2 9c=1 9d=3 82=0".into())
    );
    assert_eq!(slots(1, &[("9a", "certificate 0"), ("9e", "certificate 0")]), Ok("9a=0 9e=0".into()));
    let twice = [("9a", "certificate 0"), ("9a", "certificate 1")];
    assert_eq!(slots(2, &twice), Err(SlotError::Taken(PivSlot::AUTHENTICATION)));
    let error = SlotError::NoSuchCertificate { slot: PivSlot::SIGNATURE, name: "other".into() };
    assert_eq!(slots(2, &[("9c", "other")]), Err(error));
}

/// Counts what is logged.
struct Log(Arc<AtomicUsize>);

impl tracing::Subscriber for Log {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() <= tracing::Level::WARN
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

    fn event(&self, _: &tracing::Event<'_>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {}
}

#[test]
fn a_guest_does_not_fill_the_log_with_what_fails() {
    let logged = Arc::new(AtomicUsize::new(0));
    tracing::subscriber::with_default(Log(Arc::clone(&logged)), || {
        let (slots, certificates) = keys("9a:1024,9e:p256");
        let mut store = Store::of(certificates);
        store.key_error = Some(KeyError::Failed("broken".into()));
        let any = ReferenceData::any(Secret::from(PIN));
        let mut card = try_card(store, any, Profile::Piv, slots.clone()).unwrap();
        let sign = [b"\x00\x87\x11\x9E\x26\x7C\x24\x82\x00\x81\x20", &[0x55; 32][..], b"\x00"].concat();
        for _ in 0..100 {
            assert_eq!(send(&mut card, &sign).status(), StatusWord::NO_DIAGNOSIS);
            card.reset();
        }
        assert_eq!(logged.swap(0, Ordering::Relaxed), 64);
        // Another card has lines of its own.
        let mut store = Store::of(keys("9a:1024,9e:p256").1);
        store.unlock_error = Some(UnlockError::NotChecked("broken".into()));
        let mut card = try_card(store, ReferenceData::in_memory(3), Profile::Piv, slots).unwrap();
        for _ in 0..100 {
            assert_eq!(send(&mut card, VERIFY_PIV).status(), StatusWord::NO_DIAGNOSIS);
        }
        assert_eq!(logged.load(Ordering::Relaxed), 64);
    });
}

const SIGN: &[u8] = &[0x00, 0x87, 0x11, 0x9A, 0x26, 0x7C, 0x24, 0x82, 0x00, 0x81, 0x20];

fn sign(card: &mut EmulatedCard) -> vscard_protocol::Response {
    send(card, &[SIGN, &[0xAA; 32], &[0]].concat())
}

#[test]
fn an_answer_is_valid_as_long_as_the_pin_is() {
    type End = fn(EmulatedCard) -> Option<EmulatedCard>;
    let command = |card: &mut EmulatedCard, bytes: &[u8], status: u16| {
        assert_eq!(send(card, bytes).status().0, status);
    };
    let ends: [End; 6] = [
        |mut card| {
            card.logout();
            Some(card)
        },
        |mut card| {
            card.reset();
            Some(card)
        },
        |mut card| {
            send(&mut card, b"\x00\x20\x00\x80\x08654321\xFF\xFF");
            Some(card)
        },
        |mut card| {
            send(&mut card, b"\x00\x20\xFF\x80");
            Some(card)
        },
        // To the CAC, which ends PIV's.
        |mut card| {
            send(&mut card, &select(&pki_aid(0)));
            Some(card)
        },
        |_| None,
    ];
    for (index, end) in ends.into_iter().enumerate() {
        let mut card = new_card(Profile::Dual, "9a:p256,9d:2048");
        command(&mut card, VERIFY_PIV, 0x9000);
        let signature = sign(&mut card);
        assert_eq!((signature.status().0, signature.data()[0]), (0x9000, 0x7C));
        // What leaves the PIN alone.
        command(&mut card, SELECT_PIV, 0x9000);
        command(&mut card, b"\x00\x20\x00\x80", 0x9000);
        command(&mut card, b"\x00\xCB\x3F\xFF\x03\x5C\x01\x7E\x00", 0x9000);
        command(&mut card, b"\x00\x20\x00\x80\x03123", 0x6A80);
        assert_eq!(sign(&mut card).status().0, 0x9000);
        assert!(!signature.validity().has_ended());
        let card = end(card);
        assert!(signature.validity().has_ended(), "end {index}");
        if let Some(mut card) = card {
            assert_ne!(send(&mut card, b"\x00\x20\x00\x80").status().0, 0x9000, "end {index}");
            // What nobody needs a PIN for.
            let open = send(&mut card, SELECT_PIV);
            assert!(!open.validity().is_limited());
        }
    }
}

#[test]
fn what_a_key_gives_after_the_pin_was_forgotten_is_for_nobody() {
    let mut card = new_card(Profile::Piv, "9a:p256");
    assert_eq!(send(&mut card, VERIFY_PIV).status().0, 0x9000);
    let sign = Command::parse(&[SIGN, &[0xAA; 32], &[0]].concat()).unwrap();
    let Step::Work(job) = card.command(&sign) else { panic!("a signature is work") };
    card.logout();
    let response = card.finish(job.run());
    assert_eq!((response.data(), response.status().0), (&[][..], 0x6982));
}
