//! Packets that nothing shows to have been read: there has been no sign of life since they were sent.

use std::collections::VecDeque;

use vscard_protocol::{Secret, Validity};

/// Packets kept, should the QEMU they went to have stopped before it read them.
const MOST_UNREAD: usize = 256;
/// Bytes of them.
const MOST_UNREAD_BYTES: usize = 512 * 1024;

#[derive(Default)]
pub(super) struct Unread {
    /// The id of the request, for an answer; the bytes; for how long they may be read.
    packets: VecDeque<(Option<u64>, Secret, Validity)>,
    bytes: usize,
}

impl Unread {
    pub(super) fn push(&mut self, id: Option<u64>, packet: &Secret) {
        self.bytes += packet.len();
        self.packets.push_back((id, packet.clone(), Validity::default()));
        while self.packets.len() > MOST_UNREAD || self.bytes > MOST_UNREAD_BYTES {
            let Some((_, packet, _)) = self.packets.pop_front() else { return };
            self.bytes -= packet.len();
        }
    }

    /// The newest may be read only as long as that.
    pub(super) fn limit(&mut self, to: Validity) {
        if let Some((_, _, validity)) = self.packets.back_mut() {
            *validity = to;
        }
    }

    /// What has that id is asked for anew.
    pub(super) fn drop_answers(&mut self, id: u64) {
        self.packets.retain(|(of, packet, _)| {
            let keep = *of != Some(id);
            self.bytes -= if keep { 0 } else { packet.len() };
            keep
        });
    }

    /// What may still be read, oldest first.
    pub(super) fn valid(self) -> impl Iterator<Item = (Option<u64>, Secret, Validity)> {
        self.packets.into_iter().filter(|(.., validity)| !validity.has_ended())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn what_a_key_gave_is_repeated_only_while_the_pin_is_verified() {
        let repeated = |unread: Unread| unread.valid().filter_map(|(id, ..)| id).collect::<Vec<_>>();
        for verified in [true, false] {
            let pin = Arc::new(());
            let mut unread = Unread::default();
            for id in 1..=4 {
                unread.push(Some(id), &Secret::from(&[0xA5; 10][..]));
                if id == 2 {
                    unread.limit(Validity::of(&pin));
                }
            }
            unread.drop_answers(3);
            assert_eq!(unread.bytes, 30);
            let _verified = verified.then_some(pin);
            assert_eq!(repeated(unread), if verified { vec![1, 2, 4] } else { vec![1, 4] });
        }
    }

    #[test]
    fn only_so_much_is_kept() {
        let mut unread = Unread::default();
        for id in 0..2 * MOST_UNREAD as u64 {
            unread.push(Some(id), &Secret::from(&[0; 10][..]));
        }
        assert_eq!((unread.packets.len(), unread.bytes), (MOST_UNREAD, 10 * MOST_UNREAD));
        unread.push(None, &Secret::from(&vec![0; MOST_UNREAD_BYTES][..]));
        assert_eq!((unread.packets.len(), unread.bytes), (1, MOST_UNREAD_BYTES));
    }
}
