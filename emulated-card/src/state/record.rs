//! State files on disk: replaced as a whole, but for the counters, which are written in place.

use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::OFlags;
use sha2::{Digest, Sha256};

use super::directory::{Directory, FileLock, try_lock};
use super::format::{Contents, Decoded, MAX_FILE, Newest, SLOT, decode, encode, encode_slot};
use super::identity::CardId;
use super::{StateDirectory, StateError, hash_with_length, hex};

/// A stopped process may hold the lock for ever; the guest's reader waits for this long only.
const LOCK_WAIT: Duration = Duration::from_secs(5);
const LOCK_POLL: Duration = Duration::from_millis(20);
/// Of one card. Nobody changes between versions as often.
const MOST_ASIDE: u32 = 1000;
/// Whoever reads without the lock may see half of what is just being written, and so looks again, this often at most.
const LOOKS: usize = 4;

/// One state file: where it is, and whether it is a card's, which may hold more than a counter.
#[derive(Debug)]
pub(crate) struct Record {
    directory: StateDirectory,
    stem: String,
    database: PathBuf,
    of_card: bool,
    /// Inode and sequence number of what this process has waited for the disk with. What another one wrote, and says to
    /// have waited for, may have been killed before it did.
    flushed: Mutex<Option<(u64, u64)>>,
}

impl Record {
    fn new(directory: &StateDirectory, stem: String, database: &Path, of_card: bool) -> Self {
        let (directory, database) = (directory.clone(), database.to_owned());
        Self { directory, stem, database, of_card, flushed: Mutex::default() }
    }

    pub(crate) fn of_database(directory: &StateDirectory, database: &Path) -> Self {
        Self::new(directory, format!("database-{}", stem_of(database, b"")), database, false)
    }

    pub(crate) fn of_token(directory: &StateDirectory, token: &str) -> Self {
        Self::new(directory, token_stem(token), Path::new(token), false)
    }

    pub(crate) fn of_card(directory: &StateDirectory, database: &Path, id: &CardId) -> Self {
        Self::new(directory, card_stem(database, id.key()), database, true)
    }

    /// Of a card as an earlier version knew it.
    pub(super) fn of_earlier(directory: &StateDirectory, database: &Path, key: &[u8; 32]) -> Self {
        Self::new(directory, card_stem(database, key), database, true)
    }

    /// What the names of its files begin with.
    pub(super) fn stem(&self) -> &str {
        &self.stem
    }

    /// Whether it has a file with that extension.
    pub(super) fn has_file(&self, extension: &str) -> Result<bool, StateError> {
        match self.directory.open()? {
            Some(directory) => directory.has(&format!("{}.{extension}", self.stem)),
            None => Ok(false),
        }
    }

    /// What is on disk now; `None` for a new card. Needs no lock: a writer leaves one slot of the file alone.
    pub(crate) fn read(&self) -> Result<Option<Contents>, StateError> {
        match self.directory.open()? {
            Some(directory) => {
                Ok(self.read_in(&directory, OFlags::RDONLY)?.map(|(_, decoded)| decoded.contents))
            }
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
        Ok(LockedRecord { record: self, directory, open: None, _lock: FileLock(file) })
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

    fn read_in(&self, directory: &Directory, access: OFlags) -> Result<Option<(File, Decoded)>, StateError> {
        let name = self.file_name();
        // Without NONBLOCK, a FIFO in the file's place would hang the open.
        let flags = access | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = match directory.open_file(&name, flags, |path, what| StateError::Damaged { path, what }) {
            Err(StateError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Ok(None);
            }
            other => other?,
        };
        let damaged = |what| StateError::Damaged { path: directory.path.join(&name), what };
        let mut looks = LOOKS;
        let decoded = loop {
            let bytes = read_all(&file).map_err(|source| directory.io_error(&name, "read", source))?;
            looks -= 1;
            match decode(&bytes) {
                Ok(decoded) if decoded.whole || looks == 0 => break decoded,
                Err(what) if looks == 0 => return Err(damaged(what)),
                _ => {}
            }
        };
        // A card's has its identity, but for one from before that was kept, which has a PIN.
        if self.of_card != (decoded.contents.pin.is_some() || decoded.contents.identity.is_some()) {
            return Err(damaged("is another one's"));
        }
        Ok(Some((file, decoded)))
    }
}

fn read_all(file: &File) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; MAX_FILE as usize + 1];
    let mut length = 0;
    while length < bytes.len() {
        match file.read_at(&mut bytes[length..], length as u64) {
            Ok(0) => break,
            Ok(read) => length += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    bytes.truncate(length);
    Ok(bytes)
}

/// A state file that nobody else reads to change it meanwhile.
pub(crate) struct LockedRecord<'a> {
    record: &'a Record,
    directory: Directory,
    /// The file as it was read, if it has slots.
    open: Option<(File, Newest)>,
    _lock: FileLock,
}

impl LockedRecord<'_> {
    pub(crate) fn read(&mut self) -> Result<Option<Contents>, StateError> {
        let read = self.record.read_in(&self.directory, OFlags::RDWR)?;
        let Some((file, Decoded { contents, newest, .. })) = read else {
            self.open = None;
            return Ok(None);
        };
        self.open = newest.map(|newest| (file, newest));
        Ok(Some(contents))
    }

    /// As [`read`](Self::read), with the time of the last change.
    pub(super) fn read_with_time(&mut self) -> Result<Option<(Contents, SystemTime)>, StateError> {
        let Some((file, decoded)) = self.record.read_in(&self.directory, OFlags::RDONLY)? else {
            return Ok(None);
        };
        let changed = file.metadata().and_then(|metadata| metadata.modified());
        let changed =
            changed.map_err(|source| self.directory.io_error(&self.record.file_name(), "look at", source))?;
        Ok(Some((decoded.contents, changed)))
    }

    /// Gives the file another name, under which nobody looks for it. Tells where it is, if it was there.
    pub(super) fn put_aside(&self) -> Result<Option<PathBuf>, StateError> {
        let Record { stem, .. } = self.record;
        let name = self.record.file_name();
        if !self.directory.has(&name)? {
            return Ok(None);
        }
        for number in 1..=MOST_ASIDE {
            let aside = format!("{stem}.replaced-{number}");
            if !self.directory.has(&aside)? {
                self.directory.rename(&name, &aside)?;
                return Ok(Some(self.directory.path.join(aside)));
            }
        }
        Err(self.directory.io_error(&name, "rename", io::ErrorKind::AlreadyExists.into()))
    }

    pub(crate) fn read_existing(&mut self) -> Result<Contents, StateError> {
        let read = self.read()?;
        self.record.existing(read)
    }

    /// Replaces the file. After `Ok` the new contents survive a power cut; after an error the file is as before,
    /// or (when only the last step failed) as wanted but not yet certain to survive.
    pub(crate) fn write(&mut self, contents: &Contents) -> Result<(), StateError> {
        self.open = None;
        let text = encode(&self.record.database, contents);
        self.directory.replace(
            &self.record.file_name(),
            &format!("{}.new", self.record.stem),
            text.as_bytes(),
        )
    }

    /// Writes what was read with other counters, and waits for the disk if `flushed`; if not, a power cut may leave what
    /// was written before. After an error the file is as before, or as wanted but not certain to survive.
    pub(crate) fn write_counters(&mut self, contents: &Contents, flushed: bool) -> Result<(), StateError> {
        let next = self.open.as_ref().and_then(|(_, newest)| newest.next());
        let (Some((file, newest)), Some((slot, sequence))) = (&mut self.open, next) else {
            return self.write(contents);
        };
        let failed = |source| self.directory.io_error(&self.record.file_name(), "write", source);
        let inode = file.metadata().map_err(failed)?.ino();
        let mut known = self.record.flushed.lock().unwrap_or_else(PoisonError::into_inner);
        if newest.flushed && *known != Some((inode, newest.sequence)) {
            file.sync_data().map_err(failed)?;
        }
        let text = encode_slot(&self.record.database, contents, sequence, flushed);
        file.write_all_at(text.as_bytes(), (slot * SLOT) as u64).map_err(failed)?;
        // Nobody knows before that it is on disk, and what comes after it must not take the other slot if it is not.
        *newest = Newest { slot, sequence, flushed: false };
        if flushed {
            file.sync_data().map_err(failed)?;
            newest.flushed = true;
            *known = Some((inode, sequence));
        }
        Ok(())
    }
}

fn card_stem(database: &Path, key: &[u8; 32]) -> String {
    format!("card-{}", stem_of(database, key))
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
