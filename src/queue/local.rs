//! The queue inside one process: `upperdeck up` without Redis. It forgets everything when the process ends; the record
//! does not.

use std::time::Duration;

use super::{Claim, Delivered, Depth, Error, Hold, Limits, Offered, Place, Withdrawn};
use crate::job::{JobId, Node, Order, Report, Session};

/// See the module.
#[derive(Clone)]
pub struct Local {
    limits: Limits,
}

impl Local {
    /// An empty queue.
    pub fn new(limits: Limits) -> Self {
        Self { limits }
    }

    #[allow(clippy::unused_async)]
    pub(super) async fn offer(&self, _order: &Order) -> Result<Offered, Error> {
        Err(Error::Unusable("not yet".to_owned()))
    }
    #[allow(clippy::unused_async)]
    pub(super) async fn withdraw(&self, _job: JobId) -> Result<Withdrawn, Error> {
        Err(Error::Unusable("not yet".to_owned()))
    }
    #[allow(clippy::unused_async)]
    pub(super) async fn places(&self, _jobs: &[JobId]) -> Result<Vec<Option<Place>>, Error> {
        Err(Error::Unusable("not yet".to_owned()))
    }
    #[allow(clippy::unused_async)]
    pub(super) async fn reports(
        &self,
        _manager: &str,
        _most: usize,
        _wait: Duration,
    ) -> Result<Vec<Delivered>, Error> {
        Err(Error::Unusable("not yet".to_owned()))
    }
    #[allow(clippy::unused_async)]
    pub(super) async fn taken(&self, _entries: &[String]) -> Result<(), Error> {
        Err(Error::Unusable("not yet".to_owned()))
    }
    #[allow(clippy::unused_async)]
    pub(super) async fn nodes(&self) -> Result<Vec<Node>, Error> {
        Err(Error::Unusable("not yet".to_owned()))
    }
    #[allow(clippy::unused_async)]
    pub(super) async fn sessions(&self) -> Result<Vec<Session>, Error> {
        Err(Error::Unusable("not yet".to_owned()))
    }
    #[allow(clippy::unused_async)]
    pub(super) async fn depth(&self) -> Result<Depth, Error> {
        Err(Error::Unusable("not yet".to_owned()))
    }
    #[allow(clippy::unused_async)]
    pub(super) async fn ping(&self) -> Result<(), Error> {
        Err(Error::Unusable("not yet".to_owned()))
    }
    #[allow(clippy::unused_async)]
    pub(super) async fn reclaim(&self, _node: &str, _agent: &str) -> Result<Vec<Claim>, Error> {
        Err(Error::Unusable("not yet".to_owned()))
    }
    #[allow(clippy::unused_async)]
    pub(super) async fn claim(
        &self,
        _node: &str,
        _agent: &str,
        _most: usize,
        _wait: Duration,
    ) -> Result<Vec<Claim>, Error> {
        Err(Error::Unusable("not yet".to_owned()))
    }
    #[allow(clippy::unused_async)]
    pub(super) async fn renew(&self, _claim: &Claim) -> Result<Hold, Error> {
        Err(Error::Unusable("not yet".to_owned()))
    }
    #[allow(clippy::unused_async)]
    pub(super) async fn confirm(&self, _claim: &Claim) -> Result<Hold, Error> {
        Err(Error::Unusable("not yet".to_owned()))
    }
    #[allow(clippy::unused_async)]
    pub(super) async fn report(&self, _claim: &Claim, _report: &Report) -> Result<Hold, Error> {
        Err(Error::Unusable("not yet".to_owned()))
    }
    #[allow(clippy::unused_async)]
    pub(super) async fn complete(&self, _claim: &Claim, _report: &Report) -> Result<Hold, Error> {
        Err(Error::Unusable("not yet".to_owned()))
    }
    #[allow(clippy::unused_async)]
    pub(super) async fn heartbeat(
        &self,
        _node: &Node,
        _sessions: Option<&[Session]>,
    ) -> Result<(), Error> {
        Err(Error::Unusable("not yet".to_owned()))
    }
}
