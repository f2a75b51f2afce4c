//! Checks the container runtimes of the node: where their state is, whether it can be read, and which of them run with
//! their state in an unknown place.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::{Finding, Options, Purpose};
use crate::node::container::{self, Roots};

/// The initial PID namespace (kernel `include/uapi/linux/nsfs.h`, `PID_NS_INIT_INO`).
const FIRST_NAMESPACE: &str = "pid:[4026531836]";
/// Maximum number of problems that are listed.
const SHOWN: usize = 3;

/// A directory in which a runtime may keep its state.
struct Place {
    /// Name of the runtime; `flag` selects another directory for it.
    runtime: &'static str,
    flag: &'static str,
    path: PathBuf,
    /// Whether the directory can be listed; otherwise the kind of the error.
    listed: Result<(), io::ErrorKind>,
}

fn places(roots: &Roots) -> Vec<Place> {
    let mut places = Vec::new();
    let mut add = |runtime, flag, path: &Path| {
        let listed = roots
            .locate(path)
            .and_then(fs::read_dir)
            .map(drop)
            .map_err(|error| error.kind());
        places.push(Place {
            runtime,
            flag,
            path: path.to_owned(),
            listed,
        });
    };
    for root in &roots.containerd {
        add("containerd", "--containerd-root", &root.root);
    }
    for root in &roots.docker {
        add("docker", "--docker-root", root);
    }
    for root in &roots.storage {
        add("podman and cri-o", "--storage-root", &root.root);
    }
    places
}

/// Returns the runtimes whose daemons run; for Podman, which has no daemon, its monitors count.
fn running(roots: &Roots) -> BTreeSet<&'static str> {
    let proc = match &roots.host_root {
        Some(root) => root.join("proc"),
        None => roots.proc.clone(),
    };
    let processes = fs::read_dir(proc).into_iter().flatten().flatten();
    processes
        .filter_map(|process| fs::read_to_string(process.path().join("comm")).ok())
        .filter_map(|name| runtime_of(name.trim()))
        .collect()
}

fn runtime_of(process: &str) -> Option<&'static str> {
    Some(match process {
        "containerd" | "k3s-server" | "k3s-agent" => "containerd",
        "dockerd" => "docker",
        "crio" | "conmon" | "conmonrs" => "podman and cri-o",
        _ => return None,
    })
}

pub(super) fn check(options: &Options) -> Vec<Finding> {
    let mut found = judge(&places(&options.roots), &running(&options.roots));
    let listing = container::list(&options.roots);
    let problems: Vec<String> = listing.problems.iter().map(ToString::to_string).collect();
    found.push(judge_listing(listing.containers.len(), &problems));
    found
}

/// Returns the directories that cannot be read, or that there are none.
pub(super) fn unreadable(roots: &Roots) -> Vec<Finding> {
    let found = judge(&places(roots), &BTreeSet::new());
    let is_good = |finding: &Finding| finding.state == super::State::Ok;
    found
        .into_iter()
        .filter(|finding| !is_good(finding))
        .collect()
}

fn judge(places: &[Place], running: &BTreeSet<&'static str>) -> Vec<Finding> {
    let mut found = Vec::new();
    let mut seen = BTreeSet::new();
    for place in places {
        let shown = crate::common::escape::path(place.path.as_os_str().as_encoded_bytes());
        match place.listed {
            Ok(()) => {
                seen.insert(place.runtime);
                found.push(Finding::ok(
                    "runtimes",
                    format!("{} at {shown}", place.runtime),
                ));
            }
            Err(io::ErrorKind::NotFound) => {}
            Err(kind) => {
                seen.insert(place.runtime);
                found.push(Finding::failed(
                    "runtimes",
                    format!("{} at {shown}: {kind}", place.runtime),
                    "run as root, or with CAP_DAC_READ_SEARCH",
                ));
            }
        }
    }
    for runtime in running.iter().filter(|runtime| !seen.contains(*runtime)) {
        let flag = places
            .iter()
            .find(|place| place.runtime == *runtime)
            .map_or("--host-root", |place| place.flag);
        found.push(Finding::warning(
            "runtimes",
            format!("{runtime} runs, and its state is in none of the usual places"),
            &format!("say where it is: {flag}, in a pod --host-root"),
        ));
    }
    if found.is_empty() {
        found.push(Finding::warning(
            "runtimes",
            "no runtime keeps its state here",
            "say where it is (--containerd-root, --docker-root, --storage-root, --host-root); without one only pid:N can \
             be saved",
        ));
    }
    found
}

fn judge_listing(containers: usize, problems: &[String]) -> Finding {
    let containers = crate::common::message::count(containers, "container", "containers");
    let found = format!("{containers} can be saved");
    if problems.is_empty() {
        return Finding::ok("containers", found);
    }
    let mut shown = problems.iter().take(SHOWN).cloned().collect::<Vec<_>>();
    if problems.len() > SHOWN {
        shown.push(format!("and {} more", problems.len() - SHOWN));
    }
    Finding::warning(
        "containers",
        format!("{found}; {}", shown.join("; ")),
        "'upperdeck ps' lists what can be saved, and why something cannot",
    )
}

pub(super) fn proc_check(options: &Options) -> Vec<Finding> {
    vec![proc_of(&options.roots, options.purpose)]
}

/// Checks whether an agent sees the processes of its node.
pub(super) fn proc_of_agent(roots: &Roots) -> Finding {
    proc_of(roots, Purpose::Agent)
}

fn proc_of(roots: &Roots, purpose: Purpose) -> Finding {
    let proc = roots
        .host_root
        .as_ref()
        .map_or_else(|| PathBuf::from("/proc"), |root| root.join("proc"));
    let is_first = |process: PathBuf| {
        fs::read_link(process.join("ns/pid")).is_ok_and(|link| link == Path::new(FIRST_NAMESPACE))
    };
    judge_proc(
        is_first("/proc/self".into()) || is_first(proc.join("1")) || has_kernel_threads(&proc),
        proc.join("1/status").exists(),
        roots.host_root.is_some(),
        purpose,
    )
}

/// Returns whether a procfs shows kernel threads, which only the node's own PID namespace has. The namespace of process 1
/// cannot always be asked for.
fn has_kernel_threads(proc: &Path) -> bool {
    /// `PF_KTHREAD` of `include/linux/sched.h`.
    const KERNEL_THREAD: u64 = 0x0020_0000;
    // The first one, kthreadd. Its flags are field 9, the seventh after the name in parentheses (proc_pid_stat(5)).
    let Ok(stat) = fs::read_to_string(proc.join("2/stat")) else {
        return false;
    };
    let after_name = stat.rsplit_once(')').map(|(_, rest)| rest);
    let flags =
        after_name.and_then(|rest| rest.split_ascii_whitespace().nth(6)?.parse::<u64>().ok());
    flags.is_some_and(|flags| flags & KERNEL_THREAD != 0)
}

fn judge_proc(first: bool, readable: bool, host_root: bool, purpose: Purpose) -> Finding {
    if !readable {
        return Finding::failed(
            "proc",
            "there is no /proc of the node",
            "mount the node's /proc below --host-root",
        );
    }
    if first {
        return Finding::ok("proc", "the process numbers are the node's own");
    }
    let found = "its process numbers are those of another PID namespace";
    let advice = "set hostPID: true in the pod, or mount the node's own /proc below --host-root";
    if host_root && purpose == Purpose::Agent {
        Finding::failed("proc", found, advice)
    } else {
        // Containers in the same PID namespace (nested containers) can still be saved.
        Finding::warning("proc", found, advice)
    }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    fn place(runtime: &'static str, listed: Result<(), io::ErrorKind>) -> Place {
        Place {
            runtime,
            flag: "--docker-root",
            path: "/var/lib/x".into(),
            listed,
        }
    }

    #[test]
    fn kernel_threads_tell_the_nodes_own_procfs() {
        let dir = tempfile::tempdir().unwrap();
        let says = |stat: &str| {
            fs::create_dir_all(dir.path().join("2")).unwrap();
            fs::write(dir.path().join("2/stat"), stat).unwrap();
            has_kernel_threads(dir.path())
        };
        assert!(!has_kernel_threads(dir.path()));
        assert!(says("2 (kthreadd) S 0 0 0 0 -1 2129984 0 0 0 0 0 4 0\n"));
        // A process of a container that has chosen its name.
        assert!(!says("2 (kthreadd) S 0 0 0 0 -1 4194560 0 0 0 0 0 4 0\n"));
    }

    #[test]
    fn a_runtime_that_runs_unseen_is_told() {
        let missing = || Err(io::ErrorKind::NotFound);
        let docker = BTreeSet::from(["docker"]);
        let judged = judge(&[place("docker", missing())], &docker);
        assert_eq!(judged[0].state, State::Warning);
        assert!(
            judged[0]
                .advice
                .as_ref()
                .is_some_and(|advice| advice.contains("--docker-root"))
        );
        let judged = judge(&[place("docker", Ok(()))], &docker);
        assert_eq!(
            judged.iter().map(|f| f.state).collect::<Vec<_>>(),
            [State::Ok]
        );
        let denied = Err(io::ErrorKind::PermissionDenied);
        assert_eq!(
            judge(&[place("docker", denied)], &docker)[0].state,
            State::Failed
        );
        let nothing = judge(&[place("docker", missing())], &BTreeSet::new());
        assert_eq!(nothing[0].state, State::Warning);
    }

    #[test]
    fn an_agent_in_a_pod_needs_the_nodes_processes() {
        let state = |first, readable, host_root| {
            judge_proc(first, readable, host_root, Purpose::Agent).state
        };
        assert_eq!(state(true, true, true), State::Ok);
        assert_eq!(state(false, true, true), State::Failed);
        assert_eq!(state(false, true, false), State::Warning);
        assert_eq!(state(true, false, true), State::Failed);
    }

    #[test]
    fn problems_are_a_number_and_a_few_examples() {
        let problems: Vec<String> = (0..9).map(|n| format!("p{n}")).collect();
        let found = judge_listing(2, &problems).found;
        assert_eq!(found, "2 containers can be saved; p0; p1; p2; and 6 more");
        assert_eq!(judge_listing(0, &[]).state, State::Ok);
    }
}
