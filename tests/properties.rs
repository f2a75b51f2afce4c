//! Property tests of the central guarantee: for a random tree and random changes made through a real overlay mount, the
//! layer applied over the base equals what the mount showed, in every detail.
//!
//! `UPPERDECK_PROPTEST_CASES=5000 cargo test --test properties` runs that many cases for each kind of mount instead of
//! the few that CI has time for.

#[path = "harness/mod.rs"]
mod harness;
#[path = "harness/layer.rs"]
mod layer;

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek as _, Write as _};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use harness::{Outcome, Stop, Test};
use layer::{Source, layer_of, make, make_cut, scan};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestError, TestRunner};
use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
    fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, mount_bind,
    mount_change, move_mount,
};
use upperdeck::image::verify::layers::Layers;
use upperdeck::image::verify::specify;
use upperdeck::image::verify::tree::{Ignore, Tree, compare};
use upperdeck::image::verify::validate::{self, Expected};
use upperdeck::layer::Compression;
use upperdeck::layer::scan::Scan;
use upperdeck::node::overlay::volume::{Volume, VolumeLookup};
use upperdeck::node::overlay::xattr::Namespace;

/// Number of cases of each kind, unless set by the environment.
const CASES: u32 = 40;

/// A change by a user. Paths are short and few, so that changes interact.
#[derive(Clone, Debug)]
enum Change {
    Write {
        path: String,
        seed: u8,
        length: u32,
    },
    Append {
        path: String,
        seed: u8,
    },
    Patch {
        path: String,
        at: u32,
    },
    Truncate {
        path: String,
        length: u32,
    },
    OpenOnly {
        path: String,
    },
    Unlink {
        path: String,
    },
    Rmdir {
        path: String,
    },
    RemoveAll {
        path: String,
    },
    Mkdir {
        path: String,
        mode: u32,
    },
    RemoveAndMkdir {
        path: String,
    },
    Rename {
        from: String,
        to: String,
    },
    Exchange {
        from: String,
        to: String,
    },
    Chmod {
        path: String,
        mode: u32,
    },
    Chown {
        path: String,
        uid: u32,
        gid: u32,
    },
    Times {
        path: String,
        seconds: i64,
        nanos: u32,
    },
    Symlink {
        path: String,
        target: String,
    },
    Link {
        from: String,
        to: String,
    },
    SetXattr {
        path: String,
        name: String,
        value: Vec<u8>,
    },
    RemoveXattr {
        path: String,
        name: String,
    },
    Node {
        path: String,
        kind: u8,
    },
    ReplaceByFile {
        path: String,
    },
}

fn path() -> impl Strategy<Value = String> {
    let name = prop::sample::select(vec!["a", "b", "c", "a-b", "\u{e9}", "n\nl"]);
    prop::collection::vec(name, 1..4).prop_map(|names| names.join("/"))
}

fn change() -> impl Strategy<Value = Change> {
    let mode = prop::sample::select(vec![0o644, 0o600, 0o755, 0o700, 0o4755, 0o2755, 0o1777, 0]);
    let name = || prop::sample::select(vec!["user.a", "user.b"]).prop_map(str::to_owned);
    let value = prop::collection::vec(any::<u8>(), 0..20);
    let seconds = prop_oneof![
        -3i64..3,
        999_999_990i64..1_000_000_010,
        Just(8_589_934_592i64)
    ];
    let target = prop_oneof![
        path(),
        Just("/absolute".to_owned()),
        Just("../up".to_owned())
    ];
    prop_oneof![
        4 => (path(), any::<u8>(), 0u32..20_000).prop_map(|(path, seed, length)| Change::Write { path, seed, length }),
        1 => (path(), any::<u8>()).prop_map(|(path, seed)| Change::Append { path, seed }),
        1 => (path(), 0u32..70_000).prop_map(|(path, at)| Change::Patch { path, at }),
        1 => (path(), 0u32..30_000).prop_map(|(path, length)| Change::Truncate { path, length }),
        1 => path().prop_map(|path| Change::OpenOnly { path }),
        3 => path().prop_map(|path| Change::Unlink { path }),
        1 => path().prop_map(|path| Change::Rmdir { path }),
        2 => path().prop_map(|path| Change::RemoveAll { path }),
        4 => (path(), mode.clone()).prop_map(|(path, mode)| Change::Mkdir { path, mode }),
        2 => path().prop_map(|path| Change::RemoveAndMkdir { path }),
        4 => (path(), path()).prop_map(|(from, to)| Change::Rename { from, to }),
        1 => (path(), path()).prop_map(|(from, to)| Change::Exchange { from, to }),
        2 => (path(), mode).prop_map(|(path, mode)| Change::Chmod { path, mode }),
        1 => (path(), 0u32..3, 0u32..3).prop_map(|(path, uid, gid)| Change::Chown { path, uid, gid }),
        2 => (path(), seconds, 0u32..2).prop_map(|(path, seconds, nanos)| Change::Times { path, seconds, nanos }),
        2 => (path(), target).prop_map(|(path, target)| Change::Symlink { path, target }),
        3 => (path(), path()).prop_map(|(from, to)| Change::Link { from, to }),
        2 => (path(), name(), value).prop_map(|(path, name, value)| Change::SetXattr { path, name, value }),
        1 => (path(), name()).prop_map(|(path, name)| Change::RemoveXattr { path, name }),
        1 => (path(), 0u8..3).prop_map(|(path, kind)| Change::Node { path, kind }),
        2 => path().prop_map(|path| Change::ReplaceByFile { path }),
    ]
}

/// Applies a change as far as possible: most changes do not fit the current tree.
fn apply(root: &Path, change: &Change) -> io::Result<()> {
    let at = |path: &str| root.join(path);
    let bytes = |seed: u8, length: u32| -> Vec<u8> {
        (0..length)
            .map(|i| seed.wrapping_add((i % 251) as u8))
            .collect()
    };
    // Do not follow a link or wait for a FIFO that an earlier change created.
    let no_follow = rustix::fs::OFlags::NOFOLLOW
        .union(rustix::fs::OFlags::NONBLOCK)
        .bits() as i32;
    let open =
        |options: &mut OpenOptions, path: &str| options.custom_flags(no_follow).open(at(path));
    let regular = |path: &str| -> io::Result<()> {
        if fs::symlink_metadata(at(path))?.is_file() {
            Ok(())
        } else {
            Err(io::ErrorKind::InvalidInput.into())
        }
    };
    let fresh = |path: &str| {
        if fs::symlink_metadata(at(path)).is_ok() {
            regular(path)
        } else {
            Ok(())
        }
    };
    match change {
        Change::Write { path, seed, length } => {
            fresh(path)?;
            open(
                OpenOptions::new().write(true).create(true).truncate(true),
                path,
            )?
            .write_all(&bytes(*seed, *length))
        }
        Change::Append { path, seed } => {
            regular(path)?;
            open(OpenOptions::new().append(true), path)?.write_all(&bytes(*seed, 10))
        }
        Change::Patch { path, at } => {
            regular(path)?;
            let mut file = open(OpenOptions::new().write(true), path)?;
            file.seek(io::SeekFrom::Start(u64::from(*at)))?;
            file.write_all(b"patch")
        }
        Change::Truncate { path, length } => {
            regular(path)?;
            open(OpenOptions::new().write(true), path)?.set_len(u64::from(*length))
        }
        Change::OpenOnly { path } => {
            regular(path)?;
            open(OpenOptions::new().read(true).write(true), path).map(drop)
        }
        Change::Unlink { path } => fs::remove_file(at(path)),
        Change::Rmdir { path } => fs::remove_dir(at(path)),
        Change::RemoveAll { path } => fs::remove_dir_all(at(path)),
        Change::Mkdir { path, mode } => {
            fs::create_dir(at(path))?;
            fs::set_permissions(at(path), fs::Permissions::from_mode(*mode))
        }
        Change::RemoveAndMkdir { path } => {
            fs::remove_dir_all(at(path))?;
            fs::create_dir(at(path))
        }
        Change::Rename { from, to } => fs::rename(at(from), at(to)),
        Change::Exchange { from, to } => {
            let flags = rustix::fs::RenameFlags::EXCHANGE;
            Ok(rustix::fs::renameat_with(
                CWD,
                at(from),
                CWD,
                at(to),
                flags,
            )?)
        }
        Change::Chmod { path, mode } => {
            if fs::symlink_metadata(at(path))?.is_symlink() {
                return Ok(());
            }
            fs::set_permissions(at(path), fs::Permissions::from_mode(*mode))
        }
        Change::Chown { path, uid, gid } => lchown(at(path), Some(*uid), Some(*gid)),
        Change::Times {
            path,
            seconds,
            nanos,
        } => {
            let time = Timespec {
                tv_sec: *seconds,
                tv_nsec: i64::from(*nanos),
            };
            let times = Timestamps {
                last_access: time,
                last_modification: time,
            };
            Ok(rustix::fs::utimensat(
                CWD,
                at(path),
                &times,
                AtFlags::SYMLINK_NOFOLLOW,
            )?)
        }
        Change::Symlink { path, target } => symlink(target, at(path)),
        Change::Link { from, to } => fs::hard_link(at(from), at(to)),
        Change::SetXattr { path, name, value } => Ok(rustix::fs::lsetxattr(
            at(path),
            OsStr::from_bytes(name.as_bytes()),
            value,
            XattrFlags::empty(),
        )?),
        Change::RemoveXattr { path, name } => {
            Ok(rustix::fs::lremovexattr(at(path), name.as_str())?)
        }
        Change::Node { path, kind } => {
            let (kind, device) = match kind {
                0 => (FileType::Fifo, 0),
                1 => (FileType::CharacterDevice, rustix::fs::makedev(1, 3)),
                _ => (FileType::BlockDevice, rustix::fs::makedev(7, 200)),
            };
            Ok(rustix::fs::mknodat(
                CWD,
                at(path),
                kind,
                Mode::RUSR,
                device,
            )?)
        }
        Change::ReplaceByFile { path } => {
            if fs::symlink_metadata(at(path))?.is_dir() {
                fs::remove_dir_all(at(path))?;
            } else {
                fs::remove_file(at(path))?;
            }
            File::create_new(at(path))?.write_all(b"replaced")
        }
    }
}

/// How the overlay is mounted.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Default,
    Redirect,
    Index,
    Userxattr,
}

impl Kind {
    fn namespace(self) -> Namespace {
        if matches!(self, Self::Userxattr) {
            Namespace::User
        } else {
            Namespace::Trusted
        }
    }

    fn options(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Default => &[
                ("redirect_dir", "off"),
                ("metacopy", "off"),
                ("index", "off"),
            ],
            Self::Redirect => &[("redirect_dir", "on"), ("metacopy", "on"), ("index", "off")],
            Self::Index => &[
                ("redirect_dir", "off"),
                ("metacopy", "off"),
                ("index", "on"),
            ],
            Self::Userxattr => &[("index", "off")],
        }
    }
}

/// A detached mount that is accessed through its descriptor: it never remains mounted, whatever happens.
struct Overlay(OwnedFd);

impl Overlay {
    /// `lowers` are topmost first.
    fn new(kind: Kind, upper: Option<(&Path, &Path)>, lowers: &[PathBuf]) -> Result<Self> {
        let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).context("fsopen overlay")?;
        let fs = context.as_fd();
        fsconfig_set_string(fs, "source", "upperdeck-test")?;
        for (name, value) in kind.options() {
            fsconfig_set_string(fs, *name, *value)?;
        }
        if matches!(kind, Kind::Userxattr) {
            fsconfig_set_flag(fs, "userxattr")?;
        }
        for lower in lowers {
            fsconfig_set_string(fs, "lowerdir+", lower)?;
        }
        if let Some((upper, work)) = upper {
            fsconfig_set_string(fs, "upperdir", upper)?;
            fsconfig_set_string(fs, "workdir", work)?;
        }
        fsconfig_create(fs).context("mounting the overlay (see dmesg)")?;
        Ok(Self(fsmount(
            fs,
            FsMountFlags::FSMOUNT_CLOEXEC,
            MountAttrFlags::empty(),
        )?))
    }

    fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/.", self.0.as_raw_fd()))
    }

    fn tree(&self) -> Result<Tree> {
        Ok(Tree::from_directory(&self.path(), false)?)
    }
}

/// Makes a base layer of each list of changes. Returns the lowers, topmost first, and their merged tree.
fn lowers(kind: Kind, home: &Path, base: &[Vec<Change>]) -> Result<(Vec<PathBuf>, Tree)> {
    let directory = |name: String| -> Result<PathBuf> {
        let path = home.join(name);
        fs::create_dir(&path)?;
        Ok(path)
    };
    // The kernel needs at least one.
    let mut lowers = vec![directory("empty".to_owned())?];
    for (number, changes) in base.iter().enumerate() {
        let (upper, work) = (
            directory(format!("lower{number}"))?,
            directory(format!("work{number}"))?,
        );
        // As image layers are unpacked: without redirects and metacopy.
        let plain = if matches!(kind, Kind::Userxattr) {
            Kind::Userxattr
        } else {
            Kind::Default
        };
        let overlay = Overlay::new(plain, Some((&upper, &work)), &lowers)?;
        for change in changes {
            apply(&overlay.path(), change).ok();
        }
        drop(overlay);
        lowers.insert(0, upper);
    }
    let mut two = lowers.clone();
    two.push(directory("empty2".to_owned())?);
    let before = Overlay::new(kind, None, &two)?.tree()?;
    Ok((lowers, before))
}

/// Tests a case in which each list of changes is a layer, the last one the upper. Returns whether the case counts.
fn case(kind: Kind, history: &[Vec<Change>]) -> Result<bool> {
    let home = tempfile::Builder::new()
        .prefix("upperdeck-property")
        .tempdir()?;
    let directory = |name: String| -> Result<PathBuf> {
        let path = home.path().join(name);
        fs::create_dir(&path)?;
        Ok(path)
    };
    let (changes, base) = history.split_last().context("no history")?;
    let (lowers, before) = lowers(kind, home.path(), base)?;
    let (upper, work) = (
        directory("upper".to_owned())?,
        directory("work".to_owned())?,
    );
    let overlay = Overlay::new(kind, Some((&upper, &work)), &lowers)?;
    for change in changes {
        apply(&overlay.path(), change).ok();
    }
    let live = overlay.tree()?;
    drop(overlay);
    // Mounted again: a mount continues to show hard links that it made to copied-up symbolic links as two files.
    let merged = Overlay::new(kind, Some((&upper, &work)), &lowers)?.tree()?;
    let source = Source::new(upper.clone(), lowers.clone(), kind.namespace());
    let made = match make(&source, Compression::None, 2) {
        // A case that cannot be represented is refused: a changed base file whose other names are not in the upper.
        Err(message) if matches!(kind, Kind::Index) && message.contains("index=on") => {
            return Ok(false);
        }
        other => other.map_err(anyhow::Error::msg)?,
    };
    ensure!(
        made.layer.unstable.is_empty(),
        "unstable: {:?}",
        made.layer.unstable
    );
    let mut layers = Layers::on_top_of(before.clone());
    layers.apply(made.bytes.as_slice())?;
    let after = layers.into_tree();
    let ignore = Ignore {
        mtime_nanos: true,
        root: true,
        xattrs: vec![b"security.selinux".to_vec()],
        ..Ignore::default()
    };
    same(
        "the layer over the base, and the mount",
        &merged,
        &after,
        &ignore,
    )?;
    // A specification that is written from the layer is valid for it.
    let mut spec = Vec::new();
    specify::layer(made.bytes.as_slice(), 4096, &mut spec)?;
    let spec = Expected::parse(std::str::from_utf8(&spec)?)?;
    let report = validate::layer(made.bytes.as_slice(), &spec, 20)?;
    ensure!(report.is_valid(), "written from the layer: {report}");
    // Cut wherever possible.
    let cut = make_cut(&source, 1).map_err(anyhow::Error::msg)?;
    let mut layers = Layers::on_top_of(before.clone());
    for (_, bytes) in &cut {
        layers.apply(bytes.as_slice())?;
    }
    let parts = layers.into_tree();
    same("one layer, and several", &after, &parts, &ignore)?;
    let links = Ignore {
        hardlinks: true,
        ..ignore
    };
    same(
        "the layer over the base, and the mount while it was in use",
        &live,
        &after,
        &links,
    )?;
    // The reader that proves bases sees the lowers as the kernel does. It does not follow hard links into other layers.
    let ours = Tree::from_lowers(&lowers, kind.namespace())?;
    same(
        "the lowers, by the kernel and by us",
        &before,
        &ours,
        &links,
    )?;
    Ok(true)
}

/// Tests base layers as in [`case`], then applies each list of changes to the upper and saves it on top of the previous
/// saves. Returns the number of saves on top of another.
fn chain(kind: Kind, base: &[Vec<Change>], saves: &[Vec<Change>], settle: bool) -> Result<u32> {
    let home = tempfile::Builder::new()
        .prefix("upperdeck-property")
        .tempdir()?;
    let (lowers, before) = lowers(kind, home.path(), base)?;
    let (upper, work) = (home.path().join("upper"), home.path().join("work"));
    fs::create_dir(&upper)?;
    fs::create_dir(&work)?;
    let source = Source::new(upper.clone(), lowers.clone(), kind.namespace());
    let mut earlier: Option<Scan> = None;
    let mut layers = Layers::on_top_of(before.clone());
    let mut last = None;
    let mut on_top = 0;
    for changes in saves {
        let overlay = Overlay::new(kind, Some((&upper, &work)), &lowers)?;
        for change in changes {
            apply(&overlay.path(), change).ok();
        }
        drop(overlay);
        if settle {
            // So that the rescan can trust the time stamps.
            std::thread::sleep(4 * upperdeck::layer::scan::tick());
        }
        let merged = Overlay::new(kind, Some((&upper, &work)), &lowers)?.tree()?;
        let fresh = match scan(&source, 2, None) {
            Err(message) if matches!(kind, Kind::Index) && message.contains("index=on") => {
                return Ok(on_top);
            }
            other => other.map_err(anyhow::Error::msg)?,
        };
        let now = scan(&source, 2, earlier.as_ref()).map_err(anyhow::Error::msg)?;
        ensure!(
            listing(&fresh) == listing(&now),
            "scanned from nothing, and again:\n{:#?}\n{:#?}",
            listing(&fresh),
            listing(&now)
        );
        let delta = earlier
            .as_ref()
            .and_then(|earlier| now.changes_since(earlier, &|_| false));
        let made = match delta {
            Some(delta) => {
                on_top += 1;
                layer_of(delta)
            }
            None => {
                layers = Layers::on_top_of(before.clone());
                let scan = scan(&source, 2, None).map_err(anyhow::Error::msg)?;
                layer_of(scan)
            }
        };
        let made = made.map_err(anyhow::Error::msg)?;
        layers.apply(made.bytes.as_slice())?;
        let after = layers.into_tree();
        if let (Some(earlier), Some(last)) = (&earlier, &last)
            && now.differs_only_in_times(earlier, &|_| false)
        {
            let ignore = Ignore {
                directory_mtimes: true,
                root: true,
                ..Ignore::default()
            };
            same("what differs only in times", last, &after, &ignore)?;
        }
        let ignore = Ignore {
            mtime_nanos: true,
            root: true,
            xattrs: vec![b"security.selinux".to_vec()],
            ..Ignore::default()
        };
        same(
            "the layers over the base, and the mount",
            &merged,
            &after,
            &ignore,
        )?;
        last = Some(after.clone());
        layers = Layers::on_top_of(after);
        earlier = Some(now);
    }
    // Without a change, only entries whose stamps are too recent are saved again.
    if let (Some(earlier), true) = (&earlier, settle) {
        let now = scan(&source, 2, Some(earlier)).map_err(anyhow::Error::msg)?;
        let delta = now.changes_since(earlier, &|_| false);
        ensure!(
            delta.as_ref().is_some_and(Scan::is_empty),
            "changes where there are none: {:#?}",
            delta.as_ref().map(listing)
        );
    }
    Ok(on_top)
}

/// A container with a volume mounted at `at`; its root is in a mount namespace of this thread.
struct Mounted {
    merged: PathBuf,
    id: u64,
    volume: Volume,
}

impl Mounted {
    fn new(home: &Path, lowers: &[PathBuf], upper: &Path, work: &Path, at: &str) -> Result<Self> {
        nix::sched::unshare(
            nix::sched::CloneFlags::CLONE_FS | nix::sched::CloneFlags::CLONE_NEWNS,
        )?;
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", private)?;
        let (merged, volume) = (home.join("merged"), home.join("volume"));
        fs::create_dir(&merged)?;
        fs::create_dir(&volume)?;
        let overlay = Overlay::new(Kind::Default, Some((upper, work)), lowers)?;
        move_mount(
            overlay.0.as_fd(),
            "",
            CWD,
            &merged,
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
        )?;
        // Like a runtime, create missing directories.
        let mut point = merged.clone();
        for name in at.split('/') {
            point.push(name);
            if fs::symlink_metadata(&point).is_ok_and(|meta| !meta.is_dir()) {
                fs::remove_file(&point)?;
            }
            if fs::symlink_metadata(&point).is_err() {
                fs::create_dir(&point)?;
            }
        }
        mount_bind(&volume, &point)?;
        let table = fs::read("/proc/thread-self/mountinfo")?;
        let mounts = upperdeck::node::procfs::parse_mountinfo(&table)?;
        let mount = mounts.iter().find(|mount| mount.mount_point == point);
        let id = mount.context("no mount")?.id;
        let volume = open_volume(&merged, at, id).context("another mount")?;
        Ok(Self { merged, id, volume })
    }
}

/// Opens the volume in the container at `merged`; returns `None` if it is not that mount.
fn open_volume(merged: &Path, at: &str, mount: u64) -> Option<Volume> {
    let table = || {
        let table = fs::read("/proc/thread-self/mountinfo")?;
        upperdeck::node::procfs::parse_mountinfo(&table).map_err(std::io::Error::other)
    };
    let mounts = table().ok()?;
    let root = mounts.iter().find(|line| line.mount_point == merged)?;
    let lookup = VolumeLookup {
        container: merged,
        device: root.device,
        at: at.as_bytes(),
        mount,
        table: &table,
        is_traversable: &|_| false,
    };
    lookup.resolve().ok()?.open(&lookup, None, true).ok()
}

/// Like [`chain`], in a container with a volume: changes in the volume and outside are saved in separate layers.
fn volume_chain(
    base: &[Vec<Change>],
    saves: &[Vec<Change>],
    at: &str,
    settle: bool,
) -> Result<u32> {
    let home = tempfile::Builder::new()
        .prefix("upperdeck-property")
        .tempdir()?;
    let (lowers, before) = lowers(Kind::Default, home.path(), base)?;
    let (upper, work) = (home.path().join("upper"), home.path().join("work"));
    fs::create_dir(&upper)?;
    fs::create_dir(&work)?;
    let container = Mounted::new(home.path(), &lowers, &upper, &work, at)?;
    let mut sources = [(); 2].map(|()| {
        let mut source = Source::new(upper.clone(), lowers.clone(), Namespace::Trusted);
        source.mounts = vec![format!("/{at}")];
        source.saved = vec![format!("/{at}")];
        source
    });
    sources[1].volume = Some(container.volume.clone());
    sources[1].mounts.clear();
    let mut earlier: [Option<Scan>; 2] = [None, None];
    let mut layers = Layers::on_top_of(before.clone());
    let mut on_top = 0;
    for changes in saves {
        for change in changes {
            apply(&container.merged, change).ok();
        }
        // A directory above it was renamed: a save then reports that the volume is gone.
        if open_volume(&container.merged, at, container.id).is_none() {
            return Ok(on_top);
        }
        if settle {
            std::thread::sleep(4 * upperdeck::layer::scan::tick());
        }
        let seen = Tree::from_directory(&container.merged, false)?;
        let mut scans = Vec::new();
        for (source, earlier) in sources.iter().zip(&earlier) {
            let fresh = scan(source, 2, None).map_err(anyhow::Error::msg)?;
            let now = scan(source, 2, earlier.as_ref()).map_err(anyhow::Error::msg)?;
            ensure!(
                listing(&fresh) == listing(&now),
                "scanned from nothing, and again:\n{:#?}\n{:#?}",
                listing(&fresh),
                listing(&now)
            );
            // The stored scan is as good for the next save.
            let mut bytes = Vec::new();
            now.store(&|_| false, &mut bytes)?;
            let stored = Scan::restore(&mut bytes.as_slice(), bytes.len() as u64);
            let stored = stored.context("it is damaged")?;
            ensure!(listing(&stored.scan) == listing(&now), "kept, and back");
            scans.push(now);
        }
        let deltas: Option<Vec<Scan>> = scans
            .iter()
            .zip(&earlier)
            .map(|(now, earlier)| now.changes_since(earlier.as_ref()?, &|_| false))
            .collect();
        let changes = match deltas {
            Some(mut deltas) => {
                let (upper, volume) = deltas.split_at_mut(1);
                volume[0].clear_if_covered_by(&upper[0]);
                on_top += 1;
                deltas
            }
            None => {
                layers = Layers::on_top_of(before.clone());
                let scans = sources.iter().map(|source| scan(source, 2, None));
                let scans: Result<Vec<Scan>, String> = scans.collect();
                scans.map_err(anyhow::Error::msg)?
            }
        };
        for changes in changes {
            let made = layer_of(changes).map_err(anyhow::Error::msg)?;
            if !made.empty {
                layers.apply(made.bytes.as_slice())?;
            }
        }
        let after = layers.into_tree();
        let ignore = Ignore {
            mtime_nanos: true,
            root: true,
            xattrs: vec![b"security.selinux".to_vec()],
            ..Ignore::default()
        };
        same(
            "the layers over the base, and the container",
            &seen,
            &after,
            &ignore,
        )?;
        layers = Layers::on_top_of(after);
        earlier = scans
            .into_iter()
            .map(Some)
            .collect::<Vec<_>>()
            .try_into()
            .map_err(|_| anyhow::anyhow!("two scans"))?;
    }
    Ok(on_top)
}

/// Runs `work` in a thread of its own, which may change its namespaces.
fn aside<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| scope.spawn(work).join())
        .map_err(|_| anyhow::anyhow!("a thread died"))?
}

fn volume_property() -> Outcome {
    let cases = cases(Kind::Default)?;
    let base = prop::collection::vec(prop::collection::vec(change(), 0..30), 0..=3);
    let saves = prop::collection::vec(prop::collection::vec(change(), 0..15), 2..=4);
    let at = prop::sample::select(vec!["a", "a/b", "c/a/b"]);
    let on_top = std::cell::Cell::new(0);
    let history = (base, saves, at, any::<bool>());
    verdict(
        TestRunner::new(config(cases)).run(&history, |(base, saves, at, settle)| {
            let saved = aside(|| volume_chain(&base, &saves, at, settle));
            saved
                .map(|saves| on_top.set(on_top.get() + saves))
                .map_err(|error| TestCaseError::fail(format!("{error:#}")))
        }),
    )?;
    if on_top.get() < cases {
        return Err(Stop::Failed(format!(
            "only {} saves in {cases} cases were made on top of another",
            on_top.get()
        )));
    }
    Ok(())
}

/// Lists everything about a scan.
fn listing(scan: &Scan) -> Vec<String> {
    let emitted: std::collections::HashSet<u32> = scan.emitted().collect();
    (0..scan.len() as u32)
        .map(|index| {
            let e = &scan.entry(index);
            format!(
                "{} {} {:?} {:o} {}:{} {} {} {} {}.{} {:?} {:?} {:?} {}",
                if emitted.contains(&index) { "+" } else { "-" },
                scan.path(index).escape_ascii(),
                e.kind,
                e.mode,
                e.uid,
                e.gid,
                e.size,
                e.ino,
                if e.kind == upperdeck::layer::scan::Kind::Dir {
                    0
                } else {
                    e.nlink
                },
                e.ctime,
                e.ctime_nsec,
                scan.link(e),
                scan.xattrs(e),
                scan.content_location(e),
                scan.in_base(e),
            )
        })
        .collect()
}

fn same(what: &str, expected: &Tree, found: &Tree, ignore: &Ignore) -> Result<()> {
    let differences: Vec<String> = compare(expected, found, ignore)
        .iter()
        .map(ToString::to_string)
        .collect();
    ensure!(
        differences.is_empty(),
        "{what}:\n{}",
        differences.join("\n")
    );
    Ok(())
}

/// Returns the number of cases, if the kernel supports such mounts.
fn cases(kind: Kind) -> Result<u32, Stop> {
    harness::need_root()?;
    let empty = tempfile::tempdir()?;
    let (a, b) = (empty.path().join("a"), empty.path().join("b"));
    fs::create_dir(&a)?;
    fs::create_dir(&b)?;
    if let Err(error) = Overlay::new(kind, None, &[a, b]) {
        return Err(Stop::Ignored(format!(
            "the kernel does not mount such an overlay: {error:#}"
        )));
    }
    match std::env::var("UPPERDECK_PROPTEST_CASES") {
        Ok(text) => Ok(text.parse()?),
        Err(_) => Ok(CASES),
    }
}

fn config(cases: u32) -> Config {
    Config {
        cases,
        failure_persistence: None,
        max_shrink_iters: 400,
        ..Config::default()
    }
}

fn verdict<T: std::fmt::Debug>(result: Result<(), TestError<T>>) -> Outcome {
    match result {
        Ok(()) => Ok(()),
        Err(TestError::Fail(reason, history)) => {
            Err(Stop::Failed(format!("{reason}\n{history:#?}")))
        }
        Err(other) => Err(Stop::Failed(other.to_string())),
    }
}

fn property(kind: Kind) -> Outcome {
    let cases = cases(kind)?;
    let base = prop::collection::vec(prop::collection::vec(change(), 0..30), 1..=5);
    let history = (base, prop::collection::vec(change(), 1..30)).prop_map(|(mut base, upper)| {
        base.push(upper);
        base
    });
    let counted = std::cell::Cell::new(0);
    verdict(
        TestRunner::new(config(cases)).run(&history, |history| match case(kind, &history) {
            Ok(counts) => {
                counted.set(counted.get() + u32::from(counts));
                Ok(())
            }
            Err(error) => Err(TestCaseError::fail(format!("{error:#}"))),
        }),
    )?;
    if counted.get() * 4 < cases {
        return Err(Stop::Failed(format!(
            "only {} of {cases} cases were not refused",
            counted.get()
        )));
    }
    Ok(())
}

fn chain_property(kind: Kind) -> Outcome {
    let cases = cases(kind)?;
    let base = prop::collection::vec(prop::collection::vec(change(), 0..30), 0..=3);
    let saves = prop::collection::vec(prop::collection::vec(change(), 0..12), 2..=4);
    let on_top = std::cell::Cell::new(0);
    let history = (base, saves, any::<bool>());
    verdict(
        TestRunner::new(config(cases)).run(&history, |(base, saves, settle)| {
            let saved = chain(kind, &base, &saves, settle);
            saved
                .map(|saves| on_top.set(on_top.get() + saves))
                .map_err(|error| TestCaseError::fail(format!("{error:#}")))
        }),
    )?;
    // At least one save on top of another per case, if none of them was skipped.
    let least = if matches!(kind, Kind::Default | Kind::Userxattr) {
        cases
    } else {
        cases / 4
    };
    if on_top.get() < least {
        return Err(Stop::Failed(format!(
            "only {} saves in {cases} cases were made on top of another",
            on_top.get()
        )));
    }
    Ok(())
}

fn main() -> ExitCode {
    let kinds = [
        ("default", Kind::Default),
        ("redirect_dir_and_metacopy", Kind::Redirect),
        ("index", Kind::Index),
        ("userxattr", Kind::Userxattr),
    ];
    let whole = kinds.map(|(name, kind)| {
        Test::new(format!("layer_over_base_is_the_view::{name}"), move || {
            property(kind)
        })
    });
    let chains = kinds.map(|(name, kind)| {
        Test::new(
            format!("changes_over_what_was_saved_are_the_view::{name}"),
            move || chain_property(kind),
        )
    });
    let volumes = Test::new("a_volume_over_the_image_is_the_view", volume_property);
    let tests: Vec<Test> = whole.into_iter().chain(chains).chain([volumes]).collect();
    harness::main(&tests)
}
