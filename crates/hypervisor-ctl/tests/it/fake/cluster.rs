//! The fake's ClusterService.

use hv_proto::v1::cluster_service_server::ClusterService;
use hv_proto::v1::{self, EventType, NodeStatus};
use hv_types::ErrorCode;
use pbjson_types::Empty;
use tonic::{Request, Response, async_trait};

use super::{Answer, Service, Streamed, status};

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

    async fn deregister_node(&self, request: Request<v1::DeregisterNodeRequest>) -> Answer<Empty> {
        let request = request.into_inner();
        if !request.force {
            return Err(status(ErrorCode::FailedPrecondition, "node alpha still has 1 instance; drain it"));
        }
        self.0.lock().nodes.remove(&request.node_id);
        Ok(Response::new(Empty {}))
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

    async fn update_node(&self, request: Request<v1::UpdateNodeRequest>) -> Answer<v1::Node> {
        let request = request.into_inner();
        let mut model = self.0.lock();
        model.mutations.push(("update_node", request.request_key));
        let node = model.nodes.get_mut(&request.node_id);
        let node = node.ok_or_else(|| status(ErrorCode::NotFound, "no such node"))?;
        node.taints = request.taints.map(|list| list.taints).unwrap_or_default();
        node.overcommit = request.overcommit;
        node.reserved = request.reserved;
        Ok(Response::new(node.clone()))
    }

    async fn set_node_failover(&self, request: Request<v1::SetNodeFailoverRequest>) -> Answer<v1::Node> {
        let request = request.into_inner();
        let mut model = self.0.lock();
        model.mutations.push(("set_node_failover", request.request_key));
        let node = model.nodes.get_mut(&request.node_id);
        let node = node.ok_or_else(|| status(ErrorCode::NotFound, "no such node"))?;
        node.failover_held = request.held;
        Ok(Response::new(node.clone()))
    }

    async fn confirm_node_down(&self, request: Request<v1::ConfirmNodeDownRequest>) -> Answer<v1::Node> {
        let request = request.into_inner();
        let mut model = self.0.lock();
        model.mutations.push(("confirm_node_down", request.request_key));
        let node = model.nodes.get_mut(&request.node_id);
        let node = node.ok_or_else(|| status(ErrorCode::NotFound, "no such node"))?;
        node.confirmed_down = true;
        Ok(Response::new(node.clone()))
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
        let mut model = self.0.lock();
        let blockers: Vec<_> = model
            .script
            .blocker
            .iter()
            .map(|reason| v1::OperationBlocker {
                object_id: "id".into(),
                object_name: "web".into(),
                reason: reason.clone(),
            })
            .collect();
        let operation = v1::Operation {
            id: "0190a1b2-drain".into(),
            kind: "drain-node".into(),
            object_kind: "node".into(),
            object_id: node.id.clone(),
            object_name: node.hostname.clone(),
            state: v1::OperationState::Running as i32,
            phase: "moving".into(),
            message: "0 of 1 moved".into(),
            total: 1,
            parameters: [("max_parallel".to_owned(), request.max_parallel.to_string())].into(),
            blockers,
            ..Default::default()
        };
        let operation_id = operation.id.clone();
        model.operations.insert(operation_id.clone(), operation);
        let moving_instance_ids = vec!["moving".into()];
        let answer = v1::DrainNodeResponse {
            node: Some(node),
            moving_instance_ids,
            operation_id,
            ..Default::default()
        };
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
