//! Everything a client can say over USB/IP, while cards come and go.

use std::time::Duration;

use ccid_device::usbip::{Export, Management, Urbs, management, urbs};

use crate::bench::{Bench, message};
use crate::input::Input;

/// Answers that may wait to be written, by the connection's own words; and one more.
const MOST_OUTPUT: usize = (8 << 20) + (1 << 17);
const HEADER: usize = 48;

/// Does what `bytes` say.
pub(crate) fn run(bytes: &[u8]) {
    let input = &mut Input::new(bytes);
    let mut bench = Bench::new(input);
    let mut exports: Vec<Export> = (0..=u16::from(input.byte() % 3))
        .map(|number| Export::new(number + 1, bench.device.topology()))
        .collect();
    let mut imported = [false; 3];
    // Each client one after the other; the device is whose last.
    for _ in 0..4 {
        if input.is_empty() {
            break;
        }
        if let Some((index, rest)) = manage(&bench, &exports, input) {
            assert!(!imported[index], "one device for two clients");
            exports[index].set_imported(true);
            transfer(&mut bench, &exports[index], &rest, input);
            // A client that hangs on to it is another's trouble.
            imported[index] = input.byte() % 4 == 3;
            exports[index].set_imported(imported[index]);
        }
    }
    bench.check_usable();
}

/// A connection up to its one request; what was imported, and the bytes that came after.
fn manage(bench: &Bench, exports: &[Export], input: &mut Input<'_>) -> Option<(usize, Vec<u8>)> {
    let mut connection = Management::new(bench.now);
    let mut stream = Vec::new();
    let number = input.byte();
    match number % 4 {
        0 => stream = input.block(),
        1 => stream.extend([0x01, 0x11, 0x80, 0x05, 0, 0, 0, 0]),
        _ => {
            stream.extend([0x01, 0x11, 0x80, 0x03, 0, 0, 0, 0]);
            stream.extend(format!("1-{}", 1 + number / 64).as_bytes());
            stream.resize(40, 0);
        }
    }
    stream.extend(input.block());
    let mut rest = &stream[..];
    connection.handle(&mut rest, exports, bench.now);
    if let Some(at) = connection.next_deadline() {
        connection.handle_deadline(at + Duration::from_secs(1));
        assert!(connection.next_deadline().is_none(), "a deadline that stays due");
    }
    let mut imported = None;
    let mut ended = false;
    let mut sent = 0;
    while let Some(output) = connection.poll_output() {
        assert!(!ended, "something after the end");
        match output {
            management::Output::Send(bytes) => {
                sent += bytes.len();
                assert_eq!(bytes[..2], [0x01, 0x11], "version");
            }
            management::Output::Import(index) => (imported, ended) = (Some(index), true),
            management::Output::Ask(index) => assert!(index < exports.len()),
            management::Output::Close(_) => ended = true,
        }
    }
    assert!(ended && sent <= 12 + 3 * (312 + 7 * 4), "{sent} bytes for a request");
    connection.handle(&mut &stream[..], exports, bench.now);
    assert!(connection.poll_output().is_none(), "something after the end");
    Some((imported?, rest.to_vec()))
}

/// A client's end of a connection: what it has sent and what became of it.
struct Client {
    connection: Urbs,
    /// Bytes that are no whole command yet.
    half: Vec<u8>,
    /// What was submitted and not answered, with whether it is IN.
    submitted: Vec<(u32, bool)>,
    /// What was to be taken back, and by whose number.
    unlinking: Vec<(u32, u32)>,
    /// The stream makes no sense from here on, or is closed.
    is_over: bool,
}

fn transfer(bench: &mut Bench, export: &Export, rest: &[u8], input: &mut Input<'_>) {
    let connection = Urbs::new(export);
    let (half, submitted, unlinking) = (Vec::new(), Vec::new(), Vec::new());
    let mut client = Client { connection, half, submitted, unlinking, is_over: false };
    let mut seqnum = 0;
    client.say(bench, rest, usize::MAX);
    for _ in 0..500 {
        if input.is_empty() || client.is_over {
            break;
        }
        let step = input.byte();
        let cut = if step >= 0xC0 { 7 } else { usize::MAX };
        seqnum += 1;
        match step % 16 {
            0 => {
                let bytes = input.block();
                client.say(bench, &bytes, cut);
            }
            // Anything as a transfer.
            1 => {
                let number = u32::from(input.byte());
                let device = if input.byte() == 0xFF { 7 } else { 1 };
                let (direction, endpoint) = (u32::from(input.byte() % 2), u32::from(input.byte() % 20));
                let (length, packets) = (input.word(), input.choose(&[0, u32::MAX]));
                let setup = input.block();
                let mut bytes = submit(number, device, direction, endpoint, length.into(), packets, &setup);
                bytes.extend(input.block());
                client.say(bench, &bytes, cut);
            }
            2 => {
                let back = u32::from(input.byte());
                let bytes = unlink(seqnum, seqnum.saturating_sub(back));
                client.say(bench, &bytes, cut);
            }
            3 | 4 => {
                let setups: [[u8; 8]; 8] = [
                    [0x00, 9, 1, 0, 0, 0, 0, 0],
                    [0x80, 6, 0, 2, 0, 0, 0xFF, 0],
                    [0x21, 1, 0, 1, 0, 0, 0, 0],
                    [0x02, 1, 0, 0, 0x81, 0, 0, 0],
                    [0x02, 3, 0, 0, 0x81, 0, 0, 0],
                    [0x01, 11, 0, 0, 0, 0, 0, 0],
                    [0xA1, 2, 0, 0, 0, 0, 4, 0],
                    [0x80, 6, 0, 1, 0, 0, 18, 0],
                ];
                let setup = input.choose(&setups);
                let direction = u32::from(setup[0] >> 7);
                let bytes = submit(seqnum, 1, direction, 0, setup[6].into(), 0, &setup);
                client.say(bench, &bytes, cut);
            }
            5..=7 => {
                let (interface, kind, slot, seq) =
                    (input.byte() % 8, input.byte(), input.byte(), input.byte());
                let kinds = [0x62, 0x63, 0x65, 0x6F, 0x72, kind];
                let message = message(kinds[usize::from(kind) % kinds.len()], slot, seq, &input.block());
                let endpoint = u32::from(2 * interface + 1);
                let mut bytes = submit(seqnum, 1, 0, endpoint, message.len() as u32, 0, &[]);
                bytes.extend(message);
                client.say(bench, &bytes, cut);
            }
            8..=11 => {
                let endpoint = u32::from(input.byte() % 16);
                let length = input.choose(&[65_556, 64, 8, 0, 512, 70_000, 0x7FFF_FFFF]);
                let bytes = submit(seqnum, 1, 1, endpoint, length, 0, &[]);
                client.say(bench, &bytes, cut);
            }
            12 => client.handle(bench, urbs::Input::DeviceReady),
            _ => {
                bench.event(input);
                client.handle(bench, urbs::Input::DeviceReady);
            }
        }
    }
    let waiting = client.submitted.len();
    // 64 for each endpoint that is IN.
    assert!(client.is_over || waiting <= 64 * 14, "{waiting} transfers wait");
    client.handle(bench, urbs::Input::Gone);
    client.is_over = true;
    client.handle(bench, urbs::Input::DeviceReady);
}

impl Client {
    fn say(&mut self, bench: &mut Bench, bytes: &[u8], cut: usize) {
        for piece in bytes.chunks(cut.min(1 << 16)) {
            if self.is_over {
                return;
            }
            self.half.extend_from_slice(piece);
            while self.take_command() {}
            self.handle(bench, urbs::Input::Received(piece));
        }
    }

    /// Reads what was sent, as the other end has to.
    fn take_command(&mut self) -> bool {
        let word =
            |at: usize| self.half.get(at..).and_then(<[u8]>::first_chunk).copied().map(u32::from_be_bytes);
        let (Some(kind), Some(seqnum), true) = (word(0), word(4), self.half.len() >= HEADER) else {
            return false;
        };
        let (is_in, length) = (word(12) == Some(1), word(24).unwrap_or_default() as usize);
        let end = match kind {
            1 if is_in => HEADER,
            1 if length <= 1 << 20 => HEADER + length,
            2 => HEADER,
            // The other end has to close.
            _ => return false,
        };
        if self.half.len() < end {
            return false;
        }
        if kind == 1 {
            self.submitted.push((seqnum, is_in));
        } else {
            self.unlinking.push((seqnum, word(20).unwrap_or_default()));
        }
        self.half.drain(..end);
        true
    }

    fn handle(&mut self, bench: &mut Bench, event: urbs::Input<'_>) {
        let is_gone = matches!(event, urbs::Input::Gone);
        self.connection.handle(event, &mut bench.device, bench.now);
        bench.take_actions();
        let mut sent = 0;
        while let Some(output) = self.connection.poll_output() {
            assert!(!self.is_over && !is_gone, "something after the end: {output:?}");
            match output {
                urbs::Output::Send(reply) => {
                    sent += reply.len();
                    self.reply(reply.expose());
                }
                urbs::Output::Notice(_) => {}
                urbs::Output::Close(_) => self.is_over = true,
            }
        }
        assert!(sent <= MOST_OUTPUT, "{sent} bytes of output");
    }

    /// A reply is one, and belongs to what was asked and not answered before.
    fn reply(&mut self, reply: &[u8]) {
        let word = |at: usize| reply[at..].first_chunk().copied().map_or(0, u32::from_be_bytes);
        let (kind, seqnum, status) = (word(0), word(4), word(20));
        match kind {
            3 => {
                let is_in = remove(&mut self.submitted, seqnum);
                let data = if is_in.expect("an answer to no transfer") { word(24) as usize } else { 0 };
                assert_eq!(reply.len(), HEADER + data, "actual_length");
                assert!(status == 0 || data == 0, "data of a transfer that failed");
            }
            4 => {
                assert_eq!(reply.len(), HEADER);
                let target = remove(&mut self.unlinking, seqnum).expect("an answer to no UNLINK");
                match status as i32 {
                    // It was answered before, or is unknown.
                    0 => {}
                    -104 => {
                        remove(&mut self.submitted, target)
                            .expect("what was taken back had not been answered");
                    }
                    other => panic!("status {other} of an UNLINK"),
                }
            }
            other => panic!("a reply of type {other}"),
        }
    }
}

/// Takes the oldest of that number.
fn remove<T>(list: &mut Vec<(u32, T)>, number: u32) -> Option<T> {
    let index = list.iter().position(|(of, _)| *of == number)?;
    Some(list.remove(index).1)
}

fn submit(
    seqnum: u32,
    device: u32,
    direction: u32,
    endpoint: u32,
    length: u32,
    packets: u32,
    setup: &[u8],
) -> Vec<u8> {
    let words = [1, seqnum, 0x0001_0000 | device, direction, endpoint, 0x200, length, 0, packets, 0];
    let mut bytes = words.map(u32::to_be_bytes).concat();
    bytes.extend(setup.iter().chain(&[0; 8]).take(8));
    bytes
}

fn unlink(seqnum: u32, target: u32) -> Vec<u8> {
    let mut bytes = [2, seqnum, 0x0001_0001, 0, 0, target].map(u32::to_be_bytes).concat();
    bytes.resize(HEADER, 0);
    bytes
}
