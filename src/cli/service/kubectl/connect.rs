//! The way from a kubeconfig to the manager: through the API server's proxy to its Service, or directly; and the token with
//! which the manager finds out who the caller is.

use anyhow::Context as _;
use axum::http::header;
use k8s_openapi::api::authentication::v1::SelfSubjectReview;
use kube::api::{Api, PostParams};
use kube::client::{ClientBuilder, ConfigExt as _};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client as KubeClient, Config};
use reqwest::Url;
use zeroize::Zeroizing;

use super::super::client::{Client, Credential};
use super::super::renewed::Renewed;
use crate::cli::args::service::Cluster;
use crate::cli::exit::Usage;
use crate::cli::{secret, text};
use crate::service::kubernetes;

/// Prefix of the names of service accounts.
const ACCOUNT: &str = "system:serviceaccount:";

/// The cluster, as the kubeconfig describes it.
pub(super) struct Connection {
    config: Config,
    pub(super) kube: KubeClient,
    /// Namespace of the pods.
    pub(super) namespace: String,
}

impl Connection {
    /// Reads the kubeconfig. Nothing is sent.
    pub(super) async fn new(cluster: &Cluster) -> anyhow::Result<Self> {
        let options = KubeConfigOptions {
            context: cluster.context.clone(),
            ..KubeConfigOptions::default()
        };
        let config = match &cluster.file {
            Some(file) => {
                let read = Kubeconfig::read_from(file).map_err(|error| wrong(&error))?;
                Config::from_custom_kubeconfig(read, &options).await
            }
            None => Config::from_kubeconfig(&options).await,
        };
        let in_pod = cluster.file.is_none() && cluster.context.is_none();
        let config = match config {
            Ok(config) => config,
            Err(error) if in_pod => Config::incluster().map_err(|_| wrong(&error))?,
            Err(error) => return Err(wrong(&error).into()),
        };
        let mut config = config;
        // A person waits for the answer, and sees why there is none.
        config.default_retry = false;
        kubernetes::trim_token_file(&mut config);
        let kube = kubernetes::client(config.clone()).map_err(|error| wrong(&error))?;
        let namespace = cluster.namespace.clone();
        Ok(Self {
            namespace: namespace.unwrap_or_else(|| config.default_namespace.clone()),
            config,
            kube,
        })
    }

    /// Returns a client of the manager.
    pub(super) async fn to_manager(cluster: &Cluster) -> anyhow::Result<(Client, Self)> {
        let direct = cluster.server.as_deref().map(direct_url).transpose()?;
        let service = service_path(&cluster.manager)?;
        let connection = Self::new(cluster).await?;
        let credential = connection.credential(cluster).await?;
        let client = match direct {
            Some(server) => Client::with_credential(server, credential)?,
            None => {
                let at = format!("{}{service}", connection.config.cluster_url);
                let mut server = Url::parse(&at).context("the address of the API server")?;
                // The client puts what the API server's own address has before it.
                server.set_path(&service);
                Client::through_cluster(connection.kube.clone(), server, credential)
            }
        };
        Ok((client, connection))
    }

    /// Returns the token for the manager.
    async fn credential(&self, cluster: &Cluster) -> anyhow::Result<Credential> {
        if let Some(file) = &cluster.token_file {
            let token = secret::trimmed_line(file).map_err(|error| {
                Usage(format!(
                    "cannot read a token from {}: {error}",
                    text::path(file)
                ))
            })?;
            return Ok(Credential::Fixed(token));
        }
        if cluster.send_token {
            if self.config.auth_info.impersonate.is_some() {
                return Err(Usage(
                    "--send-token: the kubeconfig acts as another user ('as'), which a token does not say".to_owned(),
                )
                .into());
            }
            return Ok(Credential::Fixed(self.own_token().await?));
        }
        let (namespace, name) = match &cluster.service_account {
            Some(name) => (self.namespace.clone(), name.clone()),
            None => self.own_account().await?,
        };
        let accounts = Api::namespaced(self.kube.clone(), &namespace);
        let renewed = Renewed::new(accounts, &name, &cluster.audience);
        Ok(Credential::Renewed(Box::new(renewed)))
    }

    /// Returns namespace and name of the service account that the kubeconfig is of.
    async fn own_account(&self) -> anyhow::Result<(String, String)> {
        let api: Api<SelfSubjectReview> = Api::all(self.kube.clone());
        let review = api
            .create(&PostParams::default(), &SelfSubjectReview::default())
            .await
            .context("the API server does not say who you are")?;
        let user = review.status.and_then(|status| status.user_info);
        let user = user.and_then(|user| user.username).unwrap_or_default();
        let account = user
            .strip_prefix(ACCOUNT)
            .and_then(|account| account.split_once(':'));
        let (namespace, name) = account.ok_or_else(|| {
            Usage(format!(
                "{} is no service account, and a token for the manager alone is made for these only: name one with \
                 --service-account, or choose --token-file or --send-token",
                crate::common::escape::text(&user)
            ))
        })?;
        Ok((namespace.to_owned(), name.to_owned()))
    }

    /// Returns the token that the kubeconfig's user sends to the API server, wherever it comes from: the file itself, another
    /// file or a program.
    async fn own_token(&self) -> anyhow::Result<Zeroizing<String>> {
        let none = || {
            Usage(
                "--send-token: the kubeconfig's user has no token (a client certificate cannot be passed on)".to_owned(),
            )
        };
        let layer = self.config.auth_layer().map_err(|error| wrong(&error))?;
        let layer = layer.ok_or_else(none)?;
        // A request that goes no further than this program tells which header would be sent.
        let echo = tower::service_fn(async |request: http::Request<kube::client::Body>| {
            let value = request.headers().get(header::AUTHORIZATION).cloned();
            let value = value.map(|value| value.as_bytes().to_vec());
            let body = axum::body::Body::from(value.unwrap_or_default());
            Ok::<_, axum::BoxError>(http::Response::new(body))
        });
        let local = ClientBuilder::new(echo, "default")
            .with_layer(&layer)
            .build();
        let request = http::Request::get("/").body(Vec::new())?;
        let value = Zeroizing::new(
            local
                .request_text(request)
                .await
                .context("the kubeconfig's token")?,
        );
        let token = value.strip_prefix("Bearer ").ok_or_else(none)?;
        Ok(Zeroizing::new(token.to_owned()))
    }
}

fn wrong(error: &(dyn std::error::Error + 'static)) -> Usage {
    Usage(format!("the kubeconfig: {}", kubernetes::message_of(error)))
}

/// Parses `--server`.
fn direct_url(text: &str) -> Result<Url, Usage> {
    let url = Url::parse(text).ok();
    let url = url.filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
    let mut url = url.ok_or_else(|| {
        Usage(format!(
            "--server {text:?}: expected http://HOST:PORT or https://HOST"
        ))
    })?;
    url.set_query(None);
    url.set_fragment(None);
    if !url.path().ends_with('/') {
        url.set_path(&format!("{}/", url.path()));
    }
    Ok(url)
}

/// Returns the path of the API server's proxy to `NAMESPACE/[https:]SERVICE[:PORT]`.
fn service_path(text: &str) -> Result<String, Usage> {
    let plain = |part: &str| {
        !part.is_empty()
            && part.len() <= 63
            && part
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    };
    let parsed = text.split_once('/').filter(|(namespace, service)| {
        let service = service.strip_prefix("https:").unwrap_or(service);
        let (name, port) = service.split_once(':').unwrap_or((service, "http"));
        plain(namespace) && plain(name) && plain(port)
    });
    let (namespace, service) = parsed.ok_or_else(|| {
        Usage(format!(
            "--manager {text:?}: expected NAMESPACE/SERVICE[:PORT], or NAMESPACE/https:SERVICE:PORT"
        ))
    })?;
    Ok(format!(
        "/api/v1/namespaces/{namespace}/services/{service}/proxy/"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_has_one_place_at_the_api_server() {
        let path = |text| service_path(text).ok();
        let at = |rest: &str| Some(format!("/api/v1/namespaces/{rest}/proxy/"));
        assert_eq!(path("a/b"), at("a/services/b"));
        assert_eq!(path("a/b:http"), at("a/services/b:http"));
        assert_eq!(path("a/https:b:8443"), at("a/services/https:b:8443"));
        for wrong in [
            "", "a", "a/", "/b", "a/b/c", "a/b:c:d", "a/..", "a/b?x", "A/b", "a/b:%2f",
        ] {
            assert_eq!(path(wrong), None, "{wrong}");
        }
    }
}
