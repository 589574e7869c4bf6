//! etcd's quota: writing is refused here before etcd refuses it.
//!
//! etcd compares the size of its file, free pages included, with its quota. At the quota it raises an alarm that stays
//! until somebody clears it. So the members' sizes are looked at every [`PERIOD`], and earlier after much was written
//! through this store; between [`ACCEPT_PERCENT`] and [`REFUSE_PERCENT`] it stays as it was.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use futures::future::join_all;
use tokio::sync::Notify;

use super::health;
use super::members::Members;
use super::wire::from_etcd;
use crate::{Op, Result, StoreError, Txn};

/// etcd's quota where it is not told another: 2 GiB.
pub const DEFAULT_QUOTA_BYTES: u64 = 2 << 30;
/// From this share of the quota on, puts are refused.
pub const REFUSE_PERCENT: u64 = 90;
/// Below this share they are accepted again.
pub const ACCEPT_PERCENT: u64 = 80;

/// Puts are refused from this share on that the size last seen and what was written since come to together: the look at
/// the members may be late, and etcd's alarm is not.
const HOLD_PERCENT: u64 = 95;

/// How often the members are asked for their sizes.
const PERIOD: Duration = Duration::from_secs(5);
/// They are asked earlier once this share of the quota was written through this store.
const WRITTEN_PERCENT: u64 = 2;

/// What is known of the quota and of the size.
pub(super) struct Quota {
    configured: Option<u64>,
    reported: AtomicU64,
    size_bytes: AtomicU64,
    refusing: AtomicBool,
    /// Bytes put since the sizes were last asked for.
    written: AtomicU64,
    ask: Notify,
}

impl Quota {
    pub(super) fn new(configured: Option<u64>) -> Self {
        Self {
            configured: configured.filter(|bytes| *bytes > 0),
            reported: AtomicU64::new(0),
            size_bytes: AtomicU64::new(0),
            refusing: AtomicBool::new(false),
            written: AtomicU64::new(0),
            ask: Notify::new(),
        }
    }

    /// The quota in bytes.
    pub(super) fn bytes(&self) -> u64 {
        let reported = self.reported.load(Ordering::Relaxed);
        self.configured.unwrap_or(if reported > 0 { reported } else { DEFAULT_QUOTA_BYTES })
    }

    /// Refuses what grows while the store is nearly full.
    pub(super) fn admit(&self, txn: &Txn, members: &Members) -> Result<()> {
        let put_bytes: usize = txn.then.iter().map(put_bytes).sum();
        if put_bytes == 0 {
            return Ok(());
        }
        if self.refusing.load(Ordering::Relaxed) || self.is_overdue() {
            self.ask.notify_one();
            return Err(StoreError::Full(format!("{} at {}", self.describe(), members.endpoints())));
        }
        let written = self.written.fetch_add(put_bytes as u64, Ordering::Relaxed) + put_bytes as u64;
        if written > self.bytes() / 100 * WRITTEN_PERCENT {
            self.ask.notify_one();
        }
        Ok(())
    }

    /// Whether so much was written since the sizes were seen that the quota may be near.
    fn is_overdue(&self) -> bool {
        let written = self.written.load(Ordering::Relaxed);
        let ahead = u128::from(self.size_bytes.load(Ordering::Relaxed)) + u128::from(written);
        written > 0 && ahead * 100 >= u128::from(self.bytes()) * u128::from(HOLD_PERCENT)
    }

    pub(super) fn is_refusing(&self) -> bool {
        self.refusing.load(Ordering::Relaxed)
    }

    pub(super) fn warning(&self) -> Option<String> {
        self.is_refusing().then(|| self.describe())
    }

    /// Takes over what the members said: their largest size, and their quota where they know it (else 0).
    pub(super) fn saw(&self, size_bytes: u64, quota_bytes: u64) {
        self.reported.store(quota_bytes, Ordering::Relaxed);
        self.size_bytes.store(size_bytes, Ordering::Relaxed);
        let before = self.refusing.load(Ordering::Relaxed);
        let now = refuses(before, size_bytes, self.bytes());
        self.refusing.store(now, Ordering::Relaxed);
        match (before, now) {
            (false, true) => tracing::error!(size_bytes, quota_bytes = self.bytes(), "{}", self.describe()),
            (true, false) => tracing::info!(size_bytes, "etcd has room again; writes are accepted"),
            _ => {}
        }
    }

    fn describe(&self) -> String {
        let mib = |bytes: u64| bytes >> 20;
        format!(
            "etcd's file has {} MiB of a quota of {} MiB: writes are refused until compaction and defragmentation bring it \
             below {ACCEPT_PERCENT} %, deleting still works",
            mib(self.size_bytes.load(Ordering::Relaxed)),
            mib(self.bytes()),
        )
    }
}

fn put_bytes(op: &Op) -> usize {
    match op {
        Op::Put { key, value, .. } => key.len() + value.len(),
        Op::Delete(_) => 0,
    }
}

/// Whether puts are refused at this size.
fn refuses(before: bool, size_bytes: u64, quota_bytes: u64) -> bool {
    let percent = if before { ACCEPT_PERCENT } else { REFUSE_PERCENT };
    u128::from(size_bytes) * 100 >= u128::from(quota_bytes) * u128::from(percent)
}

/// Asks all members for their sizes. The largest counts; a member that does not answer does not.
pub(super) async fn observe(members: &Members, quota: &Quota) {
    quota.written.store(0, Ordering::Relaxed);
    let asked = join_all((0..members.len()).map(|index| health::status(members, index))).await;
    let answered: Vec<_> = asked.into_iter().flatten().collect();
    if let Some(largest) = answered.iter().map(|status| from_etcd(status.db_size())).max() {
        let reported =
            answered.iter().map(|status| from_etcd(status.db_size_quota())).filter(|quota| *quota > 0);
        quota.saw(largest, reported.min().unwrap_or(0));
    }
}

/// Looks at the sizes as long as the store is there.
pub(super) fn follow(members: &Arc<Members>, quota: &Arc<Quota>) {
    let (members, quota) = (Arc::downgrade(members), Arc::downgrade(quota));
    tokio::spawn(async move {
        loop {
            let Some(known) = quota.upgrade() else { return };
            let asked = tokio::time::timeout(PERIOD, known.ask.notified()).await.is_ok();
            drop(known);
            let (Some(members), Some(quota)) = (members.upgrade(), quota.upgrade()) else { return };
            observe(&members, &quota).await;
            if asked {
                tracing::trace!("asked for etcd's size after many writes");
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writing_is_refused_at_the_high_mark_and_accepted_below_the_low_one() {
        let cases = [
            (false, 89, false),
            (false, 90, true),
            (false, 120, true),
            (true, 89, true),
            (true, 80, true),
            (true, 79, false),
        ];
        for (before, size, refused) in cases {
            assert_eq!(refuses(before, size, 100), refused, "at {size} %, refusing before: {before}");
        }
    }

    #[test]
    fn what_was_written_since_the_last_look_counts_too() {
        let quota = Quota::new(Some(1000));
        quota.saw(700, 0);
        quota.written.store(249, Ordering::Relaxed);
        assert!(!quota.is_overdue());
        quota.written.store(250, Ordering::Relaxed);
        assert!(quota.is_overdue());
        // Once they were looked at it is their size alone that counts.
        quota.written.store(0, Ordering::Relaxed);
        quota.saw(950, 0);
        assert!(!quota.is_overdue() && quota.is_refusing());
    }

    #[test]
    fn what_was_configured_counts_before_what_is_reported_and_the_default() {
        let quota = Quota::new(None);
        assert_eq!(quota.bytes(), DEFAULT_QUOTA_BYTES);
        quota.saw(0, 8 << 30);
        assert_eq!(quota.bytes(), 8 << 30);
        let quota = Quota::new(Some(1 << 30));
        quota.saw(0, 8 << 30);
        assert_eq!(quota.bytes(), 1 << 30);
    }
}
