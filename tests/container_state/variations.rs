//! Mount namespaces that show the directories of an overlay differently from the one in which it was mounted: what is
//! read there is what the container has, or the save is refused.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Error as IoError};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_bind_recursive,
    mount_change, mount_move, mount_remount, unmount,
};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use tempfile::TempDir;
use upperdeck::node::container::{Error, Roots, find, recheck};

use super::Outcome;
use super::support::{Need, ignored};

const VARIATIONS: u32 = 120;

/// A process on an overlay, some of whose lower directories are mounts.
struct Place {
    /// Ended and unmounted before the directory is removed.
    process: Child,
    /// Upper and lower directories, in the order of the overlay.
    directories: Vec<PathBuf>,
    /// Those of them that are mounts.
    mounts: Vec<PathBuf>,
    contents: Vec<BTreeMap<PathBuf, Vec<u8>>>,
    dir: TempDir,
}

impl Place {
    fn new() -> Result<Self, Box<dyn std::error::Error>> {
        let dir = TempDir::new()?;
        let at = dir.path().canonicalize()?;
        let managed = at.join("state/io.containerd.mount-manager.v1.bolt/t/1");
        let lowers = [
            at.join("l/0"),
            managed.join("1"),
            managed.join("2"),
            at.join("l/3"),
        ];
        let upper = at.join("l/upper");
        for name in ["work", "merged", "empty", "host", "elsewhere", "aside"] {
            fs::create_dir_all(at.join(name))?;
        }
        fs::create_dir_all(&upper)?;
        fs::write(upper.join("own"), "upper")?;
        fs::write(at.join("aside/a"), "lower 1")?;
        for lower in &lowers {
            fs::create_dir_all(lower.join("d"))?;
        }
        let mounts = vec![lowers[1].clone(), lowers[2].clone()];
        let mut place = Self {
            process: Command::new("true").spawn()?,
            directories: [vec![upper.clone()], lowers.to_vec()].concat(),
            mounts,
            contents: Vec::new(),
            dir,
        };
        mount_bind(at.join("aside"), &lowers[1])?;
        mount("none", &lowers[2], "tmpfs", MountFlags::empty(), None)?;
        fs::copy("/usr/bin/busybox", lowers[0].join("sleep"))?;
        for (number, lower) in lowers.iter().enumerate() {
            fs::write(lower.join(format!("f{number}")), format!("lower {number}"))?;
        }
        place.contents = place
            .directories
            .iter()
            .map(|d| contents(d))
            .collect::<Result<_, _>>()?;
        let lowers: Vec<String> = lowers
            .iter()
            .map(|lower| lower.display().to_string())
            .collect();
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            lowers.join(":"),
            upper.display(),
            at.join("work").display()
        );
        let script = "mount -t overlay overlay -o \"$0\" \"$1\" && exec chroot \"$1\" /sleep 1000";
        let _ = place.process.wait();
        place.process = Command::new("unshare")
            .args([
                "--mount",
                "--propagation",
                "private",
                "sh",
                "-c",
                script,
                &options,
            ])
            .arg(at.join("merged"))
            .spawn()?;
        let cmdline = format!("/proc/{}/cmdline", place.process.id());
        let deadline = Instant::now() + Duration::from_secs(60);
        while !fs::read(&cmdline)?.starts_with(b"/sleep") {
            assert!(place.process.try_wait()?.is_none() && Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(place)
    }

    fn at(&self, name: &str) -> io::Result<PathBuf> {
        Ok(self.dir.path().canonicalize()?.join(name))
    }

    /// Changes what this thread's mount namespace shows. Returns the node's root, if that is elsewhere.
    fn change(&self, seed: &mut u64) -> io::Result<Option<PathBuf>> {
        let any = |seed: &mut u64| self.directories[next(seed) % self.directories.len()].clone();
        let mounted = self.mounts[next(seed) % self.mounts.len()].clone();
        let empty = self.at("empty")?;
        match next(seed) % 12 {
            0 => unmount(&mounted, UnmountFlags::DETACH)?,
            1 => mount_bind(&empty, any(seed))?,
            2 => mount_bind(any(seed), any(seed))?,
            3 => mount("none", self.at("l")?, "tmpfs", MountFlags::empty(), None)?,
            4 => mount_bind(&mounted, &mounted)?,
            5 => {
                mount_bind(&mounted, &mounted)?;
                mount_remount(&mounted, MountFlags::BIND | MountFlags::RDONLY, "")?;
            }
            // The mounts below are not part of it.
            6 => mount_bind(self.at("state")?, self.at("state")?)?,
            7 => mount_bind_recursive(self.at("")?, self.at("")?)?,
            8 | 9 => {
                let host = self.at("host")?;
                if next(seed).is_multiple_of(2) {
                    mount_bind_recursive("/", &host)?;
                } else {
                    mount_bind("/", &host)?;
                    mount_bind("/proc", host.join("proc"))?;
                }
                return Ok(Some(host));
            }
            10 => mount_move(&mounted, self.at("elsewhere")?)?,
            _ => {}
        }
        Ok(None)
    }

    /// Looks at the container from a changed namespace. Returns whether it was found, and then is what it was.
    fn look(&self, number: u32) -> io::Result<bool> {
        let mut seed = u64::from(number) * 7919 + 1;
        let mut flags = UnshareFlags::NEWNS | UnshareFlags::FS;
        if next(&mut seed).is_multiple_of(2) {
            flags |= UnshareFlags::NEWCGROUP;
        }
        // Safe: no other thread relies on this one's namespaces or directory.
        #[allow(unsafe_code, reason = "it can only change this thread")]
        unsafe {
            unshare_unsafe(flags)?;
        }
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", private)?;
        let mut roots = Roots::default();
        for _ in 0..=next(&mut seed) % 2 {
            // A mount can have been moved or unmounted before.
            if let Ok(Some(host)) = self.change(&mut seed) {
                roots.host_root = Some(host);
            }
        }
        let pid = format!("pid:{}", self.process.id());
        let container = match find(&roots, &pid) {
            Ok(container) => container,
            Err(error) => {
                let known = matches!(error, Error::LayerUnproven { .. } | Error::Mount { .. });
                assert!(known, "{number}: {error}");
                let text = error.to_string();
                let named = self
                    .directories
                    .iter()
                    .any(|d| text.contains(&d.display().to_string()));
                assert!(named, "{number}: {text}");
                return Ok(false);
            }
        };
        let overlay = &container.overlay;
        let found = [std::slice::from_ref(&overlay.upper), &overlay.lowers].concat();
        let found: Vec<_> = found
            .iter()
            .map(|d| contents(d))
            .collect::<Result<_, _>>()?;
        assert_eq!(found, self.contents, "{number}");
        recheck(&roots, &container).map_err(IoError::other)?;
        Ok(true)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        for mount in &self.mounts {
            let _ = unmount(mount, UnmountFlags::DETACH);
        }
    }
}

/// The next of a series of numbers that is the same in every run.
fn next(seed: &mut u64) -> usize {
    *seed = seed
        .wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(1_442_695_040_888_963_407);
    (*seed >> 40) as usize
}

fn contents(directory: &Path) -> io::Result<BTreeMap<PathBuf, Vec<u8>>> {
    let mut found = BTreeMap::new();
    for entry in walkdir::WalkDir::new(directory).min_depth(1) {
        let entry = entry?;
        let name = entry
            .path()
            .strip_prefix(directory)
            .map_err(IoError::other)?
            .to_owned();
        let content = if entry.file_type().is_file() {
            fs::read(entry.path())?
        } else {
            Vec::new()
        };
        found.insert(name, content);
    }
    Ok(found)
}

#[test]
fn in_any_mount_namespace_the_layers_are_the_containers_or_it_is_refused() -> Outcome {
    if ignored(&[
        Need::Root,
        Need::Program("unshare"),
        Need::Program("busybox"),
    ]) {
        return Ok(());
    }
    let place = Place::new()?;
    let mut equal = 0;
    for number in 0..VARIATIONS {
        let looked = std::thread::scope(|scope| scope.spawn(|| place.look(number)).join());
        let looked = looked.map_err(|_| format!("variation {number}"))?;
        equal += u32::from(looked.map_err(|error| format!("variation {number}: {error}"))?);
    }
    assert!(equal >= VARIATIONS / 5, "only {equal} were not refused");
    assert!(
        equal <= VARIATIONS * 4 / 5,
        "only {} were refused",
        VARIATIONS - equal
    );

    // A mount that is gone from every table leaves an empty directory in all of them.
    unmount(&place.mounts[1], UnmountFlags::DETACH)?;
    let error = find(&Roots::default(), &format!("pid:{}", place.process.id())).unwrap_err();
    let told = error.to_string();
    assert!(matches!(error, Error::LayerUnproven { .. }), "{told}");
    assert!(
        told.contains(&place.mounts[1].display().to_string()),
        "{told}"
    );
    Ok(())
}
