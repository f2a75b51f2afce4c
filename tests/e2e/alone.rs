//! The program in a container that has nothing else: no shell, no user database, no certificates, no /etc.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::host::command;
use crate::host::image::Format;
use crate::host::podman::Podman;
use crate::lab::engine;
use crate::save::{LEFT_OUT, TOUCHED_BY_ENGINES, WORK, same_tree, set_attributes, unpack};
use crate::support::{note, program};

/// Copies the program to `/upperdeck` below `root`. A program that is not static gets its loader and libraries, and
/// nothing else.
fn place(root: &Path) -> Result<()> {
    fs::copy(program(), root.join("upperdeck")).context(program())?;
    let linked = command("ldd", [program()]).output()?;
    if !linked.status.success() {
        return Ok(());
    }
    // What is said to be for musl is tested as such.
    ensure!(
        !program().contains("-linux-musl"),
        "{} needs libraries",
        program()
    );
    note("the program is not static: its libraries are in the container, too");
    let listed = String::from_utf8(linked.stdout)?;
    for library in listed
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
    {
        let place = root.join(library.trim_start_matches('/'));
        fs::create_dir_all(place.parent().context("a directory")?)?;
        fs::copy(library, place).with_context(|| library.to_owned())?;
    }
    Ok(())
}

#[test]
fn the_program_alone_in_a_container_saves_another() -> Result<()> {
    let programs = ["podman", "conmon", "runc", "setfattr", "setfacl", "ldd"];
    let Some((scratch, registry, image)) = engine(&programs, Format::Oci)? else {
        return Ok(());
    };
    let podman = Podman::new(&scratch)?;
    let session = podman.run("session", &image, &[], &[])?;
    podman.shell(&session, WORK)?;
    set_attributes(session.pid, true)?;

    let empty = scratch.dir("empty")?;
    place(&empty)?;
    let roots = podman.roots(&scratch).flags();
    let rootfs = empty.display().to_string();
    let destination = registry.reference("alone/notebook:saved");
    let mut arguments = vec![
        "run",
        "--rm",
        "--privileged",
        "--read-only",
        "--pid",
        "host",
        "--cgroupns",
        "host",
        "--network",
        "host",
        "--volume",
        "/:/host:rslave",
        "--rootfs",
        &rootfs,
        "/upperdeck",
        "commit",
        "--host-root",
        "/host",
        "--state-dir",
        "",
        "--progress",
        "none",
    ];
    arguments.extend(roots.iter().map(String::as_str));
    arguments.extend(["session", &destination]);
    let saved = podman.podman(arguments)?;
    let reference = saved.lines().last().unwrap_or_default();
    ensure!(reference.contains("@sha256:"), "{saved}");

    // Podman sets its own mode on a root that no layer of the base describes.
    let except: Vec<&str> = LEFT_OUT.iter().chain(&["."]).copied().collect();
    same_tree(
        &session.rootfs,
        &unpack(&scratch, reference)?,
        &except,
        TOUCHED_BY_ENGINES,
        60,
    )?;
    Ok(())
}
