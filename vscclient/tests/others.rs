//! A card that other users could change is not made, and not served.
#![allow(clippy::unwrap_used, reason = "a test says where it failed")]

use std::fs::{self, OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

/// Some other user.
const OTHER: u32 = 54_321;

struct Place(TempDir);

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        let pin = OpenOptions::new().write(true).create_new(true).mode(0o600).open(place.path("pin"));
        pin.unwrap().write_all(b"271828\n").unwrap();
        fs::create_dir(place.path("way")).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn vscclient(&self, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vscclient"));
        command.args(args).current_dir(self.0.path()).env("XDG_STATE_HOME", self.path("home"));
        command.stdin(Stdio::null()).output().unwrap()
    }

    fn new_card(&self, directory: &str, more: &[&str]) -> Output {
        let args = ["new-card", directory, "--name", "Jane", "--algorithm", "p256", "--pin-file", "pin"];
        self.vscclient(&[&args, more].concat())
    }

    /// Whether the card is made to be served: nobody listens there, and that is the end then.
    fn serve(&self, directory: &str) -> Output {
        self.vscclient(&["card", directory, "--no-reconnect", "unix:none.sock"])
    }

    fn is_refused(&self, output: &Output, path: &Path, what: &str) {
        let said = String::from_utf8_lossy(&output.stderr);
        let path = fs::canonicalize(path).unwrap();
        let expected = format!("{} {what}", path.display());
        assert!(
            output.status.code() == Some(3) && said.contains(&expected),
            "{expected}: {}: {said}",
            output.status
        );
    }
}

fn is_served(output: &Output) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(4) && said.contains("none.sock"), "{}: {said}", output.status);
}

fn is_made(output: &Output) {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

#[test]
fn no_card_is_made_where_others_can_write() {
    let place = Place::new();
    let way = place.path("way");
    symlink("way", place.path("link")).unwrap();
    for mode in [0o777, 0o775] {
        set_mode(&way, mode);
        for directory in ["way/card", "way/card/", "link/card", "way"] {
            place.is_refused(&place.new_card(directory, &[]), &way, "can be written to by others");
        }
        assert_eq!(fs::read_dir(&way).unwrap().count(), 0);
    }
    // As /tmp is.
    set_mode(&way, 0o1777);
    is_made(&place.new_card("way/card", &[]));
    is_served(&place.serve("way/card"));
}

#[test]
fn no_card_is_made_in_a_directory_of_another_user() {
    if !rustix::process::geteuid().is_root() {
        // Who is not root cannot give a directory away, nor write in another's that lets nobody write.
        return;
    }
    let place = Place::new();
    let way = place.path("way");
    fs::create_dir(way.join("empty")).unwrap();
    chown(&way, Some(OTHER), None).unwrap();
    for directory in ["way", "way/card", "way/empty"] {
        place.is_refused(&place.new_card(directory, &[]), &way, "belongs to another user");
    }
    let left: Vec<_> = fs::read_dir(&way).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["empty"]);
    assert_eq!(fs::read_dir(way.join("empty")).unwrap().count(), 0);
}

/// All that makes the card what it is: its PIN, its certificates, what a module list lets NSS load.
#[test]
fn no_card_is_served_that_others_can_change() {
    let place = Place::new();
    is_made(&place.new_card("way/pem", &[]));
    is_made(&place.new_card("way/nss", &["--nss"]));
    let files = [
        ("pem", ""),
        ("pem", "card.toml"),
        ("pem", "signature.pem"),
        ("nss", "nssdb"),
        ("nss", "nssdb/key4.db"),
        ("nss", "nssdb/pkcs11.txt"),
    ];
    for (card, file) in files {
        let (card, path) = (format!("way/{card}"), place.path("way").join(card).join(file));
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        for open in [0o020, 0o002] {
            set_mode(&path, mode | open);
            place.is_refused(&place.serve(&card), &path, "can be written to by others");
            let unlock = place.vscclient(&["unlock", &card]);
            place.is_refused(&unlock, &path, "can be written to by others");
        }
        set_mode(&path, mode);
        if rustix::process::geteuid().is_root() {
            chown(&path, Some(OTHER), None).unwrap();
            place.is_refused(&place.serve(&card), &path, "belongs to another user");
            chown(&path, Some(0), None).unwrap();
        }
        is_served(&place.serve(&card));
    }
    set_mode(&place.path("way"), 0o770);
    place.is_refused(&place.serve("way/pem"), &place.path("way"), "can be written to by others");
}
