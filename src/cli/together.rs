//! `commit --all-containers`: saves all containers of a pod at one instant.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio_util::sync::CancellationToken;

use super::exit::Usage;
use super::failure::Failure;
use super::{args, options, progress, signals, write_stdout};
use crate::common::message::count;
use crate::node::container::{self, Roots};
use crate::save::event::Observer;
use crate::save::{self, Pause};
use crate::store::destination::Target;

/// Maximum number of containers of a pod. Each has a watchdog, which is started before the pod is looked at.
pub(super) const MOST: usize = 16;

/// A container's name and ID.
type Named = (String, String);

pub(super) fn commit(roots: &Roots, args: args::Commit, verbose: bool) -> anyhow::Result<()> {
    if args.pause == Pause::None {
        return Err(
            Usage("--all-containers needs a freeze: not with --pause none".to_owned()).into(),
        );
    }
    let json = args.progress == progress::Mode::Json;
    let (mode, quiet) = (args.progress, args.quiet);
    let cancel = CancellationToken::new();
    let pod = args.container.clone();
    let destination = args.destination.clone();
    // Before threads are created, because they inherit the background settings of their creator.
    let given = options::Commit::new(args, roots.host_root.as_deref(), &cancel)?;
    let containers = container::of_pod(roots, &pod).map_err(save::Error::from)?;
    if containers.len() > MOST {
        let why = format!(
            "the pod has {}, and at most {MOST} are saved at one instant",
            count(containers.len(), "container", "containers")
        );
        return Err(Usage(why).into());
    }
    let mut saves: Vec<(save::Options, Arc<dyn Observer>)> = Vec::new();
    for (name, id) in &containers {
        let mut options = given.options.clone();
        options.container.clone_from(id);
        options.destination = destination_of(&destination, name)?;
        let observer = progress::observer_of(name, mode, quiet, verbose);
        saves.push((options, observer.into()));
    }
    let observers: Vec<Arc<dyn Observer>> = saves.iter().map(|(_, it)| Arc::clone(it)).collect();
    signals::cancel_on_signals(&cancel).context("cannot listen for SIGINT and SIGTERM")?;
    let runtime = tokio::runtime::Runtime::new().context("cannot start the I/O threads")?;
    let saved = save::commit_together(saves, roots, &given.access, &cancel);
    let saved = runtime.block_on(saved);
    // A thread that is blocked by a slow disk must not delay a cancelled save.
    runtime.shutdown_timeout(Duration::from_secs(5));
    report(&containers, saved, &observers, json)
}

/// Prints what was saved. Returns the first error that is the cause of others, if there is one.
fn report(
    containers: &[Named],
    saved: Vec<Result<save::Saved, save::Error>>,
    observers: &[Arc<dyn Observer>],
    json: bool,
) -> anyhow::Result<()> {
    let mut failed: Option<anyhow::Error> = None;
    let mut is_cause = false;
    for (((name, _), saved), observer) in containers.iter().zip(saved).zip(observers) {
        match saved {
            Ok(saved) if json => drop(saved),
            Ok(saved) => write_stdout(format!("{}\n", saved.reference).as_bytes())
                .context("the image is saved, but its reference cannot be printed")?,
            Err(error) => {
                let causes = !matches!(error, save::Error::NotTogether { .. });
                let error = anyhow::Error::from(error);
                observer.event(Failure::event(&error));
                if failed.is_none() || (causes && !is_cause) {
                    failed = Some(error.context(format!("container {name}")));
                    is_cause = causes;
                }
            }
        }
    }
    failed.map_or(Ok(()), Err)
}

/// Returns the destination of a container's image: its name is the last part of the repository or directory.
fn destination_of(text: &str, container: &str) -> Result<String, anyhow::Error> {
    let tag = |tag: Option<String>| tag.map_or_else(String::new, |tag| format!(":{tag}"));
    Ok(match Target::for_saving(text).map_err(save::Error::from)? {
        Target::Registry(it) => {
            format!(
                "docker://{}/{}/{container}{}",
                it.host,
                it.repository,
                tag(it.tag)
            )
        }
        Target::Layout { dir, tag: of } => {
            let dir = dir.join(container);
            let dir = dir.to_str().context("the directory's name is not text")?;
            format!("oci:{dir}{}", tag(of))
        }
        Target::Archive { .. } => {
            let why = "--all-containers makes several images, and an archive holds one";
            return Err(Usage(why.to_owned()).into());
        }
    })
}

#[cfg(test)]
mod tests {
    use super::destination_of;

    #[test]
    fn each_container_has_a_place_of_its_own() {
        for (text, expected) in [
            ("h.example/a/nb:1", "docker://h.example/a/nb/main:1"),
            (
                "docker://h.example:5000/a",
                "docker://h.example:5000/a/main",
            ),
            ("oci:/srv/x:t", "oci:/srv/x/main:t"),
            ("oci:x", "oci:x/main"),
        ] {
            assert_eq!(destination_of(text, "main").ok().as_deref(), Some(expected));
        }
        assert!(destination_of("oci-archive:/srv/x:t", "main").is_err());
        assert!(destination_of("", "main").is_err());
    }
}
