//! `job timeline`: what was saved of a session, what each save changed, and how to get at it.

use jiff::Timestamp;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};

use super::autosave::is_meant;
use super::client::Client;
use super::words::{age, which};
use crate::cli::args::service::JobTimeline;
use crate::cli::exit::Usage;
use crate::cli::print::print;
use crate::cli::text::{self, Align};
use crate::common::{escape, message};
use crate::service::manager::api::{
    ImageState, PackageSummary, SessionView, Sessions, Timeline, TimelineEntry, Which,
};
use crate::service::record::MadeBy;

/// Prints a page of the timeline of a session.
pub(super) async fn run(client: &Client, args: JobTimeline) -> anyhow::Result<()> {
    let session = session_id(client, which(&args.session)?).await?;
    let session = utf8_percent_encode(&session, NON_ALPHANUMERIC);
    let mut query = vec![("limit", args.limit.to_string())];
    query.extend(args.removed.then(|| ("removed", "true".to_owned())));
    query.extend(args.after.map(|after| ("cursor", after)));
    let path = format!("sessions/{session}/timeline");
    let found: Timeline = client.get(&path, &query).await?;
    print(args.format, &found, |found| table(found, Timestamp::now()))
}

/// Returns the ID of a session. Of a pod that is the container that runs, if one does.
///
/// Fails if a pod is named that has no container in the caller's list, or several.
async fn session_id(client: &Client, which: Which) -> anyhow::Result<String> {
    let (namespace, pod) = match &which {
        Which::Id(id) => return Ok(id.clone()),
        Which::Pod { namespace, pod, .. } => (namespace, pod),
    };
    let query = [("namespace", namespace.clone())];
    let mut found: Sessions = client.get("sessions", &query).await?;
    found.sessions.retain(|session| is_meant(session, &which));
    if found.sessions.iter().any(|session| session.ended.is_none()) {
        found.sessions.retain(|session| session.ended.is_none());
    }
    let several = |session: &SessionView| {
        session.container
            != found
                .sessions
                .first()
                .and_then(|first| first.container.clone())
    };
    if found.sessions.iter().any(several) {
        let names = found
            .sessions
            .iter()
            .filter_map(|one| one.container.clone());
        return Err(Usage(format!(
            "{namespace}/{pod} has several containers, name one: {}",
            names.collect::<Vec<_>>().join(", ")
        ))
        .into());
    }
    // Those that have ended are in the order of their ends, the latest first.
    let first = found.sessions.into_iter().next();
    let id = first.map(|session| session.id);
    Ok(id.ok_or_else(|| {
        Usage(format!(
            "{namespace}/{pod} has no session that you may save"
        ))
    })?)
}

fn made_by(entry: &TimelineEntry) -> &'static str {
    match entry.made_by {
        MadeBy::User => "hand",
        MadeBy::Autosave => "itself",
        MadeBy::End => "its end",
    }
}

/// Returns whether the image has the tag that it was saved under.
fn is_there(entry: &TimelineEntry) -> bool {
    entry.fate.state == ImageState::Tagged
}

fn image(entry: &TimelineEntry) -> String {
    let image = format!("{}:{}", entry.name, entry.tag);
    match entry.fate.state {
        ImageState::Tagged => image,
        ImageState::Replaced => format!("{image} (replaced)"),
        ImageState::Deleted => format!("{image} (deleted)"),
        ImageState::Renamed => match &entry.fate.renamed_to {
            Some(tag) => format!("{image} (now {tag})"),
            None => format!("{image} (renamed)"),
        },
    }
}

/// Returns differences of packages in short: the first of them, and the number of the others.
fn packages(list: &PackageSummary) -> String {
    let all = list.added + list.removed + list.changed;
    let more = all.saturating_sub(list.some.len() as u64);
    let mut texts = list.some.clone();
    if more > 0 {
        texts.push(format!("{more} more"));
    }
    texts.join(", ")
}

fn table(found: &Timeline, now: Timestamp) -> String {
    let header = [
        ("AGE", Align::Right),
        ("BY", Align::Left),
        ("IMAGE", Align::Left),
        ("FILES", Align::Right),
        ("REMOVED", Align::Right),
        ("CHANGED", Align::Right),
        ("LARGEST", Align::Left),
        ("PACKAGES", Align::Left),
    ];
    let unknown = || "-".to_owned();
    let rows = found.entries.iter().map(|entry| {
        let changes = entry.changes.as_ref();
        let largest = changes.and_then(|changes| changes.largest.first());
        vec![
            age(&entry.at, now),
            made_by(entry).to_owned(),
            image(entry),
            changes.map_or_else(unknown, |changes| changes.files.to_string()),
            changes.map_or_else(unknown, |changes| changes.removed.to_string()),
            text::bytes(changes.map(|changes| changes.bytes)),
            largest.map_or_else(unknown, |file| {
                format!("{} ({})", file.path, message::size(file.bytes))
            }),
            entry.packages.as_ref().map_or_else(unknown, packages),
        ]
    });
    let mut out = text::table(&header, &rows.collect::<Vec<_>>());
    let there: Vec<&TimelineEntry> = found.entries.iter().filter(|one| is_there(one)).collect();
    if let [last, ..] = there.as_slice() {
        let reference = word(&last.reference);
        out.push_str(&format!(
            "one file: upperdeck image cp {reference}:/PATH .\n"
        ));
    }
    if let [last, before, ..] = there.as_slice() {
        let (before, last) = (word(&before.reference), word(&last.reference));
        out.push_str(&format!("compare: upperdeck image diff {before} {last}\n"));
    }
    if let Some(next) = &found.next {
        out.push_str(&format!("more: --after {}\n", escape::text(next)));
    }
    out
}

/// Returns a text as a word of a command line.
fn word(text: &str) -> String {
    let text = escape::text(text);
    let plain = |c: char| c.is_ascii_alphanumeric() || "_./:@+-".contains(c);
    if text.chars().all(plain) {
        text
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_timeline_says_what_changed_and_how_to_get_at_it() -> anyhow::Result<()> {
        let now: Timestamp = "2026-11-24T12:00:00Z".parse()?;
        let entry = |tag: &str, made_by: &str, state: &str| {
            json!({"save": "0198f0c4-0000-7000-8000-000000000000", "at": "2026-11-24T11:30:00Z", "made_by": made_by,
                "session": "ab", "session_name": "hub/nb", "user": "alice", "name": "nb", "tag": tag, "digest": "sha256:0",
                "reference": format!("oci:/srv/a b/nb:{tag}"), "fate": {"state": state}, "pinned": false, "layer_bytes": 1,
                "image_bytes": 2})
        };
        let mut first = entry("three", "autosave", "tagged");
        first["changes"] = json!({"since": "previous", "entries": 15, "files": 12, "removed": 3, "bytes": 4_100_000,
            "largest": [{"path": "/home/a\u{1b}", "bytes": 4_000_000}]});
        first["packages"] =
            json!({"added": 1, "removed": 2, "changed": 0, "some": ["+numpy 2.1", "-rich 13"]});
        let entries = [
            first,
            entry("two", "end", "replaced"),
            entry("one", "user", "tagged"),
        ];
        let found: Timeline = serde_json::from_value(json!({"entries": entries, "next": "c"}))?;
        assert_eq!(
            table(&found, now),
            "AGE  BY       IMAGE              FILES  REMOVED  CHANGED  LARGEST                  PACKAGES\n\
             30m  itself   nb:three              12        3  4.10 MB  /home/a\\u{1b} (4.00 MB)  +numpy 2.1, -rich 13, 1 more\n\
             30m  its end  nb:two (replaced)      -        -        -  -                        -\n\
             30m  hand     nb:one                 -        -        -  -                        -\n\
             one file: upperdeck image cp 'oci:/srv/a b/nb:three':/PATH .\n\
             compare: upperdeck image diff 'oci:/srv/a b/nb:one' 'oci:/srv/a b/nb:three'\n\
             more: --after c\n"
        );
        Ok(())
    }
}
