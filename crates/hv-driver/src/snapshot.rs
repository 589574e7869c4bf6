//! Snapshots of instances: what they were at a moment.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};

/// Asks for a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotRequest {
    /// Its name, unique in the instance: 1 to 63 lower-case letters, digits and `-`.
    pub name: String,
    /// Whether the memory of a running instance is kept too.
    pub memory: bool,
}

/// A snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotInfo {
    /// Its name.
    pub name: String,
    /// When it was taken.
    pub created_at: SystemTime,
    /// Whether memory is in it.
    pub memory: bool,
    /// What it takes up, in bytes, as far as known.
    pub size_bytes: u64,
}
