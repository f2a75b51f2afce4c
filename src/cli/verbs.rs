//! The verbs: each takes options and prints its result to stdout. The work is done in the modules that they call.

use std::ffi::OsStr;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio_util::sync::CancellationToken;

use super::args;
use super::exit::Usage;
use super::failure::Failure;
use super::print::print;
use super::{
    bench_view, options, output, packages, progress, signals, together, view, write_stdout,
};
use crate::common::failure::FailureKind;
use crate::image::manifest::Start;
use crate::layer::scan::{self, Kind, Scan};
use crate::layer::{self, Plan};
use crate::node::container::{self, Roots, VolumeRules};
use crate::node::overlay::xattr::Namespace;
use crate::save;
use crate::save::event::Observer;

pub(super) fn ps(roots: &Roots, args: &args::Ps) -> anyhow::Result<()> {
    let mut listing = container::list(roots);
    if args.all {
        let ended = container::list_ended(roots, true, usize::MAX);
        listing.containers.extend(ended.containers);
        listing.problems.extend(ended.problems);
    }
    let (denied, others): (Vec<_>, Vec<_>) =
        listing.problems.into_iter().partition(|p| p.permission);
    for problem in &others {
        tracing::warn!("{problem}");
    }
    let views = listing.containers.iter().map(|container| {
        let usage = scan::usage(&container.overlay.upper).ok();
        view::ContainerView::new(container, usage.map(|usage| usage.bytes))
    });
    let views: Vec<_> = views.collect();
    print(args.format, views.as_slice(), |containers| {
        view::ps_table(containers, args.no_trunc, args.all)
    })?;
    if denied.is_empty() {
        return Ok(());
    }
    let paths = denied.into_iter().map(|problem| problem.path).collect();
    Err(save::Error::from(container::Error::Unseen { paths }).into())
}

pub(super) fn inspect(roots: &Roots, args: &args::Inspect) -> anyhow::Result<()> {
    if args.packages && packages::is_image(&args.container) {
        return packages::image(args);
    }
    if args.since.is_some() {
        return Err(Usage("--since compares images; the first argument is none".to_owned()).into());
    }
    // Before threads are created, because they inherit the cgroup and priority of their creator.
    let host_root = roots.host_root.as_deref();
    let _background = options::background(args.background.floor(), &args.memory, host_root);
    let container = container::find_any(roots, &args.container, args.attempt.into())
        .map_err(save::Error::from)?;
    let base = container::prove_base(roots, &container).map_err(|error| error.to_string());
    let usage = scan::usage(&container.overlay.upper).ok();
    let mut view = view::InspectView::new(
        &container,
        base.as_ref().map_err(Clone::clone),
        usage.map(|usage| usage.bytes),
        usage.map(|usage| usage.entries),
    );
    let rules = options::rules(&args.choice);
    let cancel = CancellationToken::new();
    let mut scans = None;
    if let Ok(base) = &base {
        let state_dir = options::state_dir(args.state.state_dir.clone(), host_root);
        let question = save::NextSaveOptions {
            rules: &rules,
            volumes: &args.include_volume,
            volume_rules: &VolumeRules::default(),
            timestamp: args.choice.timestamp,
            state_dir: state_dir.as_deref(),
            max_layers: args.state.max_layers.into(),
            full: args.state.full,
            jobs: save::cores(),
        };
        match save::next_save(roots, &container, base, &question, &cancel) {
            Ok((next, found)) => {
                view.saved_next(next, &args.include_volume);
                scans = Some(found);
            }
            Err(error) if error.kind() == FailureKind::Usage => return Err(error.into()),
            // Only the next save would fail with this error; the rest can still be shown.
            Err(error) => view.next_save_error = Some(error.to_string()),
        }
    }
    if !args.packages {
        return print(args.format, &view, view::InspectView::table);
    }
    let scans = match scans {
        Some(scans) => scans,
        None => vec![Arc::new(rules.scan(
            &container,
            &[],
            None,
            save::cores(),
            &cancel,
        )?)],
    };
    let start = base
        .ok()
        .and_then(|base| Start::of(&base.config, &[]).ok())
        .unwrap_or_default();
    view.packages = Some(save::packages::container::asked(
        &container, &start, &scans, &cancel,
    )?);
    print(args.format, &view, |view| {
        view.packages
            .as_ref()
            .map_or_else(String::new, packages::table)
    })
}

/// Lists changes: D for whiteouts, C for paths that exist in the base, A for others.
pub(super) fn diff(roots: &Roots, args: &args::Diff) -> anyhow::Result<()> {
    let container = container::find_any(roots, &args.container, args.attempt.into())
        .map_err(save::Error::from)?;
    let scan = save::Rules::default().scan(
        &container,
        &[],
        None,
        save::cores(),
        &CancellationToken::new(),
    )?;
    let lines = scan.emitted().map(|index| {
        let entry = scan.entry(index);
        let change = match entry.kind {
            Kind::Whiteout | Kind::Opaque => view::Change::D,
            _ if index == 0 || scan.in_base(&entry) => view::Change::C,
            _ => view::Change::A,
        };
        view::DiffView::new(change, Path::new(OsStr::from_bytes(&scan.path(index))))
    });
    let lines: Vec<_> = lines.collect();
    print(args.format, lines.as_slice(), view::diff_table)
}

/// Saves, reports a failure to the observer, and prints the reference unless the observer does.
pub(super) fn commit(roots: &Roots, args: args::Commit, verbose: bool) -> anyhow::Result<()> {
    if args.all_containers {
        return together::commit(roots, args, verbose);
    }
    let observer: Arc<dyn Observer> = progress::observer(args.progress, args.quiet, verbose).into();
    let json = args.progress == progress::Mode::Json;
    let outcome = commit_with(roots, args, Arc::clone(&observer));
    match outcome {
        Ok(saved) => {
            let line = format!("{}\n", saved.reference);
            drop(observer);
            if !json {
                write_stdout(line.as_bytes())
                    .context("the image is saved, but its reference cannot be printed")?;
            }
            Ok(())
        }
        Err(error) => {
            observer.event(Failure::event(&error));
            Err(error)
        }
    }
}

fn commit_with(
    roots: &Roots,
    args: args::Commit,
    observer: Arc<dyn Observer>,
) -> anyhow::Result<save::Saved> {
    let cancel = CancellationToken::new();
    // Before threads are created, because they inherit the background settings of their creator.
    let options = options::Commit::new(args, roots.host_root.as_deref(), &cancel)?;
    signals::cancel_on_signals(&cancel).context("cannot listen for SIGINT and SIGTERM")?;
    let runtime = tokio::runtime::Runtime::new().context("cannot start the I/O threads")?;
    let saved = runtime.block_on(save::commit(
        &options.options,
        roots.clone(),
        options.access,
        observer,
        &cancel,
    ));
    // A thread that is blocked by a slow disk must not delay a cancelled save.
    runtime.shutdown_timeout(Duration::from_secs(5));
    Ok(saved?)
}

/// Creates a layer from directories.
pub(super) fn layer(args: &args::Layer) -> anyhow::Result<()> {
    let level = options::level(&args.content)?;
    let rules = options::rules(&args.content.choice);
    let exclusions = rules.exclusions(&[]).map_err(save::Error::from)?;
    let cancel = CancellationToken::new();
    signals::cancel_on_signals(&cancel).context("cannot listen for SIGINT and SIGTERM")?;
    let jobs = args.content.jobs.map_or_else(save::cores, usize::from);
    // Symbolic links are resolved, because they are not followed later. Missing paths are reported when they are
    // opened.
    let resolved = |path: &PathBuf| path.canonicalize().unwrap_or_else(|_| path.clone());
    let roots = scan::Roots {
        upper: resolved(&args.upper),
        lowers: args.lower.iter().map(resolved).collect(),
        data_only: Vec::new(),
        id_mapped: Vec::new(),
        lowers_known: !args.lower.is_empty(),
        namespace: if args.userxattr {
            Namespace::User
        } else {
            Namespace::Trusted
        },
        volume: None,
    };
    let scan = scan::Options {
        jobs,
        uid_map: &[],
        gid_map: &[],
        exclusions: &exclusions,
        caps: rules.caps,
        runtime_root_mode: None,
        cancel: &cancel,
    };
    let scan = Scan::new(&roots, &scan).map_err(save::Error::from)?;
    let plan = Plan::new(Arc::new(scan), args.content.choice.timestamp);
    let options = layer::Options {
        compression: args.content.compression,
        level,
        jobs,
        cancel: &cancel,
    };
    let made = output::write(&args.output, args.output_mode, |file| {
        let sink = |bytes: bytes::Bytes| file.write_all(&bytes);
        let made = layer::stream::write(&plan, options, sink, &|_| {}).map_err(save::Error::from);
        made.with_context(|| format!("cannot make {}", super::text::path(&args.output)))
    })?;
    for file in &made.unstable {
        tracing::warn!(path = file.path, what = ?file.what, "changed while it was read");
    }
    let mut json = serde_json::json!({
        "mediaType": made.media_type,
        "digest": made.digest,
        "size": made.size,
        "diffID": made.diff_id,
        "tarSize": made.tar_size,
        "entries": made.entries,
    });
    if let Some(place) = made.index {
        json["annotations"] = serde_json::json!({ layer::index::ANNOTATION: place.to_string() });
    }
    write_stdout(format!("{json}\n").as_bytes())
        .context("the layer is written, but its descriptor cannot be printed")
}

pub(super) fn bench(roots: &Roots, args: args::Bench) -> anyhow::Result<()> {
    let format = args.format;
    let options = options::bench(args)?;
    let cancel = CancellationToken::new();
    signals::cancel_on_signals(&cancel).context("cannot listen for SIGINT and SIGTERM")?;
    let line = progress::StatusLine::new();
    let report = crate::bench::run(&options, roots, &cancel, &|what| line.show(what))?;
    drop(line);
    print(format, &report, bench_view::bench_table)
}

pub(super) fn demo() -> anyhow::Result<()> {
    let cancel = CancellationToken::new();
    signals::cancel_on_signals(&cancel).context("cannot listen for SIGINT and SIGTERM")?;
    Ok(crate::demo::run(&mut std::io::stdout(), &cancel)?)
}

pub(super) fn completions(shell: clap_complete::Shell) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(
        shell,
        &mut super::config::command(),
        "upperdeck",
        &mut script,
    );
    Ok(write_stdout(&script)?)
}

pub(super) fn man(dir: Option<&Path>) -> anyhow::Result<()> {
    let Some(dir) = dir else {
        let mut page = Vec::new();
        clap_mangen::Man::new(super::config::command()).render(&mut page)?;
        return Ok(write_stdout(&page)?);
    };
    if dir.exists() && !dir.is_dir() {
        return Err(Usage(format!("{} is not a directory", super::text::path(dir))).into());
    }
    // A minimal system has no directory for local man pages.
    std::fs::create_dir_all(dir)
        .with_context(|| format!("cannot create {}", super::text::path(dir)))?;
    clap_mangen::generate_to(super::config::command(), dir)
        .with_context(|| format!("cannot write to {}", super::text::path(dir)))
}
