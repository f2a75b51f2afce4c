//! Resolves flags to options: applies defaults, reads files and descriptors, and refuses contradictions.

use std::ffi::OsString;
use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use anyhow::Context;
use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;

use super::args;
use super::exit::Usage;
use crate::bench::{self, stages::Setting};
use crate::layer::scan::Caps;
use crate::node::background::Background;
use crate::node::container::{
    ContainerdRoot, Roots, StorageRoot, VolumeRules, is_initial_user_namespace,
};
use crate::save::{self, Compression, Gate, Rules};
use crate::store::destination::{Replaceable, SAVE_ANNOTATION, Target};
use crate::store::registry;
use crate::store::registry::credentials::{Credentials, CredentialsError};

/// The options of `commit`.
#[derive(Clone, Debug)]
pub(crate) struct Commit {
    /// What to save, and how.
    pub(crate) options: save::Options,
    /// How registries are reached.
    pub(crate) access: registry::Access,
}

/// Returns where runtimes keep their state, from the global flags and the default paths.
pub(super) fn roots(global: &args::Global) -> Roots {
    let or = |path: &Option<PathBuf>, usual: &str| path.clone().unwrap_or_else(|| usual.into());
    let mut roots = Roots {
        host_root: global.host_root.clone(),
        ..Roots::default()
    };
    // If only one path of a pair is given, the other has its default.
    if global.containerd_state.is_some() || global.containerd_root.is_some() {
        roots.containerd = vec![ContainerdRoot {
            state: or(&global.containerd_state, "/run/containerd"),
            root: or(&global.containerd_root, "/var/lib/containerd"),
        }];
    }
    if let Some(docker) = &global.docker_root {
        roots.docker = vec![docker.clone()];
    }
    if global.storage_root.is_some() || global.storage_runroot.is_some() {
        roots.storage = vec![StorageRoot {
            root: or(&global.storage_root, "/var/lib/containers/storage"),
            runroot: or(&global.storage_runroot, "/run/containers/storage"),
        }];
    } else if global.host_root.is_none() && !is_root_of_node() {
        roots
            .storage
            .extend(own_storage(|name| std::env::var_os(name)));
    }
    roots
}

/// Returns whether this process has user ID 0 of the node itself, not of a user namespace.
fn is_root_of_node() -> bool {
    rustix::process::geteuid().is_root() && is_initial_user_namespace()
}

/// Returns the storage of this user's rootless Podman (containers/storage, `types/utils.go`). Root does not search the
/// storage of users, because they write its records.
fn own_storage(environment: impl Fn(&str) -> Option<OsString>) -> Option<StorageRoot> {
    let data = own_directory(&environment, "XDG_DATA_HOME", ".local/share")?;
    Some(StorageRoot {
        root: data.join("containers/storage"),
        runroot: absolute(&environment, "XDG_RUNTIME_DIR")?.join("containers"),
    })
}

/// Returns the directory for the state of later saves; none if the given one is empty. The default without root is a
/// directory of the user's own.
pub(super) fn state_dir(given: Option<PathBuf>, host_root: Option<&Path>) -> Option<PathBuf> {
    let usual = || {
        let is_own = host_root.is_none() && !is_root_of_node();
        is_own
            .then(|| own_state(|name| std::env::var_os(name)))
            .flatten()
            .unwrap_or_else(|| PathBuf::from("/var/lib/upperdeck"))
    };
    Some(given.unwrap_or_else(usual)).filter(|dir| !dir.as_os_str().is_empty())
}

fn own_state(environment: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    own_directory(environment, "XDG_STATE_HOME", ".local/state").map(|dir| dir.join("upperdeck"))
}

/// Returns a directory of the XDG Base Directory Specification: what `variable` says, or `usual` in the home directory.
fn own_directory(
    environment: impl Fn(&str) -> Option<OsString>,
    variable: &str,
    usual: &str,
) -> Option<PathBuf> {
    absolute(&environment, variable)
        .or_else(|| absolute(&environment, "HOME").map(|home| home.join(usual)))
}

/// Returns the path in an environment variable; none that is relative, which the specification has ignored.
fn absolute(environment: impl Fn(&str) -> Option<OsString>, variable: &str) -> Option<PathBuf> {
    let path = environment(variable).map(PathBuf::from);
    path.filter(|path| path.is_absolute())
}

/// Returns the rules for the content of layers.
pub(super) fn rules(choice: &args::Choice) -> Rules {
    let usual = Caps::default();
    Rules {
        exclude: choice.exclude.clone(),
        include_credentials: choice.include_credentials,
        include_caches: choice.include_caches,
        caps: Caps {
            entries: choice.max_entries.unwrap_or(usual.entries),
            depth: choice.max_depth.unwrap_or(usual.depth),
            bytes: choice.max_size.unwrap_or(usual.bytes),
            holes: choice.max_holes.unwrap_or(usual.holes),
            memory: choice.max_memory.unwrap_or(usual.memory),
        },
    }
}

/// Returns the compression level. Fails if the codec does not have it.
pub(super) fn level(content: &args::Content) -> Result<u32, Usage> {
    let levels = content.compression.levels();
    let level = content
        .compression_level
        .unwrap_or_else(|| content.compression.default_level());
    if levels.contains(&level) {
        return Ok(level);
    }
    let (first, last) = (levels.start(), levels.end());
    Err(Usage(format!(
        "--compression-level {level}: this codec has {first} to {last}"
    )))
}

impl Commit {
    /// Resolves the options and reads the credentials, so that all errors in the command line are found before the save
    /// starts.
    ///
    /// `cancel` is passed to the gate, whose answer can cancel the save.
    pub(super) fn new(
        args: args::Commit,
        host_root: Option<&Path>,
        cancel: &CancellationToken,
    ) -> anyhow::Result<Self> {
        let level = level(&args.content)?;
        if let Some(path) = args.include_volume.iter().find(|path| !path.is_absolute()) {
            let shown = super::text::path(path);
            let why = "expected an absolute path in the container";
            return Err(Usage(format!("--include-volume {shown}: {why}")).into());
        }
        let creds = creds(&args.registry)?;
        let rules = rules(&args.content.choice);
        let target = Target::for_saving(&args.destination).ok();
        let replaceable = (args.no_replace || args.replace_only.is_some()).then(|| Replaceable {
            digest: args.replace_only,
            save: args
                .annotation
                .iter()
                .find(|(key, _)| key == SAVE_ANNOTATION)
                .map(|(_, save)| save.clone()),
        });
        let background = background(args.background.floor(), &args.memory, host_root);
        let options = save::Options {
            container: args.container,
            attempt: args.attempt.into(),
            destination: args.destination,
            author: args.author,
            replaceable,
            delete_replaced: args.delete_replaced,
            harbor_labels: args.harbor_label,
            message: args.message,
            changes: args.change,
            labels: args.label,
            annotations: args.annotation,
            pause: args.pause,
            max_pause: args
                .max_pause
                .or((args.pause == save::Pause::Live).then_some(save::MAX_PAUSE)),
            live_limit: args.live_limit,
            state_dir: state_dir(args.state.state_dir, host_root),
            max_layers: args.state.max_layers.into(),
            full: args.state.full,
            compression: args.content.compression,
            level,
            jobs: args.content.jobs.map(Into::into),
            layer_size: args.layer_size,
            rules,
            volumes: args.include_volume,
            volume_rules: VolumeRules {
                own_rights: args.volume_identity == args::VolumeIdentity::Own,
                allowed: (!args.allow_volume.is_empty()).then_some(args.allow_volume),
            },
            base: args.base,
            timestamp: args.content.choice.timestamp,
            metadata_file: args.metadata_file,
            output_mode: args.output_mode,
            share_blobs: args.share_blobs,
            digestfile: args.digestfile,
            gate: args
                .gate_fd
                .map(|fd| gate(fd, cancel, background.clone()))
                .transpose()?,
            freeze_mark: args.freeze_mark,
            together: None,
            background,
        };
        // Credentials and relaxed TLS settings apply to the destination only, not to registries of base images.
        let host = match target {
            Some(Target::Registry(reference)) => Some(reference.host),
            _ => None,
        };
        let access = registry::Access {
            create_project: args.create_project,
            project_quota: args.project_quota,
            ..access(&args.registry, creds, host)
        };
        Ok(Self { options, access })
    }
}

/// Moves the process into the background and limits its memory, as requested.
pub(super) fn background(
    floor: Option<f64>,
    memory: &args::Memory,
    host_root: Option<&Path>,
) -> Option<Background> {
    let bound = memory.bound();
    if let Some(floor) = floor {
        return Some(Background::enter(host_root, bound.as_ref(), floor));
    }
    if let Some(bound) = &bound {
        Background::limit_memory(host_root, bound);
    }
    None
}

/// Creates the gate on an open descriptor. A process in `background` leaves it for good when the gate's owner asks.
fn gate(
    fd: u32,
    cancel: &CancellationToken,
    background: Option<Background>,
) -> anyhow::Result<Gate> {
    let context = || format!("cannot read from descriptor {fd}");
    let own = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned().map(File::from);
    // Sockets cannot be opened through /dev/fd, and a socket is most likely the one that the events are written to.
    let answers = match fd {
        0 => own(std::io::stdin().as_fd()),
        1 => own(std::io::stdout().as_fd()),
        fd => File::open(format!("/dev/fd/{fd}")),
    };
    let answers = answers.with_context(context)?;
    let hurry = move || {
        if let Some(background) = &background {
            background.leave();
        }
    };
    Gate::new(answers, cancel.clone(), hurry).with_context(context)
}

/// Codecs and levels that `bench` measures by default, from fast to small. Slower levels are not practical for a save.
const BENCH_LEVELS: [(Compression, u32); 8] = [
    (Compression::Gzip, 1),
    (Compression::Gzip, 2),
    (Compression::Gzip, 3),
    (Compression::Gzip, 4),
    (Compression::Gzip, 6),
    (Compression::Zstd, 1),
    (Compression::Zstd, 2),
    (Compression::Zstd, 3),
];

/// Resolves the options of `bench`.
pub(super) fn bench(args: args::Bench) -> anyhow::Result<bench::Options> {
    let setting = Setting {
        codec: args.content.compression,
        level: level(&args.content)?,
    };
    let creds = creds(&args.registry)?;
    let registry = match &args.to {
        Some(to) => {
            let reference = bench::registry(to)?;
            let access = access(&args.registry, creds, Some(reference.host.clone()));
            Some((reference, access))
        }
        None => None,
    };
    let settings = if args.codec.is_empty() {
        BENCH_LEVELS
            .map(|(codec, level)| Setting { codec, level })
            .to_vec()
    } else {
        args.codec
    };
    let on = match (args.container, args.directory) {
        (Some(container), _) => bench::BenchTree::Container(container),
        (None, Some(directory)) => bench::BenchTree::Directory(directory),
        (None, None) => bench::BenchTree::Generated(args.size),
    };
    Ok(bench::Options {
        tree: on,
        rules: rules(&args.content.choice),
        scratch: args.scratch.unwrap_or_else(std::env::temp_dir),
        registry,
        rounds: args.rounds.into(),
        jobs: args.content.jobs.map(Into::into),
        setting,
        settings,
        timestamp: args.content.choice.timestamp,
        layer_size: args.layer_size,
    })
}

/// Returns the access options from the common flags. Credentials and relaxed TLS settings apply to `host` only, not to
/// registries of base images.
fn access(
    registry: &args::Registry,
    creds: Option<Credentials>,
    host: Option<String>,
) -> registry::Access {
    registry::Access {
        authfile: registry.authfile.clone(),
        creds,
        tls_verify: registry.tls_verify,
        cert_dir: registry.cert_dir.clone(),
        host,
        deadline: registry.deadline.unwrap_or(registry::DEFAULT_DEADLINE),
        ..registry::Access::default()
    }
}

/// Creates the registries of a verb that accesses a single place, with credentials for `host`.
pub(super) fn registries(
    args: &args::Registry,
    host: Option<String>,
) -> anyhow::Result<registry::Registries> {
    let creds = creds(args)?;
    Ok(registry::Registries::new(access(args, creds, host)))
}

fn creds(registry: &args::Registry) -> anyhow::Result<Option<Credentials>> {
    let text = match (&registry.creds, &registry.creds_file, registry.creds_fd) {
        (Some(creds), ..) => Zeroizing::new(creds.clone()),
        (None, Some(file), _) => read_creds(file)?,
        (None, None, Some(fd)) => read_creds(Path::new(&format!("/dev/fd/{fd}")))?,
        (None, None, None) => return Ok(None),
    };
    parse_creds(&text).map(Some)
}

/// Reads credentials from a file or descriptor.
#[cfg(feature = "service")]
pub(super) fn creds_of(file: &Path) -> anyhow::Result<Credentials> {
    parse_creds(&read_creds(file)?)
}

fn parse_creds(text: &str) -> anyhow::Result<Credentials> {
    // The error does not include the text, which may be a password.
    text.parse()
        .map_err(|error: CredentialsError| Usage(error.to_string()).into())
}

fn read_creds(path: &Path) -> anyhow::Result<Zeroizing<String>> {
    let shown = super::text::path(path);
    match super::secret::first_line(path) {
        Err(error) if error.kind() == ErrorKind::InvalidData => {
            Err(Usage(format!("{shown} is no credentials file: {error}")).into())
        }
        line => line.with_context(|| format!("cannot read credentials from {shown}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_of_users_without_root_is_in_their_own_directory() {
        let state = |set: &[(&str, &str)]| {
            own_state(|name| {
                let found = set.iter().find(|(known, _)| *known == name);
                found.map(|(_, value)| OsString::from(value))
            })
        };
        let home = ("HOME", "/home/a");
        let below_home = Some(PathBuf::from("/home/a/.local/state/upperdeck"));
        assert_eq!(state(&[home]), below_home);
        assert_eq!(state(&[home, ("XDG_STATE_HOME", "relative")]), below_home);
        assert_eq!(
            state(&[home, ("XDG_STATE_HOME", "/s")]),
            Some(PathBuf::from("/s/upperdeck"))
        );
        assert_eq!(state(&[]), None);
        assert_eq!(state_dir(Some(PathBuf::new()), None), None);
    }
}
