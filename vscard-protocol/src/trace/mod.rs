//! What crossed a card, on one line per exchange.
//!
//! Bodies and answers are shown of what is known to be harmless on any card, and of nothing else: SELECT, GET DATA,
//! READ BINARY, READ RECORD and GET CHALLENGE of ISO/IEC 7816-4 in an interindustry class, without secure messaging and
//! chaining; READ BUFFER, GET PROPERTIES and GET ACR of GSC-IS while one of its applications is selected; and GET
//! RESPONSE as far as it continues these on the same logical channel. Of all else there are header, lengths and
//! status.

mod harmless;
mod line;

use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;

use crate::card::PresenceWatch;
use crate::{Atr, Card, CardError, CardSource, Command, Response};

use line::Redactor;

/// Where trace lines go.
pub type Sink = Arc<dyn Fn(&str) + Send + Sync>;

/// A source whose cards' exchanges are written to a sink, redacted as the [module](self) says.
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
        let line = self.redactor.begin(command);
        let result = self.card.transmit(command).await;
        let took = start.elapsed();
        let line = match &result {
            Ok(response) => self.redactor.end(line, command, response),
            Err(error) => format!("{} | {error}", line.into_text()),
        };
        (self.sink)(&format!("{line} | {:.1} ms", took.as_secs_f64() * 1000.0));
        result
    }
}

#[cfg(test)]
mod tests;
