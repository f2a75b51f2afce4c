//! Checks the files and directories of the service: who can read the secrets, where state is kept, and how much space
//! is free.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use rustix::process::{Resource, getrlimit};

use super::{Finding, Options};
use crate::common::escape;
use crate::service::setup;

/// Open files that one save may need for uploads, connections and clones. The agent and a manager need far fewer.
const DESCRIPTORS: u64 = 4096;
/// Bytes of free space below which the finding is a failure. The state kept for a session takes megabytes.
const MIN_FREE_SPACE: u64 = 64 << 20;
const LOW_FREE_SPACE: u64 = 1 << 30;

fn shown(path: &Path) -> String {
    escape::path(path.as_os_str().as_encoded_bytes())
}

/// Mode and owner of a file or directory.
#[derive(Clone, Copy)]
struct Owned {
    mode: u32,
    uid: u32,
    gid: u32,
}

fn owned(path: &Path) -> std::io::Result<Owned> {
    let metadata = fs::metadata(path)?;
    Ok(Owned {
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
    })
}

pub(super) fn limits(_options: &Options) -> Vec<Finding> {
    let limit = getrlimit(Resource::Nofile);
    vec![judge_limit(limit.maximum)]
}

fn judge_limit(most: Option<u64>) -> Finding {
    match most {
        Some(most) if most < DESCRIPTORS => Finding::warning(
            "limits",
            format!("{most} open files at most"),
            "raise the hard limit (LimitNOFILE=65536, ulimit -Hn): saves hold changed files open while they deliver them",
        ),
        Some(most) => Finding::ok("limits", format!("{most} open files")),
        None => Finding::ok("limits", "open files without a limit"),
    }
}

pub(super) fn secrets(options: &Options) -> Vec<Finding> {
    let own = rustix::process::geteuid().as_raw();
    // A group of its own, and that of the managers' user, to which 'setup' gives the files that both services read.
    let own_groups = [
        Some(rustix::process::getegid().as_raw()),
        setup::managers_group(),
    ];
    let mut found: Vec<Finding> = Vec::new();
    for secret in &options.secrets {
        let name = format!("--{} {}", secret.setting, shown(&secret.path));
        // Other users cannot open a file that is passed as a descriptor.
        if secret.path.starts_with("/dev/fd") || secret.path.starts_with("/proc/self/fd") {
            continue;
        }
        found.push(match owned(&secret.path) {
            Err(error) => Finding::failed(
                "secrets",
                format!("{name}: {error}"),
                "make it, and let the user that this runs as read it",
            ),
            Ok(file) => {
                let parent = secret.path.parent().and_then(|dir| owned(dir).ok());
                let readable = fs::File::open(&secret.path).is_ok();
                judge_secret(&name, file, parent, readable, (own, own_groups))
            }
        });
    }
    if found.is_empty() {
        found.push(Finding::skipped("secrets", "no file with a secret is set"));
    }
    found
}

fn judge_secret(
    name: &str,
    file: Owned,
    parent: Option<Owned>,
    readable: bool,
    (own, own_groups): (u32, [Option<u32>; 2]),
) -> Finding {
    let found = format!("{name}: mode {:04o}, user {}", file.mode, file.uid);
    let private = "chmod 600 it, and give it to the user that this runs as; whoever has read it has the secret: make a \
                   new one";
    if file.mode & 0o007 != 0 {
        return Finding::failed("secrets", found, private);
    }
    if file.mode & 0o020 != 0 {
        return Finding::failed("secrets", found, "chmod g-w it: its group can replace it");
    }
    // In a sticky directory other users can add files but cannot replace existing ones.
    if parent.is_some_and(|dir| dir.mode & 0o002 != 0 && dir.mode & 0o1000 == 0) {
        return Finding::failed(
            "secrets",
            format!("{found}, in a directory that everybody writes to"),
            "keep it in a directory of root's, e.g. /etc/upperdeck",
        );
    }
    if !readable {
        return Finding::failed(
            "secrets",
            format!("{found}, cannot be read"),
            "let the user that this runs as read it",
        );
    }
    if file.uid != own && file.uid != 0 {
        return Finding::warning(
            "secrets",
            format!("{found}, which is neither root nor the user that this runs as"),
            "its owner can read and replace it: give it to root",
        );
    }
    if file.mode & 0o040 != 0 && file.gid != 0 && !own_groups.contains(&Some(file.gid)) {
        return Finding::warning(
            "secrets",
            format!("{found}, readable by group {}", file.gid),
            "chmod 600 it where that group has other members than this service",
        );
    }
    Finding::ok("secrets", found)
}

pub(super) fn directories(options: &Options) -> Vec<Finding> {
    let mut found = Vec::new();
    for (setting, path) in &options.directories {
        let name = format!("--{setting} {}", shown(path));
        let Some((there, made)) = nearest(path) else {
            found.push(Finding::failed(
                "directories",
                format!("{name}: no part of it is there"),
                "make it",
            ));
            continue;
        };
        let writable = rustix::fs::access(
            there,
            rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK,
        );
        let room = rustix::fs::statvfs(there)
            .map(|stat| stat.f_bavail.saturating_mul(stat.f_frsize))
            .ok();
        let mode = owned(there).ok().filter(|_| made);
        found.extend(judge_directory(&name, mode, writable.is_ok(), room));
    }
    if found.is_empty() {
        found.push(Finding::skipped("directories", "none are set"));
    }
    found
}

/// Returns the nearest existing directory at or above `path`, and whether it is `path` itself.
fn nearest(path: &Path) -> Option<(&Path, bool)> {
    let there = path.ancestors().find(|path| path.is_dir())?;
    Some((there, there == path))
}

fn judge_directory(
    name: &str,
    there: Option<Owned>,
    writable: bool,
    room: Option<u64>,
) -> Vec<Finding> {
    let mut found = Vec::new();
    found.push(match there {
        _ if !writable => Finding::failed(
            "directories",
            format!("{name}: cannot be written to"),
            "make it, for the user that this runs as (StateDirectory= in a unit)",
        ),
        None => Finding::ok("directories", format!("{name}: will be made")),
        Some(dir) if dir.mode & 0o022 != 0 => Finding::failed(
            "directories",
            format!("{name}: mode {:04o}: others write to it", dir.mode),
            "chmod 700 it: what is kept there decides what is saved next",
        ),
        Some(dir) if dir.mode & 0o055 != 0 => Finding::warning(
            "directories",
            format!(
                "{name}: mode {:04o}: others see what is kept of sessions",
                dir.mode
            ),
            "chmod 700 it (StateDirectoryMode=0700 in a unit)",
        ),
        Some(dir) => Finding::ok("directories", format!("{name}: mode {:04o}", dir.mode)),
    });
    let advice = "make room: what is kept there makes the next save small";
    match room {
        Some(bytes) if bytes < MIN_FREE_SPACE => found.push(Finding::failed(
            "space",
            format!("{name}: {} MB are free", bytes / 1_000_000),
            advice,
        )),
        Some(bytes) if bytes < LOW_FREE_SPACE => found.push(Finding::warning(
            "space",
            format!("{name}: {} MB are free", bytes / 1_000_000),
            advice,
        )),
        Some(bytes) => found.push(Finding::ok(
            "space",
            format!("{name}: {:.1} GB are free", bytes as f64 / 1e9),
        )),
        None => found.push(Finding::skipped("space", format!("{name}: not told"))),
    }
    found
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    fn file(mode: u32, uid: u32) -> Owned {
        Owned {
            mode,
            uid,
            gid: 100,
        }
    }

    #[test]
    fn secrets_that_others_can_read_or_replace_are_failures() {
        let root = Some(file(0o755, 0));
        let anybody = Some(file(0o777, 0));
        let sticky = Some(file(0o1777, 0));
        for (mode, uid, parent, readable, expected) in [
            (0o600, 0, root, true, State::Ok),
            (0o400, 1000, root, true, State::Ok),
            (0o600, 1001, root, true, State::Warning),
            (0o640, 0, root, true, State::Warning),
            (0o644, 0, root, true, State::Failed),
            (0o660, 0, root, true, State::Failed),
            (0o600, 0, anybody, true, State::Failed),
            (0o600, 0, sticky, true, State::Ok),
            (0o600, 0, root, false, State::Failed),
        ] {
            let own = (1000, [Some(1000), None]);
            let judged = judge_secret("key", file(mode, uid), parent, readable, own);
            assert_eq!(judged.state, expected, "{mode:o} {uid} {readable}");
        }
        for own_groups in [[Some(100), None], [Some(0), Some(100)]] {
            let judged = judge_secret("key", file(0o640, 0), root, true, (1000, own_groups));
            assert_eq!(judged.state, State::Ok);
        }
    }

    #[test]
    fn directories_are_private_writable_and_have_room() {
        use State::{Failed, Ok, Skipped, Warning};
        let states = |there, writable, room| -> Vec<State> {
            judge_directory("state", there, writable, room)
                .iter()
                .map(|f| f.state)
                .collect()
        };
        let much = Some(1 << 40);
        assert_eq!(states(Some(file(0o700, 0)), true, much), [Ok, Ok]);
        assert_eq!(states(Some(file(0o755, 0)), true, much), [Warning, Ok]);
        assert_eq!(states(Some(file(0o777, 0)), true, much), [Failed, Ok]);
        assert_eq!(states(None, true, much), [Ok, Ok]);
        assert_eq!(states(None, false, much), [Failed, Ok]);
        assert_eq!(states(None, true, Some(1)), [Ok, Failed]);
        assert_eq!(states(None, true, Some(MIN_FREE_SPACE)), [Ok, Warning]);
        assert_eq!(states(None, true, None), [Ok, Skipped]);
    }

    #[test]
    fn few_descriptors_are_a_warning() {
        assert_eq!(judge_limit(Some(1024)).state, State::Warning);
        assert_eq!(judge_limit(Some(1 << 20)).state, State::Ok);
        assert_eq!(judge_limit(None).state, State::Ok);
    }
}
