//! What each verb does: options in, result on stdout. The work is in the modules that they call.

use std::path::Path;

use anyhow::Context;
use clap::CommandFactory;

use super::args::{self, Cli, Format};
use super::exit::{Failure, Usage};
use super::options::{self, StateRoots};
use super::{progress, signals, view, write_stdout};
use crate::cancel::Cancel;
use crate::job::{Event, Observer};

/// WIRE HERE: for a verb whose module is not there yet.
fn not_yet(verb: &str) -> anyhow::Error {
    anyhow::anyhow!("'{verb}' is not part of this build")
}

/// Prints a result: JSON for programs, else what `table` makes of it.
fn print<T: serde::Serialize + ?Sized>(
    format: Format,
    result: &T,
    table: impl FnOnce(&T) -> String,
) -> anyhow::Result<()> {
    let text = match format {
        Format::Table => table(result),
        Format::Json => serde_json::to_string_pretty(result)? + "\n",
    };
    Ok(write_stdout(text.as_bytes())?)
}

pub(super) fn ps(roots: &StateRoots, args: &args::Ps) -> anyhow::Result<()> {
    // WIRE HERE: container::list(roots), then ContainerView::new with the allocated bytes of each upper.
    let containers: Vec<view::ContainerView> = list(roots)?;
    print(args.format, containers.as_slice(), |containers| {
        view::ps_table(containers, args.no_trunc)
    })
}

fn list(_roots: &StateRoots) -> anyhow::Result<Vec<view::ContainerView>> {
    Err(not_yet("ps"))
}

pub(super) fn inspect(roots: &StateRoots, args: &args::Inspect) -> anyhow::Result<()> {
    let view = look(roots, &args.container, args.base.as_deref())?;
    print(args.format, &view, view::InspectView::table)
}

/// WIRE HERE: container::find, container::prove_base (its error as text), counts from the scan.
fn look(
    _roots: &StateRoots,
    _container: &str,
    _base: Option<&str>,
) -> anyhow::Result<view::InspectView> {
    Err(not_yet("inspect"))
}

pub(super) fn diff(roots: &StateRoots, args: &args::Diff) -> anyhow::Result<()> {
    let lines = changes(roots, &args.container)?;
    print(args.format, lines.as_slice(), view::diff_table)
}

/// WIRE HERE: container::find, scan; a whiteout is D, an entry that the base has is C, any other A.
fn changes(_roots: &StateRoots, _container: &str) -> anyhow::Result<Vec<view::DiffView>> {
    Err(not_yet("diff"))
}

/// Saves, tells the observer how it ended, and prints the reference where the observer does not.
pub(super) fn commit(roots: &StateRoots, args: args::Commit, verbose: bool) -> anyhow::Result<()> {
    let observer = progress::observer(args.progress, args.quiet, verbose);
    let json = args.progress == progress::Mode::Json;
    let outcome = commit_with(roots, args, observer.as_ref());
    match outcome {
        Ok(saved) => {
            let line = format!("{}\n", saved.reference);
            observer.event(Event::Saved {
                reference: saved.reference,
                digest: saved.digest,
            });
            drop(observer);
            if !json {
                write_stdout(line.as_bytes())?;
            }
            Ok(())
        }
        Err(error) => {
            let failure = Failure::of(&error);
            observer.event(Event::Failed {
                exit: failure.exit.code(),
                code: failure.code.to_owned(),
                message: format!("{error:#}"),
                retryable: failure.retryable,
            });
            Err(error)
        }
    }
}

/// What `commit` prints.
struct Saved {
    reference: String,
    digest: crate::digest::Digest,
}

fn commit_with(
    roots: &StateRoots,
    args: args::Commit,
    observer: &dyn Observer,
) -> anyhow::Result<Saved> {
    let options = options::Commit::new(args)?;
    let cancel = Cancel::default();
    signals::cancel_on_signals(&cancel).context("cannot listen for SIGINT and SIGTERM")?;
    save(roots, &options, &cancel, observer)
}

/// WIRE HERE: commit::commit(roots, &options.options, access, limits, cancel, observer). It must not send `Saved` or
/// `Failed` itself.
fn save(
    _: &StateRoots,
    _: &options::Commit,
    _: &Cancel,
    _: &dyn Observer,
) -> anyhow::Result<Saved> {
    Err(not_yet("commit"))
}

/// WIRE HERE: scan, layer::write to `args.output` (a temporary name beside it, then renamed), descriptor and diffID as
/// JSON on stdout.
pub(super) fn layer(args: &args::Layer) -> anyhow::Result<()> {
    options::level(&args.content)?;
    let _limits = options::Limits::new(&args.content);
    let _ = (&args.upper, &args.lower, args.userxattr, &args.output);
    Err(not_yet("layer"))
}

/// WIRE HERE: spec.
pub(super) fn validate(args: &args::Validate) -> anyhow::Result<()> {
    let _ = (&args.subject, &args.against);
    Err(not_yet("validate"))
}

/// WIRE HERE: demo.
pub(super) fn demo() -> anyhow::Result<()> {
    Err(not_yet("demo"))
}

pub(super) fn completions(shell: clap_complete::Shell) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "upperdeck", &mut script);
    Ok(write_stdout(&script)?)
}

pub(super) fn man(dir: Option<&Path>) -> anyhow::Result<()> {
    let Some(dir) = dir else {
        let mut page = Vec::new();
        clap_mangen::Man::new(Cli::command()).render(&mut page)?;
        return Ok(write_stdout(&page)?);
    };
    if !dir.is_dir() {
        return Err(Usage(format!("{} is not a directory", super::text::path(dir))).into());
    }
    clap_mangen::generate_to(Cli::command(), dir)
        .with_context(|| format!("cannot write to {}", super::text::path(dir)))
}
