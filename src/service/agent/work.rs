//! One job, from the claim to its final report.

use std::process::ExitStatus;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::Agent;
use super::child::{self, Child};
use super::made::read_saved;
use super::spool::{Note, Of};
use super::telling::Teller;
use crate::common::escape;
use crate::node::container::{self, Container, Runtime};
use crate::node::freeze;
use crate::service::job::{Before, Code, Event, JobId, Order, Outcome, Said, Word, now_ms};
use crate::service::queue::{Claim, Hold, RENEW_EVERY};

/// Interval between questions to a manager that has not answered.
const CONFIRM_AGAIN: Duration = Duration::from_secs(1);
/// How long the child's watchdog, and then the agent, may take to thaw what a dead child froze.
const THAW_BOUND: Duration = Duration::from_secs(60);
/// Longest time from a child's final event to its exit. A thread that waits in the kernel can keep it from exiting.
const END_BOUND: Duration = Duration::from_secs(30);
/// Maximum length in characters of a message for people.
const MAX_MESSAGE: usize = 2000;
/// Maximum total size in bytes of all values that users choose. The kernel accepts 128 KiB per argument and 2 MiB in
/// all.
const MAX_CHOSEN: usize = 96 << 10;

/// Why a save does not start, or ends without success, although nothing is wrong with the job.
const NO_MANAGER: &str =
    "no manager said in time that the save is wanted; it is tried again when one can be reached";

/// Why there is no image.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Refusal {
    code: Code,
    message: String,
    retryable: bool,
}

impl Refusal {
    fn of(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            retryable: false,
        }
    }

    fn passing(code: Code, message: impl Into<String>) -> Self {
        Self {
            retryable: true,
            ..Self::of(code, message)
        }
    }

    fn outcome(self) -> Outcome {
        Outcome::Failed {
            code: self.code,
            message: escape::limited(&self.message, MAX_MESSAGE),
            retryable: self.retryable,
        }
    }
}

/// How an attempt ended.
enum End {
    Outcome(Outcome),
    /// The outcome is already on disk, or nothing was started, so that it need not be written.
    Known(Outcome),
    GivenBack(&'static str),
    /// Another consumer holds the claim, so nothing is reported.
    Silent,
}

/// Processes `claim`. `lost` is set when another consumer is known to hold the claim.
pub(super) async fn work(agent: Arc<Agent>, claim: Claim, lost: CancellationToken) {
    let order = claim.order.clone();
    let mut teller = Teller::new(agent.queue.clone(), agent.options.node.clone(), claim);
    let end = match permission(&agent, &mut teller, &order, &lost).await {
        Some(end) => end,
        None => match teller.tell(Said::Assigned).await {
            Some(Hold::Lost) => End::Silent,
            Some(Hold::Cancelled) => End::Outcome(Outcome::Cancelled),
            Some(Hold::Held) | None => one_end(&agent, &mut teller, &order, &lost).await,
        },
    };
    let said = match end {
        End::Silent => {
            tracing::info!(job.id = %order.job, "the claim is lost: nothing is said about it");
            return;
        }
        End::GivenBack(reason) => Said::GivenBack {
            reason: reason.to_owned(),
        },
        End::Outcome(outcome) => {
            if let Err(error) = agent.spool.keep(&teller.claim, &outcome, now_ms()) {
                tracing::warn!(job.id = %order.job, %error, "how a job ended is not on disk: only the managers know that it is not to be done again");
            }
            Said::Ended { outcome }
        }
        End::Known(outcome) => Said::Ended { outcome },
    };
    tracing::info!(job.id = %order.job, job.attempt = order.attempt, said = ?said, "a job has ended");
    let hold = teller.complete(said, &agent.drain_over).await;
    if hold == Hold::Lost {
        tracing::warn!(job.id = %order.job, "nobody was told how the job ended");
    }
}

/// Returns `None` if the save may start, otherwise how the attempt ends. A signed order proves only that the save was
/// wanted at some time; the outcomes on this node's disk and a manager that is asked now decide whether it still is.
/// The container is not touched before this.
async fn permission(
    agent: &Agent,
    teller: &mut Teller,
    order: &Order,
    lost: &CancellationToken,
) -> Option<End> {
    if let Some(outcome) = agent.spool.kept(order, now_ms()) {
        return Some(End::Known(outcome));
    }
    let begun = Instant::now();
    let mut renewed = begun;
    loop {
        if agent.cancel.is_cancelled() {
            return Some(End::GivenBack("the agent ends"));
        }
        if lost.is_cancelled() {
            return Some(End::Silent);
        }
        match teller.wanted(Before::Save).await {
            Some(Word::Wanted) => return None,
            Some(Word::Unwanted) => return Some(End::Known(Outcome::Cancelled)),
            Some(Word::Superseded) => return Some(End::Silent),
            None if begun.elapsed() >= agent.options.manager_wait => {
                return Some(End::GivenBack(NO_MANAGER));
            }
            None => {}
        }
        if renewed.elapsed() >= RENEW_EVERY {
            renewed = Instant::now();
            match teller.renew().await {
                Some(Hold::Lost) => return Some(End::Silent),
                Some(Hold::Cancelled) => return Some(End::Known(Outcome::Cancelled)),
                Some(Hold::Held) | None => {}
            }
        }
        tokio::select! {
            () = tokio::time::sleep(CONFIRM_AGAIN) => {}
            () = agent.cancel.cancelled() => {}
            () = lost.cancelled() => {}
        }
    }
}

async fn one_end(
    agent: &Arc<Agent>,
    teller: &mut Teller,
    order: &Order,
    lost: &CancellationToken,
) -> End {
    if agent.cancel.is_cancelled() {
        return End::GivenBack("the agent ends");
    }
    let proven = {
        let (agent, order) = (Arc::clone(agent), order.clone());
        tokio::task::spawn_blocking(move || prove(&agent, &order)).await
    };
    match proven {
        Ok(Ok(())) => {}
        Ok(Err(refusal)) => return End::Outcome(refusal.outcome()),
        Err(_) => return End::Outcome(defect("looking at the container").outcome()),
    }
    let end = attempt(agent, teller, order, lost).await;
    if let End::Outcome(Outcome::Succeeded { saved }) = &end {
        agent.inventory.saved(&order.session, saved.seconds);
    }
    agent.spool.end(order.job);
    end
}

fn defect(doing: &str) -> Refusal {
    Refusal::passing(
        Code::Internal,
        format!("{doing}: a thread died; this is a defect of upperdeck"),
    )
}

/// Checks whether this node may execute the order. The check relies on data of this node, not on what the order claims
/// about it.
fn prove(agent: &Agent, order: &Order) -> Result<(), Refusal> {
    let options = &agent.options;
    if order.node != options.node {
        let why = format!(
            "the order is for node {:?}, and this is {:?}",
            order.node, options.node
        );
        return Err(Refusal::of(Code::NotPermitted, why));
    }
    if now_ms() > order.expires_ms {
        return Err(Refusal::passing(
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
    chosen(order)?;
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
    if let Some(pid) = agent.stuck.of(&order.session) {
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

/// Checks the values that the user chose.
fn chosen(order: &Order) -> Result<(), Refusal> {
    let options = &order.options;
    let known = options
        .compression
        .as_deref()
        .is_none_or(|codec| matches!(codec, "gzip" | "zstd"));
    if !known {
        return Err(Refusal::of(Code::Policy, "the compression is gzip or zstd"));
    }
    if options
        .labels
        .keys()
        .any(|key| key.is_empty() || key.contains('='))
    {
        return Err(Refusal::of(
            Code::Policy,
            "a label's key is not empty, and has no '=' in it",
        ));
    }
    let labels = options.labels.iter().flat_map(|(key, value)| [key, value]);
    let texts = labels
        .chain(&options.exclude)
        .chain(&options.include_volumes)
        .chain(&order.message);
    let mut bytes = 0;
    for text in texts {
        if text.contains('\0') {
            return Err(Refusal::of(
                Code::Policy,
                "message, labels and patterns have no zero bytes",
            ));
        }
        bytes += text.len();
    }
    if bytes > MAX_CHOSEN {
        let why =
            format!("message, labels and patterns have {bytes} bytes; {MAX_CHOSEN} are the most");
        return Err(Refusal::of(Code::Policy, why));
    }
    Ok(())
}

/// Returns the container with exactly this ID. Fails if it is not the same process that the last listing saw.
fn find(agent: &Agent, session: &str) -> Result<Container, Refusal> {
    let gone = || Refusal::of(Code::ContainerGone, "the session has ended");
    // Names, ID prefixes, pods and PIDs are not accepted as an ID.
    let id = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if session.starts_with('-') || !session.chars().all(id) {
        return Err(gone());
    }
    let container = container::find(&agent.options.roots, session).map_err(|error| match error
        .exit_code()
    {
        66 => gone(),
        _ if error.code() == "policy" => Refusal::of(Code::Policy, error.to_string()),
        69 => Refusal::of(Code::BaseUnproven, error.to_string()),
        77 => Refusal::of(Code::NotPermitted, error.to_string()),
        _ => Refusal::of(Code::Internal, error.to_string()),
    })?;
    if container.id != session || container.runtime == Runtime::Process {
        return Err(gone());
    }
    match agent.inventory.seen(session) {
        Some((pid, start)) if (pid, start) != (container.pid, container.pid_start) => {
            Err(Refusal::of(
                Code::ContainerGone,
                "the session was started anew since it was looked at",
            ))
        }
        _ => Ok(container),
    }
}

/// Why a child is stopped.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Why {
    Cancelled,
    Lost,
    TimedOut,
    Drained,
    /// No manager confirmed that the tag is wanted.
    NoManager,
}

async fn attempt(
    agent: &Agent,
    teller: &mut Teller,
    order: &Order,
    lost: &CancellationToken,
) -> End {
    let threads = agent.threads_for(order.job);
    let arguments = child::arguments(&agent.options, &agent.spool, order, threads);
    let begun = Instant::now();
    let mut child = match Child::spawn(&agent.options, order.job, &arguments) {
        Ok(child) => child,
        Err(error) => {
            let why = format!("the node's agent cannot start the save: {error}");
            return End::Outcome(Refusal::passing(Code::Internal, why).outcome());
        }
    };
    tracing::info!(job.id = %order.job, job.attempt = order.attempt, session.id = order.session, child.pid = child.pid, threads, "a save begins");
    let note = Note {
        session: order.session.clone(),
        pid: child.pid,
        pid_start: child.pid_start,
    };
    // Without the note a successor would not stop the child; the child stops by itself when its socket is closed.
    if let Err(error) = agent.spool.begin(order.job, &note) {
        tracing::warn!(job.id = %order.job, %error, "the spool cannot be written");
    }
    let (why, status, said) = follow(agent, teller, order, lost, &mut child).await;
    let given_up = matches!(&status, Err(error) if error.kind() == std::io::ErrorKind::TimedOut);
    if given_up {
        agent.stuck.add(&order.session, child.pid);
    }
    let thawed = settle(agent, order.job).await;
    let words = child.last_words().await;
    let lacked_memory = child::lacked_memory(&agent.options, order.job, &words);
    if !thawed {
        let why = "the save ended, and whether the session runs again could not be seen: have an administrator look at it";
        return End::Outcome(Refusal::of(Code::Internal, why).outcome());
    }
    // A child that was asked to stop may have finished by then. If it reported success, that counts, whatever kept it
    // from exiting.
    if said.saved.is_some() || matches!(&status, Ok(status) if status.success()) {
        let saved = read_saved(
            &agent.spool.file(order.job, Of::Metadata),
            said.saved,
            begun.elapsed(),
        );
        return match saved {
            Some(saved) => End::Outcome(Outcome::Succeeded { saved }),
            None => End::Outcome(
                Refusal::passing(Code::Internal, "the save does not say what it made").outcome(),
            ),
        };
    }
    match why {
        Some(Why::Cancelled) => End::Outcome(Outcome::Cancelled),
        Some(Why::Lost) => End::Silent,
        Some(Why::Drained) => End::GivenBack("the agent ends, and the save did not end in time"),
        Some(Why::NoManager) => {
            End::Outcome(Refusal::passing(Code::TimedOut, NO_MANAGER).outcome())
        }
        Some(Why::TimedOut) => {
            let hangs = if given_up {
                "; it hangs in the kernel and cannot be ended: a file system in the session does not answer"
            } else {
                ""
            };
            let why = format!(
                "the save took longer than it may ({} s){hangs}",
                agent.bound(order).as_secs()
            );
            End::Outcome(Refusal::of(Code::TimedOut, why).outcome())
        }
        None if lacked_memory && said.failed.is_none() => {
            End::Outcome(too_much_memory(agent.options.memory).outcome())
        }
        None => End::Outcome(refusal_of(status, said.failed, &words).outcome()),
    }
}

/// The final event of a child.
#[derive(Default)]
struct LastSaid {
    saved: Option<(String, String)>,
    failed: Option<(String, String, bool)>,
}

/// Forwards the child's events, renews the lease, and stops the child if necessary.
async fn follow(
    agent: &Agent,
    teller: &mut Teller,
    order: &Order,
    lost: &CancellationToken,
    child: &mut Child,
) -> (Option<Why>, std::io::Result<ExitStatus>, LastSaid) {
    let mut said = LastSaid::default();
    let ends = tokio::time::sleep(agent.bound(order));
    tokio::pin!(ends);
    let mut renew = tokio::time::interval(RENEW_EVERY);
    renew.set_missed_tick_behavior(MissedTickBehavior::Delay);
    renew.reset();
    let mut ask = tokio::time::interval(CONFIRM_AGAIN);
    ask.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut asking: Option<Instant> = None;
    let last_word = tokio::time::sleep(Duration::MAX);
    tokio::pin!(last_word);
    let mut hold = teller.tell(Said::Started).await;
    let mut open = true;
    let why = loop {
        match hold.take() {
            Some(Hold::Lost) => break Some(Why::Lost),
            Some(Hold::Cancelled) => break Some(Why::Cancelled),
            Some(Hold::Held) | None => {}
        }
        tokio::select! {
            event = child.events.recv(), if open => match event {
                None => open = false,
                Some(event) => {
                    match &event {
                        Event::Ready => {
                            asking = Some(Instant::now());
                            ask.reset_immediately();
                        }
                        Event::Saved { reference, digest } => {
                            said.saved = Some((reference.clone(), digest.to_string()));
                            last_word.as_mut().reset(tokio::time::Instant::now() + END_BOUND);
                        }
                        Event::Failed { code, message, retryable, .. } => {
                            said.failed = Some((code.clone(), message.clone(), *retryable));
                            last_word.as_mut().reset(tokio::time::Instant::now() + END_BOUND);
                        }
                        _ => {}
                    }
                    hold = teller.tell(Said::Event { event }).await;
                }
            },
            _ = ask.tick(), if asking.is_some() => match may_tag(teller).await {
                Ok(()) => {
                    asking = None;
                    // If the child is gone, its exit status will show it.
                    let _ = child.open_gate().await;
                }
                Err(Some(why)) => break Some(why),
                Err(None) if asking.is_some_and(|at| at.elapsed() >= agent.options.manager_wait) => {
                    break Some(Why::NoManager);
                }
                Err(None) => {}
            },
            status = child.process.wait(), if !open => return (None, status, said),
            _ = renew.tick() => hold = teller.renew().await,
            () = &mut last_word => break None,
            () = &mut ends => break Some(Why::TimedOut),
            () = lost.cancelled() => break Some(Why::Lost),
            () = agent.drain_over.cancelled() => break Some(Why::Drained),
        }
    };
    let status = child.stop().await;
    (why, status, said)
}

/// Returns whether the tag may be set: a manager has to confirm now that it is wanted, and then the queue that the job
/// can no longer be cancelled. Fails with the reason to stop the save, or with `None` if the answer is not known yet.
async fn may_tag(teller: &mut Teller) -> Result<(), Option<Why>> {
    match teller.wanted(Before::Tag).await {
        Some(Word::Wanted) => {}
        Some(Word::Unwanted) => return Err(Some(Why::Cancelled)),
        Some(Word::Superseded) => return Err(Some(Why::Lost)),
        None => return Err(None),
    }
    match teller.confirm().await {
        Some(Hold::Held) => Ok(()),
        Some(Hold::Cancelled) => Err(Some(Why::Cancelled)),
        Some(Hold::Lost) => Err(Some(Why::Lost)),
        None => Err(None),
    }
}

/// Makes sure that the container of a job whose child has ended is thawed, unless another party paused it. Returns
/// `false` if the state cannot be determined; the caller tries again later.
pub(super) async fn settle(agent: &Agent, job: JobId) -> bool {
    let until = Instant::now() + THAW_BOUND;
    loop {
        let mark = agent.spool.file(job, Of::Mark);
        let left = tokio::task::spawn_blocking(move || freeze::thaw_left(&mark)).await;
        match left {
            Ok(Ok(freeze::Left::Thawed)) => {
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

/// Returns the refusal for a save that exceeded its memory limit. It is not retryable, because another attempt would
/// need as much memory.
fn too_much_memory(bound: Option<u64>) -> Refusal {
    let bytes = bound.unwrap_or_default();
    let why = format!(
        "the save needs more memory than a save may take on this node ({bytes} bytes): an administrator may raise it with \
         --save-memory"
    );
    Refusal::of(Code::Policy, why)
}

/// Returns why a child that the agent did not stop ended without an image.
fn refusal_of(
    status: std::io::Result<ExitStatus>,
    said: Option<(String, String, bool)>,
    words: &str,
) -> Refusal {
    let status = match status {
        Ok(status) => status,
        Err(error) => {
            return Refusal::passing(Code::Internal, format!("waiting for the save: {error}"));
        }
    };
    if let Some((code, message, retryable)) = said {
        return match code.as_str() {
            "cancelled" => Refusal::passing(Code::Internal, "somebody on the node ended the save"),
            code => Refusal {
                code: of_child(code),
                message,
                retryable,
            },
        };
    }
    let words = words.strip_prefix("upperdeck: ").unwrap_or(words);
    match status.code() {
        // Errors of the command line occur before the first event. The flags come from the agent and the administrator,
        // and the user's values have been checked.
        Some(2) => Refusal::of(Code::Internal, format!("the save was not begun: {words}")),
        Some(66) => Refusal::of(Code::ContainerGone, words),
        Some(69) => Refusal::of(Code::BaseUnproven, words),
        Some(75) => Refusal::passing(Code::RegistryUnavailable, words),
        Some(77) => Refusal::of(Code::NotPermitted, words),
        Some(130) => Refusal::passing(Code::Internal, "somebody on the node ended the save"),
        _ => Refusal::passing(
            Code::Internal,
            format!("the save ended with {status} and no word: {words}"),
        ),
    }
}

/// Translates an error code of the child into one of the job.
fn of_child(code: &str) -> Code {
    match code {
        // Caused by a value that the user chose, such as an invalid pattern.
        "usage" => Code::Policy,
        "permission_denied" => Code::NotPermitted,
        "foreign_root" => Code::BaseUnproven,
        code => Code::named(code).unwrap_or(Code::Internal),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;

    use super::*;
    use crate::service::agent::spool::tests::order;

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

    #[test]
    fn what_users_chose_is_checked() {
        type Change = fn(&mut Order);
        let cases: [(&str, Change, bool); 7] = [
            ("nothing", |_| {}, true),
            (
                "codec",
                |o| o.options.compression = Some("zstd".to_owned()),
                true,
            ),
            (
                "no codec",
                |o| o.options.compression = Some("none".to_owned()),
                false,
            ),
            (
                "key",
                |o| drop(o.options.labels.insert("a=b".to_owned(), String::new())),
                false,
            ),
            (
                "empty key",
                |o| drop(o.options.labels.insert(String::new(), String::new())),
                false,
            ),
            ("zero byte", |o| o.message = Some("a\0b".to_owned()), false),
            (
                "long",
                |o| o.options.exclude = vec!["x".repeat(MAX_CHOSEN + 1)],
                false,
            ),
        ];
        for (case, change, fine) in cases {
            let mut it = order();
            change(&mut it);
            assert_eq!(chosen(&it).is_ok(), fine, "{case}");
        }
    }
}
