//! The fake's ClusterService.

use hv_proto::v1::cluster_service_server::ClusterService;
use hv_proto::v1::{self, EventType, NodeStatus};
use hv_types::ErrorCode;
use pbjson_types::Empty;
use tonic::{Request, Response, Status, async_trait};

use super::{Service, Streamed, status};

type Answer<T> = Result<Response<T>, Status>;

fn unsupported<T>() -> Answer<T> {
    Err(status(ErrorCode::Unsupported, "the fake cannot do this"))
}

impl Service {
    fn set_status(&self, method: &'static str, (id, key): (&str, &str), to: NodeStatus) -> Answer<v1::Node> {
        let mut model = self.0.lock();
        model.mutations.push((method, key.to_owned()));
        let node = model.nodes.get_mut(id).ok_or_else(|| status(ErrorCode::NotFound, "no such node"))?;
        node.status = to as i32;
        Ok(Response::new(node.clone()))
    }
}

#[async_trait]
impl ClusterService for Service {
    type WatchNodesStream = Streamed<v1::NodeEvent>;
    type WatchEventsStream = Streamed<v1::Event>;

    async fn register_node(&self, _: Request<v1::RegisterNodeRequest>) -> Answer<v1::RegisterNodeResponse> {
        unsupported()
    }

    async fn deregister_node(&self, _: Request<v1::DeregisterNodeRequest>) -> Answer<Empty> {
        unsupported()
    }

    async fn get_node(&self, request: Request<v1::GetNodeRequest>) -> Answer<v1::Node> {
        let found = self.0.lock().nodes.get(&request.get_ref().node_id).cloned();
        found.map(Response::new).ok_or_else(|| status(ErrorCode::NotFound, "no such node"))
    }

    async fn list_nodes(&self, request: Request<v1::ListNodesRequest>) -> Answer<v1::ListNodesResponse> {
        self.note(&request);
        let request = request.into_inner();
        let nodes: Vec<v1::Node> = self
            .0
            .lock()
            .nodes
            .values()
            .filter(|node| {
                request.reference.is_empty()
                    || node.hostname == request.reference
                    || node.id.starts_with(&request.reference)
            })
            .cloned()
            .collect();
        Ok(Response::new(v1::ListNodesResponse { nodes, ..Default::default() }))
    }

    async fn update_node_status(&self, _: Request<v1::UpdateNodeStatusRequest>) -> Answer<v1::Node> {
        unsupported()
    }

    async fn heartbeat(&self, _: Request<v1::HeartbeatRequest>) -> Answer<v1::HeartbeatResponse> {
        unsupported()
    }

    async fn watch_nodes(&self, _: Request<v1::WatchNodesRequest>) -> Answer<Self::WatchNodesStream> {
        let nodes: Vec<v1::Node> = self.0.lock().nodes.values().cloned().collect();
        let mut events: Vec<_> = nodes
            .into_iter()
            .map(|node| Ok(v1::NodeEvent { r#type: EventType::Added as i32, node: Some(node), revision: 1 }))
            .collect();
        events.push(Ok(v1::NodeEvent { r#type: EventType::Bookmark as i32, node: None, revision: 1 }));
        events.push(Err(status(ErrorCode::PermissionDenied, "the fake's watch is over")));
        Ok(Response::new(Box::pin(tokio_stream::iter(events))))
    }

    async fn get_cluster_info(&self, request: Request<Empty>) -> Answer<v1::ClusterInfo> {
        self.note(&request);
        self.answered(&mut self.0.lock())?;
        let info = v1::ClusterInfo {
            cluster_id: "cluster-id".into(),
            cluster_name: "test".into(),
            version: "9.9.9".into(),
            total_nodes: 2,
            ready_nodes: 1,
            ..Default::default()
        };
        Ok(Response::new(info))
    }

    async fn cordon_node(&self, request: Request<v1::CordonNodeRequest>) -> Answer<v1::Node> {
        let request = request.into_inner();
        self.set_status("cordon", (&request.node_id, &request.request_key), NodeStatus::Maintenance)
    }

    async fn uncordon_node(&self, request: Request<v1::UncordonNodeRequest>) -> Answer<v1::Node> {
        let request = request.into_inner();
        self.set_status("uncordon", (&request.node_id, &request.request_key), NodeStatus::Ready)
    }

    async fn drain_node(&self, request: Request<v1::DrainNodeRequest>) -> Answer<v1::DrainNodeResponse> {
        let request = request.into_inner();
        let node = self
            .set_status("drain", (&request.node_id, &request.request_key), NodeStatus::Draining)?
            .into_inner();
        let model = self.0.lock();
        let blockers = model.script.blocker.iter().map(|reason| v1::DrainBlocker {
            instance_id: "id".into(),
            name: "web".into(),
            reason: reason.clone(),
        });
        // The first call moves something, the second finds nothing left.
        let drains = model.mutations.iter().filter(|(method, _)| *method == "drain").count();
        let moving_instance_ids = if drains == 1 { vec!["moving".into()] } else { vec![] };
        let answer =
            v1::DrainNodeResponse { node: Some(node), moving_instance_ids, blockers: blockers.collect() };
        Ok(Response::new(answer))
    }

    async fn list_events(&self, request: Request<v1::ListEventsRequest>) -> Answer<v1::ListEventsResponse> {
        let request = request.into_inner();
        let model = self.0.lock();
        let events = model.events.iter().rev().filter(|event| {
            (request.object_id.is_empty() || event.object_id == request.object_id)
                && (!request.warnings_only || event.warning)
        });
        let events = events.take(usize::try_from(request.page_size).unwrap_or(100)).cloned().collect();
        Ok(Response::new(v1::ListEventsResponse { events, next_page_token: String::new() }))
    }

    async fn watch_events(&self, _: Request<v1::WatchEventsRequest>) -> Answer<Self::WatchEventsStream> {
        let model = self.0.lock();
        // What the list brings too, then something new, then the end of it all.
        let again = model.events.last().cloned().into_iter();
        let fresh = v1::Event {
            id: "e9".into(),
            object_kind: "instance".into(),
            object_name: "web".into(),
            reason: "Fresh".into(),
            ..Default::default()
        };
        let stream: Vec<_> = again.chain([fresh]).map(Ok).collect();
        Ok(Response::new(Box::pin(tokio_stream::iter(stream))))
    }
}
