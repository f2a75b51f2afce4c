//! A container with content, and everything that a save of it reads and writes, in one directory.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use serde_json::json;
use upperdeck::common::digest::Digest;
use upperdeck::image::manifest::platform::Platform;
use upperdeck::store::layout::Directory;

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_upperdeck");
/// The file that changes while it is read, and its length in bytes.
pub const CHANGES: &str = "home/user/changes";
pub const CHANGING: usize = 300_000;
/// Long before anything that a container does.
const MTIME: u64 = 1_700_000_000;

/// Paths (directories end in a slash), modes and contents of the base's two layers.
const BASE: [&[(&str, u32, &str)]; 2] = [
    &[
        ("data/", 0o755, ""),
        ("etc/", 0o755, ""),
        ("etc/motd", 0o644, "Welcome.\n"),
        ("etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\n"),
        ("home/", 0o755, ""),
        ("home/user/", 0o755, ""),
        ("opt/", 0o755, ""),
        ("opt/tool", 0o755, "#!/bin/sh\n"),
        ("proc/", 0o555, ""),
        ("root/", 0o700, ""),
        ("usr/", 0o755, ""),
        ("usr/doc/", 0o755, ""),
        ("usr/doc/manual", 0o644, "There is none.\n"),
        ("var/", 0o755, ""),
        ("var/app/", 0o755, ""),
        ("var/app/old", 0o644, "old\n"),
    ],
    &[
        ("etc/", 0o755, ""),
        ("etc/app.conf", 0o644, "colour = blue\n"),
    ],
];

/// A directory, and a container whose overlay is in it.
pub struct World {
    pub home: PathBuf,
    /// PID of its first process.
    pub pid: u32,
    cgroup: PathBuf,
    maker: Child,
    stdin: Option<ChildStdin>,
}

impl World {
    /// Creates a container in `home`, which must be empty.
    pub fn new(home: &Path) -> Result<Self> {
        let home = home.canonicalize()?;
        base(&home)?;
        for name in ["upper", "work", "merged", "none", "said"] {
            fs::create_dir(home.join(name))?;
        }
        let mut maker = Command::new(PROGRAM)
            .arg("__demo-container")
            .arg(&home)
            .arg("root")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut stdin = maker.stdin.take().context("stdin")?;
        let answers = BufReader::new(maker.stdout.take().context("stdout")?);
        let cgroup = cgroup(maker.id())?;
        stdin.write_all(b"\n")?;
        let (mut pid, mut ready) = (0, false);
        for line in answers.lines() {
            let line = line?;
            match line.strip_prefix("pid ") {
                Some(number) => pid = number.parse()?,
                None => ready = line == "ready",
            }
            if pid != 0 && ready {
                break;
            }
        }
        ensure!(ready, "no container");
        Ok(Self {
            home,
            pid,
            cgroup,
            maker,
            stdin: Some(stdin),
        })
    }

    /// Returns the path of a file or directory as seen in the container.
    pub fn inside(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root/{path}", self.pid))
    }

    /// Creates files of every type that a layer can hold.
    pub fn work(&self) -> Result<()> {
        let at = |path: &str| self.inside(path);
        fs::write(at("home/user/notes.txt"), "first\n")?;
        fs::hard_link(at("home/user/notes.txt"), at("home/user/notes-2.txt"))?;
        symlink("notes.txt", at("home/user/latest"))?;
        fs::write(at("home/user/large.bin"), noise(3_000_001))?;
        let sparse = fs::File::create(at("home/user/sparse"))?;
        sparse.set_len(5 << 20)?;
        std::os::unix::fs::FileExt::write_all_at(&sparse, b"in the middle", 2_500_000)?;
        let long = format!("home/user/{}", "long".repeat(40));
        fs::write(at(&long), "a long name\n")?;
        rustix::fs::setxattr(
            at("home/user/notes.txt"),
            "user.comment",
            b"an attribute",
            rustix::fs::XattrFlags::empty(),
        )?;
        fs::create_dir(at("home/user/many"))?;
        for number in 0..12 {
            fs::write(
                at(&format!("home/user/many/{number}")),
                format!("{number}\n"),
            )?;
        }
        fs::OpenOptions::new()
            .append(true)
            .open(at("etc/motd"))?
            .write_all(b"Changed.\n")?;
        fs::remove_dir_all(at("usr/doc"))?;
        fs::remove_dir_all(at("var/app"))?;
        fs::create_dir(at("var/app"))?;
        fs::write(at("var/app/new"), "new\n")?;
        fs::set_permissions(at("opt/tool"), fs::Permissions::from_mode(0o2750))?;
        fs::create_dir(at("root/.ssh"))?;
        fs::write(at("root/.ssh/id_ed25519"), "a private key\n")?;
        settle();
        Ok(())
    }

    /// Makes changes between two saves.
    pub fn work_on(&self) -> Result<()> {
        let at = |path: &str| self.inside(path);
        fs::OpenOptions::new()
            .append(true)
            .open(at("home/user/notes.txt"))?
            .write_all(b"second\n")?;
        fs::remove_file(at("home/user/many/3"))?;
        fs::remove_file(at("etc/app.conf"))?;
        fs::create_dir(at("home/user/more"))?;
        fs::write(at("home/user/more/file"), noise(100_000))?;
        settle();
        Ok(())
    }

    /// Fills the changing file with one letter.
    pub fn change(&self, letter: &str) -> Result<()> {
        if !self.changed(letter).unwrap_or_default() {
            fs::write(self.inside(CHANGES), letter.repeat(CHANGING))?;
            settle();
        }
        Ok(())
    }

    /// Returns whether the changing file is full of this letter.
    pub fn changed(&self, letter: &str) -> Result<bool> {
        Ok(fs::read_to_string(self.inside(CHANGES))? == letter.repeat(CHANGING))
    }

    /// Thaws the container.
    pub fn thaw(&self) {
        // One of the two files exists.
        let _ = fs::write(self.cgroup.join("freezer.state"), "THAWED");
        let _ = fs::write(self.cgroup.join("cgroup.freeze"), "0");
    }

    /// Checks that the container runs: its cgroup is not frozen, and none of its processes is stopped.
    pub fn runs(&self) -> Result<()> {
        for (file, thawed) in [("freezer.state", "THAWED"), ("cgroup.freeze", "0")] {
            if let Ok(state) = fs::read_to_string(self.cgroup.join(file)) {
                ensure!(
                    state.trim() == thawed,
                    "the container stays frozen: {state}"
                );
            }
        }
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid))?;
        let state = stat
            .rsplit_once(") ")
            .and_then(|(_, rest)| rest.chars().next());
        ensure!(
            matches!(state, Some('S' | 'R')),
            "the container's process: {state:?}"
        );
        Ok(())
    }
}

impl Drop for World {
    fn drop(&mut self) {
        drop(self.stdin.take());
        let end = Instant::now() + Duration::from_secs(5);
        while matches!(self.maker.try_wait(), Ok(None)) && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
        }
        // Also kills the container, if it did not end.
        let _ = self.maker.kill();
        let _ = self.maker.wait();
        while fs::remove_dir(&self.cgroup).is_err() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Waits until everything written is older than the clock's tick, so that every save sees the same.
fn settle() {
    std::thread::sleep(Duration::from_millis(60));
}

fn cgroup(pid: u32) -> Result<PathBuf> {
    let hierarchies = [
        "/sys/fs/cgroup/freezer",
        "/sys/fs/cgroup",
        "/sys/fs/cgroup/unified",
    ];
    for hierarchy in hierarchies {
        let path = Path::new(hierarchy).join(format!("upperdeck-faults-{pid}"));
        if fs::create_dir(&path).is_ok() {
            if fs::write(path.join("cgroup.procs"), pid.to_string()).is_ok() {
                return Ok(path);
            }
            fs::remove_dir(&path)?;
        }
    }
    anyhow::bail!("no cgroup can be made")
}

/// Returns bytes that compress to about half.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 1_u64;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state & 15) as u8
    };
    std::iter::repeat_with(next).take(length).collect()
}

/// Creates the base in the layout `images` with the tag `base`, and unpacked in `lower1` and `lower2`.
fn base(home: &Path) -> Result<()> {
    let layout = Directory::new(home.join("images"));
    let (mut descriptors, mut diff_ids) = (Vec::new(), Vec::new());
    for (items, lower) in BASE.into_iter().zip(["lower1", "lower2"]) {
        let mut builder = tar::Builder::new(Vec::new());
        for (path, mode, content) in items {
            let mut header = tar::Header::new_ustar();
            header.set_entry_type(if path.ends_with('/') {
                tar::EntryType::Directory
            } else {
                tar::EntryType::Regular
            });
            header.set_mode(*mode);
            header.set_uid(0);
            header.set_gid(0);
            header.set_mtime(MTIME);
            header.set_size(content.len() as u64);
            builder.append_data(&mut header, path, content.as_bytes())?;
        }
        let tar = Bytes::from(builder.into_inner()?);
        let lower = home.join(lower);
        fs::create_dir(&lower)?;
        let mut archive = tar::Archive::new(&tar[..]);
        archive.set_preserve_permissions(true);
        archive.set_preserve_ownerships(true);
        archive.set_preserve_mtime(true);
        archive.unpack(&lower)?;
        for (path, ..) in items.iter().filter(|(path, ..)| path.ends_with('/')) {
            let time = UNIX_EPOCH + Duration::from_secs(MTIME);
            fs::File::open(lower.join(path))?.set_modified(time)?;
        }
        let digest = Digest::of(&tar);
        layout.put_blob(&tar, &digest)?;
        descriptors.push(json!({
            "mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest, "size": tar.len(),
        }));
        diff_ids.push(digest);
    }
    let config = Bytes::from(
        json!({
            "architecture": Platform::host().architecture,
            "os": "linux",
            "config": {"Cmd": ["/bin/sh"]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        })
        .to_string(),
    );
    let digest = Digest::of(&config);
    layout.put_blob(&config, &digest)?;
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": media_type,
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest, "size": config.len(),
        },
        "layers": descriptors,
    });
    layout.put_manifest(&Bytes::from(manifest.to_string()), media_type, "base")?;
    Ok(())
}
