//! Flags for identity providers, proxies and groups.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum, ValueHint};

use super::super::value::{duration, key_value};
use super::CALLERS;

/// Flags of a manager that say who may call it, beside its tokens.
#[derive(Debug, Args)]
pub(in crate::cli) struct Callers {
    /// JSON Web Key Set that users' tokens are verified with: a file, or an https:// URL
    #[arg(long, value_name = "FILE|URL", help_heading = CALLERS)]
    pub(in crate::cli) jwks: Option<String>,
    /// Required issuer of the tokens
    #[arg(long, value_name = "ISSUER", help_heading = CALLERS)]
    pub(in crate::cli) jwt_issuer: Option<String>,
    /// Required audience of the tokens
    #[arg(long, value_name = "AUDIENCE", help_heading = CALLERS)]
    pub(in crate::cli) jwt_audience: Option<String>,
    /// Claim with the user's name
    #[arg(long, value_name = "CLAIM", default_value = "sub", help_heading = CALLERS)]
    pub(in crate::cli) jwt_user_claim: String,
    /// Claim with the names of the user's groups, e.g. groups
    #[arg(long, value_name = "CLAIM", help_heading = CALLERS)]
    pub(in crate::cli) jwt_groups_claim: Option<String>,
    /// Claim with the user's e-mail address, used with --smtp-url
    #[arg(long, value_name = "CLAIM", default_value = "email", help_heading = CALLERS)]
    pub(in crate::cli) jwt_email_claim: String,
    /// Claim and value that mark administrators, e.g. realm_access.roles=upperdeck-admin
    #[arg(long, value_name = "CLAIM=VALUE", value_parser = key_value, help_heading = CALLERS)]
    pub(in crate::cli) jwt_admin_claim: Option<(String, String)>,
    /// OpenID Connect provider that signs users in on the page; its client is registered with --public-url as the redirect
    /// URI
    #[arg(long, value_name = "URL", value_hint = ValueHint::Url, help_heading = CALLERS)]
    pub(in crate::cli) oidc_issuer: Option<String>,
    /// Name of the provider on the page [default: the issuer's host]
    #[arg(long, value_name = "TEXT", help_heading = CALLERS)]
    pub(in crate::cli) oidc_name: Option<String>,
    /// Client ID of the manager at the provider
    #[arg(long, value_name = "ID", help_heading = CALLERS)]
    pub(in crate::cli) oidc_client_id: Option<String>,
    /// File with the client's secret (/dev/fd/N for a descriptor) [default: none, for a public client]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = CALLERS)]
    pub(in crate::cli) oidc_client_secret_file: Option<PathBuf>,
    /// Scope to request in addition to openid; may be repeated [default: profile and email]
    #[arg(long, value_name = "SCOPE", help_heading = CALLERS)]
    pub(in crate::cli) oidc_scope: Vec<String>,
    /// Claim with the user's name: unique, and not for the user to change
    #[arg(long, value_name = "CLAIM", default_value = "sub", help_heading = CALLERS)]
    pub(in crate::cli) oidc_user_claim: String,
    /// Claim with the names of the user's groups, e.g. groups
    #[arg(long, value_name = "CLAIM", help_heading = CALLERS)]
    pub(in crate::cli) oidc_groups_claim: Option<String>,
    /// Claim with the user's e-mail address, used with --smtp-url
    #[arg(long, value_name = "CLAIM", default_value = "email", help_heading = CALLERS)]
    pub(in crate::cli) oidc_email_claim: String,
    /// Claim and value that mark administrators, e.g. groups=upperdeck-admin
    #[arg(long, value_name = "CLAIM=VALUE", value_parser = key_value, help_heading = CALLERS)]
    pub(in crate::cli) oidc_admin_claim: Option<(String, String)>,
    /// Time after which a user has to sign in again
    #[arg(long, value_name = "DURATION", value_parser = duration, default_value = "12h", help_heading = CALLERS)]
    pub(in crate::cli) oidc_session: Duration,
    /// Accept the tokens of users and service accounts of a Kubernetes cluster, and let its permissions decide which
    /// sessions they may save
    #[arg(long, help_heading = CALLERS)]
    pub(in crate::cli) kubernetes_auth: bool,
    /// Audience of which those tokens have to have one; may be repeated [default: upperdeck]
    #[arg(long, value_name = "AUDIENCE", help_heading = CALLERS)]
    pub(in crate::cli) kubernetes_audience: Vec<String>,
    /// What a user needs in the namespace of a session to save it: 'create' on saves.upperdeck.io, or on pods/exec
    #[arg(long, value_enum, value_name = "WHAT", default_value_t = KubernetesPermission::Saves, help_heading = CALLERS)]
    pub(in crate::cli) kubernetes_permission: KubernetesPermission,
    /// Prefix of users' names in the cluster, e.g. oidc:, that they do not have here; users without it are refused, but for
    /// service accounts
    #[arg(long, value_name = "TEXT", help_heading = CALLERS)]
    pub(in crate::cli) kubernetes_user_prefix: Option<String>,
    /// Act for the Save resources of a Kubernetes cluster (saves.upperdeck.io): whoever may create one in a namespace may
    /// save its pods
    #[arg(long, help_heading = CALLERS)]
    pub(in crate::cli) kubernetes_crd: bool,
    /// Kubeconfig with which the manager asks the API server [default: the service account of the manager's pod]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = CALLERS)]
    pub(in crate::cli) kubeconfig: Option<PathBuf>,
    /// TOML file with groups of users: a table [groups] with NAME = ["USER", …]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = CALLERS)]
    pub(in crate::cli) groups_file: Option<PathBuf>,
    /// User who is an administrator; may be repeated
    #[arg(long, value_name = "USER", help_heading = CALLERS)]
    pub(in crate::cli) administrator: Vec<String>,
    /// Header in which a proxy states the user; accepted only from --proxy-from
    #[arg(long, value_name = "NAME", help_heading = CALLERS)]
    pub(in crate::cli) proxy_header: Option<String>,
    /// Header in which it states the user's groups, separated by commas, e.g. X-Forwarded-Groups
    #[arg(long, value_name = "NAME", help_heading = CALLERS)]
    pub(in crate::cli) proxy_groups_header: Option<String>,
    /// Header in which it states the user's e-mail address, e.g. X-Forwarded-Email
    #[arg(long, value_name = "NAME", help_heading = CALLERS)]
    pub(in crate::cli) proxy_email_header: Option<String>,
    /// Addresses of the reverse proxy, e.g. 10.1.0.0/16, or unix for a socket file; its connections are exempt from
    /// --connections-per-peer; may be repeated
    #[arg(long, value_name = "CIDR", help_heading = CALLERS)]
    pub(in crate::cli) proxy_from: Vec<String>,
}

/// `--kubernetes-permission`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(in crate::cli) enum KubernetesPermission {
    /// create on saves.upperdeck.io; on saves/own, for the user's own sessions
    Saves,
    /// create on pods/exec
    Exec,
}
