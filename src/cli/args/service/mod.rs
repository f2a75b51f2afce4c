//! Flags of the service: `manager`, `agent` and `up`. Each of them can also be set in the environment or in a file, see
//! `config`. Therefore none is required here; missing ones are reported when the options are resolved.

#![allow(
    rustdoc::bare_urls,
    reason = "the comments are what --help prints, where an address is text"
)]

mod doctor;
mod job;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueHint};

pub(in crate::cli) use doctor::Doctor;
pub(in crate::cli) use job::{Job, JobSubmit};

use super::shared::{LIMITS, REGISTRY};
use super::value::{duration, floor, key_value, size};
use crate::node::background::DEFAULT_FLOOR_PERCENT;
use crate::node::container::Pattern;

const QUEUE: &str = "Queue";
const SERVE: &str = "API and portal";
const CALLERS: &str = "Who may call";
const WORK: &str = "Node";
const SETTINGS: &str = "Settings";

/// The verbs that the service consists of, and those that talk to it.
#[derive(Debug, Subcommand)]
pub(in crate::cli) enum Verb {
    /// Say what is missing or weak on this machine, and what to do about it
    #[command(after_long_help = doctor::DOCTOR_HELP)]
    Doctor(Box<Doctor>),
    /// Save by way of a manager, and follow what becomes of it
    #[command(subcommand, after_long_help = job::JOB_HELP)]
    Job(Job),
    /// Everything on one machine, in one process: API, portal, agent
    #[command(after_long_help = UP_HELP)]
    Up(Box<Up>),
    /// Run the image manager: API and portal, record, queue
    #[command(after_long_help = MANAGER_HELP)]
    Manager(Box<Manager>),
    /// Run a node's agent: saves what the managers ask for
    #[command(after_long_help = AGENT_HELP)]
    Agent(Box<Agent>),
    /// Make the key of one node's agent from the managers' master key
    #[command(after_long_help = KEY_HELP)]
    Key(NodeKey),
}

/// Where settings come from besides the flags.
#[derive(Debug, Args)]
pub(in crate::cli) struct Settings {
    /// Settings in TOML: the flags' names with '_' for '-', at the top for all verbs or in [manager], [agent], [up]
    /// [default: /etc/upperdeck/upperdeck.toml, if it is there]
    #[arg(long, value_name = "FILE", env = "UPPERDECK_CONFIG", hide_env_values = true, value_hint = ValueHint::FilePath, help_heading = SETTINGS)]
    pub(in crate::cli) config: Option<PathBuf>,
    /// Print all settings as such a file, each with where it comes from, and end
    #[arg(long, help_heading = SETTINGS)]
    pub(in crate::cli) print_config: bool,
}

/// What managers and agents share.
#[derive(Debug, Args)]
pub(in crate::cli) struct Queue {
    /// Redis or Valkey, 6.2 or later: redis://[USER@]HOST[:PORT][/DB], rediss:// with TLS, redis+unix:///SOCKET
    #[arg(long, value_name = "URL", value_hint = ValueHint::Url, help_heading = QUEUE)]
    pub(in crate::cli) redis: Option<String>,
    /// File with the password for it (/dev/fd/N for a descriptor)
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = QUEUE)]
    pub(in crate::cli) redis_password_file: Option<PathBuf>,
    /// File with the keys that messages between managers and agents are signed with. Managers: master keys, one a line; the
    /// first signs, all are accepted. Agents: the node's own, as 'upperdeck key' makes it
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = QUEUE)]
    pub(in crate::cli) key_file: Option<PathBuf>,
    /// Saves of one user that run at once, on all nodes; 0 for no bound
    #[arg(long, value_name = "N", default_value_t = 2, help_heading = QUEUE)]
    pub(in crate::cli) running_per_user: u32,
    /// Saves that run at once on one node; 0 for no bound but the agent's own
    #[arg(long, value_name = "N", default_value_t = 4, help_heading = QUEUE)]
    pub(in crate::cli) running_per_node: u32,
    /// Saves that run at once into one registry, from all nodes; 0 for no bound
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = QUEUE)]
    pub(in crate::cli) running_per_registry: u32,
}

/// How registries are reached.
#[derive(Debug, Args)]
pub(in crate::cli) struct Push {
    /// File with USER:PASSWORD for the registry (/dev/fd/N for a descriptor)
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = REGISTRY)]
    pub(in crate::cli) creds_file: Option<PathBuf>,
    /// Credentials file, as 'podman login' and 'docker login' write it
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = REGISTRY)]
    pub(in crate::cli) authfile: Option<PathBuf>,
    /// Directory with *.crt of further authorities, and *.cert with *.key of this client
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, help_heading = REGISTRY)]
    pub(in crate::cli) cert_dir: Option<PathBuf>,
    /// Whether the registry's certificate is checked; false also allows plain HTTP
    #[arg(long, value_name = "BOOL", default_value_t = true, default_missing_value = "true", num_args = 0..=1, require_equals = true, action = clap::ArgAction::Set, help_heading = REGISTRY)]
    pub(in crate::cli) tls_verify: bool,
}

/// What a manager decides.
#[derive(Debug, Args)]
pub(in crate::cli) struct Serve {
    /// IP:PORT or unix:PATH
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8787", help_heading = SERVE)]
    pub(in crate::cli) listen: String,
    /// How browsers reach it, e.g. https://save.example.org/; its path is the cookie's [default: as they say, over plain
    /// HTTP]
    #[arg(long, value_name = "URL", value_hint = ValueHint::Url, help_heading = SERVE)]
    pub(in crate::cli) public_url: Option<String>,
    /// The record: sqlite:FILE or postgres://[USER@]HOST[:PORT]/DATABASE [default: sqlite:/var/lib/upperdeck/manager.db,
    /// with 'up' manager.db in --state-dir]
    #[arg(long, value_name = "URL", help_heading = SERVE)]
    pub(in crate::cli) record: Option<String>,
    /// File with the password for it (/dev/fd/N for a descriptor)
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = SERVE)]
    pub(in crate::cli) record_password_file: Option<PathBuf>,
    /// A tag that no save may take, '*' at its end for anything; may be repeated
    #[arg(long, value_name = "TAG", help_heading = SERVE)]
    pub(in crate::cli) reserved_tag: Vec<String>,
    /// How long done saves stay in the history, e.g. 90d; 0 for ever
    #[arg(long, value_name = "DURATION", value_parser = duration, default_value = "365d", help_heading = SERVE)]
    pub(in crate::cli) retention: Duration,

    /// API tokens: a TOML file
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = CALLERS)]
    pub(in crate::cli) tokens_file: Option<PathBuf>,
    /// Key set that users' JSON Web Tokens are checked with: a file, or an https:// address
    #[arg(long, value_name = "FILE|URL", help_heading = CALLERS)]
    pub(in crate::cli) jwks: Option<String>,
    /// Who must have issued them
    #[arg(long, value_name = "ISSUER", help_heading = CALLERS)]
    pub(in crate::cli) jwt_issuer: Option<String>,
    /// For whom they must be
    #[arg(long, value_name = "AUDIENCE", help_heading = CALLERS)]
    pub(in crate::cli) jwt_audience: Option<String>,
    /// The claim that is the user's name
    #[arg(long, value_name = "CLAIM", default_value = "sub", help_heading = CALLERS)]
    pub(in crate::cli) jwt_user_claim: String,
    /// The claim and the value that it is or has for administrators, e.g. realm_access.roles=upperdeck-admin
    #[arg(long, value_name = "CLAIM=VALUE", value_parser = key_value, help_heading = CALLERS)]
    pub(in crate::cli) jwt_admin_claim: Option<(String, String)>,
    /// A user, by token or by proxy, who is an administrator; may be repeated
    #[arg(long, value_name = "USER", help_heading = CALLERS)]
    pub(in crate::cli) administrator: Vec<String>,
    /// Header in which a proxy says who the user is; believed only from --proxy-from
    #[arg(long, value_name = "NAME", help_heading = CALLERS)]
    pub(in crate::cli) proxy_header: Option<String>,
    /// Addresses of the proxy in front, e.g. 10.1.0.0/16, or unix for a socket file; its connections are many people's and
    /// not bound by --connections-per-peer; may be repeated
    #[arg(long, value_name = "CIDR", help_heading = CALLERS)]
    pub(in crate::cli) proxy_from: Vec<String>,

    /// Saves of one user that may wait or run at once; 0 for no bound
    #[arg(long, value_name = "N", default_value_t = 100, help_heading = LIMITS)]
    pub(in crate::cli) open_per_user: u32,
    /// Requests a second of one caller, in the long run; 0 for no bound
    #[arg(long, value_name = "N", default_value_t = 50, help_heading = LIMITS)]
    pub(in crate::cli) rate: u32,
    /// Saves that one user may ask for in 24 hours; 0 for no bound
    #[arg(long, value_name = "N", default_value_t = 1000, help_heading = LIMITS)]
    pub(in crate::cli) saves_per_day: u32,
    /// Connections at once; fewer where the hard limit of open files is lower
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..), help_heading = LIMITS)]
    pub(in crate::cli) connections: u32,
    /// Connections at once of one address (with IPv6: of one /64); name a proxy in --proxy-from
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..), help_heading = LIMITS)]
    pub(in crate::cli) connections_per_peer: u32,
    /// Event streams at once of one user
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..), help_heading = LIMITS)]
    pub(in crate::cli) streams_per_user: u32,
    /// Requests at once of one caller
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..), help_heading = LIMITS)]
    pub(in crate::cli) requests_per_user: u32,
    /// How often a save is tried in all
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..), help_heading = LIMITS)]
    pub(in crate::cli) attempts: u32,
    /// The pause before the second attempt; each further one is twice as long
    #[arg(long, value_name = "DURATION", value_parser = duration, default_value = "10s", help_heading = LIMITS)]
    pub(in crate::cli) backoff: Duration,
    /// The longest that one attempt may run
    #[arg(long, value_name = "DURATION", value_parser = duration, default_value = "4h", help_heading = LIMITS)]
    pub(in crate::cli) timeout: Duration,
    /// A node that has not been heard of for so long is lost, and with it the saves of its sessions
    #[arg(long, value_name = "DURATION", value_parser = duration, default_value = "5m", help_heading = LIMITS)]
    pub(in crate::cli) node_lost: Duration,
    /// A save that has waited for so long fails
    #[arg(long, value_name = "DURATION", value_parser = duration, default_value = "24h", help_heading = LIMITS)]
    pub(in crate::cli) order_expiry: Duration,
}

/// What a node's agent decides.
#[derive(Debug, Args)]
pub(in crate::cli) struct Work {
    /// This node's name, unique [default: the host's]
    #[arg(long, value_name = "NAME", help_heading = WORK)]
    pub(in crate::cli) node: Option<String>,
    /// Whose a session is: namespace[:PATTERN], pod:PATTERN, env:NAME or fixed:USER; the pattern's group is the user
    #[arg(long, value_name = "RULE", help_heading = WORK)]
    pub(in crate::cli) owner: Option<String>,
    /// Volumes that sessions may have saved with them: /PATH on the node or TYPE:SOURCE, with {user} for the session's
    /// owner; may be repeated [default: none]
    #[arg(long, value_name = "PATTERN", help_heading = WORK)]
    pub(in crate::cli) allow_volume: Vec<Pattern>,
    /// Where the agent notes what runs, so that its own death costs nothing [default: /var/lib/upperdeck/agent, with 'up'
    /// agent in --state-dir]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, help_heading = WORK)]
    pub(in crate::cli) spool_dir: Option<PathBuf>,
    /// Where this node keeps what it needs to save only what changed since the last save; empty for nowhere
    #[arg(long, value_name = "DIR", default_value = "/var/lib/upperdeck", value_hint = ValueHint::DirPath, help_heading = WORK)]
    pub(in crate::cli) state_dir: PathBuf,
    /// Saves at once, at most; the pressure on the node may make it fewer
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..), help_heading = WORK)]
    pub(in crate::cli) slots: u32,
    /// Threads of one save, at least
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..), help_heading = WORK)]
    pub(in crate::cli) min_threads: u32,
    /// Threads of one save, at most [default: the cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), help_heading = WORK)]
    pub(in crate::cli) max_threads: Option<u32>,
    /// Run saves at the usual priority, and not at the lowest
    #[arg(long, help_heading = WORK)]
    pub(in crate::cli) foreground: bool,
    /// What all saves at the lowest priority get together where others want every core for more than ten seconds: per cent
    /// of the node's cores; 0 for nothing
    #[arg(long, value_name = "PERCENT", value_parser = floor, default_value_t = DEFAULT_FLOOR_PERCENT, help_heading = WORK)]
    pub(in crate::cli) background_floor: f64,
    /// The most memory that one save, or one look into a session, may take; 0 for no bound
    #[arg(long, value_name = "SIZE", value_parser = size, default_value = "3G", help_heading = WORK)]
    pub(in crate::cli) save_memory: u64,
    /// Codec where a save asks for none: gzip or zstd
    #[arg(long, value_name = "CODEC", value_parser = ["gzip", "zstd"], help_heading = WORK)]
    pub(in crate::cli) compression: Option<String>,
    /// The longest that a container may stand still, e.g. 300ms
    #[arg(long, value_name = "DURATION", value_parser = duration, help_heading = WORK)]
    pub(in crate::cli) max_pause: Option<Duration>,
    /// The longest that a save may run on this node, whatever its order says
    #[arg(long, value_name = "DURATION", value_parser = duration, default_value = "12h", help_heading = WORK)]
    pub(in crate::cli) max_time: Duration,
    /// How long running saves may go on when the agent is told to end [default: 5m, with 'up' 10s]
    #[arg(long, value_name = "DURATION", value_parser = duration, help_heading = WORK)]
    pub(in crate::cli) drain: Option<Duration>,
    /// A further flag of 'commit' for every save, e.g. --commit-flag=--max-size=500G; may be repeated
    #[arg(long, value_name = "FLAG", allow_hyphen_values = true, help_heading = WORK)]
    pub(in crate::cli) commit_flag: Vec<String>,
    /// Make a missing project in Harbor
    #[arg(long, help_heading = REGISTRY)]
    pub(in crate::cli) create_project: bool,
    /// The quota of a project that is made, e.g. 20GiB; Harbor lets only its administrators set it
    #[arg(long, value_name = "SIZE", value_parser = size, requires = "create_project", help_heading = REGISTRY)]
    pub(in crate::cli) project_quota: Option<u64>,
    /// Keep images in Harbor that their last tag moved away from; they count towards the quota
    #[arg(long, help_heading = REGISTRY)]
    pub(in crate::cli) keep_replaced: bool,
}

pub(super) const MANAGER_HELP: &str = "\
Examples:
  upperdeck manager --redis redis://redis.example.org --key-file /etc/upperdeck/master-key \\
      --target 'harbor.example.org/sessions/{user}/{name}:{tag}' --creds-file /etc/upperdeck/robot \\
      --tokens-file /etc/upperdeck/tokens.toml
  upperdeck manager --config /etc/upperdeck/upperdeck.toml --print-config
  UPPERDECK_RECORD=postgres://upperdeck@db.example.org/upperdeck upperdeck manager

The API is described at /openapi.json, the portal is at /, metrics at /metrics, liveness at /healthz, readiness at
/readyz. SIGTERM lets requests under way end. HTTP/1.1 without TLS: a proxy in front has that, and is named in --proxy-from.
A request's head has 10 s, its body 30 s, an answer that is not taken 30 s, a connection without a request 75 s.

--target has exactly the places {user}, {name} and {tag}; the caller never names a host. Two managers at once work on one
PostgreSQL record.

A tokens file:
  [[token]]
  name = \"portal\"
  role = \"portal\"            # may act for any user (header Upperdeck-User); or user, administrator
  sha256 = \"...\"             # of the token: printf %s \"$token\" | sha256sum
  [[token]]
  name = \"alice\"
  role = \"user\"
  user = \"alice\"
  sha256 = \"...\"";

/// `manager`.
#[derive(Debug, Args)]
pub(in crate::cli) struct Manager {
    #[command(flatten)]
    pub(in crate::cli) settings: Settings,
    #[command(flatten)]
    pub(in crate::cli) queue: Queue,
    /// Where images go, e.g. harbor.example.org/sessions/{user}/{name}:{tag} or oci:/srv/images/{user}/{name}:{tag}
    #[arg(long, value_name = "TEMPLATE", help_heading = SERVE)]
    pub(in crate::cli) target: Option<String>,
    #[command(flatten)]
    pub(in crate::cli) serve: Serve,
    #[command(flatten)]
    pub(in crate::cli) push: Push,
}

pub(super) const AGENT_HELP: &str = "\
Examples:
  upperdeck agent --redis redis://redis.example.org --key-file /etc/upperdeck/node-key --owner env:JUPYTERHUB_USER \\
      --allow harbor.example.org/sessions --creds-file /etc/upperdeck/robot
  upperdeck agent --host-root /host --node \"$NODE_NAME\" --owner 'pod:jupyter-(.+)' --allow registry.example.org
  upperdeck agent --config /etc/upperdeck/upperdeck.toml --print-config

One a node, as root. Every save is a process of its own ('upperdeck commit'), at the lowest priority, with its
credentials on a descriptor. SIGTERM: takes no more, lets what runs end within --drain, gives the rest back.

--owner says whose a session is, from what the runtime wrote down:
  namespace              the pod's namespace is the user
  namespace:user-(.+)    a part of it is
  pod:jupyter-(.+)       a part of the pod's name is
  env:JUPYTERHUB_USER    a variable of the container's environment is, as the runtime started it
  fixed:alice            always the same

Volumes are saved only where --allow-volume lists them, and read with the user, groups and capabilities of the session's
first process: what it may not read is left out, with a warning.
  --allow-volume /home/{user}                     what lies there on this node, and below: a bind mount of it
  --allow-volume nfs4:nas.example.org:/home/{user}  what is mounted from there: the type, source and directory of the mount
The kernel's word on the mount is compared, in whole components, never a path in the session.";

/// `agent`.
#[derive(Debug, Args)]
pub(in crate::cli) struct Agent {
    #[command(flatten)]
    pub(in crate::cli) settings: Settings,
    #[command(flatten)]
    pub(in crate::cli) queue: Queue,
    /// Where images may go: HOST[:PORT][/PROJECT] or oci:/DIRECTORY; may be repeated
    #[arg(long, value_name = "PREFIX", help_heading = WORK)]
    pub(in crate::cli) allow: Vec<String>,
    #[command(flatten)]
    pub(in crate::cli) work: Work,
    #[command(flatten)]
    pub(in crate::cli) push: Push,
}

pub(super) const KEY_HELP: &str = "\
Examples:
  openssl rand -hex 32 > master-key; chmod 600 master-key           # once, for the managers
  upperdeck key --key-file master-key --node node17 -o node17.key   # for that node's /etc/upperdeck/node-key
  upperdeck key --key-file master-key --node node17 | ssh root@node17 'umask 077; cat > /etc/upperdeck/node-key'

With a node's key nothing can be signed for another node, and the master key does not follow from it. The same master key
and name give the same key each time; one with several lines gives a key for each, in their order.";

/// `key`.
#[derive(Debug, Args)]
pub(in crate::cli) struct NodeKey {
    /// File with the managers' master keys
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(in crate::cli) key_file: PathBuf,
    /// The node's name, as its agent is given it (--node), or the host's
    #[arg(long, value_name = "NAME")]
    pub(in crate::cli) node: String,
    /// Write it there, for its owner alone [default: stdout]
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(in crate::cli) output: Option<PathBuf>,
}

pub(super) const UP_HELP: &str = "\
Examples:
  upperdeck up
      Saves of this machine's containers, into OCI layouts below /var/lib/upperdeck/images; prints a URL with a token.
  upperdeck up --registry registry.example.org/sessions --creds-file robot
  upperdeck up --redis redis://localhost --key-file key --registry localhost:5000/sessions
      A manager and an agent that others can join.

All of it in one process, as root: the manager, this node's agent, the record and, without --redis, the queue; the files
are in --state-dir. Without --owner all sessions are the caller's own. The token is made anew at every start, unless
--token-file has one; 'upperdeck job' and 'upperdeck image' on this machine find it by themselves, as root.";

/// `up`.
#[derive(Debug, Args)]
pub(in crate::cli) struct Up {
    #[command(flatten)]
    pub(in crate::cli) settings: Settings,
    #[command(flatten)]
    pub(in crate::cli) queue: Queue,
    /// Where images go: HOST[:PORT][/PROJECT] [default: OCI layouts in --store]
    #[arg(long, value_name = "PREFIX", help_heading = REGISTRY)]
    pub(in crate::cli) registry: Option<String>,
    /// Directory of the OCI layouts, one for each image's name [default: images in --state-dir]
    #[arg(long, value_name = "DIR", conflicts_with = "registry", value_hint = ValueHint::DirPath, help_heading = REGISTRY)]
    pub(in crate::cli) store: Option<PathBuf>,
    /// File with the token to log in with [default: a new one]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = CALLERS)]
    pub(in crate::cli) token_file: Option<PathBuf>,
    #[command(flatten)]
    pub(in crate::cli) serve: Serve,
    #[command(flatten)]
    pub(in crate::cli) work: Work,
    #[command(flatten)]
    pub(in crate::cli) push: Push,
}
