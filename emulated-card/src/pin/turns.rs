//! How many may do something at a time.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Lets so many through at a time, in the order in which they came.
pub(super) struct Turns {
    most: u64,
    count: Mutex<Count>,
    ended: Condvar,
}

#[derive(Default)]
struct Count {
    begun: u64,
    ended: u64,
}

/// Dropping it lets the next one through.
pub(super) struct Turn<'a>(&'a Turns);

impl Turns {
    pub(super) fn new(most: u64) -> Self {
        Self { most, count: Mutex::default(), ended: Condvar::new() }
    }

    /// Waits for a turn. Whoever has one waits for no other.
    pub(super) fn take(&self) -> Turn<'_> {
        let mut count = self.lock();
        let place = count.begun;
        count.begun += 1;
        while place >= count.ended + self.most {
            count = self.ended.wait(count).unwrap_or_else(PoisonError::into_inner);
        }
        Turn(self)
    }

    fn lock(&self) -> MutexGuard<'_, Count> {
        // Nothing that holds the lock can panic.
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.lock().ended += 1;
        self.0.ended.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn so_many_at_a_time_and_the_next_when_one_ends() {
        let turns = Turns::new(2);
        let (tell, told) = channel();
        let first = turns.take();
        let second = turns.take();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _third = turns.take();
                tell.send("third began").unwrap();
            });
            // Its place is taken when it waits.
            while turns.lock().begun < 3 {
                std::thread::yield_now();
            }
            tell.send("first ended").unwrap();
            drop(first);
            assert_eq!([told.recv(), told.recv()], [Ok("first ended"), Ok("third began")]);
            drop(second);
        });
        drop((turns.take(), turns.take()));
    }

    #[test]
    fn a_panic_ends_a_turn() {
        let turns = Turns::new(1);
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _turn = turns.take();
            panic!("as wanted");
        }));
        assert!(panicked.is_err());
        drop(turns.take());
    }
}
