//! `AssignmentService`: what agents ask of the control plane.

use hv_cluster::reports;
use hv_proto::v1;
use hv_proto::v1::assignment_service_server::AssignmentService;
use tonic::{Request, Response, Status};

use super::request::{failed, id, refuse};
use super::{ReplyStream, Shared};

pub(crate) struct Service(pub(crate) Shared);

#[tonic::async_trait]
impl AssignmentService for Service {
    type WatchAssignmentsStream = ReplyStream<v1::AssignmentsUpdate>;

    async fn watch_assignments(
        &self,
        request: Request<v1::WatchAssignmentsRequest>,
    ) -> Result<Response<Self::WatchAssignmentsStream>, Status> {
        let request = request.into_inner();
        let (node, cluster) = (id(&request.node_id)?, id(&request.cluster_id)?);
        let assignments = self.0.cluster.assignments(&cluster, node).await.map_err(failed)?;
        let stream = futures::stream::try_unfold(assignments, |mut assignments| async move {
            let update = assignments.next().await.map_err(refuse)?;
            Ok(update.map(|update| (update, assignments)))
        });
        Ok(self.0.until_stop(stream))
    }

    async fn report_instances(
        &self,
        request: Request<v1::ReportInstancesRequest>,
    ) -> Result<Response<v1::ReportInstancesResponse>, Status> {
        let request = request.into_inner();
        let (node, cluster) = (id(&request.node_id)?, id(&request.cluster_id)?);
        let reports = reports::parse(request.reports).map_err(refuse)?;
        let verdicts = self.0.cluster.report(&cluster, &node, &reports).await.map_err(failed)?;
        let verdicts = verdicts.into_iter().map(|verdict| v1::ReportVerdict::from(verdict).into()).collect();
        Ok(Response::new(v1::ReportInstancesResponse { verdicts }))
    }
}
