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
