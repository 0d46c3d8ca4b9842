//! Running the host's programs.

use std::io;
use std::process::{Command, Output};

use anyhow::{Context, Result, bail};

/// Runs it and returns its standard output; anything but success is an error that shows what it said.
pub(super) fn output(command: &mut Command) -> Result<Vec<u8>> {
    let Output { status, stdout, stderr } = run(command)?;
    if !status.success() {
        bail!("{command:?} failed ({status}): {}", String::from_utf8_lossy(&stderr).trim());
    }
    Ok(stdout)
}

/// [`output`] as text.
pub(super) fn text(command: &mut Command) -> Result<String> {
    let bytes = output(command)?;
    String::from_utf8(bytes).with_context(|| format!("{command:?} printed something that is not UTF-8"))
}

/// Runs it to its end, whatever its status.
pub(super) fn run(command: &mut Command) -> Result<Output> {
    // Parsed output must not depend on the user's language.
    command.env("LC_ALL", "C");
    match command.output() {
        Ok(output) => Ok(output),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let program = command.get_program().to_string_lossy();
            bail!("the program {program} is missing; `cargo xtask setup` installs what is needed")
        }
        Err(error) => Err(error).with_context(|| format!("{command:?}")),
    }
}
