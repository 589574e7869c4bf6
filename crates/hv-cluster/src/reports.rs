//! What nodes saw of their instances, taken over into the records.
//!
//! # Invariants
//! - A report counts only for the node and the epoch that the record holds.
//! - A node is told to give an instance up only where the store, asked after the report came, has no record that binds
//!   it there. Doubt is answered with [`Verdict::Retry`]: destroying too little can be mended, too much cannot.

use hv_proto::{convert, v1};
use hv_store::{Compare, Op, StoreError, Txn, TxnOutcome};
use hv_telemetry::crash::{self, Point};
use hv_types::{
    ClusterId, Epoch, InstanceId, InstanceRecord, InstanceState, Invalid, NodeId, ServiceError, Wanted,
    validate,
};
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
}

impl TryFrom<v1::InstanceReport> for Report {
    type Error = Invalid;

    fn try_from(report: v1::InstanceReport) -> std::result::Result<Self, Invalid> {
        validate::text("reports.ip_address", &report.ip_address, 64)?;
        // It may quote what a guest or a runtime printed, and is shown on terminals.
        let mut reason = report.state_reason.replace(|c: char| c.is_control() && c != '\n' && c != '\t', " ");
        reason.truncate(reason.floor_char_boundary(MAX_REASON_BYTES));
        Ok(Self {
            id: report.instance_id.parse()?,
            epoch: Epoch(report.epoch),
            observed_generation: report.observed_generation,
            state: convert::state_from(report.state)?.unwrap_or(InstanceState::Unknown),
            reason,
            ip_address: report.ip_address,
            started_at: report.started_at.as_ref().map(convert::from_timestamp),
            gone: report.gone,
        })
    }
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
        if claims != self.id() {
            return Err(Error::precondition(format!(
                "the node belongs to cluster {claims}, this is {}",
                self.id()
            )));
        }
        if reports.len() > MAX_REPORTS {
            let expected = format!("must have at most {MAX_REPORTS} entries");
            return Err(Invalid::new("reports", reports.len(), expected).into());
        }
        self.sync().await?;
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
        if txn.then.is_empty() {
            return Ok(Some(verdicts));
        }
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

/// What a report of `node` does.
fn judge(state: &State, node: &NodeId, report: &Report) -> Effect {
    if state.is_unreadable(&report.id) {
        // Written by a newer server, say. What cannot be read is no reason to destroy anything.
        return Effect::Nothing(Verdict::Retry);
    }
    let Some(record) = state.instance(&report.id) else {
        return Effect::Nothing(Verdict::Release);
    };
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
