//! Runs random histories of whole clusters: `simulate --seeds N --from S --jobs J`, or one of them with `--seed S --trace`.

use std::time::Instant;

use anyhow::{Context, Result, bail};
use hv_testkit::simulation::{Bug, Outcome, run, run_all};

const USAGE: &str = "usage: simulate [--seeds N] [--from S] [--jobs J] [--bug NAME] [--all] | --seed S [--trace] [--bug NAME]";
/// How many histories pass between two lines.
const LINE_EVERY: u64 = 1000;

struct Options {
    seeds: u64,
    from: u64,
    jobs: usize,
    one: Option<u64>,
    trace: bool,
    bug: Option<Bug>,
    /// Go on after a failure.
    all: bool,
}

fn options() -> Result<Options> {
    let mut options =
        Options { seeds: 1000, from: 0, jobs: 2, one: None, trace: false, bug: None, all: false };
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let mut value = || arguments.next().context(USAGE);
        match name.as_str() {
            "--seeds" => options.seeds = value()?.parse()?,
            "--from" => options.from = value()?.parse()?,
            "--jobs" => options.jobs = value()?.parse()?,
            "--seed" => options.one = Some(value()?.parse()?),
            "--bug" => options.bug = Some(value()?.parse().map_err(anyhow::Error::msg)?),
            "--trace" => options.trace = true,
            "--all" => options.all = true,
            _ => bail!(USAGE),
        }
    }
    Ok(options)
}

fn tell(outcome: &Outcome, with_tail: bool) {
    let Some(violation) = &outcome.violation else { return };
    if with_tail {
        outcome.tail.iter().for_each(|line| println!("    {line}"));
    }
    println!("seed {} breaks invariant {}: {}", outcome.seed, violation.invariant, violation.what);
}

fn main() -> Result<()> {
    let options = options()?;
    if let Some(seed) = options.one {
        let outcome = run(seed, options.bug, options.trace)?;
        println!("seed {seed}: {} events, hash {:016x}", outcome.events, outcome.hash);
        tell(&outcome, !options.trace);
        return if outcome.violation.is_some() { bail!("an invariant is broken") } else { Ok(()) };
    }
    let (begin, mut failed, mut done, mut events) = (Instant::now(), 0u64, 0u64, 0u64);
    run_all(options.from..options.from + options.seeds, options.jobs, options.bug, |outcome| {
        done += 1;
        events += outcome.events;
        if outcome.violation.is_some() {
            failed += 1;
            tell(&outcome, !options.all);
        }
        if done.is_multiple_of(LINE_EVERY) || done == options.seeds {
            let seconds = begin.elapsed().as_secs_f64();
            println!(
                "{done} histories, {failed} failed, {events} events, {seconds:.0} s, {:.0} histories/s",
                done as f64 / seconds
            );
        }
        failed == 0 || options.all
    })?;
    if failed > 0 {
        bail!("{failed} of {done} histories break an invariant; replay one with --seed S --trace");
    }
    Ok(())
}
