//! What a user does to an instance beyond its life cycle, with the real programs and the fake driver.

use anyhow::{Result, ensure};
use hv_proto::v1;
use hv_testkit::{AgentOptions, Cluster, create_request, until, until_settled};

use crate::stores::TestStore;

/// A cluster with one node of 8 cores and an instance that runs there, of which snapshots take so long.
async fn begin(snapshot_delay: &str) -> Result<(Cluster, v1::Instance)> {
    let mut cluster = Cluster::start(TestStore::embedded().options()).await?;
    let capacity = Some((8, 8 << 30));
    cluster.add_agent(AgentOptions { drivers: vec!["fake"], capacity, ..AgentOptions::default() }).await?;
    cluster.until_ready(1).await?;
    let client = cluster.clients()?.compute();
    let script = [("fake.hypervisor/delay-snapshot".to_owned(), snapshot_delay.to_owned())];
    let metadata = v1::Metadata { annotations: script.into(), ..v1::Metadata::default() };
    let request = v1::CreateInstanceRequest { metadata: Some(metadata), ..create_request("web") };
    let id = client.clone().create_instance(request).await?.into_inner().id;
    let running = until_settled(&client, &id, v1::InstanceState::Running).await?;
    Ok((cluster, running))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_is_changed_and_told_of_what_there_is_no_room_for() -> Result<()> {
    let (cluster, created) = begin("1ms").await?;
    let outcome = change(&cluster, &created).await;
    outcome.map_err(|error| error.context(cluster.logs()))
}

async fn change(cluster: &Cluster, created: &v1::Instance) -> Result<()> {
    cluster.ctl(&["instance", "update", "web", "--cpus", "4", "--memory", "1GiB", "--name", "www"]).await?;
    cluster.ctl(&["instance", "update", "www", "--set-disk", "name=data,size=1MiB"]).await?;
    let client = cluster.clients()?.compute();
    let changed = until_settled(&client, &created.id, v1::InstanceState::Running).await?;
    let spec = changed.spec.clone().unwrap_or_default();
    ensure!((spec.cpu_cores, spec.memory_bytes, spec.disks.len()) == (4, 1 << 30, 1), "{spec:?}");
    ensure!(changed.name == "www" && changed.started_at == created.started_at, "{changed:?}");
    let refused = cluster.ctl(&["instance", "update", "www", "--cpus", "9"]).await;
    let refused = refused.err().map(|error| error.to_string()).unwrap_or_default();
    ensure!(refused.contains("no room"), "it was not refused: {refused}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_are_taken_listed_returned_to_and_deleted() -> Result<()> {
    let (cluster, created) = begin("1ms").await?;
    let outcome = snapshots(&cluster, &created).await;
    outcome.map_err(|error| error.context(cluster.logs()))
}

async fn snapshots(cluster: &Cluster, created: &v1::Instance) -> Result<()> {
    cluster.ctl(&["instance", "snapshot", "create", "web", "one"]).await?;
    cluster.ctl(&["instance", "snapshot", "create", "web", "two", "--memory"]).await?;
    let listed = cluster.ctl(&["instance", "snapshot", "list", "web", "-o", "name"]).await?;
    ensure!(listed == "snapshot/one\nsnapshot/two\n", "{listed}");
    let again = cluster.ctl(&["instance", "snapshot", "create", "web", "one"]).await;
    ensure!(again.is_err_and(|error| error.to_string().contains("already")), "a name was taken twice");
    cluster.ctl(&["instance", "snapshot", "revert", "web", "one"]).await?;
    let client = cluster.clients()?.compute();
    until("it to be started afresh", async || {
        let request = v1::GetInstanceRequest { instance_id: created.id.clone() };
        let now = client.clone().get_instance(request).await?.into_inner();
        let runs = now.state() == v1::InstanceState::Running;
        Ok((runs && now.started_at != created.started_at).then_some(()))
    })
    .await?;
    cluster.ctl(&["instance", "snapshot", "delete", "web", "one"]).await?;
    let listed = cluster.ctl(&["instance", "snapshot", "list", "web", "-o", "name"]).await?;
    ensure!(listed == "snapshot/two\n", "{listed}");
    let operations = cluster.ctl(&["operation", "list"]).await?;
    ensure!(
        operations.contains("snapshot-instance") && operations.contains("revert-instance"),
        "{operations}"
    );
    Ok(())
}

/// Whose process is killed while the driver is taking the snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Server,
    Agent,
}

async fn survive(victim: Victim) -> Result<()> {
    let (mut cluster, created) = begin("700ms").await?;
    let outcome = kill_and_wait(&mut cluster, &created, victim).await;
    outcome.map_err(|error| error.context(cluster.logs()))
}

async fn kill_and_wait(cluster: &mut Cluster, created: &v1::Instance, victim: Victim) -> Result<()> {
    let request = v1::CreateInstanceSnapshotRequest {
        instance_id: created.id.clone(),
        name: "one".into(),
        request_key: "one".into(),
        ..v1::CreateInstanceSnapshotRequest::default()
    };
    let operation =
        cluster.clients()?.compute().create_instance_snapshot(request.clone()).await?.into_inner().id;
    let get = v1::GetOperationRequest { operation_id: operation.clone() };
    let operations = cluster.clients()?.operations();
    until("the node to be at it", async || {
        let now = operations.clone().get_operation(get.clone()).await?.into_inner();
        Ok((now.state() == v1::OperationState::Running).then_some(()))
    })
    .await?;
    let process = match victim {
        Victim::Server => cluster.server(),
        Victim::Agent => cluster.agent(0),
    };
    if let Some(process) = process {
        process.kill()?;
    }
    cluster.revive().await?;
    let operations = cluster.clients()?.operations();
    let ended = until("the operation to end", async || {
        let Ok(now) = operations.clone().get_operation(get.clone()).await else { return Ok(None) };
        let now = now.into_inner();
        let is_final = !matches!(now.state(), v1::OperationState::Running | v1::OperationState::Pending);
        Ok(is_final.then_some(now))
    })
    .await?;
    ensure!(ended.state() == v1::OperationState::Succeeded, "{ended:?}");
    let listed = cluster.ctl(&["instance", "snapshot", "list", "web", "-o", "name"]).await?;
    ensure!(listed == "snapshot/one\n", "{listed}");
    let repeated = cluster.clients()?.compute().create_instance_snapshot(request).await?.into_inner();
    ensure!(repeated.id == operation, "the same request began another operation");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_survives_the_death_of_the_server() -> Result<()> {
    survive(Victim::Server).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_survives_the_death_of_the_agent() -> Result<()> {
    survive(Victim::Agent).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_is_renamed_rescued_and_started_from_its_own_disks_again() -> Result<()> {
    let (cluster, created) = begin("1ms").await?;
    let outcome = rescue(&cluster, &created).await;
    outcome.map_err(|error| error.context(cluster.logs()))
}

async fn rescue(cluster: &Cluster, created: &v1::Instance) -> Result<()> {
    cluster.ctl(&["instance", "rename", "web", "www"]).await?;
    let client = cluster.clients()?.compute();
    let renamed = until_settled(&client, &created.id, v1::InstanceState::Running).await?;
    ensure!(renamed.name == "www" && renamed.started_at == created.started_at, "{renamed:?}");
    cluster.ctl(&["instance", "rescue", "www", "--image", "tiny"]).await?;
    let shown = cluster.ctl(&["instance", "describe", "www"]).await?;
    ensure!(shown.contains("from tiny, its own disks behind it"), "{shown}");
    let listed = cluster.ctl(&["instance", "list"]).await?;
    ensure!(listed.contains("RUNNING (rescue)"), "{listed}");
    for refused in [
        ["instance", "snapshot", "create", "www", "one"].as_slice(),
        &["instance", "migrate", "www"],
        &["instance", "update", "www", "--cpus", "2"],
    ] {
        let refused = cluster.ctl(refused).await.err().map(|error| error.to_string()).unwrap_or_default();
        ensure!(refused.contains("it is in rescue, from tiny"), "it was not refused: {refused}");
    }
    cluster.ctl(&["instance", "unrescue", "www"]).await?;
    let back = until_settled(&client, &created.id, v1::InstanceState::Running).await?;
    ensure!(back.spec.is_some_and(|spec| spec.rescue.is_empty()), "it is still in rescue");
    let refused = cluster.ctl(&["instance", "rescue", "www", "--image", "none"]).await;
    let refused = refused.err().map(|error| error.to_string()).unwrap_or_default();
    ensure!(refused.contains("there is no image `none`"), "it was not refused: {refused}");
    cluster.ctl(&["instance", "unrescue", "www"]).await?;
    cluster.ctl(&["instance", "update", "www", "--cpus", "2"]).await?;
    Ok(())
}
