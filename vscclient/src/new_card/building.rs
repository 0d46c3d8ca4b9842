//! A card that is being made: out of sight until it is whole.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use emulated_card::state::{self, PlaceError, own_new_path, own_path};
use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::directory::{CARD_FILE, STATE};
use super::{NewCardError, make_directory};

/// What its name begins with.
pub(super) const PREFIX: &str = ".new-card-";

/// A directory in the card's own, which another maker of a card there has not. It is inside and not beside, so that the
/// card's directory can be a mount point, the working directory of a shell, or in a directory nobody may write to.
/// Dropping it removes it, and nothing else: what was put beside it is not ours.
pub(super) struct Building {
    card: PathBuf,
    made: bool,
    path: PathBuf,
    /// A lock, where the file system has such.
    _in_use: Option<File>,
}

impl Building {
    /// Makes the card's directory, which may be there if nothing is in it, nobody else's.
    ///
    /// Who could write to a directory above could put another one in its place, and so have root make files anywhere.
    pub(super) fn begin(card: &Path) -> Result<Self, NewCardError> {
        let fail = |source| NewCardError::Io { path: card.to_owned(), source };
        let (card, made) = match own_path(card) {
            Ok(found) => {
                check_empty(&found)?;
                // Others may not so much as list it. It is not done before it is known to be ours.
                fs::set_permissions(&found, Permissions::from_mode(0o700)).map_err(fail)?;
                (found, false)
            }
            Err(PlaceError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                let card = own_new_path(card)?;
                DirBuilder::new().mode(0o700).create(&card).map_err(fail)?;
                (card, true)
            }
            Err(error) => return Err(error.into()),
        };
        let card = card.as_path();
        let mut random = [0; 8];
        openssl::rand::rand_bytes(&mut random)?;
        let path = card.join(format!("{PREFIX}{:016x}", u64::from_be_bytes(random)));
        let building = Self { card: card.to_owned(), made, path, _in_use: tidy(card) };
        make_directory(&building.path)?;
        Ok(building)
    }

    /// Where the card's files are to be made.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Gives the card its place. After `Ok` it survives a power cut, unless the user is told otherwise.
    pub(super) fn finish(self) -> Result<(), NewCardError> {
        let fail = |source| NewCardError::Io { path: self.card.clone(), source };
        sync(&self.path).map_err(fail)?;
        check_empty(&self.card)?;
        let entries = fs::read_dir(&self.path)
            .and_then(|entries| entries.map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<_>>>());
        let mut names = entries.map_err(fail)?;
        // Of two cards made at once, one comes first: a directory takes the place of none that has files in it. And
        // where `card.toml` is, the rest is.
        names.sort_by_key(|name| {
            if name == STATE {
                0
            } else if name == CARD_FILE {
                2
            } else {
                1
            }
        });
        for (at, name) in names.iter().enumerate() {
            if let Err(error) = fs::rename(self.path.join(name), self.card.join(name)) {
                for name in names[..at].iter().rev() {
                    let _ = fs::rename(self.card.join(name), self.path.join(name));
                }
                return Err(match error.kind() {
                    io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists => {
                        NewCardError::NotEmpty(self.card.clone())
                    }
                    _ => fail(error),
                });
            }
        }
        if let Err(error) = self.sync_place() {
            // The card is there, whatever becomes of it in a power cut.
            let _ = writeln!(
                io::stderr(),
                "vscclient: {}: {error}; a power cut may take the card",
                self.card.display()
            );
        }
        Ok(())
    }

    fn sync_place(&self) -> io::Result<()> {
        sync_directory(&self.card)?;
        match self.card.parent() {
            Some(parent) if self.made => sync_directory(parent),
            _ => Ok(()),
        }
    }
}

impl Drop for Building {
    fn drop(&mut self) {
        // What cannot be removed is left: why no card was made is of more interest.
        let _ = fs::remove_dir_all(&self.path);
        if self.made {
            // Not while it holds the card, or what is not ours.
            let _ = fs::remove_dir(&self.card);
        }
    }
}

/// What a killed maker of a card left behind, or another one is working in, makes the directory no less empty.
fn check_empty(card: &Path) -> Result<(), NewCardError> {
    let fail = |source| NewCardError::Io { path: card.to_owned(), source };
    for entry in fs::read_dir(card).map_err(fail)? {
        if !is_building(&entry.map_err(fail)?.file_name()) {
            return Err(NewCardError::NotEmpty(card.to_owned()));
        }
    }
    Ok(())
}

/// Removes what killed makers of a card left behind, private keys among it, unless one that is alive works there: each
/// has a shared lock on the card's directory, this one's being returned.
fn tidy(card: &Path) -> Option<File> {
    let directory = File::open(card).ok()?;
    let lock = |operation| rustix::fs::flock(&directory, operation);
    if lock(FlockOperation::NonBlockingLockExclusive).is_ok() {
        for entry in fs::read_dir(card).into_iter().flatten().flatten() {
            if is_building(&entry.file_name()) {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }
    // Who tidies up is soon done; a lock that stays is of whoever started this program, and as good.
    for _ in 0..100 {
        match lock(FlockOperation::NonBlockingLockShared) {
            Ok(()) => return Some(directory),
            Err(Errno::WOULDBLOCK) => thread::sleep(Duration::from_millis(10)),
            Err(_) => break,
        }
    }
    None
}

fn is_building(name: &OsStr) -> bool {
    name.as_bytes().starts_with(PREFIX.as_bytes())
}

/// NSS's tools do not do so with all they write.
fn sync(path: &Path) -> io::Result<()> {
    if !fs::symlink_metadata(path)?.is_dir() {
        return File::open(path)?.sync_all();
    }
    for entry in fs::read_dir(path)? {
        sync(&entry?.path())?;
    }
    sync_directory(path)
}

fn sync_directory(path: &Path) -> io::Result<()> {
    match File::open(path) {
        // One that can be searched and not read cannot be opened.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        directory => state::sync_directory(&directory?),
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_card_can_be_made_on_a_file_system_that_does_not_synchronise_directories() {
        let directory = Path::new("/proc");
        assert!(File::open(directory).unwrap().sync_all().is_err());
        sync_directory(directory).unwrap();
    }
}
