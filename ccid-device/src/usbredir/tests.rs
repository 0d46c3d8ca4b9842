//! The session against a model of QEMU's side, with a real device and a card that echoes.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use vscard_protocol::{Atr, Response, Validity};

use super::codec::{Caps, MAX_DATA, PacketType};
use super::endpoint::MOST_PENDING;
use super::{CloseReason, ConnectionId, DecodeError, Input, Notice, Output, Session};
use crate::{Action, CardFailure, Device, DeviceConfig, Layout, Outcome, SlotId, Token};

const BULK_OUT: u8 = 0x01;
const BULK_IN: u8 = 0x81;
const INTERRUPT: u8 = 0x82;
const QEMU_CAPS: u32 = 0xFF;
const ATR: [u8; 4] = [0x3B, 0x80, 0x01, 0x81];

/// A packet from the device's side.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Packet {
    kind: PacketType,
    id: u64,
    body: Vec<u8>,
}

impl Packet {
    fn short(&self) -> (PacketType, u64, &[u8]) {
        (self.kind, self.id, &self.body)
    }
}

/// The guest's end of one connection.
#[derive(Default)]
struct Peer {
    caps: u32,
    agreed: Option<Caps>,
    bytes: Vec<u8>,
    packets: VecDeque<Packet>,
    closed: Option<CloseReason>,
    /// How often it got what every VMM passes over.
    asked: usize,
}

impl Peer {
    /// Reads as QEMU's parser does: strictly.
    fn read(&mut self) {
        loop {
            let narrow = !self.agreed.is_some_and(|caps| caps.has(Caps::WIDE_IDS));
            let header = if narrow { 12 } else { 16 };
            if self.bytes.len() < header {
                return;
            }
            let kind = PacketType(u32::from_le_bytes(self.bytes[..4].try_into().unwrap()));
            let length = u32::from_le_bytes(self.bytes[4..8].try_into().unwrap()) as usize;
            if self.bytes.len() < header + length {
                return;
            }
            let mut id = [0; 8];
            id[..header - 8].copy_from_slice(&self.bytes[8..header]);
            let body = self.bytes[header..header + length].to_vec();
            self.bytes.drain(..header + length);
            let packet = Packet { kind, id: u64::from_le_bytes(id), body };
            self.check(&packet);
            if packet.short() == (PacketType::INTERRUPT_RECEIVING_STATUS, 0, &[0, 0x83]) {
                self.asked += 1;
            } else {
                self.packets.push_back(packet);
            }
        }
    }

    fn check(&mut self, Packet { kind, body, .. }: &Packet) {
        let Some(caps) = self.agreed else {
            assert_eq!((*kind, body.len()), (PacketType::HELLO, 68), "the first packet");
            assert_eq!(body[64..], 0x7E_u32.to_le_bytes());
            self.agreed = Some(Caps(0x7E & self.caps));
            return;
        };
        let when = |cap, more| if caps.has(cap) { more } else { 0 };
        match *kind {
            PacketType::EP_INFO => assert_eq!(body.len(), 96 + when(Caps::MAX_PACKET_SIZE, 64)),
            PacketType::INTERFACE_INFO => assert_eq!(body.len(), 132),
            PacketType::DEVICE_CONNECT => assert_eq!(body.len(), 8 + when(Caps::CONNECT_VERSION, 2)),
            PacketType::DEVICE_DISCONNECT => assert!(body.is_empty()),
            PacketType::CONFIGURATION_STATUS | PacketType::INTERRUPT_RECEIVING_STATUS => {
                assert_eq!(body.len(), 2);
            }
            PacketType::ALT_SETTING_STATUS => assert_eq!(body.len(), 3),
            PacketType::CONTROL_PACKET => {
                let length = usize::from(u16::from_le_bytes([body[8], body[9]]));
                assert_eq!(body.len() - 10, if body[0] & 0x80 == 0 { 0 } else { length });
            }
            PacketType::BULK_PACKET => {
                let header = 8 + when(Caps::LONG_BULK, 2);
                let (length, data) = self.bulk(body);
                assert_eq!(body.len(), header + data.len());
                assert_eq!(data.len(), if body[0] & 0x80 == 0 { 0 } else { length });
            }
            PacketType::INTERRUPT_PACKET => {
                let length = usize::from(u16::from_le_bytes([body[2], body[3]]));
                assert_eq!(body.len() - 4, if body[0] & 0x80 == 0 { 0 } else { length });
            }
            other => panic!("{other} is not for the guest's side"),
        }
    }

    /// Length field and data of a bulk_packet.
    fn bulk<'a>(&self, body: &'a [u8]) -> (usize, &'a [u8]) {
        let low = usize::from(u16::from_le_bytes([body[2], body[3]]));
        if self.agreed.unwrap().has(Caps::LONG_BULK) {
            (usize::from(u16::from_le_bytes([body[8], body[9]])) << 16 | low, &body[10..])
        } else {
            (low, &body[8..])
        }
    }
}

struct World {
    device: Device,
    session: Session,
    now: Instant,
    peers: BTreeMap<u64, Peer>,
    notices: Vec<Notice>,
    /// Connections that were to be filled.
    filled: Vec<u64>,
    /// Commands are answered by the card as they come.
    prompt: bool,
    commands: VecDeque<(Token, Vec<u8>)>,
    power_offs: usize,
}

impl World {
    fn with(config: DeviceConfig) -> Self {
        let now = Instant::now();
        let mut device = Device::new(config).unwrap();
        let slots: Vec<SlotId> = device.slots().collect();
        slots.into_iter().for_each(|slot| device.insert(slot, now));
        Self {
            device,
            session: Session::new(),
            now,
            peers: BTreeMap::new(),
            notices: Vec::new(),
            filled: Vec::new(),
            prompt: true,
            commands: VecDeque::new(),
            power_offs: 0,
        }
    }

    fn new() -> Self {
        Self::with(DeviceConfig::new("test"))
    }

    /// The same guest, which may migrate.
    fn migrating() -> Self {
        let mut world = Self { session: Session::migrating(), ..Self::new() };
        world.start(1, QEMU_CAPS);
        world
    }

    /// A guest of QEMU 7.2, configured.
    fn started() -> Self {
        let mut world = Self::new();
        world.start(1, QEMU_CAPS);
        world
    }

    fn start(&mut self, peer: u64, caps: u32) {
        self.connect(peer, caps);
        self.say(peer, &hello(caps));
        self.send(peer, PacketType::RESET, 0, &[]);
        self.send(peer, PacketType::SET_CONFIGURATION, 9, &[1]);
        let packets = self.take(peer);
        let kinds: Vec<_> = packets.iter().map(|packet| packet.kind).collect();
        let device = [PacketType::EP_INFO, PacketType::INTERFACE_INFO];
        let attach = [PacketType::HELLO, device[0], device[1], PacketType::DEVICE_CONNECT];
        let configure = [device[0], device[1], PacketType::CONFIGURATION_STATUS];
        assert_eq!(kinds, [&attach[..], &configure].concat());
        assert_eq!(packets.last().unwrap().short(), (PacketType::CONFIGURATION_STATUS, 9, &[0, 1][..]));
        assert!(self.session.is_attached());
    }

    fn connect(&mut self, peer: u64, caps: u32) {
        self.peers.insert(peer, Peer { caps, ..Peer::default() });
        self.input(Input::Connected(ConnectionId(peer)));
    }

    /// A connection of the QEMU that `old` has migrated to.
    fn connect_destination(&mut self, old: u64, peer: u64) {
        let Peer { caps, agreed, .. } = self.peers[&old];
        self.peers.insert(peer, Peer { caps, agreed, ..Peer::default() });
        self.input(Input::Connected(ConnectionId(peer)));
    }

    fn input(&mut self, input: Input<'_>) {
        self.session.handle(input, &mut self.device, self.now);
        self.settle();
    }

    fn settle(&mut self) {
        loop {
            while let Some(output) = self.session.poll_output() {
                match output {
                    Output::Send(ConnectionId(peer), bytes) => {
                        let peer = self.peers.get_mut(&peer).unwrap();
                        assert_eq!(peer.closed, None, "after a close");
                        peer.bytes.extend_from_slice(bytes.expose());
                        peer.read();
                    }
                    Output::Fill(ConnectionId(peer), bytes) => {
                        assert_eq!(bytes.expose()[..8], [17, 0, 0, 0, 2, 0, 0, 0]);
                        self.filled.push(peer);
                    }
                    Output::Close(ConnectionId(peer), reason) => {
                        let closed = &mut self.peers.get_mut(&peer).unwrap().closed;
                        assert_eq!(closed.replace(reason), None, "closed twice");
                    }
                    Output::Notice(notice) => self.notices.push(notice),
                }
            }
            let mut ready = false;
            while let Some(action) = self.device.poll_action() {
                match action {
                    Action::PowerOn { token, .. } => {
                        let atr = Atr::parse(&ATR).unwrap();
                        self.device.complete(token, Outcome::Powered(atr), self.now);
                        ready = true;
                    }
                    Action::PowerOff { .. } => self.power_offs += 1,
                    Action::Transmit { token, command, .. } => {
                        self.commands.push_back((token, command.as_bytes().to_vec()));
                        if self.prompt {
                            ready |= self.answer();
                        }
                    }
                }
            }
            if !ready {
                return;
            }
            self.session.handle(Input::DeviceReady, &mut self.device, self.now);
        }
    }

    /// The card answers the oldest command with the command itself and 9000.
    fn answer(&mut self) -> bool {
        let Some((token, mut bytes)) = self.commands.pop_front() else { return false };
        bytes.extend([0x90, 0x00]);
        let outcome = match Response::parse(&bytes) {
            Ok(response) => Outcome::Response(response),
            Err(_) => Outcome::Failed(CardFailure::Hardware),
        };
        self.device.complete(token, outcome, self.now);
        true
    }

    fn answer_now(&mut self) {
        assert!(self.answer());
        self.input(Input::DeviceReady);
    }

    fn say(&mut self, peer: u64, bytes: &[u8]) {
        self.input(Input::Received(ConnectionId(peer), bytes));
    }

    fn packet(&self, peer: u64, kind: PacketType, id: u64, body: &[u8]) -> Vec<u8> {
        packet(self.peers[&peer].agreed.unwrap(), kind, id, body)
    }

    fn send(&mut self, peer: u64, kind: PacketType, id: u64, body: &[u8]) {
        let bytes = self.packet(peer, kind, id, body);
        self.say(peer, &bytes);
    }

    fn take(&mut self, peer: u64) -> Vec<Packet> {
        self.peers.get_mut(&peer).unwrap().packets.drain(..).collect()
    }

    #[track_caller]
    fn take_one(&mut self, peer: u64) -> Packet {
        let mut packets = self.take(peer);
        assert_eq!(packets.len(), 1, "{packets:?}");
        packets.remove(0)
    }

    fn closed(&self, peer: u64) -> Option<&CloseReason> {
        self.peers[&peer].closed.as_ref()
    }

    fn is_quiet(&self) -> bool {
        self.peers.values().all(|peer| peer.packets.is_empty() && peer.bytes.is_empty())
    }

    fn bulk_body(&self, peer: u64, endpoint: u8, length: usize, data: &[u8]) -> Vec<u8> {
        let [l0, l1, l2, l3] = (length as u32).to_le_bytes();
        let mut body = vec![endpoint, 0, l0, l1, 0, 0, 0, 0];
        if self.peers[&peer].agreed.unwrap().has(Caps::LONG_BULK) {
            body.extend([l2, l3]);
        }
        body.extend(data);
        body
    }

    /// A bulk OUT transfer.
    fn out(&mut self, peer: u64, id: u64, data: &[u8]) {
        let body = self.bulk_body(peer, BULK_OUT, data.len(), data);
        self.send(peer, PacketType::BULK_PACKET, id, &body);
    }

    /// A bulk IN transfer.
    fn ask(&mut self, peer: u64, id: u64) {
        let body = self.bulk_body(peer, BULK_IN, 65_000, &[]);
        self.send(peer, PacketType::BULK_PACKET, id, &body);
    }

    #[track_caller]
    fn control_in(&mut self, peer: u64, setup: [u8; 8]) -> (u8, Vec<u8>) {
        let [request_type, request, v0, v1, i0, i1, l0, l1] = setup;
        let body = [request_type & 0x80, request, request_type, 0, v0, v1, i0, i1, l0, l1];
        self.send(peer, PacketType::CONTROL_PACKET, 77, &body);
        let Packet { kind, id, body } = self.take_one(peer);
        assert_eq!((kind, id, body[1], body[2]), (PacketType::CONTROL_PACKET, 77, request, request_type));
        (body[3], body[10..].to_vec())
    }

    /// Status and data of an answer to a bulk transfer.
    #[track_caller]
    fn bulk_answer(&self, peer: u64, packet: &Packet, id: u64, endpoint: u8) -> (u8, Vec<u8>) {
        assert_eq!((packet.kind, packet.id, packet.body[0]), (PacketType::BULK_PACKET, id, endpoint));
        (packet.body[1], self.peers[&peer].bulk(&packet.body).1.to_vec())
    }

    /// The one packet there is answers bulk IN transfer `id` with `message`.
    #[track_caller]
    fn expect_in(&mut self, peer: u64, id: u64, message: &[u8]) {
        let packet = self.take_one(peer);
        assert_eq!(self.bulk_answer(peer, &packet, id, BULK_IN), (0, message.to_vec()));
    }

    #[track_caller]
    fn expect_cancelled(&mut self, peer: u64, id: u64) {
        let packet = self.take_one(peer);
        assert_eq!(self.bulk_answer(peer, &packet, id, BULK_IN), (1, Vec::new()));
    }

    #[track_caller]
    fn expect_out_done(&mut self, peer: u64, id: u64) {
        let packet = self.take_one(peer);
        assert_eq!(self.bulk_answer(peer, &packet, id, BULK_OUT), (0, Vec::new()));
    }

    fn power_on(&mut self, peer: u64) {
        self.out(peer, 100, &ccid(0x62, 0, &[]));
        self.expect_out_done(peer, 100);
        self.ask(peer, 101);
        self.expect_in(peer, 101, &reply(0, &ATR));
    }

    /// The VM of the connection in use has stopped, and so reads nothing.
    fn reads_nothing(&mut self) {
        self.pass(Duration::from_millis(100));
    }

    fn expire(&mut self, seconds: u64) {
        self.pass(Duration::from_secs(seconds));
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        while self.session.next_deadline().is_some_and(|at| at <= self.now) {
            self.session.handle_deadline(&mut self.device, self.now);
        }
        self.settle();
    }
}

fn packet(caps: Caps, kind: PacketType, id: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = kind.0.to_le_bytes().to_vec();
    bytes.extend((body.len() as u32).to_le_bytes());
    let id = id.to_le_bytes();
    bytes.extend(if caps.has(Caps::WIDE_IDS) { &id[..] } else { &id[..4] });
    bytes.extend(body);
    bytes
}

fn hello(caps: u32) -> Vec<u8> {
    let mut body = b"qemu usb-redir guest 7.2.22".to_vec();
    body.resize(64, 0);
    body.extend(caps.to_le_bytes());
    packet(Caps::default(), PacketType::HELLO, 0, &body)
}

fn ccid(kind: u8, seq: u8, data: &[u8]) -> Vec<u8> {
    let mut bytes = vec![kind];
    bytes.extend((data.len() as u32).to_le_bytes());
    bytes.extend([0, seq, 0, 0, 0]);
    bytes.extend(data);
    bytes
}

/// RDR_to_PC_DataBlock, all well.
fn reply(seq: u8, data: &[u8]) -> Vec<u8> {
    ccid(0x80, seq, data)
}

fn echo(seq: u8, command: &[u8]) -> Vec<u8> {
    reply(seq, &[command, &[0x90, 0x00]].concat())
}

const COMMAND: [u8; 9] = [0x00, 0x20, 0x00, 0x80, 0x04, 0x31, 0x32, 0x33, 0x34];

// ---- start-up ---------------------------------------------------------------------------------------------

#[test]
fn nothing_is_said_before_the_guests_hello() {
    let mut world = World::new();
    world.connect(1, QEMU_CAPS);
    world.input(Input::DeviceReady);
    world.expire(100_000);
    assert!(world.is_quiet());
    let hello = hello(QEMU_CAPS);
    for byte in &hello[..hello.len() - 1] {
        world.say(1, &[*byte]);
        assert!(world.is_quiet());
    }
    world.say(1, &hello[hello.len() - 1..]);
    assert_eq!(world.take(1).len(), 4);
    assert_eq!(world.notices, [Notice::Connected { version: "qemu usb-redir guest 7.2.22".to_owned() }]);
}

#[test]
fn what_is_said_of_the_device() {
    let mut world = World::with(DeviceConfig { layout: Layout::Interfaces(2), ..DeviceConfig::new("x") });
    world.connect(1, QEMU_CAPS);
    world.say(1, &hello(QEMU_CAPS));
    let packets = world.take(1);
    let [hello, endpoints, interfaces, device] = &packets[..] else { panic!("{packets:?}") };
    assert!(hello.body.starts_with(b"ccid-device "));
    let endpoints = &endpoints.body;
    let mut kinds = [255; 32];
    kinds[0] = 0;
    kinds[16] = 0;
    for (address, kind) in [(0x01, 2), (0x81, 2), (0x82, 3), (0x03, 2), (0x83, 2), (0x84, 3)] {
        let index = usize::from(address >> 3 & 0x10 | address & 0x0F);
        kinds[index] = kind;
        assert_eq!(endpoints[32 + index] > 0, kind == 3, "interval of {address:#x}");
        assert_eq!(endpoints[64 + index], (address & 0x0F) / 3, "interface of {address:#x}");
        let size = u16::from_le_bytes([endpoints[96 + 2 * index], endpoints[97 + 2 * index]]);
        assert_eq!(size, if kind == 3 { 8 } else { 512 });
    }
    assert_eq!(endpoints[..32], kinds);
    assert_eq!(interfaces.body[..8], [2, 0, 0, 0, 0, 1, 0, 0]);
    assert_eq!(interfaces.body[36..39], [0x0B, 0x0B, 0]);
    assert_eq!(device.body, [2, 0, 0, 0, 0xE6, 0x08, 0x33, 0x44, 0x00, 0x01]);
}

#[test]
fn a_linux_guest_enumerates() {
    let mut world = World::started();
    for _ in 0..4 {
        world.send(1, PacketType::RESET, 0, &[]);
    }
    let (status, device) = world.control_in(1, [0x80, 6, 0, 1, 0, 0, 64, 0]);
    assert_eq!((status, device.len(), &device[8..12]), (0, 18, &[0xE6, 0x08, 0x33, 0x44][..]));
    assert_eq!(world.control_in(1, [0x80, 6, 0, 1, 0, 0, 8, 0]).1, device[..8]);
    let (_, head) = world.control_in(1, [0x80, 6, 0, 2, 0, 0, 9, 0]);
    let [.., l0, l1] = head[..4] else { panic!() };
    let (status, all) = world.control_in(1, [0x80, 6, 0, 2, 0, 0, l0, l1]);
    assert_eq!((status, all.len()), (0, usize::from(u16::from_le_bytes([l0, l1]))));
    assert_eq!(world.control_in(1, [0x80, 6, 99, 3, 9, 4, 255, 0]), (4, vec![]), "STALL");

    world.send(1, PacketType::GET_CONFIGURATION, 5, &[]);
    assert_eq!(world.take_one(1).short(), (PacketType::CONFIGURATION_STATUS, 5, &[0, 0][..]));
    world.send(1, PacketType::SET_CONFIGURATION, 6, &[1]);
    assert_eq!(world.take(1)[2].short(), (PacketType::CONFIGURATION_STATUS, 6, &[0, 1][..]));
    world.send(1, PacketType::SET_CONFIGURATION, 7, &[3]);
    assert_eq!(world.take_one(1).short(), (PacketType::CONFIGURATION_STATUS, 7, &[4, 1][..]));
    world.send(1, PacketType::GET_ALT_SETTING, 8, &[0]);
    assert_eq!(world.take_one(1).short(), (PacketType::ALT_SETTING_STATUS, 8, &[0, 0, 0][..]));
    world.send(1, PacketType::SET_ALT_SETTING, 9, &[0, 0]);
    assert_eq!(world.take(1)[2].short(), (PacketType::ALT_SETTING_STATUS, 9, &[0, 0, 0][..]));
    world.send(1, PacketType::SET_ALT_SETTING, 10, &[0, 1]);
    assert_eq!(world.take_one(1).short(), (PacketType::ALT_SETTING_STATUS, 10, &[4, 0, 1][..]));

    world.send(1, PacketType::START_INTERRUPT_RECEIVING, 11, &[INTERRUPT]);
    let packets = world.take(1);
    assert_eq!(packets[0].short(), (PacketType::INTERRUPT_RECEIVING_STATUS, 11, &[0, INTERRUPT][..]));
    assert_eq!(packets[1].short(), (PacketType::INTERRUPT_PACKET, 0, &[INTERRUPT, 0, 2, 0, 0x50, 3][..]));

    world.power_on(1);
    world.ask(1, 12);
    assert!(world.is_quiet(), "there is no NAK");
    world.out(1, 13, &ccid(0x6F, 1, &COMMAND));
    let packets = world.take(1);
    assert_eq!(world.bulk_answer(1, &packets[0], 13, BULK_OUT), (0, vec![]));
    assert_eq!(world.bulk_answer(1, &packets[1], 12, BULK_IN), (0, echo(1, &COMMAND)));
    assert_eq!(world.peers[&1].bulk(&packets[0].body).0, 19, "bytes accepted");
}

#[test]
fn peers_of_every_capability() {
    for caps in 0..=0xFF {
        let mut world = World { session: Session::migrating(), ..World::new() };
        world.start(1, caps);
        world.power_on(1);
        let old = caps & 0x70 != 0x70;
        assert_eq!(world.notices.contains(&Notice::OldPeer), old, "{caps:#x}");
        world.unplug_and_plug(1, caps & 8 != 0);
        world.connect_destination(1, 2);
        world.send(2, PacketType::GET_CONFIGURATION, u64::MAX, &[]);
        world.reads_nothing();
        let id = if caps & 0x20 != 0 { u64::MAX } else { u32::MAX.into() };
        assert!(world.take(2).iter().any(|packet| packet.id == id));
    }
}

#[test]
fn a_peer_without_any_capability_word() {
    let mut world = World::new();
    world.connect(1, 0);
    let hello = hello(0);
    let mut short = hello[..76].to_vec();
    short[4] = 64;
    world.say(1, &short);
    assert_eq!(world.take(1).len(), 4);
}

#[test]
fn standard_requests_that_come_as_control_packets() {
    let mut world = World::started();
    world.power_on(1);
    world.ask(1, 1);
    world.ask(1, 2);
    world.send(1, PacketType::CONTROL_PACKET, 3, &[0, 9, 0, 0, 1, 0, 0, 0, 0, 0]);
    let packets = world.take(1);
    assert_eq!(world.bulk_answer(1, &packets[0], 1, BULK_IN).0, 1);
    assert_eq!(world.bulk_answer(1, &packets[1], 2, BULK_IN).0, 1);
    assert_eq!((packets[2].id, packets[2].body[3]), (3, 0));
    world.ask(1, 4);
    world.send(1, PacketType::CONTROL_PACKET, 5, &[0, 11, 1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(world.take(1).iter().map(|packet| packet.id).collect::<Vec<_>>(), [4, 5]);
    // The direction is told twice.
    world.send(1, PacketType::CONTROL_PACKET, 6, &[0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(world.take_one(1).body[3], 2);
}

// ---- transfers --------------------------------------------------------------------------------------------

#[test]
fn cancel_of_a_transfer_that_waits() {
    let mut world = World::started();
    world.power_on(1);
    world.ask(1, 1);
    world.ask(1, 2);
    world.send(1, PacketType::CANCEL_DATA_PACKET, 1, &[]);
    world.expect_cancelled(1, 1);
    world.send(1, PacketType::CANCEL_DATA_PACKET, 1, &[]);
    world.send(1, PacketType::CANCEL_DATA_PACKET, 99, &[]);
    assert!(world.is_quiet(), "one answer for each transfer");
    world.out(1, 3, &ccid(0x6F, 1, &COMMAND));
    let packets = world.take(1);
    assert_eq!(world.bulk_answer(1, &packets[1], 2, BULK_IN), (0, echo(1, &COMMAND)));
}

#[test]
fn an_answer_that_crossed_its_cancel_comes_again() {
    let mut world = World::started();
    world.power_on(1);
    world.ask(1, 1);
    world.out(1, 2, &ccid(0x6F, 1, &COMMAND));
    assert_eq!(world.take(1).len(), 2);
    world.send(1, PacketType::CANCEL_DATA_PACKET, 1, &[]);
    assert!(world.is_quiet(), "it was answered");
    world.ask(1, 3);
    world.expect_in(1, 3, &echo(1, &COMMAND));
    // A new transfer with an old id: the guest has seen the answer to the old one.
    world.ask(1, 3);
    world.send(1, PacketType::CANCEL_DATA_PACKET, 3, &[]);
    world.expect_cancelled(1, 3);
    world.send(1, PacketType::CANCEL_DATA_PACKET, 3, &[]);
    world.ask(1, 4);
    assert!(world.is_quiet());
}

#[test]
fn answers_that_crossed_their_cancels_come_again_in_order() {
    for (at_once, order) in [(true, [1, 2, 3]), (true, [3, 1, 2]), (false, [3, 2, 1])] {
        let mut world = World::started();
        for id in 1..=3 {
            world.ask(1, id);
        }
        for seq in 0..3 {
            world.out(1, 50, &ccid(0x65, seq, &[]));
        }
        assert_eq!(world.take(1).len(), 6);
        let cancels = order.map(|id| world.packet(1, PacketType::CANCEL_DATA_PACKET, id, &[]));
        if at_once {
            world.say(1, &cancels.concat());
        } else {
            cancels.iter().for_each(|cancel| world.say(1, cancel));
        }
        assert!(world.is_quiet());
        for seq in 0..3 {
            world.ask(1, 60);
            let packet = world.take_one(1);
            assert_eq!(world.bulk_answer(1, &packet, 60, BULK_IN).1[6], seq, "{order:?}");
        }
    }
}

#[test]
fn an_old_answer_is_not_kept() {
    let mut world = World::started();
    world.power_on(1);
    assert!(world.session.next_deadline().is_some());
    world.expire(31);
    assert_eq!(world.session.next_deadline(), None);
    assert_eq!(world.session.kept(), [(0, 0)]);
    world.send(1, PacketType::CANCEL_DATA_PACKET, 101, &[]);
    world.ask(1, 1);
    assert!(world.is_quiet());
}

#[test]
fn few_answers_are_kept() {
    let mut world = World::started();
    world.power_on(1);
    for id in 0..40 {
        world.out(1, 1000, &ccid(0x65, 0, &[]));
        world.ask(1, id);
        world.take(1);
    }
    assert_eq!(world.session.kept(), [(16, 160)]);
    let mut long = vec![0x00, 0xD6, 0x00, 0x00, 0x00, 0xF0, 0x00];
    long.resize(7 + 0xF000 + 2, 0);
    for id in 0..20 {
        world.out(1, 1000, &ccid(0x6F, 0, &long));
        world.ask(1, id);
        world.take(1);
        let kept = world.session.kept();
        assert!(kept[0].1 > 0xF000 && kept[0].1 <= 256 * 1024, "{kept:?}");
    }
}

#[test]
fn reset_ends_everything() {
    let mut world = World::started();
    world.power_on(1);
    world.send(1, PacketType::START_INTERRUPT_RECEIVING, 1, &[INTERRUPT]);
    world.take(1);
    world.prompt = false;
    world.ask(1, 2);
    world.out(1, 3, &ccid(0x6F, 1, &COMMAND));
    world.expect_out_done(1, 3);
    world.send(1, PacketType::RESET, 0, &[]);
    world.expect_cancelled(1, 2);
    assert_eq!(world.power_offs, 1, "a verified PIN does not survive");
    assert_eq!(world.device.configuration(), 0);
    world.answer_now();
    world.device.remove(SlotId(0), world.now);
    world.input(Input::DeviceReady);
    // Its answer came before, so it is not owed another.
    world.send(1, PacketType::CANCEL_DATA_PACKET, 2, &[]);
    assert!(world.is_quiet());
    world.ask(1, 4);
    assert_eq!(world.take_one(1).body[1], 4, "no configuration, no endpoint");
    world.send(1, PacketType::SET_CONFIGURATION, 5, &[1]);
    assert_eq!(world.take(1).len(), 3);
    assert!(world.session.is_attached());
}

#[test]
fn clear_halt_forgets_answers() {
    let mut world = World::started();
    world.power_on(1);
    assert_eq!(world.control_in(1, [0x02, 1, 0, 0, BULK_IN, 0, 0, 0]).0, 0);
    world.send(1, PacketType::CANCEL_DATA_PACKET, 101, &[]);
    world.ask(1, 1);
    assert!(world.is_quiet());
    // A halted endpoint stalls who waits there.
    assert_eq!(world.control_in_raw(1, [0x02, 3, 0, 0, BULK_IN, 0, 0, 0]), [1, 77]);
}

#[test]
fn the_longest_messages_go_in_one_piece() {
    let mut world = World::started();
    world.power_on(1);
    let mut command = vec![0x00, 0xD6, 0x00, 0x00, 0x00, 0xFF, 0xFF];
    command.resize(7 + 0xFFFF + 2, 0x5A);
    assert_eq!(command.len(), 65_544);
    world.out(1, 1, &ccid(0x6F, 1, &command));
    let done = world.take_one(1);
    assert_eq!(world.peers[&1].bulk(&done.body).0, 65_554);
    assert_eq!(done.body[1], 0);
    let body = world.bulk_body(1, BULK_IN, 65_556, &[]);
    world.send(1, PacketType::BULK_PACKET, 2, &body);
    let answer = world.take_one(1);
    let (status, data) = world.bulk_answer(1, &answer, 2, BULK_IN);
    assert_eq!((status, data[0]), (0, 0x80));
}

#[test]
fn a_transfer_too_long_is_stalled_and_not_kept() {
    let mut world = World::started();
    let body = world.bulk_body(1, BULK_OUT, MAX_DATA + 1, &vec![0; MAX_DATA + 1]);
    world.send(1, PacketType::BULK_PACKET, 1, &body);
    assert_eq!(world.take_one(1).body[..2], [BULK_OUT, 4]);
    assert_eq!(world.notices.last(), Some(&Notice::TooLong { endpoint: BULK_OUT }));
    // It stays so until the guest clears it.
    world.out(1, 2, &ccid(0x65, 0, &[]));
    assert_eq!(world.take_one(1).body[..2], [BULK_OUT, 4]);
    assert_eq!(world.control_in(1, [0x02, 1, 0, 0, BULK_OUT, 0, 0, 0]).0, 0);
    world.out(1, 3, &ccid(0x65, 0, &[]));
    world.expect_out_done(1, 3);
}

#[test]
fn more_transfers_than_may_wait() {
    let mut world = World::started();
    for id in 0..MOST_PENDING as u64 {
        world.ask(1, id);
    }
    assert!(world.is_quiet());
    world.ask(1, 1000);
    assert_eq!(world.take_one(1).short().2[..2], [BULK_IN, 2]);
    world.send(1, PacketType::RESET, 0, &[]);
    let ids: Vec<_> = world.take(1).iter().map(|packet| packet.id).collect();
    assert_eq!(ids, (0..MOST_PENDING as u64).collect::<Vec<_>>());
}

#[test]
fn endpoints_that_are_none() {
    let mut world = World::started();
    for (endpoint, length) in [(0x00, 0), (0x82, 9), (0x85, 9), (0x02, 0), (0x80, 1)] {
        let body = world.bulk_body(1, endpoint, length, &[]);
        world.send(1, PacketType::BULK_PACKET, 3, &body);
        assert_eq!(world.take_one(1).body[..2], [endpoint, 2]);
    }
    world.send(1, PacketType::INTERRUPT_PACKET, 4, &[0x02, 0, 1, 0, 0xFF]);
    assert_eq!(world.take_one(1).short(), (PacketType::INTERRUPT_PACKET, 4, &[0x02, 2, 0, 0][..]));
    world.send(1, PacketType::START_INTERRUPT_RECEIVING, 5, &[BULK_IN]);
    let refused = (PacketType::INTERRUPT_RECEIVING_STATUS, 5, &[2, BULK_IN][..]);
    assert_eq!(world.take_one(1).short(), refused);
    world.send(1, PacketType::STOP_INTERRUPT_RECEIVING, 5, &[BULK_IN]);
    assert_eq!(world.take_one(1).short(), refused);
}

// ---- notifications ----------------------------------------------------------------------------------------

#[test]
fn notifications_flow_between_start_and_stop() {
    let mut world = World::started();
    assert!(world.is_quiet(), "not started");
    world.send(1, PacketType::START_INTERRUPT_RECEIVING, 1, &[INTERRUPT]);
    assert_eq!(world.take(1)[1].body[4..], [0x50, 3]);
    world.device.remove(SlotId(0), world.now);
    world.input(Input::DeviceReady);
    assert_eq!(
        world.take_one(1).short(),
        (PacketType::INTERRUPT_PACKET, 1, &[INTERRUPT, 0, 2, 0, 0x50, 2][..])
    );
    world.now += Duration::from_secs(5);
    world.send(1, PacketType::STOP_INTERRUPT_RECEIVING, 2, &[INTERRUPT]);
    assert_eq!(world.take_one(1).short().2, [0, INTERRUPT]);
    world.device.insert(SlotId(0), world.now);
    world.input(Input::DeviceReady);
    assert!(world.is_quiet());
    world.send(1, PacketType::START_INTERRUPT_RECEIVING, 3, &[INTERRUPT]);
    let packets = world.take(1);
    assert_eq!(packets[1].short(), (PacketType::INTERRUPT_PACKET, 0, &[INTERRUPT, 0, 2, 0, 0x50, 3][..]));
    // One that was sent long ago has arrived.
    world.now += Duration::from_secs(5);
    world.send(1, PacketType::STOP_INTERRUPT_RECEIVING, 4, &[INTERRUPT]);
    world.send(1, PacketType::START_INTERRUPT_RECEIVING, 5, &[INTERRUPT]);
    assert_eq!(world.take(1).len(), 2);
}

#[test]
fn a_notification_that_crossed_the_stop_is_repeated() {
    let mut world = World::started();
    world.send(1, PacketType::START_INTERRUPT_RECEIVING, 1, &[INTERRUPT]);
    world.now += Duration::from_millis(10);
    world.send(1, PacketType::STOP_INTERRUPT_RECEIVING, 2, &[INTERRUPT]);
    world.take(1);
    world.send(1, PacketType::START_INTERRUPT_RECEIVING, 3, &[INTERRUPT]);
    assert_eq!(world.take(1)[1].short().2, [INTERRUPT, 0, 2, 0, 0x50, 3]);
}

#[test]
fn a_halted_interrupt_endpoint_says_so() {
    let mut world = World::started();
    world.send(1, PacketType::START_INTERRUPT_RECEIVING, 1, &[INTERRUPT]);
    world.take(1);
    world.send(1, PacketType::CONTROL_PACKET, 2, &[0, 3, 2, 0, 0, 0, INTERRUPT, 0, 0, 0]);
    let packets = world.take(1);
    assert_eq!(packets[1].short(), (PacketType::INTERRUPT_RECEIVING_STATUS, 0, &[4, INTERRUPT][..]));
    world.input(Input::DeviceReady);
    assert!(world.is_quiet(), "said once");
}

// ---- plugging ---------------------------------------------------------------------------------------------

impl World {
    fn unplug(&mut self) {
        self.session.unplug(&mut self.device, self.now);
        self.settle();
    }

    fn plug(&mut self) {
        self.session.plug();
        self.settle();
    }

    fn unplug_and_plug(&mut self, peer: u64, acknowledges: bool) {
        self.unplug();
        assert_eq!(self.take_one(peer).kind, PacketType::DEVICE_DISCONNECT);
        self.plug();
        if acknowledges {
            assert!(self.is_quiet());
            self.send(peer, PacketType::DEVICE_DISCONNECT_ACK, 0, &[]);
        }
        assert_eq!(self.take(peer).last().unwrap().kind, PacketType::DEVICE_CONNECT);
    }

    /// A VM that was put back to a snapshot may have the device again, so it is told once more that it is gone. It may
    /// be paused.
    #[track_caller]
    fn plug_in(&mut self, peer: u64) {
        self.plug();
        assert_eq!(self.take_one(peer).kind, PacketType::DEVICE_DISCONNECT);
        self.expire(100);
        assert!(!self.session.is_attached() && !self.session.is_leaving());
        self.send(peer, PacketType::DEVICE_DISCONNECT_ACK, 0, &[]);
        assert_eq!(self.take(peer).len(), 3);
        assert!(self.session.is_attached());
    }

    /// Ids of the answers to a control request without data.
    fn control_in_raw(&mut self, peer: u64, setup: [u8; 8]) -> [u64; 2] {
        let [request_type, request, v0, v1, i0, i1, l0, l1] = setup;
        let body = [request_type & 0x80, request, request_type, 0, v0, v1, i0, i1, l0, l1];
        self.send(peer, PacketType::CONTROL_PACKET, 77, &body);
        let mut ids: Vec<_> = self.take(peer).iter().map(|packet| packet.id).collect();
        ids.sort_unstable();
        ids.try_into().unwrap()
    }
}

#[test]
fn unplugged_and_plugged_again() {
    let mut world = World::started();
    world.power_on(1);
    world.ask(1, 1);
    world.unplug();
    let packets = world.take(1);
    assert_eq!(world.bulk_answer(1, &packets[0], 1, BULK_IN).0, 1);
    assert_eq!(packets[1].kind, PacketType::DEVICE_DISCONNECT);
    assert_eq!((world.power_offs, world.session.is_attached()), (1, false));
    // What is under way is refused, each once.
    world.ask(1, 2);
    assert_eq!(world.take_one(1).body[1], 3);
    world.out(1, 3, &ccid(0x65, 0, &[]));
    assert_eq!(world.take_one(1).body[1], 3);
    assert_eq!(world.control_in(1, [0x80, 6, 0, 1, 0, 0, 18, 0]), (3, vec![]));
    world.send(1, PacketType::SET_CONFIGURATION, 4, &[1]);
    assert_eq!(world.take_one(1).body, [3, 0]);
    world.send(1, PacketType::DEVICE_DISCONNECT_ACK, 0, &[]);
    assert!(world.is_quiet());
    world.plug_in(1);
    world.send(1, PacketType::SET_CONFIGURATION, 5, &[1]);
    world.take(1);
    world.power_on(1);
    world.unplug_and_plug(1, true);
    world.plug();
    assert!(world.is_quiet());
}

#[test]
fn plugged_while_nobody_is_there() {
    let mut world = World::new();
    world.unplug();
    world.connect(1, QEMU_CAPS);
    world.say(1, &hello(QEMU_CAPS));
    assert_eq!(world.take(1).len(), 1, "hello alone");
    world.plug_in(1);
}

/// It keeps what it has until it runs again; nobody waits for that.
#[test]
fn a_vmm_that_does_not_acknowledge_is_left() {
    let mut world = World::started();
    world.power_on(1);
    world.unplug();
    assert!(world.session.is_leaving() && !world.session.is_attached());
    world.pass(Duration::from_millis(999));
    assert_eq!(world.closed(1), None);
    world.pass(Duration::from_millis(1));
    assert_eq!(world.closed(1), Some(&CloseReason::NotAcknowledged));
    assert!(!world.session.is_leaving());
    world.take(1);
    // It stays unplugged.
    world.connect(2, QEMU_CAPS);
    world.say(2, &hello(QEMU_CAPS));
    assert_eq!(world.take(2).len(), 1, "hello alone");
    world.plug_in(2);
    world.unplug_and_plug(2, true);
    world.expire(100);
    assert_eq!(world.closed(2), None);
    assert!(world.session.is_attached());
}

#[test]
fn a_filter_that_rejects() {
    let mut world = World::started();
    world.send(1, PacketType::FILTER_FILTER, 0, b"0x03:-1:-1:-1:0\0");
    world.power_on(1);
    world.send(1, PacketType::FILTER_REJECT, 0, &[]);
    assert_eq!(world.notices.last(), Some(&Notice::Rejected));
    assert_eq!((world.power_offs, world.session.is_attached()), (1, false));
    world.input(Input::DeviceReady);
    world.plug();
    assert!(world.is_quiet(), "it would be refused again");
    world.unplug();
    assert!(world.is_quiet(), "it never had it");
    world.plug_in(1);
}

// ---- connections ------------------------------------------------------------------------------------------

/// Whatever a newcomer says, the session that lives is not its own.
#[test]
fn a_live_session_is_not_taken_over() {
    for migrate in [false, true] {
        let mut world = if migrate { World::migrating() } else { World::started() };
        world.power_on(1);
        let verify = world.bulk_body(1, BULK_OUT, 19, &ccid(0x6F, 1, &COMMAND));
        let verify = world.packet(1, PacketType::BULK_PACKET, 1, &verify);
        // At any moment of the victim's packets, too; and it has not read its last answer.
        for cut in 0..verify.len() {
            world.ask(1, 50);
            world.say(1, &verify[..cut]);
            let thief = 1000 + cut as u64;
            world.connect_destination(1, thief);
            let mut theft = world.packet(1, PacketType::CANCEL_DATA_PACKET, 50, &[]);
            let command = world.bulk_body(1, BULK_OUT, 14, &ccid(0x6F, 9, &[0, 0x20, 0, 0x80]));
            theft.extend(world.packet(1, PacketType::BULK_PACKET, 7, &command));
            let ask = world.bulk_body(1, BULK_IN, 65_000, &[]);
            theft.extend(world.packet(1, PacketType::BULK_PACKET, 8, &ask));
            world.say(thief, &theft);
            if migrate {
                assert_eq!(world.filled.pop(), Some(1));
                world.input(Input::Reads(ConnectionId(1)));
                assert_eq!(world.closed(thief), Some(&CloseReason::StillRuns));
            } else {
                assert_eq!(world.closed(thief), Some(&CloseReason::NotHello));
            }
            world.reads_nothing();
            assert_eq!(world.take(thief), []);
            world.say(1, &verify[cut..]);
            let packets = world.take(1);
            assert_eq!(world.bulk_answer(1, &packets[0], 1, BULK_OUT), (0, vec![]));
            assert_eq!(world.bulk_answer(1, &packets[1], 50, BULK_IN), (0, echo(1, &COMMAND)));
        }
        assert_eq!((world.power_offs, world.session.is_attached(), world.closed(1)), (0, true, None));
        assert_eq!(world.notices.len(), 1, "nothing new: {:?}", world.notices);
    }
}

#[test]
fn a_hello_disturbs_nobody_and_is_refused() {
    for migrate in [false, true] {
        let mut world = if migrate { World::migrating() } else { World::started() };
        world.power_on(1);
        let hello = hello(QEMU_CAPS);
        world.connect(2, QEMU_CAPS);
        for byte in &hello {
            world.say(2, &[*byte]);
            assert!(world.is_quiet() && world.session.is_attached());
        }
        // One that shows to be there costs the newcomer its place, and is asked but once.
        assert_eq!(world.peers[&1].asked, 1);
        world.connect(3, QEMU_CAPS);
        world.say(3, &hello);
        world.pass(Duration::from_millis(2999));
        assert_eq!((world.closed(2), world.closed(3)), (None, None));
        world.pass(Duration::from_millis(1));
        for refused in [2, 3] {
            assert_eq!(world.closed(refused), Some(&CloseReason::InUse));
        }
        assert_eq!((world.peers[&1].asked, world.power_offs, world.closed(1)), (1, 0, None));
        world.ask(1, 4);
        world.connect(4, QEMU_CAPS);
        world.say(4, &hello);
        assert_eq!(world.peers[&1].asked, 2, "it has spoken since");
        assert!(world.filled.is_empty());
        // One that is gone gives way at once.
        world.input(Input::Lost(ConnectionId(1)));
        assert_eq!(world.power_offs, 1);
        assert_eq!(world.take(4).last().unwrap().kind, PacketType::DEVICE_CONNECT);
        world.expire(10);
        assert_eq!(world.closed(4), None);
    }
}

#[test]
fn a_session_ends_with_its_connection() {
    for migrate in [false, true] {
        let mut world = if migrate { World::migrating() } else { World::started() };
        world.power_on(1);
        world.ask(1, 1);
        world.out(1, 2, &ccid(0x6F, 1, &COMMAND));
        if !migrate {
            // Silence is no wish to go on.
            world.connect_destination(1, 2);
        }
        world.input(Input::Lost(ConnectionId(1)));
        assert_eq!((world.power_offs, world.session.is_attached()), (1, false));
        assert_eq!((world.session.kept(), world.session.next_deadline()), (vec![], None));
        assert_eq!(world.notices.last(), Some(&Notice::Lost));
        if migrate {
            world.connect_destination(1, 2);
        }
        world.send(2, PacketType::CANCEL_DATA_PACKET, 1, &[]);
        assert_eq!(world.closed(2), Some(&CloseReason::NotHello));
        assert_eq!(world.take(2), []);
    }
}

#[test]
fn a_guest_that_migrates_keeps_its_session() {
    let mut world = World::migrating();
    world.send(1, PacketType::START_INTERRUPT_RECEIVING, 1, &[INTERRUPT]);
    world.take(1);
    world.power_on(1);
    world.prompt = false;
    world.ask(1, 66_975_744);
    world.out(1, 3, &ccid(0x6F, 1, &COMMAND));
    world.expect_out_done(1, 3);

    world.connect_destination(1, 2);
    assert!(world.is_quiet(), "it waits in silence");
    world.ask(1, 4);
    world.send(2, PacketType::CANCEL_DATA_PACKET, 4, &[]);
    assert!(world.is_quiet() && world.closed(1).is_none(), "the old one is in use until then");
    assert_eq!(world.filled, [1]);
    world.pass(Duration::from_millis(99));
    assert!(world.is_quiet());
    world.pass(Duration::from_millis(1));
    world.expect_cancelled(2, 4);
    assert_eq!(world.closed(1), Some(&CloseReason::Migrated));
    assert_eq!(world.notices.last(), Some(&Notice::Continued));
    world.answer_now();
    world.expect_in(2, 66_975_744, &echo(1, &COMMAND));
    world.device.remove(SlotId(0), world.now);
    world.input(Input::DeviceReady);
    assert_eq!(world.take_one(2).kind, PacketType::INTERRUPT_PACKET);
    world.input(Input::Lost(ConnectionId(1)));
    assert_eq!((world.power_offs, world.session.is_attached()), (0, true));
}

/// Nothing is taken for proof that was not looked for: a second attempt needs a filling of its own.
#[test]
fn what_was_read_once_proves_nothing_later() {
    let mut world = World::migrating();
    for peer in 2..5 {
        world.connect_destination(1, peer);
        world.send(peer, PacketType::RESET, 0, &[]);
        assert_eq!(world.filled.pop(), Some(1));
        // Another one meanwhile is no better off.
        world.connect_destination(1, 10 * peer);
        world.send(10 * peer, PacketType::RESET, 0, &[]);
        assert_eq!(world.closed(10 * peer), Some(&CloseReason::StillRuns));
        world.pass(Duration::from_millis(50));
        world.input(Input::Reads(ConnectionId(1)));
        assert_eq!(world.closed(peer), Some(&CloseReason::StillRuns));
        world.reads_nothing();
    }
    // It stops, and one that came first goes before it is known; the next has to wait again.
    world.connect_destination(1, 6);
    world.send(6, PacketType::RESET, 0, &[]);
    world.input(Input::Lost(ConnectionId(6)));
    world.connect_destination(1, 7);
    world.send(7, PacketType::GET_CONFIGURATION, 1, &[]);
    world.pass(Duration::from_millis(99));
    assert_eq!(world.closed(1), None);
    world.pass(Duration::from_millis(1));
    assert_eq!(world.closed(1), Some(&CloseReason::Migrated));
    assert_eq!(world.take(7)[0].short(), (PacketType::CONFIGURATION_STATUS, 1, &[0, 1][..]));
}

/// An idle guest says nothing for as long as it is idle.
#[test]
fn an_idle_guest_is_kept_for_the_connection_that_waited() {
    let mut world = World::migrating();
    world.power_on(1);
    world.prompt = false;
    world.ask(1, 1);
    world.out(1, 2, &ccid(0x6F, 1, &COMMAND));
    world.expect_out_done(1, 2);
    world.connect_destination(1, 2);
    world.input(Input::Lost(ConnectionId(1)));
    assert_eq!(world.notices.last(), Some(&Notice::Kept));
    world.answer_now();
    world.expire(100_000);
    assert_eq!((world.power_offs, world.session.is_attached()), (0, true));
    assert!(world.is_quiet());
    // Whoever comes now has not waited, and is no better off for the session having no connection.
    world.connect_destination(1, 3);
    world.send(3, PacketType::GET_ALT_SETTING, 3, &[0]);
    assert_eq!(world.closed(3), Some(&CloseReason::NotHello));
    world.connect(4, QEMU_CAPS);
    world.say(4, &hello(QEMU_CAPS));
    world.expire(3);
    assert_eq!(world.closed(4), Some(&CloseReason::InUse));
    world.send(2, PacketType::GET_ALT_SETTING, 3, &[0]);
    let packets = world.take(2);
    assert_eq!(packets[0].kind, PacketType::ALT_SETTING_STATUS);
    assert_eq!(world.bulk_answer(2, &packets[1], 1, BULK_IN), (0, echo(1, &COMMAND)));
    assert_eq!(world.bulk_answer(2, &packets[2], 2, BULK_OUT).0, 0, "perhaps not read");
    world.input(Input::Lost(ConnectionId(2)));
    assert_eq!((world.power_offs, world.session.is_attached()), (1, false));
}

#[test]
fn a_session_is_kept_for_no_longer_than_somebody_waits() {
    for how in 0..4 {
        let mut world = World::migrating();
        world.power_on(1);
        world.ask(1, 1);
        world.out(1, 2, &ccid(0x6F, 1, &COMMAND));
        world.take(1);
        for heir in [2, 3] {
            world.connect_destination(1, heir);
        }
        world.input(Input::Lost(ConnectionId(1)));
        world.input(Input::Lost(ConnectionId(2)));
        assert_eq!((world.power_offs, world.session.is_attached()), (0, true));
        match how {
            0 => world.input(Input::Lost(ConnectionId(3))),
            1 => world.say(3, b"GET / HTTP/1.1"),
            2 => world.unplug(),
            _ => {
                // It shows to be another guest's.
                world.peers.get_mut(&3).unwrap().agreed = None;
                world.say(3, &hello(QEMU_CAPS));
                assert_eq!(world.take(3).len(), 4);
            }
        }
        assert_eq!((world.power_offs, world.session.is_attached()), (1, how == 3), "{how}");
        assert!(world.session.kept().iter().all(|kept| *kept == (0, 0)));
        if how == 2 {
            world.plug();
            world.send(3, PacketType::CANCEL_DATA_PACKET, 1, &[]);
            assert_eq!(world.closed(3), Some(&CloseReason::NotHello));
            assert!(world.is_quiet());
        }
    }
}

#[test]
fn what_the_stopped_vm_did_not_read_is_repeated() {
    let mut world = World::migrating();
    world.power_on(1);
    world.prompt = false;
    world.ask(1, 1);
    world.ask(1, 5);
    world.out(1, 2, &ccid(0x6F, 1, &COMMAND));
    world.expect_out_done(1, 2);
    // The VM stops; from here nothing is read any more.
    world.answer_now();
    let lost = world.take_one(1);
    world.connect_destination(1, 2);
    // Id 2 is used anew: whatever was its answer has been read.
    world.send(2, PacketType::GET_CONFIGURATION, 2, &[]);
    world.reads_nothing();
    let packets = world.take(2);
    assert_eq!(packets.len(), 2, "{packets:?}");
    assert_eq!(packets[0].short(), (PacketType::CONFIGURATION_STATUS, 2, &[0, 1][..]));
    assert_eq!(packets[1], lost);
    // Another migration, and a sign of life in between.
    world.connect_destination(2, 3);
    world.send(2, PacketType::CANCEL_DATA_PACKET, 5, &[]);
    world.expect_cancelled(2, 5);
    world.send(3, PacketType::GET_CONFIGURATION, 6, &[]);
    world.reads_nothing();
    let ids: Vec<_> = world.take(3).iter().map(|packet| packet.id).collect();
    assert_eq!(ids, [6, 5]);
}

#[test]
fn what_a_key_gave_is_not_repeated_once_the_pin_is_forgotten() {
    for forgotten in [false, true] {
        let mut world = World::migrating();
        world.power_on(1);
        world.prompt = false;
        world.ask(1, 1);
        world.out(1, 2, &ccid(0x6F, 1, &COMMAND));
        world.expect_out_done(1, 2);
        let (token, _) = world.commands.pop_front().unwrap();
        let pin = Arc::new(());
        let response = Response::parse(&[0xA5, 0x90, 0x00]).unwrap().valid(Validity::of(&pin));
        world.device.complete(token, Outcome::Response(response), world.now);
        world.input(Input::DeviceReady);
        let answer = world.take_one(1);
        let _pin = (!forgotten).then_some(pin);
        world.connect_destination(1, 2);
        world.send(2, PacketType::GET_CONFIGURATION, 2, &[]);
        world.reads_nothing();
        let packets = world.take(2);
        assert_eq!(packets.len(), if forgotten { 1 } else { 2 }, "{packets:?}");
        assert_eq!(packets.contains(&answer), !forgotten);
    }
}

#[test]
fn half_a_packet_goes_on_elsewhere() {
    let mut world = World::migrating();
    world.power_on(1);
    let body = world.bulk_body(1, BULK_OUT, 19, &ccid(0x6F, 1, &COMMAND));
    let whole = world.packet(1, PacketType::BULK_PACKET, 1, &body);
    let mut peer = 1;
    for cut in 1..whole.len() {
        world.say(peer, &whole[..cut]);
        world.connect_destination(peer, peer + 1);
        peer += 1;
        world.say(peer, &whole[cut..]);
        world.reads_nothing();
        if world.take(peer).is_empty() {
            // The rest was all zeros so far, as a hello begins with; the next packet tells.
            assert!(whole[cut..].iter().take(8).all(|byte| *byte == 0), "{cut}");
            world.ask(peer, 2);
            world.reads_nothing();
            assert_ne!(world.take(peer).len(), 0);
        } else {
            world.ask(peer, 2);
        }
        world.take(peer);
        assert_eq!(world.closed(peer), None);
    }
    // Unless there is a hello, which has to wait as any other.
    world.say(peer, &whole[..20]);
    world.connect(1000, QEMU_CAPS);
    world.say(1000, &hello(QEMU_CAPS));
    assert_eq!(world.closed(peer), None);
    world.input(Input::Lost(ConnectionId(peer)));
    assert_eq!(world.take(1000).len(), 4);
}

#[test]
fn a_new_session_resets_the_device() {
    let mut world = World::started();
    world.power_on(1);
    world.ask(1, 1);
    world.input(Input::Lost(ConnectionId(1)));
    world.start(2, 0);
    assert_eq!(world.power_offs, 1);
    assert_eq!(world.take(1), []);
    world.power_on(2);
    world.input(Input::Lost(ConnectionId(2)));
    world.start(3, QEMU_CAPS);
    assert_eq!(world.power_offs, 2);
}

#[test]
fn what_is_no_hello_is_closed_at_once() {
    let mut world = World::new();
    for bytes in [&b"G"[..], &[3], &[0, 0, 0, 0, 63], &[0, 0, 0, 0, 0x24, 1, 0, 0]] {
        world.connect(1, 0);
        world.say(1, bytes);
        assert_eq!(world.closed(1), Some(&CloseReason::NotHello));
    }
    world.say(99, &hello(0));
    world.input(Input::Lost(ConnectionId(99)));
    assert!(world.is_quiet());
}

#[test]
fn silence_keeps_nobody_out() {
    for migrate in [false, true] {
        let mut world = World::new();
        if migrate {
            world.session = Session::migrating();
        }
        for peer in 100..200 {
            world.connect(peer, 0);
            if peer % 2 == 0 {
                world.say(peer, &hello(0)[..5]);
            }
        }
        assert_eq!(world.closed(183), Some(&CloseReason::Silent));
        assert_eq!(world.closed(184), None, "sixteen may wait");
        world.start(1, QEMU_CAPS);
        world.power_on(1);
        // A paused VMM is rightly silent, and comes again; whoever has spoken is not sent away for one that has not.
        world.connect(2, 0);
        world.say(2, &hello(0));
        for peer in 200..300 {
            world.connect(peer, 0);
        }
        assert_eq!(world.closed(2), None);
        world.input(Input::Lost(ConnectionId(1)));
        // Where the guest may migrate it may be one of the others'.
        assert_eq!(world.take(2).len(), if migrate { 0 } else { 4 });
    }
}

/// The connection that a session is kept for is not one of those that give way.
#[test]
fn an_heir_does_not_give_way() {
    let mut world = World::migrating();
    world.power_on(1);
    world.connect_destination(1, 2);
    world.input(Input::Lost(ConnectionId(1)));
    for peer in 200..300 {
        world.connect(peer, 0);
    }
    world.send(2, PacketType::GET_CONFIGURATION, 2, &[]);
    assert_eq!(world.take(2)[0].short(), (PacketType::CONFIGURATION_STATUS, 2, &[0, 1][..]));
    assert_eq!(world.power_offs, 0);
}

// ---- bad peers --------------------------------------------------------------------------------------------

#[test]
fn a_bad_packet_is_skipped() {
    let mut world = World::started();
    let bad = [
        (
            PacketType::SET_CONFIGURATION,
            vec![1, 2],
            "length at offset 4 of a set_configuration packet is 2, expected 1",
        ),
        (PacketType::RESET, vec![0], "length at offset 4 of a reset packet is 1, expected 0"),
        (
            PacketType::CONTROL_PACKET,
            vec![0; 9],
            "length at offset 4 of a control_packet packet is 9, expected 10 or more",
        ),
        (
            PacketType::CONTROL_PACKET,
            vec![0x80, 6, 0x80, 0, 0, 1, 0, 0, 4, 0, 1, 2, 3, 4],
            "length at offset 24 of a control_packet packet to endpoint 0x80 is 4, with 4 bytes of data",
        ),
        (
            PacketType::BULK_PACKET,
            world.bulk_body(1, BULK_OUT, 3, &[1, 2]),
            "length at offset 18 of a bulk_packet packet to endpoint 0x01 is 3, with 2 bytes of data",
        ),
        (
            PacketType::INTERRUPT_PACKET,
            vec![2, 0, 1, 0],
            "length at offset 18 of a interrupt_packet packet to endpoint 0x02 is 1, with 0 bytes of data",
        ),
    ];
    for (kind, body, text) in bad {
        world.send(1, kind, 1, &body);
        let Some(Notice::BadPacket(error)) = world.notices.last() else { panic!("{:?}", world.notices) };
        assert_eq!(error.to_string(), text);
        assert!(world.is_quiet());
    }
    for kind in [PacketType::EP_INFO, PacketType(18), PacketType(102), PacketType(0xFFFF_FFFF)] {
        world.send(1, kind, 1, &[0; 50]);
        assert_eq!(world.notices.last(), Some(&Notice::Unexpected(kind)));
    }
    world.power_on(1);
}

#[test]
fn no_flood_of_nonsense_hides_what_else_there_is() {
    let mut world = World::started();
    for _ in 0..10_000 {
        world.send(1, PacketType(99), 1, &[]);
    }
    world.send(1, PacketType::EP_INFO, 1, &[0; 50]);
    assert_eq!(world.notices.last(), Some(&Notice::Unexpected(PacketType::EP_INFO)));
    world.power_on(1);
}

#[test]
fn a_stream_that_cannot_be_followed() {
    let mut world = World::started();
    world.power_on(1);
    world.say(1, &[101, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    let error = DecodeError::TooLong { kind: PacketType::BULK_PACKET, length: 9 << 24 };
    assert_eq!(world.closed(1), Some(&CloseReason::Decode(error)));
    assert_eq!((world.power_offs, world.session.is_attached()), (1, false));
    world.connect_destination(1, 2);
    world.send(2, PacketType::RESET, 0, &[]);
    assert_eq!(world.closed(2), Some(&CloseReason::NotHello), "nothing is left of the session");

    world.start(4, QEMU_CAPS);
    let mut again = hello(QEMU_CAPS);
    again.splice(8..12, [0; 8]);
    world.say(4, &again);
    assert_eq!(world.closed(4), Some(&CloseReason::SecondHello));
}

#[test]
fn a_peer_that_does_not_read() {
    let mut world = World::started();
    let packet = world.packet(1, PacketType::SET_CONFIGURATION, 1, &[1]);
    let many = packet.repeat(3000);
    for _ in 0..5 {
        world.session.handle(Input::Received(ConnectionId(1), &many), &mut world.device, world.now);
    }
    world.settle();
    assert_eq!(world.closed(1), Some(&CloseReason::NotRead));
}

// ---- anything ---------------------------------------------------------------------------------------------

#[derive(Clone, Debug)]
enum Step {
    In { endpoint: u8, length: u32 },
    Out { endpoint: u8, data: Vec<u8> },
    Ccid { kind: u8, slot: u8, data: Vec<u8> },
    Control { endpoint: u8, setup: [u8; 6], length: u8 },
    Cancel { back: u64 },
    Plain(PacketType, Vec<u8>),
    Card,
    Move(u8),
    Wait(u16),
    Unplug,
    Plug,
    Migrate { cut: usize },
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    let endpoint = || prop_oneof![6 => Just(BULK_IN), 2 => Just(INTERRUPT), 1 => any::<u8>()];
    let data = || proptest::collection::vec(any::<u8>(), 0..40);
    prop_oneof![
        8 => (endpoint(), 0u32..70_000).prop_map(|(endpoint, length)| Step::In { endpoint: endpoint | 0x80, length }),
        2 => (prop_oneof![Just(BULK_OUT), any::<u8>()], data())
            .prop_map(|(endpoint, data)| Step::Out { endpoint: endpoint & 0x7F, data }),
        6 => (prop_oneof![Just(0x62), Just(0x6F), Just(0x65), 0x60u8..0x75], 0u8..4, data())
            .prop_map(|(kind, slot, data)| Step::Ccid { kind, slot, data }),
        2 => (any::<bool>(), any::<[u8; 6]>(), any::<u8>()).prop_map(|(is_in, setup, length)| {
            Step::Control { endpoint: if is_in { 0x80 } else { 0 }, setup, length }
        }),
        6 => (0u64..12).prop_map(|back| Step::Cancel { back }),
        2 => (prop_oneof![Just(BULK_IN), Just(INTERRUPT)], 15u32..17)
            .prop_map(|(endpoint, kind)| Step::Plain(PacketType(kind), vec![endpoint])),
        1 => any::<u8>().prop_map(|value| Step::Plain(PacketType::SET_CONFIGURATION, vec![value & 1])),
        1 => Just(Step::Plain(PacketType::GET_CONFIGURATION, vec![])),
        1 => any::<[u8; 2]>().prop_map(|[interface, alt]| {
            Step::Plain(PacketType::SET_ALT_SETTING, vec![interface & 3, alt & 1])
        }),
        1 => any::<u8>().prop_map(|interface| Step::Plain(PacketType::GET_ALT_SETTING, vec![interface & 3])),
        1 => prop_oneof![
            Just(PacketType::RESET),
            Just(PacketType::FILTER_REJECT),
            Just(PacketType::DEVICE_DISCONNECT_ACK),
            Just(PacketType::EP_INFO)
        ].prop_map(|kind| Step::Plain(kind, vec![])),
        6 => Just(Step::Card),
        1 => any::<u8>().prop_map(Step::Move),
        1 => any::<u16>().prop_map(Step::Wait),
        1 => Just(Step::Unplug),
        1 => Just(Step::Plug),
        1 => (0usize..40).prop_map(|cut| Step::Migrate { cut }),
        1 => Just(Step::Restart),
    ]
}

/// Which types answer which.
fn answered_by(kind: PacketType) -> Option<PacketType> {
    match kind {
        PacketType::SET_CONFIGURATION | PacketType::GET_CONFIGURATION => {
            Some(PacketType::CONFIGURATION_STATUS)
        }
        PacketType::SET_ALT_SETTING | PacketType::GET_ALT_SETTING => Some(PacketType::ALT_SETTING_STATUS),
        PacketType::START_INTERRUPT_RECEIVING | PacketType::STOP_INTERRUPT_RECEIVING => {
            Some(PacketType::INTERRUPT_RECEIVING_STATUS)
        }
        PacketType::CONTROL_PACKET | PacketType::BULK_PACKET => Some(kind),
        _ => None,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Whatever a peer sends: each request has one answer of its type, nothing grows, nothing panics.
    #[test]
    fn every_request_has_one_answer(
        caps in any::<u8>(), four in any::<bool>(), steps in proptest::collection::vec(step(), 1..150),
    ) {
        let layout = if four { Layout::Slots(4) } else { Layout::Interfaces(2) };
        let mut world = World::with(DeviceConfig { layout, max_message: 271, ..DeviceConfig::new("x") });
        world.session = Session::migrating();
        world.prompt = false;
        let mut peer = 1;
        world.start(peer, caps.into());
        let wide = caps & 0x20 != 0;
        let long = caps & 0x40 != 0;
        // Requests without an answer, by id; ids with one, which a migration may repeat.
        let mut open: BTreeMap<u64, PacketType> = BTreeMap::new();
        let mut done: BTreeMap<u64, PacketType> = BTreeMap::new();
        // The rest of a packet with such an id is not mistaken for a hello.
        let mut next = if wide { 1 << 40 | 1 << 8 } else { 1 << 20 | 1 << 8 };
        let mut seq = 0u8;
        for step in steps {
            let mut say: Option<(PacketType, u64, Vec<u8>)> = None;
            let mut migrated = false;
            next += 1;
            // Which has a second of time.
            if world.session.is_leaving() && matches!(step, Step::Wait(_) | Step::Migrate { .. }) {
                world.send(peer, PacketType::DEVICE_DISCONNECT_ACK, 0, &[]);
            }
            match step {
                Step::In { endpoint, length } => {
                    let length = if long { length } else { length & 0xFFFF };
                    say = Some((PacketType::BULK_PACKET, next, world.bulk_body(peer, endpoint, length as usize, &[])));
                }
                Step::Out { endpoint, data } => {
                    say = Some((PacketType::BULK_PACKET, next, world.bulk_body(peer, endpoint, data.len(), &data)));
                }
                Step::Ccid { kind, slot, data } => {
                    seq = seq.wrapping_add(1);
                    let mut message = ccid(kind, seq, &data);
                    message[5] = slot;
                    say = Some((PacketType::BULK_PACKET, next, world.bulk_body(peer, BULK_OUT, message.len(), &message)));
                }
                Step::Control { endpoint, setup: [request_type, request, v0, v1, i0, i1], length } => {
                    let request_type = request_type & 0x63 | endpoint;
                    let mut body = vec![endpoint, request & 15, request_type, 0, v0 & 3, v1 & 7, i0, i1 & 1, length, 0];
                    if endpoint == 0 {
                        body.resize(10 + usize::from(length), 0xA5);
                    }
                    say = Some((PacketType::CONTROL_PACKET, next, body));
                }
                Step::Cancel { back } => say = Some((PacketType::CANCEL_DATA_PACKET, next - back, vec![])),
                Step::Plain(kind, body) => say = Some((kind, next, body)),
                Step::Card => if world.answer() { world.input(Input::DeviceReady) },
                Step::Move(slot) => {
                    let (slot, now) = (SlotId(slot & 3), world.now);
                    if slot.0 & 1 == 0 { world.device.insert(slot, now) } else { world.device.remove(slot, now) }
                    world.input(Input::DeviceReady);
                }
                Step::Wait(milliseconds) => {
                    world.now += Duration::from_millis(milliseconds.into());
                    world.device.handle_deadline(world.now);
                    world.expire(0);
                    world.input(Input::DeviceReady);
                }
                Step::Unplug => world.unplug(),
                Step::Plug => world.plug(),
                Step::Migrate { cut } => {
                    let packet = world.packet(peer, PacketType::GET_CONFIGURATION, next, &[]);
                    open.insert(next, PacketType::CONFIGURATION_STATUS);
                    // Every other time within a packet.
                    let cut = if cut % 2 == 0 { 0 } else { cut.min(packet.len() - 2) };
                    world.say(peer, &packet[..cut]);
                    for packet in world.take(peer) {
                        prop_assert!(open.remove(&packet.id).is_none());
                    }
                    world.connect_destination(peer, peer + 1);
                    let mut rest = packet[cut..].to_vec();
                    next += 1;
                    rest.extend(world.packet(peer, PacketType::GET_CONFIGURATION, next, &[]));
                    open.insert(next, PacketType::CONFIGURATION_STATUS);
                    peer += 1;
                    world.say(peer, &rest);
                    world.reads_nothing();
                    migrated = true;
                }
                Step::Restart => {
                    world.input(Input::Lost(ConnectionId(peer)));
                    peer += 1;
                    world.peers.clear();
                    if world.session.is_plugged() {
                        world.start(peer, caps.into());
                    } else {
                        world.connect(peer, caps.into());
                        world.say(peer, &hello(caps.into()));
                        world.take(peer);
                    }
                    open.clear();
                    done.clear();
                }
            }
            if let Some((kind, id, body)) = say {
                if let Some(answer) = answered_by(kind) {
                    open.insert(id, answer);
                }
                world.send(peer, kind, id, &body);
            }
            prop_assert_eq!(world.closed(peer), None);
            for packet in world.take(peer) {
                let answers = matches!(
                    packet.kind,
                    PacketType::CONFIGURATION_STATUS
                        | PacketType::ALT_SETTING_STATUS
                        | PacketType::CONTROL_PACKET
                        | PacketType::BULK_PACKET
                ) || packet.kind == PacketType::INTERRUPT_RECEIVING_STATUS && packet.id != 0;
                if answers {
                    match open.remove(&packet.id) {
                        Some(kind) => {
                            prop_assert_eq!(kind, packet.kind);
                            done.insert(packet.id, kind);
                        }
                        None => prop_assert!(migrated && done.get(&packet.id) == Some(&packet.kind), "{:?}", packet),
                    }
                }
            }
            for (answered, bytes) in world.session.kept() {
                prop_assert!(answered <= 16 && bytes <= 256 * 1024);
            }
            // Only IN transfers may wait.
            prop_assert!(open.len() <= 2 * MOST_PENDING);
            prop_assert!(open.values().all(|kind| *kind == PacketType::BULK_PACKET));
        }
        // And the end answers those.
        world.unplug();
        for packet in world.take(peer) {
            open.remove(&packet.id);
        }
        prop_assert!(open.is_empty(), "{:?}", open);
    }

    #[test]
    fn any_bytes_at_all(
        caps in any::<u8>(),
        greeted in any::<bool>(),
        chunks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..60), 0..20),
    ) {
        let mut world = World::new();
        world.connect(1, caps.into());
        if greeted {
            world.say(1, &hello(caps.into()));
        }
        for chunk in chunks {
            world.say(1, &chunk);
        }
    }

    #[test]
    fn any_small_packets(
        caps in any::<u8>(),
        packets in proptest::collection::vec(
            (prop_oneof![0u32..30, 99u32..106], any::<u64>(), proptest::collection::vec(any::<u8>(), 0..24)), 0..60,
        ),
        cut in 1usize..50,
    ) {
        let mut world = World::new();
        world.start(1, caps.into());
        let mut wire = Vec::new();
        for (kind, id, body) in packets {
            wire.extend(world.packet(1, PacketType(kind), id, &body));
        }
        for chunk in wire.chunks(cut) {
            world.say(1, chunk);
        }
        prop_assert!(matches!(world.closed(1), None | Some(CloseReason::SecondHello | CloseReason::Decode(_))));
    }
}
