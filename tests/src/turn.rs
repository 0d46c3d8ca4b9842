//! Whose turn it is: tests run side by side, and one that measures time runs alone.
//!
//! A test takes its turn when it starts its first program, pcscd or guest, and has it until its thread ends. How many
//! tests there are at a time is libtest's to say (`RUST_TEST_THREADS`); [`alone`] waits until it is one.

use std::cell::RefCell;
use std::sync::{Condvar, Mutex, PoisonError};

#[derive(Default)]
struct Turns {
    /// Tests that have their turn.
    running: usize,
    /// Whether one of them is alone.
    alone: bool,
    /// Tests that want to be. Those that came after them wait.
    wanted: usize,
}

static TURNS: Mutex<Turns> = Mutex::new(Turns { running: 0, alone: false, wanted: 0 });
static CHANGED: Condvar = Condvar::new();

/// Given up with the thread of the test.
struct Turn;

thread_local! {
    static MINE: RefCell<Option<Turn>> = const { RefCell::new(None) };
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut turns = TURNS.lock().unwrap_or_else(PoisonError::into_inner);
        turns.running -= 1;
        turns.alone = false;
        CHANGED.notify_all();
    }
}

/// No other test runs until this one, which calls this before it starts anything, has ended.
pub fn alone() {
    take(true);
}

/// Waits while a test is, or wants to be, alone.
pub(crate) fn side_by_side() {
    if is_a_test() && MINE.with_borrow(Option::is_none) {
        take(false);
    }
}

/// The threads of a test's runtime, and those that it starts, belong to a test that has its turn. They must not wait for
/// another one, which the test that waits to be alone would never give them.
fn is_a_test() -> bool {
    std::thread::current().name().is_some_and(|name| !name.starts_with("tokio-"))
}

fn take(alone: bool) {
    // Who held a turn while it waits for another one could wait for itself.
    MINE.take();
    let mut turns = TURNS.lock().unwrap_or_else(PoisonError::into_inner);
    if alone {
        turns.wanted += 1;
        turns = CHANGED.wait_while(turns, |turns| turns.running > 0).unwrap_or_else(PoisonError::into_inner);
        turns.wanted -= 1;
        turns.alone = true;
    } else {
        turns = CHANGED
            .wait_while(turns, |turns| turns.alone || turns.wanted > 0)
            .unwrap_or_else(PoisonError::into_inner);
    }
    turns.running += 1;
    drop(turns);
    MINE.set(Some(Turn));
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Threads stand in for tests; each counts itself in, and sees who else is there.
    #[test]
    fn who_is_alone_is_alone_and_nobody_waits_for_ever() {
        static THERE: AtomicUsize = AtomicUsize::new(0);
        let test = |number: usize| {
            let body = move || {
                if number % 3 == 0 {
                    alone();
                } else {
                    side_by_side();
                }
                let before = THERE.fetch_add(1, Ordering::SeqCst);
                // Its second guest, and one that a task of its runtime starts.
                side_by_side();
                let task = std::thread::Builder::new().name("tokio-rt-worker".into());
                task.spawn(side_by_side).expect("a thread").join().expect("no panic");
                let after = THERE.fetch_sub(1, Ordering::SeqCst);
                assert!(number % 3 != 0 || (before, after) == (0, 1), "{before} before, {after} after");
            };
            std::thread::Builder::new().name(format!("test::{number}")).spawn(body).expect("a thread")
        };
        for test in (0..60).map(test).collect::<Vec<_>>() {
            test.join().expect("no panic");
        }
    }
}
