//! The card in the host's own pcscd, through Debian's vpcd, and every program that uses cards there.

mod idle;
mod lifecycle;
mod opensc;
mod programs;
mod recipes;
pub(crate) mod yubico;

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use stack_tests::database::{Database, NAMES, PIN};
use stack_tests::pcscd::Pcscd;
use stack_tests::process::Process;

/// For cards with a PIN that is not the database's password.
const OWN_PIN: &str = "246810";
const OWN_PUK: &str = "13579135";
const MESSAGE: &[u8] = b"to be signed by the card\n";

/// What kind of card it is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Applet {
    Cac,
    Piv,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Algorithm {
    Rsa,
    P256,
    P384,
}

/// A card, and what programs are to say of it.
#[derive(Clone, Copy, Debug)]
struct Suite {
    applet: Applet,
    algorithm: Algorithm,
}

impl Suite {
    /// OpenSC's name of the card.
    fn name(self) -> &'static str {
        match self.applet {
            Applet::Cac => "Common Access Card (CAC)",
            Applet::Piv => "Personal Identity Verification Card",
        }
    }

    /// OpenSC's identifiers of the keys, in the order of the certificates.
    fn ids(self) -> [&'static str; 3] {
        match self.applet {
            Applet::Cac => ["0001", "0002", "0003"],
            Applet::Piv => ["01", "02", "03"],
        }
    }

    /// How many of the keys OpenSC lets sign: PIV's third one is for key management alone.
    fn signers(self) -> usize {
        match self.applet {
            Applet::Cac => 3,
            Applet::Piv => 2,
        }
    }

    /// The identifiers as a PKCS#11 URI has them.
    fn uri_ids(self) -> [&'static str; 3] {
        match self.applet {
            Applet::Cac => ["%00%01", "%00%02", "%00%03"],
            Applet::Piv => ["%01", "%02", "%03"],
        }
    }

    /// As ssh prints keys.
    fn ssh_type(self) -> &'static str {
        match self.algorithm {
            Algorithm::Rsa => "ssh-rsa ",
            Algorithm::P256 => "ecdsa-sha2-nistp256 ",
            Algorithm::P384 => "ecdsa-sha2-nistp384 ",
        }
    }

    /// openssl's digest that fits the key.
    fn digest(self) -> &'static str {
        if self.algorithm == Algorithm::P384 { "sha384" } else { "sha256" }
    }

    fn database(self) -> Result<Database> {
        match self.algorithm {
            Algorithm::Rsa => Database::with_password(),
            Algorithm::P256 => Database::on_curve("nistp256"),
            Algorithm::P384 => Database::on_curve("nistp384"),
        }
    }
}

/// A card in the first reader.
struct Bench {
    suite: Suite,
    pcscd: Pcscd,
    database: Database,
    card: Process,
}

impl Bench {
    async fn start(suite: Suite) -> Result<Self> {
        let (pcscd, database) = (Pcscd::start().await?, suite.database()?);
        let card = card(&pcscd, suite, &database, &["vpcd:"])?;
        Self::with(suite, pcscd, database, card).await
    }

    /// A card with a PIN of its own, and a PUK.
    async fn with_own_pin(suite: Suite) -> Result<Self> {
        let (pcscd, database) = (Pcscd::start().await?, suite.database()?);
        for (name, secret) in [("own-pin", OWN_PIN), ("own-puk", OWN_PUK), ("password", PIN)] {
            std::fs::write(pcscd.path(name), secret)?;
            std::fs::set_permissions(pcscd.path(name), Permissions::from_mode(0o600))?;
        }
        let files = ["--pin-file", "own-pin", "--puk-file", "own-puk", "--password-file", "password"];
        let card = card(&pcscd, suite, &database, &[&files[..], &["vpcd:"]].concat())?;
        Self::with(suite, pcscd, database, card).await
    }

    /// With a card that was started a moment ago.
    async fn with(suite: Suite, pcscd: Pcscd, database: Database, card: Process) -> Result<Self> {
        pcscd.card_in(0).await.with_context(|| card.log())?;
        std::fs::write(pcscd.path("message"), MESSAGE)?;
        Ok(Self { suite, pcscd, database, card })
    }

    /// The public key of a certificate in a file that openssl reads.
    fn public_key(&self, index: usize) -> Result<String> {
        Ok(self.database.public_key(NAMES[index])?.display().to_string())
    }

    /// pkcs11-tool with OpenSC and the PIN, with arguments without spaces.
    async fn pkcs11(&self, args: &str) -> Result<String> {
        self.pcscd.ok(&format!("pkcs11-tool --module {} --login --pin {PIN} {args}", module()?)).await
    }
}

/// vscclient with the database's three certificates.
fn card(pcscd: &Pcscd, suite: Suite, database: &Database, args: &[&str]) -> Result<Process> {
    let (spec, profile) = (database.spec(), if suite.applet == Applet::Piv { "piv" } else { "cac" });
    let mut all = vec!["--profile", profile, "--db", &spec];
    all.extend(NAMES.iter().flat_map(|name| ["--cert", name]));
    all.extend(args);
    pcscd.start_program("vscclient", all)
}

/// OpenSC as a PKCS#11 module.
pub(crate) fn module() -> Result<String> {
    let found = std::fs::read_dir("/usr/lib")?
        .filter_map(|entry| Some(entry.ok()?.path().join("opensc-pkcs11.so")))
        .chain([PathBuf::from("/usr/lib/opensc-pkcs11.so")])
        .find(|path| path.is_file())
        .context("opensc-pkcs11.so is missing: install the package opensc-pkcs11")?;
    Ok(found.display().to_string())
}

/// All of it with one kind of card.
async fn everything(suite: Suite) -> Result<()> {
    let bench = Bench::start(suite).await?;
    opensc::tools(&bench).await.context("OpenSC's tools")?;
    opensc::signatures(&bench).await.context("signatures")?;
    match suite.algorithm {
        Algorithm::Rsa => opensc::decryption(&bench).await.context("decryption")?,
        _ => opensc::key_agreement(&bench).await.context("key agreement")?,
    }
    opensc::wrong_pin(&bench).await.context("wrong PIN")?;
    opensc::own_test(&bench).await.context("pkcs11-tool --test")?;
    programs::gnutls(&bench).await.context("p11tool")?;
    programs::ssh(&bench).await.context("ssh")?;
    programs::openssl(&bench).await.context("openssl")?;
    programs::nss(&bench).await.context("NSS")?;
    let log = bench.card.log();
    ensure!(!log.contains("ERROR") && log.matches("card put in").count() == 1, "{log}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn cac_with_rsa_keys() -> Result<()> {
    everything(Suite { applet: Applet::Cac, algorithm: Algorithm::Rsa }).await
}

#[tokio::test(flavor = "multi_thread")]
async fn piv_with_rsa_keys() -> Result<()> {
    everything(Suite { applet: Applet::Piv, algorithm: Algorithm::Rsa }).await
}

#[tokio::test(flavor = "multi_thread")]
async fn piv_with_p256_keys() -> Result<()> {
    everything(Suite { applet: Applet::Piv, algorithm: Algorithm::P256 }).await
}

#[tokio::test(flavor = "multi_thread")]
async fn piv_with_p384_keys() -> Result<()> {
    everything(Suite { applet: Applet::Piv, algorithm: Algorithm::P384 }).await
}

/// The PIN is changed, and changed back; blocked by wrong ones it is unblocked with the PUK.
#[tokio::test(flavor = "multi_thread")]
async fn a_pin_of_its_own_is_changed_and_unblocked() -> Result<()> {
    for (applet, algorithm) in [
        (Applet::Cac, Algorithm::Rsa),
        (Applet::Piv, Algorithm::Rsa),
        (Applet::Piv, Algorithm::P256),
        (Applet::Piv, Algorithm::P384),
    ] {
        let bench = Bench::with_own_pin(Suite { applet, algorithm }).await?;
        opensc::own_pin(&bench).await.with_context(|| format!("{:?}", bench.suite))?;
    }
    Ok(())
}

/// A user's only certificate, as for mail: what it says of itself, and OpenSC of it, is so.
#[tokio::test(flavor = "multi_thread")]
async fn one_certificate_on_a_curve_signs_and_agrees_on_keys() -> Result<()> {
    let pcscd = Pcscd::start().await?;
    pcscd
        .ok("openssl req -x509 -nodes -newkey ec -pkeyopt ec_paramgen_curve:P-256 -subj /CN=Jane \
             -addext keyUsage=digitalSignature,keyAgreement -keyout jane.key -out jane.crt")
        .await?;
    for line in [
        "openssl pkey -in jane.key -pubout -out jane.pub",
        "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out peer",
        "openssl pkey -in peer -pubout -outform DER -out peer.pub",
        "openssl pkeyutl -derive -inkey peer -peerkey jane.pub -out expected",
    ] {
        pcscd.ok(line).await?;
    }
    std::fs::write(pcscd.path("message"), MESSAGE)?;
    std::fs::write(pcscd.path("pin"), OWN_PIN)?;
    std::fs::set_permissions(pcscd.path("pin"), Permissions::from_mode(0o600))?;
    let card =
        pcscd.start_program("vscclient", ["--pin-file", "pin", "--pem", "jane.crt,jane.key", "vpcd:"])?;
    pcscd.card_in(0).await.with_context(|| card.log())?;
    let pkcs11 = format!("pkcs11-tool --module {} --login --pin {OWN_PIN}", module()?);
    let said = pcscd.ok(&format!("{pkcs11} --list-objects --type privkey")).await?;
    let usage = said.lines().find(|line| line.contains("Usage:")).context("no key")?;
    ensure!(usage.contains("sign") && usage.contains("derive"), "{said}");
    for line in [
        &format!(
            "{pkcs11} --sign -m ECDSA-SHA256 --signature-format openssl --id 03 -i message -o signature"
        ),
        "openssl dgst -sha256 -verify jane.pub -signature signature message",
        &format!("{pkcs11} --derive -m ECDH1-DERIVE --id 03 -i peer.pub -o derived"),
    ] {
        pcscd.ok(line).await?;
    }
    ensure!(std::fs::read(pcscd.path("derived"))? == std::fs::read(pcscd.path("expected"))?);
    Ok(())
}
