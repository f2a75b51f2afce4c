//! Saves of several containers at one instant: every container is frozen before the first one is read, and no image gets
//! its tag before all are complete.
//!
//! Each container may run again as soon as it has been read: what was read of it is its state at the moment at which all
//! stood still. If one save fails, those that have not written a tag fail, too.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::watch;

use super::Error;

/// A point that all saves reach before the first one goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Point {
    /// Ready to freeze.
    Ready,
    /// The freezer is claimed.
    Claimed,
    /// The container stands still.
    Frozen,
    /// Everything but the tag is at the destination.
    Complete,
}

#[derive(Clone, Debug, Default)]
struct State {
    reached: BTreeSet<(Point, usize)>,
    failed: bool,
}

impl State {
    fn count(&self, point: Point) -> usize {
        self.reached.iter().filter(|(at, _)| *at == point).count()
    }
}

/// One of several saves at one instant. Clones are the same save.
#[derive(Clone, Debug)]
pub(crate) struct Member {
    state: Arc<watch::Sender<State>>,
    number: usize,
    count: usize,
    /// Whether it has begun to freeze. A second freeze would be another instant.
    begun: Arc<AtomicBool>,
}

impl Member {
    /// Creates the members of a group. Groups that have containers in common must number them in the same order.
    pub(crate) fn group(count: usize) -> Vec<Self> {
        let state = Arc::new(watch::Sender::new(State::default()));
        let member = |number| Self {
            state: Arc::clone(&state),
            number,
            count,
            begun: Arc::default(),
        };
        (0..count).map(member).collect()
    }

    /// Makes the others fail at their next point.
    pub(crate) fn fail(&self) {
        self.state.send_modify(|state| state.failed = true);
    }

    /// Waits until all are ready to freeze, and until those with lower numbers have claimed their freezers: two groups
    /// that wait for each other's claims would never end.
    pub(super) async fn take_turn(&self) -> Result<(), Error> {
        if self.begun.swap(true, Ordering::SeqCst) {
            return Err(Error::NotTogether {
                why: "a container has to be read once more, at another instant",
            });
        }
        self.meet(Point::Ready).await?;
        self.wait(|state| state.count(Point::Claimed) >= self.number)
            .await
    }

    /// Waits until all have claimed their freezers.
    pub(super) async fn claimed(&self) -> Result<(), Error> {
        self.meet(Point::Claimed).await
    }

    /// Waits until all containers stand still.
    pub(super) async fn frozen(&self) -> Result<(), Error> {
        self.meet(Point::Frozen).await
    }

    /// Waits until all images are complete.
    pub(super) async fn complete(&self) -> Result<(), Error> {
        self.meet(Point::Complete).await
    }

    async fn meet(&self, point: Point) -> Result<(), Error> {
        self.state.send_modify(|state| {
            state.reached.insert((point, self.number));
        });
        self.wait(|state| state.count(point) == self.count).await
    }

    async fn wait(&self, go_on: impl Fn(&State) -> bool) -> Result<(), Error> {
        let mut changes = self.state.subscribe();
        let state = changes.wait_for(|state| state.failed || go_on(state)).await;
        // The sender is this member's own.
        match state {
            Ok(state) if !state.failed => Ok(()),
            _ => Err(Error::NotTogether {
                why: "the save of another container of the pod failed",
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[tokio::test]
    async fn none_is_read_before_all_stand_still() {
        let log = Mutex::new(Vec::new());
        let say = |what: &str, member: &Member| {
            if let Ok(mut log) = log.lock() {
                log.push(format!("{what}{}", member.number));
            }
        };
        let save = async |member: Member| {
            member.take_turn().await?;
            say("claim", &member);
            member.claimed().await?;
            say("freeze", &member);
            member.frozen().await?;
            say("read", &member);
            member.complete().await?;
            say("tag", &member);
            Ok::<_, Error>(())
        };
        // The last one first: the order of claims is that of the numbers.
        let members = Member::group(3).into_iter().rev();
        let ended = futures_util::future::join_all(members.map(&save)).await;
        assert!(ended.iter().all(Result::is_ok));
        let log = log.into_inner().unwrap_or_default();
        assert_eq!(log[..3], ["claim0", "claim1", "claim2"]);
        for (at, what) in ["claim", "freeze", "read", "tag"].iter().enumerate() {
            let part = &log[at * 3..at * 3 + 3];
            assert!(part.iter().all(|said| said.starts_with(what)), "{log:?}");
        }
    }

    #[tokio::test]
    async fn one_that_fails_ends_all() {
        let members = Member::group(2);
        let waits = async {
            members[0].take_turn().await?;
            members[0].claimed().await
        };
        let fails = async {
            let turn = members[1].take_turn();
            futures_util::future::select(Box::pin(turn), Box::pin(tokio::task::yield_now())).await;
            members[1].fail();
        };
        let (waited, ()) = tokio::join!(waits, fails);
        assert!(
            matches!(waited, Err(Error::NotTogether { .. })),
            "{waited:?}"
        );
        // Also those that come later, and a second freeze.
        assert!(members[1].complete().await.is_err());
        assert!(members[0].take_turn().await.is_err());
    }
}
