//! The container of the demonstration. This program is executed again, first to create the namespaces and then as the
//! process within them.
//!
//! The container's root needs nothing of the host, because the program is started before the root is changed. The
//! container ends when its standard input is closed, so it cannot outlive the demonstration.

use std::ffi::{CString, OsString};
use std::fs;
use std::io::{self, BufRead as _, Write as _};
use std::os::unix::fs::{PermissionsExt as _, chown, symlink};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use nix::sched::{CloneFlags, unshare};
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount,
};
use rustix::process::{Signal, pivot_root, set_parent_process_death_signal};

/// First argument of the process that creates the container.
pub(super) const ARGUMENT: &str = "__demo-container";
/// First argument of the container's own process.
const PROCESS: &str = "__demo-process";

/// Runs the part of the demonstration that this process was started for. Returns `None` if it was not. `main` has to
/// call this first.
pub fn entry() -> Option<ExitCode> {
    let mut args = std::env::args_os().skip(1);
    let part = args.next()?;
    let args: Vec<OsString> = args.collect();
    let outcome = match part.to_str()? {
        ARGUMENT => make(&args),
        PROCESS => run_container(&args),
        _ => return None,
    };
    Some(match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            let _ = write_line(&format!("error {}", why.escape_debug()));
            ExitCode::FAILURE
        }
    })
}

fn write_line(line: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{line}")?;
    stdout.flush()
}

/// Returns a conversion for `map_err` that prefixes an error with the failed action.
fn failed<E: std::fmt::Display>(what: impl std::fmt::Display) -> impl FnOnce(E) -> String {
    move |error| format!("{what}: {error}")
}

/// Creates namespaces and overlay, starts the container's process and waits for it.
fn make(args: &[OsString]) -> Result<(), String> {
    let [dir, user] = args else {
        return Err("expected DIR root|user".to_owned());
    };
    let (dir, in_user_namespace) = (Path::new(dir), user == "user");
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(failed("prctl"))?;
    // The parent may put this process into a cgroup first. Exactly one byte is read, because the following data is for
    // the container's process.
    read_byte()?;
    let mut flags = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWUTS;
    let mut options = String::new();
    if in_user_namespace {
        let (uid, gid) = (
            rustix::process::geteuid().as_raw(),
            rustix::process::getegid().as_raw(),
        );
        flags |= CloneFlags::CLONE_NEWUSER;
        unshare(flags).map_err(failed("making a user namespace"))?;
        let write =
            |file: &str, text: String| fs::write(file, text).map_err(failed(file.to_owned()));
        write("/proc/self/setgroups", "deny".to_owned())?;
        write("/proc/self/uid_map", format!("0 {uid} 1"))?;
        write("/proc/self/gid_map", format!("0 {gid} 1"))?;
        options.push_str(",userxattr");
    } else {
        unshare(flags).map_err(failed("making mount and PID namespaces"))?;
    }
    mount_change(
        "/",
        MountPropagationFlags::REC | MountPropagationFlags::PRIVATE,
    )
    .map_err(failed("making mounts private"))?;
    let path = |name: &str| dir.join(name).display().to_string();
    let options = format!(
        "lowerdir={}:{},upperdir={},workdir={}{options}",
        path("lower2"),
        path("lower1"),
        path("upper"),
        path("work")
    );
    let merged = dir.join("merged");
    let options = CString::new(options).map_err(failed("the directory's name"))?;
    mount(
        "overlay",
        &merged,
        "overlay",
        MountFlags::empty(),
        Some(options.as_c_str()),
    )
    .map_err(failed(format!("mounting an overlay in {}", dir.display())))?;
    let mut process = Command::new("/proc/self/exe")
        .arg(PROCESS)
        .arg(&merged)
        .stdin(Stdio::inherit())
        .stdout(Stdio::inherit())
        .spawn()
        .map_err(failed("starting the container's process"))?;
    write_line(&format!("pid {}", process.id())).map_err(failed("stdout"))?;
    process
        .wait()
        .map_err(failed("waiting for the container"))?;
    Ok(())
}

fn read_byte() -> Result<(), String> {
    // `io::stdin` would read ahead.
    let mut byte = [0];
    match rustix::io::read(io::stdin(), &mut byte) {
        Ok(1) => Ok(()),
        Ok(_) => Err("the demonstration that started it has ended".to_owned()),
        Err(error) => Err(format!("stdin: {error}")),
    }
}

/// Runs as PID 1 of the container: changes to its root, then executes commands line by line.
fn run_container(args: &[OsString]) -> Result<(), String> {
    let [merged] = args else {
        return Err("expected DIR".to_owned());
    };
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(failed("prctl"))?;
    let merged = Path::new(merged);
    // If /proc is partly masked (in a container), a new one may not be mounted. It is not needed.
    let _ = mount(
        "proc",
        merged.join("proc"),
        "proc",
        MountFlags::empty(),
        None,
    );
    mount(
        "volume",
        merged.join("data"),
        "tmpfs",
        MountFlags::empty(),
        Some(c"size=1m"),
    )
    .map_err(failed("mounting a volume"))?;
    std::env::set_current_dir(merged).map_err(failed("chdir"))?;
    pivot_root(".", ".").map_err(failed("pivot_root"))?;
    unmount(".", UnmountFlags::DETACH).map_err(failed("leaving the old root"))?;
    std::env::set_current_dir("/").map_err(failed("chdir"))?;
    rustix::system::sethostname(b"demo").map_err(failed("sethostname"))?;
    write_line("ready").map_err(failed("stdout"))?;
    for line in io::stdin().lock().lines() {
        let done = match line.map_err(failed("stdin"))?.as_str() {
            "first" => first_changes(),
            "second" => second_changes(),
            other => return Err(format!("no such work: {other}")),
        };
        done.map_err(failed("working"))?;
        write_line("done").map_err(failed("stdout"))?;
    }
    Ok(())
}

/// Makes the changes of the first hour of a session, which [`super::FIRST_CHANGES`] describes.
fn first_changes() -> io::Result<()> {
    // Installs packages.
    for package in 0..20 {
        let dir = format!("/usr/lib/python3/site-packages/package{package}");
        fs::create_dir_all(&dir)?;
        for module in 0..15 {
            let line = format!("def f{module}(x):\n    return x + {package}\n\n");
            fs::write(format!("{dir}/module{module}.py"), line.repeat(20 + module))?;
        }
    }
    // Writes a program and results.
    fs::write("/home/user/analysis.py", "print(6 * 7)\n")?;
    fs::hard_link("/home/user/analysis.py", "/home/user/analysis-v1.py")?;
    symlink("analysis.py", "/home/user/latest")?;
    fs::write(
        "/home/user/notebook.ipynb",
        "{\"cells\": [{\"source\": \"1 + 1\"}]}\n",
    )?;
    fs::write("/home/user/results.bin", noise(12 << 20, 1))?;
    fs::write("/home/user/naïve name.txt", "names are bytes\n")?;
    // Changes, renames and deletes files of the base.
    append("/etc/motd", "Changed in the container.\n")?;
    fs::remove_dir_all("/usr/share/doc")?;
    rename("/opt/tool", "/opt/tool-2")?;
    fs::set_permissions("/srv", fs::Permissions::from_mode(0o2750))?;
    // Fails in a user namespace with a single user, which has no other owner for a file.
    let _ = chown("/etc/app.conf", Some(1000), Some(1000));
    let _ = rustix::fs::setxattr(
        "/home/user/analysis.py",
        "user.comment",
        b"an attribute",
        rustix::fs::XattrFlags::empty(),
    );
    // Replaces a directory; its old content must not reappear.
    fs::remove_dir_all("/var/lib/app")?;
    fs::create_dir("/var/lib/app")?;
    fs::write("/var/lib/app/state", "2\n")?;
    // Creates files that must not be in an image.
    fs::create_dir_all("/root/.ssh")?;
    fs::write("/root/.ssh/id_ed25519", "a private key\n")?;
    fs::create_dir_all("/root/.cache/pip")?;
    fs::write("/root/.cache/pip/wheel", noise(1 << 20, 2))?;
    fs::write("/tmp/scratch", noise(1 << 20, 3))?;
    fs::write("/data/survey.csv", "on a volume\n")
}

/// Makes the changes before the second save, which [`super::SECOND_CHANGES`] describes.
fn second_changes() -> io::Result<()> {
    append("/home/user/analysis.py", "print('one more line')\n")?;
    fs::remove_file("/home/user/results.bin")?;
    fs::remove_file("/home/user/latest")?;
    fs::create_dir("/home/user/latest")?;
    fs::write("/home/user/latest/figure.png", noise(2 << 20, 4))?;
    rename("/usr/lib/python3", "/usr/lib/python4")?;
    fs::remove_file("/etc/os-release")
}

fn append(path: &str, text: &str) -> io::Result<()> {
    fs::OpenOptions::new()
        .append(true)
        .open(path)?
        .write_all(text.as_bytes())
}

/// Renames like `mv`: if an overlay refuses to rename a directory of the base, it is copied and removed.
fn rename(from: &str, to: &str) -> io::Result<()> {
    match fs::rename(from, to) {
        Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {}
        other => return other,
    }
    for entry in walkdir::WalkDir::new(from) {
        let entry = entry.map_err(io::Error::from)?;
        let target = Path::new(to).join(entry.path().strip_prefix(from).map_err(io::Error::other)?);
        if entry.file_type().is_dir() {
            fs::create_dir(target)?;
        } else {
            fs::copy(entry.path(), target)?;
        }
    }
    fs::remove_dir_all(from)
}

/// Returns bytes that compress to about half, deterministic for a seed (xorshift64).
fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend((state & 0x0f0f_0f0f_0f0f_0f0f).to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}
