//! Tests of listing, deleting, copying out of, comparing and squashing images without Harbor, on docker-registry and on a
//! layout directory.
// A panic in a helper fails the test, as intended.
#![allow(clippy::unwrap_used)]

#[path = "images/hostile.rs"]
mod hostile;
#[path = "support/http.rs"]
mod http;
#[path = "support/image.rs"]
mod image;
#[path = "images/index.rs"]
mod index;
#[path = "support/mod.rs"]
#[allow(dead_code)]
mod support;
#[path = "images/tools.rs"]
mod tools;

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bytes::Bytes;
use image::{Image, MANIFEST_TYPE};
use serde_json::{Value, json};
use support::{Need, ignored};
use upperdeck::common::digest::Digest;
use upperdeck::store::destination::{Destination, Error as DestinationError, Replaceable, Target};
use upperdeck::store::images::{Error, ImageLocation, ImageSelector, Images, Query, Sort};
use upperdeck::store::registry::{Access, Registries};

type Outcome = Result<(), Box<dyn std::error::Error>>;

const INDEX_TYPE: &str = "application/vnd.oci.image.index.v1+json";

fn registries() -> Registries {
    Registries::new(Access {
        authfile: Some("/dev/null".into()),
        ..Access::default()
    })
}

fn image(name: &str, size: usize, day: u32) -> Image {
    let layer = Bytes::from(name.repeat(size / name.len() + 1).into_bytes()).slice(..size);
    let config = json!({
        "architecture": "arm64", "os": "linux", "created": format!("2026-11-{day:02}T00:00:00Z"),
        "config": {"Labels": {"of": name}},
    });
    Image::new(layer, config, &json!({"note": name}))
}

async fn save(target: &str, image: &Image) -> Result<(), DestinationError> {
    let target = Target::for_saving(target).unwrap();
    let destination = Destination::open(&target, &registries())?;
    for blob in [&image.layer, &image.config] {
        destination
            .put_blob(blob.clone(), &Digest::of(blob))
            .await?;
    }
    let put = destination.put_manifest(image.manifest.clone(), MANIFEST_TYPE, target.tag());
    put.await.map(drop)
}

struct Registry(Child, u16, #[allow(dead_code)] tempfile::TempDir);

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Registry {
    fn start(delete: bool) -> Result<Self, Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        let port = std::net::TcpListener::bind("127.0.0.1:0")?
            .local_addr()?
            .port();
        let config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}, delete: {{enabled: {delete}}}}}\n\
             http: {{addr: \"127.0.0.1:{port}\"}}\n",
            dir.path().display()
        );
        let file = dir.path().join("config.yml");
        std::fs::write(&file, config)?;
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(file)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let registry = Self(child, port, dir);
        let until = Instant::now() + Duration::from_secs(20);
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(Instant::now() < until, "docker-registry does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(registry)
    }
}

async fn place(text: &str) -> Box<dyn Images> {
    text.parse::<ImageLocation>()
        .unwrap()
        .open(&registries())
        .await
        .unwrap()
}

/// Checks that apply to every kind of place. `target` is completed by a tag; one of the images gets two tags.
async fn lists(images: &dyn Images, target: &str, repository: &str) -> Outcome {
    let (one, two) = (image("one", 5000, 1), image("two", 9000, 2));
    for (tag, image) in [("a", &one), ("b", &one), ("c", &two)] {
        save(&format!("{target}:{tag}"), image).await?;
    }
    let listed = images.images(repository, &Query::default()).await?;
    assert_eq!(listed.total, 2);
    let newest: Vec<_> = listed.items.iter().map(|i| i.digest).collect();
    assert_eq!(newest, [two.digest(), one.digest()]);
    let found = &listed.items[1];
    assert_eq!(
        (found.tags.as_slice(), found.size),
        (
            ["a".to_owned(), "b".to_owned()].as_slice(),
            Some(one.size())
        )
    );
    assert_eq!(found.created.as_deref(), Some("2026-11-01T00:00:00Z"));
    assert_eq!(found.architecture.as_deref(), Some("arm64"));
    assert_eq!(
        (
            found.labels["of"].as_str(),
            found.annotations["note"].as_str()
        ),
        ("one", "one")
    );
    let query = |sort, search: Option<&str>| Query {
        sort,
        search: search.map(str::to_owned),
        ..Query::default()
    };
    for (query, expected) in [
        (query(Sort::Name, None), one.digest()),
        (query(Sort::Size, None), two.digest()),
        (query(Sort::Updated, Some("b")), one.digest()),
    ] {
        assert_eq!(
            images.images(repository, &query).await?.items[0].digest,
            expected,
            "{query:?}"
        );
    }
    let page = Query {
        page: 2,
        page_size: 1,
        ..Query::default()
    };
    let second = images.images(repository, &page).await?;
    assert_eq!(
        (second.total, second.items.len(), second.items[0].digest),
        (2, 1, one.digest())
    );
    let error = images
        .remove(repository, &ImageSelector::Digest(one.digest()), false)
        .await
        .unwrap_err();
    assert!(
        matches!(&error, Error::Tagged { tags, .. } if tags == &["a", "b"]),
        "{error}"
    );
    let error = images
        .remove(repository, &ImageSelector::Tag("none".into()), false)
        .await
        .unwrap_err();
    assert!(matches!(error, Error::NotFound(_)), "{error}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layout_directory() -> Outcome {
    let dir = tempfile::tempdir()?;
    let target = format!("oci:{}", dir.path().display());
    let images = place(&target).await;
    lists(images.as_ref(), &target, "").await?;
    let removed = images
        .remove("", &ImageSelector::Tag("a".into()), false)
        .await?;
    assert_eq!(
        (removed.image_deleted, removed.kept),
        (false, vec!["b".to_owned()])
    );
    let removed = images
        .remove("", &ImageSelector::Tag("b".into()), false)
        .await?;
    assert!(removed.image_deleted && removed.space.contains("free again"));
    assert_eq!(removed.freed, Some(image("one", 5000, 1).size()));
    let left = images.images("", &Query::default()).await?;
    assert_eq!(
        (left.total, left.items[0].tags.as_slice()),
        (1, ["c".to_owned()].as_slice())
    );
    let removed = images
        .remove("", &ImageSelector::Tag("c".into()), true)
        .await?;
    assert!(removed.image_deleted);
    // The result is still a valid layout and accepts another save.
    save(&format!("{target}:d"), &image("three", 10, 3)).await?;
    assert_eq!(images.images("", &Query::default()).await?.total, 1);
    assert!(
        place("oci:/nonexistent/x")
            .await
            .images("", &Query::default())
            .await
            .is_err()
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plain_registry() -> Outcome {
    if ignored(&[Need::Program("docker-registry")]) {
        return Ok(());
    }
    let registry = Registry::start(true)?;
    let host = format!("127.0.0.1:{}", registry.1);
    let images = place(&host).await;
    lists(images.as_ref(), &format!("{host}/alice/note"), "alice/note").await?;
    for name in ["alice/other", "alice-two/x", "zed"] {
        save(&format!("{host}/{name}:1"), &image(name, 100, 3)).await?;
    }
    let names =
        |listed: upperdeck::store::images::Listed<upperdeck::store::images::RepositoryEntry>| {
            listed
                .items
                .into_iter()
                .map(|entry| entry.name)
                .collect::<Vec<_>>()
        };
    assert!(images.is_group("") && images.is_group("alice/") && !images.is_group("alice"));
    let all = images.repositories("", &Query::default()).await?;
    assert_eq!(
        names(all),
        ["alice-two/x", "alice/note", "alice/other", "zed"]
    );
    let below = images.repositories("alice/", &Query::default()).await?;
    assert_eq!(names(below), ["alice/note", "alice/other"]);
    let error = images
        .images("nobody/x", &Query::default())
        .await
        .unwrap_err();
    assert!(matches!(error, Error::NotFound(_)), "{error}");

    // This registry can delete only images, not one of several tags.
    let error = images
        .remove("alice/note", &ImageSelector::Tag("a".into()), false)
        .await
        .unwrap_err();
    assert!(
        matches!(&error, Error::SharedTag { others, .. } if others == &["b"]),
        "{error}"
    );
    assert_eq!(
        images.images("alice/note", &Query::default()).await?.total,
        2
    );
    // An image is not deleted while an index refers to it.
    let two = image("two", 9000, 2);
    let index = json!({"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [{
        "mediaType": MANIFEST_TYPE, "digest": two.digest(), "size": two.manifest.len(),
        "platform": {"os": "linux", "architecture": "arm64"},
    }]});
    let target = Target::for_saving(&format!("{host}/alice/note:multi"))?;
    let destination = Destination::open(&target, &registries())?;
    destination
        .put_manifest(index.to_string().into(), INDEX_TYPE, "multi")
        .await?;
    let error = images
        .remove("alice/note", &ImageSelector::Tag("c".into()), false)
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Needed { .. }), "{error}");
    assert!(
        images
            .remove("alice/note", &ImageSelector::Tag("multi".into()), false)
            .await?
            .image_deleted
    );

    assert!(
        images
            .remove("alice/note", &ImageSelector::Tag("c".into()), false)
            .await?
            .image_deleted
    );
    let removed = images
        .remove("alice/note", &ImageSelector::Tag("a".into()), true)
        .await?;
    assert_eq!((removed.image_deleted, removed.tags.len()), (true, 2));
    assert!(removed.space.contains("garbage-collect"));
    assert_eq!(
        images.images("alice/note", &Query::default()).await?.total,
        0
    );

    // If deletion is disabled, the error says so.
    let registry = Registry::start(false)?;
    let host = format!("127.0.0.1:{}", registry.1);
    save(&format!("{host}/x:1"), &image("x", 10, 1)).await?;
    let error = place(&host)
        .await
        .remove("x", &ImageSelector::Tag("1".into()), false)
        .await
        .unwrap_err();
    assert!(
        error.not_permitted() && error.to_string().contains("storage.delete.enabled"),
        "{error}"
    );
    Ok(())
}

#[test]
fn the_shell_speaks_of_a_layout() -> Outcome {
    let dir = tempfile::tempdir()?;
    let target = format!("oci:{}", dir.path().display());
    tokio::runtime::Runtime::new()?.block_on(save(&format!("{target}:a"), &image("one", 50, 1)))?;
    let run = |arguments: &[&str]| {
        let program = env!("CARGO_BIN_EXE_upperdeck");
        Command::new(program)
            .arg("image")
            .args(arguments)
            .output()
            .unwrap()
    };
    let output = run(&["ls", "--format", "json", &target]);
    let listed: Value = serde_json::from_slice(&output.stdout)?;
    assert_eq!(
        (
            &listed["images"][0]["tags"][0],
            &listed["total"],
            &listed["quota"]
        ),
        (&json!("a"), &json!(1), &Value::Null)
    );
    let output = run(&["rm", "--format", "json", &format!("{target}:a")]);
    let removed: Value = serde_json::from_slice(&output.stdout)?;
    assert_eq!(removed[0]["image_deleted"], json!(true));
    assert_eq!(run(&["rm", &format!("{target}:a")]).status.code(), Some(1));
    Ok(())
}

/// Writes `image` under a tag with a rule about what it may replace.
async fn save_replacing(
    target: &str,
    image: &Image,
    rule: &upperdeck::store::destination::Replaceable,
) -> Result<Digest, DestinationError> {
    let target = Target::for_saving(target).unwrap();
    let destination = Destination::open(&target, &registries())?;
    for blob in [&image.layer, &image.config] {
        destination
            .put_blob(blob.clone(), &Digest::of(blob))
            .await?;
    }
    let manifest = image.manifest.clone();
    let put = destination.put_manifest_replacing(manifest, MANIFEST_TYPE, target.tag(), rule);
    put.await
}

/// Checks on a place (`PLACE:TAG` names an image) that only images that may be replaced are.
async fn tags_are_taken_only_from_images_that_may_be_replaced(place: &str) -> Outcome {
    use upperdeck::store::destination::Replaceable;
    let target = format!("{place}:v1");
    let (one, two) = (image("one", 100, 1), image("two", 100, 2));
    let nothing = Replaceable::default();
    let first = save_replacing(&target, &one, &nothing).await?;
    // The same image again changes nothing.
    assert_eq!(save_replacing(&target, &one, &nothing).await?, first);
    for rule in [
        nothing.clone(),
        Replaceable {
            digest: Some(Digest::of("another")),
            save: Some("no annotation has this".to_owned()),
        },
    ] {
        let refused = save_replacing(&target, &two, &rule).await;
        let error = refused.err().ok_or("it was replaced")?;
        assert_eq!(error.code(), Some("tag_exists"), "{error}");
        assert!(error.not_permitted() && !error.retryable());
    }
    let seen = Replaceable {
        digest: Some(first),
        save: None,
    };
    let second = save_replacing(&target, &two, &seen).await?;
    let third = save_replacing(&target, &image("three", 100, 3), &seen).await;
    assert!(third.is_err(), "the digest seen is not the tag's any more");
    // Another attempt of the save that made the image recognizes it.
    let own = |n: u32| {
        let mut image = image("own", 100, n);
        let mut manifest: Value = serde_json::from_slice(&image.manifest).unwrap();
        manifest["annotations"] = json!({"upperdeck.save": "job-1"});
        image.manifest = Bytes::from(manifest.to_string());
        image
    };
    let rule = Replaceable {
        digest: Some(second),
        save: Some("job-1".to_owned()),
    };
    save_replacing(&target, &own(4), &rule).await?;
    save_replacing(&target, &own(5), &rule).await?;
    let other = Replaceable {
        save: Some("job-2".to_owned()),
        ..rule
    };
    assert!(save_replacing(&target, &own(6), &other).await.is_err());
    Ok(())
}

#[tokio::test]
async fn a_layouts_tag_is_taken_only_from_an_image_that_may_be_replaced() -> Outcome {
    let dir = tempfile::tempdir()?;
    let place = format!("oci:{}", dir.path().join("x").display());
    tags_are_taken_only_from_images_that_may_be_replaced(&place).await
}

#[tokio::test]
async fn an_archive_is_replaced_only_if_its_image_may_be() -> Outcome {
    use upperdeck::store::destination::Replaceable;
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("x.tar");
    let place = format!("oci-archive:{}", file.display());
    tags_are_taken_only_from_images_that_may_be_replaced(&place).await?;
    // Under another tag the whole file is replaced all the same.
    let nothing = Replaceable::default();
    let before = std::fs::read(&file)?;
    let (other, image) = (format!("{place}:v2"), image("other", 100, 9));
    assert!(save_replacing(&other, &image, &nothing).await.is_err());
    assert_eq!(std::fs::read(&file)?, before);
    // What is no archive of one image cannot be compared.
    for content in [&b""[..], b"no archive"] {
        std::fs::write(&file, content)?;
        let refused = save_replacing(&other, &image, &nothing).await;
        let error = refused.err().ok_or("it was replaced")?;
        assert_eq!(error.code(), Some("tag_exists"), "{error}");
        assert_eq!(std::fs::read(&file)?, content);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_gets_another_tag_in_a_registry_and_in_a_layout() -> Outcome {
    if ignored(&[Need::Program("docker-registry")]) {
        return Ok(());
    }
    let registry = Registry::start(true)?;
    let dir = tempfile::tempdir()?;
    let layout = format!("oci:{}/note", dir.path().display());
    for place in [format!("127.0.0.1:{}/alice/note", registry.1), layout] {
        let (one, two) = (image("one", 100, 1), image("two", 100, 2));
        save(&format!("{place}:v1"), &one).await?;
        save(&format!("{place}:v2"), &two).await?;
        let target = Target::for_saving(&format!("{place}:v1"))?;
        let destination = Destination::open(&target, &registries())?;
        let digest = one.digest();
        let never = Replaceable::default();
        destination.add_tag(&digest, "paper", &never).await?;
        assert_eq!(
            destination.digest_of("paper").await?,
            Some(digest),
            "{place}"
        );
        let refused = destination.add_tag(&digest, "v2", &never).await;
        let in_the_way = matches!(&refused, Err(DestinationError::TagExists { digest, .. }) if *digest == two.digest());
        assert!(in_the_way, "{place}: {refused:?}");
        assert_eq!(destination.digest_of("v2").await?, Some(two.digest()));
        let replace = Replaceable {
            digest: Some(two.digest()),
            save: None,
        };
        destination.add_tag(&digest, "v2", &replace).await?;
        for tag in ["v1", "v2", "paper"] {
            assert_eq!(
                destination.digest_of(tag).await?,
                Some(digest),
                "{place} {tag}"
            );
        }
        let absent = image("three", 100, 3).digest();
        assert!(
            destination.add_tag(&absent, "v3", &never).await.is_err(),
            "{place}"
        );
        assert_eq!(destination.digest_of("v3").await?, None, "{place}");
        let run = |arguments: &[&str]| {
            Command::new(env!("CARGO_BIN_EXE_upperdeck"))
                .args(["image", "tag"])
                .args(arguments)
                .env("HOME", "/nonexistent")
                .output()
        };
        let done = run(&[&format!("{place}:v1"), "thesis"])?;
        assert!(
            done.status.success(),
            "{}",
            String::from_utf8_lossy(&done.stderr)
        );
        assert_eq!(
            String::from_utf8(done.stdout)?,
            format!("{place}:thesis@{digest}\n")
        );
        save(&format!("{place}:v4"), &two).await?;
        let refused = run(&[&format!("{place}:v4"), "thesis"])?;
        assert!(!refused.status.success());
        assert!(
            run(&[&format!("{place}:v4"), "thesis", "--replace"])?
                .status
                .success()
        );
        assert_eq!(destination.digest_of("thesis").await?, Some(two.digest()));
        assert_eq!(
            run(&[&format!("{place}:v4"), "a@b/../c"])?.status.code(),
            Some(2)
        );
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registrys_tag_is_taken_only_from_an_image_that_may_be_replaced() -> Outcome {
    if ignored(&[Need::Program("docker-registry")]) {
        return Ok(());
    }
    let registry = Registry::start(true)?;
    let place = format!("127.0.0.1:{}/alice/torch", registry.1);
    tags_are_taken_only_from_images_that_may_be_replaced(&place).await
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_saves_to_one_free_tag_one_wins() -> Outcome {
    use upperdeck::store::destination::Replaceable;
    let dir = tempfile::tempdir()?;
    for round in 0..20 {
        let target = format!("oci:{}:v{round}", dir.path().join("x").display());
        let saves = (0..4).map(|n| {
            let target = target.clone();
            tokio::spawn(async move {
                let image = image(&format!("round {round} save {n}"), 100, 1);
                let rule = Replaceable::default();
                save_replacing(&target, &image, &rule).await.is_ok()
            })
        });
        let mut won = 0;
        for save in saves.collect::<Vec<_>>() {
            won += usize::from(save.await?);
        }
        assert_eq!(won, 1, "round {round}");
    }
    Ok(())
}
