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
      Whether this machine can save containers, as the user who asks.
  upperdeck doctor registry.example.org/alice/notebook --creds-file robot
      And whether that registry would take them.
  upperdeck doctor --for agent --config /etc/upperdeck/upperdeck.toml
  upperdeck doctor --for manager --strict --format json

It takes the flags, variables and settings file of the verb that it is for ([agent], [manager] in the file), so what it
says is true of that very configuration. All checks run side by side, each at most as long as --timeout. Nothing is
changed: a cgroup is made, frozen and taken away; an upload is begun and cancelled; keys of its own in Redis are gone at
the end of the script that makes them; a record is not made and not brought up to this version.

JSON: one object
  purpose    commit, agent or manager
  state      the worst of all
  findings   [{check, state, found, advice}]
             state    ok, skipped (cannot be looked at, or does not matter), warning (works, and less well or less safely
                      than it could) or failed
             advice   what to do, or null

Exit code: 0 when nothing failed, 1 when something did (with --strict also when there are warnings), 2 when the settings
cannot be read.";

/// `doctor`.
#[derive(Debug, Args)]
pub(in crate::cli) struct Doctor {
    /// For commit: where the image would go
    pub(in crate::cli) destination: Option<String>,
    /// What the machine is to do
    #[arg(long = "for", value_enum, value_name = "VERB", default_value_t = Purpose::Commit, help_heading = REPORT)]
    pub(in crate::cli) purpose: Purpose,
    /// How to print
    #[arg(long, value_enum, default_value_t = Format::Table, help_heading = REPORT)]
    pub(in crate::cli) format: Format,
    /// Exit with 1 for warnings, too
    #[arg(long, help_heading = REPORT)]
    pub(in crate::cli) strict: bool,
    /// The longest that one check may take
    #[arg(long = "check-timeout", value_name = "DURATION", value_parser = duration, default_value = "10s", help_heading = REPORT)]
    pub(in crate::cli) check_timeout: Duration,
    #[command(flatten)]
    pub(in crate::cli) settings: Settings,
    #[command(flatten)]
    pub(in crate::cli) queue: Queue,
    /// For a manager: where images go, as its flag of that name
    #[arg(long, value_name = "TEMPLATE", help_heading = REGISTRY)]
    pub(in crate::cli) target: Option<String>,
    /// For an agent: where images may go, as its flag of that name; may be repeated
    #[arg(long, value_name = "PREFIX", value_hint = ValueHint::Other, help_heading = REGISTRY)]
    pub(in crate::cli) allow: Vec<String>,
    #[command(flatten)]
    pub(in crate::cli) serve: Serve,
    #[command(flatten)]
    pub(in crate::cli) work: Work,
    #[command(flatten)]
    pub(in crate::cli) push: Push,
}
