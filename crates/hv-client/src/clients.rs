//! The typed clients over one channel.

use hv_proto::MAX_MESSAGE_BYTES;
use hv_proto::v1::agent_service_client::AgentServiceClient;
use hv_proto::v1::assignment_service_client::AssignmentServiceClient;
use hv_proto::v1::cluster_service_client::ClusterServiceClient;
use hv_proto::v1::compute_service_client::ComputeServiceClient;
use hv_proto::v1::operation_service_client::OperationServiceClient;
use hv_proto::v1::store_service_client::StoreServiceClient;
use tonic::service::interceptor::InterceptedService;

use crate::request_id::AttachRequestId;
use crate::wire::Wire;

/// A channel whose calls carry a request id.
pub type Transport = InterceptedService<Wire, AttachRequestId>;
/// Instances, as users see them.
pub type ComputeClient = ComputeServiceClient<Transport>;
/// Nodes and events.
pub type ClusterClient = ClusterServiceClient<Transport>;
/// A node's own side of the control plane.
pub type AssignmentClient = AssignmentServiceClient<Transport>;
/// Work that takes long.
pub type OperationClient = OperationServiceClient<Transport>;
/// The store's upkeep.
pub type StoreClient = StoreServiceClient<Transport>;
/// One node's agent.
pub type AgentClient = AgentServiceClient<Transport>;

/// Makes the typed clients over one channel. Cheap to clone, as are the clients: all share the connection.
#[derive(Clone, Debug)]
pub struct Clients {
    wire: Wire,
}

impl Clients {
    /// Clients over this channel.
    #[must_use]
    pub fn new(channel: impl Into<Wire>) -> Self {
        Self { wire: channel.into() }
    }

    /// The channel, for services that are not ours (health, reflection).
    #[must_use]
    pub fn channel(&self) -> Wire {
        self.wire.clone()
    }

    fn transport(&self) -> Transport {
        InterceptedService::new(self.wire.clone(), AttachRequestId)
    }

    /// Instances, as users see them; served by the server.
    #[must_use]
    pub fn compute(&self) -> ComputeClient {
        ComputeServiceClient::new(self.transport())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// Nodes and events; served by the server.
    #[must_use]
    pub fn cluster(&self) -> ClusterClient {
        ClusterServiceClient::new(self.transport())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// Assignments and reports; served by the server to agents.
    #[must_use]
    pub fn assignment(&self) -> AssignmentClient {
        AssignmentServiceClient::new(self.transport())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// Work that takes long; served by the server.
    #[must_use]
    pub fn operations(&self) -> OperationClient {
        OperationServiceClient::new(self.transport())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// The store's upkeep; served by the server.
    #[must_use]
    pub fn store(&self) -> StoreClient {
        StoreServiceClient::new(self.transport())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// What an agent serves on its node.
    #[must_use]
    pub fn agent(&self) -> AgentClient {
        AgentServiceClient::new(self.transport())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }
}
