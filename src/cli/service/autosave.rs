//! `job autosave`: shows and sets when sessions are saved without being asked for.

use jiff::Timestamp;

use super::client::Client;
use super::words::{age, api_name, which};
use crate::cli::args::service::JobAutosave;
use crate::cli::exit::Usage;
use crate::cli::print::print;
use crate::common::escape;
use crate::service::job::SaveEnded;
use crate::service::manager::api::{
    AutosaveInForce, AutosavePolicy, AutosaveSetting, AutosaveSettings, SessionAutosave,
    SessionView, Sessions, Which,
};

pub(super) async fn run(client: &Client, args: &JobAutosave) -> anyhow::Result<()> {
    let Some(text) = &args.session else {
        let path = "autosave";
        let now = async || client.get::<AutosaveSettings>(path, &[]).await;
        let settings: AutosaveSettings = if args.default {
            client.delete(path).await?
        } else if setting(args).is_some() || args.save_on_end.is_some() {
            // What is not named stays.
            let own = now().await?.own.unwrap_or_default();
            let merged = AutosaveSetting {
                save_on_end: args.save_on_end.or(own.save_on_end),
                ..setting(args).unwrap_or(own)
            };
            client.put(path, &merged).await?
        } else {
            now().await?
        };
        return print(args.format, &settings, settings_text);
    };
    let session = find(client, text).await?;
    let path = format!("sessions/{}/autosave", session.id);
    let in_force: AutosaveInForce = match setting(args) {
        Some(setting) => client.put(&path, &setting).await?,
        None if args.default => client.delete(&path).await?,
        None => AutosaveInForce {
            autosave: session.autosave,
            from: session.autosave_from,
        },
    };
    print(args.format, &in_force, in_force_now)
}

/// Returns what is to be set, if anything is.
fn setting(args: &JobAutosave) -> Option<AutosaveSetting> {
    let asked = args.off || args.every.is_some();
    asked.then_some(AutosaveSetting {
        every_minutes: args.every,
        keep: args.keep,
        off: args.off,
        save_on_end: None,
    })
}

/// Returns the session that an argument means; of several runs of a container, the one that runs.
async fn find(client: &Client, text: &str) -> anyhow::Result<SessionView> {
    let which = which(text)?;
    let mut found = Vec::new();
    let mut query = vec![("ended", "false".to_owned())];
    loop {
        let page: Sessions = client.get("sessions", &query).await?;
        let sessions = page.sessions.into_iter();
        found.extend(sessions.filter(|session| is_meant(session, &which)));
        let Some(next) = page.next else { break };
        query.truncate(1);
        query.push(("cursor", next));
    }
    // An ID goes before a name that looks like it.
    if let Some(at) = found.iter().position(|session| session.id == text) {
        return Ok(found.swap_remove(at));
    }
    match found.len() {
        1 => Ok(found.swap_remove(0)),
        0 => Err(Usage(format!("{text:?}: no session that runs is called so")).into()),
        _ => Err(Usage(format!("{text:?} means several sessions; give an ID")).into()),
    }
}

/// Returns whether an argument means a session: by its ID or the beginning of it, by its name, or by its pod.
pub(super) fn is_meant(session: &SessionView, which: &Which) -> bool {
    match which {
        Which::Id(id) => {
            let named = session.pod.is_none() && session.container.as_ref() == Some(id);
            session.id.starts_with(id.as_str()) || named
        }
        Which::Pod {
            namespace,
            pod,
            container,
        } => {
            session.namespace.as_ref() == Some(namespace)
                && session.pod.as_ref() == Some(pod)
                && (container.is_none() || session.container == *container)
        }
    }
}

/// Returns minutes as they are written in arguments, such as `90m` or `2h`.
fn every(minutes: u32) -> String {
    const DAY: u32 = 24 * 60;
    match minutes {
        0 => "-".to_owned(),
        _ if minutes.is_multiple_of(DAY) => format!("{}d", minutes / DAY),
        _ if minutes.is_multiple_of(60) => format!("{}h", minutes / 60),
        _ => format!("{minutes}m"),
    }
}

/// Returns the autosaves of a session for a table.
pub(super) fn brief(autosave: Option<&SessionAutosave>) -> String {
    let Some(autosave) = autosave else {
        return "-".to_owned();
    };
    let waits = if autosave.waits_for.is_some() {
        " (waits)"
    } else {
        ""
    };
    format!("{}{waits}", every(autosave.policy.every_minutes))
}

fn policy_text(policy: AutosavePolicy) -> String {
    format!(
        "every {}, keep {}",
        every(policy.every_minutes),
        policy.keep
    )
}

fn settings_text(settings: &AutosaveSettings) -> String {
    let own = match &settings.own {
        Some(AutosaveSetting {
            every_minutes: Some(minutes),
            keep,
            ..
        }) => {
            let keep = keep.map(|keep| format!(", keep {keep}"));
            format!("every {}{}", every(*minutes), keep.unwrap_or_default())
        }
        Some(AutosaveSetting { off: true, .. }) => "off".to_owned(),
        None | Some(_) => "-".to_owned(),
    };
    let at_end = settings.own.and_then(|own| own.save_on_end);
    let default = settings.default;
    let default = default.map_or_else(|| "off".to_owned(), policy_text);
    format!(
        "own       {own}\ndefault   {default}\nminimum   {}\nat end    {}\n",
        every(settings.min_minutes),
        at_end.map_or("-", SaveEnded::name)
    )
}

/// Returns the autosaves of a session as text, with the age of the last one as of now.
fn in_force_now(in_force: &AutosaveInForce) -> String {
    in_force_text(in_force, Timestamp::now())
}

fn in_force_text(in_force: &AutosaveInForce, now: Timestamp) -> String {
    let autosave = in_force.autosave.as_ref();
    let policy = autosave.map(|autosave| policy_text(autosave.policy));
    let mut text = format!("autosave  {}\n", policy.as_deref().unwrap_or("off"));
    if let Some(from) = autosave.map(|autosave| autosave.from).or(in_force.from) {
        text.push_str(&format!("set by    {}\n", api_name(&from)));
    }
    let Some(autosave) = autosave else {
        return text;
    };
    if let Some(last) = &autosave.last {
        text.push_str(&format!("last      {} ago\n", age(last, now)));
    }
    if let Some(why) = &autosave.waits_for {
        text.push_str(&format!("waiting   {}\n", escape::text(why)));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::manager::api::AutosaveFrom;

    #[test]
    fn what_applies_is_said() -> Result<(), jiff::Error> {
        let policy = |every_minutes| AutosavePolicy {
            every_minutes,
            keep: 12,
        };
        let mut settings = AutosaveSettings {
            default: None,
            own: None,
            min_minutes: 5,
        };
        assert_eq!(
            settings_text(&settings),
            "own       -\ndefault   off\nminimum   5m\nat end    -\n"
        );
        settings.default = Some(policy(2880));
        settings.own = Some(AutosaveSetting {
            every_minutes: Some(90),
            keep: Some(3),
            off: false,
            save_on_end: Some(SaveEnded::Failure),
        });
        assert_eq!(
            settings_text(&settings),
            "own       every 90m, keep 3\ndefault   every 2d, keep 12\nminimum   5m\nat end    failure\n"
        );
        let now: Timestamp = "2026-11-24T12:00:00Z".parse()?;
        let mut in_force = AutosaveInForce::default();
        assert_eq!(in_force_text(&in_force, now), "autosave  off\n");
        in_force.from = Some(AutosaveFrom::Session);
        assert_eq!(
            in_force_text(&in_force, now),
            "autosave  off\nset by    session\n"
        );
        assert_eq!(brief(None), "-");
        let autosave = SessionAutosave {
            policy: policy(120),
            from: AutosaveFrom::Pod,
            last: Some("2026-11-24T11:57:00Z".to_owned()),
            waits_for: Some("the registry\u{1b}[31m".to_owned()),
        };
        assert_eq!(brief(Some(&autosave)), "2h (waits)");
        in_force.autosave = Some(autosave);
        let text = in_force_text(&in_force, now);
        assert!(text.starts_with("autosave  every 2h, keep 12\nset by    pod\nlast      3m ago\n"));
        assert!(!text.contains('\u{1b}'), "{text:?}");
        Ok(())
    }
}
