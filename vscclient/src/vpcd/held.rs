//! Keeps pcscd from ending while no program uses it.
//!
//! With `--auto-exit`, as Debian's service has it, pcscd ends a minute after the last program has left, and the first one
//! that starts it again through systemd's socket asks before vpcd has the card. A PC/SC context counts as a program; so
//! one is held, and had again as soon as pcscd has ended all the same.

use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use pcsc::{Context, Error, PNP_NOTIFICATION, ReaderState, Scope, State};

/// Until a pcscd that is not there is asked again.
const RETRY: Duration = Duration::from_millis(250);

/// A context of the pcscd of this host, held as long as the process lives: what waits in the PC/SC library cannot be
/// called back at any time, and pcscd notices an end of the process as well as one of the context.
pub(super) struct HeldContext {
    there: SyncSender<()>,
}

impl HeldContext {
    /// On a thread of its own, as the PC/SC library blocks.
    pub(super) fn start() -> io::Result<Self> {
        let (there, is_there) = sync_channel(1);
        thread::Builder::new().name("pcscd".into()).spawn(move || hold(&is_there))?;
        Ok(Self { there })
    }

    /// A pcscd is there, another one perhaps than that which refused.
    pub(super) fn pcscd_is_there(&self) {
        let _ = self.there.try_send(());
    }
}

/// Until the [`HeldContext`] is dropped, which is seen when there is no context.
fn hold(is_there: &Receiver<()>) {
    let mut told = false;
    loop {
        let refused = match Context::establish(Scope::System) {
            Ok(context) => {
                tracing::debug!("a PC/SC context keeps pcscd running");
                let end = until_gone(&context);
                tracing::debug!("pcscd has ended: {end}");
                false
            }
            // Nobody listens, or not for long.
            Err(Error::NoService) => false,
            // pcscd asks polkit, and closes the connection of whom it does not let in.
            Err(error) => {
                if !std::mem::replace(&mut told, true) {
                    tracing::warn!(
                        "pcscd refuses to be kept running ({error}; polkit may say why): if it ends for want of \
                         programs (--auto-exit), the first one after that sees no card for up to a second"
                    );
                }
                true
            }
        };
        let next = match refused {
            // To ask anew could start it anew, through systemd's socket, and for nothing.
            true => is_there.recv().map_err(|_| RecvTimeoutError::Disconnected),
            false => is_there.recv_timeout(RETRY),
        };
        if next == Err(RecvTimeoutError::Disconnected) {
            return;
        }
    }
}

/// Waits for the end of the pcscd that the context is of: what comes and goes there meanwhile is of no interest.
fn until_gone(context: &Context) -> Error {
    let mut readers = [ReaderState::new(PNP_NOTIFICATION(), State::UNAWARE)];
    loop {
        match context.get_status_change(None, &mut readers) {
            Ok(()) => readers[0].sync_current_state(),
            Err(Error::Timeout) => {}
            Err(error) => return error,
        }
    }
}
