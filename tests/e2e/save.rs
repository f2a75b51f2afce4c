//! The steps that all scenarios share: run the program, check its output, unpack the image with other tools, and
//! compare it with what the container sees.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::host::{Roots, Scratch, command, output, run};
use crate::support::program;

/// A user's work in the small base, as shell commands: one line per kind of entry that a layer must contain or must not
/// contain.
pub const WORK: &str = r"
echo changed >> /usr/lib/app/main
rm /usr/lib/app/plugins/p2 /usr/lib/app/dangling
rm -rf /opt/new && mkdir /opt/new && echo other > /opt/new/other
rm /usr/bin/app && mkdir /usr/bin/app && echo inside > /usr/bin/app/inside
rm -rf /srv/dash/a && ln -s a-b /srv/dash/a
rm /srv/dash/a-b && mkdir /srv/dash/a-b && echo below > /srv/dash/a-b/below
rm -rf /srv/share
chmod 711 /root
chown 1000:1000 /usr/lib/app/plugins
chmod 6711 /usr/bin/su
chmod 644 /usr/lib/app/plugins/p3
mkdir -p /home/researcher/work/deep/er /home/researcher/empty
echo notebook > /home/researcher/work/deep/er/a.ipynb
ln /home/researcher/work/deep/er/a.ipynb /home/researcher/work/b.ipynb
ln /var/lib/data/noise /home/researcher/work/noise
chown -R 1000:1000 /home/researcher
mkfifo /home/researcher/work/queue
mknod /home/researcher/work/null c 1 3
echo more >> /usr/lib/app/plugins/p1
dd if=/dev/zero of=/home/researcher/work/sparse bs=1 count=1 seek=8388608 2> /dev/null
dd if=/dev/urandom of=/home/researcher/work/noise2 bs=65536 count=40 2> /dev/null
echo a > /home/researcher/work/$(printf 'two\nlines')
echo a > /home/researcher/work/$(printf 'caf\351')
echo a > /home/researcher/work/nnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnn
echo old > /home/researcher/work/old && touch -d '1960-01-02 03:04:05' /home/researcher/work/old
echo new > /home/researcher/work/new && touch -d '2100-01-02 03:04:05' /home/researcher/work/new
mkdir -p /root/.ssh /home/researcher/.cache/pip && echo key > /root/.ssh/id_ed25519 && echo wheel > /home/researcher/.cache/pip/wheel
echo gone > /tmp/scratch
";

/// The same without the commands below `/srv`, where a volume may be mounted.
pub const WORK_WITHOUT_SRV: &str = r"
echo changed >> /usr/lib/app/main
rm /usr/lib/app/plugins/p2 /usr/lib/app/dangling
rm -rf /opt/new && mkdir /opt/new && echo other > /opt/new/other
mkdir -p /home/researcher/work/deep/er /home/researcher/empty
echo notebook > /home/researcher/work/deep/er/a.ipynb
ln /home/researcher/work/deep/er/a.ipynb /home/researcher/work/b.ipynb
";

/// Does the part of a user's work that busybox cannot do: sets attributes and access lists in the root of a process.
pub fn set_attributes(pid: i32, access_lists: bool) -> Result<()> {
    let home = format!("/proc/{pid}/root/home/researcher");
    run(&mut command(
        "setfattr",
        [
            "-n",
            "user.note",
            "-v",
            "kept",
            &format!("{home}/work/deep"),
        ],
    ))?;
    if access_lists {
        run(&mut command(
            "setfacl",
            ["-m", "u:1234:rwx", &format!("{home}/work/deep")],
        ))?;
        // A default list only on an empty directory, because containerd and Docker set it before they create the
        // contents.
        run(&mut command(
            "setfacl",
            ["-m", "d:u:1234:rx", &format!("{home}/empty")],
        ))?;
    }
    Ok(())
}

/// What a save intentionally leaves out of [`WORK`], and what runtimes create in every container.
pub const LEFT_OUT: &[&str] = &[
    "tmp/*",
    "root/.ssh",
    "root/.ssh/*",
    "home/researcher/.cache/pip/*",
    "home/researcher/.cache/pip",
    // Mount points, and files written by engines.
    "dev/*",
    "proc/*",
    "sys/*",
    "run/*",
    "etc/hosts",
    "etc/hostname",
    "etc/resolv.conf",
    "etc/mtab",
    ".dockerenv",
    "data",
];

/// Directories in which a runtime creates the above, so that their times differ.
pub const TOUCHED_BY_RUNTIMES: &[&str] = &[
    ".",
    "dev",
    "etc",
    "proc",
    "sys",
    "run",
    "tmp",
    "home/researcher/.cache",
    "root",
];

/// The same, and a time before 1970, which containerd and Docker unpack as 1970.
pub const TOUCHED_BY_ENGINES: &[&str] = &[
    ".",
    "dev",
    "etc",
    "proc",
    "sys",
    "run",
    "tmp",
    "home/researcher/.cache",
    "root",
    "home/researcher/work/old",
];

/// The comparison tool, which shares no code with the program.
pub const TREE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/e2e/host/tree.py");

/// A saved image.
#[derive(Clone, Debug)]
pub struct Saved {
    /// `HOST/REPO@sha256:…`, or the layout's path with the digest.
    pub reference: String,
    pub digest: String,
    /// The content of `--metadata-file`.
    pub metadata: Value,
    pub stderr: String,
}

/// Returns a command for a verb with the state directories of a host. It is killed if it hangs: no save here takes
/// minutes.
pub fn upperdeck(verb: &str, roots: &Roots) -> Command {
    let bounded = command("timeout", ["--signal=KILL", "300", program()]);
    arranged(bounded, verb, roots)
}

/// Like [`upperdeck`], but the child is the program itself, for tests that send it signals.
pub fn upperdeck_itself(verb: &str, roots: &Roots) -> Command {
    arranged(Command::new(program()), verb, roots)
}

/// Returns the directory where the program keeps what it needs for the next save.
pub fn state_dir(roots: &Roots) -> PathBuf {
    let any = [
        &roots.docker_root,
        &roots.storage_root,
        &roots.containerd_root,
    ];
    let dirs = any.into_iter().flat_map(|dir| dir.ancestors());
    let scratch = dirs.filter(|dir| dir.parent() == Some(Path::new("/tmp")));
    scratch
        .into_iter()
        .next()
        .unwrap_or(Path::new("/tmp/upperdeck-test-none"))
        .join("state")
}

fn arranged(mut command: Command, verb: &str, roots: &Roots) -> Command {
    // The machine's credentials and proxies are not used in tests.
    command
        .arg(verb)
        .args(roots.flags())
        .env("RUST_BACKTRACE", "1")
        .env("UPPERDECK_STATE_DIR", state_dir(roots))
        .env_remove("SOURCE_DATE_EPOCH");
    for variable in [
        "http_proxy",
        "https_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "all_proxy",
    ] {
        command.env_remove(variable);
    }
    command.env("HOME", "/nonexistent");
    for variable in [
        "DOCKER_CONFIG",
        "REGISTRY_AUTH_FILE",
        "XDG_RUNTIME_DIR",
        "XDG_CONFIG_HOME",
    ] {
        command.env_remove(variable);
    }
    command
}

/// Saves, and checks the output on stdout, `--digestfile` and `--metadata-file` against each other.
pub fn save(
    scratch: &Scratch,
    roots: &Roots,
    container: &str,
    destination: &str,
    options: &[&str],
) -> Result<Saved> {
    let metadata = scratch.path().join("metadata.json");
    let digestfile = scratch.path().join("digest");
    let mut commit = upperdeck("commit", roots);
    commit
        .args(["--progress", "none"])
        .arg("--metadata-file")
        .arg(&metadata)
        .arg("--digestfile")
        .arg(&digestfile);
    let done = output(commit.args(options).args([container, destination]))?;
    let stderr = String::from_utf8_lossy(&done.stderr).into_owned();
    ensure!(
        done.status.success(),
        "{commit:?}: {}\n{stderr}",
        done.status
    );
    let reference = String::from_utf8(done.stdout)?.trim_end().to_owned();
    let (_, digest) = reference
        .rsplit_once('@')
        .with_context(|| format!("stdout {reference:?} has no digest"))?;
    let digest = digest.to_owned();
    ensure!(
        digest.starts_with("sha256:") && digest.len() == 71,
        "{reference:?}"
    );
    ensure!(
        fs::read_to_string(&digestfile)?.trim_end() == digest,
        "--digestfile is not {digest}"
    );
    let metadata: Value =
        serde_json::from_slice(&fs::read(&metadata)?).context("--metadata-file")?;
    Ok(Saved {
        reference,
        digest,
        metadata,
        stderr,
    })
}

/// Runs a save that must fail with `exit`. Returns its message, which must not be a panic.
pub fn refuse(
    roots: &Roots,
    container: &str,
    destination: &str,
    options: &[&str],
    exit: i32,
) -> Result<String> {
    let mut commit = upperdeck("commit", roots);
    let done = output(
        commit
            .args(["--progress", "none"])
            .args(options)
            .args([container, destination]),
    )?;
    failed(&done, exit).map_err(|error| {
        anyhow::anyhow!("{error:#} (of upperdeck commit {container} {destination} {options:?})")
    })
}

/// Checks that a run ended with `exit`, with a message and without a result. Returns the message.
pub fn failed(done: &Output, exit: i32) -> Result<String> {
    let stderr = String::from_utf8_lossy(&done.stderr).into_owned();
    ensure!(
        done.status.code() == Some(exit),
        "exit {exit} expected, got {}:\n{stderr}",
        done.status
    );
    ensure!(!stderr.contains("panicked"), "a panic:\n{stderr}");
    ensure!(!stderr.trim().is_empty(), "no message");
    ensure!(
        done.stdout.is_empty(),
        "a result on stdout of a failure: {}",
        String::from_utf8_lossy(&done.stdout)
    );
    Ok(stderr)
}

/// Copies a registry image (`HOST/REPO:TAG` or with a digest) to an OCI layout and unpacks it with umoci. Returns its
/// root file system.
pub fn unpack(scratch: &Scratch, reference: &str) -> Result<PathBuf> {
    let dir = tempfile::Builder::new()
        .prefix("unpacked.")
        .tempdir_in(scratch.path())?
        .keep();
    let layout = dir.join("layout");
    run(
        command("skopeo", ["copy", "--quiet", "--src-tls-verify=false"])
            .arg(format!("docker://{reference}"))
            .arg(format!("oci:{}:latest", layout.display())),
    )?;
    unpack_layout(&layout, "latest")
}

/// Like [`unpack`], from an OCI layout.
pub fn unpack_layout(layout: &Path, tag: &str) -> Result<PathBuf> {
    let bundle = layout.with_extension(format!("unpacked-{tag}"));
    run(command("umoci", ["unpack", "--image"])
        .arg(format!("{}:{tag}", layout.display()))
        .arg(&bundle))?;
    Ok(bundle.join("rootfs"))
}

/// Fails with a list of differences unless two trees are equal except for the given paths.
pub fn same_tree(
    a: &Path,
    b: &Path,
    except: &[&str],
    except_mtime: &[&str],
    at_least: usize,
) -> Result<()> {
    same_tree_by(
        command("python3", [TREE]),
        a,
        b,
        except,
        except_mtime,
        at_least,
    )
}

/// Like [`same_tree`], with a command that ends in [`TREE`] and some of its options (in another mount namespace).
pub fn same_tree_by(
    mut compare: Command,
    a: &Path,
    b: &Path,
    except: &[&str],
    except_mtime: &[&str],
    at_least: usize,
) -> Result<()> {
    compare
        .args([a, b])
        .arg("--at-least")
        .arg(at_least.to_string());
    for glob in except {
        compare.args(["--except", glob]);
    }
    for glob in except_mtime {
        compare.args(["--except-mtime", glob]);
    }
    let done = output(&mut compare)?;
    if !done.status.success() {
        bail!(
            "{} and {} differ:\n{}{}",
            a.display(),
            b.display(),
            String::from_utf8_lossy(&done.stdout),
            String::from_utf8_lossy(&done.stderr)
        );
    }
    Ok(())
}

/// Returns the manifest of an image in a registry.
pub fn manifest(reference: &str) -> Result<Value> {
    let raw = run(&mut command(
        "skopeo",
        [
            "inspect",
            "--raw",
            "--tls-verify=false",
            &format!("docker://{reference}"),
        ],
    ))?;
    Ok(serde_json::from_str(&raw)?)
}

/// Returns the config of an image in a registry.
pub fn config(reference: &str) -> Result<Value> {
    let arguments = [
        "inspect",
        "--raw",
        "--config",
        "--tls-verify=false",
        &format!("docker://{reference}"),
    ];
    Ok(serde_json::from_str(&run(&mut command(
        "skopeo", arguments,
    ))?)?)
}

/// Returns the directory of the image-spec schemas, if it exists beside the project.
pub fn schemas() -> Option<PathBuf> {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .map(|dir| dir.join("shared/oci-schema"))
        .find(|dir| dir.is_dir())
}

/// Returns the layers of a manifest as (media type, digest).
pub fn layers(manifest: &Value) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let layers = manifest["layers"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    layers
        .iter()
        .map(|layer| (text(&layer["mediaType"]), text(&layer["digest"])))
        .collect()
}

/// Returns the digests of a manifest's layers.
pub fn digests(manifest: &Value) -> Vec<String> {
    layers(manifest)
        .into_iter()
        .map(|(_, digest)| digest)
        .collect()
}

/// Returns an image's `config` without null values and without what Docker writes about the container in which an image
/// was made.
pub fn meaningful(config: &Value) -> BTreeMap<String, Value> {
    let stale = ["Hostname", "Domainname", "Image", "MacAddress"];
    let fields = config.as_object().into_iter().flatten();
    fields
        .filter(|(key, value)| !value.is_null() && !stale.contains(&key.as_str()))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}
