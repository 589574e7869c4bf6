//! The leader's part of failover: which nodes are lost, when to look at them, and the transactions.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hv_store::{Compare, Op, Txn, TxnOutcome};
use hv_types::{InstanceId, InstanceRecord, NodeId, NodeRecord};
use tokio::time::Instant;
use tracing::{debug, warn};

use super::{Decision, Situation, decide, started_afresh};
use crate::cache::{Batch, Delta, State, Subscription, SubscriptionError};
use crate::election::Leadership;
use crate::error::Result;
use crate::events::About;
use crate::{Cluster, TXN_BYTES, op_bytes};

/// Records changed in one transaction: each takes up to two operations and two compares.
const BATCH: usize = 60;
/// How long a node is lost before why nothing happens is written into its instances' records.
const NOTE_DELAY: Duration = Duration::from_secs(2);
/// When a node is looked at again whose loss this server has not noted yet, or whose records were being changed.
const SOON: Duration = Duration::from_millis(20);
/// The pause after a failure, and while the store is frozen.
const RETRY_PAUSE: Duration = Duration::from_millis(500);
/// How long a pass may be delayed at most when nothing happens.
const SLOW_TIMER: Duration = Duration::from_secs(30);
/// How many records are looked at in one instant of the cache.
const LOOK: usize = 10_000;

/// What becomes of one record.
enum Act {
    /// It is unbound, to be started elsewhere.
    Restart,
    /// It goes.
    Remove,
    /// Its note is replaced.
    Note { text: String, waits: bool },
}

/// What a look at a node comes to.
#[derive(Default)]
struct Look {
    /// To be done now.
    acts: Vec<(Arc<InstanceRecord>, Act)>,
    /// To be written once there is nothing to be started.
    notes: Vec<(Arc<InstanceRecord>, Act)>,
    /// When to look again at the latest.
    again: Option<Instant>,
}

impl Look {
    fn again_at(&mut self, at: Instant) {
        self.again = Some(self.again.map_or(at, |known| known.min(at)));
    }
}

/// What a leader keeps in mind.
struct Work {
    /// When its term began: nothing is counted from before.
    begin: Instant,
    /// Nodes to look at now.
    due: BTreeSet<NodeId>,
    /// Nodes whose instances have notes to be written.
    notes: BTreeSet<NodeId>,
    /// Nodes to look at later.
    later: BTreeMap<NodeId, Instant>,
}

impl Work {
    fn take(&mut self, state: &State, batch: &Batch) {
        for delta in &batch.deltas {
            match delta {
                Delta::Node { id, .. } => {
                    self.due.insert(id.clone());
                }
                Delta::Instance { after: Some(record), .. } => {
                    let lost =
                        record.node_id().filter(|id| !state.node(id).is_some_and(|node| node.is_live()));
                    self.due.extend(lost.cloned());
                }
                Delta::Instance { after: None, .. }
                | Delta::Operation { .. }
                | Delta::Event(_)
                | Delta::Hold { .. } => {}
            }
        }
    }

    /// Takes over what is due by now; says when the next is.
    fn ripe(&mut self) -> Instant {
        let now = Instant::now();
        self.due.extend(self.later.extract_if(.., |_, at| *at <= now).map(|(id, _)| id));
        self.later.values().min().copied().unwrap_or(now + SLOW_TIMER)
    }
}

impl Cluster {
    /// Fails over while this server leads.
    pub(crate) async fn fail_over_while_leading(&self, leadership: &Leadership) {
        let begin = Instant::now();
        loop {
            if let Err(error) = self.cache.wait_for(leadership.since).await {
                warn!(error = hv_telemetry::error_chain(error.service()), "failover waits for the cache");
                continue;
            }
            let (due, changes) = self.cache.subscribe(|state| {
                let lost = state.nodes().filter(|(_, entry)| !entry.is_live());
                lost.map(|(node, _)| node.id.clone()).collect()
            });
            let mut work = Work { begin, due, notes: BTreeSet::new(), later: BTreeMap::new() };
            // What an earlier leader could not take away any more.
            work.due.extend(self.nodes_with_notes());
            self.fail_over(leadership, work, changes).await;
        }
    }

    /// The nodes of instances with a note.
    fn nodes_with_notes(&self) -> BTreeSet<NodeId> {
        let (mut nodes, mut after) = (BTreeSet::new(), None::<InstanceId>);
        loop {
            let last = self.cache.read(|state| {
                let mut last = None;
                for record in state.instances_after(after.as_ref()).take(LOOK) {
                    if !record.recovery_note.is_empty() {
                        nodes.extend(record.node_id().cloned());
                    }
                    last = Some(record.id.clone());
                }
                last
            });
            if last.is_none() {
                return nodes;
            }
            after = last;
        }
    }

    /// Until changes were missed.
    async fn fail_over(&self, leadership: &Leadership, mut work: Work, mut changes: Subscription) {
        loop {
            let mut wake = work.ripe();
            while let Some(id) = work.due.pop_first() {
                work.later.remove(&id);
                self.attend(leadership, &mut work, &id).await;
                wake = work.ripe();
            }
            let idle = work.notes.is_empty();
            if let Some(id) = work.notes.pop_first() {
                self.write_notes(leadership, &mut work, &id).await;
            }
            tokio::select! {
                biased;
                batch = changes.next() => match batch {
                    Ok(Some(batch)) => {
                        batch.deltas.iter().for_each(|delta| self.tell_of_loss(delta));
                        self.cache.read(|state| work.take(state, &batch));
                    }
                    Ok(None) => std::future::pending().await,
                    Err(SubscriptionError::Lagged | SubscriptionError::Expired) => return,
                },
                () = std::future::ready(()), if !idle => {}
                () = tokio::time::sleep_until(wake) => {}
            }
        }
    }

    /// Looks at a node and does what is to be done now.
    async fn attend(&self, leadership: &Leadership, work: &mut Work, id: &NodeId) {
        if self.is_frozen() {
            work.later.insert(id.clone(), Instant::now() + RETRY_PAUSE);
            return;
        }
        loop {
            let Some((node, look)) = self.look_at(work.begin, id) else { return };
            let again = look.again;
            if !look.notes.is_empty() {
                work.notes.insert(id.clone());
            }
            if look.acts.is_empty() {
                work.later.extend(again.map(|at| (id.clone(), at)));
                return;
            }
            match self.commit_acts(leadership, &node, look.acts).await {
                Ok(true) => {}
                Ok(false) => {
                    debug!(node = %id, "a failover was overtaken by another change");
                    work.later.insert(id.clone(), Instant::now() + SOON);
                    return;
                }
                Err(error) => {
                    warn!(
                        error = hv_telemetry::error_chain(error.service()),
                        node = %id,
                        "failover failed; it is tried again"
                    );
                    work.later.insert(id.clone(), Instant::now() + RETRY_PAUSE);
                    return;
                }
            }
        }
    }

    /// Writes some of a node's notes; the others come when nothing is to be started.
    async fn write_notes(&self, leadership: &Leadership, work: &mut Work, id: &NodeId) {
        if self.is_frozen() {
            work.later.insert(id.clone(), Instant::now() + RETRY_PAUSE);
            return;
        }
        let Some((node, look)) = self.look_at(work.begin, id) else { return };
        if look.notes.is_empty() {
            return;
        }
        match self.commit_acts(leadership, &node, look.notes).await {
            // It is looked at once more: there may be others, and each comes once.
            Ok(true) => {
                work.notes.insert(id.clone());
            }
            Ok(false) => {
                work.later.insert(id.clone(), Instant::now() + SOON);
            }
            Err(error) => {
                warn!(
                    error = hv_telemetry::error_chain(error.service()),
                    node = %id,
                    "why instances wait was not written; it is tried again"
                );
                work.later.insert(id.clone(), Instant::now() + RETRY_PAUSE);
            }
        }
    }

    /// What is to be done about a node's instances.
    fn look_at(&self, begin: Instant, id: &NodeId) -> Option<(Arc<NodeRecord>, Look)> {
        let noted = self.liveness.lost(id);
        let now = Instant::now();
        self.cache.read(|state| {
            let entry = state.node(id)?;
            let node = entry.record.clone()?;
            let mut look = Look::default();
            let live = entry.is_live();
            if !live && noted.is_none() {
                // This server's own note of it comes in a moment.
                look.again_at(now + SOON);
                return Some((node, look));
            }
            let since = noted.map_or(now, |lost| lost.since.max(begin));
            let (ttl, grace) = (self.config.heartbeat_timeout, self.config.failover_grace);
            let situation = Situation {
                node: &node,
                live,
                lost_for: now.saturating_duration_since(since),
                certain_after: noted.map_or(ttl + grace, |lost| lost.certain_after(ttl, grace)),
            };
            let note = |look: &mut Look, record: &Arc<InstanceRecord>, text: String, waits| {
                if record.recovery_note == text {
                    return;
                }
                if !live && situation.lost_for < NOTE_DELAY {
                    look.again_at(since + NOTE_DELAY);
                } else if look.notes.len() < BATCH {
                    look.notes.push((record.clone(), Act::Note { text, waits }));
                }
            };
            for record in state.instances_on(id) {
                match decide(record, &situation) {
                    Decision::Fine => note(&mut look, record, String::new(), false),
                    Decision::Restart => look.acts.push((record.clone(), Act::Restart)),
                    Decision::Remove => look.acts.push((record.clone(), Act::Remove)),
                    Decision::WaitUntil(left, text) => {
                        look.again_at(now + left);
                        note(&mut look, record, text, true);
                    }
                    Decision::No(text) => note(&mut look, record, text, false),
                }
                if look.acts.len() == BATCH {
                    break;
                }
            }
            Some((node, look))
        })
    }

    /// Commits as many as fit into one transaction; false if one of the records changed in between, the node is back, or
    /// this server does not lead any more.
    async fn commit_acts(
        &self,
        leadership: &Leadership,
        node: &NodeRecord,
        acts: Vec<(Arc<InstanceRecord>, Act)>,
    ) -> Result<bool> {
        let mut txn = Txn {
            compares: vec![
                leadership.guard(),
                self.unfrozen()?,
                Compare::ModRevision(self.keys.node(&node.id), node.revision),
            ],
            ..Txn::default()
        };
        if acts.iter().any(|(_, act)| !matches!(act, Act::Note { .. })) {
            txn.compares.push(Compare::Absent(self.keys.node_lease(&node.id)));
        }
        let at = self.liveness.lost(&node.id).map(|lost| lost.at);
        let (mut bytes, mut done) = (0, Vec::new());
        for (record, act) in acts {
            let (compares, ops, after) = self.act_ops(&record, node, &act, at);
            bytes += ops.iter().map(op_bytes).sum::<usize>();
            let full =
                txn.then.len() + ops.len() > 2 * BATCH || txn.compares.len() + compares.len() > 2 * BATCH;
            if !done.is_empty() && (bytes > TXN_BYTES || full) {
                break;
            }
            txn.compares.extend(compares);
            txn.then.extend(ops);
            done.push((record, act, after));
        }
        let TxnOutcome::Committed(revision) = self.store.txn(txn).await? else {
            self.sync().await?;
            return Ok(false);
        };
        self.cache.wait_for(revision).await?;
        for (before, act, after) in &done {
            self.tell_act(node, before, act, after.as_ref());
        }
        Ok(true)
    }

    fn act_ops(
        &self,
        record: &InstanceRecord,
        node: &NodeRecord,
        act: &Act,
        at: Option<SystemTime>,
    ) -> (Vec<Compare>, Vec<Op>, Option<InstanceRecord>) {
        let after = match act {
            Act::Remove => {
                let (compares, ops) = self.remove_instance(record);
                return (compares, ops, None);
            }
            Act::Restart => started_afresh(record, node, at),
            Act::Note { text, .. } => InstanceRecord { recovery_note: text.clone(), ..record.clone() },
        };
        let (compare, op) = self.replace_instance(record, &after);
        (vec![compare], vec![op], Some(after))
    }

    fn tell_act(
        &self,
        node: &NodeRecord,
        before: &InstanceRecord,
        act: &Act,
        after: Option<&InstanceRecord>,
    ) {
        let (about, source) = (About::Instance(after.unwrap_or(before)), "failover");
        match act {
            Act::Restart => {
                metrics::counter!("hypervisor_failovers_total").increment(1);
                let reason = after.map(|after| after.state_reason.clone()).unwrap_or_default();
                self.events.warn(about, "FailedOver", reason, source);
            }
            Act::Remove => {
                let message = format!("deleted; node {} is lost and does not run it any more", node.hostname);
                self.events.record(about, "Deleted", message, source);
            }
            Act::Note { text, .. } if text.is_empty() => {}
            Act::Note { text, waits: true } => self.events.warn(about, "WillRestart", text.clone(), source),
            Act::Note { text, waits: false } => self.events.warn(about, "NotRestarted", text.clone(), source),
        }
    }

    /// Records that a node's lease has ended.
    fn tell_of_loss(&self, delta: &Delta) {
        if let Delta::Node { before: Some((_, true)), after: Some((node, false)), .. } = delta {
            let limit = self.config.heartbeat_timeout.as_secs_f64();
            let message = format!("no heartbeat for {limit} s; is its agent running?");
            self.events.warn(About::Node(node), "NodeNotReady", message, "failover");
        }
    }
}
