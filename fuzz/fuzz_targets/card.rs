#![no_main]
//! See `src/card.rs`.

#[path = "../src/input.rs"]
mod input;
#[path = "../src/card.rs"]
mod target;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| target::run(bytes));
