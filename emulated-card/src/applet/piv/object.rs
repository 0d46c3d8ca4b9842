//! The data objects (SP 800-73-4 Part 1 §3 and appendix A), made when the card is.

use super::AID;
use crate::card::CardBuildError;
use crate::keys::Certificate;
use crate::keys::writable::Writable;
use crate::slot::{PivSlot, common_name};
use crate::state::CardId;
use crate::tlv::ber;

/// What is in a data object.
pub(super) struct Object {
    /// As in GET DATA.
    pub(super) tag: Vec<u8>,
    /// The whole answer.
    pub(super) content: Vec<u8>,
}

/// An object's tag: 5FC1 and this byte.
const CARD_AUTHENTICATION: u8 = 0x01;
const CHUID: u8 = 0x02;
const FINGERPRINTS: u8 = 0x03;
const AUTHENTICATION: u8 = 0x05;
const SECURITY: u8 = 0x06;
const CAPABILITIES: u8 = 0x07;
const FACIAL_IMAGE: u8 = 0x08;
const PRINTED_INFORMATION: u8 = 0x09;
const SIGNATURE: u8 = 0x0A;
const KEY_MANAGEMENT: u8 = 0x0B;
const KEY_HISTORY: u8 = 0x0C;
const IRIS: u8 = 0x21;
const PAIRING_CODE: u8 = 0x23;

const DISCOVERY: [u8; 1] = [0x7E];

/// Longest answer: all of it fits one extended response.
const MAX_CONTENT: usize = 65_536;

/// FASC-N of a card that is no agency's: agency 9999, system 9999, credential 999999 (SP 800-73-4 Part 1 §3.1.2). With
/// this agency, hosts take the GUID as serial number.
const FASC_N: [u8; 25] = [
    0xD4, 0xE7, 0x39, 0xDA, 0x73, 0x9C, 0xED, 0x39, 0xCE, 0x73, 0x9D, 0x83, 0x68, 0x58, 0x21, 0x08, 0x42,
    0x10, 0x84, 0x21, 0xC8, 0x42, 0x10, 0xC3, 0xEB,
];

/// Error detection code, at the end of most objects, always empty.
const END: [u8; 2] = [0xFE, 0x00];

/// Whether an object is read after VERIFY only (SP 800-73-4 Part 1 table 2), be it there or not.
pub(super) fn needs_pin(tag: &[u8]) -> bool {
    let protected = [FINGERPRINTS, FACIAL_IMAGE, PRINTED_INFORMATION, IRIS, PAIRING_CODE];
    matches!(tag, [0x5F, 0xC1, last] if protected.contains(last))
}

/// The last byte of an object's tag, if the object is one that can be written (SP 800-73-4 Part 1 table 3): the discovery
/// object and the biometric group say what the card can do.
pub(super) fn writable(tag: &[u8]) -> Option<u8> {
    match *tag {
        [0x5F, 0xC1, last @ (CARD_AUTHENTICATION..=FINGERPRINTS | AUTHENTICATION..=PAIRING_CODE)] => {
            Some(last)
        }
        _ => None,
    }
}

/// All objects of a card with these certificates.
pub(super) fn objects(
    certificates: &[(PivSlot, &Certificate)],
    id: &CardId,
) -> Result<Vec<Object>, CardBuildError> {
    let holder = certificates
        .iter()
        .min_by_key(|(slot, _)| *slot)
        .and_then(|(_, certificate)| common_name(&certificate.der))
        .unwrap_or_default();
    // Object identifiers of retired keys follow one another, so a host looks at as many as this says.
    let retired = certificates.iter().filter_map(|(slot, _)| slot.retired()).max().unwrap_or(0);
    let discovery = [ber(&[0x4F], &AID), ber(&[0x5F, 0x2F], &[0x40, 0x00])].concat();
    let mut objects = vec![
        Object { tag: DISCOVERY.to_vec(), content: ber(&DISCOVERY, &discovery) },
        object(CHUID, &chuid(id)),
        object(CAPABILITIES, &capabilities(id)),
        // Mandatory, so OpenSC's tools want one; as nobody signed the objects, it speaks of none.
        object(SECURITY, &[&[0xBA, 0, 0xBB, 0][..], &END].concat()),
        object(PRINTED_INFORMATION, &printed_information(&holder, id)),
        key_history(retired),
    ];
    for (slot, certificate) in certificates {
        // CertInfo 00: not compressed.
        let content = [ber(&[0x70], &certificate.der), vec![0x71, 1, 0], END.to_vec()].concat();
        let object = object(certificate_object(*slot), &content);
        if object.content.len() > MAX_CONTENT {
            return Err(CardBuildError::Certificate { name: certificate.name.clone() });
        }
        objects.push(object);
    }
    Ok(objects)
}

fn key_history(retired: u8) -> Object {
    // On this card, elsewhere, where elsewhere.
    object(KEY_HISTORY, &[&[0xC1, 1, retired, 0xC2, 1, 0, 0xF3, 0][..], &END].concat())
}

/// The key history of a card that was written to, if that is what `tag` means.
pub(super) fn written_key_history(tag: &[u8], objects: &[Object], memory: &dyn Writable) -> Option<Object> {
    let is_there = |number: &u8| {
        let last = KEY_HISTORY + number;
        let made = || objects.iter().any(|object| object.tag == [0x5F, 0xC1, last]);
        memory.object(last).map_or_else(made, |written| !written.is_empty())
    };
    let retired = || PivSlot::all().filter_map(PivSlot::retired).filter(is_there).max().unwrap_or(0);
    (tag == [0x5F, 0xC1, KEY_HISTORY]).then(|| key_history(retired()))
}

/// What tells hosts that a card on which certificates were put is not as it was, if that is what `tag` means.
pub(super) fn written_identity(tag: &[u8], id: &CardId, memory: &dyn Writable) -> Option<Object> {
    let make = match tag {
        [0x5F, 0xC1, CHUID] => chuid,
        [0x5F, 0xC1, CAPABILITIES] => capabilities,
        _ => return None,
    };
    let written: Vec<_> = PivSlot::all()
        .filter_map(|slot| Some((slot.reference(), memory.object(certificate_object(slot))?)))
        .map(|(reference, content)| [&[reference], &content[..]].concat())
        .collect();
    let written: Vec<&[u8]> = written.iter().map(Vec::as_slice).collect();
    let [.., last] = tag else { return None };
    (!written.is_empty()).then(|| object(*last, &make(&id.reissued(&written))))
}

fn object(last: u8, content: &[u8]) -> Object {
    Object { tag: vec![0x5F, 0xC1, last], content: ber(&[0x53], content) }
}

/// Last byte of the tag of a slot's certificate.
fn certificate_object(slot: PivSlot) -> u8 {
    match slot.retired() {
        Some(number) => KEY_HISTORY + number,
        None if slot == PivSlot::AUTHENTICATION => AUTHENTICATION,
        None if slot == PivSlot::SIGNATURE => SIGNATURE,
        None if slot == PivSlot::KEY_MANAGEMENT => KEY_MANAGEMENT,
        None => CARD_AUTHENTICATION,
    }
}

/// Card holder unique identifier: FASC-N, GUID, expiry, no issuer's signature. Windows looks at the first 13 bytes of
/// the GUID only, OpenSC at the last 8.
fn chuid(id: &CardId) -> Vec<u8> {
    [
        ber(&[0x30], &FASC_N),
        ber(&[0x34], &id.guid()),
        // The card itself never expires, only its certificates do.
        ber(&[0x35], b"20991231"),
        ber(&[0x3E], &[]),
        END.to_vec(),
    ]
    .concat()
}

/// Card capability container. No card URLs: OpenSC would take them for those of a CAC.
fn capabilities(id: &CardId) -> Vec<u8> {
    // RID of GSC-IS, manufacturer, card type (02: Java card), and what tells this card.
    let identifier = [&[0xA0, 0x00, 0x00, 0x01, 0x16, 0xFF, 0x02][..], &id.piv_card_identifier()].concat();
    [
        ber(&[0xF0], &identifier),
        // Container and grammar version 2.1, no card URLs, no PKCS#15, data model 10.
        vec![0xF1, 1, 0x21, 0xF2, 1, 0x21, 0xF3, 0, 0xF4, 1, 0x00, 0xF5, 1, 0x10],
        // Access rules, card APDUs, redirection, capability and status tuples, next container.
        vec![0xF6, 0, 0xF7, 0, 0xFA, 0, 0xFB, 0, 0xFC, 0, 0xFD, 0],
        END.to_vec(),
    ]
    .concat()
}

/// What would be printed on the card.
fn printed_information(holder: &str, id: &CardId) -> Vec<u8> {
    let serial: String = id.guid()[..10].iter().map(|byte| format!("{byte:02X}")).collect();
    // A field of 125 bytes, and no character cut in two.
    let fits = (0..=holder.len().min(125)).rev().find(|end| holder.is_char_boundary(*end));
    let name = &holder[..fits.unwrap_or(0)];
    [
        ber(&[0x01], name.as_bytes()),
        ber(&[0x02], b""),
        ber(&[0x04], b"2099DEC31"),
        ber(&[0x05], serial.as_bytes()),
        ber(&[0x06], b"EMULATED"),
        END.to_vec(),
    ]
    .concat()
}
