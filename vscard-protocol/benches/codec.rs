//! How many messages, commands and ATRs a second the vocabulary and the codec do.
#![allow(missing_docs, clippy::unwrap_used, reason = "criterion's macro has no docs; a bench is no library")]
#![forbid(unsafe_code)]

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use vscard_protocol::codec::{Decoder, encode};
use vscard_protocol::message::{Body, MAX_PAYLOAD, Message, ReaderId};
use vscard_protocol::{Atr, Command, Secret};

/// A SELECT, the longest answer for a short Le, and an extended answer.
const LENGTHS: [usize; 3] = [16, 258, LONGEST];
const LONGEST: usize = 4096;

fn messages(criterion: &mut Criterion) {
    for length in LENGTHS {
        message(criterion, "messages", length, Throughput::Elements(1));
    }
    // Only here are the bytes what it costs.
    message(criterion, "bytes", LONGEST, Throughput::Bytes(LONGEST as u64));
}

fn message(criterion: &mut Criterion, unit: &str, length: usize, throughput: Throughput) {
    let message = Message::new(ReaderId::FIRST, Body::Apdu(Secret::new(vec![0xA5; length])));
    let wire = encode(&message).unwrap();
    let mut group = criterion.benchmark_group(format!("APDU, {unit}"));
    group.throughput(throughput);
    group.bench_function(BenchmarkId::new("encode", length), |bencher| {
        bencher.iter(|| encode(black_box(&message)).unwrap());
    });
    // One for the whole connection, as in use.
    let mut decoder = Decoder::new(MAX_PAYLOAD);
    group.bench_function(BenchmarkId::new("decode", length), |bencher| {
        bencher.iter(|| {
            let mut input = black_box(wire.expose());
            decoder.decode(&mut input).unwrap().unwrap()
        });
    });
    group.finish();
}

fn commands(criterion: &mut Criterion) {
    let short = [0x00, 0xA4, 0x04, 0x00, 0x07, 0xA0, 0x00, 0x00, 0x00, 0x79, 0x01, 0x00, 0x00];
    let extended = Command::build([0x00, 0x2A, 0x80, 0x86], &[0x55; 513], Some(512)).unwrap();
    let mut group = criterion.benchmark_group("Command::parse");
    group.throughput(Throughput::Elements(1));
    for (name, bytes) in [("case 4 short", &short[..]), ("case 4 extended", extended.as_bytes())] {
        group.bench_function(name, |bencher| bencher.iter(|| Command::parse(black_box(bytes)).unwrap()));
    }
    group.finish();
}

fn atrs(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("Atr::parse");
    group.throughput(Throughput::Elements(1));
    for (name, atr) in [("T=0", Atr::t0(b"VSCC").unwrap()), ("T=1", Atr::t1(b"VSCC").unwrap())] {
        group.bench_function(name, |bencher| bencher.iter(|| Atr::parse(black_box(atr.as_bytes())).unwrap()));
    }
    group.finish();
}

criterion_group! {
    name = benches;
    // What is measured takes microseconds at most; criterion's eight seconds for each would tell nothing more.
    config = Criterion::default().warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    targets = messages, commands, atrs
}
criterion_main!(benches);
