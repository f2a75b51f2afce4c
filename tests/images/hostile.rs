//! `image cp` of images that were made to lead it elsewhere: nothing is written outside of the destination, and what is
//! wrong is refused or reported.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::json;
use upperdeck::common::digest::Digest;

use super::Outcome;
use super::support::program;

/// Name, type, and content or target.
type Row<'a> = (&'a str, u8, &'a str);

fn tar(rows: &[Row<'_>]) -> Vec<u8> {
    let mut out = Vec::new();
    for &(name, kind, text) in rows {
        let mut header = tar::Header::new_ustar();
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_entry_type(tar::EntryType::new(kind));
        header.set_mode(if kind == b'5' { 0o755 } else { 0o666 });
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1);
        let content = if kind == b'0' { text } else { "" };
        if kind != b'0' {
            header.as_old_mut().linkname[..text.len()].copy_from_slice(text.as_bytes());
        }
        header.set_size(content.len() as u64);
        header.set_cksum();
        out.extend_from_slice(header.as_bytes());
        out.extend_from_slice(content.as_bytes());
        out.resize(out.len().next_multiple_of(512), 0);
    }
    out.resize(out.len() + 1024, 0);
    out
}

struct Place(tempfile::TempDir);

impl Place {
    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn blob(&self, bytes: &[u8]) -> std::io::Result<Digest> {
        let digest = Digest::of(bytes);
        fs::create_dir_all(self.at("layout/blobs/sha256"))?;
        fs::write(self.at("layout/blobs/sha256").join(digest.hex()), bytes)?;
        Ok(digest)
    }

    /// Writes a layout with one image.
    fn image(&self, layers: &[Vec<u8>]) -> std::io::Result<Vec<Digest>> {
        let digests = layers.iter().map(|layer| self.blob(layer));
        let digests = digests.collect::<std::io::Result<Vec<_>>>()?;
        let config = json!({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": digests}});
        let config = config.to_string();
        let of = |(layer, digest): (&Vec<u8>, &Digest)| json!({"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest, "size": layer.len()});
        let listed: Vec<_> = layers.iter().zip(&digests).map(of).collect();
        let media_type = "application/vnd.oci.image.manifest.v1+json";
        let manifest = json!({"schemaVersion": 2, "mediaType": media_type, "layers": listed, "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": self.blob(config.as_bytes())?, "size": config.len(),
        }});
        let manifest = manifest.to_string();
        let index = json!({"schemaVersion": 2, "manifests": [{
            "mediaType": media_type, "digest": self.blob(manifest.as_bytes())?, "size": manifest.len(),
        }]});
        fs::write(self.at("layout/index.json"), index.to_string())?;
        fs::write(
            self.at("layout/oci-layout"),
            r#"{"imageLayoutVersion":"1.0.0"}"#,
        )?;
        Ok(digests)
    }

    fn copy(&self, path: &str, to: &Path) -> std::io::Result<Output> {
        let source = format!("oci:{}:{path}", self.at("layout").display());
        Command::new(program())
            .args(["image", "cp", &source])
            .arg(to)
            .output()
    }
}

/// Rows of layers, the path that is copied, exit code, and the names in the destination afterwards.
type Case<'a> = (&'a [&'a [Row<'a>]], &'a str, i32, &'a [&'a str]);

#[test]
fn nothing_is_written_outside_of_the_destination() -> Outcome {
    let a: Row<'_> = ("a/", b'5', "");
    let many: Vec<String> = (0..100_000).map(|n| format!("m/{n}")).collect();
    let many: Vec<Row<'_>> = [("m/", b'5', "")]
        .into_iter()
        .chain(many.iter().map(|name| (name.as_str(), b'0', "x")))
        .collect();
    let cases: &[Case<'_>] = &[
        (&[&[a, ("a/../../evil", b'0', "x")]], "/a", 1, &[]),
        (&[&[a, ("/a/abs", b'0', "x")]], "/a", 0, &["abs"]),
        // A link that leaves the image for the machine's files, and an entry through it.
        (
            &[&[a, ("a/l", b'2', "/tmp"), ("a/l/upperdeck-evil", b'0', "x")]],
            "/a",
            0,
            &["l"],
        ),
        (&[&[a, ("a/etc", b'2', "/etc")]], "/a/etc/passwd", 66, &[]),
        (
            &[&[a, ("a/up", b'2', "../../../../../../etc")]],
            "/a/up/passwd",
            66,
            &[],
        ),
        (&[&[a, ("a/p", b'1', "../../etc/passwd")]], "/a", 1, &[]),
        (&[&[a, ("a/p", b'1', "/etc/passwd")]], "/a", 1, &[]),
        (
            &[&[("f", b'0', "x"), a, ("a/p", b'1', "f"), ("a/q", b'1', "f")]],
            "/a",
            0,
            &["p", "q"],
        ),
        (
            &[&[a, ("a/sda", b'4', ""), ("a/f", b'0', "x")]],
            "/a",
            0,
            &["f"],
        ),
        (&[&[a, ("a/sda", b'4', "")]], "/a/sda", 1, &[]),
        (
            &[
                &[a, ("a/b/", b'5', ""), ("a/b/c", b'0', "x")],
                &[(".wh.a", b'0', "")],
            ],
            "/a/b/c",
            66,
            &[],
        ),
        (
            &[&[a, ("a/b", b'0', "x")], &[(".wh.a", b'0', "")], &[a]],
            "/a",
            0,
            &[],
        ),
        (
            &[
                &[a, ("a/b/", b'5', ""), ("a/b/c", b'0', "x")],
                &[a, ("a/b", b'0', "y")],
            ],
            "/a",
            0,
            &["b"],
        ),
        (&[&[("x", b'2', "y"), ("y", b'2', "x")]], "/x/z", 66, &[]),
        (&[&many], "/m/99999", 0, &[]),
    ];
    for (layers, path, code, names) in cases {
        let place = Place(tempfile::tempdir()?);
        let layers: Vec<Vec<u8>> = layers.iter().map(|rows| tar(rows)).collect();
        place.image(&layers)?;
        fs::create_dir(place.at("around"))?;
        let to = place.at("around/to");
        let done = place.copy(path, &to)?;
        assert_eq!(done.status.code(), Some(*code), "{path}: {done:?}");
        let mut found: Vec<String> = fs::read_dir(&to)
            .into_iter()
            .flatten()
            .map(|entry| entry.map(|e| e.file_name().to_string_lossy().into_owned()))
            .collect::<std::io::Result<_>>()?;
        found.sort();
        assert_eq!(found, *names, "{path}: {done:?}");
        let beside: Vec<_> = fs::read_dir(place.at("around"))?.collect();
        assert!(beside.len() <= 1, "{path}: {beside:?}");
    }
    assert!(!Path::new("/tmp/upperdeck-evil").exists());
    Ok(())
}

#[test]
fn links_in_the_destination_are_not_followed_and_a_damaged_layer_writes_nothing() -> Outcome {
    let place = Place(tempfile::tempdir()?);
    let layer = tar(&[("a/", b'5', ""), ("a/f", b'0', "new"), ("a/g", b'1', "a/f")]);
    let digests = place.image(&[layer])?;
    let (outside, to) = (place.at("outside"), place.at("to"));
    fs::create_dir(&outside)?;
    fs::create_dir(&to)?;
    fs::write(outside.join("f"), "old")?;
    // The directory is a link.
    symlink("../outside", to.join("a"))?;
    let refused = place.copy("/a", &to)?;
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    // A file is a link, or has another name elsewhere.
    fs::remove_file(to.join("a"))?;
    fs::create_dir(to.join("a"))?;
    symlink("../../outside/f", to.join("a/f"))?;
    fs::hard_link(outside.join("f"), to.join("a/g"))?;
    let done = place.copy("/a", &to)?;
    assert!(done.status.success(), "{done:?}");
    let (f, g) = (
        fs::symlink_metadata(to.join("a/f"))?,
        fs::metadata(to.join("a/g"))?,
    );
    assert!(f.is_file() && f.ino() == g.ino(), "the image's hard link");
    assert_eq!(fs::read_to_string(to.join("a/g"))?, "new");
    assert_eq!(fs::read_to_string(outside.join("f"))?, "old");
    assert_eq!(
        fs::read_dir(to.join("a"))?.count(),
        2,
        "a temporary name is left"
    );
    // A directory does not become a file, and a file no directory.
    fs::create_dir(to.join("f"))?;
    assert_eq!(place.copy("/a/f", &to)?.status.code(), Some(1));
    assert_eq!(place.copy("/a", &to.join("a/f"))?.status.code(), Some(1));

    let blob = place.at("layout/blobs/sha256").join(digests[0].hex());
    let mut bytes = fs::read(&blob)?;
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&blob, bytes)?;
    let damaged = place.copy("/a/f", &place.at("damaged"))?;
    assert_eq!(damaged.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&damaged.stderr).contains("the copy is damaged"));
    assert!(!place.at("damaged").exists());
    Ok(())
}
