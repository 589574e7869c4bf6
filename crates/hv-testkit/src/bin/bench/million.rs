//! A million instances: how soon a server is ready after a restart, and what they cost in memory.

use std::time::{Duration, Instant};

use anyhow::Result;
use hv_store::embedded::{EmbeddedOptions, EmbeddedStore};
use hv_store::keys::Keys;
use hv_store::{KeyRange, RangeRequest, Store as _};
use hv_testkit::{StoreKind, median};
use serde_json::json;

use crate::fleet::{NODES, Seed, Server, options};
use crate::report::{Bar, Row};

/// Instances that there are.
const INSTANCES: usize = 1_000_000;
/// Keys read at a time for the baseline.
const PAGE: usize = 10_000;
/// How often the server is restarted.
const RESTARTS: usize = 2;

pub(crate) async fn measure() -> Result<Vec<Row>> {
    let never = Duration::from_secs(3600);
    let only_nodes = {
        let seed = Seed { nodes: NODES, instances: 0 };
        let (mut server, _) = Server::start_seeded(options(StoreKind::Embedded, never), seed).await?;
        server.usage()?.resident_bytes
    };
    let seed = Seed { nodes: NODES, instances: INSTANCES };
    let (mut server, seeded) = Server::start_seeded(options(StoreKind::Embedded, never), seed).await?;
    let mut ready = Vec::new();
    for _ in 0..RESTARTS {
        server.restart().await?;
        ready.push(server.ready_after.as_secs_f64());
    }
    let usage = server.usage()?;
    let first = first_answer(&server).await?;
    let (reading, bytes) = read_all(&mut server).await?;
    let each = usage.resident_bytes.saturating_sub(only_nodes) as f64 / INSTANCES as f64;
    Ok(vec![
        Row {
            measure: format!("restart with {INSTANCES} instances on {NODES} nodes, until ready"),
            unit: "s",
            bar: Some(Bar::Most(60.0)),
            measured: median(&ready),
            baseline: Some(("opening the store and reading its records".into(), reading)),
            raw: json!({
                "restarts_s": ready, "first_page_after_s": first, "seeded_in_s": seeded.as_secs_f64(),
                "seeded": "records written straight into the embedded store before the server started",
            }),
        },
        Row {
            measure: format!("server's memory with {INSTANCES} instances on {NODES} nodes, peak"),
            unit: "GiB",
            bar: Some(Bar::Most(3.0)),
            measured: usage.peak_bytes as f64 / f64::from(1 << 30),
            baseline: Some(("their records as stored".into(), bytes as f64 / f64::from(1 << 30))),
            raw: json!({ "peak_bytes": usage.peak_bytes, "resident_bytes": usage.resident_bytes }),
        },
        Row {
            measure: "server's memory for each instance".into(),
            unit: "KiB",
            bar: Some(Bar::Most(1.5)),
            measured: each / 1024.0,
            baseline: Some(("its record as stored".into(), bytes as f64 / INSTANCES as f64 / 1024.0)),
            raw: json!({ "with_nodes_alone_bytes": only_nodes, "with_all_bytes": usage.resident_bytes }),
        },
    ])
}

/// Seconds that the first page takes.
async fn first_answer(server: &Server) -> Result<f64> {
    let begin = Instant::now();
    let request = hv_proto::v1::ListInstancesRequest { page_size: 500, ..Default::default() };
    server.client()?.compute().list_instances(request).await?;
    Ok(begin.elapsed().as_secs_f64())
}

/// Ends the server and reads its store: seconds, and bytes of the instances' records.
async fn read_all(server: &mut Server) -> Result<(f64, usize)> {
    if let Some(process) = server.cluster.server() {
        process.kill()?;
    }
    let begin = Instant::now();
    let store = EmbeddedStore::open(&server.cluster.server_dir(0).join("store"), EmbeddedOptions::default())?;
    let prefix = Keys::default().instances();
    let mut end = prefix.to_vec();
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    let (mut from, mut bytes) = (prefix, 0);
    loop {
        let keys = KeyRange::Between(from.clone(), end.clone().into());
        let page = store.range(RangeRequest { keys, limit: PAGE, at: None, keys_only: false }).await?;
        bytes += page.kvs.iter().map(|kv| kv.key.len() + kv.value.len()).sum::<usize>();
        match page.kvs.last() {
            Some(last) if page.more => from = [&last.key[..], &[0]].concat().into(),
            _ => break,
        }
    }
    let taken = begin.elapsed().as_secs_f64();
    store.close().await;
    Ok((taken, bytes))
}
