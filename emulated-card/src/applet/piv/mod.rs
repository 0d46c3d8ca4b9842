//! The PIV card application (NIST SP 800-73-4 Part 2), as OpenSC 0.23 and Windows use it.
//!
//! Where the specification leaves an error status open: 6A80 for what is wrong with a body, its length included; 6A86 for
//! P1-P2 or an algorithm nobody knows; 6A88 for a key or PIN that is not there; 6A82 for a data object.

mod admin;
mod authenticate;
mod object;
mod reference;
mod write;

use vscard_protocol::apdu::ins;
use vscard_protocol::{Command, StatusWord};

use super::{Applet, Outcome, Session};
use crate::card::CardBuildError;
use crate::keys::writable::Writable;
use crate::keys::{Certificate, Curve, KeyKind};
use crate::slot::PivSlot;
use crate::state::CardId;
use crate::tlv::{self, ber};
pub(crate) use admin::{Administrator, Attempt};
use authenticate::CARD_MANAGEMENT;
use object::Object;
pub(crate) use write::public_key;

/// The full application identifier: with the version, 1.0.
const AID: [u8; 11] = [0xA0, 0x00, 0x00, 0x03, 0x08, 0x00, 0x00, 0x10, 0x00, 0x01, 0x00];

/// Length of a registered application provider identifier, in front of an application identifier.
const RID_LENGTH: usize = 5;

/// Longest data that GENERAL AUTHENTICATE may gather. The longest of use has 524 bytes (a block of RSA-4096).
const MAX_CHAIN: usize = 8192;

/// Longest data that PUT DATA may gather: what one command with an extended length could bring.
const MAX_PUT: usize = 65_535;

/// P1-P2 of GET DATA and PUT DATA: the current application.
const CURRENT_APPLICATION: u16 = 0x3FFF;

/// The applet.
pub(crate) struct Piv {
    objects: Vec<Object>,
    keys: Vec<Key>,
    id: CardId,
    /// Whether the card has an administrator.
    writable: bool,
}

/// A private key.
#[derive(Clone, Copy)]
struct Key {
    slot: PivSlot,
    /// Index in the store.
    index: usize,
    kind: KeyKind,
    /// Algorithm identifier.
    algorithm: u8,
}

/// Algorithm identifier of a kind of key: SP 800-78-4 table 6-2, 05 from SP 800-78-5, 16 as Yubico has it.
fn algorithm(kind: KeyKind) -> Option<u8> {
    Some(match kind {
        KeyKind::Rsa { bits: 1024 } => 0x06,
        KeyKind::Rsa { bits: 2048 } => 0x07,
        KeyKind::Rsa { bits: 3072 } => 0x05,
        KeyKind::Rsa { bits: 4096 } => 0x16,
        KeyKind::Rsa { .. } => return None,
        KeyKind::Ec(Curve::P256) => 0x11,
        KeyKind::Ec(Curve::P384) => 0x14,
    })
}

/// All kinds of key that PIV has an [`algorithm`] for: these can be generated.
fn kinds() -> impl Iterator<Item = KeyKind> {
    let rsa = [1024, 2048, 3072, 4096].map(|bits| KeyKind::Rsa { bits });
    rsa.into_iter().chain([Curve::P256, Curve::P384].map(KeyKind::Ec))
}

/// The kind of key to be generated for an algorithm identifier, the opposite of [`algorithm`].
fn kind_of(identifier: u8) -> Option<KeyKind> {
    kinds().find(|kind| algorithm(*kind) == Some(identifier))
}

impl Piv {
    /// The application with these certificates of the store in these slots. A `writable` one has an administrator.
    pub(crate) fn new(
        certificates: &[Certificate],
        slots: &[(PivSlot, usize)],
        id: &CardId,
        writable: bool,
    ) -> Result<Self, CardBuildError> {
        let mut placed = Vec::new();
        let mut keys = Vec::new();
        for (slot, index) in slots {
            let Some(certificate) = certificates.get(*index) else { continue };
            let Some(algorithm) = algorithm(certificate.kind) else {
                let (name, kind) = (certificate.name.clone(), certificate.kind);
                return Err(CardBuildError::NoPivAlgorithm { name, kind });
            };
            keys.push(Key { slot: *slot, index: *index, kind: certificate.kind, algorithm });
            placed.push((*slot, certificate));
        }
        Ok(Self { objects: object::objects(&placed, id)?, keys, id: id.clone(), writable })
    }

    /// The key in a slot.
    fn key(&self, slot: PivSlot, memory: Option<&dyn Writable>) -> Option<Key> {
        match memory {
            None => self.keys.iter().find(|key| key.slot == slot).copied(),
            Some(memory) => {
                let (index, kind) = memory.key(slot)?;
                Some(Key { slot, index, kind, algorithm: algorithm(kind)? })
            }
        }
    }

    /// The algorithms of all private keys: of those there are, and those that the administrator can have made. Nothing
    /// else lets OpenSC after 0.27 use RSA-4096; versions before do not read it.
    fn algorithms(&self, memory: Option<&dyn Writable>) -> Vec<u8> {
        let there: Vec<_> = PivSlot::all().filter_map(|slot| Some(self.key(slot, memory)?.kind)).collect();
        kinds().filter(|kind| self.writable || there.contains(kind)).filter_map(algorithm).collect()
    }

    /// GET DATA (Part 2 §3.1.2): the body names the object, 5C L tag.
    fn get_data(&self, command: &Command, verified: bool, memory: Option<&dyn Writable>) -> Outcome {
        if command.p1p2() != CURRENT_APPLICATION {
            return StatusWord::INCORRECT_P1P2.into();
        }
        let tag = match tlv::read_ber(command.data()) {
            Some(([0x5C], tag @ [_, ..], [])) => tag,
            _ => return StatusWord::INCORRECT_DATA.into(),
        };
        // First the PIN, so that nobody learns without it whether there is anything.
        if object::needs_pin(tag) && !verified {
            return StatusWord::SECURITY_STATUS_NOT_SATISFIED.into();
        }
        if let Some(memory) = memory {
            match object::writable(tag).and_then(|tag| memory.object(tag)).as_deref() {
                Some([]) => return StatusWord::NOT_FOUND.into(),
                Some(written) => return ber(&[0x53], written).into(),
                None => {}
            }
            let made = object::written_key_history(tag, &self.objects, memory)
                .or_else(|| object::written_identity(tag, &self.id, memory));
            if let Some(object) = made {
                return object.content.into();
            }
        }
        match self.objects.iter().find(|object| object.tag == tag) {
            Some(object) => object.content.clone().into(),
            None => StatusWord::NOT_FOUND.into(),
        }
    }
}

impl Applet for Piv {
    fn answers_to(&self, aid: &[u8]) -> bool {
        // Right-truncated (Part 2 §3.1.1): hosts leave out the version.
        aid.len() >= RID_LENGTH && AID.starts_with(aid)
    }

    /// The application property template (Part 2 tables 3 and 4).
    fn fci(&self, memory: Option<&dyn Writable>) -> Vec<u8> {
        let (rid, extension) = AID.split_at(RID_LENGTH);
        let authority = ber(&[0x79], &ber(&[0x4F], rid));
        let mut algorithms: Vec<u8> =
            self.algorithms(memory).iter().flat_map(|identifier| ber(&[0x80], &[*identifier])).collect();
        // The object identifier, which is always this.
        algorithms.extend(ber(&[0x06], &[0x00]));
        ber(&[0x61], &[ber(&[0x4F], extension), authority, ber(&[0xAC], &algorithms)].concat())
    }

    fn uses_key(&self, command: &Command) -> bool {
        // Challenges of the card management key are random numbers to OpenSC.
        command.ins() == ins::GENERAL_AUTHENTICATE && command.p2() != CARD_MANAGEMENT
    }

    fn chain_limit(&self, ins: u8) -> usize {
        match ins {
            ins::GENERAL_AUTHENTICATE => MAX_CHAIN,
            ins::PUT_DATA if self.writable => MAX_PUT,
            _ => 0,
        }
    }

    fn command(&self, command: &Command, session: Session<'_>) -> Outcome {
        match command.ins() {
            ins::GET_DATA_ODD => self.get_data(command, session.verified, session.memory),
            ins::VERIFY => reference::verify(command, session.verified),
            ins::CHANGE_REFERENCE_DATA => reference::change(command),
            ins::RESET_RETRY_COUNTER => reference::unblock(command),
            ins::GENERAL_AUTHENTICATE => self.general_authenticate(command, session),
            ins::PUT_DATA if self.writable => {
                write::put_data(command, session.administrator.is_authenticated())
            }
            ins::GENERATE_KEY_PAIR if self.writable => {
                write::generate(command, session.administrator.is_authenticated())
            }
            // There are no files: neither the master file nor one named by a path or short identifier.
            ins::SELECT if command.p1() == 0x00 => StatusWord::NOT_FOUND.into(),
            ins::SELECT => StatusWord::INCORRECT_P1P2.into(),
            _ => StatusWord::INS_NOT_SUPPORTED.into(),
        }
    }
}
