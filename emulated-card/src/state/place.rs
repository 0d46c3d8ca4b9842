//! Who can change a file or directory, or put another in its place.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use thiserror::Error;

const ROOT: u32 = 0;
/// In a directory with this bit nobody but its owner renames or removes what belongs to others (inode(7)).
const STICKY: u32 = 0o1000;

/// Why a path is not this user's alone.
#[derive(Debug, Error)]
pub enum PlaceError {
    /// Another user could change what is there.
    #[error("{} {what}", path.display())]
    OpenToOthers {
        /// The file or directory: the one asked about, or one on the way to it.
        path: PathBuf,
        /// What lets others in.
        what: &'static str,
    },
    /// The system refused.
    #[error("cannot look at {}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// What lets others than `owners` change this file or directory, if anything does.
pub(super) fn open_to_others(metadata: &Metadata, owners: &[u32]) -> Option<&'static str> {
    if !owners.contains(&metadata.uid()) {
        Some("belongs to another user")
    } else if metadata.mode() & 0o022 != 0 {
        Some("can be written to by others: take that away with chmod go-w")
    } else {
        None
    }
}

/// Returns the path without symbolic links, after a look at the file or directory itself and at each directory above:
/// nobody but this user and root can change it, or put another in its place. A directory above may be everybody's if
/// it is sticky, as `/tmp` is.
///
/// # Errors
/// [`PlaceError`].
pub fn own_path(path: &Path) -> Result<PathBuf, PlaceError> {
    let found = canonical(path)?;
    check(found.ancestors(), &found)?;
    Ok(found)
}

/// The same for what is yet to be made at `path`, about the directories above it.
///
/// # Errors
/// [`PlaceError`].
pub fn own_new_path(path: &Path) -> Result<PathBuf, PlaceError> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return own_path(path) };
    let parent = canonical(if parent.as_os_str().is_empty() { Path::new(".") } else { parent })?;
    let new = parent.join(name);
    check(parent.ancestors(), &new)?;
    Ok(new)
}

fn canonical(path: &Path) -> Result<PathBuf, PlaceError> {
    std::fs::canonicalize(path).map_err(|source| PlaceError::Io { path: path.to_owned(), source })
}

/// Looks at all of these, of which only what is not asked about itself may be everybody's.
fn check<'a>(parts: impl Iterator<Item = &'a Path>, asked: &Path) -> Result<(), PlaceError> {
    let user = rustix::process::geteuid().as_raw();
    let unknown_root = unknown_root().unwrap_or(ROOT);
    for part in parts {
        // What is asked about belongs to somebody who is known.
        let owners = [user, ROOT, if part == asked { ROOT } else { unknown_root }];
        let metadata = std::fs::symlink_metadata(part)
            .map_err(|source| PlaceError::Io { path: part.to_owned(), source })?;
        let is_shared = part != asked && metadata.mode() & STICKY != 0 && owners.contains(&metadata.uid());
        match open_to_others(&metadata, &owners) {
            Some(what) if !is_shared => {
                return Err(PlaceError::OpenToOthers { path: part.to_owned(), what });
            }
            _ => {}
        }
    }
    Ok(())
}

/// Whom the files of root, and of every other user that is not known there, seem to belong to in a user namespace of
/// some users only (user_namespaces(7)). `None` outside of one.
fn unknown_root() -> Option<u32> {
    let map = std::fs::read_to_string("/proc/self/uid_map").ok()?;
    if map.split_whitespace().eq(["0", "0", "4294967295"]) {
        return None;
    }
    std::fs::read_to_string("/proc/sys/kernel/overflowuid").ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn refused(path: &Path) -> (PathBuf, &'static str) {
        match own_path(path) {
            Err(PlaceError::OpenToOthers { path, what }) => (path, what),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn who_can_write_anywhere_on_the_way_can_put_another_there() {
        let top = tempfile::tempdir().unwrap();
        let top = fs::canonicalize(top.path()).unwrap();
        let (way, card) = (top.join("way"), top.join("way/card"));
        fs::create_dir_all(&card).unwrap();
        fs::write(card.join("key"), "").unwrap();
        symlink("way/card", top.join("link")).unwrap();
        for (open, asked) in
            [(&way, &card), (&card, &card), (&card, &card.join("key")), (&way, &top.join("link"))]
        {
            assert!(own_path(asked).unwrap().starts_with(&card));
            for mode in [0o777, 0o770, 0o702] {
                fs::set_permissions(open, Permissions::from_mode(mode)).unwrap();
                let (path, what) = refused(asked);
                assert_eq!(&path, open, "mode {mode:o}");
                assert!(what.contains("can be written to by others"), "{what}");
            }
            fs::set_permissions(open, Permissions::from_mode(0o700)).unwrap();
        }
        // Entries of a sticky directory stay, but what is put into it is anybody's.
        fs::set_permissions(&way, Permissions::from_mode(0o1777)).unwrap();
        own_path(&card).unwrap();
        assert_eq!(own_new_path(&top.join("link/../new")).unwrap(), way.join("new"));
        assert_eq!(refused(&way).0, way);
        fs::set_permissions(&way, Permissions::from_mode(0o770)).unwrap();
        assert!(
            matches!(own_new_path(&way.join("new")), Err(PlaceError::OpenToOthers { path, .. }) if path == way)
        );
    }

    /// Giving files away takes root.
    #[test]
    fn who_owns_a_directory_on_the_way_can_put_another_there() {
        if !rustix::process::geteuid().is_root() {
            let of_root = fs::canonicalize("/usr").unwrap();
            assert_eq!(own_path(&of_root).unwrap(), of_root);
            return;
        }
        let top = tempfile::tempdir().unwrap();
        let top = fs::canonicalize(top.path()).unwrap();
        let (way, card) = (top.join("way"), top.join("way/card"));
        fs::create_dir_all(&card).unwrap();
        // A sticky directory is its owner's all the same.
        for mode in [0o700, 0o1777] {
            std::os::unix::fs::chown(&way, Some(1234), None).unwrap();
            fs::set_permissions(&way, Permissions::from_mode(mode)).unwrap();
            assert_eq!(refused(&card), (way.clone(), "belongs to another user"));
        }
        std::os::unix::fs::chown(&way, Some(0), None).unwrap();
        own_path(&card).unwrap();
    }
}
