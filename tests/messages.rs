//! Checks that errors are printed in one way only: all texts in the source, and the messages of the program when it is
//! used wrongly.

use std::path::{Path, PathBuf};
use std::process::Command;

type Outcome = Result<(), Box<dyn std::error::Error>>;

/// The only file that formats an error with its causes.
const PRINTER: &str = "common/message.rs";
/// Nouns of units. Their numbers are limits or measurements, which are as rarely one as zero.
const UNITS: [&str; 4] = ["bytes", "ms", "ids", "rounds"];

/// A source file without its tests.
struct Source {
    name: String,
    code: String,
}

fn sources() -> Result<Vec<Source>, Box<dyn std::error::Error>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    for entry in walkdir::WalkDir::new(&root).sort_by_file_name() {
        let entry = entry?;
        if entry
            .path()
            .extension()
            .is_none_or(|extension| extension != "rs")
        {
            continue;
        }
        let text = std::fs::read_to_string(entry.path())?;
        let code = text.split("#[cfg(test)]").next().unwrap_or_default();
        let lines = code
            .lines()
            .filter(|line| !line.trim_start().starts_with("//"));
        found.push(Source {
            name: entry.path().strip_prefix(&root)?.display().to_string(),
            code: lines.collect::<Vec<_>>().join("\n"),
        });
    }
    assert!(found.len() > 100, "only {} sources", found.len());
    Ok(found)
}

/// Returns the string literals of a piece of code.
fn literals(code: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut rest = code.chars().peekable();
    while let Some(c) = rest.next() {
        match c {
            '\'' => {
                // A character or a lifetime.
                let next = rest.next();
                if next == Some('\\') {
                    rest.next();
                }
                if rest.peek() == Some(&'\'') {
                    rest.next();
                }
            }
            '"' => {
                let mut text = String::new();
                while let Some(c) = rest.next() {
                    match c {
                        '"' => break,
                        '\\' => match rest.next() {
                            // A continued line.
                            Some('\n') => while rest.next_if(|c| c.is_whitespace()).is_some() {},
                            Some('n') => text.push('\n'),
                            Some(other) => text.push(other),
                            None => {}
                        },
                        c => text.push(c),
                    }
                }
                found.push(text);
            }
            _ => {}
        }
    }
    found
}

/// Returns the attributes `#[error(...)]`, each with the code up to the next one.
fn errors(code: &str) -> Vec<(&str, &str)> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices("#[error(") {
        let rest = &code[at + "#[error".len()..];
        let (mut depth, mut quoted, mut escaped, mut end) = (0, false, false, rest.len());
        for (at, c) in rest.char_indices() {
            match c {
                _ if escaped => escaped = false,
                '\\' => escaped = true,
                '"' => quoted = !quoted,
                '(' if !quoted => depth += 1,
                ')' if !quoted => {
                    depth -= 1;
                    if depth == 0 {
                        end = at;
                        break;
                    }
                }
                _ => {}
            }
        }
        let on = &rest[end..];
        let next = on[1..].find("#[error(").map_or(on.len(), |next| next + 1);
        found.push((&rest[1..end], &on[..next]));
    }
    found
}

fn none(wrong: &[String]) {
    assert!(
        wrong.is_empty(),
        "{} wrong:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}

#[test]
fn errors_are_put_into_words_in_one_place() -> Outcome {
    let mut wrong = Vec::new();
    for source in sources()?.iter().filter(|source| source.name != PRINTER) {
        for (number, line) in source.code.lines().enumerate() {
            let compact: String = line.split_whitespace().collect();
            let debug = ["error", "e", "err", "cause", "source", "why"]
                .iter()
                .any(|name| {
                    compact.contains(&format!("{{{name}:?}}"))
                        || compact.contains(&format!("{{{name}:#?}}"))
                        || compact.contains(&format!("?{name},"))
                });
            let chain = compact.contains(".source()") || compact.contains(":#}");
            let other = compact.contains("eprint!(") || compact.contains("eprintln!(");
            if debug || chain || other {
                wrong.push(format!(
                    "{}, line {} of its code: {line}",
                    source.name,
                    number + 1
                ));
            }
        }
    }
    none(&wrong);
    Ok(())
}

#[test]
fn the_texts_of_errors_are_alike_and_tell_their_cause() -> Outcome {
    let (mut wrong, mut count) = (Vec::new(), 0);
    for source in sources()? {
        for (attribute, on) in errors(&source.code) {
            count += 1;
            let mut say = |what: &str| wrong.push(format!("{}: {what}: {attribute}", source.name));
            if attribute.trim() == "transparent" {
                continue;
            }
            let text = literals(attribute).into_iter().next().unwrap_or_default();
            if text.ends_with('.') && !text.ends_with("..")
                || text.ends_with(':')
                || text.ends_with(' ')
            {
                say("its end");
            }
            if text.contains('\n') {
                say("a line end");
            }
            // A field of this name is the cause; the fields end with the closing brace.
            let fields = on.split('}').next().unwrap_or_default();
            let named = fields.contains(" source: ") && !fields.contains("#[source]");
            if named && !attribute.contains("source") {
                say("its cause is not told");
            }
            if text.contains(":?}")
                && (text.contains("{source:?}")
                    || text.contains("{0:?}") && fields.contains("Error)"))
            {
                say("a cause as programmers see it");
            }
        }
    }
    assert!(count > 150, "only {count} errors");
    none(&wrong);
    Ok(())
}

#[test]
fn one_is_not_many() -> Outcome {
    let nouns = [
        "paths",
        "files",
        "layers",
        "entries",
        "processes",
        "mounts",
        "saves",
        "users",
        "images",
        "tags",
        "seconds",
        "hours",
        "minutes",
        "days",
        "arguments",
        "connections",
        "nodes",
        "differences",
        "directories",
        "volumes",
        "keys",
        "tokens",
        "sessions",
        "requests",
        "blobs",
        "manifests",
        "attributes",
        "containers",
    ];
    let mut wrong = Vec::new();
    for source in sources()? {
        // Output for people has a form of its own: tables, and the demonstration.
        if [
            "cli/view.rs",
            "cli/bench_view.rs",
            "demo/mod.rs",
            "bench/report.rs",
        ]
        .contains(&source.name.as_str())
        {
            continue;
        }
        for text in literals(&source.code) {
            for noun in nouns.iter().filter(|noun| !UNITS.contains(noun)) {
                for (at, _) in text.match_indices(&format!("}} {noun}")) {
                    let begins = text[..at].rfind('{').unwrap_or_default();
                    // A limit is never one.
                    if text[begins..at].starts_with("{MAX_") {
                        continue;
                    }
                    let after = text[at + 2 + noun.len()..].chars().next();
                    if !after.is_some_and(char::is_alphanumeric) {
                        wrong.push(format!("{}: {text}", source.name));
                    }
                }
            }
        }
    }
    none(&wrong);
    Ok(())
}

/// Runs the program with arguments that fail.
fn said(directory: &Path, line: &str) -> Result<(i32, String), Box<dyn std::error::Error>> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_upperdeck"));
    let dir = directory.display().to_string();
    command
        .args(
            line.split_whitespace()
                .map(|word| word.replace("DIR", &dir)),
        )
        .current_dir(directory);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("UPPERDECK_") {
            command.env_remove(name);
        }
    }
    let done = command
        .env("NO_COLOR", "1")
        .env_remove("SOURCE_DATE_EPOCH")
        .output()?;
    let exit = done.status.code().ok_or("a signal")?;
    Ok((exit, String::from_utf8(done.stderr)?))
}

/// Returns what is wrong with a message, or `None`.
fn judge(said: &str) -> Option<&'static str> {
    let mut lines = said.lines();
    let first = lines.next().unwrap_or_default();
    let Some(text) = first.strip_prefix("upperdeck: ") else {
        // The argument parser's own, with its own hints.
        return (!first.starts_with("error: ")).then_some("neither a message nor a usage error");
    };
    if lines.any(|line| !line.starts_with("  ")) {
        return Some("more than one message");
    }
    let debug = [
        "Os {", "Some(", "None", "kind: ", "Error {", "Custom {", "panicked", "\\n", "\\\"",
    ];
    if debug.iter().any(|word| said.contains(word)) {
        return Some("as programmers see it");
    }
    if said.trim_end().ends_with(['.', ':', ',']) {
        return Some("its end");
    }
    let parts: Vec<_> = text.split(": ").filter(|part| part.len() > 8).collect();
    let twice = parts
        .iter()
        .enumerate()
        .any(|(at, part)| parts[..at].contains(part));
    twice.then_some("told twice")
}

#[test]
fn what_the_program_says_is_one_message() -> Outcome {
    let dir = tempfile::tempdir()?;
    let at = |name: &str| -> PathBuf { dir.path().join(name) };
    std::fs::write(at("garbage"), "{not: [json")?;
    std::fs::write(at("toml"), "[manager\nx")?;
    std::fs::write(at("unknown.toml"), "[manager]\nno-such-flag = 1\n")?;
    std::fs::create_dir(at("empty"))?;
    std::fs::create_dir(at("full"))?;
    std::fs::write(at("full/file"), "x")?;
    std::fs::create_dir_all(at("layout/blobs/sha256"))?;
    std::fs::write(
        at("layout/oci-layout"),
        "{\"imageLayoutVersion\":\"1.0.0\"}",
    )?;
    std::fs::write(
        at("layout/index.json"),
        "{\"schemaVersion\":2,\"manifests\":[]}",
    )?;
    let roots = "--containerd-root DIR/no --containerd-state DIR/no --docker-root DIR/no --storage-root DIR/no \
                 --storage-runroot DIR/no";
    let commit = format!("commit --progress none --state-dir DIR/state {roots}");
    let uses = [
        "layer --upper DIR/no -o DIR/x",
        "layer --upper DIR/garbage -o DIR/x",
        "layer --upper DIR/full --lower DIR/no -o DIR/x",
        "layer --upper DIR/full -o DIR/no/x",
        "layer --upper DIR/full -o DIR/empty",
        "layer --upper DIR/full --exclude [ -o DIR/x",
        "layer --upper DIR/full --compression gzip --compression-level 99 -o DIR/x",
        "validate oci:DIR/no:x --against DIR/garbage",
        "validate oci:DIR/empty:x --against DIR/garbage",
        "validate oci:DIR/layout:x --against DIR/garbage",
        "validate oci-archive:DIR/garbage:x --against DIR/garbage",
        "validate DIR/garbage --against DIR/no",
        "validate DIR/no --against DIR/full/file",
        "validate DIR/garbage --write DIR/x",
        "validate DIR/garbage --write DIR/no/x",
        "validate DIR/garbage --tree --write -",
        "validate DIR/garbage --texts 2M --write -",
        "validate DIR/garbage",
        "validate 127.0.0.1:1/x:y --write -",
        "image ls oci:DIR/no",
        "image ls oci:DIR/full",
        "image ls 127.0.0.1:1/x",
        "image ls http://x",
        "image rm oci:DIR/layout:no",
        "image rm 127.0.0.1:1/x/y:z",
        "image prune oci:DIR/no",
        "image prune oci:DIR/full",
        "image prune 127.0.0.1:1/x",
        "job ls --server http://127.0.0.1:1",
        "job show x --server http://127.0.0.1:1",
        "job ls --server ftp://x",
        "job ls --server http://127.0.0.1:1 --token-file DIR/no",
        "key --key-file DIR/no --node n",
        "key --key-file DIR/garbage --node n",
        "agent --config DIR/no",
        "agent --config DIR/toml",
        "agent --config DIR/unknown.toml",
        "agent --node n --redis ftp://x --owner fixed:a --allow r.example --key-file DIR/no --spool-dir DIR/spool",
        "manager --config DIR/toml",
        "manager --config DIR/empty",
        "manager --redis redis://127.0.0.1:1 --target x --listen y --tokens-file DIR/no --record sqlite:DIR/r --key-file DIR/no",
        "up --config DIR/garbage",
        "doctor --config DIR/no",
        "man DIR/garbage",
        "completions tcsh",
        "bench --directory DIR/no",
        "bench --directory DIR/garbage",
        "inspect nothing",
        "diff nothing",
        "inspect pid:999999999",
        "diff pid:x",
        "ps --format xml",
        "ps --log upperdeck=loudly",
        "nonsense",
    ];
    let commits = [
        "nothing oci:DIR/x",
        "nothing oci-archive:DIR/full",
        "nothing UPPER/Case:tag",
        "nothing ftp:x",
        "nothing oci:",
        "nothing 127.0.0.1:1/x@sha256:0",
        "pid:999999999 oci:DIR/x",
        "pid:1 --base oci:DIR/no:x oci:DIR/y",
        "pid:1 --base oci:DIR/layout:x oci:DIR/y",
        "pid:1 --base No! oci:DIR/y",
        "nothing --change RUN oci:DIR/x",
        "nothing --creds nocolon oci:DIR/x",
        "nothing --creds-file DIR/no 127.0.0.1:1/x:y",
        "nothing --authfile DIR/garbage 127.0.0.1:1/x:y",
        "nothing --cert-dir DIR/no 127.0.0.1:1/x:y",
        "nothing --label =x oci:DIR/x",
        "nothing --timestamp yesterday oci:DIR/x",
        "nothing --include-volume relative oci:DIR/x",
        "nothing --allow-volume relative oci:DIR/x",
        "nothing --exclude [ oci:DIR/x",
        "nothing oci:DIR/full",
        "nothing oci:DIR/garbage/x",
        "nothing oci-archive:DIR/no/x",
    ];
    let plain = uses.iter().map(|line| {
        let looks = ["inspect", "diff", "ps"]
            .iter()
            .any(|verb| line.starts_with(verb));
        if looks {
            format!("{line} {roots}")
        } else {
            (*line).to_owned()
        }
    });
    let all: Vec<String> = plain
        .chain(commits.iter().map(|line| format!("{commit} {line}")))
        .collect();
    let mut wrong = Vec::new();
    for line in &all {
        let (exit, said) = said(dir.path(), line)?;
        if exit == 0 {
            wrong.push(format!("{line}: exit 0"));
        } else if let Some(what) = judge(&said) {
            wrong.push(format!("{line}: exit {exit}: {what}: {said}"));
        }
    }
    none(&wrong);
    Ok(())
}

#[test]
fn what_is_wrong_with_a_message_is_seen() {
    for (said, wrong) in [
        (
            "upperdeck: cannot read x: No such file or directory (os error 2)\n",
            None,
        ),
        ("upperdeck: several:\n  a\n  b\n", None),
        ("error: unexpected argument\n\nUsage: x\n", None),
        (
            "thread 'main' panicked at x\n",
            Some("neither a message nor a usage error"),
        ),
        ("upperdeck: a\nb\n", Some("more than one message")),
        ("upperdeck: Os { code: 2 }\n", Some("as programmers see it")),
        ("upperdeck: a\\nb\n", Some("as programmers see it")),
        ("upperdeck: it failed.\n", Some("its end")),
        (
            "upperdeck: the disk is full: x: the disk is full\n",
            Some("told twice"),
        ),
    ] {
        assert_eq!(judge(said), wrong, "{said}");
    }
}
