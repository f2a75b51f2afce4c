//! Saves as a service: jobs and their signed orders, the queue in Redis, the record of all saves, the agent of each
//! node, the manager with its REST API, the portal page, and the preparation and check of an installation (`setup`, `doctor`).

pub mod agent;
pub(crate) mod connections;
pub(crate) mod doctor;
mod exposition;
mod health;
pub mod job;
pub mod kubernetes;
pub(crate) mod log_limit;
pub mod manager;
pub mod portal;
pub mod queue;
pub(crate) mod ready;
pub mod record;
pub(crate) mod setup;
