//! What follows the tag of a save, and a cancellation while the tag is written: the save is reported as it is.

use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::http::Slow;
use super::saves::{command, container};
use super::stand_in::StandIn;
use super::world::World;
use super::{Lab, Outcome};

/// Longer than anything takes, even on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);
const LABELS: (&str, &str) = ("GET", "/api/v2.0/labels");
const TAG: (&str, &str) = ("PUT", "/manifests/");

fn events(output: &Output) -> Vec<Value> {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let lines = text.lines();
    lines
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect()
}

/// Saves with a label while `which` requests are answered slowly, and interrupts the save once one was sent.
async fn save(
    (lab, stand_in, world): (&Lab, &StandIn, &World),
    to: &str,
    (method, path): (&'static str, &'static str),
    slow: Slow,
    interrupt: bool,
) -> Result<(Output, bool), Box<dyn std::error::Error>> {
    {
        let mut state = stand_in.state.lock().unwrap();
        (state.slow, state.slowed) = (Some((method, path, slow)), 0);
    }
    let mut command = command(world, &lab.admin, &format!("{}/{to}", lab.host), "state");
    command.arg("--harbor-label=cpu");
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn()?;
    let pid = Pid::from_raw(child.id().try_into()?);
    let ends = tokio::task::spawn_blocking(move || child.wait_with_output());
    let until = Instant::now() + PATIENCE;
    while interrupt && stand_in.state.lock().unwrap().slowed == 0 {
        assert!(Instant::now() < until && !ends.is_finished(), "not sent");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    if interrupt {
        kill(pid, Signal::SIGINT)?;
    }
    let output = tokio::time::timeout(PATIENCE, ends).await???;
    stand_in.state.lock().unwrap().slow = None;
    let (repository, tag) = to.split_once(':').unwrap();
    let tagged = lab.to(repository).digest_of(tag).await?.is_some();
    Ok((output, tagged))
}

#[tokio::test(flavor = "multi_thread")]
async fn labels_that_take_too_long_do_not_turn_a_save_into_a_failure() -> Outcome {
    let lab = Lab::start().await?;
    let (Some(stand_in), home) = (&lab.stand_in, tempfile::tempdir()?) else {
        return lab.end().await;
    };
    let Some(world) = container(home.path()) else {
        return lab.end().await;
    };
    let project = lab.project(None).await;
    let cases = [
        ("hangs", Slow::Never, true),
        ("drips", Slow::Drip, true),
        // The time limit is one for the whole answer, not for its next byte.
        ("drips-on", Slow::Drip, false),
    ];
    for (n, (case, slow, interrupt)) in cases.into_iter().enumerate() {
        let to = format!("{project}/x:{case}");
        let saving = save((&lab, stand_in, &world), &to, LABELS, slow, interrupt);
        let (output, tagged) = saving.await?;
        let events = events(&output);
        assert_eq!(output.status.code(), Some(0), "{case}: {events:?}");
        assert!(tagged, "{case}");
        let at = |event: &str| events.iter().position(|line| line["event"] == event);
        let warned = events
            .iter()
            .position(|line| line["code"] == "labels_missing");
        let (saved, warned) = (at("saved").ok_or(case)?, warned.ok_or(case)?);
        assert!(saved < warned, "{case}: {events:?}");
        assert_eq!(at("failed"), None, "{case}");
        let message = events[warned]["message"].as_str().unwrap_or_default();
        let why = if interrupt {
            "cancelled"
        } else {
            "within 15 s"
        };
        assert!(message.contains(why), "{case}: {message}");
        // What the save took is kept: the next one has nothing to read again.
        let streamed = events.iter().any(|line| line["phase"] == "streaming");
        assert_eq!(streamed, n == 0, "{case}: {events:?}");
    }
    lab.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancellation_while_the_tag_is_written_waits_for_the_answer() -> Outcome {
    let lab = Lab::start().await?;
    let (Some(stand_in), home) = (&lab.stand_in, tempfile::tempdir()?) else {
        return lab.end().await;
    };
    let Some(world) = container(home.path()) else {
        return lab.end().await;
    };
    let project = lab.project(None).await;
    let late = Slow::After(Duration::from_secs(2));
    for (case, slow, exit) in [("late", late, 0), ("never", Slow::Never, 130)] {
        let to = format!("{project}/x:{case}");
        let saving = save((&lab, stand_in, &world), &to, TAG, slow, true);
        let (output, tagged) = saving.await?;
        let events = events(&output);
        assert_eq!(output.status.code(), Some(exit), "{case}: {events:?}");
        assert!(tagged, "{case}: the request was carried out");
        let failed = events.iter().find(|line| line["event"] == "failed");
        let message = failed.and_then(|line| line["message"].as_str());
        let message = message.unwrap_or_default();
        assert!(!message.contains("nothing was saved"), "{case}: {message}");
        assert_eq!(message.contains("not known"), exit != 0, "{case}");
        let saved = events.iter().any(|line| line["event"] == "saved");
        assert_eq!(saved, exit == 0, "{case}");
    }
    lab.end().await
}
