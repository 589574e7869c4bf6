//! What the worker of an instance does with its snapshots: one thing at a time, when no step is under way.
//!
//! # Failure and recovery
//! Nothing of it is in the journal: whoever asked asks again, and drivers promise that a repetition is harmless. Only that
//! what is wanted is to be pursued after a return to a snapshot is noted before the driver begins.

use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use hv_driver::{Driver, DriverError, Observed, SnapshotInfo, SnapshotRequest};
use hv_types::{Epoch, ErrorCode, ServiceError, Wanted};
use tokio::sync::oneshot;

use super::{Called, Worker};
use crate::entry::{Entry, Origin};
use crate::plan::Step;

/// How many such orders wait for one worker at most.
const MAX_WAITING: usize = 8;
/// How long a driver may take to keep what an instance is, with its memory; and to return to it.
const DEADLINE: Duration = Duration::from_mins(10);

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum SnapshotWish {
    /// Keep what it is under a name.
    Create(SnapshotRequest),
    /// Return to what it was.
    Revert(String),
    /// Forget one.
    Delete(String),
    /// All there are, oldest first.
    List,
}

/// Snapshots: the one that was made, or all; none where nothing is to be told.
pub(crate) type Snapshots = Vec<SnapshotInfo>;

/// Why it was not done.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// The agent says so.
    Agent(ServiceError),
    /// The driver says so.
    Driver(DriverError),
}

/// Something to be done with the snapshots of an instance.
#[derive(Debug)]
pub(crate) struct SnapshotOrder {
    pub(crate) wish: SnapshotWish,
    /// The binding that the caller knows; `None`: whichever it is.
    pub(crate) epoch: Option<Epoch>,
    pub(crate) answer: oneshot::Sender<Result<Snapshots, Refusal>>,
}

impl Worker {
    /// Puts an order behind those that wait.
    pub(super) fn take_snapshot_order(&mut self, order: SnapshotOrder) {
        if self.snapshot_orders.len() < MAX_WAITING {
            self.snapshot_orders.push_back(order);
            return;
        }
        let text = format!(
            "instance {} has {MAX_WAITING} orders about snapshots already; try again",
            self.entry.id()
        );
        let busy = ServiceError::new(ErrorCode::ResourceExhausted, text);
        // A caller who went away needs no answer.
        let _ = order.answer.send(Err(Refusal::Agent(busy)));
    }

    pub(super) async fn do_snapshot_order(&mut self, order: SnapshotOrder) {
        if order.answer.is_closed() {
            // Its caller went away before it was begun, and asks again if it is still wanted.
            return;
        }
        let result = match self.refuse_snapshot_order(&order) {
            Some(refusal) => Err(refusal),
            None => self.ask_for_snapshot(&order.wish).await,
        };
        // A caller who went away needs no answer.
        let _ = order.answer.send(result);
    }

    fn refuse_snapshot_order(&self, order: &SnapshotOrder) -> Option<Refusal> {
        let entry = &self.entry;
        let id = entry.id();
        let refuse = |code, text| Some(Refusal::Agent(ServiceError::new(code, text)));
        if order.epoch.is_some_and(|epoch| epoch != entry.epoch) {
            let text = format!("instance {id} was bound to a node anew meanwhile; look at it again");
            return refuse(ErrorCode::Conflict, text);
        }
        let changes = order.wish != SnapshotWish::List;
        if changes && entry.origin == Origin::Found {
            let text = format!("instance {id} was found on the node without a record; it is only shown");
            return refuse(ErrorCode::FailedPrecondition, text);
        }
        if changes && (entry.wanted == Wanted::Deleted || entry.released || entry.gone || entry.discard) {
            return refuse(ErrorCode::FailedPrecondition, format!("instance {id} is being removed"));
        }
        if !entry.created {
            let text = format!("instance {id} has not been created yet; wait until it runs");
            return refuse(ErrorCode::FailedPrecondition, text);
        }
        None
    }

    async fn ask_for_snapshot(&mut self, wish: &SnapshotWish) -> Result<Snapshots, Refusal> {
        let Some(driver) = self.driver.clone() else {
            let text = format!("instance {} has no driver on this node", self.entry.id());
            return Err(Refusal::Agent(ServiceError::precondition(text)));
        };
        let id = self.entry.id().clone();
        tracing::info!(instance = %id, ?wish, "working");
        match wish {
            SnapshotWish::Create(request) => {
                let request = request.clone();
                let call =
                    Box::pin(async move { driver.snapshot(&id, &request).await.map(|info| vec![info]) });
                self.snapshot_call(call, "snapshot", None).await
            }
            SnapshotWish::Delete(name) => {
                let name = name.clone();
                let call =
                    Box::pin(async move { driver.delete_snapshot(&id, &name).await.map(|()| Vec::new()) });
                self.snapshot_call(call, "delete a snapshot", None).await
            }
            SnapshotWish::List => {
                let call = Box::pin(async move { driver.snapshots(&id).await });
                self.snapshot_call(call, "list snapshots", None).await
            }
            SnapshotWish::Revert(name) => self.revert(driver, name.clone()).await,
        }
    }

    async fn snapshot_call(
        &mut self,
        call: BoxFuture<'static, Result<Snapshots, DriverError>>,
        operation: &'static str,
        session: Option<u64>,
    ) -> Result<Snapshots, Refusal> {
        let is_overtaking = |entry: &Entry| entry.wanted == Wanted::Deleted;
        let called = self.call(call, DEADLINE, operation, session, is_overtaking).await;
        self.look = true;
        match called {
            Called::Done(result) => result.map_err(Refusal::Driver),
            Called::Overtaken => {
                let text = format!("instance {} may not do that now; try again", self.entry.id());
                Err(Refusal::Agent(ServiceError::unavailable(text)))
            }
        }
    }

    /// Returns to a snapshot. What is wanted is pursued afterwards: what is to run is started where the snapshot has no
    /// memory, and goes on where it has.
    async fn revert(&mut self, driver: Arc<dyn Driver>, name: String) -> Result<Snapshots, Refusal> {
        let id = self.entry.id().clone();
        let listing = Arc::clone(&driver);
        let there = id.clone();
        let list = Box::pin(async move { listing.snapshots(&there).await });
        let known = self.snapshot_call(list, "list snapshots", None).await?;
        let Some(snapshot) = known.iter().find(|snapshot| snapshot.name == name) else {
            let text = format!(
                "instance {id} has no snapshot {name}; see `hypervisor-ctl instance snapshot list {}`",
                self.entry.config.name
            );
            return Err(Refusal::Agent(ServiceError::not_found(text)));
        };
        if snapshot.memory && self.entry.wanted == Wanted::Stopped {
            let text =
                format!("snapshot {name} holds memory, and instance {id} is not to run; start it first");
            return Err(Refusal::Agent(ServiceError::precondition(text)));
        }
        // With memory it runs from the moment at which the driver has done it: that is a start like any other.
        let step = Step::Start;
        let seen = self.seen.clone().unwrap_or(Observed::Absent);
        let session = if snapshot.memory { self.session_of(step) } else { None };
        if let Some(session) = session {
            if let Err(reason) = self.context.guard.permits(session) {
                return Err(Refusal::Agent(ServiceError::unavailable(format!(
                    "instance {id} may not run now: {reason}"
                ))));
            }
            if !self.announce(step, &seen, &driver).await {
                let text = format!("instance {id} may not be started now; try again");
                return Err(Refusal::Agent(ServiceError::unavailable(text)));
            }
        }
        self.entry.pursue_again();
        self.unsaved = true;
        if !self.save().await {
            let text = format!("the journal of instance {id} cannot be written; see the node's log");
            return Err(Refusal::Agent(ServiceError::unavailable(text)));
        }
        let call = Box::pin(async move { driver.revert(&id, &name).await.map(|()| Vec::new()) });
        let reverted = self.snapshot_call(call, "revert", session).await;
        if session.is_some() {
            self.context.guard.settled(self.entry.id()).await;
        }
        reverted
    }
}
