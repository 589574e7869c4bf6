//! What is bound to a node, as a stream: the whole set, then each change.

use std::sync::Arc;

use hv_proto::{convert, v1};
use hv_types::{ClusterId, ErrorCode, InstanceRecord, NodeId, ServiceError};
use prost::Message;

use crate::Cluster;
use crate::cache::{Batch, Delta, Subscription, SubscriptionError};
use crate::error::{Error, Result};

/// How many bytes of assignments travel in one message: half of the largest allowed, as records are far smaller.
const CHUNK_BYTES: usize = hv_proto::MAX_MESSAGE_BYTES / 2;

/// A node's assignments.
pub struct Assignments {
    node: NodeId,
    first: Vec<v1::AssignmentsUpdate>,
    changes: Subscription,
}

impl Cluster {
    /// What is bound to `node` now and from now on.
    ///
    /// # Errors
    /// The node belongs to another cluster or is not registered.
    pub async fn assignments(&self, claims: &ClusterId, node: NodeId) -> Result<Assignments> {
        if *claims != self.id() {
            return Err(Error::precondition(format!(
                "the node belongs to cluster {claims}, this is {}",
                self.id()
            )));
        }
        self.sync().await?;
        let (found, changes) = self.cache.subscribe(|state| {
            state.node(&node).map(|_| {
                let all: Vec<_> =
                    state.instances_on(&node).map(|record| convert::assignment_to(record)).collect();
                (all, state.revision().0)
            })
        });
        let (all, revision) = found.ok_or_else(|| Error::no_node(&node))?;
        let mut first = vec![v1::AssignmentsUpdate { revision, ..Default::default() }];
        let mut bytes = 0;
        for assignment in all {
            bytes += assignment.encoded_len();
            if bytes > CHUNK_BYTES {
                bytes = assignment.encoded_len();
                first.push(v1::AssignmentsUpdate { revision, ..Default::default() });
            }
            if let Some(update) = first.last_mut() {
                update.assignments.push(assignment);
            }
        }
        first.push(v1::AssignmentsUpdate { complete: true, revision, ..Default::default() });
        first.retain(|update| update.complete || !update.assignments.is_empty());
        first.reverse();
        Ok(Assignments { node, first, changes })
    }
}

impl Assignments {
    /// The next message; `None` when the server stops.
    ///
    /// # Errors
    /// The node was too slow; it must ask again.
    pub async fn next(&mut self) -> std::result::Result<Option<v1::AssignmentsUpdate>, ServiceError> {
        if let Some(update) = self.first.pop() {
            return Ok(Some(update));
        }
        loop {
            let batch = match self.changes.next().await {
                Ok(Some(batch)) => batch,
                Ok(None) => return Ok(None),
                Err(SubscriptionError::Expired | SubscriptionError::Lagged) => {
                    return Err(ServiceError::new(ErrorCode::Expired, "the node was too slow; ask again"));
                }
            };
            match self.update(&batch) {
                // Only what was missed for long comes in such a mass; the whole set comes in pieces.
                Some(update) if update.encoded_len() > CHUNK_BYTES => {
                    return Err(ServiceError::new(
                        ErrorCode::Expired,
                        "too much has changed at once; ask again",
                    ));
                }
                Some(update) => return Ok(Some(update)),
                None => {}
            }
        }
    }

    fn update(&self, batch: &Batch) -> Option<v1::AssignmentsUpdate> {
        let mut update = v1::AssignmentsUpdate { revision: batch.revision.0, ..Default::default() };
        for delta in &batch.deltas {
            let Delta::Instance { id, before, after } = delta else { continue };
            match (self.mine(before), self.mine(after)) {
                (was, Some(is)) => {
                    if was.is_none_or(|was| concerns_node(was, is)) {
                        update.assignments.push(convert::assignment_to(is));
                    }
                }
                (Some(_), None) => update.released_instance_ids.push(id.to_string()),
                (None, None) => {}
            }
        }
        let empty = update.assignments.is_empty() && update.released_instance_ids.is_empty();
        (!empty).then_some(update)
    }

    fn mine<'a>(&self, record: &'a Option<Arc<InstanceRecord>>) -> Option<&'a Arc<InstanceRecord>> {
        record.as_ref().filter(|record| record.node_id() == Some(&self.node))
    }
}

/// Whether a node must know of a change; what it reported itself comes back as one and is no news to it.
fn concerns_node(was: &InstanceRecord, is: &InstanceRecord) -> bool {
    was.epoch != is.epoch
        || was.generation != is.generation
        || was.binding != is.binding
        || was.metadata != is.metadata
}
