//! Creates the base image of the demonstration: two small layers in an OCI layout, and unpacked as lower directories.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use oci_client::manifest::IMAGE_LAYER_GZIP_MEDIA_TYPE;
use serde_json::json;

use super::Error;
use crate::common::digest::Digest;
use crate::image::manifest::platform::Platform;
use crate::image::manifest::{CONFIG, MANIFEST};
use crate::store::layout::Directory;

/// A time in November 2023, clearly older than the changes in the container.
const MTIME: u64 = 1_700_000_000;

/// An entry: path (of directories with a trailing slash), mode, content.
type Item = (&'static str, u32, &'static [u8]);

/// A minimal file system that still looks like one.
const SYSTEM: &[Item] = &[
    ("data/", 0o755, b""),
    ("dev/", 0o755, b""),
    ("etc/", 0o755, b""),
    ("etc/motd", 0o644, b"Welcome to the demonstration.\n"),
    (
        "etc/os-release",
        0o644,
        b"ID=demo\nNAME=\"upperdeck demonstration\"\n",
    ),
    (
        "etc/passwd",
        0o644,
        b"root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n",
    ),
    ("home/", 0o755, b""),
    ("home/user/", 0o755, b""),
    ("opt/", 0o755, b""),
    ("opt/tool/", 0o755, b""),
    ("opt/tool/bin/", 0o755, b""),
    ("opt/tool/bin/run", 0o755, b"#!/bin/sh\necho tool 1.0\n"),
    ("opt/tool/README", 0o644, b"A tool.\n"),
    ("proc/", 0o555, b""),
    ("root/", 0o700, b""),
    ("srv/", 0o755, b""),
    ("tmp/", 0o1777, b""),
    ("usr/", 0o755, b""),
    ("usr/share/", 0o755, b""),
    ("usr/share/doc/", 0o755, b""),
    ("usr/share/doc/copyright", 0o644, b"Public domain.\n"),
    ("usr/share/doc/manual", 0o644, b"There is none.\n"),
    ("var/", 0o755, b""),
    ("var/lib/", 0o755, b""),
    ("var/lib/app/", 0o755, b""),
    ("var/lib/app/old.log", 0o644, b"everything was fine\n"),
    ("var/lib/app/state", 0o600, b"1\n"),
];

/// What an image for notebooks would add.
const NOTEBOOK: &[Item] = &[
    ("etc/", 0o755, b""),
    ("etc/app.conf", 0o644, b"colour = blue\n"),
    ("home/", 0o755, b""),
    ("home/user/", 0o755, b""),
    ("home/user/notebook.ipynb", 0o644, b"{\"cells\": []}\n"),
];

/// Writes the image to `layout` with tag `base`, and unpacks its layers to `lowers`, bottom first. If `owned`, the
/// files belong to root; else to the caller, who is root in the user namespace.
pub(super) fn make(layout: &Path, lowers: [&Path; 2], owned: bool) -> Result<(), Error> {
    let destination = Directory::new(layout);
    let (mut descriptors, mut diff_ids) = (Vec::new(), Vec::new());
    for (items, lower) in [SYSTEM, NOTEBOOK].into_iter().zip(lowers) {
        let tar = tar(items).map_err(Error::io("making the base image's tar"))?;
        let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
        gzip.write_all(&tar)
            .map_err(Error::io("compressing the base image"))?;
        let blob = Bytes::from(
            gzip.finish()
                .map_err(Error::io("compressing the base image"))?,
        );
        let digest = Digest::of(&blob);
        destination.put_blob(&blob, &digest)?;
        descriptors.push(
            json!({"mediaType": IMAGE_LAYER_GZIP_MEDIA_TYPE, "digest": digest, "size": blob.len()}),
        );
        diff_ids.push(Digest::of(&tar));
        unpack(items, &tar, lower, owned).map_err(Error::io("unpacking the base image"))?;
    }
    let config = json!({
        "architecture": Platform::host().architecture,
        "os": "linux",
        "config": {"Env": ["PATH=/usr/bin:/bin"], "Cmd": ["/bin/sh"]},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
        "history": [{"created_by": "system"}, {"created_by": "notebook"}],
    });
    let config = Bytes::from(config.to_string());
    let digest = Digest::of(&config);
    destination.put_blob(&config, &digest)?;
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": {"mediaType": CONFIG, "digest": digest, "size": config.len()},
        "layers": descriptors,
    });
    destination.put_manifest(&Bytes::from(manifest.to_string()), MANIFEST, "base")?;
    Ok(())
}

fn tar(items: &[Item]) -> io::Result<Vec<u8>> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, mode, content) in items {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(if path.ends_with('/') {
            tar::EntryType::Directory
        } else {
            tar::EntryType::Regular
        });
        header.set_mode(*mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(MTIME);
        header.set_size(content.len() as u64);
        builder.append_data(&mut header, path, *content)?;
    }
    builder.into_inner()
}

fn unpack(items: &[Item], tar: &[u8], lower: &Path, owned: bool) -> io::Result<()> {
    fs::create_dir(lower)?;
    fs::set_permissions(lower, fs::Permissions::from_mode(0o755))?;
    let mut archive = tar::Archive::new(tar);
    archive.set_preserve_permissions(true);
    archive.set_preserve_ownerships(owned);
    archive.set_preserve_mtime(true);
    archive.unpack(lower)?;
    // The tar crate sets the times of files only.
    for (path, ..) in items.iter().filter(|(path, ..)| path.ends_with('/')) {
        fs::File::open(lower.join(path))?.set_modified(UNIX_EPOCH + Duration::from_secs(MTIME))?;
    }
    Ok(())
}
