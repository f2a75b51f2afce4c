//! Checks the cgroup freezer: finds the mounted hierarchies that have one, and tries whether a new cgroup in each can
//! be frozen and thawed.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{Finding, Options};
use crate::node::cgroups::Cgroups;
use crate::node::procfs::MountInfo;

/// Longest wait for an empty cgroup to change state. It changes at once, except on a machine under load.
const BOUND: Duration = Duration::from_secs(5);
const ADVICE: &str = "live saves need a writable cgroup file system: run as root, in a pod with the node's /sys/fs/cgroup \
                      mounted read-write; without it only --pause none works";

/// A hierarchy with a freezer.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Hierarchy {
    version: u8,
    dir: PathBuf,
}

impl Hierarchy {
    fn file(&self, dir: &Path) -> PathBuf {
        dir.join(match self.version {
            1 => "freezer.state",
            _ => "cgroup.freeze",
        })
    }

    fn words(&self) -> (&'static str, &'static str) {
        match self.version {
            1 => ("FROZEN", "THAWED"),
            _ => ("1", "0"),
        }
    }
}

/// Returns the mounted hierarchies that have a freezer, one per version. The node's own mounts, below `host_root`, take
/// precedence over others.
fn hierarchies(mounts: &[MountInfo], host_root: Option<&Path>) -> Vec<Hierarchy> {
    let version = |mount: &MountInfo| match mount.fs_type.as_str() {
        "cgroup2" => Some(2),
        "cgroup" => mount.has_super_option(b"freezer").then_some(1),
        _ => None,
    };
    let mut found: Vec<Hierarchy> = Vec::new();
    for below in [true, false] {
        for mount in mounts {
            let host = host_root.is_some_and(|root| mount.mount_point.starts_with(root));
            if let Some(version) = version(mount)
                && host == below
                && mount.root == Path::new("/")
                && found.iter().all(|known| known.version != version)
            {
                found.push(Hierarchy {
                    version,
                    dir: mount.mount_point.clone(),
                });
            }
        }
    }
    found
}

pub(super) fn check(options: &Options) -> Vec<Finding> {
    let mounts = Cgroups::own().map_or_else(|_| Vec::new(), |own| own.mounts);
    let found = hierarchies(&mounts, options.roots.host_root.as_deref());
    let tried = found
        .into_iter()
        .map(|hierarchy| (try_on(&hierarchy), hierarchy))
        .collect();
    judge(tried)
}

/// Creates a cgroup, freezes and thaws it, and removes it.
fn try_on(hierarchy: &Hierarchy) -> io::Result<()> {
    let dir = hierarchy
        .dir
        .join(format!("upperdeck-doctor-{}", std::process::id()));
    fs::create_dir(&dir)?;
    let (frozen, thawed) = hierarchy.words();
    let set = |word: &str| -> io::Result<()> {
        let file = hierarchy.file(&dir);
        fs::write(&file, word)?;
        let deadline = Instant::now() + BOUND;
        while fs::read_to_string(&file)?.trim() != word {
            if Instant::now() > deadline {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("it does not become {word}"),
                ));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    };
    let done = set(frozen).and_then(|()| set(thawed));
    fs::remove_dir(&dir)?;
    done
}

fn judge(tried: Vec<(io::Result<()>, Hierarchy)>) -> Vec<Finding> {
    if tried.is_empty() {
        let found = "no cgroup file system with a freezer is mounted";
        return vec![Finding::failed("cgroup", found, ADVICE)];
    }
    let shown = |hierarchy: &Hierarchy| {
        let dir = crate::common::escape::path(hierarchy.dir.as_os_str().as_encoded_bytes());
        format!("v{} at {dir}", hierarchy.version)
    };
    // Containers live in one hierarchy or the other, so one broken hierarchy of two does not affect containers in the
    // other.
    let works = tried.iter().any(|(result, _)| result.is_ok());
    tried
        .into_iter()
        .map(|(result, hierarchy)| match result {
            Ok(()) => Finding::ok(
                "cgroup",
                format!(
                    "{}: a cgroup of its own freezes and thaws",
                    shown(&hierarchy)
                ),
            ),
            Err(error) => {
                let found = format!("{}: {error}", shown(&hierarchy));
                if works {
                    Finding::warning("cgroup", found, ADVICE)
                } else {
                    Finding::failed("cgroup", found, ADVICE)
                }
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;
    use crate::node::procfs::parse_mountinfo;

    #[test]
    fn the_nodes_hierarchy_goes_before_the_pods_own() -> Result<(), Box<dyn std::error::Error>> {
        let text = "30 1 0:30 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer\n\
            31 1 0:31 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
            32 1 0:32 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
            33 1 0:32 /kube/x /tmp/part rw - cgroup2 cgroup2 rw\n\
            34 1 0:32 / /host/sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        let mounts = parse_mountinfo(text.as_bytes())?;
        let found = |root: Option<&str>| -> Vec<(u8, String)> {
            hierarchies(&mounts, root.map(Path::new))
                .into_iter()
                .map(|h| (h.version, h.dir.display().to_string()))
                .collect()
        };
        let freezer = (1, "/sys/fs/cgroup/freezer".to_owned());
        let unified = (2, "/sys/fs/cgroup/unified".to_owned());
        let host = (2, "/host/sys/fs/cgroup".to_owned());
        assert_eq!(found(None), [freezer.clone(), unified]);
        assert_eq!(found(Some("/host")), [host, freezer]);
        Ok(())
    }

    #[test]
    fn one_of_two_that_works_is_enough() {
        let hierarchy = |version| Hierarchy {
            version,
            dir: "/cg".into(),
        };
        let denied = || Err(io::ErrorKind::PermissionDenied.into());
        let states = |tried| -> Vec<State> { judge(tried).iter().map(|f| f.state).collect() };
        assert_eq!(states(vec![]), [State::Failed]);
        assert_eq!(states(vec![(Ok(()), hierarchy(2))]), [State::Ok]);
        assert_eq!(states(vec![(denied(), hierarchy(2))]), [State::Failed]);
        assert_eq!(
            states(vec![(Ok(()), hierarchy(1)), (denied(), hierarchy(2))]),
            [State::Ok, State::Warning]
        );
    }
}
