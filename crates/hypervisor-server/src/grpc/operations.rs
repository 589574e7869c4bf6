//! `OperationService`: what is under way.

use hv_cluster::Cluster;
use hv_cluster::cache::{Batch, Delta, State};
use hv_cluster::operations::{self, OperationFilter};
use hv_cluster::page::Page;
use hv_proto::v1::operation_service_server::OperationService;
use hv_proto::{convert, v1};
use hv_types::{OperationRecord, Revision};
use tonic::{Request, Response, Status};

use super::request::{failed, mutation, refuse};
use super::watch::{View, watch};
use super::{ReplyStream, Shared};

pub(crate) struct Service(pub(crate) Shared);

#[tonic::async_trait]
impl OperationService for Service {
    type WatchOperationsStream = ReplyStream<v1::OperationEvent>;

    async fn get_operation(
        &self,
        request: Request<v1::GetOperationRequest>,
    ) -> Result<Response<v1::Operation>, Status> {
        let id = request.into_inner().operation_id;
        let record = self.0.cluster.operation(&id).await.map_err(failed)?;
        Ok(Response::new(operations::shown(&record)))
    }

    async fn list_operations(
        &self,
        request: Request<v1::ListOperationsRequest>,
    ) -> Result<Response<v1::ListOperationsResponse>, Status> {
        let request = request.into_inner();
        let bound_to = ("operations", &request.object_id, request.state, request.active_only);
        let page = Page::new(request.page_size, &request.page_token, &bound_to).map_err(refuse)?;
        let filter = OperationFilter {
            id: String::new(),
            state: convert::operation_state_from(request.state).map_err(refuse)?,
            object_id: request.object_id,
            active_only: request.active_only,
        };
        let (found, next_page_token, revision) =
            self.0.cluster.operations(&filter, &page).await.map_err(failed)?;
        Ok(Response::new(v1::ListOperationsResponse {
            operations: found.iter().map(|record| operations::shown(record)).collect(),
            next_page_token,
            revision: revision.0,
        }))
    }

    async fn watch_operations(
        &self,
        request: Request<v1::WatchOperationsRequest>,
    ) -> Result<Response<Self::WatchOperationsStream>, Status> {
        let request = request.into_inner();
        let filter = OperationFilter {
            id: request.operation_id,
            object_id: request.object_id,
            ..OperationFilter::default()
        };
        let stream = watch(self.0.cluster.clone(), OperationView(filter), request.from_revision).await?;
        Ok(self.0.until_stop(stream))
    }

    async fn cancel_operation(
        &self,
        request: Request<v1::CancelOperationRequest>,
    ) -> Result<Response<v1::Operation>, Status> {
        let mut request = request.into_inner();
        let key = std::mem::take(&mut request.request_key);
        let mutation = mutation("OperationService/CancelOperation", &key, &request)?;
        let done = self.0.cluster.cancel_operation(&mutation, &request.operation_id).await.map_err(failed)?;
        Ok(Response::new(done.reply))
    }
}

/// A watch of operations.
struct OperationView(OperationFilter);

impl OperationView {
    fn matching<'a>(&self, record: Option<&'a OperationRecord>) -> Option<&'a OperationRecord> {
        record.filter(|record| self.0.matches(record))
    }
}

fn event(kind: v1::EventType, operation: v1::Operation, revision: Revision) -> v1::OperationEvent {
    v1::OperationEvent { r#type: kind.into(), operation: Some(operation), revision: revision.0 }
}

impl View for OperationView {
    type Event = v1::OperationEvent;

    fn initial(&self, _: &Cluster, state: &State) -> Vec<v1::OperationEvent> {
        let matching = state.operations_before(None).filter(|record| self.0.matches(record));
        matching.map(|record| event(v1::EventType::Added, operations::shown(record), Revision(0))).collect()
    }

    fn changes(&self, _: &Cluster, batch: &Batch) -> Vec<v1::OperationEvent> {
        let mut events = Vec::new();
        for delta in &batch.deltas {
            let Delta::Operation { id, before, after } = delta else { continue };
            let (knew, knows) = (self.matching(before.as_deref()), self.matching(after.as_deref()));
            let (kind, operation) = match (knew, knows) {
                (None, Some(after)) => (v1::EventType::Added, operations::shown(after)),
                (Some(_), Some(after)) => (v1::EventType::Modified, operations::shown(after)),
                (Some(_), None) => {
                    let gone = v1::Operation { id: id.clone(), ..v1::Operation::default() };
                    (v1::EventType::Deleted, gone)
                }
                (None, None) => continue,
            };
            events.push(event(kind, operation, batch.revision));
        }
        events
    }

    fn set_revision(&self, event: &mut v1::OperationEvent, revision: Revision) {
        event.revision = revision.0;
    }

    fn bookmark(&self, revision: Revision) -> Option<v1::OperationEvent> {
        let kind = v1::EventType::Bookmark.into();
        Some(v1::OperationEvent { r#type: kind, operation: None, revision: revision.0 })
    }
}
