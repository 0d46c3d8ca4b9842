//! Signals that come while a card is made.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use emulated_card::process::watch_signals;
use tokio::signal::unix::SignalKind;

use super::building::PREFIX;

/// What tells of a signal that asks the program to end. What is done meanwhile may wait for a tool that hangs: another
/// signal ends the program at once, with what was made so far left in `directory`.
pub(super) fn watch(directory: PathBuf) -> io::Result<Arc<AtomicBool>> {
    let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
    let kinds: Vec<_> = kinds.into_iter().filter(|kind| !crate::is_ignored(*kind)).collect();
    let interrupted = Arc::new(AtomicBool::new(false));
    let told = interrupted.clone();
    let force = move || {
        warn_of_keys(&directory);
        crate::KILLED.into()
    };
    watch_signals(&kinds, &[], move || told.store(true, Ordering::Relaxed), force)?;
    Ok(interrupted)
}

/// Says what is left, but does not wait for a reader of it.
fn warn_of_keys(directory: &Path) {
    let left =
        format!("ended at once; {}/{PREFIX}* is left, perhaps with private keys in it", directory.display());
    let (saying, said) = mpsc::channel::<()>();
    let say = move || {
        crate::fail(crate::KILLED, &left);
        drop(saying);
    };
    if thread::Builder::new().spawn(say).is_ok() {
        let _ = said.recv_timeout(Duration::from_secs(1));
    }
}
