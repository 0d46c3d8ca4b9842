//! From a file to a certificate and its private key.

use std::path::Path;

use openssl::base64;
use openssl::error::ErrorStack;
use openssl::nid::Nid;
use openssl::pkcs12::Pkcs12;
use openssl::pkey::{PKey, Private};
use openssl::x509::X509Ref;
use vscard_protocol::Secret;
use zeroize::Zeroizing;

use super::OpenError;
use crate::pin::{Access, read_file};

/// A certificate with its chain and an RSA-4096 key takes a fifth of it.
const MAX_FILE: usize = 64 * 1024;
/// Longer chains are a mistake.
const MAX_CHAIN: usize = 16;
/// What OpenSSL has room for (PEM_BUFSIZE), and what a password file can hold.
const MAX_PASSWORD: usize = 1024;

/// What one source holds.
pub(super) struct Found {
    /// DER of the certificates that can be meant: the key decides.
    pub(super) certificates: Vec<Vec<u8>>,
    pub(super) key: PKey<Private>,
    /// The name that the source gives itself.
    pub(super) name: Option<String>,
}

/// Takes the certificates from one PEM file and the private key from another, or both from one.
pub(super) fn read_pem(
    certificate: &Path,
    key: &Path,
    password: Option<&Secret>,
) -> Result<Found, OpenError> {
    let key_text = read(key, Access::OwnersAlone)?;
    let certificates = if certificate == key {
        certificates_in(certificate, &key_text)?
    } else {
        certificates_in(certificate, &read(certificate, Access::Anyone)?)?
    };
    Ok(Found { certificates, key: key_in(key, &key_text, password)?, name: None })
}

pub(super) fn read_pkcs12(path: &Path, password: Option<&Secret>) -> Result<Found, OpenError> {
    let bytes = read(path, Access::OwnersAlone)?;
    let archive = Pkcs12::from_der(&bytes).map_err(|_| contents(path, "is not a PKCS#12 file"))?;
    // PKCS#12 passwords are Unicode strings that end at a NUL (RFC 7292 appendix B.1).
    let text = password.map_or(Ok(""), |password| std::str::from_utf8(password.expose()));
    let text = text.ok().filter(|text| !text.contains('\0') && text.len() <= MAX_PASSWORD);
    let text = text.ok_or_else(|| OpenError::WrongPassword { path: path.to_owned() })?;
    // The openssl crate makes a copy of the password here that is freed without being wiped.
    let parsed = archive.parse2(text).map_err(|errors| match password {
        None if !is_unsupported(&errors) => OpenError::PasswordNeeded { path: path.to_owned() },
        _ => refused(path, &errors),
    })?;
    let key = parsed.pkey.ok_or_else(|| contents(path, "holds no private key"))?;
    // OpenSSL gives the one whose public key is that of the private key.
    let certificate =
        parsed.cert.ok_or_else(|| contents(path, "holds no certificate for its private key"))?;
    let der = certificate.to_der().map_err(|_| contents(path, "holds a damaged certificate"))?;
    Ok(Found { certificates: vec![der], key, name: name_of(&certificate) })
}

/// The friendlyName that came with the certificate, else the common name in its subject.
fn name_of(certificate: &X509Ref) -> Option<String> {
    let friendly = certificate.alias().map(|alias| String::from_utf8_lossy(alias).into_owned());
    friendly.filter(|name| !name.is_empty()).or_else(|| {
        let entry = certificate.subject_name().entries_by_nid(Nid::COMMONNAME).last()?;
        entry.data().to_string().ok().filter(|name| !name.is_empty())
    })
}

fn read(path: &Path, access: Access) -> Result<Zeroizing<Vec<u8>>, OpenError> {
    let bytes = read_file(path, MAX_FILE, access)?;
    if bytes.len() > MAX_FILE { Err(contents(path, "is longer than 64 KiB")) } else { Ok(bytes) }
}

fn contents(path: &Path, what: &'static str) -> OpenError {
    OpenError::Contents { path: path.to_owned(), what }
}

/// What is said of a file that was not decrypted with the password given.
fn refused(path: &Path, errors: &ErrorStack) -> OpenError {
    if is_unsupported(errors) {
        contents(path, "is encrypted with an algorithm that OpenSSL has given up; encrypt it anew")
    } else {
        OpenError::WrongPassword { path: path.to_owned() }
    }
}

/// OpenSSL 3 has RC2 and DES in a module of their own, which is not loaded.
fn is_unsupported(errors: &ErrorStack) -> bool {
    errors.errors().iter().any(|error| error.reason() == Some("unsupported"))
}

fn certificates_in(path: &Path, text: &[u8]) -> Result<Vec<Vec<u8>>, OpenError> {
    let damaged = || contents(path, "holds a damaged certificate");
    let mut found = Vec::new();
    for block in blocks(path, text)?.iter().filter(|block| block.label == b"CERTIFICATE") {
        if found.len() == MAX_CHAIN {
            return Err(contents(path, "holds more than 16 certificates"));
        }
        // Not X509::from_pem: it decodes the key too, which takes a hundred times longer.
        let body = std::str::from_utf8(block.body).map_err(|_| damaged())?;
        let body: String = body.chars().filter(|char| !char.is_ascii_whitespace()).collect();
        found.push(base64::decode_block(&body).map_err(|_| damaged())?);
    }
    if found.is_empty() { Err(contents(path, "holds no certificate in PEM format")) } else { Ok(found) }
}

pub(super) fn key_in(
    path: &Path,
    text: &[u8],
    password: Option<&Secret>,
) -> Result<PKey<Private>, OpenError> {
    let blocks = blocks(path, text)?;
    let mut keys = blocks.iter().filter(|block| block.label.ends_with(b"PRIVATE KEY"));
    let block = keys.next().ok_or_else(|| contents(path, "holds no private key in PEM format"))?;
    if keys.next().is_some() {
        return Err(contents(path, "holds more than one private key"));
    }
    let password = match password {
        Some(password) if block.is_encrypted() => password,
        None if block.is_encrypted() => return Err(OpenError::PasswordNeeded { path: path.to_owned() }),
        _ => &Secret::default(),
    };
    if password.len() > MAX_PASSWORD {
        return Err(OpenError::WrongPassword { path: path.to_owned() });
    }
    // Always a callback: without one, OpenSSL asks on the terminal.
    let answer = |buffer: &mut [u8]| {
        Ok(buffer.get_mut(..password.len()).map_or(0, |room| {
            room.copy_from_slice(password.expose());
            room.len()
        }))
    };
    PKey::private_key_from_pem_callback(block.text, answer).map_err(|errors| match block.is_encrypted() {
        true => refused(path, &errors),
        false => contents(path, "holds a damaged private key, or one of a kind that no card has"),
    })
}

/// One `-----BEGIN …-----` to `-----END …-----` (RFC 7468 §2).
struct Block<'a> {
    label: &'a [u8],
    /// All of it.
    text: &'a [u8],
    /// What is between the first and the last line.
    body: &'a [u8],
}

impl Block<'_> {
    /// By its label (RFC 7468 §11), or by a header (RFC 1421 §4.6.1.1).
    fn is_encrypted(&self) -> bool {
        const HEADER: &[u8] = b"Proc-Type:";
        self.label == b"ENCRYPTED PRIVATE KEY" || self.text.windows(HEADER.len()).any(|at| at == HEADER)
    }
}

/// The blocks of a PEM file; what stands between them is explanation.
fn blocks<'a>(path: &Path, text: &'a [u8]) -> Result<Vec<Block<'a>>, OpenError> {
    let mut blocks = Vec::new();
    let mut open: Option<(usize, usize, &[u8])> = None;
    let mut at = 0;
    for line in text.split_inclusive(|&byte| byte == b'\n') {
        let start = at;
        at += line.len();
        let marker = |name: &[u8]| line.trim_ascii_end().strip_prefix(name)?.strip_suffix(b"-----");
        if let Some(label) = marker(b"-----BEGIN ") {
            open = Some((start, at, label));
        } else if marker(b"-----END ").is_some() {
            if let Some((first, body, label)) = open.take() {
                blocks.push(Block { label, text: &text[first..at], body: &text[body..start] });
            }
        }
    }
    match open {
        Some(_) => Err(contents(path, "ends in the middle of a PEM block")),
        None => Ok(blocks),
    }
}
