//! Fuzzing based on the description of the API: no request makes the manager fail, and every response conforms to the
//! description.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use upperdeck::service::manager::auth::Role;

use crate::site::{Agent, Outcomes, Site, Who, id, session, submit};
use crate::support;

/// Number of requests per call. `UPPERDECK_FUZZ` overrides it.
const EXAMPLES: &str = "15";

#[tokio::test(flavor = "multi_thread")]
async fn no_request_makes_it_fail_and_every_answer_is_described() -> Outcomes {
    let made = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/schemathesis/bin/schemathesis");
    let program = if made.is_file() {
        made
    } else if let Some(found) = support::find_program("schemathesis") {
        found
    } else {
        support::ignore("needs schemathesis (tests/run installs it into target/schemathesis)");
        return Ok(());
    };
    let site = Site::new()?;
    let mut options = site.options()?;
    options.tokens =
        options
            .tokens
            .with("fuzz", Role::Administrator, Some("alice"), "token-fuzz")?;
    let manager = site.manager_with(options).await?;
    let at = manager.address;
    let agent = Agent::new(&site.queue, "a");
    agent
        .heartbeat(&[session(1, Some("alice")), session(2, Some("bob"))])
        .await?;
    submit(at, Who::Alice, &id(1), "v1").await?;
    let examples = std::env::var("UPPERDECK_FUZZ").unwrap_or_else(|_| EXAMPLES.to_owned());
    let dir = site.dir.path().to_owned();
    for token in ["token-fuzz", "token-alice"] {
        let mut command = Command::new(&program);
        command
            .current_dir(&dir)
            .args(["run", &format!("http://{at}/openapi.json")])
            .args(["--header", &format!("Authorization: Bearer {token}")])
            .args(["--max-examples", &examples])
            .args([
                "--checks",
                "not_a_server_error,status_code_conformance,content_type_conformance,\
                 response_headers_conformance,response_schema_conformance,unsupported_method",
            ])
            .args(["--phases", "examples,coverage,fuzzing"])
            // An open stream is no answer that ends.
            .args(["--exclude-path-regex", "/events$"])
            .args(["--request-timeout", "30", "--no-color", "--seed", "7"]);
        let output = tokio::task::spawn_blocking(move || command.output()).await??;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "{text}\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(text.contains(" generated, "), "{text}");
    }
    // Still there, and it works. (What it has found in the lists, it may have cancelled.)
    agent.heartbeat(&[session(9, Some("bob"))]).await?;
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let job = submit(at, Who::Bob, &id(9), "after").await?;
    while agent.claim().await?.order.job != job {}
    manager.stop().await
}
