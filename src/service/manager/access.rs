//! Which sessions a caller may save: its own, all, or those that the permissions of a Kubernetes cluster name.

use std::collections::{BTreeSet, HashMap};

use futures_util::{FutureExt as _, StreamExt as _};

use super::App;
use super::auth::{Caller, Cluster, Grant, Rejected, Subject};
use super::refusal::Refusal;
use crate::service::job::Session;
use crate::service::record::Save;

/// Maximum number of namespaces about which the cluster is asked for one request, and of questions at the same time.
const MAX_NAMESPACES: usize = 500;
const QUESTIONS: usize = 16;

/// The sessions that a caller may save.
#[derive(Debug)]
pub(super) enum Reach {
    /// Those that belong to the caller's user; for an administrator all.
    Owned,
    /// Those that a Kubernetes cluster grants, by namespace.
    Granted(HashMap<String, Grant>),
}

impl Reach {
    /// All sessions of one namespace.
    pub(super) fn namespace(namespace: &str) -> Self {
        Self::Granted([(namespace.to_owned(), Grant::All)].into())
    }

    /// Finds out which of these sessions `caller` may save.
    ///
    /// Fails if the cluster does not answer, and if it would have to be asked about too many namespaces.
    pub(super) async fn of(
        app: &App,
        caller: &Caller,
        sessions: impl Iterator<Item = &Session>,
    ) -> Result<Self, Refusal> {
        let Some(subject) = caller.subject.as_deref().filter(|_| !caller.administrator) else {
            return Ok(Self::Owned);
        };
        let cluster = app.authenticator.cluster().ok_or(Rejected::Cluster)?;
        let namespaces: BTreeSet<String> = sessions
            .filter_map(|session| session.namespace.clone())
            .filter(|namespace| !namespace.is_empty())
            .collect();
        // Someone who may do it everywhere is asked about once.
        if namespaces.len() > 1 && cluster.grants_all(subject).await? {
            let everywhere = namespaces.into_iter().map(|name| (name, Grant::All));
            return Ok(Self::Granted(everywhere.collect()));
        }
        if namespaces.len() > MAX_NAMESPACES {
            return Err(Refusal::invalid(
                "namespace",
                format!(
                    "there are sessions in more than {MAX_NAMESPACES} namespaces, and you may not save in all of them: name one"
                ),
            ));
        }
        let asked: Vec<_> = namespaces
            .into_iter()
            .map(|name| ask(cluster, subject, name).boxed())
            .collect();
        let answers: Vec<_> = futures_util::stream::iter(asked)
            .buffer_unordered(QUESTIONS)
            .collect()
            .await;
        let granted = answers.into_iter().collect::<Result<_, _>>()?;
        Ok(Self::Granted(granted))
    }

    /// Returns whether the caller may save a session.
    pub(super) fn covers(&self, caller: &Caller, session: &Session) -> bool {
        let owned = session.owner.is_some() && session.owner.as_deref() == caller.user.as_deref();
        let granted = match self {
            Self::Owned => return caller.administrator || owned,
            Self::Granted(granted) => granted,
        };
        let Some(namespace) = session.namespace.as_deref() else {
            return false;
        };
        match granted.get(namespace) {
            Some(Grant::All) => true,
            Some(Grant::Own) => {
                let pod = session.pod.as_deref().unwrap_or_default();
                let subject = caller.subject.as_ref();
                owned || subject.is_some_and(|subject| subject.is_pod(namespace, pod))
            }
            Some(Grant::None) | None => false,
        }
    }
}

async fn ask(
    cluster: &Cluster,
    subject: &Subject,
    namespace: String,
) -> Result<(String, Grant), Rejected> {
    let grant = cluster.grant(subject, &namespace).await?;
    Ok((namespace, grant))
}

impl Caller {
    /// Returns whether this is a user of a Kubernetes cluster who asked for the save, whoever its image belongs to.
    pub(super) fn asked_for(&self, save: &Save) -> bool {
        self.subject.is_some() && save.caller == self.name
    }
}
