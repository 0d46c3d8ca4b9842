//! When to try again.

use std::time::{Duration, Instant};

/// First wait before trying again; doubled each time.
const FIRST: Duration = Duration::from_millis(250);
/// Longest wait before trying again.
const LONGEST: Duration = Duration::from_secs(5);
/// A connection that lasted this long was of use. Others are made ever more rarely: a forwarded port takes a
/// connection and drops it at once while nobody is behind it.
const LASTED: Duration = Duration::from_secs(1);

/// The waits between tries of one endpoint. All of it is kept here and none in a future, so that waiting can be
/// cancelled and gone on with.
#[derive(Debug)]
pub(super) struct Retry {
    delay: Duration,
    /// No try before then.
    at: Option<Instant>,
    /// When a connection was made that has to be made again if it ends.
    connected: Option<Instant>,
    /// The failure told last; a peer may be away for days.
    told: String,
}

impl Retry {
    pub(super) fn new() -> Self {
        Self { delay: FIRST, at: None, connected: None, told: String::new() }
    }

    /// When to try, if not at once. Whoever asks has no connection any more.
    pub(super) fn due(&mut self, now: Instant) -> Option<Instant> {
        if let Some(connected) = self.connected.take() {
            if now >= connected + LASTED {
                *self = Self::new();
            }
            self.put_off(now);
        }
        self.at
    }

    /// A connection was made to the peer.
    pub(super) fn connected(&mut self, now: Instant) {
        self.at = None;
        self.connected = Some(now);
    }

    /// The try failed; whether that is news.
    pub(super) fn failed(&mut self, failure: &str, now: Instant) -> bool {
        self.put_off(now);
        let is_news = failure != self.told;
        failure.clone_into(&mut self.told);
        is_news
    }

    fn put_off(&mut self, now: Instant) {
        self.at = Some(now + self.delay);
        self.delay = (self.delay * 2).min(LONGEST);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_until_a_connection_lasts() {
        let mut retry = Retry::new();
        let mut now = Instant::now();
        assert_eq!(retry.due(now), None);
        assert!(retry.failed("refused", now));
        assert_eq!(retry.due(now), Some(now + FIRST));
        // Whoever gave up waiting and asks again waits no longer.
        assert_eq!(retry.due(now + FIRST / 2), Some(now + FIRST));
        now += FIRST;
        assert!(!retry.failed("refused", now));
        assert_eq!(retry.due(now), Some(now + 2 * FIRST));
        assert!(retry.failed("no route", now));
        // Taken and dropped at once.
        retry.connected(now);
        assert_eq!(retry.due(now), Some(now + 8 * FIRST));
        for _ in 0..9 {
            retry.connected(now);
            now = retry.due(now).unwrap();
        }
        assert_eq!(retry.due(now + LONGEST), Some(now));
        retry.connected(now);
        now += LASTED;
        assert_eq!(retry.due(now), Some(now + FIRST));
        assert!(retry.failed("refused", now));
    }
}
