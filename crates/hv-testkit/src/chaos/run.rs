//! A run: load, one fault after another, mending, and the check.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::check::{Verdict, check};
use super::dice::Dice;
use super::faults::{Fault, Weather};
use super::load::{Load, LoadOptions};
use super::world::World;

/// The longest pause between two faults, in which things may recover or not.
const CALM: Duration = Duration::from_secs(3);

/// What a run was.
#[derive(Debug)]
pub struct Run {
    /// The faults that were done, in their order.
    pub faults: Vec<(Fault, Duration)>,
    /// What came of it.
    pub verdict: Verdict,
}

/// Lets it rain for so long, and checks everything afterwards. Each fault is printed as it comes.
///
/// # Errors
/// A fault cannot be done or undone, or the end cannot be looked at.
pub async fn storm(world: &mut World, lasts: Duration, load: &LoadOptions, mut dice: Dice) -> Result<Run> {
    let clients = world.clients()?;
    let running = Load::start(&clients, load, &mut dice);
    let mut weather = Weather::of(world, dice.fork());
    let begin = Instant::now();
    let mut faults = Vec::new();
    while begin.elapsed() < lasts {
        let (fault, time) = weather.draw();
        eprintln!(
            "{:7.1} s: {fault} for {time:.1?}, {} calls answered",
            begin.elapsed().as_secs_f64(),
            running.answered()
        );
        faults.push((fault, time));
        let suffered = world.suffer(fault, time).await;
        suffered.with_context(|| format!("{fault} for {time:?}: {}", world.cluster.logs()))?;
        world.revive().await?;
        tokio::time::sleep(dice.between(Duration::ZERO, CALM)).await;
    }
    world.etcd.until_healthy().await?;
    world.until_ready().await?;
    let verdict = check(world, running.finish().await).await?;
    eprintln!("{} faults, {} calls, {} instances", faults.len(), verdict.calls, verdict.instances);
    Ok(Run { faults, verdict })
}
