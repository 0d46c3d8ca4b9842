//! What `card.toml` says of a card in a directory.

use std::path::{Component, Path};

use serde::{Deserialize, Serialize};

/// Ten times what a card of 24 certificates needs.
pub(super) const MAX_CARD_FILE: u64 = 32 * 1024;
/// X.520's upper bound for a common name.
const MAX_NAME: usize = 64;

/// Which applications the card has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Profile {
    Piv,
    Cac,
    Dual,
}

/// What `card.toml` says.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CardFile {
    /// Who holds the card.
    pub(super) name: String,
    pub(super) profile: Profile,
    /// Certificates and keys in PEM files, in this order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) pem: Vec<PemFiles>,
    /// Or certificates and keys in an NSS database.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) nss: Option<NssFiles>,
    /// The card management key, of a card that can be written to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) admin: Option<AdminFile>,
}

impl CardFile {
    /// The files that it names.
    pub(super) fn files(&self) -> impl Iterator<Item = &str> {
        let pem = self.pem.iter().flat_map(|files| [&files.certificate, &files.key]);
        let nss = self.nss.iter().flat_map(|files| [&files.database, &files.password_file]);
        let admin = self.admin.iter().map(|admin| &admin.key);
        pem.chain(nss).chain(admin).map(String::as_str)
    }
}

/// One certificate with its key. All files are in the directory itself.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PemFiles {
    pub(super) certificate: String,
    pub(super) key: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct NssFiles {
    pub(super) database: String,
    pub(super) password_file: String,
    /// Nicknames, in this order.
    pub(super) certificates: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct AdminFile {
    pub(super) key: String,
    pub(super) algorithm: AdminAlgorithm,
}

/// What a card management key encrypts with (SP 800-78-4 table 6-2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum AdminAlgorithm {
    #[serde(rename = "3des")]
    TripleDes,
    Aes128,
    Aes192,
    Aes256,
}

/// Reads a file's text.
pub(super) fn parse(text: &str) -> Result<CardFile, String> {
    if text.len() as u64 > MAX_CARD_FILE {
        return Err("is longer than 32 KiB".into());
    }
    let card: CardFile = toml::from_str(text).map_err(|error| {
        let start = error.span().map_or(0, |span| span.start);
        let line = text.bytes().take(start).filter(|&byte| byte == b'\n').count() + 1;
        format!("line {line}: {:?}", error.message())
    })?;
    check_name(&card.name).map_err(str::to_owned)?;
    if card.pem.is_empty() == card.nss.is_none() {
        return Err("needs keys: either [[pem]] sections or one [nss] section".into());
    }
    if card.admin.is_some() && (card.nss.is_some() || card.profile != Profile::Piv) {
        return Err(
            "a card with an [admin] section has the profile \"piv\" and keys in [[pem]] sections".into()
        );
    }
    if let Some(name) = card.files().find(|name| !is_file_name(name)) {
        return Err(format!("{name:?} is not the name of a file in this directory"));
    }
    Ok(card)
}

/// A path could lead out of the directory, which would then be no card of its own.
fn is_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(part)), None) if part == name)
        && !name.contains('\0')
}

pub(super) fn check_name(name: &str) -> Result<(), &'static str> {
    if name.trim().is_empty() || name.chars().count() > MAX_NAME {
        Err("a name has 1 to 64 characters")
    } else if name.chars().any(is_control) {
        Err("a name has no control characters")
    } else {
        Ok(())
    }
}

/// Controls also what is shown after it: other lines, or another order of the text (UAX #9 §2).
pub(super) fn is_control(character: char) -> bool {
    let bidi = matches!(
        character,
        '\u{61C}' | '\u{200E}' | '\u{200F}' | '\u{2028}'..='\u{202E}' | '\u{2066}'..='\u{2069}'
    );
    bidi || character.is_control()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PEM: &str = "name = \"J\"\nprofile = \"piv\"\n[[pem]]\ncertificate = \"a.pem\"\nkey = \"a.key\"\n";
    const NSS: &str = "name = \"J\"\nprofile = \"cac\"\n[nss]\ndatabase = \"nssdb\"\npassword_file = \"p\"\n\
                       certificates = [\"a\", \"b\"]\n";

    #[test]
    fn a_card_file_is_read_strictly() {
        assert_eq!(parse(PEM).unwrap().profile, Profile::Piv);
        assert_eq!(parse(NSS).unwrap().nss.unwrap().certificates, ["a", "b"]);
        let both = format!("{NSS}[[pem]]\ncertificate = \"a.pem\"\nkey = \"a.key\"\n");
        for (text, said) in [
            (both, "either"),
            ("name = \"J\"\nprofile = \"dual\"".into(), "either"),
            (PEM.replace("a.key", "/etc/key"), "\"/etc/key\" is not the name of a file"),
            (PEM.replace("a.key", "../key"), "is not the name of a file"),
            (PEM.replace("a.key", "a.key/"), "is not the name of a file"),
            (PEM.replace("a.key", "."), "is not the name of a file"),
            (PEM.replace("a.key", ""), "is not the name of a file"),
            (NSS.replace("nssdb", "a/b"), "is not the name of a file"),
            (format!("{PEM}[admin]\nkey = \"../k\"\nalgorithm = \"3des\"\n"), "is not the name of a file"),
            (format!("{PEM}[admin]\nkey = \"k\"\nalgorithm = \"des\"\n"), "line 8"),
            (
                format!("{}[admin]\nkey = \"k\"\nalgorithm = \"aes256\"\n", PEM.replace("piv", "dual")),
                "\"piv\"",
            ),
            (format!("{NSS}[admin]\nkey = \"k\"\nalgorithm = \"aes256\"\n"), "\"piv\""),
            (PEM.replace("piv", "openpgp"), "line 2"),
            (format!("{PEM}more = 1\n"), "line 6"),
            (PEM.replace("\"J\"", "\"\""), "1 to 64"),
            (PEM.replace("\"J\"", "\"a\\u0007\""), "control"),
            (PEM.replace("\"J\"", "\"a\u{202E}\""), "control"),
            (PEM.replace('J', &"J".repeat(40_000)), "32 KiB"),
        ] {
            let error = parse(&text).unwrap_err();
            assert!(error.contains(said), "{said}: {error}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(name in "[^\\p{Cc}]{1,64}") {
            prop_assume!(check_name(&name).is_ok());
            let files = PemFiles { certificate: "a.pem".into(), key: "a.key".into() };
            let admin = AdminFile { key: "admin.key".into(), algorithm: AdminAlgorithm::TripleDes };
            let (pem, admin) = (vec![files.clone(), files], Some(admin));
            let card = CardFile { name, profile: Profile::Piv, pem, nss: None, admin };
            prop_assert_eq!(parse(&toml::to_string(&card).unwrap()), Ok(card));
        }

        #[test]
        fn any_text_is_read_or_refused(at in 0..PEM.len(), with in "\\PC{0,8}") {
            let _ = parse(&format!("{}{with}{}", &PEM[..at], &PEM[at..]));
            let _ = parse(&with);
        }
    }
}
