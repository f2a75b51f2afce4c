//! How sessions are named, and ages are written, on the command line.

use jiff::Timestamp;

use crate::cli::exit::Usage;
use crate::service::manager::api::Which;

/// Parses `NAMESPACE/POD[/CONTAINER]` or an ID.
pub(super) fn which(text: &str) -> Result<Which, Usage> {
    let parts: Vec<&str> = text.split('/').collect();
    match parts.as_slice() {
        [id] if !id.is_empty() => Ok(Which::Id((*id).to_owned())),
        [namespace, pod] | [namespace, pod, _] if !namespace.is_empty() && !pod.is_empty() => {
            Ok(Which::Pod {
                namespace: (*namespace).to_owned(),
                pod: (*pod).to_owned(),
                container: parts.get(2).map(|name| (*name).to_owned()),
            })
        }
        _ => Err(Usage(format!(
            "{text:?}: expected a session's ID or NAMESPACE/POD[/CONTAINER]"
        ))),
    }
}

/// Formats the time since `time`, such as `2h`.
pub(super) fn age(time: &str, now: Timestamp) -> String {
    let Ok(time) = time.parse::<Timestamp>() else {
        return "-".to_owned();
    };
    let seconds = now.duration_since(time).as_secs().max(0);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86_400 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_as_people_write_them() -> Result<(), Usage> {
        assert_eq!(which("3f2a")?, Which::Id("3f2a".to_owned()));
        assert_eq!(
            which("jupyter/notebook-0/main")?,
            Which::Pod {
                namespace: "jupyter".to_owned(),
                pod: "notebook-0".to_owned(),
                container: Some("main".to_owned())
            }
        );
        for wrong in ["", "/", "a/", "a/b/c/d"] {
            assert!(which(wrong).is_err(), "{wrong}");
        }
        Ok(())
    }

    #[test]
    fn ages_are_short() -> Result<(), jiff::Error> {
        let now: Timestamp = "2026-11-24T12:00:00Z".parse()?;
        for (time, expected) in [
            ("2026-11-24T11:59:30Z", "30s"),
            ("2026-11-24T11:00:01Z", "59m"),
            ("2026-11-23T13:00:00Z", "23h"),
            ("2026-11-20T12:00:00Z", "4d"),
            ("2026-11-24T12:00:10Z", "0s"),
            ("yesterday", "-"),
        ] {
            assert_eq!(age(time, now), expected, "{time}");
        }
        Ok(())
    }
}
