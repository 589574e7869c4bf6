//! The leader's slow work: what must become true sooner or later, whoever is interrupted in between.
//!
//! No input, idempotent, started by signal and by timer: each pass looks at the whole state and does what is missing.

use std::sync::Arc;
use std::time::Duration;

use hv_store::{Txn, TxnOutcome};
use hv_types::node::Schedulability;
use hv_types::{InstanceRecord, Wanted};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::cache::{Delta, State, SubscriptionError};
use crate::election::{Leadership, in_each_term};
use crate::error::{Error, Result};
use crate::events::About;
use crate::{Cluster, TXN_BYTES, nodes, op_bytes};

/// Records changed per transaction.
const BATCH: usize = 60;
/// How long a pass may be delayed at most when nothing happens.
const SLOW_TIMER: Duration = Duration::from_secs(30);
/// How often in a row a change may be overtaken before the pass is given up for a pause.
const OVERTAKEN_LIMIT: usize = 8;
/// The pause after a pass that failed.
const RETRY_PAUSE: Duration = Duration::from_millis(500);

impl Cluster {
    /// Reconciles while this server leads, until `stop`.
    pub async fn run_reconciler(
        &self,
        leading: watch::Receiver<Option<Leadership>>,
        stop: CancellationToken,
    ) {
        in_each_term(
            leading,
            stop,
            |leadership| async move { self.reconcile_while_leading(&leadership).await },
        )
        .await;
    }

    async fn reconcile_while_leading(&self, leadership: &Leadership) {
        let ((), mut changes) = self.cache.subscribe(|_| ());
        loop {
            let mut delay = SLOW_TIMER;
            if let Err(error) = self.drain_nodes(leadership).await {
                warn!(
                    error = hv_telemetry::error_chain(error.service()),
                    "draining failed; it is tried again"
                );
                delay = RETRY_PAUSE;
            }
            let needed = async {
                loop {
                    match changes.next().await {
                        Ok(Some(batch)) => {
                            batch.deltas.iter().for_each(|delta| self.tell_of_loss(delta));
                            if batch.deltas.iter().any(needs_a_pass) {
                                return;
                            }
                        }
                        Ok(None) => std::future::pending().await,
                        Err(SubscriptionError::Lagged | SubscriptionError::Expired) => return,
                    }
                }
            };
            // Whichever it is, everything is looked at afresh.
            let _ = tokio::time::timeout(delay, needed).await;
        }
    }

    /// Records that a node's lease has ended.
    fn tell_of_loss(&self, delta: &Delta) {
        if let Delta::Node { before: Some((_, true)), after: Some((node, false)), .. } = delta {
            let limit = self.config.heartbeat_timeout.as_secs_f64();
            let message = format!("no heartbeat for {limit} s; is its agent running?");
            self.events.warn(About::Node(node), "NodeNotReady", message, "reconciler");
        }
    }

    /// Tells draining nodes to give up what can be moved.
    async fn drain_nodes(&self, leadership: &Leadership) -> Result<()> {
        self.cache.wait_for(leadership.since).await?;
        let mut overtaken = 0;
        while overtaken < OVERTAKEN_LIMIT {
            self.sync().await?;
            let mut moves = self.cache.read(released);
            if moves.is_empty() {
                return Ok(());
            }
            let mut txn = Txn { compares: vec![leadership.guard()], ..Txn::default() };
            let mut bytes = 0;
            for (before, after) in &moves {
                let (compare, op) = self.replace_instance(before, after);
                bytes += op_bytes(&op);
                if !txn.then.is_empty() && bytes > TXN_BYTES {
                    break;
                }
                txn.compares.push(compare);
                txn.then.push(op);
            }
            moves.truncate(txn.then.len());
            overtaken += 1;
            if let TxnOutcome::Committed(revision) = self.store.txn(txn).await? {
                overtaken = 0;
                self.cache.wait_for(revision).await?;
                for (_, after) in &moves {
                    self.events.record(
                        About::Instance(after),
                        "Moving",
                        after.state_reason.clone(),
                        "reconciler",
                    );
                }
            }
        }
        Err(Error::conflict("what is on draining nodes"))
    }
}

/// Whether a change may leave something to do: a node that is to be emptied, or an instance that came to one since.
fn needs_a_pass(delta: &Delta) -> bool {
    match delta {
        Delta::Node { .. } => true,
        Delta::Instance { before, after, .. } => {
            let node =
                |record: &Option<Arc<InstanceRecord>>| record.as_ref().and_then(|r| r.node_id().cloned());
            node(after).is_some() && node(before) != node(after)
        }
        Delta::Event(_) => false,
    }
}

/// What draining nodes are to give up and have not been told to yet.
fn released(state: &State) -> Vec<(Arc<InstanceRecord>, InstanceRecord)> {
    let draining = state.nodes().filter(|(node, _)| node.schedulability == Schedulability::Draining);
    draining
        .flat_map(|(node, _)| state.instances_on(&node.id).map(move |record| (node, record)))
        .filter(|(_, record)| record.wanted != Wanted::Deleted)
        .filter(|(_, record)| record.binding.as_ref().is_some_and(|binding| !binding.release))
        .filter(|(node, record)| nodes::stays(record, node.drain_discards_disks).is_none())
        .map(|(node, record)| {
            let mut after = InstanceRecord::clone(record);
            if let Some(binding) = &mut after.binding {
                binding.release = true;
            }
            // A node takes only an order that is newer than the one it has.
            after.generation += 1;
            after.state_reason = format!("moves off node {}, which is being drained", node.hostname);
            (record.clone(), after)
        })
        .take(BATCH)
        .collect()
}
