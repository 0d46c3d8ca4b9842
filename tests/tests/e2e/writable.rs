//! A card that OpenSC's piv-tool writes to, in the host's own pcscd: a new key, a certificate for it, and its use.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, Result, ensure};
use stack_tests::pcscd::Pcscd;
use stack_tests::process::{Process, program};

const PIN: &str = "123456";
const TRIPLE_DES: &str = "010203040506070801020304050607080102030405060708";
const AES: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";

/// A card in the directory `card`, and what piv-tool says of its management key (9B).
struct Bench {
    pcscd: Pcscd,
    card: Process,
    /// As in `piv-tool --admin`: mutual authentication. The other kind does not work in OpenSC 0.23, which gives up
    /// before it has sent an answer.
    admin: &'static str,
}

impl Bench {
    async fn start(algorithm: &str, key: &str, admin: &'static str) -> Result<Self> {
        let pcscd = Pcscd::start().await?;
        for (name, text) in [("pin", PIN), ("admin", key), ("wrong", &key.replace('1', "2"))] {
            let mut file = OpenOptions::new().write(true).create(true).mode(0o600).open(pcscd.path(name))?;
            file.write_all(text.as_bytes())?;
        }
        let mut make = pcscd.command(program("vscclient")?);
        make.args(["new-card", "card", "--name", "Jane", "--pin-file", "pin", "--algorithm", "p256"]);
        make.args(["--admin-key-file", "admin", "--admin-algorithm", algorithm]);
        let made = pcscd.run(make).await?;
        ensure!(made.status.success(), "{}", made.text);
        let card = pcscd.start_program("vscclient", ["card", "card", "--writable", "vpcd:"])?;
        pcscd.card_in(0).await.with_context(|| card.log())?;
        fs::write(pcscd.path("message"), "to be signed by the card\n")?;
        fs::write(pcscd.path("usage"), "keyUsage=digitalSignature\n")?;
        Ok(Self { pcscd, card, admin })
    }

    /// piv-tool as the card's administrator: whether it succeeded, and what it said.
    async fn piv_tool(&self, key: &str, args: &str) -> Result<(bool, String)> {
        let ran = self
            .pcscd
            .words(&format!("env PIV_EXT_AUTH_KEY={key} piv-tool --admin {} {args}", self.admin))
            .await?;
        // It ends with 0 also when it was refused.
        let failed = ["failed", "unable", "not supported"].iter().any(|word| ran.text.contains(word));
        Ok((ran.status.success() && !failed, ran.text))
    }

    /// Has a CA certify the public key in a file, and puts that on the card.
    async fn certify(&self, public_key: &str, slot: &str) -> Result<()> {
        self.pcscd
            .ok(&format!(
                "openssl x509 -new -force_pubkey {public_key} -subj /CN=Renewed -CA card/ca.pem -CAkey card/ca.key \
                 -extfile usage -days 30 -out renewed.pem"
            ))
            .await?;
        let (good, said) =
            self.piv_tool("card/admin.key", &format!("--cert {slot} --in renewed.pem")).await?;
        ensure!(good, "{said}");
        Ok(())
    }

    /// Makes a signature with the key in slot 9A, and compares it with a public key.
    async fn sign(&self, mechanism: &str, format: &str, public_key: &str) -> Result<()> {
        // OpenSC keeps what it saw of a card.
        let _ = fs::remove_dir_all(self.pcscd.path("home/.cache"));
        let _ = fs::remove_dir_all(self.pcscd.path("home/opensc"));
        let module = super::host::module()?;
        self.pcscd
            .ok(&format!(
                "pkcs11-tool --module {module} --login --pin {PIN} --sign --mechanism {mechanism} {format} --id 01 \
                 --input-file message --output-file signature"
            ))
            .await?;
        self.pcscd
            .ok(&format!("openssl dgst -sha256 -verify {public_key} -signature signature message"))
            .await?;
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn piv_tool_makes_a_key_and_puts_its_certificate() -> Result<()> {
    let mut bench = Bench::start("3des", TRIPLE_DES, "M:9B:03").await?;
    let (written, old) = (bench.pcscd.path("card/written"), "old.pub");
    bench.pcscd.ok(&format!("openssl x509 -in card/authentication.pem -pubkey -noout -out {old}")).await?;
    let (good, said) = bench.piv_tool("wrong", "--genkey 9A:07 --out new.pub").await?;
    ensure!(!good && !written.exists(), "{said}");
    bench.sign("ECDSA-SHA256", "--signature-format openssl", old).await?;

    let (good, said) = bench.piv_tool("card/admin.key", "--genkey 9A:07 --out new.pub").await?;
    ensure!(good, "{said}");
    bench.certify("new.pub", "9A").await?;
    bench.sign("SHA256-RSA-PKCS", "", "new.pub").await?;
    let listed = bench.pcscd.ok("pkcs15-tool --read-certificate 01").await?;
    let renewed = fs::read_to_string(bench.pcscd.path("renewed.pem"))?;
    ensure!(listed.contains(renewed.trim()), "{listed}");

    // All of it is there the next time; the card is then as it was left, with the same PIN.
    bench.card.terminate().await?;
    bench.pcscd.ok("guest-pcsc wait-card absent 30 0").await?;
    bench.card = bench.pcscd.start_program("vscclient", ["card", "card", "vpcd:"])?;
    bench.pcscd.card_in(0).await?;
    let (good, said) = bench.piv_tool("card/admin.key", "--genkey 9A:07 --out newer.pub").await?;
    ensure!(!good, "{said}");
    bench.sign("SHA256-RSA-PKCS", "", "new.pub").await
}

#[tokio::test(flavor = "multi_thread")]
async fn piv_tool_makes_a_key_on_a_curve_with_aes() -> Result<()> {
    let bench = Bench::start("aes256", AES, "M:9B:0C").await?;
    // OpenSC 0.23 has the card make the key, and then cannot print it.
    bench.piv_tool("card/admin.key", "--genkey 9A:14 --out new.pub").await?;
    bench.pcscd.ok("openssl pkey -in card/written/9a.key -pubout -out new.pub").await?;
    bench.certify("new.pub", "9A").await?;
    bench.sign("ECDSA-SHA256", "--signature-format openssl", "new.pub").await
}
