//! State files: contents ↔ text.

use std::fmt::Write as _;
use std::path::Path;

use sha2::{Digest, Sha256};

use super::hex;
use crate::pin::PinHash;

/// Longest state file that is read. What is written here is shorter, whatever the database's path is.
pub(super) const MAX_FILE: u64 = 4096;
const FIRST_LINE: &str = "vscard-state 1";

/// What a state file says.
#[derive(Clone, Debug, Default)]
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

pub(super) fn encode(database: &Path, contents: &Contents) -> String {
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
    let mut body = format!("{FIRST_LINE}\ndatabase {shown}\ntries-left {}\n", count(contents.left));
    // Writing to a String cannot fail.
    if let Some(pin) = &contents.pin {
        let _ = writeln!(body, "pin {pin}");
    }
    if let Some(puk) = &contents.puk {
        let _ = writeln!(body, "puk-tries-left {}\npuk {puk}", count(contents.puk_left));
    }
    if let Some(identity) = &contents.identity {
        let _ = writeln!(body, "identity {}", hex(identity));
    }
    let check = hex(&Sha256::digest(&body));
    format!("{body}sha256 {check}\n")
}

pub(super) fn decode(bytes: &[u8]) -> Result<Contents, &'static str> {
    if bytes.len() as u64 > MAX_FILE {
        return Err("is too long");
    }
    let text = std::str::from_utf8(bytes).map_err(|_| "is damaged")?;
    let start_of_check = text.rfind("\nsha256 ").ok_or("is cut short")? + 1;
    let (body, check) = text.split_at(start_of_check);
    if check != format!("sha256 {}\n", hex(&Sha256::digest(body))) {
        return Err("is damaged");
    }
    let mut lines = body.split_terminator('\n').peekable();
    if lines.next() != Some(FIRST_LINE) {
        return Err("was written by another version");
    }
    let mut field = |name: &str| lines.next_if(|line| line.starts_with(name)).map(|line| &line[name.len()..]);
    let count = |text: &str| match text {
        "full" => Ok(None),
        count => count.parse().ok().filter(|&count: &u8| count <= 15).map(Some).ok_or("is malformed"),
    };
    let hash = |text: &str| PinHash::parse(text).ok_or("holds a PIN hash that cannot be used");
    field("database ").ok_or("is malformed")?;
    let left = count(field("tries-left ").ok_or("is malformed")?)?;
    let pin = field("pin ").map(hash).transpose()?;
    let puk_left = field("puk-tries-left ").map(count).transpose()?;
    let puk = field("puk ").map(hash).transpose()?;
    let identity = field("identity ").map(|text| from_hex(text).ok_or("is malformed")).transpose()?;
    if lines.next().is_some() || puk_left.is_some() != puk.is_some() || (puk.is_some() && pin.is_none()) {
        return Err("is malformed");
    }
    Ok(Contents { left, pin, puk_left: puk_left.flatten(), puk, identity })
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

    #[test]
    fn files_with_a_good_check_line_are_still_looked_at() {
        let checked = |body: &str| format!("{body}sha256 {}\n", hex(&Sha256::digest(body)));
        let decoded = |body: &str| decode(checked(body).as_bytes()).map(|contents| contents.left);
        assert_eq!(decoded("vscard-state 1\ndatabase \ntries-left full\n"), Ok(None));
        assert_eq!(decoded("vscard-state 1\ndatabase /d\ntries-left 15\n"), Ok(Some(15)));
        for bad in [
            "\n",
            "vscard-state 2\ndatabase /d\ntries-left 1\n",
            "vscard-state 1\n",
            "vscard-state 1\ndatabase /d\n",
            "vscard-state 1\ntries-left 1\n",
            "vscard-state 1\ndatabase /d\ntries-left 16\n",
            "vscard-state 1\ndatabase /d\ntries-left -1\n",
            "vscard-state 1\ndatabase /d\ntries-left \n",
            "vscard-state 1\ndatabase /d\ntries-left 1\nmore\n",
            "vscard-state 1\ndatabase /d\ntries-left 1\npin \n",
            "vscard-state 1\ndatabase /d\ntries-left 1\npin $argon2i$v=19$m=8,t=1,p=1$c2FsdHNhbHQ$aGFzaGhhc2g\n",
        ] {
            assert!(decoded(bad).is_err(), "{bad}");
        }
        assert!(decode(&vec![b'a'; 5000]).is_err());
        assert!(decode(b"\xff\nsha256 ").is_err());
    }

    #[test]
    fn what_is_written_is_not_too_long_to_be_read() {
        // As long as a hash and its salt can be.
        let hash = format!("$argon2id$v=19$m=262144,t=64,p=16${}${}", "A".repeat(64), "A".repeat(86));
        let pin = Some(PinHash::parse(&hash).unwrap());
        let contents = Contents { puk: pin.clone(), pin, identity: Some([0xFF; 32]), ..Contents::default() };
        for character in ["\u{9f}", "\u{10ffff}"] {
            decode(encode(Path::new(&character.repeat(2000)), &contents).as_bytes()).unwrap();
        }
    }
}
