//! Flags of `job`, which saves through a manager.

#![allow(
    rustdoc::broken_intra_doc_links,
    rustdoc::invalid_html_tags,
    reason = "the comments are what --help prints: brackets there mean that a part may be left out"
)]

use clap::{Args, Subcommand};

use crate::cli::args::shared::{CONTENT, Format, METADATA, REPORT, Server};
use crate::cli::args::value::key_value;
use crate::cli::progress::Mode;
use crate::save::Compression;
use crate::service::job;

pub(super) const JOB_HELP: &str = "\
Examples:
  upperdeck job sessions
  upperdeck job submit --watch jupyter/notebook-0 notebook:monday
  upperdeck job ls --state running
  upperdeck job watch 0198f0c4-0000-7000-8000-000000000000
  upperdeck job submit --server https://save.example.org --token-file ~/.upperdeck-token --message 'with pandas' 3f2a9c51d0b7

The manager is named by --server or UPPERDECK_SERVER; without either it is the 'upperdeck up' of this machine.";

#[derive(Debug, Subcommand)]
pub(in crate::cli) enum Job {
    /// List the sessions that may be saved
    #[command(
        after_long_help = "Examples:\n  upperdeck job sessions\n  upperdeck job sessions --format json | jq -r '.[].id'\n\nJSON: an array of objects as GET /api/v1/sessions has them."
    )]
    Sessions(JobSessions),
    /// Ask for a save; prints its ID
    #[command(after_long_help = JOB_SUBMIT_HELP)]
    Submit(Box<JobSubmit>),
    /// Show what a save is doing, or what became of it
    #[command(
        after_long_help = "Examples:\n  upperdeck job status 0198f0c4-0000-7000-8000-000000000000\n\nJSON: an object as GET /api/v1/saves/{id} has it."
    )]
    Status(JobStatus),
    /// Follow a save to its end, with the bar of 'commit'; prints the reference
    #[command(
        after_long_help = "Examples:\n  upperdeck job watch 0198f0c4-0000-7000-8000-000000000000\n\nThe exit code is that of the save, as of 'commit'. A manager that is started again is waited for."
    )]
    Watch(JobWatch),
    /// End a save that waits or runs; nothing is left in the registry under its tag
    #[command(
        after_long_help = "Examples:\n  upperdeck job cancel 0198f0c4-0000-7000-8000-000000000000"
    )]
    Cancel(JobCancel),
    /// List saves, the latest first
    #[command(
        after_long_help = "Examples:\n  upperdeck job ls\n  upperdeck job ls --state failed --format json | jq -r '.saves[].error.code'\n\nJSON: an object as GET /api/v1/saves has it."
    )]
    Ls(JobLs),
}

const JOB_SUBMIT_HELP: &str = "\
Examples:
  upperdeck job submit jupyter/notebook-0
      Under the name and tag that the manager suggests.
  upperdeck job submit --watch --message 'with pandas' jupyter/notebook-0 notebook:monday
  id=$(upperdeck job submit 3f2a9c51d0b7 :tuesday)

The manager puts registry, project and user in front of NAME:TAG. JSON: an object as POST /api/v1/saves answers.";

#[derive(Debug, Args)]
pub(in crate::cli) struct JobSessions {
    /// How to print
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(in crate::cli) format: Format,
    #[command(flatten)]
    pub(in crate::cli) server: Server,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct JobSubmit {
    /// A session's ID or a unique beginning of it, or NAMESPACE/POD[/CONTAINER]
    pub(in crate::cli) session: String,
    /// NAME[:TAG] or :TAG [default: what the manager suggests]
    pub(in crate::cli) image: Option<String>,
    /// What it is, in your words
    #[arg(short, long, value_name = "TEXT", help_heading = METADATA)]
    pub(in crate::cli) message: Option<String>,
    /// Set a label; may be repeated
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = key_value, help_heading = METADATA)]
    pub(in crate::cli) label: Vec<(String, String)>,
    /// Save everything anew, not only what changed since the last save
    #[arg(long, help_heading = CONTENT)]
    pub(in crate::cli) full: bool,
    /// How the layer is compressed [default: as the agent is configured]
    #[arg(long, value_enum, value_name = "CODEC", help_heading = CONTENT)]
    pub(in crate::cli) compression: Option<Compression>,
    /// Leave out what matches, e.g. 'home/*/scratch'; may be repeated
    #[arg(long, value_name = "PATTERN", help_heading = CONTENT)]
    pub(in crate::cli) exclude: Vec<String>,
    /// Save the data of the volume that is mounted at PATH, too; may be repeated
    #[arg(long, value_name = "PATH", help_heading = CONTENT)]
    pub(in crate::cli) include_volume: Vec<String>,
    /// Follow it to its end
    #[arg(short, long, help_heading = REPORT)]
    pub(in crate::cli) watch: bool,
    /// How to show what happens, with --watch
    #[arg(long, value_enum, default_value_t = Mode::Auto, value_name = "HOW", help_heading = REPORT)]
    pub(in crate::cli) progress: Mode,
    /// How to print, without --watch
    #[arg(long, value_enum, default_value_t = Format::Table, conflicts_with = "watch", help_heading = REPORT)]
    pub(in crate::cli) format: Format,
    /// Said again with the same KEY it is the same save [default: another one each time]
    #[arg(long, value_name = "KEY")]
    pub(in crate::cli) idempotency_key: Option<String>,
    #[command(flatten)]
    pub(in crate::cli) server: Server,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct JobStatus {
    /// The save's ID
    pub(in crate::cli) id: uuid::Uuid,
    /// How to print
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(in crate::cli) format: Format,
    #[command(flatten)]
    pub(in crate::cli) server: Server,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct JobWatch {
    /// The save's ID
    pub(in crate::cli) id: uuid::Uuid,
    /// How to show what happens
    #[arg(long, value_enum, default_value_t = Mode::Auto, value_name = "HOW")]
    pub(in crate::cli) progress: Mode,
    #[command(flatten)]
    pub(in crate::cli) server: Server,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct JobCancel {
    /// The save's ID
    pub(in crate::cli) id: uuid::Uuid,
    #[command(flatten)]
    pub(in crate::cli) server: Server,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct JobLs {
    /// Only those in this state
    #[arg(long, value_name = "STATE", value_parser = state)]
    pub(in crate::cli) state: Option<job::State>,
    /// Only this user's (administrators see all)
    #[arg(long = "user", value_name = "USER")]
    pub(in crate::cli) of: Option<String>,
    /// At most so many
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=500))]
    pub(in crate::cli) limit: u32,
    /// Those after the ones already seen, as the list before said
    #[arg(long, value_name = "WHERE")]
    pub(in crate::cli) after: Option<String>,
    /// How to print
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(in crate::cli) format: Format,
    #[command(flatten)]
    pub(in crate::cli) server: Server,
}

pub(super) fn state(text: &str) -> Result<job::State, String> {
    job::State::from_name(text).ok_or_else(|| {
        let names = job::State::ALL.map(job::State::name);
        format!("expected one of {}", names.join(", "))
    })
}
