//! Tests of what Harbor refuses: each cause has its own code and text, and nothing is left behind.

use serde_json::{Value, json};
use upperdeck::common::digest::Digest;
use upperdeck::store::harbor::rights::{self, NEEDED};
use upperdeck::store::harbor::{self, Harbor};
use upperdeck::store::images::{self, ImageLocation, ImageSelector, Images, Query};
use upperdeck::store::registry::{Registries, denial::Denial};

use super::{Lab, MANIFEST_TYPE, Outcome, image, save, send};

type Right = (&'static str, &'static str);

/// The rights that were documented before, with which emptied repositories and deletions failed.
const FORMER: [Right; 8] = [
    ("repository", "push"),
    ("repository", "pull"),
    ("repository", "list"),
    ("artifact", "list"),
    ("artifact", "read"),
    ("tag", "delete"),
    ("project", "read"),
    ("quota", "read"),
];

/// All rights but those named.
pub fn rights_without(without: &[&str]) -> Vec<Right> {
    let kept = NEEDED
        .iter()
        .filter(|r| !without.contains(&r.to_string().as_str()));
    kept.map(|r| (r.resource, r.action)).collect()
}

async fn images_as(lab: &Lab, who: &str) -> Box<dyn Images> {
    let place: ImageLocation = lab.host.parse().unwrap();
    let registries = Registries::new(Lab::access(who));
    place.open(&registries).await.unwrap()
}

async fn harbor_as(lab: &Lab, who: &str) -> Harbor {
    let registries = Registries::new(Lab::access(who));
    let found = Harbor::find(&registries, &lab.host, "x/y").await;
    found.unwrap().unwrap()
}

/// Returns the bytes that Harbor charges a project for, as the administrator sees it.
pub async fn used(lab: &Lab, project: &str) -> u64 {
    let room = lab
        .images()
        .await
        .quota_usage(&format!("{project}/x"))
        .await;
    room.unwrap().unwrap().used
}

fn code_of(error: &images::Error) -> &'static str {
    error.code().unwrap_or("none")
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_rights_are_found_without_changing_anything() -> Outcome {
    let lab = Lab::start().await?;
    let project = lab.project(None).await;
    save(&lab.to(&format!("{project}/x")), &image("one", 100), "1").await?;
    let before = used(&lab, &project).await;
    let former = harbor_as(&lab, &lab.robot(&project, &FORMER).await).await;
    let missing = former.missing_rights(&project).await?;
    assert_eq!(
        rights::describe(&missing),
        "LIST (needs repository:read); DEL (needs artifact:delete)"
    );
    let all = harbor_as(&lab, &lab.robot(&project, &rights_without(&[])).await).await;
    assert_eq!(all.missing_rights(&project).await?, []);
    // Each right is missed by its own.
    for right in NEEDED
        .iter()
        .filter(|r| !matches!(r.action, "push" | "pull"))
    {
        let name = right.to_string();
        let (called, access) = (name.replace(':', "-"), rights_without(&[&name]));
        let robot = lab.robot_named(&called, &project, &access).await;
        let missing = harbor_as(&lab, &robot).await;
        let missing = missing.missing_rights(&project).await?;
        let names: Vec<String> = missing.iter().map(ToString::to_string).collect();
        // The quota is part of the project's summary.
        let expected = if name == "project:read" {
            vec!["project:read", "quota:read"]
        } else {
            vec![name.as_str()]
        };
        assert_eq!(names, expected);
    }
    assert_eq!(used(&lab, &project).await, before);
    let images = lab.images().await;
    let listed = images
        .images(&format!("{project}/x"), &Query::default())
        .await?;
    assert_eq!(listed.items[0].tags, ["1"]);
    // The administrator has all, and a missing project is named.
    assert_eq!(lab.harbor().await.missing_rights(&project).await?, []);
    let error = lab.harbor().await.missing_rights("nosuch-project").await;
    assert!(matches!(error, Err(harbor::Error::NoProject { .. })));
    lab.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_emptied_or_missing_repository_is_an_empty_list() -> Outcome {
    let lab = Lab::start().await?;
    let project = lab.project(None).await;
    let repository = format!("{project}/emptied");
    save(&lab.to(&repository), &image("one", 100), "1").await?;
    let which = ImageSelector::Tag("1".to_owned());
    lab.images()
        .await
        .remove(&repository, &which, false)
        .await?;
    let robot = lab.robot(&project, &FORMER).await;
    let images = images_as(&lab, &robot).await;
    for path in [
        repository.clone(),
        format!("{project}/none"),
        "nosuch-project/x".to_owned(),
    ] {
        let listed = images.images(&path, &Query::default()).await?;
        assert_eq!((listed.total, listed.items), (0, Vec::new()), "{path}");
    }
    let listed = images.repositories(&project, &Query::default()).await?;
    assert_eq!(listed.items[0].images, Some(0));
    // The project of a new user does not exist yet. Harbor answers 403 to a robot.
    let none = images
        .repositories("nosuch-project", &Query::default())
        .await?;
    assert_eq!(none.total, 0);
    assert_eq!(images.quota_usage("nosuch-project/x").await?, None);
    let error = images
        .remove("nosuch-project/x", &which, false)
        .await
        .unwrap_err();
    assert!(matches!(error, images::Error::NotFound(_)), "{error}");
    // A project that exists and may not be listed is an error.
    let other = lab.project(None).await;
    let error = images
        .repositories(&other, &Query::default())
        .await
        .unwrap_err();
    assert!(error.not_permitted(), "{error}");
    lab.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_looks_before_it_takes_anything_away() -> Outcome {
    let lab = Lab::start().await?;
    let project = lab.project(None).await;
    let repository = format!("{project}/x");
    save(&lab.to(&repository), &image("one", 100), "last").await?;
    let images = images_as(&lab, &lab.robot(&project, &FORMER).await).await;
    let last = ImageSelector::Tag("last".to_owned());
    let error = images.remove(&repository, &last, false).await.unwrap_err();
    assert!(
        error.not_permitted() && error.to_string().contains("artifact:delete"),
        "{error}"
    );
    let tags = |listed: images::Listed<images::ImageEntry>| listed.items[0].tags.clone();
    let listed = images.images(&repository, &Query::default()).await?;
    assert_eq!(tags(listed), ["last"]);
    // One tag of several needs no right to delete images.
    save(&lab.to(&repository), &image("one", 100), "more").await?;
    let more = ImageSelector::Tag("more".to_owned());
    assert!(
        !images
            .remove(&repository, &more, false)
            .await?
            .image_deleted
    );
    let full = images_as(&lab, &lab.robot(&project, &rights_without(&[])).await).await;
    assert!(full.remove(&repository, &last, false).await?.image_deleted);
    assert_eq!(used(&lab, &project).await, 0, "the quota is freed at once");
    lab.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_child_of_an_index_keeps_its_tag() -> Outcome {
    let lab = Lab::start().await?;
    let project = lab.project(None).await;
    let (repository, child) = (format!("{project}/x"), image("child", 100));
    let destination = lab.to(&repository);
    save(&destination, &child, "arm").await?;
    let index = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [{
            "mediaType": MANIFEST_TYPE, "digest": child.digest().to_string(), "size": child.manifest.len(),
            "platform": {"os": "linux", "architecture": "arm64"},
        }],
    });
    let index = index.to_string();
    let kind = "application/vnd.oci.image.index.v1+json";
    destination
        .put_manifest(index.clone().into(), kind, "all")
        .await?;
    let images = lab.images().await;
    for which in [
        ImageSelector::Tag("arm".to_owned()),
        ImageSelector::Digest(child.digest()),
    ] {
        for all_tags in [true, false] {
            if matches!(which, ImageSelector::Digest(_)) && !all_tags {
                continue;
            }
            let error = images
                .remove(&repository, &which, all_tags)
                .await
                .unwrap_err();
            assert_eq!(code_of(&error), "image_in_use", "{error}");
            assert!(error.to_string().contains("x:all"), "{error}");
        }
    }
    let arm = lab.harbor().await.artifact(&project, "x", "arm").await?;
    assert!(arm.is_some(), "the tag is gone");
    // The index takes its untagged children along, and leaves those with a tag.
    let all = ImageSelector::Tag("all".to_owned());
    let removed = images.remove(&repository, &all, false).await?;
    assert_eq!(removed.digest, Digest::of(&index));
    assert!(
        images
            .remove(&repository, &ImageSelector::Tag("arm".to_owned()), false)
            .await?
            .image_deleted
    );
    lab.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn accessories_that_go_with_an_image_are_told() -> Outcome {
    let lab = Lab::start().await?;
    let project = lab.project(None).await;
    let (repository, signed) = (format!("{project}/x"), image("signed", 100));
    let destination = lab.to(&repository);
    save(&destination, &signed, "1").await?;
    let empty = bytes::Bytes::from_static(b"{}");
    destination
        .put_blob(empty.clone(), &Digest::of(&empty))
        .await?;
    let descriptor = json!({
        "mediaType": "application/vnd.oci.empty.v1+json", "digest": Digest::of(&empty).to_string(), "size": 2,
    });
    let note = json!({
        "schemaVersion": 2, "mediaType": MANIFEST_TYPE, "artifactType": "application/vnd.example.note",
        "config": descriptor, "layers": [descriptor],
        "subject": {
            "mediaType": MANIFEST_TYPE, "digest": signed.digest().to_string(), "size": signed.manifest.len(),
        },
    });
    destination
        .put_manifest(note.to_string().into(), MANIFEST_TYPE, "note")
        .await?;
    let removed = lab
        .images()
        .await
        .remove(&repository, &ImageSelector::Tag("1".to_owned()), false)
        .await?;
    assert!(removed.image_deleted);
    assert_eq!(removed.accessories, ["subject.accessory"]);
    lab.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quota_that_a_robot_cannot_read_is_told_by_the_reply() -> Outcome {
    let lab = Lab::start().await?;
    let project = lab.project(Some(1 << 20)).await;
    let robot = lab.robot(&project, &rights_without(&["quota:read"])).await;
    let destination = lab.destination(&format!("{project}/x"), Lab::access(&robot));
    let error = send(&destination, image("big", 2 << 20).layer)
        .await
        .unwrap_err();
    let text = error.to_string();
    assert_eq!(error.code(), Some("quota_exceeded"), "{text}");
    assert!(
        text.contains("0 B of 1.0 MiB are used") && text.contains("about 2.0 MiB are needed"),
        "{text}"
    );
    assert!(error.not_permitted() && !error.retryable());
    assert_eq!(used(&lab, &project).await, 0);
    // A mount over the quota is refused, too, and not followed by an upload.
    let source = lab.project(None).await;
    let base = image("base", 3 << 20);
    save(&lab.to(&format!("{source}/base")), &base, "1").await?;
    let from = format!("{}/{source}/base", lab.host);
    let mounted = lab.to(&format!("{project}/x"));
    let error = mounted
        .mount_blob(&Digest::of(&base.layer), &from)
        .await
        .unwrap_err();
    assert_eq!(error.code(), Some("quota_exceeded"), "{error}");
    assert_eq!(used(&lab, &project).await, 0);
    lab.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn read_only_is_not_quota() -> Outcome {
    let lab = Lab::alone().await?;
    let project = lab.project(Some(1 << 30)).await;
    let repository = format!("{project}/x");
    let (one, two) = (image("one", 100), image("two", 100));
    save(&lab.to(&repository), &one, "1").await?;
    let robot = lab.robot(&project, &rights_without(&[])).await;
    lab.ask("PUT", "/configurations", &json!({"read_only": true}))
        .await;
    let seen = read_only_refusals(&lab, &repository, &robot, &two).await;
    lab.ask("PUT", "/configurations", &json!({"read_only": false}))
        .await;
    for (what, code, text) in seen? {
        assert_eq!(code, "registry_read_only", "{what}: {text}");
        assert!(
            !text.contains("quota") && text.contains("read-only mode"),
            "{what}: {text}"
        );
    }
    let listed = lab
        .images()
        .await
        .images(&repository, &Query::default())
        .await?;
    assert_eq!(listed.items[0].tags, ["1"]);
    lab.end().await
}

type Seen = Vec<(&'static str, &'static str, String)>;

async fn read_only_refusals(
    lab: &Lab,
    repository: &str,
    robot: &str,
    two: &crate::image::Image,
) -> Result<Seen, Box<dyn std::error::Error>> {
    let mut seen = Vec::new();
    for who in [lab.admin.as_str(), robot] {
        let destination = lab.destination(repository, Lab::access(who));
        let mut of = |what, error: upperdeck::store::destination::Error| {
            seen.push((what, error.code().unwrap_or("none"), error.to_string()));
        };
        of("check", destination.check().await.err().ok_or("checked")?);
        of(
            "blob",
            send(&destination, two.layer.clone())
                .await
                .err()
                .ok_or("sent")?,
        );
        let put = destination.put_manifest(two.manifest.clone(), MANIFEST_TYPE, "2");
        of("manifest", put.await.err().ok_or("written")?);
        let images = images_as(lab, who).await;
        let gone = images
            .remove(repository, &ImageSelector::Tag("1".to_owned()), false)
            .await;
        let error = gone.err().ok_or("deleted")?;
        seen.push(("delete", code_of(&error), error.to_string()));
    }
    Ok(seen)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_immutable_tag_is_seen_beforehand() -> Outcome {
    let lab = Lab::start().await?;
    let project = lab.project(None).await;
    let rule = json!({
        "scope_selectors": {"repository": [{"kind": "doublestar", "decoration": "repoMatches", "pattern": "**"}]},
        "tag_selectors": [{"kind": "doublestar", "decoration": "matches", "pattern": "fixed"}],
    });
    let rules = format!("/projects/{project}/immutabletagrules");
    lab.ask("POST", &rules, &rule).await;
    let repository = format!("{project}/x");
    let robot = lab.robot(&project, &rights_without(&[])).await;
    let destination = lab.destination(&repository, Lab::access(&robot));
    // The first image may have the tag.
    destination.check_tag("fixed").await?;
    save(&destination, &image("one", 100), "fixed").await?;
    let before = used(&lab, &project).await;
    let error = destination.check_tag("fixed").await.unwrap_err();
    assert_eq!(error.code(), Some("tag_immutable"), "{error}");
    assert!(
        error.not_permitted() && error.to_string().contains("the tag fixed of"),
        "{error}"
    );
    destination.check_tag("other").await?;
    let images = images_as(&lab, &robot).await;
    for all_tags in [false, true] {
        let fixed = ImageSelector::Tag("fixed".to_owned());
        let error = images
            .remove(&repository, &fixed, all_tags)
            .await
            .unwrap_err();
        assert_eq!(code_of(&error), "tag_immutable", "{error}");
    }
    assert_eq!(used(&lab, &project).await, before);
    let listed = lab.ask("GET", &rules, &Value::Null).await.1;
    for rule in listed.as_array().into_iter().flatten() {
        lab.ask("DELETE", &format!("{rules}/{}", rule["id"]), &Value::Null)
            .await;
    }
    lab.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unsigned_base_of_a_project_with_content_trust_is_named() -> Outcome {
    let lab = Lab::start().await?;
    let project = lab.name();
    let document = json!({
        "project_name": project,
        "metadata": {"public": "false", "enable_content_trust_cosign": "true"},
    });
    lab.ask("POST", "/projects", &document).await;
    let repository = format!("{project}/base");
    save(&lab.to(&repository), &image("one", 100), "1").await?;
    let reference = format!("{}/{repository}:1", lab.host).parse()?;
    let pulled = lab.registries().pull_from(&reference)?;
    let error = pulled.manifest("1").await.unwrap_err();
    assert_eq!(Denial::of(&error), Some(Denial::NotSigned), "{error}");
    let error = harbor::explain(&pulled, error).await;
    assert_eq!(error.code(), Some("image_not_signed"));
    assert!(error.to_string().contains("only signed images"), "{error}");
    lab.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_that_is_not_accepted_is_told_from_a_missing_right() -> Outcome {
    let lab = Lab::start().await?;
    let project = lab.project(None).await;
    let path = format!("{project}/x");
    let robot = lab.robot(&project, &rights_without(&[])).await;
    let name = robot.split(':').next().unwrap_or_default().to_owned();
    let check = async |who: &str| {
        lab.destination(&path, Lab::access(who))
            .check()
            .await
            .unwrap_err()
    };
    for (who, code, text) in [
        (
            "nosuchuser:x".to_owned(),
            "credentials_refused",
            "the password is wrong",
        ),
        (
            format!("{name}:x"),
            "robot_refused",
            "disabled, expired or deleted",
        ),
    ] {
        let error = check(&who).await;
        assert_eq!(error.code(), Some(code), "{error}");
        assert!(error.not_permitted() && !error.retryable(), "{error}");
        assert!(error.to_string().contains(text), "{error}");
    }
    // A robot that is accepted and has no right to push.
    let reader = lab
        .robot_named("reader", &project, &[("repository", "pull")])
        .await;
    let error = check(&reader).await;
    assert_eq!(error.code(), None, "{error}");
    assert!(error.not_permitted(), "{error}");
    // A robot that the administrator disabled.
    let (_, found) = lab
        .ask(
            "GET",
            &format!(
                "/robots?q=Level=project,ProjectID={}",
                lab.project_id(&project).await
            ),
            &Value::Null,
        )
        .await;
    let mut disabled = found
        .as_array()
        .into_iter()
        .flatten()
        .find(|r| r["name"] == *name)
        .cloned()
        .ok_or("no robot")?;
    disabled["disable"] = json!(true);
    lab.ask("PUT", &format!("/robots/{}", disabled["id"]), &disabled)
        .await;
    let error = check(&robot).await;
    assert_eq!(error.code(), Some("robot_refused"), "{error}");
    lab.end().await
}
