//! When an image that lost its tag is deleted, and what keeps it.

use bytes::Bytes;
use serde_json::json;
use upperdeck::common::digest::Digest;
use upperdeck::store::destination::{Destination, Replaceable};
use upperdeck::store::images::ImageSelector;

use super::refusals::rights_without;
use super::{Image, Lab, MANIFEST_TYPE, Outcome, image, save};

const INDEX_TYPE: &str = "application/vnd.oci.image.index.v1+json";

/// Stores an index with one image.
async fn index_of(destination: &Destination, child: &Image, tag: &str) -> Digest {
    let index = json!({
        "schemaVersion": 2, "mediaType": INDEX_TYPE,
        "manifests": [{
            "mediaType": MANIFEST_TYPE, "digest": child.digest().to_string(), "size": child.manifest.len(),
            "platform": {"os": "linux", "architecture": "arm64"},
        }],
    });
    let index = index.to_string();
    let digest = Digest::of(&index);
    let put = destination.put_manifest(index.into(), INDEX_TYPE, tag);
    put.await.unwrap();
    digest
}

/// Attaches an artifact to an image, as signatures and SBOMs are.
async fn attach(destination: &Destination, to: &Image) {
    let empty = Bytes::from_static(b"{}");
    let digest = Digest::of(&empty);
    destination.put_blob(empty, &digest).await.unwrap();
    let descriptor = json!({
        "mediaType": "application/vnd.oci.empty.v1+json", "digest": digest.to_string(), "size": 2,
    });
    let note = json!({
        "schemaVersion": 2, "mediaType": MANIFEST_TYPE, "artifactType": "application/vnd.example.note",
        "config": descriptor, "layers": [descriptor],
        "subject": {
            "mediaType": MANIFEST_TYPE, "digest": to.digest().to_string(), "size": to.manifest.len(),
        },
    });
    let put = destination.put_manifest(note.to_string().into(), MANIFEST_TYPE, "note");
    put.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_gets_another_tag_in_place_of_its_own() -> Outcome {
    let lab = Lab::start().await?;
    let project = lab.project(None).await;
    let path = format!("{project}/renamed");
    let destination = lab.to(&path);
    let (one, two) = (
        image(&format!("{project} one"), 1000),
        image(&format!("{project} two"), 1000),
    );
    save(&destination, &one, "v1").await.unwrap();
    save(&destination, &two, "v2").await.unwrap();
    let never = Replaceable::default();
    destination
        .add_tag(&one.digest(), "paper", &never)
        .await
        .unwrap();
    assert!(
        destination
            .add_tag(&one.digest(), "v2", &never)
            .await
            .is_err()
    );
    // Harbor deletes one tag of several.
    let images = lab.images().await;
    let removed = images
        .remove(&path, &ImageSelector::Tag("v1".to_owned()), false)
        .await
        .unwrap();
    assert!(!removed.image_deleted);
    for (tag, digest) in [
        ("v1", None),
        ("paper", Some(one.digest())),
        ("v2", Some(two.digest())),
    ] {
        assert_eq!(destination.digest_of(tag).await.unwrap(), digest, "{tag}");
    }
    lab.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_something_needs_is_kept() -> Outcome {
    let lab = Lab::start().await?;
    let project = lab.project(None).await;
    let replaced = async |case: &str| {
        let destination = lab.to(&format!("{project}/{case}"));
        let old = image(&format!("{project} {case} old"), 1000);
        save(&destination, &old, "1").await.unwrap();
        (destination, old)
    };
    let replace = async |destination: &Destination, case: &str| {
        let new = image(&format!("{project} {case} new"), 1000);
        save(destination, &new, "1").await.unwrap();
    };
    let stays = async |destination: &Destination, case: &str, digest: &Digest| {
        let deleted = destination.delete_replaced(digest).await;
        assert!(!deleted.unwrap(), "{case}: deleted");
        let found = lab
            .harbor()
            .await
            .artifact(&project, case, &digest.to_string())
            .await;
        assert!(found.unwrap().is_some(), "{case}: gone");
    };

    let (destination, old) = replaced("tagged").await;
    save(&destination, &old, "2").await?;
    replace(&destination, "tagged").await;
    stays(&destination, "tagged", &old.digest()).await;

    let (destination, old) = replaced("child").await;
    index_of(&destination, &old, "all").await;
    replace(&destination, "child").await;
    stays(&destination, "child", &old.digest()).await;

    let (destination, old) = replaced("subject").await;
    attach(&destination, &old).await;
    replace(&destination, "subject").await;
    stays(&destination, "subject", &old.digest()).await;

    let (destination, child) = replaced("index").await;
    let index = index_of(&destination, &child, "1").await;
    replace(&destination, "index").await;
    stays(&destination, "index", &index).await;

    // An account that may not delete is told so, and the image stays.
    let (destination, old) = replaced("rights").await;
    replace(&destination, "rights").await;
    let robot = rights_without(&["artifact:delete"]);
    let robot = lab.robot(&project, &robot).await;
    let unable = lab.destination(&format!("{project}/rights"), Lab::access(&robot));
    assert!(unable.delete_replaced(&old.digest()).await.is_err());
    assert!(destination.delete_replaced(&old.digest()).await?);
    assert!(!destination.delete_replaced(&old.digest()).await?, "twice");
    lab.end().await
}
