//! One slot's card, driven by a task of its own: a card that is slow holds up nobody else.

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use vscard_protocol::{Card, CardError, CardSource, Command, PresenceWatch};

use super::{Event, sleep_until};
use crate::{CardFailure, Outcome, SlotId, Token};

/// For how long a slot is empty at least. A removal and an insertion that a guest hears of at once look like
/// nothing to libccid and pcscd, or like a card that stays away.
const EMPTY: Duration = Duration::from_secs(1);

/// What the device wants of the card.
pub(super) enum Job {
    PowerOn(Token),
    PowerOff,
    Transmit(Token, Command),
    /// The user takes the card out, or puts it back.
    Eject(bool),
}

/// What became of the card.
pub(super) enum SlotEvent {
    Inserted,
    Removed,
    Completed(Token, Outcome),
}

pub(super) struct SlotTask {
    slot: SlotId,
    source: Arc<dyn CardSource>,
    watch: PresenceWatch,
    events: mpsc::Sender<Event>,
    /// The insertion the device knows of.
    insertion: Option<u64>,
    ejected: bool,
    /// No card is shown before this, so that the guest sees that the one before it is gone.
    empty_until: Option<Instant>,
    card: Option<Box<dyn Card>>,
}

/// Why a card is no longer waited for.
enum Next<T> {
    Done(T),
    Job(Option<Job>),
    Changed,
}

impl SlotTask {
    pub(super) fn new(slot: SlotId, source: Arc<dyn CardSource>, events: mpsc::Sender<Event>) -> Self {
        let watch = source.presence();
        Self { slot, source, watch, events, insertion: None, ejected: false, empty_until: None, card: None }
    }

    pub(super) async fn run(mut self, mut jobs: mpsc::UnboundedReceiver<Job>) {
        self.look().await;
        let mut next = None;
        loop {
            let job = match next.take() {
                Some(job) => job,
                None => tokio::select! {
                    biased;
                    job = jobs.recv() => match job {
                        Some(job) => job,
                        None => return,
                    },
                    () = self.watch.changed() => {
                        self.look().await;
                        continue;
                    }
                    () = sleep_until(self.empty_until) => {
                        self.empty_until = None;
                        self.look().await;
                        continue;
                    }
                },
            };
            let interrupted = match job {
                Job::PowerOff => {
                    self.card = None;
                    continue;
                }
                Job::Eject(ejected) => {
                    self.ejected = ejected;
                    self.look().await;
                    continue;
                }
                Job::PowerOn(token) => {
                    self.card = None;
                    let insertion = self.insertion;
                    let source = self.source.clone();
                    let power = async {
                        match insertion {
                            Some(insertion) => source.power_on(insertion).await,
                            None => Err(CardError::Removed),
                        }
                    };
                    match race(power, &mut jobs, &mut self.watch).await {
                        Next::Done(card) => {
                            let outcome = match card {
                                Ok(card) => {
                                    let atr = card.atr().clone();
                                    self.card = Some(card);
                                    Outcome::Powered(atr)
                                }
                                Err(error) => failed(&error),
                            };
                            self.tell(SlotEvent::Completed(token, outcome)).await;
                            continue;
                        }
                        Next::Job(job) => Interrupted::By(job),
                        Next::Changed => Interrupted::Changed,
                    }
                }
                Job::Transmit(token, command) => {
                    let Some(card) = &mut self.card else {
                        let outcome = Outcome::Failed(CardFailure::Removed);
                        self.tell(SlotEvent::Completed(token, outcome)).await;
                        continue;
                    };
                    match race(card.transmit(&command), &mut jobs, &mut self.watch).await {
                        Next::Done(response) => {
                            let outcome = match response {
                                Ok(response) => Outcome::Response(response),
                                Err(error) => failed(&error),
                            };
                            self.tell(SlotEvent::Completed(token, outcome)).await;
                            continue;
                        }
                        Next::Job(job) => Interrupted::By(job),
                        Next::Changed => Interrupted::Changed,
                    }
                }
            };
            match interrupted {
                Interrupted::By(Some(job)) => next = Some(job),
                Interrupted::By(None) => return,
                // The device answers for what was under way when it hears of the removal.
                Interrupted::Changed => self.look().await,
            }
        }
    }

    /// Tells the device what is in now; another insertion is a removal first.
    async fn look(&mut self) {
        let now = if self.ejected { None } else { self.watch.get().insertion() };
        if now == self.insertion {
            return;
        }
        if self.insertion.take().is_some() {
            self.card = None;
            self.empty_until = Some(Instant::now() + EMPTY);
            self.tell(SlotEvent::Removed).await;
        }
        if now.is_some() && self.empty_until.is_none() {
            self.insertion = now;
            self.tell(SlotEvent::Inserted).await;
        }
    }

    async fn tell(&mut self, event: SlotEvent) {
        // A reader that has ended needs no news.
        let _ = self.events.send(Event::Slot(self.slot, event)).await;
    }
}

enum Interrupted {
    By(Option<Job>),
    Changed,
}

/// Waits for the card, but not longer than until something else is wanted of it or it is pulled out. What it
/// answers afterwards reaches nobody.
async fn race<T>(
    card: impl Future<Output = T>,
    jobs: &mut mpsc::UnboundedReceiver<Job>,
    watch: &mut PresenceWatch,
) -> Next<T> {
    let card = pin!(card);
    tokio::select! {
        biased;
        job = jobs.recv() => Next::Job(job),
        () = watch.changed() => Next::Changed,
        done = card => Next::Done(done),
    }
}

fn failed(error: &CardError) -> Outcome {
    tracing::debug!("{error}");
    Outcome::Failed(match error {
        CardError::Removed => CardFailure::Removed,
        CardError::Mute => CardFailure::Mute,
        CardError::Busy => CardFailure::Busy,
        _ => CardFailure::Hardware,
    })
}
