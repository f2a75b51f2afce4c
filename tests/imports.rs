//! The structure that the design draws: which module may import which. A module that reaches where it should not is a
//! wall moved without anybody deciding it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

type Outcome = Result<(), Box<dyn std::error::Error>>;

/// Module, and what of the crate it may import; in the order in which a save flows through them.
const TABLE: [(&str, &[&str]); 31] = [
    ("digest", &[]),
    ("escape", &[]),
    ("message", &[]),
    ("cancel", &[]),
    ("hush", &[]),
    ("private", &[]),
    ("background", &["overlay"]),
    ("overlay", &[]),
    ("container", &["overlay", "digest"]),
    ("confine", &[]),
    ("freeze", &["confine"]),
    ("scan", &["overlay"]),
    ("layer", &["scan", "overlay", "digest"]),
    ("manifest", &["digest"]),
    ("registry", &["manifest", "digest"]),
    ("layout", &["manifest", "digest", "private"]),
    ("harbor", &["registry", "digest"]),
    (
        "images",
        &["harbor", "registry", "layout", "manifest", "digest"],
    ),
    (
        "destination",
        &["harbor", "registry", "layout", "digest", "private"],
    ),
    ("spec", &["overlay", "digest"]),
    ("prove", &["spec", "overlay"]),
    ("state", &["scan", "digest", "private"]),
    ("job", &["digest"]),
    (
        "commit",
        &[
            "background",
            "cancel",
            "container",
            "destination",
            "digest",
            "freeze",
            "job",
            "layer",
            "layout",
            "manifest",
            "overlay",
            "private",
            "prove",
            "registry",
            "scan",
            "state",
        ],
    ),
    ("queue", &["hush", "job"]),
    ("record", &["job"]),
    (
        "agent",
        &[
            "background",
            "cancel",
            "container",
            "freeze",
            "job",
            "private",
            "queue",
        ],
    ),
    (
        "doctor",
        &[
            "confine",
            "container",
            "harbor",
            "overlay",
            "queue",
            "record",
            "registry",
        ],
    ),
    ("portal", &["job"]),
    (
        "manager",
        &[
            "cancel",
            "destination",
            "digest",
            "harbor",
            "hush",
            "images",
            "job",
            "layout",
            "portal",
            "queue",
            "record",
            "registry",
        ],
    ),
    (
        "bench",
        &[
            "cancel",
            "commit",
            "container",
            "destination",
            "layer",
            "overlay",
            "registry",
            "scan",
        ],
    ),
];
/// These may be imported by all.
const EVERYWHERE: [&str; 2] = ["escape", "message"];
/// These may import anything.
const EDGES: [&str; 4] = ["cli", "demo", "lib", "main"];

fn sources(dir: &Path, found: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            sources(&path, found)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    Ok(())
}

/// First words after `crate::` in code: comments and tests are not held to the table.
fn imports(text: &str) -> BTreeSet<String> {
    let code = text.split("#[cfg(test)]").next().unwrap_or_default();
    let lines = code
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"));
    let mut found = BTreeSet::new();
    for line in lines {
        for rest in line.split("crate::").skip(1) {
            let names = match rest.strip_prefix('{') {
                Some(group) => group
                    .split('}')
                    .next()
                    .unwrap_or_default()
                    .split(',')
                    .collect(),
                None => vec![rest],
            };
            for name in names {
                let end = name
                    .trim()
                    .find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
                let name = &name.trim()[..end.unwrap_or(name.trim().len())];
                if !name.is_empty() {
                    found.insert(name.to_owned());
                }
            }
        }
    }
    found
}

#[test]
fn every_module_imports_only_what_the_table_lets_it() -> Outcome {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&src, &mut files)?;
    assert!(files.len() > 30, "only {} sources found", files.len());
    let mut wrong = Vec::new();
    for file in files {
        let inside = file.strip_prefix(&src)?;
        let first = inside.components().next().ok_or("no name")?;
        let module = Path::new(first.as_os_str())
            .file_stem()
            .and_then(|name| name.to_str())
            .ok_or("no name")?;
        if EDGES.contains(&module) {
            continue;
        }
        let Some((_, allowed)) = TABLE.iter().find(|(name, _)| *name == module) else {
            wrong.push(format!(
                "{}: the table does not know {module}",
                inside.display()
            ));
            continue;
        };
        for import in imports(&std::fs::read_to_string(&file)?) {
            if import != module
                && !EVERYWHERE.contains(&import.as_str())
                && !allowed.contains(&import.as_str())
            {
                wrong.push(format!(
                    "{}: {module} must not import {import}",
                    inside.display()
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

#[test]
fn imports_are_seen_however_they_are_written() {
    let text = "use crate::digest::Digest;\nuse crate::{layer, scan};\nfn f() -> crate::job::Event {}\n// crate::no\n\
                #[cfg(test)]\nmod tests { use crate::cli; }";
    let expected = ["digest", "job", "layer", "scan"].map(str::to_owned);
    assert_eq!(imports(text), BTreeSet::from(expected));
}
