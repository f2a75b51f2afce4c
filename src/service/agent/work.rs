//! One job, from the claim to its final report.

use std::process::ExitStatus;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::Agent;
use super::child::{self, Child};
use super::final_event::FinalEvent;
use super::health::End;
use super::kind;
use super::metadata::{read_packages, read_saved};
use super::refusal::{Refusal, event_for_users, refusal_of, too_much_memory};
use super::reporter::Reporter;
use super::spool::{ChildRecord, JobFile};
use super::user_values::check_user_values;
use crate::common::digest::Digest;
use crate::common::failure::FailureKind;
use crate::node::container::{self, Attempt, Container, Runtime};
use crate::node::freeze;
use crate::service::job::{Code, Event, JobId, NextStep, Order, Outcome, Update, Verdict, now_ms};
use crate::service::queue::{Claim, ClaimState, RENEW_EVERY};
use crate::store::destination::Target;
use crate::store::layout;

/// Interval between questions to a manager that has not answered.
const CONFIRM_INTERVAL: Duration = Duration::from_secs(1);
/// How long the child's watchdog, and then the agent, may take to thaw what a dead child froze.
const THAW_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest time from a child's final event to its exit. A thread that waits in the kernel can keep it from exiting.
const END_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest wait for the next event of a child that has been stopped.
const LAST_EVENTS: Duration = Duration::from_secs(1);

/// Why a save does not start, or ends without success, although nothing is wrong with the job.
const NO_MANAGER: &str =
    "no manager said in time that the save is wanted; it is tried again when one can be reached";

const PINNED: &str =
    "the image that has this name and tag is pinned: it is not replaced until it is unpinned";

/// How an attempt ended.
enum AttemptEnd {
    Outcome(Outcome),
    /// The outcome is already on disk, or nothing was started, so that it need not be written.
    Known(Outcome),
    GivenBack(&'static str),
    /// Another consumer holds the claim, so nothing is reported.
    ClaimLost,
}

/// Processes `claim`. `lost` is set when another consumer is known to hold the claim.
pub(super) async fn work(agent: Arc<Agent>, claim: Claim, lost: CancellationToken) {
    let order = claim.order.clone();
    let mut reporter = Reporter::new(agent.queue.clone(), agent.options.node.clone(), claim);
    let end = match permission(&agent, &mut reporter, &order, &lost).await {
        Some(end) => end,
        None => match reporter.send(Update::Assigned).await {
            Some(ClaimState::Lost) => AttemptEnd::ClaimLost,
            Some(ClaimState::Cancelled) => AttemptEnd::Outcome(Outcome::Cancelled),
            Some(ClaimState::Held | ClaimState::Hurried) | None => {
                check_and_run(&agent, &mut reporter, &order, &lost).await
            }
        },
    };
    let update = match end {
        AttemptEnd::ClaimLost => {
            tracing::info!(job.id = %order.job, "the claim is lost: nothing is said about it");
            agent.metrics.ended(End::ClaimLost);
            return;
        }
        AttemptEnd::GivenBack(reason) => Update::GivenBack {
            reason: reason.to_owned(),
        },
        AttemptEnd::Outcome(outcome) => {
            if let Err(error) = agent
                .spool
                .store_outcome(&reporter.claim, &outcome, now_ms())
            {
                tracing::warn!(job.id = %order.job, %error, "how a job ended is not on disk: only the managers know that it is not to be done again");
            }
            Update::Ended { outcome }
        }
        AttemptEnd::Known(outcome) => Update::Ended { outcome },
    };
    tracing::info!(job.id = %order.job, job.attempt = order.attempt, said = ?update, "a job has ended");
    agent.metrics.ended(End::Said(&update));
    let hold = reporter.complete(update, &agent.drain_over).await;
    if hold == ClaimState::Lost {
        tracing::warn!(job.id = %order.job, "the end of the job could not be reported: the claim is lost");
    }
}

/// Returns `None` if the save may start, otherwise how the attempt ends. A signed order proves only that the save was
/// wanted at some time; the outcomes on this node's disk and a manager that is asked now decide whether it still is.
/// The container is not touched before this.
async fn permission(
    agent: &Agent,
    reporter: &mut Reporter,
    order: &Order,
    lost: &CancellationToken,
) -> Option<AttemptEnd> {
    if let Some(outcome) = agent.spool.stored_outcome(order, now_ms()) {
        return Some(AttemptEnd::Known(outcome));
    }
    let begun = Instant::now();
    let mut renewed = begun;
    loop {
        if agent.cancel.is_cancelled() {
            return Some(AttemptEnd::GivenBack("the agent ends"));
        }
        if lost.is_cancelled() {
            return Some(AttemptEnd::ClaimLost);
        }
        match reporter.ask_managers(NextStep::Save, None).await {
            Some(Verdict::Wanted) => return None,
            // Nothing is replaced yet, so no manager speaks of a pin.
            Some(Verdict::Unwanted | Verdict::Pinned) => {
                return Some(AttemptEnd::Known(Outcome::Cancelled));
            }
            Some(Verdict::Superseded) => return Some(AttemptEnd::ClaimLost),
            None if begun.elapsed() >= agent.options.manager_wait => {
                return Some(AttemptEnd::GivenBack(NO_MANAGER));
            }
            None => {}
        }
        if renewed.elapsed() >= RENEW_EVERY {
            renewed = Instant::now();
            match reporter.renew().await {
                Some(ClaimState::Lost) => return Some(AttemptEnd::ClaimLost),
                Some(ClaimState::Cancelled) => return Some(AttemptEnd::Known(Outcome::Cancelled)),
                Some(ClaimState::Held | ClaimState::Hurried) | None => {}
            }
        }
        tokio::select! {
            () = tokio::time::sleep(CONFIRM_INTERVAL) => {}
            () = agent.cancel.cancelled() => {}
            () = lost.cancelled() => {}
        }
    }
}

async fn check_and_run(
    agent: &Arc<Agent>,
    reporter: &mut Reporter,
    order: &Order,
    lost: &CancellationToken,
) -> AttemptEnd {
    if agent.cancel.is_cancelled() {
        return AttemptEnd::GivenBack("the agent ends");
    }
    let proven = {
        let (agent, order) = (Arc::clone(agent), order.clone());
        tokio::task::spawn_blocking(move || check_order(&agent, &order)).await
    };
    match proven {
        Ok(Ok(())) => {}
        Ok(Err(refusal)) => return AttemptEnd::Outcome(refusal.outcome()),
        Err(_) => return AttemptEnd::Outcome(defect("looking at the container").outcome()),
    }
    let end = attempt(agent, reporter, order, lost).await;
    if let AttemptEnd::Outcome(Outcome::Succeeded { saved }) = &end {
        agent
            .inventory
            .record_save(&order.session, order.job, saved.seconds);
    }
    agent.spool.end(order.job);
    end
}

fn defect(doing: &str) -> Refusal {
    Refusal::transient(
        Code::Internal,
        format!("{doing}: a thread died; this is a defect of upperdeck"),
    )
}

/// Checks whether this node may execute the order. The check relies on data of this node, not on what the order claims
/// about it.
fn check_order(agent: &Agent, order: &Order) -> Result<(), Refusal> {
    let options = &agent.options;
    if order.node != options.node {
        let why = format!(
            "the order is for node {:?}, and this is {:?}",
            order.node, options.node
        );
        return Err(Refusal::of(Code::NotPermitted, why));
    }
    if now_ms() > order.expires_ms {
        return Err(Refusal::transient(
            Code::Policy,
            "the order came after its time",
        ));
    }
    let allowed = &options.allowed;
    if !allowed
        .iter()
        .any(|prefix| prefix.covers(&order.destination))
    {
        let why = format!(
            "this node's agent does not save to {:?}: allow it in its configuration",
            order.destination
        );
        return Err(Refusal::of(Code::Policy, why));
    }
    check_user_values(order)?;
    if !order.options.include_volumes.is_empty()
        && child::allowed_volumes(options, &order.owner)
            .next()
            .is_none()
    {
        return Err(Refusal::of(
            Code::Policy,
            "this node's agent saves no volumes of this session: its administrator lists none (--allow-volume)",
        ));
    }
    if let Some(pid) = agent.stuck.pid_of(&order.session) {
        let why = format!(
            "an earlier save of this session hangs in the kernel (process {pid}) and cannot be ended: \
             a file system in the session does not answer"
        );
        return Err(Refusal::of(Code::Policy, why));
    }
    let container = find(agent, &order.session)?;
    // Only an administrator can save a session without an owner; its order has an empty owner.
    let owner = options.owner.owner(&container).unwrap_or_default();
    if owner == order.owner {
        return Ok(());
    }
    // The message must not reveal the actual owner to the requester.
    Err(Refusal::of(
        Code::NotPermitted,
        format!("the session is not {:?}'s by this node's rule", order.owner),
    ))
}

/// Returns the container with exactly this ID, also if it has ended. Fails if it has another process than the last listing
/// saw.
fn find(agent: &Agent, session: &str) -> Result<Container, Refusal> {
    let gone = || Refusal::of(Code::ContainerGone, "the session has ended and was removed");
    // Names, ID prefixes, pods and PIDs are not accepted as an ID.
    let id = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if session.starts_with('-') || !session.chars().all(id) {
        return Err(gone());
    }
    let found = container::find_any(&agent.options.roots, session, Attempt::Current);
    let container = found.map_err(|error| match error.kind() {
        FailureKind::ContainerGone if matches!(error, container::Error::Stopped { .. }) => {
            Refusal::of(
                Code::ContainerGone,
                format!("the session has ended: {error}"),
            )
        }
        FailureKind::ContainerGone => gone(),
        FailureKind::Retryable => Refusal::transient(Code::Internal, error.to_string()),
        _ if error.code() == "policy" => Refusal::of(Code::Policy, error.to_string()),
        FailureKind::BaseUnproven => Refusal::of(Code::BaseUnproven, error.to_string()),
        FailureKind::NotPermitted => Refusal::of(Code::NotPermitted, error.to_string()),
        _ => Refusal::of(Code::Internal, error.to_string()),
    })?;
    if container.id != session || container.runtime == Runtime::Process {
        return Err(gone());
    }
    let own = container
        .running()
        .map(|running| (running.pid, running.pid_start));
    match agent.inventory.process_of(session) {
        // One that has ended since is saved as it was then.
        Some(seen) if own.is_some_and(|own| own != seen) => Err(Refusal::of(
            Code::ContainerGone,
            "the session was started anew since it was looked at",
        )),
        _ => Ok(container),
    }
}

/// Why a child is stopped.
#[derive(Clone, Copy, PartialEq, Eq)]
enum StopReason {
    Cancelled,
    Lost,
    TimedOut,
    Drained,
    /// No manager confirmed that the tag is wanted.
    NoManager,
    /// The image that would lose its tag is pinned.
    Pinned,
}

async fn attempt(
    agent: &Agent,
    reporter: &mut Reporter,
    order: &Order,
    lost: &CancellationToken,
) -> AttemptEnd {
    let threads = agent.threads_for(order.job);
    // A session that has ended meanwhile is reported by the save itself.
    let container = find(agent, &order.session).ok();
    let labels = container.as_ref().map(kind::labels).unwrap_or_default();
    let ended = container.is_some_and(|container| container.ended().is_some());
    let arguments = child::arguments(&agent.options, &agent.spool, order, threads, &labels, ended);
    let begun = Instant::now();
    let mut child = match Child::spawn(&agent.options, order.job, &arguments) {
        Ok(child) => child,
        Err(error) => {
            let why = format!("the node's agent cannot start the save: {error}");
            return AttemptEnd::Outcome(Refusal::transient(Code::Internal, why).outcome());
        }
    };
    tracing::info!(job.id = %order.job, job.attempt = order.attempt, session.id = order.session, child.pid = child.pid, threads, "a save begins");
    let note = ChildRecord {
        session: order.session.clone(),
        pid: child.pid,
        pid_start: child.pid_start,
    };
    // Without the note a successor would not stop the child; the child stops by itself when its socket is closed.
    if let Err(error) = agent.spool.begin(order.job, &note) {
        tracing::warn!(job.id = %order.job, %error, "the spool cannot be written");
    }
    let (why, status, final_event) = follow(agent, reporter, order, lost, &mut child).await;
    let given_up = matches!(&status, Err(error) if error.kind() == std::io::ErrorKind::TimedOut);
    if given_up {
        agent.stuck.add(&order.session, child.pid);
    }
    let thawed = ensure_thawed(agent, order.job).await;
    let words = child.last_stderr_line().await;
    let exceeded_memory = child::exceeded_memory(&agent.options, order.job, &words);
    if !thawed {
        let why = "the save ended, and whether the session runs again could not be seen: have an administrator look at it";
        return AttemptEnd::Outcome(Refusal::of(Code::Internal, why).outcome());
    }
    // A child that was asked to stop may have finished by then. If it reported success, that counts, whatever kept it
    // from exiting.
    if final_event.saved.is_some() || matches!(&status, Ok(status) if status.success()) {
        let saved = read_saved(
            &agent.spool.file(order.job, JobFile::Metadata),
            final_event.saved,
            begun.elapsed(),
        );
        if let Some(packages) = read_packages(&agent.spool.file(order.job, JobFile::Metadata)) {
            reporter.send(Update::Packages { packages }).await;
        }
        return match saved {
            Some(saved) => AttemptEnd::Outcome(Outcome::Succeeded { saved }),
            None => AttemptEnd::Outcome(
                Refusal::transient(Code::Internal, "the save does not say what it made").outcome(),
            ),
        };
    }
    delete_remains(order).await;
    match why {
        Some(StopReason::Cancelled) => AttemptEnd::Outcome(Outcome::Cancelled),
        Some(StopReason::Lost) => AttemptEnd::ClaimLost,
        Some(StopReason::Drained) => {
            AttemptEnd::GivenBack("the agent ends, and the save did not end in time")
        }
        Some(StopReason::NoManager) => {
            AttemptEnd::Outcome(Refusal::transient(Code::TimedOut, NO_MANAGER).outcome())
        }
        Some(StopReason::Pinned) => {
            AttemptEnd::Outcome(Refusal::of(Code::ImagePinned, PINNED).outcome())
        }
        Some(StopReason::TimedOut) => {
            let hangs = if given_up {
                "; it hangs in the kernel and cannot be ended: a file system in the session does not answer"
            } else {
                ""
            };
            let tag = if final_event.is_tag_uncertain() {
                "; the registry has not said whether the tag is written: look at what it names now"
            } else {
                ""
            };
            let why = format!(
                "the save took longer than it may ({} s){hangs}{tag}",
                agent.bound(order).as_secs()
            );
            AttemptEnd::Outcome(Refusal::of(Code::TimedOut, why).outcome())
        }
        None if exceeded_memory && final_event.failed.is_none() => {
            AttemptEnd::Outcome(too_much_memory(agent.options.memory).outcome())
        }
        None => AttemptEnd::Outcome(refusal_of(status, final_event.failed, &words).outcome()),
    }
}

/// Deletes what a child that was killed wrote to a layout.
async fn delete_remains(order: &Order) {
    let Ok(Target::Layout { dir, .. }) = Target::for_saving(&order.destination) else {
        return;
    };
    let deleted = tokio::task::spawn_blocking(move || {
        if dir.is_dir() {
            layout::recover(&dir)?;
        }
        Ok::<_, layout::Error>(())
    });
    if let Ok(Err(error)) = deleted.await {
        tracing::warn!(job.id = %order.job, %error, "what a save left in its layout stays");
    }
}

/// Forwards the child's events, renews the lease, and stops the child if necessary.
async fn follow(
    agent: &Agent,
    reporter: &mut Reporter,
    order: &Order,
    lost: &CancellationToken,
    child: &mut Child,
) -> (Option<StopReason>, std::io::Result<ExitStatus>, FinalEvent) {
    let mut final_event = FinalEvent::default();
    let ends = tokio::time::sleep(agent.bound(order));
    tokio::pin!(ends);
    let mut renew = tokio::time::interval(RENEW_EVERY);
    renew.set_missed_tick_behavior(MissedTickBehavior::Delay);
    renew.reset();
    let mut ask = tokio::time::interval(CONFIRM_INTERVAL);
    ask.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut asking: Option<(Instant, Option<Digest>)> = None;
    let exit_deadline = tokio::time::sleep(Duration::MAX);
    tokio::pin!(exit_deadline);
    let mut hold = reporter.send(Update::Started).await;
    let mut open = true;
    let mut hurry_over = !agent.options.may_hurry();
    let why = loop {
        match hold.take() {
            Some(ClaimState::Lost) => break Some(StopReason::Lost),
            Some(ClaimState::Cancelled) => break Some(StopReason::Cancelled),
            Some(ClaimState::Held | ClaimState::Hurried) | None => {}
        }
        if reporter.hurried && !hurry_over {
            hurry_over = hurry(agent, reporter, child).await;
        }
        tokio::select! {
            event = child.events.recv(), if open => match event {
                None => open = false,
                Some(event) => {
                    if let Event::Ready { replaces } = event {
                        asking = Some((Instant::now(), replaces));
                        ask.reset_immediately();
                    }
                    if let Event::Paused { pause_ms } = event {
                        agent.metrics.paused(pause_ms);
                    }
                    if final_event.read(&event) {
                        exit_deadline.as_mut().reset(tokio::time::Instant::now() + END_TIMEOUT);
                    }
                    if let Some(event) = event_for_users(event) {
                        hold = reporter.send(Update::Event { event }).await;
                    }
                }
            },
            _ = ask.tick(), if asking.is_some() => match may_tag(reporter, asking.and_then(|(_, replaces)| replaces)).await {
                Ok(()) => {
                    asking = None;
                    // If the child is gone, its exit status will show it.
                    let _ = child.open_gate().await;
                    final_event.gate_open = true;
                }
                Err(Some(why)) => break Some(why),
                Err(None) if asking.is_some_and(|(at, _)| at.elapsed() >= agent.options.manager_wait) => {
                    break Some(StopReason::NoManager);
                }
                Err(None) => {}
            },
            status = child.process.wait(), if !open => return (None, status, final_event),
            _ = renew.tick() => hold = reporter.renew().await,
            () = &mut exit_deadline => break None,
            // Once the tag is written, only the time to its exit is limited.
            () = &mut ends, if final_event.saved.is_none() => break Some(StopReason::TimedOut),
            () = lost.cancelled() => break Some(StopReason::Lost),
            () = agent.drain_over.cancelled() => break Some(StopReason::Drained),
        }
    };
    let status = child.stop().await;
    // It may have written its tag before it ended. A process that it has left behind must not block the agent.
    while let Ok(Some(event)) = tokio::time::timeout(LAST_EVENTS, child.events.recv()).await {
        final_event.read(&event);
        if let Some(event @ Event::Warning { .. }) = event_for_users(event) {
            reporter.send(Update::Event { event }).await;
        }
    }
    (why, status, final_event)
}

/// Has the save run at normal priority, if a manager confirms that this was asked for. Returns `false` if the answer is
/// not known yet.
async fn hurry(agent: &Agent, reporter: &Reporter, child: &mut Child) -> bool {
    let Some(verdict) = reporter.ask_managers(NextStep::Hurry, None).await else {
        return false;
    };
    let job = reporter.claim.order.job;
    if verdict == Verdict::Wanted {
        tracing::info!(job.id = %job, node = agent.options.node, "a save leaves the background, as its owner asked");
        // If the child is gone, its exit status will show it.
        let _ = child.hurry().await;
    }
    true
}

/// Returns whether the tag may be set: a manager has to confirm now that it is wanted, and then the queue that the job
/// can no longer be cancelled. Fails with the reason to stop the save, or with `None` if the answer is not known yet.
/// `replaces` is the image that would lose its tag.
async fn may_tag(
    reporter: &mut Reporter,
    replaces: Option<Digest>,
) -> Result<(), Option<StopReason>> {
    match reporter.ask_managers(NextStep::Tag, replaces).await {
        Some(Verdict::Pinned) => return Err(Some(StopReason::Pinned)),
        Some(Verdict::Wanted) => {}
        Some(Verdict::Unwanted) => return Err(Some(StopReason::Cancelled)),
        Some(Verdict::Superseded) => return Err(Some(StopReason::Lost)),
        None => return Err(None),
    }
    match reporter.confirm().await {
        Some(ClaimState::Held | ClaimState::Hurried) => Ok(()),
        Some(ClaimState::Cancelled) => Err(Some(StopReason::Cancelled)),
        Some(ClaimState::Lost) => Err(Some(StopReason::Lost)),
        None => Err(None),
    }
}

/// Makes sure that the container of a job whose child has ended is thawed, unless another party paused it. Returns
/// `false` if the state cannot be determined; the caller tries again later.
pub(super) async fn ensure_thawed(agent: &Agent, job: JobId) -> bool {
    let until = Instant::now() + THAW_TIMEOUT;
    loop {
        let mark = agent.spool.file(job, JobFile::FreezeMark);
        let left = tokio::task::spawn_blocking(move || freeze::thaw_leftover(&mark)).await;
        match left {
            Ok(Ok(freeze::ThawOutcome::Thawed)) => {
                tracing::warn!(job.id = %job, "a save left its container frozen; it runs again");
                return true;
            }
            Ok(Ok(_)) => return true,
            Ok(Err(error)) if Instant::now() >= until => {
                tracing::error!(job.id = %job, %error, "a save may have left its container frozen");
                return false;
            }
            Err(_) => return false,
            Ok(Err(_)) => tokio::time::sleep(Duration::from_millis(200)).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;

    use super::*;

    #[test]
    fn how_a_child_ended_becomes_a_code() {
        let failed = |code: &str, retryable| Some((code.to_owned(), "why".to_owned(), retryable));
        let exit = |code: i32| ExitStatus::from_raw(code << 8);
        for (case, status, said, code, retryable) in [
            (
                "gone",
                exit(66),
                failed("container_gone", false),
                Code::ContainerGone,
                false,
            ),
            (
                "base",
                exit(69),
                failed("base_unproven", false),
                Code::BaseUnproven,
                false,
            ),
            (
                "registry",
                exit(75),
                failed("registry_unavailable", true),
                Code::RegistryUnavailable,
                true,
            ),
            (
                "quota",
                exit(77),
                failed("quota_exceeded", false),
                Code::QuotaExceeded,
                false,
            ),
            (
                "caps",
                exit(77),
                failed("policy", false),
                Code::Policy,
                false,
            ),
            (
                "denied",
                exit(77),
                failed("permission_denied", false),
                Code::NotPermitted,
                false,
            ),
            (
                "a pattern",
                exit(2),
                failed("usage", false),
                Code::Policy,
                false,
            ),
            (
                "a new code",
                exit(1),
                failed("of another version", false),
                Code::Internal,
                false,
            ),
            (
                "a stranger's signal",
                exit(130),
                failed("cancelled", false),
                Code::Internal,
                true,
            ),
            ("flags", exit(2), None, Code::Internal, false),
            ("no word, gone", exit(66), None, Code::ContainerGone, false),
            (
                "no word, registry",
                exit(75),
                None,
                Code::RegistryUnavailable,
                true,
            ),
            (
                "crash",
                ExitStatus::from_raw(11),
                None,
                Code::Internal,
                true,
            ),
            (
                "killed",
                ExitStatus::from_raw(9),
                None,
                Code::Internal,
                true,
            ),
            ("panic", exit(101), None, Code::Internal, true),
        ] {
            let refusal = refusal_of(Ok(status), said, "upperdeck: words");
            assert_eq!(
                (refusal.code, refusal.retryable),
                (code, retryable),
                "{case}"
            );
            assert!(!refusal.message.contains("upperdeck: "), "{case}");
        }
    }
}
