//! Fuzzing based on the description of the API: no request makes the manager fail, and every response conforms to the
//! description.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use upperdeck::service::manager::auth::Role;

use crate::site::{Agent, Outcomes, Site, Who, id, session, submit};
use crate::support;

/// Number of requests per call. `UPPERDECK_FUZZ` overrides it.
const EXAMPLES: &str = "15";
/// Time without an event after which a stream is ended for the fuzzer.
const SILENCE: Duration = Duration::from_millis(100);

/// A server that passes everything to the manager, and ends a stream of events once it is silent: a fuzzer waits for the end
/// of a response.
async fn cutting_streams(manager: SocketAddr) -> Result<SocketAddr, Box<dyn std::error::Error>> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
    let at = listener.local_addr()?;
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            tokio::spawn(async move {
                let server = TcpStream::connect(manager).await?;
                let (mut from_client, to_client) = client.into_split();
                let (from_server, mut to_server) = server.into_split();
                let up = tokio::io::copy(&mut from_client, &mut to_server);
                tokio::select! {
                    _ = up => {}
                    _ = down(from_server, to_client) => {}
                }
                Ok::<_, std::io::Error>(())
            });
        }
    });
    Ok(at)
}

/// Passes responses on. Events come in whole chunks, so that the last chunk can be added where a stream is silent.
async fn down(mut from: OwnedReadHalf, mut to: OwnedWriteHalf) -> std::io::Result<()> {
    let mut streams = false;
    let mut part = vec![0; 64 << 10];
    loop {
        let read = from.read(&mut part);
        let count = if streams {
            match tokio::time::timeout(SILENCE, read).await {
                Ok(count) => count?,
                Err(_) => return to.write_all(b"0\r\n\r\n").await,
            }
        } else {
            read.await?
        };
        if count == 0 {
            return Ok(());
        }
        let head = String::from_utf8_lossy(&part[..count]);
        streams |= head.contains("content-type: text/event-stream\r\n");
        to.write_all(&part[..count]).await?;
    }
}

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
    options.webhooks.secrets = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw".parse()?;
    options.webhooks.user_origins = vec!["https://hooks.invalid".parse()?];
    let manager = site.manager_with(options).await?;
    let at = manager.address;
    let agent = Agent::new(&site.queue, "a");
    agent
        .heartbeat(&[session(1, Some("alice")), session(2, Some("bob"))])
        .await?;
    submit(at, Who::Alice, &id(1), "v1").await?;
    let examples = std::env::var("UPPERDECK_FUZZ").unwrap_or_else(|_| EXAMPLES.to_owned());
    let dir = site.dir.path().to_owned();
    let at_proxy = cutting_streams(at).await?;
    for token in ["token-fuzz", "token-alice"] {
        let mut command = Command::new(&program);
        command
            .current_dir(&dir)
            .args(["run", &format!("http://{at_proxy}/openapi.json")])
            .args(["--header", &format!("Authorization: Bearer {token}")])
            .args(["--max-examples", &examples])
            .args([
                "--checks",
                "not_a_server_error,status_code_conformance,content_type_conformance,\
                 response_headers_conformance,response_schema_conformance,unsupported_method",
            ])
            .args(["--phases", "examples,coverage,fuzzing"])
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
