//! Saves of the container, with their outputs and the readers of these.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use upperdeck::common::digest::Digest;
use upperdeck::image::manifest::platform::Platform;
use upperdeck::image::verify::archive::decompress;
use upperdeck::image::verify::layers::Layers;
use upperdeck::image::verify::tree::{Ignore, Tree, compare};
use upperdeck::store::layout::{Reader, recover};

use crate::world::{PROGRAM, World};

/// Content, as a repeated letter, of the changing file before and after the change.
pub const BEFORE: &str = "a";
pub const AFTER: &str = "b";

/// The output of a save.
#[derive(Clone, Debug)]
pub enum SaveOutput {
    /// A file with one layer.
    Layer,
    /// An OCI layout in `out`.
    Layout,
    /// An archive in `out`.
    Archive,
    /// A tag of a registry with local storage, in a repository that is new for every save.
    Registry { host: String, storage: PathBuf },
}

/// A save that is repeated from the same initial state.
pub struct Case<'a> {
    pub name: &'static str,
    pub world: &'a World,
    pub made: SaveOutput,
    pub options: &'a [&'a str],
    /// Whether it follows an earlier save, whose state and image are there.
    pub again: bool,
    /// Whether a file is changed while it is read.
    pub meanwhile: bool,
    /// Number of times the initial state was restored.
    round: std::cell::Cell<u32>,
}

/// The correct image or layer.
pub struct ExpectedImage {
    /// Digest of the manifest, or of the layer's file.
    pub digest: Digest,
    pub tree: Tree,
    /// The tree after the concurrent change.
    after: Option<Tree>,
    /// Names in the state's directory.
    state: BTreeSet<String>,
}

impl<'a> Case<'a> {
    pub fn new(
        name: &'static str,
        world: &'a World,
        made: SaveOutput,
        options: &'a [&'a str],
    ) -> Self {
        Self {
            name,
            world,
            made,
            options,
            again: false,
            meanwhile: false,
            round: 0.into(),
        }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.world.home.join(name)
    }

    fn repository(&self) -> String {
        // A save on top of an earlier one uses the same repository.
        let round = if self.again { 0 } else { self.round.get() };
        format!("faults/{}-{round}", self.name)
    }

    /// Returns the command line.
    pub fn arguments(&self) -> Vec<String> {
        let at = |name: &str| self.at(name).display().to_string();
        let mut arguments = vec![PROGRAM.to_owned()];
        if matches!(self.made, SaveOutput::Layer) {
            arguments.push("layer".to_owned());
            for (flag, value) in [
                ("upper", "upper"),
                ("lower", "lower2"),
                ("lower", "lower1"),
                ("output", "out/layer"),
            ] {
                arguments.extend([format!("--{flag}"), at(value)]);
            }
        } else {
            arguments.push("commit".to_owned());
            for flag in [
                "containerd-root",
                "containerd-state",
                "docker-root",
                "storage-root",
                "storage-runroot",
            ] {
                arguments.extend([format!("--{flag}"), at("none")]);
            }
            let state = [
                "--state-dir".to_owned(),
                at("state"),
                "--base".to_owned(),
                format!("oci:{}:base", at("images")),
            ];
            arguments.extend(state);
            arguments.extend(["--metadata-file".to_owned(), at("out/metadata")]);
            arguments.extend(["--progress", "none", "--max-pause", "60s"].map(str::to_owned));
        }
        arguments.extend(["--timestamp", "1750000000", "--jobs", "2"].map(str::to_owned));
        arguments.extend(self.options.iter().map(|&option| option.to_owned()));
        let destination = match &self.made {
            SaveOutput::Layer => return arguments,
            SaveOutput::Layout => format!("oci:{}:saved", at("out/layout")),
            SaveOutput::Archive => format!("oci-archive:{}:saved", at("out/archive")),
            SaveOutput::Registry { host, .. } => format!("{host}/{}:saved", self.repository()),
        };
        arguments.extend([format!("pid:{}", self.world.pid), destination]);
        arguments
    }

    /// Restores the initial state of a save.
    pub fn begin(&self) -> Result<()> {
        if self.meanwhile {
            self.world.change(BEFORE)?;
        }
        self.round.set(self.round.get() + 1);
        for name in ["out", "state"] {
            let (at, kept) = (self.at(name), self.at(&format!("kept-{name}")));
            if at.exists() {
                fs::remove_dir_all(&at).with_context(|| at.display().to_string())?;
            }
            if self.again {
                let copied = Command::new("cp").arg("-a").args([&kept, &at]).status()?;
                ensure!(copied.success(), "cp");
            } else {
                fs::create_dir(&at)?;
                fs::set_permissions(&at, fs::Permissions::from_mode(0o700))?;
            }
        }
        Ok(())
    }

    /// Makes the result of an earlier save part of the initial state.
    pub fn keep(&mut self) -> Result<()> {
        for name in ["out", "state"] {
            let kept = self.at(&format!("kept-{name}"));
            if kept.exists() {
                fs::remove_dir_all(&kept)?;
            }
            fs::rename(self.at(name), kept)?;
        }
        self.again = true;
        Ok(())
    }

    /// Runs a save without faults.
    pub fn undisturbed(&self) -> Result<()> {
        let arguments = self.arguments();
        let done = Command::new(&arguments[0]).args(&arguments[1..]).output()?;
        ensure!(
            done.status.success(),
            "{}: {}",
            done.status,
            String::from_utf8_lossy(&done.stderr)
        );
        Ok(())
    }

    /// Returns the correct result, after a save without faults.
    pub fn right(&self) -> Result<ExpectedImage> {
        let (digest, tree) = self.read()?.context("nothing was saved")?;
        let state = self.state()?;
        let mut after = None;
        if self.meanwhile {
            self.world.change(AFTER)?;
            self.undisturbed()?;
            after = Some(self.read()?.context("nothing was saved")?.1);
        }
        Ok(ExpectedImage {
            digest,
            tree,
            after,
            state,
        })
    }

    /// Checks the saved output by its digest or else by its content. Returns a description, or `None` if there is no
    /// output.
    ///
    /// Fails if the output is wrong.
    pub fn is(&self, right: &ExpectedImage) -> Result<Option<&'static str>> {
        let Some((digest, tree)) = self.read()? else {
            return Ok(None);
        };
        if digest == right.digest {
            return Ok(Some("the same image"));
        }
        let changed = self.meanwhile && self.world.changed(AFTER)?;
        let expected = right
            .after
            .as_ref()
            .filter(|_| changed)
            .unwrap_or(&right.tree);
        let differences = compare(expected, &tree, &Ignore::default());
        let said: Vec<String> = differences
            .iter()
            .take(5)
            .map(ToString::to_string)
            .collect();
        ensure!(differences.is_empty(), "A WRONG IMAGE: {}", said.join("; "));
        Ok(Some("other layers, the same files"))
    }

    fn read(&self) -> Result<Option<(Digest, Tree)>> {
        let platform = Platform::host();
        let reader = match &self.made {
            SaveOutput::Layer => {
                let file = self.at("out/layer");
                if !file.exists() {
                    return Ok(None);
                }
                let bytes = fs::read(file)?;
                let mut layers = Layers::new();
                layers.apply(&bytes[..])?;
                return Ok(Some((Digest::of(&bytes), layers.into_lenient_tree())));
            }
            SaveOutput::Registry { storage, .. } => return self.read_registry(storage),
            SaveOutput::Layout if self.at("out/layout/index.json").exists() => {
                Reader::directory(self.at("out/layout"))?
            }
            SaveOutput::Archive if self.at("out/archive").exists() => {
                Reader::archive(self.at("out/archive"))?
            }
            SaveOutput::Layout | SaveOutput::Archive => return Ok(None),
        };
        let manifest = reader.manifest(Some("saved"), &platform)?;
        let blob = |digest: &Digest| -> Result<Box<dyn Read>> {
            let mut bytes = Vec::new();
            reader.open_blob(digest, None)?.read_to_end(&mut bytes)?;
            Ok(Box::new(std::io::Cursor::new(bytes)))
        };
        let tree = tree(&manifest.bytes, blob)?;
        Ok(Some((manifest.digest, tree)))
    }

    fn read_registry(&self, storage: &Path) -> Result<Option<(Digest, Tree)>> {
        let root = storage.join("docker/registry/v2");
        let link = format!(
            "repositories/{}/_manifests/tags/saved/current/link",
            self.repository()
        );
        let Ok(digest) = fs::read_to_string(root.join(link)) else {
            return Ok(None);
        };
        let digest: Digest = digest.trim().parse()?;
        let blob = |digest: &Digest| {
            let hex = digest.to_string();
            let hex = hex.trim_start_matches("sha256:");
            fs::read(
                root.join("blobs/sha256")
                    .join(&hex[..2])
                    .join(hex)
                    .join("data"),
            )
        };
        let tree = tree(&blob(&digest)?, |digest| {
            Ok(Box::new(std::io::Cursor::new(blob(digest)?)))
        })?;
        Ok(Some((digest, tree)))
    }

    /// Returns the content of a file as saved in a layout.
    pub fn content(&self, path: &str) -> Result<Vec<u8>> {
        let reader = Reader::directory(self.at("out/layout"))?;
        let manifest = reader.manifest(Some("saved"), &Platform::host())?;
        let manifest: Value = serde_json::from_slice(&manifest.bytes)?;
        for layer in manifest["layers"]
            .as_array()
            .context("layers")?
            .iter()
            .rev()
        {
            let digest = layer["digest"].as_str().context("a digest")?.parse()?;
            let (_, tar) = decompress(reader.open_blob(&digest, None)?)?;
            for entry in tar::Archive::new(tar).entries()? {
                let mut entry = entry?;
                if entry.path_bytes() == path.as_bytes() {
                    let mut bytes = Vec::new();
                    entry.read_to_end(&mut bytes)?;
                    return Ok(bytes);
                }
            }
        }
        anyhow::bail!("{path} is in no layer")
    }

    /// Returns the names in the state's directory, which are the same for the same container.
    fn state(&self) -> Result<BTreeSet<String>> {
        files(&self.at("state")).map(|files| files.into_keys().map(|name| plain(&name)).collect())
    }

    /// Checks that nothing is left behind that should not be, whatever the result; `failed` means that the save
    /// reported that nothing was saved.
    pub fn left_behind(&self, right: &ExpectedImage, failed: bool) -> Result<()> {
        // A save that cannot read the layout any more cannot clean it: the next command on it does.
        let is_list = |name: &String| name.starts_with("layout/.upperdeck-save-");
        if files(&self.at("out"))?.keys().any(is_list) {
            recover(&self.at("out/layout"))?;
        }
        for (name, path) in files(&self.at("out"))? {
            if let Some((_, hex)) = name.split_once("blobs/sha256/") {
                let digest = Digest::of(fs::read(&path)?).to_string();
                ensure!(digest == format!("sha256:{hex}"), "a half blob: {name}");
                continue;
            }
            let expected: &[&str] = match self.made {
                SaveOutput::Layer => &["layer"],
                SaveOutput::Layout => &["layout/oci-layout", "layout/index.json", "metadata"],
                SaveOutput::Archive => &["archive", "metadata"],
                SaveOutput::Registry { .. } => &["metadata"],
            };
            ensure!(
                expected.contains(&name.as_str()),
                "left in the output: {name}"
            );
            let result = ["layer", "archive"].contains(&name.as_str());
            ensure!(
                !failed || self.again || !result,
                "it failed and left {name}"
            );
            if name == "metadata" {
                serde_json::from_slice::<Value>(&fs::read(&path)?)
                    .context("half a metadata file")?;
            }
        }
        let state = self.state()?;
        let more: Vec<_> = state.difference(&right.state).collect();
        ensure!(more.is_empty(), "left in the state: {more:?}");
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        let home = self.world.home.display().to_string();
        let mounts = mounts.lines().filter(|line| line.contains(&home)).count();
        ensure!(mounts <= 1, "mounts stay");
        Ok(())
    }
}

/// Replaces the parts of a name that differ between runs, i.e. its numbers.
pub fn plain(name: &str) -> String {
    let mut out = String::new();
    for c in name.chars() {
        let c = if c.is_ascii_digit() { '#' } else { c };
        if c != '#' || !out.ends_with('#') {
            out.push(c);
        }
    }
    out
}

/// Returns the regular files below a directory by their relative path.
fn files(dir: &Path) -> Result<BTreeMap<String, PathBuf>> {
    let mut found = BTreeMap::new();
    for entry in walkdir::WalkDir::new(dir) {
        let entry = entry?;
        if entry.file_type().is_file() {
            let name = entry
                .path()
                .strip_prefix(dir)?
                .to_string_lossy()
                .into_owned();
            found.insert(name, entry.into_path());
        }
    }
    Ok(found)
}

fn tree(manifest: &[u8], blob: impl Fn(&Digest) -> Result<Box<dyn Read>>) -> Result<Tree> {
    let manifest: Value = serde_json::from_slice(manifest)?;
    let mut layers = Layers::new();
    for layer in manifest["layers"].as_array().context("layers")? {
        let digest = layer["digest"].as_str().context("a digest")?.parse()?;
        layers.apply(blob(&digest)?)?;
    }
    Ok(layers.into_tree())
}
