//! What is checked against the openssl command.
#![allow(dead_code, clippy::unwrap_used, reason = "each test binary uses a part of it")]

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use emulated_card::keys::{Certificate, Curve};

/// Runs a program and gives its output; fails with the name of the package if it is missing.
#[track_caller]
pub(crate) fn run(program: &str, package: &str, arguments: &[&OsStr]) -> Vec<u8> {
    let output = match Command::new(program).args(arguments).stdin(Stdio::null()).output() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            panic!("{program} is missing; install the package {package}")
        }
        result => result.unwrap(),
    };
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {errors}");
    output.stdout
}

#[allow(unused_macros, reason = "as above")]
macro_rules! openssl {
    ($($argument:expr),* $(,)?) => {
        $crate::openssl_tool::run("openssl", "openssl", &[$(std::ffi::OsStr::new(&$argument)),*])
    };
}
#[allow(unused_imports, reason = "as above")]
pub(crate) use openssl;

/// A self-signed certificate and its key (`rsa:BITS`, `P-256`, `P-384`), both PEM.
pub(crate) fn make_certificate(name: &str, key: &str, key_file: &Path, file: &Path, extra: &[&str]) {
    let (subject, curve) = (format!("/CN={name}"), format!("ec_paramgen_curve:{key}"));
    let mut arguments = vec!["req", "-x509", "-nodes", "-subj", &subject];
    if key.starts_with("rsa:") {
        arguments.extend(["-newkey", key]);
    } else {
        arguments.extend(["-newkey", "ec", "-pkeyopt", &curve]);
    }
    arguments.extend(["-keyout", key_file.to_str().unwrap(), "-out", file.to_str().unwrap()]);
    arguments.extend(extra);
    let arguments: Vec<_> = arguments.iter().map(OsStr::new).collect();
    run("openssl", "openssl", &arguments);
}

/// Fails unless `signature`, r and s, is one over `digest` by the certificate's key.
#[track_caller]
pub(crate) fn verify_ecdsa(directory: &Path, certificate: &Certificate, digest: &[u8], signature: &[u8]) {
    let [key, input, der] = ["ecdsa-key", "ecdsa-digest", "ecdsa-signature"].map(|name| directory.join(name));
    let integer = |number: &[u8]| {
        let number = &number[number.iter().take_while(|&&byte| byte == 0).count()..];
        let sign = if number[0] & 0x80 == 0 { &[][..] } else { &[0] };
        [&[0x02, (sign.len() + number.len()) as u8], sign, number].concat()
    };
    let (r, s) = signature.split_at(signature.len() / 2);
    let numbers = [integer(r), integer(s)].concat();
    fs::write(&der, [&[0x30, numbers.len() as u8], &numbers[..]].concat()).unwrap();
    fs::write(&key, &certificate.public_key).unwrap();
    fs::write(&input, digest).unwrap();
    openssl!("pkeyutl", "-verify", "-pubin", "-keyform", "DER", "-inkey", key, "-in", input, "-sigfile", der);
}

/// A new key on `curve`: its point, and what openssl derives with it and a SubjectPublicKeyInfo.
pub(crate) fn peer(directory: &Path, curve: Curve, public_key: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let [key, other] = ["ecdh-key", "ecdh-other"].map(|name| directory.join(name));
    let name = match curve {
        Curve::P256 => "ec_paramgen_curve:P-256",
        Curve::P384 => "ec_paramgen_curve:P-384",
    };
    openssl!("genpkey", "-algorithm", "EC", "-pkeyopt", name, "-out", key);
    fs::write(&other, public_key).unwrap();
    let shared = openssl!("pkeyutl", "-derive", "-inkey", key, "-peerkey", other, "-peerform", "DER");
    let info = openssl!("pkey", "-in", key, "-pubout", "-outform", "DER");
    (info[info.len() - 1 - 2 * curve.field_len()..].to_vec(), shared)
}
