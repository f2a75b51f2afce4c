//! Containers of Podman that are saved without being asked for: those that change, and no others; the images are thinned,
//! and a save by hand goes before.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use serde_json::Value;

use crate::host::docker::Running;
use crate::host::image::Format;
use crate::host::podman::Podman;
use crate::host::redis::Redis;
use crate::host::service::Service;
use crate::host::{Roots, command, run, wait_at_most, wait_until};
use crate::lab::engine;
use crate::save::{
    LEFT_OUT, TOUCHED_BY_RUNTIMES, layers, manifest, same_tree, save, state_dir, unpack, upperdeck,
};
use crate::support::{Need, ignored, note};

const ENGINE: [&str; 3] = ["podman", "conmon", "runc"];
const SOURCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/e2e/map.c");
/// Longer than a few looks of an agent, which are 10 s apart, and the saves after them.
const ROUNDS: Duration = Duration::from_secs(240);

/// Returns how many entries the next save of a container would have, and whether only times of directories differ.
fn next(roots: &Roots, name: &str) -> Result<(u64, bool)> {
    let mut inspect = upperdeck("inspect", roots);
    let view: Value = serde_json::from_str(&run(inspect.args(["--format", "json", name]))?)?;
    let next = &view["next_save"];
    let found = next["entries"].as_u64().zip(next["times_only"].as_bool());
    found.with_context(|| view.to_string())
}

/// Returns how many entries the next save of a container would have.
fn changed(roots: &Roots, name: &str) -> Result<u64> {
    Ok(next(roots, name)?.0)
}

#[test]
fn whatever_changes_a_file_is_seen_without_a_save() -> Result<()> {
    let programs = [&ENGINE[..], &["cc"]].concat();
    let Some((scratch, registry, image)) = engine(&programs, Format::Oci)? else {
        return Ok(());
    };
    let podman = Podman::new(&scratch)?;
    let program = scratch.path().join("map");
    run(command("cc", ["-O2", "-static", "-o"]).args([program.as_os_str(), SOURCE.as_ref()]))?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    let volume = format!("{}:/map:ro", program.display());
    let session = podman.run("session", &image, &["--volume", &volume], &["/map"])?;
    let roots = podman.roots(&scratch);
    let mut saved = 0;
    let mut save_now = || -> Result<()> {
        saved += 1;
        let destination = registry.reference(&format!("users/ada:{saved}"));
        save(&scratch, &roots, "session", &destination, &[])?;
        wait_until("nothing is left to be saved", || {
            changed(&roots, "session").is_ok_and(|entries| entries == 0)
        })
        .map(drop)
    };
    save_now()?;
    for script in [
        "rm /usr/lib/app/plugins/p2",
        "chmod 700 /usr/lib/app",
        "chown 7:7 /usr/lib/app/plugins/p3",
        "mv /opt/new /opt/other",
        "echo more >> /usr/lib/app/main",
        "touch /new",
    ] {
        podman.shell(&session, script)?;
        let (entries, times_only) = next(&roots, "session")?;
        ensure!(entries > 0 && !times_only, "{script}");
        save_now()?;
    }
    // In a directory that was copied up before, in one that was not, and with one that stays.
    for (script, expected) in [
        ("touch /usr/lib/app/x && rm /usr/lib/app/x", true),
        ("touch /etc/x && rm /etc/x", true),
        (
            "touch /usr/lib/app/x /usr/lib/app/y && rm /usr/lib/app/x",
            false,
        ),
    ] {
        podman.shell(&session, script)?;
        let (entries, times_only) = next(&roots, "session")?;
        ensure!(entries > 0 && times_only == expected, "{script}: {entries}");
    }
    save_now()?;
    podman.podman(["kill", "--signal", "USR1", "session"])?;
    wait_until("the write through the mapping", || {
        changed(&roots, "session").is_ok_and(|entries| entries > 0)
    })?;
    Ok(())
}

/// Saves of a session, the latest first.
fn saves_of<'a>(listed: &'a Value, name: &str) -> Vec<&'a Value> {
    let saves = listed["saves"].as_array();
    saves
        .into_iter()
        .flatten()
        .filter(|save| save["session_name"] == name)
        .collect()
}

#[test]
fn what_changes_is_saved_by_itself_and_what_does_not_is_not() -> Result<()> {
    if ignored(&[Need::Program("redis-server"), Need::Program("redis-cli")]) {
        return Ok(());
    }
    let Some((scratch, registry, image)) = engine(&ENGINE, Format::Oci)? else {
        return Ok(());
    };
    let podman = Podman::new(&scratch)?;
    let alice = ["--env", "JUPYTERHUB_USER=alice"];
    let script = "n=0; while :; do n=$((n+1)); echo $n > /home/researcher/count; sleep 1; done";
    podman.run("busy", &image, &alice, &["sh", "-c", script])?;
    podman.run("idle", &image, &alice, &[])?;
    let redis = Redis::start(&scratch)?;
    let flags = ["--autosave=1s", "--autosave-min=1s", "--autosave-keep=1"];
    let roots = podman.roots(&scratch);
    let service = Service::start_with(&scratch, &roots, &redis, &registry, &flags, &[])?;
    service.wait_for_sessions(2)?;
    let list = || service.ask(Some("alice"), &["job", "ls", "--format", "json"]);
    let mut last = Value::Null;
    let mut wait = |what: &str, is: &dyn Fn(&Value) -> bool| -> Result<Value> {
        wait_at_most(ROUNDS, what, || {
            last = list().unwrap_or_default();
            is(&last)
        })
        .with_context(|| {
            format!(
                "{last}\n{}\n{}",
                service.log("manager"),
                service.log("agent")
            )
        })?;
        Ok(last.clone())
    };
    let succeeded = |listed: &Value, made_by: &str| {
        saves_of(listed, "busy")
            .into_iter()
            .filter(|save| save["made_by"] == made_by && save["state"] == "succeeded")
            .count()
    };
    wait("an autosave", &|listed| succeeded(listed, "autosave") > 0)?;

    // A save by hand, whether an autosave is open at that moment or not.
    let words = [
        "job",
        "submit",
        "--watch",
        "--progress",
        "none",
        "busy",
        "mine:now",
    ];
    let by_hand = service.output(Some("alice"), &words)?;
    let message = String::from_utf8_lossy(&by_hand.stderr);
    ensure!(
        by_hand.status.success(),
        "{message}\n{}",
        service.log("manager")
    );
    let listed = list()?;
    assert_eq!(succeeded(&listed, "user"), 1, "{listed}");

    // The image is that of an instant, and the earlier ones go.
    // Saves so close to each other may have the same tag, one after the other.
    let deleted = |listed: &Value| {
        let saves = saves_of(listed, "busy");
        let is_gone = |save: &&&Value| {
            let same = saves.iter().filter(|other| other["tag"] == save["tag"]);
            save["image"]["state"] == "deleted" && same.count() == 1
        };
        saves.iter().find(is_gone).map(|save| (*save).clone())
    };
    let listed = wait("thinning", &|listed| deleted(listed).is_some())?;
    let saves = saves_of(&listed, "busy");
    let deleted = deleted(&listed).context("none is deleted")?;
    assert_eq!(deleted["image"]["caller"], "upperdeck:auto", "{deleted}");
    let tags = registry.tags("sessions/alice/busy");
    let tag = deleted["tag"].as_str().unwrap_or_default();
    ensure!(
        tag.starts_with("auto-20") && !tags.iter().any(|one| one == tag),
        "{tag}: {tags:?}"
    );
    ensure!(registry.tags("sessions/alice/mine") == ["now"]);
    let kept = saves
        .iter()
        .find(|save| save["made_by"] == "autosave" && save["image"]["state"] == "tagged");
    let kept = kept.context("none is kept")?;
    let reference = kept["target"].as_str().unwrap_or_default();
    let rootfs = unpack(&scratch, reference)?;
    let count: u64 = fs::read_to_string(rootfs.join("home/researcher/count"))?
        .trim()
        .parse()?;
    ensure!(count > 0, "{count}");

    // What its engine wrote when it was started is no change.
    let idle = saves_of(&listed, "idle").len();
    ensure!(idle == 0, "{listed}");
    let sessions = service.ask(Some("alice"), &["job", "sessions", "--format", "json"])?;
    let session = sessions.as_array().into_iter().flatten();
    let session = session
        .into_iter()
        .find(|session| session["container"] == "idle");
    let session = session.context("idle is not listed")?;
    assert_eq!(session["next"]["entries"], 0, "{session}");
    assert_eq!(session["autosave"]["from"], "administrator", "{session}");
    let off = ["job", "autosave", "busy", "--off", "--format", "json"];
    assert_eq!(service.ask(Some("alice"), &off)?["autosave"], Value::Null);
    Ok(())
}

/// Changes the tree of a session at random, in up to six places.
fn change(podman: &Podman, session: &Running, random: &mut StdRng) -> Result<()> {
    let mut script = "mkdir -p /var/lib/work && cd /var/lib/work || exit 1\n".to_owned();
    for _ in 0..random.random_range(1..=6) {
        let (one, two) = (random.random_range(0..40), random.random_range(0..40));
        let size = random.random_range(0..60_000);
        script += &match random.random_range(0..8) {
            0..=2 => format!(
                "rm -rf f{one}; mkdir -p d{one}; head -c {size} /dev/urandom > d{one}/f{two}\n"
            ),
            3 => format!("rm -rf d{one} f{two}\n"),
            4 => format!("[ ! -d d{one} ] || [ -e d{two} ] || mv d{one} d{two}\n"),
            5 => format!("[ ! -e d{one} ] || chmod 7{}0 d{one}\n", two % 8),
            6 => format!("rm -rf f{two}; ln -s d{one}/f{two} f{two}\n"),
            _ => format!(
                "rm -rf d{one} h{one}; [ -f f{one} ] || rm -rf f{one}; echo {size} >> f{one}; ln f{one} h{one}\n"
            ),
        };
    }
    podman.shell(session, &script).map(drop)
}

/// A long chain of saves of one session, as autosaves are: each is the tree of its instant, and what they take is bounded.
/// `UPPERDECK_SOAK` sets their number; a line is printed for each tenth of them.
#[test]
fn each_save_of_a_long_chain_is_its_instant_and_the_chain_is_bounded() -> Result<()> {
    let Some((scratch, registry, image)) = engine(&ENGINE, Format::Oci)? else {
        return Ok(());
    };
    let usual = std::env::var("UPPERDECK_SOAK").ok();
    let number: u32 = usual.map_or(Ok(8), |text| text.parse())?;
    let most = if number > 100 { 32 } else { 6 };
    let podman = Podman::new(&scratch)?;
    let session = podman.run("session", &image, &[], &[])?;
    let roots = podman.roots(&scratch);
    let mut random = StdRng::seed_from_u64(rand::random_range(0..1_000_000));
    let (mut pauses, mut longest, mut made) = (Vec::new(), 0, 0);
    for save_number in 1..=number {
        change(&podman, &session, &mut random)?;
        let destination = registry.reference(&format!("users/ada:{}", save_number % 20));
        let bound = format!("--max-layers={most}");
        let options = [bound.as_str(), "--delete-replaced"];
        let saved = save(&scratch, &roots, "session", &destination, &options)?;
        let rootfs = unpack(&scratch, &saved.reference)?;
        // Podman's own root directory has another mode.
        let except = [LEFT_OUT, &["."]].concat();
        same_tree(&session.rootfs, &rootfs, &except, TOUCHED_BY_RUNTIMES, 50)
            .with_context(|| format!("save {save_number}: {}", saved.stderr))?;
        let bundle = rootfs.ancestors().nth(2).context("its directory")?;
        fs::remove_dir_all(bundle)?;
        let above = layers(&manifest(&saved.reference)?).len();
        longest = longest.max(above);
        pauses.push(saved.metadata["pause_ms"].as_f64().unwrap_or_default());
        made += saved.metadata["changes"]["bytes"]
            .as_u64()
            .unwrap_or_default();
        if save_number % (number / 10).max(1) == 0 {
            let size_of = |dir: &Path| -> Result<String> {
                let told = run(command("du", ["-sh", "--apparent-size"]).arg(dir))?;
                Ok(told
                    .split_whitespace()
                    .next()
                    .unwrap_or_default()
                    .to_owned())
            };
            let (state, stored) = (size_of(&state_dir(&roots))?, size_of(&registry.storage)?);
            let mut sorted = pauses.clone();
            sorted.sort_by(f64::total_cmp);
            note(&format!(
                "{save_number} saves: {above} layers ({longest} at most), {made} bytes of contents, registry {stored}, state {state}, pause median \
                 {:.0} ms, longest {:.0} ms",
                sorted[sorted.len() / 2],
                sorted[sorted.len() - 1]
            ));
        }
    }
    // The base has three, and a save of a session that changes meanwhile makes two.
    ensure!(longest <= most + 3 + 1, "{longest} layers");
    Ok(())
}
