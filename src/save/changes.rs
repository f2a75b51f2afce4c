//! What a save changed, in a few numbers: since the earlier save that it builds on, or since the base.

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::trees::{self, Baseline};
use crate::common::{escape, message};
use crate::layer::scan::{Kind, Scan};

/// Maximum number of files that are named.
const MAX_LARGEST: usize = 5;
/// Maximum length of a path, in bytes.
const MAX_PATH: usize = 256;

/// What a save is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "service", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum Since {
    /// The base of the image: everything was saved.
    #[default]
    Base,
    /// The earlier save of the container that this one builds on.
    Previous,
}

impl Since {
    /// Returns what a save is compared with whose layers are `on_top` of an earlier save, or not.
    pub(super) fn of(on_top: bool) -> Self {
        if on_top { Self::Previous } else { Self::Base }
    }
}

/// A regular file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "service", derive(utoipa::ToSchema))]
pub struct ChangedFile {
    /// Path from `/`, escaped, and shortened to 256 bytes.
    pub path: String,
    /// Size in bytes.
    pub bytes: u64,
}

/// What a save added, changed and removed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "service", derive(utoipa::ToSchema))]
pub struct Changes {
    /// What it is compared with.
    pub since: Since,
    /// Number of entries that were added or changed, with the directories above them.
    pub entries: u64,
    /// Number of those that are no directories.
    pub files: u64,
    /// Number of whiteouts: entries that were removed, a directory with everything in it as one, and directories whose
    /// former content is hidden.
    pub removed: u64,
    /// Size of the content of the regular files among them, in bytes; the names of one file count once.
    pub bytes: u64,
    /// The largest of these files, at most five.
    pub largest: Vec<ChangedFile>,
}

impl Changes {
    /// Counts what `now` has in addition to `earlier`, and to the base if that is `None`. Returns `None` if layers on top
    /// of the earlier save could not express it.
    pub(super) fn between(earlier: Option<&[Baseline]>, now: &[Arc<Scan>]) -> Option<Self> {
        match earlier {
            None => Some(Self::of(Since::Base, now.iter().map(AsRef::as_ref))),
            Some(earlier) => {
                let changes = trees::changes(earlier, now)?;
                let changes = changes.iter().map(AsRef::as_ref);
                Some(Self::of(Since::Previous, changes))
            }
        }
    }

    /// Counts the entries that go into the layers of these trees.
    pub(super) fn of<'s>(since: Since, trees: impl IntoIterator<Item = &'s Scan>) -> Self {
        let mut changes = Self {
            since,
            ..Self::default()
        };
        for scan in trees {
            changes.add(scan);
        }
        changes
    }

    fn add(&mut self, scan: &Scan) {
        let mut linked = HashSet::new();
        let mut largest: Vec<(u64, u32)> = Vec::new();
        for index in scan.emitted() {
            let entry = scan.entry(index);
            match entry.kind {
                Kind::Opaque | Kind::Whiteout => {
                    self.removed += 1;
                    continue;
                }
                Kind::Dir => {}
                _ => self.files += 1,
            }
            self.entries += 1;
            let mut first_name = || entry.nlink <= 1 || linked.insert((entry.root, entry.ino));
            if entry.kind != Kind::File || !first_name() {
                continue;
            }
            self.bytes = self.bytes.saturating_add(entry.size);
            let place = largest.partition_point(|&(bytes, _)| bytes >= entry.size);
            if entry.size > 0 && place < MAX_LARGEST {
                largest.insert(place, (entry.size, index));
                largest.truncate(MAX_LARGEST);
            }
        }
        let named = |(bytes, index)| ChangedFile {
            path: shortened(format!("/{}", escape::path(&scan.path(index)))),
            bytes,
        };
        self.largest.extend(largest.into_iter().map(named));
        self.largest
            .sort_by_key(|file| std::cmp::Reverse(file.bytes));
        self.largest.truncate(MAX_LARGEST);
    }

    /// Returns numbers and names that came from elsewhere, with the names escaped and everything within its bounds.
    #[cfg(feature = "service")]
    #[must_use]
    pub(crate) fn sanitised(mut self) -> Self {
        self.largest.truncate(MAX_LARGEST);
        for file in &mut self.largest {
            file.path = shortened(escape::limited(&file.path, MAX_PATH));
        }
        self
    }

    /// Returns whether nothing was changed.
    pub(crate) fn is_empty(&self) -> bool {
        self.entries == 0 && self.removed == 0
    }
}

/// Shortens a text to [`MAX_PATH`] bytes, with `…` for the rest.
fn shortened(mut text: String) -> String {
    const REST: char = '…';
    if text.len() > MAX_PATH {
        let fits = |end: &usize| text.is_char_boundary(*end);
        let end = (0..=MAX_PATH - REST.len_utf8()).rev().find(fits);
        text.truncate(end.unwrap_or(0));
        text.push(REST);
    }
    text
}

/// One line, such as `12 files changed, 3 removed, 4.10 MB; largest: /home/data.csv (3.00 MB)`.
impl fmt::Display for Changes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("nothing changed");
        }
        let files = message::count(self.files, "file", "files");
        write!(f, "{files} changed")?;
        if self.removed > 0 {
            write!(f, ", {} removed", self.removed)?;
        }
        write!(f, ", {}", message::size(self.bytes))?;
        match self.largest.first() {
            Some(file) => write!(
                f,
                "; largest: {} ({})",
                file.path,
                message::size(file.bytes)
            ),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::layer::scan::{Caps, Exclusions, Options, Roots, Rules};
    use crate::node::overlay::xattr::Namespace;

    fn scan(upper: &std::path::Path) -> Arc<Scan> {
        let roots = Roots {
            upper: upper.to_owned(),
            lowers: Vec::new(),
            data_only: Vec::new(),
            id_mapped: Vec::new(),
            lowers_known: true,
            namespace: Namespace::Trusted,
            volume: None,
        };
        let options = Options {
            jobs: 1,
            uid_map: &[],
            gid_map: &[],
            exclusions: &Exclusions::new(Rules::default()).unwrap(),
            caps: Caps::default(),
            runtime_root_mode: None,
            cancel: &CancellationToken::new(),
        };
        Arc::new(Scan::new(&roots, &options).unwrap())
    }

    #[test]
    fn files_are_counted_once_and_the_largest_are_named() {
        let upper = tempfile::tempdir().unwrap();
        let home = upper.path().join("home");
        std::fs::create_dir(&home).unwrap();
        for size in [10, 60, 20, 50, 30, 40] {
            std::fs::write(home.join(format!("f{size}")), vec![0; size]).unwrap();
        }
        std::fs::hard_link(home.join("f60"), home.join("again")).unwrap();
        std::fs::write(home.join("empty"), "").unwrap();
        let odd = home.join("odd\u{1b}[31m".repeat(20));
        std::fs::write(&odd, vec![0; 100]).unwrap();
        let whole = Changes::between(None, &[scan(upper.path())]).unwrap();
        assert_eq!(std::fs::metadata(&odd).unwrap().size(), 100);
        assert_eq!(
            (whole.since, whole.files, whole.removed, whole.bytes),
            (Since::Base, 9, 0, 310)
        );
        let sizes: Vec<u64> = whole.largest.iter().map(|file| file.bytes).collect();
        assert_eq!(sizes, [100, 60, 50, 40, 30]);
        let name = &whole.largest[0].path;
        assert!(
            name.starts_with("/home/odd\\u{1b}[31m") && name.ends_with('…'),
            "{name}"
        );
        assert!(name.len() <= MAX_PATH, "{name}");
        assert_eq!(whole.largest[1].path, "/home/again");
    }

    #[test]
    fn what_is_the_same_as_in_the_earlier_save_does_not_count() {
        let upper = tempfile::tempdir().unwrap();
        std::fs::write(upper.path().join("old"), "old").unwrap();
        std::fs::write(upper.path().join("gone"), "gone").unwrap();
        // Late enough that the stamps are before the scan's clock.
        std::thread::sleep(4 * crate::layer::scan::tick());
        let before = Baseline::of_scans(vec![scan(upper.path())], &HashSet::new());
        std::fs::write(upper.path().join("new"), "newer").unwrap();
        std::fs::remove_file(upper.path().join("gone")).unwrap();
        let changes = Changes::between(Some(&before), &[scan(upper.path())]).unwrap();
        assert_eq!(
            (changes.since, changes.files, changes.removed, changes.bytes),
            (Since::Previous, 1, 1, 5)
        );
        assert_eq!(
            changes.to_string(),
            "1 file changed, 1 removed, 5 B; largest: /new (5 B)"
        );
        let none = Changes::between(
            Some(&Baseline::of_scans(
                vec![scan(upper.path())],
                &HashSet::new(),
            )),
            &[],
        );
        assert_eq!(none, None, "another number of trees");
        assert_eq!(Changes::default().to_string(), "nothing changed");
    }

    #[cfg(feature = "service")]
    #[test]
    fn what_a_node_sends_is_bounded() {
        let file = ChangedFile {
            path: "é\n".repeat(1000),
            bytes: u64::MAX,
        };
        let sent = Changes {
            largest: vec![file; 1000],
            ..Changes::default()
        };
        let kept = sent.sanitised();
        assert_eq!(kept.largest.len(), MAX_LARGEST);
        let path = &kept.largest[0].path;
        assert!(
            path.starts_with("é\\né\\n") && path.len() <= MAX_PATH,
            "{path}"
        );
        assert_eq!(kept.clone().sanitised(), kept);
    }
}
