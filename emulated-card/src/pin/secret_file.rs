//! Where a PIN, PUK or password is read from.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
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
    /// A directory, a device, a FIFO that is not an inherited descriptor.
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

/// Where systemd puts the credentials of a service (systemd.exec(5), LoadCredential=).
const CREDENTIALS_DIRECTORY: &str = "CREDENTIALS_DIRECTORY";

/// Reads a PIN, PUK or password: one line of up to 1 KiB, its end stripped.
///
/// `path` is a file that is its owner's alone; or `fd:N` or `/dev/fd/N`, an inherited descriptor, which whoever
/// started this process vouches for. That may be a pipe: it is read once, until its other end is closed, and this
/// blocks until then. A file in `$CREDENTIALS_DIRECTORY` may be readable by its group, which is how an access control
/// list for the service's user shows.
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

/// Reads a file, as [`read_secret_file`] takes it, up to the end or one byte more than `max`, which tells the caller
/// that it is too long.
pub(crate) fn read_file(
    path: &Path,
    max: usize,
    access: Access,
) -> Result<Zeroizing<Vec<u8>>, SecretFileError> {
    let io_error = |source| SecretFileError::Io { path: path.to_owned(), source };
    let descriptor = descriptor(path);
    let opened = descriptor.as_deref().unwrap_or(path);
    // Without NONBLOCK, a FIFO would hang the open. What is checked is what was opened.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = rustix::fs::open(opened, flags, Mode::empty()).map(File::from);
    let mut file = file.map_err(|errno| io_error(errno.into()))?;
    let metadata = file.metadata().map_err(io_error)?;
    if descriptor.is_some() && metadata.file_type().is_fifo() {
        // What writes into it may not have begun yet.
        rustix::fs::fcntl_setfl(&file, OFlags::empty()).map_err(|errno| io_error(errno.into()))?;
    } else if !metadata.is_file() {
        return Err(SecretFileError::NotRegular { path: path.to_owned() });
    }
    if descriptor.is_none() && access == Access::OwnersAlone {
        let credentials = std::env::var_os(CREDENTIALS_DIRECTORY).map(PathBuf::from);
        let is_credential = credentials
            .is_some_and(|directory| directory.is_absolute() && path.parent() == Some(directory.as_path()));
        let closed_to = if is_credential { 0o037 } else { 0o077 };
        let (owner, mode) = (metadata.uid(), metadata.mode() & 0o777);
        if owner != 0 && owner != rustix::process::geteuid().as_raw() {
            return Err(SecretFileError::OfAnother { path: path.to_owned(), owner });
        }
        if mode & closed_to != 0 {
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

/// The name by which an inherited descriptor is opened, if `path` means one. That is another opening of the same
/// pipe or file, from its beginning.
fn descriptor(path: &Path) -> Option<PathBuf> {
    let path = path.to_str()?;
    let number = path.strip_prefix("fd:").or_else(|| path.strip_prefix("/dev/fd/"))?;
    let number: u32 = number.parse().ok().filter(|_| number.bytes().all(|byte| byte.is_ascii_digit()))?;
    Some(format!("/dev/fd/{number}").into())
}
