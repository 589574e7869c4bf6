//! What a node gives to one instance at a time: counted, given, kept across the death of the agent, and given back. The
//! machine's devices are a tree of files; only the processor is a real one.

use std::collections::BTreeSet;
use std::os::unix::fs::symlink;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use hv_proto::v1;
use hv_testkit::{AgentOptions, Cluster, image_dir, qemu_processes, skip, until};
use serde_json::Value;

use crate::stores::TestStore;

/// The kind of the cards.
const CARD: &str = "10de:2204";

/// A machine with one NUMA node, 64 huge pages of 2 MiB, and two cards that vfio-pci has already.
fn machine(root: &Path, cpu: &str) -> Result<()> {
    let put = |path: String, text: &str| -> Result<()> {
        let path = root.join(path);
        std::fs::create_dir_all(path.parent().context("a parent")?)?;
        Ok(std::fs::write(path, text)?)
    };
    put("devices/system/cpu/online".into(), cpu)?;
    put("devices/system/node/node0/cpulist".into(), cpu)?;
    put("devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages".into(), "64\n")?;
    put("bus/pci/drivers_probe".into(), "")?;
    put("bus/pci/drivers/vfio-pci/unbind".into(), "")?;
    for (address, group) in [("0000:17:00.0", 7), ("0000:65:00.0", 9)] {
        let dir = format!("bus/pci/devices/{address}");
        for (name, text) in [("vendor", "0x10de"), ("device", "0x2204"), ("class", "0x030000")] {
            put(format!("{dir}/{name}"), text)?;
        }
        put(format!("{dir}/numa_node"), "-1\n")?;
        put(format!("{dir}/driver_override"), "vfio-pci\n")?;
        let dir = root.join(dir);
        symlink(format!("../../../kernel/iommu_groups/{group}"), dir.join("iommu_group"))?;
        symlink("../../drivers/vfio-pci", dir.join("driver"))?;
    }
    Ok(())
}

/// A processor that the tests may run on.
fn a_processor() -> Result<String> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let list =
        status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).context("processors")?;
    Ok(list.trim().split([',', '-']).next().context("a processor")?.to_owned())
}

/// A node with this driver that gives away all that the tree has.
async fn begin(driver: &'static str, tree: &Path) -> Result<Cluster> {
    let cpu = a_processor()?;
    machine(tree, &cpu)?;
    let mut cluster = Cluster::start(TestStore::embedded().options()).await?;
    let options = AgentOptions {
        drivers: vec![driver],
        capacity: Some((8, 8 << 30)),
        image_dir: (driver == "qemu").then(image_dir).flatten(),
        env: vec![
            ("HYPERVISOR_AGENT_DEVICES_SYSFS", tree.display().to_string()),
            ("HYPERVISOR_AGENT_DEVICES_DEDICATED_CPUS", cpu),
            ("HYPERVISOR_AGENT_DEVICES_HUGE_PAGES", "true".to_owned()),
            ("HYPERVISOR_AGENT_DEVICES_PCI", CARD.to_owned()),
        ],
        ..AgentOptions::default()
    };
    cluster.add_agent(options).await?;
    cluster.until_ready(1).await?;
    Ok(cluster)
}

/// Until the node shows so many free processors, huge pages and cards.
async fn until_free(cluster: &Cluster, expected: [u64; 3]) -> Result<()> {
    let clients = cluster.clients()?;
    let mut seen = Vec::new();
    let found = until("so much to be free", async || {
        let request = v1::GetNodeRequest { node_id: "node-0".to_owned() };
        let node = clients.cluster().get_node(request).await?.into_inner();
        seen = node.devices.unwrap_or_default().amounts;
        let free: Vec<_> = seen.iter().map(|one| one.total.saturating_sub(one.allocated)).collect();
        Ok((free == expected).then_some(()))
    })
    .await;
    found.with_context(|| format!("expected {expected:?} free of {seen:?}"))
}

/// What the journal of the node says that an instance was given.
async fn grant(cluster: &Cluster, id: &str) -> Result<Value> {
    let path = cluster.agent_dir(0).join("journal/instances").join(format!("{id}.json"));
    until("the grant to be in the journal", async || {
        let entry: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
        Ok(Some(entry["config"]["devices"].clone()).filter(|grant| !grant.is_null()))
    })
    .await
}

/// An instance of one core and 64 MiB; `wait`: until it runs.
async fn create(cluster: &Cluster, name: &str, devices: &[&str], wait: bool) -> Result<String> {
    let image = ["vm", "create", name, "--image", "tiny", "--cpus", "1", "--memory", "64MiB", "-o", "json"];
    let no_wait: &[&str] = if wait { &[] } else { &["--no-wait"] };
    cluster.ctl(&[&image[..], devices, no_wait].concat()).await?;
    let shown: Value = serde_json::from_str(&cluster.ctl(&["vm", "get", name, "-o", "json"]).await?)?;
    Ok(shown["id"].as_str().context("an id")?.to_owned())
}

/// Until the instance is shown as waiting for this.
async fn until_waits(cluster: &Cluster, id: &str, why: &str) -> Result<()> {
    let client = cluster.clients()?.compute();
    let mut seen = String::new();
    let waits = until("the instance to wait", async || {
        let request = v1::GetInstanceRequest { instance_id: id.to_owned() };
        let instance = client.clone().get_instance(request).await?.into_inner();
        seen.clone_from(&instance.state_reason);
        Ok((instance.state() == v1::InstanceState::Pending && seen.contains(why)).then_some(()))
    })
    .await;
    waits.with_context(|| format!("expected {why:?}; the reason is {seen:?}"))
}

async fn refusal(cluster: &Cluster, args: &[&str]) -> String {
    cluster.ctl(args).await.err().map(|error| format!("{error:#}")).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_are_counted_given_kept_and_given_back() -> Result<()> {
    let tree = tempfile::tempdir()?;
    let mut cluster = begin("fake", tree.path()).await?;
    let outcome = whole_life(&mut cluster).await;
    outcome.map_err(|error| error.context(cluster.logs()))
}

async fn whole_life(cluster: &mut Cluster) -> Result<()> {
    until_free(cluster, [1, 64, 2]).await?;
    let shown = cluster.ctl(&["node", "describe", "node-0"]).await?;
    for text in ["dedicated processors", "1 of 1 free", "64 of 64 free", "2 of 2 free", "0000:65:00.0"] {
        ensure!(shown.contains(text), "{text:?} is not shown: {shown}");
    }
    let all = ["--dedicated-cpus", "--hugepages", "2MiB", "--device", CARD];
    let first = create(cluster, "first", &all, true).await?;
    let had = grant(cluster, &first).await?;
    ensure!(had["cpus"].as_array().map(Vec::len) == Some(1) && had["huge_pages"] == 32, "{had}");
    until_free(cluster, [0, 32, 1]).await?;

    // Each of these wants more than there is, of one thing.
    let cpu = create(cluster, "cpu", &["--dedicated-cpus"], false).await?;
    until_waits(cluster, &cpu, "1 dedicated processor").await?;
    let both = create(cluster, "both", &["--device", "10de:2204=2"], false).await?;
    until_waits(cluster, &both, "2 PCI devices 10de:2204").await?;
    let explained = cluster.ctl(&["instance", "explain", "both"]).await?;
    ensure!(explained.contains("2 PCI devices 10de:2204"), "{explained}");

    // What was given cannot move, change or be given again, whoever dies.
    let refused = refusal(cluster, &["instance", "update", "first", "--memory", "128MiB"]).await;
    ensure!(refused.contains("huge pages"), "{refused}");
    let refused = refusal(cluster, &["vm", "migrate", "first"]).await;
    ensure!(refused.contains("devices of its node"), "{refused}");
    let refused = refusal(
        cluster,
        &["instance", "create", "c", "--type", "container", "--image", "tiny", "--dedicated-cpus"],
    )
    .await;
    ensure!(refused.contains("spec.devices"), "{refused}");
    cluster.agent(0).context("the agent")?.kill()?;
    cluster.revive().await?;
    cluster.server().context("the server")?.kill()?;
    cluster.revive().await?;
    cluster.until_ready(1).await?;
    until_free(cluster, [0, 32, 1]).await?;
    let second = create(cluster, "second", &["--device", CARD], true).await?;
    ensure!(grant(cluster, &first).await? == had, "what the first has changed");
    let has = grant(cluster, &second).await?;
    ensure!(has["pci"] != had["pci"] && has["pci"].as_array().map(Vec::len) == Some(1), "{has} and {had}");

    // What is given back goes to those that wait.
    cluster.ctl(&["instance", "delete", "first"]).await?;
    until_free(cluster, [0, 64, 1]).await?;
    cluster.ctl(&["instance", "delete", "second"]).await?;
    until_free(cluster, [0, 64, 0]).await?;
    let cards = grant(cluster, &both).await?["pci"].as_array().cloned().unwrap_or_default();
    let cards: BTreeSet<_> = cards.iter().filter_map(Value::as_str).collect();
    ensure!(cards == BTreeSet::from(["0000:17:00.0", "0000:65:00.0"]), "{cards:?}");
    cluster.ctl(&["instance", "delete", "both", "cpu"]).await?;
    until_free(cluster, [1, 64, 2]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_runs_on_the_processor_that_it_was_given() -> Result<()> {
    if image_dir().is_none() {
        skip("hv-testkit devices", "there is no guest image: run hack/setup.sh images");
        return Ok(());
    }
    let tree = tempfile::tempdir()?;
    let mut cluster = begin("qemu", tree.path()).await?;
    let outcome = pinned(&mut cluster).await;
    outcome.map_err(|error| error.context(cluster.logs()))
}

async fn pinned(cluster: &mut Cluster) -> Result<()> {
    let cpu = a_processor()?;
    let id = create(cluster, "pinned", &["--dedicated-cpus"], true).await?;
    ensure!(processors_of(&id)? == [cpu.clone()], "the guest's processor is bound elsewhere");
    cluster.agent(0).context("the agent")?.kill()?;
    cluster.revive().await?;
    cluster.ctl(&["instance", "restart", "pinned", "--force"]).await?;
    ensure!(processors_of(&id)? == [cpu], "the guest's processor is bound elsewhere after a restart");
    let other = create(cluster, "other", &["--dedicated-cpus"], false).await?;
    until_waits(cluster, &other, "1 dedicated processor").await?;
    cluster.ctl(&["instance", "delete", "other", "pinned"]).await?;
    until_free(cluster, [1, 64, 2]).await
}

/// What the threads of a guest's processors may run on, by the names that QEMU gives them.
fn processors_of(id: &str) -> Result<Vec<String>> {
    let pid = *qemu_processes(id)?.first().context("no process runs")?;
    let mut allowed = Vec::new();
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))?.flatten().map(|task| task.path()) {
        if std::fs::read_to_string(task.join("comm"))?.starts_with("CPU ") {
            let status = std::fs::read_to_string(task.join("status"))?;
            let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
            allowed.push(list.context("processors")?.trim().to_owned());
        }
    }
    Ok(allowed)
}
