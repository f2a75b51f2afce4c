//! `setup`: says each step of the preparation of a machine when it is done.

use crate::cli::args::Format;
use crate::cli::args::service::{Setup, SetupPurpose};
use crate::cli::exit::Usage;
use crate::cli::print::print;
use crate::cli::write_stdout;
use crate::service::agent;
use crate::service::setup::{self, Action, Options, Purpose, State};

pub(super) fn setup(args: &Setup) -> anyhow::Result<()> {
    let purpose = match args.purpose {
        SetupPurpose::Manager if args.node.is_some() || args.master_key.is_some() => {
            return Err(Usage("--node and --master-key are for an agent".to_owned()).into());
        }
        SetupPurpose::Manager => Purpose::Manager,
        SetupPurpose::Agent => Purpose::Agent {
            node: args.node.clone().unwrap_or_else(agent::host_name),
            master_key: args.master_key.clone(),
        },
    };
    let options = Options {
        purpose,
        root: args.root.clone(),
        dry_run: args.dry_run,
    };
    if args.format == Format::Json {
        let report = setup::run(&options, |_| ())?;
        return print(args.format, &report, |_| String::new());
    }
    // Lines are written while the work goes on, because it may fail in the middle.
    let mut written = Ok(());
    let mut say = |action: &Action| {
        if action.state != State::Missing && written.is_ok() {
            let word = word(action.state, args.dry_run);
            written = write_stdout(format!("{word:<14} {action}\n").as_bytes());
        }
    };
    let report = setup::run(&options, &mut say)?;
    written?;
    let mut rest = String::new();
    for action in &report.actions {
        if action.state == State::Missing {
            rest.push_str(&format!("{:<14} {action}\n", "missing"));
        }
    }
    if !args.dry_run {
        rest.push_str(&format!(
            "Then edit /etc/upperdeck/upperdeck.toml, and check it with 'upperdeck doctor --for {}'.\n",
            report.purpose
        ));
    }
    Ok(write_stdout(rest.as_bytes())?)
}

fn word(state: State, dry_run: bool) -> &'static str {
    match (state, dry_run) {
        (State::Created, false) => "created",
        (State::Created, true) => "would create",
        (State::Changed, false) => "changed",
        (State::Changed, true) => "would change",
        (State::Unchanged, _) => "unchanged",
        (State::Missing, _) => "missing",
    }
}
