//! Overlays with all mount options that a kernel offers, under processes that belong to no engine (`pid:N` with
//! `--base`).

use anyhow::{Context, Result, ensure};

use crate::host::process::{Mount, Process};
use crate::host::registry::Registry;
use crate::host::{Freezer, Roots, Scratch};
use crate::save::{
    LEFT_OUT, TOUCHED_BY_RUNTIMES, TREE, WORK, refuse, same_tree_by, save, set_attributes,
    unpack_layout,
};
use crate::support::{Need, ignored};

fn scratch() -> Result<Option<Scratch>> {
    let mut needs = [
        "buildah", "skopeo", "umoci", "busybox", "python3", "setfattr", "setfacl", "unshare",
        "nsenter", "tar",
    ]
    .map(Need::Program)
    .to_vec();
    needs.push(Need::Root);
    if ignored(&needs) {
        Ok(None)
    } else {
        Scratch::new().map(Some)
    }
}

/// Does some work, saves by process ID, unpacks and compares.
fn round_trip(mount: &Mount<'_>, more_work: &str) -> Result<()> {
    let Some(scratch) = scratch()? else {
        return Ok(());
    };
    let process = Process::start(&scratch, mount)?;
    // No device nodes can be created in a user namespace. There, the kernel also shows the two names of a linked lower
    // file as two files while the first one is cached.
    let work: Vec<&str> = WORK
        .lines()
        .filter(|line| {
            mount.shift == 0 || !(line.starts_with("mknod") || line.starts_with("ln /var/lib"))
        })
        .collect();
    process.shell(&work.join("\n"))?;
    set_attributes(process.pid, mount.shift == 0)?;
    process.shell(more_work)?;
    let layout = scratch.path().join("saved");
    let destination = format!("oci:{}:saved", layout.display());
    let container = format!("pid:{}", process.pid);
    save(
        &scratch,
        &Roots::none(&scratch),
        &container,
        &destination,
        &["--base", &process.base],
    )?;
    ensure!(!Freezer::of(process.pid)?.frozen());
    let rootfs = unpack_layout(&layout, "saved")?;
    // In the namespace of the merged view, with the host's own interpreter.
    let mut compare = process.enter(false);
    compare.args(["python3", TREE, "--shift", &mount.shift.to_string()]);
    let except: Vec<&str> = LEFT_OUT.iter().chain(&["dev"]).copied().collect();
    same_tree_by(
        compare,
        &process.merged,
        &rootfs,
        &except,
        TOUCHED_BY_RUNTIMES,
        60,
    )
}

#[test]
fn a_plain_overlay() -> Result<()> {
    round_trip(&Mount::default(), "true")
}

#[test]
fn a_base_in_a_registry_is_downloaded_for_its_first_proof_only() -> Result<()> {
    if ignored(&[Need::Program("docker-registry")]) {
        return Ok(());
    }
    let Some(scratch) = scratch()? else {
        return Ok(());
    };
    let registry = Registry::start(&scratch)?;
    let process = Process::start(&scratch, &Mount::default())?;
    let base = registry.push(&process.base, "base:1")?;
    let state = scratch.path().join("state").display().to_string();
    let options = [
        "--base",
        &base,
        "--tls-verify=false",
        "--full",
        "--state-dir",
        &state,
    ];
    let mut read = Vec::new();
    for tag in ["first", "second"] {
        save(
            &scratch,
            &Roots::none(&scratch),
            &format!("pid:{}", process.pid),
            &registry.reference(&format!("sessions/alice:{tag}")),
            &options,
        )?;
        read.push(registry.blobs_read("base"));
    }
    ensure!(read[0] > 1, "layers and config are read: {read:?}");
    ensure!(
        read[1] - read[0] == 1,
        "the config alone is read again: {read:?}"
    );
    Ok(())
}

/// The third name of a link group is removed first: a group of which only some names are in a renamed directory is
/// split (README, limits).
#[test]
fn redirected_directories_and_metadata_copies_are_resolved() -> Result<()> {
    let mount = Mount {
        options: "redirect_dir=on,metacopy=on",
        ..Mount::default()
    };
    round_trip(
        &mount,
        "rm /var/lib/data/main-elsewhere; mv /usr/lib/app /usr/lib/application; mv /usr/lib/application/plugins /srv/plugins; mkdir /usr/lib/app; \
         echo new > /usr/lib/app/main; chmod 600 /var/lib/data/noise; chown 5:6 /var/lib/data/hole; \
         mv /var/lib/data/hole /var/lib/data/hole-moved; rm /srv/plugins/p1",
    )
}

#[test]
fn user_attributes_serve_as_the_trusted_ones() -> Result<()> {
    round_trip(
        &Mount {
            options: "userxattr",
            prefix: "user",
            ..Mount::default()
        },
        "true",
    )
}

#[test]
fn a_hundred_lowers_with_relative_names() -> Result<()> {
    round_trip(
        &Mount {
            relative: true,
            more_layers: 97,
            ..Mount::default()
        },
        "rm /opt/stack/only-96; echo mine > /opt/stack/every; rm -rf /opt/stack/only-0",
    )
}

#[test]
fn owners_of_a_user_namespace_are_mapped_back() -> Result<()> {
    round_trip(
        &Mount {
            options: "userxattr",
            prefix: "user",
            shift: 200_000,
            ..Mount::default()
        },
        "true",
    )
}

/// The names that changed with it are not in the upper: it is refused with its path, never saved in part.
#[test]
fn a_link_group_that_changed_as_one_is_refused() -> Result<()> {
    let Some(scratch) = scratch()? else {
        return Ok(());
    };
    let mount = Mount {
        options: "index=on",
        ..Mount::default()
    };
    let process = Process::start(&scratch, &mount)?;
    let container = format!("pid:{}", process.pid);
    let destination = format!("oci:{}:saved", scratch.path().join("saved").display());
    let roots = Roots::none(&scratch);
    process.shell("echo mine > /root/mine")?;
    save(
        &scratch,
        &roots,
        &container,
        &destination,
        &["--base", &process.base],
    )?;
    process.shell("echo more >> /var/lib/data/main-elsewhere")?;
    let said = refuse(
        &roots,
        &container,
        &destination,
        &["--base", &process.base],
        1,
    )?;
    ensure!(said.contains("var/lib/data/main-elsewhere"), "{said}");
    Ok(())
}

#[test]
fn a_base_that_is_another_image_is_refused() -> Result<()> {
    use crate::host::image::{Base, Format, base};
    let Some(scratch) = scratch()? else {
        return Ok(());
    };
    let process = Process::start(&scratch, &Mount::default())?;
    let destination = format!("oci:{}:saved", scratch.path().join("saved").display());
    let container = format!("pid:{}", process.pid);
    let roots = Roots::none(&scratch);
    let other = base(Base::Pause, Format::Oci)?;
    refuse(&roots, &container, &destination, &["--base", &other], 69)
        .context("one layer, three lowers")?;
    refuse(&roots, &container, &destination, &[], 69).context("no base at all")?;
    Ok(())
}
