//! What the service manager that started us, if one did, is told (sd_notify(3)), and who started us with `--background`.
//!
//! One that does not read holds nothing up: that we are ready is told when there is room for it, and what
//! `systemctl status` shows is left out.

use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use emulated_card::process::ServiceManager;

use crate::background;

/// Between attempts to tell that we are ready.
const FULL: Duration = Duration::from_millis(250);

static MANAGER: LazyLock<Option<Mutex<Manager>>> = LazyLock::new(|| {
    let manager = ServiceManager::of_environment()?;
    Some(Mutex::new(Manager { manager, status: String::new(), ready: false }))
});

/// The card is there for its users, as far as that is up to us.
pub(crate) fn ready(status: &str) {
    background::ready(status);
    started(status);
}

/// There is no card yet. It may take days until somebody puts one in, and a service that starts is not to wait for
/// that; who wants the card in the background does.
pub(crate) fn ready_without_card(status: &str) {
    background::status(status);
    started(status);
}

fn started(status: &str) {
    let Some(mut manager) = manager() else { return };
    manager.status = status.to_owned();
    let waiting = std::mem::replace(&mut manager.ready, true);
    manager.tell();
    if manager.ready && !waiting {
        tokio::spawn(tell_again());
    }
}

async fn tell_again() {
    loop {
        tokio::time::sleep(FULL).await;
        let Some(mut manager) = manager() else { return };
        if manager.ready {
            manager.tell();
        }
        if !manager.ready {
            return;
        }
    }
}

/// What `systemctl status` shows.
pub(crate) fn status(status: &str) {
    background::status(status);
    let Some(mut manager) = manager() else { return };
    if manager.status != status {
        manager.status = status.to_owned();
        manager.tell();
    }
}

fn manager() -> Option<MutexGuard<'static, Manager>> {
    MANAGER.as_ref().map(|manager| manager.lock().unwrap_or_else(PoisonError::into_inner))
}

struct Manager {
    manager: ServiceManager,
    status: String,
    /// That we are ready has yet to be told.
    ready: bool,
}

impl Manager {
    fn tell(&mut self) {
        let ready = if self.ready { "READY=1\n" } else { "" };
        // A line is an assignment; a path may have several.
        let message = format!("{ready}STATUS={}\n", self.status.replace('\n', " "));
        if self.manager.tell(&message) {
            self.ready = false;
        } else if !self.ready {
            self.status.clear();
        }
    }
}
