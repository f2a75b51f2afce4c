//! The programs by which a session is started: whether they are in its tree, from which an image is made. A user can
//! have deleted or replaced them, and an image without them does not start.
//!
//! Paths and links are a tenant's: they are followed within the tree, by lookups that are bounded in number.

use std::collections::{BTreeSet, VecDeque};
use std::io;

use rustix::fs::FileType;

use crate::common::escape;
use crate::image::packages::Program;
use crate::node::container::{Container, Spec};
use crate::node::overlay::lower::{Found, Lowers, Stack, join};
use crate::node::overlay::mount::OverlayMount;
use crate::node::overlay::root::Root;

/// The program by which a JupyterHub starts a server, and the module that is the same.
const SINGLEUSER: &str = "jupyterhub-singleuser";
const MODULE: &str = "jupyterhub.singleuser";
/// The variable that every JupyterHub sets for its servers.
const HUB: &str = "JUPYTERHUB_SERVICE_PREFIX";
/// Directories of programs if the environment has none, as runtimes set them.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Maximum number of directories that are searched.
const MAX_DIRECTORIES: usize = 64;
/// Maximum number of names that are looked up for one program, over all directories and links.
const MAX_LOOKUPS: usize = 4096;

/// Returns the programs by which a container was started, as they are in its tree now; none that cannot be looked for.
pub(super) fn of(container: &Container) -> Vec<Program> {
    let now = Tree::open(container, true);
    let base = Tree::open(container, false);
    let (Ok(now), Ok(base)) = (now, base) else {
        return Vec::new();
    };
    listed(&container.spec, &now, &base)
}

fn listed(spec: &Spec, now: &Tree, base: &Tree) -> Vec<Program> {
    let search = search_path(spec);
    let first = spec.args.first().map(String::as_str);
    let first = first.filter(|name| name.starts_with('/') || !name.contains('/'));
    let is_module = spec.args.iter().any(|word| word == MODULE);
    let is_of_hub = spec
        .env
        .iter()
        .any(|line| line.split('=').next() == Some(HUB));
    let by_name = |name: &&str| first.is_none_or(|first| first != *name);
    // A base that never had it is started in another way.
    let in_base = |name: &&str| matches!(base.find(name, &search), Ok(Place::File(_)));
    let hub = Some(SINGLEUSER)
        .filter(|_| is_of_hub && !is_module)
        .filter(by_name)
        .filter(in_base);
    let program = |name: &str| {
        let place = now.find(name, &search).ok()?;
        Some(Program {
            name: escape::limited(name, 256),
            mounted: matches!(place, Place::Mounted),
            path: match place {
                Place::File(path) => Some(format!("/{}", escape::path(&path))),
                Place::Mounted | Place::Nowhere => None,
            },
        })
    };
    let names = first.into_iter().chain(hub);
    names.filter_map(program).collect()
}

fn search_path(spec: &Spec) -> Vec<String> {
    let set = spec.env.iter().find_map(|line| line.strip_prefix("PATH="));
    let all = set.filter(|path| !path.is_empty()).unwrap_or(DEFAULT_PATH);
    let absolute = all
        .split(':')
        .filter(|directory| directory.starts_with('/'));
    absolute.take(MAX_DIRECTORIES).map(str::to_owned).collect()
}

/// Where a program is.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    /// An executable file at this path, without a leading slash.
    File(Vec<u8>),
    /// Perhaps below a mount, of which nothing is known.
    Mounted,
    Nowhere,
}

/// A container's tree, or that of its base alone.
struct Tree {
    layers: Lowers,
    /// Paths at which something is mounted, without leading slashes.
    mounts: BTreeSet<Vec<u8>>,
}

impl Tree {
    fn open(container: &Container, with_upper: bool) -> io::Result<Self> {
        let mounts = container.mounts.iter();
        let mounts = mounts.map(|mount| plain(mount.destination.as_os_str().as_encoded_bytes()));
        Self::new(&container.overlay, with_upper, mounts.collect())
    }

    fn new(
        overlay: &OverlayMount,
        with_upper: bool,
        mounts: BTreeSet<Vec<u8>>,
    ) -> io::Result<Self> {
        let upper = with_upper.then_some(&overlay.upper);
        let merged = upper.into_iter().chain(&overlay.lowers);
        let roots = merged.clone().chain(&overlay.data_only);
        let roots: io::Result<Vec<Root>> = roots.map(|path| Root::open(path)).collect();
        let layers = Lowers {
            merged: merged.count(),
            roots: roots?,
            namespace: overlay.namespace,
        };
        Ok(Self { layers, mounts })
    }

    /// Looks for a program as a shell does: by its path, or by its name in directories.
    fn find(&self, name: &str, search: &[String]) -> io::Result<Place> {
        let mut left = MAX_LOOKUPS;
        if name.contains('/') {
            return self.resolve(name.as_bytes(), &mut left);
        }
        let mut mounted = false;
        for directory in search {
            match self.resolve(&join(directory.as_bytes(), name.as_bytes()), &mut left)? {
                Place::Nowhere => {}
                Place::Mounted => mounted = true,
                found @ Place::File(_) => return Ok(found),
            }
        }
        Ok(if mounted {
            Place::Mounted
        } else {
            Place::Nowhere
        })
    }

    /// Follows a path and its links within the tree, by at most `left` lookups.
    fn resolve(&self, path: &[u8], left: &mut usize) -> io::Result<Place> {
        let mut rest: VecDeque<Vec<u8>> = components(path).collect();
        let mut at: Vec<(Vec<u8>, Stack)> = Vec::new();
        while let Some(name) = rest.pop_front() {
            *left = left
                .checked_sub(1)
                .ok_or_else(|| io::Error::other("too many lookups"))?;
            if name == b".." {
                at.pop();
                continue;
            }
            let (above, parent) = at.last().map_or_else(
                || (Vec::new(), self.layers.root_stack()),
                |(path, stack)| (path.clone(), stack.clone()),
            );
            let here = join(&above, &name);
            if self.mounts.contains(&here) {
                return Ok(Place::Mounted);
            }
            match self.layers.lookup(&parent, &name)? {
                Found::Absent => return Ok(Place::Nowhere),
                Found::Dir { stack, .. } => at.push((here, stack)),
                Found::Other { place, stat } => match FileType::from_raw_mode(stat.st_mode) {
                    FileType::Symlink => {
                        let root = &self.layers.roots[usize::from(place.root)];
                        let target = root.read_link(&place.path)?;
                        if target.starts_with(b"/") {
                            at.clear();
                        }
                        for name in components(&target).rev() {
                            rest.push_front(name);
                        }
                    }
                    FileType::RegularFile if rest.is_empty() && stat.st_mode & 0o111 != 0 => {
                        return Ok(Place::File(here));
                    }
                    _ => return Ok(Place::Nowhere),
                },
            }
        }
        Ok(Place::Nowhere)
    }
}

/// Returns the components of a path that lead somewhere else.
fn components(path: &[u8]) -> impl DoubleEndedIterator<Item = Vec<u8>> {
    let names = path.split(|&byte| byte == b'/');
    names
        .filter(|name| !name.is_empty() && *name != b".")
        .map(<[u8]>::to_vec)
}

fn plain(path: &[u8]) -> Vec<u8> {
    components(path).collect::<Vec<_>>().join(&b'/')
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::path::PathBuf;

    use rustix::fs::{CWD, FileType, Mode, mknodat};

    use super::*;
    use crate::node::overlay::xattr::Namespace;

    type Outcome = Result<(), Box<dyn std::error::Error>>;

    struct Container {
        dir: tempfile::TempDir,
        overlay: OverlayMount,
        spec: Spec,
        mounts: BTreeSet<Vec<u8>>,
    }

    impl Container {
        fn new() -> Result<Self, Box<dyn std::error::Error>> {
            let dir = tempfile::tempdir()?;
            let path = |name: &str| -> std::io::Result<PathBuf> {
                let path = dir.path().join(name);
                fs::create_dir(&path)?;
                Ok(path)
            };
            let overlay = OverlayMount {
                upper: path("upper")?,
                lowers: vec![path("lower1")?, path("lower2")?],
                data_only: Vec::new(),
                id_mapped: Vec::new(),
                namespace: Namespace::User,
                index: false,
            };
            let spec = Spec {
                args: ["tini", "--", "start.sh"].map(str::to_owned).into(),
                env: [
                    "JUPYTERHUB_SERVICE_PREFIX=/user/a/",
                    "PATH=/opt/bin:/usr/bin",
                ]
                .map(str::to_owned)
                .into(),
                ..Spec::default()
            };
            let it = Self {
                dir,
                overlay,
                spec,
                mounts: BTreeSet::new(),
            };
            it.program("lower2/usr/bin/tini", 0o755)?;
            it.program("lower1/opt/real/jupyterhub-singleuser", 0o755)?;
            fs::create_dir(it.dir.path().join("lower1/opt/bin"))?;
            symlink(
                "../real/jupyterhub-singleuser",
                it.dir.path().join("lower1/opt/bin/jupyterhub-singleuser"),
            )?;
            Ok(it)
        }

        fn program(&self, path: &str, mode: u32) -> std::io::Result<()> {
            let path = self.dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap_or(&path))?;
            fs::write(&path, "#!/bin/sh\n")?;
            fs::set_permissions(path, Permissions::from_mode(mode))
        }

        fn delete(&self, path: &str) -> std::io::Result<()> {
            let path = self.overlay.upper.join(path);
            fs::create_dir_all(path.parent().unwrap_or(&path))?;
            Ok(mknodat(
                CWD,
                &path,
                FileType::CharacterDevice,
                Mode::empty(),
                0,
            )?)
        }

        /// Returns name, path and `mounted` of each program.
        fn found(&self) -> Result<Vec<(String, Option<String>, bool)>, std::io::Error> {
            let tree = |upper| Tree::new(&self.overlay, upper, self.mounts.clone());
            let listed = listed(&self.spec, &tree(true)?, &tree(false)?);
            Ok(listed
                .into_iter()
                .map(|it| (it.name, it.path, it.mounted))
                .collect())
        }
    }

    fn at(name: &str, path: &str) -> (String, Option<String>, bool) {
        (name.to_owned(), Some(path.to_owned()), false)
    }

    fn not(name: &str, mounted: bool) -> (String, Option<String>, bool) {
        (name.to_owned(), None, mounted)
    }

    #[test]
    fn programs_are_found_over_all_layers_and_links() -> Outcome {
        let it = Container::new()?;
        let all = [
            at("tini", "/usr/bin/tini"),
            at(SINGLEUSER, "/opt/real/jupyterhub-singleuser"),
        ];
        assert_eq!(it.found()?, all);
        // A user's own, in a directory that is searched before.
        it.program("upper/opt/bin/tini", 0o755)?;
        assert_eq!(it.found()?[0], at("tini", "/opt/bin/tini"));
        it.program("upper/opt/bin/tini", 0o644)?;
        assert_eq!(it.found()?[0], at("tini", "/usr/bin/tini"));
        Ok(())
    }

    #[test]
    fn what_was_deleted_or_cannot_be_executed_is_missing() -> Outcome {
        let it = Container::new()?;
        it.delete("opt/real")?;
        it.program("upper/usr/bin/tini", 0o644)?;
        assert_eq!(it.found()?, [not("tini", false), not(SINGLEUSER, false)]);
        Ok(())
    }

    #[test]
    fn a_mounted_directory_is_said() -> Outcome {
        let mut it = Container::new()?;
        it.mounts.insert(b"opt".to_vec());
        it.spec.args[0] = "/opt/bin/server".to_owned();
        assert_eq!(it.found()?, [not("/opt/bin/server", true)]);
        Ok(())
    }

    #[test]
    fn only_what_starts_this_session_is_looked_for() -> Outcome {
        let mut it = Container::new()?;
        it.spec.args = ["tini", "python3", "-m", MODULE].map(str::to_owned).into();
        assert_eq!(it.found()?, [at("tini", "/usr/bin/tini")]);
        it.spec.args = vec!["tini".to_owned()];
        it.spec.env.remove(0);
        assert_eq!(it.found()?, [at("tini", "/usr/bin/tini")]);
        // A hub that starts its servers in another way has a base without it.
        let it = Container::new()?;
        fs::remove_dir_all(it.dir.path().join("lower1/opt"))?;
        assert_eq!(it.found()?, [at("tini", "/usr/bin/tini")]);
        Ok(())
    }

    #[test]
    fn a_tenant_s_links_end() -> Outcome {
        let it = Container::new()?;
        let bin = it.overlay.upper.join("usr/bin");
        fs::create_dir_all(&bin)?;
        symlink("tini", bin.join("tini"))?;
        // Unknown, so that nothing is said of it.
        assert_eq!(
            it.found()?,
            [at(SINGLEUSER, "/opt/real/jupyterhub-singleuser")]
        );
        // Out of the tree: the root is where it ends.
        fs::remove_file(bin.join("tini"))?;
        symlink("../../../../../../../../bin/sh", bin.join("tini"))?;
        assert_eq!(it.found()?[0], not("tini", false));
        Ok(())
    }
}
