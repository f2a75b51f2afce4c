//! From flags as typed to options as meant: defaults, files and descriptors read, contradictions refused.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::Context;
use zeroize::Zeroizing;

use super::args;
use super::exit::Usage;
use super::progress::Mode;
use crate::commit::{self, Compression};

/// A credentials file is one line; what is larger is another file.
const MAX_CREDS: u64 = 64 << 10;

/// Where runtimes keep their state. None: the usual places.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StateRoots {
    /// Prefix of all of them.
    pub host_root: Option<PathBuf>,
    /// containerd's state and root directory.
    pub containerd: Option<(PathBuf, PathBuf)>,
    /// Docker's data root.
    pub docker: Option<PathBuf>,
    /// graphroot and runroot of containers/storage.
    pub storage: Option<(PathBuf, PathBuf)>,
}

/// How the destination's registry is reached.
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// `--authfile`.
    pub authfile: Option<PathBuf>,
    /// `USER:PASSWORD`; wiped when dropped.
    pub creds: Option<Zeroizing<String>>,
    /// `--tls-verify`.
    pub tls_verify: bool,
    /// `--cert-dir`.
    pub cert_dir: Option<PathBuf>,
}

/// Bounds of the scan. None: its defaults.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// `--max-entries`.
    pub entries: Option<u64>,
    /// `--max-depth`.
    pub depth: Option<u32>,
    /// `--max-size`, in bytes.
    pub bytes: Option<u64>,
    /// `--max-holes`, in bytes.
    pub holes: Option<u64>,
}

/// Everything for `commit`.
#[derive(Clone, Debug)]
pub struct Commit {
    /// What to save, and how.
    pub options: commit::Options,
    /// Registry.
    pub access: Access,
    /// Scan.
    pub limits: Limits,
    /// What to show.
    pub progress: Mode,
    /// Show nothing.
    pub quiet: bool,
}

impl StateRoots {
    /// From the global flags.
    pub(super) fn new(global: &args::Global) -> Self {
        // Naming one half of a pair leaves the other where the system has it.
        let pair = |one: &Option<PathBuf>, other: &Option<PathBuf>, usual: [&str; 2]| {
            let or =
                |path: &Option<PathBuf>, usual: &str| path.clone().unwrap_or_else(|| usual.into());
            (one.is_some() || other.is_some()).then(|| (or(one, usual[0]), or(other, usual[1])))
        };
        Self {
            host_root: global.host_root.clone(),
            containerd: pair(
                &global.containerd_state,
                &global.containerd_root,
                ["/run/containerd", "/var/lib/containerd"],
            ),
            docker: global.docker_root.clone(),
            storage: pair(
                &global.storage_root,
                &global.storage_runroot,
                ["/var/lib/containers/storage", "/run/containers/storage"],
            ),
        }
    }
}

/// The level, if the codec has it.
pub(super) fn level(content: &args::Content) -> Result<Option<u32>, Usage> {
    let levels = match content.compression {
        Compression::Gzip => 1..=9,
        Compression::Zstd => 1..=19,
        Compression::None => 0..=0,
    };
    match content.compression_level {
        Some(level) if !levels.contains(&level) => Err(Usage(format!(
            "--compression-level {level}: this codec has {} to {}",
            levels.start(),
            levels.end()
        ))),
        level => Ok(level),
    }
}

impl Limits {
    /// From the flags of `commit` and `layer`.
    pub(super) fn new(content: &args::Content) -> Self {
        Self {
            entries: content.max_entries,
            depth: content.max_depth,
            bytes: content.max_size,
            holes: content.max_holes,
        }
    }
}

impl Commit {
    /// Reads the credentials, so that all that can be wrong with the command line is found before anything begins.
    pub(super) fn new(args: args::Commit) -> anyhow::Result<Self> {
        let level = level(&args.content)?;
        let limits = Limits::new(&args.content);
        let creds = creds(&args.registry)?;
        let options = commit::Options {
            container: args.container,
            destination: args.destination,
            author: args.author,
            message: args.message,
            changes: args.change,
            labels: args.label,
            annotations: args.annotation,
            pause: args.pause,
            max_pause: args.max_pause,
            compression: args.content.compression,
            level,
            jobs: args.content.jobs.map(Into::into),
            exclude: args.content.exclude,
            include_credentials: args.content.include_credentials,
            include_caches: args.content.include_caches,
            base: args.base,
            timestamp: args.content.timestamp,
            metadata_file: args.metadata_file,
            digestfile: args.digestfile,
        };
        let access = Access {
            authfile: args.registry.authfile,
            creds,
            tls_verify: args.registry.tls_verify,
            cert_dir: args.registry.cert_dir,
        };
        Ok(Self {
            options,
            access,
            limits,
            progress: args.progress,
            quiet: args.quiet,
        })
    }
}

fn creds(registry: &args::Registry) -> anyhow::Result<Option<Zeroizing<String>>> {
    let text = match (&registry.creds, &registry.creds_file, registry.creds_fd) {
        (Some(creds), ..) => Zeroizing::new(creds.clone()),
        (None, Some(file), _) => read_creds(file)?,
        (None, None, Some(fd)) => read_creds(Path::new(&format!("/dev/fd/{fd}")))?,
        (None, None, None) => return Ok(None),
    };
    match text.split_once(':') {
        Some((user, _)) if !user.is_empty() => Ok(Some(text)),
        // Never show what was given: it may be the password alone.
        _ => Err(Usage("credentials must be USER:PASSWORD".to_owned()).into()),
    }
}

/// The first line of a file or descriptor.
fn read_creds(path: &Path) -> anyhow::Result<Zeroizing<String>> {
    let context = || format!("cannot read credentials from {}", super::text::path(path));
    let file = File::open(path).with_context(context)?;
    // Large enough from the start: growing would leave copies behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_CREDS as usize + 1));
    file.take(MAX_CREDS + 1)
        .read_to_end(&mut bytes)
        .with_context(context)?;
    if bytes.len() as u64 > MAX_CREDS {
        return Err(Usage(format!(
            "{} is no credentials file: it is larger than {MAX_CREDS} bytes",
            super::text::path(path)
        ))
        .into());
    }
    let line = bytes
        .split(|byte| *byte == b'\n')
        .next()
        .unwrap_or_default();
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let text = std::str::from_utf8(line)
        .map_err(|_| Usage(format!("{} is not text", super::text::path(path))))?;
    Ok(Zeroizing::new(text.to_owned()))
}
