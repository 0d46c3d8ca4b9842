//! Debian's yubico-piv-tool. It sends SELECT and GENERAL AUTHENTICATE without Le, and takes no other answer to them than
//! 9000; all others it fetches with GET RESPONSE.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, Result, ensure};
use stack_tests::pcscd::{Pcscd, Ran};
use stack_tests::process::{Process, program};

use super::{OWN_PIN, OWN_PUK};

/// A card of `new-card`.
struct Bench {
    pcscd: Pcscd,
    /// Ends when this is dropped.
    _card: Process,
}

/// The tool with a card of vpcd's.
pub(crate) async fn tool(pcscd: &Pcscd, args: &str) -> Result<Ran> {
    pcscd.words(&format!("yubico-piv-tool --reader=Virtual {args}")).await
}

impl Bench {
    async fn start(algorithm: &str) -> Result<Self> {
        let pcscd = Pcscd::start().await?;
        for (name, secret) in [("pin", OWN_PIN), ("puk", OWN_PUK)] {
            let mut file =
                OpenOptions::new().write(true).create_new(true).mode(0o600).open(pcscd.path(name))?;
            file.write_all(secret.as_bytes())?;
        }
        let mut make = pcscd.command(program("vscclient")?);
        make.args(["new-card", "card", "--name", "Jane", "--algorithm", algorithm]);
        make.args(["--pin-file", "pin", "--puk-file", "puk"]);
        let made = pcscd.run(make).await?;
        ensure!(made.status.success(), "{}", made.text);
        let card = pcscd.start_program("vscclient", ["card", "card", "vpcd:"])?;
        pcscd.card_in(0).await.with_context(|| card.log())?;
        Ok(Self { pcscd, _card: card })
    }

    /// It has to end well.
    async fn ok(&self, args: &str) -> Result<String> {
        let ran = tool(&self.pcscd, args).await?;
        ensure!(ran.status.success(), "{args}: {}: {}", ran.status, ran.text);
        Ok(ran.text)
    }

    async fn fails(&self, args: &str, saying: &str) -> Result<()> {
        let ran = tool(&self.pcscd, args).await?;
        ensure!(!ran.status.success() && ran.text.contains(saying), "{args}: {}: {}", ran.status, ran.text);
        Ok(())
    }

    /// The keys work, by the rules of their slots. The tool compares what they do with the certificates.
    async fn keys(&self) -> Result<()> {
        let said = self.ok("-a status").await?;
        for part in
            ["Slot 9a:", "Slot 9c:", "Slot 9d:", "Slot 9e:", "OU=signature, CN=Jane", "PIN tries left:\t3"]
        {
            ensure!(said.contains(part), "{part}: {said}");
        }
        for slot in ["9a", "9c", "9d", "9e"] {
            self.ok(&format!("-a read-certificate -s {slot} -o {slot}.pem")).await?;
        }
        let verify = format!("-a verify-pin -P {OWN_PIN}");
        for (slot, pin) in [("9a", &verify[..]), ("9c", &verify[..]), ("9e", "")] {
            let said = self.ok(&format!("{pin} -a test-signature -s {slot} -i {slot}.pem")).await?;
            ensure!(said.contains("Successful"), "{said}");
        }
        self.fails(&format!("{verify} -a test-signature -s 9a -i 9c.pem"), "Failed").await?;
        self.fails("-a test-signature -s 9a -i 9a.pem", "Failed").await?;
        let said = self.ok(&format!("{verify} -a test-decipher -s 9d -i 9d.pem")).await?;
        ensure!(said.to_lowercase().contains("success"), "{said}");
        self.fails("-a test-decipher -s 9d -i 9d.pem", "").await
    }

    async fn pin(&self) -> Result<()> {
        const NEW_PIN: &str = "975310";
        const NEW_PUK: &str = "86420864";
        let verify = |pin: &str| format!("-a verify-pin -P {pin}");
        self.ok(&format!("-a change-pin -P {OWN_PIN} -N {NEW_PIN}")).await?;
        self.fails(&verify(OWN_PIN), "2 tries left").await?;
        self.ok(&verify(NEW_PIN)).await?;
        self.ok(&format!("-a change-puk -P {OWN_PUK} -N {NEW_PUK}")).await?;
        for left in ["2 tries left", "1 tries left", "blocked"] {
            self.fails(&verify(OWN_PIN), left).await?;
        }
        self.fails(&verify(NEW_PIN), "blocked").await?;
        self.fails(&format!("-a unblock-pin -P {OWN_PUK} -N {OWN_PIN}"), "").await?;
        self.ok(&format!("-a unblock-pin -P {NEW_PUK} -N {OWN_PIN}")).await?;
        self.ok(&verify(OWN_PIN)).await.map(drop)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn yubico_piv_tool_uses_the_keys_and_changes_pin_and_puk() -> Result<()> {
    for algorithm in ["rsa2048", "p256"] {
        let bench = Bench::start(algorithm).await?;
        bench.keys().await.with_context(|| algorithm.to_owned())?;
        bench.pin().await.with_context(|| algorithm.to_owned())?;
    }
    Ok(())
}
