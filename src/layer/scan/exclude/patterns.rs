//! The user's patterns.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;

use globset::{Candidate, GlobBuilder, GlobSet, GlobSetBuilder};

use super::PatternError;

/// The user's patterns, compiled.
#[derive(Debug)]
pub(super) struct Patterns {
    pub(super) texts: Vec<String>,
    /// Two globs per pattern: 2i for the entry itself, 2i + 1 for everything below it.
    pub(super) set: GlobSet,
    pub(super) directories_only: Vec<bool>,
}

impl Patterns {
    pub(super) fn new(texts: &[String]) -> Result<Self, PatternError> {
        let mut set = GlobSetBuilder::new();
        let mut directories_only = Vec::with_capacity(texts.len());
        for text in texts {
            let bad = |why: String| PatternError {
                pattern: text.clone(),
                why,
            };
            if text.starts_with('!') {
                return Err(bad(
                    "patterns with ! are not supported; write \\! for a name that begins so"
                        .to_owned(),
                ));
            }
            let (anchored, rest) = match text.strip_prefix('/') {
                Some(rest) => (true, rest),
                None => (false, text.as_str()),
            };
            // A backslash would make the slash part of a name, which cannot contain one.
            let (directory, rest) = match rest.strip_suffix('/') {
                Some(rest) => (true, rest),
                None => (false, rest),
            };
            if rest.is_empty() {
                return Err(bad(
                    "it names nothing (or the root); write /** for everything".to_owned(),
                ));
            }
            if rest.split('/').any(|part| matches!(part, "" | "." | "..")) {
                return Err(bad(
                    "empty, . and .. components match no path; paths begin at the container's root"
                        .to_owned(),
                ));
            }
            let entry = if anchored {
                rest.to_owned()
            } else {
                format!("**/{rest}")
            };
            for glob in [entry.clone(), format!("{entry}/**")] {
                let glob = GlobBuilder::new(&glob)
                    .literal_separator(true)
                    .backslash_escape(true)
                    .build();
                set.add(glob.map_err(|e| bad(e.kind().to_string()))?);
            }
            directories_only.push(directory);
        }
        let set = set.build().map_err(|e| PatternError {
            pattern: texts.join(" "),
            why: e.to_string(),
        })?;
        Ok(Self {
            texts: texts.to_vec(),
            set,
            directories_only,
        })
    }

    /// Returns the first pattern that matches.
    pub(super) fn matching(&self, path: &[u8], directory: bool) -> Option<&str> {
        let candidate = Candidate::new(OsStr::from_bytes(path));
        let matches = self.set.matches_candidate(&candidate);
        let applies = |glob: &usize| glob % 2 == 1 || directory || !self.directories_only[glob / 2];
        matches
            .into_iter()
            .filter(applies)
            .map(|glob| self.texts[glob / 2].as_str())
            .next()
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::*;
    use super::super::*;

    #[test]
    fn user_patterns_are_as_in_gitignore() {
        // Columns: pattern, path, path is a directory, matches.
        let cases: &[(&str, &str, bool, bool)] = &[
            ("*.log", "a.log", false, true),
            ("*.log", "deep/er/a.log", false, true),
            ("*.log", "a.log/inside", false, true),
            ("*.log", "a.logs", false, false),
            ("/data", "data", true, true),
            ("/data", "data/x/y", false, true),
            ("/data", "srv/data", true, false),
            ("/data", "database", false, false),
            ("/data/*.bin", "data/a.bin", false, true),
            ("/data/*.bin", "data/sub/a.bin", false, false),
            ("/data/**/*.bin", "data/sub/deep/a.bin", false, true),
            ("/data/**", "data", true, false),
            ("/data/**", "data/x", false, true),
            ("build/out", "x/build/out/y", false, true),
            ("build/", "x/build", true, true),
            ("build/", "x/build", false, false),
            ("build/", "x/build/y", false, true),
            ("/**", "anything/at/all", false, true),
            ("file?", "file1", false, true),
            ("file?", "file/x", false, false),
            ("[ab].txt", "b.txt", false, true),
            ("*.{o,a}", "lib/x.a", false, true),
            ("\\*", "*", false, true),
            ("\\*", "x", false, false),
            ("\\!x", "!x", false, true),
            ("*", ".hidden", false, true),
            ("ü*", "a/über", false, true),
        ];
        for (pattern, path, directory, expected) in cases {
            let user = [(*pattern).to_owned()];
            let exclusions = Exclusions::new(Rules {
                user: &user,
                ..Rules::default()
            })
            .unwrap();
            let facts = if *directory { BASE_DIR } else { file(1) };
            let expected = expected.then(|| Reason::Pattern((*pattern).to_owned()));
            assert_eq!(
                exclusions.check(path.as_bytes(), &facts),
                expected,
                "{pattern} {path}"
            );
        }
    }

    #[test]
    fn user_patterns_match_bytes_and_deletions_and_name_the_first() {
        let user = ["/nothing", "*.bin", "/raw"].map(str::to_owned);
        let exclusions = Exclusions::new(Rules {
            user: &user,
            ..Rules::default()
        })
        .unwrap();
        let bin = || Some(Reason::Pattern("*.bin".to_owned()));
        assert_eq!(exclusions.check(b"d/\xff\xfe\n.bin", &file(1)), bin());
        assert_eq!(exclusions.check(b"d\xff/x.bin/\x80", &file(1)), bin());
        assert_eq!(exclusions.check(b"raw/a.bin", &file(1)), bin());
        assert_eq!(
            exclusions.check(b"raw", &WHITEOUT),
            Some(Reason::Pattern("/raw".to_owned()))
        );
        assert_eq!(exclusions.check(b"\xff", &file(1)), None);
    }

    #[test]
    fn bad_patterns_are_refused_by_name() {
        for bad in [
            "", "/", "//", "!x", "a//b", "./x", "/../x", "[a", "{a", "a\\",
        ] {
            let user = ["ok".to_owned(), bad.to_owned()];
            let error = Exclusions::new(Rules {
                user: &user,
                ..Rules::default()
            })
            .unwrap_err();
            assert_eq!(error.pattern, bad, "{error}");
        }
    }
}
