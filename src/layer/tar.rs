//! Tar headers: ustar where an entry fits, PAX records (POSIX.1-2001) only where it does not.

use crate::layer::scan::Xattr;

/// Size of a tar record in bytes.
pub(crate) const RECORD: u64 = 512;
/// Size in bytes of the end of an archive, which is two zero records.
pub(crate) const END: u64 = 2 * RECORD;

/// Largest value of an 11-digit octal field (sizes, times): 8 GiB less one.
const MAX_OCTAL_11: u64 = 0o777_7777_7777;
/// Largest value of a 7-digit octal field (ids, device numbers).
const MAX_OCTAL_7: u32 = 0o777_7777;

/// The fields of a header. Byte strings are written unchanged: names need not be UTF-8.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Header<'a> {
    /// Path in the archive: no leading slash, a directory's path ends in a slash.
    pub(crate) path: &'a [u8],
    /// `0` file, `1` hard link, `2` symlink, `3` character and `4` block device, `5` directory, `6` FIFO.
    pub(crate) typeflag: u8,
    /// Low 12 bits of the mode.
    pub(crate) mode: u16,
    /// Owner.
    pub(crate) uid: u32,
    /// Group.
    pub(crate) gid: u32,
    /// Bytes of content that follow.
    pub(crate) size: u64,
    /// Seconds since the epoch.
    pub(crate) mtime: i64,
    /// Nanoseconds after that; layers of saves have none.
    pub(crate) mtime_nanos: u32,
    /// Target of a link.
    pub(crate) link: &'a [u8],
    /// Major and minor number of a device.
    pub(crate) device: (u32, u32),
    /// Extended attributes, sorted by name.
    pub(crate) xattrs: &'a [Xattr],
}

impl Header<'_> {
    /// Returns the length in bytes of the output of [`Header::write`].
    pub(crate) fn encoded_len(&self) -> u64 {
        match self.pax_records().len() as u64 {
            0 => RECORD,
            len => RECORD + len.next_multiple_of(RECORD) + RECORD,
        }
    }

    /// Appends the header, preceded by a PAX extended header if one is needed.
    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        let records = self.pax_records();
        if !records.is_empty() {
            // The name is for programs without PAX support; others never show it.
            let name = self.path.strip_suffix(b"/").unwrap_or(self.path);
            let name = name.rsplit(|&b| b == b'/').next().unwrap_or(name);
            let mut path = b"PaxHeaders.0/".to_vec();
            path.extend(
                name.iter()
                    .filter(|b| b.is_ascii_graphic())
                    .take(100 - path.len()),
            );
            let size = records.len() as u64;
            Header {
                path: &path,
                typeflag: b'x',
                size,
                ..Header::EMPTY
            }
            .write_ustar(out);
            out.extend(&records);
            out.resize(
                out.len() + (size.next_multiple_of(RECORD) - size) as usize,
                0,
            );
        }
        self.write_ustar(out);
    }

    /// An empty file without a name.
    pub(crate) const EMPTY: Header<'static> = Header {
        path: b"",
        typeflag: b'0',
        mode: 0,
        uid: 0,
        gid: 0,
        size: 0,
        mtime: 0,
        mtime_nanos: 0,
        link: b"",
        device: (0, 0),
        xattrs: &[],
    };

    /// Returns the PAX records that this header needs, sorted by key; empty if ustar can represent all fields.
    fn pax_records(&self) -> Vec<u8> {
        let mut records = Vec::new();
        for (name, value) in self.xattrs {
            record(
                &mut records,
                &[b"SCHILY.xattr.", name.as_slice()].concat(),
                value,
            );
        }
        if self.gid > MAX_OCTAL_7 {
            record(&mut records, b"gid", self.gid.to_string().as_bytes());
        }
        if self.link.len() > 100 || !self.link.is_ascii() {
            record(&mut records, b"linkpath", self.link);
        }
        let in_octal = u64::try_from(self.mtime).is_ok_and(|t| t <= MAX_OCTAL_11);
        if !in_octal || self.mtime_nanos > 0 {
            record(&mut records, b"mtime", self.pax_time().as_bytes());
        }
        if !self.path.is_ascii() || split(self.path).is_none() {
            record(&mut records, b"path", self.path);
        }
        if self.size > MAX_OCTAL_11 {
            record(&mut records, b"size", self.size.to_string().as_bytes());
        }
        if self.uid > MAX_OCTAL_7 {
            record(&mut records, b"uid", self.uid.to_string().as_bytes());
        }
        records
    }

    /// Returns the time in decimal seconds.
    fn pax_time(&self) -> String {
        match (self.mtime, self.mtime_nanos) {
            (seconds, 0) => seconds.to_string(),
            (seconds @ 0.., nanos) => format!("{seconds}.{nanos:09}"),
            // The nanoseconds count up from the seconds, the digits of a negative number down.
            (seconds, nanos) => format!("-{}.{:09}", -(seconds + 1), 1_000_000_000 - nanos),
        }
    }

    fn write_ustar(&self, out: &mut Vec<u8>) {
        let mut header = ::tar::Header::new_ustar();
        let ascii =
            |bytes: &[u8]| -> Vec<u8> { bytes.iter().copied().filter(u8::is_ascii).collect() };
        let fields = header.as_mut_bytes();
        let mut put = |at: usize, len: usize, bytes: &[u8]| {
            let n = bytes.len().min(len);
            fields[at..at + n].copy_from_slice(&bytes[..n]);
        };
        match split(self.path) {
            Some((prefix, name)) if self.path.is_ascii() => {
                put(0, 100, name);
                put(345, 155, prefix);
            }
            _ => put(0, 100, &ascii(self.path)),
        }
        let or_zero = |value: u64, max: u64| if value > max { 0 } else { value };
        put(100, 8, format!("{:07o}\0", self.mode).as_bytes());
        put(
            108,
            8,
            format!("{:07o}\0", or_zero(self.uid.into(), MAX_OCTAL_7.into())).as_bytes(),
        );
        put(
            116,
            8,
            format!("{:07o}\0", or_zero(self.gid.into(), MAX_OCTAL_7.into())).as_bytes(),
        );
        put(
            124,
            12,
            format!("{:011o}\0", or_zero(self.size, MAX_OCTAL_11)).as_bytes(),
        );
        let mtime = u64::try_from(self.mtime).map_or(0, |t| or_zero(t, MAX_OCTAL_11));
        put(136, 12, format!("{mtime:011o}\0").as_bytes());
        put(156, 1, &[self.typeflag]);
        put(157, 100, &ascii(self.link));
        put(329, 8, format!("{:07o}\0", self.device.0).as_bytes());
        put(337, 8, format!("{:07o}\0", self.device.1).as_bytes());
        header.set_cksum();
        out.extend_from_slice(header.as_bytes());
    }
}

/// Appends a record `LENGTH KEY=VALUE\n`; the length includes its own digits.
fn record(out: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut len = rest + rest.to_string().len();
    if rest + len.to_string().len() != len {
        len = rest + len.to_string().len();
    }
    out.extend(len.to_string().as_bytes());
    out.push(b' ');
    out.extend(key);
    out.push(b'=');
    out.extend(value);
    out.push(b'\n');
}

/// Splits a path into prefix and name for ustar's two fields; returns `None` if it does not fit.
fn split(path: &[u8]) -> Option<(&[u8], &[u8])> {
    if path.len() <= 100 {
        return Some((b"", path));
    }
    if path.len() > 256 {
        return None;
    }
    // The last slash that leaves a prefix of at most 155 bytes, excluding a directory's trailing slash.
    let cut = path[..path.len() - 1]
        .iter()
        .take(156)
        .rposition(|&b| b == b'/')?;
    let (prefix, name) = (&path[..cut], &path[cut + 1..]);
    (!prefix.is_empty() && name.len() <= 100).then_some((prefix, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(header: Header<'_>) -> Vec<u8> {
        let mut out = Vec::new();
        header.write(&mut out);
        assert_eq!(out.len() as u64, header.encoded_len());
        out
    }

    /// Returns path, link and time of a header as the `tar` crate reads it.
    fn read_back(header: Header<'_>) -> std::io::Result<(Vec<u8>, Option<Vec<u8>>, i64)> {
        let mut bytes = encoded(header);
        bytes.resize(bytes.len() + header.size.min(1024) as usize + 1024, 0);
        let mut archive = ::tar::Archive::new(bytes.as_slice());
        let mut entry = archive
            .entries()?
            .next()
            .ok_or(std::io::ErrorKind::NotFound)??;
        let mut mtime = entry.header().mtime()? as i64;
        for extension in entry.pax_extensions()?.into_iter().flatten() {
            let extension = extension?;
            if extension.key_bytes() == b"mtime" {
                mtime = extension
                    .value()
                    .ok()
                    .and_then(|v| v.parse().ok())
                    .unwrap_or(mtime);
            }
        }
        let link = entry.link_name_bytes().map(std::borrow::Cow::into_owned);
        Ok((entry.path_bytes().into_owned(), link, mtime))
    }

    #[test]
    fn every_name_comes_back() -> std::io::Result<()> {
        let deep = format!("{}/{}", "d".repeat(150), "f".repeat(100));
        let long = format!("{}/", vec!["x".repeat(99); 3].join("/"));
        let names: [&[u8]; 8] = [
            b"a",
            b"dir/",
            deep.as_bytes(),
            long.as_bytes(),
            &[b'n'; 255],
            "h\u{e9}llo".as_bytes(),
            b"not\xffutf8",
            b"new\nline",
        ];
        for path in names {
            assert_eq!(
                read_back(Header {
                    path,
                    ..Header::EMPTY
                })?
                .0,
                path
            );
            let linked = read_back(Header {
                path: b"l",
                typeflag: b'2',
                link: path,
                ..Header::EMPTY
            })?;
            assert_eq!(linked.1.as_deref(), Some(path));
        }
        Ok(())
    }

    #[test]
    fn ustar_where_it_fits() {
        let deep = format!("{}/{}", "d".repeat(155), "f".repeat(100));
        for (path, len) in [
            ("a", 512),
            (deep.as_str(), 512),
            (&format!("{deep}x"), 2048 - 512),
        ] {
            assert_eq!(
                encoded(Header {
                    path: path.as_bytes(),
                    ..Header::EMPTY
                })
                .len(),
                len,
                "{path}"
            );
        }
        assert_eq!(
            encoded(Header {
                path: b"a",
                uid: 2_097_151,
                mtime: 0o777_7777_7777,
                ..Header::EMPTY
            })
            .len(),
            512
        );
        for header in [
            Header {
                uid: 2_097_152,
                ..Header::EMPTY
            },
            Header {
                gid: 2_097_152,
                ..Header::EMPTY
            },
            Header {
                mtime: -1,
                ..Header::EMPTY
            },
            Header {
                mtime: 1 << 33,
                ..Header::EMPTY
            },
            Header {
                size: 8 << 30,
                ..Header::EMPTY
            },
        ] {
            assert_eq!(encoded(header).len(), 1536, "{header:?}");
        }
    }

    #[test]
    fn times_before_1970_and_after_2242() -> std::io::Result<()> {
        for mtime in [-86_400, 0, 1 << 31, 1 << 40] {
            assert_eq!(
                read_back(Header {
                    path: b"a",
                    mtime,
                    ..Header::EMPTY
                })?
                .2,
                mtime
            );
        }
        Ok(())
    }

    #[test]
    fn record_length_counts_its_own_digits() {
        // At 99 and 999, one more digit changes the length again.
        for value_len in 0..1100 {
            let mut out = Vec::new();
            record(&mut out, b"k", &vec![b'v'; value_len]);
            let space = out.iter().position(|&b| b == b' ').unwrap();
            let said: usize = std::str::from_utf8(&out[..space]).unwrap().parse().unwrap();
            assert_eq!(said, out.len(), "value of {value_len}");
        }
    }
}
