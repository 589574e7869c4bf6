//! What can go wrong in a store.

use crate::{LeaseId, Revision};

/// Why a store operation failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The request exceeds a bound or contradicts itself; the same request will fail again.
    #[error("the store request is not valid: {0}")]
    InvalidRequest(String),
    /// The revision asked for is no longer kept.
    #[error("revision {requested} is compacted; the oldest one kept is {oldest}")]
    Compacted {
        /// What was asked for.
        requested: Revision,
        /// What is still there.
        oldest: Revision,
    },
    /// The lease has ended.
    #[error("lease {} has ended", .0.0)]
    LeaseNotFound(LeaseId),
    /// No room: the disk is full or the quota used up. Reading still works.
    #[error("the store has no room left: {0}")]
    Full(String),
    /// The store does not answer. A change may or may not have been made.
    #[error("the store at {endpoint} does not answer")]
    Unavailable {
        /// Whom was asked.
        endpoint: String,
        /// Why it failed.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// No answer in time. A change may or may not have been made.
    #[error("the store at {endpoint} did not answer within {timeout_ms} ms")]
    Timeout {
        /// Whom was asked.
        endpoint: String,
        /// How long was waited.
        timeout_ms: u64,
    },
    /// The data on disk cannot be read or written.
    #[error("{operation} in the store at {path} failed")]
    Io {
        /// What was attempted.
        operation: &'static str,
        /// Where.
        path: String,
        /// Why it failed.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A value is not what its key promises.
    #[error("the value of key {key} cannot be read")]
    Corrupt {
        /// Which key.
        key: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A record was written by a newer release, with a meaning that this one does not know.
    #[error(
        "the record {key} has schema {found}, this release reads up to {known}; upgrade this server first"
    )]
    NewerSchema {
        /// Which key.
        key: String,
        /// The schema found.
        found: u32,
        /// The highest that this release reads.
        known: u32,
    },
    /// The store is being closed.
    #[error("the store is closed")]
    Closed,
}

impl StoreError {
    /// Whether the same request may succeed later.
    #[must_use]
    pub fn retryable(&self) -> bool {
        match self {
            Self::Unavailable { .. } | Self::Timeout { .. } | Self::Full(_) => true,
            Self::InvalidRequest(_)
            | Self::Compacted { .. }
            | Self::LeaseNotFound(_)
            | Self::Io { .. }
            | Self::Corrupt { .. }
            | Self::NewerSchema { .. }
            | Self::Closed => false,
        }
    }
}
