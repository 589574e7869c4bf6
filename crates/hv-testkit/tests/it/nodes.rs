//! Nodes that go away, come back and are emptied.

use anyhow::{Result, ensure};
use hv_client::ComputeClient;
use hv_proto::v1;
use hv_testkit::{
    AgentOptions, Cluster, ClusterOptions, create_request, image_dir, qemu_processes, skip, until,
    until_settled,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_outlives_its_agent_and_is_taken_over_untouched() -> Result<()> {
    let Some(images) = image_dir() else {
        skip("hv-testkit nodes", "there is no guest image: run hack/setup.sh images");
        return Ok(());
    };
    let heartbeat_timeout = std::time::Duration::from_secs(5);
    let mut cluster =
        Cluster::start(ClusterOptions { heartbeat_timeout, ..ClusterOptions::default() }).await?;
    let options = AgentOptions { drivers: vec!["qemu"], image_dir: Some(images), ..AgentOptions::default() };
    let agent = cluster.add_agent(options).await?;
    cluster.until_ready(1).await?;
    let client = cluster.clients()?.compute();
    let id = client.clone().create_instance(create_request("web")).await?.into_inner().id;
    until_settled(&client, &id, v1::InstanceState::Running).await?;
    let before = qemu_processes(&id)?;
    ensure!(before.len() == 1, "not exactly one process: {before:?}");

    if let Some(process) = cluster.agent(agent) {
        process.kill()?;
    }
    let lost = until("the instance to be unknown", async || {
        let instance = get(&client, &id).await?;
        Ok((instance.state() == v1::InstanceState::Unknown).then_some(instance))
    });
    let lost = lost.await?;
    ensure!(lost.state_reason.contains("does not answer"), "the reason is {:?}", lost.state_reason);
    ensure!(qemu_processes(&id)? == before, "the machine does not run on");

    cluster.start_agent(agent, &[]).await?;
    until_settled(&client, &id, v1::InstanceState::Running).await?;
    ensure!(qemu_processes(&id)? == before, "the machine was touched");
    cluster.ctl(&["instance", "delete", "web"]).await?;
    ensure!(qemu_processes(&id)?.is_empty(), "a process is left");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_moves_what_may_lose_its_disk_and_names_what_may_not() -> Result<()> {
    let mut cluster = Cluster::start(ClusterOptions::default()).await?;
    let options =
        AgentOptions { drivers: vec!["fake"], capacity: Some((8, 8 << 30)), ..AgentOptions::default() };
    cluster.add_agent(options.clone()).await?;
    cluster.until_ready(1).await?;
    let client = cluster.clients()?.compute();
    let id = client.clone().create_instance(create_request("web")).await?.into_inner().id;
    until_settled(&client, &id, v1::InstanceState::Running).await?;
    cluster.add_agent(options).await?;
    cluster.until_ready(2).await?;

    let drain = |discard_local_disks| {
        let request = v1::DrainNodeRequest {
            max_parallel: 0,
            node_id: "node-0".into(),
            discard_local_disks,
            request_key: String::new(),
        };
        let clients = cluster.clients();
        async move { anyhow::Ok(clients?.cluster().drain_node(request).await?.into_inner()) }
    };
    let answer = drain(false).await?;
    ensure!(answer.moving_instance_ids.is_empty() && answer.blockers.len() == 1, "{answer:?}");
    ensure!(answer.blockers[0].reason.contains("its disks lie on this node"), "{answer:?}");
    ensure!(get(&client, &id).await?.node_id == "node-0", "it was moved although its disks lie there");

    let answer = drain(true).await?;
    ensure!(answer.moving_instance_ids == [id.clone()] && answer.blockers.is_empty(), "{answer:?}");
    until("the instance to be on the other node", async || {
        Ok((get(&client, &id).await?.node_id == "node-1").then_some(()))
    })
    .await
    .map_err(|error| error.context(cluster.logs()))?;
    let moved = until_settled(&client, &id, v1::InstanceState::Running).await?;
    ensure!(moved.epoch == 2, "it was bound {} times", moved.epoch);

    cluster.ctl(&["node", "uncordon", "node-0"]).await?;
    cluster.until_ready(2).await
}

async fn get(client: &ComputeClient, id: &str) -> Result<v1::Instance> {
    let request = v1::GetInstanceRequest { instance_id: id.to_owned() };
    Ok(client.clone().get_instance(request).await?.into_inner())
}
