//! Flags of the service: `manager`, `agent` and `up`. Each of them can also be set in the environment or in a file, see
//! `config`. Therefore none is required here; missing ones are reported when the options are resolved.

#![allow(
    rustdoc::bare_urls,
    reason = "the comments are what --help prints, where an address is text"
)]

mod callers;
mod doctor;
mod job;
mod kubectl;
mod mail;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum, ValueHint};

pub(in crate::cli) use callers::{Callers, KubernetesPermission};
pub(in crate::cli) use doctor::Doctor;
pub(in crate::cli) use job::{Job, JobAutosave, JobSubmit, JobTimeline};
pub(in crate::cli) use kubectl::{Cluster, Kubectl, KubectlSave, KubectlVerb};
pub(in crate::cli) use mail::Mail;

use super::shared::{Format, LIMITS, REGISTRY};
use super::value::{autosave, autosave_min, duration, floor, size};
use crate::node::background::DEFAULT_FLOOR_PERCENT;
use crate::node::container::Pattern;

const QUEUE: &str = "Queue";
const SERVE: &str = "API and portal";
const NOTICES: &str = "Webhooks";
const MAIL: &str = "E-mail";
const CALLERS: &str = "Who may call";
const WORK: &str = "Node";
const AUTOSAVES: &str = "Autosaves";
const SETTINGS: &str = "Settings";

/// The verbs that the service consists of, and those that talk to it.
#[derive(Debug, Subcommand)]
pub(in crate::cli) enum Verb {
    /// Check this machine's configuration and say how to mend it
    #[command(after_long_help = doctor::DOCTOR_HELP)]
    Doctor(Box<Doctor>),
    /// Request and follow saves through a manager
    #[command(subcommand, after_long_help = job::JOB_HELP)]
    Job(Job),
    /// Save pods of a Kubernetes cluster, as 'kubectl upperdeck'
    #[command(after_long_help = kubectl::KUBECTL_HELP)]
    Kubectl(Box<Kubectl>),
    /// Print the definition of the Save resource for a Kubernetes cluster
    #[command(after_long_help = CRD_HELP)]
    Crd,
    /// Run API, portal and agent in one process, for one machine
    #[command(after_long_help = UP_HELP)]
    Up(Box<Up>),
    /// Run the image manager: API, portal, record, queue
    #[command(after_long_help = MANAGER_HELP)]
    Manager(Box<Manager>),
    /// Run the agent of a node, which executes saves
    #[command(after_long_help = AGENT_HELP)]
    Agent(Box<Agent>),
    /// Prepare this machine for a manager or an agent: user, directories, keys
    #[command(after_long_help = SETUP_HELP)]
    Setup(Setup),
    /// Derive a node's key from the managers' master key
    #[command(after_long_help = KEY_HELP)]
    Key(NodeKey),
}

/// Settings from files.
#[derive(Debug, Args)]
pub(in crate::cli) struct Settings {
    /// Settings in TOML: names of flags with '_' for '-', at the top or in [manager], [agent], [up]
    /// [default: /etc/upperdeck/upperdeck.toml, if it exists]
    #[arg(long, value_name = "FILE", env = "UPPERDECK_CONFIG", hide_env_values = true, value_hint = ValueHint::FilePath, help_heading = SETTINGS)]
    pub(in crate::cli) config: Option<PathBuf>,
    /// Print all settings as such a file, with their origins, and exit
    #[arg(long, help_heading = SETTINGS)]
    pub(in crate::cli) print_config: bool,
}

/// Flags of managers and agents.
#[derive(Debug, Args)]
pub(in crate::cli) struct Queue {
    /// Redis or Valkey, 6.2 or later: redis://[USER@]HOST[:PORT][/DB], rediss:// with TLS, redis+unix:///SOCKET
    #[arg(long, value_name = "URL", value_hint = ValueHint::Url, help_heading = QUEUE)]
    pub(in crate::cli) redis: Option<String>,
    /// File with the password for it (/dev/fd/N for a descriptor)
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = QUEUE)]
    pub(in crate::cli) redis_password_file: Option<PathBuf>,
    /// File with the keys for signing messages between managers and agents. Managers: master keys, one per line; the first
    /// signs, all are accepted. Agents: the node's key, from 'upperdeck key'
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = QUEUE)]
    pub(in crate::cli) key_file: Option<PathBuf>,
    /// Maximum concurrent saves of one user, on all nodes; 0 for no limit
    #[arg(long, value_name = "N", default_value_t = 2, help_heading = QUEUE)]
    pub(in crate::cli) running_per_user: u32,
    /// Maximum concurrent saves on one node; 0 for no limit but the agent's own
    #[arg(long, value_name = "N", default_value_t = 4, help_heading = QUEUE)]
    pub(in crate::cli) running_per_node: u32,
    /// Maximum concurrent saves to one registry, from all nodes; 0 for no limit
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = QUEUE)]
    pub(in crate::cli) running_per_registry: u32,
}

/// Access to registries.
#[derive(Debug, Args)]
pub(in crate::cli) struct Push {
    /// File with USER:PASSWORD for the registry (/dev/fd/N for a descriptor)
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = REGISTRY)]
    pub(in crate::cli) creds_file: Option<PathBuf>,
    /// Credentials file, as written by 'podman login' and 'docker login'
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = REGISTRY)]
    pub(in crate::cli) authfile: Option<PathBuf>,
    /// Directory with additional CA certificates (*.crt) and client certificates (*.cert with *.key)
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, help_heading = REGISTRY)]
    pub(in crate::cli) cert_dir: Option<PathBuf>,
    /// Require HTTPS and verify the registry's certificate
    #[arg(long, value_name = "BOOL", default_value_t = true, default_missing_value = "true", num_args = 0..=1, require_equals = true, action = clap::ArgAction::Set, help_heading = REGISTRY)]
    pub(in crate::cli) tls_verify: bool,
}

/// Flags of a manager.
#[derive(Debug, Args)]
pub(in crate::cli) struct Serve {
    /// IP:PORT or unix:PATH
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8787", help_heading = SERVE)]
    pub(in crate::cli) listen: String,
    /// URL at which browsers reach the manager, e.g. https://save.example.org/; cookies have its path [default: plain HTTP,
    /// with the host of the request]
    #[arg(long, value_name = "URL", value_hint = ValueHint::Url, help_heading = SERVE)]
    pub(in crate::cli) public_url: Option<String>,
    /// Link of the page that starts a session from an image, with {reference} for the image's reference, e.g.
    /// https://hub.example.org/hub/spawn?image={reference}
    #[arg(long, value_name = "URL", value_parser = crate::service::manager::check_start_url, help_heading = SERVE)]
    pub(in crate::cli) start_url: Option<String>,
    /// The record: sqlite:FILE or postgres://[USER@]HOST[:PORT]/DATABASE [default: sqlite:/var/lib/upperdeck/manager.db,
    /// with 'up' manager.db in --state-dir]
    #[arg(long, value_name = "URL", help_heading = SERVE)]
    pub(in crate::cli) record: Option<String>,
    /// File with the password for it (/dev/fd/N for a descriptor)
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = SERVE)]
    pub(in crate::cli) record_password_file: Option<PathBuf>,
    /// Tag that saves must not use, with '*' at its end as a wildcard; may be repeated
    #[arg(long, value_name = "TAG", value_parser = crate::service::manager::check_reserved_tag, help_heading = SERVE)]
    pub(in crate::cli) reserved_tag: Vec<String>,
    /// Time for which finished saves stay in the history, e.g. 90d; 0 for ever
    #[arg(long, value_name = "DURATION", value_parser = duration, default_value = "365d", help_heading = SERVE)]
    pub(in crate::cli) retention: Duration,

    /// Time from the end of a save to the next one, 1s to 7d: running sessions are then saved if something changed. A user, or
    /// the annotation or label upperdeck.io/autosave of a pod, can say otherwise; 0: only those who say so are saved
    #[arg(long, value_name = "DURATION", value_parser = autosave, default_value = "0", help_heading = AUTOSAVES)]
    pub(in crate::cli) autosave: Duration,
    /// Number of the latest autosaves of a session that are kept; of earlier ones, one per hour for a day and one per day
    /// for 30 days
    #[arg(long, value_name = "N", default_value_t = 12, value_parser = clap::value_parser!(u32).range(1..=100), help_heading = AUTOSAVES)]
    pub(in crate::cli) autosave_keep: u32,
    /// Minimum of that time, 1s to 7d, to which shorter ones of users and pods are raised
    #[arg(long, value_name = "DURATION", value_parser = autosave_min, default_value = "5m", help_heading = AUTOSAVES)]
    pub(in crate::cli) autosave_min: Duration,

    /// Origin whose pages may call the API with a token (CORS), e.g. https://portal.example.org; may be repeated
    #[arg(long, value_name = "ORIGIN", help_heading = SERVE)]
    pub(in crate::cli) cors_origin: Vec<crate::service::manager::WebOrigin>,

    /// URL that is told about every save by signed requests; may be repeated
    #[arg(long, value_name = "URL", value_hint = ValueHint::Url, value_parser = crate::service::manager::check_webhook, requires = "webhook_secret_file", help_heading = NOTICES)]
    pub(in crate::cli) webhook: Vec<reqwest::Url>,
    /// File with the secret that signs them, whsec_ and base64, one per line (/dev/fd/N for a descriptor)
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = NOTICES)]
    pub(in crate::cli) webhook_secret_file: Option<PathBuf>,
    /// Origin of URLs that users may name for their own saves, e.g. https://hooks.example.org; may be repeated
    #[arg(long, value_name = "ORIGIN", requires = "webhook_secret_file", help_heading = NOTICES)]
    pub(in crate::cli) notify_origin: Vec<crate::service::manager::WebOrigin>,
    /// Private network in which the hosts of those URLs may be, e.g. 10.1.0.0/16; may be repeated [default: public
    /// addresses only]
    #[arg(long, value_name = "CIDR", help_heading = NOTICES)]
    pub(in crate::cli) notify_network: Vec<crate::service::manager::auth::Range>,
    #[command(flatten)]
    pub(in crate::cli) mail: Mail,

    /// TOML file with API tokens
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = CALLERS)]
    pub(in crate::cli) tokens_file: Option<PathBuf>,
    #[command(flatten)]
    pub(in crate::cli) callers: Callers,

    /// Maximum unfinished saves of one user; 0 for no limit
    #[arg(long, value_name = "N", default_value_t = 100, help_heading = LIMITS)]
    pub(in crate::cli) open_per_user: u32,
    /// Requests per second of one caller, on average; 0 for no limit
    #[arg(long, value_name = "N", default_value_t = 50, help_heading = LIMITS)]
    pub(in crate::cli) rate: u32,
    /// Saves that one user may request in 24 hours; 0 for no limit
    #[arg(long, value_name = "N", default_value_t = 1000, help_heading = LIMITS)]
    pub(in crate::cli) saves_per_day: u32,
    /// Maximum connections; fewer if the hard limit of open files is lower
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..), help_heading = LIMITS)]
    pub(in crate::cli) connections: u32,
    /// Maximum connections of one address (of a /64 with IPv6); a proxy has to be named in --proxy-from
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..), help_heading = LIMITS)]
    pub(in crate::cli) connections_per_peer: u32,
    /// Maximum event streams of one user
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..), help_heading = LIMITS)]
    pub(in crate::cli) streams_per_user: u32,
    /// Maximum concurrent requests of one caller
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..), help_heading = LIMITS)]
    pub(in crate::cli) requests_per_user: u32,
    /// Maximum attempts of a save
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..), help_heading = LIMITS)]
    pub(in crate::cli) attempts: u32,
    /// Delay before the second attempt; it doubles with each further one
    #[arg(long, value_name = "DURATION", value_parser = duration, default_value = "10s", help_heading = LIMITS)]
    pub(in crate::cli) backoff: Duration,
    /// Time limit for one attempt
    #[arg(long, value_name = "DURATION", value_parser = duration, default_value = "4h", help_heading = LIMITS)]
    pub(in crate::cli) timeout: Duration,
    /// Time without a heartbeat after which a node and the saves on it count as lost
    #[arg(long, value_name = "DURATION", value_parser = duration, default_value = "5m", help_heading = LIMITS)]
    pub(in crate::cli) node_lost: Duration,
    /// Maximum time that a save waits for its node
    #[arg(long, value_name = "DURATION", value_parser = duration, default_value = "24h", help_heading = LIMITS)]
    pub(in crate::cli) order_expiry: Duration,
}

/// Flags of an agent.
#[derive(Debug, Args)]
pub(in crate::cli) struct Work {
    /// Unique name of this node [default: the host name]
    #[arg(long, value_name = "NAME", help_heading = WORK)]
    pub(in crate::cli) node: Option<String>,
    /// Rule for a session's owner: namespace[:PATTERN], pod:PATTERN, label:KEY, annotation:KEY, env:NAME or fixed:USER; the
    /// pattern's group is the user
    #[arg(long, value_name = "RULE", help_heading = WORK)]
    pub(in crate::cli) owner: Option<String>,
    /// Save sessions when they end: never, failure (exit code other than 0, or out of memory) or always; the annotation or
    /// label upperdeck.io/save-on-end of a pod says otherwise for it
    #[arg(long, value_name = "WHEN", value_parser = ["never", "failure", "always"], default_value = "never", help_heading = WORK)]
    pub(in crate::cli) save_ended: String,
    /// Volumes that may be saved with a session: /PATH on the node or TYPE:SOURCE, with {user} for the session's owner;
    /// may be repeated [default: none]
    #[arg(long, value_name = "PATTERN", help_heading = WORK)]
    pub(in crate::cli) allow_volume: Vec<Pattern>,
    /// Directory for the agent's state, from which it continues after a restart [default: /var/lib/upperdeck/agent, with
    /// 'up' agent in --state-dir]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, help_heading = WORK)]
    pub(in crate::cli) spool_dir: Option<PathBuf>,
    /// Directory for the state that later saves of a container need to save only changes; empty: keep none
    #[arg(long, value_name = "DIR", default_value = "/var/lib/upperdeck", value_hint = ValueHint::DirPath, help_heading = WORK)]
    pub(in crate::cli) state_dir: PathBuf,
    /// Maximum concurrent saves; fewer while the node is under pressure
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..), help_heading = WORK)]
    pub(in crate::cli) slots: u32,
    /// Minimum threads of one save
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..), help_heading = WORK)]
    pub(in crate::cli) min_threads: u32,
    /// Maximum threads of one save [default: number of cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), help_heading = WORK)]
    pub(in crate::cli) max_threads: Option<u32>,
    /// Run saves at normal priority instead of the lowest
    #[arg(long, help_heading = WORK)]
    pub(in crate::cli) foreground: bool,
    /// Minimum share of the cores for all background saves together, in per cent, once other work has kept all cores busy
    /// for ten seconds; 0: none
    #[arg(long, value_name = "PERCENT", value_parser = floor, default_value_t = DEFAULT_FLOOR_PERCENT, help_heading = WORK)]
    pub(in crate::cli) background_floor: f64,
    /// Allow the owner of a save to have it run at normal priority (job hurry, a button of the page)
    #[arg(long, help_heading = WORK)]
    pub(in crate::cli) allow_hurry: bool,
    /// Memory limit of one save or inspection; 0 for no limit
    #[arg(long, value_name = "SIZE", value_parser = size, default_value = "3G", help_heading = WORK)]
    pub(in crate::cli) save_memory: u64,
    /// Default codec: gzip or zstd
    #[arg(long, value_name = "CODEC", value_parser = ["gzip", "zstd"], help_heading = WORK)]
    pub(in crate::cli) compression: Option<String>,
    /// Maximum time for which a container is frozen, e.g. 300ms
    #[arg(long, value_name = "DURATION", value_parser = duration, help_heading = WORK)]
    pub(in crate::cli) max_pause: Option<Duration>,
    /// Time limit for a save on this node, whatever its order says
    #[arg(long, value_name = "DURATION", value_parser = duration, default_value = "12h", help_heading = WORK)]
    pub(in crate::cli) max_time: Duration,
    /// Time for running saves to finish when the agent stops [default: 5m, with 'up' 10s]
    #[arg(long, value_name = "DURATION", value_parser = duration, help_heading = WORK)]
    pub(in crate::cli) drain: Option<Duration>,
    /// Additional flag of 'commit' for every save, e.g. --commit-flag=--max-size=500G; may be repeated
    #[arg(long, value_name = "FLAG", allow_hyphen_values = true, help_heading = WORK)]
    pub(in crate::cli) commit_flag: Vec<String>,
    /// Create missing projects in Harbor
    #[arg(long, help_heading = REGISTRY)]
    pub(in crate::cli) create_project: bool,
    /// The quota of a project that is made, e.g. 20GiB; Harbor lets only its administrators set it
    #[arg(long, value_name = "SIZE", value_parser = size, requires = "create_project", help_heading = REGISTRY)]
    pub(in crate::cli) project_quota: Option<u64>,
    /// Keep images in Harbor that their last tag moved away from; they count towards the quota
    #[arg(long, help_heading = REGISTRY)]
    pub(in crate::cli) keep_replaced: bool,
    /// Who distributes the images: their annotation org.opencontainers.image.vendor
    #[arg(long, value_name = "NAME", help_heading = REGISTRY)]
    pub(in crate::cli) vendor: Option<String>,
}

pub(super) const MANAGER_HELP: &str = "\
Examples:
  upperdeck manager --redis redis://redis.example.org \\
      --key-file /etc/upperdeck/master-key \\
      --target 'harbor.example.org/sessions/{user}/{name}:{tag}' \\
      --creds-file /etc/upperdeck/robot \\
      --tokens-file /etc/upperdeck/tokens.toml
  upperdeck manager --config /etc/upperdeck/upperdeck.toml --print-config
  UPPERDECK_RECORD=postgres://upperdeck@db.example.org/saves upperdeck manager

The API is described at /openapi.json, the portal is at /, metrics at /metrics, liveness at /healthz, readiness at
/readyz. On SIGTERM, requests in progress are finished. The manager speaks HTTP/1.1 without TLS; use a reverse proxy for TLS and
name it in --proxy-from. Time limits: 10 s for a request's head, 30 s for its body, 30 s for a blocked response, 75 s for
an idle connection.

--target has exactly the placeholders {user}, {name} and {tag}; callers never name a host. Several managers can share one
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
    /// Destination of images, e.g. harbor.example.org/sessions/{user}/{name}:{tag} or oci:/srv/images/{user}/{name}:{tag}
    #[arg(long, value_name = "TEMPLATE", help_heading = SERVE)]
    pub(in crate::cli) target: Option<String>,
    #[command(flatten)]
    pub(in crate::cli) serve: Serve,
    #[command(flatten)]
    pub(in crate::cli) push: Push,
}

pub(super) const AGENT_HELP: &str = "\
Examples:
  upperdeck agent --redis redis://redis.example.org \\
      --key-file /etc/upperdeck/node-key --owner env:JUPYTERHUB_USER \\
      --allow harbor.example.org/sessions --creds-file /etc/upperdeck/robot
  upperdeck agent --host-root /host --node \"$NODE_NAME\" \\
      --owner 'pod:jupyter-(.+)' --allow registry.example.org
  upperdeck agent --config /etc/upperdeck/upperdeck.toml --print-config

Runs once per node, as root. Every save is a separate process ('upperdeck commit') at the lowest priority; it gets its
credentials through a file descriptor. On SIGTERM the agent accepts no more saves, lets running ones finish within
--drain, and returns the others to the queue.

--owner derives the owner of a session from the runtime's record:
  namespace              the pod's namespace
  namespace:user-(.+)    a part of it
  pod:jupyter-(.+)       a part of the pod's name
  label:KEY[:PATTERN]    a label of the pod, or a part of it, as it was
                         when the pod's sandbox was created
  annotation:KEY[:PATTERN]  an annotation of the pod, in the same way
  env:JUPYTERHUB_USER    a variable of the container's environment, as started by the runtime
  fixed:alice            always this user
Whoever creates a pod chooses its labels, annotations and variables: use only those that users cannot set themselves.

Volumes are saved only if they match --allow-volume. They are read with the user, groups and capabilities of the
session's first process; files that it may not read are left out with a warning.
  --allow-volume /home/{user}                     this directory of the node and those below it, bind-mounted
  --allow-volume nfs4:nas.example.org:/home/{user}  a mount of this type, source and directory
The kernel's mount table is compared, in whole path components, never a path in the session.";

/// `agent`.
#[derive(Debug, Args)]
pub(in crate::cli) struct Agent {
    #[command(flatten)]
    pub(in crate::cli) settings: Settings,
    #[command(flatten)]
    pub(in crate::cli) queue: Queue,
    /// Permitted destination of images: HOST[:PORT][/PROJECT] or oci:/DIRECTORY; may be repeated
    #[arg(long, value_name = "PREFIX", help_heading = WORK)]
    pub(in crate::cli) allow: Vec<String>,
    /// Serve /healthz, /readyz and /metrics on this address, e.g. 127.0.0.1:8788, without authentication [default: none]
    #[arg(long, value_name = "IP:PORT", help_heading = WORK)]
    pub(in crate::cli) health_listen: Option<SocketAddr>,
    #[command(flatten)]
    pub(in crate::cli) work: Work,
    #[command(flatten)]
    pub(in crate::cli) push: Push,
}

const CRD_HELP: &str = "\
Examples:
  upperdeck crd | kubectl apply -f -

A manager with --kubernetes-crd saves the pod that a Save names, and writes how far it is to the resource's status:
  apiVersion: upperdeck.io/v1alpha1
  kind: Save
  metadata: {name: monday, namespace: team}
  spec: {pod: notebook-0, image: 'lab:monday', message: with pandas}
  $ kubectl get saves -w";

pub(super) const SETUP_HELP: &str = "\
Examples:
  upperdeck setup manager --dry-run
      Say what would be done.
  upperdeck setup manager
      Create the user upperdeck, a master key, and the directories.
  upperdeck setup agent --node node17 --master-key /root/master-key
      Create the node's key, too; without the master key it says
      how to make it.

It creates what is missing: /etc/upperdeck with settings to edit; for a manager the user upperdeck, the master key and
/var/lib/upperdeck-manager, to which the record of an earlier version is moved; for an agent /var/lib/upperdeck and the
node's key. Owner and mode of what exists are corrected, also of the files with secrets that the settings name; its content
never changes. The last lines list what only the administrator can provide.

JSON: one object
  purpose, dry_run
  actions    [{state, what, detail}]; state: created, changed, unchanged or missing";

/// `setup`.
#[derive(Debug, Args)]
pub(in crate::cli) struct Setup {
    /// What to prepare the machine for
    #[arg(value_enum, value_name = "WHAT")]
    pub(in crate::cli) purpose: SetupPurpose,
    /// Say what would be done, and change nothing
    #[arg(short = 'n', long)]
    pub(in crate::cli) dry_run: bool,
    /// For an agent: name of the node [default: the host name]
    #[arg(long, value_name = "NAME")]
    pub(in crate::cli) node: Option<String>,
    /// For an agent: file with the managers' master keys [default: /etc/upperdeck/master-key, if it exists]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(in crate::cli) master_key: Option<PathBuf>,
    /// Root directory of the machine's files, to prepare an image
    #[arg(long, value_name = "DIR", default_value = "/", value_hint = ValueHint::DirPath)]
    pub(in crate::cli) root: PathBuf,
    /// Output format
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(in crate::cli) format: Format,
}

/// What `setup` prepares a machine for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(in crate::cli) enum SetupPurpose {
    /// An image manager
    Manager,
    /// The agent of a node
    Agent,
}

pub(super) const KEY_HELP: &str = "\
Examples:
  openssl rand -hex 32 > master-key; chmod 600 master-key
      Once, for the managers.
  upperdeck key --key-file master-key --node node17 -o node17.key
      For that node's /etc/upperdeck/node-key.
  upperdeck key --key-file master-key --node node17 | \\
      ssh root@node17 'umask 077; cat > /etc/upperdeck/node-key'

A node's key cannot sign for another node, and the master key cannot be derived from it. The same master key and name
always give the same key; for a file with several master keys, one key is written for each, in order.";

/// `key`.
#[derive(Debug, Args)]
pub(in crate::cli) struct NodeKey {
    /// File with the managers' master keys
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(in crate::cli) key_file: PathBuf,
    /// The node's name: its agent's --node, or its host name
    #[arg(long, value_name = "NAME")]
    pub(in crate::cli) node: String,
    /// Write the key to this file, with mode 0600 [default: stdout]
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(in crate::cli) output: Option<PathBuf>,
}

pub(super) const UP_HELP: &str = "\
Examples:
  upperdeck up
      Save this machine's containers to OCI layouts below
      /var/lib/upperdeck/images. Prints a URL with a token.
  upperdeck up --registry registry.example.org/sessions --creds-file robot
  upperdeck up --redis redis://localhost --key-file key \\
      --registry localhost:5000/sessions
      A manager and an agent to which others can be added.

Runs the manager, this node's agent, the record and, without --redis, the queue in one process, as root, with all files in
--state-dir. Without --owner, all sessions belong to the caller. A new token is created at every start unless --token-file
is given; root's 'upperdeck job' and 'upperdeck image' on this machine find it.";

/// `up`.
#[derive(Debug, Args)]
pub(in crate::cli) struct Up {
    #[command(flatten)]
    pub(in crate::cli) settings: Settings,
    #[command(flatten)]
    pub(in crate::cli) queue: Queue,
    /// Destination of images: HOST[:PORT][/PROJECT] [default: OCI layouts in --store]
    #[arg(long, value_name = "PREFIX", help_heading = REGISTRY)]
    pub(in crate::cli) registry: Option<String>,
    /// Directory of the OCI layouts, one per image name [default: images in --state-dir]
    #[arg(long, value_name = "DIR", conflicts_with = "registry", value_hint = ValueHint::DirPath, help_heading = REGISTRY)]
    pub(in crate::cli) store: Option<PathBuf>,
    /// File with the token to sign in with [default: a new token]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = CALLERS)]
    pub(in crate::cli) token_file: Option<PathBuf>,
    #[command(flatten)]
    pub(in crate::cli) serve: Serve,
    #[command(flatten)]
    pub(in crate::cli) work: Work,
    #[command(flatten)]
    pub(in crate::cli) push: Push,
}
