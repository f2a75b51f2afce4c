//! Checks the servers that a node connects to: the registry, Redis, and the record's database. Each check runs in the
//! current thread, with one time limit for all its requests.

use std::time::Duration;

use super::clock;
use super::{Finding, Options};
use crate::service::queue::{self, ServerInfo};
use crate::service::record::Record;
use crate::store::harbor::rights::{self, Right};
use crate::store::harbor::{self, Harbor};
use crate::store::registry::{Access, Registries, Retry, http_client};

/// Runs `work` to completion. Fails with a finding if it does not finish within `limit`.
fn within<T>(
    check: &'static str,
    limit: Duration,
    work: impl Future<Output = T>,
) -> Result<T, Vec<Finding>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| vec![Finding::skipped(check, error.to_string())])?;
    let done = runtime.block_on(async { tokio::time::timeout(limit, work).await });
    // A DNS lookup that is still pending must not delay the return.
    runtime.shutdown_background();
    done.map_err(|_| vec![super::no_answer(check, limit)])
}

/// What was learned from a registry.
struct Registry {
    repository: String,
    push: Result<(), harbor::Error>,
    /// The rights that the account lacks in the project; `None` if the registry is not Harbor, or does not tell.
    missing: Option<Vec<Right>>,
    /// Time of a response by the registry's clock and by the local one, in milliseconds since the epoch.
    clock: Option<(i64, i64)>,
}

pub(super) fn registry(options: &Options, repository: &str) -> Vec<Finding> {
    let access = Access {
        retry: Retry {
            max_attempts: 1,
            max_retries: 1,
            ..Retry::default()
        },
        stall_timeout: options.timeout,
        deadline: options.timeout,
        ..options.access.clone()
    };
    let insecure = !access.tls_verify;
    match within("registry", options.timeout, ask(access, repository)) {
        Ok(Ok(seen)) => judge_registry(&seen, insecure),
        Ok(Err(error)) => vec![Finding::failed(
            "registry",
            format!("{repository}: {error}"),
            "expected HOST[:PORT]/PROJECT",
        )],
        Err(found) => found,
    }
}

async fn ask(access: Access, name: &str) -> Result<Registry, harbor::Error> {
    let reference = name
        .parse::<crate::store::registry::Reference>()
        .map_err(crate::store::registry::Error::from)?;
    let plain = !access.tls_verify;
    let registries = Registries::new(access);
    let repository = registries.push_to(&reference)?;
    let (push, clock) = tokio::join!(
        harbor::check_push(&repository, None),
        date_of(&reference.host, plain)
    );
    let missing = match harbor::split(repository.path()) {
        Some((project, _)) if push.is_ok() => match Harbor::detect(repository.api()).await {
            Ok(Some(harbor)) => harbor.missing_rights(project).await.ok(),
            _ => None,
        },
        _ => None,
    };
    Ok(Registry {
        repository: name.to_owned(),
        push,
        missing,
        clock,
    })
}

/// Returns the `Date` header of a response of `host` and the local time of that response, both in milliseconds since
/// the epoch.
async fn date_of(host: &str, plain: bool) -> Option<(i64, i64)> {
    let client = http_client(host)
        .tls_danger_accept_invalid_certs(plain)
        .build()
        .ok()?;
    for scheme in ["https", "http"] {
        let before = clock::now_ms();
        let Ok(answer) = client.head(format!("{scheme}://{host}/v2/")).send().await else {
            continue;
        };
        let date = answer.headers().get(http::header::DATE)?.to_str().ok()?;
        let theirs = jiff::fmt::rfc2822::parse(date).ok()?;
        let ours = before.midpoint(clock::now_ms());
        return Some((theirs.timestamp().as_millisecond(), ours));
    }
    None
}

fn judge_registry(seen: &Registry, insecure: bool) -> Vec<Finding> {
    let name = &seen.repository;
    let mut found = Vec::new();
    match &seen.push {
        Ok(()) => found.push(Finding::ok(
            "registry",
            format!("{name}: an upload can be begun (and was cancelled)"),
        )),
        Err(error) if error.not_permitted() => found.push(Finding::failed(
            "registry",
            format!("{name}: {error}"),
            "check the account and the credentials file; give the robot the rights that docs/registries.md lists",
        )),
        Err(error) => found.push(Finding::failed(
            "registry",
            format!("{name}: {error}"),
            "check the name, the network, proxies and certificates from this node",
        )),
    }
    if insecure {
        found.push(Finding::warning(
            "registry-tls",
            "certificates are not checked",
            "put the registry's authority into --cert-dir and leave --tls-verify on",
        ));
    }
    match seen.missing.as_deref() {
        None => {}
        Some([]) => found.push(Finding::ok(
            "registry-rights",
            format!("{name}: all rights for saving, listing and deleting"),
        )),
        Some(missing) => found.push(Finding::warning(
            "registry-rights",
            format!("{name}: these will fail: {}", rights::describe(missing)),
            "give the robot these rights (docs/registries.md has the whole list)",
        )),
    }
    if let Some((theirs, ours)) = seen.clock {
        found.push(clock::judge("the registry", theirs, ours));
    }
    found
}

pub(super) fn redis(options: &Options) -> Vec<Finding> {
    let Some(url) = &options.redis else {
        return Vec::new();
    };
    match within("redis", options.timeout, queue::examine(url)) {
        Ok(Ok(seen)) => judge_redis(&seen),
        Ok(Err(error)) => vec![Finding::failed(
            "redis",
            error.to_string(),
            "check address, user and password (--redis, --redis-password-file), certificates and firewalls",
        )],
        Err(found) => found,
    }
}

fn judge_redis(seen: &ServerInfo) -> Vec<Finding> {
    let mut found = Vec::new();
    let at = &seen.at;
    found.push(match (seen.version.as_deref(), seen.version_number()) {
        (Some(text), Some(version)) if version < (6, 2) => Finding::failed(
            "redis",
            format!("{at}: version {text}"),
            "update to Redis 6.2, or Valkey",
        ),
        (Some(text), _) => Finding::ok("redis", format!("{at}: answers, version {text}")),
        (None, _) => Finding::ok("redis", format!("{at}: answers")),
    });
    if seen.refused.is_empty() {
        found.push(Finding::ok(
            "redis-rights",
            "all commands that are used are allowed",
        ));
    } else {
        found.push(Finding::failed(
            "redis-rights",
            format!("refused: {}", seen.refused.join(", ")),
            "the ACL user needs ~{upperdeck}:* +@read +@write +@scripting +@connection +time",
        ));
    }
    if !seen.tls && !seen.local {
        found.push(Finding::warning(
            "redis-tls",
            "the password and the orders pass the network in the clear",
            "use rediss://, or a tunnel",
        ));
    }
    if !seen.password {
        found.push(Finding::warning(
            "redis-password",
            "no password is needed",
            "set one (requirepass, or an ACL user): who can write there can throw away all orders",
        ));
    }
    found.push(match seen.policy.as_deref() {
        Some("noeviction") => Finding::ok("redis-memory", "maxmemory-policy noeviction"),
        Some(policy) if seen.bounded => Finding::warning(
            "redis-memory",
            format!("maxmemory-policy {policy}: orders are thrown away when memory is short"),
            "set maxmemory-policy noeviction; managers put back what is lost, late",
        ),
        Some(policy) => Finding::ok(
            "redis-memory",
            format!("maxmemory-policy {policy}, without a maxmemory"),
        ),
        None => Finding::skipped("redis-memory", "this user may not ask (+info shows it)"),
    });
    found.push(match seen.persistent {
        Some(true) => Finding::ok("redis-persistence", "on"),
        Some(false) => Finding::ok(
            "redis-persistence",
            "off: managers put back what a restart loses",
        ),
        None => Finding::skipped(
            "redis-persistence",
            "this user may not ask (+info shows it)",
        ),
    });
    if let Some((theirs, ours)) = seen.clock {
        found.push(clock::judge("Redis", theirs, ours));
    }
    found
}

pub(super) fn record(options: &Options) -> Vec<Finding> {
    let Some(place) = &options.record else {
        return Vec::new();
    };
    match within("record", options.timeout, Record::check(place)) {
        Ok(Ok(true)) => vec![Finding::ok("record", "answers")],
        Ok(Ok(false)) => vec![Finding::ok("record", "will be made")],
        Ok(Err(error)) => vec![Finding::failed(
            "record",
            error.to_string(),
            "check --record and --record-password-file, and that this user may write to the file and its directory",
        )],
        Err(found) => found,
    }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    type Spoil = fn(&mut ServerInfo);

    fn examined() -> ServerInfo {
        ServerInfo {
            at: "redis:6379".to_owned(),
            version: Some("7.2.4".to_owned()),
            refused: Vec::new(),
            tls: true,
            local: false,
            password: true,
            policy: Some("noeviction".to_owned()),
            bounded: true,
            persistent: Some(false),
            clock: Some((1000, 1001)),
        }
    }

    fn state(seen: &ServerInfo, check: &str) -> State {
        judge_redis(seen)
            .iter()
            .find(|finding| finding.check == check)
            .map_or(State::Skipped, |finding| finding.state)
    }

    #[test]
    fn each_weakness_of_redis_has_its_finding() {
        assert!(
            judge_redis(&examined())
                .iter()
                .all(|f| f.state == State::Ok)
        );
        let cases: [(&str, Spoil, State); 9] = [
            (
                "redis",
                |s| s.version = Some("6.0.16".into()),
                State::Failed,
            ),
            ("redis", |s| s.version = Some("10.1".into()), State::Ok),
            (
                "redis-rights",
                |s| s.refused = vec!["XADD".into()],
                State::Failed,
            ),
            ("redis-tls", |s| s.tls = false, State::Warning),
            ("redis-password", |s| s.password = false, State::Warning),
            (
                "redis-memory",
                |s| s.policy = Some("allkeys-lru".into()),
                State::Warning,
            ),
            ("redis-memory", |s| s.policy = None, State::Skipped),
            ("redis-persistence", |s| s.persistent = None, State::Skipped),
            ("clock", |s| s.clock = Some((0, 1_000_000)), State::Failed),
        ];
        for (check, spoil, expected) in cases {
            let mut seen = examined();
            spoil(&mut seen);
            assert_eq!(state(&seen, check), expected, "{check}");
        }
    }

    #[test]
    fn what_a_registry_lets_is_told() {
        let seen = |push, missing| Registry {
            repository: "registry.example.org/p/x".to_owned(),
            push,
            missing,
            clock: None,
        };
        let states = |seen: &Registry, insecure| -> Vec<(&str, State)> {
            judge_registry(seen, insecure)
                .iter()
                .map(|f| (f.check, f.state))
                .collect()
        };
        assert_eq!(
            states(&seen(Ok(()), None), false),
            [("registry", State::Ok)]
        );
        assert_eq!(
            states(&seen(Ok(()), Some(Vec::new())), false),
            [("registry", State::Ok), ("registry-rights", State::Ok)]
        );
        let last = rights::NEEDED.last().copied().into_iter().collect();
        assert_eq!(
            states(&seen(Ok(()), Some(last)), true),
            [
                ("registry", State::Ok),
                ("registry-tls", State::Warning),
                ("registry-rights", State::Warning)
            ]
        );
        let none = harbor::Error::NoProject {
            host: "h".to_owned(),
            project: "p".to_owned(),
        };
        assert_eq!(
            states(&seen(Err(none), None), false),
            [("registry", State::Failed)]
        );
    }
}
