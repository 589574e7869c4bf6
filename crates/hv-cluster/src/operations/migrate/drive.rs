//! One move, driven by its leader from record to record.
//!
//! # Failure and recovery
//! Nothing that is kept here matters: whoever drives it next reads the records and asks the nodes again.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hv_proto::{convert, v1};
use hv_store::record::Record;
use hv_store::{Compare, Op, Txn, TxnOutcome};
use hv_telemetry::crash::{self, Point};
use hv_types::instance::Binding;
use hv_types::{InstanceRecord, InstanceState, NodeId, OperationRecord, OperationState, ServiceError};
use tokio::sync::Notify;
use tokio::time::Instant;
use tracing::{info, warn};

use super::judge::{Act, judge};
use super::standstill::Standstill;
use super::{Asked, DOWNTIME, OUTCOME, Phase, REASON};
use crate::Cluster;
use crate::election::Leadership;
use crate::error::Result;
use crate::events::About;
use crate::operations::Nodes;
use crate::placer::Reserved;

/// How often the source is asked how far it is.
const POLL: Duration = Duration::from_millis(200);
/// The same once nearly everything was sent: from the hand-over on the instance stands still.
const POLL_CLOSE: Duration = Duration::from_millis(20);
/// How often how far it is may be written.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);
/// The pause after a node did not answer, or a transaction failed.
const RETRY_PAUSE: Duration = Duration::from_millis(500);
/// How long an instance that was handed over waits for its target to say that it holds it.
const HAND_OVER_PATIENCE: Duration = Duration::from_secs(5);
/// How often a target is asked to forget what it holds before that is left to its reports.
const TARGET_TRIES: u32 = 3;
/// How long a look lasts where nothing changes.
const SLOW: Duration = Duration::from_secs(5);

/// What a step came to.
enum Step {
    /// Something was written: look again at once.
    Again,
    /// Look again when something changes, or then.
    Wait(Duration),
    /// It has ended.
    Over,
}

/// Where asking the nodes has come to.
enum Found {
    /// It goes on.
    On(Step),
    /// It cannot succeed.
    Hopeless(String),
}

/// One move and who drives it.
pub(super) struct Drive<'a> {
    cluster: &'a Cluster,
    leadership: &'a Leadership,
    nodes: Arc<dyn Nodes>,
    id: String,
    changed: Arc<Notify>,
    begin: Instant,
    /// This leader has begun the transfer.
    begun: bool,
    /// When progress was last written.
    written: Option<Instant>,
    /// Whether anything is still sent.
    standstill: Standstill,
    /// When the source was first seen to have handed it over.
    handed_over: Option<Instant>,
    /// How often the target was asked to forget it.
    target_tries: u32,
    /// The source has confirmed the abort.
    source_done: bool,
}

impl<'a> Drive<'a> {
    pub(super) fn new(
        cluster: &'a Cluster,
        leadership: &'a Leadership,
        nodes: Arc<dyn Nodes>,
        id: String,
        changed: Arc<Notify>,
    ) -> Self {
        Self {
            cluster,
            leadership,
            nodes,
            id,
            changed,
            begin: Instant::now(),
            begun: false,
            written: None,
            standstill: Standstill::default(),
            handed_over: None,
            target_tries: 0,
            source_done: false,
        }
    }

    /// Drives it to its end; says which it was.
    pub(super) async fn run(mut self) -> String {
        loop {
            let pause = match self.step().await {
                Ok(Step::Over) => return self.id,
                Ok(Step::Again) => continue,
                Ok(Step::Wait(pause)) => pause,
                Err(error) => {
                    let error = hv_telemetry::error_chain(error.service());
                    warn!(operation = self.id, error, "a step of a move failed; it is tried again");
                    RETRY_PAUSE
                }
            };
            // Not sooner than that for a poll; otherwise what changes wakes it.
            if pause <= RETRY_PAUSE {
                tokio::time::sleep(pause).await;
            } else {
                let _ = tokio::time::timeout(pause, self.changed.notified()).await;
            }
        }
    }

    async fn step(&mut self) -> Result<Step> {
        if self.cluster.is_frozen() {
            return Ok(Step::Wait(PROGRESS_INTERVAL));
        }
        let found = self.cluster.cache.read(|state| {
            let operation = state.operation(&self.id)?.clone();
            let record = operation.object_id.parse().ok().and_then(|id| state.instance(&id).cloned());
            let act = judge(state, &operation, self.begin.elapsed(), SystemTime::now());
            Some((operation, record, act))
        });
        let Some((operation, record, act)) = found.filter(|(operation, ..)| !operation.state.is_final())
        else {
            return Ok(Step::Over);
        };
        match (act, record) {
            (Act::Reserve, _) => self.reserve(&operation).await,
            (Act::Forward, Some(record)) => {
                let asked = Asked::of(&operation)?;
                match self.forward(&operation, &asked, &record).await? {
                    Found::On(step) => Ok(step),
                    Found::Hopeless(why) => self.abort(&operation, OperationState::Failed, &why).await,
                }
            }
            (Act::Forward, None) => Ok(Step::Again),
            (Act::Abort(outcome, why), _) => self.abort(&operation, outcome, &why).await,
            (Act::Undo { source_matters }, record) => {
                self.undo(&operation, record.as_deref(), source_matters).await
            }
            (Act::Await, _) => Ok(Step::Wait(SLOW)),
            (Act::End(outcome, why), record) => self.end(&operation, record.as_deref(), outcome, why).await,
        }
    }

    async fn reserve(&self, operation: &OperationRecord) -> Result<Step> {
        match self.cluster.reserve(&self.id).await {
            Reserved::Made(revision) => {
                self.cluster.cache.wait_for(revision).await?;
                Ok(Step::Again)
            }
            Reserved::Impossible(why) => self.end(operation, None, OperationState::Failed, why).await,
            Reserved::Again => {
                self.cluster.sync().await?;
                Ok(Step::Wait(RETRY_PAUSE))
            }
        }
    }

    /// What a node's failure to answer comes to.
    async fn trouble(
        &mut self,
        operation: &OperationRecord,
        node: &NodeId,
        error: &ServiceError,
    ) -> Result<Found> {
        let text = format!("node {} ({node}): {error}", self.hostname(node));
        if !error.code().retryable() {
            return Ok(Found::Hopeless(text));
        }
        self.tell(operation, format!("tries again, as {text}")).await?;
        Ok(Found::On(Step::Wait(RETRY_PAUSE)))
    }

    fn hostname(&self, node: &NodeId) -> String {
        self.cluster.cache.read(|state| {
            let record = state.node(node).and_then(|entry| entry.record.as_ref());
            record.map_or_else(|| node.to_string(), |record| record.hostname.clone())
        })
    }

    /// Asks the nodes for what comes next.
    async fn forward(
        &mut self,
        operation: &OperationRecord,
        asked: &Asked,
        record: &InstanceRecord,
    ) -> Result<Found> {
        let Some(target) = &asked.target else { return Ok(Found::Hopeless("it has no target".into())) };
        let status = match self.nodes.migration(&asked.source, &asked.instance, &self.id).await {
            Ok(status) => status,
            Err(error) => return self.trouble(operation, &asked.source, &error).await,
        };
        match status.phase() {
            v1::MigrationPhase::Unspecified if self.begun => Ok(Found::Hopeless(
                "its node does not know of the transfer any more; was the agent or the guest restarted?"
                    .into(),
            )),
            v1::MigrationPhase::Unspecified => self.transfer(operation, asked, target, record, status).await,
            v1::MigrationPhase::Disks | v1::MigrationPhase::Memory => {
                self.begun = true;
                self.tell_progress(operation, &status).await
            }
            v1::MigrationPhase::HandedOver => self.hand_over(operation, asked, target, record, &status).await,
            v1::MigrationPhase::Failed => Ok(Found::Hopeless(status.message)),
        }
    }

    /// Has the target wait and the source begin.
    async fn transfer(
        &mut self,
        operation: &OperationRecord,
        asked: &Asked,
        target: &NodeId,
        record: &InstanceRecord,
        at_source: v1::AgentMigrationStatus,
    ) -> Result<Found> {
        let request = v1::AgentPrepareIncomingRequest {
            assignment: Some(convert::assignment_to(record)),
            migration_id: self.id.clone(),
            copy_storage: asked.copy_storage,
            driver: at_source.driver,
            image_digest: at_source.image_digest,
        };
        let incoming = match self.nodes.prepare_incoming(target, request).await {
            Ok(incoming) => incoming,
            Err(error) => return self.trouble(operation, target, &error).await,
        };
        if incoming.target.is_empty() {
            return self.tell_fetch(operation, target, &incoming).await;
        }
        if Phase::of(operation) == Phase::Preparing {
            let message =
                format!("node {} waits, node {} sends", self.hostname(target), self.hostname(&asked.source));
            let after = Phase::Transferring.enter(operation, message);
            // The transfer is begun in the next round, with what is true then.
            self.replace(operation, &after).await?;
            return Ok(Found::On(Step::Again));
        }
        let request = v1::AgentBeginMigrationRequest {
            instance_id: asked.instance.to_string(),
            epoch: asked.epoch.0,
            migration_id: self.id.clone(),
            target: incoming.target,
            copy_storage: asked.copy_storage,
            downtime_limit_ms: asked.downtime_limit_ms,
            bandwidth_limit: asked.bandwidth_limit,
        };
        match self.nodes.begin_migration(&asked.source, request).await {
            Ok(_) => {
                self.begun = true;
                Ok(Found::On(Step::Wait(POLL_CLOSE)))
            }
            Err(error) => self.trouble(operation, &asked.source, &error).await,
        }
    }

    /// Says how far the target is with the image that it fetches first.
    async fn tell_fetch(
        &mut self,
        operation: &OperationRecord,
        target: &NodeId,
        incoming: &v1::AgentPrepareIncomingResponse,
    ) -> Result<Found> {
        if self.written.is_none_or(|at| at.elapsed() >= PROGRESS_INTERVAL) {
            let message = format!("node {} fetches {}", self.hostname(target), incoming.progress);
            let mut after = Phase::of(operation).enter(operation, message);
            (after.done, after.total) = (incoming.done_bytes, incoming.total_bytes);
            self.replace(operation, &after).await?;
            self.written = Some(Instant::now());
        }
        Ok(Found::On(Step::Wait(POLL)))
    }

    async fn tell_progress(
        &mut self,
        operation: &OperationRecord,
        status: &v1::AgentMigrationStatus,
    ) -> Result<Found> {
        let what = if status.phase() == v1::MigrationPhase::Disks { "disks" } else { "memory" };
        let (done, total) = (status.done_bytes, status.total_bytes.max(status.done_bytes));
        if let Some(why) = self.standstill.look(status.phase(), done, Instant::now()) {
            return Ok(Found::Hopeless(why));
        }
        if self.written.is_none_or(|at| at.elapsed() >= PROGRESS_INTERVAL) {
            let mut after = Phase::Transferring.enter(operation, format!("sends {what}"));
            (after.done, after.total) = (done, total);
            self.replace(operation, &after).await?;
            self.written = Some(Instant::now());
        }
        let close = total > 0 && done >= total / 10 * 9;
        Ok(Found::On(Step::Wait(if close { POLL_CLOSE } else { POLL })))
    }

    /// Everything is at the target: makes sure that it is, and binds the instance there.
    async fn hand_over(
        &mut self,
        operation: &OperationRecord,
        asked: &Asked,
        target: &NodeId,
        record: &InstanceRecord,
        status: &v1::AgentMigrationStatus,
    ) -> Result<Found> {
        let since = *self.handed_over.get_or_insert_with(Instant::now);
        match self.nodes.migration(target, &asked.instance, &self.id).await {
            Ok(there) if there.phase() == v1::MigrationPhase::HandedOver => {}
            Ok(there) if there.phase() == v1::MigrationPhase::Memory => {
                // The source knows a moment earlier than the target that everything was sent; or its end got lost.
                if since.elapsed() <= HAND_OVER_PATIENCE {
                    return Ok(Found::On(Step::Wait(POLL_CLOSE)));
                }
                let (node, seconds) = (self.hostname(target), HAND_OVER_PATIENCE.as_secs());
                let why = format!("the end of what was sent did not reach node {node} within {seconds} s");
                return Ok(Found::Hopeless(why));
            }
            Ok(there) => {
                let why = if there.message.is_empty() { "it knows nothing of it" } else { &there.message };
                let node = self.hostname(target);
                return Ok(Found::Hopeless(format!("node {node} does not hold what was sent to it: {why}")));
            }
            Err(error) if since.elapsed() > HAND_OVER_PATIENCE => {
                let node = self.hostname(target);
                let seconds = HAND_OVER_PATIENCE.as_secs();
                return Ok(Found::Hopeless(format!(
                    "node {node} did not say within {seconds} s that it holds what was sent to it: {error}"
                )));
            }
            Err(error) => return self.trouble(operation, target, &error).await,
        }
        self.commit(operation, target, record, status).await.map(Found::On)
    }

    /// Binds the instance to the target: from this transaction on it is the target's, and before it the source's.
    async fn commit(
        &self,
        operation: &OperationRecord,
        target: &NodeId,
        record: &InstanceRecord,
        status: &v1::AgentMigrationStatus,
    ) -> Result<Step> {
        let known = self.cluster.cache.read(|state| {
            state.node(target).filter(|entry| entry.is_live()).and_then(|entry| entry.record.clone())
        });
        let Some(node) = known else { return Ok(Step::Again) };
        let after = InstanceRecord {
            binding: Some(Binding { node_id: target.clone(), release: false }),
            epoch: record.epoch.next(),
            state: InstanceState::Starting,
            state_reason: format!("handed over to node {}, which lets it go on", node.hostname),
            restart_count: 0,
            recovery_note: String::new(),
            ..record.clone()
        };
        let mut ended =
            Phase::Arriving.enter(operation, format!("handed over; node {} lets it go on", node.hostname));
        (ended.done, ended.total) = (status.done_bytes, status.done_bytes);
        if status.downtime_us > 0 {
            ended.parameters.insert(DOWNTIME.into(), status.downtime_us.to_string());
        }
        let (compare, op) = self.cluster.replace_instance(record, &after);
        let key = self.cluster.keys.operation(&self.id);
        let txn = Txn {
            compares: vec![
                self.leadership.guard(),
                self.cluster.unfrozen()?,
                Compare::ModRevision(key.clone(), operation.revision),
                compare,
                // A target that is being removed, or drained, refuses it.
                Compare::ModRevision(self.cluster.keys.node(target), node.revision),
            ],
            then: vec![Op::put(key, ended.encode()), op],
            ..Txn::default()
        };
        crash::reach(Point::MoveCommitBeforeTxn);
        if self.write(txn).await? {
            crash::reach(Point::MoveCommitAfterTxn);
            info!(operation = self.id, instance = %record.id, %target, "handed over");
            let message = format!("handed over to node {}", node.hostname);
            self.cluster.events.record(About::Instance(&after), "HandedOver", message, "operations");
        }
        Ok(Step::Again)
    }

    /// Writes that it is not to succeed any more, before anything is undone.
    async fn abort(&self, operation: &OperationRecord, outcome: OperationState, why: &str) -> Result<Step> {
        let mut after = Phase::Aborting.enter(operation, format!("being undone: {why}"));
        after.parameters.insert(OUTCOME.into(), outcome.name().into());
        after.parameters.insert(REASON.into(), why.to_owned());
        if self.replace(operation, &after).await? {
            crash::reach(Point::MoveAbortAfterTxn);
            info!(operation = self.id, why, "a move is being undone");
        }
        Ok(Step::Again)
    }

    /// Has the source let it go on, and the target forget it; then says so.
    async fn undo(
        &mut self,
        operation: &OperationRecord,
        record: Option<&InstanceRecord>,
        source_matters: bool,
    ) -> Result<Step> {
        let asked = Asked::of(operation)?;
        let why = operation.parameters.get(REASON).cloned().unwrap_or_default();
        if source_matters && !self.source_done {
            match self.nodes.abort_migration(&asked.source, &asked.instance, &self.id).await {
                Ok(()) => self.source_done = true,
                // Nothing of it is there that could go on or not.
                Err(error) if error.code() == hv_types::ErrorCode::NotFound => self.source_done = true,
                Err(error) => {
                    let node = self.hostname(&asked.source);
                    let message = format!(
                        "being undone: {why}; waits for node {node}, which alone can let the instance go on: {error}"
                    );
                    self.tell(operation, message).await?;
                    return Ok(Step::Wait(RETRY_PAUSE));
                }
            }
        }
        if let Some(target) = &asked.target
            && self.target_tries < TARGET_TRIES
            && self.cluster.cache.read(|state| state.node(target).is_some_and(|entry| entry.is_live()))
        {
            self.target_tries += 1;
            match self.nodes.abort_migration(target, &asked.instance, &self.id).await {
                Ok(()) => self.target_tries = TARGET_TRIES,
                Err(error) if error.code() == hv_types::ErrorCode::NotFound => {
                    self.target_tries = TARGET_TRIES;
                }
                Err(error) => {
                    warn!(operation = self.id, %target, %error, "a target did not forget what it waited for");
                    return Ok(Step::Wait(RETRY_PAUSE));
                }
            }
        }
        let outcome = match operation.parameters.get(OUTCOME).map(String::as_str) {
            Some("CANCELLED") => OperationState::Cancelled,
            _ => OperationState::Failed,
        };
        let message = match record {
            Some(_) if source_matters => {
                format!("{why}; it goes on at node {}", self.hostname(&asked.source))
            }
            _ => why,
        };
        self.end(operation, record, outcome, message).await
    }

    /// Ends the operation, and frees the instance of it.
    async fn end(
        &self,
        operation: &OperationRecord,
        record: Option<&InstanceRecord>,
        outcome: OperationState,
        message: String,
    ) -> Result<Step> {
        let now = SystemTime::now();
        let mut message = message;
        if outcome == OperationState::Succeeded
            && message == "it was moved"
            && let Ok(asked) = Asked::of(operation)
        {
            message = self.told(operation, &asked);
        }
        let mut after = OperationRecord {
            state: outcome,
            phase: "ended".into(),
            message,
            updated_at: now,
            finished_at: Some(now),
            ..operation.clone()
        };
        after.parameters.remove(OUTCOME);
        after.parameters.remove(REASON);
        let key = self.cluster.keys.operation(&self.id);
        let mut txn = Txn {
            compares: vec![
                self.leadership.guard(),
                self.cluster.unfrozen()?,
                Compare::ModRevision(key.clone(), operation.revision),
            ],
            then: vec![Op::put(key, after.encode())],
            ..Txn::default()
        };
        let its = record.filter(|r| r.migration.as_ref().is_some_and(|m| m.operation == self.id));
        let freed = its.map(|record| InstanceRecord { migration: None, ..record.clone() });
        if let (Some(record), Some(freed)) = (its, &freed) {
            let (compare, op) = self.cluster.replace_instance(record, freed);
            txn.compares.push(compare);
            txn.then.push(op);
        }
        if !self.write(txn).await? {
            return Ok(Step::Again);
        }
        if let Some(record) = freed.as_ref() {
            let (about, text) = (About::Instance(record), after.message.clone());
            match outcome {
                OperationState::Succeeded => {
                    self.cluster.events.record(about, "Migrated", text, "operations");
                }
                OperationState::Cancelled => {
                    self.cluster.events.record(about, "MigrationCancelled", text, "operations");
                }
                _ => self.cluster.events.warn(about, "MigrationFailed", text, "operations"),
            }
        }
        metrics::counter!("hypervisor_migrations_total", "outcome" => outcome.name()).increment(1);
        Ok(Step::Over)
    }

    /// What is said of a move that succeeded.
    fn told(&self, operation: &OperationRecord, asked: &Asked) -> String {
        let node = asked.target.as_ref().map(|target| self.hostname(target)).unwrap_or_default();
        let sent: Option<u64> = operation.parameters.get(DOWNTIME).and_then(|text| text.parse().ok());
        let mut text = format!("it was moved to node {node}");
        if let Some(sent) = sent {
            let ms = sent as f64 / 1000.0;
            text.push_str(&format!("; it stood still for {ms:.1} ms until everything was sent"));
        }
        if let Some(since) = self.handed_over {
            let ms = since.elapsed().as_millis();
            text.push_str(&format!(", and went on within {ms} ms of that"));
        }
        text
    }

    /// Says how it stands, not more often than progress.
    async fn tell(&mut self, operation: &OperationRecord, message: String) -> Result<()> {
        if operation.message == message || self.written.is_some_and(|at| at.elapsed() < PROGRESS_INTERVAL) {
            return Ok(());
        }
        let after = OperationRecord { message, updated_at: SystemTime::now(), ..operation.clone() };
        self.replace(operation, &after).await?;
        self.written = Some(Instant::now());
        Ok(())
    }

    /// Writes the operation alone; false if it has changed in between, or this server does not lead any more.
    async fn replace(&self, before: &OperationRecord, after: &OperationRecord) -> Result<bool> {
        let key = self.cluster.keys.operation(&self.id);
        let txn = Txn {
            compares: vec![
                self.leadership.guard(),
                self.cluster.unfrozen()?,
                Compare::ModRevision(key.clone(), before.revision),
            ],
            then: vec![Op::put(key, after.encode())],
            ..Txn::default()
        };
        self.write(txn).await
    }

    async fn write(&self, txn: Txn) -> Result<bool> {
        match self.cluster.store.txn(txn).await? {
            TxnOutcome::Committed(revision) => {
                self.cluster.cache.wait_for(revision).await?;
                Ok(true)
            }
            TxnOutcome::Refused(_) => {
                self.cluster.sync().await?;
                Ok(false)
            }
        }
    }
}
