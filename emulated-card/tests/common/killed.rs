//! A child that is killed at a random moment of what it does again and again.
#![allow(clippy::unwrap_used, reason = "clippy sees the helpers of a test as no test")]

use std::io::BufRead;
use std::process::Child;
use std::time::{Duration, Instant};

/// What the child says before each round. After the round it says a line of its own.
pub(crate) const BEGIN: &str = "begin";

/// Lets the child do one to three whole rounds, and kills it in the next one or a little later: at a random part of the
/// time that the last whole one took, however slow the machine is. Returns the lines that it said after its rounds, also
/// those that nobody had read yet.
pub(crate) fn kill_in_a_round(child: &mut Child, output: &mut impl BufRead) -> Vec<String> {
    let (mut said, mut begun, mut took) = (Vec::new(), Instant::now(), Duration::ZERO);
    let mut lines = output.lines().map(Result::unwrap).skip_while(|line| line != BEGIN);
    let rounds = 1 + usize::try_from(random() % 3).unwrap();
    loop {
        let line = lines.next().expect("the child ended by itself");
        if line != BEGIN {
            took = begun.elapsed();
            said.push(line);
        } else if said.len() >= rounds {
            break;
        } else {
            begun = Instant::now();
        }
    }
    // Up to a quarter more, for a round that takes longer than the last one.
    std::thread::sleep(took.mul_f64(1.25 * (random() as f64 / u64::MAX as f64)));
    child.kill().unwrap();
    child.wait().unwrap();
    said.extend(lines.filter(|line| line != BEGIN));
    said
}

fn random() -> u64 {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).unwrap();
    u64::from_ne_bytes(bytes)
}
