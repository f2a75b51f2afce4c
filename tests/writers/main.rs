//! Files that are read in the middle of a write: the layer holds the complete write, or the file is saved again.

mod calls;
#[allow(dead_code, reason = "the parts that writers need")]
#[path = "../support/disk.rs"]
mod disk;
#[allow(dead_code, reason = "the parts that writers need")]
#[path = "../support/mod.rs"]
mod support;

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::LazyLock;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use disk::{Disk, Slow};
use support::Need;
use tokio_util::sync::CancellationToken;
use upperdeck::layer::content::Instability;
use upperdeck::layer::scan::{Caps, Exclusions, Options, Roots, Rules, Scan, tick};
use upperdeck::layer::{self, Compression, Layer, Plan};
use upperdeck::node::overlay::xattr::Namespace;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const SLOW_WRITE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/harness/slow_write.py");
const SIZE: usize = 8 << 20;
/// Time after which a write is completed: a reader that has not finished by then waits for the write.
const PATIENCE: Duration = Duration::from_secs(2);

static NEVER: LazyLock<CancellationToken> = LazyLock::new(CancellationToken::new);

/// A write that has begun.
struct SlowWrite {
    child: Child,
    stdin: ChildStdin,
    says: BufReader<ChildStdout>,
}

impl SlowWrite {
    fn begin(way: &str, file: &Path, slow: Option<&Slow>) -> Result<Self> {
        let mut child = Command::new("python3")
            .args([SLOW_WRITE, way])
            .arg(file)
            .arg(SIZE.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        if let Some(slow) = slow {
            slow.take(&child)?;
        }
        let stdin = child.stdin.take().ok_or("stdin")?;
        let says = BufReader::new(child.stdout.take().ok_or("stdout")?);
        let mut write = Self { child, stdin, says };
        write.hear("under way")?;
        Ok(write)
    }

    fn hear(&mut self, expected: &str) -> Result<()> {
        let mut line = String::new();
        self.says.read_line(&mut line)?;
        if line.trim() == expected {
            return Ok(());
        }
        Err(format!("{line:?}, expected {expected:?}").into())
    }

    /// Completes its second half.
    fn go_on(mut self) -> Result<()> {
        // Some writes have ended by now without waiting for input.
        self.stdin.write_all(b"\n").ok();
        self.hear("over")?;
        self.child.wait()?;
        Ok(())
    }
}

fn scan(upper: &Path) -> Result<Scan> {
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

fn layer_of(plan: &Plan) -> std::result::Result<(Vec<u8>, Layer), layer::Error> {
    let mut out = Vec::new();
    let options = layer::Options {
        compression: Compression::None,
        level: 0,
        jobs: 2,
        cancel: &NEVER,
    };
    let sink = |bytes: bytes::Bytes| -> std::io::Result<()> {
        out.extend_from_slice(&bytes);
        Ok(())
    };
    let layer = layer::stream::write(plan, options, sink, &|_| {})?;
    Ok((out, layer))
}

fn content(tar: &[u8]) -> Result<Vec<u8>> {
    let mut archive = tar::Archive::new(tar);
    for entry in archive.entries()? {
        let mut entry = entry?;
        if entry.path()?.ends_with("file") {
            let mut found = Vec::new();
            entry.read_to_end(&mut found)?;
            return Ok(found);
        }
    }
    Err("no file".into())
}

/// Returns what is read of a file in the middle of a write that has already set the final time stamps.
fn read_beside(way: &str, disk: &Disk, slow: Option<&Slow>) -> Result<(Vec<u8>, Layer)> {
    let upper = disk.path().join(way);
    std::fs::create_dir(&upper)?;
    let path = upper.join("file");
    std::fs::write(&path, vec![b'o'; SIZE])?;
    std::fs::File::open(&path)?.sync_all()?;
    std::thread::sleep(8 * tick());
    let write = SlowWrite::begin(way, &path, slow)?;
    std::thread::sleep(8 * tick());
    let begun = Arc::new(scan(&upper)?);
    let (say, read) = mpsc::channel();
    let reader = {
        let plan = Plan::new(Arc::clone(&begun), None).with_writers(layer::Writers {
            direct: !["buffered", "ring"].contains(&way),
            ..layer::Writers::default()
        });
        std::thread::spawn(move || say.send(layer_of(&plan)).ok())
    };
    let early = read.recv_timeout(PATIENCE).ok();
    write.go_on()?;
    let (tar, layer) = early.map_or_else(|| read.recv(), Ok)??;
    reader.join().map_err(|_| "the reader")?;
    let over = scan(&upper)?;
    let again = over.changes_since(&begun, &|_| false);
    let again = again.ok_or("no layer can say it")?.emitted().count();
    assert_eq!(
        again, 0,
        "{way}: the stamps tell, this is no test of what they do not"
    );
    Ok((content(&tar)?, layer))
}

fn check(mkfs: &str, way: &str, disk: &Disk, slow: Option<&Slow>) -> Result<()> {
    let (found, layer) = read_beside(way, disk, slow)?;
    let unsettled = layer.unstable.iter().map(|file| file.what);
    let unsettled: Vec<_> = unsettled.collect();
    let old = found.iter().position(|&byte| byte != b'n');
    assert_eq!((old, found.len()), (None, SIZE), "{mkfs} {way}: old bytes");
    assert_eq!(unsettled, [], "{mkfs} {way}");
    Ok(())
}

fn needs(mkfs: &str) -> bool {
    !support::ignored(&[Need::Root, Need::Program(mkfs), Need::Program("python3")])
}

const ALL: [&str; 3] = ["mkfs.ext4", "mkfs.xfs", "mkfs.btrfs"];

#[test]
fn a_write_that_has_stamped_its_file_already_is_waited_for() -> Result<()> {
    for mkfs in ALL {
        if !needs(mkfs) {
            return Ok(());
        }
        let disk = Disk::new(mkfs)?;
        check(mkfs, "buffered", &disk, None)?;
        check(mkfs, "direct", &disk, None)?;
        check(mkfs, "ring", &disk, None)?;
    }
    Ok(())
}

#[test]
fn requests_that_nobody_waits_for_are_waited_for() -> Result<()> {
    for mkfs in ALL {
        if !needs(mkfs) {
            return Ok(());
        }
        let disk = Disk::new(mkfs)?;
        let slow = Slow::writes(&disk, 4 << 20)?;
        check(mkfs, "libaio", &disk, Some(&slow))?;
        check(mkfs, "io_uring", &disk, Some(&slow))?;
        check(mkfs, "fixed", &disk, Some(&slow))?;
    }
    Ok(())
}

/// A file that is open for writing cannot be executed. On ext4, waiting for direct I/O requires opening the file that
/// way, so it is not done while the container runs, which may be about to execute a file that it has just written.
#[test]
fn a_file_that_can_be_executed_is_opened_for_writing_under_the_freeze_only() -> Result<()> {
    if !needs("mkfs.ext4") {
        return Ok(());
    }
    let disk = Disk::new("mkfs.ext4")?;
    let slow = Slow::writes(&disk, 4 << 20)?;
    for still in [false, true] {
        let upper = disk.path().join(still.to_string());
        let path = upper.join("file");
        std::fs::create_dir(&upper)?;
        std::fs::write(&path, vec![b'o'; SIZE])?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
        std::fs::File::open(&path)?.sync_all()?;
        let write = SlowWrite::begin("libaio", &path, Some(&slow))?;
        let plan = Plan::new(Arc::new(scan(&upper)?), None).with_writers(layer::Writers {
            frozen: still,
            ..layer::Writers::default()
        });
        let (_, layer) = layer_of(&plan)?;
        let unsettled = layer.unstable.iter().map(|file| file.what);
        let expected: &[Instability] = if still {
            &[]
        } else {
            &[Instability::Unsettled]
        };
        assert_eq!(unsettled.collect::<Vec<_>>(), expected, "{still}");
        write.go_on()?;
    }
    Ok(())
}

/// A hostile process may hold a lock for any length of time.
#[test]
fn a_write_that_never_ends_does_not_hang_the_reader() -> Result<()> {
    for mkfs in ["mkfs.ext4", "mkfs.btrfs"] {
        if !needs(mkfs) {
            return Ok(());
        }
        let disk = Disk::new(mkfs)?;
        let upper = disk.path().join("upper");
        std::fs::create_dir(&upper)?;
        std::fs::write(upper.join("file"), vec![b'o'; SIZE])?;
        let write = SlowWrite::begin("buffered", &upper.join("file"), None)?;
        let plan = Plan::new(Arc::new(scan(&upper)?), None).with_writers(layer::Writers {
            max_wait: Duration::from_millis(100),
            ..layer::Writers::default()
        });
        let (_, layer) = layer_of(&plan)?;
        let unsettled: Vec<_> = layer.unstable.iter().map(|file| file.what).collect();
        assert_eq!(unsettled, [Instability::Unsettled], "{mkfs}");
        write.go_on()?;
    }
    Ok(())
}
