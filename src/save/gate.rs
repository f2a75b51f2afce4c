//! Somebody who is asked before the tag is put on: an agent, which has to be sure that the job is still its own.

use std::io::{self, ErrorKind, Read};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::oneshot;

use super::Error;
use crate::common::cancel::Cancel;

/// The answer that opens.
const GO_ON: u8 = b'y';

/// Where the answer comes from. Clones are the same one; it is asked once.
#[derive(Clone, Debug)]
pub struct Gate(Arc<Mutex<Option<oneshot::Receiver<()>>>>);

impl Gate {
    /// Listens to `answers`. Anything but the answer that opens cancels, the end included, at once and not only when it
    /// is asked for: nobody wants a save whose agent died.
    pub fn new(mut answers: impl Read + Send + 'static, cancel: Cancel) -> io::Result<Self> {
        let (open, opened) = oneshot::channel();
        let listen = move || {
            let mut byte = [0];
            loop {
                match answers.read(&mut byte) {
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Ok(1) if byte[0] == GO_ON => {
                        // Nobody listens when the save has failed meanwhile.
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

    /// Waits for the answer.
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
            let cancel = Cancel::default();
            let gate = Gate::new(answers, cancel.clone())?;
            agent.write_all(said)?;
            drop(agent);
            assert_eq!(gate.pass().await.is_ok(), opens, "{said:?}");
            if !opens {
                cancel.cancelled().await;
            }
            // It is asked once: a second save is another one.
            assert!(gate.pass().await.is_err());
        }
        Ok(())
    }

    #[tokio::test]
    async fn an_agent_that_dies_cancels_though_nobody_asks() -> io::Result<()> {
        let (answers, agent) = io::pipe()?;
        let cancel = Cancel::default();
        let _gate = Gate::new(answers, cancel.clone())?;
        assert!(!cancel.is_cancelled());
        drop(agent);
        cancel.cancelled().await;
        Ok(())
    }
}
