//! A save in the page from the click on the button to its end, with everything that can happen in between.

use axum::http::StatusCode;
use serde_json::{Value, json};
use upperdeck::service::job::{Code, State};

use crate::begin;
use crate::browser::{Browser, BrowserOptions, Outcome};
use crate::standin::{Standin, refusal};

const BAR: &str = "return document.querySelector('progress')?.value > arguments[0]";
const SAVE: &str = "article:first-of-type button.main";
const OPENER: &str = "article:first-of-type .opener";

fn open(browser: &Browser, standin: &Standin) -> Outcome {
    browser.go(&standin.url("sessions"))?;
    let there = "return document.querySelectorAll('article button.main').length === 2";
    browser.until("the sessions", there, json!([])).map(drop)
}

#[test]
fn a_session_that_has_ended_says_why_and_is_saved_by_one_press() -> Outcome {
    let Some((browser, standin)) = begin(&BrowserOptions::default())? else {
        return Ok(());
    };
    standin.world().end_session(true);
    open(&browser, &standin)?;
    browser.see("ended 3 minutes ago: out of memory")?;
    browser.click("article:nth-of-type(2) .opener")?;
    browser.see("What it wrote is still there, and can be saved until it is removed.")?;
    browser.click("article:nth-of-type(2) button.main")?;
    browser.see("registry.example.org/minji/rstudio-minji:2026-11-24-1530")?;
    standin.world().end_session(false);
    open(&browser, &standin)?;
    browser.see("ended 3 minutes ago: exit code 1")?;
    assert_clean(&browser, &standin)
}

/// Checks that no forbidden event occurred, and that every change was requested with the page's own header.
fn assert_clean(browser: &Browser, standin: &Standin) -> Outcome {
    assert_eq!(
        standin.world().forged,
        0,
        "changes without the page's header"
    );
    browser.assert_clean()
}

#[test]
fn one_press_a_bar_to_the_end_an_image_that_is_found_and_deleted() -> Outcome {
    let Some((browser, standin)) = begin(&BrowserOptions::default())? else {
        return Ok(());
    };
    open(&browser, &standin)?;
    assert!(!browser.shows("1.2 GB, what changed since the last save")?);
    browser.click(OPENER)?;
    browser.see("1.2 GB, what changed since the last save")?;
    assert!(browser.shows("/home/minji")? && browser.shows("These are volumes")?);
    browser.run(
        "window.values = []; new MutationObserver(() => {
            const bar = document.querySelector('progress');
            if (bar && values.at(-1) !== bar.value) values.push(bar.value);
        }).observe(document.body, { subtree: true, childList: true, attributes: true })",
        json!([]),
    )?;
    browser.click(SAVE)?;
    browser.see("registry.example.org/minji/jupyter-minji-training:2026-11-24-1530")?;
    let values = browser.run("return values", json!([]))?;
    let values: Vec<f64> = serde_json::from_value(values)?;
    assert!(values.is_sorted(), "the bar goes back: {values:?}");
    assert!(values.len() > 5, "the bar does not move: {values:?}");
    assert!(values.last().is_some_and(|last| *last > 0.99), "{values:?}");
    for text in [
        "Saved",
        "Session stood still",
        "34 ms",
        "8.9 GB, of that 402 MB new since the last save",
        "1 remark",
    ] {
        browser.see(text)?;
    }
    browser.click("nav a[href='#/images']")?;
    browser.see("4 images")?;
    browser.click("#find-image")?;
    browser.keys("training")?;
    browser.see("2 images")?;
    browser.click("article:first-of-type .tags .danger")?;
    browser.see("Delete jupyter-minji-training:2026-11-24-1530?")?;
    assert!(browser.shows("the image goes with it (8.9 GB)")?);
    browser.click("dialog .danger")?;
    browser.see("1 image")?;
    browser.see("2026-11-23-1804")?;
    let left = browser.run(
        "return document.querySelector('.cards').innerText",
        json!([]),
    )?;
    assert!(
        left.as_str()
            .is_some_and(|text| !text.contains("2026-11-24-1530")),
        "{left}"
    );
    assert_clean(&browser, &standin)
}

#[test]
fn a_name_and_a_description_go_with_it() -> Outcome {
    let Some((browser, standin)) = begin(&BrowserOptions::default())? else {
        return Ok(());
    };
    open(&browser, &standin)?;
    browser.click(OPENER)?;
    browser.click("article .field input")?;
    browser.keys("Not A Name\u{e007}")?;
    browser.see("A name has small letters and digits")?;
    assert!(standin.world().asked.is_empty());
    browser.run("document.activeElement.select()", json!([]))?;
    browser.keys("lora\u{e004}v2\u{e004}with flash-attn")?;
    browser.see("lora:v2")?;
    {
        let (status, mut detail) = refusal(
            StatusCode::UNPROCESSABLE_ENTITY,
            "invalid",
            "v2 is reserved",
        );
        detail.field = Some("image.tag".to_owned());
        standin.world().refuse = Some((status, detail));
    }
    browser.click(SAVE)?;
    browser.see("v2 is reserved")?;
    let focus = "return document.activeElement.getAttribute('aria-invalid') === 'true' && document.activeElement.value";
    assert_eq!(browser.run(focus, json!([]))?, "v2");
    browser.click(SAVE)?;
    browser.see("registry.example.org/minji/lora:v2")?;
    let asked = standin
        .world()
        .asked
        .last()
        .cloned()
        .ok_or("nothing was asked for")?;
    assert_eq!(asked.image.name.as_deref(), Some("lora"));
    assert_eq!(asked.image.tag.as_deref(), Some("v2"));
    assert_eq!(asked.message.as_deref(), Some("with flash-attn"));
    assert_clean(&browser, &standin)
}

#[test]
fn a_reload_in_mid_save_finds_the_bar_where_it_is() -> Outcome {
    let Some((browser, standin)) = begin(&BrowserOptions::default())? else {
        return Ok(());
    };
    standin.world().hold_at = Some(0.5);
    open(&browser, &standin)?;
    browser.click(SAVE)?;
    browser.until("half of it", BAR, json!([0.45]))?;
    browser.reload()?;
    browser.until("half of it again", BAR, json!([0.45]))?;
    browser.see("Packing and sending")?;
    standin.world().hold_at = None;
    browser.see("registry.example.org/minji/jupyter-minji-training:2026-11-24-1530")?;
    browser.reload()?;
    browser.click(OPENER)?;
    browser.see("Session stood still")?;
    assert_clean(&browser, &standin)
}

#[test]
fn two_tabs_show_the_same_save_and_either_may_cancel_it() -> Outcome {
    let Some((browser, standin)) = begin(&BrowserOptions::default())? else {
        return Ok(());
    };
    standin.world().hold_at = Some(0.5);
    open(&browser, &standin)?;
    let (first, second) = browser.tab()?;
    open(&browser, &standin)?;
    browser.click(SAVE)?;
    browser.until("half of it", BAR, json!([0.45]))?;
    browser.switch(&first)?;
    browser.until("half of it in the other tab", BAR, json!([0.45]))?;
    browser.click(".running button")?;
    browser.see("Cancel saving jupyter-minji-training:2026-11-24-1530?")?;
    browser.click("dialog .danger")?;
    browser.see("Nothing was saved.")?;
    browser.assert_clean()?;
    browser.switch(&second)?;
    browser.see("Nothing was saved.")?;
    assert_eq!(standin.world().asked.len(), 1);
    assert_clean(&browser, &standin)
}

#[test]
fn a_save_that_somebody_else_began_is_shown_instead_of_an_error() -> Outcome {
    let Some((browser, standin)) = begin(&BrowserOptions::default())? else {
        return Ok(());
    };
    standin.world().hold_at = Some(0.5);
    // Otherwise the stream would tell of it before the press.
    standin.world().mute = true;
    open(&browser, &standin)?;
    let session = standin.world().sessions[0].id.clone();
    // Another program asks between two looks of the page.
    let begun = browser.run(
        "const [id] = arguments; return fetch('api/v1/saves', { method: 'POST',
            headers: { 'Content-Type': 'application/json', 'Upperdeck-Request': '1' },
            body: JSON.stringify({ session: id }) }).then((answer) => answer.status)",
        json!([session]),
    )?;
    assert_eq!(begun, 202);
    browser.click(SAVE)?;
    browser.until("half of it", BAR, json!([0.45]))?;
    assert_clean(&browser, &standin)
}

#[test]
fn every_failure_says_what_happened_and_what_to_do() -> Outcome {
    let Some((browser, standin)) = begin(&BrowserOptions::default())? else {
        return Ok(());
    };
    standin.world().fails = Some(Code::RegistryUnavailable);
    open(&browser, &standin)?;
    browser.click(SAVE)?;
    browser.see("The place where images are kept does not answer.")?;
    browser.see("Your session is untouched.")?;
    let strings = crate::words::strings("en")?;
    standin.world().hold_at = Some(0.0);
    for code in Code::ALL {
        browser.click(SAVE)?;
        browser.until(
            "the save",
            "return document.querySelector('progress')",
            json!([]),
        )?;
        let id = standin.world().saves[0].id;
        standin.world().end(id, State::Failed, Some(code));
        for kind in ["failed", "advice"] {
            let text = strings[&format!("{kind}.{}", code.name())]
                .as_str()
                .ok_or("no words")?
                .to_owned();
            browser.see(&text)?;
        }
        browser.click(".last .problem summary")?;
        browser.see(&format!("{}: the registry at", code.name()))?;
        let alert = browser.run(
            "return document.getElementById('alerts').textContent",
            json!([]),
        )?;
        assert!(
            alert.as_str().is_some_and(|text| text.contains("failed")),
            "{alert}"
        );
    }
    assert_clean(&browser, &standin)
}

#[test]
fn a_refusal_is_told_in_words() -> Outcome {
    let Some((browser, standin)) = begin(&BrowserOptions::default())? else {
        return Ok(());
    };
    open(&browser, &standin)?;
    for (status, code, text) in [
        (
            StatusCode::TOO_MANY_REQUESTS,
            "too_many",
            "as many saves under way as you may",
        ),
        (
            StatusCode::FORBIDDEN,
            "not_permitted",
            "You may not do that.",
        ),
        (
            StatusCode::INSUFFICIENT_STORAGE,
            "quota_exceeded",
            "There is no room left.",
        ),
        (
            StatusCode::INTERNAL_SERVER_ERROR,
            "internal",
            "The server has a problem.",
        ),
        (
            StatusCode::BAD_REQUEST,
            "a_code_of_tomorrow",
            "The server has a problem.",
        ),
    ] {
        standin.world().refuse = Some(refusal(status, code, "said by the stand-in"));
        browser.click(SAVE)?;
        browser.see(text)?;
    }
    standin.world().signed_in = false;
    browser.click(SAVE)?;
    browser.see("You are not signed in")?;
    assert_clean(&browser, &standin)
}

#[test]
fn a_lost_line_is_said_and_what_was_pressed_meanwhile_is_done_once() -> Outcome {
    let Some((browser, mut standin)) = begin(&BrowserOptions::default())? else {
        return Ok(());
    };
    standin.world().hold_at = Some(0.3);
    open(&browser, &standin)?;
    browser.click(SAVE)?;
    browser.until("a part of it", BAR, json!([0.25]))?;
    standin.go_down();
    browser.see("No connection to the server.")?;
    browser.click("article:nth-of-type(2) button.main")?;
    standin.serve()?;
    let back = "return document.querySelector('.lost').textContent === '' && document.querySelectorAll('progress').length === 2";
    browser.until("the line and both saves", back, json!([]))?;
    standin.world().hold_at = None;
    let both = "return document.querySelectorAll('.state .succeeded').length === 2";
    browser.until("both ends", both, json!([]))?;
    assert_eq!(standin.world().asked.len(), 2);
    assert_clean(&browser, &standin)
}

#[test]
fn an_event_stream_that_went_silent_is_found_out() -> Outcome {
    let Some((browser, standin)) = begin(&BrowserOptions::default())? else {
        return Ok(());
    };
    // As after a closed lid: the browser believes that the stream is open, and nothing comes.
    standin.world().mute = true;
    open(&browser, &standin)?;
    browser.click(SAVE)?;
    browser.see("registry.example.org/minji/jupyter-minji-training:2026-11-24-1530")?;
    assert_clean(&browser, &standin)
}

/// Presses the Tab key until a control with that name has the focus.
fn tab_to(browser: &Browser, name: &str) -> Outcome {
    let script = "const e = document.activeElement;
        return (e.ariaLabel ?? e.labels?.[0]?.textContent ?? e.textContent).replace(/[\\u2068\\u2069]/g, '')";
    let mut passed = Vec::new();
    for _ in 0..80 {
        let at = browser.run(script, json!([]))?;
        if at == name {
            let shown = "const e = document.activeElement; return e.matches(':focus-visible') && getComputedStyle(e).outlineStyle !== 'none'";
            assert_eq!(
                browser.run(shown, json!([]))?,
                true,
                "the focus on {name} is not seen"
            );
            return Ok(());
        }
        passed.push(at);
        browser.keys("\u{e004}")?;
    }
    Err(format!("no way by Tab to {name}: {passed:?}").into())
}

#[test]
fn the_keyboard_alone_does_everything() -> Outcome {
    let Some((browser, standin)) = begin(&BrowserOptions::default())? else {
        return Ok(());
    };
    standin.world().hold_at = Some(0.3);
    open(&browser, &standin)?;
    tab_to(&browser, "Skip to the content")?;
    browser.keys("\u{e007}")?;
    let name = "Save jupyter-minji-training";
    tab_to(&browser, name)?;
    browser.keys("\u{e007}")?;
    browser.until(
        "the focus on the bar",
        "return document.activeElement.className === 'running'",
        json!([]),
    )?;
    browser.until("a part of it", BAR, json!([0.25]))?;
    let cancel = "Cancel saving jupyter-minji-training:2026-11-24-1530";
    tab_to(&browser, cancel)?;
    browser.keys("\u{e00d}")?;
    tab_to(&browser, "Go on saving")?;
    browser.keys("\u{e00c}")?;
    browser.until(
        "the question to go",
        "return !document.querySelector('dialog')",
        json!([]),
    )?;
    tab_to(&browser, cancel)?;
    browser.keys("\u{e007}")?;
    tab_to(&browser, "Cancel the save")?;
    browser.keys("\u{e007}")?;
    browser.see("Nothing was saved.")?;
    browser.until(
        "the focus on the outcome",
        "return document.activeElement.className === 'last'",
        json!([]),
    )?;
    standin.world().hold_at = None;
    browser.run("document.querySelector('.skip').focus()", json!([]))?;
    browser.keys("\u{e007}")?;
    // With a name, from the field, by Enter.
    tab_to(&browser, "jupyter-minji-training")?;
    let expanded = "return document.activeElement.getAttribute('aria-expanded')";
    assert_eq!(browser.run(expanded, json!([]))?, "false");
    browser.keys("\u{e007}")?;
    assert_eq!(browser.run(expanded, json!([]))?, "true");
    tab_to(&browser, "Name")?;
    browser.keys("by-keys\u{e007}")?;
    browser.see("registry.example.org/minji/by-keys:2026-11-24-1530")?;
    browser.run("document.querySelector('.skip').focus()", json!([]))?;
    tab_to(&browser, "My images")?;
    browser.keys("\u{e007}")?;
    browser.until("the view", "return document.activeElement.textContent === 'My images' && document.activeElement.localName === 'h1'", json!([]))?;
    browser.see("4 images")?;
    tab_to(
        &browser,
        "Copy registry.example.org/minji/by-keys:2026-11-24-1530",
    )?;
    browser.keys("\u{e00d}")?;
    browser.see("Copied")?;
    tab_to(&browser, "Delete by-keys:2026-11-24-1530")?;
    browser.keys("\u{e007}")?;
    tab_to(&browser, "Delete it")?;
    browser.keys("\u{e007}")?;
    browser.see("3 images")?;
    let at: Value = browser.run("return document.activeElement.localName", json!([]))?;
    assert_eq!(at, "h1", "the focus is lost with what was deleted");
    browser.run("document.querySelector('.skip').focus()", json!([]))?;
    tab_to(&browser, "History")?;
    browser.keys("\u{e007}")?;
    browser.until(
        "the history",
        "return document.querySelectorAll('.entry').length === 2",
        json!([]),
    )?;
    for _ in 0..2 {
        browser.keys("\u{e004}")?;
    }
    browser.keys("\u{e007}")?;
    browser.see("Asked for")?;
    assert_clean(&browser, &standin)
}

#[test]
fn an_administrator_puts_back_what_failed_for_good() -> Outcome {
    let Some((browser, standin)) = begin(&BrowserOptions::default())? else {
        return Ok(());
    };
    {
        let mut world = standin.world();
        world.me.administrator = true;
        let failed = world.ended(0, State::Failed, Some(Code::RegistryUnavailable), 600);
        world.dead.push(failed.id);
        world.hold_at = Some(0.3);
        world
            .nodes
            .push(crate::standin::World::node("gpu-03", false));
    }
    browser.go(&standin.url("operations"))?;
    browser.see("Not heard of")?;
    browser.click("section:last-of-type .entry > summary")?;
    browser.click("section:last-of-type .inside > button")?;
    browser.see("Nothing here. Good.")?;
    let under_way =
        "return document.querySelectorAll('section:nth-of-type(2) .entry').length === 1";
    browser.until("the save under way", under_way, json!([]))?;
    assert!(standin.world().dead.is_empty());
    browser.click("section:nth-of-type(2) .entry > summary")?;
    browser.see("attempt 2")?;
    // What the user opened stays open while the list is read again.
    browser.run(
        "window.open_one = document.querySelector('section:nth-of-type(2) .entry')",
        json!([]),
    )?;
    standin.world().nodes[0].alive = true;
    browser.see("Well")?;
    assert_eq!(
        browser.run("return open_one.isConnected && open_one.open", json!([]))?,
        true
    );
    assert_clean(&browser, &standin)
}
