//! The fuzzer's corpus as an ordinary test: each file, each file cut short, each file with a byte changed. What is
//! checked is in `fuzz/src`; `cargo xtask soak` looks for more.

#[path = "../../fuzz/src/card.rs"]
mod card;
#[path = "../../fuzz/src/corpus.rs"]
mod corpus;
#[path = "../../fuzz/src/input.rs"]
#[allow(dead_code, reason = "each target uses a part of it")]
mod input;

#[test]
fn commands_to_a_card() {
    corpus::run_all("card", card::run);
}
