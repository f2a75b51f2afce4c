//! Pods of Kubernetes on containerd are saved to a registry, compared, pulled and run again.

use std::env;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::host::Freezer;
use crate::host::containerd::PodOptions;
use crate::host::image::{Base, Format};
use crate::lab::Lab;
use crate::save::{
    LEFT_OUT, TOUCHED_BY_ENGINES, TOUCHED_BY_RUNTIMES, config, digests, layers, manifest,
    meaningful, same_tree, save, unpack, upperdeck,
};
use crate::support;

/// Checks in every respect that the image of a pod is what the pod saw, for either family of media types.
fn round_trip(format: Format) -> Result<()> {
    let Some(lab) = Lab::new(Base::Small, format)? else {
        return Ok(());
    };
    let pod = lab.session()?;
    let before = config(&lab.image)?;
    let destination = lab.destination("users/ada");
    let saved = save(
        &lab.scratch,
        &lab.roots,
        &pod.container,
        &destination,
        &[
            "--author",
            "Ada",
            "--message",
            "a day's work",
            "--label",
            "org.example.saved=yes",
            "--change",
            "ENV ADDED=1",
        ],
    )?;
    ensure!(!Freezer::of(pod.pid)?.frozen());
    assert_eq!(
        saved.reference,
        format!("{}@{}", lab.registry.reference("users/ada"), saved.digest)
    );

    let rootfs = unpack(&lab.scratch, &saved.reference)?;
    same_tree(&pod.rootfs, &rootfs, LEFT_OUT, TOUCHED_BY_RUNTIMES, 60)?;
    for left_out in [
        "tmp/scratch",
        "root/.ssh",
        "etc/hosts",
        "etc/hostname",
        "etc/resolv.conf",
        "dev/termination-log",
    ] {
        ensure!(
            rootfs.join(left_out).symlink_metadata().is_err(),
            "{left_out} must not be in the image"
        );
    }

    let copy = lab
        .containerd
        .run_pod(&destination, &PodOptions::default())?;
    same_tree(&pod.rootfs, &copy.rootfs, LEFT_OUT, TOUCHED_BY_ENGINES, 60)?;
    assert_eq!(
        lab.containerd
            .shell(&copy, "cat /home/researcher/work/b.ipynb; echo $ADDED")?,
        "notebook\n1\n"
    );

    // The base's layers are unchanged, with one layer on top, all of one family of media types, whichever the base's
    // is.
    let (base, image) = (manifest(&lab.image)?, manifest(&saved.reference)?);
    assert_eq!(digests(&image)[..3], digests(&base)[..]);
    assert_eq!(layers(&image).len(), 4);
    assert_eq!(
        image["mediaType"],
        "application/vnd.oci.image.manifest.v1+json"
    );
    assert_eq!(
        image["config"]["mediaType"],
        "application/vnd.oci.image.config.v1+json"
    );
    for (kind, _) in layers(&image) {
        assert_eq!(kind, "application/vnd.oci.image.layer.v1.tar+gzip");
    }

    // The config is the base's own with the requested changes, and nothing of the pod's environment.
    let after = config(&saved.reference)?;
    ensure!(
        !after.to_string().contains("hunter2"),
        "the pod's secrets are in the image: {after}"
    );
    let mut expected = before["config"].clone();
    expected["Env"]
        .as_array_mut()
        .context("Env")?
        .push(json!("ADDED=1"));
    expected["Labels"]["org.example.saved"] = json!("yes");
    assert_eq!(meaningful(&after["config"]), meaningful(&expected));
    assert_eq!(after["author"], "Ada");
    let history = after["history"].as_array().context("history")?;
    assert_eq!(
        history.len(),
        before["history"].as_array().context("history")?.len() + 1
    );
    assert_eq!(
        history.last().context("history")?["comment"],
        "a day's work"
    );
    assert_eq!(
        after["rootfs"]["diff_ids"].as_array().map(Vec::len),
        Some(4)
    );
    Ok(())
}

#[test]
fn a_pod_on_an_oci_base_is_saved_and_runs_again() -> Result<()> {
    round_trip(Format::Oci)
}

#[test]
fn a_pod_on_a_docker_base_keeps_healthcheck_onbuild_and_shell() -> Result<()> {
    round_trip(Format::Docker)
}

/// A typical session: a few hundred megabytes of packages in ten thousand files.
#[test]
fn a_jupyter_session_with_hundreds_of_megabytes_of_packages() -> Result<()> {
    let Some(lab) = Lab::new(Base::Big, Format::Oci)? else {
        return Ok(());
    };
    let home = lab.scratch.dir("home")?;
    fs::set_permissions(&home, fs::Permissions::from_mode(0o777))?;
    let certificates = Path::new("/etc/ssl/certs");
    let mut mounts = vec![(home.as_path(), "/mnt/home", false)];
    if certificates.is_dir() {
        mounts.push((certificates, "/mnt/certificates", true));
    }
    // The machine's pip settings, except for the paths in them.
    let settings: Vec<(String, String)> = env::vars()
        .filter(|(key, _)| key.starts_with("PIP_") || key.to_ascii_lowercase().ends_with("_proxy"))
        .filter(|(_, value)| !value.starts_with('/'))
        .collect();
    let mut environment: Vec<(&str, &str)> = settings
        .iter()
        .map(|(k, v)| (k.as_str(), v.as_str()))
        .collect();
    environment.push(("PIP_CERT", "/mnt/certificates/ca-certificates.crt"));
    let options = PodOptions {
        environment: &environment,
        mounts: &mounts,
        ..PodOptions::default()
    };
    let pod = lab.containerd.run_pod(&lab.image, &options)?;

    let packages = "numpy scipy pandas scikit-learn matplotlib";
    let install = lab.containerd.exec(
        &pod,
        &[
            "/bin/sh",
            "-c",
            &format!("timeout 240 pip install --no-cache-dir {packages}"),
        ],
    )?;
    let check = if install.code == 0 {
        "python3 -c 'import numpy, scipy, pandas; print(numpy.arange(4).sum())'"
    } else {
        let said = install.stderr.lines().last().unwrap_or_default();
        support::note(&format!(
            "no packages from an index, a generated tree instead: {said}"
        ));
        lab.containerd.shell(&pod, GENERATE)?;
        "python3 -c 'import generated.p7.m7; print(generated.p7.m7.VALUE)'"
    };
    let expected = lab.containerd.shell(&pod, check)?;
    lab.containerd.shell(
        &pod,
        "echo not for the image > /mnt/home/private; echo mine > ~/notes.txt; rm ~/first.ipynb",
    )?;

    let destination = lab.destination("users/grace");
    let saved = save(
        &lab.scratch,
        &lab.roots,
        &format!("jupyter/{}", pod.name),
        &destination,
        &[],
    )?;
    ensure!(!Freezer::of(pod.pid)?.frozen());

    let except: Vec<&str> = LEFT_OUT.iter().chain(&["mnt/*"]).copied().collect();
    let touched: Vec<&str> = TOUCHED_BY_RUNTIMES
        .iter()
        .chain(&["mnt"])
        .copied()
        .collect();
    let rootfs = unpack(&lab.scratch, &saved.reference)?;
    same_tree(&pod.rootfs, &rootfs, &except, &touched, 12_000)?;
    ensure!(
        !rootfs.join("mnt/home").exists(),
        "a volume's mount point is in the image"
    );
    let copy = lab
        .containerd
        .run_pod(&destination, &PodOptions::default())?;
    same_tree(&pod.rootfs, &copy.rootfs, &except, &touched, 12_000)?;
    assert_eq!(lab.containerd.shell(&copy, check)?, expected);
    Ok(())
}

/// As large and as varied as the packages: many small modules with compiled counterparts, some large binaries, links.
const GENERATE: &str = r##"
python3 - <<'END'
import os, random, compileall, pathlib
random.seed(1)
top = pathlib.Path("/opt/venv/lib") / next(p for p in os.listdir("/opt/venv/lib") if p.startswith("python")) / "site-packages/generated"
for p in range(100):
    package = top / f"p{p}"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    for m in range(60):
        (package / f"m{m}.py").write_text(f"VALUE = {p * m}\n" + "# text\n" * random.randrange(900))
    (package / "native.so").write_bytes(random.randbytes(2_000_000) + bytes(1_000_000))
    os.link(package / "native.so", package / "native.so.1")
    os.symlink("native.so.1", package / "native.so.2")
(top / "__init__.py").touch()
compileall.compile_dir(top, quiet=2)
END
"##;

#[test]
fn any_number_of_threads_makes_the_same_image() -> Result<()> {
    let Some(lab) = Lab::new(Base::Small, Format::Oci)? else {
        return Ok(());
    };
    let pod = lab.session()?;
    for compression in ["gzip", "none"] {
        let mut digests = Vec::new();
        for jobs in ["1", "2", "8"] {
            let options = [
                "--jobs",
                jobs,
                "--compression",
                compression,
                "--timestamp",
                "1700000000",
            ];
            let destination = lab.destination(&format!("jobs/{compression}-{jobs}"));
            digests.push(
                save(
                    &lab.scratch,
                    &lab.roots,
                    &pod.container,
                    &destination,
                    &options,
                )?
                .digest,
            );
        }
        ensure!(
            digests.iter().all(|digest| *digest == digests[0]),
            "{compression}: {digests:?}"
        );
    }
    Ok(())
}

#[test]
fn pods_are_found_by_every_name_and_doubt_is_an_error() -> Result<()> {
    let Some(lab) = Lab::new(Base::Small, Format::Oci)? else {
        return Ok(());
    };
    let pod = lab.containerd.run_pod(&lab.image, &PodOptions::default())?;
    let other = lab.containerd.run_pod(&lab.image, &PodOptions::default())?;
    lab.containerd.pull(&lab.image)?;
    let plain = lab
        .containerd
        .ctr_run(&lab.image, "plain-ctr", &["/bin/sleep", "1000"])?;
    for name in [
        pod.container.clone(),
        pod.container[..12].to_owned(),
        format!("jupyter/{}", pod.name),
        format!("jupyter/{}/notebook", pod.name),
        format!("pid:{}", pod.pid),
    ] {
        let shown =
            crate::host::run(upperdeck("inspect", &lab.roots).args(["--format", "json", &name]))
                .with_context(|| format!("inspect {name}"))?;
        let shown: serde_json::Value = serde_json::from_str(&shown)?;
        ensure!(
            shown.to_string().contains(&format!("\"pid\":{}", pod.pid)),
            "{name}: {shown}"
        );
    }
    let listed = crate::host::run(upperdeck("ps", &lab.roots).args(["--format", "json"]))?;
    for expected in [&pod.container, &other.container, "plain-ctr"] {
        ensure!(listed.contains(expected), "{expected} is not in {listed}");
    }
    ensure!(listed.contains(&plain.to_string()));
    ensure!(
        !listed.contains(&format!("\"id\":\"{}", pod.sandbox)),
        "a sandbox is nothing to save: {listed}"
    );
    let text = crate::host::run(&mut upperdeck("ps", &lab.roots))?;
    ensure!(text.contains(&format!("jupyter/{}", pod.name)), "{text}");
    let unknown = crate::save::refuse(&lab.roots, "nosuch", &lab.destination("x/y"), &[], 66)?;
    ensure!(unknown.contains("nosuch"), "{unknown}");
    // The names of both pods have only the empty prefix in common; the namespace alone matches two.
    let doubt = crate::save::refuse(&lab.roots, "jupyter/", &lab.destination("x/y"), &[], 66);
    ensure!(
        doubt.is_ok()
            || crate::save::refuse(&lab.roots, "jupyter/", &lab.destination("x/y"), &[], 2).is_ok()
    );
    Ok(())
}

#[test]
fn diff_says_what_changed_as_docker_does() -> Result<()> {
    let Some(lab) = Lab::new(Base::Small, Format::Oci)? else {
        return Ok(());
    };
    let pod = lab.session()?;
    let diff = crate::host::run(upperdeck("diff", &lab.roots).arg(&pod.container))?;
    for line in [
        "C /usr/lib/app/main",
        "D /usr/lib/app/plugins/p2",
        "D /usr/lib/app/dangling",
        "D /opt/new/file",
        "A /opt/new/other",
        "C /root",
        "D /srv/share",
        "A /home/researcher/work/deep/er/a.ipynb",
    ] {
        ensure!(
            diff.lines().any(|seen| seen == line),
            "{line:?} is not in\n{diff}"
        );
    }
    // Copied up but not changed, so not a change.
    ensure!(!diff.contains("plugins/p3"), "{diff}");
    Ok(())
}

#[test]
fn a_container_that_somebody_paused_stays_paused() -> Result<()> {
    let Some(lab) = Lab::new(Base::Small, Format::Oci)? else {
        return Ok(());
    };
    let pod = lab.session()?;
    let freezer = Freezer::of(pod.pid)?;
    freezer.set(true)?;
    let saved = save(
        &lab.scratch,
        &lab.roots,
        &pod.container,
        &lab.destination("users/ada"),
        &[],
    );
    let frozen = freezer.frozen();
    freezer.set(false)?;
    saved?;
    ensure!(frozen, "thawed what was not ours");
    Ok(())
}

#[test]
fn an_empty_change_adds_no_layer() -> Result<()> {
    let Some(lab) = Lab::new(Base::Small, Format::Oci)? else {
        return Ok(());
    };
    let pod = lab.containerd.run_pod(&lab.image, &PodOptions::default())?;
    let saved = save(
        &lab.scratch,
        &lab.roots,
        &pod.container,
        &lab.destination("users/ada"),
        &["--label", "a=b"],
    )?;
    assert_eq!(
        layers(&manifest(&saved.reference)?),
        layers(&manifest(&lab.image)?)
    );
    let config = config(&saved.reference)?;
    assert_eq!(config["config"]["Labels"]["a"], "b");
    let history = config["history"].as_array().context("history")?;
    assert_eq!(history.last().context("history")?["empty_layer"], true);
    Ok(())
}

/// Counts up in /opt/count, one step after the container that is named by the first word, which counts in the same way.
const COUNT_IN_TURN: &str = r#"
i=0
while true; do
    i=$((i + 1))
    echo $i > /opt/next; mv /opt/next /opt/count
    echo $i > /mnt/turn/$0.next; mv /mnt/turn/$0.next /mnt/turn/$0
    while [ "$(cat /mnt/turn/$1 2> /dev/null || echo 0)" -lt $i ]; do :; done
done
"#;

#[test]
fn all_containers_of_a_pod_are_saved_at_one_instant() -> Result<()> {
    let Some(lab) = Lab::new(Base::Small, Format::Oci)? else {
        return Ok(());
    };
    let turn = lab.scratch.dir("turn")?;
    fs::set_permissions(&turn, fs::Permissions::from_mode(0o777))?;
    let mounts = [(turn.as_path(), "/mnt/turn", false)];
    let counting =
        |own: &'static str, other: &'static str| ["/bin/sh", "-c", COUNT_IN_TURN, own, other];
    let (first, second) = (
        counting("notebook", "second"),
        counting("second", "notebook"),
    );
    let options = |command| PodOptions {
        command,
        mounts: &mounts,
        ..PodOptions::default()
    };
    let pod = lab.containerd.run_pod(&lab.image, &options(&first))?;
    let other = lab
        .containerd
        .add_container(&pod, "second", &lab.image, &options(&second))?;
    // Both have begun.
    lab.containerd.shell(
        &other,
        "while [ \"$(cat /mnt/turn/second 2> /dev/null || echo 0)\" -lt 5 ]; do sleep 0.05; done",
    )?;
    let mut commit = upperdeck("commit", &lab.roots);
    commit.args(["--progress", "none", "--all-containers"]);
    commit.args([
        &format!("jupyter/{}", pod.name),
        &lab.destination("pods/all"),
    ]);
    let said = crate::host::run(&mut commit)?;
    let references: Vec<&str> = said.lines().collect();
    assert_eq!(references.len(), 2, "{said}");
    let mut counts = Vec::new();
    for name in ["notebook", "second"] {
        // They come in the order of the containers' IDs.
        let image = format!("pods/all/{name}@");
        let mut references = references.iter();
        let reference = references.find(|reference| reference.contains(&image));
        let reference = reference.with_context(|| said.clone())?;
        let count = unpack(&lab.scratch, reference)?.join("opt/count");
        counts.push(fs::read_to_string(count)?.trim().parse::<i64>()?);
    }
    // One is at most a step ahead of the other.
    ensure!((counts[0] - counts[1]).abs() <= 1, "{counts:?}");
    for container in [&pod, &other] {
        ensure!(!Freezer::of(container.pid)?.frozen());
    }
    Ok(())
}
