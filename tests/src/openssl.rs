//! What a card signed, and agreed on, is checked against the openssl command.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::database::Database;

/// What kind of keys a card has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    /// RSA of 2048 bits.
    Rsa,
    /// The curve P-256.
    P256,
    /// The curve P-384.
    P384,
}

impl Algorithm {
    /// The digest that is signed with such keys, as openssl calls it.
    pub fn digest(self) -> &'static str {
        if self == Self::P384 { "sha384" } else { "sha256" }
    }

    /// A database with such keys.
    pub fn database(self) -> Result<Database> {
        match self {
            Self::Rsa => Database::with_password(),
            Self::P256 => Database::on_curve("nistp256"),
            Self::P384 => Database::on_curve("nistp384"),
        }
    }

    /// Makes a key, PEM.
    pub fn generate(self, file: &Path) -> Result<()> {
        let [kind, option] = match self {
            Self::Rsa => ["RSA", "rsa_keygen_bits:2048"],
            Self::P256 => ["EC", "ec_paramgen_curve:P-256"],
            Self::P384 => ["EC", "ec_paramgen_curve:P-384"],
        };
        output(openssl().args(["genpkey", "-algorithm", kind, "-pkeyopt", option, "-out"]).arg(file))
            .map(drop)
    }
}

/// The public key of a certificate, both PEM, in a file beside it.
pub fn public_key(certificate: &Path) -> Result<PathBuf> {
    let file = certificate.with_extension("pub");
    let key = output(openssl().args(["x509", "-noout", "-pubkey", "-in"]).arg(certificate))?;
    std::fs::write(&file, key)?;
    Ok(file)
}

/// Whether `signature` (PKCS#1 v1.5, or ECDSA in DER) of `message` is that of a public key.
pub fn verifies(key: &Path, digest: &str, message: &[u8], signature: &[u8]) -> Result<bool> {
    let (data, sig) = (key.with_file_name("message"), key.with_file_name("signature"));
    std::fs::write(&data, message)?;
    std::fs::write(&sig, signature)?;
    let said = openssl()
        .args(["dgst", &format!("-{digest}"), "-verify"])
        .args([key, Path::new("-signature"), &sig, &data])
        .output()?;
    Ok(said.status.success() && said.stdout.starts_with(b"Verified OK"))
}

/// What a key on a curve and another's public key, PEM, agree on (ECDH).
pub fn agree(key: &Path, other: &Path) -> Result<Vec<u8>> {
    output(openssl().args(["pkeyutl", "-derive", "-inkey"]).arg(key).arg("-peerkey").arg(other))
}

/// The public half of a private key, DER.
pub fn public_half(key: &Path) -> Result<Vec<u8>> {
    output(openssl().args(["pkey", "-pubout", "-outform", "DER", "-in"]).arg(key))
}

/// `message` encrypted to a public key, PKCS#1 v1.5.
pub fn encrypt(key: &Path, message: &[u8]) -> Result<Vec<u8>> {
    let plain = key.with_file_name("plain");
    std::fs::write(&plain, message)?;
    output(openssl().args(["pkeyutl", "-encrypt", "-pubin", "-inkey"]).arg(key).arg("-in").arg(plain))
}

fn openssl() -> Command {
    Command::new("openssl")
}

/// What a program prints; its complaints if it fails.
pub(crate) fn output(command: &mut Command) -> Result<Vec<u8>> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("{name} cannot be started; `cargo xtask setup` installs it"))?;
    if !output.status.success() {
        bail!("{name}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(output.stdout)
}
