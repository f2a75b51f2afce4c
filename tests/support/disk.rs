//! File systems on loop devices, and slow disks.

use std::error::Error;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU32, Ordering};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// A file system in a file, mounted until dropped.
pub struct Disk(tempfile::TempDir);

impl Disk {
    pub fn new(mkfs: &str) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let (image, at) = (dir.path().join("image"), dir.path().join("at"));
        std::fs::File::create(&image)?.set_len(1 << 30)?;
        std::fs::create_dir(&at)?;
        run(Command::new(mkfs).arg("-q").arg(&image))?;
        run(Command::new("mount")
            .args(["-o", "loop"])
            .args([&image, &at]))?;
        Ok(Self(dir))
    }

    /// Remounts the file system, so that nothing of it is cached in memory.
    pub fn forget(&self) -> Result<()> {
        let (image, at) = (self.0.path().join("image"), self.path());
        run(Command::new("umount").arg(&at))?;
        run(Command::new("mount")
            .args(["-o", "loop"])
            .args([&image, &at]))
    }

    pub fn path(&self) -> PathBuf {
        self.0.path().join("at")
    }

    /// Returns `MAJOR:MINOR` of the disk with the file system.
    fn device(&self) -> Result<String> {
        let found = Command::new("findmnt")
            .args(["-n", "-o", "SOURCE"])
            .arg(self.path())
            .output()?;
        let name = String::from_utf8(found.stdout)?;
        let number = std::fs::metadata(name.trim())?.rdev();
        let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
        Ok(format!("{major}:{minor}"))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // A thread of the reader's may have a file open for a moment longer.
        for _ in 0..100 {
            if run(Command::new("umount").arg(self.path())).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        crate::support::note(&format!("{} stays mounted", self.path().display()));
    }
}

/// A cgroup whose processes write to one disk, or read from it, slowly.
pub struct Slow(PathBuf);

impl Slow {
    /// Creates a cgroup whose processes write at most `rate` bytes per second.
    pub fn writes(disk: &Disk, rate: u64) -> Result<Self> {
        Self::new(disk, rate, "write_bps_device", "wbps")
    }

    /// Creates a cgroup whose processes read at most `rate` times per second.
    pub fn reads(disk: &Disk, rate: u64) -> Result<Self> {
        Self::new(disk, rate, "read_iops_device", "riops")
    }

    fn new(disk: &Disk, rate: u64, v1_name: &str, v2_name: &str) -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("upperdeck-slow-{}-{number}", std::process::id());
        let (v1, v2) = (
            Path::new("/sys/fs/cgroup/blkio"),
            Path::new("/sys/fs/cgroup"),
        );
        let device = disk.device()?;
        let (at, file, text) = if v1.exists() {
            let text = format!("{device} {rate}");
            (v1.join(name), format!("blkio.throttle.{v1_name}"), text)
        } else {
            std::fs::write(v2.join("cgroup.subtree_control"), "+io")?;
            let text = format!("{device} {v2_name}={rate}");
            (v2.join(name), "io.max".to_owned(), text)
        };
        std::fs::create_dir(&at)?;
        let slow = Self(at);
        std::fs::write(slow.0.join(file), text)?;
        Ok(slow)
    }

    pub fn take(&self, child: &Child) -> Result<()> {
        Ok(std::fs::write(
            self.0.join("cgroup.procs"),
            child.id().to_string(),
        )?)
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        // The last process was reaped, but leaves the cgroup a moment later.
        for _ in 0..100 {
            if std::fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        crate::support::note(&format!("{} stays", self.0.display()));
    }
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(format!("{command:?}: {said}").into());
    }
    Ok(())
}
