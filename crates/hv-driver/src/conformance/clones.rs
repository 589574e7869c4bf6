//! Claims about new instances made from snapshots.

use std::sync::Arc;

use super::counting::{assert_goes_on, count_on};
use super::snapshots::{request, snapshotted};
use super::{Counter, Subject, assert_unsupported, can, cleaned, config, exit_of, runs, seen};
use crate::{Capability, Driver, Exit, InstanceConfig, Observed, StopMode};

/// How many are started from one snapshot.
const FLEET: usize = 3;

/// An instance that stands, with the snapshot `one`. `None`: the driver cannot clone and has said so.
async fn source(subject: &dyn Subject) -> Option<(Arc<dyn Driver>, InstanceConfig)> {
    let (driver, config) = snapshotted(subject, None, false).await?;
    driver.stop(&config.id, StopMode::Force).await.expect("stop");
    driver.snapshot(&config.id, &request("one", false)).await.expect("snapshot");
    refuses_unless_able(subject, driver, config).await
}

async fn refuses_unless_able(
    subject: &dyn Subject,
    driver: Arc<dyn Driver>,
    config: InstanceConfig,
) -> Option<(Arc<dyn Driver>, InstanceConfig)> {
    if can(&*driver, Capability::Clone).await {
        return Some((driver, config));
    }
    let before = seen(subject, &*driver, &config.id).await;
    let other = sibling(subject, &config);
    assert_unsupported(driver.clone_snapshot(&config.id, "one", &other).await, "a clone");
    assert_eq!(driver.observe(&other.id).await.expect("observe"), Observed::Absent);
    assert_eq!(seen(subject, &*driver, &config.id).await, before);
    cleaned(subject, &*driver, &config).await;
    None
}

fn sibling(subject: &dyn Subject, of: &InstanceConfig) -> InstanceConfig {
    let mut sibling = config(subject);
    sibling.spec = of.spec.clone();
    sibling.name = "clone".to_owned();
    sibling
}

/// It does not run until it is started, and neither of the two needs the other.
pub async fn a_clone_is_an_instance_of_its_own(subject: &dyn Subject) {
    let Some((driver, config)) = source(subject).await else { return };
    let clone = sibling(subject, &config);
    driver.clone_snapshot(&config.id, "one", &clone).await.expect("clone");
    assert_eq!(exit_of(&*driver, &clone.id).await, Some(Exit::NeverStarted));
    assert_eq!((subject.copies(&config.id), subject.copies(&clone.id)), (0, 0));
    driver.start(&clone.id).await.expect("start of the clone");
    driver.start(&config.id).await.expect("start of the source");
    assert_eq!((subject.copies(&config.id), subject.copies(&clone.id)), (1, 1));
    driver.delete(&config.id).await.expect("delete the source");
    assert!(runs(&*driver, &clone.id).await, "the clone ended with its source");
    driver.stop(&clone.id, StopMode::Force).await.expect("stop");
    driver.start(&clone.id).await.expect("start without the source");
    assert!(runs(&*driver, &clone.id).await);
    cleaned(subject, &*driver, &clone).await;
}

/// A clone repeated makes nothing anew, also over what runs.
pub async fn a_clone_asked_for_twice_is_one(subject: &dyn Subject) {
    let Some((driver, config)) = source(subject).await else { return };
    let clone = sibling(subject, &config);
    for _ in 0..2 {
        driver.clone_snapshot(&config.id, "one", &clone).await.expect("clone");
    }
    assert_eq!(driver.list().await.expect("list").len(), 2);
    driver.start(&clone.id).await.expect("start");
    let before = seen(subject, &*driver, &clone.id).await;
    driver.clone_snapshot(&config.id, "one", &clone).await.expect("clone of what runs");
    assert_eq!(seen(subject, &*driver, &clone.id).await, before);
    let other = sibling(subject, &config);
    let error = driver.clone_snapshot(&config.id, "no-such", &other).await.expect_err("a clone of nothing");
    assert!(!error.retryable(), "{error}");
    assert_eq!(driver.observe(&other.id).await.expect("observe"), Observed::Absent);
    driver.delete(&config.id).await.expect("delete the source");
    cleaned(subject, &*driver, &clone).await;
}

/// Several at once.
pub async fn a_fleet_starts_from_one_snapshot(subject: &dyn Subject) {
    let Some((driver, config)) = source(subject).await else { return };
    let fleet: Vec<_> = (0..FLEET).map(|_| sibling(subject, &config)).collect();
    let started = fleet.iter().map(async |clone| {
        driver.clone_snapshot(&config.id, "one", clone).await.expect("clone");
        driver.start(&clone.id).await.expect("start");
    });
    futures::future::join_all(started).await;
    for clone in &fleet {
        assert!(runs(&*driver, &clone.id).await);
        assert_eq!(subject.copies(&clone.id), 1);
    }
    driver.delete(&config.id).await.expect("delete the source");
    for clone in &fleet {
        assert!(runs(&*driver, &clone.id).await, "it ended with its source");
        driver.delete(&clone.id).await.expect("delete");
    }
    cleaned(subject, &*driver, &config).await;
}

async fn counted(driver: &dyn Driver, config: &InstanceConfig, counter: Option<&Counter>) -> u64 {
    match counter {
        Some(counter) => count_on(driver, &config.id, counter).await,
        None => 0,
    }
}

/// It does not boot; the source goes its own way.
pub async fn a_clone_with_memory_goes_on_where_the_snapshot_was(subject: &dyn Subject) {
    let counter = subject.counter();
    let Some((driver, config)) = snapshotted(subject, counter.as_ref(), true).await else { return };
    let Some((driver, config)) = refuses_unless_able(subject, driver, config).await else { return };
    let kept = counted(&*driver, &config, counter.as_ref()).await;
    driver.snapshot(&config.id, &request("one", true)).await.expect("snapshot with memory");
    let later = counted(&*driver, &config, counter.as_ref()).await;
    let clone = sibling(subject, &config);
    driver.clone_snapshot(&config.id, "one", &clone).await.expect("clone");
    driver.start(&clone.id).await.expect("start of the clone");
    assert!(runs(&*driver, &clone.id).await);
    assert_eq!((subject.copies(&config.id), subject.copies(&clone.id)), (1, 1));
    if let Some(counter) = &counter {
        assert_goes_on(&*driver, &clone.id, counter, kept, Some(later)).await;
        assert_goes_on(&*driver, &config.id, counter, later, None).await;
    }
    driver.delete(&config.id).await.expect("delete the source");
    cleaned(subject, &*driver, &clone).await;
}
