//! Answers the agents' questions whether a save is still wanted, from the record. Write access to the queue is not
//! enough to give such an answer.

use std::time::Duration;

use futures_util::StreamExt as _;

use super::{PAUSE, Trouble};
use crate::service::job::{Answer, Question, Word};
use crate::service::manager::App;
use crate::service::record::Save;

const QUESTIONS_WAIT: Duration = Duration::from_secs(5);
const AT_ONCE: usize = 16;

/// Returns the answer about `save` according to the record.
fn word(save: Option<&Save>, question: &Question) -> Word {
    let Some(save) = save else {
        return Word::Unwanted;
    };
    let over = save.state.is_final() || save.cancelling;
    // An earlier attempt that continues does the same as a later one would. An attempt later than the current one was
    // not signed by a manager of this record.
    if over || save.node != question.node || question.attempt > save.attempt {
        return Word::Unwanted;
    }
    if question.fence < save.fence {
        return Word::Superseded;
    }
    Word::Wanted
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
                    .for_each_concurrent(AT_ONCE, async |question| {
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
                    () = tokio::time::sleep(PAUSE) => {}
                }
            }
        }
    }
}

async fn answer_one(app: &App, question: Question) -> Result<(), Trouble> {
    let save = app.record.save(question.job).await?;
    let word = word(save.as_ref(), &question);
    if word != Word::Wanted {
        tracing::info!(job = %question.job, node = question.node, attempt = question.attempt, fence = question.fence, ?word, "an agent is not to go on");
    }
    app.queue.answer(&Answer { question, word }).await?;
    Ok(())
}
