//! Lower directories that are mounts of their own, read in mount namespaces with and without these mounts.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::host::image::{Base, Format, base};
use crate::host::podman::Podman;
use crate::host::process::{Mount, Process, layer_digests, mount_over};
use crate::host::registry::Registry;
use crate::host::{Roots, Scratch, command, output, run};
use crate::save::{
    LEFT_OUT, TOUCHED_BY_RUNTIMES, TREE, WORK, failed, same_tree_by, save, set_attributes,
    unpack_layout, upperdeck,
};
use crate::support::{Need, ignored};

/// Returns `command` in its own mount namespace, after a script whose first argument is `argument`.
fn apart(command_line: &Command, script: &str, argument: &Path) -> Command {
    apart_in(&[], command_line, script, argument)
}

/// Like [`apart`], in more namespaces of its own, each an option of `unshare`.
fn apart_in(namespaces: &[&str], command_line: &Command, script: &str, argument: &Path) -> Command {
    let script = format!("set -e; at=$1; shift; {script}; exec \"$@\"");
    let mut apart = command("unshare", ["--mount", "--propagation", "private"]);
    apart
        .args(namespaces)
        .args(["bash", "-c", &script, "apart"])
        .arg(argument)
        .arg(command_line.get_program())
        .args(command_line.get_args());
    for (name, value) in command_line.get_envs() {
        match value {
            Some(value) => apart.env(name, value),
            None => apart.env_remove(name),
        };
    }
    apart
}

fn commit(roots: &Roots, options: &[&str], container: &str, destination: &Path) -> Command {
    let mut commit = upperdeck("commit", roots);
    commit
        .args(["--progress", "none", "--state-dir", ""])
        .args(options)
        .arg(container)
        .arg(format!("oci:{}:saved", destination.display()));
    commit
}

/// Checks that the save is refused with the name of the missing mount, and that nothing is written.
fn missing(commit: &mut Command, mount: &Path, destination: &Path) -> Result<()> {
    let said = failed(&output(commit)?, 69)?;
    ensure!(
        said.contains(&format!("in the mount {} (", mount.display())),
        "{said}"
    );
    ensure!(!destination.exists(), "{}", destination.display());
    Ok(())
}

#[test]
fn lowers_that_are_mounts_are_read_where_they_are_mounted_only() -> Result<()> {
    let programs = [
        "buildah", "skopeo", "umoci", "busybox", "python3", "setfattr", "setfacl", "unshare",
        "nsenter", "tar",
    ];
    let mut needs = programs.map(Need::Program).to_vec();
    needs.push(Need::Root);
    if ignored(&needs) {
        return Ok(());
    }
    let scratch = Scratch::new()?;
    let mount = Mount {
        mounted: true,
        ..Mount::default()
    };
    let process = Process::start(&scratch, &mount)?;
    process.shell(WORK)?;
    set_attributes(process.pid, true)?;
    let roots = Roots::none(&scratch);
    let container = format!("pid:{}", process.pid);
    let based = ["--base", process.base.as_str()];
    let lower = scratch.path().join("process/l/1");

    let refused = scratch.path().join("refused");
    let plain = commit(&roots, &based, &container, &refused);
    missing(
        &mut apart(&plain, "umount -l \"$at\"", &lower),
        &lower,
        &refused,
    )?;
    for verb in ["inspect", "diff"] {
        let mut look = upperdeck(verb, &roots);
        look.arg(&container);
        failed(&output(&mut apart(&look, "umount -l \"$at\"", &lower))?, 69)?;
    }

    // The node's root as seen by a pod without the node's mounts, and by one with them.
    let host = scratch.dir("host")?;
    let flag = host.display().to_string();
    let below = [&["--host-root", flag.as_str()], &based[..]].concat();
    let through = |destination: &Path| commit(&roots, &below, &container, destination);
    missing(
        &mut apart(
            &through(&refused),
            "mount --bind / \"$at\"; mount --bind /proc \"$at/proc\"",
            &host,
        ),
        &scratch.path().join("process/l/2"),
        &refused,
    )?;
    let by_host = scratch.path().join("by-host");
    run(&mut apart(
        &through(&by_host),
        "mount --rbind / \"$at\"",
        &host,
    ))?;

    // As in a pod without `hostPID`: the numbers of processes are others, and cgroups list none of the container's.
    let private = scratch.path().join("private");
    let namespaces = ["--pid", "--fork", "--cgroup"];
    let save_apart = |arguments: &[&str]| {
        let mut program = through(&private);
        program.args(arguments);
        output(&mut apart_in(
            &namespaces,
            &program,
            "mount --rbind / \"$at\"",
            &host,
        ))
    };
    let mut said = save_apart(&[])?;
    // Frozen by the node's hierarchy if one lists the process below its root; else that is said, and nothing is saved.
    if !said.status.success() {
        let refusal = String::from_utf8_lossy(&said.stderr).into_owned();
        ensure!(
            refusal.contains("cannot be frozen") && !private.join("index.json").exists(),
            "{refusal}"
        );
        said = save_apart(&["--pause=none"])?;
    }
    ensure!(
        said.status.success(),
        "{}",
        String::from_utf8_lossy(&said.stderr)
    );

    let here = scratch.path().join("here");
    save(
        &scratch,
        &roots,
        &container,
        &format!("oci:{}:saved", here.display()),
        &based,
    )?;
    for layout in [by_host, private, here] {
        let rootfs = unpack_layout(&layout, "saved")?;
        let mut compare = process.enter(false);
        compare.args(["python3", TREE]);
        let except: Vec<&str> = LEFT_OUT.iter().chain(&["dev"]).copied().collect();
        same_tree_by(
            compare,
            &process.merged,
            &rootfs,
            &except,
            TOUCHED_BY_RUNTIMES,
            60,
        )?;
        ensure!(!rootfs.join("usr/lib/app/plugins/p2").exists());
        ensure!(!rootfs.join("srv/share").exists());
    }
    Ok(())
}

/// A cgroup that is removed with those below it when this is dropped.
struct Made(PathBuf);

impl Drop for Made {
    fn drop(&mut self) {
        let below = || walkdir::WalkDir::new(&self.0).contents_first(true);
        // The last process was reaped, but leaves its cgroup a moment later.
        for _ in 0..100 {
            for entry in below().into_iter().flatten() {
                if entry.file_type().is_dir() {
                    let _ = fs::remove_dir(entry.path());
                }
            }
            if !self.0.exists() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// As an agent's pod on a node with cgroup v2 alone: the root of its cgroup namespace is below a cgroup that its container
/// and the session's have in common, and the node's hierarchy is mounted below `--host-root`.
#[test]
fn a_cgroup_namespace_of_its_own_hides_no_container() -> Result<()> {
    let programs = [
        "buildah", "skopeo", "busybox", "python3", "unshare", "nsenter",
    ];
    let mut needs = programs.map(Need::Program).to_vec();
    needs.push(Need::Root);
    if ignored(&needs) {
        return Ok(());
    }
    let scratch = Scratch::new()?;
    let (top, mount) = [
        ("/sys/fs/cgroup/freezer", "cgroup -o freezer"),
        ("/sys/fs/cgroup/unified", "cgroup2"),
        ("/sys/fs/cgroup", "cgroup2"),
    ]
    .into_iter()
    .find(|(top, _)| Path::new(top).join("cgroup.procs").exists())
    .context("a hierarchy of cgroups with a freezer")?;
    let name = scratch.path().file_name().context("a name")?;
    let common = Path::new(top).join(name);
    let (session, agent) = (
        common.join("session/container"),
        common.join("agent/container"),
    );
    for dir in [&session, &agent] {
        fs::create_dir_all(dir)?;
    }
    let _made = Made(common.clone());
    let process = Process::start(&scratch, &Mount::default())?;
    process.shell("echo changed > /etc/changed")?;
    let enter = |dir: &Path, pid: u32| fs::write(dir.join("cgroup.procs"), pid.to_string());
    enter(&session, process.pid.cast_unsigned())?;

    let roots = Roots::none(&scratch);
    let host = scratch.dir("host")?;
    let flag = host.display().to_string();
    let container = format!("pid:{}", process.pid);
    let options = [
        "--host-root",
        flag.as_str(),
        "--base",
        process.base.as_str(),
    ];
    let private = scratch.path().join("private");
    let save = apart_in(
        &["--cgroup"],
        &commit(&roots, &options, &container, &private),
        &format!(
            "mount --rbind / \"$at\"; mount -t tmpfs none /sys/fs/cgroup; mkdir -p {top}; mount -t {mount} none {top}"
        ),
        &host,
    );
    // A cgroup namespace begins where its first process is.
    let script = "set -e; echo $$ > \"$1/cgroup.procs\"; shift; exec \"$@\"";
    let mut inside = command("bash", ["-c", script, "inside"]);
    inside
        .arg(&agent)
        .arg(save.get_program())
        .args(save.get_args());
    for (name, value) in save.get_envs() {
        if let Some(value) = value {
            inside.env(name, value);
        }
    }
    run(&mut inside)?;

    let here = scratch.path().join("here");
    run(&mut commit(&roots, &options[2..], &container, &here))?;
    ensure!(layer_digests(&private)? == layer_digests(&here)?);
    Ok(())
}

/// The same with a runtime's record.
#[test]
fn a_layer_of_podman_that_is_not_mounted_here_is_refused() -> Result<()> {
    let programs = [
        "podman",
        "conmon",
        "runc",
        "buildah",
        "skopeo",
        "docker-registry",
        "umoci",
        "unshare",
    ];
    let mut needs = programs.map(Need::Program).to_vec();
    needs.push(Need::Root);
    if ignored(&needs) {
        return Ok(());
    }
    let scratch = Scratch::new()?;
    let registry = Registry::start(&scratch)?;
    let image = registry.push(&base(Base::Small, Format::Oci)?, "bases/notebook:1")?;
    let podman = Podman::new(&scratch)?;
    let roots = podman.roots(&scratch);
    // A first run creates the layers.
    let first = podman.run("first", &image, &[], &["/bin/sleep", "100000"])?;
    let format = "{{.GraphDriver.Data.LowerDir}}";
    let lowers = podman.podman(["inspect", "--format", format, &first.id])?;
    let lower = Path::new(lowers.split(':').next().unwrap_or_default());
    ensure!(lower.starts_with(scratch.path()), "{lowers}");
    mount_over(lower)?;
    let container = podman.run("second", &image, &[], &["/bin/sleep", "100000"])?;
    podman.shell(
        &container,
        "rm -rf /opt/new /srv/share; echo new > /root/new",
    )?;

    let refused = scratch.path().join("refused");
    let plain = commit(&roots, &[], &container.id, &refused);
    missing(
        &mut apart(&plain, "umount -l \"$at\"", lower),
        lower,
        &refused,
    )?;
    let saved = scratch.path().join("saved");
    run(&mut commit(&roots, &[], &container.id, &saved))?;
    let rootfs = unpack_layout(&saved, "saved")?;
    ensure!(rootfs.join("root/new").exists() && !rootfs.join("srv/share").exists());
    Ok(())
}
