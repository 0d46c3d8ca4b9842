//! What a program with cards in it does at its begin and at its end.

use std::process::exit;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, Signal};

/// For the cards at the end, and for the process. A PKCS#11 module may keep a thread for ever.
const CLOSING: Duration = Duration::from_secs(2);

/// To be called before there are PINs, passwords and keys in the process: no core file and, on Linux, no debugger of
/// another process of the user.
pub fn keep_memory_private() {
    #[cfg(target_os = "linux")]
    let _ = rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable);
    let _ = rustix::process::setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) });
}

/// Gives up cards, which waits for what their modules are doing, but not for ever.
pub fn close<T: Send + 'static>(cards: T) {
    let (closing, closed) = mpsc::channel::<()>();
    let close = move || {
        drop(cards);
        drop(closing);
    };
    let thread = thread::Builder::new().name("close".into()).spawn(close);
    if thread.is_ok() && closed.recv_timeout(CLOSING) == Err(RecvTimeoutError::Timeout) {
        tracing::warn!("ended without a card whose module does not come back");
    }
}

/// Ends the process with this exit status. If the exit handlers of a module wait for what hangs in it, SIGKILL ends it.
pub fn end(status: i32) -> ! {
    let _ = thread::Builder::new().name("end".into()).spawn(|| {
        thread::sleep(CLOSING);
        let _ = rustix::process::kill_process(rustix::process::getpid(), Signal::KILL);
    });
    exit(status)
}
