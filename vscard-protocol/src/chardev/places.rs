//! Room for peers that are not yet known to want anything.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tokio::sync::watch;

/// Places for so many peers at a time. A newcomer always gets one: if there is none left, that of the peer that has not
/// said anything for the longest time. So nobody keeps others out by saying nothing, and whoever is rightly silent keeps
/// its place as long as nobody else wants it.
#[derive(Debug)]
pub struct Places {
    most: usize,
    /// In the order they came.
    held: Vec<Held>,
}

#[derive(Debug)]
struct Held {
    heard: Arc<Mutex<Option<Instant>>>,
    /// Dropped, the place is another's.
    held: watch::Sender<()>,
}

/// A peer's place; it ends with this.
#[derive(Debug)]
pub struct Place {
    heard: Arc<Mutex<Option<Instant>>>,
    held: watch::Receiver<()>,
}

impl Places {
    /// For so many peers, at least one.
    pub fn new(most: usize) -> Self {
        Self { most: most.max(1), held: Vec::new() }
    }

    /// A place for a peer that has just come. Those before it are given the time to be heard first. Safe to cancel.
    pub async fn take(&mut self) -> Place {
        tokio::task::yield_now().await;
        self.held.retain(|held| !held.held.is_closed());
        while self.held.len() >= self.most {
            let heard = |held: &Held| *held.heard.lock().unwrap_or_else(PoisonError::into_inner);
            // Who has never said anything is before all others, and the oldest of those the first.
            let silent = self.held.iter().map(heard).enumerate().min_by_key(|(_, heard)| *heard);
            let Some((index, _)) = silent else { break };
            self.held.remove(index);
        }
        let (held, taken) = watch::channel(());
        let heard = Arc::default();
        self.held.push(Held { heard: Arc::clone(&heard), held });
        Place { heard, held: taken }
    }
}

impl Place {
    /// The peer has said something.
    pub fn heard(&self) {
        *self.heard.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// Waits until another peer has the place: this one's connection is to be closed. Safe to cancel.
    pub async fn lost(&self) {
        // Nothing is ever sent: it ends as the other half is dropped.
        let _ = self.held.clone().changed().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn has_lost(place: &Place) -> bool {
        place.held.has_changed().is_err()
    }

    #[tokio::test]
    async fn who_has_been_silent_longest_gives_way() {
        let mut places = Places::new(3);
        let [first, second, third] = [places.take().await, places.take().await, places.take().await];
        first.heard();
        let fourth = places.take().await;
        assert!(has_lost(&second));
        third.heard();
        fourth.heard();
        assert!(![&first, &third, &fourth].into_iter().any(has_lost));
        let fifth = places.take().await;
        assert!(has_lost(&first) && !has_lost(&third));
        // A place that was left is for whoever comes next.
        drop(fourth);
        let _sixth = places.take().await;
        assert!(!has_lost(&third) && !has_lost(&fifth));
    }
}
