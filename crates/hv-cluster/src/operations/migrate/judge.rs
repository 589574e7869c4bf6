//! What is to be done about a move: a pure function of the records, so that it can be looked at from all sides.

use std::time::{Duration, SystemTime};

use hv_types::node::Schedulability;
use hv_types::{InstanceRecord, InstanceState, OperationRecord, OperationState, Wanted};

use super::{Asked, Phase, movable};
use crate::cache::State;

/// What is to be done next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Act {
    /// Room is to be promised at the target.
    Reserve,
    /// The nodes are to be asked for the transfer.
    Forward,
    /// It is not to succeed any more: to be written before anything is undone.
    Abort(OperationState, String),
    /// What was begun is to be undone; whether the source must confirm it.
    Undo { source_matters: bool },
    /// It is bound to the target, which is about to let it go on.
    Await,
    /// There is nothing more to do.
    End(OperationState, String),
}

/// What is to be done now about `operation`, which its leader has worked on for so long.
pub(super) fn judge(state: &State, operation: &OperationRecord, worked: Duration, now: SystemTime) -> Act {
    use OperationState::{Cancelled, Failed};
    let asked = match Asked::of(operation) {
        Ok(asked) => asked,
        Err(invalid) => return Act::End(Failed, format!("its record cannot be read: {invalid}")),
    };
    let record = state.instance(&asked.instance);
    let late = asked.is_late(worked, now);
    let timeout = || format!("it was not done within {} s", asked.timeout.as_secs());
    match Phase::of(operation) {
        Phase::Waiting => match record {
            _ if operation.cancel_requested => Act::End(Cancelled, "cancelled before it began".into()),
            None => Act::End(Cancelled, "the instance was deleted".into()),
            Some(record) => match movable(state, record, asked.copy_storage) {
                Err(error) => Act::End(Failed, error.to_string()),
                Ok(_) if late => Act::End(Failed, timeout()),
                Ok(_) => Act::Reserve,
            },
        },
        Phase::Preparing | Phase::Transferring => {
            match obstacle(state, operation, &asked, record.map(AsRef::as_ref)) {
                Some((outcome, why)) => Act::Abort(outcome, why),
                None if late => Act::Abort(Failed, timeout()),
                None => Act::Forward,
            }
        }
        Phase::Aborting => {
            let there = record.is_some_and(|r| r.epoch == asked.epoch && r.node_id() == Some(&asked.source));
            Act::Undo { source_matters: there && state.node(&asked.source).is_some() }
        }
        Phase::Arriving => arrival(operation, &asked, record.map(AsRef::as_ref)),
    }
}

/// Why a move that is under way must not succeed any more.
fn obstacle(
    state: &State,
    operation: &OperationRecord,
    asked: &Asked,
    record: Option<&InstanceRecord>,
) -> Option<(OperationState, String)> {
    use OperationState::{Cancelled, Failed};
    let Some(record) = record else { return Some((Cancelled, "the instance was deleted".into())) };
    if record.wanted == Wanted::Deleted {
        return Some((Cancelled, "the instance is being deleted".into()));
    }
    if operation.cancel_requested {
        return Some((Cancelled, "it was cancelled".into()));
    }
    let failed = |why: String| Some((Failed, why));
    let its = record.migration.as_ref().is_some_and(|m| m.operation == operation.id);
    let bound = record.binding.as_ref().filter(|b| b.node_id == asked.source && record.epoch == asked.epoch);
    let Some(binding) = bound.filter(|_| its) else {
        return failed(format!("it was taken off its node meanwhile: {}", record.state_reason));
    };
    if binding.release || record.wanted != Wanted::Running {
        return failed("something else is wanted of it by now".into());
    }
    let node = |id| state.node(id).and_then(|entry| Some((entry, entry.record.as_ref()?)));
    match node(&asked.source) {
        None => return failed("the node that it was on was removed".into()),
        Some((entry, node)) if !entry.is_live() => {
            return failed(format!("node {}, which it is on, does not answer", node.hostname));
        }
        Some(_) => {}
    }
    match asked.target.as_ref().map(node) {
        None | Some(None) => failed("the node that it was to go to was removed".into()),
        Some(Some((entry, node))) if !entry.is_live() => {
            failed(format!("node {}, which it was to go to, does not answer", node.hostname))
        }
        Some(Some((_, node))) if node.schedulability == Schedulability::Draining => {
            failed(format!("node {}, which it was to go to, is being drained", node.hostname))
        }
        Some(Some(_)) => None,
    }
}

/// Whether an instance that is bound to its target goes on there.
fn arrival(operation: &OperationRecord, asked: &Asked, record: Option<&InstanceRecord>) -> Act {
    use OperationState::{Failed, Succeeded};
    let moved = |rest: &str| Act::End(Succeeded, format!("it was moved{rest}"));
    let Some(record) = record else { return moved(", and deleted since") };
    let its = record.migration.as_ref().is_some_and(|m| m.operation == operation.id);
    if !its || record.epoch != asked.epoch.next() || record.node_id() != asked.target.as_ref() {
        return moved(&format!(", and taken off its new node since: {}", record.state_reason));
    }
    if record.wanted == Wanted::Deleted {
        return moved(", and is being deleted");
    }
    match record.state {
        InstanceState::Failed => Act::End(
            Failed,
            format!("it was moved, but could not go on at its new node: {}", record.state_reason),
        ),
        state if state.is_settled() => moved(""),
        _ => Act::Await,
    }
}
