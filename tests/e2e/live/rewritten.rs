//! Files that are rewritten in place, by every way there is to write, on a disk that is slow: in each image each of them is
//! one of its states, whole.

use super::*;

/// Dirty pages are written to disk early, and writers wait for it: a write lasts as long as the disk takes.
struct SlowDisk(String);

const DIRTY_BYTES: &str = "/proc/sys/vm/dirty_bytes";

impl SlowDisk {
    fn new() -> Result<Self> {
        let before = fs::read_to_string(DIRTY_BYTES)?;
        fs::write(DIRTY_BYTES, "16777216")?;
        Ok(Self(before))
    }
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        // 0 says that it is not in use, and cannot be written.
        let ratio = "/proc/sys/vm/dirty_ratio";
        let restored = match self.0.trim() {
            "0" => fs::read_to_string(ratio)
                .map(|text| {
                    if text.trim() == "0" {
                        "20".to_owned()
                    } else {
                        text
                    }
                })
                .and_then(|text| fs::write(ratio, text.trim())),
            bytes => fs::write(DIRTY_BYTES, bytes),
        };
        if let Err(error) = restored {
            crate::support::note(&format!("vm.dirty_bytes stays: {error}"));
        }
    }
}

fn whole_on(mkfs: &'static str, ways: &[&str]) -> Result<()> {
    let Some(session) = Session::on(Base::Big, Some(mkfs), &|_| Ok(Vec::new()))? else {
        return Ok(());
    };
    let _slow = SlowDisk::new()?;
    for way in ways {
        session.write(&format!("rewrite {way}"))?;
    }
    let home = session.container.rootfs.join("home/w");
    let there = |way: &&&str| home.join(format!("rewrite-{way}")).exists();
    // Where a container may not use io_uring, it is not tried.
    let needed = ways.iter().filter(|way| **way != "io_uring");
    wait_until("the files are there", || {
        needed.clone().all(|way| there(&way))
    })?;
    let mut in_part = 0;
    for number in 0..saves(3)? {
        let saved = session.save(&format!("n{number}"), &[])?;
        let unsettled = saved.stderr.contains("may have been under way");
        let seen = session
            .instant_but(&saved, if unsettled { &["unsettled"] } else { &[] })
            .with_context(|| format!("{mkfs}, save {number}: {}", saved.stderr))?;
        in_part += u32::from(seen.contains("in part"));
        let all = ways.iter().filter(there);
        for way in all {
            ensure!(seen.contains(way), "{way} is not in {seen}");
        }
    }
    crate::support::note(&format!(
        "{mkfs}: {in_part} saves had a request that was under way, in part, and said so"
    ));
    Ok(())
}

const ALL: &[&str] = &[
    "buffered", "direct", "libaio", "io_uring", "mmap", "rename", "truncate", "zero",
];

#[test]
fn files_on_ext4_that_are_rewritten_in_place_are_whole() -> Result<()> {
    whole_on("mkfs.ext4", ALL)
}

#[test]
fn files_on_xfs_that_are_rewritten_in_place_are_whole() -> Result<()> {
    whole_on("mkfs.xfs", &[ALL, &["clone"]].concat())
}

#[test]
fn files_on_btrfs_that_are_rewritten_in_place_are_whole() -> Result<()> {
    whole_on("mkfs.btrfs", &[ALL, &["clone"]].concat())
}
