//! New cards, looked at with openssl.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

use clap::Parser;
use emulated_card::keys::{Curve, KeyKind, KeyStore};
use emulated_card::pin::PinError;
use tempfile::TempDir;

use super::*;
use crate::args::{Cli, Command as Subcommand};

const NAMES: [&str; 4] = ["authentication", "signature", "encryption", "card-authentication"];

/// A place for cards, with a PIN file.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        place.secret("pin", "123456\n");
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn secret(&self, name: &str, text: &str) {
        write(&self.path(name), text.as_bytes(), 0o600).unwrap();
    }

    fn new_card(&self, more: &[&str]) -> Result<String, NewCardError> {
        let (card, pin) = (self.path("card"), self.path("pin"));
        let mut line = ["vscclient", "new-card", card.to_str().unwrap()].to_vec();
        line.extend(["--name", "Jane \"J\" Doë", "--pin-file", pin.to_str().unwrap()]);
        line.extend(more);
        let cli = Cli::try_parse_from(line).unwrap_or_else(|error| panic!("{error}"));
        let Some(Subcommand::NewCard(new_card)) = cli.command else { panic!("another command") };
        new_card.run()
    }

    /// What openssl says, and whether it succeeded.
    fn openssl(&self, line: &str) -> (String, bool) {
        let mut command = Command::new("openssl");
        command.args(line.split_whitespace()).stdin(Stdio::null());
        let output = command.current_dir(self.path("card")).output();
        let output = output.expect("openssl is missing; install the package openssl");
        let text = [output.stdout, output.stderr].concat();
        (String::from_utf8_lossy(&text).into_owned(), output.status.success())
    }

    fn text(&self, name: &str) -> String {
        self.openssl(&format!("x509 -in {name}.pem -noout -text -nameopt utf8")).0
    }

    fn verify(&self, name: &str, options: &str) -> (String, bool) {
        self.openssl(&format!("verify -x509_strict -CAfile ca.pem {options} {name}.pem"))
    }

    fn card(&self) -> CardDirectory {
        CardDirectory::open(&self.path("card")).unwrap()
    }

    fn files(&self, name: &str) -> HashSet<String> {
        let entries = fs::read_dir(self.path(name)).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

/// The card's own PIN, as `vscclient card` would open it.
fn reference(card: &CardDirectory, store: &dyn KeyStore) -> ReferenceData {
    let claim = card.claim(&CardId::derive(store.certificates(), "")).unwrap();
    let opened = ReferenceData::of_card(&card.state(), &claim, None, None, Secret::default(), DEFAULT_TRIES);
    opened.unwrap().0
}

#[test]
fn certificates_say_what_their_keys_are_for() {
    for (algorithm, kind, encryption) in [
        ("rsa1024", KeyKind::Rsa { bits: 1024 }, "Key Encipherment"),
        ("rsa2048", KeyKind::Rsa { bits: 2048 }, "Key Encipherment"),
        ("p256", KeyKind::Ec(Curve::P256), "Key Agreement"),
        ("p384", KeyKind::Ec(Curve::P384), "Key Agreement"),
    ] {
        let place = Place::new();
        let addresses = ["--upn", "jane@EXAMPLE.COM", "--email", "jane@example.com"];
        let said = place.new_card(&[&["--algorithm", algorithm][..], &addresses].concat()).unwrap();
        assert!(said.contains("README.txt"), "{said}");
        let card = place.card();
        assert_eq!(
            (card.name(), card.setup().unwrap().profile),
            ("Jane \"J\" Doë", emulated_card::card::Profile::Dual)
        );
        let (store, _) = card.open_keys().unwrap();
        let found: Vec<_> = store.certificates().iter().map(|one| (one.name.as_str(), one.kind)).collect();
        assert_eq!(found, NAMES.map(|name| (name, kind)));

        for (name, expected) in NAMES.into_iter().zip([
            &[
                "Digital Signature\n",
                "TLS Web Client Authentication, Microsoft Smartcard Login",
                "othername: UPN::jane@EXAMPLE.COM",
                "OU=authentication, CN=Jane \"J\" Doë",
            ][..],
            &["Digital Signature, Non Repudiation\n", "E-mail Protection", "email:jane@example.com"],
            &[encryption, "E-mail Protection", "email:jane@example.com"],
            &["Digital Signature\n", "Extended Key Usage: critical", "2.16.840.1.101.3.6.8", "URI:urn:uuid:"],
        ]) {
            let text = place.text(name);
            for part in expected.iter().chain(&["X509v3 Key Usage: critical", "CA:FALSE", "Version: 3"]) {
                assert!(text.contains(part), "{name}: {part}\n{text}");
            }
            let (said, good) = place.verify(name, "-crl_check -CRLfile crl.pem");
            assert!(good, "{said}");
        }
        let text = place.text("card-authentication");
        assert!(!text.contains("Jane"));
        // The UUID is the card's.
        let guid = CardId::derive(store.certificates(), "").guid();
        let guid: String = guid.iter().map(|byte| format!("{byte:02x}")).collect();
        assert!(text.replace('-', "").contains(&format!("URI:urn:uuid:{guid}")), "{text}");
        let serials: HashSet<_> =
            NAMES.map(|name| place.openssl(&format!("x509 -in {name}.pem -noout -serial")).0).into();
        assert_eq!(serials.len(), 4);
    }
}

#[test]
fn what_is_not_asked_for_is_not_there() {
    let place = Place::new();
    place.new_card(&["--algorithm", "p256"]).unwrap();
    for name in ["authentication", "signature", "encryption"] {
        assert!(!place.text(name).contains("Subject Alternative Name"));
    }
    let mut expected: HashSet<_> =
        NAMES.iter().flat_map(|name| [format!("{name}.pem"), format!("{name}.key")]).collect();
    expected.extend(["ca.pem", "ca.key", "crl.pem", "card.toml", "state", "README.txt"].map(str::to_owned));
    assert_eq!(place.files("card"), expected);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&place.path("card")), 0o700);
    for name in expected.iter().filter(|name| name.ends_with(".key")) {
        assert_eq!(mode(&place.path("card").join(name)), 0o600);
    }
}

#[test]
fn a_new_card_has_its_pin_and_puk_wherever_it_is_moved() {
    let place = Place::new();
    place.secret("puk", "12345678");
    let puk = place.path("puk");
    place.new_card(&["--algorithm", "p256", "--puk-file", puk.to_str().unwrap()]).unwrap();
    fs::rename(place.path("card"), place.path("moved")).unwrap();
    let card = CardDirectory::open(&place.path("moved")).unwrap();
    let (store, _) = card.open_keys().unwrap();
    let reference = reference(&card, &*store);
    let secret = |text: &str| Secret::from(text.as_bytes());
    assert!(matches!(reference.verify(&secret("000000"), &*store), Err(PinError::Wrong { left: 2 })));
    reference.verify(&secret("123456"), &*store).unwrap().ecdsa(0, &[1; 32]).unwrap();
    reference.unblock(&secret("12345678"), &secret("654321")).unwrap();
    assert!(reference.verify(&secret("654321"), &*store).is_ok());
}

#[test]
fn expired_and_revoked_certificates_are_refused() {
    let place = Place::new();
    place.new_card(&["--algorithm", "p256", "--expired", "--revoked", "--days", "10000"]).unwrap();
    let (crl, _) = place.openssl("crl -in crl.pem -noout -text -CAfile ca.pem");
    assert!(crl.contains("verify OK"), "{crl}");
    assert_eq!(crl.matches("Serial Number:").count(), 4);
    for name in NAMES {
        let (said, good) = place.verify(name, "");
        assert!(!good && said.contains("certificate has expired"), "{said}");
        let (said, good) = place.verify(name, "-no_check_time");
        assert!(good, "{said}");
        let (said, good) = place.verify(name, "-no_check_time -crl_check -CRLfile crl.pem");
        assert!(!good && said.contains("certificate revoked"), "{said}");
    }
    // The card works all the same: to refuse it is for others.
    place.card().open_keys().unwrap();
}

#[test]
fn keys_can_be_in_an_nss_database() {
    for algorithm in ["rsa1024", "p256"] {
        let place = Place::new();
        place.new_card(&["--algorithm", algorithm, "--nss"]).unwrap();
        let files = place.files("card");
        assert!(!files.contains("authentication.key") && !files.iter().any(|name| name.ends_with("p12")));
        let (store, password) = place.card().open_keys().unwrap();
        let names: Vec<_> =
            store.certificates().iter().map(|certificate| certificate.name.as_str()).collect();
        assert_eq!(names, NAMES);
        assert!(store.needs_secret());
        let keys = store.unlock(&password).unwrap();
        match algorithm {
            "rsa1024" => assert_eq!(keys.rsa_raw(3, &[1; 128]).unwrap().len(), 128),
            _ => assert_eq!(keys.ecdsa(3, &[1; 32]).unwrap().len(), 64),
        }
    }
}

#[test]
fn no_file_names_the_place_it_was_made_in() {
    let place = Place::new();
    place.new_card(&["--algorithm", "p256", "--nss"]).unwrap();
    let name = place.0.path().as_os_str().as_bytes();
    for directory in ["card", "card/nssdb", "card/state"] {
        for file in place.files(directory) {
            let path = place.path(directory).join(file);
            if path.is_file() {
                let content = fs::read(&path).unwrap();
                assert!(!content.windows(name.len()).any(|part| part == name), "{path:?}");
            }
        }
    }
}

#[test]
fn pins_and_puks_that_no_card_has_are_refused() {
    let place = Place::new();
    for (pin, said) in [
        ("12345", "6 to 8 digits"),
        ("123456789", "6 to 8 digits"),
        ("12345x", "6 to 8 digits"),
        ("", "is empty"),
    ] {
        fs::write(place.path("pin"), pin).unwrap();
        let error = place.new_card(&[]).unwrap_err().to_string();
        assert!(error.contains(said) && error.contains("--pin-file"), "{error}");
        assert!(pin.is_empty() || !error.contains(pin), "{error}");
    }
    fs::write(place.path("pin"), "123456").unwrap();
    place.secret("puk", "1234567");
    let puk = place.path("puk");
    let error = place.new_card(&["--puk-file", puk.to_str().unwrap()]).unwrap_err().to_string();
    assert!(error.contains("--puk-file"), "{error}");
    fs::set_permissions(place.path("pin"), Permissions::from_mode(0o644)).unwrap();
    let error = place.new_card(&[]).unwrap_err().to_string();
    assert!(error.contains("--pin-file") && error.contains("chmod 600"), "{error}");
    assert!(!place.path("card").exists());
}

#[test]
fn a_directory_with_something_in_it_is_left_alone() {
    let place = Place::new();
    fs::create_dir(place.path("card")).unwrap();
    fs::write(place.path("card/file"), "mine").unwrap();
    let error = place.new_card(&["--algorithm", "p256"]).unwrap_err().to_string();
    assert!(error.contains("is not empty"), "{error}");
    assert_eq!(fs::read(place.path("card/file")).unwrap(), b"mine");

    // In an empty one, all or nothing is made.
    fs::remove_file(place.path("card/file")).unwrap();
    fs::set_permissions(place.path("card"), Permissions::from_mode(0o755)).unwrap();
    place.new_card(&["--algorithm", "p256"]).unwrap();
    assert_eq!(fs::metadata(place.path("card")).unwrap().permissions().mode() & 0o777, 0o700);
    assert!(place.new_card(&["--algorithm", "p256"]).unwrap_err().to_string().contains("is not empty"));
    place.card().open_keys().unwrap();
}

#[test]
fn a_card_that_cannot_be_made_leaves_nothing() {
    let place = Place::new();
    // NSS takes no such path, which shows when all keys and certificates are made.
    let card = place.0.path().join(OsStr::from_bytes(b"card\xff"));
    let (directory, pin) = (card.as_os_str(), place.path("pin"));
    let line = ["vscclient", "new-card", "--nss", "--algorithm", "rsa1024", "--name", "J", "--pin-file"];
    let line = line.map(OsStr::new).into_iter().chain([pin.as_os_str(), directory]);
    let fail = || {
        let cli = Cli::try_parse_from(line.clone()).unwrap();
        let Some(Subcommand::NewCard(new_card)) = cli.command else { panic!("another command") };
        let error = new_card.run().unwrap_err().to_string();
        assert!(error.contains("is no UTF-8 text"), "{error}");
    };
    fail();
    assert!(!card.exists());
    fs::create_dir(&card).unwrap();
    fail();
    assert_eq!(fs::read_dir(&card).unwrap().count(), 0);
}

#[test]
fn names_that_no_certificate_can_hold_are_refused() {
    let parse = |more: &[&str]| {
        let line = ["vscclient", "new-card", "d", "--pin-file", "p"];
        Cli::try_parse_from([&line[..], more].concat()).map_err(|error| error.to_string())
    };
    assert!(parse(&["--name", "Jane"]).is_ok());
    // Persian is not written without a character that joins none.
    assert!(parse(&["--name", "مهدی نیک\u{200C}پور"]).is_ok());
    let (long, address) = ("x".repeat(65), format!("{}@example.com", "x".repeat(120)));
    for wrong in [
        &["--name", ""][..],
        &["--name", "a\nb"],
        &["--name", "a\u{61C}b"],
        &["--name", "a\u{200E}b"],
        &["--name", "a\u{202E}b"],
        &["--name", "a\u{2028}b"],
        &["--name", "a\u{2069}b"],
        &["--name", &long],
        &["--name", "J", "--upn", "jane"],
        &["--name", "J", "--upn", "@REALM"],
        &["--name", "J", "--upn", "a b@REALM"],
        &["--name", "J", "--upn", "a\u{202E}b@REALM"],
        &["--name", "J", "--upn", &address],
        &["--name", "J", "--email", "jäne@example.com"],
        &["--name", "J", "--days", "0"],
        &["--name", "J", "--days", "10001"],
        &["--name", "J", "--algorithm", "dsa"],
        &[],
    ] {
        assert!(parse(wrong).is_err(), "{wrong:?}");
    }
}

#[test]
fn a_directory_whose_path_nss_does_not_take_is_not_said_to_be_missing() {
    let place = Place::new();
    let directory = place.0.path().join(OsStr::from_bytes(b"card\xff"));
    fs::create_dir(&directory).unwrap();
    let card = "name = 'J'\nprofile = 'dual'\n[nss]\ndatabase = 'nssdb'\npassword_file = 'p'\ncertificates = ['c']\n";
    fs::write(directory.join(CARD_FILE), card).unwrap();
    let error = CardDirectory::open(&directory).unwrap().setup().unwrap_err().to_string();
    assert!(error.contains("nssdb") && error.contains("UTF-8"), "{error}");
}

#[test]
fn a_card_with_an_administrator_can_be_written_to() {
    for (algorithm, digits) in [("3des", 48), ("aes128", 32), ("aes192", 48), ("aes256", 64)] {
        let place = Place::new();
        place.secret("admin", &format!("{}\n", "0aF".repeat(digits / 3) + &"9".repeat(digits % 3)));
        let admin = place.path("admin");
        let options = ["--algorithm", "p256", "--admin-key-file", admin.to_str().unwrap()];
        place.new_card(&[&options[..], &["--admin-algorithm", algorithm]].concat()).unwrap();
        let key = place.path("card/admin.key");
        assert_eq!(fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
        let kept = fs::read_to_string(key).unwrap();
        assert_eq!(kept, fs::read_to_string(admin).unwrap().trim().to_lowercase());
        let said = fs::read_to_string(place.path("card/README.txt")).unwrap();
        assert!(said.contains("admin.key  ") && said.contains("written/  "), "{said}");
        let card = place.card();
        assert_eq!(card.setup().unwrap().profile, emulated_card::card::Profile::Piv);
        let card = card.writable().unwrap().open().unwrap();
        assert!(card.slot.is_some());
    }
    let place = Place::new();
    place.new_card(&["--algorithm", "p256"]).unwrap();
    let error = place.card().writable().unwrap_err().to_string();
    assert!(error.contains("--admin-key-file"), "{error}");
    assert!(!place.files("card").contains("admin.key"));
}

#[test]
fn what_is_no_card_management_key_is_refused() {
    let place = Place::new();
    let admin = place.path("admin");
    let options = ["--algorithm", "p256", "--admin-key-file", admin.to_str().unwrap()];
    for key in ["", "00", &"0".repeat(63), &"0".repeat(65), &"0".repeat(48), &"x".repeat(64)] {
        fs::write(&admin, key).unwrap();
        fs::set_permissions(&admin, Permissions::from_mode(0o600)).unwrap();
        let error = place.new_card(&options).unwrap_err().to_string();
        assert!(error.contains("--admin-key-file"), "{error}");
        assert!(key.len() < 3 || !error.contains(key), "{error}");
    }
    fs::write(&admin, "0".repeat(64)).unwrap();
    fs::set_permissions(&admin, Permissions::from_mode(0o644)).unwrap();
    assert!(place.new_card(&options).unwrap_err().to_string().contains("chmod 600"));
    assert!(!place.path("card").exists());
    let line =
        ["vscclient", "new-card", "d", "--pin-file", "p", "--name", "J", "--nss", "--admin-key-file", "k"];
    assert!(Cli::try_parse_from(line).is_err());
    let line = ["vscclient", "new-card", "d", "--pin-file", "p", "--name", "J", "--admin-algorithm", "3des"];
    assert!(Cli::try_parse_from(line).is_err());
}

/// NSS hashes the password once: it is random, and a VERIFY is not to wait for more.
#[test]
fn an_nss_card_s_keys_are_quickly_decrypted() {
    // PBKDF2 (RFC 8018 appendix A.2): a salt, and how often.
    const PBKDF2: [u8; 11] = [0x06, 0x09, 0x2A, 0x86, 0x48, 0x86, 0xF7, 0x0D, 0x01, 0x05, 0x0C];
    let place = Place::new();
    place.new_card(&["--nss", "--algorithm", "rsa1024"]).unwrap();
    let content = fs::read(place.path("card/nssdb/key4.db")).unwrap();
    let starts = (0..content.len()).filter(|&start| content[start..].starts_with(&PBKDF2));
    let rounds: Vec<_> = starts
        .map(|start| {
            // The sequence's header, the salt and its header.
            let salt = start + PBKDF2.len() + 2;
            let number = salt + 2 + usize::from(content[salt + 1]);
            assert_eq!((content[salt], content[number]), (0x04, 0x02));
            content[number + 2..][..content[number + 1].into()].to_vec()
        })
        .collect();
    // The password's, and some of each key.
    assert!(rounds.len() > 8 && rounds.iter().all(|rounds| rounds == &[1]), "{rounds:?}");
}
