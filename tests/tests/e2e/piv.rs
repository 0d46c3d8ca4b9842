//! The PIV card in the guest, and the card that is both PIV and CAC, which OpenSC takes for PIV.

use std::path::Path;

use anyhow::{Result, ensure};
use stack_tests::database::{Database, NAMES, PIN};
use stack_tests::guest::Guest;
use stack_tests::hex;
use stack_tests::openssl::{self, Algorithm};
use stack_tests::passthru::{self, Road};
use stack_tests::reader::{Bus, Stack, certificates_as};

use crate::card::lock_and_unlock;

/// What OpenSC calls the keys for authentication, signatures and key management. The last one does not sign.
pub(crate) const IDS: [&str; 3] = ["01", "02", "03"];

/// VERIFY without a PIN asks whether it is verified, and how many tries are left (SP 800-73-4 Part 2 §3.2.1).
pub(crate) const PIN_STATUS: &str = "00200080";

/// VERIFY of the PIV card application's PIN.
pub(crate) fn verify(pin: &str) -> String {
    let mut filled = pin.as_bytes().to_vec();
    filled.resize(8, 0xFF);
    format!("0020008008{}", hex(&filled))
}

/// The status words that the card answers to commands of one connection.
pub(crate) async fn statuses(guest: &Guest, commands: &[&str]) -> Result<Vec<String>> {
    let said = guest.ok(&format!("guest-pcsc transmit {}", commands.join(" "))).await?;
    Ok(said.lines().filter_map(|line| line.split(' ').next()).map(str::to_uppercase).collect())
}

/// A signature made in the guest.
pub(crate) async fn sign(
    guest: &Guest,
    (pin, id): (&str, &str),
    algorithm: Algorithm,
    message: &[u8],
) -> Result<Vec<u8>> {
    guest.put("/tmp/message", message).await?;
    let what = match algorithm {
        Algorithm::Rsa => "--mechanism SHA256-RSA-PKCS -i /tmp/message",
        _ => {
            let digest = algorithm.digest();
            guest.ok(&format!("openssl dgst -{digest} -binary -out /tmp/hash /tmp/message")).await?;
            "--mechanism ECDSA --signature-format openssl -i /tmp/hash"
        }
    };
    guest.ok(&format!("pkcs11-tool --sign {what} --login --pin {pin} --id {id} -o /tmp/signature")).await?;
    guest.get("/tmp/signature").await
}

/// OpenSC takes the card for PIV, lists three keys and signs with two of them.
async fn list_and_sign(guest: &Guest, database: &Database, algorithm: Algorithm) -> Result<()> {
    let name = guest.ok("opensc-tool -n").await?;
    ensure!(name.contains("Personal Identity Verification Card"), "{name}");
    let objects = guest.ok(&format!("pkcs11-tool -L -O --login --pin {PIN}")).await?;
    for kind in ["Certificate Object", "Public Key Object", "Private Key Object"] {
        let count = objects.matches(kind).count();
        ensure!(count == 3, "{count} of {kind}:\n{objects}");
    }
    ensure!(objects.contains("login required"), "{objects}");
    for (id, name) in IDS.into_iter().zip(NAMES).take(2) {
        let message = format!("signed with {name}");
        let signature = sign(guest, (PIN, id), algorithm, message.as_bytes()).await?;
        let (key, digest) = (database.public_key(name)?, algorithm.digest());
        ensure!(openssl::verifies(&key, digest, message.as_bytes(), &signature)?, "signature of {name}");
        ensure!(!openssl::verifies(&key, digest, b"another message", &signature)?, "any message verifies");
    }
    Ok(())
}

/// What the key management key is for.
pub(crate) async fn read_a_secret(
    guest: &Guest,
    pin: &str,
    algorithm: Algorithm,
    public_key: &Path,
) -> Result<()> {
    let (what, input, expected) = if algorithm == Algorithm::Rsa {
        let secret = b"only the card can read this".to_vec();
        ("--decrypt --mechanism RSA-PKCS", openssl::encrypt(public_key, &secret)?, secret)
    } else {
        let peer = public_key.with_file_name("peer");
        algorithm.generate(&peer)?;
        (
            "--derive --mechanism ECDH1-DERIVE",
            openssl::public_half(&peer)?,
            openssl::agree(&peer, public_key)?,
        )
    };
    guest.put("/tmp/input", &input).await?;
    let id = IDS[2];
    guest
        .ok(&format!("pkcs11-tool {what} --login --pin {pin} --id {id} -i /tmp/input -o /tmp/output"))
        .await?;
    ensure!(guest.get("/tmp/output").await? == expected, "{what}");
    Ok(())
}

/// A program in the guest has the PIN verified and goes on asking whether it is; then the machine is reset.
async fn a_reboot_forgets_the_pin(guest: &Guest) -> Result<()> {
    let commands = format!("guest-pcsc transmit {}{}", verify(PIN), format!(" {PIN_STATUS}").repeat(20_000));
    guest.put("/tmp/verify", commands.as_bytes()).await?;
    guest.ok("setsid sh /tmp/verify >/tmp/verified 2>&1 &").await?;
    guest.ok("while ! grep -q 9000 /tmp/verified; do usleep 20000; done").await?;
    guest.ok("pidof guest-pcsc").await?;
    guest.reset().await?;
    guest.start_pcscd().await?;
    guest.ok("guest-pcsc wait-reader 30").await?;
    guest.ok("guest-pcsc wait-card present 30").await?;
    let status = statuses(guest, &[PIN_STATUS]).await?;
    ensure!(status == ["63C3"], "{status:?}");
    Ok(())
}

async fn everything(profile: &str, algorithm: Algorithm) -> Result<()> {
    let card = |database: &Database, _: &_| vec!["--card".into(), certificates_as(profile, database, "")];
    let stack = Stack::with(Bus::Xhci, "", algorithm.database()?, card).await?;
    let Stack { guest, database, .. } = &stack;
    guest.ok("guest-pcsc wait-card present 30").await?;
    list_and_sign(guest, database, algorithm).await?;
    read_a_secret(guest, PIN, algorithm, &database.public_key(NAMES[2])?).await?;
    let test = guest.ok(&format!("pkcs11-tool --test --login --pin {PIN}")).await?;
    ensure!(test.trim_end().ends_with("No errors"), "{test}");
    lock_and_unlock(guest, 0x80, database, stack.state.path()).await?;
    a_reboot_forgets_the_pin(guest).await
}

#[tokio::test(flavor = "multi_thread")]
async fn with_rsa_keys() -> Result<()> {
    everything("piv", Algorithm::Rsa).await
}

#[tokio::test(flavor = "multi_thread")]
async fn with_p256_keys() -> Result<()> {
    everything("piv", Algorithm::P256).await
}

#[tokio::test(flavor = "multi_thread")]
async fn with_p384_keys() -> Result<()> {
    everything("piv", Algorithm::P384).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dual_card_in_our_reader() -> Result<()> {
    everything("dual", Algorithm::Rsa).await
}

/// T=0 and short commands, the way QEMU's reader has them.
#[tokio::test(flavor = "multi_thread")]
async fn a_dual_card_in_the_reader_of_qemu() -> Result<()> {
    for algorithm in [Algorithm::Rsa, Algorithm::P384] {
        let stack = passthru::Stack::with(Road::Unix, algorithm.database()?, &["--profile", "dual"]).await?;
        list_and_sign(&stack.guest, &stack.database, algorithm).await?;
        read_a_secret(&stack.guest, PIN, algorithm, &stack.database.public_key(NAMES[2])?).await?;
    }
    Ok(())
}
