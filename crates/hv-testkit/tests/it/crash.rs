//! Every step of create, stop, start and delete, with a process that dies right there.
//!
//! For each crash point a cluster is started whose server or agent ends as by `kill -9` when it comes to the point the
//! first time, and for some also the second. It is restarted, as systemd would, and the instance must reach what was asked for: with
//! exactly one QEMU process while it runs, none while it does not, and nothing left of it in the end.

use std::os::unix::process::ExitStatusExt;

use anyhow::{Context, Result, ensure};
use hv_proto::v1;
use hv_store::conformance::etcd_server::EtcdVersion;
use hv_telemetry::crash::{Point, VARIABLE};
use hv_testkit::{
    AgentOptions, Ask, Cluster, create_request, image_dir, qemu_processes, skip, until, until_gone,
    until_settled,
};

use crate::stores::TestStore;

/// Whose process comes to a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    Server,
    Agent,
}

fn owner(point: Point) -> Owner {
    if point.name().starts_with("server.") { Owner::Server } else { Owner::Agent }
}

/// How often a life comes to a point for different reasons: a start that follows a stop is not the first start.
fn times(point: Point) -> u32 {
    let again =
        ["server.change", "server.report", "agent.assignment", "agent.start", "agent.report", "qemu.start"];
    if again.iter().any(|part| point.name().starts_with(part)) { 2 } else { 1 }
}

/// The points of one part, each of which is a test of its own so that a failure names it.
async fn walk(part: &str, store: TestStore) -> Result<()> {
    let Some(images) = image_dir() else {
        skip("hv-testkit crash", "there is no guest image: run hack/setup.sh images");
        return Ok(());
    };
    let points: Vec<_> = Point::ALL.iter().filter(|point| point.name().starts_with(part)).collect();
    ensure!(!points.is_empty(), "there are no points of {part}");
    for point in points {
        for time in 1..=times(*point) {
            let crashed = crash_at(*point, time, &images, &store).await;
            let crashed = crashed.with_context(|| format!("crash at {point}, time {time}"))?;
            ensure!(crashed, "{point} is not reached {time} times: the walk does not cover it");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_dies_at_every_step() -> Result<()> {
    walk("server.", TestStore::embedded()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_dies_at_every_step_on_etcd_3_4() -> Result<()> {
    match TestStore::etcd(EtcdVersion::V3_4).await {
        Some(store) => walk("server.", store).await,
        None => Ok(()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_dies_at_every_step_on_etcd_3_5() -> Result<()> {
    match TestStore::etcd(EtcdVersion::V3_5).await {
        Some(store) => walk("server.", store).await,
        None => Ok(()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agent_dies_at_every_step() -> Result<()> {
    walk("agent.", TestStore::embedded()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agent_dies_at_every_step_of_the_driver() -> Result<()> {
    walk("qemu.", TestStore::embedded()).await
}

/// One life with a crash in it; whether the point was reached.
async fn crash_at(point: Point, time: u32, images: &std::path::Path, store: &TestStore) -> Result<bool> {
    let env = [(VARIABLE, format!("{point}:{time}"))];
    let none = [];
    let (for_server, for_agent) = match owner(point) {
        Owner::Server => (&env[..], &none[..]),
        Owner::Agent => (&none[..], &env[..]),
    };
    let mut cluster = Cluster::start_with(store.options(), for_server).await?;
    let options = AgentOptions {
        drivers: vec!["qemu"],
        image_dir: Some(images.to_path_buf()),
        ..AgentOptions::default()
    };
    cluster.add_agent_with(options, for_agent).await?;
    let mut supervisor = Supervisor { cluster, owner: owner(point), crashes: 0 };
    let outcome = Box::pin(life(&mut supervisor)).await;
    outcome.map_err(|error| error.context(supervisor.cluster.logs()))?;
    ensure!(supervisor.crashes <= 1, "it crashed {} times", supervisor.crashes);
    Ok(supervisor.crashes == 1)
}

/// Restarts what dies, as systemd would.
struct Supervisor {
    cluster: Cluster,
    owner: Owner,
    crashes: usize,
}

impl Supervisor {
    /// Runs `work` to its end while restarting whatever dies.
    async fn during<T>(&mut self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let mut work = std::pin::pin!(work);
        loop {
            let pause = std::time::Duration::from_millis(20);
            if let Ok(outcome) = tokio::time::timeout(pause, &mut work).await {
                return outcome;
            }
            self.revive().await?;
        }
    }

    async fn revive(&mut self) -> Result<()> {
        let process = match self.owner {
            Owner::Server => self.cluster.server(),
            Owner::Agent => self.cluster.agent(0),
        };
        if let Some(process) = process
            && let Some(status) = process.ended()?
        {
            // SIGABRT is how a crash point ends its process; anything else is a fault of its own.
            ensure!(status.signal() == Some(6), "it ended with {status} instead of at the point");
            self.crashes += 1;
        }
        self.cluster.revive().await?;
        Ok(())
    }
}

async fn life(supervisor: &mut Supervisor) -> Result<()> {
    let client = supervisor.cluster.clients()?.compute();
    let request = v1::CreateInstanceRequest { request_key: "create".into(), ..create_request("web") };
    let create = until("an answer to create", async || {
        Ok(Some(client.clone().create_instance(request.clone()).await?.into_inner()))
    });
    let id = Box::pin(supervisor.during(create)).await?.id;
    let running = supervisor.during(until_settled(&client, &id, v1::InstanceState::Running)).await?;
    ensure!(running.epoch == 1, "it was bound {} times", running.epoch);
    ensure!(
        qemu_processes(&id)?.len() == 1,
        "not exactly one process after create: {:?}",
        qemu_processes(&id)?
    );

    // What the driver cannot change is told; either way what runs goes on.
    let change = v1::UpdateInstanceRequest {
        instance_id: id.clone(),
        memory_bytes: Some(160 << 20),
        request_key: "update".into(),
        ..v1::UpdateInstanceRequest::default()
    };
    let update = until("an answer to update", async || {
        Ok(Some(client.clone().update_instance(change.clone()).await?.into_inner()))
    });
    let updated = supervisor.during(update).await?;
    ensure!(updated.generation == 2, "it was changed {} times", updated.generation);
    supervisor.during(until_settled(&client, &id, v1::InstanceState::Running)).await?;
    ensure!(qemu_processes(&id)?.len() == 1, "not exactly one process after update");

    supervisor.during(Ask::Stop.send(&client, &id, "stop")).await?;
    supervisor.during(until_settled(&client, &id, v1::InstanceState::Stopped)).await?;
    ensure!(qemu_processes(&id)?.is_empty(), "a process after stop");

    supervisor.during(Ask::Start.send(&client, &id, "start")).await?;
    supervisor.during(until_settled(&client, &id, v1::InstanceState::Running)).await?;
    ensure!(
        qemu_processes(&id)?.len() == 1,
        "not exactly one process after start: {:?}",
        qemu_processes(&id)?
    );

    supervisor.during(Ask::Delete.send(&client, &id, "delete")).await?;
    supervisor.during(until_gone(&client, &id)).await?;
    // A crash after the last step is seen now; what it left behind must still go.
    let dir = supervisor.cluster.agent_dir(0);
    let gone = until("the node to be clean", async || Ok((is_clean(&dir, &id)?).then_some(())));
    supervisor.during(gone).await?;
    supervisor.revive().await
}

/// Whether neither a process nor a directory of the instance is left.
fn is_clean(dir: &std::path::Path, id: &str) -> Result<bool> {
    if !qemu_processes(id)?.is_empty() {
        return Ok(false);
    }
    let mut dirs = vec![dir.to_path_buf()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir)? {
            let path = entry?.path();
            if path.to_string_lossy().contains(id) {
                return Ok(false);
            }
            if path.is_dir() {
                dirs.push(path);
            }
        }
    }
    Ok(true)
}
