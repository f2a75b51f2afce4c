//! The command lines of README and of the service's installation run as printed: with the names that they have, in mount and
//! network namespaces in which these names lead to a registry and a pod of the test.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Result, ensure};

use crate::host::containerd::PodOptions;
use crate::host::image::{Base, Format};
use crate::host::{Scratch, command, output, run};
use crate::lab::Lab;
use crate::save::WORK;
use crate::support::{Need, ignored, program};

#[path = "../support/readme.rs"]
mod text;

const README: &str = include_str!("../../README.md");
const SERVICE: &str = include_str!("../../docs/service.md");

/// Runs `$LINE` in the directory of the test, with copies of /etc and /var/lib that disappear afterwards, and a registry
/// that has the name of the documentation.
const ARRANGE: &str = r#"
set -eu
ip link set lo up
mount -t tmpfs tmpfs "$DIR/copies"
for dir in /etc /var/lib /usr/local; do
    upper=$DIR/copies$dir
    mkdir -p "$upper/upper" "$upper/work"
    mount -t overlay -o "lowerdir=$dir,upperdir=$upper/upper,workdir=$upper/work" overlay "$dir"
done
echo '127.0.0.1 localhost registry.example.org' > /etc/hosts
docker-registry serve "$DIR/registry.yml" > "$DIR/registry.log" 2>&1 &
registry=$!
until grep -q 'listening on' "$DIR/registry.log"; do sleep 0.05; done
trap 'kill $registry' EXIT
cd "$DIR/work"
eval "$LINE"
"#;

/// A place in which lines are run.
struct Reader {
    dir: PathBuf,
    environment: Vec<(&'static str, PathBuf)>,
}

impl Reader {
    fn new(scratch: &Scratch) -> Result<Self> {
        let dir = scratch.dir("reader")?;
        for name in ["bin", "copies", "work"] {
            fs::create_dir(dir.join(name))?;
        }
        std::os::unix::fs::symlink(program(), dir.join("bin/upperdeck"))?;
        run(command("openssl", ["req", "-x509", "-newkey", "ec"])
            .args([
                "-pkeyopt",
                "ec_paramgen_curve:prime256v1",
                "-nodes",
                "-days",
                "1",
            ])
            .args(["-subj", "/CN=registry.example.org"])
            .args(["-addext", "subjectAltName=DNS:registry.example.org"])
            .args(["-addext", "basicConstraints=critical,CA:FALSE"])
            .arg("-keyout")
            .arg(dir.join("key.pem"))
            .arg("-out")
            .arg(dir.join("certificate.pem")))?;
        let at = dir.display();
        let registry = format!(
            "version: 0.1\nlog: {{level: info}}\nstorage: {{filesystem: {{rootdirectory: {at}/storage}}}}\n\
             http: {{addr: '127.0.0.1:443', tls: {{certificate: {at}/certificate.pem, key: {at}/key.pem}}}}\n"
        );
        fs::write(dir.join("registry.yml"), registry)?;
        let environment = vec![("SSL_CERT_FILE", dir.join("certificate.pem"))];
        Ok(Self { dir, environment })
    }

    fn run(&self, line: &str) -> Result<Output> {
        let mut shell = command("unshare", ["--mount", "--net", "--propagation", "private"]);
        shell.args(["bash", "-c", ARRANGE]);
        self.prepare(&mut shell, line);
        output(&mut shell)
    }

    fn prepare(&self, shell: &mut Command, line: &str) {
        let path = std::env::var("PATH").unwrap_or_default();
        let bin = self.dir.join("bin");
        shell
            .env("DIR", &self.dir)
            .env("LINE", line)
            .env("PATH", format!("{}:{path}:/usr/sbin:/sbin", bin.display()))
            .env("HOME", &self.dir);
        for variable in [
            "http_proxy",
            "https_proxy",
            "HTTP_PROXY",
            "HTTPS_PROXY",
            "ALL_PROXY",
            "all_proxy",
        ] {
            shell.env_remove(variable);
        }
        for (name, value) in &self.environment {
            shell.env(name, value);
        }
    }

    fn succeed(&self, line: &str) -> Result<String> {
        let done = self.run(line)?;
        let (out, said) = (text(&done.stdout), text(&done.stderr));
        ensure!(
            done.status.success(),
            "{line}: {}\n{out}\n{said}",
            done.status
        );
        Ok(out)
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn needs() -> Vec<Need<'static>> {
    let programs = [
        "unshare",
        "ip",
        "mount",
        "openssl",
        "docker-registry",
        "useradd",
    ];
    let mut needs: Vec<Need<'static>> = programs.map(Need::Program).into();
    needs.push(Need::Root);
    needs
}

#[test]
fn the_tour_of_the_readme_runs_as_printed() -> Result<()> {
    if ignored(&needs()) {
        return Ok(());
    }
    let Some(lab) = Lab::new(Base::Small, Format::Oci)? else {
        return Ok(());
    };
    let pod = PodOptions {
        name: Some("notebook-0"),
        ..PodOptions::default()
    };
    let pod = lab.containerd.run_pod(&lab.image, &pod)?;
    lab.containerd.shell(&pod, WORK)?;
    let mut reader = Reader::new(&lab.scratch)?;
    let roots = &lab.roots;
    reader.environment.extend([
        ("UPPERDECK_CONTAINERD_ROOT", roots.containerd_root.clone()),
        ("UPPERDECK_CONTAINERD_STATE", roots.containerd_state.clone()),
        ("UPPERDECK_DOCKER_ROOT", roots.docker_root.clone()),
        ("UPPERDECK_STORAGE_ROOT", roots.storage_root.clone()),
        ("UPPERDECK_STORAGE_RUNROOT", roots.storage_runroot.clone()),
    ]);
    let work = reader.dir.join("work");
    fs::create_dir_all(work.join("L"))?;
    fs::create_dir_all(work.join("U"))?;
    fs::write(work.join("U/new"), "new\n")?;

    let lines = text::commands(README, "A tour");
    let mut ran = Vec::new();
    for line in &lines {
        let verb = line.split(' ').nth(1).unwrap_or_default();
        let expected = match verb {
            "ps" => "jupyter/notebook-0",
            "inspect" if line.contains("--packages") => "no package differs",
            "inspect" => "notebook:1",
            "diff" => "A ",
            "commit" => "registry.example.org/alice/notebook",
            "layer" => "\"diffID\"",
            "up" => {
                serve(&reader, line)?;
                ran.push(verb);
                continue;
            }
            // The others need a Harbor, an image in another place, or minutes.
            _ => continue,
        };
        let out = reader.succeed(line)?;
        ensure!(out.contains(expected), "{line}: no {expected:?} in\n{out}");
        ran.push(verb);
    }
    for verb in ["ps", "inspect", "diff", "commit", "layer", "up"] {
        ensure!(ran.contains(&verb), "{verb} is not in the tour: {lines:?}");
    }
    // What was pushed is there under the name of the documentation.
    let tags = fs::read_dir(
        reader
            .dir
            .join("storage/docker/registry/v2/repositories/alice/notebook/_manifests/tags"),
    )?;
    let tags: Vec<_> = tags.flatten().map(|tag| tag.file_name()).collect();
    assert_eq!(tags, ["monday"]);
    Ok(())
}

/// Runs the service until it has printed its address and shown the pod.
fn serve(reader: &Reader, line: &str) -> Result<()> {
    let script = format!(
        "{line} > url & up=$!\nuntil grep -q token= url; do kill -0 $up; sleep 0.1; done\n\
         until upperdeck job sessions | grep jupyter/notebook-0; do kill -0 $up; sleep 0.2; done\n\
         kill $up; wait $up"
    );
    let out = reader.succeed(&script)?;
    ensure!(out.contains("jupyter/notebook-0"), "{out}");
    let url = fs::read_to_string(reader.dir.join("work/url"))?;
    ensure!(url.starts_with("http://127.0.0.1:"), "{url}");
    Ok(())
}

#[test]
fn the_installation_runs_as_printed() -> Result<()> {
    if ignored(&needs()) {
        return Ok(());
    }
    let scratch = Scratch::new()?;
    let reader = Reader::new(&scratch)?;
    let lines = text::commands(README, "Install");
    let (doctor, files): (Vec<_>, Vec<_>) = lines
        .iter()
        // It builds the program, which is here already.
        .filter(|line| !line.starts_with("cargo install "))
        .partition(|line| line.starts_with("upperdeck doctor"));
    ensure!(files.len() == 2 && doctor.len() == 1, "{lines:?}");
    let files: Vec<&str> = files.into_iter().map(String::as_str).collect();
    let look = "cat /etc/bash_completion.d/upperdeck; ls /usr/local/share/man/man1";
    let out = reader.succeed(&format!("{}\n{look}", files.join("\n")))?;
    for expected in ["complete -F", "upperdeck.1", "upperdeck-commit.1"] {
        ensure!(out.contains(expected), "{expected} is not in {out}");
    }
    // What it finds is up to this machine; it says it.
    let done = reader.run(doctor[0])?;
    ensure!(
        matches!(done.status.code(), Some(0 | 1)),
        "{}",
        text(&done.stderr)
    );
    ensure!(
        text(&done.stdout).contains("CHECK"),
        "{}",
        text(&done.stdout)
    );
    Ok(())
}

#[test]
fn the_service_is_set_up_as_printed() -> Result<()> {
    if ignored(&needs()) {
        return Ok(());
    }
    let scratch = Scratch::new()?;
    let reader = Reader::new(&scratch)?;
    let lines = text::commands(SERVICE, "On a cluster");
    let wanted =
        |line: &&String| line.starts_with("upperdeck setup ") || line.contains("master-key --node");
    let lines: Vec<&str> = lines
        .iter()
        .filter(wanted)
        .filter(|line| line.contains("/etc/upperdeck") || line.starts_with("upperdeck setup "))
        .map(String::as_str)
        .collect();
    assert_eq!(lines.len(), 3, "{lines:?}");
    let look = "stat -c '%n %a %U:%G' /etc/upperdeck/* /var/lib/upperdeck*; ls";
    let out = reader.succeed(&format!("{}\n{look}", lines.join("\n")))?;
    for expected in [
        "/etc/upperdeck/master-key 640 root:upperdeck",
        "/etc/upperdeck/node-key 600 root:root",
        "/etc/upperdeck/upperdeck.toml 644 root:root",
        "/var/lib/upperdeck 700 root:root",
        "/var/lib/upperdeck-manager 700 upperdeck:upperdeck",
        "node17.key",
    ] {
        ensure!(out.contains(expected), "{expected} is not in {out}");
    }
    ensure!(
        !Path::new("/etc/upperdeck/master-key").exists(),
        "it is gone again"
    );
    Ok(())
}
