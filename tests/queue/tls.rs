//! TLS with the system's root certificates, and a Redis user with no more permissions than the queue needs.

use std::net::TcpListener;
use std::path::Path;
use std::process::Command;

use upperdeck::service::job::Keys;
use upperdeck::service::queue::{Error, Queue, Redis};

use crate::server::{KEY, Server};
use crate::support::{Need, ignored};
use crate::world::{NO_LIMITS, NOW, Outcome, order};

/// Variable that passes the URL of the server to the child process.
const URL: &str = "UPPERDECK_TEST_REDISS";
const NAME: &str = "tls::only_whom_the_systems_roots_vouch_for_is_spoken_to";

fn openssl(directory: &Path, line: &str) {
    let output = Command::new("openssl")
        .args(line.split(' '))
        .current_dir(directory)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[tokio::test]
async fn only_whom_the_systems_roots_vouch_for_is_spoken_to() -> Outcome {
    // The roots are read from the environment, which a test must not change: the other half is a process of its own.
    if let Ok(url) = std::env::var(URL) {
        return speak(&url).await;
    }
    if ignored(&[Need::Program("openssl")]) {
        return Ok(());
    }
    let keys = tempfile::tempdir()?;
    let at = keys.path();
    std::fs::write(at.join("names"), "subjectAltName=DNS:localhost")?;
    let fresh = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    openssl(
        at,
        &format!("req -x509 {fresh} -keyout ca.key -out ca.pem -days 2 -subj /CN=root"),
    );
    openssl(
        at,
        &format!("req {fresh} -keyout key.pem -out wish.pem -subj /CN=localhost"),
    );
    openssl(
        at,
        "x509 -req -in wish.pem -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -out cert.pem -extfile names",
    );
    let port = TcpListener::bind("127.0.0.1:0")?
        .local_addr()?
        .port()
        .to_string();
    let file = |name: &str| at.join(name).display().to_string();
    let (ca, cert, key) = (file("ca.pem"), file("cert.pem"), file("key.pem"));
    let rules = "ada on >s3cret ~{upperdeck}:* +@read +@write +@scripting +@connection +time";
    let mut more = vec![
        "--tls-port",
        &port,
        "--bind",
        "127.0.0.1",
        "--tls-auth-clients",
        "no",
        "--tls-ca-cert-file",
        &ca,
        "--tls-cert-file",
        &cert,
        "--tls-key-file",
        &key,
        "--user",
    ];
    more.extend(rules.split(' '));
    let Some(_server) = Server::start(&more) else {
        return Ok(());
    };
    let url = format!("rediss://ada:s3cret@localhost:{port}");
    let child = Command::new(std::env::current_exe()?)
        .args(["--exact", NAME, "--nocapture"])
        .env(URL, &url)
        .env("SSL_CERT_FILE", &ca)
        .output()?;
    assert!(
        child.status.success(),
        "{}",
        String::from_utf8_lossy(&child.stderr)
    );

    // This process does not know the root.
    let queue = Queue::Redis(Redis::connect(&url, Keys::parse(KEY)?, NO_LIMITS).await?);
    let error = queue.ping().await.err().ok_or("it spoke to a stranger")?;
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    assert!(!format!("{error:?}").contains("s3cret"));
    Ok(())
}

async fn speak(url: &str) -> Outcome {
    let queue = Queue::Redis(Redis::connect(url, Keys::parse(KEY)?, NO_LIMITS).await?);
    queue.ping().await?;
    let order = order("n1", "ada");
    queue.offer(&order).await?;
    assert_eq!(queue.claim("n1", "a", 1, NOW).await?.len(), 1);
    assert!(
        queue
            .reports("m", 1, std::time::Duration::from_millis(5))
            .await?
            .is_empty()
    );
    Ok(())
}
