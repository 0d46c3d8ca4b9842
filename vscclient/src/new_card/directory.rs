//! A card in a directory: `card.toml`, which says where certificates and keys are, and what lies beside it.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use emulated_card::keys::KeyStore;
use emulated_card::keys::nss::{self, NssDatabase};
use emulated_card::keys::pem::{self, PemSource, PemStore};
use emulated_card::keys::writable::ManagementAlgorithm;
use emulated_card::pin::{SecretFileError, read_secret_file};
use emulated_card::setup::{CardSetup, Keys, Wanted, Written};
use emulated_card::state::{CardClaim, CardId, PlaceError, StateDirectory, StateError, own_path};
use thiserror::Error;
use vscard_protocol::Secret;

use super::card_file::{
    AdminAlgorithm, AdminFile, CardFile, MAX_CARD_FILE, NssFiles, PemFiles, Profile, parse,
};

pub(super) const CARD_FILE: &str = "card.toml";
pub(super) const STATE: &str = "state";

impl From<AdminAlgorithm> for ManagementAlgorithm {
    fn from(algorithm: AdminAlgorithm) -> Self {
        match algorithm {
            AdminAlgorithm::TripleDes => Self::TripleDes,
            AdminAlgorithm::Aes128 => Self::Aes128,
            AdminAlgorithm::Aes192 => Self::Aes192,
            AdminAlgorithm::Aes256 => Self::Aes256,
        }
    }
}

/// Why a directory is no card.
#[derive(Debug, Error)]
pub(crate) enum CardDirectoryError {
    #[error("cannot read {path:?}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("{path:?}: {what}")]
    CardFile { path: PathBuf, what: String },
    /// Who can change the card's files can make it another card, which you take for yours.
    #[error("others could change this card: {0}")]
    Place(#[from] PlaceError),
    #[error(transparent)]
    Pem(#[from] pem::OpenError),
    #[error(transparent)]
    Nss(#[from] nss::OpenError),
    #[error(transparent)]
    Password(#[from] SecretFileError),
    #[error(
        "{0:?} has no administrator: a card that can be written to is made with new-card --admin-key-file"
    )]
    NotWritable(PathBuf),
}

/// A directory made by `vscclient new-card`. It can be moved: nothing in it names its place. A copy is the same card, with
/// the same serial number and PIN tries of its own, so only one of them is to be used.
#[derive(Debug)]
pub(crate) struct CardDirectory {
    path: PathBuf,
    card: CardFile,
}

impl CardDirectory {
    /// Reads `card.toml` in `path`; nothing else is opened yet. Nobody but this user and root can change any of it.
    pub(crate) fn open(path: &Path) -> Result<Self, CardDirectoryError> {
        let path = match own_path(path) {
            Err(PlaceError::Io { path, source }) => return Err(CardDirectoryError::Io { path, source }),
            found => found?,
        };
        let file = path.join(CARD_FILE);
        check_owner(&file)?;
        let text = read(&file).map_err(|source| CardDirectoryError::Io { path: file.clone(), source })?;
        let card = parse(&text).map_err(|what| CardDirectoryError::CardFile { path: file, what })?;
        let directory = Self { path, card };
        directory.card.files().try_for_each(|name| check_owner(&directory.path.join(name)))?;
        Ok(directory)
    }

    /// Where it is, without symbolic links.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Who holds the card.
    pub(crate) fn name(&self) -> &str {
        &self.card.name
    }

    /// The card, to be opened.
    ///
    /// # Errors
    /// [`CardDirectoryError::CardFile`] for a path that NSS does not take.
    pub(crate) fn setup(&self) -> Result<CardSetup, CardDirectoryError> {
        let (keys, names, password_file) = match &self.card.nss {
            Some(NssFiles { database, password_file, certificates }) => (
                Keys::Database(self.database(database)?),
                certificates.clone(),
                Some(self.path.join(password_file)),
            ),
            None => (Keys::Files(self.pem()), Vec::new(), None),
        };
        Ok(CardSetup {
            keys,
            certificates: names.into_iter().map(|name| Wanted { slot: None, name }).collect(),
            profile: match self.card.profile {
                Profile::Piv => emulated_card::card::Profile::Piv,
                Profile::Cac => emulated_card::card::Profile::Cac,
                Profile::Dual => emulated_card::card::Profile::Dual,
            },
            password_file,
            state: Some((self.state(), CARD_FILE.into())),
            written: self
                .card
                .admin
                .as_ref()
                .map(|_| Written { directory: self.written(), management: None }),
            ..CardSetup::default()
        })
    }

    /// The card, to be opened and written to.
    pub(crate) fn writable(&self) -> Result<CardSetup, CardDirectoryError> {
        let Some(AdminFile { key, algorithm }) = &self.card.admin else {
            return Err(CardDirectoryError::NotWritable(self.path.clone()));
        };
        let management = Some((self.path.join(key), (*algorithm).into()));
        let written = Some(Written { directory: self.written(), management });
        Ok(CardSetup { written, ..self.setup()? })
    }

    fn database(&self, name: &str) -> Result<String, CardDirectoryError> {
        let path = self.path.join(name);
        match path.to_str() {
            Some(text) => Ok(text.to_owned()),
            None => Err(CardDirectoryError::CardFile {
                path,
                what: "is no UTF-8 text, which NSS needs of a path".into(),
            }),
        }
    }

    fn written(&self) -> StateDirectory {
        StateDirectory::at(self.path.join("written"))
    }

    fn pem(&self) -> Vec<PemSource> {
        let source = |PemFiles { certificate, key }: &PemFiles| PemSource::Pem {
            certificate: self.path.join(certificate),
            key: self.path.join(key),
        };
        self.card.pem.iter().map(source).collect()
    }

    /// Opens the keys; the secret is what unlocks them.
    pub(crate) fn open_keys(&self) -> Result<(Box<dyn KeyStore>, Secret), CardDirectoryError> {
        if let Some(NssFiles { database, password_file, certificates }) = &self.card.nss {
            let password = read_secret_file(&self.path.join(password_file))?;
            let database = self.database(database)?;
            return Ok((Box::new(NssDatabase::open(&database, certificates)?), password));
        }
        let store = PemStore::open(&self.pem(), None)?;
        Ok((Box::new(store), Secret::default()))
    }

    /// Where the card keeps its PIN and its counters.
    pub(crate) fn state(&self) -> StateDirectory {
        StateDirectory::at(self.path.join(STATE))
    }

    /// Claims the card whose identity comes from its keys.
    pub(crate) fn claim(&self, id: &CardId) -> Result<CardClaim, StateError> {
        // One directory, one card: its path would only hinder that it is moved.
        self.state().claim(Path::new(CARD_FILE), id)
    }
}

/// Whether nobody else can change a file, or a directory and what is in it. What is not there is missed by whoever
/// opens it.
fn check_owner(path: &Path) -> Result<(), PlaceError> {
    let Some(found) = own_if_there(path)? else { return Ok(()) };
    let fail = |source| PlaceError::Io { path: found.clone(), source };
    if fs::metadata(&found).map_err(fail)?.is_dir() {
        for entry in fs::read_dir(&found).map_err(fail)? {
            own_if_there(&entry.map_err(fail)?.path())?;
        }
    }
    Ok(())
}

fn own_if_there(path: &Path) -> Result<Option<PathBuf>, PlaceError> {
    match own_path(path) {
        Err(PlaceError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        found => found.map(Some),
    }
}

fn read(file: &Path) -> io::Result<String> {
    // Not opened before it is known to be a file: opening a FIFO would block.
    if !fs::metadata(file)?.is_file() {
        return Err(io::Error::other("is not a regular file"));
    }
    let mut text = String::new();
    File::open(file)?.take(MAX_CARD_FILE + 1).read_to_string(&mut text)?;
    Ok(text)
}
