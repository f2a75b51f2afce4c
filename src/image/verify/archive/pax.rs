//! Parses the extended headers of pax archives.

use std::collections::BTreeMap;

use crate::image::verify::tree::Time;
use crate::image::verify::vis;

#[derive(Default)]
pub(super) struct PaxHeader {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) uname: Option<Vec<u8>>,
    pub(super) gname: Option<Vec<u8>>,
    pub(super) mtime: Option<Time>,
    pub(super) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub(super) records: Vec<String>,
    pub(super) offset: Option<u64>,
}

/// Parses the records of an extended header: `LENGTH KEYWORD=VALUE\n`, where the length includes itself.
pub(super) fn pax(mut bytes: &[u8], extension: &mut PaxHeader) -> Result<(), String> {
    while !bytes.is_empty() {
        // Some archivers pad with zero bytes.
        if bytes.iter().all(|&b| b == 0) {
            return Ok(());
        }
        let space = bytes
            .iter()
            .take(20)
            .position(|&b| b == b' ')
            .ok_or("an extended header record without length")?;
        let length = text(&bytes[..space])
            .and_then(|t| t.parse::<usize>().ok())
            .unwrap_or(0);
        if length <= space + 1 || length > bytes.len() || bytes[length - 1] != b'\n' {
            return Err(format!(
                "an extended header record of length {length}, {} bytes are left",
                bytes.len()
            ));
        }
        let record = &bytes[space + 1..length - 1];
        bytes = &bytes[length..];
        let equals = record
            .iter()
            .position(|&b| b == b'=')
            .ok_or("an extended header record without =")?;
        let (keyword, value) = (&record[..equals], &record[equals + 1..]);
        if let Some(name) = keyword.strip_prefix(b"SCHILY.xattr.") {
            extension.xattrs.insert(name.to_vec(), value.to_vec());
            continue;
        }
        let bad = || {
            format!(
                "extended header record {} = {:?}",
                vis::encode(keyword),
                vis::encode(value)
            )
        };
        let number = |value: &[u8]| {
            text(value)
                .and_then(|t| t.parse::<u64>().ok())
                .ok_or_else(bad)
        };
        let id = |value: &[u8]| {
            text(value)
                .and_then(|t| t.parse::<u32>().ok())
                .ok_or_else(bad)
        };
        // An empty value cancels an earlier record.
        let some = !value.is_empty();
        match keyword {
            b"path" => extension.path = some.then(|| value.to_vec()),
            b"linkpath" => extension.link = some.then(|| value.to_vec()),
            b"uname" => extension.uname = Some(value.to_vec()),
            b"gname" => extension.gname = Some(value.to_vec()),
            b"size" => extension.size = if some { Some(number(value)?) } else { None },
            b"uid" => extension.uid = if some { Some(id(value)?) } else { None },
            b"gid" => extension.gid = if some { Some(id(value)?) } else { None },
            b"mtime" => {
                extension.mtime = if some {
                    Some(time(value).ok_or_else(bad)?)
                } else {
                    None
                }
            }
            _ if keyword.starts_with(b"GNU.sparse.") => {
                return Err(
                    "GNU sparse files are not supported (the image spec forbids them in layers)"
                        .to_owned(),
                );
            }
            _ => {}
        }
        extension.records.push(vis::encode(keyword));
    }
    Ok(())
}

pub(super) fn text(bytes: &[u8]) -> Option<&str> {
    std::str::from_utf8(bytes).ok()
}

/// Parses decimal seconds with an optional fraction, rounded down to nanoseconds.
pub(super) fn time(value: &[u8]) -> Option<Time> {
    let text = text(value)?;
    let (negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text),
    };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let all_digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
    if whole.is_empty() || !all_digits(whole) || !all_digits(fraction) {
        return None;
    }
    let seconds: i64 = whole.parse().ok()?;
    let padded: String = fraction
        .chars()
        .chain("000000000".chars())
        .take(9)
        .collect();
    let nanos: u32 = padded.parse().ok()?;
    Some(match (negative, nanos) {
        (false, nanos) => Time { seconds, nanos },
        (true, 0) => Time {
            seconds: -seconds,
            nanos: 0,
        },
        (true, nanos) => Time {
            seconds: (-seconds).checked_sub(1)?,
            nanos: 1_000_000_000 - nanos,
        },
    })
}
