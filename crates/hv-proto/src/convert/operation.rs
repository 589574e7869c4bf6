//! Operations.

use hv_types::operation::{Blocker, OperationRecord, OperationState};
use hv_types::{Invalid, Revision};

use super::common::{from_timestamp, to_timestamp};
use super::{RECORD_SCHEMA, RecordError, check_schema};
use crate::{store, v1};

/// A state as the wire carries it.
#[must_use]
pub fn operation_state_to(state: OperationState) -> v1::OperationState {
    match state {
        OperationState::Pending => v1::OperationState::Pending,
        OperationState::Running => v1::OperationState::Running,
        OperationState::Cancelling => v1::OperationState::Cancelling,
        OperationState::Succeeded => v1::OperationState::Succeeded,
        OperationState::Failed => v1::OperationState::Failed,
        OperationState::Cancelled => v1::OperationState::Cancelled,
    }
}

/// A state from the wire; `None` where it is not said.
///
/// # Errors
/// The number stands for no state.
pub fn operation_state_from(value: i32) -> Result<Option<OperationState>, Invalid> {
    if value == 0 {
        return Ok(None);
    }
    OperationState::ALL
        .into_iter()
        .find(|state| operation_state_to(*state) as i32 == value)
        .map(Some)
        .ok_or_else(|| Invalid::new("state", value, "must be the number of an OperationState"))
}

/// An operation as the API shows it.
#[must_use]
pub fn operation_to(record: &OperationRecord) -> v1::Operation {
    let blocker = |blocker: &Blocker| v1::OperationBlocker {
        object_id: blocker.object_id.clone(),
        object_name: blocker.object_name.clone(),
        reason: blocker.reason.clone(),
    };
    v1::Operation {
        id: record.id.clone(),
        kind: record.kind.name().to_owned(),
        object_kind: record.object_kind.clone(),
        object_id: record.object_id.clone(),
        object_name: record.object_name.clone(),
        state: operation_state_to(record.state).into(),
        phase: record.phase.clone(),
        message: record.message.clone(),
        done: record.done,
        total: record.total,
        created_at: Some(to_timestamp(record.created_at)),
        updated_at: Some(to_timestamp(record.updated_at)),
        finished_at: record.finished_at.map(to_timestamp),
        actor: record.actor.clone(),
        request_id: record.request_id.clone(),
        revision: record.revision.0,
        parameters: record.parameters.clone().into_iter().collect(),
        blockers: record.blockers.iter().map(blocker).collect(),
    }
}

/// An operation as stored.
#[must_use]
pub fn operation_to_record(record: &OperationRecord) -> store::OperationRecord {
    store::OperationRecord {
        schema: RECORD_SCHEMA,
        operation: Some(v1::Operation { revision: 0, ..operation_to(record) }),
        cancel_requested: record.cancel_requested,
    }
}

/// An operation as read at `revision`.
///
/// # Errors
/// It was written by a newer release, or contradicts itself.
pub fn operation_from_record(
    value: store::OperationRecord,
    revision: Revision,
) -> Result<OperationRecord, RecordError> {
    check_schema(value.schema)?;
    let operation = value.operation.unwrap_or_default();
    let blocker = |blocker: v1::OperationBlocker| Blocker {
        object_id: blocker.object_id,
        object_name: blocker.object_name,
        reason: blocker.reason,
    };
    Ok(OperationRecord {
        kind: operation.kind.parse()?,
        state: operation_state_from(operation.state)?
            .ok_or_else(|| Invalid::new("state", operation.state, "must be set"))?,
        id: operation.id,
        object_kind: operation.object_kind,
        object_id: operation.object_id,
        object_name: operation.object_name,
        phase: operation.phase,
        message: operation.message,
        done: operation.done,
        total: operation.total,
        blockers: operation.blockers.into_iter().map(blocker).collect(),
        parameters: operation.parameters.into_iter().collect(),
        cancel_requested: value.cancel_requested,
        created_at: operation.created_at.as_ref().map_or(std::time::UNIX_EPOCH, from_timestamp),
        updated_at: operation.updated_at.as_ref().map_or(std::time::UNIX_EPOCH, from_timestamp),
        finished_at: operation.finished_at.as_ref().map(from_timestamp),
        actor: operation.actor,
        request_id: operation.request_id,
        revision,
    })
}
