//! Prepares a machine for a manager or an agent: the user, the directories, the keys, with their owners and modes, as the
//! units and the settings in `deploy` expect them.
//!
//! Every step is taken only if it is needed, so that it can be repeated. A file that exists keeps its content.

mod machine;
mod record;
mod users;

use std::path::{Path, PathBuf};

use serde::Serialize;
use zeroize::Zeroizing;

pub(crate) use self::machine::{Action, State};
pub(crate) use self::record::default_record;
pub(crate) use self::users::managers_group;

use self::machine::{Machine, Owner, ROOT, User};
use crate::common::{escape, private_files, regular_file};
use crate::service::job::Keys;

/// Settings for the start, which the administrator edits.
const SETTINGS: &str = include_str!("../../../deploy/upperdeck.toml");
const CONFIGURATION: &str = "/etc/upperdeck";
const MASTER_KEY: &str = "/etc/upperdeck/master-key";
const NODE_KEY: &str = "/etc/upperdeck/node-key";
/// Directory of root: kept state of containers, the agent's spool.
const NODE_STATE: &str = "/var/lib/upperdeck";
/// Directory of the manager's user: the record.
const MANAGER_STATE: &str = "/var/lib/upperdeck-manager";
/// User that managers run as.
const MANAGER_USER: &str = "upperdeck";
/// Secrets that the administrator provides, with the setting that names each.
const MANAGER_SECRETS: [(&str, &str); 4] = [
    ("/etc/upperdeck/robot", "creds_file"),
    ("/etc/upperdeck/redis-password", "redis_password_file"),
    ("/etc/upperdeck/record-password", "record_password_file"),
    ("/etc/upperdeck/tokens.toml", "tokens_file"),
];
const AGENT_SECRETS: [(&str, &str); 2] = [MANAGER_SECRETS[0], MANAGER_SECRETS[1]];

/// Maximum size of a file with keys, in bytes.
const MAX_KEYS: u64 = 64 << 10;

/// What a machine is prepared for.
#[derive(Clone, Debug)]
pub(crate) enum Purpose {
    /// A manager.
    Manager,
    /// The agent of a node.
    Agent {
        /// Name of the node, from which its key follows.
        node: String,
        /// File with the master keys [default: that of a manager on this machine].
        master_key: Option<PathBuf>,
    },
}

/// How to prepare it.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// What for.
    pub(crate) purpose: Purpose,
    /// Root directory of the machine's files.
    pub(crate) root: PathBuf,
    /// Only find out what would be done.
    pub(crate) dry_run: bool,
}

/// What was done, in order.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// manager or agent.
    pub(crate) purpose: &'static str,
    /// Whether nothing was changed because that was requested.
    pub(crate) dry_run: bool,
    /// The steps.
    pub(crate) actions: Vec<Action>,
}

/// Why a machine cannot be prepared. What was done before stays, and is found again by the next attempt.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// A file or directory cannot be examined, created or changed.
    #[error("{}: {source}", escape::text(&path.display().to_string()))]
    Path {
        /// Path as on the machine's own root.
        path: PathBuf,
        /// Error of the operating system.
        source: std::io::Error,
    },
    /// Something else is where a file or directory has to be, or it cannot be used.
    #[error("{0}")]
    InTheWay(String),
    /// The user cannot be created.
    #[error("the user {user} cannot be created: {reason}")]
    User {
        /// Its name.
        user: &'static str,
        /// What useradd says.
        reason: String,
    },
}

/// Prepares the machine. `done` is called with each step when it is finished.
pub(crate) fn run(options: &Options, mut done: impl FnMut(&Action)) -> Result<Report, Error> {
    // useradd takes no relative prefix.
    let root = std::path::absolute(&options.root).map_err(|source| Error::Path {
        path: options.root.clone(),
        source,
    })?;
    let mut machine = Machine::new(&root, options.dry_run, &mut done);
    let purpose = match &options.purpose {
        Purpose::Manager => {
            manager(&mut machine)?;
            "manager"
        }
        Purpose::Agent { node, master_key } => {
            agent(&mut machine, node, master_key.as_deref())?;
            "agent"
        }
    };
    Ok(Report {
        purpose,
        dry_run: options.dry_run,
        actions: machine.finish(),
    })
}

fn manager(machine: &mut Machine<'_>) -> Result<(), Error> {
    let user = users::find_or_create(machine, MANAGER_USER, MANAGER_STATE)?;
    settings(machine)?;
    let reads = Owner {
        user: ROOT,
        group: user,
    };
    machine.file(MASTER_KEY, 0o640, reads, || {
        let key = Zeroizing::new(hex::encode(rand::random::<[u8; 32]>()));
        Zeroizing::new(format!("{}\n", key.as_str()))
    })?;
    machine.directory(MANAGER_STATE, 0o700, Owner::both(user))?;
    record::move_earlier(machine, user)?;
    for (path, setting) in MANAGER_SECRETS {
        if !machine.secret(path, 0o640, Some(reads))? {
            machine.missing(path, format!("needed if {setting} names it"));
        }
    }
    Ok(())
}

fn agent(machine: &mut Machine<'_>, node: &str, master: Option<&Path>) -> Result<(), Error> {
    settings(machine)?;
    machine.directory(NODE_STATE, 0o700, Owner::both(ROOT))?;
    node_key(machine, node, master)?;
    for (path, setting) in AGENT_SECRETS {
        // A manager on this machine may read them by their group, which is therefore kept.
        if !machine.secret(path, 0o660, None)? {
            machine.missing(path, format!("needed if {setting} names it"));
        }
    }
    Ok(())
}

fn settings(machine: &mut Machine<'_>) -> Result<(), Error> {
    machine.directory(CONFIGURATION, 0o755, Owner::both(ROOT))?;
    machine.file(
        &format!("{CONFIGURATION}/upperdeck.toml"),
        0o644,
        Owner::both(ROOT),
        || Zeroizing::new(SETTINGS.to_owned()),
    )
}

/// Derives the node's key where the master key is on this machine.
fn node_key(machine: &mut Machine<'_>, node: &str, master: Option<&Path>) -> Result<(), Error> {
    if machine.secret(NODE_KEY, 0o600, Some(Owner::both(ROOT)))? {
        return check_node_key(machine, node);
    }
    let master = match master {
        Some(master) => Some(master.to_owned()),
        None => Some(machine.at(MASTER_KEY)).filter(|own| own.exists()),
    };
    let Some(master) = master else {
        let node = escape::text(node);
        machine.missing(
            NODE_KEY,
            format!("on a manager's machine: upperdeck key --key-file {MASTER_KEY} --node {node}"),
        );
        return Ok(());
    };
    let unusable = |reason: String| {
        let file = escape::text(&master.display().to_string());
        Error::InTheWay(format!("the master key {file}: {reason}"))
    };
    let text = key_text(&master).map_err(unusable)?;
    let keys = Keys::parse(&text).map_err(|error| unusable(error.to_string()))?;
    let key = keys
        .node_file(node)
        .map_err(|error| Error::InTheWay(format!("the node's name: {error}")))?;
    machine.file(NODE_KEY, 0o600, Owner::both(ROOT), || key)
}

/// Fails if the agent of this node could not start with the key that is there.
fn check_node_key(machine: &Machine<'_>, node: &str) -> Result<(), Error> {
    let checked = key_text(&machine.at(NODE_KEY)).and_then(|text| {
        let parsed = Keys::parse_node(&text, node);
        parsed.map(drop).map_err(|error| error.to_string())
    });
    checked.map_err(|reason| {
        Error::InTheWay(format!(
            "{NODE_KEY}: {reason}; remove the file to have the key of this node made, or name the node with --node"
        ))
    })
}

/// Reads a file with keys. Fails if other users can read or change it: with the keys, orders can be forged.
fn key_text(path: &Path) -> Result<Zeroizing<String>, String> {
    let file = regular_file::open(path).map_err(|error| error.to_string())?;
    let there = file.metadata().map_err(|error| error.to_string())?;
    if private_files::is_accessible_to_others(&there) {
        return Err(
            "any user of this machine can read or change it: 'chmod 600' it, and replace the keys if they may have been \
             read"
                .to_owned(),
        );
    }
    let bytes = regular_file::read_open(file, MAX_KEYS).map_err(|error| error.to_string())?;
    let text = String::from_utf8(bytes).map_err(|_| "it is not text".to_owned())?;
    Ok(Zeroizing::new(text))
}

impl Owner {
    fn both(user: User) -> Self {
        Self { user, group: user }
    }
}
