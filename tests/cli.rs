//! Tests of the command line as scripts and users meet it: exit codes, streams, help, manual pages.

use std::io::Write;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

type Outcome = Result<(), Box<dyn std::error::Error>>;

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_upperdeck"));
    command
        .args(args)
        .env_remove("SOURCE_DATE_EPOCH")
        .env("NO_COLOR", "1");
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("UPPERDECK_") {
            command.env_remove(name);
        }
    }
    command
}

fn upperdeck(args: &[&str]) -> std::io::Result<Output> {
    command(args).output()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn usage_errors_exit_2_and_leave_stdout_alone() -> Outcome {
    let cases: &[&[&str]] = &[
        &[],
        &["no-such-verb"],
        &["commit"],
        &["commit", "web"],
        &["commit", "--max-layers", "0", "web", "oci:x"],
        &["commit", "--label", "novalue", "web", "oci:x"],
        &["commit", "--annotation", "=x", "web", "oci:x"],
        &["commit", "--jobs", "0", "web", "oci:x"],
        &["commit", "--compression-level", "10", "web", "oci:x"],
        &[
            "commit",
            "--compression",
            "none",
            "--compression-level",
            "1",
            "web",
            "oci:x",
        ],
        &[
            "commit",
            "--compression",
            "zstd",
            "--compression-level",
            "20",
            "web",
            "oci:x",
        ],
        &["commit", "--max-pause", "10", "web", "oci:x"],
        &["commit", "--max-size", "1.5G", "web", "oci:x"],
        &["commit", "--timestamp", "2020-01-01", "web", "oci:x"],
        &["commit", "--quiet", "--progress", "bar", "web", "oci:x"],
        &[
            "commit",
            "--creds",
            "a:b",
            "--creds-file",
            "f",
            "web",
            "oci:x",
        ],
        &["commit", "--creds", "nocolon", "web", "oci:x"],
        &["commit", "--creds", ":nouser", "web", "oci:x"],
        &["commit", "--tls-verify=maybe", "web", "oci:x"],
        // Reported before the container is looked up, which does not exist.
        &["commit", "-c", "CMDD x", "web", "oci:x"],
        &[
            "commit",
            "-c",
            "HEALTHCHECK --often=1s CMD x",
            "web",
            "oci:x",
        ],
        &["commit", "-c", "EXPOSE eighty", "web", "oci:x"],
        &["commit", "--exclude", "[", "web", "oci:x"],
        &["commit", "--timestamp", "999999999999", "web", "oci:x"],
        &["commit", "--base", "No Image", "pid:1", "oci:x"],
        &["commit", "web", "HOST/UPPER:tag"],
        &["inspect"],
        &["ps", "--format", "xml"],
        &["ps", "--log", "upperdeck=loudly"],
        &["layer", "--upper", "/x"],
        &["validate", "x"],
        &["validate", "x", "--against", "y", "--write", "z"],
        &["validate", "x", "--against", "y", "--tree"],
        &["validate", "x", "--write", "-", "--texts", "2M"],
        &["bench", "--rounds", "0"],
        &["bench", "--size", "0"],
        &["bench", "--size", "many"],
        &["bench", "--codec", "gzip"],
        &["bench", "--codec", "gzip:10"],
        &["bench", "--codec", "lzma:1"],
        &["bench", "--compression-level", "10"],
        &["bench", "--directory", "/x", "web"],
        &["bench", "--size", "8M", "web"],
        &["bench", "--registry", "oci:/x"],
        &["bench", "--registry", "no host"],
        &["completions", "cmd.exe"],
        &["man", "/dev/null"],
        // Features that do not exist yet are not offered.
        &["manager"],
        &["commit", "--include-volume", "home", "web", "oci:x"],
    ];
    for args in cases {
        let output = upperdeck(args)?;
        assert_eq!(
            output.status.code(),
            Some(2),
            "{args:?}: {}",
            text(&output.stderr)
        );
        assert_eq!(text(&output.stdout), "", "{args:?}");
        assert!(!output.stderr.is_empty(), "{args:?}");
    }
    Ok(())
}

#[test]
fn settings_of_autosaves_out_of_bounds_are_errors_at_start() -> Outcome {
    let manager = |more: &[&str]| -> Result<Output, std::io::Error> {
        let target = "h.example/p/{user}/{name}:{tag}";
        let all = ["manager", "--listen", "127.0.0.1:0", "--target", target];
        upperdeck(&[&all[..], more].concat())
    };
    for (flags, says) in [
        (&["--autosave", "30d"][..], "0, or 1s to 7d"),
        (&["--autosave", "10ms"], "0, or 1s to 7d"),
        (&["--autosave-min", "30d"], "1s to 7d"),
        (&["--autosave-min", "0"], "1s to 7d"),
        (&["--autosave", "1m"], "--autosave-min"),
        (&["--autosave-keep", "0"], "1..=100"),
        (&["--autosave-keep", "101"], "1..=100"),
        (&["--reserved-tag", "auto*"], "auto-"),
        (&["--reserved-tag", "auto-2026"], "auto-"),
        (&["--reserved-tag", "a*b"], "1 to 128"),
        (&["--reserved-tag=-x"], "1 to 128"),
        (&["--reserved-tag", "*"], "1 to 128"),
    ] {
        let output = manager(flags)?;
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{flags:?}: {stderr}");
        assert!(stderr.contains(says), "{flags:?}: {stderr}");
    }
    let output = upperdeck(&["agent", "--save-ended", "sometimes"])?;
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("never, failure, always"));
    // In a file, too.
    let mut file = tempfile::NamedTempFile::new()?;
    writeln!(file, "[manager]\nautosave = \"30d\"")?;
    let path = file.path().to_string_lossy().into_owned();
    let output = manager(&["--config", &path])?;
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("1s to 7d"), "{stderr}");
    Ok(())
}

#[test]
fn a_time_from_the_environment_is_checked_too() -> Outcome {
    let output = command(&["commit", "web", "oci:x"])
        .env("SOURCE_DATE_EPOCH", "yesterday")
        .output()?;
    assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
    assert!(
        text(&output.stderr).contains("SECONDS"),
        "{}",
        text(&output.stderr)
    );
    Ok(())
}

#[test]
fn the_last_json_line_says_how_it_failed() -> Outcome {
    let output = upperdeck(&[
        "commit",
        "--progress",
        "json",
        "--creds",
        "hunter2",
        "web",
        "localhost:1/x",
    ])?;
    assert_eq!(output.status.code(), Some(2));
    let stdout = text(&output.stdout);
    let last: Value = serde_json::from_str(stdout.lines().last().unwrap_or_default())?;
    assert_eq!(
        (&last["version"], &last["event"], &last["exit"]),
        (&1.into(), &"failed".into(), &2.into())
    );
    assert_eq!(
        (&last["code"], &last["retryable"]),
        (&"usage".into(), &false.into())
    );
    assert!(
        last["time"]
            .as_str()
            .is_some_and(|time| time.ends_with('Z') && time.contains('T')),
        "{last}"
    );
    // The given text may be the password alone.
    assert!(!stdout.contains("hunter2") && !text(&output.stderr).contains("hunter2"));
    Ok(())
}

#[test]
fn credentials_come_from_a_file_or_a_descriptor() -> Outcome {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("creds");
    let run = |args: &[&str], stdin: &[u8]| -> Result<Output, Box<dyn std::error::Error>> {
        let mut child = command(&[&["commit"], args, &["web", "oci:/nonexistent/x"]].concat())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        child.stdin.take().ok_or("no stdin")?.write_all(stdin)?;
        Ok(child.wait_with_output()?)
    };
    let path = file.to_str().ok_or("not UTF-8")?;
    for (content, usage_error) in [
        ("robot$x+y:s3cret\n", false),
        ("a:b:c\r\nsecond line", false),
        ("nocolon\n", true),
        ("", true),
    ] {
        std::fs::write(&file, content)?;
        for (args, stdin) in [(["--creds-file", path], ""), (["--creds-fd", "0"], content)] {
            let output = run(&args, stdin.as_bytes())?;
            assert_eq!(
                output.status.code() == Some(2),
                usage_error,
                "{content:?} {args:?}: {}",
                text(&output.stderr)
            );
        }
    }
    let output = run(&["--creds-file", "/nonexistent"], b"")?;
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text(&output.stderr).contains("cannot read credentials from /nonexistent"),
        "{}",
        text(&output.stderr)
    );
    // A path whose content never ends.
    let output = run(&["--creds-file", "/dev/zero"], b"")?;
    assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
    Ok(())
}

/// A FIFO (or a device such as `/dev/null`) is written to and never replaced by a file.
#[test]
fn a_layer_goes_into_a_fifo() -> Outcome {
    let dir = tempfile::tempdir()?;
    let upper = dir.path().join("upper");
    std::fs::create_dir(&upper)?;
    std::fs::write(upper.join("file"), "content")?;
    let fifo = dir.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU)?;
    let reader = std::thread::spawn({
        let fifo = fifo.clone();
        move || std::fs::read(fifo)
    });
    let made = upperdeck(&[
        "layer",
        "--userxattr",
        "--compression",
        "none",
        "--upper",
        &upper.to_string_lossy(),
        "-o",
        &fifo.to_string_lossy(),
    ])?;
    assert_eq!(made.status.code(), Some(0), "{}", text(&made.stderr));
    let tar = reader.join().map_err(|_| "the reader died")??;
    assert_eq!(tar.len(), 512 + 512 + 1024);
    assert!(!std::fs::symlink_metadata(&fifo)?.is_file());
    Ok(())
}

#[test]
fn a_specification_is_written_and_a_changed_text_is_shown() -> Outcome {
    let dir = tempfile::tempdir()?;
    let at = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
    let upper = at("upper");
    std::fs::create_dir(&upper)?;
    let (layer, spec) = (at("layer.tar.gz"), at("spec"));
    let make = |motd: &str| -> Outcome {
        std::fs::write(dir.path().join("upper/motd"), motd)?;
        let made = upperdeck(&["layer", "--userxattr", "--upper", &upper, "-o", &layer])?;
        assert_eq!(made.status.code(), Some(0), "{}", text(&made.stderr));
        Ok(())
    };
    make("Welcome\nto Monday\n")?;
    let written = upperdeck(&["validate", &layer, "--write", &spec])?;
    assert_eq!(written.status.code(), Some(0), "{}", text(&written.stderr));
    assert_eq!(text(&written.stdout), "");
    let said = std::fs::read_to_string(&spec)?;
    assert!(
        said.contains("motd ") && said.contains(" content=Welcome\\012to\\040Monday\\012"),
        "{said}"
    );
    let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(&spec)?);
    assert_eq!(mode & 0o777, 0o600);
    let printed = upperdeck(&["validate", &layer, "--write", "-"])?;
    assert_eq!(text(&printed.stdout), said);
    let digests = upperdeck(&["validate", &layer, "--write", "-", "--texts", "0"])?;
    assert!(text(&digests.stdout).contains(" size=18 sha256="));
    let same = upperdeck(&["validate", &layer, "--against", &spec])?;
    assert_eq!(same.status.code(), Some(0), "{}", text(&same.stdout));

    make("Welcome\nto \u{1b}[31mTuesday\n")?;
    let other = upperdeck(&["validate", &layer, "--against", &spec])?;
    assert_eq!(other.status.code(), Some(1));
    let shown = text(&other.stdout);
    let diff = "motd: content:\n--- expected\n+++ found\n@@ -1,2 +1,2 @@\n Welcome\n-to Monday\n\
                +to \\u{1b}[31mTuesday\n";
    assert!(shown.contains(diff), "{shown}");
    let json = upperdeck(&["validate", &layer, "--against", &spec, "--format", "json"])?;
    let json: Value = serde_json::from_slice(&json.stdout)?;
    let found = json["differences"].as_array().ok_or("no list")?;
    let content = found
        .iter()
        .find(|found| found["field"] == "content")
        .ok_or("no content")?;
    assert!(content["diff"].is_string(), "{json}");
    let size = found.iter().find(|found| found["field"] == "size");
    assert!(
        size.is_some_and(|found| found.get("diff").is_none()),
        "{json}"
    );
    Ok(())
}

#[test]
fn help_teaches() -> Outcome {
    let long = upperdeck(&["--help"])?;
    assert_eq!(long.status.code(), Some(0));
    let help = text(&long.stdout);
    for part in [
        "Examples:",
        "NAMESPACE/POD[/CONTAINER]",
        "pid:N is any process on an overlay",
        "Use it only for trusted processes",
        "Exit codes:",
        "  69   base image",
        "  130  cancelled",
        "UPPERDECK_HOST_ROOT",
        "SOURCE_DATE_EPOCH",
    ] {
        assert!(help.contains(part), "{part} is not in:\n{help}");
    }
    for verb in [
        "ps",
        "inspect",
        "diff",
        "commit",
        "layer",
        "validate",
        "bench",
        "job",
        "up",
        "manager",
        "agent",
        "demo",
        "completions",
        "man",
    ] {
        assert!(
            help.contains(&format!("\n  {verb} ")),
            "{verb} is not in:\n{help}"
        );
    }
    let help = text(&upperdeck(&["commit", "--help"])?.stdout);
    for part in [
        "[docker://]HOST[:PORT]/REPOSITORY[:TAG]",
        "oci-archive:FILE",
        "HEALTHCHECK",
        "--creds-fd",
        "visible to other users of this machine",
        "base_progress",
        "\"version\":1",
        "Exit codes:",
        "--max-pause",
        "--include-caches",
        "--cert-dir",
    ] {
        assert!(help.contains(part), "{part} is not in:\n{help}");
    }
    let short = text(&upperdeck(&["commit", "-h"])?.stdout);
    assert!(
        short.lines().count() < help.lines().count(),
        "-h is the short one"
    );
    let version = text(&upperdeck(&["--version"])?.stdout);
    assert_eq!(
        version,
        format!("upperdeck {}\n", env!("CARGO_PKG_VERSION"))
    );
    Ok(())
}

/// A command that is broken by the terminal cannot be copied.
#[test]
fn examples_fit_into_80_columns() -> Outcome {
    let verbs = "ps inspect diff commit layer validate bench doctor up manager agent key demo completions man";
    let groups = [
        "image ls",
        "image rm",
        "image prune",
        "image cp",
        "image diff",
        "image squash",
        "job submit",
        "job status",
        "job watch",
        "job cancel",
        "job hurry",
        "job ls",
        "job timeline",
        "job",
    ];
    let mut seen = 0;
    for verb in verbs.split(' ').chain(groups) {
        let args: Vec<&str> = verb.split(' ').chain(["--help"]).collect();
        let help = text(&upperdeck(&args)?.stdout);
        let Some(at) = help.find("Examples:\n") else {
            continue;
        };
        for line in help[at..]
            .lines()
            .skip(1)
            .take_while(|line| !line.is_empty())
        {
            seen += 1;
            assert!(line.chars().count() <= 80, "{verb}: {line}");
        }
    }
    assert!(seen > 40, "{seen} lines of examples");
    Ok(())
}

#[test]
fn help_is_the_same_whatever_is_in_the_environment() -> Outcome {
    let plain = upperdeck(&["commit", "--help"])?.stdout;
    let set = command(&["commit", "--help"])
        .env("UPPERDECK_HOST_ROOT", "/secret")
        .env("SOURCE_DATE_EPOCH", "17")
        .output()?;
    assert_eq!(text(&plain), text(&set.stdout));
    Ok(())
}

#[test]
fn completions_for_every_shell() -> Outcome {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let output = upperdeck(&["completions", shell])?;
        assert_eq!(output.status.code(), Some(0));
        assert!(text(&output.stdout).contains("metadata-file"), "{shell}");
    }
    Ok(())
}

#[test]
fn a_man_page_for_every_verb() -> Outcome {
    let dir = tempfile::tempdir()?;
    // A minimal system has no /usr/local/share/man.
    let dir = dir.path().join("share/man/man1");
    let output = upperdeck(&["man", dir.to_str().ok_or("not UTF-8")?])?;
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    for page in [
        "upperdeck",
        "upperdeck-ps",
        "upperdeck-commit",
        "upperdeck-validate",
    ] {
        let page = std::fs::read_to_string(dir.join(format!("{page}.1")))?;
        assert!(page.contains(".TH"), "{page}");
    }
    assert!(text(&upperdeck(&["man"])?.stdout).contains(".TH upperdeck 1"));
    Ok(())
}

#[test]
fn a_reader_that_goes_away_is_no_failure() -> Outcome {
    let mut child = command(&["completions", "bash"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    drop(child.stdout.take());
    let output = child.wait_with_output()?;
    assert_eq!(
        (output.status.code(), text(&output.stderr)),
        (Some(0), String::new())
    );
    Ok(())
}

#[test]
fn the_documentation_says_what_the_program_does() -> Outcome {
    let documents = [
        include_str!("../README.md"),
        include_str!("../docs/programs.md"),
        include_str!("../docs/registries.md"),
        include_str!("../docs/saving.md"),
        include_str!("../docs/service.md"),
        include_str!("../docs/validate.md"),
    ]
    .concat();
    let help = text(&upperdeck(&["--help"])?.stdout);
    let table = documents
        .split("| exit | meaning |")
        .nth(1)
        .ok_or("no table of exit codes")?;
    let rows = table
        .lines()
        .skip(2)
        .take_while(|line| line.starts_with('|'));
    let mut codes = Vec::new();
    for row in rows {
        let mut cells = row.split('|').map(str::trim).skip(1);
        let (code, meaning) = (
            cells.next().unwrap_or_default(),
            cells.next().unwrap_or_default(),
        );
        // The first words are those of the help.
        let words = meaning.split(['(', ':']).next().unwrap_or_default().trim();
        assert!(
            help.contains(&format!("  {code:<4} {words}")),
            "{row} is not in:\n{help}"
        );
        codes.push(code);
    }
    assert_eq!(codes, ["0", "1", "2", "66", "69", "75", "77", "130"]);
    // Every flag that they name exists.
    let commit = text(&upperdeck(&["commit", "--help"])?.stdout);
    let layer = text(&upperdeck(&["layer", "--help"])?.stdout);
    let validate = text(&upperdeck(&["validate", "--help"])?.stdout);
    let inspect = text(&upperdeck(&["inspect", "--help"])?.stdout);
    let ps = text(&upperdeck(&["ps", "--help"])?.stdout);
    let bench = text(&upperdeck(&["bench", "--help"])?.stdout);
    let list = text(&upperdeck(&["image", "ls", "--help"])?.stdout);
    let remove = text(&upperdeck(&["image", "rm", "--help"])?.stdout);
    let prune = text(&upperdeck(&["image", "prune", "--help"])?.stdout);
    let submit = text(&upperdeck(&["job", "submit", "--help"])?.stdout);
    let autosave = text(&upperdeck(&["job", "autosave", "--help"])?.stdout);
    let manager = text(&upperdeck(&["manager", "--help"])?.stdout);
    let agent = text(&upperdeck(&["agent", "--help"])?.stdout);
    let up = text(&upperdeck(&["up", "--help"])?.stdout);
    let doctor = text(&upperdeck(&["doctor", "--help"])?.stdout);
    let setup = text(&upperdeck(&["setup", "--help"])?.stdout);
    let kubectl = text(&upperdeck(&["kubectl", "save", "--help"])?.stdout);
    for flag in documents
        .split(|c: char| !(c.is_ascii_lowercase() || c == '-'))
        .filter(|word| word.starts_with("--") && word.len() > 3)
    {
        let foreign = [
            "--release",
            "--no-default-features",
            "--path",
            "--now",
            "--profile",
            "--uidmap",
        ]
        .contains(&flag);
        assert!(
            foreign
                || [
                    &help, &commit, &layer, &validate, &inspect, &ps, &bench, &list, &remove,
                    &prune, &submit, &autosave, &manager, &agent, &up, &doctor, &setup, &kubectl,
                ]
                .iter()
                .any(|text| text.contains(flag)),
            "{flag}"
        );
    }
    Ok(())
}

#[test]
fn settings_come_from_flags_then_the_environment_then_a_file() -> Outcome {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("upperdeck.toml");
    std::fs::write(
        &file,
        "redis = \"redis://us:secret@r.example.org\"\n\
         slots = 2\n\
         [agent]\n\
         slots = 3\n\
         min_threads = 2\n\
         drain = \"1m\"\n\
         allow = [\"a.example.org\", \"oci:/srv\"]\n\
         foreground = true\n\
         [manager]\n\
         listen = \"127.0.0.1:1\"\n",
    )?;
    let file = file.to_str().ok_or("not UTF-8")?;
    let output = command(&["agent", "--config", file, "--drain", "3m", "--print-config"])
        .env("UPPERDECK_DRAIN", "2m")
        .env("UPPERDECK_MIN_THREADS", "4")
        .output()?;
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let printed = text(&output.stdout);
    let settings: toml::Table = printed.parse()?;
    let agent = settings["agent"].as_table().ok_or("no table")?;
    for (key, expected) in [
        ("redis", toml::Value::from("redis://us:***@r.example.org")),
        ("slots", 3.into()),
        ("min_threads", 4.into()),
        ("drain", "3m".into()),
        ("foreground", true.into()),
        ("max_time", "12h".into()),
        (
            "allow",
            toml::Value::from(vec!["a.example.org", "oci:/srv"]),
        ),
    ] {
        assert_eq!(agent.get(key), Some(&expected), "{key} in:\n{printed}");
    }
    assert!(printed.contains("drain = \"3m\"    # command line\n"));
    assert!(printed.contains("min_threads = 4    # environment\n"));
    assert!(printed.contains("max_time = \"12h\"    # default\n"));
    assert!(!printed.contains("secret"), "{printed}");
    Ok(())
}

#[test]
fn a_settings_file_that_is_wrong_is_told_by_file_and_key() -> Outcome {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("upperdeck.toml");
    for (content, expected) in [
        (
            "[agent]\nslotz = 1\n",
            "agent.slotz: no such key; is slots meant?",
        ),
        (
            "nothing_like_it_at_all = 1\n",
            "nothing_like_it_at_all: no such key",
        ),
        ("[manager]\nslots = 1\n", "manager.slots: no such key"),
        (
            "[agent]\nslots = \"many\"\n",
            "agent.slots: invalid value 'many'",
        ),
        (
            "[agent]\nslots = [1, 2]\n",
            "agent.slots: expected one value",
        ),
        (
            "[agent]\nforeground = 1\n",
            "agent.foreground: expected true or false",
        ),
        (
            "[agent]\nowner = {a = 1}\n",
            "agent.owner: expected a string",
        ),
        ("[agnet]\nslots = 1\n", "[agnet]: no such table"),
        ("[agent]\nconfig = \"x\"\n", "agent.config: no such key"),
        ("a = 1\n[agent\n", "line 2: "),
    ] {
        std::fs::write(&file, content)?;
        let output = upperdeck(&["agent", "--config", file.to_str().ok_or("not UTF-8")?])?;
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{content}: {said}");
        assert!(
            said.contains(&format!("upperdeck.toml: {expected}")),
            "{content}: {said}"
        );
    }
    let output = upperdeck(&["agent", "--config", "/nowhere/x.toml"])?;
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("/nowhere/x.toml: No such file"));
    Ok(())
}

#[test]
fn what_the_service_cannot_do_without_is_named() -> Outcome {
    for (args, expected) in [
        (
            &["agent"][..],
            "--owner, UPPERDECK_OWNER or owner in the settings file",
        ),
        (
            &["agent", "--owner", "namespace"],
            "--allow, UPPERDECK_ALLOW or allow in the settings file",
        ),
        (
            &["agent", "--owner", "namespace", "--allow", "a.example.org"],
            "--redis, UPPERDECK_REDIS or redis in the settings file",
        ),
        (
            &["agent", "--owner", "user", "--allow", "a.example.org"],
            "--owner user: ",
        ),
        (
            &["job", "ls", "--up-dir", "/nowhere"],
            "no manager is named (--server, UPPERDECK_SERVER), and no 'upperdeck up' runs here",
        ),
        (
            &["job", "ls", "--server", "ftp://x"],
            "--server: not a web address",
        ),
    ] {
        let output = upperdeck(args)?;
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {said}");
        assert!(said.contains(expected), "{args:?}: {said}");
    }
    let output = upperdeck(&["job", "ls", "--server", "http://127.0.0.1:9/?token=secret"])?;
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(75), "{said}");
    assert!(
        said.contains("http://127.0.0.1:9/ cannot be reached"),
        "{said}"
    );
    assert!(!said.contains("secret"), "{said}");
    Ok(())
}

#[test]
fn the_settings_that_we_hand_out_are_understood() -> Outcome {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/upperdeck.toml");
    for verb in ["manager", "agent"] {
        let output = upperdeck(&[verb, "--config", file, "--print-config"])?;
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        let printed = text(&output.stdout);
        assert!(printed.contains("running_per_user = 2    # /"), "{printed}");
    }
    // systemd refuses openat2 to a unit with this setting, as it cannot look into the call's arguments.
    let agent = include_str!("../deploy/upperdeck-agent.service");
    let restricted = |line: &str| line.starts_with("RestrictSUIDSGID");
    assert!(!agent.lines().any(restricted));
    // Every flag in the units and in the compose file exists.
    let help = ["manager", "agent"].map(|verb| upperdeck(&[verb, "--help"]));
    let help: String = help
        .into_iter()
        .map(|output| output.map(|output| text(&output.stdout)))
        .collect::<Result<_, _>>()?;
    let handed_out = concat!(
        include_str!("../deploy/upperdeck-manager.service"),
        include_str!("../deploy/upperdeck-agent.service"),
        include_str!("../deploy/compose.yaml")
    );
    let flags: Vec<&str> = handed_out
        .split(|c: char| !(c.is_ascii_lowercase() || c == '-'))
        .filter(|word| word.starts_with("--") && word.len() > 3)
        .collect();
    assert!(flags.len() > 10, "{flags:?}");
    for flag in flags {
        assert!(help.contains(flag), "{flag}");
    }
    Ok(())
}

#[test]
fn a_nodes_key_is_made_and_each_side_takes_its_own() -> Outcome {
    use std::os::unix::fs::PermissionsExt as _;

    let dir = tempfile::tempdir()?;
    let at = |name: &str| dir.path().join(name).display().to_string();
    let private = |name: &str, mode| {
        std::fs::set_permissions(dir.path().join(name), std::fs::Permissions::from_mode(mode))
    };
    std::fs::write(at("master"), "a key of the tests, long enough\n")?;
    private("master", 0o600)?;
    let (master, node) = (at("master"), at("node"));
    let made = upperdeck(&["key", "--key-file", &master, "--node", "n1"])?;
    assert!(made.status.success(), "{}", text(&made.stderr));
    let written = upperdeck(&["key", "--key-file", &master, "--node", "n1", "-o", &node])?;
    assert!(written.status.success() && written.stdout.is_empty());
    assert_eq!(std::fs::read(&node)?, made.stdout);
    assert_eq!(
        std::fs::metadata(&node)?.permissions().mode() & 0o777,
        0o600
    );
    let refused = |args: &[&str], told: &str| -> Outcome {
        let done = upperdeck(args)?;
        let said = text(&done.stderr);
        assert_eq!(done.status.code(), Some(2), "{args:?}: {said}");
        assert!(said.contains(told), "{args:?}: {said}");
        Ok(())
    };
    let (spool, record) = (at("spool"), format!("sqlite:{}", at("record.db")));
    let agent = |key: &str, told: &str| {
        let args = [
            "agent",
            "--node=n1",
            "--redis=redis://127.0.0.1:1",
            "--owner=fixed:a",
            "--allow=r.example",
            "--spool-dir",
            &spool,
            "--key-file",
            key,
        ];
        refused(&args, told)
    };
    agent(&master, "this is a master key")?;
    let other = at("other");
    upperdeck(&["key", "--key-file", &master, "--node", "n2", "-o", &other])?;
    agent(&other, "is the key of node \"n2\"")?;
    let tokens = at("tokens.toml");
    std::fs::write(
        &tokens,
        format!(
            "[[token]]\nname = \"a\"\nrole = \"administrator\"\nsha256 = \"{:064x}\"\n",
            1
        ),
    )?;
    let manager = [
        "manager",
        "--redis=redis://127.0.0.1:1",
        "--target=r.example/{user}/{name}:{tag}",
        "--listen=127.0.0.1:0",
        "--tokens-file",
        &tokens,
        "--record",
        &record,
        "--key-file",
        &node,
    ];
    refused(&manager, "this is the key of one node")?;
    refused(
        &["key", "--key-file", &node, "--node", "n1"],
        "this is the key of one node",
    )?;
    refused(
        &["key", "--key-file", &master, "--node", " "],
        "is not a node's name",
    )?;
    private("master", 0o644)?;
    refused(&["key", "--key-file", &master, "--node", "n1"], "chmod 600")?;
    Ok(())
}
