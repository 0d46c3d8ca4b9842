//! The CAC: what does not fit a scenario.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod common;

use std::io::Read;

use emulated_card::card::{CardBuildError, EmulatedCard, Profile, Step};
use emulated_card::pin::ReferenceData;
use emulated_card::slot::assign;
use vscard_protocol::{Command, StatusWord};

use common::{
    Store, VERIFY, card, card_with, certificates, noise, piv_card, pki_aid, select, send, try_card,
};

/// Reads a whole buffer, `chunk` bytes at a time, as middleware does: the length, then the content.
fn read_buffer(card: &mut EmulatedCard, which: u8, chunk: u8) -> Vec<u8> {
    let mut read = |offset: usize, count: u8| {
        let [high, low] = (offset as u16).to_be_bytes();
        let response = send(card, &[0x80, 0x52, high, low, 2, which, count, count]);
        assert_eq!(response.status(), StatusWord::SUCCESS);
        response.data().to_vec()
    };
    let length = read(0, 2);
    let length = usize::from(u16::from_le_bytes([length[0], length[1]]));
    let mut content = Vec::new();
    while content.len() < length {
        let count = (length - content.len()).min(chunk.into()) as u8;
        let piece = read(2 + content.len(), count);
        assert_eq!(piece.len(), usize::from(count));
        content.extend(piece);
    }
    content
}

/// Puts the two buffers together: tag and value.
fn items(card: &mut EmulatedCard, chunk: u8) -> Vec<(u8, Vec<u8>)> {
    let (tags, values) = (read_buffer(card, 1, chunk), read_buffer(card, 2, chunk));
    let (mut tags, mut values) = (&tags[..], &values[..]);
    let mut items = Vec::new();
    while let [tag, rest @ ..] = tags {
        let (length, rest) = match rest {
            [0xFF, low, high, rest @ ..] => (usize::from(u16::from_le_bytes([*low, *high])), rest),
            [length, rest @ ..] => (usize::from(*length), rest),
            [] => panic!("tag without length"),
        };
        let (value, left) = values.split_at(length);
        items.push((*tag, value.to_vec()));
        (tags, values) = (rest, left);
    }
    assert!(values.is_empty());
    items
}

#[test]
fn certificates_are_served_compressed() {
    let mut card = card(3, 2048);
    for (index, certificate) in certificates(3, 2048).into_iter().enumerate() {
        assert_eq!(send(&mut card, &select(&pki_aid(index as u8))).status(), StatusWord::SUCCESS);
        // OpenSC reads 240 bytes at a time, coolkey 255.
        for chunk in [240, 255, 1] {
            let items = items(&mut card, chunk);
            assert_eq!(items.iter().map(|(tag, _)| *tag).collect::<Vec<_>>(), [0x71, 0x70, 0x72, 0xFE]);
            assert_eq!(items[0].1, [0x01]);
            assert_eq!(items[1].1[0], 0x78, "a zlib stream");
            let mut der = Vec::new();
            flate2::read::ZlibDecoder::new(&items[1].1[..]).read_to_end(&mut der).unwrap();
            assert_eq!(der, certificate.der);
        }
    }
}

#[test]
fn the_capability_container_names_each_certificate() {
    for count in 1..=10 {
        let mut card = card(count, 2048);
        send(&mut card, &select(&[0xA0, 0x00, 0x00, 0x01, 0x16, 0xDB, 0x00]));
        let items = items(&mut card, 240);
        assert_eq!((items[0].0, items[0].1.len()), (0xF0, 21));
        let urls: Vec<_> = items.iter().filter(|(tag, _)| *tag == 0xF3).collect();
        assert_eq!(urls.len(), count);
        for (index, (_, url)) in urls.into_iter().enumerate() {
            let index = index as u8;
            assert_eq!(url[..10], [0xA0, 0, 0, 0, 0x79, 4, 1, index, 1, index]);
            assert_eq!(url.len(), 16);
        }
        let tail: Vec<_> = items.iter().map(|(tag, _)| *tag).filter(|tag| *tag != 0xF3).collect();
        assert_eq!(tail, [0xF0, 0xF1, 0xF2, 0xF4, 0xF5, 0xF6, 0xF7, 0xFA, 0xFB, 0xFC, 0xFD, 0xFE]);
        assert_eq!(items.iter().find(|(tag, _)| *tag == 0xF6).unwrap().1.len(), 17);
    }
}

#[test]
fn no_two_cards_have_the_same_serial_number() {
    let serials = |count| {
        let mut card = card(count, 2048);
        send(&mut card, &select(&[0xA0, 0x00, 0x00, 0x01, 0x16, 0xDB, 0x00]));
        let token = items(&mut card, 255)[0].1[7..].to_vec();
        send(&mut card, &select(&[0xA0, 0x00, 0x00, 0x00, 0x03, 0x00, 0x00]));
        let cplc = send(&mut card, &[0x80, 0xCA, 0x9F, 0x7F, 0x2D]).data().to_vec();
        assert_eq!((cplc.len(), token.len()), (45, 14));
        (token, cplc)
    };
    assert_eq!(serials(1), serials(1));
    assert_ne!(serials(1).0, serials(2).0);
    assert_ne!(serials(1).1, serials(2).1);
}

#[test]
fn stores_a_card_cannot_hold() {
    let build = |certificates| {
        let store = Store::of(certificates);
        let slots = assign(emulated_card::keys::KeyStore::certificates(&store), &[]).unwrap();
        try_card(store, ReferenceData::in_memory(3), Profile::Cac, slots).map(|_| ())
    };
    assert_eq!(build(vec![]), Err(CardBuildError::NoCertificates));
    let too_many = CardBuildError::TooManyCertificates { count: 11, limit: 10 };
    assert_eq!(build(certificates(11, 2048)), Err(too_many));
    let mut long = certificates(2, 2048);
    long[1].der = noise(70_000, 9);
    assert_eq!(build(long), Err(CardBuildError::Certificate { name: "certificate 1".into() }));
    assert_eq!(build(common::keys("9a:p256,9c:p384").1), Err(CardBuildError::NoRsa));
}

#[test]
fn containers_are_rsa_keys_in_the_order_of_their_slots() {
    // The store marks results with the index of the key.
    for profile in [Profile::Cac, Profile::Dual] {
        let keys = "9e:1024,9d:1024,9a:p256,82:1024,9c:1024";
        let mut card = piv_card(profile, keys, ReferenceData::in_memory(3));
        send(&mut card, &select(&pki_aid(0)));
        send(&mut card, VERIFY);
        for (container, index) in [4, 1, 0, 3].into_iter().enumerate() {
            assert_eq!(send(&mut card, &select(&pki_aid(container as u8))).status(), StatusWord::SUCCESS);
            let sign = [&[0x00, 0x42, 0x00, 0x00, 0x80][..], &[0; 128], &[0x00]].concat();
            assert_eq!(send(&mut card, &sign).data()[0], index);
        }
        assert_eq!(send(&mut card, &select(&pki_aid(4))).status(), StatusWord::NOT_FOUND);
    }
}

#[test]
fn the_atr_is_its_own_and_t1() {
    let card = card(1, 2048);
    assert_eq!(card.atr().protocols().collect::<Vec<_>>(), [1]);
    assert_eq!(card.atr().historical(), b"\x80\x73\x80\x01\x40\x58EMULATED");
}

#[test]
fn responses_of_4096_bit_keys_honour_extended_le() {
    let mut card = card(1, 4096);
    send(&mut card, VERIFY);
    send(&mut card, &select(&pki_aid(0)));
    let block = noise(512, 7);
    let reversed: Vec<u8> = block.iter().rev().copied().collect();
    let sign = |le| Command::build([0x00, 0x42, 0x00, 0x00], &block, le).unwrap();
    for le in [512, 513, 65_536] {
        let response = common::transmit(&mut card, &sign(Some(le)));
        assert_eq!((response.data(), response.status()), (&reversed[..], StatusWord::SUCCESS));
    }
    let response = common::transmit(&mut card, &sign(Some(300)));
    assert_eq!((response.data(), response.status().0), (&reversed[..300], 0x61D4));
    let response = send(&mut card, &[0x00, 0xC0, 0x00, 0x00, 0x00]);
    assert_eq!((response.data(), response.status()), (&reversed[300..], StatusWord::SUCCESS));
}

#[test]
fn one_command_at_a_time() {
    let mut card = card(1, 1024);
    let Step::Work(job) = card.command(&Command::parse(VERIFY).unwrap()) else { panic!("VERIFY is work") };
    let Step::Answer(response) = card.command(&Command::parse(&[0x00, 0x20, 0x00, 0x00]).unwrap()) else {
        panic!("refused at once")
    };
    assert_eq!(response.status(), StatusWord::NO_DIAGNOSIS);
    assert_eq!(card.finish(job.run()).status(), StatusWord::SUCCESS);
    assert_eq!(send(&mut card, &[0x00, 0x20, 0x00, 0x00]).status(), StatusWord::SUCCESS);
}

#[test]
fn a_stale_login_is_destroyed() {
    let store = Store::new(1, 1024);
    let seen = std::sync::Arc::clone(&store.seen);
    let mut card = card_with(store, ReferenceData::in_memory(3));
    let verify = Command::parse(VERIFY).unwrap();
    let Step::Work(job) = card.command(&verify) else { panic!("VERIFY is work") };
    let done = job.run();
    assert_eq!(seen.live_logins(), 1);
    card.reset();
    assert_eq!(card.finish(done).status(), StatusWord::CONDITIONS_NOT_SATISFIED);
    assert_eq!(seen.live_logins(), 0);
    assert_eq!(send(&mut card, &[0x00, 0x20, 0x00, 0x00]).status(), StatusWord::tries_left(3));

    // A logout while the job runs takes effect when it is finished.
    let Step::Work(job) = card.command(&verify) else { panic!("VERIFY is work") };
    card.logout();
    assert_eq!(card.finish(job.run()).status(), StatusWord::SUCCESS);
    assert_eq!(seen.live_logins(), 0);
}
