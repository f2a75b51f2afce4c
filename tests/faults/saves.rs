//! Runs saves under faults, and checks the result of each.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use nix::mount::MsFlags;

use crate::case::{AFTER, Case, ExpectedImage, SaveOutput};
use crate::disk::Disk;
use crate::harness::{self, Outcome, Stop, Test};
use crate::plan;
use crate::registry::Registry;
use crate::tracer::{self, ConcurrentWrite, Fault, Order, Report, Target};
use crate::world::{CHANGES, CHANGING, World};

/// Time limit for a save, which takes a second under the tracer: a longer run counts as a hang.
const HANGS: Duration = Duration::from_secs(60);
/// Exit codes of the table in the README, without 2, as the command line is valid.
const EXITS: [i32; 7] = [0, 1, 66, 69, 75, 77, 130];

/// Returns the faults wanted: all, those of one call, or (`None`) a few of each.
fn wanted() -> Option<String> {
    std::env::var("UPPERDECK_FAULTS").ok()
}

fn all() -> bool {
    wanted().is_some_and(|value| value == "all")
}

pub fn tests() -> Vec<Test> {
    vec![
        Test::new("layer", || one("layer", SaveOutput::Layer, &[])),
        Test::new("full_save_to_a_layout", || {
            one("full", SaveOutput::Layout, &["--pause", "none"])
        }),
        Test::new("live_save_to_an_archive", || {
            one("live", SaveOutput::Archive, &["--live-limit", "1M"])
        }),
        Test::new("live_save_with_clones", || {
            one("clones", SaveOutput::Layout, &["--live-limit", "64K"])
        }),
        Test::new("live_save_on_top_of_an_earlier_one", || {
            one("delta", SaveOutput::Layout, &[])
        }),
        Test::new("live_save_to_a_registry", || {
            one("registry", SaveOutput::Layout, &[])
        }),
        Test::new("few_descriptors", few_descriptors),
        Test::new("full_disks", full_disks),
        Test::new("clock_that_jumps", clock_that_jumps),
    ]
}

/// Runs an order. Fails if it hangs.
fn run(order: &Order) -> Result<Report> {
    let _ = fs::remove_file(order.output.join("report"));
    let mut child = tracer::command(order)?.stdin(Stdio::null()).spawn()?;
    let begun = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            ensure!(status.success(), "the tracer: {status}");
            return tracer::report(order);
        }
        if begun.elapsed() > HANGS {
            let traced = stacks(child.id());
            child.kill()?;
            child.wait()?;
            bail!("IT HANGS: {traced}");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Returns the kernel stacks of the processes below the tracer.
fn stacks(tracer: u32) -> String {
    let mut told = String::new();
    for process in children(tracer) {
        for task in fs::read_dir(format!("/proc/{process}/task"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let read = |name: &str| fs::read_to_string(task.path().join(name)).unwrap_or_default();
            let (name, call, stack) = (read("comm"), read("syscall"), read("stack"));
            let stack: Vec<_> = stack.lines().take(4).map(str::trim).collect();
            told += &format!(
                "\n      {} {}: {} {}",
                process,
                name.trim(),
                call.trim(),
                stack.join(" ")
            );
        }
        told += &stacks(process);
    }
    told
}

fn children(process: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{process}/task"))
        .into_iter()
        .flatten()
        .flatten();
    let lists = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    lists
        .flat_map(|list| {
            list.split_whitespace()
                .filter_map(|n| n.parse().ok())
                .collect::<Vec<_>>()
        })
        .collect()
}

/// A directory for a world; on a file system of its own where files have to be cloned.
enum Place {
    Disk(Disk),
    Temporary(tempfile::TempDir),
}

impl Place {
    fn new(clones: bool) -> Result<Self, Stop> {
        harness::need_root()?;
        if clones {
            return match Disk::new("mkfs.xfs") {
                Ok(disk) => Ok(Self::Disk(disk)),
                Err(error) => Err(Stop::Ignored(error.to_string())),
            };
        }
        let dir = tempfile::Builder::new()
            .prefix("upperdeck-faults-")
            .tempdir()?;
        Ok(Self::Temporary(dir))
    }

    fn path(&self) -> PathBuf {
        match self {
            Self::Disk(disk) => disk.path(),
            Self::Temporary(dir) => dir.path().to_owned(),
        }
    }
}

fn one(name: &'static str, made: SaveOutput, options: &[&str]) -> Outcome {
    let place = Place::new(name == "clones")?;
    let world = World::new(&place.path())?;
    world.work()?;
    let registry = if name == "registry" {
        Some(Registry::start(&world.home)?)
    } else {
        None
    };
    let made = registry.as_ref().map_or(made, Registry::made);
    let mut case = Case::new(name, &world, made, options);
    case.meanwhile = ["live", "clones"].contains(&name);
    case.begin()?;
    if name == "delta" {
        case.undisturbed()?;
        case.keep()?;
        world.work_on()?;
        case.begin()?;
    }
    case.undisturbed()?;
    let right = case.right()?;
    Ok(faults(&case, &right)?)
}

fn order(case: &Case<'_>) -> Order {
    let home = case.world.home.clone();
    let meanwhile = ConcurrentWrite {
        call: "preadv2".to_owned(),
        about: "home/user/sparse".to_owned(),
        file: case.world.inside(CHANGES),
        content: AFTER.repeat(CHANGING),
    };
    Order {
        arguments: case.arguments(),
        output: home.join("said"),
        home,
        meanwhile: case.meanwhile.then_some(meanwhile),
        ..Order::default()
    }
}

fn faults(case: &Case<'_>, right: &ExpectedImage) -> Result<()> {
    case.begin()?;
    let mut order = order(case);
    let first = run(&order)?;
    ensure!(
        first.exit == Some(0),
        "undisturbed: {:?}: {}",
        first.exit,
        output_of(&order.output)
    );
    let same = case.is(right)?.context("undisturbed: no image")?;
    ensure!(
        case.meanwhile || same == "the same image",
        "undisturbed: {same}"
    );
    let targets = plan::faults(&first, &order, wanted().as_deref());
    println!(
        "{}: {} calls that matter, {} faults",
        case.name,
        first.calls.len(),
        targets.len()
    );
    let mut ends = RunResults::default();
    for target in targets {
        case.begin()?;
        order.arguments = case.arguments();
        order.target = Some(target.clone());
        ends.judge(
            case,
            right,
            &order,
            &format!("{} {}", target.call, target.fault),
        );
    }
    ends.over().map_err(|stop| match stop {
        Stop::Failed(text) | Stop::Ignored(text) => anyhow::Error::msg(text),
    })
}

/// The results of the runs, and the wrong ones among them.
#[derive(Default)]
struct RunResults {
    counts: BTreeMap<String, u32>,
    wrong: Vec<String>,
    last_exit: Option<i32>,
}

impl RunResults {
    fn judge(&mut self, case: &Case<'_>, right: &ExpectedImage, order: &Order, what: &str) {
        let report = run(order);
        let hit = report.as_ref().ok().and_then(|report| report.hit.clone());
        let about = hit.map_or(String::new(), |hit| format!(" of {}", hit.about));
        let nth = order
            .target
            .as_ref()
            .map_or(String::new(), |target| format!(" (call {})", target.nth));
        self.last_exit = report.as_ref().ok().and_then(|report| report.exit);
        let text = output_of(&order.output);
        let judged = report.and_then(|report| judge(case, right, order, &report));
        if judged.is_err() {
            // The next run must not suffer from it.
            case.world.thaw();
        }
        if std::env::var_os("UPPERDECK_FAULTS_TOLD").is_some() {
            let end = judged.as_ref().map_or("WRONG", String::as_str);
            println!("{what}{about}{nth}: {end}: {text}");
        }
        if judged.is_err() {
            self.add(what, &format!("{about}{nth}: {text}"), judged);
        } else {
            self.add(what, &text, judged);
        }
    }

    fn add(&mut self, what: &str, said: &str, judged: Result<String>) {
        let words = judged.unwrap_or_else(|error| {
            let text = format!("{what}{said}\n    {error:#}");
            println!("{text}");
            self.wrong.push(text);
            "WRONG".to_owned()
        });
        *self.counts.entry(format!("{what}: {words}")).or_default() += 1;
    }

    fn over(self) -> Outcome {
        for (end, count) in self.counts {
            println!("  {count:4} {end}");
        }
        if self.wrong.is_empty() {
            return Ok(());
        }
        Err(Stop::Failed(format!(
            "{} of them wrong:\n{}",
            self.wrong.len(),
            self.wrong.join("\n")
        )))
    }
}

fn output_of(dir: &Path) -> String {
    fs::read_to_string(dir.join("stderr"))
        .unwrap_or_default()
        .trim_end()
        .to_owned()
}

/// Checks a save with a failed call. Returns a description of its result.
fn judge(case: &Case<'_>, right: &ExpectedImage, order: &Order, report: &Report) -> Result<String> {
    case.world.runs()?;
    let said = output_of(&order.output);
    let memory = order
        .target
        .as_ref()
        .is_some_and(|target| target.call == "mmap");
    // The standard library and the allocator have no other way to report that memory is exhausted.
    ensure!(memory || !said.contains("panicked"), "a panic");
    ensure!(
        report.stayed == 0,
        "{} of its processes stay",
        report.stayed
    );
    let end = match (report.exit, &report.signal) {
        (Some(0), None) => {
            let what = case.is(right)?.context("exit 0, and no image")?;
            case.left_behind(right, false)?;
            what.to_owned()
        }
        (Some(101), None) if memory => "exit 101".to_owned(),
        (Some(exit), None) => {
            ensure!(EXITS.contains(&exit), "exit {exit}");
            message(&said, order.target.as_ref())?;
            // An error after the tag was written says that there is an image.
            let saved = ["is saved, but", "is written, but"]
                .iter()
                .any(|word| said.contains(word));
            if !case.again {
                ensure!(
                    case.is(right)?.is_some() <= saved,
                    "exit {exit}, and an image"
                );
            }
            case.left_behind(right, !saved)?;
            format!("exit {exit}")
        }
        (None, Some(signal)) if memory => signal.clone(),
        other => bail!("it ended with {other:?}"),
    };
    case.undisturbed().context("the save after it")?;
    case.is(right)
        .context("the save after it")?
        .context("the save after it: no image")?;
    case.world.runs()?;
    Ok(end)
}

/// Checks for one line that says what failed and why, with the kernel's own error text where a call failed once.
fn message(said: &str, target: Option<&Target>) -> Result<()> {
    let last = said.lines().last().context("it says nothing")?;
    let text = last.strip_prefix("upperdeck: ").context("no message")?;
    ensure!(
        !text.contains("Os {") && !text.contains("\\n") && !text.contains("\\\""),
        "no message for people"
    );
    ensure!(text.contains(": ") || text.contains(';'), "no cause");
    if let Some(Target {
        fault: Fault::Fails(number) | Fault::FailsFrom(number),
        ..
    }) = target
    {
        let words = std::io::Error::from_raw_os_error(*number).to_string();
        let words = words.split(" (").next().unwrap_or_default();
        ensure!(text.contains(words), "it does not say {words:?}");
    }
    Ok(())
}

/// A process with a low limit of open files: the limit is reached at every descriptor that a save opens.
fn few_descriptors() -> Outcome {
    let place = Place::new(false)?;
    let world = World::new(&place.path())?;
    world.work()?;
    let case = Case::new("files", &world, SaveOutput::Layout, &[]);
    case.begin()?;
    case.undisturbed()?;
    let right = case.right()?;
    let mut ends = RunResults::default();
    for files in (8..64).step_by(if all() { 1 } else { 7 }) {
        case.begin()?;
        let order = Order {
            files: Some(files),
            ..order(&case)
        };
        ends.judge(&case, &right, &order, "open files");
    }
    ends.over()
}

/// File systems that are really full: that of the destination, and that of the state.
fn full_disks() -> Outcome {
    let place = Place::new(false)?;
    let world = World::new(&place.path())?;
    world.work()?;
    for made in [SaveOutput::Layer, SaveOutput::Layout, SaveOutput::Archive] {
        let case = Case::new("disk", &world, made, &[]);
        case.begin()?;
        case.undisturbed()?;
        let right = case.right()?;
        let mut ends = RunResults::default();
        for name in ["out", "state"] {
            for blocks in [1, 8, 256, 2, 3, 4, 64]
                .into_iter()
                .take(if all() { 7 } else { 3 })
            {
                case.begin()?;
                let full = Full::new(&world.home.join(name), blocks)?;
                let order = order(&case);
                let report = run(&order)?;
                let text = output_of(&order.output);
                ends.add(
                    &format!("{name}, {blocks} pages"),
                    &text,
                    full.judge(&case, &right, &report, &text),
                );
                drop(full);
            }
        }
        ends.over()?;
    }
    Ok(())
}

/// A file system of a given number of pages.
struct Full(PathBuf);

impl Full {
    fn new(at: &Path, pages: u32) -> Result<Self> {
        let options = format!("size={},mode=0700", pages * 4096);
        nix::mount::mount(
            Some("full"),
            at,
            Some("tmpfs"),
            MsFlags::empty(),
            Some(options.as_str()),
        )?;
        Ok(Self(at.to_owned()))
    }

    fn judge(
        &self,
        case: &Case<'_>,
        right: &ExpectedImage,
        report: &Report,
        said: &str,
    ) -> Result<String> {
        case.world.runs()?;
        ensure!(!said.contains("panicked"), "a panic");
        let end = match report.exit {
            Some(0) => case.is(right)?.context("exit 0, and no image")?.to_owned(),
            Some(exit) => {
                ensure!(exit == 1, "exit {exit}");
                ensure!(
                    said.contains("No space left on device"),
                    "it does not say why"
                );
                ensure!(case.is(right)?.is_none(), "exit {exit}, and an image");
                format!("exit {exit}")
            }
            None => bail!("{:?}", report.signal),
        };
        case.left_behind(right, report.exit != Some(0))?;
        // Make room again.
        nix::mount::mount(
            None::<&str>,
            &self.0,
            None::<&str>,
            MsFlags::MS_REMOUNT,
            Some("size=64m"),
        )?;
        case.undisturbed().context("the save after it")?;
        case.is(right)
            .context("the save after it")?
            .context("the save after it: no image")?;
        Ok(end)
    }
}

impl Drop for Full {
    fn drop(&mut self) {
        if let Err(error) = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH) {
            println!("{}: {error}", self.0.display());
        }
    }
}

/// Jumps of hours forwards and backwards, before, during and between saves.
fn clock_that_jumps() -> Outcome {
    const HOUR: i64 = 3600;
    let place = Place::new(false)?;
    let world = World::new(&place.path())?;
    world.work()?;
    let mut case = Case::new(
        "clock",
        &world,
        SaveOutput::Archive,
        &["--live-limit", "1M"],
    );
    case.meanwhile = true;
    case.begin()?;
    case.undisturbed()?;
    let right = case.right()?;
    case.begin()?;
    let mut order = order(&case);
    order.clock = vec![(0, 0)];
    let looks = run(&order)?.clock_reads;
    println!("{looks} looks at the clock");
    let mut ends = RunResults::default();
    let jumps = [
        -5 * HOUR,
        5 * HOUR,
        -50 * 365 * 24 * HOUR,
        30 * 365 * 24 * HOUR,
        -1,
        1,
    ];
    let (jumps, step) = if all() {
        (&jumps[..], 1)
    } else {
        (&jumps[..3], looks.div_ceil(3).max(1))
    };
    for &jump in jumps {
        for from in (0..=looks).step_by(step) {
            case.begin()?;
            order.clock = vec![(0, 0), (from, jump)];
            ends.judge(&case, &right, &order, &format!("{jump} s"));
            let saved = ends.last_exit == Some(0);
            ensure_stop(
                saved,
                &format!("{jump} s from look {from}: the save failed"),
            )?;
        }
    }
    ends.over()?;
    clock_between(&world)
}

fn ensure_stop(what: bool, why: &str) -> Outcome {
    if what {
        Ok(())
    } else {
        Err(Stop::Failed(why.to_owned()))
    }
}

/// The second save is at a time that is hours off, the third at the true one: nothing that changed in between is taken
/// for unchanged.
fn clock_between(world: &World) -> Outcome {
    for jump in [-7200, 7200] {
        let mut case = Case::new("between", world, SaveOutput::Layout, &[]);
        case.begin()?;
        case.again = true;
        for (round, shift) in [0, jump, 0, -jump].into_iter().enumerate() {
            let letter = ["a", "b", "c", "d"][round];
            world.change(letter)?;
            let mut order = order(&case);
            order.clock = vec![(0, shift)];
            let report = run(&order)?;
            ensure_stop(report.exit == Some(0), &output_of(&order.output))?;
            let saved = case.content(CHANGES)?;
            let right = saved == letter.repeat(CHANGING).into_bytes();
            ensure_stop(right, &format!("save {round}, {shift} s: an old file"))?;
        }
    }
    Ok(())
}
