//! The error of cancelled work. Cancellation itself is a `tokio_util::sync::CancellationToken`, which threads poll and
//! async tasks await.

use tokio_util::sync::CancellationToken;

/// Error of cancelled work. The program exits with code 130.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cancelled")]
pub struct Cancelled;

impl Cancelled {
    /// Fails if the token is cancelled. Meant for loops in threads.
    pub(crate) fn check(token: &CancellationToken) -> Result<(), Self> {
        if token.is_cancelled() {
            Err(Self)
        } else {
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cancelled_token_ends_a_loop() {
        let token = CancellationToken::new();
        assert_eq!(Cancelled::check(&token), Ok(()));
        token.clone().cancel();
        assert_eq!(Cancelled::check(&token), Err(Cancelled));
    }
}
