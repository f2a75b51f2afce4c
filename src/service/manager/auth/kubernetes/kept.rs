//! Answers that are kept for seconds, in a bounded number.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;

/// SHA-256 of what was asked. A token itself is never kept.
pub(super) type Key = [u8; 32];

/// Answers by the digest of the question.
pub(super) struct Kept<T> {
    answers: Mutex<HashMap<Key, (T, Instant)>>,
    lifetime: Duration,
    most: usize,
}

impl<T: Clone> Kept<T> {
    pub(super) fn new(lifetime: Duration, most: usize) -> Self {
        Self {
            answers: Mutex::default(),
            lifetime,
            most,
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Key, (T, Instant)>> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn get(&self, key: &Key) -> Option<T> {
        let answers = self.lock();
        let (answer, at) = answers.get(key)?;
        (at.elapsed() < self.lifetime).then(|| answer.clone())
    }

    /// Keeps an answer that was asked for at `asked`, unless as many as may be are kept already.
    pub(super) fn put(&self, key: Key, answer: T, asked: Instant) {
        let mut answers = self.lock();
        if answers.len() >= self.most {
            answers.retain(|_, (_, at)| at.elapsed() < self.lifetime);
        }
        if answers.len() < self.most {
            answers.insert(key, (answer, asked));
        }
    }
}

/// Counts events by origin in windows of a second.
pub(super) struct Counted<K> {
    counts: Mutex<(Option<Instant>, HashMap<K, u32>)>,
    most_each: u32,
    most_origins: usize,
}

impl<K: std::hash::Hash + Eq> Counted<K> {
    pub(super) fn new(most_each: u32, most_origins: usize) -> Self {
        Self {
            counts: Mutex::default(),
            most_each,
            most_origins,
        }
    }

    /// Counts one event. Returns false if there were too many of this origin, or of too many origins, in this second.
    pub(super) fn count(&self, origin: K) -> bool {
        let mut held = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let (since, counts) = &mut *held;
        if since.is_none_or(|since| since.elapsed() >= Duration::from_secs(1)) {
            *since = Some(Instant::now());
            counts.clear();
        }
        if counts.len() >= self.most_origins && !counts.contains_key(&origin) {
            return false;
        }
        let count = counts.entry(origin).or_default();
        *count += 1;
        *count <= self.most_each
    }
}

/// A number of places for each origin.
pub(super) struct Places<K> {
    of: Mutex<HashMap<K, Arc<Semaphore>>>,
    each: usize,
}

impl<K: std::hash::Hash + Eq> Places<K> {
    pub(super) fn new(each: usize) -> Self {
        Self {
            of: Mutex::default(),
            each,
        }
    }

    /// Returns the places of an origin. Those of which none is taken or waited for are forgotten.
    pub(super) fn of(&self, origin: K) -> Arc<Semaphore> {
        let mut places = self.of.lock().unwrap_or_else(PoisonError::into_inner);
        places.retain(|_, places| Arc::strong_count(places) > 1);
        let new = || Arc::new(Semaphore::new(self.each));
        Arc::clone(places.entry(origin).or_insert_with(new))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_forgotten_when_none_is_taken() {
        let places = Places::new(1);
        let taken = places.of("a").try_acquire_owned().unwrap();
        assert!(places.of("a").try_acquire_owned().is_err());
        assert!(places.of("b").try_acquire_owned().is_ok());
        assert_eq!(places.of.lock().unwrap().len(), 2);
        drop(taken);
        assert!(places.of("a").try_acquire_owned().is_ok());
        assert_eq!(places.of.lock().unwrap().len(), 1);
    }

    #[test]
    fn answers_are_kept_for_a_time_and_in_a_number() {
        let kept = Kept::new(Duration::from_secs(3600), 2);
        for n in 0..3 {
            kept.put([n; 32], n, Instant::now());
        }
        assert_eq!(
            [0, 1, 2].map(|n| kept.get(&[n; 32])),
            [Some(0), Some(1), None]
        );
        let short = Kept::new(Duration::ZERO, 1);
        for n in 0..3 {
            short.put([n; 32], n, Instant::now());
            assert_eq!(short.get(&[n; 32]), None);
        }
        assert_eq!(short.lock().len(), 1);
        // The answer is as old as its question.
        let slow = Kept::new(Duration::from_millis(1), 1);
        let asked = Instant::now();
        std::thread::sleep(Duration::from_millis(2));
        slow.put([0; 32], (), asked);
        assert_eq!(slow.get(&[0; 32]), None);
    }

    #[test]
    fn one_origin_does_not_use_up_what_others_may() {
        let counted = Counted::new(2, 2);
        let mut held = counted.counts.lock().unwrap();
        held.0 = Some(Instant::now() + Duration::from_secs(3600));
        drop(held);
        assert_eq!([(); 3].map(|()| counted.count("a")), [true, true, false]);
        assert!(counted.count("b"));
        assert!(!counted.count("c"));
    }
}
