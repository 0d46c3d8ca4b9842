//! Signals that come while a card is made.

use std::future::poll_fn;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::task::Poll;
use std::thread;
use std::time::{Duration, Instant};

use emulated_card::process::end;
use tokio::runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

use super::building::PREFIX;

/// Does the work, and tells it of a signal that asks the program to end. The work may wait for a tool that hangs: another
/// signal ends the program at once, with what the work has made left in `directory`.
pub(super) fn watched<T>(directory: &Path, work: impl FnOnce(&AtomicBool) -> T) -> io::Result<T> {
    let runtime = runtime::Builder::new_current_thread().enable_io().build()?;
    let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
    let mut signals: Vec<Signal> = {
        let _entered = runtime.enter();
        let watched = kinds.into_iter().filter(|kind| !crate::is_ignored(*kind));
        watched.map(signal).collect::<io::Result<_>>()?
    };
    let interrupted = AtomicBool::new(false);
    let (working, done) = oneshot::channel::<()>();
    Ok(thread::scope(|scope| {
        // Dropped with the work, even if that panics.
        let _working = working;
        scope.spawn(|| {
            runtime.block_on(async {
                let mut came = async || {
                    poll_fn(|context| {
                        match signals.iter_mut().any(|signal| signal.poll_recv(context).is_ready()) {
                            true => Poll::Ready(()),
                            false => Poll::Pending,
                        }
                    })
                    .await;
                };
                let watch = async {
                    came().await;
                    interrupted.store(true, Ordering::Relaxed);
                    let first = Instant::now();
                    loop {
                        came().await;
                        if first.elapsed() > crate::SAME_SIGNAL {
                            warn_of_keys(directory);
                            end(crate::KILLED.into());
                        }
                    }
                };
                tokio::select! {
                    () = watch => {}
                    _ = done => {}
                }
            });
        });
        work(&interrupted)
    }))
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
