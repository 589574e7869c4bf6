//! Times, labels and amounts.

use std::collections::HashMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hv_types::{Invalid, Labels, Resources, Selector};
use pbjson_types::Timestamp;

use crate::v1;

/// A time as the wire carries it. Times before 1970 become 1970.
#[must_use]
pub fn to_timestamp(time: SystemTime) -> Timestamp {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let nanos = i32::try_from(since.subsec_nanos()).unwrap_or_default();
    Timestamp { seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX), nanos }
}

/// A time from the wire; nonsense becomes 1970.
#[must_use]
pub fn from_timestamp(stamp: &Timestamp) -> SystemTime {
    // Timestamps end with the year 9999 (google/protobuf/timestamp.proto).
    const MAX_SECONDS: u64 = 253_402_300_799;
    let seconds = u64::try_from(stamp.seconds).unwrap_or_default().min(MAX_SECONDS);
    let nanos = u32::try_from(stamp.nanos).unwrap_or_default().min(999_999_999);
    UNIX_EPOCH + Duration::new(seconds, nanos)
}

/// Labels from the wire.
#[must_use]
pub fn labels_from(map: HashMap<String, String>) -> Labels {
    map.into_iter().collect()
}

/// A selector from the wire.
///
/// # Errors
/// A key or value is not one that a label could have.
pub fn selector_from(map: HashMap<String, String>) -> Result<Selector, Invalid> {
    Selector::new(labels_from(map))
}

/// An amount as the wire carries it.
#[must_use]
pub fn resources_to(amount: Resources) -> v1::Resources {
    v1::Resources {
        cpu_cores: clamp_i32(amount.cpu_cores),
        memory_bytes: clamp_i64(amount.memory_bytes),
        disk_bytes: clamp_i64(amount.disk_bytes),
        gpu_count: clamp_i32(amount.gpu_count),
    }
}

/// An amount from the wire.
///
/// # Errors
/// A part is negative.
pub fn resources_from(field: &str, amount: Option<v1::Resources>) -> Result<Resources, Invalid> {
    let amount = amount.unwrap_or_default();
    Ok(Resources {
        cpu_cores: unsigned_32(&format!("{field}.cpu_cores"), amount.cpu_cores)?,
        memory_bytes: unsigned(&format!("{field}.memory_bytes"), amount.memory_bytes)?,
        disk_bytes: unsigned(&format!("{field}.disk_bytes"), amount.disk_bytes)?,
        gpu_count: unsigned_32(&format!("{field}.gpu_count"), amount.gpu_count)?,
    })
}

pub(super) fn unsigned(field: &str, value: i64) -> Result<u64, Invalid> {
    u64::try_from(value).map_err(|_| Invalid::new(field, value, "must not be negative"))
}

pub(super) fn unsigned_32(field: &str, value: i32) -> Result<u32, Invalid> {
    u32::try_from(value).map_err(|_| Invalid::new(field, value, "must not be negative"))
}

pub(super) fn clamp_i64(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

pub(super) fn clamp_i32(value: u32) -> i32 {
    i32::try_from(value).unwrap_or(i32::MAX)
}
