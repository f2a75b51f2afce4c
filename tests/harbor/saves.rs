//! Whole saves into Harbor: what each refusal leaves in the project, by Harbor's own count, and what is sent again.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use upperdeck::common::digest::Digest;
use upperdeck::store::images::{self, ImageSelector};

use super::refusals::{rights_without, used};
use super::world::{PROGRAM, World};
use super::{Lab, Outcome, image, save, send, support};

/// The end of a save.
#[derive(Debug)]
struct Ended {
    exit: i32,
    /// Code of the `failed` event.
    code: String,
    text: String,
}

/// Returns a container with content, or `None` with a note if this machine cannot have one.
pub fn container(home: &Path) -> Option<World> {
    let made = World::new(home).and_then(|world| world.work().map(|()| world));
    match made {
        Ok(world) => Some(world),
        Err(error) => {
            support::ignore(&format!("no container: {error:#}"));
            None
        }
    }
}

pub fn command(world: &World, who: &str, destination: &str, state: &str) -> Command {
    let at = |name: &str| world.home.join(name).display().to_string();
    let mut command = Command::new(PROGRAM);
    command.arg("commit");
    for flag in [
        "containerd-root",
        "containerd-state",
        "docker-root",
        "storage-root",
        "storage-runroot",
    ] {
        command.args([format!("--{flag}"), at("none")]);
    }
    command
        .args(["--state-dir", &at(state)])
        .args(["--base", &format!("oci:{}:base", at("images"))])
        .args(["--progress", "json", "--max-pause", "60s", "--jobs", "1"])
        .args(["--creds", who, "--tls-verify=false"])
        .arg(format!("pid:{}", world.pid))
        .arg(destination)
        .env("HOME", "/nonexistent")
        .env_remove("http_proxy");
    command
}

fn ended(output: &std::process::Output) -> Ended {
    let said = [&output.stdout[..], &output.stderr[..]].concat();
    let text = String::from_utf8_lossy(&said).into_owned();
    let mut events = text
        .lines()
        .rev()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let failed = events.find(|event| event["event"] == "failed");
    let failed = failed.unwrap_or_default();
    Ended {
        exit: output.status.code().unwrap_or(-1),
        code: failed["code"].as_str().unwrap_or("none").to_owned(),
        text: failed["message"].as_str().unwrap_or(&text).to_owned(),
    }
}

async fn commit(world: &World, who: &str, destination: &str) -> Ended {
    let mut command = command(world, who, destination, "state");
    let output = tokio::task::spawn_blocking(move || command.output()).await;
    ended(&output.unwrap().unwrap())
}

/// One line of the table: what was refused, how, and what is left of it.
fn row(scenario: &str, end: &Ended, left: u64) {
    eprintln!(
        "| {scenario} | {} | {} | {} | {left} |",
        end.exit, end.code, end.text
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_leaves_nothing() -> Outcome {
    let lab = Lab::start().await?;
    let home = tempfile::tempdir()?;
    let Some(world) = container(home.path()) else {
        return lab.end().await;
    };
    let to = |project: &str| format!("{}/{project}/x:1", lab.host);
    let refused = async |scenario: &str, project: &str, who: &str, code: &str| {
        let before = used(&lab, project).await;
        let end = commit(&world, who, &to(project)).await;
        let left = used(&lab, project).await - before;
        row(scenario, &end, left);
        assert_eq!(
            (end.exit, end.code.as_str()),
            (77, code),
            "{scenario}: {}",
            end.text
        );
        assert_eq!(left, 0, "{scenario}");
        assert!(!end.text.contains("://"), "{scenario}: {}", end.text);
        end.text
    };
    let tiny = lab.project(Some(10 << 10)).await;
    let text = refused("the base does not fit", &tiny, &lab.admin, "quota_exceeded").await;
    assert!(
        text.contains("the layers below the new ones alone need"),
        "{text}"
    );

    let small = lab.project(Some(1 << 20)).await;
    let text = refused(
        "the layer does not fit",
        &small,
        &lab.admin,
        "quota_exceeded",
    )
    .await;
    assert!(text.contains("of 1.0 MiB are used"), "{text}");
    let blind = lab.robot(&small, &rights_without(&["quota:read"])).await;
    let text = refused(
        "the same, quota not visible",
        &small,
        &blind,
        "quota_exceeded",
    )
    .await;
    assert!(text.contains("of 1.0 MiB are used"), "{text}");

    let project = lab.project(None).await;
    let robot = lab.robot(&project, &rights_without(&[])).await;
    let name = robot.split(':').next().unwrap_or_default().to_owned();
    refused(
        "wrong secret",
        &project,
        &format!("{name}:x"),
        "robot_refused",
    )
    .await;
    refused(
        "wrong password",
        &project,
        "nosuchuser:x",
        "credentials_refused",
    )
    .await;
    let reader = lab
        .robot_named("reader", &project, &[("repository", "pull")])
        .await;
    let end = commit(&world, &reader, &to(&project)).await;
    row("no right to push", &end, used(&lab, &project).await);
    assert_eq!((end.exit, end.code.as_str()), (77, "not_permitted"));

    save(&lab.to(&format!("{project}/x")), &image("old", 100), "1").await?;
    let rules = format!("/projects/{project}/immutabletagrules");
    let rule = json!({
        "scope_selectors": {"repository": [{"kind": "doublestar", "decoration": "repoMatches", "pattern": "**"}]},
        "tag_selectors": [{"kind": "doublestar", "decoration": "matches", "pattern": "1"}],
    });
    lab.ask("POST", &rules, &rule).await;
    refused("immutable tag", &project, &robot, "tag_immutable").await;
    let listed = lab.ask("GET", &rules, &Value::Null).await.1;
    for rule in listed.as_array().into_iter().flatten() {
        let path = format!("{rules}/{}", rule["id"]);
        lab.ask("DELETE", &path, &Value::Null).await;
    }
    let end = commit(&world, &robot, &to(&project)).await;
    row("all rights", &end, used(&lab, &project).await);
    assert_eq!(end.exit, 0, "{}", end.text);
    lab.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_save_into_a_registry_in_read_only_mode_leaves_nothing() -> Outcome {
    let lab = Lab::alone().await?;
    let home = tempfile::tempdir()?;
    let Some(world) = container(home.path()) else {
        return lab.end().await;
    };
    let project = lab.project(Some(1 << 30)).await;
    let robot = lab.robot(&project, &rights_without(&[])).await;
    lab.ask("PUT", "/configurations", &json!({"read_only": true}))
        .await;
    let end = commit(&world, &robot, &format!("{}/{project}/x:1", lab.host)).await;
    lab.ask("PUT", "/configurations", &json!({"read_only": false}))
        .await;
    row("read-only", &end, used(&lab, &project).await);
    assert_eq!(
        (end.exit, end.code.as_str()),
        (77, "registry_read_only"),
        "{}",
        end.text
    );
    assert_eq!(used(&lab, &project).await, 0);
    lab.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn blobs_of_deleted_images_count_as_new() -> Outcome {
    let lab = Lab::start().await?;
    let project = lab.project(Some(1 << 30)).await;
    let repository = format!("{project}/x");
    let (kept, gone) = (image("kept", 1000), image("gone", 2000));
    let destination = lab.to(&repository);
    save(&destination, &kept, "kept").await?;
    save(&destination, &gone, "gone").await?;
    let which = ImageSelector::Tag("gone".to_owned());
    lab.images()
        .await
        .remove(&repository, &which, false)
        .await?;
    let layers = [&kept, &gone].map(|image| Digest::of(&image.layer));
    for layer in &layers {
        assert!(
            destination.has_blob(layer, None).await?.is_some(),
            "the registry has it"
        );
    }
    let budget = destination.budget().await?.ok_or("no quota")?;
    let sizes = layers.into_iter().zip([1000, 2000]).collect();
    assert_eq!(budget.uncharged(&sizes, 0).await?, 2000);

    // A blob that was completed for no image yet is charged already, and not again with the manifest.
    let pushed = image("pushed", 1500);
    let before = used(&lab, &project).await;
    send(&destination, pushed.layer.clone()).await?;
    assert_eq!(used(&lab, &project).await, before + 1500);
    let budget = destination.budget().await?.ok_or("no quota")?;
    let mut sizes = BTreeMap::from([(Digest::of(&pushed.layer), 1500)]);
    assert_eq!(budget.uncharged(&sizes, 0).await?, 0);
    let of_this_save = budget.uncharged(&sizes, 1500).await?;
    assert_eq!(
        of_this_save, 1500,
        "what this save has completed is none of these"
    );
    sizes.insert(layers[1], 2000);
    assert_eq!(budget.uncharged(&sizes, 0).await?, 2000);
    save(&destination, &pushed, "pushed").await?;
    assert_eq!(used(&lab, &project).await, before + pushed.size());
    lab.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn two_repositories_of_a_project_share_what_is_charged() -> Outcome {
    let lab = Lab::start().await?;
    let home = tempfile::tempdir()?;
    let Some(world) = container(home.path()) else {
        return lab.end().await;
    };
    let wide = lab.project(None).await;
    let end = commit(&world, &lab.admin, &format!("{}/{wide}/a:1", lab.host)).await;
    assert_eq!(end.exit, 0, "{}", end.text);
    // There is room for one save and a small change, and not for two saves.
    let first = used(&lab, &wide).await;
    let tight = lab.project(Some(first + (100 << 10))).await;
    let robot = lab.robot(&tight, &rights_without(&[])).await;
    for (name, letter) in [("a", "a"), ("b", "b"), ("a", "c")] {
        let to = format!("{}/{tight}/{name}:1", lab.host);
        let mut command = command(&world, &robot, &to, "state-tight");
        let output = tokio::task::spawn_blocking(move || command.output()).await??;
        let end = ended(&output);
        assert_eq!(end.exit, 0, "{name}: {}", end.text);
        world.change(letter)?;
    }
    assert!(first > 1 << 20 && used(&lab, &tight).await < first + (100 << 10));
    lab.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn blobs_that_a_garbage_collection_took_are_sent_again() -> Outcome {
    let lab = Lab::start().await?;
    let (Some(stand_in), home) = (&lab.stand_in, tempfile::tempdir()?) else {
        // A garbage collection of a running Harbor takes place when its job service decides.
        return lab.end().await;
    };
    let Some(world) = container(home.path()) else {
        return lab.end().await;
    };
    let project = lab.project(None).await;
    let to = |tag: &str| format!("{}/{project}/x:{tag}", lab.host);
    for tag in ["first", "second"] {
        stand_in.state.lock().unwrap().collect_before_manifest = true;
        let end = commit(&world, &lab.admin, &to(tag)).await;
        assert_eq!(end.exit, 0, "{tag}: {}", end.text);
        assert!(
            end.text.contains("parts of the image"),
            "{tag}: {}",
            end.text
        );
        let tagged = format!("{project}/x");
        assert!(
            stand_in.state.lock().unwrap().is_whole(&tagged, tag),
            "{tag} lacks blobs"
        );
        world.work_on().ok();
    }
    // An error of the registry at the manifest passes.
    stand_in.state.lock().unwrap().fail_manifests = 3;
    let end = commit(&world, &lab.admin, &to("third")).await;
    assert_eq!(end.exit, 0, "{}", end.text);
    stand_in.state.lock().unwrap().fail_manifests = 100;
    let end = commit(&world, &lab.admin, &to("fourth")).await;
    assert_eq!(end.exit, 1, "{}", end.text);
    lab.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn three_saves_of_one_container_take_turns() -> Outcome {
    let lab = Lab::start().await?;
    let home = tempfile::tempdir()?;
    let Some(world) = container(home.path()) else {
        return lab.end().await;
    };
    let project = lab.project(None).await;
    for pause in ["full", "live"] {
        let saves = (0..3).map(|n| {
            let to = format!("{}/{project}/{pause}{n}:1", lab.host);
            // Each has a place of its own for what it keeps, so that only the freezer is shared.
            let mut command = command(&world, &lab.admin, &to, &format!("state-{pause}{n}"));
            command.args(["--pause", pause]);
            tokio::task::spawn_blocking(move || command.output())
        });
        let saves: Vec<_> = saves.collect();
        for save in saves {
            let end = ended(&save.await??);
            assert_eq!(end.exit, 0, "{pause}: {}", end.text);
        }
    }
    assert!(world.runs().is_ok(), "the container runs");
    lab.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_lost_its_tag_goes_if_nothing_needs_it() -> Outcome {
    let lab = Lab::start().await?;
    let home = tempfile::tempdir()?;
    let Some(world) = container(home.path()) else {
        return lab.end().await;
    };
    let project = lab.project(Some(1 << 30)).await;
    let repository = format!("{project}/x");
    let robot = lab.robot(&project, &rights_without(&[])).await;
    let to = format!("{}/{repository}:1", lab.host);
    let again = async |flags: &[&str]| {
        world.work_on().ok();
        world.change(if flags.is_empty() { "a" } else { "b" }).ok();
        let mut command = command(&world, &robot, &to, "state");
        command.args(flags);
        let output = tokio::task::spawn_blocking(move || command.output()).await;
        let end = ended(&output.unwrap().unwrap());
        assert_eq!(end.exit, 0, "{}", end.text);
        let listed = lab.images().await;
        let listed = listed.images(&repository, &images::Query::default()).await;
        listed.unwrap().items
    };
    assert_eq!(again(&[]).await.len(), 1);
    let kept = again(&["--timestamp", "1750000001"]).await;
    assert_eq!(kept.len(), 2, "kept unless asked for");
    let old = kept
        .iter()
        .find(|i| i.tags.is_empty())
        .ok_or("no untagged image")?;
    let gone = again(&["--delete-replaced", "--timestamp", "1750000002"]).await;
    assert_eq!(
        gone.len(),
        2,
        "the one from before stays, the replaced one goes"
    );
    // The untagged one can be deleted by its digest.
    let which = ImageSelector::Digest(old.digest);
    let removed = lab
        .images()
        .await
        .remove(&repository, &which, false)
        .await?;
    assert!(removed.image_deleted);
    lab.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_project_gets_its_quota_and_the_image_says_what_it_is() -> Outcome {
    let lab = Lab::start().await?;
    let home = tempfile::tempdir()?;
    let Some(world) = container(home.path()) else {
        return lab.end().await;
    };
    let project = lab.name();
    let to = format!("{}/{project}/notebook:monday", lab.host);
    let mut command = command(&world, &lab.admin, &to, "state");
    command.args(["--create-project", "--project-quota", "20MiB"]);
    command.args(["--author", "alice", "--message", "with pandas"]);
    let output = tokio::task::spawn_blocking(move || command.output()).await??;
    let end = ended(&output);
    assert_eq!(end.exit, 0, "{}", end.text);
    let images = lab.images().await;
    let usage = images.quota_usage(&format!("{project}/x")).await?;
    assert_eq!(usage.and_then(|usage| usage.limit), Some(20 << 20));
    let (notebook, query) = (format!("{project}/notebook"), images::Query::default());
    let image = images.images(&notebook, &query).await?.items.remove(0);
    let says = |key: &str| image.annotations[&format!("org.opencontainers.image.{key}")].clone();
    assert_eq!(
        (says("authors"), says("description")),
        ("alice".to_owned(), "with pandas".to_owned())
    );
    assert!(says("created").starts_with("20"));
    lab.end().await
}
