//! The URB phase's commands and replies, to bytes and back: headers of 48 bytes, big endian, and their data.

use thiserror::Error;
use vscard_protocol::Secret;

/// Length of every header.
pub(super) const HEADER: usize = 48;
/// Longest transfer: above the longest CCID message (65 554 bytes), and above what libccid asks for to get one.
pub(super) const MAX_TRANSFER: usize = 70 * 1024;

const CMD_SUBMIT: u32 = 1;
const CMD_UNLINK: u32 = 2;
const RET_SUBMIT: u32 = 3;
const RET_UNLINK: u32 = 4;

/// Why a client's bytes cannot be followed any further. Offsets count from the first byte of the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum DecodeError {
    /// Neither SUBMIT nor UNLINK: how long it is, is not known.
    #[error("command at offset 0x00 is {0:#x}, neither SUBMIT nor UNLINK")]
    UnknownCommand(u32),
    /// Neither OUT nor IN: whether data follows, is not known.
    #[error("direction at offset 0x0C of SUBMIT {seqnum} is {direction}, neither OUT nor IN")]
    Direction {
        /// Sequence number of the SUBMIT.
        seqnum: u32,
        /// Its direction.
        direction: u32,
    },
    /// More OUT data than this end takes.
    #[error(
        "transfer_buffer_length at offset 0x18 of SUBMIT {seqnum} is {length}, above the limit of {MAX_TRANSFER}"
    )]
    TooLong {
        /// Sequence number of the SUBMIT.
        seqnum: u32,
        /// Its length field, in bytes.
        length: u32,
    },
    /// An isochronous transfer, to a device that has no isochronous endpoint.
    #[error(
        "number_of_packets at offset 0x20 of SUBMIT {seqnum} is {packets}: isochronous transfers are refused"
    )]
    Isochronous {
        /// Sequence number of the SUBMIT.
        seqnum: u32,
        /// Its number of packets.
        packets: u32,
    },
}

#[derive(Debug)]
pub(super) enum Command {
    Submit(Submit),
    Unlink(Unlink),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Out,
    In,
}

/// CMD_SUBMIT without what a device made of software has no use for: flags, start frame and interval.
#[derive(Debug)]
pub(super) struct Submit {
    pub(super) seqnum: u32,
    pub(super) devid: u32,
    pub(super) direction: Direction,
    /// Its number, without direction. As it came: may be above 15.
    pub(super) endpoint: u32,
    /// As it came; for IN not bounded.
    pub(super) length: u32,
    /// 0 or 0xFFFF_FFFF.
    pub(super) packets: u32,
    pub(super) setup: [u8; 8],
    /// For OUT, `length` bytes.
    pub(super) data: Secret,
}

#[derive(Debug)]
pub(super) struct Unlink {
    pub(super) seqnum: u32,
    /// The SUBMIT that is to be taken back.
    pub(super) target: u32,
}

/// Finds commands in a stream of bytes. Holds one at most, [`HEADER`] and [`MAX_TRANSFER`] bytes, in memory that is
/// wiped.
#[derive(Default)]
pub(super) struct Decoder {
    /// What came of a header so far. It may be none at all: where the stream lost its way, anything is.
    header: Secret,
    /// A SUBMIT whose data is still coming.
    submit: Option<Submit>,
}

impl Decoder {
    /// Takes bytes from the front of `input` up to the end of the first command.
    ///
    /// `None`: all of `input` is taken and more is needed.
    ///
    /// # Errors
    /// [`DecodeError`], after which the decoder must not be used again.
    pub(super) fn decode(&mut self, input: &mut &[u8]) -> Option<Result<Command, DecodeError>> {
        let mut submit = match self.submit.take() {
            Some(submit) => submit,
            None => match self.header(input)? {
                Ok(Command::Submit(submit)) => submit,
                other => return Some(other),
            },
        };
        if submit.direction == Direction::Out {
            // Its allocation was made in full: no copy is left behind by growing.
            let missing = (submit.length as usize).saturating_sub(submit.data.len());
            let (now, later) = input.split_at(missing.min(input.len()));
            submit.data.extend(now);
            *input = later;
            if now.len() < missing {
                self.submit = Some(submit);
                return None;
            }
        }
        Some(Ok(Command::Submit(submit)))
    }

    fn header(&mut self, input: &mut &[u8]) -> Option<Result<Command, DecodeError>> {
        match input.split_first_chunk() {
            Some((header, later)) if self.header.is_empty() => {
                *input = later;
                return Some(parse(header));
            }
            _ => {}
        }
        let (now, later) = input.split_at((HEADER - self.header.len()).min(input.len()));
        *input = later;
        self.header.extend(now);
        let command = parse(self.header.expose().first_chunk()?);
        self.header = Secret::default();
        Some(command)
    }
}

fn parse(header: &[u8; HEADER]) -> Result<Command, DecodeError> {
    let word =
        |at: usize| header.get(at..).and_then(<[u8]>::first_chunk).copied().map_or(0, u32::from_be_bytes);
    let seqnum = word(0x04);
    match word(0x00) {
        CMD_SUBMIT => {
            let direction = match word(0x0C) {
                0 => Direction::Out,
                1 => Direction::In,
                direction => return Err(DecodeError::Direction { seqnum, direction }),
            };
            // What is not isochronous has 0 here from Linux, and -1 by the protocol's description.
            let packets = word(0x20);
            if packets != 0 && packets != u32::MAX {
                return Err(DecodeError::Isochronous { seqnum, packets });
            }
            let length = word(0x18);
            let data = match direction {
                Direction::Out if length as usize > MAX_TRANSFER => {
                    return Err(DecodeError::TooLong { seqnum, length });
                }
                Direction::Out => Secret::new(Vec::with_capacity(length as usize)),
                Direction::In => Secret::default(),
            };
            let (devid, endpoint) = (word(0x08), word(0x10));
            let [.., a, b, c, d, e, f, g, h] = *header;
            let setup = [a, b, c, d, e, f, g, h];
            Ok(Command::Submit(Submit { seqnum, devid, direction, endpoint, length, packets, setup, data }))
        }
        CMD_UNLINK => Ok(Command::Unlink(Unlink { seqnum, target: word(0x14) })),
        other => Err(DecodeError::UnknownCommand(other)),
    }
}

/// A RET_SUBMIT. `actual_length` is told for OUT as well, while `data` follows for IN only.
pub(super) fn ret_submit(seqnum: u32, status: i32, actual_length: u32, packets: u32, data: &[u8]) -> Secret {
    let mut out = Vec::with_capacity(HEADER + data.len());
    reply(&mut out, RET_SUBMIT, seqnum, status);
    out.extend_from_slice(&actual_length.to_be_bytes());
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&packets.to_be_bytes());
    out.resize(HEADER, 0);
    out.extend_from_slice(data);
    Secret::new(out)
}

/// A RET_UNLINK.
pub(super) fn ret_unlink(seqnum: u32, status: i32) -> Secret {
    let mut out = Vec::with_capacity(HEADER);
    reply(&mut out, RET_UNLINK, seqnum, status);
    out.resize(HEADER, 0);
    Secret::new(out)
}

/// What both replies begin with; device, direction and endpoint are 0 from a server.
fn reply(out: &mut Vec<u8>, command: u32, seqnum: u32, status: i32) {
    out.extend_from_slice(&command.to_be_bytes());
    out.extend_from_slice(&seqnum.to_be_bytes());
    out.extend_from_slice(&[0; 12]);
    out.extend_from_slice(&status.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn submit_bytes(seqnum: u32, direction: u32, endpoint: u32, length: u32, packets: u32) -> Vec<u8> {
        let words = [CMD_SUBMIT, seqnum, 0x0001_0002, direction, endpoint, 0x200, length, 0, packets, 4];
        let mut bytes = words.map(u32::to_be_bytes).concat();
        bytes.extend_from_slice(&[0x80, 6, 0, 1, 0, 0, 18, 0]);
        bytes
    }

    fn decode_one(mut bytes: &[u8]) -> Result<Command, DecodeError> {
        let command = Decoder::default().decode(&mut bytes).expect("a whole command");
        assert!(bytes.is_empty() || command.is_err());
        command
    }

    #[test]
    fn bytes_of_the_wire() {
        let get_descriptor = [
            "00000001 00000007 00010002 00000001 00000000",
            "00000200 00000040 00000000 00000000 00000000 8006000100004000",
        ]
        .concat();
        let Ok(Command::Submit(submit)) = decode_one(&super::super::tests::unhex(&get_descriptor)) else {
            panic!("not a SUBMIT");
        };
        assert_eq!((submit.seqnum, submit.devid, submit.endpoint, submit.length), (7, 0x0001_0002, 0, 64));
        assert_eq!((submit.direction, submit.packets), (Direction::In, 0));
        assert_eq!(submit.setup, [0x80, 6, 0, 1, 0, 0, 0x40, 0]);

        let unlink = [
            "00000002 00000009 00010002 00000000 00000000",
            "00000007 00000000 00000000 00000000 00000000 0000000000000000",
        ]
        .concat();
        let Ok(Command::Unlink(unlink)) = decode_one(&super::super::tests::unhex(&unlink)) else {
            panic!("not an UNLINK");
        };
        assert_eq!((unlink.seqnum, unlink.target), (9, 7));

        let returned = [
            "00000003 00000007 00000000 00000000 00000000",
            "00000000 00000002 00000000 00000000 00000000 0000000000000000 50 03",
        ]
        .concat();
        assert_eq!(ret_submit(7, 0, 2, 0, &[0x50, 3]).expose(), super::super::tests::unhex(&returned));
        let unlinked = [
            "00000004 00000009 00000000 00000000 00000000",
            "ffffff98 00000000 00000000 00000000 00000000 0000000000000000",
        ]
        .concat();
        assert_eq!(ret_unlink(9, -104).expose(), super::super::tests::unhex(&unlinked));
    }

    #[test]
    fn lengths_are_judged_from_the_header_alone() {
        let limit = MAX_TRANSFER as u32;
        for length in [limit + 1, i32::MAX as u32, u32::MAX] {
            let error = decode_one(&submit_bytes(1, 0, 1, length, 0)).unwrap_err();
            assert_eq!(error, DecodeError::TooLong { seqnum: 1, length });
        }
        let mut decoder = Decoder::default();
        assert!(decoder.decode(&mut &submit_bytes(1, 0, 1, limit, 0)[..]).is_none());
        // What is asked for costs nothing.
        assert!(matches!(decode_one(&submit_bytes(1, 1, 1, u32::MAX, 0)), Ok(Command::Submit(_))));
    }

    #[test]
    fn what_cannot_be_followed_is_refused() {
        assert_eq!(
            decode_one(&submit_bytes(3, 1, 1, 8, 2)).unwrap_err().to_string(),
            "number_of_packets at offset 0x20 of SUBMIT 3 is 2: isochronous transfers are refused"
        );
        assert_eq!(
            decode_one(&submit_bytes(3, 2, 1, 8, 0)).unwrap_err(),
            DecodeError::Direction { seqnum: 3, direction: 2 }
        );
        assert_eq!(decode_one(&[0xAA; HEADER]).unwrap_err(), DecodeError::UnknownCommand(0xAAAA_AAAA));
        assert!(decode_one(&submit_bytes(3, 1, 1, 8, u32::MAX)).is_ok());
    }

    proptest! {
        #[test]
        fn commands_survive_the_wire_however_it_is_cut(
            commands in proptest::collection::vec(
                (any::<bool>(), any::<u32>(), 0u32..2, 0u32..16, proptest::collection::vec(any::<u8>(), 0..200)),
                1..8,
            ),
            cut in 1usize..300,
        ) {
            let mut wire = Vec::new();
            for (submit, seqnum, direction, endpoint, data) in &commands {
                if *submit {
                    wire.extend(submit_bytes(*seqnum, *direction, *endpoint, data.len() as u32, 0));
                    if *direction == 0 {
                        wire.extend_from_slice(data);
                    }
                } else {
                    wire.extend([CMD_UNLINK, *seqnum, 5, 0, 0, 77].map(u32::to_be_bytes).concat());
                    wire.extend_from_slice(&[0; 24]);
                }
            }
            let mut decoder = Decoder::default();
            let mut found = Vec::new();
            for mut piece in wire.chunks(cut) {
                while let Some(command) = decoder.decode(&mut piece) {
                    found.push(command.unwrap());
                }
                prop_assert!(piece.is_empty());
            }
            prop_assert_eq!(found.len(), commands.len());
            for (found, (submit, seqnum, direction, endpoint, data)) in found.iter().zip(&commands) {
                match found {
                    Command::Submit(found) => {
                        prop_assert!(*submit);
                        prop_assert_eq!(found.seqnum, *seqnum);
                        prop_assert_eq!(found.endpoint, *endpoint);
                        prop_assert_eq!(found.length as usize, data.len());
                        let expected = if *direction == 0 { &data[..] } else { &[] };
                        prop_assert_eq!(found.data.expose(), expected);
                    }
                    Command::Unlink(found) => {
                        prop_assert!(!*submit);
                        prop_assert_eq!((found.seqnum, found.target), (*seqnum, 77));
                    }
                }
            }
        }

        #[test]
        fn any_bytes_are_commands_or_errors(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let mut decoder = Decoder::default();
            let mut input = &bytes[..];
            while let Some(Ok(_)) = decoder.decode(&mut input) {}
        }
    }
}
