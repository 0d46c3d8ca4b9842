//! Tokens as key stores, against SoftHSM. Its tokens cannot be pulled out; what happens then is tested with OpenSC.

#![cfg(all(unix, feature = "nss"))]
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "clippy sees the helpers of a test as no test")]

use std::ffi::OsStr;
use std::fs;
use std::future::poll_fn;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::Instant;

use emulated_card::card::{CardOptions, EmulatedCard, Profile};
use emulated_card::keys::nss::token::{Module, ModuleError, Token, TokenError, TokenStore, TokenWatch};
use emulated_card::keys::{Curve, KeyError, KeyKind, KeyStore, UnlockError, Unlocked};
use emulated_card::pin::{PinError, ReferenceData};
use emulated_card::slot;
use emulated_card::state::{CardId, StateDirectory};
use emulated_card::token::{TokenCard, TokenCardError};
use openssl_tool::{make_certificate, openssl, peer, run, verify_ecdsa};
use tempfile::TempDir;
use vscard_protocol::{CardSource, Command as Apdu, Presence, Secret};

#[path = "common/openssl_tool.rs"]
mod openssl_tool;

const SOFTHSM: &str = "/usr/lib/softhsm/libsofthsm2.so";
const PIN: &str = "123456";
const DIRECTORY: &str = "NSS_TOKEN_TEST_DIRECTORY";

/// The directory of SoftHSM's configuration, in the process that was started with it. SoftHSM reads the environment,
/// so each test runs in a process of its own, started by the first one, in which this is `None`.
fn in_a_process_with_softhsm(test: &str) -> Option<Host> {
    if let Some(root) = std::env::var_os(DIRECTORY) {
        return Some(Host { root: root.into() });
    }
    let root = TempDir::new().unwrap();
    fs::create_dir(root.path().join("tokens")).unwrap();
    let configuration = format!(
        "directories.tokendir = {}\nobjectstore.backend = file\nlog.level = ERROR\nslots.removable = true\n",
        root.path().join("tokens").display()
    );
    fs::write(root.path().join("softhsm2.conf"), configuration).unwrap();
    same_test(test, root.path(), &[]);
    None
}

/// Runs the test in another process.
fn same_test(test: &str, root: &Path, environment: &[(&str, &str)]) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(DIRECTORY, root)
        .env("SOFTHSM2_CONF", root.join("softhsm2.conf"))
        .envs(environment.iter().copied())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

/// What a host has: tokens, and a place for state.
struct Host {
    root: PathBuf,
}

/// What is to be on a token.
struct Entry {
    name: &'static str,
    id: &'static str,
    key: &'static str,
    /// `pkcs11-tool`'s words for what its private key may do; `None` leaves the key out.
    usage: Option<&'static [&'static str]>,
    authority: bool,
    public_key: bool,
}

const PLAIN: Entry = Entry {
    name: "",
    id: "",
    key: "rsa:1024",
    usage: Some(&["--usage-sign", "--usage-decrypt"]),
    authority: false,
    public_key: true,
};

impl Host {
    fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    fn make_token(&self, label: &str, entries: &[Entry]) {
        let init = ["--init-token", "--free", "--label", label, "--pin", PIN, "--so-pin", "12345678"];
        run("softhsm2-util", "softhsm2", &init.map(OsStr::new));
        for entry in entries {
            let [key, certificate, public] = ["key.pem", "crt.pem", "key.pub"].map(|name| self.path(name));
            let constraints =
                format!("basicConstraints=CA:{}", if entry.authority { "TRUE" } else { "FALSE" });
            make_certificate(entry.name, entry.key, &key, &certificate, &["-addext", &constraints]);
            let der = self.path(&format!("{}.der", entry.name));
            openssl!("x509", "-in", certificate, "-outform", "DER", "-out", der);
            openssl!("pkey", "-in", key, "-pubout", "-outform", "DER", "-out", public);
            self.write(label, entry, "cert", &der, &[]);
            if let Some(usage) = entry.usage {
                self.write(label, entry, "privkey", &key, usage);
                if entry.public_key {
                    self.write(label, entry, "pubkey", &public, &[]);
                }
            }
        }
    }

    fn write(&self, token: &str, entry: &Entry, kind: &str, file: &Path, more: &[&str]) {
        let mut arguments: Vec<&OsStr> =
            ["--module", SOFTHSM, "--token-label", token, "--login", "--pin", PIN]
                .into_iter()
                .chain(["--type", kind, "--id", entry.id, "--label", entry.name, "--write-object"])
                .map(OsStr::new)
                .collect();
        arguments.push(file.as_ref());
        arguments.extend(more.iter().map(OsStr::new));
        run("pkcs11-tool", "opensc", &arguments);
    }

    /// As another program does it.
    fn log_in(&self, token: &str) {
        let arguments = ["--module", SOFTHSM, "--token-label", token, "--login", "--pin", PIN, "-O"];
        run("pkcs11-tool", "opensc", &arguments.map(OsStr::new));
    }

    fn state(&self) -> StateDirectory {
        StateDirectory::at(self.path("state"))
    }

    fn tokens(&self) -> Vec<Token> {
        TokenWatch::new(&[module()]).unwrap().tokens()
    }

    /// The store of the only token.
    fn store(&self) -> TokenStore {
        let tokens = self.tokens();
        assert_eq!(tokens.len(), 1);
        TokenStore::open(&tokens[0], &self.state()).unwrap()
    }
}

#[test]
fn a_module_that_does_not_start_is_named() {
    if std::env::var_os(DIRECTORY).is_some() {
        let error = Module::load(Path::new(SOFTHSM)).unwrap_err().to_string();
        assert!(error.contains("libsofthsm2.so") && error.contains("does not start"), "{error}");
    }
}

/// The PIN of a token, with a counter that every card on it has in common.
fn reference(host: &Host, store: &Arc<TokenStore>) -> ReferenceData {
    let token = store.token().serial_number();
    ReferenceData::of_token(&host.state(), token, Arc::clone(store) as Arc<dyn KeyStore>, 3)
}

fn module() -> Module {
    Module::load(Path::new(SOFTHSM)).unwrap_or_else(|error| panic!("{error}; install the package softhsm2"))
}

fn unlock(store: &dyn KeyStore, pin: &str) -> Result<Box<dyn Unlocked>, UnlockError> {
    store.unlock(&Secret::from(pin.as_bytes()))
}

fn names(store: &TokenStore) -> Vec<&str> {
    store.certificates().iter().map(|certificate| &*certificate.name).collect()
}

/// Fails unless raising the result of the raw operation to the public exponent gives the block back.
#[track_caller]
fn assert_rsa(host: &Host, store: &TokenStore, unlocked: &dyn Unlocked, index: usize, block: &[u8]) {
    let result = unlocked.rsa_raw(index, block).unwrap();
    let [key, input] = ["rsa-key", "rsa-result"].map(|name| host.path(name));
    fs::write(&key, &store.certificates()[index].public_key).unwrap();
    fs::write(&input, result.expose()).unwrap();
    let option = "rsa_padding_mode:none";
    let raised = openssl!(
        "pkeyutl", "-encrypt", "-pubin", "-keyform", "DER", "-inkey", key, "-pkeyopt", option, "-in", input
    );
    assert_eq!(raised, block);
}

#[test]
fn a_token_is_listed_and_used() {
    let Some(host) = in_a_process_with_softhsm("a_token_is_listed_and_used") else { return };
    let curve = Some(&["--usage-sign", "--usage-derive"][..]);
    host.make_token(
        "card",
        &[
            Entry { name: "third", id: "0003", key: "P-384", usage: curve, ..PLAIN },
            Entry { name: "second", id: "ff", key: "P-256", usage: curve, ..PLAIN },
            Entry { name: "first", id: "01", key: "rsa:2048", ..PLAIN },
            Entry { name: "without key", id: "04", usage: None, ..PLAIN },
            Entry { name: "authority", id: "05", authority: true, ..PLAIN },
            Entry { name: "small", id: "06", key: "rsa:768", ..PLAIN },
        ],
    );
    let store = host.store();
    assert_eq!(store.token().label(), "card");
    assert_eq!(store.token().serial_number().len(), 16);
    assert!(store.needs_secret());
    assert_eq!(names(&store), ["first", "second", "third"]);
    let kinds: Vec<_> = store.certificates().iter().map(|certificate| certificate.kind).collect();
    assert_eq!(kinds, [KeyKind::Rsa { bits: 2048 }, KeyKind::Ec(Curve::P256), KeyKind::Ec(Curve::P384)]);
    for certificate in store.certificates() {
        assert_eq!(certificate.der, fs::read(host.path(&format!("{}.der", certificate.name))).unwrap());
    }

    assert_eq!(unlock(&store, "654321").err(), Some(UnlockError::Wrong));
    assert!(matches!(unlock(&store, "123456\0").err(), Some(UnlockError::Unfit(_))));
    let unlocked = unlock(&store, PIN).unwrap();
    let signature = [&[0, 1], &[0xff; 200][..], &[0], &[7; 53]].concat();
    let mut other = signature.clone();
    other[1] = 0x7f;
    for block in [signature, other] {
        assert_rsa(&host, &store, &*unlocked, 0, &block);
    }
    assert_eq!(unlocked.rsa_raw(0, &[0xff; 256]).unwrap_err(), KeyError::Block);
    for (index, curve) in [(1, Curve::P256), (2, Curve::P384)] {
        let certificate = &store.certificates()[index];
        let digest = vec![0x5a; curve.field_len()];
        let signature = unlocked.ecdsa(index, &digest).unwrap();
        verify_ecdsa(&host.root, certificate, &digest, &signature);
        let (mut point, shared) = peer(&host.root, curve, &certificate.public_key);
        assert_eq!(unlocked.ecdh(index, &point).unwrap().expose(), shared);
        *point.last_mut().unwrap() ^= 1;
        assert_eq!(unlocked.ecdh(index, &point).unwrap_err(), KeyError::Block);
    }

    assert!(unlock(&store, "wrong").is_err());
    assert_eq!(unlocked.ecdsa(1, &[1; 32]), Err(KeyError::LoggedOut));
    drop(unlocked);
    unlock(&store, PIN).unwrap().ecdsa(1, &[1; 32]).unwrap();
}

#[test]
fn what_a_key_may_do_decides_the_way_to_raw_rsa() {
    let Some(host) = in_a_process_with_softhsm("what_a_key_may_do_decides_the_way_to_raw_rsa") else {
        return;
    };
    host.make_token(
        "card",
        &[
            Entry { name: "signs", id: "01", usage: Some(&["--usage-sign"]), ..PLAIN },
            Entry { name: "decrypts", id: "02", usage: Some(&["--usage-decrypt"]), ..PLAIN },
            Entry { name: "neither", id: "03", usage: Some(&["--usage-derive"]), ..PLAIN },
        ],
    );
    let store = host.store();
    let unlocked = unlock(&store, PIN).unwrap();
    for index in 0..2 {
        assert_rsa(&host, &store, &*unlocked, index, &[5; 128]);
        assert_rsa(&host, &store, &*unlocked, index, &[&[0, 1], &[0xff; 100][..], &[0; 26]].concat());
    }
}

#[test]
fn a_key_may_want_the_pin_each_time() {
    let Some(host) = in_a_process_with_softhsm("a_key_may_want_the_pin_each_time") else { return };
    let usage = Some(&["--usage-sign", "--always-auth"][..]);
    host.make_token(
        "card",
        &[
            Entry { name: "always", id: "01", usage, ..PLAIN },
            Entry { name: "always too", id: "02", key: "P-256", usage, ..PLAIN },
            Entry { name: "once", id: "03", ..PLAIN },
        ],
    );
    let store = host.store();
    let block = [&[0, 1], &[0xff; 100][..], &[0; 26]].concat();
    for _ in 0..2 {
        let unlocked = unlock(&store, PIN).unwrap();
        assert_rsa(&host, &store, &*unlocked, 2, &block);
        assert_rsa(&host, &store, &*unlocked, 0, &block);
        // The PIN is used up, for the other key, too.
        assert_eq!(unlocked.rsa_raw(0, &block).unwrap_err(), KeyError::LoggedOut);
        assert_eq!(unlocked.ecdsa(1, &[1; 32]).unwrap_err(), KeyError::LoggedOut);
        assert_rsa(&host, &store, &*unlocked, 2, &block);
        let unlocked = unlock(&store, PIN).unwrap();
        let signature = unlocked.ecdsa(1, &[1; 32]).unwrap();
        verify_ecdsa(&host.root, &store.certificates()[1], &[1; 32], &signature);
    }
}

#[test]
fn a_login_that_was_ended_by_others_is_over() {
    let Some(host) = in_a_process_with_softhsm("a_login_that_was_ended_by_others_is_over") else { return };
    host.make_token("card", &[Entry { name: "key", id: "01", ..PLAIN }]);
    let store = host.store();
    let unlocked = unlock(&store, PIN).unwrap();
    assert_rsa(&host, &store, &*unlocked, 0, &[5; 128]);
    // In one process a token knows one login, so the end of another's is the end of this one.
    let other = StateDirectory::at(host.path("another state"));
    let other = TokenStore::open(store.token(), &other).unwrap();
    drop(unlock(&other, PIN).unwrap());
    assert_eq!(unlocked.rsa_raw(0, &[5; 128]).unwrap_err(), KeyError::LoggedOut);
    drop(unlocked);
    assert_rsa(&host, &store, &*unlock(&store, PIN).unwrap(), 0, &[5; 128]);
}

#[test]
fn keys_that_are_invisible_are_missed_at_login() {
    let Some(host) = in_a_process_with_softhsm("keys_that_are_invisible_are_missed_at_login") else { return };
    host.make_token(
        "card",
        &[
            Entry { name: "there", id: "01", public_key: false, ..PLAIN },
            Entry { name: "gone", id: "02", usage: None, ..PLAIN },
        ],
    );
    let store = host.store();
    assert_eq!(names(&store), ["there", "gone"]);
    let unlocked = unlock(&store, PIN).unwrap();
    assert_rsa(&host, &store, &*unlocked, 0, &[5; 128]);
    assert!(matches!(unlocked.rsa_raw(1, &[5; 128]), Err(KeyError::Failed(_))));
}

/// Counts the lines of the log.
struct Log(Arc<AtomicUsize>);

impl tracing::Subscriber for Log {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() <= tracing::Level::INFO
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

    fn event(&self, _: &tracing::Event<'_>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {}
}

#[test]
fn a_certificate_without_its_key_does_not_fill_the_log() {
    let Some(host) = in_a_process_with_softhsm("a_certificate_without_its_key_does_not_fill_the_log") else {
        return;
    };
    host.make_token("jane", &[Entry { name: "lost", id: "01", usage: None, ..PLAIN }]);
    let lines = Arc::new(AtomicUsize::new(0));
    let start = Instant::now();
    tracing::subscriber::with_default(Log(Arc::clone(&lines)), || {
        // It may be that the token was put in again, too.
        for _ in 0..10 {
            let store = host.store();
            (0..200).for_each(|_| drop(unlock(&store, PIN).unwrap()));
        }
    });
    let most = 64 + start.elapsed().as_secs() as usize / 60 + 1;
    let lines = lines.load(Ordering::Relaxed);
    assert!((1..=most).contains(&lines), "{lines} lines");
}

#[test]
fn tokens_that_are_no_cards_are_named() {
    let Some(host) = in_a_process_with_softhsm("tokens_that_are_no_cards_are_named") else { return };
    assert_eq!(host.tokens(), []);
    host.make_token("empty", &[Entry { name: "authority", id: "01", authority: true, ..PLAIN }]);
    // This process has its list of slots already.
    same_test("the_token_has_no_certificate", &host.root, &[]);
}

#[test]
fn the_token_has_no_certificate() {
    let Some(root) = std::env::var_os(DIRECTORY) else { return };
    let host = Host { root: root.into() };
    let error = TokenStore::open(&host.tokens()[0], &host.state()).unwrap_err();
    assert!(matches!(&error, TokenError::NoCertificates { label } if label == "empty"), "{error}");
    // What could not be opened is not claimed.
    let error = TokenStore::open(&host.tokens()[0], &host.state()).unwrap_err();
    assert!(matches!(error, TokenError::NoCertificates { .. }), "{error}");
}

#[test]
fn a_token_is_for_one_card() {
    const HERE: &str = "NSS_TOKEN_TEST_SECOND";
    let Some(host) = in_a_process_with_softhsm("a_token_is_for_one_card") else { return };
    let refused = |token: &Token| {
        let error = TokenStore::open(token, &host.state()).unwrap_err();
        assert!(matches!(error, TokenError::InUse { .. }), "{error}");
        assert!(error.to_string().contains("card"), "{error}");
    };
    if std::env::var_os(HERE).is_some() {
        return refused(&host.tokens()[0]);
    }
    host.make_token("card", &[Entry { name: "key", id: "01", ..PLAIN }]);
    let store = host.store();
    refused(store.token());
    same_test("a_token_is_for_one_card", &host.root, &[(HERE, "")]);
    let token = store.token().clone();
    drop(store);
    TokenStore::open(&token, &host.state()).unwrap();
}

#[tokio::test]
async fn a_token_that_two_modules_reach_is_one() {
    let Some(host) = in_a_process_with_softhsm("a_token_that_two_modules_reach_is_one") else { return };
    host.make_token("card", &[Entry { name: "key", id: "01", ..PLAIN }]);
    let copy = host.path("copy.so");
    fs::copy(SOFTHSM, &copy).unwrap();
    let copy = Module::load(&copy).unwrap();
    let card = card_on_one_of(&[copy.clone(), module()], &host, None).unwrap();
    assert!(card.presence().get().insertion().is_some());
    for module in [module(), copy] {
        let error = card_on_one_of(&[module], &host, None).unwrap_err();
        assert!(error.to_string().contains("another card on it"), "{error}");
    }
}

#[test]
fn wrong_pins_are_counted() {
    let Some(host) = in_a_process_with_softhsm("wrong_pins_are_counted") else { return };
    host.make_token("card", &[Entry { name: "key", id: "01", ..PLAIN }]);
    let store: Arc<TokenStore> = Arc::new(host.store());
    let reference = reference(&host, &store);
    let verify = |pin: &str| reference.verify(&Secret::from(pin.as_bytes()), &*store);
    assert!(matches!(verify("000000").err(), Some(PinError::Wrong { left: 2 })));
    assert_eq!(reference.tries_left().unwrap(), 2);
    // SoftHSM's have 4 to 255 bytes.
    for unfit in ["123", &"1".repeat(256)] {
        assert!(matches!(verify(unfit).err(), Some(PinError::Impossible(_))));
    }
    assert_eq!(reference.tries_left().unwrap(), 2);
    drop(verify(PIN).unwrap());
    assert_eq!(reference.tries_left().unwrap(), 3);
    for left in [2, 1, 0] {
        assert!(matches!(verify("000000").err(), Some(PinError::Wrong { left: found }) if found == left));
    }
    assert!(matches!(verify(PIN).err(), Some(PinError::Blocked)));
    assert!(matches!(reference.without_pin(&*store).err(), Some(PinError::NotSupported)));
    // Whoever comes anew finds it so.
    let later = self::reference(&host, &store);
    assert_eq!(later.tries_left().unwrap(), 0);
    let refused = later.verify(&Secret::from(PIN.as_bytes()), &*store).err();
    assert!(matches!(refused, Some(PinError::Blocked)));
    assert_eq!(later.tries_left().unwrap(), 0);
    // SoftHSM tells other programs that there were wrong PINs, until one of them gives the right one.
    host.log_in("card");
    assert_eq!(reference.tries_left().unwrap(), 3);
    assert_eq!(later.tries_left().unwrap(), 3);
    let latest = self::reference(&host, &store);
    assert_eq!(latest.tries_left().unwrap(), 0, "it was not told of the wrong ones");
    assert!(matches!(
        reference.verify(&Secret::from(&b"000000"[..]), &*store).err(),
        Some(PinError::Wrong { left: 2 })
    ));
    drop(reference.verify(&Secret::from(PIN.as_bytes()), &*store).unwrap());
    assert_eq!(reference.tries_left().unwrap(), 3);
}

#[test]
fn a_token_that_fails_when_it_has_the_pin_may_have_counted() {
    let test = "a_token_that_fails_when_it_has_the_pin_may_have_counted";
    let Some(host) = in_a_process_with_softhsm(test) else { return };
    let so_pin = "12345678";
    let init = ["--module", SOFTHSM, "--init-token", "--label", "card", "--so-pin", so_pin];
    run("pkcs11-tool", "opensc", &init.map(OsStr::new));
    let [key, certificate, der] = ["key.pem", "crt.pem", "crt.der"].map(|name| host.path(name));
    let constraints = ["-addext", "basicConstraints=CA:FALSE"];
    make_certificate("key", "rsa:1024", &key, &certificate, &constraints);
    openssl!("x509", "-in", certificate, "-outform", "DER", "-out", der);
    let write = ["--login", "--login-type", "so", "--so-pin", so_pin, "--type", "cert", "--id", "01"];
    let mut arguments: Vec<&OsStr> = ["--module", SOFTHSM].iter().chain(&write).map(OsStr::new).collect();
    arguments.extend([OsStr::new("--write-object"), der.as_ref()]);
    run("pkcs11-tool", "opensc", &arguments);

    let store = Arc::new(host.store());
    // CKR_USER_PIN_NOT_INITIALIZED.
    assert!(matches!(unlock(&*store, PIN).err(), Some(UnlockError::Unclear(_))));
    let reference = reference(&host, &store);
    let verify = |pin: &str| reference.verify(&Secret::from(pin.as_bytes()), &*store).err();
    assert!(matches!(verify("123456\0"), Some(PinError::Impossible(_))));
    assert_eq!(reference.tries_left().unwrap(), 3);
    for left in [2, 1, 0] {
        assert!(matches!(verify(PIN), Some(PinError::NotChecked(_))));
        assert_eq!(reference.tries_left().unwrap(), left);
    }
    assert!(matches!(verify(PIN), Some(PinError::Blocked)));
}

#[test]
fn a_token_that_cannot_be_asked_has_no_try_for_a_guest() {
    let Some(host) = in_a_process_with_softhsm("a_token_that_cannot_be_asked_has_no_try_for_a_guest") else {
        return;
    };
    host.make_token("card", &[Entry { name: "key", id: "01", ..PLAIN }]);
    let store = host.store();
    assert_eq!((store.tries_hint(), store.was_wrong()), (None, Some(false)));
    fs::remove_dir_all(host.path("tokens")).unwrap();
    assert_eq!((store.tries_hint(), store.was_wrong()), (Some(1), None));
}

#[test]
fn what_another_token_says_is_not_believed() {
    let Some(host) = in_a_process_with_softhsm("what_another_token_says_is_not_believed") else { return };
    let object = |label: &str| {
        let before: Vec<_> = directories(&host);
        host.make_token(label, &[Entry { name: "key", id: "01", ..PLAIN }]);
        let new = directories(&host).into_iter().find(|path| !before.contains(path)).unwrap();
        new.join("token.object")
    };
    let (first, other) = (object("card"), object("other"));
    let token = host.tokens().into_iter().find(|token| token.label() == "card").unwrap();
    let store = Arc::new(TokenStore::open(&token, &host.state()).unwrap());
    let reference = reference(&host, &store);
    assert!(reference.verify(&Secret::from(&b"000000"[..]), &*store).is_err());
    assert_eq!((store.was_wrong(), reference.tries_left().unwrap()), (Some(true), 2));
    // It is in the same slot now, before anybody noticed.
    fs::copy(other, first).unwrap();
    assert_eq!((store.tries_hint(), store.was_wrong()), (Some(1), None));
    assert_eq!(reference.tries_left().unwrap(), 1);
}

fn directories(host: &Host) -> Vec<PathBuf> {
    fs::read_dir(host.path("tokens")).unwrap().map(|entry| entry.unwrap().path()).collect()
}

/// A token for which no PIN is right.
struct Flags {
    was_wrong: Mutex<Option<bool>>,
    refusal: Mutex<UnlockError>,
}

impl KeyStore for Flags {
    fn certificates(&self) -> &[emulated_card::keys::Certificate] {
        &[]
    }

    fn needs_secret(&self) -> bool {
        true
    }

    fn was_wrong(&self) -> Option<bool> {
        *self.was_wrong.lock().unwrap()
    }

    fn unlock(&self, _: &Secret) -> Result<Box<dyn Unlocked>, UnlockError> {
        Err(self.refusal.lock().unwrap().clone())
    }
}

/// A token that says that after a wrong PIN.
fn flags(was_wrong: Option<bool>) -> Arc<Flags> {
    Arc::new(Flags { was_wrong: Mutex::new(was_wrong), refusal: Mutex::new(UnlockError::Wrong) })
}

#[test]
fn a_token_that_never_told_of_wrong_pins_tells_of_no_right_one() {
    let directory = TempDir::new().unwrap();
    // What it says after two wrong PINs, what it says then, and what is left.
    for (at, (after, later, left)) in [
        (Some(false), Some(false), 1),
        (None, Some(false), 1),
        (Some(true), None, 1),
        (Some(true), Some(true), 1),
        (Some(true), Some(false), 3),
    ]
    .into_iter()
    .enumerate()
    {
        let store = flags(after);
        let state = StateDirectory::at(directory.path().join("state"));
        let reference =
            || ReferenceData::of_token(&state, &at.to_string(), Arc::clone(&store) as Arc<dyn KeyStore>, 3);
        let first = reference();
        for _ in 0..2 {
            assert!(first.verify(&Secret::from(PIN.as_bytes()), &*store).is_err());
        }
        *store.was_wrong.lock().unwrap() = later;
        assert_eq!(first.tries_left().unwrap(), left, "{after:?}, then {later:?}");
        assert_eq!(reference().tries_left().unwrap(), 1, "put in again, or after a restart");
        let error = first.verify(&Secret::from(PIN.as_bytes()), &*store).err();
        assert!(matches!(error, Some(PinError::Wrong { left: now }) if now == left - 1), "{error:?}");
    }
}

#[test]
fn a_pin_that_was_not_compared_gives_no_tries_back() {
    let directory = TempDir::new().unwrap();
    let state = StateDirectory::at(directory.path().join("state"));
    let store = flags(Some(true));
    let reference = || ReferenceData::of_token(&state, "any", Arc::clone(&store) as Arc<dyn KeyStore>, 3);
    let first = reference();
    let verify = || first.verify(&Secret::from(PIN.as_bytes()), &*store).err();
    assert!(matches!(verify(), Some(PinError::Wrong { left: 2 })));
    assert!(matches!(verify(), Some(PinError::Wrong { left: 1 })));
    *store.was_wrong.lock().unwrap() = Some(false);
    *store.refusal.lock().unwrap() = UnlockError::NotChecked("removed".into());
    assert!(matches!(verify(), Some(PinError::NotChecked(_))));
    assert_eq!(reference().tries_left().unwrap(), 1);
}

#[test]
fn modules_are_found_and_what_is_none_is_named() {
    let Some(host) = in_a_process_with_softhsm("modules_are_found_and_what_is_none_is_named") else { return };
    let load = |library: &str| Module::load(Path::new(library)).unwrap_err();
    for (library, reason) in [
        ("/missing.so", "No such file or directory"),
        ("libc.so.6", "PR_FIND_SYMBOL_ERROR"),
        ("/", "PR_LOAD"),
    ] {
        let error = load(library).to_string();
        assert!(error.contains(library) && error.contains(reason), "{error}");
    }
    assert!(matches!(load("/a\0b"), ModuleError::Path { .. }));

    let directory = host.path("nss");
    fs::create_dir(&directory).unwrap();
    let url = format!("sql:{}", directory.display());
    run("certutil", "libnss3-tools", &["-N", "-d", &url, "--empty-password"].map(OsStr::new));
    let error = Module::of_directory(&url).unwrap_err();
    assert!(matches!(error, ModuleError::NoModules { .. }), "{error}");
    let add = ["-force", "-dbdir", &url, "-add", "token", "-libfile", SOFTHSM];
    run("modutil", "libnss3-tools", &add.map(OsStr::new));
    let list = directory.join("pkcs11.txt");
    let mut text = fs::read_to_string(&list).unwrap();
    text.push_str("\nlibrary=/missing.so\nname=broken\n\n");
    fs::write(&list, text).unwrap();
    let modules = Module::of_directory(&url).unwrap();
    assert_eq!(modules.len(), 1);
    assert_eq!(modules[0].library(), fs::canonicalize(SOFTHSM).unwrap().to_str().unwrap());
    let error = Module::of_directory("/missing").unwrap_err();
    assert!(matches!(error, ModuleError::List { .. }), "{error}");
    // It has no configuration.
    let test = "a_module_that_does_not_start_is_named";
    same_test(test, &host.root, &[("SOFTHSM2_CONF", "/missing")]);
    // Nothing is waited for that may never be written.
    fs::remove_file(&list).unwrap();
    run("mkfifo", "coreutils", &[list.as_os_str()]);
    let error = Module::of_directory(&url).unwrap_err();
    assert!(error.to_string().contains("not a regular file"), "{error}");
}

fn card_on(host: &Host, wanted: Option<&str>) -> Result<TokenCard, TokenCardError> {
    card_on_one_of(&[module()], host, wanted)
}

fn card_on_one_of(
    modules: &[Module],
    host: &Host,
    wanted: Option<&str>,
) -> Result<TokenCard, TokenCardError> {
    let state = host.state();
    let make = move |store: Arc<TokenStore>| {
        let id = CardId::derive(store.certificates(), "");
        let counted = Arc::clone(&store) as Arc<dyn KeyStore>;
        let reference = ReferenceData::of_token(&state, store.token().serial_number(), counted, 3);
        let options = CardOptions { profile: Profile::Cac, slots: slot::assign(store.certificates(), &[])? };
        Ok(EmulatedCard::new(store, Arc::new(reference), id, options, Box::new(|bytes| bytes.fill(7)))?)
    };
    TokenCard::open(modules, wanted.map(str::to_owned), host.state(), None, Box::new(make))
}

#[cfg(all(feature = "pem", feature = "pcsc"))]
#[test]
fn a_token_whose_tries_are_not_counted_has_nothing_to_unlock() {
    use emulated_card::setup::{CardSetup, Keys};

    let test = "a_token_whose_tries_are_not_counted_has_nothing_to_unlock";
    let Some(host) = in_a_process_with_softhsm(test) else { return };
    host.make_token("card", &[Entry { name: "key", id: "01", ..PLAIN }]);
    let keys = Keys::Token { modules: vec![SOFTHSM.into()], db: None, token: None };
    let state = Some((host.state(), "any".into()));
    let error = CardSetup { keys, state, ..CardSetup::default() }.unlock().unwrap_err().to_string();
    assert!(error.contains("\"card\"") && !error.contains("certificates"), "{error}");
}

/// A store whose PIN check is a fault.
struct Faulty(Arc<TokenStore>);

impl KeyStore for Faulty {
    fn certificates(&self) -> &[emulated_card::keys::Certificate] {
        self.0.certificates()
    }

    fn needs_secret(&self) -> bool {
        true
    }

    fn unlock(&self, _: &Secret) -> Result<Box<dyn Unlocked>, UnlockError> {
        panic!("a fault in a module")
    }
}

#[tokio::test]
async fn a_fault_takes_the_card_on_a_token_away_and_is_told() {
    let Some(host) = in_a_process_with_softhsm("a_fault_takes_the_card_on_a_token_away_and_is_told") else {
        return;
    };
    host.make_token("card", &[Entry { name: "key", id: "01", ..PLAIN }]);
    let make = |store: Arc<TokenStore>| {
        let id = CardId::derive(store.certificates(), "");
        let options = CardOptions { profile: Profile::Cac, slots: slot::assign(store.certificates(), &[])? };
        let (store, reference) = (Arc::new(Faulty(store)), Arc::new(ReferenceData::in_memory(3)));
        Ok(EmulatedCard::new(store, reference, id, options, Box::new(|bytes| bytes.fill(7)))?)
    };
    let card = TokenCard::open(&[module()], None, host.state(), None, Box::new(make)).unwrap();
    let mut session = card.power_on(1).await.unwrap();
    let verify = Apdu::parse(b"\x00\x20\x00\x00\x06123456").unwrap();
    assert!(session.transmit(&verify).await.is_err());
    tokio::time::timeout(std::time::Duration::from_secs(30), card.failed()).await.unwrap();
    assert_eq!(card.presence().get(), Presence::Absent);
}

#[tokio::test]
async fn a_token_is_a_card() {
    let Some(host) = in_a_process_with_softhsm("a_token_is_a_card") else { return };
    host.make_token("one", &[Entry { name: "one", id: "01", ..PLAIN }]);
    host.make_token("two", &[Entry { name: "two", id: "01", ..PLAIN }]);
    let error = card_on(&host, None).unwrap_err();
    assert!(matches!(&error, TokenCardError::Several(tokens) if tokens.len() == 2), "{error}");
    let absent = card_on(&host, Some("three")).unwrap();
    assert_eq!(absent.presence().get(), Presence::Absent);
    assert!(absent.power_on(1).await.is_err());

    let card = card_on(&host, Some("one")).unwrap();
    let error = card_on(&host, Some("one")).unwrap_err();
    assert!(error.to_string().contains("another card on it"), "{error}");
    let serial_number =
        host.tokens().iter().find(|token| token.label() == "two").unwrap().serial_number().to_owned();
    let _second = card_on(&host, Some(&serial_number)).unwrap();

    let Presence::Present { insertion: 1, atr, .. } = card.presence().get() else { panic!() };
    let mut session = card.power_on(1).await.unwrap();
    assert_eq!(*session.atr(), atr);
    let mut statuses = Vec::new();
    for command in [&b"\x00\x20\x00\x00"[..], b"\x00\x20\x00\x00\x06000000", b"\x00\x20\x00\x00\x06123456"] {
        let response = session.transmit(&Apdu::parse(command).unwrap()).await.unwrap();
        statuses.push(response.status().to_string());
    }
    assert_eq!(statuses, ["63C3", "63C2", "9000"]);
    let select = b"\x00\xa4\x04\x0c\x07\xa0\x00\x00\x00\x79\x01\x00";
    let response = session.transmit(&Apdu::parse(select).unwrap()).await.unwrap();
    assert_eq!(response.status().to_string(), "9000");
    let sign = [&[0x80, 0x42, 0x00, 0x00, 0x80], &[5; 128][..], &[0]].concat();
    let response = session.transmit(&Apdu::parse(&sign).unwrap()).await.unwrap();
    assert_eq!(response.status().to_string(), "9000");
    assert_eq!(response.data().len(), 128);
    // Powered off, the card has forgotten the PIN.
    drop(session);
    let mut session = card.power_on(1).await.unwrap();
    let response = session.transmit(&Apdu::parse(b"\x00\x20\x00\x00").unwrap()).await.unwrap();
    assert_eq!(response.status().to_string(), "63C3");

    // The token is free at once, whatever the card was about.
    let command = Apdu::parse(b"\x00\x20\x00\x00\x06123456").unwrap();
    let mut verify = session.transmit(&command);
    poll_fn(|context| {
        assert!(verify.as_mut().poll(context).is_pending());
        Poll::Ready(())
    })
    .await;
    drop(card);
    let card = card_on(&host, Some("one")).unwrap();
    assert!(verify.await.is_err());
    let mut session = card.power_on(1).await.unwrap();
    assert_eq!(session.transmit(&command).await.unwrap().status().to_string(), "9000");
}
