#![no_main]
//! See `src/usbip.rs`.

#[path = "../src/bench.rs"]
mod bench;
#[path = "../src/input.rs"]
mod input;
#[path = "../src/usbip.rs"]
mod target;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| target::run(bytes));
