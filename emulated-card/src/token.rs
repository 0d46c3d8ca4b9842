//! A card of what is on a token: there while the token is in, removed with it.

use std::error::Error;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use thiserror::Error;
use tokio::sync::watch;
use vscard_protocol::{Card, CardError, CardSource, LogBudget, Presence, PresenceWatch};

use crate::card::{Complaints, EmulatedCard};
use crate::keys::nss::token::{Module, Token, TokenError, TokenStore, TokenWatch, ring};
use crate::shell::CardSlot;
use crate::state::{StateDirectory, TokenClaim};

/// How many tokens a message lists.
const MAX_LISTED: usize = 8;

/// How often a token that cannot be read is tried, and how long after the last time.
const ATTEMPTS: u32 = 4;
const RETRY: Duration = Duration::from_secs(1);

/// Makes a card of a token's store, at each insertion.
pub type Make =
    Box<dyn Fn(Arc<TokenStore>) -> Result<EmulatedCard, Box<dyn Error + Send + Sync>> + Send + Sync>;

/// Why there is no card on a token.
#[derive(Debug, Error)]
pub enum TokenCardError {
    /// The token is not usable.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// No card could be made of it.
    #[error(transparent)]
    Card(Box<dyn Error + Send + Sync>),
    /// It is not clear which one is meant.
    #[error("there are several such tokens: {}; name one by its label or serial number", .0.join(", "))]
    Several(Vec<String>),
    /// The system gives no thread.
    #[error("the system gives no thread for the card: {0}")]
    Thread(#[from] io::Error),
}

/// A card on a token. Each insertion of the token is one of the card: its certificates are read anew, and nothing of
/// an earlier login is left.
///
/// Dropping it waits for the operation that is under way, and frees the token.
pub struct TokenCard {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// A token comes and goes as fast as it likes.
static LINES: LogBudget<&str> = LogBudget::new();

struct Shared {
    watch: TokenWatch,
    wanted: Option<String>,
    directory: StateDirectory,
    make: Make,
    forget_pin: Option<Duration>,
    /// Of the cards of all insertions.
    complaints: Complaints,
    presence: watch::Sender<Presence>,
    failed: watch::Sender<bool>,
    current: Mutex<Current>,
    stop: AtomicBool,
}

#[derive(Default)]
struct Current {
    inserted: Option<Inserted>,
    insertions: u64,
    /// The claim on the token that was in last, and its name. It is kept while the token is out, and shared by the
    /// stores of its insertions: a removed one may still be at work.
    claim: Option<(String, Arc<TokenClaim>)>,
}

struct Inserted {
    number: u64,
    token: Token,
    slot: Arc<CardSlot>,
    worker: JoinHandle<()>,
    /// The number that `slot` knows this insertion by.
    number_in_slot: u64,
}

impl TokenCard {
    /// A card on the token with that label or serial number; without one, on the only token that wants a login.
    ///
    /// The token may come later. One that comes and is not usable, or is another card's, is warned of and left
    /// alone until it is put in again; one that cannot be read, now or then, is tried a few times. What is equal in
    /// label, serial number, maker and model is one token that several modules reach, of which the first one is used; in
    /// two slots of one module these are two. A token that is out stays this card's, unless another one comes.
    /// `forget_pin` is as for [`CardSlot::forget_pin`].
    ///
    /// # Errors
    /// [`TokenCardError`] about the token that is in now.
    pub fn open(
        modules: &[Module],
        wanted: Option<String>,
        directory: StateDirectory,
        forget_pin: Option<Duration>,
        make: Make,
    ) -> Result<Self, TokenCardError> {
        let shared = Arc::new(Shared {
            watch: TokenWatch::new(modules)?,
            wanted,
            directory,
            make,
            forget_pin,
            complaints: Complaints::default(),
            presence: watch::Sender::new(Presence::Absent),
            failed: watch::Sender::new(false),
            current: Mutex::default(),
            stop: AtomicBool::new(false),
        });
        let seen = shared.watch.changes();
        let first = shared.find()?;
        let mut retry = None;
        match &first {
            Some(token) => match shared.insert(token) {
                Err(error) if may_pass(&error) => {
                    retry = Shared::refused(token, &error, ATTEMPTS);
                }
                inserted => inserted?,
            },
            None => {
                let present: Vec<_> = shared.watch.tokens().iter().map(shown).collect();
                tracing::info!("{}; the card comes with it", missing(shared.wanted.as_deref(), &present));
            }
        }
        let thread = {
            let shared = Arc::clone(&shared);
            thread::Builder::new().name("token".into()).spawn(move || shared.follow(seen, first, retry))?
        };
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Waits until a fault in the program or in its libraries (a panic) has taken the card away for good, whatever token
    /// comes. For ever if there is none.
    pub async fn failed(&self) {
        // It ends with an error only when the sender is gone, which is in this card.
        let _ = self.shared.failed.subscribe().wait_for(|failed| *failed).await;
    }
}

impl Drop for TokenCard {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        ring();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        self.shared.remove();
    }
}

impl fmt::Debug for TokenCard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenCard").field("wanted", &self.shared.wanted).finish_non_exhaustive()
    }
}

#[async_trait]
impl CardSource for TokenCard {
    fn presence(&self) -> PresenceWatch {
        self.shared.presence.subscribe().into()
    }

    async fn power_on(&self, insertion: u64) -> Result<Box<dyn Card>, CardError> {
        let (slot, number) = match &self.shared.lock().inserted {
            Some(inserted) if inserted.number == insertion => {
                (Arc::clone(&inserted.slot), inserted.number_in_slot)
            }
            _ => return Err(CardError::Removed),
        };
        slot.power_on(number).await
    }
}

/// The name of the token that a card would be on, which is in, and what it calls itself.
#[cfg(all(unix, feature = "nss", feature = "pem", feature = "pcsc"))]
pub(crate) fn name_of_token(
    modules: &[Module],
    wanted: Option<&str>,
) -> Result<Option<(String, String)>, TokenCardError> {
    let found = find(TokenWatch::new(modules)?.tokens(), wanted)?;
    Ok(found.map(|token| (token.name(), token.label().to_owned())))
}

/// The one of `tokens` that is meant.
fn find(mut tokens: Vec<Token>, wanted: Option<&str>) -> Result<Option<Token>, TokenCardError> {
    tokens.retain(|token| match wanted {
        Some(wanted) => [token.label(), token.serial_number()].contains(&wanted),
        None => token.needs_login(),
    });
    let mut tokens = reached_once(tokens, Token::name, Token::has_module_of);
    if tokens.len() > 1 {
        return Err(TokenCardError::Several(tokens.iter().map(shown).collect()));
    }
    Ok(tokens.pop())
}

/// `tokens` without those that the module of an earlier one reaches, too: two in one module are two.
fn reached_once<T>(tokens: Vec<T>, name: fn(&T) -> String, has_module_of: fn(&T, &T) -> bool) -> Vec<T> {
    let mut kept: Vec<T> = Vec::new();
    for token in tokens {
        if !kept.iter().any(|other| name(other) == name(&token) && !has_module_of(other, &token)) {
            kept.push(token);
        }
    }
    kept
}

/// A card that another program uses may be busy when it is put in.
fn may_pass(error: &TokenCardError) -> bool {
    matches!(error, TokenCardError::Token(TokenError::Refused { .. }))
}

/// Says that the token that is meant is not in, and which ones are: a name may be mistyped.
fn missing(wanted: Option<&str>, present: &[String]) -> String {
    let Some(wanted) = wanted else { return "no token is in that would do".to_owned() };
    let listed = present.iter().take(MAX_LISTED).map(String::as_str).collect::<Vec<_>>().join(", ");
    match present.len() {
        0 => format!("no token is in, {wanted:?} neither"),
        1..=MAX_LISTED => format!("the token {wanted:?} is not in, but {listed}"),
        count => format!("the token {wanted:?} is not in, but {listed} and {} more", count - MAX_LISTED),
    }
}

fn shown(token: &Token) -> String {
    format!("{:?} ({:?})", token.label(), token.serial_number())
}

impl Shared {
    /// The token that is meant, if it is in.
    fn find(&self) -> Result<Option<Token>, TokenCardError> {
        find(self.watch.tokens(), self.wanted.as_deref())
    }

    fn lock(&self) -> MutexGuard<'_, Current> {
        // Nothing that holds the lock can panic half-way through a change.
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Follows the token until the card is dropped or failed. `handled` is the one that was seen last, `retry` how often
    /// it is still to be tried, and when.
    fn follow(&self, mut seen: u64, mut handled: Option<Token>, mut retry: Option<(u32, Instant)>) {
        loop {
            let limit = retry.map(|(_, due)| due.saturating_duration_since(Instant::now()));
            seen = self.watch.wait(seen, limit);
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
            let inserted = self
                .lock()
                .inserted
                .as_ref()
                .map(|inserted| (inserted.token.clone(), inserted.slot.has_failed()));
            if inserted.is_some_and(|(token, failed)| !failed && self.watch.tokens().contains(&token)) {
                // Whatever else came or went.
                continue;
            }
            if self.remove() {
                self.failed.send_replace(true);
                return;
            }
            let found = self.find().unwrap_or_else(|error| {
                LINES.tell("no token", |end| tracing::warn!("no card: {error}{end}"));
                None
            });
            if found != handled {
                retry = Some((ATTEMPTS, Instant::now()));
                handled = found;
            }
            // Whatever rings meanwhile uses up no attempt.
            let due = retry.take_if(|(_, due)| *due <= Instant::now());
            if let (Some(token), Some((attempts, _))) = (&handled, due) {
                retry = self.insert(token).err().and_then(|error| Self::refused(token, &error, attempts));
            }
        }
    }

    /// Says why there is no card on `token`. Returns how often it is to be tried after this one of `attempts`, and when.
    fn refused(token: &Token, error: &TokenCardError, attempts: u32) -> Option<(u32, Instant)> {
        LINES.tell("no card", |end| {
            tracing::warn!("no card on the token {:?}: {error}{end}", token.label());
        });
        (may_pass(error) && attempts > 1).then(|| (attempts - 1, Instant::now() + RETRY))
    }

    fn claim(&self, token: &Token) -> Result<Arc<TokenClaim>, TokenCardError> {
        let name = token.name();
        let mut current = self.lock();
        match &current.claim {
            Some((claimed, claim)) if *claimed == name => Ok(Arc::clone(claim)),
            _ => {
                let claim = Arc::new(token.claim(&self.directory)?);
                current.claim = Some((name, Arc::clone(&claim)));
                Ok(claim)
            }
        }
    }

    fn insert(&self, token: &Token) -> Result<(), TokenCardError> {
        let store = Arc::new(TokenStore::open_claimed(token, self.claim(token)?)?);
        let card = (self.make)(store).map_err(TokenCardError::Card)?.complaining(&self.complaints);
        let (slot, worker) = CardSlot::with_worker(card, ring)?;
        slot.forget_pin(self.forget_pin);
        let number_in_slot = slot.insert();
        let presence = slot.presence().get();
        let mut current = self.lock();
        current.insertions += 1;
        let number = current.insertions;
        current.inserted =
            Some(Inserted { number, token: token.clone(), slot: Arc::new(slot), worker, number_in_slot });
        self.presence.send_replace(match presence {
            Presence::Absent => Presence::Absent,
            Presence::Present { atr, limits, .. } => Presence::Present { insertion: number, atr, limits },
        });
        LINES.tell("in", |end| tracing::info!("card on the token {:?}{end}", token.label()));
        Ok(())
    }

    /// Removes the card, if one is in. Tells whether a fault ended it, perhaps only now.
    fn remove(&self) -> bool {
        let Some(inserted) = self.lock().inserted.take() else { return false };
        self.presence.send_replace(Presence::Absent);
        // A power-up that runs beside this may hold the slot yet.
        inserted.slot.close();
        // With it the login ends, before another one on the same token begins, and so does the store's claim. What it
        // is about fails soon on a token that is out.
        let failed = inserted.worker.join().is_err();
        LINES.tell("gone", |end| {
            tracing::info!("the card on the token {:?} is gone{end}", inserted.token.label());
        });
        failed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_that_are_in_are_named_for_one_that_is_not() {
        let present = |count: usize| (0..count).map(|at| format!("\"{at}\" (\"\")")).collect::<Vec<_>>();
        assert_eq!(missing(None, &present(1)), "no token is in that would do");
        assert_eq!(missing(Some("a\n"), &present(0)), r#"no token is in, "a\n" neither"#);
        assert_eq!(missing(Some("a"), &present(2)), r#"the token "a" is not in, but "0" (""), "1" ("")"#);
        assert!(missing(Some("a"), &present(8)).ends_with(r#", "7" ("")"#));
        assert!(missing(Some("a"), &present(10)).ends_with(r#", "7" ("") and 2 more"#));
    }

    #[test]
    fn only_what_two_modules_reach_is_one_token() {
        let kept = |tokens: &[(&'static str, u8)]| {
            reached_once(tokens.to_vec(), |token| token.0.to_owned(), |one, other| one.1 == other.1)
        };
        assert_eq!(kept(&[("a", 1), ("b", 1), ("a", 2)]), [("a", 1), ("b", 1)]);
        assert_eq!(kept(&[("a", 1), ("a", 1), ("a", 2)]), [("a", 1), ("a", 1)]);
    }

    #[test]
    fn a_card_that_is_dropped_while_tokens_change_ends() {
        let make = || -> Make { Box::new(|_| Err("no token is in".into())) };
        for turn in 0..20_000 {
            let directory = StateDirectory::at("/nonexistent");
            let card = TokenCard::open(&[], None, directory, None, make()).unwrap();
            ring();
            // For some number of these, the thread is about to wait again.
            (0..turn % 1000).for_each(|_| std::hint::spin_loop());
            drop(card);
        }
    }
}
