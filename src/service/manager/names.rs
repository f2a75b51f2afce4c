//! Names of sessions, and of the images that are made of them unless a request names them.

use sha2::{Digest as _, Sha256};

use super::time::stamp;
use crate::service::job::Session;

/// Maximum length of a suggested name.
const MAX_SUGGESTION: usize = 60;
/// Length of the end of a suggested tag.
const UNIQUE_END: usize = 4;

/// Returns the display name of a session.
pub(super) fn session_name(session: &Session) -> String {
    match (&session.namespace, &session.pod, &session.container) {
        (Some(namespace), Some(pod), Some(container)) => format!("{namespace}/{pod}/{container}"),
        (Some(namespace), Some(pod), None) => format!("{namespace}/{pod}"),
        (_, _, Some(container)) => container.clone(),
        _ => session.id.chars().take(12).collect(),
    }
}

/// Returns a name that is valid in a repository, derived from the session's own name.
pub(super) fn suggested_name(session: &Session) -> String {
    let own = session.pod.as_deref().or(session.container.as_deref());
    let bare = own.unwrap_or("session");
    let mut name = String::new();
    for c in bare.chars().map(|c| c.to_ascii_lowercase()) {
        if c.is_ascii_lowercase() || c.is_ascii_digit() {
            name.push(c);
        } else if !name.is_empty() && !name.ends_with('-') {
            name.push('-');
        }
        if name.len() >= MAX_SUGGESTION {
            break;
        }
    }
    let name = name.trim_end_matches('-');
    if name.is_empty() { "session" } else { name }.to_owned()
}

/// Returns a tag derived from the time, with a short end that tells sessions of the same name apart.
pub(super) fn suggested_tag(session: &Session, now_ms: i64) -> String {
    let end = hex::encode(Sha256::digest(&session.id));
    format!("{}-{}", stamp(now_ms), &end[..UNIQUE_END])
}

/// Returns a tag like [`suggested_tag`], for a session that was saved within the same minute.
pub(super) fn other_tag(now_ms: i64) -> String {
    format!("{}-{:08x}", stamp(now_ms), rand::random::<u32>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_suggested_by_the_grammar() {
        let long = "p".repeat(253);
        for (pod, container, name) in [
            (Some("Jupyter_alice--2"), Some("nb"), "jupyter-alice-2"),
            (None, Some("quirky_hopper"), "quirky-hopper"),
            (Some("---"), None, "session"),
            (Some("한글"), None, "session"),
            (None, None, "session"),
            (Some(long.as_str()), None, &long[..MAX_SUGGESTION]),
        ] {
            let session = Session {
                pod: pod.map(str::to_owned),
                container: container.map(str::to_owned),
                image: Some("h:5000/x@sha256:abc".to_owned()),
                ..Session::default()
            };
            let name_of = suggested_name(&session);
            assert_eq!(name_of, name);
            assert!(crate::common::reference::check_repository(&name_of).is_ok());
        }
    }

    #[test]
    fn sessions_of_one_minute_get_different_tags() {
        let tag = |id: &str| {
            let session = Session {
                id: id.repeat(32),
                ..Session::default()
            };
            suggested_tag(&session, 1_764_000_000_123)
        };
        let (one, two) = (tag("ab"), tag("cd"));
        assert_ne!(one, two);
        for tag in [one, two, other_tag(1_764_000_000_123)] {
            assert!(tag.starts_with("20251124-1600-"), "{tag}");
            assert!(crate::common::reference::check_tag(&tag).is_ok(), "{tag}");
        }
    }
}
