//! A gate that a save passes before the tag is set. An agent answers it once it is certain that it still owns the job.

use std::io::{self, ErrorKind, Read};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::Error;

/// The message that asks for normal priority. It may come before the answer, any number of times.
pub(crate) const HURRY: u8 = b'h';
/// The answer that opens the gate.
const GO_ON: u8 = b'y';

/// The receiver of the answer. Clones share the same gate, which can be passed once.
#[derive(Clone, Debug)]
pub(crate) struct Gate(Arc<Mutex<Option<oneshot::Receiver<()>>>>);

impl Gate {
    /// Starts a thread that reads `answers`. It calls `hurry` when normal priority is asked for. Any byte other than
    /// that and the one that opens, and the end of the input, cancel the save at once, not only when the gate is
    /// reached: a save whose agent died is useless.
    pub(crate) fn new(
        mut answers: impl Read + Send + 'static,
        cancel: CancellationToken,
        hurry: impl Fn() + Send + 'static,
    ) -> io::Result<Self> {
        let (open, opened) = oneshot::channel();
        let listen = move || {
            let mut byte = [0];
            loop {
                match answers.read(&mut byte) {
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Ok(1) if byte[0] == HURRY => hurry(),
                    Ok(1) if byte[0] == GO_ON => {
                        // The receiver is gone if the save has failed meanwhile.
                        let _ = open.send(());
                        return;
                    }
                    _ => return cancel.cancel(),
                }
            }
        };
        std::thread::Builder::new()
            .name("gate".to_owned())
            .spawn(listen)?;
        Ok(Self(Arc::new(Mutex::new(Some(opened)))))
    }

    /// Waits for the answer. Fails with `Error::Cancelled` if it is negative, or if the gate was passed before.
    pub(super) async fn pass(&self) -> Result<(), Error> {
        let opened = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        match opened {
            Some(opened) => opened.await.map_err(|_| Error::Cancelled),
            None => Err(Error::Cancelled),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[tokio::test]
    async fn one_answer_opens_and_everything_else_cancels() -> io::Result<()> {
        for (said, opens) in [
            (&b"y"[..], true),
            (b"yn", true),
            (b"n", false),
            (b"\n", false),
            (b"", false),
        ] {
            let (answers, mut agent) = io::pipe()?;
            let cancel = CancellationToken::new();
            let gate = Gate::new(answers, cancel.clone(), || {})?;
            agent.write_all(said)?;
            drop(agent);
            assert_eq!(gate.pass().await.is_ok(), opens, "{said:?}");
            if !opens {
                cancel.cancelled().await;
            }
            // A gate can be passed once: a second save needs its own.
            assert!(gate.pass().await.is_err());
        }
        Ok(())
    }

    #[tokio::test]
    async fn an_agent_that_dies_cancels_though_nobody_asks() -> io::Result<()> {
        let (answers, agent) = io::pipe()?;
        let cancel = CancellationToken::new();
        let _gate = Gate::new(answers, cancel.clone(), || {})?;
        assert!(!cancel.is_cancelled());
        drop(agent);
        cancel.cancelled().await;
        Ok(())
    }

    #[tokio::test]
    async fn normal_priority_is_asked_for_before_the_answer() -> io::Result<()> {
        let (answers, mut agent) = io::pipe()?;
        let cancel = CancellationToken::new();
        let (asked, hears) = std::sync::mpsc::channel();
        let gate = Gate::new(answers, cancel.clone(), move || {
            let _ = asked.send(());
        })?;
        agent.write_all(b"hh")?;
        for _ in 0..2 {
            assert!(hears.recv().is_ok());
        }
        assert!(!cancel.is_cancelled());
        agent.write_all(b"y")?;
        assert!(gate.pass().await.is_ok());
        Ok(())
    }
}
