//! A press never destroys another save: the page asks before it replaces an image, and says what became of each.

use serde_json::json;
use upperdeck::service::job::State;

use crate::begin;
use crate::browser::{Browser, BrowserOptions, Outcome};
use crate::standin::Standin;

fn open(browser: &Browser, standin: &Standin) -> Outcome {
    browser.go(&standin.url("sessions"))?;
    let there = "return document.querySelectorAll('article button.main').length === 2";
    browser.until("the sessions", there, json!([])).map(drop)
}

/// Saves a session under a typed name and tag, by the keyboard.
fn save_as(browser: &Browser, session: u32, name: &str, tag: &str) -> Outcome {
    let card = format!("article:nth-of-type({session})");
    let closed = format!("return document.querySelector('{card} .inside').hidden");
    if browser.run(&closed, json!([]))? == true {
        browser.click(&format!("{card} .opener"))?;
    }
    browser.click(&format!("{card} .field input"))?;
    browser.keys(&format!("{name}\u{e004}{tag}"))?;
    browser.click(&format!("{card} button.main"))
}

fn ended(browser: &Browser, session: u32) -> Outcome {
    let script = format!(
        "return document.querySelector('article:nth-of-type({session}) .state .succeeded')
            && !document.querySelector('article:nth-of-type({session}) progress')"
    );
    browser.until("the end", &script, json!([])).map(drop)
}

#[test]
fn another_sessions_image_is_replaced_only_after_a_question() -> Outcome {
    let Some((browser, standin)) = begin(&BrowserOptions::default())? else {
        return Ok(());
    };
    open(&browser, &standin)?;
    save_as(&browser, 1, "torch", "daily")?;
    ended(&browser, 1)?;
    save_as(&browser, 2, "torch", "daily")?;
    browser.see("Replace torch:daily?")?;
    browser.see("minji saved it from hub/jupyter-minji-training/notebook")?;
    let focus = browser.run("return document.activeElement.textContent", json!([]))?;
    assert_eq!(focus, "Keep it");
    browser.click("dialog button:not(.danger)")?;
    browser.until(
        "the form",
        "return !document.querySelector('dialog')",
        json!([]),
    )?;
    assert_eq!(standin.world().saves.len(), 1, "nothing was begun");
    // What was typed is still there.
    browser.click("article:nth-of-type(2) button.main")?;
    browser.see("Replace torch:daily?")?;
    browser.click("dialog .danger")?;
    ended(&browser, 2)?;
    let asked = standin.world().asked.last().cloned().ok_or("nothing")?;
    assert!(asked.replace.to_string().starts_with("sha256:"));
    // The first session's card says what became of its image, and offers nothing dead to copy.
    browser.reload()?;
    for session in [1, 2] {
        browser.click(&format!("article:nth-of-type({session}) .opener"))?;
    }
    browser.see("was replaced by a save of hub/rstudio-minji/notebook")?;
    let copies =
        "return document.querySelectorAll('article:nth-of-type(1) .last .reference').length";
    assert_eq!(browser.run(copies, json!([]))?, 0);
    let copies =
        "return document.querySelectorAll('article:nth-of-type(2) .last .reference').length";
    assert_eq!(browser.run(copies, json!([]))?, 1);
    browser.click("nav a[href='#/history']")?;
    browser.see("Replaced")?;
    browser.assert_clean()
}

#[test]
fn saving_again_under_the_own_name_is_one_click() -> Outcome {
    let Some((browser, standin)) = begin(&BrowserOptions::default())? else {
        return Ok(());
    };
    open(&browser, &standin)?;
    let shown = "return document.querySelector('article .again')?.checkVisibility() ?? false";
    assert_eq!(browser.run(shown, json!([]))?, false);
    save_as(&browser, 1, "torch", "daily")?;
    ended(&browser, 1)?;
    browser.see("Save again as torch:daily")?;
    browser.click("article:nth-of-type(1) .again")?;
    browser.until(
        "the second save",
        "return document.querySelector('progress')",
        json!([]),
    )?;
    ended(&browser, 1)?;
    {
        let world = standin.world();
        assert_eq!(world.saves.len(), 2);
        assert!(
            world
                .saves
                .iter()
                .all(|save| save.state == State::Succeeded)
        );
        let asked = world.asked.last().ok_or("nothing")?;
        assert_eq!(asked.replace.to_string(), "own");
        assert_eq!(asked.image.tag.as_deref(), Some("daily"));
    }
    // A suggested name is for one save.
    browser.click("article:nth-of-type(2) button.main")?;
    ended(&browser, 2)?;
    let shown = "return document.querySelector('article:nth-of-type(2) .again').checkVisibility()";
    assert_eq!(browser.run(shown, json!([]))?, false);
    browser.assert_clean()
}

#[test]
fn the_history_says_which_image_was_deleted() -> Outcome {
    let Some((browser, standin)) = begin(&BrowserOptions::default())? else {
        return Ok(());
    };
    open(&browser, &standin)?;
    save_as(&browser, 1, "torch", "daily")?;
    ended(&browser, 1)?;
    let remove = "return fetch('api/v1/images/torch/tags/daily', { method: 'DELETE',
        headers: { 'Content-Type': 'application/json', 'Upperdeck-Request': '1' } }).then((answer) => answer.status)";
    assert_eq!(browser.run(remove, json!([]))?, 204);
    browser.go(&standin.url("history"))?;
    browser.see("Deleted")?;
    browser.click(".entry > summary")?;
    browser.see("was deleted")?;
    let copies = "return document.querySelectorAll('.entry .reference').length";
    assert_eq!(browser.run(copies, json!([]))?, 0);
    browser.assert_clean()
}
