//! The typed client that the command line, the server's agent pool and the agent share.
//!
//! - [`ClientOptions`] says where and how; [`channel`] connects when first used, [`connect`] at once.
//! - [`Clients`] makes the typed clients over one channel; each of them sends a request id ([`AttachRequestId`]).
//! - [`AgentPool`] keeps channels to many agents.
//! - [`explain`] turns a failed call into a [`hv_types::ServiceError`] that says what to do.

mod clients;
mod endpoint;
mod error;
mod pool;
mod request_id;
mod wire;

pub use clients::{
    AgentClient, AssignmentClient, Clients, ClusterClient, ComputeClient, OperationClient, StoreClient,
    Transport,
};
pub use endpoint::{ClientOptions, ClientTls, Peer, channel, connect};
pub use error::{ClientError, explain};
pub use pool::{AgentPool, AgentPoolOptions};
pub use request_id::AttachRequestId;
pub use wire::Wire;
