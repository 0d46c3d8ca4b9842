//! What a certificate's key is for, as far as the certificate says.

use x509_cert::attr::AttributeTypeAndValue;
use x509_cert::der::asn1::ObjectIdentifier;
use x509_cert::der::{AnyRef, Decode, Reader, SliceReader, Tag, Tagged};
use x509_cert::ext::pkix::{ExtendedKeyUsage, KeyUsage, KeyUsages};
use x509_cert::name::Name;

use crate::keys::KeyKind;

const KEY_USAGE: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.29.15");
const EXTENDED_KEY_USAGE: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.29.37");
const COMMON_NAME: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.4.3");

/// id-PIV-cardAuth (FIPS 201-2 appendix B).
const CARD_AUTHENTICATION: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.16.840.1.101.3.6.8");
const EMAIL_PROTECTION: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.5.5.7.3.4");
/// TLS client authentication, Microsoft smartcard logon, Kerberos PKINIT client (RFC 4556 §3.2.2).
const CLIENT: [ObjectIdentifier; 3] = [
    ObjectIdentifier::new_unwrap("1.3.6.1.5.5.7.3.2"),
    ObjectIdentifier::new_unwrap("1.3.6.1.4.1.311.20.2.2"),
    ObjectIdentifier::new_unwrap("1.3.6.1.5.2.3.4"),
];

/// What a key is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// The card proves itself, without its holder, and the key is for nothing else.
    CardAuthentication,
    /// The holder proves who he is.
    Authenticate,
    /// The holder signs what he stands for.
    Commit,
    /// Decryption or key agreement, and no signatures.
    Encrypt,
    /// Signatures of any kind.
    Sign,
    /// Signatures and key agreement, with a key on a curve.
    SignAndAgree,
    /// The certificate does not say, or names several purposes.
    Any,
}

/// Whether a certificate in DER has a key usage extension that can be read.
pub(super) fn has_key_usage(der: &[u8]) -> bool {
    let extensions = extensions(der).unwrap_or_default();
    extensions.iter().any(|(oid, value)| *oid == KEY_USAGE && KeyUsage::from_der(value).is_ok())
}

/// The purpose of the key of that kind in a certificate in DER. What cannot be read says nothing.
pub(super) fn purpose(der: &[u8], kind: KeyKind) -> Purpose {
    let extensions = extensions(der).unwrap_or_default();
    let find = |wanted| extensions.iter().find(|(oid, _)| *oid == wanted).map(|(_, value)| *value);
    let extended = find(EXTENDED_KEY_USAGE)
        .and_then(|value| ExtendedKeyUsage::from_der(value).ok())
        .map(|usage| usage.0)
        .unwrap_or_default();
    let card_alone = extended == [CARD_AUTHENTICATION];
    let usage = match find(KEY_USAGE).map(KeyUsage::from_der) {
        Some(Ok(usage)) => usage,
        None if card_alone => return Purpose::CardAuthentication,
        None | Some(Err(_)) => return Purpose::Any,
    };
    let has = |wanted: KeyUsages| usage.0.contains(wanted);
    let signs = has(KeyUsages::DigitalSignature);
    let encrypts =
        has(KeyUsages::KeyEncipherment) || has(KeyUsages::KeyAgreement) || has(KeyUsages::DataEncipherment);
    let authenticates = signs && extended.iter().any(|oid| CLIENT.contains(oid));
    let commits = has(KeyUsages::NonRepudiation) || (signs && extended.contains(&EMAIL_PROTECTION));
    // Such a key works without the PIN: not one that the holder is to use for anything else.
    if card_alone && signs && !commits && !encrypts {
        return Purpose::CardAuthentication;
    }
    let agrees = matches!(kind, KeyKind::Ec(_)) && has(KeyUsages::KeyAgreement);
    match (authenticates, commits, signs, encrypts) {
        (true, false, _, _) => Purpose::Authenticate,
        // Not one that is to have the PIN before each use, whatever else it is for.
        (_, _, true, _) if agrees && !has(KeyUsages::NonRepudiation) => Purpose::SignAndAgree,
        (false, true, _, _) => Purpose::Commit,
        (false, false, false, true) => Purpose::Encrypt,
        (_, _, true, false) => Purpose::Sign,
        _ => Purpose::Any,
    }
}

/// The subject's common name, if there is one that can be read.
pub(crate) fn common_name(der: &[u8]) -> Option<String> {
    let mut fields = fields(der).ok()?;
    fields.tlv_bytes().ok()?;
    let subject = Name::from_der(fields.tlv_bytes().ok()?).ok()?;
    let names = subject.0.iter().flat_map(|part| part.0.iter());
    let text = |name: &AttributeTypeAndValue| match name.value.tag() {
        Tag::Utf8String | Tag::PrintableString => String::from_utf8(name.value.value().to_vec()).ok(),
        _ => None,
    };
    names.filter(|name| name.oid == COMMON_NAME).find_map(text)
}

/// The fields of a certificate from validity on (RFC 5280 §4.1).
fn fields(der: &[u8]) -> x509_cert::der::Result<SliceReader<'_>> {
    let tbs = sequence(sequence_value(der)?)?;
    let mut fields = SliceReader::new(tbs)?;
    if fields.peek_header()?.tag.is_context_specific() {
        fields.tlv_bytes()?;
    }
    // Serial number, signature algorithm, issuer.
    for _ in 0..3 {
        fields.tlv_bytes()?;
    }
    Ok(fields)
}

/// Extensions by identifier. Only what is needed is decoded: an odd one among them is no harm.
fn extensions(der: &[u8]) -> x509_cert::der::Result<Vec<(ObjectIdentifier, &[u8])>> {
    let mut fields = fields(der)?;
    let mut found = Vec::new();
    while !fields.is_finished() {
        let field = AnyRef::decode(&mut fields)?;
        // [3], around the list.
        if u8::from(field.tag()) != 0xA3 {
            continue;
        }
        let mut list = SliceReader::new(sequence_value(field.value())?)?;
        while !list.is_finished() {
            let mut parts = SliceReader::new(sequence_value(list.tlv_bytes()?)?)?;
            let Ok(oid) = ObjectIdentifier::decode(&mut parts) else { continue };
            let mut value = AnyRef::decode(&mut parts)?;
            if value.tag() == Tag::Boolean {
                value = AnyRef::decode(&mut parts)?;
            }
            found.push((oid, value.value()));
        }
    }
    Ok(found)
}

/// The contents of a SEQUENCE that is all of `der`.
fn sequence_value(der: &[u8]) -> x509_cert::der::Result<&[u8]> {
    let any = AnyRef::from_der(der)?;
    any.tag().assert_eq(Tag::Sequence)?;
    Ok(any.value())
}

/// The contents of the SEQUENCE that `bytes` begin with.
fn sequence(bytes: &[u8]) -> x509_cert::der::Result<&[u8]> {
    let any = AnyRef::decode(&mut SliceReader::new(bytes)?)?;
    any.tag().assert_eq(Tag::Sequence)?;
    Ok(any.value())
}
