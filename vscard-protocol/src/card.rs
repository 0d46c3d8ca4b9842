//! The two traits between where a card comes from and where it appears.

use std::sync::Arc;

use async_trait::async_trait;
use thiserror::Error;
use tokio::sync::watch;

use crate::{Atr, Command, Response};

/// Longest command and response APDU a source can carry, in bytes, status word included.
///
/// A place of appearance refuses or chains what is longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Longest command APDU.
    pub command: usize,
    /// Longest response APDU.
    pub response: usize,
}

impl Limits {
    /// What short APDUs need: 4+1+255+1 bytes of command, 256+2 of response.
    pub const SHORT: Self = Self { command: 261, response: 258 };
    /// Extended APDUs in full.
    pub const EXTENDED: Self =
        Self { command: crate::apdu::MAX_COMMAND, response: crate::apdu::MAX_RESPONSE };
}

/// Whether a card is in, and which.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Presence {
    /// No card.
    Absent,
    /// A card is in.
    Present {
        /// Counts insertions. Another number means removed, then inserted, whatever the ATR says.
        insertion: u64,
        /// What the card answers to reset.
        atr: Atr,
        /// Longest APDUs it can carry.
        limits: Limits,
    },
}

impl Presence {
    /// The insertion number, if a card is in.
    pub fn insertion(&self) -> Option<u64> {
        match self {
            Self::Absent => None,
            Self::Present { insertion, .. } => Some(*insertion),
        }
    }
}

/// A look at a [`CardSource`]'s [`Presence`], now and whenever it changes.
///
/// Wrappers of a source change what is seen with [`map`](Self::map); no task runs in between.
#[derive(Clone)]
pub struct PresenceWatch {
    source: watch::Receiver<Presence>,
    /// The source is gone, and it was said so.
    gone: bool,
    seen_as: Option<Arc<dyn Fn(Presence) -> Presence + Send + Sync>>,
}

impl PresenceWatch {
    /// What is true now; also marks it as seen. Absent for good once the source is gone.
    pub fn get(&mut self) -> Presence {
        let presence = self.source.borrow_and_update().clone();
        if self.source.has_changed().is_err() {
            self.gone = true;
            return Presence::Absent;
        }
        match &self.seen_as {
            Some(seen_as) => seen_as(presence),
            None => presence,
        }
    }

    /// Waits until something changed since the last [`get`](Self::get); for ever once the source is gone and
    /// its absence was seen.
    pub async fn changed(&mut self) {
        if self.source.changed().await.is_err() && self.gone {
            std::future::pending::<()>().await;
        }
    }

    /// The same watch with each presence seen through `view`.
    pub fn map(self, view: impl Fn(Presence) -> Presence + Send + Sync + 'static) -> Self {
        let inner = self.seen_as.clone();
        let seen_as: Arc<dyn Fn(Presence) -> Presence + Send + Sync> = match inner {
            Some(inner) => Arc::new(move |presence| view(inner(presence))),
            None => Arc::new(view),
        };
        Self { seen_as: Some(seen_as), ..self }
    }
}

impl From<watch::Receiver<Presence>> for PresenceWatch {
    fn from(source: watch::Receiver<Presence>) -> Self {
        Self { source, gone: false, seen_as: None }
    }
}

/// Why a card gave no response. An error status word is a response, not an error.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum CardError {
    /// The insertion asked for is over; another card may be in.
    #[error("the card was removed")]
    Removed,
    /// Another session has the card powered.
    #[error("the card is in use by another session")]
    Busy,
    /// No answer within the source's deadline, if it has one.
    #[error("the card did not answer in time")]
    Mute,
    /// The card could not be powered up with all volatile state (PIN, selection, pending answers) cleared.
    #[error("the card could not be reset: {0}")]
    NotCleared(String),
    /// The source failed in another way.
    #[error("{0}")]
    Failed(String),
}

/// A place a card may be in. State, not events: a look always shows the newest.
#[async_trait]
pub trait CardSource: Send + Sync {
    /// The card that is in now, and each change.
    fn presence(&self) -> PresenceWatch;

    /// Powers up that insertion.
    ///
    /// Nothing volatile of an earlier session (verified PIN, selection, chaining, pending answer, session keys)
    /// is left; a source that cannot clear it says so with [`CardError::NotCleared`]. One exception: a remote card
    /// (the module `passthru`) whose client does not speak the extension. That client cannot be told to clear
    /// anything, so its card is powered with what it has; it could not be used at all otherwise. A warning in the
    /// log tells of it when the card comes in.
    ///
    /// # Errors
    /// [`CardError::Removed`] when `insertion` is not the card that is in, [`CardError::Busy`] while another
    /// session has it.
    async fn power_on(&self, insertion: u64) -> Result<Box<dyn Card>, CardError>;
}

/// One powered insertion. Drop is power-off, which ends what [`power_on`](CardSource::power_on) says is not left, with
/// the same exception; after removal every call is [`CardError::Removed`], even if
/// another card is in by then.
#[async_trait]
pub trait Card: Send {
    /// What the card answered to reset.
    fn atr(&self) -> &Atr;

    /// One command in, one response out.
    ///
    /// Dropping the future drops the answer, not the command: the card has done all of it or nothing, and the
    /// next call waits for it. Needs no runtime of its own.
    ///
    /// # Errors
    /// [`CardError::Mute`] after the source's deadline, if it has one; [`CardError::Removed`] after removal.
    async fn transmit(&mut self, command: &Command) -> Result<Response, CardError>;
}

#[async_trait]
impl<S: CardSource + ?Sized> CardSource for Arc<S> {
    fn presence(&self) -> PresenceWatch {
        (**self).presence()
    }

    async fn power_on(&self, insertion: u64) -> Result<Box<dyn Card>, CardError> {
        (**self).power_on(insertion).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_source_that_is_gone_is_seen_once() {
        let atr = Atr::t0(b"card").unwrap();
        let present = Presence::Present { insertion: 1, atr, limits: Limits::SHORT };
        let (sender, receiver) = watch::channel(present.clone());
        let mut watch = PresenceWatch::from(receiver);
        assert_eq!(watch.get(), present);
        drop(sender);
        watch.changed().await;
        assert_eq!(watch.get(), Presence::Absent);
        let again = std::time::Duration::from_millis(10);
        assert!(tokio::time::timeout(again, watch.changed()).await.is_err());
    }
}
