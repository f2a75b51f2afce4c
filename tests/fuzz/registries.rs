//! Fuzzes the registry client with the answers of a registry, Harbor, or a proxy: statuses, headers and bodies.
//!
//! The first byte of an input selects the request; the rest are the answers, separated by zero bytes, the last one for
//! all further requests: `STATUS`, headers, an empty line, the body. `HOST` stands for the registry's own address.

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use upperdeck::common::digest::Digest;
use upperdeck::image::manifest::MANIFEST;
use upperdeck::store::harbor::{self, Harbor, Query};
use upperdeck::store::images::{ImageLocation, Query as ImageQuery};
use upperdeck::store::registry::{self, Access, Reference, Registries, Retry};

use crate::errors;
use crate::files::{self, selected};

/// Maximum number of connections per input: a client that never stops gets no more answers.
const MOST: usize = 64;

pub fn run(input: &[u8]) {
    let (selector, rest) = selected(input);
    parts(rest);
    let answers: Vec<Vec<u8>> = rest.split(|&byte| byte == 0).map(<[u8]>::to_vec).collect();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let local = tokio::task::LocalSet::new();
    runtime.block_on(local.run_until(async move {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let host = listener.local_addr().expect("an address").to_string();
        let serving = tokio::task::spawn_local(serve(listener, host.clone(), answers));
        ask(selector, &host).await;
        serving.abort();
    }));
}

/// Parses the parts of an answer separately: its lines as a challenge, its body as a token and as an error.
fn parts(answer: &[u8]) {
    let text = String::from_utf8_lossy(answer);
    let heard = registry::parse_untrusted(&text, answer);
    for word in heard {
        assert!(!word.chars().any(char::is_control), "{word:?}");
        assert!(word.len() <= 16 << 10, "{} bytes", word.len());
    }
}

async fn serve(listener: TcpListener, host: String, answers: Vec<Vec<u8>>) {
    let mut next = 0;
    for _ in 0..MOST {
        let Ok((stream, _)) = listener.accept().await else {
            return;
        };
        // The client has disconnected if it cannot be answered.
        let _ = answer(stream, &host, &answers, &mut next).await;
    }
}

async fn answer(
    mut stream: TcpStream,
    host: &str,
    answers: &[Vec<u8>],
    next: &mut usize,
) -> std::io::Result<()> {
    let mut request = Vec::new();
    while !request.windows(4).any(|window| window == b"\r\n\r\n") {
        if stream.read_buf(&mut request).await? == 0 {
            return Ok(());
        }
        // A TLS handshake, which is not supported here.
        if request.first() == Some(&0x16) {
            return Ok(());
        }
    }
    let answer = answers.get(*next).or(answers.last());
    *next += 1;
    let answer = String::from_utf8_lossy(answer.map_or(&[][..], Vec::as_slice));
    let answer = answer.replace("HOST", host);
    let (head, body) = answer.split_once("\n\n").unwrap_or((&answer, ""));
    let head = head.replace('\n', "\r\n");
    let text = format!("HTTP/1.1 {head}\r\nConnection: close\r\n\r\n{body}");
    stream.write_all(text.as_bytes()).await?;
    stream.shutdown().await?;
    // Reads what the client still sends, so that it reads the answer.
    let mut rest = [0; 4096];
    while stream.read(&mut rest).await? > 0 {}
    Ok(())
}

fn access() -> Access {
    thread_local! {
        static NOTHING: tempfile::NamedTempFile = {
            let file = tempfile::NamedTempFile::new_in(files::directory().keep());
            let file = file.expect("a place for files");
            std::fs::write(file.path(), "{}").expect("a place for files");
            file
        };
    }
    Access {
        authfile: Some(NOTHING.with(|file| file.path().to_owned())),
        creds: "user:secret".parse().ok(),
        tls_verify: false,
        retry: Retry {
            max_attempts: 1,
            first_pause: Duration::ZERO,
            max_retries: 2,
            max_total_pause: Duration::ZERO,
        },
        stall_timeout: Duration::from_secs(2),
        ..Access::default()
    }
}

async fn ask(selector: u8, host: &str) {
    let registries = Registries::new(access());
    let name = format!("{host}/library/base");
    let reference: Reference = name.parse().expect("a reference");
    let repository = registries.push_to(&reference).expect("a repository");
    let digest = Digest::of("x");
    match selector % 9 {
        0 => {
            if let Some(manifest) = errors::checked(repository.manifest("v1").await) {
                assert_eq!(manifest.digest, Digest::of(&manifest.bytes));
            }
        }
        1 => {
            errors::checked(repository.tags().await);
            errors::checked(registries.catalog(host).await);
        }
        2 => {
            if let Some(bytes) = errors::checked(repository.blob(&digest).await) {
                assert_eq!(Digest::of(&bytes), digest);
            }
            errors::checked(repository.head_blob(&digest).await);
        }
        3 => {
            errors::checked(repository.head_manifest("v1").await);
            errors::checked(repository.delete_manifest("v1").await);
        }
        4 => {
            errors::checked(repository.check_push().await);
            errors::checked(repository.put_blob("x".into(), &digest).await);
        }
        5 => {
            let put = repository.put_manifest("{}".into(), MANIFEST, "v1").await;
            errors::checked(put);
            errors::checked(harbor::check_tag(&repository, "1").await);
            if let Ok(Some(budget)) = harbor::Budget::of(&repository).await {
                let asked = [(Digest::of("x"), 1)].into_iter().collect();
                errors::checked(budget.uncharged(&asked, 0).await);
            }
        }
        6 => {
            if let Some(Some(harbor)) =
                errors::checked(Harbor::find(&registries, host, "library").await)
            {
                let query = Query::default();
                errors::checked(harbor.projects(&query).await);
                errors::checked(harbor.repositories(Some("library"), &query).await);
                errors::checked(harbor.artifacts("library", "base", &query).await);
            }
        }
        7 => {
            if let Some(Some(harbor)) =
                errors::checked(Harbor::find(&registries, host, "library").await)
            {
                errors::checked(harbor.artifact("library", "base", "v1").await);
                errors::checked(harbor.summary("library").await);
                errors::checked(harbor.project("library").await);
            }
        }
        _ => {
            let place: ImageLocation = name.parse().expect("a place");
            if let Some(images) = errors::checked(place.open(&registries).await) {
                let query = ImageQuery::default();
                errors::checked(images.images("library/base", &query).await);
            }
        }
    }
}
