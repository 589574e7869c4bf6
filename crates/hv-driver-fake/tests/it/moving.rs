//! Updates, snapshots and migrations that go slowly or wrong as told, and what the ledgers say of them.

use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use hv_driver::{
    Driver, IncomingRequest, InstanceConfig, MigrateRequest, MigrationPhase, MigrationStatus, Observed,
    SnapshotRequest, StopMode, Storage, Updated,
};
use hv_driver_fake::{FakeDriver, LedgerEvent, Script, Step, read_ledger};
use hv_types::InstanceId;

use crate::script::{annotated, fake};

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(20);

async fn running(driver: &FakeDriver, pairs: &[(&str, &str)]) -> InstanceConfig {
    let config = annotated(pairs);
    driver.create(&config).await.unwrap();
    driver.start(&config.id).await.unwrap();
    config
}

async fn begun(source: &FakeDriver, target: &FakeDriver, config: &InstanceConfig, name: &str) {
    source.migrate(&config.id, &prepared(target, config, name).await).await.unwrap();
}

async fn prepared(target: &FakeDriver, config: &InstanceConfig, name: &str) -> MigrateRequest {
    let listen = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let request = IncomingRequest { migration: name.to_owned(), storage: Storage::Copied, listen };
    let incoming = target.prepare_incoming(config, &request).await.unwrap();
    MigrateRequest {
        migration: name.to_owned(),
        storage: Storage::Copied,
        target: incoming.target,
        downtime_limit: Duration::from_millis(300),
        bandwidth_limit: 0,
        auto_converge: false,
    }
}

async fn status(driver: &FakeDriver, id: &InstanceId) -> MigrationStatus {
    driver.migration(id).await.unwrap().unwrap()
}

async fn settled(driver: &FakeDriver, id: &InstanceId) -> MigrationPhase {
    let begun = Instant::now();
    loop {
        assert!(begun.elapsed() < PATIENCE, "it does not end");
        match status(driver, id).await.phase {
            MigrationPhase::Disks | MigrationPhase::Memory => {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            ended => return ended,
        }
    }
}

fn told(dir: &tempfile::TempDir) -> Vec<LedgerEvent> {
    read_ledger(dir.path()).unwrap().into_iter().map(|entry| entry.what).collect()
}

#[tokio::test]
async fn the_ledgers_tell_that_it_never_ran_twice() {
    use LedgerEvent::{Created, Deleted, Ended, Started};
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (source, target) = (fake(&here), fake(&there));
    let config = running(&source, &[]).await;
    begun(&source, &target, &config, "one").await;
    assert_eq!(settled(&source, &config.id).await, MigrationPhase::HandedOver);
    assert_eq!((told(&here), told(&there)), (vec![Created, Started, Ended], vec![Created]));
    target.resume(&config.id).await.unwrap();
    source.delete(&config.id).await.unwrap();
    assert_eq!(told(&here), [Created, Started, Ended, Deleted]);
    assert_eq!(told(&there), [Created, Started]);
    let ended = read_ledger(here.path()).unwrap()[2].at_us;
    let started = read_ledger(there.path()).unwrap()[1].at_us;
    assert!(ended <= started, "it ran on both nodes");
}

#[tokio::test]
async fn what_comes_back_after_the_hand_over_has_started_again() {
    use LedgerEvent::{Created, Deleted, Ended, Started};
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (source, target) = (fake(&here), fake(&there));
    let config = running(&source, &[]).await;
    begun(&source, &target, &config, "one").await;
    settled(&source, &config.id).await;
    target.delete(&config.id).await.unwrap();
    source.abort_migration(&config.id).await.unwrap();
    assert_eq!((told(&here), told(&there)), (vec![Created, Started, Ended, Started], vec![Created, Deleted]));
}

#[tokio::test]
async fn a_slow_transfer_is_slow_behind_its_call_and_tells_how_far_it_is() {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (source, target) = (fake(&here), fake(&there));
    let config = running(&source, &[("delay-migrate", "2s")]).await;
    let request = prepared(&target, &config, "slow").await;
    let begun = Instant::now();
    source.migrate(&config.id, &request).await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(1), "the call waited for the transfer");
    let first = status(&source, &config.id).await;
    assert_eq!(first.phase, MigrationPhase::Disks);
    assert!(first.done_bytes < first.total_bytes && first.downtime.is_none());
    assert!(matches!(source.observe(&config.id).await.unwrap(), Observed::Running(_)));
    assert_eq!(settled(&source, &config.id).await, MigrationPhase::HandedOver);
    assert!(begun.elapsed() >= Duration::from_secs(2));
    let last = status(&source, &config.id).await;
    assert!(last.done_bytes == last.total_bytes && last.downtime.is_some());
}

#[tokio::test]
async fn a_hand_over_is_told_without_being_asked_for() {
    use futures::StreamExt as _;
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (source, target) = (fake(&here), fake(&there));
    let config = running(&source, &[]).await;
    let mut events = source.events();
    begun(&source, &target, &config, "one").await;
    let event = tokio::time::timeout(PATIENCE, events.next()).await.unwrap().unwrap();
    assert_eq!(event.id, config.id);
    assert_eq!(source.observe(&config.id).await.unwrap(), Observed::HandedOver);
}

#[tokio::test]
async fn a_scripted_migration_breaks_down_and_the_next_one_succeeds() {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (source, target) = (fake(&here), fake(&there));
    let config = running(&source, &[("migration-breaks", "1"), ("fail-migrate", "1")]).await;
    let request = prepared(&target, &config, "one").await;
    assert!(source.migrate(&config.id, &request).await.unwrap_err().retryable());
    source.migrate(&config.id, &request).await.unwrap();
    assert!(matches!(settled(&source, &config.id).await, MigrationPhase::Failed { .. }));
    assert!(matches!(source.observe(&config.id).await.unwrap(), Observed::Running(_)));
    target.delete(&config.id).await.unwrap();
    begun(&source, &target, &config, "two").await;
    assert_eq!(settled(&source, &config.id).await, MigrationPhase::HandedOver);
}

#[tokio::test]
async fn a_migration_that_hangs_is_given_up() {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (source, target) = (fake(&here), fake(&there));
    let config = running(&source, &[("migration-hangs", "1")]).await;
    begun(&source, &target, &config, "one").await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(matches!(status(&source, &config.id).await.phase, MigrationPhase::Memory));
    source.abort_migration(&config.id).await.unwrap();
    assert!(matches!(settled(&source, &config.id).await, MigrationPhase::Failed { .. }));
}

#[tokio::test]
async fn what_was_handed_over_is_not_started_by_a_stop_in_between() {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (source, target) = (fake(&here), fake(&there));
    let config = running(&source, &[]).await;
    begun(&source, &target, &config, "one").await;
    settled(&source, &config.id).await;
    source.stop(&config.id, StopMode::Force).await.unwrap();
    target.stop(&config.id, StopMode::Force).await.unwrap();
    assert!(source.start(&config.id).await.is_err());
    assert!(target.start(&config.id).await.is_err());
    assert_eq!(source.observe(&config.id).await.unwrap(), Observed::HandedOver);
    target.resume(&config.id).await.unwrap();
}

#[tokio::test]
async fn a_change_waits_if_it_is_told_to() {
    let dir = tempfile::tempdir().unwrap();
    let driver = fake(&dir);
    let mut config = running(&driver, &[("update-waits", "true"), ("fail-update", "1")]).await;
    config.spec.cpu_cores = 2;
    assert!(driver.update(&config).await.unwrap_err().retryable());
    let outcome = driver.update(&config).await.unwrap();
    assert!(matches!(&outcome, Updated::AtNextStart(what) if what.contains("cores")), "{outcome:?}");
    assert_eq!(fake(&dir).update(&config).await.unwrap(), outcome);
    driver.stop(&config.id, StopMode::Force).await.unwrap();
    driver.start(&config.id).await.unwrap();
    assert_eq!(driver.update(&config).await.unwrap(), Updated::Done);
}

#[tokio::test]
async fn a_snapshot_fails_and_is_late_as_told() {
    let dir = tempfile::tempdir().unwrap();
    let driver = fake(&dir);
    let config = running(&driver, &[("fail-snapshot", "1"), ("fail-late-revert", "1")]).await;
    let request = SnapshotRequest { name: "one".to_owned(), memory: true };
    assert!(driver.snapshot(&config.id, &request).await.unwrap_err().retryable());
    assert!(driver.snapshots(&config.id).await.unwrap().is_empty());
    driver.snapshot(&config.id, &request).await.unwrap();
    assert!(driver.revert(&config.id, "one").await.unwrap_err().retryable());
    driver.revert(&config.id, "one").await.unwrap();
    let clone = Step { delay: Duration::from_millis(100), ..Step::default() };
    driver.set_script(Script { clone, ..Script::default() });
    let begun = Instant::now();
    driver.clone_snapshot(&config.id, "one", &annotated(&[])).await.unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(100));
}
