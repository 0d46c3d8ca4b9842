//! Cards that can be written to: by whom, and what is left when the process ends.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod common;
#[path = "common/killed.rs"]
mod killed;
#[path = "common/openssl_tool.rs"]
mod openssl_tool;
#[path = "common/writable.rs"]
mod writable;

use std::fs::{self, Permissions};
use std::io::BufReader;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command as Process, Stdio};

use emulated_card::card::{CardBuildError, EmulatedCard, Profile};
use emulated_card::keys::KeyStore;
use emulated_card::keys::written::WrittenStore;
use emulated_card::pin::ReferenceData;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use vscard_protocol::{Command, StatusWord};

use common::{SELECT_PIV, VERIFY_PIV, send, transmit};
use killed::{BEGIN, kill_in_a_round};
use openssl_tool::openssl;
use writable::{card, store};

/// Where the last random number of a card stands in its answer.
const CHALLENGE: std::ops::Range<usize> = 4..12;

fn encrypt(store: &WrittenStore, block: &[u8]) -> Vec<u8> {
    store.writable().unwrap().encrypt(block).unwrap().expose().to_vec()
}

/// Authenticates as the administrator with Triple DES.
fn authenticate(card: &mut EmulatedCard, store: &WrittenStore) {
    let challenge = send(card, b"\x00\x87\x03\x9B\x04\x7C\x02\x81\x00\x00").data()[CHALLENGE].to_vec();
    let answer = [b"\x00\x87\x03\x9B\x0C\x7C\x0A\x82\x08", &encrypt(store, &challenge)[..]].concat();
    assert_eq!(send(card, &answer).status(), StatusWord::SUCCESS);
}

fn put(tag: u8, content: &[u8]) -> Command {
    let [high, low] = u16::try_from(content.len()).unwrap().to_be_bytes();
    let data = [&[0x5C, 3, 0x5F, 0xC1, tag, 0x53, 0x82, high, low], content].concat();
    Command::build([0x00, 0xDB, 0x3F, 0xFF], &data, None).unwrap()
}

fn get(card: &mut EmulatedCard, tag: u8) -> Vec<u8> {
    let get = Command::build([0x00, 0xCB, 0x3F, 0xFF], &[0x5C, 3, 0x5F, 0xC1, tag], Some(65_536)).unwrap();
    transmit(card, &get).data().to_vec()
}

#[derive(Clone, Debug)]
enum Act {
    Challenge,
    Witness,
    /// With what the card gave the given number of authentications ago, answered rightly.
    External(usize),
    Mutual(usize),
    Other(Command),
    Reset,
    Logout,
}

fn act() -> impl Strategy<Value = Act> {
    let select = || Just(Act::Other(Command::parse(SELECT_PIV).unwrap()));
    let verify = || Just(Act::Other(Command::parse(VERIFY_PIV).unwrap()));
    let refused = Just(Act::Other(Command::parse(b"\x00\xA4\x04\x00\x02\xA0\x00").unwrap()));
    let wild = (any::<[u8; 4]>(), vec(any::<u8>(), 0..40))
        .prop_map(|(header, data)| Act::Other(Command::build(header, &data, Some(256)).unwrap()));
    let other_key = vec(any::<u8>(), 0..20)
        .prop_map(|data| Act::Other(Command::build([0x00, 0x87, 0x11, 0x9A], &data, Some(256)).unwrap()));
    prop_oneof![
        6 => Just(Act::Challenge),
        6 => Just(Act::Witness),
        6 => prop_oneof![3 => Just(0), 1 => 0_usize..4].prop_map(Act::External),
        6 => prop_oneof![3 => Just(0), 1 => 0_usize..4].prop_map(Act::Mutual),
        1 => select(),
        1 => verify(),
        1 => refused,
        1 => wild,
        1 => other_key,
        1 => Just(Act::Reset),
        1 => Just(Act::Logout),
    ]
}

/// What is to be expected of the card.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Expected {
    Nobody,
    Challenged,
    Witnessed,
    Administrator,
}

/// Does it, and tells what is to be expected of the card afterwards. `given` are challenges and witnesses, deciphered.
fn perform(
    act: &Act,
    before: Expected,
    card: &mut EmulatedCard,
    store: &WrittenStore,
    given: &mut Vec<Vec<u8>>,
) -> Expected {
    let earlier =
        |given: &[Vec<u8>], back: usize| given.iter().rev().nth(back).cloned().unwrap_or(vec![0; 8]);
    match act {
        Act::Challenge => {
            let answer = send(card, b"\x00\x87\x03\x9B\x04\x7C\x02\x81\x00\x00");
            given.push(answer.data()[CHALLENGE].to_vec());
            Expected::Challenged
        }
        Act::Witness => {
            // Random numbers are counted, so it need not be deciphered here.
            let last = given.last().map_or(0, |last| last[7]);
            let next: Vec<u8> = (1..=8).map(|step| last.wrapping_add(step)).collect();
            let answer = send(card, b"\x00\x87\x03\x9B\x04\x7C\x02\x80\x00\x00");
            assert_eq!(answer.data()[CHALLENGE], encrypt(store, &next));
            given.push(next);
            Expected::Witnessed
        }
        Act::External(back) => {
            let answer = encrypt(store, &earlier(given, *back));
            let status =
                send(card, &[b"\x00\x87\x03\x9B\x0C\x7C\x0A\x82\x08", &answer[..]].concat()).status();
            let right = before == Expected::Challenged && *back == 0;
            assert_eq!(status == StatusWord::SUCCESS, right, "{status}");
            if right { Expected::Administrator } else { Expected::Nobody }
        }
        Act::Mutual(back) => {
            let (witness, challenge) = (earlier(given, *back), [0x55; 8]);
            let body = [b"\x7C\x14\x80\x08", &witness[..], b"\x81\x08", &challenge].concat();
            let answer = send(card, &[b"\x00\x87\x03\x9B\x16", &body[..], b"\x00"].concat());
            let right = before == Expected::Witnessed && *back == 0;
            assert_eq!(answer.status() == StatusWord::SUCCESS, right);
            if right {
                assert_eq!(answer.data()[CHALLENGE], encrypt(store, &challenge));
                return Expected::Administrator;
            }
            Expected::Nobody
        }
        Act::Other(command) => {
            transmit(card, command);
            match before {
                Expected::Administrator => before,
                _ => Expected::Nobody,
            }
        }
        Act::Reset => {
            card.reset();
            Expected::Nobody
        }
        Act::Logout => {
            card.logout();
            Expected::Nobody
        }
    }
}

proptest! {
    /// Also with right answers to challenges of before, and to those of the other kind.
    #[test]
    fn only_the_administrator_writes(acts in vec(act(), 1..40), ends in vec(any::<bool>(), 40..41)) {
        let place = tempfile::tempdir().unwrap();
        thread_local!(static MADE: tempfile::TempDir = tempfile::tempdir().unwrap());
        let store = MADE.with(|made| {
            drop(store(made.path(), Some("3des")));
            for name in ["card.crt", "card.key"] {
                fs::copy(made.path().join(name), place.path().join(name)).unwrap();
            }
            store(place.path(), Some("3des"))
        });
        let mut card = card(&store);
        let (mut expected, mut given, mut writes) = (Expected::Nobody, Vec::new(), 0_usize);
        for (act, end) in acts.iter().zip(ends) {
            // What a random command asks of the random numbers is not followed.
            if let Act::Other(command) = act {
                prop_assume!(!matches!(command.ins(), 0x84) && (command.ins() != 0x87 || command.p2() != 0x9B));
                prop_assume!(!matches!(command.ins(), 0xDB | 0x47));
            }
            expected = perform(act, expected, &mut card, &store, &mut given);
            if !end {
                continue;
            }
            // Which is a command that ends any authentication, too.
            let status = transmit(&mut card, &put(0x21, &[1, 2, 3])).status();
            let generate = send(&mut card, b"\x00\x47\x00\x82\x05\xAC\x03\x80\x01\x11\x00").status();
            if expected == Expected::Administrator {
                prop_assert_eq!((status, generate), (StatusWord::SUCCESS, StatusWord::SUCCESS));
                writes += 1;
            } else {
                let refused = StatusWord::SECURITY_STATUS_NOT_SATISFIED;
                prop_assert_eq!((status, generate), (refused, refused));
                expected = Expected::Nobody;
            }
            prop_assert_eq!(place.path().join("written").exists(), writes > 0);
        }
    }

    #[test]
    fn no_command_of_anybody_else_writes(
        commands in vec((any::<[u8; 4]>(), any::<bool>(), vec(any::<u8>(), 0..60)), 1..60),
    ) {
        thread_local!(static MADE: tempfile::TempDir = tempfile::tempdir().unwrap());
        MADE.with(|made| {
            let mut card = card(&store(made.path(), Some("3des")));
            for ([class, ins, p1, p2], plain, data) in commands {
                let header = match (plain, ins % 4) {
                    (true, 0) => [0x00, 0xDB, 0x3F, 0xFF],
                    (true, 1) => [0x00, 0x47, 0x00, 0x9A],
                    (true, 2) => [0x00, 0x87, 0x03, 0x9B],
                    (true, _) => [0x00, 0x87, p1 % 0x20, 0x9B],
                    _ => [class, ins, p1, p2],
                };
                transmit(&mut card, &Command::build(header, &data, Some(256)).unwrap());
            }
            assert!(!made.path().join("written").exists());
        });
    }

    /// Templates of PUT DATA and GENERATE that are right but for a byte or their end, from one who may write.
    #[test]
    fn whatever_the_administrator_writes_the_card_is_the_same_when_it_is_opened_again(
        commands in vec((0_usize..3, vec(any::<u8>(), 0..40), any::<Index>(), any::<u8>(), any::<bool>()), 1..20),
    ) {
        thread_local!(static MADE: tempfile::TempDir = tempfile::tempdir().unwrap());
        MADE.with(|made| {
            let store = store(made.path(), Some("3des"));
            let mut card = card(&store);
            authenticate(&mut card, &store);
            for (which, content, at, change, cut) in commands {
                let (header, mut data) = match which {
                    0 => ([0x00, 0x47, 0x00, 0x9A], vec![0xAC, 3, 0x80, 1, 0x11]),
                    _ => ([0x00, 0xDB, 0x3F, 0xFF], put(0x05, &content).data().to_vec()),
                };
                let at = at.index(data.len());
                data[at] ^= change;
                data.truncate(if cut { at } else { data.len() });
                let status = transmit(&mut card, &Command::build(header, &data, Some(256)).unwrap()).status();
                assert_ne!(status, StatusWord::SECURITY_STATUS_NOT_SATISFIED);
            }
            let again = writable::store(made.path(), None);
            let (now, then) = (store.writable().unwrap(), again.writable().unwrap());
            for tag in 0..=u8::MAX {
                assert_eq!(now.object(tag), then.object(tag));
            }
            let slot = "9a".parse().unwrap();
            assert_eq!(now.key(slot), then.key(slot));
        });
    }

    #[test]
    fn any_object_is_got_as_it_was_put(content in vec(any::<u8>(), 1..600), cuts in vec(0_usize..600, 0..4)) {
        thread_local!(static MADE: tempfile::TempDir = tempfile::tempdir().unwrap());
        MADE.with(|made| {
            let store = store(made.path(), Some("3des"));
            let mut card = card(&store);
            authenticate(&mut card, &store);
            let (whole, mut from) = (put(0x07, &content), 0);
            let mut ends: Vec<_> = cuts.into_iter().map(|cut| cut.min(whole.data().len())).collect();
            ends.sort_unstable();
            for end in ends {
                let piece = Command::build([0x10, 0xDB, 0x3F, 0xFF], &whole.data()[from..end], None).unwrap();
                assert_eq!(transmit(&mut card, &piece).status(), StatusWord::SUCCESS);
                from = end;
            }
            let last = Command::build([0x00, 0xDB, 0x3F, 0xFF], &whole.data()[from..], None).unwrap();
            assert_eq!(transmit(&mut card, &last).status(), StatusWord::SUCCESS);
            assert!(get(&mut card, 0x07).ends_with(&content));
        });
    }
}

#[test]
fn the_public_key_that_is_given_is_that_of_the_key_which_is_kept() {
    let place = tempfile::tempdir().unwrap();
    let store = store(place.path(), Some("3des"));
    let mut card = card(&store);
    authenticate(&mut card, &store);
    for (algorithm, bytes) in [(0x06, 128), (0x07, 256), (0x05, 384), (0x16, 512)] {
        let generate = [0x00, 0x47, 0x00, 0x9D, 0, 0, 5, 0xAC, 3, 0x80, 1, algorithm, 0, 0];
        let answer = send(&mut card, &generate);
        let said = openssl!("rsa", "-in", place.path().join("written/9d.key"), "-modulus", "-noout");
        let modulus: String = answer.data()[answer.data().len() - 5 - bytes..answer.data().len() - 5]
            .iter()
            .map(|byte| format!("{byte:02X}"))
            .collect();
        assert_eq!(String::from_utf8(said).unwrap().trim(), format!("Modulus={modulus}"));
    }
    for (algorithm, bytes) in [(0x11, 65), (0x14, 97)] {
        let generate = [0x00, 0x47, 0x00, 0x9D, 5, 0xAC, 3, 0x80, 1, algorithm, 0];
        let answer = send(&mut card, &generate);
        let key = place.path().join("written/9d.key");
        let info = openssl!("pkey", "-in", key, "-pubout", "-outform", "DER");
        assert_eq!(answer.data()[answer.data().len() - bytes..], info[info.len() - bytes..]);
    }
}

#[test]
fn what_is_written_is_its_owners_alone() {
    let place = tempfile::tempdir().unwrap();
    let store = store(place.path(), Some("3des"));
    let mut card = card(&store);
    authenticate(&mut card, &store);
    send(&mut card, b"\x00\x47\x00\x9A\x05\xAC\x03\x80\x01\x11\x00");
    transmit(&mut card, &put(0x05, b"certificate"));
    let mode = |name: &str| fs::metadata(place.path().join(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode("written"), 0o700);
    let mut names: Vec<_> = fs::read_dir(place.path().join("written"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["5fc105.object", "9a.key"]);
    assert_eq!((mode("written/9a.key"), mode("written/5fc105.object")), (0o600, 0o600));
    assert!(!format!("{store:?}").contains(&writable::TRIPLE_DES[..8]));
}

#[test]
fn a_card_whose_files_are_damaged_or_open_to_others_is_refused() {
    let place = tempfile::tempdir().unwrap();
    drop(store(place.path(), None));
    let file = |name: &str| place.path().join("written").join(name);
    fs::create_dir(place.path().join("written")).unwrap();
    let refused = |name: &str, content: &[u8], mode: u32| {
        fs::write(file(name), content).unwrap();
        fs::set_permissions(file(name), Permissions::from_mode(mode)).unwrap();
        let error = writable::try_store(place.path(), None).unwrap_err().to_string();
        fs::remove_file(file(name)).unwrap();
        assert!(error.contains(name), "{error}");
    };
    let key = fs::read(place.path().join("card.key")).unwrap();
    refused("9a.key", &key, 0o644);
    refused("9a.key", &key[..key.len() / 2], 0o600);
    refused("9a.key", b"", 0o600);
    refused("5fc105.object", b"certificate", 0o640);
    refused("5fc105.object", &[0; 65_536], 0o600);
    openssl!("genpkey", "-algorithm", "ED25519", "-out", place.path().join("other"));
    refused("82.key", &fs::read(place.path().join("other")).unwrap(), 0o600);
    assert!(writable::try_store(place.path(), None).is_ok());
    fs::set_permissions(place.path().join("written"), Permissions::from_mode(0o770)).unwrap();
    let error = writable::try_store(place.path(), None).unwrap_err().to_string();
    assert!(error.contains("written") && error.contains("by others"), "{error}");
}

#[test]
fn what_cannot_be_kept_is_not_written() {
    let place = tempfile::tempdir().unwrap();
    let store = store(place.path(), Some("3des"));
    let mut card = card(&store);
    authenticate(&mut card, &store);
    assert_eq!(transmit(&mut card, &put(0x05, b"old")).status(), StatusWord::SUCCESS);
    for name in ["5fc105.object.new", "9a.key.new"] {
        fs::create_dir(place.path().join("written").join(name)).unwrap();
    }
    assert_eq!(transmit(&mut card, &put(0x05, b"new")).status(), StatusWord::MEMORY_FAILURE);
    assert!(get(&mut card, 0x05).ends_with(b"old"));
    let generate = send(&mut card, b"\x00\x47\x00\x9A\x05\xAC\x03\x80\x01\x06\x00");
    assert_eq!((generate.status(), generate.data()), (StatusWord::MEMORY_FAILURE, &[][..]));
    send(&mut card, VERIFY_PIV);
    let sign = [b"\x00\x87\x11\x9A\x26\x7C\x24\x82\x00\x81\x20", &[0x55; 32][..], b"\x00"].concat();
    assert_eq!(send(&mut card, &sign).status(), StatusWord::SUCCESS);
}

#[test]
fn a_card_that_can_be_written_to_is_no_cac() {
    let place = tempfile::tempdir().unwrap();
    for profile in [Profile::Cac, Profile::Dual] {
        let slots = vec![("9a".parse().unwrap(), 0)];
        let reference = ReferenceData::in_memory(3);
        let card = common::try_card_of(store(place.path(), None), reference, profile, slots);
        assert!(matches!(card.map(|_| ()), Err(CardBuildError::WritableCac)));
    }
}

// ---- killed

const DIRECTORY: &str = "VSCARD_WRITABLE_TEST_DIRECTORY";
const LENGTH: usize = 60_000;

#[test]
fn killed_while_it_writes_the_card_has_the_old_or_the_new() {
    if let Some(directory) = std::env::var_os(DIRECTORY) {
        return write_until_killed(Path::new(&directory));
    }
    let place = tempfile::tempdir().unwrap();
    drop(store(place.path(), Some("3des")));
    let mut seen = [0, 0];
    for _ in 0..40 {
        let mut child = Process::new(std::env::current_exe().unwrap())
            .args(["--exact", "killed_while_it_writes_the_card_has_the_old_or_the_new", "--nocapture"])
            .env(DIRECTORY, place.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        kill_in_a_round(&mut child, &mut output);
        let store = store(place.path(), None);
        let content = store.writable().unwrap().object(0x08).unwrap();
        assert!(content.len() == LENGTH && content.iter().all(|byte| *byte == content[0]));
        seen[usize::from(content[0])] += 1;
        assert!(store.writable().unwrap().key("82".parse().unwrap()).is_some());
    }
    assert!(seen.iter().all(|times| *times > 0), "{seen:?}");
}

/// In a process of its own.
fn write_until_killed(directory: &Path) {
    let store = store(directory, Some("3des"));
    let mut card = card(&store);
    authenticate(&mut card, &store);
    // The test program's own line has no end yet.
    println!();
    for round in 0_u32.. {
        println!("{BEGIN}");
        let status = transmit(&mut card, &put(0x08, &[(round % 2) as u8; LENGTH])).status();
        assert_eq!(status, StatusWord::SUCCESS);
        let generate = send(&mut card, b"\x00\x47\x00\x82\x05\xAC\x03\x80\x01\x11\x00");
        assert_eq!(generate.status(), StatusWord::SUCCESS);
        println!("written");
    }
}

/// Bytes 0 to 7 of the GUID, the rest of it, and the card identifier, as a host finds them.
fn identity(card: &mut EmulatedCard) -> ([u8; 8], [u8; 8], Vec<u8>) {
    let (holder, capabilities) = (get(card, 0x02), get(card, 0x07));
    let guid = holder.windows(2).position(|bytes| bytes == [0x34, 16]).unwrap() + 2;
    let identifier = capabilities.windows(2).position(|bytes| bytes == [0xF0, 21]).unwrap() + 2;
    let half = |start: usize| holder[start..start + 8].try_into().unwrap();
    (half(guid), half(guid + 8), capabilities[identifier..identifier + 21].to_vec())
}

/// Hosts keep what they read of a card by what tells them which it is.
#[test]
fn a_certificate_that_is_put_on_the_card_changes_what_hosts_know_it_by() {
    let directory = tempfile::tempdir().unwrap();
    let store = store(directory.path(), Some("3des"));
    let mut card = card(&store);
    let made = identity(&mut card);
    let mut seen = vec![made.clone()];
    authenticate(&mut card, &store);
    for content in [&b"one"[..], b"another", b""] {
        assert_eq!(transmit(&mut card, &put(0x05, content)).status(), StatusWord::SUCCESS);
        let now = identity(&mut card);
        assert!(seen.iter().all(|one| one.0 != now.0 && one.2 != now.2), "{now:02X?}");
        assert_eq!(now.1, made.1);
        seen.push(now);
    }
    // The security object is none.
    assert_eq!(transmit(&mut card, &put(0x06, b"object")).status(), StatusWord::SUCCESS);
    assert_eq!(Some(&identity(&mut card)), seen.last());
    // What a host writes itself is as it wrote it.
    for tag in [0x02, 0x07] {
        assert_eq!(transmit(&mut card, &put(tag, b"the host's")).status(), StatusWord::SUCCESS);
        assert_eq!(transmit(&mut card, &put(0x05, b"one")).status(), StatusWord::SUCCESS);
        assert_eq!(get(&mut card, tag)[2..], *b"the host's");
    }
}
