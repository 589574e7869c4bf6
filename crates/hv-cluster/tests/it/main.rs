//! Claims about the cluster's decisions, on real stores.

mod change;
mod create;
mod election;
mod events;
mod nodes;
mod placement;
mod reports;
mod world;
