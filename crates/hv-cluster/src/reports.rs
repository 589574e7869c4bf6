//! What nodes saw of their instances, taken over into the records.
//!
//! # Invariants
//! - A report counts only for the node and the epoch that the record holds.
//! - A node is told to give an instance up only where the store, asked after the report came, has no record that binds
//!   it there. Doubt is answered with [`Verdict::Retry`]: destroying too little can be mended, too much cannot.

use std::collections::HashSet;
use std::time::{Duration, SystemTime};

use hv_proto::{convert, v1};
use hv_store::{Compare, Op, StoreError, Txn, TxnOutcome};
use hv_telemetry::crash::{self, Point};
use hv_types::{
    ClusterId, Epoch, InstanceId, InstanceRecord, InstanceState, Invalid, NodeId, Resources, ServiceError,
    Wanted, validate,
};
use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tracing::warn;

use crate::Cluster;
use crate::cache::State;
use crate::error::{Error, Result};
use crate::events::About;

/// Most reports in one call.
pub const MAX_REPORTS: usize = 100;
/// Most reports written in one transaction; each takes up to two operations and two compares of the store's bound.
const TXN_REPORTS: usize = 30;
/// Longest reason that is stored, in bytes; a longer one is cut.
const MAX_REASON_BYTES: usize = 4 << 10;

/// Most nodes whose reports are written at once.
const MAX_TURNS: usize = 64;
/// Of how many unknown instances it is remembered that they were told of.
const MAX_TOLD: usize = 10_000;

/// Who reports now. A node has one call at a time and calls take turns in the order they came, so that one that floods
/// this server waits for itself and not others for it.
pub(crate) struct Reporters {
    busy: Mutex<HashSet<NodeId>>,
    turns: Semaphore,
    told: Mutex<HashSet<InstanceId>>,
}

impl Default for Reporters {
    fn default() -> Self {
        Self { busy: Mutex::default(), turns: Semaphore::new(MAX_TURNS), told: Mutex::default() }
    }
}

impl Reporters {
    /// A place for the node, unless another call of it is under way.
    fn enter(&self, node: &NodeId) -> Option<Reporting<'_>> {
        let entered = self.busy.lock().insert(node.clone());
        entered.then(|| Reporting { reporters: self, node: node.clone() })
    }

    /// Whether it was not told of the instance yet.
    fn is_news(&self, id: &InstanceId) -> bool {
        let mut told = self.told.lock();
        told.len() < MAX_TOLD && told.insert(id.clone())
    }
}

/// A node's place among those who report; given up when the call ends, however it does.
struct Reporting<'a> {
    reporters: &'a Reporters,
    node: NodeId,
}

impl Drop for Reporting<'_> {
    fn drop(&mut self) {
        self.reporters.busy.lock().remove(&self.node);
    }
}

/// What a node saw of one instance.
#[derive(Clone, Debug)]
pub struct Report {
    /// Which one.
    pub id: InstanceId,
    /// The epoch that the node worked on.
    pub epoch: Epoch,
    /// The generation that it has finished with.
    pub observed_generation: u64,
    /// What it is doing.
    pub state: InstanceState,
    /// Why, for people.
    pub reason: String,
    /// The guest's address.
    pub ip_address: String,
    /// When it last began to run.
    pub started_at: Option<std::time::SystemTime>,
    /// Nothing of it is left on the node.
    pub gone: bool,
    /// How often the node has started it again by itself.
    pub restart_count: u32,
    /// What of its specification takes effect at the next start only, and why.
    pub update_note: String,
    /// It only waits there for this migration; empty where it is bound to the node.
    pub migration: String,
}

impl TryFrom<v1::InstanceReport> for Report {
    type Error = Invalid;

    fn try_from(report: v1::InstanceReport) -> std::result::Result<Self, Invalid> {
        validate::text("reports.ip_address", &report.ip_address, 64)?;
        // It may quote what a guest or a runtime printed, and is shown on terminals.
        let reason = presentable(&report.state_reason);
        Ok(Self {
            id: report.instance_id.parse()?,
            epoch: Epoch(report.epoch),
            observed_generation: report.observed_generation,
            state: convert::state_from(report.state)?.unwrap_or(InstanceState::Unknown),
            reason,
            ip_address: report.ip_address,
            started_at: report.started_at.as_ref().map(convert::from_timestamp),
            gone: report.gone,
            restart_count: report.restart_count,
            update_note: presentable(&report.update_note),
            migration: report.migration_id,
        })
    }
}

fn presentable(text: &str) -> String {
    let mut text = text.replace(|c: char| c.is_control() && c != '\n' && c != '\t', " ");
    text.truncate(text.floor_char_boundary(MAX_REASON_BYTES));
    text
}

/// What becomes of a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is recorded.
    Accepted,
    /// The instance is not this node's: stop and remove it.
    Release,
    /// It could not be recorded now.
    Retry,
}

/// What a report does to the record it is about.
enum Effect {
    Nothing(Verdict),
    Update(Box<InstanceRecord>),
    Remove,
}

impl Cluster {
    /// Takes over what a node saw; one verdict for each report.
    ///
    /// # Errors
    /// The node belongs to another cluster, sends too much at once, or the store does not answer.
    pub async fn report(
        &self,
        claims: &ClusterId,
        node: &NodeId,
        reports: &[Report],
    ) -> Result<Vec<Verdict>> {
        if *claims != self.id() {
            return Err(Error::precondition(format!(
                "the node belongs to cluster {claims}, this is {}",
                self.id()
            )));
        }
        if reports.len() > MAX_REPORTS {
            let expected = format!("must have at most {MAX_REPORTS} entries");
            return Err(Invalid::new("reports", reports.len(), expected).into());
        }
        let Some(_place) = self.reporters.enter(node) else {
            return Ok(vec![Verdict::Retry; reports.len()]);
        };
        // The semaphore is never closed.
        let _turn = self.reporters.turns.acquire().await.ok();
        self.sync().await?;
        if self.is_frozen() {
            return Ok(vec![Verdict::Retry; reports.len()]);
        }
        let mut verdicts = Vec::with_capacity(reports.len());
        for chunk in reports.chunks(TXN_REPORTS) {
            match self.report_together(node, chunk).await? {
                Some(together) => verdicts.extend(together),
                // One of them raced with another change; alone, the others get through.
                None => {
                    for report in chunk {
                        let alone = self.report_together(node, std::slice::from_ref(report)).await?;
                        verdicts.push(alone.map_or(Verdict::Retry, |verdicts| verdicts[0]));
                    }
                }
            }
        }
        Ok(verdicts)
    }

    /// All reports in one transaction; `None` if a record changed in between.
    async fn report_together(&self, node: &NodeId, reports: &[Report]) -> Result<Option<Vec<Verdict>>> {
        let mut txn = Txn::default();
        let mut verdicts = Vec::with_capacity(reports.len());
        let mut changes = Vec::new();
        let mut touched = std::collections::BTreeSet::new();
        let mut removes = false;
        self.cache.read(|state| {
            for report in reports {
                if !touched.insert(&report.id) {
                    verdicts.push(Verdict::Retry);
                    continue;
                }
                let effect = judge(state, node, report);
                let (verdict, part) = self.effect_ops(state, report, effect, &mut changes, &mut removes);
                verdicts.push(verdict);
                if let Some((compares, ops)) = part {
                    txn.compares.extend(compares);
                    txn.then.extend(ops);
                }
            }
        });
        self.tell_of_orphans(node, reports);
        if txn.then.is_empty() {
            return Ok(Some(verdicts));
        }
        txn.compares.push(self.unfrozen()?);
        crash::reach(if removes { Point::ServerRemoveBeforeTxn } else { Point::ServerReportBeforeTxn });
        let outcome = match self.store.txn(txn).await {
            // Together they are too large for the store; alone they are not.
            Err(StoreError::InvalidRequest(_)) if reports.len() > 1 => return Ok(None),
            outcome => outcome?,
        };
        let TxnOutcome::Committed(revision) = outcome else {
            self.sync().await?;
            return Ok(None);
        };
        crash::reach(if removes { Point::ServerRemoveAfterTxn } else { Point::ServerReportAfterTxn });
        self.cache.wait_for(revision).await?;
        for (before, after) in changes {
            self.tell(node, &before, after.as_deref());
        }
        Ok(Some(verdicts))
    }

    #[allow(clippy::type_complexity, reason = "used once, right above")]
    fn effect_ops(
        &self,
        state: &State,
        report: &Report,
        effect: Effect,
        changes: &mut Vec<(std::sync::Arc<InstanceRecord>, Option<Box<InstanceRecord>>)>,
        removes: &mut bool,
    ) -> (Verdict, Option<(Vec<Compare>, Vec<Op>)>) {
        let record = match (&effect, state.instance(&report.id)) {
            (Effect::Nothing(verdict), _) => return (*verdict, None),
            (Effect::Update(_) | Effect::Remove, None) => return (Verdict::Retry, None),
            (Effect::Update(_) | Effect::Remove, Some(record)) => record,
        };
        match effect {
            Effect::Nothing(verdict) => (verdict, None),
            Effect::Update(after) => {
                let (compare, op) = self.replace_instance(record, &after);
                changes.push((record.clone(), Some(after)));
                (Verdict::Accepted, Some((vec![compare], vec![op])))
            }
            Effect::Remove => {
                *removes = true;
                changes.push((record.clone(), None));
                (Verdict::Accepted, Some(self.remove_instance(record)))
            }
        }
    }

    /// Tells, once each, of instances that the records do not know of since they were restored from a backup.
    fn tell_of_orphans(&self, node: &NodeId, reports: &[Report]) {
        let orphans: Vec<_> = self.cache.read(|state| {
            let record = state.node(node).and_then(|entry| entry.record.clone());
            let orphans = reports.iter().filter(|report| {
                !report.gone && state.instance(&report.id).is_none() && is_orphan(state, &report.id)
            });
            orphans.filter_map(|report| Some((report.id.clone(), record.clone()?))).collect()
        });
        for (id, record) in orphans {
            if self.reporters.is_news(&id) {
                let message = format!(
                    "instance {id} is on node {}, but not in the records, which were restored from a backup since it was \
                     made; it is left alone: save what it holds, then remove it on the node with `hypervisor-ctl \
                     --server {}:{} vm delete {id}`",
                    record.hostname, record.ip, record.port
                );
                self.events.warn(About::Node(&record), "OrphanInstance", message, "reports");
            }
        }
    }

    fn tell(&self, node: &NodeId, before: &InstanceRecord, after: Option<&InstanceRecord>) {
        let source = format!("agent/{node}");
        let about = About::Instance(before);
        let Some(after) = after else {
            self.events.record(about, "Deleted", "removed from its node", &source);
            return;
        };
        if after.state == before.state {
            return;
        }
        match after.state {
            InstanceState::Running => self.events.record(about, "Running", "runs", &source),
            InstanceState::Stopped => {
                let asked_for = after.state_reason.is_empty();
                let message = if asked_for { "stopped, as asked for" } else { &after.state_reason };
                self.events.record(about, "Stopped", message, &source);
            }
            InstanceState::Paused => self.events.record(about, "Paused", "stands still in memory", &source),
            InstanceState::Failed => self.events.warn(about, "Failed", after.state_reason.clone(), &source),
            InstanceState::Pending => {
                self.events.record(about, "Released", after.state_reason.clone(), &source);
            }
            InstanceState::Creating
            | InstanceState::Starting
            | InstanceState::Stopping
            | InstanceState::Deleting
            | InstanceState::Unknown => {}
        }
    }
}

/// Whether an instance that is not in the records may be one that a restored backup does not know of: one that was made
/// before the records were restored. What was made afterwards would be there.
fn is_orphan(state: &State, id: &InstanceId) -> bool {
    let restored = state.cluster().and_then(|(record, _)| record.restored_at.as_ref());
    let Some(restored_at) = restored.map(convert::from_timestamp) else { return false };
    let stamp = uuid::Uuid::try_parse(id.as_str()).ok().and_then(|id| id.get_timestamp());
    // Where the id does not tell, nothing is destroyed.
    stamp.is_none_or(|stamp| {
        let (seconds, nanos) = stamp.to_unix();
        SystemTime::UNIX_EPOCH + Duration::new(seconds, nanos) <= restored_at
    })
}

/// What a report of `node` does.
fn judge(state: &State, node: &NodeId, report: &Report) -> Effect {
    if state.is_unreadable(&report.id) {
        // Written by a newer server, say. What cannot be read is no reason to destroy anything.
        return Effect::Nothing(Verdict::Retry);
    }
    let Some(record) = state.instance(&report.id) else {
        // A store that was set back does not know what was made since: its word that there is no such instance is none.
        let verdict = if is_orphan(state, &report.id) { Verdict::Retry } else { Verdict::Release };
        return Effect::Nothing(verdict);
    };
    if !report.migration.is_empty() {
        return Effect::Nothing(judge_incoming(record, node, report));
    }
    if report.epoch > record.epoch {
        // Only a store that was set back to an earlier state knows less than a node. Nothing is destroyed on its word.
        warn!(instance = %record.id, node = %node, reported = %report.epoch, recorded = %record.epoch,
            "a node reports an epoch that the store never gave; was the store restored from a backup?");
        return Effect::Nothing(Verdict::Retry);
    }
    let Some(binding) =
        record.binding.as_ref().filter(|b| b.node_id == *node && record.epoch == report.epoch)
    else {
        return Effect::Nothing(Verdict::Release);
    };
    if report.gone {
        return match (record.wanted, binding.release) {
            (Wanted::Deleted, _) => Effect::Remove,
            (_, true) => Effect::Update(Box::new(unbound(record, node))),
            (Wanted::Running | Wanted::Stopped | Wanted::Paused, false) => Effect::Nothing(Verdict::Retry),
        };
    }
    let mut after = InstanceRecord::clone(record);
    let leaving = record.wanted == Wanted::Deleted || binding.release;
    after.state =
        if leaving && report.state != InstanceState::Failed { InstanceState::Deleting } else { report.state };
    after.state_reason.clone_from(&report.reason);
    after.observed_generation =
        record.observed_generation.max(report.observed_generation.min(record.generation));
    after.ip_address.clone_from(&report.ip_address);
    after.restart_count = report.restart_count;
    after.update_note.clone_from(&report.update_note);
    after.hold(held(&after, report));
    // The node speaks: whatever was said of its loss is over.
    after.recovery_note.clear();
    after.started_at = report.started_at.or(record.started_at);
    if !leaving && report.observed_generation < record.generation && report.state.is_settled() {
        // The node has not seen the latest request yet: what it says is the state before it.
        after.state = record.state;
        after.state_reason.clone_from(&record.state_reason);
    }
    if after == **record {
        return Effect::Nothing(Verdict::Accepted);
    }
    Effect::Update(Box::new(after))
}

/// What its node still gives an instance that was made smaller.
fn held(record: &InstanceRecord, report: &Report) -> Resources {
    let is_taken = report.observed_generation >= record.generation;
    match (is_taken, report.state) {
        (true, _) if report.update_note.is_empty() => Resources::default(),
        // What does not run has its disks and nothing else.
        (true, InstanceState::Stopped) => {
            Resources { disk_bytes: record.holds.disk_bytes, ..Resources::default() }
        }
        _ => record.holds,
    }
}

/// What becomes of a copy that waits on `node` to be handed over.
fn judge_incoming(record: &InstanceRecord, node: &NodeId, report: &Report) -> Verdict {
    let is_its =
        record.migration.as_ref().is_some_and(|m| m.operation == report.migration && m.target == *node);
    match record.epoch.cmp(&report.epoch) {
        // It moves there, or is bound there by now and the node is about to hear of it.
        _ if is_its => Verdict::Accepted,
        // A store that was set back to before the move began knows nothing of it.
        std::cmp::Ordering::Less => Verdict::Retry,
        // Bound there anew without the migration: what waits goes first, as that assignment says.
        _ if record.node_id() == Some(node) => Verdict::Accepted,
        _ => Verdict::Release,
    }
}

/// The record once its node has given it up.
fn unbound(record: &InstanceRecord, node: &NodeId) -> InstanceRecord {
    let (state, reason) = match record.wanted {
        Wanted::Stopped => (InstanceState::Stopped, format!("stopped; moved off node {node}")),
        Wanted::Running | Wanted::Paused | Wanted::Deleted => {
            (InstanceState::Pending, format!("moved off node {node}; waits for another"))
        }
    };
    // Without a node there is nobody left who could finish with a stop that was asked for.
    let stopped = record.wanted == Wanted::Stopped;
    InstanceRecord {
        binding: None,
        state,
        state_reason: reason,
        observed_generation: if stopped { record.generation } else { record.observed_generation },
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

impl From<Verdict> for v1::ReportVerdict {
    fn from(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Accepted => Self::Accepted,
            Verdict::Release => Self::Release,
            Verdict::Retry => Self::Retry,
        }
    }
}

/// Reads what a node sent; one bad report spoils none of the others' format checks.
///
/// # Errors
/// Names the field that is refused.
pub fn parse(reports: Vec<v1::InstanceReport>) -> std::result::Result<Vec<Report>, ServiceError> {
    reports.into_iter().map(|report| Report::try_from(report).map_err(ServiceError::from)).collect()
}
