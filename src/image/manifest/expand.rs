//! Expands quotes, escapes and `$VARIABLES` in the words of a Dockerfile directive, as `docker commit --change` does.
//!
//! Source: the Dockerfile reference, "Environment replacement"; behaviour compared with Docker (see
//! `tests/manifest.rs`).

use std::iter::Peekable;
use std::str::Chars;

/// Maximum nesting depth of `${A:-${B:-…}}`, which bounds the use of the stack.
const MAX_DEPTH: usize = 32;

/// Splits at white space outside quotes. Quotes and escapes are kept and removed by [`expand`].
pub(super) fn words(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut quote = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match quote {
            None if c.is_whitespace() => {
                if !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
                continue;
            }
            None if matches!(c, '\'' | '"') => quote = Some(c),
            Some(q) if c == q => quote = None,
            _ => {}
        }
        // Within single quotes nothing is escaped. Elsewhere the escaped character is neither a quote nor a separator.
        if c == '\\' && quote != Some('\'') {
            if let Some(next) = chars.next() {
                word.push(c);
                word.push(next);
            }
            continue;
        }
        word.push(c);
    }
    if !word.is_empty() {
        words.push(word);
    }
    words
}

/// Removes quotes and escapes and replaces variables by their values in `env` (`NAME=VALUE` texts).
pub(super) fn expand(word: &str, env: &[String]) -> Result<String, String> {
    let mut expansion = Expansion {
        rest: word.chars().peekable(),
        env,
        depth: 0,
    };
    expansion
        .until(None)
        .map_err(|reason| format!("cannot expand {word:?}: {reason}"))
}

struct Expansion<'a> {
    rest: Peekable<Chars<'a>>,
    env: &'a [String],
    depth: usize,
}

impl Expansion<'_> {
    /// Expands up to and including `end`, or to the end of the text if it is `None`.
    fn until(&mut self, end: Option<char>) -> Result<String, String> {
        let mut out = String::new();
        while let Some(c) = self.rest.next() {
            match c {
                _ if Some(c) == end => return Ok(out),
                '\'' => self.single_quoted(&mut out)?,
                '"' => self.double_quoted(&mut out)?,
                '$' => out.push_str(&self.variable()?),
                // A backslash at the end of the text is an unfinished line continuation.
                '\\' => out.extend(self.rest.next()),
                _ => out.push(c),
            }
        }
        match end {
            None => Ok(out),
            Some(end) => Err(format!("the closing {end:?} is missing")),
        }
    }

    fn single_quoted(&mut self, out: &mut String) -> Result<(), String> {
        for c in self.rest.by_ref() {
            if c == '\'' {
                return Ok(());
            }
            out.push(c);
        }
        Err("a single quote is not closed".to_owned())
    }

    fn double_quoted(&mut self, out: &mut String) -> Result<(), String> {
        while let Some(c) = self.rest.next() {
            match c {
                '"' => return Ok(()),
                '$' => out.push_str(&self.variable()?),
                // As in a shell, only these are escaped; before other characters, the backslash is literal.
                '\\' => match self.rest.next_if(|&next| matches!(next, '"' | '$' | '\\')) {
                    Some(next) => out.push(next),
                    None => out.push(c),
                },
                _ => out.push(c),
            }
        }
        Err("a double quote is not closed".to_owned())
    }

    /// Expands what follows a `$`.
    fn variable(&mut self) -> Result<String, String> {
        if self.rest.next_if_eq(&'{').is_none() {
            let name = self.name();
            return Ok(if name.is_empty() {
                "$".to_owned()
            } else {
                self.value(&name).unwrap_or_default()
            });
        }
        let name = self.name();
        if name.is_empty() {
            return Err("${ needs the name of a variable".to_owned());
        }
        let Some(first) = self.rest.next() else {
            return Err(format!("the }} of ${{{name} is missing"));
        };
        if first == '}' {
            return Ok(self.value(&name).unwrap_or_default());
        }
        // With a colon, an empty variable counts as unset.
        let (operator, empty_is_unset) = match first {
            ':' => (self.rest.next(), true),
            _ => (Some(first), false),
        };
        let Some(operator @ ('-' | '+' | '?')) = operator else {
            return Err(format!(
                "${{{name}…}}: only the forms :- :+ :? - + ? are known"
            ));
        };
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(format!("more than {MAX_DEPTH} nested ${{}}"));
        }
        let word = self.until(Some('}'))?;
        self.depth -= 1;
        let value = self
            .value(&name)
            .filter(|value| !(empty_is_unset && value.is_empty()));
        match (operator, value) {
            ('-', None) | ('+', Some(_)) => Ok(word),
            ('?', None) if word.is_empty() => Err(format!("{name} is not set")),
            ('?', None) => Err(format!("{name}: {word}")),
            (_, Some(value)) => Ok(value),
            (_, None) => Ok(String::new()),
        }
    }

    /// Reads a name. A run of digits or one special character (`$1`, `$$`) is the name of a variable that is never set.
    fn name(&mut self) -> String {
        let mut name = String::new();
        if let Some(special) = self.rest.next_if(|c| "@*#?-$!".contains(*c)) {
            name.push(special);
            return name;
        }
        let digits = self.rest.peek().is_some_and(char::is_ascii_digit);
        let part = |c: &char| {
            if digits {
                c.is_ascii_digit()
            } else {
                c.is_alphanumeric() || *c == '_'
            }
        };
        while let Some(c) = self.rest.next_if(part) {
            name.push(c);
        }
        name
    }

    fn value(&self, name: &str) -> Option<String> {
        // The last of several entries wins, as in the environment of a process.
        self.env
            .iter()
            .rev()
            .find_map(|line| match line.split_once('=') {
                Some((key, value)) => (key == name).then(|| value.to_owned()),
                None => (line == name).then(String::new),
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_keep_their_quotes() {
        for (text, expected) in [
            ("a=b c=\"d e\"", vec!["a=b", "c=\"d e\""]),
            ("  a\t b ", vec!["a", "b"]),
            ("a\\ b", vec!["a\\ b"]),
            ("'a\\' b", vec!["'a\\'", "b"]),
            ("\"a\\\" b\" c", vec!["\"a\\\" b\"", "c"]),
            ("\"\"", vec!["\"\""]),
            ("a\\", vec!["a"]),
            ("", vec![]),
        ] {
            assert_eq!(words(text), expected, "{text}");
        }
    }

    #[test]
    fn nesting_is_bounded() {
        let deep = |n: usize| format!("{}x{}", "${N:-".repeat(n), "}".repeat(n));
        assert_eq!(expand(&deep(MAX_DEPTH), &[]), Ok("x".to_owned()));
        assert!(expand(&deep(100_000), &[]).is_err());
    }

    #[test]
    fn forms_without_a_colon_ask_whether_it_is_set() {
        let env = ["EMPTY=".to_owned(), "A=1".to_owned()];
        for (word, expected) in [
            ("${EMPTY-d}", ""),
            ("${NOPE-d}", "d"),
            ("${EMPTY+y}", "y"),
            ("${NOPE+y}", ""),
            ("${A?no}", "1"),
            ("${EMPTY?no}", ""),
        ] {
            assert_eq!(expand(word, &env).as_deref(), Ok(expected), "{word}");
        }
        assert!(expand("${EMPTY:?}", &env).is_err_and(|e| e.contains("EMPTY is not set")));
    }
}
