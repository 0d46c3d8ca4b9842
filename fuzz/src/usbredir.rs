//! Everything a VMM can say over usbredir, on several connections, while cards come and go.

use ccid_device::EndpointKind;
use ccid_device::usbredir::{ConnectionId, Input as Event, Output, Session};

use crate::bench::{Bench, WHOLE, message};
use crate::input::Input;

/// Bytes that the session may have waiting before it leaves a peer, by its own words; and one answer more.
const MOST_OUTPUT: usize = (4 << 20) + (1 << 17);
/// Everything QEMU announces.
const CAPS: u8 = 0xFF;

/// The session and what its shell would know.
struct Vmm {
    bench: Bench,
    session: Session,
    connections: u64,
    /// Those that are neither lost nor closed.
    open: Vec<u64>,
    /// What the last output sent.
    sent: Vec<Vec<u8>>,
}

/// Does what `bytes` say.
pub(crate) fn run(bytes: &[u8]) {
    let input = &mut Input::new(bytes);
    let bench = Bench::new(input);
    let start = input.byte();
    let session = if start & 2 == 0 { Session::new() } else { Session::migrating() };
    let mut vmm = Vmm { bench, session, connections: 0, open: Vec::new(), sent: Vec::new() };
    // A file that starts elsewhere than at the start gets there by itself.
    if start & 1 == 0 {
        vmm.connect();
        vmm.say(0, &hello(CAPS));
    }
    for _ in 0..1000 {
        if input.is_empty() {
            break;
        }
        step(&mut vmm, input);
    }
    vmm.check_usable();
}

fn step(vmm: &mut Vmm, input: &mut Input<'_>) {
    let step = input.byte();
    // Mostly the newest connection.
    let back = usize::from(step >> 6);
    match step % 16 {
        0 => vmm.connect(),
        1 => {
            let bytes = input.block();
            vmm.say(back, &bytes);
        }
        2 => {
            let caps = input.byte();
            vmm.say(back, &hello(caps));
        }
        3 => {
            let kind = input.byte();
            let id = input.byte();
            vmm.say(back, &packet(kind.into(), id, &input.block()));
        }
        4 => {
            let kind = input.byte();
            let id = input.byte();
            let mut packet = packet(kind.into(), id, &input.block());
            // Identifiers of 32 bits.
            packet.drain(12..16);
            vmm.say(back, &packet);
        }
        5 | 6 => {
            let (interface, id, kind, slot, seq) =
                (input.byte() % 8, input.byte(), input.byte(), input.byte(), input.byte());
            let kinds = [0x62, 0x63, 0x65, 0x6F, 0x72, kind];
            let message = message(kinds[usize::from(kind) % kinds.len()], slot, seq, &input.block());
            let mut body = bulk(2 * interface + 1, message.len());
            body.extend(message);
            vmm.say(back, &packet(101, id, &body));
        }
        7 | 8 => {
            let (interface, id) = (input.byte() % 8, input.byte());
            let length = input.choose(&[WHOLE, 64, 512, 0, 271, 10]);
            vmm.say(back, &packet(101, id, &bulk(0x81 + 2 * interface, length)));
        }
        9 => {
            let id = input.byte();
            let setup = [input.byte(), input.byte(), input.byte(), input.byte(), input.byte(), input.byte()];
            let [request_type, request, v0, v1, i0, i1] = setup;
            let [l0, l1] = input.word().to_le_bytes();
            let mut body = vec![request_type & 0x80, request, request_type, 0, v0, v1, i0, i1, l0, l1];
            body.extend(input.block());
            vmm.say(back, &packet(100, id, &body));
        }
        10 => {
            let id = input.byte();
            vmm.say(back, &packet(21, id, &[]));
        }
        11 => {
            let (interface, id) = (input.byte() % 8, input.byte());
            let (kind, body) = match step >> 4 & 3 {
                0 => (6, 1),
                1 => (15, 0x82 + 2 * interface),
                2 => (16, 0x82 + 2 * interface),
                _ => (3, 0),
            };
            let body: &[u8] = if kind == 3 { &[] } else { &[body] };
            vmm.say(back, &packet(kind, id, body));
        }
        12 => {
            if let Some(&id) = vmm.open.iter().rev().nth(back) {
                vmm.open.retain(|open| *open != id);
                vmm.handle(Event::Lost(ConnectionId(id)));
            }
        }
        13 => {
            let (device, now) = (&mut vmm.bench.device, vmm.bench.now);
            match step >> 4 & 3 {
                0 => vmm.session.unplug(device, now),
                1 => vmm.session.plug(),
                _ => {
                    if let Some(&id) = vmm.open.iter().rev().nth(back) {
                        vmm.handle(Event::Reads(ConnectionId(id)));
                    }
                }
            }
            vmm.poll();
        }
        _ => {
            vmm.bench.event(input);
            if vmm.session.next_deadline().is_some_and(|at| at <= vmm.bench.now) {
                vmm.session.handle_deadline(&mut vmm.bench.device, vmm.bench.now);
            }
            let next = vmm.session.next_deadline();
            assert!(next.is_none_or(|next| next > vmm.bench.now), "a deadline that stays due");
            vmm.handle(Event::DeviceReady);
        }
    }
}

impl Vmm {
    fn connect(&mut self) {
        self.connections += 1;
        self.open.push(self.connections);
        self.handle(Event::Connected(ConnectionId(self.connections)));
    }

    /// On the newest connection, or one of those before it.
    fn say(&mut self, back: usize, bytes: &[u8]) {
        let Some(&id) = self.open.iter().rev().nth(back).or(self.open.last()) else { return };
        for piece in bytes.chunks(1 << 16) {
            self.handle(Event::Received(ConnectionId(id), piece));
        }
    }

    fn handle(&mut self, event: Event<'_>) {
        self.session.handle(event, &mut self.bench.device, self.bench.now);
        self.bench.take_actions();
        self.poll();
    }

    fn poll(&mut self) {
        self.sent.clear();
        let (mut bytes, mut notices) = (0, 0);
        while let Some(output) = self.session.poll_output() {
            match output {
                Output::Send(ConnectionId(id), packet) => {
                    assert!(self.open.contains(&id), "bytes for connection {id}, which is closed");
                    check_packet(packet.expose());
                    bytes += packet.len();
                    self.sent.push(packet.expose().to_vec());
                }
                Output::Fill(ConnectionId(id), packet) => {
                    assert!(self.open.contains(&id), "connection {id} filled, which is closed");
                    check_packet(packet.expose());
                }
                Output::Close(ConnectionId(id), _) => {
                    let open = self.open.iter().position(|open| *open == id);
                    self.open.remove(open.expect("a connection is closed once"));
                }
                Output::Notice(_) => notices += 1,
            }
        }
        assert!(bytes <= MOST_OUTPUT, "{bytes} bytes of output");
        // One for a packet at most, and a few for what becomes of connections; 64 KiB are taken at once.
        assert!(notices <= (64 << 10) / 12 + 64, "{notices} notices at once");
        // One in use, sixteen that wait.
        assert!(self.open.len() <= 17, "{} connections", self.open.len());
    }

    /// Whatever has happened: another VMM gets its reader, and the reader works.
    fn check_usable(&mut self) {
        while let Some(id) = self.open.pop() {
            self.handle(Event::Lost(ConnectionId(id)));
        }
        self.session.plug();
        self.poll();
        self.connect();
        self.say(0, &hello(CAPS));
        assert!(self.session.is_attached(), "not attached after a hello");
        assert_eq!(self.sent.len(), 4, "hello, ep_info, interface_info, device_connect");
        self.say(0, &packet(6, 1, &[1]));
        assert_eq!(self.sent.last().map(|packet| packet[16..].to_vec()), Some(vec![0, 1]));
        self.say(0, &packet(101, 2, &bulk(0x81, WHOLE)));
        assert!(self.sent.is_empty(), "an answer to nothing");
        let message = message(0x65, 0, 7, &[]);
        let mut body = bulk(1, message.len());
        body.extend(message);
        self.say(0, &packet(101, 3, &body));
        // The command is taken, and the transfer that waited is answered.
        let [taken, answered] = &self.sent[..] else { panic!("{} packets", self.sent.len()) };
        assert_eq!((taken[8], &taken[16..]), (3, &[1, 0, 10, 0, 0, 0, 0, 0, 0, 0][..]));
        assert_eq!((answered[8], &answered[16..20]), (2, &[0x81, 0, 10, 0][..]));
        assert_eq!((answered[26], answered[32]), (0x81, 7));
        let topology = self.bench.device.topology();
        let mut endpoints = topology.interfaces.iter().flat_map(|interface| interface.endpoints);
        assert!(endpoints.any(|endpoint| endpoint.kind == EndpointKind::Interrupt));
        self.bench.check_usable();
    }
}

/// With identifiers of 64 bits, as every VMM has them today.
fn packet(kind: u32, id: u8, body: &[u8]) -> Vec<u8> {
    let mut packet = kind.to_le_bytes().to_vec();
    packet.extend((body.len() as u32).to_le_bytes());
    packet.extend(u64::from(id).to_le_bytes());
    packet.extend(body);
    packet
}

fn hello(caps: u8) -> Vec<u8> {
    let mut packet = vec![0; 80];
    packet[4] = 68;
    packet[12..16].copy_from_slice(b"fuzz");
    packet[76] = caps;
    packet
}

/// The header of a bulk packet, lengths of 32 bits.
fn bulk(endpoint: u8, length: usize) -> Vec<u8> {
    let [l0, l1, h0, h1] = (length as u32).to_le_bytes();
    vec![endpoint, 0, l0, l1, 0, 0, 0, 0, h0, h1]
}

/// A packet of the device's side is one.
fn check_packet(packet: &[u8]) {
    let word = |at: usize| packet[at..].first_chunk().copied().map_or(0, u32::from_le_bytes);
    let (kind, length) = (word(0), word(4) as usize);
    let header = packet.len() - length;
    assert!(header == 12 || header == 16 && kind != 0, "a header of {header} bytes, type {kind}");
    let body = &packet[header..];
    let fits = match kind {
        0 => length == 68,
        1 => matches!(length, 8 | 10),
        2 => length == 0,
        4 => length == 132,
        5 => matches!(length, 96 | 160),
        8 | 17 => length == 2,
        11 => length == 3,
        100 => data_fits(body, 0x80 & body[0] != 0, 10, u16::from_le_bytes([body[8], body[9]]).into()),
        // The length has 16 or 32 bits, by what was agreed.
        101 => {
            let low = u16::from_le_bytes([body[2], body[3]]).into();
            let is_in = 0x80 & body[0] != 0;
            let high = body.get(8..10).map_or(0, |high| usize::from(u16::from_le_bytes([high[0], high[1]])));
            data_fits(body, is_in, 8, low) || data_fits(body, is_in, 10, high << 16 | low)
        }
        103 => data_fits(body, 0x80 & body[0] != 0, 4, u16::from_le_bytes([body[2], body[3]]).into()),
        _ => false,
    };
    assert!(fits, "a packet of type {kind} with {length} bytes");
}

/// IN brings as many bytes as it says, OUT none.
fn data_fits(body: &[u8], is_in: bool, header: usize, length: usize) -> bool {
    body.len() == header + if is_in { length } else { 0 }
}
