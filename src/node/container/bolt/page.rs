//! Branch and leaf pages.

pub(super) const PAGE_HEADER: usize = 16;

pub(super) const ELEMENT: usize = 16;

pub(super) const FLAG_BRANCH: u16 = 0x01;

pub(super) const FLAG_LEAF: u16 = 0x02;

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Branch,
    Leaf,
}

/// A branch or leaf page. All offsets in it are checked against its length before use.
pub(super) struct Page<'p> {
    pub(super) bytes: &'p [u8],
    pub(super) kind: Kind,
    pub(super) count: usize,
}

impl<'p> Page<'p> {
    pub(super) fn parse(bytes: &'p [u8]) -> Result<Self, String> {
        if bytes.len() < PAGE_HEADER {
            return Err(format!("{} bytes are no page", bytes.len()));
        }
        let kind = match u16_at(bytes, 8) {
            flags if flags & FLAG_LEAF != 0 => Kind::Leaf,
            flags if flags & FLAG_BRANCH != 0 => Kind::Branch,
            flags => {
                return Err(format!(
                    "flags {flags:#x} are neither of a branch nor of a leaf"
                ));
            }
        };
        let count = usize::from(u16_at(bytes, 10));
        if PAGE_HEADER + count * ELEMENT > bytes.len() {
            return Err(format!("{count} elements in {} bytes", bytes.len()));
        }
        if kind == Kind::Branch && count == 0 {
            return Err("a branch without children".to_owned());
        }
        Ok(Self { bytes, kind, count })
    }

    /// Returns `len` bytes at `pos`, which is relative to the start of the element.
    pub(super) fn slice(&self, element: usize, pos: u32, len: u32) -> Result<&'p [u8], String> {
        let start = element + pos as usize;
        start
            .checked_add(len as usize)
            .and_then(|end| self.bytes.get(start..end))
            .ok_or_else(|| {
                format!(
                    "a key or value of {len} bytes at {start} of {}",
                    self.bytes.len()
                )
            })
    }

    pub(super) fn key(&self, at: usize) -> Result<&'p [u8], String> {
        let element = PAGE_HEADER + at * ELEMENT;
        match self.kind {
            Kind::Branch => self.slice(
                element,
                u32_at(self.bytes, element),
                u32_at(self.bytes, element + 4),
            ),
            Kind::Leaf => self.slice(
                element,
                u32_at(self.bytes, element + 4),
                u32_at(self.bytes, element + 8),
            ),
        }
    }

    /// Returns flags, key and value.
    pub(super) fn leaf(&self, at: usize) -> Result<(u32, &'p [u8], &'p [u8]), String> {
        let element = PAGE_HEADER + at * ELEMENT;
        let (pos, key_len) = (
            u32_at(self.bytes, element + 4),
            u32_at(self.bytes, element + 8),
        );
        let key = self.slice(element, pos, key_len)?;
        let value_pos = pos
            .checked_add(key_len)
            .ok_or_else(|| format!("a key of {key_len} bytes"))?;
        let value = self.slice(element, value_pos, u32_at(self.bytes, element + 12))?;
        Ok((u32_at(self.bytes, element), key, value))
    }

    pub(super) fn child(&self, at: usize) -> Result<u64, String> {
        if at >= self.count {
            return Err(format!("child {at} of {}", self.count));
        }
        Ok(u64_at(self.bytes, PAGE_HEADER + at * ELEMENT + 8))
    }

    /// Returns the index of the first element whose key is not less than `key`.
    pub(super) fn lower_bound(&self, key: &[u8]) -> Result<usize, String> {
        let (mut low, mut high) = (0, self.count);
        while low < high {
            let middle = low.midpoint(high);
            if self.key(middle)? < key {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        Ok(low)
    }
}

// The callers check the length.
pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
