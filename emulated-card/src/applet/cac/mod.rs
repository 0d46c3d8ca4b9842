//! The CAC card edge: the "virtual machine" cards of GSC-IS 2.1 (NISTIR 6887) chapter 5, as OpenSC 0.23 and
//! coolkey 1.1 use it.
//!
//! | applet | AID | what is in it |
//! |---|---|---|
//! | card capability container | `A0 00 00 01 16 DB 00` | card number, where the containers are |
//! | access control | `A0 00 00 00 79 03 00` | GET ACR |
//! | PKI container *i* | `A0 00 00 00 79 01 0i` | certificate and private key *i* |
//! | GlobalPlatform | `A0 00 00 00 03 00 00` | production data with a serial number |
//! | Microsoft plug-and-play | `A0 00 00 03 97 43 49 44 5F 01 00` | the card's kind, for Windows |
//!
//! Where the specification leaves an error status open, the choice is ISO/IEC 7816-4's: 6700 for a body of the wrong
//! length, 6A80 for a wrong value in it, 6A86 for P1-P2, 6A88 for a tag or identifier that is not there.

mod access;
mod container;
pub(crate) mod reference;

use vscard_protocol::apdu::aid;

use super::{Applet, discovery};
use crate::card::CardBuildError;
use crate::keys::{Certificate, KeyKind};
use crate::slot::PivSlot;
use crate::state::CardId;

/// PKI containers a card can have (`A0 00 00 00 79 01 00` to `… 09`).
pub(crate) const MAX_CERTIFICATES: usize = 10;

/// Tag of the applet family and version, first in each answer about an applet.
const TAG_APPLET_INFORMATION: u8 = 0x01;

/// Instruction-independent name of PKI container `index`: last two bytes of its AID, and its object identifier.
fn pki_id(index: u8) -> [u8; 2] {
    [0x01, index]
}

/// The application identifier of a PKI container.
fn pki_aid(index: u8) -> [u8; 7] {
    let ([a, b, c, d, e], [f, g]) = (aid::RID_CAC, pki_id(index));
    [a, b, c, d, e, f, g]
}

/// Indices of the certificates that a CAC has, in the order of its containers: those with RSA keys, as the card edge
/// knows no others (GSC-IS 2.1 table 5-6), in the order of the PIV slots, which is authentication, signature,
/// encryption, each once.
pub(crate) fn containers(certificates: &[Certificate], slots: &[(PivSlot, usize)]) -> Vec<usize> {
    let mut slots = slots.to_vec();
    slots.sort_unstable();
    let mut containers = Vec::new();
    for (_, index) in slots {
        let rsa = certificates.get(index).is_some_and(|one| matches!(one.kind, KeyKind::Rsa { .. }));
        if rsa && !containers.contains(&index) {
            containers.push(index);
        }
    }
    containers
}

/// All applets of a CAC with these certificates of the store in its containers, at most [`MAX_CERTIFICATES`].
pub(crate) fn applets(
    certificates: &[Certificate],
    containers: &[usize],
    id: &CardId,
) -> Result<Vec<Box<dyn Applet>>, CardBuildError> {
    let count = match u8::try_from(containers.len()) {
        Ok(count) if containers.len() <= MAX_CERTIFICATES => count,
        _ => {
            let (count, limit) = (containers.len(), MAX_CERTIFICATES);
            return Err(CardBuildError::TooManyCertificates { count, limit });
        }
    };
    let mut applets: Vec<Box<dyn Applet>> = vec![
        Box::new(container::card_capability(count, id)),
        Box::new(access::AccessControl::new(count)),
        Box::new(discovery::global_platform(id)),
    ];
    for (container, index) in (0..count).zip(containers) {
        if let Some(certificate) = certificates.get(*index) {
            applets.push(Box::new(container::pki(container, *index, certificate)?));
        }
    }
    Ok(applets)
}

/// The application in which a CAC tells Windows what it is. A card with the PIV application must not have it, as
/// Windows then looks no further.
pub(crate) fn plug_and_play() -> Box<dyn Applet> {
    Box::new(discovery::microsoft_plug_and_play())
}
