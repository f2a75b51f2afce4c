//! What a save waits for beside its own work, counted where it waits and looked at by who reports it.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// What a running save waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WaitReason {
    /// Programs are writing to files that are about to be read.
    Writers,
    /// A registry does not answer, or answered in a way after which the request is sent again after a pause.
    Registry,
    /// Another save of the container is under way.
    OtherSave,
}

/// What a save waits for now. Shared by all its tasks and threads.
#[derive(Debug, Default)]
pub struct Waits {
    writers: AtomicU32,
    other_save: AtomicU32,
    /// Requests that a registry has not answered for some time.
    unanswered: AtomicU32,
    /// End of the latest pause before a request is sent again.
    registry: Mutex<Option<Instant>>,
}

/// Counts a wait until it is dropped.
#[derive(Debug)]
pub(crate) struct Waiting {
    waits: Arc<Waits>,
    reason: WaitReason,
}

impl Waits {
    fn count(&self, reason: WaitReason) -> &AtomicU32 {
        match reason {
            WaitReason::Writers => &self.writers,
            WaitReason::OtherSave => &self.other_save,
            WaitReason::Registry => &self.unanswered,
        }
    }

    /// Begins a wait, which ends when the value is dropped.
    pub(crate) fn begin(self: &Arc<Self>, reason: WaitReason) -> Waiting {
        self.count(reason).fetch_add(1, Ordering::Relaxed);
        Waiting {
            waits: Arc::clone(self),
            reason,
        }
    }

    /// Notes that a request to a registry is sent again after `pause`.
    pub(crate) fn pause(&self, pause: Duration) {
        let end = Instant::now() + pause;
        let mut registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        *registry = (*registry).max(Some(end));
    }

    /// Returns what the save waits for, and for how long if that is known.
    pub(crate) fn current(&self) -> Option<(WaitReason, Option<Duration>)> {
        if self.other_save.load(Ordering::Relaxed) > 0 {
            return Some((WaitReason::OtherSave, None));
        }
        if self.writers.load(Ordering::Relaxed) > 0 {
            return Some((WaitReason::Writers, None));
        }
        if self.unanswered.load(Ordering::Relaxed) > 0 {
            return Some((WaitReason::Registry, None));
        }
        let registry = *self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        let left = registry?.checked_duration_since(Instant::now())?;
        (!left.is_zero()).then_some((WaitReason::Registry, Some(left)))
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let count = self.waits.count(self.reason);
        count.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_lasts_until_all_have_ended() {
        let waits = Arc::new(Waits::default());
        assert_eq!(waits.current(), None);
        let (one, two) = (
            waits.begin(WaitReason::Writers),
            waits.begin(WaitReason::Writers),
        );
        drop(one);
        assert_eq!(waits.current(), Some((WaitReason::Writers, None)));
        let other = waits.begin(WaitReason::OtherSave);
        assert_eq!(waits.current(), Some((WaitReason::OtherSave, None)));
        drop((two, other));
        assert_eq!(waits.current(), None);
        let unanswered = waits.begin(WaitReason::Registry);
        assert_eq!(waits.current(), Some((WaitReason::Registry, None)));
        drop(unanswered);
        assert_eq!(waits.current(), None);
        waits.pause(Duration::from_secs(3600));
        // A shorter pause of another request does not end the longer one.
        waits.pause(Duration::ZERO);
        let (reason, left) = waits.current().unwrap();
        assert_eq!(reason, WaitReason::Registry);
        assert!(left > Some(Duration::from_secs(3000)), "{left:?}");
    }
}
