//! Tests of `upperdeck bench` as scripts use it: readable figures, no files left behind, errors with a reason.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

type Outcome = Result<(), Box<dyn std::error::Error>>;

fn command(scratch: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_upperdeck"));
    command
        .arg("bench")
        .arg("--scratch")
        .arg(scratch)
        .args(args);
    command
        .env_remove("SOURCE_DATE_EPOCH")
        .env_remove("UPPERDECK_LOG");
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn empty(dir: &Path) -> std::io::Result<bool> {
    Ok(std::fs::read_dir(dir)?.next().is_none())
}

/// Runs it with JSON output, on a small tree and for a short time.
fn report(scratch: &Path, args: &[&str]) -> Result<Value, Box<dyn std::error::Error>> {
    let short = [
        "--rounds", "2", "--codec", "gzip:1", "--codec", "zstd:1", "--format", "json",
    ];
    let output: Output = command(scratch, &[&short, args].concat()).output()?;
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// Asserts that the fields are numbers above zero.
fn positive(object: &Value, fields: &[&str]) {
    for field in fields {
        let figure = object[field].as_f64();
        assert!(
            figure.is_some_and(|figure| figure > 0.0 && figure.is_finite()),
            "{field}: {object}"
        );
    }
}

fn list<'a>(report: &'a Value, field: &str) -> &'a [Value] {
    report[field].as_array().map_or(&[], Vec::as_slice)
}

#[test]
fn figures_of_a_generated_tree_and_the_tree_is_gone() -> Outcome {
    let scratch = tempfile::tempdir()?;
    let report = report(scratch.path(), &["--size", "4M", "--jobs", "2"])?;
    assert_eq!(
        (&report["version"], &report["rounds"]),
        (&1.into(), &2.into())
    );
    positive(&report["node"], &["cores", "jobs"]);
    assert_eq!(report["node"]["jobs"], 2);
    let subject = &report["subject"];
    assert_eq!(
        (&subject["kind"], &subject["name"]),
        (&"generated".into(), &"tree".into())
    );
    positive(subject, &["entries", "tar_bytes", "sample_bytes"]);
    assert!(subject["tar_bytes"].as_u64() > Some(4 << 20), "{subject}");

    let stages: Vec<_> = list(&report, "stages")
        .iter()
        .map(|s| (s["stage"].as_str(), s["threads"].as_u64()))
        .collect();
    let expected = [
        ("scan", 2),
        ("plan", 1),
        ("read_first", 2),
        ("read", 1),
        ("read", 2),
        ("sha256", 1),
        ("make", 2),
        ("write_file", 1),
    ];
    assert_eq!(
        stages,
        expected.map(|(stage, threads)| (Some(stage), Some(threads)))
    );
    for stage in list(&report, "stages") {
        positive(
            stage,
            &[
                "threads",
                "seconds",
                "cpu_seconds",
                "bytes",
                "mb_per_second",
            ],
        );
        let of_entries = ["scan", "plan"].contains(&stage["stage"].as_str().unwrap_or_default());
        assert_eq!(
            stage["entries_per_second"].as_f64().is_some(),
            of_entries,
            "{stage}"
        );
    }

    // The two that were requested, and the one that saves use.
    let codecs: Vec<_> = list(&report, "codecs")
        .iter()
        .map(|c| format!("{}:{}", c["compression"], c["level"]))
        .collect();
    assert_eq!(codecs, ["\"gzip\":1", "\"gzip\":2", "\"zstd\":1"]);
    for codec in list(&report, "codecs") {
        positive(codec, &["ratio"]);
        assert!(codec["ratio"].as_f64() < Some(0.6), "{codec}");
        assert_eq!(list(codec, "by_threads").len(), 2);
        for by in list(codec, "by_threads") {
            positive(by, &["threads", "mb_per_second", "cpu_seconds_per_gb"]);
        }
    }

    let to: Vec<_> = list(&report, "saves")
        .iter()
        .map(|s| s["to"].as_str())
        .collect();
    assert_eq!(to, [Some("nothing"), Some("file")]);
    for save in list(&report, "saves") {
        positive(
            save,
            &[
                "jobs",
                "layers",
                "seconds",
                "cpu_seconds",
                "sent_bytes",
                "mb_per_second",
                "limit_percent",
                "level",
            ],
        );
        assert_eq!(save["compression"], "gzip");
        positive(
            &save["costs"],
            &[
                "scan",
                "plan",
                "read",
                "checksum",
                "compress",
                "hash_tar",
                "hash_compressed",
            ],
        );
        assert!(
            save["costs"]["registry"].as_f64() == Some(0.0) && save["costs"]["hand_on"].is_number(),
            "{save}"
        );
        assert!(save["costs"]["hand_on_wall"].is_number(), "{save}");
        positive(
            &save["limit"],
            &["seconds", "before", "cores", "jobs", "sha256"],
        );
        assert!(save["limit"]["destination"].is_number(), "{save}");
        let bound = save["limit"]["bound_by"].as_str().unwrap_or_default();
        assert!(
            ["cores", "jobs", "sha256", "destination"].contains(&bound),
            "{save}"
        );
        let (limit, took) = (save["limit"]["seconds"].as_f64(), save["seconds"].as_f64());
        let percent = limit.zip(took).map(|(limit, took)| 100.0 * limit / took);
        assert_eq!(
            percent.map(f64::round),
            save["limit_percent"].as_f64().map(f64::round)
        );
    }

    assert!(!list(&report, "advice").is_empty());
    for advice in list(&report, "advice") {
        positive(advice, &["limit_seconds", "sent_bytes"]);
        assert!(
            advice["why"].as_str().is_some_and(|why| !why.is_empty()),
            "{advice}"
        );
        let words: Vec<&str> = list(advice, "flags")
            .iter()
            .filter_map(Value::as_str)
            .collect();
        // The program accepts the recommended options.
        let taken = Command::new(env!("CARGO_BIN_EXE_upperdeck"))
            .arg("commit")
            .args(&words)
            .args(["--host-root", "/nonexistent", "web", "oci:/nonexistent/x"])
            .output()?;
        assert_ne!(
            taken.status.code(),
            Some(2),
            "{words:?}: {}",
            text(&taken.stderr)
        );
    }
    assert!(
        list(&report, "notes").iter().all(Value::is_string) && list(&report, "notes").len() >= 3
    );
    assert!(empty(scratch.path())?, "something is left behind");

    // The help documents every field.
    let help = text(&command(scratch.path(), &["--help"]).output()?.stdout);
    let mut undocumented = Vec::new();
    let mut todo = vec![&report];
    while let Some(value) = todo.pop() {
        match value {
            Value::Object(fields) => {
                undocumented.extend(fields.keys().filter(|field| !help.contains(field.as_str())));
                todo.extend(fields.values());
            }
            Value::Array(values) => todo.extend(values),
            _ => {}
        }
    }
    assert!(undocumented.is_empty(), "{undocumented:?}");
    Ok(())
}

#[test]
fn a_table_of_a_directory_that_stays_as_it_is() -> Outcome {
    let scratch = tempfile::tempdir()?;
    let dir = tempfile::tempdir()?;
    std::fs::write(dir.path().join("a"), vec![b'a'; 3 << 20])?;
    let name = dir.path().to_str().ok_or("not UTF-8")?;
    let args = [
        "--directory",
        name,
        "--rounds",
        "1",
        "--codec",
        "zstd:1",
        "--compression",
        "zstd",
    ];
    let output = command(scratch.path(), &args).output()?;
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let table = text(&output.stdout);
    for part in [
        "STAGE ALONE",
        "scan",
        "SHA-256",
        "WHOLE SAVE TO",
        "zstd 1",
        "REACHED",
        "--compression zstd",
        name,
    ] {
        assert!(table.contains(part), "{part} is not in:\n{table}");
    }
    assert!(empty(scratch.path())? && dir.path().join("a").is_file());
    Ok(())
}

#[test]
fn the_tree_is_the_same_every_time() -> Outcome {
    use tokio_util::sync::CancellationToken;
    use upperdeck::bench::stages::{self, SaveOptions, Setting, Sink, Source};
    use upperdeck::bench::tree::Tree;
    let (scratch, cancel) = (tempfile::tempdir()?, CancellationToken::new());
    let rules = upperdeck::save::Rules::default();
    let how = SaveOptions {
        rules: &rules,
        setting: Setting {
            codec: upperdeck::layer::Compression::None,
            level: 0,
        },
        jobs: 2,
        timestamp: None,
        layer_size: None,
    };
    let mut diff_ids = Vec::new();
    for _ in 0..2 {
        let tree = Tree::generate(scratch.path(), 3 << 20, &cancel, &|_| ())?;
        let source = Source::Directory(tree.path().to_owned());
        let saved = stages::save(&source, how, &Sink::Nothing, &cancel)?;
        let layer = &saved.layers[0];
        assert!(layer.entries > 100, "{layer:?}");
        diff_ids.push(layer.diff_id);
        tree.remove()?;
    }
    assert_eq!(diff_ids[0], diff_ids[1]);
    assert!(empty(scratch.path())?);
    Ok(())
}

#[test]
fn what_cannot_be_measured_is_said() -> Outcome {
    let scratch = tempfile::tempdir()?;
    let nothing = tempfile::tempdir()?;
    let path = nothing.path().to_str().ok_or("not UTF-8")?;
    let cases: [(&[&str], i32, &str); 4] = [
        (
            &["--host-root", path, "no-such-container"],
            66,
            "no-such-container",
        ),
        (&["--directory", "/nonexistent/dir"], 1, "/nonexistent/dir"),
        (
            &["--directory", path],
            1,
            "contains nothing that goes into a layer",
        ),
        (
            &[
                "--size",
                "1M",
                "--registry",
                "127.0.0.1:1/x",
                "--tls-verify=false",
            ],
            75,
            "127.0.0.1:1",
        ),
    ];
    for (args, exit, part) in cases {
        let output = command(scratch.path(), args).output()?;
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(exit), "{args:?}: {said}");
        assert!(said.contains(part), "{args:?}: {said}");
        assert_eq!(text(&output.stdout), "");
        assert!(empty(scratch.path())?, "{args:?} leaves something behind");
    }
    let nowhere = command(Path::new("/nonexistent/scratch"), &["--size", "1M"]).output()?;
    assert_eq!(nowhere.status.code(), Some(1));
    assert!(
        text(&nowhere.stderr).contains("--scratch"),
        "{}",
        text(&nowhere.stderr)
    );
    Ok(())
}

#[test]
fn an_interrupt_takes_the_tree_with_it() -> Outcome {
    let scratch = tempfile::tempdir()?;
    let mut child = command(scratch.path(), &["--size", "16M", "--rounds", "500"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let deadline = Instant::now() + Duration::from_secs(60);
    while empty(scratch.path())? {
        assert!(
            Instant::now() < deadline && child.try_wait()?.is_none(),
            "no tree was made"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id())?);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT)?;
    assert_eq!(child.wait()?.code(), Some(130));
    assert!(empty(scratch.path())?, "the tree is still there");
    Ok(())
}
