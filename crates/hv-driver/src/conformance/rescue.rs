//! Claims about rescue: a start from another image, and the way back.

use std::path::PathBuf;

use super::counting::{ask, assert_goes_on, count_on};
use super::{
    Subject, assert_unsupported, assert_wrong_state, can, cleaned, config, read_until, report, runs, seen,
};
use crate::{
    Capability, DiskFormat, Driver, DriverError, ImageContent, InstanceConfig, LocalImage, Observed,
    SnapshotRequest, StopMode,
};

/// Whether the driver rescues; otherwise makes sure that it says so and does nothing.
async fn can_rescue(subject: &dyn Subject, driver: &dyn Driver, config: &InstanceConfig) -> bool {
    if can(driver, Capability::Rescue).await {
        return true;
    }
    let before = seen(subject, driver, &config.id).await;
    let mut rescued = config.clone();
    rescued.spec.rescue = "rescue".to_owned();
    assert_unsupported(driver.update(&rescued).await, "a rescue");
    assert_eq!(seen(subject, driver, &config.id).await, before);
    false
}

/// Stops it, and starts it as the configuration says. It is told while it runs, as by an agent.
async fn turned(driver: &dyn Driver, config: &InstanceConfig) {
    let id = &config.id;
    driver.update(config).await.expect("update");
    assert!(runs(driver, id).await, "an update ended it");
    driver.stop(id, StopMode::Force).await.expect("stop");
    driver.update(config).await.expect("update of what does not run");
    driver.start(id).await.expect("start");
}

/// How often a guest has greeted so, once it has done so `times` times.
async fn greeted(driver: &dyn Driver, config: &InstanceConfig, greeting: &str, times: usize) {
    let mut console = driver.console(&config.id).await.expect("console");
    let printed = read_until(&mut console.output, greeting, times).await;
    assert_eq!(printed.matches(greeting).count(), times, "{printed:?}");
}

/// The rescue image boots, as often as it is started, and afterwards its own disk is as it was.
pub async fn it_starts_from_a_rescue_image_and_goes_back(subject: &dyn Subject) {
    let (driver, mut config) = (subject.driver(), config(subject));
    let counter = subject.disk_counter();
    if let Some(counter) = &counter {
        config.spec = counter.spec.clone();
    }
    driver.create(&config).await.expect("create");
    driver.start(&config.id).await.expect("start");
    if !can_rescue(subject, &*driver, &config).await {
        return cleaned(subject, &*driver, &config).await;
    }
    let Some((image, greeting)) = subject.rescue_image() else {
        report::skipped("its tests have no image to rescue with");
        return cleaned(subject, &*driver, &config).await;
    };
    let id = &config.id;
    greeted(&*driver, &config, subject.greeting(), 1).await;
    let kept = match &counter {
        Some(counter) => Some(count_on(&*driver, id, counter).await),
        None => None,
    };
    let mut rescued = config.clone();
    rescued.spec.rescue = image;
    turned(&*driver, &rescued).await;
    assert_eq!(subject.copies(id), 1);
    greeted(&*driver, &config, &greeting, 1).await;
    driver.stop(id, StopMode::Force).await.expect("stop");
    driver.start(id).await.expect("start in rescue again");
    greeted(&*driver, &config, &greeting, 2).await;
    turned(&*driver, &config).await;
    assert_eq!(subject.copies(id), 1);
    greeted(&*driver, &config, subject.greeting(), 2).await;
    if let (Some(counter), Some(kept)) = (&counter, kept) {
        assert_goes_on(&*driver, id, counter, kept, None).await;
        ask(&*driver, id, counter).await;
    }
    cleaned(subject, &*driver, &config).await;
}

/// It is refused before anything is stopped, and the next start is from its own disk.
pub async fn a_rescue_image_that_is_not_there_changes_nothing(subject: &dyn Subject) {
    let (driver, config) = super::started(subject).await;
    if can_rescue(subject, &*driver, &config).await {
        greeted(&*driver, &config, subject.greeting(), 1).await;
        let mut rescued = config.clone();
        rescued.spec.rescue = "registry.example/none:1".to_owned();
        let content =
            ImageContent::Disk { path: PathBuf::from("/nonexistent/image"), format: DiskFormat::Raw };
        for image in [None, Some(content)] {
            let digest = format!("sha256:{}", "0".repeat(64));
            rescued.rescue_image = image.map(|content| LocalImage { digest, content });
            let error = driver.update(&rescued).await.expect_err("an image that is not there was accepted");
            assert!(matches!(error, DriverError::InvalidConfig { .. }), "{error}");
            assert!(runs(&*driver, &config.id).await);
        }
        driver.stop(&config.id, StopMode::Force).await.expect("stop");
        driver.start(&config.id).await.expect("start");
        greeted(&*driver, &config, subject.greeting(), 2).await;
    }
    cleaned(subject, &*driver, &config).await;
}

/// A new agent process finds it running, starts it in rescue once it has ended, and has no snapshot taken of it.
pub async fn an_instance_in_rescue_is_found_again_and_takes_no_snapshot(subject: &dyn Subject) {
    let (driver, config) = super::created(subject).await;
    if !can_rescue(subject, &*driver, &config).await {
        return cleaned(subject, &*driver, &config).await;
    }
    let Some((image, greeting)) = subject.rescue_image() else {
        report::skipped("its tests have no image to rescue with");
        return cleaned(subject, &*driver, &config).await;
    };
    let id = &config.id;
    let mut rescued = config.clone();
    rescued.spec.rescue = image;
    driver.update(&rescued).await.expect("update");
    driver.start(id).await.expect("start");
    greeted(&*driver, &config, &greeting, 1).await;
    drop(driver);
    let driver = subject.driver();
    assert!(matches!(driver.recover(id, None).await.expect("recover"), Observed::Running(_)));
    assert_eq!(subject.copies(id), 1);
    if can(&*driver, Capability::Snapshot).await {
        let request = SnapshotRequest { name: "one".to_owned(), memory: false };
        assert_wrong_state(driver.snapshot(id, &request).await, "a snapshot in rescue");
        assert!(driver.snapshots(id).await.expect("snapshots").is_empty());
    }
    subject.kill(id).await;
    super::ended(&*driver, id).await;
    driver.start(id).await.expect("start");
    greeted(&*driver, &config, &greeting, 2).await;
    cleaned(subject, &*driver, &config).await;
}
