//! Tests of OCI layouts as destination and source: the state after a save that completes, is killed or runs
//! concurrently.
// A panic in a helper fails the test, as intended.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

#[allow(dead_code, reason = "each test program uses its part")]
#[path = "support/mod.rs"]
mod support;

use std::fs;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use bytes::Bytes;
use serde_json::{Value, json};
use upperdeck::common::digest::Digest;
use upperdeck::image::manifest::Platform;
use upperdeck::store::destination::Target;
use upperdeck::store::layout::{Archive, Directory, Error, Reader};

const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX_TYPE: &str = "application/vnd.oci.image.index.v1+json";

fn config() -> Bytes {
    json!({"architecture": "amd64", "os": "linux", "config": {}, "rootfs": {"type": "layers", "diff_ids": []}})
        .to_string()
        .into()
}

fn manifest(layers: &[&[u8]]) -> Bytes {
    let layers: Vec<Value> = layers
        .iter()
        .map(|l| json!({"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": Digest::of(l), "size": l.len()}))
        .collect();
    json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": Digest::of(config()), "size": config().len(),
        },
        "layers": layers,
    })
    .to_string()
    .into()
}

fn save_to_directory(layout: &Directory, layer: &[u8], tag: &str) -> Result<Digest, Error> {
    layout.check()?;
    let mut blob = layout.begin_blob()?;
    for piece in layer.chunks(3) {
        blob.write(piece)?;
    }
    blob.finish(&Digest::of(layer), layer.len() as u64)?;
    layout.put_blob(&config(), &Digest::of(config()))?;
    layout.put_manifest(&manifest(&[layer]), MANIFEST_TYPE, tag)
}

fn save_to_archive(archive: &Archive, layer: &[u8], tag: &str) -> Result<Digest, Error> {
    archive.check()?;
    let mut blob = archive.begin_blob();
    for piece in layer.chunks(3) {
        blob.write(piece)?;
    }
    blob.finish(&Digest::of(layer), layer.len() as u64)?;
    archive.put_blob(&config(), &Digest::of(config()))?;
    archive.put_manifest(&manifest(&[layer]), MANIFEST_TYPE, tag)
}

fn index(dir: &Path) -> Value {
    serde_json::from_slice(&fs::read(dir.join("index.json")).unwrap()).unwrap()
}

fn tags(dir: &Path) -> Vec<String> {
    let mut tags: Vec<String> = index(dir)["manifests"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| {
            m["annotations"]["org.opencontainers.image.ref.name"]
                .as_str()
                .unwrap()
                .to_owned()
        })
        .collect();
    tags.sort();
    tags
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn platform() -> Platform {
    Platform {
        architecture: "amd64".to_owned(),
        variant: None,
    }
}

#[test]
fn a_layout_has_exactly_what_was_saved() -> Result<(), Error> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("new/layout");
    let layout = Directory::new(&path);
    layout.check()?;
    assert!(!path.exists(), "a check leaves nothing behind");
    let digest = save_to_directory(&layout, b"one layer", "v1")?;
    assert_eq!(names(&path), ["blobs", "index.json", "oci-layout"]);
    let mut expected = [
        Digest::of("one layer").hex(),
        Digest::of(config()).hex(),
        digest.hex(),
    ];
    expected.sort();
    assert_eq!(names(&path.join("blobs/sha256")), expected);

    // Another image is added, then the tag is moved.
    save_to_directory(&layout, b"another", "v2")?;
    save_to_directory(&layout, b"a third", "v1")?;
    assert_eq!(tags(&path), ["v1", "v2"]);
    let reader = Reader::directory(&path)?;
    let read = reader.manifest(Some("v1"), &platform())?;
    assert_eq!(read.bytes, manifest(&[b"a third"]));
    let mut layer = String::new();
    reader
        .open_blob(&Digest::of("a third"), Some(7))?
        .read_to_string(&mut layer)
        .unwrap();
    assert_eq!(layer, "a third");
    assert_eq!(reader.blob(&Digest::of(config()))?, config());
    Ok(())
}

#[test]
fn what_is_no_layout_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("thesis.tex"), "x").unwrap();
    let error = save_to_directory(&Directory::new(dir.path()), b"x", "v1").unwrap_err();
    assert!(
        matches!(error, Error::NotALayout { .. }) && error.to_string().contains("has files"),
        "{error}"
    );
    assert_eq!(names(dir.path()), ["thesis.tex"]);
    let file = dir.path().join("thesis.tex");
    assert!(matches!(
        Directory::new(&file).check(),
        Err(Error::NotALayout { .. })
    ));
    assert!(Directory::new(file.join("below")).check().is_err());

    let dir = tempfile::tempdir().unwrap();
    for bad in ["", "{}", "[]", r#"{"imageLayoutVersion":"2.0.0"}"#] {
        fs::write(dir.path().join("oci-layout"), bad).unwrap();
        assert!(
            matches!(
                Directory::new(dir.path()).check(),
                Err(Error::NotALayout { .. })
            ),
            "{bad}"
        );
    }
    // An index that cannot be parsed is not overwritten.
    fs::write(
        dir.path().join("oci-layout"),
        r#"{"imageLayoutVersion":"1.0.0"}"#,
    )
    .unwrap();
    fs::write(dir.path().join("index.json"), "garbage").unwrap();
    let error = save_to_directory(&Directory::new(dir.path()), b"x", "v1").unwrap_err();
    assert!(matches!(error, Error::Document { .. }), "{error}");
    assert_eq!(
        fs::read_to_string(dir.path().join("index.json")).unwrap(),
        "garbage"
    );
}

#[test]
fn a_blob_counts_when_it_is_whole() -> Result<(), Error> {
    let dir = tempfile::tempdir().unwrap();
    let layout = Directory::new(dir.path().join("l"));
    let digest = Digest::of("content");
    assert_eq!(layout.has_blob(&digest, None)?, None);
    let mut dropped = layout.begin_blob()?;
    dropped.write(b"content")?;
    drop(dropped);
    let mut short = layout.begin_blob()?;
    short.write(b"cont")?;
    assert!(matches!(
        short.finish(&digest, 7),
        Err(Error::Size {
            expected: 7,
            found: 4,
            ..
        })
    ));
    assert_eq!(names(&dir.path().join("l/blobs/sha256")), [""; 0]);

    // A partial blob that another tool has left is replaced, a complete one is kept.
    let path = dir.path().join("l/blobs/sha256").join(digest.hex());
    fs::write(&path, "cont").unwrap();
    assert_eq!(layout.has_blob(&digest, Some(7))?, None);
    layout.put_blob(&"content".into(), &digest)?;
    assert_eq!(
        (fs::read(&path).unwrap(), layout.has_blob(&digest, Some(7))?),
        (b"content".to_vec(), Some(7))
    );
    assert!(matches!(
        layout.put_blob(&"other".into(), &digest),
        Err(Error::Digest { .. })
    ));
    Ok(())
}

#[test]
fn two_saves_at_once_do_not_lose_a_tag() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("layout");
    std::thread::scope(|scope| {
        for n in 0..8 {
            let path = &path;
            scope.spawn(move || {
                let layer = format!("layer {n}");
                save_to_directory(&Directory::new(path), layer.as_bytes(), &format!("v{n}"))
                    .unwrap();
            });
        }
    });
    assert_eq!(
        tags(&path),
        ["v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7"]
    );
    assert_eq!(names(&path), ["blobs", "index.json", "oci-layout"]);
}

#[test]
fn an_archive_appears_at_once_and_as_a_whole() -> Result<(), Error> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.tar");
    fs::write(&path, "an older one").unwrap();
    let archive = Archive::new(&path);
    archive.check()?;
    let mut dropped = archive.begin_blob();
    dropped.write(&[7; 1000])?;
    drop(dropped);
    archive.put_blob(&Bytes::new(), &Digest::of(""))?;
    assert_eq!(fs::read(&path).unwrap(), b"an older one");
    assert_eq!(names(dir.path()), ["image.tar"]);
    let digest = save_to_archive(&archive, b"a layer", "v1")?;
    assert_eq!(names(dir.path()), ["image.tar"]);

    let mut tar = tar::Archive::new(fs::File::open(&path).unwrap());
    let entries: Vec<(String, u64)> = tar
        .entries()
        .unwrap()
        .map(|e| e.unwrap())
        .map(|e| {
            (
                String::from_utf8(e.path_bytes().to_vec()).unwrap(),
                e.size(),
            )
        })
        .collect();
    let blob = |content: &[u8]| {
        (
            format!("blobs/sha256/{}", Digest::of(content).hex()),
            content.len() as u64,
        )
    };
    assert_eq!(
        entries[..6],
        [
            ("blobs/".to_owned(), 0),
            ("blobs/sha256/".to_owned(), 0),
            blob(b""),
            blob(b"a layer"),
            blob(&config()),
            blob(&manifest(&[b"a layer"])),
        ]
    );
    assert_eq!(
        entries
            .iter()
            .skip(6)
            .map(|e| e.0.as_str())
            .collect::<Vec<_>>(),
        ["oci-layout", "index.json"]
    );
    let reader = Reader::archive(&path)?;
    assert_eq!(reader.manifest(None, &platform())?.digest, digest);
    let mut layer = Vec::new();
    reader
        .open_blob(&Digest::of("a layer"), None)?
        .read_to_end(&mut layer)
        .unwrap();
    assert_eq!(layer, b"a layer");
    // The archive is complete and accepts nothing more.
    assert!(matches!(
        archive.put_blob(&"more".into(), &Digest::of("more")),
        Err(Error::Closed { .. })
    ));
    Ok(())
}

#[test]
fn an_archive_takes_blobs_in_turn() -> Result<(), Error> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.tar");
    let archive = Archive::new(&path);
    let layers: Vec<Vec<u8>> = (0..6_u8)
        .map(|n| vec![n; 100_000 + usize::from(n)])
        .collect();
    std::thread::scope(|scope| {
        for layer in &layers {
            let archive = archive.clone();
            scope.spawn(move || {
                let mut blob = archive.begin_blob();
                for piece in layer.chunks(1000) {
                    blob.write(piece).unwrap();
                }
                // A second copy of a blob is discarded.
                if layer[0] == 5 {
                    drop(blob);
                    return;
                }
                blob.finish(&Digest::of(layer), layer.len() as u64).unwrap();
            });
        }
    });
    let again = &layers[0];
    let mut blob = archive.begin_blob();
    blob.write(again)?;
    blob.finish(&Digest::of(again), again.len() as u64)?;
    assert_eq!(
        archive.has_blob(&Digest::of(again), Some(again.len() as u64)),
        Some(100_000)
    );
    assert_eq!(archive.has_blob(&Digest::of(&layers[5]), None), None);
    archive.put_manifest(&manifest(&[]), MANIFEST_TYPE, "v1")?;
    let reader = Reader::archive(&path)?;
    for layer in &layers[..5] {
        let mut read = Vec::new();
        reader
            .open_blob(&Digest::of(layer), Some(layer.len() as u64))?
            .read_to_end(&mut read)
            .unwrap();
        assert!(read == *layer);
    }
    assert!(fs::metadata(&path).unwrap().len() < 6 * 102_000);
    Ok(())
}

#[test]
fn places_that_take_no_archive() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(
        Archive::new(dir.path()).check(),
        Err(Error::NotALayout { .. })
    ));
    assert!(matches!(
        Archive::new("/dev/null").check(),
        Err(Error::NotALayout { .. })
    ));
    let error = Archive::new(dir.path().join("no/such/dir.tar"))
        .check()
        .unwrap_err();
    assert!(error.to_string().contains("no/such"), "{error}");
}

#[test]
fn readers_say_what_there_is() -> Result<(), Error> {
    let dir = tempfile::tempdir().unwrap();
    let layout = Directory::new(dir.path());
    save_to_directory(&layout, b"1", "v1")?;
    let reader = Reader::directory(dir.path())?;
    assert!(reader.manifest(None, &platform()).is_ok());
    save_to_directory(&layout, b"2", "v2")?;
    for (tag, expected) in [
        (None, "name one by its tag; it has: v1, v2"),
        (Some("v3"), "tagged \"v3\"; it has: v1, v2"),
    ] {
        let error = reader.manifest(tag, &platform()).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }

    // An index: the manifest for the platform is selected.
    let (one, two) = (Digest::of(manifest(&[b"1"])), Digest::of(manifest(&[b"2"])));
    let entry = |digest, architecture| json!({"mediaType": MANIFEST_TYPE, "digest": digest, "size": 1, "platform": {"os": "linux", "architecture": architecture}});
    let index = json!({"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [entry(one, "arm64"), entry(two, "amd64")]});
    layout.put_manifest(&index.to_string().into(), INDEX_TYPE, "multi")?;
    assert_eq!(reader.manifest(Some("multi"), &platform())?.digest, two);
    let s390x = Platform {
        architecture: "s390x".to_owned(),
        variant: None,
    };
    let error = reader.manifest(Some("multi"), &s390x).unwrap_err();
    assert!(
        error.to_string().contains("linux/arm64, linux/amd64"),
        "{error}"
    );

    // An index cannot contain itself; nested indexes are followed to a limited depth.
    let mut inner = index.to_string();
    for _ in 0..5 {
        let digest = Digest::of(&inner);
        layout.put_blob(&inner.into(), &digest)?;
        inner = json!({"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [
            {"mediaType": INDEX_TYPE, "digest": digest, "size": 1, "platform": {"os": "linux", "architecture": "amd64"}}
        ]})
        .to_string();
    }
    layout.put_manifest(&inner.into(), INDEX_TYPE, "deep")?;
    assert!(matches!(
        reader.manifest(Some("deep"), &platform()),
        Err(Error::Document { .. })
    ));
    Ok(())
}

#[test]
fn damaged_layouts_are_refused() -> Result<(), Error> {
    let dir = tempfile::tempdir().unwrap();
    let layout = Directory::new(dir.path());
    let digest = save_to_directory(&layout, b"content", "v1")?;
    let reader = Reader::directory(dir.path())?;
    let blob = |digest: Digest| dir.path().join("blobs/sha256").join(digest.hex());

    fs::write(blob(Digest::of("content")), "CONTENT").unwrap();
    let error = reader
        .open_blob(&Digest::of("content"), Some(7))?
        .read_to_end(&mut Vec::new())
        .unwrap_err();
    assert!(error.to_string().contains("damaged"), "{error}");
    assert!(matches!(
        reader.open_blob(&Digest::of("content"), Some(8)),
        Err(Error::Size { .. })
    ));
    assert!(matches!(
        reader.open_blob(&Digest::of("nothing"), None),
        Err(Error::NoSuchBlob { .. })
    ));
    // A FIFO must not block the reader.
    let fifo = Digest::of("fifo");
    nix::unistd::mkfifo(&blob(fifo), nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(reader.open_blob(&fifo, None).is_err());
    fs::write(blob(digest), "{}").unwrap();
    assert!(matches!(
        reader.manifest(Some("v1"), &platform()),
        Err(Error::Digest { .. })
    ));

    for garbage in [
        "",
        "[]",
        "{}",
        "{\"schemaVersion\":2,\"manifests\":[{}]}",
        "\u{0}",
        &"[".repeat(100_000),
    ] {
        fs::write(dir.path().join("index.json"), garbage).unwrap();
        assert!(reader.manifest(None, &platform()).is_err(), "{garbage:.20}");
    }
    fs::File::create(dir.path().join("index.json"))
        .unwrap()
        .set_len(1 << 40)
        .unwrap();
    assert!(reader.manifest(None, &platform()).is_err());
    fs::remove_file(dir.path().join("oci-layout")).unwrap();
    assert!(matches!(
        Reader::directory(dir.path()),
        Err(Error::NotALayout { .. })
    ));

    // Archives truncated at any offset, and files that are not archives.
    let path = dir.path().join("image.tar");
    save_to_archive(&Archive::new(&path), b"content", "v1")?;
    let whole = fs::read(&path).unwrap();
    for cut in (0..whole.len()).step_by(512) {
        let cut_off = dir.path().join("cut.tar");
        fs::write(&cut_off, &whole[..cut]).unwrap();
        let read = Reader::archive(&cut_off).and_then(|r| r.manifest(None, &platform()));
        // Only the end marker may be missing.
        assert!(
            read.is_err() || cut + 1024 >= whole.len(),
            "{cut} of {}",
            whole.len()
        );
    }
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&whole).unwrap();
    fs::write(&path, gzip.finish().unwrap()).unwrap();
    assert!(matches!(
        Reader::archive(&path),
        Err(Error::NotALayout { .. })
    ));
    Ok(())
}

/// A small file system, unmounted when dropped.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let flags = nix::mount::MsFlags::empty();
        match nix::mount::mount(
            Some("upperdeck-test"),
            dir.path(),
            Some("tmpfs"),
            flags,
            Some("size=1m"),
        ) {
            Ok(()) => Some(Self(dir)),
            Err(e) => {
                support::ignore(&format!("cannot mount a tmpfs ({e}): run as root"));
                None
            }
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = nix::mount::umount(self.0.path());
    }
}

#[test]
fn a_full_disk_leaves_the_old_image() {
    let Some(disk) = SmallDisk::mount() else {
        return;
    };
    let path = disk.0.path().join("layout");
    let layout = Directory::new(&path);
    save_to_directory(&layout, b"small", "v1").unwrap();
    let error = save_to_directory(&layout, &vec![1; 2 << 20], "v1").unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("free some space") && text.contains(&path.display().to_string()),
        "{text}"
    );
    assert!(!error.retryable() && !error.not_permitted());
    let reader = Reader::directory(&path).unwrap();
    assert_eq!(
        reader.manifest(Some("v1"), &platform()).unwrap().bytes,
        manifest(&[b"small"])
    );

    let file = disk.0.path().join("image.tar");
    let archive = Archive::new(&file);
    let error = save_to_archive(&archive, &vec![1; 2 << 20], "v1").unwrap_err();
    assert!(error.to_string().contains("image.tar"), "{error}");
    assert!(!file.exists());
}

#[test]
fn kill_9_leaves_no_rubbish() {
    // The writer runs in this test binary, in a separate process.
    let dir = tempfile::tempdir().unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "writer_to_be_killed", "--ignored", "--nocapture"])
        .env("UPPERDECK_TEST_DIR", dir.path())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = child.stdout.take().unwrap();
    let mut said = Vec::new();
    while !said.windows(7).any(|w| w == b"WRITTEN") {
        let mut some = [0; 256];
        let n = output.read(&mut some).unwrap();
        assert!(n > 0, "{}", String::from_utf8_lossy(&said));
        said.extend_from_slice(&some[..n]);
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(names(&dir.path().join("layout/blobs/sha256")), [""; 0]);
    assert_eq!(names(dir.path()), ["layout"]);
    // A repetition succeeds.
    save_to_directory(&Directory::new(dir.path().join("layout")), b"content", "v1").unwrap();
}

#[test]
#[ignore = "the victim of kill_9_leaves_no_rubbish"]
fn writer_to_be_killed() {
    let Some(dir) = std::env::var_os("UPPERDECK_TEST_DIR").map(PathBuf::from) else {
        return;
    };
    let mut blob = Directory::new(dir.join("layout")).begin_blob().unwrap();
    blob.write(&vec![1; 100_000]).unwrap();
    let mut second = Archive::new(dir.join("image.tar")).begin_blob();
    second.write(&vec![1; 100_000]).unwrap();
    println!("WRITTEN");
    std::thread::sleep(std::time::Duration::from_secs(60));
}

/// Returns `shared/oci-schema` in any parent directory of the source tree.
fn schemas() -> Option<PathBuf> {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .map(|a| a.join("shared/oci-schema"))
        .find(|dir| dir.is_dir())
}

#[test]
fn documents_follow_the_schemas() -> Result<(), Error> {
    let Some(dir) = schemas() else {
        support::ignore("no shared/oci-schema beside this tree");
        return Ok(());
    };
    let mut compiler = boon::Compiler::new();
    for file in names(&dir) {
        let schema: Value = serde_json::from_slice(&fs::read(dir.join(&file)).unwrap()).unwrap();
        // References are relative to an ID that is not one of the files.
        for base in [
            "https://opencontainers.org/schema/",
            "https://opencontainers.org/schema/image/",
        ] {
            compiler
                .add_resource(&format!("{base}{file}"), schema.clone())
                .unwrap();
        }
    }
    let mut schemas = boon::Schemas::new();
    let mut check = |file: &str, document: &Value| {
        let url = format!("https://opencontainers.org/schema/image/{file}");
        let schema = compiler
            .compile(&url, &mut schemas)
            .unwrap_or_else(|e| panic!("{file}: {e:#}"));
        schemas
            .validate(document, schema)
            .map_err(|e| e.to_string())
    };
    let dir = tempfile::tempdir().unwrap();
    let layout = Directory::new(dir.path());
    save_to_directory(&layout, b"1", "v1")?;
    save_to_directory(&layout, b"2", "x/y:2")?;
    let marker = serde_json::from_slice(&fs::read(dir.path().join("oci-layout")).unwrap()).unwrap();
    check("image-layout-schema.json", &marker).unwrap();
    check("image-index-schema.json", &index(dir.path())).unwrap();
    // The check detects invalid documents.
    let mut wrong = index(dir.path());
    wrong["manifests"][0]["digest"] = json!("nonsense");
    assert!(check("image-index-schema.json", &wrong).is_err());
    let target: Target = format!("oci:{}:x/y:2", dir.path().display())
        .parse()
        .unwrap();
    let Some((reader, tag)) = target.open_layout()? else {
        panic!("{target} is a layout")
    };
    let manifest = reader.manifest(tag, &platform())?;
    check(
        "image-manifest-schema.json",
        &serde_json::from_slice(&manifest.bytes).unwrap(),
    )
    .unwrap();
    Ok(())
}
