//! Layers with a block index: every reader takes them, and `image cp` reads of them no more than it needs, from layouts,
//! archives and registries, and all of it where a registry or an index does not allow that.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use upperdeck::common::digest::Digest;

use super::http::{Request, Response, Server};
use super::support::{Need, find_program, ignored, program};
use super::{Outcome, Registry};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn run(program: impl AsRef<std::ffi::OsStr>, args: &[&str]) -> Result<Output> {
    let program = program.as_ref();
    let done = Command::new(program).args(args).output()?;
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(
        done.status.success(),
        "{} {args:?}: {said}",
        program.display()
    );
    Ok(done)
}

/// Bytes that do not become smaller.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}

/// A layout with an image of one layer, under the tag `x`, with files of 2 MiB and small ones between them.
struct Made {
    dir: tempfile::TempDir,
    layer: Value,
}

impl Made {
    fn new(compression: &str) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let upper = dir.path().join("upper");
        fs::create_dir_all(upper.join("data/deep/er"))?;
        for n in 0..6 {
            fs::write(
                upper.join(format!("data/deep/{n}-large")),
                noise(2 << 20, n),
            )?;
            fs::write(upper.join(format!("data/deep/{n}-small")), n.to_string())?;
        }
        fs::write(upper.join("data/deep/er/x"), "deep")?;
        fs::hard_link(upper.join("data/deep/3-small"), upper.join("z"))?;
        std::os::unix::fs::symlink("data/deep", upper.join("to-deep"))?;
        let made = Self {
            layer: Value::Null,
            dir,
        };
        let blob = made.at("blob");
        let (upper, output) = (upper.display().to_string(), blob.display().to_string());
        let args = [
            "layer",
            "--upper",
            &upper,
            "-o",
            &output,
            "--compression",
            compression,
        ];
        let said = run(program(), &args)?;
        let layer: Value = serde_json::from_slice(&said.stdout)?;
        assert!(
            layer["annotations"]["upperdeck.index"].is_string(),
            "{layer}"
        );
        fs::create_dir_all(made.at("layout/blobs/sha256"))?;
        fs::write(
            made.at("layout/oci-layout"),
            r#"{"imageLayoutVersion":"1.0.0"}"#,
        )?;
        fs::rename(blob, made.blob(&text(&layer["digest"])))?;
        let annotations = layer["annotations"].clone();
        let made = Self { layer, ..made };
        made.image(&annotations)?;
        Ok(made)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn blob(&self, digest: &str) -> PathBuf {
        self.at("layout/blobs/sha256")
            .join(&digest["sha256:".len()..])
    }

    fn layer_blob(&self) -> PathBuf {
        self.blob(&text(&self.layer["digest"]))
    }

    fn size(&self) -> u64 {
        self.layer["size"].as_u64().unwrap()
    }

    fn put(&self, document: &Value) -> Result<Value> {
        let bytes = document.to_string();
        let digest = Digest::of(&bytes).to_string();
        fs::write(self.blob(&digest), &bytes)?;
        let media_type = &document["mediaType"];
        Ok(json!({"mediaType": media_type, "digest": digest, "size": bytes.len()}))
    }

    /// Writes the image with these annotations of its layer.
    fn image(&self, annotations: &Value) -> Outcome {
        let mut config = self.put(&json!({
            "architecture": upperdeck_architecture(), "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [self.layer["diffID"]]},
            "history": [{"created_by": "upperdeck commit"}],
        }))?;
        config["mediaType"] = json!("application/vnd.oci.image.config.v1+json");
        let mut layer = json!({"annotations": annotations});
        for key in ["mediaType", "digest", "size"] {
            layer[key] = self.layer[key].clone();
        }
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [layer],
        });
        let mut listed = self.put(&manifest)?;
        listed["annotations"] = json!({"org.opencontainers.image.ref.name": "x"});
        let index = json!({"schemaVersion": 2, "manifests": [listed]});
        Ok(fs::write(self.at("layout/index.json"), index.to_string())?)
    }

    fn name(&self) -> String {
        format!("oci:{}:x", self.at("layout").display())
    }

    /// Copies a path out of an image. Returns what the program says, and the content.
    fn copy(&self, image: &str, path: &str) -> Result<(Value, Vec<u8>, String)> {
        let out = tempfile::tempdir_in(self.dir.path())?;
        let to = out.path().join("out").display().to_string();
        let source = format!("{image}:{path}");
        let args = [
            "image",
            "cp",
            "--format",
            "json",
            "--tls-verify=false",
            &source,
            &to,
        ];
        let done = run(program(), &args)?;
        let said = String::from_utf8(done.stderr)?;
        Ok((serde_json::from_slice(&done.stdout)?, fs::read(to)?, said))
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn upperdeck_architecture() -> &'static str {
    if cfg!(target_arch = "aarch64") {
        "arm64"
    } else {
        "amd64"
    }
}

/// Path, content, and the most that is read for it: blocks of 1 MiB, and the index.
fn files() -> [(&'static str, Vec<u8>, u64); 5] {
    let block = (1 << 20) + 1000;
    [
        ("/data/deep/3-small", b"3".to_vec(), 2 * block),
        ("/to-deep/4-small", b"4".to_vec(), 3 * block),
        ("/z", b"3".to_vec(), 5 * block),
        ("/data/deep/er/x", b"deep".to_vec(), 2 * block),
        ("/data/deep/2-large", noise(2 << 20, 2), 4 * block),
    ]
}

#[test]
fn every_reader_takes_a_layer_with_an_index() -> Outcome {
    for compression in ["gzip", "zstd"] {
        let made = Made::new(compression)?;
        let blob = made.layer_blob().display().to_string();
        let readers: &[(&str, String)] = match compression {
            "gzip" => &[
                ("gzip", format!("gzip -dc < '{blob}'")),
                ("busybox", format!("busybox gunzip -c < '{blob}'")),
                ("pigz", format!("pigz -dc < '{blob}'")),
                (
                    "python3",
                    format!(
                        "python3 -c 'import gzip,shutil,sys; shutil.copyfileobj(gzip.open(sys.argv[1]), sys.stdout.buffer)' '{blob}'"
                    ),
                ),
            ],
            _ => &[("zstd", format!("zstd -dc < '{blob}'"))],
        };
        let mut read = 0;
        for (program, script) in readers {
            if find_program(program).is_none() {
                continue;
            }
            let tar = run("bash", &["-c", script])?.stdout;
            assert_eq!(
                Digest::of(tar).to_string(),
                text(&made.layer["diffID"]),
                "{program}"
            );
            read += 1;
        }
        assert!(read > 0, "no reader of {compression}");
        if compression == "gzip" {
            run("tar", &["-tzf", &blob])?;
        }
        // validate reads the layer whole, and finds in it what its specification says.
        let spec = made.at("spec").display().to_string();
        run(program(), &["validate", &blob, "--write", &spec])?;
        run(program(), &["validate", &blob, "--against", &spec])?;
    }
    Ok(())
}

/// Go's readers: umoci unpacks, skopeo decompresses.
#[test]
fn umoci_and_skopeo_take_a_layer_with_an_index() -> Outcome {
    let needs = [Need::Root, Need::Program("umoci"), Need::Program("skopeo")];
    if ignored(&needs) {
        return Ok(());
    }
    for compression in ["gzip", "zstd"] {
        let made = Made::new(compression)?;
        // umoci before 0.5 reads no zstd.
        if compression == "gzip" {
            let bundle = made.at("bundle").display().to_string();
            let image = format!("{}:x", made.at("layout").display());
            run("umoci", &["unpack", "--image", &image, &bundle])?;
            let same = run(
                "diff",
                &[
                    "-r",
                    "--no-dereference",
                    &made.at("upper").display().to_string(),
                    &format!("{bundle}/rootfs"),
                ],
            )?;
            assert!(same.stdout.is_empty());
        }
        let plain = format!("dir:{}", made.at("plain").display());
        run(
            "skopeo",
            &[
                "--insecure-policy",
                "copy",
                "--dest-decompress",
                &made.name(),
                &plain,
            ],
        )?;
        let tar = made
            .at("plain")
            .join(&text(&made.layer["diffID"])["sha256:".len()..]);
        assert!(tar.exists(), "{compression}");
    }
    Ok(())
}

#[test]
fn one_file_is_read_without_the_rest() -> Outcome {
    if ignored(&[Need::Program("docker-registry"), Need::Program("skopeo")]) {
        return Ok(());
    }
    let registry = Registry::start(false)?;
    for compression in ["gzip", "zstd"] {
        let made = Made::new(compression)?;
        let archive = format!("oci-archive:{}:x", made.at("archive.tar").display());
        let remote = format!("127.0.0.1:{}/a/{compression}:x", registry.1);
        for to in [&archive, &format!("docker://{remote}")] {
            let args = [
                "--insecure-policy",
                "copy",
                "--dest-tls-verify=false",
                &made.name(),
                to,
            ];
            run("skopeo", &args)?;
        }
        for image in [made.name(), archive, remote] {
            for (path, content, most) in files() {
                let (said, found, _) = made.copy(&image, path)?;
                assert!(found == content, "{image} {path}");
                let read = said["bytes_read"].as_u64().unwrap();
                assert!(
                    read <= most && read > 0,
                    "{image} {path}: {read} of {}",
                    made.size()
                );
            }
        }
    }
    Ok(())
}

/// How a registry answers requests for a part of a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Parts {
    Given,
    Ignored,
    Refused,
    /// Only the first of them is answered with a part.
    Once,
}

/// A registry with the image of `made`. The bytes of blobs that it sends are counted by request.
fn stand_in(made: &Made, parts: Parts) -> Result<(Server, Arc<Mutex<Vec<u64>>>)> {
    let layout = made.at("layout");
    let index: Value = serde_json::from_slice(&fs::read(layout.join("index.json"))?)?;
    let manifest = text(&index["manifests"][0]["digest"]);
    let sent = Arc::new(Mutex::new(Vec::new()));
    let counted = Arc::clone(&sent);
    let layer = text(&made.layer["digest"]);
    let blob =
        move |digest: &str| fs::read(layout.join("blobs/sha256").join(&digest["sha256:".len()..]));
    let server = Server::start(move |request: Request| {
        let path = request.path.as_str();
        if path == "/v2/" {
            return Response::new(200);
        }
        if path.starts_with("/v2/a/x/manifests/") {
            return match blob(&manifest) {
                Ok(bytes) => Response::new(200)
                    .with("Content-Type", MANIFEST)
                    .body(bytes),
                Err(_) => Response::new(404),
            };
        }
        let Some(digest) = path
            .strip_prefix("/v2/a/x/blobs/")
            .filter(|digest| *digest == layer)
        else {
            return Response::new(404);
        };
        let bytes = blob(digest).unwrap();
        let mut counted = counted.lock().unwrap();
        let range = request
            .header("range")
            .strip_prefix("bytes=")
            .map(str::to_owned);
        let gives = parts == Parts::Given || parts == Parts::Once && counted.is_empty();
        match range.as_deref().and_then(|range| range.split_once('-')) {
            Some((from, to)) if gives => {
                let (from, to): (usize, usize) = (from.parse().unwrap(), to.parse().unwrap());
                counted.push((to + 1 - from) as u64);
                let range = format!("bytes {from}-{to}/{}", bytes.len());
                Response::new(206)
                    .with("Content-Range", range)
                    .body(&bytes[from..=to])
            }
            Some(_) if parts == Parts::Refused => Response::new(416),
            _ => {
                counted.push(bytes.len() as u64);
                Response::new(200).body(bytes)
            }
        }
    })?;
    Ok((server, sent))
}

#[test]
fn a_registry_that_delivers_no_parts_is_read_whole() -> Outcome {
    let made = Made::new("gzip")?;
    for parts in [Parts::Given, Parts::Ignored, Parts::Refused, Parts::Once] {
        let (server, sent) = stand_in(&made, parts)?;
        let image = format!("{}/a/x:x", server.address);
        let (said, content, _) = made.copy(&image, "/data/deep/3-small")?;
        assert_eq!(content, b"3", "{parts:?}");
        let sent = sent.lock().unwrap().clone();
        let read = said["bytes_read"].as_u64().unwrap();
        if parts == Parts::Given {
            // The index, and one run of blocks.
            assert_eq!(sent.len(), 2, "{sent:?}");
            assert_eq!(sent.iter().sum::<u64>(), read);
            assert!(read < 3 << 20, "{read}");
        } else {
            assert!(read >= made.size(), "{parts:?}: {read}");
            assert!(sent.contains(&made.size()), "{parts:?}: {sent:?}");
        }
    }
    // A path that is not there: the index alone says so.
    let (server, sent) = stand_in(&made, Parts::Given)?;
    let source = format!("{}/a/x:x:/data/deep/absent", server.address);
    let done = Command::new(program())
        .args(["image", "cp", "--tls-verify=false", &source])
        .arg(made.at("absent"))
        .output()?;
    assert_eq!(done.status.code(), Some(66), "{done:?}");
    assert_eq!(sent.lock().unwrap().len(), 1);
    Ok(())
}

/// Changes one byte of a file.
fn damage(file: &Path, at: u64) -> Outcome {
    let mut bytes = fs::read(file)?;
    bytes[at as usize] ^= 1;
    Ok(fs::write(file, bytes)?)
}

#[test]
fn what_is_read_is_verified() -> Outcome {
    let made = Made::new("gzip")?;
    let annotation = text(&made.layer["annotations"]["upperdeck.index"]);
    let (at, digest) = annotation.split_once(' ').ok_or("no digest")?;
    let (offset, length) = at.split_once('+').ok_or("no length")?;
    let (offset, length): (u64, u64) = (offset.parse()?, length.parse()?);
    let other = Digest::of("other");
    // An annotation that is wrong: the layer is read whole.
    for wrong in [
        String::new(),
        "x".repeat(100_000),
        format!("{at} {other}"),
        format!("{offset}+{} {digest}", length + 1),
        format!("{}+{length} {digest}", offset - 1),
        format!("{offset}+{} {digest}", u64::MAX),
        format!("0+{} {digest}", 1u64 << 40),
    ] {
        made.image(&json!({"upperdeck.index": wrong}))?;
        let (said, content, warned) = made.copy(&made.name(), "/data/deep/3-small")?;
        assert_eq!(content, b"3");
        assert!(
            said["bytes_read"].as_u64().unwrap() >= made.size(),
            "{wrong:.80}"
        );
        assert!(warned.contains("its index is not used"), "{warned}");
    }
    made.image(&made.layer["annotations"])?;
    // Damage elsewhere in the layer is not noticed, in the blocks that are read it is.
    let blob = made.layer_blob();
    damage(&blob, 5000)?;
    assert_eq!(made.copy(&made.name(), "/data/deep/5-small")?.1, b"5");
    let to = made.at("damaged");
    let done = Command::new(program())
        .args([
            "image",
            "cp",
            &format!("{}:/data/deep/0-large", made.name()),
        ])
        .arg(&to)
        .output()?;
    assert_eq!(done.status.code(), Some(1), "{done:?}");
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(said.contains("the copy of a layer is damaged"), "{said}");
    assert!(!to.exists());
    // Of a damaged index, the layer is read whole, and its digest does not match.
    damage(&blob, 5000)?;
    damage(&blob, offset + 20)?;
    let done = Command::new(program())
        .args([
            "image",
            "cp",
            &format!("{}:/data/deep/5-small", made.name()),
        ])
        .arg(&to)
        .output()?;
    assert_eq!(done.status.code(), Some(1), "{done:?}");
    assert!(String::from_utf8_lossy(&done.stderr).contains("the copy is damaged"));
    Ok(())
}

/// One layer for several has an index as well.
#[test]
fn a_squashed_layer_has_an_index() -> Outcome {
    let made = Made::new("gzip")?;
    // Without an annotation, so that only the new layer can be read by index.
    made.image(&json!({}))?;
    for compression in ["gzip", "zstd"] {
        let new = format!("oci:{}:{compression}", made.at("layout").display());
        let args = [
            "image",
            "squash",
            "--compression",
            compression,
            &made.name(),
            &new,
        ];
        run(program(), &args)?;
        for (path, content, most) in files() {
            let (said, found, _) = made.copy(&new, path)?;
            assert!(found == content, "{path}");
            let read = said["bytes_read"].as_u64().unwrap();
            assert!(read <= most, "{compression} {path}: {read}");
        }
    }
    Ok(())
}
