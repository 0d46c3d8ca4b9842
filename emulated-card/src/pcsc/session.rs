//! One session with the card: the thread that owns the handle, and the [`Card`] that leaves commands for it.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use pcsc::{
    Context, Disposition, Error, MAX_BUFFER_SIZE_EXTENDED, Protocol, Protocols, ReaderState, Scope,
    ShareMode, State, Transaction,
};
use tokio::sync::oneshot;
use vscard_protocol::apdu::ins;
use vscard_protocol::{Atr, Card, CardError, Case, Command, Limits, Response, Secret, StatusWord};
use zeroize::{Zeroize, Zeroizing};

use super::{Answer, Next, Place, Shared};

/// A transaction ends when the guest has sent nothing for this long.
const IDLE: Duration = Duration::from_millis(500);
/// After this it ends between two exchanges.
const LONG: Duration = Duration::from_secs(4);
/// After this it ends before an empty VERIFY: what is asked there must hold for the PIN that follows.
const QUESTION: Duration = Duration::from_secs(3);
/// It lasts no longer than this, not even for the rest of a chained command or of a long answer.
const LONGEST: Duration = Duration::from_secs(5);
/// Then another program gets its turn: pcsc-lite lets it ask for the card once in 200 ms.
const TURN: Duration = Duration::from_millis(250);

type Order = (Command, oneshot::Sender<Answer>);

/// The thread of one session.
pub(super) struct Actor {
    shared: Arc<Shared>,
    session: u64,
    place: Place,
}

/// How a transaction ended.
enum After {
    Idle,
    /// It took too long; this is still to be done.
    Turn(Order),
    /// The session is over, and the card was reset.
    Cleared,
    /// The session is over.
    End,
    /// The card is not as the session left it, and is to be left like this.
    Lost(Disposition),
}

/// How long the session has had the card without a pause in which another program gets it.
struct Held {
    time: Duration,
    until: Instant,
}

impl Held {
    fn add(&mut self, began: Instant, ended: Instant) {
        if TURN <= began.saturating_duration_since(self.until) {
            self.time = Duration::ZERO;
        }
        self.time += ended.saturating_duration_since(began);
        self.until = ended;
    }

    /// Whether it is another program's turn.
    fn is_long(&self, now: Instant) -> bool {
        LONG <= self.time && now.saturating_duration_since(self.until) < TURN
    }
}

/// What the thread knows of its card.
struct Connected {
    card: pcsc::Card,
    context: Context,
    /// It was reset for this session, which has sent it commands: it must be reset when the session ends.
    used: bool,
    protocol: Option<Protocol>,
    buffer: Zeroizing<Vec<u8>>,
}

impl Actor {
    pub(super) fn new(shared: Arc<Shared>, session: u64, place: Place) -> Self {
        Self { shared, session, place }
    }

    pub(super) fn run(self, powered: oneshot::Sender<Result<(), CardError>>) {
        let Some(_handle) = Handle::wait(&self.shared, self.session) else { return };
        // Nobody may be waiting any more; so it is with every answer.
        match self.connect() {
            Ok(connected) => {
                let _ = powered.send(Ok(()));
                self.serve(connected);
            }
            Err(error) => {
                let _ = powered.send(Err(error));
            }
        }
    }

    fn mode(&self) -> ShareMode {
        if self.shared.config.exclusive { ShareMode::Exclusive } else { ShareMode::Shared }
    }

    fn connect(&self) -> Result<Connected, CardError> {
        let context = Context::establish(Scope::System).map_err(failure)?;
        let card = context.connect(&self.place.reader, self.mode(), Protocols::ANY).map_err(failure)?;
        if !self.is_in(&context) {
            let _ = card.disconnect(Disposition::LeaveCard);
            return Err(CardError::Removed);
        }
        let buffer = Zeroizing::new(vec![0; MAX_BUFFER_SIZE_EXTENDED]);
        Ok(Connected { card, context, used: false, protocol: None, buffer })
    }

    /// Whether the card in the reader is still the one of this insertion.
    fn is_in(&self, context: &Context) -> bool {
        let mut states = [ReaderState::new(self.place.reader.clone(), State::UNAWARE)];
        context.get_status_change(Duration::ZERO, &mut states).is_ok()
            && states[0].event_state().contains(State::PRESENT)
            && states[0].event_count() == self.place.events
    }

    fn serve(&self, mut connected: Connected) {
        let mut waiting = None;
        let mut held = Held { time: Duration::ZERO, until: Instant::now() };
        let end = loop {
            let order = match waiting.take() {
                Some(order) => order,
                None => match self.shared.next(self.session, None) {
                    Next::Command(command, reply) => (command, reply),
                    Next::Idle => continue,
                    Next::End => break After::End,
                },
            };
            if !self.shared.config.exclusive && held.is_long(Instant::now()) {
                waiting = Some(order);
                if !self.shared.pause(self.session, TURN) {
                    break After::End;
                }
                continue;
            }
            let mut won = None;
            let after = self.exchange(&mut connected, order, &mut won);
            if let Some(won) = won {
                held.add(won, Instant::now());
            }
            match after {
                After::Idle => {}
                After::Turn(order) => {
                    waiting = Some(order);
                    held.time = LONG;
                }
                end => break end,
            }
        };
        let Connected { card, used, .. } = connected;
        let disposition = match end {
            After::End if used => Disposition::ResetCard,
            After::Lost(disposition) if used => disposition,
            _ => Disposition::LeaveCard,
        };
        if let Err((_card, error)) = card.disconnect(disposition) {
            tracing::debug!("the card could not be left as it was found: {error}");
        }
        if matches!(end, After::Lost(_)) {
            self.shared.lose(self.session);
        }
    }

    /// One transaction: `first`, and what follows it closely. `won` is when it began: what was waited for before that is
    /// other programs' time.
    fn exchange(&self, connected: &mut Connected, first: Order, won: &mut Option<Instant>) -> After {
        let Connected { card, context, used, protocol, buffer } = connected;
        let (mut command, mut reply) = first;
        let mut transaction = loop {
            match card.transaction2() {
                Ok(transaction) => break transaction,
                // Another program did it before this session sent anything: nothing is lost.
                Err((card, Error::ResetCard | Error::UnpoweredCard)) if !*used => {
                    match card.reconnect(self.mode(), Protocols::ANY, Disposition::LeaveCard) {
                        // The program that did it may be at work with the card.
                        Err(Error::SharingViolation) if self.shared.pause(self.session, TURN) => {}
                        Err(error) => return self.lost(reply, error),
                        Ok(()) => {}
                    }
                }
                Err((_, error)) => return self.lost(reply, error),
            }
        };
        *won = Some(Instant::now());
        // The guest may be gone: that was another program's time.
        if !self.shared.lock().is_current(self.session) {
            return if *used { clear(transaction) } else { After::End };
        }
        if !*used {
            let reset = transaction.reconnect(self.mode(), Protocols::ANY, Disposition::ResetCard);
            if let Err(error) = reset {
                let _ = reply.send(Err(CardError::NotCleared(error.to_string())));
                return After::Lost(Disposition::LeaveCard);
            }
            if !self.is_in(context) {
                return self.lost(reply, Error::RemovedCard);
            }
            *protocol = transaction.status2_owned().ok().and_then(|status| status.protocol2());
            *used = true;
        }
        let began = Instant::now();
        let latest = (!self.shared.config.exclusive).then(|| began + LONGEST);
        loop {
            let answer = transmit(&transaction, *protocol, &command, buffer);
            let has_more = answer.as_ref().is_ok_and(|response| response.status().sw1() == 0x61);
            let error = answer.as_ref().err().copied();
            let _ = reply.send(answer.map_err(failure));
            if let Some(error) = error.filter(|&error| failure(error) == CardError::Removed) {
                let disposition = leaving(error);
                return After::Lost(match transaction.end(disposition) {
                    Ok(()) => Disposition::LeaveCard,
                    Err(_) => disposition,
                });
            }
            let until = latest.map(|latest| {
                let idle = Instant::now() + IDLE;
                if is_question(&command) { idle } else { latest.min(idle) }
            });
            match self.shared.next(self.session, until) {
                Next::Command(next, to)
                    if latest.is_some() && limit(&command, has_more, &next) <= began.elapsed() =>
                {
                    // A card that was removed shows at the next transaction; so it is below.
                    let _ = transaction.end(Disposition::LeaveCard);
                    return After::Turn((next, to));
                }
                Next::Command(next, to) => (command, reply) = (next, to),
                Next::Idle => {
                    let _ = transaction.end(Disposition::LeaveCard);
                    return After::Idle;
                }
                Next::End => return clear(transaction),
            }
        }
    }

    fn lost(&self, reply: oneshot::Sender<Answer>, error: Error) -> After {
        self.shared.lines.tell("session", |end| {
            tracing::info!("the guest's session with the card is over: {error}{end}");
        });
        let _ = reply.send(Err(CardError::Removed));
        After::Lost(leaving(error))
    }
}

/// Ends the session still within the transaction, so that nobody finds the guest's PIN verified.
fn clear(transaction: Transaction<'_>) -> After {
    match transaction.end(Disposition::ResetCard) {
        Ok(()) => After::Cleared,
        Err(_) => After::End,
    }
}

/// For how long a transaction goes on with `next` after `last`, whose answer announced more or not.
fn limit(last: &Command, has_more: bool, next: &Command) -> Duration {
    if last.cla() & 0x10 != 0 || has_more {
        LONGEST
    } else if is_question(next) {
        QUESTION
    } else if is_question(last) {
        Duration::MAX
    } else {
        LONG
    }
}

/// A VERIFY without data asks how many tries are left (ISO/IEC 7816-4 §11.6.6).
fn is_question(command: &Command) -> bool {
    command.ins() & 0xFE == ins::VERIFY && command.data().is_empty()
}

/// How to leave a card after that error: without a PIN that the guest verified, unless it has lost its state anyway.
fn leaving(error: Error) -> Disposition {
    match error {
        Error::RemovedCard | Error::ResetCard | Error::UnpoweredCard | Error::NoSmartcard => {
            Disposition::LeaveCard
        }
        _ => Disposition::ResetCard,
    }
}

fn transmit(
    card: &Transaction<'_>,
    protocol: Option<Protocol>,
    command: &Command,
    buffer: &mut [u8],
) -> Result<Response, Error> {
    let Some(tpdu) = tpdu(command, protocol) else { return Ok(StatusWord::WRONG_LENGTH.into()) };
    let answer = card.transmit(tpdu.expose(), buffer)?;
    let (response, length) = (Response::parse(answer), answer.len());
    buffer[..length].zeroize();
    response.map_err(|_| Error::UnresponsiveCard)
}

/// The command as that protocol carries it (ISO/IEC 7816-3 §12.2.1 and §12.2.4); extended ones are none of T=0.
fn tpdu(command: &Command, protocol: Option<Protocol>) -> Option<Secret> {
    let bytes = command.as_bytes();
    if protocol != Some(Protocol::T0) {
        return Some(Secret::from(bytes));
    }
    match command.case() {
        Case::C1 => Some(Secret::new([bytes, &[0]].concat())),
        Case::C2Short | Case::C3Short => Some(Secret::from(bytes)),
        Case::C4Short => Some(Secret::from(&bytes[..bytes.len() - 1])),
        Case::C2Extended | Case::C3Extended | Case::C4Extended => None,
    }
}

fn failure(error: Error) -> CardError {
    match error {
        Error::SharingViolation => CardError::Busy,
        Error::UnresponsiveCard | Error::NotTransacted => CardError::Mute,
        Error::RemovedCard
        | Error::ResetCard
        | Error::UnpoweredCard
        | Error::NoSmartcard
        | Error::ReaderUnavailable
        | Error::UnknownReader
        | Error::InvalidHandle
        | Error::CommError
        | Error::NoService
        | Error::ServiceStopped => CardError::Removed,
        error => CardError::Failed(error.to_string()),
    }
}

/// The right to have the card's handle; one session's thread has it.
struct Handle<'a> {
    shared: &'a Shared,
    session: u64,
}

impl<'a> Handle<'a> {
    /// Waits for the session before; `None` if this one is over sooner.
    fn wait(shared: &'a Shared, session: u64) -> Option<Self> {
        let mut state = shared.lock();
        loop {
            if !state.is_current(session) {
                return None;
            }
            if state.handle.is_none() {
                state.handle = Some(session);
                return Some(Self { shared, session });
            }
            state = shared.wait(state, None);
        }
    }
}

impl Drop for Handle<'_> {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.handle = None;
        if state.is_current(self.session) {
            self.shared.end_session(&mut state);
        }
        self.shared.changed.notify_all();
    }
}

impl super::State {
    fn is_current(&self, session: u64) -> bool {
        self.session.as_ref().is_some_and(|current| current.id == session)
    }
}

impl Shared {
    /// What that session's thread is to do, waiting for it until then.
    fn next(&self, session: u64, until: Option<Instant>) -> Next {
        let mut state = self.lock();
        loop {
            match &mut state.session {
                Some(current) if current.id == session => {
                    if let Some((command, reply)) = current.command.take() {
                        return Next::Command(command, reply);
                    }
                }
                _ => return Next::End,
            }
            if until.is_some_and(|until| until <= Instant::now()) {
                return Next::Idle;
            }
            state = self.wait(state, until);
        }
    }

    /// Waits that long; `false` if the session ends meanwhile.
    fn pause(&self, session: u64, time: Duration) -> bool {
        let until = Instant::now() + time;
        let mut state = self.lock();
        while state.is_current(session) {
            if until <= Instant::now() {
                return true;
            }
            state = self.wait(state, Some(until));
        }
        false
    }
}

/// A session, as the guest's side has it.
pub(super) struct PoweredCard {
    shared: Arc<Shared>,
    session: u64,
    atr: Atr,
    limits: Limits,
    removed: oneshot::Receiver<()>,
    /// Of a command that was begun and whose answer nobody took.
    answer: Option<oneshot::Receiver<Answer>>,
}

impl PoweredCard {
    pub(super) fn new(
        shared: Arc<Shared>,
        session: u64,
        atr: Atr,
        limits: Limits,
        removed: oneshot::Receiver<()>,
    ) -> Self {
        Self { shared, session, atr, limits, removed, answer: None }
    }

    /// Waits until the card is powered.
    pub(super) async fn powered(
        &mut self,
        powered: &mut oneshot::Receiver<Result<(), CardError>>,
    ) -> Result<(), CardError> {
        or_removed(&mut self.removed, powered).await?
    }

    /// Leaves a command for the thread, which has none of this session's.
    fn submit(&self, command: &Command) -> Result<oneshot::Receiver<Answer>, CardError> {
        let mut state = self.shared.lock();
        let session =
            state.session.as_mut().filter(|session| session.id == self.session).ok_or(CardError::Removed)?;
        let (reply, answer) = oneshot::channel();
        session.command = Some((command.clone(), reply));
        self.shared.changed.notify_all();
        Ok(answer)
    }
}

#[async_trait]
impl Card for PoweredCard {
    fn atr(&self) -> &Atr {
        &self.atr
    }

    async fn transmit(&mut self, command: &Command) -> Result<Response, CardError> {
        if let Some(earlier) = &mut self.answer {
            let outcome = or_removed(&mut self.removed, earlier).await;
            self.answer = None;
            outcome?.map(drop).or_else(still_there)?;
        }
        if command.as_bytes().len() > self.limits.command {
            return Ok(StatusWord::WRONG_LENGTH.into());
        }
        let answer = self.answer.insert(self.submit(command)?);
        let outcome = or_removed(&mut self.removed, answer).await;
        self.answer = None;
        outcome?
    }
}

/// An error of a command that nobody waits for any more matters only if there is no session after it.
fn still_there(error: CardError) -> Result<(), CardError> {
    if error == CardError::Removed { Err(error) } else { Ok(()) }
}

impl Drop for PoweredCard {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        if state.is_current(self.session) {
            self.shared.end_session(&mut state);
        }
    }
}

/// Waits for `answer`, or for the session to end without one.
async fn or_removed<T>(
    removed: &mut oneshot::Receiver<()>,
    answer: &mut oneshot::Receiver<T>,
) -> Result<T, CardError> {
    poll_fn(|context| match Pin::new(&mut *answer).poll(context) {
        Poll::Ready(answer) => Poll::Ready(answer.map_err(|_| CardError::Removed)),
        Poll::Pending => Pin::new(&mut *removed).poll(context).map(|_| Err(CardError::Removed)),
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn t0_carries_no_le_beside_data_and_always_a_fifth_byte() {
        let carried = |bytes: &[u8], protocol| {
            tpdu(&Command::parse(bytes).unwrap(), protocol).unwrap().expose().to_vec()
        };
        let t0 = Some(Protocol::T0);
        assert_eq!(carried(&[0, 0x20, 0, 0x80], t0), [0, 0x20, 0, 0x80, 0]);
        assert_eq!(carried(&[0, 0xA4, 4, 0, 1, 9, 0], t0), [0, 0xA4, 4, 0, 1, 9]);
        assert_eq!(carried(&[0, 0xA4, 4, 0, 1, 9], t0), [0, 0xA4, 4, 0, 1, 9]);
        assert_eq!(carried(&[0, 0xCA, 0, 0, 5], t0), [0, 0xCA, 0, 0, 5]);
        assert_eq!(carried(&[0, 0xA4, 4, 0, 1, 9, 0], Some(Protocol::T1)), [0, 0xA4, 4, 0, 1, 9, 0]);
    }

    #[test]
    fn t0_carries_no_extended_command() {
        for bytes in
            [&[0, 0xCA, 0, 0, 0, 1, 0][..], &[0, 0xA4, 4, 0, 0, 0, 1, 9], &[0, 0xA4, 4, 0, 0, 0, 1, 9, 0, 0]]
        {
            let command = Command::parse(bytes).unwrap();
            assert!(tpdu(&command, Some(Protocol::T0)).is_none());
            assert_eq!(tpdu(&command, Some(Protocol::T1)).unwrap().expose(), bytes);
        }
    }

    /// Another program's wrong PIN must not come between.
    #[test]
    fn a_pin_follows_the_question_about_it_in_the_same_transaction() {
        let command = |bytes: &[u8]| Command::parse(bytes).unwrap();
        let (question, pin) = (command(&[0, 0x20, 0, 0x80]), command(&[0, 0x20, 0, 0x80, 1, 9]));
        let read = command(&[0, 0xB0, 0, 0, 0]);
        // A question that is still asked leaves time for its answer, and holds after that.
        assert!(limit(&read, false, &question) < LONG);
        assert!(limit(&question, false, &pin) > LONGEST);
        // No loop of questions goes on for ever.
        assert!(limit(&question, false, &question) < LONG);
        assert_eq!(limit(&read, false, &read), LONG);
        assert_eq!(limit(&read, true, &read), LONGEST);
    }

    #[test]
    fn a_guest_that_is_idle_too_briefly_has_to_pause() {
        let mut now = Instant::now();
        let mut held = Held { time: Duration::ZERO, until: now };
        let brief = Duration::from_millis(10);
        let mut exchanges = 0;
        while !held.is_long(now) {
            held.add(now, now + IDLE);
            now += IDLE + brief;
            exchanges += 1;
        }
        assert_eq!(exchanges, 8);
        assert!(!held.is_long(now - brief + TURN));
        held.add(now - brief + TURN, now - brief + TURN + IDLE);
        assert_eq!(held.time, IDLE);
    }

    #[test]
    fn a_card_is_left_with_no_pin_verified() {
        for error in [Error::CommError, Error::InvalidHandle, Error::ReaderUnavailable] {
            assert_eq!(leaving(error), Disposition::ResetCard);
        }
        // Who reset it may be at work with it.
        assert_eq!(leaving(Error::ResetCard), Disposition::LeaveCard);
    }
}
