//! Work that waits for registries: several pieces at a time, and shared fairly between the registries, so that one that
//! hangs does not hold back the others.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::future::Future;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;

use crate::service::manager::App;

/// Maximum number of pieces at a time.
const AT_ONCE: usize = 8;
/// Time in which saves are asked for in a round; those that are not asked for by then are due in the next round.
const ASKED_FOR: Duration = Duration::from_secs(20);

/// Does `work` for what waits for each registry, in order, at most [`AT_ONCE`] at a time. While there is work for several
/// registries, each has an equal part of that, at least one. When `goes_on` is false, no more is begun.
///
/// Returns the results, and what was not begun.
pub(super) async fn in_turns<T, R, F: Future<Output = R>>(
    mut waiting: BTreeMap<String, VecDeque<T>>,
    goes_on: impl Fn() -> bool,
    work: impl Fn(T) -> F,
) -> (Vec<R>, Vec<T>) {
    let mut done = Vec::new();
    let mut running = FuturesUnordered::new();
    let mut running_at = HashMap::<String, usize>::new();
    loop {
        while running.len() < AT_ONCE && goes_on() {
            let Some((registry, item)) = next(&mut waiting, &running_at) else {
                break;
            };
            *running_at.entry(registry.clone()).or_default() += 1;
            let piece = work(item);
            running.push(async move { (registry, piece.await) });
        }
        let Some((registry, result)) = running.next().await else {
            break;
        };
        if let Some(count) = running_at.get_mut(&registry) {
            *count -= 1;
            if *count == 0 {
                running_at.remove(&registry);
            }
        }
        done.push(result);
    }
    (done, waiting.into_values().flatten().collect())
}

/// Asks for saves, in order and several at a time, until [`ASKED_FOR`] is over or the manager ends. All go to the registry of
/// the target.
///
/// Returns the results, and what was not asked for.
pub(super) async fn ask_for_saves<T, R, F: Future<Output = R>>(
    app: &App,
    waiting: Vec<T>,
    ask: impl Fn(T) -> F,
) -> (Vec<R>, Vec<T>) {
    let registry = app.options.target.host().unwrap_or_default().to_owned();
    let until = Instant::now() + ASKED_FOR;
    let goes_on = || Instant::now() < until && !app.cancel.is_cancelled();
    in_turns(BTreeMap::from([(registry, waiting.into())]), goes_on, ask).await
}

/// Takes the next piece for the registry that has the fewest under way, if it may have more.
fn next<T>(
    waiting: &mut BTreeMap<String, VecDeque<T>>,
    running_at: &HashMap<String, usize>,
) -> Option<(String, T)> {
    waiting.retain(|_, items| !items.is_empty());
    let only_run = running_at
        .keys()
        .filter(|registry| !waiting.contains_key(*registry))
        .count();
    let share = (AT_ONCE / (waiting.len() + only_run).max(1)).max(1);
    let count = |registry: &String| running_at.get(registry).copied().unwrap_or(0);
    let registry = waiting.keys().min_by_key(|registry| count(registry))?;
    if count(registry) >= share {
        return None;
    }
    let registry = registry.clone();
    let item = waiting.get_mut(&registry)?.pop_front()?;
    Some((registry, item))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tokio::sync::Semaphore;

    use super::*;

    fn waiting(some: &[(&str, usize)]) -> BTreeMap<String, VecDeque<(String, usize)>> {
        let items = |name: &str, count: usize| (0..count).map(|n| (name.to_owned(), n)).collect();
        let some = some.iter();
        some.map(|(name, count)| ((*name).to_owned(), items(name, *count)))
            .collect()
    }

    #[tokio::test]
    async fn a_registry_that_hangs_holds_back_no_other() {
        let hung = Semaphore::new(0);
        let (now, most, answered) = (
            AtomicUsize::new(0),
            AtomicUsize::new(0),
            AtomicUsize::new(0),
        );
        let work = async |(registry, n): (String, usize)| {
            let running = now.fetch_add(1, Ordering::SeqCst) + 1;
            most.fetch_max(running, Ordering::SeqCst);
            if registry == "hangs" {
                // Until all of the other one are done.
                let _ = hung.acquire().await;
            } else {
                tokio::task::yield_now().await;
                if answered.fetch_add(1, Ordering::SeqCst) + 1 == 50 {
                    hung.close();
                }
            }
            now.fetch_sub(1, Ordering::SeqCst);
            (registry, n)
        };
        let all = waiting(&[("answers", 50), ("hangs", 100)]);
        let turns = in_turns(all, || true, work);
        let ended = tokio::time::timeout(Duration::from_secs(60), turns).await;
        let (done, left) = ended.expect("the registry that hangs holds back the other one");
        assert_eq!((done.len(), left.len()), (150, 0));
        assert_eq!(most.into_inner(), AT_ONCE);
    }

    #[tokio::test]
    async fn what_is_not_begun_is_returned_and_what_is_begun_ends() {
        let begun = AtomicUsize::new(0);
        let goes_on = || begun.load(Ordering::SeqCst) < 11;
        let work = async |(_, n): (String, usize)| {
            begun.fetch_add(1, Ordering::SeqCst);
            tokio::task::yield_now().await;
            n
        };
        let (mut done, left) = in_turns(waiting(&[("a", 50)]), goes_on, work).await;
        done.sort_unstable();
        assert!(done.len() >= 11 && done.len() < 11 + AT_ONCE, "{done:?}");
        let begun: Vec<usize> = (0..done.len()).collect();
        assert_eq!(done, begun, "in order");
        assert_eq!(left.len(), 50 - done.len());
    }

    #[tokio::test]
    async fn more_registries_than_places_all_get_their_turn() {
        let names: Vec<String> = (0..20).map(|n| format!("r{n}")).collect();
        let some: Vec<(&str, usize)> = names.iter().map(|name| (name.as_str(), 3)).collect();
        let (done, left) = in_turns(waiting(&some), || true, async |item| item).await;
        assert_eq!((done.len(), left.len()), (60, 0));
    }
}
