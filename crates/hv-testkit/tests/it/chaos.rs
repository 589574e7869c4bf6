//! Real processes that are killed, frozen and cut off under load. Short here; `make chaos` runs for as long as one likes.
//!
//! `HYPERVISOR_CHAOS_MINUTES` lengthens the storm, `CHAOS_SEED` repeats its choices.

use std::time::Duration;

use anyhow::{Result, ensure};
use hv_testkit::chaos::{
    Dice, LoadOptions, World, WorldOptions, etcd_storm, leader_killed, node_cut_off, storm,
};

/// How long the storm lasts in the tests.
const STORM: Duration = Duration::from_secs(40);
/// How long etcd's leader is killed in the tests, and how often.
const ETCD_STORM: Duration = Duration::from_secs(30);
const EVERY: Duration = Duration::from_secs(5);
/// How long a leader lives without a sign of life, as configured by default.
const LEADER_TTL: Duration = Duration::from_secs(5);
/// What a busy machine of two cores adds to what is promised, which `make bench` holds on a quiet one.
const BUSY: Duration = Duration::from_secs(5);

fn storm_time() -> Duration {
    let minutes = std::env::var("HYPERVISOR_CHAOS_MINUTES").ok().and_then(|text| text.parse().ok());
    minutes.map_or(STORM, |minutes: u64| Duration::from_secs(60 * minutes))
}

fn no_violation(world: &World, violations: &[String]) -> Result<()> {
    ensure!(violations.is_empty(), "{}\n{}", violations.join("\n"), world.cluster.logs());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_stuck_or_doubled_whatever_dies_hangs_or_is_cut_off() -> Result<()> {
    let options = WorldOptions { network: true, shim: true, ..WorldOptions::default() };
    let Some(mut world) = World::start("hv-testkit chaos", options).await? else { return Ok(()) };
    let run = storm(&mut world, storm_time(), &LoadOptions::default(), Dice::from_env("CHAOS_SEED")).await?;
    ensure!(run.verdict.instances > 10 && run.faults.len() > 3, "nearly nothing happened: {run:?}");
    no_violation(&world, &run.verdict.violations)
}

#[tokio::test(flavor = "multi_thread")]
async fn no_call_through_another_server_fails_when_the_leader_dies() -> Result<()> {
    // More room than the callers fill.
    let options = WorldOptions { cores: 100_000, ..WorldOptions::default() };
    let Some(mut world) = World::start("hv-testkit chaos", options).await? else { return Ok(()) };
    let rounds = leader_killed(&mut world, 2).await.map_err(|error| error.context(world.cluster.logs()))?;
    for round in rounds {
        ensure!(round.calls > 20, "nearly nothing was asked: {round:?}");
        ensure!(round.failed.is_empty(), "calls through other servers failed: {round:?}");
        ensure!(round.next_placement < LEADER_TTL + BUSY, "the next placement took {round:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn instances_of_a_node_that_is_cut_off_run_elsewhere_and_never_twice() -> Result<()> {
    let options = WorldOptions { members: 1, servers: 2, network: true, ..WorldOptions::default() };
    let (ttl, grace) = (options.ttl, options.grace);
    let Some(mut world) = World::start("hv-testkit chaos", options).await? else { return Ok(()) };
    let rounds = node_cut_off(&mut world, 5, 6, &mut Dice::from_env("CHAOS_SEED")).await;
    let rounds = rounds.map_err(|error| error.context(world.cluster.logs()))?;
    for round in rounds {
        let limit = ttl + grace + Duration::from_secs(2) + BUSY;
        ensure!(round.elsewhere.is_none_or(|time| time < limit), "it took too long: {round:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_acknowledged_is_lost_when_etcds_leader_dies_again_and_again() -> Result<()> {
    let Some(mut world) = World::start("hv-testkit chaos", WorldOptions::default()).await? else {
        return Ok(());
    };
    let storm = etcd_storm(&mut world, ETCD_STORM, EVERY, &mut Dice::from_env("CHAOS_SEED")).await;
    let storm = storm.map_err(|error| error.context(world.cluster.logs()))?;
    ensure!(storm.kills >= 3 && storm.calls > 100, "nearly nothing happened: {storm:?}");
    eprintln!("{storm:?}");
    no_violation(&world, &storm.violations)
}
