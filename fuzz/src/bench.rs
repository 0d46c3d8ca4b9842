//! A reader on a bench: the device, its clock, and cards that do what the input says.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use ccid_device::{
    Action, CardFailure, ControlOutcome, Device, DeviceConfig, InOutcome, Layout, Outcome, Setup, SlotId,
    Speed, Token, TransferOutcome,
};
use vscard_protocol::{Atr, Response, StatusWord, apdu};

use crate::input::Input;

/// Longest bulk-IN transfer: more than any answer.
pub(crate) const WHOLE: usize = 70_000;
/// What an interface may keep of answers before it refuses messages, by the device's own words.
const UNREAD: usize = 1 << 20;
/// Answers that an interface may keep beyond that: one for each slot at work, a time extension for each, and what
/// was given back.
const BEYOND: usize = 16 + 16 + 32;

pub(crate) struct Bench {
    pub(crate) device: Device,
    pub(crate) now: Instant,
    pub(crate) config: DeviceConfig,
    /// What was asked of the cards, oldest first, the last few of them: completed or not.
    asked: Vec<Token>,
    tokens: HashSet<Token>,
}

impl Bench {
    pub(crate) fn new(input: &mut Input<'_>) -> Self {
        let layouts = [
            Layout::Slots(1),
            Layout::Slots(4),
            Layout::Slots(16),
            Layout::Interfaces(1),
            Layout::Interfaces(2),
            Layout::Interfaces(7),
        ];
        let config = DeviceConfig {
            layout: input.choose(&layouts),
            max_message: input.choose(&[65_554, 271, 272, 330, 1034, 8202]),
            speed: input.choose(&[Speed::High, Speed::Full]),
            ..DeviceConfig::new("fuzz")
        };
        let device = Device::new(config.clone()).expect("a possible device");
        Self { device, now: Instant::now(), config, asked: Vec::new(), tokens: HashSet::new() }
    }

    /// Number of interfaces, and of slots on each.
    pub(crate) fn shape(&self) -> (u8, u8) {
        match self.config.layout {
            Layout::Slots(slots) => (1, slots),
            Layout::Interfaces(interfaces) => (interfaces, 1),
        }
    }

    /// Takes what the device wants done; tells it to nobody yet.
    pub(crate) fn take_actions(&mut self) {
        let slots = self.config.layout.slots();
        let mut count = 0;
        while let Some(action) = self.device.poll_action() {
            count += 1;
            assert!(action.slot().0 < slots, "an action for {:?} of {slots}", action.slot());
            match action {
                Action::PowerOn { token, .. } => self.ask(token),
                Action::Transmit { token, command, .. } => {
                    assert!(command.as_bytes().len() <= apdu::MAX_COMMAND);
                    self.ask(token);
                }
                Action::PowerOff { .. } => {}
            }
        }
        assert!(count <= 2 * usize::from(slots), "{count} actions waited for {slots} slots");
    }

    fn ask(&mut self, token: Token) {
        assert!(self.tokens.insert(token), "{token:?} names two actions");
        if self.asked.len() == 64 {
            self.asked.remove(0);
        }
        self.asked.push(token);
    }

    /// One thing that happens to a card, or the time that passes.
    pub(crate) fn event(&mut self, input: &mut Input<'_>) {
        match input.byte() % 5 {
            0 => self.device.insert(SlotId(input.byte() % 18), self.now),
            1 => self.device.remove(SlotId(input.byte() % 18), self.now),
            2 | 3 => self.complete(input),
            _ => self.pass(Duration::from_millis(u64::from(input.word()) * 4)),
        }
        self.take_actions();
    }

    /// An answer of a card: to what was asked last, as long as the byte is 0.
    fn complete(&mut self, input: &mut Input<'_>) {
        let back = usize::from(input.byte());
        let outcome = match input.byte() % 10 {
            0 => Outcome::Powered(Atr::t1(b"card").expect("an ATR")),
            1 => Outcome::Powered(Atr::t0(b"another").expect("an ATR")),
            2 => match Atr::parse(&input.block()) {
                Ok(atr) => Outcome::Powered(atr),
                Err(_) => Outcome::Failed(CardFailure::Hardware),
            },
            3 => Outcome::Response(Response::new(&input.block(), StatusWord::SUCCESS)),
            4 => Outcome::Response(Response::new(&vec![0xA5; input.word().into()], StatusWord::SUCCESS)),
            5 => Outcome::Response(Response::new(&vec![0xA5; apdu::MAX_RESPONSE - 2], StatusWord::SUCCESS)),
            6 => Outcome::Failed(CardFailure::Removed),
            7 => Outcome::Failed(CardFailure::Mute),
            8 => Outcome::Failed(CardFailure::Busy),
            _ => Outcome::Failed(CardFailure::Hardware),
        };
        let Some(last) = self.asked.len().checked_sub(1) else { return };
        let token = self.asked[last - back % self.asked.len()];
        self.device.complete(token, outcome, self.now);
    }

    /// Time passes, and the device is told so when it wanted to be.
    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.device.handle_deadline(self.now);
        let next = self.device.next_deadline();
        assert!(next.is_none_or(|next| next > self.now), "a deadline that stays due");
    }

    /// No more is kept than the device says. Its saved bytes have it all.
    pub(crate) fn check_size(&self) {
        let (interfaces, slots) = self.shape();
        let message = self.config.max_message as usize;
        let slot = apdu::MAX_COMMAND + apdu::MAX_RESPONSE + 100;
        let most = usize::from(interfaces)
            * (UNREAD + (BEYOND + 1) * (message + 10) + 1000 + usize::from(slots) * slot);
        let length = self.device.save().len();
        assert!(length <= most, "{length} bytes are kept, above {most}");
    }

    /// Whatever has happened: after a reset and with a card in it, every slot does its work.
    pub(crate) fn check_usable(&mut self) {
        self.check_size();
        self.pass(Duration::from_secs(60));
        self.device.reset(self.now);
        assert!(self.device.next_deadline().is_none(), "something is at work after a reset");
        let setup = Setup { request_type: 0, request: 9, value: 1, index: 0, length: 0 };
        assert_eq!(self.device.control(setup, &[], self.now), ControlOutcome::Done(Vec::new()));
        let (interfaces, slots) = self.shape();
        for id in 0..interfaces * slots {
            self.device.insert(SlotId(id), self.now);
        }
        self.take_actions();
        for interface in 0..interfaces {
            for slot in 0..slots {
                self.check_slot(interface, slot);
            }
        }
    }

    fn check_slot(&mut self, interface: u8, slot: u8) {
        let atr = Atr::t1(b"usable").expect("an ATR");
        let apdu = [0x00, 0xA4, 0x04, 0x00];
        let answer = self.exchange(interface, &message(0x65, slot, 1, &[]));
        assert_eq!(answer[..], [0x81, 0, 0, 0, 0, slot, 1, 1, 0, 0]);
        // Several interfaces have one slot each.
        let id = SlotId(interface + slot);
        self.send(interface, &message(0x62, slot, 2, &[]));
        let token = match self.device.poll_action() {
            Some(Action::PowerOn { token, slot }) if slot == id => token,
            other => panic!("{other:?} instead of a power-on of {id:?}"),
        };
        self.device.complete(token, Outcome::Powered(atr.clone()), self.now);
        assert_eq!(self.receive(interface)[10..], *atr.as_bytes());
        self.send(interface, &message(0x6F, slot, 3, &apdu));
        let token = match self.device.poll_action() {
            Some(Action::Transmit { token, command, .. }) if command.as_bytes() == apdu => token,
            other => panic!("{other:?} instead of a command to {id:?}"),
        };
        self.device.complete(token, Outcome::Response(StatusWord::SUCCESS.into()), self.now);
        assert_eq!(self.receive(interface)[5..], [slot, 3, 0, 0, 0, 0x90, 0]);
    }

    fn exchange(&mut self, interface: u8, message: &[u8]) -> Vec<u8> {
        self.send(interface, message);
        self.receive(interface)
    }

    fn send(&mut self, interface: u8, message: &[u8]) {
        let outcome = self.device.bulk_out(2 * interface + 1, message, self.now);
        assert_eq!(outcome, TransferOutcome::Accepted);
    }

    fn receive(&mut self, interface: u8) -> Vec<u8> {
        let address = 0x81 + 2 * interface;
        match self.device.bulk_in(address, WHOLE) {
            InOutcome::Data(data) => {
                assert!(!self.device.in_ready(address), "two answers to one message");
                data.expose().to_vec()
            }
            other => panic!("{other:?} instead of an answer"),
        }
    }
}

/// A message to the reader (USB CCID 1.1 §6.1).
pub(crate) fn message(kind: u8, slot: u8, seq: u8, data: &[u8]) -> Vec<u8> {
    let mut message = vec![kind];
    message.extend((data.len() as u32).to_le_bytes());
    message.extend([slot, seq, 0, 0, 0]);
    message.extend(data);
    message
}
