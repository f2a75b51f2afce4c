//! Containers with a user namespace over layers with other IDs, which are mounted ID-mapped.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use anyhow::{Result, ensure};

use crate::host::Scratch;
use crate::host::docker::Docker;
use crate::host::image::{Base, Format, base};
use crate::host::podman::Podman;
use crate::host::registry::Registry;
use crate::host::{output, run};
use crate::save::{failed, save, unpack_layout, upperdeck};
use crate::support::{Need, ignore, ignored};

/// New, changed, copied up but unchanged, linked, moved with its contents, and created by a user.
const WORK: &str = "
mkdir -p /home/u; echo new > /home/u/new; chown -R 1000:1001 /home/u
echo more >> /usr/lib/app/main
touch -r /usr/lib/app/plugins/p1 /tmp/p1-time; chmod 600 /usr/lib/app/plugins/p1; chmod 644 /usr/lib/app/plugins/p1
touch -r /tmp/p1-time /usr/lib/app/plugins/p1
ln /usr/lib/app/plugins/p3 /root/linked
chown 7:8 /usr/lib/app/plugins
rm -rf /srv/share
";

/// Owners by path, as `find` lists them in the container and in the unpacked image.
const LIST: &str =
    "cd \"$0\"; find usr home opt srv root var etc/passwd -exec stat -c '%u %g %n' {} + | sort -k3";

#[test]
fn lowers_that_podman_maps_have_the_owners_that_the_container_sees() -> Result<()> {
    let programs = [
        "podman",
        "conmon",
        "runc",
        "buildah",
        "skopeo",
        "docker-registry",
        "umoci",
        "find",
    ];
    let mut needs = programs.map(Need::Program).to_vec();
    needs.push(Need::Root);
    if ignored(&needs) {
        return Ok(());
    }
    let scratch = Scratch::new()?;
    // The container's root must be able to traverse it.
    fs::set_permissions(scratch.path(), fs::Permissions::from_mode(0o711))?;
    let registry = Registry::start(&scratch)?;
    let image = registry.push(&base(Base::Small, Format::Oci)?, "bases/notebook:1")?;
    let podman = Podman::new(&scratch)?;
    let roots = podman.roots(&scratch);
    podman.podman(["pull", "--quiet", "--tls-verify=false", &image])?;
    let map = "0:100000:65536";
    let id = podman.podman([
        "run",
        "-d",
        "--network",
        "none",
        "--pull",
        "never",
        "--uidmap",
        map,
        "--gidmap",
        map,
        &image,
        "/bin/sleep",
        "100000",
    ])?;
    podman.podman(["exec", "--user", "0", &id, "/bin/sh", "-ec", WORK])?;

    let layout = scratch.path().join("saved");
    let destination = format!("oci:{}:saved", layout.display());
    let saved = save(&scratch, &roots, &id, &destination, &["--state-dir", ""])?;
    let rootfs = unpack_layout(&layout, "saved")?;
    let inside = podman.podman(["exec", "--user", "0", &id, "/bin/sh", "-ec", LIST, "/"])?;
    let unpacked = run(crate::host::command("sh", ["-ec", LIST]).arg(&rootfs))?;
    let left_out = |line: &&str| !line.contains("/.cache") && !line.contains("/.ssh");
    let lines =
        |text: &str| -> Vec<String> { text.lines().filter(left_out).map(str::to_owned).collect() };
    ensure!(lines(&inside).len() > 30, "{inside}");
    ensure!(
        lines(&inside) == lines(&unpacked),
        "in the container:\n{inside}\nunpacked:\n{unpacked}"
    );
    let owner = |path: &str| -> Result<(u32, u32)> {
        let there = fs::symlink_metadata(rootfs.join(path))?;
        Ok((there.uid(), there.gid()))
    };
    ensure!(owner("home/u/new")? == (1000, 1001));
    ensure!(owner("usr/lib/app/main")? == (0, 0));
    ensure!(owner("usr/lib/app/plugins")? == (7, 8));

    // A file that was copied up without a change is not a change.
    let changes = run(upperdeck("diff", &roots).arg(&id))?;
    ensure!(!changes.contains("plugins/p1"), "{changes}");
    ensure!(changes.contains("usr/lib/app/main"), "{changes}");

    // The base is compared with the lowers by content, and its layers are remade from them.
    drop(registry);
    let given = base(Base::Small, Format::Oci)?;
    for (name, options) in [
        ("based", &["--state-dir", "", "--base", given.as_str()][..]),
        ("remade", &["--state-dir", ""]),
    ] {
        let layout = scratch.path().join(name);
        let destination = format!("oci:{}:saved", layout.display());
        let again = save(&scratch, &roots, &id, &destination, options)?;
        let is_remade = again.stderr.contains("made again from its directory");
        ensure!(is_remade == (name == "remade"), "{}", again.stderr);
        let rootfs = unpack_layout(&layout, "saved")?;
        let unpacked = run(crate::host::command("sh", ["-ec", LIST]).arg(&rootfs))?;
        ensure!(lines(&inside) == lines(&unpacked), "{name}:\n{unpacked}");
    }
    ensure!(!saved.stderr.contains("made again"), "{}", saved.stderr);
    Ok(())
}

/// `dockerd --userns-remap`: a container with its IDs gets the owners that it sees; one with `--userns=host`, whose own
/// files have other IDs than those of its base, is refused.
#[test]
fn owners_in_a_store_of_userns_remap_are_those_of_the_container_or_it_is_refused() -> Result<()> {
    let programs = [
        "dockerd",
        "docker",
        "runc",
        "buildah",
        "skopeo",
        "docker-registry",
        "umoci",
        "find",
        "unshare",
    ];
    let mut needs = programs.map(Need::Program).to_vec();
    needs.push(Need::Root);
    if ignored(&needs) {
        return Ok(());
    }
    if !Path::new("/etc/subuid").exists() || !Path::new("/etc/subgid").exists() {
        ignore("needs /etc/subuid and /etc/subgid");
        return Ok(());
    }
    let scratch = Scratch::new()?;
    fs::set_permissions(scratch.path(), fs::Permissions::from_mode(0o711))?;
    let registry = Registry::start(&scratch)?;
    let image = registry.push(&base(Base::Small, Format::Docker)?, "bases/notebook:1")?;
    let docker = Docker::remapped(&scratch)?;
    let roots = docker.roots(&scratch);
    let own = docker.run("own", &image, &[], &["/bin/sleep", "100000"])?;
    docker.shell(&own, WORK)?;
    let on_disk = fs::metadata(own.rootfs.join("home/u/new"))?;
    ensure!(
        on_disk.uid() == 201_000,
        "no ids of its own: {}",
        on_disk.uid()
    );
    let layout = scratch.path().join("saved");
    let destination = format!("oci:{}:saved", layout.display());
    save(&scratch, &roots, "own", &destination, &[])?;
    let rootfs = unpack_layout(&layout, "saved")?;
    let inside = docker.docker(["exec", "--user", "0", "own", "/bin/sh", "-ec", LIST, "/"])?;
    let unpacked = run(crate::host::command("sh", ["-ec", LIST]).arg(&rootfs))?;
    let lines = |text: &str| -> Vec<String> {
        let left_out = |line: &&str| !line.contains("/.cache") && !line.contains("/.ssh");
        text.lines().filter(left_out).map(str::to_owned).collect()
    };
    ensure!(lines(&inside).len() > 30, "{inside}");
    ensure!(
        lines(&inside) == lines(&unpacked),
        "in the container:\n{inside}\nunpacked:\n{unpacked}"
    );

    let host = docker.run(
        "host",
        &image,
        &["--userns=host"],
        &["/bin/sleep", "100000"],
    )?;
    docker.shell(
        &host,
        "echo more >> /usr/lib/app/main; echo new > /root/new",
    )?;
    let layout = scratch.path().join("refused");
    let mut commit = upperdeck("commit", &roots);
    commit.args(["host", &format!("oci:{}:saved", layout.display())]);
    let said = failed(&output(&mut commit)?, 1)?;
    ensure!(said.contains("200000:200000 (userns-remap)"), "{said}");
    ensure!(
        !layout.join("index.json").exists(),
        "an image of a save that was refused"
    );
    Ok(())
}
