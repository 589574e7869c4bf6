//! Settings of about the shape that the server and the agent have.

use std::collections::BTreeMap;

use hv_config::{ByteSize, HumanDuration, ListenAddress, Secret};
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Settings {
    pub(crate) log_level: Level,
    pub(crate) server: Server,
    pub(crate) etcd: Etcd,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) node_id: Option<String>,
    pub(crate) cache: ByteSize,
    pub(crate) ratio: f64,
    pub(crate) weights: Vec<i8>,
    pub(crate) drivers: Vec<Driver>,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Level {
    Debug,
    Info,
}

#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Driver {
    pub(crate) name: String,
    #[serde(default)]
    pub(crate) slots: u16,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Server {
    pub(crate) grpc_address: ListenAddress,
    pub(crate) max_streams: u16,
    pub(crate) dev: bool,
    pub(crate) drain: HumanDuration,
}

#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Etcd {
    pub(crate) endpoints: Vec<String>,
    pub(crate) password: Secret,
}

impl Default for Server {
    fn default() -> Self {
        Self {
            grpc_address: ListenAddress::all(50051),
            max_streams: 100,
            dev: false,
            drain: HumanDuration::from_secs(30),
        }
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            log_level: Level::Info,
            server: Server::default(),
            // Not what `Etcd::default()` says: the outer default must win for keys that nobody sets.
            etcd: Etcd { endpoints: vec!["http://127.0.0.1:2379".to_owned()], password: Secret::default() },
            labels: BTreeMap::new(),
            node_id: None,
            cache: ByteSize::from_mib(512),
            ratio: 1.5,
            weights: vec![1, -2],
            drivers: Vec::new(),
        }
    }
}
