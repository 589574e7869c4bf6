//! Durable placements: from the call of the create to the committed binding.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use hv_client::Clients;
use hv_proto::v1;
use hv_store::embedded::{EmbeddedOptions, EmbeddedStore};
use hv_store::etcd::{EtcdOptions, EtcdStore};
use hv_store::{SharedStore, StoreExt as _};
use hv_testkit::{Etcd, StoreKind, Usage, median, percentile};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::fleet::{NODES, Server, instance, options, register, scratch};
use crate::report::{Bar, Row};

/// Instances asked for in one call.
const PER_CALL: u32 = 100;
/// Calls of [`PER_CALL`] on their way at once.
const SETS_IN_FLIGHT: usize = 8;
/// Clients that ask for one at a time, and that write the baseline.
const SINGLES_IN_FLIGHT: usize = 64;
/// For how long is asked.
const TIME: Duration = Duration::from_secs(8);
/// For how long the baseline is written, in rounds around the measurements.
const BASELINE_TIME: Duration = Duration::from_secs(3);
/// How large a value of the baseline is: about that of an instance's record.
const VALUE_BYTES: usize = 350;
/// How long the last may take to be bound.
const BOUND: Duration = Duration::from_secs(60);
/// Nodes must not lose their leases while all cores are busy with creates.
const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(3600);

pub(crate) async fn embedded() -> Result<Vec<Row>> {
    let dir = tempfile::tempdir_in(scratch())?;
    let store: SharedStore = EmbeddedStore::open(dir.path(), EmbeddedOptions::default())?;
    let bars = [Bar::Least(20_000.0), Bar::Least(5_000.0)];
    on("embedded", StoreKind::Embedded, &store, bars).await
}

pub(crate) async fn etcd() -> Result<Vec<Row>> {
    let etcd =
        Etcd::start_alone(&scratch()).await?.context("there is no etcd: run hack/setup.sh packages")?;
    let store: SharedStore =
        EtcdStore::connect(EtcdOptions { endpoints: etcd.endpoints(), ..EtcdOptions::default() }).await?;
    let kind = StoreKind::Etcd { endpoints: etcd.endpoints(), prefix: "/bench".into() };
    on("etcd", kind, &store, [Bar::TimesAtLeast(4.0), Bar::TimesAtLeast(1.0)]).await
}

async fn on(name: &str, kind: StoreKind, store: &SharedStore, bars: [Bar; 2]) -> Result<Vec<Row>> {
    let mut puts = vec![single_puts(store).await?];
    let mut server = Server::start(options(kind, HEARTBEAT_TIMEOUT)).await?;
    let clients = server.clients()?;
    register(&clients, NODES).await?;
    let sets = load(&mut server, &clients, SETS_IN_FLIGHT, PER_CALL).await?;
    puts.push(single_puts(store).await?);
    let singles = load(&mut server, &clients, SINGLES_IN_FLIGHT, 1).await?;
    puts.push(single_puts(store).await?);
    let baseline = || Some(("single puts, 64 clients".to_owned(), median(&puts)));
    let row = |measure: String, bar, run: Load| Row {
        measure,
        unit: "/s",
        bar: Some(bar),
        measured: run.per_second,
        baseline: baseline(),
        raw: {
            let mut raw = run.raw;
            raw["single_puts_per_second"] = json!(puts);
            raw
        },
    };
    Ok(vec![
        row(format!("durable placements, {name}, {NODES} nodes, {PER_CALL} to a call"), bars[0], sets),
        row(
            format!("durable placements, {name}, {NODES} nodes, one to a call, 64 clients"),
            bars[1],
            singles,
        ),
    ])
}

struct Load {
    per_second: f64,
    raw: Value,
}

/// Asks for instances for a while, then waits until the last of them is bound.
async fn load(server: &mut Server, clients: &[Clients], in_flight: usize, per_call: u32) -> Result<Load> {
    let (server_before, own_before) = (server.usage()?.cpu, Usage::own()?.cpu);
    let begin = Instant::now();
    let (next, stop) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let mut tasks = JoinSet::new();
    for worker in 0..in_flight {
        let client = clients[worker % clients.len()].clone();
        tasks.spawn(ask(client, per_call, next.clone(), stop.clone()));
    }
    tokio::time::sleep(TIME).await;
    stop.store(true, Ordering::Relaxed);
    let (mut created, mut bound_at_once, mut answers) = (0usize, 0usize, Vec::new());
    while let Some(done) = tasks.join_next().await {
        let done = done??;
        created += done.created;
        bound_at_once += done.bound;
        answers.extend(done.answers);
    }
    until_all_bound(clients).await?;
    let elapsed = begin.elapsed().as_secs_f64();
    let server_cpu = (server.usage()?.cpu - server_before).as_secs_f64();
    let generator_cpu = (Usage::own()?.cpu - own_before).as_secs_f64();
    Ok(Load {
        per_second: created as f64 / elapsed,
        raw: json!({
            "created": created, "bound_in_the_answer": bound_at_once, "seconds_until_the_last_was_bound": elapsed,
            "asked_for_seconds": TIME.as_secs_f64(), "calls": answers.len(),
            "answer_p50_ms": median(&answers), "answer_p99_ms": percentile(&answers, 99.0),
            "server_cpu_s": server_cpu, "generator_cpu_s": generator_cpu,
            "server_cpu_us_each": server_cpu * 1e6 / created as f64,
            "generator_cpu_us_each": generator_cpu * 1e6 / created as f64,
        }),
    })
}

#[derive(Default)]
struct Asked {
    created: usize,
    bound: usize,
    answers: Vec<f64>,
}

async fn ask(client: Clients, per_call: u32, next: Arc<AtomicUsize>, stop: Arc<AtomicBool>) -> Result<Asked> {
    let mut client = client.compute();
    let mut asked = Asked::default();
    while !stop.load(Ordering::Relaxed) {
        let number = next.fetch_add(1, Ordering::Relaxed);
        let name = format!("bench{per_call}-{number}-x");
        let begin = Instant::now();
        if per_call == 1 {
            let created = client.create_instance(instance(name, "bench")).await?.into_inner();
            asked.bound += usize::from(!created.node_id.is_empty());
            asked.created += 1;
        } else {
            let template = Some(instance(name, "bench"));
            let request = v1::CreateInstancesRequest { template, count: per_call };
            let set = client.create_instances(request).await?.into_inner().instances;
            asked.bound += set.iter().filter(|instance| !instance.node_id.is_empty()).count();
            asked.created += set.len();
        }
        asked.answers.push(begin.elapsed().as_secs_f64() * 1000.0);
    }
    Ok(asked)
}

async fn until_all_bound(clients: &[Clients]) -> Result<()> {
    let begin = Instant::now();
    loop {
        let info = clients[0].cluster().get_cluster_info(hv_proto::Empty {}).await?.into_inner();
        if info.pending_instances == 0 {
            return Ok(());
        }
        ensure!(
            begin.elapsed() < BOUND,
            "{} instances are not bound after {BOUND:?}",
            info.pending_instances
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// What the store alone takes: single puts of a record's size, each durable before the next.
async fn single_puts(store: &SharedStore) -> Result<f64> {
    let begin = Instant::now();
    let value = Bytes::from(vec![b'x'; VALUE_BYTES]);
    let mut tasks = JoinSet::new();
    for client in 0..SINGLES_IN_FLIGHT {
        let (store, value) = (store.clone(), value.clone());
        tasks.spawn(async move {
            let mut done = 0u64;
            while begin.elapsed() < BASELINE_TIME {
                store.put(format!("/baseline/{client}/{done}"), value.clone()).await?;
                done += 1;
            }
            anyhow::Ok(done)
        });
    }
    let mut done = 0;
    while let Some(client) = tasks.join_next().await {
        done += client??;
    }
    Ok(done as f64 / begin.elapsed().as_secs_f64())
}
