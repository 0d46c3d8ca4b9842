//! Applets that only say what card this is, by GET DATA (ISO/IEC 7816-4:2005 §7.4.2).

use vscard_protocol::apdu::{aid, ins};
use vscard_protocol::{Command, StatusWord};

use super::{Applet, Outcome, Session, fci};
use crate::keys::writable::Writable;
use crate::state::CardId;
use crate::tlv;

/// The GlobalPlatform issuer security domain's full identifier; middleware also selects it one byte short.
const ISSUER_SECURITY_DOMAIN: [u8; 8] = [0xA0, 0x00, 0x00, 0x00, 0x03, 0x00, 0x00, 0x00];

/// A list of data objects, each read whole.
pub(super) struct DataObjects {
    aids: Vec<Vec<u8>>,
    fci: Vec<u8>,
    /// P1-P2 of GET DATA, and the answer.
    objects: Vec<(u16, Vec<u8>)>,
}

impl Applet for DataObjects {
    fn answers_to(&self, aid: &[u8]) -> bool {
        self.aids.iter().any(|own| own == aid)
    }

    fn fci(&self, _: Option<&dyn Writable>) -> Vec<u8> {
        self.fci.clone()
    }

    fn command(&self, command: &Command, _: Session<'_>) -> Outcome {
        match command.ins() {
            ins::GET_DATA if !command.data().is_empty() => StatusWord::WRONG_LENGTH.into(),
            ins::GET_DATA => match self.objects.iter().find(|(tag, _)| *tag == command.p1p2()) {
                Some((_, value)) => value.clone().into(),
                None => StatusWord::REFERENCE_NOT_FOUND.into(),
            },
            // There is nothing below these applets to select.
            ins::SELECT => StatusWord::NOT_FOUND.into(),
            _ => StatusWord::INS_NOT_SUPPORTED.into(),
        }
    }
}

/// The GlobalPlatform card manager, as far as CAC middleware reads it: production data (9F7F) with a serial
/// number of this card, and card recognition data (0066).
pub(super) fn global_platform(id: &CardId) -> DataObjects {
    // GlobalPlatform Card Specification 2.1.1 appendix F: the card manager's object identifiers
    // {1 2 840 114283}: 1 recognition data, 2.2.1.1 version, 3 identification scheme, 4.1.5 SCP01.
    let oid = |tail: &[u8]| tlv::ber(&[0x06], &[&[0x2A, 0x86, 0x48, 0x86, 0xFC, 0x6B], tail].concat());
    let recognition = [
        oid(&[1]),
        tlv::ber(&[0x60], &oid(&[2, 2, 1, 1])),
        tlv::ber(&[0x63], &oid(&[3])),
        tlv::ber(&[0x64], &oid(&[4, 1, 5])),
    ]
    .concat();
    // Card production life cycle data: 42 bytes; fabricator, type, operating system, release and dates (12),
    // serial number and batch (6), then who embedded and personalised it (24). All but the number stays zero:
    // this chip was made by nobody.
    let mut life_cycle = [0; 42];
    life_cycle[12..18].copy_from_slice(&id.chip_serial());
    let proprietary = [
        // Application production life cycle data, and the longest command data field.
        tlv::ber(&[0x9F, 0x6E], &[0x12, 0x91, 0x51, 0x81, 0x01, 0x00]),
        tlv::ber(&[0x9F, 0x65], &[0xFF]),
    ];
    DataObjects {
        aids: vec![aid::GLOBAL_PLATFORM.to_vec(), ISSUER_SECURITY_DOMAIN.to_vec()],
        fci: fci(&ISSUER_SECURITY_DOMAIN, &proprietary.concat()),
        objects: vec![
            (0x9F7F, tlv::ber(&[0x9F, 0x7F], &life_cycle)),
            (0x0066, tlv::ber(&[0x66], &tlv::ber(&[0x73], &recognition))),
        ],
    }
}

/// The application that Windows reads to find a minidriver: one object (7F68) with the card's GUID.
pub(super) fn microsoft_plug_and_play() -> DataObjects {
    const CARD_GUID: [u8; 16] =
        [0xE2, 0x80, 0xE9, 0xD2, 0x51, 0x88, 0x87, 0x4F, 0x81, 0xD6, 0x4F, 0x25, 0x4E, 0x38, 0x00, 0x1D];
    let guids = tlv::ber(&[0x30], &tlv::ber(&[0x04], &CARD_GUID));
    let object = [tlv::ber(&[0x02], &[0x00]), tlv::ber(&[0x16], b"MSFT"), guids].concat();
    DataObjects {
        aids: vec![aid::MICROSOFT_PNP.to_vec()],
        fci: fci(&aid::MICROSOFT_PNP, &[]),
        objects: vec![(0x7F68, tlv::ber(&[0x30], &object))],
    }
}
