#![no_main]
//! See `src/usbredir.rs`.

#[path = "../src/bench.rs"]
mod bench;
#[path = "../src/input.rs"]
mod input;
#[path = "../src/usbredir.rs"]
mod target;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| target::run(bytes));
