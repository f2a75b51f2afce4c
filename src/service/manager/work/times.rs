//! Whether the manager's clock is plausible, and how old saves are, by the times of the record alone.
//!
//! A clock that is ahead makes all saves seem old, and one that was set wrong for an hour must not cost the saves of a month.
//! So time counts as far as the record saw it pass: of a time in which nothing was saved anywhere, for whatever reason, only
//! [`IDLE`] makes saves older, in whole days.

use crate::service::record::StoredAutosave;

const DAY_MS: i64 = 24 * 3600 * 1000;
/// How much of a time without any save makes other saves older.
const IDLE: i64 = 3 * DAY_MS;
/// By how much the newest save may be later than now: the clocks of managers differ.
const AHEAD: i64 = 10 * 60 * 1000;

/// Why the manager's clock is not trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Implausible {
    #[error(
        "by this manager's clock, the newest save is of later than now: the clock is wrong, or another one was"
    )]
    Behind,
    #[error(
        "by this manager's clock, there was no save for 3 days: the clock is wrong, or nothing was saved"
    )]
    Ahead,
}

/// The times without saves.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Times {
    /// The end of each such time, and how much of it does not count, in milliseconds.
    pauses: Vec<(i64, i64)>,
}

impl Times {
    /// Finds the times without saves before `now_ms`. `saved` are times at which something was saved, in ascending order.
    ///
    /// Fails if `now_ms` does not fit to the last of them.
    pub(super) fn new(saved: &[i64], now_ms: i64) -> Result<Self, Implausible> {
        let newest = saved.last().copied().unwrap_or(now_ms);
        if newest > now_ms.saturating_add(AHEAD) {
            return Err(Implausible::Behind);
        }
        if now_ms.saturating_sub(newest) > IDLE {
            return Err(Implausible::Ahead);
        }
        let pause = |two: &[i64]| {
            let [before, after] = two else { return None };
            let excess = after.saturating_sub(*before).saturating_sub(IDLE);
            let days = excess.div_euclid(DAY_MS);
            (days > 0).then_some((*after, days * DAY_MS))
        };
        Ok(Self {
            pauses: saved.windows(2).filter_map(pause).collect(),
        })
    }

    /// Returns the saves with times as if those pauses had been as short as what counts of them.
    pub(super) fn counted(&self, mut saves: Vec<StoredAutosave>) -> Vec<StoredAutosave> {
        for save in &mut saves {
            let later = self.pauses.iter().filter(|(end, _)| save.at_ms < *end);
            save.at_ms += later.map(|(_, excess)| excess).sum::<i64>();
        }
        saves
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::super::thinning::superfluous;
    use super::*;
    use crate::service::job::JobId;

    const NOW: i64 = 1_764_000_000_000;
    const HOUR_MS: i64 = 3600 * 1000;

    fn saves(times: impl Iterator<Item = i64>) -> Vec<StoredAutosave> {
        let save = |at_ms| StoredAutosave {
            id: JobId::new(),
            session: "s".to_owned(),
            repository: "h.example/alice/n".to_owned(),
            at_ms,
            keep: 1,
        };
        times.map(save).collect()
    }

    fn gone(times: &Times, saves: &[StoredAutosave], now_ms: i64) -> usize {
        let counted = times.counted(saves.to_vec());
        superfluous(&counted, now_ms, |_| 1, &HashSet::from(["s"])).len()
    }

    #[test]
    fn a_clock_that_does_not_fit_to_the_newest_save_is_not_trusted() {
        let new = |now_ms| Times::new(&[NOW - DAY_MS, NOW], now_ms).map(|_| ());
        for now_ms in [NOW, NOW + 3 * DAY_MS, NOW - AHEAD] {
            assert_eq!(new(now_ms), Ok(()));
        }
        assert_eq!(new(NOW + 31 * DAY_MS), Err(Implausible::Ahead));
        assert_eq!(new(NOW + IDLE + 1), Err(Implausible::Ahead));
        assert_eq!(new(NOW - AHEAD - 1), Err(Implausible::Behind));
        assert_eq!(Times::new(&[], NOW), Ok(Times::default()));
    }

    #[test]
    fn a_save_by_a_clock_that_is_ahead_makes_no_other_save_old() -> Result<(), Implausible> {
        // One each day for 20 days, and then one by a clock that is 31 days ahead.
        let before: Vec<i64> = (0..20).map(|n| NOW - (19 - n) * DAY_MS).collect();
        let ahead = NOW + 31 * DAY_MS;
        let all = [before.as_slice(), &[ahead]].concat();
        let saves = saves(all.iter().copied());
        assert_eq!(gone(&Times::default(), &saves, ahead), 20, "without");
        assert_eq!(gone(&Times::new(&all, ahead)?, &saves, ahead), 0);
        Ok(())
    }

    #[test]
    fn while_there_are_saves_all_time_counts() -> Result<(), Implausible> {
        let all: Vec<i64> = (0..24 * 60)
            .map(|n| NOW - (24 * 60 - n) * HOUR_MS)
            .collect();
        let times = Times::new(&all, NOW)?;
        assert_eq!(times, Times::default());
        let saves = saves(all.into_iter());
        assert_eq!(times.counted(saves.clone()), saves);
        Ok(())
    }

    #[test]
    fn several_pauses_add_up_and_the_hour_of_a_save_stays() -> Result<(), Implausible> {
        let all = [NOW - 40 * DAY_MS, NOW - 20 * DAY_MS, NOW - 10 * DAY_MS, NOW];
        let times = Times::new(&all, NOW)?;
        let counted = times.counted(saves(all.into_iter()));
        let ages: Vec<i64> = counted
            .iter()
            .map(|save| (NOW - save.at_ms) / DAY_MS)
            .collect();
        assert_eq!(ages, [9, 6, 3, 0]);
        for (save, at_ms) in counted.iter().zip(all) {
            assert_eq!((save.at_ms - at_ms) % DAY_MS, 0);
        }
        Ok(())
    }
}
