//! Agents ask whether a save is still wanted, and the record answers: who can write to the queue alone cannot.

use std::time::Duration;

use futures_util::StreamExt as _;

use super::{PAUSE, Trouble};
use crate::service::job::{Answer, Question, Word};
use crate::service::manager::App;
use crate::service::record::Save;

const QUESTIONS_WAIT: Duration = Duration::from_secs(5);
const AT_ONCE: usize = 16;

/// What the record says to who asks about `save`.
fn word(save: Option<&Save>, question: &Question) -> Word {
    let Some(save) = save else {
        return Word::Unwanted;
    };
    let over = save.state.is_final() || save.cancelling;
    // An earlier attempt that goes on does what a later one would; a later one than there is was signed by no manager of
    // this record.
    if over || save.node != question.node || question.attempt > save.attempt {
        return Word::Unwanted;
    }
    if question.fence < save.fence {
        return Word::Superseded;
    }
    Word::Wanted
}

/// Answers as long as the manager runs.
pub(super) async fn answer(app: &App) {
    while !app.cancel.is_cancelled() {
        let asked = tokio::select! {
            _ = app.cancel.cancelled() => return,
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
                    _ = app.cancel.cancelled() => return,
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
