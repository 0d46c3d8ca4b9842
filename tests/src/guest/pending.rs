//! Questions that wait for their answers.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

/// By number. Whoever waits learns at once when there will be no answer.
pub(super) struct Pending<T> {
    /// `None` when the line is gone.
    waiting: Mutex<Option<Waiting<T>>>,
}

struct Waiting<T> {
    next: u64,
    senders: HashMap<u64, oneshot::Sender<T>>,
}

impl<T> Default for Pending<T> {
    fn default() -> Self {
        Self { waiting: Mutex::new(Some(Waiting { next: 1, senders: HashMap::new() })) }
    }
}

impl<T> Pending<T> {
    /// A number nobody has, and where the answer will come. On a line that is gone it comes to nothing.
    pub(super) fn ask(&self) -> (u64, oneshot::Receiver<T>) {
        let (sender, receiver) = oneshot::channel();
        let Some(waiting) = &mut *self.lock() else { return (0, receiver) };
        let id = waiting.next;
        waiting.next += 1;
        waiting.senders.insert(id, sender);
        (id, receiver)
    }

    /// An answer to a question that was given up finds nobody.
    pub(super) fn answer(&self, id: u64, answer: T) {
        let sender = self.lock().as_mut().and_then(|waiting| waiting.senders.remove(&id));
        if let Some(sender) = sender {
            let _ = sender.send(answer);
        }
    }

    /// Whether it was still open.
    pub(super) fn give_up(&self, id: u64) -> bool {
        self.lock().as_mut().and_then(|waiting| waiting.senders.remove(&id)).is_some()
    }

    /// No question so far will be answered.
    pub(super) fn forget(&self) {
        if let Some(waiting) = &mut *self.lock() {
            waiting.senders.clear();
        }
    }

    /// No question will ever be answered again.
    pub(super) fn close(&self) {
        *self.lock() = None;
    }

    fn lock(&self) -> MutexGuard<'_, Option<Waiting<T>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
