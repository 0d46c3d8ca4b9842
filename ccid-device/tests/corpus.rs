//! The fuzzers' corpora as ordinary tests: each file, each file cut short, each file with a byte changed. What is
//! checked is in `fuzz/src`; `cargo xtask soak` looks for more.

#[path = "../../fuzz/src/bench.rs"]
mod bench;
#[path = "../../fuzz/src/ccid.rs"]
mod ccid;
#[path = "../../fuzz/src/corpus.rs"]
mod corpus;
#[path = "../../fuzz/src/input.rs"]
mod input;
#[path = "../../fuzz/src/usbip.rs"]
mod usbip;
#[path = "../../fuzz/src/usbredir.rs"]
mod usbredir;

#[test]
fn ccid_messages_and_cards_in_any_order() {
    corpus::run_all("ccid", ccid::run);
}

#[test]
fn usbredir_streams() {
    corpus::run_all("usbredir", usbredir::run);
}

#[test]
fn usbip_streams() {
    corpus::run_all("usbip", usbip::run);
}
