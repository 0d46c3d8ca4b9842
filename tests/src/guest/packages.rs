//! Debian packages that are taken apart instead of installed: the guest's kernel and its udev.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::command;

/// Depends on the package with the current kernel.
const KERNEL: &str = "linux-image-amd64";

/// udevd tells pcscd what is plugged in; it brings a library of its own. `usbip` attaches USB/IP devices.
const OTHERS: [&str; 3] = ["udev", "libkmod2", "usbip"];

/// Package files on disk.
pub(super) struct Packages {
    pub(super) kernel: PathBuf,
    pub(super) others: Vec<PathBuf>,
}

impl Packages {
    /// The newest apt knows of, downloaded unless they are in `directory` already. Asks apt only when its lists
    /// changed since the last time; without network the packages of the last time will do.
    pub(super) fn fetch(directory: &Path) -> Result<Self> {
        let lists = lists_stamp();
        let record = directory.join("record");
        let known = fs::read_to_string(&record).ok().and_then(|text| Self::from_record(directory, &text));
        match known {
            Some((stamp, packages)) if stamp == lists => Ok(packages),
            known => match Self::download(directory) {
                Ok(files) => {
                    fs::write(&record, format!("{lists}\n{}\n", files.join("\n")))?;
                    let text = fs::read_to_string(&record)?;
                    let (_, packages) = Self::from_record(directory, &text).context("packages vanished")?;
                    Ok(packages)
                }
                Err(error) => {
                    let (_, packages) = known.ok_or(error)?;
                    eprintln!("guest: newer packages could not be had, going on with those of the last time");
                    Ok(packages)
                }
            },
        }
    }

    fn from_record(directory: &Path, text: &str) -> Option<(String, Self)> {
        let mut lines = text.lines();
        let stamp = lines.next()?.to_owned();
        let files: Vec<_> = lines.map(|name| directory.join(name)).collect();
        if files.len() != 1 + OTHERS.len() || !files.iter().all(|file| file.exists()) {
            return None;
        }
        let (kernel, others) = files.split_first()?;
        Some((stamp, Self { kernel: kernel.clone(), others: others.to_vec() }))
    }

    /// File names in the order kernel, others.
    fn download(directory: &Path) -> Result<Vec<String>> {
        let depends = command::text(Command::new("apt-cache").args(["depends", KERNEL]))?;
        let kernel = depends
            .lines()
            .find_map(|line| {
                line.trim().strip_prefix("Depends: ").filter(|name| name.starts_with("linux-image-"))
            })
            .with_context(|| format!("apt knows no {KERNEL}; `apt-get update` may be due"))?;
        let mut names = vec![kernel];
        names.extend(OTHERS);
        // 'URI' FILE SIZE HASH
        let listing = command::text(Command::new("apt-get").args(["download", "--print-uris"]).args(&names))?;
        let mut files = Vec::new();
        for name in &names {
            let file = listing
                .lines()
                .filter_map(|line| line.split_whitespace().nth(1))
                .find(|file| file.strip_prefix(name).is_some_and(|rest| rest.starts_with('_')))
                .with_context(|| format!("apt knows no package {name}"))?;
            files.push(file.to_owned());
        }
        let missing: Vec<_> =
            names.iter().zip(&files).filter(|(_, file)| !directory.join(file).exists()).collect();
        if !missing.is_empty() {
            eprintln!("guest: downloading {}", names.join(", "));
            // apt writes into the working directory; a killed download must leave nothing that looks whole.
            let partial = tempfile::Builder::new().prefix(".partial-").tempdir_in(directory)?;
            command::output(
                Command::new("apt-get")
                    .args(["download", "-q"])
                    .args(missing.iter().map(|(name, _)| name))
                    .current_dir(partial.path()),
            )
            .context("downloading packages for the guest; `apt-get update` may be due")?;
            for (name, file) in missing {
                fs::rename(partial.path().join(file), directory.join(file))
                    .with_context(|| format!("apt-get did not download {name} as {file}"))?;
            }
        }
        Ok(files)
    }
}

/// Changes when apt's lists do.
fn lists_stamp() -> String {
    fs::metadata("/var/lib/apt/lists")
        .map(|lists| format!("{}.{}", lists.mtime(), lists.mtime_nsec()))
        .unwrap_or_default()
}

/// Unpacks without installing.
pub(super) fn unpack(package: &Path, into: &Path) -> Result<()> {
    command::output(Command::new("dpkg").arg("-x").arg(package).arg(into))?;
    ensure!(into.exists(), "{} is empty", package.display());
    Ok(())
}
