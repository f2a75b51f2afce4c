//! System calls that change a file in many pieces under one time stamp: content read during the call is its final
//! content, or the next scan or the layer itself reports that it is not.

use std::os::unix::fs::MetadataExt as _;

use super::*;

const SLOW_CALL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/harness/slow_call.py");

fn call(slow: Option<&Slow>, arguments: &[&str]) -> Result<(Child, BufReader<ChildStdout>)> {
    let mut child = Command::new("python3")
        .arg(SLOW_CALL)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    if let Some(slow) = slow {
        slow.take(&child)?;
    }
    let says = BufReader::new(child.stdout.take().ok_or("stdout")?);
    Ok((child, says))
}

fn ended(mut child: Child) -> Result<()> {
    let status = child.wait()?;
    status
        .success()
        .then_some(())
        .ok_or_else(|| format!("{status}").into())
}

/// Returns whether the call was still running when its file was scanned.
fn beside(disk: &Disk, mkfs: &str, way: &str) -> Result<bool> {
    let name = |what: &str| disk.path().join(way).join(what);
    std::fs::create_dir(name(""))?;
    let path = name("file").display().to_string();
    ended(call(None, &["prepare", way, &path])?.0)?;
    disk.forget()?;
    let slow = Slow::reads(disk, 20)?;
    let before = std::fs::metadata(&path)?;
    std::thread::sleep(8 * tick());
    let (mut child, mut says) = call(Some(&slow), &[way, &path])?;
    let stamps = |file: &std::fs::Metadata| (file.ctime(), file.ctime_nsec());
    while stamps(&std::fs::metadata(&path)?) == stamps(&before) && child.try_wait()?.is_none() {
        std::thread::sleep(Duration::from_millis(1));
    }
    // A file whose stamp is as recent as the scan would be saved again for that reason alone.
    std::thread::sleep(8 * tick());
    let begun = Arc::new(scan(&name(""))?);
    let middle = child.try_wait()?.is_none();
    let plan = Plan::new(Arc::clone(&begun), None).with_writers(layer::Writers {
        direct: false,
        ..layer::Writers::default()
    });
    let (tar, layer) = layer_of(&plan)?;
    ended(child)?;
    let mut said = String::new();
    says.read_to_string(&mut said)?;
    assert!(said.ends_with("over\n"), "{mkfs} {way}: {said}");
    let changed = scan(&name(""))?.changes_since(&begun, &|_| false);
    let told = layer.unstable.len() + changed.ok_or("no layer can say it")?.emitted().count();
    let whole = content(&tar)? == std::fs::read(&path)?;
    assert!(whole || told > 0, "{mkfs} {way}: torn, and nothing tells");
    Ok(middle)
}

fn calls_on(mkfs: &str, ways: &[&str]) -> Result<()> {
    if !needs(mkfs) {
        return Ok(());
    }
    let disk = Disk::new(mkfs)?;
    for way in ways {
        let middle = beside(&disk, mkfs, way)?;
        let how = if middle {
            "in its middle"
        } else {
            "over by then"
        };
        support::note(&format!("{mkfs} {way}: {how}"));
    }
    Ok(())
}

#[test]
fn calls_in_many_pieces_on_ext4_are_in_the_layer_whole_or_tell() -> Result<()> {
    calls_on(
        "mkfs.ext4",
        &["punch", "zero", "collapse", "insert", "truncate", "copy"],
    )
}

#[test]
fn calls_in_many_pieces_on_xfs_are_in_the_layer_whole_or_tell() -> Result<()> {
    let ways = [
        "punch", "zero", "collapse", "insert", "truncate", "copy", "clone",
    ];
    calls_on("mkfs.xfs", &ways)
}

#[test]
fn calls_in_many_pieces_on_btrfs_are_in_the_layer_whole_or_tell() -> Result<()> {
    calls_on(
        "mkfs.btrfs",
        &["punch", "zero", "truncate", "copy", "clone"],
    )
}
