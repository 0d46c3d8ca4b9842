//! `vscclient new-card`: a test card in a directory, with a certification authority of its own.

mod authority;
mod building;
mod card_file;
mod directory;
mod interrupt;
mod nss;
#[cfg(test)]
mod tests;

use std::fs::{DirBuilder, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use clap::builder::PossibleValue;
use clap::{Args, ValueEnum};
use emulated_card::keys::written::{ManagementKey, ManagementKeyError};
use emulated_card::keys::{Certificate, Curve, KeyKind};
use emulated_card::pin::{
    CardPinError, DEFAULT_TRIES, ReferenceData, SecretFileError, check_piv_pin, check_puk, read_secret_file,
};
use emulated_card::state::{CardId, PlaceError, StateError};
use openssl::error::ErrorStack;
use openssl::hash::MessageDigest;
use openssl::pkey::{PKey, Private};
use openssl::x509::X509;
use thiserror::Error;
use vscard_protocol::Secret;
use zeroize::Zeroizing;

use self::authority::{Authority, Holder, Purpose, Validity};
use self::building::Building;
use self::card_file::{AdminAlgorithm, AdminFile, CardFile, NssFiles, PemFiles, Profile};
use self::directory::CARD_FILE;
pub(crate) use self::directory::{CardDirectory, CardDirectoryError};
use self::nss::Database;

const DATABASE: &str = "nssdb";
const PASSWORD_FILE: &str = "nssdb.password";
const ADMIN_KEY_FILE: &str = "admin.key";
/// One byte tells the length of such a string in DER.
const MAX_ADDRESS: usize = 127;

/// Makes a directory with a test card: a CA, certificates for authentication, signature, encryption and card
/// authentication with their keys, and the card's PIN
#[derive(Debug, Args)]
pub(crate) struct NewCard {
    /// The directory; it is made, or must be empty
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// Who holds the card, 1 to 64 characters
    #[arg(long, value_name = "NAME", value_parser = parse_name)]
    name: String,
    /// File with the card's PIN, 6 to 8 digits
    #[arg(long, value_name = "FILE")]
    pin_file: PathBuf,
    /// File with a PUK of 8 characters, which unblocks the PIN
    #[arg(long, value_name = "FILE")]
    puk_file: Option<PathBuf>,
    /// Kind of the card's keys; no OpenSC up to 0.27 uses rsa4096
    #[arg(long, value_enum, default_value = "rsa2048")]
    algorithm: Algorithm,
    /// User principal name, as jane@EXAMPLE.COM, in the authentication certificate
    #[arg(long, value_name = "NAME@REALM", value_parser = parse_upn)]
    upn: Option<String>,
    /// Mail address in the signature and encryption certificates
    #[arg(long, value_name = "ADDRESS", value_parser = parse_email)]
    email: Option<String>,
    /// How many days the certificates are valid
    #[arg(long, default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    days: u32,
    /// Certificates that expired yesterday
    #[arg(long)]
    expired: bool,
    /// Certificates that are in the CA's revocation list, as those of a lost card
    #[arg(long)]
    revoked: bool,
    /// Keys in an NSS database (needs certutil and pk12util) instead of PEM files
    #[arg(long)]
    nss: bool,
    /// File with a card management key in hexadecimal digits: a PIV card that `card --writable` lets be written to
    #[arg(long, value_name = "FILE", conflicts_with = "nss")]
    admin_key_file: Option<PathBuf>,
    /// What that key encrypts with
    #[arg(long, value_enum, default_value = "aes256", requires = "admin_key_file")]
    admin_algorithm: AdminAlgorithm,
}

impl ValueEnum for AdminAlgorithm {
    fn value_variants<'a>() -> &'a [Self] {
        &[Self::TripleDes, Self::Aes128, Self::Aes192, Self::Aes256]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(match self {
            Self::TripleDes => "3des",
            Self::Aes128 => "aes128",
            Self::Aes192 => "aes192",
            Self::Aes256 => "aes256",
        }))
    }
}

/// What a card's keys can be (SP 800-78-4 table 3-1, and RSA of other sizes).
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Algorithm {
    Rsa1024,
    Rsa2048,
    Rsa3072,
    Rsa4096,
    P256,
    P384,
}

impl Algorithm {
    fn kind(self) -> KeyKind {
        match self {
            Self::Rsa1024 => KeyKind::Rsa { bits: 1024 },
            Self::Rsa2048 => KeyKind::Rsa { bits: 2048 },
            Self::Rsa3072 => KeyKind::Rsa { bits: 3072 },
            Self::Rsa4096 => KeyKind::Rsa { bits: 4096 },
            Self::P256 => KeyKind::Ec(Curve::P256),
            Self::P384 => KeyKind::Ec(Curve::P384),
        }
    }

    fn of_authority(self) -> Self {
        match self.kind() {
            KeyKind::Rsa { .. } => Self::Rsa2048,
            KeyKind::Ec(_) => self,
        }
    }

    fn digest(self) -> MessageDigest {
        if self == Self::P384 { MessageDigest::sha384() } else { MessageDigest::sha256() }
    }
}

/// Why no card was made. What had been made of it is removed.
#[derive(Debug, Error)]
pub(crate) enum NewCardError {
    #[error("{0:?} is not empty; name a directory that is, or that does not exist")]
    NotEmpty(PathBuf),
    #[error("{path:?}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("others could change the card while it is made: {0}")]
    Place(#[from] PlaceError),
    #[error("interrupted, no card was made")]
    Interrupted,
    #[error("cannot watch for signals: {0}")]
    Signals(io::Error),
    #[error("--{option}: {source}")]
    SecretFile { option: &'static str, source: SecretFileError },
    #[error("--pin-file {}: {source}", path.display())]
    Pin { path: PathBuf, source: CardPinError },
    #[error("--puk-file {}: {source}", path.display())]
    Puk { path: PathBuf, source: CardPinError },
    #[error("--admin-key-file: {0}")]
    AdminKey(#[from] ManagementKeyError),
    #[error("OpenSSL made no key or certificate: {0}")]
    Crypto(#[from] ErrorStack),
    #[error("{0} is missing, which --nss needs; install the package libnss3-tools (nss-tools on Fedora)")]
    NoTool(&'static str),
    #[error("{program} failed: {said:?}")]
    Tool { program: &'static str, said: String },
    #[error("{CARD_FILE}: {0}")]
    CardFile(#[from] toml::ser::Error),
    /// The card is opened once, so that what is handed out works.
    #[error(transparent)]
    Directory(#[from] CardDirectoryError),
    #[error(transparent)]
    State(#[from] StateError),
}

/// What the card knows its users by, fit for a card.
struct Secrets {
    pin: Secret,
    puk: Option<Secret>,
    admin: Option<ManagementKey>,
}

impl NewCard {
    /// Makes the card, all of it or nothing, and says where it is.
    pub(crate) fn run(self) -> Result<String, NewCardError> {
        let secrets = self.secrets()?;
        if self.algorithm == Algorithm::Rsa4096 {
            // Before the seconds that such keys take.
            let warning =
                "OpenSC up to 0.27 does not use RSA keys of 4096 bits; rsa3072 has the longest that it does";
            let _ = writeln!(io::stderr(), "vscclient: warning: {warning}");
        }
        let interrupted = interrupt::watch(self.directory.clone()).map_err(NewCardError::Signals)?;
        let building = Building::begin(&self.directory)?;
        let filled = self.fill(building.path(), &secrets, &interrupted);
        // A terminal interrupts NSS's tools too, and then they fail.
        if interrupted.load(Ordering::Relaxed) {
            return Err(NewCardError::Interrupted);
        }
        filled?;
        building.finish()?;
        let directory = self.directory.display();
        Ok(format!("{directory} holds a card of {}; {directory}/README.txt says how to use it", self.name))
    }

    fn secrets(&self) -> Result<Secrets, NewCardError> {
        let read = |option, path: &Path| {
            read_secret_file(path).map_err(|source| NewCardError::SecretFile { option, source })
        };
        let pin = read("pin-file", &self.pin_file)?;
        check_piv_pin(&pin).map_err(|source| NewCardError::Pin { path: self.pin_file.clone(), source })?;
        let puk = match &self.puk_file {
            None => None,
            Some(path) => {
                let puk = read("puk-file", path)?;
                check_puk(&puk).map_err(|source| NewCardError::Puk { path: path.clone(), source })?;
                Some(puk)
            }
        };
        let admin = match &self.admin_key_file {
            None => None,
            Some(path) => Some(ManagementKey::read(path, self.admin_algorithm.into())?),
        };
        Ok(Secrets { pin, puk, admin })
    }

    /// Makes the card's files in `directory`.
    fn fill(
        &self,
        directory: &Path,
        Secrets { pin, puk, admin }: &Secrets,
        interrupted: &AtomicBool,
    ) -> Result<(), NewCardError> {
        let file = |name: &str| directory.join(name);
        let authority = Authority::new(self.algorithm, Validity::new(self.days, self.expired))?;
        write(&file("ca.pem"), &authority.certificate.to_pem()?, 0o644)?;
        write(&file("ca.key"), &Zeroizing::new(authority.key.private_key_to_pem_pkcs8()?), 0o600)?;

        let database = match self.nss {
            true => Some(Database::create(directory)?),
            false => None,
        };
        let keys = (0..Purpose::ALL.len()).map(|_| {
            // A long one takes seconds.
            if interrupted.load(Ordering::Relaxed) {
                return Err(NewCardError::Interrupted);
            }
            Ok(authority::generate(self.algorithm)?)
        });
        let keys: Vec<_> = keys.collect::<Result<_, NewCardError>>()?;
        let serials = keys.iter().map(|_| authority::serial()).collect::<Result<Vec<_>, _>>()?;
        let issue = |card| -> Result<Vec<_>, ErrorStack> {
            let (upn, email) = (self.upn.as_deref(), self.email.as_deref());
            let holder = Holder { name: &self.name, upn, email, card };
            let each = Purpose::ALL.into_iter().zip(keys.iter().zip(&serials));
            each.map(|(purpose, (key, serial))| authority.issue(purpose, key, serial, &holder)).collect()
        };
        // The card's GUID follows its certificates, but not what they say of it.
        let card = self.identity(&keys, &issue([0; 16])?)?.guid();
        let certificates = issue(card)?;
        for ((purpose, key), certificate) in Purpose::ALL.into_iter().zip(&keys).zip(&certificates) {
            let name = purpose.name();
            write(&file(&format!("{name}.pem")), &certificate.to_pem()?, 0o644)?;
            match &database {
                Some(database) => database.add(name, certificate, key)?,
                None => {
                    let key = Zeroizing::new(key.private_key_to_pem_pkcs8()?);
                    write(&file(&format!("{name}.key")), &key, 0o600)?;
                }
            }
        }
        let revoked = if self.revoked { &certificates[..] } else { &[] };
        write(&file("crl.pem"), &authority.revoke(revoked)?.to_pem()?, 0o644)?;
        if let Some(key) = admin {
            write(&file(ADMIN_KEY_FILE), key.to_hex().expose(), 0o600)?;
        }
        write(&file(CARD_FILE), self.card_file()?.as_bytes(), 0o644)?;
        Self::set_pin(directory, pin, puk.as_ref())?;
        write(&file("README.txt"), self.readme().as_bytes(), 0o644)
    }

    /// Who the card will be: that can be told to its certificates.
    fn identity(&self, keys: &[PKey<Private>], certificates: &[X509]) -> Result<CardId, NewCardError> {
        let certificate = |(key, certificate): (&PKey<Private>, &X509)| {
            let (name, kind) = (String::new(), self.algorithm.kind());
            Ok(Certificate { name, der: certificate.to_der()?, public_key: key.public_key_to_der()?, kind })
        };
        let certificates: Vec<_> =
            keys.iter().zip(certificates).map(certificate).collect::<Result<_, ErrorStack>>()?;
        Ok(CardId::derive(&certificates, ""))
    }

    fn card_file(&self) -> Result<String, NewCardError> {
        let names = Purpose::ALL.map(Purpose::name);
        let pem = |name| PemFiles { certificate: format!("{name}.pem"), key: format!("{name}.key") };
        let card = CardFile {
            name: self.name.clone(),
            profile: if self.admin_key_file.is_some() { Profile::Piv } else { Profile::Dual },
            pem: if self.nss { vec![] } else { names.map(pem).into() },
            nss: self.nss.then(|| NssFiles {
                database: DATABASE.into(),
                password_file: PASSWORD_FILE.into(),
                certificates: names.map(str::to_owned).into(),
            }),
            admin: self
                .admin_key_file
                .is_some()
                .then(|| AdminFile { key: ADMIN_KEY_FILE.into(), algorithm: self.admin_algorithm }),
        };
        Ok(toml::to_string(&card)?)
    }

    fn set_pin(directory: &Path, pin: &Secret, puk: Option<&Secret>) -> Result<(), NewCardError> {
        let card = CardDirectory::open(directory)?;
        let (store, password) = card.open_keys()?;
        let claim = card.claim(&CardId::derive(store.certificates(), ""))?;
        ReferenceData::of_card(&card.state(), &claim, Some(pin), puk, password, DEFAULT_TRIES)?;
        Ok(())
    }

    fn readme(&self) -> String {
        let keys = match self.nss {
            true => {
                "nssdb/                   its private keys and certificates, an NSS database\n\
                     nssdb.password           the password of that"
            }
            false => "*.key                    its private keys",
        };
        let admin = match self.admin_key_file {
            Some(_) => {
                "admin.key                the card management key (9B): by it, `vscclient card --writable` lets programs\n\
                     \x20                        such as piv-tool put certificates on the card and generate keys\n\
                     written/                 what they wrote: data objects and keys\n"
            }
            None => "",
        };
        format!(
            "\
A test card of {name}, made by `vscclient new-card`. Run these commands in this directory.

Without a VM, through the host's PC/SC service (packages pcscd, vsmartcard-vpcd, opensc):

    vscclient card . --background vpcd:
    opensc-tool --name
    pkcs11-tool --list-objects
    pkcs11-tool --login --test
    kill $(cat vscclient.pid)

In a VM of QEMU, started with
-usb -device usb-ccid,bus=usb-bus.0 -chardev socket,id=card,path=card.sock,server=on,wait=off
-device ccid-card-passthru,chardev=card

    vscclient card . unix:card.sock

Are the certificates good?

    openssl verify -CAfile ca.pem -crl_check -CRLfile crl.pem authentication.pem

What is here:

card.toml                what the card is made of
authentication.pem       logs in: TLS clients, smart card logon
signature.pem            signs mail and documents
encryption.pem           decrypts mail
card-authentication.pem  tells that the card is genuine; its key asks for no PIN
{keys}
{admin}state/                   PIN and PUK (hashes) and their counters
ca.pem, ca.key           the certification authority
crl.pem                  its list of revoked certificates

The directory can be moved. A copy of it is the same card: it has the same serial number, and PIN tries of its own.
Use only one of them.

Everything is for tests: whoever can read the keys has the card.
",
            name = self.name
        )
    }
}

fn make_directory(path: &Path) -> Result<(), NewCardError> {
    let made = DirBuilder::new().mode(0o700).create(path);
    made.map_err(|source| NewCardError::Io { path: path.to_owned(), source })
}

fn write(path: &Path, content: &[u8], mode: u32) -> Result<(), NewCardError> {
    let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path);
    let written = file.and_then(|mut file| file.write_all(content));
    written.map_err(|source| NewCardError::Io { path: path.to_owned(), source })
}

fn parse_name(text: &str) -> Result<String, String> {
    card_file::check_name(text).map(|()| text.to_owned()).map_err(str::to_owned)
}

fn parse_upn(text: &str) -> Result<String, String> {
    match text.split_once('@') {
        Some((user, realm)) if !user.is_empty() && !realm.is_empty() && !realm.contains('@') => {}
        _ => return Err("expected NAME@REALM".into()),
    }
    if text.len() > MAX_ADDRESS
        || text.chars().any(|char| card_file::is_control(char) || char.is_whitespace())
    {
        return Err(format!("expected at most {MAX_ADDRESS} bytes without spaces"));
    }
    Ok(text.to_owned())
}

fn parse_email(text: &str) -> Result<String, String> {
    // RFC 5280 §4.2.1.6: an rfc822Name is an IA5String.
    if text.is_ascii() { parse_upn(text) } else { Err("expected ASCII characters".into()) }
}
