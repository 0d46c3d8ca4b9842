//! What must be known of a certificate before login, from its DER.

use std::time::Duration;

use thiserror::Error;
use x509_cert::der::asn1::{ObjectIdentifier, UintRef};
use x509_cert::der::{AnyRef, Decode, Reader, SliceReader, Tag, Tagged};
use x509_cert::spki::SubjectPublicKeyInfoRef;
use x509_cert::time::Validity;

use super::{Curve, KeyKind};

const RSA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");
const RSA_PSS: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.10");
const EC: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.2.1");
const P256: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.3.1.7");
const P384: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.132.0.34");

/// The parts of a certificate that matter here.
pub(super) struct Parts {
    /// SubjectPublicKeyInfo, DER.
    pub(super) public_key: Vec<u8>,
    /// notAfter, then notBefore, since 1970: the greater, the later the certificate.
    #[cfg_attr(not(all(unix, feature = "nss")), expect(dead_code, reason = "files hold no renewals"))]
    pub(super) validity: (Duration, Duration),
    key: Key,
}

enum Key {
    Rsa {
        modulus: Vec<u8>,
        exponent: Vec<u8>,
    },
    Ec(PublicKey),
    /// Another kind, by its usual name or object identifier.
    Other(String),
}

/// The public half of a key that a card can hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum PublicKey {
    /// Numbers without leading zeros.
    Rsa { modulus: Vec<u8>, exponent: Vec<u8> },
    /// The point, uncompressed: 04, x, y.
    Ec { curve: Curve, point: Vec<u8> },
}

impl PublicKey {
    pub(super) fn kind(&self) -> KeyKind {
        match self {
            Self::Rsa { modulus, .. } => KeyKind::Rsa { bits: bits(modulus) },
            Self::Ec { curve, .. } => KeyKind::Ec(*curve),
        }
    }
}

/// Why no card can hold a certificate's key.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub(super) enum Unfit {
    #[error("{0} keys are not supported")]
    Kind(String),
    #[error("RSA keys of {0} bits are not supported, only 1024 to 4096 in whole bytes")]
    Size(usize),
}

impl Parts {
    /// The key, if it is one that a card can hold: RSA of 1024 to 4096 bits in whole bytes, P-256 or P-384.
    pub(super) fn key(self) -> Result<(Vec<u8>, PublicKey), Unfit> {
        Ok((self.public_key, self.key.fit()?))
    }
}

impl Key {
    fn fit(self) -> Result<PublicKey, Unfit> {
        match self {
            Self::Rsa { modulus, exponent } => match bits(&modulus) {
                bits if (1024..=4096).contains(&bits) && bits % 8 == 0 => {
                    Ok(PublicKey::Rsa { modulus, exponent })
                }
                bits => Err(Unfit::Size(bits)),
            },
            Self::Ec(key) => Ok(key),
            Self::Other(kind) => Err(Unfit::Kind(kind)),
        }
    }
}

/// Length in bits of a big-endian number without leading zero bytes.
fn bits(number: &[u8]) -> usize {
    number.first().map_or(0, |first| number.len() * 8 - first.leading_zeros() as usize)
}

/// Takes a certificate apart.
///
/// Only what is needed is decoded: a certificate with an odd extension or serial number is as good as another
/// here.
pub(super) fn parse(der: &[u8]) -> x509_cert::der::Result<Parts> {
    let certificate = AnyRef::from_der(der)?;
    certificate.tag().assert_eq(Tag::Sequence)?;
    let tbs = AnyRef::decode(&mut SliceReader::new(certificate.value())?)?;
    tbs.tag().assert_eq(Tag::Sequence)?;
    // RFC 5280 §4.1: [version,] serial number, signature, issuer, validity, subject, public key.
    let mut fields = SliceReader::new(tbs.value())?;
    if fields.peek_header()?.tag.is_context_specific() {
        fields.tlv_bytes()?;
    }
    for _ in 0..3 {
        fields.tlv_bytes()?;
    }
    let validity = Validity::from_der(fields.tlv_bytes()?)?;
    fields.tlv_bytes()?;
    let public_key = fields.tlv_bytes()?;
    Ok(Parts {
        public_key: public_key.to_vec(),
        validity: (validity.not_after.to_unix_duration(), validity.not_before.to_unix_duration()),
        key: parse_key(public_key)?,
    })
}

/// The key in a SubjectPublicKeyInfo, if a card can hold it.
#[cfg(feature = "pem")]
pub(super) fn parse_public_key(info: &[u8]) -> Option<PublicKey> {
    parse_key(info).ok()?.fit().ok()
}

fn parse_key(public_key: &[u8]) -> x509_cert::der::Result<Key> {
    let info = SubjectPublicKeyInfoRef::from_der(public_key)?;
    let key = info.subject_public_key.as_bytes().ok_or_else(|| Tag::BitString.value_error())?;
    Ok(match info.algorithm.oid {
        RSA => {
            let key = AnyRef::from_der(key)?;
            key.tag().assert_eq(Tag::Sequence)?;
            // RFC 8017 appendix A.1.1: these two and nothing more.
            let mut numbers = SliceReader::new(key.value())?;
            let modulus = UintRef::decode(&mut numbers)?;
            let exponent = UintRef::decode(&mut numbers)?;
            numbers.finish(())?;
            Key::Rsa { modulus: modulus.as_bytes().to_vec(), exponent: exponent.as_bytes().to_vec() }
        }
        EC => {
            let curve = match info.algorithm.parameters_oid() {
                Ok(P256) => Curve::P256,
                Ok(P384) => Curve::P384,
                Ok(other) => return Ok(Key::Other(format!("EC ({other})"))),
                Err(_) => return Ok(Key::Other("EC".to_owned())),
            };
            if key.first() != Some(&0x04) || key.len() != 1 + 2 * curve.field_len() {
                return Ok(Key::Other("EC with a compressed point".to_owned()));
            }
            Key::Ec(PublicKey::Ec { curve, point: key.to_vec() })
        }
        RSA_PSS => Key::Other("RSA-PSS".to_owned()),
        other => Key::Other(other.to_string()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_counted_from_the_highest_one() {
        assert_eq!(bits(&[]), 0);
        assert_eq!(bits(&[1]), 1);
        assert_eq!(bits(&[0x80, 0]), 16);
        assert_eq!(bits(&[0x7f, 0]), 15);
    }

    #[test]
    fn rubbish_is_an_error() {
        for der in
            [&b""[..], b"\x30", b"\x30\x00", b"\x30\x02\x30\x00", b"\x30\x84\xff\xff\xff\xff", &[0x30; 99]]
        {
            assert!(parse(der).is_err(), "{der:02x?}");
        }
    }
}
