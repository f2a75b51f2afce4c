//! The question with which an agent verifies that a job is still wanted, and the managers' answer. The order alone
//! proves only that the save was wanted at some time.

use serde::{Deserialize, Serialize};

use super::JobId;
use crate::common::digest::Digest;

/// Question that an agent sends before it touches a container, and again before it sets the tag. Signed with the node's
/// key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Question {
    /// The job.
    pub job: JobId,
    /// Name of the node that asks.
    pub node: String,
    /// Number of the attempt.
    pub attempt: u32,
    /// Fence of the claim.
    pub fence: u64,
    /// The step that the agent is about to take.
    pub before: NextStep,
    /// Before the tag is set: digest of the image that the tag names now and would lose it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replaces: Option<Digest>,
    /// 128 random bits in hexadecimal. They tie an answer to this question and to no earlier one.
    pub nonce: String,
}

/// The step that an agent is about to take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NextStep {
    /// Starting the save.
    Save,
    /// Setting the tag; everything else has been delivered.
    Tag,
    /// Running it at normal priority.
    Hurry,
}

/// A manager's answer according to the record. Signed for the node that asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Answer {
    /// The complete question.
    pub question: Question,
    /// The answer.
    #[serde(rename = "word")]
    pub verdict: Verdict,
}

/// Status of a claim according to the record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The save is wanted, by this claim.
    Wanted,
    /// The job was cancelled, has ended, or never existed.
    Unwanted,
    /// A later claim holds the job.
    Superseded,
    /// The image that would lose its tag is pinned.
    Pinned,
}

impl Question {
    /// Creates a question with a unique random nonce.
    pub fn new(job: JobId, node: &str, attempt: u32, fence: u64, before: NextStep) -> Self {
        Self {
            job,
            node: node.to_owned(),
            attempt,
            fence,
            before,
            replaces: None,
            nonce: hex::encode(rand::random::<[u8; 16]>()),
        }
    }
}
