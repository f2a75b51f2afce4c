//! Reports what a save waits for. It is looked at in intervals: short waits, of which there may be thousands, are no
//! events.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;

use crate::common::waits::{WaitReason, Waits};
use crate::save::event::{Event, Observer};

/// Interval of looks. A wait is reported if it is seen twice in a row.
const INTERVAL: Duration = Duration::from_millis(400);
/// Maximum number of waits that are reported in one save.
const MAX_REPORTED: u32 = 200;

/// Reports until it is dropped.
pub(super) struct Reporter(JoinHandle<()>);

impl Drop for Reporter {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Reporter {
    /// Begins to report what `waits` shows.
    pub(super) fn start(waits: Arc<Waits>, observer: Arc<dyn Observer>) -> Self {
        Self(tokio::spawn(async move {
            let mut looks = Looks::default();
            let mut ticks = tokio::time::interval(INTERVAL);
            while !looks.are_over() {
                ticks.tick().await;
                if let Some(event) = looks.look(waits.current()) {
                    observer.event(event);
                }
            }
        }))
    }
}

/// What the looks have shown.
#[derive(Default)]
struct Looks {
    last: Option<WaitReason>,
    told: Option<WaitReason>,
    /// Time until the end that was told, less what has passed since.
    left: Duration,
    count: u32,
}

impl Looks {
    fn are_over(&self) -> bool {
        self.count >= MAX_REPORTED && self.told.is_none()
    }

    /// Takes a look, and returns the event if something is to be reported.
    fn look(&mut self, now: Option<(WaitReason, Option<Duration>)>) -> Option<Event> {
        let reason = now.map(|(reason, _)| reason);
        let seen_twice = reason == self.last;
        self.last = reason;
        self.left = self.left.saturating_sub(INTERVAL);
        let left = now.and_then(|(_, left)| left).unwrap_or_default();
        // Another pause, which ends later than the one that was told.
        let longer = left > self.left + INTERVAL;
        if !seen_twice || (reason == self.told && !longer) {
            return None;
        }
        // After the last one that is reported, only its end is.
        if reason.is_some() && self.count >= MAX_REPORTED {
            return None;
        }
        self.count += u32::from(reason.is_some());
        (self.told, self.left) = (reason, left);
        Some(Event::Waiting {
            reason,
            seconds: (!left.is_zero()).then_some(left.as_secs_f64()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waiting(reason: WaitReason, seconds: Option<f64>) -> Event {
        let reason = Some(reason);
        Event::Waiting { reason, seconds }
    }

    const OVER: Option<Event> = Some(Event::Waiting {
        reason: None,
        seconds: None,
    });

    #[test]
    fn a_wait_is_told_when_it_lasts_and_when_it_is_over() {
        let mut looks = Looks::default();
        let writers = Some((WaitReason::Writers, None));
        assert_eq!(looks.look(writers), None, "a short one");
        assert_eq!(looks.look(None), None);
        assert_eq!(looks.look(writers), None);
        assert_eq!(
            looks.look(writers),
            Some(waiting(WaitReason::Writers, None))
        );
        assert_eq!(looks.look(writers), None, "it is told already");
        assert_eq!(looks.look(None), None);
        assert_eq!(looks.look(None), OVER);
        assert_eq!(looks.look(None), None);
    }

    #[test]
    fn a_pause_is_told_with_its_length_and_again_when_there_is_another() {
        let mut looks = Looks::default();
        let pause = |seconds| Some((WaitReason::Registry, Some(Duration::from_secs(seconds))));
        assert_eq!(looks.look(pause(8)), None);
        assert_eq!(
            looks.look(pause(8)),
            Some(waiting(WaitReason::Registry, Some(8.0)))
        );
        for left in [7, 6, 5] {
            assert_eq!(looks.look(pause(left)), None);
        }
        assert_eq!(
            looks.look(pause(16)),
            Some(waiting(WaitReason::Registry, Some(16.0)))
        );
    }

    #[test]
    fn what_is_told_is_bounded() {
        let mut looks = Looks::default();
        let writers = Some((WaitReason::Writers, None));
        let mut told = 0;
        for _ in 0..1000 {
            for now in [writers, writers, None, None] {
                told += u32::from(looks.look(now).is_some());
            }
        }
        assert_eq!(told, 2 * MAX_REPORTED);
        assert!(looks.are_over());
    }
}
