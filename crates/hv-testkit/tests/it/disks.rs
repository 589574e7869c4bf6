//! Disks that are full, of an agent and of a server with the embedded store; and one that is slow.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hv_client::ComputeClient;
use hv_proto::v1;
use hv_testkit::chaos::Shim;
use hv_testkit::{
    AgentOptions, Ask, Cluster, ClusterOptions, SmallDisk, create_request, skip, until, until_gone,
    until_settled,
};
use tonic::Code;

const SUITE: &str = "hv-testkit disks";
/// Enough for an agent's journal many times over.
const AGENT_DISK_BYTES: u64 = 16 << 20;
/// More than the embedded store keeps free for itself.
const SERVER_DISK_BYTES: u64 = 512 << 20;
/// How long each flush takes on a slow disk.
const SLOW: Duration = Duration::from_millis(500);

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_whose_disk_is_full_loses_nothing_and_goes_on_when_there_is_room() -> Result<()> {
    let Some(disk) = SmallDisk::create(SUITE, AGENT_DISK_BYTES)? else { return Ok(()) };
    let mut cluster = Cluster::start(ClusterOptions::default()).await?;
    let options = AgentOptions {
        drivers: vec!["fake"],
        capacity: Some((8, 8 << 30)),
        state_dir: Some(disk.path().join("agent")),
        ..AgentOptions::default()
    };
    cluster.add_agent(options).await?;
    cluster.until_ready(1).await?;
    let client = cluster.clients()?.compute();
    let before = client.clone().create_instance(create_request("before")).await?.into_inner().id;
    until_settled(&client, &before, v1::InstanceState::Running).await?;

    disk.fill(0)?;
    let during = client.clone().create_instance(create_request("during")).await?.into_inner().id;
    let request = v1::GetInstanceRequest { instance_id: during.clone() };
    until("the agent to say that it cannot", async || {
        let instance = client.clone().get_instance(request.clone()).await?.into_inner();
        ensure!(instance.state() != v1::InstanceState::Running, "it runs although nothing could be written");
        Ok((!instance.state_reason.is_empty()).then_some(()))
    })
    .await?;
    let request = v1::GetInstanceRequest { instance_id: before.clone() };
    let state = client.clone().get_instance(request).await?.into_inner().state();
    ensure!(state == v1::InstanceState::Running, "what ran is {}", state.as_str_name());

    disk.free()?;
    cluster.revive().await?;
    // What failed for good is asked for again, as a user would after reading the reason.
    let running = until("the instance to run", async || {
        let instance_id = during.clone();
        let request = v1::StartInstanceRequest { instance_id, ..v1::StartInstanceRequest::default() };
        let instance = client.clone().start_instance(request).await?.into_inner();
        Ok((instance.state() == v1::InstanceState::Running).then_some(()))
    });
    running.await.map_err(|error| error.context(cluster.logs()))?;
    for (id, key) in [(&before, "a"), (&during, "b")] {
        Ask::Delete.send(&client, id, key).await?;
        until_gone(&client, id).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_whose_disk_is_full_refuses_clearly_reads_on_and_forgets_nothing() -> Result<()> {
    let Some(disk) = SmallDisk::create(SUITE, SERVER_DISK_BYTES)? else { return Ok(()) };
    let dir: PathBuf = disk.path().into();
    let cluster = Cluster::start(ClusterOptions { dir: Some(dir), ..ClusterOptions::default() }).await?;
    let client = cluster.clients()?.compute();
    let mut acknowledged = Vec::new();
    for index in 0..5 {
        let request = create_request(&format!("before{index}-x"));
        acknowledged.push(client.clone().create_instance(request).await?.into_inner().id);
    }
    disk.fill(1 << 20)?;
    let refusal = until("a create to be refused", async || {
        let name = format!("during{}-x", acknowledged.len());
        match client.clone().create_instance(create_request(&name)).await {
            Ok(created) => {
                acknowledged.push(created.into_inner().id);
                Ok(None)
            }
            Err(status) => Ok(Some(status)),
        }
    });
    let refusal = refusal.await?;
    ensure!(refusal.code() == Code::ResourceExhausted, "it was refused with {refusal:?}");
    check_listed(&client, &mut acknowledged).await.context("while the disk was full")?;
    disk.free()?;
    until("a create to succeed", async || {
        let created = client.clone().create_instance(create_request("after-x")).await?.into_inner();
        acknowledged.push(created.id);
        Ok(Some(()))
    })
    .await?;
    check_listed(&client, &mut acknowledged).await
}

/// Whether what is there is what was acknowledged.
async fn check_listed(client: &ComputeClient, acknowledged: &mut [String]) -> Result<()> {
    let request = v1::ListInstancesRequest { page_size: 1000, ..v1::ListInstancesRequest::default() };
    let listed = client.clone().list_instances(request).await?.into_inner().instances;
    let mut listed: Vec<_> = listed.into_iter().map(|instance| instance.id).collect();
    listed.sort();
    acknowledged.sort();
    ensure!(listed == acknowledged, "{listed:?} are there, {acknowledged:?} were acknowledged");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_disk_makes_calls_slow_and_nothing_else() -> Result<()> {
    let mut cluster = Cluster::prepare(ClusterOptions::default())?;
    let Some(shim) = Shim::build(cluster.dir())? else {
        skip(SUITE, "there is no C compiler: install gcc");
        return Ok(());
    };
    cluster.start_server(&shim.env()).await?;
    let client = cluster.clients()?.compute();
    shim.slow_disk(SLOW)?;
    let begin = std::time::Instant::now();
    let creates = (0..20).map(|index| {
        let mut client = client.clone();
        async move { client.create_instance(create_request(&format!("slow{index}-x"))).await }
    });
    futures::future::try_join_all(creates).await?;
    let took = begin.elapsed();
    ensure!(took >= SLOW, "the disk was not slow: {took:?}");
    ensure!(took < SLOW * 15, "creates do not share flushes: 20 took {took:?}");
    Ok(())
}
