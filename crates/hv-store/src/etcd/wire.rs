//! Keys, ranges and revisions as etcd spells them, and back.

use bytes::Bytes;
use etcd_client::proto::PbKeyValue;

use crate::bounds::Interval;
use crate::{KeyRange, KeyValue, LeaseId, Revision};

/// The key below all others: keys are never empty.
const FIRST_KEY: &[u8] = b"\0";
/// As a range's end: to the last key.
const NO_END: &[u8] = b"\0";

/// A range on the wire: an empty end means that it is the one key.
#[derive(Clone, Debug)]
pub(super) struct WireRange {
    pub(super) key: Vec<u8>,
    pub(super) end: Vec<u8>,
}

impl WireRange {
    pub(super) fn of(keys: &KeyRange) -> Self {
        match keys {
            KeyRange::Key(key) => Self { key: key.to_vec(), end: Vec::new() },
            keys => Self::of_interval(&Interval::of(keys)),
        }
    }

    /// The interval is not empty: etcd has no way to say that.
    pub(super) fn of_interval(interval: &Interval) -> Self {
        let key = if interval.start.is_empty() { FIRST_KEY } else { &interval.start };
        let end = interval.end.as_deref().unwrap_or(NO_END);
        Self { key: key.to_vec(), end: end.to_vec() }
    }
}

pub(super) fn to_etcd(revision: Revision) -> i64 {
    i64::try_from(revision.0).unwrap_or(i64::MAX)
}

/// etcd counts in signed numbers that are never negative.
pub(super) fn from_etcd(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

pub(super) fn kv_from_etcd(kv: PbKeyValue) -> KeyValue {
    KeyValue {
        key: Bytes::from(kv.key),
        value: Bytes::from(kv.value),
        create_revision: Revision(from_etcd(kv.create_revision)),
        mod_revision: Revision(from_etcd(kv.mod_revision)),
        version: from_etcd(kv.version),
        lease: (kv.lease != 0).then_some(LeaseId(kv.lease)),
    }
}
