//! The upload flows that the distribution specification lets a registry ask for, from the client's side: a registry that is
//! strict about one of them at a time.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use upperdeck::common::digest::Digest;
use upperdeck::store::registry::{Access, Retry};

use crate::http::{Request, Response, Server};
use crate::proxy::{Fault, Proxy};
use crate::{Outcome, access, deliver, noise, open};

/// What it insists on.
#[derive(Clone, Copy, Debug, PartialEq)]
enum RegistryQuirk {
    /// Whatever comes.
    Lenient,
    /// `Location` without a host.
    RelativeLocation,
    /// `Location` relative to the path of the request.
    SiblingLocation,
    /// `Location` at another host, as a registry behind a proxy writes it.
    OtherHost,
    /// Every answer moves the upload to a new address with a new state.
    MovingLocation,
    /// PATCH answers without `Location`.
    SilentPatch,
    /// 411 to a body without `Content-Length`, 416 to pieces out of order, and no piece but the last below a minimum.
    Lengths,
    /// `OCI-Chunk-Min-Length`, which one stream fulfils.
    LeastChunk,
    /// 204 instead of 202 to PATCH.
    NoContent,
    /// No `Docker-Content-Digest` anywhere, and no `Docker-Upload-UUID`.
    Bare,
}

#[derive(Default)]
struct State {
    uploads: BTreeMap<String, Vec<u8>>,
    blobs: BTreeMap<String, Vec<u8>>,
    generation: u32,
    patches: Vec<usize>,
    refused: u32,
    wrong: Vec<String>,
}

/// Keeps what came of a request that was cut, and says how much that is: as distribution 3 does.
fn registry(way: RegistryQuirk, state: &Arc<Mutex<State>>) -> std::io::Result<Server> {
    let state = Arc::clone(state);
    Server::start(move |request: Request| {
        let mut state = state.lock().unwrap();
        let path = request.path.clone();
        let Some(rest) = path.strip_prefix("/v2/") else {
            return Response::new(404);
        };
        if rest.is_empty() {
            return Response::new(200);
        }
        let state = &mut *state;
        let address = |state: &mut State, id: &str| {
            let host = request.header("host");
            let path = format!("/v2/a/b/blobs/uploads/{id}");
            match way {
                RegistryQuirk::RelativeLocation => format!("{path}?_state=x%2Fy"),
                RegistryQuirk::SiblingLocation if request.method == "POST" => format!("{id}?s=1"),
                RegistryQuirk::OtherHost => {
                    format!("https://cdn.example:444{path}?_state=x%2Fy&b=c")
                }
                RegistryQuirk::MovingLocation => {
                    state.generation += 1;
                    format!("http://{host}{path}?_state=g{}", state.generation)
                }
                _ => format!("http://{host}{path}?_state=x%2Fy"),
            }
        };
        if let Some(id) = rest.strip_prefix("a/b/blobs/uploads/") {
            if way == RegistryQuirk::MovingLocation && request.method != "POST" {
                let expected = format!("_state=g{}", state.generation);
                if !request.query.starts_with(&expected) {
                    return Response::new(404);
                }
            }
            if request.method == "POST" {
                let id = format!("u{}", state.uploads.len());
                state.uploads.insert(id.clone(), Vec::new());
                let mut answer = Response::new(202)
                    .with("Location", address(state, &id))
                    .with("Range", "0-0");
                if matches!(way, RegistryQuirk::Lengths | RegistryQuirk::LeastChunk) {
                    answer = answer.with("OCI-Chunk-Min-Length", "20000000");
                }
                return answer;
            }
            let id = id.to_owned();
            let Some(have) = state.uploads.get(&id).map(Vec::len) else {
                return Response::new(404);
            };
            let range = |length: usize| format!("0-{}", length.saturating_sub(1));
            return match request.method.as_str() {
                "GET" => Response::new(204)
                    .with("Location", address(state, &id))
                    .with("Range", range(have)),
                "DELETE" => {
                    state.uploads.remove(&id);
                    Response::new(204)
                }
                "PATCH" => {
                    let length: Option<usize> = request.header("content-length").parse().ok();
                    if way == RegistryQuirk::Lengths {
                        let Some(length) = length else {
                            state.refused += 1;
                            return Response::new(411);
                        };
                        let expected = format!("{have}-{}", have + length - 1);
                        if request.header("content-range") != expected {
                            state.wrong.push(format!(
                                "{} and not {expected}",
                                request.header("content-range")
                            ));
                            return Response::new(416).with("Range", range(have));
                        }
                        if have > 0 && state.patches.last().is_some_and(|last| *last < 20_000_000) {
                            state
                                .wrong
                                .push("a small piece that is not the last".to_owned());
                        }
                    }
                    if request.header("content-type") != "application/octet-stream" {
                        state
                            .wrong
                            .push("a PATCH without its content type".to_owned());
                    }
                    state.patches.push(request.body.len());
                    let upload = state.uploads.entry(id.clone()).or_default();
                    upload.extend_from_slice(&request.body);
                    let length = upload.len();
                    let status = if way == RegistryQuirk::NoContent {
                        204
                    } else {
                        202
                    };
                    let answer = Response::new(status).with("Range", range(length));
                    if way == RegistryQuirk::SilentPatch {
                        answer
                    } else {
                        answer.with("Location", address(state, &id))
                    }
                }
                _ => {
                    let bytes = state.uploads.remove(&id).unwrap_or_default();
                    let digest = request.one("digest").unwrap_or_default();
                    if !request.body.is_empty() {
                        state.wrong.push("a PUT with a body".to_owned());
                    }
                    if Digest::of(&bytes).to_string() != digest {
                        let body = r#"{"errors":[{"code":"DIGEST_INVALID","message":"digest"}]}"#;
                        return Response::new(400).body(body);
                    }
                    state.blobs.insert(digest.clone(), bytes);
                    let answer =
                        Response::new(201).with("Location", format!("/v2/a/b/blobs/{digest}"));
                    if way == RegistryQuirk::Bare {
                        answer
                    } else {
                        answer.with("Docker-Content-Digest", digest)
                    }
                }
            };
        }
        match rest
            .strip_prefix("a/b/blobs/")
            .and_then(|digest| state.blobs.get(digest))
        {
            Some(blob) => Response::new(200)
                .with("Content-Length", blob.len().to_string())
                .body(blob.clone()),
            None => Response::new(404),
        }
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn every_way_of_uploading_is_gone() -> Outcome {
    for way in [
        RegistryQuirk::Lenient,
        RegistryQuirk::RelativeLocation,
        RegistryQuirk::SiblingLocation,
        RegistryQuirk::OtherHost,
        RegistryQuirk::MovingLocation,
        RegistryQuirk::SilentPatch,
        RegistryQuirk::Lengths,
        RegistryQuirk::LeastChunk,
        RegistryQuirk::NoContent,
        RegistryQuirk::Bare,
    ] {
        let state = Arc::new(Mutex::new(State::default()));
        let server = registry(way, &state)?;
        let destination = open(server.address, "a/b", access(None));
        // A small one in memory, one of a single piece, one of several, and nothing at all.
        let small = noise(1, 700);
        destination
            .check()
            .await
            .map_err(|e| format!("{way:?}: {e}"))?;
        destination
            .put_blob(small.clone(), &Digest::of(&small))
            .await
            .map_err(|e| format!("{way:?}: {e}"))?;
        // Where pieces count, several of the largest that are made.
        let large = if way == RegistryQuirk::Lengths {
            50_000_000
        } else {
            3_000_000
        };
        for size in [90_000, large, 0] {
            let blob = noise(2, size);
            let again = deliver(&destination, &blob)
                .await
                .map_err(|e| format!("{way:?}, {size}: {e}"))?;
            let found = destination
                .has_blob(&Digest::of(&blob), Some(size as u64))
                .await?;
            assert_eq!(found, Some(size as u64), "{way:?}");
            assert!(again <= u32::from(way == RegistryQuirk::Lengths), "{way:?}");
        }
        let state = state.lock().unwrap();
        assert!(state.wrong.is_empty(), "{way:?}: {:?}", state.wrong);
        // It is told once that lengths are wanted.
        assert_eq!(
            state.refused,
            u32::from(way == RegistryQuirk::Lengths),
            "{way:?}"
        );
    }
    Ok(())
}

/// So that the registry has noticed the end of the broken request when it is asked how much of it came.
fn unhurried() -> Access {
    Access {
        retry: Retry {
            first_pause: Duration::from_millis(200),
            ..Retry::default()
        },
        ..access(None)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_goes_on_where_the_registry_has_it() -> Outcome {
    let state = Arc::new(Mutex::new(State::default()));
    let server = registry(RegistryQuirk::Lenient, &state)?;
    let blob = noise(5, 8 << 20);
    let line = Proxy::start(server.address, |method, _, n| match method {
        "PATCH" if n < 8 => Fault::CutRequest(3 << 20),
        _ => Fault::None,
    })?;
    let destination = open(line.address, "a/b", unhurried());
    let again = deliver(&destination, &blob).await?;
    assert!(again >= 1);
    assert_eq!(
        state.lock().unwrap().blobs[&Digest::of(&blob).to_string()],
        blob
    );
    let seen = line.seen();
    assert!(
        seen.iter()
            .any(|seen| seen.method == "GET" && seen.status == 204),
        "how far it was is never asked"
    );
    // What the registry kept was not sent again: all PATCHes together are the blob, and what was under way in the cuts.
    let sent: u64 = seen
        .iter()
        .filter(|s| s.method == "PATCH")
        .map(|s| s.bytes)
        .sum();
    let posts = seen.iter().filter(|s| s.method == "POST").count();
    assert_eq!(posts, 1, "one upload from beginning to end");
    assert!(
        sent < (8 << 20) + u64::from(again) * (1 << 20),
        "{sent} bytes for 8 MiB"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn other_bytes_than_before_never_become_a_blob() -> Outcome {
    let state = Arc::new(Mutex::new(State::default()));
    let server = registry(RegistryQuirk::Lenient, &state)?;
    let (before, now) = (noise(5, 4 << 20), noise(6, 4 << 20));
    let line = Proxy::start(server.address, |method, _, n| match method {
        "PATCH" if n < 4 => Fault::CutRequest(2 << 20),
        _ => Fault::None,
    })?;
    let destination = open(line.address, "a/b", unhurried());
    let mut writer = destination.begin_blob(tokio::runtime::Handle::current())?;
    let (digest, size) = (Digest::of(&before), before.len() as u64);
    let (mut writer, error) = tokio::task::spawn_blocking(move || {
        let error = before
            .chunks(65536)
            .find_map(|piece| writer.write(piece.to_vec().into()).err());
        (writer, error)
    })
    .await?;
    // On a busy machine all of it may be on its way before anybody hears of the cut.
    let error = match error {
        Some(error) => error,
        None => writer.try_finish(&digest, size).await.unwrap_err(),
    };
    let mut writer = writer.retry(error).await?;
    // The files changed meanwhile: what the registry kept is of another layer.
    let rest = now.clone();
    let mut writer = tokio::task::spawn_blocking(move || {
        for piece in rest.chunks(65536) {
            writer.write(piece.to_vec().into())?;
        }
        Ok::<_, upperdeck::store::destination::Error>(writer)
    })
    .await??;
    let digest = Digest::of(&now);
    let error = writer
        .try_finish(&digest, now.len() as u64)
        .await
        .unwrap_err();
    assert!(
        error.retryable() && error.to_string().contains("is corrupt"),
        "{error}"
    );
    // And then from its beginning.
    let mut writer = writer.retry(error).await?;
    let rest = now.clone();
    let mut writer =
        tokio::task::spawn_blocking(move || writer.write(rest).map(|()| writer)).await??;
    writer.try_finish(&digest, now.len() as u64).await?;
    assert_eq!(state.lock().unwrap().blobs[&digest.to_string()], now);
    Ok(())
}
