//! A card in a place where it can be inserted, removed and powered: [`CardSource`] over the synchronous core.
//!
//! Each slot has one thread, which owns the core and does all that blocks. Callers leave at most one power-up and
//! one command in a mailbox, so nothing can queue up behind a slow key operation, and wait without a runtime.
//! There is no deadline: a command takes as long as the key store does.

use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::thread::JoinHandle;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{oneshot, watch};
use vscard_protocol::{Atr, Card, CardError, CardSource, Command, Limits, Presence, PresenceWatch, Response};

use crate::card::{EmulatedCard, Step};
use crate::state::CardClaim;

/// A card and the slot it is in. Dropping it removes the card for good.
///
/// ```no_run
/// # async fn example(card: emulated_card::card::EmulatedCard) -> Result<(), Box<dyn std::error::Error>> {
/// use emulated_card::shell::CardSlot;
/// use vscard_protocol::{CardSource, Command};
///
/// let slot = CardSlot::new(card)?;
/// let insertion = slot.insert();
/// let mut card = slot.power_on(insertion).await?;
/// let response = card.transmit(&Command::parse(&[0x00, 0x20, 0x00, 0x00])?).await?;
/// # Ok(())
/// # }
/// ```
pub struct CardSlot {
    shared: Arc<Shared>,
}

struct Shared {
    atr: Atr,
    mailbox: Mutex<Mailbox>,
    changed: Condvar,
    presence: watch::Sender<Presence>,
    failed: watch::Sender<bool>,
}

#[derive(Default)]
struct Mailbox {
    /// The card that is in.
    insertion: Option<u64>,
    /// The number of the last one.
    insertions: u64,
    session: Option<Session>,
    sessions: u64,
    /// The core is to be reset before anything else: a session began or ended.
    reset: bool,
    /// The card was removed: what would make the next VERIFY quicker goes with it.
    forget: bool,
    /// Who waits for the reset.
    powered: Option<oneshot::Sender<()>>,
    command: Option<(Command, oneshot::Sender<Response>)>,
    forget_after: Option<Duration>,
    closed: bool,
    /// Whether the worker is about a command, which may write to the card.
    working: bool,
    /// Kept until the slot is closed and the worker writes no more.
    claim: Option<CardClaim>,
}

struct Session {
    id: u64,
    /// Dropped when the card is removed, which wakes the session's owner.
    _removed: oneshot::Sender<()>,
}

impl CardSlot {
    /// A slot with `card` at hand and not inserted.
    ///
    /// # Errors
    /// The system has no thread to give.
    pub fn new(card: EmulatedCard) -> io::Result<Self> {
        Self::start(card, None, || ()).map(|(slot, _)| slot)
    }

    /// As [`new`](Self::new), for a card that nobody else may have as long as this one can write.
    #[cfg(all(unix, feature = "nss", feature = "pem", feature = "pcsc"))]
    pub(crate) fn claimed(card: EmulatedCard, claim: CardClaim) -> io::Result<Self> {
        Self::start(card, Some(claim), || ()).map(|(slot, _)| slot)
    }

    /// As [`new`](Self::new), with the thread that owns the card. It ends soon after the slot was closed, and with it the
    /// card, its login and all that it holds; if it ends by a fault, it calls `on_fault`.
    #[cfg(all(unix, feature = "nss"))]
    pub(crate) fn with_worker(card: EmulatedCard, on_fault: fn()) -> io::Result<(Self, JoinHandle<()>)> {
        Self::start(card, None, on_fault)
    }

    fn start(
        card: EmulatedCard,
        claim: Option<CardClaim>,
        on_fault: fn(),
    ) -> io::Result<(Self, JoinHandle<()>)> {
        let shared = Arc::new(Shared {
            atr: card.atr().clone(),
            mailbox: Mutex::new(Mailbox { claim, ..Mailbox::default() }),
            changed: Condvar::new(),
            presence: watch::Sender::new(Presence::Absent),
            failed: watch::Sender::new(false),
        });
        let worker = Worker { core: card, shared: Arc::clone(&shared), on_fault };
        let worker = std::thread::Builder::new().name("card".into()).spawn(move || worker.run())?;
        Ok((Self { shared }, worker))
    }

    /// Inserts the card, if it is not in. Returns the number of the insertion.
    pub fn insert(&self) -> u64 {
        let mut mailbox = self.shared.lock();
        if let Some(insertion) = mailbox.insertion {
            return insertion;
        }
        mailbox.insertions += 1;
        let insertion = mailbox.insertions;
        if !mailbox.closed {
            mailbox.insertion = Some(insertion);
            let atr = self.shared.atr.clone();
            self.shared.presence.send_replace(Presence::Present { insertion, atr, limits: Limits::EXTENDED });
        }
        insertion
    }

    /// Removes the card, if it is in. A session ends at once, with [`CardError::Removed`]; a command being worked
    /// on changes nothing any more.
    pub fn remove(&self) {
        self.shared.remove(&mut self.shared.lock());
    }

    /// Waits until a fault in the program or in its libraries (a panic) has taken the card away for good: nothing can be
    /// inserted here any more. For ever if there is none.
    pub async fn failed(&self) {
        // It ends with an error only when the sender is gone, which is in this slot.
        let _ = self.shared.failed.subscribe().wait_for(|failed| *failed).await;
    }

    /// Whether [`failed`](Self::failed) would end at once.
    #[cfg(all(unix, feature = "nss"))]
    pub(crate) fn has_failed(&self) -> bool {
        *self.shared.failed.borrow()
    }

    /// Whether a verified PIN is forgotten after that long without a command, and after how long.
    pub fn forget_pin(&self, after: Option<Duration>) {
        self.shared.lock().forget_after = after;
        self.shared.changed.notify_all();
    }

    /// Removes the card for good, also while others have this slot.
    pub(crate) fn close(&self) {
        self.shared.close();
    }
}

impl Drop for CardSlot {
    fn drop(&mut self) {
        self.close();
    }
}

#[async_trait]
impl CardSource for CardSlot {
    fn presence(&self) -> PresenceWatch {
        self.shared.presence.subscribe().into()
    }

    async fn power_on(&self, insertion: u64) -> Result<Box<dyn Card>, CardError> {
        let (mut card, mut powered) = self.shared.begin(insertion)?;
        or_removed(&mut card.removed, &mut powered).await?;
        Ok(Box::new(card))
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Mailbox> {
        // Nothing that holds the lock can panic half-way through a change.
        self.mailbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(self: &Arc<Self>, insertion: u64) -> Result<(PoweredCard, oneshot::Receiver<()>), CardError> {
        let mut mailbox = self.lock();
        if mailbox.insertion != Some(insertion) {
            return Err(CardError::Removed);
        }
        if mailbox.session.is_some() {
            return Err(CardError::Busy);
        }
        mailbox.sessions += 1;
        let session = mailbox.sessions;
        let (removed_sender, removed) = oneshot::channel();
        let (powered_sender, powered) = oneshot::channel();
        mailbox.session = Some(Session { id: session, _removed: removed_sender });
        mailbox.powered = Some(powered_sender);
        mailbox.reset = true;
        self.changed.notify_all();
        Ok((PoweredCard { shared: Arc::clone(self), session, removed, answer: None }, powered))
    }

    /// Ends the session there is, if any. What it left in the mailbox is not begun.
    fn end_session(&self, mailbox: &mut Mailbox) {
        // First the sign of removal, so that whoever misses an answer knows why.
        if mailbox.session.take().is_some() {
            mailbox.powered = None;
            mailbox.command = None;
            mailbox.reset = true;
            self.changed.notify_all();
        }
    }

    fn remove(&self, mailbox: &mut Mailbox) {
        self.end_session(mailbox);
        if mailbox.insertion.take().is_some() {
            mailbox.forget = true;
            self.changed.notify_all();
            self.presence.send_replace(Presence::Absent);
        }
    }

    fn close(&self) {
        let mut mailbox = self.lock();
        mailbox.closed = true;
        self.remove(&mut mailbox);
        if !mailbox.working {
            // Here rather than when the worker has ended: whoever dropped the slot can have the card again at once.
            mailbox.claim = None;
        }
        self.changed.notify_all();
    }
}

/// The thread that owns the core.
struct Worker {
    core: EmulatedCard,
    shared: Arc<Shared>,
    on_fault: fn(),
}

enum Task {
    Reset(Option<oneshot::Sender<()>>),
    Command(Command, oneshot::Sender<Response>),
    Forget,
    End,
}

impl Worker {
    fn run(mut self) {
        loop {
            match self.next() {
                Task::Reset(powered) => {
                    self.core.reset();
                    // Nobody may be waiting any more; so it is below.
                    let _ = powered.map(|powered| powered.send(()));
                }
                Task::Command(command, reply) => {
                    let response = match self.core.command(&command) {
                        Step::Answer(response) => response,
                        Step::Work(job) => self.core.finish(job.run()),
                    };
                    let _ = reply.send(response);
                }
                Task::Forget => self.core.logout(),
                Task::End => return,
            }
        }
    }

    fn next(&self) -> Task {
        let mut mailbox = self.shared.lock();
        mailbox.working = false;
        let idle_since = since_boot();
        loop {
            if std::mem::take(&mut mailbox.forget) {
                return Task::Forget;
            }
            if mailbox.reset {
                mailbox.reset = false;
                return Task::Reset(mailbox.powered.take());
            }
            // Before the command, which may be what ends a wait that suspension has made too long.
            let left = match mailbox.forget_after {
                Some(after) if self.core.remembers() => {
                    match after.checked_sub(since_boot().saturating_sub(idle_since)) {
                        Some(left) if !left.is_zero() => Some(left),
                        _ => return Task::Forget,
                    }
                }
                _ => None,
            };
            if let Some((command, reply)) = mailbox.command.take() {
                mailbox.working = true;
                return Task::Command(command, reply);
            }
            if mailbox.closed {
                return Task::End;
            }
            let changed = &self.shared.changed;
            mailbox = match left {
                Some(left) => changed.wait_timeout(mailbox, left).unwrap_or_else(PoisonError::into_inner).0,
                None => changed.wait(mailbox).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}

/// Time since the system was booted, that in which it was suspended included: a PIN is not to be found verified
/// after the lid was closed for a night.
#[cfg(target_os = "linux")]
fn since_boot() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::try_from(now).unwrap_or_default()
}

/// Time since an arbitrary moment; whether suspension counts is the system's to say.
#[cfg(not(target_os = "linux"))]
fn since_boot() -> Duration {
    static START: std::sync::LazyLock<std::time::Instant> = std::sync::LazyLock::new(std::time::Instant::now);
    START.elapsed()
}

impl Drop for Worker {
    /// Also when a key store panicked: then the card is gone, and nobody waits for its answers.
    fn drop(&mut self) {
        self.shared.lock().working = false;
        self.shared.close();
        if std::thread::panicking() {
            tracing::error!(
                "a fault in this program took the card away: it cannot be used before a new start"
            );
            self.shared.failed.send_replace(true);
            (self.on_fault)();
        }
    }
}

/// A session.
struct PoweredCard {
    shared: Arc<Shared>,
    session: u64,
    removed: oneshot::Receiver<()>,
    /// Of a command that was begun and whose answer nobody took.
    answer: Option<oneshot::Receiver<Response>>,
}

impl PoweredCard {
    /// Leaves a command for the worker, which has none of this session's.
    fn submit(&self, command: &Command) -> Result<oneshot::Receiver<Response>, CardError> {
        let mut mailbox = self.shared.lock();
        if mailbox.session.as_ref().is_none_or(|session| session.id != self.session) {
            return Err(CardError::Removed);
        }
        let (reply, answer) = oneshot::channel();
        mailbox.command = Some((command.clone(), reply));
        self.shared.changed.notify_all();
        Ok(answer)
    }
}

#[async_trait]
impl Card for PoweredCard {
    fn atr(&self) -> &Atr {
        &self.shared.atr
    }

    async fn transmit(&mut self, command: &Command) -> Result<Response, CardError> {
        if let Some(earlier) = &mut self.answer {
            let outcome = or_removed(&mut self.removed, earlier).await;
            self.answer = None;
            outcome?;
        }
        let answer = self.answer.insert(self.submit(command)?);
        let outcome = or_removed(&mut self.removed, answer).await;
        self.answer = None;
        outcome
    }
}

impl Drop for PoweredCard {
    fn drop(&mut self) {
        let mut mailbox = self.shared.lock();
        if mailbox.session.as_ref().is_some_and(|session| session.id == self.session) {
            self.shared.end_session(&mut mailbox);
        }
    }
}

/// Waits for `answer`, or for the card to be removed.
async fn or_removed<T>(
    removed: &mut oneshot::Receiver<()>,
    answer: &mut oneshot::Receiver<T>,
) -> Result<T, CardError> {
    poll_fn(|context| {
        if Pin::new(&mut *removed).poll(context).is_ready() {
            return Poll::Ready(Err(CardError::Removed));
        }
        Pin::new(&mut *answer).poll(context).map(|answer| answer.map_err(|_| CardError::Removed))
    })
    .await
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

    use vscard_protocol::{Secret, StatusWord};

    use super::*;
    use crate::card::{CardOptions, Profile};
    use crate::keys::{Certificate, KeyError, KeyKind, KeyStore, UnlockError, Unlocked};
    use crate::pin::ReferenceData;
    use crate::state::{CardId, StateDirectory, StateError};

    /// A store that says when a PIN is compared, and waits until it may go on.
    struct Slow {
        certificates: Vec<Certificate>,
        entered: SyncSender<()>,
        leave: Mutex<Receiver<()>>,
    }

    impl KeyStore for Slow {
        fn certificates(&self) -> &[Certificate] {
            &self.certificates
        }

        fn needs_secret(&self) -> bool {
            true
        }

        fn unlock(&self, _: &Secret) -> Result<Box<dyn Unlocked>, UnlockError> {
            self.entered.send(()).unwrap();
            self.leave.lock().unwrap().recv().unwrap();
            Err(UnlockError::Wrong)
        }
    }

    /// What a right PIN leaves in memory goes on removal and after the time that a PIN is remembered for, though nobody
    /// is logged in any more; a power-off leaves it.
    #[tokio::test]
    async fn what_makes_the_next_verify_quicker_is_forgotten_in_time() {
        struct Open(Vec<Certificate>, watch::Sender<u32>);

        impl KeyStore for Open {
            fn certificates(&self) -> &[Certificate] {
                &self.0
            }

            fn needs_secret(&self) -> bool {
                true
            }

            fn unlock(&self, _: &Secret) -> Result<Box<dyn Unlocked>, UnlockError> {
                Err(UnlockError::NotChecked("not by the host's password".into()))
            }

            fn unlock_held(&self, _: &Secret) -> Result<Box<dyn Unlocked>, UnlockError> {
                Ok(Box::new(Nothing))
            }

            fn forget(&self) {
                self.1.send_modify(|count| *count += 1);
            }
        }

        struct Nothing;

        impl Unlocked for Nothing {
            fn rsa_raw(&self, _: usize, _: &[u8]) -> Result<Secret, KeyError> {
                Err(KeyError::Block)
            }

            fn ecdsa(&self, _: usize, _: &[u8]) -> Result<Vec<u8>, KeyError> {
                Err(KeyError::Block)
            }

            fn ecdh(&self, _: usize, _: &[u8]) -> Result<Secret, KeyError> {
                Err(KeyError::Block)
            }
        }

        let certificate = Certificate {
            name: "any".into(),
            der: b"any".to_vec(),
            public_key: b"any".to_vec(),
            kind: KeyKind::Rsa { bits: 1024 },
        };
        let id = CardId::derive(std::slice::from_ref(&certificate), "");
        let (forgotten, mut seen) = watch::channel(0);
        let store = Arc::new(Open(vec![certificate], forgotten));
        let reference = Arc::new(ReferenceData::in_memory_own(&b"123456"[..].into(), None, 3).unwrap());
        let options = CardOptions { profile: Profile::Piv, slots: vec![("9a".parse().unwrap(), 0)] };
        let card = EmulatedCard::new(store, reference.clone(), id, options, Box::new(|_| {})).unwrap();
        let slot = CardSlot::new(card).unwrap();
        let verify = Command::parse(b"\x00\x20\x00\x80\x08123456\xFF\xFF").unwrap();
        let log_in_and_power_off = async || {
            let mut card = slot.power_on(slot.insert()).await.unwrap();
            assert_eq!(card.transmit(&verify).await.unwrap().status(), StatusWord::SUCCESS);
            drop(card);
            // It is done when the next session has begun.
            drop(slot.power_on(slot.insert()).await.unwrap());
        };
        log_in_and_power_off().await;
        assert!(reference.remembers());
        assert_eq!(*seen.borrow_and_update(), 0);
        slot.remove();
        seen.changed().await.unwrap();
        assert!(!reference.remembers());

        log_in_and_power_off().await;
        assert!(reference.remembers());
        slot.forget_pin(Some(Duration::from_millis(10)));
        seen.changed().await.unwrap();
        assert!(!reference.remembers());
    }

    #[tokio::test]
    async fn a_card_is_claimed_until_it_has_done_what_it_is_about() {
        let place = tempfile::tempdir().unwrap();
        let directory = StateDirectory::at(place.path().join("state"));
        let certificate = Certificate {
            name: "any".into(),
            der: b"any".to_vec(),
            public_key: b"any".to_vec(),
            kind: KeyKind::Rsa { bits: 1024 },
        };
        let id = CardId::derive(std::slice::from_ref(&certificate), "");
        let claim = || directory.claim("/any".as_ref(), &id);
        let start = |entered, leave| {
            let certificates = vec![certificate.clone()];
            let store = Arc::new(Slow { certificates, entered, leave: Mutex::new(leave) });
            let options = CardOptions { profile: Profile::Piv, slots: vec![("9a".parse().unwrap(), 0)] };
            let reference = Arc::new(ReferenceData::in_memory(3));
            let card = EmulatedCard::new(store, reference, id.clone(), options, Box::new(|_| {})).unwrap();
            CardSlot::start(card, Some(claim().unwrap()), || ()).unwrap().0
        };

        let ((entered, has_entered), (leave, may_leave)) = (sync_channel(1), sync_channel(1));
        let slot = start(entered, may_leave);
        let mut card = slot.power_on(slot.insert()).await.unwrap();
        let verify = Command::parse(b"\x00\x20\x00\x80\x08123456\xFF\xFF").unwrap();
        let mut answer = pin!(card.transmit(&verify));
        poll_fn(|context| {
            assert!(answer.as_mut().poll(context).is_pending());
            Poll::Ready(())
        })
        .await;
        has_entered.recv().unwrap();
        drop(slot);
        assert!(matches!(answer.await, Err(CardError::Removed)));
        assert!(matches!(claim(), Err(StateError::InUse { .. })));
        leave.send(()).unwrap();
        // The store is gone when the thread is.
        assert!(has_entered.recv().is_err());
        claim().unwrap();

        let ((entered, _), (_, may_leave)) = (sync_channel(1), sync_channel(1));
        drop(start(entered, may_leave));
        claim().unwrap();
    }
}
