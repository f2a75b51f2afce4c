//! Parsers for values of flags: sizes, durations, pairs and paths.

use std::path::PathBuf;
use std::time::Duration;

use crate::save::LayerSize;

pub(super) fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("expected KEY=VALUE".to_owned()),
    }
}

pub(super) fn duration(text: &str) -> Result<Duration, String> {
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    // A day is always 24 hours here, unlike a calendar day.
    let days = text
        .strip_suffix('d')
        .and_then(|days| days.parse::<u32>().ok());
    if let Some(days) = days.filter(|days| *days > 0) {
        return Ok(Duration::from_secs(u64::from(days) * 86_400));
    }
    let parsed = text
        .parse::<jiff::SignedDuration>()
        .ok()
        .and_then(|duration| Duration::try_from(duration).ok());
    parsed
        .filter(|duration| !duration.is_zero())
        .ok_or_else(|| "expected a duration such as 500ms, 30s or 2m".to_owned())
}

/// The time between autosaves: 0 for none, or 1 second to 7 days.
#[cfg(feature = "service")]
pub(super) fn autosave(text: &str) -> Result<Duration, String> {
    between_saves(text, "0, or 1s to 7d", |time| time.is_zero())
}

/// The minimum of that time: 1 second to 7 days.
#[cfg(feature = "service")]
pub(super) fn autosave_min(text: &str) -> Result<Duration, String> {
    between_saves(text, "1s to 7d", |_| false)
}

#[cfg(feature = "service")]
fn between_saves(
    text: &str,
    bounds: &str,
    also: impl Fn(Duration) -> bool,
) -> Result<Duration, String> {
    use crate::service::manager::{LEAST_AUTOSAVE, MOST_AUTOSAVE};
    let time = duration(text)?;
    if (LEAST_AUTOSAVE..=MOST_AUTOSAVE).contains(&time) || also(time) {
        Ok(time)
    } else {
        Err(format!("it is {bounds}"))
    }
}

/// Returns a parser for a path that may be empty, which clap's own parser takes for a missing value.
pub(super) fn any_path() -> impl clap::builder::TypedValueParser<Value = PathBuf> {
    use clap::builder::{OsStringValueParser, TypedValueParser as _};
    OsStringValueParser::new().map(PathBuf::from)
}

/// Parses a size in bytes: a number with K, M, G or T (powers of 1024; `KiB` and `kB` mean the same here).
pub(super) fn size(text: &str) -> Result<u64, String> {
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let unit = unit.trim_start().to_ascii_uppercase();
    let unit = unit
        .strip_suffix("IB")
        .or(unit.strip_suffix('B'))
        .unwrap_or(&unit);
    let shift = ["", "K", "M", "G", "T", "P"]
        .iter()
        .position(|known| *known == unit);
    let value = number
        .parse::<u64>()
        .ok()
        .zip(shift)
        .and_then(|(number, shift)| number.checked_mul(1 << (10 * shift)));
    value.ok_or_else(|| "expected a size such as 4096, 500M, 64G or 4T".to_owned())
}

/// A share of the cores in per cent. What is half of them and more is no floor, but the usual priority.
pub(super) fn floor(text: &str) -> Result<f64, String> {
    let percent = text.strip_suffix('%').unwrap_or(text).parse::<f64>().ok();
    percent
        .filter(|percent| (0.0..=50.0).contains(percent))
        .ok_or_else(|| "expected per cent between 0 and 50".to_owned())
}

/// A size, or `auto`.
pub(super) fn layer_size(text: &str) -> Result<LayerSize, String> {
    match text {
        "auto" => Ok(LayerSize::ByCores),
        text => size(text)
            .map(LayerSize::Bytes)
            .map_err(|error| format!("{error}, or auto")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_durations() {
        for (text, expected) in [
            ("0", Some(0)),
            ("4096", Some(4096)),
            ("1k", Some(1024)),
            ("64GiB", Some(64 << 30)),
            ("4 TB", Some(4 << 40)),
            ("99999999P", None),
            ("x", None),
            ("1.5G", None),
            ("-1", None),
            ("1X", None),
            ("", None),
        ] {
            assert_eq!(size(text).ok(), expected, "{text}");
        }
        for (text, expected) in [
            ("500ms", Some(500)),
            ("2m", Some(120_000)),
            ("1m30s", Some(90_000)),
            ("2d", Some(172_800_000)),
            ("0s", None),
            ("0d", None),
            ("-1s", None),
            ("5", None),
            ("", None),
        ] {
            assert_eq!(
                duration(text).ok(),
                expected.map(Duration::from_millis),
                "{text}"
            );
        }
    }

    #[test]
    fn layer_sizes() {
        assert_eq!(layer_size("auto"), Ok(LayerSize::ByCores));
        assert_eq!(layer_size("2G"), Ok(LayerSize::Bytes(2 << 30)));
        assert!(layer_size("automatic").is_err_and(|why| why.ends_with("or auto")));
    }

    #[test]
    fn floors() {
        for (text, expected) in [
            ("2", Some(2.0)),
            ("0", Some(0.0)),
            ("1.5%", Some(1.5)),
            ("50", Some(50.0)),
            ("51", None),
            ("-1", None),
            ("NaN", None),
            ("inf", None),
            ("", None),
        ] {
            assert_eq!(floor(text).ok(), expected, "{text}");
        }
    }
}
