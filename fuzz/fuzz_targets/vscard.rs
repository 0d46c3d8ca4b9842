#![no_main]
//! See `src/vscard.rs`.

#[path = "../src/input.rs"]
mod input;
#[path = "../src/vscard.rs"]
mod target;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| target::run(bytes));
