//! Broken files, full disks, unreachable services and missing permissions: each leads to the documented exit code and a
//! message that the user can act on.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use nix::mount::{MsFlags, mount};

use crate::host::image::{Base, Format};
use crate::host::registry::{CREDENTIALS, Registry};
use crate::host::{Freezer, command, output, run};
use crate::lab::Lab;
use crate::save::{layers, manifest, refuse, save, upperdeck};

/// A change to the bytes of a file.
type Damage<'a> = &'a dyn Fn(&mut Vec<u8>);

/// A file that is restored when dropped.
struct Damaged {
    path: PathBuf,
    content: Vec<u8>,
}

impl Damaged {
    fn with(path: &Path, change: impl FnOnce(&mut Vec<u8>)) -> Result<Self> {
        let content = fs::read(path).with_context(|| path.display().to_string())?;
        let mut changed = content.clone();
        change(&mut changed);
        fs::write(path, changed)?;
        Ok(Self {
            path: path.to_owned(),
            content,
        })
    }
}

impl Drop for Damaged {
    fn drop(&mut self) {
        let _ = fs::write(&self.path, &self.content);
    }
}

#[test]
fn damaged_state_of_containerd_is_an_error_with_its_path() -> Result<()> {
    let Some(mut lab) = Lab::new(Base::Small, Format::Oci)? else {
        return Ok(());
    };
    let pod = lab.session()?;
    // So that containerd does not read the damaged file.
    lab.containerd.kill()?;
    let image = manifest(&lab.image)?;
    let config = image["config"]["digest"].as_str().context("a config")?;
    let manifest_digest = {
        let inspected = run(&mut command(
            "skopeo",
            [
                "inspect",
                "--tls-verify=false",
                "--format",
                "{{.Digest}}",
                &format!("docker://{}", lab.image),
            ],
        ))?;
        inspected.trim().to_owned()
    };
    let snapshots = lab
        .containerd
        .root
        .join("io.containerd.snapshotter.v1.overlayfs/metadata.db");
    let metadata = lab
        .containerd
        .root
        .join("io.containerd.metadata.v1.bolt/meta.db");
    let bundle = lab
        .containerd
        .state
        .join("io.containerd.runtime.v2.task/k8s.io")
        .join(&pod.container)
        .join("config.json");
    let cut = |bytes: &mut Vec<u8>| bytes.truncate(bytes.len() / 3);
    let empty = |bytes: &mut Vec<u8>| bytes.clear();
    let zero = |bytes: &mut Vec<u8>| bytes.fill(0);
    let noise = |bytes: &mut Vec<u8>| {
        // After the two meta pages, so that the file looks well-formed at first.
        for (at, byte) in bytes.iter_mut().enumerate().skip(8192) {
            *byte ^= (at * 31 % 251) as u8;
        }
    };
    let text = |bytes: &mut Vec<u8>| *bytes = b"{\"not\": [json".to_vec();
    let cases: [(&Path, &str, Damage<'_>, &[i32]); 12] = [
        (&snapshots, "cut", &cut, &[1, 69]),
        (&snapshots, "empty", &empty, &[1, 69]),
        (&snapshots, "zeros", &zero, &[1, 69]),
        (&snapshots, "noise", &noise, &[1, 69]),
        (&metadata, "cut", &cut, &[1, 69]),
        (&metadata, "empty", &empty, &[1, 69]),
        (&metadata, "zeros", &zero, &[1, 69]),
        (&metadata, "noise", &noise, &[1, 69]),
        (&bundle, "text", &text, &[1, 66]),
        (&bundle, "empty", &empty, &[1, 66]),
        (&lab.containerd.blob(config), "text", &text, &[1, 69]),
        // The config alone proves the base: the layers come from elsewhere, with a warning.
        (
            &lab.containerd.blob(&manifest_digest),
            "text",
            &text,
            &[0, 1, 69],
        ),
    ];
    let mut wrong = Vec::new();
    for (path, damage, change, exits) in cases {
        let damaged = Damaged::with(path, |bytes| change(bytes))?;
        let done = output(upperdeck("commit", &lab.roots).args([
            "--progress",
            "none",
            &pod.container,
            &lab.destination("bad/state"),
        ]))?;
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        let listed = output(&mut upperdeck("ps", &lab.roots))?;
        let name = path
            .file_name()
            .context("a file")?
            .to_string_lossy()
            .into_owned();
        let exit = done.status.code();
        let complaint = if exit.is_none_or(|exit| !exits.contains(&exit)) {
            format!("exit {exit:?}, expected one of {exits:?}")
        } else if said.contains("panicked")
            || String::from_utf8_lossy(&listed.stderr).contains("panicked")
        {
            "a panic".to_owned()
        } else if !said.contains(&name) {
            "the message does not name it".to_owned()
        } else if Freezer::of(pod.pid)?.frozen() {
            "left frozen".to_owned()
        } else {
            continue;
        };
        wrong.push(format!("{damage}: {}: {complaint}: {said}", path.display()));
        drop(damaged);
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    save(
        &lab.scratch,
        &lab.roots,
        &pod.container,
        &lab.destination("bad/state"),
        &[],
    )
    .context("whole again")?;
    Ok(())
}

#[test]
fn a_full_disk_fails_the_save_and_says_where() -> Result<()> {
    let Some(lab) = Lab::new(Base::Small, Format::Oci)? else {
        return Ok(());
    };
    let pod = lab.session()?;
    let full = lab.scratch.dir("full")?;
    mount(
        Some("tmpfs"),
        &full,
        Some("tmpfs"),
        MsFlags::empty(),
        Some("size=1m"),
    )?;
    for kind in ["oci", "oci-archive"] {
        let destination = format!("{kind}:{}:saved", full.join(kind).display());
        let said = refuse(&lab.roots, &pod.container, &destination, &[], 1)?;
        ensure!(
            said.contains("No space left") && said.contains(&full.display().to_string()),
            "{said}"
        );
        ensure!(!Freezer::of(pod.pid)?.frozen());
        ensure!(
            !full.join("oci/index.json").exists(),
            "a layout that shows half an image"
        );
        ensure!(!full.join("oci-archive").exists(), "half an archive");
    }
    let read_only = lab.scratch.dir("read-only")?;
    mount(
        Some("tmpfs"),
        &read_only,
        Some("tmpfs"),
        MsFlags::MS_RDONLY,
        None::<&str>,
    )?;
    let said = refuse(
        &lab.roots,
        &pod.container,
        &format!("oci:{}/layout", read_only.display()),
        &[],
        77,
    )?;
    ensure!(said.contains("Read-only file system"), "{said}");
    Ok(())
}

#[test]
fn registries_that_are_down_or_refuse_have_their_own_exit_codes() -> Result<()> {
    let Some(lab) = Lab::new(Base::Small, Format::Oci)? else {
        return Ok(());
    };
    let pod = lab.session()?;
    let mut down = Registry::start_named(&lab.scratch, "down", None)?;
    down.kill()?;
    let said = refuse(
        &lab.roots,
        &pod.container,
        &down.reference("users/ada:saved"),
        &[],
        75,
    )?;
    ensure!(said.contains(&down.host), "{said}");
    ensure!(!Freezer::of(pod.pid)?.frozen());

    let closed = Registry::start_with_password(&lab.scratch)?;
    let destination = closed.reference("users/ada:saved");
    for options in [
        &[][..],
        &["--creds", "tester:wrong"][..],
        &["--creds", "nobody:secret"][..],
    ] {
        let said = refuse(&lab.roots, &pod.container, &destination, options, 77)?;
        ensure!(said.contains(&closed.host), "{said}");
        ensure!(
            !said.contains("wrong") && !said.contains("secret"),
            "a password in a message: {said}"
        );
        ensure!(closed.tags("users/ada").is_empty());
    }
    save(
        &lab.scratch,
        &lab.roots,
        &pod.container,
        &destination,
        &["--creds", CREDENTIALS],
    )?;
    // The same from an auth file, as `docker login` and `podman login` leave it.
    let file = lab.scratch.path().join("auth.json");
    fs::write(
        &file,
        format!(
            "{{\"auths\": {{\"{}\": {{\"auth\": \"dGVzdGVyOnNlY3JldA==\"}}}}}}",
            closed.host
        ),
    )?;
    let file = file.display().to_string();
    save(
        &lab.scratch,
        &lab.roots,
        &pod.container,
        &destination,
        &["--authfile", &file],
    )?;
    Ok(())
}

#[test]
fn wrong_usage_is_told_before_anything_is_touched() -> Result<()> {
    let Some(lab) = Lab::new(Base::Small, Format::Oci)? else {
        return Ok(());
    };
    let pod = lab
        .containerd
        .run_pod(&lab.image, &crate::host::containerd::PodOptions::default())?;
    let destination = lab.destination("users/ada");
    for (container, destination, options) in [
        (pod.container.as_str(), "UPPER/Case:tag", &[][..]),
        (&pod.container, "docker://127.0.0.1:5000/a b", &[]),
        (&pod.container, "ftp:somewhere", &[]),
        (&pod.container, &destination, &["--change", "RUN make"]),
        (&pod.container, &destination, &["--change", "ENV"]),
        (&pod.container, &destination, &["--pause", "perhaps"]),
        (&pod.container, &destination, &["--compression", "rar"]),
        (&pod.container, &destination, &["--jobs", "0"]),
        (&pod.container, &destination, &["--label", "=x"]),
        (&pod.container, &destination, &["--creds", "nocolon"]),
        (&pod.container, &destination, &["--timestamp", "yesterday"]),
        (&pod.container, &destination, &["--nonsense"]),
    ] {
        refuse(&lab.roots, container, destination, options, 2)?;
    }
    refuse(&lab.roots, "ffffffffffff", &destination, &[], 66)?;
    refuse(&lab.roots, "pid:999999999", &destination, &[], 66)?;
    ensure!(lab.registry.tags("users/ada").is_empty());
    Ok(())
}

#[test]
fn a_layer_blob_that_was_swapped_is_not_pushed() -> Result<()> {
    let Some(mut lab) = Lab::new(Base::Small, Format::Oci)? else {
        return Ok(());
    };
    let pod = lab.session()?;
    let (_, digest) = layers(&manifest(&lab.image)?).remove(0);
    // The same length but other bytes, and no registry to fetch the right ones from.
    let blob = lab.containerd.blob(&digest);
    let length = fs::metadata(&blob)?.len();
    fs::remove_file(&blob)?;
    File::create(&blob)?.set_len(length)?;
    lab.registry.kill()?;
    let other = Registry::start_named(&lab.scratch, "other", None)?;
    let saved = save(
        &lab.scratch,
        &lab.roots,
        &pod.container,
        &other.reference("users/ada:saved"),
        &[],
    );
    // Either refused or remade from the mounted directory, but never the changed bytes.
    if let Ok(saved) = saved {
        ensure!(
            layers(&manifest(&saved.reference)?)[0].1 != digest,
            "the blob does not have that digest"
        );
        let rootfs = crate::save::unpack(&lab.scratch, &saved.reference)?;
        crate::save::same_tree(
            &pod.rootfs,
            &rootfs,
            crate::save::LEFT_OUT,
            crate::save::TOUCHED_BY_RUNTIMES,
            60,
        )?;
    } else {
        ensure!(other.tags("users/ada").is_empty());
    }
    Ok(())
}
