//! Tests of Harbor: pushing, listing, deleting, and its error answers.
//!
//! They run against the stand-in, or against the Harbor given by `UPPERDECK_TEST_HARBOR=URL,USER,PASSWORD`, whose user
//! is an administrator. Everything is created in projects of the tests, which are deleted afterwards.
// A panic in a helper fails the test, as intended.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod after;
mod description;
#[path = "../support/http.rs"]
mod http;
#[path = "../support/image.rs"]
mod image;
mod labels;
mod observed;
mod refusals;
mod replaced;
mod replay;
mod saves;
mod stand_in;
#[path = "../support/mod.rs"]
#[allow(dead_code)]
mod support;
#[path = "../faults/world.rs"]
#[allow(dead_code)]
mod world;

use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::runtime::Handle;
use upperdeck::common::digest::Digest;
use upperdeck::store::destination::{Destination, Error, Target};
use upperdeck::store::harbor::{self, Harbor};
use upperdeck::store::images::{self, ImageLocation, ImageSelector, Images, Query, Sort};
use upperdeck::store::registry::{self, Access, Registries, Retry};

use description::Description;
use image::{Image, MANIFEST_TYPE};
use stand_in::StandIn;

type Outcome = Result<(), Box<dyn std::error::Error>>;

/// The Harbor under test.
struct Lab {
    host: String,
    admin: String,
    stand_in: Option<StandIn>,
    projects: std::sync::Mutex<Vec<String>>,
    /// Held while other tests use the same Harbor, or while none may.
    _turn: Turn,
}

/// A test's turn on a running Harbor, whose read-only mode affects all tests. The stand-in is each test's own.
enum Turn {
    Own,
    Shared(#[allow(dead_code)] tokio::sync::RwLockReadGuard<'static, ()>),
    Alone(#[allow(dead_code)] tokio::sync::RwLockWriteGuard<'static, ()>),
}

static TURNS: tokio::sync::RwLock<()> = tokio::sync::RwLock::const_new(());

impl Lab {
    async fn start() -> Result<Self, Box<dyn std::error::Error>> {
        Self::begin(false).await
    }

    /// Like [`Lab::start`], for a test that changes the settings of the whole Harbor.
    async fn alone() -> Result<Self, Box<dyn std::error::Error>> {
        Self::begin(true).await
    }

    async fn begin(alone: bool) -> Result<Self, Box<dyn std::error::Error>> {
        let projects = std::sync::Mutex::default();
        if let Ok(given) = std::env::var("UPPERDECK_TEST_HARBOR") {
            let mut parts = given.splitn(3, ',');
            let mut next = || {
                parts
                    .next()
                    .ok_or("UPPERDECK_TEST_HARBOR is URL,USER,PASSWORD")
            };
            let (url, user, password) = (next()?, next()?, next()?);
            let host = url.split("://").last().unwrap_or_default();
            return Ok(Self {
                host: host.trim_end_matches('/').to_owned(),
                admin: format!("{user}:{password}"),
                stand_in: None,
                projects,
                _turn: if alone {
                    Turn::Alone(TURNS.write().await)
                } else {
                    Turn::Shared(TURNS.read().await)
                },
            });
        }
        let stand_in = StandIn::start()?;
        Ok(Self {
            host: stand_in.server.address.to_string(),
            admin: format!("{}:{}", stand_in::ADMIN.0, stand_in::ADMIN.1),
            stand_in: Some(stand_in),
            projects,
            _turn: Turn::Own,
        })
    }

    /// Returns a name that is unique among tests and runs.
    fn name(&self) -> String {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let now = std::time::SystemTime::UNIX_EPOCH
            .elapsed()
            .unwrap()
            .as_millis()
            % 1_000_000_000;
        let name = format!(
            "ud-{now}-{}-{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::SeqCst)
        );
        self.projects.lock().unwrap().push(name.clone());
        name
    }

    fn access(creds: &str) -> Access {
        Access {
            authfile: Some("/dev/null".into()),
            creds: Some(creds.parse().unwrap()),
            tls_verify: false,
            retry: Retry {
                first_pause: Duration::from_millis(20),
                ..Retry::default()
            },
            ..Access::default()
        }
    }

    fn registries(&self) -> Registries {
        Registries::new(Self::access(&self.admin))
    }

    async fn harbor(&self) -> Harbor {
        Harbor::find(&self.registries(), &self.host, "x/y")
            .await
            .unwrap()
            .unwrap()
    }

    async fn images(&self) -> Box<dyn Images> {
        let place: ImageLocation = self.host.parse().unwrap();
        place.open(&self.registries()).await.unwrap()
    }

    fn destination(&self, path: &str, access: Access) -> Destination {
        let target = Target::for_saving(&format!("{}/{path}", self.host)).unwrap();
        Destination::open(&target, &Registries::new(access)).unwrap()
    }

    fn to(&self, path: &str) -> Destination {
        self.destination(path, Self::access(&self.admin))
    }

    /// Sends a request to the API as the administrator, for operations that the program itself does not have.
    async fn ask(&self, method: &str, path: &str, body: &Value) -> (u16, Value) {
        let api = self.registries().api(&self.host, "").unwrap();
        let path = format!("/api/v2.0{path}");
        let answer = match method {
            "POST" => api.post(&path, body, &[409]).await,
            "PUT" => api.put(&path, body, &[]).await,
            "DELETE" => api.delete(&path, &[404, 412]).await,
            _ => api.get(&path, &[]).await,
        };
        let answer = answer.unwrap();
        (
            answer.status,
            serde_json::from_slice(&answer.body).unwrap_or_default(),
        )
    }

    async fn project(&self, limit: Option<u64>) -> String {
        let name = self.name();
        let mut body = json!({"project_name": name, "metadata": {"public": "false"}});
        if let Some(limit) = limit {
            body["storage_limit"] = json!(limit);
        }
        let (status, _) = self.ask("POST", "/projects", &body).await;
        assert_eq!(status, 201);
        name
    }

    /// Creates a robot account of a project and returns its `USER:PASSWORD`.
    async fn robot(&self, project: &str, access: &[(&str, &str)]) -> String {
        self.robot_named(&format!("saver{}", access.len()), project, access)
            .await
    }

    async fn robot_named(&self, name: &str, project: &str, access: &[(&str, &str)]) -> String {
        let rights = access
            .iter()
            .map(|(r, a)| json!({"resource": r, "action": a}));
        let body = json!({
            "name": name, "level": "project", "duration": -1,
            "permissions": [{"kind": "project", "namespace": project, "access": rights.collect::<Vec<_>>()}],
        });
        let (_, made) = self.ask("POST", "/robots", &body).await;
        format!(
            "{}:{}",
            made["name"].as_str().unwrap(),
            made["secret"].as_str().unwrap()
        )
    }

    async fn project_id(&self, project: &str) -> u64 {
        let (_, found) = self
            .ask("GET", &format!("/projects/{project}"), &Value::Null)
            .await;
        found["project_id"].as_u64().unwrap()
    }

    /// Deletes what the test created, and validates all exchanges against the description.
    async fn end(self) -> Outcome {
        let projects = self.projects.lock().unwrap().clone();
        for project in projects {
            let listed = self
                .harbor()
                .await
                .repositories(Some(&project), &all())
                .await;
            for repository in listed.map(|page| page.items).unwrap_or_default() {
                let name = repository
                    .name
                    .split_once('/')
                    .unwrap()
                    .1
                    .replace('/', "%252F");
                self.ask(
                    "DELETE",
                    &format!("/projects/{project}/repositories/{name}"),
                    &Value::Null,
                )
                .await;
            }
            self.ask("DELETE", &format!("/projects/{project}"), &Value::Null)
                .await;
        }
        let Some(stand_in) = &self.stand_in else {
            return Ok(());
        };
        let Some(mut description) = Description::load()? else {
            support::ignore("the API's description is not at ../shared/harbor");
            return Ok(());
        };
        // Observed on a running Harbor, see `observed`.
        for path in [
            "/api/v2.0/projects/a/repositories/b/artifacts/c",
            "/api/v2.0/projects/a/repositories/b/artifacts/c/tags/d",
        ] {
            description.allow("DELETE", path, 412);
        }
        // The answer to a robot without `label:list`.
        description.allow("GET", "/api/v2.0/labels", 403);
        // The answer to a wrong password.
        description.allow("HEAD", "/api/v2.0/projects", 401);
        let seen = std::mem::take(&mut stand_in.state.lock().unwrap().seen);
        assert!(!seen.is_empty());
        let mut wrong = Vec::new();
        for (request, response) in &seen {
            if !(response.body.is_empty() && response.status < 400) {
                wrong.extend(description.judge(request, response)?);
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        Ok(())
    }
}

fn all() -> harbor::Query {
    harbor::Query {
        page_size: 100,
        ..harbor::Query::default()
    }
}

/// Returns an image with one layer of `size` bytes that no other image has.
fn image(name: &str, size: usize) -> Image {
    let seed = Digest::of(name).hex();
    let layer: Vec<u8> = seed.bytes().cycle().take(size).collect();
    let config = json!({
        "architecture": "amd64", "os": "linux", "created": "2026-01-02T03:04:05Z",
        "config": {"Labels": {"org.example.of": name}},
    });
    Image::new(layer.into(), config, &json!({"org.example.note": name}))
}

async fn send(destination: &Destination, blob: Bytes) -> Result<(), Error> {
    let (digest, size) = (Digest::of(&blob), blob.len() as u64);
    let mut writer = destination.begin_blob(Handle::current())?;
    let writer = tokio::task::spawn_blocking(move || writer.write(blob).map(|()| writer));
    writer.await.unwrap()?.finish(&digest, size).await
}

async fn save(destination: &Destination, image: &Image, tag: &str) -> Result<Digest, Error> {
    destination.check().await?;
    send(destination, image.layer.clone()).await?;
    destination
        .put_blob(image.config.clone(), &Digest::of(&image.config))
        .await?;
    destination
        .put_manifest(image.manifest.clone(), MANIFEST_TYPE, tag)
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_saved_is_listed_and_deleted_as_it_is() -> Outcome {
    let lab = Lab::start().await?;
    let project = lab.project(None).await;
    let repository = format!("{project}/deep/er.note");
    let (one, two) = (
        image(&format!("{project} one"), 5000),
        image(&format!("{project} two"), 9000),
    );
    let destination = lab.to(&repository);
    save(&destination, &one, "a").await?;
    save(&destination, &one, "b").await?;
    save(&destination, &two, "c").await?;
    let images = lab.images().await;
    assert!(images.is_group(&project) && !images.is_group(&repository));

    let listed = images.repositories(&project, &Query::default()).await?;
    assert_eq!(listed.total, 1);
    assert_eq!(
        (listed.items[0].name.as_str(), listed.items[0].images),
        (repository.as_str(), Some(2))
    );
    let listed = images.images(&repository, &Query::default()).await?;
    assert_eq!(listed.total, 2);
    let found = listed
        .items
        .iter()
        .find(|i| i.digest == one.digest())
        .unwrap();
    assert_eq!(found.tags, ["a", "b"]);
    assert_eq!(found.size, Some(one.size()));
    assert_eq!(found.architecture.as_deref(), Some("amd64"));
    assert_eq!(found.created.as_deref(), Some("2026-01-02T03:04:05Z"));
    assert_eq!(found.labels["org.example.of"], format!("{project} one"));
    assert_eq!(
        found.annotations["org.example.note"],
        format!("{project} one")
    );
    assert!(found.pushed.is_some() && found.media_type.as_deref() == Some(MANIFEST_TYPE));
    let by_size = images
        .images(
            &repository,
            &Query {
                sort: Sort::Size,
                ..Query::default()
            },
        )
        .await?;
    assert_eq!(by_size.items[0].digest, two.digest());
    let by_name = images
        .images(
            &repository,
            &Query {
                sort: Sort::Name,
                ..Query::default()
            },
        )
        .await?;
    assert_eq!(by_name.items[0].digest, one.digest());
    let searched = Query {
        search: Some("c".into()),
        ..Query::default()
    };
    assert_eq!(
        images.images(&repository, &searched).await?.items[0].digest,
        two.digest()
    );

    // An image with tags is deleted by its digest only together with all tags.
    let by_digest = ImageSelector::Digest(one.digest());
    let error = images
        .remove(&repository, &by_digest, false)
        .await
        .unwrap_err();
    assert!(
        matches!(&error, images::Error::Tagged { tags, .. } if tags == &["a", "b"]),
        "{error}"
    );
    let removed = images
        .remove(&repository, &ImageSelector::Tag("a".into()), false)
        .await?;
    assert_eq!(
        (removed.image_deleted, removed.kept),
        (false, vec!["b".to_owned()])
    );
    let removed = images
        .remove(&repository, &ImageSelector::Tag("b".into()), false)
        .await?;
    assert!(removed.image_deleted && removed.space.contains("freed at once"));
    let error = images
        .remove(&repository, &ImageSelector::Tag("b".into()), false)
        .await
        .unwrap_err();
    assert!(matches!(error, images::Error::NotFound(_)), "{error}");
    let removed = images
        .remove(&repository, &ImageSelector::Digest(two.digest()), true)
        .await?;
    assert_eq!(
        (removed.image_deleted, removed.tags),
        (true, vec!["c".to_owned()])
    );
    assert_eq!(
        images.images(&repository, &Query::default()).await?.total,
        0
    );
    lab.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_come_in_pages_and_whole() -> Outcome {
    let lab = Lab::start().await?;
    let project = lab.project(None).await;
    let mut expected = Vec::new();
    for n in 0..7 {
        let image = image(&format!("{project} {n}"), 100);
        save(&lab.to(&format!("{project}/r{n}")), &image, "1").await?;
        save(&lab.to(&format!("{project}/all")), &image, &format!("t{n}")).await?;
        expected.push(image.digest());
    }
    let images = lab.images().await;
    let mut seen = Vec::new();
    for page in 1..=4 {
        let query = Query {
            page,
            page_size: 3,
            sort: Sort::Name,
            ..Query::default()
        };
        let listed = images.images(&format!("{project}/all"), &query).await?;
        assert_eq!(listed.total, 7);
        seen.extend(listed.items.iter().map(|i| i.digest));
        let listed = images.repositories(&project, &query).await?;
        assert_eq!(
            (listed.total, listed.items.len()),
            (8, [3, 3, 2, 0][page as usize - 1])
        );
    }
    assert_eq!(seen, expected);
    let query = Query {
        page: 2,
        page_size: 3,
        ..Query::default()
    };
    let newest: Vec<_> = images
        .images(&format!("{project}/all"), &query)
        .await?
        .items
        .iter()
        .map(|i| i.digest)
        .collect();
    assert_eq!(newest, [expected[3], expected[2], expected[1]]);
    // The list of a missing repository or project is empty.
    for path in [format!("{project}/none"), "nosuch-project/x".to_owned()] {
        assert_eq!(images.images(&path, &Query::default()).await?.total, 0);
    }
    let query = Query::default();
    assert_eq!(
        images.repositories("nosuch-project", &query).await?.total,
        0
    );
    lab.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quota_is_asked_before_and_explained_after() -> Outcome {
    let lab = Lab::start().await?;
    let project = lab.project(Some(1 << 20)).await;
    let destination = lab.to(&format!("{project}/x"));
    save(&destination, &image(&project, 700_000), "1").await?;
    // What an image needs is compared with the quota before anything is sent.
    let budget = destination.budget().await?.unwrap();
    assert!(budget.free() > 300_000 && budget.free() < 400_000);
    let error = Error::from(budget.exceeded(harbor::Needed::Base(500_000)));
    let text = error.to_string();
    assert!(
        error.not_permitted() && text.contains("KiB of 1.0 MiB are used"),
        "{text}"
    );
    assert!(text.contains("need 488.3 KiB"), "{text}");
    destination.check().await?;
    // If the size was unknown, the error at the end of the blob includes what is left of the quota.
    let error = send(&destination, image("big", 700_000).layer)
        .await
        .unwrap_err();
    let text = error.to_string();
    assert!(error.not_permitted() && !error.retryable(), "{text}");
    assert!(
        text.contains("of 1.0 MiB are used")
            && text.contains("free")
            && text.contains("about 683.6 KiB are needed"),
        "{text}"
    );
    // The check detects a project whose quota is fully used.
    let room = lab
        .images()
        .await
        .quota_usage(&format!("{project}/x"))
        .await?
        .unwrap();
    let rest = usize::try_from(room.free().unwrap())?;
    send(&destination, image("filler", rest).layer).await?;
    let error = destination.check().await.unwrap_err();
    assert!(
        matches!(error, Error::Harbor(harbor::Error::Quota { .. })),
        "{error}"
    );
    assert!(
        error.not_permitted() && error.to_string().contains("frees space at once"),
        "{error}"
    );
    lab.end().await
}

/// Harbor has IDs and names of projects in the same place of a path.
#[tokio::test(flavor = "multi_thread")]
async fn a_project_whose_name_is_a_number_is_not_taken_for_an_id() -> Outcome {
    let lab = Lab::start().await?;
    for name in ["2", "20231234"] {
        assert!(
            lab.harbor()
                .await
                .create_project(name, Some(1 << 30))
                .await?
        );
        save(&lab.to(&format!("{name}/x")), &image(name, 1000), "1").await?;
        let project = lab
            .harbor()
            .await
            .project(name)
            .await?
            .ok_or("no project")?;
        assert_eq!(project.name, name);
        let usage = lab.images().await.quota_usage(&format!("{name}/x")).await?;
        assert_eq!(usage.ok_or("no quota")?.limit, Some(1 << 30));
        assert_eq!(lab.harbor().await.missing_rights(name).await?, []);
    }
    lab.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_manifest_can_be_what_is_too_much() -> Outcome {
    let lab = Lab::start().await?;
    let image = image("brim", 10_000);
    let limit = image.size() - 10;
    let project = lab.project(Some(limit)).await;
    let error = save(&lab.to(&format!("{project}/x")), &image, "1")
        .await
        .unwrap_err();
    let text = error.to_string();
    assert!(
        error.not_permitted() && text.contains("free") && error.code() == Some("quota_exceeded"),
        "{text}"
    );
    lab.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_project_is_named_or_made() -> Outcome {
    let lab = Lab::start().await?;
    let name = lab.name();
    let error = lab.to(&format!("{name}/x")).check().await.unwrap_err();
    assert!(
        matches!(&error, Error::Harbor(harbor::Error::NoProject { project, .. }) if *project == name),
        "{error}"
    );
    assert!(
        error.not_permitted() && error.to_string().contains("--create-project"),
        "{error}"
    );
    let access = Access {
        create_project: true,
        ..Lab::access(&lab.admin)
    };
    let destination = lab.destination(&format!("{name}/x"), access.clone());
    save(&destination, &image(&name, 100), "1").await?;
    // The second save finds the project.
    save(
        &lab.destination(&format!("{name}/x"), access),
        &image(&name, 200),
        "2",
    )
    .await?;
    assert!(lab.harbor().await.project_exists(&name).await?);
    assert!(!lab.harbor().await.create_project(&name, None).await?);
    assert!(
        !lab.harbor()
            .await
            .project(&name)
            .await?
            .unwrap()
            .is_proxy_cache()
    );
    lab.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_immutable_tag_stays() -> Outcome {
    let lab = Lab::start().await?;
    let project = lab.project(None).await;
    let destination = lab.to(&format!("{project}/x"));
    save(&destination, &image("one", 100), "fixed").await?;
    let rule = json!({
        "scope_selectors": {"repository": [{"kind": "doublestar", "decoration": "repoMatches", "pattern": "**"}]},
        "tag_selectors": [{"kind": "doublestar", "decoration": "matches", "pattern": "fixed"}],
    });
    lab.ask(
        "POST",
        &format!("/projects/{project}/immutabletagrules"),
        &rule,
    )
    .await;
    let error = save(&destination, &image("two", 100), "fixed")
        .await
        .unwrap_err();
    let text = error.to_string();
    assert!(
        error.not_permitted() && text.contains("the tag fixed of") && text.contains("is immutable"),
        "{text}"
    );
    let images = lab.images().await;
    let (repository, tag) = (format!("{project}/x"), ImageSelector::Tag("fixed".into()));
    for all_tags in [false, true] {
        let error = images
            .remove(&repository, &tag, all_tags)
            .await
            .unwrap_err();
        assert!(
            error.not_permitted() && error.to_string().contains("immutable"),
            "{error}"
        );
    }
    assert_eq!(
        images.images(&repository, &Query::default()).await?.items[0].tags,
        ["fixed"]
    );
    if lab.stand_in.is_none() {
        // So that the project can be deleted.
        let rules = format!("/projects/{project}/immutabletagrules");
        for rule in lab
            .ask("GET", &rules, &Value::Null)
            .await
            .1
            .as_array()
            .into_iter()
            .flatten()
        {
            lab.ask("DELETE", &format!("{rules}/{}", rule["id"]), &Value::Null)
                .await;
        }
    }
    lab.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_robot_does_what_it_may() -> Outcome {
    let lab = Lab::start().await?;
    let project = lab.project(Some(1 << 30)).await;
    let granted = [
        ("repository", "push"),
        ("repository", "pull"),
        ("repository", "list"),
        ("artifact", "list"),
        ("artifact", "read"),
        ("tag", "delete"),
        ("project", "read"),
        ("quota", "read"),
    ];
    let robot = lab.robot(&project, &granted).await;
    let registries = Registries::new(Lab::access(&robot));
    let repository = format!("{project}/of/robot");
    let destination = lab.destination(&repository, Lab::access(&robot));
    let image = image(&project, 100);
    save(&destination, &image, "1").await?;
    save(&destination, &image, "2").await?;
    let place: ImageLocation = format!("{}/{repository}", lab.host).parse()?;
    let images = place.open(&registries).await?;
    assert_eq!(
        images.images(&repository, &Query::default()).await?.items[0].tags,
        ["1", "2"]
    );
    assert!(
        images.quota_usage(&repository).await?.is_some(),
        "it may read the quota"
    );
    assert!(
        !images
            .remove(&repository, &ImageSelector::Tag("1".into()), false)
            .await?
            .image_deleted
    );
    let error = images
        .remove(&repository, &ImageSelector::Digest(image.digest()), true)
        .await
        .unwrap_err();
    assert!(error.not_permitted(), "{error}");
    // It has no rights in other projects.
    let other = lab.project(None).await;
    let error = lab
        .destination(&format!("{other}/x"), Lab::access(&robot))
        .check()
        .await
        .unwrap_err();
    assert!(error.not_permitted() && !error.retryable(), "{error}");
    lab.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_credentials_get_a_token_and_then_a_no() -> Outcome {
    let lab = Lab::start().await?;
    let project = lab.project(None).await;
    // Not the administrator's name: Harbor locks out a user for a moment after a wrong password, for all clients.
    let error = lab
        .destination(&format!("{project}/x"), Lab::access("nobody:hunter2"))
        .check()
        .await
        .unwrap_err();
    let text = error.to_string();
    assert!(error.not_permitted() && !error.retryable(), "{text}");
    assert!(!text.contains("hunter2"), "{text}");
    lab.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_are_mounted_where_they_may_be_read_and_uploaded_where_not() -> Outcome {
    let lab = Lab::start().await?;
    let (source, target) = (lab.project(None).await, lab.project(None).await);
    let image = image(&source, 3000);
    save(&lab.to(&format!("{source}/base")), &image, "1").await?;
    let layer = Digest::of(&image.layer);
    let destination = lab.to(&format!("{target}/x"));
    let from = |path: &str| format!("{}/{path}", lab.host);
    assert!(
        destination
            .mount_blob(&layer, &from(&format!("{source}/base")))
            .await?
    );
    assert_eq!(destination.has_blob(&layer, Some(3000)).await?, Some(3000));
    for (digest, path) in [
        (Digest::of("unknown"), format!("{source}/base")),
        (layer, "nosuch-project/base".to_owned()),
        (layer, "base".to_owned()),
    ] {
        assert!(
            !destination.mount_blob(&digest, &from(&path)).await?,
            "{path}"
        );
    }
    let robot = lab
        .robot(&target, &[("repository", "push"), ("repository", "pull")])
        .await;
    let restricted = lab.destination(&format!("{target}/y"), Lab::access(&robot));
    assert!(
        !restricted
            .mount_blob(&layer, &from(&format!("{source}/base")))
            .await?
    );
    // After a 202, the blob is uploaded.
    save(&restricted, &image, "1").await?;
    lab.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_manifest_is_tried_twice_and_no_more() -> Outcome {
    let lab = Lab::start().await?;
    let project = lab.project(None).await;
    let destination = lab.to(&format!("{project}/x"));
    let error = destination
        .put_manifest("{}".into(), MANIFEST_TYPE, "1")
        .await
        .unwrap_err();
    assert!(
        matches!(&error, Error::Registry(registry::Error::Reply(reply)) if reply.status == 500),
        "{error}"
    );
    // A layer that does not exist.
    let error = destination
        .put_manifest(image("none", 9).manifest, MANIFEST_TYPE, "1")
        .await
        .unwrap_err();
    assert!(
        !error.retryable() && error.to_string().contains("MANIFEST_BLOB_UNKNOWN"),
        "{error}"
    );
    lab.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_broke_is_made_again() -> Outcome {
    let lab = Lab::start().await?;
    let project = lab.project(None).await;
    let destination = lab.to(&format!("{project}/x"));
    destination.check().await?;
    let blob = image("again", 3_000_000).layer;
    let (digest, size) = (Digest::of(&blob), blob.len() as u64);
    // The digest does not match the blob: the upload fails at its end, and only the whole blob can be sent again.
    let mut writer = destination.begin_blob(Handle::current())?;
    let half = blob.slice(..1_000_000);
    let mut writer =
        tokio::task::spawn_blocking(move || writer.write(half).map(|()| writer)).await??;
    let error = writer.try_finish(&digest, 1_000_000).await.unwrap_err();
    assert!(error.retryable(), "{error}");
    let mut writer = writer.retry(error).await?;
    let mut writer =
        tokio::task::spawn_blocking(move || writer.write(blob).map(|()| writer)).await??;
    writer.try_finish(&digest, size).await?;
    assert_eq!(destination.has_blob(&digest, Some(size)).await?, Some(size));
    lab.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn proxy_caches_and_read_only_registries_say_what_they_are() -> Outcome {
    let lab = Lab::start().await?;
    let Some(stand_in) = &lab.stand_in else {
        support::ignore("on a running Harbor, this would affect other users");
        return Ok(());
    };
    stand_in.state.lock().unwrap().proxy("cache");
    let error = lab.to("cache/x").check().await.unwrap_err();
    assert!(
        matches!(error, Error::Harbor(harbor::Error::ProxyCache { .. })),
        "{error}"
    );
    assert!(error.not_permitted(), "{error}");
    let project = lab.project(None).await;
    stand_in.state.lock().unwrap().read_only = true;
    let error = lab.to(&format!("{project}/x")).check().await.unwrap_err();
    assert!(
        error.not_permitted() && error.code() == Some("registry_read_only"),
        "{error}"
    );
    stand_in.state.lock().unwrap().read_only = false;
    lab.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_shell_lists_and_deletes() -> Outcome {
    let lab = Lab::start().await?;
    let project = lab.project(Some(1 << 30)).await;
    let image = image(&project, 4000);
    for tag in ["monday", "tuesday"] {
        save(&lab.to(&format!("{project}/note")), &image, tag).await?;
    }
    let run = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_upperdeck"))
            .arg("image")
            .args(arguments)
            .args(["--creds", &lab.admin, "--tls-verify=false"])
            .env("HOME", "/nonexistent")
            .env_remove("http_proxy")
            .output()
            .unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (
            output.status.code(),
            text(&output.stdout),
            text(&output.stderr),
        )
    };
    let place = format!("{}/{project}/note", lab.host);
    let (code, out, err) = run(&["ls", &place, "--format", "json"]);
    assert_eq!(code, Some(0), "{err}");
    let listed: Value = serde_json::from_str(&out)?;
    assert_eq!(
        (&listed["total"], &listed["images"][0]["tags"]),
        (&json!(1), &json!(["monday", "tuesday"]))
    );
    assert_eq!(listed["quota"]["limit"], json!(1 << 30));
    let (_, out, _) = run(&["ls", &format!("{}/{project}", lab.host)]);
    assert!(
        out.contains(&format!("{project}/note")) && out.contains("free"),
        "{out}"
    );
    let (_, out, _) = run(&["ls", &place]);
    assert!(
        out.contains("monday,tuesday") && out.contains("amd64"),
        "{out}"
    );
    let (code, _, err) = run(&["rm", &format!("{place}@{}", image.digest())]);
    assert_eq!(code, Some(1), "{err}");
    assert!(err.contains("tagged monday, tuesday"), "{err}");
    let (code, out, err) = run(&[
        "rm",
        &format!("{place}:monday"),
        &format!("{place}:tuesday"),
    ]);
    assert_eq!(code, Some(0), "{err}");
    assert!(
        out.contains("untagged") && out.contains("deleted") && out.contains("note: "),
        "{out}"
    );
    assert_eq!(run(&["rm", &format!("{place}:monday")]).0, Some(1));
    assert_eq!(run(&["rm", &place]).0, Some(2));
    assert_eq!(run(&["ls", "https://x/y"]).0, Some(2));
    lab.end().await
}
