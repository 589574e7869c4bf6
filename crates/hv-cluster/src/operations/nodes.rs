//! How operations reach the agents of nodes: a trait, so that tests can put scripted nodes in their place.
//!
//! # Theory of operation
//! An operation decides from records; what it needs a node for it asks through here, again if it must: every call is
//! idempotent on the node. Each call has a bound of its own, that the implementation keeps, and its failure says by
//! [`hv_types::ErrorCode::retryable`] whether asking again can help.

use async_trait::async_trait;
use hv_proto::v1;
use hv_types::{ErrorCode, InstanceId, NodeId, ServiceError};

/// What a node answered.
pub type Answer<T> = std::result::Result<T, ServiceError>;

/// The agents of nodes, as operations need them.
#[async_trait]
pub trait Nodes: Send + Sync + 'static {
    /// Makes a node wait for an instance ([`v1::agent_service_client`]: `PrepareIncoming`).
    async fn prepare_incoming(
        &self,
        node: &NodeId,
        request: v1::AgentPrepareIncomingRequest,
    ) -> Answer<v1::AgentPrepareIncomingResponse>;

    /// Makes a node hand an instance over (`BeginMigration`).
    async fn begin_migration(
        &self,
        node: &NodeId,
        request: v1::AgentBeginMigrationRequest,
    ) -> Answer<v1::AgentMigrationStatus>;

    /// How far a hand-over is on a node (`GetMigration`).
    async fn migration(
        &self,
        node: &NodeId,
        instance: &InstanceId,
        migration: &str,
    ) -> Answer<v1::AgentMigrationStatus>;

    /// Ends a migration on a node (`AbortMigration`).
    async fn abort_migration(&self, node: &NodeId, instance: &InstanceId, migration: &str) -> Answer<()>;

    /// Keeps what an instance is at this moment; the same name again returns the first (`CreateSnapshot`).
    async fn create_snapshot(
        &self,
        node: &NodeId,
        request: v1::AgentSnapshotRequest,
    ) -> Answer<v1::InstanceSnapshot> {
        let _ = (node, request);
        Err(cannot("snapshots"))
    }

    /// Returns an instance to a snapshot (`RevertInstance`).
    async fn revert_instance(&self, node: &NodeId, request: v1::AgentSnapshotRequest) -> Answer<()> {
        let _ = (node, request);
        Err(cannot("snapshots"))
    }

    /// Forgets a snapshot; one that is not there is forgotten already (`DeleteSnapshot`).
    async fn delete_snapshot(&self, node: &NodeId, request: v1::AgentSnapshotRequest) -> Answer<()> {
        let _ = (node, request);
        Err(cannot("snapshots"))
    }

    /// The snapshots of an instance, oldest first (`ListSnapshots`).
    async fn snapshots(&self, node: &NodeId, instance: &InstanceId) -> Answer<Vec<v1::InstanceSnapshot>> {
        let _ = (node, instance);
        Err(cannot("snapshots"))
    }

    /// Fetches an image and tells `progress` how far it is; asked again it goes on where it was (`PullImage`). Dropped,
    /// it ends on the node too.
    async fn pull_image(
        &self,
        node: &NodeId,
        request: v1::PullImageRequest,
        progress: &PullProgress<'_>,
    ) -> Answer<()> {
        let _ = (node, request, progress);
        Err(cannot("image store"))
    }
}

/// Is told how far a node is: a word, bytes done, bytes in all (0: not known).
pub type PullProgress<'a> = dyn Fn(&str, u64, u64) + Send + Sync + 'a;

/// What a node says that cannot do it at all.
fn cannot(what: &str) -> ServiceError {
    ServiceError::new(ErrorCode::Unsupported, format!("the node has no {what}"))
}
