//! Moves of running instances to other nodes.
//!
//! # Theory of operation
//! The operation's record says which phase the move is in, and that record decides: the leader reads it, asks the two nodes
//! for what the phase needs ([`super::Nodes`]), and writes the next phase in a transaction that compares it.
//! 1. *waiting*: the placer chooses the target, or checks the one that was named, and reserves the room there: the
//!    instance's record names the target from then on, so that nothing else is asked of it.
//! 2. *preparing*, *transferring*: the target waits, the source sends. The source runs until everything is there, then
//!    stands still for good.
//! 3. *arriving*: one transaction has bound the instance to the target with the next epoch. The target lets it go on when
//!    it hears of that binding, and only then; the source is told to release what it has.
//! 4. *aborting* instead of 3: written before anything is undone. The source lets the instance go on, the target forgets it.
//!
//! # Invariants
//! - The commit (to *arriving*) and the abort (to *aborting*) compare the same revision of the operation: exactly one of them
//!   is ever written. Before either the target does not run; after the first the source never does, after the second the
//!   target never does. So at most one copy runs, and a leader that was deposed in between can do neither.
//! - Nothing is undone after the commit.
//! - The instance's room is promised on both nodes from the reservation to the commit or the end of the abort.
//!
//! # Failure and recovery
//! Every call to a node is idempotent and names the migration, so that the next leader goes on by asking again. A source that
//! does not answer while a move is being aborted is asked until it does, as only it can let the instance go on; its loss
//! ends that where failover, removal or deletion takes the instance off it. A target is not waited for: what it holds
//! never runs without a binding, and it is told to release it when it reports.

mod drive;
mod judge;
mod standstill;
mod tasks;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hv_proto::v1;
use hv_store::record::Record;
use hv_store::{Compare, Op};
use hv_types::{
    ErrorCode, InstanceId, InstanceRecord, InstanceState, InstanceType, Invalid, NodeId, NodeRecord,
    OperationKind, OperationRecord, OperationState, Revision, ServiceError, Wanted,
};

use super::shown;
use crate::Cluster;
use crate::cache::State;
use crate::error::{Error, Result};
use crate::requests::{Done, Mutation, Plan};

/// The leader's own note of the phase; what is shown may be overwritten by a cancellation.
const PHASE: &str = ".phase";
/// The node that the instance is on.
const SOURCE: &str = "source_node_id";
/// The node that it goes to, once chosen.
const TARGET: &str = "target_node_id";
/// The binding that is to end.
const EPOCH: &str = ".epoch";
/// How an aborted move ends.
const OUTCOME: &str = ".outcome";
/// Why it is aborted.
const REASON: &str = ".reason";
/// How long the instance stood still at the source until everything was sent, in microseconds.
const DOWNTIME: &str = "downtime_us";

/// When the move is given up, in milliseconds since 1970, whoever leads then. Releases before it was kept have none.
const DEADLINE: &str = ".deadline_ms";

/// How long an instance may stand still, where nobody says, in milliseconds.
const DEFAULT_DOWNTIME_MS: u32 = 300;
/// The longest that can be asked for.
const MAX_DOWNTIME_MS: u32 = 60_000;
/// How long a move may take where nobody says, in seconds.
const DEFAULT_TIMEOUT_SECONDS: u32 = 3600;
/// The longest that can be asked for: a week.
const MAX_TIMEOUT_SECONDS: u32 = 7 * 24 * 3600;

/// How an instance is moved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MigrateOptions {
    /// Where to; `None` is where the scheduler prefers.
    pub target: Option<NodeId>,
    /// Its disks are copied.
    pub copy_storage: bool,
    /// How long it may stand still.
    pub downtime_limit_ms: u32,
    /// Bytes per second; 0 is no bound.
    pub bandwidth_limit: u64,
    /// How long it may take before it is given up.
    pub timeout: Duration,
}

impl TryFrom<&v1::MigrateInstanceRequest> for MigrateOptions {
    type Error = Invalid;

    fn try_from(request: &v1::MigrateInstanceRequest) -> std::result::Result<Self, Invalid> {
        let within = |field, value: u32, usual: u32, most: u32| match value {
            0 => Ok(usual),
            value if value <= most => Ok(value),
            value => Err(Invalid::new(field, value, format!("must be at most {most}"))),
        };
        let target = Some(&request.target_node_id).filter(|id| !id.is_empty());
        let downtime = request.downtime_limit_ms;
        let seconds = request.timeout_seconds;
        Ok(Self {
            target: target.map(|id| id.parse()).transpose()?,
            copy_storage: request.copy_storage,
            downtime_limit_ms: within("downtime_limit_ms", downtime, DEFAULT_DOWNTIME_MS, MAX_DOWNTIME_MS)?,
            bandwidth_limit: request.bandwidth_limit,
            timeout: Duration::from_secs(
                within("timeout_seconds", seconds, DEFAULT_TIMEOUT_SECONDS, MAX_TIMEOUT_SECONDS)?.into(),
            ),
        })
    }
}

/// The phases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Waiting,
    Preparing,
    Transferring,
    Arriving,
    Aborting,
}

impl Phase {
    const ALL: [Self; 5] =
        [Self::Waiting, Self::Preparing, Self::Transferring, Self::Arriving, Self::Aborting];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Preparing => "preparing",
            Self::Transferring => "transferring",
            Self::Arriving => "arriving",
            Self::Aborting => "aborting",
        }
    }

    /// The phase that an operation is in. One that cannot be read is undone: nothing that was begun runs on unseen.
    pub(super) fn of(operation: &OperationRecord) -> Self {
        let noted = operation.parameters.get(PHASE).map(String::as_str);
        Self::ALL.into_iter().find(|phase| Some(phase.name()) == noted).unwrap_or(Self::Aborting)
    }

    /// The operation in this phase.
    fn enter(self, operation: &OperationRecord, message: String) -> OperationRecord {
        let mut after = OperationRecord {
            state: if operation.cancel_requested { operation.state } else { OperationState::Running },
            phase: self.name().into(),
            message,
            updated_at: SystemTime::now(),
            ..operation.clone()
        };
        after.parameters.insert(PHASE.into(), self.name().into());
        after
    }
}

/// What an operation was begun with.
#[derive(Debug)]
struct Asked {
    instance: InstanceId,
    source: NodeId,
    target: Option<NodeId>,
    epoch: hv_types::Epoch,
    copy_storage: bool,
    downtime_limit_ms: u32,
    bandwidth_limit: u64,
    timeout: Duration,
    deadline: Option<SystemTime>,
}

impl Asked {
    fn of(operation: &OperationRecord) -> std::result::Result<Self, Invalid> {
        let text = |name: &str| operation.parameters.get(name).map(String::as_str).unwrap_or_default();
        let number = |name: &'static str| {
            let bad = |_| Invalid::new(name, text(name), "must be a number");
            if text(name).is_empty() { Ok(0) } else { text(name).parse::<u64>().map_err(bad) }
        };
        let target = Some(text(TARGET)).filter(|id| !id.is_empty());
        Ok(Self {
            instance: operation.object_id.parse()?,
            source: text(SOURCE).parse()?,
            target: target.map(str::parse).transpose()?,
            epoch: hv_types::Epoch(number(EPOCH)?),
            copy_storage: text("copy_storage") == "true",
            downtime_limit_ms: u32::try_from(number("downtime_limit_ms")?).unwrap_or(MAX_DOWNTIME_MS),
            bandwidth_limit: number("bandwidth_limit")?,
            timeout: Duration::from_secs(number("timeout_seconds")?),
            deadline: Some(number(DEADLINE)?)
                .filter(|deadline| *deadline > 0)
                .and_then(|deadline| SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(deadline))),
        })
    }

    /// Whether it is to be given up: its deadline is over, or this leader alone has worked on it for so long, whatever
    /// the clocks of machines say.
    fn is_late(&self, worked: Duration, now: SystemTime) -> bool {
        worked > self.timeout || self.deadline.is_some_and(|deadline| now > deadline)
    }
}

/// Refuses what cannot be asked of an instance that is being moved.
///
/// # Errors
/// It is being moved.
pub(crate) fn refuse_while_migrating(record: &InstanceRecord, what: &str) -> Result<()> {
    let Some(migration) = &record.migration else { return Ok(()) };
    Err(Error::precondition(format!(
        "instance {} cannot be asked to {what}: it is being moved to node {} while it runs; wait for operation {}, or give it \
         up with `hypervisor-ctl operation cancel {}`",
        record.name, migration.target, migration.operation, migration.operation
    )))
}

/// Why a move cannot be cancelled any more, if so.
pub(super) fn refuses_cancel(operation: &OperationRecord) -> Option<String> {
    let arriving =
        operation.kind == OperationKind::MigrateInstance && Phase::of(operation) == Phase::Arriving;
    arriving.then(|| {
        format!(
            "operation {} cannot be cancelled any more: the instance was handed over, and goes on at its new node",
            operation.id
        )
    })
}

fn capability(copy_storage: bool) -> &'static str {
    if copy_storage { "migrate_storage" } else { "migrate" }
}

/// The healthy drivers of a node that can move instances of a type, by name.
fn movers(node: &NodeRecord, t: InstanceType, copy_storage: bool) -> impl Iterator<Item = &str> {
    let wanted = capability(copy_storage);
    let able = move |driver: &&hv_types::DriverInfo| {
        driver.instance_type == t && driver.healthy && driver.capabilities.iter().any(|c| c == wanted)
    };
    node.drivers.iter().filter(able).map(|driver| driver.name.as_str())
}

/// Why a node cannot take an instance from another, if so. Room and rules are the scheduler's.
pub(crate) fn unfit(
    source: &NodeRecord,
    target: &NodeRecord,
    t: InstanceType,
    copy_storage: bool,
) -> Option<String> {
    if source.id == target.id {
        return Some(format!("it is on node {} already", target.hostname));
    }
    let shared = movers(source, t, copy_storage)
        .any(|driver| movers(target, t, copy_storage).any(|other| other == driver));
    (!shared).then(|| {
        format!(
            "node {} has no healthy driver that {} has too and that can do `{}`; see `hypervisor-ctl node describe`",
            target.hostname,
            source.hostname,
            capability(copy_storage)
        )
    })
}

/// Whether an instance can be moved now, whatever its target: the node that it is on.
///
/// # Errors
/// It cannot, and why.
pub(crate) fn movable(state: &State, record: &InstanceRecord, copy_storage: bool) -> Result<Arc<NodeRecord>> {
    let refuse =
        |why: String| Error::precondition(format!("instance {} cannot be moved: {why}", record.name));
    refuse_while_migrating(record, "move")?;
    crate::instances::refuse_in_rescue(record, "move")?;
    let settled = record.observed_generation >= record.generation;
    let shown = state.shown_state(record);
    if record.wanted != Wanted::Running || shown != InstanceState::Running || !settled {
        let what = if settled { "it is" } else { "what was asked of it is not done yet, and it is" };
        return Err(refuse(format!("only a running instance can, and {what} {shown}")));
    }
    if !record.spec.devices.is_empty() {
        return Err(refuse("it has devices of its node for itself, and they cannot move with it".into()));
    }
    if let Some(node) = &record.placement.preferred_node {
        return Err(refuse(format!("it may only run on node {node}")));
    }
    let binding = record.binding.as_ref().filter(|binding| !binding.release);
    let entry = binding.and_then(|binding| state.node(&binding.node_id));
    let source = entry.filter(|entry| entry.is_live()).and_then(|entry| entry.record.clone());
    let source = source.ok_or_else(|| refuse("its node does not answer, or is to give it up".into()))?;
    if movers(&source, record.instance_type, copy_storage).next().is_none() {
        let drivers: Vec<_> =
            source.drivers.iter().filter(|d| d.instance_type == record.instance_type).collect();
        let names: Vec<_> = drivers.iter().map(|driver| driver.name.as_str()).collect();
        let other = capability(!copy_storage);
        let hint = if drivers.iter().any(|d| d.capabilities.iter().any(|c| c == other)) {
            if copy_storage { "; without --copy-storage it can" } else { "; with --copy-storage it can" }
        } else {
            ""
        };
        let message = format!(
            "instance {} cannot be moved: {} on node {} cannot do `{}`{hint}",
            record.name,
            if names.is_empty() { "its driver".to_owned() } else { names.join(", ") },
            source.hostname,
            capability(copy_storage)
        );
        return Err(ServiceError::new(ErrorCode::Unsupported, message).into());
    }
    Ok(source)
}

impl Cluster {
    /// Begins to move a running instance to another node. The answer is the operation that does it.
    ///
    /// # Errors
    /// There is no such instance or node, or it cannot be moved, and why.
    pub async fn migrate_instance(
        &self,
        mutation: &Mutation,
        id: &InstanceId,
        options: &MigrateOptions,
    ) -> Result<Done<v1::Operation>> {
        let fresh = uuid::Uuid::now_v7().to_string();
        let mut done = self
            .mutate(mutation, &format!("instance {id}"), || {
                self.cache.read(|state| self.plan_migration(state, &fresh, id, options))
            })
            .await?;
        if done.reply.revision == 0 {
            done.reply.revision = done.revision.0;
        }
        self.cache.wait_for(done.revision).await?;
        Ok(done)
    }

    fn plan_migration(
        &self,
        state: &State,
        fresh: &str,
        id: &InstanceId,
        options: &MigrateOptions,
    ) -> Result<Plan<v1::Operation>> {
        let record = state.instance(id).ok_or_else(|| Error::no_instance(id))?;
        let source = movable(state, record, options.copy_storage)?;
        let same = |operation: &&Arc<OperationRecord>| {
            !operation.state.is_final()
                && operation.kind == OperationKind::MigrateInstance
                && operation.object_id == id.as_str()
        };
        if let Some(other) = state.operations_before(None).find(same) {
            let message = format!("instance {} is about to be moved by operation {}", record.name, other.id);
            return Err(Error::precondition(message));
        }
        if let Some(target) = &options.target {
            let entry = state.node(target).ok_or_else(|| Error::no_node(target))?;
            let node = entry.record.as_ref().ok_or_else(|| Error::no_node(target))?;
            let dead = (!entry.is_live()).then(|| format!("node {} does not answer", node.hostname));
            if let Some(why) =
                dead.or_else(|| unfit(&source, node, record.instance_type, options.copy_storage))
            {
                let name = &record.name;
                return Err(Error::precondition(format!("instance {name} cannot be moved there: {why}")));
            }
        }
        let operation = begun(fresh, record, &source, options);
        let (instance, key) = (self.keys.instance(id), self.keys.operation(&operation.id));
        Ok(Plan {
            compares: vec![Compare::ModRevision(instance, record.revision), Compare::Absent(key.clone())],
            then: vec![Op::put(key, operation.encode())],
            reply: shown(&operation),
        })
    }
}

fn begun(
    id: &str,
    record: &InstanceRecord,
    source: &NodeRecord,
    options: &MigrateOptions,
) -> OperationRecord {
    let now = SystemTime::now();
    let mut parameters = BTreeMap::from([
        (PHASE.to_owned(), Phase::Waiting.name().to_owned()),
        (SOURCE.to_owned(), source.id.to_string()),
        (EPOCH.to_owned(), record.epoch.0.to_string()),
        ("copy_storage".to_owned(), options.copy_storage.to_string()),
        ("downtime_limit_ms".to_owned(), options.downtime_limit_ms.to_string()),
        ("bandwidth_limit".to_owned(), options.bandwidth_limit.to_string()),
        ("timeout_seconds".to_owned(), options.timeout.as_secs().to_string()),
    ]);
    if let Some(target) = &options.target {
        parameters.insert(TARGET.to_owned(), target.to_string());
    }
    if let Ok(since) = now.duration_since(SystemTime::UNIX_EPOCH) {
        parameters.insert(DEADLINE.to_owned(), (since + options.timeout).as_millis().to_string());
    }
    OperationRecord {
        id: id.to_owned(),
        kind: OperationKind::MigrateInstance,
        object_kind: "instance".into(),
        object_id: record.id.to_string(),
        object_name: record.name.clone(),
        state: OperationState::Pending,
        phase: Phase::Waiting.name().into(),
        message: "waits for the leader to choose a node".into(),
        done: 0,
        total: 0,
        blockers: Vec::new(),
        parameters,
        cancel_requested: false,
        created_at: now,
        updated_at: now,
        finished_at: None,
        actor: String::new(),
        request_id: hv_telemetry::RequestId::current().map(|id| id.as_str().to_owned()).unwrap_or_default(),
        revision: Revision::default(),
    }
}

/// The two records of a move once room is promised at its target.
pub(crate) fn reserved(
    operation: &OperationRecord,
    record: &InstanceRecord,
    source: &NodeRecord,
    target: &NodeRecord,
) -> (OperationRecord, InstanceRecord) {
    let message = format!("moves from node {} to node {}", source.hostname, target.hostname);
    let mut operation = Phase::Preparing.enter(operation, message);
    operation.parameters.insert(SOURCE.into(), source.id.to_string());
    operation.parameters.insert(TARGET.into(), target.id.to_string());
    operation.parameters.insert(EPOCH.into(), record.epoch.0.to_string());
    let migration =
        hv_types::instance::Migration { target: target.id.clone(), operation: operation.id.clone() };
    let record = InstanceRecord { migration: Some(Box::new(migration)), ..record.clone() };
    (operation, record)
}

/// What the placer must know to reserve room for an operation: `None` if it is not waiting for that any more.
pub(crate) fn wants_room(state: &State, id: &str) -> Option<(Arc<OperationRecord>, Option<NodeId>, bool)> {
    let operation = state.operation(id)?;
    let waits = !operation.state.is_final()
        && !operation.cancel_requested
        && operation.kind == OperationKind::MigrateInstance
        && Phase::of(operation) == Phase::Waiting;
    let asked = Asked::of(operation).ok().filter(|_| waits)?;
    Some((operation.clone(), asked.target, asked.copy_storage))
}
