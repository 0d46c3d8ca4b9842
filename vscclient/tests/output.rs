//! Whether somebody hears of it or not, what is done is done.
#![allow(clippy::unwrap_used, reason = "a test says where it failed")]

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Command, Stdio};

/// A file that has no room.
fn full() -> File {
    OpenOptions::new().write(true).open("/dev/full").unwrap()
}

#[test]
fn a_card_whose_making_nobody_hears_of_is_made() {
    let directory = tempfile::tempdir().unwrap();
    let pin = directory.path().join("pin");
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&pin).unwrap();
    file.write_all(b"271828\n").unwrap();
    let card = directory.path().join("card");
    let mut new = Command::new(env!("CARGO_BIN_EXE_vscclient"));
    new.arg("new-card").arg(&card).args(["--name", "Jane Doe", "--algorithm", "p256", "--pin-file"]);
    let status = new.arg(&pin).stdout(full()).stderr(full()).status().unwrap();
    assert_eq!(status.code(), Some(0));
    let mut unlock = Command::new(env!("CARGO_BIN_EXE_vscclient"));
    assert!(unlock.arg("unlock").arg(&card).stdout(Stdio::null()).status().unwrap().success());
}

#[test]
fn an_error_that_nobody_hears_of_is_one_all_the_same() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vscclient"));
    let status = command.args(["card", "/nowhere", "vpcd:"]).stderr(full()).status().unwrap();
    assert_eq!(status.code(), Some(3));
}
