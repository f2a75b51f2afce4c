//! A connection to the SMTP server. The client of the crate reads a line until it ends, however long it gets; here a
//! server can only make one delivery fail.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_util::io::{AsyncRead as _, AsyncWrite as _};
use lettre::address::Envelope;
use lettre::transport::smtp::Error;
use lettre::transport::smtp::authentication::{Credentials, DEFAULT_MECHANISMS};
#[allow(
    deprecated,
    reason = "the only way to a connection that is encrypted from its start and counted"
)]
use lettre::transport::smtp::client::AsyncNetworkStream;
use lettre::transport::smtp::client::{AsyncSmtpConnection, AsyncTokioStream, Tls};
use lettre::transport::smtp::extension::ClientId;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Maximum number of bytes that a server may send in one delivery. Its certificates and replies are a few thousand.
const MAX_RECEIVED: usize = 64 * 1024;

/// Delivers one e-mail. `step` is the time limit of establishing the connection.
pub(super) async fn deliver(
    (host, port): (&str, u16),
    tls: &Tls,
    credentials: Option<&Credentials>,
    (envelope, content): (&Envelope, &[u8]),
    step: Duration,
) -> Result<(), Error> {
    let hello = ClientId::default();
    let (from_start, later) = match tls {
        Tls::Wrapper(parameters) => (Some(parameters.clone()), None),
        Tls::Required(parameters) | Tls::Opportunistic(parameters) => {
            (None, Some(parameters.clone()))
        }
        Tls::None => (None, None),
    };
    #[allow(deprecated, reason = "see above")]
    let stream =
        AsyncNetworkStream::connect_tokio1((host, port), Some(step), from_start, None).await?;
    let stream = Box::new(Bounded {
        stream,
        left: MAX_RECEIVED,
    });
    let mut connection = AsyncSmtpConnection::connect_with_transport(stream, &hello).await?;
    if let Some(parameters) = later {
        connection.starttls(parameters, &hello).await?;
    }
    if let Some(credentials) = credentials {
        connection.auth(DEFAULT_MECHANISMS, credentials).await?;
    }
    connection.send(envelope, content).await?;
    // The e-mail has been taken.
    let _ = connection.quit().await;
    Ok(())
}

/// A stream that fails when the server has sent too much.
#[derive(Debug)]
struct Bounded {
    #[allow(deprecated, reason = "see above")]
    stream: AsyncNetworkStream,
    left: usize,
}

impl AsyncTokioStream for Bounded {
    fn peer_addr(&self) -> io::Result<SocketAddr> {
        self.stream.peer_addr()
    }
}

impl AsyncRead for Bounded {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let space = buffer.initialize_unfilled();
        let read = ready!(Pin::new(&mut self.stream).poll_read(context, space))?;
        let Some(left) = self.left.checked_sub(read) else {
            let kind = io::ErrorKind::FileTooLarge;
            return Poll::Ready(Err(io::Error::new(kind, "the server's replies do not end")));
        };
        self.left = left;
        buffer.advance(read);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Bounded {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_close(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt as _;

    use super::*;

    #[tokio::test]
    async fn replies_that_do_not_end_fail() -> io::Result<()> {
        for reply in ["2".repeat(1000), format!("220-{}\r\n", "x".repeat(900))] {
            let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await?;
            let port = listener.local_addr()?.port();
            let server = tokio::spawn(async move {
                let (mut stream, _) = listener.accept().await?;
                let mut sent = 0;
                while stream.write_all(reply.as_bytes()).await.is_ok() {
                    sent += reply.len();
                }
                io::Result::Ok(sent)
            });
            let envelope = Envelope::new(None, vec!["a@example.org".parse().unwrap()]).unwrap();
            let mail = (&envelope, &b"x"[..]);
            let step = Duration::from_secs(60);
            let failed = deliver(("127.0.0.1", port), &Tls::None, None, mail, step).await;
            let reason = crate::common::message::of(&failed.unwrap_err());
            let known = ["do not end", "too large", "too long"];
            assert!(known.iter().any(|end| reason.contains(end)), "{reason}");
            // What the sockets hold is sent as well.
            assert!(server.await?? < 64 << 20);
        }
        Ok(())
    }
}
