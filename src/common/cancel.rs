//! Stopping a save from outside: one flag that threads look at and tasks wait for.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::Notify;

/// A request to stop. Clones are the same request.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    flag: AtomicBool,
    wake: Notify,
}

/// What a stopped save ends with: exit code 130.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cancelled")]
pub struct Cancelled;

impl Cancel {
    /// Asks everybody who holds a clone to stop. Cannot be taken back.
    pub fn cancel(&self) {
        self.0.flag.store(true, Ordering::SeqCst);
        self.0.wake.notify_waiters();
    }

    /// For loops in threads.
    pub fn check(&self) -> Result<(), Cancelled> {
        if self.is_cancelled() {
            Err(Cancelled)
        } else {
            Ok(())
        }
    }

    /// Whether somebody asked.
    pub fn is_cancelled(&self) -> bool {
        self.0.flag.load(Ordering::SeqCst)
    }

    /// The bare flag, for code that knows only that.
    pub fn flag(&self) -> &AtomicBool {
        &self.0.flag
    }

    /// Waits until somebody asks; for `tokio::select!`.
    pub async fn cancelled(&self) -> Cancelled {
        loop {
            let woken = self.0.wake.notified();
            // Registered before the flag is read: a request in between is not missed.
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
