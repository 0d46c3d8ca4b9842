//! Files with a PIN, PUK or password.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use thiserror::Error;
use vscard_protocol::Secret;
use zeroize::Zeroizing;

/// Longest `--pin-file` or `--password-file`.
const MAX_SECRET_FILE: usize = 1024;

/// Why a file with a PIN or password was not taken.
#[derive(Debug, Error)]
pub enum SecretFileError {
    /// The system refused.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A directory, a FIFO, a device.
    #[error("{} is not a regular file", path.display())]
    NotRegular {
        /// The file.
        path: PathBuf,
    },
    /// Group or world may read or write it.
    #[error("{0} is open to others (mode {mode:03o}); make it yours alone with: chmod 600 {0}", path.display())]
    OpenToOthers {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Another user, who could change it, owns it.
    #[error("{} belongs to user id {owner}, not to you or root", path.display())]
    OfAnother {
        /// The file.
        path: PathBuf,
        /// Its owner.
        owner: u32,
    },
    /// What is in it is not one secret.
    #[error("{} {what}", path.display())]
    Contents {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
}

/// Reads a PIN or password from a file that is its owner's alone: one line of up to 1 KiB, its end stripped.
///
/// # Errors
/// [`SecretFileError`].
pub fn read_secret_file(path: &Path) -> Result<Secret, SecretFileError> {
    let bytes = read_file(path, MAX_SECRET_FILE, Access::OwnersAlone)?;
    let refused = |what| Err(SecretFileError::Contents { path: path.to_owned(), what });
    if bytes.len() > MAX_SECRET_FILE {
        return refused("is longer than 1 KiB");
    }
    let line = &bytes[..];
    let line = line.strip_suffix(b"\n").map_or(line, |line| line.strip_suffix(b"\r").unwrap_or(line));
    if line.is_empty() {
        refused("is empty")
    } else if line.contains(&0) {
        refused("contains a NUL byte")
    } else if line.iter().any(|byte| matches!(byte, b'\n' | b'\r')) {
        refused("has more than one line")
    } else {
        Ok(Secret::from(line))
    }
}

/// Who may have access to a file that is read.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    #[cfg_attr(not(feature = "pem"), expect(dead_code, reason = "certificates in files"))]
    Anyone,
    OwnersAlone,
}

/// Reads a regular file up to the end or one byte more than `max`, which tells the caller that it is too long.
pub(crate) fn read_file(
    path: &Path,
    max: usize,
    access: Access,
) -> Result<Zeroizing<Vec<u8>>, SecretFileError> {
    let io_error = |source| SecretFileError::Io { path: path.to_owned(), source };
    // Without NONBLOCK, a FIFO would hang the open. What is checked is what was opened.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = rustix::fs::open(path, flags, Mode::empty()).map(File::from);
    let mut file = file.map_err(|errno| io_error(errno.into()))?;
    let metadata = file.metadata().map_err(io_error)?;
    if !metadata.is_file() {
        return Err(SecretFileError::NotRegular { path: path.to_owned() });
    }
    if access == Access::OwnersAlone {
        let owner = metadata.uid();
        if owner != 0 && owner != rustix::process::geteuid().as_raw() {
            return Err(SecretFileError::OfAnother { path: path.to_owned(), owner });
        }
        if metadata.mode() & 0o077 != 0 {
            let mode = metadata.mode() & 0o777;
            return Err(SecretFileError::OpenToOthers { path: path.to_owned(), mode });
        }
    }
    // All the room at once: a Vec that grows leaves copies behind.
    let mut bytes = Zeroizing::new(vec![0; max + 1]);
    let mut filled = 0;
    while filled < bytes.len() {
        match file.read(&mut bytes[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(io_error(error)),
        }
    }
    bytes.truncate(filled);
    Ok(bytes)
}
