//! The CAC, command by command: scenario files, and what does not fit one.
//!
//! A scenario is a text file of lines:
//!
//! | line | meaning |
//! |---|---|
//! | `card certificates=1 …` | a new card; the settings are those of `Setting` |
//! | `step …` | names what follows |
//! | `> 00 A4 …` | a command, in hexadecimal |
//! | `< ?? * 9000` | the response: `??` is any byte, `*` any number of them |
//! | `! reset`, `! logout` | what is done to the card from outside |
//! | `# …` | a comment |
//!
//! In both, `FF*30` stands for thirty times that byte.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod common;

use std::io::Read;
use std::path::Path;

use emulated_card::card::{CardBuildError, EmulatedCard, Step};
use emulated_card::keys::{KeyError, UnlockError};
use emulated_card::pin::ReferenceData;
use emulated_card::state::{CardId, StateDirectory};
use vscard_protocol::{Command, StatusWord};

use common::{Store, VERIFY, card, card_with, certificates, noise, pki_aid, select, send};

#[test]
fn scenarios() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scenarios");
    let mut files: Vec<_> =
        std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty());
    for file in files {
        play(&file);
    }
}

fn play(file: &Path) {
    let text = std::fs::read_to_string(file).unwrap();
    let mut card = new_card("");
    let mut step = "";
    let mut response: Option<Vec<u8>> = None;
    for (number, line) in text.lines().enumerate() {
        let place = || format!("{}:{}: {step}", file.display(), number + 1);
        let (kind, rest) = line.split_once(' ').unwrap_or((line, ""));
        match kind {
            "" | "#" => {}
            "card" => card = new_card(rest),
            "step" => step = rest,
            "!" if rest == "reset" => card.reset(),
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
                response = Some(send(&mut card, &bytes).as_bytes().to_vec());
            }
            "<" => {
                let response = response.take().unwrap_or_else(|| panic!("{}: no command", place()));
                assert!(
                    matches(&tokens(rest), &response),
                    "{}: expected {rest}, not {response:02X?}",
                    place()
                );
            }
            _ => panic!("{}: what is {kind:?}?", place()),
        }
    }
    assert!(response.is_none(), "{}: the last response is not looked at", file.display());
}

fn new_card(settings: &str) -> EmulatedCard {
    let (mut count, mut bits, mut reference) = (2, 1024, ReferenceData::in_memory(3));
    let (mut unlock_error, mut key_error) = (None, None);
    for setting in settings.split_whitespace() {
        let (name, value) = setting.split_once('=').unwrap();
        match (name, value) {
            ("certificates", _) => count = value.parse().unwrap(),
            ("bits", _) => bits = value.parse().unwrap(),
            ("state", "unusable") => {
                let nowhere = StateDirectory::at("/dev/null/nowhere");
                reference = ReferenceData::of_database(&nowhere, "/nowhere".as_ref(), 3);
            }
            ("unlock", "locked") => unlock_error = Some(UnlockError::Locked),
            ("unlock", "broken") => unlock_error = Some(UnlockError::NotChecked("broken".into())),
            ("key", "broken") => key_error = Some(KeyError::Failed("broken".into())),
            ("key", "logged-out") => key_error = Some(KeyError::LoggedOut),
            ("key", "unfit") => key_error = Some(KeyError::Block),
            _ => panic!("what is {setting:?}?"),
        }
    }
    let mut store = Store::new(count, bits);
    store.unlock_error = unlock_error;
    store.key_error = key_error;
    card_with(store, reference)
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

fn matches(pattern: &[Token], bytes: &[u8]) -> bool {
    match (pattern, bytes) {
        ([], bytes) => bytes.is_empty(),
        ([Token::Any, pattern @ ..], bytes) => {
            (0..=bytes.len()).any(|skipped| matches(pattern, &bytes[skipped..]))
        }
        ([Token::AnyByte, pattern @ ..], [_, bytes @ ..]) => matches(pattern, bytes),
        ([Token::Byte(wanted), pattern @ ..], [byte, bytes @ ..]) => {
            wanted == byte && matches(pattern, bytes)
        }
        _ => false,
    }
}

/// Reads a whole buffer, `chunk` bytes at a time, as middleware does: the length, then the content.
fn read_buffer(card: &mut EmulatedCard, which: u8, chunk: u8) -> Vec<u8> {
    let mut read = |offset: usize, count: u8| {
        let [high, low] = (offset as u16).to_be_bytes();
        let response = send(card, &[0x80, 0x52, high, low, 2, which, count, count]);
        assert_eq!(response.status(), StatusWord::SUCCESS);
        response.data().to_vec()
    };
    let length = read(0, 2);
    let length = usize::from(u16::from_le_bytes([length[0], length[1]]));
    let mut content = Vec::new();
    while content.len() < length {
        let count = (length - content.len()).min(chunk.into()) as u8;
        let piece = read(2 + content.len(), count);
        assert_eq!(piece.len(), usize::from(count));
        content.extend(piece);
    }
    content
}

/// Puts the two buffers together: tag and value.
fn items(card: &mut EmulatedCard, chunk: u8) -> Vec<(u8, Vec<u8>)> {
    let (tags, values) = (read_buffer(card, 1, chunk), read_buffer(card, 2, chunk));
    let (mut tags, mut values) = (&tags[..], &values[..]);
    let mut items = Vec::new();
    while let [tag, rest @ ..] = tags {
        let (length, rest) = match rest {
            [0xFF, low, high, rest @ ..] => (usize::from(u16::from_le_bytes([*low, *high])), rest),
            [length, rest @ ..] => (usize::from(*length), rest),
            [] => panic!("tag without length"),
        };
        let (value, left) = values.split_at(length);
        items.push((*tag, value.to_vec()));
        (tags, values) = (rest, left);
    }
    assert!(values.is_empty());
    items
}

#[test]
fn certificates_are_served_compressed() {
    let mut card = card(3, 2048);
    for (index, certificate) in certificates(3, 2048).into_iter().enumerate() {
        assert_eq!(send(&mut card, &select(&pki_aid(index as u8))).status(), StatusWord::SUCCESS);
        // OpenSC reads 240 bytes at a time, coolkey 255.
        for chunk in [240, 255, 1] {
            let items = items(&mut card, chunk);
            assert_eq!(items.iter().map(|(tag, _)| *tag).collect::<Vec<_>>(), [0x71, 0x70, 0x72, 0xFE]);
            assert_eq!(items[0].1, [0x01]);
            assert_eq!(items[1].1[0], 0x78, "a zlib stream");
            let mut der = Vec::new();
            flate2::read::ZlibDecoder::new(&items[1].1[..]).read_to_end(&mut der).unwrap();
            assert_eq!(der, certificate.der);
        }
    }
}

#[test]
fn the_capability_container_names_each_certificate() {
    for count in 1..=10 {
        let mut card = card(count, 2048);
        send(&mut card, &select(&[0xA0, 0x00, 0x00, 0x01, 0x16, 0xDB, 0x00]));
        let items = items(&mut card, 240);
        assert_eq!((items[0].0, items[0].1.len()), (0xF0, 21));
        let urls: Vec<_> = items.iter().filter(|(tag, _)| *tag == 0xF3).collect();
        assert_eq!(urls.len(), count);
        for (index, (_, url)) in urls.into_iter().enumerate() {
            let index = index as u8;
            assert_eq!(url[..10], [0xA0, 0, 0, 0, 0x79, 4, 1, index, 1, index]);
            assert_eq!(url.len(), 16);
        }
        let tail: Vec<_> = items.iter().map(|(tag, _)| *tag).filter(|tag| *tag != 0xF3).collect();
        assert_eq!(tail, [0xF0, 0xF1, 0xF2, 0xF4, 0xF5, 0xF6, 0xF7, 0xFA, 0xFB, 0xFC, 0xFD, 0xFE]);
        assert_eq!(items.iter().find(|(tag, _)| *tag == 0xF6).unwrap().1.len(), 17);
    }
}

#[test]
fn no_two_cards_have_the_same_serial_number() {
    let serials = |name: &str| {
        let store = Store::new(1, 2048);
        let id = CardId::derive(&certificates(1, 2048), name);
        let mut card = EmulatedCard::new(
            std::sync::Arc::new(store),
            std::sync::Arc::new(ReferenceData::in_memory(3)),
            id,
            Box::new(|_| {}),
        )
        .unwrap();
        send(&mut card, &select(&[0xA0, 0x00, 0x00, 0x01, 0x16, 0xDB, 0x00]));
        let token = items(&mut card, 255)[0].1[7..].to_vec();
        send(&mut card, &select(&[0xA0, 0x00, 0x00, 0x00, 0x03, 0x00, 0x00]));
        let cplc = send(&mut card, &[0x80, 0xCA, 0x9F, 0x7F, 0x2D]).data().to_vec();
        assert_eq!((cplc.len(), token.len()), (45, 14));
        (token, cplc)
    };
    assert_eq!(serials("a"), serials("a"));
    assert_ne!(serials("a").0, serials("b").0);
    assert_ne!(serials("a").1, serials("b").1);
}

#[test]
fn stores_a_card_cannot_hold() {
    let build = |certificates| {
        let store = Store::of(certificates);
        let id = CardId::derive(&[], "");
        let reference = ReferenceData::in_memory(3);
        EmulatedCard::new(std::sync::Arc::new(store), std::sync::Arc::new(reference), id, Box::new(|_| {}))
            .map(|_| ())
    };
    assert_eq!(build(vec![]), Err(CardBuildError::NoCertificates));
    assert_eq!(build(certificates(11, 2048)), Err(CardBuildError::TooManyCertificates { count: 11 }));
    let mut long = certificates(2, 2048);
    long[1].der = noise(70_000, 9);
    assert_eq!(build(long), Err(CardBuildError::Certificate { name: "certificate 1".into() }));
}

#[test]
fn the_atr_is_its_own_and_t1() {
    let card = card(1, 2048);
    assert_eq!(card.atr().protocols().collect::<Vec<_>>(), [1]);
    assert_eq!(card.atr().historical(), b"\x80\x73\x80\x01\x40\x58EMULATED");
}

#[test]
fn responses_of_4096_bit_keys_honour_extended_le() {
    let mut card = card(1, 4096);
    send(&mut card, VERIFY);
    send(&mut card, &select(&pki_aid(0)));
    let block = noise(512, 7);
    let reversed: Vec<u8> = block.iter().rev().copied().collect();
    let sign = |le| Command::build([0x00, 0x42, 0x00, 0x00], &block, le).unwrap();
    for le in [512, 513, 65_536] {
        let response = common::transmit(&mut card, &sign(Some(le)));
        assert_eq!((response.data(), response.status()), (&reversed[..], StatusWord::SUCCESS));
    }
    let response = common::transmit(&mut card, &sign(Some(300)));
    assert_eq!((response.data(), response.status().0), (&reversed[..300], 0x61D4));
    let response = send(&mut card, &[0x00, 0xC0, 0x00, 0x00, 0x00]);
    assert_eq!((response.data(), response.status()), (&reversed[300..], StatusWord::SUCCESS));
}

#[test]
fn one_command_at_a_time() {
    let mut card = card(1, 1024);
    let Step::Work(job) = card.command(&Command::parse(VERIFY).unwrap()) else { panic!("VERIFY is work") };
    let Step::Answer(response) = card.command(&Command::parse(&[0x00, 0x20, 0x00, 0x00]).unwrap()) else {
        panic!("refused at once")
    };
    assert_eq!(response.status(), StatusWord::NO_DIAGNOSIS);
    assert_eq!(card.finish(job.run()).status(), StatusWord::SUCCESS);
    assert_eq!(send(&mut card, &[0x00, 0x20, 0x00, 0x00]).status(), StatusWord::SUCCESS);
}

#[test]
fn a_stale_login_is_destroyed() {
    let store = Store::new(1, 1024);
    let seen = std::sync::Arc::clone(&store.seen);
    let mut card = card_with(store, ReferenceData::in_memory(3));
    let verify = Command::parse(VERIFY).unwrap();
    let Step::Work(job) = card.command(&verify) else { panic!("VERIFY is work") };
    let done = job.run();
    assert_eq!(seen.live_logins(), 1);
    card.reset();
    assert_eq!(card.finish(done).status(), StatusWord::CONDITIONS_NOT_SATISFIED);
    assert_eq!(seen.live_logins(), 0);
    assert_eq!(send(&mut card, &[0x00, 0x20, 0x00, 0x00]).status(), StatusWord::tries_left(3));

    // A logout while the job runs takes effect when it is finished.
    let Step::Work(job) = card.command(&verify) else { panic!("VERIFY is work") };
    card.logout();
    assert_eq!(card.finish(job.run()).status(), StatusWord::SUCCESS);
    assert_eq!(seen.live_logins(), 0);
}
