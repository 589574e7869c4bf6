//! Instances made from a snapshot, with the real programs and the fake driver: whole or not at all, whoever dies.

use anyhow::{Context as _, Result, ensure};
use hv_proto::v1;
use hv_testkit::{AgentOptions, Cluster, create_request, until, until_settled};

use crate::stores::TestStore;

/// So many nodes, one of which has an instance with the snapshot `warm`, of which clones take so long.
async fn begin(nodes: i32, clone_delay: &str) -> Result<(Cluster, v1::Instance)> {
    let mut cluster = Cluster::start(TestStore::embedded().options()).await?;
    for _ in 0..nodes {
        // Room for the source and a fleet.
        let capacity = Some((16, 16 << 30));
        let options = AgentOptions { drivers: vec!["fake"], capacity, ..AgentOptions::default() };
        cluster.add_agent(options).await?;
    }
    cluster.until_ready(nodes).await?;
    let client = cluster.clients()?.compute();
    let script = [("fake.hypervisor/delay-clone".to_owned(), clone_delay.to_owned())];
    let metadata = v1::Metadata { annotations: script.into(), ..v1::Metadata::default() };
    let request = v1::CreateInstanceRequest { metadata: Some(metadata), ..create_request("golden") };
    let id = client.clone().create_instance(request).await?.into_inner().id;
    let running = until_settled(&client, &id, v1::InstanceState::Running).await?;
    cluster.ctl(&["instance", "snapshot", "create", "golden", "warm", "--memory"]).await?;
    Ok((cluster, running))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fleet_is_made_from_one_snapshot_where_that_is() -> Result<()> {
    let (cluster, source) = begin(2, "1ms").await?;
    let outcome = fleet(&cluster, &source).await;
    outcome.map_err(|error| error.context(cluster.logs()))
}

async fn fleet(cluster: &Cluster, source: &v1::Instance) -> Result<()> {
    let ask =
        ["instance", "clone", "golden", "--snapshot", "warm", "web", "--count", "5", "--timeout", "60s"];
    cluster.ctl(&[&ask[..], &["--request-key", "fleet"]].concat()).await?;
    cluster.ctl(&[&ask[..], &["--request-key", "fleet"]].concat()).await?;
    let client = cluster.clients()?.compute();
    let listed = client.clone().list_instances(v1::ListInstancesRequest::default()).await?.into_inner();
    let clones: Vec<_> = listed.instances.iter().filter(|known| known.id != source.id).collect();
    ensure!(clones.len() == 5, "{} instead of 5", clones.len());
    for clone in clones {
        let runs = clone.state() == v1::InstanceState::Running && clone.node_id == source.node_id;
        ensure!(runs && clone.set == "web", "{clone:?}");
    }
    let missing = cluster.ctl(&["instance", "clone", "golden", "--snapshot", "cold", "other"]).await;
    let why = missing.err().map(|error| error.to_string()).unwrap_or_default();
    ensure!(why.contains("has no snapshot cold"), "it was not refused: {why}");
    // Neither needs the other.
    cluster.ctl(&["instance", "delete", "golden"]).await?;
    cluster.ctl(&["instance", "restart", "web-1"]).await?;
    Ok(())
}

/// Whose process is killed while the driver makes the clone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Server,
    Agent,
}

async fn survive(victim: Victim) -> Result<()> {
    let (mut cluster, source) = begin(1, "700ms").await?;
    let outcome = kill_and_wait(&mut cluster, &source, victim).await;
    outcome.map_err(|error| error.context(cluster.logs()))
}

async fn kill_and_wait(cluster: &mut Cluster, source: &v1::Instance, victim: Victim) -> Result<()> {
    let request = v1::CloneInstanceRequest {
        instance_id: source.id.clone(),
        snapshot: "warm".into(),
        name: "web".into(),
        request_key: "one".into(),
        count: 0,
    };
    let made = cluster.clients()?.compute().clone_instance(request.clone()).await?.into_inner();
    let clone = made.instances.first().context("there is one")?.clone();
    let process = match victim {
        Victim::Server => cluster.server(),
        Victim::Agent => cluster.agent(0),
    };
    if let Some(process) = process {
        process.kill()?;
    }
    cluster.revive().await?;
    let client = cluster.clients()?.compute();
    let running = until_settled(&client, &clone.id, v1::InstanceState::Running).await?;
    ensure!(running.node_id == source.node_id, "{running:?}");
    let again = until("the same answer", async || {
        Ok(cluster.clients()?.compute().clone_instance(request.clone()).await.ok())
    })
    .await?;
    let again = again.into_inner();
    ensure!(again.instances.first().map(|first| &first.id) == Some(&clone.id), "{again:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_survives_the_death_of_the_server() -> Result<()> {
    survive(Victim::Server).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_survives_the_death_of_the_agent() -> Result<()> {
    survive(Victim::Agent).await
}
