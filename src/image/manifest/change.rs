//! `--change`: applies the eleven Dockerfile directives that `docker commit` accepts to the `config` of an image
//! config.
//!
//! Source: the Dockerfile reference, and Docker's behaviour in each case (compared in `tests/manifest.rs`). The
//! deliberate differences from `docker commit` are:
//! - The shell form uses the image's own `Shell`, and `ONBUILD` adds to the triggers of the base. Docker commits the
//!   settings of a container, in which both are lost.
//! - `CMD []` and `ENTRYPOINT []` clear the value, as in a Dockerfile. Docker silently restores the old value.
//! - Directives that would produce an image that cannot run are refused: `CMD` without a command, and a `USER` that is
//!   empty or contains spaces.

mod values;

use serde_json::{Map, Value, json};

use super::expand::{expand, words};
use values::{interval, is_signal, normalised, port_range, retries};

/// The supported directives, in alphabetical order.
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

/// A `--change` that cannot be applied. The cause is always the option and never the image.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// The first word is not in [`DIRECTIVES`].
    #[error("--change {change:?}: {directive:?} cannot be changed in a commit; these can: {}", DIRECTIVES.join(", "))]
    Unknown {
        /// The text as given.
        change: String,
        /// Its first word.
        directive: String,
    },
    /// The arguments of a known directive are invalid.
    #[error("--change {change:?}: {reason}")]
    Invalid {
        /// The text as given.
        change: String,
        /// What is wrong, and what was expected.
        reason: String,
    },
}

/// Checks `changes` as far as possible without the image: everything except the values of variables.
pub fn check(changes: &[String]) -> Result<(), Error> {
    // Without the image's config, the values of variables are unknown, so directives that use any are only parsed.
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
/// right type. A change may have several lines; comments and line continuations are those of a Dockerfile.
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

/// Calls `directive` with each directive in upper case and its arguments.
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

/// Splits a text into logical lines: comments and empty lines are dropped, and a line that ends in a backslash is
/// joined with the next.
fn instructions(text: &str) -> Vec<String> {
    let mut lines = Vec::new();
    let mut open = String::new();
    for line in text.lines() {
        let trimmed = line.trim();
        // Comments and empty lines do not end a continued line.
        if trimmed.is_empty() || trimmed.starts_with('#') {
            continue;
        }
        // Leading space is kept in a continued line, because it may be within quotes.
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
    /// Whether a `CMD` was among the changes so far.
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
        // The base's `CMD` belongs to the base's `ENTRYPOINT`.
        if !*self.cmd_given {
            self.config.shift_remove("Cmd");
        }
        Ok(())
    }

    /// Returns the JSON form unchanged, and the shell form as an argument of the image's shell.
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

    /// Parses `a=b c="d e"`, or the old form `a b c` (one pair whose value extends to the end). All values are expanded
    /// with the variables from before the directive.
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
        // Values that are missing or 0 are inherited from the base, as in `docker commit`.
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

/// Splits off the leading words that begin with `--`, with their quotes removed.
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
        // Variables are not expanded in flags.
        flags.push(expand(word, &[])?);
    }
    Ok((flags, rest))
}

/// Parses the JSON form of an argument. Returns `None` for shell text, including text that only resembles JSON
/// (`['a']`), as in Docker.
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

/// Sets a list. An empty one is left out, which has the same meaning.
fn set_list(config: &mut Map<String, Value>, key: &str, list: &[String]) {
    if list.is_empty() {
        config.shift_remove(key);
    } else {
        config.insert(key.to_owned(), json!(list));
    }
}

/// Edits the object under `key`, creating it if necessary.
fn edit_object(
    config: &mut Map<String, Value>,
    key: &str,
    edit: impl FnOnce(&mut Map<String, Value>),
) {
    // Taken out and put back, so that the order of the keys is kept.
    let mut map = match config.get_mut(key).map(Value::take) {
        Some(Value::Object(map)) => map,
        _ => Map::new(),
    };
    edit(&mut map);
    config.insert(key.to_owned(), Value::Object(map));
}

#[cfg(test)]
mod tests {
    use super::values::duration;
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
