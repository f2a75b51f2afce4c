//! What the pod of a session says about its autosaves.

use crate::node::container::Container;
use crate::service::job::AutosaveWish;

/// Annotation or label of a pod: `off`, or the time from the end of a save to the next one, with the number of the latest
/// ones to keep if it is to be said: `30m`, `2h`, `30m,keep=24`. A label cannot have `,` and `=`: `30m-keep-24`.
const AUTOSAVE: &str = "upperdeck.io/autosave";

/// Returns what the pod of a container says. A value that is not understood counts as none.
pub(super) fn wish(container: &Container) -> Option<AutosaveWish> {
    parse(container.pod.as_ref()?.said(AUTOSAVE)?)
}

fn parse(text: &str) -> Option<AutosaveWish> {
    if text == "off" {
        return Some(AutosaveWish::Off);
    }
    let (every, keep) = match text.split_once(",keep=").or(text.split_once("-keep-")) {
        Some((every, keep)) => (every, Some(number(keep)?)),
        None => (text, None),
    };
    let minutes = match (
        every.strip_suffix('m'),
        every.strip_suffix('h'),
        every.strip_suffix('d'),
    ) {
        (Some(minutes), ..) => number(minutes)?,
        (_, Some(hours), _) => number(hours)?.checked_mul(60)?,
        (.., Some(days)) => number(days)?.checked_mul(24 * 60)?,
        _ => return None,
    };
    Some(AutosaveWish::Every { minutes, keep })
}

fn number(digits: &str) -> Option<u32> {
    let plain = digits.bytes().all(|b| b.is_ascii_digit());
    digits.parse().ok().filter(|number| plain && *number > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::container::Pod;
    use crate::service::agent::kind::tests::container;

    #[test]
    fn a_pod_says_when_and_how_many() {
        let every = |minutes, keep| Some(AutosaveWish::Every { minutes, keep });
        for (text, expected) in [
            ("off", Some(AutosaveWish::Off)),
            ("30m", every(30, None)),
            ("2h", every(120, None)),
            ("1d", every(1440, None)),
            ("30m,keep=24", every(30, Some(24))),
            ("30m-keep-24", every(30, Some(24))),
            ("", None),
            ("on", None),
            ("30", None),
            ("0m", None),
            ("-5m", None),
            ("+5m", None),
            ("5 m", None),
            ("30m,keep=", None),
            ("30m,keep=0", None),
            ("30m,keep=x", None),
            ("99999999999m", None),
            ("4000000000h", None),
            ("\u{663}m", None),
        ] {
            assert_eq!(parse(text), expected, "{text:?}");
        }
    }

    #[test]
    fn an_annotation_goes_before_a_label() {
        let mut it = container();
        assert_eq!(wish(&it), None);
        let said = |text: &str| [(AUTOSAVE.to_owned(), text.to_owned())].into();
        it.pod = Some(Pod {
            labels: said("30m-keep-3"),
            ..Pod::default()
        });
        let every = |minutes, keep| Some(AutosaveWish::Every { minutes, keep });
        assert_eq!(wish(&it), every(30, Some(3)));
        if let Some(pod) = &mut it.pod {
            pod.annotations = said("off");
        }
        assert_eq!(wish(&it), Some(AutosaveWish::Off));
        if let Some(pod) = &mut it.pod {
            pod.annotations = said("sometimes");
        }
        assert_eq!(wish(&it), None);
    }
}
