//! Memory limits: memory does not grow with the size of the content (at most 64 MiB and 6 MiB per thread), and with the
//! number of entries no more than necessary.

#[allow(
    dead_code,
    reason = "shared by all tests, each of which needs some of it"
)]
mod support;

use std::path::Path;
use std::process::Command;
use std::sync::LazyLock;
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::resource::{UsageWho, getrusage};
use tokio_util::sync::CancellationToken;
use upperdeck::common::digest::Digest;
use upperdeck::layer::Plan;
use upperdeck::layer::scan::{Caps, Exclusions, Options, Roots, Rules, Scan, tick};
use upperdeck::node::overlay::xattr::Namespace;
use upperdeck::save::state_store::{Description, Store, TreeState};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const MIB: u64 = 1 << 20;
/// Size in bytes of each of three large files: together several times the allowed memory.
const LARGE: u64 = 256 * MIB;

/// Serialises the tests: the kernel accounts for the whole process and all of its children.
static ALONE: Mutex<()> = Mutex::new(());

/// Environment variable that is set for the process in which this test runs itself.
const INNER: &str = "UPPERDECK_TEST_MEMORY_INNER";

/// Runs in a process of its own: the peak of a child includes its parent's memory at the time of the start, so memory
/// of other tests in this process would be counted.
#[test]
fn peak_memory_is_bounded() -> Result<()> {
    if std::env::var_os(INNER).is_some() {
        return peaks_are_bounded();
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let inner = Command::new(std::env::current_exe()?)
        .args(["--exact", "peak_memory_is_bounded", "--nocapture"])
        .env(INNER, "1")
        .output()?;
    assert!(
        inner.status.success(),
        "{}{}",
        String::from_utf8_lossy(&inner.stdout),
        String::from_utf8_lossy(&inner.stderr)
    );
    Ok(())
}

fn peaks_are_bounded() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let upper = dir.path().join("upper");
    for sub in 0..20 {
        let sub = upper.join(format!("d{sub:02}"));
        std::fs::create_dir_all(&sub)?;
        for n in 0..1000 {
            std::fs::write(sub.join(format!("file-{n:04}.py")), "import upperdeck\n")?;
        }
    }
    // Holes take no disk space, but as many bytes of tar as other data.
    for n in 0..3 {
        std::fs::File::create(upper.join(format!("large{n}")))?.set_len(LARGE)?;
    }
    for (codec, jobs) in [("gzip", 2), ("zstd", 4), ("none", 2)] {
        let made = Command::new(env!("CARGO_BIN_EXE_upperdeck"))
            .args(["layer", "--userxattr", "--compression", codec, "--upper"])
            .arg(&upper)
            .args(["--jobs", &jobs.to_string(), "-o"])
            .arg(dir.path().join("layer"))
            .output()?;
        assert!(
            made.status.success(),
            "{}",
            String::from_utf8_lossy(&made.stderr)
        );
        let said: serde_json::Value = serde_json::from_slice(&made.stdout)?;
        assert!(said["tarSize"].as_u64() > Some(3 * LARGE), "{said}");
        let peak = u64::try_from(getrusage(UsageWho::RUSAGE_CHILDREN)?.max_rss())? * 1024;
        let bound = 64 * MIB + jobs * 6 * MIB;
        assert!(
            peak <= bound,
            "{codec} with {jobs} threads: {} MiB of {}",
            peak / MIB,
            bound / MIB
        );
    }
    Ok(())
}

/// Number of entries of the tree below.
const ENTRIES: u64 = 30_000;
/// Maximum memory per entry: three scans that share nothing take twice as much.
const BYTES_AN_ENTRY: u64 = 200;

fn scanned(upper: &Path, earlier: Option<&Scan>) -> Result<Scan> {
    bounded(upper, earlier, Caps::default())
}

fn bounded(upper: &Path, earlier: Option<&Scan>, caps: Caps) -> Result<Scan> {
    static NEVER: LazyLock<CancellationToken> = LazyLock::new(CancellationToken::new);
    let roots = Roots {
        upper: upper.to_owned(),
        lowers: Vec::new(),
        data_only: Vec::new(),
        id_mapped: Vec::new(),
        lowers_known: true,
        namespace: Namespace::User,
        volume: None,
    };
    let exclusions = Exclusions::new(Rules::default())?;
    let options = Options {
        jobs: 2,
        uid_map: &[],
        gid_map: &[],
        exclusions: &exclusions,
        caps,
        runtime_root_mode: None,
        cancel: &NEVER,
    };
    match earlier {
        None => Ok(Scan::new(&roots, &options)?),
        Some(earlier) => {
            let again = Scan::rescan(earlier, &roots, &options)?;
            Ok(again.ok_or("too much changed meanwhile")?)
        }
    }
}

/// Returns the peak resident set size so far, in bytes.
fn peak() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
    Ok(kib.ok_or("no VmHWM")?.trim().parse::<u64>()? * 1024)
}

fn keep(store: &Store, scan: &Scan) -> Result<()> {
    let description = Description {
        fingerprint: Digest::of(b""),
        upper: "/".into(),
        upper_inode: (0, 0),
        destination: "oci:/nowhere:1".to_owned(),
        layers: Vec::new(),
    };
    let unsure = vec![false; scan.len()];
    let shown = TreeState {
        scan,
        unsure: &unsure,
    };
    Ok(store.keep("container", &description, &[shown])?)
}

/// Memory of a live save of a large tree: the state in the image, the scans before and under the freeze, the changes
/// and what is stored for the next save; and of the next save, which begins with the stored scan. The trees differ in
/// one file only, so that the memory is about that of one.
#[test]
fn a_live_save_holds_the_tree_about_once() -> Result<()> {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let dir = tempfile::tempdir()?;
    let upper = dir.path().join("upper");
    for number in 0..ENTRIES {
        let sub = upper.join(format!("d{:03}", number / 200));
        if number % 200 == 0 {
            std::fs::create_dir_all(&sub)?;
        }
        std::fs::File::create(sub.join(format!("file_{:03}.py", number % 200)))?;
    }
    std::thread::sleep(4 * tick());
    let store = Store::new(&dir.path().join("state"));
    let before = peak()?;
    let changed = |known: &Scan, now: &Scan| -> Result<()> {
        let changes = now.changes_since(known, &|_| false);
        let plan = Plan::new(Arc::new(changes.ok_or("no layer can say it")?), None);
        assert_eq!(plan.len(), 2, "a file and its directory");
        Ok(())
    };
    {
        let known = scanned(&upper, None)?;
        assert!(known.len() as u64 > ENTRIES);
        std::fs::write(upper.join("d100/new"), "new")?;
        let look = scanned(&upper, Some(&known))?;
        let now = scanned(&upper, Some(&look))?;
        changed(&known, &now)?;
        keep(&store, &now)?;
    }
    let first = (peak()? - before) / ENTRIES;
    // Resets the peak, where the kernel supports it, so that it is that of the next save alone.
    std::fs::write("/proc/self/clear_refs", "5").ok();
    {
        let known = store.load("container")?.stored.remove(0).scan;
        std::fs::write(upper.join("d140/new"), "new")?;
        let now = scanned(&upper, Some(&known))?;
        changed(&known, &now)?;
        keep(&store, &now)?;
    }
    let next = (peak()?.saturating_sub(before)) / ENTRIES;
    assert!(
        first <= BYTES_AN_ENTRY && next <= BYTES_AN_ENTRY,
        "{first} bytes an entry in the first save, {next} in the next, of {BYTES_AN_ENTRY}"
    );
    Ok(())
}

/// Returns the growth of the peak resident set size during `work`, in bytes.
fn growth<T>(work: impl FnOnce() -> Result<T>) -> Result<(T, u64)> {
    std::fs::write("/proc/self/clear_refs", "5").ok();
    let before = peak()?;
    let made = work()?;
    Ok((made, peak()? - before))
}

/// Creates nested directories with names of 250 control characters, each of which a report escapes as five characters.
fn long_path(from: &Path, levels: usize) -> Result<std::fs::File> {
    use rustix::fs::{CWD, Mode, OFlags, mkdirat, openat};
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let name = "\u{1}".repeat(250);
    let mut at = openat(CWD, from, flags, Mode::empty())?;
    for _ in 0..levels {
        mkdirat(&at, name.as_str(), Mode::RWXU)?;
        at = openat(&at, name.as_str(), flags, Mode::empty())?;
    }
    Ok(at.into())
}

/// Hard links to a socket cost a tenant next to nothing; a list of their paths took gigabytes.
#[test]
fn sockets_under_a_long_path_are_counted_and_not_listed() -> Result<()> {
    use rustix::fs::{AtFlags, FileType, Mode, linkat, mknodat};
    const SOCKETS: u64 = 20_000;
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let dir = tempfile::tempdir()?;
    let at = long_path(dir.path(), 15)?;
    mknodat(&at, "0", FileType::Socket, Mode::RUSR, 0)?;
    for number in 1..SOCKETS {
        linkat(&at, "0", &at, number.to_string(), AtFlags::empty())?;
    }
    let (scan, grown) = growth(|| scanned(dir.path(), None))?;
    let sockets = &scan.report.sockets;
    assert_eq!(sockets.count(), SOCKETS);
    assert!((1..=100).contains(&sockets.examples().len()));
    let report = serde_json::to_vec(&scan.report)?.len();
    assert!(report < 256 << 10, "the report has {report} bytes");
    assert!(
        grown < 16 * MIB,
        "{} MiB for a list of sockets",
        grown / MIB
    );
    Ok(())
}

/// Creates files, each with the attribute value given for its number. Returns false if the file system does not support
/// user attributes.
fn with_attributes(upper: &Path, files: usize, value: impl Fn(usize) -> Vec<u8>) -> Result<bool> {
    for number in 0..files {
        let file = std::fs::File::create(upper.join(number.to_string()))?;
        let set = rustix::fs::fsetxattr(
            &file,
            "user.a",
            &value(number),
            rustix::fs::XattrFlags::empty(),
        );
        match set {
            Err(rustix::io::Errno::OPNOTSUPP) => return Ok(false),
            other => other?,
        }
    }
    Ok(true)
}

#[test]
fn attributes_that_many_files_have_are_kept_once() -> Result<()> {
    const FILES: usize = 20_000;
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let dir = tempfile::tempdir()?;
    let value = vec![b'x'; 3900];
    if !with_attributes(dir.path(), FILES, |_| value.clone())? {
        support::ignore("no user attributes in the temporary directory");
        return Ok(());
    }
    let (scan, grown) = growth(|| scanned(dir.path(), None))?;
    assert_eq!(scan.len(), FILES + 1);
    for entry in scan.entries().skip(1) {
        assert_eq!(scan.xattrs(&entry), [(b"user.a".to_vec(), value.clone())]);
    }
    assert!(grown < 24 * MIB, "{} MiB for one value", grown / MIB);
    // The next save also loads them once.
    let store = Store::new(&dir.path().join("state"));
    keep(&store, &scan)?;
    drop(scan);
    let (loaded, grown) = growth(|| Ok(store.load("container")?))?;
    assert_eq!(loaded.stored[0].scan.len(), FILES + 1);
    assert!(grown < 24 * MIB, "{} MiB for one value", grown / MIB);
    Ok(())
}

#[test]
fn attributes_names_and_listings_count_against_a_bound_that_has_a_flag() -> Result<()> {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let caps = |memory| Caps {
        memory,
        ..Caps::default()
    };
    let refused = |upper: &Path, earlier: Option<&Scan>, memory| -> Result<()> {
        let Err(error) = bounded(upper, earlier, caps(memory)) else {
            return Err(format!("{memory} bytes were enough").into());
        };
        let told = format!(
            "refused: the memory for names, attributes and directory listings in bytes is over the limit of {memory}; \
             raise it with --max-memory if intended"
        );
        assert_eq!(error.to_string(), told);
        Ok(())
    };
    let attributes = tempfile::tempdir()?;
    let value = |number: usize| format!("{number:03000}").into_bytes();
    if with_attributes(attributes.path(), 2000, value)? {
        refused(attributes.path(), None, 5 << 20)?;
        let scan = bounded(attributes.path(), None, caps(8 << 20))?;
        // Entries that are not inspected again count as well.
        refused(attributes.path(), Some(&scan), 5 << 20)?;
    }
    let names = tempfile::tempdir()?;
    for number in 0..5000 {
        std::fs::File::create(names.path().join(format!("{number:0200}")))?;
    }
    refused(names.path(), None, 1 << 20)?;
    bounded(names.path(), None, caps(4 << 20))?;
    // Directories waiting to be walked, each with its full path.
    let waiting = tempfile::tempdir()?;
    let at = long_path(waiting.path(), 14)?;
    for number in 0..2000 {
        rustix::fs::mkdirat(&at, number.to_string(), rustix::fs::Mode::RWXU)?;
    }
    refused(waiting.path(), None, 4 << 20)?;
    bounded(waiting.path(), None, caps(16 << 20))?;
    Ok(())
}
