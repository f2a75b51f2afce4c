//! The setting of a user for the end of all own sessions, as the page shows and changes it.

#![allow(clippy::result_large_err, reason = "a refusal is a response, too")]

use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::State as Given;
use axum::http::HeaderMap;
use axum::response::{IntoResponse as _, Response};
use serde_json::json;
use upperdeck::service::job::SaveEnded;
use upperdeck::service::manager::api::{
    AutosaveFrom, AutosaveSetting, AutosaveSettings, SessionAtEnd,
};

use crate::begin;
use crate::browser::{BrowserOptions, Outcome};
use crate::standin::{Reply, Shared, Standin, World, enter};

fn settings(world: &World) -> Response {
    let settings = AutosaveSettings {
        default: None,
        own: world.own,
        min_minutes: 5,
    };
    Json(settings).into_response()
}

/// The stand-in for `GET /api/v1/autosave`.
pub async fn own(Given(world): Given<Shared>, headers: HeaderMap) -> Reply {
    let world = enter(&world, &headers, false)?;
    Ok(settings(&world))
}

/// The stand-in for `PUT /api/v1/autosave`.
pub async fn set(
    Given(world): Given<Shared>,
    headers: HeaderMap,
    Json(asked): Json<AutosaveSetting>,
) -> Reply {
    let mut world = enter(&world, &headers, true)?;
    world.own = Some(asked);
    Ok(settings(&world))
}

/// The stand-in for `DELETE /api/v1/autosave`.
pub async fn clear(Given(world): Given<Shared>, headers: HeaderMap) -> Reply {
    let mut world = enter(&world, &headers, true)?;
    world.own = None;
    Ok(settings(&world))
}

/// Has the pod of the first session say when it is saved.
pub fn populate(world: &mut World) {
    for (session, from) in [(0, AutosaveFrom::Pod), (1, AutosaveFrom::Administrator)] {
        let when = SaveEnded::Failure;
        world.sessions[session].save_on_end = Some(SessionAtEnd { when, from });
    }
}

/// Waits until the server has this as the user's setting.
fn received(standin: &Standin, expected: Option<AutosaveSetting>) {
    let begun = Instant::now();
    while standin.world().own != expected && begun.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(standin.world().own, expected);
}

#[test]
fn a_user_chooses_what_is_saved_at_its_end() -> Outcome {
    let Some((browser, standin)) = begin(&BrowserOptions::default())? else {
        return Ok(());
    };
    // What is set about autosaves stays.
    let before = AutosaveSetting {
        every_minutes: Some(30),
        ..AutosaveSetting::default()
    };
    {
        let mut world = standin.world();
        populate(&mut world);
        world.own = Some(before);
    }
    browser.go(&standin.url("sessions"))?;
    browser.click("article:first-of-type .opener")?;
    browser.see("Save when a session ends")?;
    browser.see("This session was started with another choice, which applies to it: if it fails or runs out of memory.")?;
    browser.click("article:nth-of-type(2) .opener")?;
    browser.see("Your centre’s setting: if it fails or runs out of memory.")?;
    let set = |save_on_end| {
        Some(AutosaveSetting {
            save_on_end,
            ..before
        })
    };
    // By keyboard.
    let focus = "document.querySelector('article:nth-of-type(2) .end select').focus()";
    browser.run(focus, json!([]))?;
    for wanted in [SaveEnded::Never, SaveEnded::Failure] {
        browser.keys("\u{e015}")?;
        received(&standin, set(Some(wanted)));
    }
    // The other row has it when it is opened again.
    browser.click("article:first-of-type .opener")?;
    browser.click("article:first-of-type .opener")?;
    let shown =
        "return document.querySelector('article:first-of-type .end select').value === 'failure'";
    browser.until("the choice in the other row", shown, json!([]))?;
    let unset = "const select = document.querySelector('article:nth-of-type(2) .end select');
        select.value = ''; select.dispatchEvent(new Event('change', { bubbles: true }))";
    browser.run(unset, json!([]))?;
    received(&standin, set(None));
    assert_eq!(standin.world().forged, 0);
    browser.assert_clean()
}
