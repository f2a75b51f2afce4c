//! Saves, deletions and prunings that are killed at any moment leave complete images and, after the next command, nothing
//! else.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rand::RngExt as _;
use upperdeck::store::layout::{BlobName, Directory, Reader, merge, recover};

use crate::*;

const ROUNDS: usize = 220;

/// Starts one of the tests below in a process of its own.
fn victim(name: &str, dir: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            &format!("killed::{name}"),
            "--ignored",
            "--nocapture",
        ])
        .env("UPPERDECK_TEST_DIR", dir)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

fn dir_of_victim() -> Option<PathBuf> {
    std::env::var_os("UPPERDECK_TEST_DIR").map(PathBuf::from)
}

fn wait_for(child: &mut Child, word: &str) {
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.map_while(Result::ok).any(|line| line.contains(word)));
}

#[test]
fn what_a_killed_save_wrote_goes_with_the_next_command() {
    let dir = tempfile::tempdir().unwrap();
    let layout = dir.path().join("layout");
    save(&Directory::new(&layout), &[b"base"], "v1").unwrap();
    let kept = of_images(&[&[b"base"]]);
    let commands: [(&str, &dyn Fn()); 4] = [
        ("save", &|| drop(Directory::new(&layout).check())),
        ("recover", &|| {
            assert_eq!(recover(&layout).unwrap().blobs, 2);
        }),
        ("prune", &|| {
            assert_eq!(prune(&layout, DAY).unwrap().deleted.len(), 2);
        }),
        ("rm", &|| {
            let at = format!("oci:{}", layout.display());
            image_json(&["rm", &format!("{at}:v1")]);
            save(&Directory::new(&layout), &[b"base"], "v1").unwrap();
        }),
    ];
    for (what, command) in commands {
        let mut child = victim("saver", &layout);
        wait_for(&mut child, "WRITTEN");
        assert_eq!(blobs(&layout).len(), kept.len() + 2, "{what}");
        // While it runs, its blobs stay.
        assert_eq!(
            prune(&layout, Duration::ZERO).unwrap().in_use.blobs,
            2,
            "{what}"
        );
        child.kill().unwrap();
        child.wait().unwrap();
        command();
        assert_eq!(blobs(&layout), kept, "{what}");
        assert_eq!(remains(&layout), [""; 0], "{what}");
    }
    // A layout that the save had created goes as a whole.
    let new = dir.path().join("new");
    let mut child = victim("saver", &new);
    wait_for(&mut child, "WRITTEN");
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(prune(&new, DAY).unwrap().deleted.len(), 2);
    assert!(!new.exists());
    let mut child = victim("saver", &new);
    wait_for(&mut child, "WRITTEN");
    child.kill().unwrap();
    child.wait().unwrap();
    recover(&new).unwrap();
    assert!(!new.exists());
}

#[test]
#[ignore = "a process that is killed by another test"]
fn saver() {
    let Some(dir) = dir_of_victim() else { return };
    let layout = Directory::new(dir);
    layout.check().unwrap();
    layout.has_blob(&Digest::of("base"), None).unwrap();
    for text in ["one", "two"] {
        layout.put_blob(&text.into(), &Digest::of(text)).unwrap();
    }
    println!("WRITTEN");
    std::thread::sleep(Duration::from_secs(60));
}

#[test]
fn kills_at_any_moment_leave_complete_images_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let layouts = ["a/one", "b/two"].map(|name| dir.path().join(name));
    let mut random = rand::rng();
    for round in 0..ROUNDS {
        let mut children = [(); 2].map(|()| victim("worker", dir.path()));
        for child in &mut children {
            wait_for(child, "BEGUN");
            std::thread::sleep(Duration::from_micros(random.random_range(0..25_000)));
            child.kill().unwrap();
            child.wait().unwrap();
        }
        for layout in layouts
            .iter()
            .filter(|layout| layout.join("index.json").exists())
        {
            check_complete(layout, round);
        }
    }
    for layout in &layouts {
        // The minimum age spares nothing: everything is known to be of a dead process.
        let pruned = prune(layout, DAY).unwrap();
        assert_eq!(
            (pruned.young.blobs, pruned.in_use.blobs),
            (0, 0),
            "{:?}",
            pruned.young
        );
        assert_eq!(pruned.left, [""; 0]);
        assert_eq!(remains(layout), [""; 0]);
        check_complete(layout, ROUNDS);
        assert_eq!(prune(layout, Duration::ZERO).unwrap().deleted.len(), 0);
    }
}

/// Checks that every image has all of its blobs, with the content that their names say.
fn check_complete(layout: &Path, round: usize) {
    let read = |name: &str| {
        let hex = name.strip_prefix("sha256:").unwrap();
        let bytes = fs::read(layout.join("blobs/sha256").join(hex));
        let bytes = bytes.unwrap_or_else(|error| panic!("round {round}: {name}: {error}"));
        assert_eq!(Digest::of(&bytes).hex(), hex, "round {round}");
        bytes
    };
    for image in Reader::directory(layout).unwrap().list().unwrap() {
        let manifest: Value = serde_json::from_slice(&read(&image.digest.to_string())).unwrap();
        read(manifest["config"]["digest"].as_str().unwrap());
        for layer in manifest["layers"].as_array().unwrap() {
            read(layer["digest"].as_str().unwrap());
        }
    }
}

#[test]
#[ignore = "a process that is killed by another test"]
fn worker() {
    let Some(dir) = dir_of_victim() else { return };
    let layouts = ["a/one", "b/two"].map(|name| dir.join(name));
    let mut random = rand::rng();
    println!("BEGUN");
    loop {
        let layout = &layouts[random.random_range(0..2)];
        let layer = |n: u32| format!("layer {n} {}", "x".repeat(20_000)).into_bytes();
        let layers = [0, random.random_range(1..4), random.random_range(4..9)].map(layer);
        let layers: Vec<&[u8]> = layers.iter().map(Vec::as_slice).collect();
        let tag = format!("v{}", random.random_range(0..5));
        match random.random_range(0..8) {
            0..4 => {
                let directory = Directory::new(layout).sharing(Some(dir.clone()));
                // The other process may have removed what this one has found.
                if let Err(error) = save(&directory, &layers, &tag) {
                    println!("save: {error}");
                }
            }
            4 => {
                // A save that fails.
                let failing = Directory::new(layout);
                let _ =
                    failing.put_blob(&layer(random.random_range(9..12)).into(), &Digest::of("no"));
                let content = Bytes::from(layer(random.random_range(9..12)));
                let _ = failing.put_blob(&content, &Digest::of(&content));
            }
            5 | 6 => {
                let place = format!("oci:{}:{tag}", layout.display());
                let location: upperdeck::store::images::ImageLocation = place.parse().unwrap();
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .build()
                    .unwrap();
                let registries = upperdeck::store::registry::Registries::new(
                    upperdeck::store::registry::Access::default(),
                );
                let which = upperdeck::store::images::ImageSelector::Tag(tag);
                let _ = runtime.block_on(async {
                    let images = location.open(&registries).await?;
                    images.remove("", &which, false).await
                });
            }
            _ => {
                let _ = prune(layout, DAY);
                let _ = merge(&layouts, false, &mut |_, _| true);
            }
        }
    }
}

#[test]
fn names_are_those_of_descriptors() {
    // Blobs of a killed save are found by their names alone.
    let name = Digest::of("x");
    assert_eq!(BlobName::from(&name).to_string(), name.to_string());
}
