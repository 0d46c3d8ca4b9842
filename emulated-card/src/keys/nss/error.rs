use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// Why an NSS database cannot be a card.
///
/// Names from outside are shown quoted and escaped, so that they cannot forge a log line.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The directory name holds a NUL byte.
    #[error("directory {directory:?}: a NUL byte is not possible in a path")]
    Nul {
        /// The directory as it was given.
        directory: String,
    },
    /// An old Berkeley DB database, which is not read.
    #[error(
        "directory {directory:?}: an old dbm database (cert8.db, key3.db); make it an SQL one with `certutil --upgrade-merge`"
    )]
    Legacy {
        /// The directory as it was given.
        directory: String,
    },
    /// There is no such directory.
    #[error("directory {directory:?} does not exist")]
    NoDirectory {
        /// The directory as it was given.
        directory: PathBuf,
    },
    /// It is something else.
    #[error("{directory:?} is not a directory")]
    NotADirectory {
        /// The path as it was given.
        directory: PathBuf,
    },
    /// The directory or one of the database's files cannot be read.
    #[error("{path:?} cannot be read: {source}")]
    Unreadable {
        /// The directory or file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// One of the two files of a database is not there.
    #[error("{file:?} does not exist, so there is no NSS database in that directory")]
    NoFile {
        /// cert9.db or key4.db, with the directory.
        file: PathBuf,
    },
    /// One of the two files is damaged or something else.
    #[error("{file:?} is not an SQLite database")]
    NotSqlite {
        /// cert9.db or key4.db, with the directory.
        file: PathBuf,
    },
    /// libnss3 does not work here.
    #[error("NSS did not start: {reason}")]
    Start {
        /// The NSS error.
        reason: String,
    },
    /// NSS holds as many databases as it can.
    #[error("directory {directory:?}: NSS can open no more databases in one process (its limit is 96)")]
    TooManyDatabases {
        /// The directory.
        directory: PathBuf,
    },
    /// NSS does not take the database, or does not give its objects.
    #[error(
        "NSS refuses the database in {directory:?}: {reason}; it may be damaged, or locked by another program"
    )]
    Refused {
        /// The directory.
        directory: PathBuf,
        /// The NSS error.
        reason: String,
    },
    /// No certificate was asked for.
    #[error("directory {directory:?}: no certificate nickname given")]
    NoNicknames {
        /// The directory as it was given.
        directory: String,
    },
    /// More certificates were asked for than a card holds.
    #[error(
        "directory {directory:?}: {count} certificate nicknames given, at most {} are possible",
        super::MAX_CERTIFICATES
    )]
    TooManyNicknames {
        /// The directory as it was given.
        directory: String,
        /// How many were given.
        count: usize,
    },
    /// One certificate was asked for twice.
    #[error("certificate {nickname:?} is named twice")]
    NicknameTwice {
        /// The nickname.
        nickname: String,
    },
    /// No certificate has that nickname.
    #[error("no certificate {nickname:?} in {directory:?}; there {present}")]
    UnknownNickname {
        /// The nickname.
        nickname: String,
        /// The directory.
        directory: PathBuf,
        /// What is there instead, in words.
        present: String,
    },
    /// There is a certificate, but no key pair for it.
    #[error("certificate {nickname:?} in {directory:?} has no private key in that database")]
    NoPrivateKey {
        /// The nickname.
        nickname: String,
        /// The directory.
        directory: PathBuf,
    },
    /// The certificate cannot be decoded.
    #[error("certificate {nickname:?} in {directory:?} is damaged: {reason}")]
    BadCertificate {
        /// The nickname.
        nickname: String,
        /// The directory.
        directory: PathBuf,
        /// What the decoder said.
        reason: String,
    },
    /// The key pair with the certificate's ID is not its own.
    #[error("the key under the ID of certificate {nickname:?} in {directory:?} is another's")]
    AnothersKey {
        /// The nickname.
        nickname: String,
        /// The directory.
        directory: PathBuf,
    },
    /// The certificate's key is of a kind that is not served.
    #[error(
        "certificate {nickname:?} in {directory:?}: {kind} keys are not served, only RSA, P-256 and P-384"
    )]
    KeyKind {
        /// The nickname.
        nickname: String,
        /// The directory.
        directory: PathBuf,
        /// "RSA-PSS", another curve, or an object identifier.
        kind: String,
    },
    /// The RSA key has a size that is not served.
    #[error(
        "certificate {nickname:?} in {directory:?}: an RSA key of {bits} bits; possible are 1024 to 4096 bits in steps of 8"
    )]
    KeySize {
        /// The nickname.
        nickname: String,
        /// The directory.
        directory: PathBuf,
        /// Length of its modulus in bits.
        bits: usize,
    },
}
