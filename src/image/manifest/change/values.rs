//! Parses the values of directives: ports, intervals, durations, signals, paths.

/// Minimum interval of a health check in nanoseconds (1 ms). Docker refuses shorter ones.
pub(super) const MIN_INTERVAL: i64 = 1_000_000;

/// Parses `80`, `80/udp` or `7000-7002`. Of a mapping (`8080:80`, `127.0.0.1:8080:80`), the container's side is used.
pub(super) fn port_range(word: &str) -> Option<(std::ops::RangeInclusive<u16>, String)> {
    let (ports, protocol) = word.split_once('/').unwrap_or((word, "tcp"));
    let protocol = if protocol.is_empty() {
        "tcp".to_owned()
    } else {
        protocol.to_lowercase()
    };
    let ports = ports.rsplit(':').next().unwrap_or_default();
    let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
    let number = |text: &str| {
        text.bytes()
            .all(|b| b.is_ascii_digit())
            .then(|| text.parse::<u16>().ok())
            .flatten()
    };
    let (first, last) = (number(first)?, number(last)?);
    (first <= last && ["tcp", "udp", "sctp"].contains(&protocol.as_str()))
        .then_some((first..=last, protocol))
}

/// Parses an interval in nanoseconds. 0 means that none was given.
pub(super) fn interval(flag: &str, text: &str) -> Result<i64, String> {
    if text.is_empty() {
        return Ok(0);
    }
    match duration(text) {
        Some(0) => Ok(0),
        Some(ns) if ns >= MIN_INTERVAL => Ok(ns),
        Some(_) => Err(format!("{flag}={text} is less than 1ms")),
        None => Err(format!(
            "{flag}={text:?} is not a duration such as 30s, 1m30s or 500ms"
        )),
    }
}

pub(super) fn retries(text: &str) -> Result<i64, String> {
    if text.is_empty() {
        return Ok(0);
    }
    match text.parse::<i32>() {
        Ok(number) if number >= 0 => Ok(i64::from(number)),
        _ => Err(format!("--retries={text:?} is not a number of 0 or more")),
    }
}

/// Parses a duration in Go's notation (signed decimal numbers, each with a unit) to nanoseconds.
pub(super) fn duration(text: &str) -> Option<i64> {
    let (negative, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    if rest == "0" {
        return Some(0);
    }
    if rest.is_empty() {
        return None;
    }
    let mut total: u128 = 0;
    while !rest.is_empty() {
        let digits = |text: &str| text.bytes().take_while(u8::is_ascii_digit).count();
        let (whole, tail) = rest.split_at(digits(rest));
        let (fraction, tail) = match tail.strip_prefix('.') {
            Some(tail) => tail.split_at(digits(tail)),
            None => ("", tail),
        };
        if whole.is_empty() && fraction.is_empty() {
            return None;
        }
        let end = tail
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(end);
        let unit: u128 = match unit {
            "ns" => 1,
            "us" | "µs" | "μs" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            _ => return None,
        };
        let whole: u64 = if whole.is_empty() {
            0
        } else {
            whole.parse().ok()?
        };
        // Eighteen digits are more precise than a nanosecond in any unit.
        let fraction = &fraction[..fraction.len().min(18)];
        let scale = 10_u128.pow(fraction.len() as u32);
        let fraction: u128 = if fraction.is_empty() {
            0
        } else {
            fraction.parse().ok()?
        };
        total = total
            .checked_add(u128::from(whole).checked_mul(unit)?)?
            .checked_add(fraction * unit / scale)?;
        rest = tail;
    }
    let total = i64::try_from(total).ok()?;
    Some(if negative { -total } else { total })
}

/// Returns whether engines accept the signal: a number from 1 to 64, or a name with or without SIG, in any case.
pub(super) fn is_signal(text: &str) -> bool {
    const NAMES: &[&str] = &[
        "ABRT", "ALRM", "BUS", "CHLD", "CLD", "CONT", "FPE", "HUP", "ILL", "INT", "IO", "IOT",
        "KILL", "PIPE", "POLL", "PROF", "PWR", "QUIT", "SEGV", "STKFLT", "STOP", "SYS", "TERM",
        "TRAP", "TSTP", "TTIN", "TTOU", "URG", "USR1", "USR2", "VTALRM", "WINCH", "XCPU", "XFSZ",
        "RTMIN", "RTMAX",
    ];
    if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
        return text
            .parse::<u8>()
            .is_ok_and(|number| (1..=64).contains(&number));
    }
    let upper = text.to_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let offset = |prefix: &str, max: u8| {
        name.strip_prefix(prefix)
            .filter(|n| n.bytes().all(|b| b.is_ascii_digit()))
            .and_then(|n| n.parse::<u8>().ok())
            .is_some_and(|n| (1..=max).contains(&n))
    };
    NAMES.contains(&name) || offset("RTMIN+", 15) || offset("RTMAX-", 14)
}

/// Returns an absolute path without `.`, `..` and repeated slashes.
pub(super) fn normalised(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            _ => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}
