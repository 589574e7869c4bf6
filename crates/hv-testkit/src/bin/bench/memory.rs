//! What an agent with many instances keeps in memory; the instances are the fake driver's, so that it is the agent's own.

use std::time::Duration;

use anyhow::{Context, Result};
use hv_proto::v1;
use hv_testkit::{AgentOptions, Cluster, ClusterOptions, Usage, create_request, until};
use serde_json::json;

use crate::report::{Bar, Row};

/// How many instances.
const INSTANCES: usize = 500;
/// The most in one call.
const PER_CALL: usize = 100;
/// How long the agent is left alone before its memory is read.
const IDLE: Duration = Duration::from_secs(20);
/// The bar.
const MOST_MIB: f64 = 60.0;

pub(crate) async fn measure() -> Result<Vec<Row>> {
    let mut cluster =
        Cluster::start(ClusterOptions { log_level: "warn", ..ClusterOptions::default() }).await?;
    let capacity = Some((4096, 1 << 42));
    let options = AgentOptions { drivers: vec!["fake"], capacity, ..AgentOptions::default() };
    let agent = cluster.add_agent(options).await?;
    cluster.until_ready(1).await?;
    let pid = cluster.agent(agent).context("the agent is gone")?.id();
    let before = Usage::of(pid)?.resident_bytes;
    let client = cluster.clients()?.compute();
    for call in 0..INSTANCES / PER_CALL {
        let template = Some(create_request(&format!("bench-{call}-x")));
        let request = v1::CreateInstancesRequest { template, count: u32::try_from(PER_CALL)? };
        client.clone().create_instances(request).await?;
    }
    until("all instances to run", async || {
        let request = v1::ListInstancesRequest { page_size: i32::try_from(INSTANCES)?, ..Default::default() };
        let listed = client.clone().list_instances(request).await?.into_inner().instances;
        let running = listed.iter().filter(|one| one.state() == v1::InstanceState::Running).count();
        Ok((running == INSTANCES).then_some(()))
    })
    .await?;
    tokio::time::sleep(IDLE).await;
    let usage = Usage::of(pid)?;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    Ok(vec![Row {
        measure: format!("agent's memory with {INSTANCES} instances"),
        unit: "MiB",
        bar: Some(Bar::Most(MOST_MIB)),
        measured: mib(usage.resident_bytes),
        baseline: Some(("without any".to_owned(), mib(before))),
        raw: json!({ "resident_bytes": usage.resident_bytes, "peak_bytes": usage.peak_bytes, "before": before }),
    }])
}
