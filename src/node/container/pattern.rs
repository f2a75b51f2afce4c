//! Patterns for volumes that may be saved (`--allow-volume`), by their location on the node or by their file system.
//! Only the kernel's information on a mount is matched, never a path in the container.

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use crate::node::procfs::MountInfo;

/// Placeholder for the owner of a session.
const USER: &str = "{user}";

/// A directory of the node with everything below it, or a file system type with a prefix of the source.
///
/// `/home/{user}` matches what is there on the node. `nfs4:nas.example.org:/home/{user}` matches the mount's source
/// followed by the mounted directory within it. `nfs4:` alone matches every file system of that type. Whole components
/// are compared: `/home/al` does not match `/home/alice`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// A path on the node.
    Path(PathBuf),
    /// A file system type, and a prefix of the source with the mounted directory appended.
    Source {
        /// Type as in mountinfo.
        fs_type: String,
        /// Prefix of the source; empty matches any.
        source: PathBuf,
    },
}

/// A text that is not a valid pattern.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} allows nothing: expected an absolute path on the node, or TYPE:SOURCE, with {{user}} in it where the owner's name is, \
     and without . and .."
)]
pub struct PatternError(String);

impl FromStr for Pattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        let wrong = || PatternError(text.to_owned());
        // Any other placeholder would be taken for a literal name.
        let rest = text.replace(USER, "");
        if rest.contains(['{', '}', '\0']) {
            return Err(wrong());
        }
        if text.starts_with('/') {
            let plain = Path::new(text)
                .components()
                .all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
            // The root of the node is not a directory for volumes.
            return match Path::new(text).file_name() {
                Some(_) if plain => Ok(Self::Path(Path::new(text).components().collect())),
                _ => Err(wrong()),
            };
        }
        let (fs_type, source) = text.split_once(':').ok_or_else(wrong)?;
        let is_type = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        let dotted = source.split('/').any(|part| matches!(part, "." | ".."));
        if fs_type.is_empty() || !fs_type.chars().all(is_type) || dotted {
            return Err(wrong());
        }
        Ok(Self::Source {
            fs_type: fs_type.to_owned(),
            source: Path::new(source).components().collect(),
        })
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => write!(f, "{}", path.display()),
            Self::Source { fs_type, source } => write!(f, "{fs_type}:{}", source.display()),
        }
    }
}

impl Pattern {
    /// Substitutes the owner's name. Returns `None` if the pattern needs it and `owner` is not a valid path component.
    pub fn of(&self, owner: &str) -> Option<Self> {
        let text = self.to_string();
        if !text.contains(USER) {
            return Some(self.clone());
        }
        let one = !owner.is_empty()
            && !matches!(owner, "." | "..")
            && !owner.contains(['/', '{', '}', ':'])
            && !owner.chars().any(char::is_control);
        one.then(|| text.replace(USER, owner).parse().ok())
            .flatten()
    }

    /// Returns whether the pattern matches a mount. `node` is the node's mount table.
    pub(crate) fn covers(&self, mount: &MountInfo, node: &[MountInfo]) -> bool {
        match self {
            Self::Path(path) => {
                // The path is in a file system of the node. The mount has to be of the same file system, with the same
                // directory or one below it as its root.
                let Some(holds) = visible(node, path) else {
                    return false;
                };
                let Ok(rest) = path.strip_prefix(&holds.mount_point) else {
                    return false;
                };
                holds.device == mount.device && mount.root.starts_with(holds.root.join(rest))
            }
            Self::Source { fs_type, source } => {
                *fs_type == mount.fs_type && whole_source(mount).starts_with(source)
            }
        }
    }
}

/// Returns the mount of the node that contains a path: the deepest one, and of several at one place the topmost.
fn visible<'m>(node: &'m [MountInfo], path: &Path) -> Option<&'m MountInfo> {
    let on_the_way = || node.iter().filter(|m| path.starts_with(&m.mount_point));
    let depth = |m: &MountInfo| m.mount_point.components().count();
    let deepest = on_the_way().map(depth).max()?;
    let there = || on_the_way().filter(|m| depth(m) == deepest);
    there().find(|m| !there().any(|over| over.parent == m.id && over.id != m.id))
}

/// Joins source and mounted directory: `nas:/home` and `/alice` become `nas:/home/alice`.
fn whole_source(mount: &MountInfo) -> PathBuf {
    let mut whole = mount.source.as_bytes().to_vec();
    whole.push(b'/');
    whole.extend(mount.root.as_os_str().as_bytes());
    Path::new(OsStr::from_bytes(&whole)).components().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::procfs::parse_mountinfo;

    const NODE: &[u8] = b"\
1 0 254:0 / / rw - ext4 /dev/vda rw
2 1 254:16 / /home rw - xfs /dev/vdb rw
3 1 0:50 / /srv/nas rw - nfs4 nas:/export rw
4 2 0:60 / /home/carol rw - tmpfs tmpfs rw
5 1 254:16 /shared /srv/shared rw - xfs /dev/vdb rw
";

    fn mount(device: &str, root: &str, kind: &str, source: &str) -> MountInfo {
        let line = format!("9 8 {device} {root} /data rw - {kind} {source} rw\n");
        parse_mountinfo(line.as_bytes()).unwrap().remove(0)
    }

    #[test]
    fn a_path_of_the_node_covers_what_lies_there() {
        let node = parse_mountinfo(NODE).unwrap();
        let xfs = |root| mount("254:16", root, "xfs", "/dev/vdb");
        for (pattern, mount, expected) in [
            ("/home/alice", xfs("/alice"), true),
            ("/home/alice", xfs("/alice/work"), true),
            ("/home/alice", xfs("/alice2"), false),
            ("/home/alice", xfs("/"), false),
            ("/home/alice", xfs("/bob"), false),
            ("/home", xfs("/bob"), true),
            ("/home", xfs("/"), true),
            // The same path on another file system.
            (
                "/home/alice",
                mount("254:0", "/home/alice", "ext4", "/dev/vda"),
                false,
            ),
            ("/alice", xfs("/alice"), false),
            // Another file system is mounted at that path.
            ("/home/carol", xfs("/carol"), false),
            ("/srv/shared/a", xfs("/shared/a"), true),
            ("/srv/shared", xfs("/shared2"), false),
            (
                "/srv/nas/x",
                mount("0:50", "/x/y", "nfs4", "nas:/export"),
                true,
            ),
        ] {
            let parsed: Pattern = pattern.parse().unwrap();
            assert_eq!(
                parsed.covers(&mount, &node),
                expected,
                "{pattern} {:?}",
                mount.root
            );
        }
    }

    #[test]
    fn a_source_covers_what_comes_from_there() {
        for (pattern, root, kind, source, expected) in [
            ("nfs4:nas:/export", "/", "nfs4", "nas:/export", true),
            (
                "nfs4:nas:/export/alice",
                "/alice/x",
                "nfs4",
                "nas:/export",
                true,
            ),
            (
                "nfs4:nas:/export/alice",
                "/alicia",
                "nfs4",
                "nas:/export",
                false,
            ),
            ("nfs4:nas:/export", "/", "nfs4", "nas2:/export", false),
            ("nfs4:nas:/ex", "/", "nfs4", "nas:/export", false),
            ("nfs:nas:/export", "/", "nfs4", "nas:/export", false),
            ("lustre:", "/x", "lustre", "10.0.0.1@tcp:/fs", true),
            ("nfs4:", "/x", "lustre", "10.0.0.1@tcp:/fs", false),
        ] {
            let parsed: Pattern = pattern.parse().unwrap();
            let mount = mount("0:70", root, kind, source);
            assert_eq!(
                parsed.covers(&mount, &[]),
                expected,
                "{pattern} {source} {root}"
            );
        }
    }

    #[test]
    fn an_owner_is_one_component_or_nothing_is_allowed() {
        let pattern: Pattern = "/home/{user}".parse().unwrap();
        assert_eq!(pattern.of("alice"), "/home/alice".parse().ok());
        for bad in ["", ".", "..", "a/b", "../bob", "{user}", "a\nb", "a:b"] {
            assert_eq!(pattern.of(bad), None, "{bad:?}");
        }
        let fixed: Pattern = "/srv/data".parse().unwrap();
        assert_eq!(fixed.of(""), Some(fixed.clone()));
        let part: Pattern = "nfs4:nas:/home/{user}-work".parse().unwrap();
        assert_eq!(part.of("bo"), "nfs4:nas:/home/bo-work".parse().ok());
    }

    #[test]
    fn what_would_allow_everything_or_nothing_is_refused() {
        for bad in [
            "",
            "/",
            "home",
            "/home/..",
            "/home/{name}",
            "/a/../b",
            ":",
            ":x",
            "ext 4:",
            "nfs4:a/../b",
            "*",
            "/home/{user",
        ] {
            assert!(bad.parse::<Pattern>().is_err(), "{bad}");
        }
    }
}
