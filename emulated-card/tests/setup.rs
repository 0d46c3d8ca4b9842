//! Cards as the programs open them.

#![cfg(all(unix, feature = "nss", feature = "pem", feature = "pcsc"))]
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "clippy sees what a test calls as no test")]

#[path = "common/openssl_tool.rs"]
mod openssl_tool;

use std::fs::{self, DirBuilder, Permissions};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use emulated_card::card::Profile;
use emulated_card::keys::pem::PemSource;
use emulated_card::setup::{CardSetup, Keys, OpenCard, SetupError, Written};
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
