//! `--change`: the eleven Dockerfile directives that `docker commit` takes, applied to the `config` of an image config.
//!
//! Source: the Dockerfile reference, and what Docker makes of each case (`tests/manifest.rs` holds the comparison).
//! Where this differs from `docker commit`, it is on purpose:
//! - the shell form uses the image's own `Shell`, and `ONBUILD` adds to the triggers that the base has (Docker commits a
//!   container's settings, in which both are lost);
//! - `CMD []` and `ENTRYPOINT []` clear, as in a Dockerfile (Docker silently puts the old value back);
//! - what would leave an image that cannot run is refused: `CMD` without a command, an empty or spaced `USER`.

use serde_json::{Map, Value, json};

use super::expand::{expand, words};

/// The directives, in alphabetical order.
pub const DIRECTIVES: [&str; 11] = [
    "CMD",
    "ENTRYPOINT",
    "ENV",
    "EXPOSE",
    "HEALTHCHECK",
    "LABEL",
    "ONBUILD",
    "STOPSIGNAL",
    "USER",
    "VOLUME",
    "WORKDIR",
];

/// Intervals of a health check below this are refused by Docker: 1 ms, in nanoseconds.
const MIN_INTERVAL: i64 = 1_000_000;

/// A `--change` that cannot be applied. Always the caller's mistake, never the image's.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// The first word is none of [`DIRECTIVES`].
    #[error("--change {change:?}: {directive:?} cannot be changed in a commit; these can: {}", DIRECTIVES.join(", "))]
    Unknown {
        /// The text as given.
        change: String,
        /// Its first word.
        directive: String,
    },
    /// A known directive with arguments that make no sense.
    #[error("--change {change:?}: {reason}")]
    Invalid {
        /// The text as given.
        change: String,
        /// What is wrong, and what was expected.
        reason: String,
    },
}

/// What can be told of `changes` without the image that they are for: everything but what its variables become.
pub fn check(changes: &[String]) -> Result<(), Error> {
    // Without the config that variables come from, what depends on one cannot be judged: those are only parsed.
    each(changes, |name, rest| {
        if rest.contains('$') {
            return flags(rest).map(|_| ());
        }
        let directive = Directive {
            config: &mut Map::new(),
            name,
            cmd_given: &mut false,
        };
        directive.apply(rest)
    })
}

/// Applies `changes` in order to the inner `config` object of an image config, whose known fields are absent or of the
/// right type. A change may hold several lines; comments and continued lines are as in a Dockerfile.
pub fn apply(config: &mut Map<String, Value>, changes: &[String]) -> Result<(), Error> {
    let mut cmd_given = false;
    each(changes, |name, rest| {
        let directive = Directive {
            config,
            name,
            cmd_given: &mut cmd_given,
        };
        directive.apply(rest)
    })
}

/// Hands over every directive, in capitals, with what follows it.
fn each(
    changes: &[String],
    mut directive: impl FnMut(&str, &str) -> Result<(), String>,
) -> Result<(), Error> {
    for change in changes {
        let invalid = |reason: String| Error::Invalid {
            change: change.clone(),
            reason,
        };
        if change.contains('\0') {
            return Err(invalid(
                "a NUL byte cannot be part of an image's settings".to_owned(),
            ));
        }
        let lines = instructions(change);
        if lines.is_empty() {
            return Err(invalid(format!(
                "there is no directive in it; expected one of {}",
                DIRECTIVES.join(", ")
            )));
        }
        for line in lines {
            let (name, rest) = line.split_once(char::is_whitespace).unwrap_or((&line, ""));
            let upper = name.to_uppercase();
            if !DIRECTIVES.contains(&upper.as_str()) {
                return Err(Error::Unknown {
                    change: change.clone(),
                    directive: name.to_owned(),
                });
            }
            directive(&upper, rest).map_err(invalid)?;
        }
    }
    Ok(())
}

/// The logical lines of a text: comments and empty lines gone, lines that end in a backslash joined with the next.
fn instructions(text: &str) -> Vec<String> {
    let mut lines = Vec::new();
    let mut open = String::new();
    for line in text.lines() {
        let trimmed = line.trim();
        // Comments and empty lines do not end a continued line.
        if trimmed.is_empty() || trimmed.starts_with('#') {
            continue;
        }
        // Leading space is part of a continued line, as it may stand within quotes.
        let line = if open.is_empty() {
            trimmed
        } else {
            line.trim_end()
        };
        if let Some(start) = line.strip_suffix('\\') {
            open.push_str(start);
        } else {
            lines.push(std::mem::take(&mut open) + line);
        }
    }
    if !open.trim().is_empty() {
        lines.push(open);
    }
    lines
}

struct Directive<'a> {
    config: &'a mut Map<String, Value>,
    name: &'a str,
    /// Whether one of the changes so far was a CMD.
    cmd_given: &'a mut bool,
}

impl Directive<'_> {
    fn apply(self, rest: &str) -> Result<(), String> {
        let (flags, rest) = flags(rest)?;
        let rest = rest.trim();
        if self.name == "HEALTHCHECK" {
            return self.healthcheck(&flags, rest);
        }
        if let Some(flag) = flags.first() {
            return Err(format!("{} takes no flag, found {flag:?}", self.name));
        }
        if rest.is_empty() {
            return Err(match self.name {
                "CMD" | "ENTRYPOINT" => {
                    format!("{0} needs a command; to clear it, write {0} []", self.name)
                }
                name => format!("{name} needs an argument"),
            });
        }
        match self.name {
            "CMD" => self.cmd(rest),
            "ENTRYPOINT" => self.entrypoint(rest),
            "ENV" => self.env(rest),
            "EXPOSE" => self.expose(rest),
            "LABEL" => self.label(rest),
            "ONBUILD" => self.onbuild(rest),
            "STOPSIGNAL" => self.stopsignal(rest),
            "USER" => self.user(rest),
            "VOLUME" => self.volume(rest),
            _ => self.workdir(rest),
        }
    }

    fn cmd(self, rest: &str) -> Result<(), String> {
        let command = self.command(rest)?;
        set_list(self.config, "Cmd", &command);
        *self.cmd_given = true;
        Ok(())
    }

    fn entrypoint(self, rest: &str) -> Result<(), String> {
        let command = self.command(rest)?;
        set_list(self.config, "Entrypoint", &command);
        // The base's CMD was written for the base's ENTRYPOINT.
        if !*self.cmd_given {
            self.config.shift_remove("Cmd");
        }
        Ok(())
    }

    /// JSON form as it is, shell form behind the image's shell.
    fn command(&self, rest: &str) -> Result<Vec<String>, String> {
        if let Some(list) = json_form(rest)? {
            return Ok(list);
        }
        let mut command = strings(self.config.get("Shell"));
        if command.is_empty() {
            command = vec!["/bin/sh".to_owned(), "-c".to_owned()];
        }
        command.push(rest.to_owned());
        Ok(command)
    }

    fn env(self, rest: &str) -> Result<(), String> {
        let mut env = strings(self.config.get("Env"));
        for (key, value) in self.pairs(rest)? {
            let line = format!("{key}={value}");
            match env
                .iter_mut()
                .find(|old| old.split('=').next() == Some(key.as_str()))
            {
                Some(old) => *old = line,
                None => env.push(line),
            }
        }
        set_list(self.config, "Env", &env);
        Ok(())
    }

    fn label(self, rest: &str) -> Result<(), String> {
        let pairs = self.pairs(rest)?;
        edit_object(self.config, "Labels", |labels| {
            labels.extend(
                pairs
                    .into_iter()
                    .map(|(key, value)| (key, Value::String(value))),
            );
        });
        Ok(())
    }

    /// `a=b c="d e"`, or the old form `a b c` (one pair, the value runs to the end). Every value sees the variables as
    /// they were before the directive.
    fn pairs(&self, rest: &str) -> Result<Vec<(String, String)>, String> {
        let words = words(rest);
        let raw: Vec<(&str, &str)> = if words.first().is_some_and(|word| word.contains('=')) {
            let pair = |word| {
                str::split_once(word, '=')
                    .ok_or_else(|| format!("{word:?} has no =, expected NAME=VALUE"))
            };
            words
                .iter()
                .map(|word| pair(word))
                .collect::<Result<_, _>>()?
        } else {
            let (key, value) = rest.split_once(char::is_whitespace).ok_or_else(|| {
                format!(
                    "{} needs a name and a value: NAME=VALUE, found {rest:?}",
                    self.name
                )
            })?;
            vec![(key, value.trim_start())]
        };
        let env = strings(self.config.get("Env"));
        let mut pairs = Vec::with_capacity(raw.len());
        for (key, value) in raw {
            let (key, value) = (expand(key, &env)?, expand(value, &env)?);
            if key.is_empty() || (self.name == "ENV" && key.contains('=')) {
                return Err(format!(
                    "{key:?} cannot be the name of {}",
                    if self.name == "ENV" {
                        "a variable"
                    } else {
                        "a label"
                    }
                ));
            }
            pairs.push((key, value));
        }
        Ok(pairs)
    }

    fn expose(self, rest: &str) -> Result<(), String> {
        let expanded = expand(rest, &strings(self.config.get("Env")))?;
        let mut ports = Vec::new();
        for word in expanded.split_whitespace() {
            ports.push(port_range(word).ok_or_else(|| {
                format!("{word:?} is not PORT[-PORT][/tcp|udp|sctp] with ports of 0 to 65535")
            })?);
        }
        if ports.is_empty() {
            return Err(format!(
                "EXPOSE needs a port; {rest:?} is empty once its variables are replaced"
            ));
        }
        edit_object(self.config, "ExposedPorts", |exposed| {
            for (range, protocol) in ports {
                for port in range {
                    exposed
                        .entry(format!("{port}/{protocol}"))
                        .or_insert_with(|| json!({}));
                }
            }
        });
        Ok(())
    }

    fn healthcheck(self, flags: &[String], rest: &str) -> Result<(), String> {
        let (kind, command) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
        let command = command.trim();
        let test = match kind.to_uppercase().as_str() {
            "" => return Err("HEALTHCHECK needs NONE or CMD with a command".to_owned()),
            "NONE" if command.is_empty() => vec!["NONE".to_owned()],
            "NONE" => {
                return Err(format!(
                    "HEALTHCHECK NONE takes no argument, found {command:?}"
                ));
            }
            "CMD" => match json_form(command)? {
                None if command.is_empty() => {
                    return Err("HEALTHCHECK CMD needs a command".to_owned());
                }
                Some(list) if list.is_empty() => {
                    return Err("HEALTHCHECK CMD needs a command".to_owned());
                }
                None => vec!["CMD-SHELL".to_owned(), command.to_owned()],
                Some(list) => std::iter::once("CMD".to_owned()).chain(list).collect(),
            },
            _ => {
                return Err(format!(
                    "HEALTHCHECK {kind:?} is unknown, expected NONE or CMD"
                ));
            }
        };
        let mut given: Vec<(&str, i64)> = Vec::new();
        for flag in flags {
            let (name, value) = flag
                .split_once('=')
                .ok_or_else(|| format!("{flag} needs a value: {flag}=VALUE"))?;
            let (key, number) = match name {
                "--interval" => ("Interval", interval(name, value)?),
                "--timeout" => ("Timeout", interval(name, value)?),
                "--start-period" => ("StartPeriod", interval(name, value)?),
                "--start-interval" => ("StartInterval", interval(name, value)?),
                "--retries" => ("Retries", retries(value)?),
                _ => {
                    return Err(format!(
                        "HEALTHCHECK has no flag {name}; it has --interval --timeout --start-period --start-interval --retries"
                    ));
                }
            };
            if given.iter().any(|(other, _)| *other == key) {
                return Err(format!("{name} is given twice"));
            }
            given.push((key, number));
        }
        // What is not given, or given as 0, stays as the base has it; so does docker commit.
        if test == ["NONE"] {
            given.clear();
        }
        edit_object(self.config, "Healthcheck", |check| {
            check.insert("Test".to_owned(), json!(test));
            for (key, number) in given.into_iter().filter(|(_, number)| *number != 0) {
                check.insert(key.to_owned(), json!(number));
            }
        });
        Ok(())
    }

    fn onbuild(self, rest: &str) -> Result<(), String> {
        let trigger = rest
            .split_whitespace()
            .next()
            .unwrap_or_default()
            .to_uppercase();
        if ["ONBUILD", "FROM", "MAINTAINER"].contains(&trigger.as_str()) {
            return Err(format!("{trigger} cannot be a trigger of ONBUILD"));
        }
        let mut triggers = strings(self.config.get("OnBuild"));
        triggers.push(rest.to_owned());
        set_list(self.config, "OnBuild", &triggers);
        Ok(())
    }

    fn stopsignal(self, rest: &str) -> Result<(), String> {
        let signal = expand(rest, &strings(self.config.get("Env")))?;
        if !is_signal(&signal) {
            return Err(format!(
                "{signal:?} is not a signal: expected a name such as SIGTERM, SIGRTMIN+3 or a number of 1 to 64"
            ));
        }
        self.config
            .insert("StopSignal".to_owned(), Value::String(signal));
        Ok(())
    }

    fn user(self, rest: &str) -> Result<(), String> {
        let user = expand(rest, &strings(self.config.get("Env")))?;
        if user.is_empty() || user.contains(char::is_whitespace) {
            return Err(format!(
                "{user:?} is not a user: expected USER[:GROUP], names or numbers"
            ));
        }
        self.config.insert("User".to_owned(), Value::String(user));
        Ok(())
    }

    fn volume(self, rest: &str) -> Result<(), String> {
        let raw = json_form(rest)?
            .unwrap_or_else(|| rest.split_whitespace().map(str::to_owned).collect());
        let env = strings(self.config.get("Env"));
        let mut paths = Vec::with_capacity(raw.len());
        for path in raw {
            let path = expand(&path, &env)?.trim().to_owned();
            if path.is_empty() {
                return Err("VOLUME has an empty path".to_owned());
            }
            paths.push(path);
        }
        if paths.is_empty() {
            return Err("VOLUME needs a path".to_owned());
        }
        edit_object(self.config, "Volumes", |volumes| {
            for path in paths {
                volumes.entry(path).or_insert_with(|| json!({}));
            }
        });
        Ok(())
    }

    fn workdir(self, rest: &str) -> Result<(), String> {
        let path = expand(rest, &strings(self.config.get("Env")))?;
        if path.is_empty() {
            return Err(format!(
                "WORKDIR is empty once the variables of {rest:?} are replaced"
            ));
        }
        let path = if path.starts_with('/') {
            path
        } else {
            let current = self
                .config
                .get("WorkingDir")
                .and_then(Value::as_str)
                .unwrap_or("/");
            normalised(&format!("/{current}/{path}"))
        };
        self.config
            .insert("WorkingDir".to_owned(), Value::String(path));
        Ok(())
    }
}

/// The words in front that begin with `--`, without their quotes, and what follows them.
fn flags(rest: &str) -> Result<(Vec<String>, &str), String> {
    let mut flags = Vec::new();
    let mut rest = rest.trim_start();
    while rest.starts_with("--") {
        let mut quote = None;
        let end = rest
            .char_indices()
            .find(|&(_, c)| {
                match quote {
                    None if matches!(c, '\'' | '"') => quote = Some(c),
                    Some(q) if c == q => quote = None,
                    _ => {}
                }
                quote.is_none() && c.is_whitespace()
            })
            .map_or(rest.len(), |(end, _)| end);
        let (word, tail) = rest.split_at(end);
        rest = tail.trim_start();
        if word == "--" {
            break;
        }
        // Flags see no variables.
        flags.push(expand(word, &[])?);
    }
    Ok((flags, rest))
}

/// The JSON form of an argument, if it is one. What only looks like it (`['a']`) is shell text, as Docker has it.
fn json_form(rest: &str) -> Result<Option<Vec<String>>, String> {
    if !rest.starts_with('[') {
        return Ok(None);
    }
    let Ok(values) = serde_json::from_str::<Vec<Value>>(rest) else {
        return Ok(None);
    };
    let text = |value| match value {
        Value::String(text) => Ok(text),
        other => Err(format!("the JSON form takes texts only, found {other}")),
    };
    values
        .into_iter()
        .map(text)
        .collect::<Result<_, _>>()
        .map(Some)
}

fn strings(value: Option<&Value>) -> Vec<String> {
    let list = value
        .and_then(Value::as_array)
        .map(Vec::as_slice)
        .unwrap_or_default();
    list.iter()
        .filter_map(Value::as_str)
        .map(str::to_owned)
        .collect()
}

/// Sets a list; an empty one is left out, which means the same.
fn set_list(config: &mut Map<String, Value>, key: &str, list: &[String]) {
    if list.is_empty() {
        config.shift_remove(key);
    } else {
        config.insert(key.to_owned(), json!(list));
    }
}

/// Changes the object under `key`, which is made if there is none.
fn edit_object(
    config: &mut Map<String, Value>,
    key: &str,
    edit: impl FnOnce(&mut Map<String, Value>),
) {
    // Taken out and put back: the place among the other keys stays.
    let mut map = match config.get_mut(key).map(Value::take) {
        Some(Value::Object(map)) => map,
        _ => Map::new(),
    };
    edit(&mut map);
    config.insert(key.to_owned(), Value::Object(map));
}

/// `80`, `80/udp`, `7000-7002`; of a mapping (`8080:80`, `127.0.0.1:8080:80`) the container's side.
fn port_range(word: &str) -> Option<(std::ops::RangeInclusive<u16>, String)> {
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

/// Nanoseconds; 0 means "not given".
fn interval(flag: &str, text: &str) -> Result<i64, String> {
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

fn retries(text: &str) -> Result<i64, String> {
    if text.is_empty() {
        return Ok(0);
    }
    match text.parse::<i32>() {
        Ok(number) if number >= 0 => Ok(i64::from(number)),
        _ => Err(format!("--retries={text:?} is not a number of 0 or more")),
    }
}

/// A duration as Go writes it: signed decimal numbers, each with a unit. Nanoseconds.
fn duration(text: &str) -> Option<i64> {
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
        // Eighteen digits are finer than a nanosecond of any unit.
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

/// A signal as engines take it: a number of 1 to 64, or a name with or without SIG, in any case.
fn is_signal(text: &str) -> bool {
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

/// An absolute path without `.`, `..` and doubled slashes.
fn normalised(path: &str) -> String {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_go_durations() {
        for (text, expected) in [
            ("1h2m3.5s", Some(3_723_500_000_000)),
            (".5s", Some(500_000_000)),
            ("1.s", Some(1_000_000_000)),
            ("+5s", Some(5_000_000_000)),
            ("-5s", Some(-5_000_000_000)),
            ("0", Some(0)),
            ("7us", Some(7_000)),
            ("7µs", Some(7_000)),
            ("0.0000000001h", Some(360)),
            (
                "1.00000000000000000000000000000000000000000000001s",
                Some(1_000_000_000),
            ),
            ("", None),
            ("+", None),
            ("10", None),
            ("1d", None),
            (".s", None),
            ("s", None),
            ("99999999h", None),
            ("99999999999999999999s", None),
        ] {
            assert_eq!(duration(text), expected, "{text}");
        }
    }

    #[test]
    fn signals() {
        for good in [
            "SIGTERM",
            "TERM",
            "term",
            "9",
            "64",
            "SIGRTMIN+3",
            "RTMAX-14",
            "SIGRTMAX",
            "SIGSTKFLT",
        ] {
            assert!(is_signal(good), "{good}");
        }
        for bad in [
            "",
            "0",
            "65",
            "-1",
            "+9",
            "SIG",
            "BOGUS",
            "SIGRTMIN+16",
            "SIGRTMAX-15",
            "RTMIN+",
            "9 9",
        ] {
            assert!(!is_signal(bad), "{bad}");
        }
    }

    #[test]
    fn continued_lines_skip_comments() {
        assert_eq!(
            instructions("ENV a=b \\\n# no\n\n  c=d\n# x\nUSER e\\"),
            ["ENV a=b   c=d", "USER e"]
        );
        assert_eq!(
            instructions(" \n# only a comment\n\\"),
            Vec::<String>::new()
        );
    }
}
