//! A minimal record: what managers must do with reports, and nothing else.

use std::collections::{BTreeMap, BTreeSet};

use upperdeck::service::job::{JobId, Order, Outcome as Ending, Report, Update};

/// State of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Where {
    Queued,
    Running,
    Succeeded,
    Cancelled,
}

pub struct Row {
    pub order: Order,
    pub at: Where,
    /// Whether cancellation was requested.
    pub unwanted: bool,
    /// How often it ended. Must be 1.
    pub ends: u32,
    seen: BTreeSet<(u64, u64)>,
}

#[derive(Default)]
pub struct Record {
    pub rows: BTreeMap<JobId, Row>,
}

impl Record {
    pub fn accept(&mut self, order: &Order) {
        let row = Row {
            order: order.clone(),
            at: Where::Queued,
            unwanted: false,
            ends: 0,
            seen: BTreeSet::new(),
        };
        self.rows.insert(order.job, row);
    }

    /// Applies a report once, and only from the latest holder of the job. Returns whether an agent is working on a job
    /// that has ended.
    pub fn apply(&mut self, report: &Report) -> bool {
        let Some(row) = self.rows.get_mut(&report.job) else {
            return true;
        };
        if report.fence < row.order.fence_after || !row.seen.insert((report.fence, report.seq)) {
            return false;
        }
        row.order.fence_after = report.fence;
        if row.is_over() {
            return !matches!(
                report.update,
                Update::Ended { .. } | Update::GivenBack { .. }
            );
        }
        let again = match &report.update {
            Update::Ended {
                outcome: Ending::Succeeded { .. },
            } => {
                row.end(Where::Succeeded);
                false
            }
            Update::Ended {
                outcome: Ending::Cancelled,
            } => {
                row.end(Where::Cancelled);
                false
            }
            Update::Ended {
                outcome: Ending::Failed { .. },
            }
            | Update::GivenBack { .. } => true,
            _ => {
                row.at = Where::Running;
                false
            }
        };
        if again {
            row.order.attempt += 1;
            row.at = Where::Queued;
            if row.unwanted {
                row.end(Where::Cancelled);
            }
        }
        false
    }

    /// Returns the jobs that have not ended.
    pub fn open(&self) -> Vec<JobId> {
        self.rows
            .iter()
            .filter(|(_, row)| !row.is_over())
            .map(|(job, _)| *job)
            .collect()
    }
}

impl Row {
    pub fn is_over(&self) -> bool {
        matches!(self.at, Where::Succeeded | Where::Cancelled)
    }

    pub fn end(&mut self, at: Where) {
        self.at = at;
        self.ends += 1;
    }
}
