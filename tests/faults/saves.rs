//! Saves under faults, and what is asked of each.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use crate::case::{Case, Made, Right};
use crate::harness::{self, Outcome, Stop, Test};
use crate::plan;
use crate::tracer::{self, Order, Report, Target};
use crate::world::World;

/// A save takes a second under the tracer; one that takes this long hangs.
const HANGS: Duration = Duration::from_secs(60);
/// Of the table in the README, without 2: the command line is right.
const EXITS: [i32; 7] = [0, 1, 66, 69, 75, 77, 130];

fn all() -> bool {
    std::env::var_os("UPPERDECK_FAULTS").is_some_and(|value| value == "all")
}

pub fn tests() -> Vec<Test> {
    vec![
        Test::new("layer", || one(|_| Ok(()), "layer", Made::Layer, &[])),
        Test::new("full_save_to_a_layout", || {
            one(|_| Ok(()), "full", Made::Layout, &["--pause", "none"])
        }),
        Test::new("live_save_to_an_archive", || {
            one(|_| Ok(()), "live", Made::Archive, &["--live-limit", "1M"])
        }),
        Test::new("live_save_on_top_of_an_earlier_one", || {
            one(World::work_on, "delta", Made::Layout, &[])
        }),
    ]
}

/// Runs what the order says; an error where it hangs.
fn run(order: &Order) -> Result<Report> {
    let _ = fs::remove_file(order.said.join("report"));
    let mut child = tracer::command(order)?.stdin(Stdio::null()).spawn()?;
    let begun = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            ensure!(status.success(), "the tracer: {status}");
            return tracer::report(order);
        }
        if begun.elapsed() > HANGS {
            child.kill()?;
            child.wait()?;
            bail!("IT HANGS");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn one(between: fn(&World) -> Result<()>, name: &'static str, made: Made, options: &[&str]) -> Outcome {
    harness::need_root()?;
    let dir = tempfile::Builder::new().prefix("upperdeck-faults-").tempdir().map_err(Stop::from)?;
    let world = World::new(dir.path())?;
    world.work()?;
    let mut case = Case::new(name, &world, made, options);
    case.begin()?;
    if name == "delta" {
        case.undisturbed()?;
        case.keep()?;
        between(&world)?;
        case.begin()?;
    }
    case.undisturbed()?;
    let right = case.right()?;
    Ok(faults(&case, &right)?)
}

fn faults(case: &Case<'_>, right: &Right) -> Result<()> {
    case.begin()?;
    let home = &case.world.home;
    let mut order = Order {
        arguments: case.arguments(),
        home: home.clone(),
        said: home.join("said"),
        ..Order::default()
    };
    let first = run(&order)?;
    ensure!(first.exit == Some(0), "undisturbed: {first:?}: {}", said(&order.said));
    ensure!(case.is(right)? == Some("the same image"), "undisturbed: another image");
    let targets = plan::faults(&first, &home.display().to_string(), all(), 40);
    println!("{}: {} calls that matter, {} faults", case.name, first.calls.len(), targets.len());
    let (mut ends, mut wrong): (BTreeMap<String, u32>, Vec<String>) = Default::default();
    for target in targets {
        case.begin()?;
        order.arguments = case.arguments();
        order.target = Some(target.clone());
        let report = run(&order);
        let hit = report.as_ref().ok().and_then(|report| report.hit.clone());
        let about = hit.map_or("not reached".to_owned(), |hit| hit.about);
        let judged = report.and_then(|report| judge(case, right, &order, &report));
        let words = match judged {
            Ok(end) => end,
            Err(error) => {
                let text = format!(
                    "{} {} of {about} (call {}): {error:#}\n    it said: {}",
                    target.call,
                    target.fault,
                    target.nth,
                    said(&order.said)
                );
                println!("{text}");
                wrong.push(text);
                "WRONG".to_owned()
            }
        };
        if std::env::var_os("UPPERDECK_FAULTS_TOLD").is_some() {
            println!("{} {} of {about}: {words}: {}", target.call, target.fault, said(&order.said));
        }
        *ends.entry(format!("{} {}: {words}", target.call, target.fault)).or_default() += 1;
    }
    for (end, count) in ends {
        println!("  {count:4} {end}");
    }
    ensure!(wrong.is_empty(), "{} of them wrong:\n{}", wrong.len(), wrong.join("\n"));
    Ok(())
}

fn said(dir: &Path) -> String {
    fs::read_to_string(dir.join("stderr")).unwrap_or_default().trim_end().to_owned()
}

/// What is asked of a save whose call failed; in words how it ended.
fn judge(case: &Case<'_>, right: &Right, order: &Order, report: &Report) -> Result<String> {
    case.world.runs()?;
    let said = said(&order.said);
    ensure!(!said.contains("panicked"), "a panic");
    ensure!(report.stayed == 0, "{} of its processes stay", report.stayed);
    let memory = order.target.as_ref().is_some_and(|t: &Target| ["mmap", "clone", "clone3"].contains(&t.call.as_str()));
    let end = match (report.exit, &report.signal) {
        (Some(0), None) => {
            let what = case.is(right)?.context("exit 0, and no image")?;
            case.left_behind(right, false)?;
            what.to_owned()
        }
        (Some(exit), None) => {
            ensure!(EXITS.contains(&exit), "exit {exit}");
            message(&said)?;
            if !case.again {
                ensure!(case.is(right)?.is_none() , "exit {exit}, and an image");
            }
            case.left_behind(right, true)?;
            format!("exit {exit}")
        }
        // The allocator has no other way to say that there is no memory.
        (None, Some(signal)) if memory => signal.clone(),
        other => bail!("it ended with {other:?}"),
    };
    case.undisturbed().context("the save after it")?;
    case.is(right).context("the save after it")?.context("the save after it: no image")?;
    case.world.runs()?;
    Ok(end)
}

/// One line that says what failed and why.
fn message(said: &str) -> Result<()> {
    let last = said.lines().last().context("it says nothing")?;
    let text = last.strip_prefix("upperdeck: ").context("no message")?;
    ensure!(!text.contains("Os {") && !text.contains("\\n"), "no message for people");
    ensure!(text.contains(": ") || text.contains(';'), "no cause");
    Ok(())
}
