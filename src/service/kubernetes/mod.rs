//! The Kubernetes API, as the manager and `kubectl upperdeck` use it.

pub mod crd;

use std::path::Path;
use std::time::Duration;

use http_body_util::Limited;
use kube::client::{AuthError, ClientBuilder};
use kube::config::{KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::{Client, Config};
use tower::util::MapResponseLayer;

use crate::common::{escape, message};

/// API group of the resources that permissions to save are granted on.
pub const GROUP: &str = "upperdeck.io";
/// Default audience of the tokens that are sent to a manager.
pub const AUDIENCE: &str = "upperdeck";

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum size of a response in bytes. A watch that reaches it is begun again.
const MAX_RESPONSE: usize = 64 << 20;

/// Why the API server cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kubeconfig cannot be read.
    #[error("the kubeconfig: {0}")]
    Kubeconfig(#[from] KubeconfigError),
    /// There is no service account of a pod.
    #[error("no kubeconfig is named, and there is no service account of a pod here: {0}")]
    InCluster(#[from] kube::config::InClusterError),
    /// The settings cannot be used.
    #[error("the Kubernetes API: {0}")]
    Client(#[from] kube::Error),
}

/// Returns the settings for a server: those of `kubeconfig`, or of the service account of its pod. A kubeconfig that starts
/// a program for its credentials cannot be used by a manager, which may start none.
pub(crate) async fn server_config(kubeconfig: Option<&Path>) -> Result<Config, Error> {
    let mut config = match kubeconfig {
        Some(file) => {
            let file = Kubeconfig::read_from(file)?;
            Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?
        }
        None => Config::incluster()?,
    };
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    Ok(config)
}

/// Reads a token file that ends in white space, as `kubectl` accepts it and the crate does not. Such a file is read once.
pub(crate) fn trim_token_file(config: &mut Config) {
    let auth = &mut config.auth_info;
    let read = auth.token_file.as_ref().filter(|_| auth.token.is_none());
    // What cannot be read is reported by the crate.
    let Some(text) = read.and_then(|file| std::fs::read_to_string(file).ok()) else {
        return;
    };
    let text = zeroize::Zeroizing::new(text);
    if text.trim() != text.as_str() {
        auth.token = Some(text.trim().to_owned().into());
        auth.token_file = None;
    }
}

/// Returns what an error says without the output of a program for credentials, which may contain them.
pub(crate) fn message_of(error: &(dyn std::error::Error + 'static)) -> String {
    let mut causes = message::chain(error);
    match causes.find_map(|cause| cause.downcast_ref::<AuthError>()) {
        Some(AuthError::AuthExecRun { cmd, status, out }) => {
            let stderr = String::from_utf8_lossy(&out.stderr);
            let said = escape::limited(stderr.trim(), 500);
            format!("its program for credentials ({cmd}) ended with {status}: {said}")
        }
        Some(AuthError::AuthExecParse(_)) => {
            "its program for credentials printed no ExecCredential".to_owned()
        }
        _ => message::of(error),
    }
}

/// Creates a client.
pub(crate) fn client(mut config: Config) -> Result<Client, Error> {
    trim_token_file(&mut config);
    // Both this program and the crate choose the provider of the process; whoever is first has the same choice.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let limited =
        |response: http::Response<_>| response.map(|body| Limited::new(body, MAX_RESPONSE));
    let client = ClientBuilder::try_from(config)?;
    Ok(client.with_layer(&MapResponseLayer::new(limited)).build())
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[tokio::test]
    async fn a_response_without_an_end_is_not_kept() -> Result<(), Box<dyn std::error::Error>> {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let url = format!("http://{}", listener.local_addr()?);
        let server = tokio::spawn(async move {
            let (mut client, _) = listener.accept().await?;
            let _ = client.read(&mut [0; 4096]).await?;
            let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n\"";
            client.write_all(head.as_bytes()).await?;
            // Until the client hangs up.
            let more = vec![b'x'; 1 << 16];
            loop {
                client.write_all(&more).await?;
            }
            #[allow(unreachable_code, reason = "the type of the task")]
            Ok::<(), std::io::Error>(())
        });
        let asked = client(Config::new(url.parse()?))?.apiserver_version().await;
        let error = asked.err().ok_or("a version")?;
        assert!(
            message_of(&error).contains("length limit exceeded"),
            "{error}"
        );
        assert!(server.await?.is_err());
        Ok(())
    }
}
