//! The NSS key store against real databases, made by certutil and checked by openssl.

#![cfg(all(unix, feature = "nss"))]
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "clippy sees the helpers of a test as no test")]

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::thread;
use std::time::{Duration, Instant};

use emulated_card::keys::nss::{NssDatabase, OpenError};
use emulated_card::keys::{Curve, KeyError, KeyKind, KeyStore, UnlockError, Unlocked};
use openssl_tool::{make_certificate, openssl, peer, run, verify_ecdsa};
use proptest::prelude::*;
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use vscard_protocol::Secret;

#[path = "common/openssl_tool.rs"]
mod openssl_tool;

const PASSWORD: &str = "card password";

macro_rules! certutil {
    ($($argument:expr),* $(,)?) => { run("certutil", "libnss3-tools", &[$(OsStr::new(&$argument)),*]) };
}
macro_rules! pk12util {
    ($($argument:expr),* $(,)?) => { run("pk12util", "libnss3-tools", &[$(OsStr::new(&$argument)),*]) };
}

/// A database being made.
struct Maker {
    directory: PathBuf,
    serial: usize,
}

impl Maker {
    /// An empty database in `root/name`.
    fn new(root: &Path, name: &str, password: &str) -> Self {
        let directory = root.join(name);
        fs::create_dir(&directory).unwrap();
        let maker = Self { directory, serial: 0 };
        fs::write(maker.file("password"), format!("{password}\n")).unwrap();
        fs::write(maker.file("noise"), [7; 256]).unwrap();
        certutil!("-N", "-d", maker.url(), "-f", maker.file("password"));
        maker
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn url(&self) -> String {
        format!("sql:{}", self.directory.to_str().unwrap())
    }

    /// A self-signed certificate. Serial numbers start at 1 in each database, so those of two databases are
    /// equal.
    fn sign(&mut self, nickname: &str, extra: &[&str]) {
        self.serial += 1;
        let (url, password, noise) = (self.url(), self.file("password"), self.file("noise"));
        let (subject, serial) = (format!("CN={nickname}"), self.serial.to_string());
        let mut arguments: Vec<&OsStr> = vec![
            "-S".as_ref(),
            "-d".as_ref(),
            url.as_ref(),
            "-f".as_ref(),
            password.as_ref(),
            "-z".as_ref(),
            noise.as_ref(),
        ];
        arguments.extend(["-x", "-t", ",,", "-n", nickname, "-s", &subject, "-m", &serial].map(OsStr::new));
        arguments.extend(extra.iter().map(OsStr::new));
        run("certutil", "libnss3-tools", &arguments);
    }

    fn rsa(&mut self, nickname: &str, bits: &str) {
        self.sign(nickname, &["-g", bits]);
    }

    /// A certificate without its key, taken from another database.
    fn add(&self, nickname: &str, from: &Self) {
        let file = self.file("added");
        certutil!("-L", "-d", from.url(), "-n", nickname, "-r", "-o", file);
        certutil!(
            "-A",
            "-d",
            self.url(),
            "-f",
            self.file("password"),
            "-t",
            ",,",
            "-n",
            nickname,
            "-i",
            file
        );
    }

    /// A key made by openssl, imported with its certificate.
    fn import(&self, nickname: &str, key: &str) {
        let [pem, crt, p12] = ["key.pem", "crt.pem", "crt.p12"].map(|name| self.file(name));
        make_certificate(nickname, key, &pem, &crt, &[]);
        openssl!(
            "pkcs12", "-export", "-in", crt, "-inkey", pem, "-name", nickname, "-passout", "pass:x", "-out",
            p12
        );
        pk12util!("-i", p12, "-d", self.url(), "-k", self.file("password"), "-W", "x");
    }
}

/// The databases that most tests share.
struct Fixture {
    root: TempDir,
}

impl Fixture {
    /// The fixture of the tests that run now. It is held weakly, as a static would leave its files behind.
    fn get() -> Arc<Self> {
        static FIXTURE: Mutex<Weak<Fixture>> = Mutex::new(Weak::new());
        let mut shared = FIXTURE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        shared.upgrade().unwrap_or_else(|| {
            let fixture = Arc::new(Self::make());
            *shared = Arc::downgrade(&fixture);
            fixture
        })
    }

    fn make() -> Self {
        let root = TempDir::new().unwrap();
        let mut card = Maker::new(root.path(), "card", PASSWORD);
        card.rsa("one", "1536");
        card.rsa("two", "1024");
        let mut other = Maker::new(root.path(), "other", "other password");
        other.rsa("one", "1024");
        Self { root }
    }

    fn directory(&self, name: &str) -> String {
        self.root.path().join(name).to_str().unwrap().to_owned()
    }

    fn card(&self) -> NssDatabase {
        open(&self.directory("card"), &["one", "two"]).unwrap()
    }

    fn other(&self) -> NssDatabase {
        open(&self.directory("other"), &["one"]).unwrap()
    }
}

fn open(directory: &str, nicknames: &[&str]) -> Result<NssDatabase, OpenError> {
    let nicknames: Vec<_> = nicknames.iter().map(|&name| name.to_owned()).collect();
    NssDatabase::open(directory, &nicknames)
}

fn unlock(store: &NssDatabase, password: &str) -> Result<Box<dyn Unlocked>, UnlockError> {
    store.unlock(&Secret::from(password.as_bytes()))
}

/// The database files of `from`, copied to a new directory.
fn copy(from: impl AsRef<Path>, to: &Path) {
    fs::create_dir(to).unwrap();
    for name in ["cert9.db", "key4.db"] {
        fs::copy(from.as_ref().join(name), to.join(name)).unwrap();
    }
}

/// Not random, but different for each seed, and below any modulus.
fn block(store: &NssDatabase, index: usize, seed: u8) -> Vec<u8> {
    let length = store.certificates()[index].kind.block_len();
    let mut block: Vec<u8> = (0..length).map(|i| (i as u8).wrapping_mul(31) ^ seed).collect();
    block[0] = 0;
    block
}

/// What `result` gives when raised to the public exponent by openssl.
fn raise(store: &NssDatabase, index: usize, result: &Secret) -> Vec<u8> {
    let directory = TempDir::new().unwrap();
    let [key, input] = ["key", "input"].map(|name| directory.path().join(name));
    fs::write(&key, &store.certificates()[index].public_key).unwrap();
    fs::write(&input, result.expose()).unwrap();
    openssl!(
        "pkeyutl",
        "-encrypt",
        "-pubin",
        "-keyform",
        "DER",
        "-inkey",
        key,
        "-pkeyopt",
        "rsa_padding_mode:none",
        "-in",
        input
    )
}

#[track_caller]
fn assert_key(store: &NssDatabase, unlocked: &dyn Unlocked, index: usize) {
    let block = block(store, index, 0x5a);
    let result = unlocked.rsa_raw(index, &block).unwrap();
    assert_eq!(result.len(), block.len());
    assert_eq!(raise(store, index, &result), block);
}

#[track_caller]
fn assert_message(error: OpenError, parts: &[&str]) {
    let message = error.to_string();
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in: {message}");
    }
}

fn unhex(digits: &str) -> Vec<u8> {
    (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap()).collect()
}

// What a store says of itself.

#[test]
fn certificates_come_in_the_order_asked_for() {
    let fixture = Fixture::get();
    let store = open(&format!("sql:{}", fixture.directory("card")), &["two", "one"]).unwrap();
    assert!(store.needs_secret());
    assert_eq!(store.path(), fs::canonicalize(fixture.directory("card")).unwrap());
    let found: Vec<_> =
        store.certificates().iter().map(|certificate| (&*certificate.name, certificate.kind)).collect();
    assert_eq!(found, [("two", KeyKind::Rsa { bits: 1024 }), ("one", KeyKind::Rsa { bits: 1536 })]);

    for certificate in store.certificates() {
        let expected = certutil!("-L", "-d", fixture.directory("card"), "-n", certificate.name, "-r");
        assert_eq!(certificate.der, expected);
        let file = fixture.root.path().join(format!("{}.der", certificate.name));
        fs::write(&file, &certificate.der).unwrap();
        let pem = openssl!("x509", "-inform", "DER", "-in", file, "-noout", "-pubkey");
        fs::write(&file, pem).unwrap();
        assert_eq!(certificate.public_key, openssl!("pkey", "-pubin", "-in", file, "-outform", "DER"));
    }
    let unlocked = unlock(&store, PASSWORD).unwrap();
    for index in 0..2 {
        assert_key(&store, &*unlocked, index);
    }
}

// Errors at open.

#[test]
fn bad_directories_are_named() {
    let root = TempDir::new().unwrap();
    let path = |name: &str| root.path().join(name).to_str().unwrap().to_owned();
    let fail = |directory: &str| open(directory, &["one"]).unwrap_err();

    assert_message(fail(&path("missing")), &[&path("missing"), "does not exist"]);
    assert_message(fail(&format!("sql:{}", path("missing"))), &[&path("missing"), "does not exist"]);
    assert!(matches!(fail(""), OpenError::NoDirectory { .. }));
    assert!(matches!(fail("sql:"), OpenError::NoDirectory { .. }));

    fs::write(path("file"), "").unwrap();
    assert_message(fail(&path("file")), &[&path("file"), "is not a directory"]);
    assert_message(fail(&path("file/below")), &["file/below", "is not a directory"]);

    assert_message(fail("dbm:/somewhere"), &["dbm:/somewhere", "dbm database", "upgrade"]);
    fs::create_dir(path("old")).unwrap();
    fs::write(path("old/cert8.db"), "").unwrap();
    assert_message(fail(&path("old")), &[&path("old"), "dbm database"]);

    let error = fail("/with\0nul");
    assert!(matches!(error, OpenError::Nul { .. }));
    assert_message(error, &[r"/with\0nul", "NUL"]);
}

#[test]
fn bad_files_are_named() {
    let fixture = Fixture::get();
    let root = TempDir::new().unwrap();
    for (number, name) in ["cert9.db", "key4.db"].into_iter().enumerate() {
        let directory = root.path().join(number.to_string());
        copy(fixture.directory("card"), &directory);
        let file = directory.join(name);
        let shown = file.to_str().unwrap();
        let fail = || open(directory.to_str().unwrap(), &["one"]).unwrap_err();
        let good = fs::read(&file).unwrap();

        fs::remove_file(&file).unwrap();
        assert_message(fail(), &[shown, "does not exist"]);
        symlink("nowhere", &file).unwrap();
        assert_message(fail(), &[shown, "does not exist"]);
        fs::remove_file(&file).unwrap();
        symlink(name, &file).unwrap();
        assert_message(fail(), &[shown, "cannot be read"]);
        fs::remove_file(&file).unwrap();
        fs::create_dir(&file).unwrap();
        assert_message(fail(), &[shown, "is not an SQLite database"]);
        fs::remove_dir(&file).unwrap();
        run("mkfifo", "coreutils", &[file.as_os_str()]);
        assert_message(fail(), &[shown, "is not an SQLite database"]);
        fs::remove_file(&file).unwrap();
        for content in [&b""[..], b"SQLite", b"not a database, but long enough", &good[1..]] {
            fs::write(&file, content).unwrap();
            assert_message(fail(), &[shown, "is not an SQLite database"]);
        }

        // The magic is right and nothing else: this is for NSS to find out.
        let mut damaged = good.clone();
        damaged[16..].fill(0xff);
        fs::write(&file, damaged).unwrap();
        let error = fail();
        assert!(matches!(error, OpenError::Refused { .. }), "{error}");
        assert_message(error, &[directory.to_str().unwrap(), "SEC_ERROR_"]);

        fs::write(&file, good).unwrap();
        open(directory.to_str().unwrap(), &["one"]).unwrap();
    }
}

#[test]
fn bad_nickname_lists_are_refused() {
    let fixture = Fixture::get();
    let directory = fixture.directory("card");
    assert_message(open(&directory, &[]).unwrap_err(), &[&directory, "no certificate nickname given"]);
    let too_many: Vec<_> = (0..25).map(|i| i.to_string()).collect();
    let too_many: Vec<_> = too_many.iter().map(String::as_str).collect();
    assert_message(open(&directory, &too_many).unwrap_err(), &[&directory, "25", "at most 24"]);
    assert_message(open(&directory, &["one", "two", "one"]).unwrap_err(), &["\"one\" is named twice"]);
    // One that is there does not make up for one that is not.
    for unknown in ["One", "one ", "", "NSS Certificate DB:one", "on\0e", "o\ne"] {
        let error = open(&directory, &["one", unknown]).unwrap_err();
        assert!(matches!(error, OpenError::UnknownNickname { .. }), "{error}");
        assert_message(error, &[&format!("{unknown:?}"), &directory, r#"there are "one", "two""#]);
    }
}

#[test]
fn certificates_that_cannot_be_served_are_named() {
    let root = TempDir::new().unwrap();
    let mut maker = Maker::new(root.path(), "db", PASSWORD);
    let directory = maker.directory.to_str().unwrap().to_owned();
    assert_message(open(&directory, &["a"]).unwrap_err(), &["\"a\"", &directory, "there is none at all"]);

    let mut elsewhere = Maker::new(root.path(), "elsewhere", PASSWORD);
    elsewhere.rsa("lonely", "1024");
    maker.add("lonely", &elsewhere);
    maker.sign("curve", &["-k", "ec", "-q", "nistp521"]);
    maker.sign("pss", &["-g", "1024", "--pss"]);
    maker.import("small", "rsa:768");
    maker.import("odd", "rsa:1028");
    for (nickname, what) in [
        ("lonely", "has no private key"),
        ("curve", "EC (1.3.132.0.35) keys are not served"),
        ("pss", "RSA-PSS keys are not served"),
        ("small", "RSA key of 768 bits"),
        ("odd", "RSA key of 1028 bits"),
    ] {
        assert_message(open(&directory, &[nickname]).unwrap_err(), &[nickname, &directory, what]);
    }
    for number in 0..7 {
        let nickname = format!("more {number}");
        elsewhere.sign(&nickname, &["-k", "ec", "-q", "nistp256"]);
        maker.add(&nickname, &elsewhere);
    }
    assert_message(open(&directory, &["a"]).unwrap_err(), &["are \"curve\", \"lonely\"", " and 2 more"]);
}

#[test]
fn imported_and_large_keys_work() {
    let root = TempDir::new().unwrap();
    let mut maker = Maker::new(root.path(), "db", PASSWORD);
    maker.import("imported", "rsa:2048");
    // 1032 is the smallest size above 1024 that is a whole number of bytes.
    maker.import("1032", "rsa:1032");
    maker.import("ünïcode: 'q' \"", "rsa:1024");
    maker.rsa("large", "4096");
    maker.sign("sign only", &["-g", "1024", "--keyOpFlagsOn", "sign", "--keyOpFlagsOff", "decrypt"]);
    let nicknames = ["imported", "1032", "ünïcode: 'q' \"", "large", "sign only"];
    let store = open(&maker.url(), &nicknames).unwrap();
    let unlocked = unlock(&store, PASSWORD).unwrap();
    for index in 0..nicknames.len() {
        assert_key(&store, &*unlocked, index);
    }
}

/// A database with keys on both curves, and one of another kind.
fn curves() -> (TempDir, NssDatabase) {
    let root = TempDir::new().unwrap();
    let mut maker = Maker::new(root.path(), "db", PASSWORD);
    maker.sign("p256", &["-k", "ec", "-q", "nistp256"]);
    maker.sign("p384", &["-k", "ec", "-q", "nistp384"]);
    // Not made by NSS, so that its CKA_ID and its parameters come another way.
    maker.import("imported", "P-256");
    maker.rsa("rsa", "1024");
    let store = open(&maker.url(), &["p256", "p384", "imported", "rsa"]).unwrap();
    (root, store)
}

#[test]
fn ec_signatures_are_ones_for_openssl() {
    let (root, store) = curves();
    let unlocked = unlock(&store, PASSWORD).unwrap();
    let kinds: Vec<_> = store.certificates().iter().map(|certificate| certificate.kind).collect();
    let (p256, p384) = (KeyKind::Ec(Curve::P256), KeyKind::Ec(Curve::P384));
    assert_eq!(kinds, [p256, p384, p256, KeyKind::Rsa { bits: 1024 }]);
    for (index, certificate) in store.certificates().iter().enumerate().take(3) {
        let field = certificate.kind.block_len();
        for digest in [vec![0xab; field], vec![0xab; 20], vec![0xab; 1], vec![0; field]] {
            let signature = unlocked.ecdsa(index, &digest).unwrap();
            assert_eq!(signature.len(), 2 * field);
            verify_ecdsa(root.path(), certificate, &digest, &signature);
        }
        for unfit in [vec![], vec![0xab; field + 1], vec![0xab; 1000]] {
            assert_eq!(unlocked.ecdsa(index, &unfit), Err(KeyError::Block));
        }
        assert_eq!(unlocked.rsa_raw(index, &vec![0; field]).unwrap_err(), KeyError::Block);
    }
    assert_eq!(unlocked.ecdsa(3, &[0xab; 32]), Err(KeyError::Block));
    assert_eq!(unlocked.ecdh(3, &[4; 65]).unwrap_err(), KeyError::Block);
}

#[test]
fn ecdh_agrees_with_openssl() {
    let (root, store) = curves();
    let unlocked = unlock(&store, PASSWORD).unwrap();
    for (index, certificate) in store.certificates().iter().enumerate().take(3) {
        let KeyKind::Ec(curve) = certificate.kind else { panic!() };
        for _ in 0..4 {
            let (point, shared) = peer(root.path(), curve, &certificate.public_key);
            assert_eq!(unlocked.ecdh(index, &point).unwrap().expose(), shared);

            let mut off_curve = point.clone();
            *off_curve.last_mut().unwrap() ^= 1;
            let mut compressed = point[..=curve.field_len()].to_vec();
            compressed[0] = 2;
            for unfit in [&off_curve[..], &point[1..], &point[..point.len() - 1], &compressed, &[], &[0]] {
                assert_eq!(unlocked.ecdh(index, unfit).unwrap_err(), KeyError::Block);
            }
        }
    }
    // A point on the other curve.
    let (point, _) = peer(root.path(), Curve::P384, &store.certificates()[1].public_key);
    assert_eq!(unlocked.ecdh(0, &point).unwrap_err(), KeyError::Block);
    drop(unlocked);
    let again = unlock(&store, PASSWORD).unwrap();
    again.ecdh(1, &point).unwrap();
}

#[test]
fn ec_operations_use_a_copy_in_memory_and_end_with_the_login() {
    let root = TempDir::new().unwrap();
    let mut maker = Maker::new(root.path(), "db", PASSWORD);
    maker.sign("key", &["-k", "ec", "-q", "nistp256"]);
    let store = open(&maker.url(), &["key"]).unwrap();
    let unlocked = unlock(&store, PASSWORD).unwrap();
    unlocked.ecdsa(0, &[1; 32]).unwrap();
    let key4 = fs::read(maker.file("key4.db")).unwrap();
    fs::write(maker.file("key4.db"), "").unwrap();
    unlocked.ecdsa(0, &[1; 32]).unwrap();
    fs::write(maker.file("key4.db"), key4).unwrap();
    assert!(unlock(&store, "wrong").is_err());
    assert_eq!(unlocked.ecdsa(0, &[1; 32]), Err(KeyError::LoggedOut));
}

#[test]
fn the_public_key_under_an_id_must_be_the_certificate_s() {
    let root = TempDir::new().unwrap();
    let mut maker = Maker::new(root.path(), "db", PASSWORD);
    maker.sign("key", &["-k", "ec", "-q", "nistp256"]);
    let point = {
        let store = open(&maker.url(), &["key"]).unwrap();
        let public_key = &store.certificates()[0].public_key;
        public_key[public_key.len() - 65..].to_vec()
    };
    // CKA_EC_POINT is an OCTET STRING; in the certificate the point is in a BIT STRING.
    let object = [&[0x04, 0x41], &point[..]].concat();
    let mut content = fs::read(maker.file("cert9.db")).unwrap();
    let at = (0..content.len()).find(|&at| content[at..].starts_with(&object)).unwrap();
    content[at + 10] ^= 1;
    fs::write(maker.file("cert9.db"), content).unwrap();
    let error = open(&maker.url(), &["key"]).unwrap_err();
    assert!(matches!(error, OpenError::AnothersKey { .. }), "{error}");
}

#[test]
fn as_many_certificates_as_a_piv_card_has_keys() {
    let root = TempDir::new().unwrap();
    let mut maker = Maker::new(root.path(), "db", PASSWORD);
    let nicknames: Vec<_> = (0..24).map(|number| format!("key {number}")).collect();
    for nickname in &nicknames {
        maker.sign(nickname, &["-k", "ec", "-q", "nistp256"]);
    }
    let store = NssDatabase::open(&maker.url(), &nicknames).unwrap();
    assert_eq!(store.certificates().len(), 24);
    unlock(&store, PASSWORD).unwrap().ecdsa(23, &[1; 32]).unwrap();
}

#[test]
fn of_one_nickname_the_latest_with_a_key_is_taken() {
    let root = TempDir::new().unwrap();
    let mut maker = Maker::new(root.path(), "db", PASSWORD);
    let mut elsewhere = Maker::new(root.path(), "elsewhere", PASSWORD);
    for months in ["12", "60", "24"] {
        maker.sign("renewed", &["-g", "1024", "-v", months]);
    }
    elsewhere.serial = 10;
    elsewhere.sign("renewed", &["-g", "1024", "-v", "90"]);
    maker.add("renewed", &elsewhere);
    let store = open(&maker.url(), &["renewed"]).unwrap();
    let file = maker.file("chosen");
    fs::write(&file, &store.certificates()[0].der).unwrap();
    let serial = openssl!("x509", "-inform", "DER", "-in", file, "-noout", "-serial");
    assert_eq!(String::from_utf8(serial).unwrap().trim(), "serial=02");
    assert_key(&store, &*unlock(&store, PASSWORD).unwrap(), 0);
}

#[test]
fn a_private_key_that_is_gone_is_named_at_unlock() {
    let fixture = Fixture::get();
    let root = TempDir::new().unwrap();
    // The certificates and public keys of one database, and the private keys of another, which has none.
    let empty = Maker::new(root.path(), "empty", PASSWORD);
    let mixed = root.path().join("mixed");
    copy(fixture.directory("card"), &mixed);
    fs::copy(empty.file("key4.db"), mixed.join("key4.db")).unwrap();
    let store = open(mixed.to_str().unwrap(), &["one"]).unwrap();
    assert_eq!(unlock(&store, "wrong").err(), Some(UnlockError::Wrong));
    let error = unlock(&store, PASSWORD).err().unwrap();
    let UnlockError::NotChecked(reason) = &error else { panic!("{error}") };
    assert!(reason.contains("there is no private key for certificate \"one\""), "{reason}");
}

#[test]
fn the_private_key_of_another_is_not_used() {
    let root = TempDir::new().unwrap();
    let [mut mine, mut theirs] = ["mine", "theirs"].map(|name| Maker::new(root.path(), name, PASSWORD));
    let [my_id, their_id] = [&mut mine, &mut theirs].map(|maker| {
        maker.rsa("key", "1024");
        let text = certutil!("-K", "-d", maker.url(), "-f", maker.file("password"));
        let text = String::from_utf8(text).unwrap();
        // "< 0> rsa      f85d…   NSS Certificate DB:key"
        let id = text.split_whitespace().find(|word| word.len() == 40).unwrap();
        unhex(id)
    });
    // My certificate and public key under their ID, beside their private key.
    let mut content = fs::read(mine.file("cert9.db")).unwrap();
    for start in 0..content.len() - my_id.len() {
        if content[start..].starts_with(&my_id) {
            content[start..start + my_id.len()].copy_from_slice(&their_id);
        }
    }
    fs::write(mine.file("cert9.db"), content).unwrap();
    fs::copy(theirs.file("key4.db"), mine.file("key4.db")).unwrap();
    let store = open(&mine.url(), &["key"]).unwrap();
    let error = unlock(&store, PASSWORD).err().unwrap();
    assert!(error.to_string().contains("\"key\" is another's"), "{error}");
}

/// Keys are compared with their certificates once, and again when the file that they are in is another.
#[test]
fn the_private_key_of_another_is_not_used_if_it_comes_later_either() {
    let root = TempDir::new().unwrap();
    let [mut mine, mut theirs] = ["mine", "theirs"].map(|name| Maker::new(root.path(), name, PASSWORD));
    let ids = [&mut mine, &mut theirs].map(|maker| {
        maker.rsa("key", "1024");
        let text = certutil!("-K", "-d", maker.url(), "-f", maker.file("password"));
        let text = String::from_utf8(text).unwrap();
        unhex(text.split_whitespace().find(|word| word.len() == 40).unwrap())
    });
    let store = open(&mine.url(), &["key"]).unwrap();
    assert_key(&store, &*unlock(&store, PASSWORD).unwrap(), 0);
    assert_key(&store, &*store.unlock_held(&PASSWORD.as_bytes().into()).unwrap(), 0);
    let mut content = fs::read(theirs.file("key4.db")).unwrap();
    for start in 0..content.len() - ids[1].len() {
        if content[start..].starts_with(&ids[1]) {
            content[start..start + ids[0].len()].copy_from_slice(&ids[0]);
        }
    }
    // SQLite looks at the counter of changes in the header (file format §1.3.7, also at 92), and not at the contents.
    for counter in [24, 92] {
        content[counter] ^= 1;
    }
    fs::write(mine.file("key4.db"), content).unwrap();
    for outcome in [store.unlock_held(&PASSWORD.as_bytes().into()), unlock(&store, PASSWORD)] {
        let error = outcome.err().unwrap().to_string();
        assert!(error.contains("\"key\" is another's"), "{error}");
    }
}

// Logins.

#[test]
fn the_secret_decides() {
    let fixture = Fixture::get();
    let store = fixture.card();
    for wrong in ["", "wrong", "card passwor", "card password ", "Card password", &"x".repeat(500)] {
        assert_eq!(unlock(&store, wrong).err(), Some(UnlockError::Wrong), "{wrong:?}");
    }
    for unfit in ["card password\0", "card password\0more", "\0", &"x".repeat(501)] {
        let error = unlock(&store, unfit).err().unwrap();
        assert!(matches!(error, UnlockError::Unfit(_)), "{unfit:?}: {error}");
    }
    let unlocked = unlock(&store, PASSWORD).unwrap();
    assert_key(&store, &*unlocked, 0);
    assert_key(&store, &*unlocked, 1);
}

#[test]
fn any_failed_unlock_ends_the_earlier_login() {
    let fixture = Fixture::get();
    let store = fixture.card();
    for bad in ["wrong", "card password\0", &"x".repeat(501)] {
        let unlocked = unlock(&store, PASSWORD).unwrap();
        let block = block(&store, 0, 1);
        unlocked.rsa_raw(0, &block).unwrap();
        assert!(unlock(&store, bad).is_err());
        assert_eq!(unlocked.rsa_raw(0, &block).unwrap_err(), KeyError::LoggedOut);
        drop(unlocked);
        assert_key(&store, &*unlock(&store, PASSWORD).unwrap(), 0);
    }
}

#[test]
fn an_outdated_login_neither_works_nor_ends_the_new_one() {
    let fixture = Fixture::get();
    let store = fixture.card();
    let block = block(&store, 0, 2);
    let old = unlock(&store, PASSWORD).unwrap();
    let new = unlock(&store, PASSWORD).unwrap();
    assert_eq!(old.rsa_raw(0, &block).unwrap_err(), KeyError::LoggedOut);
    new.rsa_raw(0, &block).unwrap();
    drop(old);
    assert_key(&store, &*new, 0);
    // A login keeps what it needs.
    let certificates = fixture.card();
    drop(store);
    assert_key(&certificates, &*new, 0);
}

#[test]
fn two_stores_of_one_directory_have_their_own_logins() {
    let fixture = Fixture::get();
    let (first, second) = (fixture.card(), fixture.card());
    let unlocked = unlock(&first, PASSWORD).unwrap();
    assert_eq!(unlock(&second, "wrong").err(), Some(UnlockError::Wrong));
    assert_key(&first, &*unlocked, 0);
    let also = unlock(&second, PASSWORD).unwrap();
    drop(unlocked);
    assert_key(&second, &*also, 0);
}

#[test]
fn equal_issuer_and_serial_do_not_mix_databases() {
    let fixture = Fixture::get();
    let (card, other) = (fixture.card(), fixture.other());
    assert_ne!(card.certificates()[0].der, other.certificates()[0].der);
    assert_eq!(unlock(&card, "other password").err(), Some(UnlockError::Wrong));
    let (one, two) = (unlock(&card, PASSWORD).unwrap(), unlock(&other, "other password").unwrap());
    assert_key(&card, &*one, 0);
    assert_key(&other, &*two, 0);
}

#[test]
fn passwords_are_taken_literally() {
    let fixture = Fixture::get();
    let root = TempDir::new().unwrap();
    let directory = root.path().join("db");
    copy(fixture.directory("card"), &directory);
    let url = format!("sql:{}", directory.to_str().unwrap());
    let mut current = PASSWORD.to_owned();
    for next in [r#"'q' "d" \b %s %n <>[]{}()$`!#&;|*?~ ="#, r"\", "'", "pässwörd €", &"long".repeat(125)]
    {
        let [old_file, new_file] = ["old", "new"].map(|name| root.path().join(name));
        fs::write(&old_file, format!("{current}\n")).unwrap();
        fs::write(&new_file, format!("{next}\n")).unwrap();
        certutil!("-W", "-d", url, "-f", old_file, "-@", new_file);
        let store = open(&url, &["one"]).unwrap();
        assert_eq!(unlock(&store, &current).err(), Some(UnlockError::Wrong), "{current:?}");
        assert_key(&store, &*unlock(&store, next).unwrap(), 0);
        current = next.to_owned();
    }
}

#[test]
fn a_database_without_password_needs_none() {
    let root = TempDir::new().unwrap();
    let mut maker = Maker::new(root.path(), "db", "");
    maker.rsa("open", "1024");
    let store = open(&maker.url(), &["open"]).unwrap();
    assert!(!store.needs_secret());
    for ignored in ["", "anything", "zero\0", &"x".repeat(501)] {
        let unlocked = unlock(&store, ignored).unwrap();
        assert_key(&store, &*unlocked, 0);
    }
    let old = unlock(&store, "").unwrap();
    let new = unlock(&store, "").unwrap();
    let block = block(&store, 0, 3);
    assert_eq!(old.rsa_raw(0, &block).unwrap_err(), KeyError::LoggedOut);
    new.rsa_raw(0, &block).unwrap();

    // Its private keys are visible, so a missing one is found at once.
    let empty = Maker::new(root.path(), "empty", "");
    fs::copy(empty.file("key4.db"), maker.file("key4.db")).unwrap();
    assert_message(open(&maker.url(), &["open"]).unwrap_err(), &["\"open\"", "has no private key"]);
}

#[test]
fn a_password_changed_meanwhile_counts() {
    let root = TempDir::new().unwrap();
    let mut maker = Maker::new(root.path(), "db", "");
    maker.rsa("key", "1024");
    let open_before = open(&maker.url(), &["key"]).unwrap();
    let change = |from: &str, to: &str| {
        let [old, new] = ["old", "new"].map(|name| root.path().join(name));
        fs::write(&old, format!("{from}\n")).unwrap();
        fs::write(&new, format!("{to}\n")).unwrap();
        certutil!("-W", "-d", maker.url(), "-f", old, "-@", new);
    };

    change("", "first");
    // NSS looks once whether there is a password, so this store is of no more use, but it opens nothing.
    for password in ["", "wrong", "first"] {
        let error = unlock(&open_before, password).err().unwrap();
        assert!(matches!(error, UnlockError::NotChecked(_)), "{error}");
    }
    let store = open(&maker.url(), &["key"]).unwrap();
    assert!(store.needs_secret());
    assert_key(&store, &*unlock(&store, "first").unwrap(), 0);
    change("first", "second");
    assert_eq!(unlock(&store, "first").err(), Some(UnlockError::Wrong));
    assert_key(&store, &*unlock(&store, "second").unwrap(), 0);
    change("second", "");
    assert!(unlock(&store, "second").is_err());
    assert_key(&store, &*unlock(&store, "").unwrap(), 0);
}

// Operations.

#[test]
fn a_signature_is_one_for_openssl() {
    let fixture = Fixture::get();
    let store = fixture.card();
    let unlocked = unlock(&store, PASSWORD).unwrap();
    let message = b"signed by a card";
    for (index, certificate) in store.certificates().iter().enumerate() {
        // RFC 8017 §9.2: 00 01 FF.. 00 DigestInfo.
        let mut info = vec![0x30, 0x31, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04];
        info.extend([0x02, 0x01, 0x05, 0x00, 0x04, 0x20]);
        info.extend(Sha256::digest(message));
        let mut block = vec![0xff; certificate.kind.block_len()];
        let start = block.len() - info.len();
        block[start..].copy_from_slice(&info);
        block[start - 1] = 0;
        block[..2].copy_from_slice(&[0, 1]);

        let [key, signature, text] = ["key.der", "signature", "message"]
            .map(|name| fixture.root.path().join(format!("{index}-{name}")));
        fs::write(&key, &certificate.public_key).unwrap();
        fs::write(&signature, unlocked.rsa_raw(index, &block).unwrap().expose()).unwrap();
        fs::write(&text, message).unwrap();
        openssl!("dgst", "-sha256", "-keyform", "DER", "-verify", key, "-signature", signature, text);
    }
}

#[test]
fn blocks_must_fit_the_modulus() {
    let fixture = Fixture::get();
    let store = fixture.card();
    let unlocked = unlock(&store, PASSWORD).unwrap();
    for (index, certificate) in store.certificates().iter().enumerate() {
        let length = certificate.kind.block_len();
        let file = fixture.root.path().join(format!("{index}-modulus"));
        fs::write(&file, &certificate.public_key).unwrap();
        let text = openssl!("rsa", "-pubin", "-inform", "DER", "-in", file, "-noout", "-modulus");
        let digits = String::from_utf8(text).unwrap().trim().strip_prefix("Modulus=").unwrap().to_owned();
        let modulus = unhex(&digits);

        for bad in [0, 1, length - 1, length + 1, length * 2] {
            assert_eq!(unlocked.rsa_raw(index, &vec![0; bad]).unwrap_err(), KeyError::Block, "{bad}");
        }
        assert_eq!(unlocked.rsa_raw(index, &modulus).unwrap_err(), KeyError::Block);
        assert_eq!(unlocked.rsa_raw(index, &vec![0xff; length]).unwrap_err(), KeyError::Block);
        // 0, 1 and -1 to an odd exponent are themselves.
        let mut one = vec![0; length];
        one[length - 1] = 1;
        let mut minus_one = modulus.clone();
        minus_one[length - 1] -= 1;
        for fixed in [vec![0; length], one, minus_one] {
            assert_eq!(unlocked.rsa_raw(index, &fixed).unwrap().expose(), fixed);
        }
    }
    let error = unlocked.rsa_raw(2, &[0; 192]).unwrap_err();
    assert!(matches!(error, KeyError::Failed(_)), "{error}");
    assert!(unlocked.rsa_raw(usize::MAX, &[]).is_err());
}

#[test]
fn operations_use_a_copy_in_memory() {
    let fixture = Fixture::get();
    let root = TempDir::new().unwrap();
    let directory = root.path().join("db");
    copy(fixture.directory("card"), &directory);
    let store = open(directory.to_str().unwrap(), &["one"]).unwrap();
    let unlocked = unlock(&store, PASSWORD).unwrap();
    unlocked.rsa_raw(0, &block(&store, 0, 0)).unwrap();
    fs::write(directory.join("key4.db"), "").unwrap();
    assert_key(&store, &*unlocked, 0);
    drop(unlocked);
    assert!(matches!(unlock(&store, PASSWORD).err(), Some(UnlockError::NotChecked(_))));
}

// Paths.

/// Opens a copy of the database below a directory of that name, or gives the error.
fn open_copy(fixture: &Fixture, name: &OsStr) -> Result<(TempDir, NssDatabase), OpenError> {
    let root = TempDir::new().unwrap();
    let directory = root.path().join(name);
    copy(fixture.directory("card"), &directory);
    let link = root.path().join("link");
    symlink(&directory, &link).unwrap();
    // What is no UTF-8 can still be where a link leads to.
    let given = directory.to_str().or(link.to_str()).unwrap();
    let store = open(given, &["one", "two"])?;
    assert_eq!(store.path(), fs::canonicalize(&directory).unwrap());
    assert!(store.needs_secret());
    assert_eq!(store.certificates(), fixture.card().certificates());
    Ok((root, store))
}

#[test]
fn odd_directory_names_work() {
    let fixture = Fixture::get();
    for name in [
        "with space",
        "it's",
        "'",
        "\"quoted\"",
        r"back\slash",
        r"end\",
        r"\'",
        "[brackets] {braces} <angles> (round)",
        "]",
        ">",
        "ünïcödé 证书 🔑",
        "tab\tnewline\n",
        "%s%n",
        "a=b,c;d?e#f&g",
        "sql:",
        "dbm:",
        " ",
        "' flags=noCertDB,noKeyDB x='",
    ] {
        let (_root, store) = open_copy(&fixture, name.as_ref()).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(unlock(&store, "other password").err(), Some(UnlockError::Wrong), "{name:?}");
        unlock(&store, PASSWORD).unwrap();
    }
    let (_root, store) = open_copy(&fixture, OsStr::from_bytes(b"latin-\xe9\xff")).unwrap();
    unlock(&store, PASSWORD).unwrap();
}

#[test]
fn any_directory_name_works() {
    let fixture = Fixture::get();
    let config = ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(name in r#"([\PC\t\n'\\"<>\[\]{}=, ]){1,40}"#)| {
        prop_assume!(!name.contains('/') && name != "." && name != ".." && name != "link");
        open_copy(&fixture, name.as_ref()).unwrap_or_else(|error| panic!("{error}"));
    });
}

// Many at once.

#[test]
fn four_threads_on_two_stores() {
    let fixture = Fixture::get();
    let stores = [(fixture.card(), PASSWORD), (fixture.other(), "other password")];
    let [expected_card, expected_other] = [0, 1].map(|which| {
        let (store, password) = &stores[which];
        let block = block(store, 0, 9);
        let result = unlock(store, password).unwrap().rsa_raw(0, &block).unwrap();
        assert_eq!(raise(store, 0, &result), block);
        result
    });
    let (done, over) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let end = Instant::now() + Duration::from_millis(1500);
    thread::scope(|scope| {
        for number in 0..4 {
            let (store, password) = &stores[number % 2];
            let expected = if number % 2 == 0 { &expected_card } else { &expected_other };
            let (done, over) = (&done, &over);
            scope.spawn(move || {
                let block = block(store, 0, 9);
                for round in 0.. {
                    if Instant::now() > end {
                        break;
                    }
                    if round % 3 == number % 3 {
                        assert_eq!(unlock(store, "wrong").err(), Some(UnlockError::Wrong));
                    }
                    let unlocked = unlock(store, password).unwrap();
                    for _ in 0..5 {
                        match unlocked.rsa_raw(0, &block) {
                            Ok(result) => {
                                assert!(result.equals(expected.expose()));
                                done.fetch_add(1, Ordering::Relaxed);
                            }
                            // The other thread on this store has logged in.
                            Err(KeyError::LoggedOut) => {
                                over.fetch_add(1, Ordering::Relaxed);
                            }
                            Err(error) => panic!("{error}"),
                        }
                    }
                }
            });
        }
        // Opening and closing beside them.
        scope.spawn(|| {
            while Instant::now() < end {
                let store = fixture.card();
                assert_eq!(store.certificates().len(), 2);
            }
        });
    });
    assert!(done.into_inner() > 0 && over.into_inner() > 0, "the threads did not meet");
}

#[test]
fn the_97th_database_is_refused() {
    const HERE: &str = "NSS_TEST_FILL_THE_PROCESS";
    let Some(directory) = std::env::var_os(HERE) else {
        // A process of its own, as the other tests open databases too.
        let fixture = Fixture::get();
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "the_97th_database_is_refused"])
            .env(HERE, fixture.directory("card"))
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("1 passed"), "{text}");
        return;
    };
    let directory = directory.to_str().unwrap();
    let mut stores: Vec<_> = (0..96).map(|_| open(directory, &["one"]).unwrap()).collect();
    for _ in 0..3 {
        let error = open(directory, &["one"]).unwrap_err();
        assert!(matches!(error, OpenError::TooManyDatabases { .. }), "{error}");
        assert_message(error, &[directory, "96"]);
    }
    stores.swap_remove(50);
    let store = open(directory, &["one"]).unwrap();
    assert_key(&store, &*unlock(&store, PASSWORD).unwrap(), 0);
}
