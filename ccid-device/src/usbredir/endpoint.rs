//! IN endpoints: who waits for data, and what became of the last data.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use vscard_protocol::Secret;

use crate::Device;

/// Transfers that may wait at one endpoint. A guest's program can ask for more, and is refused.
pub(super) const MOST_PENDING: usize = 64;
/// Answers kept for each endpoint, should they have crossed their cancel: one for each slot.
const MOST_ANSWERED: usize = 16;
/// Bytes of answers kept for each endpoint: four of the longest.
const MOST_ANSWERED_BYTES: usize = 256 * 1024;
/// How long an answer is kept. It crosses its cancel within a round trip, and should not stay in memory for long.
const ANSWERED_FOR: Duration = Duration::from_secs(30);
/// A notification sent this shortly before receiving was stopped may not have reached the guest.
const NOTIFIED_FOR: Duration = Duration::from_secs(1);

/// An IN transfer that waits for data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pending {
    pub(super) id: u64,
    pub(super) stream: u32,
    /// Most bytes wanted.
    pub(super) length: u32,
}

/// A bulk IN endpoint.
pub(super) struct BulkIn {
    pub(super) address: u8,
    /// Oldest first.
    pub(super) pending: VecDeque<Pending>,
    /// Oldest first.
    answered: VecDeque<Answered>,
    answered_bytes: usize,
    /// Answers so far.
    answers: u64,
    /// Answers that crossed their cancel, to be given back to the device.
    lost: Vec<Answered>,
}

/// An answer that its transfer's cancel may be on the way to cross.
struct Answered {
    id: u64,
    number: u64,
    data: Secret,
    until: Instant,
}

impl BulkIn {
    pub(super) fn new(address: u8) -> Self {
        Self {
            address,
            pending: VecDeque::new(),
            answered: VecDeque::new(),
            answered_bytes: 0,
            answers: 0,
            lost: Vec::new(),
        }
    }

    /// The oldest transfer was answered with `data`.
    pub(super) fn answered(&mut self, id: u64, data: Secret, now: Instant) {
        self.answers += 1;
        self.answered_bytes += data.len();
        self.answered.push_back(Answered { id, number: self.answers, data, until: now + ANSWERED_FOR });
        while self.answered.len() > MOST_ANSWERED || self.answered_bytes > MOST_ANSWERED_BYTES {
            self.drop_oldest();
        }
    }

    /// A new request has this id, so whatever had it before is over.
    pub(super) fn is_over(&mut self, id: u64) {
        if let Some(index) = self.answered.iter().position(|answered| answered.id == id) {
            self.take(index);
        }
    }

    /// Takes a transfer that is cancelled while it waits.
    pub(super) fn cancel(&mut self, id: u64) -> Option<Pending> {
        let index = self.pending.iter().position(|pending| pending.id == id)?;
        self.pending.remove(index)
    }

    /// A transfer that was answered is cancelled: the guest does not get that answer.
    pub(super) fn lose(&mut self, id: u64) {
        let index = self.answered.iter().rposition(|answered| answered.id == id);
        let answered = index.and_then(|index| self.take(index));
        self.lost.extend(answered);
    }

    /// Gives lost answers back, the newest first, so that the oldest is the next to be read.
    pub(super) fn give_back(&mut self, device: &mut Device) {
        self.lost.sort_by_key(|answered| answered.number);
        while let Some(answered) = self.lost.pop() {
            device.bulk_in_return(self.address, answered.data);
        }
    }

    /// What was answered stays answered.
    pub(super) fn forget_answers(&mut self) {
        self.answered.clear();
        self.answered_bytes = 0;
        self.lost.clear();
    }

    /// When [`expire`](Self::expire) is to be called next.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.answered.front().map(|answered| answered.until)
    }

    /// Forgets what has been kept for long enough.
    pub(super) fn expire(&mut self, now: Instant) {
        while self.answered.front().is_some_and(|answered| answered.until <= now) {
            self.drop_oldest();
        }
    }

    fn drop_oldest(&mut self) {
        self.take(0);
    }

    fn take(&mut self, index: usize) -> Option<Answered> {
        let answered = self.answered.remove(index)?;
        self.answered_bytes -= answered.data.len();
        Some(answered)
    }

    #[cfg(test)]
    pub(super) fn kept(&self) -> (usize, usize) {
        assert_eq!(self.answered_bytes, self.answered.iter().map(|answered| answered.data.len()).sum());
        assert!(self.lost.is_empty());
        (self.answered.len(), self.answered_bytes)
    }
}

/// An interrupt IN endpoint: the guest starts and stops the flow of notifications.
pub(super) struct InterruptIn {
    pub(super) address: u8,
    pub(super) receiving: bool,
    /// Id of the next notification.
    next: u64,
    /// Until when the last one sent may be lost.
    last_until: Option<Instant>,
}

impl InterruptIn {
    pub(super) fn new(address: u8) -> Self {
        Self { address, receiving: false, next: 0, last_until: None }
    }

    pub(super) fn start(&mut self) {
        if !self.receiving {
            self.receiving = true;
            self.next = 0;
        }
    }

    /// QEMU drops what the guest has not read by now, so a notification sent just before goes back.
    pub(super) fn stop(&mut self, device: &mut Device, now: Instant) {
        self.receiving = false;
        if self.last_until.take().is_some_and(|until| now < until) {
            device.interrupt_in_return(self.address);
        }
    }

    /// As after a reset.
    pub(super) fn forget(&mut self) {
        self.receiving = false;
        self.last_until = None;
    }

    /// The id of a notification that is being sent.
    pub(super) fn sending(&mut self, now: Instant) -> u64 {
        let id = self.next;
        self.next = self.next.wrapping_add(1);
        self.last_until = Some(now + NOTIFIED_FOR);
        id
    }
}
