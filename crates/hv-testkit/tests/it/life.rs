//! The whole life of a virtual machine, as a user sees it, on every store.

use anyhow::{Result, ensure};
use hv_store::conformance::etcd_server::EtcdVersion;
use hv_testkit::{AgentOptions, Cluster, image_dir, qemu_processes, skip};

use crate::stores::TestStore;

/// What the guest image prints when it is up.
const GREETING: &str = "hypervisor-guest: hello";

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_lives_its_whole_life_on_the_embedded_store() -> Result<()> {
    whole_life(TestStore::embedded()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_lives_its_whole_life_on_etcd_3_4() -> Result<()> {
    match TestStore::etcd(EtcdVersion::V3_4).await {
        Some(store) => whole_life(store).await,
        None => Ok(()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_lives_its_whole_life_on_etcd_3_5() -> Result<()> {
    match TestStore::etcd(EtcdVersion::V3_5).await {
        Some(store) => whole_life(store).await,
        None => Ok(()),
    }
}

async fn whole_life(store: TestStore) -> Result<()> {
    let Some(images) = image_dir() else {
        skip("hv-testkit life", "there is no guest image: run hack/setup.sh images");
        return Ok(());
    };
    let mut cluster = Cluster::start(store.options()).await?;
    for _ in 0..2 {
        let options = AgentOptions {
            drivers: vec!["qemu"],
            image_dir: Some(images.clone()),
            ..AgentOptions::default()
        };
        cluster.add_agent(options).await?;
    }
    cluster.until_ready(2).await?;
    let outcome = steps(&cluster).await;
    outcome.map_err(|error| error.context(cluster.logs()))
}

async fn steps(cluster: &Cluster) -> Result<()> {
    let create = ["instance", "create", "--name", "web", "--type", "vm", "--image", "tiny", "--cpus", "1"];
    let id = cluster.ctl(&[&create[..], &["--memory", "192", "-o", "name"]].concat()).await?;
    ensure!(!id.trim().is_empty(), "create prints the instance");
    let id = instance_id(cluster).await?;
    ensure!(qemu_processes(&id)?.len() == 1, "one process runs");

    let console = ["instance", "console", "web", "--until", GREETING, "--timeout", "120s"];
    ensure!(cluster.ctl(&console).await?.contains(GREETING), "the guest greets on its console");
    ensure!(cluster.ctl(&["instance", "logs", "web"]).await?.contains(GREETING), "the log has the greeting");
    let stats = cluster.ctl(&["instance", "stats", "web", "-o", "json"]).await?;
    let stats: serde_json::Value = serde_json::from_str(&stats)?;
    ensure!(number(&stats, "cpuTimeNs")? > 0, "the guest has used the processor: {stats}");

    cluster.ctl(&["instance", "pause", "web"]).await?;
    ensure!(state(cluster).await? == "INSTANCE_STATE_PAUSED", "it is paused");
    cluster.ctl(&["instance", "resume", "web"]).await?;
    ensure!(state(cluster).await? == "INSTANCE_STATE_RUNNING", "it goes on");

    cluster.ctl(&["instance", "stop", "web"]).await?;
    ensure!(state(cluster).await? == "INSTANCE_STATE_STOPPED", "it is stopped");
    ensure!(qemu_processes(&id)?.is_empty(), "no process runs");
    cluster.ctl(&["instance", "start", "web"]).await?;
    ensure!(qemu_processes(&id)?.len() == 1, "one process runs again");
    cluster.ctl(&["instance", "delete", "web"]).await?;
    ensure!(cluster.ctl(&["instance", "list", "-o", "name"]).await?.trim().is_empty(), "it is gone");
    nothing_is_left(cluster, &id)
}

async fn instance_id(cluster: &Cluster) -> Result<String> {
    Ok(get(cluster).await?["id"].as_str().unwrap_or_default().to_owned())
}

async fn state(cluster: &Cluster) -> Result<String> {
    Ok(get(cluster).await?["state"].as_str().unwrap_or_default().to_owned())
}

async fn get(cluster: &Cluster) -> Result<serde_json::Value> {
    Ok(serde_json::from_str(&cluster.ctl(&["instance", "get", "web", "-o", "json"]).await?)?)
}

/// 64-bit numbers are text in protobuf's JSON.
fn number(value: &serde_json::Value, name: &str) -> Result<u64> {
    Ok(value[name].as_str().unwrap_or("0").parse()?)
}

/// Neither a process nor a file of a deleted instance may be left on any node.
fn nothing_is_left(cluster: &Cluster, id: &str) -> Result<()> {
    ensure!(qemu_processes(id)?.is_empty(), "a process is left");
    let mut dirs = vec![cluster.dir().to_path_buf()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir)? {
            let path = entry?.path();
            ensure!(!path.to_string_lossy().contains(id), "{} is left", path.display());
            if path.is_dir() {
                dirs.push(path);
            }
        }
    }
    Ok(())
}
