//! Finds the freezer cgroup of a process in cgroup v1 and v2, and freezes, thaws and observes one cgroup.
//!
//! Sources: kernel `Documentation/admin-guide/cgroup-v1/freezer-subsystem.rst`, `cgroup-v2.rst` (`cgroup.freeze`,
//! `cgroup.events`); `cgroups(7)` for `/proc/PID/cgroup`; `proc(5)` for `/proc/PID/mountinfo`.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::Error;
use crate::node::procfs::{Membership, MountInfo, memberships};

/// Timeout for a thaw to be read back. A thaw is immediate except on a heavily loaded machine.
const THAW_TIMEOUT: Duration = Duration::from_secs(1);

/// Time after which a v1 cgroup that stays in FREEZING is thawed and frozen again. A task that waits for a child which
/// was frozen first (vfork, ptrace) cannot stop otherwise.
const REFREEZE_AFTER: Duration = Duration::from_millis(500);

/// The version of a cgroup hierarchy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Version {
    /// A v1 hierarchy with the `freezer` controller.
    V1,
    /// The unified hierarchy of v2.
    V2,
}

impl Version {
    /// Returns the name that stands for the version on the watchdog's command line.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::V1 => "v1",
            Self::V2 => "v2",
        }
    }

    /// Parses a name returned by [`Version::name`].
    pub(super) fn from_name(name: &OsStr) -> Option<Self> {
        [Self::V1, Self::V2].into_iter().find(|v| name == v.name())
    }

    fn control_file(self) -> &'static str {
        match self {
            Self::V1 => "freezer.state",
            Self::V2 => "cgroup.freeze",
        }
    }
}

/// Returns the cgroup path of a process in the hierarchy that can freeze it, from the text of `/proc/PID/cgroup`.
///
/// Returns `None` if the process is in no such hierarchy. Paths are relative to the root of the reader's cgroup
/// namespace.
pub(super) fn membership(text: &[u8], version: Version) -> Option<&[u8]> {
    let ours = |found: &Membership<'_>| match version {
        Version::V1 => found.has("freezer"),
        Version::V2 => found.unified,
    };
    memberships(text).find(ours).map(|found| found.path)
}

/// A mounted hierarchy that has a freezer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mount {
    pub(super) version: Version,
    /// The cgroup that is visible at the mount point.
    root: PathBuf,
    pub(super) point: PathBuf,
    pub(super) writable: bool,
}

/// Returns the mounted freezer hierarchies. v2 comes first because its frozen processes can still be killed.
pub(super) fn mounts(all: Vec<MountInfo>) -> Vec<Mount> {
    let mut mounts: Vec<Mount> = all.into_iter().filter_map(mount).collect();
    mounts.sort_by_key(|m| (m.version == Version::V1, !m.writable));
    mounts
}

fn mount(found: MountInfo) -> Option<Mount> {
    let version = match found.fs_type.as_str() {
        "cgroup2" => Version::V2,
        "cgroup" if found.has_super_option(b"freezer") => Version::V1,
        _ => return None,
    };
    Some(Mount {
        version,
        writable: found.writable && found.has_super_option(b"rw"),
        root: found.root,
        point: found.mount_point,
    })
}

impl Mount {
    /// Returns the directory of a cgroup, or `None` if it is not visible in this mount.
    ///
    /// If there is a cgroup namespace in between, both paths begin with `/..`. These components are compared like any
    /// other, but none may remain in the part below the mount point.
    pub(super) fn directory(&self, cgroup: &[u8]) -> Option<PathBuf> {
        let below = Path::new(OsStr::from_bytes(cgroup))
            .strip_prefix(&self.root)
            .ok()?;
        let plain = below
            .components()
            .all(|c| matches!(c, Component::Normal(_)));
        // The kernel appends this to the path of a process whose cgroup was removed.
        (plain && !cgroup.ends_with(b" (deleted)")).then(|| self.point.join(below))
    }
}

/// The state of a freeze.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Running,
    /// Requested on this cgroup or on an ancestor (v1), but not all processes have stopped yet.
    Freezing,
    Frozen,
}

/// A cgroup below the root of its hierarchy. Its control files are held open, because a cgroup created later under the
/// same name is a different one.
#[derive(Debug)]
pub(super) struct Group {
    version: Version,
    dir: PathBuf,
    /// Its path in `/proc/PID/cgroup`, if it was found by that.
    cgroup: PathBuf,
    control: File,
    /// v2 only: `cgroup.events`.
    events: Option<File>,
}

impl Group {
    /// Opens the control files for reading and writing.
    pub(super) fn open(version: Version, dir: PathBuf) -> Result<Self, Error> {
        let open = |name: &str, write: bool| {
            let path = dir.join(name);
            let file = OpenOptions::new().read(true).write(write).open(&path);
            file.map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => Error::Unsupported {
                    why: format!("{path:?} does not exist: the root cgroup cannot be frozen, nor can v2 before Linux 5.2"),
                },
                _ => Error::io(path, error),
            })
        };
        let control = open(version.control_file(), true)?;
        let events = match version {
            Version::V1 => None,
            Version::V2 => Some(open("cgroup.events", false)?),
        };
        Ok(Self {
            version,
            dir,
            cgroup: PathBuf::new(),
            control,
            events,
        })
    }

    /// Opens the control files of the cgroup whose path in `/proc/PID/cgroup` is `cgroup`.
    pub(super) fn open_named(
        version: Version,
        dir: PathBuf,
        cgroup: PathBuf,
    ) -> Result<Self, Error> {
        let group = Self::open(version, dir)?;
        Ok(Self { cgroup, ..group })
    }

    /// Returns its path in `/proc/PID/cgroup`.
    pub(super) fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    pub(super) fn version(&self) -> Version {
        self.version
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    fn control_path(&self) -> PathBuf {
        self.dir.join(self.version.control_file())
    }

    /// Reads a control file from its start; they are a few bytes long.
    fn read(&self, file: &File) -> Result<Vec<u8>, Error> {
        let mut buffer = [0; 512];
        let n = file
            .read_at(&mut buffer, 0)
            .map_err(|e| Error::io(self.control_path(), e))?;
        Ok(buffer[..n].to_vec())
    }

    /// Asks for a freeze or a thaw.
    pub(super) fn request(&self, freeze: bool) -> Result<(), Error> {
        let word: &[u8] = match (self.version, freeze) {
            (Version::V1, true) => b"FROZEN",
            (Version::V1, false) => b"THAWED",
            (Version::V2, true) => b"1",
            (Version::V2, false) => b"0",
        };
        self.control
            .write_all_at(word, 0)
            .map_err(|e| Error::io(self.control_path(), e))
    }

    /// Returns whether the processes are frozen, whatever the cause.
    pub(super) fn state(&self) -> Result<State, Error> {
        let control = self.read(&self.control)?;
        match &self.events {
            None => match control.trim_ascii() {
                b"THAWED" => Ok(State::Running),
                b"FREEZING" => Ok(State::Freezing),
                b"FROZEN" => Ok(State::Frozen),
                other => Err(Error::Unsupported {
                    why: format!(
                        "{:?} reads {:?}, expected THAWED, FREEZING or FROZEN",
                        self.control_path(),
                        other.escape_ascii().to_string()
                    ),
                }),
            },
            Some(events) => {
                // If an ancestor is frozen, the cgroup's own `cgroup.freeze` still reads 0.
                let events = self.read(events)?;
                if events
                    .split(|&b| b == b'\n')
                    .any(|line| line == b"frozen 1")
                {
                    Ok(State::Frozen)
                } else if control.trim_ascii() == b"1" {
                    Ok(State::Freezing)
                } else {
                    Ok(State::Running)
                }
            }
        }
    }

    /// Waits until all processes have stopped and repeats the request where the interface needs that. Returns `false`
    /// if `deadline` passes first.
    ///
    /// `ask` is `false` if another program began the freeze.
    pub(super) fn wait_frozen(&self, deadline: Instant, ask: bool) -> Result<bool, Error> {
        let mut asked_from_scratch = Instant::now();
        let pause = PollInterval::default();
        loop {
            if self.state()? == State::Frozen {
                return Ok(true);
            }
            let now = Instant::now();
            if now >= deadline {
                return Ok(false);
            }
            if ask && self.version == Version::V1 {
                if now - asked_from_scratch > REFREEZE_AFTER {
                    self.request(false)?;
                    asked_from_scratch = now;
                }
                // Tasks that are forked during the freeze are stopped only by a repeated request.
                self.request(true)?;
            }
            self.sleep(pause.next().min(deadline - now))?;
        }
    }

    /// Thaws the cgroup and waits until the thaw is read back, or until it is clear that another program holds an
    /// ancestor frozen.
    pub(super) fn thaw(&self) -> Result<(), Error> {
        self.request(false)?;
        let deadline = Instant::now() + THAW_TIMEOUT;
        let pause = PollInterval::default();
        while self.state()? != State::Running {
            if self.ancestor_is_frozen()? {
                return Ok(());
            }
            let now = Instant::now();
            if now >= deadline {
                return Err(Error::Timeout {
                    cgroup: self.dir.clone(),
                    waited: THAW_TIMEOUT,
                    wanted: "thaw",
                });
            }
            self.sleep(pause.next().min(deadline - now))?;
        }
        Ok(())
    }

    /// Returns whether an ancestor is frozen by its own setting. A thaw of this cgroup then has no effect and counts as
    /// complete.
    fn ancestor_is_frozen(&self) -> Result<bool, Error> {
        let flag = |path: PathBuf| match std::fs::read(&path) {
            Ok(text) => Ok(text.trim_ascii() == b"1"),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(Error::io(path, e)),
        };
        match self.version {
            Version::V1 => flag(self.dir.join("freezer.parent_freezing")),
            Version::V2 => {
                for ancestor in self.dir.ancestors().skip(1) {
                    if flag(ancestor.join("cgroup.freeze"))? {
                        return Ok(true);
                    }
                }
                Ok(false)
            }
        }
    }

    /// Waits until the kernel reports a change, at most for `bound`. Notifications of v2 arrive up to 10 ms late if
    /// there was another one shortly before; v1 has none.
    fn sleep(&self, bound: Duration) -> Result<(), Error> {
        let Some(events) = &self.events else {
            std::thread::sleep(bound);
            return Ok(());
        };
        let timeout = Timespec {
            tv_sec: 0,
            tv_nsec: i64::from(bound.min(PollInterval::LONGEST).subsec_nanos()),
        };
        match poll(&mut [PollFd::new(events, PollFlags::PRI)], Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(e) => Err(Error::io(self.dir.join("cgroup.events"), e.into())),
        }
    }
}

/// Growing pauses between polls. Most freezes complete within microseconds, and the time for which the container is
/// frozen is what matters. Each pause is an eighth of the time waited so far, so that at most an eighth is wasted.
struct PollInterval(Instant);

impl Default for PollInterval {
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl PollInterval {
    const SHORTEST: Duration = Duration::from_micros(50);
    const LONGEST: Duration = Duration::from_millis(10);

    fn next(&self) -> Duration {
        Self::after(self.0.elapsed())
    }

    fn after(waited: Duration) -> Duration {
        (waited / 8).clamp(Self::SHORTEST, Self::LONGEST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::procfs::mountinfo_lines;

    #[test]
    fn pauses_grow_with_what_was_waited() {
        let after = |micros| PollInterval::after(Duration::from_micros(micros)).as_micros();
        assert_eq!(
            [0, 400, 800, 8000, 1_000_000].map(after),
            [50, 50, 100, 1000, 10_000]
        );
    }

    #[test]
    #[allow(clippy::type_complexity)]
    fn membership_is_found_in_all_layouts() {
        let hybrid: &[u8] = b"9:name=systemd:/a\n6:freezer:/kube/pod:1/x\n0::/unified\n";
        let cases: &[(&[u8], Version, Option<&[u8]>)] = &[
            (hybrid, Version::V1, Some(b"/kube/pod:1/x")),
            (hybrid, Version::V2, Some(b"/unified")),
            // Co-mounted controllers, and a named hierarchy whose name only looks like the controller's.
            (b"3:cpu,freezer:/c\n", Version::V1, Some(b"/c")),
            (b"3:name=freezer:/c\n", Version::V1, None),
            (b"0::/only/v2\n", Version::V1, None),
            (b"7::/not-unified\n", Version::V2, None),
            (b"", Version::V2, None),
            (b"garbage\n0:\n::\n", Version::V2, None),
            (b"0::/\xff\xfe", Version::V2, Some(b"/\xff\xfe")),
        ];
        for (text, version, expected) in cases {
            assert_eq!(
                membership(text, *version),
                *expected,
                "{} {version:?}",
                text.escape_ascii()
            );
        }
    }

    #[test]
    fn mounts_are_told_apart_and_ordered() {
        let text = b"36 31 0:33 / /cg/devices rw - cgroup cgroup rw,devices\n\
            37 31 0:34 / /cg/freezer rw,relatime - cgroup cgroup rw,freezer\n\
            40 31 0:35 / /ro/unified ro - cgroup2 cgroup2 rw\n\
            41 31 0:35 /a\\040b /cg/uni\\011fied rw shared:5 master:1 - cgroup2 cgroup2 rw\n\
            27 1 254:0 / / rw - ext4 /dev/vda rw\nshort line\n- - -\n";
        let all = mountinfo_lines(text).filter_map(Result::ok).collect();
        let found: Vec<_> = mounts(all)
            .into_iter()
            .map(|m| (m.version, m.root, m.point, m.writable))
            .collect();
        assert_eq!(
            found,
            [
                (
                    Version::V2,
                    PathBuf::from("/a b"),
                    PathBuf::from("/cg/uni\tfied"),
                    true
                ),
                (
                    Version::V2,
                    PathBuf::from("/"),
                    PathBuf::from("/ro/unified"),
                    false
                ),
                (
                    Version::V1,
                    PathBuf::from("/"),
                    PathBuf::from("/cg/freezer"),
                    true
                ),
            ]
        );
    }

    #[test]
    fn directories_stay_below_the_mount() {
        let cases: &[(&str, &str, Option<&str>)] = &[
            ("/", "/kube/x", Some("/m/kube/x")),
            ("/kube", "/kube/x", Some("/m/x")),
            ("/kube", "/kubernetes/x", None),
            ("/kube", "/", None),
            // As visible from inside a cgroup namespace.
            ("/../..", "/../../kube/x", Some("/m/kube/x")),
            ("/", "/../x", None),
            ("/", "/a/../../x", None),
            ("/", "/gone (deleted)", None),
        ];
        for (root, cgroup, expected) in cases {
            let mount = Mount {
                version: Version::V2,
                root: PathBuf::from(root),
                point: PathBuf::from("/m"),
                writable: true,
            };
            assert_eq!(
                mount.directory(cgroup.as_bytes()),
                expected.map(PathBuf::from),
                "{root} {cgroup}"
            );
        }
    }
}
