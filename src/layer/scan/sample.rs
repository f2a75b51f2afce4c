//! Bounded lists for reports: a count and some examples. A tree can have any number of entries worth reporting, each
//! with a path of thousands of bytes, but the size of a report is bounded.

use std::collections::BTreeMap;

use serde::Serialize;
use serde::ser::{SerializeMap as _, Serializer};

/// Maximum number of examples in a list.
const EXAMPLES: usize = 100;
/// Maximum total size of the examples in bytes. The first is kept however long it is.
const BYTES: usize = 64 << 10;
/// Maximum number of distinct names in [`Counts`].
const NAMES: usize = 100;

/// A count of items, and the first of them in their order. The examples do not depend on the order of insertion, so
/// that the report of a tree is the same for any number of threads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Sample<T> {
    count: u64,
    /// Sorted.
    examples: Vec<T>,
    /// Total size of the examples in bytes.
    #[serde(skip)]
    bytes: usize,
    /// The first item for which there was no room; later items in the order have none either.
    #[serde(skip)]
    end: Option<T>,
}

/// An item of a [`Sample`]; its order is that of the examples.
pub trait Example: Ord {
    /// Returns the size of its text in bytes.
    fn bytes(&self) -> usize;
}

impl Example for String {
    fn bytes(&self) -> usize {
        self.len()
    }
}

impl<T> Default for Sample<T> {
    fn default() -> Self {
        Self {
            count: 0,
            examples: Vec::new(),
            bytes: 0,
            end: None,
        }
    }
}

impl<T: Example> Sample<T> {
    /// Counts an item.
    pub(crate) fn add(&mut self, item: T) {
        self.count += 1;
        self.keep(item);
    }

    /// Adds the items of another sample.
    pub(crate) fn append(&mut self, other: Self) {
        self.count += other.count;
        for item in other.examples {
            self.keep(item);
        }
        if let Some(end) = other.end {
            self.keep_up_to(end);
        }
    }

    fn keep(&mut self, item: T) {
        if self.end.as_ref().is_some_and(|end| item >= *end) {
            return;
        }
        self.bytes += item.bytes();
        let at = self.examples.partition_point(|known| *known <= item);
        self.examples.insert(at, item);
        while self.examples.len() > EXAMPLES || (self.bytes > BYTES && self.examples.len() > 1) {
            let Some(last) = self.examples.pop() else {
                break;
            };
            self.bytes -= last.bytes();
            self.end = Some(last);
        }
    }

    /// Drops examples from `end` on: the other sample kept none of those.
    fn keep_up_to(&mut self, end: T) {
        if self.end.as_ref().is_some_and(|known| *known <= end) {
            return;
        }
        let stay = self.examples.partition_point(|known| *known < end);
        for gone in self.examples.drain(stay..) {
            self.bytes -= gone.bytes();
        }
        self.end = Some(end);
    }
}

impl<T> Sample<T> {
    /// Returns the number of items.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Returns the examples, in order.
    pub fn examples(&self) -> &[T] {
        &self.examples
    }

    /// Returns the number of items that are counted without an example.
    pub(crate) fn more(&self) -> u64 {
        self.count - self.examples.len() as u64
    }

    /// Returns whether there are no items.
    pub(crate) fn is_empty(&self) -> bool {
        self.count == 0
    }
}

impl<T: Example> FromIterator<T> for Sample<T> {
    fn from_iter<I: IntoIterator<Item = T>>(items: I) -> Self {
        let mut sample = Self::default();
        items.into_iter().for_each(|item| sample.add(item));
        sample
    }
}

/// Number of occurrences by name. There may be any number of names: those after the first hundred are counted together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    names: BTreeMap<String, u64>,
    others: u64,
}

impl Counts {
    /// Name for the combined count. No attribute has this name.
    const OTHERS: &'static str = "(others)";

    /// Adds `count` occurrences of `name`.
    pub(crate) fn add(&mut self, name: &str, count: u64) {
        if let Some(known) = self.names.get_mut(name) {
            *known += count;
        } else if self.names.len() < NAMES && name != Self::OTHERS {
            self.names.insert(name.to_owned(), count);
        } else {
            self.others += count;
        }
    }

    /// Raises the count of `name` to at least `count`.
    pub(super) fn at_least(&mut self, name: &str, count: u64) {
        let known = if name == Self::OTHERS {
            self.others
        } else {
            self.names.get(name).copied().unwrap_or_default()
        };
        if known < count {
            self.add(name, count - known);
        }
    }

    /// Iterates over the names and their counts; the combined count of others comes last, if any.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, u64)> {
        let others = (self.others > 0).then_some((Self::OTHERS, self.others));
        let names = self.names.iter();
        names
            .map(|(name, count)| (name.as_str(), *count))
            .chain(others)
    }
}

impl<'n> FromIterator<(&'n str, u64)> for Counts {
    fn from_iter<I: IntoIterator<Item = (&'n str, u64)>>(items: I) -> Self {
        let mut counts = Self::default();
        items
            .into_iter()
            .for_each(|(name, count)| counts.add(name, count));
        counts
    }
}

impl Serialize for Counts {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for (name, count) in self.iter() {
            map.serialize_entry(name, &count)?;
        }
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(items: impl IntoIterator<Item = String>) -> Sample<String> {
        items.into_iter().collect()
    }

    #[test]
    fn a_sample_is_a_number_and_the_first_in_order() {
        let all = of((0..1000).map(|n| format!("{n:04}")));
        assert_eq!((all.count(), all.more()), (1000, 900));
        let expected: Vec<String> = (0..100).map(|n| format!("{n:04}")).collect();
        assert_eq!(all.examples(), expected);
        assert_eq!(
            serde_json::to_value(of(["a".to_owned()])).unwrap(),
            serde_json::json!({"count": 1, "examples": ["a"]})
        );
    }

    #[test]
    fn what_is_kept_does_not_depend_on_the_order_of_adding() {
        // Many lengths, so that both limits apply.
        let items: Vec<String> = (0..400usize)
            .map(|n| format!("{n:04}{}", "x".repeat(n * 7919 % 3000)))
            .collect();
        let forwards = of(items.clone());
        let backwards = of(items.iter().rev().cloned());
        assert_eq!(forwards, backwards);
        for step in [1, 7, 100, 399] {
            let mut parts = Sample::default();
            for part in items.chunks(step).rev() {
                parts.append(of(part.to_vec()));
            }
            assert_eq!(parts, forwards, "in parts of {step}");
        }
        let bytes: usize = forwards.examples().iter().map(String::len).sum();
        assert!(bytes <= BYTES, "{bytes} bytes");
    }

    #[test]
    fn one_that_is_too_long_is_kept_alone() {
        let long = "a".repeat(2 * BYTES);
        let sample = of(["b".to_owned(), long.clone()]);
        assert_eq!((sample.count(), sample.examples()), (2, &[long][..]));
    }

    #[test]
    fn names_beyond_a_hundred_are_counted_together() {
        let mut counts = Counts::default();
        for n in 0..150 {
            counts.add(&format!("user.{n:03}"), 2);
        }
        counts.add("user.000", 1);
        let all: Vec<(&str, u64)> = counts.iter().collect();
        assert_eq!(all.len(), 101);
        assert_eq!((all[0], all[100]), (("user.000", 3), ("(others)", 100)));
        counts.at_least("user.000", 2);
        counts.at_least("user.001", 9);
        counts.at_least("(others)", 120);
        let told = serde_json::to_value(&counts).unwrap();
        assert_eq!(
            (&told["user.000"], &told["user.001"], &told["(others)"]),
            (&3.into(), &9.into(), &120.into())
        );
    }
}
