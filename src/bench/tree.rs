//! Generates a tree like that of a Jupyter session, identical on every machine, so that nodes can be compared.
//!
//! The mix is that of a session with jupyterlab, numpy, scipy, pandas, scikit-learn and matplotlib. By size it is a
//! third shared objects, a quarter compiled Python, a fifth Python, and for the rest scripts, data and pictures; by
//! number it is almost only small text files. gzip compresses each kind about as much as the real content; zstd gains
//! less than there.

use std::fs::{self, File, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, utimensat};
use tokio_util::sync::CancellationToken;

use super::Error;
use crate::common::cancel::Cancelled;

/// Modification time of all files, which contributes to the tar being identical everywhere.
const MTIME: Duration = Duration::from_secs(1_700_000_000);
/// Number of Python files in a package (and as many compiled ones), distributed over [`PARTS`] directories.
const MODULES: usize = 28;
const PARTS: usize = 5;

/// A generated tree, which is deleted when dropped.
pub struct Tree {
    dir: tempfile::TempDir,
    path: PathBuf,
}

impl Tree {
    /// Writes at least `bytes` of content to a new directory in `place`. `progress` is called with the number of bytes
    /// written so far.
    pub fn generate(
        place: &Path,
        bytes: u64,
        cancel: &CancellationToken,
        progress: &dyn Fn(u64),
    ) -> Result<Self, Error> {
        let dir = tempfile::Builder::new()
            .prefix("upperdeck-bench-")
            .tempdir_in(place)
            .map_err(Error::io(place))?;
        let path = dir.path().join("tree");
        let mut writer = Writer {
            cancel,
            left: bytes,
            buffer: Vec::new(),
            words: words(&mut Rng(7)),
            forms: forms(&mut Rng(11)),
        };
        let site = path.join("opt/session/lib/python3.13/site-packages");
        fs::create_dir_all(&site).map_err(Error::io(&site))?;
        for number in 0.. {
            if writer.left == 0 {
                break;
            }
            writer.package(&site, number)?;
            progress(bytes - writer.left);
        }
        settle(&path)?;
        Ok(Self { dir, path })
    }

    /// Returns the root of the tree.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Deletes the tree and returns an error if that fails.
    pub fn remove(self) -> Result<(), Error> {
        let path = self.dir.path().to_owned();
        self.dir.close().map_err(Error::io(&path))
    }
}

/// Sets modes and times of the directories after the last write to them.
fn settle(root: &Path) -> Result<(), Error> {
    for entry in walkdir::WalkDir::new(root).contents_first(true) {
        let entry = entry.map_err(|error| Error::io(root)(error.into()))?;
        if entry.file_type().is_dir() {
            let set = |path: &Path| -> io::Result<()> {
                let dir = File::open(path)?;
                dir.set_permissions(Permissions::from_mode(0o755))?;
                dir.set_modified(SystemTime::UNIX_EPOCH + MTIME)
            };
            set(entry.path()).map_err(Error::io(entry.path()))?;
        }
    }
    Ok(())
}

/// Sebastiano Vigna's splitmix64. The output of a general-purpose generator may change with its version.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// Returns small numbers much more often than large ones, like the frequencies of words in a text.
    fn skewed(&mut self, n: usize) -> usize {
        let (a, b) = (self.below(n), self.below(n));
        a * b / n
    }
}

/// Generates names like those in source code.
fn words(numbers: &mut Rng) -> Vec<Vec<u8>> {
    const SYLLABLES: [&str; 24] = [
        "ar", "ray", "in", "dex", "val", "ue", "con", "fig", "frame", "self", "get", "set", "the",
        "of", "re", "turn", "name", "type", "data", "len", "ob", "ject", "key", "path",
    ];
    (0..3000)
        .map(|_| {
            let parts = 1 + numbers.skewed(4);
            (0..=parts)
                .flat_map(|_| SYLLABLES[numbers.below(SYLLABLES.len())].bytes())
                .collect()
        })
        .collect()
}

/// Generates instruction forms, because machine code consists of few forms with changing operands.
fn forms(numbers: &mut Rng) -> Vec<[u8; 6]> {
    (0..400)
        .map(|_| {
            let bytes = numbers.next().to_le_bytes();
            [
                bytes[0] & 0x4f,
                bytes[1],
                bytes[2] & 0x3f,
                bytes[3] & 0x1f,
                0,
                0,
            ]
        })
        .collect()
}

struct Writer<'a> {
    cancel: &'a CancellationToken,
    left: u64,
    buffer: Vec<u8>,
    words: Vec<Vec<u8>>,
    forms: Vec<[u8; 6]>,
}

/// Kind of content.
#[derive(Clone, Copy)]
enum Content {
    Python,
    Compiled,
    Code,
    Noise,
}

impl Writer<'_> {
    /// Writes one installed package: about 2 MB in 95 entries.
    fn package(&mut self, site: &Path, number: u64) -> Result<(), Error> {
        const MODULE_KB: [usize; 8] = [1, 2, 3, 5, 8, 16, 32, 64];
        const OBJECT_KB: [usize; 4] = [60, 200, 400, 2080];
        let mut numbers = Rng(number);
        let root = site.join(format!("package{number:04}"));
        for part in 0..PARTS {
            let dir = root.join(format!("part{part}/__pycache__"));
            fs::create_dir_all(&dir).map_err(Error::io(&dir))?;
        }
        for module in 0..MODULES {
            let dir = root.join(format!("part{}", module % PARTS));
            let bytes = MODULE_KB[numbers.below(8)] * 1000 + numbers.below(800);
            let compiled = format!("__pycache__/module{module:02}.cpython-313.pyc");
            self.file(
                &dir.join(format!("module{module:02}.py")),
                &mut numbers,
                bytes,
                Content::Python,
            )?;
            self.file(
                &dir.join(compiled),
                &mut numbers,
                bytes * 27 / 20,
                Content::Compiled,
            )?;
            if module % 4 != 0 {
                let bytes = 1500 + numbers.below(2000);
                self.file(
                    &dir.join(format!("module{module:02}.pyi")),
                    &mut numbers,
                    bytes,
                    Content::Python,
                )?;
            }
        }
        let object = OBJECT_KB[(number % 4) as usize] * 1000;
        self.file(
            &root.join("_core.cpython-313-x86_64-linux-gnu.so"),
            &mut numbers,
            object,
            Content::Code,
        )?;
        for (name, bytes, content) in [
            ("static.js", 52_000, Content::Python),
            ("bundle.js", 52_000, Content::Python),
            ("METADATA", 9000, Content::Python),
            ("RECORD", 7000, Content::Python),
            ("a.dat", 28_000, Content::Compiled),
            ("b.dat", 28_000, Content::Compiled),
            ("c.dat", 56_000, Content::Code),
            ("icon.png", 20_000, Content::Noise),
            ("font.woff2", 45_000, Content::Noise),
        ] {
            self.file(&root.join(name), &mut numbers, bytes, content)?;
        }
        let link = root.join("latest.so");
        let write = || -> io::Result<()> {
            symlink("_core.cpython-313-x86_64-linux-gnu.so", &link)?;
            let time = Timespec {
                tv_sec: MTIME.as_secs().cast_signed(),
                tv_nsec: 0,
            };
            let times = Timestamps {
                last_access: time,
                last_modification: time,
            };
            Ok(utimensat(CWD, &link, &times, AtFlags::SYMLINK_NOFOLLOW)?)
        };
        write().map_err(Error::io(&link))
    }

    fn file(
        &mut self,
        path: &Path,
        numbers: &mut Rng,
        bytes: usize,
        content: Content,
    ) -> Result<(), Error> {
        Cancelled::check(self.cancel)?;
        if self.left == 0 {
            return Ok(());
        }
        self.buffer.clear();
        match content {
            Content::Python => self.python(numbers, bytes),
            Content::Compiled => self.compiled(numbers, bytes),
            Content::Code => self.code(numbers, bytes),
            Content::Noise => self.random_bytes(numbers, bytes),
        }
        self.buffer.truncate(bytes);
        self.left = self.left.saturating_sub(bytes as u64);
        let write = || -> io::Result<()> {
            let mut file = File::create_new(path)?;
            file.write_all(&self.buffer)?;
            file.set_permissions(Permissions::from_mode(0o644))?;
            file.set_modified(SystemTime::UNIX_EPOCH + MTIME)
        };
        write().map_err(Error::io(path))
    }

    /// Appends lines of code, many of which are similar to one shortly before.
    fn python(&mut self, numbers: &mut Rng, bytes: usize) {
        let local: Vec<usize> = (0..60).map(|_| numbers.below(self.words.len())).collect();
        let mut lines: Vec<(usize, usize)> = Vec::new();
        while self.buffer.len() < bytes {
            let start = self.buffer.len();
            if lines.len() > 8 && numbers.below(100) < 24 {
                let (from, to) = lines[lines.len() - 1 - numbers.skewed(lines.len().min(60))];
                self.buffer.extend_from_within(from..to);
                // One word is replaced by another.
                let at = start + numbers.below(to - from);
                let word = &self.words[local[numbers.skewed(60)]];
                let end = (at + word.len()).min(self.buffer.len() - 1);
                if at < end {
                    self.buffer[at..end].copy_from_slice(&word[..end - at]);
                }
            } else {
                self.buffer.resize(start + 4 * numbers.below(4), b' ');
                for _ in 0..3 + numbers.below(6) {
                    let word = if numbers.below(5) == 0 {
                        numbers.skewed(self.words.len())
                    } else {
                        local[numbers.skewed(60)]
                    };
                    self.buffer.extend_from_slice(&self.words[word]);
                    let joint: &[u8] = match numbers.skewed(8) {
                        0 => b" ",
                        1 => b".",
                        2 => b", ",
                        3 => b" = ",
                        4 => b"(",
                        5 => b"_",
                        6 => b"):",
                        _ => b"['",
                    };
                    self.buffer.extend_from_slice(joint);
                }
                self.buffer.push(b'\n');
            }
            lines.push((start, self.buffer.len()));
        }
    }

    /// Appends byte code with interspersed constants.
    fn compiled(&mut self, numbers: &mut Rng, bytes: usize) {
        while self.buffer.len() < bytes {
            self.repeat_recent(numbers, 2);
            for _ in 0..20 + numbers.below(60) {
                let operand = numbers.skewed(16) as u8;
                self.buffer
                    .extend_from_slice(&[(numbers.skewed(40) * 3) as u8, operand]);
                if numbers.below(4) == 0 {
                    self.buffer.extend_from_slice(&[0; 6]);
                }
            }
            for _ in 0..4 + numbers.below(10) {
                let word = &self.words[numbers.skewed(self.words.len())];
                self.buffer.extend_from_slice(&[0xda, word.len() as u8]);
                self.buffer.extend_from_slice(word);
            }
        }
    }

    /// Appends machine code, then tables.
    fn code(&mut self, numbers: &mut Rng, bytes: usize) {
        let mut address = 0x1000_u64;
        while self.buffer.len() < bytes {
            for _ in 0..400 {
                if numbers.below(7) == 0 {
                    self.repeat_recent(numbers, 1);
                }
                let form = self.forms[numbers.skewed(400)];
                self.buffer
                    .extend_from_slice(&form[..3 + numbers.skewed(4)]);
                if numbers.below(5) == 0 {
                    let operand = (numbers.next() as u16).to_le_bytes();
                    self.buffer
                        .extend_from_slice(&[operand[0], operand[1] & 0x0f, 0, 0]);
                }
            }
            for _ in 0..numbers.below(60) {
                address += 8 * (1 + numbers.skewed(12) as u64);
                self.buffer.extend_from_slice(&address.to_le_bytes());
            }
        }
    }

    /// Repeats sequences from shortly before, as compilers do.
    fn repeat_recent(&mut self, numbers: &mut Rng, stretches: usize) {
        const FAR: usize = 16 << 10;
        for _ in 0..stretches {
            let length = 20 + numbers.skewed(120);
            let back = length + numbers.skewed(FAR);
            if let Some(from) = self.buffer.len().checked_sub(back) {
                self.buffer.extend_from_within(from..from + length);
            }
        }
    }

    /// Appends incompressible data.
    fn random_bytes(&mut self, numbers: &mut Rng, bytes: usize) {
        while self.buffer.len() < bytes {
            self.buffer.extend_from_slice(&numbers.next().to_le_bytes());
        }
    }
}
