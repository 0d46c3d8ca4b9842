//! The two bulk pipes of an interface: transfers to messages, and messages to transfers.

use std::collections::VecDeque;
use std::fmt;

use vscard_protocol::{Secret, Validity};

use crate::message::{self, HEADER, Header, REFUSED};

/// Answers unread or owed that an interface may have before it refuses further messages.
pub(crate) const MOST_ANSWERS: usize = 64;
/// Bytes of unread answers before an interface refuses further messages.
pub(crate) const MOST_BYTES: usize = 1 << 20;
/// Transfers that can still be given back.
const MOST_HANDED: usize = 32;
/// Packet size of a bulk pipe at full speed, in bytes. A high-speed reader behind a full-speed controller
/// (QEMU's UHCI) gets such packets as transfers of their own, so a transfer of whole ones may go on at any
/// speed.
pub(crate) const SMALLEST_PACKET: u16 = 64;
/// What a queue can hold at most: a time extension for each of 16 slots and what was given back included.
pub(crate) const MOST_ITEMS: usize = MOST_ANSWERS + 16 + MOST_HANDED;

/// What a bulk-OUT transfer came to.
#[derive(Debug)]
pub(crate) enum Assembled<'a> {
    /// Nothing yet.
    More,
    /// A whole message: its header and abData.
    Message(Header, Data<'a>),
    /// A message whose dwLength is wrong.
    WrongLength(Header),
    /// Too short for a header.
    Runt,
}

/// abData of a message.
pub(crate) enum Data<'a> {
    /// It came in one transfer.
    Whole(&'a [u8]),
    /// It came in several; the header is in front.
    Gathered(Secret),
}

impl fmt::Debug for Data<'_> {
    /// The length; a PIN may be in it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Data({} bytes)", self.expose().len())
    }
}

impl Data<'_> {
    pub(crate) fn expose(&self) -> &[u8] {
        match self {
            Self::Whole(data) => data,
            Self::Gathered(message) => message.expose().get(HEADER..).unwrap_or_default(),
        }
    }
}

/// Puts bulk-OUT transfers together to messages.
///
/// A message ends where dwLength says, and with a short packet in any case (USB CCID 1.1 §3.1.2, USB 2.0
/// §5.8.3): a transfer that is no multiple of the packet size ends the message it belongs to, complete or
/// not.
#[derive(Debug, Default)]
pub(crate) struct Assembler {
    /// What came of a message so far.
    pub(crate) gathered: Secret,
    /// Bytes to throw away, of a message that was refused.
    pub(crate) skip: u64,
}

impl Assembler {
    /// One transfer. Holds at most `max_message` bytes between calls.
    pub(crate) fn push<'a>(&mut self, data: &'a [u8], packet: u16, max_message: u32) -> Assembled<'a> {
        let ended = data.len() % usize::from(packet) != 0 || data.is_empty();
        if self.skip > 0 {
            self.skip = if ended { 0 } else { self.skip.saturating_sub(data.len() as u64) };
            return Assembled::More;
        }
        let first = self.gathered.is_empty();
        if first && data.is_empty() {
            // The packet of no bytes that ends a message of whole packets.
            return Assembled::More;
        }
        let length = self.gathered.len() + data.len();
        let header = Header::parse(if first { data } else { self.gathered.expose() });
        let Some(header) = header else { return Assembled::Runt };
        let wanted = HEADER as u64 + u64::from(header.length);
        if wanted > u64::from(max_message) || length as u64 > wanted {
            if !ended {
                // What is longer than it says ends with a short packet only.
                self.skip = wanted.checked_sub(length as u64).unwrap_or(u64::MAX);
            }
            self.gathered = Secret::default();
            return Assembled::WrongLength(header);
        }
        if length as u64 == wanted {
            return Assembled::Message(
                header,
                if first {
                    Data::Whole(data.get(HEADER..).unwrap_or_default())
                } else {
                    let mut gathered = std::mem::take(&mut self.gathered);
                    gathered.extend(data);
                    Data::Gathered(gathered)
                },
            );
        }
        if ended {
            self.gathered = Secret::default();
            return Assembled::WrongLength(header);
        }
        self.gathered.extend(data);
        Assembled::More
    }
}

/// Answers on their way to the bulk-IN pipe, in order.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    items: VecDeque<Item>,
    /// Bytes in `items`.
    bytes: usize,
    /// Transfers handed out since the queue was last cleared, oldest first.
    handed: VecDeque<Handed>,
    /// A packet of no bytes is due: the slot whose answer it ends.
    ending: Option<u8>,
}

#[derive(Debug)]
pub(crate) struct Item {
    /// bSlot of the answer.
    pub(crate) slot: u8,
    pub(crate) bytes: Secret,
    /// Bytes handed out already.
    pub(crate) offset: usize,
    /// Whether `bytes` are a whole answer, not what was given back of one.
    pub(crate) is_whole: bool,
    /// For how long it may be read.
    pub(crate) validity: Validity,
}

impl Item {
    /// What the guest gets of a response that may not be read any more, or not elsewhere. Of one that it has begun to
    /// read, it knows the length.
    pub(crate) fn refused(&self) -> Self {
        let bytes = self.bytes.expose();
        let refused = match bytes.first_chunk() {
            Some(header) if self.is_whole && !self.is_started() => message::refused(*header),
            _ => {
                let known = if self.is_whole { bytes.len().min(HEADER) } else { 0 };
                let (header, rest) = bytes.split_at(known);
                let mut refused = [header, &vec![0; rest.len()]].concat();
                if let Some(end) = refused.get_mut(known..).and_then(<[u8]>::last_chunk_mut) {
                    *end = REFUSED;
                }
                Secret::new(refused)
            }
        };
        Self { bytes: refused, validity: Validity::default(), ..*self }
    }

    fn is_started(&self) -> bool {
        !self.is_whole || self.offset > 0
    }
}

/// What is known of a transfer that was handed out, should it come back.
#[derive(Debug)]
struct Handed {
    slot: u8,
    length: usize,
    /// The header, or as much of it as there was, if it began an answer.
    header: Option<[u8; HEADER]>,
    /// It was the last of its answer.
    ends: bool,
    validity: Validity,
}

impl Handed {
    /// Whether `data` can be what it was.
    fn is(&self, data: &[u8]) -> bool {
        let same = |header: &[u8; HEADER]| data.iter().zip(header).all(|(byte, of)| byte == of);
        self.length == data.len() && self.header.as_ref().is_none_or(same)
    }
}

/// Whether an answer has as many bytes as its header says.
fn is_whole(answer: &[u8]) -> bool {
    Header::parse(answer)
        .is_some_and(|header| answer.len() as u64 == HEADER as u64 + u64::from(header.length))
}

impl Queue {
    pub(crate) fn push(&mut self, slot: u8, bytes: Secret, validity: Validity) {
        self.bytes += bytes.len();
        self.items.push_back(Item { slot, bytes, offset: 0, is_whole: true, validity });
    }

    pub(crate) fn len(&self) -> usize {
        self.items.len()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.ending.is_some() || !self.items.is_empty()
    }

    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }

    /// One transfer of at most `max` bytes.
    ///
    /// An answer that fills its transfer with whole packets is followed by a packet of no bytes (USB 2.0
    /// §5.8.3): a guest that split a long read into several waits in the next one for the end of the
    /// answer. A response whose validity has ended is not given, but refused.
    pub(crate) fn take(&mut self, max: usize, packet: u16) -> Option<Secret> {
        if let Some(slot) = self.ending.take() {
            let validity = Validity::default();
            self.remember(Handed { slot, length: 0, header: None, ends: true, validity });
            return Some(Secret::default());
        }
        let item = self.items.front_mut()?;
        if item.validity.has_ended() {
            self.bytes -= item.bytes.len();
            *item = item.refused();
            self.bytes += item.bytes.len();
        }
        let (slot, left) = (item.slot, item.bytes.len() - item.offset);
        let length = left.min(max);
        let header = if item.is_started() { None } else { item.bytes.expose().first_chunk().copied() };
        let validity = item.validity.clone();
        let handed = Handed { slot, length, header, ends: length == left, validity };
        let data = if length == item.bytes.len() {
            std::mem::take(&mut item.bytes)
        } else {
            let data = item.bytes.expose().get(item.offset..item.offset + length);
            Secret::from(data.unwrap_or_default())
        };
        item.offset += length;
        if handed.ends {
            let whole = item.bytes.len().max(length);
            self.items.pop_front();
            self.bytes -= whole;
            if length == max && max % usize::from(packet) == 0 {
                self.ending = Some(slot);
            }
        }
        self.remember(handed);
        Some(data)
    }

    /// Of the newest transfer.
    pub(crate) fn last_validity(&self) -> Validity {
        self.handed.back().map(|handed| handed.validity.clone()).unwrap_or_default()
    }

    fn remember(&mut self, handed: Handed) {
        if self.handed.len() == MOST_HANDED {
            self.handed.pop_front();
        }
        self.handed.push_back(handed);
    }

    /// Takes back a transfer that the guest did not get. One that was not handed out since the queue was last
    /// cleared is dropped.
    pub(crate) fn give_back(&mut self, data: Secret) {
        let Some(index) = self.handed.iter().rposition(|handed| handed.is(data.expose())) else { return };
        let newest = index + 1 == self.handed.len();
        let Some(handed) = self.handed.remove(index) else { return };
        if handed.length == 0 {
            self.ending = Some(handed.slot);
            return;
        }
        let begins = handed.header.is_some();
        match self.items.front_mut() {
            // The rest of the same answer is in front.
            Some(front) if newest && !handed.ends => {
                if let Some(offset) = front.offset.checked_sub(data.len()) {
                    front.offset = offset;
                } else if front.offset == 0 {
                    self.bytes += data.len();
                    let mut joined = data;
                    joined.extend(front.bytes.expose());
                    front.is_whole = begins && is_whole(joined.expose());
                    front.validity = handed.validity;
                    front.bytes = joined;
                }
                return;
            }
            _ if newest => self.ending = None,
            _ => {}
        }
        self.bytes += data.len();
        let is_whole = begins && is_whole(data.expose());
        let Handed { slot, validity, .. } = handed;
        self.items.push_front(Item { slot, bytes: data, offset: 0, is_whole, validity });
    }

    /// The host has sent a command to `slot`, so it waits for the end of no answer from there.
    pub(crate) fn command_came(&mut self, slot: u8) {
        if self.ending == Some(slot) {
            self.ending = None;
        }
    }

    /// Drops the time extensions of `slot` that were not read.
    pub(crate) fn drop_extensions(&mut self, slot: u8) {
        self.drop_unread(slot, message::is_time_extension);
    }

    /// Drops the answers of `slot` that were not read, but those that say that a command was aborted.
    pub(crate) fn drop_answers(&mut self, slot: u8) {
        self.drop_unread(slot, |answer| !message::is_aborted(answer));
    }

    fn drop_unread(&mut self, slot: u8, which: impl Fn(&[u8]) -> bool) {
        let bytes = &mut self.bytes;
        self.items.retain(|item| {
            let keep = item.slot != slot || item.is_started() || !which(item.bytes.expose());
            if !keep {
                *bytes -= item.bytes.len();
            }
            keep
        });
    }

    /// Whether a time extension of `slot` waits to be read.
    pub(crate) fn has_extension(&self, slot: u8) -> bool {
        self.items.iter().any(|item| {
            item.slot == slot && !item.is_started() && message::is_time_extension(item.bytes.expose())
        })
    }

    pub(crate) fn items(&self) -> impl Iterator<Item = &Item> {
        self.items.iter()
    }

    pub(crate) fn ending(&self) -> Option<u8> {
        self.ending
    }

    /// A queue as it was saved.
    pub(crate) fn restored(items: Vec<Item>, ending: Option<u8>) -> Self {
        let bytes = items.iter().map(|item| item.bytes.len()).sum();
        Self { items: items.into(), bytes, handed: VecDeque::new(), ending }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(data: usize) -> Vec<u8> {
        let mut bytes = vec![0x6F, 0, 0, 0, 0, 0, 9, 0, 0, 0];
        bytes[1..5].copy_from_slice(&(data as u32).to_le_bytes());
        bytes.extend((0..data).map(|index| index as u8));
        bytes
    }

    fn whole(assembled: &Assembled<'_>) -> Vec<u8> {
        match assembled {
            Assembled::Message(_, data) => data.expose().to_vec(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_message_in_any_pieces() {
        let bytes = message(300);
        for size in [64, 128, 192, 256, 310] {
            let mut assembler = Assembler::default();
            let mut pieces = bytes.chunks(size).peekable();
            while let Some(piece) = pieces.next() {
                let assembled = assembler.push(piece, 64, 310);
                if pieces.peek().is_none() {
                    assert_eq!(whole(&assembled), &bytes[10..]);
                } else {
                    assert!(matches!(assembled, Assembled::More));
                }
            }
        }
    }

    #[test]
    fn whole_packets_need_no_empty_one_and_may_have_it() {
        let mut assembler = Assembler::default();
        let bytes = message(54);
        for _ in 0..2 {
            assert_eq!(whole(&assembler.push(&bytes, 64, 310)).len(), 54);
            assert!(matches!(assembler.push(&[], 64, 310), Assembled::More));
        }
    }

    #[test]
    fn a_short_packet_ends_a_message() {
        let mut assembler = Assembler::default();
        let bytes = message(200);
        assert!(matches!(assembler.push(&bytes[..128], 64, 310), Assembled::More));
        assert!(matches!(assembler.push(&bytes[128..140], 64, 310), Assembled::WrongLength(_)));
        assert_eq!(whole(&assembler.push(&bytes[..210], 64, 310)).len(), 200);
        assert!(matches!(assembler.push(&bytes[..9], 64, 310), Assembled::Runt));
        // Cut short by a packet of no bytes.
        assert!(matches!(assembler.push(&bytes[..128], 64, 310), Assembled::More));
        assert!(matches!(assembler.push(&[], 64, 310), Assembled::WrongLength(_)));
    }

    #[test]
    fn a_message_too_long_is_refused_once_and_skipped() {
        let mut assembler = Assembler::default();
        let bytes = message(1000);
        assert!(matches!(assembler.push(&bytes[..64], 64, 310), Assembled::WrongLength(_)));
        for piece in bytes[64..].chunks(64) {
            assert!(matches!(assembler.push(piece, 64, 310), Assembled::More));
        }
        assert_eq!(whole(&assembler.push(&message(5), 64, 310)).len(), 5);
        // More than it says.
        let mut long = message(5);
        long.resize(64, 0);
        assert!(matches!(assembler.push(&long, 64, 310), Assembled::WrongLength(_)));
        assert!(matches!(assembler.push(&long, 64, 310), Assembled::More));
        assert!(matches!(assembler.push(&[1, 2, 3], 64, 310), Assembled::More));
        assert_eq!(whole(&assembler.push(&message(5), 64, 310)).len(), 5);
    }

    fn queue(lengths: &[usize]) -> Queue {
        let mut queue = Queue::default();
        for &length in lengths {
            queue.push(0, Secret::new(message(length - 10)), Validity::default());
        }
        queue
    }

    fn lengths(queue: &mut Queue, max: usize) -> Vec<usize> {
        std::iter::from_fn(|| queue.take(max, 64)).map(|data| data.len()).collect()
    }

    #[test]
    fn a_full_last_transfer_is_ended_by_an_empty_one() {
        assert_eq!(lengths(&mut queue(&[128, 20]), 64), [64, 64, 0, 20]);
        assert_eq!(lengths(&mut queue(&[128, 20]), 128), [128, 0, 20]);
        // A short return is end enough, as is a read that cannot end at a packet's end.
        assert_eq!(lengths(&mut queue(&[128, 20]), 192), [128, 20]);
        assert_eq!(lengths(&mut queue(&[20, 20]), 20), [20, 20]);
    }

    #[test]
    fn a_new_command_makes_the_empty_one_unneeded() {
        let mut queue = queue(&[64]);
        assert_eq!(queue.take(64, 64).unwrap().len(), 64);
        queue.command_came(1);
        assert!(queue.is_ready());
        queue.command_came(0);
        assert!(!queue.is_ready());
    }

    #[test]
    fn what_is_given_back_comes_again_in_order() {
        let all = |queue: &mut Queue| {
            let mut bytes = Vec::new();
            while let Some(data) = queue.take(1000, 64) {
                bytes.push(data.expose().to_vec());
            }
            bytes
        };
        for pieces in 1..6 {
            let mut queue = queue(&[150, 128, 20]);
            let mut taken: Vec<Secret> = (0..pieces).filter_map(|_| queue.take(64, 64)).collect();
            while let Some(data) = taken.pop() {
                queue.give_back(data);
            }
            assert_eq!(all(&mut queue), [message(140), message(118), message(10)], "{pieces} pieces");
            assert_eq!(queue.bytes(), 0);
        }
        let mut queue = queue(&[150]);
        let data = queue.take(1000, 64).unwrap();
        queue.clear();
        queue.give_back(data);
        assert!(!queue.is_ready(), "an answer from before the queue was cleared");
    }

    #[test]
    fn answers_of_one_length_are_told_apart() {
        let mut queue = Queue::default();
        for slot in 0..3 {
            let mut bytes = message(0);
            bytes[5] = slot;
            queue.push(slot, Secret::new(bytes), Validity::default());
        }
        let taken: Vec<Secret> = (0..3).filter_map(|_| queue.take(64, 64)).collect();
        // The guest got the last.
        for data in taken.into_iter().take(2).rev() {
            queue.give_back(data);
        }
        assert_eq!(queue.items().map(|item| item.slot).collect::<Vec<_>>(), [0, 1]);
        assert!(queue.items().all(|item| item.is_whole && item.bytes.expose()[5] == item.slot));
    }
}
