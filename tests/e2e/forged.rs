//! A tenant's first process makes a root of its own that looks like the runtime's and contains the host's `/etc`. It is
//! refused on every runtime and through the service, and nothing of it is read.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::host::containerd::{Containerd, PodOptions};
use crate::host::docker::Docker;
use crate::host::image::{Base, Format, base};
use crate::host::podman::Podman;
use crate::host::redis::Redis;
use crate::host::registry::Registry;
use crate::host::service::Service;
use crate::host::{Roots, Scratch, command, output, run, wait_until};
use crate::lab::Lab;
use crate::save::{failed, refuse, save, upperdeck};
use crate::support::{Need, ignored};

const SOURCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/e2e/forge.c");
/// Path of the program in the containers.
const INSIDE: &str = "/srv/forge";

/// The tenant's attempts: nested user namespaces, the additional lower, a file, and the target of its redirect.
const TRIES: [[&str; 4]; 4] = [
    ["1", "::/etc", "/notes.txt", "/shadow"],
    ["2", "::/etc", "/notes.txt", "/shadow"],
    // A directory of the tenant's in place of a lower.
    ["1", "/etc:", "/notes.txt", "/shadow"],
    // The names in the record and nothing else: only the file system is a different one.
    ["1", "", "/notes.txt", "/etc/shadow"],
];

fn needs(programs: &[&'static str]) -> bool {
    let mut needs: Vec<Need<'_>> = programs.iter().map(|name| Need::Program(name)).collect();
    needs.extend(["cc", "buildah", "skopeo", "docker-registry"].map(Need::Program));
    needs.push(Need::Root);
    !ignored(&needs)
}

/// Compiles the tenant's program.
fn program(scratch: &Scratch) -> Result<PathBuf> {
    let program = scratch.path().join("forge");
    run(command("cc", ["-O2", "-static", "-o"])
        .arg(&program)
        .arg(SOURCE))?;
    Ok(program)
}

fn is_root_of(pid: i32, file: &str) -> bool {
    Path::new(&format!("/proc/{pid}/root{file}")).exists()
}

/// Saves while the root is genuine, lets the program forge it, and checks that every verb refuses it.
fn honest_then_forged(scratch: &Scratch, roots: &Roots, id: &str, pid: i32) -> Result<()> {
    let layout = |name: &str| format!("oci:{}:saved", scratch.path().join(name).display());
    let state = ["--state-dir", ""];
    save(
        scratch,
        roots,
        id,
        &layout(&format!("honest-{pid}")),
        &state,
    )
    .context("before it has done anything")?;
    fs::write(format!("/proc/{pid}/root/go"), "")?;
    wait_until("the root is forged", || is_root_of(pid, "/forged"))?;
    let destination = format!("forged-{pid}");
    let said = refuse(roots, id, &layout(&destination), &state, 69)?;
    ensure!(
        said.contains("in no mount table but the container's own"),
        "{said}"
    );
    ensure!(!scratch.path().join(&destination).exists(), "{destination}");
    for verb in ["inspect", "diff"] {
        failed(&output(upperdeck(verb, roots).arg(id))?, 69)?;
    }
    let listed = run(upperdeck("ps", roots).args(["--format", "json"]))?;
    ensure!(!listed.contains(id), "{listed}");
    Ok(())
}

#[test]
fn a_forged_root_is_refused_on_podman() -> Result<()> {
    if !needs(&["podman", "conmon", "runc"]) {
        return Ok(());
    }
    let scratch = Scratch::new()?;
    let registry = Registry::start(&scratch)?;
    let image = registry.push(&base(Base::Small, Format::Oci)?, "bases/notebook:1")?;
    let volume = format!("{}:{INSIDE}:ro", program(&scratch)?.display());
    let podman = Podman::new(&scratch)?;
    for (at, words) in TRIES.iter().enumerate() {
        let options = ["-v", &volume, "--entrypoint", INSIDE];
        let name = format!("tenant-{at}");
        let container = podman.run(&name, &image, &options, words)?;
        honest_then_forged(
            &scratch,
            &podman.roots(&scratch),
            &container.id,
            container.pid,
        )
        .with_context(|| format!("{words:?}"))?;
    }
    Ok(())
}

/// Docker's default seccomp profile allows user namespaces only with CAP_SYS_ADMIN; many installations disable it.
#[test]
fn a_forged_root_is_refused_on_docker() -> Result<()> {
    if !needs(&["dockerd", "docker", "runc"]) {
        return Ok(());
    }
    let scratch = Scratch::new()?;
    let registry = Registry::start(&scratch)?;
    let image = registry.push(&base(Base::Small, Format::Docker)?, "bases/notebook:1")?;
    let volume = format!("{}:{INSIDE}:ro", program(&scratch)?.display());
    let docker = Docker::start(&scratch)?;
    for (at, words) in TRIES.iter().enumerate() {
        let options = [
            "-v",
            &volume,
            "--entrypoint",
            INSIDE,
            "--security-opt",
            "seccomp=unconfined",
        ];
        let name = format!("tenant-{at}");
        let container = docker.run(&name, &image, &options, words)?;
        honest_then_forged(
            &scratch,
            &docker.roots(&scratch),
            &container.id,
            container.pid,
        )
        .with_context(|| format!("{words:?}"))?;
    }
    Ok(())
}

fn pod(lab: &Lab, program: &Path, words: &[&str]) -> Result<crate::host::containerd::Pod> {
    let mut command = vec![INSIDE];
    command.extend(words);
    let options = PodOptions {
        command: &command,
        environment: &[("JUPYTERHUB_USER", "mallory")],
        mounts: &[(program, INSIDE, true)],
        ..PodOptions::default()
    };
    lab.containerd.run_pod(&lab.image, &options)
}

/// A container made by `ctr run -d`.
fn by_ctr(
    containerd: &Containerd,
    image: &str,
    id: &str,
    program: &Path,
    words: &[&str],
) -> Result<i32> {
    let mount = format!(
        "type=bind,src={},dst={INSIDE},options=rbind:ro",
        program.display()
    );
    let run = [
        "run",
        "-d",
        "--net-host",
        "--mount",
        &mount,
        image,
        id,
        INSIDE,
    ];
    containerd.ctr(run.iter().chain(words).copied())?;
    let bundle = containerd
        .state
        .join("io.containerd.runtime.v2.task/k8s.io")
        .join(id);
    Ok(fs::read_to_string(bundle.join("init.pid"))?
        .trim()
        .parse()?)
}

#[test]
fn a_forged_root_is_refused_on_containerd() -> Result<()> {
    if !needs(&["containerd", "runc"]) {
        return Ok(());
    }
    let Some(lab) = Lab::new(Base::Small, Format::Oci)? else {
        return Ok(());
    };
    let program = program(&lab.scratch)?;
    for (at, words) in TRIES.iter().enumerate() {
        let pod = pod(&lab, &program, words)?;
        honest_then_forged(&lab.scratch, &lab.roots, &pod.container, pod.pid)
            .with_context(|| format!("CRI, {words:?}"))?;
        let id = format!("tenant-{at}");
        let pid = by_ctr(&lab.containerd, &lab.image, &id, &program, words)?;
        honest_then_forged(&lab.scratch, &lab.roots, &id, pid)
            .with_context(|| format!("ctr, {words:?}"))?;
    }
    Ok(())
}

/// A session known to the manager forges its root before its save: the save fails for good, and nothing is in the
/// registry.
#[test]
fn a_forged_root_is_refused_by_the_agent() -> Result<()> {
    if !needs(&["containerd", "runc", "redis-server", "redis-cli"]) {
        return Ok(());
    }
    let Some(lab) = Lab::new(Base::Small, Format::Oci)? else {
        return Ok(());
    };
    let program = program(&lab.scratch)?;
    let redis = Redis::start(&lab.scratch)?;
    let service = Service::start(&lab.scratch, &lab.roots, &redis, &lab.registry, &[])?;
    let pod = pod(&lab, &program, &TRIES[0])?;
    service.wait_for_sessions(1)?;
    let submit = |tag: &str| {
        let words = ["job", "submit", "--watch", &pod.container, tag];
        service.output(Some("mallory"), &words)
    };
    let honest = submit("mine:honest")?;
    ensure!(
        honest.status.success(),
        "{}",
        String::from_utf8_lossy(&honest.stderr)
    );
    fs::write(format!("/proc/{}/root/go", pod.pid), "")?;
    wait_until("the root is forged", || is_root_of(pod.pid, "/forged"))?;
    let forged = submit("mine:forged")?;
    let said = String::from_utf8_lossy(&forged.stderr).into_owned();
    ensure!(!forged.status.success(), "saved: {said}");
    ensure!(
        said.contains("in no mount table but the container's own"),
        "{said}"
    );
    let reference = lab.registry.reference("sessions/mallory/mine:forged");
    let found = output(&mut command(
        "skopeo",
        [
            "inspect",
            "--tls-verify=false",
            &format!("docker://{reference}"),
        ],
    ))?;
    ensure!(!found.status.success(), "{reference} is in the registry");
    Ok(())
}
