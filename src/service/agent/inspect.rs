//! Looks into a session with `upperdeck inspect`, in a child process, because the session's tree is untrusted and large.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncReadExt as _;
use tokio::process::Command;

use super::child::{REAP_TIMEOUT, background_flags, memory_flags, release_memory, roots_flags};
use super::options::Options;
use super::stuck::StuckProcesses;
use crate::service::job::JobId;

/// Time limit of an inspection. It takes as long as a walk of the session's tree on idle CPU time.
const INSPECT_TIMEOUT: Duration = Duration::from_secs(300);
/// Maximum size in bytes of the output of `inspect`; a larger output is not genuine.
const MAX_INSPECT_OUTPUT: u64 = 8 << 20;
/// The flags of `commit` that change what its saves contain or build on, which `inspect` has, too.
const LOOK_FLAGS: [&str; 10] = [
    "--max-layers",
    "--exclude",
    "--include-credentials",
    "--include-caches",
    "--timestamp",
    "--max-entries",
    "--max-depth",
    "--max-size",
    "--max-holes",
    "--max-memory",
];

/// Returns those of the administrator's flags for `commit` without which `inspect` would look for another save.
fn look_flags(flags: &[String]) -> impl Iterator<Item = &String> {
    flags.iter().filter(|flag| {
        let name = flag.split('=').next().unwrap_or_default();
        LOOK_FLAGS.contains(&name)
    })
}

/// Returns the JSON output of `inspect` for a session; `None` if it fails or exceeds its time limit.
pub(super) async fn inspect(
    options: &Options,
    stuck: &StuckProcesses,
    session: &str,
) -> Option<Vec<u8>> {
    let mut command = Command::new(&options.program);
    let mut flags = roots_flags(&options.roots);
    flags.extend(["inspect", "--format=json", "--packages"].map(Into::into));
    flags.extend(look_flags(&options.flags).map(Into::into));
    flags.extend(background_flags(options));
    let group = format!("look-{}", JobId::new());
    flags.extend(memory_flags(options, &group));
    let state_dir = options.state_dir.as_deref().unwrap_or(Path::new(""));
    command
        .args(flags)
        .args(["--", session])
        .env_clear()
        .env("UPPERDECK_STATE_DIR", state_dir)
        .current_dir("/")
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    let mut child = command.spawn().ok()?;
    let said = child.stdout.take()?;
    let child = &mut child;
    let read = async {
        let mut json = Vec::new();
        said.take(MAX_INSPECT_OUTPUT)
            .read_to_end(&mut json)
            .await
            .ok()?;
        let status = child.wait().await.ok()?;
        status.success().then_some(json)
    };
    let told = tokio::time::timeout(INSPECT_TIMEOUT, read).await;
    if told.is_err()
        && let Some(pid) = child.id()
    {
        child.start_kill().ok();
        if tokio::time::timeout(REAP_TIMEOUT, child.wait())
            .await
            .is_err()
        {
            stuck.add(session, pid);
        }
    }
    if release_memory(options, group) {
        tracing::warn!(
            session.id = session,
            "looking into a session took more memory than it may"
        );
    }
    told.ok().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_look_has_the_flags_that_decide_what_a_save_builds_on() {
        let flags = [
            "--exclude=/x",
            "--include-caches",
            "--max-layers=30",
            "--author=me",
            "--pause=full",
        ];
        let flags = flags.map(str::to_owned);
        let taken: Vec<&str> = look_flags(&flags).map(String::as_str).collect();
        assert_eq!(taken, flags[..3]);
    }
}
