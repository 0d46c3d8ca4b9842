use std::path::PathBuf;

use thiserror::Error;

use crate::pin::SecretFileError;

/// Why files with keys and certificates cannot be a card.
///
/// Messages name the file and never what is in it. Names from outside are shown quoted and escaped, so that they
/// cannot forge a log line.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OpenError {
    /// No file was given.
    #[error("no file with a key and certificate is given")]
    NoSources,
    /// More were given than a card holds.
    #[error("{count} keys are given, at most {} are possible", super::MAX_CERTIFICATES)]
    TooManySources {
        /// How many were given.
        count: usize,
    },
    /// An option's text does not name one or two files.
    #[error("{0:?} is not CERTIFICATE,KEY or one file with both (a comma in a name is doubled)")]
    Option(String),
    /// The file cannot be read, or holds a key and is not its owner's alone.
    #[error(transparent)]
    File(#[from] SecretFileError),
    /// The file cannot be what was asked for.
    #[error("{path:?} {what}")]
    Contents {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The key is encrypted, and no password was given.
    #[error("{path:?} is encrypted: its password is needed")]
    PasswordNeeded {
        /// The file.
        path: PathBuf,
    },
    /// The password does not open the file.
    #[error("{path:?}: wrong password (or the file is damaged)")]
    WrongPassword {
        /// The file.
        path: PathBuf,
    },
    /// The key of the certificate is of a kind or size that no card has.
    #[error("the certificate in {path:?}: {reason}")]
    Unfit {
        /// The file with the certificate.
        path: PathBuf,
        /// Which kind or size.
        reason: String,
    },
    /// The key is another certificate's.
    #[error("the private key in {key:?} is not that of the certificate in {certificate:?}")]
    Mismatch {
        /// The file with the certificate.
        certificate: PathBuf,
        /// The file with the key.
        key: PathBuf,
    },
    /// Two certificates for one key, or one certificate twice.
    #[error("{first:?} and {second:?} hold the same key")]
    KeyTwice {
        /// The earlier file.
        first: PathBuf,
        /// The later one.
        second: PathBuf,
    },
}
