//! When to try again.

use std::time::{Duration, Instant};

/// First wait before trying again; doubled each time.
const FIRST: Duration = Duration::from_millis(250);
/// Longest wait before trying again.
const LONGEST: Duration = Duration::from_secs(5);
/// A connection that lasted this long was of use. Others are made ever more rarely: a forwarded port takes a
/// connection and drops it at once while nobody is behind it.
const LASTED: Duration = Duration::from_secs(1);
/// After so long the same failure is news again.
const FORGOTTEN: Duration = Duration::from_secs(60);

/// The waits between tries of one endpoint. All of it is kept here and none in a future, so that waiting can be
/// cancelled and gone on with.
#[derive(Debug)]
pub(super) struct Retry {
    delay: Duration,
    /// No try before then.
    at: Option<Instant>,
    /// When a connection was made that has to be made again if it ends.
    connected: Option<Instant>,
    /// The failure told last, and when it was met last: a peer may be away for days, and a listener out of file
    /// descriptors lets in some.
    told: Option<(String, Instant)>,
}

impl Retry {
    pub(super) fn new() -> Self {
        Self { delay: FIRST, at: None, connected: None, told: None }
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

    /// A peer has come. It, not we, will come again.
    pub(super) fn accepted(&mut self) {
        self.at = None;
        self.delay = FIRST;
    }

    /// The try failed; whether that is news. After one that costs nothing, the next need not be put off for long.
    pub(super) fn failed(&mut self, failure: &str, is_free: bool, now: Instant) -> bool {
        match is_free {
            true => self.at = Some(now + FIRST),
            false => self.put_off(now),
        }
        let told = self.told.replace((failure.to_owned(), now));
        told.is_none_or(|(told, met)| told != failure || now >= met + FORGOTTEN)
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
        assert!(retry.failed("refused", false, now));
        assert_eq!(retry.due(now), Some(now + FIRST));
        // Whoever gave up waiting and asks again waits no longer.
        assert_eq!(retry.due(now + FIRST / 2), Some(now + FIRST));
        now += FIRST;
        assert!(!retry.failed("refused", false, now));
        assert_eq!(retry.due(now), Some(now + 2 * FIRST));
        assert!(retry.failed("no route", false, now));
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
        assert!(retry.failed("refused", false, now));
    }

    #[test]
    fn who_is_not_there_yet_is_looked_for_often() {
        let mut retry = Retry::new();
        let mut now = Instant::now();
        for _ in 0..1000 {
            retry.failed("refused", true, now);
            assert_eq!(retry.due(now), Some(now + FIRST));
            now += FIRST;
        }
        // Who lets in and drops at once is not.
        retry.connected(now);
        assert_eq!(retry.due(now), Some(now + FIRST));
        retry.connected(now);
        assert_eq!(retry.due(now), Some(now + 2 * FIRST));
    }

    #[test]
    fn a_listener_waits_after_failures_only_and_tells_them_once() {
        let mut retry = Retry::new();
        let mut now = Instant::now();
        assert!(retry.failed("no file descriptors", false, now));
        now = retry.due(now).unwrap();
        retry.accepted();
        assert_eq!(retry.due(now), None);
        assert!(!retry.failed("no file descriptors", false, now));
        assert_eq!(retry.due(now), Some(now + FIRST));
        now += FORGOTTEN;
        assert!(retry.failed("no file descriptors", false, now));
    }
}
