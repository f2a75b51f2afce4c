//! One of several managers acts for the cluster's `Save` resources: the one that holds a Lease.
//!
//! Times of other clocks are not compared: a lease has ended when it was not renewed for its duration by this manager's own
//! clock. Two managers that act at once do no harm, as a `Save` has one idempotency key.

use std::time::{Duration, Instant};

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, ObjectMeta, PostParams};

/// Name of the Lease.
pub(super) const NAME: &str = "upperdeck-saves";
/// How long a lease lasts without being renewed.
const DURATION: Duration = Duration::from_secs(15);
/// How long this manager acts after it renewed the lease: less than until another may take it.
const VALID: Duration = Duration::from_secs(10);
/// How often it is renewed, or looked at.
pub(super) const EVERY: Duration = Duration::from_secs(5);

/// A manager's view of the Lease.
pub(super) struct Leader {
    leases: Api<Lease>,
    name: String,
    /// Last change of the Lease that was seen, and when.
    seen: Option<(Option<String>, Instant)>,
    /// When this manager renewed it.
    held: Option<Instant>,
}

impl Leader {
    pub(super) fn new(leases: Api<Lease>, name: &str) -> Self {
        Self {
            leases,
            name: name.to_owned(),
            seen: None,
            held: None,
        }
    }

    /// Returns whether this manager holds the Lease for longer than it takes to notice that it does not.
    pub(super) fn leads(&self) -> bool {
        self.held.is_some_and(|at| at.elapsed() < VALID)
    }

    /// Renews the Lease, or takes it if it has ended.
    pub(super) async fn attempt(&mut self) -> Result<(), kube::Error> {
        let began = Instant::now();
        let Some(lease) = self.leases.get_opt(NAME).await? else {
            let made = self
                .leases
                .create(&PostParams::default(), &self.lease(None, 0))
                .await;
            return self.taken(made, began);
        };
        let version = lease.metadata.resource_version.clone();
        let spec = lease.spec.clone().unwrap_or_default();
        let own = spec.holder_identity.as_ref() == Some(&self.name);
        if self.seen.as_ref().is_none_or(|(seen, _)| *seen != version) {
            self.seen = Some((version, began));
        }
        let unchanged = self
            .seen
            .as_ref()
            .map_or(Duration::ZERO, |(_, at)| at.elapsed());
        let free = spec.holder_identity.as_ref().is_none_or(String::is_empty);
        if !own && !free && unchanged < DURATION {
            self.held = None;
            return Ok(());
        }
        let transitions = spec.lease_transitions.unwrap_or(0) + i32::from(!own);
        let mut next = self.lease(Some(lease.metadata), transitions);
        if let (true, Some(next)) = (own, &mut next.spec) {
            next.acquire_time = spec.acquire_time;
        }
        let replaced = self
            .leases
            .replace(NAME, &PostParams::default(), &next)
            .await;
        self.taken(replaced, began)
    }

    /// Gives the Lease up, so that another manager need not wait.
    pub(super) async fn release(&mut self) {
        if self.held.take().is_none() {
            return;
        }
        let Ok(Some(mut lease)) = self.leases.get_opt(NAME).await else {
            return;
        };
        if let Some(spec) = &mut lease.spec
            && spec.holder_identity.as_ref() == Some(&self.name)
        {
            spec.holder_identity = None;
            // It ends by itself otherwise.
            let _ = self
                .leases
                .replace(NAME, &PostParams::default(), &lease)
                .await;
        }
    }

    fn taken(
        &mut self,
        result: Result<Lease, kube::Error>,
        began: Instant,
    ) -> Result<(), kube::Error> {
        self.held = None;
        match result {
            Ok(lease) => {
                if !self.leads() {
                    tracing::debug!(manager = self.name, "holds the lease for Save resources");
                }
                self.seen = Some((lease.metadata.resource_version, began));
                self.held = Some(began);
                Ok(())
            }
            // Another manager was faster.
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn lease(&self, metadata: Option<ObjectMeta>, transitions: i32) -> Lease {
        let now = MicroTime(Timestamp::now());
        let named = || ObjectMeta {
            name: Some(NAME.to_owned()),
            ..ObjectMeta::default()
        };
        Lease {
            metadata: metadata.unwrap_or_else(named),
            spec: Some(LeaseSpec {
                holder_identity: Some(self.name.clone()),
                lease_duration_seconds: Some(DURATION.as_secs() as i32),
                acquire_time: Some(now.clone()),
                renew_time: Some(now),
                lease_transitions: Some(transitions),
                ..LeaseSpec::default()
            }),
        }
    }
}
