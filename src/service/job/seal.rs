//! Messages between managers and agents are signed: who can write to Redis can make nobody act, and a node whose key is
//! known to a stranger speaks for itself alone.
//!
//! Managers hold the master keys; a node has a key of its own, made from a master key and its name, from which nothing
//! follows about another one's. From a node's key follow two: one signs what goes to the node, the other what comes from
//! it. A signature is HMAC-SHA256 (RFC 2104) over the kind of the message, the node and the body, with zero bytes between:
//! none can be shown as one of another kind, of another node or of the other direction. How old a message may be is said
//! in the message, as it differs from kind to kind. Of several keys the first signs and all are accepted, so that keys
//! can be rotated without a gap.

use hmac::{Hmac, KeyInit, Mac};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use zeroize::Zeroizing;

/// Shorter keys can be guessed.
const MIN_KEY: usize = 16;
/// What is larger is none of ours: an inventory of a thousand sessions is far smaller.
const MAX_BODY: usize = 16 << 20;
/// Before each key in a node's file, with the version of how it was made.
const NODE_KEY: &str = "upperdeck-node-key-1";
/// Longest name of a node, in bytes: as a host may be called.
const MAX_NODE: usize = 253;

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// [`super::Order`].
    Order,
    /// [`super::Answer`].
    Answer,
    /// [`super::Question`].
    Question,
    /// [`super::Report`].
    Report,
    /// [`super::Node`].
    Heartbeat,
    /// Sessions of a node.
    Inventory,
}

impl Message {
    /// As it is signed.
    fn name(self) -> &'static str {
        match self {
            Self::Order => "order",
            Self::Answer => "answer",
            Self::Question => "question",
            Self::Report => "report",
            Self::Heartbeat => "heartbeat",
            Self::Inventory => "inventory",
        }
    }

    /// The label of the key for its direction.
    fn direction(self) -> &'static str {
        match self {
            Self::Order | Self::Answer => "upperdeck to the node",
            Self::Question | Self::Report | Self::Heartbeat | Self::Inventory => {
                "upperdeck to the managers"
            }
        }
    }
}

impl std::fmt::Display for Message {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

type Key = Zeroizing<Vec<u8>>;

/// What a process may sign and check.
#[derive(Clone)]
pub struct Keys(Held);

#[derive(Clone)]
enum Held {
    /// For every node.
    Master(Vec<Key>),
    /// For one.
    Node { name: String, keys: Vec<Key> },
}

/// A signed message, as it lies in the queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sealed {
    /// JSON.
    pub body: String,
    /// Lower-case hexadecimal.
    pub mac: String,
}

/// Why a message is not acted on, or keys cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// Keys that are no keys.
    #[error("the key has {0} bytes; {MIN_KEY} are the least (openssl rand -hex 32 makes one)")]
    ShortKey(usize),
    /// None at all.
    #[error("there is no key")]
    NoKey,
    /// An agent was given what managers have, or a file from before nodes had keys of their own.
    #[error(
        "this is a master key, with which every node's orders can be signed: it belongs on managers only. An agent takes \
         its node's key, which 'upperdeck key --key-file MASTER --node {node}' prints on a manager"
    )]
    MasterKey {
        /// The agent's.
        node: String,
    },
    /// A manager was given what an agent has.
    #[error("this is the key of one node; a manager takes the master key that it was made from")]
    NodeKey,
    /// Another agent's key.
    #[error(
        "this is the key of node {found:?}, and this agent's node is {node:?}: print its own with 'upperdeck key', or \
         correct --node"
    )]
    OtherNode {
        /// In the file.
        found: String,
        /// The agent's.
        node: String,
    },
    /// A line that looks like a node's key and is none.
    #[error("line {0} is no node's key: print it anew with 'upperdeck key'")]
    Broken(usize),
    /// A name that cannot be a node's.
    #[error(
        "{0:?} cannot be a node's name: 1 to {MAX_NODE} bytes, no blanks at its ends, no control characters"
    )]
    Name(String),
    /// A key of one node for another one's message.
    #[error("the key of node {0:?} neither signs nor checks what is another node's")]
    NotOurs(String),
    /// Not signed by any of them.
    #[error("this {0} is not signed with our keys")]
    Forged(Message),
    /// Signed, and not understood: another version's.
    #[error("this {message} cannot be read: {reason}")]
    Unreadable {
        /// What it is.
        message: Message,
        /// What the parser says.
        reason: String,
    },
}

fn mac(key: &[u8], parts: &[&str]) -> Hmac<Sha256> {
    // HMAC takes keys of any length.
    #[allow(
        clippy::expect_used,
        reason = "the error exists for fixed-length MACs only"
    )]
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("any length");
    for (n, part) in parts.iter().enumerate() {
        if n > 0 {
            mac.update(&[0]);
        }
        mac.update(part.as_bytes());
    }
    mac
}

fn derive(key: &[u8], parts: &[&str]) -> Key {
    Zeroizing::new(mac(key, parts).finalize().into_bytes().to_vec())
}

/// A node's key.
fn node_key(master: &[u8], node: &str) -> Key {
    derive(master, &["upperdeck node key 1", node])
}

/// Lines that count, with their numbers from 1.
fn lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    (1..)
        .zip(text.lines().map(str::trim))
        .filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
}

fn check_name(node: &str) -> Result<(), SealError> {
    let fine = !node.is_empty()
        && node.len() <= MAX_NODE
        && node.trim() == node
        && !node.chars().any(char::is_control);
    fine.then_some(())
        .ok_or_else(|| SealError::Name(node.chars().take(MAX_NODE).collect()))
}

impl Keys {
    /// A manager's, from text: one master key a line, the first one signs; empty lines and lines with `#` in front do
    /// not count.
    pub fn parse(text: &str) -> Result<Self, SealError> {
        let mut keys = Vec::new();
        for (_, line) in lines(text) {
            if line.starts_with(NODE_KEY) {
                return Err(SealError::NodeKey);
            }
            if line.len() < MIN_KEY {
                return Err(SealError::ShortKey(line.len()));
            }
            keys.push(Zeroizing::new(line.as_bytes().to_vec()));
        }
        if keys.is_empty() {
            return Err(SealError::NoKey);
        }
        Ok(Self(Held::Master(keys)))
    }

    /// An agent's, from what [`Keys::node_file`] made for `node`.
    pub fn parse_node(text: &str, node: &str) -> Result<Self, SealError> {
        check_name(node)?;
        let mut keys = Vec::new();
        for (number, line) in lines(text) {
            let rest = line
                .strip_prefix(NODE_KEY)
                .ok_or_else(|| SealError::MasterKey {
                    node: node.to_owned(),
                })?;
            let (key, name) = rest
                .trim_start()
                .split_once(' ')
                .ok_or(SealError::Broken(number))?;
            if name != node {
                return Err(SealError::OtherNode {
                    found: name.to_owned(),
                    node: node.to_owned(),
                });
            }
            match hex::decode(key) {
                Ok(key) if key.len() == 32 => keys.push(Zeroizing::new(key)),
                _ => return Err(SealError::Broken(number)),
            }
        }
        if keys.is_empty() {
            return Err(SealError::NoKey);
        }
        let name = node.to_owned();
        Ok(Self(Held::Node { name, keys }))
    }

    /// The key file of `node`'s agent: a key for each of the master keys, in their order.
    pub fn node_file(&self, node: &str) -> Result<Zeroizing<String>, SealError> {
        check_name(node)?;
        let mut text = Zeroizing::new(format!(
            "# The key of upperdeck's agent on {node}. With it nothing can be signed for another node.\n"
        ));
        for key in self.of_node(node)? {
            let key = Zeroizing::new(hex::encode(&*key));
            text.push_str(&format!("{NODE_KEY} {} {node}\n", key.as_str()));
        }
        Ok(text)
    }

    /// A new master key that nothing else knows: for a manager and an agent in one process.
    pub fn random() -> Self {
        let key: [u8; 32] = rand::random();
        Self(Held::Master(vec![Zeroizing::new(key.to_vec())]))
    }

    /// The keys of `node`, the one that signs first.
    fn of_node(&self, node: &str) -> Result<Vec<Key>, SealError> {
        match &self.0 {
            Held::Master(keys) => Ok(keys.iter().map(|key| node_key(key, node)).collect()),
            Held::Node { name, keys } if name == node => Ok(keys.clone()),
            Held::Node { name, .. } => Err(SealError::NotOurs(name.clone())),
        }
    }

    fn mac(key: &[u8], message: Message, node: &str, body: &str) -> Hmac<Sha256> {
        let key = derive(key, &[message.direction()]);
        mac(&key, &[message.name(), node, body])
    }

    /// Signs `content`, which goes to `node` or comes from it.
    pub fn seal<T: Serialize>(
        &self,
        message: Message,
        node: &str,
        content: &T,
    ) -> Result<Sealed, SealError> {
        let body = serde_json::to_string(content).map_err(|error| SealError::Unreadable {
            message,
            reason: error.to_string(),
        })?;
        let keys = self.of_node(node)?;
        let first = keys.first().ok_or(SealError::NoKey)?;
        let mac = hex::encode(
            Self::mac(first, message, node, &body)
                .finalize()
                .into_bytes(),
        );
        Ok(Sealed { body, mac })
    }

    /// The message, if it was signed as one of `node` with one of the keys.
    pub fn open<T: DeserializeOwned>(
        &self,
        message: Message,
        node: &str,
        sealed: &Sealed,
    ) -> Result<T, SealError> {
        let given = hex::decode(&sealed.mac).unwrap_or_default();
        let keys = self.of_node(node)?;
        let genuine = sealed.body.len() <= MAX_BODY
            && keys.iter().any(|key| {
                Self::mac(key, message, node, &sealed.body)
                    .verify_slice(&given)
                    .is_ok()
            });
        if !genuine {
            return Err(SealError::Forged(message));
        }
        serde_json::from_str(&sealed.body).map_err(|error| SealError::Unreadable {
            message,
            reason: error.to_string(),
        })
    }
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.0 {
            Held::Master(keys) => write!(f, "Keys({} master)", keys.len()),
            Held::Node { name, keys } => write!(f, "Keys({} of {name:?})", keys.len()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Keys, Message, SealError, Sealed};

    const OLD: &str = "an old key of enough bytes";
    const NEW: &str = "# rotated\n\na new key of enough bytes\nan old key of enough bytes\n";
    const ALL: [Message; 6] = [
        Message::Order,
        Message::Answer,
        Message::Question,
        Message::Report,
        Message::Heartbeat,
        Message::Inventory,
    ];

    #[test]
    fn only_what_our_keys_signed_is_opened() -> Result<(), SealError> {
        let (old, new) = (Keys::parse(OLD)?, Keys::parse(NEW)?);
        let order = Message::Order;
        let sealed = old.seal(order, "n1", &7)?;
        assert_eq!(new.open::<u32>(order, "n1", &sealed)?, 7);
        let forged = Err(SealError::Forged(order));
        let newer = new.seal(order, "n1", &7)?;
        assert_eq!(old.open::<u32>(order, "n1", &newer), forged);
        let changed = Sealed {
            body: "8".to_owned(),
            ..sealed.clone()
        };
        assert_eq!(old.open::<u32>(order, "n1", &changed), forged);
        let cut = Sealed {
            mac: sealed.mac[..32].to_owned(),
            ..sealed
        };
        assert_eq!(old.open::<u32>(order, "n1", &cut), forged);
        Ok(())
    }

    #[test]
    fn no_message_is_shown_as_another_kind_or_as_another_nodes() -> Result<(), SealError> {
        let keys = Keys::parse(OLD)?;
        for signed in ALL {
            let sealed = keys.seal(signed, "n1", &7)?;
            for shown in ALL {
                for node in ["n1", "n2", "n1\0", ""] {
                    let opened = keys.open::<u32>(shown, node, &sealed);
                    assert_eq!(opened.is_ok(), shown == signed && node == "n1");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn a_nodes_key_serves_that_node_alone() -> Result<(), SealError> {
        let master = Keys::parse(NEW)?;
        let one = Keys::parse_node(&master.node_file("n 1")?, "n 1")?;
        let two = Keys::parse_node(&master.node_file("n2")?, "n2")?;
        for message in ALL {
            let sealed = one.seal(message, "n 1", &7)?;
            assert_eq!(master.open::<u32>(message, "n 1", &sealed), Ok(7));
            assert_eq!(
                one.open::<u32>(message, "n 1", &master.seal(message, "n 1", &7)?),
                Ok(7)
            );
            assert!(one.seal(message, "n2", &7).is_err());
            assert!(one.open::<u32>(message, "n2", &sealed).is_err());
            assert!(two.open::<u32>(message, "n2", &sealed).is_err());
            // With its key taken for a master key it is no further.
            let text = master.node_file("n 1")?;
            let key = text.lines().last().and_then(|line| line.split(' ').nth(1));
            let thief = Keys::parse(key.unwrap_or_default())?;
            let stolen = thief.seal(message, "n2", &7)?;
            assert!(two.open::<u32>(message, "n2", &stolen).is_err());
            assert!(master.open::<u32>(message, "n2", &stolen).is_err());
        }
        Ok(())
    }

    #[test]
    fn a_rotated_master_key_gives_nodes_both() -> Result<(), SealError> {
        let (old, new) = (Keys::parse(OLD)?, Keys::parse(NEW)?);
        let before = Keys::parse_node(&old.node_file("n1")?, "n1")?;
        let after = Keys::parse_node(&new.node_file("n1")?, "n1")?;
        let sealed = old.seal(Message::Order, "n1", &7)?;
        assert_eq!(after.open::<u32>(Message::Order, "n1", &sealed), Ok(7));
        let sealed = after.seal(Message::Report, "n1", &7)?;
        assert!(before.open::<u32>(Message::Report, "n1", &sealed).is_err());
        assert_eq!(new.open::<u32>(Message::Report, "n1", &sealed), Ok(7));
        Ok(())
    }

    #[test]
    fn what_is_no_key_for_whoever_reads_it_is_refused() -> Result<(), SealError> {
        assert_eq!(Keys::parse("abc").err(), Some(SealError::ShortKey(3)));
        assert_eq!(Keys::parse("# none\n").err(), Some(SealError::NoKey));
        let file = Keys::parse(OLD)?.node_file("n1")?;
        assert_eq!(Keys::parse(&file).err(), Some(SealError::NodeKey));
        let node = |text: &str| Keys::parse_node(text, "n1").err();
        assert_eq!(node(&file), None);
        assert_eq!(node(""), Some(SealError::NoKey));
        let master = SealError::MasterKey { node: "n1".into() };
        assert_eq!(node(OLD), Some(master.clone()));
        assert_eq!(node(&format!("{}{OLD}\n", file.as_str())), Some(master));
        let other = SealError::OtherNode {
            found: "n1".into(),
            node: "n2".into(),
        };
        assert_eq!(Keys::parse_node(&file, "n2").err(), Some(other));
        for broken in [
            "upperdeck-node-key-1",
            "upperdeck-node-key-1 aabb n1",
            "upperdeck-node-key-1 zz n1",
        ] {
            assert_eq!(node(broken), Some(SealError::Broken(1)), "{broken}");
        }
        for name in ["", " n1", "n\n1", &"n".repeat(254)] {
            assert!(Keys::parse(OLD)?.node_file(name).is_err(), "{name:?}");
        }
        Ok(())
    }
}
