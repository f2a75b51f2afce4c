//! Containers that have ended are saved: killed, out of memory, ended by themselves, with their engine stopped or killed,
//! and after a restart of the machine, of which nothing is mounted and `/run` is empty.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::host::docker::Docker;
use crate::host::image::{Base, Format};
use crate::host::podman::{BACKGROUND, Podman};
use crate::host::registry::Registry;
use crate::host::{Roots, Scratch, command, output, run, unmount_below, wait_until};
use crate::lab::{Lab, engine};
use crate::save::{
    LEFT_OUT, TOUCHED_BY_RUNTIMES, WORK, layers, manifest, same_tree, save, set_attributes, unpack,
    upperdeck,
};

/// What a container has done before it ends.
const OWN_WORK: &str = "mkdir -p /home/researcher/work; echo last > /home/researcher/work/words; rm /usr/lib/app/dangling; \
    echo changed >> /usr/lib/app/main";
/// The same, and then more memory than it has.
const TOO_MUCH: &str = "x=0123456789; while :; do x=$x$x; done";

/// The steps that are the same for all runtimes.
struct Steps<'a> {
    scratch: &'a Scratch,
    registry: &'a Registry,
    roots: Roots,
    /// What differs for this runtime in any case.
    except: &'static [&'static str],
    saved: u32,
}

impl Steps<'_> {
    /// Keeps what a container sees, to compare it with what is saved when it is gone.
    fn seen(&self, rootfs: &Path, name: &str) -> Result<PathBuf> {
        let copy = self.scratch.path().join(format!("seen-{name}"));
        run(command("cp", ["-a"]).args([rootfs, &copy]))?;
        Ok(copy)
    }

    /// Saves everything, and returns the layers above the base.
    fn save(&mut self, name: &str, options: &[&str]) -> Result<(String, Vec<String>)> {
        self.saved += 1;
        let destination = self
            .registry
            .reference(&format!("users/ada:{}", self.saved));
        let saved = save(self.scratch, &self.roots, name, &destination, options)?;
        let all = layers(&manifest(&saved.reference)?);
        let own = all.into_iter().skip(3).map(|(_, digest)| digest).collect();
        Ok((saved.reference, own))
    }

    /// Saves a container that has ended. The image has what the container last saw and, if it was saved while it ran
    /// idly, the same layer.
    fn check(&mut self, name: &str, seen: &Path, live: Option<&[String]>) -> Result<()> {
        let (reference, own) = self.save(name, &["--full"])?;
        if let Some(live) = live {
            assert_eq!(own, live, "{name}");
            let (_, again) = self.save(name, &[])?;
            assert_eq!(
                again, live,
                "{name}: the state of the last save is not used"
            );
        }
        self.same_as_seen(seen, &reference)
    }

    fn same_as_seen(&self, seen: &Path, reference: &str) -> Result<()> {
        let rootfs = unpack(self.scratch, reference)?;
        let except = [LEFT_OUT, self.except].concat();
        same_tree(seen, &rootfs, &except, TOUCHED_BY_RUNTIMES, 50)?;
        ensure!(!rootfs.join("data/in-the-volume").exists());
        Ok(())
    }

    /// Returns the entry of `ps --all`.
    fn listed(&self, name: &str) -> Result<Value> {
        let mut ps = upperdeck("ps", &self.roots);
        let listed: Vec<Value> =
            serde_json::from_str(&run(ps.args(["--all", "--format", "json"]))?)?;
        let named = |view: &Value| {
            view["id"] == name
                || view["names"]
                    .as_array()
                    .is_some_and(|names| names.iter().any(|n| n == name))
        };
        listed
            .into_iter()
            .find(named)
            .with_context(|| format!("{name} is not listed"))
    }

    /// Removes a container while it is saved: the image is right, or there is none.
    fn removed_meanwhile(
        &mut self,
        name: &str,
        seen: &Path,
        wait: u64,
        remove: &dyn Fn() -> Result<()>,
    ) -> Result<()> {
        let destination = self.registry.reference(&format!("users/removed:{name}"));
        let mut commit = upperdeck("commit", &self.roots);
        commit.args(["--quiet", "--state-dir", "", name, &destination]);
        commit
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped());
        let saving = commit.spawn()?;
        std::thread::sleep(std::time::Duration::from_millis(wait));
        remove()?;
        let done = saving.wait_with_output()?;
        let stderr = String::from_utf8_lossy(&done.stderr);
        match done.status.code() {
            Some(0) => {
                let reference = String::from_utf8(done.stdout)?.trim().to_owned();
                self.same_as_seen(seen, &reference)?;
            }
            Some(66) => {
                ensure!(
                    stderr.contains("was removed while it was read")
                        || stderr.contains("no container"),
                    "{stderr}"
                );
                ensure!(manifest(&destination).is_err(), "there is an image");
            }
            code => anyhow::bail!("exit {code:?}: {stderr}"),
        }
        Ok(())
    }
}

/// Kills the first process of a container and waits for its end.
fn kill_container(pid: i32) -> Result<()> {
    kill(Pid::from_raw(pid), Signal::SIGKILL)?;
    wait_until("the process has ended", || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let state = stat.rsplit(')').next().unwrap_or_default();
        state.is_empty() || state.trim_start().starts_with('Z')
    })?;
    Ok(())
}

/// Makes it as after a restart of the machine: nothing is mounted, and the directories of `/run` are empty.
fn restart_machine(scratch: &Scratch, volatile: &[&Path]) -> Result<()> {
    unmount_below(scratch.path());
    for directory in volatile {
        fs::remove_dir_all(directory)?;
        fs::create_dir(directory)?;
    }
    Ok(())
}

/// How an engine shows the end of a container, and how it is listed.
const END: &str = "{{.State.ExitCode}} {{.State.OOMKilled}}";

fn end_of(listed: &Value) -> String {
    let ended = &listed["ended"];
    format!("{} {}", ended["exit_code"], ended["out_of_memory"])
}

/// Keeps what a container of Podman saw that has ended.
fn seen_by_podman(podman: &Podman, steps: &Steps<'_>, name: &str) -> Result<PathBuf> {
    let merged = podman.podman(["mount", name])?;
    let seen = steps.seen(Path::new(&merged), name)?;
    podman.podman(["umount", name])?;
    Ok(seen)
}

#[test]
fn podmans_containers_are_saved_when_they_have_ended() -> Result<()> {
    let Some((scratch, registry, image)) = engine(&["podman", "conmon", "runc"], Format::Docker)?
    else {
        return Ok(());
    };
    let podman = Podman::new(&scratch)?;
    let mut steps = Steps {
        scratch: &scratch,
        registry: &registry,
        roots: podman.roots(&scratch),
        // Podman sets its own mode on a root that no layer of the base describes.
        except: &["."],
        saved: 0,
    };
    let session = podman.run("session", &image, &[], &[])?;
    podman.shell(&session, WORK)?;
    set_attributes(session.pid, true)?;
    podman.shell(&session, "echo volume > /data/in-the-volume; sync")?;
    let (_, live) = steps.save("session", &["--max-pause", "0"])?;
    let seen = steps.seen(&session.rootfs, "session")?;

    kill_container(session.pid)?;
    // Before and after Podman has noticed.
    steps.check("session", &seen, Some(&live))?;
    wait_until("Podman has noticed", || {
        let state = podman.podman(["inspect", "--format", "{{.State.Status}}", "session"]);
        state.is_ok_and(|state| state == "exited")
    })?;
    steps.check("session", &seen, Some(&live))?;
    let listed = steps.listed("session")?;
    assert_eq!(
        (&listed["pid"], &listed["ended"]["exit_code"]),
        (&Value::Null, &137.into())
    );

    // Ended by itself, and by the kernel. What it saw is mounted for a look.
    for (name, script, memory) in [
        ("itself", OWN_WORK.to_owned(), "1g"),
        ("memory", format!("{OWN_WORK}; {TOO_MUCH}"), "20m"),
    ] {
        let own = [
            "--memory", memory, "--name", name, &image, "sh", "-c", &script,
        ];
        podman.podman([&BACKGROUND[..], &own].concat())?;
        podman.podman(["wait", name])?;
        let seen = seen_by_podman(&podman, &steps, name)?;
        steps.check(name, &seen, None)?;
        let listed = steps.listed(name)?;
        assert_eq!(
            end_of(&listed),
            podman.podman(["inspect", "--format", END, name])?
        );
    }

    // A container that is started again is saved as one that runs.
    podman.podman(["start", "session"])?;
    let (_, again) = steps.save("session", &["--max-pause", "0", "--full"])?;
    assert_eq!(again, live);
    podman.podman(["kill", "session"])?;
    podman.podman(["wait", "session"])?;

    restart_machine(&scratch, &[&podman.runroot])?;
    steps.check("session", &seen, Some(&live))?;

    for (round, wait) in [50, 250].into_iter().enumerate() {
        let name = format!("removed-{round}");
        let own = ["--name", &name, &image, "sh", "-c", OWN_WORK];
        podman.podman([&BACKGROUND[..], &own].concat())?;
        podman.podman(["wait", &name])?;
        let seen = seen_by_podman(&podman, &steps, &name)?;
        let remove = || podman.podman(["rm", "-f", &name]).map(drop);
        steps.removed_meanwhile(&name, &seen, wait, &remove)?;
    }
    Ok(())
}

#[test]
fn dockers_containers_are_saved_when_they_have_ended() -> Result<()> {
    let Some((scratch, registry, image)) = engine(&["dockerd", "docker", "runc"], Format::Docker)?
    else {
        return Ok(());
    };
    let mut docker = Docker::start(&scratch)?;
    let mut steps = Steps {
        scratch: &scratch,
        registry: &registry,
        roots: docker.roots(&scratch),
        // The mount points of --init and --tmpfs.
        except: &["sbin", "sbin/docker-init", "scratch"],
        saved: 0,
    };
    let session = docker.run("session", &image, &["--init", "--tmpfs", "/scratch"], &[])?;
    docker.shell(&session, WORK)?;
    set_attributes(session.pid, true)?;
    docker.shell(&session, "echo volume > /data/in-the-volume; sync")?;
    let (_, live) = steps.save("session", &["--max-pause", "0"])?;
    let seen = steps.seen(&session.rootfs, "session")?;
    let state = |docker: &Docker, name: &str| {
        docker.docker(["inspect", "--format", "{{.State.Status}}", name])
    };

    docker.docker(["kill", "session"])?;
    wait_until("Docker has noticed", || {
        state(&docker, "session").is_ok_and(|state| state == "exited")
    })?;
    steps.check("session", &seen, Some(&live))?;

    let script = format!("{OWN_WORK}; {TOO_MUCH}");
    let options = [
        "-d",
        "--network",
        "none",
        "--memory",
        "20m",
        "--memory-swap",
        "20m",
    ];
    let arguments = [
        ["run"].as_slice(),
        &options,
        &["--name", "memory", &image, "sh", "-c", &script],
    ];
    docker.docker(arguments.concat())?;
    docker.docker(["wait", "memory"])?;
    let listed = steps.listed("memory")?;
    assert_eq!(
        end_of(&listed),
        docker.docker(["inspect", "--format", END, "memory"])?
    );
    let directories = "lowerdir={{.GraphDriver.Data.UpperDir}}:{{.GraphDriver.Data.LowerDir}}";
    let directories = docker.docker(["inspect", "--format", directories, "memory"])?;
    let merged = scratch.dir("merged")?;
    run(command("mount", ["-t", "overlay", "overlay", "-o", &directories]).arg(&merged))?;
    let seen_memory = steps.seen(&merged, "memory")?;
    steps.check("memory", &seen_memory, None)?;

    // The engine and then the container are killed: the record says that it runs, and its root stays mounted.
    docker.docker(["start", "session"])?;
    let pid = docker.docker(["inspect", "--format", "{{.State.Pid}}", "session"])?;
    docker.kill()?;
    let (_, running) = steps.save("session", &["--max-pause", "0", "--full"])?;
    assert_eq!(running, live);
    kill_container(pid.parse()?)?;
    steps.check("session", &seen, Some(&live))?;

    restart_machine(&scratch, &[])?;
    steps.check("session", &seen, Some(&live))?;
    let listed = steps.listed("session")?;
    assert_eq!(listed["pid"], Value::Null, "{listed}");
    Ok(())
}

#[test]
fn containerds_containers_are_saved_when_they_have_ended() -> Result<()> {
    let Some(mut lab) = Lab::new(Base::Small, Format::Docker)? else {
        return Ok(());
    };
    let pod = lab.session()?;
    lab.containerd.shell(&pod, "sync")?;
    let ctr = lab
        .containerd
        .ctr_run(&lab.image, "by-ctr", &["sleep", "100000"])?;
    let exec = [
        "task",
        "exec",
        "--exec-id",
        "work",
        "by-ctr",
        "sh",
        "-ec",
        OWN_WORK,
    ];
    lab.containerd.ctr(exec)?;
    let name = format!("jupyter/{}", pod.name);
    let mut steps = Steps {
        scratch: &lab.scratch,
        registry: &lab.registry,
        roots: lab.roots.clone(),
        except: &[],
        saved: 0,
    };
    let (_, live) = steps.save(&name, &["--max-pause", "0"])?;
    let seen = steps.seen(&pod.rootfs, "pod")?;
    let (_, by_ctr) = steps.save("by-ctr", &["--max-pause", "0"])?;
    let seen_by_ctr = steps.seen(&lab.containerd.rootfs("by-ctr"), "ctr")?;

    kill_container(ctr)?;
    steps.check("by-ctr", &seen_by_ctr, Some(&by_ctr))?;
    lab.containerd.ctr(["task", "rm", "--force", "by-ctr"])?;
    steps.check("by-ctr", &seen_by_ctr, Some(&by_ctr))?;

    // The kubelet makes a new container in the pod: the old one is the previous one then.
    kill_container(pod.pid)?;
    let told = |steps: &Steps<'_>| {
        steps
            .listed(&pod.container)
            .map(|listed| listed["ended"]["exit_code"].clone())
    };
    wait_until("the exit code is recorded", || {
        told(&steps).is_ok_and(|code| code == 137)
    })?;
    steps.check(&name, &seen, Some(&live))?;
    lab.containerd.next_container(&pod, &lab.image)?;
    let (_, second) = steps.save(&name, &["--full"])?;
    ensure!(second != live, "the new container was not saved");
    let (_, previous) = steps.save(&name, &["--full", "--previous"])?;
    assert_eq!(previous, live);
    let mut refused = upperdeck("diff", &lab.roots);
    let refused = output(refused.args(["--previous", &pod.container]))?;
    assert_eq!(refused.status.code(), Some(2));

    lab.containerd.kill()?;
    crate::host::end_containers(lab.scratch.path());
    restart_machine(&lab.scratch, &[&lab.containerd.state])?;
    steps.check("by-ctr", &seen_by_ctr, Some(&by_ctr))?;
    steps.check(&pod.container, &seen, Some(&live))?;
    let (_, previous) = steps.save(&name, &["--full", "--previous"])?;
    assert_eq!(previous, live);
    Ok(())
}
