//! Authentication and permissions by a Kubernetes cluster.
//!
//! The API server says whose token it is (TokenReview) and what its user may do (SubjectAccessReview). Answers are kept for
//! seconds; nothing is allowed without one.

mod kept;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, UserInfo};
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec,
};
use kube::api::{Api, PostParams};
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use tokio::sync::Semaphore;

use super::claims::{Identity, known_groups};
use super::{AuthError, Rejected};
use crate::service::kubernetes::{self, GROUP};
use crate::service::log_limit::{LogLimit, warn_limited};
use crate::service::manager::target;
use kept::{Counted, Kept, Key, Places};

/// How long an answer of the API server is used.
const LIFETIME: Duration = Duration::from_secs(10);
/// Maximum numbers of tokens, of refused tokens and of permissions that are kept.
const MAX_TOKENS: usize = 10_000;
const MAX_REFUSED: usize = 4096;
const MAX_GRANTS: usize = 50_000;
/// Maximum number of questions to the API server at the same time about users that it has known before, and about others:
/// of all, and of one address.
const MAX_QUESTIONS: usize = 16;
const MAX_UNKNOWN_QUESTIONS: usize = 16;
const MAX_UNKNOWN_OF_PEER: usize = 4;
/// How long the API server is asked about a token, or its user, in the places of those that it has known before.
const KNOWN: Duration = Duration::from_secs(3600);
/// Time limit of a question, with the time that it waits for others.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum number of unknown tokens per second that are asked about for one address, and of such addresses.
const MAX_UNKNOWN: u32 = 100;
const MAX_PEERS: usize = 1000;
/// Prefix of the names of service accounts.
const ACCOUNT: &str = "system:serviceaccount:";
/// Extra value with the name of the pod that a token is bound to.
const POD_NAME: &str = "authentication.kubernetes.io/pod-name";

/// What a user needs to be allowed to in the namespace of a session, to save it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Permission {
    /// `create` on `saves.upperdeck.io`; on its subresource `own`, for sessions that belong to the user alone.
    #[default]
    Saves,
    /// `create` on `pods/exec`.
    Exec,
}

/// Settings for authentication by a Kubernetes cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kubernetes {
    /// The kubeconfig; `None`: the service account of the manager's pod.
    pub kubeconfig: Option<PathBuf>,
    /// Audiences of which a token has to have one.
    pub audiences: Vec<String>,
    /// What is needed for a save.
    pub permission: Permission,
    /// Prefix that users' names have in the cluster and that is removed. Users without it are refused, but for service
    /// accounts.
    pub user_prefix: Option<String>,
    /// Users who are administrators.
    pub administrators: Vec<String>,
}

/// A user of the cluster, as the API server describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Subject {
    /// Name in the cluster.
    name: String,
    uid: Option<String>,
    groups: Vec<String>,
    extra: BTreeMap<String, Vec<String>>,
    /// Namespace and name of the pod that the token is bound to.
    pod: Option<(String, String)>,
}

impl Subject {
    fn new(user: UserInfo) -> Self {
        let name = user.username.unwrap_or_default();
        let extra = user.extra.unwrap_or_default();
        let account = name.strip_prefix(ACCOUNT);
        let namespace = account.and_then(|account| Some(account.split_once(':')?.0));
        let pod = match (namespace, extra.get(POD_NAME).map(Vec::as_slice)) {
            (Some(namespace), Some([pod])) => Some((namespace.to_owned(), pod.clone())),
            _ => None,
        };
        Self {
            uid: user.uid,
            groups: user.groups.unwrap_or_default(),
            extra,
            pod,
            name,
        }
    }

    /// Returns the user's name in the cluster.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Returns whether the user is this pod.
    pub(crate) fn is_pod(&self, namespace: &str, pod: &str) -> bool {
        let own = self.pod.as_ref();
        own.is_some_and(|(own, name)| own == namespace && name == pod)
    }
}

/// Which sessions of a namespace a user may save.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Grant {
    /// None.
    None,
    /// Those that belong to the user, and the pod that the user is.
    Own,
    /// All.
    All,
}

/// A token that the API server knows.
#[derive(Clone, Debug)]
pub(super) struct Reviewed {
    pub(super) subject: Arc<Subject>,
    pub(super) identity: Identity,
}

/// The cluster.
pub(in super::super) struct Cluster {
    settings: Kubernetes,
    client: kube::Client,
    tokens: Kept<Reviewed>,
    refused: Kept<()>,
    grants: Kept<bool>,
    /// Tokens that were accepted in the last time, whose answers have to be asked for again.
    known: Kept<()>,
    questions: Semaphore,
    unknown_questions: Semaphore,
    /// Places of one address each among those of unknown tokens.
    peers: Places<Option<IpAddr>>,
    unknown: Counted<Option<IpAddr>>,
    log: LogLimit,
}

impl Cluster {
    /// Prepares the client. Fails if its settings cannot be read.
    pub(in super::super) async fn new(settings: Kubernetes) -> Result<Self, AuthError> {
        let wrong =
            |error: kubernetes::Error| AuthError::Kubernetes(crate::common::message::of(&error));
        let config = kubernetes::server_config(settings.kubeconfig.as_deref()).await;
        let mut config = config.map_err(wrong)?;
        // A question has little time, so that the caller decides whether to repeat it.
        config.default_retry = false;
        Ok(Self {
            client: kubernetes::client(config).map_err(wrong)?,
            settings,
            tokens: Kept::new(LIFETIME, MAX_TOKENS),
            refused: Kept::new(LIFETIME, MAX_REFUSED),
            grants: Kept::new(LIFETIME, MAX_GRANTS),
            known: Kept::new(KNOWN, MAX_TOKENS),
            questions: Semaphore::new(MAX_QUESTIONS),
            unknown_questions: Semaphore::new(MAX_UNKNOWN_QUESTIONS),
            peers: Places::new(MAX_UNKNOWN_OF_PEER),
            unknown: Counted::new(MAX_UNKNOWN, MAX_PEERS),
            log: LogLimit::default(),
        })
    }

    /// Asks both questions once, so that a missing permission of the manager is found at its start. An API server that does
    /// not answer yet is not a mistake in the settings.
    pub(super) async fn check(&self) -> Result<(), AuthError> {
        let audiences = self.settings.audiences.clone();
        let review = token_review("none".to_owned(), audiences);
        let access = Subject {
            name: "system:anonymous".to_owned(),
            ..Subject::default()
        };
        let asked = async {
            self.ask(&review, &self.questions).await?;
            let access = access_review(&access, self.settings.permission, "default", None);
            self.ask(&access, &self.questions).await.map(drop)
        };
        match asked.await {
            Err(Failed::Denied(reason)) => Err(AuthError::Kubernetes(format!(
                "the API server denies the manager TokenReview or SubjectAccessReview (ClusterRole \
                 system:auth-delegator): {reason}"
            ))),
            Err(Failed::Away(reason)) => {
                tracing::warn!(
                    kubernetes.error = reason,
                    "the API server does not answer: until it does, its users are refused"
                );
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    /// Returns whose token it is; `None` if the API server does not know it, or not for one of the audiences.
    pub(super) async fn review(
        &self,
        token: &str,
        peer: Option<IpAddr>,
    ) -> Result<Option<Reviewed>, Rejected> {
        let key: Key = Sha256::digest(token).into();
        if let Some(found) = self.tokens.get(&key) {
            return Ok(Some(found));
        }
        if self.refused.get(&key).is_some() {
            return Ok(None);
        }
        let asked = Instant::now();
        let audiences = &self.settings.audiences;
        let review = token_review(token.to_owned(), audiences.clone());
        let answer = if self.known.get(&key).is_some() {
            self.answer(&review, &self.questions).await?
        } else {
            self.answer_of_unknown(&review, peer.map(network)).await?
        };
        let answer = answer.status.unwrap_or_default();
        // A server that does not know audiences would leave them out, and accept tokens that are for others.
        let meant = answer.audiences.unwrap_or_default();
        let meant = meant.iter().any(|audience| audiences.contains(audience));
        let user = answer.user.filter(|user| {
            user.username
                .as_deref()
                .is_some_and(|name| !name.is_empty())
        });
        let Some(user) = user.filter(|_| meant && answer.authenticated == Some(true)) else {
            self.refused.put(key, (), asked);
            return Ok(None);
        };
        let subject = Subject::new(user);
        let found = Reviewed {
            identity: self.identity(&subject)?,
            subject: Arc::new(subject),
        };
        self.tokens.put(key, found.clone(), asked);
        self.known.put(key, (), asked);
        Ok(Some(found))
    }

    fn identity(&self, subject: &Subject) -> Result<Identity, Rejected> {
        let user = user_name(&subject.name, self.settings.user_prefix.as_deref()).ok_or(
            Rejected::Unknown("the cluster's name of this user cannot be one here"),
        )?;
        Ok(Identity {
            administrator: self.settings.administrators.contains(&user),
            groups: known_groups(subject.groups.iter().map(String::as_str)),
            email: None,
            user,
        })
    }

    /// Returns whether a user may save the sessions of all namespaces.
    pub(in super::super) async fn grants_all(&self, subject: &Subject) -> Result<bool, Rejected> {
        self.allowed(access_review(subject, self.settings.permission, "", None))
            .await
    }

    /// Returns which sessions of a namespace a user may save.
    pub(in super::super) async fn grant(
        &self,
        subject: &Subject,
        namespace: &str,
    ) -> Result<Grant, Rejected> {
        let permission = self.settings.permission;
        let all = access_review(subject, permission, namespace, None);
        if self.allowed(all).await? {
            return Ok(Grant::All);
        }
        if permission == Permission::Saves {
            let own = access_review(subject, permission, namespace, Some("own"));
            if self.allowed(own).await? {
                return Ok(Grant::Own);
            }
        }
        Ok(Grant::None)
    }

    async fn allowed(&self, review: SubjectAccessReview) -> Result<bool, Rejected> {
        // A structure of texts can always be serialized.
        let question = serde_json::to_vec(&review.spec).unwrap_or_default();
        let key: Key = Sha256::digest(question).into();
        if let Some(allowed) = self.grants.get(&key) {
            return Ok(allowed);
        }
        let asked = Instant::now();
        let answer = self
            .answer(&review, &self.questions)
            .await?
            .status
            .unwrap_or_default();
        let allowed = answer.allowed && answer.denied != Some(true);
        self.grants.put(key, allowed, asked);
        Ok(allowed)
    }

    /// Asks about a token that need not be one: such questions take no place of others.
    async fn answer_of_unknown(
        &self,
        review: &TokenReview,
        peer: Option<IpAddr>,
    ) -> Result<TokenReview, Rejected> {
        if !self.unknown.count(peer) {
            return Err(Rejected::Busy);
        }
        let place = self.peers.of(peer).acquire_owned();
        // The semaphore is never closed.
        let Ok(_place) = tokio::time::timeout(TIMEOUT, place).await else {
            return Err(Rejected::Busy);
        };
        self.answer(review, &self.unknown_questions).await
    }

    async fn answer<K: Question>(&self, question: &K, places: &Semaphore) -> Result<K, Rejected> {
        self.ask(question, places).await.map_err(|failed| {
            let (Failed::Denied(reason) | Failed::Away(reason)) = failed;
            warn_limited!(
                self.log,
                kubernetes.error = reason,
                "the API server gives no answer: its users are refused"
            );
            Rejected::Cluster
        })
    }

    async fn ask<K: Question>(&self, question: &K, places: &Semaphore) -> Result<K, Failed> {
        let asked = async {
            // The semaphore is never closed.
            let _place = places.acquire().await;
            let api: Api<K> = Api::all(self.client.clone());
            api.create(&PostParams::default(), question).await
        };
        match tokio::time::timeout(TIMEOUT, asked).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(kube::Error::Api(status))) if matches!(status.code, 401 | 403) => {
                Err(Failed::Denied(status.message.clone()))
            }
            Ok(Err(error)) => Err(Failed::Away(crate::common::message::of(&error))),
            Err(_) => Err(Failed::Away(format!(
                "no answer within {} s",
                TIMEOUT.as_secs()
            ))),
        }
    }
}

/// Why there is no answer.
enum Failed {
    /// The manager may not ask.
    Denied(String),
    /// The API server does not answer, or not in a way that is understood.
    Away(String),
}

/// A review, which is created and answered at once.
trait Question:
    kube::Resource<DynamicType = ()> + Serialize + serde::de::DeserializeOwned + Clone + std::fmt::Debug
{
}

impl Question for TokenReview {}
impl Question for SubjectAccessReview {}

fn token_review(token: String, audiences: Vec<String>) -> TokenReview {
    TokenReview {
        spec: TokenReviewSpec {
            token,
            audiences: Some(audiences),
        },
        ..TokenReview::default()
    }
}

fn access_review(
    subject: &Subject,
    permission: Permission,
    namespace: &str,
    subresource: Option<&str>,
) -> SubjectAccessReview {
    let (group, resource, subresource) = match permission {
        Permission::Saves => (GROUP, "saves", subresource),
        Permission::Exec => ("", "pods", Some("exec")),
    };
    SubjectAccessReview {
        spec: SubjectAccessReviewSpec {
            user: Some(subject.name.clone()),
            uid: subject.uid.clone(),
            groups: Some(subject.groups.clone()),
            extra: Some(subject.extra.clone()),
            resource_attributes: Some(ResourceAttributes {
                group: Some(group.to_owned()),
                resource: Some(resource.to_owned()),
                subresource: subresource.map(str::to_owned),
                verb: Some("create".to_owned()),
                namespace: Some(namespace.to_owned()),
                ..ResourceAttributes::default()
            }),
            ..SubjectAccessReviewSpec::default()
        },
        ..SubjectAccessReview::default()
    }
}

/// Returns the network that an address is counted with: itself, or the /64 of an IPv6 address.
fn network(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6((address.to_bits() >> 64 << 64).into()),
        address @ IpAddr::V4(_) => address,
    }
}

/// Returns the name that a user of the cluster has here, or `None` if it can have none.
///
/// A service account whose name is too long gets a digest in its place, behind `#`, which no such name has. A name that is
/// that of the cluster's own users once the prefix is removed is refused.
fn user_name(name: &str, prefix: Option<&str>) -> Option<String> {
    let fits = |name: &str| target::component(name).is_ok();
    if name.starts_with(ACCOUNT) {
        let short = || format!("{ACCOUNT}#{}", &hex::encode(Sha256::digest(name))[..40]);
        return Some(name.to_owned())
            .filter(|name| fits(name))
            .or_else(|| Some(short()));
    }
    let name = match prefix {
        Some(prefix) => name
            .strip_prefix(prefix)
            .filter(|name| !name.starts_with("system:"))?,
        None => name,
    };
    fits(name).then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_of_the_cluster_never_share_a_name() {
        let long = format!("{ACCOUNT}jupyterhub-production:{}", "n".repeat(63));
        let other = format!("{ACCOUNT}jupyterhub-production:{}m", "n".repeat(62));
        for (name, prefix, expected) in [
            ("alice", None, Some("alice")),
            ("oidc:alice", None, Some("oidc:alice")),
            ("oidc:alice", Some("oidc:"), Some("alice")),
            ("alice", Some("oidc:"), None),
            ("oidc:system:serviceaccount:a:b", Some("oidc:"), None),
            ("oidc:", Some("oidc:"), None),
            (
                "system:serviceaccount:a:b",
                Some("oidc:"),
                Some("system:serviceaccount:a:b"),
            ),
            (
                "system:serviceaccount:a:b",
                None,
                Some("system:serviceaccount:a:b"),
            ),
            ("a\nb", None, None),
        ] {
            assert_eq!(
                user_name(name, prefix).as_deref(),
                expected,
                "{name} {prefix:?}"
            );
        }
        let (long, other) = (
            user_name(&long, None).unwrap(),
            user_name(&other, None).unwrap(),
        );
        assert!(
            long != other && long.starts_with("system:serviceaccount:#"),
            "{long}"
        );
        assert!(target::component(&long).is_ok());
    }

    #[test]
    fn only_a_service_account_is_a_pod() {
        let user = |name: &str| UserInfo {
            username: Some(name.to_owned()),
            extra: Some([(POD_NAME.to_owned(), vec!["nb".to_owned()])].into()),
            ..UserInfo::default()
        };
        assert!(Subject::new(user("system:serviceaccount:hub:default")).is_pod("hub", "nb"));
        assert!(!Subject::new(user("system:serviceaccount:hub:default")).is_pod("lab", "nb"));
        assert_eq!(Subject::new(user("alice")).pod, None);
    }

    #[test]
    fn an_address_counts_with_its_network() {
        let network = |text: &str| text.parse().map(network).ok();
        assert_eq!(network("2001:db8::1"), network("2001:db8::ffff:2"));
        assert_ne!(network("2001:db8::1"), network("2001:db8:0:1::1"));
        assert_eq!(network("::ffff:10.0.0.1"), network("10.0.0.1"));
    }
}
