//! Fuzzes short texts: references, names, patterns, templates, and specifications of a layer's content.

use std::fmt::Display;
use std::str::FromStr;

use upperdeck::common::digest::Digest;
use upperdeck::common::escape;
use upperdeck::common::reference::{check_repository, check_tag};
use upperdeck::image::verify::validate::Expected;
use upperdeck::image::verify::vis;
use upperdeck::layer::scan::{Exclusions, Facts, Rules};
use upperdeck::node::container::{self, Pattern, Roots};
use upperdeck::service::agent::OwnerRule;
use upperdeck::service::manager::auth::{Range, Tokens};
use upperdeck::service::manager::target::{Template, component, user_of};
use upperdeck::store::destination::Target;
use upperdeck::store::images::ImageLocation;
use upperdeck::store::registry::{Credentials, Reference};

use crate::errors;
use crate::files::selected;

pub fn run(input: &[u8]) {
    let (selector, rest) = selected(input);
    let text = &*String::from_utf8_lossy(rest);
    match selector % 8 {
        0 => reference(text),
        1 => targets(text),
        2 => {
            errors::checked(Expected::parse(text));
        }
        3 => names(text, rest),
        4 => patterns(text),
        5 => users(text),
        6 => rules(text),
        _ => {
            errors::checked(Tokens::parse(text));
            errors::checked(Credentials::from_str(text));
            errors::checked(Range::from_str(text));
        }
    }
}

/// Checks that a printed value is parsed to the same value.
fn printed<T>(text: &str) -> Option<T>
where
    T: FromStr<Err: std::error::Error + 'static> + Display + PartialEq + std::fmt::Debug,
{
    let parsed: T = errors::checked(text.parse())?;
    let again: Option<T> = errors::checked(parsed.to_string().parse());
    assert_eq!(again.as_ref(), Some(&parsed), "from {text:?}");
    Some(parsed)
}

fn reference(text: &str) {
    printed::<Digest>(text);
    let given = printed::<Reference>(text);
    let defaulted = errors::checked(Reference::parse_with_default_host(text));
    assert!(given.is_none() || given == defaulted);
    for reference in given.into_iter().chain(defaulted) {
        assert!(check_repository(&reference.repository).is_ok());
        assert!(
            reference
                .tag
                .as_deref()
                .is_none_or(|tag| check_tag(tag).is_ok())
        );
        // No part of it has a special meaning in a URL.
        let url = format!(
            "https://{}/v2/{}/tags",
            reference.host, reference.repository
        );
        let url: http::Uri = url.parse().expect("an address");
        assert_eq!(url.path(), format!("/v2/{}/tags", reference.repository));
        assert_eq!(
            url.authority().map(http::uri::Authority::as_str),
            Some(&*reference.host)
        );
    }
}

fn targets(text: &str) {
    if let Some(target) = errors::checked(Target::for_saving(text)) {
        let digest = Digest::of("x");
        let named = target.with_digest(&digest);
        let again: Option<Target> = errors::checked(named.parse());
        assert!(
            again.is_some() || !matches!(target, Target::Registry(_)),
            "{named:?}"
        );
        assert!(!target.tag().is_empty());
    }
    errors::checked(ImageLocation::from_str(text));
    let nothing = Roots {
        host_root: Some("/nonexistent".into()),
        ..Roots::default()
    };
    let found = container::find(&nothing, text);
    assert!(found.is_err());
    errors::checked(found);
}

fn names(text: &str, bytes: &[u8]) {
    let shown = vis::encode(bytes);
    assert!(shown.bytes().all(|byte| (0x21..0x7f).contains(&byte)));
    assert_eq!(vis::decode(&shown).as_deref(), Ok(bytes));
    errors::checked(vis::decode(text));
    for shown in [escape::path(bytes), escape::limited(text, 20)] {
        assert!(!shown.chars().any(char::is_control));
    }
}

/// Patterns, one per line; the last line is a path.
fn patterns(text: &str) {
    let mut lines: Vec<String> = text.split('\n').map(str::to_owned).collect();
    let path = lines.pop().unwrap_or_default();
    let rules = Rules {
        user: &lines,
        credentials: true,
        caches: true,
        gpu: true,
        ..Rules::default()
    };
    let Some(exclusions) = errors::checked(Exclusions::new(rules)) else {
        return;
    };
    let facts = Facts {
        file_type: None,
        size: 0,
        link: None,
        in_base: false,
    };
    exclusions.check(path.as_bytes(), &facts);
    exclusions.mount_ancestor(path.as_bytes());
    exclusions.may_be_gpu_link(path.as_bytes());
}

fn users(text: &str) {
    // Different users have different components, and a component is always a single one.
    if let Ok(part) = component(text) {
        assert_eq!(user_of(&part).as_deref(), Some(text));
        assert!(check_repository(&part).is_ok(), "{part:?}");
    }
    if let Some(user) = user_of(text) {
        assert_eq!(component(&user).as_deref(), Ok(text));
    }
    let mut lines = text.splitn(3, '\n');
    let mut line = || lines.next().unwrap_or_default();
    let (template, user, name) = (line(), line(), line());
    let Some(template) = printed::<Template>(template) else {
        return;
    };
    if let Ok(filled) = template.fill(user, name, "v1") {
        let target = errors::checked(Target::for_saving(&filled));
        assert_eq!(target.expect("a destination").tag(), "v1");
        let path = template.path(user, name).expect("it was filled in");
        let found = template.parse_path(&path);
        assert_eq!(found, Some((user.to_owned(), name.to_owned())), "{path:?}");
    }
}

fn rules(text: &str) {
    if let Some(rule) = errors::checked(OwnerRule::from_str(text)) {
        let again = rule.to_string().parse::<OwnerRule>();
        assert!(again.is_ok(), "{rule}");
    }
    if let Some(pattern) = printed::<Pattern>(text)
        && let Some(owned) = pattern.of("alice")
    {
        assert!(!owned.to_string().contains("{user}"));
    }
}
