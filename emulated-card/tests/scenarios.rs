//! Cards, command by command: scenario files.
//!
//! A scenario is a text file of lines:
//!
//! | line | meaning |
//! |---|---|
//! | `card certificates=1 …` | a new card; the settings are in `new_card` |
//! | `step …` | names what follows |
//! | `> 00 A4 …` | a command, in hexadecimal |
//! | `< ?? * 9000` | the response: `??` is any byte, `*` any number of them |
//! | `! reset`, `! logout` | what is done to the card from outside |
//! | `# …` | a comment |
//!
//! In both, `FF*30` stands for thirty times that byte.
//!
//! Together they end each command of each applet with each status word it has: see [`statuses`].

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod common;
#[path = "common/openssl_tool.rs"]
mod openssl_tool;
#[path = "common/statuses.rs"]
mod statuses;
#[path = "common/writable.rs"]
mod writable;

use std::collections::BTreeSet;
use std::path::Path;

use emulated_card::card::{EmulatedCard, Profile};
use emulated_card::keys::{KeyError, UnlockError};
use emulated_card::pin::ReferenceData;
use emulated_card::slot::assign;
use emulated_card::state::{CardId, StateDirectory};
use vscard_protocol::{Command, Secret};

use common::{PIN, Store, certificates, keys, transmit, try_card};
use statuses::{Observer, Seen};

#[test]
fn scenarios() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scenarios");
    let mut files: Vec<_> =
        std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty());
    let (mut failures, mut seen) = (Vec::new(), BTreeSet::new());
    for file in files {
        play(&file, &mut failures, &mut seen);
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    let all = statuses::all();
    let missing: Vec<_> = all.difference(&seen).collect();
    assert!(missing.is_empty(), "no scenario has {missing:#?}");
    let unknown: Vec<_> = seen.difference(&all).collect();
    assert!(unknown.is_empty(), "the table of status words has no {unknown:#?}");
}

fn play(file: &Path, failures: &mut Vec<String>, seen: &mut BTreeSet<Seen>) {
    let text = std::fs::read_to_string(file).unwrap();
    // Where cards keep what is written to them.
    let directory = tempfile::tempdir().unwrap();
    let (mut card, mut observer) = new_card("", directory.path());
    let mut step = "";
    let mut response: Option<Vec<u8>> = None;
    for (number, line) in text.lines().enumerate() {
        let place = || format!("{}:{}: {step}", file.display(), number + 1);
        let (kind, rest) = line.split_once(' ').unwrap_or((line, ""));
        match kind {
            "" | "#" => {}
            "card" => (card, observer) = new_card(rest, directory.path()),
            "step" => step = rest,
            "!" if rest == "reset" => {
                card.reset();
                observer.reset();
            }
            "!" if rest == "logout" => card.logout(),
            ">" => {
                assert!(response.is_none(), "{}: the response before this command is not looked at", place());
                let bytes: Vec<u8> = tokens(rest)
                    .into_iter()
                    .map(|token| match token {
                        Token::Byte(byte) => byte,
                        _ => panic!("{}: a command has no wildcards", place()),
                    })
                    .collect();
                let command = Command::parse(&bytes).unwrap();
                let answer = transmit(&mut card, &command);
                seen.insert(observer.see(&command, answer.status()));
                response = Some(answer.as_bytes().to_vec());
            }
            "<" => {
                let response = response.take().unwrap_or_else(|| panic!("{}: no command", place()));
                if !matches(&tokens(rest), &response) {
                    failures.push(format!("{}: expected {rest}, not {response:02X?}", place()));
                }
            }
            _ => panic!("{}: what is {kind:?}?", place()),
        }
    }
    assert!(response.is_none(), "{}: the last response is not looked at", file.display());
}

fn new_card(settings: &str, directory: &Path) -> (EmulatedCard, Observer) {
    let (mut count, mut bits, mut reference) = (2, 1024, ReferenceData::in_memory(3));
    let (mut profile, mut piv_keys) = (Profile::Cac, None);
    let (mut unlock_error, mut key_error) = (None, None);
    let (mut written, mut admin) = (None, None);
    for setting in settings.split_whitespace() {
        let (name, value) = setting.split_once('=').unwrap();
        match (name, value) {
            // The same name is the same card again.
            ("written", _) => written = Some(directory.join(value)),
            ("admin", _) => admin = Some(value),
            ("certificates", _) => count = value.parse().unwrap(),
            ("bits", _) => bits = value.parse().unwrap(),
            ("profile", _) => profile = value.parse().unwrap(),
            ("keys", _) => piv_keys = Some(keys(value)),
            ("pin", "any") => reference = ReferenceData::any(Secret::from(PIN)),
            ("pin", "own") => {
                let puk = Secret::from(&b"12345678"[..]);
                reference = ReferenceData::in_memory_own(&Secret::from(PIN), Some(&puk), 3).unwrap();
            }
            ("pin", "own-without-puk") => {
                reference = ReferenceData::in_memory_own(&Secret::from(PIN), None, 3).unwrap();
            }
            ("state", "unusable") => {
                let nowhere = StateDirectory::at("/dev/null/nowhere");
                reference = ReferenceData::of_database(&nowhere, "/nowhere".as_ref(), 3);
            }
            ("state", "lost") => reference = lost(),
            ("unlock", "locked") => unlock_error = Some(UnlockError::Locked),
            ("unlock", "broken") => unlock_error = Some(UnlockError::NotChecked("broken".into())),
            ("key", "broken") => key_error = Some(KeyError::Failed("broken".into())),
            ("key", "logged-out") => key_error = Some(KeyError::LoggedOut),
            ("key", "unfit") => key_error = Some(KeyError::Block),
            _ => panic!("what is {setting:?}?"),
        }
    }
    if let Some(directory) = written {
        let card = writable::card(&writable::store(&directory, admin));
        return (card, Observer::of_writable(admin.is_some()));
    }
    let (slots, certificates) = piv_keys.unwrap_or_else(|| {
        let certificates = certificates(count, bits);
        (assign(&certificates, &[]).unwrap(), certificates)
    });
    let mut store = Store::of(certificates);
    store.unlock_error = unlock_error;
    store.key_error = key_error;
    (try_card(store, reference, profile, slots).unwrap(), Observer::new(profile))
}

/// A PIN and a PUK of the card's own, on a disk that is gone.
fn lost() -> ReferenceData {
    let place = tempfile::tempdir().unwrap();
    let directory = StateDirectory::at(place.path().join("state"));
    let claim =
        directory.claim("/nowhere".as_ref(), &CardId::derive(&certificates(1, 1024), "lost")).unwrap();
    let (pin, puk) = (Secret::from(PIN), Secret::from(&b"12345678"[..]));
    ReferenceData::of_card(&directory, &claim, Some(&pin), Some(&puk), Secret::default(), 3).unwrap().0
}

#[derive(Clone)]
enum Token {
    Byte(u8),
    AnyByte,
    Any,
}

fn tokens(text: &str) -> Vec<Token> {
    let byte = |text: &str| Token::Byte(u8::from_str_radix(text, 16).unwrap());
    let mut tokens = Vec::new();
    for word in text.split_whitespace() {
        match word.split_once('*') {
            Some(("", "")) => tokens.push(Token::Any),
            Some((repeated, times)) => {
                tokens.extend(std::iter::repeat_n(byte(repeated), times.parse().unwrap()));
            }
            None => tokens.extend((0..word.len()).step_by(2).map(|at| match &word[at..at + 2] {
                "??" => Token::AnyByte,
                text => byte(text),
            })),
        }
    }
    tokens
}

fn matches(mut pattern: &[Token], mut bytes: &[u8]) -> bool {
    loop {
        (pattern, bytes) = match (pattern, bytes) {
            ([], bytes) => return bytes.is_empty(),
            ([Token::Any, pattern @ ..], bytes) => {
                return (0..=bytes.len()).any(|skipped| matches(pattern, &bytes[skipped..]));
            }
            ([Token::AnyByte, pattern @ ..], [_, bytes @ ..]) => (pattern, bytes),
            ([Token::Byte(wanted), pattern @ ..], [byte, bytes @ ..]) if wanted == byte => (pattern, bytes),
            _ => return false,
        }
    }
}
