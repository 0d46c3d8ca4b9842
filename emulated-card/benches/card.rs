//! How many commands a second the core does, with keys that cost nothing.
#![allow(missing_docs, clippy::unwrap_used, reason = "criterion's macro has no docs; a bench is no library")]

#[path = "../tests/common/mod.rs"]
mod common;

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use vscard_protocol::Command;

use common::{VERIFY, pki_aid, select, send, transmit};

fn commands(criterion: &mut Criterion) {
    let mut card = common::card(3, 2048);
    send(&mut card, VERIFY);
    send(&mut card, &select(&pki_aid(0)));
    let parsed = |bytes: &[u8]| Command::parse(bytes).unwrap();
    let sign = Command::build([0x00, 0x42, 0x00, 0x00], &[0x55; 256], Some(256)).unwrap();
    let mut group = criterion.benchmark_group("card");
    group.throughput(Throughput::Elements(1));
    for (name, command) in [
        ("SELECT", parsed(&[&[0x00, 0xA4, 0x04, 0x00, 0x07], &pki_aid(0)[..], &[0x00]].concat())),
        ("READ BUFFER", parsed(&[0x80, 0x52, 0x00, 0x02, 0x02, 0x02, 0xF0, 0xF0])),
        ("SIGN/DECRYPT", sign),
    ] {
        assert_eq!(transmit(&mut card, &command).status().0, 0x9000);
        group.bench_function(name, |bencher| bencher.iter(|| transmit(&mut card, black_box(&command))));
    }
    group.finish();
}

criterion_group!(benches, commands);
criterion_main!(benches);
