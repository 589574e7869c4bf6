//! Moving an instance to another node while it runs.
//!
//! # Theory of operation
//! The target prepares, the source hands over, and stands still from then on; somebody who decides for both (the
//! control plane) binds the instance to the target, and only then does the target let it go on. Hence whatever dies in
//! between, at most one copy runs, and which one may is decided in one place.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What becomes of the disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Storage {
    /// Both nodes reach the same files.
    Shared,
    /// They are copied while the instance runs.
    Copied,
}

/// Asks a node to wait for an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IncomingRequest {
    /// Which migration: an id that no other has.
    pub migration: String,
    /// What becomes of the disks.
    pub storage: Storage,
    /// The address of this node at which the source reaches it.
    pub listen: std::net::IpAddr,
}

/// Where a node waits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Incoming {
    /// The driver's own: what [`MigrateRequest::target`] takes at the source. At most 4 KiB.
    pub target: serde_json::Value,
}

/// Asks a node to hand an instance over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrateRequest {
    /// Which migration.
    pub migration: String,
    /// What becomes of the disks.
    pub storage: Storage,
    /// What the target answered.
    pub target: serde_json::Value,
    /// How long the instance may stand still; the transfer goes on until it is estimated to be less.
    pub downtime_limit: Duration,
    /// Bytes per second; 0 is no bound.
    pub bandwidth_limit: u64,
    /// Slow the guest down if it changes its memory faster than it is sent.
    pub auto_converge: bool,
}

/// How far a migration is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationStatus {
    /// Which one.
    pub migration: String,
    /// Its phase.
    pub phase: MigrationPhase,
    /// Bytes sent so far, disks and memory.
    pub done_bytes: u64,
    /// Bytes to be sent in all as far as known; grows with what the guest changes.
    pub total_bytes: u64,
    /// How long the instance stood still at the source until everything was sent, once that is known.
    pub downtime: Option<Duration>,
}

/// The phases of a migration, as the source sees them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "phase", rename_all = "snake_case")]
pub enum MigrationPhase {
    /// Disks are being copied.
    Disks,
    /// Memory is being sent.
    Memory,
    /// Everything is there; the instance stands still here for good.
    HandedOver,
    /// It failed; the instance runs on here.
    Failed {
        /// Why.
        reason: String,
    },
}
