//! What reports tell of many: how many there are, and some of them. A tree can have any number of things that are worth a
//! word, each with a path of thousands of bytes; a report has the same size all the same.

use std::collections::BTreeMap;

use serde::Serialize;
use serde::ser::{SerializeMap as _, Serializer};

/// Examples of one list, at most.
const EXAMPLES: usize = 100;
/// Bytes of text that they have together, at most. The first is kept however long it is.
const BYTES: usize = 64 << 10;
/// Names that [`Counts`] tells apart, at most.
const NAMES: usize = 100;

/// How many there are, and the first of them in their order. What is kept does not depend on the order of adding, so that
/// the report of a tree is the same for any number of threads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Sample<T> {
    count: u64,
    /// Sorted.
    examples: Vec<T>,
    /// What the examples have together.
    #[serde(skip)]
    bytes: usize,
    /// The first that there was no room for: all that come after it in order have none either.
    #[serde(skip)]
    end: Option<T>,
}

/// What a [`Sample`] can hold, in the order in which it is told.
pub trait Example: Ord {
    /// Bytes of its text.
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
    /// Counts one more.
    pub fn add(&mut self, item: T) {
        self.count += 1;
        self.keep(item);
    }

    /// Adds what another one has.
    pub fn append(&mut self, other: Self) {
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

    /// Nothing from `end` on was kept elsewhere, so none of it is here.
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
    /// How many there are.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Some of them, in order.
    pub fn examples(&self) -> &[T] {
        &self.examples
    }

    /// How many are counted only.
    pub fn more(&self) -> u64 {
        self.count - self.examples.len() as u64
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
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

/// How often each name came. There may be any number of names: those after the first hundred are counted together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    names: BTreeMap<String, u64>,
    others: u64,
}

impl Counts {
    /// Under which those without a name of their own are told. No attribute is called so.
    const OTHERS: &'static str = "(others)";

    /// Counts `name` so many times more.
    pub fn add(&mut self, name: &str, count: u64) {
        if let Some(known) = self.names.get_mut(name) {
            *known += count;
        } else if self.names.len() < NAMES && name != Self::OTHERS {
            self.names.insert(name.to_owned(), count);
        } else {
            self.others += count;
        }
    }

    /// Makes the count of `name` that of `count` at least.
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

    /// Names and how often each came; at the end all others, if there are.
    pub fn iter(&self) -> impl Iterator<Item = (&str, u64)> {
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
        // Of many lengths, so that both bounds matter.
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
