//! Signals that come while a card is made.

use std::future::poll_fn;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::thread;
use std::time::Instant;

use emulated_card::process::end;
use tokio::runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

/// Does the work, and tells it of a signal that asks the program to end. The work may wait for a tool that hangs: another
/// signal ends the program at once.
pub(super) fn watched<T>(work: impl FnOnce(&AtomicBool) -> T) -> io::Result<T> {
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
