//! What the runtimes wrote down, held against what the kernel says: the list of containers, and the search in it.
//!
//! A container's first process is its tenant's: its number, its start and the device number of its root are the kernel's
//! word, all else in its mountinfo is the tenant's (`witness`, `mounted`).

use std::path::PathBuf;

use super::bundle::{self, Bundle};
use super::error::{Error, Problem};
use super::mounted::{self, Record};
use super::process::{self, Process};
use super::roots::Roots;
use super::witness::{RootMount, Tables, Witness};
use super::{Container, Pod, Runtime, Spec, containerd, docker, storage};

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
    /// The node's ids that its files begin at, by the name of the store: user, group.
    pub(super) store_ids: Option<(u32, u32)>,
    /// The directories that the runtime made for it.
    pub(super) record: Option<Record>,
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
        let known = drafts
            .iter_mut()
            .find(|known| known.id == draft.id && known.pid == draft.pid);
        match known {
            // With containerd's image store Docker's own files do not say what it is made of.
            Some(known) if known.record.is_none() => {
                known.record = draft.record;
                known.bases.extend(draft.bases);
            }
            Some(_) => {}
            None => drafts.push(draft),
        }
    }
    drafts
}

/// All containers on this node, and what stood in the way of knowing more.
pub fn list(roots: &Roots) -> Listing {
    let mut listing = Listing::default();
    let tables = Tables::default();
    for draft in drafts(roots, &mut listing.problems) {
        let process = process::read_most(roots, draft.pid, process::TO_LIST);
        let result = process.and_then(|process| {
            process
                .map(|p| assemble(roots, &tables, &draft, &p))
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
    let tables = Tables::default();
    if let Wanted::Pid(pid) = wanted {
        return find_process(roots, &tables, &drafts, pid, name);
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
            [(draft, process)] => return assemble(roots, &tables, draft, process),
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

/// Whether `container` is still what it was: the same process with the same file system as its root, of which the same
/// witness says the same, and whose directories are still mounted where they are read.
pub fn recheck(roots: &Roots, container: &Container) -> Result<(), Error> {
    let gone = |detail: String| Error::Gone {
        container: container.id.clone(),
        detail,
    };
    let pid = container.pid;
    let process = process::read(roots, pid)?
        .filter(|process| process.start == container.pid_start)
        .ok_or_else(|| gone(format!("its process {pid} is no longer there")))?;
    let device = mounted::device_of(&container.id, &process).map_err(|e| gone(e.to_string()))?;
    let (root, tables) = (&container.root, Tables::default());
    if device != root.device || !tables.still(roots, &process, root)? {
        return Err(gone("its root is another one now".to_owned()));
    }
    tables.prove_layers_of(roots, &container.id, &process, device, &container.overlay)
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
                .ok_or_else(|| bad("expected pid: and a process number"));
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
    tables: &Tables,
    drafts: &[Draft],
    pid: u32,
    name: &str,
) -> Result<Container, Error> {
    let not_found = || Error::NotFound {
        wanted: name.to_owned(),
        candidates: Vec::new(),
        problems: Vec::new(),
    };
    let process = process::read(roots, pid)?.ok_or_else(not_found)?;
    let line = process.root().ok_or_else(not_found)?;
    let device = mounted::device_of(name, &process)?;
    // A process of a container is that container: only its runtime knows the base. Same file system, same container.
    for draft in drafts {
        let Ok(Some(first)) = process::read_most(roots, draft.pid, process::TO_LIST) else {
            continue;
        };
        if draft.pid == pid
            || first
                .root()
                .is_some_and(|r| r.fs_type == "overlay" && r.device == device)
        {
            return match process::read(roots, draft.pid)? {
                Some(whole) => assemble(roots, tables, draft, &whole),
                None => Err(Error::Gone {
                    container: draft.id.clone(),
                    detail: format!("its process {} is no longer there", draft.pid),
                }),
            };
        }
    }
    let root = RootMount {
        device,
        options: line.super_options.clone(),
        witness: Witness::Itself,
    };
    let overlay = mounted::options_of(name, line)?
        .resolve(&[], process::index_default(), &|path| roots.locate(path))
        .map_err(|source| Error::Mount {
            container: name.to_owned(),
            source,
        })?;
    tables.prove_layers_of(roots, name, &process, device, &overlay)?;
    Ok(Container {
        runtime: Runtime::Process,
        id: format!("pid:{pid}"),
        names: Vec::new(),
        namespace: None,
        pod: None,
        pid,
        pid_start: process.start,
        root,
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

fn assemble(
    roots: &Roots,
    tables: &Tables,
    draft: &Draft,
    process: &Process,
) -> Result<Container, Error> {
    mounted::same_ids(draft, process)?;
    let (overlay, root) = mounted::root_of(roots, tables, draft, process)?;
    Ok(Container {
        runtime: draft.runtime,
        id: draft.id.clone(),
        names: draft.names.clone(),
        namespace: draft.namespace.clone(),
        pod: draft.pod.clone(),
        pid: process.pid,
        pid_start: process.start,
        root,
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
