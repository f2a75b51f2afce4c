//! Programs that users keep running: by the program's own check, each image is of one moment.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::{INSTANT, Session, WRITERS, saves};
use crate::host::containerd::PodOptions;
use crate::host::image::{Base, Format};
use crate::host::{command, output, run, wait_until};
use crate::lab::Lab;
use crate::save;
use crate::support::{Need, ignored};

/// Returns the path of this machine's PostgreSQL, if there is one.
fn postgres() -> Option<String> {
    let versions = fs::read_dir("/usr/lib/postgresql").ok()?;
    let mut found: Vec<String> = versions
        .flatten()
        .map(|entry| entry.path().join("bin").display().to_string())
        .filter(|bin| Path::new(bin).join("pg_amcheck").exists())
        .collect();
    found.sort();
    found.pop()
}

const USER: &str = "researcher";
const LIBRARIES: &str = "/opt/postgres-libraries";

/// Copies the server, its data and the libraries that it needs beyond the C library into a container.
fn install(bin: &str, root: &Path) -> Result<()> {
    let script = r#"
        bin=$1 root=$2 libraries=$root$3
        home=$(dirname "$bin") share=/usr/share/postgresql/$(basename "$(dirname "$bin")")
        mkdir -p "$root/usr/lib/postgresql" "$root/usr/share/postgresql" "$libraries"
        cp -a "$home" "$root/usr/lib/postgresql/"
        cp -a "$share" "$root/usr/share/postgresql/"
        ldd "$bin"/postgres "$bin"/initdb "$bin"/psql "$bin"/pgbench "$bin"/pg_amcheck |
            sed -n 's/.* => \(\/[^ ]*\) .*/\1/p' | sort -u |
            grep -vE '/(libc|libm|libdl|libpthread|librt)\.so' | xargs -I{} cp -L {} "$libraries/"
    "#;
    let mut copy = command("bash", ["-ec", script, "copy", bin]);
    run(copy.arg(root).arg(LIBRARIES)).map(drop)
}

/// Returns a shell script with the server's programs in its path.
fn with_postgres(bin: &str, script: &str) -> String {
    format!(
        "export PATH={bin}:$PATH LD_LIBRARY_PATH={LIBRARIES} PGHOST=/tmp PGDATABASE=postgres; cd /home/{USER}; {script}"
    )
}

fn as_user(session: &Session, container: &str, script: &str) -> Result<String> {
    session.podman.podman([
        "exec",
        "--user",
        USER,
        container,
        "/bin/bash",
        "-ec",
        script,
    ])
}

/// pgbench runs all the time. The image is started, its indexes are checked against its tables, and the sums of its
/// accounts, tellers and branches against its history.
#[test]
fn postgres_starts_from_every_image_with_its_books_balanced() -> Result<()> {
    let bin = postgres();
    if bin.is_none() && ignored(&[Need::Program("pg_amcheck")]) {
        return Ok(());
    }
    let bin = bin.context("pg_amcheck is not below /usr/lib/postgresql")?;
    let Some(session) = Session::new(Base::Big)? else {
        return Ok(());
    };
    install(&bin, &session.root())?;
    let id = session.container.id.clone();
    let start = "pg_ctl -D db -l log -w -o '-k /tmp -c listen_addresses=' start > /dev/null";
    as_user(
        &session,
        &id,
        &with_postgres(
            &bin,
            &format!(
                "initdb -D db -A trust -N > /dev/null; {start}; psql -qc 'create extension amcheck'; \
                 pgbench -qi -s 2 2> /dev/null; setsid pgbench -c 2 -T 100000 > bench 2>&1 < /dev/null &"
            ),
        ),
    )?;
    let written = || {
        as_user(
            &session,
            &id,
            &with_postgres(
                &bin,
                "psql -Atc 'select count(*) > 100 from pgbench_history'",
            ),
        )
    };
    wait_until("pgbench writes", || written().is_ok_and(|said| said == "t"))?;
    for number in 0..saves(2)? {
        let image = session.registry.reference(&format!("db:{number}"));
        let options = ["--max-pause", "0", "--tls-verify=false"];
        let saved = save::save(&session.scratch, &session.roots, &id, &image, &options)?;
        let name = format!("copy-{number}");
        let copy =
            session
                .podman
                .run(&name, &image, &["--init=false"], &["/bin/sleep", "1000000"])?;
        let check = format!(
            "rm -f db/postmaster.pid; {start}; pg_amcheck --heapallindexed --parent-check postgres; \
             psql -Atc \"select count(*) > 100 and sum(delta) = (select sum(abalance) from pgbench_accounts) \
             and sum(delta) = (select sum(tbalance) from pgbench_tellers) \
             and sum(delta) = (select sum(bbalance) from pgbench_branches) from pgbench_history\""
        );
        let said = as_user(&session, &copy.id, &with_postgres(&bin, &check))
            .with_context(|| format!("save {number}: {}", saved.stderr))?;
        ensure!(
            said == "t",
            "save {number}: the books do not balance: {said}"
        );
        session
            .podman
            .podman(["rm", "--force", "--time", "0", &copy.id])?;
    }
    Ok(())
}

/// Packages are installed with pip one after another while a large tree is removed: whatever the markers report as done
/// is complete, or gone.
#[test]
fn pip_install_in_full_swing_and_rm_of_a_large_tree() -> Result<()> {
    let Some(session) = Session::new(Base::Big)? else {
        return Ok(());
    };
    for what in ["packages", "removal"] {
        session.write(what)?;
    }
    let marker = |name: &str| session.root().join("home/w").join(name);
    wait_until("they work", || {
        marker("installed").exists() && marker("removed").exists()
    })?;
    for number in 0..saves(2)? {
        let saved = session.save(&format!("n{number}"), &[])?;
        let seen = session
            .instant(&saved)
            .with_context(|| format!("save {number}: {}", saved.stderr))?;
        ensure!(
            seen.contains("packages") && seen.contains("removed"),
            "{seen}"
        );
    }
    Ok(())
}

/// A mapping whose only page stays dirty, so that no time stamp changes: each save has what was last written to it.
#[test]
fn a_page_that_stays_dirty_is_saved_as_it_is_each_time() -> Result<()> {
    let Some(session) = Session::new(Base::Big)? else {
        return Ok(());
    };
    // Enough other data for a round to run beside the container.
    session.podman.shell(
        &session.container,
        "mkdir -p /home/w; dd if=/dev/urandom of=/home/w/much bs=1M count=48 2> /dev/null",
    )?;
    session.write("page")?;
    let page = session.root().join("home/w/page");
    let shown = || -> Result<u64> {
        let bytes = fs::read(&page)?;
        let text = bytes.get(4096..4112).context("16 bytes")?;
        Ok(std::str::from_utf8(text)?.parse()?)
    };
    wait_until("the page is written", || shown().is_ok())?;
    for number in 0..saves(3)? {
        let before = shown()?;
        let saved = session.save(&format!("n{number}"), &[])?;
        let seen = session.instant(&saved)?;
        let value = seen.split_once("page ").map(|(_, rest)| rest);
        let value = value.and_then(|rest| rest.split(' ').next());
        let value: u64 = value.context("no page in the image")?.parse()?;
        ensure!(
            value >= before,
            "save {number} has {value}, written before it began was {before}: {}",
            saved.stderr
        );
        // The page stays dirty for as long as the kernel does not write it out by itself.
        let wrote = shown()?;
        wait_until("it writes on", || shown().is_ok_and(|now| now > wrote))?;
    }
    Ok(())
}

/// A pod of Kubernetes, written to while it is saved.
#[test]
fn a_pod_that_is_written_to_is_one_instant() -> Result<()> {
    let Some(lab) = Lab::new(Base::Big, Format::Oci)? else {
        return Ok(());
    };
    let pod = lab.containerd.run_pod(&lab.image, &PodOptions::default())?;
    fs::write(pod.rootfs.join("opt/writers.py"), fs::read(WRITERS)?)?;
    let home = pod.rootfs.join("home/w");
    fs::create_dir(&home)?;
    std::os::unix::fs::chown(&home, Some(1000), Some(1000))?;
    for what in ["counters", "tree"] {
        // Started by the runtime, so that it is in the pod's cgroup.
        let script = format!(
            "setsid /usr/bin/python3 /opt/writers.py {what} > /tmp/{what}.log 2>&1 < /dev/null &"
        );
        lab.containerd.shell(&pod, &script)?;
    }
    wait_until("the writers write", || {
        home.join("last").exists() && home.join("tree").exists()
    })?;
    let layout = lab.scratch.path().join("images").display().to_string();
    for number in 0..saves(3)? {
        let destination = format!("oci:{layout}:n{number}");
        let options = ["--max-pause", "0"];
        let saved = save::save(
            &lab.scratch,
            &lab.roots,
            &pod.container,
            &destination,
            &options,
        )?;
        let seen = output(&mut command(
            "python3",
            [INSTANT, &layout, &saved.digest, "2"],
        ))?;
        ensure!(
            seen.status.success() && String::from_utf8_lossy(&seen.stdout).contains("counters"),
            "save {number}: {}{}\n{}",
            String::from_utf8_lossy(&seen.stdout),
            String::from_utf8_lossy(&seen.stderr),
            saved.stderr
        );
    }
    Ok(())
}
