//! How long it takes until things go on: after the leading server died, after a node was cut off, after etcd's leader died.

use std::time::Duration;

use anyhow::{Context, Result};
use hv_testkit::chaos::{
    CutRound, Dice, LeaderRound, World, WorldOptions, etcd_storm, leader_killed, node_cut_off,
};
use hv_testkit::{median, percentile};
use serde_json::json;

use crate::report::{Bar, Row};

/// How long a leader lives without a sign of life, as configured by default.
const LEADER_TTL_S: f64 = 5.0;
/// How often the leader is killed, and a node cut off.
const LEADERS: usize = 3;
const CUTS: usize = 9;
/// Cores of a node that the callers do not fill.
const ROOM: u32 = 100_000;
/// Instances on the nodes that are cut off.
const INSTANCES: usize = 6;
/// For how long etcd's leader is killed, and how often; `hypervisor-chaos etcd` does it for ten minutes.
const STORM: Duration = Duration::from_secs(40);
const EVERY: Duration = Duration::from_secs(5);
/// How soon calls are to be answered as fast as before.
const RECOVERED_S: f64 = 5.0;
/// The bench measures the same every time.
const SEED: u64 = 3;

async fn world(options: WorldOptions) -> Result<World> {
    World::start("bench", options).await?.context("etcd or network namespaces are missing")
}

pub(crate) async fn leader() -> Result<Vec<Row>> {
    let mut world = world(WorldOptions { cores: ROOM, ..WorldOptions::default() }).await?;
    let rounds = leader_killed(&mut world, LEADERS).await?;
    let calls: usize = rounds.iter().map(|round| round.calls).sum();
    let failed: Vec<_> = rounds.iter().flat_map(|round: &LeaderRound| round.failed.clone()).collect();
    let times: Vec<f64> = rounds.iter().map(|round| round.next_placement.as_secs_f64()).collect();
    let raw = json!({ "next_placement_s": times, "calls": calls, "failed": failed, "servers": 3, "etcd_members": 3 });
    Ok(vec![
        Row {
            measure: format!("leader killed: failed calls through other servers, of {calls}"),
            unit: "calls",
            bar: Some(Bar::Most(0.0)),
            measured: failed.len() as f64,
            baseline: None,
            raw: raw.clone(),
        },
        Row {
            measure: format!("leader killed: until the next placement, worst of {LEADERS}"),
            unit: "s",
            bar: Some(Bar::Most(LEADER_TTL_S + 1.0)),
            measured: percentile(&times, 100.0),
            baseline: Some(("the leader's lease".into(), LEADER_TTL_S)),
            raw,
        },
    ])
}

pub(crate) async fn cut_off() -> Result<Vec<Row>> {
    let options = WorldOptions { members: 1, servers: 2, network: true, ..WorldOptions::default() };
    let least = (options.ttl + options.grace).as_secs_f64();
    let mut world = world(options).await?;
    let rounds = node_cut_off(&mut world, CUTS, INSTANCES, &mut Dice::new(SEED)).await;
    let rounds = rounds.map_err(|error| error.context(world.cluster.logs()))?;
    let time = |round: &CutRound| Some(round.elsewhere?.as_secs_f64());
    let times: Vec<f64> = rounds.iter().filter_map(time).collect();
    let told: Vec<_> =
        rounds.iter().map(|round| json!({ "cut": format!("{:?}", round.cut), "s": time(round) })).collect();
    Ok(vec![Row {
        measure: format!(
            "node cut off: until its instances run elsewhere, worst of {}, never two at once",
            times.len()
        ),
        unit: "s",
        bar: Some(Bar::Most(least + 2.0)),
        measured: percentile(&times, 100.0),
        baseline: Some(("lease and grace".into(), least)),
        raw: json!({ "rounds": told, "median_s": median(&times), "two_at_once": 0, "cuts": rounds.len() }),
    }])
}

pub(crate) async fn etcd() -> Result<Vec<Row>> {
    let mut world = world(WorldOptions::default()).await?;
    let storm = etcd_storm(&mut world, STORM, EVERY, &mut Dice::new(SEED)).await?;
    let recovered: Vec<f64> = storm.recovered.iter().map(Duration::as_secs_f64).collect();
    let raw = json!({
        "kills": storm.kills, "calls": storm.calls, "seconds": STORM.as_secs(), "violations": storm.violations,
        "p99_ms": storm.p99.as_secs_f64() * 1e3, "slowest_ms": storm.slowest.as_secs_f64() * 1e3,
        "calm_p99_ms": storm.calm_p99.as_secs_f64() * 1e3, "recovered_s": recovered,
    });
    Ok(vec![
        Row {
            measure: format!(
                "etcd's leader killed every {} s: acknowledged calls lost or stuck, of {}",
                EVERY.as_secs(),
                storm.calls
            ),
            unit: "calls",
            bar: Some(Bar::Most(0.0)),
            measured: storm.violations.len() as f64,
            baseline: None,
            raw: raw.clone(),
        },
        Row {
            measure: format!("etcd's leader killed: until calls are fast again, worst of {}", storm.kills),
            unit: "s",
            bar: Some(Bar::Most(RECOVERED_S)),
            measured: percentile(&recovered, 100.0),
            baseline: None,
            raw,
        },
    ])
}
