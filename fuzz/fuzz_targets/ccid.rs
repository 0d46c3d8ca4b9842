#![no_main]
//! See `src/ccid.rs`.

#[path = "../src/bench.rs"]
mod bench;
#[path = "../src/input.rs"]
mod input;
#[path = "../src/ccid.rs"]
mod target;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| target::run(bytes));
