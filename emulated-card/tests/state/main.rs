//! The rules of a card's state on disk: tries are never gained, whoever is killed, full, damaged or at once.

#![allow(clippy::unwrap_used, reason = "clippy sees the helpers of a test as no test")]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, mpsc};
use std::time::{Duration, Instant};

use emulated_card::keys::{Certificate, KeyError, KeyKind, KeyStore, UnlockError, Unlocked};
use emulated_card::pin::{
    CardPinError, Initial, PinError, ReferenceData, SecretFileError, check_card_pin, read_secret_file,
};
use emulated_card::state::{CardClaim, CardId, StateDirectory, StateError};
use sha2::Digest;
use tempfile::TempDir;
use vscard_protocol::Secret;

const RIGHT: &[u8] = b"12345678";
const WRONG: &[u8] = b"87654321";
const NEW: &[u8] = b"246810";
const PUK: &[u8] = b"\x0012345\xff\xff";
/// Length of each half of a state file.
const SLOT: usize = 4096;
const DATABASE: &str = "/home/alice/.pki/nssdb";
/// Says to [`child`] what to do.
const CHILD: &str = "VSCARD_STATE_TEST_CHILD";
const CHILD_DIRECTORY: &str = "VSCARD_STATE_TEST_DIRECTORY";
/// Which file it is to read.
const CHILD_FILE: &str = "VSCARD_STATE_TEST_FILE";
/// Which PIN the card has.
const CHILD_PIN: &str = "VSCARD_STATE_TEST_PIN";

mod change;
mod identity;
#[path = "../common/killed.rs"]
mod killed;
mod known;
mod secrets;
mod slots;

use killed::{BEGIN, kill_in_a_round};

// ---- counting

#[test]
fn counts_down_blocks_and_does_not_compare_any_more() {
    let place = Place::new();
    let (data, store) = (place.data(3), Store::new());
    assert_eq!(data.tries_left().unwrap(), 3);
    for left in [2, 1, 0] {
        assert_wrong(&data.verify(&WRONG.into(), &store), left);
        assert_eq!(data.tries_left().unwrap(), left);
    }
    assert_eq!(store.compared(), 3);
    for pin in [WRONG, RIGHT] {
        assert!(matches!(data.verify(&pin.into(), &store), Err(PinError::Blocked)));
    }
    assert_eq!(store.compared(), 3);
    assert_eq!(data.tries_left().unwrap(), 0);
}

#[test]
fn the_right_pin_gives_all_tries_back() {
    let place = Place::new();
    let (data, store) = (place.data(3), Store::new());
    assert_wrong(&data.verify(&WRONG.into(), &store), 2);
    assert_wrong(&data.verify(&WRONG.into(), &store), 1);
    let login = data.verify(&RIGHT.into(), &store).unwrap();
    assert_eq!(store.logins(), 1);
    assert_eq!(data.tries_left().unwrap(), 3);
    drop(login);
    assert_wrong(&data.verify(&WRONG.into(), &store), 2);
}

#[test]
fn the_try_is_on_disk_before_the_pin_is_compared() {
    let place = Place::new();
    let data = place.data(3);
    let seen = place.data(3);
    let store = Store::with(move |_| {
        assert_eq!(seen.tries_left().unwrap(), 2);
        Ok(())
    });
    data.verify(&RIGHT.into(), &store).unwrap();
    assert_eq!(store.compared(), 1);
    assert_eq!(data.tries_left().unwrap(), 3);
}

#[test]
fn a_database_has_one_counter_for_all_who_open_it() {
    let place = Place::new();
    let (one, other, store) = (place.data(3), place.data(3), Store::new());
    assert_wrong(&one.verify(&WRONG.into(), &store), 2);
    assert_wrong(&other.verify(&WRONG.into(), &store), 1);
    assert_wrong(&one.verify(&WRONG.into(), &store), 0);
    assert!(matches!(other.verify(&RIGHT.into(), &store), Err(PinError::Blocked)));

    let elsewhere = ReferenceData::of_database(&place.directory, "/elsewhere".as_ref(), 3);
    assert_eq!(elsewhere.tries_left().unwrap(), 3);
}

#[test]
fn granting_more_tries_later_gives_none_back() {
    let place = Place::new();
    let (few, many, store) = (place.data(3), place.data(10), Store::new());
    assert_wrong(&many.verify(&WRONG.into(), &store), 9);
    assert_eq!(few.tries_left().unwrap(), 3);
    for left in [2, 1, 0] {
        assert_wrong(&few.verify(&WRONG.into(), &store), left);
    }
    assert!(matches!(many.verify(&RIGHT.into(), &store), Err(PinError::Blocked)));
    few.reset_tries().unwrap();
    assert_eq!(many.tries_left().unwrap(), 10);
}

#[test]
fn tries_are_one_to_fifteen() {
    let place = Place::new();
    assert_eq!(place.data(0).tries_left().unwrap(), 1);
    assert_eq!(place.data(255).tries_left().unwrap(), 15);
}

#[test]
fn parallel_guesses_get_exactly_the_tries() {
    let place = Place::new();
    let store = Arc::new(Store::new());
    let start = Arc::new(Barrier::new(4));
    let guessers: Vec<_> = (0..4)
        .map(|_| {
            let (data, store, start) = (place.data(10), store.clone(), start.clone());
            std::thread::spawn(move || {
                start.wait();
                let mut left = Vec::new();
                loop {
                    match data.verify(&WRONG.into(), &*store) {
                        Err(PinError::Wrong { left: now }) => left.push(now),
                        Err(PinError::Blocked) => return left,
                        other => panic!("{:?}", other.err()),
                    }
                }
            })
        })
        .collect();
    let mut left: Vec<_> = guessers.into_iter().flat_map(|guesser| guesser.join().unwrap()).collect();
    left.sort_unstable();
    assert_eq!(left, (0..10).collect::<Vec<_>>());
    assert_eq!(store.compared(), 10);
}

#[test]
fn a_holder_that_never_ends_is_waited_for_a_bounded_time() {
    let place = Place::new();
    let (entered, is_entered) = mpsc::sync_channel(1);
    let (leave, may_leave) = mpsc::sync_channel::<()>(1);
    let may_leave = std::sync::Mutex::new(may_leave);
    let slow = Store::with(move |_| {
        entered.send(()).unwrap();
        may_leave.lock().unwrap().recv().unwrap();
        Err(UnlockError::Wrong)
    });
    let holder = place.data(3);
    let holder = std::thread::spawn(move || holder.verify(&WRONG.into(), &slow).err());
    is_entered.recv().unwrap();

    let (data, store, began) = (place.data(3), Store::new(), Instant::now());
    let refused = data.verify(&RIGHT.into(), &store).err();
    assert!(matches!(refused, Some(PinError::State(StateError::Locked { .. }))), "{refused:?}");
    assert!((Duration::from_secs(4)..Duration::from_secs(30)).contains(&began.elapsed()));
    assert_eq!(store.compared(), 0);

    leave.send(()).unwrap();
    assert!(matches!(holder.join().unwrap(), Some(PinError::Wrong { left: 2 })));
    data.verify(&RIGHT.into(), &store).unwrap();
}

#[test]
fn what_was_not_compared_costs_no_try() {
    let place = Place::new();
    let data = place.data(3);
    let failing = Store::with(|_| Err(UnlockError::NotChecked("token gone".into())));
    assert!(
        matches!(data.verify(&RIGHT.into(), &failing), Err(PinError::NotChecked(cause)) if cause == "token gone")
    );
    assert_eq!(data.tries_left().unwrap(), 3);
    assert_wrong(&data.verify(&WRONG.into(), &Store::new()), 2);
    assert!(data.verify(&RIGHT.into(), &failing).is_err());
    assert_eq!(data.tries_left().unwrap(), 2);
}

#[test]
fn a_store_that_is_locked_itself_is_a_blocked_pin() {
    let place = Place::new();
    let data = place.data(3);
    let locked = Store::with(|_| Err(UnlockError::Locked));
    assert!(matches!(data.verify(&RIGHT.into(), &locked), Err(PinError::Blocked)));
    assert_eq!(data.tries_left().unwrap(), 2);
}

#[test]
fn a_database_that_lost_its_password_takes_no_pin() {
    let place = Place::new();
    let store = Store { needs_secret: false, ..Store::with(|_| Ok(())) };
    assert!(matches!(place.data(3).verify(&WRONG.into(), &store), Err(PinError::NotChecked(_))));
    assert_eq!(store.compared(), 0);
}

#[test]
fn a_store_that_panics_leaves_the_try_used() {
    let place = Place::new();
    let (data, memory) = (place.data(3), ReferenceData::in_memory(3));
    for data in [&data, &memory] {
        let store = Store::with(|_| panic!("as wanted"));
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            drop(data.verify(&RIGHT.into(), &store));
        }));
        assert!(panicked.is_err());
        assert_eq!(data.tries_left().unwrap(), 2);
        assert_wrong(&data.verify(&WRONG.into(), &Store::new()), 1);
    }
}

#[test]
fn in_memory_counts_as_on_disk() {
    let (data, store) = (ReferenceData::in_memory(2), Store::new());
    assert_wrong(&data.verify(&WRONG.into(), &store), 1);
    data.verify(&RIGHT.into(), &store).unwrap();
    assert_wrong(&data.verify(&WRONG.into(), &store), 1);
    assert_wrong(&data.verify(&WRONG.into(), &store), 0);
    assert!(matches!(data.verify(&RIGHT.into(), &store), Err(PinError::Blocked)));
    data.reset_tries().unwrap();
    assert_eq!(data.tries_left().unwrap(), 2);
}

#[test]
fn any_pin_is_right_when_asked_for() {
    let (data, store) = (ReferenceData::any(RIGHT.into()), Store::new());
    data.verify(&WRONG.into(), &store).unwrap();
    data.verify(&Secret::default(), &store).unwrap();
    data.reset_tries().unwrap();
    assert_eq!(data.tries_left().unwrap(), 3);
    // What the host gave is wrong: the guest's PIN is not to blame.
    let data = ReferenceData::any(WRONG.into());
    assert!(matches!(data.verify(&RIGHT.into(), &store), Err(PinError::NotChecked(_))));
}

// ---- `vscclient unlock`

#[test]
fn unlock_gives_all_tries_back_to_every_process() {
    let place = Place::new();
    let (data, store) = (place.data(3), Store::new());
    for left in [2, 1, 0] {
        assert_wrong(&data.verify(&WRONG.into(), &store), left);
    }
    place.data(3).reset_tries().unwrap();
    assert_eq!(data.tries_left().unwrap(), 3);
    data.verify(&RIGHT.into(), &store).unwrap();
}

#[test]
fn unlock_of_a_new_database_is_fine() {
    let place = Place::new();
    place.data(3).reset_tries().unwrap();
    assert_eq!(place.data(3).tries_left().unwrap(), 3);
}

#[test]
fn unlock_repairs_nothing() {
    let place = Place::new();
    assert_wrong(&place.data(3).verify(&WRONG.into(), &Store::new()), 2);
    let file = place.state_file();
    fs::write(&file, "rubbish").unwrap();
    let error = place.data(3).reset_tries().unwrap_err().to_string();
    assert!(error.contains(file.to_str().unwrap()) && error.contains("removed"), "{error}");
    assert_eq!(fs::read_to_string(&file).unwrap(), "rubbish");
}

// ---- files

#[test]
fn files_are_private_and_can_be_read_by_their_owner() {
    let place = Place::new();
    let deep = StateDirectory::at(place.path().join("a/b/state"));
    let data = ReferenceData::of_database(&deep, DATABASE.as_ref(), 3);
    assert_wrong(&data.verify(&WRONG.into(), &Store::new()), 2);
    assert_eq!(fs::metadata(deep.path()).unwrap().mode() & 0o777, 0o700);
    for entry in fs::read_dir(deep.path()).unwrap() {
        assert_eq!(entry.unwrap().metadata().unwrap().mode() & 0o777, 0o600);
    }
    let text = fs::read_to_string(only_file(deep.path(), "state")).unwrap();
    assert!(text.contains(&format!("flushed yes\ndatabase {DATABASE}\ntries-left 2\nsha256 ")), "{text}");
}

#[test]
fn a_long_or_odd_database_path_is_shown_on_one_short_line() {
    let place = Place::new();
    let path = PathBuf::from(format!("/a\nb\u{7}/{}", "\u{10ffff}".repeat(2000)));
    let data = ReferenceData::of_database(&place.directory, &path, 3);
    assert_wrong(&data.verify(&WRONG.into(), &Store::new()), 2);
    assert_eq!(data.tries_left().unwrap(), 2);
    assert!(newest_slot(&place.state_file()).trim_end().len() < 2048);
}

#[test]
fn any_damage_or_truncation_refuses_verify() {
    let place = Place::new();
    let (data, store) = (place.data(3), Store::new());
    assert_wrong(&data.verify(&WRONG.into(), &store), 2);
    let file = place.state_file();
    let good = fs::read(&file).unwrap();
    let refuses = |what: &str| {
        let refused = data.verify(&RIGHT.into(), &store).err();
        assert!(matches!(refused, Some(PinError::State(StateError::Damaged { .. }))), "{what}: {refused:?}");
        assert!(matches!(data.tries_left(), Err(PinError::State(StateError::Damaged { .. }))), "{what}");
    };
    for length in (0..good.len()).step_by(61).chain([SLOT - 1, SLOT, SLOT + 1, good.len() - 1]) {
        fs::write(&file, &good[..length]).unwrap();
        refuses(&format!("{length} bytes"));
    }
    // Half of it is enough, but not none.
    for at in (0..300).chain(SLOT - 2..SLOT) {
        let bit = at % 8;
        let mut bad = good.clone();
        bad[at] ^= 1 << bit;
        bad[SLOT + at] ^= 1 << bit;
        fs::write(&file, bad).unwrap();
        refuses(&format!("bit {bit} of byte {at}"));
    }
    for (what, more) in [("a byte more", 1), ("oversized", 10_000), ("huge", 1 << 24)] {
        fs::write(&file, [&good[..], &vec![b'\n'; more]].concat()).unwrap();
        refuses(what);
    }
    assert_eq!(store.compared(), 1);
    fs::write(&file, &good).unwrap();
    assert_eq!(data.tries_left().unwrap(), 2);
    // What the error says to do.
    fs::remove_file(&file).unwrap();
    assert_eq!(data.tries_left().unwrap(), 3);
}

#[test]
fn what_is_not_our_own_plain_file_refuses_verify() {
    let place = Place::new();
    let (data, store) = (place.data(3), Store::new());
    assert_wrong(&data.verify(&WRONG.into(), &store), 2);
    let file = place.state_file();
    let saved = place.path().join("saved");
    fs::rename(&file, &saved).unwrap();
    let refuses = |what: &str| {
        let refused = data.verify(&RIGHT.into(), &store).err();
        assert!(matches!(refused, Some(PinError::State(StateError::Damaged { .. }))), "{what}: {refused:?}");
        assert!(data.tries_left().is_err());
        assert_eq!(store.compared(), 1);
    };

    symlink(&saved, &file).unwrap();
    refuses("link to a good file");
    fs::remove_file(&file).unwrap();

    symlink("nowhere", &file).unwrap();
    refuses("dangling link");
    fs::remove_file(&file).unwrap();

    fs::create_dir(&file).unwrap();
    refuses("directory");
    fs::remove_dir(&file).unwrap();

    assert!(Command::new("mkfifo").arg(&file).status().unwrap().success());
    refuses("FIFO");
    fs::remove_file(&file).unwrap();

    fs::copy(&saved, &file).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o620)).unwrap();
    refuses("group-writable");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();

    let this = rustix::process::geteuid().as_raw();
    if std::os::unix::fs::chown(&file, Some(this + 1), None).is_ok() {
        refuses("another user's");
        std::os::unix::fs::chown(&file, Some(this), None).unwrap();
    }
    assert_eq!(data.tries_left().unwrap(), 2);
}

#[test]
fn a_lock_file_that_is_a_link_refuses_verify() {
    let place = Place::new();
    let (data, store) = (place.data(3), Store::new());
    assert_wrong(&data.verify(&WRONG.into(), &store), 2);
    let lock = only_file(place.directory.path(), "lock");
    fs::remove_file(&lock).unwrap();
    symlink(place.path().join("target"), &lock).unwrap();
    let refused = data.verify(&RIGHT.into(), &store).err();
    assert!(matches!(refused, Some(PinError::State(StateError::LockFile { .. }))), "{refused:?}");
    assert!(!place.path().join("target").exists());
    assert_eq!(store.compared(), 1);
}

#[test]
fn a_directory_others_can_write_to_is_refused() {
    let place = Place::new();
    let (data, store) = (place.data(3), Store::new());
    assert_wrong(&data.verify(&WRONG.into(), &store), 2);
    for mode in [0o770, 0o702] {
        fs::set_permissions(place.directory.path(), fs::Permissions::from_mode(mode)).unwrap();
        let refused = data.verify(&RIGHT.into(), &store).err();
        assert!(matches!(refused, Some(PinError::State(StateError::Directory { .. }))), "{refused:?}");
        assert!(place.directory.claim(DATABASE.as_ref(), &card("")).is_err());
    }
    fs::set_permissions(place.directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    assert_eq!(data.tries_left().unwrap(), 2);
    assert_eq!(store.compared(), 1);
}

#[test]
fn a_file_in_the_place_of_the_directory_refuses_verify() {
    let place = Place::new();
    let (data, store) = (place.data(3), Store::new());
    fs::write(place.directory.path(), "").unwrap();
    let refused = data.verify(&RIGHT.into(), &store).err();
    assert!(matches!(refused, Some(PinError::State(StateError::Io { .. }))), "{refused:?}");
    assert!(matches!(data.tries_left(), Err(PinError::State(_))));
    assert!(data.reset_tries().is_err());
    assert_eq!(store.compared(), 0);
}

#[test]
fn a_directory_reached_through_a_link_is_fine() {
    let place = Place::new();
    fs::create_dir(place.path().join("real")).unwrap();
    symlink("real", place.directory.path()).unwrap();
    assert_wrong(&place.data(3).verify(&WRONG.into(), &Store::new()), 2);
}

#[test]
fn what_cannot_be_written_is_not_compared() {
    let place = Place::new();
    let (data, store) = (place.data(3), Store::new());
    assert_wrong(&data.verify(&WRONG.into(), &store), 2);
    let state_file = place.state_file();
    fs::remove_file(&state_file).unwrap();
    // Binds root too, unlike permissions.
    let in_the_way = state_file.with_extension("new");
    fs::create_dir(&in_the_way).unwrap();
    let refused = data.verify(&RIGHT.into(), &store).err();
    assert!(matches!(refused, Some(PinError::State(StateError::Io { .. }))), "{refused:?}");
    assert_eq!((store.compared(), data.tries_left().unwrap()), (1, 3));
    fs::remove_dir(&in_the_way).unwrap();
    // What a killed process leaves is not.
    fs::write(&in_the_way, "half a st").unwrap();
    data.verify(&RIGHT.into(), &store).unwrap();

    if !rustix::process::geteuid().is_root() {
        fs::set_permissions(&state_file, fs::Permissions::from_mode(0o400)).unwrap();
        assert!(matches!(data.verify(&RIGHT.into(), &store), Err(PinError::State(_))));
        assert_eq!(store.compared(), 2);
    }
}

#[test]
fn a_try_that_cannot_be_given_back_ends_the_login() {
    let place = Place::new();
    assert_wrong(&place.data(3).verify(&WRONG.into(), &Store::new()), 2);
    for (what, left) in [("keep-right", 1), ("keep-unchecked", 0)] {
        // 25 is SIGXFSZ, which would kill.
        let mut command = Command::new("sh");
        command.args(["-c", "trap '' 25; exec \"$0\" \"$@\""]).arg(this()).child(what, &place);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(place.data(3).tries_left().unwrap(), left);
    }
    // And when the file is replaced.
    let state_file = place.state_file();
    fs::remove_file(&state_file).unwrap();
    let data = place.data(3);
    let store = Store::with(move |_| {
        fs::create_dir(state_file.with_extension("new")).unwrap();
        Ok(())
    });
    let refused = data.verify(&RIGHT.into(), &store).err();
    assert!(matches!(refused, Some(PinError::State(StateError::Io { .. }))), "{refused:?}");
    assert_eq!((store.compared(), store.logins()), (1, 0));
    assert_eq!(data.tries_left().unwrap(), 2);
}

#[test]
fn a_full_disk_refuses_verify() {
    let place = Place::new();
    assert_wrong(&place.data(3).verify(&WRONG.into(), &Store::new()), 2);
    // A limit on file sizes stands in for the disk; 25 is SIGXFSZ, which would kill.
    let script = "trap '' 25; ulimit -f 0; exec \"$0\" \"$@\"";
    let mut command = Command::new("sh");
    command.args(["-c", script]).arg(this());
    // The limit holds for its output too, if that is a file.
    let child = command.child("unwritable", &place).stdout(Stdio::null()).stderr(Stdio::null());
    assert!(child.status().unwrap().success());
    assert_eq!(place.data(3).tries_left().unwrap(), 2);
    assert!(!place.state_file().with_extension("new").exists());
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_or_read_only_file_system_refuses_verify() {
    let place = Place::new();
    fs::create_dir(place.directory.path()).unwrap();
    let script = "mount -t tmpfs -o size=48k,mode=0700 state \"$VSCARD_STATE_TEST_DIRECTORY\" || exit 77; \
                  exec \"$0\" \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "sh", "-c", script]).arg(this());
    let output = command.child("tmpfs", &place).output();
    let output = output.expect("unshare, of the package util-linux");
    assert!(
        output.status.success(),
        "{} (are user namespaces switched off here?)",
        String::from_utf8_lossy(&output.stderr)
    );
}

// ---- killed

#[test]
fn killed_at_random_no_try_is_gained_and_no_file_damaged() {
    let place = Place::new();
    let (data, store) = (place.data(15), Store::new());
    let (mut verifies, mut left) = (0, 15);
    while verifies < 200 {
        if left < 3 {
            data.reset_tries().unwrap();
            left = 15;
        }
        let (mut child, mut output) = start("guess", &place);
        for now in kill_in_a_round(&mut child, &mut output) {
            verifies += 1;
            left -= 1;
            assert_eq!(now, format!("left {left}"));
        }
        let now = data.tries_left().unwrap();
        assert!(now == left || now + 1 == left, "{left} tries before the kill, {now} after it");
        // The lock went with the process.
        match data.verify(&WRONG.into(), &store) {
            Err(PinError::Wrong { left: after }) => assert_eq!(after + 1, now),
            Err(PinError::Blocked) => assert_eq!(now, 0),
            other => panic!("{:?}", other.err()),
        }
        verifies += 1;
        left = now.saturating_sub(1);
    }
}

#[test]
fn killed_while_comparing_the_try_is_used() {
    let place = Place::new();
    for left in [2, 1, 0] {
        assert!(!in_child("die", &place).status().unwrap().success());
        assert_eq!(place.data(3).tries_left().unwrap(), left);
    }
}

// ---- a card's claim

#[test]
fn a_card_is_open_once() {
    let place = Place::new();
    let claim = place.claim("");
    let refused = place.directory.claim(DATABASE.as_ref(), &card("")).unwrap_err();
    assert!(matches!(refused, StateError::InUse { .. }));
    let message = refused.to_string();
    assert!(message.contains("--card-name") && message.contains(DATABASE), "{message}");

    let other_name = place.claim("second");
    assert_ne!(other_name.id().guid(), claim.id().guid());
    place.directory.claim("/elsewhere".as_ref(), &card("")).unwrap();

    drop(claim);
    place.claim("");
}

#[test]
fn a_claim_ends_with_its_process() {
    let place = Place::new();
    let (mut child, _output) = started(in_child("claim", &place).stdin(Stdio::piped()));
    assert!(matches!(place.directory.claim(DATABASE.as_ref(), &card("")), Err(StateError::InUse { .. })));
    // `vscclient unlock` works meanwhile.
    place.data(3).reset_tries().unwrap();
    ReferenceData::reset_card_tries(&place.directory, DATABASE.as_ref(), &card("")).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    place.claim("");
}

// ---- a PIN of the card's own

#[test]
fn a_card_can_have_a_pin_of_its_own() {
    let place = Place::new();
    let claim = place.claim("");
    // The store is not asked what the guest typed, only what the host gave.
    let store = Store::with(|secret| if secret == b"host" { Ok(()) } else { Err(UnlockError::Wrong) });
    let pin = Secret::from(&b"1234"[..]);
    assert!(!ReferenceData::card_has_pin(&place.directory, &claim).unwrap());
    let none = place.own(&claim, None).unwrap_err();
    assert!(matches!(none, StateError::NoPin { .. }), "{none}");

    let (data, outcome) = place.own(&claim, Some(&pin)).unwrap();
    assert_eq!(outcome, Initial::Created);
    assert!(ReferenceData::card_has_pin(&place.directory, &claim).unwrap());
    let text = fs::read_to_string(place.state_file()).unwrap();
    assert!(text.contains("\npin $argon2id$v=19$") && !text.contains("1234\n"), "{text}");

    assert_wrong(&data.verify(&WRONG.into(), &store), 2);
    assert_eq!(store.compared(), 0);
    data.verify(&pin, &store).unwrap();
    assert_eq!(data.tries_left().unwrap(), 3);
    assert_wrong(&data.verify(&b"12345"[..].into(), &store), 2);
    drop(data);

    let (data, outcome) = place.own(&claim, Some(&WRONG.into())).unwrap();
    assert_eq!((outcome, data.tries_left().unwrap()), (Initial::Ignored, 2));
    assert_wrong(&data.verify(&WRONG.into(), &store), 1);
    data.verify(&pin, &store).unwrap();

    let (data, outcome) = place.own(&claim, None).unwrap();
    assert_eq!(outcome, Initial::NotGiven);
    data.verify(&pin, &store).unwrap();
}

#[test]
fn own_pins_are_counted_per_card() {
    let place = Place::new();
    let (first, second) = (place.claim(""), place.claim("second"));
    let store = Store::with(|_| Ok(()));
    let pin = Secret::from(&b"1234"[..]);
    let (one, _) = place.own(&first, Some(&pin)).unwrap();
    let (other, outcome) = place.own(&second, Some(&pin)).unwrap();
    assert_eq!(outcome, Initial::Created);
    for left in [2, 1, 0] {
        assert_wrong(&one.verify(&WRONG.into(), &store), left);
    }
    assert!(matches!(one.verify(&pin, &store), Err(PinError::Blocked)));
    assert_eq!(other.tries_left().unwrap(), 3);
    assert_eq!(place.data(3).tries_left().unwrap(), 3);

    // As `vscclient unlock` does it, which has no claim.
    assert!(ReferenceData::reset_card_tries(&place.directory, DATABASE.as_ref(), first.id()).unwrap());
    assert!(!ReferenceData::reset_card_tries(&place.directory, DATABASE.as_ref(), &card("third")).unwrap());
    one.verify(&pin, &store).unwrap();
}

#[test]
fn a_wrong_host_password_does_not_cost_the_guest_tries() {
    let place = Place::new();
    let claim = place.claim("");
    let pin = Secret::from(&b"1234"[..]);
    let (data, _) = place.own(&claim, Some(&pin)).unwrap();
    for answer in [UnlockError::Wrong, UnlockError::Locked, UnlockError::NotChecked("gone".into())] {
        let store = Store::with(move |_| Err(answer.clone()));
        assert!(matches!(data.verify(&pin, &store), Err(PinError::NotChecked(_))));
        assert_eq!(data.tries_left().unwrap(), 3);
    }
}

#[test]
fn an_own_pin_that_is_gone_or_damaged_refuses_verify() {
    let place = Place::new();
    let claim = place.claim("");
    let (pin, store) = (Secret::from(&b"1234"[..]), Store::with(|_| Ok(())));
    let (data, _) = place.own(&claim, Some(&pin)).unwrap();
    let file = place.state_file();
    let good = fs::read(&file).unwrap();

    fs::write(&file, &good[..good.len() / 2]).unwrap();
    assert!(matches!(data.verify(&pin, &store), Err(PinError::State(StateError::Damaged { .. }))));
    // Nor is it made anew.
    assert!(matches!(place.own(&claim, Some(&pin)), Err(StateError::Damaged { .. })));
    assert!(matches!(ReferenceData::card_has_pin(&place.directory, &claim), Err(StateError::Damaged { .. })));

    fs::remove_file(&file).unwrap();
    assert!(matches!(data.verify(&pin, &store), Err(PinError::State(StateError::NoPin { .. }))));
    assert!(matches!(data.tries_left(), Err(PinError::State(StateError::NoPin { .. }))));
    assert!(matches!(data.reset_tries(), Err(StateError::NoPin { .. })));
    assert_eq!(store.compared(), 0);
    assert!(!file.exists());
}

#[test]
fn counter_and_card_files_cannot_stand_in_for_each_other() {
    let place = Place::new();
    assert_wrong(&place.data(3).verify(&WRONG.into(), &Store::new()), 2);
    let counter = place.state_file();
    let aside = place.path().join("aside");
    fs::rename(&counter, &aside).unwrap();
    let claim = place.claim("");
    let of_card = place.state_file();
    fs::copy(&of_card, &counter).unwrap();
    assert!(matches!(place.data(3).tries_left(), Err(PinError::State(StateError::Damaged { .. }))));
    let (own, _) = place.own(&claim, Some(&RIGHT.into())).unwrap();
    fs::copy(&of_card, &counter).unwrap();
    assert!(matches!(place.data(3).tries_left(), Err(PinError::State(StateError::Damaged { .. }))));

    fs::copy(&aside, &of_card).unwrap();
    assert!(matches!(own.tries_left(), Err(PinError::State(StateError::Damaged { .. }))));
    assert!(matches!(place.own(&claim, Some(&RIGHT.into())), Err(StateError::Damaged { .. })));
}

#[test]
fn an_unfit_first_pin_is_refused() {
    let place = Place::new();
    let claim = place.claim("");
    for (pin, error) in [
        (&b""[..], CardPinError::Length),
        (b"123", CardPinError::Length),
        (b"123456789", CardPinError::Length),
        (b"123\0", CardPinError::Byte),
        (b"1234\xff\xff", CardPinError::Byte),
    ] {
        assert_eq!(check_card_pin(&pin.into()), Err(error));
        assert!(matches!(place.own(&claim, Some(&pin.into())), Err(StateError::CardPin(e)) if e == error));
    }
    assert!(!ReferenceData::card_has_pin(&place.directory, &claim).unwrap());
    for pin in [&b"1234"[..], b"12345678", "p\u{e4}\u{df}1".as_bytes()] {
        assert_eq!(check_card_pin(&pin.into()), Ok(()));
    }
}

// ---- the other process

/// Not a test of its own: what the tests above run in another process.
#[test]
fn child() {
    let Some(what) = std::env::var_os(CHILD) else { return };
    let place = std::env::var_os(CHILD_DIRECTORY).unwrap();
    let directory = StateDirectory::at(&place);
    let data = ReferenceData::of_database(&directory, DATABASE.as_ref(), 15);
    let store = Store::new();
    let say = |line: &str| {
        let mut stdout = std::io::stdout().lock();
        stdout.write_all(line.as_bytes()).unwrap();
        stdout.flush().unwrap();
    };
    let refused = |data: &ReferenceData| {
        let (compared, refused) = (store.compared(), data.verify(&RIGHT.into(), &store).err());
        assert!(matches!(refused, Some(PinError::State(StateError::Io { .. }))), "{refused:?}");
        assert_eq!(store.compared(), compared);
    };
    match what.to_str().unwrap() {
        "guess" => {
            say("\nready\n");
            loop {
                say(&format!("{BEGIN}\n"));
                if let Err(PinError::Wrong { left }) = data.verify(&WRONG.into(), &store) {
                    say(&format!("left {left}\n"));
                }
            }
        }
        "die" => {
            let data = ReferenceData::of_database(&directory, DATABASE.as_ref(), 3);
            let store = Store::with(|_| {
                let this = rustix::process::getpid();
                rustix::process::kill_process(this, rustix::process::Signal::KILL).unwrap();
                Ok(())
            });
            drop(data.verify(&RIGHT.into(), &store));
        }
        "claim" => {
            let _claim = directory.claim(DATABASE.as_ref(), &card("")).unwrap();
            say("\nready\n");
            // Until it is killed, or who started it ends.
            std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
        }
        "change" | "unblock" => {
            let mut pin: u32 = std::env::var(CHILD_PIN).unwrap().parse().unwrap();
            let claim = directory.claim(DATABASE.as_ref(), &card("")).unwrap();
            let (data, ..) =
                ReferenceData::of_card(&directory, &claim, None, None, Secret::default(), 3).unwrap();
            let store = Store::with(|_| Ok(()));
            say("\nready\n");
            loop {
                say(&format!("{BEGIN}\n"));
                if what == "change" {
                    drop(data.change(&numbered(pin), &numbered(pin + 1), &store).unwrap());
                } else {
                    data.unblock(&PUK.into(), &numbered(pin + 1)).unwrap();
                }
                pin += 1;
                say(&format!("pin {pin}\n"));
            }
        }
        "read" => match read_secret_file(std::env::var_os(CHILD_FILE).unwrap().as_ref()) {
            Ok(secret) => say(&format!("\nread {}\n", std::str::from_utf8(secret.expose()).unwrap())),
            Err(error) => say(&format!("\nread error: {error}\n")),
        },
        "unwritable" => refused(&data),
        "keep-right" | "keep-unchecked" => {
            let data = ReferenceData::of_database(&directory, DATABASE.as_ref(), 3);
            let is_right = what == "keep-right";
            let store = Store::with(move |_| {
                // Stands in for a disk that fails from now on.
                forbid_writing();
                if is_right { Ok(()) } else { Err(UnlockError::NotChecked("gone".into())) }
            });
            let refused = data.verify(&RIGHT.into(), &store).err();
            assert!(matches!(refused, Some(PinError::State(StateError::Io { .. }))), "{refused:?}");
            assert_eq!((store.compared(), store.logins()), (1, 0));
        }
        "tmpfs" => {
            say("\nmounted\n");
            assert_wrong(&data.verify(&WRONG.into(), &store), 14);
            let filler = Path::new(&place).join("filler");
            fs::write(&filler, [0; 1 << 20]).unwrap_err();
            // What there is has its room; there is none for another one's.
            assert_wrong(&data.verify(&WRONG.into(), &store), 13);
            refused(&ReferenceData::of_database(&directory, "/elsewhere".as_ref(), 15));
            fs::remove_file(filler).unwrap();

            let claim = directory.claim(DATABASE.as_ref(), &card("")).unwrap();
            drop(claim);
            // As a card has it that was claimed before identities were kept.
            let states = fs::read_dir(&place).unwrap().map(|entry| entry.unwrap().path());
            let of_card = states.filter(|path| {
                let name = path.file_name().unwrap().to_str().unwrap();
                name.starts_with("card-") && name.ends_with(".state")
            });
            of_card.for_each(|path| fs::remove_file(path).unwrap());
            let mut mount = Command::new("mount");
            assert!(mount.args(["-o", "remount,bind,ro"]).arg(&place).status().unwrap().success());
            refused(&data);
            assert!(data.reset_tries().is_err());
            assert_eq!(data.tries_left().unwrap(), 13);
            // The card is there all the same.
            let claim = directory.claim(DATABASE.as_ref(), &card("")).unwrap();
            assert_eq!(claim.id(), &card(""));
            directory.claim(DATABASE.as_ref(), &card("new")).unwrap_err();
        }
        other => panic!("{other}"),
    }
}

fn this() -> PathBuf {
    std::env::current_exe().unwrap()
}

trait InChild {
    fn child(&mut self, what: &str, place: &Place) -> &mut Self;
}

impl InChild for Command {
    fn child(&mut self, what: &str, place: &Place) -> &mut Self {
        self.args(["--exact", "child", "--nocapture", "--test-threads=1"]);
        self.env(CHILD, what).env(CHILD_DIRECTORY, place.directory.path())
    }
}

fn in_child(what: &str, place: &Place) -> Command {
    let mut command = Command::new(this());
    command.child(what, place).stdout(Stdio::null());
    command
}

/// Starts a child and waits until it says that it is ready.
fn start(what: &str, place: &Place) -> (Child, BufReader<ChildStdout>) {
    started(&mut in_child(what, place))
}

fn started(command: &mut Command) -> (Child, BufReader<ChildStdout>) {
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while line != "ready\n" {
        line.clear();
        assert_ne!(output.read_line(&mut line).unwrap(), 0, "the child ended");
    }
    (child, output)
}

/// Every later write of this process to a file fails.
fn forbid_writing() {
    let limits = rustix::process::getrlimit(rustix::process::Resource::Fsize);
    let none = rustix::process::Rlimit { current: Some(0), ..limits };
    rustix::process::setrlimit(rustix::process::Resource::Fsize, none).unwrap();
}

// ---- what the tests stand on

struct Place {
    directory: StateDirectory,
    parent: TempDir,
}

impl Place {
    fn new() -> Self {
        let parent = TempDir::new().unwrap();
        Self { directory: StateDirectory::at(parent.path().join("state")), parent }
    }

    fn path(&self) -> &Path {
        self.parent.path()
    }

    fn data(&self, tries: u8) -> ReferenceData {
        ReferenceData::of_database(&self.directory, DATABASE.as_ref(), tries)
    }

    fn claim(&self, name: &str) -> CardClaim {
        self.directory.claim(DATABASE.as_ref(), &card(name)).unwrap()
    }

    fn own(
        &self,
        claim: &CardClaim,
        initial: Option<&Secret>,
    ) -> Result<(ReferenceData, Initial), StateError> {
        self.own_with_puk(claim, initial, None).map(|(data, pin, _)| (data, pin))
    }

    fn own_with_puk(
        &self,
        claim: &CardClaim,
        pin: Option<&Secret>,
        puk: Option<&Secret>,
    ) -> Result<(ReferenceData, Initial, Initial), StateError> {
        ReferenceData::of_card(&self.directory, claim, pin, puk, Secret::from(&b"host"[..]), 3)
    }

    fn state_file(&self) -> PathBuf {
        only_file(self.directory.path(), "state")
    }
}

/// A card with the PIN `RIGHT` and the PUK `PUK`, on disk or in memory.
struct Case {
    data: ReferenceData,
    _place: Place,
}

impl Case {
    fn all() -> [Self; 2] {
        let (place, elsewhere) = (Place::new(), Place::new());
        let (on_disk, ..) =
            place.own_with_puk(&place.claim(""), Some(&RIGHT.into()), Some(&PUK.into())).unwrap();
        let in_memory = ReferenceData::in_memory_own(&RIGHT.into(), Some(&PUK.into()), 3).unwrap();
        [Self { data: on_disk, _place: place }, Self { data: in_memory, _place: elsewhere }]
    }

    /// Takes what the host gave: in memory, that is the first PIN.
    fn store() -> Store {
        Store::with(
            |secret| if secret == b"host" || secret == RIGHT { Ok(()) } else { Err(UnlockError::Wrong) },
        )
    }
}

fn numbered(pin: u32) -> Secret {
    Secret::new(format!("{pin:08}").into_bytes())
}

fn sha256(text: &str) -> String {
    sha2::Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The slot of a state file that counts.
fn newest_slot(file: &Path) -> String {
    let text = fs::read_to_string(file).unwrap();
    assert_eq!(text.len(), 2 * SLOT);
    let (first, second) = text.split_at(SLOT);
    let sequence = |slot: &str| -> u64 {
        let line = slot.lines().find_map(|line| line.strip_prefix("sequence "));
        line.unwrap().parse().unwrap()
    };
    if sequence(first) > sequence(second) { first } else { second }.to_owned()
}

/// Makes a state file what the first version would have left.
fn as_first_version(file: &Path, edit: impl FnOnce(String) -> String) {
    let slot = newest_slot(file);
    let lines = slot.lines().skip(3).take_while(|line| !line.starts_with("sha256 "));
    let body: String = ["vscard-state 1"].into_iter().chain(lines).map(|line| format!("{line}\n")).collect();
    let body = edit(body);
    fs::write(file, format!("{body}sha256 {}\n", sha256(&body))).unwrap();
}

fn only_file(directory: &Path, extension: &str) -> PathBuf {
    let files = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let mut files = files.filter(|path| path.extension().is_some_and(|found| found == extension));
    let file = files.next().unwrap();
    assert_eq!(files.next(), None);
    file
}

fn card(name: &str) -> CardId {
    let certificate = |key: &[u8]| Certificate {
        name: "cert".into(),
        der: Vec::new(),
        public_key: key.to_vec(),
        kind: KeyKind::Rsa { bits: 2048 },
    };
    CardId::derive(&[certificate(b"first key"), certificate(b"second key")], name)
}

#[track_caller]
fn assert_wrong(result: &Result<Box<dyn Unlocked>, PinError>, expected: u8) {
    match result {
        Err(PinError::Wrong { left }) => assert_eq!(*left, expected),
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("logged in"),
    }
}

type Answer = dyn Fn(&[u8]) -> Result<(), UnlockError> + Send + Sync;

struct Store {
    answer: Box<Answer>,
    needs_secret: bool,
    compared: AtomicUsize,
    logins: Arc<AtomicUsize>,
}

impl Store {
    fn new() -> Self {
        Self::with(|secret| if secret == RIGHT { Ok(()) } else { Err(UnlockError::Wrong) })
    }

    fn with(answer: impl Fn(&[u8]) -> Result<(), UnlockError> + Send + Sync + 'static) -> Self {
        Self {
            answer: Box::new(answer),
            needs_secret: true,
            compared: AtomicUsize::new(0),
            logins: Arc::default(),
        }
    }

    fn compared(&self) -> usize {
        self.compared.load(Ordering::SeqCst)
    }

    /// Logins that have not been dropped.
    fn logins(&self) -> usize {
        self.logins.load(Ordering::SeqCst)
    }
}

impl KeyStore for Store {
    fn certificates(&self) -> &[Certificate] {
        &[]
    }

    fn needs_secret(&self) -> bool {
        self.needs_secret
    }

    fn unlock(&self, secret: &Secret) -> Result<Box<dyn Unlocked>, UnlockError> {
        self.compared.fetch_add(1, Ordering::SeqCst);
        (self.answer)(secret.expose())?;
        self.logins.fetch_add(1, Ordering::SeqCst);
        Ok(Box::new(Login(self.logins.clone())))
    }
}

struct Login(Arc<AtomicUsize>);

impl Unlocked for Login {
    fn ecdsa(&self, _: usize, _: &[u8]) -> Result<Vec<u8>, KeyError> {
        Err(KeyError::Block)
    }

    fn ecdh(&self, _: usize, _: &[u8]) -> Result<Secret, KeyError> {
        Err(KeyError::Block)
    }

    fn rsa_raw(&self, _: usize, _: &[u8]) -> Result<Secret, KeyError> {
        Err(KeyError::LoggedOut)
    }
}

impl Drop for Login {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}
