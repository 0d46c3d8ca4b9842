//! Everything a guest can do to the device, and everything cards can do, in any order.

use std::time::Duration;

use ccid_device::{ControlOutcome, Device, InOutcome, Setup};
use vscard_protocol::Secret;

use crate::bench::{Bench, WHOLE, message};
use crate::input::Input;

/// What a bulk-IN pipe has given, put together to answers.
#[derive(Default)]
struct Stream {
    /// The answer that is being read.
    answer: Vec<u8>,
    /// Transfers so far, with what there was of the answer before each.
    given: Vec<(Vec<u8>, Secret)>,
    /// Something was given back that was not the newest: what comes is no more known.
    is_lost: bool,
}

/// Does what `bytes` say.
pub(crate) fn run(bytes: &[u8]) {
    let input = &mut Input::new(bytes);
    let mut bench = Bench::new(input);
    let (interfaces, slots) = bench.shape();
    let mut streams: Vec<Stream> = (0..interfaces).map(|_| Stream::default()).collect();
    for _ in 0..1000 {
        if input.is_empty() {
            break;
        }
        let step = input.byte();
        match step % 16 {
            0 => {
                let [request_type, request] = [input.byte(), input.byte()];
                let [value, index, length] = [input.word(), input.word(), input.word()];
                let setup = Setup { request_type, request, value, index, length };
                control(&mut bench, setup, &input.block(), &mut streams);
            }
            // Those that matter most, without luck.
            1 => {
                let (slot, seq, interface) = (input.byte(), input.byte(), input.byte());
                let value = u16::from_le_bytes([slot, seq]);
                let abort = (0x21, 1, value, interface.into());
                let (request_type, request, value, index) = match input.byte() % 5 {
                    0 => (0x00, 9, 1, 0),
                    1 => (0x01, 11, 0, interface.into()),
                    2 => (0x02, 1, 0, (0x80 & slot | (2 * (interface & 7) + 1)).into()),
                    3 => (0x02, 3, 0, (0x80 & slot | (2 * (interface & 7) + 1)).into()),
                    _ => abort,
                };
                let setup = Setup { request_type, request, value, index, length: 0 };
                control(&mut bench, setup, &[], &mut streams);
            }
            2 => {
                let endpoint = input.byte();
                let _ = bench.device.bulk_out(endpoint, &input.block(), bench.now);
            }
            // A message that is none the worse for its header.
            3..=6 => {
                let kinds =
                    [0x62, 0x63, 0x65, 0x6F, 0x6C, 0x6D, 0x61, 0x6B, 0x6E, 0x6A, 0x69, 0x71, 0x72, 0x73];
                let kind = input.choose(&kinds);
                let (interface, slot, seq) = (input.byte(), input.byte(), input.byte());
                let parameters = [input.byte(), input.byte(), input.byte()];
                let mut message = message(kind, slot % (slots + 1), seq, &input.block());
                message[7..10].copy_from_slice(&parameters);
                let endpoint = 2 * (interface % interfaces) + 1;
                // In one transfer or in packets.
                let size = if step < 128 { message.len() } else { 64 };
                for packet in message.chunks(size) {
                    let _ = bench.device.bulk_out(endpoint, packet, bench.now);
                }
            }
            7 | 8 => {
                let interface = input.byte() % interfaces;
                let max = match input.byte() % 4 {
                    0 => WHOLE,
                    1 => 64,
                    2 => 512,
                    _ => input.word().into(),
                };
                bulk_in(&mut bench, interface, max, &mut streams[usize::from(interface)], slots);
            }
            9 => {
                let interface = input.byte() % interfaces;
                let stream = &mut streams[usize::from(interface)];
                if let Some((before, data)) = stream.given.pop() {
                    stream.answer = before;
                    bench.device.bulk_in_return(0x81 + 2 * interface, data);
                }
            }
            10 => {
                let interface = input.byte() % interfaces;
                let stream = &mut streams[usize::from(interface)];
                stream.is_lost = true;
                bench.device.bulk_in_return(0x81 + 2 * interface, Secret::new(input.block()));
            }
            11 => {
                let interface = input.byte() % interfaces;
                interrupt_in(&mut bench, 0x82 + 2 * interface, slots);
                if step >= 128 {
                    bench.device.interrupt_in_return(0x82 + 2 * interface);
                }
            }
            12 => {
                let endpoint = input.byte();
                match input.byte() % 4 {
                    0 => drop(bench.device.bulk_in(endpoint | 0x40, 64)),
                    1 => drop(bench.device.interrupt_in(endpoint & 0x8F | 1)),
                    2 => bench.device.bulk_in_return(endpoint & 0x7F, Secret::default()),
                    _ => bench.device.interrupt_in_return(endpoint & 0x7F),
                }
            }
            13 if step < 32 => {
                bench.device.reset(bench.now);
                forget(&mut streams);
            }
            13 if step < 128 => save_and_damage(&bench, input.word(), input.byte()),
            13 => {
                bench.check_size();
                let saved = bench.device.save();
                let restored = Device::restore(bench.config.clone(), saved.expose(), bench.now);
                bench.device = restored.expect("what it saved");
                // What was given before is given.
                streams.iter_mut().for_each(|stream| stream.given.clear());
            }
            _ => bench.event(input),
        }
        // Actions may wait.
        if step & 0x40 == 0 {
            bench.take_actions();
        }
    }
    bench.take_actions();
    bench.check_usable();
}

fn forget(streams: &mut [Stream]) {
    for stream in streams {
        *stream = Stream::default();
    }
}

fn control(bench: &mut Bench, setup: Setup, data: &[u8], streams: &mut [Stream]) {
    let outcome = bench.device.control(setup, data, bench.now);
    let ControlOutcome::Done(answer) = outcome else { return };
    assert!(answer.len() <= usize::from(setup.length), "more than was asked for");
    assert!(setup.request_type & 0x80 != 0 || answer.is_empty(), "an OUT request with an answer");
    match (setup.request_type, setup.request) {
        (0x00, 9) => forget(streams),
        (0x01, 11) => forget(&mut streams[setup.index.into()..][..1]),
        (0x02, 1) if setup.index & 0x81 == 0x81 => {
            forget(&mut streams[usize::from((setup.index & 0x0F) / 2)..][..1]);
        }
        _ => {}
    }
}

fn bulk_in(bench: &mut Bench, interface: u8, max: usize, stream: &mut Stream, slots: u8) {
    let address = 0x81 + 2 * interface;
    let is_ready = bench.device.in_ready(address);
    let outcome = bench.device.bulk_in(address, max);
    if bench.device.configuration() != 0 {
        assert_eq!(is_ready, !matches!(outcome, InOutcome::Nothing), "in_ready");
    }
    let InOutcome::Data(data) = outcome else { return };
    assert!(data.len() <= max, "{} bytes where {max} were asked for", data.len());
    if max == 0 {
        return;
    }
    let before = stream.answer.clone();
    if !stream.is_lost {
        assert!(!data.is_empty() || before.is_empty(), "an empty transfer within an answer");
        stream.answer.extend_from_slice(data.expose());
        if let Some(&[_, l0, l1, l2, l3]) = stream.answer.first_chunk() {
            let length = 10 + u32::from_le_bytes([l0, l1, l2, l3]) as usize;
            assert!(stream.answer.len() <= length, "one transfer with more than one answer");
            if stream.answer.len() == length {
                check_answer(&stream.answer, slots);
                assert!(length <= bench.config.max_message as usize, "an answer too long");
                stream.answer.clear();
            } else {
                assert_eq!(data.len(), max, "a short transfer within an answer");
            }
        }
    }
    if stream.given.len() == 32 {
        stream.given.remove(0);
    }
    stream.given.push((before, data));
}

fn interrupt_in(bench: &mut Bench, address: u8, slots: u8) {
    let InOutcome::Data(data) = bench.device.interrupt_in(address) else { return };
    let Some((0x50, bits)) = data.expose().split_first() else { panic!("no NotifySlotChange") };
    assert_eq!(bits.len(), usize::from(slots).div_ceil(4));
    let used = 2 * slots % 8;
    let last = bits.last().copied().unwrap_or_default();
    assert!(used == 0 || last >> used == 0, "bits of slots that do not exist");
    assert!(bits.iter().any(|byte| byte & 0xAA != 0), "a notification of no change");
}

/// A saved device with a byte changed is another one or none.
fn save_and_damage(bench: &Bench, at: u16, change: u8) {
    let mut bytes = bench.device.save().expose().to_vec();
    let at = usize::from(at) % bytes.len();
    bytes[at] ^= change;
    let Ok(mut device) = Device::restore(bench.config.clone(), &bytes, bench.now) else { return };
    for address in [0x81, 0x82] {
        let _ = device.bulk_in(address, 64);
        let _ = device.interrupt_in(address);
    }
    device.handle_deadline(bench.now + Duration::from_secs(40));
    let again = device.save();
    Device::restore(bench.config.clone(), again.expose(), bench.now).expect("what it saved");
}

/// A whole answer of an interface with that many slots is one (USB CCID 1.1 §6.2).
fn check_answer(answer: &[u8], slots: u8) {
    let &[kind, l0, l1, l2, l3, slot, _, status, _, last, ref data @ ..] = answer else {
        panic!("an answer of {} bytes", answer.len());
    };
    assert!((0x80..=0x84).contains(&kind), "an answer of type {kind:#04x}");
    assert_eq!(u32::from_le_bytes([l0, l1, l2, l3]) as usize, data.len(), "dwLength");
    assert!(slot < slots, "bSlot {slot} of {slots}");
    assert!(status & 0x3C == 0 && status & 3 < 3 && status >> 6 < 3, "bStatus {status:#04x}");
    if kind == 0x80 {
        assert!(matches!(last, 0..=3 | 0x10), "bChainParameter {last:#04x}");
    }
}
