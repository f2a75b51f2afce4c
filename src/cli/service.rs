//! `manager`, `agent` and `up`: the service, from its settings.

use std::path::Path;

use anyhow::Context;

use super::args::{self, service};
use super::exit::Usage;
use super::{client, signals, text};
use crate::agent;
use crate::cancel::Cancel;
use crate::container::Roots;
use crate::job::Keys;
use crate::queue::{self, Limits, Queue};

/// In the state directory of an `upperdeck up`: how it is reached, with its token. Only its owner can read it.
pub(super) const UP_FILE: &str = "up.url";

/// What is needed and was said nowhere.
fn missing(flag: &str, what: &str) -> Usage {
    let (variable, key) = (
        flag.to_uppercase().replace('-', "_"),
        flag.replace('-', "_"),
    );
    Usage(format!(
        "{what}: --{flag}, UPPERDECK_{variable} or {key} in the settings file"
    ))
}

fn limits(queue: &service::Queue) -> Limits {
    Limits {
        user: queue.running_per_user,
        node: queue.running_per_node,
        registry: queue.running_per_registry,
    }
}

/// A secret from a file; which setting named it is said when it cannot be read.
fn secret(flag: &str, file: &Path) -> Result<zeroize::Zeroizing<String>, Usage> {
    client::read_line(file)
        .map_err(|error| Usage(format!("--{flag} {}: {error}", text::path(file))))
}

/// `url` with the password from a file in it.
fn with_password(flag: &str, url: &str, file: Option<&Path>) -> Result<String, Usage> {
    let Some(file) = file else {
        return Ok(url.to_owned());
    };
    let password = secret(flag, file)?;
    let mut url = reqwest::Url::parse(url).map_err(|error| Usage(format!("{url}: {error}")))?;
    url.set_password(Some(&password))
        .map_err(|()| Usage(format!("--{flag}: {url} has no place for a password")))?;
    Ok(url.into())
}

fn keys(queue: &service::Queue) -> anyhow::Result<Keys> {
    let file = queue
        .key_file
        .as_ref()
        .ok_or_else(|| missing("key-file", "messages have to be signed"))?;
    let text = std::fs::read_to_string(file)
        .map(zeroize::Zeroizing::new)
        .map_err(|error| Usage(format!("--key-file {}: {error}", text::path(file))))?;
    let keys = Keys::parse(&text)
        .map_err(|error| Usage(format!("--key-file {}: {error}", text::path(file))))?;
    Ok(keys)
}

/// Redis, where the settings name it.
async fn redis(queue: &service::Queue) -> anyhow::Result<Option<Queue>> {
    let Some(url) = &queue.redis else {
        return Ok(None);
    };
    let keys = keys(queue)?;
    let url = with_password(
        "redis-password-file",
        url,
        queue.redis_password_file.as_deref(),
    )?;
    let redis = queue::Redis::connect(&url, keys, limits(queue)).await?;
    Ok(Some(Queue::Redis(redis)))
}

/// Runs `work` until a signal asks it to end.
fn serve(work: impl AsyncFnOnce(Cancel) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let cancel = Cancel::default();
    signals::cancel_on_signals(&cancel).context("cannot listen for SIGINT and SIGTERM")?;
    let runtime = tokio::runtime::Runtime::new().context("cannot start the I/O threads")?;
    runtime.block_on(work(cancel))
}

/// The settings of an agent that may write where `allowed` says.
fn agent_options(
    roots: Roots,
    work: service::Work,
    push: &service::Push,
    owner: &str,
    allowed: Vec<agent::Allowed>,
) -> anyhow::Result<agent::Options> {
    let owner = owner
        .parse()
        .map_err(|error| Usage(format!("--owner {owner}: {error}")))?;
    let mut options = agent::Options::new(owner);
    if let Some(node) = work.node {
        options.node = node;
    }
    options.roots = roots;
    options.registry = agent::Registry {
        creds_file: push.creds_file.clone(),
        authfile: push.authfile.clone(),
        cert_dir: push.cert_dir.clone(),
        tls_verify: push.tls_verify,
        create_project: work.create_project,
    };
    options.allowed = allowed;
    options.state_dir = Some(work.state_dir).filter(|dir| !dir.as_os_str().is_empty());
    options.spool_dir = work.spool_dir;
    options.slots = work.slots;
    options.threads = (work.min_threads, work.max_threads);
    options.compression = work.compression;
    options.max_pause = work.max_pause;
    options.max_time = work.max_time;
    options.drain = work.drain;
    options.background = !work.foreground;
    options.flags = work.commit_flag;
    Ok(options)
}

pub(super) fn agent(roots: Roots, args: args::Agent) -> anyhow::Result<()> {
    let owner = args
        .work
        .owner
        .clone()
        .ok_or_else(|| missing("owner", "somebody has to say whose a session is"))?;
    if args.allow.is_empty() {
        return Err(missing("allow", "somebody has to say where images may go").into());
    }
    let allowed = args.allow.iter().map(|prefix| {
        prefix
            .parse()
            .map_err(|error| Usage(format!("--allow: {error}")))
    });
    let allowed = allowed.collect::<Result<_, _>>()?;
    let options = agent_options(roots, args.work, &args.push, &owner, allowed)?;
    serve(async |cancel| {
        let queue = redis(&args.queue)
            .await?
            .ok_or_else(|| missing("redis", "an agent needs a queue"))?;
        Ok(agent::run(options, queue, cancel).await?)
    })
}

pub(super) fn manager(args: args::Manager) -> anyhow::Result<()> {
    let _ = args;
    anyhow::bail!("not yet")
}

pub(super) fn up(roots: Roots, args: args::Up) -> anyhow::Result<()> {
    let _ = (roots, args);
    anyhow::bail!("not yet")
}
