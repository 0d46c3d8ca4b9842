#![no_main]
//! See `src/options.rs`.

#[path = "../src/options.rs"]
mod target;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| target::run(bytes));
