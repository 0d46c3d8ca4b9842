//! An NSS database for a card's keys, made with NSS's own tools.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use openssl::pkcs12::Pkcs12;
use openssl::pkey::{PKey, Private};
use openssl::x509::X509;
use zeroize::Zeroizing;

use super::{NewCardError, write};

/// How much of a tool's complaint is passed on.
const MAX_SAID: usize = 300;

/// A new database with a random password in `password_file`, which is made too.
pub(super) struct Database<'a> {
    /// As NSS wants it.
    url: String,
    password_file: &'a Path,
    password: Zeroizing<String>,
    transport_file: std::path::PathBuf,
}

impl<'a> Database<'a> {
    pub(super) fn create(directory: &Path, password_file: &'a Path) -> Result<Self, NewCardError> {
        let mut random = Zeroizing::new([0; 16]);
        openssl::rand::rand_bytes(&mut *random)?;
        let password = Zeroizing::new(format!("{:032x}", u128::from_be_bytes(*random)));
        write(password_file, password.as_bytes(), 0o600)?;
        super::make_directory(directory)?;
        let url = directory.to_str().ok_or_else(|| NewCardError::NotText(directory.to_owned()))?;
        let transport_file = directory.with_extension("p12");
        let database = Self { url: format!("sql:{url}"), password_file, password, transport_file };
        let arguments: [&OsStr; 5] = [
            "-N".as_ref(),
            "-d".as_ref(),
            database.url.as_ref(),
            "-f".as_ref(),
            database.password_file.as_ref(),
        ];
        run("certutil", &arguments)?;
        Ok(database)
    }

    pub(super) fn add(
        &self,
        name: &str,
        certificate: &X509,
        key: &PKey<Private>,
    ) -> Result<(), NewCardError> {
        let archive = Pkcs12::builder().name(name).cert(certificate).pkey(key).build2(&self.password)?;
        write(&self.transport_file, &Zeroizing::new(archive.to_der()?), 0o600)?;
        let arguments: [&OsStr; 8] = [
            "-i".as_ref(),
            self.transport_file.as_ref(),
            "-d".as_ref(),
            self.url.as_ref(),
            "-k".as_ref(),
            self.password_file.as_ref(),
            "-w".as_ref(),
            self.password_file.as_ref(),
        ];
        let added = run("pk12util", &arguments);
        fs::remove_file(&self.transport_file)
            .map_err(|source| NewCardError::Io { path: self.transport_file.clone(), source })?;
        added
    }
}

fn run(program: &'static str, arguments: &[&OsStr]) -> Result<(), NewCardError> {
    let command = Command::new(program).args(arguments).env("LC_ALL", "C").stdin(Stdio::null()).output();
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
