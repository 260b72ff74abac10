//! A fuzzer's bytes, taken one number at a time.

/// What is left of an input.
pub(super) struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    pub(super) fn new(input: &'a [u8]) -> Self {
        Self(input)
    }

    /// The next `N` bytes; none: the input is at its end.
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*taken)
    }

    pub(super) fn byte(&mut self) -> Option<u8> {
        self.take::<1>().map(|[byte]| byte)
    }

    pub(super) fn half(&mut self) -> Option<u16> {
        self.take().map(u16::from_le_bytes)
    }

    /// A number of 1, 2, 4 or 8 bytes, shifted, as the byte before it says: most numbers that matter
    /// are small, or a power of two, or next to one.
    pub(super) fn number(&mut self) -> Option<u64> {
        let how = self.byte()?;
        let number = match how & 3 {
            0 => self.byte()?.into(),
            1 => self.half()?.into(),
            2 => u32::from_le_bytes(self.take()?).into(),
            _ => u64::from_le_bytes(self.take()?),
        };
        let shifted = number << (how >> 2 & 31);
        Some(if how & 0x80 == 0 { shifted } else { shifted.wrapping_neg() })
    }

    /// As many bytes as the two before them say, or what there is, at most.
    pub(super) fn text(&mut self) -> Option<&'a [u8]> {
        let len = usize::from(self.half()?).min(self.0.len());
        let (taken, rest) = self.0.split_at(len);
        self.0 = rest;
        Some(taken)
    }

    pub(super) fn rest(self) -> &'a [u8] {
        self.0
    }
}
