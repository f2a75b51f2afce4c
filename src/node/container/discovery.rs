//! Lists and finds containers, by comparing the runtimes' records with the kernel's view.
//!
//! A container's first process belongs to its tenant. Its PID, start time and the device number of its root are
//! reliable, because the kernel provides them; all other content of its mountinfo is under the tenant's control
//! (`mount_tables`, `root_mount`).

use std::path::Path;
use std::time::{Duration, Instant};

use crate::common::pod;

use super::bundle::{self, Bundle};
use super::ended::{self, End, EndedRecord};
use super::error::{Error, Problem};
use super::mount_tables::Tables;
use super::process::{self, Process};
use super::recorded::RecordedContainer;
use super::root_mount;
use super::roots::{Roots, read_dir};
use super::table::{RootMount, TableSource};
use super::{Container, Life, Pod, Running, Runtime, Spec, containerd, docker, storage};

/// Minimum length of an ID prefix. Shorter ones are more likely a mistake.
const MIN_PREFIX: usize = 3;
/// The rank of names among the ways in which a plain text can refer to a container.
const BY_NAME: u8 = 1;
/// Time within which the records of a container that is started or stopped agree with its processes.
const SETTLED_WITHIN: Duration = Duration::from_secs(1);

pub(super) fn recorded_containers(
    roots: &Roots,
    problems: &mut Vec<Problem>,
) -> Vec<RecordedContainer> {
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

/// Lists the containers on disk that have no process.
pub(super) fn ended_records(roots: &Roots, drafts: &[RecordedContainer]) -> Vec<EndedRecord> {
    let mut records = ended::records(roots);
    // A container whose process cannot be read, or is in another PID namespace, is not known to have ended.
    let sees_all = process::shows_initial_namespace(roots);
    // One of which only a part can be read, which is reported, has no draft.
    records.retain(|record| {
        drafts.iter().any(|draft| draft.id == record.id)
            || record
                .pid
                .is_none_or(|pid| sees_all && matches!(process::start_of(roots, pid), Ok(None)))
    });
    for draft in drafts {
        let lives = |draft: &RecordedContainer| {
            !sees_all || !matches!(first_process(roots, draft, process::LIST_LIMITS), Ok(None))
        };
        let of_draft = |record: &EndedRecord| {
            record.id == draft.id
                && (record.namespace == draft.namespace || record.runtime != draft.runtime)
        };
        if lives(draft) {
            records.retain(|record| !of_draft(record));
        } else if !records.iter().any(of_draft) {
            records.push(EndedRecord::of(draft));
        }
    }
    records
}

/// Reads the first process of a container. Returns `None` if it has ended, also if its number is that of another process
/// by now.
pub(super) fn first_process(
    roots: &Roots,
    draft: &RecordedContainer,
    limits: process::MountLimits,
) -> Result<Option<Process>, Error> {
    let process = process::read_up_to(roots, draft.pid, limits)?;
    Ok(process.filter(|process| !root_mount::is_of_another(roots, draft, process)))
}

/// Which of several runs of a container a name refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// The running one, or else the last one.
    Current,
    /// Of a pod: the one before.
    Previous,
}

/// The containers that are searched.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reach {
    Running,
    All(Attempt),
}

/// Finds the running container that `name` refers to: a full ID, a unique prefix of one (at least 3 characters), a name,
/// `NAMESPACE/POD[/CONTAINER]`, or `pid:N` for a process (if that runs in a container, the container). A pod without a
/// container stands for its default container, or the only one ([`pod::meant`]).
///
/// For a process that no runtime knows, its own mount table is trusted, which in a user namespace is under its owner's
/// control. Therefore `pid:N` is for administrators only, and a service must not accept it from its users.
pub fn find(roots: &Roots, name: &str) -> Result<Container, Error> {
    find_within(roots, name, Reach::Running)
}

/// Like [`find`], among all containers that are on disk. A running container is meant before one of the same name that
/// has ended.
///
/// One that is being started or stopped is looked up again for a second: its records and its process change one after the
/// other.
pub fn find_any(roots: &Roots, name: &str, attempt: Attempt) -> Result<Container, Error> {
    let end = Instant::now() + SETTLED_WITHIN;
    loop {
        match find_within(roots, name, Reach::All(attempt)) {
            Err(Error::StartedAgain { .. }) if Instant::now() < end => {
                std::thread::sleep(SETTLED_WITHIN / 10);
            }
            found => return found,
        }
    }
}

fn find_within(roots: &Roots, name: &str, reach: Reach) -> Result<Container, Error> {
    let wanted = name.parse::<Query>()?;
    let previous = reach == Reach::All(Attempt::Previous);
    if previous && !matches!(wanted, Query::Pod { .. }) {
        return Err(Error::BadName {
            wanted: name.to_owned(),
            expected: "only NAMESPACE/POD[/CONTAINER] has a previous container",
        });
    }
    let mut problems = Vec::new();
    let drafts = recorded_containers(roots, &mut problems);
    let tables = Tables::default();
    if let Query::Pid(pid) = wanted {
        return find_process(roots, &tables, &drafts, pid, name);
    }
    let ended = std::cell::OnceCell::new();
    for rank in 0..wanted.ranks() {
        let mut running = Vec::new();
        for draft in drafts
            .iter()
            .filter(|d| !d.sandbox && wanted.matches(&d.id, &d.names, d.pod.as_ref(), rank))
        {
            if let Some(process) = first_process(roots, draft, process::SAVE_LIMITS)? {
                running.push((draft, process));
            } else if !process::shows_initial_namespace(roots) {
                return Err(Error::Stopped {
                    detail: format!(
                        "process {} of {} is not to be seen: /proc is that of another PID namespace than the machine's; in a \
                         pod, set hostPID: true, or mount the node's /proc below --host-root",
                        draft.pid,
                        draft.label()
                    ),
                });
            }
        }
        // No other container has the same full ID.
        if rank == 0
            && let [(draft, process)] = running.as_slice()
            && matches!(wanted, Query::Plain(_))
        {
            return assemble(roots, &tables, draft, process);
        }
        let is_pod = matches!(wanted, Query::Pod { .. });
        let is_whole_pod = matches!(
            wanted,
            Query::Pod {
                container: None,
                ..
            }
        );
        // A running container is meant before one of its name that has ended, whose records are not read then.
        let is_running =
            !running.is_empty() && !previous && !is_whole_pod && (is_pod || rank == BY_NAME);
        let mut others: Vec<&EndedRecord> = Vec::new();
        if !is_running {
            let ended = ended.get_or_init(|| ended_records(roots, &drafts));
            others.extend(
                ended.iter().filter(|e| {
                    !e.sandbox && wanted.matches(&e.id, &e.names, e.pod.as_ref(), rank)
                }),
            );
        }
        if is_pod {
            others = attempts(&others, &running, previous);
        }
        if previous {
            running.clear();
        }
        // An earlier run of a pod's container.
        others.retain(|other| {
            let is_same =
                |draft: &RecordedContainer| is_same_pod(draft.pod.as_ref(), other.pod.as_ref());
            !running.iter().any(|(draft, _)| is_same(draft))
        });
        if is_whole_pod {
            let first_start = running.iter().map(|(_, process)| process.start).min();
            let since = first_start.and_then(|start| process::started_ms(roots, start));
            if !running.is_empty() {
                others.retain(|other| !may_be_init(&other.end, since));
            }
            (running, others) = meant(running, others)?;
        }
        match (running.as_slice(), others.as_slice()) {
            ([], []) => {}
            ([(draft, process)], []) => return assemble(roots, &tables, draft, process),
            // Which of several is meant does not matter: none can be used.
            ([], [other, ..]) if reach == Reach::Running => {
                return Err(
                    other.stopped("only a running container can be used here: start it first")
                );
            }
            ([], [other]) => return ended::assemble(roots, &tables, other),
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
    if problems.is_empty() && process::shows_initial_namespace(roots) {
        let is_meant = |record: &EndedRecord| {
            let (id, names, pod) = (&record.id, &record.names, record.pod.as_ref());
            !record.sandbox && (0..wanted.ranks()).any(|rank| wanted.matches(id, names, pod, rank))
        };
        // On record with a process that is there, and not among those that run.
        if let Some(record) = ended::records(roots).into_iter().find(is_meant) {
            return Err(Error::StartedAgain {
                container: record.id,
                detail: "it is being started or stopped".to_owned(),
            });
        }
    }
    Err(Error::NotFound {
        wanted: name.to_owned(),
        candidates: similar(roots, &drafts, name),
        users: rootless_users(roots),
        problems,
    })
}

/// Returns those of a pod's ended containers that are meant: of each container the last attempt, if none runs, or with
/// `previous` the one before the current attempt.
fn attempts<'r>(
    ended: &[&'r EndedRecord],
    running: &[(&RecordedContainer, Process)],
    previous: bool,
) -> Vec<&'r EndedRecord> {
    let mut newest_first = ended.to_vec();
    newest_first.sort_by_key(|record| std::cmp::Reverse(record.attempt));
    let mut meant: Vec<&EndedRecord> = Vec::new();
    let mut skipped: Vec<&EndedRecord> = Vec::new();
    for record in newest_first {
        let is_current = previous
            && !skipped
                .iter()
                .any(|other| is_same_pod(other.pod.as_ref(), record.pod.as_ref()))
            && !running
                .iter()
                .any(|(draft, _)| is_same_pod(draft.pod.as_ref(), record.pod.as_ref()));
        if is_current {
            skipped.push(record);
        } else if !meant
            .iter()
            .any(|other| is_same_pod(other.pod.as_ref(), record.pod.as_ref()))
        {
            meant.push(record);
        }
    }
    meant
}

/// Returns whether both are runs of the same container of a pod.
fn is_same_pod(one: Option<&Pod>, other: Option<&Pod>) -> bool {
    match (one, other) {
        (Some(one), Some(other)) => one.is_same(other),
        _ => false,
    }
}

/// A running container and its first process.
type RunningDraft<'d> = (&'d RecordedContainer, Process);

/// Returns whether a container may have been an init container of a pod, which ends well before the others start.
/// Runtimes do not record which ones are. `since` is when the first of those that run was started, in milliseconds.
fn may_be_init(end: &End, since: Option<i64>) -> bool {
    // Times of processes are counted from the start of the machine, by a clock that is not corrected.
    const SLACK_MS: i64 = 2000;
    let ended_before = |since: i64| {
        end.at
            .is_some_and(|at| at.as_millisecond() <= since + SLACK_MS)
    };
    end.exit_code == Some(0) && since.is_some_and(ended_before)
}

/// Reduces the containers of a pod that was named without a container, running ones and the last runs of others, to the
/// one that is meant, if that is known. Fails with [`Error::Stopped`] if it is known and is not there.
fn meant<'d>(
    mut running: Vec<RunningDraft<'d>>,
    mut ended: Vec<&'d EndedRecord>,
) -> Result<(Vec<RunningDraft<'d>>, Vec<&'d EndedRecord>), Error> {
    let pods = || {
        let of_running = running.iter().map(|(draft, _)| draft.pod.as_ref());
        of_running.chain(ended.iter().map(|record| record.pod.as_ref()))
    };
    let Some(first) = pods().flatten().next() else {
        return Ok((running, ended));
    };
    // A pod that is being replaced by another of the same name.
    if pods().any(|pod| pod.is_none_or(|pod| pod.uid != first.uid)) {
        return Ok((running, ended));
    }
    let names: Vec<&str> = pods().flatten().map(|pod| pod.container.as_str()).collect();
    let default = pods().flatten().find_map(Pod::default_container);
    let default = default.map(String::as_str);
    match (pod::meant(&names, default), default) {
        (Some(at), _) if at < running.len() => Ok((vec![running.swap_remove(at)], Vec::new())),
        (Some(at), _) => Ok((Vec::new(), vec![ended.swap_remove(at - running.len())])),
        (None, Some(default)) if !names.contains(&default) => Err(Error::Stopped {
            detail: format!(
                "the default container of this pod, {default:?} ({}), is not there; name another one: {}",
                pod::DEFAULT_CONTAINER,
                names.join(", ")
            ),
        }),
        (None, _) => Ok((running, ended)),
    }
}

fn container_name(draft: &RecordedContainer) -> &str {
    draft.pod.as_ref().map_or("", |pod| &pod.container)
}

/// Returns name and ID of every running container of the pod `NAMESPACE/POD`, sorted by ID.
///
/// Fails with [`Error::Ambiguous`] if two pods have the name, as while one replaces the other.
pub fn of_pod(roots: &Roots, name: &str) -> Result<Vec<(String, String)>, Error> {
    let wanted = name.parse::<Query>()?;
    if !matches!(
        wanted,
        Query::Pod {
            container: None,
            ..
        }
    ) {
        return Err(Error::BadName {
            wanted: name.to_owned(),
            expected: "expected NAMESPACE/POD",
        });
    }
    let drafts = recorded_containers(roots, &mut Vec::new());
    let mut found = Vec::new();
    for draft in &drafts {
        let is_meant = wanted.matches(&draft.id, &draft.names, draft.pod.as_ref(), 0);
        if !draft.sandbox && is_meant && process::start_of(roots, draft.pid)?.is_some() {
            found.push(draft);
        }
    }
    let uid = |draft: &RecordedContainer| draft.pod.as_ref().and_then(|pod| pod.uid.clone());
    if found.iter().any(|draft| uid(draft) != uid(found[0])) {
        return Err(Error::Ambiguous {
            wanted: name.to_owned(),
            candidates: found.iter().map(|draft| draft.label()).collect(),
        });
    }
    if found.is_empty() {
        // For its message.
        let pod = |container: &Container| container.pod.clone().map(|pod| pod.container);
        return find(roots, name).map(|it| vec![(pod(&it).unwrap_or_default(), it.id)]);
    }
    let mut named: Vec<(String, String)> = (found.iter())
        .map(|draft| (container_name(draft).to_owned(), draft.id.clone()))
        .collect();
    named.sort_by(|(_, a), (_, b)| a.cmp(b));
    Ok(named)
}

/// Checks that `container` has not changed: the same process with the same root file system, the same entry in the
/// trusted mount table, and the same directories mounted where they are read. One that has ended must still be on record
/// with the same directories ([`Error::Removed`]), and without a process ([`Error::StartedAgain`]).
pub fn recheck(roots: &Roots, container: &Container) -> Result<(), Error> {
    let gone = |detail: String| Error::Gone {
        container: container.id.clone(),
        detail,
    };
    let Running {
        pid,
        pid_start,
        root,
    } = match &container.life {
        Life::Running(running) => running,
        Life::Ended(ended) => {
            let drafts = recorded_containers(roots, &mut Vec::new());
            let mut own = drafts.iter().filter(|draft| draft.id == container.id);
            let runs = own.any(|draft| {
                !matches!(first_process(roots, draft, process::LIST_LIMITS), Ok(None))
            });
            return ended::recheck(roots, container, ended, runs);
        }
    };
    let process = process::read(roots, *pid)?
        .filter(|process| process.start == *pid_start)
        .ok_or_else(|| gone(format!("its process {pid} is no longer there")))?;
    let device = root_mount::device_of(&container.id, &process).map_err(|e| gone(e.to_string()))?;
    let tables = Tables::default();
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
            (Self::Plain(plain), BY_NAME) => names.contains(plain),
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
        life: Life::Running(Running {
            pid,
            pid_start: process.start,
            root,
        }),
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

pub(super) fn assemble(
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
        life: Life::Running(Running {
            pid: process.pid,
            pid_start: process.start,
            root,
        }),
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
