//! A card of certificates in an NSS database, with all that is around it: its PIN, its state on disk, its identity.
//!
//! What the programs' options ask for becomes a [`CertificateCard`], which opens the card or says why not.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::card::{CardBuildError, CardOptions, EmulatedCard, Profile};
use crate::keys::nss::{NssDatabase, OpenError};
use crate::keys::{KeyStore, UnlockError};
use crate::pin::{self, CardPinError, DEFAULT_TRIES, Initial, ReferenceData, SecretFileError};
use crate::shell::CardSlot;
use crate::slot;
use crate::state::{CardClaim, CardId, StateDirectory, StateError};
use thiserror::Error;
use vscard_protocol::Secret;

/// Which card is wanted, and what PIN it has.
#[derive(Clone, Debug, Default)]
pub struct CertificateCard {
    /// Directory of the NSS database, with or without `sql:`.
    pub db: String,
    /// Nicknames of 1 to 10 certificates.
    pub certificates: Vec<String>,
    /// Tells cards with the same certificates apart.
    pub card_name: String,
    /// File with the PIN that a new card gets for its own; without one the PIN is the database's password.
    pub pin_file: Option<PathBuf>,
    /// File with the database's password, for a card with a PIN of its own or none.
    pub password_file: Option<PathBuf>,
    /// Any PIN is right.
    pub no_pin: bool,
    /// A verified PIN is forgotten after this much idle time.
    pub forget_pin: Option<Duration>,
    /// What stands before an option's name where the user writes it: `--` or nothing.
    pub prefix: &'static str,
}

/// A card, not inserted yet, and its claim on its identity, which it keeps as long as this lives.
pub struct OpenCard {
    /// The card.
    pub slot: Arc<CardSlot>,
    _claim: CardClaim,
}

/// Why there is no card. The messages name the option, file or directory.
#[derive(Debug, Error)]
pub enum SetupError {
    /// The database or a certificate in it is not usable.
    #[error(transparent)]
    Database(#[from] OpenError),
    /// The state on disk is not usable, or the card is open elsewhere.
    #[error(transparent)]
    State(#[from] StateError),
    /// The certificates do not make a card.
    #[error(transparent)]
    Card(#[from] CardBuildError),
    /// A file with a PIN or password was not taken.
    #[error("{option}: {source}")]
    SecretFile {
        /// The option that names it.
        option: String,
        /// What is wrong with it.
        source: SecretFileError,
    },
    /// The PIN in a file cannot be a card's own.
    #[error("{option} {}: {source}", file.display())]
    Pin {
        /// The option that names the file.
        option: String,
        /// The file.
        file: PathBuf,
        /// What is wrong with the PIN.
        source: CardPinError,
    },
    /// Neither the database nor the card would have a PIN.
    #[error(
        "the database {} has no password, so anyone in the guest could use its keys: give the card a PIN of its \
         own with {prefix}pin-file, or say {prefix}no-pin",
        database.display()
    )]
    NoPassword {
        /// The database.
        database: PathBuf,
        /// As in [`CertificateCard::prefix`].
        prefix: &'static str,
    },
    /// The database has a password that the PIN is not.
    #[error(
        "the database {} has a password, which a card with {card} needs: name a file with it in \
         {prefix}password-file",
        database.display()
    )]
    PasswordNeeded {
        /// The database.
        database: PathBuf,
        /// What makes it necessary.
        card: String,
        /// As in [`CertificateCard::prefix`].
        prefix: &'static str,
    },
    /// A password that nothing would use.
    #[error(
        "{0}password-file goes with {0}pin-file or {0}no-pin; without them the PIN is the database's password"
    )]
    PasswordUnused(&'static str),
    /// The database does not take the password.
    #[error("{option} {}: {source} (database {})", file.display(), database.display())]
    WrongPassword {
        /// The option that names the file.
        option: String,
        /// The file.
        file: PathBuf,
        /// The database.
        database: PathBuf,
        /// What the database says.
        source: UnlockError,
    },
    /// No counter is on disk.
    #[error(
        "no PIN of {} has been tried, so none is blocked; if a card has a PIN of its own, name all its \
         certificates with --cert, and its --card-name",
        .0.display()
    )]
    NothingToUnlock(PathBuf),
    /// The database's directory cannot be found.
    #[error("the database {}: {source}", database.display())]
    NoDatabase {
        /// What was given.
        database: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The card's thread cannot be started.
    #[error("the system gives no thread for the card: {0}")]
    Thread(std::io::Error),
}

impl CertificateCard {
    /// Opens the database, claims the card's identity and makes the card.
    ///
    /// # Errors
    /// [`SetupError`]; there is never a smaller card than the one asked for.
    pub fn open(&self) -> Result<OpenCard, SetupError> {
        let store = NssDatabase::open(&self.db, &self.certificates)?;
        let database = store.path().to_owned();
        let id = CardId::derive(store.certificates(), &self.card_name);
        let directory = StateDirectory::of_user()?;
        let claim = directory.claim(&database, &id)?;
        let id = claim.id().clone();
        let reference = self.reference_data(&store, &database, &directory, &claim)?;
        for certificate in store.certificates() {
            tracing::debug!("certificate {:?}, {}", certificate.name, certificate.kind);
        }
        // Known now rather than when the user wonders why no PIN is right.
        match reference.tries_left() {
            Ok(0) => tracing::warn!("the PIN is blocked; `vscclient unlock` gives it its tries back"),
            Ok(_) => {}
            Err(error) => tracing::warn!("every PIN will be refused: {error}"),
        }
        let random = Box::new(|bytes: &mut [u8]| {
            if let Err(error) = getrandom::fill(bytes) {
                // Without randomness a challenge of zeros would be a lie.
                tracing::error!("the system gives no random numbers: {error}");
                std::process::abort();
            }
        });
        let slots = slot::assign(store.certificates(), &[]).map_err(CardBuildError::from)?;
        let options = CardOptions { profile: Profile::Cac, slots };
        let card = EmulatedCard::new(Arc::new(store), Arc::new(reference), id, options, random)?;
        let slot = CardSlot::new(card).map_err(SetupError::Thread)?;
        slot.forget_pin(self.forget_pin);
        Ok(OpenCard { slot: Arc::new(slot), _claim: claim })
    }

    /// Gives the PIN all its tries back, even while the card is open; says what was done. With certificates
    /// named, that of the card if it has a PIN of its own; else that of the database.
    ///
    /// # Errors
    /// [`SetupError::NothingToUnlock`], or state that cannot be read or written.
    pub fn unlock(&self) -> Result<String, SetupError> {
        let directory = StateDirectory::of_user()?;
        let path = self.db.strip_prefix("sql:").unwrap_or(&self.db);
        let database = std::fs::canonicalize(path)
            .map_err(|source| SetupError::NoDatabase { database: path.into(), source })?;
        if !self.certificates.is_empty() {
            let store = NssDatabase::open(&self.db, &self.certificates)?;
            let id = CardId::derive(store.certificates(), &self.card_name);
            if ReferenceData::reset_card_tries(&directory, &database, &id)? {
                return Ok(format!("the card's own PIN has {DEFAULT_TRIES} tries again"));
            }
        }
        if !ReferenceData::of_database(&directory, &database, DEFAULT_TRIES).reset_tries()? {
            return Err(SetupError::NothingToUnlock(database));
        }
        Ok(format!("the PIN of {} has {DEFAULT_TRIES} tries again", database.display()))
    }

    fn reference_data(
        &self,
        store: &NssDatabase,
        database: &Path,
        directory: &StateDirectory,
        claim: &CardClaim,
    ) -> Result<ReferenceData, SetupError> {
        let prefix = self.prefix;
        let password = |card: &str| match &self.password_file {
            None if store.needs_secret() => {
                let (database, card) = (database.to_owned(), card.to_owned());
                Err(SetupError::PasswordNeeded { database, card, prefix })
            }
            None => Ok(Secret::default()),
            Some(file) => {
                let password = self.read_secret("password-file", file)?;
                // Better said now than by a card that fails every VERIFY.
                store.unlock(&password).map_err(|source| SetupError::WrongPassword {
                    option: format!("{prefix}password-file"),
                    file: file.clone(),
                    database: database.to_owned(),
                    source,
                })?;
                Ok(password)
            }
        };
        if self.no_pin {
            let password = password(&format!("{prefix}no-pin"))?;
            tracing::warn!(
                "{prefix}no-pin: ANY PIN IS TAKEN FOR RIGHT; whoever uses the guest can use these keys"
            );
            return Ok(ReferenceData::any(password));
        }
        if self.pin_file.is_some() || ReferenceData::card_has_pin(directory, claim)? {
            let initial = match &self.pin_file {
                Some(file) => {
                    let pin = self.read_secret("pin-file", file)?;
                    pin::check_card_pin(&pin).map_err(|source| SetupError::Pin {
                        option: format!("{prefix}pin-file"),
                        file: file.clone(),
                        source,
                    })?;
                    Some(pin)
                }
                None => None,
            };
            let password = password("a PIN of its own")?;
            let (reference, used, _) =
                ReferenceData::of_card(directory, claim, initial.as_ref(), None, password, DEFAULT_TRIES)?;
            if used == Initial::Ignored {
                tracing::warn!("{prefix}pin-file is ignored: this card has its PIN already");
            }
            return Ok(reference);
        }
        if !store.needs_secret() {
            return Err(SetupError::NoPassword { database: database.to_owned(), prefix });
        }
        if self.password_file.is_some() {
            return Err(SetupError::PasswordUnused(prefix));
        }
        Ok(ReferenceData::of_database(directory, database, DEFAULT_TRIES))
    }

    fn read_secret(&self, option: &str, file: &Path) -> Result<Secret, SetupError> {
        let option = format!("{}{option}", self.prefix);
        pin::read_secret_file(file).map_err(|source| SetupError::SecretFile { option, source })
    }
}
