//! The driver call of each step, and the crash points around it.

use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use hv_driver::{Driver, DriverError, Handle, StopMode, Updated};
use hv_telemetry::crash::Point;
use hv_types::instance::StopOptions;

use crate::entry::{Entry, Told};
use crate::plan::Step;

/// The crash point before a step.
pub(super) fn before(step: Step) -> Option<Point> {
    match step {
        Step::Create => Some(Point::AgentCreateBefore),
        Step::Start => Some(Point::AgentStartBefore),
        Step::Stop => Some(Point::AgentStopBefore),
        Step::Delete => Some(Point::AgentDeleteBefore),
        Step::Update => Some(Point::AgentUpdateBefore),
        Step::Resume => Some(Point::MoveResumeBefore),
        Step::Pause | Step::TakeBack => None,
    }
}

/// The crash point after a step.
pub(super) fn after(step: Step) -> Option<Point> {
    match step {
        Step::Create => Some(Point::AgentCreateAfter),
        Step::Start => Some(Point::AgentStartAfter),
        Step::Stop => Some(Point::AgentStopAfter),
        Step::Delete => Some(Point::AgentDeleteAfter),
        Step::Update => Some(Point::AgentUpdateAfter),
        Step::Resume => Some(Point::MoveResumeAfter),
        Step::Pause | Step::TakeBack => None,
    }
}

/// What a driver says when a step is done.
pub(super) enum Did {
    /// The instance is found again by this, or as before.
    Step(Option<Handle>),
    /// It was told this, and so much waits for the next start.
    Update(Box<Told>, String),
}

/// The driver call of a step.
pub(super) fn request(
    driver: Arc<dyn Driver>,
    step: Step,
    entry: &Entry,
) -> BoxFuture<'static, Result<Did, DriverError>> {
    let config = entry.config.clone();
    let mode = match entry.stop {
        StopOptions { force: true, .. } => StopMode::Force,
        StopOptions { timeout_seconds, .. } => {
            StopMode::Graceful(Duration::from_secs(timeout_seconds.into()))
        }
    };
    Box::pin(async move {
        let handle = match step {
            Step::Create => match &config.spec.clone_of {
                Some(from) => driver.clone_snapshot(&from.instance, &from.snapshot, &config).await.map(Some),
                None => driver.create(&config).await.map(Some),
            },
            Step::Start => driver.start(&config.id).await.map(Some),
            Step::Stop => driver.stop(&config.id, mode).await.map(|()| None),
            Step::Pause => driver.pause(&config.id).await.map(|()| None),
            Step::Resume => driver.resume(&config.id).await.map(|()| None),
            Step::Delete => driver.delete(&config.id).await.map(|()| None),
            Step::TakeBack => driver.abort_migration(&config.id).await.map(|()| None),
            Step::Update => {
                let note = match driver.update(&config).await? {
                    Updated::Done => String::new(),
                    Updated::AtNextStart(note) => note,
                };
                return Ok(Did::Update(Box::new(Told::of(&config)), note));
            }
        };
        handle.map(Did::Step)
    })
}
