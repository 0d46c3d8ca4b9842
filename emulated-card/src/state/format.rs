//! State files: contents ↔ bytes.
//!
//! A file is two slots of text of equal length, each with a sequence number and a checksum of its own; the valid one with
//! the greater number counts. A counter is written in place, into a slot that does not count any more, so that a write
//! that is cut short (a power cut) leaves the one before. Files of the first version are one such text alone, and were
//! always replaced as a whole.

use std::fmt::Write as _;
use std::path::Path;

use sha2::{Digest, Sha256};

use super::hex;
use crate::pin::PinHash;

/// Length of a slot: a file system's block, so that what tears one leaves the other. What is written in it is shorter,
/// whatever the database's path is.
pub(super) const SLOT: usize = 4096;
/// Longest state file that is read.
pub(super) const MAX_FILE: u64 = 2 * SLOT as u64;
const FIRST_VERSION: &str = "vscard-state 1";
const FIRST_LINE: &str = "vscard-state 2";
/// What fills a slot.
const FILLER: char = '\n';

/// What a state file says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Contents {
    /// Tries that are left; `None` is all of them, however many the opener grants.
    pub(crate) left: Option<u8>,
    /// The PIN of a card that has its own.
    pub(crate) pin: Option<PinHash>,
    /// As `left`, of the PUK.
    pub(crate) puk_left: Option<u8>,
    /// The PUK of a card that has one.
    pub(crate) puk: Option<PinHash>,
    /// What a card's serial numbers are cut from, once it was opened.
    pub(crate) identity: Option<[u8; 32]>,
}

/// Which slot counts, and what is known of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Newest {
    pub(super) slot: usize,
    pub(super) sequence: u64,
    /// Whether its writer waited for the disk. If not, the other slot is all that a power cut leaves for certain.
    pub(super) flushed: bool,
}

impl Newest {
    /// Where the next contents go, and their sequence number: over those that the disk may not have yet, else over those
    /// that do not count. So one slot is whole on disk, whatever becomes of the write. `None` after the last number.
    pub(super) fn next(self) -> Option<(usize, u64)> {
        let slot = if self.flushed { 1 - self.slot } else { self.slot };
        Some((slot, self.sequence.checked_add(1)?))
    }
}

/// A state file that was read.
pub(super) struct Decoded {
    pub(super) contents: Contents,
    /// `None` for a file of the first version.
    pub(super) newest: Option<Newest>,
    /// Whether all of it is as it was written.
    pub(super) whole: bool,
}

/// A file with those contents, in both slots, which is to be flushed.
pub(super) fn encode(database: &Path, contents: &Contents) -> String {
    [0, 1].map(|sequence| encode_slot(database, contents, sequence, true)).concat()
}

/// One slot.
pub(super) fn encode_slot(database: &Path, contents: &Contents, sequence: u64, flushed: bool) -> String {
    // For whoever looks into the file, and read by nobody else: so it may be shortened.
    let mut shown = String::new();
    for character in database.to_string_lossy().chars().take(400) {
        if character.is_control() {
            shown.extend(character.escape_default());
        } else {
            shown.push(character);
        }
    }
    let count = |left: Option<u8>| left.map_or_else(|| "full".to_owned(), |left| left.to_string());
    let flushed = if flushed { "yes" } else { "no" };
    let mut slot = format!(
        "{FIRST_LINE}\nsequence {sequence}\nflushed {flushed}\ndatabase {shown}\ntries-left {}\n",
        count(contents.left)
    );
    // Writing to a String cannot fail.
    if let Some(pin) = &contents.pin {
        let _ = writeln!(slot, "pin {pin}");
    }
    if let Some(puk) = &contents.puk {
        let _ = writeln!(slot, "puk-tries-left {}\npuk {puk}", count(contents.puk_left));
    }
    if let Some(identity) = &contents.identity {
        let _ = writeln!(slot, "identity {}", hex(identity));
    }
    let check = hex(&Sha256::digest(&slot));
    let _ = writeln!(slot, "sha256 {check}");
    slot.extend(std::iter::repeat_n(FILLER, SLOT.saturating_sub(slot.len())));
    slot
}

pub(super) fn decode(bytes: &[u8]) -> Result<Decoded, &'static str> {
    if bytes.len() as u64 > MAX_FILE {
        return Err("is too long");
    }
    if bytes.len() as u64 != MAX_FILE {
        // Its slots are never cut by writing to it, so what is short and of this version is not believed either.
        let contents = decode_first_version(bytes)?;
        return Ok(Decoded { contents, newest: None, whole: true });
    }
    let (first, second) = bytes.split_at(SLOT);
    let decoded = |slot, bytes| decode_slot(slot, bytes);
    match (decoded(0, first), decoded(1, second)) {
        (Err(what), Err(_)) => Err(what),
        (Ok((contents, newest)), Err(_)) | (Err(_), Ok((contents, newest))) => {
            Ok(Decoded { contents, newest: Some(newest), whole: false })
        }
        (Ok((_, first)), Ok((_, second))) if first.sequence == second.sequence => Err("is malformed"),
        (Ok(first), Ok(second)) => {
            let (contents, newest) = if first.1.sequence > second.1.sequence { first } else { second };
            Ok(Decoded { contents, newest: Some(newest), whole: true })
        }
    }
}

fn decode_slot(slot: usize, bytes: &[u8]) -> Result<(Contents, Newest), &'static str> {
    let text = std::str::from_utf8(bytes).map_err(|_| "is damaged")?;
    let filled = text.trim_end_matches(FILLER).len();
    // The last line ends, too.
    let mut fields = Fields::checked(text.get(..=filled).ok_or("is damaged")?)?;
    fields.version(FIRST_LINE)?;
    let sequence = fields.required("sequence ")?.parse().map_err(|_| "is malformed")?;
    let flushed = match fields.required("flushed ")? {
        "yes" => true,
        "no" => false,
        _ => return Err("is malformed"),
    };
    Ok((fields.contents()?, Newest { slot, sequence, flushed }))
}

fn decode_first_version(bytes: &[u8]) -> Result<Contents, &'static str> {
    let text = std::str::from_utf8(bytes).map_err(|_| "is damaged")?;
    let mut fields = Fields::checked(text)?;
    fields.version(FIRST_VERSION)?;
    fields.contents()
}

/// The lines of a text whose checksum is right, one after the other.
struct Fields<'a>(std::iter::Peekable<std::str::SplitTerminator<'a, char>>);

impl<'a> Fields<'a> {
    fn checked(text: &'a str) -> Result<Self, &'static str> {
        let start_of_check = text.rfind("\nsha256 ").ok_or("is cut short")? + 1;
        let (body, check) = text.split_at(start_of_check);
        if check != format!("sha256 {}\n", hex(&Sha256::digest(body))) {
            return Err("is damaged");
        }
        Ok(Self(body.split_terminator('\n').peekable()))
    }

    fn version(&mut self, first_line: &str) -> Result<(), &'static str> {
        match self.0.next() {
            Some(line) if line == first_line => Ok(()),
            Some(FIRST_LINE) => Err("is cut short"),
            _ => Err("was written by another version"),
        }
    }

    fn optional(&mut self, name: &str) -> Option<&'a str> {
        self.0.next_if(|line| line.starts_with(name)).map(|line| &line[name.len()..])
    }

    fn required(&mut self, name: &str) -> Result<&'a str, &'static str> {
        self.optional(name).ok_or("is malformed")
    }

    /// All that is left of them.
    fn contents(mut self) -> Result<Contents, &'static str> {
        let count = |text: &str| match text {
            "full" => Ok(None),
            count => count.parse().ok().filter(|&count: &u8| count <= 15).map(Some).ok_or("is malformed"),
        };
        let hash = |text: &str| PinHash::parse(text).ok_or("holds a PIN hash that cannot be used");
        self.required("database ")?;
        let left = count(self.required("tries-left ")?)?;
        let pin = self.optional("pin ").map(hash).transpose()?;
        let puk_left = self.optional("puk-tries-left ").map(count).transpose()?;
        let puk = self.optional("puk ").map(hash).transpose()?;
        let identity =
            self.optional("identity ").map(|text| from_hex(text).ok_or("is malformed")).transpose()?;
        if self.0.next().is_some() || puk_left.is_some() != puk.is_some() || (puk.is_some() && pin.is_none())
        {
            return Err("is malformed");
        }
        Ok(Contents { left, pin, puk_left: puk_left.flatten(), puk, identity })
    }
}

fn from_hex(text: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    let digits = text.as_bytes();
    if digits.len() != 64 || !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(body: &str) -> String {
        format!("{body}sha256 {}\n", hex(&Sha256::digest(body)))
    }

    const BAD: [&str; 8] = [
        "",
        "database /d\n",
        "tries-left 1\n",
        "database /d\ntries-left 16\n",
        "database /d\ntries-left -1\n",
        "database /d\ntries-left 1\nmore\n",
        "database /d\ntries-left 1\npin \n",
        "database /d\ntries-left 1\npin $argon2i$v=19$m=8,t=1,p=1$c2FsdHNhbHQ$aGFzaGhhc2g\n",
    ];

    #[test]
    fn files_of_the_first_version_with_a_good_check_line_are_still_looked_at() {
        let decoded = |body: &str| decode(checked(body).as_bytes()).map(|decoded| decoded.contents.left);
        assert_eq!(decoded("vscard-state 1\ndatabase \ntries-left full\n"), Ok(None));
        assert_eq!(decoded("vscard-state 1\ndatabase /d\ntries-left 15\n"), Ok(Some(15)));
        for bad in BAD {
            assert!(decoded(&format!("vscard-state 1\n{bad}")).is_err(), "{bad}");
        }
        assert_eq!(decoded("\n"), Err("was written by another version"));
        assert_eq!(
            decoded("vscard-state 3\ndatabase /d\ntries-left 1\n"),
            Err("was written by another version")
        );
        assert_eq!(decoded("vscard-state 2\ndatabase /d\ntries-left 1\n"), Err("is cut short"));
        assert!(decode(&vec![b'a'; 5000]).is_err());
        assert!(decode(&vec![b'a'; 10_000]).is_err());
        assert!(decode(b"\xff\nsha256 ").is_err());
    }

    #[test]
    fn the_slot_with_the_greater_number_counts_if_it_is_whole() {
        let file = |slots: [(u64, u8); 2]| {
            slots.map(|(sequence, left)| {
                let contents = Contents { left: Some(left), ..Contents::default() };
                encode_slot(Path::new("/d"), &contents, sequence, true)
            })
        };
        let decoded = |file: &str| decode(file.as_bytes()).map(|decoded| decoded.contents.left);
        assert_eq!(decoded(&file([(1, 5), (2, 6)]).concat()), Ok(Some(6)));
        assert_eq!(decoded(&file([(u64::MAX, 5), (2, 6)]).concat()), Ok(Some(5)));
        assert!(decoded(&file([(2, 5), (2, 6)]).concat()).is_err());
        let [first, second] = file([(1, 5), (2, 6)]);
        let torn = second.replace("tries-left 6", "tries-left 7");
        assert_eq!(decoded(&[&first[..], &torn].concat()), Ok(Some(5)));
        assert!(decoded(&[&torn[..], &torn].concat()).is_err());
        assert!(decoded(&first).is_err() && decoded(&second).is_err());
        for bad in BAD {
            let mut slot = checked(&format!("vscard-state 2\nsequence 3\nflushed yes\n{bad}"));
            slot.extend(std::iter::repeat_n(FILLER, SLOT - slot.len()));
            assert_eq!(decoded(&[&slot[..], &second].concat()), Ok(Some(6)), "{bad}");
        }
    }

    /// Over what may not be on disk yet, as the other slot is then all that is.
    #[test]
    fn one_slot_is_always_on_disk() {
        let next = |slot, flushed| Newest { slot, sequence: 7, flushed }.next();
        assert_eq!([next(0, true), next(1, true)], [Some((1, 8)), Some((0, 8))]);
        assert_eq!([next(0, false), next(1, false)], [Some((0, 8)), Some((1, 8))]);
        assert_eq!(Newest { slot: 0, sequence: u64::MAX, flushed: true }.next(), None);
    }

    #[test]
    fn what_is_written_is_not_too_long_to_be_read() {
        // As long as a hash and its salt can be.
        let hash = format!("$argon2id$v=19$m=262144,t=64,p=16${}${}", "A".repeat(64), "A".repeat(86));
        let pin = Some(PinHash::parse(&hash).unwrap());
        let contents = Contents { puk: pin.clone(), pin, identity: Some([0xFF; 32]), ..Contents::default() };
        for character in ["\u{9f}", "\u{10ffff}"] {
            let database = character.repeat(2000);
            let decoded = decode(encode(Path::new(&database), &contents).as_bytes()).unwrap();
            assert_eq!((decoded.contents, decoded.whole), (contents.clone(), true));
        }
    }
}
