//! Exclusion rules: entries that must not get into a layer. These are mounts and the stubs that runtimes leave for
//! them, GPU driver stubs, credentials, caches, and whatever matches the user's patterns.
//!
//! The matcher works on path bytes only and is called once for every entry of an upper directory, so it reads no files.
//! There is one table per list: [`CREDENTIALS`] and [`CACHES`].

mod lists;
mod patterns;
mod reason;
mod remnants;

use std::collections::{HashMap, HashSet};

use rustix::fs::FileType;

use crate::node::overlay::lower::basename;
use lists::{CACHES, CREDENTIALS, MatchScope};
use patterns::Patterns;
pub use reason::Reason;
use remnants::{DIRECTORY_STUBS, is_conda_archive, is_driver_library, is_gpu_remnant, stub};

/// Properties of an entry besides its path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts<'a> {
    /// Type of the entry; `None` for a whiteout in either form.
    pub file_type: Option<FileType>,
    /// Apparent size of a file in bytes; 0 for all other types.
    pub size: u64,
    /// Target of a symbolic link.
    pub link: Option<&'a [u8]>,
    /// Whether the base has an entry at this path.
    pub in_base: bool,
}

/// The rules of a matcher.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rules<'a> {
    /// Absolute destinations of the container's mounts. The root itself is ignored.
    pub mounts: &'a [Vec<u8>],
    /// The mounts that are saved separately: the directories above them are in the image.
    pub saved: &'a [Vec<u8>],
    /// The user's patterns, see [`Exclusions::new`].
    pub user: &'a [String],
    /// Exclude `CREDENTIALS`.
    pub credentials: bool,
    /// Exclude `CACHES`.
    pub caches: bool,
    /// Exclude the GPU hook's stubs.
    pub gpu: bool,
    /// Whether the tree is an image's own layer, in which nothing is a runtime's stub.
    pub of_image: bool,
}

/// A pattern that is not valid.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("exclude pattern {pattern:?}: {why}")]
pub struct PatternError {
    /// The pattern as given by the user.
    pub pattern: String,
    /// A description of the error.
    pub why: String,
}

/// The matcher.
#[derive(Debug)]
pub struct Exclusions {
    mounts: HashSet<Vec<u8>>,
    ancestors: HashSet<Vec<u8>>,
    /// By last component of the path.
    lists: HashMap<&'static [u8], Vec<Listed>>,
    caches: bool,
    gpu: bool,
    of_image: bool,
    user: Option<Patterns>,
}

#[derive(Debug)]
struct Listed {
    path: &'static [u8],
    reach: MatchScope,
    reason: Reason,
}

impl Exclusions {
    /// Compiles the rules.
    ///
    /// A pattern is a glob as in `.gitignore`: `*`, `?` and `[…]` do not match a slash, `**` does, `{a,b}` matches
    /// either. A leading slash anchors it at the root; otherwise it matches anywhere. With a trailing slash it matches
    /// only directories. A matching directory includes everything below it. `!` is not supported. Patterns also match
    /// deletions, in which case the base's version remains.
    ///
    /// Fails if a pattern is not valid.
    pub fn new(rules: Rules<'_>) -> Result<Self, PatternError> {
        let mounts: HashSet<Vec<u8>> = rules
            .mounts
            .iter()
            .map(|path| relative(path))
            .filter(|path| !path.is_empty())
            .collect();
        let made = if rules.of_image { &[] } else { DIRECTORY_STUBS };
        let mut ancestors: HashSet<Vec<u8>> = made.iter().map(|path| path.to_vec()).collect();
        for mount in &mounts {
            ancestors.extend(
                prefixes(mount)
                    .filter(|p| p.len() < mount.len())
                    .map(<[u8]>::to_vec),
            );
        }
        for saved in rules.saved {
            for above in prefixes(&relative(saved)) {
                ancestors.remove(above);
            }
        }
        let mut lists: HashMap<&'static [u8], Vec<Listed>> = HashMap::new();
        let both = [
            (rules.credentials, CREDENTIALS, Reason::Credential),
            (rules.caches, CACHES, Reason::Cache),
        ];
        for (_, list, reason) in both.iter().filter(|(wanted, ..)| *wanted) {
            for (path, reach) in *list {
                let path = path.as_bytes();
                let listed = Listed {
                    path,
                    reach: *reach,
                    reason: reason.clone(),
                };
                lists.entry(basename(path)).or_default().push(listed);
            }
        }
        let user = if rules.user.is_empty() {
            None
        } else {
            Some(Patterns::new(rules.user)?)
        };
        Ok(Self {
            mounts,
            ancestors,
            lists,
            caches: rules.caches,
            gpu: rules.gpu,
            of_image: rules.of_image,
            user,
        })
    }

    /// Returns the reason why an entry is left out, if it is. `path` has neither a leading nor a trailing slash; the
    /// root is empty.
    ///
    /// If a directory is left out, so is everything below it, and no further calls are needed. A directory of the base
    /// is not itself a credential or a cache (only new entries in it are), since deletions inside it have to stay
    /// deletions.
    pub fn check(&self, path: &[u8], facts: &Facts<'_>) -> Option<Reason> {
        if !self.mounts.is_empty() && prefixes(path).any(|prefix| self.mounts.contains(prefix)) {
            return Some(Reason::Mount);
        }
        if !self.of_image
            && let Some(reason) = stub(path, facts)
        {
            return Some(reason);
        }
        if self.gpu && is_gpu_remnant(path, facts) {
            return Some(Reason::Gpu);
        }
        if let Some(patterns) = &self.user
            && let Some(pattern) =
                patterns.matching(path, facts.file_type == Some(FileType::Directory))
        {
            return Some(Reason::Pattern(pattern.to_owned()));
        }
        let frame = facts.file_type == Some(FileType::Directory) && facts.in_base;
        match facts.file_type {
            Some(file_type) if !frame => self.listed(path, file_type),
            _ => None,
        }
    }

    fn listed(&self, path: &[u8], file_type: FileType) -> Option<Reason> {
        if self.lists.is_empty() {
            return None;
        }
        for prefix in prefixes(path) {
            let whole = prefix.len() == path.len();
            let Some(listed) = self.lists.get(basename(prefix)) else {
                continue;
            };
            for rule in listed {
                let matches = match rule.reach {
                    MatchScope::Tree => ends_with_components(prefix, rule.path),
                    MatchScope::File => {
                        whole
                            && file_type != FileType::Directory
                            && ends_with_components(prefix, rule.path)
                    }
                    MatchScope::Contents => !whole && prefix == rule.path,
                };
                if matches {
                    return Some(rule.reason.clone());
                }
            }
        }
        (self.caches && file_type == FileType::RegularFile && is_conda_archive(path))
            .then_some(Reason::Cache)
    }

    /// Returns whether a runtime creates this directory as a mount point or as a parent of one: an ancestor of a
    /// mount's destination, or a usual destination. If it is not in the base and nothing in it goes into the layer, it
    /// does not belong to the user.
    pub fn mount_ancestor(&self, path: &[u8]) -> bool {
        self.ancestors.contains(path)
    }

    /// Returns whether a symbolic link belongs to the GPU hook, provided that it leads to nothing or to an empty file
    /// in the merged tree. Checking that takes a lookup, so the caller does it for these few.
    pub fn may_be_gpu_link(&self, path: &[u8]) -> bool {
        self.gpu && is_driver_library(basename(path))
    }
}

/// Iterates over the leading parts of a path, the path itself included: `a`, `a/b`, `a/b/c`.
fn prefixes(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    let slashes = path
        .iter()
        .enumerate()
        .filter(|(_, b)| **b == b'/')
        .map(|(i, _)| i);
    let ends = slashes.chain((!path.is_empty()).then_some(path.len()));
    ends.map(|end| &path[..end])
}

fn ends_with_components(path: &[u8], tail: &[u8]) -> bool {
    path.strip_suffix(tail)
        .is_some_and(|head| head.is_empty() || head.ends_with(b"/"))
}

/// Returns an absolute path without its leading slash and without empty and `.` components, with `..` resolved.
fn relative(path: &[u8]) -> Vec<u8> {
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in path.split(|&b| b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join(&b'/')
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn facts(file_type: FileType) -> Facts<'static> {
        Facts {
            file_type: Some(file_type),
            size: 0,
            link: None,
            in_base: false,
        }
    }

    pub(super) fn file(size: u64) -> Facts<'static> {
        Facts {
            size,
            ..facts(FileType::RegularFile)
        }
    }

    pub(super) fn link(target: &str) -> Facts<'_> {
        Facts {
            link: Some(target.as_bytes()),
            ..facts(FileType::Symlink)
        }
    }

    pub(super) const DIR: Facts<'static> = Facts {
        file_type: Some(FileType::Directory),
        size: 0,
        link: None,
        in_base: false,
    };
    pub(super) const BASE_DIR: Facts<'static> = Facts {
        in_base: true,
        ..DIR
    };
    pub(super) const WHITEOUT: Facts<'static> = Facts {
        file_type: None,
        in_base: true,
        ..DIR
    };

    pub(super) fn rules<'a>(mounts: &'a [Vec<u8>], user: &'a [String]) -> Rules<'a> {
        Rules {
            mounts,
            saved: &[],
            user,
            credentials: true,
            caches: true,
            gpu: true,
            of_image: false,
        }
    }

    #[test]
    fn directories_above_a_mount_are_placeholders_unless_it_is_saved() {
        let mounts = ["/home/w/data", "/home/w/cache"].map(|m| m.as_bytes().to_vec());
        let none = Exclusions::new(rules(&mounts, &[])).unwrap();
        let one = Exclusions::new(Rules {
            saved: &mounts[..1],
            ..rules(&mounts, &[])
        })
        .unwrap();
        for above in [&b"home"[..], b"home/w"] {
            assert!(none.mount_ancestor(above));
            assert!(!one.mount_ancestor(above));
        }
        // The mount itself is not in its parent's layer.
        assert_eq!(one.check(b"home/w/data", &DIR), Some(Reason::Mount));
    }

    pub(super) fn plain() -> Exclusions {
        Exclusions::new(rules(&[], &[])).unwrap()
    }

    #[track_caller]
    pub(super) fn table(exclusions: &Exclusions, cases: &[(&str, Facts<'_>, Option<Reason>)]) {
        for (path, facts, expected) in cases {
            assert_eq!(
                exclusions.check(path.as_bytes(), facts),
                *expected,
                "{path} {facts:?}"
            );
        }
    }

    #[test]
    fn nothing_at_or_below_a_mount() {
        let mounts = [
            "/data",
            "/etc/hosts",
            "/a//b/./c/",
            "/x/../y",
            "/",
            "/home/u/vol",
        ]
        .map(|m| m.as_bytes().to_vec());
        let exclusions = Exclusions::new(rules(&mounts, &[])).unwrap();
        table(
            &exclusions,
            &[
                ("data", DIR, Some(Reason::Mount)),
                ("data/x/y", file(1), Some(Reason::Mount)),
                ("data2", file(1), None),
                ("dat", file(1), None),
                ("other/data", file(1), None),
                // A whiteout there would delete the base's entry (buildah#2816).
                ("data", WHITEOUT, Some(Reason::Mount)),
                ("data/deleted", WHITEOUT, Some(Reason::Mount)),
                ("etc/hosts", file(100), Some(Reason::Mount)),
                ("a/b/c", DIR, Some(Reason::Mount)),
                ("a/b", DIR, None),
                ("y/z", file(1), Some(Reason::Mount)),
                ("x", DIR, None),
                ("", DIR, None),
                ("", BASE_DIR, None),
            ],
        );
        let ancestors = [
            ("a", true),
            ("a/b", true),
            ("a/b/c", false),
            ("home", true),
            ("home/u", true),
            ("home/v", false),
            ("etc", true),
            ("dev/shm", true),
            ("proc", true),
            ("", false),
            ("usr", false),
        ];
        for (path, expected) in ancestors {
            assert_eq!(
                exclusions.mount_ancestor(path.as_bytes()),
                expected,
                "{path}"
            );
        }
    }

    #[test]
    fn runtime_stubs_go_and_real_files_stay() {
        table(
            &plain(),
            &[
                // As observed in the uppers of CRI-O 1.36 and containerd 2.2.
                ("etc/hosts", file(0), Some(Reason::MountStub)),
                ("etc/mtab", link("/proc/mounts"), Some(Reason::MountStub)),
                ("run/.containerenv", file(0), Some(Reason::MountStub)),
                ("etc/motd", WHITEOUT, None),
                ("etc/profile", file(771), None),
                ("etc", DIR, None),
                ("run", DIR, None),
                ("etc/hostname", file(0), Some(Reason::MountStub)),
                ("etc/resolv.conf", file(0), Some(Reason::MountStub)),
                (".dockerenv", file(0), Some(Reason::MountStub)),
                ("etc/hosts", WHITEOUT, Some(Reason::MountStub)),
                ("etc/mtab", WHITEOUT, Some(Reason::MountStub)),
                ("proc", WHITEOUT, Some(Reason::MountStub)),
                ("dev/x", WHITEOUT, Some(Reason::MountStub)),
                ("run/secrets", WHITEOUT, Some(Reason::MountStub)),
                // Files of the user are never dropped silently.
                ("etc/hosts", file(1), None),
                (
                    "etc/resolv.conf",
                    link("../run/systemd/resolve/stub-resolv.conf"),
                    None,
                ),
                ("etc/mtab", link("../proc/self/mounts"), None),
                ("etc/mtab", file(10), None),
                ("srv/etc/hosts", file(0), None),
                (".dockerenv", file(3), None),
                ("srv/.dockerenv", file(0), None),
                ("etc/hosts", DIR, None),
                ("dev/notes", file(5), None),
                ("run/app.pid", WHITEOUT, None),
                // Devices.
                (
                    "dev/null",
                    facts(FileType::CharacterDevice),
                    Some(Reason::RuntimeDevice),
                ),
                (
                    "dev/pts/0",
                    facts(FileType::CharacterDevice),
                    Some(Reason::RuntimeDevice),
                ),
                ("dev/null", file(0), Some(Reason::MountStub)),
                ("dev/null", file(9), None),
                (
                    "dev/stdout",
                    link("/proc/self/fd/1"),
                    Some(Reason::MountStub),
                ),
                ("dev/stdout", link("/var/log/out"), None),
                ("dev/sda", facts(FileType::BlockDevice), None),
                ("srv/dev/null", facts(FileType::CharacterDevice), None),
                ("dev/console", file(0), Some(Reason::MountStub)),
                ("dev/shm", DIR, None),
            ],
        );
    }

    #[test]
    fn gpu_remnants_are_empty_or_lead_nowhere() {
        let lib = "usr/lib/x86_64-linux-gnu/";
        let cases = [
            ("libcuda.so.535.129.03", file(0), true),
            ("libcuda.so.535.129.03", file(1), false),
            ("libnvidia-ml.so.1", file(0), true),
            ("libnvcuvid.so.1", file(0), true),
            ("libnvoptix.so.535", file(0), true),
            // Belongs to the toolkit, which the user installed.
            ("libcudart.so.12", file(700_000), false),
            ("libcudart.so", link("libcudart.so.12"), false),
            ("libnvidia.txt", file(0), false),
            ("libm.so.6", file(0), false),
            ("libcuda.so.1", WHITEOUT, false),
        ];
        for (name, facts, expected) in cases {
            let path = format!("{lib}{name}");
            assert_eq!(
                plain().check(path.as_bytes(), &facts),
                expected.then_some(Reason::Gpu),
                "{path} {facts:?}"
            );
        }
        table(
            &plain(),
            &[
                ("usr/bin/nvidia-smi", file(0), Some(Reason::Gpu)),
                ("usr/bin/nvidia-smi", file(9), None),
                ("usr/local/bin/nvidia-smi", file(0), None),
                (
                    "lib/firmware/nvidia/535.129.03/gsp_ga10x.bin",
                    file(0),
                    Some(Reason::Gpu),
                ),
                (
                    "usr/lib/firmware/nvidia/535/gsp_tu10x.bin",
                    file(0),
                    Some(Reason::Gpu),
                ),
                (
                    "dev/nvidia0",
                    facts(FileType::CharacterDevice),
                    Some(Reason::Gpu),
                ),
            ],
        );
        assert!(plain().may_be_gpu_link(b"usr/lib/libcuda.so.1"));
        assert!(plain().may_be_gpu_link(b"usr/lib64/libnvidia-ml.so"));
        assert!(!plain().may_be_gpu_link(b"usr/lib/libc.so.6"));
        let off = Exclusions::new(Rules::default()).unwrap();
        assert_eq!(off.check(b"usr/lib/libcuda.so.1", &file(0)), None);
        assert!(!off.may_be_gpu_link(b"usr/lib/libcuda.so.1"));
    }

    #[test]
    fn credentials_in_any_home() {
        let out = || Some(Reason::Credential);
        table(
            &plain(),
            &[
                ("root/.ssh", DIR, out()),
                ("home/alice/.ssh/id_ed25519", file(9), out()),
                (".ssh/config", file(9), out()),
                ("srv/deep/er/.ssh", link("/data/ssh"), out()),
                ("home/alice/.aws/credentials", file(9), out()),
                ("home/alice/.kube/config", file(9), out()),
                ("home/alice/.config/gcloud/x.db", file(9), out()),
                ("home/alice/.config/other", file(9), None),
                ("home/alice/.config", DIR, None),
                ("home/alice/.netrc", file(9), out()),
                ("home/alice/.git-credentials", file(9), out()),
                ("home/alice/.docker/config.json", file(9), out()),
                ("home/alice/.docker/daemon.json", file(9), None),
                ("home/alice/x.docker/config.json", file(9), None),
                ("app/config.json", file(9), None),
                ("home/alice/.pypirc", file(9), out()),
                ("home/alice/.cache/huggingface/token", file(9), out()),
                ("home/alice/.cache/huggingface/hub/model.bin", file(9), None),
                ("home/alice/.Renviron", file(9), out()),
                ("root/.bash_history", file(9), out()),
                ("root/.zsh_history", file(9), out()),
                ("root/.python_history", file(9), out()),
                ("work/project/.Rhistory", file(9), out()),
                (
                    "root/.ipython/profile_default/history.sqlite",
                    file(9),
                    out(),
                ),
                (
                    "root/.local/share/jupyter/runtime/kernel-1.json",
                    file(9),
                    out(),
                ),
                (
                    "root/.local/share/jupyter/kernels/r/kernel.json",
                    file(9),
                    None,
                ),
                ("root/.local/share/rstudio/sessions", DIR, out()),
                // As named in the documentation of the programs.
                ("root/.gnupg/private-keys-v1.d/x.key", file(9), out()),
                ("root/.azure/msal_token_cache.json", file(9), out()),
                ("srv/app/.npmrc", file(9), out()),
                ("root/.pgpass", file(9), out()),
                ("root/.kaggle/kaggle.json", file(9), out()),
                ("root/.config/gh/hosts.yml", file(9), out()),
                ("root/.config/rclone/rclone.conf", file(9), out()),
                ("root/.huggingface/token", file(9), out()),
                ("root/.cargo/credentials.toml", file(9), out()),
                ("root/.cargo/config.toml", file(9), None),
                ("root/.irods/.irodsA", file(9), out()),
                ("root/.irods/irods_environment.json", file(9), None),
                ("root/.psql_history", file(9), out()),
                ("srv/app/.env", file(9), None),
                ("root/.config/pip/pip.conf", file(9), None),
                // Case is significant, and components match as a whole; a directory is not a file.
                ("root/.SSH/id", file(9), None),
                ("root/x.ssh/id", file(9), None),
                ("root/.sshd", file(9), None),
                ("etc/ssh/ssh_config", file(9), None),
                ("root/.netrc", DIR, None),
                // Deletions stay deletions, also inside a directory of the base.
                ("root/.ssh", WHITEOUT, None),
                ("root/.ssh", BASE_DIR, None),
                ("root/.ssh/known_hosts", WHITEOUT, None),
                ("root/.ssh/known_hosts", file(9), out()),
                ("root/.netrc", WHITEOUT, None),
            ],
        );
        let kept = Exclusions::new(Rules {
            credentials: false,
            ..rules(&[], &[])
        })
        .unwrap();
        assert_eq!(kept.check(b"root/.ssh/id", &file(9)), None);
        assert_eq!(
            kept.check(b"root/.cache/pip/x", &file(9)),
            Some(Reason::Cache)
        );
    }

    #[test]
    fn caches_and_temporary_files() {
        let out = || Some(Reason::Cache);
        table(
            &plain(),
            &[
                ("root/.cache/pip", DIR, out()),
                ("root/.cache/pip/http/a", file(9), out()),
                ("root/.cache/uv/x", file(9), out()),
                ("root/.cache", DIR, None),
                ("root/.cache/other", file(9), None),
                ("root/cache/pip", file(9), None),
                ("tmp", DIR, None),
                ("tmp", BASE_DIR, None),
                ("tmp/x", file(9), out()),
                ("tmp/dir", DIR, out()),
                ("tmp/dir", BASE_DIR, None),
                ("tmp/dir/new", file(9), out()),
                ("tmp/gone", WHITEOUT, None),
                ("tmp", WHITEOUT, None),
                ("tmp", link("var/tmp"), None),
                ("var/tmp", DIR, None),
                ("var/tmp/x", facts(FileType::Fifo), out()),
                ("srv/tmp/x", file(9), None),
                ("var/cache/apt/archives", DIR, None),
                ("var/cache/apt/archives/bash.deb", file(9), out()),
                ("var/cache/apt/pkgcache.bin", file(9), None),
                (
                    "opt/conda/pkgs/numpy-1.26.4-py311h64a7726_0.conda",
                    file(9),
                    out(),
                ),
                ("opt/conda/pkgs/zlib-1.3-h1.tar.bz2", file(9), out()),
                (
                    "opt/conda/pkgs/numpy-1.26.4-py311h64a7726_0/info/index.json",
                    file(9),
                    None,
                ),
                ("root/numpy-1.26.4-py311h64a7726_0.conda", file(9), None),
                ("root/pkgs/mydata.tar.bz2", file(9), None),
                ("pkgs", file(9), None),
                ("a-b-c.conda", file(9), None),
            ],
        );
        let kept = Exclusions::new(Rules {
            caches: false,
            ..rules(&[], &[])
        })
        .unwrap();
        for path in ["tmp/x", "root/.cache/pip/x", "opt/pkgs/a-1-0.conda"] {
            assert_eq!(kept.check(path.as_bytes(), &file(9)), None, "{path}");
        }
    }
}
