//! For how long an answer may be handed out.

use std::sync::{Arc, Weak};

/// For how long data may be handed out: for ever, or as long as something else lives, as a verified PIN.
///
/// What a key gave must not outlive the PIN, but whoever keeps the rest of it for a slow reader knows nothing of PINs. So
/// an answer brings this with it, and is asked before each part of it is handed out.
///
/// ```
/// use std::sync::Arc;
/// use vscard_protocol::{Response, StatusWord, Validity};
///
/// let login = Arc::new(());
/// let response = Response::new(b"signature", StatusWord::SUCCESS).valid(Validity::of(&login));
/// assert!(!response.validity().has_ended());
/// drop(login);
/// assert!(response.validity().has_ended());
/// ```
#[derive(Clone, Debug, Default)]
pub struct Validity(Option<Weak<()>>);

impl Validity {
    /// As long as `owner` lives.
    pub fn of(owner: &Arc<()>) -> Self {
        Self(Some(Arc::downgrade(owner)))
    }

    /// Whether it can end at all.
    pub fn is_limited(&self) -> bool {
        self.0.is_some()
    }

    /// Whether it has ended: then the data is to be wiped, not to be handed out.
    pub fn has_ended(&self) -> bool {
        self.0.as_ref().is_some_and(|owner| owner.strong_count() == 0)
    }
}
