//! What crossed a card, on one line per exchange, without what must not be seen.

mod line;

use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;

use crate::card::PresenceWatch;
use crate::{Atr, Card, CardError, CardSource, Command, Response};

use line::Redactor;

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

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::sync::Mutex;
    use std::task::{Context, Waker};

    use tokio::sync::watch;

    use super::*;
    use crate::{Limits, Presence};

    /// Answers nothing to private-key operations, in time, and a secret to all else.
    struct Slow(Atr);

    #[async_trait]
    impl CardSource for Slow {
        fn presence(&self) -> PresenceWatch {
            let present = Presence::Present { insertion: 1, atr: self.0.clone(), limits: Limits::SHORT };
            watch::channel(present).1.into()
        }

        async fn power_on(&self, _insertion: u64) -> Result<Box<dyn Card>, CardError> {
            Ok(Box::new(Self(self.0.clone())))
        }
    }

    #[async_trait]
    impl Card for Slow {
        fn atr(&self) -> &Atr {
            &self.0
        }

        async fn transmit(&mut self, command: &Command) -> Result<Response, CardError> {
            if command.as_bytes()[1] != 0xC0 {
                std::future::pending::<()>().await;
            }
            Ok(Response::parse(&[0xAB, 0xCD, 0x90, 0]).unwrap())
        }
    }

    #[tokio::test]
    async fn what_a_given_up_private_key_operation_left_is_not_shown() {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let written = lines.clone();
        let sink: Sink = Arc::new(move |line: &str| written.lock().unwrap().push(line.to_owned()));
        let traced = Traced::new(Slow(Atr::t1(b"card").unwrap()), sink);
        for ins in [0x42, 0x2A, 0x87, 0xC2] {
            let mut card = traced.power_on(1).await.unwrap();
            let operation = Command::build([0, ins, 0, 0], &[1; 8], None).unwrap();
            {
                let mut given_up = pin!(card.transmit(&operation));
                assert!(given_up.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
            }
            let get_response = Command::parse(&[0, 0xC0, 0, 0, 2]).unwrap();
            card.transmit(&get_response).await.unwrap();
        }
        let lines = lines.lock().unwrap().join("\n");
        assert!(lines.matches("(secret)").count() == 4 && !lines.contains("ABCD"), "{lines}");
    }
}
