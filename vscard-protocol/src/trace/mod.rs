//! What crossed a card, on one line per exchange, without what must not be seen.

mod line;

use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;

use crate::card::PresenceWatch;
use crate::{Atr, Card, CardError, CardSource, Command, Response};

pub use line::Redactor;

/// Where trace lines go.
pub type Sink = Arc<dyn Fn(&str) + Send + Sync>;

/// A source whose cards' exchanges are written to a sink, redacted.
pub struct Traced<S> {
    source: S,
    sink: Sink,
}

impl<S: CardSource> Traced<S> {
    /// Wraps `source`.
    pub fn new(source: S, sink: Sink) -> Self {
        Self { source, sink }
    }
}

#[async_trait]
impl<S: CardSource> CardSource for Traced<S> {
    fn presence(&self) -> PresenceWatch {
        self.source.presence()
    }

    async fn power_on(&self, insertion: u64) -> Result<Box<dyn Card>, CardError> {
        let card = self.source.power_on(insertion).await?;
        (self.sink)(&format!("power on, ATR {}", card.atr()));
        Ok(Box::new(TracedCard { card, sink: self.sink.clone(), redactor: Redactor::default() }))
    }
}

struct TracedCard {
    card: Box<dyn Card>,
    sink: Sink,
    redactor: Redactor,
}

impl Drop for TracedCard {
    fn drop(&mut self) {
        (self.sink)("power off");
    }
}

#[async_trait]
impl Card for TracedCard {
    fn atr(&self) -> &Atr {
        self.card.atr()
    }

    async fn transmit(&mut self, command: &Command) -> Result<Response, CardError> {
        let start = Instant::now();
        // Noted before: if nobody waits for the answer, GET RESPONSE may still fetch it.
        self.redactor.command(command.as_bytes());
        let result = self.card.transmit(command).await;
        let took = start.elapsed();
        let outcome = result.as_ref().map(Response::as_bytes);
        let line = match outcome {
            Ok(response) => self.redactor.exchange(command.as_bytes(), response),
            Err(error) => format!("{} | {error}", self.redactor.command(command.as_bytes())),
        };
        (self.sink)(&format!("{line} | {:.1} ms", took.as_secs_f64() * 1000.0));
        result
    }
}
