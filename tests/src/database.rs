//! NSS databases with certificates, made by NSS's own tools.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use anyhow::Result;
use tempfile::TempDir;

use crate::openssl::{self, output};

/// Nicknames of the three certificates.
pub const NAMES: [&str; 3] = ["id-cert", "signing-cert", "encryption-cert"];
/// The databases' password, which is the card's PIN.
pub const PIN: &str = "271828";

/// A database of three certificates and their keys, RSA-2048 if not said otherwise. Removed when dropped.
pub struct Database {
    directory: TempDir,
}

impl Database {
    /// A database whose password is [`PIN`].
    pub fn with_password() -> Result<Self> {
        Self::like(PIN, "rsa")
    }

    /// The same with keys on a curve that certutil knows, such as `nistp256`.
    pub fn on_curve(curve: &'static str) -> Result<Self> {
        Self::like(PIN, curve)
    }

    /// A database without a password.
    pub fn without_password() -> Result<Self> {
        Self::like("", "rsa")
    }

    /// Generating keys takes seconds, so each kind is made once and copied; the keys are the same in all copies.
    fn like(password: &'static str, keys: &'static str) -> Result<Self> {
        static MADE: Mutex<Vec<((&str, &str), Files)>> = Mutex::new(Vec::new());
        let wanted = (password, keys);
        let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
        if !made.iter().any(|(kind, _)| *kind == wanted) {
            made.push((wanted, make(password, keys)?));
        }
        let directory = tempfile::tempdir()?;
        for (name, content) in made.iter().filter(|(kind, _)| *kind == wanted).flat_map(|(_, files)| files) {
            std::fs::write(directory.path().join(name), content)?;
        }
        Ok(Self { directory })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// As `--db` takes it.
    pub fn spec(&self) -> String {
        format!("sql:{}", self.path().display())
    }

    /// The public key of a certificate, PEM, in a file of the database's directory.
    pub fn public_key(&self, name: &str) -> Result<PathBuf> {
        let certificate =
            output(Command::new("certutil").args(["-L", "-a", "-n", name, "-d", &self.spec()]))?;
        let pem = self.path().join(format!("{name}.pem"));
        std::fs::write(&pem, certificate)?;
        openssl::public_key(&pem)
    }

    /// Whether openssl takes `signature` (PKCS#1 v1.5, SHA-256) of `message` for that of a certificate's key.
    pub fn verifies(&self, name: &str, message: &[u8], signature: &[u8]) -> Result<bool> {
        openssl::verifies(&self.public_key(name)?, "sha256", message, signature)
    }

    /// `message` encrypted to a certificate, PKCS#1 v1.5.
    pub fn encrypt(&self, name: &str, message: &[u8]) -> Result<Vec<u8>> {
        openssl::encrypt(&self.public_key(name)?, message)
    }
}

/// Names and contents.
type Files = Vec<(OsString, Vec<u8>)>;

fn make(password: &str, keys: &str) -> Result<Files> {
    let directory = tempfile::tempdir()?;
    let path = directory.path();
    let (spec, secret, noise) =
        (format!("sql:{}", path.display()), path.join("password"), path.join("noise"));
    std::fs::write(&secret, password)?;
    std::fs::write(&noise, std::fs::read("/proc/sys/kernel/random/uuid")?.repeat(8))?;
    let certutil = |args: &[&str]| {
        let mut command = Command::new("certutil");
        command.args(args).args(["-d", &spec, "-f"]).arg(&secret);
        output(&mut command)
    };
    certutil(&["-N"])?;
    let noise = noise.to_string_lossy();
    let kind = if keys == "rsa" { ["-k", "rsa", "-g", "2048"] } else { ["-k", "ec", "-q", keys] };
    let common = [&["-S", "-z", &noise, "-v", "120"][..], &kind].concat();
    let signed = |args: &[&str]| certutil(&[&common[..], args].concat());
    signed(&["-n", "test-ca", "-s", "CN=Test CA", "-x", "-t", "TC,TC,TC", "-m", "1"])?;
    for (serial, name) in ["2", "3", "4"].into_iter().zip(NAMES) {
        let subject = format!("CN=Jane Doe {name}");
        signed(&["-n", name, "-s", &subject, "-c", "test-ca", "-t", ",,", "-m", serial])?;
    }
    let files = ["cert9.db", "key4.db", "pkcs11.txt"];
    files.into_iter().map(|name| Ok((name.into(), std::fs::read(path.join(name))?))).collect()
}
