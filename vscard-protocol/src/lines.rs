//! How much of what a peer can repeat is logged.

use std::time::{Duration, Instant};

/// Lines that are logged at once, and after how long there is one more.
const LINES: (u32, Duration) = (64, Duration::from_secs(60));

/// Room in the log for what a guest or peer can make happen as fast as it likes: 64 lines at once, then one a minute.
///
/// ```
/// use std::time::Instant;
/// use vscard_protocol::LogLines;
///
/// let mut lines = LogLines::new(Instant::now());
/// if let Some(end) = lines.next(Instant::now()) {
///     println!("client connected{end}");
/// }
/// ```
#[derive(Debug)]
pub struct LogLines {
    left: u32,
    since: Instant,
}

impl LogLines {
    /// All of it.
    pub fn new(now: Instant) -> Self {
        Self { left: LINES.0, since: now }
    }

    /// If there is room for a line, what ends it.
    pub fn next(&mut self, now: Instant) -> Option<&'static str> {
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

#[cfg(test)]
mod tests {
    use super::*;

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
