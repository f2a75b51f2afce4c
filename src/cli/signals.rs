//! Turns SIGINT and SIGTERM into a cancellation, so that a frozen container is thawed before the program exits.

use std::io;
use std::os::unix::net::UnixStream;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::exit::Exit;

/// The first signal cancels. The second ends the process immediately, and the freeze watchdog then thaws the container.
pub(super) fn cancel_on_signals(cancel: &CancellationToken) -> io::Result<()> {
    // Tokio panics if it cannot create its socket pair for the signals of this process. Eight descriptors that can be
    // opened now leave room for that pair after everything else that a runtime opens.
    let spare: Vec<_> = (0..4)
        .map(|_| UnixStream::pair())
        .collect::<io::Result<_>>()?;
    drop(spare);
    let cancel = cancel.clone();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    // Registered before the thread starts, so that an early signal is not lost.
    let (mut interrupt, mut terminate) = {
        let _inside = runtime.enter();
        (
            signal(SignalKind::interrupt())?,
            signal(SignalKind::terminate())?,
        )
    };
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            runtime.block_on(async {
                loop {
                    tokio::select! {
                        _ = interrupt.recv() => {}
                        _ = terminate.recv() => {}
                    }
                    if cancel.is_cancelled() {
                        std::process::exit(i32::from(Exit::Cancelled.code()));
                    }
                    cancel.cancel();
                }
            });
        })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use nix::sys::signal::{Signal, raise};

    use super::*;

    #[test]
    fn a_signal_cancels_and_does_not_kill() -> anyhow::Result<()> {
        let cancel = CancellationToken::new();
        cancel_on_signals(&cancel)?;
        raise(Signal::SIGTERM)?;
        let deadline = Instant::now() + Duration::from_secs(10);
        while !cancel.is_cancelled() {
            anyhow::ensure!(Instant::now() < deadline, "the signal was not heard");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}
