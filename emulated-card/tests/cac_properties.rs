//! What holds for any sequence of commands to a CAC, but for its security state, which `card_properties.rs` is about.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod common;

use std::sync::Arc;

use emulated_card::card::Step;
use emulated_card::pin::ReferenceData;
use proptest::collection::vec;
use proptest::prelude::*;
use vscard_protocol::{Command, StatusWord};

use common::{Store, VERIFY, card_with, noise, pki_aid, select, send, transmit};

const AIDS: [&[u8]; 6] = [
    b"\xA0\x00\x00\x00\x79\x01\x00",
    b"\xA0\x00\x00\x00\x79\x01\x01",
    b"\xA0\x00\x00\x01\x16\xDB\x00",
    b"\xA0\x00\x00\x00\x79\x03\x00",
    b"\xA0\x00\x00\x00\x03\x00\x00",
    b"\xA0\x00\x00\x03\x97\x43\x49\x44\x5F\x01\x00",
];

/// Commands that get somewhere, and commands of all kinds.
fn any_command() -> impl Strategy<Value = Command> {
    let ins = prop_oneof![
        prop::sample::select(vec![0x20_u8, 0x42, 0x4C, 0x52, 0x56, 0x58, 0x84, 0xA4, 0xC0, 0xCA]),
        any::<u8>(),
    ];
    let class = prop_oneof![8 => Just(0_u8), 4 => Just(0x80), 1 => any::<u8>()];
    let parameter =
        || prop_oneof![4 => Just(0_u8), 1 => Just(1), 1 => Just(2), 1 => Just(0x80), 1 => any::<u8>()];
    let data = prop_oneof![
        Just(vec![]),
        prop::sample::select(AIDS.to_vec()).prop_map(<[u8]>::to_vec),
        vec(any::<u8>(), 2..=2),
        vec(any::<u8>(), 128..=128),
        vec(any::<u8>(), 0..300),
    ];
    let le = prop_oneof![Just(None), Just(Some(256)), (1_u32..=255).prop_map(Some), Just(Some(65_536))];
    let wild = (class, ins, parameter(), parameter(), data, le)
        .prop_map(|(class, ins, p1, p2, data, le)| Command::build([class, ins, p1, p2], &data, le).unwrap());
    let select = prop::sample::select(AIDS.to_vec())
        .prop_map(|aid| Command::build([0x00, 0xA4, 0x04, 0x00], aid, None).unwrap());
    let sign = (prop::sample::select(vec![0_u8, 0x80]), 0_usize..=130).prop_map(|(p1, length)| {
        Command::build([0x00, 0x42, p1, 0x00], &vec![0x55; length], Some(256)).unwrap()
    });
    prop_oneof![3 => wild, 1 => select, 2 => sign]
}

proptest! {
    #[test]
    fn reset_clears_everything(commands in vec(any_command(), 1..30), finished in any::<bool>()) {
        let store = Store::new(2, 1024);
        let seen = Arc::clone(&store.seen);
        let mut card = card_with(store, ReferenceData::in_memory(3));
        send(&mut card, VERIFY);
        for command in &commands {
            match card.command(command) {
                Step::Answer(_) => {}
                Step::Work(job) if finished => drop(card.finish(job.run())),
                // Lost: the card answers 6F00 until the reset.
                Step::Work(job) => drop(job),
            }
        }
        card.reset();
        prop_assert_eq!(seen.live_logins(), 0);
        // The try counter is not volatile; all else is as on the first day.
        let status = send(&mut card, &[0x00, 0x20, 0x00, 0x00]).status();
        prop_assert!(matches!(status.0, 0x63C1..=0x63C3 | 0x6983), "{status}");
        prop_assert_eq!(send(&mut card, &[0x00, 0xC0, 0x00, 0x00, 0x00]).status().0, 0x6985);
        prop_assert_eq!(send(&mut card, &[0x00, 0x56, 0x01, 0x00, 0x00]).status().0, 0x6D00);
        let operations = seen.operations();
        send(&mut card, &select(&pki_aid(0)));
        let sign = [&[0x00, 0x42, 0x00, 0x00, 0x80][..], &[0x55; 128], &[0x00]].concat();
        prop_assert_eq!(send(&mut card, &sign).status(), StatusWord::SECURITY_STATUS_NOT_SATISFIED);
        prop_assert_eq!(seen.operations(), operations);
    }

    #[test]
    fn pieces_may_be_cut_anywhere(cuts in vec(0_usize..=256, 0..6), seed in any::<u32>()) {
        let mut card = common::card(1, 2048);
        send(&mut card, VERIFY);
        send(&mut card, &select(&pki_aid(0)));
        let block = noise(256, seed);
        let expected: Vec<u8> = block.iter().rev().copied().collect();
        let mut ends = cuts;
        ends.sort_unstable();
        let mut from = 0;
        for end in ends {
            let piece = Command::build([0x80, 0x42, 0x80, 0x00], &block[from..end], None).unwrap();
            let response = transmit(&mut card, &piece);
            prop_assert_eq!((response.data(), response.status()), (&[][..], StatusWord::SUCCESS));
            from = end;
        }
        let last = Command::build([0x80, 0x42, 0x00, 0x00], &block[from..], Some(256)).unwrap();
        let response = transmit(&mut card, &last);
        prop_assert_eq!((response.data(), response.status()), (&expected[..], StatusWord::SUCCESS));
    }

    #[test]
    fn get_response_drains_any_answer(first in prop::option::of(1_u32..=600), les in vec(1_u32..=600, 1..80)) {
        let mut card = common::card(1, 4096);
        send(&mut card, VERIFY);
        send(&mut card, &select(&pki_aid(0)));
        let block = noise(512, 3);
        let expected: Vec<u8> = block.iter().rev().copied().collect();
        let sign = Command::build([0x00, 0x42, 0x00, 0x00], &block, first).unwrap();
        let mut response = transmit(&mut card, &sign);
        let mut read = response.data().to_vec();
        prop_assert!(read.len() <= first.unwrap_or(0) as usize);
        for le in les.into_iter().cycle() {
            if response.status().sw1() != 0x61 {
                break;
            }
            prop_assert_eq!(response.status(), StatusWord::more(expected.len() - read.len()));
            response = transmit(&mut card, &Command::build([0x00, 0xC0, 0x00, 0x00], &[], Some(le)).unwrap());
            prop_assert!(response.data().len() <= le as usize);
            read.extend_from_slice(response.data());
        }
        prop_assert_eq!(response.status(), StatusWord::SUCCESS);
        prop_assert_eq!(read, expected);
    }
}
