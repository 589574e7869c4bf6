//! A server under load and the fleet that it believes to have: nodes and instances that are only records.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, ensure};
use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use hv_client::{ClientOptions, Clients};
use hv_proto::convert::RECORD_SCHEMA;
use hv_proto::store::NodeLease;
use hv_proto::v1;
use hv_store::embedded::{EmbeddedOptions, EmbeddedStore};
use hv_store::keys::Keys;
use hv_store::record::{Record as _, encode_message};
use hv_store::{Op, Store, Txn};
use hv_testkit::{Cluster, ClusterOptions, StoreKind, Usage};
use hv_types::node::Schedulability;
use hv_types::{
    DriverInfo, InstanceId, InstanceRecord, InstanceState, InstanceType, NodeId, NodeRecord, NodeRole,
    Resources,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// Nodes of the fleet.
pub(crate) const NODES: usize = 10_000;
/// Cores of each; memory and disk are beyond what instances of the bench can use up.
const CORES: u32 = 256;
const BYTES: u64 = 1 << 44;
/// Records written in one transaction, and transactions on their way at once.
const SEED_BATCH: usize = 100;
const SEED_PARALLEL: usize = 32;
/// Calls on their way at once while nodes register.
const REGISTER_PARALLEL: usize = 128;
/// How long seeded nodes count as alive: longer than any row takes.
const SEED_LEASE: Duration = Duration::from_secs(3600);
/// How long a server may take to be ready.
const READY: Duration = Duration::from_secs(300);
/// Connections of the load generator.
const CHANNELS: usize = 8;

/// A release server, alone, as a process of its own.
pub(crate) struct Server {
    pub(crate) cluster: Cluster,
    /// From its start until it said that it is ready.
    pub(crate) ready_after: Duration,
}

/// What the servers of all rows have in common.
pub(crate) fn options(store: StoreKind, heartbeat_timeout: Duration) -> ClusterOptions {
    ClusterOptions {
        store,
        heartbeat_timeout,
        log_level: "warn",
        // One address asks for everything here.
        server_env: vec![("HYPERVISOR_LIMITS_CALLS_PER_SECOND", "0".into())],
        dir: Some(scratch()),
        ..ClusterOptions::default()
    }
}

/// Where stores are measured: a real disk, not a file system in memory.
pub(crate) fn scratch() -> PathBuf {
    std::env::var_os("BENCH_DIR").map_or_else(std::env::temp_dir, PathBuf::from)
}

impl Server {
    /// Starts one and waits until it is ready.
    pub(crate) async fn start(options: ClusterOptions) -> Result<Self> {
        let mut server = Self { cluster: Cluster::prepare(options)?, ready_after: Duration::ZERO };
        server.boot().await?;
        Ok(server)
    }

    /// Starts one over a store that holds what `seed` puts there. Returns how long seeding took.
    pub(crate) async fn start_seeded(options: ClusterOptions, seed: Seed) -> Result<(Self, Duration)> {
        let cluster = Cluster::prepare(options)?;
        let begin = Instant::now();
        seed.write(&cluster.server_dir(0).join("store")).await?;
        let took = begin.elapsed();
        let mut server = Self { cluster, ready_after: Duration::ZERO };
        server.boot().await?;
        Ok((server, took))
    }

    async fn boot(&mut self) -> Result<()> {
        let begin = Instant::now();
        self.cluster.start_server(&[]).await?;
        let address = self.cluster.http_address()?;
        while !is_ready(&address).await {
            ensure!(begin.elapsed() < READY, "the server is not ready after {READY:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        self.ready_after = begin.elapsed();
        Ok(())
    }

    /// Kills it and starts it again over the same store.
    pub(crate) async fn restart(&mut self) -> Result<()> {
        self.cluster.server().context("the server is gone")?.kill()?;
        self.boot().await
    }

    /// What its process has used.
    pub(crate) fn usage(&mut self) -> Result<Usage> {
        Usage::of(self.cluster.server().context("the server is gone")?.id())
    }

    /// Clients over several connections.
    pub(crate) fn clients(&self) -> Result<Vec<Clients>> {
        (0..CHANNELS).map(|_| self.client()).collect()
    }

    /// A client over a connection of its own.
    pub(crate) fn client(&self) -> Result<Clients> {
        Ok(Clients::new(hv_client::channel(&ClientOptions::new(self.cluster.grpc_address()?))?))
    }
}

/// Whether `/readyz` says 200.
async fn is_ready(address: &str) -> bool {
    let asked = async {
        let mut stream = tokio::net::TcpStream::connect(address).await?;
        let request = format!("GET /readyz HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        std::io::Result::Ok(answer.starts_with(b"HTTP/1.1 200"))
    };
    asked.await.unwrap_or(false)
}

/// The id of a node.
pub(crate) fn node_id(index: usize) -> String {
    format!("bench-node-{index:05}")
}

/// Registers nodes as agents do, over gRPC; returns how long it took.
pub(crate) async fn register(clients: &[Clients], nodes: usize) -> Result<Duration> {
    let begin = Instant::now();
    stream::iter(0..nodes)
        .map(|index| {
            let mut client = clients[index % clients.len()].cluster();
            async move { client.register_node(registration(index)).await.map(drop) }
        })
        .buffer_unordered(REGISTER_PARALLEL)
        .try_collect::<()>()
        .await?;
    Ok(begin.elapsed())
}

fn registration(index: usize) -> v1::RegisterNodeRequest {
    let resources = v1::Resources {
        cpu_cores: i32::try_from(CORES).unwrap_or(i32::MAX),
        memory_bytes: i64::try_from(BYTES).unwrap_or(i64::MAX),
        disk_bytes: i64::try_from(BYTES).unwrap_or(i64::MAX),
        gpu_count: 0,
    };
    v1::RegisterNodeRequest {
        hostname: node_id(index),
        ip: "127.0.0.1".into(),
        port: 1,
        role: v1::NodeRole::Worker.into(),
        region: "bench".into(),
        zone: format!("zone-{}", index % 3),
        capacity: Some(resources),
        node_id: node_id(index),
        drivers: vec![v1::DriverInfo {
            name: "fake".into(),
            r#type: v1::InstanceType::Vm.into(),
            healthy: true,
            ..v1::DriverInfo::default()
        }],
        ..v1::RegisterNodeRequest::default()
    }
}

/// A create request of the bench: one core, a little memory.
pub(crate) fn instance(name: String, project: &str) -> v1::CreateInstanceRequest {
    v1::CreateInstanceRequest {
        name,
        r#type: v1::InstanceType::Vm.into(),
        spec: Some(v1::InstanceSpec {
            image: "tiny".into(),
            cpu_cores: 1,
            memory_bytes: 128 << 20,
            ..v1::InstanceSpec::default()
        }),
        project: project.into(),
        ..v1::CreateInstanceRequest::default()
    }
}

/// Records that are written straight into the embedded store before the server starts: nodes that are alive, and
/// instances that run on them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seed {
    pub(crate) nodes: usize,
    pub(crate) instances: usize,
}

impl Seed {
    async fn write(self, dir: &Path) -> Result<()> {
        std::fs::create_dir_all(dir)?;
        let store = EmbeddedStore::open(dir, EmbeddedOptions::default())?;
        let lease = store.lease_grant(SEED_LEASE).await?;
        let sign = encode_message(&NodeLease { schema: RECORD_SCHEMA, lease_id: lease.0, ttl_ms: 0 });
        let keys = Keys::default();
        let keys = &keys;
        let nodes = (0..self.nodes).map(|index| {
            let node = node_record(index);
            vec![
                Op::put(keys.node(&node.id), node.encode()),
                Op::put_leased(keys.node_lease(&node.id), sign.clone(), lease),
            ]
        });
        let instances = (0..self.instances).map(|index| {
            let instance = instance_record(index, self.nodes);
            vec![
                Op::put(keys.instance(&instance.id), instance.encode()),
                Op::put(
                    keys.instance_name(&instance.project, &instance.name),
                    instance.id.as_str().as_bytes().to_vec(),
                ),
            ]
        });
        let ops = stream::iter(nodes.chain(instances)).map(stream::iter).flatten();
        let written = ops
            .chunks(SEED_BATCH)
            .map(|then| store.txn(Txn { then, ..Txn::default() }))
            .buffer_unordered(SEED_PARALLEL)
            .try_for_each(async |_| Ok(()))
            .await;
        store.close().await;
        Ok(written?)
    }
}

fn node_record(index: usize) -> NodeRecord {
    let resources = Resources { cpu_cores: CORES, memory_bytes: BYTES, disk_bytes: BYTES, gpu_count: 0 };
    let id: NodeId = node_id(index).parse().expect("a valid id");
    NodeRecord {
        hostname: id.to_string(),
        id,
        ip: "127.0.0.1".into(),
        port: 1,
        role: NodeRole::Worker,
        region: "bench".into(),
        zone: format!("zone-{}", index % 3),
        capacity: resources,
        allocatable: resources,
        schedulability: Schedulability::default(),
        drain_discards_disks: false,
        drain_max_parallel: 0,
        drain_operation_id: String::new(),
        taints: Vec::new(),
        overcommit: Default::default(),
        reserved: Resources::default(),
        failover_held: false,
        fencing: Default::default(),
        confirmed_down: false,
        conditions: Vec::new(),
        metadata: Default::default(),
        drivers: vec![DriverInfo {
            name: "fake".into(),
            instance_type: InstanceType::Vm,
            healthy: true,
            version: "1".into(),
            message: String::new(),
            capabilities: Vec::new(),
            images_are_local: false,
        }],
        images: Vec::new(),
        devices: Default::default(),
        agent_version: "1".into(),
        created_at: SystemTime::now(),
        registered_at: SystemTime::now(),
        revision: hv_store::Revision::default(),
    }
}

/// An instance that runs, of one of eight shapes.
fn instance_record(index: usize, nodes: usize) -> InstanceRecord {
    let shape = u32::try_from(index % 8).unwrap_or(0);
    let spec = hv_types::InstanceSpec {
        image: "tiny".into(),
        cpu_cores: 1 + shape % 2,
        memory_bytes: u64::from(shape + 1) << 27,
        ..Default::default()
    };
    let node: NodeId = node_id(index % nodes.max(1)).parse().expect("a valid id");
    InstanceRecord {
        binding: Some(hv_types::instance::Binding { node_id: node, release: false }),
        epoch: hv_types::Epoch(1),
        state: InstanceState::Running,
        state_reason: String::new(),
        observed_generation: 1,
        ip_address: format!("10.{}.{}.{}", index >> 16 & 255, index >> 8 & 255, index & 255),
        started_at: Some(SystemTime::now()),
        ..InstanceRecord::pending(
            InstanceId::generate(),
            &format!("seed-{index:07}-vm"),
            InstanceType::Vm,
            Arc::new(spec),
        )
    }
}
