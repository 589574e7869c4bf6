//! Claims about instances that are killed by a process that has no driver.

use hv_types::InstanceId;

use super::{LOOK_INTERVAL, Subject, cleaned, created, ended, report, runs, started, within};
use crate::fence::{FenceTarget, Outcome, Zeal, kill};
use crate::{Driver, Exit, Observed};

/// Kills as the fencer does: again and again, until it is certain.
async fn fenced(target: &FenceTarget) {
    within("it is fenced", async {
        while kill(target, Zeal::Instance) != Outcome::Gone {
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    })
    .await;
}

/// `None` where the driver cannot do it, and says so.
fn target_of(driver: &dyn Driver, id: &InstanceId) -> Option<FenceTarget> {
    let target = driver.fence_target(id);
    if target.is_none() {
        report::refused("it names nothing that could be killed without it");
    }
    target
}

fn assert_fenced(exit: &Exit) {
    assert!(matches!(exit, Exit::Fenced | Exit::Failed(_) | Exit::Lost), "fenced, and taken for {exit:?}");
}

/// It does not run, is not taken for a success, stays down, and starts again as one copy.
pub async fn a_fenced_instance_is_gone_and_starts_again_when_told(subject: &dyn Subject) {
    let (driver, config) = created(subject).await;
    let Some(before) = target_of(&*driver, &config.id) else {
        return cleaned(subject, &*driver, &config).await;
    };
    driver.start(&config.id).await.expect("start");
    assert_eq!(driver.fence_target(&config.id), Some(before.clone()), "the target changed with the start");
    fenced(&before).await;
    assert_eq!(subject.copies(&config.id), 0, "it outlived the fencer");
    assert_fenced(&ended(&*driver, &config.id).await);
    assert!(!runs(&*driver, &config.id).await);
    driver.start(&config.id).await.expect("start again");
    assert_eq!(subject.copies(&config.id), 1);
    assert!(runs(&*driver, &config.id).await);
    cleaned(subject, &*driver, &config).await;
}

/// The same while there is no agent; the next one finds out.
pub async fn an_instance_is_fenced_while_nobody_drives_it(subject: &dyn Subject) {
    let (driver, config) = started(subject).await;
    let target = target_of(&*driver, &config.id);
    drop(driver);
    if let Some(target) = &target {
        fenced(target).await;
        assert_eq!(subject.copies(&config.id), 0, "it outlived the fencer");
    }
    let driver = subject.driver();
    match driver.recover(&config.id, None).await.expect("recover") {
        Observed::Stopped(exit) => assert_fenced(&exit),
        other => assert!(target.is_none(), "{other:?}"),
    }
    cleaned(subject, &*driver, &config).await;
}

/// What was never started, or was deleted, can be fenced all the same, and starts afterwards.
pub async fn fencing_what_does_not_run_does_no_harm(subject: &dyn Subject) {
    let (driver, config) = created(subject).await;
    let Some(target) = target_of(&*driver, &config.id) else {
        return cleaned(subject, &*driver, &config).await;
    };
    fenced(&target).await;
    assert!(matches!(driver.observe(&config.id).await.expect("observe"), Observed::Stopped(_)));
    driver.start(&config.id).await.expect("start");
    assert_eq!(subject.copies(&config.id), 1);
    cleaned(subject, &*driver, &config).await;
}
