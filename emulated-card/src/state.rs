//! What a card keeps on disk: the retry counter of its reference data, and who has the card open.
//!
//! One directory holds it all. Per database there is `database-….state`, the counter that all cards on that
//! database share; per card identity `card-….claim`, locked while the card is open, and for a card with a PIN of
//! its own `card-….state`, which holds counter and hash. A `.lock` beside each `.state` is what VERIFY locks: the
//! `.state` is replaced as a whole each time, and a lock stays with the file that was replaced.
//!
//! No file is a new card. A file that is there but cannot be trusted is an error, never a new card: otherwise
//! damaging it would be a way to get tries back.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs::{DirBuilder, File};
use std::io::{self, Read, Write as _};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use sha2::{Digest, Sha256};
use thiserror::Error;

use crate::keys::Certificate;
use crate::pin::{CardPinError, PinHash};

/// Longest state file that is read. What is written here is a quarter of it.
const MAX_FILE: u64 = 4096;
/// A stopped process may hold the lock for ever; the guest's reader waits for this long only.
const LOCK_WAIT: Duration = Duration::from_secs(5);
const LOCK_POLL: Duration = Duration::from_millis(20);
const FIRST_LINE: &str = "vscard-state 1";

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
         tries (and, for a PIN of its own, needs --pin-file again)",
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
    /// A card that is to have a PIN of its own has none yet.
    #[error("the card of {} has no PIN yet; give it one with --pin-file FILE", database.display())]
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

    /// Claims the card `id` of `database` for as long as the result lives.
    ///
    /// `database` is the canonical path, so that one database has one name. The claim is a lock that the kernel
    /// drops with the process, however that ends.
    ///
    /// # Errors
    /// [`StateError::InUse`] while another opener, in this process or another, holds the same card.
    pub fn claim(&self, database: &Path, id: &CardId) -> Result<CardClaim, StateError> {
        match self.lock_claim(&card_stem(database, id))? {
            Some(lock) => Ok(CardClaim { _lock: lock, database: database.to_owned(), id: id.clone() }),
            None => Err(StateError::InUse { database: database.to_owned(), card: hex(&id.0[..4]) }),
        }
    }

    /// Claims the token that `token` describes, for as long as the result lives.
    ///
    /// # Errors
    /// [`StateError::TokenInUse`] while another card, in this process or another, is on it.
    pub fn claim_token(&self, token: &str) -> Result<TokenClaim, StateError> {
        match self.lock_claim(&format!("token-{}", stem_of(Path::new(token), b"")))? {
            Some(lock) => Ok(TokenClaim { _lock: lock }),
            None => Err(StateError::TokenInUse { token: token.to_owned() }),
        }
    }

    /// `None` while another has that lock.
    fn lock_claim(&self, stem: &str) -> Result<Option<FileLock>, StateError> {
        let directory = self.open_or_create()?;
        let name = format!("{stem}.claim");
        // The card can be claimed (not verified) where nothing can be written, if it was claimed there before.
        let file = match directory.open_lock_file(&name, OFlags::RDWR) {
            Err(StateError::Io { source, .. })
                if matches!(source.raw_os_error().map(Errno::from_raw_os_error), Some(Errno::ROFS)) =>
            {
                directory.open_lock_file(&name, OFlags::RDONLY)?
            }
            other => other?,
        };
        let locked = try_lock(&file).map_err(|source| directory.io_error(&name, "lock", source))?;
        Ok(locked.then(|| FileLock(file)))
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
        if metadata.uid() != rustix::process::geteuid().as_raw() {
            return refused("belongs to another user");
        }
        if metadata.mode() & 0o022 != 0 {
            return refused("can be written to by others: take that away with chmod go-w");
        }
        Ok(Some(Directory { file, path: self.path.clone() }))
    }

    fn io_error(&self, what: &'static str, source: io::Error) -> StateError {
        StateError::Io { path: self.path.clone(), what, source }
    }
}

/// Who a card is: derived from its certificates' public keys and its name, with nothing random, so that the same
/// certificates make the same card (and the same serial numbers) in each run.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct CardId([u8; 32]);

impl CardId {
    /// The identity of the card with these certificates, in this order, and this name.
    pub fn derive(certificates: &[Certificate], card_name: &str) -> Self {
        let mut hash = Sha256::new_with_prefix("vscard card identity 1\0");
        hash.update((certificates.len() as u64).to_be_bytes());
        for certificate in certificates {
            hash_with_length(&mut hash, &certificate.public_key);
        }
        hash_with_length(&mut hash, card_name.as_bytes());
        Self(hash.finalize().into())
    }

    /// The identity itself; serial numbers are cut from it.
    pub fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl std::fmt::Debug for CardId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CardId({})", hex(&self.0[..4]))
    }
}

/// A card's hold on its identity, from [`StateDirectory::claim`]. Dropping it lets another opener have the card.
#[derive(Debug)]
pub struct CardClaim {
    _lock: FileLock,
    database: PathBuf,
    id: CardId,
}

impl CardClaim {
    /// The identity that is held.
    pub fn id(&self) -> &CardId {
        &self.id
    }

    /// The database of the card.
    pub fn database(&self) -> &Path {
        &self.database
    }
}

/// A card's hold on a token, from [`StateDirectory::claim_token`]. Dropping it lets another card have the token.
#[derive(Debug)]
pub struct TokenClaim {
    _lock: FileLock,
}

/// What a state file says.
#[derive(Clone, Debug, Default)]
pub(crate) struct Contents {
    /// Tries that are left; `None` is all of them, however many the opener grants.
    pub(crate) left: Option<u8>,
    /// The PIN of a card that has its own.
    pub(crate) pin: Option<PinHash>,
    /// As `left`, of the PUK.
    pub(crate) puk_left: Option<u8>,
    /// The PUK of a card that has one.
    pub(crate) puk: Option<PinHash>,
}

/// One state file: where it is, and whether it holds a PIN.
#[derive(Debug)]
pub(crate) struct Record {
    directory: StateDirectory,
    stem: String,
    database: PathBuf,
    holds_pin: bool,
}

impl Record {
    pub(crate) fn of_database(directory: &StateDirectory, database: &Path) -> Self {
        Self {
            directory: directory.clone(),
            stem: format!("database-{}", stem_of(database, b"")),
            database: database.to_owned(),
            holds_pin: false,
        }
    }

    pub(crate) fn of_card(directory: &StateDirectory, database: &Path, id: &CardId) -> Self {
        Self {
            directory: directory.clone(),
            stem: card_stem(database, id),
            database: database.to_owned(),
            holds_pin: true,
        }
    }

    /// What is on disk now; `None` for a new card. Needs no lock: a writer replaces the file as a whole.
    pub(crate) fn read(&self) -> Result<Option<Contents>, StateError> {
        match self.directory.open()? {
            Some(directory) => self.read_in(&directory),
            None => Ok(None),
        }
    }

    /// As [`read`](Self::read), for a record that must be there if it is to hold a PIN.
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
        match read {
            Some(contents) => Ok(contents),
            None if self.holds_pin => Err(StateError::NoPin { database: self.database.clone() }),
            None => Ok(Contents::default()),
        }
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
        match (self.holds_pin, contents.pin.is_some()) {
            (true, false) => Err(damaged("lacks the PIN")),
            (false, true) => Err(damaged("holds a PIN, and should not")),
            _ => Ok(Some(contents)),
        }
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
        let name = self.record.file_name();
        // One name is enough, as only the holder of the lock writes; and what a killed process left is reused.
        let temporary = format!("{}.new", self.record.stem);
        let fail = |what, source: io::Error| self.directory.io_error(&name, what, source);
        let at = &self.directory.file;
        match rustix::fs::unlinkat(at, &temporary, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(errno) => return Err(self.directory.io_error(&temporary, "remove", errno.into())),
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut file = rustix::fs::openat(at, &temporary, flags, Mode::RUSR | Mode::WUSR)
            .map(File::from)
            .map_err(|errno| fail("replace", errno.into()))?;
        let written = file
            .write_all(encode(&self.record.database, contents).as_bytes())
            .and_then(|()| file.sync_all())
            .and_then(|()| Ok(rustix::fs::renameat(at, &temporary, at, &name)?));
        if let Err(source) = written {
            // What is left of it does no harm.
            let _ = rustix::fs::unlinkat(at, &temporary, AtFlags::empty());
            return Err(fail("write", source));
        }
        at.sync_all().map_err(|source| fail("write (directory)", source))
    }
}

/// The state directory, open: what is done in one VERIFY is done in one directory, even if it is moved meanwhile.
struct Directory {
    file: File,
    path: PathBuf,
}

impl Directory {
    /// Opens a file that is a plain one, ours, and not open to others' writing.
    fn open_file(
        &self,
        name: &str,
        flags: OFlags,
        refused: fn(PathBuf, &'static str) -> StateError,
    ) -> Result<File, StateError> {
        let refused = |what| refused(self.path.join(name), what);
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = match rustix::fs::openat(&self.file, name, flags, Mode::RUSR | Mode::WUSR) {
            Ok(fd) => File::from(fd),
            Err(Errno::LOOP) => return Err(refused("is a symbolic link")),
            Err(errno) => return Err(self.io_error(name, "open", errno.into())),
        };
        let metadata = file.metadata().map_err(|source| self.io_error(name, "look at", source))?;
        if !metadata.is_file() {
            return Err(refused("is not a regular file"));
        }
        if metadata.uid() != rustix::process::geteuid().as_raw() {
            return Err(refused("belongs to another user"));
        }
        if metadata.mode() & 0o022 != 0 {
            return Err(refused("can be written to by others"));
        }
        if metadata.len() > MAX_FILE {
            return Err(refused("is too long"));
        }
        Ok(file)
    }

    fn open_lock_file(&self, name: &str, access: OFlags) -> Result<File, StateError> {
        // NFS wants write access for an exclusive lock.
        let flags = access | OFlags::CREATE | OFlags::NONBLOCK | OFlags::NOCTTY;
        self.open_file(name, flags, |path, what| StateError::LockFile { path, what })
    }

    fn io_error(&self, name: &str, what: &'static str, source: io::Error) -> StateError {
        StateError::Io { path: self.path.join(name), what, source }
    }
}

/// An exclusive lock. It belongs to the open file, so that it excludes other threads as it does other processes.
#[derive(Debug)]
struct FileLock(File);

impl Drop for FileLock {
    fn drop(&mut self) {
        // Closing is not enough: a child between fork and exec shares the open file, and with it the lock.
        let _ = rustix::fs::flock(&self.0, FlockOperation::Unlock);
    }
}

/// Takes the exclusive lock, unless another has it.
fn try_lock(file: &File) -> io::Result<bool> {
    loop {
        match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(true),
            Err(Errno::INTR) => {}
            Err(Errno::WOULDBLOCK) => return Ok(false),
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn encode(database: &Path, contents: &Contents) -> String {
    // For whoever looks into the file, and read by nobody else: so it may be shortened.
    let mut shown = String::new();
    for character in database.to_string_lossy().chars().take(400) {
        if character.is_control() {
            shown.extend(character.escape_default());
        } else {
            shown.push(character);
        }
    }
    let count = |left: Option<u8>| left.map_or_else(|| "full".to_owned(), |left| left.to_string());
    let mut body = format!("{FIRST_LINE}\ndatabase {shown}\ntries-left {}\n", count(contents.left));
    // Writing to a String cannot fail.
    if let Some(pin) = &contents.pin {
        let _ = writeln!(body, "pin {pin}");
    }
    if let Some(puk) = &contents.puk {
        let _ = writeln!(body, "puk-tries-left {}\npuk {puk}", count(contents.puk_left));
    }
    let check = hex(&Sha256::digest(&body));
    format!("{body}sha256 {check}\n")
}

fn decode(bytes: &[u8]) -> Result<Contents, &'static str> {
    if bytes.len() as u64 > MAX_FILE {
        return Err("is too long");
    }
    let text = std::str::from_utf8(bytes).map_err(|_| "is damaged")?;
    let start_of_check = text.rfind("\nsha256 ").ok_or("is cut short")? + 1;
    let (body, check) = text.split_at(start_of_check);
    if check != format!("sha256 {}\n", hex(&Sha256::digest(body))) {
        return Err("is damaged");
    }
    let mut lines = body.split_terminator('\n').peekable();
    if lines.next() != Some(FIRST_LINE) {
        return Err("was written by another version");
    }
    let mut field = |name: &str| lines.next_if(|line| line.starts_with(name)).map(|line| &line[name.len()..]);
    let count = |text: &str| match text {
        "full" => Ok(None),
        count => count.parse().ok().filter(|&count: &u8| count <= 15).map(Some).ok_or("is malformed"),
    };
    let hash = |text: &str| PinHash::parse(text).ok_or("holds a PIN hash that cannot be used");
    field("database ").ok_or("is malformed")?;
    let left = count(field("tries-left ").ok_or("is malformed")?)?;
    let pin = field("pin ").map(hash).transpose()?;
    let puk_left = field("puk-tries-left ").map(count).transpose()?;
    let puk = field("puk ").map(hash).transpose()?;
    if lines.next().is_some() || puk_left.is_some() != puk.is_some() || (puk.is_some() && pin.is_none()) {
        return Err("is malformed");
    }
    Ok(Contents { left, pin, puk_left: puk_left.flatten(), puk })
}

fn make_directory(path: &Path) -> io::Result<()> {
    let parent =
        path.parent().map(|parent| if parent.as_os_str().is_empty() { Path::new(".") } else { parent });
    let create = || match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    };
    match (create(), parent) {
        (Err(error), Some(parent)) if error.kind() == io::ErrorKind::NotFound && !parent.exists() => {
            make_directory(parent)?;
            create()?;
        }
        (result, _) => result?,
    }
    // A counter is no more durable than the directories it is in.
    match parent.map_or(Ok(()), |parent| File::open(parent)?.sync_all()) {
        // One that can be searched and not read cannot be opened; it was there before us.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        other => other,
    }
}

fn card_stem(database: &Path, id: &CardId) -> String {
    format!("card-{}", stem_of(database, &id.0))
}

fn stem_of(database: &Path, id: &[u8]) -> String {
    let mut hash = Sha256::new_with_prefix("vscard state file 1\0");
    hash_with_length(&mut hash, database.as_os_str().as_bytes());
    hash_with_length(&mut hash, id);
    hex(&hash.finalize()[..16])
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
    use crate::keys::KeyKind;

    fn certificate(public_key: &[u8]) -> Certificate {
        Certificate {
            name: "any".into(),
            der: b"any".to_vec(),
            public_key: public_key.to_vec(),
            kind: KeyKind::Rsa { bits: 2048 },
        }
    }

    #[test]
    fn identity_depends_on_keys_their_order_and_the_name() {
        let id = |keys: &[&[u8]], name| {
            CardId::derive(&keys.iter().map(|key| certificate(key)).collect::<Vec<_>>(), name)
        };
        let ids = [
            id(&[b"a", b"b"], ""),
            id(&[b"b", b"a"], ""),
            id(&[b"ab"], ""),
            id(&[b"a"], "b"),
            id(&[b"a", b"b"], "second"),
            id(&[], ""),
        ];
        for (at, one) in ids.iter().enumerate() {
            assert!(!ids[..at].contains(one), "{at}");
        }
        assert_eq!(ids[0], id(&[b"a", b"b"], ""));
    }

    /// Serial numbers are derived from it: another value would be another card for every user.
    #[test]
    fn identity_never_changes() {
        let id = CardId::derive(&[certificate(b"key")], "name");
        assert_eq!(hex(id.bytes()), "a41fa787c530a6f73c97d143f07a16da1063f1d0a1eb7882388370076834f961");
        assert_eq!(format!("{id:?}"), format!("CardId({})", hex(&id.bytes()[..4])));
    }

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

    #[test]
    fn files_with_a_good_check_line_are_still_looked_at() {
        let checked = |body: &str| format!("{body}sha256 {}\n", hex(&Sha256::digest(body)));
        let decoded = |body: &str| decode(checked(body).as_bytes()).map(|contents| contents.left);
        assert_eq!(decoded("vscard-state 1\ndatabase \ntries-left full\n"), Ok(None));
        assert_eq!(decoded("vscard-state 1\ndatabase /d\ntries-left 15\n"), Ok(Some(15)));
        for bad in [
            "\n",
            "vscard-state 2\ndatabase /d\ntries-left 1\n",
            "vscard-state 1\n",
            "vscard-state 1\ndatabase /d\n",
            "vscard-state 1\ntries-left 1\n",
            "vscard-state 1\ndatabase /d\ntries-left 16\n",
            "vscard-state 1\ndatabase /d\ntries-left -1\n",
            "vscard-state 1\ndatabase /d\ntries-left \n",
            "vscard-state 1\ndatabase /d\ntries-left 1\nmore\n",
            "vscard-state 1\ndatabase /d\ntries-left 1\npin \n",
            "vscard-state 1\ndatabase /d\ntries-left 1\npin $argon2i$v=19$m=8,t=1,p=1$c2FsdHNhbHQ$aGFzaGhhc2g\n",
        ] {
            assert!(decoded(bad).is_err(), "{bad}");
        }
        assert!(decode(&vec![b'a'; 5000]).is_err());
        assert!(decode(b"\xff\nsha256 ").is_err());
    }
}
