//! Fuzzes the messages in the queue, which anyone with write access to Redis controls, with or without a node's key.

use hmac::{Hmac, KeyInit as _, Mac as _};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::Sha256;
use upperdeck::service::job::{
    Answer, Event, Keys, Message, Node, Order, Question, Report, SealError, Sealed, Session,
};

use crate::errors;
use crate::files::selected;

const MASTER: &str = "a master key of enough bytes";
const NODE: &str = "node-1";

pub fn run(input: &[u8]) {
    let (selector, rest) = selected(input);
    let text = String::from_utf8_lossy(rest);
    let managers = "upperdeck to the managers";
    let nodes = "upperdeck to the node";
    match selector % 8 {
        0 => message::<Order>(Message::Order, nodes, &text),
        1 => message::<Answer>(Message::Answer, nodes, &text),
        2 => message::<Question>(Message::Question, managers, &text),
        3 => message::<Report>(Message::Report, managers, &text),
        4 => message::<Node>(Message::Heartbeat, managers, &text),
        5 => message::<Vec<Session>>(Message::Inventory, managers, &text),
        6 => {
            if let Ok(event) = serde_json::from_slice::<Event>(rest) {
                same(&event);
            }
        }
        _ => keys(&text),
    }
}

fn hmac(key: &[u8], parts: &[&str]) -> Vec<u8> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("keys have any length");
    mac.update(parts.join("\0").as_bytes());
    mac.finalize().into_bytes().to_vec()
}

/// Opens a signed body, and the same body unsigned, for another node, and as another kind of message.
fn message<T>(kind: Message, direction: &str, body: &str)
where
    T: DeserializeOwned + Serialize + PartialEq + std::fmt::Debug,
{
    let keys = Keys::parse(MASTER).expect("a key");
    let key = hmac(MASTER.as_bytes(), &["upperdeck node key 1", NODE]);
    let key = hmac(&key, &[direction]);
    let signed = Sealed {
        body: body.to_owned(),
        mac: hex::encode(hmac(&key, &[&kind.to_string(), NODE, body])),
    };
    let opened = keys.open::<T>(kind, NODE, &signed);
    assert!(!matches!(opened, Err(SealError::Forged(_))), "it is signed");
    if let Some(content) = errors::checked(opened) {
        same(&content);
        let sealed = keys.seal(kind, NODE, &content).expect("it was read before");
        assert_eq!(keys.open::<T>(kind, NODE, &sealed), Ok(content));
    }
    let other = if kind == Message::Order {
        Message::Answer
    } else {
        Message::Order
    };
    let unsigned = Sealed {
        mac: body.chars().take(64).collect(),
        body: body.to_owned(),
    };
    for (kind, node, sealed) in [
        (kind, "node-2", &signed),
        (other, NODE, &signed),
        (kind, NODE, &unsigned),
    ] {
        let opened = keys.open::<serde_json::Value>(kind, node, sealed);
        assert_eq!(opened, Err(SealError::Forged(kind)));
    }
}

/// Checks that content is the same after serialisation and parsing.
fn same<T: DeserializeOwned + Serialize + PartialEq + std::fmt::Debug>(content: &T) {
    let text = serde_json::to_string(content).expect("it was read before");
    let again: T = serde_json::from_str(&text).expect("what was just written");
    assert_eq!(&again, content);
}

fn keys(text: &str) {
    if let Some(keys) = errors::checked(Keys::parse(text)) {
        let file = keys.node_file(NODE).expect("a node's name");
        let node = Keys::parse_node(&file, NODE).expect("what was just written");
        let sealed = keys.seal(Message::Order, NODE, &text).expect("a text");
        let opened = node.open::<String>(Message::Order, NODE, &sealed);
        assert_eq!(opened.as_deref(), Ok(text));
    }
    errors::checked(Keys::parse_node(text, NODE));
}
