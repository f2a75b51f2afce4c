//! Other programs that read a saved image: skopeo, umoci, the schemas of the specification, Docker, Podman, containerd.

use std::fs;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::host::docker::Docker;
use crate::host::image::{Base, Format};
use crate::host::podman::Podman;
use crate::host::{command, run};
use crate::lab::Lab;
use crate::save::{
    LEFT_OUT, TOUCHED_BY_ENGINES, TOUCHED_BY_RUNTIMES, manifest, same_tree, save, schemas, unpack,
    unpack_layout,
};
use crate::support::{Need, ignore, ignored};

#[test]
fn skopeo_umoci_docker_and_podman_read_what_was_saved() -> Result<()> {
    if ignored(&["dockerd", "docker", "podman"].map(Need::Program)) {
        return Ok(());
    }
    for format in [Format::Oci, Format::Docker] {
        let Some(lab) = Lab::new(Base::Small, format)? else {
            return Ok(());
        };
        let pod = lab.session()?;
        let destination = lab.destination("users/ada");
        let saved = save(&lab.scratch, &lab.roots, &pod.container, &destination, &[])?;

        let source = format!("docker://{destination}");
        let inspected = run(&mut command(
            "skopeo",
            ["inspect", "--tls-verify=false", &source],
        ))?;
        let inspected: Value = serde_json::from_str(&inspected)?;
        assert_eq!(inspected["Digest"], saved.digest);
        // Conversions read every layer and check every diff ID against the config.
        for (transport, more) in [
            ("dir", None),
            ("docker-archive", None),
            ("oci", Some("v2s2")),
            ("oci-archive", Some("oci")),
        ] {
            let to = format!(
                "{transport}:{}",
                lab.scratch
                    .path()
                    .join(format!("copy-{transport}"))
                    .display()
            );
            let mut copy = command(
                "skopeo",
                ["copy", "--quiet", "--src-tls-verify=false", &source, &to],
            );
            if transport == "dir" {
                copy.args(["--format", more.unwrap_or("v2s2")]);
            }
            run(&mut copy).with_context(|| format!("{format:?} to {transport}"))?;
        }
        let rootfs = unpack(&lab.scratch, &destination)?;
        same_tree(&pod.rootfs, &rootfs, LEFT_OUT, TOUCHED_BY_RUNTIMES, 60)?;

        let docker = Docker::start(&lab.scratch)?;
        let container = docker.run("copy", &destination, &[], &[])?;
        same_tree(
            &pod.rootfs,
            &container.rootfs,
            LEFT_OUT,
            TOUCHED_BY_ENGINES,
            60,
        )
        .context("Docker")?;
        assert_eq!(
            docker.shell(&container, "cat /home/researcher/work/b.ipynb")?,
            "notebook"
        );
        let podman = Podman::new(&lab.scratch)?;
        let container = podman.run("copy", &destination, &[], &[])?;
        // Podman sets its own mode on a root that no layer describes.
        let except = [LEFT_OUT, &["."]].concat();
        same_tree(
            &pod.rootfs,
            &container.rootfs,
            &except,
            TOUCHED_BY_ENGINES,
            60,
        )
        .context("Podman")?;
        assert_eq!(
            podman.shell(&container, "cat /home/researcher/work/b.ipynb")?,
            "notebook"
        );
    }
    Ok(())
}

#[test]
fn layouts_and_archives_are_read_by_umoci_and_skopeo() -> Result<()> {
    let Some(lab) = Lab::new(Base::Small, Format::Oci)? else {
        return Ok(());
    };
    let pod = lab.session()?;
    let layout = lab.scratch.path().join("layout");
    let destination = format!("oci:{}:first", layout.display());
    let saved = save(&lab.scratch, &lab.roots, &pod.container, &destination, &[])?;
    // A second tag beside the first one, which remains.
    let second = format!("oci:{}:second", layout.display());
    save(
        &lab.scratch,
        &lab.roots,
        &pod.container,
        &second,
        &["--label", "second=yes"],
    )?;
    let tags = run(&mut command(
        "umoci",
        ["ls", "--layout", &layout.display().to_string()],
    ))?;
    ensure!(
        tags.lines().any(|tag| tag == "first") && tags.lines().any(|tag| tag == "second"),
        "{tags}"
    );
    ensure!(saved.reference.contains(&saved.digest));
    let rootfs = unpack_layout(&layout, "first")?;
    same_tree(&pod.rootfs, &rootfs, LEFT_OUT, TOUCHED_BY_RUNTIMES, 60)?;

    let archive = lab.scratch.path().join("archive.tar");
    let destination = format!("oci-archive:{}:first", archive.display());
    save(&lab.scratch, &lab.roots, &pod.container, &destination, &[])?;
    let copy = lab.scratch.path().join("from-archive");
    run(command("skopeo", ["copy", "--quiet", &destination])
        .arg(format!("oci:{}:first", copy.display())))?;
    let rootfs = unpack_layout(&copy, "first")?;
    same_tree(&pod.rootfs, &rootfs, LEFT_OUT, TOUCHED_BY_RUNTIMES, 60)
}

/// umoci 0.4 knows gzip only, and says which media type it does not accept.
#[test]
fn a_zstd_layer_is_read_by_umoci_since_0_5() -> Result<()> {
    let Some(lab) = Lab::new(Base::Small, Format::Oci)? else {
        return Ok(());
    };
    let pod = lab.session()?;
    let layout = lab.scratch.path().join("layout");
    let destination = format!("oci:{}:zstd", layout.display());
    let flags = ["--compression", "zstd"];
    save(
        &lab.scratch,
        &lab.roots,
        &pod.container,
        &destination,
        &flags,
    )?;
    let version = run(&mut command("umoci", ["--version"]))?;
    let number = version.split_whitespace().nth(2).unwrap_or_default();
    let old = number.starts_with("0.4.");
    match unpack_layout(&layout, "zstd") {
        Ok(rootfs) => {
            ensure!(!old, "{version}");
            same_tree(&pod.rootfs, &rootfs, LEFT_OUT, TOUCHED_BY_RUNTIMES, 60)
        }
        Err(error) => {
            ensure!(
                old && format!("{error:#}").contains("layer.v1.tar+zstd"),
                "{version}: {error:#}"
            );
            Ok(())
        }
    }
}

/// The schemas of image-spec, checked by an independent validator.
#[test]
fn the_schemas_of_the_specification_accept_the_image() -> Result<()> {
    let Some(schemas) = schemas() else {
        ignore("needs shared/oci-schema beside the project");
        return Ok(());
    };
    let Some(lab) = Lab::new(Base::Small, Format::Oci)? else {
        return Ok(());
    };
    let pod = lab.session()?;
    let layout = lab.scratch.path().join("layout");
    let saved = save(
        &lab.scratch,
        &lab.roots,
        &pod.container,
        &format!("oci:{}:saved", layout.display()),
        &[],
    )?;
    let blob = |digest: &str| {
        layout
            .join("blobs/sha256")
            .join(digest.trim_start_matches("sha256:"))
    };
    let manifest: Value = serde_json::from_slice(&fs::read(blob(&saved.digest))?)?;
    let config = manifest["config"]["digest"].as_str().context("a config")?;
    for (file, schema) in [
        (layout.join("oci-layout"), "image-layout-schema.json"),
        (layout.join("index.json"), "image-index-schema.json"),
        (blob(&saved.digest), "image-manifest-schema.json"),
        (blob(config), "config-schema.json"),
    ] {
        // Debian's own interpreter, because the validator is one of its packages.
        run(command("/usr/bin/python3", ["-c", VALIDATE])
            .arg(&schemas)
            .arg(schema)
            .arg(&file))
        .with_context(|| format!("{} against {schema}", file.display()))?;
    }
    Ok(())
}

/// Schemas refer to each other by URLs whose last part is the file name.
const VALIDATE: &str = r"
import json, os, sys
import jsonschema
folder, schema, document = sys.argv[1:]
load = lambda name: json.load(open(os.path.join(folder, name)))
class Beside(jsonschema.RefResolver):
    def resolve_remote(self, uri):
        return load(uri.rsplit('/', 1)[-1])
whole = load(schema)
resolver = Beside(whole.get('id', ''), whole)
jsonschema.Draft4Validator(whole, resolver=resolver).validate(json.load(open(document)))
";

/// Every manifest of the registry's repository can be read back: no incomplete image is left under a tag.
#[test]
fn a_repeated_save_moves_the_tag() -> Result<()> {
    let Some(lab) = Lab::new(Base::Small, Format::Oci)? else {
        return Ok(());
    };
    let pod = lab.session()?;
    let destination = lab.destination("users/ada");
    let first = save(&lab.scratch, &lab.roots, &pod.container, &destination, &[])?;
    lab.containerd.shell(
        &pod,
        "echo later > /home/researcher/later; rm /home/researcher/work/new",
    )?;
    let second = save(&lab.scratch, &lab.roots, &pod.container, &destination, &[])?;
    ensure!(first.digest != second.digest);
    manifest(&first.reference)?;
    let rootfs = unpack(&lab.scratch, &destination)?;
    same_tree(&pod.rootfs, &rootfs, LEFT_OUT, TOUCHED_BY_RUNTIMES, 60)
}
