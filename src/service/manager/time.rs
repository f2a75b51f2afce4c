//! Formats instants of the record for the API.

use jiff::Timestamp;

/// Formats an instant (milliseconds since the epoch) according to RFC 3339, in UTC with milliseconds.
pub(super) fn rfc3339(ms: i64) -> String {
    let at = Timestamp::from_millisecond(ms).unwrap_or(Timestamp::UNIX_EPOCH);
    format!("{at:.3}")
}

/// Formats an instant for use in tags: `20261124-2015`.
pub(super) fn stamp(ms: i64) -> String {
    let at = Timestamp::from_millisecond(ms).unwrap_or(Timestamp::UNIX_EPOCH);
    at.strftime("%Y%m%d-%H%M").to_string()
}

#[cfg(test)]
mod tests {
    #[test]
    fn times_are_written_as_the_api_says() {
        assert_eq!(
            super::rfc3339(1_764_000_000_123),
            "2025-11-24T16:00:00.123Z"
        );
        assert_eq!(super::rfc3339(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(super::rfc3339(i64::MAX), "1970-01-01T00:00:00.000Z");
        assert_eq!(super::stamp(1_764_000_000_123), "20251124-1600");
    }
}
