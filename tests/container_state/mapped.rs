//! Containers with a user namespace: which of their lower directories are mounted ID-mapped.

use std::fs;
use std::path::PathBuf;

use upperdeck::node::container::{Error, bolt, find, prove_base};

use super::database::Node as Tree;
use super::support::{Need, ignored};
use super::{
    CONTAINERD_ID, CONTAINERD_PID, CRIO, CRIO_ID, CRIO_PID, Node, Outcome, SNAPSHOTS,
    containerd_node, crio_node,
};

/// Changes the database of the snapshotter.
fn change_snapshots(node: &Node, change: impl FnOnce(&mut Tree)) -> Outcome {
    let path = node.path(SNAPSHOTS).with_file_name("metadata.db");
    let mut tree = bolt::read(&path, |db| Tree::read(&db.root()))?;
    change(&mut tree);
    fs::write(&path, tree.file())?;
    Ok(())
}

/// Returns the key of the container's own snapshot: the only one that is not a layer.
fn own_key(tree: &mut Tree) -> Vec<u8> {
    let snapshots = tree.bucket(&[b"v1", b"snapshots"]);
    let mut own = snapshots
        .keys()
        .filter(|key| key.ends_with(CONTAINERD_ID.as_bytes()));
    own.next().cloned().unwrap()
}

fn in_user_namespace(node: &Node, pid: u32) -> Outcome {
    for map in ["uid_map", "gid_map"] {
        node.write(&format!("proc/{pid}/{map}"), "0 100000 65536\n")?;
    }
    Ok(())
}

/// Replaces the lower directories in the node's mount table.
fn mounted_on(node: &Node, lowers: &str) -> Outcome {
    let honest = fs::read_to_string(node.path("proc/1/mountinfo"))?;
    let (before, rest) = honest.split_once("lowerdir=").ok_or("lowerdir")?;
    let (_, after) = rest.split_once(',').ok_or("lowerdir")?;
    node.write(
        "proc/1/mountinfo",
        format!("{before}lowerdir={lowers},{after}"),
    )?;
    Ok(())
}

/// containerd shortens long options to names below the directory of the ID-mapped mount, which are those below the
/// snapshotter's own directory, too. The snapshot's label says which of them is meant.
#[test]
fn shortened_names_of_lowers_are_id_mapped_if_the_snapshot_is() -> Outcome {
    let Some(node) = containerd_node() else {
        return Ok(());
    };
    in_user_namespace(&node, CONTAINERD_PID)?;
    mounted_on(&node, "2/fs:1/fs")?;
    let found = find(&node.roots, CONTAINERD_ID)?;
    assert_eq!(found.overlay.id_mapped, Vec::<PathBuf>::new());
    let label = |tree: &mut Tree| {
        let own = own_key(tree);
        let labels = tree.bucket(&[b"v1", b"snapshots", &own, b"labels"]);
        for kind in ["uidmapping", "gidmapping"] {
            labels.insert(
                format!("containerd.io/snapshot/{kind}").into_bytes(),
                Tree::Value(b"0:100000:65536".to_vec()),
            );
        }
    };
    change_snapshots(&node, label)?;
    let found = find(&node.roots, CONTAINERD_ID)?;
    assert_eq!(found.overlay.id_mapped, found.overlay.lowers);
    assert_eq!(found.overlay.lowers.len(), 2);
    prove_base(&node.roots, &found)?;

    // Whole names of the snapshotter's own directories say that nothing is between.
    mounted_on(&node, &format!("/{SNAPSHOTS}/2/fs:/{SNAPSHOTS}/1/fs"))?;
    let found = find(&node.roots, CONTAINERD_ID)?;
    assert_eq!(found.overlay.id_mapped, Vec::<PathBuf>::new());

    // Where ID-mapped mounts are not possible, the topmost layer is copied with other owners.
    mounted_on(&node, "3/fs:2/fs:1/fs")?;
    node.mkdir(&format!("{SNAPSHOTS}/3/fs"))?;
    change_snapshots(&node, |tree| {
        let own = own_key(tree);
        let snapshots = tree.bucket(&[b"v1", b"snapshots"]);
        let Some(Tree::Bucket(mine)) = snapshots.get(&own).cloned() else {
            panic!("own snapshot")
        };
        let Some(Tree::Value(parent)) = mine.get(&b"parent"[..]).cloned() else {
            panic!("parent")
        };
        let Some(Tree::Bucket(mut copy)) = snapshots.get(&parent).cloned() else {
            panic!("layer")
        };
        copy.insert(b"id".to_vec(), Tree::Value(vec![3]));
        copy.insert(b"parent".to_vec(), Tree::Value(parent.clone()));
        let key = [&parent[..], b"-100000-100000"].concat();
        snapshots.insert(key.clone(), Tree::Bucket(copy));
        tree.bucket(&[b"v1", b"snapshots", &own])
            .insert(b"parent".to_vec(), Tree::Value(key));
    })?;
    let found = find(&node.roots, CONTAINERD_ID)?;
    assert_eq!(found.overlay.lowers.len(), 3);
    assert_eq!(found.overlay.id_mapped, Vec::<PathBuf>::new());
    prove_base(&node.roots, &found)?;
    Ok(())
}

/// An ID-mapped mount that the runtime did not remove, for example because a process held it: its name is still there,
/// and leads to the recorded directory. Another directory of that name is none of the container's.
#[test]
fn an_id_mapped_mount_that_stayed_is_the_recorded_directory() -> Outcome {
    let Some(node) = containerd_node().filter(|_| !ignored(&[Need::Root])) else {
        return Ok(());
    };
    in_user_namespace(&node, CONTAINERD_PID)?;
    mounted_on(&node, "/tmp/ovl-idmapped1/2/fs:/tmp/ovl-idmapped1/1/fs")?;
    for lower in ["1", "2"] {
        node.mkdir(&format!("tmp/ovl-idmapped1/{lower}/fs"))?;
    }
    let table = fs::read_to_string(node.path("proc/1/mountinfo"))?;
    let with = |options: &str| {
        let line = format!(
            "27 1 8:1 / / rw - ext4 a rw\n950 27 8:1 / /tmp/ovl-idmapped1 {options} - ext4 a rw\n"
        );
        node.write("proc/1/mountinfo", format!("{line}{table}"))
    };
    with("ro,idmapped")?;
    let foreign = |node: &Node| {
        let error = find(&node.roots, CONTAINERD_ID).unwrap_err();
        assert!(matches!(error, Error::ForeignRoot { .. }), "{error}");
    };
    foreign(&node);
    // In a mount namespace of this thread's own.
    std::thread::scope(|scope| {
        let mounted = scope.spawn(|| -> Result<(), std::io::Error> {
            use rustix::mount::{MountPropagationFlags, mount_bind, mount_change};
            use rustix::thread::{UnshareFlags, unshare_unsafe};
            // Safe: no other thread relies on this one's namespace or directory.
            #[allow(unsafe_code, reason = "it can only change this thread")]
            unsafe {
                unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS)?;
            }
            let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
            mount_change("/", private)?;
            mount_bind(node.path(SNAPSHOTS), node.path("tmp/ovl-idmapped1"))?;
            let found = find(&node.roots, CONTAINERD_ID).unwrap();
            assert_eq!(found.overlay.id_mapped, found.overlay.lowers);
            with("ro")?;
            foreign(&node);
            Ok(())
        });
        mounted.join().unwrap()
    })?;
    Ok(())
}

/// CRI-O names the layers by the numbers of descriptors if the options get too long.
#[test]
fn names_that_are_numbers_of_descriptors_are_those_of_id_mapped_lowers() -> Outcome {
    let Some(node) = crio_node() else {
        return Ok(());
    };
    let lowers = find(&node.roots, CRIO_ID)?.overlay.lowers;
    let numbers: Vec<String> = (5..).take(lowers.len()).map(|n| n.to_string()).collect();
    mounted_on(&node, &numbers.join(":"))?;
    let none = Vec::<PathBuf>::new();
    assert_eq!(find(&node.roots, CRIO_ID)?.overlay.id_mapped, none);
    in_user_namespace(&node, CRIO_PID)?;
    let found = find(&node.roots, CRIO_ID)?;
    assert_eq!(found.overlay.lowers, lowers);
    assert_eq!(found.overlay.id_mapped, lowers);
    prove_base(&node.roots, &found)?;

    // On a kernel without ID-mapped overlays, the owners are changed in a copy of the topmost layer.
    let layers = format!("{CRIO}/overlay-layers/layers.json");
    let honest = fs::read_to_string(node.path(&layers))?;
    let mut list: serde_json::Value = serde_json::from_str(&honest)?;
    for layer in list.as_array_mut().ok_or("a list")? {
        layer["uidmap"] =
            serde_json::json!([{"container_id": 0, "host_id": 100_000, "size": 65536}]);
    }
    node.write(&layers, list.to_string())?;
    assert_eq!(find(&node.roots, CRIO_ID)?.overlay.id_mapped, none);
    Ok(())
}
