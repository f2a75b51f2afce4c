//! Flags of `job`, which saves through a manager.

#![allow(
    rustdoc::broken_intra_doc_links,
    rustdoc::invalid_html_tags,
    reason = "the comments are what --help prints: brackets there mean that a part may be left out"
)]

use clap::{Args, Subcommand};

use crate::cli::args::shared::{CONTENT, Format, METADATA, REPORT, Server};
use crate::cli::args::value::{duration, key_value};
use crate::cli::progress::Mode;
use crate::save::Compression;
use crate::service::job::{self, SaveEnded};
use crate::service::manager::api::Replace;

pub(super) const JOB_HELP: &str = "\
Examples:
  upperdeck job sessions
  upperdeck job submit --watch jupyter/notebook-0 notebook:monday
  upperdeck job ls --state running
  upperdeck job watch 0198f0c4-0000-7000-8000-000000000000
  upperdeck job submit --server https://save.example.org \\
      --token-file ~/.upperdeck-token --message 'with pandas' 3f2a9c51d0b7

The manager is given by --server or UPPERDECK_SERVER; the default is the 'upperdeck up' of this machine.";

#[derive(Debug, Subcommand)]
pub(in crate::cli) enum Job {
    /// List the sessions that you may save
    #[command(
        after_long_help = "Examples:\n  upperdeck job sessions\n  upperdeck job sessions --format json | jq -r '.[].id'\n\nJSON: an array of objects as GET /api/v1/sessions has them."
    )]
    Sessions(JobSessions),
    /// Request a save and print its ID
    #[command(after_long_help = JOB_SUBMIT_HELP)]
    Submit(Box<JobSubmit>),
    /// Show the state of a save
    #[command(
        after_long_help = "Examples:\n  upperdeck job status 0198f0c4-0000-7000-8000-000000000000\n\nJSON: an object as GET /api/v1/saves/{id} has it."
    )]
    Status(JobStatus),
    /// Follow a save to its end and print the image's reference
    #[command(
        after_long_help = "Examples:\n  upperdeck job watch 0198f0c4-0000-7000-8000-000000000000\n\nThe exit code is that of the save, as of 'commit'. A manager that is started again is waited for."
    )]
    Watch(JobWatch),
    /// Cancel a save; its tag is not written
    #[command(
        after_long_help = "Examples:\n  upperdeck job cancel 0198f0c4-0000-7000-8000-000000000000"
    )]
    Cancel(JobCancel),
    /// Have a save run at normal priority, where its node allows it
    #[command(
        after_long_help = "Examples:\n  upperdeck job hurry 0198f0c4-0000-7000-8000-000000000000\n\nThe agent of the node has to run with --allow-hurry."
    )]
    Hurry(JobCancel),
    /// List saves, newest first
    #[command(
        after_long_help = "Examples:\n  upperdeck job ls\n  upperdeck job ls --state failed --format json | jq -r '.saves[].error.code'\n\nJSON: an object as GET /api/v1/saves has it."
    )]
    Ls(JobLs),
    /// Show or set when sessions are saved without being asked for
    #[command(after_long_help = JOB_AUTOSAVE_HELP)]
    Autosave(JobAutosave),
    /// List what was saved of a session and what each save changed, newest first
    #[command(after_long_help = JOB_TIMELINE_HELP)]
    Timeline(JobTimeline),
}

const JOB_AUTOSAVE_HELP: &str = "\
Examples:
  upperdeck job autosave
      What applies to your sessions.
  upperdeck job autosave --every 30m
      For all of them.
  upperdeck job autosave jupyter/notebook-0 --every 1h --keep 24
      For this session, and later ones with the same name.
  upperdeck job autosave jupyter/notebook-0 --off
  upperdeck job autosave --save-on-end failure
      Whatever of yours ends badly is saved.
  upperdeck job autosave jupyter/notebook-0 --default
      As its pod, you for all sessions, or the administrator say.

A session is saved so long after the end of its last save, if something changed, behind all other saves of its node.

JSON: without a session an object as GET /api/v1/autosave has it; with one an object with the session's autosave, as
GET /api/v1/sessions has it.";

const JOB_SUBMIT_HELP: &str = "\
Examples:
  upperdeck job submit jupyter/notebook-0
      With the name and tag that the manager suggests.
  upperdeck job submit --watch --message pandas jupyter/notebook-0 lab:monday
  upperdeck job submit --replace=own jupyter/notebook-0 notebook:daily
      The tag moves to the new image if an earlier save of this session
      made the old one.
  id=$(upperdeck job submit 3f2a9c51d0b7 :tuesday)

The manager prefixes NAME:TAG with registry, project and user. JSON: the object that POST /api/v1/saves returns.";

const JOB_TIMELINE_HELP: &str = "\
Examples:
  upperdeck job timeline jupyter/notebook-0
  upperdeck job timeline 3f2a9c51d0b7 --format json | \\
      jq -r '.entries[] | [.at, .changes.files, .reference] | @tsv'
  upperdeck image cp h.example/alice/lab:monday:/home/alice/a.ipynb .
      Copies one file out of a save, without unpacking the rest.
  upperdeck image diff h.example/alice/lab:monday h.example/alice/lab:tuesday
      Lists what differs between two.

The saves of earlier sessions of the same user with the same name are listed, too. BY: by hand, by itself (at an
interval), or at the end of the session. FILES, REMOVED and CHANGED count what a save adds to the one that it builds on,
or to the base; PACKAGES, what differs from the entry below. JSON: an object as GET /api/v1/sessions/{id}/timeline has it.";

#[derive(Debug, Args)]
pub(in crate::cli) struct JobTimeline {
    /// ID of a session, a unique prefix of it or its name, as in "job sessions"; a pod can state its own as
    /// UPPERDECK_SESSION
    #[arg(env = "UPPERDECK_SESSION", hide_env = true)]
    pub(in crate::cli) session: String,
    /// Also list saves whose images the service deleted because there were newer ones
    #[arg(long)]
    pub(in crate::cli) removed: bool,
    /// Maximum number of entries
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=500))]
    pub(in crate::cli) limit: u32,
    /// Continue after an earlier page, with the cursor that it ended with
    #[arg(long, value_name = "WHERE")]
    pub(in crate::cli) after: Option<String>,
    /// Output format
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(in crate::cli) format: Format,
    #[command(flatten)]
    pub(in crate::cli) server: Server,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct JobSessions {
    /// Output format
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(in crate::cli) format: Format,
    #[command(flatten)]
    pub(in crate::cli) server: Server,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct JobSubmit {
    /// ID of a session, a unique prefix of it or its name, as in "job sessions"; a pod can state its own as
    /// UPPERDECK_SESSION
    #[arg(env = "UPPERDECK_SESSION", hide_env = true)]
    pub(in crate::cli) session: String,
    /// NAME[:TAG] or :TAG [default: suggested by the manager]
    pub(in crate::cli) image: Option<String>,
    /// Whether an image that has this name and tag may be replaced: never, own (if an earlier save of the same session made
    /// it), any, or the digest of the only image that may be; without a value: any
    #[arg(long, value_name = "WHAT", num_args = 0..=1, require_equals = true, default_missing_value = "any", default_value = "never")]
    pub(in crate::cli) replace: Replace,
    /// Description of the image
    #[arg(short, long, value_name = "TEXT", help_heading = METADATA)]
    pub(in crate::cli) message: Option<String>,
    /// Set a label; may be repeated
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = key_value, help_heading = METADATA)]
    pub(in crate::cli) label: Vec<(String, String)>,
    /// Save all changes to the base, not only those since the last save
    #[arg(long, help_heading = CONTENT)]
    pub(in crate::cli) full: bool,
    /// Compression of the layer [default: as configured in the agent]
    #[arg(long, value_enum, value_name = "CODEC", help_heading = CONTENT)]
    pub(in crate::cli) compression: Option<Compression>,
    /// Exclude matching paths, e.g. 'home/*/scratch'; may be repeated
    #[arg(long, value_name = "PATTERN", help_heading = CONTENT)]
    pub(in crate::cli) exclude: Vec<String>,
    /// Also save the volume that is mounted at PATH; may be repeated
    #[arg(long, value_name = "PATH", help_heading = CONTENT)]
    pub(in crate::cli) include_volume: Vec<String>,
    /// URL that is told when the save ends, by a signed request; its origin is one that the manager permits
    #[arg(long, value_name = "URL", value_hint = clap::ValueHint::Url, help_heading = REPORT)]
    pub(in crate::cli) notify: Option<String>,
    /// Have an e-mail sent to you when the save ends, at the address that the manager knows
    #[arg(long, help_heading = REPORT)]
    pub(in crate::cli) email: bool,
    /// Follow the save to its end
    #[arg(short, long, help_heading = REPORT)]
    pub(in crate::cli) watch: bool,
    /// How to show progress, with --watch
    #[arg(long, value_enum, default_value_t = Mode::Auto, value_name = "HOW", help_heading = REPORT)]
    pub(in crate::cli) progress: Mode,
    /// Output format, without --watch
    #[arg(long, value_enum, default_value_t = Format::Table, conflicts_with = "watch", help_heading = REPORT)]
    pub(in crate::cli) format: Format,
    /// A repeated request with the same KEY is the same save [default: a new save each time]
    #[arg(long, value_name = "KEY")]
    pub(in crate::cli) idempotency_key: Option<String>,
    #[command(flatten)]
    pub(in crate::cli) server: Server,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct JobStatus {
    /// ID of the save
    pub(in crate::cli) id: uuid::Uuid,
    /// Output format
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(in crate::cli) format: Format,
    #[command(flatten)]
    pub(in crate::cli) server: Server,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct JobWatch {
    /// ID of the save
    pub(in crate::cli) id: uuid::Uuid,
    /// How to show progress
    #[arg(long, value_enum, default_value_t = Mode::Auto, value_name = "HOW")]
    pub(in crate::cli) progress: Mode,
    #[command(flatten)]
    pub(in crate::cli) server: Server,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct JobCancel {
    /// ID of the save
    pub(in crate::cli) id: uuid::Uuid,
    #[command(flatten)]
    pub(in crate::cli) server: Server,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct JobAutosave {
    /// ID of a session, a unique prefix of it or its name, as in "job sessions" [default: all of your sessions]
    pub(in crate::cli) session: Option<String>,
    /// Time from the end of a save to the next one, in minutes, hours or days, at most 7d
    #[arg(long, value_name = "DURATION", value_parser = minutes)]
    pub(in crate::cli) every: Option<u32>,
    /// Number of the latest autosaves of a session that are kept, 1 to 100 [default: as the administrator set]
    #[arg(long, value_name = "N", requires = "every", value_parser = clap::value_parser!(u32).range(1..=100))]
    pub(in crate::cli) keep: Option<u32>,
    /// Make none
    #[arg(long, conflicts_with = "every")]
    pub(in crate::cli) off: bool,
    /// Remove what you set
    #[arg(long, conflicts_with_all = ["every", "off"])]
    pub(in crate::cli) default: bool,
    /// Which of your sessions are saved when they end: never, failure (exit code other than 0, or out of memory) or always
    #[arg(long, value_name = "WHEN", conflicts_with_all = ["session", "default"])]
    pub(in crate::cli) save_on_end: Option<SaveEnded>,
    /// Output format
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(in crate::cli) format: Format,
    #[command(flatten)]
    pub(in crate::cli) server: Server,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct JobLs {
    /// Only saves in this state
    #[arg(long, value_name = "STATE", value_parser = state)]
    pub(in crate::cli) state: Option<job::State>,
    /// Only saves of this user (for administrators)
    #[arg(long = "user", value_name = "USER")]
    pub(in crate::cli) of: Option<String>,
    /// Maximum number of entries
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=500))]
    pub(in crate::cli) limit: u32,
    /// Continue after an earlier page, with the cursor that it ended with
    #[arg(long, value_name = "WHERE")]
    pub(in crate::cli) after: Option<String>,
    /// Output format
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(in crate::cli) format: Format,
    #[command(flatten)]
    pub(in crate::cli) server: Server,
}

fn minutes(text: &str) -> Result<u32, String> {
    const WEEK: u64 = 7 * 24 * 60;
    let seconds = duration(text)?.as_secs();
    let bounded = u32::try_from(seconds / 60).ok();
    bounded
        .filter(|minutes| (1..=WEEK).contains(&u64::from(*minutes)) && seconds.is_multiple_of(60))
        .ok_or_else(|| "expected whole minutes, 1m to 7d".to_owned())
}

pub(super) fn state(text: &str) -> Result<job::State, String> {
    job::State::from_name(text).ok_or_else(|| {
        let names = job::State::ALL.map(job::State::name);
        format!("expected one of {}", names.join(", "))
    })
}
