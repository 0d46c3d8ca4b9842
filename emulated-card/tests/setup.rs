//! Cards as the programs open them.

#![cfg(all(unix, feature = "nss", feature = "pem", feature = "pcsc"))]
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "clippy sees what a test calls as no test")]

#[path = "common/openssl_tool.rs"]
mod openssl_tool;

use std::fs::{self, DirBuilder, Permissions};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use emulated_card::card::Profile;
use emulated_card::keys::pem::PemSource;
use emulated_card::setup::{CardSetup, Keys, OpenCard, SetupError, Wanted, Written};
use emulated_card::state::StateDirectory;
use tempfile::TempDir;

use openssl_tool::make_certificate;

/// A card in a directory, as `vscclient new-card` makes it.
struct Directory(TempDir);

impl Directory {
    fn new() -> Self {
        let directory = Self(tempfile::tempdir().unwrap());
        let [certificate, key] = ["card.crt", "card.key"].map(|name| directory.path(name));
        make_certificate("Jane", "P-256", &key, &certificate, &["-addext", "keyUsage=digitalSignature"]);
        fs::set_permissions(&key, Permissions::from_mode(0o600)).unwrap();
        directory.secret("pin", "123456\n");
        drop(CardSetup { pin_file: Some(directory.path("pin")), ..directory.setup() }.open().unwrap());
        directory
    }

    fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.0.path().join(name)
    }

    fn secret(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
        fs::set_permissions(self.path(name), Permissions::from_mode(0o600)).unwrap();
    }

    fn setup(&self) -> CardSetup {
        let source = PemSource::Pem { certificate: self.path("card.crt"), key: self.path("card.key") };
        CardSetup {
            keys: Keys::Files(vec![source]),
            profile: Profile::Piv,
            state: Some((StateDirectory::at(self.path("state")), "card.toml".into())),
            written: Some(Written { directory: StateDirectory::at(self.path("written")), management: None }),
            ..CardSetup::default()
        }
    }

    fn open(&self) -> Result<OpenCard, SetupError> {
        self.setup().open()
    }
}

#[test]
fn what_is_written_is_read_by_who_has_the_card() {
    let directory = Directory::new();
    let served = directory.open().unwrap();
    DirBuilder::new().mode(0o700).create(directory.path("written")).unwrap();
    // As if it were in the middle of it.
    directory.secret("written/9a.key", "no key yet");
    assert!(matches!(directory.open().err(), Some(SetupError::DirectoryInUse)));
    drop(served);
    assert!(matches!(directory.open().err(), Some(SetupError::Written(_))));
    fs::remove_file(directory.path("written/9a.key")).unwrap();
    directory.open().unwrap();
}

/// What is said of it leads to something that can be done.
#[test]
fn a_directory_that_lost_its_pin_says_so() {
    let directory = Directory::new();
    let says = |what: &str| {
        for error in [directory.open().err(), directory.setup().unlock().err()] {
            let error = error.unwrap().to_string();
            assert!(error.contains(what) && error.contains("new-card"), "{error}");
            for option in ["pin-file", "no-pin", "password-file", "name its certificates", "card-name"] {
                assert!(!error.contains(option), "{error}");
            }
        }
    };
    let file = fs::read_dir(directory.path("state")).unwrap().map(|entry| entry.unwrap().path());
    let file = file.into_iter().find(|path| path.extension().is_some_and(|name| name == "state")).unwrap();
    fs::write(&file, "rubbish").unwrap();
    says(file.to_str().unwrap());
    fs::remove_file(&file).unwrap();
    says(directory.path("state").to_str().unwrap());
    fs::remove_dir_all(directory.path("state")).unwrap();
    says(directory.path("state").to_str().unwrap());
}

#[test]
fn a_piv_card_gets_no_pin_that_piv_does_not_have() {
    let directory = Directory::new();
    directory.secret("short", "4711\n");
    let opened = |profile| {
        let state = Some((StateDirectory::at(directory.path(format!("{profile:?}"))), "card.toml".into()));
        let pin_file = Some(directory.path("short"));
        CardSetup { profile, state, pin_file, written: None, ..directory.setup() }.open()
    };
    let error = opened(Profile::Piv).err().unwrap().to_string();
    assert!(error.contains("short") && error.contains("6 to 8 digits"), "{error}");
    // One that has a PIN does not mind what it is not given.
    CardSetup { pin_file: Some(directory.path("short")), ..directory.setup() }.open().unwrap();
    // It has more users than PIV programs.
    opened(Profile::Dual).unwrap();
}

/// Keeps what is warned of.
#[derive(Clone, Default)]
struct Warnings(Arc<Mutex<Vec<String>>>);

impl tracing::Subscriber for Warnings {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() <= tracing::Level::WARN
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        let mut text = String::new();
        event.record(&mut |_: &tracing::field::Field, value: &dyn std::fmt::Debug| {
            text += &format!("{value:?}");
        });
        self.0.lock().unwrap().push(text);
    }

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {}
}

/// What is warned of when a card of these keys is opened; keys are as in [`make_certificate`], and what their
/// certificates have.
fn warnings(keys: &[(&str, &[&str])], setup: CardSetup) -> Vec<String> {
    let directory = tempfile::tempdir().unwrap();
    let sources = keys.iter().enumerate().map(|(index, (key, extensions))| {
        let [certificate, key_file] =
            ["crt", "key"].map(|kind| directory.path().join(format!("{index}.{kind}")));
        let extra: Vec<_> = extensions.iter().flat_map(|extension| ["-addext", *extension]).collect();
        make_certificate(&format!("key {index}"), key, &key_file, &certificate, &extra);
        PemSource::Pem { certificate, key: key_file }
    });
    let keys = Keys::Files(sources.collect());
    let pin = directory.path().join("pin");
    fs::write(&pin, "123456").unwrap();
    fs::set_permissions(&pin, Permissions::from_mode(0o600)).unwrap();
    let state = Some((StateDirectory::at(directory.path().join("state")), "card".into()));
    let setup = CardSetup { keys, state, pin_file: Some(pin), prefix: "--", ..setup };
    let warnings = Warnings::default();
    tracing::subscriber::with_default(warnings.clone(), || drop(setup.open().unwrap()));
    let warned = warnings.0.lock().unwrap();
    warned.clone()
}

#[test]
fn certificates_that_cannot_sign_under_opensc_are_named_in_one_line() {
    let (silent, signs) = (("P-256", &[][..]), ("P-256", &["keyUsage=digitalSignature"][..]));
    let piv = || CardSetup { profile: Profile::Piv, ..CardSetup::default() };
    assert_eq!(warnings(&[silent; 2], piv()), [""; 0]);
    assert_eq!(warnings(&[signs; 4], piv()), [""; 0]);
    let warned = warnings(&[silent; 4], piv());
    assert_eq!(warned.len(), 1, "{warned:?}");
    for part in ["no key usage", "\"2\" (9d)", "\"3\" (82)"] {
        assert!(warned[0].contains(part), "{part}: {warned:?}");
    }
    assert!(!warned[0].contains("\"0\"") && !warned[0].contains("\"1\""), "{warned:?}");
    // Who says where it goes knows what it is for.
    let certificates = vec![Wanted { slot: "9d".parse().ok(), name: "0".into() }];
    assert_eq!(warnings(&[silent; 3], CardSetup { certificates, ..piv() }), [""; 0]);
}

#[test]
fn keys_that_opensc_does_not_use_are_warned_of_once() {
    let signs = |key| (key, &["keyUsage=digitalSignature"][..]);
    let warned = warnings(&[signs("rsa:4096"), signs("rsa:2048")], CardSetup::default());
    assert_eq!(warned.len(), 1, "{warned:?}");
    assert!(warned[0].contains("4096") && warned[0].contains("(slots 9a)"), "{warned:?}");
    assert_eq!(warnings(&[signs("rsa:3072")], CardSetup::default()), [""; 0]);
}

#[test]
fn the_order_of_files_makes_no_other_card() {
    let directory = Directory::new();
    let [certificate, key] = ["second.crt", "second.key"].map(|name| directory.path(name));
    make_certificate("Jane", "P-256", &key, &certificate, &["-addext", "keyUsage=digitalSignature"]);
    fs::set_permissions(&key, Permissions::from_mode(0o600)).unwrap();
    let opened = |names: [&str; 2], pin_file: Option<&str>| {
        let sources = names.map(|name| PemSource::Pem {
            certificate: directory.path(format!("{name}.crt")),
            key: directory.path(format!("{name}.key")),
        });
        let state = Some((StateDirectory::at(directory.path("ordered")), "card.toml".into()));
        CardSetup {
            keys: Keys::Files(sources.into()),
            state,
            pin_file: pin_file.map(|file| directory.path(file)),
            written: None,
            ..directory.setup()
        }
        .open()
    };
    let card = opened(["second", "card"], Some("pin")).unwrap();
    assert!(matches!(opened(["card", "second"], None).err(), Some(SetupError::DirectoryInUse)));
    drop(card);
    // It has its PIN.
    opened(["card", "second"], None).unwrap();
}
