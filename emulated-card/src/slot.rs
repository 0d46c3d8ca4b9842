//! The places a PIV card has for keys, and which certificate goes where.

mod usage;

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

use crate::keys::Certificate;
pub(crate) use usage::common_name;
use usage::{Purpose, has_key_usage, purpose};

/// A key reference of SP 800-73-4 Part 1 table 4b that a certificate belongs to, ordered as hosts list them: 9A, 9C, 9D,
/// 9E, then the retired ones 82 to 95.
///
/// ```
/// use emulated_card::slot::PivSlot;
/// let slot: PivSlot = "9c".parse()?;
/// assert_eq!((slot, slot.to_string()), (PivSlot::SIGNATURE, "9c".to_owned()));
/// # Ok::<(), emulated_card::slot::SlotError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PivSlot(u8);

/// How many retired keys a card can have.
const RETIRED: u8 = 20;

impl PivSlot {
    /// 9A, PIV authentication: the PIN once.
    pub const AUTHENTICATION: Self = Self(0);
    /// 9C, digital signature: the PIN before each use.
    pub const SIGNATURE: Self = Self(1);
    /// 9D, key management: the PIN once.
    pub const KEY_MANAGEMENT: Self = Self(2);
    /// 9E, card authentication: no PIN.
    pub const CARD_AUTHENTICATION: Self = Self(3);

    /// All there are, in order.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        (0..4 + RETIRED).map(Self)
    }

    /// The slot with that key reference.
    pub(crate) fn of_reference(reference: u8) -> Option<Self> {
        Self::all().find(|slot| slot.reference() == reference)
    }

    /// The key reference.
    pub(crate) fn reference(self) -> u8 {
        match self.0 {
            0 => 0x9A,
            position @ 1..=3 => 0x9B + position,
            position => 0x82 + (position - 4),
        }
    }

    /// Which retired key it is, counted from 1; `None` for the others.
    pub(crate) fn retired(self) -> Option<u8> {
        self.0.checked_sub(3).filter(|number| *number > 0)
    }
}

impl fmt::Display for PivSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}", self.reference())
    }
}

impl FromStr for PivSlot {
    type Err = SlotError;

    fn from_str(text: &str) -> Result<Self, SlotError> {
        // Not from_str_radix alone, which takes a sign, too.
        let hexadecimal = text.len() == 2 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let reference = u8::from_str_radix(text, 16).ok().filter(|_| hexadecimal);
        reference
            .and_then(Self::of_reference)
            .ok_or_else(|| SlotError::NoSuchSlot(text.chars().take(20).collect()))
    }
}

/// Why certificates do not go into slots.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum SlotError {
    /// Not the name of a slot.
    #[error("{0:?} is no PIV slot: 9a, 9c, 9d, 9e, or 82 to 95")]
    NoSuchSlot(String),
    /// A slot was asked for by two.
    #[error("two certificates are to go into slot {0}")]
    Taken(PivSlot),
    /// No certificate has the name.
    #[error("there is no certificate {name:?} to go into slot {slot}")]
    NoSuchCertificate {
        /// The slot it was named for.
        slot: PivSlot,
        /// The name.
        name: String,
    },
    /// More certificates than slots.
    #[error("{0} certificates are too many for the slots of a PIV card")]
    Full(usize),
}

/// Gives each certificate a slot. The result is in the slots' order, with indices into `certificates`.
///
/// Those in `explicit` go where it says; a name that several certificates have means the first that has no slot yet,
/// and one that none has any more means a certificate once again, in another slot.
/// Of the others, those whose key usage and extended key usage name one purpose go first: card authentication and
/// nothing else to 9E, client authentication to 9A, non-repudiation or e-mail protection to 9C, encryption alone to 9D.
/// Then come, in the order given, those that only sign (9A or 9C), those for anything, or that do not say (9A, 9C, 9D),
/// and those with a key on a curve for both signatures and key agreement, which are not for authentication alone: 9D,
/// the one of these where ECDH works, then 9A and 9C. Whoever finds no place becomes a retired key, 82 and up.
///
/// # Errors
/// [`SlotError`].
pub fn assign(
    certificates: &[Certificate],
    explicit: &[(PivSlot, String)],
) -> Result<Vec<(PivSlot, usize)>, SlotError> {
    let mut slots: Vec<(PivSlot, usize)> = Vec::new();
    for (slot, name) in explicit {
        if slots.iter().any(|(taken, _)| taken == slot) {
            return Err(SlotError::Taken(*slot));
        }
        let named = |index: &usize| certificates[*index].name == *name;
        let unplaced = |index: &usize| slots.iter().all(|(_, placed)| placed != index);
        let index = (0..certificates.len())
            .find(|index| named(index) && unplaced(index))
            .or_else(|| (0..certificates.len()).find(named))
            .ok_or_else(|| SlotError::NoSuchCertificate { slot: *slot, name: name.clone() })?;
        slots.push((*slot, index));
    }
    let mut rest: Vec<_> = (0..certificates.len())
        .filter(|index| slots.iter().all(|(_, placed)| placed != index))
        .map(|index| (index, purpose(&certificates[index].der, certificates[index].kind)))
        .collect();
    // Stable, so that the order given decides among equals.
    rest.sort_by_key(|(_, purpose)| matches!(purpose, Purpose::Sign | Purpose::SignAndAgree | Purpose::Any));
    for (index, purpose) in rest {
        let wanted: &[PivSlot] = match purpose {
            Purpose::CardAuthentication => &[PivSlot::CARD_AUTHENTICATION],
            Purpose::Authenticate => &[PivSlot::AUTHENTICATION],
            Purpose::Commit => &[PivSlot::SIGNATURE],
            Purpose::Encrypt => &[PivSlot::KEY_MANAGEMENT],
            Purpose::Sign => &[PivSlot::AUTHENTICATION, PivSlot::SIGNATURE],
            Purpose::SignAndAgree => &[PivSlot::KEY_MANAGEMENT, PivSlot::AUTHENTICATION, PivSlot::SIGNATURE],
            Purpose::Any => &[PivSlot::AUTHENTICATION, PivSlot::SIGNATURE, PivSlot::KEY_MANAGEMENT],
        };
        let slot = wanted
            .iter()
            .copied()
            .chain(PivSlot::all().filter(|slot| slot.retired().is_some()))
            .find(|slot| slots.iter().all(|(taken, _)| taken != slot))
            .ok_or(SlotError::Full(certificates.len()))?;
        slots.push((slot, index));
    }
    slots.sort_unstable();
    Ok(slots)
}

/// The certificates without a key usage extension that are in slots for key management (9D, retired keys). Hosts then go
/// by the slot (SP 800-73-4 Part 1 table 4b): OpenSC lets such a key sign nothing.
pub fn without_key_usage<'a>(
    certificates: &'a [Certificate],
    slots: &[(PivSlot, usize)],
) -> impl Iterator<Item = (PivSlot, &'a Certificate)> {
    let management = |slot: &PivSlot| *slot == PivSlot::KEY_MANAGEMENT || slot.retired().is_some();
    let placed = slots.iter().filter(move |(slot, _)| management(slot));
    placed
        .filter_map(|(slot, index)| Some((*slot, certificates.get(*index)?)))
        .filter(|(_, certificate)| !has_key_usage(&certificate.der))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::{Curve, KeyKind};
    use crate::tlv::ber;

    #[test]
    fn names_of_slots() {
        let names: Vec<_> = PivSlot::all().map(|slot| slot.to_string()).collect();
        assert_eq!(names[..6], ["9a", "9c", "9d", "9e", "82", "83"]);
        assert_eq!((names.len(), names[23].as_str()), (24, "95"));
        for slot in PivSlot::all() {
            assert_eq!(slot.to_string().parse(), Ok(slot));
            assert_eq!(slot.to_string().to_uppercase().parse(), Ok(slot));
            assert_eq!(PivSlot::of_reference(slot.reference()), Some(slot));
        }
        for bad in ["", "9", "9b", "81", "96", "+9", "9a ", "09a", "0x9a", "ä"] {
            assert_eq!(bad.parse::<PivSlot>(), Err(SlotError::NoSuchSlot(bad.into())));
        }
        assert_eq!(PivSlot::CARD_AUTHENTICATION.retired(), None);
        assert_eq!("82".parse::<PivSlot>().map(PivSlot::retired), Ok(Some(1)));
        assert_eq!("95".parse::<PivSlot>().map(PivSlot::retired), Ok(Some(20)));
    }

    /// A certificate without a signature, with these extensions: identifier (the contents), critical or not, value.
    fn certificate(extensions: &[(&[u8], bool, Vec<u8>)]) -> Certificate {
        let extensions: Vec<u8> = extensions
            .iter()
            .flat_map(|(oid, critical, value)| {
                let critical = if *critical { ber(&[0x01], &[0xFF]) } else { Vec::new() };
                ber(&[0x30], &[ber(&[0x06], oid), critical, ber(&[0x04], value)].concat())
            })
            .collect();
        let name = ber(
            &[0x30],
            &ber(&[0x31], &ber(&[0x30], &[ber(&[0x06], &[0x55, 4, 3]), ber(&[0x0C], b"Jane")].concat())),
        );
        let fields = [
            ber(&[0xA0], &ber(&[0x02], &[2])),
            ber(&[0x02], &[1]),
            ber(&[0x30], &[]),
            ber(&[0x30], &[]),
            ber(&[0x30], &[]),
            name,
            ber(&[0x30], &[]),
            ber(&[0xA3], &ber(&[0x30], &extensions)),
        ];
        let der = ber(&[0x30], &[ber(&[0x30], &fields.concat()), ber(&[0x30], &[]), vec![3, 1, 0]].concat());
        Certificate { name: "c".into(), der, public_key: Vec::new(), kind: RSA }
    }

    const RSA: KeyKind = KeyKind::Rsa { bits: 2048 };
    const EC: KeyKind = KeyKind::Ec(Curve::P256);

    fn unreadable() -> (&'static [u8], bool, Vec<u8>) {
        (&[0x55, 0x1D, 0x0F], true, vec![0xFF; 3])
    }

    fn key_usage(bits: u8) -> (&'static [u8], bool, Vec<u8>) {
        (&[0x55, 0x1D, 0x0F], true, vec![0x03, 2, 0, bits])
    }

    fn extended(oids: &[&[u8]]) -> (&'static [u8], bool, Vec<u8>) {
        let oids: Vec<u8> = oids.iter().flat_map(|oid| ber(&[0x06], oid)).collect();
        (&[0x55, 0x1D, 0x25], false, ber(&[0x30], &oids))
    }

    const SIGN: u8 = 0x80;
    const COMMIT: u8 = 0x40;
    const ENCIPHER: u8 = 0x20;
    const AGREE: u8 = 0x08;
    const EMAIL: &[u8] = &[0x2B, 6, 1, 5, 5, 7, 3, 4];
    const CLIENT: &[u8] = &[0x2B, 6, 1, 5, 5, 7, 3, 2];
    const SMARTCARD_LOGON: &[u8] = &[0x2B, 6, 1, 4, 1, 0x82, 0x37, 20, 2, 2];
    const CARD: &[u8] = &[0x60, 0x86, 0x48, 1, 0x65, 3, 6, 8];

    #[test]
    fn purposes() {
        for (usage, extensions, expected) in [
            (SIGN, &[CLIENT][..], Purpose::Authenticate),
            (SIGN, &[SMARTCARD_LOGON], Purpose::Authenticate),
            (SIGN | ENCIPHER, &[CLIENT], Purpose::Authenticate),
            (SIGN | COMMIT, &[], Purpose::Commit),
            (COMMIT, &[], Purpose::Commit),
            (SIGN, &[EMAIL], Purpose::Commit),
            (ENCIPHER, &[], Purpose::Encrypt),
            (AGREE, &[EMAIL], Purpose::Encrypt),
            (SIGN, &[CARD], Purpose::CardAuthentication),
            // What works without the PIN is for nothing else.
            (SIGN, &[CARD, CLIENT], Purpose::Authenticate),
            (SIGN, &[SMARTCARD_LOGON, CARD], Purpose::Authenticate),
            (SIGN | COMMIT, &[CARD], Purpose::Commit),
            (SIGN, &[CARD, EMAIL], Purpose::Commit),
            (ENCIPHER, &[CARD], Purpose::Encrypt),
            (AGREE, &[CARD], Purpose::Encrypt),
            (SIGN | ENCIPHER, &[CARD], Purpose::Any),
            (SIGN | AGREE, &[CARD], Purpose::Any),
            (SIGN, &[], Purpose::Sign),
            (SIGN, &[CLIENT, EMAIL], Purpose::Sign),
            (SIGN | ENCIPHER, &[], Purpose::Any),
            (SIGN | COMMIT | ENCIPHER, &[CLIENT, EMAIL], Purpose::Any),
        ] {
            let certificate = certificate(&[key_usage(usage), extended(extensions)]);
            assert_eq!(purpose(&certificate.der, RSA), expected, "{usage:02X} {extensions:02X?}");
        }
        assert_eq!(purpose(&certificate(&[extended(&[CLIENT])]).der, RSA), Purpose::Any);
        assert_eq!(purpose(&certificate(&[extended(&[CARD])]).der, RSA), Purpose::CardAuthentication);
        assert_eq!(purpose(&certificate(&[extended(&[CARD, CLIENT])]).der, RSA), Purpose::Any);
        assert_eq!(purpose(&certificate(&[unreadable(), extended(&[CARD])]).der, RSA), Purpose::Any);
        assert_eq!(purpose(&certificate(&[]).der, RSA), Purpose::Any);
        assert_eq!(purpose(b"rubbish", RSA), Purpose::Any);
    }

    #[test]
    fn purposes_of_keys_on_a_curve() {
        for (usage, extensions, expected) in [
            (SIGN | AGREE, &[][..], Purpose::SignAndAgree),
            (SIGN | AGREE, &[EMAIL], Purpose::SignAndAgree),
            (SIGN | AGREE, &[CLIENT, EMAIL], Purpose::SignAndAgree),
            (SIGN | AGREE, &[CARD], Purpose::SignAndAgree),
            (SIGN | AGREE, &[CLIENT], Purpose::Authenticate),
            (SIGN | COMMIT | AGREE, &[], Purpose::Commit),
            (SIGN | COMMIT | AGREE, &[CLIENT], Purpose::Any),
            (SIGN | ENCIPHER, &[], Purpose::Any),
            (SIGN, &[], Purpose::Sign),
            (SIGN, &[EMAIL], Purpose::Commit),
            (AGREE, &[EMAIL], Purpose::Encrypt),
        ] {
            let certificate = certificate(&[key_usage(usage), extended(extensions)]);
            assert_eq!(purpose(&certificate.der, EC), expected, "{usage:02X} {extensions:02X?}");
        }
        assert_eq!(purpose(&certificate(&[]).der, EC), Purpose::Any);
    }

    #[test]
    fn ecdh_works_where_the_certificate_is() {
        let place = |wanted: &[(u8, KeyKind)], explicit: &[(&str, &str)]| {
            let certificates: Vec<_> = (0..)
                .zip(wanted)
                .map(|(index, (usage, kind)): (usize, _)| {
                    let one = certificate(&[key_usage(*usage)]);
                    Certificate { name: index.to_string(), kind: *kind, ..one }
                })
                .collect();
            let explicit: Vec<_> =
                explicit.iter().map(|(slot, name)| (slot.parse().unwrap(), (*name).to_owned())).collect();
            let slots = assign(&certificates, &explicit).unwrap();
            slots.into_iter().map(|(slot, index)| format!("{slot}={index}")).collect::<Vec<_>>().join(" ")
        };
        let both = (SIGN | AGREE, EC);
        assert_eq!(place(&[both], &[]), "9d=0");
        assert_eq!(place(&[both, both, both, both], &[]), "9a=1 9c=2 9d=0 82=3");
        assert_eq!(place(&[both, (SIGN, EC)], &[]), "9a=1 9d=0");
        // One that only agrees comes first; then it is for signing.
        assert_eq!(place(&[both, (AGREE, EC)], &[]), "9a=0 9d=1");
        // RSA decrypts everywhere.
        assert_eq!(place(&[(SIGN | ENCIPHER, RSA), both], &[]), "9a=0 9d=1");
        assert_eq!(place(&[(SIGN | AGREE, RSA)], &[]), "9a=0");
        // The user knows better.
        assert_eq!(place(&[both], &[("9a", "0")]), "9a=0");
        assert_eq!(place(&[both, both], &[("9d", "1")]), "9a=0 9d=1");
    }

    #[test]
    fn certificates_that_do_not_say_sign_in_two_slots() {
        let silent = || certificate(&[extended(&[EMAIL])]);
        let certificates =
            [silent(), silent(), certificate(&[unreadable()]), certificate(&[key_usage(SIGN)]), silent()];
        let slots = assign(&certificates, &[]).unwrap();
        let found: Vec<_> =
            without_key_usage(&certificates, &slots).map(|(slot, _)| slot.to_string()).collect();
        assert_eq!(found, ["9d", "83"]);
    }

    #[test]
    fn odd_extensions_are_no_harm() {
        let odd: (&[u8], bool, Vec<u8>) = (&[0x55, 0x1D, 0x25], true, vec![0xFF; 3]);
        let odd_certificate = certificate(&[odd, key_usage(ENCIPHER)]);
        assert_eq!(purpose(&odd_certificate.der, RSA), Purpose::Encrypt);
        assert_eq!(common_name(&odd_certificate.der).as_deref(), Some("Jane"));
        assert_eq!(common_name(b"rubbish"), None);
    }

    #[test]
    fn certificates_go_where_their_usage_says_whatever_the_order() {
        let certificates = [
            certificate(&[]),
            certificate(&[key_usage(ENCIPHER)]),
            certificate(&[key_usage(SIGN), extended(&[CARD])]),
            certificate(&[key_usage(ENCIPHER)]),
            certificate(&[key_usage(SIGN)]),
            certificate(&[key_usage(SIGN), extended(&[SMARTCARD_LOGON, CLIENT])]),
        ];
        let slots = assign(&certificates, &[]).unwrap();
        let text: Vec<_> = slots.into_iter().map(|(slot, index)| format!("{slot}={index}")).collect();
        assert_eq!(text, ["9a=5", "9c=0", "9d=1", "9e=2", "82=3", "83=4"]);
    }

    proptest::proptest! {
        #[test]
        fn no_certificate_is_too_odd(at in 0_usize..200, byte in proptest::num::u8::ANY, cut in 0_usize..200) {
            let mut der = certificate(&[key_usage(SIGN), extended(&[CLIENT, EMAIL, CARD])]).der;
            let at = at % der.len();
            der[at] = byte;
            der.truncate(der.len() - cut % der.len());
            let _ = (purpose(&der, EC), has_key_usage(&der), common_name(&der));
        }
    }
}
