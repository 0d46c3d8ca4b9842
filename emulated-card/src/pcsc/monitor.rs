//! The thread that knows whether a card is in.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pcsc::{Context, Error, PNP_NOTIFICATION, ReaderState, Scope, State};
use vscard_protocol::Atr;

use super::reader::{choose, limits};
use super::{Place, Shared};

/// Between attempts to reach `pcscd`: this first, then twice as long each time, up to the second.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// For how long one wait lasts at most.
const WAIT: Duration = Duration::from_secs(60);
/// The same while there is no reader: one that came just before a wait began is not told (pcsc-lite 1.9).
const WAIT_FOR_READER: Duration = Duration::from_secs(5);
/// Until the reader has told what it carries, if no program keeps it from that.
const LIMITS_DELAY: Duration = Duration::from_secs(1);
/// Until a card that was put in has given its ATR.
const ATR_DELAY: Duration = Duration::from_millis(200);

pub(super) struct Monitor {
    shared: Arc<Shared>,
    /// What was last said about why there is no card.
    complaint: Option<String>,
}

impl Monitor {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, complaint: None }
    }

    pub(super) fn run(mut self) {
        let mut delay = RETRY.0;
        while !self.shared.lock().closed {
            let began = Instant::now();
            let error = match Context::establish(Scope::System) {
                Ok(context) => {
                    self.shared.lock().monitoring = Some(context.clone());
                    let end = self.watch(&context);
                    self.shared.lock().monitoring = None;
                    end.err()
                }
                Err(error) => Some(error),
            };
            self.gone();
            if let Some(error) = error {
                self.complain(format!("the PC/SC service (pcscd) cannot be used: {error}"));
            }
            // One that served for a while was not the cause of the trouble before.
            delay = if RETRY.1 < began.elapsed() { RETRY.0 } else { delay };
            self.pause(delay);
            delay = RETRY.1.min(delay * 2);
        }
    }

    /// Until closed or an error.
    fn watch(&mut self, context: &Context) -> Result<(), Error> {
        while !self.shared.lock().closed {
            let readers = match context.list_readers_owned() {
                Err(Error::NoReadersAvailable) => Vec::new(),
                readers => readers?,
            };
            let names = readers.iter().map(|name| name.to_string_lossy()).collect::<Vec<_>>().join(", ");
            match choose(&self.shared.config.reader, readers) {
                Some(reader) => {
                    self.complaint = None;
                    self.shared.lines.tell("reader", |end| {
                        tracing::info!("reader {}{end}", reader.to_string_lossy());
                    });
                    self.watch_reader(context, reader)?;
                    self.gone();
                }
                None => {
                    let wanted = &self.shared.config.reader;
                    self.complain(format!("no reader is called {wanted:?}; there are: {names}"));
                    let mut readers = [ReaderState::new(PNP_NOTIFICATION(), State::UNAWARE)];
                    wait(context, WAIT_FOR_READER, &mut readers)?;
                }
            }
        }
        Ok(())
    }

    /// Until the reader is gone.
    fn watch_reader(&mut self, context: &Context, reader: std::ffi::CString) -> Result<(), Error> {
        let mut states = [ReaderState::new(reader.clone(), State::UNAWARE)];
        loop {
            let changed = match wait(context, WAIT, &mut states) {
                Err(Error::UnknownReader | Error::ReaderUnavailable) => return Ok(()),
                changed => changed?,
            };
            if self.shared.lock().closed {
                return Ok(());
            }
            if !changed {
                continue;
            }
            let state = &mut states[0];
            let seen = state.event_state();
            if seen.contains(State::UNKNOWN) {
                return Ok(());
            }
            if !seen.contains(State::PRESENT) {
                self.complaint = None;
                self.gone();
            } else if seen.contains(State::MUTE) {
                self.complain("the card does not answer to reset".into());
                self.gone();
            } else if state.atr().is_empty() {
                // It is being powered up, and not every release of pcscd tells when that is done.
                self.gone();
                self.pause(ATR_DELAY);
                states = [ReaderState::new(reader.clone(), State::UNAWARE)];
                continue;
            } else {
                let place = Place { reader: reader.clone(), events: state.event_count() };
                let (atr, asked) = (Atr::from_card(state.atr()), reader.clone());
                self.shared.seen(place, atr.clone(), move || limits(&asked, &atr));
                if self.is_coming() {
                    self.complain(
                        "another program is at work with the card, which is there after that".into(),
                    );
                } else {
                    self.complaint = None;
                }
            }
            state.sync_current_state();
        }
    }

    fn gone(&self) {
        self.shared.remove(&mut self.shared.lock());
    }

    /// Whether the card that was seen is still not there, after a while.
    fn is_coming(&self) -> bool {
        let until = Instant::now() + LIMITS_DELAY;
        let mut state = self.shared.lock();
        while state.coming.is_some() && Instant::now() < until {
            state = self.shared.wait(state, Some(until));
        }
        state.coming.is_some()
    }

    fn pause(&self, time: Duration) {
        let until = Instant::now() + time;
        let mut state = self.shared.lock();
        while !state.closed && Instant::now() < until {
            state = self.shared.wait(state, Some(until));
        }
    }

    /// Says so, once.
    fn complain(&mut self, complaint: String) {
        if self.complaint.as_ref() != Some(&complaint) {
            self.shared.lines.tell("no card", |end| tracing::warn!("{complaint}{end}"));
            self.complaint = Some(complaint);
        }
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        self.shared.remove(&mut state);
        state.unwatched = true;
        self.shared.changed.notify_all();
    }
}

/// Whether something changed within that time.
fn wait(context: &Context, limit: Duration, states: &mut [ReaderState]) -> Result<bool, Error> {
    match context.get_status_change(limit, states) {
        Ok(()) => Ok(true),
        Err(Error::Timeout | Error::Cancelled) => Ok(false),
        Err(error) => Err(error),
    }
}
