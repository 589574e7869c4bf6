//! The three failures whose times are promised: the leader, a node that is cut off, etcd's leader.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hv_client::Clients;
use hv_proto::v1;
use tokio::task::JoinSet;

use super::check::check;
use super::dice::Dice;
use super::load::{Load, LoadOptions};
use super::world::{World, info};
use crate::instances::create_request;
use crate::netns::Cut;
use crate::probe::until;
use crate::usage::percentile;

/// The pause between two calls of a client that goes through a server that does not lead.
const CALL_PAUSE: Duration = Duration::from_millis(20);
/// The pause between two looks at something whose time is measured.
const LOOK: Duration = Duration::from_millis(10);
/// How long a scenario may wait for what it measures.
const GIVE_UP: Duration = Duration::from_secs(60);

/// What one death of the leader came to.
#[derive(Clone, Debug)]
pub struct LeaderRound {
    /// From its death to the first placement by another.
    pub next_placement: Duration,
    /// Calls through other servers since its death.
    pub calls: usize,
    /// Those that failed, in words.
    pub failed: Vec<String>,
}

/// Kills the leading server so many times. The world needs at least two servers; only what goes through the others
/// is counted.
///
/// # Errors
/// Something else fails, or nothing is ever placed again.
pub async fn leader_killed(world: &mut World, rounds: usize) -> Result<Vec<LeaderRound>> {
    let mut done = Vec::new();
    for round in 0..rounds {
        let clients = world.clients()?;
        let leader = world.leader(&clients[0]).await?;
        let others: Vec<_> =
            clients.iter().enumerate().filter(|(i, _)| *i != leader).map(|(_, c)| c.clone()).collect();
        let through = others.first().context("there is no other server")?.clone();
        let stop = Arc::new(AtomicBool::new(false));
        let mut callers = JoinSet::new();
        for (caller, client) in others.into_iter().enumerate() {
            callers.spawn(keep_calling(client, format!("call{round}-{caller}"), stop.clone()));
        }
        // The callers are warm before the leader dies.
        tokio::time::sleep(CALL_PAUSE * 20).await;
        let died = Instant::now();
        world.cluster.server_at(leader).context("the leader is gone")?.kill()?;
        let next_placement = next_placement(&through, round, died).await;
        stop.store(true, Ordering::Relaxed);
        let (mut calls, mut failed) = (0, Vec::new());
        while let Some(caller) = callers.join_next().await {
            let (asked, errors) = caller?;
            calls += asked;
            failed.extend(errors);
        }
        done.push(LeaderRound { next_placement: next_placement?, calls, failed });
        world.start_server(leader).await?;
        world.until_ready().await?;
    }
    Ok(done)
}

/// Creates, reads and lists until it is stopped; how many calls, and those that failed.
async fn keep_calling(client: Clients, name: String, stop: Arc<AtomicBool>) -> (usize, Vec<String>) {
    let (mut calls, mut failed) = (0, Vec::new());
    while !stop.load(Ordering::Relaxed) {
        let begin = Instant::now();
        let mut compute = client.compute();
        let outcome = match calls % 3 {
            0 => compute.create_instance(create_request(&format!("{name}-{calls}-x"))).await.map(drop),
            1 => compute.list_instances(v1::ListInstancesRequest::default()).await.map(drop),
            _ => client.cluster().list_nodes(v1::ListNodesRequest::default()).await.map(drop),
        };
        calls += 1;
        if let Err(status) = outcome {
            failed.push(format!("after {:?}: {status}", begin.elapsed()));
        }
        tokio::time::sleep(CALL_PAUSE).await;
    }
    (calls, failed)
}

/// How long after `died` the first instance that was asked for since then is bound.
async fn next_placement(through: &Clients, round: usize, died: Instant) -> Result<Duration> {
    let created =
        through.compute().create_instance(create_request(&format!("after{round}-x"))).await?.into_inner();
    let request = v1::GetInstanceRequest { instance_id: created.id };
    loop {
        let instance = through.compute().get_instance(request.clone()).await?.into_inner();
        if !instance.node_id.is_empty() {
            return Ok(died.elapsed());
        }
        ensure!(
            died.elapsed() < GIVE_UP,
            "nothing is placed {GIVE_UP:?} after the leader's death: {}",
            instance.state_reason
        );
        tokio::time::sleep(LOOK).await;
    }
}

/// What one cut of a node came to.
#[derive(Clone, Debug)]
pub struct CutRound {
    /// What was cut.
    pub cut: Cut,
    /// How many instances were on the node.
    pub instances: usize,
    /// From the cut until the last of them ran elsewhere; `None`: the link was mended before.
    pub elsewhere: Option<Duration>,
}

/// Cuts nodes off, so many times: which one, which way and for how long is drawn. In two of three rounds the cut lasts until
/// its instances run elsewhere; otherwise it ends some time around the deadlines, which is when two could run at
/// once.
///
/// # Errors
/// Something else fails; an instance does not come to run elsewhere; or, and that is said first, one ran twice at once.
pub async fn node_cut_off(
    world: &mut World,
    rounds: usize,
    instances: usize,
    dice: &mut Dice,
) -> Result<Vec<CutRound>> {
    let clients = world.clients()?;
    let client = &clients[0];
    for index in 0..instances {
        let policy = v1::FailoverPolicy::Restart.into();
        let request =
            v1::CreateInstanceRequest { failover_policy: policy, ..create_request(&format!("ha{index}-x")) };
        client.compute().create_instance(request).await?;
    }
    let (ttl, grace) = (world.options.ttl, world.options.grace);
    let mut done = Vec::new();
    for round in 0..rounds {
        until_all_run(world, client, instances).await.with_context(|| format!("before round {round}"))?;
        let on = placed(client).await?;
        let nodes: Vec<_> = on.iter().map(|(_, node)| *node).collect::<BTreeSet<_>>().into_iter().collect();
        let victim = *dice.pick(&nodes);
        let affected: BTreeSet<_> =
            on.into_iter().filter(|(_, node)| *node == victim).map(|(id, _)| id).collect();
        let cut = *dice.pick(&[Cut::Both, Cut::Out, Cut::In]);
        let to_the_end = dice.chance(67);
        let host = world.cluster.agent_host(victim).context("there is no network")?;
        let begin = Instant::now();
        host.cut(cut)?;
        let elsewhere = match to_the_end {
            true => Some(until_elsewhere(client, &affected, victim, begin).await),
            false => {
                tokio::time::sleep(dice.between(ttl / 2, ttl + grace + ttl)).await;
                None
            }
        };
        host.heal()?;
        let elsewhere =
            elsewhere.transpose().with_context(|| format!("round {round}, cut {cut:?} of node {victim}"))?;
        let overlaps = world.truth().overlaps()?;
        ensure!(overlaps.is_empty(), "round {round}, cut {cut:?} of node {victim}: {}", overlaps.join("; "));
        done.push(CutRound { cut, instances: affected.len(), elsewhere });
        world.revive().await?;
    }
    until_all_run(world, client, instances).await?;
    let overlaps = world.truth().overlaps()?;
    ensure!(overlaps.is_empty(), "{}", overlaps.join("; "));
    Ok(done)
}

async fn instances(client: &Clients) -> Result<Vec<v1::Instance>> {
    let request = v1::ListInstancesRequest { page_size: 1000, ..v1::ListInstancesRequest::default() };
    Ok(client.compute().list_instances(request).await?.into_inner().instances)
}

/// Every instance with the index of its node.
async fn placed(client: &Clients) -> Result<Vec<(String, usize)>> {
    let placed = instances(client)
        .await?
        .into_iter()
        .filter_map(|instance| Some((instance.id, instance.node_id.strip_prefix("node-")?.parse().ok()?)));
    Ok(placed.collect())
}

/// All nodes are ready, would fence, and all instances run.
async fn until_all_run(world: &World, client: &Clients, count: usize) -> Result<()> {
    world.until_ready().await?;
    let nodes = world.options.agents;
    until("all nodes to be armed", async || {
        let request = v1::ListNodesRequest { page_size: 1000, ..v1::ListNodesRequest::default() };
        let known = client.cluster().list_nodes(request).await?.into_inner().nodes;
        let unarmed = known.iter().find(|node| !node.fencing.as_ref().is_some_and(|fencing| fencing.armed));
        if let Some(node) = unarmed {
            anyhow::bail!("node {}: {:?}", node.id, node.fencing);
        }
        Ok((known.len() == nodes).then_some(()))
    })
    .await?;
    let mut seen = Vec::new();
    until("all instances to run", async || {
        seen = instances(client).await?;
        let running = seen.iter().filter(|i| i.state() == v1::InstanceState::Running).count();
        Ok((running == count && seen.len() == count).then_some(()))
    })
    .await
    .with_context(|| {
        let told = |i: &v1::Instance| {
            format!(
                "{} {} on {:?}: {} {}",
                i.name,
                i.state().as_str_name(),
                i.node_id,
                i.state_reason,
                i.recovery_note
            )
        };
        seen.iter().map(told).collect::<Vec<_>>().join("; ")
    })
}

/// How long after `begin` all of these run on another node.
async fn until_elsewhere(
    client: &Clients,
    ids: &BTreeSet<String>,
    victim: usize,
    begin: Instant,
) -> Result<Duration> {
    let from = format!("node-{victim}");
    loop {
        let all = instances(client).await?;
        let left: Vec<_> = all
            .iter()
            .filter(|i| ids.contains(&i.id) && (i.node_id == from || i.state() != v1::InstanceState::Running))
            .collect();
        match left.first() {
            None => return Ok(begin.elapsed()),
            Some(i) => ensure!(
                begin.elapsed() < GIVE_UP,
                "{} of {} instances do not run elsewhere: {} is {} on {:?}: {} {}",
                left.len(),
                ids.len(),
                i.name,
                i.state().as_str_name(),
                i.node_id,
                i.state_reason,
                i.recovery_note
            ),
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// What came of killing etcd's leader again and again.
#[derive(Clone, Debug)]
pub struct EtcdStorm {
    /// How often it was killed.
    pub kills: usize,
    /// Calls that were answered.
    pub calls: usize,
    /// The 99th percentile of all answers, over all tries.
    pub p99: Duration,
    /// The slowest answer.
    pub slowest: Duration,
    /// The 99th percentile before the first kill.
    pub calm_p99: Duration,
    /// After each kill, how long until calls were answered within twice the calm 99th percentile (or 100 ms) again.
    pub recovered: Vec<Duration>,
    /// What must not happen and did.
    pub violations: Vec<String>,
}

/// Kills etcd's leading member every so often for so long, under load, and checks everything in the end.
///
/// # Errors
/// Something else fails.
pub async fn etcd_storm(
    world: &mut World,
    lasts: Duration,
    every: Duration,
    dice: &mut Dice,
) -> Result<EtcdStorm> {
    let clients = world.clients()?;
    let options = LoadOptions { clients: 16, pause: Duration::from_millis(50), ..LoadOptions::default() };
    let load = Load::start(&clients, &options, dice);
    let begin = Instant::now();
    tokio::time::sleep(every).await;
    let mut kills = Vec::new();
    while begin.elapsed() < lasts {
        let next = Instant::now() + every;
        if let Some(leader) = world.etcd.leader().await {
            kills.push(begin.elapsed());
            world.etcd.kill_member(leader)?;
            // A second later a service manager has it back: with two of three there is a majority meanwhile.
            tokio::time::sleep(Duration::from_secs(1)).await;
            world.etcd.start_member(leader)?;
        }
        tokio::time::sleep(next.saturating_duration_since(Instant::now())).await;
    }
    world.etcd.until_healthy().await?;
    let _ = info(&clients[0]).await;
    let book = load.finish().await;
    let millis = |calls: &mut dyn Iterator<Item = Duration>| -> Vec<f64> {
        calls.map(|took| took.as_secs_f64() * 1000.0).collect()
    };
    let to_duration = |ms: f64| Duration::from_secs_f64(if ms.is_finite() { ms / 1000.0 } else { 0.0 });
    let first = kills.first().copied().unwrap_or(lasts);
    let all = millis(&mut book.answered.iter().map(|call| call.took));
    let calm =
        millis(&mut book.answered.iter().filter(|call| call.at + call.took < first).map(|call| call.took));
    let calm_p99 = percentile(&calm, 99.0);
    let good = to_duration((calm_p99 * 2.0).max(100.0));
    let recovered = kills
        .iter()
        .enumerate()
        .map(|(index, kill)| {
            let until = kills.get(index + 1).copied().unwrap_or(lasts);
            let slow =
                book.answered.iter().filter(|c| c.at + c.took > *kill && c.at < until && c.took > good);
            slow.map(|call| (call.at + call.took).min(until) - *kill).max().unwrap_or(Duration::ZERO)
        })
        .collect();
    let calls = book.answered.len();
    let verdict = check(world, book).await?;
    Ok(EtcdStorm {
        kills: kills.len(),
        calls,
        p99: to_duration(percentile(&all, 99.0)),
        slowest: to_duration(percentile(&all, 100.0)),
        calm_p99: to_duration(calm_p99),
        recovered,
        violations: verdict.violations,
    })
}
