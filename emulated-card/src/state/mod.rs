//! What a card keeps on disk: the retry counter of its reference data, and who has the card open.
//!
//! One directory holds it all. Per database there is `database-….state`, the counter that all cards on that
//! database share; per token `token-….state`, the same for it, and `token-….claim`; per card `card-….claim`, locked
//! while the card is open, and `card-….state`, which holds the card's identity and, for a card with a PIN of its own,
//! hash and counter of PIN and PUK. A `.lock` beside each `.state` is what VERIFY locks: the `.state` is replaced when
//! more than a counter changes, and a lock stays with the file that was replaced. A counter is written in place, into the
//! one of two slots that does not count, so that a power cut leaves the other. `.replaced-1` and so on are `.state` files
//! of earlier versions, to which another order of certificates was another card.
//!
//! No file is a new card. A file that is there but cannot be trusted is an error, never a new card: otherwise
//! damaging it would be a way to get tries back.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use sha2::{Digest, Sha256};
use thiserror::Error;

use crate::pin::CardPinError;

mod directory;
mod format;
mod identity;
mod place;
mod record;

pub use directory::sync_directory;
use directory::{Directory, make_directory};
pub(crate) use format::Contents;
#[cfg(all(unix, feature = "nss"))]
pub(crate) use identity::TokenClaim;
pub use identity::{CardClaim, CardId};
pub use place::{PlaceError, own_new_path, own_path};
pub(crate) use record::{LockedRecord, Record};

/// Why a card's state could not be used.
#[derive(Debug, Error)]
pub enum StateError {
    /// No environment variable says where the state belongs.
    #[error(
        "no place for the state of cards: none of STATE_DIRECTORY, XDG_STATE_HOME and HOME is an absolute path"
    )]
    NoPlace,
    /// Another process, or this one, has this very card open.
    #[error(
        "card {card} of {} is in use already; give this one another name with --card-name",
        database.display()
    )]
    InUse {
        /// The database the card is made from.
        database: PathBuf,
        /// The beginning of its [`CardId`].
        card: String,
    },
    /// Another process, or this one, has a card on this token.
    #[error("the token {token} is in use already, by another card")]
    TokenInUse {
        /// The token's description.
        token: String,
    },
    /// Another process is in the middle of VERIFY, and did not end it in time.
    #[error("{} is locked by another process", path.display())]
    Locked {
        /// The lock file.
        path: PathBuf,
    },
    /// A state file is there, but what it says cannot be believed.
    #[error(
        "the state file {} {what}; no PIN is accepted until it is removed, which makes a new card with all its \
         tries, and without a PIN of its own",
        path.display()
    )]
    Damaged {
        /// The state file.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
    /// A lock file is not one that was made here.
    #[error("the lock file {} {what}; remove it", path.display())]
    LockFile {
        /// The lock file.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
    /// Others could replace what is in the state directory, or it is not one.
    #[error("the state directory {} {what}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The system refused.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// A card that is to have a PIN of its own has none, or none any more.
    #[error("the state of the card of {} is not there, or holds no PIN", database.display())]
    NoPin {
        /// The database the card is made from.
        database: PathBuf,
    },
    /// The first PIN or PUK of a card does not fit a card.
    #[error(transparent)]
    CardPin(#[from] CardPinError),
    /// The first PIN or PUK could not be hashed.
    #[error("cannot hash the card's PIN or PUK: {0}")]
    Hash(String),
}

/// The directory that holds the state of cards.
#[derive(Clone, Debug)]
pub struct StateDirectory {
    path: PathBuf,
}

impl StateDirectory {
    /// The directory `path`, made when first needed with no access for others.
    ///
    /// Whoever can write to it can give tries back, so one that belongs to another user, or that group or world
    /// may write to, is refused when it is used.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// The place for the user who runs this: `$STATE_DIRECTORY` (set by systemd), else
    /// `$XDG_STATE_HOME/vscclient`, else `$HOME/.local/state/vscclient`.
    ///
    /// # Errors
    /// [`StateError::NoPlace`] if none is set to an absolute path.
    pub fn of_user() -> Result<Self, StateError> {
        Self::from_environment(|name| std::env::var_os(name))
    }

    fn from_environment(variable: impl Fn(&str) -> Option<OsString>) -> Result<Self, StateError> {
        // The XDG base directory specification has relative paths ignored.
        let absolute = |name| variable(name).map(PathBuf::from).filter(|path| path.is_absolute());
        // systemd.exec(5): more than one StateDirectory= is separated by colons.
        let of_service = variable("STATE_DIRECTORY").and_then(|list| {
            let first = list.as_bytes().split(|&byte| byte == b':').next()?;
            let path = PathBuf::from(std::ffi::OsStr::from_bytes(first));
            path.is_absolute().then_some(path)
        });
        of_service
            .or_else(|| absolute("XDG_STATE_HOME").map(|base| base.join("vscclient")))
            .or_else(|| absolute("HOME").map(|home| home.join(".local/state/vscclient")))
            .map(Self::at)
            .ok_or(StateError::NoPlace)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes it, unless it is there; it is this user's alone then.
    ///
    /// # Errors
    /// [`StateError::Directory`] if it is not, [`StateError::Io`].
    pub fn create(&self) -> Result<(), StateError> {
        self.open_or_create().map(drop)
    }

    /// Whether it is there; it is this user's alone then.
    #[cfg(feature = "pem")]
    pub(crate) fn exists(&self) -> Result<bool, StateError> {
        Ok(self.open()?.is_some())
    }

    /// Replaces a file, which is then this user's alone, as a whole: it is the old one or the new one whenever the
    /// process dies. One writer at a time.
    #[cfg(feature = "pem")]
    pub(crate) fn replace(&self, name: &str, bytes: &[u8]) -> Result<(), StateError> {
        self.open_or_create()?.replace(name, &format!("{name}.new"), bytes)
    }

    fn open_or_create(&self) -> Result<Directory, StateError> {
        if let Some(directory) = self.open()? {
            return Ok(directory);
        }
        make_directory(&self.path).map_err(|source| self.io_error("create the state directory", source))?;
        self.open()?.ok_or_else(|| self.io_error("open the state directory", Errno::NOENT.into()))
    }

    /// `None` if it does not exist. A link to a directory is followed: systemd's DynamicUser= makes one.
    fn open(&self) -> Result<Option<Directory>, StateError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let file = match rustix::fs::open(&self.path, flags, Mode::empty()) {
            Ok(fd) => File::from(fd),
            Err(Errno::NOENT) => return Ok(None),
            Err(errno) => return Err(self.io_error("open the state directory", errno.into())),
        };
        let metadata =
            file.metadata().map_err(|source| self.io_error("look at the state directory", source))?;
        let refused = |what| Err(StateError::Directory { path: self.path.clone(), what });
        // Whoever is to write to it, and root could not be kept from it anyway.
        if let Some(what) = place::open_to_others(&metadata, &[rustix::process::geteuid().as_raw()]) {
            return refused(what);
        }
        Ok(Some(Directory { file, path: self.path.clone() }))
    }

    fn io_error(&self, what: &'static str, source: io::Error) -> StateError {
        StateError::Io { path: self.path.clone(), what, source }
    }
}

fn hash_with_length(hash: &mut Sha256, bytes: &[u8]) {
    hash.update((bytes.len() as u64).to_be_bytes());
    hash.update(bytes);
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_users_place() {
        let place = |variables: &[(&str, &str)]| {
            let found = StateDirectory::from_environment(|name| {
                let variable = variables.iter().find(|(variable, _)| *variable == name);
                variable.map(|(_, value)| value.into())
            });
            found.map(|directory| directory.path().display().to_string()).ok()
        };
        let home = ("HOME", "/home/u");
        let xdg = ("XDG_STATE_HOME", "/xdg");
        assert_eq!(place(&[home, xdg, ("STATE_DIRECTORY", "/var/lib/v:/b")]).as_deref(), Some("/var/lib/v"));
        assert_eq!(place(&[home, xdg]).as_deref(), Some("/xdg/vscclient"));
        assert_eq!(place(&[home]).as_deref(), Some("/home/u/.local/state/vscclient"));
        assert_eq!(
            place(&[home, ("XDG_STATE_HOME", "relative"), ("STATE_DIRECTORY", "")]).as_deref(),
            Some("/home/u/.local/state/vscclient")
        );
        assert_eq!(place(&[("HOME", "")]), None);
        assert_eq!(place(&[]), None);
    }
}
