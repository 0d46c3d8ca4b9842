//! XfrBlock round trips per second through a device and a card that echoes, in one thread.
#![allow(missing_docs, clippy::unwrap_used, reason = "criterion's macro has no docs; a bench is no library")]
#![forbid(unsafe_code)]

use std::hint::black_box;
use std::time::{Duration, Instant};

use ccid_device::{Action, Device, DeviceConfig, InOutcome, Layout, Outcome, Setup, SlotId};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use vscard_protocol::{Atr, Command, Response, StatusWord};

fn message(kind: u8, slot: u8, data: &[u8]) -> Vec<u8> {
    let mut message = vec![kind];
    message.extend((data.len() as u32).to_le_bytes());
    message.extend([slot, 0, 0, 0, 0]);
    message.extend(data);
    message
}

fn powered(layout: Layout, now: Instant) -> Device {
    let mut device = Device::new(DeviceConfig { layout, ..DeviceConfig::new("bench") }).unwrap();
    let configure = Setup { request_type: 0, request: 9, value: 1, index: 0, length: 0 };
    device.control(configure, &[], now);
    for slot in device.slots() {
        device.insert(slot, now);
        round_trip(&mut device, &message(0x62, slot.0, &[]), now);
    }
    device
}

/// A message in, the card's work, the answer out.
fn round_trip(device: &mut Device, message: &[u8], now: Instant) -> usize {
    device.bulk_out(0x01, message, now);
    while let Some(action) = device.poll_action() {
        match action {
            Action::PowerOn { token, .. } => {
                device.complete(token, Outcome::Powered(Atr::t1(b"echo").unwrap()), now);
            }
            Action::PowerOff { .. } => {}
            Action::Transmit { token, command, .. } => {
                let response = Response::new(command.data(), StatusWord::SUCCESS);
                device.complete(token, Outcome::Response(response), now);
            }
        }
    }
    black_box(device.next_deadline());
    match device.bulk_in(0x81, 65_554) {
        InOutcome::Data(answer) => answer.len(),
        other => panic!("{other:?}"),
    }
}

fn xfr(criterion: &mut Criterion) {
    let now = Instant::now();
    let mut group = criterion.benchmark_group("XfrBlock round trips");
    group.throughput(Throughput::Elements(1));
    for (name, layout, slot) in
        [("1 slot", Layout::Slots(1), SlotId(0)), ("last of 16 slots", Layout::Slots(16), SlotId(15))]
    {
        for length in [7, 255, 4096] {
            let mut device = powered(layout, now);
            let command = Command::build([0x00, 0xA4, 0x04, 0x00], &vec![0xA5; length], Some(256)).unwrap();
            let bytes = message(0x6F, slot.0, command.as_bytes());
            group.bench_function(BenchmarkId::new(name, length), |bencher| {
                bencher.iter(|| {
                    let answer = round_trip(&mut device, black_box(&bytes), now);
                    assert_eq!(answer, 10 + length + 2);
                });
            });
        }
    }
    group.finish();
}

criterion_group! {
    name = benches;
    // What is measured takes microseconds at most; criterion's eight seconds for each would tell nothing more.
    config = Criterion::default().warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    targets = xfr
}
criterion_main!(benches);
