//! `commit --gate-fd`: the tag is set only after the parent process has confirmed it.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use crate::node::{Node, UPPERDECK};

#[tokio::test(flavor = "multi_thread")]
async fn the_tag_waits_for_the_answer() -> Result<()> {
    let Some(node) = Node::new().await? else {
        return Ok(());
    };
    for (name, answer, code) in [
        ("yes", Some("y"), 0),
        ("no", Some("n"), 130),
        ("gone", None, 130),
    ] {
        let layout = node.path(name);
        let mut child = Command::new(UPPERDECK)
            .args(["commit", "--progress=json", "--gate-fd=0", "--state-dir="])
            .arg(format!("--base=oci:{}:base", node.path("base").display()))
            .arg(format!("pid:{}", node.pid))
            .arg(format!("oci:{}:monday", layout.display()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let mut lines = BufReader::new(child.stdout.take().context("stdout")?).lines();
        let mut seen = Vec::new();
        loop {
            let line = lines
                .next()
                .with_context(|| format!("{name}: it ended after {seen:?}"))??;
            let event: serde_json::Value = serde_json::from_str(&line)?;
            if event["event"] == "ready" {
                break;
            }
            seen.push(line);
        }
        let index = || std::fs::read_to_string(layout.join("index.json")).unwrap_or_default();
        ensure!(
            !index().contains("monday"),
            "{name}: tagged before anybody answered"
        );
        ensure!(child.try_wait()?.is_none(), "{name}: it does not wait");
        let mut gate = child.stdin.take().context("stdin")?;
        if let Some(answer) = answer {
            gate.write_all(answer.as_bytes())?;
        }
        drop(gate);
        let rest: Vec<String> = lines.collect::<Result<_, _>>()?;
        let last: serde_json::Value = serde_json::from_str(rest.last().context("no last line")?)?;
        assert_eq!(child.wait()?.code(), Some(code), "{name}: {last}");
        assert_eq!(index().contains("monday"), code == 0, "{name}");
        assert_eq!(last["event"], if code == 0 { "saved" } else { "failed" });
    }
    Ok(())
}

/// The tag is taken only from the image that the answer was about.
#[tokio::test(flavor = "multi_thread")]
async fn a_tag_that_moves_while_the_answer_is_awaited_is_left_alone() -> Result<()> {
    let Some(node) = Node::new().await? else {
        return Ok(());
    };
    let layout = node.path("moves");
    let index = layout.join("index.json");
    let commit = || {
        let mut command = Command::new(UPPERDECK);
        command
            .args(["commit", "--progress=json", "--state-dir="])
            .arg(format!("--base=oci:{}:base", node.path("base").display()))
            .arg(format!(
                "--message={}",
                upperdeck::service::job::JobId::new()
            ));
        command
    };
    let to = |command: &mut Command, tag: &str| {
        command
            .arg(format!("pid:{}", node.pid))
            .arg(format!("oci:{}:{tag}", layout.display()));
    };
    let save = |tag: &str| -> Result<String> {
        let mut command = commit();
        to(&mut command, tag);
        let output = command.stdin(Stdio::null()).output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(output.status.success(), "{text}");
        let last: serde_json::Value = serde_json::from_str(text.lines().last().context("line")?)?;
        Ok(last["digest"].as_str().context("digest")?.to_owned())
    };
    for (case, moves) in [("stays", false), ("moves", true)] {
        let first = save("monday")?;
        let mut command = commit();
        command.arg("--gate-fd=0");
        to(&mut command, "monday");
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let mut lines = BufReader::new(child.stdout.take().context("stdout")?).lines();
        let ready = loop {
            let line = lines.next().context(case)??;
            let event: serde_json::Value = serde_json::from_str(&line)?;
            if event["event"] == "ready" {
                break event;
            }
        };
        assert_eq!(ready["replaces"], first, "{case}");
        let expected = if moves { Some(save("monday")?) } else { None };
        child.stdin.take().context("stdin")?.write_all(b"y")?;
        let rest: Vec<String> = lines.collect::<Result<_, _>>()?;
        let last: serde_json::Value = serde_json::from_str(rest.last().context("no last line")?)?;
        let code = child.wait()?.code();
        let now = std::fs::read_to_string(&index)?;
        match expected {
            None => assert_eq!(code, Some(0), "{case}: {last}"),
            Some(moved) => {
                assert_eq!(code, Some(75), "{case}: {last}");
                assert_eq!(
                    (&last["code"], &last["retryable"]),
                    (&"tag_exists".into(), &true.into())
                );
                ensure!(now.contains(&moved), "{now}");
            }
        }
    }
    Ok(())
}
