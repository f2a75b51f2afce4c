//! What an agent asks the managers before it acts, and what they answer: an order alone proves that a save was wanted once.

use serde::{Deserialize, Serialize};

use super::JobId;

/// Asked before a container is touched, and again before the tag is put on. Signed with the node's key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Question {
    /// Which job.
    pub job: JobId,
    /// Which node asks.
    pub node: String,
    /// Which attempt at the job.
    pub attempt: u32,
    /// The fence of the claim.
    pub fence: u64,
    /// Before what.
    pub before: Before,
    /// 128 random bits in hexadecimal: an answer is to this question and to no earlier one.
    pub nonce: String,
}

/// What an agent is about to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Before {
    /// The save begins.
    Save,
    /// All is delivered but the tag.
    Tag,
}

/// A manager's answer, from the record. Signed for the node that asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Answer {
    /// The question, whole.
    pub question: Question,
    /// The answer.
    pub word: Word,
}

/// What the record says of a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Word {
    /// The save is wanted, by this claim.
    Wanted,
    /// It was cancelled, or has ended, or there never was such a one.
    Unwanted,
    /// A later claim has it.
    Superseded,
}

impl Question {
    /// A new one, with a nonce that no other question has.
    pub fn new(job: JobId, node: &str, attempt: u32, fence: u64, before: Before) -> Self {
        Self {
            job,
            node: node.to_owned(),
            attempt,
            fence,
            before,
            nonce: hex::encode(rand::random::<[u8; 16]>()),
        }
    }
}
