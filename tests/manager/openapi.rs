//! The description of the API: valid for a validator, and enough for a generator to make a client that works.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use upperdeck::service::job::{Outcome, Saved};

use crate::site::{Outcomes, Site, Who, get, id, session, succeeded};
use crate::{store, support};

/// Returns a program that tests/run has installed.
pub fn tool(name: &str) -> Option<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/openapi/bin");
    let found = dir.join(name);
    if !found.is_file() {
        support::ignore(&format!(
            "needs {name} (tests/run installs it into target/openapi)"
        ));
        return None;
    }
    Some(found)
}

/// Runs a program in `dir` and returns its stdout.
async fn run(
    program: PathBuf,
    dir: &Path,
    args: Vec<String>,
) -> Result<String, Box<dyn std::error::Error>> {
    let mut command = Command::new(&program);
    command.current_dir(dir).args(args).env("PYTHONPATH", dir);
    let output = tokio::task::spawn_blocking(move || command.output()).await??;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{}: {text}{errors}",
        program.display()
    );
    Ok(text)
}

#[tokio::test]
async fn every_reply_is_described_and_times_are_times() -> Outcomes {
    let (_site, manager, _agent) = Site::at_work(&[]).await?;
    let document = get(manager.address, Who::Anonymous, "/openapi.json").await?;
    let mut operations = Vec::new();
    for (path, item) in document["paths"].as_object().ok_or("no paths")? {
        for (method, operation) in item.as_object().ok_or("no path item")? {
            operations.push(operation["operationId"].to_string());
            for (status, reply) in operation["responses"].as_object().ok_or("no replies")? {
                let text = reply["description"].as_str().unwrap_or_default();
                assert!(!text.is_empty(), "{method} {path}: {status}");
            }
        }
    }
    let count = operations.len();
    operations.sort();
    operations.dedup();
    assert_eq!(operations.len(), count, "{operations:?}");
    let schemas = &document["components"]["schemas"];
    for (schema, field) in [
        ("AuditLine", "at"),
        ("ExistingImage", "saved"),
        ("ImageFate", "at"),
        ("ImageView", "changed"),
        ("NodeView", "heard"),
        ("NodeView", "started"),
        ("Save", "created"),
        ("Save", "finished"),
        ("Save", "since"),
        ("Save", "started"),
        ("SessionEndView", "at"),
        ("SessionView", "started"),
        ("SignedIn", "expires"),
        ("TimelineEntry", "at"),
        ("Waiting", "until"),
    ] {
        let of = &schemas[schema]["properties"][field];
        assert_eq!(of["format"], "date-time", "{schema}.{field}: {of}");
    }
    let text = document.to_string();
    assert!(!text.contains("::") && !text.contains("[`"), "{text}");
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_made_client_saves_checks_lists_and_deletes() -> Outcomes {
    let (Some(validator), Some(generator), Some(python)) = (
        tool("openapi-spec-validator"),
        tool("openapi-python-client"),
        tool("python3"),
    ) else {
        return Ok(());
    };
    let (site, manager, agent) = Site::at_work(&[session(1, Some("alice"))]).await?;
    let document: Value = get(manager.address, Who::Anonymous, "/openapi.json").await?;
    let dir = site.dir.path();
    std::fs::write(dir.join("openapi.json"), document.to_string())?;
    run(validator, dir, vec!["openapi.json".into()]).await?;
    let args = "generate --path openapi.json --output-path upperdeck_client --meta none";
    run(generator, dir, args.split(' ').map(str::to_owned).collect()).await?;
    // The generator may have taken longer than a heartbeat counts.
    agent.heartbeat(&[session(1, Some("alice"))]).await?;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/manager/client.py");
    let address = format!("http://{}", manager.address);
    let client = run(
        python,
        dir,
        vec![script.display().to_string(), address, id(1)],
    );
    let work = async {
        let claim = agent.claim().await?;
        let digest = store::push(&site, "alice", "torch", "v1", "made")?;
        agent.begin(&claim).await?;
        let Outcome::Succeeded { saved } = succeeded() else {
            return Err("no success".into());
        };
        let saved = Saved {
            digest: digest.to_string(),
            reference: format!("oci:{}/alice/torch@{digest}", site.images().display()),
            ..saved
        };
        agent.end(&claim, 2, Outcome::Succeeded { saved }).await?;
        Ok::<_, Box<dyn std::error::Error>>(())
    };
    let (text, worked) = tokio::join!(client, work);
    worked?;
    assert_eq!(text?, "saved, checked, listed, deleted\n");
    manager.stop().await
}

#[tokio::test]
async fn what_images_are_selected_by_is_an_enumeration() -> Outcomes {
    let description = serde_json::to_value(upperdeck::service::manager::description())?;
    let parameters = &description["paths"]["/api/v1/images"]["get"]["parameters"];
    let schema = |name: &str| {
        let all = parameters.as_array().into_iter().flatten();
        let found = all.into_iter().find(|one| one["name"] == name);
        found.map(|one| one["schema"].clone()).unwrap_or_default()
    };
    let category = schema("category");
    let shown = category.to_string();
    assert!(shown.contains(r#""enum":["cpu","gpu","any"]"#), "{shown}");
    let sort = schema("sort").to_string();
    assert!(
        sort.contains(r#""enum":["updated","name","size"]"#),
        "{sort}"
    );
    Ok(())
}
