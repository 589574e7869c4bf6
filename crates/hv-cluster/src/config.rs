//! The settings that decisions depend on.

use std::time::Duration;

use hv_scheduler::Strategy;

/// How long events, and operations that have ended, are kept unless the operator says otherwise.
const DAYS_KEPT: Duration = Duration::from_secs(7 * 24 * 3600);

/// The settings of one server's cluster logic.
#[derive(Clone, Debug)]
pub struct ClusterConfig {
    /// The cluster's name, for people.
    pub name: String,
    /// This server's name in elections and events.
    pub server_id: String,
    /// Where everything lies in the store.
    pub key_prefix: String,
    /// How often nodes send heartbeats.
    pub heartbeat_interval: Duration,
    /// How long a node's lease lives without one.
    pub heartbeat_timeout: Duration,
    /// How long a leader's lease lives.
    pub leader_ttl: Duration,
    /// How to choose among nodes that fit.
    pub strategy: Strategy,
    /// Whether an instance of higher priority that fits nowhere may push out others.
    pub preemption: bool,
    /// How long after the end of a node's lease its instances may be started elsewhere, beyond the margin that nodes keep.
    pub failover_grace: Duration,
    /// How many events are kept.
    pub event_limit: usize,
    /// How long events are kept.
    pub event_max_age: Duration,
    /// How many operations that have ended are kept.
    pub operation_limit: usize,
    /// How long operations are kept after their end.
    pub operation_max_age: Duration,
    /// How long a request key is remembered.
    pub request_ttl: Duration,
}

impl Default for ClusterConfig {
    fn default() -> Self {
        Self {
            name: "hypervisor".into(),
            server_id: "server".into(),
            key_prefix: hv_store::keys::DEFAULT_PREFIX.into(),
            heartbeat_interval: Duration::from_secs(10),
            heartbeat_timeout: Duration::from_secs(30),
            leader_ttl: Duration::from_secs(5),
            strategy: Strategy::default(),
            preemption: false,
            failover_grace: Duration::from_secs(10),
            event_limit: 10_000,
            event_max_age: DAYS_KEPT,
            operation_limit: 10_000,
            operation_max_age: DAYS_KEPT,
            request_ttl: Duration::from_secs(24 * 3600),
        }
    }
}
