//! Tests of `upperdeck doctor` on a real Redis, a real registry and files with errors.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::host::redis::Redis;
use crate::host::registry::{CREDENTIALS, Registry};
use crate::host::{Roots, Scratch};
use crate::save::upperdeck_itself;
use crate::support::{Need, ignored};

/// Returns the findings and the exit code.
fn doctor(scratch: &Scratch, words: &[&str]) -> Result<(Vec<Value>, Option<i32>)> {
    let output = upperdeck_itself("doctor", &Roots::none(scratch))
        .args(["--format", "json"])
        .args(words)
        .output()?;
    let report: Value = serde_json::from_slice(&output.stdout)
        .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    let findings = report["findings"].as_array().context("findings")?.clone();
    Ok((findings, output.status.code()))
}

fn states<'a>(findings: &'a [Value], check: &str) -> Vec<&'a str> {
    let of_it = findings.iter().filter(|finding| finding["check"] == check);
    of_it
        .filter_map(|finding| finding["state"].as_str())
        .collect()
}

fn private(file: &Path, text: &str) -> Result<String> {
    fs::write(file, text)?;
    fs::set_permissions(file, fs::Permissions::from_mode(0o600))?;
    Ok(file.display().to_string())
}

#[test]
fn an_agents_servers_and_files_are_looked_at_and_left_as_they_were() -> Result<()> {
    let needs = [
        Need::Root,
        Need::Program("redis-server"),
        Need::Program("redis-cli"),
        Need::Program("docker-registry"),
    ];
    if ignored(&needs) {
        return Ok(());
    }
    let scratch = Scratch::new()?;
    let (redis, registry) = (
        Redis::start(&scratch)?,
        Registry::start_with_password(&scratch)?,
    );
    let key = private(
        &scratch.path().join("key"),
        "a key that is long enough for this\n",
    )?;
    let robot = private(&scratch.path().join("robot"), CREDENTIALS)?;
    let wrong = private(&scratch.path().join("wrong"), "tester:other")?;
    let allow = format!("{}/sessions", registry.host);
    let state = scratch.dir("kept")?.display().to_string();
    let url = redis.url();
    let base = |redis: &str, creds: &str| -> Vec<String> {
        [
            "--for=agent",
            "--owner=namespace",
            "--tls-verify=false",
            &format!("--redis={redis}"),
            &format!("--key-file={key}"),
            &format!("--creds-file={creds}"),
            &format!("--allow={allow}"),
            &format!("--state-dir={state}"),
            &format!("--spool-dir={state}/agent"),
        ]
        .map(str::to_owned)
        .to_vec()
    };
    let ask = |words: &[String]| {
        doctor(
            &scratch,
            &words.iter().map(String::as_str).collect::<Vec<_>>(),
        )
    };

    let (findings, exit) = ask(&base(&url, &robot))?;
    for check in [
        "settings",
        "registry",
        "redis",
        "redis-rights",
        "cgroup",
        "openat2",
        "clock",
    ] {
        let found = states(&findings, check);
        ensure!(
            !found.is_empty() && found.iter().all(|state| *state == "ok"),
            "{check}: {findings:#?}"
        );
    }
    assert_eq!(states(&findings, "secrets"), ["ok", "ok"]);
    assert_eq!(states(&findings, "redis-password"), ["warning"]);
    assert_eq!(states(&findings, "registry-tls"), ["warning"]);
    assert_eq!(exit, Some(0));
    // Warnings count if that is requested.
    let mut strict = base(&url, &robot);
    strict.push("--strict".to_owned());
    assert_eq!(ask(&strict)?.1, Some(1));
    // Nothing is left in Redis.
    assert_eq!(redis.cli(&["DBSIZE"])?.trim(), "0");
    assert_eq!(
        registry.tags("sessions/upperdeck-doctor"),
        Vec::<String>::new()
    );

    // A Redis user with read access only, wrong credentials, and a key that everyone can read.
    redis.cli(&[
        "ACL",
        "SETUSER",
        "reader",
        "on",
        ">secret",
        "~{upperdeck}:*",
        "+@read",
        "+@scripting",
        "+@connection",
        "+time",
    ])?;
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644))?;
    let (findings, exit) = ask(&base(&format!("{url}?user=reader&pass=secret"), &wrong))?;
    assert_eq!(states(&findings, "redis-rights"), ["failed"]);
    assert_eq!(
        states(&findings, "redis-password"),
        Vec::<&str>::new().as_slice()
    );
    let rights = findings.iter().find(|f| f["check"] == "redis-rights");
    let refused = rights.and_then(|f| f["found"].as_str()).unwrap_or_default();
    ensure!(
        refused.contains("XADD") && !refused.contains("XRANGE"),
        "{refused}"
    );
    assert_eq!(states(&findings, "registry"), ["failed"]);
    assert_eq!(states(&findings, "secrets"), ["ok", "failed"]);
    assert_eq!(exit, Some(1));
    // The user that the documentation specifies.
    redis.cli(&[
        "ACL",
        "SETUSER",
        "documented",
        "on",
        ">secret",
        "~{upperdeck}:*",
        "+@read",
        "+@write",
        "+@scripting",
        "+@connection",
        "+time",
    ])?;
    let (findings, _) = ask(&base(&format!("{url}?user=documented&pass=secret"), &robot))?;
    assert_eq!(states(&findings, "redis-rights"), ["ok"], "{findings:#?}");
    Ok(())
}

#[test]
fn servers_that_never_answer_hold_up_nothing() -> Result<()> {
    if ignored(&[Need::Root]) {
        return Ok(());
    }
    let scratch = Scratch::new()?;
    // The kernel accepts connections, but nothing ever reads from them.
    let silent = TcpListener::bind("127.0.0.1:0")?;
    let address = silent.local_addr()?;
    let (findings, exit) = doctor(
        &scratch,
        &[
            "--for=manager",
            "--check-timeout=2s",
            &format!("--redis=redis://{address}"),
            &format!("--record=postgres://a@{address}/b"),
            &format!("--target={address}/p/{{user}}/{{name}}:{{tag}}"),
        ],
    )?;
    for check in ["registry", "redis", "record"] {
        assert_eq!(
            states(&findings, check),
            ["failed"],
            "{check}: {findings:#?}"
        );
    }
    assert_eq!(states(&findings, "settings"), ["failed", "failed"]);
    assert_eq!(exit, Some(1));
    Ok(())
}
