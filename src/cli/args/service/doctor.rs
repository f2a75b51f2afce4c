//! Flags of `doctor`. They include those of the verb that it checks, so that the same settings can be passed.

use std::time::Duration;

use clap::{Args, ValueHint};

use super::{Push, Queue, Serve, Settings, Work};
use crate::cli::args::shared::{Format, REGISTRY, REPORT};
use crate::cli::args::value::duration;
use crate::service::doctor::Purpose;

pub(super) const DOCTOR_HELP: &str = "\
Examples:
  upperdeck doctor
      Check whether the current user can save containers on this machine.
  upperdeck doctor registry.example.org/alice/notebook --creds-file robot
      Also check whether that registry accepts them.
  upperdeck doctor --for agent --config /etc/upperdeck/upperdeck.toml
  upperdeck doctor --for manager --strict --format json

It accepts the flags, variables and settings file of the command that it checks for ([agent] and [manager] in the file),
and checks that configuration. Checks run in parallel, each with the limit --timeout. Nothing is changed: a cgroup is
created, frozen and removed; an upload is started and cancelled; the keys that its Redis script creates are removed by
the same script; a record is neither created nor migrated.

JSON: one object
  purpose    commit, agent or manager
  state      the worst of all
  findings   [{check, state, found, advice}]
             state    ok, skipped (not applicable, or cannot be checked), warning (works, but not as well or as safely as
                      it could) or failed
             advice   what to do, or null

Exit codes: 0 if nothing failed, 1 if a check failed (with --strict, also for warnings), 2 if the settings cannot be
read.";

/// `doctor`.
#[derive(Debug, Args)]
pub(in crate::cli) struct Doctor {
    /// For commit: the destination of the image
    pub(in crate::cli) destination: Option<String>,
    /// The purpose to check the machine for
    #[arg(long = "for", value_enum, value_name = "VERB", default_value_t = Purpose::Commit, help_heading = REPORT)]
    pub(in crate::cli) purpose: Purpose,
    /// Output format
    #[arg(long, value_enum, default_value_t = Format::Table, help_heading = REPORT)]
    pub(in crate::cli) format: Format,
    /// Exit with 1 for warnings as well
    #[arg(long, help_heading = REPORT)]
    pub(in crate::cli) strict: bool,
    /// Time limit for each check
    #[arg(long = "check-timeout", value_name = "DURATION", value_parser = duration, default_value = "10s", help_heading = REPORT)]
    pub(in crate::cli) check_timeout: Duration,
    #[command(flatten)]
    pub(in crate::cli) settings: Settings,
    #[command(flatten)]
    pub(in crate::cli) queue: Queue,
    /// For a manager: its --target
    #[arg(long, value_name = "TEMPLATE", help_heading = REGISTRY)]
    pub(in crate::cli) target: Option<String>,
    /// For an agent: its --allow-target; may be repeated
    #[arg(long, value_name = "PREFIX", value_hint = ValueHint::Other, help_heading = REGISTRY)]
    pub(in crate::cli) allow: Vec<String>,
    #[command(flatten)]
    pub(in crate::cli) serve: Serve,
    #[command(flatten)]
    pub(in crate::cli) work: Work,
    #[command(flatten)]
    pub(in crate::cli) push: Push,
}
