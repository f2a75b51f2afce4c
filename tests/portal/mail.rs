//! E-mail at the end of a save, as the page lets a user set it.

use axum::Json;
use axum::extract::State as Given;
use axum::http::HeaderMap;
use axum::response::IntoResponse as _;
use serde_json::json;
use upperdeck::service::manager::api::{Email, EmailSetting, Language};

use crate::begin;
use crate::browser::{Browser, BrowserOptions, Outcome};
use crate::standin::{Reply, Shared, Standin, enter};

/// The stand-in for `PUT /api/v1/notify/email`.
pub async fn set(
    Given(world): Given<Shared>,
    headers: HeaderMap,
    Json(asked): Json<EmailSetting>,
) -> Reply {
    let mut world = enter(&world, &headers, true)?;
    let email = Email {
        address: "minji@example.org".to_owned(),
        over_seconds: asked.over_seconds,
    };
    world.me.email = Some(email.clone());
    Ok(Json(email).into_response())
}

fn box_is(browser: &Browser, checked: bool, mixed: bool) -> Outcome {
    let script = "const box = document.querySelector('article [id$=\"-e\"]');
        return box.checked === arguments[0] && box.indeterminate === arguments[1]";
    browser
        .until("the box", script, json!([checked, mixed]))
        .map(drop)
}

fn choose(browser: &Browser, value: &str) -> Outcome {
    let script = "const select = document.querySelector('#mail');
        select.value = arguments[0]; select.dispatchEvent(new Event('change'))";
    browser.run(script, json!([value])).map(drop)
}

/// Presses the button of the first session and returns what was asked for.
fn asked(
    browser: &Browser,
    standin: &Standin,
) -> Result<Option<upperdeck::service::manager::api::Notify>, Box<dyn std::error::Error>> {
    let before = standin.world().asked.len();
    browser.click("article:first-of-type button.main")?;
    browser.until(
        "the end",
        "return !document.querySelector('progress') && document.querySelector('.last .reference')",
        json!([]),
    )?;
    let world = standin.world();
    assert_eq!(world.asked.len(), before + 1);
    Ok(world.asked[before].notify.clone())
}

#[test]
fn a_user_sets_e_mails_for_all_saves_and_for_one() -> Outcome {
    let Some((browser, standin)) = begin(&BrowserOptions::default())? else {
        return Ok(());
    };
    // Where none is sent, nothing speaks of it.
    browser.go(&standin.url("sessions"))?;
    browser.click("article:first-of-type .opener")?;
    assert!(!browser.shows("mail")?);
    standin.world().me.email = Some(Email {
        address: "minji@example.org".to_owned(),
        over_seconds: None,
    });
    browser.reload()?;
    browser.see("E-mail to minji@example.org when a save ends")?;
    browser.click("article:first-of-type .opener")?;
    box_is(&browser, false, false)?;
    assert_eq!(asked(&browser, &standin)?, None);
    choose(&browser, "600")?;
    box_is(&browser, false, true)?;
    let set = |standin: &Standin| {
        let world = standin.world();
        world.me.email.as_ref().and_then(|email| email.over_seconds)
    };
    assert_eq!(set(&standin), Some(600));
    assert_eq!(asked(&browser, &standin)?, None);
    choose(&browser, "0")?;
    box_is(&browser, true, false)?;
    // An own word about one save, which is forgotten with it.
    browser.click("article:first-of-type [id$='-e']")?;
    let said = asked(&browser, &standin)?.ok_or("nothing is said")?;
    assert_eq!(
        (said.email, said.language),
        (Some(false), Some(Language::En))
    );
    box_is(&browser, true, false)?;
    choose(&browser, "never")?;
    box_is(&browser, false, false)?;
    assert_eq!(set(&standin), None);
    browser.assert_clean()
}
