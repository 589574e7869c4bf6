//! The fake's OperationService: an operation makes a step whenever it is looked at.

use hv_proto::v1::operation_service_server::OperationService;
use hv_proto::v1::{self, OperationState};
use hv_types::ErrorCode;
use tonic::{Request, Response, Status, async_trait};

use super::{Service, Streamed, status};

#[async_trait]
impl OperationService for Service {
    type WatchOperationsStream = Streamed<v1::OperationEvent>;

    async fn get_operation(
        &self,
        request: Request<v1::GetOperationRequest>,
    ) -> Result<Response<v1::Operation>, Status> {
        let mut model = self.0.lock();
        let operation = model.operations.get_mut(&request.get_ref().operation_id);
        let operation = operation.ok_or_else(|| status(ErrorCode::NotFound, "no such operation"))?;
        let seen = operation.clone();
        operation.revision += 1;
        if operation.blockers.is_empty() {
            operation.set_state(OperationState::Succeeded);
            operation.done = operation.total;
        } else {
            operation.phase = "blocked".into();
        }
        Ok(Response::new(seen))
    }

    async fn list_operations(
        &self,
        request: Request<v1::ListOperationsRequest>,
    ) -> Result<Response<v1::ListOperationsResponse>, Status> {
        let active = request.get_ref().active_only;
        let model = self.0.lock();
        let ended = |operation: &&v1::Operation| operation.state() == OperationState::Succeeded;
        let operations = model.operations.values().filter(|operation| !active || !ended(operation));
        Ok(Response::new(v1::ListOperationsResponse {
            operations: operations.cloned().collect(),
            ..Default::default()
        }))
    }

    async fn watch_operations(
        &self,
        _: Request<v1::WatchOperationsRequest>,
    ) -> Result<Response<Self::WatchOperationsStream>, Status> {
        Err(status(ErrorCode::Unsupported, "the fake cannot do this"))
    }

    async fn cancel_operation(
        &self,
        request: Request<v1::CancelOperationRequest>,
    ) -> Result<Response<v1::Operation>, Status> {
        let request = request.into_inner();
        let mut model = self.0.lock();
        model.mutations.push(("cancel", request.request_key));
        let operation = model.operations.get_mut(&request.operation_id);
        let operation = operation.ok_or_else(|| status(ErrorCode::NotFound, "no such operation"))?;
        operation.set_state(OperationState::Cancelling);
        Ok(Response::new(operation.clone()))
    }
}
