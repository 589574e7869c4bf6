//! Claims about what is refused, and how.

use super::{Subject, assert_wrong_state, cleaned, config, created, started};
use crate::{Capability, DriverError, ExecRequest, LogRequest, Result, StopMode};

/// The refusal says what there is, and nothing is left of the attempt.
pub async fn an_unknown_image_is_refused_and_leaves_nothing(subject: &dyn Subject) {
    let (driver, mut config) = (subject.driver(), config(subject));
    let known = config.spec.image.clone();
    for image in ["no-such-image", "../escape", "..", "a/b", &format!("{known}/../{known}")] {
        config.spec.image = image.to_owned();
        let error = driver.create(&config).await.expect_err("an unknown image was accepted");
        assert!(matches!(error, DriverError::InvalidConfig { .. }), "{image}: {error}");
        assert!(!error.retryable());
        assert!(error.to_string().contains(&known), "the refusal does not say what there is: {error}");
        assert!(driver.list().await.expect("list").is_empty());
        assert_eq!(subject.leftovers(), Vec::<String>::new());
    }
}

/// Every operation says that there is no such instance, except those that it satisfies.
pub async fn an_unknown_instance_is_not_found(subject: &dyn Subject) {
    let (driver, id) = (subject.driver(), config(subject).id);
    let check = |operation: &str, outcome: Result<()>| match outcome {
        Err(DriverError::NotFound(named)) => assert_eq!(named, id, "{operation}"),
        other => panic!("{operation}: {other:?}"),
    };
    check("start", driver.start(&id).await.map(drop));
    check("stop", driver.stop(&id, StopMode::Force).await);
    check("pause", driver.pause(&id).await);
    check("resume", driver.resume(&id).await);
    check("stats", driver.stats(&id).await.map(drop));
    check("console", driver.console(&id).await.map(drop));
    check("logs", driver.logs(&id, LogRequest::default()).await.map(drop));
    check("display", driver.display(&id).await.map(drop));
    driver.delete(&id).await.expect("delete of what is not there");
}

/// A console of nothing, say.
pub async fn what_does_not_run_refuses_what_needs_running(subject: &dyn Subject) {
    let (driver, config) = created(subject).await;
    let id = &config.id;
    for _ in ["created", "stopped"] {
        assert_wrong_state(driver.pause(id).await, "pause");
        assert_wrong_state(driver.resume(id).await, "resume");
        assert_wrong_state(driver.stats(id).await, "stats");
        assert_wrong_state(driver.console(id).await, "console");
        driver.start(id).await.expect("start");
        driver.stop(id, StopMode::Force).await.expect("stop");
    }
    cleaned(subject, &*driver, &config).await;
}

/// What is not among the capabilities is refused, and what is among them is not refused so.
pub async fn what_it_cannot_do_is_refused_as_unsupported(subject: &dyn Subject) {
    let (driver, config) = started(subject).await;
    let id = &config.id;
    let can = driver.fingerprint().await.capabilities;
    let check = |capability: Capability, outcome: Result<()>| {
        let is_refused = matches!(outcome, Err(DriverError::Unsupported { .. }));
        assert_eq!(is_refused, !can.contains(&capability), "{}: {outcome:?}", capability.name());
    };
    check(Capability::Console, driver.console(id).await.map(drop));
    check(Capability::Logs, driver.logs(id, LogRequest::default()).await.map(drop));
    check(Capability::Display, driver.display(id).await.map(drop));
    let request = ExecRequest { command: vec!["true".to_owned()], env: Vec::new(), tty: None };
    check(Capability::Exec, driver.exec(id, request).await.map(drop));
    check(Capability::Pause, driver.pause(id).await);
    check(Capability::Pause, driver.resume(id).await);
    cleaned(subject, &*driver, &config).await;
}

/// The list tells the truth, and a healthy driver can run.
pub async fn the_images_listed_can_be_started(subject: &dyn Subject) {
    let driver = subject.driver();
    let fingerprint = driver.fingerprint().await;
    assert!(fingerprint.healthy, "{}", fingerprint.message);
    assert!(!fingerprint.version.is_empty());
    for image in driver.images().await.expect("images") {
        assert_eq!(image.instance_type, driver.instance_type());
        let mut config = config(subject);
        config.spec.image = image.name;
        driver.create(&config).await.expect("create");
        driver.start(&config.id).await.expect("start");
        cleaned(subject, &*driver, &config).await;
    }
}
