//! Other tools on the same layout: umoci, skopeo, podman.

use std::fs;
use std::path::Path;
use std::process::Command;

use upperdeck::store::layout::{Directory, Reader};

use crate::*;

/// Runs a program. Returns false, and reports the test as ignored, if it is not installed.
fn run(program: &str, arguments: &[&str]) -> bool {
    match Command::new(program).args(arguments).output() {
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(output.status.success(), "{program} {arguments:?}: {said}");
            true
        }
        Err(_) => {
            support::ignore(&format!("{program} is not installed"));
            false
        }
    }
}

/// An empty layer, which is a tar that tools can read.
fn tar(content: &str) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    header.set_cksum();
    archive
        .append_data(&mut header, "file", content.as_bytes())
        .unwrap();
    archive.into_inner().unwrap()
}

fn copy(from: &Path, to: &Path) {
    assert!(
        Command::new("cp")
            .arg("-a")
            .args([from, to])
            .status()
            .unwrap()
            .success()
    );
}

#[test]
fn umoci_keeps_and_deletes_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = (dir.path().join("ours"), dir.path().join("theirs"));
    let layers = ["base", "one", "two", "three"].map(tar);
    let [base, one, two, three] = layers.each_ref().map(Vec::as_slice);
    let layout = Directory::new(&ours);
    save(&layout, &[base, one], "one").unwrap();
    save(&layout, &[base, two], "two").unwrap();
    save(&layout, &[base, three], "three").unwrap();
    let index = json!({"schemaVersion": 2, "mediaType": INDEX,
        "manifests": [descriptor(MANIFEST, &manifest(&[base, one])), descriptor(MANIFEST, &manifest(&[base, two]))]})
    .to_string();
    plant(&ours, index.as_bytes());
    list(&ours, descriptor(INDEX, index.as_bytes()));
    // Entries go as other tools take them away, without their blobs.
    let text = fs::read_to_string(ours.join("index.json")).unwrap();
    let mut all: Value = serde_json::from_str(&text).unwrap();
    let entries = all["manifests"].as_array_mut().unwrap();
    entries.retain(|entry| {
        let tag = &entry["annotations"]["org.opencontainers.image.ref.name"];
        !["two", "three"].contains(&tag.as_str().unwrap_or_default())
    });
    fs::write(ours.join("index.json"), all.to_string()).unwrap();
    plant(&ours, b"stray");
    copy(&ours, &theirs);
    if !run("umoci", &["gc", "--layout", theirs.to_str().unwrap()]) {
        return;
    }
    let pruned = prune(&ours, Duration::ZERO).unwrap();
    assert_eq!(pruned.deleted.len(), 4);
    assert_eq!(blobs(&ours), blobs(&theirs));
}

#[test]
fn skopeo_reads_and_writes_while_the_layout_is_pruned() {
    let dir = tempfile::tempdir().unwrap();
    let (source, target) = (dir.path().join("source"), dir.path().join("target"));
    let base = tar(&"base".repeat(100_000));
    let layout = Directory::new(&source);
    save(&layout, &[&base, &tar("one")], "one").unwrap();
    save(&Directory::new(&target), &[&tar("mine")], "mine").unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let pruning = scope.spawn(|| {
            let mut rounds = 0;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                // skopeo empties index.json and oci-layout before it writes them.
                prune(&target, DAY).unwrap();
                rounds += 1;
            }
            rounds
        });
        for n in 0..10 {
            let from = format!("oci:{}:one", source.display());
            let to = format!("oci:{}:copy-{n}", target.display());
            if !run(
                "skopeo",
                &["--insecure-policy", "copy", "--quiet", &from, &to],
            ) {
                break;
            }
            run("skopeo", &["inspect", &to]);
            image_json(&["rm", &to]);
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(pruning.join().unwrap() > 0);
    });
    let left = Reader::directory(&target).unwrap().list().unwrap();
    assert_eq!(left.len(), 1);
    prune(&target, Duration::ZERO).unwrap();
    assert_eq!(blobs(&target), of_images(&[&[&tar("mine")]]));
}
