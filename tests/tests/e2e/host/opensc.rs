//! OpenSC: its own tools, and its PKCS#11 module driven by pkcs11-tool.

use anyhow::{Result, ensure};
use stack_tests::database::{NAMES, PIN};

use super::{Algorithm, Applet, Bench, MESSAGE, OWN_PIN, OWN_PUK, module};

/// The card is known for what it is, and listed without a complaint.
pub(super) async fn tools(bench: &Bench) -> Result<()> {
    let said = bench.pcscd.ok("opensc-tool -a").await?;
    ensure!(said.contains("3b:"), "{said}");
    let said = bench.pcscd.ok("opensc-tool -n").await?;
    ensure!(said.contains(bench.suite.name()), "{said}");
    let said = bench.pcscd.ok("opensc-tool -l").await?;
    ensure!(said.lines().any(|line| line.starts_with("0    Yes")), "{said}");
    ensure!(said.lines().any(|line| line.starts_with("1    No")), "{said}");
    let said = bench.pcscd.ok("pkcs15-tool -D").await?;
    let unread = without_content(&said);
    if bench.suite.applet == Applet::Piv {
        // OpenSC 0.23 lists these for every PIV card. It never asks for the first, which its driver does not know,
        // and reads the last, which the standard keeps behind the PIN, as if it were public. Three certificates leave
        // the slot of the second empty.
        let expected = [
            "Unsigned Card Holder Unique Identifier",
            "X.509 Certificate for Card Authentication",
            "Cardholder Iris Image",
        ];
        ensure!(unread == expected, "{unread:?}: {said}");
    } else {
        ensure!(unread.is_empty(), "{unread:?}: {said}");
    }
    let complaints = ["error", "failed"].map(|word| said.to_lowercase().matches(word).count());
    ensure!(complaints == [0, unread.len()], "{said}");
    let said = bench.pkcs11("-O").await?;
    for id in bench.suite.ids() {
        let objects = said.lines().filter(|line| line.trim() == format!("ID:         {id}")).count();
        ensure!(objects == 3, "{objects} of key, public key and certificate {id}: {said}");
    }
    let said = bench.pkcs11("-L").await?;
    for part in ["login required", "token initialized", "PIN initialized"] {
        ensure!(said.contains(part), "{part}: {said}");
    }
    random(bench).await
}

/// Different numbers each time, of different bytes.
async fn random(bench: &Bench) -> Result<()> {
    let mut seen = Vec::new();
    for _ in 0..2 {
        bench.pkcs11("--generate-random 33 -o random").await?;
        seen.push(std::fs::read(bench.pcscd.path("random"))?);
    }
    let random = |bytes: &[u8]| bytes.len() == 33 && bytes.iter().any(|byte| *byte != bytes[0]);
    ensure!(seen.iter().all(|bytes| random(bytes)) && seen[0] != seen[1], "{seen:02X?}");
    Ok(())
}

/// The data objects that `pkcs15-tool -D` shows neither what is in nor what PIN is before.
fn without_content(said: &str) -> Vec<&str> {
    let objects = said.split("Data object '").skip(1);
    let unread =
        objects.filter(|object| !["Data (", "Auth ID:"].iter().any(|content| object.contains(content)));
    unread.filter_map(|object| object.split('\'').next()).collect()
}

/// A signature of each key and mechanism, verified by openssl.
pub(super) async fn signatures(bench: &Bench) -> Result<()> {
    let digest = bench.suite.digest();
    bench.pcscd.ok(&format!("openssl dgst -{digest} -binary -out hash message")).await?;
    for (index, id) in bench.suite.ids().into_iter().enumerate().take(bench.suite.signers()) {
        let key = bench.public_key(index)?;
        if bench.suite.algorithm == Algorithm::Rsa {
            for (mechanism, options) in [
                ("SHA256-RSA-PKCS", ""),
                ("SHA256-RSA-PKCS-PSS", "-sigopt rsa_padding_mode:pss -sigopt rsa_pss_saltlen:-1"),
            ] {
                bench.pkcs11(&format!("--sign -m {mechanism} --id {id} -i message -o signature")).await?;
                let verify =
                    format!("openssl dgst -sha256 -verify {key} {options} -signature signature message");
                bench.pcscd.ok(&verify).await?;
            }
        } else {
            let sign = format!("--sign -m ECDSA --signature-format openssl --id {id} -i hash -o signature");
            bench.pkcs11(&sign).await?;
            let verify = format!("openssl pkeyutl -verify -pubin -inkey {key} -sigfile signature -in hash");
            bench.pcscd.ok(&verify).await?;
        }
    }
    Ok(())
}

pub(super) async fn decryption(bench: &Bench) -> Result<()> {
    std::fs::write(bench.pcscd.path("encrypted"), bench.database.encrypt(NAMES[2], MESSAGE)?)?;
    let id = bench.suite.ids()[2];
    bench.pkcs11(&format!("--decrypt -m RSA-PKCS --id {id} -i encrypted -o decrypted")).await?;
    ensure!(std::fs::read(bench.pcscd.path("decrypted"))? == MESSAGE);
    Ok(())
}

/// Card and openssl come to the same secret.
pub(super) async fn key_agreement(bench: &Bench) -> Result<()> {
    let curve = if bench.suite.algorithm == Algorithm::P384 { "P-384" } else { "P-256" };
    let (key, id) = (bench.public_key(2)?, bench.suite.ids()[2]);
    for line in [
        &format!("openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:{curve} -out peer"),
        "openssl pkey -in peer -pubout -outform DER -out peer.pub",
        &format!("openssl pkeyutl -derive -inkey peer -peerkey {key} -out expected"),
    ] {
        bench.pcscd.ok(line).await?;
    }
    bench.pkcs11(&format!("--derive -m ECDH1-DERIVE --id {id} -i peer.pub -o derived")).await?;
    ensure!(std::fs::read(bench.pcscd.path("derived"))? == std::fs::read(bench.pcscd.path("expected"))?);
    Ok(())
}

/// It is called wrong, and the right one works as before.
pub(super) async fn wrong_pin(bench: &Bench) -> Result<()> {
    let login = format!("pkcs11-tool --module {} -O --login --pin", module()?);
    let ran = bench.pcscd.words(&format!("{login} 314159")).await?;
    ensure!(!ran.status.success() && ran.text.contains("CKR_PIN_INCORRECT"), "{}", ran.text);
    bench.pcscd.ok(&format!("{login} {PIN}")).await.map(drop)
}

/// OpenSC's own test of a token; its exit status tells nothing.
pub(super) async fn own_test(bench: &Bench) -> Result<()> {
    let said = bench.pkcs11("--test").await?;
    ensure!(said.lines().any(|line| line == "No errors"), "{said}");
    Ok(())
}

/// Changes a PIN and back, blocks it, and unblocks it with the PUK.
pub(super) async fn own_pin(bench: &Bench) -> Result<()> {
    const NEW_PIN: &str = "975310";
    let (pcscd, pkcs11) = (&bench.pcscd, format!("pkcs11-tool --module {}", module()?));
    let logs_in = async |pin: &str| -> Result<bool> {
        Ok(pcscd.words(&format!("{pkcs11} -O --login --pin {pin}")).await?.status.success())
    };
    ensure!(logs_in(OWN_PIN).await? && !logs_in(PIN).await?, "the database's password is no PIN");
    pcscd.ok(&format!("{pkcs11} --login --pin {OWN_PIN} --change-pin --new-pin {NEW_PIN}")).await?;
    ensure!(logs_in(NEW_PIN).await? && !logs_in(OWN_PIN).await?, "the PIN is changed");
    pcscd.ok(&format!("{pkcs11} --login --pin {NEW_PIN} --change-pin --new-pin {OWN_PIN}")).await?;
    ensure!(logs_in(OWN_PIN).await? && !logs_in(NEW_PIN).await?, "the PIN is changed back");
    // The wrong one just now was the first of three.
    for _ in 0..2 {
        ensure!(!logs_in("000000").await?);
    }
    let ran = pcscd.words(&format!("{pkcs11} -O --login --pin {OWN_PIN}")).await?;
    ensure!(ran.text.contains("CKR_PIN_LOCKED"), "{}", ran.text);
    pcscd.ok(&format!("pkcs15-tool --unblock-pin --auth-id 01 --puk {OWN_PUK} --new-pin {NEW_PIN}")).await?;
    ensure!(logs_in(NEW_PIN).await?, "the PIN is unblocked");
    Ok(())
}
