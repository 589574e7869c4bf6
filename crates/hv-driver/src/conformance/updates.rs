//! Claims about changes of what an instance is made of.

use hv_types::InstanceId;
use hv_types::instance::{DiskSpec, NetworkSpec};

use super::{Measured, Subject, can, cleaned, config, created, report, runs, seen, started};
use crate::{Capability, Driver, DriverError, InstanceConfig, Observed, StopMode, Updated};

/// The size of the disks that come and go, in bytes.
const DISK_BYTES: u64 = 16 << 20;

/// Whether the driver changes instances at all; otherwise makes sure that it says so and does nothing.
async fn can_update(subject: &dyn Subject, driver: &dyn Driver, config: &InstanceConfig) -> bool {
    let before = seen(subject, driver, &config.id).await;
    match driver.update(config).await {
        Ok(_) => true,
        Err(DriverError::Unsupported { reason, .. }) => {
            assert_eq!(seen(subject, driver, &config.id).await, before);
            assert!(!reason.is_empty());
            report::refused(&reason);
            false
        }
        Err(error) => panic!("an update that changes nothing failed: {error}"),
    }
}

fn grown(config: &InstanceConfig) -> InstanceConfig {
    let mut grown = config.clone();
    grown.spec.cpu_cores += 1;
    grown.spec.memory_bytes *= 2;
    grown
}

fn with_disk(config: &InstanceConfig) -> InstanceConfig {
    let mut with = config.clone();
    let name = "extra".to_owned();
    with.spec.disks.push(DiskSpec { name, size_bytes: DISK_BYTES, ..DiskSpec::default() });
    with
}

fn disks_of(config: &InstanceConfig) -> Vec<u64> {
    let beside = config.spec.disks.iter().filter(|disk| !disk.boot);
    let mut sizes: Vec<_> = beside.map(|disk| disk.size_bytes).collect();
    sizes.sort_unstable();
    sizes
}

/// That the runtime says the same as the configuration, as far as it can be asked.
async fn assert_is(subject: &dyn Subject, config: &InstanceConfig) {
    let Some(Measured { cpu_cores, memory_bytes, disks }) = subject.measured(&config.id).await else {
        return;
    };
    assert!(cpu_cores.is_none_or(|cores| cores == config.spec.cpu_cores), "it has {cpu_cores:?} cores");
    assert!(
        memory_bytes.is_none_or(|bytes| bytes == config.spec.memory_bytes),
        "it has {memory_bytes:?} bytes"
    );
    assert!(disks.as_ref().is_none_or(|disks| *disks == disks_of(config)), "it has disks of {disks:?} bytes");
}

/// An update, which must not disturb what runs. `None`: done; otherwise what waits.
async fn updated(subject: &dyn Subject, driver: &dyn Driver, config: &InstanceConfig) -> Option<String> {
    let before = driver.observe(&config.id).await.expect("observe");
    let outcome = driver.update(config).await.expect("update");
    match (before, driver.observe(&config.id).await.expect("observe")) {
        (Observed::Running(before), Observed::Running(after)) => {
            assert_eq!(before.since, after.since, "it was started anew");
            assert_eq!(subject.copies(&config.id), 1);
        }
        (before, after) => assert_eq!(before, after),
    }
    match outcome {
        Updated::Done => {
            assert_is(subject, config).await;
            None
        }
        Updated::AtNextStart(what) => {
            assert!(!what.is_empty(), "it does not say what waits");
            Some(what)
        }
    }
}

async fn restarted(driver: &dyn Driver, id: &InstanceId) {
    driver.stop(id, StopMode::Force).await.expect("stop");
    driver.start(id).await.expect("start");
}

/// Live where the driver promises it, otherwise from the next start on.
async fn changed(subject: &dyn Subject, driver: &dyn Driver, config: &InstanceConfig, live: Capability) {
    let waits = updated(subject, driver, config).await;
    match waits {
        Some(reason) => {
            assert!(!can(driver, live).await, "`{}` is promised: {reason}", live.name());
            report::refused(&format!("waits for the next start: {reason}"));
        }
        None => {
            assert!(can(driver, live).await, "`{}` works, and is not among the capabilities", live.name());
        }
    }
    restarted(driver, &config.id).await;
    assert_is(subject, config).await;
}

/// Whatever waits for the next start has come with it.
pub async fn what_is_changed_is_true_after_a_restart(subject: &dyn Subject) {
    let (driver, config) = started(subject).await;
    if can_update(subject, &*driver, &config).await {
        let grown = grown(&config);
        updated(subject, &*driver, &grown).await;
        restarted(&*driver, &config.id).await;
        assert_is(subject, &grown).await;
        assert_eq!(driver.update(&grown).await.expect("update"), Updated::Done, "something still waits");
    }
    cleaned(subject, &*driver, &config).await;
}

/// It is found by its id as before, whatever its name.
pub async fn a_new_name_disturbs_nothing_and_is_there_after_a_restart(subject: &dyn Subject) {
    let (driver, config) = started(subject).await;
    if can_update(subject, &*driver, &config).await {
        let renamed = InstanceConfig { name: "another-name".to_owned(), ..config.clone() };
        for _ in 0..2 {
            updated(subject, &*driver, &renamed).await;
        }
        let listed = driver.list().await.expect("list");
        assert_eq!(listed, std::slice::from_ref(&config.id));
        restarted(&*driver, &config.id).await;
        assert_eq!(subject.copies(&config.id), 1);
        assert_eq!(driver.update(&renamed).await.expect("update"), Updated::Done, "the name still waits");
    }
    cleaned(subject, &*driver, &config).await;
}

/// There is nothing to wait for, also if it never ran.
pub async fn an_update_of_what_does_not_run_is_done_at_once(subject: &dyn Subject) {
    let (driver, config) = created(subject).await;
    if can_update(subject, &*driver, &config).await {
        let mut grown = grown(&config);
        grown.name = "renamed".to_owned();
        assert_eq!(driver.update(&grown).await.expect("update"), Updated::Done);
        assert_eq!(subject.copies(&config.id), 0);
        driver.start(&config.id).await.expect("start");
        assert!(runs(&*driver, &config.id).await);
        assert_is(subject, &grown).await;
        driver.stop(&config.id, StopMode::Force).await.expect("stop");
        assert_eq!(driver.update(&config).await.expect("update back"), Updated::Done);
        driver.start(&config.id).await.expect("start");
        assert_is(subject, &config).await;
    }
    cleaned(subject, &*driver, &config).await;
}

/// What was done is not done twice, and what waits goes on waiting.
pub async fn the_same_update_again_changes_nothing(subject: &dyn Subject) {
    let (driver, config) = started(subject).await;
    if can_update(subject, &*driver, &config).await {
        assert_eq!(driver.update(&config).await.expect("update to what it is"), Updated::Done);
        let grown = grown(&config);
        let first = driver.update(&grown).await.expect("update");
        let before = seen(subject, &*driver, &config.id).await;
        for _ in 0..2 {
            assert_eq!(driver.update(&grown).await.expect("the same update"), first);
            assert_eq!(seen(subject, &*driver, &config.id).await, before);
        }
    }
    cleaned(subject, &*driver, &config).await;
}

/// A new agent starts it as it was changed under the old one.
pub async fn an_update_outlives_the_driver(subject: &dyn Subject) {
    let (driver, config) = started(subject).await;
    if !can_update(subject, &*driver, &config).await {
        return cleaned(subject, &*driver, &config).await;
    }
    let grown = grown(&config);
    let first = driver.update(&grown).await.expect("update");
    drop(driver);
    let driver = subject.driver();
    assert!(matches!(driver.recover(&config.id, None).await.expect("recover"), Observed::Running(_)));
    assert_eq!(driver.update(&grown).await.expect("the same update"), first);
    restarted(&*driver, &config.id).await;
    assert_is(subject, &grown).await;
    cleaned(subject, &*driver, &config).await;
}

/// Another image, say; and what ran goes on as it was.
pub async fn what_can_never_be_is_refused_and_changes_nothing(subject: &dyn Subject) {
    let (driver, config) = started(subject).await;
    if can_update(subject, &*driver, &config).await {
        let before = seen(subject, &*driver, &config.id).await;
        let mut other = grown(&config);
        other.spec.image = "another-image".to_owned();
        let error = driver.update(&other).await.expect_err("another image was accepted");
        assert!(matches!(error, DriverError::InvalidConfig { .. }), "{error}");
        assert!(!error.retryable());
        assert_eq!(seen(subject, &*driver, &config.id).await, before);
        assert_is(subject, &config).await;
        let mut unknown = config.clone();
        unknown.id = InstanceId::generate();
        let error = driver.update(&unknown).await.expect_err("an unknown instance was changed");
        assert!(matches!(error, DriverError::NotFound(_)), "{error}");
        restarted(&*driver, &config.id).await;
        assert_is(subject, &config).await;
    }
    cleaned(subject, &*driver, &config).await;
}

/// What is on it would be cut off.
pub async fn a_disk_never_shrinks(subject: &dyn Subject) {
    let (driver, config) = (subject.driver(), with_disk(&config(subject)));
    match driver.create(&config).await {
        Ok(_) => {}
        Err(DriverError::Unsupported { reason, .. } | DriverError::InvalidConfig { reason, .. }) => {
            assert_eq!(subject.leftovers(), Vec::<String>::new());
            return report::refused(&reason);
        }
        Err(error) => panic!("a disk beside the image's own: {error}"),
    }
    driver.start(&config.id).await.expect("start");
    assert_is(subject, &config).await;
    if can_update(subject, &*driver, &config).await {
        let before = seen(subject, &*driver, &config.id).await;
        let mut smaller = config.clone();
        smaller.spec.disks[0].size_bytes /= 2;
        let error = driver.update(&smaller).await.expect_err("a disk that shrinks was accepted");
        assert!(matches!(error, DriverError::InvalidConfig { .. }), "{error}");
        assert_eq!(seen(subject, &*driver, &config.id).await, before);
        assert_is(subject, &config).await;
    }
    cleaned(subject, &*driver, &config).await;
}

/// Without a restart, where the runtime can.
pub async fn cores_and_memory_grow_while_it_runs_or_later(subject: &dyn Subject) {
    let (driver, config) = started(subject).await;
    if can_update(subject, &*driver, &config).await {
        changed(subject, &*driver, &grown(&config), Capability::ResizeLive).await;
    }
    cleaned(subject, &*driver, &config).await;
}

/// A disk is made, and removed with what is on it.
pub async fn a_disk_comes_and_goes_while_it_runs_or_later(subject: &dyn Subject) {
    let (driver, config) = started(subject).await;
    if can_update(subject, &*driver, &config).await {
        match driver.update(&with_disk(&config)).await {
            Err(DriverError::Unsupported { reason, .. } | DriverError::InvalidConfig { reason, .. }) => {
                assert!(!can(&*driver, Capability::HotplugDisk).await, "it is promised: {reason}");
                assert_is(subject, &config).await;
                report::refused(&reason);
            }
            Err(error) => panic!("a disk more: {error}"),
            Ok(_) => {
                changed(subject, &*driver, &with_disk(&config), Capability::HotplugDisk).await;
                changed(subject, &*driver, &config, Capability::HotplugDisk).await;
            }
        }
    }
    cleaned(subject, &*driver, &config).await;
}

/// It is put on another network.
pub async fn a_network_is_changed_while_it_runs_or_later(subject: &dyn Subject) {
    let (driver, config) = started(subject).await;
    if can_update(subject, &*driver, &config).await {
        let promised = can(&*driver, Capability::HotplugNetwork).await;
        match subject.network() {
            Some(network) => {
                let mut other = config.clone();
                other.spec.network = Some(network);
                changed(subject, &*driver, &other, Capability::HotplugNetwork).await;
                changed(subject, &*driver, &config, Capability::HotplugNetwork).await;
            }
            None if promised => report::skipped("its tests have no second network"),
            None => {
                let mut other = config.clone();
                let network_id = "no-such-network".to_owned();
                other.spec.network = Some(NetworkSpec { network_id, ..NetworkSpec::default() });
                match driver.update(&other).await {
                    Err(
                        DriverError::Unsupported { reason, .. } | DriverError::InvalidConfig { reason, .. },
                    )
                    | Ok(Updated::AtNextStart(reason)) => report::refused(&reason),
                    other => panic!("it was put on a network that is not there: {other:?}"),
                }
                assert!(runs(&*driver, &config.id).await);
            }
        }
    }
    cleaned(subject, &*driver, &config).await;
}
