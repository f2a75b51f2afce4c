//! A PostgreSQL server for the test program, which ends with it. The next test program removes its directory.
#![allow(dead_code, reason = "each test program uses its part")]

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

static SERVER: OnceLock<Result<PathBuf, String>> = OnceLock::new();
static NEXT: AtomicU32 = AtomicU32::new(0);

/// Creates a database and returns its URL. Fails with a text if PostgreSQL is not available.
pub fn database() -> Result<String, String> {
    let dir = SERVER.get_or_init(start).clone()?;
    let name = format!("t{}", NEXT.fetch_add(1, Ordering::SeqCst));
    let made = run(Command::new(program("createdb")?)
        .arg("-h")
        .arg(&dir)
        .args(["-U", "upperdeck", &name]))?;
    assert!(made.is_empty(), "{made}");
    let host: String = dir
        .to_string_lossy()
        .bytes()
        .map(|b| match b {
            b'/' => "%2F".to_owned(),
            b => char::from(b).to_string(),
        })
        .collect();
    Ok(format!("postgres://upperdeck@{host}/{name}"))
}

fn program(name: &str) -> Result<PathBuf, String> {
    let found = std::fs::read_dir("/usr/lib/postgresql").map_err(|_| "needs PostgreSQL")?;
    let mut bins: Vec<_> = found
        .flatten()
        .map(|entry| entry.path().join("bin").join(name))
        .filter(|path| path.is_file())
        .collect();
    bins.sort();
    bins.pop()
        .ok_or_else(|| format!("needs PostgreSQL's {name}"))
}

fn run(command: &mut Command) -> Result<String, String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|error| error.to_string())?;
    if output.status.success() {
        return Ok(String::new());
    }
    Err(String::from_utf8_lossy(&output.stderr).into_owned())
}

/// Runs the command as the user postgres, because PostgreSQL refuses to run as root.
fn as_its_user(command: &mut Command, dir: &Path) -> Result<(), String> {
    if !nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    let user = nix::unistd::User::from_name("postgres")
        .ok()
        .flatten()
        .ok_or("needs the user postgres")?;
    nix::unistd::chown(dir, Some(user.uid), Some(user.gid)).map_err(|error| error.to_string())?;
    command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
    Ok(())
}

const PREFIX: &str = "upperdeck-pg-";

/// Removes the directories of test programs that have ended.
fn sweep() {
    for entry in std::fs::read_dir("/tmp").into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name
            .to_str()
            .and_then(|name| name.strip_prefix(PREFIX)?.split('-').next());
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            // Another test program may remove it at the same time.
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

fn start() -> Result<PathBuf, String> {
    let (initdb, postgres) = (program("initdb")?, program("postgres")?);
    sweep();
    let dir = tempfile::Builder::new()
        .prefix(&format!("{PREFIX}{}-", std::process::id()))
        .tempdir_in("/tmp")
        .map_err(|error| error.to_string())?
        .keep();
    let mut command = Command::new(initdb);
    as_its_user(&mut command, &dir)?;
    run(command
        .current_dir("/")
        .args([
            "-A",
            "trust",
            "-U",
            "upperdeck",
            "-E",
            "UTF8",
            "--no-sync",
            "-D",
        ])
        .arg(dir.join("data")))?;
    let mut command = Command::new("setpriv");
    if nix::unistd::geteuid().is_root() {
        command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]);
    }
    command
        .args(["--pdeathsig", "INT"])
        .arg(postgres)
        .arg("-D")
        .arg(dir.join("data"))
        .arg("-k")
        .arg(&dir)
        .args([
            "-c",
            "listen_addresses=",
            "-c",
            "fsync=off",
            "-c",
            "max_connections=200",
        ])
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    // The server ends with the thread that started it, so the thread has to live as long as the program.
    let (told, started) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let child = command.spawn();
        let _ = told.send(child.as_ref().map(|_| ()).map_err(ToString::to_string));
        if let Ok(mut child) = child {
            let _ = child.wait();
        }
    });
    started.recv().map_err(|error| error.to_string())??;
    let begun = Instant::now();
    loop {
        let ready = run(Command::new(program("pg_isready")?)
            .arg("-h")
            .arg(&dir)
            .args(["-U", "upperdeck"]));
        if ready.is_ok() {
            return Ok(dir);
        }
        if begun.elapsed() > Duration::from_secs(120) {
            return Err(format!("PostgreSQL does not start: {ready:?}"));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}
