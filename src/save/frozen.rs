//! Freezes the container, and waits for another save of this node that has it frozen.

use std::time::Duration;

use super::{Context, Error, Options, Pause};
use crate::common::waits::WaitReason;
use crate::node::container::{Container, Running};
use crate::node::freeze::{self, Frozen};

/// Interval of looks for the end of another save's freeze.
pub(super) const TURN: Duration = Duration::from_millis(50);

/// A frozen container. Freezing and thawing may take seconds, for which the other tasks of the async runtime do not
/// wait.
pub(super) struct FrozenGuard {
    pub(super) frozen: Option<Frozen>,
    /// Kept until the container is thawed, so that no other save of this node takes the freeze for the runtime's.
    pub(super) _claim: Option<freeze::Claim>,
}

impl FrozenGuard {
    pub(super) fn was_frozen(&self) -> bool {
        self.frozen.as_ref().is_some_and(Frozen::was_frozen)
    }

    pub(super) fn thaw(mut self) -> Result<Duration, Error> {
        let frozen = self.frozen.take().ok_or(Error::Worker)?;
        Ok(run_in_place(|| frozen.thaw())?)
    }
}

impl Drop for FrozenGuard {
    fn drop(&mut self) {
        if let Some(frozen) = self.frozen.take() {
            run_in_place(|| drop(frozen));
        }
    }
}

/// Runs blocking work in place, so that it is complete on return. The other tasks of this thread are moved to another
/// thread.
pub(super) fn run_in_place<T>(work: impl FnOnce() -> T) -> T {
    use tokio::runtime::{Handle, RuntimeFlavor};
    match Handle::try_current().map(|handle| handle.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(work),
        _ => work(),
    }
}

/// Waits until no other save of this node has the container frozen, and freezes it.
pub(super) async fn freeze(
    context: &Context,
    options: &Options,
    container: &Container,
) -> Result<Option<FrozenGuard>, Error> {
    if options.pause == Pause::None {
        return Ok(None);
    }
    let running = container.require_running()?;
    let how = freeze::Options {
        host_root: context.roots.host_root.clone(),
        max_duration: options.max_pause.filter(|bound| !bound.is_zero()),
        mark: options.freeze_mark.clone(),
        ..freeze::Options::default()
    };
    if let Some(member) = &options.together {
        member.take_turn().await?;
    }
    let claim = claim(context, running, &how).await?;
    if let Some(member) = &options.together {
        member.claimed().await?;
    }
    let frozen = run_in_place(|| freeze::freeze(running.pid, Some(running.pid_start), &how))?;
    if !frozen.processes_outside().is_empty() {
        let pids = frozen
            .processes_outside()
            .iter()
            .map(u32::to_string)
            .collect::<Vec<_>>()
            .join(", ");
        context.warn(
            "not_frozen",
            format!(
                "processes outside the container's cgroup see its root and are not frozen: {pids}"
            ),
        );
    }
    let guard = FrozenGuard {
        frozen: Some(frozen),
        _claim: claim,
    };
    if let Some(member) = &options.together {
        member.frozen().await?;
    }
    Ok(Some(guard))
}

/// Claims the container's freezer. Returns `None` if there is no place for claims.
pub(super) async fn claim(
    context: &Context,
    running: &Running,
    how: &freeze::Options,
) -> Result<Option<freeze::Claim>, Error> {
    let mut waiting = None;
    loop {
        match freeze::claim(running.pid, Some(running.pid_start), how)? {
            freeze::Claimed::Held(claim) => return Ok(Some(claim)),
            freeze::Claimed::Nowhere => return Ok(None),
            freeze::Claimed::Busy => {}
        }
        if waiting.is_none() {
            waiting = Some(context.registries.waits().begin(WaitReason::OtherSave));
            let why = "another save has this container frozen: waiting for its end";
            context.warn("waiting", why.to_owned());
        }
        // Cancellation drops this future.
        tokio::time::sleep(TURN).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_freeze_that_takes_long_keeps_no_other_task_waiting() {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .build()
            .unwrap();
        let (say, heard) = std::sync::mpsc::channel();
        let save = async move {
            let other = tokio::spawn(async move { say.send(()) });
            // The other task runs while the container is being frozen.
            let heard = run_in_place(|| heard.recv_timeout(Duration::from_secs(60)));
            other.await.unwrap().unwrap();
            heard
        };
        let heard = runtime.block_on(async { tokio::spawn(save).await.unwrap() });
        assert_eq!(heard, Ok(()));
        assert_eq!(run_in_place(|| 7), 7, "without a runtime");
    }
}
