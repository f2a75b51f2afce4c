//! Images with their versions: commands, the link that starts a session, descriptions, pins, and what others share.

use serde_json::json;

use crate::begin;
use crate::browser::{BrowserOptions, Outcome};

#[test]
fn versions_are_grouped_described_pinned_shared_and_started() -> Outcome {
    let Some((browser, standin)) = begin(&BrowserOptions::default())? else {
        return Ok(());
    };
    {
        let mut world = standin.world();
        world.me.start_url = Some("https://hub.example.org/spawn?image={reference}".to_owned());
        let category = upperdeck::service::job::Category::Cpu;
        let older = world.image(
            "rstudio-minji",
            &["2026-09-01"],
            category,
            2_000,
            9_000_000,
            None,
        );
        world.images.push(older);
        let mut lent = world.image(
            "survey",
            &["v3"],
            category,
            3_000,
            50,
            Some("for the course"),
        );
        lent.user = "jun".to_owned();
        world.shared.push(lent);
    }
    browser.go(&standin.url("images"))?;
    browser.see("4 images")?;
    browser.see("for the course")?;
    let cards = "return document.querySelectorAll('main > .cards > article').length";
    assert_eq!(
        browser.run(cards, json!([]))?,
        3,
        "two versions have one name"
    );
    let link = "return document.querySelector('.start').href";
    assert_eq!(
        browser.run(link, json!([]))?,
        "https://hub.example.org/spawn?image=registry.example.org%2Fminji%2Fjupyter-minji-training%3A2026-11-23-1804"
    );
    browser.click("main > .cards > article .commands summary")?;
    let name = "registry.example.org/minji/jupyter-minji-training:2026-11-23-1804";
    for command in [
        format!("docker run -it --rm {name}"),
        format!("podman run -it --rm {name}"),
        format!("apptainer run docker://{name}"),
        format!("kubectl run jupyter-minji-training -it --rm --image={name}"),
    ] {
        browser.see(&command)?;
    }
    browser.click("main > .cards > article [aria-label^=Pin]")?;
    browser.see("is pinned: it is neither deleted nor replaced")?;
    browser.until(
        "no delete button",
        "return !document.querySelector('main > .cards > article:first-of-type .danger')",
        json!([]),
    )?;
    browser.click("main > .cards > article .more summary")?;
    browser.click("main > .cards > article .more input")?;
    browser.keys("jun, \u{e007}")?;
    browser.see("shared with jun")?;
    assert!(standin.world().images.iter().any(|image| image.pinned));
    // What another user shares can be started, and nothing else.
    let offered = "return [...document.querySelectorAll('.others button')].map((one) => one.className + one.textContent)";
    let offered = browser.run(offered, json!([]))?;
    assert!(
        !offered.to_string().contains("Delete") && !offered.to_string().contains("Pin"),
        "{offered}"
    );
    browser.click(".others [aria-label^='Remove from my list']")?;
    browser.see("can share it with you again")?;
    browser.click("dialog .danger")?;
    browser.see("is not in your list any more")?;
    assert!(standin.world().shared.is_empty());
    assert_eq!(standin.world().forged, 0);
    browser.assert_clean()
}

#[test]
fn an_image_without_a_tag_is_deleted_by_its_digest() -> Outcome {
    let Some((browser, standin)) = begin(&BrowserOptions::default())? else {
        return Ok(());
    };
    let digest = {
        let mut world = standin.world();
        let category = upperdeck::service::job::Category::Cpu;
        let bare = world.image("rstudio-minji", &[], category, 2_100_000_000, 8_000, None);
        world.images.push(bare.clone());
        bare.digest
    };
    browser.go(&standin.url("images"))?;
    browser.see("No tag any more: another save took it.")?;
    let button = format!("[aria-label='Delete rstudio-minji@{digest}']");
    browser.click(&button)?;
    browser.see(&digest)?;
    browser.see("The image has no tag (2.1 GB).")?;
    // The harmless answer has the focus and changes nothing.
    browser.keys("\u{e007}")?;
    browser.until(
        "the question to go",
        "return !document.querySelector('dialog')",
        json!([]),
    )?;
    assert_eq!(standin.world().images.len(), 4);
    browser.click(&button)?;
    browser.click("dialog .danger")?;
    browser.see("is deleted.")?;
    browser.see("3 images")?;
    {
        let world = standin.world();
        let mut left = world.images.iter();
        assert!(left.all(|image| image.digest != digest && !image.tags.is_empty()));
        let call = format!(
            "DELETE /images/rstudio-minji/digests/{}",
            digest.replace(':', "%3A")
        );
        assert!(world.calls.contains(&call), "{:?}", world.calls);
        assert_eq!(world.forged, 0);
    }
    browser.assert_clean()
}
