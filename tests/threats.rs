//! Attacks by a tenant who changes the tree during a read: nothing from outside the upper directory may get into a
//! layer, and nothing may hang the builder (CVE-2018-15664 and similar).

// Test programs without libtest print their results themselves.
#![allow(clippy::print_stdout, clippy::print_stderr)]

#[path = "harness/mod.rs"]
mod harness;
#[path = "harness/layer.rs"]
mod layer;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use harness::{Outcome, Stop, Test};
use layer::{Source, make};
use rustix::fs::{CWD, FileType, Mode, RenameFlags};
use upperdeck::image::verify::archive::Archive;
use upperdeck::layer::Compression;
use upperdeck::node::overlay::xattr::Namespace;

/// Content that must never be in a layer.
const CANARY: &str = "canary-of-the-host-0b5f3e9d";
/// How long the tree is changed while layers are made of it.
const DURATION: Duration = Duration::from_secs(5);
/// Time limit for a layer, which takes milliseconds: a longer run counts as a hang.
const HANGS: Duration = Duration::from_secs(60);

/// Repeatedly exchanges the entries at two paths until `stop` is set.
fn swap(a: &Path, b: &Path, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        // Both names exist; if the call fails all the same, the next one is as good.
        rustix::fs::renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE).ok();
    }
}

fn tree(upper: &Path, outside: &Path, aside: &Path) -> Result<Vec<(PathBuf, PathBuf)>> {
    let mut pairs = Vec::new();
    let canary = outside.join("canary");
    for number in 0..4 {
        let directory = upper.join(format!("d{number}/sub"));
        fs::create_dir_all(&directory)?;
        for file in 0..8 {
            fs::write(
                directory.join(format!("f{file}")),
                "harmless".repeat(100 * file),
            )?;
        }
        // A file of the same name outside, so that a path through the swapped directory finds it.
        fs::write(directory.join("canary"), "harmless")?;
    }
    let mut pair = |inside: PathBuf, other: PathBuf| pairs.push((inside, other));

    // A directory swapped with a symlink to the outside, at two depths.
    symlink(outside, aside.join("link-for-directory"))?;
    pair(upper.join("d0/sub"), aside.join("link-for-directory"));
    symlink(outside, aside.join("link-for-top"))?;
    pair(upper.join("d1"), aside.join("link-for-top"));
    // A file swapped with a symlink, absolute and relative.
    symlink(&canary, aside.join("link-for-file"))?;
    pair(upper.join("d2/sub/f1"), aside.join("link-for-file"));
    symlink("/etc/shadow", aside.join("link-to-shadow"))?;
    pair(upper.join("d2/sub/f2"), aside.join("link-to-shadow"));
    symlink("../../../outside/canary", aside.join("relative-link"))?;
    pair(upper.join("d2/sub/f3"), aside.join("relative-link"));
    // A file swapped with something that blocks or never ends when read.
    for (name, kind, device) in [
        ("fifo", FileType::Fifo, 0),
        ("zero", FileType::CharacterDevice, rustix::fs::makedev(1, 5)),
        (
            "console",
            FileType::CharacterDevice,
            rustix::fs::makedev(5, 1),
        ),
        ("socket", FileType::Socket, 0),
    ] {
        rustix::fs::mknodat(CWD, aside.join(name), kind, Mode::RUSR | Mode::WUSR, device)?;
    }
    pair(upper.join("d3/sub/f4"), aside.join("fifo"));
    pair(upper.join("d3/sub/f5"), aside.join("zero"));
    pair(upper.join("d3/sub/f6"), aside.join("console"));
    pair(upper.join("d3/sub/f7"), aside.join("socket"));
    Ok(pairs)
}

/// Repeatedly extends, truncates, removes and recreates a file.
fn change_repeatedly(path: &Path, stop: &AtomicBool) {
    let mut round = 0u64;
    while !stop.load(Ordering::Relaxed) {
        round += 1;
        // Any step may fail because a parent was swapped; the next one is as good.
        match round % 4 {
            0 => drop(fs::write(path, vec![b'x'; 300_000])),
            1 => drop(
                fs::File::options()
                    .write(true)
                    .open(path)
                    .map(|file| file.set_len(10)),
            ),
            2 => drop(
                fs::File::options()
                    .append(true)
                    .open(path)
                    .map(|mut file| file.write_all(&[b'y'; 5000])),
            ),
            _ => drop(fs::remove_file(path)),
        }
    }
}

fn contains(bytes: &[u8], needle: &[u8]) -> bool {
    bytes.windows(needle.len()).any(|window| window == needle)
}

fn race() -> Outcome {
    harness::need_root()?;
    let home = tempfile::Builder::new()
        .prefix("upperdeck-threat")
        .tempdir()?;
    let [upper, outside, aside, lower] =
        ["upper", "outside", "aside", "lower"].map(|name| home.path().join(name));
    for path in [&upper, &outside, &aside, &lower] {
        fs::create_dir(path)?;
    }
    // Every name that the walk may look up if it is misled.
    fs::create_dir(outside.join("sub"))?;
    for name in [
        "canary",
        "f0",
        "f1",
        "f2",
        "f3",
        "f4",
        "f5",
        "f6",
        "f7",
        "sub/f0",
        "sub/f1",
        "sub/canary",
    ] {
        fs::write(outside.join(name), CANARY.repeat(50))?;
    }
    let pairs = tree(&upper, &outside, &aside)?;
    let shadow = fs::read_to_string("/etc/shadow").ok();
    let secrets: Vec<Vec<u8>> = [
        Some(CANARY.to_owned()),
        shadow.and_then(|text| text.lines().next().map(str::to_owned)),
    ]
    .into_iter()
    .flatten()
    .filter(|secret| secret.len() > 8)
    .map(String::into_bytes)
    .collect();
    let stop = AtomicBool::new(false);
    let restless_file = upper.join("d3/change_repeatedly");
    let result = std::thread::scope(|scope| {
        for (a, b) in &pairs {
            scope.spawn(|| swap(a, b, &stop));
        }
        scope.spawn(|| change_repeatedly(&restless_file, &stop));
        let result = attack(&upper, &lower, &secrets);
        stop.store(true, Ordering::Relaxed);
        result
    });
    result.map_err(Stop::from)
}

fn attack(upper: &Path, lower: &Path, secrets: &[Vec<u8>]) -> Result<()> {
    let start = Instant::now();
    let (mut layers, mut refused) = (0, BTreeMap::<String, u32>::new());
    while start.elapsed() < DURATION {
        let source = Source::new(upper.to_owned(), vec![lower.to_owned()], Namespace::Trusted);
        let (send, receive) = mpsc::channel();
        // A separate thread instead of a scoped one: a hang must end in a message, not in a join.
        std::thread::spawn(move || send.send(make(&source, Compression::None, 2)).ok());
        match receive
            .recv_timeout(HANGS)
            .context("making the layer hangs")?
        {
            Err(message) => *refused.entry(message).or_default() += 1,
            Ok(made) => {
                layers += 1;
                for secret in secrets {
                    ensure!(
                        !contains(&made.bytes, secret),
                        "content from outside the upper directory is in the layer"
                    );
                }
                let facts = Archive::new(made.bytes.as_slice()).finish()?;
                ensure!(
                    facts.terminated && facts.trailing == 0,
                    "the tar does not end as it must: {facts:?}"
                );
                ensure!(
                    facts.diff_id == made.layer.diff_id.0,
                    "the diff ID is not of these bytes"
                );
            }
        }
    }
    println!("{layers} layers, {} refused", refused.values().sum::<u32>());
    for (message, count) in refused.iter().take(5) {
        println!("  {count} times: {message}");
    }
    ensure!(layers > 0, "no layer was made at all: {refused:?}");
    Ok(())
}

fn main() -> ExitCode {
    harness::main(&[Test::new("a_tree_that_changes_while_it_is_read", race)])
}
