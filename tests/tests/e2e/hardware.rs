//! Keys on tokens of the host: hardware mode.

use std::any::Any;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use stack_tests::database::{self, Database};
use stack_tests::guest::{Boot, Guest};
use stack_tests::host::Host;
use stack_tests::openssl::{self, Algorithm};
use stack_tests::passthru::{Link, Road};
use stack_tests::pcscd::Pcscd;
use stack_tests::process::{Process, program};
use stack_tests::reader::{Bus, Place};
use stack_tests::softhsm::{self, Token};
use tokio::process::Command;

use crate::piv::{PIN_STATUS, read_a_secret, sign, statuses, verify};

const WRONG: &str = "314159";
const MESSAGE: &[u8] = b"signed by a token of the host";

/// A guest whose pcscd has our reader, with a card in it.
async fn guest(qemu: Vec<String>) -> Result<Guest> {
    let guest = Guest::boot(Boot::with(qemu)).await?;
    guest.start_pcscd().await?;
    guest.ok("guest-pcsc wait-reader 30").await?;
    guest.ok("guest-pcsc wait-card present 30").await?;
    Ok(guest)
}

/// A signature in the guest is by the key that belongs to a certificate.
async fn signs(guest: &Guest, key: (&str, &str), algorithm: Algorithm, public_key: &Path) -> Result<()> {
    let signature = sign(guest, key, algorithm, MESSAGE).await?;
    let verifies = |message| openssl::verifies(public_key, algorithm.digest(), message, &signature);
    ensure!(verifies(MESSAGE)? && !verifies(b"another message")?, "signature of key {}", key.1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_softhsm_token_with_rsa_and_ec_keys() -> Result<()> {
    let algorithms = [Algorithm::Rsa, Algorithm::P256, Algorithm::Rsa];
    let (token, place, state) =
        (Token::with_keys(&algorithms)?, Place::new(Bus::Xhci)?, tempfile::tempdir()?);
    let configuration = token.configuration();
    let environment: [(&str, &OsStr); 2] =
        [("SOFTHSM2_CONF", configuration.as_ref()), ("XDG_STATE_HOME", state.path().as_ref())];
    let card = format!("host,module={},token={}", softhsm::MODULE, softhsm::LABEL);
    let daemon =
        Process::start("ccid-device", ["--reader", &place.reader(""), "--card", &card], &environment)?;
    daemon.line("ready").await?;

    // The token is that card's.
    let other = place.path("other");
    let vscclient = ["--module", softhsm::MODULE, &format!("unix-listen:{other}")];
    let mut second = Process::start("vscclient", vscclient, &environment)?;
    let line = second.line("the token \"test token\" has another card on it").await?;
    ensure!(second.ended().await?.code() == Some(3), "{line}");

    let guest = guest(place.qemu()).await?;
    let pin = softhsm::PIN;
    let objects = guest.ok(&format!("pkcs11-tool -O --login --pin {pin}")).await?;
    for kind in ["Certificate Object", "Private Key Object"] {
        let count = objects.matches(kind).count();
        ensure!(count == 3, "{count} of {kind}:\n{objects}");
    }
    for (number, id) in [(1, "01"), (2, "02")] {
        signs(&guest, (pin, id), algorithms[number - 1], &token.public_key(number)?).await?;
    }
    let secret = b"only the token can read this";
    guest.put("/tmp/encrypted", &openssl::encrypt(&token.public_key(3)?, secret)?).await?;
    let decrypt = "--decrypt --mechanism RSA-PKCS --id 03 -i /tmp/encrypted -o /tmp/decrypted";
    guest.ok(&format!("pkcs11-tool {decrypt} --login --pin {pin}")).await?;
    ensure!(guest.get("/tmp/decrypted").await? == secret, "decrypted");

    // SoftHSM does not count wrong PINs: then the card does, and keeps the last try.
    let ran = guest.run(&format!("pkcs11-tool -O --login --pin {WRONG}")).await?;
    ensure!(ran.text().contains("CKR_PIN_INCORRECT"), "{}", ran.text());
    let said = statuses(&guest, &[PIN_STATUS, &verify(pin), "reset", PIN_STATUS]).await?;
    ensure!(said == ["63C2", "9000", "RESET", "63C3"], "{said:?}");
    let wrong = verify(WRONG);
    let said = statuses(&guest, &[&wrong, &wrong, &wrong, &verify(pin)]).await?;
    ensure!(said == ["63C2", "63C1", "6983", "6983"], "{said:?}");
    // It is the guest that has no try left; the host uses its token as before, which tells of the right PIN.
    token.run("pkcs11-tool", &["--module", softhsm::MODULE, "--login", "-O"])?;
    let said = statuses(&guest, &[PIN_STATUS, &wrong, &wrong, &wrong]).await?;
    ensure!(said == ["63C3", "63C2", "63C1", "6983"], "{said:?}");
    let unlock = ["unlock", "--module", softhsm::MODULE, "--token", softhsm::LABEL];
    let mut unlock = Process::start("vscclient", unlock, &environment)?;
    ensure!(unlock.ended().await?.success(), "{}", unlock.log());
    let said = statuses(&guest, &[PIN_STATUS, &verify(pin)]).await?;
    ensure!(said == ["63C3", "9000"], "{said:?}");
    Ok(())
}

/// The modules are those of an NSS directory, as browsers keep it.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_of_an_nss_directory() -> Result<()> {
    let (token, database) = (Token::with_keys(&[Algorithm::P256])?, Database::with_password()?);
    let (host, state) = (Host::new()?, tempfile::tempdir()?);
    let configuration = token.configuration();
    let environment: [(&str, &OsStr); 2] =
        [("SOFTHSM2_CONF", configuration.as_ref()), ("XDG_STATE_HOME", state.path().as_ref())];
    let spec = database.spec();
    let mut add = Command::new("modutil");
    add.args(["-force", "-dbdir", &spec, "-add", "softhsm", "-libfile", softhsm::MODULE]).envs(environment);
    let mut add = Process::spawn(add).context("modutil of the package libnss3-tools")?;
    ensure!(add.ended().await?.success(), "{}", add.log());
    let endpoint = host.endpoint();
    let args = ["--profile", "piv", "--db", &spec, "--token", softhsm::LABEL, &endpoint];
    let client = Process::start("vscclient", args, &environment)?;
    let mut peer = host.card().await.with_context(|| client.log())?;
    // Only its modules are used: the database's PIN is not the token's.
    for (pin, expected) in [(database::PIN, [0x63, 0xC2]), (softhsm::PIN, [0x90, 0x00])] {
        let mut verify = stack_tests::host::verify(pin);
        verify[3] = 0x80;
        ensure!(peer.transmit(&verify).await? == expected, "{}", client.log());
    }
    Ok(())
}

const PIN: &str = "271828";

/// Our card as a token: in a reader of the host, and from there through OpenSC and NSS into the guest.
struct Circle {
    pcscd: Pcscd,
    card: Process,
    client: Process,
    guest: Guest,
    /// Where the sockets are.
    _sockets: Box<dyn Any>,
}

impl Circle {
    /// In our reader; the token is there from the start.
    async fn in_our_reader(algorithm: &str) -> Result<Self> {
        let (pcscd, place) = (Self::host(algorithm).await?, Place::new(Bus::Xhci)?);
        let card = Self::insert(&pcscd).await?;
        let option = format!("host,module={}", opensc()?);
        let client =
            pcscd.start_program("ccid-device", ["--reader", &place.reader(""), "--card", &option])?;
        client.line("ready").await?;
        let guest = guest(place.qemu()).await.with_context(|| client.log())?;
        Ok(Self { pcscd, card, client, guest, _sockets: Box::new(place) })
    }

    /// In QEMU's reader; the token comes later.
    async fn in_the_reader_of_qemu(algorithm: &str) -> Result<Self> {
        let (pcscd, link) = (Self::host(algorithm).await?, Link::new(Road::Unix)?);
        let client = pcscd.start_program("vscclient", ["--module", opensc()?, &link.endpoint()])?;
        client.line("trying again").await?;
        let card = Self::insert(&pcscd).await?;
        let guest = guest(link.qemu()).await.with_context(|| client.log())?;
        Ok(Self { pcscd, card, client, guest, _sockets: Box::new(link) })
    }

    /// A host with a new card of ours, not in a reader yet.
    async fn host(algorithm: &str) -> Result<Pcscd> {
        let pcscd = Pcscd::start().await?;
        std::fs::write(pcscd.path("pin"), PIN)?;
        pcscd.ok("chmod 600 pin").await?;
        let mut new_card = pcscd.command(program("vscclient")?);
        new_card.args(["new-card", "token", "--name", "Jane Doe", "--pin-file", "pin"]);
        new_card.args(["--algorithm", algorithm]);
        let made = pcscd.run(new_card).await?;
        ensure!(made.status.success(), "{}", made.text);
        Ok(pcscd)
    }

    async fn insert(pcscd: &Pcscd) -> Result<Process> {
        let card = pcscd.start_program("vscclient", ["card", "token", "vpcd:"])?;
        pcscd.card_in(0).await.with_context(|| card.log())?;
        Ok(card)
    }

    /// The public key of one of the card's certificates.
    fn public_key(&self, name: &str) -> Result<PathBuf> {
        openssl::public_key(&self.pcscd.path("token").join(format!("{name}.pem")))
    }

    /// The signature key wants the PIN just before each signature.
    async fn all_keys_work(&self, algorithm: Algorithm) -> Result<()> {
        for (id, name) in [("01", "authentication"), ("02", "signature"), ("04", "card-authentication")] {
            let signed = signs(&self.guest, (PIN, id), algorithm, &self.public_key(name)?).await;
            signed.with_context(|| format!("key {id}: {}", self.client.log()))?;
        }
        read_a_secret(&self.guest, PIN, algorithm, &self.public_key("encryption")?).await
    }

    async fn pull_out(&mut self) -> Result<()> {
        let mark = self.client.mark();
        let gone = self.guest.ok("guest-pcsc wait-card absent 30");
        let (gone, ended) = tokio::join!(gone, self.card.terminate());
        gone.with_context(|| self.client.log())?;
        ensure!(ended?.success(), "{}", self.card.log());
        self.client.line_after(mark, "is gone").await.map(drop)
    }

    async fn put_back(&mut self) -> Result<()> {
        self.card = Self::insert(&self.pcscd).await?;
        self.guest.ok("guest-pcsc wait-card present 30").await.with_context(|| self.client.log()).map(drop)
    }

    /// The guest gets these status words for these commands.
    async fn answers(&self, commands: &[&str], expected: &[&str]) -> Result<()> {
        let said = statuses(&self.guest, commands).await?;
        ensure!(said == expected, "{said:?}, not {expected:?}: {}", self.client.log());
        Ok(())
    }

    /// The status of the token's PIN, as a program of the host sees it.
    async fn token_status(&self) -> Result<String> {
        let said = self.pcscd.ok(&format!("guest-pcsc transmit {PIN_STATUS}")).await?;
        Ok(said.split(' ').next().unwrap_or_default().to_uppercase())
    }
}

/// OpenSC as a PKCS#11 module.
fn opensc() -> Result<&'static str> {
    let path = "/usr/lib/x86_64-linux-gnu/opensc-pkcs11.so";
    ensure!(Path::new(path).is_file(), "{path} is missing: install the package opensc-pkcs11");
    Ok(path)
}

async fn full_circle(mut circle: Circle, algorithm: Algorithm) -> Result<()> {
    let said = circle.guest.ok("opensc-tool -n").await?;
    ensure!(said.contains("Personal Identity Verification Card"), "{said}");
    circle.all_keys_work(algorithm).await?;

    // A wrong PIN is wrong for the token, which counts it; the right one gives the tries back.
    circle.answers(&[&verify(WRONG)], &["63C2"]).await?;
    ensure!(circle.token_status().await? == "63C2");
    circle.answers(&[&verify(PIN), PIN_STATUS], &["9000", "9000"]).await?;

    // Pulled out while its PIN is verified in the guest.
    let forever = format!("{}{}", verify(PIN), format!(" {PIN_STATUS}").repeat(20_000));
    circle.guest.put("/tmp/verify", format!("guest-pcsc transmit {forever}").as_bytes()).await?;
    circle.guest.ok("setsid sh /tmp/verify >/tmp/verified 2>&1 &").await?;
    circle.guest.ok("while ! grep -q 9000 /tmp/verified; do usleep 20000; done").await?;
    circle.guest.ok("pidof guest-pcsc").await?;
    circle.pull_out().await?;
    circle.put_back().await?;
    circle.answers(&[PIN_STATUS], &["63C3"]).await?;
    circle.all_keys_work(algorithm).await?;

    // The guest does not get at the last try of the token, not even when it comes anew, until the right PIN is given
    // on the host.
    let (right, wrong) = (verify(PIN), verify(WRONG));
    circle.answers(&[&wrong, &wrong, &wrong, &right], &["63C2", "63C1", "6983", "6983"]).await?;
    circle.pull_out().await?;
    circle.put_back().await?;
    circle.answers(&[&wrong, &right], &["6983", "6983"]).await?;
    ensure!(circle.token_status().await? == "63C1");
    circle.pcscd.ok(&format!("pkcs11-tool --module {} -O --login --pin {PIN}", opensc()?)).await?;
    circle.answers(&[&right], &["9000"]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn our_rsa_card_as_a_token() -> Result<()> {
    full_circle(Circle::in_our_reader("rsa2048").await?, Algorithm::Rsa).await
}

#[tokio::test(flavor = "multi_thread")]
async fn our_p256_card_as_a_token() -> Result<()> {
    full_circle(Circle::in_our_reader("p256").await?, Algorithm::P256).await
}

#[tokio::test(flavor = "multi_thread")]
async fn our_p384_card_as_a_token_behind_the_reader_of_qemu() -> Result<()> {
    full_circle(Circle::in_the_reader_of_qemu("p384").await?, Algorithm::P384).await
}
