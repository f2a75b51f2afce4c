//! Decodes values of the databases: Go's uvarint, protobuf's Any, text.

/// Returns field 2 (`value`) of a `google.protobuf.Any`.
pub(super) fn any_value(mut any: &[u8]) -> Option<&[u8]> {
    let mut found = None;
    while !any.is_empty() {
        let (tag, rest) = split_uvarint(any)?;
        // Both fields of the message are length-delimited.
        if tag & 7 != 2 {
            return None;
        }
        let (len, rest) = split_uvarint(rest)?;
        let (value, rest) = rest.split_at_checked(usize::try_from(len).ok()?)?;
        if tag >> 3 == 2 {
            found = Some(value);
        }
        any = rest;
    }
    found
}

pub(super) fn uvarint(bytes: &[u8]) -> Option<u64> {
    split_uvarint(bytes).map(|(value, _)| value)
}

fn split_uvarint(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let mut value = 0;
    for (at, &byte) in bytes.iter().enumerate().take(10) {
        let bits = u64::from(byte & 0x7f);
        let shift = 7 * at as u32;
        if bits.leading_zeros() < shift {
            return None;
        }
        value |= bits << shift;
        if byte & 0x80 == 0 {
            return Some((value, &bytes[at + 1..]));
        }
    }
    None
}

pub(super) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uvarints_are_bounded() {
        let cases: &[(&[u8], Option<u64>)] = &[
            (&[5], Some(5)),
            (&[0x80, 1], Some(128)),
            (
                &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1],
                Some(u64::MAX),
            ),
            (
                &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2],
                None,
            ),
            (&[0x80; 11], None),
            (&[0x80], None),
            (&[], None),
        ];
        for (bytes, expected) in cases {
            assert_eq!(uvarint(bytes), *expected, "{bytes:?}");
        }
    }

    #[test]
    fn an_any_gives_its_value_and_garbage_gives_none() {
        assert_eq!(any_value(b"\x0a\x01u\x12\x02{}"), Some(b"{}".as_slice()));
        assert_eq!(any_value(b"\x12\x00"), Some(b"".as_slice()));
        for bad in [
            b"".as_slice(),
            b"\x0a\x01u",
            b"\x12\x05{}",
            b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
            b"\x08\x01",
        ] {
            assert_eq!(any_value(bad), None, "{bad:?}");
        }
    }
}
