//! Placement: one actor in each server that takes the creates, and on the leader binds whatever waits for a node.
//!
//! # Theory of operation
//! The actor owns the scheduler's fleet of a term: the nodes and what is bound to them, kept by the cache's changes, with
//! everything that is being written counted in (`term`). A create is decided in memory and written already bound, with
//! many others in one transaction (`flight`); what does not fit is written PENDING with the counted reasons. What waits
//! is tried again when something changed that could help (`waiting`). Several transactions are in the air at a time.
//! A server that does not lead coalesces creates alike and writes them PENDING: the leader finds them in its cache.
//!
//! # Invariants
//! - What is bound to a node never exceeds what may be promised of it: only a leader binds, its transactions carry the
//!   leader key, and it counts everything bound before its term and everything it may have written since.
//! - Nothing is bound to a node that was cordoned, drained or deregistered: the binding compares the node's record.
//! - A caller that went away before its create was written is dropped. Every other gets an answer.
//!
//! # Failure and recovery
//! A transaction that was refused undoes what was counted and is decided anew. Where it is not known whether it was
//! written, it stays counted until the cache or the store tells. A create that a leader cannot bind is written PENDING,
//! so that a server that was deposed and does not know it yet still records it.

mod actor;
mod choose;
mod decision;
mod feed;
mod flight;
mod queue;
mod reserve;
mod term;
mod waiting;

use std::sync::Arc;

use rand::SeedableRng;
use rand::rngs::StdRng;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::Cluster;
use crate::election::Leadership;

pub(crate) use feed::{FleetFeed, Snapshot};
pub(crate) use flight::{Fate, Flight, name_in_set, name_taken, set_of};
pub(crate) use queue::{Queue, Reply, Wish, stopping};
pub(crate) use reserve::{Reservations, Reserved};

impl Cluster {
    /// Takes creates, and places instances while this server leads, until `stop`.
    pub async fn run_placer(
        self: &Arc<Self>,
        leading: watch::Receiver<Option<Leadership>>,
        stop: CancellationToken,
    ) {
        self.run_placer_with(leading, stop, StdRng::from_os_rng()).await;
    }

    /// As [`Self::run_placer`], with every choice by chance taken from `rng`.
    pub async fn run_placer_with(
        self: &Arc<Self>,
        leading: watch::Receiver<Option<Leadership>>,
        stop: CancellationToken,
        rng: StdRng,
    ) {
        actor::Actor::new(self, rng).run(leading, stop).await;
    }
}
