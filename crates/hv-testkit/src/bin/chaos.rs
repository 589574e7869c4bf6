//! `make chaos`: the long runs of whole-process chaos, of which the tests do the first minutes.
//!
//! ```text
//! hypervisor-chaos storm [MINUTES]        everything at once, from a seed
//! hypervisor-chaos cut-off [ROUNDS]       nodes cut off, never two of an instance at once
//! hypervisor-chaos leader [ROUNDS]        the leading server killed
//! hypervisor-chaos etcd [MINUTES]         etcd's leader killed every five seconds
//! ```
//! `CHAOS_SEED` repeats the choices of a run. The programs are those beside this one, or in `TESTKIT_PROGRAMS`.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use hv_testkit::chaos::{
    Dice, LoadOptions, World, WorldOptions, etcd_storm, leader_killed, node_cut_off, storm,
};
use hv_testkit::{median, percentile};

/// How often etcd's leader is killed.
const EVERY: Duration = Duration::from_secs(5);
/// Instances that are on the cut nodes together.
const INSTANCES: usize = 6;
/// Cores of a node that the callers do not fill.
const ROOM: u32 = 100_000;
/// What skips are reported for.
const SUITE: &str = "hypervisor-chaos";

#[tokio::main]
async fn main() -> Result<()> {
    let what = std::env::args().nth(1).unwrap_or_else(|| "storm".into());
    let amount = |default: u64| -> Result<u64> {
        std::env::args().nth(2).map_or(Ok(default), |text| text.parse().context("the amount is a number"))
    };
    let dice = Dice::from_env("CHAOS_SEED");
    match what.as_str() {
        "storm" => rain(amount(10)?, dice).await,
        "cut-off" => cut_off(usize::try_from(amount(200)?)?, dice).await,
        "leader" => leader(usize::try_from(amount(10)?)?).await,
        "etcd" => etcd(amount(10)?, dice).await,
        _ => bail!("unknown: {what}; storm, cut-off, leader or etcd"),
    }
}

async fn world(options: WorldOptions) -> Result<World> {
    World::start(SUITE, options).await?.context("it cannot be done here; the reason is above")
}

async fn rain(minutes: u64, dice: Dice) -> Result<()> {
    let mut world = world(WorldOptions { network: true, shim: true, ..WorldOptions::default() }).await?;
    let run = storm(&mut world, Duration::from_secs(60 * minutes), &LoadOptions::default(), dice).await?;
    finish(&world, run.verdict.violations)
}

async fn cut_off(rounds: usize, mut dice: Dice) -> Result<()> {
    let options =
        WorldOptions { members: 1, servers: 2, agents: 3, network: true, ..WorldOptions::default() };
    let mut world = world(options).await?;
    let done = node_cut_off(&mut world, rounds, INSTANCES, &mut dice).await;
    let done = done.map_err(|error| error.context(world.cluster.logs()))?;
    let times: Vec<f64> = done.iter().filter_map(|round| Some(round.elsewhere?.as_secs_f64())).collect();
    println!(
        "{} cuts, never two at once; elsewhere after: median {:.2} s, most {:.2} s ({} times)",
        done.len(),
        median(&times),
        percentile(&times, 100.0),
        times.len()
    );
    Ok(())
}

async fn leader(rounds: usize) -> Result<()> {
    let mut world = world(WorldOptions { cores: ROOM, ..WorldOptions::default() }).await?;
    let done = leader_killed(&mut world, rounds).await?;
    for round in &done {
        println!(
            "next placement after {:.2?}; {} calls, failed: {:?}",
            round.next_placement, round.calls, round.failed
        );
    }
    ensure!(done.iter().all(|round| round.failed.is_empty()), "calls through other servers failed");
    Ok(())
}

async fn etcd(minutes: u64, mut dice: Dice) -> Result<()> {
    let mut world = world(WorldOptions::default()).await?;
    let storm = etcd_storm(&mut world, Duration::from_secs(60 * minutes), EVERY, &mut dice).await?;
    let slowest = storm.recovered.iter().max().copied().unwrap_or_default();
    println!(
        "{} kills, {} calls; p99 {:.0?} (calm {:.0?}), slowest {:.0?}; recovered within {slowest:.1?}",
        storm.kills, storm.calls, storm.p99, storm.calm_p99, storm.slowest
    );
    finish(&world, storm.violations)
}

fn finish(world: &World, violations: Vec<String>) -> Result<()> {
    for violation in &violations {
        println!("VIOLATION: {violation}");
    }
    ensure!(violations.is_empty(), "{} violations\n{}", violations.len(), world.cluster.logs());
    println!("nothing was lost, nothing is stuck, nothing ran twice");
    Ok(())
}
