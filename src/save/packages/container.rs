//! The packages that a container has more, less or in other versions than its base, from what the scans say is in the
//! image. Only files that describe packages are read, and of the base only those at the paths that changed.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::sync::Arc;

use rustix::fs::{FileType, Stat};
use tokio_util::sync::CancellationToken;

use super::{ASKED, ASKED_BYTES, programs, read};
use crate::image::manifest::Start;
use crate::image::packages::{Installed, MetadataFile, Packages, is_installed_at, metadata_file};
use crate::layer::scan::{Entry, Kind, Scan};
use crate::node::container::Container;
use crate::node::overlay::lower::{Found, Lowers, Stack, basename, dirname, join};
use crate::node::overlay::mount::OverlayMount;
use crate::node::overlay::root::Root;
use crate::save::{Context, Error};

/// Maximum number of names that are looked at in directories of the base which the container has deleted.
const MAX_NAMES: usize = 500_000;
/// Maximum number of directories of the base that are remembered.
const MAX_STACKS: usize = 10_000;
/// Maximum depth of such directories.
const MAX_DEPTH: usize = 64;

/// Maximum number of packages in the list of a save, and of bytes of its texts.
const LISTED: usize = 2000;
const LISTED_BYTES: usize = 256 << 10;

/// Returns the packages by which the image of a save, started as `start` says, differs from its base.
pub(in crate::save) async fn of_save(
    context: &Context,
    container: &Container,
    start: Start,
    scans: &[Arc<Scan>],
) -> Result<Packages, Error> {
    let (container, scans) = (container.clone(), scans.to_vec());
    let cancel = context.cancel.clone();
    let listed =
        tokio::task::spawn_blocking(move || with_programs(&container, &start, &scans, &cancel));
    let listed = listed.await.map_err(|_| Error::Worker)??;
    Ok(listed.limited(LISTED, LISTED_BYTES))
}

/// Returns the packages of a container as [`of`] does, for a list that is asked for.
pub(crate) fn asked(
    container: &Container,
    start: &Start,
    scans: &[Arc<Scan>],
    cancel: &CancellationToken,
) -> Result<Packages, Error> {
    Ok(with_programs(container, start, scans, cancel)?.limited(ASKED, ASKED_BYTES))
}

fn with_programs(
    container: &Container,
    start: &Start,
    scans: &[Arc<Scan>],
    cancel: &CancellationToken,
) -> Result<Packages, Error> {
    let mut packages = of(&container.overlay, scans, cancel)?;
    (packages.programs, packages.user) = programs::of(container, start);
    Ok(packages)
}

/// Returns the packages by which `scans` (one for each tree of the container) differ from the base. What cannot be read
/// is in the list; fails only if the save is cancelled.
fn of(
    overlay: &OverlayMount,
    scans: &[Arc<Scan>],
    cancel: &CancellationToken,
) -> Result<Packages, Error> {
    let roots = overlay.lowers.iter().chain(&overlay.data_only);
    let roots: io::Result<Vec<Root>> = roots.map(|path| Root::open(path)).collect();
    let (roots, problem) = match roots {
        Ok(roots) => (roots, None),
        Err(error) => (Vec::new(), Some(error)),
    };
    let mut base = Base {
        lowers: Lowers {
            merged: if problem.is_none() {
                overlay.lowers.len()
            } else {
                0
            },
            roots,
            namespace: overlay.namespace,
        },
        stacks: HashMap::new(),
        installed: Installed::default(),
        names: 0,
        cut: false,
        cancel,
    };
    let mut now = Installed::default();
    for scan in scans {
        for index in scan.emitted() {
            if cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            entry(scan, index, &mut now, &mut base);
        }
    }
    let mut packages = Packages::between(&base.installed, &now);
    if let Some(error) = problem {
        packages.note(format!("the base cannot be read: {error}"));
    }
    if base.cut {
        packages.note("more was deleted of the base than is looked through for packages");
    }
    Ok(packages)
}

fn entry(scan: &Scan, index: u32, now: &mut Installed, base: &mut Base<'_>) {
    let entry = scan.entry(index);
    match entry.kind {
        Kind::Dir | Kind::Opaque => {}
        Kind::Whiteout => base.deleted(&scan.path(index)),
        // A link can stand where the base has a directory with packages.
        Kind::Symlink if scan.in_base(&entry) => {
            let path = scan.path(index);
            base.deleted(&path);
            if !base.installed.at_and_below(&path).is_empty() {
                now.symlink(&path);
            }
        }
        _ => {
            if !may_describe(scan.name(&entry)) {
                return;
            }
            let path = scan.path(index);
            let Some(file) = described(&path) else {
                return;
            };
            if scan.in_base(&entry) {
                base.deleted(&path);
            }
            if entry.kind == Kind::File {
                read_entry(scan, &entry, &path, file, now);
            } else {
                now.unreadable(&path, "it is no file");
            }
        }
    }
}

/// Returns whether a name can be that of a file that describes packages, so that few paths need to be put together.
fn may_describe(name: &[u8]) -> bool {
    let names: [&[u8]; 8] = [
        b"METADATA",
        b"PKG-INFO",
        b"INSTALLER",
        b"DESCRIPTION",
        b"status",
        b"installed",
        b"rpmdb.sqlite",
        b"Packages",
    ];
    let ends: [&[u8]; 3] = [b".json", b".egg-info", b"Packages.db"];
    // The parts of a distroless image's database have any names. No tool adds to them in a container.
    names.contains(&name) || ends.iter().any(|end| name.ends_with(end))
}

/// Returns what the file at `path` describes, if that is installed there.
fn described(path: &[u8]) -> Option<MetadataFile> {
    let file = metadata_file(path)?;
    (file == MetadataFile::Rpm || is_installed_at(file, path).is_some()).then_some(file)
}

/// Reads a file of the image, if it is still as the scan saw it.
fn read_entry(scan: &Scan, entry: &Entry, path: &[u8], file: MetadataFile, now: &mut Installed) {
    let Some((length, cut)) = now.limit(path, file, entry.size) else {
        return;
    };
    let (root, at, ino) = match scan.content_location(entry) {
        Some(there) => (there.root, there.path.as_slice(), there.ino),
        None => (entry.root, path, entry.ino),
    };
    let content = scan.root(root).open_file(at, ino).and_then(|opened| {
        let Some(opened) = opened else {
            return Ok(None);
        };
        let opened = File::from(opened);
        let same = || Ok::<_, io::Error>(is_same(&rustix::fs::fstat(&opened)?, entry));
        if !same()? {
            return Ok(None);
        }
        let content = read(&opened, length)?;
        Ok(same()?.then_some(content))
    });
    match content {
        Ok(Some(content)) if content.len() as u64 == length => {
            now.add(path, file, &content, cut);
        }
        Ok(_) => now.unreadable(path, "it changed while the container was read"),
        Err(error) => now.unreadable(path, error.to_string()),
    }
}

/// Returns whether a file is as the scan saw it, by the stamps that no process can set.
fn is_same(stat: &Stat, entry: &Entry) -> bool {
    // A copied-up entry whose content is in a lower has the stamps of the upper.
    entry.root != 0
        || stat.st_ino != entry.ino
        || (stat.st_ctime, stat.st_ctime_nsec as u32) == (entry.ctime, entry.ctime_nsec)
}

/// The base, read where the container hides it.
struct Base<'a> {
    lowers: Lowers,
    /// Merged directories by path.
    stacks: HashMap<Vec<u8>, Stack>,
    installed: Installed,
    /// Number of names looked at.
    names: usize,
    /// Whether that was too many.
    cut: bool,
    cancel: &'a CancellationToken,
}

impl Base<'_> {
    /// Takes what the base has at `path` as hidden by the container.
    fn deleted(&mut self, path: &[u8]) {
        self.deleted_below(path, 0);
    }

    fn deleted_below(&mut self, path: &[u8], depth: usize) {
        if let Err(error) = self.try_deleted(path, depth)
            && described(path).is_some()
        {
            self.installed.unreadable(path, error.to_string());
        }
    }

    fn try_deleted(&mut self, path: &[u8], depth: usize) -> io::Result<()> {
        self.names += 1;
        if self.names > MAX_NAMES || depth > MAX_DEPTH {
            self.cut = true;
            return Ok(());
        }
        if self.cancel.is_cancelled() {
            return Ok(());
        }
        let parent = self.stack(dirname(path))?;
        match self.lowers.lookup(&parent, basename(path))? {
            Found::Absent => {}
            Found::Other { place, stat } => {
                let Some(file) = described(path) else {
                    return Ok(());
                };
                if !FileType::from_raw_mode(stat.st_mode).is_file() {
                    self.installed.unreadable(path, "it is no file");
                    return Ok(());
                }
                let data = self.lowers.data_of(place, stat, &parent, basename(path))?;
                let Some((place, stat)) = data else {
                    self.installed.unreadable(path, "its content is missing");
                    return Ok(());
                };
                let size = u64::try_from(stat.st_size).unwrap_or(u64::MAX);
                let Some((length, cut)) = self.installed.limit(path, file, size) else {
                    return Ok(());
                };
                let root = &self.lowers.roots[usize::from(place.root)];
                match root.open_file(&place.path, stat.st_ino)? {
                    Some(opened) => {
                        let content = read(&File::from(opened), length)?;
                        self.installed.add(path, file, &content, cut);
                    }
                    None => self.installed.unreadable(path, "it is gone"),
                }
            }
            Found::Dir { stack, .. } => {
                let names = self.lowers.names(&stack, |_| {
                    self.names += 1;
                    if self.names > MAX_NAMES {
                        return Err(io::Error::other("too many names"));
                    }
                    Ok(())
                });
                let Ok(names) = names else {
                    self.cut = true;
                    return Ok(());
                };
                self.stacks.insert(path.to_vec(), stack);
                for name in names {
                    self.deleted_below(&join(path, &name), depth + 1);
                }
                self.stacks.remove(path);
            }
        }
        Ok(())
    }

    /// Returns the merged directories at `path`.
    fn stack(&mut self, path: &[u8]) -> io::Result<Stack> {
        if path.is_empty() {
            return Ok(self.lowers.root_stack());
        }
        if let Some(stack) = self.stacks.get(path) {
            return Ok(stack.clone());
        }
        // A tree of millions of directories does not stay in memory.
        if self.stacks.len() > MAX_STACKS {
            self.stacks.clear();
        }
        let parent = self.stack(dirname(path))?;
        let stack = match self.lowers.lookup(&parent, basename(path))? {
            Found::Dir { stack, .. } => stack,
            Found::Absent | Found::Other { .. } => Stack::new(),
        };
        self.stacks.insert(path.to_vec(), stack.clone());
        Ok(stack)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use rustix::fs::{CWD, Mode, mknodat};

    use super::*;
    use crate::image::packages::PackageChange;
    use crate::layer::scan::{Caps, Exclusions, Options, Roots};
    use crate::node::overlay::xattr::Namespace;

    type Outcome = Result<(), Box<dyn std::error::Error>>;

    /// An overlay of directories in a temporary one.
    struct Overlay {
        dir: tempfile::TempDir,
        mount: OverlayMount,
    }

    impl Overlay {
        fn new() -> std::io::Result<Self> {
            let dir = tempfile::tempdir()?;
            let root = dir.path().canonicalize()?;
            for name in ["upper", "lower1", "lower2"] {
                std::fs::create_dir(root.join(name))?;
            }
            let mount = OverlayMount {
                upper: root.join("upper"),
                lowers: vec![root.join("lower2"), root.join("lower1")],
                data_only: vec![],
                id_mapped: vec![],
                namespace: Namespace::User,
                index: false,
            };
            Ok(Self { dir, mount })
        }

        fn write(&self, path: &str, content: &str) -> Outcome {
            let path = self.dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap_or(&path))?;
            Ok(std::fs::write(path, content)?)
        }

        /// Makes a whiteout, which needs no privilege.
        fn delete(&self, path: &str) -> Outcome {
            let path = self.dir.path().join("upper").join(path);
            std::fs::create_dir_all(path.parent().unwrap_or(&path))?;
            let kind = FileType::CharacterDevice;
            Ok(mknodat(CWD, &path, kind, Mode::empty(), 0)?)
        }

        fn scan(&self) -> Result<Arc<Scan>, Box<dyn std::error::Error>> {
            let cancel = CancellationToken::new();
            let roots = Roots {
                upper: self.mount.upper.clone(),
                lowers: self.mount.lowers.clone(),
                data_only: vec![],
                id_mapped: vec![],
                lowers_known: true,
                namespace: Namespace::User,
                volume: None,
            };
            let options = Options {
                jobs: 1,
                uid_map: &[],
                gid_map: &[],
                exclusions: &Exclusions::new(crate::layer::scan::Rules::default())?,
                caps: Caps::default(),
                runtime_root_mode: None,
                cancel: &cancel,
            };
            Ok(Arc::new(Scan::new(&roots, &options)?))
        }

        fn packages(&self) -> Result<Packages, Box<dyn std::error::Error>> {
            let cancel = CancellationToken::new();
            Ok(of(&self.mount, &[self.scan()?], &cancel)?)
        }
    }

    fn lines(packages: &Packages) -> Vec<String> {
        let line = |package: &PackageChange| {
            let version = |version: &Option<String>| version.clone().unwrap_or("-".to_owned());
            let (was, is) = (version(&package.previous), version(&package.version));
            format!(
                "{} {} {was} {is} {}",
                package.manager.name(),
                package.name,
                package.location
            )
        };
        packages.packages.iter().map(line).collect()
    }

    fn metadata(name: &str, version: &str) -> String {
        format!("Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n\nText\n")
    }

    const SITE: &str = "usr/local/lib/python3.11/site-packages";

    #[test]
    fn added_changed_and_removed_over_all_lowers() -> Outcome {
        let it = Overlay::new()?;
        for (root, name, version) in [
            ("lower1", "numpy", "1.26.4"),
            ("lower1", "pip", "24.0"),
            ("lower2", "Flask_X", "3.0"),
            ("upper", "numpy", "2.1.0"),
            ("upper", "flask.x", "3.1"),
            ("upper", "httpx", "0.27"),
        ] {
            let path = format!("{root}/{SITE}/{name}-{version}.dist-info/METADATA");
            it.write(&path, &metadata(name, version))?;
        }
        for gone in ["numpy-1.26.4", "pip-24.0", "Flask_X-3.0"] {
            it.delete(&format!("{SITE}/{gone}.dist-info"))?;
        }
        // Deleted below another name, and in a lower already.
        it.write(
            "lower1/opt/env/conda-meta/r-base-4.3-0.json",
            r#"{"name":"r-base","version":"4.3"}"#,
        )?;
        it.delete("opt")?;
        // Copied up without a change.
        it.write(
            "lower2/usr/lib/node_modules/npm/package.json",
            r#"{"name":"npm","version":"10.1.0"}"#,
        )?;
        it.write(
            "upper/usr/lib/node_modules/npm/package.json",
            r#"{"name":"npm","version":"10.1.0"}"#,
        )?;
        let status =
            |more: &str| format!("Package: dpkg\nArchitecture: amd64\nVersion: 1\n\n{more}");
        it.write(
            "lower1/var/lib/dpkg/status",
            &status("Package: gone\nVersion: 3\n"),
        )?;
        it.write(
            "upper/var/lib/dpkg/status",
            &status("Package: curl\nVersion: 8.0-1\n"),
        )?;
        let found = it.packages()?;
        assert_eq!(
            lines(&found),
            [
                "conda r-base 4.3 - opt/env".to_owned(),
                format!("pip flask.x 3.0 3.1 {SITE}"),
                format!("pip httpx - 0.27 {SITE}"),
                format!("pip numpy 1.26.4 2.1.0 {SITE}"),
                format!("pip pip 24.0 - {SITE}"),
                "dpkg curl - 8.0-1 ".to_owned(),
                "dpkg gone 3 - ".to_owned(),
            ]
        );
        assert_eq!(
            (found.more, found.unread.len(), found.notes.len()),
            (0, 0, 0)
        );
        Ok(())
    }

    #[test]
    fn what_another_manager_brought_is_listed_once() -> Outcome {
        let it = Overlay::new()?;
        let site = "upper/opt/conda/lib/python3.11/site-packages";
        it.write(
            &format!("{site}/numpy-1.dist-info/METADATA"),
            &metadata("numpy", "1"),
        )?;
        it.write(&format!("{site}/numpy-1.dist-info/INSTALLER"), "conda\n")?;
        it.write(
            &format!("{site}/rich-2.dist-info/METADATA"),
            &metadata("rich", "2"),
        )?;
        it.write(&format!("{site}/rich-2.dist-info/INSTALLER"), "pip\n")?;
        for (name, version) in [("numpy", "1"), ("r-dplyr", "1.1.4")] {
            let path = format!("upper/opt/conda/conda-meta/{name}-{version}-0.json");
            it.write(
                &path,
                &format!(r#"{{"name":"{name}","version":"{version}"}}"#),
            )?;
        }
        for name in ["dplyr", "own"] {
            let path = format!("upper/opt/conda/lib/R/library/{name}/DESCRIPTION");
            it.write(
                &path,
                &format!("Package: {name}\nVersion: 1.1.4\nBuilt: R 4.3\n"),
            )?;
        }
        it.write(
            "upper/srv/source/DESCRIPTION",
            "Package: source\nVersion: 0.1\n",
        )?;
        let debian = "upper/usr/lib/python3/dist-packages/six-1.16.egg-info/PKG-INFO";
        it.write(debian, &metadata("six", "1.16"))?;
        assert_eq!(
            lines(&it.packages()?),
            [
                "conda numpy - 1 opt/conda",
                "conda r-dplyr - 1.1.4 opt/conda",
                "pip rich - 2 opt/conda/lib/python3.11/site-packages",
                "r own - 1.1.4 opt/conda/lib/R/library",
            ]
        );
        Ok(())
    }

    #[test]
    fn a_tenant_s_files_are_bounded_and_lead_nowhere() -> Outcome {
        let it = Overlay::new()?;
        let outside = it.dir.path().join("secret");
        std::fs::write(&outside, metadata("secret", "1"))?;
        let site = it.mount.upper.join(SITE);
        let place = |name: &str| -> std::io::Result<std::path::PathBuf> {
            let dir = site.join(format!("{name}.dist-info"));
            std::fs::create_dir_all(&dir)?;
            Ok(dir.join("METADATA"))
        };
        std::os::unix::fs::symlink(&outside, place("link")?)?;
        mknodat(CWD, &place("fifo")?, FileType::Fifo, Mode::RUSR, 0)?;
        std::fs::write(place("none")?, "no field\n")?;
        std::fs::write(place("escape")?, metadata("x\u{1b}[2J", "1"))?;
        let huge = File::create(place("large")?)?;
        std::fs::write(place("large")?, metadata("large", "1"))?;
        huge.set_len(1 << 30)?;
        let status = it.mount.upper.join("var/lib/dpkg");
        std::fs::create_dir_all(&status)?;
        File::create(status.join("status"))?.set_len(1 << 30)?;
        let found = it.packages()?;
        // A Python package is described by the beginning of the file.
        assert_eq!(lines(&found), [format!("pip large - 1 {SITE}")]);
        let reasons = found.unread.iter();
        let reasons: Vec<_> = reasons
            .map(|unread| (unread.path.as_str(), unread.reason.as_str()))
            .collect();
        let at = |name: &str| format!("{SITE}/{name}.dist-info/METADATA");
        assert_eq!(
            reasons,
            [
                (at("escape").as_str(), "its name is not one"),
                (at("fifo").as_str(), "it is no file"),
                (at("link").as_str(), "it is no file"),
                (at("none").as_str(), "it has no Name"),
                (
                    "var/lib/dpkg/status",
                    "it has 1073741824 bytes, at most 67108864 are read"
                ),
            ]
        );
        Ok(())
    }

    #[test]
    fn packages_of_files_that_cannot_be_read_are_not_called_removed() -> Outcome {
        let status = "Package: dpkg\nVersion: 1\n\nPackage: curl\nVersion: 8\n";
        let of_pip = format!("lower1/{SITE}/numpy-1.dist-info/METADATA");
        let overlay = || -> Result<Overlay, Box<dyn std::error::Error>> {
            let it = Overlay::new()?;
            it.write("lower1/var/lib/dpkg/status", status)?;
            it.write(&of_pip, &metadata("numpy", "1"))?;
            it.delete(&format!("{SITE}/numpy-1.dist-info"))?;
            Ok(it)
        };
        let check = |it: &Overlay, path: &str, reason: &str| -> Outcome {
            let found = it.packages()?;
            // What is read, is listed.
            assert_eq!(lines(&found), [format!("pip numpy 1 - {SITE}")], "{reason}");
            let unread = (
                found.unread[0].path.as_str(),
                found.unread[0].reason.as_str(),
            );
            assert_eq!(unread, (path, reason));
            let note = "it is not known whether 2 packages are still installed";
            assert_eq!(found.notes, [note], "{reason}");
            Ok(())
        };
        let file = "var/lib/dpkg/status";
        let it = overlay()?;
        it.write(
            &format!("upper/{file}"),
            "Package: a\nVersion: 1\u{1b}[2J\n",
        )?;
        check(&it, file, "its version is not one")?;
        let it = overlay()?;
        std::fs::create_dir_all(it.mount.upper.join("var/lib/dpkg"))?;
        let path = it.mount.upper.join(file);
        mknodat(CWD, &path, FileType::Fifo, Mode::RUSR, 0)?;
        check(&it, file, "it is no file")?;
        std::fs::remove_file(&path)?;
        std::os::unix::fs::symlink("/opt/status", &path)?;
        let followed = "it is a symbolic link, which is not followed";
        check(&it, file, followed)?;
        // The directory is a link, which works for dpkg.
        let it = overlay()?;
        std::fs::create_dir_all(it.mount.upper.join("var/lib"))?;
        std::os::unix::fs::symlink("/opt/dpkg", it.mount.upper.join("var/lib/dpkg"))?;
        check(&it, "var/lib/dpkg", followed)?;
        // In the base.
        let it = Overlay::new()?;
        it.write(
            &format!("lower1/{file}"),
            "Package: a\nVersion: 1\u{1b}[2J\n",
        )?;
        it.write(&format!("upper/{file}"), status)?;
        let found = it.packages()?;
        assert_eq!(lines(&found), [""; 0]);
        let note = "it is not known whether 2 packages were there before";
        assert_eq!(found.notes, [note]);
        Ok(())
    }

    #[test]
    fn a_file_that_changed_after_the_scan_is_not_believed() -> Outcome {
        let it = Overlay::new()?;
        let path = format!("upper/{SITE}/a-1.dist-info/METADATA");
        it.write(&path, &metadata("a", "1"))?;
        let scan = it.scan()?;
        let file = it.dir.path().join(path);
        std::fs::remove_file(&file)?;
        // Kept, so that the inode number is not used again.
        let _other = File::create(it.dir.path().join("other"))?;
        std::fs::write(&file, metadata("another", "1"))?;
        let found = of(&it.mount, &[scan], &CancellationToken::new())?;
        assert_eq!(found.packages, []);
        assert_eq!(
            found.unread[0].reason,
            "it changed while the container was read"
        );
        Ok(())
    }

    #[test]
    fn a_missing_base_is_said() -> Outcome {
        let mut it = Overlay::new()?;
        it.write("upper/lib/apk/db/installed", "P:musl\nV:1.2\n")?;
        let scan = it.scan()?;
        it.mount.lowers.push(Path::new("/nonexistent").into());
        let found = of(&it.mount, &[scan], &CancellationToken::new())?;
        assert_eq!(lines(&found), ["apk musl - 1.2 "]);
        assert!(
            found.notes[0].starts_with("the base cannot be read: "),
            "{:?}",
            found.notes
        );
        Ok(())
    }
}
