//! The structure of the source: which module may import which, and that no two depend on each other.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

type Outcome = Result<(), Box<dyn Error>>;
/// A module's path from the root of the crate: `["node", "overlay"]`.
type Module = Vec<String>;

/// Each wing, and which of the others it may import; in the order of `lib.rs`, so that each names only what is above it.
const WINGS: [(&str, &[&str]); 10] = [
    ("common", &[]),
    ("node", &["common"]),
    ("layer", &["common", "node"]),
    ("image", &["common", "node"]),
    ("store", &["common", "image"]),
    ("save", &["common", "node", "layer", "image", "store"]),
    (
        "service",
        &["common", "node", "layer", "image", "store", "save"],
    ),
    ("bench", &["common", "node", "layer", "store", "save"]),
    (
        "cli",
        &[
            "common", "node", "layer", "image", "store", "save", "service", "bench", "demo",
        ],
    ),
    (
        "demo",
        &["common", "node", "layer", "image", "store", "save"],
    ),
];

/// What the sources say of each other.
#[derive(Default)]
struct Crate {
    /// Every module with the paths that its code names, as written: `["super", "plan", "Item"]`.
    named: BTreeMap<Module, Vec<Vec<String>>>,
}

impl Crate {
    fn read(src: &Path) -> Result<Self, Box<dyn Error>> {
        let mut files = Vec::new();
        sources(src, &mut files)?;
        let mut read = Self::default();
        for file in files {
            let mut module: Module = file
                .strip_prefix(src)?
                .with_extension("")
                .iter()
                .map(|part| part.to_string_lossy().into_owned())
                .collect();
            if module == ["main"] {
                continue;
            }
            if module
                .last()
                .is_some_and(|last| last == "mod" || last == "lib")
            {
                module.pop();
            }
            read.named
                .insert(module, paths(&fs::read_to_string(&file)?));
        }
        Ok(read)
    }

    /// The module in which what `from` calls `path` is defined: through `use` in the modules between, at most `depth` of them.
    fn resolve(&self, from: &Module, path: &[String], depth: usize) -> Option<Module> {
        let (first, mut rest) = path.split_first()?;
        let mut module = match first.as_str() {
            "crate" => Module::new(),
            "self" => from.clone(),
            "super" => from.split_last()?.1.to_vec(),
            name => [from.clone(), vec![name.to_owned()]].concat(),
        };
        while let Some((name, after)) = rest.split_first() {
            if name == "super" {
                module.pop();
            } else {
                let mut child = module.clone();
                child.push(name.clone());
                if !self.named.contains_key(&child) {
                    break;
                }
                module = child;
            }
            rest = after;
        }
        let known = self.named.get(&module)?;
        let Some(name) = rest.first().filter(|_| depth > 0) else {
            return Some(module);
        };
        let brought = known
            .iter()
            .find(|path| path.len() > 1 && path.last() == Some(name) && path[0] != "super")
            .and_then(|path| self.resolve(&module, path, depth - 1));
        Some(brought.unwrap_or(module))
    }

    /// Who imports whom: each pair once.
    fn imports(&self) -> BTreeSet<(&Module, Module)> {
        let mut found = BTreeSet::new();
        for (module, named) in &self.named {
            for path in named {
                let starts = ["crate", "super", "self"].contains(&path[0].as_str());
                if let Some(other) = self.resolve(module, path, 4).filter(|_| starts) {
                    found.insert((module, other));
                }
            }
        }
        found
    }
}

fn sources(dir: &Path, found: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in walkdir::WalkDir::new(dir) {
        let path = entry?.into_path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    Ok(())
}

/// All paths of the code that have more than one part, groups in braces taken apart. Comments and the tests at the end of a
/// file are not looked at: they may import what they need.
fn paths(text: &str) -> Vec<Vec<String>> {
    let code = text.split("\n#[cfg(test)]\nmod ").next().unwrap_or(text);
    let code: String = code
        .lines()
        .map(|line| line.split("//").next().unwrap_or(line))
        .collect::<Vec<_>>()
        .join("\n");
    let mut found = Vec::new();
    let mut rest = code.as_str();
    while let Some(start) = rest.find(|c: char| c.is_ascii_alphabetic() || c == '_') {
        rest = &rest[start..];
        rest = path(rest, &[], &mut found);
    }
    found.retain(|path| path.len() > 1);
    found
}

/// Reads one path at the start of `text`, with what its braces hold, and returns the text behind it.
fn path<'a>(text: &'a str, before: &[String], found: &mut Vec<Vec<String>>) -> &'a str {
    let end = text
        .find(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .unwrap_or(text.len());
    let mut whole = before.to_vec();
    if &text[..end] != "self" || before.is_empty() {
        whole.push(text[..end].to_owned());
    }
    let rest = &text[end..];
    let Some(behind) = rest.strip_prefix("::") else {
        found.push(whole);
        return rest;
    };
    let Some(mut group) = behind.strip_prefix('{') else {
        if behind.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_') {
            return path(behind, &whole, found);
        }
        found.push(whole);
        return behind;
    };
    loop {
        group = group.trim_start_matches(|c: char| c.is_whitespace() || c == ',');
        if let Some(rest) = group.strip_prefix('}') {
            return rest;
        }
        if !group.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_') {
            return group;
        }
        group = path(group, &whole, found);
        if let Some(rest) = group.trim_start().strip_prefix("as ") {
            group = rest.trim_start_matches(|c: char| c.is_ascii_alphanumeric() || c == '_');
        }
    }
}

/// The imports between the modules of each directory: of what lies in two subdirectories, those count.
fn between_siblings(
    imports: &BTreeSet<(&Module, Module)>,
) -> BTreeMap<Module, BTreeSet<(String, String)>> {
    let mut found: BTreeMap<Module, BTreeSet<_>> = BTreeMap::new();
    for (from, to) in imports {
        let shared = from.iter().zip(to).take_while(|(a, b)| a == b).count();
        if let (Some(a), Some(b)) = (from.get(shared), to.get(shared)) {
            found
                .entry(to[..shared].to_vec())
                .or_default()
                .insert((a.clone(), b.clone()));
        }
    }
    found
}

/// The names that can be reached from themselves.
fn in_circles(arrows: &BTreeSet<(String, String)>) -> BTreeSet<&str> {
    let mut left: BTreeSet<&(String, String)> = arrows.iter().collect();
    loop {
        let starts: BTreeSet<&str> = left.iter().map(|(from, _)| from.as_str()).collect();
        let ends: BTreeSet<&str> = left.iter().map(|(_, to)| to.as_str()).collect();
        let before = left.len();
        left.retain(|(from, to)| starts.contains(to.as_str()) && ends.contains(from.as_str()));
        if left.len() == before {
            return left.iter().map(|(from, _)| from.as_str()).collect();
        }
    }
}

/// The names of the packages that a table of Cargo.toml lists, such as `[dependencies]`.
fn dependencies(manifest: &toml::Table, table: &str) -> BTreeSet<String> {
    let table = manifest.get(table).and_then(toml::Value::as_table);
    table
        .into_iter()
        .flatten()
        .map(|(name, _)| name.clone())
        .collect()
}

/// The packages of `listed` that no path in the sources of `dirs` begins with. Paths alone count: not comments and text.
fn unnamed(listed: BTreeSet<String>, dirs: &[&str]) -> Result<Vec<String>, Box<dyn Error>> {
    let mut files = Vec::new();
    for dir in dirs {
        sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join(dir), &mut files)?;
    }
    let mut named = BTreeSet::new();
    for file in files {
        let text = fs::read_to_string(&file)?.replace("\n#[cfg(test)]\nmod ", "\nmod ");
        named.extend(paths(&text).into_iter().map(|path| path[0].clone()));
    }
    let is_unnamed = |name: &String| !named.contains(&name.replace('-', "_"));
    Ok(listed.into_iter().filter(is_unnamed).collect())
}

fn src() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

#[test]
fn every_wing_imports_only_what_the_table_lets_it() -> Outcome {
    let read = Crate::read(&src())?;
    assert!(
        read.named.len() > 200,
        "only {} sources found",
        read.named.len()
    );
    let mut wrong = Vec::new();
    for (from, to) in read.imports() {
        let (Some(wing), Some(other)) = (from.first(), to.first()) else {
            continue;
        };
        let allowed = WINGS.iter().find(|(name, _)| name == wing);
        let allowed = allowed.is_some_and(|(_, allowed)| allowed.contains(&other.as_str()));
        if wing != other && !allowed {
            wrong.push(format!(
                "{} must not import {}",
                from.join("::"),
                to.join("::")
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

#[test]
fn no_two_modules_of_a_directory_depend_on_each_other() -> Outcome {
    let read = Crate::read(&src())?;
    let imports = read.imports();
    let mut wrong = Vec::new();
    for (directory, arrows) in between_siblings(&imports) {
        let circle = in_circles(&arrows);
        for (from, to) in &arrows {
            if circle.contains(from.as_str()) && circle.contains(to.as_str()) {
                wrong.push(format!("in {}: {from} -> {to}", directory.join("::")));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

/// What the program may call of nix; everything else goes through rustix (docs/design.md, "What is written here").
const NIX: [&str; 8] = [
    "nix::sched::CloneFlags",
    "nix::sched::unshare",
    "nix::sys::signal::SigSet",
    "nix::unistd::Gid",
    "nix::unistd::Uid",
    "nix::unistd::close",
    "nix::unistd::setfsgid",
    "nix::unistd::setfsuid",
];

#[test]
fn system_calls_go_through_rustix_unless_it_lacks_them() -> Outcome {
    let mut files = Vec::new();
    sources(&src(), &mut files)?;
    let mut called = BTreeSet::new();
    for file in files {
        let named = paths(&fs::read_to_string(file)?);
        called.extend(
            named
                .iter()
                .filter(|path| path[0] == "nix")
                .map(|path| path.join("::")),
        );
    }
    let called: Vec<_> = called
        .iter()
        .filter(|call| !NIX.iter().any(|allowed| call.starts_with(allowed)))
        .collect();
    assert_eq!(called, [""; 0]);
    Ok(())
}

#[test]
fn every_dependency_is_used_by_a_source() -> Outcome {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
    let manifest: toml::Table = toml::from_str(&fs::read_to_string(manifest)?)?;
    let mut program = dependencies(&manifest, "dependencies");
    // Those of one target only.
    let targets = manifest.get("target").and_then(toml::Value::as_table);
    for target in targets.into_iter().flatten() {
        let table = target.1.as_table().ok_or("a target has tables")?;
        program.extend(dependencies(table, "dependencies"));
    }
    let tests = dependencies(&manifest, "dev-dependencies");
    assert!(program.contains("serde") && program.contains("mimalloc") && tests.contains("boon"));
    assert_eq!(unnamed(program, &["src"])?, [""; 0], "[dependencies]");
    assert_eq!(
        unnamed(tests, &["tests", "benches"])?,
        [""; 0],
        "[dev-dependencies]"
    );
    let invented = BTreeSet::from(["serde".to_owned(), "not-a-crate".to_owned()]);
    assert_eq!(unnamed(invented, &["src"])?, ["not-a-crate"]);
    Ok(())
}

/// Crates that are built in more than one version, and who needs the older one.
const TWICE: [(&str, &str); 29] = [
    ("base64", "oci-client, openidconnect, sqlx"),
    ("block-buffer", "digest"),
    // openidconnect has the older ones of the crates for RSA; it verifies with them, and has no private key.
    ("const-oid", "openidconnect (rsa)"),
    ("cpufeatures", "sha2"),
    ("crypto-common", "digest"),
    ("darling", "oci-spec (derive_builder)"),
    ("darling_core", "oci-spec (derive_builder)"),
    ("darling_macro", "oci-spec (derive_builder)"),
    ("der", "openidconnect (rsa)"),
    ("digest", "openidconnect, sqlx"),
    ("foldhash", "hashbrown"),
    ("getrandom", "ring, rand"),
    ("hashbrown", "sqlx"),
    ("hmac", "openidconnect, sqlx"),
    ("jiff", "k8s-openapi, kube"),
    ("jiff-core", "k8s-openapi, kube"),
    ("pem", "kube"),
    ("pem-rfc7468", "openidconnect (rsa)"),
    ("pkcs1", "openidconnect (rsa)"),
    ("pkcs8", "openidconnect (rsa)"),
    ("rand", "openidconnect, sqlx"),
    ("rand_core", "rand"),
    ("rsa", "openidconnect"),
    // sqlx 0.9 has the newer ones of its crates, but for this one. It needs Rust 1.94.
    ("sha2", "openidconnect, sqlx"),
    ("signature", "openidconnect (rsa)"),
    ("spki", "openidconnect (rsa)"),
    ("syn", "macros of serde, axum and others"),
    ("thiserror", "openidconnect"),
    ("thiserror-impl", "openidconnect"),
];

#[test]
fn crates_are_built_in_one_version() -> Outcome {
    let listed = std::process::Command::new(env!("CARGO"))
        .args(["tree", "--locked", "--offline", "--duplicates"])
        .args([
            "--edges",
            "normal,build",
            "--depth",
            "0",
            "--prefix",
            "none",
        ])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()?;
    let errors = String::from_utf8_lossy(&listed.stderr);
    assert!(listed.status.success(), "{errors}");
    let listed = String::from_utf8(listed.stdout)?;
    let mut versions: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for line in listed.lines() {
        // The same version can be listed twice, with other features for build scripts.
        if let Some((name, rest)) = line.split_once(' ') {
            let version = rest.split(' ').next().unwrap_or(rest);
            versions.entry(name).or_default().insert(version);
        }
    }
    versions.retain(|_, versions| versions.len() > 1);
    let found: Vec<_> = versions.keys().copied().collect();
    assert_eq!(found, TWICE.map(|(name, _)| name), "{versions:?}");
    Ok(())
}

#[test]
fn paths_are_seen_however_they_are_written() {
    let text = "use crate::digest::Digest;\nuse crate::{layer, scan::{self, Scan as S}};\n// crate::no\n\
                fn f() -> super::job::Event {}\n#[cfg(test)]\nmod tests { use crate::cli; }";
    let mut seen: Vec<_> = paths(text).iter().map(|path| path.join("::")).collect();
    seen.sort();
    let expected = [
        "crate::digest::Digest",
        "crate::layer",
        "crate::scan",
        "crate::scan::Scan",
        "super::job::Event",
    ];
    assert_eq!(seen, expected);
}

#[test]
fn circles_are_found_behind_chains() {
    let arrows = [("a", "b"), ("b", "c"), ("c", "b"), ("c", "d")];
    let arrows = arrows
        .map(|(a, b)| (a.to_owned(), b.to_owned()))
        .into_iter()
        .collect();
    assert_eq!(in_circles(&arrows), BTreeSet::from(["b", "c"]));
}
