//! What is installed in a session and in an image, as the page shows it.

use std::collections::HashMap;

use axum::Json;
use axum::extract::{Path, Query, State as Given};
use axum::http::{HeaderMap, StatusCode};
use axum::response::IntoResponse as _;
use serde_json::json;
use upperdeck::image::packages::{ChangeKind, Manager, PackageChange, Packages, Unread};
use upperdeck::service::job::State;
use upperdeck::service::manager::api::ImageView;

use crate::begin;
use crate::browser::{Browser, BrowserOptions, Outcome};
use crate::standin::{Reply, Shared, World, enter, refusal};

/// The stand-in for `GET /api/v1/sessions/{id}/packages` and `…/saves/{id}/packages`.
pub async fn list(
    Given(world): Given<Shared>,
    headers: HeaderMap,
    Path((_, id)): Path<(String, String)>,
    Query(query): Query<HashMap<String, String>>,
) -> Reply {
    let world = enter(&world, &headers, false)?;
    let key = match query.get("since") {
        Some(since) => format!("{id} since {since}"),
        None => id,
    };
    match world.packages.get(&key) {
        Some(found) => Ok(Json(found).into_response()),
        None => Err(crate::standin::refuse(refusal(
            StatusCode::NOT_FOUND,
            "not_found",
            "there is no list",
        ))),
    }
}

/// Returns whether a save added a package of this name.
pub fn has(world: &World, image: &ImageView, word: &str) -> bool {
    let list = image.save.map(|save| save.to_string());
    let list = list.and_then(|save| world.packages.get(&save));
    list.is_some_and(|list| list.packages.iter().any(|one| one.name == word))
}

fn change(manager: Manager, name: &str, before: Option<&str>, now: Option<&str>) -> PackageChange {
    PackageChange {
        manager,
        name: name.to_owned(),
        change: match (before, now) {
            (None, _) => ChangeKind::Added,
            (_, None) => ChangeKind::Removed,
            _ => ChangeKind::Changed,
        },
        version: now.map(str::to_owned),
        previous: before.map(str::to_owned),
        location: if manager == Manager::Dpkg {
            String::new()
        } else {
            "opt/conda/lib/python3.12/site-packages".to_owned()
        },
    }
}

/// Gives the first session and the saves of the first session lists.
pub fn populate(world: &mut World) {
    let first = world.sessions[0].id.clone();
    let list = Packages {
        packages: vec![
            change(Manager::Pip, "numpy", Some("2.0.2"), Some("2.1.0")),
            change(Manager::Pip, "torch", None, Some("2.9.1")),
            change(Manager::Pip, "transformers", None, Some("4.60.0")),
            change(Manager::Pip, "flash-attn", None, Some("2.8.3")),
            change(Manager::Pip, "rich", Some("13.9.4"), None),
            change(Manager::Dpkg, "ffmpeg", None, Some("7:6.1.1-3ubuntu5")),
            change(Manager::Dpkg, "libaom3", None, Some("3.8.2-2ubuntu0.1")),
        ],
        ..Packages::default()
    };
    world.packages.insert(first.clone(), list.clone());
    // Two saves of one name.
    for tag in ["2026-11-22-0900", "2026-11-24-1000"] {
        tag.clone_into(&mut world.sessions[0].suggested_tag);
        let save = world.ended(0, State::Succeeded, None, 50_000);
        world.packages.insert(save.id.to_string(), list.clone());
    }
    "2026-11-24-1530".clone_into(&mut world.sessions[0].suggested_tag);
    let saves = world.saves.iter().filter(|save| save.session == first);
    let saves: Vec<_> = saves.map(|save| save.id.to_string()).collect();
    let since = Packages {
        packages: vec![change(Manager::Pip, "httpx", None, Some("0.28.1"))],
        notes: vec!["one of the lists was shortened".to_owned()],
        ..Packages::default()
    };
    let key = format!("{} since {}", saves[0], saves[1]);
    world.packages.insert(key, since);
}

/// Gives every save the list of another one, and what came since any other.
pub fn list_all(world: &mut World) {
    let lists: Vec<_> = world.packages.clone().into_iter().collect();
    let of = |since: bool| {
        let found = lists
            .iter()
            .find(|(key, _)| key.contains(" since ") == since);
        found.map(|(_, list)| list.clone()).unwrap_or_default()
    };
    let ids: Vec<_> = world.saves.iter().map(|save| save.id.to_string()).collect();
    for id in &ids {
        world.packages.insert(id.clone(), of(false));
        for other in &ids {
            world
                .packages
                .insert(format!("{id} since {other}"), of(true));
        }
    }
}

fn text(browser: &Browser, selector: &str) -> Result<String, Box<dyn std::error::Error>> {
    let script = "return document.querySelector(arguments[0])?.innerText ?? ''";
    let text = browser.run(script, json!([selector]))?;
    Ok(text.as_str().unwrap_or_default().to_owned())
}

#[test]
fn what_is_installed_is_read_when_it_is_opened() -> Outcome {
    let Some((browser, standin)) = begin(&BrowserOptions::default())? else {
        return Ok(());
    };
    populate(&mut standin.world());
    browser.go(&standin.url("sessions"))?;
    browser.click("article:first-of-type .opener")?;
    let asked = |standin: &crate::standin::Standin| {
        let world = standin.world();
        let calls = world.calls.iter();
        calls.filter(|call| call.contains("/packages")).count()
    };
    assert_eq!(asked(&standin), 0);
    browser.click("article:first-of-type .installed > summary")?;
    browser.see("5 packages added · 1 in another version · 1 removed")?;
    assert_eq!(asked(&standin), 1);
    let shown = text(&browser, "article:first-of-type .installed")?;
    for part in [
        "numpy 2.0.2 → 2.1.0",
        "torch 2.9.1",
        "rich 13.9.4 removed",
        "apt, dpkg: 2 packages",
        "ffmpeg 7:6.1.1-3ubuntu5",
        "/opt/conda/lib/python3.12/site-packages",
    ] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    // One whose node has not looked.
    browser.click("article:nth-of-type(2) .opener")?;
    browser.click("article:nth-of-type(2) .installed > summary")?;
    browser.see("The node has not looked into this session yet.")?;

    // An image, and what came since the save before.
    browser.click("nav a[href='#/images']")?;
    browser.click(".installed > summary")?;
    browser.see("Since 2026-11-22-0900")?;
    browser.see("torch")?;
    browser.click(".choice button:nth-child(2)")?;
    browser.see("httpx 0.28.1")?;
    browser.see("one of the lists was shortened")?;
    assert!(!text(&browser, ".installed")?.contains("torch"));
    browser.click(".choice button:first-child")?;
    browser.see("torch 2.9.1")?;
    // The oldest has none before it.
    browser.click(".version:nth-of-type(2) .installed > summary")?;
    browser.until(
        "the second list",
        "return document.querySelectorAll('.version:nth-of-type(2) .packages li').length === 7",
        json!([]),
    )?;
    assert!(!text(&browser, ".version:nth-of-type(2) .installed")?.contains("Since"));
    // Found by a package.
    browser.click("#find-image")?;
    browser.keys("flash-attn")?;
    browser.see("2 images")?;
    browser.assert_clean()
}

#[test]
fn thousands_of_packages_and_what_tenants_name_them_are_bounded_and_text() -> Outcome {
    let look = BrowserOptions {
        width: 360,
        height: 780,
        ..BrowserOptions::default()
    };
    let Some((browser, standin)) = begin(&look)? else {
        return Ok(());
    };
    let hostile = "<img src=x onerror=alert(1)>\u{202e}evil";
    {
        let mut world = standin.world();
        let id = world.sessions[0].id.clone();
        let many = (0..2000).map(|n| change(Manager::Npm, &format!("p{n}"), None, Some("1.0")));
        let mut list = Packages {
            packages: many.collect(),
            more: 31_000,
            unread: vec![Unread {
                path: hostile.to_owned(),
                reason: "x".repeat(500),
            }],
            unread_more: 4,
            ..Packages::default()
        };
        list.packages[0].name = hostile.to_owned();
        list.packages[1].version = Some("9".repeat(256));
        world.packages.insert(id, list);
    }
    browser.go(&standin.url("sessions"))?;
    browser.click("article:first-of-type .opener")?;
    browser.click("article:first-of-type .installed > summary")?;
    // First the count; the list is made by who opens it, in pieces.
    browser.see("2,000 packages added")?;
    browser.see("and 31,000 more, which are not listed")?;
    browser.see("5 files that describe packages could not be read")?;
    let count = "return document.querySelectorAll('.installed .inside-of > details:first-of-type li').length";
    let made = |browser: &Browser| browser.run(count, json!([]));
    assert_eq!(made(&browser)?, 0);
    browser.click(".installed details > summary")?;
    browser.see("p99 1.0")?;
    assert_eq!(made(&browser)?, 100);
    assert!(browser.shows("<img src=x onerror=alert(1)>⟨U+202E⟩evil")?);
    browser.click(".installed details > button")?;
    browser.see("p199 1.0")?;
    let narrow = "return document.documentElement.scrollWidth <= innerWidth";
    assert_eq!(browser.run(narrow, json!([]))?, true, "it is too wide");
    browser.assert_clean()
}
