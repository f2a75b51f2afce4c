//! Answers the agents' questions whether a save is still wanted, from the record. Write access to the queue is not
//! enough to give such an answer.

use std::time::Duration;

use futures_util::StreamExt as _;

use super::{ERROR_DELAY, TaskError};
use crate::service::job::{Answer, NextStep, Question, Verdict};
use crate::service::manager::App;
use crate::service::record::{ImageKey, Save};

const QUESTIONS_WAIT: Duration = Duration::from_secs(5);
const CONCURRENCY: usize = 16;

/// Returns the answer about `save` according to the record.
fn verdict(save: Option<&Save>, question: &Question) -> Verdict {
    let Some(save) = save else {
        return Verdict::Unwanted;
    };
    let over = save.state.is_final() || save.cancelling;
    // An earlier attempt that continues does the same as a later one would. An attempt later than the current one was
    // not signed by a manager of this record.
    if over || save.node != question.node || question.attempt > save.attempt {
        return Verdict::Unwanted;
    }
    if question.fence < save.fence {
        return Verdict::Superseded;
    }
    if question.before == NextStep::Hurry && !save.hurried {
        return Verdict::Unwanted;
    }
    Verdict::Wanted
}

/// Answers questions until the manager ends.
pub(super) async fn answer(app: &App) {
    while !app.cancel.is_cancelled() {
        let asked = tokio::select! {
            () = app.cancel.cancelled() => return,
            asked = app.queue.questions(QUESTIONS_WAIT) => asked,
        };
        match asked {
            Ok(questions) => {
                futures_util::stream::iter(questions)
                    .for_each_concurrent(CONCURRENCY, async |question| {
                        if let Err(error) = answer_one(app, question).await {
                            tracing::warn!(%error, "an agent's question is not answered; it asks again");
                            app.metrics.error("words");
                        }
                    })
                    .await;
            }
            Err(error) => {
                tracing::warn!(%error, "agents' questions cannot be heard");
                app.metrics.error("words");
                tokio::select! {
                    () = app.cancel.cancelled() => return,
                    () = tokio::time::sleep(ERROR_DELAY) => {}
                }
            }
        }
    }
}

async fn answer_one(app: &App, question: Question) -> Result<(), TaskError> {
    let save = app.record.save(question.job).await?;
    let mut verdict = verdict(save.as_ref(), &question);
    if let (Verdict::Wanted, Some(save), Some(digest)) = (verdict, &save, question.replaces) {
        // Its owner may have pinned it since the save was accepted.
        let key = ImageKey::new(&save.user, &save.name, digest.to_string());
        if app.record.is_pinned(&key).await? {
            verdict = Verdict::Pinned;
        }
    }
    if verdict != Verdict::Wanted {
        tracing::info!(job = %question.job, node = question.node, attempt = question.attempt, fence = question.fence, word = ?verdict, "an agent is not to go on");
    }
    app.queue.answer(&Answer { question, verdict }).await?;
    Ok(())
}
