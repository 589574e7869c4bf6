//! Instances of every type, and the ends of what looks after them: the agent, the runtimes' daemons, and the instances
//! themselves.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hv_client::ComputeClient;
use hv_proto::v1;
use hv_testkit::{Ask, image_dir, skip, until, until_gone, until_settled};
use rustix::process::{Pid, Signal, kill_process};

use crate::runtimes::Runtimes;

/// More room than all instances of a test take.
const ROOM: Option<(u32, u64)> = Some((256, 1 << 40));
/// How long `hypervisor-ctl` may wait on a busy machine.
const PATIENCE: &str = "240s";
/// Far less than the time between two looks at a node, and more than a busy machine needs.
const AT_ONCE: Duration = Duration::from_secs(20);
/// Type, image, and how many of it there are when the agent dies and in the end.
const FLEET: [(&str, &str, usize, usize); 3] =
    [("vm", "tiny", 1, 2), ("container", "hello-container", 30, 40), ("microvm", "hello-microvm", 5, 8)];
/// Counts, in a container's shell.
const CLOCK: &str = "i=0; while true; do i=$((i+1)); echo tick $i; sleep 0.2; done";

async fn node(of: &str) -> Result<Option<Runtimes>> {
    let Some(images) = image_dir() else {
        skip(of, "there is no guest image: run hack/setup.sh images");
        return Ok(None);
    };
    let node = Runtimes::start(images, ROOM).await?;
    for (kind, ..) in FLEET {
        match node.lacks(kind) {
            Some(why) => skip(&format!("{of}, {kind}"), &why),
            None if kind == "vm" => {}
            None => node.pull(kind).await?,
        }
    }
    Ok(Some(node))
}

/// The runtime's processes of an instance: QEMU, Firecracker, or a container's shim and the keeper of its log.
fn processes(id: &str) -> Result<Vec<u32>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let entry = entry?;
        let Ok(pid) = entry.file_name().to_string_lossy().parse() else { continue };
        // It may end between the two looks.
        let Ok(command) = std::fs::read(entry.path().join("cmdline")) else { continue };
        let command = String::from_utf8_lossy(&command).into_owned();
        let program = command.split('\0').next().unwrap_or_default();
        let runs = ["qemu-system", "firecracker", "containerd-shim", "hypervisor-agent"];
        if runs.iter().any(|name| program.contains(name)) && command.contains(id) {
            found.push(pid);
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// The first process in a container: the child of its shim.
fn first_process(shim: u32) -> Result<u32> {
    let children = std::fs::read_to_string(format!("/proc/{shim}/task/{shim}/children"))?;
    Ok(children.split_whitespace().next().context("the shim has no child")?.parse()?)
}

/// What must not change where nothing was done to an instance.
#[derive(Debug, PartialEq)]
struct Undisturbed {
    processes: Vec<u32>,
    restarts: u32,
    /// In seconds and nanoseconds.
    started_at: Option<(i64, i32)>,
}

async fn look(client: &ComputeClient, id: &str) -> Result<Undisturbed> {
    let running = until_settled(client, id, v1::InstanceState::Running).await?;
    let processes = processes(id)?;
    ensure!(!processes.is_empty(), "instance {id} is RUNNING without a process");
    let started_at = running.started_at.map(|at| (at.seconds, at.nanos));
    Ok(Undisturbed { processes, restarts: running.restart_count, started_at })
}

async fn look_at_all(client: &ComputeClient, ids: &[String]) -> Result<BTreeMap<String, Undisturbed>> {
    let mut all = BTreeMap::new();
    for id in ids {
        all.insert(id.clone(), look(client, id).await?);
    }
    Ok(all)
}

/// Asks for some of a type and does not wait; their ids.
async fn ask_for(
    client: &ComputeClient,
    (kind, image): (&str, &str),
    name: &str,
    count: usize,
) -> Result<Vec<String>> {
    let kind = match kind {
        "vm" => v1::InstanceType::Vm,
        "container" => v1::InstanceType::Container,
        _ => v1::InstanceType::Microvm,
    };
    let memory_bytes = 128 << 20;
    let spec = v1::InstanceSpec { image: image.into(), cpu_cores: 1, memory_bytes, ..Default::default() };
    let template = v1::CreateInstanceRequest {
        name: name.into(),
        r#type: kind.into(),
        spec: Some(spec),
        ..v1::CreateInstanceRequest::default()
    };
    let request = v1::CreateInstancesRequest { template: Some(template), count: u32::try_from(count)? };
    let created = client.clone().create_instances(request).await?.into_inner().instances;
    Ok(created.into_iter().map(|instance| instance.id).collect())
}

/// The ticks that a clock has printed so far.
async fn ticks(node: &Runtimes) -> Result<Vec<u64>> {
    let log = node.cluster.ctl(&["instance", "logs", "clock"]).await?;
    let numbers = log.lines().filter_map(|line| line.trim().strip_prefix("tick ")?.parse().ok());
    Ok(numbers.collect())
}

/// The clock has gone on since it printed `before`, and nothing that it printed is missing.
async fn clock_goes_on(node: &Runtimes, before: u64) -> Result<()> {
    let ticks = until("the clock to go on", async || {
        let ticks = ticks(node).await?;
        Ok(ticks.last().is_some_and(|last| *last > before + 5).then_some(ticks))
    })
    .await?;
    ensure!(ticks.iter().copied().eq(1..=ticks.len() as u64), "ticks are missing: {ticks:?}");
    Ok(())
}

/// One of each type shows its statistics and, to a console that comes late, what it said first.
async fn one_of_each_shows_itself(node: &Runtimes, names: &[String]) -> Result<()> {
    for name in names {
        node.cluster.ctl(&["instance", "stats", name]).await?;
        let console = ["instance", "console", name, "--until", "hello", "--timeout", PATIENCE];
        node.cluster.ctl(&console).await?;
    }
    Ok(())
}

async fn live_through(node: &mut Runtimes) -> Result<()> {
    let client = node.cluster.clients()?.compute();
    let fleet: Vec<_> = FLEET.into_iter().filter(|(kind, ..)| node.lacks(kind).is_none()).collect();
    let has_clock = node.lacks("container").is_none();
    if has_clock {
        let create = ["instance", "create", "clock", "--type", "container", "--image", "hello-container"];
        let command = ["--timeout", PATIENCE, "--", "sh", "-c", CLOCK];
        node.cluster.ctl(&[&create[..], &command[..]].concat()).await?;
    }
    let mut ids = Vec::new();
    for (kind, image, at_first, _) in &fleet {
        ids.extend(ask_for(&client, (kind, image), &format!("{kind}-early"), *at_first).await?);
    }
    let before = look_at_all(&client, &ids).await?;
    let ticked = if has_clock { ticks(node).await?.last().copied().unwrap_or_default() } else { 0 };

    // In the middle of making the rest.
    for (kind, image, at_first, in_the_end) in &fleet {
        ids.extend(ask_for(&client, (kind, image), &format!("{kind}-late"), in_the_end - at_first).await?);
    }
    node.cluster.agent(0).context("there is an agent")?.kill()?;
    node.cluster.start_agent(0, &[]).await?;
    let all = look_at_all(&client, &ids).await?;
    for (id, was) in &before {
        ensure!(all.get(id) == Some(was), "{id} was disturbed: {was:?} became {:?}", all.get(id));
    }
    ensure!(all.values().all(|now| now.restarts == 0), "some were started again: {all:?}");
    let one_of_each: Vec<_> = fleet.iter().map(|(kind, ..)| format!("{kind}-early-1")).collect();
    one_of_each_shows_itself(node, &one_of_each).await?;
    if has_clock {
        clock_goes_on(node, ticked).await?;
    }

    // An upgrade: the program is asked to end, and another takes its place.
    node.cluster.agent(0).context("there is an agent")?.terminate().await?;
    ensure!(
        ids.iter().all(|id| processes(id).is_ok_and(|found| !found.is_empty())),
        "one ended with the agent"
    );
    node.cluster.start_agent(0, &[]).await?;
    let again = look_at_all(&client, &ids).await?;
    ensure!(again == all, "some were disturbed: {all:?} became {again:?}");
    one_of_each_shows_itself(node, &one_of_each).await?;
    for id in &ids {
        Ask::Delete.send(&client, id, &format!("delete-{id}")).await?;
    }
    for id in &ids {
        until_gone(&client, id).await?;
        ensure!(processes(id)?.is_empty(), "{id} is gone, and its processes are not");
    }
    if has_clock {
        node.cluster.ctl(&["instance", "delete", "clock", "--timeout", PATIENCE]).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_mixed_instances_do_not_notice_that_their_agent_dies_or_is_replaced() -> Result<()> {
    let Some(mut node) = node("hv-testkit survival").await? else { return Ok(()) };
    let outcome = live_through(&mut node).await;
    outcome.map_err(|error| error.context(node.cluster.logs()))
}

fn kill(pid: u32) -> Result<()> {
    let pid = Pid::from_raw(i32::try_from(pid)?).context("no process id")?;
    Ok(kill_process(pid, Signal::KILL)?)
}

/// Kills what runs of an instance as a fault of the runtime would.
fn strike(kind: &str, id: &str) -> Result<()> {
    let found = processes(id)?;
    let program = |pid: &u32| std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    if kind == "container" {
        let shim = found.iter().find(|pid| program(pid).starts_with("containerd-shim"));
        return kill(first_process(*shim.context("there is no shim")?)?);
    }
    found.into_iter().try_for_each(kill)
}

async fn dies(node: &Runtimes, kind: &str, image: &str) -> Result<()> {
    let client = node.cluster.clients()?.compute();
    for policy in ["never", "always"] {
        let name = format!("{kind}-{policy}");
        let create = ["instance", "create", &name, "--type", kind, "--image", image, "--memory", "128MiB"];
        let options = ["--restart", policy, "--timeout", PATIENCE, "-o", "name"];
        node.cluster.ctl(&[&create[..], &options[..]].concat()).await?;
        let get = v1::GetInstanceRequest { instance_id: instance_id(&client, &name).await? };
        let before = look(&client, &get.instance_id).await?;
        let begun = Instant::now();
        strike(kind, &get.instance_id)?;
        let seen = until(&format!("the end of {name} to be seen"), async || {
            let seen = client.clone().get_instance(get.clone()).await?.into_inner();
            let told = seen.state() != v1::InstanceState::Running || seen.restart_count > 0;
            Ok(told.then_some(seen))
        })
        .await?;
        println!("{name}: seen after {:.2?}: {:?}: {}", begun.elapsed(), seen.state(), seen.state_reason);
        if policy == "always" {
            until(&format!("{name} to be started again"), async || {
                let seen = client.clone().get_instance(get.clone()).await?.into_inner();
                let runs = seen.state() == v1::InstanceState::Running && seen.restart_count == 1;
                Ok(runs.then_some(()))
            })
            .await?;
            ensure!(
                look(&client, &get.instance_id).await?.processes != before.processes,
                "{name} never died"
            );
        } else {
            let failed = until_settled(&client, &get.instance_id, v1::InstanceState::Failed).await?;
            ensure!(!failed.state_reason.is_empty(), "{name} FAILED without a reason");
            ensure!(failed.restart_count == 0, "{name} was started again");
        }
        node.cluster.ctl(&["instance", "delete", &name, "--timeout", PATIENCE]).await?;
    }
    Ok(())
}

async fn instance_id(client: &ComputeClient, name: &str) -> Result<String> {
    let list = client.clone().list_instances(v1::ListInstancesRequest::default()).await?.into_inner();
    let found = list.instances.into_iter().find(|instance| instance.name == name);
    Ok(found.with_context(|| format!("there is no instance {name}"))?.id)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_dies_is_seen_and_started_again_as_its_policy_says() -> Result<()> {
    let Some(node) = node("hv-testkit survival").await? else { return Ok(()) };
    for (kind, image, ..) in FLEET {
        if node.lacks(kind).is_none() {
            dies(&node, kind, image).await.map_err(|error| error.context(node.cluster.logs()))?;
        }
    }
    Ok(())
}

async fn containerd_dies(node: &mut Runtimes) -> Result<()> {
    let client = node.cluster.clients()?.compute();
    let mut cluster_client = node.cluster.clients()?.cluster();
    let ids = ask_for(&client, ("container", "hello-container"), "steady", 3).await?;
    let before = look_at_all(&client, &ids).await?;
    let mut driver = async |healthy: bool| {
        until("the node to tell of containerd", async || {
            let request = v1::GetNodeRequest { node_id: "node-0".into() };
            let node = cluster_client.get_node(request).await?.into_inner();
            let found = node.drivers.into_iter().find(|driver| driver.name == "containerd");
            Ok(found.filter(|driver| driver.healthy == healthy))
        })
        .await
    };
    driver(true).await?;
    let daemon = node.containerd.as_mut().context("there is a containerd")?;
    daemon.kill()?;
    let begun = Instant::now();
    let told = driver(false).await?;
    println!("containerd's end: told after {:.2?}: {}", begun.elapsed(), told.message);
    ensure!(told.message.contains("containerd"), "{}", told.message);
    ensure!(begun.elapsed() < AT_ONCE, "the node waited for its next look");
    // It stays so, and disturbs nobody.
    tokio::time::sleep(Duration::from_secs(1)).await;
    ensure!(look_at_all(&client, &ids).await? == before, "containers were disturbed by its end");
    daemon.run().await?;
    let begun = Instant::now();
    driver(true).await?;
    println!("containerd's return: told after {:.2?}", begun.elapsed());
    ensure!(look_at_all(&client, &ids).await? == before, "containers were disturbed by its return");
    let late = ask_for(&client, ("container", "hello-container"), "late", 1).await?;
    look_at_all(&client, &late).await?;
    for id in ids.iter().chain(&late) {
        Ask::Delete.send(&client, id, &format!("delete-{id}")).await?;
        until_gone(&client, id).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_containerd_is_told_and_no_container_notices() -> Result<()> {
    let Some(mut node) = node("hv-testkit survival").await? else { return Ok(()) };
    if node.containerd.is_none() {
        return Ok(());
    }
    let outcome = containerd_dies(&mut node).await;
    outcome.map_err(|error| error.context(node.cluster.logs()))
}
