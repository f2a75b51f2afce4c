//! The room that a save needs at its destination. It is checked before anything is written or mounted there, estimated
//! while the first layer is compressed, and compared exactly before each blob is completed: a registry charges a blob
//! when it is completed, so a save that is refused leaves nothing.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use super::{Error, base};
use crate::common::digest::Digest;
use crate::node::container::BaseLayer;
use crate::store::destination::Destination;
use crate::store::harbor::{Budget, Needed};

/// Bytes of tar after which, and no earlier than at its half, the measured ratio of compression is used for an estimate.
const MEASURED: u64 = 64 << 20;
/// The part of an estimate that has to fit, in percent: the rest of the data may compress better than its beginning.
const BOUND: u64 = 75;
/// Bytes for config and manifest.
const DOCUMENTS: u64 = 32 << 10;

/// The room at a destination, and what of it is spoken for.
pub(super) struct Room {
    /// `None` if the destination has no quota, or does not show it.
    budget: Option<Budget>,
    /// Bytes free when last asked for, less the blobs completed since.
    free: AtomicU64,
    /// Sizes of the layers that are mounted or copied later.
    later: Mutex<BTreeMap<Digest, u64>>,
    /// Layers that the registry has, but for which the project is possibly not charged yet. That is found out only if
    /// they would not fit: Harbor counts it as pulls.
    doubtful: Mutex<Doubtful>,
    /// Bytes that this save has completed or mounted.
    completed: AtomicU64,
}

/// Layers that are at the destination, and what the manifest that names them costs for them.
#[derive(Default)]
struct Doubtful {
    sizes: BTreeMap<Digest, u64>,
    /// Number of bytes that the manifest costs at least. `None` if it is not known.
    cost: Option<u64>,
}

impl Default for Room {
    fn default() -> Self {
        Self {
            budget: None,
            free: AtomicU64::new(u64::MAX),
            later: Mutex::default(),
            doubtful: Mutex::default(),
            completed: AtomicU64::new(0),
        }
    }
}

impl Room {
    pub(super) async fn of(destination: &Destination) -> Result<Self, Error> {
        let budget = destination.budget().await?;
        let free = budget.as_ref().map_or(u64::MAX, Budget::free);
        Ok(Self {
            budget,
            free: AtomicU64::new(free),
            ..Self::default()
        })
    }

    /// Adds layers that the image has besides its new ones, and checks that they fit. Only queries are sent.
    pub(super) async fn add(
        &self,
        destination: &Destination,
        layers: &[BaseLayer],
    ) -> Result<(), Error> {
        if self.budget.is_none() {
            return Ok(());
        }
        for (digest, size, there) in base::sizes(destination, layers).await? {
            if there {
                let mut doubtful = self.doubtful();
                doubtful.sizes.insert(digest, size);
                doubtful.cost = None;
            } else {
                self.later().insert(digest, size);
            }
        }
        self.resolve_if_tight(0).await;
        let later = self.with_later(0) - DOCUMENTS;
        if later == 0 {
            return Ok(());
        }
        self.admit(self.with_later(0), Needed::Base(later))
    }

    fn later(&self) -> std::sync::MutexGuard<'_, BTreeMap<Digest, u64>> {
        self.later.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn doubtful(&self) -> std::sync::MutexGuard<'_, Doubtful> {
        self.doubtful.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Finds out what the doubtful layers cost, if `bytes` more and all of them would not fit.
    async fn resolve_if_tight(&self, bytes: u64) {
        let Some(budget) = &self.budget else { return };
        let doubtful = {
            let doubtful = self.doubtful();
            if doubtful.sizes.is_empty() || doubtful.cost.is_some() {
                return;
            }
            doubtful.sizes.clone()
        };
        let most = doubtful.values().fold(self.with_later(bytes), |sum, size| {
            sum.saturating_add(*size)
        });
        if most <= self.free.load(Ordering::Relaxed) {
            return;
        }
        let completed = self.completed.load(Ordering::Relaxed);
        match budget.uncharged(&doubtful, completed).await {
            Ok(cost) => self.doubtful().cost = Some(cost),
            Err(error) => {
                tracing::debug!(%error, "what the project is charged for is not told");
            }
        }
    }

    fn admit(&self, bytes: u64, needed: Needed) -> Result<(), Error> {
        match &self.budget {
            Some(budget) if bytes > self.free.load(Ordering::Relaxed) => {
                Err(Error::Destination(budget.exceeded(needed).into()))
            }
            _ => Ok(()),
        }
    }

    fn with_later(&self, bytes: u64) -> u64 {
        let later: u64 = self.later().values().sum();
        let at_manifest = self.doubtful().cost.unwrap_or(0);
        bytes
            .saturating_add(later)
            .saturating_add(at_manifest)
            .saturating_add(DOCUMENTS)
    }

    /// Checks `sent` compressed bytes, of which no blob is complete yet, made of `done` of `total` bytes of tar.
    pub(super) fn check_sent(&self, sent: u64, done: u64, total: u64) -> Result<(), Error> {
        if self.budget.is_none() {
            return Ok(());
        }
        let sure = self.with_later(sent);
        let Some(estimate) = estimate(sent, done, total) else {
            return self.admit(sure, Needed::About(sure));
        };
        let bound = self.with_later(estimate / 100 * BOUND).max(sure);
        self.admit(bound, Needed::About(self.with_later(estimate)))
    }

    /// Checks the exact size of blobs that are about to be completed, against the quota as it is now.
    pub(super) async fn check_exactly(&self, bytes: u64) -> Result<(), Error> {
        let Some(budget) = &self.budget else {
            return Ok(());
        };
        if let Some(free) = budget.ask_again().await {
            self.free.store(free, Ordering::Relaxed);
        }
        self.resolve_if_tight(bytes).await;
        let needed = self.with_later(bytes);
        self.admit(needed, Needed::Exactly(needed))
    }

    /// Notes a layer that was to be mounted or copied and is at the destination now.
    pub(super) fn arrived(&self, digest: &Digest) {
        let size = self.later().remove(digest);
        self.spend(size.unwrap_or(0));
    }

    /// Notes blobs that were completed.
    pub(super) fn spend(&self, bytes: u64) {
        self.completed.fetch_add(bytes, Ordering::Relaxed);
        let less = |free: u64| Some(free.saturating_sub(bytes));
        let _ = self
            .free
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }
}

/// Returns the compressed size of `total` bytes of tar by the ratio of those done. Returns `None` while too few are.
fn estimate(sent: u64, done: u64, total: u64) -> Option<u64> {
    // The beginning says little of what follows.
    if done < MEASURED || done < total / 2 || done >= total {
        return None;
    }
    u64::try_from(u128::from(sent) * u128::from(total) / u128::from(done)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_arrived_is_counted_once() {
        let room = Room {
            free: AtomicU64::new(100 << 20),
            ..Room::default()
        };
        let layer = Digest::of("a layer of the last save");
        room.later().insert(layer, 40 << 20);
        room.arrived(&layer);
        assert_eq!(room.with_later(25 << 20), (25 << 20) + DOCUMENTS);
        assert_eq!(room.free.load(Ordering::Relaxed), 60 << 20);
        room.arrived(&layer);
        assert_eq!(room.free.load(Ordering::Relaxed), 60 << 20, "only once");
    }

    #[test]
    fn estimates_need_some_data() {
        assert_eq!(estimate(10 << 20, 32 << 20, 320 << 20), None);
        assert_eq!(estimate(10 << 20, 64 << 20, 640 << 20), None);
        assert_eq!(estimate(50 << 20, 320 << 20, 640 << 20), Some(100 << 20));
        assert_eq!(estimate(10 << 20, 640 << 20, 640 << 20), None);
        assert_eq!(estimate(u64::MAX, 64 << 20, u64::MAX), None);
    }
}
