//! Exclusion rules: entries that must not get into a layer. These are mounts and the stubs that runtimes leave for
//! them, GPU driver stubs, credentials, caches, and whatever matches the user's patterns.
//!
//! The matcher works on path bytes only and is called once for every entry of an upper directory, so it reads no files.
//! There is one table per list: [`CREDENTIALS`] and [`CACHES`].

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;

use globset::{Candidate, GlobBuilder, GlobSet, GlobSetBuilder};
use rustix::fs::FileType;

use crate::node::overlay::lower::basename;

/// Properties of an entry besides its path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts<'a> {
    /// Type of the entry; `None` for a whiteout in either form.
    pub file_type: Option<FileType>,
    /// Apparent size of a file in bytes; 0 for all other types.
    pub size: u64,
    /// Target of a symbolic link.
    pub link: Option<&'a [u8]>,
    /// Whether the base has an entry at this path.
    pub in_base: bool,
}

/// Reason for leaving out an entry.
#[derive(
    Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(tag = "reason", content = "pattern", rename_all = "snake_case")]
pub enum Reason {
    /// At or below the destination of a mount.
    Mount,
    /// A stub that a runtime creates as a mount point.
    MountStub,
    /// A device that the runtime creates in every container.
    RuntimeDevice,
    /// A stub left by the GPU hook.
    Gpu,
    /// A credential, or a place where programs keep credentials, shell histories included.
    Credential,
    /// Data that can be downloaded again.
    Cache,
    /// The user's pattern that matched.
    Pattern(String),
    /// A path so long that unpacking it into a directory would exceed `PATH_MAX`.
    PathTooLong,
    /// A name that begins with `.wh.`, which means a deletion in a layer.
    ReservedName,
}

impl Reason {
    /// Returns the value of `reason` in JSON.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Mount => "mount",
            Self::MountStub => "mount_stub",
            Self::RuntimeDevice => "runtime_device",
            Self::Gpu => "gpu",
            Self::Credential => "credential",
            Self::Cache => "cache",
            Self::Pattern(_) => "pattern",
            Self::PathTooLong => "path_too_long",
            Self::ReservedName => "reserved_name",
        }
    }
}

/// The rules of a matcher.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rules<'a> {
    /// Absolute destinations of the container's mounts. The root itself is ignored.
    pub mounts: &'a [Vec<u8>],
    /// The mounts that are saved separately: the directories above them are in the image.
    pub saved: &'a [Vec<u8>],
    /// The user's patterns, see [`Exclusions::new`].
    pub user: &'a [String],
    /// Exclude `CREDENTIALS`.
    pub credentials: bool,
    /// Exclude `CACHES`.
    pub caches: bool,
    /// Exclude the GPU hook's stubs.
    pub gpu: bool,
    /// Whether the tree is an image's own layer, in which nothing is a runtime's stub.
    pub of_image: bool,
}

/// A pattern that is not valid.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("exclude pattern {pattern:?}: {why}")]
pub struct PatternError {
    /// The pattern as given by the user.
    pub pattern: String,
    /// A description of the error.
    pub why: String,
}

/// What an entry of a list matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MatchScope {
    /// Trailing components anywhere in the tree: everything with that name, and all below it.
    Tree,
    /// Trailing components anywhere in the tree: everything with that name except directories.
    File,
    /// A path from the root: all below that directory, but not the directory.
    Contents,
}

/// Paths of credentials and input histories. Configuration files that may hold a password among much else (`.env`,
/// `pip.conf`, `.condarc`, `.gitconfig`, Maven's `settings.xml`) are not listed: programs need them, and would fail for
/// no visible reason.
pub(crate) const CREDENTIALS: &[(&str, MatchScope)] = &[
    // Keys and password stores.
    (".ssh", MatchScope::Tree),
    (".gnupg", MatchScope::Tree),
    (".pki/nssdb", MatchScope::Tree),
    (".password-store", MatchScope::Tree),
    (".local/share/keyrings", MatchScope::Tree),
    (".local/share/kwalletd", MatchScope::Tree),
    (".local/share/python_keyring", MatchScope::Tree),
    (".anaconda/keyring", MatchScope::File),
    (".config/sops/age", MatchScope::Tree),
    (".config/op", MatchScope::Tree),
    (".config/borg/keys", MatchScope::Tree),
    (".vault-token", MatchScope::File),
    (".vault_pass", MatchScope::File),
    (".vault_pass.txt", MatchScope::File),
    // Hosts, mail and file servers.
    (".netrc", MatchScope::File),
    ("_netrc", MatchScope::File),
    (".authinfo", MatchScope::File),
    (".authinfo.gpg", MatchScope::File),
    (".smbcredentials", MatchScope::File),
    (".davfs2/secrets", MatchScope::File),
    (".msmtprc", MatchScope::File),
    (".fetchmailrc", MatchScope::File),
    (".config/rclone", MatchScope::Tree),
    (".rclone.conf", MatchScope::File),
    (".s3cfg", MatchScope::File),
    (".boto", MatchScope::File),
    (".mc/config.json", MatchScope::File),
    (".config/filezilla", MatchScope::Tree),
    (".irods/.irodsA", MatchScope::File),
    (".globus", MatchScope::Tree),
    (".globusonline", MatchScope::Tree),
    // Clouds and clusters.
    (".aws", MatchScope::Tree),
    (".azure", MatchScope::Tree),
    (".config/gcloud", MatchScope::Tree),
    (".oci", MatchScope::Tree),
    (".aliyun", MatchScope::Tree),
    (".bluemix", MatchScope::Tree),
    (".kube", MatchScope::Tree),
    (".config/doctl", MatchScope::Tree),
    (".config/hcloud", MatchScope::Tree),
    (".config/scw", MatchScope::Tree),
    (".config/linode-cli", MatchScope::File),
    (".config/argocd", MatchScope::Tree),
    (".fly", MatchScope::Tree),
    (".cloudflared", MatchScope::Tree),
    (".config/.wrangler", MatchScope::Tree),
    (".config/ngrok", MatchScope::Tree),
    (".ngrok2", MatchScope::Tree),
    (".config/stripe", MatchScope::Tree),
    (".terraform.d/credentials.tfrc.json", MatchScope::File),
    (".pulumi/credentials.json", MatchScope::File),
    // Source code.
    (".git-credentials", MatchScope::File),
    (".config/git/credentials", MatchScope::File),
    (".gitcookies", MatchScope::File),
    (".config/gh", MatchScope::Tree),
    (".config/hub", MatchScope::File),
    (".config/glab-cli", MatchScope::Tree),
    (".config/tea", MatchScope::Tree),
    (".subversion/auth", MatchScope::Tree),
    // Registries and package indexes.
    (".docker/config.json", MatchScope::File),
    (".dockercfg", MatchScope::File),
    (".config/containers/auth.json", MatchScope::File),
    (".config/helm/registry", MatchScope::Tree),
    (".singularity/remote.yaml", MatchScope::File),
    (".singularity/docker-config.json", MatchScope::File),
    (".apptainer/remote.yaml", MatchScope::File),
    (".apptainer/docker-config.json", MatchScope::File),
    (".ngc", MatchScope::Tree),
    (".jfrog", MatchScope::Tree),
    (".pypirc", MatchScope::File),
    (".config/pypoetry/auth.toml", MatchScope::File),
    (".local/share/uv/credentials", MatchScope::Tree),
    (".continuum/anaconda-client/tokens", MatchScope::Tree),
    (".npmrc", MatchScope::File),
    (".cargo/credentials", MatchScope::File),
    (".cargo/credentials.toml", MatchScope::File),
    (".gem/credentials", MatchScope::File),
    (".m2/settings-security.xml", MatchScope::File),
    (".ivy2/.credentials", MatchScope::File),
    (".sbt/.credentials", MatchScope::File),
    (".composer/auth.json", MatchScope::File),
    (".config/composer/auth.json", MatchScope::File),
    (".julia/servers", MatchScope::Tree),
    // Databases.
    (".pgpass", MatchScope::File),
    (".pg_service.conf", MatchScope::File),
    (".my.cnf", MatchScope::File),
    (".mylogin.cnf", MatchScope::File),
    (".snowsql/config", MatchScope::File),
    (".snowflake", MatchScope::Tree),
    (".databrickscfg", MatchScope::File),
    (".dbt/profiles.yml", MatchScope::File),
    // Data sets and models.
    (".kaggle", MatchScope::Tree),
    (".config/kaggle", MatchScope::Tree),
    (".huggingface/token", MatchScope::File),
    (".cache/huggingface/token", MatchScope::File),
    (".cache/huggingface/stored_tokens", MatchScope::File),
    (".modelscope/credentials", MatchScope::Tree),
    (".mlflow/credentials", MatchScope::File),
    (".comet.config", MatchScope::File),
    ("clearml.conf", MatchScope::File),
    (".lightning/credentials.json", MatchScope::File),
    (".modal.toml", MatchScope::File),
    (".claude/.credentials.json", MatchScope::File),
    (".codex/auth.json", MatchScope::File),
    (".gemini/oauth_creds.json", MatchScope::File),
    (".streamlit/secrets.toml", MatchScope::File),
    (".cdsapirc", MatchScope::File),
    (".ecmwfapirc", MatchScope::File),
    (".urs_cookies", MatchScope::File),
    (".config/earthengine", MatchScope::Tree),
    (".synapseConfig", MatchScope::File),
    (".dnanexus_config", MatchScope::Tree),
    (".httr-oauth", MatchScope::File),
    (".cache/gargle", MatchScope::Tree),
    (".R/gargle", MatchScope::Tree),
    // Sessions: cookies, tokens, open documents.
    (".Renviron", MatchScope::File),
    (".local/share/jupyter/runtime", MatchScope::Tree),
    (".local/share/jupyter/notebook_secret", MatchScope::File),
    ("jupyterhub_cookie_secret", MatchScope::File),
    (".config/code-server/config.yaml", MatchScope::File),
    (".local/share/rstudio", MatchScope::Tree),
    (".rstudio", MatchScope::Tree),
    // Input histories.
    (".sh_history", MatchScope::File),
    (".ash_history", MatchScope::File),
    (".bash_history", MatchScope::File),
    (".zsh_history", MatchScope::File),
    (".local/share/fish/fish_history", MatchScope::File),
    (".local/share/xonsh", MatchScope::Tree),
    (".python_history", MatchScope::File),
    (".ipython/profile_default/history.sqlite", MatchScope::File),
    (".Rhistory", MatchScope::File),
    (".julia/logs/repl_history.jl", MatchScope::File),
    (".octave_hist", MatchScope::File),
    (".node_repl_history", MatchScope::File),
    (".irb_history", MatchScope::File),
    (".php_history", MatchScope::File),
    (".psql_history", MatchScope::File),
    (".mysql_history", MatchScope::File),
    (".sqlite_history", MatchScope::File),
    (".rediscli_history", MatchScope::File),
];

/// Paths of data that can be downloaded again. Conda's archives have no fixed names; see [`is_conda_archive`].
pub(crate) const CACHES: &[(&str, MatchScope)] = &[
    (".cache/pip", MatchScope::Tree),
    (".cache/uv", MatchScope::Tree),
    ("var/cache/apt/archives", MatchScope::Contents),
    ("tmp", MatchScope::Contents),
    ("var/tmp", MatchScope::Contents),
];

/// Empty files that runtimes create to mount something over them or to mark a container.
const EMPTY_STUBS: &[&[u8]] = &[
    b"etc/hosts",
    b"etc/hostname",
    b"etc/resolv.conf",
    b".dockerenv",
    b"run/.containerenv",
    b"dev/console",
];

/// Symbolic links that runtimes create, and their targets.
const LINK_STUBS: &[(&[u8], &[u8])] = &[
    (b"etc/mtab", b"/proc/mounts"),
    (b"dev/fd", b"/proc/self/fd"),
    (b"dev/stdin", b"/proc/self/fd/0"),
    (b"dev/stdout", b"/proc/self/fd/1"),
    (b"dev/stderr", b"/proc/self/fd/2"),
    (b"dev/core", b"/proc/kcore"),
    (b"dev/ptmx", b"pts/ptmx"),
];

/// Directories that runtimes create as mount points.
const DIRECTORY_STUBS: &[&[u8]] = &[
    b"dev",
    b"dev/pts",
    b"dev/shm",
    b"dev/mqueue",
    b"proc",
    b"sys",
    b"run/secrets",
];

/// Default devices (runtime-spec, `config-linux.md`, "Default Devices").
const DEFAULT_DEVICES: &[&[u8]] = &[
    b"null", b"zero", b"full", b"random", b"urandom", b"tty", b"console", b"ptmx",
];

/// The matcher.
#[derive(Debug)]
pub struct Exclusions {
    mounts: HashSet<Vec<u8>>,
    ancestors: HashSet<Vec<u8>>,
    /// By last component of the path.
    lists: HashMap<&'static [u8], Vec<Listed>>,
    caches: bool,
    gpu: bool,
    of_image: bool,
    user: Option<Patterns>,
}

#[derive(Debug)]
struct Listed {
    path: &'static [u8],
    reach: MatchScope,
    reason: Reason,
}

impl Exclusions {
    /// Compiles the rules.
    ///
    /// A pattern is a glob as in `.gitignore`: `*`, `?` and `[…]` do not match a slash, `**` does, `{a,b}` matches
    /// either. A leading slash anchors it at the root; otherwise it matches anywhere. With a trailing slash it matches
    /// only directories. A matching directory includes everything below it. `!` is not supported. Patterns also match
    /// deletions, in which case the base's version remains.
    ///
    /// Fails if a pattern is not valid.
    pub fn new(rules: Rules<'_>) -> Result<Self, PatternError> {
        let mounts: HashSet<Vec<u8>> = rules
            .mounts
            .iter()
            .map(|path| relative(path))
            .filter(|path| !path.is_empty())
            .collect();
        let made = if rules.of_image { &[] } else { DIRECTORY_STUBS };
        let mut ancestors: HashSet<Vec<u8>> = made.iter().map(|path| path.to_vec()).collect();
        for mount in &mounts {
            ancestors.extend(
                prefixes(mount)
                    .filter(|p| p.len() < mount.len())
                    .map(<[u8]>::to_vec),
            );
        }
        for saved in rules.saved {
            for above in prefixes(&relative(saved)) {
                ancestors.remove(above);
            }
        }
        let mut lists: HashMap<&'static [u8], Vec<Listed>> = HashMap::new();
        let both = [
            (rules.credentials, CREDENTIALS, Reason::Credential),
            (rules.caches, CACHES, Reason::Cache),
        ];
        for (_, list, reason) in both.iter().filter(|(wanted, ..)| *wanted) {
            for (path, reach) in *list {
                let path = path.as_bytes();
                let listed = Listed {
                    path,
                    reach: *reach,
                    reason: reason.clone(),
                };
                lists.entry(basename(path)).or_default().push(listed);
            }
        }
        let user = if rules.user.is_empty() {
            None
        } else {
            Some(Patterns::new(rules.user)?)
        };
        Ok(Self {
            mounts,
            ancestors,
            lists,
            caches: rules.caches,
            gpu: rules.gpu,
            of_image: rules.of_image,
            user,
        })
    }

    /// Returns the reason why an entry is left out, if it is. `path` has neither a leading nor a trailing slash; the
    /// root is empty.
    ///
    /// If a directory is left out, so is everything below it, and no further calls are needed. A directory of the base
    /// is not itself a credential or a cache (only new entries in it are), since deletions inside it have to stay
    /// deletions.
    pub fn check(&self, path: &[u8], facts: &Facts<'_>) -> Option<Reason> {
        if !self.mounts.is_empty() && prefixes(path).any(|prefix| self.mounts.contains(prefix)) {
            return Some(Reason::Mount);
        }
        if !self.of_image
            && let Some(reason) = stub(path, facts)
        {
            return Some(reason);
        }
        if self.gpu && is_gpu_remnant(path, facts) {
            return Some(Reason::Gpu);
        }
        if let Some(patterns) = &self.user
            && let Some(pattern) =
                patterns.matching(path, facts.file_type == Some(FileType::Directory))
        {
            return Some(Reason::Pattern(pattern.to_owned()));
        }
        let frame = facts.file_type == Some(FileType::Directory) && facts.in_base;
        match facts.file_type {
            Some(file_type) if !frame => self.listed(path, file_type),
            _ => None,
        }
    }

    fn listed(&self, path: &[u8], file_type: FileType) -> Option<Reason> {
        if self.lists.is_empty() {
            return None;
        }
        for prefix in prefixes(path) {
            let whole = prefix.len() == path.len();
            let Some(listed) = self.lists.get(basename(prefix)) else {
                continue;
            };
            for rule in listed {
                let matches = match rule.reach {
                    MatchScope::Tree => ends_with_components(prefix, rule.path),
                    MatchScope::File => {
                        whole
                            && file_type != FileType::Directory
                            && ends_with_components(prefix, rule.path)
                    }
                    MatchScope::Contents => !whole && prefix == rule.path,
                };
                if matches {
                    return Some(rule.reason.clone());
                }
            }
        }
        (self.caches && file_type == FileType::RegularFile && is_conda_archive(path))
            .then_some(Reason::Cache)
    }

    /// Returns whether a runtime creates this directory as a mount point or as a parent of one: an ancestor of a
    /// mount's destination, or a usual destination. If it is not in the base and nothing in it goes into the layer, it
    /// does not belong to the user.
    pub fn mount_ancestor(&self, path: &[u8]) -> bool {
        self.ancestors.contains(path)
    }

    /// Returns whether a symbolic link belongs to the GPU hook, provided that it leads to nothing or to an empty file
    /// in the merged tree. Checking that takes a lookup, so the caller does it for these few.
    pub fn may_be_gpu_link(&self, path: &[u8]) -> bool {
        self.gpu && is_driver_library(basename(path))
    }
}

/// Iterates over the leading parts of a path, the path itself included: `a`, `a/b`, `a/b/c`.
fn prefixes(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    let slashes = path
        .iter()
        .enumerate()
        .filter(|(_, b)| **b == b'/')
        .map(|(i, _)| i);
    let ends = slashes.chain((!path.is_empty()).then_some(path.len()));
    ends.map(|end| &path[..end])
}

fn ends_with_components(path: &[u8], tail: &[u8]) -> bool {
    path.strip_suffix(tail)
        .is_some_and(|head| head.is_empty() || head.ends_with(b"/"))
}

/// Returns an absolute path without its leading slash and without empty and `.` components, with `..` resolved.
fn relative(path: &[u8]) -> Vec<u8> {
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in path.split(|&b| b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join(&b'/')
}

/// Returns the reason for a stub made by a runtime. A file with content is the user's.
fn stub(path: &[u8], facts: &Facts<'_>) -> Option<Reason> {
    // Fast path: the first component rules out nearly all paths.
    let first = path.split(|&b| b == b'/').next()?;
    if !matches!(
        first,
        b"etc" | b"dev" | b"proc" | b"sys" | b"run" | b".dockerenv"
    ) {
        return None;
    }
    let in_dev = path.strip_prefix(b"dev/");
    let device = matches!(
        facts.file_type,
        Some(FileType::CharacterDevice | FileType::BlockDevice)
    );
    if device
        && in_dev.is_some_and(|name| DEFAULT_DEVICES.contains(&name) || name.starts_with(b"pts/"))
    {
        return Some(Reason::RuntimeDevice);
    }
    let stub = match facts.file_type {
        // Some runtimes bind-mount the host's devices over empty files.
        Some(FileType::RegularFile) => {
            facts.size == 0
                && (EMPTY_STUBS.contains(&path)
                    || in_dev.is_some_and(|name| DEFAULT_DEVICES.contains(&name)))
        }
        Some(FileType::Symlink) => LINK_STUBS
            .iter()
            .any(|(link, target)| path == *link && facts.link == Some(target)),
        None => {
            EMPTY_STUBS.contains(&path)
                || LINK_STUBS.iter().any(|(link, _)| path == *link)
                || DIRECTORY_STUBS.contains(&path)
                || [&b"dev"[..], b"proc", b"sys"].contains(&first)
        }
        _ => false,
    };
    stub.then_some(Reason::MountStub)
}

/// Returns whether an entry was left in the upper by libnvidia-container: it creates empty files, mounts the driver's
/// files over them, and `ldconfig` adds links to them (libnvidia-container#50, nvidia-docker#1488).
fn is_gpu_remnant(path: &[u8], facts: &Facts<'_>) -> bool {
    let name = basename(path);
    match facts.file_type {
        Some(FileType::RegularFile) if facts.size == 0 => {
            is_driver_library(name)
                || path
                    .strip_prefix(b"usr/bin/")
                    .is_some_and(|n| n.starts_with(b"nvidia-") && !n.contains(&b'/'))
                || path
                    .strip_prefix(b"usr/")
                    .unwrap_or(path)
                    .starts_with(b"lib/firmware/nvidia/")
        }
        Some(FileType::CharacterDevice) => path.starts_with(b"dev/nvidia"),
        _ => false,
    }
}

/// Returns whether a name is that of a driver's shared library: `lib{cuda,nvidia-*,nvcuvid,nvoptix}*.so` with or
/// without a version.
fn is_driver_library(name: &[u8]) -> bool {
    let Some(stem) = name.strip_prefix(b"lib") else {
        return false;
    };
    let driver = [&b"cuda"[..], b"nvidia-", b"nvcuvid", b"nvoptix"]
        .iter()
        .any(|start| stem.starts_with(start));
    driver && (stem.ends_with(b".so") || stem.windows(4).any(|part| part == b".so."))
}

/// Returns whether a path is an archive that conda has unpacked and kept: `pkgs/NAME-VERSION-BUILD.conda` or
/// `.tar.bz2`. The two dashes distinguish it from a user's archive in a directory that happens to be called `pkgs`.
fn is_conda_archive(path: &[u8]) -> bool {
    let name = basename(path);
    let Some(stem) = name
        .strip_suffix(b".conda")
        .or_else(|| name.strip_suffix(b".tar.bz2"))
    else {
        return false;
    };
    let parent = path[..path.len() - name.len()].strip_suffix(b"/");
    parent.is_some_and(|parent| basename(parent) == b"pkgs")
        && stem.split(|&b| b == b'-').count() >= 3
}

/// The user's patterns, compiled.
#[derive(Debug)]
struct Patterns {
    texts: Vec<String>,
    /// Two globs per pattern: 2i for the entry itself, 2i + 1 for everything below it.
    set: GlobSet,
    directories_only: Vec<bool>,
}

impl Patterns {
    fn new(texts: &[String]) -> Result<Self, PatternError> {
        let mut set = GlobSetBuilder::new();
        let mut directories_only = Vec::with_capacity(texts.len());
        for text in texts {
            let bad = |why: String| PatternError {
                pattern: text.clone(),
                why,
            };
            if text.starts_with('!') {
                return Err(bad(
                    "patterns with ! are not supported; write \\! for a name that begins so"
                        .to_owned(),
                ));
            }
            let (anchored, rest) = match text.strip_prefix('/') {
                Some(rest) => (true, rest),
                None => (false, text.as_str()),
            };
            // A backslash would make the slash part of a name, which cannot contain one.
            let (directory, rest) = match rest.strip_suffix('/') {
                Some(rest) => (true, rest),
                None => (false, rest),
            };
            if rest.is_empty() {
                return Err(bad(
                    "it names nothing (or the root); write /** for everything".to_owned(),
                ));
            }
            if rest.split('/').any(|part| matches!(part, "" | "." | "..")) {
                return Err(bad(
                    "empty, . and .. components match no path; paths begin at the container's root"
                        .to_owned(),
                ));
            }
            let entry = if anchored {
                rest.to_owned()
            } else {
                format!("**/{rest}")
            };
            for glob in [entry.clone(), format!("{entry}/**")] {
                let glob = GlobBuilder::new(&glob)
                    .literal_separator(true)
                    .backslash_escape(true)
                    .build();
                set.add(glob.map_err(|e| bad(e.kind().to_string()))?);
            }
            directories_only.push(directory);
        }
        let set = set.build().map_err(|e| PatternError {
            pattern: texts.join(" "),
            why: e.to_string(),
        })?;
        Ok(Self {
            texts: texts.to_vec(),
            set,
            directories_only,
        })
    }

    /// Returns the first pattern that matches.
    fn matching(&self, path: &[u8], directory: bool) -> Option<&str> {
        let candidate = Candidate::new(OsStr::from_bytes(path));
        let matches = self.set.matches_candidate(&candidate);
        let applies = |glob: &usize| glob % 2 == 1 || directory || !self.directories_only[glob / 2];
        matches
            .into_iter()
            .filter(applies)
            .map(|glob| self.texts[glob / 2].as_str())
            .next()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(file_type: FileType) -> Facts<'static> {
        Facts {
            file_type: Some(file_type),
            size: 0,
            link: None,
            in_base: false,
        }
    }

    fn file(size: u64) -> Facts<'static> {
        Facts {
            size,
            ..facts(FileType::RegularFile)
        }
    }

    fn link(target: &str) -> Facts<'_> {
        Facts {
            link: Some(target.as_bytes()),
            ..facts(FileType::Symlink)
        }
    }

    const DIR: Facts<'static> = Facts {
        file_type: Some(FileType::Directory),
        size: 0,
        link: None,
        in_base: false,
    };
    const BASE_DIR: Facts<'static> = Facts {
        in_base: true,
        ..DIR
    };
    const WHITEOUT: Facts<'static> = Facts {
        file_type: None,
        in_base: true,
        ..DIR
    };

    fn rules<'a>(mounts: &'a [Vec<u8>], user: &'a [String]) -> Rules<'a> {
        Rules {
            mounts,
            saved: &[],
            user,
            credentials: true,
            caches: true,
            gpu: true,
            of_image: false,
        }
    }

    #[test]
    fn directories_above_a_mount_are_placeholders_unless_it_is_saved() {
        let mounts = ["/home/w/data", "/home/w/cache"].map(|m| m.as_bytes().to_vec());
        let none = Exclusions::new(rules(&mounts, &[])).unwrap();
        let one = Exclusions::new(Rules {
            saved: &mounts[..1],
            ..rules(&mounts, &[])
        })
        .unwrap();
        for above in [&b"home"[..], b"home/w"] {
            assert!(none.mount_ancestor(above));
            assert!(!one.mount_ancestor(above));
        }
        // The mount itself is not in its parent's layer.
        assert_eq!(one.check(b"home/w/data", &DIR), Some(Reason::Mount));
    }

    fn plain() -> Exclusions {
        Exclusions::new(rules(&[], &[])).unwrap()
    }

    #[track_caller]
    fn table(exclusions: &Exclusions, cases: &[(&str, Facts<'_>, Option<Reason>)]) {
        for (path, facts, expected) in cases {
            assert_eq!(
                exclusions.check(path.as_bytes(), facts),
                *expected,
                "{path} {facts:?}"
            );
        }
    }

    #[test]
    fn nothing_at_or_below_a_mount() {
        let mounts = [
            "/data",
            "/etc/hosts",
            "/a//b/./c/",
            "/x/../y",
            "/",
            "/home/u/vol",
        ]
        .map(|m| m.as_bytes().to_vec());
        let exclusions = Exclusions::new(rules(&mounts, &[])).unwrap();
        table(
            &exclusions,
            &[
                ("data", DIR, Some(Reason::Mount)),
                ("data/x/y", file(1), Some(Reason::Mount)),
                ("data2", file(1), None),
                ("dat", file(1), None),
                ("other/data", file(1), None),
                // A whiteout there would delete the base's entry (buildah#2816).
                ("data", WHITEOUT, Some(Reason::Mount)),
                ("data/deleted", WHITEOUT, Some(Reason::Mount)),
                ("etc/hosts", file(100), Some(Reason::Mount)),
                ("a/b/c", DIR, Some(Reason::Mount)),
                ("a/b", DIR, None),
                ("y/z", file(1), Some(Reason::Mount)),
                ("x", DIR, None),
                ("", DIR, None),
                ("", BASE_DIR, None),
            ],
        );
        let ancestors = [
            ("a", true),
            ("a/b", true),
            ("a/b/c", false),
            ("home", true),
            ("home/u", true),
            ("home/v", false),
            ("etc", true),
            ("dev/shm", true),
            ("proc", true),
            ("", false),
            ("usr", false),
        ];
        for (path, expected) in ancestors {
            assert_eq!(
                exclusions.mount_ancestor(path.as_bytes()),
                expected,
                "{path}"
            );
        }
    }

    #[test]
    fn runtime_stubs_go_and_real_files_stay() {
        table(
            &plain(),
            &[
                // As observed in the uppers of CRI-O 1.36 and containerd 2.2.
                ("etc/hosts", file(0), Some(Reason::MountStub)),
                ("etc/mtab", link("/proc/mounts"), Some(Reason::MountStub)),
                ("run/.containerenv", file(0), Some(Reason::MountStub)),
                ("etc/motd", WHITEOUT, None),
                ("etc/profile", file(771), None),
                ("etc", DIR, None),
                ("run", DIR, None),
                ("etc/hostname", file(0), Some(Reason::MountStub)),
                ("etc/resolv.conf", file(0), Some(Reason::MountStub)),
                (".dockerenv", file(0), Some(Reason::MountStub)),
                ("etc/hosts", WHITEOUT, Some(Reason::MountStub)),
                ("etc/mtab", WHITEOUT, Some(Reason::MountStub)),
                ("proc", WHITEOUT, Some(Reason::MountStub)),
                ("dev/x", WHITEOUT, Some(Reason::MountStub)),
                ("run/secrets", WHITEOUT, Some(Reason::MountStub)),
                // Files of the user are never dropped silently.
                ("etc/hosts", file(1), None),
                (
                    "etc/resolv.conf",
                    link("../run/systemd/resolve/stub-resolv.conf"),
                    None,
                ),
                ("etc/mtab", link("../proc/self/mounts"), None),
                ("etc/mtab", file(10), None),
                ("srv/etc/hosts", file(0), None),
                (".dockerenv", file(3), None),
                ("srv/.dockerenv", file(0), None),
                ("etc/hosts", DIR, None),
                ("dev/notes", file(5), None),
                ("run/app.pid", WHITEOUT, None),
                // Devices.
                (
                    "dev/null",
                    facts(FileType::CharacterDevice),
                    Some(Reason::RuntimeDevice),
                ),
                (
                    "dev/pts/0",
                    facts(FileType::CharacterDevice),
                    Some(Reason::RuntimeDevice),
                ),
                ("dev/null", file(0), Some(Reason::MountStub)),
                ("dev/null", file(9), None),
                (
                    "dev/stdout",
                    link("/proc/self/fd/1"),
                    Some(Reason::MountStub),
                ),
                ("dev/stdout", link("/var/log/out"), None),
                ("dev/sda", facts(FileType::BlockDevice), None),
                ("srv/dev/null", facts(FileType::CharacterDevice), None),
                ("dev/console", file(0), Some(Reason::MountStub)),
                ("dev/shm", DIR, None),
            ],
        );
    }

    #[test]
    fn gpu_remnants_are_empty_or_lead_nowhere() {
        let lib = "usr/lib/x86_64-linux-gnu/";
        let cases = [
            ("libcuda.so.535.129.03", file(0), true),
            ("libcuda.so.535.129.03", file(1), false),
            ("libnvidia-ml.so.1", file(0), true),
            ("libnvcuvid.so.1", file(0), true),
            ("libnvoptix.so.535", file(0), true),
            // Belongs to the toolkit, which the user installed.
            ("libcudart.so.12", file(700_000), false),
            ("libcudart.so", link("libcudart.so.12"), false),
            ("libnvidia.txt", file(0), false),
            ("libm.so.6", file(0), false),
            ("libcuda.so.1", WHITEOUT, false),
        ];
        for (name, facts, expected) in cases {
            let path = format!("{lib}{name}");
            assert_eq!(
                plain().check(path.as_bytes(), &facts),
                expected.then_some(Reason::Gpu),
                "{path} {facts:?}"
            );
        }
        table(
            &plain(),
            &[
                ("usr/bin/nvidia-smi", file(0), Some(Reason::Gpu)),
                ("usr/bin/nvidia-smi", file(9), None),
                ("usr/local/bin/nvidia-smi", file(0), None),
                (
                    "lib/firmware/nvidia/535.129.03/gsp_ga10x.bin",
                    file(0),
                    Some(Reason::Gpu),
                ),
                (
                    "usr/lib/firmware/nvidia/535/gsp_tu10x.bin",
                    file(0),
                    Some(Reason::Gpu),
                ),
                (
                    "dev/nvidia0",
                    facts(FileType::CharacterDevice),
                    Some(Reason::Gpu),
                ),
            ],
        );
        assert!(plain().may_be_gpu_link(b"usr/lib/libcuda.so.1"));
        assert!(plain().may_be_gpu_link(b"usr/lib64/libnvidia-ml.so"));
        assert!(!plain().may_be_gpu_link(b"usr/lib/libc.so.6"));
        let off = Exclusions::new(Rules::default()).unwrap();
        assert_eq!(off.check(b"usr/lib/libcuda.so.1", &file(0)), None);
        assert!(!off.may_be_gpu_link(b"usr/lib/libcuda.so.1"));
    }

    #[test]
    fn credentials_in_any_home() {
        let out = || Some(Reason::Credential);
        table(
            &plain(),
            &[
                ("root/.ssh", DIR, out()),
                ("home/alice/.ssh/id_ed25519", file(9), out()),
                (".ssh/config", file(9), out()),
                ("srv/deep/er/.ssh", link("/data/ssh"), out()),
                ("home/alice/.aws/credentials", file(9), out()),
                ("home/alice/.kube/config", file(9), out()),
                ("home/alice/.config/gcloud/x.db", file(9), out()),
                ("home/alice/.config/other", file(9), None),
                ("home/alice/.config", DIR, None),
                ("home/alice/.netrc", file(9), out()),
                ("home/alice/.git-credentials", file(9), out()),
                ("home/alice/.docker/config.json", file(9), out()),
                ("home/alice/.docker/daemon.json", file(9), None),
                ("home/alice/x.docker/config.json", file(9), None),
                ("app/config.json", file(9), None),
                ("home/alice/.pypirc", file(9), out()),
                ("home/alice/.cache/huggingface/token", file(9), out()),
                ("home/alice/.cache/huggingface/hub/model.bin", file(9), None),
                ("home/alice/.Renviron", file(9), out()),
                ("root/.bash_history", file(9), out()),
                ("root/.zsh_history", file(9), out()),
                ("root/.python_history", file(9), out()),
                ("work/project/.Rhistory", file(9), out()),
                (
                    "root/.ipython/profile_default/history.sqlite",
                    file(9),
                    out(),
                ),
                (
                    "root/.local/share/jupyter/runtime/kernel-1.json",
                    file(9),
                    out(),
                ),
                (
                    "root/.local/share/jupyter/kernels/r/kernel.json",
                    file(9),
                    None,
                ),
                ("root/.local/share/rstudio/sessions", DIR, out()),
                // As named in the documentation of the programs.
                ("root/.gnupg/private-keys-v1.d/x.key", file(9), out()),
                ("root/.azure/msal_token_cache.json", file(9), out()),
                ("srv/app/.npmrc", file(9), out()),
                ("root/.pgpass", file(9), out()),
                ("root/.kaggle/kaggle.json", file(9), out()),
                ("root/.config/gh/hosts.yml", file(9), out()),
                ("root/.config/rclone/rclone.conf", file(9), out()),
                ("root/.huggingface/token", file(9), out()),
                ("root/.cargo/credentials.toml", file(9), out()),
                ("root/.cargo/config.toml", file(9), None),
                ("root/.irods/.irodsA", file(9), out()),
                ("root/.irods/irods_environment.json", file(9), None),
                ("root/.psql_history", file(9), out()),
                ("srv/app/.env", file(9), None),
                ("root/.config/pip/pip.conf", file(9), None),
                // Case is significant, and components match as a whole; a directory is not a file.
                ("root/.SSH/id", file(9), None),
                ("root/x.ssh/id", file(9), None),
                ("root/.sshd", file(9), None),
                ("etc/ssh/ssh_config", file(9), None),
                ("root/.netrc", DIR, None),
                // Deletions stay deletions, also inside a directory of the base.
                ("root/.ssh", WHITEOUT, None),
                ("root/.ssh", BASE_DIR, None),
                ("root/.ssh/known_hosts", WHITEOUT, None),
                ("root/.ssh/known_hosts", file(9), out()),
                ("root/.netrc", WHITEOUT, None),
            ],
        );
        let kept = Exclusions::new(Rules {
            credentials: false,
            ..rules(&[], &[])
        })
        .unwrap();
        assert_eq!(kept.check(b"root/.ssh/id", &file(9)), None);
        assert_eq!(
            kept.check(b"root/.cache/pip/x", &file(9)),
            Some(Reason::Cache)
        );
    }

    #[test]
    fn caches_and_temporary_files() {
        let out = || Some(Reason::Cache);
        table(
            &plain(),
            &[
                ("root/.cache/pip", DIR, out()),
                ("root/.cache/pip/http/a", file(9), out()),
                ("root/.cache/uv/x", file(9), out()),
                ("root/.cache", DIR, None),
                ("root/.cache/other", file(9), None),
                ("root/cache/pip", file(9), None),
                ("tmp", DIR, None),
                ("tmp", BASE_DIR, None),
                ("tmp/x", file(9), out()),
                ("tmp/dir", DIR, out()),
                ("tmp/dir", BASE_DIR, None),
                ("tmp/dir/new", file(9), out()),
                ("tmp/gone", WHITEOUT, None),
                ("tmp", WHITEOUT, None),
                ("tmp", link("var/tmp"), None),
                ("var/tmp", DIR, None),
                ("var/tmp/x", facts(FileType::Fifo), out()),
                ("srv/tmp/x", file(9), None),
                ("var/cache/apt/archives", DIR, None),
                ("var/cache/apt/archives/bash.deb", file(9), out()),
                ("var/cache/apt/pkgcache.bin", file(9), None),
                (
                    "opt/conda/pkgs/numpy-1.26.4-py311h64a7726_0.conda",
                    file(9),
                    out(),
                ),
                ("opt/conda/pkgs/zlib-1.3-h1.tar.bz2", file(9), out()),
                (
                    "opt/conda/pkgs/numpy-1.26.4-py311h64a7726_0/info/index.json",
                    file(9),
                    None,
                ),
                ("root/numpy-1.26.4-py311h64a7726_0.conda", file(9), None),
                ("root/pkgs/mydata.tar.bz2", file(9), None),
                ("pkgs", file(9), None),
                ("a-b-c.conda", file(9), None),
            ],
        );
        let kept = Exclusions::new(Rules {
            caches: false,
            ..rules(&[], &[])
        })
        .unwrap();
        for path in ["tmp/x", "root/.cache/pip/x", "opt/pkgs/a-1-0.conda"] {
            assert_eq!(kept.check(path.as_bytes(), &file(9)), None, "{path}");
        }
    }

    #[test]
    fn user_patterns_are_as_in_gitignore() {
        // Columns: pattern, path, path is a directory, matches.
        let cases: &[(&str, &str, bool, bool)] = &[
            ("*.log", "a.log", false, true),
            ("*.log", "deep/er/a.log", false, true),
            ("*.log", "a.log/inside", false, true),
            ("*.log", "a.logs", false, false),
            ("/data", "data", true, true),
            ("/data", "data/x/y", false, true),
            ("/data", "srv/data", true, false),
            ("/data", "database", false, false),
            ("/data/*.bin", "data/a.bin", false, true),
            ("/data/*.bin", "data/sub/a.bin", false, false),
            ("/data/**/*.bin", "data/sub/deep/a.bin", false, true),
            ("/data/**", "data", true, false),
            ("/data/**", "data/x", false, true),
            ("build/out", "x/build/out/y", false, true),
            ("build/", "x/build", true, true),
            ("build/", "x/build", false, false),
            ("build/", "x/build/y", false, true),
            ("/**", "anything/at/all", false, true),
            ("file?", "file1", false, true),
            ("file?", "file/x", false, false),
            ("[ab].txt", "b.txt", false, true),
            ("*.{o,a}", "lib/x.a", false, true),
            ("\\*", "*", false, true),
            ("\\*", "x", false, false),
            ("\\!x", "!x", false, true),
            ("*", ".hidden", false, true),
            ("ü*", "a/über", false, true),
        ];
        for (pattern, path, directory, expected) in cases {
            let user = [(*pattern).to_owned()];
            let exclusions = Exclusions::new(Rules {
                user: &user,
                ..Rules::default()
            })
            .unwrap();
            let facts = if *directory { BASE_DIR } else { file(1) };
            let expected = expected.then(|| Reason::Pattern((*pattern).to_owned()));
            assert_eq!(
                exclusions.check(path.as_bytes(), &facts),
                expected,
                "{pattern} {path}"
            );
        }
    }

    #[test]
    fn user_patterns_match_bytes_and_deletions_and_name_the_first() {
        let user = ["/nothing", "*.bin", "/raw"].map(str::to_owned);
        let exclusions = Exclusions::new(Rules {
            user: &user,
            ..Rules::default()
        })
        .unwrap();
        let bin = || Some(Reason::Pattern("*.bin".to_owned()));
        assert_eq!(exclusions.check(b"d/\xff\xfe\n.bin", &file(1)), bin());
        assert_eq!(exclusions.check(b"d\xff/x.bin/\x80", &file(1)), bin());
        assert_eq!(exclusions.check(b"raw/a.bin", &file(1)), bin());
        assert_eq!(
            exclusions.check(b"raw", &WHITEOUT),
            Some(Reason::Pattern("/raw".to_owned()))
        );
        assert_eq!(exclusions.check(b"\xff", &file(1)), None);
    }

    #[test]
    fn bad_patterns_are_refused_by_name() {
        for bad in [
            "", "/", "//", "!x", "a//b", "./x", "/../x", "[a", "{a", "a\\",
        ] {
            let user = ["ok".to_owned(), bad.to_owned()];
            let error = Exclusions::new(Rules {
                user: &user,
                ..Rules::default()
            })
            .unwrap_err();
            assert_eq!(error.pattern, bad, "{error}");
        }
    }

    #[test]
    fn reasons_are_written_in_snake_case() {
        let json =
            serde_json::to_string(&[Reason::MountStub, Reason::Pattern("*.o".to_owned())]).unwrap();
        assert_eq!(
            json,
            r#"[{"reason":"mount_stub"},{"reason":"pattern","pattern":"*.o"}]"#
        );
    }
}
