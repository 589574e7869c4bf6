//! Hand-overs under memory load with a fault at each phase: afterwards exactly one copy runs, and its count never goes
//! back. `MIGRATION_RUNS` runs more of them than the three that are run always.

use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt as _;
use hv_driver::conformance::cleaned;
use hv_driver::{
    Driver, IncomingRequest, Input, InstanceConfig, LogRequest, MigrateRequest, MigrationPhase, Observed,
    StopMode, Storage,
};
use hv_driver_qemu::QemuDriver;

use crate::subject::{QemuSubject, two_nodes};

/// How long anything may take that a claim waits for.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often it is looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);
/// So slow, in bytes per second, that each phase takes long enough to be seen.
const BANDWIDTH: u64 = 6 << 20;
/// How many hand-overs are run if nothing else is asked for: one with a fault in each phase.
const RUNS: usize = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Disks,
    Memory,
    HandedOver,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Nothing,
    SourceAgentDies,
    TargetAgentDies,
    BothAgentsDie,
    SourceQemuDies,
    TargetQemuDies,
    GivenUp,
}

/// The first of each phase first, so that few runs see all of them.
const FAULTS: [(Phase, Fault); 17] = [
    (Phase::Memory, Fault::SourceAgentDies),
    (Phase::Disks, Fault::TargetQemuDies),
    (Phase::HandedOver, Fault::BothAgentsDie),
    (Phase::Disks, Fault::SourceAgentDies),
    (Phase::Memory, Fault::TargetQemuDies),
    (Phase::HandedOver, Fault::TargetQemuDies),
    (Phase::Disks, Fault::GivenUp),
    (Phase::Memory, Fault::GivenUp),
    (Phase::HandedOver, Fault::GivenUp),
    (Phase::Memory, Fault::SourceQemuDies),
    (Phase::Disks, Fault::SourceQemuDies),
    (Phase::HandedOver, Fault::SourceQemuDies),
    (Phase::Disks, Fault::TargetAgentDies),
    (Phase::Memory, Fault::TargetAgentDies),
    (Phase::HandedOver, Fault::Nothing),
    (Phase::Disks, Fault::BothAgentsDie),
    (Phase::Memory, Fault::BothAgentsDie),
];

struct Nodes<'a> {
    subject: &'a QemuSubject,
    source: Option<QemuDriver>,
    target: Option<QemuDriver>,
    config: InstanceConfig,
}

impl Nodes<'_> {
    fn source(&self) -> &QemuDriver {
        self.source.as_ref().expect("the source's agent")
    }

    fn target(&self) -> &QemuDriver {
        self.target.as_ref().expect("the target's agent")
    }

    /// A new agent process: the old one's memory is gone, its machines are not.
    async fn source_agent_dies(&mut self) {
        drop(self.source.take());
        self.source = Some(self.subject.qemu());
        self.source().recover(&self.config.id, None).await.expect("recover at the source");
    }

    async fn target_agent_dies(&mut self) {
        drop(self.target.take());
        self.target = Some(self.subject.other_qemu());
        self.target().recover(&self.config.id, None).await.expect("recover at the target");
    }

    async fn at_most_one_runs(&self) {
        let target = runs(self.target(), &self.config).await;
        let source = runs(self.source(), &self.config).await;
        assert!(!(source && target), "it runs on both nodes");
    }

    async fn phase(&self) -> MigrationPhase {
        self.at_most_one_runs().await;
        let status = self.source().migration(&self.config.id).await.expect("migration");
        status.expect("it knows nothing of its migration").phase
    }

    /// Waits until the hand-over is in this phase, or beyond.
    async fn reaches(&self, phase: Phase) {
        let begun = Instant::now();
        loop {
            let is_there = match self.phase().await {
                MigrationPhase::Disks => phase == Phase::Disks,
                MigrationPhase::Memory => phase != Phase::HandedOver,
                MigrationPhase::HandedOver => true,
                MigrationPhase::Failed { reason } => panic!("it failed without a fault: {reason}"),
            };
            if is_there {
                return;
            }
            assert!(begun.elapsed() < PATIENCE, "{phase:?} was never reached");
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }

    async fn inject(&mut self, fault: Fault) {
        let id = self.config.id.clone();
        match fault {
            Fault::Nothing => {}
            Fault::SourceAgentDies => self.source_agent_dies().await,
            Fault::TargetAgentDies => self.target_agent_dies().await,
            Fault::BothAgentsDie => {
                self.source_agent_dies().await;
                self.target_agent_dies().await;
            }
            Fault::SourceQemuDies => self.subject.kill_at(false, &id).await,
            Fault::TargetQemuDies => self.subject.kill_at(true, &id).await,
            Fault::GivenUp => {
                self.target().delete(&id).await.expect("the target gives it up");
                self.source().abort_migration(&id).await.expect("abort");
            }
        }
    }

    /// Does what the control plane does: lets the target go on when it has everything, else gives it up. Says whether what
    /// was in memory is still there.
    async fn decide(&self) -> bool {
        let id = &self.config.id;
        let begun = Instant::now();
        loop {
            match self.phase().await {
                MigrationPhase::HandedOver => {
                    let observed = self.source().observe(id).await.expect("observe");
                    assert_eq!(observed, Observed::HandedOver);
                    assert!(self.source().start(id).await.is_err(), "what was handed over was started");
                    if self.target().resume(id).await.is_ok() {
                        return true;
                    }
                    self.target().delete(id).await.expect("give the target up");
                    self.source().abort_migration(id).await.expect("abort");
                }
                MigrationPhase::Failed { reason } => {
                    eprintln!("it failed: {reason}");
                    self.target().delete(id).await.expect("give the target up");
                    let has_memory = runs(self.source(), &self.config).await;
                    if !has_memory {
                        self.source().start(id).await.expect("start at the source");
                    }
                    return has_memory;
                }
                MigrationPhase::Disks | MigrationPhase::Memory => {}
            }
            assert!(begun.elapsed() < PATIENCE, "it does not end");
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }
}

async fn runs(driver: &QemuDriver, config: &InstanceConfig) -> bool {
    matches!(driver.observe(&config.id).await.expect("observe"), Observed::Running(_))
}

/// Asks the guest how far it has counted.
async fn count(driver: &QemuDriver, config: &InstanceConfig) -> u64 {
    let answers = async || {
        let mut logs = driver.logs(&config.id, LogRequest::default()).await.expect("logs");
        let mut text = Vec::new();
        while let Some(piece) = logs.next().await {
            text.extend_from_slice(&piece.expect("a piece"));
        }
        let text = String::from_utf8_lossy(&text).into_owned();
        let complete = text.rfind('\n').map_or("", |end| &text[..end]);
        let number = |line: &str| line.trim().rsplit("n=").next().and_then(|digits| digits.parse().ok());
        complete.lines().filter(|line| line.contains("n=")).filter_map(number).collect::<Vec<u64>>()
    };
    let before = answers().await.len();
    let console = driver.console(&config.id).await.expect("console");
    let begun = Instant::now();
    let mut asked = None;
    loop {
        // What is typed while the guest boots is lost.
        if asked.is_none_or(|asked: Instant| asked.elapsed() > Duration::from_secs(2)) {
            console.input.send(Input::Data(Bytes::from_static(b"?"))).await.expect("input");
            asked = Some(Instant::now());
        }
        let now = answers().await;
        if now.len() > before {
            return now[now.len() - 1];
        }
        assert!(begun.elapsed() < PATIENCE, "the guest does not answer");
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

async fn begin<'a>(subject: &'a QemuSubject, storage: Storage) -> (Nodes<'a>, MigrateRequest) {
    let mut config = subject.config("mover");
    config.spec.image = "counter".to_owned();
    let nodes = Nodes { subject, source: Some(subject.qemu()), target: Some(subject.other_qemu()), config };
    let id = &nodes.config.id;
    nodes.source().create(&nodes.config).await.expect("create");
    nodes.source().start(id).await.expect("start");
    let migration = format!("move-{id}");
    let listen = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let incoming = IncomingRequest { migration: migration.clone(), storage, listen };
    let answer = nodes.target().prepare_incoming(&nodes.config, &incoming).await.expect("prepare");
    let request = MigrateRequest {
        migration,
        storage,
        target: answer.target,
        downtime_limit: Duration::from_secs(1),
        bandwidth_limit: BANDWIDTH,
        auto_converge: true,
    };
    (nodes, request)
}

async fn hand_over_with(fault: Fault, phase: Phase, storage: Storage) {
    let Some(subject) = two_nodes().await else { return };
    let (mut nodes, request) = begin(&subject, storage).await;
    let id = nodes.config.id.clone();
    let before = count(nodes.source(), &nodes.config).await;
    assert!(before > 0);
    nodes.source().migrate(&id, &request).await.expect("migrate");
    nodes.reaches(phase).await;
    nodes.inject(fault).await;
    let has_memory = nodes.decide().await;
    let (here, there) =
        (runs(nodes.source(), &nodes.config).await, runs(nodes.target(), &nodes.config).await);
    assert!(here != there, "source {here}, target {there}: not exactly one runs");
    let only_agents_died = matches!(
        fault,
        Fault::Nothing | Fault::SourceAgentDies | Fault::TargetAgentDies | Fault::BothAgentsDie
    );
    assert!(there || !only_agents_died, "agents that die do not undo a hand-over");
    let survivor = if there { nodes.target() } else { nodes.source() };
    let after = count(survivor, &nodes.config).await;
    assert!(!has_memory || after >= before, "it counted {before}, then {after}");
    let status = nodes.source().migration(&id).await.expect("migration");
    let downtime = status.and_then(|status| status.downtime);
    eprintln!("{storage:?} {phase:?} {fault:?}: {before} -> {after}, downtime {downtime:?}, moved {there}");
    nodes.target().stop(&id, StopMode::Force).await.ok();
    nodes.source().delete(&id).await.expect("delete at the source");
    cleaned(&subject, nodes.target(), &nodes.config).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_fails_exactly_one_copy_runs_and_counts_on() {
    let asked = std::env::var("MIGRATION_RUNS").ok().and_then(|text| text.parse().ok());
    for run in 0..asked.unwrap_or(RUNS) {
        let (phase, fault) = FAULTS[run % FAULTS.len()];
        // Shared disks have no phase of their own.
        let is_shared = phase != Phase::Disks && run % 2 == 1;
        hand_over_with(fault, phase, if is_shared { Storage::Shared } else { Storage::Copied }).await;
    }
}

/// QEMU's emulator would lose what its guest writes meanwhile. Nobody takes that for a pause, and nobody ends it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_emulated_machine_stands_still_while_its_memory_is_sent_and_goes_on_when_that_is_given_up() {
    let Some(subject) = two_nodes().await else { return };
    let (nodes, mut request) = begin(&subject, Storage::Shared).await;
    let id = &nodes.config.id;
    request.bandwidth_limit = BANDWIDTH / 8;
    let before = count(nodes.source(), &nodes.config).await;
    nodes.source().migrate(id, &request).await.expect("migrate");
    nodes.reaches(Phase::Memory).await;
    nodes.source().resume(id).await.expect("resume what runs");
    let refused = nodes.source().pause(id).await.expect_err("it was paused");
    assert!(refused.to_string().contains("handed over"), "{refused}");
    assert!(runs(nodes.source(), &nodes.config).await);
    assert_eq!(nodes.phase().await, MigrationPhase::Memory, "too fast to see anything");
    nodes.target().delete(id).await.expect("give it up");
    nodes.source().abort_migration(id).await.expect("abort");
    assert!(count(nodes.source(), &nodes.config).await >= before);
    cleaned(&subject, nodes.source(), &nodes.config).await;
}

/// The target takes nothing in from whoever has another key, and goes on waiting.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_has_another_key_is_turned_away() {
    let Some(subject) = two_nodes().await else { return };
    let (nodes, request) = begin(&subject, Storage::Shared).await;
    let id = &nodes.config.id;
    let mut forged = request.clone();
    forged.target["key"] = "0".repeat(64).into();
    nodes.source().migrate(id, &forged).await.expect("migrate");
    let begun = Instant::now();
    while !matches!(nodes.phase().await, MigrationPhase::Failed { .. }) {
        assert!(begun.elapsed() < PATIENCE, "a forged key was taken");
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
    assert!(runs(nodes.source(), &nodes.config).await);
    let observed = nodes.target().observe(id).await.expect("observe");
    assert!(matches!(observed, Observed::Paused(_)), "{observed:?}");
    nodes.target().delete(id).await.expect("give it up");
    cleaned(&subject, nodes.source(), &nodes.config).await;
}

/// A machine that is not alike cannot take what comes; the source says so before anything is sent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_that_is_not_alike_is_refused() {
    let Some(subject) = two_nodes().await else { return };
    let (nodes, mut request) = begin(&subject, Storage::Copied).await;
    request.target["hardware"] = "another machine".into();
    let error = nodes.source().migrate(&nodes.config.id, &request).await.expect_err("it was begun");
    assert!(error.to_string().contains("another machine"), "{error}");
    assert_eq!(nodes.source().migration(&nodes.config.id).await.expect("migration"), None);
    assert!(runs(nodes.source(), &nodes.config).await);
    nodes.target().delete(&nodes.config.id).await.expect("give it up");
    cleaned(&subject, nodes.source(), &nodes.config).await;
}
