//! A guest and an embedder in one, for tests.

use std::time::{Duration, Instant};

use ccid_device::{
    Action, CardFailure, ControlOutcome, Device, DeviceConfig, InOutcome, Layout, Outcome, Setup, SlotId,
    Speed, Token, TransferOutcome,
};
use vscard_protocol::{Atr, Command, Response, Secret, StatusWord};

pub(crate) const OUT: u8 = 0x01;
pub(crate) const IN: u8 = 0x81;
pub(crate) const INTERRUPT: u8 = 0x82;

/// Bytes as hexadecimal digits; what is not one is left out.
pub(crate) fn bytes(hex: &str) -> Vec<u8> {
    let digits: Vec<u8> =
        hex.chars().filter_map(|digit| digit.to_digit(16)).map(|digit| digit as u8).collect();
    assert!(digits.len() % 2 == 0, "{hex}");
    digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02X}")).collect()
}

pub(crate) fn config(layout: Layout, max_message: u32) -> DeviceConfig {
    DeviceConfig { layout, max_message, speed: Speed::Full, ..DeviceConfig::new("test") }
}

pub(crate) fn atr() -> Atr {
    Atr::t1(b"echo").unwrap()
}

/// As DataBlock carries it.
pub(crate) const ATR: &str = "3B848131FE456563686F8E";

pub(crate) fn message(kind: u8, slot: u8, seq: u8, specific: [u8; 3], data: &[u8]) -> Vec<u8> {
    let mut message = vec![kind];
    message.extend((data.len() as u32).to_le_bytes());
    message.extend([slot, seq]);
    message.extend(specific);
    message.extend(data);
    message
}

pub(crate) struct Guest {
    pub(crate) device: Device,
    pub(crate) config: DeviceConfig,
    pub(crate) now: Instant,
}

impl Guest {
    /// A device that is configured, with no card in.
    pub(crate) fn new(layout: Layout, max_message: u32) -> Self {
        let config = config(layout, max_message);
        let device = Device::new(config.clone()).unwrap();
        let mut guest = Self { device, config, now: Instant::now() };
        guest.configure();
        guest
    }

    /// One slot with a card in that is powered; its changes were told.
    pub(crate) fn powered(max_message: u32) -> Self {
        let mut guest = Self::new(Layout::Slots(1), max_message);
        guest.insert(0);
        assert_eq!(guest.notification().unwrap(), "5003");
        guest.power_on();
        guest
    }

    pub(crate) fn configure(&mut self) {
        assert_eq!(self.control("00 09 0100 0000 0000"), Some(String::new()));
    }

    pub(crate) fn power_on(&mut self) {
        assert_eq!(
            self.ask("62 00000000 00 00 00 0000"),
            format!("800B000000 00 00 00 00 00{ATR}").replace(' ', "")
        );
    }

    /// The eight bytes of a setup packet.
    pub(crate) fn control(&mut self, setup: &str) -> Option<String> {
        let setup = bytes(setup);
        let word = |at: usize| u16::from_le_bytes([setup[at], setup[at + 1]]);
        let setup = Setup {
            request_type: setup[0],
            request: setup[1],
            value: word(2),
            index: word(4),
            length: word(6),
        };
        match self.device.control(setup, &[], self.now) {
            ControlOutcome::Done(data) => Some(hex(&data)),
            ControlOutcome::Stall => None,
        }
    }

    pub(crate) fn send_bytes(&mut self, data: &[u8]) {
        assert_eq!(self.device.bulk_out(OUT, data, self.now), TransferOutcome::Accepted);
        assert!(
            data.len() % 64 != 0 || self.device.bulk_out(OUT, &[], self.now) == TransferOutcome::Accepted
        );
    }

    pub(crate) fn send(&mut self, hex: &str) {
        self.send_bytes(&bytes(hex));
    }

    pub(crate) fn read_bytes(&mut self) -> Option<Secret> {
        assert_eq!(self.device.in_ready(IN), self.device.in_ready(IN));
        match self.device.bulk_in(IN, 1 << 17) {
            InOutcome::Data(data) => Some(data),
            InOutcome::Nothing => None,
            InOutcome::Stall => panic!("bulk-IN stalls"),
        }
    }

    pub(crate) fn read(&mut self) -> Option<String> {
        self.read_bytes().map(|data| hex(data.expose()))
    }

    /// Sends a message, lets the card work, and reads the one answer.
    pub(crate) fn ask(&mut self, hex: &str) -> String {
        self.send(hex);
        self.work();
        let answer = self.read().unwrap_or_else(|| panic!("no answer to {hex}"));
        assert_eq!(self.read(), None, "a second answer to {hex}");
        answer
    }

    pub(crate) fn notification(&mut self) -> Option<String> {
        match self.device.interrupt_in(INTERRUPT) {
            InOutcome::Data(data) => Some(hex(data.expose())),
            InOutcome::Nothing => None,
            InOutcome::Stall => panic!("interrupt-IN stalls"),
        }
    }

    pub(crate) fn insert(&mut self, slot: u8) {
        self.device.insert(SlotId(slot), self.now);
    }

    pub(crate) fn remove(&mut self, slot: u8) {
        self.device.remove(SlotId(slot), self.now);
    }

    /// Does all actions with a card that answers each command with the command and 9000.
    pub(crate) fn work(&mut self) {
        while let Some(action) = self.device.poll_action() {
            match action {
                Action::PowerOn { token, .. } => self.complete(token, Outcome::Powered(atr())),
                Action::PowerOff { .. } => {}
                Action::Transmit { token, command, .. } => {
                    let response = Response::new(command.as_bytes(), StatusWord::SUCCESS);
                    self.complete(token, Outcome::Response(response));
                }
            }
        }
    }

    pub(crate) fn complete(&mut self, token: Token, outcome: Outcome) {
        self.device.complete(token, outcome, self.now);
    }

    pub(crate) fn respond(&mut self, token: Token, data: &[u8]) {
        self.complete(token, Outcome::Response(Response::new(data, StatusWord::SUCCESS)));
    }

    pub(crate) fn fail(&mut self, token: Token, failure: CardFailure) {
        self.complete(token, Outcome::Failed(failure));
    }

    /// The next action, which is to give the card a command.
    pub(crate) fn transmit(&mut self) -> (Token, Command) {
        match self.device.poll_action() {
            Some(Action::Transmit { token, command, .. }) => (token, command),
            other => panic!("{other:?}"),
        }
    }

    /// The next actions as words.
    pub(crate) fn actions(&mut self) -> Vec<String> {
        std::iter::from_fn(|| self.device.poll_action())
            .map(|action| match action {
                Action::PowerOn { slot, .. } => format!("on {}", slot.0),
                Action::PowerOff { slot } => format!("off {}", slot.0),
                Action::Transmit { slot, .. } => format!("transmit {}", slot.0),
            })
            .collect()
    }

    /// Time goes by; deadlines are met.
    pub(crate) fn wait(&mut self, milliseconds: u64) {
        let end = self.now + Duration::from_millis(milliseconds);
        while let Some(deadline) = self.device.next_deadline().filter(|deadline| *deadline <= end) {
            self.now = deadline;
            self.device.handle_deadline(deadline);
        }
        self.now = end;
    }
}
