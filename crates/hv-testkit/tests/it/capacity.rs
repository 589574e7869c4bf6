//! Many at once: nothing is overcommitted, nothing is lost, nothing is made twice.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, ensure};
use futures::future::try_join_all;
use hv_client::ComputeClient;
use hv_proto::v1;
use hv_store::conformance::etcd_server::EtcdVersion;
use hv_testkit::{AgentOptions, Ask, Cluster, create_request, until};

use crate::stores::TestStore;

/// Cores of each node, all of which instances of one core use up.
const CORES: usize = 50;
const NODES: usize = 3;
const FIT: usize = CORES * NODES;
const ASKED: usize = 200;

#[tokio::test(flavor = "multi_thread")]
async fn as_many_run_as_fit_on_the_embedded_store() -> Result<()> {
    as_many_as_fit(TestStore::embedded()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn as_many_run_as_fit_on_etcd_3_4() -> Result<()> {
    match TestStore::etcd(EtcdVersion::V3_4).await {
        Some(store) => as_many_as_fit(store).await,
        None => Ok(()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn as_many_run_as_fit_on_etcd_3_5() -> Result<()> {
    match TestStore::etcd(EtcdVersion::V3_5).await {
        Some(store) => as_many_as_fit(store).await,
        None => Ok(()),
    }
}

async fn as_many_as_fit(store: TestStore) -> Result<()> {
    let mut cluster = Cluster::start(store.options()).await?;
    for _ in 0..NODES {
        let capacity = Some((u32::try_from(CORES)?, 1 << 40));
        cluster
            .add_agent(AgentOptions { drivers: vec!["fake"], capacity, ..AgentOptions::default() })
            .await?;
    }
    cluster.until_ready(i32::try_from(NODES)?).await?;
    let outcome = fill_and_free(&cluster).await;
    outcome.map_err(|error| error.context(cluster.logs()))
}

async fn fill_and_free(cluster: &Cluster) -> Result<()> {
    let client = cluster.clients()?.compute();
    let creates = (0..ASKED).map(|i| {
        let mut client = client.clone();
        async move { client.create_instance(create_request(&format!("vm-{i}"))).await }
    });
    try_join_all(creates).await.context("a create failed")?;

    let instances = until_counts(&client, FIT, ASKED - FIT).await?;
    check_nodes(&instances)?;
    for waiting in instances.iter().filter(|instance| instance.state() == v1::InstanceState::Pending) {
        let reason = &waiting.state_reason;
        ensure!(
            reason.starts_with("none of 3 nodes can take it: 3 with fewer than 1 free cores"),
            "reason: {reason}"
        );
    }

    // Freeing room starts the rest; nothing else is asked for.
    let running: Vec<_> = instances.iter().filter(|i| i.state() == v1::InstanceState::Running).collect();
    for instance in running.iter().take(ASKED - FIT) {
        Ask::Delete.send(&client, &instance.id, &format!("delete-{}", instance.id)).await?;
    }
    let instances = until_counts(&client, FIT, 0).await?;
    check_nodes(&instances)
}

/// Waits until so many run and so many wait, and there are no others.
async fn until_counts(client: &ComputeClient, running: usize, pending: usize) -> Result<Vec<v1::Instance>> {
    let mut last = BTreeMap::new();
    let what = format!("{running} to run and {pending} to wait");
    let seen = until(&what, async || {
        let request = v1::ListInstancesRequest { page_size: 1000, ..v1::ListInstancesRequest::default() };
        let instances = client.clone().list_instances(request).await?.into_inner().instances;
        last.clear();
        for instance in &instances {
            *last.entry(instance.state().as_str_name()).or_insert(0) += 1;
        }
        let count = |state: v1::InstanceState| last.get(state.as_str_name()).copied().unwrap_or(0);
        let as_wanted = count(v1::InstanceState::Running) == running
            && count(v1::InstanceState::Pending) == pending
            && instances.len() == running + pending;
        Ok(as_wanted.then_some(instances))
    });
    seen.await.map_err(|error| error.context(format!("last seen {last:?}")))
}

fn check_nodes(instances: &[v1::Instance]) -> Result<()> {
    let mut used = BTreeMap::new();
    for instance in instances.iter().filter(|instance| !instance.node_id.is_empty()) {
        *used.entry(&instance.node_id).or_insert(0) += 1;
    }
    ensure!(used.len() == NODES && used.values().all(|count| *count == CORES), "nodes hold {used:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn one_request_key_makes_one_instance_and_one_answer() -> Result<()> {
    let cluster = Cluster::start(TestStore::embedded().options()).await?;
    let client = cluster.clients()?.compute();
    let calls = (0..100).map(|_| {
        let mut client = client.clone();
        let request = v1::CreateInstanceRequest { request_key: "once".into(), ..create_request("web") };
        async move { client.create_instance(request).await.map(tonic::Response::into_inner) }
    });
    let answers: BTreeSet<String> =
        try_join_all(calls).await?.iter().map(serde_json::to_string).collect::<Result<_, _>>()?;
    ensure!(answers.len() == 1, "there are {} answers", answers.len());
    let listed = client.clone().list_instances(v1::ListInstancesRequest::default()).await?.into_inner();
    ensure!(listed.total_count == 1, "there are {} instances", listed.total_count);
    Ok(())
}
