//! What a manager does by itself: it takes in what agents say, does the errands to the queue, compares record and queue,
//! and forgets what is old. Several managers do it at once: every change is written over the version it was made from.

use std::collections::HashMap;
use std::future::Future;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;

use super::App;
use super::inventory::is_alive;
use crate::job::{Code, Event, JobId, Order, Report, Said, State, now_ms};
use crate::queue::{self, Offered, Place, Withdrawn};
use crate::record::{self, Errand, Policy, Progress, Save, Standing, Taken};

/// Reports taken in at once, in one transaction.
const REPORTS: usize = 200;
const REPORTS_WAIT: Duration = Duration::from_secs(5);
/// Errands are looked for so often, and at once after this manager's own.
const ERRANDS_EVERY: Duration = Duration::from_secs(1);
const ERRANDS: u32 = 200;
const ERRANDS_AT_ONCE: usize = 16;
/// After an error: the record or the queue is away.
const PAUSE: Duration = Duration::from_secs(1);
/// Saves compared in one question.
const COMPARED: u32 = 500;
/// A queue that has not answered for so long, and two rounds more, was away.
const DEAF: Duration = Duration::from_secs(2);
/// What the queue does not know although reports wait to be taken is not lost before this.
const REPORTS_PATIENCE: Duration = Duration::from_secs(120);
/// An agent that was told to stop is told again.
const REMIND_EVERY: Duration = Duration::from_secs(30);
const FORGET_EVERY: Duration = Duration::from_secs(600);
const MEASURE_EVERY: Duration = Duration::from_secs(10);
/// Weight of the last stretch in the rate that is shown.
const SMOOTHING: f64 = 0.3;
/// Saves whose rates are kept in mind.
const MAX_RATES: usize = 20_000;

/// Why a round of background work ended early. The next one begins anew.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error(transparent)]
    Record(#[from] record::Error),
    #[error(transparent)]
    Queue(#[from] queue::Error),
}

/// Works until the manager is told to end. What breaks off leaves nothing half done: each step is one transaction, and
/// whoever comes next takes it up.
pub(super) async fn run(app: App) {
    tokio::join!(
        hear(&app),
        rounds(&app, "errands", ERRANDS_EVERY, true, || errands(&app)),
        reconcile(&app),
        rounds(&app, "forget", FORGET_EVERY, false, || forget(&app)),
        rounds(&app, "measure", MEASURE_EVERY, false, || measure(&app)),
        app.hub.run(
            &app.record,
            &app.queue,
            app.options.watch_every,
            &app.cancel
        ),
    );
}

/// Does something again and again; also when there are errands, if it is `woken`.
async fn rounds<F: Future<Output = Result<(), Trouble>>>(
    app: &App,
    task: &'static str,
    every: Duration,
    woken: bool,
    mut round: impl FnMut() -> F,
) {
    loop {
        if let Err(error) = round().await {
            tracing::warn!(task, error = %error, "a round of background work failed");
            app.metrics.error(task);
        }
        tokio::select! {
            _ = app.cancel.cancelled() => return,
            () = tokio::time::sleep(every) => {}
            () = app.errands.notified(), if woken => {}
        }
    }
}

/// Bytes a second, from one progress of a save to the next.
#[derive(Default)]
struct Rates(HashMap<JobId, (u64, Progress)>);

impl Rates {
    fn next(&mut self, report: &Report, mut progress: Progress) -> Progress {
        if self.0.len() > MAX_RATES {
            self.0.clear();
        }
        let before = self
            .0
            .get(&report.job)
            .filter(|(fence, _)| *fence == report.fence);
        if let Some((_, before)) = before {
            let seconds = (progress.at_ms - before.at_ms) as f64 / 1000.0;
            let bytes = progress.bytes_done.saturating_sub(before.bytes_done) as f64;
            progress.rate = before.rate;
            if seconds > 0.05 {
                let now = bytes / seconds;
                let smooth = before
                    .rate
                    .map_or(now, |rate| rate + SMOOTHING * (now - rate));
                progress.rate = Some(smooth);
            }
        }
        self.0.insert(report.job, (report.fence, progress));
        progress
    }
}

fn progress_of(report: &Report) -> Option<Progress> {
    match &report.said {
        Said::Event {
            event:
                Event::Progress {
                    bytes_done,
                    bytes_total,
                    bytes_sent,
                    entries_total,
                },
        } => Some(Progress {
            bytes_done: *bytes_done,
            bytes_total: *bytes_total,
            bytes_sent: *bytes_sent,
            entries_total: *entries_total,
            rate: None,
            at_ms: report.at_ms,
        }),
        _ => None,
    }
}

/// Takes in what agents say. A report is given back to the queue as taken only when it is in the record.
async fn hear(app: &App) {
    let mut rates = Rates::default();
    loop {
        let delivered = tokio::select! {
            _ = app.cancel.cancelled() => return,
            delivered = app.queue.reports(&app.name, REPORTS, REPORTS_WAIT) => delivered,
        };
        let delivered = match delivered {
            Ok(delivered) if delivered.is_empty() => continue,
            Ok(delivered) => delivered,
            Err(error) => {
                tracing::warn!(error = %error, "agents cannot be heard");
                app.metrics.error("hear");
                pause(app).await;
                continue;
            }
        };
        let (entries, reports): (Vec<_>, Vec<_>) = delivered
            .into_iter()
            .map(|delivered| (delivered.entry, delivered.report))
            .unzip();
        while let Err(error) = take_in(app, &reports, &mut rates).await {
            tracing::warn!(error = %error, reports = reports.len(), "reports cannot be taken in yet");
            app.metrics.error("hear");
            pause(app).await;
            if app.cancel.is_cancelled() {
                // Not taken: the queue gives them to another manager, or to the next one.
                return;
            }
        }
        app.metrics.reports(reports.len());
        if let Err(error) = app.queue.taken(&entries).await {
            // They come again, and are known then.
            tracing::warn!(error = %error, "reports are in the record, and the queue does not know");
        }
    }
}

async fn pause(app: &App) {
    tokio::select! {
        _ = app.cancel.cancelled() => {}
        () = tokio::time::sleep(PAUSE) => {}
    }
}

async fn take_in(app: &App, reports: &[Report], rates: &mut Rates) -> Result<(), record::Error> {
    let changed = match app.record.hear(reports, &app.policy).await {
        Ok(changed) => changed,
        // One save that cannot be read must not keep the others from being heard.
        Err(record::Error::Row { .. }) => hear_one_by_one(app, reports, &app.policy).await?,
        Err(error) => return Err(error),
    };
    let mut newest = HashMap::<JobId, &Report>::new();
    for report in reports {
        if progress_of(report).is_some() {
            let entry = newest.entry(report.job).or_insert(report);
            if (report.fence, report.seq) > (entry.fence, entry.seq) {
                *entry = report;
            }
        }
    }
    let mut touched: Vec<JobId> = changed.iter().map(|save| save.id).collect();
    for report in newest.into_values() {
        if let Some(progress) = progress_of(report) {
            let progress = rates.next(report, progress);
            if app.record.hear_progress(report, &progress).await? {
                touched.push(report.job);
            }
        }
    }
    app.hub.touch(&touched);
    for save in &changed {
        heard(app, save).await;
        if save.state.is_final() {
            rates.0.remove(&save.id);
        }
    }
    Ok(())
}

async fn hear_one_by_one(
    app: &App,
    reports: &[Report],
    policy: &Policy,
) -> Result<Vec<Save>, record::Error> {
    let mut changed = Vec::new();
    for report in reports {
        match app.record.hear(std::slice::from_ref(report), policy).await {
            Ok(saves) => changed.extend(saves),
            Err(error @ record::Error::Row { .. }) => {
                tracing::error!(job = %report.job, error = %error, "a report is dropped");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(changed)
}

/// A save has changed by an agent's word.
async fn heard(app: &App, save: &Save) {
    let code = save
        .error
        .as_ref()
        .map_or("", |failure| failure.code.name());
    tracing::info!(
        job = %save.id, state = save.state.name(), attempt = save.attempt, fence = save.fence, code, node = save.node,
        "a save has changed"
    );
    if save.state.is_final() {
        app.metrics.ended(save);
        app.store.forget(&save.user).await;
    } else if save.state == State::Queued {
        app.metrics.retried();
        app.errands.notify_one();
    }
}

fn order(app: &App, save: &Save) -> Order {
    let ms = |time: Duration| i64::try_from(time.as_millis()).unwrap_or(i64::MAX / 4);
    Order {
        job: save.id,
        node: save.node.clone(),
        session: save.session.clone(),
        owner: save.owner.clone(),
        destination: save.destination.clone(),
        message: save.message.clone(),
        options: save.options.clone(),
        attempt: save.attempt,
        fence_after: save.fence,
        not_before_ms: save.not_before_ms,
        expires_ms: now_ms() + ms(app.options.order_expiry),
        timeout_s: app.options.timeout.as_secs().max(1),
    }
}

/// Tells the queue what it has to hear, as written down.
async fn errands(app: &App) -> Result<(), Trouble> {
    loop {
        let taken = app.record.take_errands(&app.name, ERRANDS).await?;
        let full = taken.len() >= ERRANDS as usize;
        let done: Vec<Result<(), Trouble>> = futures_util::stream::iter(taken)
            .map(|taken| errand(app, taken))
            .buffer_unordered(ERRANDS_AT_ONCE)
            .collect()
            .await;
        done.into_iter().collect::<Result<Vec<()>, _>>()?;
        if !full || app.cancel.is_cancelled() {
            return Ok(());
        }
    }
}

async fn errand(app: &App, taken: Taken) -> Result<(), Trouble> {
    let done = match taken.errand {
        Errand::Offer => offer(app, taken.save).await,
        Errand::Withdraw => withdraw(app, taken.save).await,
    };
    match done {
        Ok(()) => app.record.errand_done(&app.name, &taken).await?,
        Err(error) => {
            app.record.errand_failed(&app.name, &taken, PAUSE).await?;
            return Err(error);
        }
    }
    Ok(())
}

async fn offer(app: &App, id: JobId) -> Result<(), Trouble> {
    let Some(save) = app.record.save(id).await? else {
        return Ok(());
    };
    if save.state != State::Queued || save.cancelling {
        return Ok(());
    }
    let offered = app.queue.offer(&order(app, &save)).await?;
    tracing::debug!(job = %id, attempt = save.attempt, known = offered == Offered::Known, "an order is out");
    Ok(())
}

async fn withdraw(app: &App, id: JobId) -> Result<(), Trouble> {
    let withdrawn = app.queue.withdraw(id).await?;
    let actor = format!("manager:{}", app.name);
    let changed = app
        .record
        .change(id, &actor, |draft| {
            let save = draft.save();
            if !save.cancelling {
                return;
            }
            match withdrawn {
                Withdrawn::Taken => {
                    draft.end("taken back before an agent had it");
                }
                Withdrawn::Unknown if save.state == State::Queued => {
                    draft.end("taken back before it was offered");
                }
                Withdrawn::TooLate => draft.too_late_to_end(),
                Withdrawn::Told | Withdrawn::Unknown => {}
            }
        })
        .await?;
    app.hub.touch(&[id]);
    if let Some((save, ())) = changed
        && save.state == State::Cancelled
    {
        app.metrics.ended(&save);
    }
    Ok(())
}

/// What is wrong between the record and the queue about a save.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wrong {
    /// The queue does not know it.
    Unknown,
    /// An agent had it, and does not renew its claim.
    NoLease,
    /// Its end is wanted, and it goes on.
    GoesOn,
}

/// What is to be done about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Remedy {
    OfferAgain,
    LoseLease,
    End,
    Remind,
    GiveUp(Code),
}

/// How a save and its surroundings look.
#[derive(Clone, Copy, Debug)]
struct Look {
    /// What is wrong, and for how long with the same version of the save.
    wrong: Option<(Wrong, Duration)>,
    /// Whether reports wait that may explain it.
    reports_wait: bool,
    /// Whether the node has not been heard of for too long.
    node_lost: bool,
    /// For how long it has been waiting.
    waiting: Duration,
}

fn wrong(save: &Standing, place: Option<Place>) -> Option<Wrong> {
    match place {
        None => Some(Wrong::Unknown),
        Some(Place::Held { lease_ms: 0 }) => Some(Wrong::NoLease),
        Some(_) if save.cancelling => Some(Wrong::GoesOn),
        Some(_) => None,
    }
}

/// Decides from what was seen twice: what a look between two steps of somebody else shows is gone at the next one.
fn remedy(save: &Standing, look: &Look, every: Duration, expiry: Duration) -> Option<Remedy> {
    let settled = |for_so_long: Duration| {
        for_so_long >= every && (!look.reports_wait || for_so_long >= REPORTS_PATIENCE)
    };
    match look.wrong {
        Some((Wrong::Unknown, time)) if settled(time) => {
            if save.cancelling {
                return Some(Remedy::End);
            }
            if look.node_lost {
                return Some(Remedy::GiveUp(Code::NodeLost));
            }
            return Some(Remedy::OfferAgain);
        }
        Some((Wrong::NoLease, time)) if settled(time) => {
            if look.node_lost {
                return Some(Remedy::GiveUp(Code::NodeLost));
            }
            if save.state != State::Queued {
                return Some(Remedy::LoseLease);
            }
        }
        Some((Wrong::GoesOn, time)) if time >= REMIND_EVERY => return Some(Remedy::Remind),
        _ => {}
    }
    if save.state == State::Queued && look.wrong.is_none() {
        if look.node_lost {
            return Some(Remedy::GiveUp(Code::NodeLost));
        }
        if look.waiting >= expiry {
            return Some(Remedy::GiveUp(Code::TimedOut));
        }
    }
    None
}

/// When each node was heard of last, by this manager's clock: those of the nodes may go wrong.
#[derive(Default)]
struct Heard {
    nodes: HashMap<String, (i64, Instant)>,
    listened: Option<Instant>,
}

impl Heard {
    /// The queue answers. While it did not, nobody could be heard: that time is no node's fault, and after it each has
    /// to be there again only as if it had been heard of now.
    fn listen(&mut self, patience: Duration) {
        let now = Instant::now();
        let deaf = self
            .listened
            .is_none_or(|at| now.duration_since(at) > patience);
        self.listened = Some(now);
        if deaf {
            for heard in self.nodes.values_mut() {
                heard.1 = now;
            }
        }
    }

    fn hear(&mut self, name: &str, at_ms: i64) {
        let now = Instant::now();
        let heard = self.nodes.entry(name.to_owned()).or_insert((at_ms, now));
        if heard.0 != at_ms {
            *heard = (at_ms, now);
        }
    }

    /// A node that was never heard of is so from now on.
    fn silent_for(&mut self, name: &str) -> Duration {
        let now = Instant::now();
        let heard = self.nodes.entry(name.to_owned()).or_insert((0, now));
        now.duration_since(heard.1)
    }
}

type Seen = HashMap<JobId, (u64, Wrong, Instant)>;

/// Compares the record with the queue, again and again.
async fn reconcile(app: &App) {
    let mut seen = Seen::new();
    let mut heard = Heard::default();
    loop {
        match compare(app, std::mem::take(&mut seen), &mut heard).await {
            Ok(now) => seen = now,
            Err(error) => {
                tracing::warn!(task = "reconcile", error = %error, "record and queue cannot be compared");
                app.metrics.error("reconcile");
            }
        }
        tokio::select! {
            _ = app.cancel.cancelled() => return,
            () = tokio::time::sleep(app.options.reconcile_every) => {}
        }
    }
}

async fn compare(app: &App, before: Seen, heard: &mut Heard) -> Result<Seen, Trouble> {
    let mut seen = Seen::new();
    let nodes = app.queue.nodes().await?;
    heard.listen(DEAF + app.options.reconcile_every * 2);
    for node in nodes {
        heard.hear(&node.name, node.at_ms);
    }
    let mut after = None;
    loop {
        // In this order: a save that ended after it was read here has another version when something is written.
        let saves = app.record.standing(after, COMPARED).await?;
        let Some(last) = saves.last() else {
            return Ok(seen);
        };
        after = Some(last.id);
        let ids: Vec<JobId> = saves.iter().map(|save| save.id).collect();
        let places = app.queue.places(&ids).await?;
        let reports_wait = app.queue.depth().await?.reports > 0;
        for (save, place) in saves.iter().zip(places) {
            let wrong = wrong(save, place).map(|wrong| {
                let since = match before.get(&save.id) {
                    Some((version, was, since)) if *version == save.version && *was == wrong => {
                        *since
                    }
                    _ => Instant::now(),
                };
                seen.insert(save.id, (save.version, wrong, since));
                (wrong, since.elapsed())
            });
            let waiting = Duration::from_millis((now_ms() - save.queued_ms).max(0) as u64);
            let look = Look {
                wrong,
                reports_wait,
                node_lost: heard.silent_for(&save.node) >= app.options.node_lost,
                waiting,
            };
            let every = app.options.reconcile_every;
            if let Some(remedy) = remedy(save, &look, every, app.options.order_expiry) {
                apply(app, save, remedy).await?;
                seen.remove(&save.id);
            }
        }
    }
}

async fn apply(app: &App, save: &Standing, remedy: Remedy) -> Result<(), Trouble> {
    let actor = format!("manager:{}", app.name);
    let changed = app
        .record
        .change_at(save.id, save.version, &actor, |draft| match remedy {
            Remedy::OfferAgain => draft.offer_again("the queue has lost it"),
            Remedy::LoseLease => draft.lose_lease(),
            Remedy::End => {
                draft.end("nobody has it");
            }
            Remedy::Remind => draft.remind_of_end(),
            Remedy::GiveUp(code) => {
                let message = match code {
                    Code::NodeLost => format!(
                        "node {} has not been heard of for {} seconds; the session may be gone with it",
                        save.node,
                        app.options.node_lost.as_secs()
                    ),
                    _ => format!(
                        "it has waited for {} hours without being begun",
                        app.options.order_expiry.as_secs() / 3600
                    ),
                };
                draft.give_up(code, &message);
            }
        })
        .await?;
    if let Some((changed, ())) = changed {
        tracing::info!(job = %save.id, was = save.state.name(), state = changed.state.name(), ?remedy, "a save is put right");
        if remedy == Remedy::OfferAgain {
            app.metrics.offered_again();
        }
        if changed.state.is_final() {
            app.metrics.ended(&changed);
        }
        app.hub.touch(&[save.id]);
        app.errands.notify_one();
    }
    Ok(())
}

async fn forget(app: &App) -> Result<(), Trouble> {
    let gone = app.record.forget(app.options.retention).await?;
    if gone > 0 {
        tracing::info!(saves = gone, "old saves are forgotten");
    }
    Ok(())
}

async fn measure(app: &App) -> Result<(), Trouble> {
    app.metrics.record(&app.record.counts().await?);
    let depth = app.queue.depth().await;
    app.metrics.queue(depth.as_ref().ok().copied());
    let nodes = app.inventory.nodes(&app.queue).await?;
    let alive = nodes.iter().filter(|node| is_alive(node)).count();
    app.metrics.nodes(alive, nodes.len() - alive);
    depth?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVERY: Duration = Duration::from_secs(3);
    const HOUR: Duration = Duration::from_secs(3600);

    fn standing(state: State, cancelling: bool) -> Standing {
        Standing {
            id: JobId::new(),
            node: "n".into(),
            state,
            version: 1,
            cancelling,
            queued_ms: 0,
        }
    }

    #[test]
    fn what_is_wrong_is_put_right_only_when_it_stays_so() {
        use State::{Assigned, Queued, Running};
        use Wrong::{GoesOn, NoLease, Unknown};
        let cases = [
            // state, cancelling, wrong, seconds, reports wait, node lost -> remedy
            (Queued, false, Some(Unknown), 0, false, false, None),
            (
                Queued,
                false,
                Some(Unknown),
                3,
                false,
                false,
                Some(Remedy::OfferAgain),
            ),
            (
                Running,
                false,
                Some(Unknown),
                3,
                false,
                false,
                Some(Remedy::OfferAgain),
            ),
            (Running, false, Some(Unknown), 3, true, false, None),
            (
                Running,
                false,
                Some(Unknown),
                120,
                true,
                false,
                Some(Remedy::OfferAgain),
            ),
            (
                Running,
                true,
                Some(Unknown),
                3,
                false,
                false,
                Some(Remedy::End),
            ),
            (
                Running,
                false,
                Some(Unknown),
                3,
                false,
                true,
                Some(Remedy::GiveUp(Code::NodeLost)),
            ),
            (Running, false, Some(NoLease), 2, false, false, None),
            (
                Running,
                false,
                Some(NoLease),
                3,
                false,
                false,
                Some(Remedy::LoseLease),
            ),
            (
                Assigned,
                false,
                Some(NoLease),
                3,
                false,
                true,
                Some(Remedy::GiveUp(Code::NodeLost)),
            ),
            (Queued, false, Some(NoLease), 9, false, false, None),
            (Running, true, Some(GoesOn), 9, false, false, None),
            (
                Running,
                true,
                Some(GoesOn),
                30,
                false,
                false,
                Some(Remedy::Remind),
            ),
            (Running, false, None, 0, false, true, None),
            (
                Queued,
                false,
                None,
                0,
                false,
                true,
                Some(Remedy::GiveUp(Code::NodeLost)),
            ),
            (Queued, false, None, 0, false, false, None),
        ];
        for (state, cancelling, wrong, seconds, reports_wait, node_lost, expected) in cases {
            let look = Look {
                wrong: wrong.map(|wrong| (wrong, Duration::from_secs(seconds))),
                reports_wait,
                node_lost,
                waiting: Duration::ZERO,
            };
            let found = remedy(&standing(state, cancelling), &look, EVERY, HOUR);
            assert_eq!(found, expected, "{state:?} {cancelling} {look:?}");
        }
        let old = Look {
            wrong: None,
            reports_wait: false,
            node_lost: false,
            waiting: HOUR,
        };
        assert_eq!(
            remedy(&standing(Queued, false), &old, EVERY, HOUR),
            Some(Remedy::GiveUp(Code::TimedOut))
        );
        assert_eq!(remedy(&standing(Running, false), &old, EVERY, HOUR), None);
    }

    #[test]
    fn while_the_queue_is_away_no_node_is_lost() {
        let long_ago = Instant::now()
            .checked_sub(HOUR)
            .unwrap_or_else(Instant::now);
        let mut heard = Heard::default();
        heard.listen(EVERY);
        heard.nodes.insert("n".into(), (1, long_ago));
        heard.listen(EVERY);
        assert!(heard.silent_for("n") >= HOUR);
        heard.listened = Some(long_ago);
        heard.listen(EVERY);
        assert!(heard.silent_for("n") < HOUR);
    }

    #[test]
    fn rates_are_of_one_claim() {
        let mut rates = Rates::default();
        let job = JobId::new();
        let mut at = |fence, at_ms, bytes_done| {
            let report = Report {
                job,
                node: "n".into(),
                attempt: 1,
                fence,
                seq: 0,
                at_ms,
                said: Said::Started,
            };
            let progress = Progress {
                bytes_done,
                at_ms,
                ..Progress::default()
            };
            rates.next(&report, progress).rate
        };
        assert_eq!(at(1, 0, 0), None);
        assert_eq!(at(1, 1000, 500), Some(500.0));
        assert_eq!(at(1, 1010, 510), Some(500.0));
        assert_eq!(at(2, 2000, 0), None);
    }
}
