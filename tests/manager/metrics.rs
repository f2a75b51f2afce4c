//! What a manager reports to Prometheus: its format, and that the alerts, the dashboard and the documents name only
//! metrics, labels and values that are there.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use reqwest::Method;
use tokio_util::sync::CancellationToken;
use upperdeck::service::agent;

use crate::site::{Outcomes, Site, Who, id, request, session, submit, until};
use crate::support;

const CLASSIC: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The labels of each metric, with the values that occur.
type Series = BTreeMap<String, BTreeMap<String, BTreeSet<String>>>;

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// Returns `label`, operator and value of each matcher in `{...}`, and the length of the braces.
fn matchers(text: &str) -> (Vec<(String, String, String)>, usize) {
    let mut found = Vec::new();
    if !text.starts_with('{') {
        return (found, 0);
    }
    let mut at = 1;
    while let Some(rest) = text.get(at..).filter(|rest| !rest.starts_with('}')) {
        let name = rest.find(|c| !is_name(c)).unwrap_or(rest.len());
        let Some(open) = rest.find('"') else { break };
        let Some(length) = rest[open + 1..].find('"') else {
            break;
        };
        let value = rest[open + 1..open + 1 + length].to_owned();
        found.push((rest[..name].to_owned(), rest[name..open].to_owned(), value));
        at += open + length + 2;
        at += usize::from(text[at..].starts_with(','));
        at += usize::from(text[at..].starts_with(' '));
    }
    (found, at + 1)
}

fn series(text: &str) -> Series {
    let mut all = Series::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let end = line.find(|c| !is_name(c)).unwrap_or(line.len());
        let labels = all.entry(line[..end].to_owned()).or_default();
        for (label, _, value) in matchers(&line[end..]).0 {
            labels.entry(label).or_default().insert(value);
        }
    }
    all
}

/// Adds to `wrong` what `text` names and `series` does not have. Returns how many metrics it names.
fn compare(file: &str, text: &str, series: &Series, wrong: &mut Vec<String>) -> usize {
    let mut count = 0;
    for (at, _) in text.match_indices("upperdeck_") {
        if text[..at].ends_with(|c: char| is_name(c) || c == '/') {
            continue;
        }
        let rest = &text[at..];
        let end = rest.find(|c| !is_name(c)).unwrap_or(rest.len());
        let (name, rest) = rest.split_at(end);
        count += 1;
        // The tables speak of a histogram as a whole.
        let histogram = format!("{name}_bucket");
        let Some(labels) = series.get(name).or_else(|| series.get(&histogram)) else {
            wrong.push(format!("{file}: no metric {name}"));
            continue;
        };
        for (label, operator, value) in matchers(rest).0 {
            // What Prometheus adds.
            if matches!(label.as_str(), "instance" | "job") {
                continue;
            }
            let Some(values) = labels.get(&label) else {
                wrong.push(format!("{file}: {name} has no label {label}"));
                continue;
            };
            let alternatives = value.split('|').map(|one| one.trim_end_matches('\\'));
            for one in alternatives.filter(|_| matches!(operator.as_str(), "=" | "=~")) {
                if !values.contains(one) {
                    wrong.push(format!("{file}: {name} has no {label} {one:?}"));
                }
            }
        }
    }
    for (at, by) in text.match_indices("by (") {
        let list = text[at + by.len()..].split(')').next().unwrap_or_default();
        for label in list.split(',').map(str::trim) {
            if label != "instance" && !series.values().any(|labels| labels.contains_key(label)) {
                wrong.push(format!("{file}: no metric has the label {label}"));
            }
        }
    }
    count
}

/// Runs promtool with `input` on its stdin.
fn promtool(args: &[&str], input: &str) -> Outcomes {
    let Some(program) = support::find_program("promtool") else {
        return Err("no promtool".into());
    };
    let mut file = tempfile::tempfile()?;
    std::io::Write::write_all(&mut file, input.as_bytes())?;
    std::io::Seek::rewind(&mut file)?;
    let output = Command::new(program)
        .args(args)
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/prometheus"))
        .stdin(Stdio::from(file))
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    // It reports remarks on metrics with status 3.
    assert!(output.status.success(), "promtool {args:?}: {text}");
    Ok(())
}

/// Returns `/metrics` of a manager on which one save succeeded.
async fn figures(accept: Option<&str>) -> Result<(String, String), Box<dyn std::error::Error>> {
    let (_site, manager, agent) = Site::at_work(&[session(1, Some("alice"))]).await?;
    let at = manager.address;
    let job = submit(at, Who::Alice, &id(1), "v1").await?;
    let claim = agent.claim().await?;
    agent.work(&claim).await?;
    let path = format!("/api/v1/saves/{job}");
    until(at, Who::Alice, &path, |save| save["state"] == "succeeded").await?;
    let begun = std::time::Instant::now();
    loop {
        let mut request = request(at, Who::Anonymous, Method::GET, "/metrics")?;
        if let Some(accept) = accept {
            request = request.header("Accept", accept);
        }
        let answer = request.send().await?;
        let kind = answer.headers()["content-type"].to_str()?.to_owned();
        let text = answer.text().await?;
        // The record is ahead of the figures for a moment, and the gauges are updated now and then.
        let complete = text.contains("upperdeck_save_pause_seconds_count 1")
            && text.contains("upperdeck_nodes{state=\"alive\"}");
        if complete || begun.elapsed() > crate::site::PATIENCE {
            manager.stop().await?;
            return Ok((kind, text));
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}

/// Returns `/metrics` of an agent on a node without containers.
async fn agent_figures() -> Result<String, Box<dyn std::error::Error>> {
    let dir = tempfile::tempdir()?;
    let mut options = agent::Options::new("namespace".parse()?);
    options.spool_dir = dir.path().join("spool");
    options.state_dir = None;
    options.roots.docker = vec![dir.path().to_owned()];
    options.roots.containerd = Vec::new();
    options.roots.storage = Vec::new();
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0))?;
    let at = listener.local_addr()?;
    options.health = Some(std::sync::Arc::new(listener));
    let cancel = CancellationToken::new();
    let running = tokio::spawn(agent::run(
        options,
        crate::site::empty_queue(),
        cancel.clone(),
    ));
    let begun = std::time::Instant::now();
    loop {
        // The load is measured for a heartbeat.
        let answer = request(at, Who::Anonymous, Method::GET, "/metrics")?;
        let text = answer.send().await?.text().await?;
        if text.contains("{state=\"allowed\"}") || begun.elapsed() > crate::site::PATIENCE {
            cancel.cancel();
            running.await??;
            return Ok(text);
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn alerts_dashboard_and_documents_name_what_is_there() -> Outcomes {
    let (_, text) = figures(None).await?;
    let of_agent = agent_figures().await?;
    let mut series = series(&text);
    series.extend(self::series(&of_agent));
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut wrong = Vec::new();
    for (file, least) in [
        ("deploy/operations.md", 10),
        ("deploy/prometheus/rules.yml", 10),
        ("deploy/prometheus/rules-test.yml", 10),
        ("deploy/grafana-dashboard.json", 20),
        ("docs/service.md", 0),
        ("docs/design.md", 0),
        ("README.md", 0),
    ] {
        let text = fs::read_to_string(root.join(file))?.replace("\\\"", "\"");
        let count = compare(file, &text, &series, &mut wrong);
        assert!(count >= least, "{file} names {count} metrics");
    }
    assert!(wrong.is_empty(), "{}\n{text}", wrong.join("\n"));
    // The comparison itself finds what is wrong.
    let bad =
        "upperdeck_nodes{alive=\"false\"} upperdeck_nodes{state=\"gone\"} upperdeck_x by (nothing)";
    compare("bad", bad, &series, &mut wrong);
    assert_eq!(wrong.len(), 4, "{wrong:?}");
    Ok(())
}

#[tokio::test]
async fn promtool_accepts_metrics_and_rules() -> Outcomes {
    if support::ignored(&[support::Need::Program("promtool")]) {
        return Ok(());
    }
    let (kind, text) = figures(None).await?;
    assert_eq!(kind, CLASSIC);
    promtool(&["check", "metrics"], &text)?;
    promtool(&["check", "metrics"], &agent_figures().await?)?;
    promtool(&["check", "rules", "rules.yml"], "")?;
    promtool(&["test", "rules", "rules-test.yml"], "")
}

#[tokio::test]
async fn open_metrics_are_given_to_who_asks_for_them() -> Outcomes {
    let accept = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2";
    let (kind, text) = figures(Some(accept)).await?;
    assert_eq!(
        kind,
        "application/openmetrics-text; version=1.0.0; charset=utf-8"
    );
    assert!(text.ends_with("# EOF\n"), "{text}");
    assert!(
        text.contains("# TYPE upperdeck_saves_accepted counter\n"),
        "{text}"
    );
    Ok(())
}
