//! Durable placements per second: creates through the cluster logic, without gRPC, until their bindings are committed.
//!
//! `cargo run --release -p hv-cluster --example placements -- [--etcd] [--count 1|100] [--clients N] [--seconds N] [--keys]`

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use hv_cluster::{Cluster, ClusterConfig, Election, Mutation};
use hv_proto::store::NodeLease;
use hv_proto::{convert, v1};
use hv_store::conformance::etcd_server::{EtcdServer, EtcdVersion};
use hv_store::embedded::{EmbeddedOptions, EmbeddedStore};
use hv_store::etcd::EtcdStore;
use hv_store::keys::Keys;
use hv_store::record::{Record, encode_message};
use hv_store::{Op, SharedStore, StoreExt, Txn};
use hv_types::{InstanceRecord, RequestKey};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

const NODES: usize = 10_000;
const CORES: i32 = 128;
const ROUNDS: usize = 3;
const NODES_PER_TXN: usize = 50;

struct Arguments {
    etcd: bool,
    count: usize,
    clients: usize,
    seconds: u64,
    keys: bool,
}

fn arguments() -> Arguments {
    let mut found = Arguments { etcd: false, count: 100, clients: 0, seconds: 5, keys: false };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut number = || words.next().and_then(|word| word.parse::<u64>().ok()).expect("a number");
        match word.as_str() {
            "--etcd" => found.etcd = true,
            "--keys" => found.keys = true,
            "--count" => found.count = usize::try_from(number()).expect("a count"),
            "--clients" => found.clients = usize::try_from(number()).expect("a count"),
            "--seconds" => found.seconds = number(),
            other => panic!("unknown argument {other}"),
        }
    }
    if found.clients == 0 {
        found.clients = if found.count == 1 { 64 } else { 16 };
    }
    found
}

#[tokio::main]
async fn main() {
    let arguments = arguments();
    let dir = tempfile::tempdir().expect("a directory");
    let etcd = if arguments.etcd { EtcdServer::start(EtcdVersion::V3_5).await } else { None };
    let store: SharedStore = match &etcd {
        Some(etcd) => EtcdStore::connect(etcd.options()).await.expect("etcd"),
        None => EmbeddedStore::open(dir.path(), EmbeddedOptions::default()).expect("a store"),
    };
    let puts = single_puts(&store).await;
    println!("single puts from 64 clients: {puts:.0}/s");
    let config = ClusterConfig::default();
    let cluster = Cluster::open(store.clone(), config.clone()).await.expect("a cluster");
    add_nodes(&store, cluster.keys()).await;
    let stop = CancellationToken::new();
    let mut parts = JoinSet::new();
    let election = Election::new(
        store.clone(),
        cluster.keys().leader("scheduler"),
        &config.server_id,
        config.leader_ttl,
    );
    let (c, t) = (cluster.clone(), stop.clone());
    parts.spawn(async move { c.cache().run(t).await });
    let (e, t) = (election.clone(), stop.clone());
    parts.spawn(async move { e.run(t).await });
    let (c, l, t) = (cluster.clone(), election.leadership(), stop.clone());
    parts.spawn(async move { c.run_placer(l, t).await });
    let (c, t) = (cluster.clone(), stop.clone());
    parts.spawn(async move { c.events().run(c.cache(), t).await });
    until_placing(&cluster).await;

    let mut rates = Vec::new();
    let mut costs = Vec::new();
    for round in 0..ROUNDS {
        let (begin, before) = (Instant::now(), cpu_seconds());
        let rate = measure(&cluster, &arguments, round).await;
        costs.push((cpu_seconds() - before) * 1e6 / (rate * begin.elapsed().as_secs_f64()));
        rates.push(rate);
    }
    costs.sort_by(f64::total_cmp);
    rates.sort_by(f64::total_cmp);
    let median = rates[ROUNDS / 2];
    println!(
        "{} placements/s (median of {ROUNDS}; {} clients, {} to a call), {:.2} x single puts; all: {rates:.0?}",
        median.round(),
        arguments.clients,
        arguments.count,
        median / puts
    );
    println!("{:.0} us of CPU for each, clients and embedded store included", costs[ROUNDS / 2]);
    stop.cancel();
    while parts.join_next().await.is_some() {}
}

/// What this process has used so far; 0 where the system does not say.
fn cpu_seconds() -> f64 {
    const TICKS_PER_SECOND: f64 = 100.0;
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let fields = after_name.split_whitespace().skip(11).take(2);
    fields.filter_map(|field| field.parse::<f64>().ok()).sum::<f64>() / TICKS_PER_SECOND
}

async fn single_puts(store: &SharedStore) -> f64 {
    const CLIENTS: u64 = 64;
    const TIME: Duration = Duration::from_secs(3);
    let done = Arc::new(AtomicU64::new(0));
    let begin = Instant::now();
    let mut clients = JoinSet::new();
    for client in 0..CLIENTS {
        let (store, done) = (store.clone(), done.clone());
        clients.spawn(async move {
            let value = bytes::Bytes::from(vec![b'x'; 256]);
            let mut number = 0u64;
            while begin.elapsed() < TIME {
                store.put(format!("/bench/{client}/{number}"), value.clone()).await.expect("a put");
                number += 1;
                done.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    while clients.join_next().await.is_some() {}
    done.load(Ordering::Relaxed) as f64 / begin.elapsed().as_secs_f64()
}

async fn add_nodes(store: &SharedStore, keys: &Keys) {
    let lease = store.lease_grant(Duration::from_secs(3600)).await.expect("a lease");
    for first in (0..NODES).step_by(NODES_PER_TXN) {
        let mut txn = Txn::default();
        for number in first..first + NODES_PER_TXN {
            let room =
                v1::Resources { cpu_cores: CORES, memory_bytes: 1 << 40, disk_bytes: 1 << 40, gpu_count: 0 };
            let mut record = convert::node_from_registration(v1::RegisterNodeRequest {
                node_id: format!("node-{number:05}"),
                hostname: format!("host-{number:05}"),
                ip: "127.0.0.1".into(),
                port: 1,
                capacity: Some(room),
                zone: format!("zone-{}", number % 3),
                supported_instance_types: vec!["vm".into(), "container".into()],
                ..v1::RegisterNodeRequest::default()
            })
            .expect("a node");
            record.created_at = SystemTime::now();
            let id =
                if record.id.as_str().is_empty() { panic!("a node without id") } else { record.id.clone() };
            txn.then.push(Op::put(keys.node(&id), record.encode()));
            let value =
                NodeLease { schema: convert::RECORD_SCHEMA, lease_id: lease.0, ..NodeLease::default() };
            txn.then.push(Op::put_leased(keys.node_lease(&id), encode_message(&value), lease));
        }
        store.txn(txn).await.expect("nodes");
    }
}

fn asked(name: String) -> InstanceRecord {
    convert::create_request_from(v1::CreateInstanceRequest {
        name,
        r#type: v1::InstanceType::Container.into(),
        spec: Some(v1::InstanceSpec {
            image: "tiny".into(),
            cpu_cores: 1,
            memory_bytes: 64 << 20,
            ..v1::InstanceSpec::default()
        }),
        ..v1::CreateInstanceRequest::default()
    })
    .expect("a record")
}

/// Waits until this server leads and binds what is created.
async fn until_placing(cluster: &Arc<Cluster>) {
    for number in 0.. {
        let once = Mutation::once("warm up");
        let done = cluster.create_instance(&once, asked(format!("warm{number}"))).await.expect("an instance");
        if !done.reply.node_id.is_empty() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn measure(cluster: &Arc<Cluster>, arguments: &Arguments, round: usize) -> f64 {
    let bound = Arc::new(AtomicU64::new(0));
    let begin = Instant::now();
    let time = Duration::from_secs(arguments.seconds);
    let mut clients = JoinSet::new();
    for client in 0..arguments.clients {
        let (cluster, bound, count, keys) = (cluster.clone(), bound.clone(), arguments.count, arguments.keys);
        clients.spawn(async move {
            let mut number = 0;
            while begin.elapsed() < time {
                number += 1;
                let key = keys.then(RequestKey::generate);
                let mutation = Mutation { method: "create", key, digest: vec![1; 32] };
                let record = asked(format!("r{round}c{client}n{number}"));
                let nodes = if count == 1 {
                    let done = cluster.create_instance(&mutation, record).await.expect("an instance");
                    u64::from(!done.reply.node_id.is_empty())
                } else {
                    let done = cluster.create_instances(&mutation, record, count).await.expect("a set");
                    done.reply.instances.iter().filter(|made| !made.node_id.is_empty()).count() as u64
                };
                bound.fetch_add(nodes, Ordering::Relaxed);
            }
        });
    }
    while clients.join_next().await.is_some() {}
    bound.load(Ordering::Relaxed) as f64 / begin.elapsed().as_secs_f64()
}
