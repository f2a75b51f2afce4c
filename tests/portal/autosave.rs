//! The setting of a session about autosaves, as the page shows and changes it.

#![allow(clippy::result_large_err, reason = "a refusal is a response, too")]

use axum::Json;
use axum::extract::{Path, State as Given};
use axum::http::HeaderMap;
use axum::response::IntoResponse as _;
use serde_json::{Value, json};
use upperdeck::service::job::State;
use upperdeck::service::manager::api::{
    AutosaveFrom, AutosaveInForce, AutosavePolicy, AutosaveSetting, SessionAutosave,
};
use upperdeck::service::record::MadeBy;

use crate::begin;
use crate::browser::{Browser, BrowserOptions, Outcome};
use crate::standin::{Reply, Shared, World, ago, enter};

fn policy(every_minutes: u32, keep: u32, from: AutosaveFrom) -> SessionAutosave {
    SessionAutosave {
        policy: AutosavePolicy {
            every_minutes,
            keep,
        },
        from,
        last: None,
        waits_for: None,
    }
}

fn apply(
    world: &Shared,
    headers: &HeaderMap,
    id: &str,
    asked: AutosaveSetting,
    autosave: Option<SessionAutosave>,
) -> Reply {
    let mut world = enter(world, headers, true)?;
    world.settings.push(asked);
    let mut sessions = world.sessions.iter_mut();
    let from = autosave
        .as_ref()
        .map_or(AutosaveFrom::Session, |now| now.from);
    if let Some(session) = sessions.find(|session| session.id == id) {
        session.autosave.clone_from(&autosave);
        session.autosave_from = Some(from);
    }
    let from = Some(from);
    Ok(Json(AutosaveInForce { autosave, from }).into_response())
}

/// The stand-in for `PUT /api/v1/sessions/{id}/autosave`.
pub async fn set(
    Given(world): Given<Shared>,
    headers: HeaderMap,
    Path(id): Path<String>,
    Json(asked): Json<AutosaveSetting>,
) -> Reply {
    let every = asked.every_minutes;
    let now = every.map(|every| policy(every, asked.keep.unwrap_or(12), AutosaveFrom::Session));
    apply(&world, &headers, &id, asked, now)
}

/// The stand-in for `DELETE /api/v1/sessions/{id}/autosave`.
pub async fn clear(
    Given(world): Given<Shared>,
    headers: HeaderMap,
    Path(id): Path<String>,
) -> Reply {
    let now = Some(policy(60, 12, AutosaveFrom::Administrator));
    apply(&world, &headers, &id, AutosaveSetting::default(), now)
}

/// Has the pod of the first session say that it is saved.
pub fn populate(world: &mut World) {
    world.sessions[0].autosave_from = Some(AutosaveFrom::Pod);
    world.sessions[1].autosave_from = Some(AutosaveFrom::Administrator);
    world.sessions[0].autosave = Some(SessionAutosave {
        last: Some(ago(1200)),
        waits_for: Some("less than a tenth of the quota is left".to_owned()),
        ..policy(45, 6, AutosaveFrom::Pod)
    });
}

/// Gives a control another value, as a user does.
fn choose(browser: &Browser, control: &str, value: &str) -> Outcome {
    let script =
        "const [control] = document.querySelectorAll(arguments[0]); control.value = arguments[1];
        control.dispatchEvent(new Event('change', { bubbles: true }))";
    let arguments = json!([format!(".autosave {control}"), value]);
    browser.run(script, arguments).map(drop)
}

#[test]
fn who_has_set_it_is_shown_and_it_is_set_for_one_session() -> Outcome {
    let Some((browser, standin)) = begin(&BrowserOptions::default())? else {
        return Ok(());
    };
    populate(&mut standin.world());
    browser.go(&standin.url("sessions"))?;
    browser.click("article:first-of-type .opener")?;
    browser.see("As the session was started.")?;
    for text in [
        "every 45 mins",
        "Only if something changed.",
        "Saved so 20 minutes ago.",
        "The next one waits: less than a tenth of the quota is left",
    ] {
        assert!(browser.shows(text)?, "{text}");
    }
    let offered =
        "return [...document.querySelectorAll('.autosave option')].map((one) => one.value).join()";
    let offered = browser.run(offered, json!([]))?;
    // With what applies now; then those of the other session.
    assert_eq!(offered, "off,15,30,45,60,240,off,15,30,60,240");
    let asked = |expected: AutosaveSetting| {
        let received = standin.world().settings.pop();
        assert_eq!(received, Some(expected));
    };
    choose(&browser, "select", "30")?;
    browser.see("Set for this session.")?;
    let every = AutosaveSetting {
        every_minutes: Some(30),
        keep: Some(6),
        off: false,
        save_on_end: None,
    };
    asked(every);
    choose(&browser, "input", "2400")?;
    let kept = "return document.querySelector('.autosave input').value === '100'";
    browser.until("the number", kept, json!([]))?;
    asked(AutosaveSetting {
        keep: Some(100),
        ..every
    });
    browser.click(".autosave button")?;
    browser.see("Your centre’s setting.")?;
    asked(AutosaveSetting::default());
    choose(&browser, "select", "off")?;
    browser.see("This session is not saved by itself.")?;
    let why = "return document.querySelector('article:first-of-type .autosave .dim').textContent";
    assert_eq!(
        browser.run(why, json!([]))?,
        "This session is not saved by itself.Set for this session."
    );
    let clear = "return document.querySelector('.autosave button').checkVisibility()";
    assert_eq!(browser.run(clear, json!([]))?, Value::Bool(true));
    // Nothing is set for the other one.
    browser.click("article:nth-of-type(2) .opener")?;
    let why = why.replace("first-of-type", "nth-of-type(2)");
    assert_eq!(
        browser.run(&why, json!([]))?,
        "This session is not saved by itself.Your centre’s setting."
    );
    browser.click("article:nth-of-type(2) .opener")?;
    asked(AutosaveSetting {
        off: true,
        ..AutosaveSetting::default()
    });
    let number = "return document.querySelector('.autosave input').checkVisibility()";
    assert_eq!(browser.run(number, json!([]))?, Value::Bool(false));
    assert_eq!(standin.world().forged, 0);
    // One that has ended is not saved at intervals.
    standin.world().end_session(true);
    browser.click("article:nth-of-type(2) .opener")?;
    let gone =
        "return !document.querySelector('article:nth-of-type(2) .autosave').checkVisibility()";
    browser.until("the end", gone, json!([]))?;
    browser.assert_clean()
}

#[test]
fn while_an_autosave_is_under_way_the_session_can_be_saved() -> Outcome {
    let Some((browser, standin)) = begin(&BrowserOptions::default())? else {
        return Ok(());
    };
    {
        let mut world = standin.world();
        let id = world.ended(0, State::Succeeded, None, 60).id;
        world.sessions[0].save = None;
        let mut saves = world.saves.iter_mut();
        let save = saves.find(|save| save.id == id).ok_or("no save")?;
        (save.made_by, save.state, save.finished) = (MadeBy::Autosave, State::Running, None);
        save.tag = "auto-20261130-2000-ab12".to_owned();
    }
    browser.go(&standin.url("sessions"))?;
    let button = "const button = document.querySelector('article .main');
        return button?.checkVisibility() && !document.querySelector('article .running')";
    browser.until("the button", button, json!([]))?;
    let title = browser.run("return document.title", json!([]))?;
    assert!(!title.to_string().contains('%'), "{title}");
    browser.go(&standin.url("history"))?;
    browser.see("auto-20261130-2000-ab12")
}
