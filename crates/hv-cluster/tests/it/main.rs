//! Claims about the cluster's decisions, on real stores.

mod change;
mod clones;
mod create;
mod devices;
mod election;
mod events;
mod explain;
mod failover;
mod leaders;
mod migrate;
mod movers;
mod nodes;
mod operations;
mod placement;
mod pulls;
mod reports;
mod sets;
mod snapshots;
mod update;
mod world;
