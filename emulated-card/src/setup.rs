//! What the programs' options ask for: [`CardSetup`] opens a card, with all that is around it (its PIN, its state on
//! disk, its identity), or says why not. [`RawSetup`] does so for a card in a host reader.

mod naming;

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::card::{CardBuildError, CardOptions, EmulatedCard, Profile};
use crate::keys::nss::token::{Module, ModuleError, TokenStore};
use crate::keys::nss::{NssDatabase, OpenError};
use crate::keys::pem::{self, PemSource, PemStore};
use crate::keys::writable::ManagementAlgorithm;
use crate::keys::written::{ManagementKey, ManagementKeyError, WrittenError, WrittenStore};
use crate::keys::{Certificate, KeyKind, KeyStore, UnlockError};
use crate::pcsc::{PcscConfig, PcscSource};
use crate::pin::{self, CardPinError, DEFAULT_TRIES, Initial, ReferenceData, SecretFileError};
use crate::shell::CardSlot;
use crate::slot::{self, PivSlot};
use crate::state::{CardClaim, CardId, StateDirectory, StateError};
use crate::token::{self, TokenCard, TokenCardError};
use crate::tries::KeepTries;
pub use naming::shell_word;
use thiserror::Error;
use vscard_protocol::{CardSource, LogBudget, Secret};
use x509_cert::der::DateTime;

const RSA_4096: KeyKind = KeyKind::Rsa { bits: 4096 };

/// A certificate that is wanted on the card: `NAME`, or `SLOT=NAME` with a PIV slot such as `9a`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The slot it is to have; by default its key usage says.
    pub slot: Option<PivSlot>,
    /// Its name in the key store.
    pub name: String,
}

impl FromStr for Wanted {
    type Err = Infallible;

    /// What stands before an equals sign and is no slot belongs to the name.
    fn from_str(text: &str) -> Result<Self, Infallible> {
        let with_slot = text.split_once('=').and_then(|(slot, name)| Some((slot.parse().ok()?, name)));
        Ok(match with_slot {
            Some((slot, name)) => Self { slot: Some(slot), name: name.to_owned() },
            None => Self { slot: None, name: text.to_owned() },
        })
    }
}

/// Where keys and certificates come from.
#[derive(Clone, Debug)]
pub enum Keys {
    /// An NSS database, by its directory, with or without `sql:`.
    Database(String),
    /// PEM and PKCS#12 files.
    Files(Vec<PemSource>),
    /// A token, such as a card in a reader that a PKCS#11 module drives: hardware mode.
    Token {
        /// PKCS#11 modules.
        modules: Vec<PathBuf>,
        /// Directory of an NSS database, for the modules its pkcs11.txt lists.
        db: Option<String>,
        /// The token's label or serial number; by default it is the only one.
        token: Option<String>,
    },
}

/// A card that can be written to, or was.
#[derive(Clone, Debug)]
pub struct Written {
    /// Where what is written is kept, of this card alone.
    pub directory: StateDirectory,
    /// File with the card management key, by which more can be written; without one the card is as it was left.
    pub management: Option<(PathBuf, ManagementAlgorithm)>,
}

/// Which card is wanted, and what PIN it has.
#[derive(Clone, Debug)]
pub struct CardSetup {
    /// Where its keys are.
    pub keys: Keys,
    /// Certificates of an NSS database: those to be on the card. Of files and tokens: what slots they get; all are
    /// on the card.
    pub certificates: Vec<Wanted>,
    /// As what it shows itself.
    pub profile: Profile,
    /// Tells cards with the same certificates apart.
    pub card_name: String,
    /// File with the PIN that a new card gets for its own; without one the PIN is the database's password.
    pub pin_file: Option<PathBuf>,
    /// File with the PUK that a new card with a PIN of its own gets.
    pub puk_file: Option<PathBuf>,
    /// File with the password of the database or key files, for a card with a PIN of its own or none.
    pub password_file: Option<PathBuf>,
    /// Any PIN is right.
    pub no_pin: bool,
    /// A verified PIN is forgotten after this much idle time.
    pub forget_pin: Option<Duration>,
    /// Tries of the PIN that the guest cannot use; by default 1 for a token, and 0 for others.
    pub keep_tries: Option<u8>,
    /// Where its state is kept, if not with the user's other cards, and under which name instead of the path of its
    /// keys. Such a card has a PIN of its own, which it is given when it is made.
    pub state: Option<(StateDirectory, PathBuf)>,
    /// For a card of files, which shows itself as a PIV card only.
    pub written: Option<Written>,
    /// What stands before an option's name where the user writes it: `--` or nothing.
    pub prefix: &'static str,
    /// The command that gives a blocked PIN its tries back, for the log.
    pub unlock: Option<String>,
}

impl Default for CardSetup {
    fn default() -> Self {
        Self {
            keys: Keys::Database("/etc/pki/nssdb".into()),
            certificates: Vec::new(),
            profile: Profile::default(),
            card_name: String::new(),
            pin_file: None,
            puk_file: None,
            password_file: None,
            no_pin: false,
            forget_pin: None,
            keep_tries: None,
            state: None,
            written: None,
            prefix: "",
            unlock: None,
        }
    }
}

/// A card in a host reader that is passed through as it is.
#[derive(Clone, Debug)]
pub struct RawSetup {
    /// Which reader, and how it is shared.
    pub config: PcscConfig,
    /// Tries of the PIN that the guest cannot use; 1 by default.
    pub keep_tries: Option<u8>,
}

/// A card, and its claim on its identity, which it keeps as long as this or a clone of it lives, and what it is about
/// is not done.
#[derive(Clone)]
pub struct OpenCard {
    /// Where the card is powered.
    pub source: Arc<dyn CardSource>,
    /// The slot of a card that can be inserted and removed here, not inserted yet; a token or a card in a host
    /// reader comes and goes by itself.
    pub slot: Option<Arc<CardSlot>>,
    token: Option<Arc<TokenCard>>,
}

impl OpenCard {
    /// Waits until a fault in the program or in its libraries (a panic) has taken the card away for good. For ever if
    /// there is none, and for a card in a host reader.
    pub async fn failed(&self) {
        match (&self.slot, &self.token) {
            (Some(slot), _) => slot.failed().await,
            (None, Some(token)) => token.failed().await,
            (None, None) => std::future::pending().await,
        }
    }
}

/// Why there is no card. The messages name the option, file or directory.
#[derive(Debug, Error)]
pub enum SetupError {
    /// The database or a certificate in it is not usable.
    #[error(transparent)]
    Database(#[from] OpenError),
    /// Files with keys or certificates are encrypted.
    #[error("{source}; name a file with it in {prefix}password-file")]
    Encrypted {
        /// Which file it is.
        source: pem::OpenError,
        /// As in [`CardSetup::prefix`].
        prefix: &'static str,
    },
    /// A file with keys or certificates is not usable.
    #[error(transparent)]
    Files(#[from] pem::OpenError),
    /// What was written to the card is not usable.
    #[error(transparent)]
    Written(#[from] WrittenError),
    /// The card management key is not usable.
    #[error("card management key: {0}")]
    ManagementKey(#[from] ManagementKeyError),
    /// A PKCS#11 module is not usable.
    #[error(transparent)]
    Module(#[from] ModuleError),
    /// The token is not usable.
    #[error(transparent)]
    Token(#[from] TokenCardError),
    /// The state on disk is not usable, or the card is open elsewhere.
    #[error(transparent)]
    State(#[from] StateError),
    /// A card with its state in a directory of its own is open elsewhere.
    #[error("this card is in use already, by another process; new-card makes another one")]
    DirectoryInUse,
    /// A card with its state in a directory of its own has none there, or none with a PIN.
    #[error("the PIN of this card is lost: it was in {}; new-card makes another card", .0.display())]
    PinLost(PathBuf),
    /// A card with its state in a directory of its own has one there that cannot be believed.
    #[error(
        "the state file {} {what}, so no PIN is accepted; if it cannot be mended, the card's PIN is lost with it, \
         and new-card makes another card",
        path.display()
    )]
    DirectoryDamaged {
        /// The state file.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
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
    /// Neither the keys nor the card would have a PIN.
    #[error(
        "the keys in {} have no password that could be the PIN, so anyone in the guest could use them: give the \
         card a PIN of its own with {prefix}pin-file, or say {prefix}no-pin",
        place.display()
    )]
    NoPassword {
        /// The database or file.
        place: PathBuf,
        /// As in [`CardSetup::prefix`].
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
        /// As in [`CardSetup::prefix`].
        prefix: &'static str,
    },
    /// A password that nothing would use.
    #[error(
        "{0}password-file goes with {0}pin-file or {0}no-pin; without them the PIN is the database's password"
    )]
    PasswordUnused(&'static str),
    /// A PUK that no PIN goes with.
    #[error("{0}puk-file goes with {0}pin-file: only a PIN of the card's own can be unblocked")]
    PukUnused(&'static str),
    /// Files and tokens are on the card with all they hold, so a name alone says nothing.
    #[error(
        "{prefix}cert {name}: all certificates of files and tokens are on the card; say SLOT=NAME to give one a \
         slot (9a, 9c, 9d, 9e, 82 to 95)"
    )]
    NoSlot {
        /// What was named.
        name: String,
        /// As in [`CardSetup::prefix`].
        prefix: &'static str,
    },
    /// A token has its own PIN.
    #[error("{0} does not go with a token, which has a PIN of its own")]
    TokenPin(String),
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
        "no PIN of {} has been tried, so none is blocked; if a card has a PIN of its own, name its certificates \
         and name as when it was made",
        .0.display()
    )]
    NothingToUnlock(PathBuf),
    /// No try of a token's PIN is counted.
    #[error("no try of the PIN of the token {0:?} is counted here, so there is nothing to unlock for it")]
    NoTriesOfToken(String),
    /// The token whose tries are to be given back is not in.
    #[error("no token is in that would do; put it in")]
    NoToken,
    /// The database's directory, or a file, cannot be found.
    #[error("{}: {source}", path.display())]
    NotFound {
        /// What was given.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The system gives no thread.
    #[error("the system gives no thread for the card: {0}")]
    Thread(std::io::Error),
}

/// A key store, and the paths by which its cards' state is found.
struct Opened {
    store: Arc<dyn KeyStore>,
    /// The same store, if what was written to it is yet to be read, which only the card's claim allows.
    written: Option<Arc<WrittenStore>>,
    /// Of a database, its path; of files, that of each certificate's.
    places: Vec<PathBuf>,
}

impl Opened {
    fn place(&self) -> &Path {
        self.places.first().map_or(Path::new(""), PathBuf::as_path)
    }
}

impl CardSetup {
    /// Opens the keys, claims the card's identity and makes the card.
    ///
    /// # Errors
    /// [`SetupError`]; there is never a smaller card than the one asked for.
    pub fn open(&self) -> Result<OpenCard, SetupError> {
        let is_database = matches!(self.keys, Keys::Database(_));
        if let Some(wanted) = self.certificates.iter().find(|wanted| wanted.slot.is_none() && !is_database) {
            return Err(SetupError::NoSlot { name: wanted.name.clone(), prefix: self.prefix });
        }
        if let Keys::Token { modules, db, token } = &self.keys {
            return self.open_token(modules, db.as_deref(), token.clone());
        }
        let opened = self.open_store()?;
        let store = opened.store.clone();
        let id = CardId::derive(store.certificates(), &self.card_name);
        let directory = self.state_directory()?;
        let claim = directory.claim_at(&opened.places, &id).map_err(|error| self.state_error(error))?;
        if let Some(written) = &opened.written {
            written.read_written()?;
        }
        let reference = self.reference_data(&*store, opened.place(), &directory, &claim)?;
        // Known now rather than when the user wonders why no PIN is right.
        warn_of_tries(&reference, 0, &format!("the PIN is blocked{}", self.way_out()));
        // The identity it had the first time.
        let card = self.make(store, reference, claim.id().clone())?;
        let slot = CardSlot::claimed(card, claim).map_err(SetupError::Thread)?;
        slot.forget_pin(self.forget_pin);
        let slot = Arc::new(slot);
        let source = keep_tries(slot.clone(), self.keep_tries.unwrap_or(0), &self.way_out());
        Ok(OpenCard { source, slot: Some(slot), token: None })
    }

    /// Gives a blocked PIN (and PUK) all its tries back, even while the card is open; says what was done. A card with
    /// a PIN of its own is found by all its certificates and its name; else the PIN is that of the database.
    ///
    /// # Errors
    /// [`SetupError::NothingToUnlock`], [`SetupError::NoTriesOfToken`], or state that cannot be read or written.
    pub fn unlock(&self) -> Result<String, SetupError> {
        let directory = self.state_directory()?;
        let database = match &self.keys {
            Keys::Token { modules, db, token } => {
                let modules = load(modules, db.as_deref())?;
                let (name, label) =
                    token::name_of_token(&modules, token.as_deref())?.ok_or(SetupError::NoToken)?;
                if !ReferenceData::reset_token_tries(&directory, &name)? {
                    return Err(SetupError::NoTriesOfToken(label));
                }
                return Ok(format!(
                    "a card on the token {label:?} has {DEFAULT_TRIES} tries again, if the token has"
                ));
            }
            Keys::Database(db) => Some(canonical(Path::new(db.strip_prefix("sql:").unwrap_or(db)))?),
            Keys::Files(_) => None,
        };
        if database.is_none() || !self.certificates.is_empty() {
            let opened = self.open_store()?;
            let id = CardId::derive(opened.store.certificates(), &self.card_name);
            let reset = ReferenceData::reset_card_tries_at(&directory, &opened.places, &id);
            if reset.map_err(|error| self.state_error(error))? {
                return Ok(format!("the card's own PIN has {DEFAULT_TRIES} tries again"));
            }
            if self.state.is_some() {
                return Err(SetupError::PinLost(directory.path().to_owned()));
            }
            if database.is_none() {
                return Err(SetupError::NothingToUnlock(opened.place().to_owned()));
            }
        }
        let database = database.unwrap_or_default();
        if !ReferenceData::of_database(&directory, &database, DEFAULT_TRIES).reset_tries()? {
            return Err(SetupError::NothingToUnlock(database));
        }
        Ok(format!("the PIN of {} has {DEFAULT_TRIES} tries again", database.display()))
    }

    fn state_directory(&self) -> Result<StateDirectory, StateError> {
        self.state.as_ref().map_or_else(StateDirectory::of_user, |(directory, _)| Ok(directory.clone()))
    }

    /// A card in a directory of its own has other ways out: its place is no path that the user knows, it has no other
    /// name, and there are no options that would give it another PIN.
    fn state_error(&self, error: StateError) -> SetupError {
        match error {
            StateError::InUse { .. } if self.state.is_some() => SetupError::DirectoryInUse,
            StateError::Damaged { path, what } if self.state.is_some() => {
                SetupError::DirectoryDamaged { path, what }
            }
            error => error.into(),
        }
    }

    fn open_store(&self) -> Result<Opened, SetupError> {
        let mut opened = self.open_keys()?;
        if let Some((_, name)) = &self.state {
            opened.places = vec![name.clone()];
        }
        Ok(opened)
    }

    fn open_keys(&self) -> Result<Opened, SetupError> {
        match &self.keys {
            Keys::Database(db) => {
                let names: Vec<_> = self.certificates.iter().map(|wanted| wanted.name.clone()).collect();
                let store = NssDatabase::open(db, &names)?;
                let places = vec![store.path().to_owned()];
                Ok(Opened { store: Arc::new(store), written: None, places })
            }
            Keys::Files(sources) => {
                let password = self
                    .password_file
                    .as_ref()
                    .map(|file| self.read_secret("password-file", file))
                    .transpose()?;
                let encrypted = |source| match source {
                    pem::OpenError::PasswordNeeded { .. } if self.state.is_none() => {
                        SetupError::Encrypted { source, prefix: self.prefix }
                    }
                    source => source.into(),
                };
                let mut unread = None;
                let store: Arc<dyn KeyStore> = match &self.written {
                    None => Arc::new(PemStore::open(sources, password.as_ref()).map_err(encrypted)?),
                    Some(written) => {
                        let store = Arc::new(self.open_written(sources, password.as_ref(), written)?);
                        unread.insert(store).clone()
                    }
                };
                let places = sources.iter().map(|source| match source {
                    PemSource::Pem { certificate: path, .. } | PemSource::Pkcs12(path) => canonical(path),
                });
                Ok(Opened { store, written: unread, places: places.collect::<Result<_, _>>()? })
            }
            Keys::Token { .. } => Err(SetupError::NoToken),
        }
    }

    fn open_written(
        &self,
        sources: &[PemSource],
        password: Option<&Secret>,
        Written { directory, management }: &Written,
    ) -> Result<WrittenStore, SetupError> {
        let management = match management {
            Some((file, algorithm)) => Some(ManagementKey::read(file, *algorithm)?),
            None => None,
        };
        Ok(WrittenStore::as_made(sources, password, &self.explicit(), directory.clone(), management)?)
    }

    fn open_token(
        &self,
        modules: &[PathBuf],
        db: Option<&str>,
        token: Option<String>,
    ) -> Result<OpenCard, SetupError> {
        let (prefix, keep) = (self.prefix, self.keep_tries.unwrap_or(1));
        for (name, given) in [
            ("pin-file", self.pin_file.is_some()),
            ("puk-file", self.puk_file.is_some()),
            ("password-file", self.password_file.is_some()),
            ("no-pin", self.no_pin),
        ] {
            if given {
                return Err(SetupError::TokenPin(format!("{prefix}{name}")));
            }
        }
        let loaded = load(modules, db)?;
        let directory = self.state_directory()?;
        let (setup, state) = (self.clone(), directory.clone());
        let make = move |store: Arc<TokenStore>| {
            let name = store.token().name();
            let store: Arc<dyn KeyStore> = store;
            let id = CardId::derive(store.certificates(), &setup.card_name);
            let reference = ReferenceData::of_token(&state, &name, store.clone(), DEFAULT_TRIES);
            let spent = format!(
                "no try of the token's PIN is left for the guest{}; if the token has few tries left itself, the right \
                 PIN given on the host helps",
                setup.way_out()
            );
            warn_of_tries(&reference, keep, &spent);
            Ok(setup.make(store, reference, id)?)
        };
        let card = TokenCard::open(&loaded, token, directory, self.forget_pin, Box::new(make))?;
        let card = Arc::new(card);
        let source = keep_tries(card.clone(), keep, &self.way_out());
        Ok(OpenCard { source, slot: None, token: Some(card) })
    }

    /// Of a blocked PIN, to be added to what is said of it.
    fn way_out(&self) -> String {
        let command = self.unlock.as_deref();
        command.map(|command| format!("; to give it its tries back: {command}")).unwrap_or_default()
    }

    /// The slots that were asked for.
    fn explicit(&self) -> Vec<(PivSlot, String)> {
        self.certificates.iter().filter_map(|wanted| Some((wanted.slot?, wanted.name.clone()))).collect()
    }

    fn make(
        &self,
        store: Arc<dyn KeyStore>,
        reference: ReferenceData,
        id: CardId,
    ) -> Result<EmulatedCard, CardBuildError> {
        let slots = slot::assign(store.certificates(), &self.explicit())?;
        store.certificates().iter().for_each(warn_of_validity);
        for (slot, index) in &slots {
            if let Some(certificate) = store.certificates().get(*index) {
                tracing::debug!("slot {slot}: certificate {:?}, {}", certificate.name, certificate.kind);
            }
        }
        self.warn_of_hosts(&*store, &slots);
        let options = CardOptions { profile: self.profile, slots };
        let random = Box::new(|bytes: &mut [u8]| {
            if let Err(error) = getrandom::fill(bytes) {
                // Without randomness a challenge of zeros would be a lie.
                tracing::error!("the system gives no random numbers: {error}");
                std::process::abort();
            }
        });
        let mut card = EmulatedCard::new(store, Arc::new(reference), id, options, random)?;
        card.set_way_out(self.way_out());
        Ok(card)
    }

    /// Says which keys OpenSC will not use, or not for all: better now than when the user looks for the fault in the PIN.
    fn warn_of_hosts(&self, store: &dyn KeyStore, slots: &[(PivSlot, usize)]) {
        let long = match store.writable() {
            Some(memory) => PivSlot::all()
                .filter(|slot| memory.key(*slot).is_some_and(|(_, kind)| kind == RSA_4096))
                .map(|slot| slot.to_string())
                .collect::<Vec<_>>(),
            None => slots
                .iter()
                .filter(|(_, index)| store.certificates().get(*index).is_some_and(|one| one.kind == RSA_4096))
                .map(|(slot, _)| slot.to_string())
                .collect(),
        };
        if !long.is_empty() {
            let long = long.join(", ");
            LINES.tell("RSA-4096", |end| {
                tracing::warn!(
                    "RSA keys of 4096 bits (slots {long}): OpenSC up to 0.27 and yubico-piv-tool 2.2 do not use \
                     them{end}"
                );
            });
        }
        let chosen = |slot| self.certificates.iter().any(|wanted| wanted.slot == Some(slot));
        let silent: Vec<_> = slot::without_key_usage(store.certificates(), slots)
            .filter(|(slot, _)| self.profile != Profile::Cac && !chosen(*slot))
            .map(|(slot, certificate)| format!("{:?} ({slot})", certificate.name))
            .collect();
        if !silent.is_empty() {
            // What is in a directory of its own has no such option.
            let advice = match self.state {
                None => format!("; {}cert SLOT=NAME puts a certificate where it does, 9a or 9c", self.prefix),
                Some(_) => String::new(),
            };
            let silent = silent.join(", ");
            LINES.tell("no key usage", |end| {
                tracing::warn!(
                    "no key usage in {silent}: in these slots OpenSC lets such keys sign nothing{advice}{end}"
                );
            });
        }
    }

    fn reference_data(
        &self,
        store: &dyn KeyStore,
        place: &Path,
        directory: &StateDirectory,
        claim: &CardClaim,
    ) -> Result<ReferenceData, SetupError> {
        let prefix = self.prefix;
        let is_database = matches!(self.keys, Keys::Database(_));
        let password = |card: &str| match &self.password_file {
            None if store.needs_secret() => {
                let (database, card) = (place.to_owned(), card.to_owned());
                Err(SetupError::PasswordNeeded { database, card, prefix })
            }
            // That of key files was for reading them.
            Some(file) if is_database => {
                let password = self.read_secret("password-file", file)?;
                // Better said now than by a card that fails every VERIFY.
                store.unlock(&password).map_err(|source| SetupError::WrongPassword {
                    option: format!("{prefix}password-file"),
                    file: file.clone(),
                    database: place.to_owned(),
                    source,
                })?;
                Ok(password)
            }
            _ => Ok(Secret::default()),
        };
        if self.no_pin && self.puk_file.is_some() {
            return Err(SetupError::PukUnused(prefix));
        }
        if self.no_pin {
            let password = password(&format!("{prefix}no-pin"))?;
            tracing::warn!(
                "{prefix}no-pin: ANY PIN IS TAKEN FOR RIGHT; whoever uses the guest can use these keys"
            );
            return Ok(ReferenceData::any(password));
        }
        let is_new = !ReferenceData::card_has_pin(directory, claim)?;
        if self.pin_file.is_some() || !is_new {
            let check_pin: fn(&Secret) -> Result<(), CardPinError> = match self.profile {
                // It will be ignored.
                _ if !is_new => |_| Ok(()),
                Profile::Piv => pin::check_piv_pin,
                _ => pin::check_card_pin,
            };
            let pin = self.initial("pin-file", self.pin_file.as_ref(), check_pin)?;
            if is_new
                && self.profile == Profile::Dual
                && pin.as_ref().is_some_and(|pin| pin::check_piv_pin(pin).is_err())
            {
                tracing::warn!(
                    "{prefix}pin-file: for PIV programs a PIN has 6 to 8 digits; some let no other be typed"
                );
            }
            let puk = self.initial("puk-file", self.puk_file.as_ref(), pin::check_puk)?;
            let password = password("a PIN of its own")?;
            let (reference, pin, puk) = ReferenceData::of_card(
                directory,
                claim,
                pin.as_ref(),
                puk.as_ref(),
                password,
                DEFAULT_TRIES,
            )?;
            for (option, what, used) in [("pin-file", "PIN", pin), ("puk-file", "PUK", puk)] {
                if used == Initial::Ignored {
                    tracing::warn!("{prefix}{option} is ignored: this card has its {what} already");
                }
            }
            return Ok(reference);
        }
        if self.state.is_some() {
            return Err(SetupError::PinLost(directory.path().to_owned()));
        }
        if self.puk_file.is_some() {
            return Err(SetupError::PukUnused(prefix));
        }
        if !store.needs_secret() {
            return Err(SetupError::NoPassword { place: place.to_owned(), prefix });
        }
        if self.password_file.is_some() {
            return Err(SetupError::PasswordUnused(prefix));
        }
        Ok(ReferenceData::of_database(directory, place, DEFAULT_TRIES))
    }

    /// The first PIN or PUK of a card, from a file.
    fn initial(
        &self,
        option: &str,
        file: Option<&PathBuf>,
        check: fn(&Secret) -> Result<(), CardPinError>,
    ) -> Result<Option<Secret>, SetupError> {
        let Some(file) = file else { return Ok(None) };
        let secret = self.read_secret(option, file)?;
        check(&secret).map_err(|source| SetupError::Pin {
            option: format!("{}{option}", self.prefix),
            file: file.clone(),
            source,
        })?;
        Ok(Some(secret))
    }

    fn read_secret(&self, option: &str, file: &Path) -> Result<Secret, SetupError> {
        let option = format!("{}{option}", self.prefix);
        pin::read_secret_file(file).map_err(|source| SetupError::SecretFile { option, source })
    }
}

impl RawSetup {
    /// Watches the reader; the card may come later.
    ///
    /// # Errors
    /// [`SetupError::Thread`].
    pub fn open(&self) -> Result<OpenCard, SetupError> {
        let card = PcscSource::open(self.config.clone()).map_err(SetupError::Thread)?;
        let source = keep_tries(Arc::new(card), self.keep_tries.unwrap_or(1), "");
        Ok(OpenCard { source, slot: None, token: None })
    }
}

/// What is said of a card when it is made: of a token's, at each insertion.
static LINES: LogBudget<&str> = LogBudget::new();

/// Says that no PIN will be taken for right: because no more than `kept` tries are left, or none can be counted.
fn warn_of_tries(reference: &ReferenceData, kept: u8, spent: &str) {
    match reference.tries_left() {
        Ok(left) if left <= kept => LINES.tell("spent", |end| tracing::warn!("{spent}{end}")),
        Ok(_) => {}
        Err(error) => LINES.tell("refused", |end| tracing::warn!("every PIN will be refused: {error}{end}")),
    }
}

/// Says now why programs will refuse a certificate.
fn warn_of_validity(certificate: &Certificate) {
    let Some((not_before, not_after)) = certificate.validity() else { return };
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let name = &certificate.name;
    if now > not_after {
        LINES.tell("expired", |end| {
            tracing::warn!("certificate {name:?} has expired, on {}{end}", date(not_after));
        });
    } else if now < not_before {
        LINES.tell("not valid yet", |end| {
            tracing::warn!("certificate {name:?} is not valid yet, only from {}{end}", date(not_before));
        });
    }
}

/// Seconds and all, as certificates have it (RFC 5280 §4.1.2.5).
fn date(since_1970: Duration) -> String {
    DateTime::from_unix_duration(since_1970).map(|date| date.to_string()).unwrap_or_default()
}

fn load(modules: &[PathBuf], db: Option<&str>) -> Result<Vec<Module>, ModuleError> {
    let mut loaded = modules.iter().map(|module| Module::load(module)).collect::<Result<Vec<_>, _>>()?;
    if let Some(db) = db {
        loaded.extend(Module::of_directory(db)?);
    }
    Ok(loaded)
}

fn keep_tries(source: Arc<dyn CardSource>, keep: u8, way_out: &str) -> Arc<dyn CardSource> {
    if keep == 0 { source } else { Arc::new(KeepTries::new(source, keep).advising(way_out)) }
}

fn canonical(path: &Path) -> Result<PathBuf, SetupError> {
    std::fs::canonicalize(path).map_err(|source| SetupError::NotFound { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_stands_before_a_name() {
        let wanted = |text: &str| match text.parse::<Wanted>() {
            Ok(Wanted { slot, name }) => (slot.map(|slot| slot.to_string()), name),
            Err(never) => match never {},
        };
        assert_eq!(wanted("9a=id"), (Some("9a".into()), "id".into()));
        assert_eq!(wanted("id"), (None, "id".into()));
        assert_eq!(wanted("CN=id"), (None, "CN=id".into()));
        assert_eq!(wanted("82=a=b"), (Some("82".into()), "a=b".into()));
    }
}
