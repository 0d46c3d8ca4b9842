//! A certification authority of its own for one test card: its certificates and its CRL.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use emulated_card::keys::{Curve, KeyKind};
use openssl::asn1::{Asn1Integer, Asn1Object, Asn1Time};
use openssl::bn::{BigNum, BigNumRef, MsbOption};
use openssl::ec::{EcGroup, EcKey};
use openssl::error::ErrorStack;
use openssl::nid::Nid;
use openssl::pkey::{Id, PKey, Private};
use openssl::rsa::Rsa;
use openssl::x509::extension::{
    AuthorityKeyIdentifier, BasicConstraints, CrlNumber, ExtendedKeyUsage, KeyUsage, SubjectAlternativeName,
    SubjectKeyIdentifier,
};
use openssl::x509::{X509, X509Builder, X509Crl, X509CrlBuilder, X509Name, X509RevokedBuilder};

use super::Algorithm;

/// User principal name (Microsoft), an otherName in the subjectAltName.
const UPN: &str = "1.3.6.1.4.1.311.20.2.3";
/// Smart card logon (Microsoft).
const SMARTCARD_LOGON: &str = "1.3.6.1.4.1.311.20.2.2";
/// id-PIV-cardAuth (SP 800-73-4 Part 1 appendix B).
const PIV_CARD_AUTHENTICATION: &str = "2.16.840.1.101.3.6.8";

const HOUR: Duration = Duration::from_secs(60 * 60);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// The four certificates of a card, by what their keys are for (SP 800-73-4 Part 1 §3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    Authentication,
    Signature,
    Encryption,
    CardAuthentication,
}

impl Purpose {
    pub(super) const ALL: [Self; 4] =
        [Self::Authentication, Self::Signature, Self::Encryption, Self::CardAuthentication];

    /// Name of the certificate: of its files, or in the database.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Authentication => "authentication",
            Self::Signature => "signature",
            Self::Encryption => "encryption",
            Self::CardAuthentication => "card-authentication",
        }
    }
}

/// Who the certificates are about.
pub(super) struct Holder<'a> {
    pub(super) name: &'a str,
    pub(super) upn: Option<&'a str>,
    pub(super) email: Option<&'a str>,
    /// The card's GUID, which tells it from others without telling who holds it.
    pub(super) card: [u8; 16],
}

/// From when until when the card's certificates are valid.
#[derive(Clone, Copy)]
pub(super) struct Validity {
    now: SystemTime,
    from: SystemTime,
    until: SystemTime,
    /// The authority is valid even when the card has expired, as in life.
    authority_until: SystemTime,
}

impl Validity {
    /// From now on for `days` (up to 10 000), or as long and ended yesterday.
    pub(super) fn new(days: u32, expired: bool) -> Self {
        let (now, length) = (SystemTime::now(), DAY * days);
        // Clocks differ: a certificate made now may be looked at by a machine that is a little behind.
        let (from, until) =
            if expired { (now - DAY - length, now - DAY) } else { (now - HOUR, now + length) };
        Self { now: now - HOUR, from, until, authority_until: now + length + DAY }
    }
}

pub(super) struct Authority {
    pub(super) certificate: X509,
    pub(super) key: PKey<Private>,
    algorithm: Algorithm,
    validity: Validity,
}

impl Authority {
    /// Signs with RSA-2048 for RSA cards, else with a key on the cards' curve.
    pub(super) fn new(algorithm: Algorithm, validity: Validity) -> Result<Self, ErrorStack> {
        let algorithm = algorithm.of_authority();
        let key = generate(algorithm)?;
        let mut number = [0; 4];
        openssl::rand::rand_bytes(&mut number)?;
        // Two authorities of one name would be taken for one another.
        let name = format!("Test card CA {:08x}", u32::from_be_bytes(number));
        let name = subject(&[(Nid::COMMONNAME, &name)])?;
        let mut builder = builder(&name, &key, &*serial()?, validity.from, validity.authority_until)?;
        builder.set_issuer_name(&name)?;
        builder.append_extension(BasicConstraints::new().critical().ca().pathlen(0).build()?)?;
        builder.append_extension(KeyUsage::new().critical().key_cert_sign().crl_sign().build()?)?;
        let identifier = SubjectKeyIdentifier::new().build(&builder.x509v3_context(None, None))?;
        builder.append_extension(identifier)?;
        builder.sign(&key, algorithm.digest())?;
        Ok(Self { certificate: builder.build(), key, algorithm, validity })
    }

    pub(super) fn issue(
        &self,
        purpose: Purpose,
        key: &PKey<Private>,
        serial: &BigNumRef,
        holder: &Holder<'_>,
    ) -> Result<X509, ErrorStack> {
        let mut usage = KeyUsage::new();
        let mut extended = ExtendedKeyUsage::new();
        let mut names = SubjectAlternativeName::new();
        let mut has_names = true;
        // NSS gives certificates of one subject one nickname.
        let unit = (Nid::ORGANIZATIONALUNITNAME, purpose.name());
        let mut subject_name = subject(&[unit, (Nid::COMMONNAME, holder.name)])?;
        match (purpose, holder) {
            (Purpose::Authentication, Holder { upn, .. }) => {
                usage.digital_signature();
                extended.client_auth().other(SMARTCARD_LOGON);
                match upn {
                    Some(upn) => _ = names.other_name2(Asn1Object::from_str(UPN)?, &utf8_string(upn)),
                    None => has_names = false,
                }
            }
            (Purpose::Signature | Purpose::Encryption, Holder { email, .. }) => {
                match purpose {
                    Purpose::Signature => usage.digital_signature().non_repudiation(),
                    _ if key.id() == Id::RSA => usage.key_encipherment(),
                    _ => usage.key_agreement(),
                };
                extended.email_protection();
                match email {
                    Some(email) => _ = names.email(email),
                    None => has_names = false,
                }
            }
            // FIPS 201-2 §4.2.2.2: it is about the card, and does not tell who holds it.
            (Purpose::CardAuthentication, Holder { card, .. }) => {
                usage.digital_signature();
                extended.critical().other(PIV_CARD_AUTHENTICATION);
                let uuid = uuid(*card);
                subject_name = subject(&[(Nid::SERIALNUMBER, &uuid)])?;
                names.uri(&format!("urn:uuid:{uuid}"));
            }
        }
        let mut builder = builder(&subject_name, key, serial, self.validity.from, self.validity.until)?;
        builder.set_issuer_name(self.certificate.subject_name())?;
        builder.append_extension(BasicConstraints::new().critical().build()?)?;
        builder.append_extension(usage.critical().build()?)?;
        builder.append_extension(extended.build()?)?;
        let context = builder.x509v3_context(Some(&self.certificate), None);
        let mut extensions = vec![
            SubjectKeyIdentifier::new().build(&context)?,
            AuthorityKeyIdentifier::new().keyid(true).build(&context)?,
        ];
        if has_names {
            extensions.push(names.build(&context)?);
        }
        for extension in extensions {
            builder.append_extension(extension)?;
        }
        builder.sign(&self.key, self.algorithm.digest())?;
        Ok(builder.build())
    }

    /// A CRL with these certificates.
    pub(super) fn revoke(&self, certificates: &[X509]) -> Result<X509Crl, ErrorStack> {
        let now = time(self.validity.now)?;
        let mut builder = X509CrlBuilder::new()?;
        builder.set_issuer_name(self.certificate.subject_name())?;
        builder.set_last_update(&now)?;
        builder.set_next_update(&*time(self.validity.authority_until)?)?;
        // The identifier wants a certificate's context, and none is made here.
        let other = X509Builder::new()?;
        let context = other.x509v3_context(Some(&self.certificate), None);
        builder.append_extension(AuthorityKeyIdentifier::new().keyid(true).build(&context)?)?;
        builder.append_extension(CrlNumber::new(BigNum::from_u32(1)?)?.build()?)?;
        for certificate in certificates {
            let mut revoked = X509RevokedBuilder::new()?;
            revoked.set_serial_number(certificate.serial_number())?;
            revoked.set_revocation_date(&now)?;
            builder.add_revoked(revoked.build())?;
        }
        builder.sort()?;
        builder.sign(&self.key, self.algorithm.digest())?;
        builder.build()
    }
}

pub(super) fn generate(algorithm: Algorithm) -> Result<PKey<Private>, ErrorStack> {
    let curve = match algorithm.kind() {
        KeyKind::Rsa { bits } => return PKey::from_rsa(Rsa::generate(bits as u32)?),
        KeyKind::Ec(Curve::P256) => Nid::X9_62_PRIME256V1,
        KeyKind::Ec(Curve::P384) => Nid::SECP384R1,
    };
    let group = EcGroup::from_curve_name(curve)?;
    PKey::from_ec_key(EcKey::generate(&group)?)
}

/// A random serial number.
pub(super) fn serial() -> Result<BigNum, ErrorStack> {
    let mut serial = BigNum::new()?;
    // RFC 5280 §4.1.2.2: positive, at most 20 bytes.
    serial.rand(127, MsbOption::ONE, false)?;
    Ok(serial)
}

fn builder(
    subject: &X509Name,
    key: &PKey<Private>,
    serial: &BigNumRef,
    from: SystemTime,
    until: SystemTime,
) -> Result<X509Builder, ErrorStack> {
    let mut builder = X509Builder::new()?;
    builder.set_version(2)?;
    builder.set_serial_number(&*Asn1Integer::from_bn(serial)?)?;
    builder.set_subject_name(subject)?;
    builder.set_pubkey(key)?;
    builder.set_not_before(&*time(from)?)?;
    builder.set_not_after(&*time(until)?)?;
    Ok(builder)
}

fn subject(fields: &[(Nid, &str)]) -> Result<X509Name, ErrorStack> {
    let mut builder = X509Name::builder()?;
    for (field, text) in fields {
        builder.append_entry_by_nid(*field, text)?;
    }
    Ok(builder.build())
}

fn time(at: SystemTime) -> Result<Asn1Time, ErrorStack> {
    let seconds = at.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    Asn1Time::from_unix(seconds.try_into().unwrap_or(i64::MAX))
}

/// In DER; at most 127 bytes.
fn utf8_string(text: &str) -> Vec<u8> {
    [&[0x0C, text.len() as u8], text.as_bytes()].concat()
}

/// As RFC 9562 §4 writes it.
fn uuid(bytes: [u8; 16]) -> String {
    let hex = format!("{:032x}", u128::from_be_bytes(bytes));
    [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
}
