//! `job`: saves through a manager from the command line.

use std::time::Duration;

use anyhow::Context;
use clap::ValueEnum;
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::autosave;
use super::client::{Client, Error};
use super::timeline;
use super::words::{age, api_name, which};
use crate::cli::args::service::{Job, JobSubmit};
use crate::cli::args::{Format, Server};
use crate::cli::exit::Exit;
use crate::cli::print::print;
use crate::cli::progress::{self, Mode};
use crate::cli::text::{self, Align};
use crate::cli::{signals, write_stdout};
use crate::common::cancel::Cancelled;
use crate::service::job::{Code, Event, Observer, SaveOptions, State};
use crate::service::manager::api::{
    ImageName, Notify, Save, SaveRequest, Saves, SessionView, Sessions, Waiting, WaitingReason,
};

/// Length of a shortened container ID in a table.
const SHORT_ID: usize = 12;

pub(super) fn run(job: Job, verbose: bool) -> anyhow::Result<()> {
    match job {
        Job::Sessions(args) => with_client(&args.server, async |client| {
            let found: Sessions = client.get("sessions", &[]).await?;
            print(args.format, found.sessions.as_slice(), sessions_now)
        }),
        Job::Submit(args) => {
            let server = args.server.clone();
            with_client(&server, async |client| submit(client, *args, verbose).await)
        }
        Job::Status(args) => with_client(&args.server, async |client| {
            let save: Save = client.get(&format!("saves/{}", args.id), &[]).await?;
            print(args.format, &save, status_text)
        }),
        Job::Watch(args) => with_client(&args.server, async |client| {
            watch(client, &args.id.to_string(), args.progress, verbose).await
        }),
        Job::Cancel(args) => with_client(&args.server, async |client| {
            cancel(client, &args.id.to_string()).await
        }),
        Job::Hurry(args) => with_client(&args.server, async |client| {
            client.hurry(&args.id.to_string()).await?;
            Ok(write_stdout(b"its node is told\n")?)
        }),
        Job::Timeline(args) => {
            let server = args.server.clone();
            with_client(&server, async |client| timeline::run(client, args).await)
        }
        Job::Ls(args) => with_client(&args.server, async |client| {
            let mut query = vec![("limit", args.limit.to_string())];
            query.extend(args.state.map(|state| ("state", state.name().to_owned())));
            query.extend(args.of.clone().map(|of| ("user", of)));
            query.extend(args.after.clone().map(|after| ("cursor", after)));
            let found: Saves = client.get("saves", &query).await?;
            print(args.format, &found, saves_now)
        }),
        Job::Autosave(args) => with_client(&args.server, async |client| {
            autosave::run(client, &args).await
        }),
    }
}

/// Runs `work` with a client of the manager until a signal cancels.
pub(super) fn with_client(
    server: &Server,
    work: impl AsyncFnOnce(&Client) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let client = Client::new(server)?;
    until_signal(async || work(&client).await)
}

/// Runs `work` until a signal cancels.
pub(super) fn until_signal(work: impl AsyncFnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
    let cancel = CancellationToken::new();
    signals::cancel_on_signals(&cancel).context("cannot listen for SIGINT and SIGTERM")?;
    let runtime = tokio::runtime::Runtime::new().context("cannot start the I/O threads")?;
    runtime.block_on(async {
        tokio::select! {
            done = work() => done,
            () = cancel.cancelled() => Err(Cancelled.into()),
        }
    })
}

/// Cancels a save, and prints what follows.
pub(super) async fn cancel(client: &Client, id: &str) -> anyhow::Result<()> {
    let save = client.cancel(id).await?;
    let said = if save.state.is_final() {
        format!("{}\n", save.state.name())
    } else {
        "cancelling: its node is told\n".to_owned()
    };
    Ok(write_stdout(said.as_bytes())?)
}

/// Parses `NAME[:TAG]` or `:TAG`.
pub(super) fn image_name(text: Option<&str>) -> ImageName {
    let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    match text.map(|text| text.split_once(':').unwrap_or((text, ""))) {
        Some((name, tag)) => ImageName {
            name: some(name),
            tag: some(tag),
        },
        None => ImageName::default(),
    }
}

/// Returns who is told about the save, if the arguments name a receiver.
fn notify(url: Option<String>, email: bool) -> Option<Notify> {
    (url.is_some() || email).then(|| Notify {
        url,
        email: email.then_some(true),
        ..Notify::default()
    })
}

async fn submit(client: &Client, args: JobSubmit, verbose: bool) -> anyhow::Result<()> {
    let request = SaveRequest {
        session: which(&args.session)?,
        image: image_name(args.image.as_deref()),
        message: args.message,
        options: SaveOptions {
            full: args.full,
            compression: args
                .compression
                .and_then(|codec| codec.to_possible_value())
                .map(|codec| codec.get_name().to_owned()),
            exclude: args.exclude,
            include_volumes: args.include_volume,
            labels: args.label.into_iter().collect(),
        },
        replace: args.replace,
        notify: notify(args.notify, args.email),
    };
    // A repeated request with the same key refers to the same save, so a lost reply does not cause a second one.
    let key = args
        .idempotency_key
        .unwrap_or_else(|| Uuid::now_v7().to_string());
    let save = self::request(client, &key, &request).await?;
    if args.watch {
        return watch(client, &save.id.to_string(), args.progress, verbose).await;
    }
    print_requested(args.format, &save)
}

/// Requests a save. If the manager cannot be reached, it is tried again.
pub(super) async fn request(
    client: &Client,
    key: &str,
    request: &SaveRequest,
) -> Result<Save, Error> {
    let mut tries = 0;
    loop {
        match client.post("saves", key, request).await {
            Err(Error::Unreachable { .. }) if tries < 2 => {
                tries += 1;
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            result => return result,
        }
    }
}

/// Prints a save that was requested: its ID, or all of it.
pub(super) fn print_requested(format: Format, save: &Save) -> anyhow::Result<()> {
    match format {
        Format::Table => Ok(write_stdout(format!("{}\n", save.id).as_bytes())?),
        Format::Json => print(Format::Json, save, status_text),
    }
}

/// Shows the progress of a save from the manager's events, and prints the reference to stdout at the end.
pub(super) async fn watch(
    client: &Client,
    id: &str,
    mode: Mode,
    verbose: bool,
) -> anyhow::Result<()> {
    let observer = progress::observer(mode, false, verbose);
    let mut reported = Reported::default();
    let save = client
        .watch(id, |save| reported.report(save, observer.as_ref()))
        .await?;
    Reported::end(&save, observer.as_ref());
    drop(observer);
    match (save.state, save.result, save.error) {
        (State::Succeeded, Some(result), _) => {
            if mode != Mode::Json {
                write_stdout(format!("{}\n", result.reference).as_bytes())?;
            }
            Ok(())
        }
        (State::Cancelled, ..) => Err(Cancelled.into()),
        (_, _, Some(error)) => Err(Error::Save {
            code: error.code,
            message: error.message,
            retryable: error.retryable,
        }
        .into()),
        (state, ..) => Err(Error::Save {
            code: Code::Internal,
            message: format!("it ended as {} without a result", state.name()),
            retryable: false,
        }
        .into()),
    }
}

/// Returns why a save waits, as a clause.
fn waiting_text(waiting: &Waiting, can_hurry: bool) -> String {
    let node = &waiting.node;
    match waiting.reason {
        WaitingReason::Queue => format!("other saves are ahead of it on {node}"),
        WaitingReason::Cores if can_hurry => {
            format!("waiting for free cores on {node}; job hurry runs it at normal priority")
        }
        WaitingReason::Cores => format!("waiting for free cores on {node}"),
        WaitingReason::Slot => format!("{node} runs as many saves as it may at once"),
        WaitingReason::Retry => match &waiting.until {
            Some(until) => format!("the last attempt failed; the next one begins at {until}"),
            None => "the last attempt failed".to_owned(),
        },
        WaitingReason::Writers => {
            "waiting for programs that write to files of the session".to_owned()
        }
        WaitingReason::Registry => match &waiting.until {
            Some(until) => {
                format!("the registry did not answer as it should; asked again at {until}")
            }
            None => "the registry did not answer as it should; it is asked again".to_owned(),
        },
        WaitingReason::OtherSave => "another save of the session is under way".to_owned(),
        WaitingReason::Node => format!("node {node} is not heard of"),
        WaitingReason::Draining => format!("{node} takes no new saves: its agent ends"),
        WaitingReason::QueueDown => "it is recorded; the queue cannot be reached".to_owned(),
    }
}

/// What of a save has been passed to the observer, so that nothing is reported twice.
#[derive(Default)]
struct Reported {
    phase: Option<crate::service::job::Phase>,
    place: Option<u64>,
    waiting: Option<WaitingReason>,
    attempt: u32,
    warnings: usize,
    pause: bool,
}

impl Reported {
    fn report(&mut self, save: &Save, observer: &dyn Observer) {
        if self.attempt != save.attempt {
            if self.attempt != 0 {
                observer.event(Event::Warning {
                    code: "again".to_owned(),
                    message: format!("attempt {}", save.attempt),
                });
            }
            *self = Self {
                attempt: save.attempt,
                warnings: self.warnings,
                ..Self::default()
            };
        }
        if save.place != self.place {
            self.place = save.place;
            if let Some(place) = save.place {
                observer.event(Event::Queued { place });
            }
        }
        let waiting = save.waiting.as_ref();
        let reason = waiting.map(|waiting| waiting.reason);
        if reason != self.waiting {
            self.waiting = reason;
            // The place in the queue is reported as such.
            if let Some(waiting) = waiting.filter(|_| save.place.is_none_or(|place| place == 0)) {
                observer.event(Event::Warning {
                    code: "waiting".to_owned(),
                    message: waiting_text(waiting, save.can_hurry),
                });
            }
        }
        if save.phase != self.phase {
            self.phase = save.phase;
            if let Some(phase) = save.phase {
                observer.event(Event::Phase { phase });
            }
        }
        if let Some(progress) = save.progress.filter(|progress| progress.bytes_total > 0) {
            observer.event(Event::Progress {
                bytes_done: progress.bytes_done.saturating_sub(progress.base_done),
                bytes_total: progress.bytes_total.saturating_sub(progress.base_total),
                bytes_sent: progress.bytes_sent,
                entries_total: progress.entries_total,
                base_done: progress.base_done,
                base_total: progress.base_total,
            });
        }
        for warning in save.warnings.iter().skip(self.warnings) {
            observer.event(Event::Warning {
                code: warning.code.clone(),
                message: warning.message.clone(),
            });
        }
        self.warnings = self.warnings.max(save.warnings.len());
        if let (false, Some(pause_ms)) = (self.pause, save.pause_ms) {
            self.pause = true;
            observer.event(Event::Paused { pause_ms });
        }
    }

    /// Reports the final event.
    fn end(save: &Save, observer: &dyn Observer) {
        if let (Some(result), Ok(digest)) = (
            &save.result,
            save.result
                .as_ref()
                .map_or("", |result| result.digest.as_str())
                .parse(),
        ) {
            observer.event(Event::Saved {
                reference: result.reference.clone(),
                digest,
                changes: result.changes.clone(),
            });
        } else if let Some(error) = &save.error {
            let failed = Error::Save {
                code: error.code,
                message: error.message.clone(),
                retryable: error.retryable,
            };
            observer.event(Event::Failed {
                exit: failed.exit().code(),
                code: error.code.name().to_owned(),
                message: error.message.clone(),
                retryable: error.retryable,
            });
        } else if save.state == State::Cancelled {
            observer.event(Event::Failed {
                exit: Exit::Cancelled.code(),
                code: "cancelled".to_owned(),
                message: "cancelled".to_owned(),
                retryable: false,
            });
        }
    }
}

/// Returns whether a session runs, or when and why it ended.
fn state(session: &SessionView, now: Timestamp) -> String {
    let Some(end) = &session.ended else {
        return "running".to_owned();
    };
    let when = end.at.as_ref().map(|at| format!(" {} ago", age(at, now)));
    let why = match end.exit_code {
        _ if end.out_of_memory => ": out of memory".to_owned(),
        Some(code) => format!(": exit code {code}"),
        None => String::new(),
    };
    format!("ended{}{why}", when.unwrap_or_default())
}

/// Returns sessions as a table, with their ages as of now.
pub(super) fn sessions_now(sessions: &[SessionView]) -> String {
    sessions_table(sessions, Timestamp::now())
}

fn sessions_table(sessions: &[SessionView], now: Timestamp) -> String {
    let header = [
        ("SESSION", Align::Left),
        ("NAME", Align::Left),
        ("KIND", Align::Left),
        ("ON", Align::Left),
        ("NODE", Align::Left),
        ("OWNER", Align::Left),
        ("CHANGED", Align::Right),
        ("AGE", Align::Right),
        ("STATE", Align::Left),
        ("AUTOSAVE", Align::Left),
        ("SAVE", Align::Left),
    ];
    let rows = sessions.iter().map(|session| {
        let name = match (&session.namespace, &session.pod, &session.container) {
            (Some(namespace), Some(pod), Some(container)) => {
                format!("{namespace}/{pod}/{container}")
            }
            (_, _, Some(container)) => container.clone(),
            _ => "-".to_owned(),
        };
        vec![
            session.id.chars().take(SHORT_ID).collect(),
            name,
            api_name(&session.kind),
            api_name(&session.category),
            session.node.clone(),
            session.owner.clone().unwrap_or_else(|| "-".to_owned()),
            text::bytes(session.upper_bytes),
            match session.ended {
                // Its state has the age of its end.
                Some(_) => "-".to_owned(),
                None => age(&session.started, now),
            },
            state(session, now),
            autosave::brief(session.autosave.as_ref()),
            session
                .save
                .map_or_else(|| "-".to_owned(), |save| save.to_string()),
        ]
    });
    text::table(&header, &rows.collect::<Vec<_>>())
}

/// Returns saves as a table, with their ages as of now.
pub(super) fn saves_now(found: &Saves) -> String {
    saves_table(found, Timestamp::now())
}

fn saves_table(found: &Saves, now: Timestamp) -> String {
    let header = [
        ("ID", Align::Left),
        ("SESSION", Align::Left),
        ("USER", Align::Left),
        ("IMAGE", Align::Left),
        ("STATE", Align::Left),
        ("SIZE", Align::Right),
        ("PAUSE", Align::Right),
        ("AGE", Align::Right),
    ];
    let rows = found.saves.iter().map(|save| {
        let state = match (&save.error, save.phase) {
            (Some(error), _) => format!("{} ({})", save.state.name(), error.code.name()),
            (None, Some(phase)) if save.state == State::Running => {
                format!("{} ({})", save.state.name(), api_name(&phase))
            }
            _ => save.state.name().to_owned(),
        };
        vec![
            save.id.to_string(),
            save.session_name.clone(),
            save.user.clone(),
            format!("{}:{}", save.name, save.tag),
            state,
            text::bytes(save.result.as_ref().map(|result| result.image_bytes)),
            save.pause_ms
                .map_or_else(|| "-".to_owned(), |pause| format!("{pause:.0} ms")),
            age(&save.created, now),
        ]
    });
    let mut out = text::table(&header, &rows.collect::<Vec<_>>());
    if let Some(next) = &found.next {
        out.push_str(&format!(
            "more: --after {}\n",
            crate::common::escape::text(next)
        ));
    }
    out
}

pub(super) fn status_text(save: &Save) -> String {
    let mut lines = vec![
        ("save", save.id.to_string()),
        ("session", format!("{} on {}", save.session_name, save.node)),
        ("user", save.user.clone()),
        ("target", save.target.clone()),
    ];
    lines.extend(save.message.clone().map(|message| ("message", message)));
    let mut state = save.state.name().to_owned();
    if let Some(phase) = save.phase.filter(|_| save.state == State::Running) {
        state.push_str(&format!(", {}", api_name(&phase)));
    }
    if save.cancelling && !save.state.is_final() {
        state.push_str(", cancelling");
    }
    if save.attempt > 1 {
        state.push_str(&format!(", attempt {}", save.attempt));
    }
    lines.push(("state", state));
    lines.extend(
        save.place
            .map(|place| ("place", format!("{place} before it"))),
    );
    lines.extend(
        save.since
            .clone()
            .filter(|_| !save.state.is_final())
            .map(|since| ("since", since)),
    );
    lines.extend(
        save.waiting
            .as_ref()
            .map(|waiting| ("waiting", waiting_text(waiting, save.can_hurry))),
    );
    if let Some(progress) = save.progress.filter(|_| !save.state.is_final()) {
        let left = progress
            .seconds_left
            .map_or_else(String::new, |left| format!(", {left:.0} s left"));
        lines.push((
            "progress",
            format!(
                "{} of {}, {} sent{left}",
                text::bytes(Some(progress.bytes_done)),
                text::bytes(Some(progress.bytes_total)),
                text::bytes(Some(progress.bytes_sent))
            ),
        ));
    }
    lines.extend(
        save.pause_ms
            .map(|pause| ("pause", format!("{pause:.0} ms"))),
    );
    if let Some(result) = &save.result {
        lines.push(("image", result.reference.clone()));
        lines.push((
            "size",
            format!(
                "{} in all, {} of this save",
                text::bytes(Some(result.image_bytes)),
                text::bytes(Some(result.layer_bytes))
            ),
        ));
        let changes = result.changes.as_ref();
        lines.extend(changes.map(|changes| ("changes", changes.to_string())));
    }
    if let Some(error) = &save.error {
        lines.push((
            "error",
            format!("{} ({})", error.message, error.code.name()),
        ));
    }
    for warning in &save.warnings {
        lines.push(("warning", format!("{} ({})", warning.message, warning.code)));
    }
    lines
        .iter()
        .map(|(name, value)| format!("{name:<9} {}\n", crate::common::escape::text(value)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_as_people_write_them() {
        let name = |text| {
            let ImageName { name, tag } = image_name(text);
            (name, tag)
        };
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(name(Some("a:b")), (some("a"), some("b")));
        assert_eq!(name(Some("a")), (some("a"), None));
        assert_eq!(name(Some(":b")), (None, some("b")));
        assert_eq!(name(None), (None, None));
    }

    #[test]
    fn a_session_that_has_ended_says_when_and_why() -> anyhow::Result<()> {
        let now: Timestamp = "2026-11-24T12:00:00Z".parse()?;
        let mut session: SessionView = serde_json::from_value(serde_json::json!({
            "id": "ab".repeat(32), "node": "n1", "owner": "alice", "namespace": "hub", "pod": "nb-0", "container": "notebook",
            "runtime": "containerd", "kind": "jupyter", "category": "cpu", "started": "2026-11-24T10:00:00Z",
            "unsaved": [], "unsaved_more": 0, "suggested_name": "nb-0", "suggested_tag": "x",
        }))?;
        assert!(
            sessions_table(&[session.clone()], now).ends_with("  2h  running  -         -\n"),
            "{}",
            sessions_table(&[session.clone()], now)
        );
        for (at, exit_code, out_of_memory, told) in [
            (
                Some("2026-11-24T11:57:00Z"),
                Some(137),
                true,
                "ended 3m ago: out of memory",
            ),
            (
                Some("2026-11-24T11:57:00Z"),
                Some(1),
                false,
                "ended 3m ago: exit code 1",
            ),
            (Some("2026-11-24T11:59:59Z"), None, false, "ended 1s ago"),
            (None, None, false, "ended"),
        ] {
            session.ended = Some(crate::service::manager::api::SessionEndView {
                at: at.map(str::to_owned),
                exit_code,
                out_of_memory,
                save: false,
            });
            assert_eq!(state(&session, now), told);
        }
        assert!(sessions_table(&[session], now).ends_with("  ended  -         -\n"));
        Ok(())
    }
}
