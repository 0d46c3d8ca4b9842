//! A card's directory, as `vscclient new-card` makes it.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use emulated_card::keys::pem::PemSource;
use stack_tests::database::PIN;
use stack_tests::process::program;
use tempfile::TempDir;

/// What `new-card` calls the certificates.
pub(crate) const NAMES: [&str; 4] = ["authentication", "signature", "encryption", "card-authentication"];

/// A card with RSA-2048 keys. Removed when dropped.
pub(crate) struct CardDirectory {
    scratch: TempDir,
}

impl CardDirectory {
    /// With keys in PEM files.
    pub(crate) fn make() -> Result<Self> {
        Self::with(&[])
    }

    /// With keys in an NSS database.
    pub(crate) fn make_nss() -> Result<Self> {
        Self::with(&["--nss"])
    }

    fn with(options: &[&str]) -> Result<Self> {
        let scratch = tempfile::tempdir()?;
        let pin = scratch.path().join("pin");
        std::fs::write(&pin, PIN)?;
        let made = Command::new("chmod").arg("600").arg(&pin).status()?.success()
            && Command::new(program("vscclient")?)
                .arg("new-card")
                .arg(scratch.path().join("card"))
                .args(["--name", "Jane Doe", "--pin-file"])
                .arg(&pin)
                .args(options)
                .output()
                .context("vscclient")?
                .status
                .success();
        ensure!(made, "vscclient new-card makes no card");
        Ok(Self { scratch })
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.scratch.path().join("card")
    }

    /// A directory for what else is needed.
    pub(crate) fn scratch(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }
}

/// The keys and certificates in such a directory.
pub(crate) fn sources(path: &std::path::Path) -> Vec<PemSource> {
    let files = |name| PemSource::Pem {
        certificate: path.join(format!("{name}.pem")),
        key: path.join(format!("{name}.key")),
    };
    NAMES.map(files).into()
}
