//! Records as values: the only place that turns domain values into bytes of the store and back.

use bytes::Bytes;
use hv_proto::convert;
use hv_types::{Event, InstanceRecord, NodeRecord};
use prost::Message;

use crate::{KeyValue, Result, StoreError};

/// A domain value that the store holds.
pub trait Record: Sized {
    /// The value's bytes.
    fn encode(&self) -> Bytes;

    /// The value that a key holds.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] if it cannot be read, or was written by a newer release.
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
    StoreError::Corrupt { key: String::from_utf8_lossy(&kv.key).into_owned(), source: Box::new(source) }
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
record!(Event, convert::event_to_record, convert::event_from_record);
