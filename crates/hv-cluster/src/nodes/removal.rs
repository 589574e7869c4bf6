//! Forgetting nodes: empty ones, and those that are lost for good.
//!
//! # Theory of operation
//! The node is cordoned first: a binding compares the node's record, so that after this nothing more can be bound to it,
//! and what was bound before is seen. Of a node that is lost for good, what it had is then taken off it, in batches: what
//! may run elsewhere waits for a node again, the rest fails and says why. The node's record goes last, together with the
//! record of the request. Each transaction compares the node's record and that its lease is still gone.
//!
//! # Failure and recovery
//! A server that dies on the way leaves a cordoned node with what is left on it; the same call finishes it.

use std::sync::Arc;

use hv_store::{Compare, Op, Txn, TxnOutcome};
use hv_types::instance::FailoverPolicy;
use hv_types::node::Schedulability;
use hv_types::{InstanceRecord, InstanceState, NodeId, NodeRecord, Resources, Wanted};
use pbjson_types::Empty;

use crate::Cluster;
use crate::error::{Error, Result};
use crate::events::About;
use crate::failover::{self, Decision};
use crate::requests::{Mutation, Plan};

/// Records taken off a node in one transaction: each takes up to two operations and two compares.
const BATCH: usize = 30;
/// How often in a row a batch may be overtaken.
const OVERTAKEN_LIMIT: usize = 8;

impl Cluster {
    /// Forgets a node: one that no instance is bound to, or, by `force`, one that does not answer.
    ///
    /// # Errors
    /// There is none, it answers and has instances, or it is not certain that what may run elsewhere has stopped there.
    pub async fn deregister_node(&self, mutation: &Mutation, id: &NodeId, force: bool) -> Result<()> {
        if self.recorded::<Empty>(mutation).await?.is_some() {
            return Ok(());
        }
        self.sync().await?;
        let before = self.node_record(id)?;
        self.check_removal(&before, force)?;
        if before.schedulability == Schedulability::Open {
            self.update_node(id, |node| node.schedulability = Schedulability::Cordoned).await?;
            self.sync().await?;
        }
        if let Err(refusal) = self.check_removal(&before, force) {
            if before.schedulability == Schedulability::Open {
                self.update_node(id, |node| node.schedulability = Schedulability::Open).await?;
            }
            return Err(refusal);
        }
        if force {
            self.take_off(id).await?;
        }
        let mut removed = None;
        let done = self
            .mutate(mutation, &format!("node {id}"), || {
                let record = self.node_record(id)?;
                self.check_removal(&record, false)?;
                let compare = Compare::ModRevision(self.keys.node(id), record.revision);
                let then = vec![Op::delete(self.keys.node(id)), Op::delete(self.keys.node_lease(id))];
                removed = Some(record);
                Ok(Plan { compares: vec![compare], then, reply: Empty {} })
            })
            .await?;
        if let Some(record) = removed.filter(|_| done.fresh) {
            let message = if force { "removed for good" } else { "deregistered" };
            self.events.record(About::Node(&record), "NodeRemoved", message, "user");
        }
        self.cache.wait_for(done.revision).await
    }

    /// Whether a node may go.
    fn check_removal(&self, node: &NodeRecord, force: bool) -> Result<()> {
        let name = &node.hostname;
        let (count, live) = self.cache.read(|state| {
            let live = state.node(&node.id).is_some_and(|entry| entry.is_live());
            (state.instances_on(&node.id).count(), live)
        });
        if count == 0 {
            return Ok(());
        }
        let plural = if count == 1 { "" } else { "s" };
        if !force {
            let message =
                format!("node {name} still has {count} instance{plural}; drain it or delete them first");
            return Err(Error::precondition(message));
        }
        if live {
            let message = format!(
                "node {name} answers and has {count} instance{plural}; drain it, or switch it off and wait until it is NOT_READY"
            );
            return Err(Error::precondition(message));
        }
        self.fates(&node.id).map(drop)
    }

    /// What becomes of everything on a node that is lost for good.
    fn fates(&self, id: &NodeId) -> Result<Vec<(Arc<InstanceRecord>, Fate)>> {
        let ttl = self.config.heartbeat_timeout;
        let lost = self.liveness.lost(id);
        self.cache.read(|state| {
            let Some(entry) = state.node(id) else { return Err(Error::no_node(id)) };
            let node = entry.record.as_ref().ok_or_else(|| Error::no_node(id))?;
            let certain_after = lost.map(|lost| lost.certain_after(ttl, self.config.failover_grace));
            let situation = failover::Situation {
                node,
                live: entry.is_live(),
                lost_for: lost.map_or(std::time::Duration::ZERO, |lost| lost.since.elapsed()),
                certain_after: certain_after.unwrap_or(ttl + self.config.failover_grace),
            };
            state.instances_on(id).map(|record| Ok((record.clone(), fate(record, &situation)?))).collect()
        })
    }

    /// Takes everything off a node that is lost for good.
    async fn take_off(&self, id: &NodeId) -> Result<()> {
        let mut overtaken = 0;
        while overtaken < OVERTAKEN_LIMIT {
            let node = self.node_record(id)?;
            let mut fates = self.fates(id)?;
            fates.truncate(BATCH);
            if fates.is_empty() {
                return Ok(());
            }
            let mut txn = Txn {
                compares: vec![
                    self.unfrozen()?,
                    Compare::ModRevision(self.keys.node(id), node.revision),
                    Compare::Absent(self.keys.node_lease(id)),
                ],
                ..Txn::default()
            };
            let mut bytes = 0;
            let mut taken = Vec::new();
            for (record, fate) in fates {
                let (compares, ops, after) = match fate {
                    Fate::Gone => {
                        let (compares, ops) = self.remove_instance(&record);
                        (compares, ops, None)
                    }
                    Fate::Elsewhere => {
                        let lost = self.liveness.lost(id).map(|lost| lost.at);
                        let after = failover::started_afresh(&record, &node, lost);
                        let (compare, op) = self.replace_instance(&record, &after);
                        (vec![compare], vec![op], Some(after))
                    }
                    Fate::Failed => {
                        let after = failed(&record, &node);
                        let (compare, op) = self.replace_instance(&record, &after);
                        (vec![compare], vec![op], Some(after))
                    }
                };
                bytes += ops.iter().map(crate::op_bytes).sum::<usize>();
                if !taken.is_empty() && bytes > crate::TXN_BYTES {
                    break;
                }
                txn.compares.extend(compares);
                txn.then.extend(ops);
                taken.push((record, after));
            }
            if let TxnOutcome::Committed(revision) = self.store.txn(txn).await? {
                overtaken = 0;
                self.cache.wait_for(revision).await?;
                self.tell_taken(&taken);
            } else {
                overtaken += 1;
                self.sync().await?;
            }
        }
        Err(Error::conflict(format!("node {id} and what is on it")))
    }

    fn tell_taken(&self, taken: &[(Arc<InstanceRecord>, Option<InstanceRecord>)]) {
        for (before, after) in taken {
            match after {
                None => self.events.record(
                    About::Instance(before),
                    "Deleted",
                    "its node was removed for good",
                    "user",
                ),
                Some(after) => {
                    let reason = if after.state == InstanceState::Failed { "Failed" } else { "FailedOver" };
                    self.events.warn(About::Instance(after), reason, after.state_reason.clone(), "user");
                }
            }
        }
    }
}

/// What becomes of an instance whose node is lost for good.
enum Fate {
    /// It was to be deleted.
    Gone,
    /// It waits for another node.
    Elsewhere,
    /// It is lost with its node.
    Failed,
}

fn fate(record: &InstanceRecord, situation: &failover::Situation<'_>) -> Result<Fate> {
    let name = &situation.node.hostname;
    if record.wanted == Wanted::Deleted {
        return Ok(Fate::Gone);
    }
    match failover::decide(record, situation) {
        Decision::Restart => Ok(Fate::Elsewhere),
        Decision::Remove => Ok(Fate::Gone),
        Decision::Fine => Err(Error::precondition(format!("node {name} answers"))),
        Decision::WaitUntil(left, _) => Err(Error::precondition(format!(
            "instance {} on node {name} may still run there for {:.1} s; try again then, or vouch that the node is off with \
             `hypervisor-ctl node confirm-down {name}`",
            record.name,
            left.as_secs_f64()
        ))),
        // Where it is not certain that it has stopped there, it must not be started elsewhere on this word alone.
        Decision::No(reason)
            if record.failover_policy == FailoverPolicy::Restart
                && record.wanted != Wanted::Stopped
                && !situation.node.confirmed_down =>
        {
            Err(Error::precondition(format!(
                "instance {} may still run on node {name}: {reason}",
                record.name
            )))
        }
        Decision::No(_) => Ok(Fate::Failed),
    }
}

/// The record of what is lost with its node: a user may delete it, or start it afresh.
fn failed(record: &InstanceRecord, node: &NodeRecord) -> InstanceRecord {
    let generation = record.generation + 1;
    InstanceRecord {
        binding: None,
        // What is to run would be placed again at once.
        wanted: Wanted::Stopped,
        generation,
        observed_generation: generation,
        state: InstanceState::Failed,
        state_reason: format!(
            "node {} was removed for good; what was on it is lost; delete it, or start it afresh with `hypervisor-ctl \
             instance start`",
            node.hostname
        ),
        ip_address: String::new(),
        started_at: None,
        restart_count: 0,
        update_note: String::new(),
        holds: Resources::default(),
        recovery_note: String::new(),
        migration: None,
        ..record.clone()
    }
}
