//! Snapshots of the instances of this node.

use hv_proto::v1;
use pbjson_types::Empty;
use tonic::{Request, Status};

use super::{Answer, Service};

impl Service {
    pub(super) async fn create_snapshot(
        &self,
        request: Request<v1::AgentSnapshotRequest>,
    ) -> Answer<v1::InstanceSnapshot> {
        let _ = request;
        Err(Status::unimplemented("not served"))
    }

    pub(super) async fn revert_snapshot(
        &self,
        request: Request<v1::AgentSnapshotRequest>,
    ) -> Answer<v1::Instance> {
        let _ = request;
        Err(Status::unimplemented("not served"))
    }

    pub(super) async fn delete_snapshot(&self, request: Request<v1::AgentSnapshotRequest>) -> Answer<Empty> {
        let _ = request;
        Err(Status::unimplemented("not served"))
    }

    pub(super) async fn list_snapshot(
        &self,
        request: Request<v1::AgentInstanceRequest>,
    ) -> Answer<v1::ListInstanceSnapshotsResponse> {
        let _ = request;
        Err(Status::unimplemented("not served"))
    }
}
