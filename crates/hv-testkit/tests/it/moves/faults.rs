//! Moves with a fault in them: whatever dies, breaks or is given up, in whichever phase, one copy runs afterwards, and its guest
//! has counted on, or was started anew from its disk where its only process was killed.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use hv_proto::v1::MigrationPhase;
use hv_telemetry::crash::{Point, VARIABLE};
use hv_testkit::{Cut, DEADLINE, median, until};
use rustix::process::{Pid, Signal, kill_process};

use super::SUITE;
use super::guest::Told;
use super::moving::{Disks, Ended, Moving, Options, SOURCE, TARGET};

/// How many are made if nothing else is asked for.
const RUNS: usize = 3;
/// The target's disk, where it is to be full.
const SMALL_DISK_BYTES: u64 = 64 << 20;
/// What is left of it: less than the instance's disk needs.
const LEFT_BYTES: u64 = 2 << 20;
/// The pause between two looks.
const PAUSE: Duration = Duration::from_millis(5);

/// When it happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    /// It was asked for.
    Asked,
    /// Disks are being copied.
    Disks,
    /// Memory is being sent.
    Memory,
    /// The source has sent everything and stands still; nothing was decided, as the server is held up.
    HandedOver,
    /// It is bound to the target, whose agent died before it could let it go on.
    Arriving,
}

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    SourceAgentDies,
    TargetAgentDies,
    ServerDies,
    SourceQemuDies,
    TargetQemuDies,
    /// It takes its connections, and answers nobody.
    TargetQemuHangs,
    Cancelled,
    TargetDiskFull,
    LinkCut,
    /// The process that comes to this point dies there.
    DiesAt(Point),
}

use What::{
    Cancelled, DiesAt, LinkCut, ServerDies, SourceAgentDies, SourceQemuDies, TargetAgentDies, TargetDiskFull,
    TargetQemuDies, TargetQemuHangs,
};
use When::{Arriving, Asked, HandedOver, Memory};

/// The most telling first, as few of them are made always.
const FAULTS: [(When, What); 31] = [
    (HandedOver, SourceAgentDies),
    (Memory, TargetQemuDies),
    (When::Disks, SourceQemuDies),
    (Arriving, ServerDies),
    (When::Disks, TargetDiskFull),
    (HandedOver, ServerDies),
    (Memory, Cancelled),
    (When::Disks, SourceAgentDies),
    (HandedOver, TargetQemuDies),
    (Memory, LinkCut),
    (Arriving, TargetQemuDies),
    (Memory, ServerDies),
    (HandedOver, TargetAgentDies),
    (When::Disks, TargetQemuDies),
    (Memory, SourceQemuDies),
    (Asked, ServerDies),
    (When::Disks, LinkCut),
    (Arriving, SourceQemuDies),
    (HandedOver, SourceQemuDies),
    (Memory, SourceAgentDies),
    (Memory, TargetQemuHangs),
    (Asked, DiesAt(Point::MoveCommitAfterTxn)),
    (Asked, DiesAt(Point::MoveCommitBeforeTxn)),
    (Asked, DiesAt(Point::MoveBeginAfterJournal)),
    (Asked, DiesAt(Point::MovePrepareAfter)),
    (Asked, DiesAt(Point::MoveResumeAfter)),
    (Asked, Cancelled),
    (When::Disks, Cancelled),
    (HandedOver, Cancelled),
    (Memory, TargetAgentDies),
    (When::Disks, TargetAgentDies),
];

/// Whose process comes to a point: an agent, or the server.
fn owner(point: Point) -> Option<usize> {
    match point {
        Point::MoveBeginAfterJournal => Some(SOURCE),
        Point::MovePrepareAfter | Point::MoveResumeBefore | Point::MoveResumeAfter => Some(TARGET),
        _ => None,
    }
}

impl Moving {
    /// The process that comes to the point dies there, the next time.
    async fn doom(&mut self, point: Point) -> Result<()> {
        let env = [(VARIABLE, point.name().to_owned())];
        match owner(point) {
            Some(agent) => {
                self.cluster.agent(agent).context("no agent")?.kill()?;
                self.cluster.start_agent(agent, &env).await?;
            }
            None => {
                self.cluster.server().context("no server")?.kill()?;
                self.cluster.start_server(&env).await?;
            }
        }
        self.cluster.until_ready(2).await
    }

    async fn reach(&mut self, when: When, operation: &str) -> Result<()> {
        let wanted = match when {
            Asked => return Ok(()),
            Arriving => {
                let deadline = Instant::now() + DEADLINE;
                while self.cluster.agent(TARGET).context("no agent")?.ended()?.is_none() {
                    ensure!(Instant::now() < deadline, "the target's agent does not die");
                    tokio::time::sleep(PAUSE).await;
                }
                return Ok(());
            }
            When::Disks => MigrationPhase::Disks,
            Memory | HandedOver => MigrationPhase::Memory,
        };
        let reaches = async |moving: &Self, wanted: MigrationPhase| {
            let deadline = Instant::now() + DEADLINE;
            loop {
                let phase = moving.phase(operation).await?;
                ensure!(phase != MigrationPhase::Failed, "it failed without a fault");
                if phase >= wanted {
                    return Ok(());
                }
                ensure!(Instant::now() < deadline, "{wanted:?} is not reached: {phase:?}");
                tokio::time::sleep(PAUSE).await;
            }
        };
        reaches(self, wanted).await?;
        if when == HandedOver {
            self.cluster.server().context("no server")?.freeze()?;
            reaches(self, MigrationPhase::HandedOver).await?;
        }
        Ok(())
    }

    async fn strike(&mut self, what: What, operation: &str) -> Result<()> {
        match what {
            SourceAgentDies => self.cluster.agent(SOURCE).context("no agent")?.kill(),
            TargetAgentDies => self.cluster.agent(TARGET).context("no agent")?.kill(),
            ServerDies => self.cluster.server().context("no server")?.kill(),
            SourceQemuDies => self.signal_qemu(SOURCE, Signal::KILL),
            TargetQemuDies => self.signal_qemu(TARGET, Signal::KILL),
            TargetQemuHangs => self.signal_qemu(TARGET, Signal::STOP),
            TargetDiskFull => self.target_disk.as_ref().context("no disk of its own")?.fill(LEFT_BYTES),
            LinkCut => {
                let target = self.cluster.agent_host(TARGET).context("no host")?.ip().to_owned();
                self.cluster.agent_host(SOURCE).context("no host")?.cut_from(&target, Cut::Both)
            }
            Cancelled => {
                self.cluster.server().context("no server")?.thaw()?;
                // Where it is too late this is refused, and it goes on.
                if let Err(refused) = self.cluster.ctl(&["operation", "cancel", operation]).await {
                    ensure!(refused.to_string().contains("cannot be cancelled"), "{refused:#}");
                }
                Ok(())
            }
            DiesAt(_) => Ok(()),
        }
    }

    fn signal_qemu(&self, agent: usize, signal: Signal) -> Result<()> {
        for pid in self.processes(agent)? {
            let pid = Pid::from_raw(i32::try_from(pid)?).context("no process id")?;
            // It may end by itself in this moment.
            let _ = kill_process(pid, signal);
        }
        Ok(())
    }
}

async fn run(when: When, what: What, disks: Disks) -> Result<Option<(Ended, Told)>> {
    let mut options = Options::new(disks);
    options.network = what == LinkCut;
    options.target_disk = (what == TargetDiskFull).then_some(SMALL_DISK_BYTES);
    let Some(mut moving) = Moving::start(SUITE, options).await? else { return Ok(None) };
    let steps = struck(&mut moving, when, what).await;
    steps.map(Some).with_context(|| moving.cluster.logs())
}

async fn struck(moving: &mut Moving, when: When, what: What) -> Result<(Ended, Told)> {
    match what {
        DiesAt(point) => moving.doom(point).await?,
        _ if when == Arriving => moving.doom(Point::MoveResumeBefore).await?,
        _ => {}
    }
    let before = moving.get().await?;
    let operation = moving.begin_slowly().await?;
    moving.reach(when, &operation).await?;
    moving.strike(what, &operation).await?;
    if when == HandedOver && what != ServerDies {
        moving.cluster.server().context("no server")?.thaw()?;
    }
    if what == TargetDiskFull {
        // What it was to hold is to be gone before there is room again, or nobody would have noticed.
        until("the move to end", async || {
            Ok(moving.operation(&operation).await?["finishedAt"].is_string().then_some(()))
        })
        .await?;
        moving.target_disk.as_ref().context("no disk of its own")?.free()?;
    }
    let ended = moving.settles(&before, &operation).await?;
    let told = moving.counts_on(10).await?;
    moving.answers().await?;
    check(what, &ended, told)?;
    Ok((ended, told))
}

fn check(what: What, ended: &Ended, told: Told) -> Result<()> {
    let Ended { state, message, moved, .. } = ended;
    ensure!(!message.is_empty(), "it ended without a reason");
    let is_process = matches!(what, SourceQemuDies | TargetQemuDies);
    ensure!(told.restarts == 0 || is_process, "its process was not killed, and yet it was started anew");
    match state.as_str() {
        "OPERATION_STATE_SUCCEEDED" => ensure!(*moved, "it is said to have moved: {message}"),
        "OPERATION_STATE_FAILED" => {
            ensure!(!moved || is_process, "it is said to have failed, and was moved: {message}");
        }
        "OPERATION_STATE_CANCELLED" => ensure!(what == Cancelled && !moved, "it was cancelled: {message}"),
        _ => bail!("it ended as {state}: {message}"),
    }
    // What dies and comes back undoes nothing.
    let comes_back = matches!(what, SourceAgentDies | TargetAgentDies | ServerDies | DiesAt(_));
    ensure!(*moved || !comes_back, "it was not moved: {message}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_fails_in_a_move_one_copy_runs_and_counts_on() -> Result<()> {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<usize>()).transpose();
    let (first, asked) = (number("MOVE_FROM")?.unwrap_or(0), number("MOVE_RUNS")?);
    let mut downtimes = Vec::new();
    for number in first..first + asked.unwrap_or(RUNS) {
        let (when, what) = FAULTS[number % FAULTS.len()];
        // Shared disks are not copied, and what is to be full is not theirs.
        let is_copied = when == When::Disks || number % 2 == 0;
        let disks = if is_copied { Disks::Copied } else { Disks::Shared };
        let begun = Instant::now();
        let ended = run(when, what, disks).await;
        let Some((ended, told)) = ended.with_context(|| format!("{what:?} at {when:?}, disks {disks:?}"))?
        else {
            continue;
        };
        let Ended { message, moved, downtime_us, longest_silence, .. } = ended;
        eprintln!(
            "{number}: {what:?} at {when:?}, disks {disks:?}: moved {moved}, started anew {} times, silent for at most {} ms, \
             took {:.1} s: {message}",
            told.restarts,
            longest_silence.as_millis(),
            begun.elapsed().as_secs_f64()
        );
        downtimes.extend(downtime_us.filter(|_| moved).map(|us| us as f64 / 1000.0));
    }
    if let (false, Some(most)) = (downtimes.is_empty(), downtimes.iter().copied().reduce(f64::max)) {
        let moved = downtimes.len();
        eprintln!(
            "{moved} moved; stood still until all was sent: median {:.1} ms, at most {most:.1} ms",
            median(&downtimes)
        );
    }
    Ok(())
}
