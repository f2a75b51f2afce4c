//! `doctor`: turns the settings of a verb into a list of checks, and the findings into a table and an exit code.

use std::path::PathBuf;

use zeroize::Zeroizing;

use super::verbs::{self, RECORD, with_password};
use crate::cli::args::service::Doctor;
use crate::cli::exit::Usage;

use crate::cli::options;
use crate::cli::print::print;
use crate::cli::text::{self, Align};
use crate::common::message;
use crate::node::container::Roots;
use crate::service::doctor::{self, Finding, Purpose, Report, Secret, State};
use crate::service::manager::target::Template;
use crate::store::destination::Target;
use crate::store::registry;

/// Repository to test below a target that is only a prefix. It is never created: an upload to it is opened and
/// cancelled.
const REPOSITORY: &str = "upperdeck-doctor";

pub(super) fn doctor(roots: Roots, args: &Doctor) -> anyhow::Result<()> {
    let (format, strict) = (args.format, args.strict);
    let report = doctor::run(&doctor_options(roots, args)?);
    print(format, &report, table)?;
    let count = |state| report.findings.iter().filter(|f| f.state == state).count();
    let (failed, warnings) = (count(State::Failed), count(State::Warning));
    anyhow::ensure!(failed == 0, "{failed} of the checks failed");
    anyhow::ensure!(!strict || warnings == 0, "{warnings} warnings");
    Ok(())
}

/// Converts the flags to the options of the checks.
fn doctor_options(roots: Roots, args: &Doctor) -> anyhow::Result<doctor::Options> {
    let purpose = args.purpose;
    let mut options = doctor::Options {
        purpose,
        refused: refused(&roots, args),
        roots,
        missing: missing(args),
        directories: directories(args),
        secrets: secrets(args),
        redis: None,
        record: None,
        registries: registries(args)?,
        access: registry::Access {
            authfile: args.push.authfile.clone(),
            // A file that cannot be read is reported by the check of the secrets.
            creds: args
                .push
                .creds_file
                .as_ref()
                .and_then(|file| options::creds_of(file).ok()),
            tls_verify: args.push.tls_verify,
            cert_dir: args.push.cert_dir.clone(),
            ..registry::Access::default()
        },
        timeout: args.check_timeout,
    };
    if purpose != Purpose::Commit
        && let Some(url) = &args.queue.redis
    {
        let file = args.queue.redis_password_file.as_deref();
        options.redis = Some(Zeroizing::new(with_password(
            "redis-password-file",
            url,
            file,
        )?));
    }
    if purpose == Purpose::Manager {
        let place = args.serve.record.as_deref().unwrap_or(RECORD);
        let file = args.serve.record_password_file.as_deref();
        options.record = Some(Zeroizing::new(with_password(
            "record-password-file",
            place,
            file,
        )?));
    }
    Ok(options)
}

/// Returns the settings without which the verb would not start.
fn missing(args: &Doctor) -> Vec<String> {
    let needed: &[(&str, bool)] = match args.purpose {
        Purpose::Commit => &[],
        Purpose::Agent => &[
            ("owner", args.work.owner.is_some()),
            ("allow", !args.allow.is_empty()),
            ("redis", args.queue.redis.is_some()),
            ("key-file", args.queue.key_file.is_some()),
        ],
        Purpose::Manager => &[
            ("target", args.target.is_some()),
            ("redis", args.queue.redis.is_some()),
            ("key-file", args.queue.key_file.is_some()),
            (
                "tokens-file",
                args.serve.tokens_file.is_some()
                    || args.serve.callers.jwks.is_some()
                    || args.serve.callers.oidc_issuer.is_some()
                    || args.serve.callers.proxy_header.is_some(),
            ),
        ],
    };
    let unset = needed.iter().filter(|(_, set)| !set);
    unset.map(|(name, _)| (*name).to_owned()).collect()
}

/// Returns why the verb would refuse its settings. What is not set is listed by [`missing`].
fn refused(roots: &Roots, args: &Doctor) -> Option<String> {
    if !missing(args).is_empty() {
        return None;
    }
    let settings = match args.purpose {
        Purpose::Commit => Ok(()),
        Purpose::Agent => {
            verbs::agent_settings(roots.clone(), &args.work, &args.push, &args.allow).map(drop)
        }
        Purpose::Manager => {
            verbs::manager_settings(&args.serve, &args.push, args.target.as_deref()).map(drop)
        }
    };
    settings.err().map(|error| message::of(error.as_ref()))
}

fn directories(args: &Doctor) -> Vec<(&'static str, PathBuf)> {
    let mut found = Vec::new();
    if args.purpose != Purpose::Manager && !args.work.state_dir.as_os_str().is_empty() {
        found.push(("state-dir", args.work.state_dir.clone()));
    }
    if args.purpose == Purpose::Agent {
        let usual = || PathBuf::from("/var/lib/upperdeck/agent");
        let dir = args.work.spool_dir.clone().unwrap_or_else(usual);
        found.push(("spool-dir", dir));
    }
    let places = args.allow.iter().chain(&args.destination);
    let layouts = places.filter_map(|place| place.strip_prefix("oci:"));
    found.extend(layouts.map(|dir| {
        let dir = dir.split(':').next().unwrap_or_default();
        ("allow", PathBuf::from(dir))
    }));
    found
}

fn secrets(args: &Doctor) -> Vec<Secret> {
    let mut named = vec![
        ("creds-file", &args.push.creds_file),
        ("authfile", &args.push.authfile),
    ];
    if args.purpose != Purpose::Commit {
        named.push(("key-file", &args.queue.key_file));
        named.push(("redis-password-file", &args.queue.redis_password_file));
    }
    if args.purpose == Purpose::Manager {
        named.push(("record-password-file", &args.serve.record_password_file));
        named.push(("smtp-password-file", &args.serve.mail.smtp_password_file));
    }
    named
        .into_iter()
        .filter_map(|(setting, path)| {
            let path = path.clone()?;
            Some(Secret { setting, path })
        })
        .collect()
}

/// Returns the repositories that would be pushed to.
fn registries(args: &Doctor) -> anyhow::Result<Vec<String>> {
    let below = |prefix: &str| format!("{}/{REPOSITORY}", prefix.trim_end_matches('/'));
    match args.purpose {
        Purpose::Commit => {
            let Some(text) = &args.destination else {
                return Ok(Vec::new());
            };
            Ok(match Target::for_saving(text)? {
                Target::Registry(reference) => {
                    vec![format!("{}/{}", reference.host, reference.repository)]
                }
                _ => Vec::new(),
            })
        }
        Purpose::Agent => Ok(args
            .allow
            .iter()
            .filter(|prefix| !prefix.starts_with("oci:"))
            .map(|prefix| below(prefix.trim_start_matches("docker://")))
            .collect()),
        Purpose::Manager => {
            let Some(text) = &args.target else {
                return Ok(Vec::new());
            };
            let template: Template = text
                .parse()
                .map_err(|error| Usage(format!("--target: {error}")))?;
            if template.is_layout() {
                return Ok(Vec::new());
            }
            // The part of the template before the first placeholder.
            let fixed = text.trim_start_matches("docker://");
            let fixed = fixed.split('{').next().unwrap_or_default();
            let project = fixed.rsplit_once('/').map_or(fixed, |(project, _)| project);
            Ok(vec![below(project)])
        }
    }
}

fn state_name(state: State) -> &'static str {
    match state {
        State::Ok => "ok",
        State::Skipped => "skipped",
        State::Warning => "WARNING",
        State::Failed => "FAILED",
    }
}

fn table(report: &Report) -> String {
    let header = [
        ("CHECK", Align::Left),
        ("STATE", Align::Left),
        ("FOUND", Align::Left),
    ];
    let row = |finding: &Finding| {
        vec![
            finding.check.to_owned(),
            state_name(finding.state).to_owned(),
            finding.found.clone(),
        ]
    };
    let rows: Vec<_> = report.findings.iter().map(row).collect();
    let mut out = text::table(&header, &rows);
    let mut advised: Vec<&Finding> = report
        .findings
        .iter()
        .filter(|finding| finding.advice.is_some())
        .collect();
    advised.sort_by_key(|finding| std::cmp::Reverse(finding.state));
    if !advised.is_empty() {
        out.push_str("\nWhat to do:\n");
    }
    let mut lines: Vec<String> = advised
        .into_iter()
        .map(|finding| {
            let advice = finding.advice.as_deref().unwrap_or_default();
            let line = format!(
                "  {}: {}: {advice}",
                state_name(finding.state),
                finding.check
            );
            crate::common::escape::text(&line) + "\n"
        })
        .collect();
    lines.dedup();
    out.extend(lines);
    out
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory as _, FromArgMatches as _};

    use super::*;
    use crate::cli::args::{Cli, Verb, service};

    fn parsed(words: &[&str]) -> anyhow::Result<doctor::Options> {
        let words = ["upperdeck", "doctor"].iter().chain(words);
        let matches = Cli::command().try_get_matches_from(words)?;
        let Verb::Service(service::Verb::Doctor(args)) = Cli::from_arg_matches(&matches)?.verb
        else {
            anyhow::bail!("another verb");
        };
        doctor_options(Roots::default(), &args)
    }

    #[test]
    fn what_an_agent_is_set_to_is_what_is_looked_at() -> anyhow::Result<()> {
        let options = parsed(&[
            "--for=agent",
            "--allow=harbor.example.org/sessions",
            "--allow=oci:/srv/images",
            "--creds-file=/etc/upperdeck/robot",
            "--redis=redis://redis.example.org",
        ])?;
        assert_eq!(options.missing, ["owner", "key-file"]);
        assert_eq!(
            options.registries,
            ["harbor.example.org/sessions/upperdeck-doctor"]
        );
        assert!(
            options
                .directories
                .contains(&("allow", "/srv/images".into()))
        );
        assert_eq!(options.secrets[0].setting, "creds-file");
        assert!(options.redis.is_some());
        assert!(options.record.is_none());
        Ok(())
    }

    #[test]
    fn settings_that_the_verb_would_refuse_are_failures() -> anyhow::Result<()> {
        let agent = |owner: &str| {
            parsed(&[
                "--for=agent",
                "--allow=harbor.example.org/sessions",
                "--redis=redis://redis.example.org",
                "--key-file=/etc/upperdeck/node-key",
                owner,
            ])
        };
        assert_eq!(agent("--owner=env:JUPYTERHUB_USER")?.refused, None);
        let refused = agent("--owner=root")?.refused.unwrap_or_default();
        assert!(refused.starts_with("--owner root: "), "{refused}");
        let tokens = tempfile::NamedTempFile::new()?;
        std::fs::write(tokens.path(), "[[tokens]]")?;
        let refused = parsed(&[
            "--for=manager",
            "--target=harbor.example.org/sessions/{user}/{name}:{tag}",
            "--redis=redis://redis.example.org",
            "--key-file=/etc/upperdeck/master-key",
            &format!("--tokens-file={}", tokens.path().display()),
        ])?;
        let refused = refused.refused.unwrap_or_default();
        assert!(refused.contains("unknown field `tokens`"), "{refused}");
        Ok(())
    }

    #[test]
    fn a_managers_template_names_the_project() -> anyhow::Result<()> {
        let target = "--target=harbor.example.org/sessions/{user}/{name}:{tag}";
        let options = parsed(&["--for=manager", target])?;
        assert_eq!(
            options.registries,
            ["harbor.example.org/sessions/upperdeck-doctor"]
        );
        assert_eq!(options.missing, ["redis", "key-file", "tokens-file"]);
        Ok(())
    }

    #[test]
    fn a_destination_is_for_commit() -> anyhow::Result<()> {
        let options = parsed(&["registry.example.org/alice/notebook:monday"])?;
        assert_eq!(options.registries, ["registry.example.org/alice/notebook"]);
        assert!(options.missing.is_empty());
        Ok(())
    }

    #[test]
    fn advice_stands_below_the_table_the_worst_first() {
        let finding = |check, state, advice: &str| Finding {
            check,
            state,
            found: "a\u{1b}[31m".to_owned(),
            advice: (!advice.is_empty()).then(|| advice.to_owned()),
        };
        let text = table(&Report {
            purpose: "commit",
            state: State::Failed,
            findings: vec![
                finding("one", State::Ok, ""),
                finding("two", State::Warning, "less"),
                finding("three", State::Failed, "more"),
            ],
        });
        let advice = text.split_once("What to do:\n").map(|(_, advice)| advice);
        assert_eq!(
            advice,
            Some("  FAILED: three: more\n  WARNING: two: less\n")
        );
        assert!(!text.contains('\u{1b}'));
    }
}
