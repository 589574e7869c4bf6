//! The conformance suite: every guarantee of the contract as a claim that each driver must pass.
//!
//! A driver's tests bring a [`Subject`] and call [`driver_conformance!`](crate::driver_conformance), which makes one
//! test of each claim. A claim panics if it does not hold.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::BoxStream;
use hv_types::{InstanceId, Metadata};

use crate::{Capability, Driver, DriverError, Exit, InstanceConfig, Observed, Result};

mod claims;
pub mod clones;
pub mod commands;
mod counting;
pub mod fencing;
pub mod lifecycle;
pub mod logs;
pub mod migration;
pub mod options;
pub mod output;
pub mod recovery;
pub mod refusal;
pub mod report;
pub mod rescue;
pub mod snapshots;
mod subject;
pub mod updates;

pub use subject::{Counter, Grows, Measured, Subject};

/// How long anything may take that a claim waits for.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// How often a condition is looked at that nothing announces.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);
/// What a graceful stop gives the guests of the suite.
pub const STOP_TIMEOUT: Duration = Duration::from_secs(30);

/// An instance as the suite makes them.
pub fn config(subject: &dyn Subject) -> InstanceConfig {
    InstanceConfig {
        id: InstanceId::generate(),
        name: "conformance".to_owned(),
        spec: subject.spec(),
        metadata: Metadata::default(),
        image: None,
        rescue_image: None,
        devices: None,
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

async fn can(driver: &dyn Driver, capability: Capability) -> bool {
    driver.fingerprint().await.capabilities.contains(&capability)
}

/// What a driver cannot do it refuses with the reason, which becomes the claim's outcome.
fn assert_unsupported<T>(outcome: Result<T>, operation: &str) {
    match outcome {
        Err(error @ DriverError::Unsupported { .. }) => {
            let DriverError::Unsupported { reason, .. } = &error else { return };
            assert!(!reason.trim().is_empty(), "{operation} was refused without a reason");
            assert!(!error.retryable(), "{operation}");
            report::refused(reason);
        }
        Err(other) => panic!("{operation} is not among the capabilities, and was refused otherwise: {other}"),
        Ok(_) => panic!("{operation} is not among the capabilities, and was not refused"),
    }
}

/// What can be seen of an instance: what it is doing since when, and what lies around.
#[derive(Debug, PartialEq)]
struct Seen {
    observed: Observed,
    leftovers: Vec<String>,
    copies: usize,
}

async fn seen(subject: &dyn Subject, driver: &dyn Driver, id: &InstanceId) -> Seen {
    let mut observed = driver.observe(id).await.expect("observe");
    if let Observed::Running(running) | Observed::Paused(running) = &mut observed {
        // An address may become known at any time.
        running.ip = None;
    }
    Seen { observed, leftovers: subject.leftovers(), copies: subject.copies(id) }
}
