//! Heartbeats: how many the server takes, and what those of 10,000 nodes cost.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hv_client::Clients;
use hv_proto::v1;
use hv_testkit::{StoreKind, Usage};
use serde_json::json;
use tokio::task::JoinSet;

use crate::fleet::{NODES, Server, node_id, options, register};
use crate::report::{Bar, Row};

/// How long a node lives without a heartbeat, as configured by default.
const TIMEOUT: Duration = Duration::from_secs(30);
/// How often a node sends one, as configured by default.
const INTERVAL: Duration = Duration::from_secs(10);
/// For how long as many are sent as are taken.
const FLOOD: Duration = Duration::from_secs(10);
/// Heartbeats on their way at once in the flood.
const IN_FLIGHT: usize = 256;
/// For how long the nodes send at their own pace.
const PACED: Duration = Duration::from_secs(20);
/// How often it is looked whether all nodes are ready.
const LOOK: Duration = Duration::from_millis(500);

pub(crate) async fn measure() -> Result<Vec<Row>> {
    let mut server = Server::start(options(StoreKind::Embedded, TIMEOUT)).await?;
    let empty = server.usage()?;
    let clients = server.clients()?;
    let registered = register(&clients, NODES).await?;
    let full = server.usage()?;
    let flood = flood(&mut server, &clients).await?;
    let paced = paced(&mut server).await?;
    let per_second = NODES as f64 / INTERVAL.as_secs_f64();
    let per_node = full.resident_bytes.saturating_sub(empty.resident_bytes) as f64 / NODES as f64;
    Ok(vec![
        Row {
            measure: format!("heartbeats of {NODES} nodes, as many as are taken, no false NOT_READY"),
            unit: "/s",
            bar: Some(Bar::Least(20_000.0)),
            measured: if flood.false_alarms == 0 { flood.per_second } else { 0.0 },
            baseline: Some(("empty calls from the same clients".into(), flood.empty_per_second)),
            raw: json!({
                "false_not_ready": flood.false_alarms, "per_second": flood.per_second,
                "server_cpu_us_each": flood.server_us, "generator_cpu_us_each": flood.generator_us,
                "per_second_of_server_cpu": 1e6 / flood.server_us,
                "registered_per_second": NODES as f64 / registered.as_secs_f64(),
            }),
        },
        Row {
            measure: format!(
                "server's CPU for {NODES} nodes with a heartbeat every {} s",
                INTERVAL.as_secs()
            ),
            unit: "% of a core",
            bar: Some(Bar::Most(10.0)),
            measured: paced.busy_percent,
            baseline: Some(("as many empty calls".into(), flood.empty_us * per_second / 1e6 * 100.0)),
            raw: json!({
                "silent_percent": paced.silent_percent,
                "connections": paced.connections, "assignment_streams": paced.connections,
                "heartbeats": paced.sent, "false_not_ready": paced.false_alarms, "seconds": PACED.as_secs(),
                "resident_with_connections_mib": paced.resident_bytes as f64 / f64::from(1 << 20),
            }),
        },
        Row {
            measure: "server's memory for each node, registered over gRPC".into(),
            unit: "KiB",
            bar: Some(Bar::Most(8.0)),
            measured: per_node / 1024.0,
            baseline: None,
            raw: json!({ "empty_bytes": empty.resident_bytes, "full_bytes": full.resident_bytes, "nodes": NODES }),
        },
    ])
}

struct Flood {
    per_second: f64,
    empty_per_second: f64,
    empty_us: f64,
    server_us: f64,
    generator_us: f64,
    false_alarms: usize,
}

async fn flood(server: &mut Server, clients: &[Clients]) -> Result<Flood> {
    let idle = server.usage()?.cpu;
    let (empty_per_second, calls) = hammer(clients, FLOOD / 4, |client, _| async move {
        let request = v1::GetInstanceRequest { instance_id: "none".into() };
        ensure!(
            client.compute().get_instance(request).await.is_err(),
            "an instance that does not exist was found"
        );
        Ok(())
    })
    .await?;
    let empty_us = (server.usage()?.cpu - idle).as_secs_f64() * 1e6 / calls as f64;
    let watch = Alarm::start(server.client()?);
    let (server_before, own_before) = (server.usage()?.cpu, Usage::own()?.cpu);
    let (per_second, sent) =
        hammer(clients, FLOOD, |client, index| async move { beat(&client, index % NODES).await }).await?;
    let server_us = (server.usage()?.cpu - server_before).as_secs_f64() * 1e6 / sent as f64;
    let generator_us = (Usage::own()?.cpu - own_before).as_secs_f64() * 1e6 / sent as f64;
    let false_alarms = watch.stop().await?;
    Ok(Flood { per_second, empty_per_second, empty_us, server_us, generator_us, false_alarms })
}

/// Keeps so many calls on their way; calls per second, and how many there were.
async fn hammer<F>(
    clients: &[Clients],
    time: Duration,
    call: impl Fn(Clients, usize) -> F + Send + Sync + 'static,
) -> Result<(f64, u64)>
where
    F: Future<Output = Result<()>> + Send,
{
    let call = Arc::new(call);
    let next = Arc::new(AtomicUsize::new(0));
    let begin = Instant::now();
    let mut tasks = JoinSet::new();
    for worker in 0..IN_FLIGHT {
        let (client, call, next) = (clients[worker % clients.len()].clone(), call.clone(), next.clone());
        tasks.spawn(async move {
            let mut done = 0u64;
            while begin.elapsed() < time {
                call(client.clone(), next.fetch_add(1, Ordering::Relaxed)).await?;
                done += 1;
            }
            anyhow::Ok(done)
        });
    }
    let mut done = 0;
    while let Some(worker) = tasks.join_next().await {
        done += worker??;
    }
    Ok((done as f64 / begin.elapsed().as_secs_f64(), done))
}

async fn beat(client: &Clients, node: usize) -> Result<()> {
    let request = v1::HeartbeatRequest { node_id: node_id(node), ..v1::HeartbeatRequest::default() };
    let answer = client.cluster().heartbeat(request).await?.into_inner();
    ensure!(answer.accepted, "a heartbeat of node {node} was not accepted");
    Ok(())
}

/// Looks all the time whether all nodes are ready.
struct Alarm {
    stop: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<Result<usize>>,
}

impl Alarm {
    fn start(client: Clients) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            let mut worst = 0;
            while !stopped.load(Ordering::Relaxed) {
                let info = client.cluster().get_cluster_info(hv_proto::Empty {}).await?.into_inner();
                worst = worst.max(NODES.saturating_sub(usize::try_from(info.ready_nodes)?));
                tokio::time::sleep(LOOK).await;
            }
            Ok(worst)
        });
        Self { stop, task }
    }

    /// The most nodes that were not ready at once.
    async fn stop(self) -> Result<usize> {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await?
    }
}

struct Paced {
    busy_percent: f64,
    silent_percent: f64,
    sent: u64,
    connections: usize,
    resident_bytes: u64,
    false_alarms: usize,
}

/// Every node over a connection of its own, with its stream of assignments, at its own pace.
async fn paced(server: &mut Server) -> Result<Paced> {
    let info = server.client()?.cluster().get_cluster_info(hv_proto::Empty {}).await?.into_inner();
    let cluster_id: Arc<str> = info.cluster_id.into();
    let sent = Arc::new(AtomicU64::new(0));
    let beating = Arc::new(AtomicBool::new(false));
    let connected = Arc::new(AtomicUsize::new(0));
    let mut tasks = JoinSet::new();
    for node in 0..NODES {
        let client = server.client()?;
        let shared = (sent.clone(), beating.clone(), connected.clone(), cluster_id.clone());
        tasks.spawn(async move { one_node(client, node, &shared.3, &shared.0, &shared.1, &shared.2).await });
        // Ten thousand connections at the same instant are more than a listener's backlog.
        while node.saturating_sub(connected.load(Ordering::Relaxed)) > 256 {
            if let Some(ended) = tasks.try_join_next() {
                ended?.context("a node gave up")?;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    while connected.load(Ordering::Relaxed) < NODES {
        if let Some(ended) = tasks.try_join_next() {
            ended?.context("a node gave up")?;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let silent_percent = busy(server, PACED / 4).await?;
    let alarm = Alarm::start(server.client()?);
    beating.store(true, Ordering::Relaxed);
    // The first round of heartbeats spreads the nodes over the interval.
    tokio::time::sleep(INTERVAL / 2).await;
    let before = sent.load(Ordering::Relaxed);
    let busy_percent = busy(server, PACED).await?;
    let heartbeats = sent.load(Ordering::Relaxed) - before;
    let expected = NODES as u64 * PACED.as_secs() / INTERVAL.as_secs();
    ensure!(heartbeats * 10 >= expected * 9, "only {heartbeats} of {expected} heartbeats were sent");
    let false_alarms = alarm.stop().await?;
    let resident_bytes = server.usage()?.resident_bytes;
    ensure!(tasks.try_join_next().is_none(), "a node gave up");
    Ok(Paced {
        busy_percent,
        silent_percent,
        sent: heartbeats,
        connections: NODES,
        resident_bytes,
        false_alarms,
    })
}

/// What the server uses for a while, in percent of a core.
async fn busy(server: &mut Server, time: Duration) -> Result<f64> {
    let (before, begin) = (server.usage()?.cpu, Instant::now());
    tokio::time::sleep(time).await;
    Ok((server.usage()?.cpu - before).as_secs_f64() / begin.elapsed().as_secs_f64() * 100.0)
}

async fn one_node(
    client: Clients,
    node: usize,
    cluster_id: &str,
    sent: &AtomicU64,
    beating: &AtomicBool,
    connected: &AtomicUsize,
) -> Result<()> {
    let request = v1::WatchAssignmentsRequest { node_id: node_id(node), cluster_id: cluster_id.into() };
    let mut assignments = client.assignment().watch_assignments(request).await?.into_inner();
    assignments.message().await?.context("no assignments")?;
    beat(&client, node).await?;
    connected.fetch_add(1, Ordering::Relaxed);
    // Nodes come up at different times; here they are spread evenly.
    let offset = INTERVAL.mul_f64(node as f64 / NODES as f64);
    let mut tick = tokio::time::interval_at(tokio::time::Instant::now() + offset, INTERVAL);
    loop {
        tokio::select! {
            _ = tick.tick() => {
                if beating.load(Ordering::Relaxed) {
                    beat(&client, node).await?;
                    sent.fetch_add(1, Ordering::Relaxed);
                }
            }
            message = assignments.message() => {
                message?.context("the stream of assignments ended")?;
            }
        }
    }
}
