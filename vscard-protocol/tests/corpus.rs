//! The fuzzer's corpus as an ordinary test: each file, each file cut short, each file with a byte changed. What is
//! checked is in `fuzz/src`; `cargo xtask soak` looks for more.

#[path = "../../fuzz/src/corpus.rs"]
mod corpus;
#[path = "../../fuzz/src/input.rs"]
mod input;
#[path = "../../fuzz/src/vscard.rs"]
mod vscard;

#[test]
fn vscard_streams() {
    corpus::run_all("vscard", vscard::run);
}
