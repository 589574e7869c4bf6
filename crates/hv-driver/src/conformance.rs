//! The conformance suite: every guarantee of the contract as a claim that each driver must pass.
//!
//! A driver's tests bring a [`Subject`] and call [`driver_conformance!`](crate::driver_conformance), which makes one
//! test of each claim. A claim panics if it does not hold.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt as _;
use futures::stream::BoxStream;
use hv_types::{InstanceId, InstanceSpec, Metadata};

use crate::{Driver, DriverError, Exit, InstanceConfig, Observed, Result};

pub mod fencing;
pub mod lifecycle;
pub mod output;
pub mod recovery;
pub mod refusal;

/// How long anything may take that a claim waits for.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// How often a condition is looked at that nothing announces.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);
/// What a graceful stop gives the guests of the suite.
pub const STOP_TIMEOUT: Duration = Duration::from_secs(30);

/// A driver under test, with what only its own tests know. Its guests print [`Subject::greeting`] on their console,
/// then echo what is typed, and power off when asked to.
#[async_trait]
pub trait Subject: Send + Sync {
    /// A driver over the subject's state, as a new agent process makes it. The one before has been dropped.
    fn driver(&self) -> Arc<dyn Driver>;

    /// A small instance.
    fn spec(&self) -> InstanceSpec;

    /// What its guest prints first.
    fn greeting(&self) -> &str;

    /// Makes an instance one whose guest powers off by itself soon after its start.
    fn make_short_lived(&self, config: &mut InstanceConfig);

    /// What a crash in the middle of `create` leaves of an instance.
    fn leave_half_created(&self, config: &InstanceConfig);

    /// Kills the running instance behind the driver's back.
    async fn kill(&self, id: &InstanceId);

    /// How many copies of an instance run, counted without the driver.
    fn copies(&self, id: &InstanceId) -> usize;

    /// Everything that lies around of any instance: files, processes.
    fn leftovers(&self) -> Vec<String>;
}

/// Makes one test of each claim. `$setup` is an async function that returns an `Option` of a [`Subject`]: `None` if
/// the runtime is not there, which it has then reported as skipped.
///
/// [`Subject`]: crate::conformance::Subject
#[macro_export]
macro_rules! driver_conformance {
    ($setup:path) => {
        $crate::driver_conformance! { @claims $setup;
            lifecycle: nothing_is_there_at_first,
            lifecycle: create_prepares_without_running,
            lifecycle: create_repeated_changes_nothing,
            lifecycle: start_repeated_runs_one_copy,
            lifecycle: a_graceful_stop_ends_the_guest,
            lifecycle: a_forced_stop_ends_the_guest,
            lifecycle: a_stopped_instance_starts_again,
            lifecycle: pause_and_resume_are_idempotent,
            lifecycle: a_paused_instance_can_be_stopped,
            lifecycle: delete_leaves_nothing,
            lifecycle: delete_of_a_running_instance_leaves_nothing,
            lifecycle: a_half_created_instance_is_completed_by_create,
            lifecycle: a_half_created_instance_is_found_and_deleted,
            lifecycle: names_with_commas_quotes_and_umlauts_are_harmless,
            lifecycle: instances_do_not_disturb_each_other,
            lifecycle: a_guest_that_powers_off_has_finished,
            lifecycle: an_unexpected_end_is_told,
            recovery: a_running_instance_outlives_the_driver,
            recovery: a_paused_instance_outlives_the_driver,
            recovery: a_stopped_instance_keeps_its_exit,
            recovery: a_created_instance_is_found_again,
            recovery: an_absent_instance_is_absent,
            recovery: an_end_while_nobody_watched_is_known,
            recovery: a_kill_while_nobody_watched_is_no_success,
            recovery: an_end_after_recovery_is_told,
            recovery: a_handle_of_another_version_does_no_harm,
            fencing: a_fenced_instance_is_gone_and_starts_again_when_told,
            fencing: an_instance_is_fenced_while_nobody_drives_it,
            fencing: fencing_what_does_not_run_does_no_harm,
            output: the_console_greets_and_echoes,
            output: two_consoles_see_the_same,
            output: a_late_console_sees_the_history,
            output: a_console_ends_with_its_instance,
            output: a_dropped_console_does_not_disturb,
            output: the_history_outlives_the_driver,
            output: logs_are_read_by_lines_also_when_stopped,
            output: followed_logs_end_with_the_instance,
            output: counters_never_fall,
            output: reads_come_at_any_time,
            refusal: an_unknown_image_is_refused_and_leaves_nothing,
            refusal: an_unknown_instance_is_not_found,
            refusal: what_does_not_run_refuses_what_needs_running,
            refusal: what_it_cannot_do_is_refused_as_unsupported,
            refusal: the_images_listed_can_be_started,
        }
    };
    (@claims $setup:path; $($family:ident: $claim:ident,)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $claim() {
                if let Some(subject) = $setup().await {
                    $crate::conformance::$family::$claim(&subject).await;
                }
            }
        )*
    };
}

/// An instance as the suite makes them.
pub fn config(subject: &dyn Subject) -> InstanceConfig {
    InstanceConfig {
        id: InstanceId::generate(),
        name: "conformance".to_owned(),
        spec: subject.spec(),
        metadata: Metadata::default(),
        image: None,
    }
}

/// A driver with an instance that was created.
pub async fn created(subject: &dyn Subject) -> (Arc<dyn Driver>, InstanceConfig) {
    let (driver, config) = (subject.driver(), config(subject));
    driver.create(&config).await.expect("create");
    (driver, config)
}

/// A driver with an instance that runs.
pub async fn started(subject: &dyn Subject) -> (Arc<dyn Driver>, InstanceConfig) {
    let (driver, config) = created(subject).await;
    driver.start(&config.id).await.expect("start");
    (driver, config)
}

/// Removes what a claim made, and makes sure that nothing is left.
pub async fn cleaned(subject: &dyn Subject, driver: &dyn Driver, config: &InstanceConfig) {
    driver.delete(&config.id).await.expect("delete");
    assert_eq!(driver.observe(&config.id).await.expect("observe"), Observed::Absent);
    assert_eq!(subject.leftovers(), Vec::<String>::new(), "left behind by delete");
    assert_eq!(subject.copies(&config.id), 0, "still running after delete");
}

async fn exit_of(driver: &dyn Driver, id: &InstanceId) -> Option<Exit> {
    match driver.observe(id).await.expect("observe") {
        Observed::Stopped(exit) => Some(exit),
        Observed::Absent | Observed::Running(_) | Observed::Paused(_) | Observed::HandedOver => None,
    }
}

async fn runs(driver: &dyn Driver, id: &InstanceId) -> bool {
    matches!(driver.observe(id).await.expect("observe"), Observed::Running(_))
}

/// Waits until an instance does not run, and says how it ended.
async fn ended(driver: &dyn Driver, id: &InstanceId) -> Exit {
    within("the instance ends", async {
        loop {
            if let Some(exit) = exit_of(driver, id).await {
                return exit;
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    })
    .await
}

async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    within(what, async {
        while !condition() {
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    })
    .await;
}

async fn within<T>(what: &str, work: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, work).await {
        Ok(done) => done,
        Err(_) => panic!("waited in vain until {what}"),
    }
}

/// Reads until `text` was printed so often, and returns all that was printed.
async fn read_until(
    output: &mut BoxStream<'static, Result<bytes::Bytes>>,
    text: &str,
    times: usize,
) -> String {
    let mut printed = Vec::new();
    within(&format!("{text:?} is printed"), async {
        loop {
            let so_far = String::from_utf8_lossy(&printed);
            if so_far.matches(text).count() >= times {
                return so_far.into_owned();
            }
            match output.next().await {
                Some(piece) => printed.extend_from_slice(&piece.expect("output")),
                None => panic!("the output ended before {text:?}: {so_far:?}"),
            }
        }
    })
    .await
}

/// Reads to the end.
async fn read_all(output: BoxStream<'static, Result<bytes::Bytes>>) -> String {
    let pieces: Vec<_> = within("the output ends", output.collect()).await;
    let bytes: Vec<u8> = pieces.into_iter().flat_map(|piece| piece.expect("output")).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn assert_wrong_state<T>(outcome: Result<T>, operation: &str) {
    match outcome {
        Err(DriverError::WrongState { .. }) => {}
        Err(other) => panic!("{operation} was refused otherwise: {other}"),
        Ok(_) => panic!("{operation} was not refused"),
    }
}
