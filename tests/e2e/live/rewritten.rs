//! Files that are rewritten in place in every way of writing, on a slow disk: in each image each file is in one of its
//! states, complete.

use std::os::unix::fs::MetadataExt as _;

use super::*;
use crate::host::cgroups_of;

/// Bytes per second for all of the container's own disk requests together.
const RATE: u64 = 64 << 20;

/// Limits the rate, so that direct requests take as long as on a slow disk.
fn slow_down(session: &Session) -> Result<()> {
    let at = session.scratch.path().join("podman");
    let source = run(command("findmnt", ["-n", "-o", "SOURCE"]).arg(at))?;
    let disk = fs::metadata(source.trim())?.rdev();
    let disk = format!("{}:{}", rustix::fs::major(disk), rustix::fs::minor(disk));
    for group in cgroups_of(session.container.pid) {
        let limits = [
            ("blkio.throttle.write_bps_device", format!("{disk} {RATE}")),
            ("io.max", format!("{disk} wbps={RATE}")),
        ];
        for (file, limit) in limits {
            if group.join(file).exists() {
                return Ok(fs::write(group.join(file), limit)?);
            }
        }
    }
    crate::support::note(
        "the disk is not slow for direct requests: no such limit for the container's cgroup",
    );
    Ok(())
}

/// Makes dirty pages be written to disk early and writers wait for it: a write takes as long as the disk does.
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
        // 0 means that this setting is not in use, and it cannot be written.
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
    // Podman's default seccomp profile denies io_uring.
    let options = |_: &Scratch| Ok(vec!["--security-opt=seccomp=unconfined".to_owned()]);
    let Some(session) = Session::on(Base::Big, Some(mkfs), &options)? else {
        return Ok(());
    };
    let _slow = SlowDisk::new()?;
    slow_down(&session)?;
    for way in ways {
        session.write(&format!("rewrite {way}"))?;
    }
    let home = session.container.rootfs.join("home/w");
    let there = |way: &&&str| home.join(format!("rewrite-{way}")).exists();
    wait_until("the files are there", || ways.iter().all(|way| there(&way)))?;
    let (mut in_part, mut warned, saves) = (0, 0, saves(3)?);
    for number in 0..saves {
        let saved = session.save(&format!("n{number}"), &["--compression", "none"])?;
        let unsettled = saved.stderr.contains("may have been under way");
        let seen = session
            .instant_but(&saved, if unsettled { &["unsettled"] } else { &[] })
            .with_context(|| format!("{mkfs}, save {number}: {}", saved.stderr))?;
        in_part += u32::from(seen.contains("in part"));
        warned += u32::from(unsettled);
        for way in ways {
            ensure!(seen.contains(way), "{way} is not in {seen}");
            let log = session.root().join(format!("tmp/rewrite-{way}.log"));
            let said = fs::read_to_string(log)?;
            ensure!(said.is_empty(), "{way} writes no more: {said}");
        }
    }
    crate::support::note(&format!(
        "{mkfs}: {saves} saves beside {} writers; {warned} said that a request may have been under way, {in_part} had one in part",
        ways.len()
    ));
    Ok(())
}

const ALL: &[&str] = &[
    "buffered", "direct", "libaio", "io_uring", "mmap", "rename", "truncate", "zero", "punch",
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
