//! The security state of a card, whatever is sent to it and whatever happens meanwhile: no private key works without
//! the PIN, the signature key once for each VERIFY, no login outlives its PIN, nobody but the administrator writes, and
//! each command ends as it can. What is checked is in `fuzz/src/card.rs`, which has a model of the card; here are
//! stories that lead somewhere.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

#[path = "../../fuzz/src/card.rs"]
mod card;
#[path = "../../fuzz/src/input.rs"]
#[allow(dead_code, reason = "each target uses a part of it")]
mod input;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use vscard_protocol::{Command, apdu};

/// One of [`card::run`]'s steps, as it reads them.
type StepBytes = Vec<u8>;

fn block(bytes: &[u8]) -> Vec<u8> {
    [&[0xFE], &(bytes.len() as u16).to_le_bytes()[..], bytes].concat()
}

/// A command as it is, and what happens while it is worked on.
fn raw(command: &Command, meanwhile: u8) -> StepBytes {
    [&[16 * meanwhile], &block(command.as_bytes())[..]].concat()
}

fn meanwhile() -> impl Strategy<Value = u8> {
    prop_oneof![6 => Just(0), 1 => 1_u8..=5]
}

fn identifier() -> impl Strategy<Value = Vec<u8>> {
    let pki = |index| [&apdu::aid::RID_CAC[..], &[0x01, index]].concat();
    let all = vec![
        apdu::aid::PIV.to_vec(),
        apdu::aid::PIV[..5].to_vec(),
        pki(0),
        pki(1),
        pki(2),
        apdu::aid::CAC_CCC.to_vec(),
        apdu::aid::CAC_ACA.to_vec(),
        apdu::aid::GLOBAL_PLATFORM.to_vec(),
        apdu::aid::MICROSOFT_PNP.to_vec(),
    ];
    select(all)
}

fn select_application() -> impl Strategy<Value = StepBytes> {
    (identifier(), select(vec![0x00_u8, 0x0C]), select(vec![None, Some(256)]))
        .prop_map(|(aid, p2, le)| raw(&Command::build([0x00, 0xA4, 0x04, p2], &aid, le).unwrap(), 0))
}

/// Commands of all kinds; most of them are those of an applet.
fn wild() -> impl Strategy<Value = StepBytes> {
    let class = prop_oneof![8 => Just(0_u8), 3 => Just(0x80), 2 => Just(0x10), 1 => any::<u8>()];
    let known = vec![
        0x20_u8, 0x24, 0x2C, 0x42, 0x47, 0x4C, 0x52, 0x56, 0x58, 0x84, 0x87, 0xA4, 0xC0, 0xCA, 0xCB, 0xDB,
    ];
    let ins = prop_oneof![8 => select(known), 1 => any::<u8>()];
    let parameters = prop_oneof![
        3 => Just([0x00_u8, 0x00]),
        4 => select(vec![
            [0x3F_u8, 0xFF], [0x00, 0x80], [0x00, 0x81], [0xFF, 0x80], [0x01, 0x00], [0x02, 0x00], [0x40, 0x00],
            [0x80, 0x00], [0x9F, 0x7F], [0x7F, 0x68], [0x06, 0x9C], [0x10, 0x00],
        ]),
        1 => any::<[u8; 2]>(),
    ];
    let data = prop_oneof![
        3 => Just(vec![]),
        2 => select(vec![0x03_u8, 0x05, 0x09, 0x23]).prop_map(|last| vec![0x5C, 3, 0x5F, 0xC1, last]),
        1 => identifier(),
        1 => vec(any::<u8>(), 1..=2),
        1 => vec(any::<u8>(), 8..=8),
        1 => vec(any::<u8>(), 16..=16),
        1 => vec(any::<u8>(), 128..=128),
        1 => vec(any::<u8>(), 0..300),
    ];
    let le = prop_oneof![Just(None), Just(Some(256)), (1_u32..=255).prop_map(Some), Just(Some(65_536))];
    (class, ins, parameters, data, le, meanwhile()).prop_map(|(class, ins, [p1, p2], data, le, meanwhile)| {
        raw(&Command::build([class, ins, p1, p2], &data, le).unwrap(), meanwhile)
    })
}

/// What makes GENERAL AUTHENTICATE work, whole or in a chain, short or extended, and what nearly does.
fn authenticate() -> impl Strategy<Value = StepBytes> {
    // Algorithm and key; tag and length of the value.
    let fitting = vec![
        ((0x06_u8, 0x9A_u8), (0x81_u8, 128_usize)),
        ((0x06, 0x9C), (0x81, 128)),
        ((0x11, 0x9D), (0x81, 32)),
        ((0x11, 0x9D), (0x85, 65)),
        ((0x14, 0x9E), (0x81, 48)),
        ((0x14, 0x9E), (0x85, 97)),
        ((0x14, 0x82), (0x81, 48)),
        ((0x14, 0x82), (0x85, 97)),
        ((0x00, 0x9B), (0x81, 0)),
    ];
    let key =
        (select(vec![0x00_u8, 0x06, 0x07, 0x11, 0x14]), select(vec![0x9A_u8, 0x9B, 0x9C, 0x9D, 0x9E, 0x82]));
    let form = (select(vec![0x80_u8, 0x81, 0x82, 0x85]), select(vec![0_usize, 20, 48, 65, 97, 128]));
    let request = prop_oneof![6 => select(fitting), 1 => (key, form)];
    // The last byte is what the store goes by: ED fails, EE ends the login.
    let last = prop_oneof![6 => Just(0x55_u8), 1 => Just(0xED), 1 => Just(0xEE)];
    let body = |(tag, length): (u8, usize), last| {
        let mut value = vec![0x55; length];
        if let [first, .., end] = &mut value[..] {
            (*first, *end) = (0x04, last);
        }
        let response: &[u8] = if length == 0 { &[] } else { &[0x82, 0x00] };
        let object = [&[tag, 0x81, length as u8], &value[..], response].concat();
        [&[0x7C, 0x81, object.len() as u8], &object[..]].concat()
    };
    let le = select(vec![None, Some(1), Some(256), Some(65_536)]);
    // Rarely one that is refused.
    let class = prop_oneof![8 => Just(0x00_u8), 1 => Just(0x0C)];
    let cut = prop::option::weighted(0.3, any::<Index>());
    (request, last, (class, le), cut, any::<bool>(), meanwhile()).prop_map(
        move |(((algorithm, key), form), last, (class, le), cut, last_too, meanwhile)| {
            let body = body(form, last);
            let whole = |data: &[u8]| {
                raw(&Command::build([class, 0x87, algorithm, key], data, le).unwrap(), meanwhile)
            };
            match cut {
                Some(cut) => {
                    let (first, last) = body.split_at(cut.index(body.len()));
                    let first = raw(&Command::build([0x10, 0x87, algorithm, key], first, None).unwrap(), 0);
                    if last_too { [first, whole(last)].concat() } else { first }
                }
                None => whole(&body),
            }
        },
    )
}

/// SIGN/DECRYPT, with all of a block or a part.
fn sign() -> impl Strategy<Value = StepBytes> {
    let length = prop_oneof![3 => Just(128_usize), 1 => Just(64), 1 => 0_usize..=130];
    let last = prop_oneof![6 => Just(0x55_u8), 1 => Just(0xED), 1 => Just(0xEE)];
    (prop_oneof![3 => Just(0_u8), 1 => Just(0x80)], length, last, meanwhile()).prop_map(
        |(p1, length, last, meanwhile)| {
            let mut block = vec![0x55; length];
            if let Some(end) = block.last_mut() {
                *end = last;
            }
            raw(&Command::build([0x00, 0x42, p1, 0x00], &block, Some(256)).unwrap(), meanwhile)
        },
    )
}

/// What the administrator does, and what comes of one byte of it being wrong.
fn administer() -> impl Strategy<Value = StepBytes> {
    let change = || prop_oneof![3 => Just([0_u8, 0]), 1 => any::<[u8; 2]>()];
    let authenticate = (0_u8..2, prop_oneof![4 => Just(0_u8), 1 => Just(1)], 0_u8..24, change())
        .prop_map(|(way, wrong, cut, change)| [&[8, way, wrong, cut], &change[..]].concat());
    let put = (0_u8..4, 0_u8..6, vec(any::<u8>(), 0..300), change(), meanwhile()).prop_map(
        |(class, tag, content, change, meanwhile)| {
            [&[10 + 16 * meanwhile, class, tag], &block(&content)[..], &change].concat()
        },
    );
    let generate = (0_u8..7, 0_u8..7, 0_u8..4, change(), meanwhile()).prop_map(
        |(slot, algorithm, le, change, meanwhile)| {
            [&[13 + 16 * meanwhile, slot, algorithm, le], &change[..]].concat()
        },
    );
    // Objects in an object, of lengths that are right, and something behind them.
    let byte = || select(vec![0x80_u8, 0x81, 0x82, 0x53, 0x00, 0x11]);
    let templates = vec![[0x47_u8, 0x00, 0x9A, 0xAC], [0xDB, 0x3F, 0xFF, 0x5C], [0x87, 0x03, 0x9B, 0x7C]];
    let object =
        (byte(), vec(byte(), 0..3)).prop_map(|(tag, value)| [&[tag, value.len() as u8], &value[..]].concat());
    let nested = (select(templates), vec(object, 0..3), vec(byte(), 0..3)).prop_map(
        |([ins, p1, p2, tag], objects, behind)| {
            let objects = objects.concat();
            let data = [&[tag, objects.len() as u8], &objects[..], &behind].concat();
            raw(&Command::build([0x00, ins, p1, p2], &data, Some(256)).unwrap(), 0)
        },
    );
    prop_oneof![3 => authenticate, 2 => put, 2 => generate, 2 => nested]
}

fn step() -> impl Strategy<Value = StepBytes> {
    let right_pin = (0_u8..=1, meanwhile()).prop_map(|(applet, meanwhile)| vec![3 + 16 * meanwhile, applet]);
    let ask = select(vec![0x00_u8, 0x80])
        .prop_map(|reference| raw(&Command::build([0x00, 0x20, 0x00, reference], &[], None).unwrap(), 0));
    let wrong = prop_oneof![2 => Just(0_u8), 1 => Just(1)];
    let what = prop_oneof![3 => Just(0_u8), 4 => 1_u8..5];
    let change = (what, wrong, 0_u8..4, meanwhile())
        .prop_map(|(what, wrong, new, meanwhile)| vec![7 + 16 * meanwhile, what, wrong, new]);
    let read = select(vec![0x03_u8, 0x05, 0x09, 0x23]).prop_map(|last| {
        raw(&Command::build([0x00, 0xCB, 0x3F, 0xFF], &[0x5C, 3, 0x5F, 0xC1, last], Some(256)).unwrap(), 0)
    });
    prop_oneof![
        5 => right_pin,
        6 => authenticate(),
        6 => administer(),
        4 => wild(),
        2 => sign(),
        1 => select_application(),
        3 => change,
        1 => ask,
        1 => read,
        1 => any::<u8>().prop_map(|le| vec![4, le]),
        1 => select(vec![vec![5_u8], vec![6]]),
    ]
}

proptest! {
    #[test]
    fn the_security_state_is_that_of_the_model(
        profile in 0_u8..4,
        reference in 0_u8..3,
        steps in vec(step(), 1..60),
    ) {
        card::run(&[vec![profile, reference], steps.concat()].concat());
    }
}
