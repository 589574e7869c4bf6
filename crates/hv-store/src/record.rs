//! Records as values: the only place that turns domain values into bytes of the store and back.
//!
//! # Schemas
//! Each record says which schema it was written with ([`RECORD_SCHEMA`]). A server reads its own and all older ones; a
//! higher one is [`StoreError::NewerSchema`], never a guess. Two kinds of change keep servers of neighbouring releases
//! able to work on one store:
//!
//! - *A field that may be lost.* It is added without raising the schema. A server that does not know it drops it when it
//!   writes the record, since unknown fields do not survive decoding. So only what is derived, or asked for anew each
//!   time, may be added like this.
//! - *Anything else* takes two releases: the first knows how to read the new schema and still writes the old one, the
//!   second writes it. In a cluster that moves by one release at a time every server then knows every field of every
//!   record, while it upgrades and if it goes back.
//!
//! Fields are never renumbered or reused, and what is missing means what the release before meant.

use bytes::Bytes;
use hv_proto::convert;
pub use hv_proto::convert::RECORD_SCHEMA;
use hv_types::{Event, InstanceRecord, NodeRecord, OperationRecord};
use prost::Message;

use crate::{KeyValue, Result, StoreError};

/// A domain value that the store holds.
pub trait Record: Sized {
    /// The value's bytes.
    fn encode(&self) -> Bytes;

    /// The value that a key holds.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] if it cannot be read, [`StoreError::NewerSchema`] if a newer release wrote it.
    fn decode(kv: &KeyValue) -> Result<Self>;
}

/// A message that a key holds.
///
/// # Errors
/// [`StoreError::Corrupt`] if it is not one of its kind.
pub fn decode_message<M: Message + Default>(kv: &KeyValue) -> Result<M> {
    M::decode(kv.value.clone()).map_err(|cause| corrupt(kv, cause.into()))
}

/// A message's bytes.
pub fn encode_message<M: Message>(message: &M) -> Bytes {
    message.encode_to_vec().into()
}

fn corrupt(kv: &KeyValue, source: convert::RecordError) -> StoreError {
    let key = String::from_utf8_lossy(&kv.key).into_owned();
    match source {
        convert::RecordError::Newer { found } => StoreError::NewerSchema { key, found, known: RECORD_SCHEMA },
        source => StoreError::Corrupt { key, source: Box::new(source) },
    }
}

macro_rules! record {
    ($type:ty, $to:path, $from:path) => {
        impl Record for $type {
            fn encode(&self) -> Bytes {
                encode_message(&$to(self))
            }

            fn decode(kv: &KeyValue) -> Result<Self> {
                $from(decode_message(kv)?, kv.mod_revision).map_err(|cause| corrupt(kv, cause))
            }
        }
    };
}

record!(InstanceRecord, convert::instance_to_record, convert::instance_from_record);
record!(NodeRecord, convert::node_to_record, convert::node_from_record);
record!(OperationRecord, convert::operation_to_record, convert::operation_from_record);

/// The value that holds the events of a moment together; `None` if there are none.
#[must_use]
pub fn encode_events(events: &[Event]) -> Option<Bytes> {
    convert::events_to_record(events).map(|record| encode_message(&record))
}

/// The events that a key holds, in their order.
///
/// # Errors
/// [`StoreError::Corrupt`] if they cannot be read, [`StoreError::NewerSchema`] if a newer release wrote them.
pub fn decode_events(kv: &KeyValue) -> Result<Vec<Event>> {
    convert::events_from_record(decode_message(kv)?, kv.mod_revision).map_err(|cause| corrupt(kv, cause))
}

#[cfg(test)]
mod tests {
    use hv_proto::store;
    use hv_types::{OperationKind, OperationState};

    use super::*;
    use crate::Revision;

    fn kv(value: Bytes) -> KeyValue {
        let revision = Revision(7);
        KeyValue {
            key: "/x/operations/o1".into(),
            value,
            create_revision: revision,
            mod_revision: revision,
            version: 1,
            lease: None,
        }
    }

    fn stored(schema: u32) -> store::OperationRecord {
        let operation = hv_proto::v1::Operation {
            id: "o1".into(),
            kind: OperationKind::DrainNode.name().into(),
            state: convert::operation_state_to(OperationState::Running).into(),
            ..Default::default()
        };
        store::OperationRecord { schema, operation: Some(operation), cancel_requested: true }
    }

    #[test]
    fn this_schema_and_older_ones_are_read_and_newer_ones_refused_by_name() {
        for schema in 0..=RECORD_SCHEMA {
            let read = OperationRecord::decode(&kv(encode_message(&stored(schema)))).unwrap();
            assert!(read.cancel_requested, "schema {schema}");
        }
        let refused = OperationRecord::decode(&kv(encode_message(&stored(RECORD_SCHEMA + 1)))).unwrap_err();
        let StoreError::NewerSchema { key, found, known } = &refused else { panic!("{refused:?}") };
        assert_eq!((key.as_str(), *found, *known), ("/x/operations/o1", RECORD_SCHEMA + 1, RECORD_SCHEMA));
        assert!(!refused.retryable());
    }

    /// The fact that the rules of the module rest on.
    #[test]
    fn a_field_that_this_release_does_not_know_is_read_over_and_lost_by_writing() {
        let known = encode_message(&stored(RECORD_SCHEMA));
        // Field 1000, a varint of 1.
        let with_unknown = [&known[..], &[0xc0, 0x3e, 0x01]].concat();
        let read = OperationRecord::decode(&kv(with_unknown.into())).unwrap();
        assert_eq!(read, OperationRecord::decode(&kv(known.clone())).unwrap());
        let message: store::OperationRecord = decode_message(&kv(read.encode())).unwrap();
        assert_eq!((message.schema, message.cancel_requested), (RECORD_SCHEMA, true));
        assert!(read.encode().len() <= known.len() + 64, "nothing of the unknown field is kept");
    }
}
