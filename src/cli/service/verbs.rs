//! `manager`, `agent` and `up`: starts the service from its settings.

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio_util::sync::CancellationToken;

use super::callers::{self, missing, secret, tokens};
use super::{client, notices};
use crate::cli::args::service;
use crate::cli::exit::Usage;
use crate::cli::{options, secret as secrets, signals, text, write_stdout};
use crate::common::private_files;
use crate::node::container::Roots;
use crate::service::agent;
use crate::service::job::Keys;
use crate::service::manager::auth::{self, Tokens};
use crate::service::manager::target::{self, Template};
use crate::service::manager::{self, Listen};
use crate::service::queue::{self, Limits, Queue};
use crate::service::record::Record;
use crate::service::setup;
use crate::store::images::prune::prune;
use crate::store::layout::{self, PruneOptions};
use crate::store::registry;

/// Default location of a manager's record. The directory belongs to the manager's user, while `/var/lib/upperdeck` belongs
/// to root, for agents and for saves by hand.
pub(super) const RECORD: &str = "sqlite:/var/lib/upperdeck-manager/manager.db";
/// Drain timeout of `up`. It is shorter than that of a node, because Ctrl-C is interactive.
const UP_DRAIN: Duration = Duration::from_secs(10);
/// Age from which blobs that another tool wrote to a layout of `up`, and that no image needs, are deleted at the start.
const FOREIGN_BLOB_AGE: Duration = Duration::from_secs(86_400);
/// How long the manager waits until the agent's last reports are recorded.
const FINAL_REPORT_TIMEOUT: Duration = Duration::from_secs(5);

fn limits(queue: &service::Queue) -> Limits {
    Limits {
        user: queue.running_per_user,
        node: queue.running_per_node,
        registry: queue.running_per_registry,
    }
}

/// Returns `url` with the password from a file.
pub(super) fn with_password(flag: &str, url: &str, file: Option<&Path>) -> Result<String, Usage> {
    let Some(file) = file else {
        return Ok(url.to_owned());
    };
    let password = secret(flag, file)?;
    // The URL is not shown in errors, because a malformed one may contain another password.
    let mut url = reqwest::Url::parse(url)
        .map_err(|error| Usage(format!("--{flag}: the address it is for is none: {error}")))?;
    url.set_password(Some(&password)).map_err(|()| {
        let scheme = url.scheme();
        Usage(format!(
            "--{flag}: the {scheme} address it is for has no place for a password"
        ))
    })?;
    Ok(url.into())
}

/// Reads the keys in `file`: the master keys, or those of `node`.
fn keys(file: Option<&Path>, node: Option<&str>) -> anyhow::Result<Keys> {
    let file = file.ok_or_else(|| missing("key-file", "messages have to be signed"))?;
    let wrong = |reason: String| Usage(format!("--key-file {}: {reason}", text::path(file)));
    let text = secrets::keys(file).map_err(|error| wrong(error.to_string()))?;
    let keys = match node {
        None => Keys::parse(&text),
        Some(node) => Keys::parse_node(&text, node),
    };
    Ok(keys.map_err(|error| wrong(error.to_string()))?)
}

/// Prints the key of a node, or writes it to a file.
pub(super) fn key(args: &service::NodeKey) -> anyhow::Result<()> {
    let master = keys(Some(&args.key_file), None)?;
    let file = master
        .node_file(&args.node)
        .map_err(|error| Usage(format!("--node: {error}")))?;
    match &args.output {
        None => Ok(write_stdout(file.as_bytes())?),
        Some(output) => write_private(output, &file)
            .with_context(|| format!("cannot write {}", text::path(output))),
    }
}

/// Prints the definition of the `Save` resource.
pub(super) fn crd() -> anyhow::Result<()> {
    let definition = crate::service::kubernetes::crd::definition()?;
    Ok(write_stdout(definition.as_bytes())?)
}

/// Connects to Redis if it is configured, for a manager or for the agent of `node`.
async fn redis(queue: &service::Queue, node: Option<&str>) -> anyhow::Result<Option<Queue>> {
    let Some(url) = &queue.redis else {
        return Ok(None);
    };
    let keys = keys(queue.key_file.as_deref(), node)?;
    let url = with_password(
        "redis-password-file",
        url,
        queue.redis_password_file.as_deref(),
    )?;
    let redis = queue::Redis::connect(&url, keys, limits(queue)).await?;
    Ok(Some(Queue::Redis(redis)))
}

/// Runs `work` until a signal cancels.
fn serve(work: impl AsyncFnOnce(CancellationToken) -> anyhow::Result<()>) -> anyhow::Result<()> {
    // Every connection takes a descriptor. If the limit cannot be raised, fewer connections are served.
    if let Err(error) = manager::raise_open_files() {
        tracing::warn!(error = %error, "the limit of open files cannot be raised");
    }
    let cancel = CancellationToken::new();
    signals::cancel_on_signals(&cancel).context("cannot listen for SIGINT and SIGTERM")?;
    let runtime = tokio::runtime::Runtime::new().context("cannot start the I/O threads")?;
    runtime.block_on(work(cancel))
}

/// Returns the settings of an agent, or why it would refuse them.
pub(super) fn agent_settings(
    roots: Roots,
    work: &service::Work,
    push: &service::Push,
    allow: &[String],
) -> anyhow::Result<agent::Options> {
    let owner = work
        .owner
        .as_deref()
        .ok_or_else(|| missing("owner", "the owner of a session has to be known"))?;
    if allow.is_empty() {
        return Err(missing(
            "allow",
            "the destinations that images may go to have to be listed",
        )
        .into());
    }
    let allowed = allow.iter().map(|prefix| {
        prefix
            .parse()
            .map_err(|error| Usage(format!("--allow: {error}")))
    });
    agent_options(roots, work, push, owner, allowed.collect::<Result<_, _>>()?)
}

/// Returns the settings of an agent that may push to `allowed`.
fn agent_options(
    roots: Roots,
    work: &service::Work,
    push: &service::Push,
    owner: &str,
    allowed: Vec<agent::Allowed>,
) -> anyhow::Result<agent::Options> {
    let owner = owner
        .parse()
        .map_err(|error| Usage(format!("--owner {owner}: {error}")))?;
    let mut options = agent::Options::new(owner);
    if let Some(node) = &work.node {
        options.node.clone_from(node);
    }
    options.roots = roots;
    options.registry = agent::Registry {
        creds_file: push.creds_file.clone(),
        authfile: push.authfile.clone(),
        cert_dir: push.cert_dir.clone(),
        tls_verify: push.tls_verify,
        create_project: work.create_project,
        project_quota: work.project_quota,
        keep_replaced: work.keep_replaced,
        vendor: work.vendor.clone(),
    };
    options.allowed = allowed;
    options.save_ended = work.save_ended.parse().map_err(Usage)?;
    options.volumes.clone_from(&work.allow_volume);
    let state_dir = Some(&work.state_dir).filter(|dir| !dir.as_os_str().is_empty());
    options.state_dir = state_dir.cloned();
    if let Some(dir) = &work.spool_dir {
        options.spool_dir.clone_from(dir);
    }
    options.slots = work.slots;
    options.threads = (work.min_threads, work.max_threads);
    options.compression.clone_from(&work.compression);
    options.max_pause = work.max_pause;
    options.max_time = work.max_time;
    if let Some(drain) = work.drain {
        options.drain = drain;
    }
    options.background = (!work.foreground).then_some(work.background_floor);
    options.allow_hurry = work.allow_hurry;
    options.memory = (work.save_memory > 0).then_some(work.save_memory);
    options.flags.clone_from(&work.commit_flag);
    Ok(options)
}

pub(super) fn agent(roots: Roots, args: &service::Agent) -> anyhow::Result<()> {
    let mut options = agent_settings(roots, &args.work, &args.push, &args.allow)?;
    if let Some(file) = &args.push.creds_file {
        secrets::warn_if_shared(file);
    }
    options.health = args.health_listen.map(listen).transpose()?;
    serve(async |cancel| {
        let queue = redis(&args.queue, Some(&options.node))
            .await?
            .ok_or_else(|| missing("redis", "an agent needs a queue"))?;
        Ok(agent::run(options, queue, cancel).await?)
    })
}

/// Listens on an address for the health of an agent.
fn listen(address: SocketAddr) -> anyhow::Result<Arc<TcpListener>> {
    let bound = TcpListener::bind(address);
    let bound = bound.with_context(|| format!("--health-listen: cannot listen on {address}"))?;
    Ok(Arc::new(bound))
}

pub(super) fn manager(args: &service::Manager) -> anyhow::Result<()> {
    let options = manager_settings(&args.serve, &args.push, args.target.as_deref())?;
    let record = match args.serve.record.as_deref() {
        Some(record) => record,
        None => setup::default_record(RECORD).map_err(Usage)?,
    };
    serve(async |cancel| {
        let queue = redis(&args.queue, None)
            .await?
            .ok_or_else(|| missing("redis", "a manager needs a queue ('up' has its own)"))?;
        let record = open_record(&args.serve, record).await?;
        let server = manager::Server::bind(options, queue, record).await?;
        Ok(server.run(cancel).await?)
    })
}

/// Returns whether a manager that runs as root accesses files or directories of other users, which requires a
/// capability.
pub(super) fn reads_files_of_others(args: &service::Manager) -> bool {
    use std::os::unix::fs::MetadataExt as _;

    let record = args.serve.record.as_deref().unwrap_or(RECORD);
    let record = record.strip_prefix("sqlite:").unwrap_or(record);
    let store = args.target.as_deref().unwrap_or_default();
    let store = store.strip_prefix("oci:").and_then(|s| s.split('{').next());
    let named = [
        args.queue.key_file.as_deref(),
        args.queue.redis_password_file.as_deref(),
        args.serve.record_password_file.as_deref(),
        args.serve.tokens_file.as_deref(),
        args.serve.callers.oidc_client_secret_file.as_deref(),
        args.serve.callers.groups_file.as_deref(),
        args.serve.mail.addresses_file.as_deref(),
        args.serve.mail.smtp_password_file.as_deref(),
        args.serve.mail.smtp_ca_file.as_deref(),
        args.serve.callers.kubeconfig.as_deref(),
        args.push.creds_file.as_deref(),
        args.push.authfile.as_deref(),
        args.push.cert_dir.as_deref(),
        args.serve.callers.jwks.as_deref().map(Path::new),
        Some(Path::new(record)).filter(|path| path.is_absolute()),
        Some(Path::new(record))
            .filter(|path| path.is_absolute())
            .and_then(Path::parent),
        store.map(Path::new),
    ];
    let own = rustix::process::geteuid().as_raw();
    named
        .into_iter()
        .flatten()
        .filter_map(|path| std::fs::metadata(path).ok())
        .any(|file| file.uid() != own)
}

async fn open_record(serve: &service::Serve, place: &str) -> anyhow::Result<Record> {
    let place = with_password(
        "record-password-file",
        place,
        serve.record_password_file.as_deref(),
    )?;
    Ok(Record::open(&place).await?)
}

/// Returns the limits on connections and requests.
fn connection_limits(serve: &service::Serve) -> Result<manager::ConnectionLimits, Usage> {
    let proxies = serve.callers.proxy_from.iter().map(|range| {
        range
            .parse()
            .map_err(|error| Usage(format!("--proxy-from: {error}")))
    });
    Ok(manager::ConnectionLimits {
        connections: serve.connections as usize,
        connections_per_peer: serve.connections_per_peer as usize,
        proxies: proxies.collect::<Result<_, _>>()?,
        streams_per_user: serve.streams_per_user as usize,
        requests_per_user: serve.requests_per_user as usize,
        ..manager::ConnectionLimits::default()
    })
}

/// Returns the settings of a manager, or why it would refuse them.
pub(super) fn manager_settings(
    serve: &service::Serve,
    push: &service::Push,
    target: Option<&str>,
) -> anyhow::Result<manager::Options> {
    let target =
        target.ok_or_else(|| missing("target", "the destination of images has to be known"))?;
    let options = manager_options(serve, push, target, tokens(serve)?)?;
    if callers::lacks_callers(&options) {
        return Err(missing(
            "tokens-file",
            "no user could sign in (--oidc-issuer, --kubernetes-auth, --jwks and --proxy-header are not given either)",
        )
        .into());
    }
    Ok(options)
}

/// Returns the settings of a manager whose images go to `target`.
fn manager_options(
    serve: &service::Serve,
    push: &service::Push,
    target: &str,
    tokens: Tokens,
) -> anyhow::Result<manager::Options> {
    let listen: Listen = serve
        .listen
        .parse()
        .map_err(|error| Usage(format!("--listen: {error}")))?;
    let target: Template = target
        .parse()
        .map_err(|error| Usage(format!("--target: {error}")))?;
    let host = target.host().map(str::to_owned);
    let mut options = manager::Options::new(listen, target);
    options.public_url.clone_from(&serve.public_url);
    options.start_url.clone_from(&serve.start_url);
    options.cors_origins.clone_from(&serve.cors_origin);
    notices::apply(serve, &mut options)?;
    options.tokens = tokens;
    callers::apply(serve, &mut options)?;
    options.connections = connection_limits(serve)?;
    options.open_per_user = serve.open_per_user;
    options.saves_per_day = serve.saves_per_day;
    if !serve.autosave.is_zero() && serve.autosave < serve.autosave_min {
        let why = "--autosave is shorter than --autosave-min";
        return Err(Usage(why.to_owned()).into());
    }
    options.autosave = manager::AutosaveDefaults {
        every: Some(serve.autosave).filter(|every| !every.is_zero()),
        keep: serve.autosave_keep,
        least: serve.autosave_min,
    };
    options.attempts = serve.attempts;
    options.backoff = serve.backoff;
    options.timeout = serve.timeout;
    options.node_lost = serve.node_lost;
    options.order_expiry = serve.order_expiry;
    options.retention = Some(serve.retention).filter(|retention| !retention.is_zero());
    options.reserved_tags.clone_from(&serve.reserved_tag);
    options.rate = (serve.rate > 0).then(|| manager::Rate {
        per_second: serve.rate.into(),
        burst: f64::from(serve.rate) * 10.0,
    });
    options.access = registry::Access {
        authfile: push.authfile.clone(),
        creds: push
            .creds_file
            .as_ref()
            .map(|file| options::creds_of(file))
            .transpose()?,
        tls_verify: push.tls_verify,
        cert_dir: push.cert_dir.clone(),
        host,
        ..registry::Access::default()
    };
    Ok(options)
}

/// Returns the user of `up` if the owner of the sessions is not configured.
fn login() -> String {
    ["SUDO_USER", "USER", "LOGNAME"]
        .into_iter()
        .filter_map(|name| std::env::var(name).ok())
        .find(|name| target::component(name).is_ok_and(|plain| plain == *name))
        .unwrap_or_else(|| "root".to_owned())
}

/// Writes a file that only its owner can read.
fn write_private(file: &Path, content: &str) -> std::io::Result<()> {
    let dir = file.parent().unwrap_or(Path::new("."));
    let mut made = tempfile::NamedTempFile::new_in(dir)?;
    made.write_all(content.as_bytes())?;
    made.persist(file)?;
    Ok(())
}

pub(super) fn up(roots: Roots, mut args: service::Up) -> anyhow::Result<()> {
    let state = args.work.state_dir.clone();
    let state = if state.as_os_str().is_empty() {
        PathBuf::from("/var/lib/upperdeck")
    } else {
        state
    };
    private_files::prepare_dir(&state, crate::save::state_store::is_state_file)
        .with_context(|| format!("cannot use {}", text::path(&state)))?;
    let (template, allowed, images) = match &args.registry {
        Some(registry) => {
            let prefix = registry.trim_end_matches('/');
            (
                format!("{prefix}/{{user}}/{{name}}:{{tag}}"),
                prefix.to_owned(),
                None,
            )
        }
        None => {
            let store = args.store.clone().unwrap_or_else(|| state.join("images"));
            let store = std::path::absolute(&store).context("the working directory is gone")?;
            // A directory that the administrator chose may contain files that are meant to be shared.
            let own = args.store.is_none();
            private_files::prepare_dir(&store, |_| own)
                .with_context(|| format!("cannot use {}", text::path(&store)))?;
            let store = store
                .to_str()
                .ok_or_else(|| Usage("--store is not UTF-8".to_owned()))?;
            (
                format!("oci:{store}/{{user}}/{{name}}:{{tag}}"),
                format!("oci:{store}"),
                Some(PathBuf::from(store)),
            )
        }
    };
    let user = login();
    let token = match &args.token_file {
        Some(file) => secret("token-file", file)?,
        None => zeroize::Zeroizing::new(hex::encode(rand::random::<[u8; 24]>())),
    };
    let tokens = tokens(&args.serve)?
        .with("up", auth::Role::Administrator, Some(&user), &token)
        .map_err(|error| Usage(error.to_string()))?;
    let serve_options = manager_options(&args.serve, &args.push, &template, tokens)?;
    let allowed = allowed
        .parse()
        .map_err(|error| Usage(format!("where images go: {error}")))?;
    let record = args.serve.record.clone();
    let record = record.unwrap_or_else(|| format!("sqlite:{}", state.join("manager.db").display()));
    args.work
        .spool_dir
        .get_or_insert_with(|| state.join("agent"));
    args.work.drain.get_or_insert(UP_DRAIN);
    if args.queue.redis.is_some() && args.queue.key_file.is_none() {
        let file = state.join("key");
        if !file.exists() {
            let key = hex::encode(rand::random::<[u8; 32]>());
            write_private(&file, &format!("{key}\n"))
                .with_context(|| format!("cannot write {}", text::path(&file)))?;
        }
        args.queue.key_file = Some(file);
    }
    let owner = args
        .work
        .owner
        .clone()
        .unwrap_or_else(|| format!("fixed:{user}"));
    let work = agent_options(roots, &args.work, &args.push, &owner, vec![allowed])?;
    serve(async |cancel| {
        let queue = match redis(&args.queue, None).await? {
            Some(queue) => queue,
            None => Queue::Local(queue::Local::new(limits(&args.queue))),
        };
        let record = open_record(&args.serve, &record).await?;
        let server = manager::Server::bind(serve_options, queue.clone(), record).await?;
        let up_file = state.join(client::UP_FILE);
        if let Some(address) = server.address() {
            let url = format!("http://{}/?token={}", reachable(address), token.as_str());
            write_private(&up_file, &format!("{url}\n"))
                .with_context(|| format!("cannot write {}", text::path(&up_file)))?;
            write_stdout(format!("{url}\n").as_bytes())?;
        }
        if let Some(images) = images {
            let cancel = cancel.clone();
            tokio::task::spawn_blocking(move || prune_at_start(&images, &cancel));
        }
        let ended = run_up(server, work, queue, cancel).await;
        // A failure is ignored, because the file may not have been written or may be gone already.
        let _ = std::fs::remove_file(&up_file);
        ended
    })
}

/// Deletes what saves that were killed, and earlier versions, left in the layouts, and lets layouts of earlier versions
/// share their equal blobs.
fn prune_at_start(images: &Path, cancel: &CancellationToken) {
    let options = PruneOptions {
        older_than: FOREIGN_BLOB_AGE,
        dry_run: false,
    };
    match prune(images, options, &mut |_| !cancel.is_cancelled()) {
        Ok(report) => {
            for failed in &report.failed {
                tracing::warn!(error = failed.error, "a layout is not pruned");
            }
            tracing::info!(freed.bytes = report.freed, "the layouts are pruned");
        }
        // There is no layout yet.
        Err(layout::Error::NotALayout { .. }) => {}
        Err(error) => tracing::warn!(%error, "the layouts are not pruned"),
    }
}

/// Runs agent and manager until `cancel`. The agent is stopped first, and the manager once the agent's last reports are
/// recorded. If one of them fails, the other is stopped, too.
async fn run_up(
    server: manager::Server,
    work: agent::Options,
    queue: Queue,
    cancel: CancellationToken,
) -> anyhow::Result<()> {
    let (stop_agent, stop_manager) = (CancellationToken::new(), CancellationToken::new());
    let manager = tokio::spawn(server.run(stop_manager.clone()));
    tokio::pin!(manager);
    let agent = tokio::spawn(agent::run(work, queue.clone(), stop_agent.clone()));
    tokio::pin!(agent);
    let mut early = None;
    let mut worked = None;
    tokio::select! {
        () = cancel.cancelled() => {}
        ended = &mut manager => early = Some(ended),
        ended = &mut agent => worked = Some(ended),
    }
    stop_agent.cancel();
    let worked = match worked {
        Some(worked) => worked,
        None => agent.await,
    };
    let last_words = async {
        while early.is_none() && queue.depth().await.is_ok_and(|depth| depth.reports > 0) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    // Reports that are missing by then are reconciled after the next start.
    let _ = tokio::time::timeout(FINAL_REPORT_TIMEOUT, last_words).await;
    stop_manager.cancel();
    let managed = match early {
        Some(managed) => managed,
        None => manager.await,
    };
    worked.context("the agent broke down")??;
    managed.context("the manager broke down")??;
    Ok(())
}

/// Replaces an unspecified address by the loopback address, so that a browser on this machine can use it.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_that_takes_no_password_is_not_repeated() -> std::io::Result<()> {
        let dir = tempfile::tempdir()?;
        let file = dir.path().join("password");
        std::fs::write(&file, "right\n")?;
        for url in [
            "redis+unix:///run/redis?pass=hunter2",
            "redis://u:hunter2@h:port",
            "mailto:hunter2",
        ] {
            let told = with_password("redis-password-file", url, Some(&file));
            let told = told.err().map(|error| error.to_string());
            let told = told.unwrap_or_default();
            assert!(
                told.starts_with("--redis-password-file") && !told.contains("hunter2"),
                "{told}"
            );
        }
        Ok(())
    }
}
