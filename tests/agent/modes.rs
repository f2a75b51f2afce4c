//! Files that a save, an agent and `up` leave on disk are accessible only to their owner, whatever the umask is, unless
//! another mode was requested.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use crate::node::{Node, UPPERDECK, wait};

/// Starts the program with a umask. `exec` keeps the PID, so the test can signal the process.
fn upperdeck(umask: &str, args: &[String]) -> Command {
    let mut command = Command::new("sh");
    command
        .args([
            "-c",
            "umask \"$1\"; shift; exec \"$@\"",
            "sh",
            umask,
            UPPERDECK,
        ])
        .args(args)
        .stdin(Stdio::null());
    command
}

/// Fails unless every file and directory at and below `path` has the expected mode.
fn all_are(path: &Path, file: u32, directory: u32) -> Result<()> {
    let mut found = Vec::new();
    for entry in walkdir::WalkDir::new(path) {
        let entry = entry?;
        let there = entry.metadata()?;
        let expected = if there.is_dir() { directory } else { file };
        if there.mode() & 0o7777 != expected {
            let path = entry.path().display();
            found.push(format!("{path} {:04o}", there.mode() & 0o7777));
        }
    }
    ensure!(found.is_empty(), "{found:#?}");
    Ok(())
}

/// Saves into a layout, an archive and both report files below `out`.
fn save(node: &Node, out: &Path, umask: &str, more: &[&str]) -> Result<()> {
    let of = |name: &str| out.join(name).display().to_string();
    for destination in [
        format!("oci:{}:x", of("deep/layout")),
        format!("oci-archive:{}:x", of("archive.tar")),
    ] {
        let mut args = vec![
            "commit".to_owned(),
            "--progress=none".to_owned(),
            format!("--state-dir={}", of("state")),
            format!("--metadata-file={}", of("metadata.json")),
            format!("--digestfile={}", of("digest")),
            format!("--base=oci:{}:base", node.path("base").display()),
        ];
        args.extend(more.iter().map(|&flag| flag.to_owned()));
        args.extend([format!("pid:{}", node.pid), destination]);
        let done = upperdeck(umask, &args).output()?;
        let told = String::from_utf8_lossy(&done.stderr);
        ensure!(done.status.success(), "{args:?}: {told}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_commit_makes_is_its_owners_or_as_was_asked_for() -> Result<()> {
    let Some(node) = Node::new().await? else {
        return Ok(());
    };
    for umask in ["000", "077", "022"] {
        let out = node.path(&format!("out-{umask}"));
        fs::create_dir(&out)?;
        fs::set_permissions(&out, fs::Permissions::from_mode(0o700))?;
        save(&node, &out, umask, &[])?;
        all_are(&out, 0o600, 0o700)?;
        // Again, as others in the same layout.
        save(&node, &out, umask, &["--full"])?;
        all_are(&out, 0o600, 0o700)?;

        let out = node.path(&format!("wide-{umask}"));
        fs::create_dir(&out)?;
        save(&node, &out, umask, &["--output-mode=0644"])?;
        all_are(&out.join("deep"), 0o644, 0o755)?;
        for name in ["archive.tar", "metadata.json", "digest"] {
            all_are(&out.join(name), 0o644, 0)?;
        }
        all_are(&out.join("state"), 0o600, 0o700)?;
        // What is added later is as the layout is; an archive is a new one.
        node.work("home/more", umask.as_bytes())?;
        save(&node, &out, umask, &["--full"])?;
        all_are(&out.join("deep"), 0o644, 0o755)?;
        all_are(&out.join("archive.tar"), 0o600, 0)?;
        all_are(&out.join("digest"), 0o644, 0)?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_is_its_owners_or_as_was_asked_for() -> Result<()> {
    let dir = tempfile::tempdir()?;
    fs::create_dir(dir.path().join("upper"))?;
    fs::write(dir.path().join("upper/file"), "x")?;
    for umask in ["000", "077"] {
        for (flag, expected) in [(None, 0o600), (Some("--output-mode=0664"), 0o664)] {
            let to = dir.path().join("layer.tar.gz");
            let mut args = vec![
                "layer".to_owned(),
                format!("--upper={}", dir.path().join("upper").display()),
                format!("--output={}", to.display()),
            ];
            args.extend(flag.map(str::to_owned));
            let done = upperdeck(umask, &args).output()?;
            ensure!(done.status.success(), "{done:?}");
            all_are(&to, expected, 0)?;
        }
    }
    Ok(())
}

/// Runs `up` until it can be reached, then ends it.
async fn up(state: &Path, umask: &str, more: &[String]) -> Result<String> {
    let mut args: Vec<String> = ["up", "--listen=127.0.0.1:0", "--drain=1s"]
        .map(str::to_owned)
        .into();
    args.push(format!("--state-dir={}", state.display()));
    args.extend_from_slice(more);
    let log = state.with_extension("log");
    let mut child = upperdeck(umask, &args)
        .stdout(Stdio::null())
        .stderr(fs::File::create(&log)?)
        .spawn()?;
    let url = state.join("up.url");
    let ended = wait("the service", || {
        let ended = child.try_wait().ok().flatten();
        // The last that an agent makes, or tightens.
        let last = fs::metadata(state.join("agent/outcomes"));
        let tight = last.is_ok_and(|there| there.mode().trailing_zeros() >= 6);
        (ended.is_some() || url.exists() && tight).then_some(ended)
    })
    .await?;
    let checked = if ended.is_some() {
        Ok(())
    } else {
        let checked = all_are(state, 0o600, 0o700);
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(i32::try_from(child.id())?),
            nix::sys::signal::Signal::SIGTERM,
        )?;
        child.wait()?;
        checked
    };
    checked?;
    Ok(fs::read_to_string(&log)?)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_up_keeps_is_its_owners_and_what_was_looser_is_tightened() -> Result<()> {
    let Some(node) = Node::new().await? else {
        return Ok(());
    };
    for umask in ["000", "077"] {
        let state = node.path(&format!("up-{umask}"));
        up(&state, umask, &[]).await?;
        ensure!(state.join("manager.db").exists() && state.join("images").is_dir());
        // As an earlier version left it.
        for dir in ["", "images", "agent", "agent/outcomes"] {
            fs::set_permissions(state.join(dir), fs::Permissions::from_mode(0o755))?;
        }
        fs::create_dir(state.join("images/alice"))?;
        fs::set_permissions(
            state.join("images/alice"),
            fs::Permissions::from_mode(0o700),
        )?;
        let told = up(&state, umask, &[]).await?;
        ensure!(told.contains("0700"), "it is said: {told}");
    }
    // A directory that was meant for something else.
    let state = node.path("up-000");
    let store = node.path("shared");
    fs::create_dir(&store)?;
    fs::set_permissions(&store, fs::Permissions::from_mode(0o755))?;
    fs::write(store.join("other"), "")?;
    let told = up(&state, "022", &[format!("--store={}", store.display())]).await?;
    ensure!(told.contains("what upperdeck did not make"), "{told}");
    let mode = fs::metadata(&store).context("store")?.mode() & 0o777;
    assert_eq!(mode, 0o755);
    Ok(())
}
