//! The steps of a live save, each tested at the moment at which only this step makes the image right: without the step,
//! its test fails.

use std::os::unix::fs::MetadataExt as _;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use upperdeck::layer::scan::Clock;

use super::Session;
use super::watched::WatchedSave;
use crate::host::docker::Running;
use crate::host::image::Base;
use crate::host::{Freezer, wait_at_most, wait_until};
use crate::save;

/// Maps a file at the first signal, and writes to one page of it at each signal, in the directory given as argument.
const MAPPER: &str = r#"
import mmap, os, signal, sys
home = sys.argv[1]
os.makedirs(home, exist_ok=True)
fd = os.open(f"{home}/page", os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, 1 << 20)
with open(f"{home}/much", "wb") as much:
    much.write(os.urandom(4 << 20))
maps, n = [], 0
def write(*_):
    global n
    n += 1
    maps[:] = maps or [mmap.mmap(fd, 1 << 20)]
    maps[0][4096:4112] = b"%016d" % n
signal.signal(signal.SIGUSR1, write)
open(f"{home}/ready", "w").close()
while True:
    signal.pause()
"#;

/// Starts a container whose first process is the mapper, with a directory mounted at each of `volumes`.
fn map(session: &mut Session, name: &str, at: &str, volumes: &[&str]) -> Result<()> {
    // On the file system of the container's own tree.
    let home = session.scratch.dir(&format!("podman/{name}"))?;
    let volumes: Vec<String> = volumes
        .iter()
        .map(|at| format!("--volume={}:{at}", home.display()))
        .collect();
    let mut options = vec!["--init=false", "--user=0"];
    options.extend(volumes.iter().map(String::as_str));
    let image = session.registry.reference("bases/python:1");
    let program = ["/usr/bin/python3", "-c", MAPPER, at];
    session.container = session.podman.run(name, &image, &options, &program)?;
    let ready = session.root().join("home/w/ready");
    wait_until("it waits for signals", || ready.exists())?;
    Ok(())
}

/// The time of the first write to the page in a save.
#[derive(Clone, Copy, PartialEq, Eq)]
enum FirstWrite {
    /// Long before its first list.
    BeforeTheList,
    /// After its first list has been made, through a mapping that is not in it.
    AfterTheList,
}

/// Lets a save read the page in a round, writes to it again before the freeze, and checks that this write is in the
/// image. `unnoticed`: only if the write changed no time stamp.
fn is_saved_as_it_was_last(
    session: &Session,
    tag: &str,
    first: FirstWrite,
    unnoticed: bool,
    options: &[&str],
) -> Result<()> {
    let stamp = || -> Result<(i64, u32)> {
        let meta = session.root().join("home/w/page").metadata()?;
        Ok((meta.ctime(), meta.ctime_nsec() as u32))
    };
    let mut number = shown(session).unwrap_or(0);
    let mut write = || -> Result<u64> {
        number += 1;
        kill(Pid::from_raw(session.container.pid), Signal::SIGUSR1)?;
        wait_until("it is written", || {
            shown(session).is_ok_and(|n| n == number)
        })?;
        Ok(number)
    };
    let settled = || -> Result<()> {
        let stamped = stamp()?;
        wait_until("the clock is well past the stamp", || {
            Clock::now().can_trust(stamped.0, stamped.1)
        })?;
        Ok(())
    };
    for attempt in 0..5 {
        // Its pages are clean.
        session
            .podman
            .shell(&session.container, "sync /home/w/page")?;
        if first == FirstWrite::BeforeTheList {
            write()?;
            settled()?;
        }
        let options = [&["--full", "--live-limit", "1MiB"], options].concat();
        let save = WatchedSave::start(session, &format!("{tag}-{attempt}"), &options)?;
        let list = save.asked()?;
        let mut mapped = list.mapped()?;
        if first == FirstWrite::AfterTheList {
            mapped = without(&mapped, b"/page");
            write()?;
            settled()?;
        }
        list.answer_with(&mapped)?;
        save.until("streaming")?;
        // The round is over when the next one opens the list.
        save.until("scanning")?;
        let list = save.asked()?;
        let before = stamp()?;
        let last = write()?;
        let moved = stamp()? != before;
        list.answer()?;
        let saved = save.finish()?;
        // The kernel may have written the page out by itself in between.
        if unnoticed && moved {
            continue;
        }
        let seen = session.instant(&saved)?;
        ensure!(
            seen.starts_with(&format!("page {last} ")),
            "{last} was written before the freeze, and the image has {seen}"
        );
        return Ok(());
    }
    anyhow::bail!("the page never stayed dirty")
}

/// The three steps that writes through mappings need, each at the moment at which nothing else helps. All share one
/// container, because its image is large.
#[test]
fn what_is_written_through_a_mapping_is_saved_as_it_was_last() -> Result<()> {
    // If files could be cloned, no round would read the page too early.
    let Some(mut session) = Session::on(Base::Big, Some("mkfs.ext4"), &|_| Ok(Vec::new()))? else {
        return Ok(());
    };
    map(&mut session, "own", "/home/w", &[])?;
    // The clock is read before the mappings are listed. A page that is dirtied right after the list is not written out,
    // and writes to it after it was read change no time stamp: only the file's stamp after the clock reveals it.
    is_saved_as_it_was_last(&session, "late", FirstWrite::AfterTheList, true, &[])
        .context("mapped after the list was made, then written to without a trace")?;
    // Listed files are written out before they are read: a page that was dirty long before then shows its next change.
    is_saved_as_it_was_last(&session, "listed", FirstWrite::BeforeTheList, false, &[])
        .context("mapped and dirty before the list")?;
    // A file that cannot be written out is read under the freeze whatever its stamps are: here a file of a volume that
    // is mapped through a second mount of the same directory, so that only its inode is known.
    map(
        &mut session,
        "twice",
        "/elsewhere",
        &["/home/w", "/elsewhere"],
    )?;
    let options = ["--include-volume", "/home/w"];
    is_saved_as_it_was_last(&session, "inode", FirstWrite::BeforeTheList, true, &options)
        .context("mapped and not written out")
}

/// Returns the content of the container's page.
fn shown(session: &Session) -> Result<u64> {
    let bytes = std::fs::read(session.root().join("home/w/page"))?;
    let text = bytes.get(4096..4112).context("16 bytes")?;
    Ok(std::str::from_utf8(text)?.parse()?)
}

/// Returns the list as it was before the file was mapped.
fn without(mapped: &[u8], path: &[u8]) -> Vec<u8> {
    let lines = mapped.split_inclusive(|&b| b == b'\n');
    let others = lines.filter(|line| !line.trim_ascii_end().ends_with(path));
    others.flatten().copied().collect()
}

/// The moment at which a save is killed.
#[derive(Clone, Copy, Debug)]
enum KillPoint {
    /// Before the first scan of the tree.
    Scanning,
    /// In a round beside the running container.
    Streaming,
    /// Frozen, after the last scan.
    Frozen,
    /// Frozen, while changes are read into memory.
    Holding,
    /// Thawed, while the held data is being delivered.
    Delivering,
    /// Everything but manifest and tag is delivered.
    Manifest,
}

/// `kill -9` in every phase of a live save: the container runs, no tag refers to an incomplete image, and the next save
/// is right and builds on the last one that completed.
#[test]
fn killed_in_any_phase_of_a_live_save_the_container_runs_and_the_next_save_is_right() -> Result<()>
{
    // If files could be cloned, the held files would be clones and there would be no round.
    let Some(session) = Session::on(Base::Small, Some("mkfs.ext4"), &|_| Ok(Vec::new()))? else {
        return Ok(());
    };
    session.podman.shell(&session.container, save::WORK)?;
    let random = "dd if=/dev/urandom of=/home/researcher/work/big bs=1048576 count=64 2> /dev/null";
    session.podman.shell(&session.container, random)?;
    session.same(&session.save("first", &[])?)?;
    let freezer = Freezer::of(session.container.pid)?;
    for moment in [
        KillPoint::Scanning,
        KillPoint::Streaming,
        KillPoint::Frozen,
        KillPoint::Holding,
        KillPoint::Delivering,
        KillPoint::Manifest,
    ] {
        let context = || format!("{moment:?}");
        let script = format!(
            "echo {moment:?} > /opt/changed; rm -rf /srv/{moment:?}; mkdir -p /srv/{moment:?}"
        );
        session.podman.shell(&session.container, &script)?;
        killed_at(&session, &freezer, moment).with_context(context)?;
        wait_at_most(std::time::Duration::from_secs(1), "it thaws", || {
            !freezer.frozen()
        })
        .with_context(context)?;
        alive(&session, &session.container)?;
        let index = std::fs::read_to_string(format!("{}/index.json", session.layout()))?;
        ensure!(!index.contains("killed"), "{moment:?}: a tag: {index}");
        let saved = session.save(&format!("after-{moment:?}"), &[])?;
        ensure!(
            !saved.stderr.contains("saved anew"),
            "{moment:?}: {}",
            saved.stderr
        );
        session.same(&saved).with_context(context)?;
    }
    Ok(())
}

/// Begins a save and kills it at the moment. Repeats this if it was too late.
fn killed_at(session: &Session, freezer: &Freezer, moment: KillPoint) -> Result<()> {
    let limit = match moment {
        KillPoint::Streaming => "1MiB",
        _ => "1GiB",
    };
    for attempt in 0..20 {
        let tag = format!("killed-{moment:?}-{attempt}");
        let save = WatchedSave::start(session, &tag, &["--full", "--live-limit", limit])?;
        let list = save.asked()?;
        ensure!(!freezer.frozen(), "frozen too early");
        match moment {
            KillPoint::Scanning => return save.kill(),
            KillPoint::Streaming => {
                list.answer()?;
                save.until("streaming")?;
                ensure!(!freezer.frozen(), "frozen for a round");
                return save.kill();
            }
            _ => {}
        }
        // Stamped after the clock, so it has to be looked up in the mappings under the freeze.
        session
            .podman
            .shell(&session.container, "touch /opt/stamped")?;
        list.answer()?;
        wait_until("the container stands still", || freezer.frozen())?;
        let list = save.asked()?;
        ensure!(freezer.frozen(), "thawed too early");
        if let KillPoint::Frozen = moment {
            return save.kill();
        }
        list.answer()?;
        match moment {
            KillPoint::Holding => {
                let mut held = false;
                while freezer.frozen() && !held {
                    save.answer_rest();
                    held = has_open(save.pid(), "/work/big");
                }
                let held = held && freezer.frozen();
                save.kill()?;
                if held {
                    return Ok(());
                }
            }
            KillPoint::Delivering => {
                save.until_answering("paused")?;
                save.until_answering("streaming")?;
                ensure!(!freezer.frozen(), "frozen for the delivery");
                return save.kill();
            }
            _ => {
                save.until_answering("ready")?;
                return save.kill();
            }
        }
    }
    anyhow::bail!("it was never caught")
}

/// Returns whether a process has an open file whose path ends with `end`.
fn has_open(pid: u32, end: &str) -> bool {
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd"));
    let links = descriptors.into_iter().flatten().flatten();
    let mut links = links.filter_map(|entry| std::fs::read_link(entry.path()).ok());
    links.any(|link| link.to_string_lossy().ends_with(end))
}

fn alive(session: &Session, container: &Running) -> Result<()> {
    let said = session.podman.shell(container, "echo alive")?;
    ensure!(said == "alive", "{said}");
    Ok(())
}
