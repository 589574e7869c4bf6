//! Claims about what a new driver finds of what an earlier one left.

use futures::StreamExt as _;

use super::{
    STOP_TIMEOUT, Subject, cleaned, config, created, ended, exit_of, read_until, runs, started, until, within,
};
use crate::{Exit, Handle, Observed, StopMode};

/// The guest goes on running, is found again, and everything can be done with it.
pub async fn a_running_instance_outlives_the_driver(subject: &dyn Subject) {
    let (driver, config) = started(subject).await;
    let mut console = driver.console(&config.id).await.expect("console");
    read_until(&mut console.output, subject.greeting(), 1).await;
    let Observed::Running(before) = driver.observe(&config.id).await.expect("observe") else {
        panic!("does not run")
    };
    drop((console, driver));
    assert_eq!(subject.copies(&config.id), 1);

    let driver = subject.driver();
    assert_eq!(driver.list().await.expect("list"), std::slice::from_ref(&config.id));
    let Observed::Running(after) = driver.recover(&config.id, None).await.expect("recover") else {
        panic!("was not found running");
    };
    assert_eq!(before.since, after.since);
    driver.create(&config).await.expect("create of what runs");
    driver.start(&config.id).await.expect("start of what runs");
    assert_eq!(subject.copies(&config.id), 1);
    driver.stats(&config.id).await.expect("stats");
    driver.stop(&config.id, StopMode::Graceful(STOP_TIMEOUT)).await.expect("stop");
    assert_eq!(exit_of(&*driver, &config.id).await, Some(Exit::Stopped));
    cleaned(subject, &*driver, &config).await;
}

/// It is still paused, and can go on.
pub async fn a_paused_instance_outlives_the_driver(subject: &dyn Subject) {
    let (driver, config) = started(subject).await;
    driver.pause(&config.id).await.expect("pause");
    drop(driver);
    let driver = subject.driver();
    assert!(matches!(driver.recover(&config.id, None).await.expect("recover"), Observed::Paused(_)));
    driver.resume(&config.id).await.expect("resume");
    assert!(runs(&*driver, &config.id).await);
    assert_eq!(subject.copies(&config.id), 1);
    cleaned(subject, &*driver, &config).await;
}

/// How it ended is not forgotten.
pub async fn a_stopped_instance_keeps_its_exit(subject: &dyn Subject) {
    let (driver, config) = started(subject).await;
    driver.stop(&config.id, StopMode::Force).await.expect("stop");
    drop(driver);
    let driver = subject.driver();
    assert_eq!(driver.recover(&config.id, None).await.expect("recover"), Observed::Stopped(Exit::Stopped));
    driver.start(&config.id).await.expect("start");
    assert_eq!(subject.copies(&config.id), 1);
    cleaned(subject, &*driver, &config).await;
}

/// What was created and never started is ready to start.
pub async fn a_created_instance_is_found_again(subject: &dyn Subject) {
    let (driver, config) = created(subject).await;
    drop(driver);
    let driver = subject.driver();
    assert_eq!(
        driver.recover(&config.id, None).await.expect("recover"),
        Observed::Stopped(Exit::NeverStarted)
    );
    driver.start(&config.id).await.expect("start");
    assert!(runs(&*driver, &config.id).await);
    cleaned(subject, &*driver, &config).await;
}

/// A journal may know what is gone.
pub async fn an_absent_instance_is_absent(subject: &dyn Subject) {
    let (driver, config) = created(subject).await;
    let handle = driver.create(&config).await.expect("create");
    driver.delete(&config.id).await.expect("delete");
    drop(driver);
    let driver = subject.driver();
    assert_eq!(driver.recover(&config.id, Some(&handle)).await.expect("recover"), Observed::Absent);
}

/// A guest that powered off while no agent ran has finished all the same.
pub async fn an_end_while_nobody_watched_is_known(subject: &dyn Subject) {
    let (driver, mut config) = (subject.driver(), config(subject));
    subject.make_short_lived(&mut config);
    driver.create(&config).await.expect("create");
    driver.start(&config.id).await.expect("start");
    drop(driver);
    until("the guest powers off", || subject.copies(&config.id) == 0).await;
    let driver = subject.driver();
    assert_eq!(driver.recover(&config.id, None).await.expect("recover"), Observed::Stopped(Exit::Finished));
    cleaned(subject, &*driver, &config).await;
}

/// What was killed while no agent ran did not succeed.
pub async fn a_kill_while_nobody_watched_is_no_success(subject: &dyn Subject) {
    let (driver, config) = started(subject).await;
    drop(driver);
    subject.kill(&config.id).await;
    let driver = subject.driver();
    let observed = driver.recover(&config.id, None).await.expect("recover");
    assert!(matches!(observed, Observed::Stopped(Exit::Lost | Exit::Failed(_))), "{observed:?}");
    driver.start(&config.id).await.expect("start again");
    assert_eq!(subject.copies(&config.id), 1);
    cleaned(subject, &*driver, &config).await;
}

/// What was taken over is watched as if it had been started here.
pub async fn an_end_after_recovery_is_told(subject: &dyn Subject) {
    let (driver, config) = started(subject).await;
    drop(driver);
    let driver = subject.driver();
    let mut events = driver.events();
    driver.recover(&config.id, None).await.expect("recover");
    subject.kill(&config.id).await;
    let event = within("the end is told", events.next()).await.expect("event");
    assert_eq!(event.id, config.id);
    let exit = ended(&*driver, &config.id).await;
    assert!(matches!(exit, Exit::Failed(_) | Exit::Lost), "{exit:?}");
    cleaned(subject, &*driver, &config).await;
}

/// The journal may be older or newer than the driver.
pub async fn a_handle_of_another_version_does_no_harm(subject: &dyn Subject) {
    let (driver, config) = started(subject).await;
    let name = driver.name().to_owned();
    drop(driver);
    let driver = subject.driver();
    let handle = Handle { driver: name, version: 0, data: serde_json::json!({ "pid": 1 }) };
    assert!(matches!(
        driver.recover(&config.id, Some(&handle)).await.expect("recover"),
        Observed::Running(_)
    ));
    assert_eq!(subject.copies(&config.id), 1);
    cleaned(subject, &*driver, &config).await;
}
