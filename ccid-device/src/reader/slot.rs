//! One slot's card, driven by a task of its own: a card that is slow holds up nobody else.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use vscard_protocol::{Card, CardError, CardSource, Command, PresenceWatch};

use super::Event;
use crate::{CardFailure, Outcome, SlotId, Token};

/// For how long a slot is empty at least. A removal and an insertion that a guest hears of at once look like
/// nothing to libccid and pcscd, or like a card that stays away.
const EMPTY: Duration = Duration::from_secs(1);

/// What the device wants of the card.
pub(super) enum Job {
    PowerOn(Token),
    PowerOff,
    Transmit(Token, Command),
    /// The user takes the card out, or puts it back. Whether a card is in then, is told when the guest can see it.
    Eject(bool, oneshot::Sender<bool>),
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
    /// Who is to hear whether a card is in.
    asked: Vec<oneshot::Sender<bool>>,
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
        Self {
            slot,
            source,
            watch,
            events,
            insertion: None,
            ejected: false,
            asked: Vec::new(),
            empty_until: None,
            card: None,
        }
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
                Job::Eject(ejected, asked) => {
                    self.ejected = ejected;
                    self.asked.push(asked);
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
                    let sight = Sight {
                        watch: &mut self.watch,
                        insertion,
                        ejected: &mut self.ejected,
                        asked: &mut self.asked,
                    };
                    match race(power, &mut jobs, sight).await {
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
                    let insertion = self.insertion;
                    let sight = Sight {
                        watch: &mut self.watch,
                        insertion,
                        ejected: &mut self.ejected,
                        asked: &mut self.asked,
                    };
                    match race(card.transmit(&command), &mut jobs, sight).await {
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
        if now != self.insertion {
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
        if now == self.insertion {
            answer(&mut self.asked, now.is_some());
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

/// What makes a slot's card another one, or none.
struct Sight<'a> {
    watch: &'a mut PresenceWatch,
    insertion: Option<u64>,
    ejected: &'a mut bool,
    asked: &'a mut Vec<oneshot::Sender<bool>>,
}

impl Sight<'_> {
    fn has_changed(&mut self) -> bool {
        let now = if *self.ejected { None } else { self.watch.get().insertion() };
        now != self.insertion
    }
}

/// Waits for the card, but not longer than until something else is wanted of it or it is pulled out. What it
/// answers afterwards reaches nobody.
async fn race<T>(
    card: impl Future<Output = T>,
    jobs: &mut mpsc::UnboundedReceiver<Job>,
    mut sight: Sight<'_>,
) -> Next<T> {
    let mut card = pin!(card);
    loop {
        tokio::select! {
            biased;
            job = jobs.recv() => match job {
                Some(Job::Eject(ejected, asked)) => {
                    *sight.ejected = ejected;
                    sight.asked.push(asked);
                }
                job => return Next::Job(job),
            },
            () = sight.watch.changed() => {}
            done = &mut card => return Next::Done(done),
        }
        // A look that shows the same card as before is no reason to give up its answer.
        if sight.has_changed() {
            return Next::Changed;
        }
        answer(sight.asked, sight.insertion.is_some());
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Whoever asked may have given up.
fn answer(asked: &mut Vec<oneshot::Sender<bool>>, present: bool) {
    for asked in asked.drain(..) {
        let _ = asked.send(present);
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

#[cfg(test)]
mod tests {
    use async_trait::async_trait;
    use tokio::sync::{Notify, watch};
    use vscard_protocol::{Atr, Limits, Presence, Response, StatusWord};

    use super::*;

    /// A card that answers when it is told to.
    struct Slow(Arc<Notify>, Atr);

    #[async_trait]
    impl Card for Slow {
        fn atr(&self) -> &Atr {
            &self.1
        }

        async fn transmit(&mut self, _command: &Command) -> Result<Response, CardError> {
            self.0.notified().await;
            Ok(StatusWord::SUCCESS.into())
        }
    }

    struct Source(watch::Sender<Presence>, Arc<Notify>);

    fn present(insertion: u64) -> Presence {
        let atr = Atr::t1(b"slow").expect("an ATR");
        Presence::Present { insertion, atr, limits: Limits::EXTENDED }
    }

    #[async_trait]
    impl CardSource for Source {
        fn presence(&self) -> PresenceWatch {
            self.0.subscribe().into()
        }

        async fn power_on(&self, _insertion: u64) -> Result<Box<dyn Card>, CardError> {
            Ok(Box::new(Slow(self.1.clone(), Atr::t1(b"slow").expect("an ATR"))))
        }
    }

    struct Bench {
        source: Arc<Source>,
        answer: Arc<Notify>,
        jobs: mpsc::UnboundedSender<Job>,
        events: mpsc::Receiver<Event>,
    }

    impl Bench {
        async fn transmitting() -> Self {
            let answer = Arc::new(Notify::new());
            let source = Arc::new(Source(watch::channel(present(1)).0, answer.clone()));
            let (told, events) = mpsc::channel(8);
            let (jobs, queue) = mpsc::unbounded_channel();
            tokio::spawn(SlotTask::new(SlotId(0), source.clone(), told).run(queue));
            let mut bench = Self { source, answer, jobs, events };
            assert_eq!(bench.next().await, "inserted");
            bench.send(Job::PowerOn(Token(1)));
            assert_eq!(bench.next().await, "completed 1 powered");
            bench.send(Job::Transmit(Token(2), Command::parse(&[0, 0xA4, 4, 0]).expect("a command")));
            bench
        }

        fn send(&self, job: Job) {
            assert!(self.jobs.send(job).is_ok());
        }

        /// Takes the card out, or puts it in; tells whether it is in.
        fn eject(&self, ejected: bool) -> oneshot::Receiver<bool> {
            let (asked, answer) = oneshot::channel();
            self.send(Job::Eject(ejected, asked));
            answer
        }

        async fn next(&mut self) -> String {
            let Some(Event::Slot(_, event)) = self.events.recv().await else { panic!("no event") };
            match event {
                SlotEvent::Inserted => "inserted".into(),
                SlotEvent::Removed => "removed".into(),
                SlotEvent::Completed(Token(token), outcome) => format!(
                    "completed {token} {}",
                    match outcome {
                        Outcome::Powered(_) => "powered",
                        Outcome::Response(_) => "answered",
                        Outcome::Failed(_) => "failed",
                    }
                ),
            }
        }
    }

    #[tokio::test]
    async fn a_look_that_shows_nothing_new_costs_no_answer() {
        let mut bench = Bench::transmitting().await;
        assert_eq!(bench.eject(false).await, Ok(true));
        bench.source.0.send_replace(present(1));
        tokio::task::yield_now().await;
        bench.answer.notify_one();
        assert_eq!(bench.next().await, "completed 2 answered");
    }

    #[tokio::test]
    async fn a_card_pulled_out_while_it_works_is_gone_at_once() {
        let mut bench = Bench::transmitting().await;
        assert_eq!(bench.eject(true).await, Ok(false));
        assert_eq!(bench.next().await, "removed");
        bench.answer.notify_one();
        bench.send(Job::Transmit(Token(3), Command::parse(&[0, 0xA4, 4, 0]).expect("a command")));
        assert_eq!(bench.next().await, "completed 3 failed");
    }

    #[tokio::test]
    async fn whoever_puts_a_card_in_hears_of_it_when_it_is() {
        tokio::time::pause();
        let mut bench = Bench::transmitting().await;
        assert_eq!(bench.eject(true).await, Ok(false));
        let (first, second) = (bench.eject(false), bench.eject(false));
        assert_eq!(bench.next().await, "removed");
        assert_eq!((first.await, second.await), (Ok(true), Ok(true)));
        assert_eq!(bench.next().await, "inserted");
        // Out before it could be shown; and a source that has none.
        assert_eq!(bench.eject(true).await, Ok(false));
        let (inserted, removed) = (bench.eject(false), bench.eject(true));
        assert_eq!((inserted.await, removed.await), (Ok(false), Ok(false)));
        bench.source.0.send_replace(Presence::Absent);
        assert_eq!(bench.eject(false).await, Ok(false));
    }

    #[tokio::test]
    async fn another_card_is_shown_after_a_second_without_one() {
        tokio::time::pause();
        let mut bench = Bench::transmitting().await;
        bench.source.0.send_replace(present(2));
        assert_eq!(bench.next().await, "removed");
        let removed = Instant::now();
        assert_eq!(bench.next().await, "inserted");
        assert!(removed.elapsed() >= Duration::from_millis(900));
    }
}
