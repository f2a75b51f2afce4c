//! The counts behind [`Event::Progress`]: one total for everything that a save reads or sends, so that a bar is true to
//! the end.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::common::digest::DiffId;
use crate::save::event::{Event, Observer};

/// Counts of a save.
#[derive(Default)]
pub(super) struct Tally(Mutex<Counts>);

#[derive(Default)]
struct Counts {
    /// Of the rounds before the current one.
    before: Round,
    round: Round,
    /// Layers of the base and of earlier saves that the destination lacks: bytes done and in all.
    others: BTreeMap<DiffId, (u64, u64)>,
}

/// Tar bytes of one round of streaming.
#[derive(Clone, Copy, Default)]
struct Round {
    done: u64,
    total: u64,
    sent: u64,
    entries: u64,
}

impl Tally {
    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a round: what changed meanwhile, or layers that are made again, come on top of the rounds before.
    pub(super) fn begin(&self, total: u64, entries: u64) {
        let mut counts = self.lock();
        let last = counts.round;
        counts.before = Round {
            done: counts.before.done + last.done,
            // A round that failed is not continued.
            total: counts.before.total + last.done,
            sent: counts.before.sent + last.sent,
            entries: counts.before.entries + last.entries,
        };
        counts.round = Round {
            total,
            entries,
            ..Round::default()
        };
    }

    /// Sets how far the round is.
    pub(super) fn advance(&self, done: u64, sent: u64) {
        let mut counts = self.lock();
        counts.round.done = done;
        counts.round.sent = sent;
    }

    /// Adds a layer that has to be brought to the destination. `total` is its size in bytes; 0 if it is not known.
    pub(super) fn expect(&self, layer: DiffId, total: u64) {
        self.lock().others.entry(layer).or_insert((0, total));
    }

    /// Sets how much of such a layer is brought. `total` is 0 if it is not known, or the known one stays.
    pub(super) fn bring(&self, layer: DiffId, done: u64, total: u64) {
        let mut counts = self.lock();
        let count = counts.others.entry(layer).or_default();
        if total > 0 {
            count.1 = total;
        }
        count.1 = count.1.max(done);
        count.0 = done;
    }

    /// Notes that such a layer is at the destination, if it was expected at all.
    pub(super) fn arrived(&self, layer: DiffId) {
        if let Some(count) = self.lock().others.get_mut(&layer) {
            count.0 = count.1;
        }
    }

    /// Reports the counts.
    pub(super) fn report(&self, observer: &dyn Observer) {
        let counts = self.lock();
        let (before, round) = (counts.before, counts.round);
        let others = counts.others.values();
        let (base_done, base_total) =
            others.fold((0, 0), |(done, total), one| (done + one.0, total + one.1));
        drop(counts);
        observer.event(Event::Progress {
            bytes_done: before.done + round.done,
            bytes_total: before.total + round.total,
            bytes_sent: before.sent + round.sent,
            entries_total: before.entries + round.entries,
            base_done,
            base_total,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::common::digest::Digest;

    #[derive(Default)]
    struct Heard(Mutex<Vec<Event>>);

    impl Observer for Heard {
        fn event(&self, event: Event) {
            self.0.lock().unwrap().push(event);
        }
    }

    #[test]
    fn rounds_and_base_layers_add_up_and_never_go_back() {
        let (tally, heard) = (Tally::default(), Heard::default());
        let layer = |name: &str| DiffId(Digest::of(name));
        let (one, two) = (layer("one"), layer("two"));
        tally.begin(100, 3);
        tally.expect(one, 50);
        tally.expect(one, 70);
        let mut expected = Vec::new();
        for (done, sent) in [(40, 10), (100, 30)] {
            tally.advance(done, sent);
            tally.report(&heard);
            expected.push((done, 100, sent, 3, 0, 50));
        }
        // A second round, of what changed meanwhile.
        tally.begin(20, 1);
        tally.advance(20, 5);
        tally.report(&heard);
        expected.push((120, 120, 35, 4, 0, 50));
        // The size of a layer that is made again becomes known while it is made.
        tally.bring(two, 10, 80);
        tally.bring(one, 25, 0);
        tally.report(&heard);
        expected.push((120, 120, 35, 4, 35, 130));
        tally.arrived(one);
        tally.bring(two, 80, 80);
        tally.arrived(layer("not expected"));
        tally.report(&heard);
        expected.push((120, 120, 35, 4, 130, 130));
        let heard = heard.0.into_inner().unwrap();
        let told: Vec<_> = heard
            .iter()
            .map(|event| match event {
                Event::Progress {
                    bytes_done,
                    bytes_total,
                    bytes_sent,
                    entries_total,
                    base_done,
                    base_total,
                } => (
                    *bytes_done,
                    *bytes_total,
                    *bytes_sent,
                    *entries_total,
                    *base_done,
                    *base_total,
                ),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(told, expected);
    }
}
