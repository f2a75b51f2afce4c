//! The first lines of scripts: by which programs the kernel, `env` and `sh` start them.
//!
//! Source: Linux `fs/binfmt_script.c`, env(1) of GNU coreutils, distlib's `scripts.py` (the scripts of pip).

/// Number of bytes of a program that the kernel looks at (`BINPRM_BUF_SIZE`), and that are read here.
pub(super) const HEAD: usize = 256;

/// The line by which pip's scripts have `sh` start a Python whose path is too long for a first line, or has spaces.
const PIP: &[u8] = b"'''exec' ";
const SHELLS: [&[u8]; 3] = [b"sh", b"bash", b"dash"];

/// Returns the programs that a file with this beginning is started by, as names or absolute paths, in the order in which
/// they start each other; none for a file that is no script, and none from the first that cannot be told.
pub(super) fn interpreters(head: &[u8]) -> Vec<Vec<u8>> {
    let Some(rest) = head.strip_prefix(b"#!") else {
        return Vec::new();
    };
    let mut lines = rest.splitn(3, |&byte| byte == b'\n');
    let line = lines.next().unwrap_or_default();
    let second = lines.next();
    let is_whole = second.is_some() || head.len() < HEAD;
    let line = trim_start(line);
    let end = line.iter().position(|&byte| is_blank(byte));
    let name = &line[..end.unwrap_or(line.len())];
    let is_told = name.starts_with(b"/") && !name.contains(&0) && (is_whole || end.is_some());
    if !is_told {
        return Vec::new();
    }
    let program = name.rsplit(|&byte| byte == b'/').next();
    let next = if program == Some(b"env".as_slice()) {
        let argument = trim(&line[name.len()..]);
        is_whole.then(|| of_env(argument)).flatten()
    } else if program.is_some_and(|program| SHELLS.contains(&program)) {
        second.and_then(of_pip)
    } else {
        None
    };
    let names = [Some(name), next].into_iter().flatten();
    names.map(<[u8]>::to_vec).collect()
}

/// Returns the program that `env` starts with this argument. The kernel passes all of the line as one.
fn of_env(argument: &[u8]) -> Option<&[u8]> {
    let several = [b"-S".as_slice(), b"--split-string="];
    let several = several
        .iter()
        .find_map(|option| argument.strip_prefix(*option));
    let name = match several {
        None => Some(argument).filter(|name| !name.contains(&b'=')),
        Some(words) if words.iter().any(|byte| b"\"'\\$#".contains(byte)) => None,
        Some(words) => words
            .split(|&byte| is_blank(byte))
            .filter(|word| !word.is_empty())
            // An assignment, but not of where programs are looked for.
            .find(|word| word.starts_with(b"PATH=") || !word.contains(&b'='))
            .filter(|word| !word.contains(&b'=')),
    };
    name.filter(|name| !name.is_empty() && !name.starts_with(b"-"))
        .filter(|name| name.starts_with(b"/") || !name.contains(&b'/'))
}

/// Returns the program that a script of pip starts in its second line.
fn of_pip(line: &[u8]) -> Option<&[u8]> {
    let word = line.strip_prefix(PIP)?;
    let (word, ends): (_, fn(u8) -> bool) = match word.strip_prefix(b"\"") {
        Some(quoted) => (quoted, |byte| byte == b'"'),
        None => (word, is_blank),
    };
    // Without an end, it goes beyond what was read.
    let name = &word[..word.iter().position(|&byte| ends(byte))?];
    let is_plain = !name.iter().any(|byte| b"\"'\\$`".contains(byte));
    (is_plain && name.starts_with(b"/")).then_some(name)
}

fn is_blank(byte: u8) -> bool {
    byte == b' ' || byte == b'\t'
}

fn trim_start(text: &[u8]) -> &[u8] {
    let start = text.iter().position(|&byte| !is_blank(byte));
    &text[start.unwrap_or(text.len())..]
}

fn trim(text: &[u8]) -> &[u8] {
    let end = text.iter().rposition(|&byte| !is_blank(byte));
    trim_start(&text[..end.map_or(0, |end| end + 1)])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(head: &str) -> Vec<String> {
        let head = &head.as_bytes()[..head.len().min(HEAD)];
        let names = interpreters(head).into_iter();
        names
            .map(|name| String::from_utf8_lossy(&name).into_owned())
            .collect()
    }

    #[test]
    fn first_lines_name_interpreters() {
        for (head, expected) in [
            ("#!/bin/sh\necho", &["/bin/sh"][..]),
            (
                "#! \t/opt/venv/bin/python3 -I\n",
                &["/opt/venv/bin/python3"],
            ),
            ("#!/bin/sh", &["/bin/sh"]),
            ("#!/bin/sh\r\n", &["/bin/sh\r"]),
            ("\x7fELF", &[]),
            ("", &[]),
            ("#!", &[]),
            ("#!\n/bin/sh", &[]),
            ("#!python3\n", &[]),
            ("#!/bin/s\0h\n", &[]),
        ] {
            assert_eq!(names(head), expected, "{head:?}");
        }
    }

    #[test]
    fn env_starts_another_program() {
        for (argument, expected) in [
            ("python3", Some("python3")),
            ("python3  \t", Some("python3")),
            ("/opt/bin/python3", Some("/opt/bin/python3")),
            // One argument, which is not split.
            ("python3 -u", Some("python3 -u")),
            ("-S python3 -u", Some("python3")),
            ("-Spython3 -u", Some("python3")),
            ("--split-string=python3 -u", Some("python3")),
            ("-S A=b C=d python3 x=y", Some("python3")),
            ("-S PATH=/x python3", None),
            ("-S -u A python3", None),
            ("-S \"my python\"", None),
            ("-S", None),
            ("-i", None),
            ("A=b", None),
            ("bin/python3", None),
            ("", None),
        ] {
            let expected: Vec<&str> = ["/usr/bin/env"].into_iter().chain(expected).collect();
            let head = format!("#!/usr/bin/env {argument}\nimport sys\n");
            assert_eq!(names(&head), expected, "{argument:?}");
        }
    }

    #[test]
    fn scripts_of_pip_start_a_python_with_a_long_path() {
        let long = format!("/opt/{}/bin/python3", "x".repeat(150));
        for (word, expected) in [
            (long.as_str(), Some(long.as_str())),
            (
                "\"/opt/my env/bin/python3\"",
                Some("/opt/my env/bin/python3"),
            ),
            ("/opt/$X/python3", None),
            ("python3", None),
        ] {
            let expected: Vec<&str> = ["/bin/sh"].into_iter().chain(expected).collect();
            let head = format!("#!/bin/sh\n'''exec' {word} \"$0\" \"$@\"\n' '''\nimport sys\n");
            assert_eq!(names(&head), expected, "{word:?}");
        }
    }

    #[test]
    fn what_is_cut_is_not_told() {
        let cut = "x".repeat(300);
        assert_eq!(names(&format!("#!/opt/{cut}")), [""; 0]);
        assert_eq!(names(&format!("#!/usr/bin/env {cut}")), ["/usr/bin/env"]);
        assert_eq!(names(&format!("#!/bin/python {cut}")), ["/bin/python"]);
        let pip = format!("#!/bin/sh\n'''exec' /opt/{cut} \"$0\" \"$@\"\n");
        assert_eq!(names(&pip), ["/bin/sh"]);
    }
}
