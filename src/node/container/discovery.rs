//! Lists and finds containers, by comparing the runtimes' records with the kernel's view.
//!
//! A container's first process belongs to its tenant. Its PID, start time and the device number of its root are
//! reliable, because the kernel provides them; all other content of its mountinfo is under the tenant's control
//! (`mount_tables`, `root_mount`).

use std::path::Path;

use super::bundle::{self, Bundle};
use super::error::{Error, Problem};
use super::mount_tables::Tables;
use super::process::{self, Process};
use super::recorded::RecordedContainer;
use super::root_mount;
use super::roots::{Roots, read_dir};
use super::stopped::StoppedContainer;
use super::table::{RootMount, TableSource};
use super::{Container, Pod, Runtime, Spec, containerd, docker, storage};

/// Minimum length of an ID prefix. Shorter ones are more likely a mistake.
const MIN_PREFIX: usize = 3;

/// Everything on this node that runs with an overlay as its root.
#[derive(Clone, Debug, Default)]
pub struct Listing {
    /// Containers, sorted by namespace, pod and name.
    pub containers: Vec<Container>,
    /// Pause containers of pods, which are never saved.
    pub sandboxes: Vec<Container>,
    /// State that could not be read, and running containers that cannot be saved.
    pub problems: Vec<Problem>,
}

fn recorded_containers(roots: &Roots, problems: &mut Vec<Problem>) -> Vec<RecordedContainer> {
    let roots = &roots.believed(problems);
    let mut drafts = docker::recorded_containers(roots, problems);
    drafts.extend(storage::recorded_containers(roots, problems));
    for draft in containerd::recorded_containers(roots, problems) {
        // Docker runs its containers through containerd, and the roots of k3s may be links to others.
        let known = drafts
            .iter_mut()
            .find(|known| known.id == draft.id && known.pid == draft.pid);
        match known {
            // With containerd's image store, Docker's own files do not name the directories.
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

/// Lists the stopped containers of all runtimes. State that cannot be read is left out: `recorded_containers` of each
/// runtime reports it.
fn stopped_containers(roots: &Roots) -> Vec<StoppedContainer> {
    let roots = &roots.believed(&mut Vec::new());
    let mut all = docker::stopped_containers(roots);
    all.extend(storage::stopped_containers(roots));
    // Docker's containers are in containerd's records, too, while they run.
    all.extend(containerd::stopped_containers(roots));
    all
}

/// Lists all containers on this node, with the problems encountered.
pub fn list(roots: &Roots) -> Listing {
    let mut listing = Listing::default();
    let tables = Tables::default();
    for draft in recorded_containers(roots, &mut listing.problems) {
        let process = process::read_limited(roots, draft.pid, process::LIST_LIMITS);
        let result = process.and_then(|process| {
            process
                .map(|p| assemble(roots, &tables, &draft, &p))
                .transpose()
        });
        match result {
            Ok(Some(container)) if draft.sandbox => listing.sandboxes.push(container),
            Ok(Some(container)) => listing.containers.push(container),
            // The container has ended.
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

/// Finds the container that `name` refers to: a full ID, a unique prefix of one (at least 3 characters), a name,
/// `NAMESPACE/POD[/CONTAINER]`, or `pid:N` for a process (if that runs in a container, the container).
///
/// For a process that no runtime knows, its own mount table is trusted, which in a user namespace is under its owner's
/// control. Therefore `pid:N` is for administrators only, and a service must not accept it from its users.
pub fn find(roots: &Roots, name: &str) -> Result<Container, Error> {
    let wanted = name.parse::<Query>()?;
    let mut problems = Vec::new();
    let drafts = recorded_containers(roots, &mut problems);
    let tables = Tables::default();
    if let Query::Pid(pid) = wanted {
        return find_process(roots, &tables, &drafts, pid, name);
    }
    let stopped = std::cell::OnceCell::new();
    for rank in 0..wanted.ranks() {
        let mut running = Vec::new();
        let mut others = Vec::new();
        for draft in drafts
            .iter()
            .filter(|d| !d.sandbox && wanted.matches(&d.id, &d.names, d.pod.as_ref(), rank))
        {
            match process::read(roots, draft.pid)? {
                Some(process) => running.push((draft, process)),
                None => others.push(StoppedContainer::of(draft)),
            }
        }
        // No other container has the same full ID.
        if rank == 0
            && let [(draft, process)] = running.as_slice()
            && matches!(wanted, Query::Plain(_))
        {
            return assemble(roots, &tables, draft, process);
        }
        let stopped = stopped.get_or_init(|| stopped_containers(roots));
        others.extend(
            (stopped.iter())
                .filter(|s| !s.sandbox && wanted.matches(&s.id, &s.names, s.pod.as_ref(), rank))
                .cloned(),
        );
        // An earlier run of a pod's container, or what a second runtime wrote down of the same one.
        others.retain(|other| {
            let is_same = |draft: &RecordedContainer| {
                draft.id == other.id || draft.pod.is_some() && draft.pod == other.pod
            };
            !running.iter().any(|(draft, _)| is_same(draft))
        });
        // A pod's init containers have ended, as a rule.
        if matches!(wanted, Query::Pod { .. }) && !running.is_empty() {
            others.clear();
        }
        match (running.as_slice(), others.as_slice()) {
            ([], []) => {}
            ([(draft, process)], []) => return assemble(roots, &tables, draft, process),
            // Which of several is meant does not matter: none can be saved.
            ([], [other, ..]) => {
                return Err(Error::Stopped {
                    detail: other.detail(),
                });
            }
            (running, others) => {
                let running = running.iter().map(|(draft, _)| draft.label());
                let others = others.iter().map(|s| format!("{} (stopped)", s.label()));
                return Err(Error::Ambiguous {
                    wanted: name.to_owned(),
                    candidates: running.chain(others).collect(),
                });
            }
        }
    }
    if let Some(problem) = problems.iter().find(|p| p.permission) {
        return Err(Error::NotPermitted {
            path: problem.path.clone(),
        });
    }
    Err(Error::NotFound {
        wanted: name.to_owned(),
        candidates: similar(roots, &drafts, name),
        users: rootless_users(roots),
        problems,
    })
}

/// Checks that `container` has not changed: the same process with the same root file system, the same entry in the
/// trusted mount table, and the same directories mounted where they are read.
pub fn recheck(roots: &Roots, container: &Container) -> Result<(), Error> {
    let gone = |detail: String| Error::Gone {
        container: container.id.clone(),
        detail,
    };
    let pid = container.pid;
    let process = process::read(roots, pid)?
        .filter(|process| process.start == container.pid_start)
        .ok_or_else(|| gone(format!("its process {pid} is no longer there")))?;
    let device = root_mount::device_of(&container.id, &process).map_err(|e| gone(e.to_string()))?;
    let (root, tables) = (&container.root, Tables::default());
    if device != root.device || !tables.is_unchanged(roots, &process, root)? {
        return Err(gone("its root is another one now".to_owned()));
    }
    tables.prove_layers_of(roots, &container.id, &process, device, &container.overlay)
}

/// A CONTAINER argument.
enum Query {
    Pid(u32),
    Pod {
        namespace: String,
        name: String,
        container: Option<String>,
    },
    /// An ID, a name or a prefix, tried in this order.
    Plain(String),
}

impl std::str::FromStr for Query {
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

impl Query {
    fn ranks(&self) -> u8 {
        if matches!(self, Self::Plain(_)) { 3 } else { 1 }
    }

    /// Returns whether a container with this ID and these names is meant, by the rule of the rank.
    fn matches(&self, id: &str, names: &[String], pod: Option<&Pod>, rank: u8) -> bool {
        match (self, rank) {
            (Self::Pid(_), _) => false,
            (
                Self::Pod {
                    namespace,
                    name,
                    container,
                },
                _,
            ) => pod.is_some_and(|pod| {
                pod.namespace == *namespace
                    && pod.name == *name
                    && container
                        .as_ref()
                        .is_none_or(|container| pod.container == *container)
            }),
            (Self::Plain(plain), 0) => id == plain,
            (Self::Plain(plain), 1) => names.contains(plain),
            (Self::Plain(plain), _) => plain.len() >= MIN_PREFIX && id.starts_with(plain.as_str()),
        }
    }
}

/// Returns the labels of running containers, those similar to `name` first.
fn similar(roots: &Roots, drafts: &[RecordedContainer], name: &str) -> Vec<String> {
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

/// Returns the users whose rootless Podman has run since the node was started, apart from those whose storage is among
/// the roots.
fn rootless_users(roots: &Roots) -> Vec<u32> {
    let runtime_directories = Path::new("/run/user");
    let users = read_dir(&roots.path(runtime_directories)).unwrap_or_default();
    let mut found: Vec<u32> = users
        .iter()
        .filter(|user| {
            let runroot = runtime_directories.join(user).join("containers");
            roots.locate(&runroot).is_ok() && roots.storage.iter().all(|s| s.runroot != runroot)
        })
        .filter_map(|user| user.to_str()?.parse().ok())
        .collect();
    found.sort_unstable();
    found
}

fn find_process(
    roots: &Roots,
    tables: &Tables,
    drafts: &[RecordedContainer],
    pid: u32,
    name: &str,
) -> Result<Container, Error> {
    let not_found = || Error::NotFound {
        wanted: name.to_owned(),
        candidates: Vec::new(),
        users: Vec::new(),
        problems: Vec::new(),
    };
    let process = process::read(roots, pid)?.ok_or_else(not_found)?;
    let line = process.root().ok_or_else(not_found)?;
    let device = root_mount::device_of(name, &process)?;
    // A process in a container stands for that container, because only its runtime knows the base. It belongs to the
    // container if it has the same root file system.
    for draft in drafts {
        let Ok(Some(first)) = process::read_limited(roots, draft.pid, process::LIST_LIMITS) else {
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
        source: TableSource::Own,
    };
    let overlay = root_mount::options_of(name, line)?
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
        mounts: bundle::merge_mounts(None, &process),
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
    draft: &RecordedContainer,
    process: &Process,
) -> Result<Container, Error> {
    root_mount::check_id_maps(draft, process)?;
    let (overlay, root) = root_mount::root_of(roots, tables, draft, process)?;
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
        mounts: bundle::merge_mounts(draft.bundle.as_ref(), process),
        mounts_cut: process.mounts_cut,
        image_name: draft.image_name.clone(),
        runtime_root_mode: draft.runtime_root_mode,
        spec: draft.bundle.as_ref().map(Bundle::spec).unwrap_or_default(),
    })
}
