//! A token of SoftHSM: what hardware mode works with, as far as software can play it.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};
use tempfile::TempDir;

use crate::openssl::{self, Algorithm, output};

/// SoftHSM's PKCS#11 module.
pub const MODULE: &str = "/usr/lib/softhsm/libsofthsm2.so";
/// The token's PIN.
pub const PIN: &str = "161803";
/// What it calls itself.
pub const LABEL: &str = "test token";

/// A token in a place of its own; a program sees it that has [`configuration`](Self::configuration).
pub struct Token {
    directory: TempDir,
}

impl Token {
    /// A token with a key and a certificate for each algorithm; their identifiers are 01, 02, ….
    pub fn with_keys(algorithms: &[Algorithm]) -> Result<Self> {
        ensure!(Path::new(MODULE).is_file(), "{MODULE} is missing: install the package softhsm2");
        let token = Self { directory: tempfile::tempdir()? };
        std::fs::create_dir(token.path("tokens"))?;
        let configuration = format!("directories.tokendir = {}\n", token.path("tokens").display());
        std::fs::write(token.configuration(), configuration)?;
        token.run("softhsm2-util", &["--init-token", "--free", "--label", LABEL, "--so-pin", "12345678"])?;
        for (number, algorithm) in (1..).zip(algorithms) {
            token.add(number, *algorithm)?;
        }
        Ok(token)
    }

    fn add(&self, number: usize, algorithm: Algorithm) -> Result<()> {
        let (key, certificate) = (self.path(&format!("{number}.key")), self.path(&format!("{number}.pem")));
        algorithm.generate(&key)?;
        let subject = format!("/CN=Jane Doe {number}");
        let mut request = Command::new("openssl");
        request.args(["req", "-x509", "-subj", &subject, "-addext", "basicConstraints=CA:FALSE", "-key"]);
        output(request.arg(&key).arg("-out").arg(&certificate))?;
        let (der, public) = (self.path("certificate.der"), self.path("public.der"));
        output(
            Command::new("openssl")
                .args(["x509", "-outform", "DER", "-in"])
                .args([&certificate])
                .arg("-out")
                .arg(&der),
        )?;
        std::fs::write(&public, openssl::public_half(&key)?)?;
        let use_for: &[&str] = match algorithm {
            Algorithm::Rsa => &["--usage-sign", "--usage-decrypt"],
            _ => &["--usage-sign", "--usage-derive"],
        };
        for (kind, file, more) in
            [("cert", &der, &[][..]), ("pubkey", &public, &[]), ("privkey", &key, use_for)]
        {
            let (id, file) = (format!("{number:02}"), file.display().to_string());
            let write = [
                "--module",
                MODULE,
                "--login",
                "--type",
                kind,
                "--id",
                &id,
                "--label",
                &id,
                "--write-object",
                &file,
            ];
            self.run("pkcs11-tool", &[&write, more].concat())?;
        }
        Ok(())
    }

    /// Runs a program that is to see the token, with the PIN.
    pub fn run(&self, program: &str, args: &[&str]) -> Result<Vec<u8>> {
        let mut command = Command::new(program);
        output(command.args(args).args(["--pin", PIN]).env("SOFTHSM2_CONF", self.configuration()))
    }

    /// The value of `SOFTHSM2_CONF` with which SoftHSM finds it.
    pub fn configuration(&self) -> PathBuf {
        self.path("softhsm2.conf")
    }

    /// The public key of the key with that number, PEM, in a file.
    pub fn public_key(&self, number: usize) -> Result<PathBuf> {
        openssl::public_key(&self.path(&format!("{number}.pem")))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}
