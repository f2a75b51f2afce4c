//! Which autosaves are not needed any more.
//!
//! Of each session that still lives the latest ones are kept, as many as its policy says; besides, the last one of each hour
//! (UTC) for a day, and the last one of each day for 30 days. Those of all ended sessions with the same name are treated as
//! of one session, so that the number of images of a name is bounded however often it is started. What is older goes, except
//! the last one of a session that still lives, and the last one of all images of a user with the same name.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use crate::service::job::JobId;
use crate::service::record::StoredAutosave;

const HOUR_MS: i64 = 3600 * 1000;
const DAY_MS: i64 = 24 * HOUR_MS;
/// How long the last one of each hour is kept.
const HOURS_FOR: i64 = DAY_MS;
/// How long anything is kept.
const DAYS_FOR: i64 = 30 * DAY_MS;

/// Saves that are thinned together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Group<'a> {
    /// Those of a session that still lives.
    Living(&'a str),
    /// Those of the ended sessions whose images have this name.
    Ended(&'a str),
}

fn group<'a>(save: &'a StoredAutosave, living: &HashSet<&str>) -> Group<'a> {
    if living.contains(save.session.as_str()) {
        Group::Living(&save.session)
    } else {
        Group::Ended(&save.repository)
    }
}

/// Returns those of `saves` that are not needed at `now_ms` (milliseconds since the epoch, UTC). `keep` gives the number of
/// the latest ones to keep of the session of a save, which is the last one of it; `living` has the sessions that still
/// live.
pub(super) fn superfluous(
    saves: &[StoredAutosave],
    now_ms: i64,
    keep: impl Fn(&StoredAutosave) -> u32,
    living: &HashSet<&str>,
) -> Vec<JobId> {
    // A clock that was ahead must not make a save last longer.
    let latest_first =
        |save: &&StoredAutosave| std::cmp::Reverse((save.at_ms.min(now_ms), save.at_ms, save.id));
    let mut sessions = BTreeMap::<Group<'_>, Vec<&StoredAutosave>>::new();
    let mut last_of_name = BTreeMap::<&str, &StoredAutosave>::new();
    for save in saves {
        sessions.entry(group(save, living)).or_default().push(save);
        let last = last_of_name.entry(&save.repository).or_insert(save);
        if latest_first(&save) < latest_first(&&**last) {
            *last = save;
        }
    }
    let mut kept: BTreeSet<JobId> = last_of_name.into_values().map(|save| save.id).collect();
    for (session, mut of_session) in sessions {
        of_session.sort_by_key(latest_first);
        let Some(last) = of_session.first() else {
            continue;
        };
        if matches!(session, Group::Living(_)) {
            kept.insert(last.id);
        }
        let most = keep(last) as usize;
        let (mut hours, mut days) = (HashSet::new(), HashSet::new());
        for (place, save) in of_session.into_iter().enumerate() {
            let at_ms = save.at_ms.min(now_ms);
            let age = now_ms.saturating_sub(at_ms);
            if age > DAYS_FOR {
                break;
            }
            let of_hour = hours.insert(at_ms.div_euclid(HOUR_MS)) && age < HOURS_FOR;
            let of_day = days.insert(at_ms.div_euclid(DAY_MS));
            if place < most || of_hour || of_day {
                kept.insert(save.id);
            }
        }
    }
    let superfluous = saves.iter().filter(|save| !kept.contains(&save.id));
    superfluous.map(|save| save.id).collect()
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{RngExt as _, SeedableRng as _};

    use super::*;

    const NOW: i64 = 1_764_000_000_000;
    const MINUTE_MS: i64 = 60 * 1000;

    fn save(session: &str, name: &str, at_ms: i64) -> StoredAutosave {
        StoredAutosave {
            id: JobId::new(),
            session: session.to_owned(),
            repository: format!("h.example/alice/{name}"),
            at_ms,
            keep: 0,
        }
    }

    fn without(saves: &[StoredAutosave], gone: &[JobId]) -> Vec<StoredAutosave> {
        let kept = saves.iter().filter(|save| !gone.contains(&save.id));
        kept.cloned().collect()
    }

    /// A random history of up to five sessions with two names over up to 40 days before [`NOW`], in order of time.
    fn history(random: &mut StdRng) -> Vec<StoredAutosave> {
        let mut saves = Vec::new();
        for session in 0..random.random_range(1..=5) {
            let name = format!("n{}", random.random_range(0..2));
            let mut at_ms = NOW - random.random_range(0..40 * DAY_MS);
            for _ in 0..random.random_range(0..300) {
                let pause = match random.random_range(0..20) {
                    0 => random.random_range(0..5 * DAY_MS),
                    1 => 0,
                    _ => random.random_range(0..120) * MINUTE_MS,
                };
                at_ms += pause;
                if at_ms > NOW {
                    break;
                }
                saves.push(save(&format!("s{session}"), &name, at_ms));
            }
        }
        saves.sort_by_key(|save| (save.at_ms, save.id));
        saves
    }

    /// Checks what must hold of `left`, which thinning left of `all`.
    fn check(all: &[StoredAutosave], left: &[StoredAutosave], keep: u32, living: &HashSet<&str>) {
        let has = |save: &StoredAutosave| left.iter().any(|one| one.id == save.id);
        let last_by = |key: &dyn Fn(&StoredAutosave) -> Option<String>| {
            let mut last = BTreeMap::<String, &StoredAutosave>::new();
            for save in all {
                if let Some(key) = key(save) {
                    last.insert(key, save);
                }
            }
            last.into_values().collect::<Vec<_>>()
        };
        let age = |save: &StoredAutosave| NOW - save.at_ms;
        let hour = |save: &StoredAutosave| {
            let hour = (group(save, living), save.at_ms / HOUR_MS);
            (age(save) < DAY_MS).then(|| format!("{hour:?}"))
        };
        let day = |save: &StoredAutosave| {
            let day = (group(save, living), save.at_ms / DAY_MS);
            (age(save) <= DAYS_FOR).then(|| format!("{day:?}"))
        };
        let of_living = |save: &StoredAutosave| {
            let session = save.session.as_str();
            living.contains(session).then(|| session.to_owned())
        };
        let of_name = |save: &StoredAutosave| Some(save.repository.clone());
        let protected = [last_by(&of_living), last_by(&of_name)].concat();
        let needed = [last_by(&hour), last_by(&day), protected.clone()].concat();
        assert!(needed.iter().all(|save| has(save)));
        let groups: BTreeSet<Group<'_>> = all.iter().map(|save| group(save, living)).collect();
        for session in groups {
            let of_session = |saves: &[StoredAutosave]| -> Vec<StoredAutosave> {
                let own = saves.iter().filter(|save| group(save, living) == session);
                own.cloned().collect()
            };
            let recent = of_session(all).into_iter().rev().take(keep as usize);
            assert!(
                recent
                    .filter(|save| age(save) <= DAYS_FOR)
                    .all(|save| has(&save))
            );
            // So many hours and days begin within 24 hours and 30 days; one is that of the name or of what lives.
            let most = keep as usize + 25 + 31 + 1;
            assert!(of_session(left).len() <= most, "{session:?}");
        }
        for old in left.iter().filter(|save| age(save) > DAYS_FOR) {
            assert!(protected.iter().any(|save| save.id == old.id));
        }
    }

    #[test]
    fn what_is_needed_stays_and_no_more_than_is_bounded() {
        for seed in 0..300 {
            let mut random = StdRng::seed_from_u64(seed);
            let all = history(&mut random);
            let keep = random.random_range(1..=20);
            let living: HashSet<&str> = ["s0", "s1", "s2", "s3", "s4"]
                .into_iter()
                .filter(|_| random.random())
                .collect();
            let gone = superfluous(&all, NOW, |_| keep, &living);
            let left = without(&all, &gone);
            check(&all, &left, keep, &living);
            assert!(
                superfluous(&left, NOW, |_| keep, &living).is_empty(),
                "{seed}"
            );
            // After each save, and not only once.
            let mut step = Vec::new();
            for save in &all {
                step.push(save.clone());
                let gone = superfluous(&step, save.at_ms, |_| keep, &living);
                step = without(&step, &gone);
            }
            let gone = superfluous(&step, NOW, |_| keep, &living);
            assert_eq!(without(&step, &gone), left, "{seed}");
        }
    }

    #[test]
    fn a_thousand_saves_of_a_week_leave_the_latest_and_one_of_each_hour_and_day() {
        let all: Vec<_> = (0..1000)
            .map(|n| save("s", "n", NOW - 10 * MINUTE_MS * (999 - n)))
            .collect();
        let gone = superfluous(&all, NOW, |_| 12, &HashSet::new());
        let left = without(&all, &gone);
        // Of the latest two hours all, of the other hours of a day one each, and one of each day before.
        assert!(
            (12 + 21..=12 + 23 + 7).contains(&left.len()),
            "{}",
            left.len()
        );
    }

    #[test]
    fn a_clock_that_was_ahead_keeps_nothing_longer() {
        let all: Vec<_> = (0..100).map(|n| save("s", "n", NOW + n * DAY_MS)).collect();
        let gone = superfluous(&all, NOW, |_| 3, &HashSet::new());
        let left = without(&all, &gone);
        assert_eq!(left.len(), 3);
        assert_eq!(left.last(), all.last());
    }

    #[test]
    fn nothing_is_made_of_nothing() {
        let none = superfluous(&[], NOW, |_| 1, &HashSet::new());
        assert!(none.is_empty());
    }
}
