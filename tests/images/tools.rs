//! `image cp`, `image diff` and `image squash`, compared with what umoci unpacks from images that umoci and skopeo made,
//! with gzip and zstd layers, in layouts and a registry.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use super::support::{Need, ignored, program};
use super::{Outcome, Registry};

/// Owner of the test's files that need not be the user's.
const NEEDS: [Need<'_>; 4] = [
    Need::Root,
    Need::Program("umoci"),
    Need::Program("skopeo"),
    Need::Program("setfattr"),
];

fn run(program: &str, args: &[&str]) -> Result<Output, Box<dyn std::error::Error>> {
    let done = Command::new(program).args(args).output()?;
    if !done.status.success() {
        let said = String::from_utf8_lossy(&done.stderr);
        return Err(format!("{program} {args:?}: {said}").into());
    }
    Ok(done)
}

fn upperdeck(args: &[&str]) -> std::io::Result<Output> {
    let mut command = Command::new(program());
    command
        .args(args)
        .env("REGISTRY_AUTH_FILE", "/dev/null")
        .output()
}

/// Runs the program, which has to succeed.
fn done(args: &[&str]) -> Result<String, Box<dyn std::error::Error>> {
    let out = upperdeck(args)?;
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{args:?}: {said}");
    Ok(String::from_utf8(out.stdout)?)
}

/// Everything about the paths of a tree, by path; hard links by the first path of their file.
fn tree(root: &Path) -> Result<BTreeMap<String, String>, Box<dyn std::error::Error>> {
    let (mut found, mut first) = (BTreeMap::new(), BTreeMap::new());
    for entry in walkdir::WalkDir::new(root).sort_by_file_name() {
        let entry = entry?;
        let name = entry.path().strip_prefix(root)?.display().to_string();
        let meta = entry.path().symlink_metadata()?;
        let kind = meta.file_type();
        let content = if kind.is_file() {
            fs::read(entry.path())?
        } else if kind.is_symlink() {
            fs::read_link(entry.path())?
                .into_os_string()
                .into_encoded_bytes()
        } else {
            Vec::new()
        };
        let leader = first.entry(meta.ino()).or_insert_with(|| name.clone());
        let attributes = run(
            "getfattr",
            &[
                "-hd",
                "-m",
                "user.",
                "--",
                &entry.path().display().to_string(),
            ],
        )?;
        let attributes = String::from_utf8_lossy(&attributes.stdout).into_owned();
        let attributes: Vec<&str> = attributes.lines().filter(|l| !l.starts_with('#')).collect();
        let text = format!(
            "{kind:?} {:o} {}:{} {} {:?} {leader} {attributes:?}",
            meta.mode(),
            meta.uid(),
            meta.gid(),
            // Unpackers and runtimes set the time of the root.
            if name.is_empty() { 0 } else { meta.mtime() },
            String::from_utf8_lossy(&content)
        );
        found.insert(name, text);
    }
    Ok(found)
}

fn write(path: &Path, content: &str, mode: u32) -> std::io::Result<()> {
    fs::write(path, content)?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

/// An image of three layers in a layout, under the tags `base`, `middle` and `top`, and what umoci unpacks from each.
struct Made {
    dir: tempfile::TempDir,
}

impl Made {
    fn new() -> Result<Self, Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        let made = Self { dir };
        let layout = made.layout();
        run("umoci", &["init", "--layout", &layout])?;
        run("umoci", &["new", "--image", &format!("{layout}:empty")])?;
        made.layer("empty", "base", |root| {
            for directory in ["etc/conf.d", "data/deep/er", "becomes-file", "opaque"] {
                fs::create_dir_all(root.join(directory))?;
            }
            write(&root.join("etc/hosts"), "one", 0o644)?;
            write(&root.join("etc/conf.d/a"), "a", 0o600)?;
            write(&root.join("data/file"), &"text".repeat(100_000), 0o4755)?;
            write(&root.join("data/gone"), "gone", 0o644)?;
            write(&root.join("data/becomes-dir"), "file", 0o644)?;
            write(&root.join("becomes-file/x"), "x", 0o644)?;
            write(&root.join("opaque/old"), "old", 0o644)?;
            write(&root.join("data/deep/er/x"), "deep", 0o640)?;
            fs::hard_link(root.join("data/file"), root.join("data/deep/link"))?;
            symlink("data", root.join("to-data"))?;
            symlink("/etc", root.join("data/to-etc"))?;
            symlink("../../../../../../etc/hosts", root.join("data/escapes"))?;
            std::os::unix::fs::chown(root.join("etc/conf.d/a"), Some(1000), Some(1001))?;
            let file = root.join("data/file").display().to_string();
            run("setfattr", &["-n", "user.k", "-v", "value", &file])?;
            run("mkfifo", &[&root.join("data/fifo").display().to_string()])?;
            Ok(())
        })?;
        made.layer("base", "middle", |root| {
            fs::remove_file(root.join("data/gone"))?;
            fs::remove_file(root.join("data/becomes-dir"))?;
            fs::create_dir(root.join("data/becomes-dir"))?;
            write(&root.join("data/becomes-dir/in"), "in", 0o644)?;
            fs::remove_dir_all(root.join("becomes-file"))?;
            write(&root.join("becomes-file"), "now a file", 0o644)?;
            write(&root.join("etc/hosts"), "two, longer", 0o600)?;
            Ok(())
        })?;
        made.layer("middle", "top", |root| {
            fs::remove_dir_all(root.join("opaque"))?;
            fs::create_dir(root.join("opaque"))?;
            write(&root.join("opaque/new"), "new", 0o644)?;
            write(&root.join("top"), "top", 0o644)?;
            fs::hard_link(root.join("top"), root.join("etc/top-link"))?;
            write(&root.join("middle-only"), "x", 0o644)?;
            fs::remove_file(root.join("middle-only"))?;
            Ok(())
        })?;
        Ok(made)
    }

    fn layout(&self) -> String {
        self.at("layout").display().to_string()
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Adds a layer with umoci.
    fn layer(&self, from: &str, to: &str, change: impl FnOnce(&Path) -> Outcome) -> Outcome {
        let bundle = self.at(&format!("bundle-{to}")).display().to_string();
        let image = |tag: &str| format!("{}:{tag}", self.layout());
        run("umoci", &["unpack", "--image", &image(from), &bundle])?;
        change(&self.at(&format!("bundle-{to}")).join("rootfs"))?;
        run("umoci", &["repack", "--image", &image(to), &bundle])?;
        self.unpack(&image(to), to).map(drop)
    }

    /// Unpacks with umoci and returns the root.
    fn unpack(&self, image: &str, name: &str) -> Result<PathBuf, Box<dyn std::error::Error>> {
        let bundle = self.at(&format!("unpacked-{name}"));
        run(
            "umoci",
            &["unpack", "--image", image, &bundle.display().to_string()],
        )?;
        Ok(bundle.join("rootfs"))
    }
}

/// Copies each of some paths and compares it with what umoci unpacked.
fn copies(made: &Made, image: &str, name: &str) -> Outcome {
    let root = made.at("unpacked-top/rootfs");
    let out = made.at(name);
    fs::create_dir(&out)?;
    for path in [
        "etc/hosts",
        "etc/conf.d",
        "data",
        "data/file",
        "data/deep/link",
        "data/becomes-dir/in",
        "becomes-file",
        "opaque",
        "to-data",
        "etc/top-link",
        "data/escapes",
        "data/fifo",
    ] {
        let to = out.join(path.replace('/', "-"));
        let source = format!("{image}:/{path}");
        done(&[
            "image",
            "cp",
            "--tls-verify=false",
            &source,
            &to.display().to_string(),
        ])?;
        assert_eq!(tree(&to)?, tree(&root.join(path))?, "{source}");
    }
    // Links in the path are followed within the image, `..` and absolute ones too.
    for (path, content) in [
        ("to-data/deep/er/x", "deep"),
        ("data/to-etc/hosts", "two, longer"),
        ("data/deep/../to-etc/../etc/hosts", "two, longer"),
        ("to-data/to-etc/conf.d/a", "a"),
    ] {
        let to = out.join("linked");
        let source = format!("{image}:/{path}");
        done(&[
            "image",
            "cp",
            "--tls-verify=false",
            &source,
            &to.display().to_string(),
        ])?;
        assert_eq!(fs::read_to_string(&to)?, content, "{source}");
    }
    for missing in [
        "no",
        "data/gone",
        "becomes-file/x",
        "opaque/old",
        "etc/hosts/x",
    ] {
        let source = format!("{image}:/{missing}");
        let to = out.join("missing").display().to_string();
        let failed = upperdeck(&["image", "cp", "--tls-verify=false", &source, &to])?;
        assert_eq!(failed.status.code(), Some(66), "{source}: {failed:?}");
        assert!(!out.join("missing").exists());
    }
    let all = out.join("all");
    let source = format!("{image}:/");
    done(&[
        "image",
        "cp",
        "--tls-verify=false",
        &source,
        &all.display().to_string(),
    ])?;
    assert_eq!(tree(&all)?, tree(&root)?, "{source}");
    // The same as a tar stream.
    let tar = out.join("tar");
    fs::create_dir(&tar)?;
    let script = format!(
        "'{}' image cp --tls-verify=false '{image}:/.' - | tar -xp --xattrs --xattrs-include='*' -C '{}'",
        program(),
        tar.display()
    );
    run("bash", &["-o", "pipefail", "-c", &script])?;
    assert_eq!(tree(&tar)?, tree(&root)?, "{script}");
    Ok(())
}

#[test]
fn copies_squashed_images_and_differences_are_what_umoci_unpacks() -> Outcome {
    if ignored(&NEEDS) {
        return Ok(());
    }
    let made = Made::new()?;
    let gzip = format!("oci:{}:top", made.layout());
    copies(&made, &gzip, "gzip")?;
    let zstd = format!("oci:{}:top", made.at("zstd").display());
    let plain = format!("dir:{}", made.at("plain").display());
    for flags in [
        ["--dest-decompress", &gzip, &plain].as_slice(),
        &[
            "--dest-compress",
            "--dest-compress-format",
            "zstd",
            &plain,
            &zstd,
        ],
    ] {
        run("skopeo", &[&["--insecure-policy", "copy"], flags].concat())?;
    }
    let shown = run("skopeo", &["inspect", "--raw", &zstd])?;
    assert!(String::from_utf8_lossy(&shown.stdout).contains("tar+zstd"));
    copies(&made, &zstd, "of-zstd")?;
    let archive = format!("oci-archive:{}:top", made.at("archive.tar").display());
    run("skopeo", &["--insecure-policy", "copy", &gzip, &archive])?;
    let to = made.at("of-archive").display().to_string();
    done(&["image", "cp", &format!("{archive}:/etc/hosts"), &to])?;
    assert_eq!(fs::read_to_string(&to)?, "two, longer");
    squashed(&made)?;
    differences(&made)
}

/// The same image squashed over its lowest layer is the same to umoci, twice the same, and shares the base's layer.
fn squashed(made: &Made) -> Outcome {
    let layout = format!("oci:{}", made.layout());
    let squash = |tag: &str| {
        let (base, top, new) = (
            format!("{layout}:base"),
            format!("{layout}:top"),
            format!("{layout}:{tag}"),
        );
        let args = [
            "image", "squash", "--format", "json", "--base", &base, &top, &new,
        ];
        Ok::<serde_json::Value, Box<dyn std::error::Error>>(serde_json::from_str(&done(&args)?)?)
    };
    let (one, two) = (squash("squashed")?, squash("again")?);
    assert_eq!(one["digest"], two["digest"], "not deterministic");
    assert_eq!(
        (&one["base_layers"], &one["squashed_layers"]),
        (&1.into(), &2.into())
    );
    let root = made.unpack(&format!("{}:squashed", made.layout()), "squashed")?;
    assert_eq!(tree(&root)?, tree(&made.at("unpacked-top/rootfs"))?);
    let manifest = |tag: &str| {
        let shown = run("skopeo", &["inspect", "--raw", &format!("{layout}:{tag}")])?;
        Ok::<serde_json::Value, Box<dyn std::error::Error>>(serde_json::from_slice(&shown.stdout)?)
    };
    let (base, new) = (manifest("base")?, manifest("squashed")?);
    assert_eq!(new["layers"].as_array().map(Vec::len), Some(2));
    assert_eq!(new["layers"][0]["digest"], base["layers"][0]["digest"]);
    // The tag is taken only when that is said, and the history of this image names no save.
    let (base, top) = (format!("{layout}:base"), format!("{layout}:top"));
    let taken = upperdeck(&[
        "image",
        "squash",
        "--base",
        &base,
        &top,
        &format!("{layout}:middle"),
    ])?;
    assert_eq!(taken.status.code(), Some(77), "{taken:?}");
    let no_save = upperdeck(&["image", "squash", &top])?;
    assert_eq!(no_save.status.code(), Some(2), "{no_save:?}");
    // The squashed layer counts as a save's: it can be squashed again without --base, to the same image.
    let again = done(&[
        "image",
        "squash",
        "--format",
        "json",
        &format!("{layout}:squashed"),
    ])?;
    let again: serde_json::Value = serde_json::from_str(&again)?;
    assert_eq!(again["layer"]["digest"], one["layer"]["digest"]);
    Ok(())
}

fn differences(made: &Made) -> Outcome {
    let layout = format!("oci:{}", made.layout());
    let (base, top) = (format!("{layout}:base"), format!("{layout}:top"));
    let shown = done(&["image", "diff", "--full", "--format", "json", &base, &top])?;
    let shown: serde_json::Value = serde_json::from_str(&shown)?;
    let lines: Vec<String> = shown["changes"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|c| {
            format!(
                "{} {}",
                c["change"].as_str().unwrap(),
                c["path"].as_str().unwrap()
            )
        })
        .collect();
    assert_eq!(
        lines,
        [
            "C /becomes-file",
            "D /becomes-file/x",
            "C /data/becomes-dir",
            "A /data/becomes-dir/in",
            "D /data/gone",
            "C /etc/hosts",
            "A /etc/top-link",
            "A /opaque/new",
            "D /opaque/old",
            "A /top",
        ]
    );
    let hosts = &shown["changes"][5];
    assert_eq!(hosts["before"]["size"], 3);
    assert_eq!(
        (&hosts["after"]["size"], &hosts["after"]["mode"]),
        (&11.into(), &"0600".into())
    );
    let short = done(&["image", "diff", &base, &top])?;
    for line in [
        "W /top 0644 0:0 3 B",
        "D /data/gone",
        "W /etc/hosts 0600 0:0 11 B",
    ] {
        assert!(short.lines().any(|l| l == line), "{line}: {short}");
    }
    assert_eq!(done(&["image", "diff", &top, &top])?, "");
    packages(made)
}

/// Packages that pip and dpkg recorded, of two images of which one is on top of the other.
fn packages(made: &Made) -> Outcome {
    let place = "usr/lib/python3/site-packages";
    let pip = |root: &Path, name: &str, version: &str| -> Outcome {
        let dir = root.join(format!("{place}/{name}-{version}.dist-info"));
        fs::create_dir_all(&dir)?;
        let text = format!("Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n\n");
        Ok(write(&dir.join("METADATA"), &text, 0o644)?)
    };
    let dpkg = |root: &Path, names: &[&str]| -> Outcome {
        fs::create_dir_all(root.join("var/lib/dpkg"))?;
        let paragraph = |name: &&str| {
            format!("Package: {name}\nStatus: install ok installed\nVersion: 1.0-1\n\n")
        };
        let text: String = names.iter().map(paragraph).collect();
        Ok(write(&root.join("var/lib/dpkg/status"), &text, 0o644)?)
    };
    made.layer("top", "installed", |root| {
        pip(root, "rich", "13.7.0")?;
        pip(root, "six", "1.16.0")?;
        dpkg(root, &["base-files", "tzdata"])
    })?;
    made.layer("installed", "later", |root| {
        fs::remove_dir_all(root.join(format!("{place}/rich-13.7.0.dist-info")))?;
        fs::remove_dir_all(root.join(format!("{place}/six-1.16.0.dist-info")))?;
        pip(root, "rich", "13.9.4")?;
        pip(root, "httpx", "0.27.0")?;
        dpkg(root, &["base-files"])
    })?;
    let image = |tag: &str| format!("oci:{}:{tag}", made.layout());
    let compare = |a: &str, b: &str| -> Result<_, Box<dyn std::error::Error>> {
        let args = ["image", "diff", "--packages", "--format", "json"];
        let shown = done(&[&args[..], &[&image(a), &image(b)]].concat())?;
        Ok(serde_json::from_str::<serde_json::Value>(&shown)?)
    };
    let told = |shown: &serde_json::Value| -> Vec<String> {
        let listed = shown["packages"]["packages"].as_array();
        let listed = listed.into_iter().flatten();
        let version = |of: &serde_json::Value| of.as_str().unwrap_or("-").to_owned();
        listed
            .map(|one| {
                let (was, is) = (version(&one["previous"]), version(&one["version"]));
                format!("{} {was} {is}", one["name"].as_str().unwrap_or_default())
            })
            .collect()
    };
    let shown = compare("installed", "later")?;
    assert_eq!(
        told(&shown),
        [
            "httpx - 0.27.0",
            "rich 13.7.0 13.9.4",
            "six 1.16.0 -",
            "tzdata 1.0-1 -"
        ]
    );
    let back = compare("later", "installed")?;
    assert_eq!(
        told(&back),
        [
            "httpx 0.27.0 -",
            "rich 13.9.4 13.7.0",
            "six - 1.16.0",
            "tzdata - 1.0-1"
        ]
    );
    assert!(told(&compare("later", "later")?).is_empty());
    // What the two have in common is read once for the trees and once for the packages, and all that is read counts.
    let listed = done(&[
        "image",
        "diff",
        "--full",
        "--format",
        "json",
        &image("installed"),
        &image("later"),
    ])?;
    let listed: serde_json::Value = serde_json::from_str(&listed)?;
    let once = listed["bytes_read"].as_u64().unwrap_or_default();
    assert_eq!(shown["bytes_read"].as_u64(), Some(2 * once));
    Ok(())
}

#[test]
fn files_are_copied_out_of_a_registry() -> Outcome {
    if ignored(&NEEDS) || ignored(&[Need::Program("docker-registry")]) {
        return Ok(());
    }
    let made = Made::new()?;
    let registry = Registry::start(false)?;
    let image = format!("127.0.0.1:{}/a/b:top", registry.1);
    let from = format!("oci:{}:top", made.layout());
    let to = format!("docker://{image}");
    run(
        "skopeo",
        &[
            "--insecure-policy",
            "copy",
            "--dest-tls-verify=false",
            &from,
            &to,
        ],
    )?;
    copies(&made, &image, "remote")?;
    let base = format!("oci:{}:base", made.layout());
    let new = format!("127.0.0.1:{}/a/c:squashed", registry.1);
    done(&[
        "image",
        "squash",
        "--tls-verify=false",
        "--base",
        &base,
        &image,
        &new,
    ])?;
    let local = format!("{}:from-registry", made.layout());
    run(
        "skopeo",
        &[
            "--insecure-policy",
            "copy",
            "--src-tls-verify=false",
            &format!("docker://{new}"),
            &format!("oci:{local}"),
        ],
    )?;
    let root = made.unpack(&local, "from-registry")?;
    assert_eq!(tree(&root)?, tree(&made.at("unpacked-top/rootfs"))?);
    Ok(())
}
