//! The suite that every backend passes, and the etcd starter that its users need. Built for tests only.
//!
//! Each function is a chapter and works below a prefix of its own, so that chapters can share a store; those that
//! compact ([`compaction`], [`history`], [`upkeep`]) must not run beside others on the same one. A chapter panics where the contract
//! is broken.

use crate::SharedStore;

mod certificates;
mod compaction;
pub mod etcd_server;
mod history;
mod keys;
mod leases;
mod probe;
mod races;
mod skip;
mod transactions;
mod upkeep;
mod watches;

pub use skip::skip;

/// Below this prefix is everything that the suite writes.
pub const PREFIX: &str = "conformance/";

/// Reading and writing keys.
pub async fn keys(store: &SharedStore) {
    keys::run(store).await;
}

/// Compares, refusals, atomicity, bounds.
pub async fn transactions(store: &SharedStore) {
    transactions::run(store).await;
}

/// Watches. The store must tell a watch below [`PREFIX`] promptly of revisions made elsewhere below it.
pub async fn watches(store: &SharedStore) {
    watches::run(store).await;
}

/// A random history, held against a model: every revision as a range, and all of them as a watch.
pub async fn history(store: &SharedStore) {
    history::run(store).await;
}

/// Compaction.
pub async fn compaction(store: &SharedStore) {
    compaction::run(store).await;
}

/// Leases. Takes some ten seconds, as leases last whole seconds.
pub async fn leases(store: &SharedStore) {
    leases::run(store).await;
}

/// Status and defragmentation. Compacts, and makes the store stand still for moments.
pub async fn upkeep(store: &SharedStore) {
    upkeep::run(store).await;
}

/// Many tasks on the same keys.
pub async fn races(store: &SharedStore) {
    races::run(store).await;
}
