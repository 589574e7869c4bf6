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
        actor: event.actor.clone(),
        revision: event.revision.0,
        r#type: v1::EventType::Unspecified.into(),
    }
}

/// Events as stored: those of a moment together, the first gives the key. `None` if there are none.
#[must_use]
pub fn events_to_record(events: &[Event]) -> Option<store::EventRecord> {
    let stored = |event: &Event| v1::Event { revision: 0, ..event_to(event) };
    let (first, more) = events.split_first()?;
    Some(store::EventRecord {
        schema: RECORD_SCHEMA,
        event: Some(stored(first)),
        more: more.iter().map(stored).collect(),
    })
}

/// Events as read at `revision`, in their order.
///
/// # Errors
/// They were written by a newer release.
pub fn events_from_record(value: store::EventRecord, revision: Revision) -> Result<Vec<Event>, RecordError> {
    check_schema(value.schema)?;
    Ok(value.event.into_iter().chain(value.more).map(|event| event_from(event, revision)).collect())
}

fn event_from(event: v1::Event, revision: Revision) -> Event {
    Event {
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
        actor: event.actor,
        revision,
    }
}
