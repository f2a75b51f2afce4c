//! Cancellation of a save: one flag that threads poll and async tasks await.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::Notify;

/// A cancellation flag. Clones share the same state.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    flag: AtomicBool,
    wake: Notify,
}

/// Error of a cancelled save. The program exits with code 130.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cancelled")]
pub struct Cancelled;

impl Cancel {
    /// Sets the flag and wakes all tasks that wait on any clone. Cannot be undone.
    pub fn cancel(&self) {
        self.0.flag.store(true, Ordering::SeqCst);
        self.0.wake.notify_waiters();
    }

    /// Returns [`Cancelled`] if the flag is set. Meant for loops in threads.
    pub fn check(&self) -> Result<(), Cancelled> {
        if self.is_cancelled() {
            Err(Cancelled)
        } else {
            Ok(())
        }
    }

    /// Returns whether the flag is set.
    pub fn is_cancelled(&self) -> bool {
        self.0.flag.load(Ordering::SeqCst)
    }

    /// Returns the underlying atomic flag, for code that does not depend on this type.
    pub fn flag(&self) -> &AtomicBool {
        &self.0.flag
    }

    /// Waits until the flag is set. Meant for `tokio::select!`.
    pub async fn cancelled(&self) -> Cancelled {
        loop {
            let woken = self.0.wake.notified();
            // The waiter is registered before the flag is read, so that a cancellation in between is not missed.
            tokio::pin!(woken);
            woken.as_mut().enable();
            if self.is_cancelled() {
                return Cancelled;
            }
            woken.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn waiters_hear_of_it_before_and_after() {
        let cancel = Cancel::default();
        assert_eq!(cancel.check(), Ok(()));
        let waiting = tokio::spawn({
            let cancel = cancel.clone();
            async move { cancel.cancelled().await }
        });
        tokio::task::yield_now().await;
        cancel.cancel();
        assert_eq!(waiting.await.ok(), Some(Cancelled));
        assert_eq!(cancel.cancelled().await, Cancelled);
        assert_eq!(cancel.check(), Err(Cancelled));
    }
}
