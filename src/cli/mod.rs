//! The command line. Flags as typed (`args`) are resolved to options (`options`), one `match` dispatches to a verb, and
//! the result becomes an exit code (`exit`).

mod args;
mod bench_view;
mod config;
mod copy;
mod exit;
mod failure;
mod image;
mod image_diff;
pub(crate) mod options;
mod output;
mod packages;
mod print;
mod progress;
mod prune;
mod reading;
mod secret;
#[cfg(feature = "service")]
mod service;
mod signals;
mod squash;
mod text;
mod together;
mod validate;
mod verbs;
pub(crate) mod view;

use std::ffi::{OsStr, OsString};
use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;

use tracing_subscriber::EnvFilter;

use crate::node::confine::{self, Role};
use crate::node::container::Roots;
use args::{Cli, Global, LogFormat, Verb};
pub(crate) use exit::{Exit, Usage};
pub(crate) use failure::Failure;

/// Runs the program.
pub fn main() -> ExitCode {
    // The freeze watchdog is the same executable under another name and without flags.
    if let Some(code) = crate::node::freeze::watchdog_entry() {
        return code;
    }
    let parsed = match config::parse(as_plugin(std::env::args_os().collect())) {
        Ok(parsed) => parsed,
        Err(config::Error::Clap(error)) => {
            // Help and version are reported as errors, too. A failed write is ignored.
            let _ = error.print();
            return if error.use_stderr() {
                Exit::Usage
            } else {
                Exit::Saved
            }
            .into();
        }
        Err(config::Error::File(error)) => return fail(&error.into()),
    };
    let done = match parsed.print {
        Some(settings) => write_stdout(settings.as_bytes()).map_err(Into::into),
        None => run(parsed.cli, &parsed.descriptors),
    };
    match done {
        Ok(()) => Exit::Saved.into(),
        // A closed pipe, as in `upperdeck ps | head -1`, is not a failure.
        Err(error)
            if error
                .downcast_ref::<Stdout>()
                .is_some_and(Stdout::is_broken_pipe) =>
        {
            Exit::Saved.into()
        }
        Err(error) => fail(&error),
    }
}

/// Names under which kubectl starts this program as a plugin, and the words that they stand for.
#[cfg(feature = "service")]
const PLUGINS: [(&str, &[&str]); 2] = [
    ("kubectl-upperdeck", &["kubectl"]),
    // Flags before the verb are among the words to complete, and not flags of this command line.
    (
        "kubectl_complete-upperdeck",
        &["kubectl", "__complete", "--"],
    ),
];
#[cfg(not(feature = "service"))]
const PLUGINS: [(&str, &[&str]); 0] = [];

/// Returns the command line of this program for that of a plugin.
fn as_plugin(mut args: Vec<OsString>) -> Vec<OsString> {
    let name = args.first().map(Path::new).and_then(Path::file_name);
    let plugin = PLUGINS
        .iter()
        .find(|(plugin, _)| name == Some(OsStr::new(plugin)));
    if let Some((_, words)) = plugin {
        let words = ["upperdeck"].iter().chain(words.iter()).map(OsString::from);
        args.splice(..1, words);
    }
    args
}

fn fail(error: &anyhow::Error) -> ExitCode {
    // If stderr cannot be written to, nothing can be reported.
    let _ = writeln!(
        io::stderr(),
        "upperdeck: {}",
        crate::common::escape::message(&crate::common::message::of(error.as_ref()))
    );
    Failure::of(error).exit.into()
}

fn run(cli: Cli, descriptors: &[u32]) -> anyhow::Result<()> {
    start_log(&cli.global)?;
    let verbose = cli.global.verbose > 0 || cli.global.log.is_some();
    let roots = options::roots(&cli.global);
    let mut watchdog = None;
    if let Some(role) = role(&cli.verb) {
        confine::close_inherited(descriptors);
        if let Verb::Commit(commit) = &cli.verb
            && commit.pause != crate::save::Pause::None
        {
            // The watchdog has to be started before privileges are dropped. A failure is reported when the freeze needs
            // it.
            let count = if commit.all_containers {
                together::MOST
            } else {
                1
            };
            watchdog = crate::node::freeze::start_standby(count).ok();
        }
        // Before the first thread is created, so that all threads inherit the reduced privileges.
        confine::apply(role);
    }
    let done = dispatch(cli.verb, &roots, verbose);
    drop(watchdog);
    done
}

/// Returns the role that determines which privileges the process keeps, or `None` for verbs that read no untrusted
/// data.
fn role(verb: &Verb) -> Option<Role> {
    Some(match verb {
        Verb::Ps(_) | Verb::Inspect(_) | Verb::Diff(_) => Role::Inspect,
        Verb::Layer(_) => Role::Layer,
        Verb::Commit(_) | Verb::Bench(_) => Role::Commit,
        Verb::Validate(args) if validate::reads_container(args) => Role::Commit,
        #[cfg(feature = "service")]
        Verb::Service(verb) => return service::role(verb),
        Verb::Image(_)
        | Verb::Validate(_)
        | Verb::Demo
        | Verb::Completions { .. }
        | Verb::Man { .. } => return None,
    })
}

fn dispatch(verb: Verb, roots: &Roots, verbose: bool) -> anyhow::Result<()> {
    match verb {
        Verb::Ps(args) => verbs::ps(roots, &args),
        Verb::Inspect(args) => verbs::inspect(roots, &args),
        Verb::Diff(args) => verbs::diff(roots, &args),
        Verb::Commit(args) => verbs::commit(roots, *args, verbose),
        Verb::Layer(args) => verbs::layer(&args),
        Verb::Image(args::Image::Ls(args)) => image::ls(&args),
        Verb::Image(args::Image::Rm(args)) => image::rm(&args),
        Verb::Image(args::Image::Prune(args)) => prune::run(&args),
        Verb::Image(args::Image::Tag(args)) => image::tag(&args),
        Verb::Image(args::Image::Cp(args)) => copy::run(&args),
        Verb::Image(args::Image::Diff(args)) => image_diff::run(&args),
        Verb::Image(args::Image::Squash(args)) => squash::run(&args),
        Verb::Validate(args) => validate::run(roots, &args),
        Verb::Bench(args) => verbs::bench(roots, *args),
        #[cfg(feature = "service")]
        Verb::Service(verb) => service::run(verb, roots, verbose),
        Verb::Demo => verbs::demo(),
        Verb::Completions { shell } => verbs::completions(shell),
        Verb::Man { dir } => verbs::man(dir.as_deref()),
    }
}

/// Starts logging to stderr. Dependencies log only if requested.
fn start_log(global: &Global) -> Result<(), Usage> {
    let filter = match (&global.log, global.verbose) {
        (Some(filter), 0) => filter.as_str(),
        // That a manager or an agent is ready is also said without --log.
        (None, 0) => "warn,kube_client=off,upperdeck::service::ready=info",
        // The crate logs each failed request as an error, without a limit; this program says what follows from it.
        (_, 1) => "warn,kube_client=off,upperdeck=info",
        (_, 2) => "warn,kube_client=off,upperdeck=debug",
        _ => "debug,upperdeck=trace",
    };
    let filter =
        EnvFilter::try_new(filter).map_err(|error| Usage(format!("--log {filter:?}: {error}")))?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal());
    // Fails only if a subscriber has been set already (by a test), which is then used.
    let _ = match global.log_format {
        LogFormat::Text => log.try_init(),
        LogFormat::Json => log.json().flatten_event(true).try_init(),
    };
    Ok(())
}

/// An error of writing the result to stdout. It has a type of its own to distinguish a closed pipe there from one
/// elsewhere, such as a registry's.
#[derive(Debug, thiserror::Error)]
#[error("cannot write to stdout: {0}")]
struct Stdout(#[source] io::Error);

impl Stdout {
    fn is_broken_pipe(&self) -> bool {
        self.0.kind() == io::ErrorKind::BrokenPipe
    }
}

fn write_stdout(bytes: &[u8]) -> Result<(), Stdout> {
    let mut stdout = io::stdout().lock();
    stdout
        .write_all(bytes)
        .and_then(|()| stdout.flush())
        .map_err(Stdout)
}
