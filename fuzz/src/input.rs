//! A fuzzer's bytes as numbers and blocks. Where they end, all is zero or empty, so that a file that is cut
//! anywhere is an input too.

/// The bytes that are left.
pub(crate) struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn byte(&mut self) -> u8 {
        let Some((byte, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *byte
    }

    /// Little endian.
    pub(crate) fn word(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    /// The item that the next byte chooses.
    pub(crate) fn choose<T: Copy>(&mut self, items: &[T]) -> T {
        items[usize::from(self.byte()) % items.len()]
    }

    /// A length and its bytes. A length byte of 0xFE is followed by a longer one (a word); 0xFF by a block and
    /// by how many bytes more it has, all alike, so that a long one takes few bytes here.
    pub(crate) fn block(&mut self) -> Vec<u8> {
        let length = match self.byte() {
            0xFF => {
                let length = self.byte().into();
                let mut block = self.take(length);
                let more = usize::from(self.word());
                block.resize(block.len() + more, 0x5A);
                return block;
            }
            0xFE => self.word().into(),
            length => length.into(),
        };
        self.take(length)
    }

    fn take(&mut self, length: usize) -> Vec<u8> {
        let (taken, rest) = self.0.split_at(length.min(self.0.len()));
        self.0 = rest;
        taken.to_vec()
    }
}
