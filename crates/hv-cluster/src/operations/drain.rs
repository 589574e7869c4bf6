//! A drain, step by step: a pure function from the records to the next step.
//!
//! # Theory of operation
//! The operation remembers which instances it has told to leave and has not yet seen settled elsewhere. While these are
//! fewer than may be on the move at once, more are told, in the same transaction that notes them down. An instance has
//! settled once it runs elsewhere (or failed there, or stands still), once it was to be stopped and no node has it, or
//! once it is gone.
//!
//! # Invariants
//! At most `max_parallel` instances of the node are on the move, whatever dies in between: who is on the move is read from
//! the operation and the instances' records, never from a leader's memory.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::SystemTime;

use hv_types::node::Schedulability;
use hv_types::operation::{Blocker, MAX_BLOCKERS};
use hv_types::{
    InstanceId, InstanceRecord, NodeRecord, OperationKind, OperationRecord, OperationState, Revision, Wanted,
};

use crate::cache::{NodeEntry, State};
use crate::nodes::{DrainOptions, keeps};

/// What the node was before: to what it goes back if the drain is cancelled.
const BEFORE: &str = ".before";
/// The instances on the move, their ids with spaces between.
const MOVING: &str = ".moving";
/// Most instances told to leave in one step.
const BATCH: usize = 60;

/// A drain that begins.
pub(crate) fn begun(
    node: &NodeRecord,
    last: Option<&OperationRecord>,
    options: DrainOptions,
    count: usize,
) -> OperationRecord {
    let now = SystemTime::now();
    let before = match node.schedulability {
        Schedulability::Open => "open".to_owned(),
        Schedulability::Cordoned => "cordoned".to_owned(),
        // The last one has not been undone yet.
        Schedulability::Draining => {
            last.and_then(|last| last.parameters.get(BEFORE).cloned()).unwrap_or_else(|| "open".to_owned())
        }
    };
    let mut operation = OperationRecord {
        id: uuid::Uuid::now_v7().to_string(),
        kind: OperationKind::DrainNode,
        object_kind: "node".into(),
        object_id: node.id.to_string(),
        object_name: node.hostname.clone(),
        state: OperationState::Pending,
        phase: "waiting".into(),
        message: "waits for the leader".into(),
        done: 0,
        total: count as u64,
        blockers: Vec::new(),
        parameters: BTreeMap::from([(BEFORE.to_owned(), before)]),
        cancel_requested: false,
        created_at: now,
        updated_at: now,
        finished_at: None,
        actor: String::new(),
        request_id: hv_telemetry::RequestId::current().map(|id| id.as_str().to_owned()).unwrap_or_default(),
        revision: Revision::default(),
    };
    set_options(&mut operation, options);
    operation
}

fn set_options(operation: &mut OperationRecord, options: DrainOptions) {
    let parallel = options.max_parallel.to_string();
    operation.parameters.insert("max_parallel".into(), parallel);
    operation.parameters.insert("discard_local_disks".into(), options.discard_disks.to_string());
}

/// A drain that goes on with other options.
pub(crate) fn with_options(operation: &OperationRecord, options: DrainOptions) -> OperationRecord {
    let mut after = operation.clone();
    set_options(&mut after, options);
    after.updated_at = SystemTime::now();
    after
}

/// A drain that ends as the operator wants something else of the node.
pub(crate) fn given_up(operation: &OperationRecord, wanted: Schedulability) -> OperationRecord {
    let what = match wanted {
        Schedulability::Open => "uncordoned",
        Schedulability::Cordoned | Schedulability::Draining => "cordoned",
    };
    let message = format!("the node was {what}; what was told to leave still leaves");
    ended(operation, OperationState::Cancelled, message, SystemTime::now())
}

fn ended(
    operation: &OperationRecord,
    state: OperationState,
    message: String,
    now: SystemTime,
) -> OperationRecord {
    let mut after = OperationRecord {
        state,
        phase: "ended".into(),
        message,
        blockers: Vec::new(),
        updated_at: now,
        finished_at: Some(now),
        ..operation.clone()
    };
    after.parameters.remove(MOVING);
    after
}

/// What is to be written next.
pub(super) struct Step {
    /// The operation as it then is; unchanged where there is nothing to write.
    pub(super) operation: OperationRecord,
    /// The node, where it changes.
    pub(super) node: Option<NodeRecord>,
    /// The instances that are told to leave, before and after.
    pub(super) released: Vec<(Arc<InstanceRecord>, InstanceRecord)>,
}

impl Step {
    fn only(operation: OperationRecord) -> Self {
        Self { operation, node: None, released: Vec::new() }
    }

    /// Whether it must be written at once: it does something, or says something else than how far it is.
    pub(super) fn is_pressing(&self, before: &OperationRecord) -> bool {
        self.node.is_some()
            || !self.released.is_empty()
            || self.operation.state != before.state
            || self.operation.phase != before.phase
    }
}

/// The next step of a drain.
pub(super) fn step(state: &State, operation: &OperationRecord, now: SystemTime) -> Step {
    let entry = operation.object_id.parse().ok().and_then(|id| state.node(&id));
    let Some((entry, node)) = entry.and_then(|entry| entry.record.as_ref().map(|node| (entry, node))) else {
        let message = "the node was removed".to_owned();
        return Step::only(ended(operation, OperationState::Succeeded, message, now));
    };
    let is_its = node.drain_operation_id == operation.id && node.schedulability == Schedulability::Draining;
    if operation.cancel_requested {
        let message = "cancelled; what was told to leave still leaves, the rest stays".to_owned();
        let mut step = Step::only(ended(operation, OperationState::Cancelled, message, now));
        step.node = is_its.then(|| {
            let before = operation.parameters.get(BEFORE).map(String::as_str);
            let schedulability =
                if before == Some("cordoned") { Schedulability::Cordoned } else { Schedulability::Open };
            NodeRecord { schedulability, drain_discards_disks: false, ..NodeRecord::clone(node) }
        });
        return step;
    }
    if !is_its {
        let message = "the operator wants something else of the node".to_owned();
        return Step::only(ended(operation, OperationState::Cancelled, message, now));
    }
    forward(state, entry, node, operation, now)
}

/// Who is on the move.
#[derive(Default)]
struct Moves {
    /// Told to leave and not yet settled.
    moving: BTreeSet<InstanceId>,
    /// Moved since the last step.
    settled: u64,
    /// On the move, and why it does not go on.
    stuck: Vec<Blocker>,
}

fn moves(state: &State, node: &NodeRecord, live: bool, operation: &OperationRecord) -> Moves {
    let mut moves = Moves::default();
    let noted = operation.parameters.get(MOVING).map(String::as_str).unwrap_or_default();
    let noted = noted.split(' ').filter_map(|id| id.parse::<InstanceId>().ok());
    let leaving = state.instances_on(&node.id).filter(|record| is_leaving(record)).map(|r| r.id.clone());
    for id in noted.chain(leaving).collect::<BTreeSet<_>>() {
        let Some(record) = state.instance(&id) else {
            moves.settled += 1;
            continue;
        };
        match &record.binding {
            Some(binding) if binding.node_id == node.id => {
                // Where it came back here it is one of those that are still to be moved.
                if binding.release {
                    if !live {
                        let reason = "it was told to leave, but its node does not answer; it moves once the node is back";
                        moves.stuck.push(blocker(record, reason.into()));
                    }
                    moves.moving.insert(id);
                }
            }
            Some(_) if record.state.is_settled() => moves.settled += 1,
            Some(_) => {
                moves.moving.insert(id);
            }
            None if matches!(record.wanted, Wanted::Stopped | Wanted::Deleted) => moves.settled += 1,
            None => {
                if !record.state_reason.starts_with("moved off node") {
                    let reason = format!("it has left and waits for a node: {}", record.state_reason);
                    moves.stuck.push(blocker(record, reason));
                }
                moves.moving.insert(id);
            }
        }
    }
    moves
}

fn is_leaving(record: &InstanceRecord) -> bool {
    record.binding.as_ref().is_some_and(|binding| binding.release)
}

fn blocker(record: &InstanceRecord, reason: String) -> Blocker {
    Blocker { object_id: record.id.to_string(), object_name: record.name.clone(), reason }
}

fn forward(
    state: &State,
    entry: &NodeEntry,
    node: &NodeRecord,
    operation: &OperationRecord,
    now: SystemTime,
) -> Step {
    let live = entry.is_live();
    let mut moves = moves(state, node, live, operation);
    let room = (node.drain_max_parallel as usize).saturating_sub(moves.moving.len()).min(BATCH);
    let mut released = Vec::new();
    let mut blockers = std::mem::take(&mut moves.stuck);
    let stuck = blockers.len();
    // What is being moved here is given up, now that the node is being emptied.
    let (mut here, mut staying) = (entry.incoming.len() as u64, stuck);
    for record in state.instances_on(&node.id).filter(|record| !is_leaving(record)) {
        here += 1;
        // What is being moved already leaves, or arrives, by itself: it is looked at again then.
        if record.wanted == Wanted::Deleted || record.migration.is_some() {
            continue;
        }
        match keeps(record, node, live) {
            Some(reason) => {
                staying += 1;
                if blockers.len() < MAX_BLOCKERS {
                    blockers.push(blocker(record, reason));
                }
            }
            None if released.len() < room => released.push((record.clone(), released_from(record, node))),
            None => {}
        }
    }
    blockers.truncate(MAX_BLOCKERS);
    let goes_on = !released.is_empty() || moves.moving.len() > stuck;
    let on_the_way = moves.moving.len() as u64;
    moves.moving.extend(released.iter().map(|(record, _)| record.id.clone()));
    let done = operation.done + moves.settled;
    let total = done + on_the_way + here;
    if on_the_way + here == 0 {
        let message = format!("{done} moved; nothing is left on the node, which stays cordoned");
        let mut operation = ended(operation, OperationState::Succeeded, message, now);
        (operation.done, operation.total) = (done, done);
        let node = NodeRecord {
            schedulability: Schedulability::Cordoned,
            drain_discards_disks: false,
            ..node.clone()
        };
        return Step { operation, node: Some(node), released: Vec::new() };
    }
    let message = match (staying, blockers.first()) {
        (0, _) | (_, None) => format!("{done} of {total} moved"),
        (count, Some(first)) => {
            let name = &first.object_name;
            let plural = if count == 1 { "stays" } else { "stay" };
            format!("{done} of {total} moved; {count} {plural}: {name}: {}", first.reason)
        }
    };
    let mut after = OperationRecord {
        state: OperationState::Running,
        phase: if staying > 0 && !goes_on { "blocked" } else { "moving" }.into(),
        message,
        done,
        total,
        blockers,
        ..operation.clone()
    };
    let ids: Vec<_> = moves.moving.iter().map(InstanceId::as_str).collect();
    if ids.is_empty() {
        after.parameters.remove(MOVING);
    } else {
        after.parameters.insert(MOVING.into(), ids.join(" "));
    }
    if after != *operation {
        after.updated_at = now;
    }
    Step { operation: after, node: None, released }
}

/// The record of an instance that its node is to give up.
fn released_from(record: &InstanceRecord, node: &NodeRecord) -> InstanceRecord {
    let mut after = InstanceRecord::clone(record);
    if let Some(binding) = &mut after.binding {
        binding.release = true;
    }
    // A node takes only an order that is newer than the one it has.
    after.generation += 1;
    after.state_reason = format!("moves off node {}, which is being drained", node.hostname);
    after
}

/// The instances whose changes a drain waits for beside those on its node.
pub(super) fn waits_for(operation: &OperationRecord) -> impl Iterator<Item = InstanceId> + '_ {
    let noted = operation.parameters.get(MOVING).map(String::as_str).unwrap_or_default();
    noted.split(' ').filter_map(|id| id.parse().ok())
}
