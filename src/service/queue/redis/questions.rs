//! Questions of agents to the managers, and their answers. Both are signed, and an answer repeats its question, so that
//! a forged answer or one to an earlier question is rejected.

use std::time::Duration;

use redis::Value;

use super::{Error, Redis, link};
use crate::service::job::{Answer, Message, Question};
use crate::service::log_limit::warn_limited;

/// Separator between the node's name and the sealed message. A node's name cannot contain it.
const BETWEEN: u8 = 0;
/// Maximum size of a question or answer in bytes.
const MAX: usize = 4 << 10;

impl Redis {
    pub(in crate::service::queue) async fn ask(
        &self,
        question: &Question,
        wait: Duration,
    ) -> Result<Option<Answer>, Error> {
        let node = question.node.as_str();
        let sealed = self.seal(Message::Question, node, question)?;
        let mut call = self.call(&self.scripts.ask);
        call.arg([node.as_bytes(), &[BETWEEN], &sealed].concat());
        self.link.run::<i64>(&call).await?;
        let key = self.key(&format!("answer:{}", question.nonce));
        let end = tokio::time::Instant::now() + wait;
        loop {
            let left = end.saturating_duration_since(tokio::time::Instant::now());
            let Some(bytes) = self.first_of(&key, left).await? else {
                return Ok(None);
            };
            match self.open::<Answer>(Message::Answer, node, &bytes) {
                Ok(answer) if answer.question == *question => return Ok(Some(answer)),
                Ok(_) => {
                    warn_limited!(self.local.log_limit, job.id = %question.job, "an answer to another question is not believed");
                }
                Err(reason) => {
                    warn_limited!(self.local.log_limit, job.id = %question.job, %reason, "an answer is not believed");
                }
            }
        }
    }

    pub(in crate::service::queue) async fn questions(
        &self,
        wait: Duration,
    ) -> Result<Vec<Question>, Error> {
        let key = self.key("asks");
        let Some(first) = self.first_of(&key, wait).await? else {
            return Ok(Vec::new());
        };
        let mut command = redis::cmd("LPOP");
        command.arg(&key).arg(100);
        let more: Option<Vec<Vec<u8>>> = self.link.ask(&command).await?;
        let mut questions = Vec::new();
        for bytes in std::iter::once(first).chain(more.unwrap_or_default()) {
            match self.question(&bytes) {
                Ok(question) => questions.push(question),
                Err(reason) => {
                    warn_limited!(self.local.log_limit, %reason, "a question is not believed");
                }
            }
        }
        Ok(questions)
    }

    fn question(&self, bytes: &[u8]) -> Result<Question, String> {
        let mut parts = bytes.splitn(2, |byte| *byte == BETWEEN);
        let (Some(node), Some(sealed)) = (parts.next(), parts.next()) else {
            return Err("it names no node".to_owned());
        };
        let node = std::str::from_utf8(node).map_err(|_| "its node is no text")?;
        let question: Question = self.open(Message::Question, node, sealed)?;
        if question.node != node {
            return Err("it speaks for another node than signed it".to_owned());
        }
        let plain =
            question.nonce.len() <= 64 && question.nonce.chars().all(|c| c.is_ascii_hexdigit());
        plain
            .then_some(question)
            .ok_or_else(|| "its nonce is none".to_owned())
    }

    pub(in crate::service::queue) async fn answer(&self, answer: &Answer) -> Result<(), Error> {
        let sealed = self.seal(Message::Answer, &answer.question.node, answer)?;
        let mut call = self.call(&self.scripts.answer);
        call.arg(&answer.question.nonce).arg(sealed);
        self.link.run::<i64>(&call).await?;
        Ok(())
    }

    /// Removes and returns the first element of a list, blocking until there is one. An element that is too large is
    /// returned as empty.
    async fn first_of(&self, key: &str, wait: Duration) -> Result<Option<Vec<u8>>, Error> {
        // A timeout of 0 would block indefinitely.
        let wait = wait.max(Duration::from_millis(1));
        let mut command = redis::cmd("BLPOP");
        command.arg(key).arg(wait.as_secs_f64());
        match self.link.wait::<Value>(&command, wait).await {
            Ok(Value::Array(mut two)) if two.len() == 2 => match two.pop() {
                Some(Value::BulkString(bytes)) if bytes.len() <= MAX => Ok(Some(bytes)),
                // The element has been removed from the list, so an empty message is returned, whose signature check
                // fails.
                _ => Ok(Some(Vec::new())),
            },
            Ok(_) => Ok(None),
            Err(error) if link::is_gone(&error) => Ok(None),
            Err(error) => Err(self.link.to_error(&error)),
        }
    }
}
