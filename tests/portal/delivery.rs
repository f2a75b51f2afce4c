//! Delivery of the page: small, compressed, cached by the browser, from one host, with a content security policy.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use serde_json::{Value, json};

use crate::begin;
use crate::browser::{BrowserOptions, Outcome};
use crate::standin::Standin;

/// Maximum number of bytes to load, for slow connections.
const MOST: u64 = 60_000;

fn ask(address: SocketAddr, path: &str, headers: &str) -> Outcome<(String, Vec<u8>)> {
    let mut stream = TcpStream::connect(address)?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n{headers}\r\n"
    )?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let end = answer
        .windows(4)
        .position(|window| window == b"\r\n\r\n")
        .ok_or("no head")?;
    let body = answer.split_off(end + 4);
    Ok((String::from_utf8(answer)?.to_lowercase(), body))
}

/// Returns the paths that the page refers to.
fn named(page: &[u8]) -> Vec<String> {
    let page = String::from_utf8_lossy(page).into_owned();
    page.split('"')
        .filter(|part| part.starts_with("portal/"))
        .map(|path| format!("/{path}"))
        .collect()
}

#[test]
fn everything_goes_out_with_its_policy_packed_and_once() -> Outcome {
    let standin = Standin::start()?;
    let (head, page) = ask(standin.address, "/", "")?;
    for line in [
        "content-type: text/html; charset=utf-8",
        "cache-control: no-cache",
        "x-content-type-options: nosniff",
        "referrer-policy: no-referrer",
        "default-src 'none'; script-src 'self'; style-src 'self'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    ] {
        assert!(head.contains(line), "no {line}: {head}");
    }
    assert!(!head.contains("unsafe"), "{head}");
    let files = named(&page);
    assert!(files.len() > 8, "{files:?}");
    for path in files.iter().map(String::as_str).chain(["/"]) {
        let (head, plain) = ask(standin.address, path, "")?;
        assert!(head.starts_with("http/1.1 200"), "{path}: {head}");
        assert!(
            head.contains("content-security-policy: default-src 'none'"),
            "{path}: {head}"
        );
        assert!(
            path == "/" || head.contains("cache-control: public, max-age=31536000, immutable"),
            "{path}: {head}"
        );
        let (head, packed) = ask(standin.address, path, "Accept-Encoding: br, gzip;q=0.8\r\n")?;
        assert!(
            head.contains("content-encoding: gzip") && head.contains("vary: accept-encoding"),
            "{path}: {head}"
        );
        let mut unpacked = Vec::new();
        flate2::read::GzDecoder::new(&packed[..]).read_to_end(&mut unpacked)?;
        assert_eq!(unpacked, plain, "{path}");
        let (head, _) = ask(standin.address, path, "Accept-Encoding: gzip;q=0\r\n")?;
        assert!(!head.contains("content-encoding"), "{path}: {head}");
        let etag = head
            .lines()
            .find_map(|line| line.strip_prefix("etag: "))
            .ok_or("no etag")?;
        let (head, body) = ask(
            standin.address,
            path,
            &format!("If-None-Match: W/{etag}\r\n"),
        )?;
        assert!(
            head.starts_with("http/1.1 304") && body.is_empty(),
            "{path}: {head}"
        );
        assert!(head.contains("content-security-policy"), "{path}: {head}");
        let text = String::from_utf8(plain)?;
        let elsewhere: Vec<_> = text
            .match_indices("://")
            .map(|(at, _)| &text[at.saturating_sub(6)..(at + 20).min(text.len())])
            // A namespace, and a transport in a command that is shown.
            .filter(|around| !around.contains("//www.w3.org") && !around.contains("docker://"))
            .collect();
        assert!(
            elsewhere.is_empty(),
            "{path} names another host: {elsewhere:?}"
        );
    }
    let (head, _) = ask(standin.address, "/portal/000000000000/app.js", "")?;
    assert!(
        head.starts_with("http/1.1 200") && head.contains("cache-control: no-store"),
        "{head}"
    );
    let (head, _) = ask(standin.address, "/portal/000000000000/../mod.rs", "")?;
    assert!(head.starts_with("http/1.1 404"), "{head}");
    Ok(())
}

#[test]
fn it_loads_in_a_blink_on_a_poor_line_and_for_nothing_the_second_time() -> Outcome {
    for language in ["en-GB", "ko-KR"] {
        let Some((browser, standin)) = begin(&BrowserOptions {
            language,
            ..BrowserOptions::default()
        })?
        else {
            return Ok(());
        };
        let measure = "return performance.getEntriesByType('navigation').concat(performance.getEntriesByType('resource'))
            .filter((entry) => !entry.name.includes('/api/'))
            .map((entry) => [entry.name, entry.transferSize, entry.decodedBodySize])";
        let load = || -> Outcome<Vec<(String, u64, u64)>> {
            browser.until(
                "the sessions",
                "return document.querySelectorAll('article').length === 2",
                json!([]),
            )?;
            let loaded: Value = browser.run(measure, json!([]))?;
            Ok(serde_json::from_value(loaded)?)
        };
        browser.go(&standin.url("sessions"))?;
        let loaded = load()?;
        let own = format!("http://{}/", standin.address);
        assert!(
            loaded.iter().all(|(name, _, _)| name.starts_with(&own)),
            "{loaded:?}"
        );
        let sum = |of: &[(String, u64, u64)]| {
            of.iter()
                .fold((0, 0), |(sent, size), file| (sent + file.1, size + file.2))
        };
        let (sent, size) = sum(&loaded);
        eprintln!(
            "{language}: {} files, {sent} bytes with headers, {size} unpacked",
            loaded.len()
        );
        assert!(
            sent > 5_000 && sent < MOST,
            "{sent} bytes are loaded: {loaded:#?}"
        );
        browser.go("about:blank")?;
        browser.go(&standin.url("sessions"))?;
        let (again, _) = sum(&load()?);
        assert!(again < 2_000, "{again} bytes are loaded again");
        browser.assert_clean()?;
    }
    Ok(())
}
