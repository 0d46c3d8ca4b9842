//! What else happens while a card is made. NSS's tools are where something else can happen at a known time.
#![allow(clippy::unwrap_used, reason = "a test says where it failed")]

use std::fs::{self, OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

/// A place for a card, and for programs that come before the system's.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        fs::create_dir(place.path("bin")).unwrap();
        let pin = OpenOptions::new().write(true).create_new(true).mode(0o600).open(place.path("pin"));
        pin.unwrap().write_all(b"271828\n").unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The tool does this first. `$TOOLS` is where the system's tools are.
    fn tool(&self, name: &str, first: &str) {
        let path = self.path("bin").join(name);
        fs::write(&path, format!("#!/bin/sh\n{first}\nPATH=$TOOLS exec {name} \"$@\"\n")).unwrap();
        fs::set_permissions(path, Permissions::from_mode(0o700)).unwrap();
    }

    fn new_card(&self) -> Output {
        self.new_card_in(self.0.path(), "card")
    }

    fn new_card_in(&self, working_directory: &Path, card: &str) -> Output {
        let tools = std::env::var("PATH").unwrap();
        // Whoever runs tests may have had signals ignored, as nohup does.
        let mut command = Command::new("env");
        command.args(["--default-signal=INT,TERM,HUP", env!("CARGO_BIN_EXE_vscclient")]);
        command.args(["new-card", card, "--name", "Jane", "--algorithm", "p256", "--nss", "--pin-file"]);
        command.arg(self.path("pin")).current_dir(working_directory);
        command.env("PATH", format!("{}:{tools}", self.path("bin").display())).env("TOOLS", tools);
        command.env("VSCCLIENT", env!("CARGO_BIN_EXE_vscclient")).env("PLACE", self.0.path());
        command.output().unwrap()
    }

    fn entries(&self, name: &str) -> Vec<String> {
        let entries = fs::read_dir(self.path(name)).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

fn failed(output: &Output, said: &str) {
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(3) && error.contains(said), "{}: {error}", output.status);
}

fn succeeded(output: &Output) {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Such a card is made, and not without a word.
#[test]
fn keys_that_opensc_does_not_use_are_warned_of() {
    let place = Place::new();
    for (algorithm, warned) in [("rsa4096", true), ("p384", false)] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vscclient"));
        command.args(["new-card", algorithm, "--name", "Jane", "--pin-file", "pin", "--algorithm"]);
        command.arg(algorithm);
        let output = command.current_dir(place.0.path()).output().unwrap();
        succeeded(&output);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(said.contains("warning: OpenSC"), warned, "{algorithm}: {said}");
        assert!(place.path(algorithm).join("card.toml").exists());
    }
}

#[test]
fn another_card_made_there_meanwhile_stays_whole() {
    let place = Place::new();
    let other = "cd \"$PLACE\" && \"$VSCCLIENT\" new-card card --name Joe --algorithm p256 --pin-file pin";
    place.tool("certutil", &format!("({other}) || exit 1"));
    failed(&place.new_card(), "is not empty");
    assert!(fs::read_to_string(place.path("card/card.toml")).unwrap().contains("Joe"));
    let entries = place.entries("card");
    assert_eq!(entries.iter().filter(|name| name.ends_with(".key")).count(), 5, "{entries:?}");
    assert!(!entries.iter().any(|name| name.starts_with('.') || name.contains("nssdb")), "{entries:?}");
}

#[test]
fn a_file_put_there_meanwhile_stays() {
    let place = Place::new();
    fs::create_dir(place.path("card")).unwrap();
    place.tool("certutil", "echo mine >\"$PLACE/card/file\"");
    failed(&place.new_card(), "is not empty");
    assert_eq!(place.entries("card"), ["file"]);
    fs::remove_file(place.path("card/file")).unwrap();
    // Nor when it is something else that fails.
    place.tool("pk12util", "exit 1");
    failed(&place.new_card(), "pk12util failed");
    assert_eq!(place.entries("card"), ["file"]);
}

#[test]
fn a_card_whose_making_fails_late_leaves_nothing() {
    let place = Place::new();
    place.tool("pk12util", "exit 1");
    failed(&place.new_card(), "pk12util failed");
    assert!(!place.path("card").exists());
    fs::create_dir(place.path("card")).unwrap();
    failed(&place.new_card(), "pk12util failed");
    assert!(place.entries("card").is_empty());
}

#[test]
fn a_signal_leaves_nothing() {
    for signal in ["INT", "TERM", "HUP"] {
        let place = Place::new();
        // The thread for signals has heard of this one when it sleeps again.
        let script = format!(
            "for thread in /proc/$PPID/task/*; do grep -qx signals $thread/comm && signals=$thread/status; done
             until grep -q '^State:.S' $signals; do :; done
             sleeps() {{ grep ^voluntary $signals; }}
             before=$(sleeps); kill -{signal} $PPID
             for _ in $(seq 10000); do [ \"$(sleeps)\" = \"$before\" ] || break; done"
        );
        place.tool("certutil", &script);
        failed(&place.new_card(), "interrupted");
        assert!(!place.path("card").exists());
    }
}

#[test]
fn a_card_is_made_where_a_maker_was_killed() {
    let place = Place::new();
    place.tool("certutil", "kill -KILL $PPID; exit 1");
    assert_eq!(place.new_card().status.signal(), Some(9));
    fs::remove_file(place.path("bin/certutil")).unwrap();
    // What is left has keys in it.
    assert_eq!(place.entries("card").len(), 1);
    succeeded(&place.new_card());
    let entries = place.entries("card");
    assert!(entries.contains(&"card.toml".into()), "{entries:?}");
    assert!(!entries.iter().any(|name| name.starts_with('.')), "{entries:?}");
}

#[test]
fn a_second_signal_ends_it_while_a_tool_hangs() {
    let place = Place::new();
    place.tool("certutil", "for _ in $(seq 600); do kill -TERM $PPID || exit 1; sleep 0.1; done");
    let output = place.new_card();
    assert_eq!(output.status.code(), Some(1));
    // Whoever wanted no card does not want its keys to lie about unseen.
    assert_eq!(place.entries("card").len(), 1);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("card/.new-card-* is left"), "{said}");
}

#[test]
fn the_directory_can_be_named_in_any_way() {
    let place = Place::new();
    for name in ["here", "target"] {
        fs::create_dir(place.path(name)).unwrap();
    }
    std::os::unix::fs::symlink("target", place.path("link")).unwrap();
    for (working_directory, card, made) in
        [("here", ".", "here"), (".", "slash/", "slash"), (".", "link", "target"), ("here", "../up", "up")]
    {
        let directory = fs::canonicalize(place.path(working_directory)).unwrap();
        succeeded(&place.new_card_in(&directory, card));
        let entries = place.entries(made);
        assert!(entries.contains(&"card.toml".into()), "{entries:?}");
        assert!(!entries.iter().any(|name| name.starts_with('.')), "{entries:?}");
    }
    // Who was there still is.
    assert!(place.path("link").is_symlink());
}
