//! Tests of reading the state that real runtimes leave on disk: containers are found, distinguished and their bases
//! proven, and damaged files do no harm.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panic")]

#[path = "container_state/database.rs"]
mod database;
#[path = "container_state/ended.rs"]
mod ended;
#[path = "container_state/mapped.rs"]
mod mapped;
#[path = "container_state/sidecars.rs"]
mod sidecars;

#[allow(dead_code, reason = "each test program uses its part")]
#[path = "support/mod.rs"]
mod support;
#[path = "container_state/variations.rs"]
mod variations;

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use upperdeck::common::digest::{ChainId, DiffId, Digest};
use upperdeck::common::failure::FailureKind;
use upperdeck::node::container::{
    Container, ContainerdRoot, Error, Roots, Running, Runtime, StorageRoot, TableSource, bolt,
    find, list, prove_base, recheck,
};
use upperdeck::node::overlay::xattr::Namespace;

use support::Need;

type Outcome = Result<(), Box<dyn std::error::Error>>;

/// Returns `../shared/runtime-state/NAME`, which is not part of the repository.
fn recording(name: &str) -> Option<PathBuf> {
    let shared = std::env::var_os("UPPERDECK_SHARED").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared"),
        PathBuf::from,
    );
    let path = shared.join("runtime-state").join(name);
    if path.is_dir() {
        return Some(path);
    }
    support::ignore(&format!("needs {}", path.display()));
    None
}

/// A root directory of a node, below which everything that a test needs is created.
struct Node {
    dir: TempDir,
    roots: Roots,
}

impl Node {
    fn empty() -> std::io::Result<Self> {
        let dir = TempDir::new()?;
        // The roots of an agent in a pod, which has the node's files under a mount.
        let roots = Roots {
            host_root: Some(dir.path().canonicalize()?),
            containerd: Vec::new(),
            docker: Vec::new(),
            storage: Vec::new(),
            proc: "/proc".into(),
        };
        Ok(Self { dir, roots })
    }

    fn path(&self, inside: &str) -> PathBuf {
        self.dir.path().canonicalize().unwrap().join(inside)
    }

    fn write(&self, inside: &str, bytes: impl AsRef<[u8]>) -> std::io::Result<()> {
        let path = self.path(inside);
        fs::create_dir_all(path.parent().unwrap())?;
        fs::write(path, bytes)
    }

    fn mkdir(&self, inside: &str) -> std::io::Result<()> {
        fs::create_dir_all(self.path(inside))
    }

    fn process(&self, pid: u32, start: u64, mountinfo: &[u8], ids: &str) -> std::io::Result<()> {
        let fields = format!("S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 {start} 20 21");
        self.write(
            &format!("proc/{pid}/stat"),
            format!("{pid} (sle) ep) {fields}\n"),
        )?;
        self.write(&format!("proc/{pid}/mountinfo"), mountinfo)?;
        self.write(&format!("proc/{pid}/uid_map"), ids)?;
        self.write(&format!("proc/{pid}/gid_map"), ids)
    }
}

/// Returns the mountinfo line of the node's own table for the root in the first line of a container's.
fn as_mounted(mountinfo: &str, at: &str) -> String {
    let line = mountinfo.lines().next().unwrap_or_default();
    let fields: Vec<&str> = line.splitn(6, ' ').collect();
    format!("900 27 {} / {at} {}\n", fields[2], fields[5])
}

const IDENTITY: &str = "         0          0 4294967295\n";

fn copy_tree(from: &Path, to: &Path) -> std::io::Result<()> {
    for entry in walkdir::WalkDir::new(from) {
        let entry = entry?;
        let target = to.join(entry.path().strip_prefix(from).unwrap_or(entry.path()));
        if entry.file_type().is_dir() {
            fs::create_dir_all(target)?;
        } else {
            // Rewritten instead of copied, because the recording is read-only.
            fs::write(target, fs::read(entry.path())?)?;
        }
    }
    Ok(())
}

const CONTAINERD_PID: u32 = 12720;
const CONTAINERD_ID: &str = "e015c37f773b9e8b9e8a3131e0cb0555c9611ff2c6290940db2bafe41e0a3580";
const SANDBOX_ID: &str = "3fb6f3421198b501ab264bcde444006b64d5d6adac02a91d21861d9077cc2b48";
const TASKS: &str = "run/containerd-2.2/io.containerd.runtime.v2.task/k8s.io";
const META: &str = "var/lib/containerd-2.2/io.containerd.metadata.v1.bolt/meta.db";
const SNAPSHOTS: &str = "var/lib/containerd-2.2/io.containerd.snapshotter.v1.overlayfs/snapshots";
const BLOBS: &str = "var/lib/containerd-2.2/io.containerd.content.v1.content/blobs/sha256";
const CONFIG: &str = "235ed3b5e2cd0efe54aa55e4c39083bbf1bc75f1d624a2f98bedc90196f25408";
const MANIFEST: &str = "5bc6c70b7e0ea14cd862cf6188c170119b3c04079c24c7835e35edbd2c1e5c34";
const LAYERS: [&str; 2] = [
    "sha256:425cf83720384715cb2f6fd44065d7c71b293408c8949ac9f9ec687706f7aa67",
    "sha256:f7ac7b3b051a39baf0f0c4cc9b2111a0a87d64b2c5f61d29429fda47b7f247a2",
];

/// Returns the path where containerd mounts the root of the container.
fn rootfs() -> String {
    format!("/{TASKS}/{CONTAINERD_ID}/rootfs")
}

fn containerd_node() -> Option<Node> {
    let recording = recording("containerd-2.2.1")?;
    let mut node = Node::empty().unwrap();
    for part in ["var", "run"] {
        copy_tree(&recording.join(part), &node.path(part)).unwrap();
    }
    for snapshot in [1, 2, 5] {
        node.mkdir(&format!("{SNAPSHOTS}/{snapshot}/fs")).unwrap();
    }
    let mountinfo = fs::read(recording.join("proc/mountinfo")).unwrap();
    node.process(CONTAINERD_PID, 4242, &mountinfo, IDENTITY)
        .unwrap();
    let line = as_mounted(&String::from_utf8(mountinfo).unwrap(), &rootfs());
    node.write("proc/1/mountinfo", line).unwrap();
    node.roots.containerd = vec![ContainerdRoot {
        state: "/run/containerd-2.2".into(),
        root: "/var/lib/containerd-2.2".into(),
    }];
    Some(node)
}

const CRIO_PID: u32 = 12508;
const CRIO_ID: &str = "61a37d454d7d183bb177ccb0e75861185ee2e4d9863bb28156fd1af3f7bd2f15";
const CRIO: &str = "var/lib/crio-1.36";

fn crio_node() -> Option<Node> {
    let recording = recording("crio-1.36.3")?;
    let mut node = Node::empty().unwrap();
    for part in ["var", "run"] {
        copy_tree(&recording.join(part), &node.path(part)).unwrap();
    }
    for line in fs::read_to_string(recording.join("overlay-l.txt"))
        .unwrap()
        .lines()
    {
        let Some((link, target)) = line
            .split_once(" -> ")
            .filter(|(_, target)| !target.is_empty())
        else {
            continue;
        };
        let link = format!("{CRIO}/overlay/{link}");
        fs::create_dir_all(node.path(&link).parent().unwrap()).unwrap();
        symlink(target, node.path(&link)).unwrap();
        node.mkdir(&format!(
            "{CRIO}/overlay/{}",
            target.trim_start_matches("../")
        ))
        .unwrap();
    }
    let mountinfo = fs::read(recording.join("proc/mountinfo")).unwrap();
    node.process(CRIO_PID, 439_451, &mountinfo, IDENTITY)
        .unwrap();
    let line = as_mounted(&String::from_utf8(mountinfo).unwrap(), "/merged");
    node.write("proc/1/mountinfo", line).unwrap();
    node.roots.storage = vec![StorageRoot {
        root: "/var/lib/crio-1.36".into(),
        runroot: "/run/crio-1.36".into(),
    }];
    Some(node)
}

fn running(container: &Container) -> &Running {
    container.running().unwrap()
}

/// Asserts what both recordings have in common: the same pod of the same image.
fn assert_pod(node: &Node, id: &str, pid: u32) -> Container {
    let listing = list(&node.roots);
    assert_eq!(listing.problems, []);
    assert_eq!(listing.containers.len(), 1);
    let container = listing.containers[0].clone();
    assert_eq!((container.id.as_str(), running(&container).pid), (id, pid));
    let pod = container.pod.as_ref().unwrap();
    assert_eq!(
        (
            pod.namespace.as_str(),
            pod.name.as_str(),
            pod.container.as_str()
        ),
        ("hub", "notebook-alice", "notebook")
    );
    assert!(pod.uid.as_ref().unwrap().starts_with("u-17954739"));
    assert_eq!(
        pod.labels.get("app").map(String::as_str),
        Some("jupyterhub")
    );
    assert_eq!(
        container.image_name.as_deref(),
        Some("127.0.0.1:5000/library/pybase:1")
    );
    assert!(container.uid_map.is_empty() && container.gid_map.is_empty());
    let volumes: Vec<_> = container
        .mounts
        .iter()
        .filter(|m| m.volume)
        .map(|m| m.destination.as_path())
        .collect();
    assert_eq!(volumes, [Path::new("/etc/ssl/certs")]);
    for destination in [
        "/proc",
        "/sys/fs/cgroup/freezer",
        "/etc/hosts",
        "/etc/resolv.conf",
        "/dev/shm",
    ] {
        assert!(
            container
                .mounts
                .iter()
                .any(|m| m.destination == Path::new(destination)),
            "{destination}"
        );
    }
    for name in [
        id,
        &id[..3],
        "hub/notebook-alice",
        "hub/notebook-alice/notebook",
        &format!("pid:{pid}"),
    ] {
        assert_eq!(find(&node.roots, name).unwrap().id, id, "{name}");
    }
    recheck(&node.roots, &container).unwrap();

    let base = prove_base(&node.roots, &container).unwrap();
    assert_eq!(
        base.name.as_deref(),
        Some("127.0.0.1:5000/library/pybase:1")
    );
    assert_eq!(Digest::of(&base.config).hex(), CONFIG);
    let manifest = base.manifest.unwrap();
    assert_eq!(
        (manifest.digest.hex().as_str(), manifest.bytes.len()),
        (MANIFEST, 750)
    );
    assert_eq!(
        manifest.media_type,
        "application/vnd.oci.image.manifest.v1+json"
    );
    let digests: Vec<_> = base
        .layers
        .iter()
        .map(|l| l.descriptor.as_ref().unwrap().digest().to_string())
        .collect();
    assert_eq!(digests, LAYERS);
    let diff_ids: Vec<DiffId> = base.layers.iter().map(|layer| layer.diff_id).collect();
    assert_eq!(
        diff_ids[1].to_string(),
        "sha256:b1af752f23f18835510153d1f91c3ea2d9f5f179e6573bfbb783804dcf6453fe"
    );
    assert_eq!(
        base.layers.iter().map(|l| l.chain_id).collect::<Vec<_>>(),
        ChainId::chain(&diff_ids)
    );
    let lowers: Vec<_> = base
        .layers
        .iter()
        .rev()
        .map(|layer| layer.lower.clone().unwrap())
        .collect();
    assert_eq!(lowers, container.overlay.lowers);
    for layer in &base.layers {
        assert!(layer.size_known && layer.local_blob.is_none());
        assert_eq!(layer.repositories, ["127.0.0.1:5000/library/pybase"]);
    }
    container
}

#[test]
fn a_pod_of_containerd_2_2_is_found_and_its_base_proven() {
    let Some(node) = containerd_node() else {
        return;
    };
    let container = assert_pod(&node, CONTAINERD_ID, CONTAINERD_PID);
    assert_eq!(
        (container.runtime, container.namespace.as_deref()),
        (Runtime::Containerd, Some("k8s.io"))
    );
    assert_eq!(
        container.overlay.upper,
        node.path(&format!("{SNAPSHOTS}/5/fs"))
    );
    assert_eq!(
        container.overlay.lowers,
        [
            node.path(&format!("{SNAPSHOTS}/2/fs")),
            node.path(&format!("{SNAPSHOTS}/1/fs"))
        ]
    );
    assert_eq!(container.runtime_root_mode, None);
}

#[test]
fn a_pod_of_crio_1_36_is_found_and_its_base_proven() {
    let Some(node) = crio_node() else { return };
    let container = assert_pod(&node, CRIO_ID, CRIO_PID);
    assert_eq!(container.runtime, Runtime::Crio);
    let layer = "7e8e755ff9ea5bf877fe0b2cbbf6611900ec9d58938405ae25398fcdaf3e4931";
    assert_eq!(
        container.overlay.upper,
        node.path(&format!("{CRIO}/overlay/{layer}/diff"))
    );
    assert_eq!(container.runtime_root_mode, Some(0o555));
    // CRI-O gives names to its containers too.
    let name = "k8s_notebook_notebook-alice_hub_u-1795473973013157754_0";
    assert_eq!(find(&node.roots, name).unwrap().id, CRIO_ID);
}

/// A pod can write annotations; its identity comes from the kubelet's request.
#[test]
fn annotations_of_a_pod_do_not_make_it_another() -> Outcome {
    let crio_sandbox = "run/crio-1.36/overlay-containers/\
        97a645262be70442c09edce68ffd640c694884cff6091201a7ac5fd9e70bd186/userdata/config.json";
    for (node, file, key) in [
        (
            containerd_node(),
            format!("{TASKS}/{CONTAINERD_ID}/config.json"),
            r#""io.kubernetes.cri.sandbox-name":"notebook-alice""#,
        ),
        (
            crio_node(),
            crio_sandbox.to_owned(),
            r#""io.kubernetes.cri-o.KubeName": "notebook-alice""#,
        ),
    ] {
        let Some(node) = node else { continue };
        let config = fs::read_to_string(node.path(&file))?;
        assert!(config.contains(key));
        node.write(&file, config.replace(key, &key.replace("alice", "carol")))?;
        assert!(find(&node.roots, "hub/notebook-alice").is_ok());
        assert!(matches!(
            find(&node.roots, "hub/notebook-carol"),
            Err(Error::NotFound { .. })
        ));
    }
    Ok(())
}

#[test]
fn an_unknown_name_lists_what_there_is() {
    let Some(node) = containerd_node() else {
        return;
    };
    for name in [
        "e0",
        "hub/notebook-bob",
        "hub/notebook-alice/other",
        "pid:7",
        &SANDBOX_ID[..16],
    ] {
        let error = find(&node.roots, name).unwrap_err();
        assert_eq!(error.kind(), FailureKind::ContainerGone, "{name}: {error}");
        if name.starts_with("hub") {
            assert!(
                error
                    .to_string()
                    .contains("hub/notebook-alice/notebook (e015c37f773b)"),
                "{error}"
            );
        }
    }
    for name in [
        "",
        "/",
        "a//b",
        "a/b/c/d",
        "pid:",
        "pid:0",
        "pid:-1",
        "pid:99999999999",
    ] {
        assert_eq!(
            find(&node.roots, name).unwrap_err().kind(),
            FailureKind::Usage,
            "{name}"
        );
    }
}

/// Returns the message for a container that its runtime knows, and that has no process.
fn stopped(node: &Node, name: &str) -> String {
    let error = find(&node.roots, name).unwrap_err();
    assert!(matches!(error, Error::Stopped { .. }), "{name}: {error}");
    assert_eq!(error.kind(), FailureKind::ContainerGone);
    error.to_string()
}

#[test]
fn a_stopped_container_is_known_as_stopped() -> Outcome {
    if let Some(node) = containerd_node() {
        fs::remove_dir_all(node.path(&format!("{TASKS}/{CONTAINERD_ID}")))?;
        for name in ["hub/notebook-alice", &CONTAINERD_ID[..12]] {
            let message = stopped(&node, name);
            assert!(
                message.contains("hub/notebook-alice/notebook (e015c37f773b) is stopped"),
                "{message}"
            );
        }
        assert!(matches!(
            find(&node.roots, "hub/notebook-bob"),
            Err(Error::NotFound { .. })
        ));
    }
    if let Some(node) = crio_node() {
        let userdata = format!("run/crio-1.36/overlay-containers/{CRIO_ID}/userdata");
        fs::remove_file(node.path(&format!("{userdata}/pidfile")))?;
        stopped(&node, "hub/notebook-alice");
    }
    let (node, _) = docker_node()?;
    let config = format!("{DOCKER}/containers/{DOCKER_ID}/config.v2.json");
    let running = fs::read_to_string(node.path(&config))?;
    for (state, expected) in [
        (
            r#""Pid":0,"ExitCode":137,"OOMKilled":true,"FinishedAt":"2026-11-03T04:05:06.789Z""#,
            "(exit code 137, out of memory, at 2026-11-03T04:05:06Z)",
        ),
        (
            r#""Pid":0,"FinishedAt":"0001-01-01T00:00:00Z""#,
            "(never started)",
        ),
    ] {
        node.write(&config, running.replace(r#""Pid":77"#, state))?;
        let message = stopped(&node, "lab");
        assert!(message.contains(expected), "{message}");
        assert_eq!(list(&node.roots).containers.len(), 0);
    }
    Ok(())
}

/// A full name or ID of a stopped container is meant before a running container's ID that begins with it. Of one name in
/// two runtimes the running container is meant.
#[test]
fn a_stopped_container_is_not_mistaken_for_a_running_one() -> Outcome {
    let (node, _) = docker_node()?;
    let config = format!("{DOCKER}/containers/{DOCKER_ID}/config.v2.json");
    let running = fs::read_to_string(node.path(&config))?;
    let add_stopped = |id: &str, name: &str| {
        let config = running
            .replace(DOCKER_ID, id)
            .replace(r#""Name":"/lab""#, &format!(r#""Name":"/{name}""#))
            .replace(r#""Pid":77"#, r#""Pid":0"#);
        node.write(&format!("{DOCKER}/containers/{id}/config.v2.json"), config)
    };
    add_stopped(&"c".repeat(64), "175b")?;
    assert!(stopped(&node, "175b").contains("175b (cccccccccccc) is stopped"));
    assert_eq!(find(&node.roots, "175bc")?.id, DOCKER_ID);
    add_stopped(&"d".repeat(64), "lab")?;
    assert_eq!(find(&node.roots, "lab")?.id, DOCKER_ID);
    // A prefix of both.
    add_stopped(&format!("175bcd10{}", "e".repeat(56)), "other")?;
    let error = find(&node.roots, "175bcd10").unwrap_err();
    assert!(matches!(error, Error::Ambiguous { .. }), "{error}");
    let message = error.to_string();
    for label in ["lab (175bcd10f408)", "other (175bcd10eeee) (stopped)"] {
        assert!(message.contains(label), "{message}");
    }
    assert_eq!(find(&node.roots, DOCKER_ID)?.id, DOCKER_ID);
    Ok(())
}

/// A container whose process was killed, while its runtime has not noticed yet.
#[test]
fn a_container_whose_process_is_gone_is_stopped() -> Outcome {
    let (node, _) = docker_node()?;
    fs::remove_dir_all(node.path("proc/77"))?;
    let message = stopped(&node, "lab");
    assert!(
        message.contains("lab (175bcd10f408) is stopped (its process 77 is no longer there)"),
        "{message}"
    );
    Ok(())
}

/// Root saves what the records of a store say, so it does not believe a store that another user can write to.
#[test]
fn the_records_of_another_user_are_not_believed() -> Outcome {
    if support::ignored(&[Need::Root]) {
        return Ok(());
    }
    let (node, _) = docker_node()?;
    let store = node.path(DOCKER);
    std::os::unix::fs::chown(&store, Some(1001), Some(1001))?;
    let message = find(&node.roots, "lab").unwrap_err().to_string();
    assert!(message.contains("it belongs to user 1001"), "{message}");
    let listing = list(&node.roots);
    assert_eq!((listing.containers.len(), listing.problems.len()), (0, 1));
    std::os::unix::fs::chown(&store, Some(0), Some(0))?;
    fs::set_permissions(&store, fs::Permissions::from_mode(0o777))?;
    let message = find(&node.roots, "lab").unwrap_err().to_string();
    assert!(message.contains("every user can write to it"), "{message}");
    fs::set_permissions(&store, fs::Permissions::from_mode(0o711))?;
    assert_eq!(find(&node.roots, "lab")?.id, DOCKER_ID);
    Ok(())
}

/// A store of root's with a part that another user has written, or could replace, is not believed; what lies in a private
/// directory of root's is, because runtimes give such directories to the IDs of a container.
#[test]
fn no_part_of_the_records_is_believed_that_another_user_can_write() -> Outcome {
    if support::ignored(&[Need::Root]) {
        return Ok(());
    }
    let (node, _) = docker_node()?;
    fs::set_permissions(node.path(""), fs::Permissions::from_mode(0o755))?;
    let mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode));
    let owner = |path: &Path, id| std::os::unix::fs::chown(path, Some(id), Some(id));
    let store = node.path(DOCKER);
    let refused = |part: &str, why: &str| {
        let message = find(&node.roots, "lab").unwrap_err().to_string();
        assert!(message.contains(why), "{part}: {message}");
        let listing = list(&node.roots);
        assert_eq!(listing.containers.len(), 0, "{part}");
        let problem = listing.problems.first().map(ToString::to_string);
        assert!(
            problem.is_some_and(|problem| problem.contains(why)),
            "{part}"
        );
    };
    let layer = format!("image/overlay2/layerdb/mounts/{DOCKER_ID}");
    let container = format!("containers/{DOCKER_ID}");
    for part in [
        "containers".to_owned(),
        container.clone(),
        format!("{container}/config.v2.json"),
        "image".to_owned(),
        format!("{layer}/mount-id"),
        "overlay2".to_owned(),
    ] {
        let path = store.join(&part);
        let before = fs::metadata(&path)?.permissions();
        owner(&path, 1001)?;
        refused(&part, "belongs to user 1001");
        owner(&path, 0)?;
        mode(&path, 0o777)?;
        refused(&part, "every user can write to it");
        std::os::unix::fs::chown(&path, Some(0), Some(1001))?;
        mode(&path, 0o775)?;
        refused(&part, "group 1001 can write to it");
        owner(&path, 0)?;
        fs::set_permissions(&path, before)?;
        assert_eq!(find(&node.roots, "lab")?.id, DOCKER_ID, "{part}");
    }
    // Every user may add files that do not exist yet.
    mode(&store, 0o1777)?;
    refused("sticky", "every user can write to it");
    mode(&store, 0o755)?;
    // The directories of a container, which only root can enter.
    mode(&store.join("containers"), 0o700)?;
    owner(&store.join(&container), 100_000)?;
    assert_eq!(find(&node.roots, "lab")?.id, DOCKER_ID);
    // A file may have been moved there.
    owner(&store.join(&container).join("config.v2.json"), 1001)?;
    refused("a private directory", "belongs to user 1001");
    owner(&store.join(&container).join("config.v2.json"), 0)?;

    let elsewhere = node.path("srv/overlay2");
    fs::create_dir_all(node.path("srv"))?;
    fs::rename(store.join("overlay2"), &elsewhere)?;
    symlink("/srv/overlay2", store.join("overlay2"))?;
    refused("a link to the layers of another store", "symbolic link");
    Ok(())
}

/// A root may be named by symbolic links, unless another user can make them lead elsewhere.
#[test]
fn the_way_to_a_root_is_no_other_users() -> Outcome {
    if support::ignored(&[Need::Root]) {
        return Ok(());
    }
    let (mut node, _) = docker_node()?;
    node.mkdir("tmp/attack")?;
    fs::set_permissions(node.path("tmp"), fs::Permissions::from_mode(0o1777))?;
    symlink("../../var/lib", node.path("tmp/attack/up"))?;
    symlink("/tmp/attack/up/docker", node.path("tmp/store"))?;
    node.roots.docker = vec!["/tmp/store".into()];
    assert_eq!(find(&node.roots, "lab")?.id, DOCKER_ID);
    let lchown = |path: &str, id| std::os::unix::fs::lchown(node.path(path), Some(id), Some(id));
    for part in ["tmp/store", "tmp/attack", "tmp/attack/up", "var"] {
        lchown(part, 1001)?;
        let message = find(&node.roots, "lab").unwrap_err().to_string();
        let expected = format!("/{part} is not believed: it belongs to user 1001");
        assert!(message.contains(&expected), "{message}");
        lchown(part, 0)?;
    }
    symlink("/tmp/circle", node.path("tmp/circle"))?;
    node.roots.docker = vec!["/tmp/circle".into()];
    assert!(find(&node.roots, "lab").is_err());
    Ok(())
}

/// Neither a FIFO nor a directory in place of a list stops the others from being read.
#[test]
fn a_record_that_is_no_file_is_a_problem() -> Outcome {
    let (mut node, _) = docker_node()?;
    node.roots.storage = vec![StorageRoot {
        root: "/var/lib/containers/storage".into(),
        runroot: "/run/containers/storage".into(),
    }];
    node.mkdir("var/lib/containers/storage/overlay-containers")?;
    let list_file = node.path("var/lib/containers/storage/overlay-containers/containers.json");
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &list_file,
        rustix::fs::FileType::Fifo,
        mode,
        0,
    )?;
    let listing = list(&node.roots);
    assert_eq!(listing.containers.len(), 1);
    let problems: Vec<_> = listing.problems.iter().map(ToString::to_string).collect();
    assert!(
        problems.len() == 1 && problems[0].contains("expected a regular file"),
        "{problems:?}"
    );
    Ok(())
}

/// The user writes the records of a rootless Podman, so the node's root does not search them, and says so.
#[test]
fn the_storage_of_rootless_podman_is_named() -> Outcome {
    let node = Node::empty()?;
    let message = |name| find(&node.roots, name).unwrap_err().to_string();
    assert!(!message("lab").contains("rootless"), "{}", message("lab"));
    node.mkdir("run/user/1001/containers")?;
    node.mkdir("run/user/1002")?;
    let message = message("lab");
    assert!(
        message.contains("rootless Podman is not searched (user 1001)"),
        "{message}"
    );
    Ok(())
}

/// A second container makes the pod's name alone ambiguous; a running sandbox does not.
#[test]
fn a_pod_with_several_containers_needs_the_containers_name() -> Outcome {
    let Some(node) = crio_node() else {
        return Ok(());
    };
    let second = sidecars::second_container(&node, "sidecar")?;

    let error = find(&node.roots, "hub/notebook-alice").unwrap_err();
    assert!(
        matches!(&error, Error::Ambiguous { candidates, .. } if candidates.len() == 2),
        "{error}"
    );
    assert!(
        error.to_string().contains("hub/notebook-alice/sidecar"),
        "{error}"
    );
    assert!(matches!(
        find(&node.roots, "61a37"),
        Err(Error::Ambiguous { .. })
    ));
    assert_eq!(find(&node.roots, "hub/notebook-alice/sidecar")?.id, second);
    assert_eq!(find(&node.roots, "61a37e")?.id, second);
    Ok(())
}

/// In a user namespace of its own, a tenant can mount an overlay with arbitrary names and make it its root, including
/// the names that the runtime recorded.
#[test]
fn a_root_that_the_runtime_did_not_make_is_refused() -> Outcome {
    for (node, id, pid) in [
        (containerd_node(), CONTAINERD_ID, CONTAINERD_PID),
        (crio_node(), CRIO_ID, CRIO_PID),
        (Some(docker_node()?.0), DOCKER_ID, 77),
    ] {
        let Some(node) = node else { continue };
        let container = find(&node.roots, id)?;
        let proc = format!("proc/{pid}/mountinfo");
        let honest = fs::read_to_string(node.path(&proc))?;
        node.mkdir("etc")?;
        let (major, minor) = running(&container).root.device;
        let device = format!("{major}:{minor} / / ");
        assert!(honest.contains(&device));
        let other = honest.replacen(&device, "0:9999 / / ", 1);
        let data_only = other.replacen(",upperdir=", "::/etc,userxattr,upperdir=", 1);
        let upper = other.replacen(",upperdir=", ",upperdir=/etc,workdir=", 1);
        for forged in [&other, &data_only, &upper] {
            node.write(&proc, forged)?;
            let error = find(&node.roots, id).unwrap_err();
            assert!(matches!(error, Error::ForeignRoot { .. }), "{error}");
            assert!(error.to_string().contains("0:9999"), "{error}");
            assert_eq!(
                (error.kind(), error.retryable()),
                (FailureKind::BaseUnproven, false)
            );
            let listing = list(&node.roots);
            assert_eq!((listing.containers.len(), listing.problems.len()), (0, 1));
            // A container that was genuine when the save began.
            assert!(matches!(
                recheck(&node.roots, &container),
                Err(Error::Gone { .. })
            ));
        }
        // If the file system is the right one, the container's text is ignored.
        for (from, to) in [
            (",upperdir=", "::/etc,upperdir="),
            (",upperdir=", ",userxattr,upperdir="),
            (
                ",upperdir=",
                ",index=on,metacopy=on,redirect_dir=on,upperdir=",
            ),
            (",upperdir=", ",upperdir=/etc,workdir="),
            ("lowerdir=", "lowerdir=/etc:"),
        ] {
            node.write(&proc, honest.replacen(from, to, 1))?;
            let found = find(&node.roots, id)?;
            assert_eq!(found.overlay, container.overlay, "{to}");
            recheck(&node.roots, &container)?;
        }
    }
    Ok(())
}

/// Anything in the node's own mount beyond the record is refused too, whatever made the mount.
#[test]
fn a_mount_that_is_not_the_records_is_refused() -> Outcome {
    for (node, id, lower) in [
        (containerd_node(), CONTAINERD_ID, SNAPSHOTS),
        (crio_node(), CRIO_ID, CRIO),
        (Some(docker_node()?.0), DOCKER_ID, DOCKER),
    ] {
        let Some(node) = node else { continue };
        let honest = fs::read_to_string(node.path("proc/1/mountinfo"))?;
        let container = find(&node.roots, id)?;
        node.mkdir(&format!("{lower}/other"))?;
        let other = format!("/{lower}/other");
        let options = honest.split("lowerdir=").nth(1).ok_or("lowerdir")?;
        let lowers = options.split(',').next().ok_or("lowerdir")?;
        let first = lowers.split(':').next().ok_or("lowerdir")?;
        for (from, to, why) in [
            (lowers, format!("{lowers}:{other}"), "lower directories"),
            (lowers, lowers.replacen(first, &other, 1), "lower directory"),
            (
                ",upperdir=",
                format!(",upperdir={other},workdir="),
                "writes to",
            ),
        ] {
            node.write("proc/1/mountinfo", honest.replacen(from, &to, 1))?;
            let error = find(&node.roots, id).unwrap_err();
            assert!(matches!(error, Error::ForeignRoot { .. }), "{error}");
            assert!(error.to_string().contains(why), "{error}");
            // If the mount changes after the container was found, it counts as another container.
            assert!(matches!(
                recheck(&node.roots, &container),
                Err(Error::Gone { .. })
            ));
        }
        node.write("proc/1/mountinfo", &honest)?;
        recheck(&node.roots, &container)?;
    }
    Ok(())
}

/// A mount in a volume that is shared with the node appears in the node's table, but was still made by the container.
#[test]
fn what_a_container_mounts_in_a_shared_volume_is_not_the_nodes_word() -> Outcome {
    for (node, id) in [
        (containerd_node(), CONTAINERD_ID),
        (crio_node(), CRIO_ID),
        (Some(docker_node()?.0), DOCKER_ID),
    ] {
        let Some(node) = node else { continue };
        let honest = fs::read_to_string(node.path("proc/1/mountinfo"))?;
        let (major, minor) = running(&find(&node.roots, id)?).root.device;
        node.mkdir("etc")?;
        node.mkdir("srv/shared")?;
        let device = format!(" {major}:{minor} / ");
        let line = honest
            .lines()
            .find(|line| line.contains(&device))
            .ok_or("line")?;
        let at = line.split(' ').nth(4).ok_or("mount point")?;
        let with = |at: &str, options: &str| {
            let line = line.replacen(
                &format!(" {} ", line.split(' ').nth(4).unwrap_or_default()),
                &format!(" {at} "),
                1,
            );
            line.replacen(",upperdir=", options, 1)
        };
        let forged = "::/etc,userxattr,upperdir=";
        let place = "/srv/shared/new";
        // A lookup of that path leads to the runtime's own directory.
        symlink(at, node.path("srv/shared/new"))?;
        node.write(
            "proc/1/mountinfo",
            honest.replace(line, &with(place, forged)),
        )?;
        let error = find(&node.roots, id).unwrap_err();
        assert!(matches!(error, Error::ForeignRoot { .. }), "{error}");
        assert!(error.to_string().contains("not mounted where"), "{error}");
        // If no mount adds anything to the record, only the record counts.
        node.write(
            "proc/1/mountinfo",
            honest.replace(line, &with(place, ",upperdir=")),
        )?;
        find(&node.roots, id)?;
    }
    Ok(())
}

/// Directories of the record are the runtime's own, below its store, so no link may lead elsewhere.
#[test]
fn a_directory_that_became_a_symbolic_link_is_not_followed() -> Outcome {
    for (node, id) in [
        (containerd_node(), CONTAINERD_ID),
        (crio_node(), CRIO_ID),
        (Some(docker_node()?.0), DOCKER_ID),
    ] {
        let Some(node) = node else { continue };
        let overlay = find(&node.roots, id)?.overlay;
        for directory in overlay.lowers.iter().chain([&overlay.upper]) {
            let aside = directory.with_file_name("aside");
            fs::rename(directory, &aside)?;
            symlink("/etc", directory)?;
            let error = find(&node.roots, id).unwrap_err();
            assert!(matches!(error, Error::ForeignRoot { .. }), "{error}");
            assert!(error.to_string().contains("symbolic link"), "{error}");
            fs::remove_file(directory)?;
            fs::rename(&aside, directory)?;
        }
        find(&node.roots, id)?;
    }
    Ok(())
}

/// If the runtime mounts in a mount namespace other than that of the node's first process, the process that waits for
/// the container (conmon, a shim) has the mount. In a user namespace, a user controls that table, and only the record
/// counts.
#[test]
fn the_monitors_table_has_what_the_nodes_has_not() -> Outcome {
    let Some(node) = crio_node() else {
        return Ok(());
    };
    let container = find(&node.roots, CRIO_ID)?;
    let honest = fs::read_to_string(node.path("proc/1/mountinfo"))?;
    let nothing = "27 1 254:0 / / rw - ext4 /dev/sda rw\n";
    node.write("proc/1/mountinfo", nothing)?;
    let stat = node.path(&format!("proc/{CRIO_PID}/stat"));
    let text = fs::read_to_string(&stat)?;
    fs::write(&stat, text.replacen("S 1 ", "S 600 ", 1))?;
    node.process(600, 4, honest.as_bytes(), IDENTITY)?;
    let namespaces = |pid: &str, mounts: &str, users: &str| -> Outcome {
        let ns = format!("proc/{pid}/ns");
        node.mkdir(&ns)?;
        for (kind, id) in [("mnt", mounts), ("user", users)] {
            let link = node.path(&ns).join(kind);
            let _ = fs::remove_file(&link);
            symlink(format!("{kind}:[{id}]"), link)?;
        }
        Ok(())
    };
    namespaces("self", "1", "10")?;
    namespaces(&CRIO_PID.to_string(), "2", "10")?;
    namespaces("600", "1", "10")?;
    let found = find(&node.roots, CRIO_ID)?;
    assert_eq!(found.overlay, container.overlay);
    assert_eq!(
        running(&found).root.source,
        TableSource::Monitor { pid: 600, start: 4 }
    );
    recheck(&node.roots, &found)?;

    // In a user namespace of its own: the record's directories, with `user.*` attributes.
    let with =
        |from: &str, to: &str| node.write("proc/600/mountinfo", honest.replacen(from, to, 1));
    namespaces("600", "1", "11")?;
    with(",upperdir=", ",userxattr,upperdir=")?;
    let found = find(&node.roots, CRIO_ID)?;
    assert_eq!(found.overlay.namespace, Namespace::User);
    assert_eq!(found.overlay.lowers, container.overlay.lowers);
    with(",upperdir=", "::/etc,upperdir=")?;
    let error = find(&node.roots, CRIO_ID).unwrap_err();
    assert!(error.to_string().contains("do not name"), "{error}");

    // The monitor is in the container's own mount namespace, whose mounts the tenant controls.
    with("x", "x")?;
    namespaces("600", "2", "10")?;
    let error = find(&node.roots, CRIO_ID).unwrap_err();
    assert!(matches!(error, Error::ForeignRoot { .. }), "{error}");
    Ok(())
}

/// A custom snapshotter keeps its records elsewhere: the node's mount at the place where the runtime mounts the root
/// counts.
#[test]
fn of_another_snapshotter_the_nodes_mount_counts() -> Outcome {
    let Some(node) = containerd_node() else {
        return Ok(());
    };
    let meta = node.path(META);
    let mut bytes = fs::read(&meta)?;
    let (old, new) = (b"overlayfs", b"overlaybd");
    let at: Vec<usize> = (0..bytes.len() - old.len())
        .filter(|&at| bytes[at..].starts_with(old))
        .collect();
    assert!(!at.is_empty());
    for at in at {
        bytes[at..at + new.len()].copy_from_slice(new);
    }
    fs::write(&meta, bytes)?;
    for name in ["a", "b", "etc"] {
        node.mkdir(&format!("other/{name}"))?;
    }
    let line = |device: &str, at: &str| {
        format!(
            "900 27 {device} / {at} rw - overlay overlay rw,lowerdir=/other/a,upperdir=/other/b\n"
        )
    };
    node.write("proc/1/mountinfo", line("0:108", &rootfs()))?;
    let container = find(&node.roots, CONTAINERD_ID)?;
    assert_eq!(container.overlay.upper, node.path("other/b"));
    assert_eq!(container.overlay.lowers, [node.path("other/a")]);
    // The container's own table names the directories that the record of overlayfs would name.
    for (device, at) in [("0:107", rootfs()), ("0:108", "/elsewhere".to_owned())] {
        node.write("proc/1/mountinfo", line(device, &at))?;
        let error = find(&node.roots, CONTAINERD_ID).unwrap_err();
        assert!(matches!(error, Error::ForeignRoot { .. }), "{error}");
    }
    Ok(())
}

#[test]
fn roots_that_are_no_overlay_with_an_upper_are_refused() -> Outcome {
    let Some(node) = containerd_node() else {
        return Ok(());
    };
    let proc = format!("proc/{CONTAINERD_PID}/mountinfo");
    let honest = fs::read_to_string(node.path(&proc))?;
    let line = honest.lines().next().unwrap_or_default();
    for (forged, why) in [
        (
            "305 219 0:108 / / rw - btrfs /dev/sda rw".to_owned(),
            "btrfs",
        ),
        (
            line.replace("0:108 / /", "0:108 /sub /"),
            "within an overlay",
        ),
        (
            line.replace("0:108 / /", "0:108 / /elsewhere"),
            "not the root of a mount",
        ),
    ] {
        node.write(&proc, &forged)?;
        let error = find(&node.roots, CONTAINERD_ID).unwrap_err();
        assert!(
            matches!(error, Error::NotOverlay { .. }) && error.to_string().contains(why),
            "{why}: {error}"
        );
    }
    node.write(&proc, &honest)?;
    let mounted = fs::read_to_string(node.path("proc/1/mountinfo"))?;
    let upper = mounted.find(",upperdir").ok_or("upperdir")?;
    node.write("proc/1/mountinfo", &mounted[..upper])?;
    let error = find(&node.roots, CONTAINERD_ID).unwrap_err();
    assert!(
        matches!(error, Error::NotOverlay { .. }) && error.to_string().contains("read-only"),
        "{error}"
    );
    Ok(())
}

/// With mapped IDs, runtimes mount copies of the lowers whose names are gone afterwards. The records name the
/// originals, which count only if their number is that of the mounted ones.
#[test]
fn lowers_without_a_name_come_from_the_records() -> Outcome {
    let Some(node) = containerd_node() else {
        return Ok(());
    };
    let proc = "proc/1/mountinfo";
    let honest = fs::read_to_string(node.path(proc))?;
    let mapped = honest.replace(&format!("/{SNAPSHOTS}/2/fs"), "/tmp/ovl-idmapped1/0");
    node.write(proc, &mapped)?;
    let container = find(&node.roots, CONTAINERD_ID)?;
    assert_eq!(
        container.overlay.lowers[0],
        node.path(&format!("{SNAPSHOTS}/2/fs"))
    );
    prove_base(&node.roots, &container)?;
    assert!(container.overlay.id_mapped.is_empty());
    // A pod with `hostUsers: false`: its lowers were mounted ID-mapped.
    for map in ["uid_map", "gid_map"] {
        node.write(
            &format!("proc/{}/{map}", running(&container).pid),
            "0 100000 65536\n",
        )?;
    }
    let of_pod = find(&node.roots, CONTAINERD_ID)?.overlay;
    assert_eq!(of_pod.id_mapped, of_pod.lowers[..1]);
    node.write(
        proc,
        mapped.replace("lowerdir=", "lowerdir=/tmp/ovl-idmapped1/1:"),
    )?;
    let error = find(&node.roots, CONTAINERD_ID).unwrap_err();
    assert!(matches!(error, Error::ForeignRoot { .. }), "{error}");
    Ok(())
}

#[test]
fn a_base_is_proven_by_what_is_mounted_or_not_at_all() -> Outcome {
    let Some(node) = containerd_node() else {
        return Ok(());
    };
    let container = find(&node.roots, CONTAINERD_ID)?;

    // The stack under the container is not the one of its image.
    let mut other = container.clone();
    node.mkdir(&format!("{SNAPSHOTS}/3/fs"))?;
    other.overlay.lowers[0] = node.path(&format!("{SNAPSHOTS}/3/fs"));
    let error = prove_base(&node.roots, &other).unwrap_err();
    assert_eq!(error.kind(), FailureKind::BaseUnproven);
    assert!(error.to_string().contains("snapshots/3/fs"), "{error}");

    // The manifest is gone: the config, recorded by its digest, still proves what is mounted.
    let manifest = node.path(&format!("{BLOBS}/{MANIFEST}"));
    let text = fs::read_to_string(&manifest)?;
    fs::remove_file(&manifest)?;
    let base = prove_base(&node.roots, &container)?;
    assert!(base.manifest.is_none() && base.layers.iter().all(|layer| layer.descriptor.is_none()));
    assert_eq!(Digest::of(&base.config).hex(), CONFIG);
    // A file of that name with other contents is not accepted.
    fs::write(&manifest, text.replace("95054920", "95054921"))?;
    assert!(prove_base(&node.roots, &container)?.manifest.is_none());
    fs::write(&manifest, &text)?;
    assert!(prove_base(&node.roots, &container)?.manifest.is_some());

    // The config is gone: there is no proof.
    fs::remove_file(node.path(&format!("{BLOBS}/{CONFIG}")))?;
    let error = prove_base(&node.roots, &container).unwrap_err();
    assert_eq!(error.kind(), FailureKind::BaseUnproven);
    assert!(
        error
            .to_string()
            .contains(&format!("config sha256:{CONFIG} is not on this node")),
        "{error}"
    );
    Ok(())
}

/// A layer's blob is accepted only with the length given in the manifest.
#[test]
fn a_local_blob_has_its_descriptors_size() -> Outcome {
    let Some(node) = containerd_node() else {
        return Ok(());
    };
    let container = find(&node.roots, CONTAINERD_ID)?;
    let blob = node.path(&format!("{BLOBS}/{}", &LAYERS[1]["sha256:".len()..]));
    let file = fs::File::create(&blob)?;
    for (len, is_taken) in [(0, false), (81_681_609, false), (81_681_610, true)] {
        file.set_len(len)?;
        let base = prove_base(&node.roots, &container)?;
        assert_eq!(base.layers[1].local_blob.is_some(), is_taken, "{len}");
        assert_eq!(base.layers[0].local_blob, None);
    }
    Ok(())
}

#[test]
fn crio_bases_are_proven_or_not_at_all() -> Outcome {
    let Some(node) = crio_node() else {
        return Ok(());
    };
    let container = find(&node.roots, CRIO_ID)?;
    let mut other = container.clone();
    other.overlay.lowers.remove(0);
    assert_eq!(
        prove_base(&node.roots, &other).unwrap_err().kind(),
        FailureKind::BaseUnproven
    );
    let config = "=c2hhMjU2OjIzNWVkM2I1ZTJjZDBlZmU1NGFhNTVlNGMzOTA4M2JiZjFiYzc1ZjFkNjI0YTJmOThiZWRjOTAxOTZmMjU0MDg=";
    let config = node.path(&format!("{CRIO}/overlay-images/{CONFIG}/{config}"));
    let text = fs::read_to_string(&config)?;
    fs::write(
        &config,
        text.replace("JUPYTER_PORT=8888", "JUPYTER_PORT=8889"),
    )?;
    let error = prove_base(&node.roots, &container).unwrap_err();
    assert_eq!(error.kind(), FailureKind::BaseUnproven);
    assert!(error.to_string().contains(CONFIG), "{error}");
    Ok(())
}

#[test]
fn another_process_with_the_same_number_is_not_the_container() -> Outcome {
    for (node, id, pid) in [
        (containerd_node(), CONTAINERD_ID, CONTAINERD_PID),
        (crio_node(), CRIO_ID, CRIO_PID),
    ] {
        let Some(node) = node else { continue };
        let container = find(&node.roots, id)?;
        let mountinfo = fs::read(node.path(&format!("proc/{pid}/mountinfo")))?;
        node.process(pid, running(&container).pid_start + 1, &mountinfo, IDENTITY)?;
        assert!(matches!(
            recheck(&node.roots, &container),
            Err(Error::Gone { .. })
        ));
        node.process(
            pid,
            running(&container).pid_start,
            b"1 0 0:1 / / rw - ext4 /dev/sda rw\n",
            IDENTITY,
        )?;
        assert!(matches!(
            recheck(&node.roots, &container),
            Err(Error::Gone { .. })
        ));
        fs::remove_dir_all(node.path(&format!("proc/{pid}")))?;
        assert!(matches!(
            recheck(&node.roots, &container),
            Err(Error::Gone { .. })
        ));
        assert!(matches!(find(&node.roots, id), Err(Error::Stopped { .. })));
        assert_eq!(list(&node.roots).containers.len(), 0);
    }
    Ok(())
}

fn files_below(directory: &Path, out: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => files_below(&path, out),
            Ok(kind) if kind.is_file() => out.push(path),
            _ => {}
        }
    }
}

/// Runs all queries on a node with damaged files.
fn ask(node: &Node, id: &str) {
    let listing = list(&node.roots);
    for container in listing.containers.iter().chain(&listing.sandboxes) {
        let _ = prove_base(&node.roots, container);
        let _ = recheck(&node.roots, container);
    }
    if let Err(error) = find(&node.roots, id) {
        assert!(
            error.kind() != FailureKind::Usage && error.kind() != FailureKind::Cancelled,
            "{error}"
        );
    }
}

#[test]
fn garbage_in_any_file_is_an_error_and_never_a_panic() -> Outcome {
    for (node, id) in [(containerd_node(), CONTAINERD_ID), (crio_node(), CRIO_ID)] {
        let Some(node) = node else { continue };
        let mut files = Vec::new();
        files_below(&node.path("."), &mut files);
        files.sort();
        assert!(files.len() > 10);
        let deep = [b"[".repeat(100_000), b"]".repeat(100_000)].concat();
        for file in files {
            let whole = fs::read(&file)?;
            let cases: [&[u8]; 6] = [
                b"",
                b"{",
                b"null",
                b"\xff\xfe\0",
                &whole[..whole.len() / 2],
                &deep,
            ];
            for garbage in cases {
                fs::write(&file, garbage)?;
                ask(&node, id);
            }
            // The file is missing, or a directory is in its place.
            fs::remove_file(&file)?;
            ask(&node, id);
            fs::create_dir(&file)?;
            ask(&node, id);
            fs::remove_dir(&file)?;
            fs::write(&file, whole)?;
        }
        assert!(list(&node.roots).problems.is_empty());
    }
    Ok(())
}

#[test]
fn what_cannot_be_read_is_a_problem_with_its_path() -> Outcome {
    let Some(node) = containerd_node() else {
        return Ok(());
    };
    let bundle = format!("{TASKS}/{CONTAINERD_ID}/config.json");
    for file in [META, &bundle] {
        let whole = fs::read(node.path(file))?;
        node.write(file, b"{")?;
        let listing = list(&node.roots);
        assert!(
            listing.problems.iter().any(|p| p.path == node.path(file)),
            "{file}: {:?}",
            listing.problems
        );
        // The node's own mount still shows the root, but nothing shows the image.
        let found = find(&node.roots, CONTAINERD_ID);
        assert!(found.is_err() || prove_base(&node.roots, &found?).is_err());
        node.write(file, whole)?;
    }
    let Some(node) = crio_node() else {
        return Ok(());
    };
    node.write(
        &format!("{CRIO}/overlay-containers/volatile-containers.json"),
        b"[{]",
    )?;
    assert_eq!(list(&node.roots).problems.len(), 1);
    Ok(())
}

fn walk(bucket: &bolt::Bucket<'_>, depth: usize) -> Result<usize, bolt::Error> {
    let mut keys = 0;
    for (_, value) in bucket.entries()? {
        keys += 1;
        if let bolt::Value::Bucket(inner) = value
            && depth < 8
        {
            keys += walk(&inner, depth + 1)?;
        }
    }
    Ok(keys)
}

/// A real database, truncated and with flipped bits, is read or rejected; it never causes a panic or hang.
#[test]
fn a_real_database_can_be_damaged_at_will() -> Outcome {
    let Some(recording) = recording("containerd-2.2.1") else {
        return Ok(());
    };
    let whole = fs::read(recording.join(META))?;
    let dir = TempDir::new()?;
    let path = dir.path().join("meta.db");
    let keys = |bytes: &[u8]| {
        fs::write(&path, bytes)?;
        let began = Instant::now();
        let keys = bolt::read(&path, |db| walk(&db.root(), 0));
        assert!(began.elapsed() < Duration::from_secs(5));
        std::io::Result::Ok(keys)
    };
    assert!(keys(&whole)?? > 100);
    for len in (0..whole.len()).step_by(4096 * 5 + 321) {
        let _ = keys(&whole[..len])?;
    }
    // The stride is a prime: the bits are spread over the file and are the same in every run.
    let mut at = 0;
    for round in 0..400 {
        at = (at + 104_729) % whole.len();
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (round % 8);
        // And one in a page header, where it does the most damage.
        let page = (round % (whole.len() / 4096)) * 4096;
        bytes[page + 8 + round % 8] ^= 1 << (round % 7);
        let _ = keys(&bytes)?;
    }
    Ok(())
}

const DOCKER_ID: &str = "175bcd10f408acce2d70bebe8edb74cccda20d520650eb39f04447056a6ef619";
const DOCKER: &str = "var/lib/docker";
const IMAGEDB: &str = "var/lib/docker/image/overlay2/imagedb/content/sha256";

/// Creates Docker's files, as dockerd 20.10 writes them for a container on an image of two layers.
fn docker_node() -> std::io::Result<(Node, Digest)> {
    let mut node = Node::empty()?;
    let diff_ids = [DiffId(Digest::of("one")), DiffId(Digest::of("two"))];
    let chain = ChainId::chain(&diff_ids);
    let config = format!(
        r#"{{"architecture":"amd64","os":"linux","rootfs":{{"type":"layers","diff_ids":["{}","{}"]}}}}"#,
        diff_ids[0], diff_ids[1]
    );
    let image = Digest::of(&config);
    node.write(&format!("{IMAGEDB}/{}", image.hex()), &config)?;
    for (at, cache) in ["aa", "bb"].iter().enumerate() {
        let layer = format!(
            "{DOCKER}/image/overlay2/layerdb/sha256/{}",
            chain[at].0.hex()
        );
        node.write(&format!("{layer}/diff"), diff_ids[at].to_string())?;
        node.write(&format!("{layer}/cache-id"), cache)?;
        if at > 0 {
            node.write(&format!("{layer}/parent"), chain[at - 1].to_string())?;
        }
    }
    let known = |text: &str, repository: &str| {
        format!(
            r#"{{"Digest":"{}","SourceRepository":"{repository}","HMAC":""}}"#,
            Digest::of(text)
        )
    };
    node.write(
        &format!(
            "{DOCKER}/image/overlay2/distribution/v2metadata-by-diffid/sha256/{}",
            diff_ids[0].0.hex()
        ),
        format!(
            "[{},{}]",
            known("old", "docker.io/library/old"),
            known("new", "127.0.0.1:5000/library/two")
        ),
    )?;
    let mount = format!("{DOCKER}/image/overlay2/layerdb/mounts/{DOCKER_ID}");
    node.write(&format!("{mount}/mount-id"), "cc")?;
    node.write(&format!("{mount}/init-id"), "cc-init")?;
    node.write(&format!("{mount}/parent"), chain[1].to_string())?;
    node.mkdir(&format!("{DOCKER}/overlay2/l"))?;
    for (id, link) in [
        ("aa", "AAA"),
        ("bb", "BBB"),
        ("cc-init", "III"),
        ("cc", "CCC"),
    ] {
        node.mkdir(&format!("{DOCKER}/overlay2/{id}/diff"))?;
        symlink(
            format!("../{id}/diff"),
            node.path(&format!("{DOCKER}/overlay2/l/{link}")),
        )?;
    }
    node.write(
        &format!("{DOCKER}/containers/{DOCKER_ID}/config.v2.json"),
        format!(
            r#"{{"State":{{"Running":true,"Pid":77}},"ID":"{DOCKER_ID}","Image":"{image}","Name":"/lab",
                "Driver":"overlay2","Config":{{"Image":"127.0.0.1:5000/library/two:1"}}}}"#
        ),
    )?;
    // Relative paths, including the upper: Docker does this if the options get too long.
    let root = "72 48 0:39 / / rw,relatime - overlay overlay rw,lowerdir=l/III:l/BBB:l/AAA,upperdir=cc/diff,workdir=w\n";
    node.process(77, 5, root.as_bytes(), "0 100000 65536\n")?;
    let merged = format!("/{DOCKER}/overlay2/cc/merged");
    node.write("proc/1/mountinfo", as_mounted(root, &merged))?;
    node.roots.docker = vec!["/var/lib/docker".into()];
    Ok((node, image))
}

#[test]
fn a_docker_container_stands_on_its_image_without_the_init_layer() -> Outcome {
    let (node, image) = docker_node()?;
    assert_eq!(list(&node.roots).problems, []);
    for name in ["lab", "175", DOCKER_ID, "pid:77"] {
        assert_eq!(find(&node.roots, name)?.id, DOCKER_ID, "{name}");
    }
    let container = find(&node.roots, "lab")?;
    recheck(&node.roots, &container)?;
    let diff = |id: &str| node.path(&format!("{DOCKER}/overlay2/{id}/diff"));
    assert_eq!(container.overlay.upper, diff("cc"));
    assert_eq!(
        container.overlay.lowers,
        [diff("cc-init"), diff("bb"), diff("aa")]
    );
    assert_eq!(container.uid_map.len(), 1);
    let base = prove_base(&node.roots, &container)?;
    assert_eq!(Digest::of(&base.config), image);
    assert!(base.manifest.is_none());
    let lowers: Vec<_> = base
        .layers
        .iter()
        .map(|layer| layer.lower.clone().unwrap_or_default())
        .collect();
    assert_eq!(lowers, [diff("aa"), diff("bb")]);
    let known = base.layers[0].descriptor.as_ref().ok_or("descriptor")?;
    assert_eq!(
        (known.digest().to_string(), base.layers[0].size_known),
        (Digest::of("new").to_string(), false)
    );
    assert_eq!(
        base.layers[0].repositories,
        ["127.0.0.1:5000/library/two", "docker.io/library/old"]
    );
    assert!(base.layers[1].descriptor.is_none());
    Ok(())
}

#[test]
fn dockers_records_are_checked_against_the_mount_and_against_each_other() -> Outcome {
    let (node, image) = docker_node()?;
    let container = find(&node.roots, "lab")?;
    let mut other = container.clone();
    other.overlay.lowers.swap(1, 2);
    assert_eq!(
        prove_base(&node.roots, &other).unwrap_err().kind(),
        FailureKind::BaseUnproven
    );

    // The image was removed by force: another config with the same layers is not silently used instead.
    let config = fs::read_to_string(node.path(&format!("{IMAGEDB}/{}", image.hex())))?;
    for os in ["one", "two"] {
        let fake = config.replace("linux", os);
        node.write(&format!("{IMAGEDB}/{}", Digest::of(&fake).hex()), &fake)?;
    }
    assert_eq!(
        Digest::of(prove_base(&node.roots, &container)?.config),
        image
    );
    fs::remove_file(node.path(&format!("{IMAGEDB}/{}", image.hex())))?;
    let error = prove_base(&node.roots, &container).unwrap_err();
    assert!(
        error.kind() == FailureKind::BaseUnproven
            && error.to_string().contains("another configuration"),
        "{error}"
    );

    // A directory of the layerdb whose name is not the chain ID of its contents.
    let bottom = Digest::of("one").hex();
    let layer = format!("{DOCKER}/image/overlay2/layerdb/sha256/{bottom}/diff");
    node.write(&layer, Digest::of("other").to_string())?;
    assert!(matches!(
        prove_base(&node.roots, &container),
        Err(Error::Damaged { .. })
    ));

    // IDs become paths.
    let mount_id = format!("{DOCKER}/image/overlay2/layerdb/mounts/{DOCKER_ID}/mount-id");
    node.write(&mount_id, "../../../../root")?;
    assert!(find(&node.roots, "lab").is_err());

    // A running container is not skipped if a file about it is missing.
    fs::remove_file(node.path(&mount_id))?;
    let problems = list(&node.roots).problems;
    assert!(
        problems.iter().any(|p| p.path == node.path(&mount_id)),
        "{problems:?}"
    );
    Ok(())
}

/// Podman keeps the spec with the data and the PID with the state; with mapped IDs it mounts copies of the lowers that
/// have no name afterwards.
#[test]
fn a_podman_container_with_mapped_ids_is_found_and_its_base_proven() -> Outcome {
    let mut node = Node::empty()?;
    node.roots.storage = Roots::default().storage;
    let root = "var/lib/containers/storage";
    let id = "8d02c7ad2323c50cfb5e9f02231b42cb60b83602e51f34ee949009b6327b5aac";
    let diff_ids = [DiffId(Digest::of("one")), DiffId(Digest::of("two"))];
    let config = format!(
        r#"{{"rootfs":{{"type":"layers","diff_ids":["{}","{}"]}}}}"#,
        diff_ids[0], diff_ids[1]
    );
    let image = Digest::of(&config);
    let layer = |text: &str| {
        let digest = Digest::of(text);
        format!(
            r#"{{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"{digest}","size":7}}"#
        )
    };
    let manifest = format!(
        r#"{{"schemaVersion":2,"config":{{"digest":"{image}","size":1}},"layers":[{},{}]}}"#,
        layer("gzip one"),
        layer("gzip two")
    );
    let key = base64::Engine::encode(
        &base64::engine::general_purpose::STANDARD,
        image.to_string(),
    );
    node.write(
        &format!("{root}/overlay-images/{}/manifest", image.hex()),
        &manifest,
    )?;
    node.write(
        &format!("{root}/overlay-images/{}/={key}", image.hex()),
        &config,
    )?;
    node.write(
        &format!("{root}/overlay-images/images.json"),
        format!(
            r#"[{{"id":"{}","names":["localhost/two:1","quay.io/lab/two:1"],
                "big-data-digests":{{"manifest":"{}"}}}}]"#,
            image.hex(),
            Digest::of(&manifest)
        ),
    )?;
    let layers = format!(
        r#"[{{"id":"aa","diff-digest":"{}"}},{{"id":"bb","parent":"aa","diff-digest":"{}"}},{{"id":"cc","parent":"bb"}}]"#,
        diff_ids[0], diff_ids[1]
    );
    node.write(&format!("{root}/overlay-layers/layers.json"), layers)?;
    let container = serde_json::json!([{
        "id": id, "names": ["lab"], "image": image.hex(), "layer": "cc",
        "metadata": r#"{"image-name":"localhost/two:1","name":"lab"}"#,
    }]);
    node.write(
        &format!("{root}/overlay-containers/containers.json"),
        container.to_string(),
    )?;
    let spec = r#"{"annotations":{"io.container.manager":"libpod"},"mounts":[
        {"destination":"/vol","type":"bind","source":"/srv","options":["rbind"]}]}"#;
    node.write(
        &format!("{root}/overlay-containers/{id}/userdata/config.json"),
        spec,
    )?;
    node.write(
        &format!("run/containers/storage/overlay-containers/{id}/userdata/pidfile"),
        "77",
    )?;
    let diff = |layer: &str| node.path(&format!("{root}/overlay/{layer}/diff"));
    for layer in ["aa", "bb", "cc"] {
        fs::create_dir_all(diff(layer))?;
    }
    let mapped = format!("/{root}/overlay/cc/mapped/0/l");
    let line = format!(
        "173 143 0:61 / / rw - overlay overlay rw,lowerdir={mapped}/B:{mapped}/A,upperdir=/{root}/overlay/cc/diff\n"
    );
    node.process(77, 5, line.as_bytes(), "0 100000 65536\n")?;
    node.write(
        "proc/1/mountinfo",
        as_mounted(&line, &format!("/{root}/overlay/cc/merged")),
    )?;

    assert_eq!(list(&node.roots).problems, []);
    let found = find(&node.roots, "lab")?;
    assert_eq!(
        (found.runtime, found.id.as_str(), found.uid_map[0].outside),
        (Runtime::Podman, id, 100_000)
    );
    assert!(
        found.pod.is_none()
            && found
                .mounts
                .iter()
                .any(|m| m.destination == Path::new("/vol") && m.volume)
    );
    assert_eq!(
        (&found.overlay.upper, found.overlay.lowers.as_slice()),
        (&diff("cc"), [diff("bb"), diff("aa")].as_slice())
    );
    let base = prove_base(&node.roots, &found)?;
    assert_eq!(Digest::of(&base.config), image);
    assert_eq!(base.name.as_deref(), Some("localhost/two:1"));
    assert_eq!(base.layers[0].lower, Some(diff("aa")));
    // Their names are gone: they were mounted ID-mapped, with the container's own IDs.
    assert_eq!(found.overlay.id_mapped, found.overlay.lowers);
    // A repository that is only local is not a registry to query.
    assert_eq!(base.layers[0].repositories, ["quay.io/lab/two"]);
    assert_eq!(
        base.layers[1]
            .descriptor
            .as_ref()
            .map(oci_spec::image::Descriptor::size),
        Some(7)
    );

    // A layer whose tar was never read as a whole proves nothing.
    let layers = fs::read_to_string(node.path(&format!("{root}/overlay-layers/layers.json")))?;
    node.write(
        &format!("{root}/overlay-layers/layers.json"),
        layers.replacen("diff-digest", "toc-digest", 1),
    )?;
    assert_eq!(
        prove_base(&node.roots, &found).unwrap_err().kind(),
        FailureKind::BaseUnproven
    );
    Ok(())
}

/// `--userns=host` in a store of `userns-remap`: the base's files have other IDs than those that the container writes.
#[test]
fn a_container_of_docker_with_other_ids_than_its_store_is_refused() -> Outcome {
    let (node, _) = docker_node()?;
    // Named by userns-remap after the first IDs of its files.
    let (root, aside) = (node.path(DOCKER), node.path("aside"));
    fs::rename(&root, &aside)?;
    fs::create_dir(&root)?;
    fs::rename(&aside, root.join("100000.100000"))?;
    assert_eq!(
        find(&node.roots, DOCKER_ID)?.overlay.id_mapped,
        [] as [&Path; 0]
    );
    for ids in [IDENTITY, "0 200000 65536\n", "1 100000 65536\n"] {
        node.write("proc/77/uid_map", ids)?;
        let error = find(&node.roots, DOCKER_ID).unwrap_err();
        assert_eq!(
            (error.code(), error.kind()),
            ("owners_unknown", FailureKind::Final)
        );
        assert!(error.to_string().contains("100000:100000"), "{error}");
        assert_eq!(list(&node.roots).problems.len(), 1);
    }
    node.write("proc/77/uid_map", "0 100000 65536\n")?;
    node.write("proc/77/gid_map", IDENTITY)?;
    assert!(matches!(
        find(&node.roots, DOCKER_ID),
        Err(Error::OwnersUnknown { .. })
    ));
    Ok(())
}

/// Absolute symlinks of the node must not lead into the agent's own files.
#[test]
fn symlinks_below_the_host_root_stay_there() -> Outcome {
    let (node, _) = docker_node()?;
    node.mkdir("data")?;
    fs::rename(node.path(DOCKER), node.path("data/docker"))?;
    symlink("/data/docker", node.path(DOCKER))?;
    let container = find(&node.roots, "lab")?;
    assert_eq!(
        container.overlay.upper,
        node.path("data/docker/overlay2/cc/diff")
    );
    prove_base(&node.roots, &container)?;
    Ok(())
}

/// Mounts made by the kernel of this machine, and the names in the mount options that it shows afterwards.
mod real_mounts {
    use super::*;
    use rustix::fs::CWD;
    use rustix::mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create,
        fsconfig_set_string, fsmount, fsopen, move_mount,
    };
    use upperdeck::node::overlay::mount::{OverlayMount, OverlayOptions};
    use upperdeck::node::procfs::parse_mountinfo;

    struct Mounted(PathBuf);

    impl Drop for Mounted {
        fn drop(&mut self) {
            let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
        }
    }

    /// Mounts with the options passed one by one, which need no escapes other than the overlay's own.
    fn mount(at: &Path, options: &[(&str, &Path)]) -> Result<Mounted, Box<dyn std::error::Error>> {
        fs::create_dir_all(at)?;
        let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
        for (name, value) in options {
            fsconfig_set_string(&context, *name, *value)?;
        }
        fsconfig_create(&context)?;
        let mount = fsmount(
            &context,
            FsMountFlags::FSMOUNT_CLOEXEC,
            MountAttrFlags::empty(),
        )?;
        move_mount(&mount, "", CWD, at, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
        Ok(Mounted(at.to_path_buf()))
    }

    fn read_back(at: &Path) -> Result<OverlayMount, Box<dyn std::error::Error>> {
        let mounts = parse_mountinfo(&fs::read("/proc/self/mountinfo")?)?;
        let line = mounts
            .iter()
            .find(|m| m.mount_point == at)
            .ok_or("the mount is not listed")?;
        assert_eq!(line.fs_type, "overlay");
        Ok(OverlayOptions::parse(&line.super_options)?
            .resolve(&[], false, &|p| fs::canonicalize(p))?)
    }

    fn escaped(path: &Path) -> PathBuf {
        let text = path
            .to_str()
            .unwrap()
            .replace('\\', "\\\\")
            .replace(':', "\\:")
            .replace(',', "\\,");
        text.into()
    }

    #[test]
    fn odd_names_are_read_back_from_the_kernel() -> Outcome {
        if support::ignored(&[support::Need::Root]) {
            return Ok(());
        }
        let dir = TempDir::new()?;
        let root = dir.path().canonicalize()?;
        for (at, name) in [
            "plain", "a:b", "c,d", "e f", "g\\h", "n\nl", "t\tb", "h#i", "j=k", "é", "\\:",
        ]
        .iter()
        .enumerate()
        {
            let base = root.join(at.to_string()).join(name);
            let (upper, work) = (base.join("upper"), base.join("work"));
            let lowers = [base.join("one"), base.join("two")];
            for path in lowers.iter().chain([&upper, &work]) {
                fs::create_dir_all(path)?;
            }
            // One option per layer: these need no escapes, but upperdir and workdir still do.
            let merged = base.join("m1");
            let options = [
                ("lowerdir+", lowers[0].as_path()),
                ("lowerdir+", &lowers[1]),
                ("upperdir", &escaped(&upper)),
                ("workdir", &escaped(&work)),
            ];
            let guard = mount(&merged, &options)?;
            let read = read_back(&merged)?;
            assert_eq!(
                (&read.upper, read.lowers.as_slice()),
                (&upper, lowers.as_slice()),
                "{name:?}"
            );
            drop(guard);
            // All in one option.
            let merged = base.join("m2");
            let mut joined = escaped(&lowers[0]).into_os_string();
            joined.push(":");
            joined.push(escaped(&lowers[1]));
            let joined = PathBuf::from(joined);
            let options = [
                ("lowerdir", joined.as_path()),
                ("upperdir", &escaped(&upper)),
                ("workdir", &escaped(&work)),
            ];
            let _guard = mount(&merged, &options)?;
            let read = read_back(&merged)?;
            assert_eq!(
                (&read.upper, read.lowers.as_slice()),
                (&upper, lowers.as_slice()),
                "{name:?}"
            );
            assert!(read.namespace == Namespace::Trusted && !read.index);
        }
        Ok(())
    }

    #[test]
    fn data_only_lowers_and_flags_are_read_back_from_the_kernel() -> Outcome {
        if support::ignored(&[support::Need::Root]) {
            return Ok(());
        }
        let dir = TempDir::new()?;
        let root = dir.path().canonicalize()?;
        let at = |name: &str| root.join(name);
        for name in ["one", "data1", "data2", "upper", "work"] {
            fs::create_dir(at(name))?;
        }
        let joined = PathBuf::from(format!(
            "{}::{}::{}",
            at("one").display(),
            at("data1").display(),
            at("data2").display()
        ));
        let on = Path::new("on");
        let guard = mount(
            &at("merged"),
            &[
                ("lowerdir", joined.as_path()),
                ("metacopy", on),
                ("redirect_dir", on),
                ("index", on),
                ("upperdir", &at("upper")),
                ("workdir", &at("work")),
            ],
        )?;
        let read = read_back(&at("merged"))?;
        assert_eq!(
            (read.lowers.as_slice(), read.data_only.as_slice()),
            (
                [at("one")].as_slice(),
                [at("data1"), at("data2")].as_slice()
            )
        );
        assert!(read.index);
        drop(guard);
        let context_free = [
            ("lowerdir", at("one")),
            ("upperdir", at("data1")),
            ("workdir", at("data2")),
        ];
        let status = std::process::Command::new("mount")
            .args(["-t", "overlay", "overlay", "-o"])
            .arg(format!(
                "userxattr,{}",
                context_free
                    .iter()
                    .map(|(n, p)| format!("{n}={}", p.display()))
                    .collect::<Vec<_>>()
                    .join(",")
            ))
            .arg(at("merged"))
            .status()?;
        assert!(status.success());
        let _guard = Mounted(at("merged"));
        assert_eq!(read_back(&at("merged"))?.namespace, Namespace::User);
        Ok(())
    }

    /// As runtimes mount if the options get longer than a page.
    #[test]
    fn a_hundred_relative_lowers_are_found_again() -> Outcome {
        if support::ignored(&[support::Need::Root]) {
            return Ok(());
        }
        let dir = TempDir::new()?;
        let root = dir.path().canonicalize()?;
        let names: Vec<String> = (0..100).map(|n| format!("{n}/fs")).collect();
        for name in names
            .iter()
            .map(String::as_str)
            .chain(["up/fs", "up/work", "merged"])
        {
            fs::create_dir_all(root.join(name))?;
        }
        let options = format!(
            "lowerdir={},upperdir={2}/up/fs,workdir={1}/up/work",
            names.join(":"),
            root.display(),
            root.display()
        );
        let status = std::process::Command::new("mount")
            .current_dir(&root)
            .args(["-t", "overlay", "overlay", "-o", &options])
            .arg(root.join("merged"))
            .status()?;
        assert!(status.success());
        let _guard = Mounted(root.join("merged"));
        let read = read_back(&root.join("merged"))?;
        assert_eq!(
            read.lowers,
            names.iter().map(|name| root.join(name)).collect::<Vec<_>>()
        );
        assert_eq!(read.upper, root.join("up/fs"));
        Ok(())
    }
}
