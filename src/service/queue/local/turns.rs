//! The orders of one node: the users take turns. Saves that a user, an administrator or the end of a session asked for go
//! before autosaves.

use std::collections::{BTreeMap, VecDeque};

use crate::service::job::{JobId, Order};

/// Orders that wait for the agents of one node.
#[derive(Default)]
pub(super) struct NodeQueue {
    wanted: Turns,
    autosaves: Turns,
    /// Consumer names in order of appearance; the newest is last.
    agents: Vec<String>,
}

/// Orders of one class that wait.
#[derive(Default)]
pub(super) struct Turns {
    /// Turn of the user who was served last.
    turn: u64,
    /// Users, with the turn at which each is served next.
    pub(super) users: BTreeMap<String, (u64, VecDeque<JobId>)>,
    pub(super) later: Vec<JobId>,
}

impl Turns {
    /// Appends a job to its user's list. A user without waiting jobs gets the current turn: neither behind all jobs of
    /// another user, nor always ahead of everyone.
    pub(super) fn push(&mut self, user: &str, id: JobId) {
        let (turn, list) = self.users.entry(user.to_owned()).or_default();
        if list.is_empty() {
            *turn = (*turn).max(self.turn);
        }
        list.push_back(id);
    }

    pub(super) fn serve(&mut self, user: &str, turn: u64, id: JobId) {
        self.turn = self.turn.max(turn);
        if let Some((next, list)) = self.users.get_mut(user) {
            *next = turn + 1;
            list.retain(|waiting| *waiting != id);
        }
        self.tidy();
    }

    /// Removes users without waiting jobs, once their turn no longer affects the order.
    fn tidy(&mut self) {
        let turn = self.turn;
        self.users
            .retain(|_, (next, list)| !list.is_empty() || *next > turn);
        if self.users.values().all(|(_, list)| list.is_empty()) {
            self.users.clear();
        }
    }

    fn forget(&mut self, order: &Order) {
        self.later.retain(|later| *later != order.job);
        if let Some((_, list)) = self.users.get_mut(&order.owner) {
            list.retain(|waiting| *waiting != order.job);
        }
        self.tidy();
    }

    /// Returns how many jobs of the class will be admitted before `order`, according to the present state.
    fn before(&self, order: &Order) -> u64 {
        let Some((turn, list)) = self.users.get(&order.owner) else {
            return self.all();
        };
        let Some(index) = list.iter().position(|id| *id == order.job) else {
            return self.all();
        };
        let index = index as u64;
        let own = turn + index;
        self.users
            .iter()
            .filter(|(user, _)| **user != order.owner)
            .map(|(user, (turn, list))| {
                // Users with the same turn are served in the order of their names.
                let until = own + u64::from(*user < order.owner);
                until.saturating_sub(*turn).min(list.len() as u64)
            })
            .sum::<u64>()
            + index
    }

    /// Returns the number of jobs that are due.
    fn all(&self) -> u64 {
        self.users
            .values()
            .map(|(_, list)| list.len() as u64)
            .sum::<u64>()
    }

    fn is_empty(&self) -> bool {
        self.later.is_empty() && self.all() == 0
    }
}

impl NodeQueue {
    /// Returns the orders that are autosaves, or the others.
    pub(super) fn class(&mut self, autosave: bool) -> &mut Turns {
        if autosave {
            &mut self.autosaves
        } else {
            &mut self.wanted
        }
    }

    /// Returns whether orders of this class may be admitted: autosaves only while no other order waits, whatever it waits
    /// for.
    pub(super) fn may_admit(&self, autosave: bool) -> bool {
        !autosave || self.wanted.is_empty()
    }

    pub(super) fn forget(&mut self, order: &Order) {
        self.class(order.autosave).forget(order);
    }

    /// Returns how many jobs will be admitted before `order`, according to the present state.
    pub(super) fn before(&self, order: &Order) -> u64 {
        if order.autosave {
            self.wanted.all() + self.wanted.later.len() as u64 + self.autosaves.before(order)
        } else {
            self.wanted.before(order)
        }
    }

    /// Registers `agent` and returns whether it is the newest consumer of the node.
    pub(super) fn register(&mut self, agent: &str) -> bool {
        if !self.agents.iter().any(|name| name == agent) {
            self.agents.push(agent.to_owned());
            if self.agents.len() > 16 {
                self.agents.remove(0);
            }
        }
        self.agents.last().is_some_and(|last| last == agent)
    }
}
