//! A hold on a node: for a moment nothing new is bound to it, so that whoever has the hold knows exactly what room it has.
//!
//! # Background
//! Only the leader binds, from its own memory. Any other server that wants more of a node's room for an instance that is
//! there already cannot see what the leader is about to write.
//!
//! # Theory of operation
//! A hold is a leased key that is put together with a write of the node's own record as it is. A binding compares that
//! record: one that was decided before the hold is refused, or it was committed before and is in the cache once that has
//! seen the hold. A leader that has seen the write has seen the hold too, and binds nothing there while it lasts. So
//! what a server counts after it has seen its own hold stays true as long as the hold does, and a transaction that
//! compares the hold is exact. Nothing is compared more than before where nobody holds anything.
//!
//! # Failure and recovery
//! The lease ends a hold whose owner died; until then other nodes are chosen. A hold that ended is noticed by the
//! transaction that compares it.

use std::time::Duration;

use hv_store::{Compare, LeaseId, Op, StoreExt, Txn, TxnOutcome};
use hv_types::{NodeId, Revision};
use tracing::debug;

use crate::Cluster;
use crate::error::{Error, Result};

/// How long a hold may last at most: a few round trips of the store, and some for one that is slow.
const HOLD_TTL: Duration = Duration::from_secs(10);
/// How often it is tried to hold a node that others hold.
const ATTEMPTS: usize = 200;
/// How long it is waited for a hold to end before it is looked again.
const PAUSE: Duration = Duration::from_millis(100);

/// A hold that this server has on a node.
#[derive(Clone, Debug)]
pub(crate) struct Hold {
    pub(crate) node: NodeId,
    at: Revision,
    lease: LeaseId,
}

impl Cluster {
    /// Holds a node; waits, within bounds, while somebody else does. What the cache shows afterwards is all that is bound
    /// to it while the hold lasts.
    ///
    /// # Errors
    /// There is no such node, others hold it all the time, or the store does not answer.
    pub(crate) async fn hold_node(&self, node: &NodeId) -> Result<Hold> {
        let lease = self.store.lease_grant(HOLD_TTL).await?;
        let held = self.hold_with(node, lease).await;
        if held.is_err() {
            self.revoke(lease).await;
        }
        held
    }

    async fn hold_with(&self, node: &NodeId, lease: LeaseId) -> Result<Hold> {
        let (key, hold_key) = (self.keys.node(node), self.keys.node_hold(node));
        for _ in 0..ATTEMPTS {
            let Some(record) = self.store.get(key.clone()).await? else { return Err(Error::no_node(node)) };
            let txn = Txn {
                compares: vec![
                    self.unfrozen()?,
                    Compare::Absent(hold_key.clone()),
                    Compare::ModRevision(key.clone(), record.mod_revision),
                ],
                then: vec![
                    Op::put_leased(hold_key.clone(), node.to_string(), lease),
                    Op::put(key.clone(), record.value),
                ],
                ..Txn::default()
            };
            if let TxnOutcome::Committed(at) = self.store.txn(txn).await? {
                self.cache.wait_for(at).await?;
                return Ok(Hold { node: node.clone(), at, lease });
            }
            self.sync().await?;
            let (is_held, now) = self.cache.read(|state| (state.is_held(node), state.revision()));
            if is_held {
                // Whatever comes next may be its end.
                let next = self.cache.wait_for(Revision(now.0 + 1));
                let _ = tokio::time::timeout(PAUSE, next).await;
            }
        }
        Err(Error::conflict(format!("what is bound to node {node}")))
    }

    /// What a transaction that relies on a hold compares and does: it ends the hold.
    pub(crate) fn with_hold(&self, hold: &Hold) -> (Compare, Op) {
        let key = self.keys.node_hold(&hold.node);
        (Compare::ModRevision(key.clone(), hold.at), Op::delete(key))
    }

    /// Ends a hold, if it is not over.
    pub(crate) async fn end_hold(&self, hold: Hold) {
        self.revoke(hold.lease).await;
    }

    async fn revoke(&self, lease: LeaseId) {
        if let Err(error) = self.store.lease_revoke(lease).await {
            debug!(error = hv_telemetry::error_chain(&error), "a hold was not ended; it runs out");
        }
    }
}
