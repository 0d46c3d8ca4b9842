//! PKCS#11 modules, named by their library or listed in an NSS directory.

use std::ffi::CString;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use thiserror::Error;

use super::ffi::{self, NssError};
use super::watch::Watcher;

/// Longest pkcs11.txt that is read.
const MAX_LIST: u64 = 1024 * 1024;

/// A PKCS#11 module, which stays loaded to the end of the process.
#[derive(Clone)]
pub struct Module {
    pub(super) loaded: Arc<Loaded>,
}

pub(super) struct Loaded {
    pub(super) library: String,
    pub(super) module: ffi::Module,
    /// NSS lets one thread per module wait for events.
    pub(super) watcher: Mutex<Weak<Watcher>>,
}

/// Why a module, or a list of them, is not usable.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ModuleError {
    /// The path is not one that can be passed on.
    #[error("module {library:?}: not a path in UTF-8 without NUL bytes")]
    Path {
        /// The path as it was given.
        library: PathBuf,
    },
    /// The library cannot be loaded, is no PKCS#11 module, or does not start.
    #[error("module {library:?} does not load: {reason}")]
    Load {
        /// The path as it was given.
        library: String,
        /// What the system or NSS said.
        reason: String,
    },
    /// The list of modules cannot be read.
    #[error("{list:?} cannot be read: {source}")]
    List {
        /// pkcs11.txt, with the directory.
        list: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The list names no module beside NSS's own that loads.
    #[error("{list:?} lists no module that can be loaded; add one with `modutil -add`")]
    NoModules {
        /// pkcs11.txt, with the directory.
        list: PathBuf,
    },
}

impl Module {
    /// Loads the module in a library, with the code that is in it. A path without a slash is searched for as
    /// dlopen(3) does.
    ///
    /// # Errors
    /// [`ModuleError`], which names the library.
    pub fn load(library: &Path) -> Result<Self, ModuleError> {
        let name = library.to_str().ok_or_else(|| ModuleError::Path { library: library.to_owned() })?;
        Self::load_with(name, "")
    }

    /// Loads the modules listed in the pkcs11.txt of an NSS directory (with or without `sql:` in front), without
    /// its databases. NSS's own is passed over, and with a warning those that do not load.
    ///
    /// # Errors
    /// [`ModuleError::List`], [`ModuleError::NoModules`].
    pub fn of_directory(directory: &str) -> Result<Vec<Self>, ModuleError> {
        let list = Path::new(directory.strip_prefix("sql:").unwrap_or(directory)).join("pkcs11.txt");
        let text = read_list(&list).map_err(|source| ModuleError::List { list: list.clone(), source })?;
        let modules: Vec<_> = parse_list(&text)
            .into_iter()
            .filter_map(|(library, parameters)| {
                Self::load_with(&library, &parameters)
                    .inspect_err(|error| tracing::warn!("{}: {error}", list.display()))
                    .ok()
            })
            .collect();
        if modules.is_empty() { Err(ModuleError::NoModules { list }) } else { Ok(modules) }
    }

    /// The library, as it was found.
    pub fn library(&self) -> &str {
        &self.loaded.library
    }

    fn load_with(library: &str, parameters: &str) -> Result<Self, ModuleError> {
        static LOADED: Mutex<Vec<Module>> = Mutex::new(Vec::new());

        let failed = |reason: String| ModuleError::Load { library: library.to_owned(), reason };
        let path = if library.contains('/') && !library.contains('\0') {
            // NSS says of a file that is not there only that it does not load.
            Some(fs::canonicalize(library).map_err(|error| failed(error.to_string()))?)
        } else {
            None
        };
        let library = path.as_ref().and_then(|path| path.to_str()).unwrap_or(library);
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(module) = loaded.iter().find(|module| module.library() == library) {
            return Ok(module.clone());
        }
        let spec = spec(library, parameters).ok_or_else(|| ModuleError::Path { library: library.into() })?;
        let module = ffi::Module::load(&spec).map_err(|reason| {
            failed(match reason {
                NssError::INCOMPATIBLE_MODULE => {
                    format!("it does not start, or not for use by several threads at once: {reason}")
                }
                reason => reason.to_string(),
            })
        })?;
        let module = Self {
            loaded: Arc::new(Loaded { library: library.to_owned(), module, watcher: Mutex::default() }),
        };
        loaded.push(module.clone());
        Ok(module)
    }
}

impl fmt::Debug for Module {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Module").field(&self.library()).finish()
    }
}

fn read_list(list: &Path) -> io::Result<String> {
    // Not opened before it is known to be a file: opening a FIFO would block.
    if !fs::metadata(list)?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let mut text = String::new();
    File::open(list)?.take(MAX_LIST).read_to_string(&mut text)?;
    Ok(text)
}

/// Library and parameters of each module that is not NSS's own. A module is a paragraph of `name=value` lines.
fn parse_list(text: &str) -> Vec<(String, String)> {
    let mut modules = Vec::new();
    let mut lines = text.lines().map(str::trim).peekable();
    while lines.peek().is_some() {
        let (mut library, mut parameters, mut flags) = (String::new(), String::new(), String::new());
        for line in lines.by_ref().take_while(|line| !line.is_empty()) {
            let Some((name, value)) = line.split_once('=') else { continue };
            match &*name.to_ascii_lowercase() {
                "library" => library = unquoted(value),
                "parameters" => parameters = unquoted(value),
                "nss" => flags = unquoted(value),
                _ => {}
            }
        }
        let flags = flags.to_ascii_lowercase();
        let is_own = ["internal", "moduledb"].iter().any(|flag| flags.contains(flag));
        if !library.is_empty() && !is_own {
            modules.push((library, parameters));
        }
    }
    modules
}

/// A value as NSS reads it: whole, or what stands in double quotes, where a backslash takes the next character as it is.
fn unquoted(value: &str) -> String {
    let Some(quoted) = value.strip_prefix('"') else { return value.to_owned() };
    let mut text = String::new();
    let mut characters = quoted.chars();
    while let Some(character) = characters.next().filter(|&character| character != '"') {
        text.extend(if character == '\\' { characters.next() } else { Some(character) });
    }
    text
}

/// The spec string for `SECMOD_LoadUserModule`; `None` if there is a NUL in it.
fn spec(library: &str, parameters: &str) -> Option<CString> {
    // Within "..." NSS knows two special characters.
    let quoted = |value: &str| format!("\"{}\"", value.replace('\\', "\\\\").replace('"', "\\\""));
    let mut spec = format!("library={} name=\"tokens\"", quoted(library));
    if !parameters.is_empty() {
        // Some modules refuse to start with any, even empty ones.
        spec += &format!(" parameters={}", quoted(parameters));
    }
    CString::new(spec).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nss_s_own_modules_are_not_listed() {
        let list = "library=\nname=NSS Internal PKCS #11 Module\nNSS=Flags=internal,critical trustOrder=75\n\n\n\
                    library=/usr/lib/a.so\nname=A\n\n\
                    # a comment\nname=B\nlibrary=b.so\nparameters=x='y z'\nNSS=trustOrder=100\n\n\
                    library=/c.so\nNSS=flags=moduleDB\n";
        assert_eq!(
            parse_list(list),
            [("/usr/lib/a.so".into(), String::new()), ("b.so".into(), "x='y z'".into())]
        );
        let quoted = r#"Library="/a \"b\".so" more
Parameters="x='\\y z'
NSS="trustOrder=100"

library="/own.so"
nss="flags=internal"
"#;
        assert_eq!(parse_list(quoted), [(r#"/a "b".so"#.into(), r"x='\y z'".into())]);
        assert_eq!(parse_list(""), []);
        assert_eq!(parse_list("\n\n=\n\0\n\nlibrary"), []);
    }

    #[test]
    fn quotes_and_backslashes_are_escaped() {
        let spec = spec(r#"/a"b\c"#, "x").unwrap().into_string().unwrap();
        assert_eq!(spec, r#"library="/a\"b\\c" name="tokens" parameters="x""#);
        assert_eq!(super::spec("/a", "").unwrap().to_str(), Ok("library=\"/a\" name=\"tokens\""));
        assert!(super::spec("/a\0b", "").is_none());
    }
}
