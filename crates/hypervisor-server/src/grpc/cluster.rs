//! `ClusterService`: nodes and events.

use std::sync::Arc;

use hv_cluster::cache::{Batch, Delta, State};
use hv_cluster::nodes::{DrainOptions, Inventory, NodeFilter, Settings, Shown, Sign};
use hv_cluster::page::Page;
use hv_cluster::{Cluster, Done};
use hv_proto::v1::cluster_service_server::ClusterService;
use hv_proto::{convert, v1};
use hv_types::node::Schedulability;
use hv_types::{
    ClusterId, DeviceInventory, InstanceId, InstanceState, Invalid, NodeId, NodeStatus, Revision,
};
use pbjson_types::Empty;
use tonic::{Request, Response, Status};

use super::request::{failed, id, mutation, refuse};
use super::watch::{Piece, View, watch};
use super::{ReplyStream, Shared, VERSION, empty};

pub(crate) struct Service(pub(crate) Shared);

impl Service {
    fn cluster(&self) -> &Arc<Cluster> {
        &self.0.cluster
    }
}

fn claimed_cluster(text: &str) -> Result<Option<ClusterId>, Status> {
    if text.is_empty() { Ok(None) } else { id(text).map(Some) }
}

fn reply((record, view): &Shown, with_images: bool) -> Response<v1::Node> {
    Response::new(convert::node_to(record, view, with_images))
}

/// The answer to a change of a node.
fn changed(outcome: hv_cluster::Result<Done<v1::Node>>) -> Result<Response<v1::Node>, Status> {
    outcome.map(|done| Response::new(done.reply)).map_err(failed)
}

fn seconds(duration: std::time::Duration) -> i64 {
    i64::try_from(duration.as_secs_f64().ceil() as u64).unwrap_or(i64::MAX)
}

fn milliseconds(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[tonic::async_trait]
impl ClusterService for Service {
    type WatchNodesStream = ReplyStream<v1::NodeEvent>;
    type WatchEventsStream = ReplyStream<v1::Event>;

    async fn register_node(
        &self,
        request: Request<v1::RegisterNodeRequest>,
    ) -> Result<Response<v1::RegisterNodeResponse>, Status> {
        let request = request.into_inner();
        let claims = claimed_cluster(&request.cluster_id)?;
        let node = convert::node_from_registration(request).map_err(refuse)?;
        let registered = self.cluster().register_node(claims.as_ref(), node).await.map_err(failed)?;
        let beat = registered.beat;
        Ok(Response::new(v1::RegisterNodeResponse {
            node_id: registered.id.to_string(),
            heartbeat_interval_seconds: seconds(beat.next),
            lease_ttl_seconds: seconds(beat.lease_ttl),
            cluster_id: self.cluster().id().to_string(),
            heartbeat_interval_ms: milliseconds(beat.next),
            lease_ttl_ms: milliseconds(beat.lease_ttl),
            failover_held: beat.failover_held,
        }))
    }

    async fn deregister_node(
        &self,
        request: Request<v1::DeregisterNodeRequest>,
    ) -> Result<Response<Empty>, Status> {
        let mut request = request.into_inner();
        let key = std::mem::take(&mut request.request_key);
        let mutation = mutation("ClusterService/DeregisterNode", &key, &request)?;
        let node = id(&request.node_id)?;
        self.cluster().deregister_node(&mutation, &node, request.force).await.map_err(failed)?;
        Ok(Response::new(empty()))
    }

    async fn get_node(&self, request: Request<v1::GetNodeRequest>) -> Result<Response<v1::Node>, Status> {
        let node = id(&request.into_inner().node_id)?;
        let shown = self.cluster().node(&node).await.map_err(failed)?;
        Ok(reply(&shown, true))
    }

    async fn list_nodes(
        &self,
        request: Request<v1::ListNodesRequest>,
    ) -> Result<Response<v1::ListNodesResponse>, Status> {
        let request = request.into_inner();
        let selector = convert::selector_from(request.label_selector).map_err(refuse)?;
        let bound_to = (
            ("nodes", request.role, request.status, &request.region, &request.zone),
            (selector.requirements(), &request.reference),
        );
        let page = Page::new(request.page_size, &request.page_token, &bound_to).map_err(refuse)?;
        let filter = NodeFilter {
            role: convert::role_from(request.role).map_err(refuse)?,
            status: convert::status_from(request.status).map_err(refuse)?,
            region: request.region,
            zone: request.zone,
            selector,
            reference: request.reference,
        };
        let (nodes, next_page_token, total, revision) =
            self.cluster().nodes(&filter, &page).await.map_err(failed)?;
        Ok(Response::new(v1::ListNodesResponse {
            nodes: nodes.iter().map(|(record, view)| convert::node_to(record, view, false)).collect(),
            next_page_token,
            total_count: i32::try_from(total).unwrap_or(i32::MAX),
            revision: revision.0,
        }))
    }

    async fn update_node_status(
        &self,
        request: Request<v1::UpdateNodeStatusRequest>,
    ) -> Result<Response<v1::Node>, Status> {
        let mut request = request.into_inner();
        let key = std::mem::take(&mut request.request_key);
        let mutation = mutation("ClusterService/UpdateNodeStatus", &key, &request)?;
        let node = id(&request.node_id)?;
        let wanted = match convert::status_from(request.status).map_err(refuse)? {
            None => None,
            Some(NodeStatus::Ready) => Some(Schedulability::Open),
            Some(NodeStatus::Maintenance) => Some(Schedulability::Cordoned),
            Some(NodeStatus::Draining) => Some(Schedulability::Draining),
            Some(NodeStatus::NotReady) => {
                let expected =
                    "must be READY, MAINTENANCE or DRAINING; NOT_READY follows from missing heartbeats";
                return Err(refuse(Invalid::new("status", "NOT_READY", expected)));
            }
        };
        let conditions: Vec<_> = request
            .conditions
            .into_iter()
            .map(convert::condition_from)
            .collect::<Result<_, _>>()
            .map_err(refuse)?;
        changed(self.cluster().update_node_status(&mutation, &node, wanted, &conditions).await)
    }

    async fn heartbeat(
        &self,
        request: Request<v1::HeartbeatRequest>,
    ) -> Result<Response<v1::HeartbeatResponse>, Status> {
        let request = request.into_inner();
        let claims = claimed_cluster(&request.cluster_id)?;
        let node = id(&request.node_id)?;
        let inventory = if request.inventory_changed { Some(inventory(&request)?) } else { None };
        let fencing = match request.fencing {
            Some(fencing) => Some(convert::fencing_from(Some(fencing)).map_err(refuse)?),
            None => None,
        };
        let sign = Sign { inventory, usage: request.usage, fencing };
        let beat = self.cluster().heartbeat(claims.as_ref(), &node, sign).await.map_err(failed)?;
        metrics::counter!("hypervisor_heartbeats_total").increment(1);
        Ok(Response::new(match beat {
            Some(beat) => v1::HeartbeatResponse {
                accepted: true,
                next_heartbeat_seconds: seconds(beat.next),
                commands: Vec::new(),
                next_heartbeat_ms: milliseconds(beat.next),
                lease_ttl_ms: milliseconds(beat.lease_ttl),
                failover_held: beat.failover_held,
            },
            // It has to register again, and does so at once.
            None => v1::HeartbeatResponse::default(),
        }))
    }

    async fn update_node(
        &self,
        request: Request<v1::UpdateNodeRequest>,
    ) -> Result<Response<v1::Node>, Status> {
        let mut request = request.into_inner();
        let key = std::mem::take(&mut request.request_key);
        let mutation = mutation("ClusterService/UpdateNode", &key, &request)?;
        let node = id(&request.node_id)?;
        let settings = settings(request).map_err(refuse)?;
        changed(self.cluster().update_node_settings(&mutation, &node, &settings).await)
    }

    async fn set_node_failover(
        &self,
        request: Request<v1::SetNodeFailoverRequest>,
    ) -> Result<Response<v1::Node>, Status> {
        let mut request = request.into_inner();
        let key = std::mem::take(&mut request.request_key);
        let mutation = mutation("ClusterService/SetNodeFailover", &key, &request)?;
        let node = id(&request.node_id)?;
        changed(self.cluster().set_node_failover(&mutation, &node, request.held).await)
    }

    async fn confirm_node_down(
        &self,
        request: Request<v1::ConfirmNodeDownRequest>,
    ) -> Result<Response<v1::Node>, Status> {
        let mut request = request.into_inner();
        let key = std::mem::take(&mut request.request_key);
        let mutation = mutation("ClusterService/ConfirmNodeDown", &key, &request)?;
        let node = id(&request.node_id)?;
        changed(self.cluster().confirm_node_down(&mutation, &node).await)
    }

    async fn watch_nodes(
        &self,
        request: Request<v1::WatchNodesRequest>,
    ) -> Result<Response<Self::WatchNodesStream>, Status> {
        let request = request.into_inner();
        let role = convert::role_from(request.role).map_err(refuse)?;
        let filter = NodeFilter { role, region: request.region, zone: request.zone, ..NodeFilter::default() };
        let stream = watch(self.cluster().clone(), NodeView(filter), request.from_revision).await?;
        Ok(self.0.until_stop(stream))
    }

    async fn get_cluster_info(&self, _: Request<Empty>) -> Result<Response<v1::ClusterInfo>, Status> {
        let cluster = self.cluster();
        cluster.sync().await.map_err(failed)?;
        let health = cluster.store().health().await.map_err(|error| failed(error.into()))?;
        let leader = self.0.election.leader().await.map_err(|error| failed(error.into()))?;
        let id = cluster.id();
        let info = cluster.cache().read(|state| {
            let counts = state.counts();
            let count = |n: usize| i32::try_from(n).unwrap_or(i32::MAX);
            v1::ClusterInfo {
                cluster_id: id.to_string(),
                cluster_name: cluster.config().name.clone(),
                version: VERSION.into(),
                total_nodes: count(counts.nodes),
                ready_nodes: count(counts.ready),
                total_capacity: Some(convert::resources_to(counts.allocatable)),
                total_allocated: Some(convert::resources_to(counts.allocated)),
                total_instances: count(counts.instances),
                pending_instances: count(counts.in_state(InstanceState::Pending)),
                running_instances: count(counts.in_state(InstanceState::Running)),
                store_backend: health.backend.into(),
                leader: leader.unwrap_or_default(),
                revision: state.revision().0,
            }
        });
        Ok(Response::new(info))
    }

    async fn cordon_node(
        &self,
        request: Request<v1::CordonNodeRequest>,
    ) -> Result<Response<v1::Node>, Status> {
        let mut request = request.into_inner();
        let key = std::mem::take(&mut request.request_key);
        let mutation = mutation("ClusterService/CordonNode", &key, &request)?;
        let node = id(&request.node_id)?;
        changed(self.cluster().cordon_node(&mutation, &node).await)
    }

    async fn uncordon_node(
        &self,
        request: Request<v1::UncordonNodeRequest>,
    ) -> Result<Response<v1::Node>, Status> {
        let mut request = request.into_inner();
        let key = std::mem::take(&mut request.request_key);
        let mutation = mutation("ClusterService/UncordonNode", &key, &request)?;
        let node = id(&request.node_id)?;
        changed(self.cluster().uncordon_node(&mutation, &node).await)
    }

    async fn drain_node(
        &self,
        request: Request<v1::DrainNodeRequest>,
    ) -> Result<Response<v1::DrainNodeResponse>, Status> {
        let mut request = request.into_inner();
        let key = std::mem::take(&mut request.request_key);
        let mutation = mutation("ClusterService/DrainNode", &key, &request)?;
        let node = id(&request.node_id)?;
        let options = DrainOptions::new(request.discard_local_disks, request.max_parallel).map_err(refuse)?;
        let done = self.cluster().drain_node(&mutation, &node, options).await.map_err(failed)?;
        Ok(Response::new(done.reply))
    }

    async fn list_events(
        &self,
        request: Request<v1::ListEventsRequest>,
    ) -> Result<Response<v1::ListEventsResponse>, Status> {
        let request = request.into_inner();
        let bound_to = ("events", &request.object_kind, &request.object_id, request.warnings_only);
        let page = Page::new(request.page_size, &request.page_token, &bound_to).map_err(refuse)?;
        self.cluster().sync().await.map_err(failed)?;
        let wanted = EventView::new(request.object_kind, request.object_id, request.warnings_only);
        let (events, token) = self.cluster().cache().read(|state| {
            let mut matching =
                state.events_before(page.after.as_deref()).filter(|event| wanted.matches(event));
            let events: Vec<_> =
                matching.by_ref().take(page.size).map(|event| convert::event_to(event)).collect();
            let more = matching.next().is_some();
            let token =
                events.last().filter(|_| more).map(|last| page.token_after(&last.id)).unwrap_or_default();
            (events, token)
        });
        Ok(Response::new(v1::ListEventsResponse { events, next_page_token: token }))
    }

    async fn watch_events(
        &self,
        request: Request<v1::WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        let request = request.into_inner();
        let view = EventView {
            bookmarks: request.bookmarks,
            ..EventView::new(request.object_kind, request.object_id, request.warnings_only)
        };
        Ok(self.0.until_stop(watch(self.cluster().clone(), view, request.from_revision).await?))
    }
}

fn settings(request: v1::UpdateNodeRequest) -> Result<Settings, Invalid> {
    let taints = request.taints.map(|list| list.taints.into_iter().map(convert::taint_from).collect());
    let reserved = request.reserved.map(|reserved| convert::resources_from("reserved", Some(reserved)));
    Ok(Settings {
        taints: taints.transpose()?,
        overcommit: request.overcommit.map(|overcommit| convert::overcommit_from(Some(overcommit))),
        reserved: reserved.transpose()?,
    })
}

fn inventory(request: &v1::HeartbeatRequest) -> Result<Inventory, Status> {
    let read = || -> Result<Inventory, Invalid> {
        Ok(Inventory {
            conditions: request
                .conditions
                .iter()
                .cloned()
                .map(convert::condition_from)
                .collect::<Result<_, _>>()?,
            drivers: request.drivers.iter().cloned().map(convert::driver_from).collect::<Result<_, _>>()?,
            images: request.images.iter().cloned().map(convert::image_from).collect::<Result<_, _>>()?,
            devices: devices(request.devices.clone())?,
        })
    };
    read().map_err(refuse)
}

fn devices(devices: Option<v1::NodeDevices>) -> Result<DeviceInventory, Invalid> {
    let inventory = convert::inventory_from(devices)?;
    inventory.validate()?;
    Ok(inventory)
}

/// A watch of nodes.
struct NodeView(NodeFilter);

impl NodeView {
    fn event(
        &self,
        cluster: &Cluster,
        node: &NodeId,
        kind: v1::EventType,
        revision: Revision,
    ) -> Option<v1::NodeEvent> {
        let (record, view) = cluster.cache().read(|state| cluster.show(state, node))?;
        let node = convert::node_to(&record, &view, false);
        Some(v1::NodeEvent { r#type: kind.into(), node: Some(node), revision: revision.0 })
    }
}

impl View for NodeView {
    type Event = v1::NodeEvent;

    fn initial(&self, cluster: &Cluster, state: &State) -> Vec<v1::NodeEvent> {
        let matching = state.nodes().filter(|(record, _)| self.0.matches(record));
        matching
            .filter_map(|(record, _)| cluster.show(state, &record.id))
            .map(|(record, view)| v1::NodeEvent {
                r#type: v1::EventType::Added.into(),
                revision: 0,
                node: Some(convert::node_to(&record, &view, false)),
            })
            .collect()
    }

    fn changes(&self, cluster: &Cluster, batch: &Batch) -> Vec<v1::NodeEvent> {
        let mut events = Vec::new();
        for delta in &batch.deltas {
            let Delta::Node { id, before, after } = delta else { continue };
            let knew = before.as_ref().is_some_and(|(record, _)| self.0.matches(record));
            let knows = after.as_ref().is_some_and(|(record, _)| self.0.matches(record));
            match (knew, knows) {
                (false, true) => events.extend(self.event(cluster, id, v1::EventType::Added, batch.revision)),
                (true, true) => {
                    events.extend(self.event(cluster, id, v1::EventType::Modified, batch.revision));
                }
                (true, false) => events.push(v1::NodeEvent {
                    r#type: v1::EventType::Deleted.into(),
                    node: Some(v1::Node { id: id.to_string(), ..v1::Node::default() }),
                    revision: batch.revision.0,
                }),
                (false, false) => {}
            }
        }
        events
    }

    fn set_revision(&self, event: &mut v1::NodeEvent, revision: Revision) {
        event.revision = revision.0;
    }

    fn bookmark(&self, revision: Revision) -> Option<v1::NodeEvent> {
        Some(v1::NodeEvent { r#type: v1::EventType::Bookmark.into(), node: None, revision: revision.0 })
    }
}

/// A watch of events.
struct EventView {
    object_kind: String,
    object_id: String,
    warnings_only: bool,
    /// Whether the watcher asked for bookmarks; those who did not know nothing but events.
    bookmarks: bool,
}

impl EventView {
    fn new(object_kind: String, object_id: String, warnings_only: bool) -> Self {
        Self { object_kind, object_id, warnings_only, bookmarks: false }
    }

    fn matches(&self, event: &hv_types::Event) -> bool {
        (self.object_kind.is_empty() || self.object_kind == event.object_kind)
            && (self.object_id.is_empty() || self.object_id == event.object_id)
            && (!self.warnings_only || event.warning)
    }
}

impl View for EventView {
    type Event = v1::Event;

    fn initial(&self, _: &Cluster, _: &State) -> Vec<v1::Event> {
        Vec::new()
    }

    /// Nothing is listed, so nothing that happens meanwhile is shown by it.
    fn piece(&self, _: &Cluster, _: Option<&InstanceId>) -> Piece<v1::Event> {
        Piece { events: Vec::new(), next: None, revision: Revision(0) }
    }

    fn changes(&self, _: &Cluster, batch: &Batch) -> Vec<v1::Event> {
        let events = batch.deltas.iter().filter_map(|delta| match delta {
            Delta::Event(event) if self.matches(event) => Some(convert::event_to(event)),
            Delta::Event(_)
            | Delta::Operation { .. }
            | Delta::Instance { .. }
            | Delta::Node { .. }
            | Delta::Hold { .. } => None,
        });
        events.collect()
    }

    fn set_revision(&self, event: &mut v1::Event, revision: Revision) {
        event.revision = revision.0;
    }

    fn bookmark(&self, revision: Revision) -> Option<v1::Event> {
        let kind = v1::EventType::Bookmark.into();
        self.bookmarks.then(|| v1::Event { r#type: kind, revision: revision.0, ..v1::Event::default() })
    }
}
