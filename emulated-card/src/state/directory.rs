//! The files of the state directory, and locks on them.

use std::fs::{DirBuilder, File};
use std::io::{self, Write as _};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use super::StateError;
use super::format::MAX_FILE;
use super::place::open_to_others;

/// The state directory, open: what is done in one VERIFY is done in one directory, even if it is moved meanwhile.
pub(super) struct Directory {
    pub(super) file: File,
    pub(super) path: PathBuf,
}

impl Directory {
    /// Opens a file that is a plain one, ours, and not open to others' writing.
    pub(super) fn open_file(
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
            Err(Errno::ISDIR) => return Err(refused("is not a regular file")),
            Err(errno) => return Err(self.io_error(name, "open", errno.into())),
        };
        let metadata = file.metadata().map_err(|source| self.io_error(name, "look at", source))?;
        if !metadata.is_file() {
            return Err(refused("is not a regular file"));
        }
        if let Some(what) = open_to_others(&metadata, &[rustix::process::geteuid().as_raw()]) {
            return Err(refused(what));
        }
        if metadata.len() > MAX_FILE {
            return Err(refused("is too long"));
        }
        Ok(file)
    }

    pub(super) fn open_lock_file(&self, name: &str, access: OFlags) -> Result<File, StateError> {
        // NFS wants write access for an exclusive lock.
        let flags = access | OFlags::CREATE | OFlags::NONBLOCK | OFlags::NOCTTY;
        self.open_file(name, flags, |path, what| StateError::LockFile { path, what })
    }

    /// Replaces a file, through another one: one name for that is enough, as there is one writer at a time, and what a
    /// killed process left is reused. After `Ok` the new contents survive a power cut; after an error the file is as
    /// before, or (when only the last step failed) as wanted but not yet certain to survive.
    pub(super) fn replace(&self, name: &str, temporary: &str, bytes: &[u8]) -> Result<(), StateError> {
        let fail = |what, source: io::Error| self.io_error(name, what, source);
        let at = &self.file;
        match rustix::fs::unlinkat(at, temporary, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(errno) => return Err(self.io_error(temporary, "remove", errno.into())),
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut file = rustix::fs::openat(at, temporary, flags, Mode::RUSR | Mode::WUSR)
            .map(File::from)
            .map_err(|errno| fail("replace", errno.into()))?;
        let written = file
            .write_all(bytes)
            .and_then(|()| file.sync_all())
            .and_then(|()| Ok(rustix::fs::renameat(at, temporary, at, name)?));
        if let Err(source) = written {
            // What is left of it does no harm.
            let _ = rustix::fs::unlinkat(at, temporary, AtFlags::empty());
            return Err(fail("write", source));
        }
        sync_directory(at).map_err(|source| fail("write (directory)", source))
    }

    /// Whether there is something of that name.
    pub(super) fn has(&self, name: &str) -> Result<bool, StateError> {
        match rustix::fs::statat(&self.file, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(errno) => Err(self.io_error(name, "look at", errno.into())),
        }
    }

    /// Renames a file, for good.
    pub(super) fn rename(&self, name: &str, new: &str) -> Result<(), StateError> {
        let renamed = rustix::fs::renameat(&self.file, name, &self.file, new);
        renamed
            .map_err(io::Error::from)
            .and_then(|()| sync_directory(&self.file))
            .map_err(|source| self.io_error(name, "rename", source))
    }

    pub(super) fn io_error(&self, name: &str, what: &'static str, source: io::Error) -> StateError {
        StateError::Io { path: self.path.join(name), what, source }
    }
}

/// An exclusive lock. It belongs to the open file, so that it excludes other threads as it does other processes.
#[derive(Debug)]
pub(super) struct FileLock(pub(super) File);

impl Drop for FileLock {
    fn drop(&mut self) {
        // Closing is not enough: a child between fork and exec shares the open file, and with it the lock.
        let _ = rustix::fs::flock(&self.0, FlockOperation::Unlock);
    }
}

/// Takes the exclusive lock, unless another has it.
pub(super) fn try_lock(file: &File) -> io::Result<bool> {
    loop {
        match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(true),
            Err(Errno::INTR) => {}
            Err(Errno::WOULDBLOCK) => return Ok(false),
            Err(errno) => return Err(errno.into()),
        }
    }
}

pub(super) fn make_directory(path: &Path) -> io::Result<()> {
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
    match parent.map_or(Ok(()), |parent| sync_directory(&File::open(parent)?)) {
        // One that can be searched and not read cannot be opened; it was there before us.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        other => other,
    }
}

/// Makes what was renamed or made in a directory survive a power cut, as far as its file system has that: some (FUSE, 9p,
/// CIFS) say that a directory cannot be synchronised, and a card on them is not to be without a PIN for it.
///
/// # Errors
/// The disk fails.
pub fn sync_directory(directory: &File) -> io::Result<()> {
    match directory.sync_all() {
        Err(error) if is_unsupported(&error) => Ok(()),
        other => other,
    }
}

fn is_unsupported(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw_os_error);
    [Errno::INVAL, Errno::NOTSUP, Errno::OPNOTSUPP].map(Some).contains(&errno)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_os = "linux")]
    #[test]
    fn a_file_system_that_does_not_synchronise_directories_is_no_failure() {
        let proc = File::open("/proc").unwrap();
        assert!(proc.sync_all().is_err());
        sync_directory(&proc).unwrap();
    }

    #[test]
    fn a_disk_that_fails_is_a_failure() {
        for errno in [Errno::IO, Errno::NOSPC, Errno::DQUOT, Errno::ROFS, Errno::BADF] {
            assert!(!is_unsupported(&errno.into()), "{errno}");
        }
    }
}
