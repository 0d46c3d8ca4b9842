//! Which tokens are in the slots of modules, from one thread per module.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::ffi::{self, Slot, TokenInfo};
use super::module::Module;

/// How often a module is asked for events. Waiting in the module could be ended only by shutting it down, which loses
/// every session and key.
const INTERVAL: Duration = Duration::from_millis(200);
/// How many slots of a module, and events at a time, are looked at.
const MAX_SLOTS: usize = 64;

/// One insertion of a token. A token that was removed and put back is another one.
#[derive(Clone)]
pub struct Token {
    pub(super) module: Module,
    pub(super) slot: Arc<Slot>,
    pub(super) series: i32,
    pub(super) info: Arc<TokenInfo>,
}

impl Token {
    /// What the token calls itself.
    pub fn label(&self) -> &str {
        &self.info.label
    }

    /// The serial number that its maker gave it, if any.
    pub fn serial_number(&self) -> &str {
        &self.info.serial_number
    }

    /// Whether its keys are behind a PIN.
    pub(crate) fn needs_login(&self) -> bool {
        self.info.needs_login()
    }

    /// What the token says of itself now, if it does; nothing once it is out.
    pub(super) fn current_info(&self) -> Option<TokenInfo> {
        // The slot answers for whatever is in it, and NSS remembers its presence for a while.
        let is_this = |info: &TokenInfo| info.is_of_same_token(&self.info) && self.is_in();
        if self.is_in() { self.slot.token_info().ok().filter(is_this) } else { None }
    }

    fn is_in(&self) -> bool {
        self.slot.holds(self.series)
    }

    /// Whether the same module reaches both.
    pub(crate) fn has_module_of(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.module.loaded, &other.module.loaded)
    }

    /// What there is one of at a time, whatever slot it is in and whatever module reaches it: only a token without a
    /// serial number is told from others by these.
    pub(crate) fn name(&self) -> String {
        let TokenInfo { label, manufacturer, model, serial_number, .. } = &*self.info;
        let place = serial_number.is_empty().then(|| (self.module.library(), self.slot.id()));
        format!("{:?}", (manufacturer, model, serial_number, label, place))
    }
}

impl PartialEq for Token {
    fn eq(&self, other: &Self) -> bool {
        self.has_module_of(other) && (self.slot.id(), self.series) == (other.slot.id(), other.series)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token")
            .field("label", &self.label())
            .field("serial_number", &self.serial_number())
            .field("series", &self.series)
            .finish_non_exhaustive()
    }
}

/// Rung when tokens come or go, or somebody who waits is to look up.
static BELL: (Mutex<u64>, Condvar) = (Mutex::new(0), Condvar::new());

pub(crate) fn ring() {
    *BELL.0.lock().unwrap_or_else(PoisonError::into_inner) += 1;
    BELL.1.notify_all();
}

/// A look at the tokens in some modules, now and whenever one comes or goes.
#[derive(Clone)]
pub struct TokenWatch {
    watchers: Vec<Arc<Watcher>>,
}

impl TokenWatch {
    /// Begins to watch; the tokens that are in are known when it returns.
    ///
    /// # Errors
    /// The system has no thread to give.
    pub fn new(modules: &[Module]) -> io::Result<Self> {
        Ok(Self { watchers: modules.iter().map(Watcher::of).collect::<Result<_, _>>()? })
    }

    /// The tokens that are in and ready for use (PKCS #11: initialised), at most 64 of each module.
    pub fn tokens(&self) -> Vec<Token> {
        let present = |watcher: &Arc<Watcher>| watcher.lock().clone();
        self.watchers.iter().flat_map(present).collect()
    }

    /// How often something changed by now, for [`wait`](Self::wait).
    pub(crate) fn changes(&self) -> u64 {
        *BELL.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Blocks until [`changes`](Self::changes) gives another number than `seen`, or for that long, and returns it:
    /// whatever is rung for after that ends the next wait. What changed may be in another module, or nothing.
    pub(crate) fn wait(&self, seen: u64, limit: Option<Duration>) -> u64 {
        let count = BELL.0.lock().unwrap_or_else(PoisonError::into_inner);
        let same = |count: &mut u64| *count == seen;
        match limit {
            None => *BELL.1.wait_while(count, same).unwrap_or_else(PoisonError::into_inner),
            Some(limit) => {
                *BELL.1.wait_timeout_while(count, limit, same).unwrap_or_else(PoisonError::into_inner).0
            }
        }
    }
}

/// The thread that watches a module, as long as somebody wants it to.
pub(super) struct Watcher {
    present: Arc<Mutex<Vec<Token>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watcher {
    fn of(module: &Module) -> io::Result<Arc<Self>> {
        let mut shared = module.loaded.watcher.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(watcher) = shared.upgrade() {
            return Ok(watcher);
        }
        let present = Arc::new(Mutex::new(look(module, &[])));
        let stop = Arc::new(AtomicBool::new(false));
        let thread = {
            let (module, present, stop) = (module.clone(), Arc::clone(&present), Arc::clone(&stop));
            thread::Builder::new().name("tokens".into()).spawn(move || watch(&module, &present, &stop))?
        };
        let watcher = Arc::new(Self { present, stop, thread: Some(thread) });
        *shared = Arc::downgrade(&watcher);
        Ok(watcher)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Token>> {
        self.present.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Watcher {
    /// The thread is waited for: in a process that ends it must not be inside a module.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

fn watch(module: &Module, present: &Mutex<Vec<Token>>, stop: &AtomicBool) {
    while !stop.load(Ordering::SeqCst) {
        thread::park_timeout(INTERVAL);
        // Each event makes NSS forget for one slot what it remembers of it, for a second else.
        let raw: &ffi::Module = &module.loaded.module;
        (0..MAX_SLOTS).take_while(|_| raw.poll_event()).for_each(drop);
        let before = present.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let now = look(module, &before);
        if now != before {
            *present.lock().unwrap_or_else(PoisonError::into_inner) = now;
            ring();
        }
    }
}

fn look(module: &Module, before: &[Token]) -> Vec<Token> {
    let slots = module.loaded.module.slots(MAX_SLOTS);
    slots
        .into_iter()
        .filter(|slot| !slot.is_internal())
        .filter_map(|slot| token(module, slot, before))
        .collect()
}

/// The token in a slot. NSS must be asked for its presence first, which counts the insertion.
fn token(module: &Module, slot: Arc<Slot>, before: &[Token]) -> Option<Token> {
    if !slot.is_present() {
        return None;
    }
    let series = slot.series();
    let known = before.iter().find(|token| (token.slot.id(), token.series) == (slot.id(), series));
    if let Some(token) = known {
        return Some(token.clone());
    }
    let info = slot.token_info().ok().filter(TokenInfo::is_initialized)?;
    Some(Token { module: module.clone(), slot, series, info: Arc::new(info) })
}
