//! GENERAL AUTHENTICATE (SP 800-73-4 Part 2 §3.2.4): what private keys do, and random numbers.

use vscard_protocol::{Command, Secret, StatusWord};

use super::admin;
use super::{Key, Piv};
use crate::applet::{Outcome, Session};
use crate::card::{KeyOperation, KeyWork};
use crate::keys::KeyKind;
use crate::keys::writable::ManagementAlgorithm;
use crate::slot::PivSlot;
use crate::tlv::{ber, put_ber_header, read_ber};

/// Key reference of the card management key.
pub(super) const CARD_MANAGEMENT: u8 = 0x9B;

/// All algorithm identifiers there are, whether or not the card has such a key: SP 800-78-5 table 9 and 3072, 4096 bits.
const ALGORITHMS: [u8; 11] = [0x00, 0x03, 0x05, 0x06, 0x07, 0x08, 0x0A, 0x0C, 0x11, 0x14, 0x16];

/// The objects of a dynamic authentication template (7C; SP 800-73-4 Part 2 table 7), which come in any order, each at
/// most once.
#[derive(Default)]
pub(super) struct Template<'a> {
    pub(super) witness: Option<&'a [u8]>,
    pub(super) challenge: Option<&'a [u8]>,
    pub(super) response: Option<&'a [u8]>,
    pub(super) exponentiation: Option<&'a [u8]>,
}

impl<'a> Template<'a> {
    /// `None` for bytes that are none, or one with other objects.
    fn parse(bytes: &'a [u8]) -> Option<Self> {
        let Some(([0x7C], mut objects, [])) = read_ber(bytes) else { return None };
        let mut template = Self::default();
        while !objects.is_empty() {
            let (tag, value, rest) = read_ber(objects)?;
            let place = match tag {
                [0x80] => &mut template.witness,
                [0x81] => &mut template.challenge,
                [0x82] => &mut template.response,
                [0x85] => &mut template.exponentiation,
                _ => return None,
            };
            if place.replace(value).is_some() {
                return None;
            }
            objects = rest;
        }
        Some(template)
    }
}

impl Piv {
    /// P1 is the algorithm, P2 the key.
    pub(super) fn general_authenticate(&self, command: &Command, session: Session<'_>) -> Outcome {
        let (algorithm, reference) = (command.p1(), command.p2());
        if !ALGORITHMS.contains(&algorithm) {
            return StatusWord::INCORRECT_P1P2.into();
        }
        if reference == CARD_MANAGEMENT {
            return card_management(command, session);
        }
        let Some(key) = PivSlot::of_reference(reference).and_then(|slot| self.key(slot, session.memory))
        else {
            return StatusWord::REFERENCE_NOT_FOUND.into();
        };
        let permitted = match key.slot {
            PivSlot::CARD_AUTHENTICATION => true,
            PivSlot::SIGNATURE => session.verified && session.fresh,
            _ => session.verified,
        };
        if !permitted {
            return StatusWord::SECURITY_STATUS_NOT_SATISFIED.into();
        }
        let work = Template::parse(command.data())
            .filter(|_| algorithm == key.algorithm)
            .and_then(|template| key.work(&template));
        match work {
            Some(work) => work.into(),
            None => StatusWord::INCORRECT_DATA.into(),
        }
    }
}

/// What concerns the card management key. On a card that has none, or one of another algorithm, nothing can come of
/// it, but OpenSC takes the challenges that are for Triple DES as random numbers.
fn card_management(command: &Command, session: Session<'_>) -> Outcome {
    let Session { memory, administrator, attempt, random, complaints, .. } = session;
    let Some(algorithm) = ManagementAlgorithm::of_identifier(command.p1()) else {
        return StatusWord::REFERENCE_NOT_FOUND.into();
    };
    let template = Template::parse(command.data());
    let memory = memory.filter(|memory| memory.management() == Some(algorithm));
    match (memory, template) {
        (Some(memory), Some(template)) => {
            let encrypt = |block: &[u8]| {
                memory.encrypt(block).map_err(|error| {
                    complaints.warn("card management key", error);
                    StatusWord::NO_DIAGNOSIS
                })
            };
            admin::authenticate(algorithm, &template, attempt, encrypt, administrator, random)
        }
        (None, _) if algorithm != ManagementAlgorithm::TripleDes => StatusWord::REFERENCE_NOT_FOUND.into(),
        (
            None,
            Some(Template { witness: None, challenge: Some([]), response: None, exponentiation: None }),
        ) => {
            let mut challenge = vec![0; algorithm.block_len()];
            random(&mut challenge);
            ber(&[0x7C], &ber(&[0x81], &challenge)).into()
        }
        (None, Some(Template { witness: Some(_), .. } | Template { response: Some(_), .. })) => {
            StatusWord::REFERENCE_NOT_FOUND.into()
        }
        _ => StatusWord::INCORRECT_DATA.into(),
    }
}

impl Key {
    /// What a request asks of the key: an empty response (82), and either a challenge (81: block or digest) or a point
    /// (85). `None` for what does not fit the key.
    fn work(&self, template: &Template<'_>) -> Option<KeyWork> {
        let length = self.kind.block_len();
        let &Template { witness: None, challenge, response: Some([]), exponentiation } = template else {
            return None;
        };
        let (operation, input, reply): (_, _, fn(Secret) -> Secret) =
            match (self.kind, challenge, exponentiation) {
                (KeyKind::Rsa { .. }, Some(block), None) if block.len() == length => {
                    (KeyOperation::RsaRaw, block, response)
                }
                (KeyKind::Ec(_), Some(digest), None) if (1..=length).contains(&digest.len()) => {
                    (KeyOperation::Ecdsa, digest, signature)
                }
                // 9E would agree on a secret with whoever asks.
                (KeyKind::Ec(_), None, Some(point @ [0x04, coordinates @ ..]))
                    if coordinates.len() == 2 * length && self.manages_keys() =>
                {
                    (KeyOperation::Ecdh, point, response)
                }
                _ => return None,
            };
        let needs_pin = self.slot != PivSlot::CARD_AUTHENTICATION;
        Some(KeyWork { key: self.index, operation, input: Secret::from(input), needs_pin, reply })
    }

    /// Whether it is one of the keys that ECDH is for (SP 800-73-4 Part 2 §3.2.4).
    fn manages_keys(&self) -> bool {
        self.slot == PivSlot::KEY_MANAGEMENT || self.slot.retired().is_some()
    }
}

/// A template with the result of an operation.
pub(super) fn response(result: Secret) -> Secret {
    let mut header = Vec::new();
    put_ber_header(&mut header, &[0x82], result.len());
    // Whatever was decrypted is never in memory that is not wiped.
    let mut template = Vec::with_capacity(header.len() + result.len() + 10);
    put_ber_header(&mut template, &[0x7C], header.len() + result.len());
    template.extend_from_slice(&header);
    template.extend_from_slice(result.expose());
    Secret::new(template)
}

/// A template with an ECDSA signature, made of r and s: SEQUENCE of two INTEGERs (RFC 3279 §2.2.3).
fn signature(numbers: Secret) -> Secret {
    let (r, s) = numbers.expose().split_at(numbers.len() / 2);
    response(Secret::new(ber(&[0x30], &[integer(r), integer(s)].concat())))
}

/// An INTEGER that is not negative, without needless leading zeros.
fn integer(number: &[u8]) -> Vec<u8> {
    let zeros = number.iter().take_while(|byte| **byte == 0).count();
    match &number[zeros..] {
        significant @ [0x01..=0x7F, ..] => ber(&[0x02], significant),
        significant => ber(&[0x02], &[&[0x00], significant].concat()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signatures_are_der() {
        assert_eq!(integer(&[0, 0]), [0x02, 1, 0]);
        assert_eq!(integer(&[0, 0x7F, 1]), [0x02, 2, 0x7F, 1]);
        assert_eq!(integer(&[0, 0x80]), [0x02, 2, 0, 0x80]);
        let numbers = [[0xFF; 48], [0x01; 48]].concat();
        let template = signature(Secret::new(numbers));
        let start = [0x7C, 0x69, 0x82, 0x67, 0x30, 0x65, 0x02, 0x31, 0x00, 0xFF];
        assert_eq!(template.expose()[..10], start);
        assert_eq!(template.len(), 2 + 0x69);
    }

    #[test]
    fn templates_are_sets() {
        let both = [&[0x7C, 7, 0x81, 3, 1, 2, 3, 0x82, 0][..], &[0x7C, 7, 0x82, 0, 0x81, 3, 1, 2, 3]];
        for bytes in both {
            let template = Template::parse(bytes).unwrap();
            assert_eq!((template.challenge, template.response), (Some(&[1, 2, 3][..]), Some(&[][..])));
            assert_eq!(template.exponentiation, None);
        }
        for bytes in [
            &[][..],
            &[0x7C],
            &[0x7D, 0],
            &[0x7C, 0, 0],
            &[0x7C, 2, 0x83, 0],
            &[0x7C, 3, 0x5F, 0x01, 0],
            &[0x7C, 4, 0x82, 0, 0x82, 0],
            &[0x7C, 2, 0x81, 1],
        ] {
            assert!(Template::parse(bytes).is_none(), "{bytes:02X?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_a_template_or_not(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
            let _ = Template::parse(&bytes);
            let _ = Template::parse(&ber(&[0x7C], &bytes));
        }
    }
}
