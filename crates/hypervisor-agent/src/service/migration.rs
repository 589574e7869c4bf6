//! Handing running instances over, and taking them.

use hv_proto::v1;
use pbjson_types::Empty;
use tonic::{Request, Status};

use super::{Answer, Service};

impl Service {
    pub(super) async fn prepare_migration(
        &self,
        request: Request<v1::AgentPrepareIncomingRequest>,
    ) -> Answer<v1::AgentPrepareIncomingResponse> {
        let _ = request;
        Err(Status::unimplemented("not served"))
    }

    pub(super) async fn begin_migration(
        &self,
        request: Request<v1::AgentBeginMigrationRequest>,
    ) -> Answer<v1::AgentMigrationStatus> {
        let _ = request;
        Err(Status::unimplemented("not served"))
    }

    pub(super) async fn status_migration(
        &self,
        request: Request<v1::AgentMigrationRequest>,
    ) -> Answer<v1::AgentMigrationStatus> {
        let _ = request;
        Err(Status::unimplemented("not served"))
    }

    pub(super) async fn abort_migration(&self, request: Request<v1::AgentMigrationRequest>) -> Answer<Empty> {
        let _ = request;
        Err(Status::unimplemented("not served"))
    }
}
