//! A guest, a carrier and a card that do anything at all.

use std::time::Duration;

use ccid_device::{
    Action, CardFailure, Device, InOutcome, Layout, Outcome, Setup, SlotId, Token, TransferOutcome,
};
use proptest::prelude::*;
use vscard_protocol::{Response, Secret, StatusWord};

use crate::guest::{Guest, atr, message};

#[derive(Clone, Debug)]
enum Step {
    Control(u8, u8, u16, u16, u16),
    Configure,
    Out(u8, Vec<u8>),
    Message { kind: u8, slot: u8, seq: u8, specific: [u8; 3], length: usize },
    In(u8, usize),
    GiveBack(u8),
    Interrupt(u8),
    InterruptBack(u8),
    Reset,
    Insert(u8),
    Remove(u8),
    Act,
    Complete(usize, u8, usize),
    Wait(u64),
    Save,
}

/// An endpoint, mostly one that exists.
fn endpoint() -> impl Strategy<Value = u8> {
    let known = prop_oneof![Just(0x01), Just(0x81), Just(0x82)];
    prop_oneof![12 => known, 1 => 0u8..=16, 1 => 0x80u8..=0x90, 1 => any::<u8>()]
}

fn step() -> impl Strategy<Value = Step> {
    let kind = prop_oneof![
        6 => Just(0x6F), 3 => Just(0x62), 1 => Just(0x63), 1 => Just(0x65), 2 => Just(0x72),
        2 => 0x60u8..=0x74, 1 => any::<u8>(),
    ];
    let specific = prop_oneof![
        6 => Just([0; 3]), 6 => prop_oneof![Just(1), Just(2), Just(3), Just(0x10)].prop_map(|level| [0, level, 0]),
        1 => any::<[u8; 3]>(),
    ];
    let request = prop_oneof![
        Just(0x21),
        Just(0xA1),
        Just(0x80),
        Just(0x81),
        Just(0x82),
        Just(0x01),
        Just(0x02),
        any::<u8>()
    ];
    prop_oneof![
        2 => (request, 0u8..12, 0u16..0x300, prop_oneof![Just(0), Just(1), Just(0x81), any::<u16>()], any::<u16>())
            .prop_map(|(kind, request, value, index, length)| Step::Control(kind, request, value, index, length)),
        2 => (0u8..3, 0u8..3).prop_map(|(slot, seq)| Step::Control(0x21, 1, u16::from_le_bytes([slot, seq]), 0, 0)),
        1 => Just(Step::Configure),
        2 => (endpoint(), proptest::collection::vec(any::<u8>(), 0..130)).prop_map(|(to, data)| Step::Out(to, data)),
        12 => (kind, 0u8..4, 0u8..3, specific, prop_oneof![0usize..8, 0usize..300])
            .prop_map(|(kind, slot, seq, specific, length)| Step::Message { kind, slot, seq, specific, length }),
        6 => (endpoint(), prop_oneof![Just(64usize), Just(1 << 16), 0usize..600]).prop_map(|(at, max)| Step::In(at, max)),
        1 => endpoint().prop_map(Step::GiveBack),
        1 => endpoint().prop_map(Step::Interrupt),
        1 => endpoint().prop_map(Step::InterruptBack),
        1 => Just(Step::Reset),
        3 => (0u8..6).prop_map(Step::Insert),
        1 => (0u8..6).prop_map(Step::Remove),
        6 => Just(Step::Act),
        6 => (any::<usize>(), any::<u8>(), prop_oneof![0usize..600, Just(65_536)])
            .prop_map(|(which, what, length)| Step::Complete(which, what, length)),
        2 => (0u64..3000).prop_map(Step::Wait),
        1 => Just(Step::Save),
    ]
}

/// What the embedder and the carrier remember.
#[derive(Default)]
struct Model {
    tokens: Vec<Token>,
    given: Vec<Secret>,
}

/// Whether an answer is well formed.
fn well_formed(answer: &[u8], slots: u8, max_message: usize) -> Result<(), TestCaseError> {
    prop_assert!((10..=max_message).contains(&answer.len()));
    let length = u32::from_le_bytes([answer[1], answer[2], answer[3], answer[4]]) as usize;
    prop_assert_eq!(length + 10, answer.len());
    prop_assert!(answer[5] < slots, "bSlot {}", answer[5]);
    prop_assert!(answer[7] & 0x3C == 0 && answer[7] & 3 < 3 && answer[7] >> 6 < 3);
    match answer[0] {
        0x80 => prop_assert!(matches!(answer[9], 0..=3 | 0x10)),
        0x81 | 0x83 => prop_assert!(length == 0 && answer[9] == 0),
        0x82 => prop_assert_eq!(length, if answer[9] == 1 { 7 } else { 5 }),
        0x84 => prop_assert_eq!(length, 8),
        kind => prop_assert!(false, "type {kind:02X}"),
    }
    Ok(())
}

/// Whether a restored device has all to say that the saved one had; failures of commands at work may follow.
fn same_for_the_guest(mut saved: Device, mut restored: Device) -> Result<(), TestCaseError> {
    let drain = |device: &mut Device| {
        let mut said = Vec::new();
        for interface in device.topology().interfaces {
            let [_, bulk_in, interrupt] = interface.endpoints;
            while let InOutcome::Data(data) = device.bulk_in(bulk_in.address, 1 << 17) {
                said.push((bulk_in.address, data.expose().to_vec()));
            }
            while let InOutcome::Data(data) = device.interrupt_in(interrupt.address) {
                said.push((interrupt.address, data.expose().to_vec()));
            }
        }
        said
    };
    let failure =
        |said: &(u8, Vec<u8>)| said.0 & 1 == 1 && said.1.get(8) == Some(&0xFB) && said.1.len() == 10;
    let mut saved = drain(&mut saved);
    let mut restored = drain(&mut restored);
    saved.retain(|said| !failure(said));
    restored.retain(|said| !failure(said));
    prop_assert_eq!(saved, restored);
    Ok(())
}

fn run(layout: Layout, max_message: u32, steps: Vec<Step>) -> Result<(), TestCaseError> {
    let slots = match layout {
        Layout::Slots(slots) => slots,
        Layout::Interfaces(_) => 1,
    };
    let mut guest = Guest::new(layout, max_message);
    let mut model = Model::default();
    for step in steps {
        match step {
            Step::Control(request_type, request, value, index, length) => {
                let setup = Setup { request_type, request, value, index, length };
                guest.device.control(setup, &[], guest.now);
            }
            Step::Configure => guest.configure(),
            Step::Out(endpoint, data) => {
                guest.device.bulk_out(endpoint, &data, guest.now);
            }
            Step::Message { kind, slot, seq, specific, length } => {
                let data = if length < 4 { vec![0; length] } else { vec![0, 0xB0, 0, 0] };
                let data = [data, vec![0; length.saturating_sub(4)]].concat();
                let bytes = message(kind, slot, seq, specific, &data);
                if guest.device.bulk_out(0x01, &bytes, guest.now) == TransferOutcome::Stall {
                    let clear = Setup { request_type: 2, request: 1, value: 0, index: 1, length: 0 };
                    guest.device.control(clear, &[], guest.now);
                }
            }
            Step::In(endpoint, max) => {
                let ready = guest.device.in_ready(endpoint);
                match guest.device.bulk_in(endpoint, max) {
                    InOutcome::Data(data) => {
                        prop_assert!(ready && data.len() <= max);
                        model.given.push(data);
                    }
                    InOutcome::Nothing => prop_assert!(!ready),
                    InOutcome::Stall => {}
                }
            }
            Step::GiveBack(endpoint) => {
                if let Some(data) = model.given.pop() {
                    guest.device.bulk_in_return(endpoint, data);
                }
            }
            Step::Interrupt(endpoint) => {
                if let InOutcome::Data(data) = guest.device.interrupt_in(endpoint) {
                    prop_assert_eq!(data.len(), 1 + usize::from(slots.div_ceil(4)));
                    prop_assert_eq!(data.expose()[0], 0x50);
                }
            }
            Step::InterruptBack(endpoint) => guest.device.interrupt_in_return(endpoint),
            Step::Reset => guest.device.reset(guest.now),
            Step::Insert(slot) => guest.device.insert(SlotId(slot), guest.now),
            Step::Remove(slot) => guest.device.remove(SlotId(slot), guest.now),
            Step::Act => {
                let mut actions = 0;
                while let Some(action) = guest.device.poll_action() {
                    actions += 1;
                    match action {
                        Action::PowerOn { token, .. } => {
                            model.tokens.push(token);
                            guest.complete(token, Outcome::Powered(atr()));
                        }
                        Action::Transmit { token, .. } => model.tokens.push(token),
                        Action::PowerOff { .. } => {}
                    }
                }
                prop_assert!(actions <= 2 * usize::from(layout.slots()), "{actions} actions waited");
            }
            Step::Complete(which, what, length) => {
                if !model.tokens.is_empty() {
                    let token = model.tokens[which % model.tokens.len()];
                    let outcome = match what % 8 {
                        0 => Outcome::Powered(atr()),
                        1 => Outcome::Failed(CardFailure::Removed),
                        2 => Outcome::Failed(CardFailure::Mute),
                        _ => Outcome::Response(Response::new(&vec![0; length], StatusWord::SUCCESS)),
                    };
                    guest.complete(token, outcome);
                }
            }
            Step::Wait(time) => {
                guest.now += Duration::from_millis(time);
                guest.device.handle_deadline(guest.now);
            }
            Step::Save => {
                let saved = guest.device.save();
                // Whatever waits is bounded, and so is what it is saved as.
                prop_assert!(saved.len() < (usize::from(layout.slots()) + 4) * 140_000 + (2 << 20));
                let config = guest.config.clone();
                let before = std::mem::replace(
                    &mut guest.device,
                    Device::restore(config.clone(), saved.expose(), guest.now)
                        .map_err(|error| TestCaseError::fail(error.to_string()))?,
                );
                let restored = Device::restore(config, saved.expose(), guest.now);
                same_for_the_guest(
                    before,
                    restored.map_err(|error| TestCaseError::fail(error.to_string()))?,
                )?;
                // Saving what was restored gives the same, but for what restoring began anew.
                let again = guest.device.save();
                let config = guest.config.clone();
                prop_assert!(Device::restore(config, again.expose(), guest.now).is_ok());
                model.given.clear();
            }
        }
    }
    // Whatever was, after a reset the device works.
    guest.device.reset(guest.now);
    guest.configure();
    guest.insert(0);
    guest.send_bytes(&message(0x62, 0, 0, [0; 3], &[]));
    guest.work();
    prop_assert!(guest.read_bytes().is_some_and(|answer| answer.expose()[7] == 0));
    Ok(())
}

proptest! {
    #[test]
    fn anything_is_survived(
        layout in prop_oneof![
            Just(Layout::Slots(1)), Just(Layout::Slots(3)), Just(Layout::Slots(16)), Just(Layout::Interfaces(2)),
        ],
        max_message in prop_oneof![Just(271u32), Just(300), Just(65_554)],
        steps in proptest::collection::vec(step(), 0..200),
    ) {
        run(layout, max_message, steps)?;
    }

    /// A guest that reads whole answers: each is well formed, and each message has one, unless IccPowerOn begins anew
    /// while it is at work.
    #[test]
    fn answers_are_well_formed_and_echo(
        messages in proptest::collection::vec(
            (prop_oneof![3 => Just(0x6Fu8), 2 => Just(0x62), 1 => any::<u8>()], 0u8..5, any::<[u8; 3]>(),
             any::<bool>(), proptest::collection::vec(any::<u8>(), 0..260), any::<bool>()),
            0..100,
        ),
    ) {
        let mut guest = Guest::new(Layout::Slots(3), 271);
        for slot in 0..3 {
            guest.insert(slot);
        }
        let sent = messages.len();
        let (mut answers, mut given_up) = (0, 0);
        let mut at_work = [None; 3];
        for (seq, (kind, slot, specific, plain, data, card)) in messages.into_iter().enumerate() {
            let seq = seq as u8;
            // ABORT alone is answered with its other half only.
            let kind = if kind == 0x72 { 0x71 } else { kind };
            let specific = if plain { [0; 3] } else { specific };
            let data = if kind == 0x62 { Vec::new() } else { data };
            guest.send_bytes(&message(kind, slot, seq, specific, &data));
            let begins_anew = kind == 0x62 && specific[0] <= 3;
            if let Some(place) = at_work.get_mut(usize::from(slot)).filter(|place| place.is_none() || begins_anew) {
                given_up += usize::from(place.replace(seq).is_some());
            }
            if card {
                guest.work();
            }
            while let Some(answer) = guest.read_bytes() {
                answers += 1;
                let answer = answer.expose();
                well_formed(answer, 3, 271)?;
                if let Some(place) = at_work.get_mut(usize::from(answer[5])) {
                    place.take_if(|at_work| *at_work == answer[6]);
                }
                if answer[6] == seq {
                    prop_assert_eq!(answer[5], if slot < 3 { slot } else { 0 });
                    prop_assert!(slot < 3 || (answer[7], answer[8]) == (0x42, 5));
                }
            }
        }
        guest.work();
        answers += std::iter::from_fn(|| guest.read_bytes()).count();
        prop_assert_eq!(answers + given_up, sent);
    }

    #[test]
    fn any_bytes_on_bulk_out(
        transfers in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..200), 0..50),
    ) {
        let mut guest = Guest::powered(271);
        for transfer in transfers {
            if guest.device.bulk_out(0x01, &transfer, guest.now) == TransferOutcome::Stall {
                guest.control("02 01 0000 0100 0000").unwrap();
            }
            guest.work();
            while let Some(answer) = guest.read_bytes() {
                well_formed(answer.expose(), 1, 271)?;
            }
        }
    }
}
