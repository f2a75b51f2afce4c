//! What the runtimes wrote down, held against what the kernel says: the list of containers, and the search in it.
//!
//! A container's first process is its tenant's. In a user namespace of its own it can mount an overlay of whatever
//! directories it likes to name and make that its root, and their names in mountinfo would read as the node's. So a
//! root counts only if its upper is the one that the runtime recorded, or if the node's own mount table shows the same
//! file system where the runtime mounts roots.

use std::path::{Path, PathBuf};

use super::bundle::{self, Bundle};
use super::error::{Error, Problem};
use super::process::{self, Process};
use super::roots::Roots;
use super::{Container, Pod, Runtime, Spec, containerd, docker, storage};
use crate::overlay::mount::{MountError, MountInfo, OverlayOptions};

/// Shorter prefixes of an ID are more likely a mistake than a name.
const MIN_PREFIX: usize = 3;

/// Everything that runs on this node with an overlay as its root.
#[derive(Clone, Debug, Default)]
pub struct Listing {
    /// Sorted by namespace, pod and name.
    pub containers: Vec<Container>,
    /// The pods' own pause containers: nobody wants them saved.
    pub sandboxes: Vec<Container>,
    /// What could not be read, and containers that run but cannot be saved.
    pub problems: Vec<Problem>,
}

/// What a runtime's files say about one container. Paths are the node's, without a host root in front of them.
#[derive(Clone, Debug)]
pub(super) struct Draft {
    pub(super) runtime: Runtime,
    pub(super) id: String,
    pub(super) names: Vec<String>,
    pub(super) namespace: Option<String>,
    pub(super) pod: Option<Pod>,
    pub(super) image_name: Option<String>,
    pub(super) runtime_root_mode: Option<u32>,
    /// A pod's pause container.
    pub(super) sandbox: bool,
    pub(super) pid: u32,
    pub(super) bundle: Option<Bundle>,
    /// The directory or file that speaks of it, for messages.
    pub(super) state: PathBuf,
    /// The upper directory that the runtime made for it.
    pub(super) upper: Option<PathBuf>,
    /// The lowers that the runtime meant to mount, topmost first.
    pub(super) lowers: Option<Vec<PathBuf>>,
    /// Directories from which the runtime mounts when it shortens paths.
    pub(super) bases: Vec<PathBuf>,
    /// Where on the node it mounted the root.
    pub(super) mounted_at: Option<PathBuf>,
}

impl Draft {
    /// Unambiguous, and a valid argument.
    fn label(&self) -> String {
        let short = &self.id[..self
            .id
            .char_indices()
            .nth(12)
            .map_or(self.id.len(), |(at, _)| at)];
        match (&self.pod, self.names.first()) {
            (Some(pod), _) => format!("{}/{}/{} ({short})", pod.namespace, pod.name, pod.container),
            (None, Some(name)) => format!("{name} ({short})"),
            (None, None) => match &self.namespace {
                Some(namespace) => format!("{short} (namespace {namespace})"),
                None => short.to_owned(),
            },
        }
    }
}

fn drafts(roots: &Roots, problems: &mut Vec<Problem>) -> Vec<Draft> {
    let mut drafts = docker::drafts(roots, problems);
    drafts.extend(storage::drafts(roots, problems));
    for draft in containerd::drafts(roots, problems) {
        // Docker runs its containers through containerd, and k3s' roots may be links to others.
        if !drafts
            .iter()
            .any(|known| known.id == draft.id && known.pid == draft.pid)
        {
            drafts.push(draft);
        }
    }
    drafts
}

/// All containers on this node, and what stood in the way of knowing more.
pub fn list(roots: &Roots) -> Listing {
    let mut listing = Listing::default();
    let node = NodeMounts::default();
    for draft in drafts(roots, &mut listing.problems) {
        let process = process::read_most(roots, draft.pid, process::TO_LIST);
        let result = process.and_then(|process| {
            process
                .map(|p| assemble(roots, &node, &draft, &p))
                .transpose()
        });
        match result {
            Ok(Some(container)) if draft.sandbox => listing.sandboxes.push(container),
            Ok(Some(container)) => listing.containers.push(container),
            // It has ended.
            Ok(None) => {}
            Err(error) => listing.problems.push(error.into_problem(&draft.state)),
        }
    }
    let key = |c: &Container| {
        (
            c.namespace.clone(),
            c.pod.clone().map(|p| (p.namespace, p.name)),
            c.names.clone(),
        )
    };
    listing.containers.sort_by_cached_key(key);
    listing.sandboxes.sort_by_cached_key(key);
    listing
}

/// The one container that `name` means: a full ID, a unique prefix of one (3 characters at least), a name,
/// `NAMESPACE/POD[/CONTAINER]`, or `pid:N` for a process (if that runs in a container, the container).
///
/// A process that no runtime knows is taken at its mount table's word, which in a user namespace is its owner's word:
/// `pid:N` is for administrators, a service must not pass it on from its users.
pub fn find(roots: &Roots, name: &str) -> Result<Container, Error> {
    let wanted = name.parse::<Wanted>()?;
    let mut problems = Vec::new();
    let drafts = drafts(roots, &mut problems);
    let node = NodeMounts::default();
    if let Wanted::Pid(pid) = wanted {
        return find_process(roots, &node, &drafts, pid, name);
    }
    let mut ended = None;
    for rank in 0..wanted.ranks() {
        let mut running = Vec::new();
        for draft in drafts.iter().filter(|d| !d.sandbox && wanted.fits(d, rank)) {
            match process::read(roots, draft.pid)? {
                Some(process) => running.push((draft, process)),
                None => ended = Some(draft),
            }
        }
        match running.as_slice() {
            [] => {}
            [(draft, process)] => return assemble(roots, &node, draft, process),
            many => {
                let candidates = many.iter().map(|(draft, _)| draft.label()).collect();
                return Err(Error::Ambiguous {
                    wanted: name.to_owned(),
                    candidates,
                });
            }
        }
    }
    if let Some(draft) = ended {
        let detail = format!("its process {} is no longer there", draft.pid);
        return Err(Error::Gone {
            container: draft.id.clone(),
            detail,
        });
    }
    if let Some(problem) = problems.iter().find(|p| p.permission) {
        return Err(Error::NotPermitted {
            path: problem.path.clone(),
        });
    }
    Err(Error::NotFound {
        wanted: name.to_owned(),
        candidates: similar(roots, &drafts, name),
        problems,
    })
}

/// Whether `container` is still what it was: the same process, with the same upper directory under its root.
pub fn recheck(roots: &Roots, container: &Container) -> Result<(), Error> {
    let gone = |detail: String| Error::Gone {
        container: container.id.clone(),
        detail,
    };
    let pid = container.pid;
    let process = process::read(roots, pid)?
        .filter(|process| process.start == container.pid_start)
        .ok_or_else(|| gone(format!("its process {pid} is no longer there")))?;
    let options = overlay_of(&container.id, &process)
        .map_err(|e| gone(e.to_string()))?
        .1;
    let same = options.upper.iter().any(|upper| {
        if upper.is_absolute() {
            roots
                .locate(upper)
                .is_ok_and(|upper| upper == container.overlay.upper)
        } else {
            container.overlay.upper.ends_with(upper)
        }
    });
    if same {
        Ok(())
    } else {
        Err(gone("its root is another one now".to_owned()))
    }
}

/// A CONTAINER argument.
enum Wanted {
    Pid(u32),
    Pod {
        namespace: String,
        name: String,
        container: Option<String>,
    },
    /// An ID, a name or a prefix, in this order.
    Plain(String),
}

impl std::str::FromStr for Wanted {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let bad = |expected| Error::BadName {
            wanted: text.to_owned(),
            expected,
        };
        if let Some(pid) = text.strip_prefix("pid:") {
            let pid = pid.parse().ok().filter(|&pid| pid > 0);
            return pid
                .map(Self::Pid)
                .ok_or_else(|| bad("expected a process number after pid:"));
        }
        let parts: Vec<&str> = text.split('/').collect();
        if parts.iter().any(|part| part.is_empty()) {
            return Err(bad(
                "expected an ID, a name, NAMESPACE/POD[/CONTAINER] or pid:N",
            ));
        }
        match parts.as_slice() {
            [plain] => Ok(Self::Plain((*plain).to_owned())),
            [namespace, name, container @ ..] if container.len() <= 1 => Ok(Self::Pod {
                namespace: (*namespace).to_owned(),
                name: (*name).to_owned(),
                container: container.first().map(|&c| c.to_owned()),
            }),
            _ => Err(bad("expected no more than NAMESPACE/POD/CONTAINER")),
        }
    }
}

impl Wanted {
    fn ranks(&self) -> u8 {
        if matches!(self, Self::Plain(_)) { 3 } else { 1 }
    }

    fn fits(&self, draft: &Draft, rank: u8) -> bool {
        match (self, rank) {
            (Self::Pid(_), _) => false,
            (
                Self::Pod {
                    namespace,
                    name,
                    container,
                },
                _,
            ) => draft.pod.as_ref().is_some_and(|pod| {
                pod.namespace == *namespace
                    && pod.name == *name
                    && container
                        .as_ref()
                        .is_none_or(|container| pod.container == *container)
            }),
            (Self::Plain(plain), 0) => draft.id == *plain,
            (Self::Plain(plain), 1) => draft.names.contains(plain),
            (Self::Plain(plain), _) => {
                plain.len() >= MIN_PREFIX && draft.id.starts_with(plain.as_str())
            }
        }
    }
}

/// Labels of what runs, that which resembles `name` first.
fn similar(roots: &Roots, drafts: &[Draft], name: &str) -> Vec<String> {
    let words: Vec<&str> = name
        .split('/')
        .filter(|word| word.len() >= MIN_PREFIX)
        .collect();
    let mut labels: Vec<(bool, String)> = drafts
        .iter()
        .filter(|draft| {
            !draft.sandbox && matches!(process::start_of(roots, draft.pid), Ok(Some(_)))
        })
        .map(|draft| {
            let label = draft.label();
            (!words.iter().any(|word| label.contains(word)), label)
        })
        .collect();
    labels.sort();
    labels.into_iter().map(|(_, label)| label).collect()
}

fn find_process(
    roots: &Roots,
    node: &NodeMounts,
    drafts: &[Draft],
    pid: u32,
    name: &str,
) -> Result<Container, Error> {
    let Some(process) = process::read(roots, pid)? else {
        return Err(Error::NotFound {
            wanted: name.to_owned(),
            candidates: Vec::new(),
            problems: Vec::new(),
        });
    };
    let (root, options) = overlay_of(name, &process)?;
    // A process of a container is that container: only its runtime knows the base. Same file system, same container.
    for draft in drafts {
        let Ok(Some(first)) = process::read_most(roots, draft.pid, process::TO_LIST) else {
            continue;
        };
        if draft.pid == pid
            || first
                .root()
                .is_some_and(|r| r.fs_type == "overlay" && r.device == root.device)
        {
            return match process::read(roots, draft.pid)? {
                Some(whole) => assemble(roots, node, draft, &whole),
                None => Err(Error::Gone {
                    container: draft.id.clone(),
                    detail: format!("its process {} is no longer there", draft.pid),
                }),
            };
        }
    }
    let overlay = options
        .resolve(&[], process::index_default(), &|path| roots.locate(path))
        .map_err(|source| Error::Mount {
            container: name.to_owned(),
            source,
        })?;
    Ok(Container {
        runtime: Runtime::Process,
        id: format!("pid:{pid}"),
        names: Vec::new(),
        namespace: None,
        pod: None,
        pid,
        pid_start: process.start,
        overlay,
        mounts: bundle::unite(None, &process),
        mounts_cut: process.mounts_cut,
        uid_map: process.uid_map,
        gid_map: process.gid_map,
        image_name: None,
        runtime_root_mode: None,
        spec: Spec::default(),
    })
}

/// The root of a process, if it is the whole of an overlay with an upper directory.
fn overlay_of<'p>(
    container: &str,
    process: &'p Process,
) -> Result<(&'p MountInfo, OverlayOptions), Error> {
    let no_overlay = |detail: String| Error::NotOverlay {
        container: container.to_owned(),
        detail,
    };
    let root = process
        .root()
        .ok_or_else(|| no_overlay("its root is not the root of a mount".to_owned()))?;
    if root.fs_type != "overlay" {
        return Err(no_overlay(format!(
            "its root is {}, not an overlay",
            root.fs_type
        )));
    }
    if root.root != Path::new("/") {
        return Err(no_overlay(format!(
            "its root is the directory {} within an overlay",
            root.root.display()
        )));
    }
    let options = OverlayOptions::parse(&root.super_options).map_err(|error| match error {
        MountError::NoUpper => no_overlay(error.to_string()),
        source => Error::Mount {
            container: container.to_owned(),
            source,
        },
    })?;
    Ok((root, options))
}

/// The node's mount table, read when first needed.
#[derive(Default)]
struct NodeMounts(std::cell::OnceCell<Vec<MountInfo>>);

impl NodeMounts {
    /// Whether the file system `device` is mounted at `path` on the node.
    fn has(&self, roots: &Roots, device: (u32, u32), path: &Path) -> bool {
        let mounts = self
            .0
            .get_or_init(|| process::node_mounts(roots).unwrap_or_default());
        mounts
            .iter()
            .filter(|m| m.device == device && m.fs_type == "overlay")
            .any(|m| {
                m.mount_point == path
                    || roots
                        .locate(&m.mount_point)
                        .ok()
                        .is_some_and(|at| roots.locate(path).is_ok_and(|path| path == at))
            })
    }
}

fn assemble(
    roots: &Roots,
    node: &NodeMounts,
    draft: &Draft,
    process: &Process,
) -> Result<Container, Error> {
    let (root, options) = overlay_of(&draft.id, process)?;
    let mount_error = |source| Error::Mount {
        container: draft.id.clone(),
        source,
    };
    let locate = |path: &Path| roots.locate(path);
    let upper = options
        .locate_upper(&draft.bases, &locate)
        .map_err(mount_error)?;
    let recorded = draft
        .upper
        .as_ref()
        .is_some_and(|recorded| locate(recorded).is_ok_and(|r| r == upper));
    if !recorded
        && !draft
            .mounted_at
            .as_ref()
            .is_some_and(|at| node.has(roots, root.device, at))
    {
        let told = |path: &Option<PathBuf>| {
            path.as_ref()
                .map_or("unknown".into(), |p| p.display().to_string())
        };
        return Err(Error::ForeignRoot {
            container: draft.id.clone(),
            detail: format!(
                "process {} writes to {}; its runtime's files say {}, and nothing like it is mounted at {}",
                process.pid,
                upper.display(),
                told(&draft.upper),
                told(&draft.mounted_at)
            ),
        });
    }
    let index_default = process::index_default();
    let overlay = match options.resolve(&draft.bases, index_default, &locate) {
        Ok(overlay) => overlay,
        // Where ids are mapped, runtimes mount mapped copies of the lowers, and take their names away afterwards.
        Err(MountError::Missing {
            role: "lower",
            path,
            tried,
        }) => {
            let meant = draft
                .lowers
                .as_ref()
                .filter(|lowers| lowers.len() == options.lowers.len());
            let meant = meant.map(|lowers| {
                lowers
                    .iter()
                    .map(|lower| locate(lower))
                    .collect::<Result<Vec<_>, _>>()
            });
            let Some(Ok(lowers)) = meant else {
                return Err(mount_error(MountError::Missing {
                    role: "lower",
                    path,
                    tried,
                }));
            };
            options.mount(upper, lowers, Vec::new(), index_default)
        }
        Err(source) => return Err(mount_error(source)),
    };
    Ok(Container {
        runtime: draft.runtime,
        id: draft.id.clone(),
        names: draft.names.clone(),
        namespace: draft.namespace.clone(),
        pod: draft.pod.clone(),
        pid: process.pid,
        pid_start: process.start,
        overlay,
        uid_map: process.uid_map.clone(),
        gid_map: process.gid_map.clone(),
        mounts: bundle::unite(draft.bundle.as_ref(), process),
        mounts_cut: process.mounts_cut,
        image_name: draft.image_name.clone(),
        runtime_root_mode: draft.runtime_root_mode,
        spec: draft.bundle.as_ref().map(Bundle::spec).unwrap_or_default(),
    })
}
