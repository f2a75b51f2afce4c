//! How often the page calls: one stream, none in a tab that is not seen, and no call more for saves that are over.

use std::time::{Duration, Instant};

use serde_json::json;
use upperdeck::service::job::State;

use crate::begin;
use crate::browser::{Browser, BrowserOptions, Outcome};
use crate::standin::Standin;

/// The most calls of a page in a minute in which nothing happens: the sessions every 15 s, the saves once, and one
/// each for an interval that begins or ends within it.
const MOST_A_MINUTE: usize = 7;

fn open(browser: &Browser, standin: &Standin) -> Outcome {
    browser.go(&standin.url("sessions"))?;
    let there = "return document.querySelectorAll('article button.main').length === 2";
    browser.until("the sessions", there, json!([])).map(drop)
}

/// Saves both sessions `times` times in this page, one after the other.
fn save_both(browser: &Browser, times: usize) -> Outcome {
    for _ in 0..times {
        for session in [1, 2] {
            let button = format!("article:nth-of-type({session}) button.main");
            browser.click(&button)?;
            browser.until(
                "the bar",
                "return document.querySelector('progress')",
                json!([]),
            )?;
            browser.until(
                "the end",
                "return !document.querySelector('progress')",
                json!([]),
            )?;
        }
    }
    Ok(())
}

/// Returns the calls within a stretch of time.
fn calls_in(standin: &Standin, stretch: Duration) -> Vec<String> {
    standin.world().calls.clear();
    let until = Instant::now() + stretch;
    while Instant::now() < until {
        std::thread::sleep(Duration::from_millis(200));
    }
    standin.world().calls.clone()
}

fn streams(calls: &[String]) -> usize {
    calls
        .iter()
        .filter(|call| call.starts_with("GET /events"))
        .count()
}

/// Makes the page believe that its tab is hidden or seen.
fn hide(browser: &Browser, hidden: bool) -> Outcome {
    let script = "Object.defineProperty(document, 'hidden', { configurable: true, get: () => arguments[0] });
        document.dispatchEvent(new Event('visibilitychange'))";
    let script = script.replace("arguments[0]", &hidden.to_string());
    browser.run(&script, json!([])).map(drop)
}

#[test]
fn ten_finished_saves_cost_no_calls() -> Outcome {
    let Some((browser, standin)) = begin(&BrowserOptions::default())? else {
        return Ok(());
    };
    open(&browser, &standin)?;
    save_both(&browser, 5)?;
    let ended = |save: &upperdeck::service::manager::api::Save| save.state == State::Succeeded;
    assert_eq!(
        standin
            .world()
            .saves
            .iter()
            .filter(|save| ended(save))
            .count(),
        10
    );
    // What the end of the last save causes.
    std::thread::sleep(Duration::from_secs(4));
    let calls = calls_in(&standin, Duration::from_secs(60));
    assert!(calls.len() <= MOST_A_MINUTE, "{}: {calls:#?}", calls.len());
    assert_eq!(streams(&calls), 0, "the stream stays open: {calls:#?}");
    browser.assert_clean()
}

#[test]
fn one_stream_serves_all_saves_and_none_a_hidden_tab() -> Outcome {
    let Some((browser, standin)) = begin(&BrowserOptions::default())? else {
        return Ok(());
    };
    standin.world().hold_at = Some(0.4);
    open(&browser, &standin)?;
    for session in [1, 2] {
        browser.click(&format!("article:nth-of-type({session}) button.main"))?;
    }
    let both = "return [...document.querySelectorAll('progress')].filter((bar) => bar.value > 0.35).length === 2";
    browser.until("both bars", both, json!([]))?;
    assert_eq!(streams(&standin.world().calls), 1);
    let of_one = |call: &&String| call.starts_with("GET /saves/");
    assert_eq!(
        standin.world().calls.iter().filter(of_one).count(),
        0,
        "the stream tells of each save"
    );
    hide(&browser, true)?;
    std::thread::sleep(Duration::from_secs(1));
    let calls = calls_in(&standin, Duration::from_secs(30));
    assert_eq!(streams(&calls), 0, "{calls:#?}");
    assert!(calls.len() <= 2, "a hidden tab calls often: {calls:#?}");
    standin.world().hold_at = None;
    hide(&browser, false)?;
    let both = "return document.querySelectorAll('.state .succeeded').length === 2";
    browser.until("both ends", both, json!([]))?;
    browser.assert_clean()
}

#[test]
fn a_save_says_its_name_for_how_long_and_why_it_waits() -> Outcome {
    use upperdeck::service::manager::api::{Waiting, WaitingReason};
    let Some((browser, standin)) = begin(&BrowserOptions::default())? else {
        return Ok(());
    };
    standin.world().hold_at = Some(0.4);
    open(&browser, &standin)?;
    browser.click("article:nth-of-type(1) button.main")?;
    browser.until(
        "the bar",
        "return document.querySelector('progress')?.value > 0.35",
        json!([]),
    )?;
    let name = "return document.querySelector('.running .of').textContent";
    assert_eq!(
        browser.run(name, json!([]))?,
        "jupyter-minji-training:2026-11-24-1530"
    );
    {
        let mut world = standin.world();
        let save = &mut world.saves[0];
        save.since = Some(crate::standin::ago(75));
        save.waiting = Some(Waiting {
            reason: WaitingReason::Cores,
            node: "gpu-03".to_owned(),
            until: None,
        });
    }
    browser.see("Waiting for free cores on gpu-03")?;
    browser.see("for 1 min")?;
    // Only where the administrator allows it can it be hurried.
    let button = "return document.querySelector('.why button').checkVisibility()";
    assert_eq!(browser.run(button, json!([]))?, false);
    standin.world().saves[0].can_hurry = true;
    browser.click(".why button")?;
    browser.see("It does not wait for free cores, as you asked")?;
    assert!(standin.world().saves[0].hurried);
    assert_eq!(standin.world().forged, 0);
    let title = "return /^4\\d% /.test(document.title)";
    browser.until("the percentage in the title", title, json!([]))?;
    browser.assert_clean()
}
