//! The way that operations take to the agents of nodes: the pool of channels, with a bound for each call.

use std::error::Error as _;
use std::sync::{Arc, Weak};
use std::time::Duration;

use async_trait::async_trait;
use hv_client::{AgentClient, AgentPool, ClientOptions};
use hv_cluster::Cluster;
use hv_cluster::operations::{Answer, Nodes, PullProgress};
use hv_proto::v1;
use hv_types::{InstanceId, NodeId, ServiceError};
use tonic::{Request, Status};

/// How long a question may take.
const ASK: Duration = Duration::from_secs(5);
/// How long a node may take to prepare, to begin, or to undo; it goes on with it, and is asked again.
const WORK: Duration = Duration::from_secs(30);
/// How long a node may take to keep disks and memory, or to return to them.
const SNAPSHOT: Duration = Duration::from_mins(10);
/// How long a node that fetches an image may say nothing; it tells twice a second how far it is.
const PULL_SILENCE: Duration = Duration::from_mins(1);

/// The agents, found by the records of their nodes.
pub(crate) struct AgentNodes {
    cluster: Weak<Cluster>,
    agents: AgentPool,
}

impl AgentNodes {
    /// The agents of this cluster's nodes.
    pub(crate) fn new(cluster: &Arc<Cluster>, agents: AgentPool) -> Arc<Self> {
        // The cluster holds this, and not the other way round.
        Arc::new(Self { cluster: Arc::downgrade(cluster), agents })
    }

    fn agent(&self, node: &NodeId) -> Answer<(AgentClient, ClientOptions)> {
        let cluster =
            self.cluster.upgrade().ok_or_else(|| ServiceError::unavailable("the server is stopping"))?;
        let record = cluster.cache().read(|state| state.node(node).and_then(|entry| entry.record.clone()));
        let record = record.ok_or_else(|| ServiceError::not_found(format!("node {node} does not exist")))?;
        let host = if record.ip.contains(':') { format!("[{}]", record.ip) } else { record.ip.clone() };
        let address = format!("{host}:{}", record.port);
        let client = self.agents.get(&address).map_err(|error| {
            let message = format!("the address of node {} cannot be used", record.hostname);
            ServiceError::unavailable(message).caused_by(error)
        })?;
        Ok((client, self.agents.client_options(&address)))
    }
}

fn bounded<T>(message: T, bound: Duration) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(bound);
    request
}

/// The answer, if it comes within its bound. The agent is told of the bound too, and answers before it ends.
async fn within<T>(
    options: &ClientOptions,
    bound: Duration,
    call: impl Future<Output = Result<tonic::Response<T>, Status>> + Send,
) -> Answer<T> {
    match tokio::time::timeout(bound, call).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(failed(options, &status)),
        Err(_) => Err(ServiceError::unavailable(format!("no answer within {} s", bound.as_secs()))),
    }
}

/// Why a call failed. A connection that breaks is no answer, whatever code it is given: the node is asked again.
fn failed(options: &ClientOptions, status: &Status) -> ServiceError {
    let error = hv_client::explain(options, status);
    match status.source() {
        Some(_) if !error.code().retryable() => ServiceError::unavailable(error.message().to_owned()),
        _ => error,
    }
}

#[async_trait]
impl Nodes for AgentNodes {
    async fn prepare_incoming(
        &self,
        node: &NodeId,
        request: v1::AgentPrepareIncomingRequest,
    ) -> Answer<v1::AgentPrepareIncomingResponse> {
        let (mut agent, options) = self.agent(node)?;
        within(&options, WORK, agent.prepare_incoming(bounded(request, WORK))).await
    }

    async fn begin_migration(
        &self,
        node: &NodeId,
        request: v1::AgentBeginMigrationRequest,
    ) -> Answer<v1::AgentMigrationStatus> {
        let (mut agent, options) = self.agent(node)?;
        within(&options, WORK, agent.begin_migration(bounded(request, WORK))).await
    }

    async fn migration(
        &self,
        node: &NodeId,
        instance: &InstanceId,
        migration: &str,
    ) -> Answer<v1::AgentMigrationStatus> {
        let (mut agent, options) = self.agent(node)?;
        let request =
            v1::AgentMigrationRequest { instance_id: instance.to_string(), migration_id: migration.into() };
        within(&options, ASK, agent.get_migration(bounded(request, ASK))).await
    }

    async fn abort_migration(&self, node: &NodeId, instance: &InstanceId, migration: &str) -> Answer<()> {
        let (mut agent, options) = self.agent(node)?;
        let request =
            v1::AgentMigrationRequest { instance_id: instance.to_string(), migration_id: migration.into() };
        within(&options, WORK, agent.abort_migration(bounded(request, WORK))).await.map(drop)
    }

    async fn create_snapshot(
        &self,
        node: &NodeId,
        request: v1::AgentSnapshotRequest,
    ) -> Answer<v1::InstanceSnapshot> {
        let (mut agent, options) = self.agent(node)?;
        within(&options, SNAPSHOT, agent.create_snapshot(bounded(request, SNAPSHOT))).await
    }

    async fn revert_instance(&self, node: &NodeId, request: v1::AgentSnapshotRequest) -> Answer<()> {
        let (mut agent, options) = self.agent(node)?;
        within(&options, SNAPSHOT, agent.revert_instance(bounded(request, SNAPSHOT))).await.map(drop)
    }

    async fn delete_snapshot(&self, node: &NodeId, request: v1::AgentSnapshotRequest) -> Answer<()> {
        let (mut agent, options) = self.agent(node)?;
        within(&options, SNAPSHOT, agent.delete_snapshot(bounded(request, SNAPSHOT))).await.map(drop)
    }

    async fn snapshots(&self, node: &NodeId, instance: &InstanceId) -> Answer<Vec<v1::InstanceSnapshot>> {
        let (mut agent, options) = self.agent(node)?;
        let request = v1::AgentInstanceRequest { instance_id: instance.to_string() };
        within(&options, WORK, agent.list_snapshots(bounded(request, WORK)))
            .await
            .map(|listed| listed.snapshots)
    }

    async fn pull_image(
        &self,
        node: &NodeId,
        request: v1::PullImageRequest,
        progress: &PullProgress<'_>,
    ) -> Answer<()> {
        let (mut agent, options) = self.agent(node)?;
        let mut steps = within(&options, PULL_SILENCE, agent.pull_image(request)).await?;
        loop {
            let step = tokio::time::timeout(PULL_SILENCE, steps.message()).await.map_err(|_| {
                ServiceError::unavailable(format!("it said nothing for {} s", PULL_SILENCE.as_secs()))
            })?;
            let Some(step) = step.map_err(|status| failed(&options, &status))? else {
                return Err(ServiceError::unavailable("it broke off before it had the image"));
            };
            if step.completed {
                return Ok(());
            }
            let bytes = |count: i64| u64::try_from(count).unwrap_or_default();
            progress(&step.status, bytes(step.current), bytes(step.total));
        }
    }
}

#[cfg(test)]
mod tests {
    use hv_client::{Clients, channel};
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn a_node_whose_connection_breaks_is_asked_again() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let options = ClientOptions::new(listener.local_addr().expect("its address").to_string());
        let breaks = tokio::spawn(async move {
            loop {
                drop(listener.accept().await);
            }
        });
        let mut agent = Clients::new(channel(&options).expect("a channel")).agent();
        let asked = agent.get_migration(v1::AgentMigrationRequest::default());
        let error = within(&options, ASK, asked).await.expect_err("nobody answers");
        assert!(error.code().retryable(), "{error}: {:?}", error.code());
        breaks.abort();
    }
}
