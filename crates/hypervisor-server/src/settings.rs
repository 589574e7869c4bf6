//! The server's settings, as its configuration file spells them.

use std::path::PathBuf;

use hv_config::{ByteSize, HumanDuration, ListenAddress, Secret};
use hv_telemetry::{LogFormat, LogLevel};
use serde::{Deserialize, Serialize};

/// Everything that can be set.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Addresses and places of this server.
    pub server: ServerSettings,
    /// The cluster.
    pub cluster: ClusterSettings,
    /// The external store; the embedded one is used where no endpoint is given.
    pub etcd: EtcdSettings,
    /// Node liveness.
    pub heartbeat: HeartbeatSettings,
    /// Placement.
    pub scheduler: SchedulerSettings,
    /// What is kept of events.
    pub events: EventSettings,
    /// What is kept of operations that have ended.
    pub operations: OperationSettings,
    /// What callers may ask at once.
    pub limits: LimitSettings,
    /// Transport security of the gRPC port.
    pub tls: TlsSettings,
    /// What is logged.
    pub log_level: LogLevel,
    /// How it is logged.
    pub log_format: LogFormat,
}

/// Addresses and places of this server.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ServerSettings {
    /// Where gRPC is served.
    pub grpc_address: ListenAddress,
    /// Where health and metrics are served.
    pub http_address: ListenAddress,
    /// Where the embedded store and the ready file lie.
    pub data_dir: PathBuf,
    /// This server's name in elections and events; the host's name and the process id if not set.
    pub id: Option<String>,
    /// How long running calls may take to end when the server stops.
    pub shutdown_timeout: HumanDuration,
    /// How long the server that leads may be silent before another takes over.
    pub leader_ttl: HumanDuration,
}

impl Default for ServerSettings {
    fn default() -> Self {
        Self {
            grpc_address: ListenAddress::all(50051),
            http_address: ListenAddress::all(8080),
            data_dir: "/var/lib/hypervisor/server".into(),
            id: None,
            shutdown_timeout: HumanDuration::from_secs(10),
            leader_ttl: HumanDuration::from_secs(5),
        }
    }
}

/// The cluster.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClusterSettings {
    /// Its name, for people.
    pub name: String,
}

impl Default for ClusterSettings {
    fn default() -> Self {
        Self { name: "hypervisor".into() }
    }
}

/// The external store.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EtcdSettings {
    /// `http://host:2379` of each member; none: the embedded store.
    pub endpoints: Vec<String>,
    /// How long a connection may take.
    pub dial_timeout: HumanDuration,
    /// How long a request may take.
    pub request_timeout: HumanDuration,
    /// The members' `--quota-backend-bytes`; 0: what they report, or else etcd's default of 2 GiB.
    pub quota: ByteSize,
    /// Where everything lies in it.
    pub prefix: String,
    /// The client certificate, PEM.
    pub cert_file: Option<PathBuf>,
    /// Its key, PEM.
    pub key_file: Option<PathBuf>,
    /// The authority that signed the members' certificates, PEM.
    pub ca_file: Option<PathBuf>,
    /// The user, where etcd asks for one.
    pub username: Option<String>,
    /// The user's password.
    pub password: Option<Secret>,
}

impl Default for EtcdSettings {
    fn default() -> Self {
        Self {
            endpoints: Vec::new(),
            dial_timeout: HumanDuration::from_secs(5),
            request_timeout: HumanDuration::from_secs(5),
            quota: ByteSize::from_bytes(0),
            prefix: hv_store::keys::DEFAULT_PREFIX.into(),
            cert_file: None,
            key_file: None,
            ca_file: None,
            username: None,
            password: None,
        }
    }
}

/// Node liveness.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HeartbeatSettings {
    /// How often nodes send heartbeats.
    pub interval: HumanDuration,
    /// How long a node lives without one.
    pub timeout: HumanDuration,
    /// How long after that its instances may be started elsewhere.
    pub failover_grace: HumanDuration,
}

impl Default for HeartbeatSettings {
    fn default() -> Self {
        Self {
            interval: HumanDuration::from_secs(10),
            timeout: HumanDuration::from_secs(30),
            failover_grace: HumanDuration::from_secs(10),
        }
    }
}

/// Placement.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SchedulerSettings {
    /// `spread` or `bin-pack`.
    pub strategy: String,
    /// Whether an instance of higher priority that fits nowhere pushes out others.
    pub preemption: bool,
}

impl Default for SchedulerSettings {
    fn default() -> Self {
        Self { strategy: hv_scheduler::Strategy::default().to_string(), preemption: false }
    }
}

/// What is kept of events.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EventSettings {
    /// How many.
    pub keep: usize,
    /// How long.
    pub max_age: HumanDuration,
}

impl Default for EventSettings {
    fn default() -> Self {
        Self { keep: 10_000, max_age: HumanDuration::from_secs(WEEK_SECONDS) }
    }
}

/// What is kept of operations that have ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OperationSettings {
    /// How many.
    pub keep: usize,
    /// How long.
    pub max_age: HumanDuration,
}

impl Default for OperationSettings {
    fn default() -> Self {
        Self { keep: 10_000, max_age: HumanDuration::from_secs(WEEK_SECONDS) }
    }
}

const WEEK_SECONDS: u64 = 7 * 24 * 3600;

/// What callers may ask at once.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitSettings {
    /// Calls of users that one address may begin each second; 0: no limit.
    pub calls_per_second: u32,
    /// Calls that an address which was quiet may begin at once; at least those of a second.
    pub burst: u32,
    /// Calls of users that are under way at once.
    pub calls_at_once: usize,
    /// Calls of nodes that are under way at once.
    pub node_calls_at_once: usize,
}

impl Default for LimitSettings {
    fn default() -> Self {
        Self { calls_per_second: 10_000, burst: 20_000, calls_at_once: 4096, node_calls_at_once: 16_384 }
    }
}

/// Transport security.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TlsSettings {
    /// Whether it is used.
    pub enabled: bool,
    /// The certificate, PEM.
    pub cert_file: Option<PathBuf>,
    /// Its key, PEM.
    pub key_file: Option<PathBuf>,
    /// The authority that signed clients' and agents' certificates, PEM.
    pub ca_file: Option<PathBuf>,
    /// Whether clients must show a certificate.
    pub client_auth: bool,
}
