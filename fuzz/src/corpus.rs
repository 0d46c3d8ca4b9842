//! Runs a corpus without a fuzzer.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;

/// Of each kind of change, so many for a file at most; they are spread over it.
const MOST_CHANGES: usize = 120;

/// Runs every file of a corpus: as it is, cut at every length, and with each of its bytes changed. Says which input
/// was at work when one fails.
pub(crate) fn run_all(target: &str, run: fn(&[u8])) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let files = fs::read_dir(&directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    let mut count = 0;
    for file in files {
        let path = file.expect("a directory's entry").path();
        let bytes = fs::read(&path).expect("a file of a corpus");
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let check = |bytes: &[u8], change: &str| {
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| run(bytes))) {
                eprintln!("{target}/{name}, {change}: {bytes:02X?}");
                resume_unwind(panic);
            }
        };
        check(&bytes, "as it is");
        for at in (0..bytes.len()).step_by(bytes.len().div_ceil(MOST_CHANGES).max(1)) {
            check(&bytes[..at], "cut");
            let mut changed = bytes.clone();
            changed[at] ^= [0x01, 0x80, 0xFF, 0x10][at % 4];
            check(&changed, "changed");
        }
        count += 1;
    }
    assert!(count > 10, "{count} files in {}", directory.display());
}
