//! Determines the owner of a session from what the runtime recorded about it, never from what runs in it.

use std::fmt;
use std::str::FromStr;

use regex::Regex;

use crate::node::container::Container;

/// Maximum length of an owner's name; longer names do not fit into a repository's path.
const MAX_OWNER: usize = 64;

/// The site's rule for the owner of a session.
#[derive(Clone, Debug)]
pub enum OwnerRule {
    /// The pod's namespace. The one group of the pattern is the owner; without a pattern it is the whole name.
    Namespace(Option<Regex>),
    /// The pod's name, in the same way.
    Pod(Option<Regex>),
    /// A label of the pod, as it was when the runtime created the pod's sandbox; with a pattern, a part of its value.
    Label(String, Option<Regex>),
    /// An annotation of the pod, in the same way.
    Annotation(String, Option<Regex>),
    /// A variable in the environment with which the runtime started the container.
    Env(String),
    /// A fixed user, to whom all sessions of the node belong.
    Fixed(String),
}

/// Why the text of a rule is invalid.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RuleError {
    /// Not one of the forms.
    #[error(
        "{0:?} is not an owner rule: expected namespace[:PATTERN], pod[:PATTERN], label:KEY[:PATTERN], \
         annotation:KEY[:PATTERN], env:NAME or fixed:USER"
    )]
    Unknown(String),
    /// The pattern is invalid.
    #[error("the pattern {pattern:?}: {reason}")]
    Pattern {
        /// The pattern as given.
        pattern: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The name cannot be part of a repository's path.
    #[error(
        "{0:?} is not an owner's name: lower-case letters and digits, with '.', '_' or '-' between them, {MAX_OWNER} at most"
    )]
    Name(String),
}

/// Compiles a pattern that has to match a whole name and has exactly one group.
fn pattern(text: &str) -> Result<Regex, RuleError> {
    let wrong = |reason: String| RuleError::Pattern {
        pattern: text.to_owned(),
        reason,
    };
    let regex = Regex::new(&format!("^(?:{text})$")).map_err(|error| wrong(error.to_string()))?;
    match regex.captures_len() {
        2 => Ok(regex),
        groups => Err(wrong(format!(
            "it has {} groups in parentheses; the one that it needs is the owner",
            groups - 1
        ))),
    }
}

/// Parses `KEY[:PATTERN]`. The key of a label or an annotation has no colon.
fn key_and_pattern(text: &str) -> Result<Option<(String, Option<Regex>)>, RuleError> {
    let (key, rest) = match text.split_once(':') {
        Some((key, rest)) => (key, Some(rest)),
        None => (text, None),
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
    if key.is_empty() || !key.chars().all(plain) {
        return Ok(None);
    }
    Ok(Some((key.to_owned(), rest.map(pattern).transpose()?)))
}

impl FromStr for OwnerRule {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        let (kind, rest) = match text.split_once(':') {
            Some((kind, rest)) => (kind, Some(rest).filter(|rest| !rest.is_empty())),
            None => (text, None),
        };
        let unknown = || RuleError::Unknown(text.to_owned());
        match (kind, rest) {
            ("namespace", rest) => Ok(Self::Namespace(rest.map(pattern).transpose()?)),
            ("pod", rest) => Ok(Self::Pod(rest.map(pattern).transpose()?)),
            ("label" | "annotation", Some(rest)) => {
                let (key, pattern) = key_and_pattern(rest)?.ok_or_else(unknown)?;
                Ok(match kind {
                    "label" => Self::Label(key, pattern),
                    _ => Self::Annotation(key, pattern),
                })
            }
            ("env", Some(name)) if !name.contains('=') => Ok(Self::Env(name.to_owned())),
            ("fixed", Some(user)) if is_owner(user) => Ok(Self::Fixed(user.to_owned())),
            ("fixed", Some(user)) => Err(RuleError::Name(user.to_owned())),
            _ => Err(unknown()),
        }
    }
}

impl fmt::Display for OwnerRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // As it was given, without the anchors that `pattern` adds.
        let given = |regex: &Regex| {
            let text = regex.as_str();
            text.strip_prefix("^(?:")
                .and_then(|text| text.strip_suffix(")$"))
                .unwrap_or(text)
                .to_owned()
        };
        match self {
            Self::Namespace(None) => f.write_str("namespace"),
            Self::Namespace(Some(regex)) => write!(f, "namespace:{}", given(regex)),
            Self::Pod(None) => f.write_str("pod"),
            Self::Pod(Some(regex)) => write!(f, "pod:{}", given(regex)),
            Self::Label(key, None) => write!(f, "label:{key}"),
            Self::Label(key, Some(regex)) => write!(f, "label:{key}:{}", given(regex)),
            Self::Annotation(key, None) => write!(f, "annotation:{key}"),
            Self::Annotation(key, Some(regex)) => write!(f, "annotation:{key}:{}", given(regex)),
            Self::Env(name) => write!(f, "env:{name}"),
            Self::Fixed(user) => write!(f, "fixed:{user}"),
        }
    }
}

/// Returns whether `name` is a valid component of a repository's path according to the OCI distribution specification:
/// `[a-z0-9]+`, separated by one `.`, one or two `_`, or any number of `-`. Its length is at most 64.
pub(crate) fn is_owner(name: &str) -> bool {
    let word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let ends = name.starts_with(word) && name.ends_with(word);
    let separators = name.split(word).filter(|between| !between.is_empty());
    ends && name.len() <= MAX_OWNER
        && separators.into_iter().all(|between| {
            matches!(between, "." | "_" | "__") || between.bytes().all(|b| b == b'-')
        })
}

impl OwnerRule {
    /// Returns the owner of `container`; `None` if the rule does not match or yields an invalid name.
    pub(crate) fn owner(&self, container: &Container) -> Option<String> {
        let pod = container.pod.as_ref();
        let owner = match self {
            Self::Namespace(regex) => matched(regex.as_ref(), &pod?.namespace)?,
            Self::Pod(regex) => matched(regex.as_ref(), &pod?.name)?,
            Self::Label(key, regex) => matched(regex.as_ref(), pod?.labels.get(key)?)?,
            Self::Annotation(key, regex) => matched(regex.as_ref(), pod?.annotations.get(key)?)?,
            Self::Env(name) => container.spec.variable(name)?,
            Self::Fixed(user) => user,
        };
        is_owner(owner).then(|| owner.to_owned())
    }
}

fn matched<'t>(regex: Option<&Regex>, text: &'t str) -> Option<&'t str> {
    match regex {
        None => Some(text),
        Some(regex) => regex.captures(text)?.get(1).map(|group| group.as_str()),
    }
}

#[cfg(test)]
mod tests {
    use super::{OwnerRule, RuleError, is_owner, matched};
    use crate::node::container::Pod;

    #[test]
    fn rules_are_read_and_written() -> Result<(), RuleError> {
        for text in [
            "namespace",
            "namespace:jupyter-(.+)",
            "pod:jupyter-([a-z]+)(?:--.*)?",
            "label:upperdeck.io/owner",
            "label:app:(.+)-nb",
            "annotation:hub.jupyter.org/username",
            "annotation:a:x:(.+)",
            "env:JUPYTERHUB_USER",
            "fixed:alice",
        ] {
            assert_eq!(text.parse::<OwnerRule>()?.to_string(), text);
        }
        for text in [
            "",
            "env",
            "env:",
            "env:A=B",
            "user:alice",
            "fixed",
            "fixed:Alice",
            "fixed:../x",
            "label",
            "label:",
            "label:a b",
            "annotation::(.+)",
        ] {
            assert!(text.parse::<OwnerRule>().is_err(), "{text}");
        }
        for text in [
            "pod:(",
            "pod:jupyter",
            "namespace:(a)(b)",
            "label:app:",
            "label:app:nb",
        ] {
            let refused = text.parse::<OwnerRule>();
            assert!(matches!(refused, Err(RuleError::Pattern { .. })), "{text}");
        }
        Ok(())
    }

    #[test]
    fn a_pattern_has_to_fit_the_whole_name() -> Result<(), RuleError> {
        let OwnerRule::Pod(regex) = "pod:jupyter-(.+)|hub-(?:.+)".parse()? else {
            return Err(RuleError::Unknown(String::new()));
        };
        for (name, owner) in [
            ("jupyter-alice", Some("alice")),
            ("x-jupyter-alice", None),
            ("jupyter-", None),
            ("hub-1", None),
            ("jupyter-alice\n", None),
        ] {
            assert_eq!(matched(regex.as_ref(), name), owner, "{name:?}");
        }
        Ok(())
    }

    #[test]
    fn a_label_or_annotation_of_the_pod_names_the_owner() -> Result<(), RuleError> {
        let mut container = super::super::kind::tests::container();
        let owner = |container: &_, rule: &str| -> Result<Option<String>, RuleError> {
            Ok(rule.parse::<OwnerRule>()?.owner(container))
        };
        // What a process's image or spec says is no label of a pod.
        container.spec.annotations = [("owner".to_owned(), "mallory".to_owned())].into();
        assert_eq!(owner(&container, "label:owner")?, None);
        assert_eq!(owner(&container, "annotation:owner")?, None);
        container.pod = Some(Pod {
            labels: [("owner".to_owned(), "alice".to_owned())].into(),
            annotations: [
                ("owner".to_owned(), "bob".to_owned()),
                ("mail".to_owned(), "carol@example.org".to_owned()),
            ]
            .into(),
            ..Pod::default()
        });
        for (rule, expected) in [
            ("label:owner", Some("alice")),
            ("label:owner:al(.+)", Some("ice")),
            ("label:owner:x(.+)", None),
            ("label:mail", None),
            ("annotation:owner", Some("bob")),
            ("annotation:mail", None),
            ("annotation:mail:(.+)@example\\.org", Some("carol")),
        ] {
            assert_eq!(owner(&container, rule)?.as_deref(), expected, "{rule}");
        }
        Ok(())
    }

    #[test]
    fn an_owner_is_a_component_of_a_repository() {
        for good in [
            "alice",
            "a",
            "a.b",
            "a_b",
            "a__b",
            "a---b",
            "7",
            "alice-40example-2ecom",
        ] {
            assert!(is_owner(good), "{good}");
        }
        let long = "a".repeat(65);
        for bad in [
            "", "Alice", "a..b", "a___b", "-a", "a-", "a/b", "..", "a.-b", "é", "a b", &long,
        ] {
            assert!(!is_owner(bad), "{bad}");
        }
    }
}
