//! Why a save waits: its position in the queue, and what holds it back.

use std::collections::HashMap;

use super::App;
use super::api::{Waiting, WaitingReason};
use super::time::rfc3339;
use crate::service::job::{JobId, State, now_ms};
use crate::service::queue::Place;
use crate::service::record::Save;

/// Share of time in per cent in which tasks of a node waited for a core, from which on a background save is slowed down.
const BUSY_PRESSURE: f64 = 30.0;

/// What holds a save back.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Standing {
    /// Number of saves ahead of it.
    pub(super) place: Option<u64>,
    pub(super) waiting: Option<Waiting>,
    /// Whether its node's agent lets it run at normal priority when asked.
    pub(super) can_hurry: bool,
}

/// What is known of a save's node.
struct NodeState {
    alive: bool,
    draining: bool,
    full: bool,
    /// Whether its sessions want the cores that a background save would use.
    busy: bool,
    can_hurry: bool,
}

/// Returns the standings of those of `saves` that have not ended. What cannot be found out is left out, because the
/// saves are shown anyway.
pub(super) async fn standings(app: &App, saves: &[Save]) -> HashMap<JobId, Standing> {
    let open: Vec<&Save> = saves.iter().filter(|save| !save.state.is_final()).collect();
    if open.is_empty() {
        return HashMap::new();
    }
    let queued: Vec<JobId> = open
        .iter()
        .filter(|save| save.state == State::Queued)
        .map(|save| save.id)
        .collect();
    let (found, queue_up) = if queued.is_empty() {
        (Vec::new(), true)
    } else {
        let places = app.queue.places(&queued).await;
        let queue_up = places.is_ok();
        (places.unwrap_or_default(), queue_up)
    };
    let places: HashMap<JobId, u64> = queued
        .into_iter()
        .zip(found)
        .filter_map(|(id, place)| match place {
            Some(Place::Waiting(before)) => Some((id, before)),
            _ => None,
        })
        .collect();
    let nodes = nodes(app).await;
    let now = now_ms();
    let standing = |save: &Save| Standing {
        place: places.get(&save.id).copied(),
        can_hurry: nodes.get(&save.node).is_some_and(|node| node.can_hurry),
        waiting: if save.state == State::Queued && !queue_up {
            Some(Waiting {
                reason: WaitingReason::QueueDown,
                node: save.node.clone(),
                until: None,
            })
        } else {
            waiting(
                save,
                nodes.get(&save.node),
                places.get(&save.id).copied(),
                now,
            )
        },
    };
    open.into_iter()
        .map(|save| (save.id, standing(save)))
        .collect()
}

async fn nodes(app: &App) -> HashMap<String, NodeState> {
    let Ok(nodes) = app.inventory.nodes(&app.queue).await else {
        return HashMap::new();
    };
    let state = |status: &super::inventory::NodeStatus| {
        let (node, load) = (&status.node, &status.node.load);
        NodeState {
            alive: status.is_alive(),
            draining: node.draining,
            full: node.running.len() as u64 >= u64::from(load.slots.max(1)),
            busy: load.background
                && load.cpu_pressure.map_or_else(
                    || load.load1 > f64::from(load.cores),
                    |pressure| pressure >= BUSY_PRESSURE,
                ),
            can_hurry: status.is_alive() && load.hurry,
        }
    };
    let all = nodes.iter();
    all.map(|status| (status.node.name.clone(), state(status)))
        .collect()
}

fn waiting(
    save: &Save,
    node: Option<&NodeState>,
    place: Option<u64>,
    now_ms: i64,
) -> Option<Waiting> {
    let for_reason = |reason| Waiting {
        reason,
        node: save.node.clone(),
        until: None,
    };
    match save.state {
        State::Queued if save.not_before_ms > now_ms => Some(Waiting {
            until: Some(rfc3339(save.not_before_ms)),
            ..for_reason(WaitingReason::Retry)
        }),
        State::Queued | State::Assigned => {
            let node = node?;
            if !node.alive {
                Some(for_reason(WaitingReason::Node))
            } else if node.draining {
                Some(for_reason(WaitingReason::Draining))
            } else if save.state == State::Queued && node.full {
                Some(for_reason(if node.busy {
                    WaitingReason::Cores
                } else {
                    WaitingReason::Slot
                }))
            } else {
                place
                    .filter(|before| *before > 0)
                    .map(|_| for_reason(WaitingReason::Queue))
            }
        }
        State::Running => {
            let node = node?;
            if node.alive {
                (node.busy && !save.hurried).then(|| for_reason(WaitingReason::Cores))
            } else {
                Some(for_reason(WaitingReason::Node))
            }
        }
        State::Succeeded | State::Failed | State::Cancelled => None,
    }
}
