//! What an operator can know of a store, and how far its upkeep is.

use crate::{Health, Revision};

/// How the store is, in detail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreStatus {
    /// `embedded` or `etcd`.
    pub backend: &'static str,
    /// The store's revision.
    pub revision: Revision,
    /// The oldest revision that can be read, where the backend tells. etcd tells it only once something was compacted.
    pub oldest: Option<Revision>,
    /// Size on disk of the largest member, in bytes.
    pub size_bytes: u64,
    /// Of it, in use, in bytes; the rest can be given back by [`crate::Store::defragment`]. An estimate where the backend
    /// is embedded.
    pub used_bytes: u64,
    /// Changes that take room are refused beyond this size, where there is such a limit.
    pub quota_bytes: Option<u64>,
    /// Changes that take room are refused now.
    pub is_full: bool,
    /// Each member; the embedded store is one.
    pub members: Vec<MemberStatus>,
    /// What an operator should know; empty if all is well.
    pub warnings: Vec<String>,
}

/// How one member is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemberStatus {
    /// Its address; the directory of an embedded store.
    pub endpoint: String,
    /// Its id in hexadecimal digits, as etcd prints it; empty for an embedded store.
    pub id: String,
    /// Its version.
    pub version: String,
    /// Whether it leads the others.
    pub is_leader: bool,
    /// Size on disk, in bytes.
    pub size_bytes: u64,
    /// Of it, in use, in bytes.
    pub used_bytes: u64,
    /// The last entry of its log, and the last that it has applied. 0 for an embedded store.
    pub raft_index: u64,
    /// See `raft_index`.
    pub raft_applied: u64,
    /// The alarms it has raised: `NOSPACE`, `CORRUPT`.
    pub alarms: Vec<String>,
    /// Why it does not answer; all but the endpoint is unknown then.
    pub error: Option<String>,
}

impl From<Health> for StoreStatus {
    fn from(health: Health) -> Self {
        let member = MemberStatus {
            version: health.version,
            is_leader: true,
            size_bytes: health.size_bytes,
            used_bytes: health.size_bytes,
            ..MemberStatus::default()
        };
        Self {
            backend: health.backend,
            revision: health.revision,
            oldest: None,
            size_bytes: health.size_bytes,
            used_bytes: health.size_bytes,
            quota_bytes: None,
            is_full: false,
            members: vec![member],
            warnings: health.warnings,
        }
    }
}

/// How far a defragmentation is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DefragmentStep {
    /// For people: which member, and what is done.
    pub message: String,
    /// Members done.
    pub done: usize,
    /// Of so many.
    pub total: usize,
}

/// Is told of each step; it must not block.
pub type OnDefragment<'a> = &'a (dyn Fn(DefragmentStep) + Send + Sync);
