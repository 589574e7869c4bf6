//! Claims about moving to another node while it runs.
//!
//! The claims play the part of the one who decides: they let the target go on only when the source has handed over,
//! or when they have given it up. At every moment that is looked at, at most one of the two runs.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use hv_types::InstanceId;

use super::counting::{assert_goes_on, count_on};
use super::{
    Counter, LOOK_INTERVAL, Subject, assert_unsupported, assert_wrong_state, can, cleaned, config, report,
    runs, seen, within,
};
use crate::{
    Capability, Driver, IncomingRequest, InstanceConfig, MigrateRequest, MigrationPhase, MigrationStatus,
    Observed, StopMode, Storage,
};

/// How long an instance may stand still.
const DOWNTIME_LIMIT: Duration = Duration::from_millis(300);

/// So many bytes per second leave time to look at what is sent.
const SLOW_BYTES: u64 = 32 << 20;

/// An instance that runs at the source, and the two nodes.
struct Move {
    source: Arc<dyn Driver>,
    target: Arc<dyn Driver>,
    config: InstanceConfig,
    storage: Storage,
    name: String,
}

fn capability(storage: Storage) -> Capability {
    match storage {
        Storage::Shared => Capability::Migrate,
        Storage::Copied => Capability::MigrateStorage,
    }
}

fn incoming(name: &str, storage: Storage) -> IncomingRequest {
    IncomingRequest { migration: name.to_owned(), storage, listen: IpAddr::V4(Ipv4Addr::LOCALHOST) }
}

fn outgoing(name: &str, storage: Storage, target: serde_json::Value) -> MigrateRequest {
    MigrateRequest {
        migration: name.to_owned(),
        storage,
        target,
        downtime_limit: DOWNTIME_LIMIT,
        bandwidth_limit: 0,
        auto_converge: true,
    }
}

/// A move that can begin, with disks as the subject has them. `None`: it cannot, and that has been told.
async fn moving(subject: &dyn Subject, counter: Option<&Counter>) -> Option<Move> {
    let driver = subject.driver();
    let mut able = subject.storage();
    let capabilities = driver.fingerprint().await.capabilities;
    able.retain(|storage| capabilities.contains(&capability(*storage)));
    let storage = able.first().copied();
    let is_promised =
        [Capability::Migrate, Capability::MigrateStorage].iter().any(|c| capabilities.contains(c));
    if storage.is_none() && is_promised {
        report::skipped("its tests cannot place the disks as it needs them");
        return None;
    }
    drop(driver);
    moving_with(subject, counter, storage.unwrap_or(Storage::Shared)).await
}

async fn moving_with(subject: &dyn Subject, counter: Option<&Counter>, storage: Storage) -> Option<Move> {
    let (source, mut config) = (subject.driver(), config(subject));
    if let Some(counter) = counter {
        config.spec = counter.spec.clone();
    }
    source.create(&config).await.expect("create");
    source.start(&config.id).await.expect("start");
    if !can(&*source, capability(storage)).await {
        refuses(subject, &*source, &config, storage).await;
        return None;
    }
    let Some(target) = subject.second_driver() else {
        report::skipped("its tests have one node only");
        cleaned(subject, &*source, &config).await;
        return None;
    };
    let name = format!("move-{}", config.id);
    Some(Move { source, target, config, storage, name })
}

/// Every operation says why not, and what runs goes on.
async fn refuses(subject: &dyn Subject, driver: &dyn Driver, config: &InstanceConfig, storage: Storage) {
    let before = seen(subject, driver, &config.id).await;
    let request = outgoing("none", storage, serde_json::Value::Null);
    assert_unsupported(driver.migrate(&config.id, &request).await, "a migration");
    let elsewhere = super::config(subject);
    assert_unsupported(
        driver.prepare_incoming(&elsewhere, &incoming("none", storage)).await,
        "preparing for a migration",
    );
    assert_eq!(driver.observe(&elsewhere.id).await.expect("observe"), Observed::Absent);
    let other = match storage {
        Storage::Shared => Capability::MigrateStorage,
        Storage::Copied => Capability::Migrate,
    };
    if !can(driver, other).await {
        assert_unsupported(driver.migration(&config.id).await, "the state of a migration");
        assert_unsupported(driver.abort_migration(&config.id).await, "giving a migration up");
    }
    assert_eq!(seen(subject, driver, &config.id).await, before);
    cleaned(subject, driver, config).await;
}

impl Move {
    fn id(&self) -> &InstanceId {
        &self.config.id
    }

    async fn prepared(&self) -> MigrateRequest {
        let request = incoming(&self.name, self.storage);
        let answer = self.target.prepare_incoming(&self.config, &request).await.expect("prepare");
        assert!(answer.target.to_string().len() <= 4096, "more than 4 KiB: {}", answer.target);
        outgoing(&self.name, self.storage, answer.target)
    }

    async fn begun(&self) {
        let request = self.prepared().await;
        self.source.migrate(self.id(), &request).await.expect("migrate");
    }

    async fn status(&self) -> MigrationStatus {
        self.at_most_one().await;
        let status = self.source.migration(self.id()).await.expect("migration");
        let status = status.expect("it knows nothing of its migration");
        assert_eq!(status.migration, self.name);
        status
    }

    /// Looks at the source last: what runs at the target then has been let go, and the source must not run.
    async fn at_most_one(&self) {
        let target = runs(&*self.target, self.id()).await;
        let source = runs(&*self.source, self.id()).await;
        assert!(!(source && target), "it runs on both nodes");
    }

    async fn handed_over(&self) -> MigrationStatus {
        within("it is handed over", async {
            loop {
                let status = self.status().await;
                match &status.phase {
                    MigrationPhase::HandedOver => return status,
                    MigrationPhase::Failed { reason } => panic!("the migration failed: {reason}"),
                    MigrationPhase::Disks | MigrationPhase::Memory => {
                        assert!(!runs(&*self.target, self.id()).await, "it runs before it was handed over");
                        tokio::time::sleep(LOOK_INTERVAL).await;
                    }
                }
            }
        })
        .await
    }

    async fn assert_waits(&self) {
        let observed = self.target.observe(self.id()).await.expect("observe");
        assert!(matches!(observed, Observed::Paused(_)), "{observed:?}");
    }

    async fn assert_handed_over(&self) {
        assert_eq!(self.source.observe(self.id()).await.expect("observe"), Observed::HandedOver);
        assert_wrong_state(self.source.start(self.id()).await, "a start of what was handed over");
        assert_wrong_state(self.source.resume(self.id()).await, "a resume of what was handed over");
        assert_eq!(self.source.observe(self.id()).await.expect("observe"), Observed::HandedOver);
    }

    async fn assert_failed(&self) {
        within("the migration fails", async {
            while !matches!(self.status().await.phase, MigrationPhase::Failed { .. }) {
                tokio::time::sleep(LOOK_INTERVAL).await;
            }
        })
        .await;
        assert!(runs(&*self.source, self.id()).await, "it does not run after a migration that failed");
    }

    async fn finished(self, subject: &dyn Subject) {
        self.target.delete(self.id()).await.expect("delete at the target");
        cleaned(subject, &*self.source, &self.config).await;
        assert_eq!(self.target.observe(self.id()).await.expect("observe"), Observed::Absent);
    }

    async fn counted(&self, counter: Option<&Counter>) -> u64 {
        match counter {
            Some(counter) => count_on(&*self.source, self.id(), counter).await,
            None => 0,
        }
    }
}

async fn goes_on_at_the_target(subject: &dyn Subject, storage: Storage) {
    let driver = subject.driver();
    let is_able = can(&*driver, capability(storage)).await;
    drop(driver);
    if is_able && !subject.storage().contains(&storage) {
        return report::skipped("its tests cannot place the disks so");
    }
    let counter = subject.counter();
    let Some(moving) = moving_with(subject, counter.as_ref(), storage).await else { return };
    let kept = moving.counted(counter.as_ref()).await;
    moving.begun().await;
    let status = moving.handed_over().await;
    let downtime = status.downtime.expect("how long it stood still");
    eprintln!("{} bytes handed over; it stood still for {} ms", status.done_bytes, downtime.as_millis());
    moving.assert_waits().await;
    moving.target.resume(moving.id()).await.expect("resume at the target");
    assert!(runs(&*moving.target, moving.id()).await);
    moving.assert_handed_over().await;
    if let Some(counter) = &counter {
        assert_goes_on(&*moving.target, moving.id(), counter, kept, None).await;
    }
    moving.source.delete(moving.id()).await.expect("delete at the source");
    assert!(runs(&*moving.target, moving.id()).await, "it ended with its source");
    assert_eq!(subject.copies(moving.id()), 1);
    moving.target.stop(moving.id(), StopMode::Force).await.expect("stop");
    moving.target.start(moving.id()).await.expect("start at its new node");
    assert!(runs(&*moving.target, moving.id()).await);
    moving.finished(subject).await;
}

/// With its memory, on disks that both nodes reach.
pub async fn what_moves_with_shared_disks_goes_on_at_the_target(subject: &dyn Subject) {
    goes_on_at_the_target(subject, Storage::Shared).await;
}

/// With its memory, and its disks.
pub async fn what_moves_with_its_disks_goes_on_at_the_target(subject: &dyn Subject) {
    goes_on_at_the_target(subject, Storage::Copied).await;
}

/// A target can be neither started nor resumed before it has what it waits for.
pub async fn what_waits_does_not_run(subject: &dyn Subject) {
    let Some(moving) = moving(subject, None).await else { return };
    moving.prepared().await;
    moving.assert_waits().await;
    assert_wrong_state(moving.target.start(moving.id()).await, "a start of what waits");
    assert_wrong_state(moving.target.resume(moving.id()).await, "a resume before the hand-over");
    moving.assert_waits().await;
    assert!(moving.target.list().await.expect("list").contains(moving.id()));
    moving.target.delete(moving.id()).await.expect("give it up");
    assert_eq!(moving.target.observe(moving.id()).await.expect("observe"), Observed::Absent);
    assert!(runs(&*moving.source, moving.id()).await);
    moving.finished(subject).await;
}

/// Neither while it waits nor while it moves nor afterwards.
pub async fn a_second_request_changes_nothing(subject: &dyn Subject) {
    let Some(moving) = moving(subject, None).await else { return };
    assert_eq!(moving.source.migration(moving.id()).await.expect("migration"), None);
    let (first, again) = (moving.prepared().await, moving.prepared().await);
    assert_eq!(first, again, "the target's answer has changed");
    for _ in 0..2 {
        moving.source.migrate(moving.id(), &first).await.expect("migrate");
    }
    moving.handed_over().await;
    moving.source.migrate(moving.id(), &first).await.expect("migrate what was handed over");
    moving.assert_handed_over().await;
    for _ in 0..2 {
        moving.target.resume(moving.id()).await.expect("resume");
    }
    assert!(runs(&*moving.target, moving.id()).await);
    moving.assert_handed_over().await;
    moving.finished(subject).await;
}

/// Also when the target was never let go, and under a new agent.
pub async fn what_was_handed_over_never_runs_here_again(subject: &dyn Subject) {
    let Some(mut moving) = moving(subject, None).await else { return };
    moving.begun().await;
    moving.handed_over().await;
    moving.assert_handed_over().await;
    drop(std::mem::replace(&mut moving.source, moving.target.clone()));
    moving.source = subject.driver();
    assert_eq!(moving.source.recover(moving.id(), None).await.expect("recover"), Observed::HandedOver);
    moving.assert_handed_over().await;
    assert_wrong_state(moving.source.pause(moving.id()).await, "a pause of what was handed over");
    moving.finished(subject).await;
}

/// Before it began, in the middle, and twice: it runs on, and can be moved again.
pub async fn an_abort_before_the_hand_over_leaves_it_here(subject: &dyn Subject) {
    let counter = subject.counter();
    let Some(mut moving) = moving(subject, counter.as_ref()).await else { return };
    moving.source.abort_migration(moving.id()).await.expect("abort of nothing");
    let kept = moving.counted(counter.as_ref()).await;
    moving.begun().await;
    for _ in 0..2 {
        moving.source.abort_migration(moving.id()).await.expect("abort");
        moving.assert_failed().await;
    }
    if let Some(counter) = &counter {
        assert_goes_on(&*moving.source, moving.id(), counter, kept, None).await;
    }
    moving.target.delete(moving.id()).await.expect("give it up");
    assert_eq!(subject.copies(moving.id()), 1);
    moving.name.push_str("-again");
    moving.begun().await;
    moving.handed_over().await;
    moving.target.resume(moving.id()).await.expect("resume");
    assert!(runs(&*moving.target, moving.id()).await);
    moving.finished(subject).await;
}

/// While its disks are copied, where they are, and while its memory is sent.
pub async fn an_abort_in_each_phase_leaves_it_here(subject: &dyn Subject) {
    let Some(mut moving) = moving(subject, None).await else { return };
    for (round, is_far_enough) in
        [is_in_disks as fn(&MigrationPhase) -> bool, is_in_memory].iter().enumerate()
    {
        moving.name = format!("move-{round}-{}", moving.id());
        let request = MigrateRequest { bandwidth_limit: SLOW_BYTES, ..moving.prepared().await };
        moving.source.migrate(moving.id(), &request).await.expect("migrate");
        within("the phase is reached", async {
            while !is_far_enough(&moving.status().await.phase) {
                tokio::time::sleep(LOOK_INTERVAL).await;
            }
        })
        .await;
        // It may have been too fast for the abort, which then needs the target to be gone for certain.
        if moving.status().await.phase == MigrationPhase::HandedOver {
            moving.target.delete(moving.id()).await.expect("give it up");
        }
        moving.source.abort_migration(moving.id()).await.expect("abort");
        moving.assert_failed().await;
        moving.target.delete(moving.id()).await.expect("give it up");
        assert_eq!(subject.copies(moving.id()), 1);
    }
    moving.finished(subject).await;
}

fn is_in_disks(_: &MigrationPhase) -> bool {
    // It is in its first phase from the start.
    true
}

fn is_in_memory(phase: &MigrationPhase) -> bool {
    match phase {
        MigrationPhase::Disks => false,
        MigrationPhase::Memory | MigrationPhase::HandedOver => true,
        MigrationPhase::Failed { reason } => panic!("the migration failed: {reason}"),
    }
}

/// The target is given up first, for certain; then the source goes on where it stood still.
pub async fn an_abort_after_the_hand_over_brings_it_back(subject: &dyn Subject) {
    let counter = subject.counter();
    let Some(moving) = moving(subject, counter.as_ref()).await else { return };
    let kept = moving.counted(counter.as_ref()).await;
    moving.begun().await;
    moving.handed_over().await;
    moving.target.delete(moving.id()).await.expect("give it up");
    for _ in 0..2 {
        moving.source.abort_migration(moving.id()).await.expect("abort");
        assert!(runs(&*moving.source, moving.id()).await, "it does not go on");
    }
    assert_eq!(subject.copies(moving.id()), 1);
    if let Some(counter) = &counter {
        assert_goes_on(&*moving.source, moving.id(), counter, kept, None).await;
    }
    moving.source.stop(moving.id(), StopMode::Force).await.expect("stop");
    moving.source.start(moving.id()).await.expect("start");
    assert!(runs(&*moving.source, moving.id()).await);
    moving.finished(subject).await;
}

/// It cannot be handed over to nobody.
pub async fn a_target_that_gives_up_leaves_it_at_the_source(subject: &dyn Subject) {
    let Some(moving) = moving(subject, None).await else { return };
    let request = moving.prepared().await;
    moving.target.delete(moving.id()).await.expect("give it up");
    // Refused at once, or found out a moment later.
    match moving.source.migrate(moving.id(), &request).await {
        Ok(()) => moving.assert_failed().await,
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    assert!(runs(&*moving.source, moving.id()).await);
    assert_eq!(subject.copies(moving.id()), 1);
    moving.finished(subject).await;
}

/// New agents on both nodes find a move as far as it was, and bring it to its end.
pub async fn both_sides_outlive_their_drivers(subject: &dyn Subject) {
    let Some(moving) = moving(subject, None).await else { return };
    let request = moving.prepared().await;
    let Move { source, target, config, storage, name } = moving;
    drop(target);
    let target = subject.second_driver().expect("the second node");
    let observed = target.recover(&config.id, None).await.expect("recover");
    assert!(matches!(observed, Observed::Paused(_)), "{observed:?}");
    source.migrate(&config.id, &request).await.expect("migrate");
    drop(source);
    let source = subject.driver();
    source.recover(&config.id, None).await.expect("recover");
    let moving = Move { source, target, config, storage, name };
    moving.handed_over().await;
    let Move { source, target, config, storage, name } = moving;
    drop(target);
    let target = subject.second_driver().expect("the second node");
    target.recover(&config.id, None).await.expect("recover");
    let moving = Move { source, target, config, storage, name };
    moving.assert_waits().await;
    moving.target.resume(moving.id()).await.expect("resume");
    assert!(runs(&*moving.target, moving.id()).await);
    moving.assert_handed_over().await;
    moving.finished(subject).await;
}

/// Stopped at the source in the middle: either it was handed over, or it has ended, and starts here again.
pub async fn what_ends_on_its_way_ends_once(subject: &dyn Subject) {
    let Some(moving) = moving(subject, None).await else { return };
    moving.begun().await;
    moving.source.stop(moving.id(), StopMode::Force).await.expect("stop");
    moving.at_most_one().await;
    assert!(!runs(&*moving.target, moving.id()).await, "it runs at the target, where nobody let it go");
    let observed = moving.source.observe(moving.id()).await.expect("observe");
    moving.target.delete(moving.id()).await.expect("give it up");
    match observed {
        Observed::Stopped(_) => {
            assert_eq!(subject.copies(moving.id()), 0);
            assert!(!matches!(moving.status().await.phase, MigrationPhase::HandedOver));
            moving.source.start(moving.id()).await.expect("start");
        }
        Observed::HandedOver => moving.source.abort_migration(moving.id()).await.expect("abort"),
        other => panic!("it was stopped, and is {other:?}"),
    }
    assert!(runs(&*moving.source, moving.id()).await);
    moving.finished(subject).await;
}
