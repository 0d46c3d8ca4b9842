//! Connections that have no session yet, and what their first bytes say of them.

use std::time::Instant;

use vscard_protocol::Secret;

use super::session::ConnectionId;

/// Connections that may wait at a time.
pub(super) const MOST_WAITING: usize = 16;
/// Bytes kept of each. A guest that goes on sends no more than it may have under way at all its slots, and waits for
/// the answers then.
pub(super) const MOST_HELD: usize = 1 << 20;
/// Length field of the longest hello: a version and 56 words, as usbredir's own parser takes it.
const LONGEST_HELLO: u32 = 288;
/// Length of a version, which every hello has.
const SHORTEST_HELLO: u32 = 64;

/// A connection whose peer has no session.
pub(super) struct Waiting {
    pub(super) connection: ConnectionId,
    /// What it has said so far. The first packets of a guest that goes on may bring a PIN.
    pub(super) held: Secret,
    pub(super) said: Said,
    /// It was here when the connection in use ended, so that the guest of that one may come over to it.
    pub(super) heir: bool,
}

/// What a waiting connection wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// Nothing that can be judged.
    Nothing,
    /// A session. By then it is refused.
    Hello(Instant),
    /// To go on with the session there is. By then the VM of the connection in use is known to have stopped.
    Packet(Instant),
}

impl Waiting {
    pub(super) fn new(connection: ConnectionId) -> Self {
        Self { connection, held: Secret::default(), said: Said::Nothing, heir: false }
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        match self.said {
            Said::Nothing => None,
            Said::Hello(by) | Said::Packet(by) => Some(by),
        }
    }
}

/// What a connection begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum First {
    /// More is needed.
    Unknown,
    /// A whole hello.
    Hello,
    /// Something of a session that goes on.
    Packet,
    /// Nothing that makes sense here.
    Other,
}

impl First {
    /// Judges as early as possible: after the rest of a packet there may be silence. `going_on` is whether the session
    /// broke off within a packet, where there is one that may go on.
    pub(super) fn judge(bytes: &[u8], going_on: Option<bool>) -> Self {
        let header = bytes.get(..8).unwrap_or(bytes);
        // Type 0, and a length with two bytes of it 0.
        let like_hello = |(index, byte): (usize, &u8)| match index {
            4 => byte % 4 == 0,
            5 => *byte <= 1,
            _ => *byte == 0,
        };
        if header.iter().enumerate().all(like_hello) {
            let length = header.last_chunk().filter(|_| header.len() == 8).copied().map(u32::from_le_bytes);
            match length {
                None => return Self::Unknown,
                Some(length @ SHORTEST_HELLO..=LONGEST_HELLO) => {
                    // An id of 32 bits comes between.
                    return if bytes.len() >= 12 + length as usize { Self::Hello } else { Self::Unknown };
                }
                Some(_) => {}
            }
        }
        match (going_on, bytes.first_chunk().copied().map(u32::from_le_bytes)) {
            (None, _) => Self::Other,
            (Some(true), _) => Self::Packet,
            (Some(false), None) => Self::Unknown,
            // All types there are.
            (Some(false), Some(1..=27 | 100..=104)) => Self::Packet,
            (Some(false), Some(_)) => Self::Other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hello_is_judged_when_it_is_whole() {
        let mut hello = [0_u32, 68, 0].map(u32::to_le_bytes).concat();
        hello.resize(12 + 68, 0xFF);
        for going_on in [None, Some(false), Some(true)] {
            for length in 0..hello.len() {
                assert_eq!(First::judge(&hello[..length], going_on), First::Unknown, "{length} bytes");
            }
            assert_eq!(First::judge(&hello, going_on), First::Hello);
        }
    }

    #[test]
    fn what_is_no_hello_is_none_at_once() {
        for bytes in
            [&[1][..], &[0, 1], &[0, 0, 0, 0, 3], &[0, 0, 0, 0, 60, 0, 0, 0], &[0, 0, 0, 0, 0x24, 1, 0, 0]]
        {
            assert_eq!(First::judge(bytes, None), First::Other, "{bytes:?}");
            assert_eq!(First::judge(bytes, Some(true)), First::Packet, "{bytes:?}");
        }
        assert_eq!(First::judge(&[101], Some(false)), First::Unknown);
        assert_eq!(First::judge(&[101, 0, 0, 0], Some(false)), First::Packet);
        assert_eq!(First::judge(b"GET ", Some(false)), First::Other);
    }
}
