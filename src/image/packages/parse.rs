//! Parsers of the files in which package managers record packages.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::{Found, MAX_PACKAGES};

/// Why a file says nothing.
pub(super) type Reason = String;

/// Reads the header of a Python package's `METADATA` or `PKG-INFO` (core metadata: fields of RFC 822 up to an empty
/// line). `cut` says that the file is longer than what was read of it.
pub(super) fn python(content: &[u8], cut: bool) -> Result<Found, Reason> {
    let fields = fields(header(content), cut);
    required(&fields, "Name", "Version")
}

/// Returns what precedes the first empty line.
fn header(content: &[u8]) -> &[u8] {
    let mut at = 0;
    for line in content.split_inclusive(|&b| b == b'\n') {
        if line.trim_ascii().is_empty() {
            return &content[..at];
        }
        at += line.len();
    }
    content
}

/// Reads `Field: value` lines; lines that begin with white space continue the value before and are left out. Of a field
/// that occurs more than once, the first counts. The last line of a `cut` file is left out, as it may be incomplete.
fn fields(text: &[u8], cut: bool) -> BTreeMap<&[u8], &[u8]> {
    let mut fields = BTreeMap::new();
    let whole = match text.iter().rposition(|&b| b == b'\n') {
        Some(end) if cut => &text[..end],
        None if cut => b"",
        _ => text,
    };
    for line in whole.split(|&b| b == b'\n') {
        if line.first().is_none_or(u8::is_ascii_whitespace) {
            continue;
        }
        if let Some(colon) = line.iter().position(|&b| b == b':') {
            let value = line[colon + 1..].trim_ascii();
            fields.entry(&line[..colon]).or_insert(value);
        }
    }
    fields
}

fn text<'a>(fields: &BTreeMap<&[u8], &'a [u8]>, field: &str) -> Result<&'a str, Reason> {
    let value = fields.get(field.as_bytes());
    let value = value.ok_or_else(|| format!("it has no {field}"))?;
    std::str::from_utf8(value).map_err(|_| format!("its {field} is not UTF-8"))
}

fn required(fields: &BTreeMap<&[u8], &[u8]>, name: &str, version: &str) -> Result<Found, Reason> {
    Ok(Found::new(text(fields, name)?, text(fields, version)?)?)
}

/// Reads the `DESCRIPTION` of an R package. `None`: it is not that of an installed package, which has a `Built` field
/// ("Writing R Extensions").
pub(super) fn r(content: &[u8], directory: &[u8]) -> Result<Option<Found>, Reason> {
    let fields = fields(content, false);
    let is = |field: &str| fields.contains_key(field.as_bytes());
    if !(is("Package") && is("Version") && is("Built")) {
        return Ok(None);
    }
    let found = required(&fields, "Package", "Version")?;
    // A package is loaded by the name of its directory.
    Ok((found.name.as_bytes() == directory).then_some(found))
}

/// Reads dpkg's status: paragraphs of fields, one for each package (deb-control(5)). Packages of which only settings
/// are left are left out. The names of packages of foreign architectures get their architecture, as in dpkg's lists.
pub(super) fn dpkg(content: &[u8]) -> Result<Vec<Found>, Reason> {
    let mut found = Vec::new();
    let mut own_architecture = None;
    let mut paragraphs = Vec::new();
    for paragraph in paragraphs_of(content) {
        let fields = fields(paragraph, false);
        // `WANT FLAG STATUS`; distroless images have no such field.
        if let Some(status) = fields.get(b"Status".as_slice()) {
            let word = status.split(|&b| b == b' ').nth(2).unwrap_or_default();
            if word == b"not-installed" || word == b"config-files" {
                continue;
            }
        }
        if fields.get(b"Package".as_slice()).copied() == Some(b"dpkg") {
            own_architecture = fields.get(b"Architecture".as_slice()).copied();
        }
        if paragraphs.len() == MAX_PACKAGES {
            return Err(format!("it lists more than {MAX_PACKAGES} packages"));
        }
        paragraphs.push(fields);
    }
    for fields in paragraphs {
        let mut package = required(&fields, "Package", "Version")?;
        let architecture = fields.get(b"Architecture".as_slice()).copied();
        let foreign = architecture
            .filter(|&of| of != b"all" && own_architecture.is_some_and(|own| own != of));
        if let Some(architecture) = foreign {
            let name = format!("{}:{}", package.name, String::from_utf8_lossy(architecture));
            package = Found::new(&name, &package.version)?;
        }
        found.push(package);
    }
    Ok(found)
}

/// Reads apk's database: paragraphs with `P:NAME` and `V:VERSION`.
pub(super) fn apk(content: &[u8]) -> Result<Vec<Found>, Reason> {
    let mut found = Vec::new();
    for paragraph in paragraphs_of(content) {
        if found.len() == MAX_PACKAGES {
            return Err(format!("it lists more than {MAX_PACKAGES} packages"));
        }
        found.push(required(&fields(paragraph, false), "P", "V")?);
    }
    Ok(found)
}

fn paragraphs_of(content: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = content;
    std::iter::from_fn(move || {
        loop {
            if rest.is_empty() {
                return None;
            }
            let paragraph = header(rest);
            let behind = &rest[paragraph.len()..];
            let empty = behind
                .iter()
                .position(|&b| b == b'\n')
                .map_or(behind.len(), |end| end + 1);
            rest = &behind[empty..];
            if !paragraph.is_empty() {
                return Some(paragraph);
            }
        }
    })
}

#[derive(Deserialize)]
struct Named {
    name: String,
    version: String,
}

/// Reads the JSON file of a conda package.
pub(super) fn conda(content: &[u8]) -> Result<Found, Reason> {
    let named: Named = serde_json::from_slice(content).map_err(|error| json_error(&error))?;
    Ok(Found::new(&named.name, &named.version)?)
}

/// Reads a `package.json`. `None`: it has no name and version, as files that only set the type of modules.
pub(super) fn npm(content: &[u8]) -> Result<Option<Found>, Reason> {
    #[derive(Deserialize)]
    struct Package {
        name: Option<String>,
        version: Option<String>,
    }
    let content = content.strip_prefix(b"\xef\xbb\xbf").unwrap_or(content);
    let package: Package = serde_json::from_slice(content).map_err(|error| json_error(&error))?;
    match (package.name, package.version) {
        (Some(name), Some(version)) => Ok(Some(Found::new(&name, &version)?)),
        _ => Ok(None),
    }
}

/// Returns the kind and the place of an error, without text of the file.
fn json_error(error: &serde_json::Error) -> Reason {
    let what = match error.classify() {
        serde_json::error::Category::Eof => "it ends too early",
        serde_json::error::Category::Data => "it lacks a name or a version",
        _ => "it is not JSON",
    };
    format!("{what} (line {}, column {})", error.line(), error.column())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(found: Result<Found, Reason>) -> Result<(String, String), Reason> {
        found.map(|found| (found.name, found.version))
    }

    fn pair(name: &str, version: &str) -> (String, String) {
        (name.to_owned(), version.to_owned())
    }

    #[test]
    fn python_metadata_is_its_header() {
        let text = b"Metadata-Version: 2.1\r\nName: Flask-SQLAlchemy\r\nVersion: 3.1.1\r\nSummary: x\r\n y\r\n\r\nName: not\n";
        assert_eq!(
            one(python(text, false)),
            Ok(pair("Flask-SQLAlchemy", "3.1.1"))
        );
        // What may be cut off is not taken for the value.
        let cut = b"Name: a\nSummary: z\nVersion: 1.2";
        assert_eq!(one(python(cut, false)), Ok(pair("a", "1.2")));
        assert_eq!(one(python(cut, true)), Err("it has no Version".to_owned()));
        for (bad, reason) in [
            (b"".as_slice(), "it has no Name"),
            (b"Name: a b\nVersion: 1\n", "its name is not one"),
            (b"Name: a\nVersion: \x1b[31m\n", "its version is not one"),
            (b"Name: \xff\nVersion: 1\n", "its Name is not UTF-8"),
            (
                "Name: a\u{202e}\nVersion: 1\n".as_bytes(),
                "its name is not one",
            ),
        ] {
            assert_eq!(one(python(bad, false)), Err(reason.to_owned()));
        }
        let long = format!("Name: {}\nVersion: 1\n", "n".repeat(257));
        assert!(python(long.as_bytes(), false).is_err());
    }

    #[test]
    fn dpkg_lists_what_is_installed() {
        let text = b"Package: dpkg\nStatus: install ok installed\nArchitecture: amd64\nVersion: 1.22.6\nDescription: x\n .\n more\n\n\
            Package: libc6\nStatus: install ok installed\nArchitecture: i386\nVersion: 2.40-1\n\n\n\
            Package: tzdata\nStatus: hold ok unpacked\nArchitecture: all\nVersion: 2024a\n\n\
            Package: gone\nStatus: deinstall ok config-files\nArchitecture: amd64\nVersion: 1\n";
        let found = dpkg(text).map(|all| {
            all.into_iter()
                .map(|f| (f.name, f.version))
                .collect::<Vec<_>>()
        });
        assert_eq!(
            found,
            Ok(vec![
                pair("dpkg", "1.22.6"),
                pair("libc6:i386", "2.40-1"),
                pair("tzdata", "2024a")
            ])
        );
        assert_eq!(
            dpkg(b"Package: base-files\nVersion: 13\n").map(|all| all.len()),
            Ok(1)
        );
        assert_eq!(dpkg(b""), Ok(Vec::new()));
        assert_eq!(dpkg(b"garbage\n"), Err("it has no Package".to_owned()));
    }

    #[test]
    fn apk_and_r_and_npm_and_conda() {
        let text = b"C:Q1x=\nP:musl\nV:1.2.5-r0\nA:x86_64\n\nP:busybox\nV:1.36.1-r2\nF:bin\n\n";
        assert_eq!(apk(text).map(|all| all.len()), Ok(2));
        let text = b"Package: dplyr\nVersion: 1.1.4\nDescription: A\n  b: c\nBuilt: R 4.4.1; ; 2024-01-01; unix\n";
        let found = r(text, b"dplyr").map(|found| found.map(|f| (f.name, f.version)));
        assert_eq!(found, Ok(Some(pair("dplyr", "1.1.4"))));
        assert_eq!(r(text, b"other"), Ok(None));
        assert_eq!(r(b"Package: dplyr\nVersion: 1.1.4\n", b"dplyr"), Ok(None));
        assert_eq!(r(b"free text", b"x"), Ok(None));
        let found = npm(br#"{"version":"5.4.2","name":"@types/node","x":{"name":1}}"#);
        assert_eq!(
            found.map(|f| f.map(|f| f.name)),
            Ok(Some("@types/node".to_owned()))
        );
        assert_eq!(npm(br#"{"type":"module"}"#), Ok(None));
        assert!(npm(b"{").is_err_and(|reason| reason.starts_with("it ends too early")));
        let text = br#"{"build":"py311_0","files":["a"],"name":"numpy","version":"1.26.4"}"#;
        assert_eq!(one(conda(text)), Ok(pair("numpy", "1.26.4")));
        assert!(conda(br#"{"name":"numpy"}"#).is_err_and(|reason| reason.starts_with("it lacks")));
        // Depth is bounded by the library.
        assert!(conda("[".repeat(100_000).as_bytes()).is_err());
    }
}
