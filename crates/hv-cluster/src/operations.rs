//! Operations: work that takes long, recorded so that it survives whoever works on it.
//!
//! # Theory of operation
//! An operation's record is written in the same transaction as what it is about, so that neither is ever there without the
//! other. The leader works on it: each step is one transaction that compares the operation, its object and the leader key,
//! and whose condition is read from the records alone. A leader that dies at any instruction leaves records from which the
//! next one goes on; one that is deposed writes nothing.
//!
//! A cancellation is a mark in the record. The leader undoes what the kind of operation allows to be undone and ends it.
//! Ended operations are kept for a while, by age and by number, and then removed beside the leader's other work.

pub(crate) mod drain;
pub mod images;
pub mod migrate;
mod nodes;
mod retention;
pub(crate) mod snapshots;
mod work;

use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use hv_proto::{convert, v1};
use hv_store::record::Record;
use hv_store::{Compare, Op};
use hv_types::{OperationRecord, OperationState, Revision, ServiceError};

pub use nodes::{Answer, Nodes, PullProgress};
pub use snapshots::SnapshotTask;

use crate::Cluster;
use crate::error::{Error, Result};
use crate::page::Page;
use crate::requests::{Done, Mutation, Plan};

/// Parameters whose names begin with this are the leader's notes to itself and are not shown.
pub(crate) const NOTE: char = '.';

/// The way to nodes, once a server has one.
#[derive(Default)]
pub(crate) struct Agents(OnceLock<Arc<dyn Nodes>>);

impl Agents {
    /// The way to nodes.
    pub(crate) fn get(&self) -> Option<Arc<dyn Nodes>> {
        self.0.get().cloned()
    }
}

/// Which operations a list or watch is about. All must hold; empty accepts any.
#[derive(Clone, Debug, Default)]
pub struct OperationFilter {
    /// Only this one.
    pub id: String,
    /// Only about this object.
    pub object_id: String,
    /// Only in this state.
    pub state: Option<OperationState>,
    /// Only those that have not ended.
    pub active_only: bool,
}

impl OperationFilter {
    /// Whether an operation is meant.
    #[must_use]
    pub fn matches(&self, operation: &OperationRecord) -> bool {
        (self.id.is_empty() || self.id == operation.id)
            && (self.object_id.is_empty() || self.object_id == operation.object_id)
            && self.state.is_none_or(|state| state == operation.state)
            && (!self.active_only || !operation.state.is_final())
    }
}

/// An operation as the API shows it: without the leader's notes.
#[must_use]
pub fn shown(record: &OperationRecord) -> v1::Operation {
    let mut operation = convert::operation_to(record);
    operation.parameters.retain(|name, _| !name.starts_with(NOTE));
    operation
}

fn no_operation(id: &str) -> Error {
    ServiceError::not_found(format!(
        "operation {id} does not exist, or has ended and is not kept any more; see `hypervisor-ctl operation list`"
    ))
    .into()
}

impl Cluster {
    /// Gives operations a way to nodes; the first that is given counts.
    pub fn set_nodes(&self, nodes: Arc<dyn Nodes>) {
        // A second one would be of the same server.
        let _ = self.agents.0.set(nodes);
    }

    /// One operation.
    ///
    /// # Errors
    /// There is none, or the store does not answer.
    pub async fn operation(&self, id: &str) -> Result<Arc<OperationRecord>> {
        self.sync().await?;
        self.cache.read(|state| state.operation(id).cloned()).ok_or_else(|| no_operation(id))
    }

    /// Operations that match, newest first: a page, the token for the next, the revision.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn operations(
        &self,
        filter: &OperationFilter,
        page: &Page,
    ) -> Result<(Vec<Arc<OperationRecord>>, String, Revision)> {
        self.sync().await?;
        Ok(self.cache.read(|state| {
            let mut matching =
                state.operations_before(page.after.as_deref()).filter(|operation| filter.matches(operation));
            let taken: Vec<_> = matching.by_ref().take(page.size).cloned().collect();
            let last = taken.last().filter(|_| matching.next().is_some());
            let token = last.map(|last| page.token_after(&last.id)).unwrap_or_default();
            (taken, token, state.revision())
        }))
    }

    /// Asks for an operation to be given up. The leader does it; what has ended already stays as it is.
    ///
    /// # Errors
    /// There is none, or it has ended in another way.
    pub async fn cancel_operation(&self, mutation: &Mutation, id: &str) -> Result<Done<v1::Operation>> {
        let mut done = self
            .mutate(mutation, &format!("operation {id}"), || {
                let record =
                    self.cache.read(|state| state.operation(id).cloned()).ok_or_else(|| no_operation(id))?;
                match record.state {
                    OperationState::Cancelling | OperationState::Cancelled => {
                        return Ok(Plan::unchanged(shown(&record)));
                    }
                    OperationState::Succeeded | OperationState::Failed => {
                        return Err(Error::precondition(format!(
                            "operation {id} has ended ({}), so there is nothing to cancel",
                            record.state
                        )));
                    }
                    OperationState::Pending | OperationState::Running => {}
                }
                if let Some(why) = migrate::refuses_cancel(&record) {
                    return Err(Error::precondition(why));
                }
                let after = OperationRecord {
                    state: OperationState::Cancelling,
                    phase: "cancelling".into(),
                    cancel_requested: true,
                    updated_at: SystemTime::now(),
                    ..OperationRecord::clone(&record)
                };
                let key = self.keys.operation(id);
                let compares = vec![Compare::ModRevision(key.clone(), record.revision)];
                let then = vec![Op::put(key, after.encode())];
                let reply = shown(&OperationRecord { revision: Revision::default(), ..after });
                Ok(Plan { compares, then, reply })
            })
            .await?;
        if done.reply.revision == 0 {
            done.reply.revision = done.revision.0;
        }
        self.cache.wait_for(done.revision).await?;
        Ok(done)
    }
}
