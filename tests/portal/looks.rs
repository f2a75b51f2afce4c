//! Appearance of each view, light and dark, on a desktop and on a phone: screenshots for review in
//! `target/portal-screenshots`, and automated checks.

use std::path::Path;

use serde_json::json;
use upperdeck::service::job::{Category, Code, Kind, Phase, State};
use upperdeck::service::manager::api::{Email, Progress, Save, Waiting, WaitingReason};

use crate::browser::{Browser, BrowserOptions, Outcome};
use crate::standin::{Standin, World};

fn populate(standin: &Standin) {
    let mut world = standin.world();
    world.me.administrator = true;
    let failed = world.ended(1, State::Failed, Some(Code::QuotaExceeded), 90_000);
    world.dead.push(failed.id);
    world.ended(1, State::Succeeded, None, 4_000);
    world.ended(0, State::Cancelled, None, 7_000);
    world.nodes = vec![
        World::node("cpu-11", true),
        World::node("gpu-03", true),
        World::node("gpu-04", false),
    ];
    world.nodes[1]
        .problems
        .push("/run/containerd cannot be read: permission denied".to_owned());
    world.hold_at = Some(0.4);
    world.me.start_url = Some("https://hub.example.org/spawn?image={reference}".to_owned());
    world.me.email = Some(Email {
        address: "minji@example.org".to_owned(),
        over_seconds: Some(600),
    });
    world.images[1].pinned = true;
    world.images[2].shared = vec!["jun".to_owned()];
    crate::packages::populate(&mut world);
    crate::timeline::populate(&mut world);
    crate::autosave::populate(&mut world);
    crate::end::populate(&mut world);
    crate::packages::list_all(&mut world);
    world.end_session(true);
    let mut lent = world.image("survey", &["v3"], Category::Cpu, 3_000_000_000, 50, None);
    "jun".clone_into(&mut lent.user);
    world.shared.push(lent);
}

/// What a save shows after the transfer of its own layer, and on a node whose cores are taken.
fn steps(browser: &Browser, standin: &Standin, each: &mut dyn FnMut(&str) -> Outcome) -> Outcome {
    let change = |change: &dyn Fn(&mut Save)| {
        let mut world = standin.world();
        let save = &mut world.saves[0];
        change(save);
        save.version += 1;
    };
    change(&|save| {
        save.phase = Some(Phase::Base);
        save.progress = Some(Progress {
            bytes_done: 3_100_000_000,
            bytes_total: 5_000_000_000,
            base_done: 1_860_000_000,
            base_total: 3_760_000_000,
            rate: Some(84_000_000.0),
            seconds_left: Some(22.6),
            ..Progress::default()
        });
    });
    let portion = "return document.querySelector('.portion').textContent === '62%'";
    browser.until("the base", portion, json!([]))?;
    each("base")?;
    change(&|save| {
        save.since = Some(crate::standin::ago(140));
        save.can_hurry = true;
        save.waiting = Some(Waiting {
            reason: WaitingReason::Cores,
            node: "gpu-03".to_owned(),
            until: None,
        });
    });
    let button = "return document.querySelector('.why button').checkVisibility()";
    browser.until("the button", button, json!([]))?;
    each("busy")?;
    browser.click(".why button")?;
    browser.until("its answer", &format!("{button} === false"), json!([]))?;
    each("hurried")
}

/// The question before an image is replaced.
fn second_save(browser: &Browser, each: &mut dyn FnMut(&str) -> Outcome) -> Outcome {
    browser.click("article .opener")?;
    browser.see("table-3.csv")?;
    browser.click("article .field input")?;
    browser.keys("pytorch-lora\u{e004}2026-11-20")?;
    browser.click("article button.main")?;
    let asks = "return document.querySelector('dialog h2')";
    browser.until("the question", asks, json!([]))?;
    each("replace")?;
    browser.click("dialog button:not(.danger)")
}

/// Visits each view, prepares it and calls `each` with its name.
fn views(browser: &Browser, standin: &Standin, each: &mut dyn FnMut(&str) -> Outcome) -> Outcome {
    browser.go(&standin.url("sessions"))?;
    browser.until(
        "sessions",
        "return document.querySelectorAll('article').length === 2",
        json!([]),
    )?;
    each("sessions")?;
    browser.click("article .opener")?;
    browser.see("table-3.csv")?;
    each("sessions-open")?;
    browser.click(".moments .commands > summary")?;
    browser.click(".moments .installed > summary")?;
    browser.see("httpx")?;
    each("timeline")?;
    browser.click("article .opener")?;
    browser.click("article button.main")?;
    browser.until(
        "the bar",
        "return document.querySelector('progress')?.value > 0.35",
        json!([]),
    )?;
    each("saving")?;
    steps(browser, standin, each)?;
    browser.click(".running button")?;
    each("cancel")?;
    browser.click("dialog .danger")?;
    browser.until(
        "the end",
        "return !document.querySelector('progress')",
        json!([]),
    )?;
    standin.world().hold_at = None;
    browser.click("article:nth-of-type(2) button.main")?;
    browser.until("the end", "return !document.querySelector('progress') && [...document.querySelectorAll('.state time')].at(-1).textContent.match(/just now|방금/)", json!([]))?;
    each("saved")?;
    second_save(browser, each)?;
    browser.click("article:first-of-type .installed > summary")?;
    browser.see("numpy")?;
    each("packages-session")?;
    for (view, count) in [("images", 3), ("history", 3), ("operations", 1)] {
        browser.go(&standin.url(view))?;
        browser.until(
            view,
            "return document.querySelectorAll('.card').length >= arguments[0]",
            json!([count]),
        )?;
        each(view)?;
    }
    browser.click(".entry > summary")?;
    each("operations-open")?;
    crate::packages::list_all(&mut standin.world());
    browser.go(&standin.url("images"))?;
    browser.click(".installed > summary")?;
    browser.click(".choice button:nth-child(2)")?;
    browser.see("httpx")?;
    each("packages-image")?;
    browser.click(".commands summary")?;
    each("commands")?;
    browser.click(".more summary")?;
    each("share")?;
    browser.click(".image .danger")?;
    each("delete")?;
    standin.world().signed_in = false;
    browser.reload()?;
    browser.until(
        "the sign-in",
        "return document.getElementById('token')",
        json!([]),
    )?;
    each("sign-in")?;
    Ok(())
}

#[test]
fn eight_sessions_are_eight_rows() -> Outcome {
    for (width, most) in [(1100, 1000), (360, 1500)] {
        let look = BrowserOptions {
            width,
            ..BrowserOptions::default()
        };
        let Some((browser, standin)) = crate::begin(&look)? else {
            return Ok(());
        };
        {
            let mut world = standin.world();
            for n in 0..6 {
                let name = format!("jupyter-minji-{n}");
                let mut more = World::session(Kind::Jupyter, Category::Cpu, &name, "cpu-12", 9_000);
                more.unsaved = world.sessions[0].unsaved.clone();
                world.sessions.push(more);
            }
            world.ended(0, State::Succeeded, None, 4_000);
        }
        browser.go(&standin.url("sessions"))?;
        let all = "return document.querySelectorAll('article').length === 8";
        browser.until("the sessions", all, json!([]))?;
        let height = browser.run("return document.documentElement.scrollHeight", json!([]))?;
        assert!(
            height.as_u64().is_some_and(|height| height < most),
            "{width}: {height}"
        );
        // What a row shows: name, image, node, size, state, the button.
        let row = browser.run(
            "return document.querySelector('article').innerText",
            json!([]),
        )?;
        for text in [
            "jupyter-minji-training",
            "pytorch-notebook:2026a",
            "gpu-03",
            "4.8 GB changed",
            "Saved",
            "Save",
        ] {
            assert!(row.as_str().is_some_and(|row| row.contains(text)), "{row}");
        }
        // By pointer anywhere in the row, and by its button.
        browser.click("article .amount")?;
        browser.see("/scratch")?;
        browser.see("(containerd)")?;
        browser.click("article .opener")?;
        assert!(!browser.shows("/scratch")?);
        browser.assert_clean()?;
    }
    Ok(())
}

#[test]
fn pictures() -> Outcome {
    for (name, look) in [
        (
            "light",
            BrowserOptions {
                width: 1280,
                ..BrowserOptions::default()
            },
        ),
        (
            "dark",
            BrowserOptions {
                dark: true,
                ..BrowserOptions::default()
            },
        ),
        (
            "phone-light",
            BrowserOptions {
                width: 360,
                height: 780,
                ..BrowserOptions::default()
            },
        ),
        (
            "phone-dark-ko",
            BrowserOptions {
                width: 360,
                height: 780,
                dark: true,
                language: "ko-KR",
            },
        ),
    ] {
        let Some((browser, standin)) = crate::begin(&look)? else {
            return Ok(());
        };
        populate(&standin);
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/portal-screenshots");
        views(&browser, &standin, &mut |view| {
            let wide = browser.run(
                "return document.documentElement.scrollWidth <= innerWidth",
                json!([]),
            )?;
            let picture = dir.join(format!("{view}-{name}.png"));
            if matches!(view, "cancel" | "delete" | "replace") {
                browser.screenshot(&picture)?;
            } else {
                browser.whole_page(&picture)?;
            }
            assert_eq!(
                wide, true,
                "{view} is wider than a window of {}",
                look.width
            );
            browser.assert_clean()
        })?;
    }
    Ok(())
}

/// axe-core, fetched by `tests/run`.
const AXE: &str = "target/axe-core/package/axe.min.js";

#[test]
fn axe_finds_nothing_serious_in_any_view_light_or_dark() -> Outcome {
    let Ok(axe) = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(AXE)) else {
        crate::support::ignore(&format!("needs {AXE}, which tests/run fetches"));
        return Ok(());
    };
    let examine = "const found = await axe.run(document, { runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa', 'best-practice'] });
        return { passes: found.passes.length, violations: found.violations.map((one) =>
            ({ id: one.id, impact: one.impact, nodes: one.nodes.map((node) => node.html.slice(0, 200) + ' ' + node.failureSummary) })) }";
    let examine = format!("return (async () => {{ {examine} }})()");
    for look in [
        BrowserOptions::default(),
        BrowserOptions {
            dark: true,
            language: "ko-KR",
            ..BrowserOptions::default()
        },
        BrowserOptions {
            width: 390,
            height: 780,
            ..BrowserOptions::default()
        },
    ] {
        let Some((browser, standin)) = crate::begin(&look)? else {
            return Ok(());
        };
        populate(&standin);
        let mut seen = 0;
        views(&browser, &standin, &mut |view| {
            if browser.run("return typeof axe", json!([]))? == "undefined" {
                // Not by an element, which the page's policy would not let in.
                browser.cdp("Runtime.evaluate", json!({ "expression": &axe }))?;
            }
            let found = browser.run(&examine, json!([]))?;
            assert!(
                found["passes"].as_u64() > Some(10),
                "{view}: nothing was examined: {found}"
            );
            assert_eq!(
                found["violations"],
                json!([]),
                "{view}, dark: {}, width {}: {found:#}",
                look.dark,
                look.width
            );
            seen += 1;
            Ok(())
        })?;
        assert_eq!(seen, 20);
    }
    Ok(())
}
