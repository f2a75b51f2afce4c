//! Who may call a manager: its settings for tokens, identity providers, proxies and groups.

use std::path::Path;

use zeroize::Zeroizing;

use crate::cli::args::service::{Callers, KubernetesPermission, Serve};
use crate::cli::exit::Usage;
use crate::cli::{secret as secrets, text};
use crate::service::kubernetes;
use crate::service::manager;
use crate::service::manager::auth::{
    self, Claims, Groups, Jwt, Kubernetes, Oidc, Permission, Proxies, Tokens,
};

/// Returns the error for a required setting that is missing.
pub(super) fn missing(flag: &str, what: &str) -> Usage {
    let (variable, key) = (
        flag.to_uppercase().replace('-', "_"),
        flag.replace('-', "_"),
    );
    Usage(format!(
        "{what}: --{flag}, UPPERDECK_{variable} or {key} in the settings file"
    ))
}

/// Reads a secret from a file. An error names the setting.
pub(super) fn secret(flag: &str, file: &Path) -> Result<Zeroizing<String>, Usage> {
    secrets::trimmed_line(file)
        .map_err(|error| Usage(format!("--{flag} {}: {error}", text::path(file))))
}

/// Reads the tokens in `--tokens-file`.
pub(super) fn tokens(serve: &Serve) -> Result<Tokens, Usage> {
    let Some(file) = &serve.tokens_file else {
        return Ok(Tokens::default());
    };
    let wrong = |reason: String| Usage(format!("--tokens-file {}: {reason}", text::path(file)));
    let content = std::fs::read_to_string(file).map_err(|error| wrong(error.to_string()))?;
    secrets::warn_if_shared(file);
    Tokens::parse(&content).map_err(|error| wrong(error.to_string()))
}

/// Adds the ways to authenticate beside tokens.
pub(super) fn apply(serve: &Serve, options: &mut manager::Options) -> Result<(), Usage> {
    let callers = &serve.callers;
    options.jwt = jwt(serve)?;
    options.oidc = oidc(serve)?;
    options.kubernetes = kubernetes(callers)?;
    options.resources = resources(callers)?;
    options.groups = groups(callers)?;
    options.proxies = proxies(callers)?;
    Ok(())
}

/// Returns whether no user could sign in.
pub(super) fn lacks_callers(options: &manager::Options) -> bool {
    let without_tokens = options.jwt.is_none() && options.proxies.is_none();
    let without_provider = options.oidc.is_none() && options.kubernetes.is_none();
    options.tokens.is_empty() && without_tokens && without_provider
}

/// Returns the claim with users' addresses, if there are e-mails.
fn email(serve: &Serve, claim: &str) -> Option<String> {
    let sent = serve.mail.smtp_url.is_some();
    sent.then(|| claim.to_owned())
}

/// Returns the settings for authentication by JWT.
fn jwt(serve: &Serve) -> Result<Option<Jwt>, Usage> {
    let callers = &serve.callers;
    let Some(jwks) = &callers.jwks else {
        return Ok(None);
    };
    let keys = if jwks.contains("://") {
        auth::Keys::Url(jwks.clone())
    } else {
        auth::Keys::File(jwks.into())
    };
    let issuer = callers.jwt_issuer.clone();
    let audience = callers.jwt_audience.clone();
    Ok(Some(Jwt {
        keys,
        issuer: issuer.ok_or_else(|| missing("jwt-issuer", "--jwks needs it"))?,
        audience: audience.ok_or_else(|| missing("jwt-audience", "--jwks needs it"))?,
        claims: Claims {
            user: callers.jwt_user_claim.clone(),
            groups: callers.jwt_groups_claim.clone(),
            email: email(serve, &callers.jwt_email_claim),
            administrator: callers.jwt_admin_claim.clone(),
            administrators: callers.administrator.clone(),
        },
    }))
}

/// Returns the settings for signing in with an identity provider.
fn oidc(serve: &Serve) -> Result<Option<Oidc>, Usage> {
    let callers = &serve.callers;
    let Some(issuer) = &callers.oidc_issuer else {
        return Ok(None);
    };
    let client_id = callers.oidc_client_id.clone();
    let redirect = serve.public_url.clone();
    let secret_file = callers.oidc_client_secret_file.as_deref();
    let host = reqwest::Url::parse(issuer).ok();
    let host = host.and_then(|url| url.host_str().map(str::to_owned));
    let name = callers.oidc_name.clone().or(host);
    let mut scopes = callers.oidc_scope.clone();
    if scopes.is_empty() {
        scopes = vec!["profile".to_owned(), "email".to_owned()];
    }
    Ok(Some(Oidc {
        issuer: issuer.clone(),
        name: name.unwrap_or_default(),
        client_id: client_id.ok_or_else(|| missing("oidc-client-id", "--oidc-issuer needs it"))?,
        client_secret: secret_file
            .map(|file| secret("oidc-client-secret-file", file))
            .transpose()?,
        scopes,
        claims: Claims {
            user: callers.oidc_user_claim.clone(),
            groups: callers.oidc_groups_claim.clone(),
            email: email(serve, &callers.oidc_email_claim),
            administrator: callers.oidc_admin_claim.clone(),
            administrators: callers.administrator.clone(),
        },
        redirect: redirect.ok_or_else(|| missing("public-url", "--oidc-issuer needs it"))?,
        lifetime: callers.oidc_session,
    }))
}

/// Returns the settings for authentication by a Kubernetes cluster.
fn kubernetes(callers: &Callers) -> Result<Option<Kubernetes>, Usage> {
    if !callers.kubernetes_auth {
        return Ok(None);
    }
    let mut audiences = callers.kubernetes_audience.clone();
    if audiences.is_empty() {
        audiences = vec![kubernetes::AUDIENCE.to_owned()];
    }
    // Without an audience, the API server would accept tokens that are meant for itself.
    if audiences.iter().any(String::is_empty) {
        return Err(Usage("--kubernetes-audience: it is empty".to_owned()));
    }
    let prefix = callers.kubernetes_user_prefix.clone();
    Ok(Some(Kubernetes {
        kubeconfig: callers.kubeconfig.clone(),
        audiences,
        permission: match callers.kubernetes_permission {
            KubernetesPermission::Saves => Permission::Saves,
            KubernetesPermission::Exec => Permission::Exec,
        },
        user_prefix: prefix.filter(|prefix| !prefix.is_empty()),
        administrators: callers.administrator.clone(),
    }))
}

/// Returns the settings for `Save` resources of a Kubernetes cluster.
fn resources(callers: &Callers) -> Result<Option<manager::Resources>, Usage> {
    if !callers.kubernetes_crd {
        return Ok(None);
    }
    // Who created a resource is not known: the right to create one is the right to save.
    if callers.kubernetes_permission == KubernetesPermission::Exec {
        return Err(Usage(
            "--kubernetes-crd: whoever may create a Save may save, which --kubernetes-permission exec does not allow"
                .to_owned(),
        ));
    }
    Ok(Some(manager::Resources {
        kubeconfig: callers.kubeconfig.clone(),
    }))
}

/// Reads the groups in `--groups-file`.
fn groups(callers: &Callers) -> Result<Groups, Usage> {
    let Some(file) = &callers.groups_file else {
        return Ok(Groups::default());
    };
    let wrong = |reason: String| Usage(format!("--groups-file {}: {reason}", text::path(file)));
    let content = std::fs::read_to_string(file).map_err(|error| wrong(error.to_string()))?;
    Groups::parse(&content).map_err(|error| wrong(error.to_string()))
}

/// Returns the settings for authentication by a proxy.
fn proxies(callers: &Callers) -> Result<Option<Proxies>, Usage> {
    let Some(header) = &callers.proxy_header else {
        return Ok(None);
    };
    if callers.proxy_from.is_empty() {
        return Err(missing("proxy-from", "--proxy-header needs it"));
    }
    let mut proxies = Proxies::new(header, &callers.proxy_from, callers.administrator.clone())
        .map_err(|error| Usage(format!("--proxy-header, --proxy-from: {error}")))?;
    if let Some(header) = &callers.proxy_groups_header {
        proxies = proxies
            .with_groups(header)
            .map_err(|error| Usage(format!("--proxy-groups-header: {error}")))?;
    }
    if let Some(header) = &callers.proxy_email_header {
        proxies = proxies
            .with_email(header)
            .map_err(|error| Usage(format!("--proxy-email-header: {error}")))?;
    }
    Ok(Some(proxies))
}
