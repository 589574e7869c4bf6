//! A control plane that does what a test tells it. It is a fake: it stores nothing and decides nothing by itself.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures::{Stream, StreamExt as _};
use hv_proto::v1;
use hv_proto::v1::assignment_service_server::{AssignmentService, AssignmentServiceServer};
use hv_proto::v1::cluster_service_server::{ClusterService, ClusterServiceServer};
use parking_lot::Mutex;
use pbjson_types::Empty;
use tokio::runtime::Runtime;
use tokio::sync::broadcast;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

use crate::node::eventually;

/// What happened, and what is to happen.
#[derive(Default)]
pub(crate) struct State {
    pub(crate) cluster_id: String,
    pub(crate) registrations: Vec<v1::RegisterNodeRequest>,
    pub(crate) heartbeats: Vec<v1::HeartbeatRequest>,
    /// The next heartbeat is not accepted.
    pub(crate) forget_node: bool,
    /// What is bound to the node.
    pub(crate) assignments: BTreeMap<String, v1::Assignment>,
    /// Every report that came.
    pub(crate) reports: Vec<v1::InstanceReport>,
    /// So many reports are answered with RETRY first.
    pub(crate) retries: u32,
    /// Reports of what is not bound are accepted instead of released.
    pub(crate) is_lenient: bool,
    /// How long a lease lives; 0: as the seconds say, as servers of an older release do.
    pub(crate) lease_ttl_ms: u64,
    /// How often heartbeats are wanted; 0: as the seconds say.
    pub(crate) heartbeat_ms: u64,
    /// The operator holds failover.
    pub(crate) failover_held: bool,
    /// Registrations and heartbeats are answered so late.
    pub(crate) answers_after: Duration,
    /// Heartbeats of a node that does not fence get no answer.
    pub(crate) ignores_unarmed: bool,
    /// When the last registration or heartbeat came.
    pub(crate) renewed_at: Option<SystemTime>,
}

#[derive(Clone)]
struct Service {
    state: Arc<Mutex<State>>,
    updates: broadcast::Sender<v1::AssignmentsUpdate>,
}

/// A running control plane.
pub(crate) struct Control {
    pub(crate) state: Arc<Mutex<State>>,
    pub(crate) address: SocketAddr,
    updates: broadcast::Sender<v1::AssignmentsUpdate>,
    /// Of its own, because only dropping it cuts the connections.
    serving: Option<Runtime>,
}

impl Control {
    pub(crate) async fn start() -> Self {
        let state = State { cluster_id: "cluster-1".into(), ..State::default() };
        let mut control = Self {
            state: Arc::new(Mutex::new(state)),
            address: SocketAddr::from(([127, 0, 0, 1], 0)),
            updates: broadcast::channel(256).0,
            serving: None,
        };
        control.up().await;
        control
    }

    /// Listens, at the same address as before.
    pub(crate) async fn up(&mut self) {
        let listener = eventually("the port", || std::net::TcpListener::bind(self.address).ok()).await;
        listener.set_nonblocking(true).unwrap();
        self.address = listener.local_addr().unwrap();
        let service = Service { state: Arc::clone(&self.state), updates: self.updates.clone() };
        let router = tonic::transport::Server::builder()
            .add_service(ClusterServiceServer::new(service.clone()))
            .add_service(AssignmentServiceServer::new(service));
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
            router.serve_with_incoming(incoming).await.unwrap();
        });
        self.serving = Some(runtime);
    }

    /// Stops answering, and cuts every stream.
    pub(crate) fn down(&mut self) {
        if let Some(serving) = self.serving.take() {
            serving.shutdown_background();
        }
        self.updates = broadcast::channel(256).0;
    }

    /// Binds an instance, or changes what is wanted of it.
    pub(crate) fn assign(&self, assignment: v1::Assignment) {
        self.state.lock().assignments.insert(assignment.instance_id.clone(), assignment.clone());
        self.send(v1::AssignmentsUpdate { assignments: vec![assignment], ..Default::default() });
    }

    /// Changes what is wanted of a bound instance, with a new generation.
    pub(crate) fn want(&self, id: &str, wanted: v1::InstanceWanted) -> v1::Assignment {
        self.change(id, |assignment| assignment.wanted = wanted.into())
    }

    /// Changes an assignment, with a new generation.
    pub(crate) fn change(&self, id: &str, change: impl FnOnce(&mut v1::Assignment)) -> v1::Assignment {
        let mut assignment = self.state.lock().assignments[id].clone();
        assignment.generation += 1;
        change(&mut assignment);
        self.assign(assignment.clone());
        assignment
    }

    pub(crate) fn send(&self, update: v1::AssignmentsUpdate) {
        // Nobody listening is no error: the next stream begins with the whole set.
        let _ = self.updates.send(update);
    }

    /// The last report of an instance.
    pub(crate) fn last(&self, id: &str) -> Option<v1::InstanceReport> {
        self.state.lock().reports.iter().rev().find(|report| report.instance_id == id).cloned()
    }

    /// Waits until the last report of an instance is one of this state, with its generation finished.
    pub(crate) async fn settled(&self, id: &str, state: v1::InstanceState) -> v1::InstanceReport {
        eventually(&format!("{id} {state:?}"), || {
            let wanted = self.state.lock().assignments.get(id).map(|a| (a.epoch, a.generation));
            let report = self.last(id)?;
            let is_current = wanted.is_none_or(|wanted| wanted == (report.epoch, report.observed_generation));
            (report.state() == state && is_current).then_some(report)
        })
        .await
    }

    /// Waits until an instance is reported gone.
    pub(crate) async fn gone(&self, id: &str) {
        eventually(&format!("{id} gone"), || self.last(id).filter(|report| report.gone)).await;
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.down();
    }
}

/// An instance to be bound, of epoch and generation 1, that is to run.
pub(crate) fn assignment(id: &str) -> v1::Assignment {
    v1::Assignment {
        instance_id: id.into(),
        name: format!("name-{id}"),
        r#type: v1::InstanceType::Vm.into(),
        spec: Some(v1::InstanceSpec {
            image: "tiny".into(),
            cpu_cores: 1,
            memory_bytes: 64 << 20,
            ..Default::default()
        }),
        epoch: 1,
        generation: 1,
        wanted: v1::InstanceWanted::Running.into(),
        stop_timeout_seconds: 5,
        ..Default::default()
    }
}

/// The same, to be started elsewhere when the node is lost.
pub(crate) fn guarded(id: &str) -> v1::Assignment {
    v1::Assignment { fence: true, ..assignment(id) }
}

/// The same with a script for the fake driver.
pub(crate) fn scripted(id: &str, script: &[(&str, &str)]) -> v1::Assignment {
    let annotations =
        script.iter().map(|(key, value)| (format!("fake.hypervisor/{key}"), (*value).to_owned()));
    let metadata = v1::Metadata { annotations: annotations.collect(), ..Default::default() };
    v1::Assignment { metadata: Some(metadata), ..assignment(id) }
}

#[tonic::async_trait]
impl AssignmentService for Service {
    type WatchAssignmentsStream = Pin<Box<dyn Stream<Item = Result<v1::AssignmentsUpdate, Status>> + Send>>;

    async fn watch_assignments(
        &self,
        request: Request<v1::WatchAssignmentsRequest>,
    ) -> Result<Response<Self::WatchAssignmentsStream>, Status> {
        let state = self.state.lock();
        if request.into_inner().cluster_id != state.cluster_id {
            return Err(Status::failed_precondition("another cluster"));
        }
        let changes = tokio_stream::wrappers::BroadcastStream::new(self.updates.subscribe());
        let assignments = state.assignments.values().cloned().collect();
        let whole = v1::AssignmentsUpdate { assignments, complete: true, ..Default::default() };
        let changes = changes.filter_map(|update| std::future::ready(update.ok().map(Ok)));
        Ok(Response::new(Box::pin(futures::stream::iter([Ok(whole)]).chain(changes))))
    }

    async fn report_instances(
        &self,
        request: Request<v1::ReportInstancesRequest>,
    ) -> Result<Response<v1::ReportInstancesResponse>, Status> {
        let request = request.into_inner();
        assert!(request.reports.len() <= 100, "{} reports in one call", request.reports.len());
        let mut state = self.state.lock();
        assert_eq!(request.cluster_id, state.cluster_id);
        let mut verdicts = Vec::new();
        for report in request.reports {
            let bound = state.assignments.get(&report.instance_id).map(|assignment| assignment.epoch);
            let verdict = if state.retries > 0 {
                state.retries -= 1;
                v1::ReportVerdict::Retry
            } else if bound == Some(report.epoch) || state.is_lenient {
                if report.gone {
                    state.assignments.remove(&report.instance_id);
                }
                v1::ReportVerdict::Accepted
            } else {
                v1::ReportVerdict::Release
            };
            state.reports.push(report);
            verdicts.push(verdict.into());
        }
        Ok(Response::new(v1::ReportInstancesResponse { verdicts }))
    }
}

fn unused<T>() -> Result<Response<T>, Status> {
    Err(Status::unimplemented("agents do not call this"))
}

#[tonic::async_trait]
impl ClusterService for Service {
    type WatchNodesStream = Pin<Box<dyn Stream<Item = Result<v1::NodeEvent, Status>> + Send>>;
    type WatchEventsStream = Pin<Box<dyn Stream<Item = Result<v1::Event, Status>> + Send>>;

    async fn register_node(
        &self,
        request: Request<v1::RegisterNodeRequest>,
    ) -> Result<Response<v1::RegisterNodeResponse>, Status> {
        let request = request.into_inner();
        let (response, late) = {
            let mut state = self.state.lock();
            if !request.cluster_id.is_empty() && request.cluster_id != state.cluster_id {
                return Err(Status::failed_precondition(format!("this is cluster {}", state.cluster_id)));
            }
            let response = v1::RegisterNodeResponse {
                node_id: request.node_id.clone(),
                heartbeat_interval_seconds: 1,
                lease_ttl_seconds: 3,
                cluster_id: state.cluster_id.clone(),
                heartbeat_interval_ms: state.heartbeat_ms,
                lease_ttl_ms: state.lease_ttl_ms,
                failover_held: state.failover_held,
            };
            state.registrations.push(request);
            state.renewed_at = Some(SystemTime::now());
            (response, state.answers_after)
        };
        tokio::time::sleep(late).await;
        Ok(Response::new(response))
    }

    async fn heartbeat(
        &self,
        request: Request<v1::HeartbeatRequest>,
    ) -> Result<Response<v1::HeartbeatResponse>, Status> {
        let (response, late) = {
            let mut state = self.state.lock();
            let request = request.into_inner();
            let is_unarmed = request.fencing.as_ref().is_some_and(|fencing| !fencing.armed);
            let late = match state.ignores_unarmed && is_unarmed {
                true => Duration::from_secs(60),
                false => state.answers_after,
            };
            state.heartbeats.push(request);
            let response = v1::HeartbeatResponse {
                accepted: !std::mem::take(&mut state.forget_node),
                next_heartbeat_seconds: 1,
                next_heartbeat_ms: state.heartbeat_ms,
                lease_ttl_ms: state.lease_ttl_ms,
                failover_held: state.failover_held,
                ..Default::default()
            };
            state.renewed_at = Some(SystemTime::now());
            (response, late)
        };
        tokio::time::sleep(late).await;
        Ok(Response::new(response))
    }

    async fn deregister_node(
        &self,
        _: Request<v1::DeregisterNodeRequest>,
    ) -> Result<Response<Empty>, Status> {
        unused()
    }
    async fn get_node(&self, _: Request<v1::GetNodeRequest>) -> Result<Response<v1::Node>, Status> {
        unused()
    }
    async fn list_nodes(
        &self,
        _: Request<v1::ListNodesRequest>,
    ) -> Result<Response<v1::ListNodesResponse>, Status> {
        unused()
    }
    async fn update_node_status(
        &self,
        _: Request<v1::UpdateNodeStatusRequest>,
    ) -> Result<Response<v1::Node>, Status> {
        unused()
    }
    async fn update_node(&self, _: Request<v1::UpdateNodeRequest>) -> Result<Response<v1::Node>, Status> {
        unused()
    }
    async fn set_node_failover(
        &self,
        _: Request<v1::SetNodeFailoverRequest>,
    ) -> Result<Response<v1::Node>, Status> {
        unused()
    }
    async fn confirm_node_down(
        &self,
        _: Request<v1::ConfirmNodeDownRequest>,
    ) -> Result<Response<v1::Node>, Status> {
        unused()
    }
    async fn watch_nodes(
        &self,
        _: Request<v1::WatchNodesRequest>,
    ) -> Result<Response<Self::WatchNodesStream>, Status> {
        unused()
    }
    async fn get_cluster_info(&self, _: Request<Empty>) -> Result<Response<v1::ClusterInfo>, Status> {
        unused()
    }
    async fn cordon_node(&self, _: Request<v1::CordonNodeRequest>) -> Result<Response<v1::Node>, Status> {
        unused()
    }
    async fn uncordon_node(&self, _: Request<v1::UncordonNodeRequest>) -> Result<Response<v1::Node>, Status> {
        unused()
    }
    async fn drain_node(
        &self,
        _: Request<v1::DrainNodeRequest>,
    ) -> Result<Response<v1::DrainNodeResponse>, Status> {
        unused()
    }
    async fn list_events(
        &self,
        _: Request<v1::ListEventsRequest>,
    ) -> Result<Response<v1::ListEventsResponse>, Status> {
        unused()
    }
    async fn watch_events(
        &self,
        _: Request<v1::WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        unused()
    }
}
