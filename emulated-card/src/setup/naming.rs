//! A card as options of a command line name it.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::{CardSetup, Keys, Wanted};
use crate::keys::pem::PemSource;

impl CardSetup {
    /// The options that tell this card from others, as `--db sql:/certs --cert id`, for a shell in any directory. `None`
    /// for whatever token a database's modules find: without the rest of the command line that would be the database.
    pub fn options(&self) -> Option<String> {
        let mut options: Vec<(&str, OsString)> = Vec::new();
        let mut add = |name, value: &OsStr| options.push((name, value.to_owned()));
        match &self.keys {
            Keys::Database(db) => add("db", &database(db)),
            Keys::Files(sources) => {
                for source in sources {
                    match source {
                        PemSource::Pem { certificate, key } if certificate == key => {
                            add("pem", &commas(certificate))
                        }
                        PemSource::Pem { certificate, key } => {
                            let mut both = commas(certificate);
                            both.push(",");
                            both.push(commas(key));
                            add("pem", &both);
                        }
                        PemSource::Pkcs12(file) => add("p12", absolute(file).as_os_str()),
                    }
                }
            }
            Keys::Token { modules, token: None, .. } if modules.is_empty() => return None,
            Keys::Token { modules, db, token } => {
                for module in modules {
                    // A bare name is looked for where libraries are.
                    let is_bare = module.parent().is_none_or(|parent| parent.as_os_str().is_empty());
                    let module = if is_bare { module.clone() } else { absolute(module) };
                    add("module", module.as_os_str());
                }
                db.iter().for_each(|db| add("db", &database(db)));
                token.iter().for_each(|token| add("token", token.as_ref()));
            }
        }
        for Wanted { slot, name } in &self.certificates {
            let slot = slot.map(|slot| format!("{slot}=")).unwrap_or_default();
            add("cert", format!("{slot}{name}").as_ref());
        }
        if !self.card_name.is_empty() {
            add("card-name", self.card_name.as_ref());
        }
        // Encrypted files are not read without; a database's certificates are.
        if let (Keys::Files(_), Some(file)) = (&self.keys, &self.password_file) {
            add("password-file", secret_file(file).as_os_str());
        }
        let words = options.iter().map(|(name, value)| format!("--{name} {}", shell_word(value)));
        Some(words.collect::<Vec<_>>().join(" "))
    }
}

/// A descriptor, `fd:N`, is no path.
fn secret_file(file: &Path) -> PathBuf {
    if file.as_os_str().as_bytes().starts_with(b"fd:") { file.to_owned() } else { absolute(file) }
}

/// One that cannot be found is named as it was.
fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

fn database(db: &str) -> OsString {
    let mut text = OsString::from("sql:");
    text.push(absolute(Path::new(db.strip_prefix("sql:").unwrap_or(db))));
    text
}

/// A comma in the name of a file is written twice where another file may follow.
fn commas(path: &Path) -> OsString {
    let path = absolute(path);
    path.to_str().map_or_else(|| path.clone().into(), |text| text.replace(',', ",,").into())
}

/// As one word of a POSIX shell's command line. What is no UTF-8 is shown as such.
pub fn shell_word(word: impl AsRef<OsStr>) -> String {
    let word = word.as_ref();
    let is_plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"/._-+,:=@%^".contains(byte);
    if !word.is_empty() && word.as_bytes().iter().all(is_plain) {
        return word.to_string_lossy().into_owned();
    }
    format!("'{}'", word.to_string_lossy().replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_for_a_shell() {
        for (word, expected) in [
            ("/run/card/vscclient.pid", "/run/card/vscclient.pid"),
            ("", "''"),
            ("a b", "'a b'"),
            ("it's", "'it'\\''s'"),
            ("$(x)", "'$(x)'"),
        ] {
            assert_eq!(shell_word(word), expected);
        }
    }

    #[test]
    fn a_card_by_its_options() {
        let options = |keys, certificates: &[&str]| {
            let certificates = certificates.iter().map(|text| text.parse().unwrap()).collect();
            let password_file = Some("/password".into());
            let setup = CardSetup {
                keys,
                certificates,
                password_file,
                card_name: "second".into(),
                ..CardSetup::default()
            };
            setup.options().unwrap_or_default()
        };
        let database = Keys::Database("/c d".into());
        assert_eq!(
            options(database, &["id", "9c=Jane's"]),
            "--db 'sql:/c d' --cert id --cert '9c=Jane'\\''s' --card-name second"
        );
        let pem = |text| PemSource::pem_option(text).unwrap();
        let files = vec![pem("/a,/b"), pem("/c,,d"), PemSource::Pkcs12("/p".into())];
        assert_eq!(
            options(Keys::Files(files), &[]),
            "--pem /a,/b --pem /c,,d --p12 /p --card-name second --password-file /password"
        );
        let token = Keys::Token { modules: vec!["m.so".into()], db: None, token: Some("mine".into()) };
        assert_eq!(options(token, &[]), "--module m.so --token mine --card-name second");
        let below = Keys::Token { modules: vec!["./m.so".into()], db: None, token: None };
        let here = std::env::current_dir().unwrap();
        let module = shell_word(here.join("m.so"));
        assert_eq!(options(below, &[]), format!("--module {module} --card-name second"));
        // The same words would be those of a database.
        let found = Keys::Token { modules: vec![], db: Some("/certs".into()), token: None };
        assert_eq!(options(found, &[]), "");
    }
}
