//! What holds for any sequence of commands to a card with the PIV application, but for its security state, which
//! `card_properties.rs` is about.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod common;

use std::sync::Arc;

use emulated_card::card::{Profile, Step};
use emulated_card::pin::ReferenceData;
use proptest::collection::vec;
use proptest::prelude::*;
use vscard_protocol::{Command, Secret, StatusWord};

use common::{PIN, SELECT_PIV, Store, VERIFY_PIV, keys, noise, pki_aid, send, transmit, try_card};

const KEYS: &str = "9a:1024,9c:p256,9d:1024,9e:p256,82:p384";

/// What makes GENERAL AUTHENTICATE work, whole or in a chain, and what nearly does.
fn authenticate() -> impl Strategy<Value = Vec<Command>> {
    let reference = prop::sample::select(vec![0x9A_u8, 0x9B, 0x9C, 0x9D, 0x9E, 0x82, 0x83]);
    let algorithm = prop::sample::select(vec![0x00_u8, 0x06, 0x07, 0x11, 0x14]);
    let body = prop_oneof![
        Just([&[0x7C, 0x81, 0x85, 0x82, 0x00, 0x81, 0x81, 0x80][..], &[0x55; 128]].concat()),
        Just([&[0x7C, 0x24, 0x81, 0x20][..], &[0x55; 32], &[0x82, 0x00]].concat()),
        Just([&[0x7C, 0x45, 0x82, 0x00, 0x85, 0x41, 0x04][..], &[0x55; 64]].concat()),
        Just([&[0x7C, 0x65, 0x82, 0x00, 0x85, 0x61, 0x04][..], &[0x55; 96]].concat()),
        Just(vec![0x7C, 0x02, 0x81, 0x00]),
        vec(any::<u8>(), 0..60),
    ];
    (algorithm, reference, body, prop::option::of(any::<prop::sample::Index>())).prop_map(
        |(algorithm, reference, body, cut)| {
            let build = |class, data: &[u8]| {
                Command::build([class, 0x87, algorithm, reference], data, (class == 0).then_some(256))
                    .unwrap()
            };
            match cut.filter(|_| !body.is_empty()) {
                Some(cut) => {
                    let (first, last) = body.split_at(cut.index(body.len()));
                    vec![build(0x10, first), build(0x00, last)]
                }
                None => vec![build(0x00, &body)],
            }
        },
    )
}

fn any_command() -> impl Strategy<Value = Vec<Command>> {
    let ins = prop_oneof![
        prop::sample::select(vec![0x20_u8, 0x24, 0x2C, 0x42, 0x84, 0x87, 0xA4, 0xC0, 0xCB]),
        any::<u8>(),
    ];
    let class = prop_oneof![8 => Just(0_u8), 4 => Just(0x10), 1 => any::<u8>()];
    let parameter = || prop_oneof![4 => Just(0_u8), 1 => Just(0x80), 1 => Just(0xFF), 1 => any::<u8>()];
    let data = prop_oneof![
        Just(vec![]),
        Just(b"\x5C\x03\x5F\xC1\x09".to_vec()),
        vec(any::<u8>(), 8..=8),
        vec(any::<u8>(), 16..=16),
        vec(any::<u8>(), 128..=128),
        vec(any::<u8>(), 0..300),
    ];
    let le = prop_oneof![Just(None), Just(Some(256)), (1_u32..=255).prop_map(Some), Just(Some(65_536))];
    let wild = (class, ins, parameter(), parameter(), data, le).prop_map(|(class, ins, p1, p2, data, le)| {
        vec![Command::build([class, ins, p1, p2], &data, le).unwrap()]
    });
    let applications = vec![SELECT_PIV.to_vec(), common::select(&pki_aid(0)), common::select(&pki_aid(1))];
    let select =
        prop::sample::select(applications).prop_map(|command| vec![Command::parse(&command).unwrap()]);
    prop_oneof![3 => wild, 1 => select, 3 => authenticate()]
}

/// What a card has when it is reset.
#[derive(Clone, Copy, Debug)]
enum Leftover {
    Login,
    Selection,
    Chain,
    Unread,
    /// Work that is never done.
    Lost,
    /// Work that is done after the reset.
    Late,
}

/// The first 6 bytes of a template with a digest of 32 bytes, for 9E, whose key works without the PIN.
const CARD_PIECE: &[u8] = b"\x10\x87\x11\x9E\x06\x7C\x24\x82\x00\x81\x20";

proptest! {
    #[test]
    fn reset_clears_everything(
        commands in vec(any_command(), 0..30),
        leftover in prop::sample::select(vec![
            Leftover::Login,
            Leftover::Selection,
            Leftover::Chain,
            Leftover::Unread,
            Leftover::Lost,
            Leftover::Late,
        ]),
    ) {
        let (slots, certificates) = keys(KEYS);
        let store = Store::of(certificates);
        let seen = Arc::clone(&store.seen);
        // Its own PIN, so that 9E works before it is verified.
        let pin = ReferenceData::in_memory_own(&Secret::from(PIN), None, 15).unwrap();
        let mut card = try_card(store, pin, Profile::Dual, slots).unwrap();
        for command in commands.iter().flatten() {
            transmit(&mut card, command);
        }
        send(&mut card, SELECT_PIV);
        // Not if the commands have blocked it.
        prop_assume!(send(&mut card, VERIFY_PIV).status() == StatusWord::SUCCESS);
        let sign = |key, le| {
            let header = [0x00, 0x87, 0x06, key, 0x88];
            [&header, &b"\x7C\x81\x85\x82\x00\x81\x81\x80"[..], &[0x55; 128], &[le]].concat()
        };
        let digest = [b"\x00\x87\x11\x9E\x20", &[0x55; 32][..], b"\x00"].concat();
        // The last command before the reset and how it ends, the first one after it and how that ends.
        let (left, ended, next, refused) = match leftover {
            Leftover::Login | Leftover::Lost | Leftover::Late => (sign(0x9A, 0), 0x90, sign(0x9A, 0), 0x6982),
            Leftover::Selection => (common::select(&pki_aid(0)), 0x90, b"\x00\x20\x00\x00".to_vec(), 0x6A88),
            Leftover::Chain => (CARD_PIECE.to_vec(), 0x90, digest, 0x6A80),
            Leftover::Unread => (sign(0x9A, 1), 0x61, b"\x00\xC0\x00\x00\x00".to_vec(), 0x6985),
        };
        let left = Command::parse(&left).unwrap();
        match (card.command(&left), leftover) {
            (Step::Work(job), Leftover::Lost) => {
                drop(job);
                card.reset();
            }
            (Step::Work(job), Leftover::Late) => {
                card.reset();
                let late = card.finish(job.run());
                prop_assert_eq!((late.data(), late.status().0), (&[][..], 0x6985));
            }
            (step, _) => {
                let response = match step {
                    Step::Answer(response) => response,
                    Step::Work(job) => card.finish(job.run()),
                };
                prop_assert_eq!(response.status().sw1(), ended);
                card.reset();
            }
        }
        prop_assert_eq!(seen.live_logins(), 0);
        let operations = seen.operations();
        let response = send(&mut card, &next);
        prop_assert_eq!((response.data(), response.status().0), (&[][..], refused));
        prop_assert_eq!(seen.operations(), operations);
        // It is as good as new.
        prop_assert_eq!(send(&mut card, VERIFY_PIV).status(), StatusWord::SUCCESS);
        prop_assert_eq!(send(&mut card, &sign(0x9A, 0)).status(), StatusWord::SUCCESS);
    }

    #[test]
    fn chains_may_be_cut_anywhere(cuts in vec(0_usize..=264, 0..6), seed in any::<u32>()) {
        let (slots, certificates) = keys("9d:2048");
        let mut card =
            try_card(Store::of(certificates), ReferenceData::in_memory(3), Profile::Piv, slots).unwrap();
        send(&mut card, VERIFY_PIV);
        let block = noise(256, seed);
        let result: Vec<u8> = block.iter().rev().copied().collect();
        let request = [b"\x7C\x82\x01\x06\x82\x00\x81\x82\x01\x00", &block[..]].concat();
        let mut ends = cuts;
        ends.sort_unstable();
        let mut from = 0;
        for end in ends {
            let piece = Command::build([0x10, 0x87, 0x07, 0x9D], &request[from..end], None).unwrap();
            let response = transmit(&mut card, &piece);
            prop_assert_eq!((response.data(), response.status()), (&[][..], StatusWord::SUCCESS));
            from = end;
        }
        let last = Command::build([0x00, 0x87, 0x07, 0x9D], &request[from..], Some(65_536)).unwrap();
        let response = transmit(&mut card, &last);
        let expected = [b"\x7C\x82\x01\x04\x82\x82\x01\x00", &result[..]].concat();
        prop_assert_eq!((response.data(), response.status()), (&expected[..], StatusWord::SUCCESS));
    }
}
