//! Makes the card that the command line asks for.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use emulated_card::card::{CardBuildError, EmulatedCard};
use emulated_card::keys::nss::{NssDatabase, OpenError};
use emulated_card::keys::{KeyKind, KeyStore, UnlockError};
use emulated_card::pin::{self, CardPinError, DEFAULT_TRIES, InitialPin, ReferenceData, SecretFileError};
use emulated_card::shell::CardSlot;
use emulated_card::state::{CardClaim, CardId, StateDirectory, StateError};
use thiserror::Error;
use vscard_protocol::Secret;

use crate::args::{CardSpec, Serve};

/// Why there is no card.
#[derive(Debug, Error)]
pub(crate) enum SetupError {
    #[error(transparent)]
    Database(#[from] OpenError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Card(#[from] CardBuildError),
    #[error("{option}: {source}")]
    SecretFile { option: &'static str, source: SecretFileError },
    #[error("--pin-file {}: {source}", file.display())]
    Pin { file: PathBuf, source: CardPinError },
    #[error(
        "the database {} has no password, so anyone in the guest could use its keys: give the card a PIN of its \
         own with --pin-file FILE, or say --no-pin",
        .0.display()
    )]
    NoPassword(PathBuf),
    #[error(
        "the database {} has a password, which a card with {card} needs: give it with --password-file FILE",
        database.display()
    )]
    PasswordNeeded { database: PathBuf, card: &'static str },
    #[error(
        "--password-file goes with --pin-file or --no-pin; without them the PIN is the database's password"
    )]
    PasswordUnused,
    #[error("--password-file {}: {source} (database {})", file.display(), database.display())]
    WrongPassword { file: PathBuf, database: PathBuf, source: UnlockError },
    #[error(
        "no PIN of {} has been tried, so none is blocked; if a card has a PIN of its own, name all its \
         certificates with --cert, and its --card-name",
        .0.display()
    )]
    NothingToUnlock(PathBuf),
    #[error("the database {}: {source}", database.display())]
    NoDatabase { database: PathBuf, source: std::io::Error },
    #[error("the system gives no thread for the card: {0}")]
    Thread(std::io::Error),
}

/// A card, not inserted yet, and its claim on its identity.
pub(crate) struct Setup {
    pub(crate) slot: CardSlot,
    _claim: CardClaim,
}

pub(crate) fn set_up(spec: &CardSpec, serve: &Serve) -> Result<Setup, SetupError> {
    let store = NssDatabase::open(&spec.db, &spec.certificates)?;
    let database = store.path().to_owned();
    let id = CardId::derive(store.certificates(), &spec.card_name);
    let directory = StateDirectory::of_user()?;
    let claim = directory.claim(&database, &id)?;
    let reference = reference_data(serve, &store, &database, &directory, &claim)?;
    for certificate in store.certificates() {
        let KeyKind::Rsa { bits } = certificate.kind;
        tracing::debug!("certificate {:?}, RSA, {bits} bits", certificate.name);
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
    let card = EmulatedCard::new(Arc::new(store), Arc::new(reference), id, random)?;
    let slot = CardSlot::new(card).map_err(SetupError::Thread)?;
    slot.forget_pin(serve.forget_pin());
    Ok(Setup { slot, _claim: claim })
}

fn reference_data(
    serve: &Serve,
    store: &NssDatabase,
    database: &Path,
    directory: &StateDirectory,
    claim: &CardClaim,
) -> Result<ReferenceData, SetupError> {
    let password = |card| match &serve.password_file {
        None if store.needs_secret() => {
            Err(SetupError::PasswordNeeded { database: database.to_owned(), card })
        }
        None => Ok(Secret::default()),
        Some(file) => {
            let password = read_secret("--password-file", file)?;
            // Better said now than by a card that fails every VERIFY.
            store.unlock(&password).map_err(|source| SetupError::WrongPassword {
                file: file.clone(),
                database: database.to_owned(),
                source,
            })?;
            Ok(password)
        }
    };
    if serve.no_pin {
        let password = password("--no-pin")?;
        tracing::warn!("--no-pin: ANY PIN IS TAKEN FOR RIGHT; whoever uses the guest can use these keys");
        return Ok(ReferenceData::any(password));
    }
    if serve.pin_file.is_some() || ReferenceData::card_has_pin(directory, claim)? {
        let initial = match &serve.pin_file {
            Some(file) => {
                let pin = read_secret("--pin-file", file)?;
                pin::check_card_pin(&pin).map_err(|source| SetupError::Pin { file: file.clone(), source })?;
                Some(pin)
            }
            None => None,
        };
        let password = password("a PIN of its own")?;
        let (reference, used) =
            ReferenceData::of_card(directory, claim, initial.as_ref(), password, DEFAULT_TRIES)?;
        if used == InitialPin::Ignored {
            tracing::warn!("--pin-file is ignored: this card has its PIN already");
        }
        return Ok(reference);
    }
    if !store.needs_secret() {
        return Err(SetupError::NoPassword(database.to_owned()));
    }
    if serve.password_file.is_some() {
        return Err(SetupError::PasswordUnused);
    }
    Ok(ReferenceData::of_database(directory, database, DEFAULT_TRIES)?)
}

fn read_secret(option: &'static str, file: &Path) -> Result<Secret, SetupError> {
    pin::read_secret_file(file).map_err(|source| SetupError::SecretFile { option, source })
}

/// Gives the PIN its tries back; returns what was done.
pub(crate) fn unlock(spec: &CardSpec) -> Result<String, SetupError> {
    let directory = StateDirectory::of_user()?;
    let path = spec.db.strip_prefix("sql:").unwrap_or(&spec.db);
    let database = std::fs::canonicalize(path)
        .map_err(|source| SetupError::NoDatabase { database: path.into(), source })?;
    if !spec.certificates.is_empty() {
        let store = NssDatabase::open(&spec.db, &spec.certificates)?;
        let id = CardId::derive(store.certificates(), &spec.card_name);
        if ReferenceData::reset_card_tries(&directory, &database, &id)? {
            return Ok(format!("the card's own PIN has {DEFAULT_TRIES} tries again"));
        }
    }
    if !ReferenceData::of_database(&directory, &database, DEFAULT_TRIES)?.reset_tries()? {
        return Err(SetupError::NothingToUnlock(database));
    }
    Ok(format!("the PIN of {} has {DEFAULT_TRIES} tries again", database.display()))
}
