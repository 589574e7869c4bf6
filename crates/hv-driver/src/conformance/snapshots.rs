//! Claims about snapshots.

use std::sync::Arc;

use hv_types::InstanceId;

use super::counting::{ask, assert_goes_on, count_on};
use super::{Counter, Subject, assert_unsupported, can, cleaned, config, exit_of, report, runs, seen};
use crate::{
    Capability, Driver, DriverError, InstanceConfig, Observed, SnapshotInfo, SnapshotRequest, StopMode,
};

pub(super) fn request(name: &str, memory: bool) -> SnapshotRequest {
    SnapshotRequest { name: name.to_owned(), memory }
}

async fn names(driver: &dyn Driver, id: &InstanceId) -> Vec<String> {
    driver.snapshots(id).await.expect("snapshots").into_iter().map(|snapshot| snapshot.name).collect()
}

/// A running instance of which snapshots can be taken. `None`: the driver cannot, has refused everything about them
/// with a reason, and nothing is left.
pub(super) async fn snapshotted(
    subject: &dyn Subject,
    counter: Option<&Counter>,
    memory: bool,
) -> Option<(Arc<dyn Driver>, InstanceConfig)> {
    let (driver, mut config) = (subject.driver(), config(subject));
    if let Some(counter) = counter {
        config.spec = counter.spec.clone();
    }
    driver.create(&config).await.expect("create");
    driver.start(&config.id).await.expect("start");
    let id = &config.id;
    let disks = can(&*driver, Capability::Snapshot).await;
    if disks && (!memory || can(&*driver, Capability::SnapshotMemory).await) {
        return Some((driver, config));
    }
    let before = seen(subject, &*driver, id).await;
    assert_unsupported(driver.snapshot(id, &request("one", memory)).await, "a snapshot");
    if disks {
        assert_eq!(names(&*driver, id).await, Vec::<String>::new());
    } else {
        assert_unsupported(driver.revert(id, "one").await, "a revert");
        assert_unsupported(driver.delete_snapshot(id, "one").await, "the deletion of a snapshot");
        assert_unsupported(driver.snapshots(id).await, "a list of snapshots");
    }
    assert_eq!(seen(subject, &*driver, id).await, before);
    cleaned(subject, &*driver, &config).await;
    None
}

/// Told equally, as exactly as a list of them needs.
fn same(one: &SnapshotInfo, other: &SnapshotInfo) -> bool {
    one.name == other.name && one.created_at == other.created_at && one.memory == other.memory
}

/// Taken, listed and deleted by name, each as often as one likes.
pub async fn a_snapshot_is_there_once_however_often_it_is_asked_for(subject: &dyn Subject) {
    let Some((driver, config)) = snapshotted(subject, None, false).await else { return };
    let id = &config.id;
    driver.stop(id, StopMode::Force).await.expect("stop");
    assert_eq!(names(&*driver, id).await, Vec::<String>::new());
    let first = driver.snapshot(id, &request("one", false)).await.expect("snapshot");
    assert!(!first.memory, "there was no memory to keep");
    driver.snapshot(id, &request("two-2", false)).await.expect("second snapshot");
    let again = driver.snapshot(id, &request("one", false)).await.expect("the first one again");
    assert!(same(&first, &again), "{first:?} {again:?}");
    assert_eq!(names(&*driver, id).await, ["one", "two-2"], "oldest first");
    for _ in 0..2 {
        driver.delete_snapshot(id, "one").await.expect("delete a snapshot");
        assert_eq!(names(&*driver, id).await, ["two-2"]);
    }
    driver.start(id).await.expect("start");
    driver.delete_snapshot(id, "two-2").await.expect("delete a snapshot of what runs");
    assert!(runs(&*driver, id).await);
    assert_eq!(names(&*driver, id).await, Vec::<String>::new());
    cleaned(subject, &*driver, &config).await;
}

/// The disks are as they were; it does not run, and starts.
pub async fn a_revert_undoes_what_came_after(subject: &dyn Subject) {
    let counter = subject.disk_counter();
    let Some((driver, config)) = snapshotted(subject, counter.as_ref(), false).await else { return };
    let id = &config.id;
    let kept = match &counter {
        Some(counter) => Some(count_on(&*driver, id, counter).await),
        None => None,
    };
    driver.stop(id, StopMode::Force).await.expect("stop");
    driver.snapshot(id, &request("before", false)).await.expect("snapshot");
    for is_running in [false, true] {
        driver.start(id).await.expect("start");
        if let (Some(counter), Some(kept)) = (&counter, kept) {
            assert_goes_on(&*driver, id, counter, kept, None).await;
            count_on(&*driver, id, counter).await;
        }
        if !is_running {
            driver.stop(id, StopMode::Force).await.expect("stop");
        }
        driver.revert(id, "before").await.expect("revert");
        assert!(exit_of(&*driver, id).await.is_some(), "it runs after a revert without memory");
        assert_eq!(subject.copies(id), 0);
        assert_eq!(names(&*driver, id).await, ["before"]);
    }
    driver.start(id).await.expect("start after the revert");
    assert_eq!(subject.copies(id), 1);
    match (&counter, kept) {
        (Some(counter), Some(kept)) => assert_goes_on(&*driver, id, counter, kept, None).await,
        _ => assert!(runs(&*driver, id).await),
    }
    cleaned(subject, &*driver, &config).await;
}

/// It is not started anew and not stopped; a runtime that cannot must say so and keep nothing.
pub async fn a_snapshot_of_the_disks_leaves_a_running_instance_alone(subject: &dyn Subject) {
    let Some((driver, config)) = snapshotted(subject, None, false).await else { return };
    let id = &config.id;
    let before = driver.observe(id).await.expect("observe");
    let taken = driver.snapshot(id, &request("live", false)).await;
    assert_eq!(since(&before), since(&driver.observe(id).await.expect("observe")));
    assert_eq!(subject.copies(id), 1);
    match taken {
        Ok(info) => {
            assert!(!info.memory);
            assert_eq!(names(&*driver, id).await, ["live"]);
            driver.revert(id, "live").await.expect("revert");
            assert_eq!(subject.copies(id), 0);
            driver.start(id).await.expect("start");
        }
        Err(DriverError::WrongState { reason, .. }) => {
            assert_eq!(names(&*driver, id).await, Vec::<String>::new());
            report::refused(&reason);
        }
        Err(error) => panic!("a snapshot of what runs: {error}"),
    }
    cleaned(subject, &*driver, &config).await;
}

fn since(observed: &Observed) -> Option<std::time::SystemTime> {
    match observed {
        Observed::Running(running) => running.since,
        other => panic!("it does not run: {other:?}"),
    }
}

/// A new agent finds them, returns to them, and deletes them with their instance.
pub async fn snapshots_outlive_the_driver(subject: &dyn Subject) {
    let Some((driver, config)) = snapshotted(subject, None, false).await else { return };
    let id = &config.id;
    driver.stop(id, StopMode::Force).await.expect("stop");
    let taken = driver.snapshot(id, &request("kept", false)).await.expect("snapshot");
    drop(driver);
    let driver = subject.driver();
    driver.recover(id, None).await.expect("recover");
    let found = driver.snapshots(id).await.expect("snapshots");
    assert!(found.len() == 1 && same(&found[0], &taken), "{found:?}");
    driver.revert(id, "kept").await.expect("revert");
    driver.start(id).await.expect("start");
    cleaned(subject, &*driver, &config).await;
}

/// A crash in the middle of one leaves nothing that looks like one, and it can be taken again.
pub async fn a_half_written_snapshot_is_never_listed(subject: &dyn Subject) {
    let Some((driver, config)) = snapshotted(subject, None, false).await else { return };
    let id = &config.id;
    driver.stop(id, StopMode::Force).await.expect("stop");
    if subject.leave_half_snapshot(id, "half").await {
        drop(driver);
        let driver = subject.driver();
        driver.recover(id, None).await.expect("recover");
        assert_eq!(names(&*driver, id).await, Vec::<String>::new());
        driver.snapshot(id, &request("half", false)).await.expect("snapshot over what was left");
        driver.revert(id, "half").await.expect("revert");
        driver.start(id).await.expect("start");
        return cleaned(subject, &*driver, &config).await;
    }
    report::skipped("nothing is left of a snapshot that was not completed");
    cleaned(subject, &*driver, &config).await;
}

/// Names become files and arguments of programs.
pub async fn what_is_no_name_is_refused(subject: &dyn Subject) {
    let Some((driver, config)) = snapshotted(subject, None, false).await else { return };
    let id = &config.id;
    driver.stop(id, StopMode::Force).await.expect("stop");
    let before = seen(subject, &*driver, id).await;
    for name in ["", "..", "../escape", "a/b", "A", "a,b=c", "a b", "ü", &"x".repeat(64)] {
        let outcome = driver.snapshot(id, &request(name, false)).await;
        assert!(matches!(outcome, Err(DriverError::InvalidConfig { .. })), "{name:?}: {outcome:?}");
    }
    assert_eq!(names(&*driver, id).await, Vec::<String>::new());
    assert_eq!(seen(subject, &*driver, id).await, before);
    cleaned(subject, &*driver, &config).await;
}

/// Neither to a snapshot that there never was, nor to one of another instance; what runs goes on.
pub async fn nobody_returns_to_what_is_not_there(subject: &dyn Subject) {
    let Some((driver, config)) = snapshotted(subject, None, false).await else { return };
    let before = seen(subject, &*driver, &config.id).await;
    let error = driver.revert(&config.id, "no-such").await.expect_err("a revert to nothing");
    assert!(matches!(error, DriverError::WrongState { .. } | DriverError::InvalidConfig { .. }), "{error}");
    assert!(error.to_string().contains("no-such"), "it does not say to what: {error}");
    assert_eq!(seen(subject, &*driver, &config.id).await, before);
    let unknown = InstanceId::generate();
    for outcome in [
        driver.snapshot(&unknown, &request("one", false)).await.map(drop),
        driver.revert(&unknown, "one").await,
        driver.snapshots(&unknown).await.map(drop),
    ] {
        assert!(matches!(outcome, Err(DriverError::NotFound(_))), "{outcome:?}");
    }
    cleaned(subject, &*driver, &config).await;
}

/// What it had in memory is there again, and what came after is undone; as often as one likes.
pub async fn a_snapshot_with_memory_goes_on_where_it_was(subject: &dyn Subject) {
    let counter = subject.counter();
    let Some((driver, config)) = snapshotted(subject, counter.as_ref(), true).await else { return };
    let id = &config.id;
    let kept = match &counter {
        Some(counter) => count_on(&*driver, id, counter).await,
        None => 0,
    };
    let info = driver.snapshot(id, &request("then", true)).await.expect("snapshot with memory");
    assert!(info.memory);
    assert!(runs(&*driver, id).await, "it does not run after the snapshot");
    for _ in 0..2 {
        let later = match &counter {
            Some(counter) => Some(count_on(&*driver, id, counter).await),
            None => None,
        };
        driver.revert(id, "then").await.expect("revert");
        assert!(runs(&*driver, id).await, "it ran then");
        assert_eq!(subject.copies(id), 1);
        if let Some(counter) = &counter {
            assert_goes_on(&*driver, id, counter, kept, later).await;
        }
    }
    cleaned(subject, &*driver, &config).await;
}

/// With memory it is afterwards what it was then.
pub async fn what_stood_still_stands_still_again(subject: &dyn Subject) {
    let Some((driver, config)) = snapshotted(subject, None, true).await else { return };
    let id = &config.id;
    driver.pause(id).await.expect("pause");
    driver.snapshot(id, &request("still", true)).await.expect("snapshot of what stands still");
    assert!(matches!(driver.observe(id).await.expect("observe"), Observed::Paused(_)));
    driver.resume(id).await.expect("resume");
    driver.revert(id, "still").await.expect("revert");
    assert!(matches!(driver.observe(id).await.expect("observe"), Observed::Paused(_)));
    assert_eq!(subject.copies(id), 1);
    driver.resume(id).await.expect("resume");
    assert!(runs(&*driver, id).await);
    cleaned(subject, &*driver, &config).await;
}

/// Also under a new agent; a start boots it again, all the same.
pub async fn what_was_stopped_goes_on_from_memory(subject: &dyn Subject) {
    let counter = subject.counter();
    let Some((driver, config)) = snapshotted(subject, counter.as_ref(), true).await else { return };
    let id = &config.id;
    let kept = match &counter {
        Some(counter) => count_on(&*driver, id, counter).await,
        None => 0,
    };
    driver.snapshot(id, &request("then", true)).await.expect("snapshot with memory");
    driver.stop(id, StopMode::Force).await.expect("stop");
    drop(driver);
    let driver = subject.driver();
    driver.recover(id, None).await.expect("recover");
    driver.revert(id, "then").await.expect("revert of what does not run");
    assert!(runs(&*driver, id).await);
    assert_eq!(subject.copies(id), 1);
    if let Some(counter) = &counter {
        assert_goes_on(&*driver, id, counter, kept, None).await;
    }
    driver.stop(id, StopMode::Force).await.expect("stop");
    driver.start(id).await.expect("start");
    if let Some(counter) = counter.filter(|counter| counter.grows == super::Grows::WhenAsked) {
        assert!(ask(&*driver, id, &counter).await <= 1, "a start did not boot it");
    }
    cleaned(subject, &*driver, &config).await;
}
