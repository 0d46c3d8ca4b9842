//! State files on disk: read as a whole, replaced as a whole.

use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use sha2::{Digest, Sha256};

use super::directory::{Directory, FileLock, try_lock};
use super::format::{Contents, MAX_FILE, decode, encode};
use super::identity::CardId;
use super::{StateDirectory, StateError, hash_with_length, hex};

/// A stopped process may hold the lock for ever; the guest's reader waits for this long only.
const LOCK_WAIT: Duration = Duration::from_secs(5);
const LOCK_POLL: Duration = Duration::from_millis(20);

/// One state file: where it is, and whether it is a card's, which may hold more than a counter.
#[derive(Debug)]
pub(crate) struct Record {
    directory: StateDirectory,
    stem: String,
    database: PathBuf,
    of_card: bool,
}

impl Record {
    pub(crate) fn of_database(directory: &StateDirectory, database: &Path) -> Self {
        Self {
            directory: directory.clone(),
            stem: format!("database-{}", stem_of(database, b"")),
            database: database.to_owned(),
            of_card: false,
        }
    }

    pub(crate) fn of_token(directory: &StateDirectory, token: &str) -> Self {
        Self { directory: directory.clone(), stem: token_stem(token), database: token.into(), of_card: false }
    }

    pub(crate) fn of_card(directory: &StateDirectory, database: &Path, id: &CardId) -> Self {
        Self {
            directory: directory.clone(),
            stem: card_stem(database, id),
            database: database.to_owned(),
            of_card: true,
        }
    }

    /// What is on disk now; `None` for a new card. Needs no lock: a writer replaces the file as a whole.
    pub(crate) fn read(&self) -> Result<Option<Contents>, StateError> {
        match self.directory.open()? {
            Some(directory) => self.read_in(&directory),
            None => Ok(None),
        }
    }

    /// As [`read`](Self::read), for a counter: that of a card has a PIN, or there is no telling what it counts.
    pub(crate) fn read_existing(&self) -> Result<Contents, StateError> {
        self.existing(self.read()?)
    }

    /// Waits for the lock, a bounded time.
    pub(crate) fn lock(&self) -> Result<LockedRecord<'_>, StateError> {
        let directory = self.directory.open_or_create()?;
        let name = format!("{}.lock", self.stem);
        let file = directory.open_lock_file(&name, OFlags::RDWR)?;
        let give_up = Instant::now() + LOCK_WAIT;
        while !try_lock(&file).map_err(|source| directory.io_error(&name, "lock", source))? {
            if Instant::now() >= give_up {
                return Err(StateError::Locked { path: directory.path.join(name) });
            }
            // A file lock cannot be waited for with a limit, so this polls.
            std::thread::sleep(LOCK_POLL);
        }
        Ok(LockedRecord { record: self, directory, _lock: FileLock(file) })
    }

    fn existing(&self, read: Option<Contents>) -> Result<Contents, StateError> {
        let contents = read.unwrap_or_default();
        if self.has_counter(&contents) {
            Ok(contents)
        } else {
            Err(StateError::NoPin { database: self.database.clone() })
        }
    }

    /// Whether the counters mean anything: a card's do if it has a PIN of its own.
    pub(crate) fn has_counter(&self, contents: &Contents) -> bool {
        !self.of_card || contents.pin.is_some()
    }

    fn file_name(&self) -> String {
        format!("{}.state", self.stem)
    }

    fn read_in(&self, directory: &Directory) -> Result<Option<Contents>, StateError> {
        let name = self.file_name();
        // Without NONBLOCK, a FIFO in the file's place would hang the open.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = match directory.open_file(&name, flags, |path, what| StateError::Damaged { path, what }) {
            Err(StateError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Ok(None);
            }
            other => other?,
        };
        let mut bytes = Vec::new();
        let read = file.take(MAX_FILE + 1).read_to_end(&mut bytes);
        read.map_err(|source| directory.io_error(&name, "read", source))?;
        let damaged = |what| StateError::Damaged { path: directory.path.join(&name), what };
        let contents = decode(&bytes).map_err(damaged)?;
        // A card's has its identity, but for one from before that was kept, which has a PIN.
        if self.of_card != (contents.pin.is_some() || contents.identity.is_some()) {
            return Err(damaged("is another one's"));
        }
        Ok(Some(contents))
    }
}

/// A state file that nobody else reads to change it meanwhile.
pub(crate) struct LockedRecord<'a> {
    record: &'a Record,
    directory: Directory,
    _lock: FileLock,
}

impl LockedRecord<'_> {
    pub(crate) fn read(&self) -> Result<Option<Contents>, StateError> {
        self.record.read_in(&self.directory)
    }

    pub(crate) fn read_existing(&self) -> Result<Contents, StateError> {
        self.record.existing(self.read()?)
    }

    /// Replaces the file. After `Ok` the new contents survive a power cut; after an error the file is as before,
    /// or (when only the last step failed) as wanted but not yet certain to survive.
    pub(crate) fn write(&self, contents: &Contents) -> Result<(), StateError> {
        let text = encode(&self.record.database, contents);
        self.directory.replace(
            &self.record.file_name(),
            &format!("{}.new", self.record.stem),
            text.as_bytes(),
        )
    }
}

pub(super) fn card_stem(database: &Path, id: &CardId) -> String {
    format!("card-{}", stem_of(database, id.key()))
}

pub(super) fn token_stem(token: &str) -> String {
    format!("token-{}", stem_of(Path::new(token), b""))
}

fn stem_of(database: &Path, id: &[u8]) -> String {
    let mut hash = Sha256::new_with_prefix("vscard state file 1\0");
    hash_with_length(&mut hash, database.as_os_str().as_bytes());
    hash_with_length(&mut hash, id);
    hex(&hash.finalize()[..16])
}
