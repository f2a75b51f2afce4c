//! Progress of a save: a bar on terminals, occasional lines for logs, JSON lines for programs.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{DecimalBytes, HumanDuration, MultiProgress, ProgressBar, ProgressStyle};

use crate::common::escape::text as escaped;
use crate::save::changes::{Changes, Since};
use crate::save::event::{EVENT_VERSION, Event, Observer, Phase, WaitReason};

/// Minimum interval between JSON lines about bytes.
const JSON_INTERVAL: Duration = Duration::from_millis(100);
/// Minimum interval between plain lines about bytes.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// `--progress`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Mode {
    /// A bar on a terminal, else a line now and then; on stderr.
    Auto,
    /// A bar on a terminal, even beside log lines.
    Bar,
    /// One JSON object a line, on stdout.
    Json,
    /// Warnings only, on stderr.
    None,
}

/// Returns the observer for a mode. `quiet` suppresses all output. `verbose` means that log lines share the terminal.
pub(super) fn observer(mode: Mode, quiet: bool, verbose: bool) -> Box<dyn Observer> {
    match mode {
        Mode::Json => Box::new(Json::new(io::stdout(), JSON_INTERVAL)),
        _ if quiet => Box::new(()),
        Mode::None => Box::new(Lines::new(io::stderr(), None)),
        // Without a terminal, indicatif would drop the warnings. Log lines would break up the bar.
        Mode::Auto | Mode::Bar
            if !io::stderr().is_terminal() || (verbose && mode == Mode::Auto) =>
        {
            Box::new(Lines::new(io::stderr(), Some(LINE_INTERVAL)))
        }
        Mode::Auto | Mode::Bar => Box::new(Bar::new()),
    }
}

/// Like [`observer`], for one of several containers that are saved together: JSON lines and warnings name it, and there is
/// no bar.
pub(super) fn observer_of(
    container: &str,
    mode: Mode,
    quiet: bool,
    verbose: bool,
) -> Box<dyn Observer> {
    let container = Some(container.to_owned());
    match mode {
        Mode::Json => Box::new(Json {
            container,
            ..Json::new(io::stdout(), JSON_INTERVAL)
        }),
        _ if quiet => observer(mode, quiet, verbose),
        _ => Box::new(Lines {
            container,
            ..Lines::new(io::stderr(), (mode != Mode::None).then_some(LINE_INTERVAL))
        }),
    }
}

/// A status line at the bottom of a terminal. Nothing is shown if stderr is not a terminal. Removed when dropped.
pub(super) struct StatusLine(Option<ProgressBar>);

impl StatusLine {
    pub(super) fn new() -> Self {
        let shown = io::stderr().is_terminal();
        Self(shown.then(|| {
            let line = ProgressBar::new_spinner();
            line.enable_steady_tick(Duration::from_millis(120));
            line
        }))
    }

    pub(super) fn show(&self, what: &str) {
        if let Some(line) = &self.0 {
            line.set_message(what.to_owned());
        }
    }
}

impl Drop for StatusLine {
    fn drop(&mut self) {
        if let Some(line) = &self.0 {
            line.finish_and_clear();
        }
    }
}

fn phase_text(phase: Phase) -> &'static str {
    match phase {
        Phase::Locating => "finding the container and its base image",
        Phase::Scanning => "reading the upper directory",
        Phase::Streaming => "saving",
        Phase::Base => "delivering base layers",
        Phase::Finishing => "delivering config, manifest and tag",
    }
}

/// Returns what a save waits for. Another save is told of by a warning.
fn waiting_text(reason: WaitReason, seconds: Option<f64>) -> Option<String> {
    Some(match (reason, seconds) {
        (WaitReason::Writers, _) => {
            "waiting for programs that write to files of the container".to_owned()
        }
        (WaitReason::Registry, Some(seconds)) => {
            format!("the registry did not answer as it should: it is asked again in {seconds:.0} s")
        }
        (WaitReason::Registry, None) => {
            "the registry did not answer as it should: it is asked again".to_owned()
        }
        (WaitReason::OtherSave, _) => return None,
    })
}

fn changes_text(changes: &Changes) -> String {
    let since = match changes.since {
        Since::Base => "since the base",
        Since::Previous => "since the last save",
    };
    escaped(&format!("{since}: {changes}"))
}

fn queued_text(place: u64) -> String {
    match place {
        0 => "queued: next".to_owned(),
        place => format!("queued: {place} before it"),
    }
}

fn warning_text(code: &str, message: &str) -> String {
    format!("warning: {} ({})", escaped(message), escaped(code))
}

/// Calls `use_it` on the value of a mutex, even if another thread panicked with the lock held.
fn with_lock<T, R>(mutex: &Mutex<T>, use_it: impl FnOnce(&mut T) -> R) -> R {
    use_it(&mut mutex.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Writes JSON lines: `{"version":1,"time":"…","event":"…",…}`.
struct Json<W> {
    state: Mutex<JsonState<W>>,
    every: Duration,
    /// The container's name, if several are saved.
    container: Option<String>,
}

struct JsonState<W> {
    out: W,
    /// Times of the last lines about all bytes, and about those of a base layer.
    last: [Option<Instant>; 2],
}

impl<W: Write + Send> Json<W> {
    fn new(out: W, every: Duration) -> Self {
        Self {
            state: Mutex::new(JsonState {
                out,
                last: [None; 2],
            }),
            every,
            container: None,
        }
    }
}

#[derive(serde::Serialize)]
struct Line<'a> {
    version: u32,
    time: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    container: Option<&'a str>,
    #[serde(flatten)]
    event: &'a Event,
}

/// Formats one event as a line, without the newline. `time` is written in RFC 3339, UTC.
fn json_line(
    event: &Event,
    container: Option<&str>,
    time: jiff::Timestamp,
) -> serde_json::Result<String> {
    serde_json::to_string(&Line {
        version: EVENT_VERSION,
        time: format!("{time:.3}"),
        container,
        event,
    })
}

impl<W: Write + Send> Observer for Json<W> {
    fn event(&self, event: Event) {
        with_lock(&self.state, |state| {
            let frequent = match event {
                Event::Progress {
                    bytes_done,
                    bytes_total,
                    base_done,
                    base_total,
                    ..
                } => bytes_done < bytes_total || base_done < base_total,
                Event::BaseProgress {
                    bytes_done,
                    bytes_total,
                    ..
                } => bytes_done < bytes_total || bytes_total == 0,
                _ => false,
            };
            let last = &mut state.last[usize::from(matches!(event, Event::BaseProgress { .. }))];
            if frequent && last.is_some_and(|last| last.elapsed() < self.every) {
                return;
            }
            if frequent {
                *last = Some(Instant::now());
            }
            let container = self.container.as_deref();
            if let Ok(line) = json_line(&event, container, jiff::Timestamp::now()) {
                // A closed reader does not stop the save. One write for a line: several saves may share the output.
                let line = format!("{line}\n");
                let written = state.out.write_all(line.as_bytes());
                let _ = written.and_then(|()| state.out.flush());
            }
        });
    }
}

/// Writes plain lines. Without an interval, only warnings are written.
struct Lines<W> {
    state: Mutex<LinesState<W>>,
    every: Option<Duration>,
    /// The container's name, if several are saved.
    container: Option<String>,
}

struct LinesState<W> {
    out: W,
    last: Instant,
}

impl<W: Write + Send> Lines<W> {
    fn new(out: W, every: Option<Duration>) -> Self {
        Self {
            state: Mutex::new(LinesState {
                out,
                last: Instant::now(),
            }),
            every,
            container: None,
        }
    }
}

impl<W: Write + Send> Observer for Lines<W> {
    fn event(&self, event: Event) {
        with_lock(&self.state, |state| {
            let line = match (event, self.every) {
                (Event::Warning { code, message }, _) => warning_text(&code, &message),
                (Event::Queued { place }, Some(_)) => queued_text(place),
                (Event::Phase { phase }, Some(_)) => {
                    state.last = Instant::now();
                    phase_text(phase).to_owned()
                }
                (Event::Waiting { reason, seconds }, Some(_)) => {
                    match reason.and_then(|reason| waiting_text(reason, seconds)) {
                        Some(text) => text,
                        None => return,
                    }
                }
                (Event::Paused { pause_ms }, Some(_)) => {
                    format!("the container was frozen for {pause_ms:.1} ms")
                }
                (
                    Event::Saved {
                        changes: Some(changes),
                        ..
                    },
                    Some(_),
                ) => changes_text(&changes),
                (
                    Event::Progress {
                        bytes_done,
                        bytes_total,
                        bytes_sent,
                        base_done,
                        base_total,
                        ..
                    },
                    Some(every),
                ) if state.last.elapsed() >= every => {
                    state.last = Instant::now();
                    let (bytes_done, bytes_total) =
                        (bytes_done + base_done, bytes_total + base_total);
                    let percent = bytes_done
                        .saturating_mul(100)
                        .checked_div(bytes_total)
                        .unwrap_or(100);
                    let (done, total, sent) = (
                        DecimalBytes(bytes_done),
                        DecimalBytes(bytes_total),
                        DecimalBytes(bytes_sent),
                    );
                    format!("{percent} %: {done} of {total} read, {sent} delivered")
                }
                (
                    Event::BaseProgress {
                        layer,
                        layers,
                        bytes_done,
                        ..
                    },
                    Some(every),
                ) if state.last.elapsed() >= every => {
                    state.last = Instant::now();
                    format!(
                        "base layer {} of {layers}: {}",
                        layer + 1,
                        DecimalBytes(bytes_done)
                    )
                }
                _ => return,
            };
            // If stderr cannot be written to, nothing can be reported.
            let _ = match &self.container {
                Some(container) => writeln!(state.out, "{}: {line}", escaped(container)),
                None => writeln!(state.out, "{line}"),
            };
        });
    }
}

/// A bar for the layer, and below it one for each base layer that is being transferred (several concurrently).
struct Bar {
    all: MultiProgress,
    main: ProgressBar,
    /// Tar bytes of the changes so far.
    changes: AtomicU64,
    base: Mutex<BTreeMap<usize, ProgressBar>>,
}

impl Bar {
    fn new() -> Self {
        let all = MultiProgress::new();
        let main = all.add(ProgressBar::new_spinner());
        main.enable_steady_tick(Duration::from_millis(120));
        Self {
            all,
            main,
            changes: AtomicU64::new(0),
            base: Mutex::new(BTreeMap::new()),
        }
    }

    fn show(&self, line: &str) {
        // Printed above the bars. A failed write is ignored.
        let _ = self.all.println(line);
    }
}

/// The templates are checked by tests; an invalid one falls back to the default style.
fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("━╸─")
}

const MAIN: &str = "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} eta {eta}";
const BASE: &str = "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec}";
const BASE_UNKNOWN: &str = "{msg} {bytes} {bytes_per_sec}";

impl Observer for Bar {
    fn event(&self, event: Event) {
        match event {
            Event::Queued { place } => self.main.set_message(queued_text(place)),
            Event::Phase { phase } => self.main.set_message(phase_text(phase)),
            Event::Progress {
                bytes_done,
                bytes_total,
                entries_total,
                base_done,
                base_total,
                ..
            } => {
                self.changes.store(bytes_done, Ordering::Relaxed);
                let (bytes_done, bytes_total) = (bytes_done + base_done, bytes_total + base_total);
                if self.main.length() != Some(bytes_total) {
                    self.main.set_style(style(MAIN));
                    self.main.set_length(bytes_total);
                    self.main.reset_eta();
                    self.main.set_message(format!(
                        "saving {}",
                        crate::common::message::count(entries_total, "entry", "entries")
                    ));
                }
                self.main.set_position(bytes_done);
            }
            Event::BaseProgress {
                layer,
                layers,
                bytes_done,
                bytes_total,
            } => self.base(layer, layers, bytes_done, bytes_total),
            Event::Warning { code, message } => self.show(&warning_text(&code, &message)),
            Event::Paused { pause_ms } => {
                self.show(&format!("the container was frozen for {pause_ms:.1} ms"));
            }
            Event::Saved { changes, .. } => {
                let (bytes, time) = (
                    DecimalBytes(self.changes.load(Ordering::Relaxed)),
                    HumanDuration(self.main.elapsed()),
                );
                self.show(&format!("saved: {bytes} of changes in {time}"));
                if let Some(changes) = changes {
                    self.show(&changes_text(&changes));
                }
                self.clear();
            }
            Event::Failed { .. } => self.clear(),
            Event::Waiting { reason, seconds } => {
                if let Some(text) = reason.and_then(|reason| waiting_text(reason, seconds)) {
                    self.show(&text);
                }
            }
            Event::Ready { .. } => {}
        }
    }
}

impl Bar {
    fn base(&self, layer: usize, layers: usize, bytes_done: u64, bytes_total: u64) {
        with_lock(&self.base, |base| {
            let bar = base.entry(layer).or_insert_with(|| {
                let template = if bytes_total == 0 { BASE_UNKNOWN } else { BASE };
                let bar = ProgressBar::new(bytes_total)
                    .with_style(style(template))
                    .with_message(format!("base layer {} of {layers}", layer + 1));
                self.all.add(bar)
            });
            bar.set_position(bytes_done);
            if bytes_total > 0 && bytes_done >= bytes_total {
                bar.finish_and_clear();
                base.remove(&layer);
            }
        });
    }

    fn clear(&self) {
        self.main.finish_and_clear();
        with_lock(&self.base, |base| {
            for bar in std::mem::take(base).values() {
                bar.finish_and_clear();
            }
        });
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        // Clears the screen, so that a save that ended early leaves no partial bar.
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::common::digest::Digest;
    use crate::save::changes::ChangedFile;

    fn progress(bytes_done: u64) -> Event {
        Event::Progress {
            bytes_done,
            bytes_total: 100,
            bytes_sent: 7,
            entries_total: 3,
            base_done: 0,
            base_total: 0,
        }
    }

    #[test]
    fn the_schema_of_a_line() -> anyhow::Result<()> {
        let time: jiff::Timestamp = "2026-01-02T03:04:05.678912Z".parse()?;
        let at = r#"{"version":1,"time":"2026-01-02T03:04:05.678Z","event":"#;
        let digest = Digest::of("");
        for (event, rest) in [
            (
                Event::Phase {
                    phase: Phase::Streaming,
                },
                r#""phase","phase":"streaming"}"#.to_owned(),
            ),
            (
                progress(50),
                r#""progress","bytes_done":50,"bytes_total":100,"bytes_sent":7,"entries_total":3,"base_done":0,"base_total":0}"#
                    .to_owned(),
            ),
            (
                Event::BaseProgress {
                    layer: 0,
                    layers: 2,
                    bytes_done: 1,
                    bytes_total: 0,
                },
                r#""base_progress","layer":0,"layers":2,"bytes_done":1,"bytes_total":0}"#
                    .to_owned(),
            ),
            (
                Event::Warning {
                    code: "unstable_file".into(),
                    message: "a\x1b".into(),
                },
                r#""warning","code":"unstable_file","message":"a\u001b"}"#.to_owned(),
            ),
            (
                Event::Paused { pause_ms: 1.5 },
                r#""paused","pause_ms":1.5}"#.to_owned(),
            ),
            (
                Event::Saved {
                    reference: "h/r".into(),
                    digest,
                    changes: Some(Changes::default()),
                },
                format!(
                    r#""saved","reference":"h/r","digest":"{digest}","changes":{{"since":"base","entries":0,"files":0,"removed":0,"bytes":0,"largest":[]}}}}"#
                ),
            ),
            (
                Event::Failed {
                    exit: 69,
                    code: "base_unproven".into(),
                    message: "m".into(),
                    retryable: false,
                },
                r#""failed","exit":69,"code":"base_unproven","message":"m","retryable":false}"#
                    .to_owned(),
            ),
        ] {
            assert_eq!(json_line(&event, None, time)?, format!("{at}{rest}"));
        }
        Ok(())
    }

    #[test]
    fn json_thins_progress_and_nothing_else() {
        let json = Json::new(Vec::new(), Duration::from_secs(3600));
        for done in [0, 1, 2, 50] {
            json.event(progress(done));
        }
        json.event(Event::Paused { pause_ms: 0.0 });
        json.event(Event::BaseProgress {
            layer: 0,
            layers: 1,
            bytes_done: 1,
            bytes_total: 2,
        });
        // The last value of a count is never dropped.
        json.event(progress(100));
        json.event(Event::BaseProgress {
            layer: 0,
            layers: 1,
            bytes_done: 2,
            bytes_total: 2,
        });
        let text = with_lock(&json.state, |state| {
            String::from_utf8_lossy(&state.out).into_owned()
        });
        let events: Vec<serde_json::Value> = text
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect();
        let seen: Vec<(&str, Option<u64>)> = events
            .iter()
            .map(|e| (e["event"].as_str().unwrap_or(""), e["bytes_done"].as_u64()))
            .collect();
        let expected = [
            ("progress", Some(0)),
            ("paused", None),
            // Each count has its own interval.
            ("base_progress", Some(1)),
            ("progress", Some(100)),
            ("base_progress", Some(2)),
        ];
        assert_eq!(seen, expected);
    }

    #[test]
    fn lines_are_sparse_and_escaped() {
        let text = |every| {
            let lines = Lines::new(Vec::new(), every);
            lines.event(Event::Phase {
                phase: Phase::Scanning,
            });
            lines.event(progress(25));
            lines.event(Event::Warning {
                code: "x".into(),
                message: "bad \x1b]0;name".into(),
            });
            lines.event(Event::Paused { pause_ms: 12.34 });
            lines.event(Event::Saved {
                reference: "h/r".into(),
                digest: Digest::of(""),
                changes: Some(Changes {
                    since: Since::Previous,
                    entries: 3,
                    files: 2,
                    removed: 1,
                    bytes: 4_100_000,
                    largest: vec![ChangedFile {
                        path: "/a\x1b".into(),
                        bytes: 4_000_000,
                    }],
                }),
            });
            with_lock(&lines.state, |state| {
                String::from_utf8_lossy(&state.out).into_owned()
            })
        };
        let warning = "warning: bad \\u{1b}]0;name (x)\n";
        assert_eq!(text(None), warning);
        let pause = "the container was frozen for 12.3 ms\n\
             since the last save: 2 files changed, 1 removed, 4.10 MB; largest: /a\\u{1b} (4.00 MB)\n";
        assert_eq!(
            text(Some(Duration::from_secs(3600))),
            format!("reading the upper directory\n{warning}{pause}")
        );
        let all = text(Some(Duration::ZERO));
        assert!(
            all.contains("25 %: 25 B of 100 B read, 7 B delivered\n"),
            "{all}"
        );
    }

    #[test]
    fn templates_are_right() {
        for template in [MAIN, BASE, BASE_UNKNOWN] {
            assert!(ProgressStyle::with_template(template).is_ok(), "{template}");
        }
    }
}
