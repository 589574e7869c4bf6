//! How many heartbeats one server takes in process, over the embedded store: `cargo run --release -p hv-cluster --example
//! heartbeats -- [nodes] [heartbeats each] [callers]`. Prints one line for the registrations, one for the heartbeats.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hv_cluster::nodes::Sign;
use hv_cluster::{Cluster, ClusterConfig};
use hv_proto::{convert, v1};
use hv_store::SharedStore;
use hv_store::embedded::{EmbeddedOptions, EmbeddedStore};
use hv_types::NodeId;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Processor time that this process has used, in seconds; only on Linux.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<_> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |n: usize| fields.get(n).and_then(|ticks| ticks.parse::<f64>().ok()).unwrap_or(f64::NAN);
    // proc(5): utime and stime, in ticks of 10 ms.
    (ticks(11) + ticks(12)) / 100.0
}

fn number(n: usize, usual: usize) -> usize {
    std::env::args().nth(n).and_then(|text| text.parse().ok()).unwrap_or(usual)
}

async fn register(cluster: &Arc<Cluster>, count: usize, callers: usize) -> Vec<NodeId> {
    let mut tasks = JoinSet::new();
    for caller in 0..callers {
        let cluster = cluster.clone();
        tasks.spawn(async move {
            let mut ids = Vec::new();
            for n in (caller..count).step_by(callers) {
                let room = v1::Resources { cpu_cores: 64, memory_bytes: 1 << 38, ..v1::Resources::default() };
                let request = v1::RegisterNodeRequest {
                    node_id: format!("node-{n:05}"),
                    hostname: format!("host-{n:05}"),
                    ip: "127.0.0.1".into(),
                    port: 1,
                    capacity: Some(room),
                    supported_instance_types: vec!["vm".into()],
                    ..v1::RegisterNodeRequest::default()
                };
                let node = convert::node_from_registration(request).expect("it is valid");
                ids.push(cluster.register_node(None, node).await.expect("it is registered").id);
            }
            ids
        });
    }
    tasks.join_all().await.concat()
}

#[tokio::main(worker_threads = 2)]
async fn main() {
    let (nodes, rounds, callers) = (number(1, 10_000), number(2, 20), number(3, 256));
    let dir = tempfile::tempdir().expect("a directory");
    let store: SharedStore =
        EmbeddedStore::open(dir.path(), EmbeddedOptions::default()).expect("the store opens");
    let config = ClusterConfig { heartbeat_timeout: Duration::from_secs(30), ..ClusterConfig::default() };
    let cluster = Cluster::open(store, config).await.expect("the cluster opens");
    let stop = CancellationToken::new();
    let follower = tokio::spawn({
        let (cluster, stop) = (cluster.clone(), stop.clone());
        async move { cluster.cache().run(stop).await }
    });

    let begin = Instant::now();
    let ids = register(&cluster, nodes, callers).await;
    let took = begin.elapsed().as_secs_f64();
    println!("{nodes} registrations in {took:.2} s: {:.0}/s", nodes as f64 / took);

    let (begin, cpu) = (Instant::now(), cpu_seconds());
    let mut tasks = JoinSet::new();
    for part in ids.chunks(ids.len().div_ceil(callers)) {
        let (cluster, part) = (cluster.clone(), part.to_vec());
        tasks.spawn(async move {
            let mut slowest = Duration::ZERO;
            for _ in 0..rounds {
                for id in &part {
                    let sent = Instant::now();
                    let usage = Some(v1::NodeUsage::default());
                    let sign = Sign { usage, ..Sign::default() };
                    let beat = cluster.heartbeat(None, id, sign).await.expect("it is answered");
                    assert!(beat.is_some(), "{id} was taken for lost");
                    slowest = slowest.max(sent.elapsed());
                }
            }
            slowest
        });
    }
    let slowest = tasks.join_all().await.into_iter().max().unwrap_or_default();
    let (took, cpu) = (begin.elapsed().as_secs_f64(), cpu_seconds() - cpu);
    let count = (nodes * rounds) as f64;
    let lost = cluster.cache().read(|state| state.nodes().filter(|(_, entry)| !entry.is_live()).count());
    println!(
        "{count:.0} heartbeats in {took:.2} s: {:.0}/s, {:.2} us of processor each, slowest {:.1} ms, {lost} nodes lost; \
         10,000 nodes every 10 s: {:.2} % of a core",
        count / took,
        cpu / count * 1e6,
        slowest.as_secs_f64() * 1e3,
        cpu / count * 1000.0 * 100.0
    );
    stop.cancel();
    follower.await.expect("it ends in order");
}
