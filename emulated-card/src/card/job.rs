//! What blocks: PIN checks, private-key operations, what is written to the card.

use std::fmt::Display;
use std::sync::Arc;

use vscard_protocol::{LogBudget, Secret, StatusWord, Validity};

use crate::applet::piv;
use crate::keys::writable::{Writable, WriteError};
use crate::keys::{KeyError, KeyKind, KeyStore, Unlocked};
use crate::pin::{PinError, ReferenceData};
use crate::slot::PivSlot;

/// What blocks: a PIN check, a key operation, something to be written.
#[must_use = "a job that is not run leaves the command unanswered"]
pub struct Job {
    pub(super) epoch: u64,
    pub(super) login: Option<Login>,
    pub(super) store: Arc<dyn KeyStore>,
    pub(super) reference: Arc<ReferenceData>,
    pub(super) complaints: Complaints,
    pub(super) work: Work,
}

/// A [`Job`] that was run. Dropping it logs out what it had logged in.
#[must_use = "the command stays unanswered until the card has this"]
pub struct Done {
    pub(super) epoch: u64,
    pub(super) login: Option<Login>,
    /// Whether the PIN has just been verified.
    pub(super) fresh: bool,
    /// Whether the result is what a key gave behind the PIN.
    pub(super) behind_pin: bool,
    pub(super) result: Result<Secret, StatusWord>,
}

/// A verified PIN.
pub(super) struct Login {
    /// Dropped first: whoever hears of the logout finds it ended.
    life: Arc<()>,
    unlocked: Box<dyn Unlocked>,
}

impl Login {
    /// Of what is given while it lasts.
    pub(super) fn validity(&self) -> Validity {
        Validity::of(&self.life)
    }
}

/// What a job does.
pub(crate) enum Work {
    /// How many tries the PIN has left.
    TriesLeft,
    /// Compares the PIN and logs in.
    Verify(Secret),
    /// Changes the PIN and logs in.
    Change { old: Secret, new: Secret },
    /// Changes the PUK.
    ChangePuk { old: Secret, new: Secret },
    /// Gives the PIN its tries back and another value.
    Unblock { puk: Secret, new: Secret },
    /// Uses a private key.
    Key(KeyWork),
    /// Replaces a data object.
    Put { object: u8, content: Secret },
    /// Makes a new key.
    Generate { slot: PivSlot, kind: KeyKind },
}

/// One use of a private key.
pub(crate) struct KeyWork {
    /// Index in [`KeyStore::certificates`].
    pub(crate) key: usize,
    pub(crate) operation: KeyOperation,
    /// The block, digest or point.
    pub(crate) input: Secret,
    /// Whether it needs a verified PIN.
    pub(crate) needs_pin: bool,
    /// Makes response data of the result.
    pub(crate) reply: fn(Secret) -> Secret,
}

/// See the methods of [`Unlocked`].
#[derive(Clone, Copy)]
pub(crate) enum KeyOperation {
    RsaRaw,
    Ecdsa,
    Ecdh,
}

/// What fails on a card, for the log. A guest can repeat the command as fast as it likes; the log is not to follow it.
/// What each complaint is about is its kind, so that nothing else that a guest repeats hides wrong and blocked PINs.
#[derive(Clone, Default)]
pub(crate) struct Complaints {
    lines: Arc<LogBudget<&'static str>>,
    /// Added to those about what is blocked.
    way_out: Arc<str>,
}

/// What a PIN is to its user.
const PIN: &str = "PIN";
const PUK: &str = "PUK";

impl Complaints {
    #[cfg(all(unix, feature = "nss", feature = "pem", feature = "pcsc"))]
    pub(super) fn set_way_out(&mut self, way_out: String) {
        self.way_out = way_out.into();
    }

    /// With what an earlier card has left of the log.
    #[cfg(all(unix, feature = "nss"))]
    pub(super) fn go_on_from(&mut self, earlier: &Self) {
        self.lines = Arc::clone(&earlier.lines);
    }

    pub(crate) fn warn(&self, what: &'static str, error: impl Display) {
        self.lines.tell(what, |end| tracing::warn!(%error, "{what}{end}"));
    }

    fn refused(&self, what: &'static str, left: Option<u8>) {
        let way_out = &self.way_out;
        self.lines.tell(what, |end| match left {
            Some(0) => tracing::warn!("wrong {what}, and now it is blocked{way_out}{end}"),
            Some(1) => tracing::warn!("wrong {what}, 1 try left{end}"),
            Some(left) => tracing::warn!("wrong {what}, {left} tries left{end}"),
            None => tracing::warn!("{what} refused: it is blocked{way_out}{end}"),
        });
    }

    /// The status word of an error about a PIN or PUK.
    fn pin(&self, what: &'static str, error: &PinError) -> StatusWord {
        match error {
            PinError::Wrong { left } => {
                self.refused(what, Some(*left));
                StatusWord::tries_left(*left)
            }
            PinError::Blocked => {
                self.refused(what, None);
                StatusWord::AUTHENTICATION_BLOCKED
            }
            PinError::State(_) => {
                self.warn("PIN check", error);
                StatusWord::MEMORY_FAILURE
            }
            PinError::NotChecked(_) => {
                self.warn("PIN check", error);
                StatusWord::NO_DIAGNOSIS
            }
            PinError::NotSupported => StatusWord::CONDITIONS_NOT_SATISFIED,
            // SP 800-73-4 Part 2 §3.2.1: what tells a PIN that was not compared from a wrong one.
            PinError::Unfit(_) | PinError::Impossible(_) => StatusWord::INCORRECT_DATA,
        }
    }
}

impl Job {
    /// Does the work, on the calling thread.
    pub fn run(self) -> Done {
        let Self { epoch, login, store, reference, complaints, work } = self;
        let fresh = matches!(work, Work::Verify(_));
        let behind_pin = matches!(&work, Work::Key(work) if work.needs_pin);
        let (login, result) = match work {
            Work::TriesLeft => {
                let status = match reference.tries_left() {
                    Ok(0) => StatusWord::AUTHENTICATION_BLOCKED,
                    Ok(left) => StatusWord::tries_left(left),
                    Err(error) => complaints.pin(PIN, &error),
                };
                (login, Err(status))
            }
            Work::Verify(pin) => {
                // A store ends an earlier login when it is unlocked, so that one must be gone before.
                drop(login);
                logged_in(&complaints, reference.verify(&pin, &*store))
            }
            Work::Change { old, new } => match reference.check_change(&new) {
                Ok(()) => {
                    drop(login);
                    logged_in(&complaints, reference.change(&old, &new, &*store))
                }
                Err(refused) => (login, Err(complaints.pin(PIN, &refused))),
            },
            Work::ChangePuk { old, new } => (login, empty(&complaints, reference.change_puk(&old, &new))),
            Work::Unblock { puk, new } => match reference.unblock(&puk, &new) {
                // SP 800-73-4 Part 2 §3.2.3: 63CX ends the PIN's security status. Success would not change it, but
                // who was logged in knew the PIN that is no more.
                compared @ (Ok(()) | Err(PinError::Wrong { .. })) => (None, empty(&complaints, compared)),
                refused => (login, empty(&complaints, refused)),
            },
            Work::Key(work) => work.run(login, &*store, &reference, &complaints),
            Work::Put { object, content } => {
                let put = |memory: &dyn Writable| memory.put(object, content.expose());
                (login, write(&complaints, &*store, put).map(|()| Secret::default()))
            }
            Work::Generate { slot, kind } => {
                let key = write(&complaints, &*store, |memory| memory.generate(slot, kind));
                (login, key.map(|key| piv::public_key(&key)))
            }
        };
        Done { epoch, fresh: fresh && login.is_some(), behind_pin, login, result }
    }
}

impl KeyWork {
    fn run(
        self,
        login: Option<Login>,
        store: &dyn KeyStore,
        reference: &ReferenceData,
        complaints: &Complaints,
    ) -> (Option<Login>, Result<Secret, StatusWord>) {
        if let Some(login) = login {
            let (result, goes_on) = self.run_with(&*login.unlocked, complaints);
            return (goes_on.then_some(login), result);
        }
        if self.needs_pin {
            return (None, Err(StatusWord::SECURITY_STATUS_NOT_SATISFIED));
        }
        let result = match reference.without_pin(store) {
            // For this one operation: the PIN is not verified by it.
            Ok(login) => self.run_with(&*login, complaints).0,
            // The store is behind the PIN itself, so here this key is, too.
            Err(PinError::NotSupported) => Err(StatusWord::SECURITY_STATUS_NOT_SATISFIED),
            Err(error) => Err(complaints.pin(PIN, &error)),
        };
        (None, result)
    }

    /// The response data, and whether the login is still one.
    fn run_with(&self, login: &dyn Unlocked, complaints: &Complaints) -> (Result<Secret, StatusWord>, bool) {
        let input = self.input.expose();
        let result = match self.operation {
            KeyOperation::RsaRaw => login.rsa_raw(self.key, input),
            KeyOperation::Ecdsa => login.ecdsa(self.key, input).map(Secret::new),
            KeyOperation::Ecdh => login.ecdh(self.key, input),
        };
        match result {
            Ok(result) => (Ok((self.reply)(result)), true),
            Err(KeyError::Block) => (Err(StatusWord::INCORRECT_DATA), true),
            Err(KeyError::LoggedOut) => (Err(StatusWord::SECURITY_STATUS_NOT_SATISFIED), false),
            Err(error @ KeyError::Failed(_)) => {
                complaints.warn("private key", error);
                (Err(StatusWord::NO_DIAGNOSIS), true)
            }
        }
    }
}

fn write<T>(
    complaints: &Complaints,
    store: &dyn KeyStore,
    write: impl FnOnce(&dyn Writable) -> Result<T, WriteError>,
) -> Result<T, StatusWord> {
    let memory = store.writable().ok_or(StatusWord::INS_NOT_SUPPORTED)?;
    write(memory).map_err(|error| {
        complaints.warn("nothing was written to the card", &error);
        match error {
            WriteError::Key(_) => StatusWord::NO_DIAGNOSIS,
            WriteError::Storage(_) => StatusWord::MEMORY_FAILURE,
        }
    })
}

fn logged_in(
    complaints: &Complaints,
    result: Result<Box<dyn Unlocked>, PinError>,
) -> (Option<Login>, Result<Secret, StatusWord>) {
    match result {
        Ok(unlocked) => (Some(Login { life: Arc::default(), unlocked }), Ok(Secret::default())),
        Err(error) => (None, Err(complaints.pin(PIN, &error))),
    }
}

fn empty(complaints: &Complaints, result: Result<(), PinError>) -> Result<Secret, StatusWord> {
    result.map(|()| Secret::default()).map_err(|error| complaints.pin(PUK, &error))
}
