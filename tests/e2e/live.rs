//! Saves a container that writes at full speed: every image is of one moment, and a second save costs only what
//! changed.

mod next;
mod programs;
mod rewritten;
mod steps;
mod watched;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use tokio_util::sync::CancellationToken;
use upperdeck::layer::capture;
use upperdeck::layer::scan::{self, Caps, Exclusions, Rules, Scan};
use upperdeck::node::overlay::xattr::Namespace;

use crate::host::docker::Running;
use crate::host::image::{Base, Format, base};
use crate::host::podman::Podman;
use crate::host::registry::Registry;
use crate::host::{Freezer, Roots, Scratch, command, output, run, wait_until};
use crate::lab::needs;
use crate::save::{
    self, LEFT_OUT, Saved, TOUCHED_BY_RUNTIMES, same_tree, unpack_layout, upperdeck_itself,
};
use crate::support::{Need, ignored};

const WRITERS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/e2e/host/writers.py");
const INSTANT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/e2e/host/instant.py");

/// Returns the number of saves of each kind. `UPPERDECK_SOAK=300` sets a higher number, for a long test.
fn saves(usual: u32) -> Result<u32> {
    Ok(match std::env::var("UPPERDECK_SOAK") {
        Ok(text) => text.parse()?,
        Err(_) => usual,
    })
}

/// A Podman container with Python in it.
struct Session {
    container: Running,
    podman: Podman,
    roots: Roots,
    registry: Registry,
    scratch: Scratch,
}

impl Session {
    fn new(kind: Base) -> Result<Option<Self>> {
        Self::on(kind, None, &|_| Ok(Vec::new()))
    }

    /// Starts the session with the options for Podman that `mounts` returns for the scratch directory.
    fn with(kind: Base, mounts: &dyn Fn(&Scratch) -> Result<Vec<String>>) -> Result<Option<Self>> {
        Self::on(kind, None, mounts)
    }

    /// Like `Session::with`, with the storage on a file system of its own, made by `mkfs`.
    fn on(
        kind: Base,
        mkfs: Option<&'static str>,
        mounts: &dyn Fn(&Scratch) -> Result<Vec<String>>,
    ) -> Result<Option<Self>> {
        let mut needs = needs(&["podman", "runc"]);
        needs.extend(mkfs.map(Need::Program));
        if kind == Base::Big {
            needs.push(Need::Program("debootstrap"));
        }
        if ignored(&needs) {
            return Ok(None);
        }
        let scratch = Scratch::new()?;
        if let Some(mkfs) = mkfs {
            let (image, at) = (scratch.path().join("disk"), scratch.dir("podman")?);
            fs::File::create(&image)?.set_len(4 << 30)?;
            run(command(mkfs, ["-q"]).arg(&image))?;
            run(command("mount", ["-o", "loop"]).arg(&image).arg(&at))?;
        }
        let registry = Registry::start(&scratch)?;
        let image = registry.push(&base(kind, Format::Oci)?, "bases/python:1")?;
        let podman = Podman::new(&scratch)?;
        let mounts = mounts(&scratch)?;
        let mut options = vec!["--init=false"];
        options.extend(mounts.iter().map(String::as_str));
        let container = podman.run("session", &image, &options, &["/bin/sleep", "1000000"])?;
        let roots = podman.roots(&scratch);
        Ok(Some(Self {
            container,
            podman,
            roots,
            registry,
            scratch,
        }))
    }

    fn write(&self, what: &str) -> Result<()> {
        let script = fs::read(WRITERS)?;
        let merged = &self.root();
        fs::create_dir_all(merged.join("opt"))?;
        fs::write(merged.join("opt/writers.py"), script)?;
        let log = what.replace(' ', "-");
        let background = format!(
            "setsid /usr/bin/python3 /opt/writers.py {what} > /tmp/{log}.log 2>&1 < /dev/null &"
        );
        self.podman.shell(&self.container, &background)?;
        Ok(())
    }

    /// Returns the root as the container sees it, including mounts.
    fn root(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root", self.container.pid))
    }

    fn layout(&self) -> String {
        self.scratch.path().join("images").display().to_string()
    }

    /// Saves without a limit on the pause: the time that a busy machine takes proves nothing.
    fn save(&self, tag: &str, options: &[&str]) -> Result<Saved> {
        let destination = format!("oci:{}:{tag}", self.layout());
        let options = [&["--max-pause", "0"], options].concat();
        save::save(
            &self.scratch,
            &self.roots,
            &self.container.id,
            &destination,
            &options,
        )
    }

    fn instant(&self, saved: &Saved) -> Result<String> {
        self.instant_but(saved, &[])
    }

    /// Checks that the image is of one moment, except for the files that the save reported.
    fn instant_but(&self, saved: &Saved, said: &[&str]) -> Result<String> {
        let layers = saved.metadata["base"]["layers"]
            .as_array()
            .context("layers")?
            .len();
        run(&mut command(
            "python3",
            [
                &[INSTANT, &self.layout(), &saved.digest, &layers.to_string()],
                said,
            ]
            .concat(),
        ))
    }

    /// Unpacks the image.
    fn unpacked(&self, saved: &Saved) -> Result<PathBuf> {
        let destination = saved.metadata["destination"].as_str();
        let tag = destination.and_then(|name| name.rsplit_once(':'));
        unpack_layout(Path::new(&self.layout()), tag.context("a tag")?.1)
    }

    /// Unpacks the image, and compares it with what the container sees.
    fn same(&self, saved: &Saved) -> Result<()> {
        let destination = saved.metadata["destination"]
            .as_str()
            .context("destination")?;
        self.same_as(destination)
    }

    /// Like [`Session::same`], for `oci:DIR:TAG`.
    fn same_as(&self, destination: &str) -> Result<()> {
        let name = destination.strip_prefix("oci:").context("a layout")?;
        let (dir, tag) = name.rsplit_once(':').context("a tag")?;
        let rootfs = unpack_layout(Path::new(dir), tag)?;
        let same = same_tree(
            &self.container.rootfs,
            &rootfs,
            // Podman itself makes the root 0555.
            &[LEFT_OUT, &["."]].concat(),
            TOUCHED_BY_RUNTIMES,
            1,
        );
        fs::remove_dir_all(rootfs.parent().context("a bundle")?)?;
        same
    }
}

fn layers(saved: &Saved) -> usize {
    saved.metadata["layers"].as_array().map_or(0, Vec::len)
}

#[test]
fn whatever_is_written_meanwhile_every_image_is_one_instant() -> Result<()> {
    let Some(session) = Session::new(Base::Big)? else {
        return Ok(());
    };
    for what in ["counters", "database", "tree"] {
        session.write(what)?;
    }
    for written in ["last", "db", "tree"] {
        let path = session.container.rootfs.join("home/w").join(written);
        wait_until("the writers write", || path.exists()).with_context(|| {
            let log =
                |what: &str| fs::read_to_string(session.container.rootfs.join("tmp").join(what));
            format!(
                "{:?}",
                ["counters.log", "database.log", "tree.log"].map(log)
            )
        })?;
    }
    let freezer = Freezer::of(session.container.pid)?;
    let mut pauses = Vec::new();
    let mut on_top = 0;
    for number in 0..saves(8)? {
        let saved = session.save(&format!("n{number}"), &[])?;
        let seen = session
            .instant(&saved)
            .with_context(|| format!("save {number}: {}", saved.stderr))?;
        ensure!(seen.contains("counters"), "nothing was written: {seen}");
        ensure!(!freezer.frozen(), "it stands still after a save");
        ensure!(
            saved.metadata["unstable"]
                .as_array()
                .is_some_and(Vec::is_empty),
            "{}",
            saved.metadata["unstable"]
        );
        on_top += u32::from(!saved.stderr.contains("saved anew"));
        pauses.push(saved.metadata["pause_ms"].as_f64().context("pause_ms")?);
    }
    pauses.sort_by(f64::total_cmp);
    eprintln!(
        "pause: median {:.0} ms, worst {:.0} ms",
        pauses[pauses.len() / 2],
        pauses[pauses.len() - 1]
    );
    ensure!(on_top >= 2, "no save was made on top of another");
    Ok(())
}

#[test]
fn large_files_on_xfs_are_cloned_at_one_instant() -> Result<()> {
    clones_are_of_one_instant("mkfs.xfs")
}

#[test]
fn large_files_on_btrfs_are_cloned_at_one_instant() -> Result<()> {
    clones_are_of_one_instant("mkfs.btrfs")
}

/// If files can be cloned, large ones that change constantly are cloned at the freeze and read afterwards.
fn clones_are_of_one_instant(mkfs: &'static str) -> Result<()> {
    let Some(session) = Session::on(Base::Big, Some(mkfs), &|_| Ok(Vec::new()))? else {
        return Ok(());
    };
    let mut upper = session.podman.podman([
        "inspect",
        "--format",
        "{{.GraphDriver.Data.UpperDir}}",
        &session.container.id,
    ])?;
    upper.truncate(upper.trim_end().len());
    ensure!(
        can_clone(Path::new(&upper))?,
        "no clones on a file system of {mkfs}: they were not tried"
    );
    session.write("pages")?;
    let ready = session.container.rootfs.join("home/w/pages");
    wait_until("the pages are written", || ready.exists())?;
    for number in 0..saves(4)? {
        let saved = session.save(&format!("n{number}"), &[])?;
        let seen = session
            .instant(&saved)
            .with_context(|| format!("save {number}: {}", saved.stderr))?;
        ensure!(seen.contains("pages"), "nothing was written: {seen}");
        ensure!(
            saved.metadata["unstable"]
                .as_array()
                .is_some_and(Vec::is_empty),
            "{}",
            saved.metadata["unstable"]
        );
    }
    Ok(())
}

/// A home on a volume that everything writes to is of the same moment as the rest.
#[test]
fn a_volume_that_is_written_to_is_saved_at_the_same_instant() -> Result<()> {
    let mounts = |scratch: &Scratch| {
        let home = scratch.dir("home")?;
        Ok(vec![format!("--volume={}:/home/w", home.display())])
    };
    let Some(session) = Session::with(Base::Big, &mounts)? else {
        return Ok(());
    };
    for what in ["counters", "database", "tree"] {
        session.write(what)?;
    }
    for written in ["last", "db", "tree"] {
        let path = session.root().join("home/w").join(written);
        wait_until("the writers write", || path.exists())?;
    }
    let (mut on_top, mut anew) = (0, Vec::new());
    for number in 0..saves(4)? {
        let options = ["--include-volume", "/home/w/"];
        let saved = session.save(&format!("n{number}"), &options)?;
        let seen = session
            .instant(&saved)
            .with_context(|| format!("save {number}: {}", saved.stderr))?;
        ensure!(seen.contains("counters"), "nothing was written: {seen}");
        ensure!(
            saved.metadata["saved_volumes"] == serde_json::json!(["/home/w"]),
            "{}",
            saved.metadata["saved_volumes"]
        );
        match saved
            .stderr
            .lines()
            .find(|line| line.contains("saved anew"))
        {
            Some(why) => anew.push(why.to_owned()),
            None => on_top += 1,
        }
    }
    ensure!(on_top >= 2, "no save was made on top of another: {anew:#?}");
    Ok(())
}

/// Volumes over paths that exist in the image, and inside another volume.
#[test]
fn volumes_hide_what_the_image_has_there_and_are_saved_by_what_changed() -> Result<()> {
    let mounts = |scratch: &Scratch| {
        let (outer, inner) = (scratch.dir("outer")?, scratch.dir("inner")?);
        fs::create_dir_all(outer.join("inner"))?;
        fs::create_dir_all(outer.join("dash/kept"))?;
        fs::write(outer.join("inner/below"), "covered by the other volume")?;
        fs::write(outer.join("dash/kept/file"), "of the volume")?;
        fs::write(inner.join("data"), vec![7; 70_000])?;
        fs::hard_link(inner.join("data"), inner.join("again"))?;
        let volume = |dir: &Path, at: &str| format!("--volume={}:{at}", dir.display());
        Ok(vec![volume(&outer, "/srv"), volume(&inner, "/srv/inner")])
    };
    let Some(session) = Session::with(Base::Small, &mounts)? else {
        return Ok(());
    };
    session
        .podman
        .shell(&session.container, save::WORK_WITHOUT_SRV)?;
    let both = ["--include-volume", "/srv/inner", "--include-volume", "/srv"];
    let check = |saved: &Saved, expected: usize| -> Result<()> {
        ensure!(layers(saved) == expected, "{}", saved.metadata["layers"]);
        let rootfs = session.unpacked(saved)?;
        for (directory, at, except) in [
            ("outer", "srv", &["inner", "inner/*"][..]),
            ("inner", "srv/inner", &[]),
        ] {
            let volume = session.scratch.path().join(directory);
            same_tree(&volume, &rootfs.join(at), except, &[], 1).with_context(|| at.to_owned())?;
        }
        // The mount points in the container's own tree come from the base.
        let left_out = [LEFT_OUT, &[".", "srv", "srv/*"]].concat();
        let root = &session.container.rootfs;
        same_tree(root, &rootfs, &left_out, TOUCHED_BY_RUNTIMES, 1)?;
        fs::remove_dir_all(rootfs.parent().context("a bundle")?)?;
        Ok(())
    };
    check(&session.save("first", &both)?, 3)?;
    check(&session.save("nothing", &both)?, 0)?;
    let change = |script: &str| session.podman.shell(&session.container, script);
    change(
        "echo more >> /srv/inner/again; rm -r /srv/dash; mkdir /srv/share; echo x > /srv/share/x",
    )?;
    check(&session.save("changed", &both)?, 2)?;
    change("mkdir /srv/dash; rm -r /srv/inner/data; echo own > /opt/own")?;
    let saved = session.save("deleted", &both)?;
    ensure!(!saved.stderr.contains("saved anew"), "{}", saved.stderr);
    check(&saved, 3)?;
    // With only one of them, the save makes a different image.
    let saved = session.save("one", &["--include-volume", "/srv/inner"])?;
    ensure!(saved.stderr.contains("saved anew"), "{}", saved.stderr);
    let rootfs = session.unpacked(&saved)?;
    ensure!(rootfs.join("srv/inner/again").exists());
    ensure!(
        rootfs.join("srv/dash/a-b").exists() && !rootfs.join("srv/share/x").exists(),
        "what is on a volume that was not asked for is in the image"
    );
    let not_saved = saved.metadata["volumes"].to_string();
    ensure!(
        not_saved.contains("\"/srv\"") && !not_saved.contains("/srv/inner\""),
        "{not_saved}"
    );
    Ok(())
}

#[test]
fn what_is_no_volume_is_refused_with_those_that_are() -> Result<()> {
    let mounts = |scratch: &Scratch| {
        let data = scratch.dir("volume")?;
        fs::write(data.join("file"), "x")?;
        let file = data.join("file");
        Ok(vec![
            format!("--volume={}:/data", data.display()),
            format!("--volume={}:/opt/one-file", file.display()),
            "--tmpfs=/scratch".to_owned(),
        ])
    };
    let Some(session) = Session::with(Base::Small, &mounts)? else {
        return Ok(());
    };
    session.podman.shell(
        &session.container,
        "ln -s /data /home/researcher/link; mkdir -p /home/researcher/plain",
    )?;
    for (path, why) in [
        ("/proc", "proc is mounted there"),
        ("/scratch", "tmpfs is mounted there"),
        ("/dev/shm", "tmpfs is mounted there"),
        ("/", "saved in any case"),
        ("/home/researcher/plain", "nothing is mounted there"),
        ("/home/researcher/link", "nothing is mounted there"),
        ("/data/deeper", "a path in what is mounted at /data"),
        ("/data/../data", "expected an absolute path"),
        ("/opt/one-file", "a single file is mounted there"),
    ] {
        let destination = format!("oci:{}:refused", session.layout());
        let mut commit = save::upperdeck("commit", &session.roots);
        commit.args([
            "--include-volume",
            path,
            &session.container.id,
            &destination,
        ]);
        let message = save::failed(&output(&mut commit)?, 2).with_context(|| path.to_owned())?;
        ensure!(
            message.contains(why) && message.contains("mounted are /data ("),
            "{path}: {message}"
        );
    }
    Ok(())
}

/// Returns what the program detects about the file system of a directory.
fn can_clone(dir: &Path) -> Result<bool> {
    let exclusions = Exclusions::new(Rules::default())?;
    let roots = scan::Roots {
        upper: dir.to_owned(),
        lowers: Vec::new(),
        data_only: Vec::new(),
        id_mapped: Vec::new(),
        lowers_known: false,
        namespace: Namespace::Trusted,
        volume: None,
    };
    let never = CancellationToken::new();
    let options = scan::Options {
        jobs: 1,
        uid_map: &[],
        gid_map: &[],
        exclusions: &exclusions,
        caps: Caps::default(),
        runtime_root_mode: None,
        cancel: &never,
    };
    Ok(capture::can_clone(&Scan::new(&roots, &options)?))
}

#[test]
fn a_second_save_is_what_changed_and_the_image_is_whole() -> Result<()> {
    let Some(session) = Session::new(Base::Small)? else {
        return Ok(());
    };
    session.podman.shell(&session.container, save::WORK)?;
    let first = session.save("first", &[])?;
    session.same(&first)?;
    let again = session.save("again", &[])?;
    ensure!(
        layers(&again) == 0,
        "layers for nothing: {}",
        again.metadata["layers"]
    );
    session.same(&again)?;
    let changes = [
        "echo more >> /usr/lib/app/main; rm /opt/new/other; mkdir /usr/bin/app/deeper",
        "rm -rf /home/researcher/work/deep; echo x > /home/researcher/work/b.ipynb; chmod 700 /srv",
        "rm -rf /opt/new; echo file > /opt/new; ln /home/researcher/work/noise /home/researcher/third",
        "mv /home/researcher/work /home/researcher/works; rm /opt/new; mkdir -p /opt/new/again",
        "rm -rf /srv; mkdir /srv; touch /srv/only",
    ];
    for (number, change) in changes.iter().enumerate() {
        session.podman.shell(&session.container, change)?;
        let saved = session.save(&format!("change-{number}"), &["--max-layers", "100"])?;
        ensure!(!saved.stderr.contains("saved anew"), "{}", saved.stderr);
        ensure!(
            layers(&saved) == 1,
            "{change}: {}",
            saved.metadata["layers"]
        );
        session.same(&saved).with_context(|| change.to_string())?;
    }
    // At another destination the earlier layers are copied; with --full everything is made anew.
    let elsewhere = format!(
        "oci:{}:x",
        session.scratch.path().join("elsewhere").display()
    );
    let saved = save::save(
        &session.scratch,
        &session.roots,
        &session.container.id,
        &elsewhere,
        &["--max-pause", "0"],
    )?;
    ensure!(layers(&saved) == 0, "{}", saved.metadata["layers"]);
    session.same(&saved)?;
    let full = session.save("full", &["--full"])?;
    ensure!(layers(&full) == 1, "{}", full.metadata["layers"]);
    session.same(&full)
}

#[test]
fn chains_end_at_the_cap_and_every_image_is_the_container() -> Result<()> {
    let Some(session) = Session::new(Base::Small)? else {
        return Ok(());
    };
    session.podman.shell(&session.container, save::WORK)?;
    let mut anew = 0;
    for number in 0..saves(12)? {
        // The changes depend only on the number, and undo some of the earlier ones.
        let script = format!(
            "cd /home/researcher; n={number}; echo $n > file$((n % 5)); rm -rf dir$((n % 3)); mkdir dir$((n % 3)); \
             echo $n > dir$((n % 3))/a; ln dir$((n % 3))/a dir$((n % 3))/b; rm -f file$(((n + 2) % 5)); \
             mv dir$(((n + 1) % 3)) moved 2> /dev/null && mv moved dir$(((n + 1) % 3)); chmod 7$((n % 8))5 /opt; \
             rm -rf /usr/lib/app/plugins; mkdir /usr/lib/app/plugins; echo $n > /usr/lib/app/plugins/p$((n % 4))"
        );
        session.podman.shell(&session.container, &script)?;
        let saved = session.save(&format!("n{number}"), &["--max-layers", "5"])?;
        anew += u32::from(saved.stderr.contains("saved anew"));
        let above = saved.metadata["layers_above_base"]
            .as_u64()
            .context("layers_above_base")?;
        ensure!(above <= 6, "{above} layers");
        session
            .same(&saved)
            .with_context(|| format!("save {number}"))?;
    }
    ensure!(anew >= 2, "saved anew {anew} times");
    Ok(())
}

#[test]
fn whatever_is_wrong_with_the_state_the_image_is_right() -> Result<()> {
    let Some(session) = Session::new(Base::Small)? else {
        return Ok(());
    };
    session.podman.shell(&session.container, save::WORK)?;
    let state = state_of(&session.roots);
    let only = || -> Result<std::path::PathBuf> {
        let mut files = fs::read_dir(&state)?.flatten().map(|e| e.path());
        files
            .find(|path| path.extension().is_some_and(|e| e == "state"))
            .context("no state was kept")
    };
    session.save("first", &[])?;
    let whole = fs::read(only()?)?;
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 4;
    let mut future = whole.clone();
    future[8] = 99;
    let damages: [(&str, Vec<u8>); 7] = [
        ("its checksum does not fit", flipped),
        ("it is cut off", whole[..10].to_vec()),
        ("it is cut off", whole[..200].to_vec()),
        (
            "its checksum does not fit",
            whole[..whole.len() - 1].to_vec(),
        ),
        ("it is cut off", Vec::new()),
        ("another version", future),
        ("no such file", b"something else entirely".to_vec()),
    ];
    let change = |what: &str| {
        let script = format!("echo {what} > /opt/changed; rm -f /srv/share/*; touch /srv/{what}");
        session.podman.shell(&session.container, &script)
    };
    for (number, (why, bytes)) in damages.into_iter().enumerate() {
        change(&number.to_string())?;
        fs::write(only()?, bytes)?;
        let saved = session.save(&format!("damaged-{number}"), &[])?;
        ensure!(
            saved.stderr.contains("saved anew") && saved.stderr.contains(why),
            "{why}: {}",
            saved.stderr
        );
        session.same(&saved)?;
    }
    // After deletion it is as if there had been no save, and the next save can build on this one again.
    change("deleted")?;
    fs::remove_dir_all(&state)?;
    let saved = session.save("deleted", &[])?;
    ensure!(layers(&saved) == 1, "{}", saved.metadata["layers"]);
    ensure!(saved.metadata["layers_above_base"] == 1);
    ensure!(!reports_state(&saved), "{}", saved.stderr);
    session.same(&saved)?;
    change("kept-again")?;
    let saved = session.save("kept-again", &[])?;
    ensure!(!reports_state(&saved), "{}", saved.stderr);
    ensure!(saved.metadata["layers_above_base"] == 2);
    session.same(&saved)?;
    // If nothing can be kept, this is reported and the save succeeds.
    fs::remove_dir_all(&state)?;
    fs::write(&state, "in the way")?;
    let saved = session.save("no-place", &[])?;
    ensure!(saved.stderr.contains("nothing is kept"), "{}", saved.stderr);
    session.same(&saved)?;
    fs::remove_file(&state)?;
    Ok(())
}

/// A full disk, at the first save and at a later one: what was kept before is usable for the next one.
#[test]
fn a_full_disk_costs_the_state_and_no_save() -> Result<()> {
    let Some(session) = Session::new(Base::Small)? else {
        return Ok(());
    };
    session.podman.shell(&session.container, save::WORK)?;
    let state = state_of(&session.roots);
    fs::create_dir(&state)?;
    // Unmounted with the scratch directory.
    run(command("mount", ["-t", "tmpfs", "-o", "size=1M", "tmpfs"]).arg(&state))?;
    let filler = state.join("of-somebody-else");
    let fill = || -> Result<()> {
        let mut file = fs::File::create(&filler)?;
        let full = std::io::copy(&mut std::io::repeat(1), &mut file);
        ensure!(full.is_err_and(|error| error.kind() == std::io::ErrorKind::StorageFull));
        Ok(())
    };
    let change = |what: &str| {
        let script = format!("echo {what} > /opt/changed; rm -rf /srv/*; mkdir /srv/{what}");
        session.podman.shell(&session.container, &script)
    };
    for what in ["full-at-first", "full-again"] {
        change(what)?;
        fill()?;
        let saved = session.save(what, &[])?;
        ensure!(saved.stderr.contains("nothing is kept"), "{}", saved.stderr);
        ensure!(saved.metadata["layers_above_base"] == 1);
        session.same(&saved)?;
    }
    fs::remove_file(&filler)?;
    change("with-room")?;
    session.same(&session.save("with-room", &[])?)?;
    // From here on there is a save to build on, which becomes older each time.
    for what in ["full-later", "full-still"] {
        change(what)?;
        fill()?;
        let saved = session.save(what, &[])?;
        ensure!(saved.stderr.contains("nothing is kept"), "{}", saved.stderr);
        ensure!(!saved.stderr.contains("saved anew"), "{}", saved.stderr);
        ensure!(saved.metadata["layers_above_base"] == 2);
        session.same(&saved)?;
    }
    fs::remove_file(&filler)?;
    change("room-again")?;
    let saved = session.save("room-again", &[])?;
    ensure!(!reports_state(&saved), "{}", saved.stderr);
    ensure!(saved.metadata["layers_above_base"] == 2);
    session.same(&saved)
}

/// Returns whether a save reported anything about what is kept for the next one.
fn reports_state(saved: &Saved) -> bool {
    ["full_save", "state_not_kept"]
        .iter()
        .any(|code| saved.stderr.contains(code))
}

#[test]
fn two_saves_at_once_wait_for_each_other() -> Result<()> {
    let Some(session) = Session::new(Base::Small)? else {
        return Ok(());
    };
    session.podman.shell(&session.container, save::WORK)?;
    let begin = |tag: &str| {
        upperdeck_itself("commit", &session.roots)
            .args([
                "--progress",
                "none",
                "--max-pause",
                "0",
                &session.container.id,
                &format!("oci:{}-{tag}:x", session.layout()),
            ])
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
    };
    let children = [begin("a")?, begin("b")?, begin("c")?];
    for (child, tag) in children.into_iter().zip(["a", "b", "c"]) {
        let done = child.wait_with_output()?;
        ensure!(
            done.status.success(),
            "{}",
            String::from_utf8_lossy(&done.stderr)
        );
        session.same_as(&format!("oci:{}-{tag}:x", session.layout()))?;
    }
    Ok(())
}

#[test]
fn a_pause_that_cannot_be_kept_ends_the_save() -> Result<()> {
    let Some(session) = Session::new(Base::Small)? else {
        return Ok(());
    };
    session.podman.shell(&session.container, save::WORK)?;
    let freezer = Freezer::of(session.container.pid)?;
    let destination = format!("oci:{}:bound", session.layout());
    let mut commit = save::upperdeck("commit", &session.roots);
    commit.args([
        "--progress",
        "none",
        "--max-pause",
        "1ms",
        &session.container.id,
        &destination,
    ]);
    let message = save::failed(&output(&mut commit)?, 1)?;
    ensure!(message.contains("--max-pause"), "{message}");
    ensure!(!freezer.frozen());
    ensure!(
        !Path::new(&session.layout()).join("index.json").exists(),
        "an image of a save that failed"
    );
    session.same(&session.save("after", &[])?)
}

/// Returns the directory where [`save::upperdeck`] keeps the state.
fn state_of(roots: &Roots) -> std::path::PathBuf {
    save::state_dir(roots)
}
