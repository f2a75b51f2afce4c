//! The caller, and sign-ins of pages.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Email;
use crate::service::manager::auth::Via;

/// `GET /api/v1/me`: identity of the caller, for the portal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Me {
    /// User that the caller acts as.
    pub user: String,
    /// Whether the caller may see nodes, the saves of all users and the dead letters.
    pub administrator: bool,
    /// How the caller is authenticated.
    pub via: Via,
    /// Groups that the user is a member of.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<String>,
    /// Where a session is started from an image, if the administrator has set it: a URL with `{reference}`, which is
    /// replaced by the percent-encoded reference.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_url: Option<String>,
    /// E-mails to the caller, if the administrator has set a server for them and the caller's address is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub email: Option<Email>,
}

/// `POST /api/v1/signin`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct SignIn {
    /// Whether to replace another user who is signed in in this browser.
    pub(crate) replace: bool,
}

/// `GET /api/v1/signin/ways`: the ways to sign in with a browser.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct SignInWays {
    /// Whether tokens are accepted: `POST /api/v1/signin`.
    pub(crate) token: bool,
    /// Name of the identity provider that signs users in, if there is one: `POST /api/v1/signin/oidc`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) provider: Option<String>,
}

/// `POST /api/v1/signin/oidc`: a sign-in that has been begun.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct SignInBegun {
    /// Address of the identity provider, to which the page goes.
    pub(crate) url: String,
    /// Key that the page sends at the end of the sign-in.
    pub(crate) key: String,
}

/// `POST /api/v1/signin/oidc/answer`: what the identity provider has added to the address of the page.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct SignInAnswer {
    /// The key of the beginning.
    pub(crate) key: String,
    /// `state`.
    pub(crate) state: String,
    /// `code`.
    pub(crate) code: Option<String>,
    /// `iss`.
    pub(crate) iss: Option<String>,
    /// `error`.
    pub(crate) error: Option<String>,
    /// `error_description`.
    pub(crate) error_description: Option<String>,
}

/// A sign-out that the identity provider completes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct SignedOut {
    /// Address of the identity provider that ends the session there, to which the page goes.
    pub(crate) provider: String,
}

/// A successful sign-in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct SignedIn {
    /// The user; empty for an administrator without a user name.
    pub(crate) user: String,
    /// Whether the user is an administrator.
    pub(crate) administrator: bool,
    /// Key that the page sends in the `Upperdeck-Page` header and stores where no other origin can read it.
    pub(crate) key: String,
    /// When the sign-in expires.
    #[schema(format = DateTime)]
    pub(crate) expires: String,
}
