//! Saves after the surroundings of a container have changed: containerd dead, the tag on another image, blobs deleted,
//! registry gone.

use std::fs;

use anyhow::{Context, Result, ensure};

use crate::host::Freezer;
use crate::host::containerd::PodOptions;
use crate::host::image::{Base, Format, base};
use crate::host::registry::Registry;
use crate::lab::Lab;
use crate::save::{
    LEFT_OUT, TOUCHED_BY_ENGINES, TOUCHED_BY_RUNTIMES, layers, manifest, refuse, same_tree, save,
    unpack,
};

#[test]
fn with_containerd_killed_a_pod_is_saved_all_the_same() -> Result<()> {
    let Some(mut lab) = Lab::new(Base::Small, Format::Oci)? else {
        return Ok(());
    };
    let pod = lab.session()?;
    lab.containerd.kill()?;
    let name = format!("jupyter/{}", pod.name);
    let saved = save(
        &lab.scratch,
        &lab.roots,
        &name,
        &lab.destination("users/ada"),
        &[],
    )?;
    ensure!(!Freezer::of(pod.pid)?.frozen());
    let rootfs = unpack(&lab.scratch, &saved.reference)?;
    same_tree(&pod.rootfs, &rootfs, LEFT_OUT, TOUCHED_BY_RUNTIMES, 60)?;
    lab.containerd.restart()?;
    assert_eq!(
        lab.containerd.shell(&pod, "cat /usr/lib/app/main")?,
        "main\nchanged\n",
        "the pod lived on"
    );
    Ok(())
}

#[test]
fn a_tag_that_moved_is_not_the_base() -> Result<()> {
    let Some(lab) = Lab::new(Base::Small, Format::Oci)? else {
        return Ok(());
    };
    let before = manifest(&lab.image)?;
    let pod = lab.session()?;
    // The same tag refers to another image now, in the registry and on the node.
    lab.registry
        .push(&base(Base::Pause, Format::Oci)?, "bases/notebook:1")?;
    lab.containerd.pull(&lab.image)?;
    ensure!(manifest(&lab.image)? != before);
    let saved = save(
        &lab.scratch,
        &lab.roots,
        &pod.container,
        &lab.destination("users/ada"),
        &[],
    )?;
    assert_eq!(
        layers(&manifest(&saved.reference)?)[..3],
        layers(&before)[..]
    );
    let rootfs = unpack(&lab.scratch, &saved.reference)?;
    same_tree(&pod.rootfs, &rootfs, LEFT_OUT, TOUCHED_BY_RUNTIMES, 60)
}

/// Deletes the layers' blobs but not manifest and config, as `discard_unpacked_layers` does.
fn discard_layers(lab: &Lab) -> Result<()> {
    for (_, digest) in layers(&manifest(&lab.image)?) {
        fs::remove_file(lab.containerd.blob(&digest)).with_context(|| digest)?;
    }
    Ok(())
}

#[test]
fn base_layers_come_from_the_source_registry_when_the_node_has_none() -> Result<()> {
    let Some(lab) = Lab::new(Base::Small, Format::Oci)? else {
        return Ok(());
    };
    let pod = lab.session()?;
    let expected = layers(&manifest(&lab.image)?);
    discard_layers(&lab)?;
    // Another registry: no blob can be mounted there.
    let other = Registry::start_named(&lab.scratch, "other", None)?;
    let saved = save(
        &lab.scratch,
        &lab.roots,
        &pod.container,
        &other.reference("users/ada:saved"),
        &[],
    )?;
    assert_eq!(layers(&manifest(&saved.reference)?)[..3], expected[..]);
    let rootfs = unpack(&lab.scratch, &saved.reference)?;
    same_tree(&pod.rootfs, &rootfs, LEFT_OUT, TOUCHED_BY_RUNTIMES, 60)?;
    // The same registry: blobs are mounted and nothing is transferred.
    let saved = save(
        &lab.scratch,
        &lab.roots,
        &pod.container,
        &lab.destination("users/ada"),
        &[],
    )?;
    assert_eq!(layers(&manifest(&saved.reference)?)[..3], expected[..]);
    ensure!(
        saved.metadata.to_string().contains("mount"),
        "where layers came from: {}",
        saved.metadata
    );
    Ok(())
}

#[test]
fn base_layers_come_from_the_node_when_the_registry_is_gone() -> Result<()> {
    let Some(mut lab) = Lab::new(Base::Small, Format::Oci)? else {
        return Ok(());
    };
    let pod = lab.session()?;
    let expected = layers(&manifest(&lab.image)?);
    lab.registry.kill()?;
    let other = Registry::start_named(&lab.scratch, "other", None)?;
    let saved = save(
        &lab.scratch,
        &lab.roots,
        &pod.container,
        &other.reference("users/ada:saved"),
        &[],
    )?;
    assert_eq!(
        layers(&manifest(&saved.reference)?)[..3],
        expected[..],
        "byte for byte"
    );
    Ok(())
}

#[test]
fn a_base_that_is_nowhere_is_made_again_from_the_mounted_directories() -> Result<()> {
    let Some(mut lab) = Lab::new(Base::Small, Format::Oci)? else {
        return Ok(());
    };
    let pod = lab.session()?;
    let lost = layers(&manifest(&lab.image)?);
    discard_layers(&lab)?;
    lab.registry.kill()?;
    let other = Registry::start_named(&lab.scratch, "other", None)?;
    let destination = other.reference("users/ada:saved");
    let saved = save(&lab.scratch, &lab.roots, &pod.container, &destination, &[])?;
    let made = layers(&manifest(&saved.reference)?);
    ensure!(made.iter().all(|layer| !lost.contains(layer)), "{made:?}");
    let said = format!("{}{}", saved.metadata, saved.stderr);
    ensure!(
        said.contains("made again") || said.contains("rebuilt") || said.contains("remade"),
        "not said: {said}"
    );
    let rootfs = unpack(&lab.scratch, &saved.reference)?;
    same_tree(&pod.rootfs, &rootfs, LEFT_OUT, TOUCHED_BY_RUNTIMES, 60)?;
    let copy = lab
        .containerd
        .run_pod(&destination, &PodOptions::default())?;
    same_tree(&pod.rootfs, &copy.rootfs, LEFT_OUT, TOUCHED_BY_ENGINES, 60)
}

#[test]
fn a_base_without_its_config_is_not_guessed() -> Result<()> {
    let Some(lab) = Lab::new(Base::Small, Format::Oci)? else {
        return Ok(());
    };
    let pod = lab.session()?;
    let config = manifest(&lab.image)?["config"]["digest"]
        .as_str()
        .context("a config")?
        .to_owned();
    fs::remove_file(lab.containerd.blob(&config))?;
    let destination = lab.destination("users/ada");
    let said = refuse(&lab.roots, &pod.container, &destination, &[], 69)?;
    ensure!(said.contains("sha256:"), "what was compared: {said}");
    ensure!(!Freezer::of(pod.pid)?.frozen());
    ensure!(lab.registry.tags("users/ada").is_empty());
    Ok(())
}
