//! The destination of images: a template that the administrator sets and the server fills in. No input of a caller can
//! select a host, a project or the place of another user.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::common::escape;
use crate::common::reference::{check_repository, check_tag};
use crate::store::destination::Target;
use crate::store::images::ImageLocation;

/// Maximum length of a user's name in bytes.
const MAX_USER: usize = 64;
/// Maximum length of an image's name in bytes.
const MAX_NAME: usize = 128;
/// Prefix of an escaped user name. No name that needs no escaping contains `__`.
const ESCAPED: &str = "u__0";

/// The text is not a valid template.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is not a template for images: {reason}; write HOST[:PORT]/PROJECT/{{user}}/{{name}}:{{tag}} or \
     oci:/DIRECTORY/{{user}}/{{name}}:{{tag}}"
)]
pub struct TemplateError {
    text: String,
    reason: String,
}

/// `HOST[:PORT]/…/{user}/{name}:{tag}` or `oci:/…/{user}/{name}:{tag}`. `{user}` and `{name}` are each a complete
/// component and `{name}` is the last one, so that different users and names never share a place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    layout: bool,
    /// Host of the registry; empty for layouts.
    host: String,
    /// Components before `{user}`.
    before: Vec<String>,
    /// Components between `{user}` and `{name}`.
    between: Vec<String>,
}

/// The part of a requested destination that is invalid, with the reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The user's name cannot be part of a path.
    User(String),
    /// The name of the image is invalid.
    Name(String),
    /// The tag is invalid.
    Tag(String),
}

impl FromStr for Template {
    type Err = TemplateError;

    fn from_str(text: &str) -> Result<Self, TemplateError> {
        let wrong = |reason: &str| TemplateError {
            text: text.chars().take(400).collect(),
            reason: reason.to_owned(),
        };
        let layout = text.starts_with("oci:");
        let path = text
            .strip_prefix("oci:")
            .or_else(|| text.strip_prefix("docker://"))
            .unwrap_or(text);
        let path = path
            .strip_suffix("/{name}:{tag}")
            .ok_or_else(|| wrong("it does not end in /{name}:{tag}"))?;
        let (host, path) = if layout {
            let path = path
                .strip_prefix('/')
                .ok_or_else(|| wrong("the directory is not an absolute path"))?;
            (String::new(), path)
        } else {
            let (host, path) = path
                .split_once('/')
                .ok_or_else(|| wrong("it names no host"))?;
            (host.to_owned(), path)
        };
        let mut parts: Vec<String> = path.split('/').map(str::to_owned).collect();
        let at = parts
            .iter()
            .position(|part| part == "{user}")
            .ok_or_else(|| wrong("{user} is not one of its components"))?;
        let between = parts.split_off(at + 1);
        parts.pop();
        let template = Self {
            layout,
            host,
            before: parts,
            between,
        };
        let fixed = template.before.iter().chain(&template.between);
        for part in fixed {
            if part.is_empty() || part == "." || part == ".." || part.contains(['{', '}', ':']) {
                return Err(wrong(&format!("{part:?} cannot be part of it")));
            }
        }
        template
            .fill("user", "name", "tag")
            .map_err(|refused| match refused {
                Refused::User(reason) | Refused::Name(reason) | Refused::Tag(reason) => {
                    wrong(&reason)
                }
            })?;
        Ok(template)
    }
}

impl fmt::Display for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.layout { "oci:" } else { &self.host })?;
        for part in &self.before {
            write!(f, "/{part}")?;
        }
        f.write_str("/{user}")?;
        for part in &self.between {
            write!(f, "/{part}")?;
        }
        f.write_str("/{name}:{tag}")
    }
}

impl Template {
    /// Returns whether images are saved into OCI layout directories.
    pub(crate) fn is_layout(&self) -> bool {
        self.layout
    }

    /// Returns the host of the registry; `None` for layouts.
    pub(crate) fn host(&self) -> Option<&str> {
        (!self.layout).then_some(self.host.as_str())
    }

    /// Returns the first component of a registry's repositories (Harbor's project), if it is the same for all users.
    pub fn project(&self) -> Option<&str> {
        let first = self.before.first().map(String::as_str);
        first.filter(|_| !self.layout)
    }

    /// Returns the destination of a user's image in the syntax of `commit`. Names and tags follow the grammar of the
    /// OCI distribution specification; layouts permit fewer tags.
    ///
    /// Fails with the part that is invalid.
    pub fn fill(&self, user: &str, name: &str, tag: &str) -> Result<String, Refused> {
        if name.len() > MAX_NAME || name.contains('/') || check_repository(name).is_err() {
            return Err(Refused::Name(format!(
                "{:?} is not a name for an image: lower-case letters, digits and single . _ - between them, {MAX_NAME} at \
                 most",
                shorten(name)
            )));
        }
        check_tag(tag).map_err(|error| Refused::Tag(error.to_string()))?;
        let repository = self.repository(user, name)?;
        let text = format!("{repository}:{tag}");
        let target = Target::for_saving(&text).map_err(|error| Refused::Tag(error.to_string()))?;
        // The agent will parse the text with the same rules. The result must be exactly the filled-in parts.
        let meant = match &target {
            Target::Registry(reference) => {
                !self.layout
                    && reference.digest.is_none()
                    && reference.tag.as_deref() == Some(tag)
                    && format!("{}/{}", reference.host, reference.repository)
                        == repository.to_ascii_lowercase()
            }
            Target::Layout { tag: found, dir } => {
                self.layout
                    && found.as_deref() == Some(tag)
                    && Some(dir.as_path()) == repository.strip_prefix("oci:").map(Path::new)
            }
            Target::Archive { .. } => false,
        };
        if !meant {
            return Err(Refused::Name(format!("{text:?} would mean something else")));
        }
        Ok(text)
    }

    /// Returns the destination without a tag.
    pub(crate) fn repository(&self, user: &str, name: &str) -> Result<String, Refused> {
        let path = self.path(user, name)?;
        Ok(if self.layout {
            format!("oci:/{path}")
        } else {
            format!("{}/{path}", self.host)
        })
    }

    /// Returns the path within the host, or below the root directory.
    pub fn path(&self, user: &str, name: &str) -> Result<String, Refused> {
        let user = component(user)?;
        if !self.layout && self.before.is_empty() && user.starts_with(ESCAPED) {
            return Err(Refused::User(
                "the user's name has characters that the name of a project cannot have".to_owned(),
            ));
        }
        let mut parts: Vec<&str> = self.before.iter().map(String::as_str).collect();
        parts.push(&user);
        parts.extend(self.between.iter().map(String::as_str));
        parts.push(name);
        let path = parts.join("/");
        if !self.layout {
            check_repository(&path).map_err(|error| Refused::Name(error.to_string()))?;
        }
        Ok(path)
    }

    /// Returns the prefix of the images of `user`, or of all users: a path within the host with a trailing slash (empty
    /// for everything), or a directory.
    pub(crate) fn prefix(&self, user: Option<&str>) -> Result<String, Refused> {
        let mut parts: Vec<&str> = self.before.iter().map(String::as_str).collect();
        let escaped = user.map(component).transpose()?;
        if let Some(user) = &escaped {
            parts.push(user);
            parts.extend(self.between.iter().map(String::as_str));
        }
        let path = parts.join("/");
        Ok(if self.layout {
            format!("/{path}")
        } else if path.is_empty() {
            path
        } else {
            path + "/"
        })
    }

    /// Returns user and name from a path within the host, or below the root directory; `None` if the template does not
    /// produce such a path.
    pub fn parse_path(&self, path: &str) -> Option<(String, String)> {
        let parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
        let (name, parts) = parts.split_last()?;
        let before = parts.get(..self.before.len())?;
        let user = parts.get(self.before.len())?;
        let between = parts.get(self.before.len() + 1..)?;
        if before != self.before || between != self.between {
            return None;
        }
        Some((user_of(user)?, (*name).to_owned()))
    }

    /// Returns the directories of a layout template that contain images, with user and name. Reads the disk and blocks.
    pub(crate) fn layouts(
        &self,
        user: Option<&str>,
    ) -> std::io::Result<Vec<(PathBuf, String, String)>> {
        let Ok(prefix) = self.prefix(user) else {
            return Ok(Vec::new());
        };
        let depth = if user.is_some() {
            1
        } else {
            2 + self.between.len()
        };
        let mut dirs = Vec::new();
        for entry in walkdir::WalkDir::new(prefix)
            .min_depth(depth)
            .max_depth(depth)
        {
            match entry.map_err(std::io::Error::from) {
                Ok(entry) if entry.file_type().is_dir() => dirs.push(entry.into_path()),
                Ok(_) => {}
                Err(error) if is_absent(&error) => {}
                Err(error) => return Err(error),
            }
        }
        dirs.retain(|dir| dir.join("index.json").exists());
        dirs.sort();
        let found = dirs.into_iter().filter_map(|dir| {
            let (user, name) = self.parse_path(dir.to_str()?)?;
            Some((dir, user, name))
        });
        Ok(found.collect())
    }

    /// Returns the place that contains the images of a directory (for layouts) or all images (for a registry).
    pub(crate) fn place(&self, dir: Option<&Path>) -> ImageLocation {
        match dir {
            Some(dir) => ImageLocation::Layout {
                dir: dir.to_owned(),
                which: None,
            },
            None => ImageLocation::Registry {
                host: self.host.clone(),
                path: self.prefix(None).unwrap_or_default(),
                which: None,
            },
        }
    }
}

fn is_absent(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory
    )
}

fn shorten(text: &str) -> String {
    text.chars().take(200).collect()
}

/// Returns a user's name as a path component. A name of lower-case letters and digits, separated by single `.`, `_` or
/// `-`, is unchanged. In other names each byte that is not a lower-case letter or digit becomes `__` and two
/// hexadecimal digits, after a prefix that no unescaped name has. So different users have different components.
///
/// Fails with [`Refused::User`] if the name is empty, too long, contains characters that are not shown (control
/// characters, bidirectional controls), or begins or ends with white space, so that no two names look the same by it.
pub fn component(user: &str) -> Result<String, Refused> {
    let shown = escape::text(user) == user && user.trim() == user;
    if user.is_empty() || user.len() > MAX_USER || !shown {
        return Err(Refused::User(format!(
            "the name of a user has 1 to {MAX_USER} bytes, no characters that are not shown, and no space at its ends"
        )));
    }
    if is_plain(user) {
        return Ok(user.to_owned());
    }
    let mut text = ESCAPED.to_owned();
    for byte in user.bytes() {
        if byte.is_ascii_lowercase() || byte.is_ascii_digit() {
            text.push(char::from(byte));
        } else {
            text.push_str(&format!("__{byte:02x}"));
        }
    }
    if text.len() > MAX_NAME {
        return Err(Refused::User(
            "the user's name is too long once its characters are escaped".to_owned(),
        ));
    }
    Ok(text)
}

fn is_plain(user: &str) -> bool {
    let alnum = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = user.as_bytes();
    let edges = bytes.first().is_some_and(alnum) && bytes.last().is_some_and(alnum);
    edges
        && bytes.iter().all(|b| alnum(b) || b"._-".contains(b))
        && bytes.windows(2).all(|two| two.iter().any(alnum))
}

/// Returns the user with this component; `None` if no user's name results in it.
pub fn user_of(component_text: &str) -> Option<String> {
    let Some(mut rest) = component_text.strip_prefix(ESCAPED) else {
        let known = is_plain(component_text) && component_text.len() <= MAX_USER;
        return known.then(|| component_text.to_owned());
    };
    let mut bytes = Vec::new();
    while !rest.is_empty() {
        if let Some(code) = rest.strip_prefix("__") {
            bytes.push(u8::from_str_radix(code.get(..2)?, 16).ok()?);
            rest = &code[2..];
        } else {
            bytes.push(*rest.as_bytes().first()?);
            rest = rest.get(1..)?;
        }
    }
    let user = String::from_utf8(bytes).ok()?;
    // Only the canonical form is accepted.
    (component(&user).ok()? == component_text).then_some(user)
}

/// Beginning of the tags of autosaves.
pub(crate) const AUTOSAVE_TAG: &str = "auto-";
/// Beginning of the tags of saves that are made because a session ended.
pub(crate) const ENDED_TAG: &str = "ended-";

/// Returns whether `tag` is one of `reserved`, one that registries use themselves (referrers tags of distribution-spec 1.1),
/// or one for autosaves and not for an autosave.
pub(crate) fn is_reserved(tag: &str, reserved: &[String], autosave: bool) -> bool {
    tag.starts_with("sha256-")
        || tag.starts_with("sha512-")
        || (tag.starts_with(AUTOSAVE_TAG) && !autosave)
        || reserved
            .iter()
            .any(|pattern| match pattern.strip_suffix('*') {
                Some(start) => tag.starts_with(start),
                None => tag == pattern,
            })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(text: &str) -> Template {
        text.parse().unwrap()
    }

    #[test]
    fn templates_are_filled() {
        for (text, filled) in [
            (
                "harbor.example.org/jupyter/{user}/{name}:{tag}",
                "harbor.example.org/jupyter/alice/torch:v1",
            ),
            (
                "127.0.0.1:5000/{user}/{name}:{tag}",
                "127.0.0.1:5000/alice/torch:v1",
            ),
            (
                "docker://h.example/a/{user}/b/{name}:{tag}",
                "h.example/a/alice/b/torch:v1",
            ),
            (
                "oci:/srv/images/{user}/{name}:{tag}",
                "oci:/srv/images/alice/torch:v1",
            ),
        ] {
            let parsed = template(text);
            assert_eq!(parsed.fill("alice", "torch", "v1").unwrap(), filled);
            assert_eq!(
                parsed.to_string(),
                text.strip_prefix("docker://").unwrap_or(text)
            );
            let path = parsed.path("alice", "torch").unwrap();
            assert_eq!(
                parsed.parse_path(&path),
                Some(("alice".into(), "torch".into()))
            );
        }
    }

    #[test]
    fn templates_that_two_users_could_meet_in_are_refused() {
        for bad in [
            "",
            "harbor.example.org/{name}:{tag}",
            "harbor.example.org/{user}-{name}:{tag}",
            "harbor.example.org/x-{user}/{name}:{tag}",
            "harbor.example.org/{user}/{name}-x:{tag}",
            "harbor.example.org/{user}/{name}:x-{tag}",
            "harbor.example.org/{user}/{user}/{name}:{tag}",
            "harbor.example.org/{host}/{user}/{name}:{tag}",
            "{user}/{name}:{tag}",
            "oci:images/{user}/{name}:{tag}",
            "oci:/a/../{user}/{name}:{tag}",
            "oci:/a:b/{user}/{name}:{tag}",
            "https://h.example/{user}/{name}:{tag}",
        ] {
            assert!(bad.parse::<Template>().is_err(), "{bad}");
        }
    }

    #[test]
    fn no_name_reaches_another_place() {
        let registry = template("h.example/p/{user}/{name}:{tag}");
        let layout = template("oci:/srv/{user}/{name}:{tag}");
        for name in [
            "", ".", "..", "a/b", "../x", "A", "a:b", "a@b", "a b", "a\n", "a//b", "-a", "a-", "ä",
            "a\0",
        ] {
            for of in [&registry, &layout] {
                assert!(
                    matches!(of.fill("u", name, "t"), Err(Refused::Name(_))),
                    "{name:?}"
                );
            }
        }
        for tag in ["", "a/b", "..", "-a", "a:b", "a@sha256:b", "a b", "ä"] {
            for of in [&registry, &layout] {
                assert!(
                    matches!(of.fill("u", "n", tag), Err(Refused::Tag(_))),
                    "{tag:?}"
                );
            }
        }
        let long = "a".repeat(129);
        assert!(registry.fill("u", &long, "t").is_err());
        assert!(registry.fill("u", "n", &long).is_err());
    }

    #[test]
    fn users_have_components_of_their_own() {
        let users = [
            "alice",
            "Alice",
            "alice@example.org",
            "alice.example",
            "a__b",
            "a--b",
            "..",
            "/",
            "a/b",
            "u__0__41lice",
            "u__0",
            "-",
            "_a",
            "김철수",
            "a b",
        ];
        let mut seen = std::collections::BTreeSet::new();
        for user in users {
            let text = component(user).unwrap();
            assert!(check_repository(&text).is_ok(), "{text}");
            assert!(!text.contains('/'));
            assert_eq!(user_of(&text).as_deref(), Some(user), "{text}");
            assert!(seen.insert(text), "{user}");
        }
        for nobody in ["", "a\0", "a\nb", &"x".repeat(65)] {
            assert!(component(nobody).is_err(), "{nobody:?}");
        }
        let long = "x".repeat(65);
        for other in [
            "a__b",
            "u__0",
            "u__0alice",
            "u__0__6",
            "u__0__6lice",
            "A",
            &long,
        ] {
            assert_eq!(user_of(other), None, "{other}");
        }
    }

    #[test]
    fn tags_of_the_registry_itself_are_reserved() {
        let own = ["latest".to_owned(), "base-*".to_owned()];
        for (tag, reserved) in [
            ("latest", true),
            ("latest2", false),
            ("base-1", true),
            ("sha256-abc", true),
            ("v1", false),
            ("auto-20261124-2015-ab12", true),
            ("automatic", false),
        ] {
            assert_eq!(is_reserved(tag, &own, false), reserved, "{tag}");
        }
        assert!(!is_reserved("auto-20261124-2015-ab12", &own, true));
    }
}
