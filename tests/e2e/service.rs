//! Tests of the whole service through `upperdeck job`: Redis, a manager, an agent, pods on containerd and a registry.

use std::collections::BTreeMap;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::Value;

use crate::host::containerd::{Pod, PodOptions};
use crate::host::image::{Base, Format};
use crate::host::redis::Redis;
use crate::host::service::Service;
use crate::host::{Freezer, wait_at_most};
use crate::lab::Lab;
use crate::save::{LEFT_OUT, TOUCHED_BY_RUNTIMES, WORK, same_tree, set_attributes, unpack};
use crate::support::{Need, ignored, note};

/// A lab with a service on it. Fields are dropped in this order.
struct ServiceLab {
    service: Service,
    redis: Redis,
    lab: Lab,
}

impl ServiceLab {
    fn new() -> Result<Option<Self>> {
        Self::with(&[])
    }

    /// Starts a service whose agent has further flags.
    fn with(flags: &[&str]) -> Result<Option<Self>> {
        if ignored(&[Need::Program("redis-server"), Need::Program("redis-cli")]) {
            return Ok(None);
        }
        let Some(lab) = Lab::new(Base::Small, Format::Oci)? else {
            return Ok(None);
        };
        let redis = Redis::start(&lab.scratch)?;
        let service = Service::start(&lab.scratch, &lab.roots, &redis, &lab.registry, flags)?;
        Ok(Some(Self {
            service,
            redis,
            lab,
        }))
    }

    /// Starts a pod of `user`.
    fn session(&self, user: &str) -> Result<Pod> {
        let options = PodOptions {
            environment: &[("JUPYTERHUB_USER", user)],
            ..PodOptions::default()
        };
        self.lab.containerd.run_pod(&self.lab.image, &options)
    }
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

/// The record is the truth, and the queue only delivers.
#[test]
fn a_save_is_accepted_while_redis_is_down() -> Result<()> {
    let Some(mut centre) = ServiceLab::new()? else {
        return Ok(());
    };
    let pod = centre.session("alice")?;
    centre.lab.containerd.shell(&pod, WORK)?;
    centre.service.wait_for_sessions(1)?;
    centre.redis.stop()?;
    // The manager that saw the session is not the one that is asked.
    centre.service.crash_manager()?;
    let words = [
        "job",
        "submit",
        "--format",
        "json",
        &pod.container,
        "mine:dark",
    ];
    let save = centre.service.ask(Some("alice"), &words)?;
    assert_eq!(text(&save, "state"), "queued", "{save}");
    assert_eq!(save["waiting"]["reason"], "queue_down", "{save}");
    centre.redis.start_again()?;
    let watched = centre
        .service
        .output(Some("alice"), &["job", "watch", text(&save, "id")])?;
    ensure!(
        watched.status.success(),
        "{}",
        String::from_utf8_lossy(&watched.stderr)
    );
    Ok(())
}

/// A container that is killed is shown with its exit code, saved by itself, and saved by request, too.
#[test]
fn what_is_killed_is_shown_and_saved_by_itself() -> Result<()> {
    let Some(mut centre) = ServiceLab::with(&["--save-ended", "failure"])? else {
        return Ok(());
    };
    let pod = centre.session("alice")?;
    centre.lab.containerd.shell(&pod, WORK)?;
    centre.service.wait_for_sessions(1)?;
    let seen = centre.lab.scratch.path().join("seen");
    let copied = crate::host::command("cp", ["-a"])
        .args([&pod.rootfs, &seen])
        .status()?;
    ensure!(copied.success(), "{copied}");
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(pod.pid),
        nix::sys::signal::Signal::SIGKILL,
    )?;
    let mut last = Value::Null;
    crate::host::wait_until("the save by itself", || {
        last = centre
            .service
            .ask(Some("alice"), &["job", "ls", "--format", "json"])
            .unwrap_or_default();
        text(&last["saves"][0], "state") == "succeeded"
    })
    .with_context(|| format!("{last}\n{}", centre.service.log("agent")))?;
    let save = &last["saves"][0];
    ensure!(
        text(save, "tag").starts_with("ended-") && save["pause_ms"].is_null(),
        "{save}"
    );
    let rootfs = unpack(&centre.lab.scratch, text(save, "target"))?;
    same_tree(&seen, &rootfs, LEFT_OUT, TOUCHED_BY_RUNTIMES, 60)?;
    let sessions = ["job", "sessions", "--format", "json"];
    let shown = centre.service.ask(Some("alice"), &sessions)?;
    assert_eq!(shown[0]["ended"]["exit_code"], 137, "{shown}");
    assert_eq!(shown[0]["ended"]["save"], true);

    // Not once more by an agent and a manager that were started anew. The kubelet makes a new container in the pod, which
    // has no owner here.
    centre.service.crash_agent()?;
    centre.service.crash_manager()?;
    centre
        .lab
        .containerd
        .next_container(&pod, &centre.lab.image)?;
    centre.service.wait_for_sessions(2)?;
    let name = format!("jupyter/{}", pod.name);
    let words = ["job", "submit", "--watch", &name, "mine:old"];
    let done = centre.service.output(Some("alice"), &words)?;
    ensure!(
        done.status.success(),
        "{}",
        String::from_utf8_lossy(&done.stderr)
    );
    let saves = centre
        .service
        .ask(Some("alice"), &["job", "ls", "--format", "json"])?;
    assert_eq!(saves["saves"].as_array().map(Vec::len), Some(2), "{saves}");
    assert_eq!(text(&saves["saves"][0], "session"), pod.container);
    Ok(())
}

#[test]
fn twenty_users_save_their_sessions_at_once() -> Result<()> {
    let Some(centre) = ServiceLab::new()? else {
        return Ok(());
    };
    let mut sessions = Vec::new();
    for number in 0..20 {
        let user = format!("user{number}");
        let pod = centre.session(&user)?;
        centre.lab.containerd.shell(&pod, WORK)?;
        centre
            .lab
            .containerd
            .shell(&pod, &format!("echo {user} > /home/researcher/whose"))?;
        set_attributes(pod.pid, true)?;
        sessions.push((user, pod));
    }
    let service = &centre.service;
    service.wait_for_sessions(sessions.len())?;

    // Each user sees only their own session.
    let (user, pod) = &sessions[3];
    let seen = service.ask(Some(user), &["job", "sessions", "--format", "json"])?;
    assert_eq!(seen.as_array().map(Vec::len), Some(1), "{seen}");
    assert_eq!(text(&seen[0], "id"), pod.container);
    assert_eq!(text(&seen[0], "owner"), user);
    let foreign = service.output(Some(user), &["job", "submit", &sessions[4].1.container])?;
    ensure!(!foreign.status.success(), "another's session was saved");

    let mut saves = Vec::new();
    for (user, pod) in &sessions {
        let words = [
            "job",
            "submit",
            "--watch",
            "--message=my work",
            &pod.container,
            "mine:first",
        ];
        let child = service
            .shell(Some(user), &words)
            .args(["--progress", "json"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        saves.push(child);
    }
    for ((user, pod), save) in sessions.iter().zip(saves) {
        let done = save.wait_with_output()?;
        let said = String::from_utf8_lossy(&done.stdout).into_owned();
        ensure!(
            done.status.success(),
            "{user}: {}\n{said}{}\n{}",
            done.status,
            String::from_utf8_lossy(&done.stderr),
            service.log("agent")
        );
        let last: Value = serde_json::from_str(said.lines().last().context("no events")?)?;
        assert_eq!(last["event"], "saved", "{user}: {said}");
        let repository = centre
            .lab
            .registry
            .reference(&format!("sessions/{user}/mine"));
        let reference = text(&last, "reference");
        ensure!(
            reference.starts_with(&format!("{repository}@sha256:")),
            "{reference}"
        );
        let rootfs = unpack(&centre.lab.scratch, reference)?;
        same_tree(&pod.rootfs, &rootfs, LEFT_OUT, TOUCHED_BY_RUNTIMES, 60)
            .with_context(|| user.clone())?;
        std::fs::remove_dir_all(rootfs.ancestors().nth(2).context("its directory")?)?;
        ensure!(!Freezer::of(pod.pid)?.frozen(), "{user}'s pod stands still");
    }

    // List and delete one's own images.
    let images = service.ask(Some(user), &["image", "ls", "--format", "json"])?;
    assert_eq!(images["total"], 1, "{images}");
    let image = &images["images"][0];
    assert_eq!(
        (text(image, "name"), text(image, "message")),
        ("mine", "my work")
    );
    assert_eq!(text(&image["tags"][0], "name"), "first");
    let removed = service.output(Some(user), &["image", "rm", "mine:first"])?;
    ensure!(removed.status.success(), "{removed:?}");
    ensure!(
        centre
            .lab
            .registry
            .tags(&format!("sessions/{user}/mine"))
            .is_empty()
    );
    ensure!(!centre.lab.registry.tags("sessions/user4/mine").is_empty());
    Ok(())
}

/// A session under repeated saves: the last save that was requested, and the pod's content at that time, which does not
/// change before that save is done.
struct SavedSession {
    user: String,
    pod: Pod,
    serial: u32,
    open: Option<String>,
}

/// Number of kills in the suite; `UPPERDECK_KILLS` sets a higher one.
const KILLS: u32 = 12;

#[test]
fn killed_at_random_every_save_ends_in_the_right_image_or_in_a_failure_with_a_code() -> Result<()> {
    let Some(mut centre) = ServiceLab::new()? else {
        return Ok(());
    };
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let kills = number("UPPERDECK_KILLS").unwrap_or(KILLS);
    let seed = u64::from(number("UPPERDECK_TEST_SEED").unwrap_or_else(rand::random));
    note(&format!("UPPERDECK_TEST_SEED={seed}, {kills} kills"));
    let mut random = StdRng::seed_from_u64(seed);

    let mut sessions = Vec::new();
    for number in 0..4 {
        let user = format!("user{number}");
        let pod = centre.session(&user)?;
        let fill = "dd if=/dev/urandom of=/home/noise bs=1048576 count=24 2> /dev/null";
        centre.lab.containerd.shell(&pod, fill)?;
        sessions.push(SavedSession {
            user,
            pod,
            serial: 0,
            open: None,
        });
    }
    centre.service.wait_for_sessions(sessions.len())?;

    let mut ended: BTreeMap<String, u32> = BTreeMap::new();
    let mut killed: BTreeMap<&str, u32> = BTreeMap::new();
    for round in 0..kills {
        advance(&centre, &mut sessions, &mut ended)?;
        std::thread::sleep(Duration::from_millis(random.random_range(0..2500)));
        let who = [
            "manager", "agent", "child", "child", "redis", "flush", "registry",
        ][random.random_range(0..7)];
        match who {
            "manager" => centre.service.crash_manager()?,
            "agent" => centre.service.crash_agent()?,
            "redis" => centre.redis.crash()?,
            "flush" => centre.redis.flush()?,
            "registry" => centre.lab.registry.crash()?,
            _ => {
                for child in centre.service.children() {
                    // It may have exited by itself.
                    let child = nix::unistd::Pid::from_raw(child);
                    let _ = nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL);
                }
            }
        }
        *killed.entry(who).or_default() += 1;
        if round % 20 == 19 {
            note(&format!("{} kills, ended: {ended:?}", round + 1));
        }
    }
    // No more kills: all open saves come to an end.
    let start = Instant::now();
    while sessions.iter().any(|session| session.open.is_some()) {
        ensure!(
            start.elapsed() < Duration::from_secs(300),
            "not ended: {:?}\n{}\n{}",
            sessions
                .iter()
                .filter_map(|session| session.open.as_ref())
                .collect::<Vec<_>>(),
            centre.service.log("manager"),
            centre.service.log("agent")
        );
        finish(&centre, &mut sessions, &mut ended)?;
        std::thread::sleep(Duration::from_millis(200));
    }
    for session in &sessions {
        let freezer = Freezer::of(session.pod.pid)?;
        wait_at_most(Duration::from_secs(2), "the container runs", || {
            !freezer.frozen()
        })?;
    }
    let running = centre.service.ask(
        None,
        &["job", "ls", "--state", "running", "--format", "json"],
    )?;
    assert_eq!(
        running["saves"].as_array().map(Vec::len),
        Some(0),
        "{running}"
    );
    note(&format!("killed: {killed:?}; ended: {ended:?}"));
    ensure!(ended.contains_key("succeeded"), "none succeeded: {ended:?}");
    Ok(())
}

/// Checks the open saves, and requests a new one where there is none.
fn advance(
    centre: &ServiceLab,
    sessions: &mut [SavedSession],
    ended: &mut BTreeMap<String, u32>,
) -> Result<()> {
    finish(centre, sessions, ended)?;
    for session in sessions.iter_mut().filter(|session| session.open.is_none()) {
        let serial = session.serial + 1;
        let work = format!(
            "echo {serial} > /home/serial; dd if=/dev/urandom of=/home/noise bs=1048576 count=8 conv=notrunc 2> /dev/null"
        );
        centre.lab.containerd.shell(&session.pod, &work)?;
        session.serial = serial;
        let image = format!("mine:s{serial}");
        let key = format!("{}-{serial}", session.user);
        let words = [
            "job",
            "submit",
            "--format",
            "json",
            "--full",
            "--idempotency-key",
            &key,
            &session.pod.container,
            &image,
        ];
        // The request may or may not be accepted while the manager is down; with the same key it is a single save.
        let accepted = (0..100).find_map(|_| {
            let save = centre.service.ask(Some(&session.user), &words);
            if save.is_err() {
                std::thread::sleep(Duration::from_millis(300));
            }
            save.ok()
        });
        let Some(save) = accepted else {
            let last = centre.service.ask(Some(&session.user), &words);
            bail!(
                "a save is not accepted: {last:?}\n{}",
                centre.service.log("manager")
            );
        };
        session.open = Some(text(&save, "id").to_owned());
    }
    Ok(())
}

/// Removes the saves that are done and checks their results.
fn finish(
    centre: &ServiceLab,
    sessions: &mut [SavedSession],
    ended: &mut BTreeMap<String, u32>,
) -> Result<()> {
    for session in sessions.iter_mut() {
        let Some(id) = &session.open else {
            continue;
        };
        // The manager may be down.
        let Ok(save) = centre.service.ask(
            Some(&session.user),
            &["job", "status", "--format", "json", id],
        ) else {
            continue;
        };
        let tag = format!("s{}", session.serial);
        let tags = || {
            centre
                .lab
                .registry
                .tags(&format!("sessions/{}/mine", session.user))
        };
        let how = match text(&save, "state") {
            "succeeded" => {
                ensure!(tags().contains(&tag), "{save}: no tag among {:?}", tags());
                let reference = text(&save["result"], "reference");
                let rootfs = unpack(&centre.lab.scratch, reference)?;
                let serial = std::fs::read_to_string(rootfs.join("home/serial"))?;
                assert_eq!(serial.trim(), session.serial.to_string(), "{save}");
                same_tree(
                    &session.pod.rootfs,
                    &rootfs,
                    LEFT_OUT,
                    TOUCHED_BY_RUNTIMES,
                    60,
                )
                .with_context(|| save.to_string())?;
                std::fs::remove_dir_all(rootfs.ancestors().nth(2).context("its directory")?)?;
                "succeeded".to_owned()
            }
            "failed" => {
                let code = text(&save["error"], "code");
                ensure!(!code.is_empty(), "{save}");
                ensure!(!tags().contains(&tag), "a tag of a failed save: {save}");
                format!("failed: {code}")
            }
            "cancelled" => bail!("it was cancelled without a request: {save}"),
            _ => continue,
        };
        *ended.entry(how).or_default() += 1;
        session.open = None;
    }
    Ok(())
}

/// A running `upperdeck up`, ended when dropped, as its user sees it.
struct UpProcess {
    child: std::process::Child,
    /// The URL with the token.
    url: String,
}

impl UpProcess {
    fn start(lab: &Lab, state: &std::path::Path) -> Result<Self> {
        let mut up = crate::save::upperdeck_itself("up", &lab.roots);
        let mut child = up
            .env("USER", "ada")
            .env_remove("SUDO_USER")
            .arg(format!("--state-dir={}", state.display()))
            .args(["--listen", "127.0.0.1:0", "--backoff", "1s"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut url = String::new();
        let stdout = child.stdout.take().context("stdout")?;
        std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut url)?;
        let url = url.trim().to_owned();
        ensure!(
            url.starts_with("http://127.0.0.1:") && url.contains("/?token="),
            "{url:?}"
        );
        Ok(Self { child, url })
    }

    /// Runs the client, which is killed if it hangs.
    fn shell(&self, words: &[&str]) -> Result<std::process::Output> {
        let mut shell = crate::host::command("timeout", ["--signal=KILL", "120"]);
        shell.arg(crate::support::program()).args(words);
        crate::host::output(shell.arg(format!("--server={}", self.url)))
    }

    fn ask(&self, words: &[&str]) -> Result<Value> {
        let done = self.shell(words)?;
        ensure!(
            done.status.success(),
            "{words:?}: {}",
            String::from_utf8_lossy(&done.stderr)
        );
        Ok(serde_json::from_slice(&done.stdout)?)
    }
}

impl Drop for UpProcess {
    fn drop(&mut self) {
        // It may have exited already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn up_is_all_of_it_on_one_machine_and_a_crash_loses_nothing() -> Result<()> {
    let Some(lab) = Lab::new(Base::Small, Format::Oci)? else {
        return Ok(());
    };
    let pod = lab.session()?;
    let state = lab.scratch.dir("up")?;
    let up = UpProcess::start(&lab, &state)?;
    let here = || format!("--up-dir={}", state.display());
    wait_at_most(Duration::from_secs(60), "the session is known", || {
        up.ask(&["job", "sessions", "--format", "json"])
            .is_ok_and(|found| found.as_array().map(Vec::len) == Some(1))
    })?;
    let sessions = up.ask(&["job", "sessions", "--format", "json"])?;
    assert_eq!(text(&sessions[0], "id"), pod.container);
    assert_eq!(text(&sessions[0], "owner"), "ada");

    // Without a server name, the client finds the one of this machine.
    let mut submit = crate::host::command(crate::support::program(), ["job", "submit"]);
    let done = crate::host::output(submit.args([
        "--watch",
        &here(),
        &format!("jupyter/{}", pod.name),
        "notebook:monday",
    ]))?;
    ensure!(
        done.status.success(),
        "{}",
        String::from_utf8_lossy(&done.stderr)
    );
    let layout = state.join("images/ada/notebook");
    let said = String::from_utf8(done.stdout)?;
    ensure!(
        said.starts_with(&format!("oci:{}@sha256:", layout.display())),
        "{said}"
    );
    let rootfs = crate::save::unpack_layout(&layout, "monday")?;
    same_tree(&pod.rootfs, &rootfs, LEFT_OUT, TOUCHED_BY_RUNTIMES, 60)?;

    // Killed in the middle of a save and started again: the accepted save is completed.
    lab.containerd.shell(
        &pod,
        "dd if=/dev/urandom of=/home/researcher/big bs=1048576 count=48 2> /dev/null",
    )?;
    let save = up.ask(&[
        "job",
        "submit",
        "--full",
        "--format",
        "json",
        &pod.container,
        "notebook:tuesday",
    ])?;
    let id = text(&save, "id").to_owned();
    wait_at_most(Duration::from_secs(60), "the save runs", || {
        up.ask(&["job", "status", "--format", "json", &id])
            .is_ok_and(|save| text(&save, "state") == "running")
    })?;
    drop(up);
    let up = UpProcess::start(&lab, &state)?;
    let done = up.shell(&["job", "watch", &id])?;
    ensure!(
        done.status.success(),
        "{}",
        String::from_utf8_lossy(&done.stderr)
    );
    let rootfs = crate::save::unpack_layout(&layout, "tuesday")?;
    same_tree(&pod.rootfs, &rootfs, LEFT_OUT, TOUCHED_BY_RUNTIMES, 60)?;
    ensure!(!Freezer::of(pod.pid)?.frozen());

    let images = up.ask(&["image", "ls", "--format", "json"])?;
    assert_eq!(images["total"], 2, "{images}");
    let done = up.shell(&["image", "rm", "notebook:monday"])?;
    ensure!(done.status.success(), "{done:?}");
    let images = up.ask(&["image", "ls", "--format", "json"])?;
    assert_eq!(images["total"], 1, "{images}");

    // On a signal it exits and removes the address file.
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(up.child.id() as i32),
        nix::sys::signal::Signal::SIGTERM,
    )?;
    wait_at_most(Duration::from_secs(30), "it ends", || {
        !state.join("up.url").exists()
    })?;
    Ok(())
}
