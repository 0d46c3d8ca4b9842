//! An NSS database for a card's keys, made with NSS's own tools.

use std::fs;
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use openssl::pkcs12::Pkcs12;
use openssl::pkey::{PKey, Private};
use openssl::x509::X509;
use zeroize::Zeroizing;

use super::{DATABASE, NewCardError, PASSWORD_FILE, make_directory, write};

/// How much of a tool's complaint is passed on.
const MAX_SAID: usize = 300;

/// The database, from the card's directory: an absolute path would be kept in its `pkcs11.txt`.
const URL: &str = "sql:nssdb";
/// Brings a key and its certificate there.
const TRANSPORT_FILE: &str = "nssdb.p12";

/// How often a password is hashed: slowness keeps nobody from guessing this one, which is random, and lies beside.
const ROUNDS: (&str, &str) = ("NSS_MAX_MP_PBE_ITERATION_COUNT", "1");

/// A new database in a card's directory, with a random password in a file beside it.
pub(super) struct Database<'a> {
    card: &'a Path,
    password: Zeroizing<String>,
}

impl<'a> Database<'a> {
    pub(super) fn create(card: &'a Path) -> Result<Self, NewCardError> {
        let mut random = Zeroizing::new([0; 16]);
        openssl::rand::rand_bytes(&mut *random)?;
        let password = Zeroizing::new(format!("{:032x}", u128::from_be_bytes(*random)));
        write(&card.join(PASSWORD_FILE), password.as_bytes(), 0o600)?;
        make_directory(&card.join(DATABASE))?;
        run(card, "certutil", &["-N", "-d", URL, "-f", PASSWORD_FILE])?;
        Ok(Self { card, password })
    }

    pub(super) fn add(
        &self,
        name: &str,
        certificate: &X509,
        key: &PKey<Private>,
    ) -> Result<(), NewCardError> {
        let archive = Pkcs12::builder().name(name).cert(certificate).pkey(key).build2(&self.password)?;
        let transport_file = self.card.join(TRANSPORT_FILE);
        write(&transport_file, &Zeroizing::new(archive.to_der()?), 0o600)?;
        let arguments = ["-i", TRANSPORT_FILE, "-d", URL, "-k", PASSWORD_FILE, "-w", PASSWORD_FILE];
        let added = run(self.card, "pk12util", &arguments);
        fs::remove_file(&transport_file)
            .map_err(|source| NewCardError::Io { path: transport_file, source })?;
        added
    }
}

fn run(card: &Path, program: &'static str, arguments: &[&str]) -> Result<(), NewCardError> {
    let mut command = Command::new(program);
    let command = command
        .args(arguments)
        .env("LC_ALL", "C")
        .env(ROUNDS.0, ROUNDS.1)
        .current_dir(card)
        .stdin(Stdio::null())
        .output();
    let output = match command {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(NewCardError::NoTool(program)),
        other => other.map_err(|source| NewCardError::Io { path: program.into(), source })?,
    };
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).chars().take(MAX_SAID).collect();
    Err(NewCardError::Tool { program, said })
}
