//! The timeline of a session, as the page shows it.

use std::collections::HashMap;

use axum::Json;
use axum::extract::{Path, Query, State as Given};
use axum::http::{HeaderMap, StatusCode};
use axum::response::IntoResponse as _;
use serde_json::json;
use upperdeck::service::job::{ChangedFile, Changes, Since, State};
use upperdeck::service::manager::api::{
    ImageFate, ImageState, PackageSummary, Save, Timeline, TimelineEntry,
};
use upperdeck::service::record::MadeBy;

use crate::begin;
use crate::browser::{BrowserOptions, Outcome};
use crate::standin::{Reply, Shared, Standin, World, enter, refusal, refuse};

/// The stand-in for `GET /api/v1/sessions/{id}/timeline`.
pub async fn list(
    Given(world): Given<Shared>,
    headers: HeaderMap,
    Path(id): Path<String>,
    Query(query): Query<HashMap<String, String>>,
) -> Reply {
    let world = enter(&world, &headers, false)?;
    let limit: usize = query.get("limit").map_or(20, |text| text.parse().unwrap());
    let done = world.saves.iter().filter(|save| {
        save.session == id
            && save.state == State::Succeeded
            && query
                .get("cursor")
                .is_none_or(|after| save.id.to_string() < *after)
    });
    let mut entries: Vec<_> = done.map(|save| entry(&world, save)).collect();
    let more = entries.len() > limit;
    entries.truncate(limit);
    let next = entries.last().filter(|_| more);
    let next = next.map(|entry| entry.save.to_string());
    Ok(Json(Timeline { entries, next }).into_response())
}

/// The stand-in for `GET /api/v1/images/{name}/digests/{digest}`.
pub async fn image(
    Given(world): Given<Shared>,
    headers: HeaderMap,
    Path((name, digest)): Path<(String, String)>,
) -> Reply {
    let world = enter(&world, &headers, false)?;
    let mut all = world.images.iter();
    match all.find(|image| image.name == name && image.digest == digest) {
        Some(image) => Ok(Json(image).into_response()),
        None => Err(refuse(refusal(
            StatusCode::NOT_FOUND,
            "not_found",
            "no image",
        ))),
    }
}

fn entry(world: &World, save: &Save) -> TimelineEntry {
    let result = save.result.clone().unwrap_or_default();
    let image = world.images.iter().find(|one| one.digest == result.digest);
    let tagged = ImageFate {
        state: ImageState::Tagged,
        at: None,
        save: None,
        session_name: None,
        caller: None,
        renamed_to: None,
    };
    TimelineEntry {
        save: save.id,
        at: save.finished.clone().unwrap_or_default(),
        made_by: match save.tag.split('-').next() {
            Some("auto") => MadeBy::Autosave,
            Some("ended") => MadeBy::End,
            _ => MadeBy::User,
        },
        session: save.session.clone(),
        session_name: save.session_name.clone(),
        user: save.user.clone(),
        name: save.name.clone(),
        tag: save.tag.clone(),
        digest: result.digest,
        reference: save.target.clone(),
        fate: save.image.clone().unwrap_or(tagged),
        pinned: image.is_some_and(|image| image.pinned),
        layer_bytes: result.layer_bytes,
        image_bytes: result.image_bytes,
        message: save.message.clone(),
        packages: result.changes.as_ref().map(|_| PackageSummary {
            added: 6,
            removed: 1,
            changed: 1,
            some: ["+numpy 2.1", "torch 2.8 → 2.9", "-rich 13"]
                .map(str::to_owned)
                .into(),
        }),
        changes: result.changes,
    }
}

fn change(since: Since, files: u64, removed: u64, bytes: u64, largest: &str) -> Changes {
    Changes {
        since,
        entries: files + 2,
        files,
        removed,
        bytes,
        largest: vec![ChangedFile {
            path: largest.to_owned(),
            bytes: bytes / 2,
        }],
    }
}

/// Adds saves of the first session: by hand, by itself and at the end of an earlier session.
pub fn populate(world: &mut World) {
    let tag = world.sessions[0].suggested_tag.clone();
    let saves = [
        ("ended-20261122-1810-3fd2", 180_000, None),
        (
            "auto-20261123-0930-77ab",
            90_000,
            Some(change(
                Since::Base,
                4_211,
                0,
                1_240_000_000,
                "/opt/conda/lib/libtorch_cuda.so",
            )),
        ),
        (
            "before-the-paper",
            9_000,
            Some(change(
                Since::Previous,
                12,
                3,
                4_100_000,
                "/home/minji/results/table-3.csv",
            )),
        ),
    ];
    for (name, age, changes) in saves {
        name.clone_into(&mut world.sessions[0].suggested_tag);
        let id = world.ended(0, State::Succeeded, None, age).id;
        let save = world.saves.iter_mut().find(|save| save.id == id).unwrap();
        save.result.as_mut().unwrap().changes = changes;
        if name.starts_with("before") {
            save.message = Some("as submitted".to_owned());
        }
    }
    world.sessions[0].suggested_tag = tag;
}

fn asked(standin: &Standin) -> usize {
    let world = standin.world();
    let calls = world.calls.iter();
    calls.filter(|call| call.contains("/timeline")).count()
}

const ENTRIES: &str = "return document.querySelectorAll('.moments > li').length === arguments[0]";

#[test]
fn what_each_save_changed_is_read_when_the_row_is_opened() -> Outcome {
    let Some((browser, standin)) = begin(&BrowserOptions::default())? else {
        return Ok(());
    };
    {
        let mut world = standin.world();
        populate(&mut world);
        world.me.start_url = Some("https://hub.example.org/spawn?image={reference}".to_owned());
    }
    browser.go(&standin.url("sessions"))?;
    browser.see("jupyter-minji-training")?;
    assert_eq!(asked(&standin), 0);
    browser.click("article:first-of-type .opener")?;
    browser.until("the timeline", ENTRIES, json!([3]))?;
    assert_eq!(asked(&standin), 1);
    let text = browser.run(
        "return [...document.querySelectorAll('.moments > li')].map((one) => one.innerText)",
        json!([]),
    )?;
    for (at, parts) in [
        (
            0,
            &[
                "by hand",
                "jupyter-minji-training:before-the-paper",
                "12 files changed, 3 removed, 4.1 MB",
                "largest /home/minji/results/table-3.csv (2.1 MB)",
                "+numpy 2.1, torch 2.8 → 2.9, -rich 13, 5 more packages",
                "as submitted",
                "Start",
                "Compare with the one before",
            ][..],
        ),
        (
            1,
            &[
                "by itself",
                "4,211 files changed, 1.2 GB",
                "on top of the base image",
            ],
        ),
        (2, &["at its end", "402 MB of changes"]),
    ] {
        for part in parts {
            let shown = text[at].as_str().unwrap_or_default();
            assert!(shown.contains(part), "{part}: {shown}");
        }
    }
    assert!(!text[2].as_str().unwrap_or_default().contains("Compare"));
    // Commands for the shell.
    let first = ".moments > li:first-child";
    browser.click(&format!("{first} > .tools-of > .commands > summary"))?;
    let reference = "registry.example.org/minji/jupyter-minji-training";
    browser.see(&format!(
        "upperdeck image cp {reference}:before-the-paper:/PATH ."
    ))?;
    browser.click(&format!("{first} .installed > summary"))?;
    browser.see(&format!(
        "upperdeck image diff {reference}:auto-20261123-0930-77ab {reference}:before-the-paper"
    ))?;
    // A save of the session has it read again, and what was opened stays open.
    browser.click("article:first-of-type button.main")?;
    browser.until("the new save", ENTRIES, json!([4]))?;
    assert_eq!(asked(&standin), 2);
    assert!(browser.shows("upperdeck image cp")?);
    // It is not read while it is closed.
    browser.click("article:first-of-type .opener")?;
    standin.world().sessions[0].suggested_tag = "later".to_owned();
    browser.click("article:first-of-type button.main")?;
    browser.until(
        "the end",
        "return !document.querySelector('progress') && document.querySelector('.state').innerText.includes('Saved')",
        json!([]),
    )?;
    assert_eq!(asked(&standin), 2);
    browser.click("article:first-of-type .opener")?;
    browser.until("the other save", ENTRIES, json!([5]))?;
    browser.assert_clean()
}

#[test]
fn a_save_is_pinned_and_deleted_where_it_is_listed() -> Outcome {
    let Some((browser, standin)) = begin(&BrowserOptions::default())? else {
        return Ok(());
    };
    populate(&mut standin.world());
    browser.go(&standin.url("sessions"))?;
    browser.click("article:first-of-type .opener")?;
    browser.until("the timeline", ENTRIES, json!([3]))?;
    let button =
        |n: usize, name: &str| format!(".moments > li:nth-child({n}) button[aria-label^='{name}']");
    browser.click(&button(1, "Pin"))?;
    browser.until(
        "the pin",
        "return document.querySelector('.moments > li').innerText.includes('protected')",
        json!([]),
    )?;
    let image = standin
        .world()
        .images
        .iter()
        .filter(|one| one.pinned)
        .count();
    assert_eq!(image, 1);
    let gone = format!(
        "return !document.querySelector(\"{}\")",
        button(1, "Delete")
    );
    assert_eq!(browser.run(&gone, json!([]))?, true);
    browser.click(&button(2, "Delete"))?;
    browser.see("This is the image’s only tag")?;
    browser.click("dialog .danger")?;
    browser.until(
        "the deletion",
        "return document.querySelector('.moments > li:nth-child(2)').innerText.includes('was deleted')",
        json!([]),
    )?;
    // What is gone is neither started nor compared by a command.
    let tools =
        "return document.querySelector('.moments > li:nth-child(2) .tools-of').checkVisibility()";
    assert_eq!(browser.run(tools, json!([]))?, false);
    browser.click(".moments > li:first-child .installed > summary")?;
    assert!(!browser.shows("upperdeck image diff")?);
    // It was deleted elsewhere meanwhile.
    standin.world().images.clear();
    browser.click(&button(3, "Delete"))?;
    browser.until(
        "the answer",
        "return document.getElementById('news').textContent.includes('had been deleted already')",
        json!([]),
    )?;
    assert_eq!(standin.world().forged, 0);
    browser.assert_clean()
}

#[test]
fn long_timelines_are_read_in_pieces_and_names_are_text() -> Outcome {
    let look = BrowserOptions {
        width: 360,
        height: 780,
        ..BrowserOptions::default()
    };
    let Some((browser, standin)) = begin(&look)? else {
        return Ok(());
    };
    {
        let mut world = standin.world();
        let hostile = format!(
            "/home/<img src=x onerror=alert(1)>\u{202e}{}",
            "x".repeat(220)
        );
        for n in 0..45 {
            world.sessions[0].suggested_tag = format!("auto-{n}");
            let id = world.ended(0, State::Succeeded, None, 90_000 - n).id;
            let save = world.saves.iter_mut().find(|save| save.id == id).unwrap();
            let changes = change(Since::Previous, u64::MAX >> 12, 3, u64::MAX >> 12, &hostile);
            save.result.as_mut().unwrap().changes = Some(changes);
        }
    }
    browser.go(&standin.url("sessions"))?;
    browser.click("article:first-of-type .opener")?;
    for shown in [20, 40, 45] {
        browser.until("the entries", ENTRIES, json!([shown]))?;
        if shown > 20 {
            // The focus goes on with the first of those that came; it scrolls the page.
            let first = "return document.activeElement?.matches(`.moments > li:nth-child(${arguments[0]})`)";
            let before = if shown == 40 { 20 } else { 40 };
            browser.until("the focus", first, json!([before + 1]))?;
        }
        if shown < 45 {
            browser.click(".timeline > button")?;
        }
    }
    let more = "return document.querySelector('.timeline > button').checkVisibility()";
    assert_eq!(browser.run(more, json!([]))?, false);
    assert!(browser.shows("<img src=x onerror=alert(1)>⟨U+202E⟩")?);
    let narrow = "return document.documentElement.scrollWidth <= innerWidth";
    assert_eq!(browser.run(narrow, json!([]))?, true, "it is too wide");
    // Nothing was saved of the other one.
    browser.click("article:nth-of-type(2) .opener")?;
    browser.see("Nothing was saved of this session yet.")?;
    browser.assert_clean()
}
