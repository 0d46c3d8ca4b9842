//! What is told on standard error.

use std::io::{IsTerminal, Write};
use std::sync::Arc;

use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Registry, fmt, reload};
use vscard_protocol::trace::Sink;

/// Changes the verbosity while the program runs.
#[derive(Clone)]
pub(crate) struct Level(reload::Handle<LevelFilter, Registry>);

impl Level {
    /// Starts logging at `level`, on the scale of the old vscclient.
    pub(crate) fn start(level: u32, may_have_colours: bool) -> Self {
        let (filter, handle) = reload::Layer::new(filter(level));
        let layer = fmt::layer()
            .with_writer(std::io::stderr)
            .with_ansi(may_have_colours && std::io::stderr().is_terminal())
            .with_target(false)
            .log_internal_errors(false);
        tracing_subscriber::registry().with(filter).with(layer).init();
        Self(handle)
    }

    /// Sets the verbosity.
    pub(crate) fn set(&self, level: u32) {
        let _ = self.0.reload(filter(level));
    }
}

fn filter(level: u32) -> LevelFilter {
    match level {
        0 => LevelFilter::INFO,
        1..=10 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    }
}

/// Where `--trace` lines go.
pub(crate) fn trace_sink() -> Sink {
    Arc::new(|line: &str| {
        let _ = writeln!(std::io::stderr().lock(), "apdu: {line}");
    })
}
