//! The driver call of each step, and the crash points around it.

use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use hv_driver::{Driver, DriverError, Handle, StopMode};
use hv_telemetry::crash::Point;
use hv_types::instance::StopOptions;

use crate::entry::Entry;
use crate::plan::Step;

/// The crash point before a step.
pub(super) fn before(step: Step) -> Option<Point> {
    match step {
        Step::Create => Some(Point::AgentCreateBefore),
        Step::Start => Some(Point::AgentStartBefore),
        Step::Stop => Some(Point::AgentStopBefore),
        Step::Delete => Some(Point::AgentDeleteBefore),
        Step::Pause | Step::Resume => None,
    }
}

/// The crash point after a step.
pub(super) fn after(step: Step) -> Option<Point> {
    match step {
        Step::Create => Some(Point::AgentCreateAfter),
        Step::Start => Some(Point::AgentStartAfter),
        Step::Stop => Some(Point::AgentStopAfter),
        Step::Delete => Some(Point::AgentDeleteAfter),
        Step::Pause | Step::Resume => None,
    }
}

/// The driver call of a step.
pub(super) fn request(
    driver: Arc<dyn Driver>,
    step: Step,
    entry: &Entry,
) -> BoxFuture<'static, Result<Option<Handle>, DriverError>> {
    let config = entry.config.clone();
    let mode = match entry.stop {
        StopOptions { force: true, .. } => StopMode::Force,
        StopOptions { timeout_seconds, .. } => {
            StopMode::Graceful(Duration::from_secs(timeout_seconds.into()))
        }
    };
    Box::pin(async move {
        match step {
            Step::Create => driver.create(&config).await.map(Some),
            Step::Start => driver.start(&config.id).await.map(Some),
            Step::Stop => driver.stop(&config.id, mode).await.map(|()| None),
            Step::Pause => driver.pause(&config.id).await.map(|()| None),
            Step::Resume => driver.resume(&config.id).await.map(|()| None),
            Step::Delete => driver.delete(&config.id).await.map(|()| None),
        }
    })
}
