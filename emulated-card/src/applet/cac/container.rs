//! Containers: pairs of buffers, one of tags and lengths, one of values, and perhaps a private key
//! (GSC-IS 2.1 chapter 5).

use std::io::Write;

use flate2::Compression;
use flate2::write::ZlibEncoder;
use vscard_protocol::apdu::{aid, ins};
use vscard_protocol::{Command, Secret, StatusWord};

use super::{TAG_APPLET_INFORMATION, pki_aid, pki_id};
use crate::applet::{Applet, Outcome, Session, fci};
use crate::card::{CardBuildError, KeyOperation, KeyWork};
use crate::keys::writable::Writable;
use crate::keys::{Certificate, KeyKind};
use crate::state::CardId;
use crate::tlv::{put_simple_header, simple};

/// Applet family and version of a container.
const CONTAINER_INFORMATION: [u8; 5] = [0x10, 0x02, 0x06, 0x02, 0x03];

/// Longest buffer: its length is written in two bytes, and READ BUFFER must reach all of it.
const MAX_BUFFER: usize = 65_535 - 2;

/// One container, which is an applet with one object.
pub(super) struct Container {
    aid: [u8; 7],
    object: [u8; 2],
    /// Tags and lengths, with the length in front.
    tags: Vec<u8>,
    /// Values, with the length in front.
    values: Vec<u8>,
    key: Option<Key>,
}

struct Key {
    /// Index in the store.
    index: usize,
    kind: KeyKind,
}

/// Collects the items of a container.
#[derive(Default)]
struct Buffers {
    tags: Vec<u8>,
    values: Vec<u8>,
}

impl Buffers {
    /// Adds an item; false when it does not fit.
    fn put(&mut self, tag: u8, value: &[u8]) -> bool {
        self.values.extend_from_slice(value);
        put_simple_header(&mut self.tags, tag, value.len()).is_ok()
            && self.tags.len() <= MAX_BUFFER
            && self.values.len() <= MAX_BUFFER
    }

    /// The two buffers as READ BUFFER shows them: length (low byte first), then content.
    fn finish(self) -> (Vec<u8>, Vec<u8>) {
        let counted = |content: Vec<u8>| [&(content.len() as u16).to_le_bytes(), content.as_slice()].concat();
        (counted(self.tags), counted(self.values))
    }
}

/// PKI container `container` with the certificate that is at `index` in the store.
///
/// The certificate is a zlib stream: Debian 12's coolkey 1.1 drops the whole token when it meets a plain one.
pub(super) fn pki(
    container: u8,
    index: usize,
    certificate: &Certificate,
) -> Result<Container, CardBuildError> {
    let refused = || CardBuildError::Certificate { name: certificate.name.clone() };
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::best());
    let compressed =
        encoder.write_all(&certificate.der).and_then(|()| encoder.finish()).map_err(|_| refused())?;
    let mut buffers = Buffers::default();
    // CertInfo (01: compressed), certificate, MSCUID, error detection code.
    let fits = [(0x71, &[0x01][..]), (0x70, &compressed), (0x72, &[]), (0xFE, &[])]
        .into_iter()
        .all(|(tag, value)| buffers.put(tag, value));
    if !fits {
        return Err(refused());
    }
    let (tags, values) = buffers.finish();
    let key = Some(Key { index, kind: certificate.kind });
    Ok(Container { aid: pki_aid(container), object: pki_id(container), tags, values, key })
}

/// The card capability container of a card with that many PKI containers.
pub(super) fn card_capability(certificates: u8, id: &CardId) -> Container {
    let mut buffers = Buffers::default();
    // At most ten card URLs of 16 bytes and 70 bytes of the rest: everything fits.
    let mut put = |tag, value: &[u8]| {
        buffers.put(tag, value);
    };
    // Card identifier: RID, manufacturer, card type 02 (Java card), and what becomes the token's serial number.
    put(0xF0, &[&aid::RID_CAC[..], &[0x03, 0x02], &id.card_identifier()].concat());
    // Container version and grammar version 2.1.
    put(0xF1, &[0x21]);
    put(0xF2, &[0x21]);
    for index in 0..certificates {
        // RID, type 04 (PKI), object, application; then access profile, PIN and key, for file-system cards only.
        let url = [&aid::RID_CAC[..], &[0x04], &pki_id(index), &pki_id(index), &[0; 6]];
        put(0xF3, &url.concat());
    }
    // No PKCS#15; data model 10; where access rules are.
    put(0xF4, &[0x00]);
    put(0xF5, &[0x10]);
    put(0xF6, &[&[aid::CAC_ACA.len() as u8], &aid::CAC_ACA[..], &[0; 9]].concat());
    // Card APDUs, redirection, capability and status tuples, next container, error detection code.
    for tag in [0xF7, 0xFA, 0xFB, 0xFC, 0xFD, 0xFE] {
        put(tag, &[]);
    }
    let (tags, values) = buffers.finish();
    Container { aid: aid::CAC_CCC, object: [0xDB, 0x00], tags, values, key: None }
}

impl Applet for Container {
    fn answers_to(&self, aid: &[u8]) -> bool {
        self.aid == aid
    }

    fn fci(&self, _: Option<&dyn Writable>) -> Vec<u8> {
        fci(&self.aid, &[])
    }

    fn command(&self, command: &Command, session: Session<'_>) -> Outcome {
        match (command.ins(), &self.key) {
            (ins::SELECT, _) => self.select_object(command.data()).into(),
            (ins::GET_PROPERTIES, _) => get_properties(command, |form| self.properties(form)),
            (ins::READ_BUFFER, _) => self.read_buffer(command),
            (ins::UPDATE_BUFFER, _) => StatusWord::CONDITIONS_NOT_SATISFIED.into(),
            (ins::SIGN_DECRYPT, Some(key)) => key.sign_decrypt(command, session),
            _ => StatusWord::INS_NOT_SUPPORTED.into(),
        }
    }
}

impl Container {
    /// SELECT with P1 = 02: the object within the applet. There is one, and it is
    /// selected from the start.
    fn select_object(&self, object: &[u8]) -> StatusWord {
        match object.len() {
            2 if self.object == object => StatusWord::SUCCESS,
            2 => StatusWord::NOT_FOUND,
            _ => StatusWord::WRONG_LENGTH,
        }
    }

    /// READ BUFFER: offset in P1-P2, which buffer and how much in the body.
    fn read_buffer(&self, command: &Command) -> Outcome {
        let &[which, count] = command.data() else { return StatusWord::WRONG_LENGTH.into() };
        let buffer = match which {
            1 => &self.tags,
            2 => &self.values,
            _ => return StatusWord::INCORRECT_DATA.into(),
        };
        match buffer.get(usize::from(command.p1p2())..) {
            Some(rest) => rest[..rest.len().min(count.into())].to_vec().into(),
            None => StatusWord::INCORRECT_P1P2.into(),
        }
    }

    fn properties(&self, form: Form) -> Vec<(u8, Vec<u8>)> {
        let object = self.object_properties(form);
        let mut properties = vec![
            (TAG_APPLET_INFORMATION, simple(TAG_APPLET_INFORMATION, CONTAINER_INFORMATION)),
            (0x40, simple(0x40, [1])),
            object,
        ];
        if form == Form::Long {
            properties.extend(long_properties());
        }
        properties
    }

    /// The object's identifier, buffer lengths and key. OpenSC 0.23 takes a value of 17 bytes only, which is
    /// what real cards send for PKI objects; those without a key are filled up to it.
    fn object_properties(&self, form: Form) -> (u8, Vec<u8>) {
        let content_length = |buffer: &[u8]| (buffer.len() as u16 - 2).to_le_bytes();
        let ([t0, t1], [v0, v1]) = (content_length(&self.tags), content_length(&self.values));
        let mut value = [simple(0x41, self.object), simple(0x42, [0x00, t0, t1, v0, v1])].concat();
        if let Some(key) = &self.key {
            // RSA, modulus bytes / 8, private and public key initialised (GSC-IS 2.1 table 5-6).
            let size = u8::try_from(key.kind.block_len() / 8).unwrap_or(u8::MAX);
            value.extend(simple(0x43, [0x06, size, 0x01, 0x01]));
        }
        match (form, &self.key) {
            (Form::Long, _) => value.extend(simple(0x26, [0x01])),
            (Form::Short, None) => value.extend(simple(0x26, [0x01, 0x00, 0x00, 0x00])),
            (Form::Short, Some(_)) => {}
        }
        let tag = if self.key.is_some() { 0x51 } else { 0x50 };
        (tag, [&[tag, value.len() as u8], value.as_slice()].concat())
    }
}

impl Key {
    /// SIGN/DECRYPT: the block in pieces, P1 = 80 for all but the last.
    fn sign_decrypt(&self, command: &Command, session: Session<'_>) -> Outcome {
        let Session { verified, gathered: mut block, .. } = session;
        let last = match command.p1p2() {
            0x8000 => false,
            0x0000 => true,
            _ => return StatusWord::INCORRECT_P1P2.into(),
        };
        if !verified {
            return StatusWord::SECURITY_STATUS_NOT_SATISFIED.into();
        }
        let modulus = self.kind.block_len();
        let length = block.len() + command.data().len();
        if length > modulus || (last && length != modulus) {
            return StatusWord::WRONG_LENGTH.into();
        }
        block.extend(command.data());
        if !last {
            return Outcome::Gather(block);
        }
        let (key, operation) = (self.index, KeyOperation::RsaRaw);
        KeyWork { key, operation, input: block, needs_pin: true, reply: |result| result }.into()
    }
}

/// The two forms of GET PROPERTIES' answer: the specified one, and the one real cards give for P1 = 40.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    Short,
    Long,
}

/// What only the long form has, at its end.
pub(super) fn long_properties() -> [(u8, Vec<u8>); 2] {
    [(0x39, simple(0x39, [0x00])), (0x3A, simple(0x3A, aid::CAC_ACA))]
}

/// GET PROPERTIES: all (P1 = 01), those whose tags are in the body (02), or the long form (40).
pub(super) fn get_properties(command: &Command, properties: impl Fn(Form) -> Vec<(u8, Vec<u8>)>) -> Outcome {
    let wanted = command.data();
    let data = match (command.p1p2(), wanted) {
        (0x0100, []) => concat(properties(Form::Short)),
        (0x4000, []) => concat(properties(Form::Long)),
        (0x0200, [_, ..]) => {
            let all = properties(Form::Short);
            let mut data = Vec::new();
            for tag in wanted {
                match all.iter().find(|(own, _)| own == tag) {
                    Some((_, property)) => data.extend_from_slice(property),
                    None => return StatusWord::REFERENCE_NOT_FOUND.into(),
                }
            }
            data
        }
        (0x0100 | 0x0200 | 0x4000, _) => return StatusWord::WRONG_LENGTH.into(),
        _ => return StatusWord::INCORRECT_P1P2.into(),
    };
    match command.le() {
        // As real cards: middleware that asks for too much learns the length and asks again. An Le of 00 or an
        // extended one says "as much as there is".
        Some(le) if !command.is_extended() && le < 256 && le > data.len() => {
            StatusWord::wrong_le(data.len()).into()
        }
        _ => Outcome::Data(Secret::new(data)),
    }
}

fn concat(properties: Vec<(u8, Vec<u8>)>) -> Vec<u8> {
    properties.into_iter().flat_map(|(_, property)| property).collect()
}
