//! What both backends check before they act: the bounds of requests, and key ranges as intervals.

use std::time::Duration;

use bytes::Bytes;

use crate::{
    KeyRange, MAX_RANGE_LIMIT, MAX_TXN_OPS, MAX_VALUE_BYTES, Op, RangeRequest, Result, StoreError, Txn,
};

/// Longest key, in bytes.
pub const MAX_KEY_BYTES: usize = 4096;
/// Most bytes of keys and values in one transaction: etcd's default request limit is 1.5 MiB, less room for framing.
pub const MAX_TXN_BYTES: usize = 1_400_000;
/// Longest time of a lease, in seconds: etcd's bound.
pub const MAX_LEASE_SECONDS: u64 = 9_000_000_000;
/// What framing an operation or a compare is assumed to take, in bytes.
const OVERHEAD_BYTES: usize = 32;

/// The keys from `start` (included) to `end` (excluded, none is "to the last").
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interval {
    pub(crate) start: Bytes,
    pub(crate) end: Option<Bytes>,
}

impl Interval {
    /// The interval of a range of keys.
    pub fn of(keys: &KeyRange) -> Self {
        match keys {
            KeyRange::Key(key) => Self { start: key.clone(), end: Some(successor(key)) },
            KeyRange::Prefix(prefix) => Self { start: prefix.clone(), end: prefix_end(prefix) },
            KeyRange::Between(start, end) => Self { start: start.clone(), end: Some(end.clone()) },
        }
    }

    /// The first key that may be in it.
    pub fn first(&self) -> &Bytes {
        &self.start
    }

    /// Whether the key is in it.
    pub fn contains(&self, key: &[u8]) -> bool {
        key >= &self.start[..] && self.end.as_ref().is_none_or(|end| key < &end[..])
    }

    /// Whether no key is in it.
    pub fn is_empty(&self) -> bool {
        self.end.as_ref().is_some_and(|end| self.start >= *end)
    }

    /// Whether every key of `other` is also one of this interval.
    pub(crate) fn covers(&self, other: &Self) -> bool {
        let ends_after = match (&self.end, &other.end) {
            (None, _) => true,
            (Some(_), None) => false,
            (Some(mine), Some(theirs)) => mine >= theirs,
        };
        self.start <= other.start && ends_after
    }

    fn overlaps(&self, other: &Self) -> bool {
        let before = |end: &Option<Bytes>, start: &Bytes| end.as_ref().is_some_and(|end| end <= start);
        !self.is_empty()
            && !other.is_empty()
            && !before(&self.end, &other.start)
            && !before(&other.end, &self.start)
    }
}

/// The smallest key greater than `key`.
pub(crate) fn successor(key: &[u8]) -> Bytes {
    let mut next = Vec::with_capacity(key.len() + 1);
    next.extend_from_slice(key);
    next.push(0);
    next.into()
}

/// The smallest key greater than all that start with `prefix`; none if there is no such key.
fn prefix_end(prefix: &[u8]) -> Option<Bytes> {
    let kept = prefix.iter().rposition(|byte| *byte != u8::MAX)?;
    let mut end = prefix[..=kept].to_vec();
    end[kept] += 1;
    Some(end.into())
}

fn invalid<T>(why: impl Into<String>) -> Result<T> {
    Err(StoreError::InvalidRequest(why.into()))
}

fn check_key(key: &[u8]) -> Result<()> {
    match key.len() {
        0 => invalid("a key must not be empty"),
        len if len > MAX_KEY_BYTES => {
            invalid(format!("a key has {len} bytes; at most {MAX_KEY_BYTES} are allowed"))
        }
        _ => Ok(()),
    }
}

fn check_keys(keys: &KeyRange) -> Result<()> {
    match keys {
        KeyRange::Key(key) => check_key(key),
        KeyRange::Prefix(bound) => check_bound(bound),
        KeyRange::Between(start, end) => check_bound(start).and_then(|()| check_bound(end)),
    }
}

/// A bound of a range may be empty, and one byte longer than a key (the successor of the longest one).
fn check_bound(bound: &[u8]) -> Result<()> {
    if bound.len() > MAX_KEY_BYTES + 1 {
        return invalid(format!("a range's bound has {} bytes; at most {MAX_KEY_BYTES} count", bound.len()));
    }
    Ok(())
}

/// Refuses a read beyond a bound.
///
/// # Errors
/// [`StoreError::InvalidRequest`] names the bound.
pub fn check_range(request: &RangeRequest) -> Result<()> {
    if request.limit == 0 || request.limit > MAX_RANGE_LIMIT {
        return invalid(format!("a range's limit is {}; it must be 1 to {MAX_RANGE_LIMIT}", request.limit));
    }
    check_keys(&request.keys)
}

/// Refuses a watch beyond a bound.
///
/// # Errors
/// [`StoreError::InvalidRequest`] names the bound.
pub fn check_watch(keys: &KeyRange) -> Result<()> {
    if Interval::of(keys).is_empty() {
        return invalid("a watch of an empty range would never see anything");
    }
    check_keys(keys)
}

/// Refuses a transaction beyond a bound.
///
/// # Errors
/// [`StoreError::InvalidRequest`] names the bound.
pub fn check_txn(txn: &Txn) -> Result<()> {
    let lists = [
        ("compares", txn.compares.len()),
        ("operations", txn.then.len()),
        ("reads", txn.otherwise_get.len()),
    ];
    for (what, count) in lists {
        if count > MAX_TXN_OPS {
            return invalid(format!("a transaction has {count} {what}; at most {MAX_TXN_OPS} are allowed"));
        }
    }
    let mut total_bytes = 0;
    for compare in &txn.compares {
        total_bytes += check_compare(compare)? + OVERHEAD_BYTES;
    }
    for op in &txn.then {
        total_bytes += check_op(op)? + OVERHEAD_BYTES;
    }
    for key in &txn.otherwise_get {
        check_key(key)?;
        total_bytes += key.len() + OVERHEAD_BYTES;
    }
    if total_bytes > MAX_TXN_BYTES {
        return invalid(format!(
            "a transaction has {total_bytes} bytes of keys and values; at most {MAX_TXN_BYTES} are allowed"
        ));
    }
    check_changed_once(&txn.then)
}

/// A lease's time in whole seconds, rounded up.
pub fn lease_seconds(ttl: Duration) -> Result<u64> {
    let seconds = ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0);
    if seconds == 0 || seconds > MAX_LEASE_SECONDS {
        return invalid(format!("a lease of {ttl:?} was asked for; it must be 1 s to {MAX_LEASE_SECONDS} s"));
    }
    Ok(seconds)
}

/// How many bytes a compare takes.
fn check_compare(compare: &crate::Compare) -> Result<usize> {
    use crate::Compare::{Absent, CreateRevision, ModRevision, NoneIn, Present, Value, Version};
    let (key, operand_bytes) = match compare {
        Absent(key) | Present(key) | ModRevision(key, _) | CreateRevision(key, _) | Version(key, _) => {
            (key, 0)
        }
        Value(key, value) => (key, value.len()),
        NoneIn(keys) => {
            check_keys(keys)?;
            return Ok(2 * Interval::of(keys).start.len());
        }
    };
    check_key(key)?;
    Ok(key.len() + operand_bytes)
}

fn check_op(op: &Op) -> Result<usize> {
    match op {
        Op::Put { key, value, lease } => {
            check_key(key)?;
            if value.len() > MAX_VALUE_BYTES {
                let len = value.len();
                return invalid(format!("a value has {len} bytes; at most {MAX_VALUE_BYTES} are allowed"));
            }
            if lease.is_some_and(|lease| lease.0 == 0) {
                return invalid("lease 0 does not exist");
            }
            Ok(key.len() + value.len())
        }
        Op::Delete(keys) => {
            check_keys(keys)?;
            Ok(2 * Interval::of(keys).start.len())
        }
    }
}

/// Refuses operations that touch the same key. Sorted by their start, intervals that overlap any later one overlap
/// the next one too, so neighbours are enough.
fn check_changed_once(ops: &[Op]) -> Result<()> {
    let mut touched: Vec<Interval> = ops
        .iter()
        .map(|op| match op {
            Op::Put { key, .. } => Interval { start: key.clone(), end: Some(successor(key)) },
            Op::Delete(keys) => Interval::of(keys),
        })
        .filter(|interval| !interval.is_empty())
        .collect();
    touched.sort_by(|a, b| a.start.cmp(&b.start));
    for pair in touched.windows(2) {
        if pair[0].overlaps(&pair[1]) {
            let key = pair[1].start.escape_ascii();
            return invalid(format!("key {key} is changed twice in one transaction"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_ends_before_the_next_prefix() {
        let cases: [(&[u8], Option<&[u8]>); 5] = [
            (b"a", Some(b"b")),
            (b"a/", Some(b"a0")),
            (b"a\xff", Some(b"b")),
            (b"\xff\xff", None),
            (b"", None),
        ];
        for (prefix, end) in cases {
            assert_eq!(prefix_end(prefix).as_deref(), end, "{prefix:?}");
        }
    }

    #[test]
    fn overlapping_changes_are_refused() {
        let range = |a: &'static str, b: &'static str| Op::Delete(KeyRange::Between(a.into(), b.into()));
        let prefix = |p: &'static str| Op::Delete(KeyRange::Prefix(p.into()));
        let refused = [
            vec![Op::put("a", "1"), Op::put("b", "2"), Op::put("a", "3")],
            vec![Op::put("a/1", "1"), prefix("a/")],
            vec![prefix(""), Op::delete("x")],
            vec![range("a", "m"), range("c", "d")],
        ];
        for ops in refused {
            assert!(check_changed_once(&ops).is_err(), "{ops:?} was accepted");
        }
        let accepted = [
            vec![Op::put("a", "1"), Op::put("a\0", "2")],
            vec![range("a", "c"), range("c", "d"), Op::put("d", "")],
            vec![range("c", "a"), Op::put("b", "")],
            vec![prefix("a/"), Op::put("a", "")],
        ];
        for ops in accepted {
            assert!(check_changed_once(&ops).is_ok(), "{ops:?} was refused");
        }
    }
}
