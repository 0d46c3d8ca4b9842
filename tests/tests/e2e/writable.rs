//! A card that OpenSC's piv-tool and yubico-piv-tool write to, in the host's own pcscd: a new key, a certificate for it,
//! and its use.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, Result, ensure};
use stack_tests::pcscd::Pcscd;
use stack_tests::process::{Process, program};

use crate::host::yubico;

const PIN: &str = "123456";
const TRIPLE_DES: &str = "010203040506070801020304050607080102030405060708";
const AES: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";

/// A card in the directory `card`, and what piv-tool says of its management key (9B).
struct Bench {
    pcscd: Pcscd,
    card: Process,
    /// As in `piv-tool --admin`: mutual authentication. At the other kind OpenSC 0.23 gives up before it has sent an
    /// answer.
    admin: &'static str,
}

impl Bench {
    async fn start(algorithm: &str, key: &str, admin: &'static str) -> Result<Self> {
        let pcscd = Pcscd::start().await?;
        for (name, text) in [("pin", PIN), ("admin", key), ("wrong", &key.replace('1', "2"))] {
            let mut file =
                OpenOptions::new().write(true).create_new(true).mode(0o600).open(pcscd.path(name))?;
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

    /// piv-tool as the card's administrator: whether it was taken for that, and what it said. How it ends tells nothing:
    /// OpenSC 0.23 has the card make a key and then cannot print it (OpenSC issue 3156), and after a certificate its
    /// exit status is a number of bytes.
    async fn piv_tool(&self, key: &str, args: &str) -> Result<(bool, String)> {
        let line = format!("env PIV_EXT_AUTH_KEY={key} piv-tool --admin {} {args}", self.admin);
        let said = self.pcscd.words(&line).await?.text;
        Ok((!said.contains("admin_mode failed"), said))
    }

    /// yubico-piv-tool as the administrator of a card with Triple DES, it has to end well.
    async fn yubico(&self, args: &str) -> Result<String> {
        let ran = yubico::tool(&self.pcscd, &format!("-k{TRIPLE_DES} {args}")).await?;
        ensure!(ran.status.success(), "{args}: {}: {}", ran.status, ran.text);
        Ok(ran.text)
    }

    /// What the card has in the data object with the tag 5FC1 and this byte, and the status word.
    async fn object(&self, tag: u8) -> Result<String> {
        let get = format!("guest-pcsc transmit 00CB3FFF0000055C035FC1{tag:02X}0000");
        let said = self.pcscd.ok(&get).await?;
        Ok(said.split(' ').next().unwrap_or_default().to_uppercase())
    }

    /// The certificate that OpenSC reads in slot 9A is that of a file.
    async fn has_certificate(&self, file: &str) -> Result<()> {
        let read = self.pcscd.ok("pkcs15-tool --read-certificate 01").await?;
        let wanted = fs::read_to_string(self.pcscd.path(file))?;
        ensure!(read.contains(wanted.trim()), "{read}");
        Ok(())
    }

    /// Makes a certificate for the key that is in slot 9A.
    async fn certify(&self) -> Result<()> {
        for line in [
            "openssl pkey -in card/written/9a.key -pubout -out new.pub",
            "openssl x509 -new -force_pubkey new.pub -subj /CN=Renewed -CA card/ca.pem -CAkey card/ca.key \
             -extfile usage -days 30 -out renewed.pem",
        ] {
            self.pcscd.ok(line).await?;
        }
        Ok(())
    }

    /// Makes a key in slot 9A, and puts a certificate for it on the card.
    async fn renew(&self, algorithm: &str) -> Result<()> {
        let (good, said) = self.piv_tool("card/admin.key", &format!("--genkey 9A:{algorithm}")).await?;
        ensure!(good, "{said}");
        self.certify().await?;
        let (good, said) = self.piv_tool("card/admin.key", "--cert 9A --in renewed.pem").await?;
        ensure!(good, "{said}");
        self.has_certificate("renewed.pem").await
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
    let (good, said) = bench.piv_tool("wrong", "--genkey 9A:07").await?;
    ensure!(!good && !written.exists(), "{said}");
    bench.sign("ECDSA-SHA256", "--signature-format openssl", old).await?;

    bench.renew("07").await?;
    bench.sign("SHA256-RSA-PKCS", "", "new.pub").await?;

    // All of it is there the next time; the card is then as it was left, with the same PIN.
    bench.card.terminate().await?;
    bench.pcscd.ok("guest-pcsc wait-card absent 30 0").await?;
    bench.card = bench.pcscd.start_program("vscclient", ["card", "card", "vpcd:"])?;
    bench.pcscd.card_in(0).await?;
    let (good, said) = bench.piv_tool("card/admin.key", "--genkey 9A:07").await?;
    ensure!(!good, "{said}");
    bench.sign("SHA256-RSA-PKCS", "", "new.pub").await
}

#[tokio::test(flavor = "multi_thread")]
async fn piv_tool_makes_a_key_on_a_curve_with_aes() -> Result<()> {
    let bench = Bench::start("aes256", AES, "M:9B:0C").await?;
    bench.renew("14").await?;
    bench.sign("ECDSA-SHA256", "--signature-format openssl", "new.pub").await
}

#[tokio::test(flavor = "multi_thread")]
async fn yubico_piv_tool_writes_all_that_it_can() -> Result<()> {
    let bench = Bench::start("3des", TRIPLE_DES, "M:9B:03").await?;
    let wrong = TRIPLE_DES.replace('1', "2");
    let refused = yubico::tool(&bench.pcscd, &format!("-k{wrong} -a set-chuid")).await?;
    ensure!(!refused.status.success() && !bench.pcscd.path("card/written").exists(), "{}", refused.text);

    for (algorithm, mechanism, format) in [
        ("RSA2048", "SHA256-RSA-PKCS", ""),
        ("ECCP384", "ECDSA-SHA256", "--signature-format openssl"),
        ("ECCP256", "ECDSA-SHA256", "--signature-format openssl"),
    ] {
        bench.yubico(&format!("-a generate -s 9a -A {algorithm} -o told.pub")).await?;
        bench.certify().await?;
        let told = fs::read_to_string(bench.pcscd.path("told.pub"))?;
        let kept = fs::read_to_string(bench.pcscd.path("new.pub"))?;
        ensure!(told == kept, "{algorithm}: {told}");
        bench.yubico("-a import-certificate -s 9a -i renewed.pem").await?;
        bench.has_certificate("renewed.pem").await?;
        bench.sign(mechanism, format, "new.pub").await.with_context(|| algorithm.to_owned())?;
    }

    let (chuid, ccc) = (bench.object(0x02).await?, bench.object(0x07).await?);
    bench.yubico("-a set-chuid").await?;
    bench.yubico("-a set-ccc").await?;
    let (new_chuid, new_ccc) = (bench.object(0x02).await?, bench.object(0x07).await?);
    // The number of no agency, and a GUID.
    ensure!(
        new_chuid != chuid
            && new_chuid.starts_with("533B3019D4E739DA739CED39CE739D836858210842108421C84210C3EB3410")
    );
    ensure!(new_ccc != ccc && new_ccc.starts_with("5333F015A000000116FF02"), "{new_ccc}");
    ensure!(bench.object(0x01).await?.ends_with("9000"));
    bench.yubico("-a delete-certificate -s 9e").await?;
    ensure!(bench.object(0x01).await? == "6A82");
    fs::write(bench.pcscd.path("data"), "written")?;
    bench.yubico("-a write-object --id 0x5fc122 -f binary -i data").await?;
    ensure!(bench.object(0x22).await? == "53077772697474656E9000");
    Ok(())
}
