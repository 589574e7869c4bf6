//! What a worker does where its instance is handed over to another node, or taken from one.
//!
//! # Invariants
//! - A hand-over is in the journal before its driver hears of it, and nothing but the control plane takes it out again: what
//!   may run elsewhere is not started here, whatever ends, crashes or is booted in between.
//! - What waits here runs only by an assignment that names the migration which brought it.

use hv_driver::{DriverError, IncomingRequest, MigrateRequest, Observed};
use hv_image::Progress;
use hv_telemetry::crash::{Point, reach};
use hv_types::{Epoch, ErrorCode, ServiceError, Wanted};
use tokio::sync::oneshot;

use super::{Called, Worker};
use crate::entry::{Entry, Origin, Outgoing};

/// What is asked.
#[derive(Debug)]
pub(crate) enum Wish {
    /// Wait for it to be handed over; the image that the other node's store gave it.
    Prepare(IncomingRequest, Option<String>),
    /// Hand it over; the binding that is to end.
    Begin(Epoch, MigrateRequest),
    /// Give the migration up.
    Abort(String),
}

/// What is told of what was asked.
#[derive(Debug)]
pub(crate) enum Answered {
    /// It is done.
    Done,
    /// It waits, and so its driver describes where.
    Waits(serde_json::Value),
    /// Its image is being fetched first; ask again.
    Fetches(Progress),
}

/// The answer.
pub(crate) type Answer = Result<Answered, ServiceError>;

/// A wish and where its answer is awaited.
#[derive(Debug)]
pub(crate) struct Asked {
    pub(crate) wish: Wish,
    pub(crate) answer: oneshot::Sender<Answer>,
}

impl Asked {
    fn done(self, answer: Answer) {
        // A caller who went away asks again.
        let _ = self.answer.send(answer);
    }
}

/// Refuses what a user of this node wants of an instance that is on its way.
pub(super) fn refuse_local(entry: &Entry) -> Result<(), ServiceError> {
    let why = match (&entry.incoming, &entry.outgoing) {
        (Some(_), _) => "waits here for another node to hand it over",
        (None, Some(_)) => "is being moved to another node",
        (None, None) => return Ok(()),
    };
    Err(ServiceError::precondition(format!("instance {} {why}; it is only shown", entry.id())))
}

fn refused(text: String) -> ServiceError {
    ServiceError::precondition(text)
}

impl Worker {
    /// Takes a wish. An abort is remembered at once, so that nothing that was begun before can outlive it.
    pub(super) async fn take_asked(&mut self, asked: Asked) {
        if let Wish::Abort(migration) = &asked.wish {
            let outcome = self.abort(&migration.clone()).await;
            asked.done(outcome.map(|()| Answered::Done));
            return;
        }
        if self.asked.as_ref().is_some_and(|waiting| !waiting.answer.is_closed()) {
            let text = format!("instance {} is busy with another migration; try again", self.entry.id());
            asked.done(Err(ServiceError::unavailable(text)));
            return;
        }
        // The plan is made on what is seen now.
        self.look = true;
        self.asked = Some(asked);
    }

    /// Remembers that a migration is given up. The plan does the rest.
    async fn abort(&mut self, migration: &str) -> Result<(), ServiceError> {
        let entry = &mut self.entry;
        if entry.origin == Origin::Incoming {
            if entry.incoming.as_deref() == Some(migration) && entry.wanted != Wanted::Deleted {
                self.incoming_fetch = None;
                entry.abort_migration(migration);
                entry.stop.force = true;
                entry.want(Wanted::Deleted);
                self.changed().await;
            }
            return self.remembered();
        }
        let may_be_its = entry.outgoing.is_none() && entry.wanted != Wanted::Deleted;
        if may_be_its {
            match &self.seen {
                // The journal was lost, and only the driver knows.
                Some(Observed::HandedOver) => {
                    entry.outgoing = Some(Outgoing { migration: migration.to_owned(), aborting: true });
                }
                None if !entry.gone => {
                    let text = format!("instance {} was not looked at yet; try again", entry.id());
                    return Err(ServiceError::unavailable(text));
                }
                Some(_) | None => {}
            }
        }
        entry.abort_migration(migration);
        // Not what is wanted of it changes, but what is remembered.
        self.unsaved = true;
        self.failures = 0;
        self.not_before = None;
        self.look = true;
        self.save().await;
        let (state, reason) = {
            let view = self.view.borrow();
            (view.record.state, view.record.state_reason.clone())
        };
        self.show(state, &reason, false);
        self.remembered()
    }

    fn remembered(&self) -> Result<(), ServiceError> {
        if self.unsaved && self.entry.origin != Origin::Found {
            return Err(ServiceError::unavailable("the node's journal cannot be written; see its log"));
        }
        Ok(())
    }

    /// Does what was asked, as nothing else is being done.
    pub(super) async fn serve(&mut self, asked: Asked) {
        if asked.answer.is_closed() {
            return;
        }
        let outcome = match &asked.wish {
            Wish::Prepare(request, image) => self.prepare(request.clone(), image.clone()).await,
            Wish::Begin(epoch, request) => self.begin(*epoch, request.clone()).await.map(|()| Answered::Done),
            Wish::Abort(migration) => self.abort(&migration.clone()).await.map(|()| Answered::Done),
        };
        asked.done(outcome);
    }

    async fn prepare(&mut self, request: IncomingRequest, image: Option<String>) -> Answer {
        let entry = &self.entry;
        let id = entry.id();
        if entry.origin != Origin::Incoming || entry.wanted == Wanted::Deleted {
            let going = entry.wanted == Wanted::Deleted || entry.released || entry.gone;
            let text = format!("instance {id} is on this node already");
            return Err(if going {
                ServiceError::unavailable(format!("{text}, and is being removed; try again"))
            } else {
                refused(text)
            });
        }
        if entry.incoming.as_deref() != Some(&request.migration) {
            // What is left of a move that was given up, while this node did not answer, goes first.
            let stale = entry.incoming.clone().unwrap_or_default();
            let text = format!("instance {id} still waits here for another migration; try again");
            self.abort(&stale).await?;
            return Err(ServiceError::unavailable(text));
        }
        let Some(driver) = self.driver.clone() else {
            return Err(refused(format!("instance {id} has no driver on this node")));
        };
        match self.provide_incoming(&driver, &request.migration, image).await {
            Ok(None) => {}
            Ok(Some(progress)) => return Ok(Answered::Fetches(progress)),
            Err(error) => return Err(service_error(&error)),
        }
        let config = self.entry.config.clone();
        let call = Box::pin(async move { driver.prepare_incoming(&config, &request).await });
        let deadline = self.context.tuning.create_deadline;
        let given_up = |entry: &Entry| entry.wanted == Wanted::Deleted;
        let called = self.call(call, deadline, "prepare_incoming", None, given_up).await;
        self.look = true;
        match called {
            Called::Done(Ok(incoming)) => {
                reach(Point::MovePrepareAfter);
                self.entry.created = true;
                self.unsaved = true;
                self.save().await;
                self.remembered()?;
                Ok(Answered::Waits(incoming.target))
            }
            Called::Done(Err(error)) => Err(service_error(&error)),
            Called::Overtaken => Err(refused("the migration was given up meanwhile".to_owned())),
        }
    }

    async fn begin(&mut self, epoch: Epoch, request: MigrateRequest) -> Result<(), ServiceError> {
        let entry = &self.entry;
        let id = entry.id().clone();
        if entry.epoch != epoch || entry.origin != Origin::Assigned {
            let text = format!("instance {id} has epoch {} on this node, not {epoch}", entry.epoch);
            return Err(ServiceError::new(ErrorCode::Cancelled, text));
        }
        if entry.has_ended(&request.migration) {
            return Err(refused("the migration was aborted already".to_owned()));
        }
        if let Some(outgoing) = entry.outgoing.as_ref().filter(|out| out.migration != request.migration) {
            return Err(refused(format!("it is being moved by migration {} already", outgoing.migration)));
        }
        let is_its = entry.outgoing.is_some();
        let runs = matches!(self.seen, Some(Observed::Running(_)));
        if !is_its && (!runs || entry.pending || entry.wanted != Wanted::Running) {
            let state = self.view.borrow().record.state;
            return Err(refused(format!("only a running instance can be moved, and {id} is {state}")));
        }
        let Some(driver) = self.driver.clone() else {
            return Err(refused(format!("instance {id} has no driver on this node")));
        };
        if !is_its {
            self.entry.outgoing = Some(Outgoing { migration: request.migration.clone(), aborting: false });
            self.unsaved = true;
            if !self.save().await {
                // Nothing was begun, and nothing is to be remembered of it.
                self.entry.outgoing = None;
                return Err(ServiceError::unavailable("the node's journal cannot be written; see its log"));
            }
            reach(Point::MoveBeginAfterJournal);
        }
        let call = Box::pin(async move { driver.migrate(&id, &request).await });
        let deadline = self.context.tuning.step_deadline;
        let given_up = |entry: &Entry| entry.outgoing.as_ref().is_none_or(|outgoing| outgoing.aborting);
        let called = self.call(call, deadline, "migrate", None, given_up).await;
        self.look = true;
        match called {
            Called::Done(outcome) => outcome.map_err(|error| service_error(&error)),
            Called::Overtaken => Err(refused("the migration was given up meanwhile".to_owned())),
        }
    }
}

/// What a driver's error is to the control plane.
fn service_error(error: &DriverError) -> ServiceError {
    let code = match error {
        DriverError::InvalidConfig { .. } => ErrorCode::InvalidArgument,
        DriverError::NotFound(_) | DriverError::WrongState { .. } => ErrorCode::FailedPrecondition,
        DriverError::Unsupported { .. } => ErrorCode::Unsupported,
        DriverError::Unavailable { .. } => ErrorCode::Unavailable,
        DriverError::Failed { .. } => ErrorCode::Internal,
        DriverError::Timeout { .. } => ErrorCode::DeadlineExceeded,
    };
    ServiceError::new(code, hv_telemetry::error_chain(error))
}
