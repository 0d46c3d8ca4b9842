//! The fuzzer's corpus as an ordinary test: each file, each file cut short, each file with a byte changed. What is
//! checked is in `fuzz/src`; `cargo xtask soak` looks for more.

#[path = "../../fuzz/src/corpus.rs"]
mod corpus;
#[path = "../../fuzz/src/options.rs"]
mod options;

#[test]
fn option_strings() {
    corpus::run_all("options", options::run);
}
