//! Containers without processes: found by the runtimes' records alone, and known when they are removed or started.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use upperdeck::common::digest::Digest;
use upperdeck::common::failure::FailureKind;
use upperdeck::node::container::{
    Attempt, Container, Error, Runtime, find_any, list, list_ended, prove_base, recheck,
};
use upperdeck::node::overlay::id_map::IdMapping;

use super::{
    CONTAINERD_ID, CRIO, CRIO_ID, DOCKER, DOCKER_ID, IDENTITY, LAYERS, Node, Outcome, SNAPSHOTS,
    TASKS, containerd_node, crio_node, docker_node,
};

fn current(node: &Node, name: &str) -> Result<Container, Error> {
    find_any(&node.roots, name, Attempt::Current)
}

fn end(container: &Container) -> String {
    container.ended().unwrap().end.to_string()
}

fn mounted(container: &Container) -> Vec<&str> {
    let mounts = container.mounts.iter();
    mounts
        .filter_map(|mount| mount.destination.to_str())
        .collect()
}

/// containerd has removed the bundle: spec, snapshots and image are in its databases.
#[test]
fn a_pod_of_containerd_is_found_by_its_metadata() -> Outcome {
    let Some(node) = containerd_node() else {
        return Ok(());
    };
    let running = current(&node, "hub/notebook-alice")?;
    assert!(running.running().is_some());
    let bundle = node.path(&format!("{TASKS}/{CONTAINERD_ID}"));
    let aside = node.path("aside");
    fs::rename(&bundle, &aside)?;
    let status = format!(
        "var/lib/containerd-2.2/io.containerd.grpc.v1.cri/containers/{CONTAINERD_ID}/status"
    );
    node.write(
        &status,
        r#"{"Version":"v1","Pid":0,"CreatedAt":1,"StartedAt":1795473973000000000,
            "FinishedAt":1795473974500000000,"ExitCode":137,"Reason":"OOMKilled"}"#,
    )?;
    for name in [
        "hub/notebook-alice",
        "hub/notebook-alice/notebook",
        &CONTAINERD_ID[..12],
    ] {
        let ended = current(&node, name)?;
        assert_eq!(
            (ended.runtime, ended.id.as_str()),
            (Runtime::Containerd, CONTAINERD_ID)
        );
        assert_eq!(
            end(&ended),
            "exit code 137, out of memory, at 2026-11-23T22:46:14Z"
        );
        assert_eq!(ended.overlay, running.overlay);
        assert_eq!(
            (&ended.pod, &ended.image_name),
            (&running.pod, &running.image_name)
        );
        assert_eq!(
            (&ended.uid_map, &ended.gid_map),
            (&running.uid_map, &running.gid_map)
        );
        // The spec's mounts; the kernel's list had some more below them.
        for at in [
            "/proc",
            "/dev",
            "/sys",
            "/etc/hosts",
            "/etc/hostname",
            "/etc/resolv.conf",
        ] {
            assert!(mounted(&ended).contains(&at), "{at}: {:?}", mounted(&ended));
        }
        let base = prove_base(&node.roots, &ended)?;
        let layers: Vec<String> = base.layers.iter().map(|l| l.diff_id.to_string()).collect();
        assert_eq!(layers.len(), LAYERS.len());
        assert!(!base.proof.starts_with("mounted"), "{}", base.proof);
        recheck(&node.roots, &ended)?;
    }
    assert_eq!(list(&node.roots).containers.len(), 0);
    assert_eq!(
        list_ended(&node.roots, true, usize::MAX).containers.len(),
        1
    );

    // Started again, being removed, and with another directory in the place of its own.
    let ended = current(&node, CONTAINERD_ID)?;
    fs::rename(&aside, &bundle)?;
    let error = recheck(&node.roots, &ended).unwrap_err();
    assert!(matches!(error, Error::StartedAgain { .. }), "{error}");
    assert_eq!(error.kind(), FailureKind::Retryable);
    fs::rename(&bundle, &aside)?;
    recheck(&node.roots, &ended)?;
    let text = fs::read_to_string(node.path(&status))?;
    node.write(&status, text.replace("\"Pid\":0", "\"Removing\":true"))?;
    removed(&node, &ended);
    assert!(matches!(
        current(&node, CONTAINERD_ID),
        Err(Error::Stopped { .. })
    ));
    node.write(&status, text)?;
    recheck(&node.roots, &ended)?;
    let upper = ended.overlay.upper.clone();
    fs::rename(&upper, node.path("upper-aside"))?;
    removed(&node, &ended);
    fs::create_dir(&upper)?;
    removed(&node, &ended);
    assert!(upper.starts_with(node.path(SNAPSHOTS)));
    Ok(())
}

fn removed(node: &Node, container: &Container) {
    let error = recheck(&node.roots, container).unwrap_err();
    assert!(matches!(error, Error::Removed { .. }), "{error}");
    assert_eq!(error.kind(), FailureKind::ContainerGone);
    assert!(
        error.to_string().contains("was removed while it was read"),
        "{error}"
    );
}

/// Adds a container of CRI-O that is a later attempt, with a layer of its own.
fn add_attempt(node: &Node, number: usize) -> Result<String, Box<dyn std::error::Error>> {
    let id = format!("{number}").repeat(64)[..64].to_owned();
    for (list, key) in [
        ("overlay-containers/volatile-containers.json", CRIO_ID),
        (
            "overlay-layers/volatile-layers.json",
            "7e8e755ff9ea5bf877fe0b2cbbf6611900ec9d58938405ae25398fcdaf3e4931",
        ),
    ] {
        let path = format!("{CRIO}/{list}");
        let mut all: Vec<serde_json::Value> = serde_json::from_slice(&fs::read(node.path(&path))?)?;
        let mut one = all
            .iter()
            .find(|one| one["id"] == key)
            .ok_or("an entry")?
            .clone();
        one["id"] = id.clone().into();
        if one["layer"].is_string() {
            one["layer"] = id.clone().into();
            let name = one["names"][0].as_str().ok_or("a name")?;
            one["names"] =
                serde_json::json!([format!("{}{number}", name.strip_suffix('0').ok_or("0")?)]);
        }
        all.push(one);
        node.write(&path, serde_json::to_vec(&all)?)?;
    }
    node.mkdir(&format!("{CRIO}/overlay/{id}/diff"))?;
    let userdata = |id: &str| format!("{CRIO}/overlay-containers/{id}/userdata");
    let spec = fs::read(node.path(&format!("{}/config.json", userdata(CRIO_ID))))?;
    node.write(&format!("{}/config.json", userdata(&id)), spec)?;
    Ok(id)
}

/// As kubectl says it: the current container of a pod is the last one, whether or not it runs.
#[test]
fn an_earlier_attempt_of_crio_is_meant_only_if_it_is_asked_for() -> Outcome {
    let Some(node) = crio_node() else {
        return Ok(());
    };
    let previous = |name: &str| find_any(&node.roots, name, Attempt::Previous);
    let name = "hub/notebook-alice/notebook";
    let second = add_attempt(&node, 2)?;
    let third = add_attempt(&node, 3)?;
    // The recording's own container runs. (Real ones have the highest number then.)
    let running = current(&node, name)?;
    assert!(running.running().is_some());
    assert_eq!(previous(name)?.id, third);
    assert_eq!(current(&node, &second[..12])?.id, second);
    assert!(current(&node, &second)?.ended().is_some());
    assert_eq!(current(&node, &CRIO_ID[..12])?.id, CRIO_ID);
    assert!(matches!(previous(&second), Err(Error::BadName { .. })));

    fs::remove_file(node.path(&format!(
        "run/crio-1.36/overlay-containers/{CRIO_ID}/userdata/pidfile"
    )))?;
    assert_eq!(current(&node, name)?.id, third);
    assert_eq!(previous(name)?.id, second);
    let state = format!("{CRIO}/overlay-containers/{CRIO_ID}/userdata/state.json");
    let mut text: serde_json::Value = serde_json::from_slice(&fs::read(node.path(&state))?)?;
    text["finished"] = "2026-11-23T23:00:00.5Z".into();
    text["exitCode"] = 1.into();
    node.write(&state, text.to_string())?;
    let ended = current(&node, CRIO_ID)?;
    assert_eq!(end(&ended), "exit code 1, at 2026-11-23T23:00:00Z");
    assert_eq!(
        (ended.runtime, ended.runtime_root_mode),
        (Runtime::Crio, Some(0o555))
    );
    assert_eq!(ended.overlay, running.overlay);
    prove_base(&node.roots, &ended)?;
    assert_eq!(
        list_ended(&node.roots, true, usize::MAX).containers.len(),
        3
    );
    Ok(())
}

#[test]
fn a_docker_container_is_found_by_its_configuration() -> Outcome {
    let (node, image) = docker_node()?;
    let running = current(&node, "lab")?;
    let directory = format!("{DOCKER}/containers/{DOCKER_ID}");
    let config = format!("{directory}/config.v2.json");
    let text = fs::read_to_string(node.path(&config))?;
    let state =
        r#""Pid":0,"ExitCode":137,"OOMKilled":true,"FinishedAt":"2026-11-03T04:05:06.789Z""#;
    let mounts = r#""MountPoints":{"/var/run/data":{"Type":"volume","Source":"/v"}},"ID""#;
    let text = text
        .replace(r#""Pid":77"#, state)
        .replace(r#""ID""#, mounts);
    node.write(&config, &text)?;
    node.write(
        &format!("{directory}/hostconfig.json"),
        r#"{"Tmpfs":{"/scratch":""},"Mounts":[{"Target":"/memory","Type":"tmpfs"}]}"#,
    )?;
    // The mount point is where the image's link leads.
    let lower = node.path(&format!("{DOCKER}/overlay2/aa/diff"));
    fs::create_dir(lower.join("var"))?;
    symlink("../run", lower.join("var/run"))?;
    let ended = current(&node, "lab")?;
    assert_eq!(
        end(&ended),
        "exit code 137, out of memory, at 2026-11-03T04:05:06Z"
    );
    assert_eq!(ended.overlay, running.overlay);
    let volumes: Vec<&Path> = ended
        .mounts
        .iter()
        .filter(|mount| mount.volume)
        .map(|mount| mount.destination.as_path())
        .collect();
    assert_eq!(volumes, [Path::new("/run/data")]);
    let at = mounted(&ended);
    for expected in [
        "/scratch",
        "/memory",
        "/proc",
        "/dev",
        "/etc/hosts",
        "/var/run/data",
    ] {
        assert!(at.contains(&expected), "{expected}: {at:?}");
    }
    assert!(!at.contains(&"/sbin/docker-init"));
    assert_eq!(Digest::of(&prove_base(&node.roots, &ended)?.config), image);
    // What --init leaves.
    let upper = ended.overlay.upper.clone();
    fs::create_dir(upper.join("sbin"))?;
    fs::write(upper.join("sbin/docker-init"), "")?;
    assert!(mounted(&current(&node, "lab")?).contains(&"/sbin/docker-init"));
    // Of the container itself.
    fs::write(upper.join("sbin/docker-init"), "own")?;
    assert!(!mounted(&current(&node, "lab")?).contains(&"/sbin/docker-init"));

    recheck(&node.roots, &ended)?;
    node.write(&config, text.replace("04:05:06", "04:05:07"))?;
    assert!(matches!(
        recheck(&node.roots, &ended),
        Err(Error::StartedAgain { .. })
    ));
    node.write(
        &config,
        text.replace(r#""Pid":0"#, r#""Pid":0,"Dead":true"#),
    )?;
    removed(&node, &ended);
    node.write(&config, &text)?;

    // A link in the place of a directory is not followed.
    fs::rename(&upper, node.path("aside"))?;
    symlink(node.path("aside"), &upper)?;
    let error = current(&node, "lab").unwrap_err();
    assert!(matches!(error, Error::ForeignRoot { .. }), "{error}");
    Ok(())
}

/// After a crash of the engine and a restart of the machine, the recorded number is that of some other process.
#[test]
fn a_number_of_another_process_does_not_make_a_container_run() -> Outcome {
    let (node, _) = docker_node()?;
    let hostconfig = format!("{DOCKER}/containers/{DOCKER_ID}/hostconfig.json");
    node.write(&hostconfig, "{}")?;
    let other = b"1 0 0:1 / / rw - ext4 /dev/sda rw\n";
    node.process(77, 900, other, IDENTITY)?;
    node.write("proc/77/cgroup", "0::/system.slice/ssh.service\n")?;
    let ended = current(&node, "lab")?;
    assert_eq!(end(&ended), "its process 77 is no longer there");
    assert_eq!(list(&node.roots).problems, []);
    recheck(&node.roots, &ended)?;
    // In the container's own cgroup, it is the container, whatever it has made its root.
    node.write("proc/77/cgroup", format!("0::/docker/{DOCKER_ID}\n"))?;
    let error = current(&node, "lab").unwrap_err();
    assert!(matches!(error, Error::NotOverlay { .. }), "{error}");
    assert!(matches!(
        recheck(&node.roots, &ended),
        Err(Error::StartedAgain { .. })
    ));
    Ok(())
}

#[test]
fn the_ids_of_a_remapped_docker_store_are_those_of_its_user() -> Outcome {
    let (node, _) = docker_node()?;
    let directory = format!("{DOCKER}/containers/{DOCKER_ID}");
    let config = format!("{directory}/config.v2.json");
    let text = fs::read_to_string(node.path(&config))?;
    node.write(&config, text.replace(r#""Pid":77"#, r#""Pid":0"#))?;
    let (root, aside) = (node.path(DOCKER), node.path("aside"));
    fs::rename(&root, &aside)?;
    fs::create_dir(&root)?;
    fs::rename(&aside, root.join("100000.100000"))?;
    let hostconfig = root.join(format!(
        "100000.100000/containers/{DOCKER_ID}/hostconfig.json"
    ));
    fs::write(&hostconfig, "{}")?;
    node.write("etc/subuid", "ada:200000:65536\ndockremap:100000:5000\n")?;
    let map = |count| IdMapping {
        inside: 0,
        outside: 100_000,
        count,
    };
    let ended = current(&node, DOCKER_ID)?;
    assert_eq!(end(&ended), "never started");
    assert_eq!(ended.uid_map, [map(5000)]);
    assert_eq!(ended.gid_map, [map(65_536)]);
    fs::write(&hostconfig, r#"{"UsernsMode":"host"}"#)?;
    let error = current(&node, DOCKER_ID).unwrap_err();
    assert_eq!(
        (error.code(), error.kind()),
        ("owners_unknown", FailureKind::Final)
    );
    // Without its settings, nothing is known of its owners.
    fs::remove_file(&hostconfig)?;
    assert!(matches!(
        current(&node, DOCKER_ID),
        Err(Error::OwnersUnknown { .. })
    ));
    Ok(())
}

/// A container of Podman with IDs of its own, over a layer that is mounted ID-mapped and one that was copied.
#[test]
fn podmans_layers_say_whose_ids_they_have() -> Outcome {
    let mut node = Node::empty()?;
    node.roots.storage = upperdeck::node::container::Roots::default().storage;
    let root = "var/lib/containers/storage";
    let id = "8d02c7ad2323c50cfb5e9f02231b42cb60b83602e51f34ee949009b6327b5aac";
    let ids = r#"[{"container_id":0,"host_id":100000,"size":65536}]"#;
    let layers = format!(
        r#"[{{"id":"aa"}},{{"id":"bb","parent":"aa","uidmap":{ids},"gidmap":{ids}}},
            {{"id":"cc","parent":"bb","uidmap":{ids},"gidmap":{ids}}}]"#
    );
    node.write(&format!("{root}/overlay-layers/layers.json"), &layers)?;
    node.write(
        &format!("{root}/overlay-containers/containers.json"),
        format!(r#"[{{"id":"{id}","names":["lab"],"layer":"cc"}}]"#),
    )?;
    let spec = |namespaces: &str| {
        let map = r#"[{"containerID":0,"hostID":100000,"size":65536}]"#;
        format!(
            r#"{{"mounts":[{{"destination":"/vol","type":"bind","source":"/srv"}}],
                "linux":{{"namespaces":[{namespaces}],"uidMappings":{map},"gidMappings":{map}}}}}"#
        )
    };
    let config = format!("{root}/overlay-containers/{id}/userdata/config.json");
    node.write(&config, spec(r#"{"type":"user"},{"type":"mount"}"#))?;
    let diff = |layer: &str| node.path(&format!("{root}/overlay/{layer}/diff"));
    for layer in ["aa", "bb", "cc"] {
        fs::create_dir_all(diff(layer))?;
    }
    let lab = || current(&node, "lab");
    let found = lab()?;
    assert_eq!(found.uid_map[0].outside, 100_000);
    assert_eq!(found.overlay.upper, diff("cc"));
    assert_eq!(found.overlay.lowers, [diff("bb"), diff("aa")]);
    assert_eq!(found.overlay.id_mapped, [diff("aa")]);
    assert_eq!(mounted(&found), ["/vol"]);
    // Without a user namespace, the map in the spec has no meaning.
    node.write(&config, spec(r#"{"type":"mount"}"#))?;
    assert_eq!(
        (lab()?.uid_map, lab()?.overlay.id_mapped),
        (vec![], Vec::<PathBuf>::new())
    );
    // The namespace of another container.
    node.write(
        &config,
        r#"{"linux":{"namespaces":[{"type":"user","path":"/proc/1/ns/user"}]}}"#,
    )?;
    assert!(matches!(lab(), Err(Error::OwnersUnknown { .. })));
    // Never started: of the owners of its layer.
    fs::remove_file(node.path(&config))?;
    assert_eq!(lab()?.uid_map, found.uid_map);

    let store = format!("{root}/overlay/.has-mount-program");
    node.write(&store, "true")?;
    let error = lab().unwrap_err();
    assert!(matches!(error, Error::Stopped { .. }), "{error}");
    assert!(error.to_string().contains("mount_program"), "{error}");
    node.write(&store, "false")?;
    let found = lab()?;
    // containers/storage marks a layer before it removes anything of it.
    let marked = layers.replace(r#""id":"cc","#, r#""id":"cc","flags":{"incomplete":true},"#);
    node.write(&format!("{root}/overlay-layers/layers.json"), marked)?;
    removed(&node, &found);
    // A layer of another store.
    let foreign = layers.replace(r#""parent":"aa","#, r#""parent":"zz","#);
    node.write(&format!("{root}/overlay-layers/layers.json"), foreign)?;
    assert!(matches!(lab(), Err(Error::Stopped { .. })));
    Ok(())
}
