//! Events.

use hv_types::{Event, Revision};

use super::common::{from_timestamp, to_timestamp};
use super::{RECORD_SCHEMA, RecordError, check_schema};
use crate::{store, v1};

/// An event as the API shows it.
#[must_use]
pub fn event_to(event: &Event) -> v1::Event {
    v1::Event {
        id: event.id.clone(),
        at: Some(to_timestamp(event.at)),
        object_kind: event.object_kind.clone(),
        object_id: event.object_id.clone(),
        object_name: event.object_name.clone(),
        reason: event.reason.clone(),
        message: event.message.clone(),
        warning: event.warning,
        source: event.source.clone(),
        request_id: event.request_id.clone(),
    }
}

/// An event as stored.
#[must_use]
pub fn event_to_record(event: &Event) -> store::EventRecord {
    store::EventRecord { schema: RECORD_SCHEMA, event: Some(event_to(event)) }
}

/// An event as read at `revision`.
///
/// # Errors
/// It was written by a newer release.
pub fn event_from_record(value: store::EventRecord, revision: Revision) -> Result<Event, RecordError> {
    check_schema(value.schema)?;
    let event = value.event.unwrap_or_default();
    Ok(Event {
        at: event.at.as_ref().map_or(std::time::UNIX_EPOCH, from_timestamp),
        id: event.id,
        object_kind: event.object_kind,
        object_id: event.object_id,
        object_name: event.object_name,
        reason: event.reason,
        message: event.message,
        warning: event.warning,
        source: event.source,
        request_id: event.request_id,
        revision,
    })
}
