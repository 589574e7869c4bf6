//! Claims about create, start, stop, pause, resume and delete.

use futures::StreamExt as _;

use super::{
    STOP_TIMEOUT, Subject, assert_wrong_state, can, cleaned, config, created, ended, exit_of, read_until,
    runs, started, within,
};
use crate::{Capability, DriverError, Exit, Observed, StopMode};

/// An empty state lists nothing, and deleting what was never there succeeds.
pub async fn nothing_is_there_at_first(subject: &dyn Subject) {
    let (driver, config) = (subject.driver(), config(subject));
    assert!(driver.list().await.expect("list").is_empty());
    assert_eq!(driver.observe(&config.id).await.expect("observe"), Observed::Absent);
    driver.delete(&config.id).await.expect("delete of what is not there");
    assert!(matches!(driver.start(&config.id).await, Err(DriverError::NotFound(_))));
}

/// Creating runs nothing.
pub async fn create_prepares_without_running(subject: &dyn Subject) {
    let (driver, config) = created(subject).await;
    assert_eq!(exit_of(&*driver, &config.id).await, Some(Exit::NeverStarted));
    assert_eq!(driver.list().await.expect("list"), std::slice::from_ref(&config.id));
    assert_eq!(subject.copies(&config.id), 0);
    cleaned(subject, &*driver, &config).await;
}

/// A second create makes nothing anew, even if it asks for something else, and does not disturb what runs.
pub async fn create_repeated_changes_nothing(subject: &dyn Subject) {
    let (driver, config) = created(subject).await;
    let before = subject.leftovers();
    let mut other = config.clone();
    other.spec.image = "no-such-image".to_owned();
    driver.create(&other).await.expect("create of what exists");
    assert_eq!(subject.leftovers(), before);
    driver.start(&config.id).await.expect("start");
    driver.create(&config).await.expect("create of what runs");
    assert!(runs(&*driver, &config.id).await);
    assert_eq!(subject.copies(&config.id), 1);
    cleaned(subject, &*driver, &config).await;
}

/// However often it is started, it runs once.
pub async fn start_repeated_runs_one_copy(subject: &dyn Subject) {
    let (driver, config) = started(subject).await;
    let Observed::Running(first) = driver.observe(&config.id).await.expect("observe") else {
        panic!("does not run")
    };
    assert_eq!(subject.copies(&config.id), 1);
    for _ in 0..3 {
        driver.start(&config.id).await.expect("start of what runs");
    }
    assert_eq!(subject.copies(&config.id), 1);
    let Observed::Running(last) = driver.observe(&config.id).await.expect("observe") else {
        panic!("does not run")
    };
    assert_eq!(first.since, last.since, "it was started anew");
    cleaned(subject, &*driver, &config).await;
}

/// The guest hears that it is to power off, well before the timeout.
pub async fn a_graceful_stop_ends_the_guest(subject: &dyn Subject) {
    let (driver, config) = started(subject).await;
    let mut console = driver.console(&config.id).await.expect("console");
    read_until(&mut console.output, subject.greeting(), 1).await;
    let begun = std::time::Instant::now();
    driver.stop(&config.id, StopMode::Graceful(STOP_TIMEOUT)).await.expect("stop");
    assert!(begun.elapsed() < STOP_TIMEOUT, "the guest did not hear");
    assert_eq!(exit_of(&*driver, &config.id).await, Some(Exit::Stopped));
    assert_eq!(subject.copies(&config.id), 0);
    driver.stop(&config.id, StopMode::Graceful(STOP_TIMEOUT)).await.expect("stop of what stands");
    assert_eq!(exit_of(&*driver, &config.id).await, Some(Exit::Stopped));
    cleaned(subject, &*driver, &config).await;
}

/// A forced stop does not wait for the guest.
pub async fn a_forced_stop_ends_the_guest(subject: &dyn Subject) {
    let (driver, config) = started(subject).await;
    driver.stop(&config.id, StopMode::Force).await.expect("stop");
    assert_eq!(exit_of(&*driver, &config.id).await, Some(Exit::Stopped));
    assert_eq!(subject.copies(&config.id), 0);
    driver.stop(&config.id, StopMode::Force).await.expect("stop of what stands");
    cleaned(subject, &*driver, &config).await;
}

/// Stopping is not the end of an instance.
pub async fn a_stopped_instance_starts_again(subject: &dyn Subject) {
    let (driver, config) = started(subject).await;
    for _ in 0..2 {
        driver.stop(&config.id, StopMode::Force).await.expect("stop");
        driver.start(&config.id).await.expect("start again");
        assert!(runs(&*driver, &config.id).await);
        assert_eq!(subject.copies(&config.id), 1);
    }
    cleaned(subject, &*driver, &config).await;
}

/// Both may be repeated; starting what stands still is refused, because it would not run then.
pub async fn pause_and_resume_are_idempotent(subject: &dyn Subject) {
    let (driver, config) = started(subject).await;
    for _ in 0..2 {
        driver.pause(&config.id).await.expect("pause");
        assert!(matches!(driver.observe(&config.id).await.expect("observe"), Observed::Paused(_)));
    }
    assert_wrong_state(driver.start(&config.id).await, "start of what is paused");
    for _ in 0..2 {
        driver.resume(&config.id).await.expect("resume");
        assert!(runs(&*driver, &config.id).await);
    }
    assert_eq!(subject.copies(&config.id), 1);
    cleaned(subject, &*driver, &config).await;
}

/// A guest that stands still can hear nothing, and is stopped all the same.
pub async fn a_paused_instance_can_be_stopped(subject: &dyn Subject) {
    let (driver, config) = started(subject).await;
    let mut console = driver.console(&config.id).await.expect("console");
    read_until(&mut console.output, subject.greeting(), 1).await;
    driver.pause(&config.id).await.expect("pause");
    driver.stop(&config.id, StopMode::Graceful(STOP_TIMEOUT)).await.expect("stop");
    assert_eq!(exit_of(&*driver, &config.id).await, Some(Exit::Stopped));
    cleaned(subject, &*driver, &config).await;
}

/// Nothing is left, and deleting again succeeds.
pub async fn delete_leaves_nothing(subject: &dyn Subject) {
    let (driver, config) = started(subject).await;
    driver.stop(&config.id, StopMode::Force).await.expect("stop");
    cleaned(subject, &*driver, &config).await;
    cleaned(subject, &*driver, &config).await;
    assert!(driver.list().await.expect("list").is_empty());
}

/// What runs need not be stopped first; the id can be used again.
pub async fn delete_of_a_running_instance_leaves_nothing(subject: &dyn Subject) {
    let (driver, config) = started(subject).await;
    cleaned(subject, &*driver, &config).await;
    driver.create(&config).await.expect("create again");
    assert_eq!(exit_of(&*driver, &config.id).await, Some(Exit::NeverStarted));
    cleaned(subject, &*driver, &config).await;
}

/// Create repairs what a crash in an earlier create left.
pub async fn a_half_created_instance_is_completed_by_create(subject: &dyn Subject) {
    let (driver, config) = (subject.driver(), config(subject));
    subject.leave_half_created(&config);
    assert_wrong_state(driver.start(&config.id).await, "start of what is half created");
    driver.create(&config).await.expect("create over what is half created");
    driver.start(&config.id).await.expect("start");
    assert_eq!(subject.copies(&config.id), 1);
    cleaned(subject, &*driver, &config).await;
}

/// List finds what a crash left, and delete removes it.
pub async fn a_half_created_instance_is_found_and_deleted(subject: &dyn Subject) {
    let (driver, config) = (subject.driver(), config(subject));
    subject.leave_half_created(&config);
    assert_eq!(driver.list().await.expect("list"), std::slice::from_ref(&config.id));
    assert_eq!(exit_of(&*driver, &config.id).await, Some(Exit::NeverStarted));
    driver.stop(&config.id, StopMode::Force).await.expect("stop of what is half created");
    cleaned(subject, &*driver, &config).await;
}

/// Names are text and nothing else, wherever they end up.
pub async fn names_with_commas_quotes_and_umlauts_are_harmless(subject: &dyn Subject) {
    let (driver, mut config) = (subject.driver(), config(subject));
    config.name = "a,b=c \"d\" 'e' ü $(f) `g` \\ ,,process=h -i".to_owned();
    if can(&*driver, Capability::UserData).await {
        config.spec.user_data = "#cloud-config\nruncmd: ['echo \"ü\", a,b']\n".to_owned();
    }
    config.metadata.annotations.insert("a/b".to_owned(), "c,d\"e'".to_owned());
    driver.create(&config).await.expect("create");
    driver.start(&config.id).await.expect("start");
    assert!(runs(&*driver, &config.id).await);
    cleaned(subject, &*driver, &config).await;
}

/// What happens to one does not happen to the other.
pub async fn instances_do_not_disturb_each_other(subject: &dyn Subject) {
    let (driver, one) = started(subject).await;
    let other = config(subject);
    driver.create(&other).await.expect("create");
    driver.start(&other.id).await.expect("start");
    assert_eq!(driver.list().await.expect("list").len(), 2);
    driver.delete(&one.id).await.expect("delete");
    assert!(runs(&*driver, &other.id).await);
    assert_eq!((subject.copies(&one.id), subject.copies(&other.id)), (0, 1));
    cleaned(subject, &*driver, &other).await;
}

/// A guest that ends by itself without a fault has finished, and an event says that something happened.
pub async fn a_guest_that_powers_off_has_finished(subject: &dyn Subject) {
    let (driver, mut config) = (subject.driver(), config(subject));
    subject.make_short_lived(&mut config);
    let mut events = driver.events();
    driver.create(&config).await.expect("create");
    driver.start(&config.id).await.expect("start");
    let event = within("the end is told", events.next()).await.expect("event");
    assert_eq!(event.id, config.id);
    assert_eq!(ended(&*driver, &config.id).await, Exit::Finished);
    cleaned(subject, &*driver, &config).await;
}

/// What is killed behind the driver's back is told, and is no success; it can be started again.
pub async fn an_unexpected_end_is_told(subject: &dyn Subject) {
    let (driver, config) = started(subject).await;
    let mut events = driver.events();
    subject.kill(&config.id).await;
    let event = within("the end is told", events.next()).await.expect("event");
    assert_eq!(event.id, config.id);
    let exit = ended(&*driver, &config.id).await;
    assert!(matches!(exit, Exit::Failed(_) | Exit::Lost), "{exit:?}");
    driver.start(&config.id).await.expect("start again");
    assert_eq!(subject.copies(&config.id), 1);
    cleaned(subject, &*driver, &config).await;
}
