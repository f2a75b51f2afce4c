//! The texts of the page in each language, and that untrusted input is shown as text.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Map, Value, json};
use upperdeck::service::job::{Category, Code, Kind, State};

use crate::begin;
use crate::browser::{BrowserOptions, Outcome};
use crate::standin::World;

fn source(name: &str) -> std::io::Result<String> {
    std::fs::read_to_string(
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("src/service/portal")
            .join(name),
    )
}

/// Returns the strings of a language. The files are JSON after two words of JavaScript.
pub fn strings(language: &str) -> Outcome<Map<String, Value>> {
    let text = source(&format!("strings/{language}.js"))?;
    Ok(serde_json::from_str(
        text.strip_prefix("export default ").ok_or("no strings")?,
    )?)
}

#[test]
fn every_language_has_every_word() -> Outcome {
    let english = strings("en")?;
    let placeholders = |text: &Value| -> BTreeSet<String> {
        let text = text.as_str().unwrap_or_default();
        text.split('{')
            .skip(1)
            .filter_map(|rest| Some(rest.split_once('}')?.0.to_owned()))
            .collect()
    };
    for language in ["en", "ko"] {
        let words = strings(language)?;
        for (key, text) in &words {
            assert!(
                text.as_str().is_some_and(|text| !text.is_empty()),
                "{language}: {key}"
            );
            assert_eq!(
                placeholders(text),
                placeholders(&english[key]),
                "{language}: {key}"
            );
        }
        // Not every language tells one from many.
        let general = english
            .keys()
            .filter(|key| key.rsplit('.').next() != Some("one"));
        for key in general {
            assert!(words.contains_key(key), "{language} has no {key}");
        }
        for code in Code::ALL {
            for kind in ["failed", "advice"] {
                assert!(
                    words.contains_key(&format!("{kind}.{}", code.name())),
                    "{language}: {kind} {code:?}"
                );
            }
        }
        for state in State::ALL {
            assert!(
                words.contains_key(&format!("state.{}", state.name())),
                "{language}: {state:?}"
            );
        }
        for phase in [
            "locating",
            "scanning",
            "streaming",
            "base",
            "finishing",
            "queued",
            "assigned",
        ] {
            assert!(
                words.contains_key(&format!("phase.{phase}")),
                "{language}: {phase}"
            );
        }
    }
    let mut asked = 0;
    for file in [
        "app.js",
        "autosave.js",
        "contents.js",
        "element.js",
        "format.js",
        "history.js",
        "images.js",
        "mail.js",
        "operations.js",
        "packages.js",
        "row.js",
        "saves.js",
        "sessions.js",
        "signin.js",
        "timeline.js",
    ] {
        let text = source(file)?;
        for call in ["t(\"", "sentence(\""] {
            for (at, _) in text
                .match_indices(call)
                .filter(|(at, _)| !text[..*at].ends_with(|c: char| c.is_alphanumeric()))
            {
                let key = text[at + call.len()..]
                    .split('"')
                    .next()
                    .unwrap_or_default();
                assert!(
                    english.contains_key(key) || english.contains_key(&format!("{key}.other")),
                    "{file} says {key}"
                );
                asked += 1;
            }
        }
    }
    assert!(asked > 100, "only {asked} calls found");
    Ok(())
}

#[test]
fn the_browsers_language_is_spoken() -> Outcome {
    for (language, code, texts) in [
        (
            "ko-KR",
            "ko",
            [
                "내 세션",
                "1.2GB, 지난 저장 이후 바뀐 것",
                "약 15초",
                "저장되지 않음",
            ],
        ),
        (
            "fr-FR",
            "en",
            [
                "My sessions",
                "1.2 GB, what changed since the last save",
                "about 15",
                "Not saved",
            ],
        ),
        (
            "fr-FR,ko,en",
            "ko",
            [
                "내 세션",
                "1.2GB, 지난 저장 이후 바뀐 것",
                "약 15초",
                "저장되지 않음",
            ],
        ),
    ] {
        let Some((browser, standin)) = begin(&BrowserOptions {
            language,
            ..BrowserOptions::default()
        })?
        else {
            return Ok(());
        };
        standin.world().ended(1, State::Succeeded, None, 90_000);
        browser.go(&standin.url("sessions"))?;
        for session in [1, 2] {
            browser.click(&format!("article:nth-of-type({session}) .opener"))?;
        }
        for text in texts {
            browser.see(text)?;
        }
        assert_eq!(
            browser.run("return document.documentElement.lang", json!([]))?,
            code,
            "{language}"
        );
        browser.assert_clean()?;
    }
    Ok(())
}

/// Names that a third party could choose, and the part of each that must be visible.
fn hostile() -> Vec<(String, String)> {
    let plain = |text: &str| (text.to_owned(), text.to_owned());
    vec![
        plain("<script>wrong.push('script')</script>"),
        plain("\"><img src=x onerror=\"wrong.push('img')\">"),
        plain("'-wrong.push(1)-' {image} ${wrong.push(2)} `"),
        plain("javascript:wrong.push(3)"),
        (
            "evil\u{202e}gnp.exe\u{2066}x\u{2069}\u{2069}".to_owned(),
            "evil⟨U+202E⟩gnp.exe⟨U+2066⟩x".to_owned(),
        ),
        (
            "line\u{1b}[31m\u{2028}end".to_owned(),
            "line⟨U+001B⟩[31m⟨U+2028⟩end".to_owned(),
        ),
        plain("שלום-עולם"),
        plain("👩‍🔬🧪-연구"),
        plain(&"w".repeat(255)),
    ]
}

#[test]
fn hostile_names_are_text_and_nothing_runs() -> Outcome {
    for width in [1100, 390] {
        let look = BrowserOptions {
            width,
            ..BrowserOptions::default()
        };
        let Some((browser, standin)) = begin(&look)? else {
            return Ok(());
        };
        {
            let mut world = standin.world();
            world.me.administrator = true;
            world.me.user = hostile()[0].0.clone();
            world.sessions.clear();
            world.images.clear();
            for (at, (name, _)) in hostile().into_iter().enumerate() {
                let mut session =
                    World::session(Kind::Other, Category::Cpu, &name, &name, 100 + at as i64);
                session.id = format!("{at:0>64}");
                session.owner = Some(world.me.user.clone());
                session.image = Some(name.clone());
                session.namespace = Some(name.clone());
                session.unsaved = vec![upperdeck::service::job::Unsaved {
                    path: format!("/{name}"),
                    kind: name.clone(),
                    data: true,
                }];
                session.suggested_name = name.clone();
                session.suggested_tag = name.clone();
                world.sessions.push(session);
                let mut image = world.image(
                    &name,
                    &[&name, "other"],
                    Category::Gpu,
                    10_000 + at as u64,
                    50,
                    Some(&name),
                );
                image.session_name = Some(name.clone());
                image.base = Some(name.clone());
                world.images.push(image);
                let mut node = World::node(&name, true);
                node.problems.push(name.clone());
                node.version.clone_from(&name);
                world.nodes.push(node);
                let failed = world.ended(at, State::Failed, Some(Code::Policy), 60);
                let save = world
                    .saves
                    .iter_mut()
                    .find(|save| save.id == failed.id)
                    .ok_or("no save")?;
                save.message = Some(name.clone());
                save.session_name.clone_from(&name);
                save.error
                    .as_mut()
                    .ok_or("no error")?
                    .message
                    .clone_from(&name);
                save.warnings = vec![upperdeck::service::manager::api::Warning {
                    code: name.clone(),
                    message: name.clone(),
                }];
                world.dead.push(failed.id);
            }
            world.quota.scope = hostile()[1].0.clone();
        }
        for (view, count) in [
            ("sessions", 9),
            ("images", 9),
            ("history", 9),
            ("operations", 9),
        ] {
            browser.go(&standin.url(view))?;
            let drawn =
                "document.querySelectorAll('details').forEach((one) => { one.open = true; });
                document.querySelectorAll('.opener[aria-expanded=false]').forEach((one) => one.click());
                return document.querySelectorAll('.card').length >= arguments[0]";
            browser.until(view, drawn, json!([count]))?;
            for (_, seen) in hostile() {
                browser.see(&seen)?;
            }
            let made = "return document.body.querySelectorAll('script, img, iframe, [onerror], [style*=url]').length";
            assert_eq!(
                browser.run(made, json!([]))?,
                0,
                "{view}: elements out of names"
            );
            let wide = "return [...document.querySelectorAll('.card, main, header')].filter((e) => e.scrollWidth > e.clientWidth + 1)
                .map((e) => e.className + e.scrollWidth).concat(document.documentElement.scrollWidth > innerWidth ? 'page' : [])";
            assert_eq!(
                browser.run(wide, json!([]))?,
                json!([]),
                "{view}: wider than a window of {width}"
            );
            browser.assert_clean()?;
        }
        browser.go(&standin.url("images"))?;
        browser.click("article:nth-of-type(2) .tags .danger")?;
        browser.until(
            "the question",
            "return document.querySelector('dialog h2')",
            json!([]),
        )?;
        browser.assert_clean()?;
        assert_eq!(standin.world().forged, 0);
    }
    Ok(())
}
