//! VSCard messages to bytes and back.

use bytes::{BufMut, Bytes};
use nom::IResult;
use nom::Parser;
use nom::bytes::streaming::take;
use nom::number::streaming::be_u32;
use thiserror::Error;
use zeroize::{Zeroize, Zeroizing};

use crate::Secret;
use crate::message::{Body, ErrorCode, HEADER, Init, MAX_PAYLOAD, Message, MessageType, ReaderId};

/// Why bytes are not a VSCard message. Offsets count from the first byte of the message's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum DecodeError {
    /// The length field is above what this end takes. The stream cannot be followed any further.
    #[error("length at offset 8 of a {kind} message is {length}, above the limit of {limit}")]
    TooLong {
        /// Type of the message.
        kind: MessageType,
        /// Its length field, in bytes.
        length: u32,
        /// The limit, in bytes.
        limit: usize,
    },
    /// A payload of a wrong length for its type. The message is skipped; the next one can be read.
    #[error("payload of {length} bytes at offset 12 of a {kind} message, expected {expected}")]
    Payload {
        /// Type of the message.
        kind: MessageType,
        /// Payload length, in bytes.
        length: usize,
        /// What its type demands.
        expected: &'static str,
    },
}

impl DecodeError {
    /// Whether the stream can no longer be followed.
    pub fn is_fatal(&self) -> bool {
        matches!(self, Self::TooLong { .. })
    }
}

/// A payload that no message can carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("{kind} payload of {length} bytes is above the limit of {limit}")]
pub struct EncodeError {
    /// Type of the message.
    pub kind: MessageType,
    /// Payload length, in bytes.
    pub length: usize,
    /// The limit, in bytes.
    pub limit: usize,
}

/// Writes `message` as bytes.
///
/// The result is to be written to the stream in one piece, and is wiped when dropped.
///
/// # Errors
/// [`EncodeError`] for a payload above [`MAX_PAYLOAD`].
pub fn encode(message: &Message) -> Result<Secret, EncodeError> {
    encode_up_to(MAX_PAYLOAD, message)
}

/// The same with another limit, for a peer that speaks the extension.
pub(crate) fn encode_up_to(limit: usize, message: &Message) -> Result<Secret, EncodeError> {
    let kind = message.body.message_type();
    let length = match &message.body {
        Body::Init(init) => 8 + 4 * init.capabilities.len(),
        Body::Error(_) => 4,
        Body::ReaderAdd(bytes) | Body::Atr(bytes) | Body::PowerOn(bytes) | Body::Unknown(_, bytes) => {
            bytes.len()
        }
        Body::Apdu(apdu) => apdu.len(),
        Body::ReaderRemove | Body::CardRemove | Body::Flush | Body::FlushComplete | Body::PowerOff => 0,
    };
    if length > limit {
        return Err(EncodeError { kind, length, limit });
    }
    let mut out = Vec::with_capacity(HEADER + length);
    out.put_u32(kind.0);
    out.put_u32(message.reader.0);
    out.put_u32(length as u32);
    match &message.body {
        Body::Init(init) => {
            out.put_slice(&init.magic);
            out.put_u32(init.version);
            init.capabilities.iter().for_each(|word| out.put_u32(*word));
        }
        Body::Error(code) => out.put_u32(code.0),
        Body::ReaderAdd(bytes) | Body::Atr(bytes) | Body::PowerOn(bytes) | Body::Unknown(_, bytes) => {
            out.put_slice(bytes);
        }
        Body::Apdu(apdu) => out.put_slice(apdu.expose()),
        Body::ReaderRemove | Body::CardRemove | Body::Flush | Body::FlushComplete | Body::PowerOff => {}
    }
    Ok(Secret::new(out))
}

/// Finds messages in a stream of bytes. Holds one message at most, in memory that is wiped.
pub struct Decoder {
    buffer: Zeroizing<Vec<u8>>,
    limit: usize,
}

impl Decoder {
    /// A decoder for payloads of at most `limit` bytes.
    pub fn new(limit: usize) -> Self {
        // All at once: a buffer that grows would leave unwiped copies behind.
        Self { buffer: Zeroizing::new(Vec::with_capacity(HEADER + limit)), limit }
    }

    /// Takes bytes from the front of `input` up to the end of the first message.
    ///
    /// `None`: all of `input` is taken and more is needed.
    ///
    /// # Errors
    /// [`DecodeError`]; after one that [is fatal](DecodeError::is_fatal) the decoder must not be used again.
    pub fn decode(&mut self, input: &mut &[u8]) -> Option<Result<Message, DecodeError>> {
        loop {
            let wanted = match frame(&self.buffer) {
                Ok((_, Frame { kind, reader, payload })) => {
                    let message = body(kind, payload).map(|body| Message::new(reader, body));
                    // What was used, not all that could be.
                    self.buffer.as_mut_slice().zeroize();
                    self.buffer.clear();
                    return Some(message);
                }
                Err(nom::Err::Incomplete(nom::Needed::Size(more))) => more.get(),
                // The grammar of a frame cannot fail otherwise; one byte more is asked for if it ever did.
                Err(_) => 1,
            };
            if let Some((kind, length)) = self.length().filter(|(_, length)| *length as usize > self.limit) {
                return Some(Err(DecodeError::TooLong { kind, length, limit: self.limit }));
            }
            let (now, later) = input.split_at(wanted.min(input.len()));
            if now.is_empty() {
                return None;
            }
            self.buffer.extend_from_slice(now);
            *input = later;
        }
    }

    /// Type and length of the message whose header has just become complete.
    fn length(&self) -> Option<(MessageType, u32)> {
        match header(&self.buffer) {
            Ok(([], (kind, _, length))) => Some((kind, length)),
            _ => None,
        }
    }

    /// Whether part of a message is waiting for the rest.
    pub fn in_message(&self) -> bool {
        !self.buffer.is_empty()
    }
}

struct Frame<'a> {
    kind: MessageType,
    reader: ReaderId,
    payload: &'a [u8],
}

fn header(input: &[u8]) -> IResult<&[u8], (MessageType, ReaderId, u32)> {
    (be_u32.map(MessageType), be_u32.map(ReaderId), be_u32).parse(input)
}

fn frame(input: &[u8]) -> IResult<&[u8], Frame<'_>> {
    // A header in one piece, so that its length is judged before a byte of payload is kept.
    let (input, whole) = take(HEADER)(input)?;
    let (_, (kind, reader, length)) = header(whole)?;
    let (input, payload) = take(length)(input)?;
    Ok((input, Frame { kind, reader, payload }))
}

fn body(kind: MessageType, payload: &[u8]) -> Result<Body, DecodeError> {
    let wrong = |expected| DecodeError::Payload { kind, length: payload.len(), expected };
    let empty = |body| if payload.is_empty() { Ok(body) } else { Err(wrong("none")) };
    match kind {
        MessageType::INIT => {
            let most = 8 + 4 * Init::MAX_CAPABILITIES;
            match payload {
                [m, a, g, i, v, e, r, s, words @ ..] if words.len() % 4 == 0 && payload.len() <= most => {
                    let word = |bytes: &[u8]| bytes.iter().fold(0, |word, byte| word << 8 | u32::from(*byte));
                    Ok(Body::Init(Init {
                        magic: [*m, *a, *g, *i],
                        version: u32::from_be_bytes([*v, *e, *r, *s]),
                        capabilities: words.chunks_exact(4).map(word).collect(),
                    }))
                }
                _ => Err(wrong("8 bytes and up to 64 words")),
            }
        }
        MessageType::ERROR => match payload.try_into() {
            Ok(code) => Ok(Body::Error(ErrorCode(u32::from_be_bytes(code)))),
            Err(_) => Err(wrong("4 bytes")),
        },
        MessageType::READER_ADD => Ok(Body::ReaderAdd(Bytes::copy_from_slice(payload))),
        MessageType::READER_REMOVE => empty(Body::ReaderRemove),
        MessageType::ATR => Ok(Body::Atr(Bytes::copy_from_slice(payload))),
        MessageType::CARD_REMOVE => empty(Body::CardRemove),
        MessageType::APDU => Ok(Body::Apdu(Secret::from(payload))),
        MessageType::FLUSH => empty(Body::Flush),
        MessageType::FLUSH_COMPLETE => empty(Body::FlushComplete),
        MessageType::POWER_ON => Ok(Body::PowerOn(Bytes::copy_from_slice(payload))),
        MessageType::POWER_OFF => empty(Body::PowerOff),
        other => Ok(Body::Unknown(other, Bytes::copy_from_slice(payload))),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_body() -> impl Strategy<Value = Body> {
        let bytes = || proptest::collection::vec(any::<u8>(), 0..400).prop_map(Bytes::from);
        prop_oneof![
            (any::<[u8; 4]>(), any::<u32>(), proptest::collection::vec(any::<u32>(), 0..=64))
                .prop_map(|(magic, version, capabilities)| Body::Init(Init { magic, version, capabilities })),
            any::<u32>().prop_map(|code| Body::Error(ErrorCode(code))),
            bytes().prop_map(Body::ReaderAdd),
            Just(Body::ReaderRemove),
            bytes().prop_map(Body::Atr),
            Just(Body::CardRemove),
            bytes().prop_map(|apdu| Body::Apdu(Secret::from(&apdu[..]))),
            Just(Body::Flush),
            Just(Body::FlushComplete),
            bytes().prop_map(Body::PowerOn),
            Just(Body::PowerOff),
            (any::<u32>(), bytes())
                .prop_filter("a known type", |(kind, _)| !matches!(kind, 1..=9 | 0x8000_0001 | 0x8000_0002))
                .prop_map(|(kind, payload)| Body::Unknown(MessageType(kind), payload)),
        ]
    }

    fn decode_all(mut input: &[u8]) -> Vec<Result<Message, DecodeError>> {
        let mut decoder = Decoder::new(MAX_PAYLOAD);
        let mut messages = Vec::new();
        while let Some(message) = decoder.decode(&mut input) {
            let fatal = message.as_ref().is_err_and(DecodeError::is_fatal);
            messages.push(message);
            if fatal {
                break;
            }
        }
        messages
    }

    #[test]
    fn bytes_of_the_wire() {
        // What QEMU 7.2 answers to Init and to ReaderAdd.
        let init = Message::new(ReaderId::UNDEFINED, Body::Init(Init::ours(None)));
        let wire = [
            [0, 0, 0, 1, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0, 0, 12].as_slice(),
            b"VSCD",
            &[0, 0, 0, 2, 0, 0, 0, 0],
        ]
        .concat();
        assert_eq!(encode(&init).unwrap().expose(), wire);
        let ack = Message::new(ReaderId::FIRST, Body::Error(ErrorCode::SUCCESS));
        assert_eq!(encode(&ack).unwrap().expose(), [0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0]);
    }

    #[test]
    fn a_huge_length_is_refused_from_its_header_alone() {
        let messages = decode_all(&[0, 0, 0, 7, 0, 0, 0, 0, 0xFF, 0xFF, 0xFF, 0xFF]);
        assert_eq!(
            messages[0].as_ref().unwrap_err().to_string(),
            "length at offset 8 of a APDU message is 4294967295, above the limit of 65524"
        );
    }

    #[test]
    fn a_bad_payload_is_skipped() {
        let mut wire = vec![0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 1, 9];
        wire.extend_from_slice(&[0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0]);
        let messages = decode_all(&wire);
        assert!(matches!(messages[0], Err(DecodeError::Payload { length: 1, .. })));
        assert!(matches!(messages[1], Ok(Message { body: Body::Flush, .. })));
    }

    #[test]
    fn an_error_code_is_understood_in_both_byte_orders() {
        assert_eq!(ErrorCode(0x0200_0000).code(), 2);
        assert_eq!(ErrorCode(2).to_string(), "cannot add more readers");
    }

    #[test]
    fn no_payload_above_the_limit_is_written() {
        let body = Body::Atr(Bytes::from(vec![0; MAX_PAYLOAD + 1]));
        assert!(encode(&Message::new(ReaderId::FIRST, body)).is_err());
    }

    proptest! {
        #[test]
        fn messages_survive_the_wire_however_it_is_cut(
            reader in any::<u32>(), body in any_body(), cut in 1usize..64,
        ) {
            let wire = encode(&Message::new(ReaderId(reader), body)).unwrap();
            let mut decoder = Decoder::new(MAX_PAYLOAD);
            let mut found = None;
            for mut piece in wire.expose().chunks(cut) {
                prop_assert!(found.is_none());
                found = decoder.decode(&mut piece);
                prop_assert!(piece.is_empty());
            }
            let message = found.unwrap().unwrap();
            prop_assert_eq!(message.reader, ReaderId(reader));
            let again = encode(&message).unwrap();
            prop_assert_eq!(again.expose(), wire.expose());
            prop_assert!(!decoder.in_message());
        }

        #[test]
        fn any_bytes_are_messages_or_errors(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            decode_all(&bytes);
        }

        #[test]
        fn any_small_frames_are_messages_or_errors(
            frames in proptest::collection::vec((0u32..12, any::<u32>(), 0usize..40), 0..20),
        ) {
            let mut wire = Vec::new();
            for (kind, reader, length) in &frames {
                wire.extend_from_slice(&kind.to_be_bytes());
                wire.extend_from_slice(&reader.to_be_bytes());
                wire.extend_from_slice(&(*length as u32).to_be_bytes());
                wire.extend_from_slice(&vec![0xA5; *length]);
            }
            prop_assert_eq!(decode_all(&wire).len(), frames.len());
        }
    }
}
