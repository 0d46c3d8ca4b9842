//! How much of what a peer can repeat is logged.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lines that are logged at once, and after how long there is one more.
const LINES: (u32, Duration) = (64, Duration::from_secs(60));

/// Of one kind of event.
#[derive(Debug)]
struct LogLines {
    left: u32,
    since: Instant,
}

impl LogLines {
    /// All of it.
    fn new(now: Instant) -> Self {
        Self { left: LINES.0, since: now }
    }

    /// If there is room for a line, what ends it.
    fn next(&mut self, now: Instant) -> Option<&'static str> {
        while self.left < LINES.0 && now >= self.since + LINES.1 {
            self.left += 1;
            self.since += LINES.1;
        }
        if self.left == LINES.0 {
            self.since = now;
        }
        self.left = self.left.checked_sub(1)?;
        Some(if self.left == 0 { "; not all of this is told from now on" } else { "" })
    }
}

/// Room in the log for what a guest or peer can make happen as fast as it likes: for each kind of event 64 lines at once,
/// then one a minute, so that no flood of one kind hides another.
///
/// It belongs to a reader, a channel or a process, never to a connection or a session: whoever comes again gets no new
/// one. A kind is the program's, one of a few, and nothing that a peer can choose: [`std::mem::discriminant`] of a
/// notice, or a word.
///
/// ```
/// use vscard_protocol::LogBudget;
///
/// static LINES: LogBudget<&str> = LogBudget::new();
/// LINES.tell("refused", |end| println!("client refused{end}"));
/// ```
#[derive(Debug)]
pub struct LogBudget<K>(Mutex<Vec<(K, LogLines)>>);

impl<K> LogBudget<K> {
    /// All of it, for every kind.
    pub const fn new() -> Self {
        Self(Mutex::new(Vec::new()))
    }
}

impl<K> Default for LogBudget<K> {
    fn default() -> Self {
        Self::new()
    }
}

impl<K: PartialEq> LogBudget<K> {
    /// Tells a line of this kind if there is room for it now; it is to end with what `tell` is given.
    pub fn tell(&self, kind: K, tell: impl FnOnce(&str)) {
        if let Some(end) = self.next(kind, Instant::now()) {
            tell(end);
        }
    }

    /// If there is room for a line of this kind, what ends it.
    fn next(&self, kind: K, now: Instant) -> Option<&'static str> {
        let mut kinds = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, lines)) = kinds.iter_mut().find(|(of, _)| *of == kind) {
            return lines.next(now);
        }
        let mut lines = LogLines::new(now);
        let end = lines.next(now);
        kinds.push((kind, lines));
        end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_flood_of_one_kind_hides_another() {
        let now = Instant::now();
        let lines = LogBudget::new();
        assert_eq!((0..10_000).filter_map(|_| lines.next("flood", now)).count(), 64);
        assert_eq!((0..10_000).filter_map(|_| lines.next("rare", now)).count(), 64);
        assert_eq!(lines.next("flood", now + LINES.1), Some("; not all of this is told from now on"));
    }

    #[test]
    fn the_log_takes_so_many_lines() {
        let mut now = Instant::now();
        let mut lines = LogLines::new(now);
        let told = (0..1000).filter_map(|_| lines.next(now)).collect::<Vec<_>>();
        assert_eq!(told.len(), 64);
        assert!(told.iter().position(|end| !end.is_empty()) == Some(63), "{told:?}");
        now += LINES.1;
        assert!(lines.next(now).is_some() && lines.next(now).is_none());
        now += 1000 * LINES.1;
        assert_eq!((0..1000).filter_map(|_| lines.next(now)).count(), 64);
    }
}
