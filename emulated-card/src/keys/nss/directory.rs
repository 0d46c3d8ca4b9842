//! From a directory name to the spec string that opens it.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::OpenError;

/// The first 16 bytes of every SQLite database.
const SQLITE_MAGIC: &[u8; 16] = b"SQLite format 3\0";

/// The canonical path of a database directory, after the checks of which NSS would tell nothing but
/// SEC_ERROR_UNKNOWN_PKCS11_ERROR.
pub(super) fn check(directory: &str) -> Result<PathBuf, OpenError> {
    if directory.contains('\0') {
        return Err(OpenError::Nul { directory: directory.to_owned() });
    }
    let legacy = || OpenError::Legacy { directory: directory.to_owned() };
    if directory.starts_with("dbm:") {
        return Err(legacy());
    }
    let given = Path::new(directory.strip_prefix("sql:").unwrap_or(directory));
    let path = fs::canonicalize(given).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => OpenError::NoDirectory { directory: given.to_owned() },
        io::ErrorKind::NotADirectory => OpenError::NotADirectory { directory: given.to_owned() },
        _ => OpenError::Unreadable { path: given.to_owned(), source },
    })?;
    if !path.is_dir() {
        return Err(OpenError::NotADirectory { directory: given.to_owned() });
    }
    for name in ["cert9.db", "key4.db"] {
        match check_file(path.join(name)) {
            Err(OpenError::NoFile { .. }) if path.join("cert8.db").exists() => return Err(legacy()),
            result => result?,
        }
    }
    Ok(path)
}

fn check_file(file: PathBuf) -> Result<(), OpenError> {
    // Not opened before it is known to be a file: opening a FIFO would block.
    match fs::metadata(&file) {
        Ok(metadata) if metadata.is_file() => {}
        Ok(_) => return Err(OpenError::NotSqlite { file }),
        Err(source) if source.kind() == io::ErrorKind::NotFound => return Err(OpenError::NoFile { file }),
        Err(source) => return Err(OpenError::Unreadable { path: file, source }),
    }
    let mut magic = [0; SQLITE_MAGIC.len()];
    match File::open(&file).and_then(|mut content| content.read_exact(&mut magic)) {
        Ok(()) if magic == *SQLITE_MAGIC => Ok(()),
        Ok(()) => Err(OpenError::NotSqlite { file }),
        Err(source) if source.kind() == io::ErrorKind::UnexpectedEof => Err(OpenError::NotSqlite { file }),
        Err(source) => Err(OpenError::Unreadable { path: file, source }),
    }
}

/// The spec string for `SECMOD_OpenUserDB`; `None` if there is a NUL in the path.
///
/// Within '...' NSS knows two special characters, the quote and the backslash. Unescaped, a path could end
/// its quotes and add parameters of its own.
pub(super) fn spec(directory: &Path) -> Option<CString> {
    /// NSS wants each slot's token description to be unique.
    static NEXT: AtomicU64 = AtomicU64::new(1);

    let mut spec = b"configdir='sql:".to_vec();
    for &byte in directory.as_os_str().as_bytes() {
        if matches!(byte, b'\'' | b'\\') {
            spec.push(b'\\');
        }
        spec.push(byte);
    }
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    // Small tables for sessions and objects, of which a card has a handful: a third less memory.
    let rest = format!("' tokenDescription='card-{number}' flags=readOnly,optimizeSpace");
    spec.extend_from_slice(rest.as_bytes());
    CString::new(spec).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_and_backslashes_are_escaped() {
        let spec = spec(Path::new(r"/a'b\c")).unwrap().into_string().unwrap();
        assert!(spec.starts_with(r"configdir='sql:/a\'b\\c' tokenDescription='card-"), "{spec}");
        assert!(spec.ends_with("' flags=readOnly,optimizeSpace"), "{spec}");
    }

    #[test]
    fn nul_makes_no_spec() {
        assert!(spec(Path::new("/a\0b")).is_none());
    }
}
