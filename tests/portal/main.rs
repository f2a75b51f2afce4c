//! The page in a real browser.
#![allow(
    clippy::unwrap_used,
    reason = "what a test's helpers unwrap fails the test, as it should"
)]

mod autosave;
mod browser;
mod calls;
mod delivery;
mod end;
mod looks;
mod mail;
mod packages;
mod provider;
mod replacing;
mod saving;
mod signin;
mod standin;
#[allow(dead_code, reason = "each test program uses its part")]
#[path = "../support/mod.rs"]
mod support;
mod timeline;
mod versions;
mod words;

/// Starts the browser and the stand-in of a test. Returns `None` and prints the reason if there is no browser.
fn begin(
    look: &browser::BrowserOptions,
) -> browser::Outcome<Option<(browser::Browser, standin::Standin)>> {
    if let Some(reason) = browser::missing() {
        support::ignore(reason);
        return Ok(None);
    }
    Ok(Some((
        browser::Browser::start(look)?,
        standin::Standin::start()?,
    )))
}
