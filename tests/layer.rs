//! Tests of layers: the bytes are the same for any number of threads, the planned length is that of the stream, and
//! cuts, changes and clones are correct.

#[allow(dead_code, reason = "the parts that layers need")]
#[path = "support/mod.rs"]
mod support;

#[allow(dead_code, reason = "the parts that layers need")]
#[path = "support/disk.rs"]
mod disk;

use std::fs::Permissions;
use std::io::Read;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::Arc;
use std::sync::LazyLock;

use disk::Disk;
use support::Need;
use tokio_util::sync::CancellationToken;
use upperdeck::layer::capture::{self, CaptureMethod};
use upperdeck::layer::scan::{Caps, Clock, Exclusions, Options, Roots, Rules, Scan, tick};
use upperdeck::layer::{self, Compression, Layer, Part, Plan};
use upperdeck::node::overlay::xattr::Namespace;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

static NEVER: LazyLock<CancellationToken> = LazyLock::new(CancellationToken::new);

fn scan(upper: &Path) -> Result<Scan> {
    scan_over(upper, false)
}

/// Scans `upper`; with `nothing`, the upper is known to have no lowers at all.
fn scan_over(upper: &Path, nothing: bool) -> Result<Scan> {
    let roots = Roots {
        upper: upper.to_owned(),
        lowers: Vec::new(),
        data_only: Vec::new(),
        id_mapped: Vec::new(),
        lowers_known: nothing,
        namespace: Namespace::User,
        volume: None,
    };
    let exclusions = Exclusions::new(Rules::default())?;
    Ok(Scan::new(
        &roots,
        &Options {
            jobs: 2,
            uid_map: &[],
            gid_map: &[],
            exclusions: &exclusions,
            caps: Caps::default(),
            runtime_root_mode: None,
            cancel: &NEVER,
        },
    )?)
}

fn write(plan: &Plan, compression: Compression, jobs: usize) -> Result<(Vec<u8>, Layer)> {
    let mut out = Vec::new();
    let options = layer::Options {
        compression,
        level: compression.default_level(),
        jobs,
        cancel: &NEVER,
    };
    let layer = layer::stream::write(
        plan,
        options,
        |bytes| -> std::io::Result<()> {
            out.extend_from_slice(&bytes);
            Ok(())
        },
        &|_| {},
    )?;
    Ok((out, layer))
}

/// Creates contents of several blocks: text, random data, a hole, an empty file.
fn tree(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir.join("a/b"))?;
    std::fs::write(dir.join("a/text"), "upperdeck ".repeat(400_000))?;
    let mut state = 1u64;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 56) as u8
    })
    .take(3_000_001)
    .collect();
    std::fs::write(dir.join("a/b/noise"), &noise)?;
    std::fs::write(dir.join("a-b"), "")?;
    let sparse = std::fs::File::create(dir.join("sparse"))?;
    sparse.set_len(5 << 20)?;
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"in the middle", 2_500_000)?;
    for n in 0..2000 {
        std::fs::write(dir.join(format!("a/small{n}")), format!("{n}\n"))?;
    }
    Ok(())
}

/// A full disk, or a registry that closes the connection in the middle of a long layer: the error is returned, and no
/// thread blocks (the container is frozen meanwhile).
#[test]
fn a_sink_that_fails_ends_the_stream() -> Result<()> {
    let dir = tempfile::tempdir()?;
    std::fs::File::create(dir.path().join("large"))?.set_len(256 << 20)?;
    let plan = Plan::new(Arc::new(scan(dir.path())?), None);
    let (done, ended) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let options = layer::Options {
            compression: Compression::None,
            level: 0,
            jobs: 2,
            cancel: &NEVER,
        };
        let full = |_| Err(std::io::Error::from(std::io::ErrorKind::StorageFull));
        let outcome = layer::stream::write(&plan, options, full, &|_| {});
        done.send(outcome.is_err())
    });
    assert!(ended.recv_timeout(std::time::Duration::from_secs(30))?);
    Ok(())
}

/// Returns the paths in a tar, with the targets of hard links.
fn listing(tar: &[u8]) -> Result<Vec<(String, Option<String>)>> {
    let mut listed = Vec::new();
    for entry in tar::Archive::new(tar).entries()? {
        let entry = entry?;
        let hard = entry.header().entry_type().is_hard_link();
        let target = entry.link_name_bytes().filter(|_| hard);
        listed.push((
            String::from_utf8(entry.path_bytes().into_owned())?,
            target.map(|t| String::from_utf8_lossy(&t).into_owned()),
        ));
    }
    Ok(listed)
}

fn write_all(plans: &[Plan], jobs: usize) -> Result<Vec<(Vec<u8>, Layer)>> {
    let mut outs = vec![Vec::new(); plans.len()];
    let options = layer::Options {
        compression: Compression::Gzip,
        level: 1,
        jobs,
        cancel: &NEVER,
    };
    let parts = plans.iter().zip(&mut outs).map(|(plan, out)| Part {
        plan,
        sink: |bytes: bytes::Bytes| -> std::io::Result<()> {
            out.extend_from_slice(&bytes);
            Ok(())
        },
    });
    let layers = layer::stream::write_all(parts.collect(), options, &|_| {});
    outs.into_iter()
        .zip(layers)
        .map(|(out, layer)| Ok((out, layer?)))
        .collect()
}

/// Several layers: cut at directories, every path in exactly one of them, hard links in the layer of their file,
/// parents in all; and the same layers for any number of threads.
#[test]
fn a_plan_is_cut_at_directories() -> Result<()> {
    let dir = tempfile::tempdir()?;
    for top in ["a", "b", "c", "d"] {
        for sub in ["x", "y"] {
            let at = dir.path().join(top).join(sub);
            std::fs::create_dir_all(&at)?;
            for n in 0..4 {
                std::fs::write(at.join(format!("f{n}")), vec![b'.'; 100_000])?;
            }
        }
    }
    // The first name of the file is in the first part, its last name in the last.
    std::fs::write(dir.path().join("a/linked"), "one file")?;
    std::fs::hard_link(dir.path().join("a/linked"), dir.path().join("d/y/linked"))?;
    let plan = |size| -> Result<Vec<Plan>> {
        Ok(Plan::new(Arc::new(scan(dir.path())?), None).split(size))
    };
    assert_eq!(plan(u64::MAX)?.len(), 1);
    let plans = plan(1 << 20)?;
    let layers = write_all(&plans, 2)?;
    for jobs in [1, 8] {
        let again = write_all(&plan(1 << 20)?, jobs)?;
        assert!(
            again
                .iter()
                .map(|(out, _)| out)
                .eq(layers.iter().map(|(out, _)| out)),
            "with {jobs} jobs"
        );
    }
    let tars = plans
        .iter()
        .map(|plan| listing(&write(plan, Compression::None, 2)?.0))
        .collect::<Result<Vec<_>>>()?;
    let names = |part: &[(String, Option<String>)]| -> Vec<String> {
        part.iter().map(|(name, _)| name.clone()).collect()
    };
    // 400 kB per directory: a part ends with the third.
    let files: Vec<usize> = tars
        .iter()
        .map(|part| part.iter().filter(|(name, _)| name.contains("/f")).count())
        .collect();
    assert_eq!(files, [12, 12, 8]);
    let links: Vec<_> = tars
        .iter()
        .enumerate()
        .flat_map(|(n, part)| part.iter().map(move |entry| (n, entry)))
        .filter(|(_, (name, _))| name.ends_with("linked"))
        .collect();
    assert_eq!(
        links,
        [
            (2, &("a/linked".to_owned(), None)),
            (2, &("d/y/linked".to_owned(), Some("a/linked".to_owned())))
        ]
    );
    for part in &tars {
        let names = names(part);
        for (at, name) in names.iter().enumerate() {
            let parent = name
                .trim_end_matches('/')
                .rsplit_once('/')
                .map(|(parent, _)| format!("{parent}/"));
            if let Some(parent) = parent {
                assert!(names[..at].contains(&parent), "{parent} before {name}");
            }
        }
    }
    let mut all: Vec<String> = tars
        .iter()
        .flat_map(|part| names(part))
        .filter(|name| !name.ends_with('/'))
        .collect();
    let count = all.len();
    all.sort();
    all.dedup();
    assert_eq!((count, all.len()), (34, 34), "each path once");
    Ok(())
}

/// Returns whether the first page of a file is cached.
fn in_memory(path: &Path) -> Result<bool> {
    let file = std::fs::File::open(path)?;
    let mut byte = [0];
    let mut into = [std::io::IoSliceMut::new(&mut byte)];
    match rustix::io::preadv2(&file, &mut into, 0, rustix::io::ReadWriteFlags::NOWAIT) {
        Ok(_) => Ok(true),
        Err(rustix::io::Errno::AGAIN) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// A save must not evict cached pages that others use: cached pages stay, and pages that were not cached are dropped
/// again.
#[test]
fn the_page_cache_is_left_as_it_was() -> Result<()> {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let content = |n: usize| format!("{n} ").repeat(30_000);
    let name = |n: usize| dir.path().join(format!("f{n:03}"));
    for n in 0..200 {
        std::fs::write(name(n), content(n))?;
        let file = std::fs::File::open(name(n))?;
        file.sync_all()?;
        // Every third file stays cached.
        if n % 3 != 0 {
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
        }
    }
    let before = (0..200)
        .map(|n| in_memory(&name(n)))
        .collect::<Result<Vec<_>>>()?;
    if before.iter().all(|there| *there) {
        support::ignore(
            "the build directory's file system keeps everything in memory, or cannot tell",
        );
        return Ok(());
    }
    let plan = Plan::new(Arc::new(scan(dir.path())?), None);
    let (tar, _) = write(&plan, Compression::None, 2)?;
    let mut read = 0;
    for entry in tar::Archive::new(tar.as_slice()).entries()? {
        let mut entry = entry?;
        let mut text = String::new();
        entry.read_to_string(&mut text)?;
        assert_eq!(text, content(read), "content read ahead of need and not");
        read += 1;
    }
    assert_eq!(read, 200);
    let after = (0..200)
        .map(|n| in_memory(&name(n)))
        .collect::<Result<Vec<_>>>()?;
    let (mut kept, mut left) = (0, 0);
    for (there, still) in before.iter().zip(&after) {
        kept += usize::from(*there && *still);
        left += usize::from(!there && *still);
    }
    // The kernel may reclaim a few of them meanwhile.
    let cached = before.iter().filter(|there| **there).count();
    assert!(kept + 5 >= cached, "{kept} of {cached} are cached still");
    // A file that a worker reads at the very moment of the read-ahead may stay.
    assert!(
        left * 4 < 200 - cached,
        "{left} of {} files stay",
        200 - cached
    );
    Ok(())
}

/// A failing destination does not affect the other layers.
#[test]
fn a_layer_that_cannot_be_delivered_fails_alone() -> Result<()> {
    let dir = tempfile::tempdir()?;
    for top in ["a", "b", "c"] {
        std::fs::create_dir(dir.path().join(top))?;
        std::fs::File::create(dir.path().join(top).join("large"))?.set_len(20 << 20)?;
    }
    let plans = Plan::new(Arc::new(scan(dir.path())?), None).split(10 << 20);
    assert_eq!(plans.len(), 3);
    let options = layer::Options {
        compression: Compression::Gzip,
        level: 1,
        jobs: 2,
        cancel: &NEVER,
    };
    let parts = plans.iter().enumerate().map(|(n, plan)| {
        let sink = move |_| match n {
            1 => Err(std::io::Error::from(std::io::ErrorKind::StorageFull)),
            _ => Ok(()),
        };
        Part { plan, sink }
    });
    let layers = layer::stream::write_all(parts.collect(), options, &|_| {});
    let ok: Vec<bool> = layers.iter().map(std::result::Result::is_ok).collect();
    assert_eq!(ok, [true, false, true]);
    assert!(matches!(layers[1], Err(layer::Error::Sink(_))));
    Ok(())
}

#[test]
fn same_bytes_for_any_jobs_and_every_codec_reads_back() -> Result<()> {
    let dir = tempfile::tempdir()?;
    tree(dir.path())?;
    let plan = Plan::new(Arc::new(scan(dir.path())?), None);
    let (tar, plain) = write(&plan, Compression::None, 2)?;
    assert_eq!(tar.len() as u64, plan.tar_size());
    assert_eq!(plain.diff_id.0, plain.digest);
    assert!(plain.unstable.is_empty());
    for compression in [Compression::Gzip, Compression::Zstd] {
        let (bytes, layer) = write(&plan, compression, 1)?;
        for jobs in [2, 3, 8] {
            let (again, other) = write(&plan, compression, jobs)?;
            assert_eq!(again, bytes, "{compression:?} with {jobs} jobs");
            assert_eq!(other.digest, layer.digest);
        }
        assert_eq!(layer.diff_id, plain.diff_id);
        assert_eq!(layer.digest, upperdeck::common::digest::Digest::of(&bytes));
        let mut back = Vec::new();
        match compression {
            // This reader reads a single member only: there must not be a second one.
            Compression::Gzip => {
                flate2::read::GzDecoder::new(bytes.as_slice()).read_to_end(&mut back)?;
            }
            _ => {
                back.resize(tar.len(), 0);
                let n =
                    structured_zstd::decoding::FrameDecoder::new().decode_all(&bytes, &mut back)?;
                assert_eq!(n, tar.len());
            }
        }
        assert!(back == tar, "{compression:?} gives the tar back");
    }
    let mut names = Vec::new();
    for entry in tar::Archive::new(tar.as_slice()).entries()? {
        let mut entry = entry?;
        let name = String::from_utf8(entry.path_bytes().into_owned())?;
        let mut content = Vec::new();
        entry.read_to_end(&mut content)?;
        if !name.ends_with('/') {
            assert_eq!(content, std::fs::read(dir.path().join(&name))?, "{name}");
        }
        names.push(name);
    }
    // A directory's content follows it immediately, as if a slash sorted before every other byte.
    let order: Vec<&str> = names
        .iter()
        .map(String::as_str)
        .filter(|n| !n.contains("small"))
        .collect();
    assert_eq!(
        order,
        ["a/", "a/b/", "a/b/noise", "a/text", "a-b", "sparse"]
    );
    Ok(())
}

/// A temporary file that came and went changes nothing but the times of its directory.
#[test]
fn times_of_directories_alone_are_told_apart() -> Result<()> {
    type Step<'a> = (&'a str, bool, &'a dyn Fn() -> std::io::Result<()>);

    let dir = tempfile::tempdir()?;
    let path = |name: &str| dir.path().join(name);
    let work = path("d/work");
    std::fs::create_dir_all(&work)?;
    std::fs::create_dir(path("d/empty"))?;
    std::fs::write(path("d/work/kept"), "content")?;
    let settled = || {
        std::thread::sleep(4 * tick());
        scan_over(dir.path(), true)
    };
    let mut earlier = settled()?;
    let steps: [Step<'_>; 9] = [
        ("nothing", true, &|| Ok(())),
        ("a file came and went", true, &|| {
            std::fs::write(path("d/work/temporary"), "x")?;
            std::fs::remove_file(path("d/work/temporary"))
        }),
        ("one at the top", true, &|| {
            std::fs::write(path("temporary"), "x")?;
            std::fs::remove_file(path("temporary"))
        }),
        ("a mode, and back", true, &|| {
            std::fs::set_permissions(&work, Permissions::from_mode(0o700))?;
            std::fs::set_permissions(&work, Permissions::from_mode(0o755))
        }),
        ("a mode", false, &|| {
            std::fs::set_permissions(&work, Permissions::from_mode(0o711))
        }),
        ("a file came", false, &|| {
            std::fs::write(path("d/work/new"), "x")
        }),
        ("a file went", false, &|| {
            std::fs::remove_file(path("d/work/new"))
        }),
        ("a directory has another name", false, &|| {
            std::fs::rename(path("d/empty"), path("d/other"))
        }),
        ("a file is another one", false, &|| {
            std::fs::write(path("d/work/temporary"), "content")?;
            std::fs::rename(path("d/work/temporary"), path("d/work/kept"))
        }),
    ];
    for (what, expected, step) in steps {
        step()?;
        let now = settled()?;
        let found = now.differs_only_in_times(&earlier, &|_| false);
        assert_eq!(found, expected, "{what}");
        let changes = now.changes_since(&earlier, &|_| false);
        let count = changes.ok_or("no layer can say it")?.emitted().count();
        let is_empty = ["nothing", "one at the top"].contains(&what);
        assert_eq!(count == 0, is_empty, "{what}");
        // What was read of a directory may not be what is in the image.
        if what != "nothing" {
            assert!(!now.differs_only_in_times(&earlier, &|_| true), "{what}");
        }
        earlier = now;
    }
    Ok(())
}

/// Two changes within one tick of the clock have the same stamp, and a page that was dirty before the clock was read
/// can be written to without a trace: entries with a stamp at the clock or later are saved again whatever their stamps
/// are, and so are unsure entries.
#[test]
fn what_was_stamped_too_close_to_the_clock_is_taken_again() -> Result<()> {
    let dir = tempfile::tempdir()?;
    std::fs::write(dir.path().join("file"), "content")?;
    std::thread::sleep(4 * tick());
    let scanned = || scan_over(dir.path(), true);
    let now = scanned()?;
    let entry = now.entries().next_back().ok_or("no file")?;
    let stamped = Clock {
        seconds: entry.ctime,
        nanos: entry.ctime_nsec,
    };
    let taken = |earlier: &Scan, unsure: bool| -> Result<usize> {
        let changes = now.changes_since(earlier, &|_| unsure);
        Ok(changes.ok_or("no layer can say it")?.emitted().count())
    };
    assert_eq!(taken(&scanned()?, false)?, 0, "nothing changed");
    assert_eq!(taken(&scanned()?, true)?, 1, "it is not certain");
    assert_eq!(
        taken(&scanned()?.with_clock(stamped), false)?,
        1,
        "stamped when the clock showed the same"
    );
    // The clock advances by whole ticks, and stamps may be one tick behind it: two ticks are too close as well.
    let later = |by: std::time::Duration| {
        let nanos = u64::from(stamped.nanos) + by.as_nanos() as u64;
        Clock {
            seconds: stamped.seconds + (nanos / 1_000_000_000) as i64,
            nanos: (nanos % 1_000_000_000) as u32,
        }
    };
    assert_eq!(
        taken(&scanned()?.with_clock(later(tick())), false)?,
        1,
        "stamped in the tick before"
    );
    assert_eq!(
        taken(&scanned()?.with_clock(later(3 * tick())), false)?,
        0,
        "stamped three ticks before"
    );
    // The scan stored for the next save keeps this.
    let mut bytes = Vec::new();
    scanned()?
        .with_clock(stamped)
        .store(&|_| false, &mut bytes)?;
    let kept = Scan::restore(&mut bytes.as_slice(), bytes.len() as u64).ok_or("damaged")?;
    let unsure = kept.unsure.iter().filter(|unsure| **unsure).count();
    assert!(unsure >= 1, "{:?}", kept.unsure);
    Ok(())
}

/// A database file that was cloned by earlier saves has very many extents, and the kernel needs time for each. The
/// container resumes before they are all cloned: what it writes then must not be in the layer.
#[test]
fn a_clone_that_goes_on_is_of_the_instant_at_which_it_began() -> Result<()> {
    const SIZE: usize = 32 << 20;
    const PIECE: usize = 4096;
    for mkfs in ["mkfs.xfs", "mkfs.btrfs"] {
        if support::ignored(&[Need::Root, Need::Program(mkfs)]) {
            return Ok(());
        }
        let disk = Disk::new(mkfs)?;
        let (upper, path) = (
            disk.path().join("upper"),
            disk.path().join("upper/database"),
        );
        std::fs::create_dir(&upper)?;
        std::fs::write(&path, vec![b'a'; SIZE])?;
        let file = std::fs::File::options()
            .read(true)
            .write(true)
            .open(&path)?;
        let earlier = std::fs::File::create(disk.path().join("earlier"))?;
        rustix::fs::ioctl_ficlone(&earlier, &file)?;
        for at in (0..SIZE).step_by(2 * PIECE) {
            file.write_all_at(&[b'b'; PIECE], at as u64)?;
        }
        file.sync_all()?;
        let pieces: Vec<u8> = [[b'b'; PIECE], [b'a'; PIECE]].concat();

        let plan = Plan::new(Arc::new(scan(&upper)?), None);
        let holding = capture::capture(&plan, CaptureMethod::Clones, 2, &NEVER)?;
        let goes_on = holding.pending_clones();
        // The last extent to be cloned.
        file.write_all_at(&[b'c'; PIECE], (SIZE - PIECE) as u64)?;
        file.set_len(SIZE as u64 / 2)?;
        let (held, waited) = holding.complete(&NEVER)?;
        let (bytes, _) = write(&plan.with_captured(held), Compression::None, 2)?;

        assert_eq!(goes_on, 1, "{mkfs}: cloned before the container ran on");
        let waited: Vec<_> = waited.into_iter().map(|waited| waited.path).collect();
        assert_eq!(waited, ["/database"], "{mkfs}");
        let mut archive = tar::Archive::new(&bytes[..]);
        let mut found = Vec::new();
        for entry in archive.entries()? {
            let mut entry = entry?;
            if entry.path()?.ends_with("database") {
                entry.read_to_end(&mut found)?;
            }
        }
        assert!(
            found.len() == SIZE && found.chunks(2 * PIECE).all(|part| part == pieces),
            "{mkfs}: not what it was"
        );
    }
    Ok(())
}
