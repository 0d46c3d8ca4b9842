//! A card in one of the host's readers, passed through raw (PC/SC part 5).
//!
//! A monitor thread with a PC/SC context of its own watches the reader; each session has a thread with another
//! context, which owns the card's handle and does all that blocks. `pcscd` may come and go.
//!
//! # What sharing means
//! The card stays available to the host's programs. What one exchange of the guest consists of (SELECT, VERIFY,
//! a chained command, GET RESPONSE) is kept together in a PC/SC transaction, which lasts until the guest is idle
//! for half a second, five seconds at most (a PIN that is just asked about is awaited for half a second more); then
//! the host's programs have their turn. The card is reset before the first command of a session and, if the
//! guest sent any, when the session ends: a guest finds no PIN verified by another, and leaves none behind. In
//! between, a card knows no programs: while the guest is idle, a PIN it verified is verified for the host's
//! programs too, and the other way round. Whoever does not want that takes the card alone
//! ([`PcscConfig::exclusive`]).
//!
//! When another program resets the card, what the guest believes about it is wrong. The session is over, and the
//! guest sees the card removed and inserted again.

mod monitor;
mod reader;
mod session;

use std::ffi::CString;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ::pcsc::Context;
use async_trait::async_trait;
use tokio::sync::{oneshot, watch};
use vscard_protocol::{
    Atr, Card, CardError, CardSource, Command, Limits, LogBudget, Presence, PresenceWatch, Response,
};

use crate::pcsc::monitor::Monitor;
use crate::pcsc::session::{Actor, PoweredCard};

/// Which reader, and how its card is taken.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PcscConfig {
    /// The reader's name or a part of it, in which `*` stands for anything. A reader with exactly that name is
    /// preferred, else it is the first that fits; an empty name fits every reader.
    pub reader: String,
    /// Whether the host's other programs are kept from the card while a guest has it powered
    /// (`SCARD_SHARE_EXCLUSIVE`). Powering it up is then [`CardError::Busy`] while another program uses it.
    pub exclusive: bool,
}

/// The card in a reader of the host. Dropping it ends the session; it removes no card.
///
/// APDUs go through as they are. With a card that speaks T=0 they take the form that protocol demands: a command
/// with data goes without its Le, one with neither gets P3 = 00 (ISO/IEC 7816-3 §12.2.1); 61XX and 6CXX are the
/// guest's to answer.
///
/// There is no deadline: a command takes as long as the card, and the programs it is shared with, take.
///
/// ```no_run
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// use emulated_card::pcsc::{PcscConfig, PcscSource};
/// use vscard_protocol::CardSource;
///
/// let source = PcscSource::open(PcscConfig { reader: "Yubico*CCID".into(), exclusive: false })?;
/// let mut presence = source.presence();
/// while presence.get().insertion().is_none() {
///     presence.changed().await;
/// }
/// # Ok(())
/// # }
/// ```
pub struct PcscSource {
    shared: Arc<Shared>,
}

struct Shared {
    config: PcscConfig,
    state: Mutex<State>,
    changed: Condvar,
    presence: watch::Sender<Presence>,
    /// Cards, readers and other programs have lines repeated.
    lines: LogBudget<&'static str>,
}

#[derive(Default)]
struct State {
    /// The card that is in.
    inserted: Option<Inserted>,
    /// The card that is in, but whose reader has not yet said what it carries.
    coming: Option<Coming>,
    /// How often one was coming: counts of events begin anew with pcscd.
    comings: u64,
    /// The number of the last insertion.
    insertions: u64,
    session: Option<Session>,
    sessions: u64,
    /// Which session's thread has the handle; it may outlive its session.
    handle: Option<u64>,
    /// What the monitor waits in.
    monitoring: Option<Context>,
    /// The monitor has ended.
    unwatched: bool,
    closed: bool,
}

struct Coming {
    place: Place,
    number: u64,
}

#[derive(Clone)]
struct Inserted {
    insertion: u64,
    place: Place,
    limits: Limits,
}

/// One stay of a card in a reader, as `pcscd` tells it from others.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    reader: CString,
    /// Insertions and removals that the reader has seen.
    events: u32,
}

type Answer = Result<Response, CardError>;

struct Session {
    id: u64,
    command: Option<(Command, oneshot::Sender<Answer>)>,
    /// Dropped when the session ends, which wakes its owner.
    _removed: oneshot::Sender<()>,
}

/// What a session's thread is to do next.
enum Next {
    Command(Command, oneshot::Sender<Answer>),
    /// Nothing came in time.
    Idle,
    /// The session is over.
    End,
}

impl PcscSource {
    /// Watches for cards in the reader that `config` names, whether it is there yet or not.
    ///
    /// # Errors
    /// The system has no thread to give.
    pub fn open(config: PcscConfig) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            config,
            state: Mutex::default(),
            changed: Condvar::new(),
            presence: watch::Sender::new(Presence::Absent),
            lines: LogBudget::new(),
        });
        let monitor = Monitor::new(Arc::clone(&shared));
        std::thread::Builder::new().name("pcsc monitor".into()).spawn(move || monitor.run())?;
        Ok(Self { shared })
    }
}

impl Drop for PcscSource {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.closed = true;
        self.shared.remove(&mut state);
        self.shared.changed.notify_all();
        // A cancellation that comes before the wait it is meant for is lost (pcsc-lite), so it is repeated; a
        // monitor that hears none of them ends with its wait, a minute later.
        for _ in 0..10 {
            let Some(context) = state.monitoring.clone().filter(|_| !state.unwatched) else { return };
            drop(state);
            if context.cancel().is_err() {
                return;
            }
            drop(context);
            let patience = Duration::from_millis(20);
            state = self.shared.wait(self.shared.lock(), Some(Instant::now() + patience));
        }
    }
}

#[async_trait]
impl CardSource for PcscSource {
    fn presence(&self) -> PresenceWatch {
        self.shared.presence.subscribe().into()
    }

    async fn power_on(&self, insertion: u64) -> Result<Box<dyn Card>, CardError> {
        let (mut card, actor) = self.shared.begin(insertion)?;
        let (powered, mut is_powered) = oneshot::channel();
        std::thread::Builder::new()
            .name("pcsc card".into())
            .spawn(move || actor.run(powered))
            .map_err(|error| CardError::Failed(error.to_string()))?;
        card.powered(&mut is_powered).await?;
        Ok(Box::new(card))
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that holds the lock can panic half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a change, or until then.
    fn wait<'a>(&self, state: MutexGuard<'a, State>, until: Option<Instant>) -> MutexGuard<'a, State> {
        match until {
            Some(until) => {
                let left = until.saturating_duration_since(Instant::now());
                self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
            }
            None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
        }
    }

    fn begin(self: &Arc<Self>, insertion: u64) -> Result<(PoweredCard, Actor), CardError> {
        let mut state = self.lock();
        let inserted = state
            .inserted
            .clone()
            .filter(|inserted| inserted.insertion == insertion)
            .ok_or(CardError::Removed)?;
        let Presence::Present { atr, .. } = self.presence.borrow().clone() else {
            return Err(CardError::Removed);
        };
        if state.session.is_some() {
            return Err(CardError::Busy);
        }
        state.sessions += 1;
        let id = state.sessions;
        let (removed_sender, removed) = oneshot::channel();
        state.session = Some(Session { id, command: None, _removed: removed_sender });
        drop(state);
        let actor = Actor::new(Arc::clone(self), id, inserted.place);
        Ok((PoweredCard::new(Arc::clone(self), id, atr, inserted.limits, removed), actor))
    }

    /// A card is in; `limits` are asked for if it was not before.
    ///
    /// That waits for a program that has a transaction with the card, so it is done by a thread of its own: the
    /// card may go meanwhile.
    fn seen(self: &Arc<Self>, place: Place, atr: Atr, limits: impl FnOnce() -> Limits + Send + 'static) {
        let mut state = self.lock();
        let known = state.inserted.as_ref().map(|inserted| &inserted.place);
        let known = known.or(state.coming.as_ref().map(|coming| &coming.place));
        if known == Some(&place) {
            return;
        }
        self.remove(&mut state);
        state.comings += 1;
        let number = state.comings;
        state.coming = Some(Coming { place: place.clone(), number });
        drop(state);
        let shared = Arc::clone(self);
        let asking = std::thread::Builder::new().name("pcsc limits".into()).spawn(move || {
            let limits = limits();
            let mut state = shared.lock();
            if !state.closed && state.coming.as_ref().is_some_and(|coming| coming.number == number) {
                shared.insert(&mut state, place, atr, limits);
                shared.changed.notify_all();
            }
        });
        if let Err(error) = asking {
            self.lines.tell("no thread", |end| tracing::error!("the card cannot be used: {error}{end}"));
            self.lock().coming = None;
        }
    }

    fn insert(&self, state: &mut State, place: Place, atr: Atr, limits: Limits) {
        state.insertions += 1;
        let insertion = state.insertions;
        state.coming = None;
        state.inserted = Some(Inserted { insertion, place, limits });
        self.presence.send_replace(Presence::Present { insertion, atr, limits });
    }

    fn remove(&self, state: &mut State) {
        self.end_session(state);
        state.coming = None;
        if state.inserted.take().is_some() {
            self.presence.send_replace(Presence::Absent);
        }
    }

    fn end_session(&self, state: &mut State) {
        if state.session.take().is_some() {
            self.changed.notify_all();
        }
    }

    /// The card is no longer as `session` left it: for the guest it is removed, and inserted if it is still there.
    fn lose(&self, session: u64) {
        let mut state = self.lock();
        if state.session.as_ref().is_none_or(|current| current.id != session) {
            return;
        }
        self.end_session(&mut state);
        let inserted = state.inserted.clone();
        let Presence::Present { atr, .. } = self.presence.borrow().clone() else { return };
        if let Some(Inserted { place, limits, .. }) = inserted {
            self.insert(&mut state, place, atr, limits);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[tokio::test]
    async fn a_card_that_went_while_its_limits_were_asked_for_does_not_come() {
        let shared = Arc::new(Shared {
            config: PcscConfig::default(),
            state: Mutex::default(),
            changed: Condvar::new(),
            presence: watch::Sender::new(Presence::Absent),
            lines: LogBudget::new(),
        });
        let mut presence = shared.presence.subscribe();
        // Before and after a restart of pcscd, which counts anew.
        let place = Place { reader: c"reader".into(), events: 1 };
        let (leave, may_leave) = channel();
        shared.seen(place.clone(), Atr::t1(b"first").unwrap(), move || {
            may_leave.recv().unwrap();
            Limits::EXTENDED
        });
        shared.remove(&mut shared.lock());
        let second = Atr::t1(b"second").unwrap();
        let held = Arc::downgrade(&shared);
        shared.seen(place, second.clone(), move || {
            leave.send(()).unwrap();
            // The other thread has ended when only this one and the test are left.
            while held.strong_count() > 2 {
                std::thread::yield_now();
            }
            Limits::EXTENDED
        });
        presence.changed().await.unwrap();
        assert!(matches!(&*presence.borrow(), Presence::Present { atr, .. } if *atr == second));
    }
}
