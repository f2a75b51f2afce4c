//! Signs and verifies the messages between managers and agents, so that write access to Redis is not enough to make an
//! agent or a manager act, and a leaked node key is good only for messages of that node.
//!
//! Managers hold the master keys. A node has its own key, derived from a master key and the node's name; it reveals
//! nothing about the keys of other nodes. Two keys are derived from a node's key: one signs messages to the node, the
//! other signs messages from it. A signature is HMAC-SHA256 (RFC 2104) over the kind of the message, the node and the
//! body, separated by zero bytes, so that a message cannot be passed off as one of another kind, another node or the
//! other direction. The maximum age of a message is part of the message, because it differs between kinds. If there are
//! several keys, the first one signs and all are accepted, so that keys can be rotated without interruption.

use hmac::{Hmac, KeyInit, Mac};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use zeroize::Zeroizing;

/// Minimum length of a key in bytes; shorter keys can be guessed.
const MIN_KEY: usize = 16;
/// Maximum size of a body in bytes. An inventory of a thousand sessions is far smaller, so a larger message is not
/// genuine.
const MAX_BODY: usize = 16 << 20;
/// Prefix of each key in a node's key file, with the version of the key derivation.
const NODE_KEY: &str = "upperdeck-node-key-1";
/// Maximum length of a node's name in bytes: that of a host name.
const MAX_NODE: usize = 253;

/// Kind of a message.
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
    /// The sessions of a node.
    Inventory,
}

impl Message {
    /// Returns the name that is part of the signature.
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

    /// Returns the label from which the key for the direction of this message is derived.
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

/// The keys with which a process signs and verifies.
#[derive(Clone)]
pub struct Keys(KeyMaterial);

#[derive(Clone)]
enum KeyMaterial {
    /// Keys for every node.
    Master(Vec<Key>),
    /// Keys for one node.
    Node { name: String, keys: Vec<Key> },
}

/// A signed message, as it is stored in the queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sealed {
    /// The content as JSON.
    pub body: String,
    /// HMAC in lower-case hexadecimal.
    pub mac: String,
}

/// Why a message is rejected, or why keys cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// A key is shorter than the minimum.
    #[error(
        "the key has {0} bytes, at least {MIN_KEY} are needed (openssl rand -hex 32 makes one)"
    )]
    ShortKey(usize),
    /// No key was given.
    #[error("there is no key")]
    NoKey,
    /// An agent was given a master key, which belongs on managers; this is also the case for key files of versions
    /// without keys per node.
    #[error(
        "this is a master key, which signs for every node, and belongs on managers only. An agent takes \
         its node's key, which 'upperdeck key --key-file MASTER --node {node}' prints on a manager"
    )]
    MasterKey {
        /// The agent's node.
        node: String,
    },
    /// A manager was given a node's key.
    #[error("this is the key of one node; a manager takes the master key that it was made from")]
    NodeKey,
    /// An agent was given another node's key.
    #[error(
        "this is the key of node {found:?}, and this agent's node is {node:?}: print its own with 'upperdeck key', or \
         correct --node"
    )]
    OtherNode {
        /// Node named in the file.
        found: String,
        /// The agent's node.
        node: String,
    },
    /// A line has the prefix of a node's key but is malformed.
    #[error("line {0} is not a node's key: create it again with 'upperdeck key'")]
    Broken(usize),
    /// The name cannot be a node's name.
    #[error(
        "{0:?} is not a node's name: 1 to {MAX_NODE} bytes, no blanks at its ends, no control characters"
    )]
    Name(String),
    /// The key of one node was used for a message of another node.
    #[error("the key of node {0:?} cannot sign or verify messages of other nodes")]
    WrongNode(String),
    /// The message is not signed with any of the keys.
    #[error("this {0} is not signed with a known key")]
    Forged(Message),
    /// The message is signed but cannot be parsed, e.g. because another version wrote it.
    #[error("this {message} cannot be read: {reason}")]
    Unreadable {
        /// Kind of the message.
        message: Message,
        /// Error of the parser.
        reason: String,
    },
}

fn mac(key: &[u8], parts: &[&str]) -> Hmac<Sha256> {
    // HMAC accepts keys of any length.
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

/// Derives the key of `node` from a master key.
fn node_key(master: &[u8], node: &str) -> Key {
    derive(master, &["upperdeck node key 1", node])
}

/// Returns the lines that are neither empty nor comments, with their numbers starting at 1.
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
    /// Parses a manager's keys: one master key per line, of which the first one signs. Empty lines and lines that start
    /// with `#` are ignored.
    ///
    /// Fails with [`SealError::NodeKey`], [`SealError::ShortKey`] or [`SealError::NoKey`].
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
        Ok(Self(KeyMaterial::Master(keys)))
    }

    /// Parses an agent's keys from the text that [`Keys::node_file`] created for `node`.
    ///
    /// Fails if the name is invalid, the text holds a master key or the key of another node, a line is malformed, or
    /// there is no key.
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
        Ok(Self(KeyMaterial::Node { name, keys }))
    }

    /// Returns the content of the key file for `node`'s agent: one key per master key, in the same order.
    ///
    /// Fails if the name is invalid, or if these are the keys of another node.
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

    /// Returns the keys of `node`; the first one signs.
    fn of_node(&self, node: &str) -> Result<Vec<Key>, SealError> {
        match &self.0 {
            KeyMaterial::Master(keys) => Ok(keys.iter().map(|key| node_key(key, node)).collect()),
            KeyMaterial::Node { name, keys } if name == node => Ok(keys.clone()),
            KeyMaterial::Node { name, .. } => Err(SealError::WrongNode(name.clone())),
        }
    }

    fn mac(key: &[u8], message: Message, node: &str, body: &str) -> Hmac<Sha256> {
        let key = derive(key, &[message.direction()]);
        mac(&key, &[message.name(), node, body])
    }

    /// Signs `content`, which is sent to `node` or comes from it.
    ///
    /// Fails if the content cannot be serialized, or if these are the keys of another node.
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

    /// Returns the content of a message if it was signed as `message` of `node` with one of the keys.
    ///
    /// Fails with [`SealError::Forged`] if it was not or if it is too large, with [`SealError::WrongNode`] if these are
    /// the keys of another node, and with [`SealError::Unreadable`] if it cannot be parsed.
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
            KeyMaterial::Master(keys) => write!(f, "Keys({} master)", keys.len()),
            KeyMaterial::Node { name, keys } => write!(f, "Keys({} of {name:?})", keys.len()),
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
            // Using a node's key as a master key does not help an attacker either.
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
